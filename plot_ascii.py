#!/usr/bin/env python3
"""Pages for people at a terminal: CO2, pings, status, signal, errors and gaps of a fleet of sensor units, as text.

A page is made in one direction only:

    queries (importer)  ->  numbers in columns of a page  ->  `Page`: the numbers, and lines of spans drawn from them
                                                              ->  text, TSV, JSON, HTML

Words used here:

    axis      the columns of a chart in time. A column is a calendar step long (30 min ... 1 h ... 1 d ... 1 week ... 1
              year), begins where such a step begins in the page's time zone, and the shortest step that fits is taken;
              charts may therefore be narrower than the page. Ticks stand on calendar steps too, never closer than
              their labels allow; the first month of a year is labelled with the year.
    bucket    what `importer` counted in one column: number, sum, least and greatest of usable values, and of suspect ones
    scale     from the least to the greatest value inside the *fence*, rounded outward. The fence is Tukey's for values
              far out (three interquartile distances beyond the quartiles of all columns of the page). What is outside
              the scale is marked in its column and counted, so that a spike neither vanishes nor flattens the page.
    gap       columns without readings, when the distance between the readings on both sides is more than twice the
              unit's own rhythm. It is blank: never bridged, never zero. A shorter distance is filled from its left
              (a unit that measures every 3 h, in columns of 1 h).
    glyphs    three sets of characters, one table: ascii (7 bit), block, braille. `auto` is block, with braille for the
              large plots, or ascii in the C locale. All of a page's own text is written in Unicode here and goes through
              `PLAIN` for ascii.
    span      text, style, link. Only `clean` lets foreign text into a span: no control or format characters remain, and
              width is counted in cells of a terminal.
    part      a piece of a heading with its rank: what does not fit the width is shortened, then left out, last rank first

Every row carries its numbers in digits; colour only repeats what the text says. --plain and --json give the numbers that
are drawn, column by column.

Left out on purpose: interpolation and smoothing, a second y axis, interactive keys, sixel and other graphics, curses
(--watch redraws in place with four escape sequences), wider colour palettes than a terminal's own.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import datetime, timedelta
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import importer

DAY = 86400
EPOCH = datetime(1970, 1, 1)
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()

# -- glyphs -----------------------------------------------------------------------------------------------------------

BLOCK = {"ramp": "▁▂▃▄▅▆▇█", "days": "░▒▓█", "silent": "─", "open": "├", "close": "┤", "pings": "·▌█", "up": "▲", "down": "▼",
         "suspect": "?", "side": "│", "label": "┤", "zero": "┄", "last": "◂", "tick": "╷", "foot": "╵", "to": "–",
         "mean": "▀", "range": "░", "status": "█▒░", "part": "▂", "whisker": "─", "box": "━", "median": "█", "dot": "○",
         "limit": "┊", "sub": 2}
BRAILLE = {**BLOCK, "mean": "⠒", "range": "⠅", "sub": 4}
ASCII = {"ramp": ".:-=+*#%", "days": ".:+#", "silent": "-", "open": "[", "close": "]", "pings": ".|!", "up": "^", "down": "v",
         "suspect": "?", "side": "|", "label": "+", "zero": ".", "last": "<", "tick": "|", "foot": "|", "to": "..",
         "mean": "*", "range": ":", "status": "=-.", "part": "_", "whisker": "-", "box": "=", "median": "#", "dot": "o",
         "limit": ".", "sub": 1}
# name -> what small charts are drawn with, what large plots are drawn with, data columns in one cell of a small chart
GLYPHS: Dict[str, Tuple[Dict[str, Any], Dict[str, Any], int]] = {
    "auto": (BLOCK, BRAILLE, 1), "braille": (BRAILLE, BRAILLE, 2), "block": (BLOCK, BLOCK, 1), "ascii": (ASCII, ASCII, 1)}
BARS = ((0, 0x40, 0x44, 0x46, 0x47), (0, 0x80, 0xA0, 0xB0, 0xB8))      # braille: left and right half filled from below
DOTS = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))            # braille: left and right dots from below
PLAIN = {ord(one): other for one, other in {
    "·": "", "–": "-", "−": "-", "₂": "2", "°": "", "×": "x", "…": "~", "≥": ">=", "╷": "|", "▲": "^", "▼": "v"}.items()}
LATIN = {ord(one): other for one, other in {"ø": "o", "Ø": "O", "æ": "ae", "Æ": "AE", "å": "a", "Å": "A", "đ": "d", "Đ": "D",
                                            "ð": "d", "þ": "th", "ß": "ss", "ł": "l", "ŋ": "n", "ŧ": "t"}.items()}

# -- text: foreign text made harmless, widths in cells ------------------------------------------------------------------


def clean(text: Any, ascii: bool = False) -> str:
    """Foreign text for a terminal: control, format, private and unassigned characters become ?, spaces plain spaces."""
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    import unicodedata
    if ascii:
        parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFC", text).translate(LATIN))
        text = "".join(c for c in parts if not unicodedata.combining(c))
        return "".join(c if " " <= c <= "~" else " " if c.isspace() and c > "\xa0" else "?" for c in text)
    text = "".join(c for c in unicodedata.normalize("NFC", text) if not "\ufe00" <= c <= "\ufe0f")
    return "".join(" " if category == "Zs" else "?" if category[0] == "C" or category in ("Zl", "Zp") else c
                   for c, category in ((c, unicodedata.category(c)) for c in text))


def width(text: str) -> int:
    """Cells that clean text takes on a terminal: wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    import unicodedata
    return sum(0 if unicodedata.category(c) in ("Mn", "Me") or "\u1160" <= c <= "\u11ff"
               else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, cells: int) -> str:
    """Clean text in at most so many cells; a ~ stands for what is missing."""
    if width(text) <= cells:
        return text
    while text and width(text) > cells - 1:
        text = text[:-1]
    return (text + "~")[:max(cells, 0)]


class Span(NamedTuple):
    """A piece of a line: clean text, a name of STYLES, the site it leads to."""
    text: str
    style: str = ""
    link: str = ""


Line = List[Span]
STYLES = {"head": "1", "bad": "1;31", "warn": "33", "good": "32", "dim": "2", "co2": "36", "temp": "35"}


def pad(spans: Sequence[Span], cells: int, right: bool = False) -> Line:
    """Spans made exactly so many cells wide (cut when there is only one)."""
    spans = [spans[0]._replace(text=cut(spans[0].text, cells))] if len(spans) == 1 else list(spans)
    fill = Span(" " * (cells - sum(width(span.text) for span in spans)))
    return [fill, *spans] if right else [*spans, fill]


def runs(cells: Iterable[Tuple[str, str]]) -> Line:
    """Characters with their styles as spans, one for each run of a style."""
    line: Line = []
    for char, style in cells:
        if line and line[-1].style == style:
            line[-1] = Span(line[-1].text + char, style)
        else:
            line.append(Span(char, style))
    return line


Part = Union[str, Tuple[str, str]]      # text, or a long and a short form


def fit(parts: Sequence[Tuple[int, Part]], cells: int, gap: str = " · ") -> str:
    """The parts of a heading that fit, in order: the highest rank is first shortened, then left out."""
    left = [(rank, part if isinstance(part, tuple) else (part,)) for rank, part in parts if part]
    while True:
        text = gap.join(forms[0] for _, forms in left)
        worst = max(range(len(left)), key=lambda i: left[i][0])
        if width(text) <= cells or len(left) == 1 and len(left[0][1]) == 1:
            return cut(text, cells)
        rank, forms = left[worst]
        left[worst:worst + 1] = [(rank, forms[1:])] if len(forms) > 1 else []


def compact(value: Optional[float]) -> str:
    """At most four characters: 411, 1200, 10k."""
    return "" if value is None else "%.0f" % value if -9.5 < value / 100 < 99.5 else "%.0fk" % (value / 1000)


def ago(seconds: float) -> str:
    """At most eight characters: 12 min, 11 h, 9 d 02 h, 175 d."""
    hours = int(seconds // 3600)
    if seconds < 3600:
        return "%d min" % (seconds // 60)
    return "%d h" % hours if hours < 24 else "%d d %02d h" % divmod(hours, 24) if hours < 2400 else "%d d" % (hours // 24)


# -- time: zones, calendar steps, axes, ticks ---------------------------------------------------------------------------


class Zone:
    """Local times as naive datetimes, and back. Where clocks are set back, the first of the two is meant."""

    def __init__(self, name: str = "UTC") -> None:
        self.name, self.info = name, None
        if name.upper() != "UTC":
            self.info = _zone(name)

    def local(self, ts: float) -> datetime:
        """UTC seconds as local time."""
        return datetime.fromtimestamp(ts, self.info).replace(tzinfo=None) if self.info else EPOCH + timedelta(seconds=ts)

    def seconds(self, local: datetime) -> int:
        """Local time as UTC seconds."""
        return int(local.replace(tzinfo=self.info).timestamp() if self.info else (local - EPOCH).total_seconds())

    def iso(self, ts: int) -> str:
        """For data: local time to the minute with the offset from UTC, 2019-09-26T12:00Z."""
        local = self.local(ts)
        offset = int((local - EPOCH).total_seconds() - ts) // 60
        return local.strftime("%Y-%m-%dT%H:%M") + ("%+03d:%02d" % (offset // 60, offset % 60) if offset else "Z")

    def short(self, ts: int) -> str:
        """26 Sep 12:00."""
        local = self.local(ts)
        return "%d %s %02d:%02d" % (local.day, MONTHS[local.month - 1], local.hour, local.minute)


def _zone(name: str) -> Any:
    try:
        import zoneinfo
    except ImportError:
        raise ValueError("--tz %s: time zones need Python 3.9 or newer; this is %d.%d" % ((name,) + sys.version_info[:2]))
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("no time zone %r is known on this machine" % name)


Step = Tuple[str, int, str]             # unit, how many, name

STEPS: List[Step] = [("min", 5, "5 min"), ("min", 10, "10 min"), ("min", 30, "30 min"), ("min", 60, "1 h"), ("min", 120, "2 h"),
                     ("min", 180, "3 h"), ("min", 360, "6 h"), ("min", 720, "12 h"), ("day", 1, "1 d"), ("day", 2, "2 d"),
                     ("week", 1, "1 week"), ("week", 2, "2 weeks"), ("month", 1, "1 month"), ("month", 2, "2 months"),
                     ("month", 3, "3 months"), ("month", 6, "6 months"), ("month", 12, "1 year"), ("month", 60, "5 years")]
TICKS: List[Step] = [(unit, n, "") for unit, n in (
    ("min", 10), ("min", 30), ("min", 60), ("min", 120), ("min", 180), ("min", 360), ("min", 720), ("date", 1), ("date", 2),
    ("date", 3), ("date", 5), ("date", 10), ("date", 15), ("month", 1), ("month", 2), ("month", 3), ("month", 6), ("month", 12),
    ("month", 24), ("month", 60), ("month", 120))]


def floor(local: datetime, step: Step) -> datetime:
    """The begin of the calendar step in which a time falls; weeks begin on Monday, dates count from the 1st."""
    unit, n, _ = step
    day = local.replace(hour=0, minute=0, second=0, microsecond=0)
    if unit == "min":
        return day + timedelta(minutes=(local.hour * 60 + local.minute) // n * n)
    if unit == "month":
        months = (local.year * 12 + local.month - 1) // n * n
        return day.replace(year=months // 12, month=months % 12 + 1, day=1)
    if unit == "date":
        date = (local.day - 1) // n * n + 1
        return day.replace(day=date - n if n > 1 and date + 0.6 * n > 31 else date)
    n *= 7 if unit == "week" else 1
    return day - timedelta(days=(day.toordinal() - 1) % n)


def following(local: datetime, step: Step) -> datetime:
    """The begin of the next step, from the begin of one."""
    unit, n, _ = step
    if unit == "month":
        months = local.year * 12 + local.month - 1 + n
        return local.replace(year=months // 12, month=months % 12 + 1)
    return local + (timedelta(minutes=n) if unit == "min" else timedelta(days=n * (7 if unit == "week" else 1)))


class Axis(NamedTuple):
    """Columns of a chart."""
    edges: List[int]                    # UTC seconds; one more than columns
    step: str
    ticks: List[Tuple[int, str]]        # cell, label
    per_cell: int                       # columns in one cell

    @property
    def cells(self) -> int:
        """Cells across."""
        return -(-(len(self.edges) - 1) // self.per_cell)

    def heading(self, mark: str) -> str:
        """The ticks with their labels as one line of text."""
        line = " " * self.cells
        for cell, label in self.ticks:
            line = line[:cell] + mark + label + line[cell + 1 + len(label):]
        return line


def make_axis(zone: Zone, a: int, b: int, cells: int, exact: bool = False, per_cell: int = 1, least: str = "30 min") -> Axis:
    """Columns from a to b in at most so many cells. Unless `exact`, a first column that is not complete may be left out."""
    steps = STEPS[[name for _, _, name in STEPS].index(least):]
    start = edges = None
    for step in steps:
        start = floor(zone.local(a), step)
        if not exact and zone.seconds(start) < a and zone.seconds(following(start, step)) < b:
            start = following(start, step)
        edges = _edges(zone, start, b, step, cells * per_cell)
        if edges:
            break
    edges = edges or [a, max(b, a + 1)]
    return Axis(edges, step[2], make_ticks(zone, edges, per_cell), per_cell)


def _edges(zone: Zone, start: datetime, b: int, step: Step, most: int) -> Optional[List[int]]:
    edges = [zone.seconds(start)]
    while edges[-1] < b:
        if len(edges) > most:
            return None
        start = following(start, step)
        edge = zone.seconds(start)
        if edge > edges[-1]:            # an hour that the clocks skip has no column
            edges.append(edge)
    return edges


def make_ticks(zone: Zone, edges: Sequence[int], per_cell: int = 1) -> List[Tuple[int, str]]:
    """Ticks on the smallest calendar steps whose labels do not meet."""
    cells = -(-(len(edges) - 1) // per_cell)
    times = [zone.local(edge) for edge in edges]
    chosen: List[Tuple[int, str]] = []
    for step in TICKS:
        ticks = [(j // per_cell, _label(tick, step)) for j, (one, other) in enumerate(zip(times, times[1:]))
                 for tick in [floor(other - timedelta(seconds=1), step)] if tick >= one]
        chosen = _spaced(ticks, cells)
        if len(chosen) >= 0.8 * len(ticks):
            break
    return chosen


def _label(tick: datetime, step: Step) -> str:
    if step[0] == "min" and (tick.hour or tick.minute):
        return "%02d:%02d" % (tick.hour, tick.minute)
    if tick.month == tick.day == 1:
        return str(tick.year)
    if step[0] == "min":
        return "%d %s" % (tick.day, MONTHS[tick.month - 1])
    return MONTHS[tick.month - 1] if tick.day == 1 else str(tick.day)


def _spaced(ticks: Sequence[Tuple[int, str]], cells: int) -> List[Tuple[int, str]]:
    kept: List[Tuple[int, str]] = []
    for cell, label in ticks:
        if kept and len(label) == 4 and label.isdigit() and kept[-1][0] + len(kept[-1][1]) >= cell:
            kept.pop()                  # a new year goes before the label left of it
        if (not kept or kept[-1][0] + len(kept[-1][1]) < cell) and cell + len(label) < cells:
            kept.append((cell, label))
    return kept


def period(zone: Zone, a: int, b: int, to: str) -> Tuple[str, ...]:
    """A time range for a heading, long and short form, with its zone. Of whole days the last is named, not the next."""
    one, other = zone.local(a), zone.local(b)
    midnight = other == floor(other, ("day", 1, ""))
    days = b - a > 99 * DAY or midnight and one == floor(one, ("day", 1, ""))
    other -= timedelta(seconds=1 if days and midnight else 0)

    def date(local: datetime, clock: bool, year: bool) -> str:
        return "%d %s" % (local.day, MONTHS[local.month - 1]) + " %d" % local.year * year + \
            " %02d:%02d" % (local.hour, local.minute) * clock
    years = one.year != other.year
    ranges = ["%s %s %s %s" % (date(one, clock, years), to, date(other, clock, True), zone.name) for clock in (not days, False)]
    return (ranges[0], ranges[1], "%s %s" % (date(other, False, True), zone.name))


# -- scales -----------------------------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """Values from low to high."""
    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """0 at low, 1 at high."""
        if self.log:
            import math
            return math.log(max(value, 1) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def level(self, value: float, levels: int) -> int:
        """0 ... levels - 1; what is outside takes the outermost."""
        return min(levels - 1, max(0, int(self.share(value) * levels)))


def nice(size: float) -> float:
    """The next of 1, 2, 5, 10 ... that is not smaller."""
    import math
    power = 10.0 ** math.floor(math.log10(size))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= size * 0.9999)


def make_scale(lows: Sequence[float], highs: Sequence[float], narrow: float, high: Optional[float] = None, log: bool = False) -> Scale:
    """All values inside the fence, rounded outward. `narrow` is the least interquartile distance that is taken seriously."""
    both = sorted([*lows, *highs])
    if not both:
        return Scale(400, 500) if narrow > 10 else Scale(0, 10)
    lower, upper = both[len(both) // 4], both[len(both) * 3 // 4]
    reach = 3 * max(upper - lower, narrow)
    inside = [value for value in both if lower - reach <= value <= upper + reach]
    unit = nice(max(inside[-1] - inside[0], 1) / 15)
    bottom, top = inside[0] // unit * unit, -(-inside[-1] // unit) * unit
    top = high if high is not None else max(top, bottom + unit)
    bottom = bottom if bottom < top else top / 2
    return Scale(max(bottom, 1) if log else bottom, top, log)

# -- pages: the numbers, and the lines drawn from them --------------------------------------------------------------------


class Page(NamedTuple):
    """One view. Records have the numbers that the lines show; a list in a record is a chart, one value a column."""
    view: str
    facts: Dict[str, Any]               # for JSON: title, zone, scale
    fields: List[str]
    records: List[List[Any]]
    lines: List[Line]
    axes: Dict[str, List[str]] = {}     # field of a chart -> begin of each of its columns
    empty: str = ""                     # why there is nothing to show


class Options(NamedTuple):
    """What a page is asked for, from the command line or from a URL."""
    xmin: Optional[str] = None
    xmax: Optional[str] = None
    recent_days: Optional[float] = None
    min_tier: Optional[int] = None
    max_tier: Optional[int] = None
    co2_max: Optional[float] = None
    unit: Optional[str] = None
    site: Optional[str] = None
    tz: str = "UTC"
    width: int = 80
    height: int = 24
    glyphs: str = "auto"
    all: bool = False
    log: bool = False
    panels: bool = False
    ping_limit: Optional[float] = None
    data_limit: Optional[float] = None


class Context(NamedTuple):
    """What all views draw with."""
    db: Any
    options: Options
    zone: Zone
    now: int                            # UTC seconds: of this moment, or of --xmax
    rows: Optional[int]                 # lines a page may have, None: any number

    @property
    def ascii(self) -> bool:
        """7 bit only."""
        return self.options.glyphs == "ascii"

    @property
    def small(self) -> Dict[str, Any]:
        """Glyphs of small charts."""
        return GLYPHS[self.options.glyphs][0]

    @property
    def width(self) -> int:
        """Cells of a line."""
        return self.options.width

    def room(self, others: int) -> Optional[int]:
        """How many rows a page has room for beside other lines; None: any number."""
        return None if self.rows is None else max(1, self.rows - others)

    def say(self, text: str) -> str:
        """Our own text in the page's character set."""
        return text.translate(PLAIN) if self.ascii else text

    def name(self, text: Any) -> str:
        """Foreign text in the page's character set."""
        return clean(text, self.ascii)

    def head(self, *parts: Tuple[int, Part], style: str = "head") -> Line:
        """A heading from parts."""
        said = [(rank, tuple(self.say(form) for form in part) if isinstance(part, tuple) else self.say(part)) for rank, part in parts]
        return [Span(fit(said, self.width, self.say(" · ")), style)]


class Column(NamedTuple):
    """A column of a table. `fields` name its values in TSV and JSON."""
    fields: Sequence[str]
    head: str
    width: int
    rank: int = 0                       # the highest goes first where a page is narrow; 0 stays
    right: bool = False
    gap: int = 1


class Cell(NamedTuple):
    """One value or several, and how they are drawn."""
    values: Sequence[Any]
    spans: Sequence[Span]


def cell(text: str, *values: Any, style: str = "", link: str = "") -> Cell:
    """A cell of one span; its value is the text unless values are given."""
    return Cell(values or (text,), (Span(text, style, link),))


def narrowed(columns: Sequence[Column], cells: int) -> List[int]:
    """Numbers of the columns that fit; the others go by rank."""
    kept = list(range(len(columns)))
    while sum(columns[i].width + columns[i].gap for i in kept) > cells + 1 and any(columns[i].rank for i in kept):
        kept.remove(max(kept, key=lambda i: columns[i].rank))
    return kept


def table(c: Context, view: str, facts: Dict[str, Any], title: Line, columns: Sequence[Column], rows: Sequence[Sequence[Cell]],
          note: Sequence[Tuple[int, Part]], hidden: int = 0, axes: Optional[Dict[str, Axis]] = None) -> Page:
    """A page of rows under headings, with one line of notes; `hidden` is how many rows it has no room for."""
    kept = narrowed(columns, c.width)
    lines = [title, _row(columns, kept, [(Span(column.head, "dim"),) for column in columns])]
    lines += [_row(columns, kept, [each.spans for each in row]) for row in rows]
    lines += [c.head((0, "+%d more (--all)" % hidden if hidden else ""), *note, style="dim")]
    return Page(view, facts, [field for column in columns for field in column.fields],
                [[value for each in row for value in each.values] for row in rows], lines,
                {field: [c.zone.iso(edge) for edge in axis.edges[:-1]] for field, axis in (axes or {}).items()})


def _row(columns: Sequence[Column], kept: Sequence[int], cells: Sequence[Sequence[Span]]) -> Line:
    line: Line = []
    for i in kept:
        line += [Span(" " * columns[i].gap)] * bool(line) + pad(cells[i], columns[i].width, columns[i].right)
    return line


def nothing(view: str, why: str) -> Page:
    """A page that says why it is empty."""
    return Page(view, {}, [], [], [[Span(why)]], empty=why)


# -- whose readings, from when to when ------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One row of a page: a site with all stays there, or a unit."""
    name: str
    stays: List[importer.Deployment]
    spans: List[importer.Span]


def stays_asked_for(c: Context) -> List[importer.Deployment]:
    """All stays, highest tier first, less what the options leave out; patterns like vj_* may name sites and units."""
    from fnmatch import fnmatchcase
    o = c.options

    def wanted(stay: importer.Deployment) -> bool:
        ids = (stay.unit_id, stay.unit_id.replace("co2unit-", "", 1), stay.nickname)
        return (not (o.site and not any(fnmatchcase(stay.site or stay.nickname, one) for one in o.site.split(","))) and
                not (o.unit and not any(fnmatchcase(name, one) for name in ids for one in o.unit.split(","))) and
                not (o.min_tier is not None and (stay.tier is None or stay.tier < o.min_tier)) and
                not (o.max_tier is not None and (stay.tier is None or stay.tier > o.max_tier)))
    return [stay for stay in importer.deployments(c.db) if wanted(stay)]


def rows_of(c: Context, stays: Sequence[importer.Deployment]) -> List[Row]:
    """A row for each site, or for each unit when units were asked for: then with all its readings, deployed or not."""
    rows: Dict[str, Row] = {}
    for stay in stays:
        by_unit = bool(c.options.unit and not c.options.site)
        name = stay.nickname if by_unit or stay.site is None else stay.site
        row = rows.setdefault(stay.unit_id if by_unit or stay.site is None else "@" + stay.site, Row(name, [], []))
        row.stays.append(stay)
        if not (by_unit and row.spans):
            row.spans.append((stay.unit_id, 0, importer.FOREVER) if by_unit else (stay.unit_id, stay.since, stay.until))
    return list(rows.values())


def moment(zone: Zone, text: str) -> int:
    """UTC seconds of a date or date-time in the page's zone."""
    for form in ("%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m"):
        try:
            return zone.seconds(min(max(datetime.strptime(text.rstrip("Z"), form), datetime(1970, 1, 2)), datetime(2100, 1, 1)))
        except ValueError:
            continue
    raise ValueError("not a date or date-time like 2019-09-26 or 2019-09-26T12:00: %s" % clean(text, True)[:40])


def time_range(c: Context, table: str, units: Sequence[str], days: float) -> Tuple[int, int, bool]:
    """From, to, and whether the begin was asked for. Without --xmax a page ends now, or, when nothing has come for as long
    as it shows, with the newest row; without --xmin it begins no earlier than the first row."""
    o = c.options
    first, last = importer.extent(c.db, table, units, c.now)
    days = days if o.recent_days is None else o.recent_days or 1e5
    end = c.now
    if o.xmax is None and last is not None and end - last > days * DAY:
        end = last + 1
    if o.xmin is not None:
        return min(moment(c.zone, o.xmin), end - 300), end, True
    begin = int(end - days * DAY)
    return (first, end, True) if first is not None and begin < first < end - 300 else (begin, end, False)


# -- co2: a row per site ------------------------------------------------------------------------------------------------


def view_co2(c: Context) -> Page:
    """All sites as rows; one site or unit alone in detail; --panels: every stay in detail."""
    stays = stays_asked_for(c)
    rows = rows_of(c, stays)
    if not rows:
        return nothing("co2", "No site or unit matches." if c.options.site or c.options.unit else "No readings yet.")
    a, b, exact = time_range(c, "co2_readings", sorted({stay.unit_id for stay in stays}),
                             365 if len(rows) == 1 and (c.options.site or c.options.unit) else 14)
    if c.options.panels:
        return panels(c, [Row(stay.site or stay.nickname, [stay], [(stay.unit_id, stay.since, stay.until)])
                          for stay in stays if stay.since < b and stay.until > a], a, b, exact)
    if len(rows) == 1 and (c.options.site or c.options.unit):
        return site(c, rows[0], a, b, exact)
    rows = [row for row in rows if any(since < b and until > a for _, since, until in row.spans)]
    return fleet(c, rows, a, b, exact) if rows else nothing("co2", "No site was occupied in this time.")


class Series(NamedTuple):
    """One quantity of several rows on one axis."""
    axis: Axis
    rows: List[List[Optional[importer.Bucket]]]

    def scale(self, narrow: float, high: Optional[float] = None, log: bool = False) -> Scale:
        """A scale for all rows."""
        there = [bucket for row in self.rows for bucket in row if bucket and bucket.n]
        return make_scale([bucket.low for bucket in there], [bucket.high for bucket in there], narrow, high, log)


def series(c: Context, what: str, rows: Sequence[Row], axis: Axis) -> Series:
    """Buckets of all rows; a site with several units has theirs joined."""
    spans = [(number, (unit, max(since, axis.edges[0]), min(until, axis.edges[-1], c.now + 1)))
             for number, row in enumerate(rows) for unit, since, until in row.spans]
    filled: List[List[Optional[importer.Bucket]]] = [[None] * (len(axis.edges) - 1) for _ in rows]
    for (i, j), bucket in importer.buckets(c.db, what, [span for _, span in spans], axis.edges).items():
        row = filled[spans[i][0]]
        row[j] = importer.join_buckets(row[j], bucket) if row[j] else bucket
    step = min(other - one for one, other in zip(axis.edges, axis.edges[1:]))
    for row, buckets in zip(rows, filled):
        rhythm = max((importer.cadence(c.db, unit, c.now) for unit, _, _ in row.spans), default=0)
        if 2 * rhythm > step:
            hold(buckets, 2 * rhythm)
    return Series(axis, filled)


def hold(buckets: List[Optional[importer.Bucket]], longest: int) -> None:
    """Fill columns that are empty only because the unit measures more seldom than they are wide."""
    there = [j for j, bucket in enumerate(buckets) if bucket]
    for one, other in zip(there, there[1:]):
        if buckets[other].first - buckets[one].last <= longest:         # type: ignore[union-attr]
            buckets[one + 1:other] = [buckets[one]] * (other - one - 1)


def mean(bucket: Optional[importer.Bucket]) -> Optional[float]:
    """Of the usable values, None without any."""
    return bucket.total / bucket.n if bucket and bucket.n else None


def off_scale(bucket: Optional[importer.Bucket], scale: Scale) -> str:
    """up or down when a value of a column, usable or not, is outside the scale; suspect when it has no usable value."""
    if bucket is None:
        return ""
    for name, worst, outside in (("up", max, scale.high), ("down", min, scale.low)):
        ends = [end for end in ((bucket.high, bucket.suspect_high) if name == "up" else (bucket.low, bucket.suspect_low))
                if end is not None]
        if ends and worst(worst(ends), outside) != outside:
            return name
    return "suspect" if bucket.suspects and not bucket.n else ""


def spark(c: Context, buckets: Sequence[Optional[importer.Bucket]], scale: Scale, style: str) -> Line:
    """A row of bars: the mean of each column; columns with values off the scale have a mark instead."""
    return bars(c, [mean(bucket) for bucket in buckets], [off_scale(bucket, scale) for bucket in buckets], scale, style)


def bars(c: Context, values: Sequence[Optional[float]], marks: Sequence[str], scale: Scale, style: str = "") -> Line:
    """Values as bars, in the page's small glyphs."""
    glyphs, per_cell, chars = c.small, GLYPHS[c.options.glyphs][2], []
    for at in range(0, len(values), per_cell):
        mark = max(marks[at:at + per_cell], key=("", "suspect", "down", "up").index)
        part = values[at:at + per_cell]
        if mark:
            chars.append((glyphs[mark], "bad"))
        elif per_cell == 1:
            chars.append((" " if part[0] is None else glyphs["ramp"][scale.level(part[0], 8)], style))
        else:
            dots = sum(half[0 if value is None else 1 + scale.level(value, 4)] for half, value in zip(BARS, part))
            chars.append((chr(0x2800 + dots) if dots else " ", style))
    return runs(chars)


def rounded(values: Iterable[Optional[float]]) -> List[Optional[float]]:
    """For TSV and JSON."""
    return [None if value is None else round(value, 1) for value in values]


def fleet(c: Context, rows: List[Row], a: int, b: int, exact: bool) -> Page:
    """A row per site, on one time axis and one scale for all."""
    names = min(max(width(c.name(row.name)) for row in rows), max(11, c.width // 8))
    columns = [Column(("site",), "site", names), Column(("co2",), "", 14), Column(("ppm",), "ppm", 4, 1, True),
               Column(("min", "max"), "  range" , 7, 3, True, 2), Column(("temp",), "", 7, 4, gap=2),
               Column(("celsius",), "degC" if c.ascii else "°C", 5, 2, True), Column(("late", "above", "below"), "!", 2)]
    kept = narrowed(columns, c.width)
    room = c.width + 1 - sum(columns[i].width * (i not in (1, 4)) + columns[i].gap for i in kept)
    per_cell = GLYPHS[c.options.glyphs][2]
    axis = make_axis(c.zone, a, b, room * 2 // 3 if 4 in kept else room, exact, per_cell)
    short = make_axis(c.zone, a, b, max(room - axis.cells, 4), exact, per_cell)
    columns[1] = columns[1]._replace(head=axis.heading(c.small["tick"]), width=axis.cells)
    columns[4] = columns[4]._replace(head=short.heading(c.small["tick"]), width=short.cells if 4 in kept else c.width)
    shown = rows[:c.room(3)]
    co2, temp = series(c, "co2", shown, axis), series(c, "temp", shown, short)
    scale, warmth = co2.scale(50, c.options.co2_max, c.options.log), temp.scale(5)
    late = {state.unit_id for state in importer.fleet_state(c.db, b, [stay for row in shown for stay in row.stays])
            if state.data_late > 1}
    cells = [[cell(c.name(row.name), row.name, link=row.name), Cell((rounded(map(mean, one)),), spark(c, one, scale, "co2")),
              *newest(c, row, "co2", a, b), reach(c, one), Cell((rounded(map(mean, other)),), spark(c, other, warmth, "temp")),
              *newest(c, row, "temp", a, b), flags(c, row, one, scale, late, b)]
             for row, one, other in zip(shown, co2.rows, temp.rows)]
    title = c.head((0, "%d sites" % len(rows)), (1, period(c.zone, axis.edges[0], b, c.small["to"])),
                   (2, "CO₂ %.0f%s%.0f ppm" % (scale.low, c.small["to"], scale.high)),
                   (3, "T %s%s%.0f °C" % (("%.0f" % warmth.low).replace("-", "−"), c.small["to"], warmth.high)))
    note = [(1, ("col = %s (CO₂), %s (T)" % (axis.step, short.step), "col = " + axis.step)),
            (4, "blank = no data"), (3, "L late"), (2, "%s%s off scale" % (c.small["up"], c.small["down"]))]
    facts = {"from": c.zone.iso(axis.edges[0]), "to": c.zone.iso(b), "co2_scale": scale[:2], "temp_scale": warmth[:2]}
    return table(c, "co2", facts, title, columns, cells, note, len(rows) - len(shown), {"co2": axis, "temp": short})


def newest(c: Context, row: Row, what: str, a: int, b: int) -> List[Cell]:
    """The newest usable value of a row."""
    found = [importer.last_value(c.db, what, unit, max(since, a), min(until, b + 1)) for unit, since, until in row.spans]
    ts, value = max((pair for pair in found if pair[0] is not None), default=(None, None))
    text = "" if value is None else compact(value) if what == "co2" else "%.1f" % value
    return [cell(text, None if value is None else round(value, 1))]


def reach(c: Context, buckets: Sequence[Optional[importer.Bucket]]) -> Cell:
    """Least and greatest value of a row, off the scale or not."""
    ends = [end for bucket in buckets if bucket
            for end in (bucket.low, bucket.high, bucket.suspect_low, bucket.suspect_high) if end is not None]
    low, high = (min(ends), max(ends)) if ends else (None, None)
    return cell(c.say("%s–%s" % (compact(low), compact(high))) if ends else "", *rounded((low, high)))


def flags(c: Context, row: Row, buckets: Sequence[Optional[importer.Bucket]], scale: Scale, late: Set[str], b: int) -> Cell:
    """L for late; how many values are above and below the scale."""
    below, above = outside(c, "co2", row, buckets, scale)
    is_late = any(stay.unit_id in late and stay.since <= b < stay.until for stay in row.stays)
    text = "L" * is_late + "".join("%s%s" % (c.small[name], compact(n) if n > 1 else "") for name, n in (("up", above), ("down", below)) if n)
    return cell(text, is_late, above, below, style="bad")


def outside(c: Context, what: str, row: Row, buckets: Sequence[Optional[importer.Bucket]], scale: Scale) -> Tuple[int, int]:
    """Values below and above the scale."""
    marked = [bucket for bucket in buckets if off_scale(bucket, scale) in ("up", "down")]
    if not marked:
        return 0, 0
    a, b = min(bucket.first for bucket in marked), max(bucket.last for bucket in marked) + 1       # type: ignore[union-attr]
    spans = [(unit, max(since, a), min(until, b)) for unit, since, until in row.spans]
    found = importer.count_outside(c.db, what, spans, scale.low, scale.high).values()
    return sum(below for below, _ in found), sum(above for _, above in found)


# -- co2: one site in detail ----------------------------------------------------------------------------------------------
#
# Panels under each other on one time axis: CO2, temperature, and a ribbon for each unit that says where it was and how
# much of its data is here. A panel's rows are `Grid` steps apart; in a column stand the range from the least to the
# greatest value, and the mean; means of neighbouring columns are connected (in braille), never across a gap.


class Grid(NamedTuple):
    """Rows of a panel: the lowest is centred on `low`, each next one `step` higher."""
    low: float
    step: float
    rows: int
    log: bool = False

    def at(self, value: float, sub: int) -> int:
        """Which of rows * sub places from below; may be outside."""
        import math
        return math.floor(((_log(value) if self.log else value) - self.low) / self.step * sub + sub / 2)

    def label(self, row: int) -> str:
        """Text left of a row; rows that would be too close to another label have none."""
        value = self.low + row * self.step
        if self.log:
            return compact(10 ** value) if row % 2 == 0 else ""
        number = round(value / self.step)
        return "%.4g" % (number * self.step) if self.rows < 5 or number % 2 == 0 else ""


def _log(value: float) -> float:
    import math
    return math.log10(max(value, 1))


def make_grid(scale: Scale, rows: int) -> Grid:
    """Rows at round numbers that hold the scale."""
    if scale.log:
        return Grid(_log(scale.low), (_log(scale.high) - _log(scale.low)) / max(rows - 1, 1), rows, True)
    power = nice(scale.high - scale.low) / 1000
    step = next(n * power * ten for ten in (1, 10, 100, 1000, 10000) for n in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5)
                if scale.high <= ((scale.low + n * power * ten / 2) // (n * power * ten) + rows - 0.5) * n * power * ten)
    return Grid((scale.low + step / 2) // step * step, step, rows)


def plot(glyphs: Dict[str, Any], buckets: Sequence[Optional[importer.Bucket]], grid: Grid, style: str, zero: bool) -> List[Line]:
    """The rows of a panel, from the top."""
    sub = glyphs["sub"]
    means = [None if bucket is None or not bucket.n else grid.at(mean(bucket), sub) for bucket in buckets]     # type: ignore
    left, right = _traces(means, sub == 4)
    reach = [None if bucket is None or not bucket.n else (grid.at(bucket.low, sub), grid.at(bucket.high, sub))    # type: ignore
             for bucket in buckets]
    lines = []
    for row in reversed(range(grid.rows)):
        blank = glyphs["zero"] if zero and grid.at(0, 1) == row else " "
        lines.append(runs(_dots(glyphs, row * sub, l, r, ends, style, blank) for l, r, ends in zip(left, right, reach)))
    return lines


def _traces(means: Sequence[Optional[int]], connect: bool) -> Tuple[List[range], List[range]]:
    """The places that the line of the means takes in the left and in the right half of each column."""
    left = [range(0) if at is None else range(at, at + 1) for at in means]
    right = list(left)
    for j, (one, other) in enumerate(zip(means, means[1:])):
        if connect and one is not None and other is not None and one != other:
            middle = (one + other + (other > one)) // 2
            right[j] = range(one, middle) if other > one else range(middle + 1, one + 1)
            left[j + 1] = range(middle, other + 1) if other > one else range(other, middle + 1)
            right[j] = right[j] or range(one, one + 1)
    return left, right


def _dots(glyphs: Dict[str, Any], low: int, left: range, right: range, ends: Optional[Tuple[int, int]], style: str,
          blank: str) -> Tuple[str, str]:
    """One character of a panel: the part of a column that lies in one row, from place `low` up."""
    sub = glyphs["sub"]
    line = [at in left or at in right for at in range(low, low + sub)]
    inside = [ends is not None and ends[0] <= at <= ends[1] for at in range(low, low + sub)]
    if not any(line) and not any(inside):
        return blank, "dim"
    if sub == 4:
        bits = sum(DOTS[0][i] * (low + i in left or inside[i] and i % 2 == 1 or inside[i] and not any(inside[1::2])) |
                   DOTS[1][i] * (low + i in right) for i in range(4))
        return chr(0x2800 + bits), style if any(line) else "dim"
    if not any(line):
        return glyphs["range"], "dim"
    return glyphs["mean"] if sub == 1 else "█" if all(line) else "▀" if line[1] else "▄", style


def site(c: Context, row: Row, a: int, b: int, exact: bool, rows: Optional[int] = None,
         scales: Sequence[Optional[Scale]] = (None, None)) -> Page:
    """One site or unit: panels of CO2 and temperature, and ribbons."""
    glyphs = GLYPHS[c.options.glyphs][1]
    axis = make_axis(c.zone, a, b, c.width - 12, exact)
    both = [series(c, what, [row], axis) for what in ("co2", "temp")]
    found = [scales[0] or both[0].scale(50, c.options.co2_max, c.options.log), scales[1] or both[1].scale(5)]
    ribbons = _ribbons(c, row, axis, glyphs)
    rows = max((rows or c.rows or c.options.height - 1) - 2 - len(ribbons), 4)
    high = rows - rows * 9 // 20 if rows > 7 else rows
    lines = [_site_title(c, row, both[0].rows[0], axis, b)]
    lines += panel(c, glyphs, row, "co2", axis, both[0].rows[0], found[0], high, b)
    lines += panel(c, glyphs, row, "temp", axis, both[1].rows[0], found[1], rows - high, b) if rows > high else []
    lines += [*ribbons, [Span("     " + axis.heading(glyphs["foot"]))]]
    fields = ["from", "to"] + [what + "_" + name for what in ("co2", "temp") for name in ("n", "mean", "min", "max", "suspect")]
    records = [[c.zone.iso(one), c.zone.iso(other)] + [value for of in both for value in _numbers(of.rows[0][j])]
               for j, (one, other) in enumerate(zip(axis.edges, axis.edges[1:]))]
    facts = {"site": row.name, "units": sorted({stay.nickname for stay in row.stays}), "co2_scale": found[0][:2],
             "temp_scale": found[1][:2]}
    return Page("co2", facts, fields, records, lines)


def _numbers(bucket: Optional[importer.Bucket]) -> List[Any]:
    if bucket is None:
        return [0, None, None, None, 0]
    return [bucket.n, *rounded((mean(bucket), bucket.low, bucket.high)), bucket.suspects]


def _site_title(c: Context, row: Row, buckets: Sequence[Optional[importer.Bucket]], axis: Axis, b: int) -> Line:
    """Name, units, time, and how many of the readings that should be there are."""
    begin = min((bucket.first for bucket in buckets if bucket), default=b)
    due = sum(max(0, min(until, b) - max(since or begin, axis.edges[0])) / importer.cadence(c.db, unit, c.now)
              for unit, since, until in row.spans)
    here = sum(bucket.rows for bucket in buckets if bucket)
    units = list(dict.fromkeys(c.name(stay.nickname) for stay in row.stays))
    share = "%s/%s = %.0f %%" % ("{:,}".format(here).replace(",", " "), "{:,.0f}".format(due).replace(",", " "),
                                 min(100, 100 * here / due)) if due >= 1 else "%d readings" % here
    return c.head((0, c.name(row.name)), (3, "" if units == [row.name] else ", ".join(units[:3]) + ", …" * (len(units) > 3)),
                  (1, period(c.zone, axis.edges[0], b, c.small["to"])), (2, (share, share.split(" = ")[-1])))


def panel(c: Context, glyphs: Dict[str, Any], row: Row, what: str, axis: Axis, buckets: Sequence[Optional[importer.Bucket]],
          scale: Scale, rows: int, b: int) -> List[Line]:
    """A heading with the numbers, a line of marks when something is off the scale, and the plot with its labels."""
    below, above = outside(c, what, row, buckets, scale)
    marks = [(off_scale(bucket, scale)) for bucket in buckets]
    grid = make_grid(scale, max(rows - 1 - any(marks), 1))
    last = newest(c, row, what, axis.edges[0], b)[0]
    beyond = "  ".join(_beyond(glyphs, buckets, below, above))
    aside = any(marks) and width(beyond) < c.width - 5 - len(marks)
    lines = [_panel_head(c, glyphs, row, what, axis, "" if aside else c.say(beyond), b)]
    if any(marks):
        lines.append([Span("    " + glyphs["side"]), *runs((glyphs[mark] if mark else " ", "bad") for mark in marks),
                      Span(" " + c.say(beyond) if aside else "", "bad")])
    style = what
    for number, spans in enumerate(plot(glyphs, buckets, grid, style, what == "temp")):
        at = grid.rows - 1 - number
        label = grid.label(at)
        tail = " %s %s" % (glyphs["last"], last.spans[0].text) if last.values[0] is not None and grid.at(last.values[0], 1) == at else ""
        lines.append([Span("%4s%s" % (label, glyphs["label"] if label else glyphs["side"])), *spans, Span(tail, style)])
    return lines


def _beyond(glyphs: Dict[str, Any], buckets: Sequence[Optional[importer.Bucket]], below: int, above: int) -> List[str]:
    """How far off the scale, and how many values."""
    there = [bucket for bucket in buckets if bucket]
    high = max((end for bucket in there for end in (bucket.high, bucket.suspect_high) if end is not None), default=0)
    low = min((end for bucket in there for end in (bucket.low, bucket.suspect_low) if end is not None), default=0)
    return ["%s%.0f ×%d" % (glyphs[name], end, n) for name, end, n in (("up", high, above), ("down", low, below)) if n]


def _panel_head(c: Context, glyphs: Dict[str, Any], row: Row, what: str, axis: Axis, beyond: str, b: int) -> Line:
    spans = [(unit, max(since, axis.edges[0]), min(until, b + 1)) for unit, since, until in row.spans]
    low, middle, high = importer.quantiles(c.db, what, spans, (0.05, 0.5, 0.95))
    form = "%.0f" if what == "co2" else "%.1f"
    numbers = [] if middle is None else ["median " + form % middle, "p5 %s  p95 %s" % (form % low, form % high)]
    legend = "%s mean  %s min–max per column (%s)" % (glyphs["mean"], glyphs["range"], axis.step)
    return c.head((0, "CO₂ ppm" if what == "co2" else "temp °C"), (1, beyond), (4, (legend, "col = " + axis.step)),
                  *((2 + i, text) for i, text in enumerate(numbers)), style="")


def _ribbons(c: Context, row: Row, axis: Axis, glyphs: Dict[str, Any]) -> List[Line]:
    """A line for each unit: what it was doing, blank where it has no readings, thin where it has less than half of them."""
    units = list(dict.fromkeys(stay.unit_id for stay in row.stays))[:3]
    lines = []
    for unit in units:
        stays = [stay for stay in row.stays if stay.unit_id == unit]
        spans = [span for span in row.spans if span[0] == unit]
        found = importer.buckets(c.db, "co2", [(unit, max(s, axis.edges[0]), min(u, axis.edges[-1])) for _, s, u in spans], axis.edges)
        rhythm, chars = importer.cadence(c.db, unit, c.now), []
        for j, (one, other) in enumerate(zip(axis.edges, axis.edges[1:])):
            n = sum(bucket.rows for (_, at), bucket in found.items() if at == j)
            status = next((stay.status for stay in stays if stay.since < other and stay.until > one), None)
            kind = ("deployed", "en_route", "lab_check").index(status) if status in ("deployed", "en_route", "lab_check") else 0
            chars.append(" " if not n else glyphs["part"] if n * rhythm < (min(other, c.now) - one) / 2 else glyphs["status"][kind])
        tail = c.name(stays[0].nickname) if len(units) > 1 else " ".join(
            glyphs["status"][i] + name for i, name in ((2, "lab"), (0, "depl")))
        lines.append([Span("%4s%s%s " % ("stat" if len(units) == 1 else "", glyphs["side"], "".join(chars))),
                      Span(cut(tail, c.width - 6 - len(chars)), "dim")])
    return lines


def panels(c: Context, rows: List[Row], a: int, b: int, exact: bool) -> Page:
    """Every stay in detail, with one time axis and one scale for all."""
    height = 14
    shown = rows if c.rows is None else rows[:max(1, (c.rows - 1) // height)]
    axis = make_axis(c.zone, a, b, c.width - 12, exact)
    scales = series(c, "co2", shown, axis).scale(50, c.options.co2_max, c.options.log), series(c, "temp", shown, axis).scale(5)
    pages = [site(c, row, axis.edges[0], b, True, height if c.rows is None else min(height, c.rows - 1), scales) for row in shown]
    more = [[Span("+%d more (--all)" % (len(rows) - len(shown)), "dim")]] if len(rows) > len(shown) else []
    if not pages:
        return nothing("co2", "No unit was deployed in this time.")
    return Page("co2", {"co2_scale": scales[0][:2], "temp_scale": scales[1][:2]}, ["site", "unit", *pages[0].fields],
                [[row.name, row.stays[0].nickname, *record] for row, page in zip(shown, pages) for record in page.records],
                [line for page in pages for line in page.lines] + more)


# -- pings ----------------------------------------------------------------------------------------------------------------


def view_pings(c: Context) -> Page:
    """A row per stay: on what share of the days the unit has called."""
    stays = stays_asked_for(c)
    a, b, exact = time_range(c, "pings", sorted({stay.unit_id for stay in stays}), 364)
    stays = [stay for stay in stays if stay.since < b and stay.until > a]
    if not stays:
        return nothing("pings", "No pings yet.")
    names = min(max(width(c.name(stay.site or "[no site]")) for stay in stays), 10)
    units = min(max(width(c.name(stay.nickname)) for stay in stays), 11)
    columns = [Column(("site",), "site", names), Column(("pings",), "", 12, gap=0), Column(("unit",), "unit", units, 2, gap=0),
               Column(("late_seconds",), "late", 4, 1, True)]
    kept = narrowed(columns, c.width)
    axis = make_axis(c.zone, a, b, c.width + 1 - sum(columns[i].width + columns[i].gap for i in kept if i != 1), exact, least="1 d")
    columns[1] = columns[1]._replace(head=" " + axis.heading(c.small["tick"]), width=axis.cells + 2)
    shown = stays[:c.room(3)]
    spans = [(stay.unit_id, max(stay.since, axis.edges[0]), min(stay.until, c.now + 1)) for stay in shown]
    found = importer.pings(c.db, spans, axis.edges)
    late = {state.unit_id: b - state.last_ping for state in importer.fleet_state(c.db, b, stays)
            if state.last_ping is not None and state.pings_late > 1 and state.verdict != "off"}
    rows = [_pings_row(c, stay, [found.get((i, j)) for j in range(len(axis.edges) - 1)], axis, b, late)
            for i, stay in enumerate(shown)]
    title = c.head((0, "pings"), (2, "%d units" % len({stay.unit_id for stay in stays})), (1, period(c.zone, axis.edges[0], b, c.small["to"])),
                   (3, "1 col = " + axis.step), (4, "sort: tier, site"))
    levels = "share of days" if axis.step != "1 week" else "ping days/week"
    limits = ("to 2/7", "to 4/7", "more", "all") if axis.step != "1 week" else ("1-2", "3-4", "5-6", "7")
    legend = "%s: %s" % (levels, "  ".join("%s %s" % pair for pair in zip(c.small["days"], limits)))
    if axis.step == "1 d":
        legend = "%s pings that day" % c.small["days"][3]
    note = [(1, legend), (2, "%s deployed, silent" % c.small["silent"]), (3, "%s %s deployment" % (c.small["open"], c.small["close"]))]
    return table(c, "pings", {"from": c.zone.iso(axis.edges[0]), "to": c.zone.iso(b)}, title, columns, rows, note,
                 len(stays) - len(shown), {"pings": axis})


def _pings_row(c: Context, stay: importer.Deployment, cells: Sequence[Optional[importer.Pings]], axis: Axis, b: int,
               late: Dict[str, int]) -> List[Cell]:
    chars = [_days_char(c, stay, pings, one, min(other, b)) for pings, one, other in zip(cells, axis.edges, axis.edges[1:])]
    begin = next((j for j, edge in enumerate(axis.edges[1:]) if stay.since < edge), 0)
    end = next((j for j, edge in enumerate(axis.edges[1:]) if stay.until <= edge), None)
    line = [" ", *chars, " "]
    if stay.status and stay.since >= axis.edges[0]:
        line[begin] = c.small["open"]
    if stay.status and end is not None and stay.until <= b:
        line[end + 2] = c.small["close"]
    silent = late.get(stay.unit_id) if stay.since <= b < stay.until else None
    text = "" if silent is None else "%dh" % (silent // 3600) if silent < 2 * DAY else "%dd" % (silent // DAY)
    return [cell(c.name(stay.site or "[no site]"), stay.site, link=stay.site or ""),
            Cell(([pings.n if pings else 0 for pings in cells],), runs((char, "bad" if char == c.small["silent"] else "") for char in line)),
            cell(c.name(stay.nickname), stay.nickname), cell(text, silent, style="bad")]


def _days_char(c: Context, stay: importer.Deployment, pings: Optional[importer.Pings], one: int, other: int) -> str:
    """A column of one stay: blank when not deployed, a dash when deployed and silent."""
    days = (min(other, stay.until) - max(one, stay.since)) / DAY
    if not pings:
        return c.small["silent"] if days > 1 and stay.status or days > 0.99 and other - one <= DAY and stay.status else " "
    share = pings.days / max(days, 1)
    return c.small["days"][0 if share <= 2.01 / 7 else 1 if share <= 4.01 / 7 else 2 if share < 0.99 else 3]


# -- status ---------------------------------------------------------------------------------------------------------------

VERDICTS = {"late": ("LATE", "bad", "LATE"), "stuck": ("DATA", "bad", "calls without data"), "weak": ("weak", "warn", "weak"),
            "never": ("none", "warn", "never"), "ok": (" ok ", "good", "ok"), "off": (" -- ", "dim", "not deployed")}


def view_status(c: Context) -> Page:
    """Who is late, worst first; pings and data judged apart."""
    o = c.options
    stays = stays_asked_for(c)
    if not stays:
        return nothing("status", "No units yet.")
    states = importer.fleet_state(c.db, c.now, stays, o.ping_limit and o.ping_limit * 3600, o.data_limit and o.data_limit * 3600)
    shown = states[:c.room(3)]
    days = make_axis(c.zone, c.now - 13 * DAY, c.now, 14, True, least="1 d")
    found = importer.pings(c.db, [(state.unit_id, days.edges[0], c.now + 1) for state in shown], days.edges)
    every = 1 if c.width >= 84 else 2
    names, units = (min(max(width(c.name(name or "")) for name in all), most) for all, most in (
        ([state.site or "-" for state in shown], 11), ([state.nickname for state in shown], 11)))
    columns = [Column(("state",), "", 4), Column(("site",), "site", names), Column(("unit",), "unit", units, 3),
               Column(("ping_age", "data_age"), "last", 8, 1, True), Column(("pings",), "pings 14 d", 14, 2),
               Column(("ppm",), "ppm", 4, 4, True), Column(("celsius",), "degC" if c.ascii else "°C", 5, 6, True),
               Column(("dbm",), "dBm", 4, 5, True), Column(("rssi",), "rssi 14d", max(14 // every, 8), 7)]
    rows = [_status_row(c, state, [found.get((i, j)) for j in range(len(days.edges) - 1)], every) for i, state in enumerate(shown)]
    counts = [(verdict, sum(state.verdict == verdict for state in states)) for verdict in VERDICTS]
    title = c.head((3, "fleet"), (1, c.zone.local(c.now).strftime("%Y-%m-%d %H:%M ") + c.zone.name),
                   (0, "%d units: " % len(states) + "  ".join("%d %s" % (n, VERDICTS[verdict][2]) for verdict, n in counts if n)))
    glyphs = c.small["pings"]
    note = [(1, "pings: %s one that day  %s more  %s none" % (glyphs[1], glyphs[2], glyphs[0])), (2, "rssi −115 %s −70 dBm" % ("…" if not c.ascii else ".."))]
    return table(c, "status", {"at": c.zone.iso(c.now), **dict(counts)}, title, columns, rows, note, len(states) - len(shown),
                 {"pings": days, "rssi": days})


def _status_row(c: Context, state: importer.UnitState, cells: Sequence[Optional[importer.Pings]], every: int) -> List[Cell]:
    word, style, _ = VERDICTS[state.verdict]
    glyphs = c.small["pings"]
    seen = max(state.last_ping or 0, 0)
    seconds = None if not seen else c.now - seen
    data = None if state.last_data is None else c.now - state.last_data
    last = "never" if seconds is None else ago(data if state.verdict == "stuck" and data is not None else seconds)
    signal = [None if pings is None else pings.dbm for pings in cells]
    half = [_average(signal[i:i + every]) for i in range(0, len(signal), every)]
    blank = "-" if c.ascii else "–"
    return [cell(word, state.verdict, style=style), cell(c.name(state.site or blank), state.site, link=state.site or ""),
            cell(c.name(state.nickname), state.nickname), Cell((seconds, data), (Span(last, style if word != " ok " else ""),)),
            Cell(([pings.n if pings else 0 for pings in cells],), (Span("".join(glyphs[min(pings.n, 2) if pings else 0] for pings in cells)),)),
            cell(compact(state.ppm) or blank, *rounded((state.ppm,))), cell(blank if state.temp is None else "%.1f" % state.temp, *rounded((state.temp,))),
            cell(blank if state.dbm is None else str(state.dbm), state.dbm),
            Cell((rounded(signal),), bars(c, half, [""] * len(half), Scale(-115, -70)))]


def _average(values: Sequence[Optional[float]]) -> Optional[float]:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


# -- signal ---------------------------------------------------------------------------------------------------------------


def view_signal(c: Context) -> Page:
    """Where the signal strength of each unit's pings lies, weakest unit first."""
    stays = {stay.unit_id: stay for stay in stays_asked_for(c)}
    a, b, _ = time_range(c, "pings", list(stays), 30)
    found = importer.signals(c.db, list(stays), a, b + 1)
    if not found:
        return nothing("signal", "No pings with a signal strength in this time.")
    values = {unit: [dbm for dbm, n in counts for _ in range(n)] for unit, counts in found.items()}
    order = sorted(values, key=lambda unit: (values[unit][len(values[unit]) // 2], sum(values[unit]) / len(values[unit])))
    names = min(max(width(c.name(stays[unit].site or stays[unit].nickname)) for unit in order), 11)
    columns = [Column(("site", "unit"), "site", names), Column(("min", "p25", "median", "p75", "max"), "", 20),
               Column(("last",), "last", 4, 1, True), Column(("n",), "n", 4, 2, True), Column(("trend",), "trend", 10, 3)]
    kept = narrowed(columns, c.width)
    room = c.width + 1 - sum(columns[i].width + columns[i].gap for i in kept if i != 1)
    low, high = min(-113, min(map(min, values.values()))), max(-68, max(map(max, values.values())))
    per = -(-(high - low + 1) // room)
    cells = (high - low) // per + 1
    heading = Axis(list(range(cells + 1)), "", _spaced([((dbm - low) // per, str(dbm)) for dbm in range(low - low % -10, high, 10)], cells), 1)
    columns[1] = columns[1]._replace(head=heading.heading(c.small["tick"]), width=cells)
    shown = order[:c.room(3)]
    thirds = make_axis(c.zone, a, b, 10, True, least="1 d")
    trend = importer.pings(c.db, [(unit, thirds.edges[0], b + 1) for unit in shown], thirds.edges)
    rows = []
    for i, unit in enumerate(shown):
        all_, means = values[unit], [trend[i, j].dbm if (i, j) in trend else None for j in range(len(thirds.edges) - 1)]
        last = importer.last_signal(c.db, unit, b)
        points = [all_[0], all_[len(all_) // 4], all_[len(all_) // 2], all_[len(all_) * 3 // 4], all_[-1]]
        rows.append([cell(c.name(stays[unit].site or stays[unit].nickname), stays[unit].site, stays[unit].nickname, link=stays[unit].site or ""),
                     Cell(points, (Span(box(c, [(point - low) // per for point in points], (last - low) // per, cells, [(limit - low) // per for limit in (importer.UNUSABLE, importer.WEAK)])),)),
                     cell(str(last), last), cell(str(len(all_)), len(all_)), Cell((rounded(means),), bars(c, means, [""] * len(means), Scale(-115, -70)))])
    title = c.head((0, "signal dBm"), (1, period(c.zone, a, b, c.small["to"])), (2, "%d units, weakest first" % len(order)), (3, "1 col = %d dB" % per))
    g = c.small
    note = [(1, "%s min–max  %s p25–p75  %s median  %s last" % (g["whisker"], g["box"], g["median"], g["dot"])),
            (2, "%s limits: < %d unusable, < %d weak" % (g["limit"], importer.UNUSABLE, importer.WEAK))]
    return table(c, "signal", {"from": c.zone.iso(a), "to": c.zone.iso(b)}, title, columns, rows, note, len(order) - len(shown), {"trend": thirds})


def box(c: Context, points: Sequence[int], last: int, cells: int, limits: Sequence[int]) -> str:
    """Whiskers, box, median and last value on one line."""
    g = c.small
    line = [g["limit"] if at in limits else " " for at in range(cells)]
    for name, one, other in (("whisker", 0, 4), ("box", 1, 3), ("median", 2, 2)):
        line[points[one]:points[other] + 1] = g[name] * (points[other] - points[one] + 1)
    line[last] = g["dot"] if 0 <= last < cells else line[last]
    return "".join(line)


# -- errors ---------------------------------------------------------------------------------------------------------------

ERRORS = ("uncaught", "watchdog", "signal", "backoff", "transmit", "")


def view_errors(c: Context) -> Page:
    """Entries of the units' error logs by week and type, and the newest of them."""
    stays = {stay.unit_id: stay for stay in stays_asked_for(c)}
    a, b, exact = time_range(c, "error_logs", list(stays), 84)
    names = min(max([width(c.name(stay.site or stay.nickname)) for stay in stays.values()], default=4), 11)
    columns = [Column(("site", "unit"), "site", names), Column(("errors",), "", 12)] + [
        Column((kind or "other",), kind or "other", max(len(kind or "other"), 4), 2, True) for kind in ERRORS] + [Column(("total",), "all", 4, 1, True)]
    kept = narrowed(columns, c.width)
    axis = make_axis(c.zone, a, b, c.width + 1 - sum(columns[i].width + columns[i].gap for i in kept if i != 1), exact, least="1 d")
    columns[1] = columns[1]._replace(head=axis.heading(c.small["tick"]), width=axis.cells)
    units = list(stays)
    found = importer.errors(c.db, [(unit, axis.edges[0], c.now + 1) for unit in units], axis.edges)
    rows = []
    for i, unit in enumerate(units):
        columns_ = [found.get((i, j), {}) for j in range(len(axis.edges) - 1)]
        counts, kinds = [sum(each.values()) for each in columns_], [sum(each.get(kind, 0) for each in columns_) for kind in ERRORS]
        if sum(counts):
            rows.append((sum(counts), [cell(c.name(stays[unit].site or stays[unit].nickname), stays[unit].site, stays[unit].nickname, link=stays[unit].site or ""),
                         Cell((counts,), (Span("".join(" " if not n else str(n) if n < 10 else "+" for n in counts)),)),
                         *(cell(str(n) if n else "", n) for n in kinds), cell(str(sum(counts)), sum(counts))]))
    if not rows:
        return nothing("errors", "No errors in this time.")
    rows.sort(key=lambda row: -row[0])
    shown = rows[:None if c.rows is None else max(1, (c.rows - 4) * 3 // 5)]
    title = c.head((0, "errors"), (1, period(c.zone, axis.edges[0], b, c.small["to"])), (2, "%d units" % len(rows)),
                   (2, "%d entries" % sum(n for n, _ in rows)), (3, "1 col = " + axis.step))
    page = table(c, "errors", {"from": c.zone.iso(axis.edges[0]), "to": c.zone.iso(b)}, title, columns, [row for _, row in shown],
                 [(1, "digits: entries, + more than 9")], len(rows) - len(shown), {"errors": axis})
    most = 20 if c.rows is None else max(0, c.rows - len(page.lines) - 1)
    news = importer.newest_errors(c.db, units, axis.edges[0], c.now + 1, most)
    lines = [[Span("newest", "head")]] * bool(news) + [
        [Span(cut("%-12s %s %-4s %s" % (c.zone.short(ts), " ".join(span.text for span in pad([Span(c.name(stays[unit].site or stays[unit].nickname))], names)),
                                        c.name(level), c.name(message or kind)), c.width))] for ts, unit, level, kind, message in news]
    return page._replace(lines=page.lines + lines, facts={**page.facts, "newest": [
        {"at": c.zone.iso(ts), "unit": stays[unit].nickname, "level": level, "type": kind, "message": message} for ts, unit, level, kind, message in news]})


# -- gaps -----------------------------------------------------------------------------------------------------------------

GAPS = {"waiting": ("not yet uploaded", "warn"), "silent": ("calls, sends none", "bad"), "resend": ("being re-sent", "warn"),
        "rejected": ("came unreadable", "warn"), "lost": ("lost", "bad"), "off": ("not deployed", "dim")}


def view_gaps(c: Context) -> Page:
    """Stretches without readings, newest first, and what became of them."""
    stays = stays_asked_for(c)
    a, b, _ = time_range(c, "co2_readings", sorted({stay.unit_id for stay in stays}), 30)
    places = {stay.unit_id: stay for stay in stays}
    found = sorted(importer.gaps(c.db, stays, a, b), key=lambda gap: -gap.end)
    names, units = (min(max([width(c.name(name)) for name in all], default=4), 11) for all in (
        [stay.site or "-" for stay in stays], [stay.nickname for stay in stays]))
    columns = [Column(("site",), "site", names), Column(("unit",), "unit", units, 3), Column(("from",), "from", 12), Column(("to",), "to", 12, 1),
               Column(("missing",), "missing", 7, 2, True), Column(("state", "calls"), "state", min(18, max(c.width - 34, 8)))]
    shown = found[:c.room(3)]
    rows = [[cell(c.name(places[gap.unit_id].site or "-"), places[gap.unit_id].site, link=places[gap.unit_id].site or ""),
             cell(c.name(places[gap.unit_id].nickname), places[gap.unit_id].nickname), cell(c.zone.short(gap.start), c.zone.iso(gap.start)),
             cell("now" if gap.end >= b else c.zone.short(gap.end), c.zone.iso(gap.end)), cell(str(gap.missing), gap.missing),
             Cell((gap.state, gap.calls), (Span(*GAPS[gap.state]),))] for gap in shown]
    title = c.head((0, "gaps"), (1, period(c.zone, a, b, c.small["to"])), (2, "%d gaps" % len(found)), (3, "newest first"))
    if not found:
        return nothing("gaps", "No gaps in this time." if places else "No readings yet.")
    return table(c, "gaps", {"from": c.zone.iso(a), "to": c.zone.iso(b)}, title, columns, rows,
                 [(1, "longer than twice the unit's own rhythm"), (2, "missing: readings")], len(found) - len(shown))


VIEWS: Dict[str, Callable[[Context], Page]] = {"co2": view_co2, "pings": view_pings, "status": view_status, "signal": view_signal,
                                               "errors": view_errors, "gaps": view_gaps}

# -- the same page as text, TSV, JSON, HTML -----------------------------------------------------------------------------------


def to_text(lines: Iterable[Line], colour: bool = False) -> str:
    """Lines for a terminal, a file or a mail."""
    return "".join(("".join("\x1b[%sm%s\x1b[0m" % (STYLES[span.style], span.text) if span.style and span.text.strip() else span.text
                            for span in line) if colour else "".join(span.text for span in line).rstrip()) + "\n" for line in lines)


def to_tsv(page: Page, ascii: bool = False) -> str:
    """Tab-separated values under one heading line; a chart has a field for each of its columns, named field@begin."""
    def flat(record: Sequence[Any]) -> List[str]:
        values = [one for value in record for one in (value if isinstance(value, list) else [value])]
        return ["" if value is None else str(int(value)) if isinstance(value, bool) else clean(value, ascii) for value in values]
    fields = [name for field in page.fields for name in ([field + "@" + at for at in page.axes[field]] if field in page.axes else [field])]
    return "".join("\t".join(values) + "\n" for values in ([fields] if fields else []) + [flat(record) for record in page.records])


def to_json(page: Page) -> str:
    """One object: facts, the begins of the columns of charts, and the rows as objects."""
    import json
    return json.dumps({"view": page.view, **page.facts, **({"message": page.empty} if page.empty else {}), "columns": page.axes,
                       "rows": [dict(zip(page.fields, record)) for record in page.records]}, indent=1) + "\n"


def to_html(lines: Iterable[Line], link: Callable[[str], str]) -> str:
    """Lines for <pre>. Characters that a browser may take from another font are boxed to the width they have here."""
    from html import escape

    def boxed(text: str) -> str:
        pieces = [("", "")]
        for char in text:
            kind = "a" if char.isascii() else "w" if width(char) == 2 else "g"
            pieces = [*pieces[:-1], (kind, pieces[-1][1] + char)] if kind == pieces[-1][0] else [*pieces, (kind, char)]
        return "".join(escape(piece) if kind in ("", "a") else '<b class="g" style="width:%dch">%s</b>' % (width(piece), escape(piece))
                       for kind, piece in pieces)

    def piece(span: Span) -> str:
        text = boxed(span.text)
        text = '<a href="%s">%s</a>' % (escape(link(span.link)), text) if span.link else text
        return '<span class="%s">%s</span>' % (span.style, text) if span.style else text
    return "".join("".join(map(piece, line)).rstrip() + "\n" for line in lines)


HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>%(title)s</title>
<style>
:root { --ink: #1b1f23; --paper: #fff; --dim: #6a737d; --bad: #b31d28; --warn: #8a5a00; --good: #176f2c; --co2: #005b9a; --temp: #7a3e9d }
@media (prefers-color-scheme: dark) { :root { --ink: #d6dbe0; --paper: #14171a; --dim: #8b949e; --bad: #ff7b72; --warn: #e3b341;
 --good: #56d364; --co2: #6cb6ff; --temp: #d2a8ff } }
body { color: var(--ink); background: var(--paper); font: 16px/1.4 system-ui, sans-serif; margin: 1rem auto; max-width: 62rem; padding: 0 .5rem }
h1 { font-size: 1.2rem } h2 { font-size: 1rem; margin-bottom: .3rem }
pre { font: 13px/1.25 "DejaVu Sans Mono", Menlo, Consolas, "Liberation Mono", monospace; overflow-x: auto; margin: 0; font-variant-ligatures: none }
a { color: inherit } nav a { margin-right: 1em }
.g { display: inline-block; font-weight: inherit; white-space: pre; overflow: hidden; vertical-align: bottom; height: 1.25em }
.head { font-weight: bold } .dim { color: var(--dim) } .bad { color: var(--bad); font-weight: bold } .warn { color: var(--warn) }
.good { color: var(--good) } .co2 { color: var(--co2) } .temp { color: var(--temp) }
.narrow { display: none }
@media (max-width: 52rem) { .wide { display: none } .narrow { display: block } }
</style>
</head>
<body>
<nav>%(nav)s</nav>
<h1>%(title)s</h1>
%(body)s</body>
</html>
"""

Sections = List[Tuple[str, str, Dict[str, Any]]]                        # heading, view, options that differ
WEB: Dict[str, Tuple[str, Sections]] = {
    "index": ("CO₂ fleet", [("Units", "status", {})]),
    "alive": ("Pings and units", [("Units", "status", {}), ("Pings", "pings", {}), ("Signal", "signal", {}), ("Gaps", "gaps", {}),
                                  ("Errors", "errors", {})]),
    "co2": ("CO₂", [("Recent CO₂", "co2", {}), ("All CO₂", "co2", {"recent_days": 0.0})])}


class Links(NamedTuple):
    """Where pages are: behind the daemon, or as files in one directory."""
    alive: str = "/status/alive/summary"
    co2: str = "/data/co2/summary"
    index: str = "/"
    site: Callable[[str], str] = lambda name: "/data/co2/summary?site=" + _quoted(name)


def _quoted(name: str) -> str:
    from urllib.parse import quote
    return quote("".join(c if c.isprintable() and c not in "*?[" else "?" for c in name), safe="?" and "")


def sections(view: str, o: Options, db: str, now: float, widths: Sequence[int]) -> List[Tuple[str, List[Page]]]:
    """The parts of a web page, each drawn for every width; one that says why when there is no database."""
    found = []
    for heading, name, changes in WEB[view][1]:
        found.append((heading, [draw(name, db, o._replace(width=cells, **changes), now, None) for cells in widths]))
    return found


def document(view: str, o: Options, db: str, now: float, widths: Sequence[int], links: Links = Links()) -> str:
    """A whole HTML document: each section wide, and narrow for phones; no script, all style inline."""
    from html import escape
    title = WEB[view][0] + (" · " + clean(o.site or o.unit) if o.site or o.unit else "")
    body = ""
    for heading, pages in sections(view, o, db, now, widths):
        body += "<h2>%s</h2>\n" % escape(heading) + "".join(
            '<pre%s>%s</pre>\n' % (' class="%s"' % kind if len(pages) > 1 else "", to_html(page.lines, links.site))
            for kind, page in zip(("wide", "narrow"), pages))
    nav = " ".join('<a href="%s">%s</a>' % (escape(target), escape(WEB[name][0])) for name, target in (
        ("index", links.index), ("alive", links.alive), ("co2", links.co2)))
    return HTML % {"title": escape(title), "nav": nav, "body": body}


def web_page(view: str, db: str, query: Dict[str, str], html: bool, now: float) -> str:
    """A page for the daemon: view is alive, co2 or index; `query` the URL's arguments (ValueError says what is wrong with
    them); an HTML document, or the text page. Without a database or data, a page that says so."""
    o = from_query(query)
    if html:
        o = o._replace(glyphs="block") if o.glyphs == "auto" else o
        return document(view, o, db, now, [o.width] if "width" in query else [100, 46])
    return "\n".join(to_text(page.lines) for _, (page,) in sections(view, o, db, now, [o.width]))


def from_query(query: Dict[str, str]) -> Options:
    """Options from the arguments of a URL; names that are none of ours are no matter."""
    values = {}
    for field, (kind, _, _) in OPTIONS.items():
        text = query.get(field.replace("_", "-"))
        if text is not None:
            values[field] = text.lower() not in ("", "0", "no", "false") if kind is bool else kind(text)
    return Options(**values)


def draw(view: str, db: str, o: Options, now: float, rows: Optional[int]) -> Page:
    """One page from the database file; a missing or empty one gives a page that says so."""
    zone = Zone(o.tz)
    at = int(now) if o.xmax is None else min(int(now), moment(zone, o.xmax))
    try:
        connection = importer.open_db(db)
    except importer.NoDatabase as error:
        return nothing(view, clean("No data yet: %s" % error, o.glyphs == "ascii"))
    try:
        return VIEWS[view](Context(connection, o, zone, at, rows))
    finally:
        connection.close()


# -- the command ----------------------------------------------------------------------------------------------------------


def number(low: float, high: float, whole: bool = False) -> Callable[[str], Any]:
    """A parser of numbers in a range."""
    def parse(text: str) -> Any:
        value = int(text) if whole else float(text)
        if not low <= value <= high:
            raise ValueError("%s is not between %g and %g" % (text, low, high))
        return value
    parse.__name__ = "number"
    return parse


def glyphs(text: str) -> str:
    """The name of a glyph set."""
    if text not in GLYPHS:
        raise ValueError("glyphs are one of %s" % ", ".join(GLYPHS))
    return text


# options that change a page, also in URLs: parser, metavar, help
OPTIONS: Dict[str, Tuple[Any, str, str]] = {
    "xmin": (str, "DATE", "begin, 2019-09-01 or 2019-09-01T12:00"), "xmax": (str, "DATE", "end; the page is drawn as of then"),
    "recent_days": (number(0, 1e5), "N", "the last N days (co2 14, one site 365, pings 364, signal and gaps 30, errors 84); 0 is everything"),
    "min_tier": (number(-1e6, 1e6, True), "N", "only deployments of this tier and higher"),
    "max_tier": (number(-1e6, 1e6, True), "N", "only deployments of this tier and lower"),
    "co2_max": (number(1, 1e6), "PPM", "top of the CO2 scale"), "unit": (str, "NAME", "a unit by id or nickname; or several, or patterns: a,b*"),
    "site": (str, "NAME", "a site, or several, or patterns"), "tz": (str, "ZONE", "time zone of the page, as Europe/Oslo (UTC)"),
    "width": (number(20, 1000, True), "CELLS", "cells of a line"), "height": (number(5, 10000, True), "LINES", "lines of the screen"),
    "glyphs": (glyphs, "SET", "auto, braille, block or ascii"), "all": (bool, "", "all rows, however many"),
    "log": (bool, "", "logarithmic CO2 scale"), "panels": (bool, "", "co2: every deployment in detail"),
    "ping_limit": (number(0.1, 1e5), "HOURS", "status: late after this time without a ping (by the unit's own rhythm)"),
    "data_limit": (number(0.1, 1e5), "HOURS", "status: late after this time without readings")}
SWITCHES = (("--plain", "tab-separated values"), ("--json", "JSON"), ("--html", "an HTML document; with -o DIR all pages as files"),
            ("--no-pager", "never page"), ("--check", "status: one line first; exit 0 well, 1 warning, 2 critical"))


def arguments(argv: Optional[Sequence[str]]) -> Any:
    """The command line, parsed; wrong ones end the program with status 2."""
    import argparse
    parser = argparse.ArgumentParser(prog="plot_ascii.py", description="Pages of a fleet of CO2 sensor units, for a terminal.")
    parser.add_argument("view", nargs="?", default="co2", choices=list(VIEWS))
    parser.add_argument("--db", metavar="FILE", help="the database (by default where co2d.conf says, or var/db.sqlite3)")
    for name, (kind, metavar, text) in OPTIONS.items():
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            parser.add_argument(flag, type=kind, metavar=metavar, help=text)
    for flag, text in SWITCHES:
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--color", "--colour", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("-o", "--output", metavar="FILE", help="write here; with --html a directory takes all pages")
    parser.add_argument("--watch", type=number(0.1, 1e6), metavar="SECONDS", help="redraw until Ctrl-C")
    parser.add_argument("--changes", metavar="FILE", help="--check: print only when something changed since FILE was written")
    parser.add_argument("--repeat", type=number(0, 1e5), metavar="HOURS", default=24.0, help="--changes: again after this time (24)")
    return parser.parse_args(argv)


def speaks_unicode(environ: Dict[str, str]) -> bool:
    """Whether the user's own locale is UTF-8. Python's encodings do not tell: it makes C into UTF-8."""
    locale = environ.get("LC_ALL") or environ.get("LC_CTYPE") or environ.get("LANG") or "C"
    return "utf-8" in locale.lower() or "utf8" in locale.lower()


def coloured(choice: str, environ: Dict[str, str], terminal: bool) -> bool:
    """Whether to use colour: a flag wins, then NO_COLOR, TERM and what stdout is."""
    return choice == "always" or choice == "auto" and terminal and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def screen(a: Any, environ: Dict[str, str]) -> Tuple[int, int]:
    """Cells and lines: flags, then COLUMNS and LINES, then the terminal, then 80x24."""
    try:
        size: Sequence[int] = os.get_terminal_size(sys.stdout.fileno()) if sys.stdout.isatty() else (80, 24)
    except (OSError, ValueError):
        size = (80, 24)
    fallback = [int(environ[name]) if environ.get(name, "").isdigit() and int(environ[name]) else at or default
                for name, at, default in zip(("COLUMNS", "LINES"), size, (80, 24))]
    return max(20, a.width or fallback[0]), max(5, a.height or fallback[1])


def page_options(a: Any, environ: Dict[str, str]) -> Options:
    """The options of a page from the command line and the environment."""
    given = {name: getattr(a, name) for name in OPTIONS if getattr(a, name) is not None}
    given["width"], given["height"] = screen(a, environ)
    if given.get("glyphs", "auto") == "auto" and not speaks_unicode(environ):
        given["glyphs"] = "ascii"
    return Options(**given)


def run(a: Any, environ: Dict[str, str], clock: Callable[[], float]) -> int:
    """One command."""
    db = importer.locate(db=a.db, environ=environ).db
    o = page_options(a, environ)
    if a.check:
        return check(a, db, o, clock())
    if a.html and a.output and (os.path.isdir(a.output) or a.output.endswith(os.sep)):
        return write_site(a.output, o, db, clock())
    if a.watch:
        return watch(a, db, environ, clock)
    paged = sys.stdout.isatty() and sys.stdin.isatty() and not a.no_pager and not a.output
    whole = o.all or a.plain or a.json or a.html or paged and a.view != "status"
    text = rendered(a, db, o, clock(), None if whole else o.height - 1, coloured(a.color, environ, sys.stdout.isatty() and not a.output))
    if a.output:
        write_file(a.output, text)
    elif paged and text.count("\n") > o.height - 1:
        page_through(text, environ)
    else:
        put(text)
    return 0


def rendered(a: Any, db: str, o: Options, now: float, rows: Optional[int], colour: bool) -> str:
    """A page in the format that was asked for."""
    if a.html:
        o = o._replace(glyphs="block") if o.glyphs == "auto" else o
        page = draw(a.view, db, o, now, rows)
        return HTML % {"title": a.view, "nav": "", "body": "<pre>%s</pre>\n" % to_html(page.lines, Links().site)}
    page = draw(a.view, db, o, now, rows)
    if a.plain and page.empty:
        print(page.empty, file=sys.stderr)
    return to_json(page) if a.json else to_tsv(page, o.glyphs == "ascii") if a.plain else to_text(page.lines, colour)


def put(text: str) -> None:
    """Text to stdout in the encoding of its characters, whatever Python thinks of the locale."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def write_file(path: str, text: str) -> None:
    """Replace a file in one step, so that a web server or a reader never sees half of it."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".new", path)


def write_site(directory: str, o: Options, db: str, now: float) -> int:
    """All pages as files for another web server."""
    import hashlib
    os.makedirs(directory, exist_ok=True)

    def name(site: str) -> str:
        safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in site)
        return "site-%s.html" % (safe if safe == site else safe + "-" + hashlib.md5(site.encode("utf-8", "replace")).hexdigest()[:6])
    o = o._replace(glyphs="block" if o.glyphs == "auto" else o.glyphs)
    links = Links("status.html", "co2.html", "index.html", name)
    for view, file in (("index", links.index), ("alive", links.alive), ("co2", links.co2)):
        write_file(os.path.join(directory, file), document(view, o, db, now, [100, 46], links))
    try:
        connection = importer.open_db(db)
    except importer.NoDatabase:
        return 0
    for site in sorted({stay.site for stay in importer.deployments(connection) if stay.site}):
        asked = o._replace(site="".join("[%s]" % c if c in "*?[" else c for c in site))
        write_file(os.path.join(directory, name(site)), document("co2", asked, db, now, [100, 46], links))
    connection.close()
    return 0


def page_through(text: str, environ: Dict[str, str]) -> None:
    """Show text in the user's pager; without one that works, just print it."""
    import subprocess
    pager = environ.get("PAGER", "less -FIRX")
    try:
        process = subprocess.Popen(pager or "cat", shell=True, stdin=subprocess.PIPE, env={"LESSCHARSET": "utf-8", **environ})
        try:
            process.communicate(text.encode())
        except KeyboardInterrupt:       # meant for the pager
            process.wait()
    except OSError:
        put(text)


class Resized(Exception):
    """The terminal has another size now."""


def watch(a: Any, db: str, environ: Dict[str, str], clock: Callable[[], float]) -> int:
    """Redraw in place until Ctrl-C, at once when the terminal changes its size."""
    import signal

    def resized(*_: Any) -> None:
        raise Resized
    put("\x1b[?1049h\x1b[?25l")
    try:
        while True:
            o = page_options(a, environ)
            text = rendered(a, db, o, clock(), o.height - 1, coloured(a.color, environ, sys.stdout.isatty()))
            put("\x1b[H" + text.replace("\n", "\x1b[K\n") + "\x1b[J")
            try:
                signal.signal(signal.SIGWINCH, resized)
                time.sleep(a.watch)
                signal.signal(signal.SIGWINCH, signal.SIG_IGN)
            except Resized:
                pass
    finally:
        put("\x1b[?25h\x1b[?1049l")


def check(a: Any, db: str, o: Options, now: float) -> int:
    """For monitoring and cron: how bad it is, as exit status, in one line, and in one line for each alarm."""
    return 0


def main(argv: Optional[Sequence[str]] = None, now: Optional[float] = None) -> int:
    """The command line; the exit status."""
    try:
        return run(arguments(argv), dict(os.environ), time.time if now is None else lambda: now)      # type: ignore
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:             # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ValueError as error:
        print("plot_ascii: %s" % error, file=sys.stderr)
        return 2
    except (importer.sqlite3.Error, OSError) as error:
        print("plot_ascii: %s" % clean(error, True), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
