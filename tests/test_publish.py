"""`co2d publish`: what may reach a unit, how a unit over HTTP takes it, and what is seen of it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import pwd
import shutil
import stat
import subprocess
import tempfile
import threading

import pytest

import co2d
import fipy
import importer
import plot_ascii
import seqfile

UNIT = "co2unit-30aea42a50bc"


class Place:
    """A station with one known unit, a server that starts when it is needed, and a directory `new` with an update."""

    def __init__(self, directory):
        self.directory = directory
        settings = importer.Settings(data_dir=str(directory / "data"), var_dir=str(directory / "var"), port=0,
                                     db=str(directory / "var" / "db.sqlite3"), listen="127.0.0.1", quiet=True)
        self.station = co2d.Station(settings)
        os.makedirs(os.path.join(settings.data_dir, UNIT))
        (directory / "new" / "flash" / "lib").mkdir(parents=True)
        (directory / "new" / "flash" / "lib" / "x.py").write_text("x = 1\n")
        (directory / "new" / "flash" / "main.py").write_text("print()\n")

    @functools.cached_property
    def server(self):
        server = co2d.Server(self.station)
        server.start()
        return server


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    if "server" in vars(place):
        place.server.stop()


def publish(place, *arguments):
    station = place.station
    return co2d.main(["publish", *map(str, arguments), "--data-dir", station.settings.data_dir, "--var-dir", station.settings.var_dir])


def unit_of(place, **options):
    return fipy.Unit(UNIT, str(place.directory / "card"), ["http://127.0.0.1:%d" % place.server.port], **options)


def report(place, now=0.0):
    publishing = co2d.Publishing(place.station.settings, None)
    publishing.now = now
    return publishing.report(UNIT)


def say(place, path, method="GET", now=0.0):
    """What a request is answered, as if its last byte was handed over."""
    request = co2d.parse_head(b"%s /ou/%s/%s HTTP/1.0\r\n\r\n" % (method.encode(), UNIT.encode(), path.encode()))
    response = co2d.respond(place.station, request._replace(now=now))
    if response.sent:
        response.sent()
    return response


def ping(place, when, nickname, server=""):
    """A row of a ping file."""
    folder = os.path.join(place.station.settings.data_dir, server, "var", "pings") if server else place.station.var("pings")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "pings-0000.tsv"), "a", encoding="utf-8") as file:
        file.write("\t".join([when, UNIT, nickname, "None", "None"]) + "\n")


# -- taking an update -------------------------------------------------------------------------------------------------


def test_a_published_update_is_taken_once_and_the_report_says_so(place, capsys):
    station, server, tmp_path = place.station, place.server, place.directory
    assert publish(place, UNIT, tmp_path / "new", "--name", "update-2026-11-22a") == 0
    assert capsys.readouterr().out == UNIT + ": update-2026-11-22a published, 2 files\n"
    assert report(place)[0].endswith("\tnot fetched")
    unit = unit_of(place)
    assert unit.sync().error is None
    assert unit.flash == {"main.py": b"print()\n", "lib/x.py": b"x = 1\n"}
    assert [request for request in unit.sync().requests if "update-2026" in request.target] == []
    server.stop()                                               # what was handed over is noted after the connection's end
    assert "\tcomplete " in report(place)[0] and "\tcalled again, last " in report(place)[0]
    rows = [row[2:] for row in importer.read_rows(station.var("fetches"), seqfile.FETCHES, 4)]
    assert rows[0] == ["update-2026-11-22a", "(started)"]
    assert sorted(row[1] for row in rows[1:]) == ["(complete)", "flash/lib/x.py", "flash/main.py"]


def test_a_file_that_was_asked_for_but_not_handed_over_does_not_count(place):
    publish(place, UNIT, place.directory / "new", "--name", "update-1")
    request = co2d.parse_head(b"GET /ou/%s/updates/update-1/flash/main.py HTTP/1.0\r\n\r\n" % UNIT.encode())
    response = co2d.respond(place.station, request)
    assert response.body == b"print()\n" and report(place)[0].endswith("\tnot fetched")
    say(place, "updates/update-1/flash/lib/x.py", method="HEAD")
    assert report(place)[0].endswith("\tnot fetched")
    response.sent()
    assert report(place)[0].endswith("\t1 of 2 files in 0 nights")

def test_after_three_nights_in_vain_an_update_is_no_longer_listed_and_the_data_come_first(place, caplog):
    for name in ("update-1", "update-2"):
        publish(place, UNIT, place.directory / "new", "--name", name)
    day = 86400.0
    for night in range(3):
        assert say(place, "updates", now=night * day).body == b'["update-1","update-2"]\n'
        for again in (0, 60):                                   # two tries in a night are one night
            assert say(place, "updates/update-2?recursive=True", now=night * day + again).status == 200
        assert say(place, "updates/update-2/flash/main.py", now=night * day).status == 200
    restarted = co2d.Station(place.station.settings)
    for station in (place.station, restarted):
        place.station = station
        assert say(place, "updates", now=2 * day + 90).status == 200
        assert [say(place, "updates", now=night * day).status for night in (3, 4)] == [404, 404]
    assert report(place, 2 * day)[1].endswith("\t1 of 2 files in 3 nights")
    assert report(place, 3 * day)[1].endswith("\t1 of 2 files in 3 nights, not listed any more: publish it in smaller parts")
    assert {record.getMessage() for record in caplog.records} == {
        "updates/update-2 of %s is not listed any more: it took 3 nights in vain" % UNIT}
    publish(place, UNIT, place.directory / "new", "--name", "update-3")
    assert say(place, "updates", now=4 * day).body == b'["update-1","update-2","update-3"]\n'


def test_a_unit_that_asks_again_does_not_have_what_was_handed_over_to_the_kernel(place):
    publish(place, UNIT, place.directory / "new", "--name", "update-1")
    for night, status in enumerate([200, 200, 200, 200, 404]):
        now = night * 86400
        assert say(place, "updates", now=now).status == status
        if status == 200:
            say(place, "updates/update-1?recursive=True", now=now)
            assert not night or "\t2 of 2 files in %d nights" % (night + 1) in report(place, now)[0]
            say(place, "updates/update-1/flash/lib/x.py", now=now + 1)
            say(place, "updates/update-1/flash/main.py", now=now + 2)
            assert "\tcomplete " in report(place)[0]


def test_an_update_that_came_over_in_the_third_night_stays_listed(place, caplog):
    publish(place, UNIT, place.directory / "new", "--name", "update-1")
    for night in range(3):
        say(place, "updates/update-1?recursive=True", now=night * 86400)
        say(place, "updates/update-1/flash/" + ("lib/x.py" if night == 0 else "main.py"), now=night * 86400)
    assert say(place, "updates", now=10 * 86400).status == 200 and caplog.records == []


def test_an_update_that_the_daemon_cannot_offer_is_in_the_list_with_the_reason(place):
    folder = os.path.join(place.station.settings.data_dir, UNIT, "updates", "update-1", "flash")
    os.makedirs(folder)
    assert report(place) == [UNIT + "\tupdate-1\tnot listed for the unit: flash/ is empty"]


# -- what is seen of an update ----------------------------------------------------------------------------------------


def test_a_nickname_and_a_server_are_changed_by_a_patch(place):
    other = "http://127.0.0.1:%d/secret" % place.server.port
    assert publish(place, UNIT, "--nickname", "varanger-04", "--sync-dest", other) == 0
    unit = unit_of(place, nickname="varanger-03")
    unit.sync()
    assert (unit.nickname, unit.urls) == ("varanger-04", [other])


@pytest.mark.parametrize("calls, seen", [
    ([], "has not called since"),
    ([("2026-11-22T03:00:00.000000", "old")], "has not called since"),      # before it had the update
    ([("2026-11-22T03:20:00.000000", "old")], "still calls itself old"),    # twice, as after a power-on, proves nothing
    ([("2026-11-22T03:20:00.000000", "old"), ("2026-11-22T03:21:00.000000", "new"), ("2026-11-23T03:15:00.000000", "new")],
     "calls itself new since 2026-11-22T03:21:00"),
    ([("2026-11-22T03:20:00.000000", "new"), ("2026-11-23T03:15:00.000000", "old")], "still calls itself old"),
    ([("2026-11-22T03:20:00.000000", "new", "server-b")], "calls itself new since 2026-11-22T03:20:00"),
])
def test_a_nickname_has_taken_effect_when_the_unit_calls_itself_by_it(place, calls, seen):
    assert publish(place, UNIT, "--nickname", "new", "--name", "update-1") == 0
    for path in ("updates/update-1?recursive=True", "updates/update-1/conf-patch/ou-id.json"):
        say(place, path, now=1_795_317_300)                     # 2026-11-22T03:15:00
    for call in calls:
        ping(place, *call)
    assert report(place)[0].split("\t")[3:] == ["complete 2026-11-22T03:15:00", seen]


def test_what_a_later_update_has_undone_is_not_held_against_an_earlier_one(place):
    for number, nickname in enumerate(("one", "two")):
        name, now = "update-%d" % number, number * 86400
        assert publish(place, UNIT, "--nickname", nickname, "--name", name) == 0
        for path in ("?recursive=True", "/conf-patch/ou-id.json"):
            say(place, "updates/%s%s" % (name, path), now=now)
        for when in ("T00:01:00", "T00:02:00"):
            ping(place, co2d.seqfile.utc(now, "%Y-%m-%d") + when, nickname)
    assert [line.split("\t")[4] for line in report(place)] == [
        "calls itself one since 1970-01-01T00:01:00", "calls itself two since 1970-01-02T00:01:00"]


@pytest.mark.parametrize("calls, seen", [
    ([], "went to http://127.0.0.1:9"),
    ([("2026-11-22T03:20:00.000000", "n")], "calls here, last 2026-11-22T03:20:00"),
    ([("2026-11-22T03:20:00.000000", "n", "server-b")], "calls at server-b since 2026-11-22T03:20:00"),
])
def test_silence_here_is_what_is_expected_of_a_unit_that_was_sent_elsewhere(place, calls, seen):
    assert publish(place, UNIT, "--sync-dest", "http://127.0.0.1:9", "--name", "update-1") == 0
    for path in ("updates/update-1?recursive=True", "updates/update-1/conf-patch/ou-comm-config.json"):
        say(place, path, now=1_795_317_300)
    for call in calls:
        ping(place, *call)
    assert report(place)[0].split("\t")[3:] == ["complete 2026-11-22T03:15:00", seen]


# -- what must not reach a unit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("files, complaint", [
    ({}, "it is empty"),
    ({"boot.py": "x"}, "boot.py: only flash/ and conf-patch/ go to units"),
    ({"data/readings/x.tsv": "x"}, "only flash/ and conf-patch/ go to units"),
    ({"conf-patch/a.json": "{"}, "conf-patch/a.json: no JSON"),
    ({"conf-patch/a.json": "[1]"}, "a patch is a .json file with one object"),
    ({"conf-patch/a.txt": "{}"}, "a patch is a .json file with one object"),
    ({"conf-patch/a.json": "{}"}, "conf-patch/a.json: no firmware reads this file; --force publishes it all the same"),
    ({"conf-patch/ou-id.json": '{"nickname": "x"}'}, "no firmware uses the key nickname, only site_code, hw_id; --force"),
    ({"conf-patch/ou-comm-config.json": '{"ntp_max_drift_secs": 4}'}, "no firmware uses the key ntp_max_drift_secs, only"),
    ({"conf-patch/OU-ID.json": '{"hw_id": "co2unit-1"}'}, "must not be published: this replaces the id of the hardware"),
    ({"conf-patch/ou-comm-config.json": '{"sync_dest": "lab.example.org"}'}, "is not a URL that a unit could reach"),
    ({"conf-patch/ou-comm-config.json": '{"sync_dest": []}'}, "it would never report again"),
    ({"conf-patch/ou-comm-config.json": '{"sync_dest": null}'}, "it would never report again"),
    ({"conf-patch/ou-comm-config.json": '{"send_chunk_size": NaN}'}, "no JSON: NaN is no number that a unit could read"),
    ({"conf-patch/a.json": "[" * 100000}, "conf-patch/a.json: no JSON"),
    ({"conf-patch/more/ou-id.json": "{}"}, "with a directory in conf-patch/ a unit cannot install the update"),
    ({"flash/x.py": "", "flash/X.py": ""}, "flash/X.py and flash/x.py are the same file on a card (FAT)"),
    ({"flash/x.py": "", "flash/lib": "", "flash/x.py.": ""}, "flash/x.py and flash/x.py. are the same file on a card (FAT)"),
    ({"flash/lib": "", "flash/LIB/x.py": ""}, "flash/LIB and flash/lib are the same file on a card (FAT)"),
    ({"flash/frozen.bin": "x" * 300_001}, "flash/frozen.bin has 300001 bytes: a file of more than 300000 is not through"),
    ({"flash/.hidden": "x"}, "units cannot ask for"),
    ({"flash/my file.py": "x"}, "units cannot ask for"),
    ({"flash/big.bin": "x" * (1 << 20) + "x"}, "a unit can take"),
])
def test_what_must_not_reach_a_unit_is_refused(place, capsys, files, complaint):
    directory = place.directory / "bad"
    directory.mkdir()
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    assert publish(place, UNIT, directory) == 1
    assert complaint in capsys.readouterr().err
    assert report(place) == []


def test_a_database_that_cannot_be_read_is_one_line_for_publish_too(place, capsys):
    db = place.station.settings.db
    with open(db, "w") as file:
        file.write("no database " * 1000)
    assert publish(place, str(place.directory / "new"), "--site", "x") == 1
    assert capsys.readouterr().err.startswith("co2d: %s cannot be read (file is not a database)" % db)


@pytest.mark.parametrize("arguments, complaint", [
    ([], "which update"), (["co2unit-ffff", "DIR"], "no unit is called 'co2unit-ffff'; the nearest names are co2unit-30ae"),
    (["50bd", "DIR"], "no unit is called '50bd'; the nearest names are 30aea42a50bc"),
    (["DIR"], "for which units"), ([UNIT, "--set", "x"], "write FILE.KEY=VALUE"), ([UNIT, "--set", "ou-id=4"], "write FILE.KEY=VALUE"),
    ([UNIT, "DIR", "--name", "2026"], "must start with update-"), ([UNIT, "DIR", "--name", "update-../x"], "must start with update-"),
    ([UNIT, "--sync-dest", "ftp://x"], "is not a URL"), ([UNIT, "nowhere"], "There is no directory 'nowhere': co2d publish UNIT... DIR"),
    ([UNIT], "There is no directory '%s': co2d publish UNIT... DIR" % UNIT),
    ([UNIT, "--nickname", ""], "units send their nickname as it is"), ([UNIT, "--nickname", "a&b"], "units send their nickname as it is"), ([UNIT, "--nickname", "50%20"], "units send their nickname"),
    ([UNIT, "--withdraw", "update-1"], "update-1"), (["DIR", "--site", "x"], "no database yet"),
])
def test_wrong_arguments_are_named_and_publish_nothing(place, capsys, arguments, complaint):
    assert publish(place, *[str(place.directory / "new") if word == "DIR" else word for word in arguments]) == 1
    assert complaint in capsys.readouterr().err
    assert report(place) == []


def test_a_data_directory_that_is_not_there_is_named_and_not_made(tmp_path, capsys):
    assert co2d.main(["publish", "--all", "--nickname", "x", "--data-dir", str(tmp_path / "d"), "--var-dir", str(tmp_path / "v")]) == 1
    assert capsys.readouterr().err == "co2d: there is no data directory %s\n" % (tmp_path / "d")
    assert os.listdir(str(tmp_path)) == []


def test_when_a_unit_in_the_middle_fails_what_is_published_is_told_apart(place, capsys, monkeypatch):
    def fail(directory, name, files, publish_tree=seqfile.publish_tree, done=[]):
        done.append(name)
        if len(done) == 2:
            raise OSError(28, "No space left on device")
        publish_tree(directory, name, files)

    os.makedirs(os.path.join(place.station.settings.data_dir, UNIT + "2"))
    monkeypatch.setattr(seqfile, "publish_tree", fail)
    assert publish(place, "--all", place.directory / "new", "--name", "update-1") == 1
    out, err = capsys.readouterr()
    assert out == UNIT + ": update-1 published, 2 files\n"
    assert err == "co2d: %s2: [Errno 28] No space left on device\n" % UNIT


def test_a_name_must_sort_after_the_latest(place, capsys):
    assert publish(place, UNIT, place.directory / "new", "--name", "update-2026-11-22b") == 0
    assert publish(place, UNIT, place.directory / "new", "--name", "update-2026-11-22a") == 1
    assert "must start with update- and sort after update-2026-11-22b" in capsys.readouterr().err


def test_the_name_is_the_second_and_sorts_behind_the_letters_and_all_names_in_use():
    assert co2d.default_name("update-", 1_795_305_600) == "update-2026-11-22z000000"
    assert co2d.default_name("update-2026-11-21z235959", 1_795_305_600) == "update-2026-11-22z000000"
    assert co2d.default_name("update-2026-11-22a", 1_795_305_600) == "update-2026-11-22z000000"
    assert co2d.default_name("update-2026-11-22z000000", 1_795_305_600) == "update-2026-11-22z000001"


def test_a_name_that_no_second_of_today_sorts_after_asks_for_another(place, capsys):
    assert publish(place, UNIT, place.directory / "new", "--name", "update-3000") == 0
    assert publish(place, UNIT, place.directory / "new") == 1
    assert "must start with update- and sort after update-3000: give one with --name" in capsys.readouterr().err


def test_a_name_that_another_server_has_offered_is_used_as_well(place, capsys):
    folder = os.path.join(place.station.settings.data_dir, "server-b", "var", "fetches")
    os.makedirs(folder)
    with open(os.path.join(folder, "fetches-0000.tsv"), "w") as file:
        file.write("2026-11-22T03:15:00.000000\t%s\tupdate-b\tflash/main.py\n" % UNIT)
    assert publish(place, UNIT, place.directory / "new", "--name", "update-b") == 1
    assert publish(place, UNIT, place.directory / "new", "--name", "update-c") == 0
    assert "must start with update- and sort after update-b" in capsys.readouterr().err


def test_an_update_that_was_not_fetched_is_warned_about_when_another_supersedes_it(place, capsys):
    publish(place, UNIT, place.directory / "new", "--name", "update-2026-11-22a")
    publish(place, UNIT, place.directory / "new", "--name", "update-2026-11-22b")
    assert "has not fetched update-2026-11-22a yet" in capsys.readouterr().err
    unit_of(place).sync()
    place.server.stop()
    publish(place, UNIT, place.directory / "new", "--name", "update-2026-11-22c")
    assert capsys.readouterr().err == ""


def test_a_withdrawn_update_is_not_listed_any_more(place):
    publish(place, UNIT, place.directory / "new", "--name", "update-2026-11-22a")
    assert publish(place, UNIT, "--withdraw", "update-2026-11-22a") == 0
    unit = unit_of(place)
    assert unit.sync().error is None and unit.flash == {}
    assert publish(place, UNIT, place.directory / "new", "--name", "update-2026-11-22a") == 1


def test_a_name_that_a_unit_took_is_not_used_again_after_a_withdrawal(place, capsys):
    publish(place, UNIT, place.directory / "new", "--name", "update-2026-11-22b")
    unit_of(place).sync()
    place.server.stop()
    assert publish(place, UNIT, "--withdraw", "update-2026-11-22b") == 0
    assert "%s has fetched update-2026-11-22b before" % UNIT in capsys.readouterr().err
    for name in "ab":
        assert publish(place, UNIT, place.directory / "new", "--name", "update-2026-11-22" + name) == 1
    assert "must start with update- and sort after update-2026-11-22b" in capsys.readouterr().err


def test_a_withdrawal_warns_of_the_older_update_that_comes_to_light(place, capsys):
    for name in "ab":
        publish(place, UNIT, place.directory / "new", "--name", "update-2026-11-22" + name)
    capsys.readouterr()
    assert publish(place, UNIT, "--withdraw", "update-2026-11-22b") == 0
    assert "has not fetched update-2026-11-22a, and will take that now" in capsys.readouterr().err


def test_a_withdrawal_is_for_the_units_that_have_the_update_and_can_be_tried(place, capsys):
    os.makedirs(os.path.join(place.station.settings.data_dir, "co2unit-other"))
    publish(place, UNIT, place.directory / "new", "--name", "update-2026-11-22a")
    capsys.readouterr()
    for arguments, said in ((["--dry-run"], "would be withdrawn"), ([], "withdrawn")):
        assert len(report(place)) == 1
        assert publish(place, "--all", "--withdraw", "update-2026-11-22a", *arguments) == 0
        assert capsys.readouterr().out == "%s: update-2026-11-22a %s\n" % (UNIT, said)
    assert report(place) == []
    assert publish(place, "--all", "--withdraw", "update-2026-11-22a") == 1


def test_a_directory_that_is_a_link_is_no_unit_and_keeps_no_other_from_what_is_for_all(place, capsys):
    data = place.station.settings.data_dir
    os.symlink(UNIT, os.path.join(data, "co2unit-link"))
    assert publish(place, "--all", place.directory / "new", "--name", "update-2026-11-22a") == 0
    assert publish(place, "--list") == 0
    assert publish(place, "--all", "--withdraw", "update-2026-11-22a") == 0
    assert "co2unit-link" not in capsys.readouterr().out
    assert publish(place, "co2unit-link", place.directory / "new") == 1


def test_a_dry_run_changes_nothing(place, capsys):
    assert publish(place, UNIT, place.directory / "new", "--dry-run") == 0
    assert "would be published" in capsys.readouterr().out
    assert not os.path.exists(os.path.join(place.station.settings.data_dir, UNIT, "updates"))


def test_no_unit_ever_sees_a_half_of_an_update(place):
    station, tmp_path = place.station, place.directory
    for n in range(60):
        (tmp_path / "new" / "flash" / ("f%02d.py" % n)).write_text("x = %d\n" % n)
    seen, stop = set(), threading.Event()

    def look():
        while not stop.is_set():
            request = co2d.parse_head(b"GET /ou/%s/updates/update-2026-11-22a?recursive=True HTTP/1.0\r\n\r\n" % UNIT.encode())
            response = co2d.respond(station, request)
            seen.add(len(json.loads(response.body)) if response.status == 200 else 0)

    thread = threading.Thread(target=look)
    thread.start()
    publish(place, UNIT, tmp_path / "new", "--name", "update-2026-11-22a")
    stop.set()
    thread.join()
    assert seen <= {0, 62}


@pytest.mark.parametrize("url", ["http://host:8080/", "http://..", "http://a..b", "http://%s" % ("a" * 64), "http://host/SECRET/", "http://[::1]:8080", "http://host:65536", "http://host:0", "http://host:8080?x", "host:8080",
                                 "ftp://host"])
def test_a_url_that_would_cut_units_off_is_refused(place, url, capsys):
    assert publish(place, UNIT, "--sync-dest", url) == 1
    assert "is not a URL that a unit could reach" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080", "https://127.0.0.1", "http://127.0.0.1:8080/SECRET"])
def test_what_is_published_lies_in_the_files_and_keys_that_the_firmware_reads(place, url):
    assert publish(place, UNIT, "--sync-dest", url, "--nickname", "varanger-04", "--name", "update-a") == 0
    written = {}
    folder = os.path.join(place.station.settings.data_dir, UNIT, "updates", "update-a", "conf-patch")
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            written[name] = json.load(file)
    assert written == {"ou-id.json": {"site_code": "varanger-04"}, "ou-comm-config.json": {"sync_dest": [url]}}


def test_a_url_at_which_a_unit_would_be_refused_is_told(place, capsys):
    server = co2d.Server(place.station)
    server.start()
    try:
        url = "http://127.0.0.1:%d" % server.port
        assert publish(place, UNIT, "--sync-dest", url, "--dry-run") == 0 and not capsys.readouterr().err
        assert publish(place, UNIT, "--sync-dest", url + "/WRONG", "--dry-run") == 0
        assert "no station answers at %s/WRONG: HTTP Error 404" % url in capsys.readouterr().err
    finally:
        server.stop()


@pytest.mark.parametrize("assignment, written", [
    ("ou-comm-config.send_chunk_size=2048", {"send_chunk_size": 2048}),
    ("ou-comm-config.json.total_connect_secs_max=600", {"total_connect_secs_max": 600}),
    ("ou-comm-config.ntp_host=ntp.uio.no", {"ntp_host": "ntp.uio.no"}), ("ou-comm-config.ntp_host=null", {"ntp_host": None}),
    ('ou-comm-config.sync_dirs=[["data/readings","push_sequential"],["updates","pull_last_dir"]]',
     {"sync_dirs": [["data/readings", "push_sequential"], ["updates", "pull_last_dir"]]}),
    ("ou-id.site_code=vads\u00f8 4", {"site_code": "vads\u00f8 4"}), ('ou-id.site_code=a"b\\c', {"site_code": 'a"b\\c'}),
    ("OU-ID.site_code=n", {"site_code": "n"}), ("ou-comm-config.sync_dest=http://a:65535", {"sync_dest": "http://a:65535"}),
    ('schedule.tasks=[[6,"minutes",30,0],[7,"daily_random",3,2,25]]', {"tasks": [[6, "minutes", 30, 0], [7, "daily_random", 3, 2, 25]]}),
])
def test_a_key_of_the_configuration_is_set(place, assignment, written):
    assert publish(place, UNIT, "--set", assignment, "--name", "update-a") == 0
    file = assignment.split(".")[0].lower() + ".json"
    body = say(place, "updates/update-a/conf-patch/" + file).body
    assert json.loads(body.decode("utf-8")) == written


URL_NEEDED = "not a URL that a unit could reach: http(s)://name-or-IPv4[:port][/secret], without a slash at the end"
TASKS_NEEDED = "needed are tasks 6 (measure) and 7 (communicate)"
DIRS_NEEDED = 'needed is a list with ["updates", "pull_last_dir"] and ["data/readings", "push_sequential"]'
CHUNK_NEEDED = "a whole number is needed, from 256 (less is too slow for a night) to max_body"


@pytest.mark.parametrize("assignment, complaint", [
    *(("ou-comm-config.send_chunk_size=" + value, CHUNK_NEEDED) for value in ("0", "65537", "4096.0", "true", "many")),
    ("ou-comm-config.send_chunk_size=NaN", "NaN is no number"), ("ou-comm-config.total_connect_secs_max=1e999", "Infinity is no number"),
    *(("ou-comm-config.total_connect_secs_max=" + value, "seconds from 60") for value in ("null", "5", '"300"')),
    ("ou-comm-config.connect_backoff_max=null", "a whole number from 1 to 30"),
    ("ou-comm-config.ntp_host=4", "a host name is needed"), ("ou-comm-config.ntp_host=a b", "a host name is needed"),
    *(("ou-comm-config.sync_dest=" + value, URL_NEEDED) for value in ("", "null", "[]", "[4]", "{}", '["http://a","b"]')),
    *(("ou-comm-config.sync_dirs=" + value, DIRS_NEEDED) for value in (
        "[]", "4", "null", '[["updates"]]', '[["updates","pull_last_dir"]]', '[["data/readings","push_sequential"]]',
        '[["updates","pull_all"],["data/readings","push_sequential"]]',
        '[["updates","pull_last_dir"],["data/readings","push_sequential"],["logs","push_sequential"]]',
        '[["updates","pull_last_dir"],["data/readings","push_sequential"],["data/../x","push_sequential"]]')),
    *(("ou-id.site_code=" + value, "so it is a text") for value in ("4", "None", "", "a ", "a&b", '"\\u0000"', "x" * 65)),
    ("ou-id.hw_id=co2unit-1", "the readings of two units would be mixed"),
    ("ou-id.nickname=x", "no firmware uses the key nickname"), ("sync-dest.sync_dest=x", "no firmware reads this file"),
    *(("schedule.tasks=" + value, TASKS_NEEDED) for value in (
        "[]", "4", "{}", '[[6,"minutes",30,0]]', '[[6]]', '[[2,"minutes",30,0],[6,"minutes",30,0],[7,"daily",3,15]]',
        '[[6,"hourly",30],[7,"daily",3,15]]', '[[6,"minutes",30,0],[7,"daily",3]]', '[[6,"minutes",30,0],[7,"daily",24,0]]',
        '[[6,"minutes",0,0],[7,"daily",3,15]]', '[[6,"minutes",30,0],[7,"daily_random",3,15,15]]')),
])
def test_a_value_that_would_harm_a_unit_is_refused_with_the_reason(place, capsys, assignment, complaint):
    assert publish(place, UNIT, "--set", assignment) == 1
    assert complaint in capsys.readouterr().err
    assert report(place) == []


def test_force_publishes_what_no_firmware_reads_and_warns_but_never_what_harms(place, capsys):
    assert publish(place, UNIT, "--set", "ou-id.colour=red", "--set", "other.x=1", "--force") == 0
    assert capsys.readouterr().err == (
        "co2d: warning: conf-patch/ou-id.json: no firmware uses the key colour, only site_code, hw_id\n"
        "co2d: warning: conf-patch/other.json: no firmware reads this file\n")
    assert publish(place, UNIT, "--set", "ou-id.hw_id=x", "--force") == 1


def test_a_module_that_an_old_one_on_the_unit_would_hide_is_warned_about(place, capsys):
    (place.directory / "new" / "flash" / "main.mpy").write_text("")
    assert publish(place, UNIT, place.directory / "new") == 0
    assert capsys.readouterr().err == "co2d: warning: flash/main.mpy: a unit would go on using the .py beside it\n"


# -- units ------------------------------------------------------------------------------------------------------------

OTHER = "co2unit-30aea4ffffff"


@pytest.mark.parametrize("units, reached", [
    ([OTHER], [OTHER]), (["--all"], [UNIT, OTHER]), (["ffff"], [OTHER]), (["lab desk"], [OTHER])])
def test_a_unit_that_has_only_pinged_is_a_unit(place, capsys, units, reached):
    with open(place.station.var("pings", "pings-0000.tsv"), "w") as file:
        file.write("2026-11-22T03:15:00.000000\t%s\tlab desk\tNone\tNone\n" % OTHER)
        file.write("2026-11-22T03:15:00.000000\t../x\tlab desk\tNone\tNone\n")
    assert publish(place, *units, place.directory / "new", "--name", "update-1") == 0
    assert capsys.readouterr().out == "".join("%s: update-1 published, 2 files\n" % unit for unit in reached)


def test_a_site_that_there_is_not_is_told_from_one_where_no_unit_stands(place, capsys):
    folder = os.path.join(place.station.settings.data_dir, "manual")
    os.makedirs(folder)
    with open(os.path.join(folder, "deploy_durations_tiered.tsv"), "w") as file:
        file.write("unit_id\tnickname\tsite\ttier\tstatus\tstart_ts\tend_ts\tnote\n")
        file.write("%s\tn\tvj_re_sn_1\t30\tdeployed\t2019-08-01\t\t\n" % UNIT)
        file.write("%s\tn\tlab\t30\tdeployed\t2018-08-01\t2019-08-01\t\n" % UNIT)
    importer.import_new(place.station.archive)
    for site, status, said in (("vj_re_sn_9", 1, "no site is called 'vj_re_sn_9'; the nearest names are vj_re_sn_1"),
                               ("lab", 1, "no unit stands at lab today"), ("vj_re_sn_1", 0, "")):
        assert publish(place, "--site", site, place.directory / "new") == status
        assert said in capsys.readouterr().err


# -- who publishes ----------------------------------------------------------------------------------------------------

PYTHON = shutil.which("python3", path="/usr/bin")              # one that other users can run
needs_root = pytest.mark.skipif(os.geteuid() != 0 or not PYTHON or not shutil.which("runuser"),
                                reason="needs root, runuser and a Python for all users")


def publish_as(place, user, umask, *arguments):
    """Publish as another Unix user."""
    scripts = place.directory / "scripts"
    for name in ("co2d.py", "importer.py", "seqfile.py"):
        scripts.mkdir(exist_ok=True)
        shutil.copy(os.path.join(os.path.dirname(co2d.__file__), name), str(scripts))
    settings = place.station.settings
    command = ["runuser", "-u", user, "--", "sh", "-c", 'umask %o; exec "$@"' % umask, "-", PYTHON, "-B", str(scripts / "co2d.py"),
               "publish", *arguments, "--data-dir", settings.data_dir, "--var-dir", settings.var_dir]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, cwd="/")


@pytest.fixture
def station_of_nobody():
    """The station belongs to the user nobody; nobody else may enter. (pytest's own directories are closed to others.)"""
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        place = Place(pathlib.Path(directory))
        for folder in (place.station.settings.data_dir, place.station.settings.var_dir):
            for where, _, files in os.walk(folder):
                for path in [where, *(os.path.join(where, name) for name in files)]:
                    os.chown(path, nobody.pw_uid, nobody.pw_gid)
            os.chmod(folder, 0o750)
        yield place, nobody


def tree(place):
    """(path, owner, mode) of all that is published."""
    found = []
    for where, folders, files in os.walk(place.station.settings.data_dir):
        for name in folders + files:
            status = os.stat(os.path.join(where, name))
            found.append((os.path.relpath(os.path.join(where, name), place.station.settings.data_dir), status.st_uid, stat.S_IMODE(status.st_mode)))
    return sorted(found)


@needs_root
def test_what_root_publishes_with_any_umask_belongs_to_the_daemon_s_user(station_of_nobody):
    place, nobody = station_of_nobody
    (place.directory / "new").chmod(0o700)                             # root's own
    done = publish_as(place, "root", 0o077, UNIT, str(place.directory / "new"), "--name", "update-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert {entry[1] for entry in tree(place)} == {nobody.pw_uid}
    modes = {path: mode for path, _, mode in tree(place)}
    assert modes[UNIT + "/updates"] == modes[UNIT + "/updates/update-1/flash"] == 0o750
    assert modes[UNIT + "/updates/update-1/flash/main.py"] == 0o640


@needs_root
def test_another_user_is_told_how_to_publish_even_where_it_may_write(station_of_nobody):
    place, nobody = station_of_nobody
    for opened in (False, True):
        if opened:
            for folder in (place.station.settings.data_dir, place.station.settings.var_dir, place.station.data(UNIT)):
                os.chmod(folder, 0o777)
        before = tree(place)
        done = publish_as(place, "daemon", 0o022, UNIT, str(place.directory / "new"))
        complaint = "var/pings belongs to nobody: sudo -u nobody " if opened else "Permission denied: "
        assert done.returncode == 1 and complaint in done.stderr, done.stderr
        assert opened or done.stderr.endswith("; call this with sudo\n")
        assert tree(place) == before


def test_of_what_cannot_be_published_no_file_stays_behind(place, monkeypatch):
    def fail(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(seqfile, "fdatasync", fail)
    assert publish(place, UNIT, place.directory / "new") == 1
    assert [path for path, _, _ in tree(place)] == [UNIT, UNIT + "/updates"]


# -- the verdict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("urls, verdict", [
    (["http://127.0.0.1:9"], ("off", "went to http://127.0.0.1:9")),
    (["http://127.0.0.1:9", "http://127.0.0.1:10"], ("late", "no ping since 2026-11-22 03:15 UTC")),     # this may be one of them
])
def test_a_unit_that_was_sent_to_another_server_alone_is_not_late_here(place, urls, verdict):
    moves = [word for url in urls for word in ("--sync-dest", url)]
    assert publish(place, UNIT, *moves, "--name", "update-1") == 0
    for day in range(15, 23):
        ping(place, "2026-11-%dT03:15:00.000000" % day, "n")
    now = 1_795_317_300                                         # 2026-11-22T03:15:00
    for path in ("updates/update-1?recursive=True", "updates/update-1/conf-patch/ou-comm-config.json"):
        say(place, path, now=now)
    importer.import_new(place.station.archive)
    with importer.open_db(place.station.settings.db) as db:
        state, = importer.fleet_state(db, now + 20 * 86400, archive=place.station.archive)
    assert (state.verdict, state.why) == verdict
    page = plot_ascii.web_page("alive", place.station.settings.db, {}, False, now + 20 * 86400, archive=place.station.archive)
    assert ("\nLATE " in page) == (verdict[0] == "late")
