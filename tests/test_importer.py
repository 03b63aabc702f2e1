"""importer: every byte accounted for, any order and any pieces, whatever the text; what the views ask uses the indexes."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from datetime import datetime

import pytest

import fleet
import importer
import sensors

HERE = os.path.dirname(os.path.abspath(importer.__file__))
NOW = 1_572_566_400                                             # 2019-11-01T00:00:00Z
CASES_NOW = 1_800_000_000                                       # 2027-01-15T08:00:00Z
START = datetime(2019, 9, 1, 0, 0, 7)
UNIT = "co2unit-30aea42a50bc"
VALUES = "\t".join("%d" % n for n in range(401, 411))
LINE = UNIT + "\tvaranger-03\t2019-09-12\t08:30:00\t4.5\t2\t" + VALUES + "\n"
RAW = LINE[:-1] + "\t405\t-0.25\t1234\tNone\t21.5\n"
T = 1_568_277_000                                               # of LINE
TABLES = ("co2_readings", "pings", "error_logs", "deploy_durations_tiered", "daily", "rejects")


class Place:
    """An archive on disk, and shorthands for what a test does with it."""

    def __init__(self, root):
        self.root = str(root)
        self.data, self.var = os.path.join(self.root, "remote_data"), os.path.join(self.root, "var")
        self.archive = importer.Archive((self.data,), self.var, os.path.join(self.var, "db.sqlite3"))
        os.makedirs(self.data, exist_ok=True)
        os.makedirs(self.var, exist_ok=True)

    def put(self, path, content, mode="wb"):
        path = os.path.join(self.root, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, mode) as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        return path

    def readings(self, content, unit=UNIT, number=0, mode="wb"):
        return self.put("remote_data/%s/data/readings/readings-%04d.tsv" % (unit, number), content, mode)

    def errors(self, content, unit=UNIT):
        return self.put("remote_data/%s/errors/errors-0000.txt" % unit, content)

    def deployments(self, content):
        return self.put("remote_data/manual/deploy_durations_tiered.tsv", content)

    def run(self, paths=None, now=NOW):
        return importer.import_new(self.archive, paths, now)

    def ask(self, query, *values, db=None):
        with contextlib.closing(sqlite3.connect(db or self.archive.db)) as connection:
            return connection.execute(query, values).fetchall()

    def dump(self, db=None):
        """All tables, in order, and the ledger without the times of the files."""
        tables = {table: sorted(self.ask("SELECT * FROM " + table, db=db), key=repr) for table in TABLES}
        tables["sources"] = self.ask("SELECT path, kind, unit_id, size, done, lines, imported, repeated, rejected, imported_bytes,"
                                     " rejected_bytes, last_ts FROM sources ORDER BY path", db=db)
        return tables

    def key(self, path):
        """Of a file below the data directory, as the ledger has it."""
        return "data" + path[len(self.data):]

    def rejects(self):
        return [tuple(row) for row in self.ask("SELECT line, offset, reason FROM rejects ORDER BY source, line")]

    def rebuilt(self):
        """What a new database of the same text holds."""
        other = self.archive._replace(db=self.archive.db + ".other")
        importer.rebuild(other, NOW)
        return self.dump(other.db)

    def command(self, *arguments, **options):
        command = [sys.executable, os.path.join(HERE, "importer.py"), *arguments, "--data-dir", self.data, "--var-dir", self.var]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, **options)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    """A dirty fleet, imported: its place and its manifest."""
    place = Place(tmp_path_factory.mktemp("fleet"))
    manifest = fleet.make_archive(place.root, units=20, days=10, seed=3)
    importer.rebuild(place.archive, NOW)
    return place, manifest


def key_of(truth):
    return truth.path if truth.path.startswith("var/") else "data" + truth.path[len("remote_data"):]


def reading(minute, co2=400, unit=UNIT, temp="4.5"):
    """A line taken so many minutes after midnight of 2019-09-12."""
    day, rest = divmod(minute, 1440)
    return "%s\tn\t2019-09-%02d\t%02d:%02d:00\t%s\t0\t%s\n" % (unit, 12 + day, rest // 60, rest % 60, temp, "\t".join([str(co2)] * 10))


# -- the manifest -----------------------------------------------------------------------------------------------------


def test_the_bytes_of_every_file_are_those_of_its_good_rejected_and_unfinished_lines(dirty):
    place, manifest = dirty
    ledger = {row[0]: row[1:] for row in place.ask("SELECT path, size, done, imported_bytes, rejected_bytes, lines FROM sources")}
    assert set(ledger) == {key_of(truth) for truth in manifest.files}
    for truth in manifest.files:
        size, done, imported, rejected, lines = ledger[key_of(truth)]
        sure = truth.sizes["good"] + truth.sizes["repeated"] + truth.sizes["ignored"]
        assert (size, size - done, lines) == (truth.size, truth.tail, sum(truth.lines.values()))
        assert imported + rejected == done
        assert truth.sizes["rejected"] <= rejected <= truth.sizes["rejected"] + truth.sizes["either"]
        assert sure <= imported <= sure + truth.sizes["either"]


def test_each_kind_of_dirt_is_imported_or_rejected_as_the_manifest_says(dirty):
    place, manifest = dirty
    seen = Counter()
    for truth in manifest.files:
        rejected = set(place.ask("SELECT r.line, r.offset, r.bytes FROM rejects r JOIN sources s ON s.id = r.source WHERE s.path = ?",
                                 key_of(truth)))
        marks = {(mark.line, mark.offset, mark.length): mark for mark in truth.marks}
        assert rejected <= set(marks)
        for place_of, mark in marks.items():
            if mark.cls != fleet.EITHER:
                assert (place_of in rejected) == (mark.cls == fleet.REJECTED), mark
                seen[mark.kind] += 1
    assert set(seen) >= set(fleet.READING_DIRT) - {"cut_number", "foreign_id", "control_nickname", "latin1_nickname"}


def test_repeats_are_imported_once_and_counted(dirty):
    place, manifest = dirty
    for truth in manifest.of("readings"):
        imported, repeated = place.ask("SELECT imported, repeated FROM sources WHERE path = ?", key_of(truth))[0]
        assert repeated == truth.lines["repeated"]
        assert truth.lines["good"] <= imported <= truth.lines["good"] + truth.lines["either"]
    counts = dict(place.ask("SELECT unit_id, count(*) FROM pings GROUP BY 1"))
    assert counts == {unit.unit_id: unit.pings for unit in manifest.units if unit.pings}


def test_suspect_rows_are_flagged_and_all_others_pass(dirty):
    place, manifest = dirty
    marked = {(key_of(truth), mark.offset): mark.kind for truth in manifest.of("readings") for mark in truth.marks}
    expected = {"future": (4, 4), "temp_85": (1, 4), "none_temp": (1, 9), "co2_zero": (4, 1), "all_none": (9, 1), "spike": (3, 1),
                "flat": (3, 1)}
    rows = place.ask("SELECT s.path, r.offset, r.co2, r.co2_flag, r.temp_flag FROM co2_readings r JOIN sources s ON s.id = r.source")
    stuck = {(path, co2) for path, offset, co2, *_ in rows if marked.get((path, offset)) == "flat"}
    for path, offset, co2, *flags in rows:
        kind = marked.get((path, offset), "")
        if kind not in ("cut_number", "foreign_id"):
            allowed = [expected.get(kind, (1, 1))] + [(3, 1)] * ((path, co2) in stuck)      # by chance just before or after
            assert tuple(flags) in allowed, (path, offset, kind)


def test_every_entry_of_the_error_logs_is_there(dirty):
    place, manifest = dirty
    for truth in manifest.of("errors"):
        assert place.ask("SELECT imported FROM sources WHERE path = ?", key_of(truth)) == [(truth.entries,)]


# -- readings, line by line -------------------------------------------------------------------------------------------


def test_a_reading_becomes_a_row_with_the_original_columns_first(place):
    place.readings(RAW)
    place.run()
    assert [row[:21] + row[22:] for row in place.ask("SELECT * FROM co2_readings")] == [
        (UNIT, "varanger-03", "2019-09-12", "08:30:00", 4.5, 2, *range(401, 411), T, 405.5, 1, 1, 0, 0, 405, -0.25, 1234, None, 21.5)]
    assert place.ask("SELECT * FROM daily") == [(UNIT, T // 86400, 1, 1, 405.5, 405.5, 405.5, 0, None, None,
                                                  1, 4.5, 4.5, 4.5, 0, None, None, T, T, 0)]


def fields(**changes):
    values = LINE[:-1].split("\t")
    for name, value in changes.items():
        values[int(name[1:])] = value
    return "\t".join(values) + "\n"


@pytest.mark.parametrize("line, reason", [
    (LINE[:-5] + "\n", "15 fields, fewer than 16"),
    ("\n", "empty line"), ("\r\n", "empty line"),
    (LINE.split("\t", 1)[1], "no hardware id"),
    ('"' + LINE, "no hardware id"),
    (fields(_2="2019-02-29"), "impossible date or time"),
    (fields(_2="2019-9-12"), "impossible date or time"),
    (fields(_3="24:00:00"), "impossible date or time"),
    (fields(_3="08:30"), "impossible date or time"),
    (fields(_2="1970-01-01"), "clock not set"),
    (fields(_2="٢٠١٩-09-12"), "impossible date or time"),
    (fields(_8="6x0"), "field 9 is not a number"),
    (fields(_8=""), "field 9 is not a number"),
    (fields(_8="400.5"), "field 9 is not a number"),
    (fields(_8=" 400"), "field 9 is not a number"),
    (fields(_8="+400"), "field 9 is not a number"),
    (fields(_8="4_0"), "field 9 is not a number"),
    (fields(_8="٤٤١"), "field 9 is not a number"),
    (fields(_8="12345678"), "field 9 is not a number"),
    (fields(_8="none"), "field 9 is not a number"),
    (fields(_8='"400"'), "field 9 is not a number"),
    (fields(_4="4."), "field 5 is not a number"), (fields(_4=".5"), "field 5 is not a number"),
    (fields(_4="1e3"), "field 5 is not a number"), (fields(_4="nan"), "field 5 is not a number"),
    (fields(_4="4-5"), "field 5 is not a number"), (fields(_4="--5"), "field 5 is not a number"),
    (fields(_5="-1"), "field 6 is not a number"), (fields(_5="1.0"), "field 6 is not a number"),
    (LINE.replace("varanger", "var\0nger"), "control character"),
    (LINE.replace("403", "4\x1c03"), "control character"),
    (LINE.replace("403", "403\r"), "control character"),
])
@pytest.mark.parametrize("company", [0, 3])
def test_a_dirty_reading_is_kept_in_rejects_with_its_reason(place, line, reason, company):
    before = "".join(reading(n) for n in range(company))
    place.readings(before + line + LINE)
    place.run()
    assert place.rejects() == [(company + 1, len(before), reason)]
    assert place.ask("SELECT count(*) FROM co2_readings") == [(company + 1,)]
    assert place.ask("SELECT imported_bytes, rejected_bytes FROM sources") == [(len(before + LINE), len(line.encode()))]


@pytest.mark.parametrize("line, rejected, reason, imported", [
    (LINE[:-1] + LINE, len(LINE) - 1, "two lines glued together", 1),
    (LINE[:30] + LINE, 30, "two lines glued together", 1), (LINE[:10] + LINE, 10, "two lines glued together", 1),
    (LINE[:-1] + "\t" + LINE, 0, None, 2), (RAW[:-1] + LINE, 0, None, 2),
    (RAW[:60] + RAW[:50] + LINE, 110, "two lines glued together", 1),
    (LINE[:70] + LINE[:-9] + "\n", len(LINE) + 62, "two lines glued together", 0),
    ("\0" * 300 + LINE, 300, "NULs", 1), ("\0" * 7 + LINE[:30] + LINE, 37, "NULs", 1),
    (LINE[:30] + "\0" * 9 + LINE, 39, "two lines glued together", 1), ("\0" * 9 + "\n", 10, "NULs", 0)])
@pytest.mark.parametrize("company", [0, 30])
def test_what_is_glued_to_a_line_or_stands_in_front_of_it_is_judged_alone(place, line, rejected, reason, imported, company):
    line = line.replace("08:30", "08:31", 1)
    place.readings("".join(reading(n) for n in range(company)) + line + reading(2000))
    place.run()
    assert place.ask("SELECT sum(bytes) FROM rejects") == [(rejected or None,)]
    assert [row[2] for row in place.rejects()][:1] == [reason] * (reason is not None)
    assert place.ask("SELECT imported - %d, lines - %d, imported_bytes + rejected_bytes - done FROM sources" % (company + 1, company + 2)) == [
        (imported, 0, 0)]


@pytest.mark.parametrize("line, column, value", [
    (LINE[:-1] + "\r\n", "co2_10", 410),
    (fields(_1="vadsø"), "nickname", "vadsø"), (fields(_1='"vadsø'), "nickname", '"vadsø'), (fields(_1="None"), "nickname", None),
    (fields(_1="CO2UNIT_NICK"), "nickname", None), (fields(_1=""), "nickname", None),
    (fields(_4="None"), "temp", None), (fields(_4="-0.5"), "temp", -0.5), (fields(_4="5"), "temp", 5.0), (fields(_5="None"), "flash_count", None),
    (fields(_8="None"), "co2_03", None), (fields(_8="-7"), "co2_03", -7), (fields(_8="007"), "co2_03", 7),
    (RAW, "led_normalised", -0.25), (fields(_0="co2unit-other"), "unit_id", "co2unit-other"),
    (fields(_2="2036-02-07"), "co2_flag", 4), (fields(_2="2036-02-07"), "temp_flag", 4),
    (fields(_4="85.0"), "temp_flag", 4), (fields(_4="85.0"), "co2_flag", 1), (fields(_4="-60.0"), "temp_flag", 4),
    (fields(_4="None"), "temp_flag", 9), (fields(_4="None"), "co2_flag", 1),
    (fields(_6="0", _7="200010"), "co2", 406.5), (fields(_6="0", _7="200010"), "co2_flag", 1),
    (fields(**{"_%d" % n: "0" for n in range(6, 11)}), "co2_flag", 1), (fields(**{"_%d" % n: "0" for n in range(6, 12)}), "co2_flag", 3),
    (fields(**{"_%d" % n: "0" for n in range(6, 12)}), "co2", 408.5), (fields(**{"_%d" % n: "0" for n in range(6, 15)}), "co2_flag", 3),
    (fields(**{"_%d" % n: "0" for n in range(6, 16)}), "co2_flag", 4), (fields(**{"_%d" % n: "0" for n in range(6, 16)}), "co2", None),
    (fields(**{"_%d" % n: "None" for n in range(6, 16)}), "co2_flag", 9),
])
@pytest.mark.parametrize("company", [0, 3])
def test_odd_but_good_readings_are_imported(place, line, column, value, company):
    place.readings("".join(reading(n) for n in range(company)) + line)
    place.run()
    assert place.rejects() == []
    assert place.ask("SELECT %s FROM co2_readings ORDER BY offset DESC LIMIT 1" % column) == [(value,)]


@pytest.mark.parametrize("five, expected, more", [
    ("405\t-0.25\t1234\tNone\t21.5", (405, -0.25, 1234, None, 21.5), 0), ("405\t7", (405, 7, None, None, None), 0),
    ("nan\t1e-05\tNone\t\tx", (None, 1e-05, None, None, None), 0), ("\t\t\t\t\t", (None,) * 5, 1),
    ("1\t2\t3\t4\t5\tx\tco2\t8.5", (1, 2, 3, 4, 5), 3), ("1\0\t2\t3\t4\t5.0", (None, 2, 3, 4, 5), 0),
    ("99999999999999999999\t2\t3\t4\t5", (None, 2, 3, 4, 5), 0)])
@pytest.mark.parametrize("company", [0, 30])
def test_what_is_behind_the_16_fields_never_costs_the_reading(place, five, expected, more, company):
    line = LINE[:-1] + "\t" + five + "\n"
    place.readings("".join(line.replace("08:30", "07:%02d" % n) for n in range(company)) + line)
    place.run()
    assert place.rejects() == []
    assert set(place.ask("SELECT %s FROM co2_readings" % ", ".join(importer.RAW))) == {expected}
    assert place.ask("SELECT imported, extra_fields FROM sources") == [(company + 1, more * (company + 1))]


def test_invalid_utf8_in_a_nickname_is_replaced_and_rejected_in_a_number(place):
    place.readings(LINE.encode().replace(b"varanger", b"vads\xf8") + LINE.encode().replace(b"403", b"4\xff3"))
    place.run()
    assert place.ask("SELECT nickname FROM co2_readings") == [("vads\ufffd-03",)]
    assert place.rejects() == [(2, len(LINE) - 3, "field 9 is not a number")]


def test_a_line_of_1970_keeps_the_times_of_its_neighbours_also_when_they_come_later(place):
    path = place.readings(reading(0) + fields(_2="1970-01-01"))
    place.run()
    assert place.ask("SELECT before_ts, after_ts, reason FROM rejects") == [(1568246400, None, "clock not set")]
    place.readings(reading(30), mode="ab")
    place.run([path])
    assert place.ask("SELECT before_ts, after_ts FROM rejects") == [(1568246400, 1568248200)]


def test_every_rejected_line_among_thousands_keeps_its_neighbours_times_in_pieces_too(place):
    lines = ["x\n" * (n % 3) + reading(n) for n in range(3000)]
    place.readings("".join(lines[:1700]) + "x\nx\n")
    place.run()
    place.readings("".join(lines[1700:]), mode="ab")
    place.run()
    rejects = place.ask("SELECT before_ts, after_ts FROM rejects ORDER BY line")
    assert len(rejects) == 3002
    assert {after - before for before, after in rejects} == {60}
    assert place.dump() == place.rebuilt()


def test_a_number_cut_at_the_end_of_a_file_waits_for_its_rest(place):
    place.readings(LINE[:-2])
    place.run()
    assert place.ask("SELECT count(*) FROM co2_readings") == [(0,)]
    place.readings(LINE[-2:], mode="ab")
    place.run()
    assert place.ask("SELECT co2_10 FROM co2_readings") == [(410,)]


def test_lone_spikes_and_flat_stretches_are_flagged_and_stay_out_of_the_rollup(place):
    place.readings("".join(reading(30 * n, 10000 if n == 5 else 400 + n) for n in range(20)) +
                   "".join(reading(1440 + 30 * n, 500) for n in range(13)))
    place.run()
    assert place.ask("SELECT co2_flag, qc, count(*) FROM co2_readings GROUP BY 1, 2") == [(1, 0, 19), (3, 4, 1), (3, 8, 13)]
    assert place.ask("SELECT n, co2_n, co2_max, co2_off, co2_peak FROM daily") == [(20, 19, 419.0, 1, 10000.0), (13, 0, None, 13, 500.0)]


def test_a_mean_that_stays_the_same_for_six_hours_is_flat_wherever_midnight_falls_all_of_it(place):
    for name, expected in (("stuck-noon-to-noon.tsv", 47), ("jitter-gaps.tsv", 0)):
        place.readings(content_of(name))
        place.run(now=CASES_NOW)
        assert place.ask("SELECT count(*), min(co2), max(co2) FROM co2_readings WHERE co2_flag = 3") == [
            (expected, *([430.0, 430.0] if expected else [None, None]))]


@pytest.mark.parametrize("minutes, flat", [
    ([30 * n for n in range(12)], 0), ([30 * n for n in range(13)], 13), ([0, 120, 240, 360], 4), ([0, 120, 359], 3),
    ([0, 120, 358], 0), ([0, 600], 0), ([0, 600, 630], 0), ([0, 240, 480], 3), ([0, 600, 720], 3), ([1380 + 30 * n for n in range(13)], 13)])
def test_flat_is_six_hours_of_one_mean_of_which_a_gap_gives_at_most_four(place, minutes, flat):
    place.readings("".join(reading(minute, 500) for minute in minutes))
    place.run()
    assert place.ask("SELECT count(*) FROM co2_readings WHERE co2_flag = 3") == [(flat,)]


def flags_of(values, minutes=30):
    """The bits of the rules on neighbours for values of readings every so often."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(importer.SCHEMA)
        rows = [(60 * minutes * n, value) for n, value in enumerate(values)]
        db.executemany("INSERT INTO co2_readings(unit_id, ts, co2, qc) VALUES ('u', ?, ?, 0)", rows)
        importer.judge(db, "u", 0, 10**9, importer.LIMITS)
        return [qc for qc, in db.execute("SELECT qc FROM co2_readings ORDER BY ts")]


def test_spikes_are_those_of_ioos_qc_and_flat_lines_and_ranges_hold_its_ones():
    """What ioos_qc 3.0.0 flags: spike_test(suspect_threshold=300, method="differential"); flat_line_test(suspect_threshold=21600,
    tolerance=1e-9), which flags the end of a stretch only; gross_range_test of temperature and of single values."""
    values = [400, 700, 400, 701, 400, 99, 400, 420, 1000, 1000, 400, 801, 1102, 700, 401, 400.5]
    assert [n for n, qc in enumerate(flags_of(values)) if qc & importer.QC_SPIKE] == [3, 5, 10, 12]
    held = [400] * 12 + [410] * 13 + [420] + [430] * 20 + [440] * 11
    assert [n for n, qc in enumerate(flags_of(held)) if qc & importer.QC_FLAT] == [*range(12, 25), *range(26, 46)]
    assert {24, *range(38, 46)} <= {n for n, qc in enumerate(flags_of(held)) if qc & importer.QC_FLAT}
    temps = [-55.1, -55.0, 0.0, 84.9, 84.95, 85.0, 90.0]
    assert [importer.temp_flag(importer.temp_bits(temp, importer.LIMITS)) for temp in temps] == [4, 1, 1, 1, 4, 4, 4]
    assert [importer.is_usable(ppm, importer.LIMITS) for ppm in (0, 199, 200, 39999, 40000, 200010)] == [False, False, True, True, False, False]


@pytest.mark.parametrize("seed", range(4))
def test_flat_stretches_and_spikes_that_grow_shrink_and_split_are_judged_as_if_at_once(place, seed):
    chance = random.Random(seed)
    lines = [reading(60 * n, chance.choice([400, 400, 400, 400, 400, 400, 900])) for n in range(150)]
    kept = sorted(chance.sample(range(150), 100))
    place.readings("".join(lines[n] for n in kept))
    for _ in range(12):
        place.run()
        assert place.dump() == place.rebuilt()
        kept = sorted(set(kept) ^ set(chance.sample(range(150), 3)))
        place.readings("".join(lines[n] for n in kept))


@pytest.mark.parametrize("chunk", [1, 7, 400])
def test_a_sensor_that_says_the_same_for_weeks_is_flat_all_along_and_each_night_looks_at_little(place, monkeypatch, chunk):
    judged, real = [], importer.judge

    def judge(db, unit, begin, end, limits):
        judged.append((end - begin + 2 * limits.spike_gap) // 3600)     # at most so many readings
        return real(db, unit, begin, end, limits)
    monkeypatch.setattr(importer, "judge", judge)
    lines = [reading(60 * n, 500) for n in range(24 * 18)]
    place.readings("".join(lines[:150]))
    place.run()
    for n in range(150, len(lines), chunk * 24):
        place.readings("".join(lines[n:n + chunk * 24]), mode="ab")
        judged.clear()
        place.run()
        assert sum(judged) < 24 * (min(chunk, 12) * 2 + 4)
    assert place.ask("SELECT co2_flag, count(*) FROM co2_readings GROUP BY 1") == [(3, len(lines))]
    assert place.dump() == place.rebuilt()
    place.readings("".join(line.replace("\t500", "\t501") if n in (200, 204) else line for n, line in enumerate(lines)))
    place.run()
    assert place.ask("SELECT co2_flag, count(*) FROM co2_readings GROUP BY 1") == [(1, 5), (3, len(lines) - 5)]


def test_an_import_notes_the_days_it_changed_those_it_only_judged_too(place):
    place.readings("".join(reading(60 * n, 500) for n in range(19, 25)))
    place.run()
    assert place.ask("SELECT unit_id, day - 18151, mark FROM changes") == []        # a new database: all is new
    place.readings(reading(1500, 500), mode="ab")
    place.run()
    assert place.ask("SELECT unit_id, day - 18151, mark FROM changes") == [(UNIT, 0, 2), (UNIT, 1, 2)]
    place.run()
    assert place.ask("SELECT mark, length(identity) FROM last_import") == [(2, 16)]
    place.readings(reading(3000, 401), mode="ab")
    place.run()
    assert place.ask("SELECT unit_id, day - 18151, mark FROM changes") == [(UNIT, 0, 2), (UNIT, 1, 2), (UNIT, 2, 3)]


def test_a_reading_of_the_future_is_forgiven_when_its_time_has_come(place):
    place.readings(fields(_2="2019-11-05"))
    place.run()
    assert place.ask("SELECT co2_flag, qc, (SELECT co2_n FROM daily) FROM co2_readings") == [(4, 64, 0)]
    place.run(now=NOW + 5 * 86400)
    assert place.ask("SELECT co2_flag, qc, (SELECT co2_n FROM daily) FROM co2_readings") == [(1, 0, 1)]


def test_lines_read_by_column_and_line_by_line_give_the_same_rows(dirty, monkeypatch):
    place, _ = dirty
    expected = place.rebuilt()
    monkeypatch.setattr(importer, "FEW", 10**9)
    assert place.rebuilt() == expected
    monkeypatch.setattr(importer, "FEW", 1)
    assert place.rebuilt() == expected


def damaged(line, chance):
    """A line of readings, as no one would think of it."""
    fields = line[:-1].split("\t")
    for _ in range(chance.choice([0, 0, 1, 1, 1, 2, 3])):
        at = chance.randrange(len(fields))
        fields[at] = chance.choice(["", "None", "0", "12345", "1000000", "99999999", "-1", "007", "1e5", "nan", "+4", " 4", "4_0", "\u0664",
                                    "85.0", "-0.0", "4.", "2019-02-30", "2036-02-07", "24:00:00", "1970-01-01", "9999-12-31", "co2unit-x",
                                    "co2unit-", "n\xf8", "\x00", "x\r", "x\x85y", '"', "x" * 70000 if chance.random() < 0.02 else "x"])
    text = "\t".join(fields + ["7"] * chance.choice([0, 0, 0, 1, 5, 8]))
    cut = chance.choice([0, 0, 0, 0, chance.randrange(len(text))])
    return chance.choice(["", "", "", "", "\0" * 9, line[:40]]) + text[cut:] + chance.choice(["\n", "\n", "\n", "\r\n", "", "\n\n"])


@pytest.mark.parametrize("seed", range(12))
def test_whatever_lines_come_none_stops_the_import_the_account_adds_up_and_blocks_are_read_as_single_lines(place, monkeypatch, seed):
    chance = random.Random(seed)
    lines = sensors.reading_lines(UNIT, "n", START, 400, raw=seed % 2 == 1)
    data = "".join(damaged(line, chance) if chance.random() < (seed + 1) / 15 else line for line in lines)
    data = data.encode("utf-8", "surrogateescape") if seed % 3 else data.encode("latin-1", "replace")
    place.readings(data)
    assert place.run().unreadable == []
    size, done, imported, rejected, pieces = place.ask(
        "SELECT size, done, imported_bytes, rejected_bytes, (SELECT total(bytes) FROM rejects) FROM sources")[0]
    assert (size, imported + rejected) == (len(data), done) and pieces == rejected and b"\n" not in data[done:]
    expected = place.dump()
    monkeypatch.setattr(importer, "FEW", 10**9)
    assert place.rebuilt() == expected
    monkeypatch.setattr(importer, "FEW", 0)
    monkeypatch.setattr(importer, "BYTES_AT_ONCE", chance.choice([500, 5000, 50000]))
    assert place.rebuilt() == expected


# -- pings, error logs, deployments -----------------------------------------------------------------------------------

PING = "2019-10-07T03:23:39.980794\t%s\tvaranger-03\t8\t-97\n" % UNIT


def test_a_rebuild_by_several_processes_gives_the_same_tables_summary_and_proof(dirty, monkeypatch):
    place, _ = dirty
    one, three = (place.archive._replace(db=place.archive.db + name) for name in (".one", ".three"))
    said = str(importer.rebuild(one, NOW))
    monkeypatch.setattr(importer, "SHARE", 1000)
    assert str(importer.rebuild(three, NOW, processes=3)) == said
    assert place.dump(three.db) == place.dump(one.db)
    assert importer.verify(three, processes=2) == []
    assert not [name for name in os.listdir(place.var) if "part" in name or name.endswith(".new")]


@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: sqlite3.connect(":memory:").execute("x")])
def test_the_share_of_a_helper_that_fails_is_read_by_the_rebuild_itself(dirty, monkeypatch, end):
    place, _ = dirty
    before, pid, fill = place.dump(), os.getpid(), importer._fill
    monkeypatch.setattr(importer, "SHARE", 1000)
    monkeypatch.setattr(importer, "_fill", lambda *args: fill(*args) if os.getpid() == pid else end())
    importer.rebuild(place.archive, NOW, processes=3)
    assert place.dump() == before
    assert not [name for name in os.listdir(place.var) if "part" in name or name.endswith(".new")]


def test_an_error_of_a_rebuild_ends_it_and_its_helpers_and_leaves_the_old_database(dirty, monkeypatch):
    place, _ = dirty
    before, pid, fill = place.dump(), os.getpid(), importer._fill
    monkeypatch.setattr(importer, "SHARE", 1000)
    monkeypatch.setattr(importer, "_fill", lambda *args: fill(*args) if os.getpid() != pid else sqlite3.connect(":memory:").execute("x"))
    with pytest.raises(sqlite3.OperationalError):
        importer.rebuild(place.archive, NOW, processes=3)
    assert place.dump() == before
    assert not [name for name in os.listdir(place.var) if "part" in name or name.endswith(".new")]


def test_a_rebuild_goes_on_alone_where_no_further_process_can_be_had(dirty, monkeypatch):
    place, _ = dirty
    one, three = (place.archive._replace(db=place.archive.db + name) for name in (".one", ".three"))
    said = str(importer.rebuild(one, NOW))
    monkeypatch.setattr(importer, "SHARE", 1000)
    monkeypatch.setattr(os, "fork", lambda: open("/none/such"))         # an OSError, as of a system that is out of processes
    assert str(importer.rebuild(three, NOW, processes=3)) == said
    assert place.dump(three.db) == place.dump(one.db)


def test_a_unit_whose_files_were_read_by_several_processes_is_settled_as_one(place, monkeypatch):
    """A lone spike at the begin of a file, whose neighbour is in the file before, and a repeat of a line of that file."""
    lines = [reading(30 * n, 400 + n) for n in range(40)]
    spike = reading(30 * 20, 900)
    for number, text in enumerate(("".join(lines[:20]), spike + "".join(lines[21:]) + lines[3])):
        place.readings(text, number=number)
    monkeypatch.setattr(importer, "SHARE", 1000)
    importer.rebuild(place.archive, NOW, processes=2)
    assert place.ask("SELECT count(*), total(qc & %d > 0) FROM co2_readings" % importer.QC_SPIKE) == [(40, 1)]
    assert place.ask("SELECT sum(n), sum(co2_off) FROM daily") == [(40, 1)]
    assert place.ask("SELECT sum(imported), sum(repeated) FROM sources") == [(40, 1)]
    assert importer.verify(place.archive) == []


def test_a_list_of_many_files_takes_no_memory(place):
    folder = os.path.join(place.data, UNIT, "data", "readings")
    os.makedirs(folder)
    for number in range(5000):
        open(os.path.join(folder, "readings-%04d.tsv" % number), "w").close()
    tracemalloc.start()
    try:
        with contextlib.closing(sqlite3.connect("", isolation_level=None)) as db:
            listing = importer.Listing(place.archive, db)
            assert sum(1 for _ in listing.between()) == 5000
        assert tracemalloc.get_traced_memory()[1] < 5000 * 100
    finally:
        tracemalloc.stop()
    assert os.listdir(place.var) == []


def test_a_ping_becomes_a_row_also_one_of_another_server(place):
    place.put("var/pings/pings-0000.tsv", PING)
    place.put("remote_data/server-north/var/pings/pings-0003.tsv", PING.replace(".980794", "").replace("varanger-03", "None"))
    place.run()
    assert place.ask("SELECT ping_ts, ping_date, ping_time, unit_id, nickname, rssi_raw, rssi_dbm, ts FROM pings ORDER BY 1") == [
        ("2019-10-07T03:23:39", "2019-10-07", "03:23:39", UNIT, None, 8, -97, 1570418619),
        ("2019-10-07T03:23:39.980794", "2019-10-07", "03:23:39.980794", UNIT, "varanger-03", 8, -97, 1570418619)]


def test_a_last_ping_without_newline_waits_and_is_not_lost(place):
    place.put("var/pings/pings-0000.tsv", PING + PING[:-1].replace("03:23", "04:23"))
    place.run()
    assert place.ask("SELECT count(*) FROM pings") == [(1,)]
    place.put("var/pings/pings-0000.tsv", "\n", "ab")
    place.run()
    assert place.ask("SELECT count(*) FROM pings") == [(2,)]


LOG = """stray
----- (1970, 1, 1, 0, 0, 14, 3, 1) WARN before any date
----- 2019-09-16 10:55:57 EXC Uncaught exception in main
Traceback (most recent call last):
  OSError: Signal quality low
----- (2019, 10, 25, 3, 11, 24, 4, 298) INFO backoff 60 s while transmitting
----- 2019-10-26 00:00:01
reset by watchdog
----- (1970, 1, 1, 0, 0, 14, 3, 1) WARN Signal quality
----- 2019-13-26 00:00:01 INFO no such month
----- nonsense
"""


def test_error_logs_of_all_times_are_read(place):
    place.errors(LOG)
    place.run()
    assert place.ask("SELECT idate, itime, etype, odate, otime, level, message, text FROM error_logs ORDER BY offset") == [
        (None, None, None, "1970-01-01", "00:00:14", "WARN", "before any date", ""),
        ("2019-09-16", "10:55:57", "signal", "2019-09-16", "10:55:57", "EXC", "Uncaught exception in main",
         "Traceback (most recent call last):\n  OSError: Signal quality low"),
        ("2019-10-25", "03:11:24", "transmit", "2019-10-25", "03:11:24", "INFO", "backoff 60 s while transmitting", ""),
        ("2019-10-26", "00:00:01", "watchdog", "2019-10-26", "00:00:01", None, "reset by watchdog", ""),
        ("2019-10-26", "00:00:01", "signal", "1970-01-01", "00:00:14", "WARN", "Signal quality", "")]
    assert [(row[0], row[2]) for row in place.rejects()] == [(1, "before the first headline"), (10, "impossible date or time"),
                                                             (11, "malformed headline")]


def test_nul_bytes_and_broken_utf8_do_not_hide_an_entry_of_an_error_log(place):
    place.errors(b"----- 2019-09-16 10:55:57 EXC Uncaught \0 exception\nat \xff line\n")
    place.run()
    assert place.ask("SELECT message, text FROM error_logs") == [("Uncaught \\x00 exception", "at \ufffd line")]


@pytest.mark.parametrize("when, reason", [
    ("(2019, 10, 25, 100, 11, 24, 4, 298)", "impossible date or time"), ("(2019, 10, 32, 3, 11, 24, 4, 298)", "impossible date or time"),
    ("(2019, 10, 25, 3, 1 1, 24, 4, 298)", "malformed headline"), ("(2019 10, 25, 3, 11, 24)", "malformed headline"),
    ("(2019, 10, 25, 3, , 24)", "malformed headline"), ("(%s, 10, 25, 3, 11, 24)" % ("9" * 5000), "malformed headline"),
    ("2019-09-31 10:55:57", "impossible date or time"), ("2019-09-16 10:61:57", "impossible date or time")])
def test_a_headline_with_an_impossible_time_is_rejected_and_the_others_stay(place, when, reason):
    place.errors("----- 2019-09-16 10:55:57 WARN before\n----- %s WARN x\n----- 2019-09-17 10:55:57 WARN after\n" % when)
    place.run()
    assert place.ask("SELECT message FROM error_logs ORDER BY ts") == [("before",), ("after",)]
    assert [row[2] for row in place.rejects()] == [reason]


def test_an_entry_of_an_error_log_without_end_is_cut_and_accounted_for(place):
    place.errors("----- 2019-09-16 10:55:57 WARN long\n" + ("y" * 99 + "\n") * 10000 + "----- 2019-09-17 10:55:57 WARN after\n")
    place.run()
    assert place.ask("SELECT message, length(text) FROM error_logs ORDER BY ts") == [("long", 65499), ("after", 0)]
    assert place.ask("SELECT done, rejected, imported_bytes + rejected_bytes FROM sources") == [(1000073, 9345, 1000073)]
    assert {row[2] for row in place.rejects()} == {"entry longer than 65536 characters"}
    assert importer.verify(place.archive) == []


def test_an_entry_that_grows_gets_its_further_lines(place):
    place.errors("----- 2019-09-16 10:55:57 EXC Uncaught exception\nTrace")
    place.run()
    place.put("remote_data/%s/errors/errors-0000.txt" % UNIT, "back\n", "ab")
    place.run()
    assert place.ask("SELECT text, (SELECT count(*) FROM error_logs) FROM error_logs") == [("Traceback", 1)]


TABLE = """# who was where
unit_id\tnickname\tsite\ttier\tstatus\tstart_ts\tend_ts\tnote

co2unit-a\tn\tsite_1\t20\tdeployed\t2019-09-12\t2019-09-12T08:30:00\t
co2unit-a\tn\tsite_2\t\ten_route\t2019-09-12 08:30:00\t
co2unit-a\tn\tsite_3\t9\tdeployed\t2019-02-30\t
co2unit-a\tn\tsite_3\tx\tdeployed
a\tn\tsite_3\t9\tdeployed
co2unit-a\tn\tsite_3\t9\tlost
co2unit-a\tn\tsite_3\t9\tdeployed\t2019-09-12\t2019-09-11
"""


def test_the_table_of_deployments_is_read_with_its_comments_gaps_and_mistakes(place):
    place.deployments(TABLE)
    place.run()
    assert place.ask("SELECT site, tier, status, start_ts, end_ts, since, until, note FROM deploy_durations_tiered") == [
        ("site_1", 20, "deployed", "2019-09-12", "2019-09-12T08:30:00", 1568246400, T, None),
        ("site_2", None, "en_route", "2019-09-12T08:30:00", None, T, None, None)]
    assert [(row[0], row[2]) for row in place.rejects()] == [
        (6, "start_ts is no ISO date: 2019-02-30"), (7, "tier is not a number"), (8, "no hardware id"),
        (9, "status is none of deployed, en_route, lab_check"), (10, "ends before it begins")]


def test_the_simple_table_is_read_only_while_there_is_no_tiered_one(place):
    place.put("remote_data/manual/deploy_durations.tsv", "site\tunit_id\tnickname\tdeploy_date\tbring_back_date\nold\tco2unit-a\tn\t2019-09-12\t\n")
    place.run()
    assert place.ask("SELECT site, tier, status, since, until FROM deploy_durations_tiered") == [("old", 10, "deployed", 1568246400, None)]
    place.deployments(TABLE)
    place.run()
    assert place.ask("SELECT site FROM deploy_durations_tiered") == [("site_1",), ("site_2",)]


# -- cases from the field ---------------------------------------------------------------------------------------------


def content_of(name):
    with open(os.path.join(HERE, "tests", "cases", *name.split("/")), "rb") as file:
        return file.read()


@pytest.mark.parametrize("name, readings, repeated, rejected", [
    ("field-too-long.tsv", 2, 0, [(2, "field 5 is not a number"), (3, "field 6 is not a number")]),
    ("behind-the-16.tsv", 6, 0, []), ("nul-then-good.tsv", 3, 0, [(2, "NULs")]),
    ("clock-1980.tsv", 2, 0, [(2, "clock not set")]), ("readings-real.tsv", 3, 2, [(6, "clock not set")])])
@pytest.mark.parametrize("few", [0, 10**9])
def test_readings_of_the_field_come_through(place, monkeypatch, name, readings, repeated, rejected, few):
    monkeypatch.setattr(importer, "FEW", few)
    place.readings(content_of(name))
    place.run(now=CASES_NOW)
    assert place.ask("SELECT imported, repeated, rejected, done - size FROM sources") == [(readings, repeated, len(rejected), 0)]
    assert place.ask("SELECT count(*) FROM co2_readings") == [(readings,)]
    assert [(line, reason) for line, _, reason in place.rejects()] == rejected


def test_values_behind_the_16_fields_of_the_field_are_kept_where_they_are_numbers(place):
    place.readings(content_of("behind-the-16.tsv"))
    place.run(now=CASES_NOW)
    assert place.ask("SELECT co2_filtered, led_normalised, sensor_temp FROM co2_readings ORDER BY ts") == [
        (229, 32274, 18373), (None, 1e-05, 18373), (229, 32274, None), (229, 32274, 18373), (229, 32274, None), (229, 32274, 18373)]
    assert place.ask("SELECT extra_fields FROM sources") == [(4,)]


def test_the_300_nuls_of_a_power_cut_are_rejected_and_not_a_byte_more(place):
    place.readings(content_of("nul-then-good.tsv"))
    place.run(now=CASES_NOW)
    assert place.ask("SELECT line, bytes, before_ts, after_ts FROM rejects") == [(2, 300, 1583020800, 1583022600)]
    assert place.ask("SELECT rejected_bytes FROM sources") == [(300,)]


def test_missing_sensors_are_flagged_as_missing_each_for_itself(place):
    place.readings(content_of("readings-real.tsv"))
    place.run(now=CASES_NOW)
    assert place.ask("SELECT temp, temp_flag, round(co2, 3), co2_flag, co2_filtered FROM co2_readings ORDER BY ts, co2 DESC") == [
        (-3.0625, 1, 697.143, 1, 229), (-3.0625, 1, None, 9, None), (None, 9, 697.143, 1, 229)]


def test_a_sensor_that_has_died_fails_and_stays_out_of_the_rollup(place):
    place.readings(content_of("dead-sensor.tsv"))
    place.run(now=1583539200)
    assert place.ask("SELECT co2_flag, count(co2), count(*) FROM co2_readings GROUP BY 1") == [(1, 144, 144), (4, 0, 144)]
    assert place.ask("SELECT n, co2_n, co2_off FROM daily") == [(48, 48, 0)] * 3 + [(48, 0, 0)] * 3


def test_the_error_log_of_a_real_unit_is_read_entry_by_entry(place):
    place.errors(content_of("errors-real.txt"))
    place.run(now=CASES_NOW)
    assert place.rejects() == []
    assert place.ask("SELECT etype, count(*) FROM error_logs GROUP BY 1 ORDER BY 1") == [
        (None, 3), ("signal", 12), ("transmit", 5), ("watchdog", 3)]
    assert place.ask("SELECT DISTINCT etype FROM error_logs WHERE message LIKE 'Run log%'") == [(None,)]
    assert place.ask("SELECT DISTINCT level FROM error_logs WHERE message LIKE 'Error transmitting%'") == [("EXC",)]


def test_the_error_log_of_old_firmware_is_read_entry_by_entry(place):
    place.errors(content_of("errors-old-firmware.txt"))
    place.run(now=CASES_NOW)
    assert place.ask("SELECT message, etype, idate, itime FROM error_logs ORDER BY offset") == [
        (message, etype, "2019-10-25", "03:11:24") for message, etype in (
            ("Skipping comm due to backoff: 4/5", "backoff"), ("Had to run recovery procedure. Watchdog reset?", "watchdog"),
            ("Uncaught exception at top level", "uncaught"), ("Error transmitting to http://x:8080", "transmit"),
            ("Error transmitting to http://x:8080", "transmit"))]


@pytest.mark.parametrize("said, kept", [
    ("Error transmitting to http://host:8080/SECRET", "Error transmitting to http://host:8080/***"),
    ("POST https://host/SECRET/ou/co2unit-1/alive?site_code=n 404 b'x'", "POST https://host/***/ou/co2unit-1/alive?site_code=n 404 b'x'"),
    ("PUT http://x/a/OLD/ou/co2unit-1/push (4096 bytes)", "PUT http://x/***/ou/co2unit-1/push (4096 bytes)"),
    ("('http://host/S1', 'http://host/S2')", "('http://host/***', 'http://host/***')"),
    ("to HTTP://host/S?x=1", "to HTTP://host/***"), ("to http://host:8080", "to http://host:8080"),
    ("GET http://host/ou/co2unit-1/updates", "GET http://host/ou/co2unit-1/updates"), ("to http://host:8080/", "to http://host:8080/")])
def test_secrets_in_error_logs_do_not_reach_the_database(place, said, kept):
    place.errors(said + "\n----- 2019-09-16 10:55:57 EXC " + said + "\nTrace " + said + "\n")
    place.run()
    assert place.ask("SELECT message, text FROM error_logs") == [(kept, "Trace " + kept)]
    assert [text for text, in place.ask("SELECT text FROM rejects")] == [kept + "\\n"]


PLAIN_TABLE = [("co2unit-30aea42a000%d" % n, "test-0%d" % n, "vj_re_sn_%d" % n, 30, "deployed", "2020-03-01", None, None, 1583020800, None)
               for n in (1, 2)]
ROWS_OF_TABLE = "SELECT %s, since, until FROM deploy_durations_tiered ORDER BY unit_id" % ", ".join(importer.DEPLOYMENT_COLUMNS)


@pytest.mark.parametrize("name", ["plain", "byte-order-mark", "capital-status", "crlf", "no-final-newline", "padded-cells", "padded-row",
                                  "quoted", "short-time"])
def test_the_same_table_however_people_saved_it(place, name):
    data = content_of("tables/%s.tsv" % name)
    place.deployments(data)
    place.run()
    assert place.ask(ROWS_OF_TABLE) == PLAIN_TABLE
    assert place.ask("SELECT size, done, imported_bytes, rejected, trouble FROM sources") == [(len(data), len(data), len(data), 0, None)]


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\n", "\r"), lambda text: text.replace("\n", "\r\n"), lambda text: text.rstrip("\n"),
    lambda text: "\ufeff# saved today\n\n" + text, lambda text: text.replace("note\n", "note\n\t\t\t\t\t\t\t\n"),
    lambda text: text.replace("unit_id", "Unit_ID"), lambda text: text.replace("2020-03-01", "2020-03-01T00:00:00Z")])
def test_ends_of_lines_blanks_and_comments_make_no_difference(place, change):
    place.deployments(change(content_of("tables/plain.tsv").decode()))
    place.run()
    assert place.ask(ROWS_OF_TABLE) == PLAIN_TABLE and place.rejects() == []


def test_a_row_that_is_refused_is_kept_with_its_line_and_reason(place):
    place.deployments(content_of("tables/refused-row.tsv"))
    place.run()
    assert place.ask(ROWS_OF_TABLE) == PLAIN_TABLE[:1]
    assert [(line, reason) for line, _, reason in place.rejects()] == [(3, "start_ts is no ISO date: the first of March")]


@pytest.mark.parametrize("change, reason", [
    (lambda text: text.encode("utf-16"), "UTF-16 text: save the table as UTF-8"),
    (lambda text: text.replace("\t", "    ").encode(), "no tabs in the header line"),
    (lambda text: text.replace("\t", ";").encode(), "no tabs in the header line"),
    (lambda text: text.replace("unit_id", "unit").encode(), "no column unit_id in the header line")])
def test_a_table_that_cannot_be_read_says_in_each_line_what_a_person_needs_to_know(place, change, reason):
    data = change(content_of("tables/plain.tsv").decode())
    place.deployments(data)
    place.run()
    assert place.ask(ROWS_OF_TABLE) == []
    assert {found for _, _, found in place.rejects()} == {reason} and len(place.rejects()) >= 3
    assert place.ask("SELECT rejected_bytes, done FROM sources") == [(len(data), len(data))]


def test_a_quote_that_is_not_closed_spoils_its_own_row_only_and_names_of_an_older_windows_are_read(place):
    rows = content_of("tables/plain.tsv").decode().replace("vj_re_sn_1", "Vadsø_roof").splitlines(True)
    place.deployments("".join([rows[0], rows[1], 'co2unit-x\t"open\tsite\n', rows[2]]).encode("cp1252"))
    place.run()
    assert place.ask("SELECT site FROM deploy_durations_tiered ORDER BY unit_id") == [("Vadsø_roof",), ("vj_re_sn_2",)]
    assert [(line, reason) for line, _, reason in place.rejects()] == [(3, "a quote that is not closed, or not doubled")]


@pytest.mark.parametrize("name, kind", [
    ("readings-0000_old.tsv", "readings"), ("readings-0000%20-%20Copy.tsv", "readings"), ("readings-0000%20(1).tsv", "readings"),
    ("readings-0001.tsv", "readings"), ("readings-0001.tsv@0@20200301T000000.000000Z", "readings"), ("%2E_readings-0000.tsv", None),
    ("readings-0000.tsv~", None), ("vads%C3%B8.tsv", None), ("readings-0001.tsv.bak", None), (".~lock.readings-0000.tsv#", None)])
def test_all_files_that_hold_readings_by_the_layout_are_imported_under_whatever_name(place, name, kind):
    place.put("remote_data/%s/data/readings/%s" % (UNIT, name), LINE)
    place.put("remote_data/%s/strange/data/readings/%s" % (UNIT, name), LINE.replace("08:30", "08:31"))
    place.run()
    assert place.ask("SELECT kind, imported FROM sources") == ([(kind, 1)] if kind else [])


def changed(name, *changes):
    """A copy of importer.py with these texts put in front of others, as a module."""
    with open(importer.__file__) as file:
        text = file.read()
    for before, added in changes:
        assert text.count(before) == 1
        text = text.replace(before, added + before)
    module = type(sys)(name)
    module.__file__ = importer.__file__
    sys.modules[name] = module
    try:
        exec(compile(text, name, "exec"), vars(module))
    finally:
        del sys.modules[name]
    return module


def test_a_further_kind_of_file_needs_a_table_a_parser_and_a_row(place):
    weather = changed(
        "importer_with_weather",
        ("CREATE TABLE pings(", "CREATE TABLE weather(unit_id TEXT, ts INTEGER, wind REAL, source INTEGER, offset INTEGER);\n"),
        ("_PING = re.compile(", """
def parse_weather(raw, rules):
    unit, day, clock, wind = decode(raw).split(",")
    return unit, instant(day, clock, rules.limits), parse_temp(wind)


"""),
        ('    "pings": Format(\n', """    "weather": Format(
        table="weather", columns=["unit_id", "ts", "wind"], folder="data/weather",
        place=uploads("data/weather", seqfile.Match("weather-", ".csv")), read=Reader.by_line, parse=parse_weather),
"""))
    place.put("remote_data/%s/data/weather/weather-0000.csv" % UNIT, UNIT + ",2019-09-12,08:30:00,3.5\n" + UNIT + ",2019-09-12,08:31:00,x\n")
    place.readings(LINE)
    summary = weather.import_new(place.archive, now=NOW)
    assert str(summary).startswith("2 files, 1 readings, 1 weather, 0 pings")
    assert place.ask("SELECT unit_id, ts, wind FROM weather") == [(UNIT, T, 3.5)]
    assert [reason for _, _, reason in place.rejects()] == ["not a number"]
    place.put("remote_data/%s/data/weather/weather-0000.csv" % UNIT, UNIT + ",2019-09-13,08:30:00,4\n", "ab")
    weather.import_new(place.archive, now=NOW)
    assert place.ask("SELECT wind FROM weather ORDER BY ts") == [(3.5,), (4.0,)]
    assert place.ask("SELECT day FROM changes") == [(T // 86400 + 1,)]
    assert weather.verify(place.archive) == []


# -- any pieces, any order, any crash ---------------------------------------------------------------------------------


def grow(place, files, chance):
    """Put the files there in random pieces and imports; every state on the way is a consistent one."""
    at = dict.fromkeys(files, 0)
    while at:
        for path in chance.sample(sorted(at), min(len(at), chance.randint(1, 6))):
            size = chance.choice([1, 50, 400, 5000, 60000, 10**6])
            place.put(path, files[path][at[path]:at[path] + size], "ab")
            at[path] += size
            if at[path] >= len(files[path]):
                del at[path]
        paths = [os.path.join(place.root, path) for path in files if os.path.exists(os.path.join(place.root, path))]
        yield place.run(chance.choice([None, paths]))


@pytest.mark.parametrize("seed", range(3))
def test_random_pieces_in_random_order_give_the_tables_of_one_import(tmp_path, seed):
    chance = random.Random(seed)
    whole, place = Place(tmp_path / "whole"), Place(tmp_path / "pieces")
    manifest = fleet.make_archive(whole.root, units=5, days=4, seed=seed)
    files = {}
    for truth in manifest.files:
        with open(os.path.join(whole.root, truth.path), "rb") as file:
            files[truth.path] = file.read()
    twin = manifest.of("readings")[0]                           # exact repeats in files of another unit
    files["remote_data/co2unit-a/data/readings/readings-0000.tsv"] = files[twin.path][:9000].rsplit(b"\n", 1)[0] + b"\n"
    for step in grow(place, files, chance):
        assert step.unreadable == []
    expected = place.rebuilt()
    assert place.dump() == expected
    assert str(place.run()).startswith("0 files, 0 readings")
    assert place.dump() == expected
    assert importer.verify(place.archive) == []


def test_killed_at_any_moment_it_goes_on_to_the_same_tables(tmp_path):
    place, chance = Place(tmp_path), random.Random(7)
    fleet.make_archive(place.root, units=8, days=12, seed=5)
    importer.import_new(place.archive._replace(data_dirs=(place.root + "/none",)), now=NOW)     # so that it grows, not rebuilds
    code = "import importer; importer.import_new(importer.Archive((%r,), %r, %r), now=%d)" % (
        place.data, place.var, place.archive.db, NOW)
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", code], cwd=HERE)
        time.sleep(0.08 + 0.35 * chance.random())
        child.send_signal(signal.SIGKILL)
        child.wait()
    place.run()
    assert place.dump() == place.rebuilt()


def test_a_replaced_file_is_read_again_and_only_that(place):
    place.readings(reading(0), number=0)
    path = place.readings(reading(30) + reading(60), number=1)
    place.run()
    place.readings(reading(90), number=1)
    assert place.run([path]).files == 1
    assert place.ask("SELECT time FROM co2_readings ORDER BY ts") == [("00:00:00",), ("01:30:00",)]
    place.readings(reading(95), number=1)                       # of the same length
    assert place.run().files == 1
    assert place.dump() == place.rebuilt()


def test_a_file_that_vanished_takes_its_rows_along(place):
    place.readings(reading(0), number=0)
    os.unlink(place.readings(reading(30) + "x\n", number=1))
    place.readings(reading(30) + "x\n", number=1)
    place.run()
    os.unlink(place.readings(b"", number=1))
    place.run()
    assert place.ask("SELECT count(*) FROM co2_readings") == [(1,)] and place.rejects() == []
    assert place.dump() == place.rebuilt()


def on_each_connection(monkeypatch, prepare):
    connect = sqlite3.connect

    def connected(*arguments, **options):
        db = connect(*arguments, **options)
        prepare(db)
        return db
    monkeypatch.setattr(sqlite3, "connect", connected)


def test_a_reading_of_the_year_9999_ends_no_import(place):
    lines = LINE + LINE.replace("2019-09", "9999-12")
    place.readings(lines)
    place.run()
    place.readings(lines + reading(1440), mode="wb")
    place.run()
    assert place.ask("SELECT count(*), sum(n) FROM co2_readings, (SELECT sum(n) AS n FROM daily)") == [(3, 9)]
    assert importer.verify(place.archive) == []


def test_a_replaced_file_costs_no_look_at_all_readings_unless_it_had_those_of_other_units(place, monkeypatch):
    path, statements = place.readings(LINE), []
    place.run()
    on_each_connection(monkeypatch, lambda db: db.set_trace_callback(statements.append))
    for text, scans in ((reading(0) + reading(30, unit="co2unit-other"), 0), (reading(60), 1)):
        place.readings(text)
        statements.clear()
        place.run([path])
        by_unit = ["unit_id" in said for said in statements if said.startswith("DELETE FROM co2_readings WHERE source")]
        assert by_unit == [True, False][:1 + scans]
        assert place.ask("SELECT count(*) FROM co2_readings") == [(text.count("\n"),)]


@pytest.mark.parametrize("first", [0, 1])
def test_a_repeat_comes_back_when_the_other_copy_is_replaced(place, first):
    for number in (first, 1 - first):
        place.readings(reading(0) + reading(30 + number), number=number)
        place.run()
    assert place.ask("SELECT sum(imported), sum(repeated) FROM sources") == [(3, 1)]
    kept = place.ask("SELECT s.path FROM co2_readings r JOIN sources s ON s.id = r.source WHERE time = '00:00:00'")[0][0]
    place.run([place.readings(reading(90), number=int(kept[-5]))])
    assert place.ask("SELECT count(*) FROM co2_readings WHERE time = '00:00:00'") == [(1,)]
    assert place.dump() == place.rebuilt()


def test_an_empty_data_directory_is_taken_for_a_disk_that_is_not_mounted(place):
    place.readings(LINE)
    place.run()
    os.rename(place.data, place.data + ".unmounted")
    os.makedirs(place.data)
    assert "is a disk not mounted?" in str(place.run())
    assert place.ask("SELECT count(*) FROM co2_readings") == [(1,)]


def test_a_vanished_copy_of_a_repeat_brings_the_other_one_back(place):
    for number in (0, 1):
        place.readings(reading(0), number=number)
    place.run()
    kept = place.ask("SELECT s.path FROM co2_readings r JOIN sources s ON s.id = r.source")[0][0]
    os.unlink(place.readings(b"", number=int(kept[-5])))
    place.run()
    assert place.dump() == place.rebuilt()
    assert place.ask("SELECT count(*) FROM co2_readings") == [(1,)]


# -- several servers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_the_same_file_on_two_servers_counts_once_as_its_longest_version(tmp_path, order):
    one, other = Place(tmp_path / "a"), Place(tmp_path / "b")
    one.readings(reading(0) + reading(30))
    other.readings(reading(0))
    other.readings(reading(60), number=1)
    both = one.archive._replace(data_dirs=(one.data, other.data)[::order])
    for _ in range(2):
        importer.import_new(both, now=NOW)
        assert one.ask("SELECT path, imported, repeated FROM sources ORDER BY path") == [
            ("data/%s/data/readings/readings-000%d.tsv" % (UNIT, number), 2 - number, 0) for number in (0, 1)]
    first = one.dump()
    other.readings(reading(30) + reading(90), mode="ab")
    importer.import_new(both, now=NOW)
    assert one.ask("SELECT count(*) FROM co2_readings") == [(4,)] and first != one.dump()


@pytest.mark.parametrize("order", [1, -1])
def test_where_two_servers_disagree_both_are_kept_and_reported(tmp_path, order):
    one, other = Place(tmp_path / "a"), Place(tmp_path / "b")
    one.readings(reading(0) + reading(30))
    other.readings(reading(60))
    summary = importer.import_new(one.archive._replace(data_dirs=(one.data, other.data)[::order]), now=NOW)
    assert one.ask("SELECT count(*) FROM co2_readings") == [(3,)]
    assert "two versions of data/%s/data/readings/readings-0000.tsv" % UNIT in str(summary)
    assert [path for path, in one.ask("SELECT path FROM sources ORDER BY path")][1].startswith(
        "data/%s/data/readings/readings-0000.tsv#" % UNIT)


# -- the database -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [importer.import_new, importer.rebuild])
def test_a_database_of_the_original_is_set_aside(place, run):
    place.readings(LINE)
    with contextlib.closing(sqlite3.connect(place.archive.db)) as db:
        db.execute("CREATE TABLE co2_readings(unit_id TEXT)")
        db.execute("INSERT INTO co2_readings VALUES ('precious')")
        db.commit()
    run(place.archive, now=NOW)
    aside = [name for name in os.listdir(place.var) if ".before-" in name]
    assert len(aside) == 1 and place.ask("SELECT * FROM co2_readings", db=os.path.join(place.var, aside[0])) == [("precious",)]
    assert place.ask("SELECT count(*) FROM co2_readings") == [(1,)]


@pytest.mark.parametrize("damage", ["no database at all", "SQLite format 3\0 but then not", "pages"])
def test_a_broken_database_is_set_aside_and_made_anew(place, damage):
    place.readings("".join(reading(n) for n in range(1000)))
    place.run()
    expected = place.dump()
    with open(place.archive.db, "r+b") as file:
        if damage == "pages":
            file.seek(4096)
        file.write(b"broken" * 4000 if damage == "pages" else damage.encode() * 100)
    place.readings(reading(1000), mode="ab")
    place.run()
    assert len(place.dump()["co2_readings"]) == len(expected["co2_readings"]) + 1


def test_readers_go_on_while_the_database_is_rebuilt(place):
    place.readings(reading(0))
    place.run()
    with importer.open_db(place.archive.db) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM co2_readings").fetchone() == (1,)
        place.readings(reading(30), mode="ab")
        place.run()
        began = time.monotonic()
        importer.rebuild(place.archive, NOW)
        assert time.monotonic() - began < 5
        assert reader.execute("SELECT count(*) FROM co2_readings").fetchone() == (1,)
        with importer.open_db(place.archive.db) as other:
            assert other.execute("SELECT count(*) FROM co2_readings").fetchone() == (2,)
    place.readings(reading(60), mode="ab")
    place.run()
    assert place.ask("PRAGMA integrity_check") == [("ok",)] and place.dump() == place.rebuilt()


def test_readers_see_the_old_state_until_an_import_is_done(place):
    place.readings(reading(0))
    place.run()
    seen = []
    place.readings(reading(30), mode="ab")
    with importer.open_db(place.archive.db) as reader:
        importer.import_new(place.archive, now=NOW, progress=lambda size: seen.append(
            reader.execute("SELECT count(*) FROM co2_readings").fetchone()[0]))
        assert seen == [1] and reader.execute("SELECT count(*) FROM co2_readings").fetchone() == (2,)


def test_only_one_importer_writes_and_the_other_is_told_who(place):
    with importer.only_writer(place.archive.db):
        with pytest.raises(importer.Unusable, match="process %d is importing" % os.getpid()):
            with importer.only_writer(place.archive.db, patience=0.1):
                pass


def test_a_database_that_is_not_there_is_said_to_be_missing(place):
    with pytest.raises(importer.NoDatabase, match="no database yet"), importer.open_db(place.archive.db):
        pass


def test_the_original_queries_run(dirty):
    place, manifest = dirty
    summary = place.ask("SELECT unit_id, max(ping_ts), count(*) FROM pings WHERE ping_date > '2019-09-20' GROUP BY unit_id")
    assert len(summary) > 15
    assert place.ask("SELECT date || 'T' || time AS timestamp, temp, co2_01, co2_10 FROM co2_readings NATURAL JOIN "
                     "(SELECT unit_id, site FROM deploy_durations_tiered WHERE tier > 9) WHERE site = 'vj_ko_sn_2' LIMIT 1")


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_line_of_the_summary_and_exit_status_1(place, monkeypatch):
    place.readings(reading(0), number=0)
    bad = place.readings(reading(30), number=1)
    real = importer._open_no_link

    def opener(path, flags):
        if path == bad:
            raise PermissionError(13, "Permission denied", path)
        return real(path, flags)
    monkeypatch.setattr(importer, "_open_no_link", opener)
    summary = place.run()
    assert summary.unreadable == [(place.key(bad), "Permission denied; it is tried again each time")] and summary.files == 1
    monkeypatch.undo()
    assert place.run().unreadable == [] and place.dump() == place.rebuilt()


def test_a_directory_that_may_be_listed_but_not_entered_does_not_stop_the_others(place, monkeypatch):
    place.readings(reading(0, unit="co2unit-closed"), unit="co2unit-closed")
    place.readings(reading(30), unit="co2unit-open")
    place.run()
    real = os.lstat

    def closed(path, *rest, **named):
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "lstat", closed)
    monkeypatch.setattr(importer, "_open_no_link", lambda path, flags: os.open(path, flags) if os.lstat(path) else -1)
    place.readings(reading(60), unit="co2unit-open", mode="ab")
    assert [why for _, why in place.run().unreadable] == ["Permission denied; it is tried again each time"]
    assert place.ask("SELECT count(*), count(DISTINCT unit_id) FROM co2_readings") == [(3, 2)]


def test_repeats_between_many_files_are_counted_once(place):
    for number in range(60):
        place.readings(reading(number) + reading(number // 2) + "x\n", number=number)
    place.run()
    assert place.ask("SELECT count(*), sum(imported), sum(repeated), sum(rejected) FROM sources") == [(60, 60, 60, 60)]
    assert place.dump() == place.rebuilt() and importer.verify(place.archive) == []
    assert place.run().files == 0


@pytest.mark.parametrize("kind", ["readings", "errors"])
def test_a_file_that_fails_half_way_is_accounted_for_up_to_there_and_tried_again(place, monkeypatch, kind):
    real = importer.complete_blocks

    def half(file, account, end):
        yield from real(file, account, 300)
        raise OSError(5, "Input/output error")
    path = place.readings(LINE * 4) if kind == "readings" else place.errors(LOG)
    importer.import_new(place.archive._replace(data_dirs=(place.root + "/none",)), now=NOW)
    monkeypatch.setattr(importer, "complete_blocks", half)
    assert place.run().unreadable == [(place.key(path), "Input/output error; it is tried again each time")]
    assert place.ask("SELECT done > 100, done - imported_bytes - rejected_bytes FROM sources") == [(1, 0)]
    monkeypatch.undo()
    assert place.run().unreadable == []
    assert place.dump() == place.rebuilt()


def test_a_full_disk_ends_with_a_message_and_the_old_database(tmp_path):
    place = Place(tmp_path)
    place.readings(reading(0))
    place.run()
    before = place.dump()
    for number in range(30):
        place.readings("".join(reading(n) for n in range(100 * number, 100 * number + 1000)), number=number)

    def small():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))
    for command in ("import", "rebuild"):
        done = place.command(command, preexec_fn=small)
        assert done.returncode == 1 and done.stderr.startswith("importer: ") and "Traceback" not in done.stderr
        assert place.dump() == before
    assert place.command("import").returncode == 0


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_are_accounted_for_like_all_others(place, seed):
    chance = random.Random(seed)
    noise = bytes(chance.choice(b"\n\n\t\t0123456789-:.N\0\xff\r\" ") for _ in range(20000)) + bytes(chance.randrange(256) for _ in range(20000))
    lines = [LINE.encode(), RAW.encode(), PING.encode(), LOG.encode(), TABLE.encode()]
    data = b"".join(chance.choice(lines) + noise[n:n + chance.randrange(80)] for n in range(0, 40000, 80))
    place.readings(data)
    place.errors(data)
    place.deployments(data)
    place.put("var/pings/pings-0000.tsv", data)
    place.run()
    assert place.ask("SELECT size, done, done - imported_bytes - rejected_bytes FROM sources WHERE kind <> 'deployments'") == [
        (len(data), data.rfind(b"\n") + 1, 0)] * 3
    assert place.ask("SELECT size, done, done - imported_bytes - rejected_bytes FROM sources WHERE kind = 'deployments'") == [
        (len(data), len(data), 0)]
    assert place.dump() == place.rebuilt()


def test_a_hundred_megabytes_in_one_line_need_little_memory(place):
    path = place.readings(b"")
    with open(path, "wb") as file:
        file.truncate(100_000_000)
        file.seek(0, 2)
        file.write(b"\n" + LINE.encode())
    code = ("import importer, re; importer.import_new(importer.Archive((%r,), %r, %r)); "
            "print(re.search('VmHWM: *([0-9]+)', open('/proc/self/status').read().replace(chr(9), ' '))[1])"
            % (place.data, place.var, place.archive.db))
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) < 60_000
    assert place.ask("SELECT count(*) FROM co2_readings") == [(1,)]
    assert place.ask("SELECT DISTINCT reason FROM rejects WHERE bytes = 65536") == [("line longer than 65536 bytes",)]
    assert place.ask("SELECT sum(bytes) FROM rejects") == [(100_000_001,)]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_two_files_whose_names_give_the_same_id_are_never_mixed_up(place, monkeypatch, together, named):
    monkeypatch.setattr(importer.Source, "id", property(lambda source: 7))
    first = place.readings(LINE)
    if not together:
        place.run()
    second = place.readings(reading(1), number=1)
    told = "its name gives the same id as that of data/%s/data/readings/readings-0000.tsv: rename one of them" % UNIT
    (where, why), = place.run([first, second] if named else None).unreadable
    assert where.endswith("/data/readings/readings-0001.tsv") and why == told
    assert place.ask("SELECT ts FROM co2_readings") == [(T,)]
    os.unlink(first)
    place.run()
    assert place.ask("SELECT path FROM sources") == [("data" + second[len(place.data):],)]
    assert place.ask("SELECT time FROM co2_readings") == [("00:01:00",)]


def test_names_that_are_no_utf8_empty_files_and_links_do_no_harm(place):
    place.readings(LINE)
    place.readings(b"", number=1)
    os.symlink("readings-0000.tsv", os.path.join(place.data, UNIT, "data/readings/readings-0002.tsv"))
    os.symlink(UNIT, os.path.join(place.data, "co2unit-link"))
    odd = os.path.join(os.fsencode(place.data), b"co2unit-\xff", b"data", b"readings")
    os.makedirs(odd)
    with open(os.path.join(odd, b"readings-\xfe.tsv"), "wb") as file:
        file.write(LINE.replace("08:30", "09:30").encode() + b"x\n")
    place.run()
    assert place.ask("SELECT count(*), (SELECT count(*) FROM sources) FROM co2_readings") == [(2, 3)]
    assert place.command("status").returncode == place.command("rejects").returncode == place.command("verify").returncode == 0


# -- proof ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage, found", [
    ("UPDATE co2_readings SET co2_03 = 6 WHERE rowid = 3", "row of co2_readings is not in the text"),
    ("UPDATE co2_readings SET offset = offset + 1 WHERE rowid = 3", "row of co2_readings is not in the database"),
    ("DELETE FROM co2_readings WHERE rowid = 3", "row of co2_readings is not in the database"),
    ("INSERT INTO co2_readings SELECT * FROM co2_readings WHERE rowid = 3", "co2_readings: 6 rows, but 5 in the text"),
    ("UPDATE daily SET co2_sum = 1 WHERE rowid_is_not_needed", "daily: "),
    ("UPDATE daily SET co2_max = co2_max + 1", "daily: %s, 18151: the rollup is not that of the text" % UNIT),
    ("UPDATE daily SET first = 7", "daily: %s, 18151: the rollup is not that of the text" % UNIT),
    ("DELETE FROM daily", "daily: "),
    ("UPDATE rejects SET reason = ''", "row of rejects is not in the text"),
    ("UPDATE sources SET imported_bytes = imported_bytes + 1", "bytes of lines, but"),
    ("UPDATE sources SET imported = imported + 1", "the account is not that of the text"),
])
def test_verify_finds_what_does_not_agree(place, damage, found):
    place.readings("".join(reading(30 * n, 400 + n) for n in range(5)) + "x\n")
    place.put("var/pings/pings-0000.tsv", "2019-09-12T03:00:00.000000\t%s\tn\t8\t-97\n" % UNIT)
    place.run()
    assert importer.verify(place.archive) == []
    with contextlib.closing(sqlite3.connect(place.archive.db)) as db:
        db.execute(damage.replace("rowid_is_not_needed", "n > 0"))
        db.commit()
    problems = importer.verify(place.archive)
    assert any(found in problem for problem in problems), problems


def test_of_several_data_directories_one_that_is_not_there_is_told(place):
    place.readings(reading(0))
    missing = place.root + "/misspelt"
    summary = importer.import_new(place.archive._replace(data_dirs=(place.data, missing)), now=NOW)
    assert summary.unreadable == [(missing, "there is no such directory")]


@pytest.mark.parametrize("put", [Place.readings, Place.errors])
def test_verify_agrees_about_the_first_pieces_of_a_line_whose_end_has_not_come(place, put):
    put(place, (reading(0) if put is Place.readings else "----- 2019-09-12 08:30:00 WARN x\n") + "\0" * 70000)
    place.run()
    assert len(place.rejects()) == 1 and importer.verify(place.archive) == []


def test_verify_finds_text_that_changed_behind_the_ledgers_back(place):
    path = place.readings(reading(0) + reading(30))
    place.run()
    place.readings(reading(0) + reading(35))
    assert any("not in the text" in line for line in importer.verify(place.archive))
    os.unlink(path)
    assert any("the file is gone" in line for line in importer.verify(place.archive))


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, status, words", [
    ([], 0, "1 files, 1 readings"), (["import"], 0, "1 files"), (["rebuild"], 0, "1 files"), (["status"], 1, "no database yet"),
    (["verify"], 1, "no database yet"), (["rejects"], 1, "no database yet"), (["export", "readings"], 1, "no database yet"),
    (["nonsense"], 2, "invalid choice"), (["export"], 2, "say what to export"),
    (["--help"], 0, "usage"),
])
def test_commands_end_with_their_exit_status_and_never_with_a_traceback(place, arguments, status, words):
    place.readings(LINE)
    done = place.command(*arguments)
    assert done.returncode == status and words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_status_prints_the_account_of_every_file_and_rejects_every_line(place):
    place.readings(LINE + LINE + "x\ty\n" + LINE[:7])
    place.run()
    lines = place.command("status").stdout.splitlines()
    assert lines[1].split() == ["194", "178", "4", "7", "1", "1", "1", "data/%s/data/readings/readings-0000.tsv" % UNIT] or lines[1].split()[:7] == [
        str(2 * len(LINE) + 11), str(2 * len(LINE)), "4", "7", "1", "1", "1"]
    assert place.command("rejects").stdout == ("data/%s/data/readings/readings-0000.tsv:3: byte %d: no hardware id (between "
                                               "2019-09-12T08:30:00 and ?): x\\ty\\n\n" % (UNIT, 2 * len(LINE)))


def test_the_result_does_not_depend_on_the_locale(place):
    place.readings(LINE.replace("varanger", "vadsø") + LINE.replace("08:", "09:").encode().replace(b"v", b"\xff").decode("utf-8", "replace"))
    for locale in ("C", "C.UTF-8"):
        environ = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        assert place.command("rebuild", env=environ).returncode == 0
        assert place.ask("SELECT nickname FROM co2_readings ORDER BY offset LIMIT 1") == [("vadsø-03",)]
        assert place.command("export", "readings", env=environ).returncode == 0


CASES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cases")

# -- what the views ask -----------------------------------------------------------------------------------------------


def test_no_query_of_the_views_scans_a_table_of_readings_pings_or_errors(dirty):
    place, manifest = dirty
    with importer.open_db(place.archive.db) as db:
        queries = []
        db.set_trace_callback(queries.append)
        stays = importer.deployments(db)
        spans = [(stay.unit_id, stay.since, stay.until) for stay in stays]
        units = sorted({stay.unit_id for stay in stays})
        edges, end = list(range(1568246400, 1569456000, 86400)), 1569499200
        ask_everything(db, stays, spans, units, edges, end)
        db.set_trace_callback(None)
        asked = {query: [row[3] for row in db.execute("EXPLAIN QUERY PLAN " + query)]
                 for query in queries if query.lstrip().upper().startswith(("SELECT", "WITH"))}
    plans = {step for steps in asked.values() for step in steps}
    assert any("USING INDEX readings_by_unit" in plan for plan in plans)
    assert [plan for plan in plans if plan.startswith("SCAN") and any(
        name in plan.split() for name in ("co2_readings", "r", "pings", "error_logs", "e", "daily", "d"))
        and "temp" not in plan] == []
    tables = {query.split(" CROSS JOIN ")[-1].split()[0]: steps for query, steps in asked.items() if "GROUP BY p.i, p.j" in query}
    assert sorted(tables) == ["daily", "error_logs", "pings"]
    del tables["error_logs"]                                    # sorted by type too: they are few
    sorts = {table: [step for step in steps if "GROUP BY" in step] for table, steps in tables.items()}
    assert sorts["pings"] == [] and len(sorts["daily"]) == 1    # of the sums of columns, no sort of what is summed up


def ask_everything(db, stays, spans, units, edges, end):
    for what in ("co2", "temp"):
        importer.buckets(db, [what], [spans[:3], spans[3:]], edges)
        importer.count_outside(db, what, spans, 390, 410)
        importer.quantiles(db, what, spans, [0.05, 0.95])
        importer.last_value(db, what, spans)
    for table in ("co2_readings", "pings", "error_logs"):
        importer.extent(db, table, units, end)
    importer.pings(db, [spans[:3], spans[3:]], edges)
    importer.errors(db, spans, edges)
    importer.signals(db, units[0], edges[0], end)
    importer.newest_errors(db, units, edges[0], end, 5)
    importer.fleet_state(db, end)
    importer.gaps(db, stays, edges[0], end)
    importer.missing(db, stays, spans, edges, end)


def field(place, chance, unit, days=430):
    """Text of a unit over some days at odd times, with flags, holes and days of nothing: a file of readings and one of pings
    for each fortnight. -> files in a random order, as (path, content)."""
    files = []
    for number in range(days // 14):
        lines, pings = [], []
        for day in range(14 * number, 14 * number + 14):
            away, hours = chance.random() < 0.1, chance.choice([(0, 23), range(0, 24, 3), range(24)])
            for second in [] if away else sorted(hour * 3600 + chance.choice([0, 0, chance.randrange(3600)]) for hour in hours):
                at, ppm = time.gmtime(1_525_000_000 // 86400 * 86400 + day * 86400 + second), chance.choice([400, 400, 405, 431, 2000, 0])
                lines.append("%s\tn\t%s\t%s\t0\t%s\n" % (unit, time.strftime("%Y-%m-%d\t%H:%M:%S", at), chance.choice(["-3.5", "4.0", "85.0"]),
                                                       "\t".join(["%d" % ppm] * 10)))
                if chance.random() < 0.2:
                    pings.append("%s.000000\t%s\tn\t8\t%s\n" % (time.strftime("%Y-%m-%dT%H:%M:%S", at), unit, chance.choice([-97, -88, None])))
        files += [("remote_data/%s/data/readings/readings-%04d.tsv" % (unit, number), "".join(lines)),
                  ("remote_data/server-%s/var/pings/pings-%04d.tsv" % (unit[-1], number), "".join(pings))]
    return chance.sample(files, len(files))


def cuts(chance, begin, end):
    """Bounds of columns: seconds, hours, days, months, half years; on whole days, and beside them."""
    edges = [begin]
    while edges[-1] < end:
        edge = edges[-1] + chance.choice([1, 3600, 43200, 86400, 7 * 86400, 45 * 86400, 95 * 86400, 200 * 86400])
        day = edge // 86400
        edges.append(max(edges[-1] + 1, chance.choice([edge, day * 86400, day * 86400 - 7200, edge + chance.randrange(86400)])))
    return edges


def plainly(place, what, unit, a, b):
    """A bucket by a query that knows no rollup."""
    bad = (importer.QC_CO2_BAD if what == "co2" else importer.QC_TEMP) | importer.QC_ROW
    rows = place.ask("SELECT %s, qc FROM co2_readings WHERE unit_id = ? AND ts >= ? AND ts < ?" % what, unit, a, b)
    good = [value for value, qc in rows if value is not None and not qc & bad]
    odd = [value for value, qc in rows if value is not None and qc & bad and not qc & importer.QC_ROW]
    return [len(rows), len(good), pytest.approx(sum(good)), min(good, default=None), max(good, default=None), len(odd),
            min(odd, default=None), max(odd, default=None)]


@pytest.mark.parametrize("seed", range(3))
def test_what_the_rollups_give_is_what_a_plain_query_over_the_rows_gives(place, seed):
    chance = random.Random(seed)
    units = ("co2unit-00000000000a", "co2unit-00000000000b")
    files = [file for unit in units for file in field(place, chance, unit)]
    for n, (path, content) in enumerate(chance.sample(files, len(files))):
        place.put(path, content)
        if n % 5 == 0:
            place.run()
    path, content = chance.choice(files)
    place.put(path, content[len(content) // 2:])                # replaced by another one
    place.run()
    assert importer.verify(place.archive) == []
    begin, end = place.ask("SELECT min(ts) - 50 * 86400, max(ts) + 50 * 86400 FROM co2_readings")[0]
    with importer.open_db(place.archive.db) as db:
        for _ in range(8):
            edges, bounds = cuts(chance, begin, end), cuts(chance, begin, end)
            spans = [(chance.choice(units), *ab) for ab in zip(bounds, bounds[1:])] + [(units[0], 0, importer.FOREVER)]
            compare_columns(place, db, spans, edges)
            for unit, a, b in spans:
                assert importer.signals(db, unit, a, b) == place.ask(
                    "SELECT rssi_dbm, count(*), max(ts) FROM pings WHERE unit_id = ? AND ts >= ? AND ts < ? AND rssi_dbm IS NOT NULL "
                    "GROUP BY rssi_dbm ORDER BY rssi_dbm", unit, a, b)
                outside = place.ask("SELECT total(co2 < 300), total(co2 > 420) FROM co2_readings WHERE unit_id = ? AND ts >= ? AND ts < ?",
                                    unit, a, b)[0]
                assert importer.count_outside(db, "co2", [(unit, a, b)], 300, 420) == outside


def compare_columns(place, db, spans, edges):
    found = importer.buckets(db, ("co2", "temp"), [[span] for span in spans], edges)
    pings = importer.pings(db, [[span] for span in spans], edges)
    for i, (unit, since, until) in enumerate(spans):
        for j, (begin, behind) in enumerate(zip(edges, edges[1:])):
            a, b = max(since, begin), min(until, behind)
            for what in ("co2", "temp"):
                bucket, expected = found[what][i][j], plainly(place, what, unit, a, b)
                if bucket is None or bucket.held:
                    assert expected[0] == 0
                else:
                    assert [bucket.rows, bucket.n, bucket.total, *bucket[5:10]] == expected, (what, unit, a, b)
            n, days, dbm = place.ask("SELECT count(*), count(DISTINCT (ts - ?) / 86400), avg(rssi_dbm) FROM pings "
                                     "WHERE unit_id = ? AND ts >= ? AND ts < ?", begin, unit, a, b)[0]
            days = min(days, max(1, int((behind - begin) / 86400 + 0.5)))       # of the zone, not of UTC
            mine = pings[i][j]
            assert (mine and (mine.n, mine.days, mine.dbm)) == ((n, days, dbm and pytest.approx(dbm)) if n else None)


@pytest.mark.parametrize("seed", range(3))
def test_gaps_are_distances_of_more_than_one_and_a_half_rhythms_in_whatever_order_files_come(place, seed):
    chance = random.Random(seed)
    files = field(place, chance, UNIT)
    for n, (path, content) in enumerate(files):
        place.put(path, content)
        if n % 7 == 0:
            place.run()
    place.run()
    os.remove(os.path.join(place.root, files[0][0]))
    place.run()
    times = [ts for ts, in place.ask("SELECT ts FROM co2_readings ORDER BY ts")]
    days = {day: list(group) for day, group in itertools.groupby(times, lambda ts: ts // 86400)}
    usual = {day: min((group[-1] - group[0]) // len(group), 86400 // len(days.get(day - 1, "1"))) for day, group in days.items()}

    def distances(group):
        return [after - before for before, after in zip(group, group[1:])]

    def is_stretch(n):
        """Whether readings may be missing before times[n]: the day has a long distance, and this one is long there, or beside its neighbours."""
        day, limit = times[n] // 86400, 1.1 * usual[times[n] // 86400]
        if day - 1 in days and max(distances([days[day - 1][-1], *days[day]])) <= limit:
            return False
        before, distance, after = ([0] + distances(times) + [0])[n - 1:n + 2]
        beside = min([near for near in (before, after) if near], default=limit / 1.4)
        return distance > min(limit, 1.4 * beside)
    with importer.open_db(place.archive.db) as db:
        for now in (times[-1], times[-1] - 100 * 86400, times[-1] + 40 * 3600):
            for a in (0, times[100], times[300] + 1):
                seen = [ts for ts in times if ts <= now]
                expected = []
                for n, (before, after) in enumerate(zip(seen, seen[1:]), 1):
                    step = rhythm_of(times[max(0, n - 10):n + 10])
                    if after - before > 1.5 * step and after > a and is_stretch(n):
                        expected.append((before, after, round((after - before) / step) - 1))
                step = rhythm_of(seen[-10:])
                expected += [(seen[-1], None, round((now - seen[-1]) / step) - 1)] * (now - seen[-1] > 25 * 3600)
                assert [(gap.start, gap.end, gap.missing) for gap in importer.gaps(db, importer.deployments(db), a, now)] == expected


def rhythm_of(times):
    """The median distance of some readings."""
    steps = sorted(after - before for before, after in zip(times, times[1:]))
    return steps[len(steps) // 2]


def case(place, name, unit=UNIT):
    """A file of tests/cases where a unit's readings lie."""
    with open(os.path.join(CASES, name), "rb") as file:
        text = file.read().decode()
    place.readings(text, unit=text.split("\t")[0])
    place.run(now=2e9)
    return text.split("\t")[0]


def test_seconds_of_jitter_decide_nothing_about_gaps(place):
    unit = case(place, "jitter-gaps.tsv")
    first = place.ask("SELECT min(ts) FROM co2_readings")[0][0] // 86400 * 86400
    with importer.open_db(place.archive.db) as db:
        found = importer.gaps(db, importer.deployments(db), 0, first + 86400 - 1)
        assert [(time.strftime("%H:%M", time.gmtime(gap.start)), time.strftime("%H:%M", time.gmtime(gap.end)), gap.missing)
                for gap in found] == [("05:30", "06:30", 1), ("11:30", "13:00", 2)]
        edges = list(range(first, first + 86401, 1800))
        columns = importer.buckets(db, ["co2"], [[(unit, 0, importer.FOREVER)]], edges)["co2"][0]
        assert [n for n, bucket in enumerate(columns) if bucket is None] == [12, 24, 25]
        assert not any(bucket.held for bucket in columns if bucket)
        edges = list(range(first, first + 86401, 600))
        columns = importer.buckets(db, ["co2"], [[(unit, 0, importer.FOREVER)]], edges)["co2"][0]
        blank = {n * 600 for n, bucket in enumerate(columns) if bucket is None}
        assert {6 * 3600, 12 * 3600, 12 * 3600 + 1800} < blank and 3 * 3600 + 600 not in blank
        assert columns[19].held and columns[19]._replace(held=False, rows=1) == columns[18]
        assert sum(bucket.rows for bucket in columns if bucket) == 45


def test_a_sensor_that_died_is_told_though_readings_come(place):
    unit = case(place, "dead-sensor.tsv")
    now = 1583539200                                            # 2020-03-07
    place.put("var/pings/pings-0000.tsv", "".join(
        "2020-03-%02dT03:15:00.000000\t%s\tn\t8\t-97\n" % (day, unit) for day in range(1, 7)))
    place.run(now=now)
    with importer.open_db(place.archive.db) as db:
        (state,) = importer.fleet_state(db, now)
        assert (state.verdict, state.level, state.why) == (
            "sensor", "warning", "readings come, but no usable CO2 since 2020-03-04 00:00 UTC")
        (told,) = importer.problems(db, place.archive, now)
        assert told.text == "no site (%s): readings come, but no usable CO2 since 2020-03-04 00:00 UTC" % state.nickname
        assert importer.fleet_state(db, now - 3 * 86400)[0].verdict == "ok"


BEGIN = 1_567_296_000                                           # 2019-09-01T00:00:00Z


def measured(times, unit=UNIT, temp="4.5"):
    """Lines of readings at these times."""
    return "".join("%s\tn\t%s\t%s\t0\t%s\n" % (
        unit, time.strftime("%Y-%m-%d\t%H:%M:%S", time.gmtime(ts)), temp, "\t".join(["%d" % (400 + ts // 600 % 7)] * 10)) for ts in times)


def called(times, unit=UNIT):
    """Lines of pings at these times."""
    return "".join("%s.000000\t%s\tn\t8\t-90\n" % (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ts)), unit) for ts in times)


def found_gaps(place, a, now):
    """The gaps of all units: hours since BEGIN from and to, missing readings, state."""
    with importer.open_db(place.archive.db) as db:
        return [((gap.start - BEGIN) / 3600, gap.end and (gap.end - BEGIN) / 3600, gap.missing, gap.state)
                for gap in importer.gaps(db, importer.deployments(db), a, now)]


@pytest.mark.parametrize("before, after", [(30, 10), (10, 30), (30, 120), (30, 60), (240, 10), (10, 360)])
def test_where_the_interval_was_changed_only_what_is_missing_is_a_gap(place, before, after):
    changed, end = BEGIN + 20 * 86400, BEGIN + 40 * 86400
    times = [*range(BEGIN, changed, before * 60), *range(changed, end, after * 60)]
    missing = [5 * 86400, 5 * 86400 + before * 60, 35 * 86400]
    place.readings(measured(sorted(set(times) - {BEGIN + seconds for seconds in missing})))
    place.run(now=end)
    step = [before / 60, after / 60]
    assert found_gaps(place, 0, end) == [(120 - step[0], 120 + 2 * step[0], 2, "lost"), (840 - step[1], 840 + step[1], 1, "lost")]
    with importer.open_db(place.archive.db) as db:
        spans, edges = [(UNIT, BEGIN, end)], list(range(BEGIN, end + 1, 600))
        missing_in = importer.missing(db, importer.deployments(db), spans, edges, end)
        assert {j * 600: n for j, n in enumerate(missing_in) if n} == dict.fromkeys(missing, 1)
        columns = importer.buckets(db, ["co2"], [spans], edges)["co2"][0]
        assert sum(bucket.rows for bucket in columns if bucket) == len(times) - 3
        blank = [j for j, bucket in enumerate(columns) if bucket is None and columns[j + 1:] != [None] * (len(columns) - j - 1)]
        gaps = [(120 * 6 - before // 10 + 1, 120 * 6 + before // 5), (840 * 6 - after // 10 + 1, 840 * 6 + after // 10)]
        assert blank == [j for first, last in gaps for j in range(first, last)]


def test_a_reading_that_comes_seconds_too_late_leaves_no_hole_in_a_column(place):
    times = [BEGIN + n * 1800 + (-9 if n % 2 else 9) for n in range(145) if n != 48]
    place.readings(measured(times))
    place.run(now=BEGIN + 4 * 86400)
    with importer.open_db(place.archive.db) as db:
        edges = list(range(BEGIN, BEGIN + 3 * 86400 + 1801, 1800))
        columns = importer.buckets(db, ["co2"], [[(UNIT, 0, importer.FOREVER)]], edges)["co2"][0]
    assert [j for j, bucket in enumerate(columns) if bucket is None] == [47]
    assert [j for j, bucket in enumerate(columns) if bucket and bucket.held] == [j for j in range(1, 144, 2) if j != 47]
    assert sum(bucket.rows for bucket in columns if bucket) == len(times)


def test_an_open_gap_says_when_lines_came_that_could_not_be_read(place):
    end = BEGIN + 12 * 86400
    lines = [*range(BEGIN, BEGIN + 10 * 86400, 1800)]
    place.readings(measured(lines) + measured(range(lines[-1] + 1800, end, 1800), temp="12345"))
    place.put("var/pings/pings-0000.tsv", called(range(BEGIN + 11700, end, 86400)))
    place.run(now=end)
    assert found_gaps(place, 0, end) == [(239.5, None, 96, "rejected")]
    with importer.open_db(place.archive.db) as db:
        assert [state.verdict for state in importer.fleet_state(db, end)] == ["refused"]
        for days in (6, 9.9):                                   # as it was then: these lines had not come
            assert [state.verdict for state in importer.fleet_state(db, BEGIN + int(days * 86400))] == ["ok"]


def test_what_is_missing_since_the_begin_of_a_stay_is_a_gap(place):
    end = BEGIN + 20 * 86400
    late, silent, unheard, early = ["co2unit-00000000000%d" % n for n in range(1, 5)]
    place.readings(measured(range(BEGIN + 5 * 86400, end, 3600), late), late)
    place.readings(measured(range(BEGIN + 3600, end, 3600), early), early)
    place.deployments("unit_id\tsite\tdeploy_date\n" + "".join("%s\ts\t2019-09-01\n" % unit for unit in (late, silent, unheard, early)))
    place.put("var/pings/pings-0000.tsv", called(range(BEGIN + 11700, end, 86400), silent))
    place.run(now=end)
    assert found_gaps(place, BEGIN, end) == [(0, 120, 119, "lost"), (0, None, 959, "silent"), (0, None, 959, "waiting")]
    assert found_gaps(place, BEGIN + 5 * 86400, end)[0][1] is None


@pytest.mark.parametrize("minutes", [(195, 197), (195, 210, 240), (195, 1430), (195, 915)])
def test_a_unit_that_calls_more_than_once_a_night_is_late_after_a_night_without_a_call(place, minutes):
    end = BEGIN + 30 * 86400
    place.put("var/pings/pings-0000.tsv", called(sorted(ts + 60 * late for ts in range(BEGIN, end, 86400) for late in minutes)))
    place.readings(measured(range(BEGIN, end + 2 * 86400, 1800)))
    place.run(now=end)
    last = end - 86400 + 60 * minutes[-1]
    with importer.open_db(place.archive.db) as db:
        verdicts = [importer.fleet_state(db, last + hours * 3600)[0].verdict for hours in (5, 12, 24, 34)]
    assert verdicts[0] == verdicts[1] == "ok" and verdicts[3] == "late"


def test_rows_of_a_unit_at_a_site_that_overlap_count_nothing_twice(place):
    place.readings(LINE)
    rows = ["2019-01-01\t2019-06-01", "2019-03-01\t2019-04-01", "2019-05-01\t2019-09-01", "2019-10-01\t", "2019-11-01\t2019-12-01"]
    place.deployments("unit_id\tsite\tstart_ts\tend_ts\n" + "".join("%s\ts\t%s\n" % (UNIT, row) for row in rows))
    place.run()
    with importer.open_db(place.archive.db) as db:
        stays = [[ts < importer.FOREVER and time.strftime("%m-%d", time.gmtime(ts)) for ts in (stay.since, stay.until)]
                 for stay in importer.deployments(db)]
    assert stays == [["01-01", "06-01"], ["06-01", "09-01"], ["10-01", False]]


def test_days_with_pings_are_those_of_the_columns_not_those_of_utc(place):
    midnight = BEGIN - 5 * 3600                                 # of a zone west of Greenwich
    place.put("var/pings/pings-0000.tsv", called(sorted(
        midnight + 86400 * day + hours * 3600 for day in range(7) for hours in (1, 20, 23))))
    place.run()
    with importer.open_db(place.archive.db) as db:
        for width in (1, 7):
            edges = list(range(midnight, midnight + 8 * 86400, width * 86400))
            (columns,) = importer.pings(db, [[(UNIT, 0, importer.FOREVER)]], edges)
            assert [(pings.n, pings.days) for pings in columns if pings] == [(3 * width, width)] * (7 // width)


def test_the_newest_value_is_old_news_when_newer_readings_have_none(place):
    place.readings(measured([BEGIN]) + measured(range(BEGIN + 1800, BEGIN + 7200, 1800), temp="None"))
    place.run()
    with importer.open_db(place.archive.db) as db:
        told = [importer.last_value(db, what, [(UNIT, 0, BEGIN + seconds)]) for what in ("temp", "co2") for seconds in (3700, 7200)]
    assert told == [(BEGIN, 4.5, 0), (BEGIN, 4.5, 1), (BEGIN + 3600, 400 + (BEGIN + 3600) // 600 % 7, 0), (BEGIN + 5400, 400 + (BEGIN + 5400) // 600 % 7, 0)]


def test_gaps_of_a_long_range_are_those_of_the_readings(place):
    """Full months are passed over, days that are not full are looked into; a last day that is full is no gap up to now."""
    chance, begin, lines, missing = random.Random(1), 1_525_132_800, [], {4000, 4001, 4002, 4500, 4501, 8050, 8051, 8052, 8053}
    missing |= set(range(6000, 6000 + 48 * 40))                 # a hole of more than a month
    for n in set(range(48 * 200)) - missing:
        lines.append("%s\tn\t%s\t4.5\t0\t%s\n" % (UNIT, time.strftime("%Y-%m-%d\t%H:%M:%S", time.gmtime(begin + 1800 * n)),
                                                 "\t".join(["%d" % chance.choice([400, 410])] * 10)))
    place.readings("".join(lines))
    now = begin + 200 * 86400 + 900
    place.run(now=now)
    with importer.open_db(place.archive.db) as db:
        stays = importer.deployments(db)
        for a in (begin - 5, begin + 86400 * 61 + 77, begin + 86400 * 100):
            found = [((gap.start - begin) // 1800 + 1, gap.missing) for gap in importer.gaps(db, stays, a, now)]
            assert found == [one for one in ((4000, 3), (4500, 2), (6000, 1920), (8050, 4)) if begin + one[0] * 1800 >= a]


def test_limits_of_the_quality_rules_come_from_the_configuration(place, tmp_path):
    config = tmp_path / "co2d.conf"
    config.write_text("[co2d]\ndata_dir = remote_data\nvar_dir = var\n[quality]\nco2_low = 405\ntemp_high = 4\n")
    archive = importer.load_settings(str(config), {}).archive()
    place.readings(LINE)
    importer.import_new(archive, now=NOW)
    assert place.ask("SELECT co2, qc FROM co2_readings") == [(407.5, importer.QC_SOME_CO2 | importer.QC_TEMP_RANGE)]
    for text, complaint in (("spikes = 3", "unknown setting 'spikes'$"), ("spike = much", ":2: spike: .much. is not a number")):
        config.write_text("[quality]\n%s\n" % text)
        with pytest.raises(importer.Unusable, match=complaint):
            importer.load_settings(str(config), {})

# -- small inputs on which an earlier version failed; tests/cases/README.md says what is right ---------------------------



def test_a_field_that_is_too_long_is_one_rejected_line_and_stops_nothing(place):
    with open(os.path.join(CASES, "field-too-long.tsv"), encoding="utf-8") as file:
        place.readings(file.read())
    place.readings(LINE, number=1)
    assert place.run().rows["readings"] == 3
    assert [reason for _, _, reason in place.rejects()] == ["field 5 is not a number", "field 6 is not a number"]


@pytest.mark.parametrize("lines", [1, 300])
def test_whatever_fails_in_one_source_is_recorded_with_it_and_the_others_are_imported(place, monkeypatch, lines):
    path = place.readings("".join(reading(30 * n) for n in range(lines)) + "broken\n")
    place.readings(LINE.replace("08:30:00", "09:00:00"), number=1)

    def fail(raw):
        if raw == b"broken\n":
            raise KeyError("a bug")
        return raw.decode()[:-1]

    monkeypatch.setattr(importer, "decode", fail)
    summary = place.run()
    (where, why), = summary.unreadable
    assert where == "data/%s/data/readings/readings-0000.tsv" % UNIT and why.startswith("KeyError('a bug') at test_importer.py:")
    assert place.ask("SELECT count(*) FROM co2_readings") == [(1,)]
    monkeypatch.undo()
    assert place.run().rows["readings"] == lines and place.dump() == place.rebuilt()


def test_a_table_that_is_a_link_is_not_read_and_that_is_told(place):
    table = place.deployments("unit_id\tsite\n")
    os.rename(table, table + ".there")
    os.symlink(table + ".there", table)
    why = "a link, which is not followed; it is tried again each time"
    assert place.run().unreadable == [("data/manual/deploy_durations_tiered.tsv", why)]


# -- a database that cannot be read -------------------------------------------------------------------------------------


def unreadable(place, kind):
    """Make the database one that cannot be read."""
    db = place.archive.db
    if kind == "of another schema":
        with contextlib.closing(sqlite3.connect(db)) as other:
            other.execute("PRAGMA user_version = 1")
    elif kind == "truncated":
        os.truncate(db, 30000)
    elif kind == "text":
        with open(db, "w") as file:
            file.write("not a database " * 100)
    elif kind == "damaged":
        size = os.path.getsize(db)
        with open(db, "r+b") as file:
            file.seek(8192)
            file.write(b"\xaa" * (size - 8192))
    elif kind == "without a table":
        with contextlib.closing(sqlite3.connect(db)) as other:
            other.execute("DROP TABLE pings")
    elif kind == "below a file":
        return os.path.join(db, "db.sqlite3")
    elif kind == "a directory":
        os.unlink(db)
        os.mkdir(db)
    return db


@pytest.mark.parametrize("kind", ["of another schema", "truncated", "text", "damaged", "without a table", "below a file", "a directory"])
def test_a_database_that_cannot_be_read_is_told_with_its_path_and_is_not_missing(place, kind):
    place.readings("".join(map(reading, range(3000))))
    place.run()
    db = unreadable(place, kind)
    with pytest.raises(importer.Unusable) as refused:
        with importer.open_db(db) as reader:
            for table in ("co2_readings", "pings", "sources"):
                reader.execute("SELECT * FROM %s" % table).fetchall()
    assert not isinstance(refused.value, importer.NoDatabase)
    assert str(refused.value).startswith(db + " cannot be read")
    if kind != "below a file":
        assert "importer rebuild makes it anew" in str(refused.value) or kind == "a directory"


def test_a_directory_that_may_not_be_entered_is_not_a_missing_database(place, monkeypatch):
    def statvfs(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "statvfs", statvfs)
    with pytest.raises(importer.Unusable, match="cannot be read: Permission denied$") as refused, importer.open_db(place.archive.db):
        pass
    assert type(refused.value) is importer.Unusable


@pytest.mark.parametrize("text, utc", [
    ("2019-09-20", "2019-09-20T00:00:00"), ("2019-09-20T14:00+02:00", "2019-09-20T12:00:00"),
    ("2019-09-20 1:30:15+02:00", "2019-09-19T23:30:15"), ("2019-09-20T12:00:00.5-03:30", "2019-09-20T15:30:00"),
    ("2019-09-20T12:00Z", "2019-09-20T12:00:00"), ("2019-09-20T12:00-00:00", "2019-09-20T12:00:00")])
def test_an_instant_may_say_its_zone(text, utc):
    assert importer.seqfile.utc(importer.parse_instant(text, "since")) == utc


@pytest.mark.parametrize("text", ["2019-09-20+02:00", "2019-09-20T12:00+2", "2019-09-20T12:00+25:00", "2019-09-20T12:00 02:00"])
def test_an_instant_with_half_a_zone_is_refused(text):
    with pytest.raises(importer.Rejected, match="since is no ISO date"):
        importer.parse_instant(text, "since")


CALLED = {"a*": {"1"}, "ab": {"2"}, "x, y": {"3"}, "x": {"4"}, "[0]*": {"5"}, "North": {"6"}}


@pytest.mark.parametrize("text, found", [
    ("a*", ["1"]), ("x, y", ["3"]), ("x,ab", ["4", "2"]), ("[0]*", ["5"]), ("*b", ["2"]), (" x ", ["4"]), ("?*", list("123456"))])
def test_a_name_is_itself_before_it_is_a_list_or_a_pattern(text, found):
    assert importer.find_names("site", CALLED, text) == found


@pytest.mark.parametrize("text, nearest", [("NORTH", "North"), ("zzz", ".*"), ("AB", "ab")])
def test_of_a_name_that_nothing_has_the_nearest_are_told_in_any_case(text, nearest):
    with pytest.raises(importer.UnknownName, match="no site is called '%s'; the nearest names are %s" % (text, nearest)):
        importer.find_names("site", CALLED, text)


def test_each_of_the_nearest_names_is_told_once():
    assert str(importer.unknown("site", "nroth", ["north", "north", "north"])) == (
        "no site is called 'nroth'; the nearest names are north")


def test_days_of_long_outages_hide_no_short_gap(place):
    """Two days with readings from 20:00 to 02:30 only, and of these some are missing."""
    lines = []
    for day in range(5):
        for half in range(48):
            missing = half in (2, 44) or 5 < half < 40
            if not (day in (2, 3) and missing):
                lines.append(reading(1440 * day + 30 * half))
    place.readings("".join(lines))
    place.run()
    with importer.open_db(place.archive.db) as db:
        found = importer.gaps(db, importer.deployments(db), 0, max(place.ask("SELECT max(ts) FROM co2_readings")[0]))
    assert [(gap.start % 86400 // 1800, gap.missing) for gap in found] == [(1, 1), (5, 34), (43, 1)] * 2


def test_nothing_is_held_over_what_is_missing_of_one_of_two_units(place):
    """One unit measures every 6 h, another every 10 min; of this 5 h are missing."""
    other = "co2unit-30aea42a50bd"
    place.readings("".join(reading(360 * n, 409) for n in range(12)))
    place.readings("".join(reading(10 * n, 431, other) for n in range(400) if not 207 <= n < 237), other)
    place.run()
    spans = [(UNIT, 0, importer.FOREVER), (other, 0, importer.FOREVER)]
    begin = place.ask("SELECT min(ts) FROM co2_readings")[0][0]
    with importer.open_db(place.archive.db) as db:
        columns = importer.buckets(db, ["co2"], [spans], [begin + 1800 * n for n in range(100)])["co2"][0]
    assert [j for j, bucket in enumerate(columns) if bucket is None] == [69, 70, 71, *range(73, 79)]
