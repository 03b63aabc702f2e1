"""The numbers of every page, compared with a reading of the text files that shares no code with the importer.

An archive of a fleet over two months, with the dirt of which the documents say what it is worth, is imported and drawn in
many widths, zones and spans; short columns come from readings, long ones from rollups. The expected numbers are computed
from the lines themselves: the mean of the usable values of ten, a flag for each quantity, deployments to the second.
"""

from __future__ import annotations

import glob
import json
import os
import re
from bisect import bisect_left
from collections import Counter
from datetime import datetime, timezone
from typing import Any, Iterator, NamedTuple, Optional

import pytest

import fleet
import importer
import plot_ascii

HOUR, DAY = 3600, 86400
NOW = int(fleet.END.replace(tzinfo=timezone.utc).timestamp())
DIRT = ("clock_1970", "repeat", "crlf", "nickname_none", "none_value", "none_temp", "all_none", "more_fields", "future", "temp_85",
        "co2_limits", "co2_zero", "spike", "flat", "ping_nickname_none", "ping_no_fraction")
ERRORS = {"Uncaught exception": "uncaught", "watchdog": "watchdog", "Signal quality": "signal", "backoff": "backoff",
          "transmitting": "transmit"}


class Value(NamedTuple):
    """One quantity of one reading."""
    ts: int
    value: Optional[float]
    usable: bool


class Stay(NamedTuple):
    unit: str
    nickname: str
    site: str
    status: str
    since: int
    until: int


class Text(NamedTuple):
    """What the files say."""
    db: str
    stays: list[Stay]
    values: dict[str, dict[str, list[Value]]]           # quantity -> unit -> in order of time
    pings: dict[str, list[tuple[int, Optional[int]]]]   # unit -> time, dBm
    names: dict[str, str]                               # unit -> nickname
    entries: list[tuple[str, int, str, str]]            # unit, time, level, message
    sites: dict[tuple[str, str], list[Value]]           # (quantity, site) -> what `at_site` has found

    def of(self, what: str, site: str, a: int, b: int) -> list[Value]:
        """The values of a site in a range."""
        if (what, site) not in self.sites:
            self.sites[what, site] = sorted(self.at_site(what, site))
        values = self.sites[what, site]
        return values[bisect_left(values, (a,)):bisect_left(values, (b,))]

    def at_site(self, what: str, site: str) -> Iterator[Value]:
        """The values of the units that stand for a site: who is deployed; others only while nobody is."""
        stays = [stay for stay in self.stays if stay.site == site]
        units = {stay.unit for stay in stays} or {unit for unit, name in self.names.items() if name == site}
        for unit in units:
            for value in self.values[what].get(unit, []):
                there = [stay for stay in stays if stay.since <= value.ts < stay.until]
                deployed = {stay.unit for stay in there if stay.status == "deployed"}
                if not stays or unit in (deployed or {stay.unit for stay in there}):
                    yield value


def seconds(text: str) -> int:
    return int(datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(timezone.utc).timestamp())


def utc(text: str) -> int:
    return seconds(text[:19] + "+00:00")


def lines_of(pattern: str) -> Iterator[list[str]]:
    for path in sorted(glob.glob(pattern)):
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                yield line.rstrip("\r\n").split("\t")


def read_unit(root: str, unit: str) -> tuple[list[Value], list[Value]]:
    """CO2 and temperatures of a unit."""
    rows = {tuple(fields[2:]) for fields in lines_of("%s/remote_data/%s/data/readings/*.tsv" % (root, unit))}
    co2, temp = [], []
    for day, clock, degrees, _, *values in sorted(rows):
        ts = utc(day + "T" + clock)
        if not 2015 <= int(day[:4]) or ts > NOW + DAY:
            continue
        there = [float(value) for value in values[:10] if value != "None"]
        good = [value for value in there if 200 <= value <= 40000]
        mean = sum(good) / len(good) if good else None
        co2.append(Value(ts, mean, len(good) >= 5))
        warm = None if degrees == "None" else float(degrees)
        temp.append(Value(ts, warm, warm is not None and -55 <= warm <= 84.9))
    return judged(co2), temp


def judged(values: list[Value]) -> list[Value]:
    """Without trust in spikes (300 ppm off both neighbours, within 4 h) and in flat lines of 6 h."""
    bad = set()
    known = [value for value in values if value.usable]
    for before, value, after in zip(known, known[1:], known[2:]):
        near = value.ts - before.ts <= 4 * HOUR and after.ts - value.ts <= 4 * HOUR
        off = [value.value - before.value, value.value - after.value]
        if near and (min(off) > 300 or max(off) < -300):
            bad.add(value.ts)
    start = 0
    for end in range(1, len(known) + 1):
        if end == len(known) or known[end].value != known[start].value:
            if known[end - 1].ts - known[start].ts >= 6 * HOUR:
                bad.update(value.ts for value in known[start:end])
            start = end
    return [value._replace(usable=value.usable and value.ts not in bad) for value in values]


def read_text(root: str, db: str) -> Text:
    units = sorted(os.path.basename(path) for path in glob.glob(root + "/remote_data/co2unit-*"))
    stays = []
    for fields in lines_of(root + "/remote_data/manual/*.tsv"):
        if fields[0].startswith("co2unit-"):
            unit, nickname, site, _, status, since, until = fields[:7]
            stays.append(Stay(unit, nickname, site, status, utc(since + "T00:00:00"[len(since) - 10:]) if since else 0,
                              utc(until + "T00:00:00"[len(until) - 10:]) if until else 1 << 40))
    values: dict[str, dict[str, list[Value]]] = {"co2": {}, "temp": {}}
    for unit in units:
        values["co2"][unit], values["temp"][unit] = read_unit(root, unit)
    names = {}
    pings: dict[str, list[tuple[int, Optional[int]]]] = {}
    for pattern in (root + "/var/pings/*", root + "/remote_data/server-*/var/pings/*"):
        for when, unit, nickname, _, dbm in lines_of(pattern):
            pings.setdefault(unit, []).append((utc(when), None if dbm == "None" else int(dbm)))
            if nickname != "None":
                names[unit] = nickname
    entries = []
    for unit in units:
        lines = [fields[0] for fields in lines_of("%s/remote_data/%s/errors/*.txt" % (root, unit))]
        for line, following in zip(lines, lines[1:] + [""]):
            found = re.match(r"----- (?:([\d-]+) ([\d:]+)|\(([\d, ]+)\)) ?(INFO|WARN|EXC)? ?(.*)", line)
            if found:
                day, clock, numbers, level, message = found.groups()
                ts = utc("%sT%s" % (day, clock)) if day else utc("%04d-%02d-%02dT%02d:%02d:%02d" % tuple(map(int, numbers.split(",")[:6])))
                entries.append((unit, ts, level or "", message or following))
    return Text(db, stays, values, {unit: sorted(rows) for unit, rows in pings.items()}, names, entries, {})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Twenty units, sixty days."""
    root = str(tmp_path_factory.mktemp("truth"))
    fleet.make_archive(root, units=20, days=60, seed=3, dirt=DIRT)
    db = root + "/var/db.sqlite3"
    importer.import_new(importer.Archive((root + "/remote_data",), root + "/var", db), now=NOW)
    return read_text(root, db)


ASKED = [(40, "UTC", 14), (80, "Europe/Oslo", 14), (133, "America/St_Johns", 60), (250, "UTC", 2), (80, "Asia/Kathmandu", 0),
         (100, "UTC", 6)]


def drawn(text: Text, view: str, cells: int, zone: str, days: int, **options: Any) -> dict[str, Any]:
    """A page as its JSON has it."""
    try:
        plot_ascii.Zone(zone)
    except ValueError:
        pytest.skip("no time zones here")
    o = plot_ascii.Options(db=text.db, now=NOW, rows=None, width=cells, tz=zone, recent_days=days, **options)
    return json.loads(plot_ascii.to_json(plot_ascii.draw(view, o)))


def columns_of(page: dict[str, Any], field: str) -> list[tuple[int, int]]:
    begins = [seconds(at) for at in page["columns"][field]]
    return list(zip(begins, [*begins[1:], NOW]))


def about(value: Optional[float]) -> Any:
    return None if value is None else pytest.approx(value, abs=0.06)


def mean(values: list[Value]) -> Optional[float]:
    usable = [value.value for value in values if value.usable]
    return sum(usable) / len(usable) if usable else None


@pytest.mark.parametrize("cells, zone, days", ASKED)
def test_the_fleet_has_the_means_extremes_and_counts_of_the_text(text: Text, cells: int, zone: str, days: int) -> None:
    page = drawn(text, "co2", cells, zone, days)
    assert len(page["rows"]) >= 18
    for row in page["rows"]:
        for what, newest in (("co2", "ppm"), ("temp", "celsius")):
            columns = columns_of(page, what)
            for got, (a, b) in zip(row[what], columns):
                assert got == about(mean(text.of(what, row["site"], a, b))), (row["site"], what, a)
            there = text.of(what, row["site"], columns[0][0], NOW)
            values = [value.value for value in there if value.value is not None]
            low, high = page[what + "_scale"]
            kind = "" if what == "co2" else "temp_"
            assert row[kind + "above"] == sum(value > high + 1e-9 for value in values), (row["site"], what)
            assert row[kind + "below"] == sum(value < low - 1e-9 for value in values), (row["site"], what)
            if what == "co2":
                assert [row["min"], row["max"]] == [about(min(values, default=None)), about(max(values, default=None))]
            last = [value for value in there if value.usable][-1:]
            assert [row[newest], row[newest + "_age"]] == ([about(last[0].value), NOW - last[0].ts] if last else [None, None])


@pytest.mark.parametrize("cells, zone, days", ASKED)
def test_a_site_in_detail_has_the_numbers_of_the_text_in_every_column(text: Text, cells: int, zone: str, days: int) -> None:
    for site in ("vj_re_sn_3", "vj_ko_sn_1", "is_ad_sn_1", "is_en_sn_1", "lab_desk"):
        page = drawn(text, "co2", cells, zone, days, site=site)
        for row in page["rows"]:
            a, b = seconds(row["from"]), min(seconds(row["to"]), NOW)
            for what in ("co2", "temp"):
                there = text.of(what, site, a, b)
                usable = [value.value for value in there if value.usable]
                assert row[what + "_n"] == len(usable), (site, what, row["from"])
                assert row[what + "_mean"] == about(mean(there))
                assert [row[what + "_min"], row[what + "_max"]] == [about(min(usable, default=None)), about(max(usable, default=None))]
                assert row[what + "_suspect"] == sum(value.value is not None for value in there) - len(usable)


@pytest.mark.parametrize("cells, zone, days", ASKED)
def test_pings_are_counted_where_the_unit_was(text: Text, cells: int, zone: str, days: int) -> None:
    page = drawn(text, "pings", cells, zone, days)
    columns = columns_of(page, "pings")
    got: Counter[tuple[str, int]] = Counter()
    for row in page["rows"]:
        for n, (a, _) in zip(row["pings"], columns):
            got[row["site"] or row["unit"], a] += n
    for site in {site for site, _ in got}:
        stays = [stay for stay in text.stays if stay.site == site]
        unplaced = [unit for unit, name in text.names.items() if name == site]
        for a, b in columns:
            times = [ts for stay in stays for ts, _ in text.pings.get(stay.unit, []) if max(a, stay.since) <= ts < min(b, stay.until)]
            times += [ts for unit in unplaced if not stays for ts, _ in text.pings[unit] if a <= ts < b]
            assert got[site, a] == len(times), (site, a)


def test_status_has_the_ages_and_newest_values_of_the_text(text: Text) -> None:
    page = drawn(text, "status", 160, "UTC", 14)
    assert len(page["rows"]) == 21
    for row in page["rows"]:
        unit = row["unit_id"]
        times = [ts for ts, _ in text.pings.get(unit, [])]
        readings = text.values["co2"].get(unit, [])
        assert row["ping_age"] == (NOW - times[-1] if times else None)
        assert row["data_age"] == (NOW - readings[-1].ts if readings else None), unit
        for what, newest in (("co2", "ppm"), ("temp", "celsius")):
            last = [value for value in text.values[what].get(unit, []) if value.usable][-1:]
            assert row[newest] == (about(last[0].value) if last else None)
        for n, (a, b) in zip(row["pings"], columns_of(page, "pings")):
            assert n == sum(a <= ts < b for ts in times)


@pytest.mark.parametrize("days", [2, 14, 60])
def test_signals_have_the_quartiles_of_the_text(text: Text, days: int) -> None:
    page = drawn(text, "signal", 80, "UTC", days)
    since = seconds(page["from"])
    for row in page["rows"]:
        heard = [dbm for ts, dbm in text.pings[row["unit_id"]] if since <= ts <= NOW and dbm is not None]
        order = sorted(heard)
        assert [row[name] for name in ("min", "p25", "median", "p75", "max")] == [
            order[min(len(order) * part // 4, len(order) - 1)] for part in range(5)]
        assert (row["last"], row["n"]) == (heard[-1], len(heard))


def kind_of(message: str) -> str:
    return ([kind for words, kind in ERRORS.items() if words in message] or ["other"])[-1]


@pytest.mark.parametrize("cells, zone, days", ASKED)
def test_errors_are_counted_by_type_and_weight(text: Text, cells: int, zone: str, days: int) -> None:
    page = drawn(text, "errors", cells, zone, days)
    columns = columns_of(page, "serious")
    for row in page["rows"]:
        own = [(ts, level, kind_of(message)) for unit, ts, level, message in text.entries
               if unit == row["unit_id"] and columns[0][0] <= ts <= NOW]
        kinds = Counter(kind for _, _, kind in own)
        assert {kind: row[kind] or 0 for kind in (*ERRORS.values(), "other")} == {kind: kinds[kind] for kind in (*ERRORS.values(), "other")}
        assert row["serious"] == [sum(a <= ts < b and level != "INFO" for ts, level, _ in own) for a, b in columns]


@pytest.mark.parametrize("days", [14, 60])
def test_gaps_are_the_stretches_that_miss_a_reading(text: Text, days: int) -> None:
    page = drawn(text, "gaps", 80, "UTC", days)
    got = {(row["unit_id"], row["from"], row["to"], row["missing"]) for row in page["rows"] if row["to"]}
    since = seconds(page["from"])
    expected = set()
    for unit, values in text.values["co2"].items():
        times = sorted({value.ts for value in values})
        steps = sorted(after - before for before, after in zip(times[-40:], times[-39:]))
        rhythm = steps[len(steps) // 2]
        for before, after in zip(times, times[1:]):
            if after - before > 1.5 * rhythm and after > since:
                at = [datetime.fromtimestamp(ts, timezone.utc).strftime("%Y-%m-%dT%H:%MZ") for ts in (before, after)]
                expected.add((unit, *at, round((after - before) / rhythm) - 1))
    assert got == expected
