"""What is wrong is told: each fault in a station, as it appears in /readyz, the log and health.json, and is gone when it is mended;
readers who may not write beside a writer."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shlex  # noqa: F401 (nobody cannot read it later, where Python is root's)
import shutil
import sqlite3
import sys
import tempfile
import urllib.error
import urllib.request
from datetime import datetime, timezone

import pytest

import co2d
import fipy
import importer

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
UNIT = "co2unit-30aea42a50bc"
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


class Place:
    """A station with a unit, whose imports and looks happen when the test says so."""

    def __init__(self, directory):
        self.directory = str(directory)
        self.settings = importer.Settings()._replace(
            data_dir=self.directory + "/data", var_dir=self.directory + "/var", db=self.directory + "/var/db.sqlite3",
            listen="127.0.0.1", port=0, keep_free=0, quiet=True)
        self.unit = fipy.Unit(UNIT, self.directory + "/card", nickname="varanger-03")
        self.server = None
        self.start()

    def start(self):
        if self.server:
            self.server.stop()
            self.kept.close()
        self.station = co2d.Station(self.settings, self.clock, sync=lambda fd: None)
        self.server = co2d.Server(self.station)
        self.server.start()
        self.unit.urls = ["http://127.0.0.1:%d" % self.server.port]
        self.importing, self.watching = co2d.Importing(self.station), co2d.Watching(self.station)
        self.kept = self.importing._kept

    def clock(self):
        return self.unit.now.replace(tzinfo=timezone.utc).timestamp()

    def night(self, days=1):
        """The unit measures and calls; all is imported."""
        self.unit.measure(days)
        session = self.unit.sync()
        self.look()
        return session

    def look(self):
        """-> what is wrong, as (level, text)."""
        self.importing._import(None)
        self.watching.look()
        told = importer.read_health(self.settings.var_dir, int(self.clock()))
        assert told == self.station.health.problems()
        return [(problem.level, problem.text) for problem in told]

    def readyz(self):
        try:
            with urllib.request.urlopen("http://127.0.0.1:%d/readyz" % self.server.port) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as reply:
            return reply.code, reply.read().decode()

    def count(self):
        with contextlib.closing(sqlite3.connect(self.settings.db)) as db:
            return db.execute("SELECT count(*) FROM co2_readings").fetchone()[0]

    def data(self, *names):
        return os.path.join(self.settings.data_dir, *names)


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    made.night(3)
    yield made
    made.server.stop()
    made.kept.close()


def test_a_healthy_station_has_nothing_to_tell(place):
    assert place.look() == [] and place.readyz() == (200, "ok\n")


def test_a_data_directory_that_is_not_mounted_is_told_until_it_is_back_and_no_reading_is_lost(place):
    os.rename(place.data(), place.data() + ".away")
    os.mkdir(place.data())
    place.start()                                       # as after a reboot
    place.look()
    before = place.count()
    for _ in range(3):
        assert place.night().finished
        (told,) = place.look()                          # and nothing about the unit
        assert told[0] == "critical" and told[1].startswith(
            "data directory %s is empty, missing, or not the one that was here; is a disk not mounted? Uploads are taken all the same, "
            "and sent again when it is back (importer rebuild forgets it) (since 20" % place.data())
        assert place.readyz()[0] == 503 and place.count() == before
    shutil.rmtree(place.data())
    os.rename(place.data() + ".away", place.data())
    place.start()
    assert place.look() and not [told for told in place.look() if "mounted" in told[1]]
    assert place.night().finished
    assert place.look() == [] and place.readyz() == (200, "ok\n")
    with open(place.data(UNIT, "data", "readings", "readings-0000.tsv"), "rb") as file:
        assert file.read() == place.unit.read("readings-0000.tsv")
    assert place.count() == 7 * 48


def test_a_data_directory_that_was_removed_is_told_while_uploads_go_on(place):
    shutil.rmtree(place.data())
    place.night()
    assert "is a disk not mounted?" in place.readyz()[1] and place.count() == 3 * 48
    importer.rebuild(place.station.archive)             # says that it is to be so
    assert place.look() == [] and place.count() == len(place.unit.read("readings-0000.tsv").splitlines())


def test_a_damaged_database_is_made_anew_and_the_damaged_one_is_kept_and_told(place):
    place.kept.close()
    with open(place.settings.db, "r+b") as file:
        file.write(b"no database" * 100)
    assert place.readyz()[0] == 503 and "file is not a database" in place.readyz()[1]
    (told,) = place.look()
    assert told[0] == "warning" and told[1].endswith("was set aside: remove it when it is of no use any more")
    assert place.count() == 3 * 48 and place.readyz()[0] == 200
    os.unlink(importer.retired_databases(place.settings.db)[0])
    assert place.look() == []


def test_of_the_databases_of_earlier_versions_the_newest_is_kept_and_others_are_never_removed(place):
    place.kept.close()
    for version, table in ((1, "co2_readings"), (2, "co2_readings"), (7, "recipes")):
        os.unlink(place.settings.db)
        with contextlib.closing(sqlite3.connect(place.settings.db)) as db:
            db.executescript("CREATE TABLE %s(x); CREATE TABLE sources(x); CREATE TABLE t(x); PRAGMA user_version = %d" % (table, version))
        place.importing._import(None)
        place.kept.close()
    kept = importer.retired_databases(place.settings.db)
    assert len(kept) == 2 and [level for level, _ in place.look()] == ["warning", "note"]
    with contextlib.closing(sqlite3.connect(kept[0])) as db:
        assert db.execute("PRAGMA user_version").fetchone() in ((2,), (7,))


def test_a_unit_whose_directory_is_a_link_is_named_at_once(place, tmp_path):
    os.symlink(str(tmp_path), place.data("co2unit-00000000000b"))
    assert place.look() == [("critical", "uploads to %s are refused: it is a link, and links are not followed: put the directory itself there"
                             % place.data("co2unit-00000000000b"))]
    assert place.readyz()[0] == 200                     # the station is
    os.unlink(place.data("co2unit-00000000000b"))
    assert place.look() == []


def test_refusals_by_quota_are_told_by_unit_until_an_upload_is_taken(place):
    place.station.settings = place.settings._replace(max_file=10000)
    place.night()
    (told,) = place.look()
    assert told[0] == "warning" and told[1].startswith("uploads of %s are refused: file would exceed 10000 bytes (since " % UNIT)
    place.station.settings = place.settings
    place.night()
    assert place.look() == []


def test_a_source_that_cannot_be_read_is_told_and_imported_later(place, monkeypatch):
    path = place.data(UNIT, "data", "readings", "readings-0001.tsv")
    with open(path, "w") as file:
        file.write("x\n")
    real = importer._open_no_link

    def refuse(name, flags):
        if name == path:
            raise PermissionError(13, "Permission denied", name)
        return real(name, flags)

    monkeypatch.setattr(importer, "_open_no_link", refuse)
    (told,) = place.look()
    assert told[0] == "critical" and told[1].startswith("data/%s/data/readings/readings-0001.tsv is not imported: " % UNIT)
    assert place.readyz()[0] == 503
    monkeypatch.undo()
    assert [told for told in place.look() if told[0] == "critical"] == []


def test_a_directory_that_cannot_be_listed_is_told_until_it_can(place, monkeypatch):
    folder, real = place.data(UNIT, "data", "readings"), os.scandir

    def refuse(path="."):
        if path == folder:
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(importer.os, "scandir", refuse)
    assert [(level, text.split(" (since")[0]) for level, text in place.look()] == [
        ("critical", "%s cannot be read: Permission denied" % folder)]
    monkeypatch.undo()
    assert place.look() == []


def test_a_refused_row_a_unit_in_no_row_and_another_nickname_are_told(place):
    os.makedirs(place.data("manual"))
    table = place.data("manual", "deploy_durations_tiered.tsv")
    titles = "unit_id\tnickname\tsite\ttier\tstatus\tstart_ts\tend_ts\tnote\n"
    with open(table, "w") as file:
        file.write(titles + "co2unit-00000000000b\tx\tvj_1\tten\tdeployed\t2019-01-01\t\t\n"
                   "co2unit-00000000000c\ty\tvj_2\t10\tdeployed\t2019-01-01\t2019-02-01\t\n")
    assert place.look() == [
        ("warning", "line 2 of data/manual/deploy_durations_tiered.tsv is refused: tier is not a number; until it is corrected, its unit "
                    "counts as deployed"),
        ("warning", "no site (varanger-03): %s reports, but is in no row of the deployment table" % UNIT)]
    with open(table, "w") as file:
        file.write(titles + "%s\tvaranger-04\tvj_1\t10\tdeployed\t2019-01-01\t\t\n" % UNIT)
    assert place.look() == [("warning", "vj_1 (varanger-04): it calls itself varanger-03: correct the deployment table, or publish --nickname")]


def test_a_unit_whose_row_was_refused_keeps_its_alarms(place):
    os.makedirs(place.data("manual"))
    with open(place.data("manual", "deploy_durations_tiered.tsv"), "w") as file:
        file.write("unit_id\tnickname\tsite\ttier\tstatus\tstart_ts\tend_ts\tnote\n"
                   "co2unit-00000000000c\ty\tvj_2\t10\tdeployed\t2019-01-01\t2019-02-01\t\n"
                   "%s\tvaranger-03\tvj_1\tten\tdeployed\t2019-01-01\t\t\n" % UNIT)
    place.unit.measure(60)                              # and does not call
    told = [text for _, text in place.look()]
    assert [text for text in told if "(varanger-03): no ping since" in text]


def test_lines_that_are_refused_are_told_with_their_reason(place):
    name = max(place.unit.files())
    place.unit.write(name, place.unit.read(name) + b"garbage\n" * 5)
    place.unit.sync()
    assert place.look() == [("critical", "no site (varanger-03): its newest 5 lines are refused (no hardware id): see importer rejects")]
    place.night()
    assert place.look() == []


def test_one_night_for_an_update_is_no_alarm_and_two_in_vain_are(place):
    fetches = os.path.join(place.settings.var_dir, "fetches", "fetches-0000.tsv")

    def night_of_an_update():
        place.unit.measure(1)
        with open(fetches, "a") as file:
            file.write("%s\t%s\tupdate-2020-01-01a\t(started)\n" % (place.unit.now.isoformat(), UNIT))
        now = place.unit.now
        for _ in range(2):                              # a unit that takes an update calls twice
            row = "\t".join([now.isoformat() + ".000000", UNIT, "varanger-03", "8", "-97"]) + "\n"
            with open(os.path.join(place.settings.var_dir, "pings", "pings-0000.tsv"), "a") as file:
                file.write(row)
        place.unit.now = now.__class__(now.year, now.month, now.day, 23, 30)        # late that day
        return place.look()

    for _ in range(4):                                  # a rhythm
        place.night()
    assert night_of_an_update() == []
    assert [told for told in night_of_an_update() if "update" in told[1]] != []


def test_a_unit_whose_data_another_server_takes_is_not_stuck_here(place):
    for _ in range(4):                                  # a rhythm
        place.night()
    pings = []
    for _ in range(3):                                  # it calls here, and sends its data to the other server
        place.unit.measure(1)
        row = "\t".join([place.unit.now.isoformat() + ".000000", UNIT, "varanger-03", "8", "-97"]) + "\n"
        with open(os.path.join(place.settings.var_dir, "pings", "pings-0000.tsv"), "a") as file:
            file.write(row)
        pings.append(row.replace(".000000", ".500000"))
    (told,) = place.look()
    assert told == ("critical", "no site (varanger-03): no data since %s, but 3 pings: its data do not come" % importer.when(
        place.clock() - 3 * 86400 - 1800))
    os.makedirs(place.data("server-b", "var", "pings"))
    with open(place.data("server-b", "var", "pings", "pings-0000.tsv"), "w") as file:
        file.writelines(pings)
    assert place.look() == []
    shutil.rmtree(place.data("server-b"))
    patch = place.data(UNIT, "updates", "update-2019-01-01a", "conf-patch")
    os.makedirs(patch)
    with open(os.path.join(patch, "ou-comm-config.json"), "w") as file:
        json.dump({"sync_dest": ["http://a.example:8080", "http://b.example:8080"]}, file)
    assert place.look() == []


def test_strange_names_are_a_note_and_no_alarm(place):
    place.unit.write("readings-0000.tsv.bak", b"old\n")
    place.night()
    assert place.look() == [("note", "%s sends files with names that are not its own; they are kept in %s" % (
        UNIT, place.data(UNIT, "strange")))]
    assert place.readyz()[0] == 200


# -- other users ------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_place():
    """As `place`, in a directory where other users may read, with files that belong to nobody."""
    directory = tempfile.mkdtemp(prefix="co2d-", dir="/tmp")
    os.chmod(directory, 0o755)
    made = Place(directory)
    made.night(3)
    for parent, _, names in os.walk(directory):
        os.chmod(parent, 0o755)
        for name in names:
            os.chmod(os.path.join(parent, name), 0o644)
    yield made
    made.server.stop()
    made.kept.close()
    shutil.rmtree(directory)


def as_nobody(run):
    """What a function says when nobody runs it, in a process of its own."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            said = run()
        except BaseException as error:
            said = str(error)
        os.write(into, json.dumps(said).encode())
        os._exit(0)
    os.close(into)
    with open(out) as file:
        said = json.load(file)
    os.waitpid(child, 0)
    return said


def plainly(db):
    """Number of readings, as any program would ask for it."""
    with contextlib.closing(sqlite3.connect("file:%s?mode=ro" % db, uri=True)) as connection:
        return connection.execute("SELECT count(*) FROM co2_readings").fetchone()[0]


def exported(db):
    """Number of readings, as we export them."""
    with importer.open_db(db) as connection:
        return len(list(importer.export(connection, "readings", "csv", {}, 2e9))) - 1


@as_root
def test_who_may_not_write_reads_all_rows_beside_a_writer_and_after_it(open_place):
    place, db = open_place, open_place.settings.db
    assert os.path.exists(db + "-wal")                  # it is kept open
    assert (as_nobody(lambda: plainly(db)), as_nobody(lambda: exported(db))) == (144, 144)
    with contextlib.closing(sqlite3.connect(db)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM co2_readings WHERE rowid > 50")
        assert (as_nobody(lambda: plainly(db)), as_nobody(lambda: exported(db))) == (144, 144)
        writer.rollback()
    place.kept.close()
    assert not os.path.exists(db + "-wal")
    assert (as_nobody(lambda: plainly(db)), as_nobody(lambda: exported(db))) == (144, 144)


@as_root
def test_a_log_that_cannot_be_read_is_an_error_and_not_a_part_of_the_rows(open_place):
    db = open_place.settings.db
    for suffix in ("", "-wal"):
        shutil.copy(db + suffix, db + ".left" + suffix)
    assert as_nobody(lambda: exported(db + ".left")) == (
        "%s.left cannot be read (unable to open database file): it was left open; start co2d, or let its owner run importer" % db)


@as_root
def test_root_acts_as_the_owner_and_others_are_told_what_to_type(open_place, monkeypatch):
    place, db = open_place, open_place.settings.db
    place.kept.close()
    monkeypatch.setattr(sys, "argv", ["./importer.py", "rebuild"])
    assert as_nobody(lambda: importer.act_as_owner(db)) == "%s belongs to root: sudo -u root ./importer.py rebuild" % db
    for parent, _, names in os.walk(place.directory):
        for name in ["", *names]:
            os.chown(os.path.join(parent, name), NOBODY, NOBODY)
    os.chmod(db, 0o640)
    child = os.fork()
    if not child:
        importer.act_as_owner(db)
        importer.rebuild(place.station.archive)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    status = os.stat(db)
    assert (pwd.getpwuid(status.st_uid).pw_name, status.st_mode & 0o777) == ("nobody", 0o640)


def test_a_user_without_a_name_is_called_by_the_number(open_place, monkeypatch):
    db, owner = open_place.settings.db, os.stat(open_place.settings.db).st_uid

    def nameless(number):
        raise KeyError("getpwuid(): uid not found: %d" % number)

    monkeypatch.setattr(pwd, "getpwuid", nameless)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    monkeypatch.setattr(sys, "argv", ["./importer.py", "rebuild"])
    assert importer.ownership(db) == "%s belongs to %d: sudo chown 4321 %s" % (db, owner, db)
    with pytest.raises(importer.Unusable) as refused:
        importer.act_as_owner(db)
    assert str(refused.value) == "%s belongs to %d: sudo -u '#%d' ./importer.py rebuild" % (db, owner, owner)


@as_root
def test_root_acts_as_an_owner_without_a_name(open_place):
    db = open_place.settings.db
    open_place.kept.close()
    os.chown(db, 54321, 54321)
    child = os.fork()
    if not child:
        importer.act_as_owner(db)
        os._exit((os.getuid(), os.getgid(), os.getgroups()) != (54321, 54321, [54321]))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("fails", [False, True])
def test_who_closes_the_database_last_leaves_it_so_that_all_can_read_it(open_place, monkeypatch, fails):
    place, db = open_place, open_place.settings.db

    def is_in_wal_mode():
        with open(db, "rb") as file:
            file.seek(18)                               # version of the file's format
            return file.read(1) == b"\2"

    if fails:
        monkeypatch.setattr(importer.Import, "settle", lambda run: run.no_such_thing)
        with pytest.raises(AttributeError):
            importer.import_new(place.station.archive)
    else:
        importer.import_new(place.station.archive)
    assert is_in_wal_mode()                             # the daemon has it open
    with contextlib.closing(sqlite3.connect(db)) as reader:
        reader.execute("SELECT * FROM sources").fetchall()
        place.kept.close()
        assert is_in_wal_mode()
    with contextlib.suppress(AttributeError):
        importer.import_new(place.station.archive)
    assert not is_in_wal_mode() and not os.path.exists(db + "-wal")
    assert plainly(db) == 144


@pytest.mark.parametrize("ends", [False, True])
def test_the_log_of_a_new_database_is_not_removed_by_who_has_the_old_one_open(open_place, ends):
    place, db = open_place, open_place.settings.db
    importer.rebuild(place.station.archive)
    with contextlib.closing(sqlite3.connect(db)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("INSERT INTO changes VALUES ('of another process', 0, 0)")
        writer.commit()
        log = os.stat(db + "-wal").st_ino
        place.kept.close() if ends else place.kept.renew()
        assert os.stat(db + "-wal").st_ino == log


@pytest.mark.parametrize("has_database", [True, False])
def test_a_check_tells_what_the_daemon_knows_before_there_is_any_unit(tmp_path, capfd, has_database):
    import plot_ascii
    settings = importer.Settings()._replace(data_dir=str(tmp_path / "data"), var_dir=str(tmp_path / "var"))
    station = co2d.Station(settings._replace(db=str(tmp_path / "var/db.sqlite3")))
    if has_database:
        importer.import_new(station.archive)
    full = importer.Problem("disk", importer.CRITICAL, "", "no space left", 0)
    importer.write_health(settings.var_dir, [full], int(station.clock()))
    (tmp_path / "co2d.conf").write_text("[co2d]\ndata_dir = data\nvar_dir = var\n")
    assert plot_ascii.main(["status", "--check", "--config", str(tmp_path / "co2d.conf")]) == 2
    said = capfd.readouterr().out
    assert "no space left" in said and ("No units yet" if has_database else "no database yet") in said
