#!/usr/bin/env python3
"""Pages for people at a terminal: CO2, pings, status, signal, errors and gaps of a fleet of sensor units, as text.

A page is made in one direction only:

    queries (importer)  ->  buckets, one for each column of the page  ->  `Page`: the numbers, and the lines drawn from them
                                                                      ->  text, TSV, JSON, HTML
Words used here:

    axis      the columns of a chart in time. A column is a calendar step long (5 min ... 1 h ... 1 d ... 1 week ... 5 years)
              and begins where such a step begins in the page's time zone; the shortest step that fits the width is taken, so
              a chart may be narrower than its room. Ticks stand on calendar steps too, no closer than their labels allow;
              where a year begins the label is the year.
    scale     from the least to the greatest value inside the *fence*, rounded outward. The fence is Tukey's for values far
              out: three interquartile distances beyond the quartiles of what all columns of the page hold. A value outside
              the scale is marked in its column, and counted: a spike neither vanishes nor flattens the page.
    gap       a column without readings is blank: never bridged, never zero. Only where a unit measures more seldom than the
              column is wide (`importer.buckets`) the value before is held.
    glyphs    three sets of characters in one table. `auto` is block, with braille in the large plots, and ascii where the
              user's locale is C. A page's own words are written in Unicode here and pass through `PLAIN` for ascii.
    span      text, style, link: what lines are made of. Foreign text gets into a span only through `clean`, which leaves no
              control or format character; width is counted in cells of a terminal, wide characters as two.
    part      a piece of a heading and its rank: where the line is too short, the last rank is shortened, then left out.
    cell      what a table holds: values for programs, spans for people. A list as value is a chart, one number a column.

Every row has its numbers in digits, and colour only repeats what the text says. --plain and --json have the numbers that
are drawn. A page costs columns x rows: what it has no room for is not asked for.

Left out on purpose: smoothing and interpolation, a second y axis, sixel and other graphics, keys to press (--watch redraws
in place with a few escape sequences, no curses), palettes beyond the terminal's own.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import datetime, timedelta
from itertools import groupby
from math import ceil, floor, log10
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

import importer

DAY = 86400                             # s
EPOCH = datetime(1970, 1, 1)
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()

# -- glyphs -----------------------------------------------------------------------------------------------------------

BLOCK = {"ramp": "▁▂▃▄▅▆▇█", "days": "░▒▓█", "silent": "─", "open": "├", "close": "┤", "pings": "·▌█", "up": "▲", "down": "▼",
         "suspect": "?", "side": "│", "label": "┤", "zero": "┄", "last": "◂", "foot": "╵", "to": "–", "mean": "▀", "range": "░",
         "status": "█▒░", "part": "▂", "whisker": "─", "box": "━", "median": "█", "dot": "○", "limit": "┊", "none": "–",
         "degree": "°C", "sub": 2}      # sub: places above each other in one cell of a large plot
BRAILLE = {**BLOCK, "mean": "⠒", "range": "⠅", "sub": 4}
ASCII = {"ramp": ".:-=+*#%", "days": ".:+#", "silent": "-", "open": "[", "close": "]", "pings": ".|!", "up": "^", "down": "v",
         "suspect": "?", "side": "|", "label": "+", "zero": ".", "last": "<", "foot": "|", "to": "..", "mean": "*", "range": ":",
         "status": "=-.", "part": "_", "whisker": "-", "box": "=", "median": "#", "dot": "o", "limit": ".", "none": "-",
         "degree": "degC", "sub": 1}
Glyphs = Dict[str, Any]
# name -> glyphs of tables, glyphs of large plots, columns in one cell of a table's chart
GLYPHS: Dict[str, Tuple[Glyphs, Glyphs, int]] = {
    "auto": (BLOCK, BRAILLE, 1), "braille": (BLOCK, BRAILLE, 2), "block": (BLOCK, BLOCK, 1), "ascii": (ASCII, ASCII, 1)}
BARS = (0, 0x40, 0x44, 0x46, 0x47), (0, 0x80, 0xA0, 0xB0, 0xB8)        # braille: a half filled from below, left and right
DOTS = (0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08)              # braille: dots from below, left and right
PLAIN = str.maketrans({"·": "", "–": "-", "−": "-", "₂": "2", "°": "", "×": "x", "…": "..", "╷": "|", "▲": "^", "▼": "v"})
LATIN = str.maketrans({"ø": "o", "Ø": "O", "æ": "ae", "Æ": "AE", "đ": "d", "Đ": "D", "ð": "d", "þ": "th", "ß": "ss", "ł": "l",
                       "ŋ": "n", "ŧ": "t"})

# -- text: foreign text made harmless, width in cells --------------------------------------------------------------------


def clean(text: Any, ascii: bool = False) -> str:
    """Foreign text for a terminal: what does not print becomes ?, any space a plain one; in ASCII letters lose their marks."""
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    import unicodedata as u
    text = u.normalize("NFC", text)
    if ascii:
        text = "".join(c for c in u.normalize("NFKD", text.translate(LATIN)) if not u.combining(c))
    kinds = [(c, u.category(c)) for c in text if not "\ufe00" <= c <= "\ufe0f"]        # variation selectors: width unknown
    text = "".join(" " if kind == "Zs" else "?" if kind[0] == "C" or kind in ("Zl", "Zp") else c for c, kind in kinds)
    return text.encode("ascii", "replace").decode() if ascii else text


def width(text: str) -> int:
    """Cells that clean text takes on a terminal."""
    if text.isascii():
        return len(text)
    import unicodedata as u
    return sum(0 if u.category(c) in ("Mn", "Me") or "\u1160" <= c <= "\u11ff" else 2 if u.east_asian_width(c) in "WF" else 1
               for c in text)


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
Part = Union[str, Tuple[str, ...]]      # forms of a text, the longest first
STYLES = {"head": "1", "bad": "1;31", "warn": "33", "good": "32", "dim": "2", "co2": "36", "temp": "35"}      # SGR codes


def pad(spans: Sequence[Span], cells: int, right: bool = False) -> Line:
    """Spans made so many cells wide; a single one is cut."""
    spans = [spans[0]._replace(text=cut(spans[0].text, cells))] if len(spans) == 1 else list(spans)
    fill = Span(" " * (cells - sum(width(span.text) for span in spans)))
    return [fill, *spans] if right else [*spans, fill]


def runs(chars: Iterable[Tuple[str, str]]) -> Line:
    """Characters with their styles, as one span for each run of a style."""
    return [Span("".join(char for char, _ in group), style) for style, group in groupby(chars, key=lambda pair: pair[1])]


def fit(parts: Iterable[Tuple[int, Part]], cells: int, gap: str) -> str:
    """The parts of a heading, in order, as far as they fit."""
    left = [(rank, part if isinstance(part, tuple) else (part,)) for rank, part in parts if part]
    while True:
        text = gap.join(forms[0] for _, forms in left)
        if width(text) <= cells or len(left) == 1 and len(left[0][1]) == 1:
            return cut(text, cells)
        worst = max(range(len(left)), key=lambda i: left[i][0])
        rank, forms = left[worst]
        left[worst:worst + 1] = [(rank, forms[1:])] if len(forms) > 1 else []


def compact(value: Optional[float]) -> str:
    """ppm in at most four characters: 411, 1200, 10k."""
    return "" if value is None else "%.0f" % value if -950 < value < 9950 else "%.0fk" % (value / 1000)


def ago(seconds: float) -> str:
    """A time in at most eight characters: 12 min, 11 h, 9 d 02 h, 175 d."""
    hours = int(seconds // 3600)
    if hours < 24:
        return "%d h" % hours if hours else "%d min" % (seconds // 60)
    return "%d d %02d h" % divmod(hours, 24) if hours < 2400 else "%d d" % (hours // 24)


# -- time: zones, calendar steps, axes, ticks ---------------------------------------------------------------------------


class Zone:
    """Local times as naive datetimes, and back. Where clocks are set back, the first of the two is meant."""

    def __init__(self, name: str = "UTC") -> None:
        self.name, self.info = clean(name), None
        if name.upper() != "UTC":
            try:
                import zoneinfo
                self.info = zoneinfo.ZoneInfo(name)
            except ImportError:
                raise ValueError("time zones need Python 3.9 or newer; this is %d.%d" % sys.version_info[:2])
            except (KeyError, ValueError, OSError):
                raise ValueError("no time zone %s is known on this machine" % clean(name, True)[:40])

    def local(self, ts: float) -> datetime:
        """UTC seconds as local time."""
        return datetime.fromtimestamp(ts, self.info).replace(tzinfo=None) if self.info else EPOCH + timedelta(seconds=ts)

    def seconds(self, local: datetime) -> int:
        """Local time as UTC seconds."""
        return int(local.replace(tzinfo=self.info).timestamp() if self.info else (local - EPOCH).total_seconds())

    def iso(self, ts: int) -> str:
        """For data: to the minute, with the offset, 2019-09-26T14:00+02:00; Z for UTC."""
        offset = int((self.local(ts) - EPOCH).total_seconds() - ts) // 60
        return self.local(ts).strftime("%Y-%m-%dT%H:%M") + ("%+03d:%02d" % divmod(offset, 60) if offset else "Z")

    def parse(self, text: str) -> int:
        """UTC seconds of a date or date-time in this zone."""
        for form in ("%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S", "%Y-%m"):
            try:
                return self.seconds(min(max(datetime.strptime(text.rstrip("Z"), form), datetime(1970, 1, 2)), datetime(2100, 1, 1)))
            except ValueError:
                continue
        raise ValueError("not a date or time like 2019-09-26 or 2019-09-26T12:00: %s" % clean(text, True)[:40])

    def short(self, ts: int) -> str:
        """26 Sep 12:00."""
        return _date(self.local(ts), False, True)

    def period(self, a: int, b: int, to: str) -> Tuple[str, ...]:
        """A range for a heading, with the zone, in shorter and shorter forms. Of whole days the last is named, not the next."""
        one, other = self.local(a), self.local(b)
        midnight = other == snap(other, TODAY)
        days = b - a > 99 * DAY or midnight and one == snap(one, TODAY)
        other -= timedelta(seconds=days and midnight)
        long, short = ("%s %s %s %s" % (_date(one, one.year != other.year, clock), to, _date(other, True, clock), self.name)
                       for clock in (not days, False))
        return long, short, "%s %s" % (_date(other, True, False), self.name)


def _date(local: datetime, year: bool, clock: bool) -> str:
    return "%d %s%s%s" % (local.day, MONTHS[local.month - 1], " %d" % local.year if year else "", local.strftime(" %H:%M") if clock else "")


Step = Tuple[str, int]                  # unit, how many
TODAY = ("day", 1)
STEPS: Dict[str, Step] = {"5 min": ("min", 5), "10 min": ("min", 10), "30 min": ("min", 30), "1 h": ("min", 60), "2 h": ("min", 120),
                          "3 h": ("min", 180), "6 h": ("min", 360), "12 h": ("min", 720), "1 d": ("day", 1), "2 d": ("day", 2),
                          "3 d": ("day", 3), "1 week": ("day", 7), "2 weeks": ("day", 14), "1 month": ("month", 1),
                          "2 months": ("month", 2), "3 months": ("month", 3), "6 months": ("month", 6), "1 year": ("month", 12),
                          "5 years": ("month", 60)}
TICKS: List[Step] = [("min", n) for n in (10, 30, 60, 120, 180, 360, 720)] + [("date", n) for n in (1, 2, 3, 5, 10, 15)] + \
                    [("month", n) for n in (1, 2, 3, 6, 12, 24, 60, 120)]


def snap(local: datetime, step: Step, on: int = 0) -> datetime:
    """Where the calendar step begins in which a time falls, or one that many steps later. Weeks begin on Monday, dates count
    from the 1st of their month, and leave out one that is too close to the next 1st."""
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


class Axis(NamedTuple):
    """Columns of a chart."""
    edges: List[int]                    # UTC seconds, one more than columns
    step: str
    cells: int
    heading: str                        # ticks with their labels; ╷ stands at the tick


def make_axis(zone: Zone, a: int, b: int, cells: int, exact: bool, per_cell: int = 1, least: str = "30 min") -> Axis:
    """Columns from a to b. Unless `exact`, a first one that would begin before a is left out."""
    for name in list(STEPS)[list(STEPS).index(least):]:
        step, start = STEPS[name], snap(zone.local(a), STEPS[name])
        if not exact and zone.seconds(start) < a and zone.seconds(snap(start, step, 1)) < b:
            start = snap(start, step, 1)
        edges = [zone.seconds(start)]
        while edges[-1] < b and len(edges) <= cells * per_cell:
            start = snap(start, step, 1)
            edges += [zone.seconds(start)] * (zone.seconds(start) > edges[-1])     # an hour that the clocks skip has no column
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
    for step in TICKS:
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
        return min(levels - 1, max(0, floor((value - low) / (high - low) * levels)))


def _log(value: float) -> float:
    return log10(max(value, 1e-3))


def nice(size: float) -> float:
    """The next of 1, 2, 5, 10, 20 ... that is not smaller."""
    power = 10.0 ** floor(log10(size))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= size * 0.9999)


def make_scale(buckets: Iterable[Optional[importer.Bucket]], narrow: float, top: Optional[float] = None, log: bool = False) -> Scale:
    """All values inside the fence, rounded outward. `narrow` is the least interquartile distance that the fence believes."""
    ends = sorted(end for bucket in buckets if bucket and bucket.n for end in (bucket.low, bucket.high)) or [0.0, 4 * narrow]
    lower, upper = ends[len(ends) // 4], ends[len(ends) * 3 // 4]
    reach = 3 * max(upper - lower, narrow)
    inside = [end for end in ends if lower - reach <= end <= upper + reach]
    unit = nice(max(inside[-1] - inside[0], 1) / 15)
    low, high = floor(inside[0] / unit) * unit, ceil(inside[-1] / unit) * unit
    high = top if top is not None else max(high, low + unit)
    low = low if low < high else high / 2
    return Scale(max(low, 1), max(high, 2), True) if log else Scale(low, high)


def make_rows(scale: Scale, rows: int) -> Tuple[Scale, List[str]]:
    """A scale stretched so that the middles of a plot's rows lie at round numbers, and the labels of the rows, from below."""
    if scale.log:
        low, step = _log(scale.low), (_log(scale.high) - _log(scale.low)) / max(rows - 1, 1)
        return (Scale(10 ** (low - step / 2), 10 ** (low + step * (rows - 0.5)), True),
                [compact(10 ** (low + row * step)) if row % 2 == 0 else "" for row in range(rows)])
    unit = nice(scale.high - scale.low) / 1000
    step = next(n * unit * ten for ten in (1, 10, 100, 1000, 10000) for n in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5)
                if scale.high <= (floor(scale.low / (n * unit * ten) + 0.5) + rows - 0.5) * n * unit * ten)
    first = floor(scale.low / step + 0.5)
    return (Scale((first - 0.5) * step, (first + rows - 0.5) * step),
            ["%.4g" % (row * step) if rows < 5 or row % 2 == 0 else "" for row in range(first, first + rows)])
