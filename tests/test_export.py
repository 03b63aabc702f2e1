"""importer: units by any of their names; what is taken elsewhere (files, PostgreSQL, a data package, URLs)."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import urllib.request

import pytest

import co2d
import importer
from test_importer import LINE, NOW, Place, TABLE, dirty, place, reading        # noqa: F401  (two are fixtures)

A, B = "co2unit-30aea42a50bc", "co2unit-30aea42a60bc"
FIELDS = LINE.split("\t", 2)[2]


# -- names of units ----------------------------------------------------------------------------------------------------


@pytest.fixture
def named(place):                                               # noqa: F811
    """A calls itself north; B called itself north, then south; C is in the table only, as west."""
    place.readings("%s\tnorth\t%s" % (A, FIELDS), A)
    place.readings("%s\tnorth\t%s%s\tsouth\t%s" % (B, FIELDS, B, FIELDS.replace("08:", "09:")), B)
    place.deployments("unit_id\tnickname\tsite\nco2unit-c\twest\tsite_c\n%s\tsummit\tsite_a\n" % A)
    place.run()
    with importer.open_db(place.archive.db) as db:
        yield db


@pytest.mark.parametrize("text, found", [
    (A, [A]), ("30aea42a50bc", [A]), ("50bc", [A]), ("50BC", [A]), ("north", [A]), ("summit", [A]), ("south", [B]),
    ("west", ["co2unit-c"]), ("co2unit-c", ["co2unit-c"]), ("south,50bc", [B, A]), ("south, south", [B]),
    ("co2unit-30*", [A, B]), ("30aea*", [A, B]), ("*th", [A, B]),
])
def test_a_unit_is_found_by_its_id_the_end_of_it_or_a_nickname(named, text, found):
    assert importer.find_units(named, text) == found


@pytest.mark.parametrize("text, reason", [
    ("a50bd", "no unit is called 'a50bd'; the nearest names are "),
    ("nroth", "no unit is called 'nroth'; the nearest names are north"),
    ("0bc", "no unit is called '0bc'"),
    ("south,x*", "no unit is called 'x*'"),
    ("", "no unit is called ''"),
])
def test_a_name_that_no_unit_has_is_answered_with_the_nearest_names(named, text, reason):
    with pytest.raises(importer.UnknownName) as refused:
        importer.find_units(named, text)
    assert str(refused.value).startswith(reason)


def test_a_name_of_several_units_is_refused_with_their_ids(place):                # noqa: F811
    place.readings("%s\tnorth\t%s" % (A, FIELDS), A)
    place.readings("%s\tnorth\t%s" % (B, FIELDS), B)
    place.run()
    with importer.open_db(place.archive.db) as db:
        with pytest.raises(importer.UnknownName) as refused:
            importer.find_units(db, "north")
        assert str(refused.value) == "'north' can be %s or %s: say which" % (A, B)
        assert importer.find_units(db, A) == [A] and importer.find_units(db, "a50bc") == [A]


# -- export -----------------------------------------------------------------------------------------------------------


def exported(place, what, *options):                            # noqa: F811
    done = place.command("export", what, *options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_readings_are_exported_with_the_deployment_of_their_time(place):           # noqa: F811
    place.readings("co2unit-a\tn\t%sco2unit-a\tn\t%s" % (FIELDS.replace("08:30:00", "08:29:59"), FIELDS))
    place.deployments(TABLE)
    place.run()
    assert exported(place, "readings").splitlines() == [
        "time,unit_id,nickname,site,tier,status,temp,co2,co2_flag,temp_flag,co2_01,co2_02,co2_03,co2_04,co2_05,co2_06,co2_07,co2_08,"
        "co2_09,co2_10,flash_count,qc,co2_filtered,led_normalised,led_signal,zero_point,sensor_temp",
        "2019-09-12T08:29:59Z,co2unit-a,n,site_1,20,deployed,4.5,405.5,1,1,401,402,403,404,405,406,407,408,409,410,2,0,,,,,",
        "2019-09-12T08:30:00Z,co2unit-a,n,site_2,,en_route,4.5,405.5,1,1,401,402,403,404,405,406,407,408,409,410,2,0,,,,,"]
    assert len(exported(place, "readings", "--site", "site_2").splitlines()) == 2
    assert len(exported(place, "readings", "--site", "site_*").splitlines()) == 3
    assert len(exported(place, "readings", "--since", "2019-09-12T08:30").splitlines()) == 2
    assert len(exported(place, "readings", "--until", "2019-09-12T08:30").splitlines()) == 2
    assert len(exported(place, "readings", "--flag", "4").splitlines()) == 1
    assert len(exported(place, "readings", "--unit", "n").splitlines()) == 3


@pytest.mark.skipif(not shutil.which("sqlite3"), reason="no sqlite3 shell")
def test_the_view_readings_of_the_sqlite_shell_is_what_export_gives(dirty):         # noqa: F811
    place, _ = dirty
    head, *rows = csv.reader(io.StringIO(exported(place, "readings")))
    shell = ["sqlite3", "-csv", "-header", place.archive.db, "SELECT * FROM readings ORDER BY unit_id, time"]
    done = subprocess.run(shell, stdout=subprocess.PIPE, check=True, universal_newlines=True)
    their_head, *theirs = csv.reader(io.StringIO(done.stdout))
    assert (head, sorted(rows)) == (their_head, sorted(theirs)) and len(rows) > 1000
    assert place.ask("SELECT DISTINCT date || 'T' || time = strftime('%Y-%m-%dT%H:%M:%S', ts, 'unixepoch') FROM co2_readings") == [(1,)]


@pytest.mark.parametrize("what", list(importer.EXPORTS))
def test_all_tables_are_exported_in_all_formats_with_the_same_rows(dirty, what):    # noqa: F811
    place, _ = dirty
    given = {} if what == "units" else {"until": "2019-11-01"}
    texts = {}
    for form in importer.FORMS:
        with importer.open_db(place.archive.db) as db:
            texts[form] = "".join(importer.export(db, what, form, given, NOW))
    as_csv = list(csv.DictReader(io.StringIO(texts["csv"])))
    as_json = [json.loads(line, parse_float=str) for line in texts["jsonl"].splitlines()]
    head, *as_tsv = [line.split("\t") for line in texts["tsv"].split("\n")[:-1]]
    assert len(as_csv) == len(as_json) == len(as_tsv) > 0
    assert head == [column.name for column in importer.EXPORTS[what].columns]
    for one, other, third in zip(as_csv, as_json, as_tsv):
        plain = {name: "" if value is None else str(value) for name, value in other.items()}
        assert plain == one and list(plain) == head
        assert [value.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t") or "\\N" for value in plain.values()] == [
            value or "\\N" for value in third]


def test_text_that_means_something_to_a_format_comes_back_as_it_was(place):         # noqa: F811
    place.errors('----- 2019-09-16 10:55:57 WARN a "b", c\\d\nmore\n"x",\n', A)
    place.deployments('unit_id\tnickname\tsite\tnote\n%s\tn, m\ta "b"\tc\\d\n' % A)
    place.run()
    row, = csv.DictReader(io.StringIO(exported(place, "errors")))
    assert (row["message"], row["text"]) == ('a "b", c\\d', 'more\n"x",')
    row = json.loads(exported(place, "errors", "--format", "jsonl"))
    assert (row["message"], row["text"], row["etype"]) == ('a "b", c\\d', 'more\n"x",', None)
    assert exported(place, "errors", "--format", "tsv").splitlines()[1].split("\t")[8:10] == ['a "b", c\\\\d', 'more\\n"x",']
    row, = csv.DictReader(io.StringIO(exported(place, "deployments", "--site", 'a "b"')))
    assert (row["nickname"], row["site"], row["note"]) == ("n, m", 'a "b"', "c\\d")


def test_units_shows_the_first_and_the_last_ping_and_the_days_with_pings_of_each_unit(place):       # noqa: F811
    place.put("var/pings/pings-0000.tsv", "".join("2019-%s.000000\t%s\tnorth\t8\t-97\n" % (when, A) for when in (
        "08-30T03:02:11", "09-01T03:02:11", "09-01T09:00:00", "09-12T03:15:00")))
    place.readings("%s\tsouth\t%s" % (B, FIELDS), B)
    place.run()
    assert exported(place, "units").splitlines() == [
        "unit_id,nickname,site,tier,status,first_ping,last_ping,ping_days,pings,first_reading,last_reading,reading_days,readings",
        A + ",north,,,,2019-08-30T03:02:11Z,2019-09-12T03:15:00Z,3,4,,,0,0",
        B + ",south,,,,,,0,0,2019-09-12T08:30:00Z,2019-09-12T08:30:00Z,1,1"]


@pytest.mark.parametrize("options, status, reason", [
    (["readings", "--unit", "nroth"], 1, "no unit is called 'nroth'; the nearest names are north"),
    (["readings", "--site", "site_x"], 1, "no site is called 'site_x'; the nearest names are site_"),
    (["readings", "--flag", "5"], 2, "flag: '5' is none of 1, 2, 3, 4, 9"),
    (["pings", "--flag", "1"], 2, "pings: no option 'flag'; there are unit, site, since, until"),
    (["units", "--since", "2019-01-01"], 2, "units: no option 'since'; there are unit, site"),
    (["readings", "--since", "yesterday"], 2, "since is no ISO date: yesterday"),
])
def test_an_option_that_makes_no_sense_is_refused_by_name(place, options, status, reason):          # noqa: F811
    place.readings("%s\tnorth\t%s" % (A, FIELDS), A)
    place.deployments(TABLE)
    place.run()
    done = place.command("export", *options)
    assert done.returncode == status and done.stderr.startswith("importer: " + reason)


def test_a_gap_that_is_still_open_has_no_end(place):                               # noqa: F811
    place.readings("".join(reading(30 * n) for n in range(4)) + reading(600))
    place.run()
    rows = list(csv.DictReader(io.StringIO(exported(place, "gaps", "--until", "2019-09-20"))))
    assert [(row["last_before"], row["first_after"]) for row in rows] == [
        ("2019-09-12T01:30:00Z", "2019-09-12T10:00:00Z"), ("2019-09-12T10:00:00Z", "")]


# -- PostgreSQL -------------------------------------------------------------------------------------------------------


class Receiver:
    """A database of its own for each test."""

    def __init__(self, home):
        self.conninfo = "host=%s user=postgres dbname=" % home

    def ask(self, query):
        command = ["psql", "-X", "-v", "ON_ERROR_STOP=1", "-d", self.conninfo, "-qAt", "-c", "SET TimeZone = UTC", "-c", query]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, universal_newlines=True).stdout

    def rows(self, what):
        """All rows, each value as `export` writes it."""
        text = self.ask("COPY (SELECT * FROM %s) TO STDOUT (FORMAT csv)" % what)
        return sorted([said(value) for value in row] for row in csv.reader(io.StringIO(text)))


def said(value):
    if value[4:5] == "-" and value.endswith("+00"):
        return value[:-3].replace(" ", "T") + "Z"
    try:
        return float(value)
    except ValueError:
        return value


@pytest.fixture
def receiver(postgresql):
    receiver = Receiver(postgresql)
    receiver.conninfo += "postgres"
    receiver.ask("DROP DATABASE IF EXISTS taken")
    receiver.ask("CREATE DATABASE taken")
    receiver.conninfo = receiver.conninfo.replace("postgres", "taken").replace("user=taken", "user=postgres")
    return receiver


def ours(place, what):                                          # noqa: F811
    with importer.open_db(place.archive.db) as db:
        text = "".join(importer.export(db, what, "csv", {}, NOW))
    return sorted([said(value) for value in row] for row in list(csv.reader(io.StringIO(text)))[1:])


def fed(place, receiver, what):                                 # noqa: F811
    """What was done, once the receiver has the rows that `export` gives."""
    with importer.open_db(place.archive.db) as db:
        db.execute("BEGIN")
        done = importer.feed(db, what, receiver.conninfo)
    assert receiver.rows(what) == ours(place, what)
    return done


def ping(day):
    return "2019-09-%02dT03:02:11.000000\t%s\tnorth\t8\t-97\n" % (day, A)


def stretch(first, last):
    """Readings every half hour, no two in a row alike."""
    return "".join(reading(30 * n, 400 + n % 7) for n in range(first, last))


def test_a_receiver_has_each_row_once_whatever_happens_to_the_rows_here(place, receiver):           # noqa: F811
    place.readings(stretch(0, 100) + "half a li")
    place.put("var/pings/pings-0000.tsv", ping(12))
    place.run()
    assert fed(place, receiver, "readings") == "readings: all sent, 100 rows"
    assert fed(place, receiver, "pings") == "pings: all sent, 1 rows"
    assert fed(place, receiver, "readings") == "readings: nothing has changed since the last time"

    place.readings("ne\n" + reading(30 * 100, 5000), mode="ab")
    place.run()
    assert fed(place, receiver, "readings") == "readings: 1 days of units replaced, 5 rows"
    place.readings(reading(30 * 101), mode="ab")                    # only with that the 5000 ppm can be judged
    place.run()
    assert fed(place, receiver, "readings") == "readings: 1 days of units replaced, 6 rows"
    assert receiver.ask("SELECT count(*) FROM readings WHERE co2_flag = 3") == "1\n"

    place.put("var/pings/pings-0000.tsv", ping(13), mode="ab")
    place.run()
    assert fed(place, receiver, "pings") == "pings: 2 days of units replaced, 1 rows"

    place.deployments("unit_id\tnickname\tsite\tstatus\n%s\tnorth\tsummit\tdeployed\n" % A)
    place.run()
    assert fed(place, receiver, "readings") == "readings: all replaced, 102 rows"
    assert receiver.ask("SELECT DISTINCT site FROM readings") == "summit\n"
    assert fed(place, receiver, "deployments") == "deployments: all sent, 1 rows"

    place.readings(stretch(20, 40))           # another card
    place.run()
    assert fed(place, receiver, "readings") == "readings: 3 days of units replaced, 20 rows"

    importer.rebuild(place.archive, NOW)
    assert fed(place, receiver, "readings") == "readings: all replaced, 20 rows"
    assert fed(place, receiver, "pings") == "pings: all replaced, 2 rows"

    shutil.rmtree(os.path.join(place.data, A))
    place.run()
    importer.rebuild(place.archive, NOW)
    assert fed(place, receiver, "readings") == "readings: all replaced, 0 rows"


def test_tables_at_the_receiver_have_types_and_comments(place, receiver):          # noqa: F811
    place.readings(LINE)
    place.errors('----- 2019-09-16 10:55:57 WARN it\\s "b"\nmore\n\tx\n----- (1970, 1, 1, 0, 0, 4, 4, 298) EXC vads\u00f8\n', A)
    place.deployments(TABLE)
    place.run()
    for what in importer.RECEIVED:
        fed(place, receiver, what)
    types = receiver.ask("SELECT DISTINCT udt_name FROM information_schema.columns WHERE table_name = 'readings' ORDER BY 1")
    assert types.split() == ["float8", "int4", "text", "timestamptz"]
    assert receiver.ask("SELECT obj_description('readings'::regclass), col_description('readings'::regclass, 8)") == (
        "CO2 and temperature|mean of those of the ten that are usable; ppm\n")
    assert receiver.ask("SELECT text FROM errors WHERE etype IS NULL AND level = 'WARN'") == "more\n\tx\n"


def test_a_fleet_with_dirt_arrives_as_it_is_exported(dirty, receiver):              # noqa: F811
    place, _ = dirty
    for what in importer.RECEIVED:
        fed(place, receiver, what)


BETWEEN = """#!%s
import os, signal, subprocess, sys
psql = subprocess.Popen([%r, *sys.argv[1:]], stdin=subprocess.PIPE)
for number, line in enumerate(iter(sys.stdin.buffer.readline, b""), 1):
    psql.stdin.write(line)
    psql.stdin.flush()
    if number == int(os.environ["LINES_THROUGH"]) or line.strip() == b"COMMIT;":
        break
else:
    psql.stdin.close()
    sys.exit(psql.wait())
if line.strip() != b"COMMIT;":
    os.kill(os.getppid(), signal.SIGKILL)
psql.stdin.close()
psql.wait()
os.kill(os.getppid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("lines", [9, 60, 1000, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 8, 15, 17, 20, 40))])
def test_a_run_that_is_killed_at_any_moment_has_done_all_or_nothing(place, receiver, tmp_path, lines):       # noqa: F811
    """`lines`: so many lines reach psql before the importer is killed; 1000: it is killed behind the COMMIT."""
    place.readings(stretch(0, 60))
    place.run()
    fed(place, receiver, "readings")
    before = receiver.rows("readings")
    place.readings(stretch(60, 120), mode="ab")
    place.run()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "psql").write_text(BETWEEN % (sys.executable, shutil.which("psql")))
    (tmp_path / "bin" / "psql").chmod(0o755)
    environ = {**os.environ, "PATH": "%s:%s" % (tmp_path / "bin", os.environ["PATH"]), "LINES_THROUGH": str(lines)}
    assert place.command("export", "readings", "--psql", receiver.conninfo, env=environ).returncode == -9
    assert receiver.rows("readings") == (ours(place, "readings") if lines == 1000 else before)
    assert fed(place, receiver, "readings") == (
        "readings: nothing has changed since the last time" if lines == 1000 else "readings: 2 days of units replaced, 72 rows")


@pytest.mark.parametrize("what, options, status, reason", [
    ("readings", ["host=nowhere.invalid"], 1, "psql failed (exit status 2): nothing has changed there"),
    ("readings", ["postgresql://u:geheim@h/db"], 2, "a password on the command line can be seen by all users: write it to ~/.pgpass"),
    ("readings", ["host=h password=geheim"], 2, "a password on the command line"),
    ("gaps", ["dbname=x"], 2, "--psql takes readings, pings, errors, deployments; gaps are made anew for each export"),
    ("pings", ["dbname=x", "--site", "s"], 2, "--psql takes all rows into tables: no other option makes sense with it"),
    ("pings", ["dbname=x", "-o", "s"], 2, "--psql takes all rows into tables: no other option makes sense with it"),
])
def test_what_psql_cannot_do_is_said(place, what, options, status, reason):         # noqa: F811
    place.readings(LINE)
    place.run()
    done = place.command("export", what, "--psql", *options)
    assert done.returncode == status and "importer: " + reason in done.stderr and "Traceback" not in done.stderr


def test_the_command_says_what_it_has_done(place, receiver):                       # noqa: F811
    place.readings(LINE)
    place.run()
    for done in "all sent, 1 rows", "nothing has changed since the last time":
        assert exported(place, "readings", "--psql", receiver.conninfo) == "readings: %s\n" % done
    assert receiver.rows("readings") == ours(place, "readings")


def test_a_table_that_others_have_made_is_left_alone(place, receiver):              # noqa: F811
    receiver.ask("CREATE TABLE readings(mine text)")
    receiver.ask("INSERT INTO readings VALUES ('precious')")
    place.readings(LINE)
    place.run()
    done = place.command("export", "readings", "--psql", receiver.conninfo)
    assert (done.returncode, done.stderr) == (1, "importer: a table readings is there that we have not made: rename it, or drop it\n")
    assert receiver.ask("SELECT * FROM readings") == "precious\n"


def test_without_psql_the_package_to_install_is_named(place, tmp_path):             # noqa: F811
    place.readings(LINE)
    place.run()
    done = place.command("export", "readings", "--psql", "dbname=x", env={**os.environ, "PATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (1, "importer: psql is not installed; it is in the package postgresql-client\n")


# -- readers without rights ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("arguments, words", [
    (["verify"], "database and text agree\n"), (["status"], "total\n"), (["rejects"], "no hardware id"),
    (["export", "readings"], "time,unit_id,"), (["export", "gaps", "--unit", "north"], "unit_id,nickname,"),
])
def test_another_user_who_may_only_read_can_use_all_commands_that_read(arguments, words):
    import tempfile as _                                        # noqa: F401  (whoever gives up its rights can load no more)
    with tempfile.TemporaryDirectory() as home:
        place = Place(home)                                     # noqa: F811
        place.readings("%s\tnorth\t%sx\ty\n" % (A, FIELDS), A)
        place.run()
        subprocess.run(["chmod", "-R", "go+rX,go-w", home], check=True)
        out, before = os.path.join(home, "out"), sorted(os.listdir(place.var))
        child = os.fork()
        if not child:
            status = 99
            try:
                with open(os.open(out, os.O_WRONLY | os.O_CREAT), "w") as sys.stdout:
                    os.setgid(65534)
                    os.setuid(65534)
                    status = importer.main([*arguments, "--data-dir", place.data, "--var-dir", place.var])
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        with open(out) as file:
            assert words in file.read()
        assert sorted(os.listdir(place.var)) == before


# -- several archives as one -------------------------------------------------------------------------------------------


def test_the_pings_of_each_data_directory_that_is_merged_are_taken(place):          # noqa: F811
    for name, day in (("lab-a", 12), ("lab-b", 13), ("lab-c", 14)):
        place.put("%s/remote_data/%s/data/readings/readings-00%d.tsv" % (name, A, day), reading(30 * day))
        place.put("%s/var/pings/pings-0000.tsv" % name, ping(day))
    homes = [os.path.join(place.root, name) for name in ("lab-a", "lab-b", "lab-c")]
    dirs = [option for home in homes for option in ("--data-dir", home + "/remote_data")]
    command = [sys.executable, importer.__file__, *dirs, "--var-dir", homes[0] + "/var"]
    for arguments, words in ([], "6 files, 3 readings, 3 pings"), (["verify"], "database and text agree"):
        done = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, universal_newlines=True)
        assert done.returncode == 0 and words in done.stdout, done.stdout
    units = subprocess.run([*command, "export", "units"], stdout=subprocess.PIPE, universal_newlines=True).stdout
    assert ",2019-09-12T03:02:11Z,2019-09-14T03:02:11Z,3,3," in units


# -- a data package ----------------------------------------------------------------------------------------------------


@pytest.fixture
def package(dirty, tmp_path):                                   # noqa: F811
    place, _ = dirty
    done = place.command("export", "--package", str(tmp_path / "package"), "--until", "2019-11-01")
    assert (done.returncode, done.stderr) == (0, "")
    return place, tmp_path / "package"


def test_a_package_describes_each_column_and_the_time_it_covers(package):
    _, directory = package
    described = json.loads((directory / "datapackage.json").read_text())
    assert sorted(os.listdir(directory)) == ["datapackage.json", "deployments.csv", "pings.csv", "readings.csv"]
    fields = {field["name"]: field for field in described["resources"][0]["schema"]["fields"]}
    assert fields["co2"] == {"name": "co2", "type": "number", "description": "mean of those of the ten that are usable", "unit": "ppm"}
    assert fields["co2_flag"]["description"] == "what co2 is worth, by QARTOD: 1 pass, 2 not evaluated, 3 suspect, 4 fail, 9 missing"
    assert "64 dated in the future" in fields["qc"]["description"]
    assert [field["type"] for field in fields.values()][:7] == ["datetime", "string", "string", "string", "integer", "string", "number"]
    rows = [line.split(",")[0] for line in (directory / "readings.csv").read_text().splitlines()[1:]]
    assert described["temporal"] == {"start": min(rows), "end": max(rows)}


def test_the_frictionless_library_finds_a_package_valid(package):
    frictionless = pytest.importorskip("frictionless")
    _, directory = package
    report = frictionless.validate(str(directory / "datapackage.json"))
    assert report.valid, report.to_summary()
    assert [task.name for task in report.tasks] == ["readings", "pings", "deployments"]


def test_pandas_reads_a_package_as_it_is(package):
    pandas = pytest.importorskip("pandas")
    place, directory = package
    frame = pandas.read_csv(directory / "readings.csv", parse_dates=["time"])
    count, total = place.ask("SELECT count(*), sum(co2) FROM co2_readings WHERE ts < 1572566400")[0]
    assert len(frame) == count and frame.co2.sum() == pytest.approx(total)
    assert str(frame.time.dtype).endswith("UTC]") and frame.co2_flag.dtype == "int64"


def test_a_package_is_written_anew_over_itself_but_over_nothing_else(package):
    place, directory = package
    assert place.command("export", "--package", str(directory)).returncode == 0
    (directory / "datapackage.json").unlink()
    done = place.command("export", "--package", str(directory))
    assert (done.returncode, done.stderr) == (
        2, "importer: %s holds something else than a data package: name an empty directory\n" % directory)


# -- files -------------------------------------------------------------------------------------------------------------


def test_an_export_that_fails_leaves_the_file_as_it_was(place):                    # noqa: F811
    place.readings(LINE)
    place.run()
    file = place.put("out.csv", "precious")
    assert place.command("export", "readings", "--unit", "nobody", "-o", file).returncode == 1
    with open(file) as stream:
        assert stream.read() == "precious"
    assert exported(place, "readings", "-o", file) == ""
    with open(file) as stream:
        assert stream.readline().startswith("time,unit_id,")
    assert exported(place, "readings", "-o", "/dev/stdout").startswith("time,unit_id,")


@pytest.mark.parametrize("options, reason", [
    ([], "say what to export: readings, pings, errors, deployments, gaps, units"),
    (["readings", "--package", "x"], "--package DIR writes readings, pings, deployments: nothing else can be named with it"),
    (["--package", "x", "--psql", "y"], "--package DIR writes readings, pings, deployments: nothing else can be named with it"),
])
def test_options_that_do_not_go_together_are_refused(place, options, reason):      # noqa: F811
    done = place.command("export", *options)
    assert (done.returncode, done.stderr) == (2, "importer: %s\n" % reason)


@pytest.mark.parametrize("wrong", [["--site", "nowhere"], ["--unit", "nobody"], ["--since", "never"], ["--flag", "1"]])
def test_a_package_is_left_alone_when_the_next_one_cannot_be_made(place, tmp_path, wrong):         # noqa: F811
    place.readings(LINE)
    place.run()
    assert place.command("export", "--package", str(tmp_path / "pkg")).returncode == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "pkg").iterdir()}
    assert place.command("export", "--package", str(tmp_path / "pkg"), *wrong).returncode in (1, 2)
    assert {file.name: file.read_bytes() for file in (tmp_path / "pkg").iterdir()} == before
    assert place.command("export", "--package", str(tmp_path / "new"), *wrong).returncode in (1, 2)
    assert not (tmp_path / "new").exists()


def test_an_export_replaces_a_file_when_it_is_complete(place, tmp_path, monkeypatch):                # noqa: F811
    out = tmp_path / "out.csv"
    out.write_text("of yesterday")

    def lines(*arguments):
        yield "half\n"
        assert out.read_text() == "of yesterday"
        raise importer.Unusable("interrupted")

    place.readings(LINE)
    place.run()
    monkeypatch.setattr(importer, "export", lines)
    assert importer.main(["export", "readings", "-o", str(out), "--var-dir", place.var, "--data-dir", place.data]) == 1
    assert out.read_text() == "of yesterday" and not list(tmp_path.glob("*.new"))
    monkeypatch.undo()
    assert importer.main(["export", "readings", "-o", str(out), "--var-dir", place.var, "--data-dir", place.data]) == 0
    assert out.read_text().startswith("time,unit_id") and not list(tmp_path.glob("*.new"))


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *importer.COMMANDS])
def test_help_ends_with_examples_whose_commands_and_options_there_are(command):
    done = subprocess.run([sys.executable, importer.__file__, *command.split(), "--help"], stdout=subprocess.PIPE, universal_newlines=True)
    examples = done.stdout[done.stdout.index("examples:\n"):].splitlines()[1:]
    assert 2 <= len(examples) <= 6 and max(map(len, examples)) <= 100
    for example in examples:
        words = shlex.split(example.split("|")[0].split("      ")[0])
        words = words[words.index("importer.py") + 1:]
        assert importer.make_parser().parse_args(words)


def test_a_command_calls_itself_as_it_was_called(place, tmp_path):                  # noqa: F811
    os.symlink(importer.__file__, tmp_path / "co2d-import")
    ask = [sys.executable, str(tmp_path / "co2d-import"), "--var-dir", place.var, "--data-dir", place.data]
    done = subprocess.run([*ask, "status"], stderr=subprocess.PIPE, universal_newlines=True)
    assert done.stderr.startswith("co2d-import: no database yet: ")
    done = subprocess.run([*ask, "--version"], stdout=subprocess.PIPE, universal_newlines=True)
    assert done.stdout == "co2d-import %s\n" % importer.__version__


def test_who_reads_no_further_or_has_no_room_gets_one_line_at_most(place):          # noqa: F811
    place.readings(stretch(0, 5000))
    place.run()
    command = [sys.executable, importer.__file__, "export", "readings", "--var-dir", place.var, "--data-dir", place.data]
    done = subprocess.run(["sh", "-c", '"$@" | head -1', "sh", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.stdout[:9], done.stderr) == (b"time,unit", b"")
    for full in command, [*command[:2], "status", *command[4:]]:
        done = subprocess.run(["sh", "-c", '"$@" > /dev/full', "sh", *full], stderr=subprocess.PIPE, universal_newlines=True)
        assert (done.returncode, done.stderr) == (1, "importer: No space left on device\n")
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, universal_newlines=True)
    assert (done.returncode, done.stderr) == (1, "importer: stdout is closed\n")


def test_a_setting_that_has_gone_is_warned_about(place):                            # noqa: F811
    place.readings(LINE)
    place.put("co2d.conf", "[quality]\nflat_count = 5\n")
    done = place.command("import", "--config", os.path.join(place.root, "co2d.conf"))
    assert done.returncode == 0 and done.stderr.startswith("importer: warning: ") and "flat_count has no effect" in done.stderr


def test_status_names_what_could_not_be_imported_and_why(place):                    # noqa: F811
    place.readings(LINE)
    place.run()
    with contextlib.closing(sqlite3.connect(place.archive.db)) as db:
        db.execute("UPDATE sources SET trouble = 'not readable: give the user co2d the right to'")
        db.commit()
    done = place.command("status")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
        "not imported: data/%s/data/readings/readings-0000.tsv: not readable: give the user co2d the right to" % A)


# -- data by URL -------------------------------------------------------------------------------------------------------


@pytest.fixture
def station(dirty):                                             # noqa: F811
    place, _ = dirty
    settings = importer.Settings(data_dir=place.data, var_dir=place.var, db=place.archive.db, listen="127.0.0.1", port=0,
                                 status_allow="127.0.0.0/8")
    return co2d.Station(settings, clock=lambda: NOW)


def ask(station, target, peer="127.0.0.1"):
    """Status, content type and body of what a GET is answered."""
    head = ("GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % target).encode()
    response = co2d.respond(station, co2d.parse_head(head)._replace(peer=peer, now=NOW))
    body = response.file.read() if response.file else response.body
    return response.status, response.content_type, body.decode()


@pytest.mark.parametrize("what", list(importer.EXPORTS))
@pytest.mark.parametrize("form, kind", [("csv", "text/csv; charset=utf-8"), ("jsonl", "application/x-ndjson")])
def test_a_url_gives_what_the_command_gives(station, what, form, kind):
    with importer.open_db(station.settings.db) as db:
        text = "".join(importer.export(db, what, form, {}, NOW))
    assert ask(station, "/data/co2/%s.%s" % (what, form)) == (200, kind, text) and text


def test_the_arguments_of_a_url_are_the_options_of_the_command(station):
    unit = ask(station, "/data/co2/units.csv")[2].splitlines()[1].split(",")[0]
    given = {"unit": unit[-5:], "since": "2019-09-20", "until": "2019-09-21T12:00", "flag": "1"}
    with importer.open_db(station.settings.db) as db:
        lines = list(importer.export(db, "readings", "csv", given, NOW))
    query = "&".join("%s=%s" % pair for pair in given.items())
    assert ask(station, "/data/co2/readings.csv?" + query)[2] == "".join(lines) and len(lines) > 10


@pytest.mark.parametrize("target, status, reason", [
    ("/data/co2/readings.csv?sight=a", 400, "readings: no option 'sight'; there are unit, site, since, until, flag"),
    ("/data/co2/readings.csv?since=yesterday", 400, "since is no ISO date: yesterday"),
    ("/data/co2/readings.csv?since=", 400, "since is no ISO date"),
    ("/data/co2/readings.csv?unit=nobody", 404, "no unit is called 'nobody'"),
    ("/data/co2/gaps.jsonl?site=nowhere", 404, "no site is called 'nowhere'"),
    ("/data/co2/readings.tsv", 404, "no such file"),
])
def test_what_a_url_cannot_mean_is_named(station, target, status, reason):
    answer = ask(station, target)
    assert (answer[0], json.loads(answer[2])["error"][:len(reason)]) == (status, reason)


@pytest.mark.parametrize("place", ["/data/co2/readings.csv", "/data/co2/summary"])
def test_an_argument_that_is_repeated_is_refused_and_named(station, place):
    assert ask(station, place + "?site=a&site=b")[::2] == (400, '{"error":"site is there twice"}\n')


def test_a_plus_in_a_url_is_a_space_for_people_and_a_plus_for_units(station):
    time = "until=2019-09-21+12:00"
    assert ask(station, "/data/co2/readings.csv?" + time) == ask(station, "/data/co2/readings.csv?" + time.replace("+", "%20"))
    east = "since=2019-09-20T12:00%2B02:00"
    assert ask(station, "/data/co2/readings.csv?" + east) == ask(station, "/data/co2/readings.csv?since=2019-09-20T10:00Z")
    for place in ("/data/co2/readings.csv", "/data/co2/summary"):
        assert "no site is called 'a b+c'" in ask(station, place + "?site=a+b%2Bc")[2]
    request = co2d.parse_head(b"POST /ou/co2unit-1/alive?site_code=a+b HTTP/1.0\r\n\r\n")
    assert co2d.ping_row("co2unit-1", request).split(b"\t")[2] == b"a+b"


def test_what_is_wrong_with_a_url_is_told_in_few_words(station):
    for query in ("x" * 5000 + "=1", "unit=" + "x" * 5000, "since=" + "x" * 5000):
        assert len(ask(station, "/data/co2/readings.csv?" + query)[2]) < 300


def test_data_are_for_the_networks_of_status_allow_only(station):
    assert ask(station, "/data/co2/readings.csv", peer="192.0.2.1")[0] == 403


def test_without_a_database_data_are_unavailable_for_now(station):
    station.settings = station.settings._replace(db=station.settings.db + ".none")
    status, _, body = ask(station, "/data/co2/readings.csv")
    assert status == 503 and "no database yet" in json.loads(body)["error"]


def test_no_export_is_written_on_a_disk_that_is_nearly_full(station, monkeypatch):
    monkeypatch.setattr(co2d, "LEAST_FREE", 1 << 60)
    monkeypatch.setattr(co2d.os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 100, 9, 9, 1, 1, 1, 0, 255)))
    assert ask(station, "/data/co2/readings.csv")[::2] == (507, '{"error":"the disk is nearly full: ask for less"}\n')


@pytest.fixture
def url(station):
    server = co2d.Server(station)
    server.start()
    yield "http://127.0.0.1:%d/data/co2/" % server.port
    server.stop()


def test_curl_pandas_and_duckdb_read_a_url(station, url):
    expected = ask(station, "/data/co2/readings.csv")[2]
    curl = subprocess.run(["curl", "-sS", "--fail", url + "readings.csv"], stdout=subprocess.PIPE, check=True)
    assert curl.stdout.decode() == expected and len(expected) > 1 << 17             # is sent piece by piece
    pandas = pytest.importorskip("pandas")
    assert len(pandas.read_csv(url + "readings.csv?flag=1", parse_dates=["time"])) == len(
        ask(station, "/data/co2/readings.csv?flag=1")[2].splitlines()) - 1
    assert list(pandas.read_json(url + "pings.jsonl", lines=True).columns) == [
        column.name for column in importer.EXPORTS["pings"].columns]


def test_a_reader_who_is_slow_holds_up_nobody(station, url):
    with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0]))) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(b"GET /data/co2/readings.csv HTTP/1.0\r\nHost: x\r\n\r\n")
        assert slow.recv(9) == b"HTTP/1.1 "
        assert urllib.request.urlopen(url + "units.csv").status == 200


def test_an_export_ends_when_its_reader_has_gone_and_holds_up_no_other(station, url, monkeypatch):
    began, export = threading.Event(), importer.export

    def endless(db, what, *arguments):
        if what != "readings":
            yield from export(db, what, *arguments)
        while what == "readings":
            began.set()
            yield "x" * 1000 + "\n"

    monkeypatch.setattr(importer, "export", endless)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0]))) as reader:
            reader.sendall(b"GET /data/co2/readings.csv HTTP/1.0\r\nHost: x\r\n\r\n")
            assert began.wait(10)
    assert urllib.request.urlopen(url + "units.csv", timeout=10).status == 200


def test_exports_are_written_one_at_a_time_and_hold_up_neither_units_nor_pages(station, url, monkeypatch):
    began, may_end, at_work, threads = threading.Event(), threading.Event(), threading.Lock(), []
    write = co2d.write_export

    def slowly(*arguments):
        assert at_work.acquire(blocking=False)
        began.set()
        assert may_end.wait(30)
        at_work.release()
        return write(*arguments)

    def take():
        statuses.append(urllib.request.urlopen(url + "units.csv").status)

    statuses = []
    monkeypatch.setattr(co2d, "write_export", slowly)
    for _ in range(4):
        threads.append(threading.Thread(target=take))
        threads[-1].start()
    assert began.wait(30)
    home = url[:-len("data/co2/")]
    ping = urllib.request.Request(home + "ou/co2unit-1/alive?site_code=x", method="POST")
    assert urllib.request.urlopen(ping).status == 200
    assert urllib.request.urlopen(home + "data/co2/summary").status == 200
    may_end.set()
    for thread in threads:
        thread.join(30)
    assert statuses == [200] * 4


def test_an_export_is_not_resumed_any_more_and_the_new_way_is_named(place, capsys):       # noqa: F811
    assert importer.main(["export", "readings", "--resume", "--db", place.archive.db]) == 2
    assert "use --psql CONNINFO, or --since" in capsys.readouterr().err
