"""co2d: the HTTP contract, on a temporary directory without sockets; then the parser; then the server over loopback."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types

import pytest

import co2d
import importer
import fuzz
import seqfile
from heads import MALFORMED, WELL_FORMED, parse, pieces_of

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NOW = 1_570_418_619.980794                                      # 2019-10-07T03:23:39.980794Z
PUSH = "/ou/co2unit-1/push-sequential/data/readings/readings-0000.tsv"


def make_settings(tmp_path, **changes):
    return importer.Settings()._replace(data_dir=str(tmp_path / "data"), var_dir=str(tmp_path / "var"),
                                   db=str(tmp_path / "var" / "db.sqlite3"), listen="127.0.0.1", port=0, **changes)


@pytest.fixture
def station(tmp_path):
    return co2d.Station(make_settings(tmp_path), clock=lambda: NOW)


def ask(station, method, target, body=b"", headers=b"", peer="127.0.0.1", now=NOW):
    """The answer to a request, given as a unit would send it."""
    head = b"%s %s HTTP/1.0\r\nHost: x\r\n%s\r\n" % (method.encode(), target.encode("utf-8"), headers)
    response = co2d.respond(station, co2d.parse_head(head)._replace(body=body, peer=peer, now=now))
    if response.after:
        response.after(lambda: None)
    return response


def pings(station):
    return open(station.var("pings", "pings-0000.tsv"), "rb").read().decode()


def stored(station, *path):
    with open(os.path.join(station.settings.data_dir, *path), "rb") as file:
        return file.read()


def make_update(station, name, files, unit="co2unit-1"):
    for path, content in files.items():
        target = os.path.join(station.settings.data_dir, unit, "updates", name, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as file:
            file.write(content)


# -- pings ------------------------------------------------------------------------------------------------------------


def test_a_ping_is_answered_with_an_empty_object_and_its_row_is_on_disk(station):
    response = ask(station, "POST", "/ou/co2unit-30aea42a50bc/alive?site_code=varanger-03&rssi_raw=8&rssi_dbm=-97&ber_raw=99")
    assert (response.status, response.body) == (200, b"{}\n")
    assert pings(station) == "2019-10-07T03:23:39.980794\tco2unit-30aea42a50bc\tvaranger-03\t8\t-97\n"


@pytest.mark.parametrize("query, row", [
    ("", "None\tNone\tNone"),
    ("?site_code=my site", "my site\tNone\tNone"),
    ("?site_code=vadsø&rssi_raw=None&rssi_dbm=None", "vadsø\tNone\tNone"),
    ("?site_code=a+b%20c", "a+b c\tNone\tNone"),
    ("?site_code=first&site_code=second", "first\tNone\tNone"),
    ("?site_code=a%0912%0A2019%0d%00%1b%c2%85z", "a?12?2019????z\tNone\tNone"),
    ("?site_code=a#b", "a#b\tNone\tNone"),
    ("?site_code=%ff", "\ufffd\tNone\tNone"),
])
def test_values_of_a_ping_are_kept_but_cannot_forge_lines(station, query, row):
    assert ask(station, "POST", "/ou/co2unit-1/alive" + query).status == 200
    assert pings(station) == "2019-10-07T03:23:39.980794\tco2unit-1\t" + row + "\n"


def test_a_ping_that_cannot_be_stored_is_answered_all_the_same(station):
    station.pings.directory = __file__                          # a file where the directory should be
    assert ask(station, "POST", "/ou/co2unit-1/alive?site_code=x").body == b"{}\n"
    assert station.counters["co2d_pings_lost_total", ()] == 1


def test_a_ping_is_answered_and_its_loss_is_told_when_the_directory_of_pings_cannot_even_be_looked_at(station):
    shutil.rmtree(station.settings.var_dir)
    station.settings = station.settings._replace(var_dir=os.path.join(__file__, "var"))
    station.pings.directory = station.var("pings")
    sent = []
    response = co2d.respond(station, co2d.parse_head(b"POST /ou/co2unit-1/alive HTTP/1.0\r\n\r\n"))
    response.after(lambda: sent.append(response.status))
    assert (sent, [problem.key for problem in station.health.problems()]) == ([200], ["pings"])


def test_pings_that_are_lost_are_a_problem_until_one_is_stored_again(station):
    directory, station.pings.directory = station.pings.directory, __file__
    ask(station, "POST", "/ou/co2unit-1/alive")
    problem, = station.health.problems()
    assert (problem.key, problem.level, problem.unit) == ("pings", importer.CRITICAL, "")
    assert problem.text.startswith("pings are answered, but not stored: [Errno 20] Not a directory")
    station.pings.directory = directory
    ask(station, "POST", "/ou/co2unit-1/alive")
    assert station.health.problems() == []


def test_what_a_unit_takes_of_an_update_and_cannot_be_noted_is_a_problem_until_it_can_again(station):
    make_update(station, "update-1", {"flash/main.py": b"1"})
    directory, station.fetches.log.directory = station.fetches.log.directory, __file__
    assert ask(station, "GET", "/ou/co2unit-1/updates/update-1?recursive=True").status == 200
    problem, = station.health.problems()
    assert problem.text.startswith("what units take of updates is not noted: [Errno 20] Not a directory")
    station.fetches.log.directory = directory
    assert ask(station, "GET", "/ou/co2unit-1/updates/update-1?recursive=True").status == 200
    assert station.health.problems() == []


def test_recent_pings_come_newest_first_over_all_files(station):
    station.pings.size_limit = 200
    for n in range(30):
        ask(station, "POST", "/ou/co2unit-%d/alive?site_code=s" % n, now=NOW + n)
    lines = ask(station, "GET", "/status/alive/recent", now=NOW + 60).body.decode().split("\n")
    assert lines[:3] == ["2019-10-07T03:24:39\t(now)", "2019-10-07T03:24:08\t29\ts\tNone\tNone", "2019-10-07T03:24:07\t28\ts\tNone\tNone"]
    assert len(lines) == 22
    ascending = ask(station, "GET", "/status/alive/recent?asc=True&refresh=5", now=NOW + 60)
    assert ascending.body.decode().split("\n")[:-1] == lines[:-1][::-1]
    assert ("Refresh", "5") in ascending.headers


def test_without_pings_recent_says_so(station):
    assert ask(station, "GET", "/status/alive/recent").body == b"2019-10-07T03:23:39\t(now)\nNo recent pings\n"


# -- uploads ----------------------------------------------------------------------------------------------------------


def test_a_chunk_is_stored_and_acked_at_its_end(station):
    response = ask(station, "PUT", PUSH + "?offset=0", b"hello")
    assert (response.status, response.body) == (200, b'{"ack_file":["readings-0000.tsv",5,5]}\n')
    assert stored(station, "co2unit-1", "data", "readings", "readings-0000.tsv") == b"hello"


def test_a_gap_is_refused_with_our_size(station):
    ask(station, "PUT", PUSH + "?offset=0", b"hello")
    response = ask(station, "PUT", PUSH + "?offset=6", b"x")
    assert (response.status, json.loads(response.body)) == (
        416, {"error": "SKIPPED_PART_OF_FILE", "ack_file": ["readings-0000.tsv", 5, 5]})


@pytest.mark.parametrize("target, status", [
    (PUSH, 400), (PUSH + "?offset=", 400), (PUSH + "?offset=-1", 400), (PUSH + "?offset=0&offset=0", 400),
    (PUSH + "?offset=1.0", 400), (PUSH + "?offset=0x1", 400), (PUSH + "?offset=+1", 400), (PUSH + "?offset=٣", 400),
    (PUSH + "?offset=0", 400),                                  # with an empty body, below
    ("/ou/co2unit-1/push-sequential/updates/update-1/flash/main.py?offset=0", 403),
    ("/ou/co2unit-1/push-sequential/set-aside/x?offset=0", 403),
    ("/ou/co2unit-1/push-sequential/data?offset=0", 404), ("/ou/co2unit-1/push-sequential/data/?offset=0", 404),
    ("/ou/co2unit-1/push-sequential/data/%s?offset=0" % ("ø" * 383), 404),                   # longer than any name on a card
    ("/ou/co2unit-1/push-sequential/data/.?offset=0", 404), ("/ou/co2unit-1/push-sequential/data/..?offset=0", 404),
    ("/ou/co2unit-1/push-sequential/data/2/3/4/5/6/7/8/9?offset=0", 403),
    ("/ou/co2unit-1/push-sequential/data/../updates/x?offset=0", 404),
    ("/ou/co2unit-1/push-sequential/data/%2e%2e/updates/x?offset=0", 404),
    ("/ou/co2unit-1/push-sequential/data/.hidden/x?offset=0", 404),
    ("/ou/co2unit-1/push-sequential/data/a%2Fb/x?offset=0", 404),
    ("/ou/co2unit-1/push-sequential/data/a b/x?offset=0", 404),
    ("/ou/co2unit-1/push-sequential/data//x?offset=0", 404),
    ("/ou/co2unit-1/push-sequential/data/%s/x?offset=0" % ("x" * 65), 404),
    ("/ou/../push-sequential/data/x?offset=0", 404),
    ("/ou/.x/push-sequential/data/x?offset=0", 404),
])
def test_what_is_not_a_chunk_is_refused_and_nothing_is_stored(station, target, status):
    body = b"" if target == PUSH + "?offset=0" else b"hello"
    assert ask(station, "PUT", target, body).status == status
    assert os.listdir(station.settings.data_dir) == []


def push(station, name, offset=0, body=b"hello", folder="data/readings", now=NOW):
    """Status and ack of a chunk of a file with any name, given as bytes."""
    head = b"PUT /ou/co2unit-1/push-sequential/%s/%s?offset=%d HTTP/1.0\r\n\r\n" % (folder.encode(), name, offset)
    response = co2d.respond(station, co2d.parse_head(head)._replace(body=body, now=now))
    return response.status, response.body


def kept(station, *path):
    folder = os.path.join(station.settings.data_dir, "co2unit-1", *path)
    return sorted(os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in os.walk(folder) for name in names)


@pytest.mark.parametrize("name, where", [
    (b"readings-0000 - Copy.tsv", "data/readings/readings-0000%20-%20Copy.tsv"),
    (b"readings-0000 (1).tsv", "data/readings/readings-0000%20%281%29.tsv"),
    (b"readings-0000_old.tsv", "data/readings/readings-0000_old.tsv"),
    (b"readings-%41#\xff.tsv", "data/readings/readings-%2541%23%FF.tsv"),
    (b"._readings-0000.tsv", "strange/data/readings/%2E_readings-0000.tsv"),
    (b".~lock.readings-0000.tsv#", "strange/data/readings/%2E%7Elock.readings-0000.tsv%23"),
    (b"SYSTEM~1", "strange/data/readings/SYSTEM%7E1"),
    (b"a" * 255, "strange/data/readings/" + "a" * 120 + "%a2c40b3daaaa"),
    (b"..a", "strange/data/readings/%2E.a"), (b".sequence.json", "strange/data/readings/%2Esequence.json")])
def test_a_file_of_a_card_may_have_any_name_and_is_acknowledged_byte_for_byte(station, name, where):
    assert push(station, name) == (200, b'{"ack_file":["%s",5,5]}\n' % name)
    assert stored(station, "co2unit-1", where) == b"hello"
    assert (os.path.join(station.settings.data_dir, "co2unit-1", where) in station.take_changed()) == where.startswith("data")


def test_a_strange_name_behind_the_newest_readings_is_sent_back_once_after_each_ping(station):
    assert push(station, "vadsø.tsv".encode()) == (416, b'{"error":"READINGS_FIRST","ack_file":["readings-0000.tsv",0,0]}\n')
    push(station, b"readings-0000.tsv")
    push(station, b"readings-0001.tsv", 0, b"hello, you\n")
    for _ in range(3):
        ask(station, "POST", "/ou/co2unit-1/alive")
        assert push(station, b"readings-0001.tsv~") == (200, b'{"ack_file":["readings-0001.tsv",11,11]}\n')
        for _ in range(2):
            assert push(station, "vadsø.tsv".encode()) == (503, b'{"error":"no more of this file before the next ping"}\n')
    assert push(station, b"readings-0000.tsv~")[0] == 200       # not behind
    assert kept(station, "strange") == ["data/readings/readings-0000.tsv%7E", "data/readings/readings-0001.tsv%7E"]


def test_after_a_restart_a_unit_with_a_strange_name_is_sent_back_to_the_beginning_of_its_newest_readings(station):
    for number in range(3):
        push(station, b"readings-%04d.tsv" % number)
    later = co2d.Station(station.settings, clock=lambda: NOW)
    assert push(later, b"zzz") == (200, b'{"ack_file":["readings-0002.tsv",0,0]}\n')


def test_strange_names_in_errors_never_keep_the_readings_back(station):
    push(station, b"errors-0000.txt", folder="errors")
    for name in (b"zzz", b"errors-0000.txt.bak", b"!"):
        for _ in range(3):
            assert push(station, name, folder="errors") == (200, b'{"ack_file":["%s",5,5]}\n' % name)
    assert kept(station, "strange") == ["errors/%21", "errors/errors-0000.txt.bak", "errors/zzz"]


def test_a_unit_with_strange_names_is_noted_and_also_that_its_error_log_stays_behind(station):
    def notes():
        return [problem.text for problem in co2d.directory_problems(station.settings.data_dir)]

    where = os.path.join(station.settings.data_dir, "co2unit-1", "strange")
    text = "co2unit-1 sends files with names that are not its own; they are kept in " + where
    push(station, b"errors-0000.txt", folder="errors")
    assert notes() == []
    push(station, b"._errors-0000.txt", folder="errors")
    assert notes() == [text]
    push(station, b"errors-0000.txt~", folder="errors")
    assert notes() == [text + "; its error log stays behind until they are taken off its card"]
    push(station, b"errors-0001.txt", folder="errors")
    assert notes() == [text]
    open(os.path.join(os.fsencode(where), b"errors", b"\xe6"), "w").close()      # put there by somebody
    assert notes() == [text + "; its error log stays behind until they are taken off its card"]


def test_strange_files_are_kept_up_to_a_limit_and_then_acknowledged_and_counted(station, monkeypatch):
    monkeypatch.setattr(seqfile, "MOST_STRANGE", 3 * 4096 + 10)
    for number in range(5):
        assert push(station, b"!%d" % number, body=b"hello")[0] == 200
    assert kept(station, "strange") == ["data/readings/%210", "data/readings/%211"]
    assert push(station, b"!0", 5, body=b"x" * 99)[0] == 200
    assert stored(station, "co2unit-1", "strange/data/readings/%210") == b"hello"
    assert station.samples()["co2d_strange_bytes_dropped_total", ()] == 15 + 99


def test_the_rest_of_a_strange_file_whose_beginning_is_not_here_is_acknowledged(station):
    assert push(station, b"!", 4096) == (200, b'{"ack_file":["!",4101,4101]}\n')
    assert kept(station, "strange") == []


def test_strange_files_on_a_full_disk_are_acknowledged(tmp_path):
    full = co2d.Station(make_settings(tmp_path, keep_free=101))
    assert push(full, b"!")[0] == 200 and push(full, b"readings-0000.tsv")[0] == 507
    assert kept(full) == []


def test_a_strange_file_that_cannot_be_stored_stops_no_unit(station, tmp_path):
    push(station, b"readings-0000.tsv")
    os.symlink(str(tmp_path), os.path.join(station.settings.data_dir, "co2unit-1", "strange"))
    assert push(station, b"!") == (200, b'{"ack_file":["!",5,5]}\n')
    assert station.samples()["co2d_strange_bytes_dropped_total", ()] == 5
    assert push(station, b"readings-0000.tsv", 5)[0] == 200


def test_what_replaces_a_strange_file_is_kept_beside_it_where_no_importer_reads(station):
    push(station, b"!", body=b"old")
    push(station, b"!", body=b"new")
    assert kept(station) == ["set-aside/strange/data/readings/%21@0@20191007T032339.980794Z", "strange/data/readings/%21"]


def test_a_name_that_is_a_directory_is_refused(station):
    os.makedirs(os.path.join(station.settings.data_dir, "co2unit-1", "data", "readings", "readings-0000.tsv"))
    assert ask(station, "PUT", PUSH + "?offset=0", b"hello").status == 400


@pytest.mark.parametrize("code, status", [(errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.EFBIG, 507), (errno.EIO, 503)])
def test_a_failing_disk_is_answered_with_come_back_tomorrow(tmp_path, code, status):
    def sync(fd):
        if broken:
            raise OSError(code, os.strerror(code))
    station, broken = co2d.Station(make_settings(tmp_path), clock=lambda: NOW, sync=sync), True
    assert ask(station, "PUT", PUSH + "?offset=0", b"hello").status == status
    broken = False
    assert ask(station, "PUT", PUSH + "?offset=0", b"hello").status == 200


@pytest.mark.parametrize("changes, offset, reason", [
    ({"max_file": 10}, 8, "file would exceed 10 bytes"),
    ({"max_unit_bytes": 10}, 8, "unit would exceed 10 bytes or 10000 files"),
    ({"keep_free": 101}, 8, "less than 101 % of the disk is free"),
])
def test_quotas_refuse_a_chunk_and_leave_what_is_there(tmp_path, changes, offset, reason):
    ask(co2d.Station(make_settings(tmp_path)), "PUT", PUSH + "?offset=0", b"12345678")
    station = co2d.Station(make_settings(tmp_path, **changes))
    response = ask(station, "PUT", PUSH + "?offset=%d" % offset, b"hello")
    assert (response.status, json.loads(response.body)) == (507, {"error": reason})
    assert stored(station, "co2unit-1", "data", "readings", "readings-0000.tsv") == b"12345678"


def test_a_unit_with_as_many_files_as_allowed_goes_on_with_those_it_has(tmp_path):
    station = co2d.Station(make_settings(tmp_path, max_unit_files=1))
    assert ask(station, "PUT", PUSH + "?offset=0", b"hello").status == 200
    assert ask(station, "PUT", PUSH + "?offset=5", b"hello").status == 200
    assert ask(station, "PUT", PUSH.replace("0000", "0001") + "?offset=0", b"hello").status == 507


def test_files_that_are_removed_make_room_in_the_quota_within_a_minute(tmp_path, monkeypatch):
    counted, usage_of = [], seqfile.usage_of
    monkeypatch.setattr(seqfile, "usage_of", lambda directory: counted.append(directory) or usage_of(directory))
    station = co2d.Station(make_settings(tmp_path, max_unit_bytes=10))
    assert ask(station, "PUT", PUSH + "?offset=0", b"12345678").status == 200
    for second in range(60):
        assert ask(station, "PUT", PUSH + "?offset=8", b"hello", now=NOW + second).status == 507
    os.unlink(os.path.join(station.settings.data_dir, "co2unit-1", "data", "readings", "readings-0000.tsv"))
    assert len(counted) == 2                                    # before it had files, and once with them
    assert ask(station, "PUT", PUSH + "?offset=0", b"hello", now=NOW + 60).status == 200
    assert len(counted) == 3


def test_what_a_unit_has_counts_though_its_first_file_after_a_restart_is_strange(tmp_path):
    assert upload(co2d.Station(make_settings(tmp_path)), "u1", body=b"12345678") == 200
    station = co2d.Station(make_settings(tmp_path, max_unit_bytes=20))
    target = "/ou/u1/push-sequential/errors/notes.txt?offset=0"
    assert ask(station, "PUT", target, b"strange").status == 200
    assert upload(station, "u1", offset=8, body=b"hello") == 200
    assert upload(station, "u1", offset=13, body=b"hello") == 507


def test_units_that_are_not_listed_are_refused(tmp_path):
    station = co2d.Station(make_settings(tmp_path, units="co2unit-3* co2unit-7"))
    assert [ask(station, "POST", "/ou/co2unit-%s/alive" % unit).status for unit in ("3", "39", "7", "70", "1")] == [
        200, 200, 200, 403, 403]


def upload(station, unit, offset=0, body=b"x"):
    target = "/ou/%s/push-sequential/data/readings/readings-0000.tsv?offset=%d" % (unit, offset)
    return ask(station, "PUT", target, body).status


def test_more_units_than_allowed_may_ping_but_not_upload_and_known_ones_go_on(tmp_path):
    station = co2d.Station(make_settings(tmp_path, max_units=2))
    assert [ask(station, "POST", "/ou/invented%d/alive" % number).status for number in range(10)] == [200] * 10
    assert [upload(station, "invented%d" % number, offset=9) for number in range(10)] == [416] * 10
    assert [upload(station, unit) for unit in ("u1", "u2", "u3", "u1", "u2")] == [200, 200, 403, 200, 200]


def upload_strange(station, unit):
    return ask(station, "PUT", "/ou/%s/push-sequential/errors/._errors-0000.txt?offset=0" % unit, b"x").status


def test_strange_files_of_invented_units_make_no_directories_beyond_the_limit(tmp_path):
    station = co2d.Station(make_settings(tmp_path, max_units=2))
    assert [upload_strange(station, unit) for unit in ("u1", "u2", "u3", "u1")] == [200] * 4
    assert sorted(os.listdir(station.settings.data_dir)) == ["u1", "u2"]


def test_units_that_have_sent_nothing_that_is_stored_are_not_let_in_later(tmp_path):
    station = co2d.Station(make_settings(tmp_path, max_units=1))
    assert [upload(station, unit, offset=9) for unit in ("u1", "u2")] == [416, 416]
    assert [upload(station, unit) for unit in ("u1", "u2")] == [200, 403]


def test_the_quota_counts_what_a_unit_had_before_a_restart_whatever_it_sends_first(tmp_path):
    assert upload(co2d.Station(make_settings(tmp_path)), "u1", body=b"12345678") == 200
    station = co2d.Station(make_settings(tmp_path, max_unit_bytes=10))
    assert upload_strange(station, "u1") == 200
    assert upload(station, "u1", offset=8, body=b"hello") == 507


def test_a_unit_that_was_removed_makes_room_for_another(tmp_path):
    station = co2d.Station(make_settings(tmp_path, max_units=1))
    assert upload(station, "u1") == 200
    shutil.rmtree(os.path.join(station.settings.data_dir, "u1"))
    assert upload(station, "u2") == 200


def test_the_disk_is_asked_for_room_once_a_second_or_when_what_it_said_is_used_up(tmp_path, monkeypatch):
    now = [NOW]
    station = co2d.Station(make_settings(tmp_path, keep_free=50), clock=lambda: now[0])
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or types.SimpleNamespace(total=20000, free=20000))
    assert [station.has_room(str(tmp_path), 4000) for _ in range(3)] == [True] * 3           # 10,000 bytes, of which 12,000 are taken
    assert len(asked) == 1
    assert station.has_room(str(tmp_path), 4000) and len(asked) == 2
    now[0] += 1
    assert station.has_room(str(tmp_path), 4000) and len(asked) == 3


def test_a_data_directory_that_is_removed_is_made_again_by_the_next_chunk(station):
    assert push(station, b"readings-0000.tsv")[0] == 200
    shutil.rmtree(station.settings.data_dir)
    assert push(station, b"readings-0000.tsv")[0] == 200


def test_pings_stop_where_the_disk_is_to_be_left_free_and_are_answered_and_counted_as_lost(tmp_path, caplog):
    station = co2d.Station(make_settings(tmp_path, keep_free=101))
    assert ask(station, "POST", "/ou/co2unit-1/alive?site_code=a").status == 200
    assert not os.path.exists(station.var("pings", "pings-0000.tsv"))
    assert station.samples()["co2d_pings_lost_total", ()] == 1
    assert caplog.records[0].getMessage() == "ping of co2unit-1 NOT STORED: less than 101 % of the disk is free"


def test_replaced_bytes_are_reported_to_the_import_thread(station):
    ask(station, "PUT", PUSH + "?offset=0", b"old\n")
    station.take_changed()
    ask(station, "PUT", PUSH + "?offset=0", b"new\n")
    assert sorted(os.path.relpath(path, station.settings.data_dir) for path in station.take_changed()) == [
        "co2unit-1/data/readings/readings-0000.tsv",
        "co2unit-1/set-aside/data/readings/readings-0000.tsv@0@20191007T032339.980794Z"]


# -- updates ----------------------------------------------------------------------------------------------------------


def test_an_update_is_listed_and_all_its_files_can_be_fetched(station):
    files = {"flash/main.py": b"print()", "flash/lib/x.py": b"", "conf-patch/ou-id.json": b"{}"}
    make_update(station, "update-2020-01-14a", files)
    base = "/ou/co2unit-1/updates"
    assert ask(station, "GET", base + "?recursive=False").body == b'["update-2020-01-14a"]\n'
    for argument in ("True", "1"):
        listed = json.loads(ask(station, "GET", base + "/update-2020-01-14a?recursive=" + argument).body)
        assert sorted(listed) == sorted(files)
    assert json.loads(ask(station, "GET", base + "/update-2020-01-14a?recursive=true").body) == ["conf-patch", "flash"]
    assert {name: ask(station, "GET", base + "/update-2020-01-14a/" + name).body for name in listed} == files


@pytest.mark.parametrize("spoil", [
    lambda d: None,                                             # no directory at all
    lambda d: os.makedirs(d),                                   # nothing in it
    lambda d: os.makedirs(d + "/update-1"),                     # an empty update
    lambda d: (os.makedirs(d), open(d + "/update-1", "w")),     # a stray file
    lambda d: os.makedirs(d + "/.update-1/flash/x"),            # staged
    lambda d: os.makedirs(d + "/update-1/flash"),               # half copied
    lambda d: (os.makedirs(d + "/update-1"), open(d + "/update-1/.main.py.swp", "w")),
    lambda d: (os.makedirs(d + "/update-1"), open(d + "/update-1/main copy.py", "w")),
    lambda d: (os.makedirs(d + "/update-1"), os.symlink("/etc/passwd", d + "/update-1/passwd")),
    lambda d: (os.makedirs(d), os.symlink("/etc", d + "/update-1")),
    lambda d: (os.makedirs(d + "/other/flash"), open(d + "/other/flash/main.py", "w")),
])
def test_what_a_unit_could_not_fetch_is_not_listed(station, spoil):
    spoil(os.path.join(station.settings.data_dir, "co2unit-1", "updates"))
    assert ask(station, "GET", "/ou/co2unit-1/updates?recursive=False").status == 404
    for path in ("update-1", "update-1/passwd", "update-1/flash", ".update-1/flash"):
        assert ask(station, "GET", "/ou/co2unit-1/updates/" + path).status == 404


@pytest.mark.parametrize("path", ["../data/readings/readings-0000.tsv", "%2e%2e/data/readings/readings-0000.tsv", "",
                                  "update-1/../../data/readings/readings-0000.tsv", "update-1%2f..%2f..%2fdata"])
def test_updates_lead_nowhere_else(station, path):
    ask(station, "PUT", PUSH + "?offset=0", b"hello")
    make_update(station, "update-1", {"flash/main.py": b"x"})
    assert ask(station, "GET", "/ou/co2unit-1/updates/" + path).status == 404


# -- routes -----------------------------------------------------------------------------------------------------------


def test_the_root_says_hello_to_units(station):
    assert ask(station, "GET", "/").body == b'"Hello world!"\n'


@pytest.mark.parametrize("method, target, status, allowed", [
    ("GET", "/ou/co2unit-1/alive", 405, "POST"), ("PUT", "/ou/co2unit-1/alive", 405, "POST"),
    ("POST", PUSH, 405, "PUT"), ("DELETE", PUSH, 405, "PUT"), ("POST", "/", 405, "GET, HEAD"),
    ("PUT", "/ou/co2unit-1/updates", 405, "GET, HEAD"), ("POST", "/status/alive/recent", 405, "GET, HEAD"),
    ("GET", "/nothing", 404, None), ("GET", "/ou/co2unit-1", 404, None), ("GET", "/ou/co2unit-1/data/readings", 404, None),
    ("GET", "/ou/co2unit-1/updates/", 404, None), ("GET", "//", 404, None),
])
def test_wrong_methods_and_unknown_paths(station, method, target, status, allowed):
    response = ask(station, method, target)
    assert (response.status, dict(response.headers).get("Allow")) == (status, allowed)
    assert set(json.loads(response.body)) == {"error"}


def test_a_published_file_is_served_with_its_date_and_not_twice(station):
    with open(station.var("pub", "plot.png"), "wb") as file:
        file.write(b"PNG")
    for prefix, age in (("/var/pub/", 590), ("/status/alive/", 590), ("/data/co2/", 3590)):
        response = ask(station, "GET", prefix + "plot.png")
        headers = dict(response.headers)
        assert (response.body, response.content_type, headers["Cache-Control"]) == (b"PNG", "image/png", "max-age=%d" % age)
        again = ask(station, "GET", prefix + "plot.png", headers=b"If-Modified-Since: %s\r\n" % headers["Last-Modified"].encode())
        assert (again.status, again.body) == (304, b"")
    assert ask(station, "GET", "/var/pub/nothing.png").status == 404
    os.symlink("/etc/passwd", station.var("pub", "passwd"))
    assert ask(station, "GET", "/var/pub/passwd").status == 404


def test_an_endpoint_that_breaks_is_one_log_line_and_a_500(station, caplog):
    station.admit = None
    assert ask(station, "POST", "/ou/co2unit-1/alive").status == 500
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "\n" not in caplog.records[0].getMessage()


def test_a_secret_is_needed_for_units_and_never_logged(tmp_path):
    station = co2d.Station(make_settings(tmp_path, secret="opensesame"))
    assert ask(station, "POST", "/opensesame/ou/co2unit-1/alive").status == 200
    assert [ask(station, "POST", target).status for target in (
        "/ou/co2unit-1/alive", "/wrong/ou/co2unit-1/alive", "/opensesam/ou/co2unit-1/alive")] == [404, 404, 404]


@pytest.mark.parametrize("target, logged", [
    ("/opensesame/ou/co2unit-1/alive?site_code=x", "/*/ou/co2unit-1/alive?site_code=x"),
    ("/open%73esame/ou/co2unit-1/alive", "/*/ou/co2unit-1/alive"),
    ("/opensesamf/ou/co2unit-1/alive", "/*/ou/co2unit-1/alive"),
    ("http://host/opensesame/ou/co2unit-1/alive", "/*/ou/co2unit-1/alive"),
    ("/ou/co2unit-1/opensesame/alive?opensesame", "/ou/co2unit-1/*/alive?*"),
    ("/opensesame", "/*"),
    ("/opensesane/x", "/*/x"),
    ("/lab/opensesame/ou/co2unit-1/alive", "/*/*/ou/co2unit-1/alive"),
    ("/ou/co2unit-1/OpenSeame/alive?site_code=opeNsesam%65", "/ou/co2unit-1/*/alive?site_code=*"),
    ("/ou/opensesamco2unit-1/alive", "/ou/*/alive"),
    ("/status/alive/recent?asc=1", "/status/alive/recent?asc=1"),
])
def test_a_secret_is_not_in_the_log_wherever_it_stands(tmp_path, caplog, target, logged):
    request = co2d.parse_head(b"POST %s HTTP/1.0\r\n\r\n" % target.encode())
    assert co2d.request_for_log("opensesame", request) == "POST " + logged


def test_a_secret_is_not_in_the_line_of_an_endpoint_that_breaks(tmp_path, caplog):
    station = co2d.Station(make_settings(tmp_path, secret="opensesame"))
    station.admit = None
    assert ask(station, "POST", "/opensesame/ou/co2unit-1/alive?site_code=x").status == 500
    assert caplog.records[0].getMessage().startswith('"POST /*/ou/co2unit-1/alive?site_code=x" failed: ')


def log_line(text, secret=""):
    writer = co2d.LogWriter(os.dup(2), is_journald=True)
    writer.secret = secret
    writer.finish(20)
    return writer.line(logging.LogRecord("co2d", logging.INFO, "", 0, text, (), None))


@pytest.mark.parametrize("text, line", [
    ("a\nb\r\x1b[2J", "<6>a\\nb\\r\\x1b[2J"),
    ("abc\u202edef\u2028\u200b", "<6>abc\\u202edef\\u2028\\u200b"),
    ("vadsø \udcff", "<6>vadsø \\udcff"),
    ("upload not stored: opensesam and 'xopensesamey'", "<6>upload not stored: * and '*'"),
])
def test_a_line_of_the_log_stays_one_line_and_tells_no_secret(text, line):
    assert log_line(text, "opensesame") == line


def test_a_quote_in_a_target_ends_no_field_of_the_log():
    request = co2d.parse_head(b'POST /ou/u/alive?site_code=a" 200 0 1.0ms \\x HTTP/1.0\r\n\r\n')
    assert co2d.request_for_log("", request) == r"POST /ou/u/alive?site_code=a\x22 200 0 1.0ms \x5cx"


def test_a_log_that_nobody_reads_holds_up_nobody_and_counts_what_is_missing(monkeypatch):
    monkeypatch.setattr(co2d, "MOST_LINES", 100)
    reader, writer = os.pipe()
    log = co2d.LogWriter(writer)
    for number in range(1000):
        log.handle(logging.LogRecord("co2d", logging.INFO, "", 0, "%d " + "." * 2000, (number,), None))
    assert log.dropped >= 800

    def finish():
        log.finish(20)
        os.close(writer)

    thread = threading.Thread(target=finish)
    thread.start()
    with open(reader, encoding="utf-8") as file:
        lines = file.read().splitlines()
    thread.join()
    written = [int(line.split()[2]) for line in lines if line.endswith("...")]
    assert written == sorted(written) and log.dropped == 1000 - len(written)


def test_lines_that_are_lost_are_a_problem_until_no_more_are(station):
    watching = co2d.Watching(station)
    station.log_writer = co2d.LogWriter(os.dup(2))
    station.log_writer.dropped = 7
    for expected in (["7 lines of the log are lost: nobody reads it (a full pipe, a stopped journald) "
                      "(since 2019-10-07 03:23 UTC)"], []):
        watching.look()
        assert [problem.text for problem in station.health.problems()] == expected
    assert station.samples()["co2d_log_lines_dropped_total", ()] == 7


def test_pages_and_metrics_are_for_their_networks(tmp_path):
    station = co2d.Station(make_settings(tmp_path, status_allow="10.0.0.0/8"))
    peers = ("127.0.0.1", "10.1.2.3", "::ffff:10.1.2.3", "11.0.0.1", "::1")
    assert [ask(station, "GET", "/status/alive/recent", peer=p).status for p in peers] == [403, 200, 200, 403, 403]
    assert [ask(station, "GET", "/metrics", peer=p).status for p in peers] == [200, 403, 403, 403, 200]


def test_metrics_follow_the_text_format(station):
    ask(station, "POST", "/ou/co2unit-1/alive")
    ask(station, "PUT", PUSH + "?offset=0", b"hello")
    for line in ask(station, "GET", "/metrics").body.decode().splitlines():
        assert co2d.re.match(r'# (HELP|TYPE) co2d_[a-z_]+ .+$|co2d_[a-z0-9_]+(\{[a-z]+="[^"\\]*"(,[a-z]+="[^"\\]*")*\})? [0-9.e+-]+$', line), line
    assert 'co2d_chunks_total{kind="append"} 1' in ask(station, "GET", "/metrics").body.decode()


def test_a_label_of_a_metric_has_no_escapes_but_those_of_quotes_and_backslashes(station):
    station.health.report("import", "critical", 'a\tb "c" \\d')
    assert rb'text="a\\tb \"c\" \\d (since ' in ask(station, "GET", "/metrics").body


def test_a_backup_without_files_names_no_newest(tmp_path, capsys):
    for name, told in (("a", "done: 1 files in x, the newest of 2019-10-07T03:23:39 UTC\n"), ("b", "done: 0 files in x\n")):
        (tmp_path / name).mkdir()
        if name == "a":
            (tmp_path / name / "file").touch()
            os.utime(tmp_path / name / "file", (NOW, NOW))
        co2d._tell_copied("done", [str(tmp_path / name)], "x", [])
        assert capsys.readouterr().out == told


def test_metrics_outlive_the_data_directory(station):
    os.rename(station.settings.data_dir, station.settings.data_dir + ".away")
    metrics = ask(station, "GET", "/metrics")
    assert metrics.status == 200 and b"co2d_uptime_seconds" in metrics.body and b"co2d_free_bytes" not in metrics.body


def test_readiness_is_tried_on_the_disk(station):
    assert ask(station, "GET", "/readyz").status == 200
    os.rename(station.settings.data_dir, station.settings.data_dir + ".gone")
    open(station.settings.data_dir, "w").close()
    reply = ask(station, "GET", "/readyz")
    assert (reply.status, reply.body) == (503, ("critical: uploads cannot be stored: [Errno 20] Not a directory: '%s' (since %s)\n" % (
        station.data(".probe"), importer.when(NOW))).encode())


def test_what_is_reported_is_told_until_it_is_over(station):
    clock = iter(range(100, 200)).__next__
    health = station.health = co2d.Health(clock)
    health.report("import", "critical", "imports fail: 1")
    health.report("storage:co2unit-1", "warning", "co2unit-1 has reached its quota", "co2unit-1")
    health.report("import", "critical", "imports fail: 2")
    assert [tuple(problem) for problem in health.problems()] == [
        ("import", "critical", "", "imports fail: 2 (since 1970-01-01 00:01 UTC)", 100),
        ("storage:co2unit-1", "warning", "co2unit-1", "co2unit-1 has reached its quota (since 1970-01-01 00:01 UTC)", 101)]
    reply = ask(station, "GET", "/readyz")
    assert (reply.status, reply.body) == (503, b"critical: imports fail: 2 (since 1970-01-01 00:01 UTC)\n"
                                                b"warning: co2unit-1 has reached its quota (since 1970-01-01 00:01 UTC)\n")
    assert (b'co2d_problem{key="import",level="critical",unit="",text="imports fail: 2 (since 1970-01-01 00:01 UTC)"} 1\n'
            in ask(station, "GET", "/metrics").body)
    health.clear("import")
    reply = ask(station, "GET", "/readyz")
    assert (reply.status, reply.body) == (200, b"warning: co2unit-1 has reached its quota (since 1970-01-01 00:01 UTC)\n")


def test_problems_go_to_the_log_and_to_a_file_when_they_come_and_when_they_are_over(station, caplog):
    watching = co2d.Watching(station)
    station.health.report("import", "critical", "imports fail")
    caplog.set_level("INFO")
    watching.look()
    watching.look()
    now = int(station.clock())
    assert importer.read_health(station.settings.var_dir, now) == station.health.problems() != []
    station.health.clear("import")
    watching.look()
    assert [record.getMessage() for record in caplog.records] == [
        text % importer.when(now) for text in ("imports fail (since %s)", "over: imports fail (since %s)")]
    assert importer.read_health(station.settings.var_dir, now + 300) == []
    (stale,) = importer.read_health(station.settings.var_dir, now + 301)
    assert (stale.level, stale.text[:42]) == ("critical", "co2d does not run, or cannot write (systemctl status co2d)"[:42])


def test_a_mistake_while_problems_are_looked_for_is_a_problem_and_ends_no_thread(station):
    def look():
        watching.stopping = True
        raise KeyError("x")

    watching = co2d.Watching(station)
    watching.look = look
    watching.run()
    assert station.health.problems()[0].text.startswith("problems are not looked for: KeyError('x') at ")
    co2d.Watching(station).look()
    assert station.health.problems() == []


# -- the parser -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [1, 7, 100000])
@pytest.mark.parametrize("message, expected", WELL_FORMED)
def test_a_well_formed_head_is_accepted_in_any_pieces(message, expected, size):
    request = parse(pieces_of(message, size))
    assert (request.method, request.path) == expected


@pytest.mark.parametrize("size", [1, 7, 100000])
@pytest.mark.parametrize("message, status", MALFORMED, ids=[repr(m[:40]) for m, _ in MALFORMED])
def test_a_malformed_head_is_refused_in_any_pieces(message, status, size):
    with pytest.raises(co2d.Refused) as refused:
        parse(pieces_of(message, size))
    assert refused.value.status == status or (status, refused.value.status) == (431, 414)


@pytest.mark.parametrize("message, _", WELL_FORMED + MALFORMED, ids=[repr(m[:40]) for m, _ in WELL_FORMED + MALFORMED])
def test_no_head_that_is_cut_anywhere_becomes_a_request(message, _):
    end = message.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in message else len(message) + 1
    for cut in range(min(end, 300)):
        try:
            assert parse([message[:cut]]) is None
        except co2d.Refused:
            pass


def test_the_parser_survives_fuzzing():
    fuzz.fuzz_parser(seed=20191007, rounds=5000)


# -- settings ---------------------------------------------------------------------------------------------------------


def run_co2d(*arguments, **environ):
    return subprocess.run([sys.executable, os.path.join(HERE, "co2d.py"), *arguments], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, env={**os.environ, **environ}, timeout=60)


@pytest.mark.parametrize("text, complaint", [
    ("[co2d]\nport = 80 80\n", ":2: port: '80 80' is not a whole number from 0 to 65535"),
    ("[co2d]\n\n\nprot = 80\n", ":4: unknown setting 'prot'"),
    ("[co2]\nport = 80\n", ":1: unknown section [co2], expected [co2d]"),
    ("[co2d]\nask_older = perhaps\n", ":2: ask_older: 'perhaps' is neither yes nor no"),
    ("[co2d]\nupload_dirs = data updates\n", ":2: upload_dirs: 'updates' cannot take uploads"),
    ("[co2d]\nstatus_allow = 10.0.0.0/99\n", ":2: status_allow: '10.0.0.0/99' does not appear to be an IPv4 or IPv6 network"),
    ("[co2d]\n\nport 80\n", ":3: not a line like: name = value"),
    ("[co2d]\ndata_dir = a\0b\n", ":2: data_dir: no path has a NUL in it"),
    ("port = 80\n", ":1: a [co2d] line must come first"),
    ("[co2d]\nport = 80\nport = 81\n", ":3: 'port' is there twice"),
    ("[DEFAULT]\nport = 80\n", ":1: unknown section [DEFAULT], expected [co2d]"),
    ("[co2d]\na(b = 80\n", ":2: unknown setting 'a(b'"),
    ("[co2d]\nport = 80\n[quality]\nspike = high\n", ":4: spike: 'high' is not a number"),
    ("[quality]\nspyke = 1\n", ":2: unknown setting 'spyke'"),
    ("[quality]\nspike_gap = 1.5\n", ":2: spike_gap: '1.5' is not a whole number"),
    ("[quality]\nspike = nan\n", ":2: spike: 'nan' is not a number"),
    ("[quality]\nco2_low = 500\nco2_high = 400\n", ": co2_low = 500 must be below co2_high = 400"),
    ("[quality]\ntemp_low = 90\n", ": temp_low = 90 must be below temp_high = 84.9"),
    ("[co2d]\ndata_dir = /etc/passwd\n", ": data_dir: /etc/passwd is not a directory"),
    ("[co2d]\ndata_dir = x\nvar_dir = ./y/../x\n", ": data_dir and var_dir are the same directory, {}/x"),
    ("[co2d]\ntls_key = k.pem\n", ": tls_key without tls_cert: there would be no TLS"),
    ("[co2d]\nlisten = localhost\n", ":2: listen: 'localhost' does not appear to be an IPv4 or IPv6 address"),
    ("[co2d]\ndata_dir =\n", ":2: data_dir: no directory is named"),
    ("[co2d]\nunits =\n", ":2: units: at least one is needed; * is all"),
    ("[co2d]\nupload_dirs =\n", ":2: upload_dirs: '' cannot take uploads"),
    ("[co2d]\nmax_body = 64 KB\n", ":2: max_body: '64 KB' is not a size: write bytes, or a number with K, M or G"),
])
def test_a_bad_setting_is_named_with_file_line_and_reason(tmp_path, text, complaint):
    file = tmp_path / "co2d.conf"
    file.write_text(text)
    with pytest.raises(importer.BadConfig) as refused:
        importer.load_settings(str(file), {})
    assert str(refused.value) == "%s%s" % (file, complaint.format(tmp_path))


@pytest.mark.parametrize("script, status", [("co2d.py", 78), ("importer.py", 1), ("plot_ascii.py", 1)])
@pytest.mark.parametrize("text, complaint", [("[co2d]\n\nprot = 80\n", "{0}:3: unknown setting 'prot'"),
                                             (None, "{0}: no such file")])
def test_all_three_scripts_refuse_a_wrong_configuration_with_the_same_words(tmp_path, text, complaint, script, status):
    file = tmp_path / "co2d.conf"
    if text:
        file.write_text(text)
    done = subprocess.run([sys.executable, os.path.join(HERE, script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, env={**os.environ, "CO2D_CONF": str(file)}, timeout=60)
    assert (done.returncode, done.stderr) == (status, "%s: %s\n" % (script[:-3], complaint.format(file)))


@pytest.mark.parametrize("query, status, words", [("xmin=2019-13-01", 400, "not a date or time"), ("sites=a", 400, "there is no option sites"),
                                                  ("site=%3Cb%3E", 404, "no site is called &#x27;&lt;b&gt;&#x27;")])
@pytest.mark.parametrize("place", ["/", "/status/alive/summary", "/data/co2/summary"])
def test_what_is_wrong_with_a_page_is_a_page_in_a_browser_and_json_for_programs(tmp_path, place, query, status, words):
    import html
    station = co2d.Station(make_settings(tmp_path))
    importer.import_new(station.archive)
    url = "%s?%s" % (place, query)
    browser = ask(station, "GET", url, headers=b"Accept: text/html,application/xhtml+xml\r\n")
    assert (browser.status, browser.content_type) == (status, "text/html; charset=utf-8")
    text = browser.body.decode()
    assert html.unescape(words) in html.unescape(text) and "<b>" not in text and 'href="/status/alive/summary"' in text
    if place != "/":                                            # to programs it says hello
        program = ask(station, "GET", url)
        assert (program.status, program.content_type) == (status, "application/json")
        assert html.unescape(words) in json.loads(program.body)["error"]


def test_a_database_that_cannot_be_read_is_503_in_a_browser_and_for_programs(tmp_path):
    station = co2d.Station(make_settings(tmp_path))
    with open(station.settings.db, "w") as file:
        file.write("no database " * 1000)
    for place in ("/data/co2/summary", "/status/alive/summary"):
        for accept in (b"text/html", b"*/*"):
            answer = ask(station, "GET", place, headers=b"Accept: %s\r\n" % accept)
            assert answer.status == 503 and "db.sqlite3 cannot be read (file is not a database)" in answer.body.decode()


SCRIPTS = ("co2d.py", "importer.py", "plot_ascii.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_who_interrupts_a_script_before_it_runs_sees_no_traceback(tmp_path, script):
    (tmp_path / "argparse.py").write_text("raise KeyboardInterrupt\n")         # of the modules that all of them import
    done = subprocess.run([sys.executable, os.path.join(HERE, script), "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")         # a shell calls it 130


@pytest.mark.parametrize("words", ["co2d.py --print-config", "co2d.py --check-config", "co2d.py --print-unit", "co2d.py --help",
                                   "co2d.py publish --help", "importer.py --help", "plot_ascii.py --help"])
@pytest.mark.parametrize("redirect, why", [(">&-", "stdout is closed"), (">/dev/full", "No space left on device")])
def test_a_stdout_that_is_closed_or_full_is_one_line_and_status_1(tmp_path, words, redirect, why):
    (tmp_path / "co2d.conf").write_text("[co2d]\n")
    environ = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run("%s %s/%s %s" % (sys.executable, HERE, words, redirect), shell=True, stderr=subprocess.PIPE, timeout=60,
                          env={**environ, "CO2D_CONF": str(tmp_path / "co2d.conf")})
    assert (done.returncode, done.stderr.decode()) == (1, "%s: %s\n" % (words.split(".")[0], why))


def test_a_setting_that_has_gone_is_accepted_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(importer.GONE, "elastic", "workers are few")
    file = tmp_path / "co2d.conf"
    file.write_text("[co2d]\nelastic = 5\n")
    assert importer.load_settings(str(file), {}).warnings == ("%s:2: elastic has no effect: workers are few" % file,)
    assert importer.load_settings(os.devnull, {"elastic": "5"}).warnings == ("--elastic: elastic has no effect: workers are few",)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    file = tmp_path / "co2d.conf"
    file.write_text("\ufeff[co2d]\nport = 81\nmax_units = 5\ndata_dir = there\n", encoding="utf-8")     # as a Windows editor would
    settings = co2d.settings_of(co2d.make_parser().parse_args(["--config", str(file), "--port", "82"]))
    assert (settings.port, settings.max_units, settings.max_body, settings.data_dir) == (82, 5, 65536, str(tmp_path / "there"))


def test_the_printed_configuration_reads_back_as_itself(tmp_path):
    settings = make_settings(tmp_path, secret="x", ask_older=False, keep_free=2.5)
    file = tmp_path / "co2d.conf"
    file.write_text(importer.format_config(settings))
    assert co2d.settings_of(co2d.make_parser().parse_args(["--config", str(file)])) == settings


def test_the_example_names_every_setting_with_its_default():
    text = importer.format_config(importer.Settings()).replace(HERE + "/", "")
    with open(os.path.join(HERE, "co2d.conf.example"), encoding="utf-8") as file:
        assert file.read() == re.sub("^(?=[a-z0-9_]+ = )", "#", text, flags=re.M)


# -- over the wire ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(co2d, "TICK", 0.05)

    def start(**changes):
        made.append(co2d.Server(co2d.Station(make_settings(tmp_path, **changes))))
        made[-1].start()
        return made[-1]

    yield start
    for one in made:
        one.stop()


def talk(server, *pieces, pause=0.0):
    """Send pieces, read to the end of the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(pause)
        return read_all(sock)


def read_all(sock):
    received = b""
    while True:
        try:
            data = sock.recv(65536)
        except ConnectionResetError:
            return received
        if not data:
            return received
        received += data


PUT_HELLO = (b"PUT " + PUSH.encode() + b"?offset=0 HTTP/1.0\r\n", b"Host: x\r\n", b"Content-Length: 5\r\n", b"\r\n", b"he", b"llo")


def test_a_chunk_in_small_segments_is_answered_and_the_connection_closed(server):
    reply = talk(server(), *PUT_HELLO, pause=0.01)
    assert reply.startswith(b"HTTP/1.1 200 OK\r\n") and b"\r\nConnection: close\r\n" in reply
    assert reply.endswith(b'\r\n\r\n{"ack_file":["readings-0000.tsv",5,5]}\n')


def test_a_client_that_pauses_for_longer_than_a_tick_is_waited_for(server):
    pieces = (PUT_HELLO[0][:20], PUT_HELLO[0][20:] + b"".join(PUT_HELLO[1:-1]), PUT_HELLO[-1])
    assert talk(server(), *pieces, pause=co2d.TICK + 0.1).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_body_shorter_than_announced_stores_nothing_and_gets_no_reply(server):
    one = server()
    with socket.create_connection(("127.0.0.1", one.port), timeout=20) as sock:
        sock.sendall(b"".join(PUT_HELLO[:-1]))
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b""
    assert os.listdir(one.station.settings.data_dir) == []


@pytest.mark.parametrize("sent, phase", [(1, "head"), (4, "body"), (5, "body")])
def test_a_request_that_is_cut_short_is_one_line_in_the_log(server, caplog, sent, phase):
    caplog.set_level("INFO")
    one = server()
    sock = socket.create_connection(("127.0.0.1", one.port), timeout=20)
    sock.sendall(b"".join(PUT_HELLO[:sent]))
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == b""
    sock.close()
    assert [record.getMessage() for record in caplog.records] == ["127.0.0.1 went away in its %s: closed by the client" % phase]


@pytest.mark.parametrize("request_line", [b"BREW / HTTP/1.0", b"GET / HTTP/2.0"])
def test_what_a_client_cannot_have_is_no_error_of_ours(server, caplog, request_line):
    caplog.set_level("INFO")
    assert talk(server(), request_line + b"\r\n\r\n").startswith(b"HTTP/1.1 50")
    while not caplog.records:
        time.sleep(0.01)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_body_that_is_too_long_is_refused_before_it_is_sent(server):
    reply = talk(server(), b"PUT " + PUSH.encode() + b"?offset=0 HTTP/1.0\r\nContent-Length: 65537\r\n\r\n", b"x" * 65537)
    assert reply.startswith(b"HTTP/1.1 413 ")


def test_a_client_that_expects_100_continue_is_answered_as_soon_as_it_sends_its_body_all_the_same(server):
    head = PUT_HELLO[0].replace(b"1.0", b"1.1") + b"Host: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    assert talk(server(), head, b"hello", pause=0.1).startswith(b"HTTP/1.1 200 OK\r\n")


def test_who_is_too_slow_is_told_so_even_when_all_the_time_is_over(server):
    one = server(request_seconds=0.3)
    with socket.create_connection(("127.0.0.1", one.port), timeout=20) as sock:
        sock.sendall(b"".join(PUT_HELLO[:-1]))
        assert read_all(sock).startswith(b"HTTP/1.1 408 ")
    assert os.listdir(one.station.settings.data_dir) == []


def test_who_reads_a_reply_by_drips_is_cut_off_when_the_time_is_over(server):
    one = server(request_seconds=0.3)
    make_update(one.station, "update-1", {"flash/big.bin": bytes(9_000_000)})
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", one.port))
        sock.sendall(b"GET /ou/co2unit-1/updates/update-1/flash/big.bin HTTP/1.0\r\n\r\n")
        end = time.monotonic() + 4 * co2d.LAST_WORDS
        assert sock.recv(15) == b"HTTP/1.1 200 OK"
        while one._open and time.monotonic() < end:
            sock.recv(60000)                                    # always a little, so that no send ever takes a whole TICK
            time.sleep(0.05)
    assert time.monotonic() < end


def test_who_waits_in_the_queue_when_the_daemon_stops_is_still_served(server):
    one = server()
    pings, append = one.station.pings, one.station.pings.append
    pings.append = lambda row, told: (time.sleep(0.2), append(row, told))
    socks = [socket.create_connection(("127.0.0.1", one.port), timeout=20) for _ in range(40)]
    for sock in socks:
        sock.sendall(b"POST /ou/co2unit-1/alive HTTP/1.0\r\n\r\n")
    one.stop()
    assert [read_all(sock)[:15] for sock in socks] == [b"HTTP/1.1 200 OK"] * 40
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", one.port), timeout=20)
    [sock.close() for sock in socks]


def test_slow_uploads_keep_nobody_in_the_queue_from_being_served_when_the_daemon_stops(server, monkeypatch):
    monkeypatch.setattr(co2d, "STOP_PATIENCE", 2.0)
    one = server()
    socks = [socket.create_connection(("127.0.0.1", one.port), timeout=20) for _ in range(16)]
    [sock.sendall(b"".join(PUT_HELLO[:-1])) for sock in socks[:8]]
    [sock.sendall(b"POST /ou/co2unit-1/alive HTTP/1.0\r\n\r\n") for sock in socks[8:]]
    stopping = threading.Thread(target=one.stop)
    stopping.start()
    assert [read_all(sock)[:15] for sock in socks[8:]] == [b"HTTP/1.1 200 OK"] * 8
    [sock.sendall(PUT_HELLO[-1]) for sock in socks[:8]]
    assert [read_all(sock)[:15] for sock in socks[:8]] == [b"HTTP/1.1 200 OK"] * 8
    stopping.join(20)
    [sock.close() for sock in socks]


class SlowDisk:
    """A sync that takes until `go_on` is set, and then fails if there is an `error`."""

    def __init__(self, error=None):
        self.entered, self.go_on, self.error = threading.Event(), threading.Event(), error

    def __call__(self, fd):
        self.entered.set()
        assert self.go_on.wait(20)
        if self.error:
            raise self.error


def ping_many(one, disk, number):
    """Connections whose pings wait for a sync: the first in it, the others for the next one."""
    one.station.pings._sync = disk
    socks = []
    for n in range(number):
        socks.append(socket.create_connection(("127.0.0.1", one.port), timeout=20))
        socks[-1].sendall(b"POST /ou/co2unit-%d/alive HTTP/1.0\r\n\r\n" % n)
        assert disk.entered.wait(20)
    while len(one.station.pings._waiting) < number - 1:
        time.sleep(0.001)
    return socks


def test_pings_that_wait_for_the_disk_take_no_threads_and_hold_up_nobody(server):
    one, disk = server(), SlowDisk()
    socks = ping_many(one, disk, 40)
    assert talk(one, *PUT_HELLO).startswith(b"HTTP/1.1 200 OK")
    assert len(one._open) == 40
    assert all(not select.select([sock], [], [], 0)[0] for sock in socks)    # none is answered before it is on disk
    disk.go_on.set()
    assert [read_all(sock)[:15] for sock in socks] == [b"HTTP/1.1 200 OK"] * 40
    assert pings(one.station).count("\n") == 40
    assert one.station.samples()["co2d_pings_total", ()] == 40
    [sock.close() for sock in socks]
    while one._open:
        time.sleep(0.001)


def test_a_failing_sync_is_logged_for_each_ping_that_waits_and_all_are_answered(server, caplog):
    one, disk = server(), SlowDisk(OSError(errno.EIO, "lost"))
    socks = ping_many(one, disk, 12)
    disk.go_on.set()
    assert [read_all(sock)[:15] for sock in socks] == [b"HTTP/1.1 200 OK"] * 12
    assert sum("NOT STORED" in record.getMessage() for record in caplog.records) == 12
    assert one.station.samples()["co2d_pings_lost_total", ()] == 12
    disk.error = None
    assert talk(one, b"POST /ou/co2unit-1/alive HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 OK")
    assert one.station.samples()["co2d_pings_total", ()] == 1
    [sock.close() for sock in socks]


def test_that_a_file_of_an_update_was_taken_is_on_disk_before_the_unit_sees_its_end(server):
    one = server()
    make_update(one.station, "update-1", {"flash/main.py": b"new"})
    assert talk(one, b"GET /ou/co2unit-1/updates/update-1/flash/main.py HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\nnew")
    with open(one.station.var("fetches", "fetches-0000.tsv")) as file:
        assert file.readline().split("\t")[1:] == ["co2unit-1", "update-1", "flash/main.py\n"]


def test_who_asks_for_the_head_of_a_file_has_not_taken_it(server):
    one = server()
    make_update(one.station, "update-1", {"flash/main.py": bytes(100_000)})
    reply = talk(one, b"HEAD /ou/co2unit-1/updates/update-1/flash/main.py HTTP/1.0\r\n\r\n")
    assert b"\r\nContent-Length: 100000\r\n" in reply and reply.endswith(b"\r\n\r\n")
    assert os.listdir(one.station.var("fetches")) == []


@pytest.mark.parametrize("linger", [struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)])      # RST, FIN
def test_who_is_gone_or_does_not_read_keeps_nobody_from_the_answer_to_a_ping(server, linger):
    one, disk = server(), SlowDisk()
    socks = ping_many(one, disk, 30)
    for sock in socks[::3]:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        sock.close()
    disk.go_on.set()                                            # and of the others, half are read only at the end
    for sock in socks[1::3] + socks[2::3]:
        assert read_all(sock).startswith(b"HTTP/1.1 200 OK")
        sock.close()
    assert pings(one.station).count("\n") == 30
    end = time.monotonic() + 5
    while one._open and time.monotonic() < end:
        time.sleep(0.001)
    assert not one._open


def test_a_stop_answers_the_pings_that_wait_for_the_disk(server):
    one, disk = server(), SlowDisk()
    socks = ping_many(one, disk, 20)
    stopping = threading.Thread(target=one.stop)
    stopping.start()
    time.sleep(2 * co2d.TICK)                                   # the workers that nothing holds have gone
    assert stopping.is_alive()
    disk.go_on.set()
    assert [read_all(sock)[:15] for sock in socks] == [b"HTTP/1.1 200 OK"] * 20
    stopping.join(20)
    assert not stopping.is_alive() and not one._open and pings(one.station).count("\n") == 20
    [sock.close() for sock in socks]


def test_status_pages_are_drawn_one_after_the_other_and_only_so_many_wait(server, monkeypatch):
    import plot_ascii
    one, entered, go_on = server(), threading.Event(), threading.Event()
    monkeypatch.setattr(plot_ascii, "web_page", lambda *_, **__: (entered.set(), go_on.wait(20), "a page")[-1])
    viewers = [socket.create_connection(("127.0.0.1", one.port), timeout=20) for _ in range(co2d.MOST_WAITING + 2)]
    viewers[0].sendall(b"GET /data/co2/summary HTTP/1.0\r\n\r\n")
    assert entered.wait(20)
    for number, sock in enumerate(viewers[1:], 1):
        sock.sendall(b"GET /data/co2/summary HTTP/1.0\r\n\r\n")
        while number <= co2d.MOST_WAITING and one._lanes["people"].qsize() < number:
            time.sleep(0.001)
    assert read_all(viewers[-1]).startswith(b"HTTP/1.1 503 ")
    assert talk(one, *PUT_HELLO).startswith(b"HTTP/1.1 200 OK")
    go_on.set()
    assert [read_all(sock)[:15] for sock in viewers[:-1]] == [b"HTTP/1.1 200 OK"] * (co2d.MOST_WAITING + 1)
    [sock.close() for sock in viewers]


def test_head_answers_without_a_body(server):
    reply = talk(server(), b"HEAD / HTTP/1.0\r\n\r\n")
    assert b"Content-Length: 15\r\n" in reply and reply.endswith(b"\r\n\r\n")


def test_a_slow_head_is_refused_by_its_total_time(server):
    one = server(head_seconds=0.3)
    with socket.create_connection(("127.0.0.1", one.port), timeout=20) as sock:
        with pytest.raises(OSError):
            for byte in b"GET /" + b"x" * 1000:
                sock.sendall(bytes([byte]))
                time.sleep(0.02)
                if sock.recv(1000, socket.MSG_DONTWAIT).startswith(b"HTTP/1.1 408"):
                    raise OSError("refused as it should be")


def test_honest_clients_are_served_while_many_others_send_nothing_more(server):
    one = server()
    slow = [socket.create_connection(("127.0.0.1", one.port), timeout=20) for _ in range(300)]
    for sock in slow:
        sock.sendall(b"GET /")
    assert talk(one, *PUT_HELLO).startswith(b"HTTP/1.1 200 OK")
    [sock.close() for sock in slow]


def test_five_hundred_units_at_once_are_all_served(server):
    one, replies = server(), []

    def unit(number):
        replies.append(talk(one, b"PUT " + PUSH.encode().replace(b"unit-1", b"unit-%d" % number) + b"?offset=0 HTTP/1.0\r\n",
                            b"Content-Length: 5\r\n\r\nhello")[:15])

    threads = [threading.Thread(target=unit, args=(n,)) for n in range(500)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert replies == [b"HTTP/1.1 200 OK"] * 500
    assert len(os.listdir(one.station.settings.data_dir)) == 500


def test_a_unit_that_calls_without_its_data_is_stuck_in_the_metrics(tmp_path):
    import fipy
    station = co2d.Station(make_settings(tmp_path), clock=lambda: NOW)
    unit = fipy.Unit("co2unit-30aea42a50bc", str(tmp_path / "card"))
    unit.measure(days=5)
    end = (unit.now - fipy.datetime(1970, 1, 1)).total_seconds()
    for name, content in unit.files().items():
        ask(station, "PUT", "/ou/co2unit-30aea42a50bc/push-sequential/data/readings/%s?offset=0" % name, content, now=end)
    for day in range(-5, 6):                                    # for five days it only calls
        ask(station, "POST", "/ou/co2unit-30aea42a50bc/alive?site_code=x", now=end + day * 86400)
    co2d.importer.import_new(station.archive, now=end + 5 * 86400)
    metrics = ask(station, "GET", "/metrics", now=end + 5 * 86400 + 60).body.decode()
    assert 'co2d_units{state="stuck"} 1' in metrics
    assert 'co2d_units{state="ok"} 1' in ask(station, "GET", "/metrics", now=end + 60).body.decode()


def test_after_an_import_that_took_long_units_have_the_machine_for_a_while(station, monkeypatch):
    def import_slowly(archive, paths):
        time.sleep(0.05)
        return co2d.importer.Summary()

    monkeypatch.setattr(co2d.importer, "import_new", import_slowly)
    importing, waits = co2d.Importing(station), []

    class Stopping(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            self.set()
            return True

    importing.stopping = Stopping()
    station.touch("a file")
    importing.run()
    assert waits[0] >= 4 * 0.05
