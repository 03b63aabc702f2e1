#!/usr/bin/env python3
"""Pages for people at a terminal: CO2, pings, status, signal, errors and gaps of a fleet of sensor units, as text.

A page is made in one direction only:

    queries (importer)  ->  buckets, one for each column of the page  ->  `Page`: numbers, and the lines drawn from them
                                                                      ->  text, TSV, JSON, HTML
Words used here:

    axis      the columns of a chart in time. A column is a calendar step long (5 min ... 1 h ... 1 d ... 1 week ...
              5 years) and begins where such a step begins in the page's time zone; the shortest step that fits the
              width is taken (of many hundreds of rows a longer one), so a chart may be narrower than its room. Ticks
              stand on calendar steps too, no closer than their labels allow; where a year begins the label is the year.
    scale     from the least to the greatest value inside the *fence*, rounded outward. The fence is Tukey's for values
              far out: three interquartile distances beyond the quartiles of what all columns of the page hold. A value
              outside the scale is marked in its column, and counted: a spike neither vanishes nor flattens the page.
    gap       a column without readings is blank: never bridged, never zero. Only where a unit measures more seldom than
              the column is wide (`importer.buckets`) the value before is held.
    glyphs    three sets of characters in one table. `auto` is block, with braille in the large plots, and ascii where
              the user's locale is C. A page's own words are written in Unicode here and pass through `PLAIN` for ascii.
    span      text, style, link: what lines are made of. Foreign text gets into a span only through `clean`, which
              leaves no control or format character; width is counted in cells of a terminal, wide characters as two.
    part      a piece of a heading and its rank: where the line is too short, the last rank is shortened, then left out.
    cell      what a table holds: values for programs, spans for people. A list as value is a chart, a number a column.

Every row has its numbers in digits, and colour only repeats what the text says. --plain and --json have the numbers
that are drawn. A page costs columns x rows: what it has no room for is not asked for.

Left out on purpose: smoothing and interpolation, a second y axis, sixel and other graphics, keys to press (--watch
redraws in place with a few escape sequences, no curses), palettes beyond the terminal's own.
"""

from __future__ import annotations

import gc
import os
import re
import sqlite3
import struct
import sys
import time
from bisect import bisect_left, bisect_right
from datetime import datetime, timedelta
from functools import cached_property, lru_cache
from itertools import groupby
from math import ceil, floor, log10
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import importer

DAY = 86400                             # s
ZONE_SIGNS = str.maketrans("", "", "_+-")
EPOCH = datetime(1970, 1, 1)
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()

# -- glyphs -----------------------------------------------------------------------------------------------------------

# sub: places above each other in one cell of a large plot
BLOCK = {"ramp": "▁▂▃▄▅▆▇█", "days": "░▒▓█", "silent": "─", "open": "├", "close": "┤", "pings": "·▌█", "up": "▲",
         "down": "▼", "suspect": "?", "side": "│", "label": "┤", "zero": "┄", "last": "◂", "foot": "╵", "to": "–",
         "mean": "▀", "range": "░", "status": "█▒░", "part": "▂", "whisker": "─", "box": "━", "median": "█", "dot": "○",
         "limit": "┊", "none": "–", "degree": "°C", "sub": 2}
BRAILLE = {**BLOCK, "mean": "⠒", "range": "⠅", "sub": 4}
ASCII = {"ramp": ".:-=+*#%", "days": ".:+#", "silent": "-", "open": "[", "close": "]", "pings": ".|!", "up": "^",
         "down": "v", "suspect": "?", "side": "|", "label": "+", "zero": ".", "last": "<", "foot": "|", "to": "..",
         "mean": "*", "range": ":", "status": "=-.", "part": "_", "whisker": "-", "box": "=", "median": "#", "dot": "o",
         "limit": ".", "none": "-", "degree": "degC", "sub": 1}
Glyphs = Dict[str, Any]
# name -> glyphs of tables, glyphs of large plots, columns in one cell of a table's chart
GLYPHS: Dict[str, Tuple[Glyphs, Glyphs, int]] = {
    "auto": (BLOCK, BRAILLE, 1), "braille": (BLOCK, BRAILLE, 2), "block": (BLOCK, BLOCK, 1), "ascii": (ASCII, ASCII, 1)}
BARS = (0, 0x40, 0x44, 0x46, 0x47), (0, 0x80, 0xA0, 0xB0, 0xB8)         # braille: a half filled from below, left, right
DOTS = (0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08)               # braille: dots from below, left, right
PLAIN = str.maketrans({"·": "", "–": "-", "−": "-", "₂": "2", "°": "", "×": "x", "…": "..", "╷": "|", "▲": "^",
                       "▼": "v"})
LATIN = str.maketrans({"ø": "o", "Ø": "O", "æ": "ae", "Æ": "AE", "đ": "d", "Đ": "D", "ð": "d", "þ": "th", "ß": "ss",
                       "ł": "l", "ŋ": "n", "ŧ": "t"})

# -- text: foreign text made harmless, width in cells -----------------------------------------------------------------


def clean(text: object, ascii: bool = False) -> str:
    """Foreign text for a terminal: what does not print becomes ?, any space a plain one; ASCII letters lose marks."""
    found = str(text)
    if found.isascii() and found.isprintable():
        return found
    import unicodedata as u
    found = u.normalize("NFC", found)
    if ascii:
        found = "".join(c for c in u.normalize("NFKD", found.translate(LATIN)) if not u.combining(c))
    kinds = [(c, u.category(c)) for c in found if not "\ufe00" <= c <= "\ufe0f"]    # variation selectors: width unknown
    found = "".join(" " if kind == "Zs" else "?" if kind[0] == "C" or kind in ("Zl", "Zp") else c for c, kind in kinds)
    return found.encode("ascii", "replace").decode() if ascii else found


_NARROW = re.compile("[ -~¡-ſ–…₂−─-▿⠀-⣿]*").fullmatch        # our own characters: a cell each


def width(text: str) -> int:
    """Cells that clean text takes on a terminal."""
    return len(text) if _NARROW(text) else sum(map(_cells, text))


@lru_cache(maxsize=4096)
def _cells(c: str) -> int:
    import unicodedata as u
    return 0 if u.category(c) in ("Mn", "Me") or "\u1160" <= c <= "\u11ff" else 1 + (u.east_asian_width(c) in "WF")


def cut(text: str, cells: int) -> str:
    """Clean text in at most so many cells; a ~ stands for what is missing."""
    if width(text) <= cells:
        return text
    while width(text) > max(cells - 1, 0):
        text = text[:-1]
    return (text + "~")[:cells]


class Span(NamedTuple):
    """A piece of a line: clean text, one of STYLES, the site that it leads to."""
    text: str
    style: str = ""
    link: str = ""


Line = List[Span]
Part = Tuple[int, Sequence[str]]        # rank; a text, or its forms from long to short
# SGR codes
STYLES = {"head": "1", "bad": "1;31", "warn": "33", "good": "32", "dim": "2", "co2": "36", "temp": "35"}


def pad(spans: Sequence[Span], cells: int, right: bool = False) -> Line:
    """Spans made so many cells wide; a single one is cut."""
    free = cells - sum(width(span.text) for span in spans)
    if free < 0 and len(spans) == 1:
        spans = [spans[0]._replace(text=cut(spans[0].text, cells))]
        free = cells - width(spans[0].text)
    fill = Span(" " * free)
    return [fill, *spans] if right else [*spans, fill]


def runs(chars: Iterable[Tuple[str, str]]) -> Line:
    """Characters with their styles, as one span for each run of a style."""
    return [Span("".join(char for char, _ in group), style)
            for style, group in groupby(chars, key=lambda pair: pair[1])]


def count(n: int, what: str) -> str:
    """1 unit, 2 units."""
    return "%d %s%s" % (n, what, "s" * (n != 1))


def compact(value: Optional[float]) -> str:
    """ppm in at most four characters: 411, 1200, 10k."""
    return "" if value is None else "%.0f" % value if -950 < value < 9950 else "%.0fk" % (value / 1000)


def ago(seconds: float) -> str:
    """A time in at most eight characters: 12 min, 11 h, 9 d 02 h, 13 d."""
    hours = int(seconds // 3600)
    if hours < 24:
        return "%d h" % hours if hours else "%d min" % (seconds // 60)
    return "%d d %02d h" % divmod(hours, 24) if hours < 240 else "%d d" % (hours // 24)


# -- time: zones, calendar steps, axes, ticks -------------------------------------------------------------------------


ZONES = ("/usr/share/zoneinfo", "/usr/lib/zoneinfo", "/usr/share/lib/zoneinfo", "/etc/zoneinfo")
LAST_YEAR = 2100


def read_zone(name: str) -> Tuple[List[int], List[int]]:
    """When the clocks of a zone change, in UTC seconds, and by how many seconds they are ahead of UTC: before the first
    change, then after each. From the system's file (RFC 8536): Python's own zoneinfo came with 3.9, and time.tzset is
    for a whole process, in which other threads draw other pages."""
    for folder in ZONES if all(part and part.translate(ZONE_SIGNS).isalnum() for part in name.split("/")) else ():
        try:
            with open(os.path.join(folder, name), "rb") as file:
                raw = file.read()
            return parse_zone(raw)
        except (OSError, ValueError, IndexError, struct.error):
            continue
    raise ValueError("no time zone %s is known on this machine" % clean(name, True)[:40])


def parse_zone(raw: bytes) -> Tuple[List[int], List[int]]:
    """A file of version 2 or later: a header and data in 32 bits, the same in 64 bits, a rule for the time after."""
    def counts(at: int) -> Tuple[int, ...]:     # of: UT marks, standard marks, leap seconds, changes, types, letters
        magic, version, *numbers = struct.unpack_from(">4sc15x6L", raw, at)
        if magic != b"TZif" or version < b"2":
            raise ValueError("no such file")
        return tuple(numbers)
    ut, standard, leaps, times, types, letters = counts(0)
    at = 44 + times * 5 + types * 6 + letters + leaps * 8 + standard + ut
    ut, standard, leaps, times, types, letters = counts(at)
    changes = list(struct.unpack_from(">%dq" % times, raw, at + 44))
    at += 44 + times * 8
    ahead = [struct.unpack_from(">l", raw, at + times + 6 * kind)[0] for kind in (0, *raw[at:at + times])]
    at += times + types * 6 + letters + leaps * 12 + standard + ut
    for ts, seconds in zone_rule(raw[at:].decode("ascii").strip()):
        if not changes or ts > changes[-1]:
            changes.append(ts)
            ahead.append(seconds)
    return changes, ahead


def zone_rule(text: str) -> List[Tuple[int, int]]:
    """The changes by a rule like CET-1CEST,M3.5.0,M10.5.0/3 (POSIX, variable TZ), and the seconds ahead of UTC then."""
    names, *days = text.split(",")
    offsets = [-_clock(found) for found in re.findall(r"(?:<[^>]*>|[A-Za-z]+)([-+:0-9]*)", names)]
    if not days:
        return []
    standard, summer = offsets if names[-1].isdigit() else (offsets[0], offsets[0] + 3600)
    return sorted(change for year in range(EPOCH.year, LAST_YEAR + 1) for change in (
        (_change(year, days[0]) - standard, summer), (_change(year, days[1]) - summer, standard)))


def _change(year: int, rule: str) -> int:
    """M10.5.0/3: the fifth (or last) Sunday of October at 3, in seconds on the clock. Other forms are not in use."""
    day, _, clock = rule.partition("/")
    month, week, weekday = map(int, day[1:].split("."))
    first = datetime(year, month, 1)
    date = first + timedelta(days=(weekday - first.isoweekday()) % 7 + 7 * (week - 1))
    date -= timedelta(days=7 * (date.month != month))
    return int((date - EPOCH).total_seconds()) + _clock(clock or "2")


def _clock(text: str) -> int:
    seconds = sum(int(part) * unit for part, unit in zip(text.strip("+-").split(":"), (3600, 60, 1)) if part)
    return -seconds if text.startswith("-") else seconds


class Zone:
    """Local times as naive datetimes, and back. Where clocks are set back, the first of the two is meant."""

    def __init__(self, name: str = "UTC") -> None:
        self.name = clean(name)
        self.changes, self.ahead = ([], [0]) if name.upper() == "UTC" else read_zone(name)
        self.walls = [ts + max(pair) for ts, pair in zip(self.changes, zip(self.ahead, self.ahead[1:]))]

    def local(self, ts: float) -> datetime:
        """UTC seconds as local time."""
        return EPOCH + timedelta(seconds=ts + self.ahead[bisect_right(self.changes, ts)])

    def seconds(self, local: datetime) -> int:
        """Local time as UTC seconds."""
        clock = (local - EPOCH).total_seconds()
        return int(clock - self.ahead[bisect_right(self.walls, clock)])

    def iso(self, ts: int) -> str:
        """For data: to the minute, with the offset, 2019-09-26T14:00+02:00; Z for UTC."""
        offset = int((self.local(ts) - EPOCH).total_seconds() - ts) // 60
        return self.local(ts).strftime("%Y-%m-%dT%H:%M") + ("%+03d:%02d" % divmod(offset, 60) if offset else "Z")

    def parse(self, text: str) -> int:
        """UTC seconds of a date or date-time in this zone, or in the one that it says: ...Z, ...+02:00."""
        try:
            found = datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith("Z") else text)
        except ValueError:
            raise ValueError("not a date or time like 2019-09-26 or 2019-09-26T12:00: %s" % clean(text, True)[:40])
        ahead = found.utcoffset()
        local = min(max(found.replace(tzinfo=None), datetime(1970, 1, 2)), datetime(2100, 1, 1))
        return self.seconds(local) if ahead is None else int((local - ahead - EPOCH).total_seconds())

    def short(self, ts: int, now: int) -> str:
        """26 Sep 12:00, or 26 Sep 2018 when it was in another year."""
        same = self.local(ts).year == self.local(now).year
        return _date(self.local(ts), not same, same)

    def period(self, a: int, b: int, to: str) -> Tuple[str, ...]:
        """A range for a heading, with the zone, in shorter and shorter forms. Of whole days the last is named."""
        one, other = self.local(a), self.local(b)
        midnight = other == snap(other, TODAY)
        days = b - a > 99 * DAY or midnight and one == snap(one, TODAY)
        other -= timedelta(seconds=days and midnight)
        last = "%s %s" % (_date(other, True, False), self.name)
        if days and one.date() == other.date():
            return (last,)
        long, short = ("%s %s %s %s" % (_date(one, one.year != other.year, clock), to, _date(other, True, clock),
                                        self.name) for clock in (not days, False))
        return long, short, last


def _date(local: datetime, year: bool, clock: bool) -> str:
    return "%d %s" % (local.day, MONTHS[local.month - 1]) + " %d" % local.year * year + local.strftime(" %H:%M") * clock


Step = Tuple[str, int]                  # unit, how many
TODAY = ("day", 1)
STEPS: Dict[str, Step] = {
    "5 min": ("min", 5), "10 min": ("min", 10), "30 min": ("min", 30), "1 h": ("min", 60), "2 h": ("min", 120),
    "3 h": ("min", 180), "6 h": ("min", 360), "12 h": ("min", 720), "1 d": ("day", 1), "2 d": ("day", 2),
    "3 d": ("day", 3), "1 week": ("day", 7), "2 weeks": ("day", 14), "1 month": ("month", 1), "2 months": ("month", 2),
    "3 months": ("month", 3), "6 months": ("month", 6), "1 year": ("month", 12), "5 years": ("month", 60)}
TICKS: List[Step] = [("min", n) for n in (10, 30, 60, 120, 180, 360, 720)] + \
                    [("date", n) for n in (1, 2, 3, 5, 10, 15)] + [("month", n) for n in (1, 2, 3, 6, 12, 24, 60, 120)]


def snap(local: datetime, step: Step, on: int = 0) -> datetime:
    """Where the calendar step begins in which a time falls, or one that many steps later. Weeks begin on Monday, dates
    count from the 1st of their month, and leave out one that is too close to the next 1st."""
    unit, n = step
    day = local.replace(hour=0, minute=0, second=0, microsecond=0)
    if unit == "min":
        return day + timedelta(minutes=((local.hour * 60 + local.minute) // n + on) * n)
    if unit == "month":
        months = ((local.year * 12 + local.month - 1) // n + on) * n
        return day.replace(year=months // 12, month=months % 12 + 1, day=1)
    if unit == "date":
        date = (local.day - 1) // n * n + 1
        return day.replace(day=date - n if n > 1 and date + 0.6 * n > 31 else date)
    return day + timedelta(days=n * on - (day.toordinal() - 1) % n)


def length(step: Step) -> int:
    """Seconds of a step at the most, but for days that clocks make longer."""
    return step[1] * {"min": 60, "month": 31 * DAY}.get(step[0], DAY)


class Axis(NamedTuple):
    """Columns of a chart."""
    edges: List[int]                    # UTC seconds, one more than columns
    step: str
    cells: int
    heading: str                        # ticks with their labels; ╷ stands at the tick


def make_axis(zone: Zone, a: int, b: int, cells: int, exact: bool, per_cell: int = 1, least: str = "30 min") -> Axis:
    """Columns from a to b. Unless `exact`, a first one that would begin before a is left out."""
    names = list(STEPS)[list(STEPS).index(least):]
    fitting = [name for name in names if b - a < (cells * per_cell + 1) * length(STEPS[name]) + DAY]
    for name in fitting or names[-1:]:
        step, start = STEPS[name], snap(zone.local(a), STEPS[name])
        if not exact and zone.seconds(start) < a and zone.seconds(snap(start, step, 1)) < b:
            start = snap(start, step, 1)
        edges = [zone.seconds(start)]
        while edges[-1] < b and len(edges) <= cells * per_cell:
            start = snap(start, step, 1)
            if zone.seconds(start) > edges[-1]:     # an hour that the clocks skip has no column
                edges.append(zone.seconds(start))
        if edges[-1] >= b:
            break
    used = ceil((len(edges) - 1) / per_cell)
    return Axis(edges, name, used, heading(make_ticks([zone.local(edge) for edge in edges], per_cell, used), used))


def heading(ticks: Iterable[Tuple[int, str]], cells: int) -> str:
    """A line with ticks and their labels."""
    line = ""
    for cell, label in ticks:
        line += " " * (cell - len(line)) + "╷" + label
    return line + " " * (cells - len(line))


def make_ticks(times: Sequence[datetime], per_cell: int, cells: int) -> List[Tuple[int, str]]:
    """Ticks on the smallest calendar steps whose labels do not meet."""
    least = (times[-1] - times[0]).total_seconds() / (0.7 * cells + 2)      # closer ticks have no room for their labels
    for step in [step for step in TICKS if length(step) >= least] or TICKS[-1:]:
        ticks = [(j // per_cell, _label(tick, step)) for j, (one, other) in enumerate(zip(times, times[1:]))
                 for tick in [snap(other - timedelta(seconds=1), step)] if tick >= one]
        chosen = spaced(ticks, cells)
        if len(chosen) >= 0.8 * len(ticks):
            break
    return chosen


def _label(tick: datetime, step: Step) -> str:
    if step[0] == "min" and (tick.hour or tick.minute):
        return tick.strftime("%H:%M")
    if tick.month == tick.day == 1:
        return str(tick.year)
    return _date(tick, False, False) if step[0] == "min" else MONTHS[tick.month - 1] if tick.day == 1 else str(tick.day)


def spaced(ticks: Iterable[Tuple[int, str]], cells: int) -> List[Tuple[int, str]]:
    """Ticks whose labels have room, from the left; but a year goes before the label left of it."""
    kept: List[Tuple[int, str]] = []
    for cell, label in ticks:
        if kept and len(label) == 4 and label.isdigit() and kept[-1][0] + len(kept[-1][1]) >= cell:
            kept.pop()
        if (not kept or kept[-1][0] + len(kept[-1][1]) < cell) and cell + len(label) < cells:
            kept.append((cell, label))
    return kept


# -- scales -----------------------------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """Values from low to high."""
    low: float
    high: float
    log: bool = False

    def level(self, value: float, levels: int) -> int:
        """0 ... levels - 1, the outermost for what is outside."""
        low, high, value = map(_log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        at = int((value - low) / (high - low) * levels)
        return 0 if at < 0 else at if at < levels else levels - 1


def _log(value: float) -> float:
    return log10(max(value, 1e-3))


def nice(size: float) -> float:
    """The next of 1, 2, 5, 10, 20 ... that is not smaller."""
    power = 10.0 ** floor(log10(size))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= size * 0.9999)


def make_scale(buckets: Iterable[Optional[importer.Bucket]], narrow: float, top: Optional[float] = None,
               log: bool = False) -> Scale:
    """All values inside the fence, rounded outward. `narrow` is the least interquartile distance the fence believes."""
    there = [bucket for bucket in buckets if bucket]
    usable: List[Any] = [bucket.low for bucket in there if bucket.n] + [bucket.high for bucket in there if bucket.n]
    ends = sorted(usable or [end for bucket in there for end in (bucket.suspect_low, bucket.suspect_high)
                             if end is not None] or [0, 4 * narrow])
    lower, upper = ends[len(ends) // 4], ends[len(ends) * 3 // 4]
    reach = 3 * max(upper - lower, narrow)
    inside = [end for end in ends if lower - reach <= end <= upper + reach]
    unit = nice(max(inside[-1] - inside[0], 1) / 15)
    low, high = floor(inside[0] / unit) * unit, ceil(inside[-1] / unit) * unit
    more = max(narrow / 5 - (high - low), 0) / 2
    low, high = low - more, top if top is not None else high + more
    low = low if low < high else high / 2
    return Scale(max(low, 1), max(high, 2), True) if log else Scale(low, high)


def make_rows(scale: Scale, rows: int) -> Tuple[Scale, List[str]]:
    """A scale stretched so that the middles of a plot's rows are round numbers, and the rows' labels, from below."""
    if scale.log:
        low, step = _log(scale.low), (_log(scale.high) - _log(scale.low)) / max(rows - 1, 1)
        return (Scale(10 ** (low - step / 2), 10 ** (low + step * (rows - 0.5)), True),
                [compact(10 ** (low + row * step)) if row % 2 == 0 else "" for row in range(rows)])
    unit = nice(scale.high - scale.low) / 1000
    for step in [n * unit * ten for ten in (1, 10, 100, 1000, 10000, 100000) for n in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5)]:
        first = floor(scale.low / step + 0.5)
        labels = [_row_label(row * step) if rows < 5 or row % 2 == 0 else "" for row in range(first, first + rows)]
        if scale.high <= (first + rows - 0.5) * step and max(map(len, labels)) <= 4:
            break
    return Scale((first - 0.5) * step, (first + rows - 0.5) * step), labels


def _row_label(value: float) -> str:
    return "%.4g" % value if abs(value) < 10000 else "%.4gk" % (value / 1000)

# -- what a page is asked for -----------------------------------------------------------------------------------------


def number(low: float, high: float, kind: Any = float) -> Callable[[str], Any]:
    """A parser of numbers in a range."""
    def parse(text: str) -> Any:
        try:
            if low <= kind(text) <= high:
                return kind(text)
        except ValueError:
            pass
        kind_of = " whole" * (kind is int)
        raise ValueError("%s is not a%s number from %g to %g" % (clean(text, True)[:40], kind_of, low, high))
    parse.__name__ = "number"           # argparse says: invalid number value
    return parse


def patterns(text: str) -> str:
    """Names or patterns, with as many stars as can be matched in good time."""
    if text.count("*") > 8 or len(text) > 2000:
        raise ValueError("too many stars or letters in a pattern")
    return text


def glyph_set(text: str) -> str:
    """The name of a set of glyphs."""
    if text not in GLYPHS:
        raise ValueError("glyphs are one of " + ", ".join(GLYPHS))
    return text


# name, also in URLs -> default, parser, metavar, help
OPTIONS: Dict[str, Tuple[Any, Any, str, str]] = {
    "xmin": (None, str, "DATE", "begin: 2019-09-01, or 2019-09-01T12:00"),
    "xmax": (None, str, "DATE", "end: the page as it was then"),
    "recent_days": (None, number(0, 1e5), "N",
                    "the last N days, 0 for all (co2 14, one site 365, pings 364, signal and gaps 30, errors 84)"),
    "min_tier": (None, number(-1e6, 1e6, int), "N", "only deployments of this tier and above"),
    "max_tier": (None, number(-1e6, 1e6, int), "N", "only deployments of this tier and below"),
    "co2_max": (None, number(1, 5e5), "PPM", "top of the CO2 scale"),
    "unit": (None, patterns, "NAME", "units by id or nickname; several with commas, or patterns: a,b*"),
    "site": (None, patterns, "NAME", "sites, likewise"),
    "tz": ("UTC", str, "ZONE", "time zone of the page, like Europe/Oslo"),
    "width": (80, number(20, 1000, int), "CELLS", "cells of a line"),
    "height": (24, number(5, 100000, int), "LINES", "lines of the screen"),
    "glyphs": ("auto", glyph_set, "SET", "auto, braille, block or ascii"),
    "all": (False, bool, "", "all rows, however many"),
    "log": (False, bool, "", "logarithmic CO2 scale"),
    "panels": (False, bool, "", "co2: every deployment in detail"),
    "ping_limit": (None, number(0.1, 1e5), "HOURS",
                   "status: late without a ping for so long (by the unit's own rhythm)"),
    "data_limit": (None, number(0.1, 1e5), "HOURS", "status: late without readings for so long")}


class Options(SimpleNamespace):
    """A value for each of OPTIONS."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{**{name: row[0] for name, row in OPTIONS.items()}, **given})

    def but(self, **changes: Any) -> Options:
        """The same with some changed."""
        return Options(**{**self.__dict__, **changes})

    @classmethod
    def from_query(cls, query: Dict[str, str]) -> Options:
        """From the arguments of a URL or of a command line; names that are none of ours are no matter."""
        given = {}
        for name, (_, kind, _, _) in OPTIONS.items():
            text = query.get(name.replace("_", "-"))
            try:
                if text:
                    given[name] = text not in ("0", "no", "false") if kind is bool else kind(text)
            except ValueError as error:
                raise ValueError("%s: %s" % (name.replace("_", "-"), error))
        return cls(**given)


class Context:
    """What a view draws with: the database, the options, and the time that is now on the page (UTC seconds)."""

    def __init__(self, db: Any, o: Options, now: float, rows: Optional[int]) -> None:
        self.db, self.o, self.zone, self.rows = db, o, Zone(o.tz), rows
        self.width: int = o.width
        self.now = int(now) if o.xmax is None else min(int(now), self.zone.parse(o.xmax))
        self.g, self.plot, self.per_cell = GLYPHS[o.glyphs]
        self.ascii = o.glyphs == "ascii"

    def room(self, others: int) -> Optional[int]:
        """How many rows a page has room for beside other lines; None: for any number."""
        return None if self.rows is None else max(1, self.rows - others)

    def say(self, text: str) -> str:
        """Our own text in the page's characters."""
        return text.translate(PLAIN) if self.ascii else text

    def name(self, text: Any) -> str:
        """Foreign text in the page's characters."""
        return clean(text, self.ascii)

    def head(self, parts: Iterable[Part], style: str = "head") -> Line:
        """A line of parts, in order, as far as they fit."""
        left = [(rank, [self.say(form) for form in ([forms] if isinstance(forms, str) else forms)])
                for rank, forms in parts if forms]
        while True:
            text = self.say(" · ").join(forms[0] for _, forms in left)
            if width(text) <= self.width or len(left) == 1 and len(left[0][1]) == 1:
                return [Span(cut(text, self.width), style)]
            worst = max(range(len(left)), key=lambda i: left[i][0])
            rank, forms = left[worst]
            left[worst:worst + 1] = [(rank, forms[1:])] if len(forms) > 1 else []

    @cached_property
    def stays(self) -> List[importer.Deployment]:
        """The deployments that are asked for, highest tier first; units that never had one come last."""
        o = self.o

        def among(asked: Optional[str], *names: str) -> bool:
            if not asked:
                return True
            from fnmatch import fnmatchcase
            return any(name == asked or fnmatchcase(name, one) for one in asked.split(",") for name in names)
        return [stay for stay in importer.deployments(self.db) if among(o.site, stay.site or stay.nickname)
                and among(o.unit, stay.nickname, stay.unit_id, stay.unit_id.replace("co2unit-", "", 1))
                and (o.min_tier is None or stay.tier is not None and stay.tier >= o.min_tier)
                and (o.max_tier is None or stay.tier is not None and stay.tier <= o.max_tier)]

    def nobody(self) -> str:
        """Why there are no stays."""
        o = self.o
        asked = o.site or o.unit or o.min_tier is not None or o.max_tier is not None
        return "No site or unit by that name or tier." if asked else "No units yet."

    def range(self, table: str, spans: Iterable[importer.Span], days: float) -> Tuple[int, int, bool]:
        """From, to, and whether the begin is exact. Without --xmax a page ends now, or with the newest row of the spans
        when none has come for as long as the page shows; without --xmin it begins no earlier than the first."""
        units, since, until = zip(*spans)
        first, last = importer.extent(self.db, table, sorted(set(units)), self.now)
        if first is not None and last is not None:
            first, last = max(first, min(since)), min(last, max(until) - 1)
        asked = None if self.o.xmin is None else self.zone.parse(self.o.xmin)
        days = days if self.o.recent_days is None else self.o.recent_days or 1e5
        over = last is not None and self.now - last > days * DAY and (asked is None or asked < last)
        end = last + 1 if last is not None and over and self.o.xmax is None else self.now
        if asked is not None and asked > end:
            raise ValueError("the page would begin after its end: %s" % clean(self.o.xmin, True))
        begin = int(end - days * DAY) if asked is None else min(asked, end - 300)
        if asked is None and first is not None and begin < first < end - 300:
            return first, end, True
        return max(begin, DAY), end, asked is not None


# -- pages: the numbers, and the lines drawn from them ----------------------------------------------------------------


class Page(NamedTuple):
    """One view."""
    view: str
    facts: Dict[str, Any]               # of the page as a whole, for JSON
    fields: List[str]
    records: List[List[Any]]            # a list in a record is a chart
    lines: List[Line]
    axes: Dict[str, List[str]] = {}     # field of a chart -> where each of its columns begins
    empty: str = ""                     # why there is nothing to show


class Column(NamedTuple):
    """A column of a table."""
    fields: Sequence[str]               # the names of its values in TSV and JSON
    head: str
    width: int                          # cells; of a chart the least
    rank: int = 0                       # what does not fit goes, the highest first; 0 stays
    right: bool = False
    gap: int = 1                        # cells before it
    chart: bool = False                 # in time; takes the room that is left, the first chart first
    margin: int = 0                     # cells on both sides of a chart
    most: int = 0                       # cells that its longest text takes, if there is room left


class Cell(NamedTuple):
    """Values, and how they are drawn."""
    values: Sequence[Any]
    spans: Sequence[Span]


def cell(text: str, value: Any, style: str = "", link: str = "") -> Cell:
    """One value, one span."""
    return Cell((value,), (Span(text, style, link),))


def nothing(view: str, why: str) -> Page:
    """A page that says why it is empty."""
    return Page(view, {}, [], [], [[Span(why)]], {}, why)


MOST_CELLS = 60000                      # of a page's charts, for a third of a second: many rows get wider columns


class Table:
    """Rows under headings; where the page is narrow, columns go by rank; charts take what is left."""

    def __init__(self, c: Context, columns: Iterable[Column], a: int = 0, b: int = 1, exact: bool = True,
                 least: str = "30 min", per_cell: int = 1, rows: int = 1) -> None:
        self.c, self.columns = c, list(columns)
        self.kept, self.axes = list(range(len(self.columns))), {}       # type: List[int], Dict[str, Axis]
        while self.spare() < 0 and any(self.columns[i].rank for i in self.kept):
            self.kept.remove(max(self.kept, key=lambda i: self.columns[i].rank))
        for i, column in enumerate(self.columns):
            if column.chart:
                cells = column.width - 2 * column.margin + (self.spare() if i in self.kept else 0)
                most = MOST_CELLS // rows // per_cell // sum(one.chart for one in self.columns)
                axis = make_axis(c.zone, a, b, max(min(cells, most), 4), exact, per_cell, least)
                self.axes[column.fields[0]] = axis
                self.columns[i] = column._replace(head=" " * column.margin + c.say(axis.heading),
                                                  width=axis.cells + 2 * column.margin)

    def spare(self) -> int:
        """Cells that no column takes."""
        return self.c.width + 1 - sum(self.columns[i].width + self.columns[i].gap for i in self.kept)

    def line(self, cells: Sequence[Sequence[Span]]) -> Line:
        """One line of the table."""
        gaps = [[Span(" " * column.gap)] if i else [] for i, column in enumerate(self.columns)]
        return [span for i in self.kept
                for span in gaps[i] + pad(cells[i], self.columns[i].width, self.columns[i].right)]

    def page(self, view: str, title: Iterable[Part], span: Tuple[int, int], rows: Sequence[Sequence[Cell]], hidden: int,
             notes: Iterable[Part], **facts: Any) -> Page:
        """Title, headings, rows, and a line that says how many rows are not here and what the glyphs mean."""
        iso = self.c.zone.iso
        for i in self.kept:
            column = self.columns[i]
            self.columns[i] = column._replace(width=max(column.width, min(column.most, column.width + self.spare())))
        lines = [self.c.head(title), self.line([(Span(column.head, "dim"),) for column in self.columns])]
        lines += [self.line([each.spans for each in row]) for row in rows]
        lines.append(self.c.head([(0, "+%d more (--all)" % hidden if hidden else ""), *notes], "dim"))
        return Page(view, {"from": iso(span[0]), "to": iso(span[1]), **facts},
                    [field for column in self.columns for field in column.fields],
                    [[value for each in row for value in each.values] for row in rows], lines,
                    {field: [iso(edge) for edge in axis.edges[:-1]] for field, axis in self.axes.items()})


def names_of(c: Context, what: str, names: Iterable[str], rank: int = 0) -> Column:
    """A column for the names of sites or units: an eighth of the page, or more where nothing else takes it."""
    most = max([4, *(width(c.name(name)) for name in set(names))])
    return Column((what,), what, min(most, max(11, c.width // 8)), rank, most=most)


def who(c: Context, stays: Sequence[Union[importer.Deployment, importer.UnitState]], rank: int = 3) -> List[Column]:
    """Columns for site and unit."""
    return [names_of(c, "site", [stay.site or "[no site]" for stay in stays]),
            names_of(c, "unit", [stay.nickname for stay in stays], rank)]


def who_cells(c: Context, stay: Union[importer.Deployment, importer.UnitState]) -> List[Cell]:
    """The site, which leads to its page, and the unit."""
    return [cell(c.name(stay.site or "[no site]"), stay.site, "", stay.site or ""),
            cell(c.name(stay.nickname), stay.nickname)]


def bars(c: Context, values: Sequence[Optional[float]], scale: Scale, style: str = "",
         marks: Sequence[str] = ()) -> Line:
    """Values as bars, in braille two to a cell; a mark (up, down, suspect) takes the place of a bar."""
    if c.per_cell == 1:
        chars = [" " if value is None else c.g["ramp"][scale.level(value, 8)] for value in values]
    else:
        pairs = zip(values[::2], [*values[1::2], None])
        chars = [chr(0x2800 + sum(half[1 + scale.level(value, 4)] for half, value in zip(BARS, pair)
                                  if value is not None)) if pair != (None, None) else " " for pair in pairs]
    if not any(marks):
        return [Span("".join(chars), style)]
    worst = [max(marks[at:at + c.per_cell], key=RANKS.index) for at in range(0, len(values), c.per_cell)]
    return runs((c.g[mark], "bad") if mark else (char, style) for char, mark in zip(chars, worst))


RANKS = ("", "suspect", "down", "up")


def shown(form: str, value: Optional[float], none: str = "") -> str:
    """A number, or what stands for none."""
    return none if value is None else form % value


# -- co2: a row per site ----------------------------------------------------------------------------------------------

Buckets = List[Optional[importer.Bucket]]


class Row(NamedTuple):
    """A site with its stays, or a unit with all its readings, deployed or not."""
    name: str
    stays: List[importer.Deployment]
    spans: List[importer.Span]

    def within(self, a: int, b: int) -> List[importer.Span]:
        """The spans, cut to a range."""
        return [(unit, max(since, a), min(until, b)) for unit, since, until in self.spans if since < b and until > a]


def spans_of(stays: Iterable[importer.Deployment]) -> List[importer.Span]:
    """When each unit stayed there."""
    return [(stay.unit_id, stay.since, stay.until) for stay in stays]


def rows_of(stays: Sequence[importer.Deployment], by_unit: bool) -> List[Row]:
    """One row for each site, or for each unit."""
    groups: Dict[str, List[importer.Deployment]] = {}
    for stay in stays:
        groups.setdefault(stay.unit_id if by_unit or stay.site is None else "@" + stay.site, []).append(stay)
    return [Row(group[0].nickname if by_unit or group[0].site is None else group[0].site, group,
                [(group[0].unit_id, 0, importer.FOREVER)] if by_unit else spans_of(group))
            for group in groups.values()]


def view_co2(c: Context) -> Page:
    """All sites; or one site or unit in detail; or, with --panels, every stay in detail."""
    by_unit = bool(c.o.unit and not c.o.site)
    rows = rows_of(c.stays, by_unit)
    alone = len(rows) == 1 and bool(c.o.unit or c.o.site)
    a, b, exact = c.range("co2_readings", [span for row in rows for span in row.spans], 365 if alone else 14)
    if c.o.panels and not by_unit:
        rows = [Row(stay.site or stay.nickname, [stay], spans_of([stay])) for stay in c.stays]
    rows = [row for row in rows if row.within(a, b)]
    if not rows:
        return nothing("co2", "No readings in this time.")
    if c.o.panels:
        return panels(c, rows, a, b, exact)
    return site(c, rows[0], a, b, exact) if alone else fleet(c, rows, a, b, exact)


def mean(bucket: Optional[importer.Bucket]) -> Optional[float]:
    """Of usable values; None without any."""
    return bucket.total / bucket.n if bucket and bucket.n else None


def ends(buckets: Buckets) -> Tuple[Optional[float], Optional[float]]:
    """Least and greatest value, suspect ones included."""
    there = [bucket for bucket in buckets if bucket]
    usable, suspect = [one for one in there if one.n], [one for one in there if one.suspects]
    low: List[Any] = [one.low for one in usable] + [one.suspect_low for one in suspect]
    high: List[Any] = [one.high for one in usable] + [one.suspect_high for one in suspect]
    return min(low, default=None), max(high, default=None)


def marks_of(buckets: Buckets, scale: Scale) -> List[str]:
    """What stands in columns instead of their means: up or down where values are off the scale, suspect where there are
    readings and none is usable."""
    def mark(bucket: Any) -> str:
        if bucket is None:
            return ""
        _, _, _, n, _, low, high, suspects, suspect_low, suspect_high = bucket
        if n and high > scale.high or suspects and suspect_high > scale.high:
            return "up"
        if n and low < scale.low or suspects and suspect_low < scale.low:
            return "down"
        return "" if n else "suspect"
    return list(map(mark, buckets))


def off_scale(c: Context, what: str, row: Row, buckets: Buckets, scale: Scale, marks: Sequence[str]) -> Tuple[int, int]:
    """How many values are below and above the scale."""
    marked = [bucket for bucket, mark in zip(buckets, marks) if bucket and mark in ("up", "down")]
    if not marked:
        return 0, 0
    spans = row.within(min(bucket.first for bucket in marked), max(bucket.last for bucket in marked) + 1)
    return importer.count_outside(c.db, what, spans, scale.low, scale.high)


def fleet(c: Context, rows: List[Row], a: int, b: int, exact: bool) -> Page:
    """A row per site: all on one time axis, and on one scale. Of very many rows the columns are days, from rollups."""
    here = rows[:c.room(3)]
    many = len(here) > 250 and b - a > 3 * DAY
    t = Table(c, [names_of(c, "site", [row.name for row in rows]), Column(("co2",), "", 14, chart=True),
                  Column(("ppm",), "ppm", 4, 1, True), Column(("min", "max"), "range", 7, 3, True, 2),
                  Column(("temp",), "", 7, 4, gap=2, chart=True),
                  Column(("celsius",), c.g["degree"], 5, 2, True), Column(("late", "above", "below"), "!", 3)],
              a, b, exact, "1 d" if many else "30 min", c.per_cell, len(here))
    axis, short = t.axes["co2"], t.axes["temp"]
    a = axis.edges[0]
    spans = [row.within(min(a, short.edges[0]), b) for row in here]
    together = [(("co2", "temp"), axis)] if axis.edges == short.edges else [(("co2",), axis), (("temp",), short)]
    found = {what: rows for whats, each in together
             for what, rows in importer.buckets(c.db, whats, spans, each.edges).items()}
    co2, temp = found["co2"], found["temp"]
    scale = make_scale([bucket for row in co2 for bucket in row], 50, c.o.co2_max, c.o.log)
    warmth = make_scale([bucket for row in temp for bucket in row], 5)
    states = importer.fleet_state(c.db, b, [stay for row in here for stay in row.stays])
    late = {state.unit_id for state in states if state.data_late > 1}
    cells = [_fleet_row(c, row, row.within(a, b), co2[i], temp[i], scale, warmth, any(
        stay.unit_id in late and stay.since <= b < stay.until for stay in row.stays)) for i, row in enumerate(here)]
    flags = max(width(row[-1].spans[0].text) for row in cells)
    t.columns[-1] = t.columns[-1]._replace(width=min(max(flags, 1), 3 + max(t.spare(), 0)))
    sites = any(row.name == row.stays[0].site for row in rows)
    title = [(0, count(len(rows), "site" if sites else "unit")), (0, c.zone.period(a, b, c.g["to"])),
             (2, "CO₂ %.0f%s%.0f ppm" % (scale.low, c.g["to"], scale.high)),
             (3, "T %s%s%.0f °C" % (("%.0f" % warmth.low).replace("-", "−"), c.g["to"], warmth.high))]
    notes = [(1, ("col = %s (CO₂), %s (T)" % (axis.step, short.step), "col = " + axis.step)), (4, "blank = no data"),
             (3, "L late"), (2, "▲▼ off scale"),
             (5, "? suspect" if any("suspect" in marks_of([bucket for bucket in row if bucket and not bucket.n], one)
                                    for rows, one in ((co2, scale), (temp, warmth)) for row in rows) else "")]
    return t.page("co2", title, (a, b), cells, len(rows) - len(here), notes, co2_scale=scale[:2], temp_scale=warmth[:2])


def _fleet_row(c: Context, row: Row, spans: Sequence[importer.Span], co2: Buckets, temp: Buckets, scale: Scale,
               warmth: Scale, late: bool) -> List[Cell]:
    ppm, celsius = ((importer.last_value(c.db, what, spans) or (0, None))[1] for what in ("co2", "temp"))
    marks = marks_of(co2, scale)
    (low, high), (below, above) = ends(co2), off_scale(c, "co2", row, co2, scale, marks)
    flags = "".join(c.g[name] + (compact(n) if n > 1 else "") for name, n in (("up", above), ("down", below)) if n)
    means, warm = [mean(bucket) for bucket in co2], [mean(bucket) for bucket in temp]
    reach = "" if low is None else c.say("%s–%s" % (compact(low), compact(high)))
    return [cell(c.name(row.name), row.name, "", row.name),
            Cell([means], bars(c, means, scale, "co2", marks)),
            Cell([ppm], [Span(compact(ppm))]), Cell([low, high], [Span(reach)]),
            Cell([warm], bars(c, warm, warmth, "temp", marks_of(temp, warmth))),
            Cell([celsius], [Span(shown("%.1f", celsius))]),
            Cell([late, above, below], [Span("L" * late + flags, "bad")])]


# -- co2: one site in detail ------------------------------------------------------------------------------------------
#
# Panels under each other on one time axis: CO2, temperature, and a ribbon for each unit. In a column of a panel stand
# the range from the least to the greatest value, and the mean; in braille the means of neighbours are connected, but
# never across a blank column. The ribbon shows what the unit was doing and how much of its data is here: blank is
# nothing, thin is less than half.


def panels(c: Context, rows: List[Row], a: int, b: int, exact: bool) -> Page:
    """Every stay in detail, with one time axis and one scale for all."""
    height = 14 if c.rows is None else min(14, c.rows)
    here = rows[:c.rows and max(1, (c.rows - 1) // height)]
    axis, hidden = make_axis(c.zone, a, b, c.width - 12, exact), len(rows) - len(here)
    found = importer.buckets(c.db, ("co2", "temp"), [row.within(axis.edges[0], b) for row in here], axis.edges)
    co2, temp = ([bucket for row in found[what] for bucket in row] for what in ("co2", "temp"))
    scales = make_scale(co2, 50, c.o.co2_max, c.o.log), make_scale(temp, 5)
    pages = [site(c, row, axis.edges[0], b, True, height - bool(hidden), scales) for row in here]
    return Page("co2", {"co2_scale": scales[0][:2], "temp_scale": scales[1][:2]}, ["site", "unit", *pages[0].fields],
                [[row.name, row.stays[0].nickname, *one] for row, page in zip(here, pages) for one in page.records],
                [line for page in pages for line in page.lines] +
                [[Span("+%d more (--all)" % hidden, "dim")]] * bool(hidden))


def site(c: Context, row: Row, a: int, b: int, exact: bool, lines: int = 0, scales: Sequence[Scale] = ()) -> Page:
    """One site or unit."""
    axis = make_axis(c.zone, a, b, c.width - 12, exact)
    spans = row.within(axis.edges[0], b)
    found = importer.buckets(c.db, ("co2", "temp"), [spans], axis.edges)
    co2, temp = found["co2"][0], found["temp"][0]
    scale, warmth = scales or (make_scale(co2, 50, c.o.co2_max, c.o.log), make_scale(temp, 5))
    ribbons = _ribbons(c, row, axis, co2, b)
    room = max((lines or min(c.rows or c.o.height, c.o.height - 1)) - 2 - len(ribbons), 3)  # a browser has more rows
    high = room - room * 9 // 20 if room > 6 else room
    drawn = [_site_title(c, row, spans, co2, axis, b), *panel(c, row, spans, "co2", axis, co2, scale, high)]
    drawn += panel(c, row, spans, "temp", axis, temp, warmth, room - high) if room > high else []
    drawn += [*ribbons, [Span("     " + c.say(axis.heading.replace("╷", c.plot["foot"])))]]
    fields = [what + "_" + name for what in ("co2", "temp") for name in ("n", "mean", "min", "max", "suspect")]
    records = [[c.zone.iso(one), c.zone.iso(other), *_numbers(ppm), *_numbers(degrees)]
               for one, other, ppm, degrees in zip(axis.edges, axis.edges[1:], co2, temp)]
    facts = {"site": row.name, "units": sorted({stay.nickname for stay in row.stays}), "co2_scale": scale[:2],
             "temp_scale": warmth[:2]}
    return Page("co2", facts, ["from", "to", *fields], records, drawn)


def _numbers(bucket: Optional[importer.Bucket]) -> List[Any]:
    return [bucket.n, mean(bucket), bucket.low, bucket.high, bucket.suspects] if bucket else [0, None, None, None, 0]


def _site_title(c: Context, row: Row, spans: Sequence[importer.Span], buckets: Buckets, axis: Axis, b: int) -> Line:
    """Name, units, time, and how many of the readings that should be there are."""
    here = sum(bucket.rows for bucket in buckets if bucket)
    first = min((bucket.first for bucket in buckets if bucket), default=b)
    due = sum(max(until - max(since, first), 0) / importer.cadence(c.db, unit, b) for unit, since, until in spans)
    units = list(dict.fromkeys(c.name(stay.nickname) for stay in row.stays))
    share = "%.0f %%" % min(100, 100 * here / max(due, 1))
    counted = ("{:,}/{:,.0f} = ".format(here, due).replace(",", " ") + share, share)
    return c.head([(0, cut(c.name(row.name), c.width // 2)),
                   (2, "" if units == [row.name] else ", ".join(units[:3]) + "…" * (len(units) > 3)),
                   (0, c.zone.period(axis.edges[0], b, c.g["to"])),
                   (3, counted if due >= 1 else count(here, "reading"))])


def panel(c: Context, row: Row, spans: Sequence[importer.Span], what: str, axis: Axis, buckets: Buckets, scale: Scale,
          lines: int) -> List[Line]:
    """A heading with the numbers; marks, if anything is off the scale; the plot, labels left, newest value right."""
    g, form = c.plot, "%.0f" if what == "co2" else "%.1f"
    marks = marks_of(buckets, scale)
    (low, high), (below, above) = ends(buckets), off_scale(c, what, row, buckets, scale, marks)
    beyond = "  ".join("%s%.0f ×%d" % (g[name], end, n) for name, end, n in (("up", high, above), ("down", low, below))
                       if n and end is not None)
    aside = width(beyond) < c.width - 5 - axis.cells
    p5, median, p95 = (shown(form, value) for value in importer.quantiles(c.db, what, spans, (0.05, 0.5, 0.95)))
    legend = "%s mean  %s min–max per column (%s)" % (g["mean"], g["range"], axis.step), "col = " + axis.step
    drawn = [c.head([(0, "CO₂ ppm" if what == "co2" else "temp °C"), (1, "" if aside else beyond), (4, legend),
                     (2, median and "median " + median), (3, median and "p5 %s  p95 %s" % (p5, p95))], "")]
    if any(marks):
        drawn.append([Span("    " + g["side"]), *runs((g[one] if one else " ", "bad") for one in marks),
                      Span(c.say(" " + beyond) * aside, "bad")])
    stretched, labels = make_rows(scale, max(lines - len(drawn), 1))
    last = (importer.last_value(c.db, what, spans) or (0, None))[1]
    at = -1 if last is None else len(labels) - 1 - stretched.level(last, len(labels))
    tail = " %s %s" % (g["last"], shown("%.0f" if what == "co2" else "%+.1f", last))
    for i, (line, label) in enumerate(zip(plot(g, buckets, stretched, len(labels), what), reversed(labels))):
        drawn.append([Span("%4s%s" % (label, g["label"] if label else g["side"])), *line, Span(tail * (i == at), what)])
    return drawn


def plot(g: Glyphs, buckets: Buckets, scale: Scale, rows: int, what: str) -> List[Line]:
    """The rows of a plot, from the top."""
    def place(value: Optional[float]) -> Optional[int]:
        return None if value is None else scale.level(value, rows * g["sub"])
    left, right = _trace([place(mean(bucket)) for bucket in buckets], g["sub"] == 4)
    reach = [range(0) if low is None or high is None else range(low, high + 1)
             for low, high in ((place(bucket and bucket.low), place(bucket and bucket.high)) for bucket in buckets)]
    zero = scale.level(0, rows) if what == "temp" and scale.low < 0 < scale.high else -1
    return [runs(_dots(g, row * g["sub"], *column, what, g["zero"] if row == zero else " ")
                 for column in zip(left, right, reach)) for row in reversed(range(rows))]


def _trace(means: Sequence[Optional[int]], connect: bool) -> Tuple[List[range], List[range]]:
    """The places that the line of the means takes in the left and in the right half of each column."""
    left = [range(0) if at is None else range(at, at + 1) for at in means]
    right = list(left)
    for j, (one, other) in enumerate(zip(means, means[1:])):
        if connect and one is not None and other is not None:
            middle = (one + other + (other > one)) // 2
            right[j] = (range(one, middle) if other > one else range(middle + 1, one + 1)) or right[j]
            left[j + 1] = range(middle, other + 1) if other > one else range(other, middle + 1)
    return left, right


def _dots(g: Glyphs, low: int, left: range, right: range, reach: range, style: str, blank: str) -> Tuple[str, str]:
    """One character of a plot: of one column the places from `low` up to the next row."""
    places = range(low, low + g["sub"])
    line, inside = [at in left or at in right for at in places], [at in reach for at in places]
    if not any(line) and not any(inside):
        return blank, "dim"
    if g["sub"] == 4:                   # the range takes every other dot on the left
        every = [one and (i % 2 == 1 or not any(inside[1::2])) for i, one in enumerate(inside)]
        bits = [DOTS[0][i] * (at in left or every[i]) | DOTS[1][i] * (at in right) for i, at in enumerate(places)]
        return chr(0x2800 + sum(bits)), style if any(line) else "dim"
    if not any(line):
        return g["range"], "dim"
    return (g["mean"] if g["sub"] == 1 else "█" if all(line) else "▀" if line[1] else "▄"), style


def _ribbons(c: Context, row: Row, axis: Axis, co2: Buckets, b: int) -> List[Line]:
    kinds, lines = ("deployed", "en_route", "lab_check"), []
    units = list(dict.fromkeys(stay.unit_id for stay in row.stays))[:3]
    for unit in units:
        stays, chars, seen = [stay for stay in row.stays if stay.unit_id == unit], "", set()
        spans = [span for span in row.within(axis.edges[0], b) if span[0] == unit]
        rhythm = importer.cadence(c.db, unit, b)
        own = co2 if len(units) == 1 else importer.buckets(c.db, ["co2"], [spans], axis.edges)["co2"][0]
        for bucket, one, other in zip(own, axis.edges, axis.edges[1:]):
            status = next((stay.status for stay in stays if stay.since < other and stay.until > one), None)
            kind = kinds.index(status) if status in kinds else 0
            thin = bucket is not None and bucket.rows * rhythm < (min(other, b) - one) / 2
            chars += " " if not bucket else c.plot["part"] if thin else c.plot["status"][kind]
            seen |= {kind} if bucket else set()
        legend = " ".join(c.plot["status"][kind] + ("depl", "route", "lab")[kind]
                          for kind in sorted(seen, reverse=True))
        tail = legend if len(units) == 1 else c.name(stays[0].nickname)
        lines.append([Span("%4s%s%s " % ("stat" if len(units) == 1 else "unit", c.plot["side"], chars)),
                      Span(cut(tail, c.width - 6 - len(chars)), "dim")])
    return lines


# -- pings ------------------------------------------------------------------------------------------------------------


def view_pings(c: Context) -> Page:
    """A row per stay: on how many days of each column the unit has called; silence while deployed is not the same."""
    a, b, exact = c.range("pings", spans_of(c.stays), 364)
    name, unit = who(c, c.stays, 2)
    t = Table(c, [name._replace(width=min(name.width, max(10, c.width // 8))),
                  Column(("pings",), "", 14, gap=0, chart=True, margin=1), unit._replace(gap=0),
                  Column(("late_seconds",), "late", 4, 1, True)], a, b, exact, "1 d", rows=len(c.stays[:c.room(3)]))
    axis = t.axes["pings"]
    a = axis.edges[0]
    stays = [stay for stay in c.stays if stay.since < b and stay.until > a]
    if not stays:
        return nothing("pings", "No unit was there in this time.")
    here = stays[:c.room(3)]
    spans = [(stay.unit_id, max(stay.since, a), min(stay.until, b)) for stay in here]
    found = importer.pings(c.db, spans, axis.edges)
    late = {state.unit_id: b - state.last_ping for state in importer.fleet_state(c.db, b, here)
            if state.last_ping is not None and state.pings_late > 1 and state.alarms}
    rows = []
    for i, stay in enumerate(here):
        cells = [found.get((i, j)) for j in range(len(axis.edges) - 1)]
        silent = late.get(stay.unit_id) if stay.since <= b < stay.until else None
        text = "" if silent is None else "%dh" % (silent // 3600) if silent < 2 * DAY else "%dd" % (silent // DAY)
        chart = Cell([[pings.n if pings else 0 for pings in cells]], runs(_stay(c, stay, cells, axis, b)))
        rows.append([who_cells(c, stay)[0], chart, who_cells(c, stay)[1], cell(text, silent, "bad")])
    title = [(0, "pings"), (2, count(len({stay.unit_id for stay in stays}), "unit")),
             (0, c.zone.period(a, b, c.g["to"])), (3, "1 col = " + axis.step), (4, "sort: tier, site")]
    levels = {"1 week": ("ping days/week: ", "1-2", "3-4", "5-6", "7"), "1 d": ("", "", "", "", "pings")}.get(
        axis.step, ("days with pings: ", "<30 %", "<60 %", "some", "all"))
    legend = levels[0] + "  ".join("%s %s" % pair for pair in zip(c.g["days"], levels[1:]) if pair[1])
    notes = [(1, (legend, c.g["days"] + " pings")), (2, c.g["silent"] + " deployed, silent"),
             (3, "%s %s deployment" % (c.g["open"], c.g["close"]))]
    return t.page("pings", title, (a, b), rows, len(stays) - len(here), notes)


def _stay(c: Context, stay: importer.Deployment, cells: Sequence[Optional[importer.Pings]], axis: Axis,
          b: int) -> List[Tuple[str, str]]:
    """The characters of one stay: pings by column, silence, and its bounds in the cells outside."""
    line = [(" ", "")]
    for pings, one, other in zip(cells, axis.edges, axis.edges[1:]):
        days = (min(other, stay.until, b) - max(one, stay.since)) / DAY
        if pings:
            share = pings.days / max(days, pings.days)
            line.append((c.g["days"][0 if share < 0.3 else 1 if share < 0.6 else 2 if share < 0.95 else 3], ""))
        else:
            line.append((c.g["silent"], "bad") if stay.site and days > min(0.9, (other - one) / DAY) else (" ", ""))
    line.append((" ", ""))
    if stay.site and stay.since >= axis.edges[0]:
        line[next(j for j, edge in enumerate(axis.edges[1:]) if stay.since < edge)] = (c.g["open"], "dim")
    if stay.site and stay.until <= b:
        line[next(j for j, edge in enumerate(axis.edges[1:]) if stay.until <= edge) + 2] = (c.g["close"], "dim")
    return line


# -- status -----------------------------------------------------------------------------------------------------------

VERDICTS = {"late": ("LATE", "bad", "LATE"), "stuck": ("DATA", "bad", "call without DATA"),
            "update": ("upd.", "bad", "at an UPDATE"), "refused": ("REF.", "bad", "send REFUSED lines"),
            "sensor": ("CO2", "bad", "without CO2"), "weak": ("weak", "warn", "weak"), "never": ("none", "warn", "never"),
            "ok": (" ok", "good", "ok"), "off": (" --", "dim", "not deployed")}
SIGNAL = Scale(-115, -70)               # dBm, of small charts


def states_of(c: Context) -> List[importer.UnitState]:
    """How the units do, worst first, by the limits that were asked for."""
    return importer.fleet_state(c.db, c.now, c.stays)


def view_status(c: Context) -> Page:
    """How each unit does, worst first; pings and data are judged apart."""
    states = states_of(c)
    here = states[:c.room(3)]
    t = Table(c, [Column(("state",), "", 4), *who(c, states), Column(("ping_age", "data_age"), "last", 8, 1, True),
                  Column(("pings",), "pings 14 d", 14, 2), Column(("ppm",), "ppm", 4, 4, True),
                  Column(("celsius",), c.g["degree"], 5, 6, True), Column(("dbm",), "dBm", 4, 5, True),
                  Column(("rssi",), "rssi 14d", 14 if c.width > 85 else 8, 7)])
    days = t.axes["pings"] = t.axes["rssi"] = make_axis(c.zone, c.now - 13 * DAY, c.now + 1, 14, True, least="1 d")
    found = importer.pings(c.db, [(state.unit_id, days.edges[0], c.now + 1) for state in here], days.edges)
    rows = [_status_row(c, state, [found.get((i, j)) for j in range(len(days.edges) - 1)])
            for i, state in enumerate(here)]
    counts = {verdict: sum(state.verdict == verdict for state in states) for verdict in VERDICTS}
    each = [(n, VERDICTS[verdict][2]) for verdict, n in counts.items() if n]
    said = "  ".join("%d %s" % pair for pair in each)
    wrong = "  ".join("%d %s" % (n, text.split()[-1]) for n, text in each if text not in ("ok", "not deployed"))
    title = [(3, "fleet"), (0, c.zone.local(c.now).strftime("%Y-%m-%d %H:%M ") + c.zone.name),
             (1, (count(len(states), "unit") + ": " + said, said, *filter(None, [wrong])))]
    legend = "pings: {1} one that day  {2} more  {0} none".format(*c.g["pings"])
    return t.page("status", title, (days.edges[0], c.now), rows, len(states) - len(here),
                  [(1, (legend + "  rssi −115 … −70 dBm", legend))], **counts)


def _status_row(c: Context, state: importer.UnitState, cells: Sequence[Optional[importer.Pings]]) -> List[Cell]:
    word, style, _ = VERDICTS[state.verdict]
    ages = [None if ts is None else c.now - ts for ts in (state.last_ping, state.last_data)]
    age = ages[1] if state.verdict == "stuck" or ages[0] is None else ages[0]
    signal = [None if pings is None else pings.dbm for pings in cells]
    every = 1 if c.width > 85 else 2
    parts = [[dbm for dbm in signal[i:i + every] if dbm is not None] for i in range(0, len(signal), every)]
    chart = "".join(c.g["pings"][min(pings.n, 2) if pings else 0] for pings in cells)
    none, span = c.g["none"], [(state.unit_id, 0, c.now + 1)]
    ppm, celsius = ((importer.last_value(c.db, what, span) or (0, None))[1] for what in ("co2", "temp"))
    return [cell(word, state.verdict, style), *who_cells(c, state),
            Cell(ages, [Span("never" if age is None else ago(age), style if style == "bad" else "")]),
            Cell([[pings.n if pings else 0 for pings in cells]], [Span(chart)]),
            Cell([ppm], [Span(compact(ppm) or none)]), Cell([celsius], [Span(shown("%.1f", celsius, none))]),
            cell(shown("%d", state.dbm, none), state.dbm),
            Cell([signal], bars(c, [sum(part) / len(part) if part else None for part in parts], SIGNAL))]


# -- signal -----------------------------------------------------------------------------------------------------------


def view_signal(c: Context) -> Page:
    """The distribution of each unit's signal strength on one axis of dBm, weakest first."""
    stays = importer.whereabouts(c.stays, c.now)
    a, b, _ = c.range("pings", [(unit, 0, importer.FOREVER) for unit in stays], 30)
    levels = {unit: found for unit in stays for found in [importer.signals(c.db, unit, a, b + 1)] if found}
    order = sorted(levels, key=lambda unit: quarters(levels[unit])[2])
    if not order:
        return nothing("signal", "No pings with a signal strength in this time.")
    shared = len({stays[unit].site for unit in order}) < len(order)             # then the site alone does not tell
    t = Table(c, [*who(c, [stays[unit] for unit in order], 1 if shared else 4),
                  Column(("min", "p25", "median", "p75", "max"), "", 46 if c.width > 75 else 15),
                  Column(("last",), "last", 4, 1, True), Column(("n",), "n", 4, 2, True),
                  Column(("trend",), "trend", 10, 3)])
    low = min([-113, *(found[0][0] for found in levels.values())])
    high = max([-68, *(found[-1][0] for found in levels.values())])
    step = ceil((high - low + 1) / (t.columns[2].width + t.spare()))
    cells = (high - low) // step + 1
    ticks = spaced([((dbm - low) // step, str(dbm)) for dbm in range(ceil(low / 10) * 10, high, 10)], cells)
    t.columns[2] = t.columns[2]._replace(head=c.say(heading(ticks, cells)), width=cells)
    here = order[:c.room(3)]
    days = t.axes["trend"] = make_axis(c.zone, a, b, 10, False, least="1 d")
    found = importer.pings(c.db, [(unit, days.edges[0], b + 1) for unit in here], days.edges)
    rows = [_signal_row(c, stays[unit], levels[unit], low, step, cells,
                        [found.get((i, j)) for j in range(len(days.edges) - 1)]) for i, unit in enumerate(here)]
    title = [(0, "signal dBm"), (0, c.zone.period(a, b, c.g["to"])), (2, count(len(order), "unit") + ", weakest first"),
             (3, "1 col = %d dB" % step)]
    notes = [(1, "{whisker} min–max  {box} p25–p75  {median} median  {dot} last".format(**c.g)),
             (2, "%s limits: <%d unusable, <%d weak" % (c.g["limit"], importer.UNUSABLE, importer.WEAK))]
    return t.page("signal", title, (a, b), rows, len(order) - len(here), notes)


def quarters(levels: Sequence[Tuple[int, int, int]]) -> List[int]:
    """Least, quartiles and greatest of the dBm of `importer.signals`."""
    values = [dbm for dbm, n, _ in levels for _ in range(n)]
    return [values[min(len(values) * quarter // 4, len(values) - 1)] for quarter in range(5)]


def _signal_row(c: Context, stay: importer.Deployment, levels: Sequence[Tuple[int, int, int]], low: int, step: int,
                cells: int, pings: Sequence[Optional[importer.Pings]]) -> List[Cell]:
    points, trend = quarters(levels), [None if one is None else one.dbm for one in pings]
    last, n = max(levels, key=lambda level: level[2])[0], sum(level[1] for level in levels)
    at = [(dbm - low) // step for dbm in (*points, last, importer.WEAK, importer.UNUSABLE)]
    line = [c.g["limit"] if i in at[6:] else " " for i in range(cells)]
    for name, one, other in (("whisker", 0, 4), ("box", 1, 3), ("median", 2, 2), ("dot", 5, 5)):
        line[at[one]:at[other] + 1] = c.g[name] * (at[other] - at[one] + 1)
    return [*who_cells(c, stay), Cell(points, [Span("".join(line))]), cell("%d" % last, last), cell("%d" % n, n),
            Cell([trend], bars(c, trend, SIGNAL))]


# -- errors -----------------------------------------------------------------------------------------------------------

ERRORS = ("uncaught", "watchdog", "signal", "backoff", "transmit", "")


def view_errors(c: Context) -> Page:
    """Entries of the units' error logs by column and type; below, the newest."""
    stays = importer.whereabouts(c.stays, c.now)
    a, b, exact = c.range("error_logs", [(unit, 0, importer.FOREVER) for unit in stays], 84)
    kinds = [Column((kind or "other",), kind or "other", max(len(kind), 5), 2, True) for kind in ERRORS]
    t = Table(c, [*who(c, list(stays.values()), 4), Column(("entries",), "", 14, chart=True), *kinds,
                  Column(("all",), "all", 4, 1, True)], a, b, exact, "1 d")
    axis = t.axes["entries"]
    found = importer.errors(c.db, [(unit, axis.edges[0], b + 1) for unit in stays], axis.edges)
    rows = [_errors_row(c, stay, [found.get((i, j), {}) for j in range(len(axis.edges) - 1)])
            for i, stay in enumerate(stays.values())]
    rows = sorted((row for row in rows if row[-1].values[0]), key=lambda row: -row[-1].values[0])
    if not rows:
        return nothing("errors", "No errors in this time.")
    here = rows[:c.rows and max(1, (c.rows - 4) * 3 // 5)]
    title = [(0, "errors"), (0, c.zone.period(axis.edges[0], b, c.g["to"])), (2, count(len(rows), "unit")),
             (2, "%d entries" % sum(row[-1].values[0] for row in rows)), (3, "1 col = " + axis.step)]
    room = 20 if c.rows is None else max(0, c.rows - len(here) - 4)
    news = importer.newest_errors(c.db, list(stays), axis.edges[0], b + 1, room)
    newest = [dict(zip(("at", "unit", "level", "type", "message"), (c.zone.iso(one[0]), *one[1:]))) for one in news]
    page = t.page("errors", title, (axis.edges[0], b), here, len(rows) - len(here),
                  [(1, "digits: entries, + more than 9")], newest=newest)
    lines = [[Span("%-12s " % c.zone.short(ts, b)), *pad(who_cells(c, stays[unit])[0].spans, t.columns[0].width),
              Span(cut(" %-4s %s" % (c.name(level), c.name(message or kind)), c.width - 13 - t.columns[0].width))]
             for ts, unit, level, kind, message in news]
    return page._replace(lines=page.lines + [[Span("newest", "head")]] * bool(lines) + lines)


def _errors_row(c: Context, stay: importer.Deployment, columns: Sequence[Dict[str, int]]) -> List[Cell]:
    counts = [sum(column.values()) for column in columns]
    chart = "".join(" " if n == 0 else "%d" % n if n < 10 else "+" for n in counts)
    kinds = [sum(column.get(kind, 0) for column in columns) for kind in ERRORS]
    return [*who_cells(c, stay), Cell([counts], [Span(chart)]),
            *(cell("%d" % n if n else "", n) for n in (*kinds, sum(counts)))]


# -- gaps -------------------------------------------------------------------------------------------------------------

GAPS = {"waiting": ("not uploaded", "warn"), "silent": ("calls, no data", "bad"), "resend": ("being re-sent", "warn"),
        "rejected": ("unreadable", "warn"), "lost": ("lost", "bad"), "off": ("not deployed", "dim")}


def view_gaps(c: Context) -> Page:
    """Stretches without readings, newest first, and what became of them."""
    a, b, _ = c.range("co2_readings", spans_of(c.stays), 30)
    found = sorted(importer.gaps(c.db, c.stays, a, b), key=lambda gap: (-(gap.end or b), gap.start))
    if not found:
        return nothing("gaps", "No gaps in this time.")
    t = Table(c, [*who(c, c.stays), Column(("from",), "from", 12), Column(("to",), "to", 12, 1),
                  Column(("missing",), "missing", 7, 2, True), Column(("state", "calls"), "state", 14)])
    here = found[:c.room(3)]
    own = {gap.unit_id: [stay for stay in c.stays if stay.unit_id == gap.unit_id] for gap in here}
    place = {gap: importer.whereabouts(own[gap.unit_id], gap.start if gap.end else b)[gap.unit_id] for gap in here}
    rows = [[*who_cells(c, place[gap]), cell(c.zone.short(gap.start, b), c.zone.iso(gap.start)),
             cell(c.zone.short(gap.end, b) if gap.end else "now", gap.end and c.zone.iso(gap.end)),
             cell("%d" % gap.missing, gap.missing), Cell([gap.state, gap.calls], [Span(*GAPS[gap.state])])]
            for gap in here]
    title = [(0, "gaps"), (0, c.zone.period(a, b, c.g["to"])), (2, count(len(found), "gap")), (3, "newest first")]
    return t.page("gaps", title, (a, b), rows, len(found) - len(here),
                  [(1, "longer than twice the unit's own rhythm"), (2, "missing: readings")])


VIEWS: Dict[str, Callable[[Context], Page]] = {"co2": view_co2, "pings": view_pings, "status": view_status,
                                               "signal": view_signal, "errors": view_errors, "gaps": view_gaps}

# -- pictures: frames, paths, panels ----------------------------------------------------------------------------------
#
# The same pages for browsers and papers, as inline SVG: strips under each other on one time axis. A strip has text on
# its left, the labels of its scales, a chart, and numbers on its right. In a browser x is a share of the width that
# there is, so that text keeps its size; curves lie in an inner <svg> that is stretched: STRETCHED wide, a tenth of a
# pixel high. Other heights are pixels. What things look like is said in STYLE alone.

STRETCHED = 2000
DESK_CHART = 820                        # px; width of a chart on a page of 1180, and in a file
PHONE_CHART = 320                       # px; on a page of 400
LETTER = 6.4                            # px; width of a letter
SIGNS = {"up": "▲", "down": "▼", "suspect": "?"}
TICK_STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000]

Point = tuple[int, int]
Times = tuple[float, float]             # from, to; UTC seconds


class Frame(NamedTuple):
    """The time that the charts of a picture show."""
    edges: list[int]                    # UTC seconds of the columns, one more than these
    ticks: list[tuple[int, str]]        # UTC seconds, label
    groups: list[tuple[int, int, str]]  # columns with one hover text: first, end, when

    def share(self, ts: float) -> float:
        """Where a time lies: 0 at the left edge, 1 at the right one."""
        start = self.edges[0]
        end = self.edges[-1]
        return min(max((ts - start) / (end - start), 0), 1)

    def at(self, ts: float) -> int:
        """The same, for points of curves."""
        return round(STRETCHED * self.share(ts))

    def columns(self, stay: Any) -> tuple[int, int]:
        """The first column that a stay is in, and the one behind its last."""
        first = bisect_right(self.edges, stay.since) - 1
        end = bisect_left(self.edges, stay.until)
        return max(first, 0), min(end, len(self.edges) - 1)

    def within(self, first: int, end: int, stay: Any) -> Times:
        """The part of some columns that belongs to a stay."""
        start = max(self.edges[first], stay.since)
        return start, min(self.edges[end], stay.until)

    def span(self, times: Times) -> str:
        """Where a rectangle lies that long."""
        left, right = map(self.share, times)
        return f'x="{left:.2%}" width="{right - left:.2%}"'

    def rect(self, style: str, times: Times, top: float, height: float) -> str:
        """A rectangle; nothing where no time is."""
        left, right = map(self.share, times)
        if left >= right:
            return ""
        return f'<rect class="{style}" {self.span(times)} y="{top:g}" height="{height:g}"/>'

    def text(self, style: str, ts: float, y: float, text: str) -> str:
        """A word."""
        return f'<text class="{style}" x="{self.share(ts):.2%}" y="{y:g}">{text}</text>'

    def word(self, style: str, times: Times, y: float, text: str) -> str:
        """A word in the middle of a time, if it has room there; a phone may have none."""
        left, right = map(self.share, times)
        room = (right - left) / (len(text) * LETTER)
        if room * DESK_CHART < 1:
            return ""
        if room * PHONE_CHART < 1:
            style += " more"
        return f'<text class="{style}" x="{(left + right) / 2:.2%}" y="{y:g}">{text}</text>'

    def hover(self, height: int, tell: Callable[[int, int], str]) -> str:
        """What each day, or longer, says under the mouse."""
        drawn = '<g class="hover">'
        for first, end, when in self.groups:
            x = self.span((self.edges[first], self.edges[end]))
            drawn += f'<rect {x} height="{height}"><title>{when}: {tell(first, end)}</title></rect>'
        return drawn + "</g>"

    def grid(self, height: int) -> str:
        """Lines on calendar steps."""
        lines = [f"M{self.at(ts)} 0l0 {10 * height}" for ts, _ in self.ticks]
        return curve("grid", "".join(lines))


def fitted(height: int, curves: str) -> str:
    """Curves, made as wide as the chart."""
    box = f'viewBox="0 0 {STRETCHED} {10 * height}" preserveAspectRatio="none"'
    return f'<svg {box} width="100%" height="{height}">{curves}</svg>'


def curve(style: str, d: str) -> str:
    """A path, unless it has no points."""
    return f'<path class="{style}" d="{d}"/>' if d else ""


def path(points: Sequence[Point], end: str = "") -> str:
    """The shortest text of a line through points; a single point becomes a dot."""
    x, y = points[0]
    text = f"M{x} {y}l"
    steps = []
    for next_x, next_y in points[1:] or points:
        steps.append(f"{next_x - x} {next_y - y}")
        x = next_x
        y = next_y
    return text + " ".join(steps).replace(" -", "-") + end


def stretches(values: Iterable[object]) -> list[tuple[int, int]]:
    """Where values are true: begin and end of each run."""
    found = []
    end = 0
    for true, group in groupby(values, bool):
        start = end
        end += len(list(group))
        if true:
            found.append((start, end))
    return found


def crossed(points: Sequence[Point], level: int) -> Iterator[Point]:
    """A line with a further point wherever it crosses a level."""
    yield points[0]
    for (x, y), (next_x, next_y) in zip(points, points[1:]):
        if (y - level) * (next_y - level) < 0:
            part = (level - y) / (next_y - y)
            yield round(x + part * (next_x - x)), level
        yield next_x, next_y


def signed(form: str, value: Any) -> str:
    """Numbers with a real minus."""
    return str(form % value).replace("-", "−")


class Panel(NamedTuple):
    """One quantity in a strip."""
    frame: Frame
    chart: Any
    top: int                            # px
    height: int

    @property
    def name(self) -> str:
        """The quantity's."""
        return str(self.chart.quantity.name)

    def y(self, value: Any) -> int:
        """The height of a value; what is off the scale lies on the edge."""
        bottom = 10 * (self.top + self.height)
        level: int = self.chart.scale.level(value, 10 * self.height)
        return bottom - level

    def points(self, xs: Sequence[int], values: Iterable[Any]) -> list[Point]:
        """Where values lie."""
        return list(zip(xs, map(self.y, values)))

    def ticks(self) -> list[int]:
        """Round values, so far apart that their labels are legible."""
        low, high, _ = self.chart.scale
        least = (high - low) * max(12.5 / self.height, 0.14)
        wide = [step for step in TICK_STEPS if step >= least] or TICK_STEPS[-1:]
        step = wide[0]
        first = ceil(low / step)
        last = floor(high / step)
        return [n * step for n in range(first, last + 1)]

    def labels(self) -> str:
        """The round values."""
        drawn = ""
        unit = "°" if self.name == "temp" else ""
        for value in self.ticks():
            y = self.y(value) / 10 + 4
            text = signed("%d", value) + unit
            drawn += f'<text class="{self.name}-label" x="30" y="{y:g}">{text}</text>'
        return drawn

    def grid(self) -> str:
        """Lines at the round values; a dotted one at 0."""
        lines = [f"M0 {self.y(value)}l{STRETCHED} 0" for value in self.ticks()]
        drawn = curve("grid", "".join(lines))
        if self.name == "temp":
            drawn += curve("zero", f"M0 {self.y(0)}l{STRETCHED} 0")
        return drawn

    def curves(self, buckets: Buckets, kind: str) -> str:
        """One unit's range and mean, and what lies between the mean and 0; broken where no value is usable."""
        edges = self.frame.edges
        middles = [self.frame.at((start + end) / 2) for start, end in zip(edges, edges[1:])]
        zero = self.y(0)
        line = ""
        band = ""
        above = ""
        below = ""
        for start, end in stretches(bucket and bucket.n for bucket in buckets):
            xs = middles[start:end]
            run: list[Any] = buckets[start:end]
            means = self.points(xs, [bucket.total / bucket.n for bucket in run])
            highs = self.points(xs, [bucket.high for bucket in run])
            lows = self.points(xs, [bucket.low for bucket in run])
            line += path(means)
            band += path(highs + lows[::-1], "z")
            outline = [(xs[0], zero), *crossed(means, zero), (xs[-1], zero)]
            above += path([(x, min(y, zero)) for x, y in outline], "z")
            below += path([(x, max(y, zero)) for x, y in outline], "z")
        drawn = curve(f"{self.name} line-{kind}", line)
        if kind == "second":
            return drawn
        is_warmth = self.name == "temp"
        if not is_warmth or edges[1] - edges[0] >= DAY:
            drawn = curve(f"{self.name}-band band-{kind}", band) + drawn
        if is_warmth:
            drawn = curve("above", above) + curve("below", below) + drawn
        return drawn

    def marks(self) -> str:
        """Signs above where values are suspect or off the scale, with a line where column after column has some."""
        drawn = ""
        for mark, sign in SIGNS.items():
            for first, end in stretches(each == mark for each in self.chart.marks):
                start = self.frame.edges[first]
                stop = self.frame.edges[end]
                drawn += self.frame.text("mark", (start + stop) / 2, self.top - 1, sign)
                if end - first > 3:
                    drawn += self.frame.rect("off", (start, stop), self.top, 1.5)
        return drawn


class Strip(NamedTuple):
    """A row of a picture."""
    left: list[Line]
    right: list[Line]
    height: int                         # px
    chart: str                          # SVG
    labels: str = ""                    # SVG: of the scales


# -- pictures: readings -----------------------------------------------------------------------------------------------

FLAT = {"co2": 48, "temp": 26}          # px; heights of panels in a page of many sites
HIGH = {"co2": 200, "temp": 130}        # px; in a page of one
ABOVE = 9                               # px over a panel, for marks


def kinds_of(unit: str, frame: Frame, stays: Sequence[Any]) -> list[str]:
    """How each column of a unit is drawn: by its status, or as second where another unit is deployed."""
    kinds = []
    for start, end in zip(frame.edges, frame.edges[1:]):
        there = [stay for stay in stays if stay.since < end and stay.until > start]
        own = [stay.status for stay in there if stay.unit_id == unit]
        others = [stay.status for stay in there if stay.unit_id != unit]
        kind = own[0] if own and own[0] else "deployed"
        if kind != "deployed" and "deployed" in others:
            kind = "second"
        kinds.append(kind)
    return kinds


def unit_curves(panels: Sequence[Panel], row: Any) -> str:
    """All quantities of a site, a line for each unit."""
    drawn = ""
    for strand in row.strands:
        kinds = kinds_of(strand.unit_id, panels[0].frame, row.stays)
        for kind in dict.fromkeys(kinds):
            for panel in panels:
                own = zip(kinds, strand.buckets[panel.name])
                chosen = [bucket if each == kind else None for each, bucket in own]
                drawn += panel.curves(chosen, kind)
    return drawn


def stay_bars(frame: Frame, strand: Any, top: int) -> str:
    """When a unit was there (a line), and when it measured (a bar)."""
    drawn = ""
    for stay in strand.stays:
        drawn += frame.rect("stay", (stay.since, stay.until), top + 2, 1)
        for first, end in stretches(strand.buckets["co2"]):
            times = frame.within(first, end, stay)
            drawn += frame.rect(f"is-{stay.status}", times, top, 5)
    return drawn


def spread(chart: Any, start: int, end: int) -> tuple[float, ...]:
    """Least, greatest and mean usable value of some columns; nothing without any."""
    there = [bucket for bucket in chart.buckets[start:end] if bucket and bucket.n]
    if not there:
        return ()
    low = min(bucket.low for bucket in there)
    high = max(bucket.high for bucket in there)
    total = sum(bucket.total for bucket in there)
    return low, high, total / sum(bucket.n for bucket in there)


def told(charts: Iterable[Any], first: int, end: int) -> str:
    """The same in words, for each quantity."""
    words = []
    for chart in charts:
        form = "{0.label} {0.form}…{0.form}, mean {0.form}".format(chart.quantity)
        found = spread(chart, first, end)
        if found:
            words.append(signed(form, found))
    return "; ".join(words) or "no data"


def site_chart(row: Any, panels: Sequence[Panel], gaps: Sequence[Any]) -> tuple[int, str]:
    """Height and drawing: quantities of a site under each other; where readings are missing, and why."""
    frame = panels[0].frame
    height = panels[-1].top + panels[-1].height + 3
    middle = panels[0].top + panels[0].height // 2 + 4
    back = ""
    front = ""
    for gap in gaps:
        times = gap.start, gap.end or frame.edges[-1]
        if times[1] - times[0] > frame.edges[1] - frame.edges[0]:
            back += frame.rect("gap", times, 0, height)
            front += frame.word("word", times, middle, GAPS[gap.state][0])
    curves = frame.grid(height)
    for panel in panels:
        curves += panel.grid()
        front += panel.marks()
    curves += unit_curves(panels, row)
    charts = [panel.chart for panel in panels]
    front += frame.hover(height, lambda first, end: told(charts, first, end))
    return height, back + fitted(height, curves) + front


def notes(chart: Any) -> list[Line]:
    """Least and greatest value; how many are off the scale."""
    unit = chart.quantity.label.split()[-1]
    lines = []
    found = spread(chart, 0, len(chart.buckets))
    if found:
        text = signed(f"%.0f…%.0f {unit}", found[:2])
        lines.append([Span(text, "more")])
    least, greatest = chart.ends
    for sign, n, furthest in (("▲", chart.above, greatest), ("▼", chart.below, least)):
        if n:
            far = signed(f" to %.0f {unit}", furthest)
            lines.append([Span(f"{sign} {n}", "bad"), Span(far, "bad more")])
    return lines


def newest(chart: Any) -> Line:
    """The last value."""
    if not chart.last:
        return []
    quantity = chart.quantity
    unit = quantity.label.split()[-1]
    value = signed(quantity.form, chart.last[1])
    return [Span(value, quantity.name), Span(f" {unit} ")]


def fleet_strip(frame: Frame, row: Any, gaps: Sequence[Any], now: int) -> Strip:
    """All quantities of a site in little room."""
    panels: list[Panel] = []
    values: Line = []
    remarks: list[Line] = []
    top = ABOVE
    for name, chart in row.charts.items():
        panels.append(Panel(frame, chart, top, FLAT[name]))
        top += FLAT[name] + ABOVE
        values += newest(chart)
        remarks += notes(chart)
    if row.late:
        silence = now - row.charts["co2"].last[0]
        remarks.append([Span(f"{ago(silence)} late", "bad")])
    height, drawn = site_chart(row, panels, gaps)
    for strand in row.strands[-1:]:
        drawn += stay_bars(frame, strand, height + 1)
    stay = row.stays[-1]
    unit = stay.nickname if stay.site else "never deployed"
    left = [[Span(row.name, "head", row.name)], [Span(unit)]]
    labels = "".join(panel.labels() for panel in panels)
    return Strip(left, [values, *remarks], height + 7, drawn, labels)


def site_strips(frame: Frame, row: Any, gaps: Sequence[Any]) -> list[Strip]:
    """One site in detail: a strip for each quantity, and one for each unit."""
    strips = []
    for name, chart in row.charts.items():
        panel = Panel(frame, chart, ABOVE, HIGH[name])
        height, drawn = site_chart(row, [panel], gaps)
        label, unit = chart.quantity.label.split()
        left = [[Span(label, "head")], [Span(unit)]]
        right = [newest(chart), *notes(chart)]
        strips.append(Strip(left, right, height, drawn, panel.labels()))
    for strand in row.strands:
        drawn = stay_bars(frame, strand, 5)
        for stay in strand.stays:
            text = (stay.status or "no site").replace("_", " ")
            drawn += frame.word("word", (stay.since, stay.until), 21, text)
        left = [[Span(strand.nickname, "head")], [Span(strand.unit_id)]]
        strips.append(Strip(left, [], 24, drawn))
    return strips


# -- pictures: pings --------------------------------------------------------------------------------------------------

SILENT_DAYS = 3                         # shorter silence of a deployed unit is not coloured


def lane(frame: Frame, row: Any, top: int, height: int) -> str:
    """Days with pings as bars, stays as lines with ends, silence where a unit is deployed."""
    back = ""
    front = ""
    for stay in row.stays:
        first, end = frame.columns(stay)
        called = row.columns[first:end]
        for start, stop in stretches(called):
            times = frame.within(first + start, first + stop, stay)
            front += frame.rect(f"ping-{stay.status}", times, top, height)
        if not stay.site:
            continue
        for start, stop in stretches(not pings for pings in called):
            times = frame.within(first + start, first + stop, stay)
            days = int(times[1] - times[0]) // DAY
            if days >= SILENT_DAYS and stay.status == "deployed":
                back += frame.rect("silence", times, top, height)
                front += frame.word("silent", times, top + height - 3, f"{days} d")
        back += frame.rect("stay", (stay.since, stay.until), top + height / 2, 1)
        for ts in (stay.since, stay.until):
            if frame.edges[0] < ts < frame.edges[-1]:
                x = frame.share(ts)
                front += f'<rect class="end" x="{x:.2%}" width="2" y="{top - 2}" height="{height + 4}"/>'
    return back + front


def ping_strip(frame: Frame, rows: Sequence[Any], now: int) -> Strip:
    """A site; units that are there at the same time have lanes of their own, less high."""
    row = rows[0]
    drawn = lane(frame, row, 5, 14)
    height = 24
    for other in rows[1:]:
        drawn += lane(frame, other, height, 5)
        height += 9
    days = [pings.days if pings else 0 for pings in row.columns]
    drawn += frame.hover(height, lambda first, end: count(sum(days[first:end]), "day") + " with pings")
    stay = row.stays[-1]
    share = "not deployed"
    if stay.site:
        begin = max(row.stays[0].since, frame.edges[0])
        due = ceil((min(now, stay.until) - begin) / DAY)
        share = f"{sum(days)}/{due} = {100 * sum(days) // due} %"
    age = f"{ago(now - row.last)} ago" if row.last else "never"
    left = [[Span(row.name, "head", row.name)], [Span(stay.nickname)]]
    newest = [Span(age, "bad" if row.late else "head"), Span(signed(" %d dBm", row.dbm) if row.dbm else "")]
    return Strip(left, [newest, [Span(share, "more")]], height, fitted(height, frame.grid(height)) + drawn)


# -- the same page as text, TSV, JSON, HTML ---------------------------------------------------------------------------


def to_text(lines: Iterable[Line], colour: bool = False) -> str:
    """Lines for a terminal, a file or a mail."""
    def paint(span: Span) -> str:
        coloured = colour and span.style and span.text.strip()
        return "\x1b[%sm%s\x1b[0m" % (STYLES[span.style], span.text) if coloured else span.text
    return "".join("".join(map(paint, line)).rstrip() + "\n" for line in lines)


def rounded(record: Sequence[Any]) -> List[Any]:
    """For programs: of numbers the tenth is the last digit that means something."""
    return [rounded(value) if isinstance(value, list) else round(value, 1) if isinstance(value, float) else value
            for value in record]


def to_tsv(page: Page, ascii: bool = False) -> str:
    """Tab-separated values under a line with their names; a chart has one field a column, name@begin."""
    def text(value: Any) -> str:
        return "" if value is None else clean(int(value) if isinstance(value, bool) else value, ascii)
    fields = [name for field in page.fields
              for name in ([field + "@" + at for at in page.axes[field]] if field in page.axes else [field])]
    lines = [fields] + [[text(one) for value in record for one in (value if isinstance(value, list) else [value])]
                        for record in map(rounded, page.records)]
    return "".join("\t".join(line) + "\n" for line in lines if line)


def to_json(page: Page) -> str:
    """One object: the page's facts, where the columns of its charts begin, and its rows as objects."""
    import json
    message = {"message": page.empty} if page.empty else {}
    return json.dumps({"view": page.view, **page.facts, **message, "columns": page.axes, "rows": [
        dict(zip(page.fields, rounded(record))) for record in page.records]}, indent=1) + "\n"


def to_html(lines: Iterable[Line], link: Callable[[str], str]) -> str:
    """Lines for <pre>. What a browser may take from another font is boxed to the width that it has here."""
    from html import escape

    def boxed(text: str) -> str:
        pieces = [("".join(group), plain) for plain, group in groupby(text, str.isascii)]
        box = '<b class="g" style="width:%dch">%s</b>'
        return "".join(escape(piece) if plain else box % (width(piece), escape(piece)) for piece, plain in pieces)

    def draw(span: Span) -> str:
        text = '<a href="%s">%s</a>' % (escape(link(span.link)), boxed(span.text)) if span.link else boxed(span.text)
        return '<span class="%s">%s</span>' % (span.style, text) if span.style else text
    return "".join("".join(map(draw, line)).rstrip() + "\n" for line in lines)


HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>%(title)s</title>
<style>
:root { --ink: #1b1f23; --paper: #fff; --dim: #5c656e; --bad: #b31d28; --warn: #8a5a00; --good: #176f2c; --co2: #005b9a;
  --temp: #7a3e9d }
@media (prefers-color-scheme: dark) { :root { --ink: #d6dbe0; --paper: #14171a; --dim: #8b949e; --bad: #ff7b72;
  --warn: #e3b341; --good: #56d364; --co2: #6cb6ff; --temp: #d2a8ff } }
body { color: var(--ink); background: var(--paper); font: 16px/1.4 system-ui, sans-serif; margin: 1rem auto;
  max-width: 60rem; padding: 0 .6rem }
h1 { font-size: 1.2rem } h2 { font-size: 1rem; margin: 1.2rem 0 .3rem } nav a { margin-right: 1em } a { color: inherit }
pre { font: 13px/1.25 "DejaVu Sans Mono", Menlo, Consolas, "Liberation Mono", monospace; overflow-x: auto; margin: 0 }
.g { display: inline-block; font-weight: inherit; overflow: hidden; vertical-align: bottom; height: 1.25em }
.head { font-weight: bold } .dim { color: var(--dim) } .bad { color: var(--bad); font-weight: bold }
.warn { color: var(--warn) } .good { color: var(--good) } .co2 { color: var(--co2) } .temp { color: var(--temp) }
a .g { text-decoration: underline } .narrow { display: none }
@media (max-width: 52rem) { .wide { display: none } .narrow { display: block } }
</style>
</head>
<body>
<nav>%(nav)s</nav>
<h1>%(title)s</h1>
%(body)s</body>
</html>
"""

# page -> title, and its sections: heading, view, options that are not as asked
WEB: Dict[str, Tuple[str, List[Tuple[str, str, Dict[str, Any]]]]] = {
    "index": ("CO₂ fleet", [("How the units do", "status", {})]),
    "alive": ("Pings and units", [("Pings", "pings", {}), ("Units", "status", {}), ("Signal", "signal", {}),
                                  ("Gaps", "gaps", {}), ("Errors", "errors", {})]),
    "co2": ("CO₂", [("Recent CO₂", "co2", {}), ("All CO₂", "co2", {"recent_days": 0})])}
LIVE = {"index": "/", "alive": "/status/alive/summary", "co2": "/data/co2/summary"}
PHONE, DESK = 46, 100                   # cells; one is 8 px wide at 13 px
WEB_ROWS = 200                          # lines of one section, unless ?all=1


def site_link(name: str) -> str:
    """Where the daemon has a site's page."""
    from urllib.parse import quote
    return LIVE["co2"] + "?site=" + quote(name, "", errors="replace")


def draw(view: str, db: str, o: Options, now: float, rows: Optional[int]) -> Page:
    """One page from a database file, or a page that says that there is none."""
    try:
        connection = importer.open_db(db)
    except importer.NoDatabase as error:
        return nothing(view, clean("No data: %s" % error, o.glyphs == "ascii"))
    try:
        c = Context(connection, o, now, rows)
        return VIEWS[view](c) if c.stays else nothing(view, c.nobody())
    finally:
        connection.close()


def web_section(view: str, db: str, o: Options, now: float) -> Page:
    """A page that also says so when the database cannot be read."""
    try:
        return draw(view, db, o, now, None if o.all else WEB_ROWS)
    except sqlite3.Error as error:
        return nothing(view, clean("The database cannot be read: %s" % error, True))


def document(page: str, db: str, o: Options, now: float, widths: Sequence[int] = (DESK, PHONE),
             urls: Dict[str, str] = LIVE, link: Callable[[str], str] = site_link) -> str:
    """A whole HTML document: every section drawn wide, and narrow for phones; no script, and all style inside."""
    from html import escape
    o = o.but(glyphs="block") if o.glyphs == "auto" else o
    title, body = WEB[page][0] + "".join(" · " + clean(name) for name in (o.site, o.unit) if name), ""
    for heading, view, changes in WEB[page][1]:
        body += "<h2>%s</h2>\n" % heading
        for cells, kind in zip(widths, ("wide", "narrow") if len(widths) > 1 else ("any",)):
            drawn = web_section(view, db, o.but(width=cells, **changes), now)
            body += '<pre class="%s">%s</pre>\n' % (kind, to_html(drawn.lines, link))
    nav = " ".join('<a href="%s">%s</a>' % (escape(url), WEB[name][0]) for name, url in urls.items())
    return HTML % {"title": escape(title), "nav": nav, "body": body}


def web_page(view: str, db: str, query: Dict[str, str], html: bool, now: float) -> str:
    """A page for the daemon: view is index, alive or co2, query the arguments of the URL (ValueError says what is wrong
    with them). A whole HTML document, or the text page; without database or data one that says so."""
    o = Options.from_query(query)
    if html:
        return document(view, db, o, now, [o.width] if query.get("width") else (DESK, PHONE))
    return "\n".join(to_text(web_section(name, db, o.but(**changes), now).lines) for _, name, changes in WEB[view][1])

# -- the command ------------------------------------------------------------------------------------------------------


def check(a: Any, db: str, o: Options, now: float) -> int:
    """For monitoring: one line, then one for each unit with a problem; 0 is well, 1 warning, 2 critical.

    Silence is a warning; it is critical when data are three times as late as they may be, or when a unit calls and
    sends none. With --changes it speaks only when what is wrong has changed, and every --repeat hours while it is.
    """
    try:
        connection = importer.open_db(db)
        c = Context(connection, o, now, None)
        states, why = states_of(c), c.nobody()
    except (importer.NoDatabase, sqlite3.Error) as error:
        states, why = [], clean(error, o.glyphs == "ascii")
    if not states:
        put("CO2 CRITICAL: %s\n" % why)
        return 2
    bad = [state for state in states if state.level]
    worst = max([2 if state.level == importer.CRITICAL else 1 for state in bad], default=0)
    names = [(c.name(state.site or state.nickname), VERDICTS[state.verdict][2]) for state in bad]
    counts = " ".join("%s=%d" % (verdict, sum(state.verdict == verdict for state in states)) for verdict in VERDICTS)
    said = ", ".join(map(" ".join, names)) or count(len(states), "unit")
    lines = ["CO2 %s: %s | %s" % (("OK", "WARNING", "CRITICAL")[worst], said, counts)]
    lines += ["%-4s %s (%s): last ping %s, last reading %s%s" % (
        VERDICTS[state.verdict][0], c.name(state.site or "no site"), c.name(state.nickname),
        *("never" if ts is None else ago(c.now - ts) + " ago" for ts in (state.last_ping, state.last_data)),
        "; " + state.why) for state in bad]
    if not a.changes or _changed(a.changes, names, c.now, a.repeat * 3600, lines):
        put("".join(line + "\n" for line in lines))
    return worst


def _changed(path: str, names: List[Tuple[str, str]], now: float, repeat: float, lines: List[str]) -> bool:
    """Compare with what the file says was reported last; lines get what is well again."""
    try:
        with open(path, encoding="utf-8") as file:
            told, *before = file.read().splitlines()
    except (OSError, ValueError):
        told, before = "0", []
    wrong = [verdict + "\t" + name for name, verdict in names]
    if set(before) == set(wrong) and (not names or now - float(told) < repeat):
        return False
    lines += ["well again: " + name for name in (line.split("\t")[-1] for line in before) if name not in dict(names)]
    write_file(path, "\n".join(["%d" % now, *wrong]) + "\n")
    return True


SWITCHES = (("--plain", "tab-separated values"), ("--json", "JSON"),
            ("--html", "an HTML document; with -o DIR all pages as files"), ("--no-pager", "never page"),
            ("--check", "status: one line first; exit 0 well, 1 warning, 2 critical"))


def arguments(argv: Optional[Sequence[str]]) -> Any:
    """The command line; a wrong one ends the program with status 2."""
    import argparse
    cells = screen(os.environ)[0]       # else argparse asks for it, which takes as long as all the rest of it
    parser = argparse.ArgumentParser(prog="plot_ascii.py", description="Pages of a fleet of CO2 units, for a terminal.",
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, width=cells - 2))
    parser.add_argument("view", nargs="?", default="co2", choices=list(VIEWS))
    parser.add_argument("--db", metavar="FILE", help="the database (where co2d.conf says, or var/db.sqlite3)")
    for name, (_, kind, metavar, text) in OPTIONS.items():
        how: Any = {"action": "store_const", "const": "yes"} if kind is bool else {"metavar": metavar}
        parser.add_argument("--" + name.replace("_", "-"), help=text, **how)
    for flag, text in SWITCHES:
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--color", "--colour", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("-o", "--output", metavar="FILE", help="write here; with --html a directory takes all pages")
    parser.add_argument("--watch", type=number(0.1, 1e6), metavar="SECONDS", help="redraw until Ctrl-C")
    parser.add_argument("--changes", metavar="FILE", help="--check: speak only when something is not as FILE has it")
    parser.add_argument("--repeat", type=number(0, 1e5), metavar="HOURS", default=24.0,
                        help="--changes: or so long ago")
    a = parser.parse_args(argv)
    if a.changes and not a.check:
        parser.error("--changes goes with status --check")
    if a.watch and (a.output or a.check):
        parser.error("--watch draws on this terminal: leave out --check and -o, and have cron repeat those")
    return a


def screen(environ: Mapping[str, str]) -> List[int]:
    """Cells and lines: COLUMNS and LINES, then the terminal, then 80x24."""
    try:
        size: Sequence[int] = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        size = (80, 24)
    given = [environ.get(name, "") for name in ("COLUMNS", "LINES")]
    return [max(least, min(int(text) if text.isdigit() else 0, 1000) or found or usual)
            for text, least, found, usual in zip(given, (20, 5), size, (80, 24))]


def environment(a: Any, environ: Dict[str, str]) -> Options:
    """Options from the command line, completed by what the environment says of the screen and the locale."""
    cells, lines = screen(environ)
    usual = {"width": str(cells), "height": str(lines), "glyphs": "auto" if speaks_unicode(environ) else "ascii"}
    given = {name.replace("_", "-"): getattr(a, name) for name in OPTIONS if getattr(a, name) is not None}
    return Options.from_query({**usual, **given})


def speaks_unicode(environ: Dict[str, str]) -> bool:
    """Whether the user's own locale is UTF-8. Python's encodings do not tell, it makes C into UTF-8; nor does LC_CTYPE,
    which it sets itself then (PEP 538): what the process was started with does."""
    ctype = environ.get("LC_CTYPE", "")
    if ctype in ("C.UTF-8", "C.utf8", "UTF-8"):
        try:
            with open("/proc/self/environ", "rb") as file:
                ctype = ctype if b"\0LC_CTYPE=" in b"\0" + file.read() else ""
        except OSError:
            ctype = ""
    locale = (environ.get("LC_ALL") or ctype or environ.get("LANG") or "C").lower()
    return "utf-8" in locale or "utf8" in locale


def rendered(a: Any, db: str, o: Options, now: float, rows: Optional[int], environ: Dict[str, str]) -> str:
    """A page in the format asked for. Colour: a flag wins, then NO_COLOR and TERM, then whether this is a terminal."""
    if a.html:
        name = next(name for name, (_, parts) in WEB.items()
                    if name != "index" and a.view in [view for _, view, _ in parts])
        return document(name, db, o, now, [o.width])
    page = draw(a.view, db, o, now, rows)
    if a.plain and page.empty:
        print(page.empty, file=sys.stderr)
    colour = a.color == "always" or a.color == "auto" and sys.stdout.isatty() and not a.output and not (
        environ.get("NO_COLOR") or environ.get("TERM") == "dumb")
    return to_json(page) if a.json else to_tsv(page, o.glyphs == "ascii") if a.plain else to_text(page.lines, colour)


def put(text: str) -> None:
    """To stdout, in UTF-8 or ASCII as it is, whatever Python thinks of the locale."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def write_file(path: str, text: str) -> None:
    """Replace a file in one step, so that nobody reads half of it."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".new", path)


def write_site(directory: str, db: str, o: Options, now: float) -> None:
    """All pages as files for another web server, with links between them."""
    from zlib import crc32
    urls = {"index": "index.html", "alive": "status.html", "co2": "co2.html"}

    def link(name: str) -> str:
        safe = "".join(char if char.isascii() and (char.isalnum() or char in "-_.") else "_" for char in name)
        return "site-%s.html" % (safe if safe == name else "%s-%08x" % (safe, crc32(name.encode("utf-8", "replace"))))
    os.makedirs(directory, exist_ok=True)
    for page, file in urls.items():
        write_file(os.path.join(directory, file), document(page, db, o, now, urls=urls, link=link))
    try:
        connection = importer.open_db(db)
    except importer.NoDatabase:
        return
    for name in sorted({stay.site for stay in Context(connection, o, now, None).stays if stay.site}):
        text = document("co2", db, o.but(site=name), now, urls=urls, link=link)
        write_file(os.path.join(directory, link(name)), text)
    connection.close()


def page_through(text: str, environ: Dict[str, str]) -> None:
    """Show text in the user's pager; without one that starts, print it."""
    import signal
    import subprocess
    try:
        process = subprocess.Popen(environ.get("PAGER") or "less -FIRX", shell=True, stdin=subprocess.PIPE,
                                   env={"LESS": "FIRX", "LESSCHARSET": "utf-8", **environ})
    except OSError:
        return put(text)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is meant for the pager
    process.communicate(text.encode())
    if process.returncode == 127:
        put(text)


class Resized(Exception):
    """The terminal has another size now."""


def watch(a: Any, db: str, environ: Dict[str, str], clock: Callable[[], float]) -> None:
    """Redraw in place until Ctrl-C, and at once when the terminal changes its size."""
    import signal

    def resized(*_: Any) -> None:
        raise Resized
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))             # by way of finally
    put("\x1b[?1049h\x1b[?25l")         # the other screen, no cursor
    try:
        while True:
            o = environment(a, environ)
            try:
                text = rendered(a, db, o, clock(), o.height - 1, environ)
            except sqlite3.Error as error:
                text = clean(error, True) + "\n"
            put("\x1b[H" + text.replace("\n", "\x1b[K\n") + "\x1b[J")
            try:
                signal.signal(signal.SIGWINCH, resized)
                time.sleep(a.watch)
            except Resized:
                pass
            finally:
                signal.signal(signal.SIGWINCH, signal.SIG_IGN)
    finally:
        put("\x1b[?25h\x1b[?1049l")


def run(a: Any, environ: Dict[str, str], clock: Callable[[], float]) -> int:
    """One command."""
    db, o = importer.load_settings(None, {"db": a.db}, environ).db, environment(a, environ)
    if a.check:
        return check(a, db, o, clock())
    if a.watch:
        watch(a, db, environ, clock)
    if a.html and a.output and (os.path.isdir(a.output) or a.output.endswith("/")):
        write_site(a.output, db, o, clock())
        return 0
    paged = sys.stdout.isatty() and sys.stdin.isatty() and not a.no_pager and not a.output
    whole = o.all or a.plain or a.json or paged and a.view != "status"
    text = rendered(a, db, o, clock(), None if whole else o.height - 1, environ)
    if a.output:
        write_file(a.output, text)
    elif paged and text.count("\n") >= o.height:
        page_through(text, environ)
    else:
        put(text)
    return 0


def main(argv: Optional[Sequence[str]] = None, now: Optional[float] = None) -> int:
    """The command line; the exit status."""
    gc.set_threshold(1000000)           # a page is many small tuples and no cycles
    try:
        return run(arguments(argv), dict(os.environ), lambda: time.time() if now is None else now)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:             # the reader has seen enough; what is still in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ValueError as error:
        print("plot_ascii: %s" % error, file=sys.stderr)
        return 2
    except (sqlite3.Error, OSError, importer.Unusable) as error:
        print("plot_ascii: %s" % clean(error, True), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
