"""`co2d.py publish`: what may reach a unit, and how a unit over HTTP takes it."""

from __future__ import annotations

import json
import os
import threading

import pytest

import co2d
import fipy

UNIT = "co2unit-30aea42a50bc"


@pytest.fixture
def place(tmp_path):
    """A station with one known unit, a server, and a directory with an update."""
    settings = co2d.Settings()._replace(data_dir=str(tmp_path / "data"), var_dir=str(tmp_path / "var"), port=0,
                                   db=str(tmp_path / "var" / "db.sqlite3"), listen="127.0.0.1", quiet=True)
    station = co2d.Station(settings)
    os.makedirs(os.path.join(settings.data_dir, UNIT))
    (tmp_path / "new" / "flash" / "lib").mkdir(parents=True)
    (tmp_path / "new" / "flash" / "lib" / "x.py").write_text("x = 1\n")
    (tmp_path / "new" / "flash" / "main.py").write_text("print()\n")
    server = co2d.Server(station)
    server.start()
    yield station, server, tmp_path
    server.stop()


def publish(place, *arguments):
    station, _, tmp_path = place
    return co2d.publish([*map(str, arguments), "--data-dir", station.settings.data_dir, "--var-dir", station.settings.var_dir])


def unit_of(place, **options):
    return fipy.Unit(UNIT, str(place[2] / "card"), ["http://127.0.0.1:%d" % place[1].port], **options)


def report(place):
    return list(co2d.update_report(place[0], [UNIT]))


def test_a_published_update_is_taken_once_and_the_report_says_so(place, capsys):
    assert publish(place, UNIT, place[2] / "new", "--name", "update-2026-11-22a") == 0
    assert capsys.readouterr().out == UNIT + ": update-2026-11-22a published, 2 files\n"
    assert report(place)[0].endswith("\tnot fetched")
    unit = unit_of(place)
    assert unit.sync().error is None
    assert unit.flash == {"main.py": b"print()\n", "lib/x.py": b"x = 1\n"}
    assert "\tcomplete " in report(place)[0] and "\tcame back " in report(place)[0]
    assert [request for request in unit.sync().requests if "update-2026" in request.target] == []


def test_a_nickname_and_a_server_are_changed_by_a_patch(place):
    other = "http://127.0.0.1:%d/secret" % place[1].port
    assert publish(place, UNIT, "--nickname", "varanger-04", "--sync-dest", other) == 0
    unit = unit_of(place, nickname="varanger-03")
    unit.sync()
    assert (unit.nickname, unit.urls) == ("varanger-04", [other])


@pytest.mark.parametrize("files, complaint", [
    ({}, "it is empty"),
    ({"boot.py": "x"}, "boot.py: only flash/ and conf-patch/ go to units"),
    ({"data/readings/x.tsv": "x"}, "only flash/ and conf-patch/ go to units"),
    ({"conf-patch/a.json": "{"}, "conf-patch/a.json: no JSON"),
    ({"conf-patch/a.json": "[1]"}, "a patch is a .json file with one object"),
    ({"conf-patch/a.txt": "{}"}, "a patch is a .json file with one object"),
    ({"conf-patch/a.json": '{"sync_dest": "lab.example.org"}'}, "is not a URL that a unit could reach"),
    ({"conf-patch/a.json": '{"sync_dest": []}'}, "would never report again"),
    ({"conf-patch/a.json": "[" * 100000}, "conf-patch/a.json: no JSON"),
    ({"flash/.hidden": "x"}, "units cannot ask for"),
    ({"flash/my file.py": "x"}, "units cannot ask for"),
    ({"flash/big.bin": "x" * (1 << 20) + "x"}, "a unit can take"),
])
def test_what_must_not_reach_a_unit_is_refused(place, capsys, files, complaint):
    directory = place[2] / "bad"
    directory.mkdir()
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    assert publish(place, UNIT, directory) == 1
    assert complaint in capsys.readouterr().err
    assert report(place) == []


@pytest.mark.parametrize("arguments, complaint", [
    ([], "which directory"), (["co2unit-ffff", "DIR"], "no such unit: co2unit-ffff"), (["DIR"], "for which units"),
    ([UNIT, "DIR", "--name", "2026"], "must start with update-"), ([UNIT, "DIR", "--name", "update-../x"], "must start with update-"),
    ([UNIT, "--sync-dest", "ftp://x"], "is not a URL"), ([UNIT, "nowhere"], "nowhere"),
    ([UNIT, "--nickname", "a&b"], "units send their nickname as it is"), ([UNIT, "--nickname", "50%20"], "units send their nickname"),
    ([UNIT, "--withdraw", "update-1"], "update-1"), (["DIR", "--site", "x"], "no database yet"),
])
def test_wrong_arguments_are_named_and_publish_nothing(place, capsys, arguments, complaint):
    assert publish(place, *[str(place[2] / "new") if word == "DIR" else word for word in arguments]) == 1
    assert complaint in capsys.readouterr().err
    assert report(place) == []


def test_a_data_directory_that_is_not_there_is_named_and_not_made(tmp_path, capsys):
    assert co2d.publish(["--all", "--sync-dest", "http://x", "--data-dir", str(tmp_path / "d"), "--var-dir", str(tmp_path / "v")]) == 1
    assert capsys.readouterr().err == "co2d: not published: there is no data directory %s\n" % (tmp_path / "d")
    assert os.listdir(str(tmp_path)) == []


def test_when_a_unit_in_the_middle_fails_what_is_published_is_told_apart(place, capsys, monkeypatch):
    def fail(directory, name, files, publish_tree=co2d.seqfile.publish_tree, done=[]):
        done.append(name)
        if len(done) == 2:
            raise OSError(28, "No space left on device")
        publish_tree(directory, name, files)

    os.makedirs(os.path.join(place[0].settings.data_dir, UNIT + "2"))
    monkeypatch.setattr(co2d.seqfile, "publish_tree", fail)
    assert publish(place, "--all", place[2] / "new", "--name", "update-1") == 1
    out, err = capsys.readouterr()
    assert out == UNIT + ": update-1 published, 2 files\n"
    assert err == "co2d: not published: %s2: [Errno 28] No space left on device\n" % UNIT


def test_a_name_must_sort_after_the_latest(place, capsys):
    assert publish(place, UNIT, place[2] / "new", "--name", "update-2026-11-22b") == 0
    assert publish(place, UNIT, place[2] / "new", "--name", "update-2026-11-22a") == 1
    assert "must start with update- and sort after update-2026-11-22b" in capsys.readouterr().err


def test_names_follow_the_date_and_the_letter():
    assert co2d.next_update_name([], 1_795_305_600) == "update-2026-11-22a"
    assert co2d.next_update_name(["update-2026-11-22a"], 1_795_305_600) == "update-2026-11-22b"
    with pytest.raises(co2d.Unpublishable):
        co2d.next_update_name(["update-2027"], 1_795_305_600)


def test_an_update_that_was_not_fetched_is_warned_about_when_another_supersedes_it(place, capsys):
    publish(place, UNIT, place[2] / "new", "--name", "update-2026-11-22a")
    publish(place, UNIT, place[2] / "new", "--name", "update-2026-11-22b")
    assert "has not fetched update-2026-11-22a yet" in capsys.readouterr().err
    unit_of(place).sync()
    publish(place, UNIT, place[2] / "new", "--name", "update-2026-11-22c")
    assert capsys.readouterr().err == ""


def test_a_withdrawn_update_is_not_listed_any_more(place):
    publish(place, UNIT, place[2] / "new", "--name", "update-2026-11-22a")
    assert publish(place, UNIT, "--withdraw", "update-2026-11-22a") == 0
    unit = unit_of(place)
    assert unit.sync().error is None and unit.flash == {}


def test_a_name_that_a_unit_took_is_not_used_again_after_a_withdrawal(place, capsys):
    publish(place, UNIT, place[2] / "new", "--name", "update-2026-11-22b")
    unit_of(place).sync()
    assert publish(place, UNIT, "--withdraw", "update-2026-11-22b") == 0
    assert "%s has fetched update-2026-11-22b before" % UNIT in capsys.readouterr().err
    for name in "ab":
        assert publish(place, UNIT, place[2] / "new", "--name", "update-2026-11-22" + name) == 1
    assert "must start with update- and sort after update-2026-11-22b" in capsys.readouterr().err


def test_a_withdrawal_warns_of_the_older_update_that_comes_to_light(place, capsys):
    for name in "ab":
        publish(place, UNIT, place[2] / "new", "--name", "update-2026-11-22" + name)
    capsys.readouterr()
    assert publish(place, UNIT, "--withdraw", "update-2026-11-22b") == 0
    assert "has not fetched update-2026-11-22a, and will take that now" in capsys.readouterr().err


def test_a_withdrawal_is_for_the_units_that_have_the_update_and_can_be_tried(place, capsys):
    os.makedirs(os.path.join(place[0].settings.data_dir, "co2unit-other"))
    publish(place, UNIT, place[2] / "new", "--name", "update-2026-11-22a")
    capsys.readouterr()
    for arguments, said in ((["--dry-run"], "would be withdrawn"), ([], "withdrawn")):
        assert len(report(place)) == 1
        assert publish(place, "--all", "--withdraw", "update-2026-11-22a", *arguments) == 0
        assert capsys.readouterr().out == "%s: update-2026-11-22a %s\n" % (UNIT, said)
    assert report(place) == []
    assert publish(place, "--all", "--withdraw", "update-2026-11-22a") == 1


def test_a_dry_run_changes_nothing(place, capsys):
    assert publish(place, UNIT, place[2] / "new", "--dry-run") == 0
    assert "would be published" in capsys.readouterr().out
    assert not os.path.exists(os.path.join(place[0].settings.data_dir, UNIT, "updates"))


def test_no_unit_ever_sees_a_half_of_an_update(place):
    station, _, tmp_path = place
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


@pytest.mark.parametrize("url", ["http://host:8080/", "http://host/SECRET/", "http://[::1]:8080", "http://host:8080?x", "host:8080",
                                 "ftp://host"])
def test_a_url_that_would_cut_units_off_is_refused(place, url, capsys):
    assert publish(place, UNIT, "--sync-dest", url) == 1
    assert "is not a URL that a unit could reach" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080", "https://127.0.0.1", "http://127.0.0.1:8080/SECRET"])
def test_what_is_published_lies_in_the_files_and_keys_that_the_firmware_reads(place, url):
    assert publish(place, UNIT, "--sync-dest", url, "--nickname", "varanger-04", "--name", "update-a") == 0
    written = {}
    folder = os.path.join(place[0].settings.data_dir, UNIT, "updates", "update-a", "conf-patch")
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            written[name] = json.load(file)
    assert written == {"ou-id.json": {"site_code": "varanger-04"}, "ou-comm-config.json": {"sync_dest": [url]}}
