"""The pages, as pictures: drawn from archives of a few units whose readings are known, through the importer."""

from __future__ import annotations

import contextlib
import html.parser
import json
import math
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import unicodedata
from datetime import datetime, timedelta
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

import pytest

import importer
import plot_ascii
from importer import Problem
from plot_ascii import Options, Scale, Zone, clean, cut, width

SCRIPT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "plot_ascii.py")
START = datetime(2019, 9, 12)
NOW = datetime(2019, 9, 26, 12)
SIZES = [(40, 10), (60, 15), (80, 24), (81, 25), (113, 33), (132, 43), (250, 80)]


def seconds(when: datetime) -> int:
    return int((when - datetime(1970, 1, 1)).total_seconds())


class Unit(NamedTuple):
    """A unit with all that it has sent."""
    number: int
    readings: Iterable[Tuple[datetime, int, float]] = ()                # time, ppm, degC
    pings: Iterable[Tuple[datetime, Optional[int]]] = ()                # time, dBm
    errors: str = ""

    @property
    def id(self) -> str:
        return "co2unit-%012d" % self.number

    @property
    def nickname(self) -> str:
        return "unit-%02d" % self.number


def every(minutes: int, start: datetime, end: datetime) -> List[datetime]:
    return [start + timedelta(minutes=minutes * i) for i in range(int((end - start).total_seconds() / 60 // minutes))]


def steady(start: datetime = START, end: datetime = NOW, ppm: Callable[[float], float] = lambda days: 420, minutes: int = 30,
           temp: Callable[[float], float] = lambda days: 5.0) -> List[Tuple[datetime, int, float]]:
    """A reading every so often, of a function of the days since the start."""
    days = [(when, (when - start).total_seconds() / 86400) for when in every(minutes, start, end)]
    return [(when, round(ppm(at)) + i % 2, round(temp(at), 1)) for i, (when, at) in enumerate(days)]


def daily(start: datetime = START, end: datetime = NOW, dbm: Optional[int] = -90) -> List[Tuple[datetime, Optional[int]]]:
    """A ping at 03:15 each day."""
    first = start.replace(hour=3, minute=15) + timedelta(days=start.hour > 3)
    return [(when, dbm) for when in every(1440, first, end + timedelta(days=1)) if when < end]


def archive(directory: str, units: List[Unit], deployments: str = "", now: datetime = NOW) -> str:
    """Text files imported into a database: its path. Deployments: lines of number, site, tier, status, from, to."""
    data, var = os.path.join(directory, "remote_data"), os.path.join(directory, "var")
    for unit in units:
        for folder, name, text in (
                ("data/readings", "readings-0000.tsv", "".join("%s\t%s\t%s\t%.1f\t0\t%s\n" % (
                    unit.id, unit.nickname, when.strftime("%Y-%m-%d\t%H:%M:%S"), temp, "\t".join(["%d" % ppm] * 10))
                    for when, ppm, temp in unit.readings)), ("errors", "errors-0000.txt", unit.errors)):
            write(os.path.join(data, unit.id, folder, name), text)
    rows = sorted((when, unit.id, unit.nickname, dbm) for unit in units for when, dbm in unit.pings)
    write(os.path.join(var, "pings", "pings-0000.tsv"), "".join("%s.000000\t%s\t%s\t%s\t%s\n" % (
        when.isoformat(), unit, nick, "None" if dbm is None else 8, dbm) for when, unit, nick, dbm in rows))
    if deployments:
        table = "unit_id\tnickname\tsite\ttier\tstatus\tstart_ts\tend_ts\tnote\n"
        for line in deployments.strip().splitlines():
            number, site, tier, status, start, end, *_ = [*line.split(), "", ""]
            table += "co2unit-%012d\tunit-%02d\t%s\t\n" % (int(number), int(number), "\t".join([site, tier, status, start, end]))
        write(os.path.join(data, "manual", "deploy_durations_tiered.tsv"), table)
    db = os.path.join(var, "db.sqlite3")
    importer.import_new(importer.Archive((data,), var, db), now=seconds(now))
    return db


def write(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if text:
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)


def text_of(view: str, db: str, now: datetime = NOW, rows: Optional[int] = 23, **options: object) -> str:
    return plot_ascii.to_text(page_of(view, db, now, rows, **options).lines)


def page_of(view: str, db: str, now: datetime = NOW, rows: Optional[int] = None, **options: object) -> plot_ascii.Page:
    return plot_ascii.draw(view, Options(db=db, now=seconds(now), **{"rows": rows, **options}))


def records(page: plot_ascii.Page) -> List[Dict[str, object]]:
    return json.loads(plot_ascii.to_json(page))["rows"]


def picture(text: str) -> str:
    """A literal page without the indent and the first line feed."""
    return "".join(line[4:] + "\n" for line in text.split("\n")[1:-1])


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two weeks of four sites: one rises; one has three days missing; one has a spike; one has been silent for four days."""
    quiet, spike = NOW - timedelta(days=4), datetime(2019, 9, 20, 6)
    spiked = [(when, 10000 if when == spike else ppm, temp) for when, ppm, temp in steady(ppm=lambda days: 440 + 20 * math.sin(days))]
    gap = [row for row in steady(ppm=lambda days: 500 - 5 * days) if not 16 <= row[0].day < 19]
    errors = "----- 2019-09-25 10:55:57 EXC Uncaught exception\nTraceback\nOSError: 5\n----- 2019-09-24 09:00:00 WARN Signal quality 99\n"
    return archive(str(tmp_path_factory.mktemp("four")), [
        Unit(1, steady(ppm=lambda days: 400 + 8 * days, temp=lambda days: 10 - days), daily(dbm=-80)),
        Unit(2, gap, daily(dbm=-104)), Unit(3, spiked, daily(dbm=-95), errors), Unit(4, steady(end=quiet), daily(end=quiet)), Unit(5)],
        "1 vj_re_sn_1 30 deployed 2019-09-01\n2 vj_re_sn_2 30 deployed 2019-09-01\n3 Vadsø 20 deployed 2019-09-01\n"
        "4 東京_ref 10 deployed 2019-09-01\n5 pa_07 10 deployed 2019-09-20")


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_fleet(four: str) -> None:
    assert text_of("co2", four, width=70) == picture("""
    5 sites · 13 Sep 00:00 – 26 Sep 2019 12:00 UTC · CO₂ 400–520 ppm
    site       ╷13╷16╷19╷22    ppm    range  ╷13╷16╷19╷22      °C !
    vj_re_sn_1 ▁▂▂▃▃▄▅▅▆▆▇▇██  517  408–517  ██▇▇▆▅▅▄▄▃▃▂▁▁  -4.5
    vj_re_sn_2 ▇▆▆   ▅▄▄▄▃▃▃▂  429  428–496  ▆▆▆   ▆▆▆▆▆▆▆▆   5.0
    Vadsø      ▄▄▃▂▂▃▄▄▃▂▂▃▄▅  460  420–10k  ▆▆▆▆▆▆▆▆▆▆▆▆▆▆   5.0 ▲
    pa_07
    東京_ref   ▂▂▂▂▂▂▂▂▂▂           420–421  ▆▆▆▆▆▆▆▆▆▆           L
    col = 1 d (CO₂)  1 d (T)  blank = no data  L late  ▲ off scale
    """)


def test_fleet_in_ascii(four: str) -> None:
    assert text_of("co2", four, width=70, glyphs="ascii") == picture("""
    5 sites  13 Sep 00:00 .. 26 Sep 2019 12:00 UTC  CO2 400..520 ppm
    site       |13|16|19|22    ppm    range  |13|16|19|22    degC !
    vj_re_sn_1 .::--=++**##%%  517  408-517  %%##*++==--:..  -4.5
    vj_re_sn_2 #**   +===---:  429  428-496  ***   ********   5.0
    Vadso      ==-::-==-::-=+  460  420-10k  **************   5.0 ^
    pa_07
    ??_ref     ::::::::::           420-421  **********           L
    col = 1 d (CO2)  1 d (T)  blank = no data  L late  ^ off scale
    """)


def test_site(four: str) -> None:
    assert text_of("co2", four, rows=15, width=64, site="vj_re_sn_2") == picture("""
    vj_re_sn_2 · unit-02 · 12 Sep 00:00 – 26 Sep 2019 12:00 UTC
    CO₂ ppm · median 457 · p5 431  p95 498
     520┤
        │⠤⣄⡀
     480┤  ⠉⠓
        │       ⠓⠤⣄⡀
     440┤          ⠉⠓⠤⣄⡀
        │              ⠉ ◂ 429
    temp °C · median 5.0 · p5 5.0  p95 5.0
     5.5┤
       5┤⠒⠒⠒⠒   ⠒⠒⠒⠒⠒⠒⠒⠒ ◂ +5.0
     4.5┤
    stat│████   ████████
          ╵13╵16╵19╵22
    col = 1 d  ⠒ mean  ⠅ min–max  ◂ newest  █ deployed
    """)


def test_site_in_blocks(four: str) -> None:
    assert text_of("co2", four, rows=15, width=64, site="Vadsø", glyphs="block") == picture("""
    Vadsø · unit-03 · 12 Sep 00:00 – 26 Sep 2019 12:00 UTC · 100 %
    CO₂ ppm · median 444 · p5 421  p95 460
        │        ▲       ▲10000 ×1
     460┤░▀░    ▀▀    ▀▀ ◂ 460
        │▀ ▀   ░░░░  ░░
     440┤░ ░░ ░▀  ▀  ▀
        │   ▀░▀░  ░░░░
     420┤    ▀░    ▀▀
    temp °C · median 5.0 · p5 5.0  p95 5.0
     5.5┤
       5┤▀▀▀▀▀▀▀▀▀▀▀▀▀▀▀ ◂ +5.0
     4.5┤
    stat│███████████████
          ╵13╵16╵19╵22
    col = 1 d  ▀ mean  ░ min–max  ◂ newest  █ deployed  ▲ off scale
    """)


def test_site_in_ascii(four: str) -> None:
    assert text_of("co2", four, rows=15, width=64, site="Vadsø", glyphs="ascii") == picture("""
    Vadso  unit-03  12 Sep 00:00 .. 26 Sep 2019 12:00 UTC  100 %
    CO2 ppm  median 444  p5 421  p95 460
        |        ^       ^10000 x1
     460+:*:    **    ** < 460
        |* *   ::::  ::
     440+: :: :*  *  *
        |   *:*:  ::::
     420+    *:    **
    temp C  median 5.0  p5 5.0  p95 5.0
     5.5+
       5+*************** < +5.0
     4.5+
    stat|===============
          |13|16|19|22
    col = 1 d  * mean  : min-max  < newest  = deployed  ^ off scale
    """)


def test_panels_have_one_scale(four: str) -> None:
    assert text_of("co2", four, rows=21, width=60, panels=True, glyphs="ascii") == picture("""
    vj_re_sn_1  unit-01  13 Sep 00:00 .. 26 Sep 2019 12:00 UTC
    CO2 ppm  median 463  p5 414  p95 511
     520+           *** < 517
     480+      *****:
     440+ *****:
     400+*:
    temp C  median 2.3  p5 -3.8  p95 8.3
       6+******:
       0+......******:.
      -6+            ** < -4.5
    stat|==============
         |13|16|19|22
    col = 1 d  * mean  : min-max  < newest  . 0  = deployed
    +4 more (--all)
    """)


def test_pings(four: str) -> None:
    assert text_of("pings", four, width=60) == picture("""
    pings · 5 units · 12 Sep 00:00 – 26 Sep 2019 12:00 UTC
    site        ╷13╷16╷19╷22   unit    late
    vj_re_sn_1 ███████████████ unit-01
    vj_re_sn_2 ███████████████ unit-02
    Vadsø      ███████████████ unit-03
    pa_07             ├──────  unit-05
    東京_ref   ███████████───  unit-04   4d
    █ pings  ─ deployed, silent  ├ deployment
    """)


def test_status(four: str) -> None:
    assert text_of("status", four) == picture("""
    fleet · 2019-09-26 12:00 UTC · 5 units: 1 LATE  1 never  3 ok
         site       unit        last pings 14 d      ppm    °C  dBm rssi 14d
    LATE 東京_ref   unit-04 4 d 08 h ▌▌▌▌▌▌▌▌▌▌····    –     –  -90 ▅▅▅▅▅
    none pa_07      unit-05    never ··············    –     –    –
     ok  vj_re_sn_1 unit-01      8 h ▌▌▌▌▌▌▌▌▌▌▌▌▌▌  517  -4.5  -80 ▇▇▇▇▇▇▇
     ok  vj_re_sn_2 unit-02      8 h ▌▌▌▌▌▌▌▌▌▌▌▌▌▌  429   5.0 -104 ▂▂▂▂▂▂▂
     ok  Vadsø      unit-03      8 h ▌▌▌▌▌▌▌▌▌▌▌▌▌▌  460   5.0  -95 ▄▄▄▄▄▄▄
    pings:  ▌ one that day  · none  rssi −115…−70 dBm
    """)


@pytest.mark.parametrize("seconds, text", [(59, "0 min"), (3599, "59 min"), (3600, "1 h"), (86399, "23 h"), (86400, "1 d 00 h"),
                                           (863999, "9 d 23 h"), (864000, "10 d"), (1e8, "1157 d")])
def test_a_time_that_has_passed_has_at_most_eight_characters(seconds: float, text: str) -> None:
    assert plot_ascii.ago(seconds) == text


def test_status_in_forty_cells_of_ascii(four: str) -> None:
    assert text_of("status", four, width=40, rows=6, glyphs="ascii") == picture("""
    2019-09-26 12:00 UTC  1 LATE  1 never
         site           last pings 14 d
    LATE ??_ref     4 d 08 h ||||||||||....
    none pa_07         never ..............
    +3 more (--all)  pings:  | one that day
    . none
    """)


def test_status_says_what_is_wrong_before_what_is_well(four: str) -> None:
    heads = {cells: text_of("status", four, width=cells).split("\n")[0] for cells in (80, 50, 46, 40)}
    assert heads[80].startswith("fleet · 2019-09-26 12:00 UTC · 5 units: 1 LATE  1 never  3 ok")
    assert heads[50] == "2019-09-26 12:00 UTC · 1 LATE  1 never  3 ok" and heads[40] == "2019-09-26 12:00 UTC · 1 LATE  1 never"


def test_signal(four: str) -> None:
    assert text_of("signal", four) == picture("""
    signal dBm · 12 Sep 03:15 – 26 Sep 2019 12:00 UTC · 4 units, weakest first
    site          ╷-110     ╷-100     ╷-90      ╷-80          last    n trend
    vj_re_sn_2    ┊     ○   ┊                                 -104   15 ▂▂▂▂▂▂▂
    Vadsø         ┊         ┊    ○                             -95   15 ▄▄▄▄▄▄▄
    東京_ref      ┊         ┊         ○                        -90   11 ▅▅▅▅▅
    vj_re_sn_1    ┊         ┊                   ○              -80   15 ▇▇▇▇▇▇▇
    ○ last  ┊ limits: <-110 unusable, <-100 weak
    """)


def test_errors(four: str) -> None:
    assert text_of("errors", four) == picture("""
    errors · 24 Sep 00:00 – 26 Sep 2019 12:00 UTC · 1 unit · 2 entries · 1 col = 1 d
    site           uncaught watchdog signal backoff transmit other  all
    Vadsø      11         1               1                           2
    digits: WARN and EXC
    newest, INFO last
    25 Sep 10:55 Vadsø      EXC  Uncaught exception
    24 Sep 09:00 Vadsø      WARN Signal quality 99
    """)


def test_gaps(four: str) -> None:
    assert text_of("gaps", four) == picture("""
    gaps · 12 Sep 00:00 – 26 Sep 2019 12:00 UTC · 3 gaps · newest first
    site       unit    from         to           missing state
    pa_07      unit-05 20 Sep 00:00 now              311 not uploaded
    東京_ref   unit-04 22 Sep 11:30 now              192 not uploaded
    vj_re_sn_2 unit-02 15 Sep 23:30 19 Sep 00:00     144 lost
    longer than 1.5 of the unit's rhythms  missing: readings
    """)


# -- every size, every set of glyphs, every text ----------------------------------------------------------------------

PAGES = [("co2", {}), ("co2", {"site": "Vadsø"}), ("co2", {"panels": True}), ("co2", {"unit": "co2unit-000000000002"}),
         ("pings", {}), ("status", {}), ("signal", {}), ("errors", {}), ("gaps", {})]


@pytest.mark.parametrize("glyphs", sorted(plot_ascii.GLYPHS))
def test_no_line_is_too_wide_and_no_page_too_long(four: str, glyphs: str) -> None:
    for cells, lines in SIZES:
        for view, options in PAGES:
            text = text_of(view, four, rows=lines - 1, width=cells, height=lines, glyphs=glyphs, **options)
            assert text.count("\n") <= lines - 1, (view, options, cells, text)
            assert max(width(line) for line in text.split("\n")) <= cells, (view, options, cells, text)
            assert glyphs != "ascii" or text.isascii(), (view, text)
            assert "UTC" in text, "the zone is on every page"


HOSTILE = ["\x1b[31mred\x1b]0;title\x07", "tab\there", "new\nline\r", "\x7f\x9b31m\x85", "\u202egnp.exe\u2066\u200f",
           "a\u0300\u0301\u0302\u0303b", "東京\ufe0f\u200d家", "<script>alert(1)</script>&\"'", "%s%n{0}", "x" * 300, "\ud800", "",
           " ", "*", "[a", "\u2028\u2029", "\U000e0001\U0001f600"]


@pytest.fixture(scope="module")
def hostile(four: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The four sites with names and messages that nobody should have."""
    path = str(tmp_path_factory.mktemp("hostile") / "db.sqlite3")
    with sqlite3.connect(four) as source, sqlite3.connect(path) as db:
        source.backup(db)
        db.execute("PRAGMA journal_mode = DELETE")
        units = [unit for unit, in db.execute("SELECT unit_id FROM deploy_durations_tiered ORDER BY tier DESC")]
        for number, name in enumerate(HOSTILE):
            unit = units[number] if number < 4 else "co2unit-x%d" % number
            name = name.encode("utf-8", "replace").decode()
            if number < 4:
                db.execute("UPDATE deploy_durations_tiered SET site = ?, nickname = ? WHERE unit_id = ?", (name, name, unit))
            else:
                db.execute("INSERT INTO deploy_durations_tiered(unit_id, nickname, site, tier, status) "
                           "VALUES (?, ?, ?, 1, 'deployed')", (unit, name, name))
            db.execute("INSERT INTO error_logs(unit_id, ts, level, etype, message, text) VALUES (?, ?, ?, ?, ?, '')",
                       (unit, seconds(NOW) - number, name[:4], None, name))
            db.execute("INSERT INTO pings(unit_id, ts, nickname, rssi_dbm) VALUES (?, ?, ?, ?)",
                       (unit, seconds(NOW) - 60 * number, name, -80 - number))
    source.close(), db.close()
    return path


def harmless(text: str, allowed: str) -> bool:
    return not [c for c in text if c not in allowed and (unicodedata.category(c)[0] == "C" or c in "\u2028\u2029")]


@pytest.mark.parametrize("view, options", PAGES)
def test_no_control_character_from_data_gets_out(hostile: str, view: str, options: Dict[str, object]) -> None:
    asked = [options] if "site" not in options else [{"site": name} for name in HOSTILE[:4] if name == name.strip()]
    for each in asked:
        for glyphs in ("auto", "ascii"):
            for cells in (40, 80):
                page = page_of(view, hostile, width=cells, glyphs=glyphs, **each)
                assert harmless(plot_ascii.to_text(page.lines), "\n"), each
                assert harmless(plot_ascii.to_tsv(page, glyphs == "ascii"), "\n\t"), each
                assert plot_ascii.to_json(page).isascii() and "\x7f" not in plot_ascii.to_json(page)
                markup = plot_ascii.to_text(page.lines, lambda span: plot_ascii.html_span(span, {}))
                assert harmless(markup, "\n") and "<script" not in markup, each
                assert max(width(line) for line in plot_ascii.to_text(page.lines).split("\n")) <= cells


def test_widths_are_counted_in_cells_of_a_terminal() -> None:
    assert [width(text) for text in ("abc", "東京", "e\u0301", "Vadsø", "▁▂⠿")] == [3, 4, 1, 5, 3]
    assert [cut("東京タワー", cells) for cells in (10, 6, 5, 4, 1, 0)] == ["東京タワー", "東京~", "東京~", "東~", "~", ""]


def test_foreign_text_is_cleaned() -> None:
    assert clean("a\x1b[31m\x00\x7f\x9b\u202eb") == "a?[31m????b"
    assert clean("Vadsø 東京 Ærø é", ascii=True) == "Vadso ?? AEro e"
    assert clean("Vadsø 東京\u3000x") == "Vadsø 東京 x"


# -- the truth --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spikes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve sites, each with one reading of 5000 ppm, each at another moment."""
    rng, units = random.Random(1), []
    for number in range(12):
        readings = steady(ppm=lambda days: 420 + rng.randrange(20))
        at = rng.randrange(len(readings)) if number else 0
        readings[at] = (readings[at][0], 5000, 5.0)
        units.append(Unit(number, readings))
    return archive(str(tmp_path_factory.mktemp("spikes")), units,
                   "\n".join("%d site_%02d 1 deployed 2019-09-01" % (n, n) for n in range(12)))


@pytest.mark.parametrize("cells", range(40, 250, 14))
def test_a_single_spike_is_marked_and_counted_at_every_width_and_flattens_nothing(spikes: str, cells: int) -> None:
    page = page_of("co2", spikes, width=cells, xmin="2019-09-12")
    lines = plot_ascii.to_text(page.lines).split("\n")[2:14]
    assert [line.count("▲") for line in lines] == [1] * 12, lines
    assert [row["above"] for row in records(page)] == [1] * 12 and page.facts["co2_scale"][1] <= 450
    for number in (0, 5):
        page = page_of("co2", spikes, width=cells, site="site_%02d" % number, xmin="2019-09-12")
        assert re.search(r"▲5000 ×1", plot_ascii.to_text(page.lines)) and page.facts["co2_scale"][1] <= 450


def test_values_above_a_scale_that_was_asked_for_are_counted_exactly(four: str) -> None:
    rows = {row["site"]: row["above"] for row in records(page_of("co2", four, co2_max=450))}
    with sqlite3.connect(four) as db:
        for site, above in rows.items():
            assert above == db.execute("SELECT count(*) FROM co2_readings r JOIN deploy_durations_tiered d USING (unit_id) WHERE site = ? "
                                       "AND co2 > 450 AND ts >= ?", (site, seconds(NOW - timedelta(days=14)))).fetchone()[0], site


@pytest.mark.parametrize("days, cells", [(14, 60), (14, 80), (14, 250), (9, 80), (40, 80), (3, 120)])
def test_a_gap_is_blank_in_the_columns_without_readings_and_only_there(four: str, days: int, cells: int) -> None:
    page = page_of("co2", four, width=cells, recent_days=days)
    row = records(page)[1]
    with sqlite3.connect(four) as db:
        edges = [seconds(datetime.strptime(at, "%Y-%m-%dT%H:%MZ")) for at in page.axes["co2"]] + [seconds(NOW)]
        for value, one, other in zip(row["co2"], edges, edges[1:]):
            n, total = db.execute("SELECT count(*), sum(co2) FROM co2_readings "
                                  "WHERE unit_id = 'co2unit-000000000002' AND ts >= ? AND ts < ?", (one, other)).fetchone()
            assert value == (round(total / n, 1) if n else None), (one, other)


def test_a_unit_that_measures_every_three_hours_is_not_striped(tmp_path: object) -> None:
    slow = steady(minutes=180)
    db = archive(str(tmp_path), [Unit(1, slow), Unit(2, [row for row in slow if row[0].day != 25])])
    one, two = records(page_of("co2", db, width=120, recent_days=2))
    assert page_of("co2", db, width=120, recent_days=2).axes["co2"][1].endswith("T13:00Z")
    assert None not in one["co2"][3:-2] and two["co2"].count(None) > 20


def test_rollup_and_readings_give_the_same_numbers(four: str) -> None:
    with importer.open_db(four) as db:
        edges = [seconds(START) + 43200 * i for i in range(29)]
        spans = [[("co2unit-%012d" % unit, edges[0] + 5000, edges[-1] - 7000)] for unit in (1, 2, 3, 4)]
        for what in ("co2", "temp"):
            fine, coarse = (importer.buckets(db, [what], spans, edges[::every])[what] for every in (1, 2))
            for row, rough in zip(fine, coarse):
                for j, bucket in enumerate(rough):
                    parts = [part for part in row[2 * j:2 * j + 2] if part]
                    assert (bucket is None) == (not parts)
                    if bucket:
                        assert bucket.rows == sum(part.rows for part in parts) and bucket.n == sum(part.n for part in parts)
                        assert bucket.suspects == sum(part.suspects for part in parts) or what == "temp"
                        assert bucket.total == pytest.approx(sum(part.total for part in parts))
                        assert (bucket.low, bucket.high) == (min(part.low for part in parts), max(part.high for part in parts))


@pytest.fixture(scope="module")
def moves(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Unit 1 leaves site a on the 19th and unit 2 takes its place; units 3 and 4 stand at b together; unit 5 was never
    deployed; unit 6 was in the lab, then on its way, then at c."""
    def level(ppm: int) -> List[Tuple[datetime, int, float]]:
        return [(when, ppm + i % 2, 5.0) for i, when in enumerate(every(30, START, NOW))]
    return archive(str(tmp_path_factory.mktemp("moves")), [Unit(n, level(400 + 20 * n), daily()) for n in range(1, 7)], """
        1 a 30 deployed 2019-09-01 2019-09-19T06:00:00
        2 a 30 deployed 2019-09-19T06:00:00
        3 b 20 deployed 2019-09-01
        4 b 20 deployed 2019-09-16
        6 c 10 lab_check 2019-09-01 2019-09-15
        6 c 10 en_route 2019-09-15 2019-09-17
        6 c 10 deployed 2019-09-17""")


def test_a_unit_is_where_it_is_now_and_a_gap_where_the_unit_was_then(tmp_path: object) -> None:
    """Unit 1 goes from b to a, unit 2 from a to b: the site that comes last in the table is not always the one of today."""
    hole = [row for row in steady() if not datetime(2019, 9, 14) < row[0] < datetime(2019, 9, 15)]
    error = "----- 2019-09-25 10:55:57 EXC Uncaught exception\n"
    db = archive(str(tmp_path), [Unit(1, hole, daily(), error), Unit(2, steady(), daily())], """
        1 b 30 deployed 2019-09-01 2019-09-19
        1 a 30 deployed 2019-09-19
        2 a 30 deployed 2019-09-01 2019-09-19
        2 b 30 deployed 2019-09-19""")
    for view in ("signal", "errors", "status"):
        assert dict((row["unit"], row["site"]) for row in records(page_of(view, db)))["unit-01"] == "a", view
    assert [(row["unit"], row["site"]) for row in records(page_of("gaps", db))] == [("unit-01", "b")]
    assert "Sep 10:55 a " in text_of("errors", db)


def test_units_that_share_a_site_are_told_apart(tmp_path: object) -> None:
    units = [Unit(n, (), daily()) for n in (1, 2)]
    shared = archive("%s/1" % tmp_path, units, "1 lab_desk 0 lab_check\n2 lab_desk 0 lab_check")
    assert "unit-02" in text_of("signal", shared, width=80)


def test_sites_swaps_overlaps_and_units_that_were_never_deployed(moves: str) -> None:
    assert text_of("co2", moves, width=64, glyphs="ascii", xmin="2019-09-12") == picture("""
    4 sites  12 Sep 00:00 .. 26 Sep 2019 12:00 UTC  CO2 420..530 ppm
    site     |13|16|19|22    ppm    range   |13|16|19|22    degC !
    a       .......::::::::  441  420-441  +++++++++++++++   5.0
    b       ----===========  481  460-481  +++++++++++++++   5.0
    c       %%%%%%%%%%%%%%%  521  520-521  +++++++++++++++   5.0
    unit-05 ***************  501  500-501  +++++++++++++++   5.0
    col = 1 d (CO2)  1 d (T)  blank = no data
    """)


def test_pings_show_each_stay_with_its_bounds(moves: str) -> None:
    assert text_of("pings", moves, glyphs="ascii", width=60) == picture("""
    pings  6 units  12 Sep 00:00 .. 26 Sep 2019 12:00 UTC
    site       |13|16|19|22   unit    late
    a         #######[####### unit-02
    b         ############### unit-03
    b            [########### unit-04
    c         ###[#[######### unit-06
    [no site] ############### unit-05
    # pings  [ deployment
    """)


def test_a_successor_that_is_still_in_the_lab_is_not_in_the_mean_of_the_site(tmp_path: object) -> None:
    """Unit 2 is to take the place of unit 1 on the 20th; unit 3 is tested for site b, where nobody is yet."""
    def level(ppm: int) -> List[Tuple[datetime, int, float]]:
        return steady(ppm=lambda days: ppm)
    db = archive(str(tmp_path), [Unit(1, level(400), daily()), Unit(2, level(500), daily()), Unit(3, level(600), daily())], """
        1 a 30 deployed 2019-09-01 2019-09-20
        2 a 30 lab_check 2019-09-01 2019-09-18
        2 a 30 en_route 2019-09-18 2019-09-20
        2 a 30 deployed 2019-09-20
        3 b 20 lab_check 2019-09-01""")
    one, two = records(page_of("co2", db, width=80, tz="UTC", xmin="2019-09-12"))
    days = [at[:10] for at in page_of("co2", db, width=80, xmin="2019-09-12").axes["co2"]]
    assert {round(ppm / 100) for ppm, day in zip(one["co2"], days) if day < "2019-09-20"} == {4}
    assert {round(ppm / 100) for ppm, day in zip(one["co2"], days) if day >= "2019-09-20"} == {5}
    assert {round(ppm / 100) for ppm in two["co2"]} == {6} and (one["min"], one["max"], one["ppm"]) == (400, 501, 501)
    assert [line.split()[:2] for line in text_of("pings", db, glyphs="ascii", width=60).splitlines()[2:5]] == [
        ["a", "########[######"], ["a", "######[#]"], ["b", "###############"]]


@pytest.mark.parametrize("cells", range(40, 200, 9))
def test_temperature_has_columns_of_six_hours_or_less_or_of_whole_days(four: str, cells: int) -> None:
    """In columns of 12 hours night and day would alternate."""
    for days in (1, 2, 5, 9, 14):
        page = page_of("co2", four, width=cells, recent_days=days)
        assert "12 h (T)" not in plot_ascii.to_text(page.lines)
        assert "col = 12 h" not in text_of("co2", four, width=cells, recent_days=days, site="Vadsø")


@pytest.mark.parametrize("cells, rows", [(80, 23), (46, 23), (46, 12), (80, 4), (20, 50)])
@pytest.mark.parametrize("view, options", PAGES)
def test_every_character_of_a_chart_is_in_the_legend(moves: str, four: str, view: str, options: Dict[str, object], cells: int,
                                                     rows: int) -> None:
    for db in (moves, four):
        if "site" in options and db == moves:
            continue
        lines = page_of(view, db, NOW, rows, width=cells, glyphs="block", **options).lines
        legend = [line for line in lines[2:] if len(line) == 1 and line[0].style == "dim"]
        known = "".join(line[0].text for line in legend)
        drawn = "".join(span.text for line in lines[2:] if line not in legend for span in line)
        meant = [char for char in "░▒─├▌┊━○▲▼▂" if char in drawn and not (view == "status" and char in "▂")]
        assert [char for char in meant if char not in known and not (view in ("co2", "signal") and char == "▂")] == [], (known, drawn)


def test_counts_are_never_cut(tmp_path: object) -> None:
    """Unit 1 has 1200 values far above the others, and 85 degC as often."""
    rows = [(when, 39000 if i % 2 else 420, 85.0 if i % 3 == 0 else temp) for i, (when, _, temp) in enumerate(steady(minutes=5))]
    db = archive(str(tmp_path), [Unit(1, rows), Unit(2, steady())], "1 a 1 deployed\n2 b 1 deployed")
    for cells in range(40, 120, 7):
        line = next(line for line in text_of("co2", db, width=cells).splitlines() if line.startswith("a "))
        assert re.search(r"▲\d+k? T▲\d+$", line) and "~" not in line, (cells, line)


def test_a_value_is_not_shown_as_new_when_the_unit_should_have_called_twice_since(tmp_path: object) -> None:
    for hours, ppm in ((30, "421"), (47, "421"), (60, "–")):
        end = NOW - timedelta(hours=hours)
        db = archive("%s/%d" % (tmp_path, hours), [Unit(1, steady(end=end), daily())], "1 a 1 deployed 2019-09-01")
        row, = records(page_of("status", db))
        assert ppm in text_of("status", db).splitlines()[2] and row["ppm"] == 421
        assert row["ppm_age"] == hours * 3600 + 1800
        assert ("last 42" in text_of("co2", db, site="a")) == (ppm == "–")


def test_pages_begin_with_what_is_wrong_with_the_station_and_status_ends_with_what_is_wrong_with_units(four: str) -> None:
    problems = [importer.Problem("disk", importer.CRITICAL, "", "the disk is full since 2019-09-26: remove what is not needed", 1),
                importer.Problem("sensor:x", importer.WARNING, "co2unit-000000000003", "Vadsø (unit-03): no usable CO2", 1),
                importer.Problem("late:x", importer.WARNING, "co2unit-000000000004", "it is late", 1)]
    for view in plot_ascii.VIEWS:
        page = page_of(view, four, NOW, 12, width=40, problems=problems)
        lines = plot_ascii.to_text(page.lines).splitlines()
        assert lines[:2] == ["the disk is full since 2019-09-26:", "remove what is not needed"] and len(lines) <= 12, view
        assert page.lines[0][0].style == "bad" and ("Vadsø (unit-03): no usable CO2" in lines) == (view == "status")
        assert "it is late" not in lines
    markup = plot_ascii.web_page("index", four, {}, True, seconds(NOW), problems=problems)
    assert markup.count("the disk is full") == 1 and "no usable CO2" in markup
    assert plot_ascii.web_page("index", four, {}, False, seconds(NOW), problems=problems).startswith("the disk is full since")


def test_the_ribbon_shows_what_a_unit_was_doing(moves: str) -> None:
    assert text_of("co2", moves, rows=12, site="c", width=60, glyphs="ascii") == picture("""
    c  unit-06  12 Sep 00:00 .. 26 Sep 2019 12:00 UTC  100 %
    CO2 ppm  median 521  p5 520  p95 521
     524+
     520+*************** < 521
     516+
    temp C  median 5.0  p5 5.0  p95 5.0
    5.25+*************** < +5.0
     4.5+
    stat|...--==========
          |13|16|19|22
    col = 1 d  * mean  : min-max  < newest  = deployed
    - en route  . not deployed
    """)


def test_a_swap_of_units_shows_in_the_ribbons(moves: str) -> None:
    assert text_of("co2", moves, rows=14, site="a", width=60) == picture("""
    a · unit-01, unit-02 · 12 Sep 00:00 – 26 Sep 2019 12:00 UTC
    CO₂ ppm · median 440 · p5 420  p95 441
     450┤
     440┤       ⣄⠖⠒⠒⠒⠒⠒⠒ ◂ 441
     430┤      ⢀⠇
     420┤⠒⠒⠒⠒⠒⠒⠚⠁
    temp °C · median 5.0 · p5 5.0  p95 5.0
     5.5┤
       5┤⠒⠒⠒⠒⠒⠒⠒⠒⠒⠒⠒⠒⠒⠒⠒ ◂ +5.0
     4.5┤
    unit│████████        unit-01
    unit│       ████████ unit-02
          ╵13╵16╵19╵22
    col = 1 d  ⠒ mean  ⠅ min–max  ◂ newest  █ deployed
    """)


def test_bounds_of_deployments_are_exact_to_the_second(moves: str) -> None:
    one, two = page_of("co2", moves, site="a", xmin="2019-09-19", xmax="2019-09-20"), page_of("co2", moves, site="a")
    assert [row["co2_min"] // 20 * 20 for row in records(one) if row["co2_n"]] == [420] * 12 + [440] * 36
    assert sum(row["co2_n"] for row in records(two)) == len(every(30, START, NOW))


def test_the_year_stands_where_it_changes(tmp_path: object) -> None:
    start, end = datetime(2019, 11, 20), datetime(2020, 2, 10)
    db = archive(str(tmp_path), [Unit(1, steady(start, end, minutes=360), daily(start, end))], "1 a 1 deployed 2019-11-01", now=end)
    assert text_of("co2", db, end, site="a", rows=9, width=70, recent_days=80, glyphs="ascii") == picture("""
    a  unit-01  22 Nov 2019 .. 9 Feb 2020 UTC  320/320 = 100 %
    CO2 ppm  median 421  p5 420  p95 421
     426+
     423+
     420+**************************************** < 421
     417+
    stat|========================================
             |Dec |11  |21   |2020|11  |21  |Feb
    col = 2 d  * mean  : min-max  < newest  = deployed
    """)
    assert text_of("pings", db, end, width=70, recent_days=80) == picture("""
    pings · 1 unit · 22 Nov 2019 – 9 Feb 2020 UTC · 1 col = 2 d
    site     ╷Dec ╷11  ╷21   ╷2020╷11  ╷21  ╷Feb  unit    late
    a    ████████████████████████████████████████ unit-01
    days with pings:  █ 95 %+
    """)
    assert "|Dec |16   |2020|16  |Feb" in text_of("co2", db, end, width=70, recent_days=80, glyphs="ascii")


def test_ticks_never_meet_and_stand_on_calendar_steps() -> None:
    rng = random.Random(2)
    for _ in range(200):
        a = seconds(datetime(2015, 1, 1)) + rng.randrange(10 ** 8)
        b, cells = a + int(10 ** rng.uniform(3, 8.2)), rng.randrange(4, 200)
        axis = plot_ascii.make_axis(Zone("UTC"), plot_ascii.Window(a, b, rng.random() < 0.5), cells, plot_ascii.ALL_STEPS)
        text = axis.heading
        assert len(text) == axis.cells <= cells and axis.edges[-1] >= b and sorted(set(axis.edges)) == axis.edges
        labels = re.findall(r"╷([^╷ ]+(?: [^╷ ]+)?)", text)
        assert len(labels) == text.count("╷"), text
        assert not any(one == other for one, other in zip(labels, labels[1:])), text


@pytest.fixture
def oslo() -> str:
    """A time zone, if this machine knows any."""
    try:
        Zone("Europe/Oslo")
    except ValueError:
        pytest.skip("no time zones here")
    return "Europe/Oslo"


def test_columns_follow_local_days_when_the_clocks_change(tmp_path: object, oslo: str) -> None:
    start, end = datetime(2019, 10, 20), datetime(2019, 11, 3)
    db = archive(str(tmp_path), [Unit(1, steady(start, end))], "1 a 1 deployed 2019-10-01", now=end)
    page = page_of("co2", db, end, tz="Europe/Oslo", width=60, recent_days=12)
    assert page.axes["co2"][2:6] == ["2019-10-%dT00:00+0%d:00" % pair for pair in ((25, 2), (26, 2), (27, 2), (28, 1))]
    assert "Europe/Oslo" in plot_ascii.to_text(page.lines).split("\n")[0]
    hours = page_of("co2", db, end, tz="Europe/Oslo", site="a", xmin="2019-10-27", xmax="2019-10-28", width=100)
    counts = [row["co2_n"] for row in records(hours)]
    assert counts[:6] == [1, 1, 1, 1, 1, 3] and sum(counts) == 50, "a day of 25 hours"


def test_day_axis_when_the_clocks_change(tmp_path: object, oslo: str) -> None:
    def rise(start: datetime) -> str:
        readings = steady(start - timedelta(days=1), start + timedelta(days=2), lambda days: 400 + 50 * days)
        db = archive("%s/%d" % (tmp_path, start.month), [Unit(1, readings)], "1 a 1 deployed 2019-01-01", now=start + timedelta(days=2))
        return text_of("co2", db, start + timedelta(days=2), rows=10, width=64, tz=oslo, site="a", xmin=start.strftime("%Y-%m-%d"),
                       xmax=(start + timedelta(days=1)).strftime("%Y-%m-%d"), glyphs="ascii")
    assert rise(datetime(2019, 10, 27)) == picture("""
    a  unit-01  27 Oct 2019 Europe/Oslo  50/50 = 100 %
    CO2 ppm  median 473  p5 448  p95 496
     500+                                      ********** < 498
     475+               ***********************
     450+***************
    temp C  median 5.0  p5 5.0  p95 5.0
       5+************************************************ < +5.0
    stat|================================================
         |27 Oct     |06:00|09:00|12:00|15:00|18:00|21:00
    col = 30 min  * mean  : min-max  < newest  = deployed
    """)
    assert rise(datetime(2019, 3, 31)) == picture("""
    a  unit-01  31 Mar 2019 Europe/Oslo  46/46 = 100 %
    CO2 ppm  median 473  p5 450  p95 494
     500+                                      ******** < 496
     475+               ***********************
     450+***************
    temp C  median 5.0  p5 5.0  p95 5.0
       5+********************************************** < +5.0
    stat|==============================================
         |31 Mar   |06:00|09:00|12:00|15:00|18:00|21:00
    col = 30 min  * mean  : min-max  < newest  = deployed
    """)


@pytest.mark.parametrize("name, when, ahead, text", [
    ("Europe/Oslo", "2019-03-31T00:59:59", 1, "2019-03-31T01:59+01:00"), ("Europe/Oslo", "2019-03-31T01:00:00", 2, "2019-03-31T03:00+02:00"),
    ("America/St_Johns", "2019-07-01T12:00:00", -2.5, "2019-07-01T09:30-02:30"),
    ("America/St_Johns", "2019-12-01T12:00:00", -3.5, "2019-12-01T08:30-03:30"),
    ("Asia/Kathmandu", "2019-07-01T12:00:00", 5.75, "2019-07-01T17:45+05:45"), ("Europe/London", "2019-12-01T12:00:00", 0, "2019-12-01T12:00Z")])
def test_local_times_and_their_signs(oslo: str, name: str, when: str, ahead: float, text: str) -> None:
    zone, utc = Zone(name), datetime.fromisoformat(when)
    local = zone.local(seconds(utc))
    assert local.replace(tzinfo=None) == utc + timedelta(hours=ahead) and zone.iso(seconds(utc)) == text
    assert local.timestamp() == seconds(utc)


@pytest.mark.parametrize("name", ["Europe/Atlantis", "Europe", "", "/etc/passwd", "../../../etc/passwd", "Europe/../UTC", "zone.tab", "\0"])
def test_what_is_no_zone_has_a_clear_message(name: str) -> None:
    with pytest.raises(ValueError, match="no time zone"):
        Zone(name)


def test_readings_without_any_usable_value_are_marked_by_days_as_by_hours(tmp_path: object) -> None:
    """Unit 1 has 85.0 degC (power-on) for two days, and for two others no readings at all."""
    readings = [(when, ppm, 85.0 if when.day in (18, 19) else temp) for when, ppm, temp in steady() if when.day not in (22, 23)]
    db = archive(str(tmp_path), [Unit(1, readings), Unit(2, steady())], "1 a 1 deployed\n2 b 1 deployed")
    days, halves = (text_of("co2", db, width=cells, xmin="2019-09-12") for cells in (80, 120))
    assert "▅▅▅▅▅▅??▅▅  ▅▅▅" in days and " T▲96\n" in days
    assert "▅▅▅▅▅▅??▅▅  ▅▅▅" in halves and " T▲96\n" in halves
    assert "suspect" not in text_of("co2", db, site="*", recent_days=2)


def test_no_page_has_an_index_made_for_itself(four: str) -> None:
    """SQLite made one of all readings, when it took the statistics in the database at their word: 3.5 s for each chart."""
    with importer.open_db(four) as db:
        assert db.execute("PRAGMA automatic_index").fetchone() == (0,)


def test_names_take_the_room_that_is_left(tmp_path: object) -> None:
    sites = ["is_adjacent_%02d" % n for n in range(3)]
    start = NOW - timedelta(days=400)
    db = archive(str(tmp_path), [Unit(n, (), daily(start)) for n in range(3)],
                 "\n".join("%d %s 1 deployed 2018-01-01" % pair for pair in enumerate(sites)))
    lines = text_of("pings", db, width=80).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == sites and max(map(len, lines)) <= 80


def test_a_stay_that_ended_before_the_first_column_has_no_row(tmp_path: object) -> None:
    """A year begins on a Thursday, its first whole week on Monday the 1st of October: unit 1 moved in between."""
    start = datetime(2018, 9, 1)
    db = archive(str(tmp_path), [Unit(1, (), daily(start))], "1 a 1 deployed 2018-09-01 2018-09-29\n1 b 1 deployed 2018-09-29")
    assert [row["site"] for row in records(page_of("pings", db))] == ["b"]


def test_a_page_begins_and_ends_with_the_readings_of_the_site_not_with_all_of_its_units(tmp_path: object) -> None:
    start = NOW - timedelta(days=500)
    db = archive(str(tmp_path), [Unit(1, steady(start, minutes=120))],
                 "1 a 1 deployed 2018-01-01 2018-06-01\n1 b 1 deployed 2018-06-01 2018-09-01\n1 c 1 deployed 2019-09-20")
    assert text_of("co2", db, site="a").startswith(
        "a · unit-01 · co2unit-000000000001 · 14 May – 31 May 2018 UTC · 210/216 = 97 %")
    assert " – 31 Aug 2018 UTC" in text_of("co2", db, site="b")
    assert text_of("co2", db, site="c").startswith("c · unit-01 · 20 Sep 00:00 – 26 Sep 2019 12:00 UTC")


def test_facts_of_panels_are_facts_of_all(four: str) -> None:
    assert set(page_of("co2", four, panels=True).facts) == {"co2_scale", "temp_scale"}


def test_units_are_not_counted_as_sites(four: str) -> None:
    assert text_of("co2", four, unit="unit-01,unit-02").startswith("2 units ·")
    assert text_of("co2", four, site="vj*").startswith("2 sites ·")


def test_labels_of_a_plot_have_at_most_four_characters() -> None:
    for low, high in ((429, 457), (380, 480), (-9.9, -2.1), (-12.4, 16), (0, 10000), (0, 20000), (11950, 12050), (0, 5e5)):
        for rows in range(1, 40):
            scale, labels = plot_ascii.make_rows(Scale(low, high), rows)
            assert len(labels) == rows and max(map(len, labels)) <= 4, (rows, labels)
            assert scale.low <= low and high <= scale.high
    assert plot_ascii.make_rows(Scale(0, 20000), 4)[1] == ["0", "6000", "12k", "18k"]


def test_of_very_many_rows_the_columns_are_wider() -> None:
    c = plot_ascii.Context(None, "co2", Options(width=250, now=seconds(NOW)))
    years = plot_ascii.Window(seconds(NOW) - 1826 * 86400, seconds(NOW))

    def axis_of(rows: int) -> plot_ascii.Axis:
        columns = [plot_ascii.Column("site", "site", 10, print), plot_ascii.Column("co2", "", 14, print, steps=plot_ascii.ALL_STEPS)]
        return plot_ascii.Table(c, columns, years, rows).axes["co2"]
    steps = {rows: axis_of(rows) for rows in (1, 250, 1000, 100000)}
    assert {rows: (axis.step, len(axis.edges) - 1) for rows, axis in steps.items()} == {
        1: ("2 weeks", 132), 250: ("2 weeks", 132), 1000: ("2 months", 31), 100000: ("5 years", 2)}


def test_gaps_of_very_many_units_are_found_in_the_days_that_are_not_full(tmp_path: object) -> None:
    start, hole = NOW - timedelta(days=14), [datetime(2019, 9, 15), datetime(2019, 9, 16, 7)]
    units = [Unit(n, [row for row in steady(start, minutes=240) if n != 3 or not hole[0] < row[0] < hole[1]]) for n in range(1000)]
    db = archive(str(tmp_path), units)
    assert [row["missing"] for row in records(page_of("gaps", db))] == [7]
    assert records(page_of("gaps", db)) == records(page_of("gaps", db, unit="unit-03"))


def test_the_share_is_of_what_is_here_and_missing_whatever_the_interval_was(tmp_path: object) -> None:
    changed, hole = NOW - timedelta(days=5), [datetime(2019, 9, 16, hour) for hour in range(2, 16)]
    slow = [row for row in steady(end=changed, minutes=60) if row[0] not in hole]
    db = archive(str(tmp_path), [Unit(1, slow + steady(changed, minutes=10), daily())], "1 a 30 deployed 2019-09-12")
    here = 9 * 24 + 12 - 14 + 5 * 144
    lines = text_of("co2", db, site="a", rows=14, width=80, glyphs="ascii").split("\n")
    assert lines[0].endswith("%d/%d = 98 %%" % (here, here + 14))
    assert [line for line in lines if line.startswith("stat")] == ["stat|" + "=" * 16 + "_ _" + "=" * 39]
    assert [row["missing"] for row in records(page_of("gaps", db))] == [14]


def test_values_that_are_held_are_no_readings(tmp_path: object) -> None:
    db = archive(str(tmp_path), [Unit(1, steady(minutes=120), daily())], "1 a 30 deployed 2019-09-12")
    rows = records(page_of("co2", db, site="a", recent_days=1, width=80))
    assert len(rows) > 40 and all(row["co2_mean"] is not None for row in rows[:40])
    assert [row["co2_n"] for row in rows[:8]] == [1, 0, 0, 0, 1, 0, 0, 0]
    assert "12/12 = 100 %" in text_of("co2", db, site="a", recent_days=1)


def test_a_median_of_a_sample_says_so(tmp_path: object) -> None:
    start = NOW - timedelta(days=500)
    db = archive(str(tmp_path), [Unit(1, steady(start, minutes=240, ppm=lambda days: 400 + days % 7))], "1 a 1 deployed 2018-01-01")
    for width, months in ((80, 500), (46, 500), (80, 90)):
        heading = text_of("co2", db, site="a", recent_days=months, width=width).split("\n")[1]
        assert "median" in heading and ("of 1 day in 3" in heading) == (months == 500)


def test_a_late_unit_shows_the_age_of_what_is_late(tmp_path: object) -> None:
    end = NOW - timedelta(days=3)
    units = [Unit(1, steady(end=end), daily()[:-3] + [(NOW - timedelta(hours=30), -90)]), Unit(2, steady(), daily(end=end))]
    db = archive(str(tmp_path), units, "1 a 30 deployed 2019-09-12\n2 b 30 deployed 2019-09-12")
    told = {line.split()[1]: line for line in text_of("status", db, width=80).split("\n") if line.startswith("LATE")}
    assert "3 d 00 h" in told["a"] and "3 d 08 h" in told["b"]


def test_a_value_of_a_sensor_that_died_does_not_look_new(tmp_path: object) -> None:
    dies = NOW - timedelta(hours=6)
    rows = [(when, ppm if when < dies else 0, temp) for when, ppm, temp in steady()]
    db = archive(str(tmp_path), [Unit(1, rows, daily())], "1 a 30 deployed 2019-09-12")
    assert [line.split()[6:8] for line in text_of("status", db, width=80).split("\n") if " unit-01 " in line] == [["–", "5.0"]]
    assert "last 421, 6 h ago" in text_of("co2", db, site="a")


def test_a_page_of_an_earlier_time_tells_no_problem_that_came_later(four: str) -> None:
    problems = [importer.Problem("refused:co2unit-000000000001", "critical", "co2unit-000000000001", "its lines", seconds(NOW) - 2 * 86400)]
    assert ["its lines" in text_of("status", four, problems=problems, **options) for options in ({}, {"xmax": "2019-09-20"})] == [True, False]


def test_gaps_of_units_that_are_not_deployed_come_last(tmp_path: object) -> None:
    left = NOW - timedelta(days=4)
    db = archive(str(tmp_path), [Unit(1, steady(end=left), daily(end=left)), Unit(2, [row for row in steady() if row[0].day != 20])],
                 "1 a 30 deployed 2019-09-12 2019-09-22\n2 b 20 deployed 2019-09-12")
    assert [(row["site"], row["state"]) for row in records(page_of("gaps", db))] == [("b", "lost"), ("a", "off")]


def test_readings_from_the_future_neither_stretch_nor_enter_the_page(tmp_path: object) -> None:
    ahead = [(when, 39000, 60.0) for when in every(30, datetime(2036, 1, 1), datetime(2036, 1, 2))]
    ahead.append((NOW + timedelta(hours=5), 2000, 5.0))
    plain = archive(str(tmp_path) + "/a", [Unit(1, steady(), daily())], "1 a 1 deployed 2019-09-01")
    mixed = archive(str(tmp_path) + "/b", [Unit(1, steady() + ahead, daily())], "1 a 1 deployed 2019-09-01")
    for view, options in (("co2", {}), ("co2", {"site": "a"}), ("status", {}), ("gaps", {}), ("pings", {})):
        assert text_of(view, mixed, **options) == text_of(view, plain, **options)


def test_a_site_with_one_reading_or_without_any_usable_value_is_drawn(tmp_path: object) -> None:
    db = archive(str(tmp_path), [Unit(1, steady(NOW - timedelta(minutes=40))), Unit(2, [(row[0], 0, 85.0) for row in steady()]),
                                 Unit(3, [(row[0], 431, 5.0) for row in steady()])], "1 a 1 deployed\n2 b 1 deployed\n3 c 1 deployed")
    rows = records(page_of("co2", db))
    assert [row["ppm"] for row in rows] == [420.0, None, None] and rows[1]["celsius"] is None
    assert "?????" in text_of("co2", db, site="c").split("\n")[2], "a value that never changes is suspect, not missing"
    for view, options in [*((view, {}) for view in plot_ascii.VIEWS), ("co2", {"site": "b"}), ("co2", {"panels": True})]:
        text_of(view, db, **options)


# -- numbers for programs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view, options", PAGES)
def test_tsv_and_json_have_the_same_numbers(four: str, view: str, options: Dict[str, object]) -> None:
    page = page_of(view, four, **options)
    lines = [line.split("\t") for line in plot_ascii.to_tsv(page).splitlines()]
    assert len({len(line) for line in lines}) == 1
    for row, line in zip(records(page), lines[1:]):
        flat = dict(zip(lines[0], line))
        for field, value in row.items():
            chart = field in page.axes
            for name, one in [(field + "@" + at, one) for at, one in zip(page.axes[field], value)] if chart else [(field, value)]:
                assert flat[name] == ("" if one is None else str(int(one)) if isinstance(one, bool) else str(one)), name


def test_bars_stand_for_the_numbers_in_json(four: str) -> None:
    page = page_of("co2", four)
    scale = Scale(*page.facts["co2_scale"])
    for row, line in zip(records(page), plot_ascii.to_text(page.lines).split("\n")[2:]):
        drawn = line[width("vj_re_sn_1 ") - (width(line[:10]) - len(line[:10])):][:len(row["co2"])].ljust(len(row["co2"]))
        assert len(drawn) == len(row["co2"])
        for char, value in zip(drawn, row["co2"]):
            assert char == (" " if value is None else "▁▂▃▄▅▆▇█"[scale.level(value, 8)]) or char == "▲" and row["above"], line


def test_panel_shows_mean_and_range_of_each_column(four: str) -> None:
    page = page_of("co2", four, site="vj_re_sn_1", glyphs="ascii", rows=23)
    lines = [line[5:].ljust(80) for line in plot_ascii.to_text(page.lines).split("temp")[0].split("\n")[2:-1]]
    scale, _ = plot_ascii.make_rows(Scale(*page.facts["co2_scale"]), len(lines))
    for j, row in enumerate(records(page)):
        column = "".join(line[j] for line in reversed(lines))
        low, at, high = (scale.level(row["co2_" + name], len(lines)) for name in ("min", "mean", "max"))
        assert column == "".join("*" if i == at else ":" if low <= i <= high else " " for i in range(len(lines))), (j, row)


# -- HTML -------------------------------------------------------------------------------------------------------------


class Checker(html.parser.HTMLParser):
    """Balanced tags, no script, nothing from elsewhere."""
    VOID = {"meta", "tr", "th", "td"}   # or without an end that must be written
    ALLOWED = {"html", "head", "meta", "title", "style", "body", "nav", "h1", "h2", "pre", "a", "span", "b", "p", "div", "svg", "g",
               "path", "rect", "text", "details", "summary", "table", "tr", "th", "td"}

    def __init__(self) -> None:
        super().__init__()
        self.open: List[str] = []
        self.links: List[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        assert tag in self.ALLOWED and (tag != "pre" or "pre" not in self.open), tag
        assert not [name for name, _ in attrs if name.startswith("on") or name == "src"]
        self.links += [value for name, value in attrs if name == "href" and value]
        self.open += [tag] * (tag not in self.VOID)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "pre" in self.open else ""


def checked(markup: str) -> Checker:
    checker = Checker()
    checker.feed(markup)
    checker.close()
    assert checker.open == [] and markup.startswith("<!DOCTYPE html>\n<html lang=\"en\">")
    assert "url(" not in markup and "@import" not in markup and "<script" not in markup
    return checker


@pytest.mark.parametrize("view", ["alive", "co2", "index"])
def test_web_pages_are_valid_and_have_the_text_of_the_pages(four: str, hostile: str, view: str) -> None:
    for db in (four, hostile):
        checked(plot_ascii.web_page(view, db, {}, True, seconds(NOW)))
        markup = plot_ascii.web_page(view, db, {"panels": "1"}, True, seconds(NOW))
        for kind, cells in plot_ascii.WIDTHS.items():
            own = "".join(re.findall('<pre class="%s">.*?</pre>' % kind, markup, re.S))
            lines = plot_ascii.web_page(view, db, {"panels": "1", "width": str(cells), "glyphs": "block"}, False, seconds(NOW)).split("\n")
            drawn = html.unescape(re.sub("<.*?>", "", own)).split("\n")
            assert own and {line.rstrip() for line in drawn} <= set(lines)
            assert max(width(line) for line in lines) <= cells
    one = plot_ascii.web_page("co2", four, {"site": "Vadsø"}, False, seconds(NOW))
    assert one.count("\n") == 23, "a plot is as high as on a terminal, however long a page may be; none is drawn twice"


def test_sites_are_links_to_their_pages(four: str) -> None:
    links = checked(plot_ascii.web_page("alive", four, {}, True, seconds(NOW))).links
    assert "/data/co2/summary?site=vj_re_sn_1" in links and "/data/co2/summary?site=Vads%C3%B8" in links
    page = checked(plot_ascii.web_page("co2", four, {"site": "Vadsø"}, True, seconds(NOW)))
    assert page.links[:3] == [each.url for each in plot_ascii.WEB.values()] and page.text == "", "a picture, without text"


def test_text_page_takes_its_size_and_glyphs_from_the_url(four: str) -> None:
    text = plot_ascii.web_page("co2", four, {"width": "50", "glyphs": "ascii"}, False, seconds(NOW))
    assert text.isascii() and max(map(len, text.split("\n"))) <= 50 and text.count("5 sites") == 2


@pytest.mark.parametrize("query", [
    {"width": "5"}, {"width": "x"}, {"glyphs": "emoji"}, {"recent-days": "nan"}, {"xmin": "yesterday"}, {"tz": "No/Where"},
    {"wide": "fasle"}, {"all": "2"}, {"min-tier": "1.5"}, {"co2-max": "-1"}, {"xmax": "0000-00-00"}, {"height": "1e9"}, {"weather": "fine"}])
def test_bad_arguments_in_a_url_are_value_errors(four: str, query: Dict[str, str]) -> None:
    with pytest.raises(ValueError):
        plot_ascii.web_page("co2", four, query, True, seconds(NOW))


def test_without_a_database_a_page_says_so(tmp_path: object) -> None:
    for view in ("alive", "co2", "index"):
        assert "No data" in checked(plot_ascii.web_page(view, str(tmp_path) + "/none", {}, True, 0)).text
        assert "No data" in plot_ascii.web_page(view, str(tmp_path) + "/none", {}, False, 0)


def test_static_pages_link_to_each_other(four: str, tmp_path: object) -> None:
    assert plot_ascii.main(["--db", four, "--html", "-o", str(tmp_path) + "/web/"], seconds(NOW)) == 0
    names = os.listdir(str(tmp_path) + "/web")
    assert {"index.html", "status.html", "co2.html", "site-vj_re_sn_1.html"} < set(names)
    assert not [name for name in names if name.endswith(".new")]
    for name in names:
        with open("%s/web/%s" % (tmp_path, name), encoding="utf-8") as file:
            assert set(checked(file.read()).links) <= set(names)


def test_a_file_is_replaced_and_a_link_stays(tmp_path: object) -> None:
    page, link = str(tmp_path) + "/page.html", str(tmp_path) + "/link.html"
    os.symlink(page, link)
    plot_ascii.write_file(page, ["old"])
    opened = open(page)
    plot_ascii.write_file(page, ["new"])
    assert opened.read() == "old"
    plot_ascii.write_file(link, ["through"])
    assert os.path.islink(link) and open(page).read() == "through"
    assert sorted(os.listdir(str(tmp_path))) == ["link.html", "page.html"]


# -- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str, **environ: str) -> Tuple[int, str, str]:
    """Exit status, stdout, stderr, without a terminal; no locale unless given."""
    kept = {name: value for name, value in os.environ.items() if not re.match("LC_|LANG|COLUMNS|LINES|NO_COLOR|PAGER", name)}
    done = subprocess.run([sys.executable, SCRIPT, *arguments], env={**kept, "CO2D_CONF": os.devnull, **environ}, timeout=60,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


AT = ["--xmax", "2019-09-26T12:00"]


@pytest.mark.parametrize("environ, ascii", [
    ({}, True), ({"LANG": "C"}, True), ({"LC_ALL": "C", "LANG": "en_US.UTF-8"}, True), ({"LANG": "nb_NO"}, True),
    ({"LC_ALL": "POSIX"}, True), ({"LANG": "nb_NO.UTF-8"}, False), ({"LC_CTYPE": "C.utf8"}, False)])
def test_in_a_locale_without_utf8_output_is_seven_bit(four: str, environ: Dict[str, str], ascii: bool) -> None:
    status, out, err = run("--db", four, *AT, **environ)
    assert (status, err) == (0, "") and out.isascii() == ascii and ("Vadso" if ascii else "Vadsø") in out


def test_a_flag_wins_over_the_locale(four: str) -> None:
    assert "▁" in run("--db", four, *AT, "--glyphs", "block", LC_ALL="C")[1]
    assert run("--db", four, *AT, "--glyphs", "ascii", LANG="en_US.UTF-8")[1].isascii()


def test_size_comes_from_flags_then_from_the_environment(four: str) -> None:
    def cells(*arguments: str, **environ: str) -> int:
        return max(len(line) for line in run("--db", four, *AT, *arguments, **environ)[1].split("\n"))
    assert 60 < cells() <= 80 and 100 < cells(COLUMNS="120") <= 120 and cells("--width", "50", COLUMNS="120") <= 50
    assert run("--db", four, *AT, LINES="6")[1].count("\n") <= 5
    assert run("--db", four, *AT, "--height", "7", LINES="60")[1].count("\n") <= 6
    assert run("--db", four, *AT, "--all", LINES="6")[1].count("\n") == 8


def test_colour_only_when_it_is_asked_for(four: str) -> None:
    assert "\x1b[" not in run("--db", four, *AT)[1]
    assert "\x1b[" in run("--db", four, *AT, "--color", "always", NO_COLOR="1")[1]
    plain = re.sub("\x1b\\[[0-9;]*m", "", run("--db", four, *AT, "--color", "always")[1])
    assert [line.rstrip() for line in plain.split("\n")] == run("--db", four, *AT)[1].split("\n"), "colour changes nothing else"


def test_a_station_without_data_yet_is_one_clear_line_and_no_failure(tmp_path: object) -> None:
    write(str(tmp_path) + "/co2d.conf", "[co2d]\ndb = %s/none\n" % tmp_path)
    config = ["--config", str(tmp_path) + "/co2d.conf"]
    for view in plot_ascii.VIEWS:
        status, out, err = run(view, *config)
        assert (status, err) == (0, "") and out.count("\n") == 1 and out.startswith("No data yet: "), view
    status, out, err = run("status", "--check", *config)
    assert (status, err) == (2, "") and out.count("\n") == 1 and out.startswith("CO2 CRITICAL: No data yet: no database yet")
    assert json.loads(run(*config, "--json")[1])["rows"] == []
    assert run(*config, "--plain")[:2] == (0, "")


def test_a_station_without_data_yet_has_html_pages_that_say_so_and_no_picture(tmp_path: Any) -> None:
    write(str(tmp_path) + "/co2d.conf", "[co2d]\ndb = %s/none\n" % tmp_path)
    config = ["--config", str(tmp_path) + "/co2d.conf"]
    page, picture = tmp_path / "page.html", tmp_path / "page.svg"
    picture.write_text("the picture of yesterday")
    assert run(*config, "--html", "-o", str(page)) == (0, "", "")
    assert "No data yet: no database yet" in checked(page.read_text()).text
    status, out, err = run(*config, "-o", str(picture))
    assert (status, out) == (0, "") and err.startswith("No data yet: ") and err.count("\n") == 1
    assert picture.read_text() == "the picture of yesterday"
    assert run(*config, "--html", "-o", str(tmp_path) + "/web/") == (0, "", "")
    assert sorted(os.listdir(str(tmp_path) + "/web")) == ["co2.html", "index.html", "status.html"]
    assert run("--db", str(tmp_path) + "/none", "--html", "-o", str(tmp_path) + "/other/")[0] == 1


def test_no_file_is_written_when_the_database_cannot_be_read(tmp_path: Any) -> None:
    for name in ("page.txt", "page.html", "page.svg"):
        file = tmp_path / name
        file.write_text("good")
        write(str(tmp_path) + "/text", "not a database " * 100)
        write(str(tmp_path) + "/co2d.conf", "[co2d]\ndb = %s/text\n" % tmp_path)
        status, out, err = run("--config", str(tmp_path) + "/co2d.conf", "-o", str(file), *["--html"] * name.endswith("html"))
        assert (status, out, file.read_text()) == (1, "", "good") and "cannot be read" in err


def test_one_site_that_cannot_be_written_keeps_no_other_from_its_page(tmp_path: Any) -> None:
    longest = "a" * 250
    names = [longest, "b, c", "d*", "d1", "[e]*", "f"]
    db = archive(str(tmp_path), [Unit(n, steady(), daily()) for n in range(1, 7)], "\n".join(
        "%d %s 10 deployed 2019-09-01" % (n, name.replace(" ", "_")) for n, name in enumerate(names, 1)))
    status, out, err = run("--db", db, "--html", "-o", str(tmp_path) + "/web/")
    assert (status, out) == (1, "") and err.startswith("plot_ascii: File name too long") and err.count("\n") == 1
    pages = {name for name in os.listdir(str(tmp_path) + "/web") if name.startswith("site-")}
    assert len(pages) == 5 and not [name for name in pages if name.endswith(".new")]
    for name, unit in (("site-d=2A.html", 3), ("site-b=2C_c.html", 2), ("site-=5Be=5D=2A.html", 5)):
        with open("%s/web/%s" % (tmp_path, name), encoding="utf-8") as file:
            text = file.read()
        assert {n for n in range(1, 7) if "unit-%02d" % n in text} == {unit}, name


def test_a_database_that_is_named_and_not_there_is_a_failure(tmp_path: object) -> None:
    status, out, err = run("--db", str(tmp_path) + "/none")
    assert (status, out) == (1, "") and err.count("\n") == 1 and "no database" in err


def test_another_file_than_a_database_is_one_clear_line(tmp_path: object, four: str) -> None:
    write(str(tmp_path) + "/text", "not a database " * 100)
    with open(four, "rb") as file, open(str(tmp_path) + "/torn", "wb") as torn:
        torn.write(file.read()[:30000])
    for name in ("text", "torn"):
        db = str(tmp_path) + "/" + name
        write(str(tmp_path) + "/co2d.conf", "[co2d]\ndb = %s\n" % db)
        for where in (["--db", db], ["--config", str(tmp_path) + "/co2d.conf"]):
            status, out, err = run(*where)
            assert (status, out) == (1, "") and err.startswith("plot_ascii: %s cannot be read (" % db) and err.count("\n") == 1


def test_an_empty_database_gives_one_line_per_view(tmp_path: object) -> None:
    db = archive(str(tmp_path), [])
    for view in plot_ascii.VIEWS:
        assert text_of(view, db).count("\n") == 1
        assert plot_ascii.to_tsv(page_of(view, db)) == ""


def test_a_reader_that_leaves_early_sees_no_traceback(four: str) -> None:
    command = "%s %s --db %s --all --panels --xmax 2019-09-26 | head -n 1" % (sys.executable, SCRIPT, four)
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert done.stdout.count(b"\n") == 1 and done.stderr == b""


@pytest.mark.parametrize("arguments", [["--min-tier", "99"], ["--xmax", "1999-01-01"]])
def test_nothing_that_matches_is_one_line(four: str, arguments: List[str]) -> None:
    for view in plot_ascii.VIEWS:
        status, out, err = run(view, "--db", four, *arguments)
        assert (status, err) == (0, ""), (view, err)
        assert out.count("\n") == 1 or view == "status" and "--xmax" in arguments, (view, out)


@pytest.mark.parametrize("arguments, why", [
    (["--site", "Vadso"], "no site is called 'Vadso'; the nearest names are Vadsø\n"),
    (["--site", "vj_re_sn_1,vj_re_sn_5"], "no site is called 'vj_re_sn_5'; the nearest names are vj_re_sn_"),
    (["--unit", "unit-06"], "no unit is called 'unit-06'; the nearest names are unit-0"),
    (["--unit", "1*"], "no unit is called '1*'")])
def test_a_name_that_nothing_has_is_a_failure_and_the_nearest_are_named(four: str, arguments: List[str], why: str) -> None:
    for view in plot_ascii.VIEWS:
        status, out, err = run(view, "--db", four, *arguments)
        assert (status, out) == (1, "") and err.startswith("plot_ascii: " + why) and err.count("\n") == 1, (view, err)


def test_a_unit_is_known_by_its_id_by_the_end_of_it_and_by_its_nickname(four: str) -> None:
    for name in ("co2unit-000000000002", "0002", "unit-02", "unit-02,unit-02", "*0002"):
        assert text_of("co2", four, unit=name) == text_of("co2", four, unit="unit-02"), name


@pytest.mark.parametrize("option, text, why", [
    ("width", "5", "5 is not a whole number from 20 to 1000"), ("recent-days", "nan", "nan is not a number from 0 to 100000"),
    ("glyphs", "emoji", "glyphs are one of auto, braille, block, ascii")])
def test_what_is_wrong_with_an_option_is_said_in_a_url_and_on_the_command_line(four: str, option: str, text: str, why: str) -> None:
    with pytest.raises(ValueError, match="^%s: %s" % (option, why)):
        plot_ascii.web_page("co2", four, {option: text}, True, seconds(NOW))
    status, out, err = run("--db", four, "--" + option, text)
    assert (status, out) == (2, "") and err.startswith("plot_ascii: %s: %s" % (option, why)) and err.count("\n") == 1


def test_what_is_missing_is_named(four: str, tmp_path: object) -> None:
    """A name that nothing has, a time without readings, an archive without units: three different things."""
    for view in plot_ascii.VIEWS:
        for options in ({"min_tier": 99}, {"max_tier": 9, "site": "Vads*"}, {"site": "Vads*", "unit": "unit-01"}):
            assert page_of(view, four, **options).empty == "No unit of that name at that site, or of that tier.", view
    assert page_of("co2", four, xmin="2019-09-01", xmax="2019-09-02").empty == "No readings in this time."
    empty = archive(str(tmp_path), [])
    assert {page_of(view, empty).empty for view in plot_ascii.VIEWS} == {"No units yet."}


@pytest.mark.parametrize("text, is_on", [("1", True), ("yes", True), ("True", True), ("on", True), ("0", False), ("no", False),
                                         ("FALSE", False), ("off", False), ("", False)])
def test_a_switch_in_a_url_is_as_in_the_configuration(text: str, is_on: bool) -> None:
    assert bool(Options.from_query({"wide": text}).wide) == is_on


def test_a_time_may_say_its_zone(four: str, oslo: str) -> None:
    def begin(xmin: str, tz: str) -> str:
        return str(page_of("gaps", four, xmin=xmin, tz=tz).facts["from"])
    assert begin("2019-09-20T12:00", "UTC") == begin("2019-09-20T14:00+02:00", "UTC") == "2019-09-20T12:00Z"
    assert begin("2019-09-20T12:00Z", oslo) == "2019-09-20T14:00+02:00" and begin("2019-09-20T12:00", oslo)[11:13] == "12"


def test_a_page_that_would_begin_after_its_end_is_refused(four: str) -> None:
    for options in ({"xmin": "2019-09-24", "xmax": "2019-09-23"}, {"xmin": "2030-01-01"}):
        with pytest.raises(ValueError, match="after its end"):
            page_of("co2", four, **options)
    late = page_of("co2", four, NOW + timedelta(days=99), xmin="2019-12-01")
    assert late.empty == "No readings in this time."


def test_a_name_in_a_url_that_nothing_has_is_no_page(four: str) -> None:
    for query in ({"site": "Vadsoe"}, {"unit": "unit-77"}):
        for html in (True, False):
            with pytest.raises(importer.UnknownName, match="is called '%s'" % list(query.values())[0]):
                plot_ascii.web_page("co2", four, query, html, seconds(NOW))
    with pytest.raises(ValueError, match="^there is no option sites; there are xmin, "):
        plot_ascii.web_page("co2", four, {"sites": "a"}, True, seconds(NOW))


def test_a_stdout_that_is_closed_or_full_is_one_line(four: str) -> None:
    for redirect, why in ((">&-", "stdout is closed"), (">/dev/full", "No space left on device")):
        done = subprocess.run("%s %s --db %s %s" % (sys.executable, SCRIPT, four, redirect), shell=True, stderr=subprocess.PIPE, timeout=60)
        assert (done.returncode, done.stderr.decode()) == (1, "plot_ascii: %s\n" % why)


def test_wrong_arguments_exit_with_2(four: str) -> None:
    for arguments in (["--width", "wide"], ["--xmin", "never"], ["weather"], ["--tz", "No/Where"], ["--glyphs", "emoji"]):
        status, out, err = run("--db", four, *arguments)
        assert (status, out) == (2, "") and "Traceback" not in err and err


def test_options_choose_rows_and_times(four: str) -> None:
    assert [row["site"] for row in records(page_of("co2", four, min_tier=20))] == ["vj_re_sn_1", "vj_re_sn_2", "Vadsø"]
    assert [row["site"] for row in records(page_of("co2", four, max_tier=20, site="V*,pa_*"))] == ["Vadsø", "pa_07"]
    assert [row["unit"] for row in records(page_of("status", four, unit="unit-01,unit-02"))] == ["unit-01", "unit-02"]
    assert page_of("co2", four, xmin="2019-09-20", xmax="2019-09-22").facts["from"] == "2019-09-20T00:00Z"
    assert page_of("co2", four, recent_days=2).facts["from"] == "2019-09-24T12:00Z"


# -- status --check ---------------------------------------------------------------------------------------------------


def check(capfd: Any, db: str, now: datetime, *arguments: str) -> Tuple[int, List[str]]:
    status = plot_ascii.main(["status", "--check", "--glyphs", "ascii", "--db", db, *arguments], seconds(now))
    return status, capfd.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Unit 1 is well; 2 calls but has sent nothing since the 20th; 3 is in the lab and silent; 4 calls every third day."""
    stuck, third = datetime(2019, 9, 20, 3), daily()[::3]
    return archive(str(tmp_path_factory.mktemp("watched")), [
        Unit(1, steady(), daily()), Unit(2, steady(end=stuck), daily()), Unit(3, steady(end=stuck), daily(end=stuck)),
        Unit(4, steady(end=third[-1][0]), third)], """
        1 a 30 deployed 2019-09-01
        2 b 20 deployed 2019-09-01
        3 c 10 deployed 2019-09-01 2019-09-18
        3 lab 0 lab_check 2019-09-18
        4 d 10 deployed 2019-09-01""")


WELL = "CO2 OK: 3 units | late=0 stuck=0 update=0 refused=0 sensor=0 weak=0 never=0 ok=2 off=1"


def test_a_fleet_that_is_well_is_one_line(capfd: Any, watched: str) -> None:
    assert check(capfd, watched, NOW, "--site", "a,d,lab") == (0, [WELL])


def test_a_name_that_nothing_has_is_critical_not_well(capfd: Any, watched: str) -> None:
    assert check(capfd, watched, NOW, "--site", "b") == check(capfd, watched, NOW, "--unit", "unit-02")
    importer.write_health(os.path.dirname(watched), [Problem("disk", "critical", "", "the disk is full", 0)], seconds(NOW))
    assert check(capfd, watched, NOW, "--site", "bb") == (2, ["CO2 CRITICAL: no site is called 'bb'; the nearest names are b, lab"])


def test_a_unit_that_calls_without_data_is_critical(capfd: Any, watched: str) -> None:
    status, lines = check(capfd, watched, NOW)
    assert status == 2 and len(lines) == 1
    assert re.match(r"CO2 CRITICAL: b \(unit-02\): no data since 2019-09-20 02:30 UTC, but .*\| late=0 stuck=1 .* ok=2 off=1$", lines[0]), lines


def test_lateness_is_judged_by_the_units_own_rhythm(capfd: Any, watched: str) -> None:
    def states(days: float) -> List[int]:
        return [check(capfd, watched, NOW + timedelta(days=days), "--site", site)[0] for site in ("a", "d", "lab")]
    assert [states(days) for days in (0, 1, 2, 5, 30)] == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [2, 1, 0], [2, 2, 0]]


def test_a_report_for_mail_comes_on_change_once_a_day_and_on_recovery(capfd: Any, watched: str, tmp_path: object) -> None:
    flags = ["--changes", str(tmp_path) + "/told", "--site", "a,b"]
    reports = [len(check(capfd, watched, NOW + timedelta(hours=hours), *flags)[1]) for hours in (0, 1, 22, 23, 24, 46, 48)]
    assert reports == [1, 0, 0, 2, 0, 0, 2]
    later = NOW + timedelta(hours=51)
    units = [Unit(n, steady(end=later), daily(end=later)) for n in (1, 2)]
    mended = archive(str(tmp_path), units, "1 a 30 deployed 2019-09-01\n2 b 20 deployed 2019-09-01", later)
    status, lines = check(capfd, mended, later, *flags)
    assert status == 0 and [line[:line.index(")") + 1] for line in lines[1:]] == ["well again: b (unit-02)", "well again: a (unit-01)"]
    assert check(capfd, mended, later, *flags) == (0, [])


@pytest.mark.parametrize("text", ["", "no JSON", "5", "[]", "{}", '{"a": 1}', '[1, 2]', '[1, []]', '["x", {}]', '[1, {"a": 5}]',
                                  '[1, {"a": [1]}]', '[null, {"a": ["b", "c"]}]'])
def test_a_file_of_changes_that_is_not_ours_counts_as_none(capfd: Any, watched: str, tmp_path: Any, text: str) -> None:
    file = tmp_path / "told"
    file.write_text(text)
    status, lines = check(capfd, watched, NOW, "--site", "b", "--changes", str(file))
    assert status == 2 and len(lines) == 1 and lines[0].startswith("CO2 CRITICAL: b (unit-02)")
    assert check(capfd, watched, NOW, "--site", "b", "--changes", str(file)) == (2, [])


@pytest.mark.parametrize("site, status", [("b", 2), ("a", 1)])
def test_problems_are_told_though_they_cannot_be_noted(watched: str, tmp_path: Any, site: str, status: int) -> None:
    flags = ["--site", site, "--changes", str(tmp_path / "nowhere" / "told")]
    call = "import sys, plot_ascii; sys.exit(plot_ascii.main(sys.argv[2:], int(sys.argv[1])))"
    now = seconds(NOW + timedelta(days=site == "a"))
    done = subprocess.run([sys.executable, "-c", call, str(now), "status", "--check", "--db", watched, *flags], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, cwd=os.path.dirname(SCRIPT), universal_newlines=True)
    assert done.returncode == status and done.stdout.startswith("CO2 ")
    assert done.stderr == "plot_ascii: No such file or directory: '%s.new'\n" % flags[-1]


def test_what_was_not_printed_is_not_noted_as_told(watched: str, tmp_path: Any) -> None:
    command = "%s %s status --check --db %s --changes %s/told > /dev/full" % (sys.executable, SCRIPT, watched, tmp_path)
    assert subprocess.run(command, shell=True, stderr=subprocess.DEVNULL).returncode == 1
    assert os.listdir(str(tmp_path)) == []


def test_a_wrong_configuration_is_a_line_for_monitoring(tmp_path: Any) -> None:
    write(str(tmp_path) + "/co2d.conf", "[co2d]\nprot = 80\n")
    conf = str(tmp_path) + "/co2d.conf"
    assert run("status", "--check", "--config", conf) == (2, "CO2 CRITICAL: %s:2: unknown setting 'prot'\n" % conf, "")
    assert run("status", "--config", conf)[:2] == (1, "")


@pytest.mark.parametrize("pager, shown", [("false", True), ("no-such-pager", True), ("cat", True), ("cat > /dev/null", False)])
def test_a_page_is_printed_where_the_pager_fails(capfd: Any, monkeypatch: Any, pager: str, shown: bool) -> None:
    monkeypatch.setenv("PAGER", pager)
    before = signal.getsignal(signal.SIGINT)
    try:
        plot_ascii.page_through("a page\n")
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().out == "a page\n" * shown


def test_every_page_refuses_times_that_are_none(four: str) -> None:
    for view in plot_ascii.VIEWS:
        for option in ("xmin", "xmax"):
            with pytest.raises(ValueError, match="not a date or time"):
                page_of(view, four, **{option: "2019-13-01"})


def test_of_a_missing_database_a_report_speaks_once(capfd: Any, tmp_path: object) -> None:
    flags = ["--changes", str(tmp_path) + "/told", "--repeat", "24"]       # as crontabs of earlier versions have it
    reports = [check(capfd, str(tmp_path) + "/none", NOW + timedelta(hours=hours), *flags) for hours in (0, 1, 23, 25)]
    assert [(status, len(lines)) for status, lines in reports] == [(2, 1), (2, 0), (2, 0), (2, 1)]


def test_check_without_a_database_is_critical(capfd: Any, tmp_path: object) -> None:
    status, lines = check(capfd, str(tmp_path) + "/none", NOW)
    assert status == 2 and len(lines) == 1


def test_check_of_a_broken_database_is_critical_not_a_warning(capfd: Any, tmp_path: object, four: str) -> None:
    db = str(tmp_path) + "/db"
    with contextlib.closing(sqlite3.connect(four)) as source, contextlib.closing(sqlite3.connect(db)) as broken:
        source.backup(broken)
        broken.execute("DROP TABLE pings")
    assert check(capfd, db, NOW) == (2, [
        "CO2 CRITICAL: %s cannot be read (no such table: pings): importer rebuild makes it anew" % db])


@pytest.mark.parametrize("line, complaint", [
    ("co2 --changes seen.txt", "--changes goes with status --check"),
    ("--check --xmax 2019-09-26", "--check tells how it is now: leave out --xmin and --xmax"),
    ("co2 --watch 5 -o page.txt", "--watch draws on this terminal"),
    ("status --watch 5 --check", "--watch draws on this terminal"),
])
def test_options_that_would_be_ignored_are_refused(capsys: Any, line: str, complaint: str) -> None:
    with pytest.raises(SystemExit) as ended:
        plot_ascii.main(line.split())
    assert ended.value.code == 2 and complaint in capsys.readouterr().err


def test_each_row_of_text_may_have_a_scale_of_its_own(four: str) -> None:
    common = page_of("co2", four)
    own = page_of("co2", four, own_scale=True)
    assert "own scales" in own.lines[0][0].text and "own scales" not in common.lines[0][0].text
    assert "co2_scale" in common.facts and "co2_scale" not in own.facts
    assert records(own) == records(common), "the numbers are the same"
    assert own.lines[2:6] != common.lines[2:6]
