#!/usr/bin/env python3
"""Pages about a fleet of sensor units, as text, data, SVG and HTML: CO2, pings, status, signal, errors and gaps.

A page is made in one direction only:

    queries (importer)  ->  rows: values, one for each column of a chart
        ->  `Page`: numbers, and the lines drawn from them      ->  text, TSV, JSON, HTML
        ->  `Picture`, of the same rows (see PICTURES): SVG     ->  HTML, -o FILE.svg

Short names: c is a Context, o Options, t a Table, g glyphs, a the arguments of the command line.

Words used here:

    axis      The columns of a chart in time. A column is one calendar step long (30 min ... 1 d ... 5 years)
              and begins where such a step begins in the page's time zone. The shortest step that fits the width is
              taken, so a chart may be narrower than its room. Ticks stand on calendar steps too.
    scale     Of text: from the least to the greatest value inside the fence, rounded outward. The fence is Tukey's for
              values far out: three interquartile distances beyond the quartiles of what all columns of the page hold.
              Of pictures: see `make_scale`. Values outside the scale are marked and counted, so a spike neither
              vanishes nor flattens the page.
    gap       A column without readings is blank: never bridged, never zero. Only between two readings that are no
              more than 1.5 of the unit's rhythms apart (`importer.buckets`), the value before it is held.
    glyphs    The characters of a page, all sets in one table. `auto` is block, with braille in large plots; it is
              ascii where the user's locale is C. Our own words are written in Unicode and translated by `PLAIN`.
    span      Text, style and link: what lines are made of. Foreign text gets into a span only through `clean`, which
              leaves no control or format character. Width is counted in cells of a terminal; wide characters take two.
    part      A piece of a title: its rank, and its texts from long to short. Where the line is too short, the part of
              the last rank is shortened, then left out.
    note      A piece of a legend: characters, a space, their meaning. A legend is never cut: it goes on in the next
              line.
    cell      What a table holds: values for programs, spans for people. A list as value is a chart.

Every row has its numbers in digits, and colour only repeats what the text says. --plain and --json have the numbers
that are drawn. A page costs columns x rows: what it has no room for is not asked for
(signal, gaps and errors must sort first).

Left out on purpose: smoothing and interpolation, a second y axis, keys to press (--watch redraws in place with a few
escape sequences, no curses), palettes beyond the terminal's own.
"""

from __future__ import annotations

import importer  # first: from then on Ctrl-C shows no traceback

import json
import os
import re
import signal
import sys
import time
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from datetime import datetime, timedelta, timezone
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from itertools import chain, cycle, groupby, starmap, zip_longest
from operator import attrgetter, itemgetter
from math import ceil, floor, log10, nan
from shutil import get_terminal_size
from types import SimpleNamespace
from typing import Callable, NamedTuple, Sequence
from urllib.parse import quote, urlencode

from importer import DAY, Deployment, FOREVER, Problem, Unusable, write_file


# -- glyphs -----------------------------------------------------------------------------------------------------------

# name, as blocks, in ASCII, what it stands for; each character is one cell wide
GLYPH_TABLE = """
ramp     ▁▂▃▄▅▆▇█  .:-=+*#%  bars, from low to high
days     ░▒▓█      .:+#      pings on few, some, many, all days
silent   ─         -         deployed without pings
open     ├         [         begin of a stay
close    ┤         ]         end of a stay
pings    ·▌█       .|!       none, one, more on a day
up       ▲         ^         above the scale
down     ▼         v         below the scale
suspect  ?         ?         readings, but none usable
side     │         |         left edge of a plot
label    ┤         +         the same, beside a label
zero     ┄         .         line at 0
last     ◂         <         newest value
foot     ╵         |         tick under a plot
to       –         ..        between times and numbers
until    …         ..        between numbers that may be negative
mean     ▀         *
range    ░         :         from the least to the greatest value
status   █▒░       =-.       deployed, en route, not deployed
part     ▂         _         less than half of the readings
whisker  ─         -         signal: least to greatest
box      ━         =         signal: quartiles
median   █         #
dot      ○         o         signal: newest
limit    ┊         .         signal: weak, unusable
none     –         -         no number
degree   °C        degC
"""


def glyph_column(column):
    """The characters in a column of the table, as attributes."""
    rows = importer.rows_of(GLYPH_TABLE)
    return SimpleNamespace(**{row[0]: row[column] for row in rows})


BLOCK = glyph_column(1)
ASCII = glyph_column(2)
BRAILLE = SimpleNamespace(**{**vars(BLOCK), "mean": "⠒", "range": "⠅"})
# name -> glyphs of tables, glyphs of large plots
GLYPHS = {
    "auto": (BLOCK, BRAILLE),
    "braille": (BLOCK, BRAILLE),
    "block": (BLOCK, BLOCK),
    "ascii": (ASCII, ASCII)
}


def translation(chars, texts):
    """For `str.translate`: each character becomes a text. Characters without a text are removed."""
    return str.maketrans(dict(zip_longest(chars, texts.split(), fillvalue="")))


PLAIN = translation("–−₂×…╷▲▼·°", "- - 2 x .. | ^ v")
LATIN = translation("øØæÆđĐðþßłŋŧ", "o O ae AE d D d th ss l n t")

# -- text: foreign text made harmless, width in cells -----------------------------------------------------------------


def clean(text, ascii=False):
    """Foreign text for a terminal: what does not print becomes ?, white space a space; ASCII letters lose marks."""
    text = unicodedata.normalize("NFC", str(text))
    if ascii:
        letters = unicodedata.normalize("NFKD", text.translate(LATIN))
        text = "".join(char for char in letters if not unicodedata.combining(char))
    text = "".join(char if char.isprintable() else "?" for char in re.sub(r"\s", " ", text))
    return text.encode("ascii", "replace").decode() if ascii else text


def width(text):
    """Cells that clean text takes on a terminal."""
    return len(text) if text.isascii() else sum(map(_cells, text))


@lru_cache(maxsize=4096)
def _cells(char):
    if unicodedata.category(char) in ("Mn", "Me"):  # marks on the letter before
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def cut(text, cells):
    """Clean text in at most so many cells; a ~ stands for what is missing."""
    if width(text) <= cells:
        return text
    while width(text) > max(cells - 1, 0):
        text = text[:-1]
    return (text + "~")[:cells]


def cut_middle(text, cells):
    """Clean text in at most so many cells, of which the last third shows its end: values of messages stand there."""
    if width(text) <= cells:
        return text
    end = text
    while end and width(end) > cells // 3:
        end = end[1:]
    return cut(text, cells - width(end)) + end


class Span(NamedTuple):
    """A piece of a line: clean text, one of STYLES, the site that it leads to."""

    text: str
    style: str = ""
    link: str = ""


# SGR codes
STYLES = {
    "head": "1",
    "bad": "1;31",
    "warn": "33",
    "good": "32",
    "dim": "2",
    "co2": "36",
    "temp": "35"
}


def pad(spans, cells, right=False):
    """Spans made so many cells wide; a single one is cut."""
    if len(spans) == 1:
        spans = [spans[0]._replace(text=cut(spans[0].text, cells))]
    fill = Span(" " * (cells - sum(width(span.text) for span in spans)))
    return [fill, *spans] if right else [*spans, fill]


def styled(chars):
    """Characters with their styles, as one span for each run of a style."""
    line = []
    for style, group in groupby(chars, key=lambda pair: pair[1]):
        line.append(Span("".join(char for char, _ in group), style))
    return line


def count(n, what):
    """1 unit, 2 units."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def compact(value):
    """A number below a million in at most four characters: 411, 1200, 10k."""
    return f"{value:.0f}" if -950 < value < 9950 else f"{value / 1000:.0f}k"


def signed(form, value):
    """Numbers with a real minus."""
    return (form % value).replace("-", "−")


def ago(seconds):
    """A time in at most eight characters: 12 min, 11 h, 9 d 02 h, 13 d."""
    hours = int(seconds) // 3600
    if hours == 0:
        return f"{int(seconds) // 60} min"
    if hours < 24:
        return f"{hours} h"
    if hours < 240:
        return "%d d %02d h" % divmod(hours, 24)
    return f"{hours // 24} d"


def percent(part, whole):
    """A share, rounded down: 99.6 % is not all."""
    return f"{min(100, int(100 * part / max(whole, 1)))} %"


# -- time: zones, calendar steps, axes, ticks -------------------------------------------------------------------------


class Zone:
    """A time zone of this machine. Local times are datetimes with this zone."""

    def __init__(self, name):
        self.info = timezone.utc
        if name.upper() != "UTC":
            from zoneinfo import ZoneInfo  # here, because most pages are in UTC

            try:
                self.info = ZoneInfo(name)
            except (KeyError, ValueError, OSError):
                raise ValueError(
                    f"no time zone {clean(name, True)[:40]} is known on this machine"
                )
        self.name = str(self.info)

    def local(self, ts):
        """UTC seconds as local time."""
        return datetime.fromtimestamp(ts, self.info)

    def iso(self, ts):
        """For data: to the minute, with the offset, 2019-09-26T14:00+02:00; Z for UTC."""
        return self.local(ts).isoformat(timespec="minutes").replace("+00:00", "Z")

    def parse(self, text):
        """UTC seconds of a date or date-time in this zone, or in the one that it says: ...Z, ...+02:00."""
        try:
            found = datetime.fromisoformat(text.replace("Z", "+00:00"))
        except ValueError:
            raise ValueError(
                f"not a date or time like 2019-09-26 or 2019-09-26T12:00: {clean(text, True)[:40]}"
            )
        if found.tzinfo is None:
            found = found.replace(tzinfo=self.info)
        return max(int(found.timestamp()), DAY)

    def short(self, ts, now):
        """26 Sep 12:00, or 26 Sep 2018 when it was in another year."""
        local = self.local(ts)
        if local.year == self.local(now).year:
            return f"{local:%-d %b %H:%M}"
        return f"{local:%-d %b %Y}"

    def period(self, window, to):
        """A range for a title, with the zone, in shorter and shorter forms. Of whole days the last is named."""
        begin = self.local(window.a)
        end = self.local(window.b)
        whole = begin.hour == begin.minute == end.hour == end.minute == 0
        days = whole or window.b - window.a > 99 * DAY
        if days:
            end -= timedelta(seconds=1)
        last = f"{end:%-d %b %Y} {self.name}"
        if days and begin.date() == end.date():
            return [last]
        first = f"{begin:%-d %b}"
        if begin.year != end.year:
            first = f"{begin:%-d %b %Y}"
        forms = [f"{first} {to} {last}", last]
        if days:
            return forms
        return [f"{first} {begin:%H:%M} {to} {end:%-d %b %Y %H:%M} {self.name}", *forms]


class Window(NamedTuple):
    """The range of a page in UTC seconds."""

    a: int
    b: int
    # False: a first column that begins before a is left out
    exact: bool = True


class Step(NamedTuple):
    """A calendar step."""

    unit: str  # min, month; for ticks also date: days counted from the 1st of a month
    n: int


STEP_TABLE = """
30 min    min    30
1 h       min    60
2 h       min    120
3 h       min    180
6 h       min    360
12 h      min    720
1 d       min    1440
2 d       min    2880
3 d       min    4320
1 week    min    10080
2 weeks   min    20160
1 month   month  1
2 months  month  2
3 months  month  3
6 months  month  6
1 year    month  12
5 years   month  60
"""
STEPS = {name: Step(unit, int(n)) for name, unit, n in importer.rows_of(STEP_TABLE)}
ALL_STEPS = list(STEPS)
FROM_DAYS = ALL_STEPS[6:]
# temperatures of night and day would alternate
WITHOUT_HALF_DAYS = ALL_STEPS[:5] + FROM_DAYS
TICK_SIZES = {
    "min": "10 30 60 120 180 360 720",
    "date": "1 2 3 5 10 15",
    "month": "1 2 3 6 12 24 60 120 600"
}
TICKS = [Step(unit, int(n)) for unit, sizes in TICK_SIZES.items() for n in sizes.split()]


def snap(local, step, on=0):
    """Where the calendar step begins in which a time falls, or one that many steps later. Weeks begin on Monday. Dates
    count from the 1st of their month, and leave out one that is too close to the next 1st."""
    unit, n = step
    day = local.replace(hour=0, minute=0, second=0)
    if unit == "min":
        minutes = (day.toordinal() - 1) * 1440 + local.hour * 60 + local.minute
        return local.replace(second=0) + timedelta(minutes=on * n - minutes % n)
    if unit == "month":
        months = ((local.year * 12 + local.month - 1) // n + on) * n
        return day.replace(year=months // 12, month=months % 12 + 1, day=1)
    date = (local.day - 1) // n * n + 1
    length = 32 - (day.replace(day=1) + timedelta(days=31)).day  # of this month
    return day.replace(day=date - n if n > 1 and date + 0.6 * n > length else date)


def length(step):
    """Seconds of a step at the most, but for days that clocks make longer."""
    return step.n * {"min": 60, "date": DAY, "month": 31 * DAY}[step.unit]


class Tick(NamedTuple):
    """A mark on an axis."""

    cell: int
    label: str
    ts: int = 0  # UTC seconds

    @property
    def end(self):
        """The cell behind the label, which begins behind the mark."""
        return self.cell + 1 + len(self.label)


class Axis(NamedTuple):
    """Columns of a chart."""

    edges: list[int]  # UTC seconds, one more than columns
    step: str  # one of STEPS
    zone: Zone
    window: Window  # from the first edge to the end that was asked for

    @property
    def cells(self):
        """The number of columns."""
        return len(self.edges) - 1

    @property
    def heading(self):
        """A line with the ticks and their labels."""
        return heading(make_ticks(self.zone, self.edges), self.cells)

    def columns(self):
        """Begin and end of each column."""
        return zip(self.edges, self.edges[1:])


def make_axis(zone, window, cells, steps):
    """Columns of the shortest of these steps that fit so many cells."""
    a, b, exact = window
    begin = zone.local(a)
    fitting = [name for name in steps if b - a < (cells + 1) * length(STEPS[name]) + DAY]
    for name in fitting or steps[-1:]:
        starts = [snap(begin, STEPS[name], number) for number in range(cells + 4)]
        # an hour that the clocks skip has no column
        edges = sorted({int(start.timestamp()) for start in starts})
        if not exact and edges[0] < a and edges[1] < b:
            edges.pop(0)
        edges = edges[: cells + 1]
        if edges[-1] >= b:
            break
    edges = edges[: bisect_left(edges, b) + 1]
    return Axis(edges, name, zone, Window(edges[0], b))


def heading(ticks, cells):
    """A line with ticks and their labels; ╷ stands at the tick."""
    line = ""
    for tick in ticks:
        # not in an f-string: Python 3.9 takes no width of 0
        line = line.ljust(tick.cell) + "╷" + tick.label
    return line.ljust(cells)


def make_ticks(zone, edges):
    """Ticks on the smallest calendar steps whose labels do not meet."""
    cells = len(edges) - 1
    # closer ticks have no room for their labels
    least = (edges[-1] - edges[0]) / (0.7 * cells + 2)
    for step in TICKS:
        if length(step) < least:
            continue
        ticks = []
        for cell, (begin, end) in enumerate(zip(edges, edges[1:])):
            tick = snap(zone.local(end - 1), step)
            ts = int(tick.timestamp())
            if ts >= begin:
                ticks.append(Tick(cell, tick_label(tick, step), ts))
        chosen = spaced(ticks, cells)
        if len(chosen) >= 0.8 * len(ticks):
            break
    return chosen


def tick_label(tick, step):
    """09:00, 26 Sep, 26, Sep or 2019: what changes at a tick."""
    if step.unit == "min" and (tick.hour or tick.minute):
        return f"{tick:%H:%M}"
    if tick.month == tick.day == 1:
        return str(tick.year)
    if step.unit == "min":
        return f"{tick:%-d %b}"
    return f"{tick:%b}" if tick.day == 1 else str(tick.day)


def spaced(ticks, cells):
    """Ticks whose labels have room, from the left; but a year goes before the label left of it."""
    kept = [Tick(-1, "")]
    for tick in ticks:
        year = len(tick.label) == 4 and tick.label.isdigit()
        if year and kept[-1].end > tick.cell:
            kept.pop()
        if kept[-1].end <= tick.cell and tick.end <= cells:
            kept.append(tick)
    return kept[1:]


# -- scales -----------------------------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """Values from low to high."""

    low: float
    high: float

    def level(self, value, levels):
        """0 ... levels - 1, the outermost for what is outside."""
        at = int((value - self.low) / (self.high - self.low) * levels)
        return min(max(at, 0), levels - 1)


def nice(size):
    """The next of 1, 2, 5, 10, 20 ... that is not smaller."""
    power = 10.0 ** floor(log10(size))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= size * 0.9999)


def make_scale(buckets, narrow, top, fenced=True):
    """Of what columns hold (suspect values only where none is usable), rounded outward. `narrow` is the least
    interquartile distance the fence believes.

    For text, all values inside the fence; for pictures, which have many columns, 99 of 100 extremes, those that are
    not far from these, and all means.
    """
    found = list(filter(None, buckets))
    usable = [(bucket.low, bucket.high) for bucket in found if bucket.n]
    suspect = [(bucket.suspect_low, bucket.suspect_high) for bucket in found if bucket.suspects]
    ends = sorted(chain.from_iterable(usable or suspect)) or [0, 4 * narrow]
    if fenced:
        lower = ends[len(ends) // 4]
        upper = ends[len(ends) * 3 // 4]
        reach = 3 * max(upper - lower, narrow)
        means = []
    else:
        few = len(ends) // 200
        lower = ends[few]
        upper = ends[-1 - few]
        reach = (upper - lower) / 5  # a value that is just outside is not to alarm anybody
        means = [bucket.mean for bucket in found if bucket.n]
    inside = [end for end in ends if lower - reach <= end <= upper + reach] + means
    low = min(inside)
    high = max(inside)
    unit = nice(max(high - low, 1) / 15)
    low = floor(low / unit) * unit
    high = ceil(high / unit) * unit
    missing = max(narrow / 5 - (high - low), 0)
    low -= missing / 2
    high = top or high + missing / 2
    return Scale(low if low < high else high / 2, high)


# what a row of a plot may be worth, in units of a thousandth of the scale
_ROW_STEPS = [n * 10**power for power in range(6) for n in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5)]


def make_rows(scale, rows):
    """A scale stretched so that the middles of a plot's rows are round numbers, and the rows' labels, from below."""
    unit = nice(scale.high - scale.low) / 1000
    for n in _ROW_STEPS:
        step = n * unit
        first = floor(scale.low / step + 0.5)
        labels = []
        for row in range(first, first + rows):
            value = row * step
            label = f"{value:.4g}" if abs(value) < 10000 else f"{value / 1000:.4g}k"
            labels.append("" if rows >= 5 and row % 2 else label)
        end = (first + rows - 0.5) * step
        if scale.high <= end and max(map(len, labels)) <= 4:
            break
    return Scale((first - 0.5) * step, end), labels


# -- what a page is asked for -----------------------------------------------------------------------------------------


def between(low, high, kind=float):
    """A parser of numbers in a range."""

    def number(text):
        try:
            value = kind(text)
        except ValueError:
            value = nan
        if not low <= value <= high:
            what = "whole number" if kind is int else "number"
            raise ValueError(
                f"{clean(text, True)[:40]} is not a {what} from {low:g} to {high:g}"
            )
        return value

    return number


def glyph_set(text):
    """The name of a set of glyphs."""
    if text not in GLYPHS:
        raise ValueError("glyphs are one of " + ", ".join(GLYPHS))
    return text


def switch(text):
    """Whether a switch is on, in the words of co2d.conf."""
    importer.check_setting("switch", str(text))
    return importer.value_of("switch", str(text), "")


# what a page may be asked for, on the command line and, without the --, in a URL; what that takes; how it is read
PAGE_OPTIONS = """
--xmin         DATE   text    begin: 2019-09-01, or 2019-09-01T12:00
--xmax         DATE   text    end: the page as it was then
--recent-days  N      days    the last N days, 0 for all
--min-tier     N      tier    only deployments of this tier and above
--max-tier     N      tier    only deployments of this tier and below
--co2-max      PPM    ppm     top of the CO2 scale
--own-scale    -      switch  each row on a scale of its own
--unit         NAME   text    units by id, its end, or nickname; several with commas, or patterns: a,b*
--site         NAME   text    sites, likewise
--tz           ZONE   text    time zone of the page, like Europe/Oslo
--width        CELLS  cells   cells of a line
--height       LINES  lines   lines of the screen
--wide         -      switch  all columns, however narrow the screen
--glyphs       SET    glyphs  auto, braille, block or ascii
--all          -      switch  all rows, however many
--panels       -      switch  co2: every deployment in detail
"""
READERS = {
    "text": str,
    "days": between(0, 1e5),
    "tier": between(-1e6, 1e6, int),
    "ppm": between(1, 5e5),
    "cells": between(20, 1000, int),
    "lines": between(5, 100000, int),
    "glyphs": glyph_set,
    "switch": switch
}
# name -> what reads it
OPTIONS = {
    flag[2:].replace("-", "_"): READERS[reader]
    for flag, _, reader, _ in importer.rows_of(PAGE_OPTIONS)
}
DEFAULTS = {"tz": "UTC", "width": 80, "height": 24, "glyphs": "auto"}
FLAGS = [name.replace("_", "-") for name in OPTIONS]
WIDE = 160  # cells; all columns fit
WEB_ROWS = 200  # lines of one section of a web page, unless ?all=1


class Options(SimpleNamespace):
    """A value for each of OPTIONS, and what the page is made of.

    db        path of the database
    now       UTC seconds
    rows      lines of the page; None: any number
    problems  importer.Problem: what is known to be wrong
    query     the arguments of the URL; None: the page is a file
    archive   where verdicts on units look for updates and fetches, or None
    """

    rows = WEB_ROWS
    problems = ()
    query = None
    archive = None

    def __init__(self, **given):
        super().__init__(**dict.fromkeys(OPTIONS) | DEFAULTS | given)

    def but(self, **changes):
        """The same with some changed."""
        return Options(**vars(self) | changes)

    @classmethod
    def from_query(cls, asked, **others):
        """From the arguments of a URL or of a command line. What is empty is not given."""
        given = {}
        for flag, text in asked.items():
            name = flag.replace("-", "_")
            if name not in OPTIONS:
                known = ", ".join(FLAGS)
                raise ValueError(
                    f"there is no option {clean(flag, True)[:40]}; there are {known}"
                )
            try:
                if text:
                    given[name] = OPTIONS[name](text)
            except ValueError as error:
                raise ValueError(f"{flag}: {error}")
        return cls(**given, **others)


class View(NamedTuple):
    """One of the pages that can be asked for."""

    draw: Callable  # draw(c) is a Page
    about: str  # what it shows
    table: str  # its range is that of the rows of this table
    days: int  # of its usual range
    days_alone: int = 0  # the same, of one site or unit


class Context:
    """What a view draws with: the database, the options, and the time that is now on the page (UTC seconds)."""

    def __init__(self, db, view, o):
        self.db = db
        self.view = view  # one of VIEWS
        self.o = o
        # lines of the page; None: any number
        self.rows = None if o.all else o.rows
        self.zone = Zone(o.tz)
        self.now = o.now
        if o.xmax is not None:
            self.now = min(self.now, self.zone.parse(o.xmax))
        self.begin = o.xmin and self.zone.parse(o.xmin)
        self.width = max(o.width, WIDE) if o.wide else o.width
        self.g, self.plot = GLYPHS[o.glyphs]
        self.ascii = self.g is ASCII
        self.fenced = True  # scales, see `make_scale`
        self.charts = {}  # (step, quantities...) -> for each row its charts: read once, though `fleet` draws twice
        self.states = {}  # unit -> UnitState

    def room(self, others):
        """How many rows a page has room for beside other lines; None: for any number."""
        return None if self.rows is None else max(1, self.rows - others)

    def say(self, text):
        """Our own text in the page's characters."""
        return text.translate(PLAIN) if self.ascii else text

    def name(self, text):
        """Foreign text in the page's characters."""
        return clean(text, self.ascii)

    def period(self, window):
        """A range, as a part of a title."""
        return 0, *self.zone.period(window, self.g.to)

    def title(self, parts, style="head"):
        """A line of parts, in order, as far as they fit. A part is its rank, and its forms from long to short."""
        left = []
        for rank, *forms in parts:
            forms = list(filter(None, forms))
            if forms:
                left.append((rank, forms))
        while True:
            text = self.say(" · ".join(forms[0] for _, forms in left))
            _, forms = max(reversed(left), key=itemgetter(0))
            if width(text) <= self.width or len(left) == len(forms) == 1:
                return [Span(cut(text, self.width), style)]
            forms.pop(0)
            left = [part for part in left if part[1]]

    def wrapped(self, notes, between="  ", style="dim"):
        """Notes in as many lines as they take."""
        lines = []
        for note in filter(None, notes):
            longer = between.join([*lines[-1:], note])
            if lines and width(longer) <= self.width:
                lines[-1] = longer
            else:
                lines.append(note)
        return [[Span(cut(line, self.width), style)] for line in lines]

    def legend(self, notes, here):
        """What those characters mean that are here. A note is characters, a space, their meaning; without characters it
        always stands."""
        said = []
        for note in filter(None, notes):
            chars, meaning = note.split(" ", 1)
            shown = "".join(char for char in chars if char in here)
            if shown or not chars:
                said.append(self.say(f"{shown} {meaning}".strip()))
        return self.wrapped(said)

    @cached_property
    def stays(self):
        """The deployments that are asked for, highest tier first; units that never had one come last."""
        o = self.o
        stays = importer.deployments(self.db)
        if o.site:
            sites = importer.find_sites(self.db, o.site)
            stays = [stay for stay in stays if (stay.site or stay.nickname) in sites]
        if o.unit:
            units = importer.find_units(self.db, o.unit)
            stays = [stay for stay in stays if stay.unit_id in units]
        return [stay for stay in stays if self.has_tier(stay)]

    def has_tier(self, stay):
        """Whether a deployment has the tier that is asked for, if one is."""
        low = self.o.min_tier
        high = self.o.max_tier
        tier = stay.tier
        if low is high is None:
            return True
        return tier is not None and (low is None or tier >= low) and (high is None or tier <= high)

    def window(self, spans=None, alone=False):
        """The range of the page. Without --xmax it ends now, or with the newest row of the spans when none has come for
        as long as the page shows; without --xmin it begins no earlier than the first row. The spans are those of all
        stays, if none are given."""
        o = self.o
        view = VIEWS[self.view]
        end = self.now
        units, since, until = zip(*(spans or spans_of(self.stays)))
        first, last = importer.extent(self.db, view.table, set(units), end)
        if first is None:
            first = last = end
        first = max(first, min(since))
        last = min(last, max(until) - 1)
        asked = self.begin
        days = view.days_alone if alone else view.days
        if o.recent_days is not None:
            days = o.recent_days or 1e5
        if o.xmax is None and end - last > days * DAY and (asked or 0) < last:
            end = last + 1
        if asked:
            if asked > end:
                raise ValueError(
                    f"the page would begin after its end: {clean(o.xmin, True)}"
                )
            return Window(max(min(asked, end - 300), DAY), end)
        begin = int(end - days * DAY)
        if begin < first < end - 300:
            return Window(first, end)
        return Window(max(begin, DAY), end, exact=False)


# -- pages: the numbers, and the lines drawn from them ----------------------------------------------------------------


class Page(NamedTuple):
    """What a view makes: numbers, and the lines drawn from them."""

    view: str
    facts: dict  # of the page as a whole, for JSON
    fields: list[str]
    records: list[list]  # a list in a record is a chart
    lines: list[list[Span]]
    axes: dict = {}  # field of a chart -> where its columns begin, as texts
    empty: str = ""  # why there is nothing to show


class Nothing(Exception):
    """There is nothing to show; its text says why."""


def nothing(view, why):
    """A page that says why it is empty."""
    return Page(view, {}, [], [], [[Span(why)]], empty=why)


class Cell(NamedTuple):
    """Values, and how they are drawn."""

    values: Sequence
    spans: Sequence[Span]

    @property
    def text(self):
        """What is drawn."""
        return "".join(span.text for span in self.spans)


def cell(text, *values, style="", link=""):
    """Values, drawn as one span."""
    return Cell(values, [Span(text, style, link)])


class Column:
    """A column of a table."""

    least = 0  # cells of the narrowest page that has it
    right = False
    gap = 1  # cells before it
    margin = 0  # cells on both sides of a chart
    # of a chart in time, which takes the room that is left: the columns it may have
    steps: Sequence[str] = ()
    most = 0  # of names: cells of the longest; the column grows to this if the line has room

    def __init__(self, fields, head, cells, fill, rank=0, **other):
        self.fields = fields.split()  # the names of its values in TSV and JSON
        self.head = head
        self.cells = cells  # of a chart the least
        self.fill = fill  # what a row has in it: fill(table, row) is a Cell
        self.rank = rank  # columns that do not fit are left out, highest rank first; rank 0 never
        vars(self).update(other)


# of all charts of a page: it is then ready in about 0.3 s
MOST_CELLS = 60000


class Table:
    """Rows under headings; where the page is narrow, columns go by rank; charts take what is left."""

    ruler: Scale  # of a chart of dBm

    def __init__(self, c, columns, window, rows=1):
        self.c = c
        self.columns = columns
        self.window = window
        self.kept = [column for column in columns if column.least <= c.width]
        while self.spare() < 0 and any(column.rank for column in self.kept):
            self.kept.remove(max(self.kept, key=lambda column: column.rank))
        self.axes = {}  # field of a chart -> Axis
        self.pings = {}  # (field of a chart, unit) -> Pings of each column
        charts = [column for column in columns if column.steps]
        for column in charts:
            cells = column.cells - 2 * column.margin
            if column in self.kept:
                cells += self.spare()
            cells = max(min(cells, MOST_CELLS // rows // len(charts)), 4)
            axis = make_axis(c.zone, window, cells, column.steps)
            self.axes[column.fields[0]] = axis
            column.head = " " * column.margin + c.say(axis.heading)
            column.cells = axis.cells + 2 * column.margin

    def column(self, field):
        """The column with a field."""
        return next(column for column in self.columns if field in column.fields)

    def has(self, field):
        """Whether the column with a field is on the page."""
        return self.column(field) in self.kept

    def spare(self):
        """Cells that no column takes."""
        return self.c.width + 1 - sum(column.cells + column.gap for column in self.kept)

    def line(self, cells):
        """One line of the table, of the spans of all its columns."""
        line = []
        for column, spans in zip(self.columns, cells):
            if column in self.kept:
                line.append(Span(" " * column.gap if line else ""))
                line += pad(spans, column.cells, column.right)
        return line

    def page(self, title, rows, of, notes, **facts):
        """Title, headings, rows, and a legend of the characters that are here. `of`: how many rows there are in all."""
        c = self.c
        for column in self.kept:
            column.cells = max(column.cells, min(column.most, column.cells + self.spare()))
        filled = [self.fill(row) for row in rows]
        room = c.room(2 + len(self.legend(filled, of, notes)))
        filled = filled[:room]
        lines = [c.title(title), self.line([Span(column.head, "dim")] for column in self.columns)]
        records = []
        for cells in filled:
            lines.append(self.line([each.spans for each in cells]))
            records.append([value for each in cells for value in each.values])
        lines += self.legend(filled, of, notes)
        fields = [field for column in self.columns for field in column.fields]
        iso = c.zone.iso
        facts = {"from": iso(self.window.a), "to": iso(self.window.b), **facts}
        axes = {field: list(map(iso, axis.edges[:-1])) for field, axis in self.axes.items()}
        return Page(c.view, facts, fields, records, lines, axes)

    def fill(self, row):
        """What a row has in each column."""
        return [column.fill(self, row) for column in self.columns]

    def legend(self, filled, of, notes):
        """How many rows are not here, and what the characters mean in columns that hold no names."""
        here = set()
        for cells in filled:
            for column, drawn in zip(self.columns, cells):
                if column in self.kept and not column.most:
                    here.update(drawn.text)
        if len(filled) < of:
            notes = [f" +{of - len(filled)} more (--all)", *notes]
        return self.c.legend(notes, here)


def name_column(c, field, rows, names, rank=0):
    """A column of names: an eighth of the page, or more where nothing else takes it."""

    def fill(t, row):
        name = names(row) or ""
        link = name if field == "site" else ""
        return cell(c.name(name or "[no site]"), name or None, link=link)

    most = max([4, *(width(fill(None, row).text) for row in rows)])
    cells = min(most, max(11, c.width // 8))
    return Column(field, field, cells, fill, rank, most=most)


def who(c, rows, rank=3):
    """Columns for rows with a `stay`: its site, the unit, and its hardware id where there is room."""
    return [
        name_column(c, "site", rows, lambda row: row.stay.site),
        name_column(c, "unit", rows, lambda row: row.stay.nickname, rank),
        Column("unit_id", "id", 12, id_cell, 9, most=12, least=100)
    ]


def id_cell(t, row):
    """The hardware id; all of them begin alike."""
    unit = row.stay.unit_id
    return cell(t.c.name(unit.removeprefix("co2unit-")), unit)


def number_column(head, cells, rank, none=""):
    """A column of whole numbers: what a row has by the name of its field."""
    field = head.lower()

    def fill(t, row):
        value = vars(row).get(field)
        return cell(none if value is None else str(value), value)

    return Column(field, head, cells, fill, rank, right=True)


def bars(c, values, scale, style="", marks=()):
    """Values as bars. A marked one has another colour; a marked column without a value is a ?."""
    chars = []
    for value, mark in zip_longest(values, marks):
        char = c.g.suspect if mark else " "
        if value is not None:
            char = c.g.ramp[scale.level(value, 8)]
        chars.append((char, "bad" if mark else style))
    return styled(chars)


# -- co2: a row per site ----------------------------------------------------------------------------------------------


class Quantity(NamedTuple):
    """What a reading holds: a chart of the fleet, a panel of a site."""

    name: str  # its column in the readings; its style
    label: str
    form: str  # of its numbers
    form_last: str  # of the newest, beside a plot
    form_tick: str  # beside a picture
    letter: str  # what stands before a mark of it
    narrow: float  # the least interquartile distance that a scale believes
    height: int  # of its panel as text, relative to the others
    flat: int  # px; height of its panel in a picture of many sites
    tall: int  # px; in a picture of one


CO2 = Quantity("co2", "CO₂ ppm", "%.0f", "%.0f", "%d", "", 50, 11, 48, 200)
TEMP = Quantity("temp", "temp °C", "%.1f", "%+.1f", "%d°", " T", 5, 9, 26, 130)
QUANTITIES = [CO2, TEMP]
NAMES = [quantity.name for quantity in QUANTITIES]


class Chart:
    """One quantity of a site, a unit or a stay in time."""

    below = 0  # values off the scale, suspect ones included
    above = 0
    last = None  # see importer.last_value
    stale = False  # the unit should have called twice since, or more than two newer readings have no usable value

    def __init__(self, quantity, axis, buckets, scale):
        self.quantity = quantity
        self.axis = axis
        self.buckets = buckets  # an importer.Bucket for each column; None: no readings
        self.scale = scale

    @cached_property
    def means(self):
        """Of the usable values of each column; None without any."""
        return [bucket and bucket.mean for bucket in self.buckets]

    @cached_property
    def marks(self):
        """What is to be said of each column, see `mark`."""
        return [mark(bucket, self.scale) for bucket in self.buckets]

    @cached_property
    def ends(self):
        """Least and greatest value, suspect ones included."""
        values = list(chain.from_iterable(map(extremes, self.buckets)))
        return min(values, default=None), max(values, default=None)

    @property
    def outside(self):
        """Mark, number and farthest of the values above the scale, and of those below, where there are any."""
        least, greatest = self.ends
        sides = ("up", self.above, greatest), ("down", self.below, least)
        return [side for side in sides if side[1]]


def extremes(bucket):
    """The least and the greatest value of those that are usable and of those that are suspect."""
    if bucket is None:
        return []
    ends = bucket.low, bucket.high, bucket.suspect_low, bucket.suspect_high
    return [end for end in ends if end is not None]


def mark(bucket, scale):
    """up or down where values are off the scale, else suspect where some are."""
    values = extremes(bucket)
    if values and max(values) > scale.high:
        return "up"
    if values and min(values) < scale.low:
        return "down"
    return "suspect" if bucket and bucket.suspects else ""


class Strand(NamedTuple):
    """One unit of a site: a ribbon, a line of a picture."""

    unit_id: str
    nickname: str
    stays: list[Deployment]
    buckets: dict[str, list]  # by quantity, in the columns of the charts; see Chart
    missing: Sequence[int] = ()  # readings, in the same columns


class SiteRow(NamedTuple):
    """A site with its stays, or a unit with all its readings, deployed or not."""

    name: str
    stays: list[Deployment]
    spans: list[tuple[str, int, int]]  # which unit stands for it, and when
    charts: dict[str, Chart]  # by quantity; `with_charts` fills it
    late: bool = False  # no readings for longer than is usual
    strands: Sequence[Strand] = ()  # only of a site in detail

    def within(self, window):
        """The spans, cut to a range."""
        return cut_spans(self.spans, window)

    def there(self, ts):
        """The units at a time."""
        return [stay.unit_id for stay in self.stays if stay.since <= ts < stay.until]


def cut_spans(spans, window):
    """What of the spans is in a range."""
    found = []
    for unit, since, until in spans:
        since = max(since, window.a)
        until = min(until, window.b)
        if since < until:
            found.append((unit, since, until))
    return found


def spans_of(stays):
    """When each unit stayed there."""
    return [(stay.unit_id, stay.since, stay.until) for stay in stays]


def is_deployed(stay):
    """True unless the status is lab_check or en_route; also for a unit without a stay."""
    return stay.status not in ("lab_check", "en_route")


def rank(stay):
    """Who stands for a site: who is deployed, else who is on the way, else who is in the lab."""
    return {"en_route": 1, "lab_check": 2}.get(stay.status, 0)


def spans_there(stays):
    """Which unit stands for a site, and when."""
    spans = []
    for _, group in groupby(sorted(stays, key=rank), rank):
        taken = sorted((since, until) for _, since, until in spans)
        for stay in group:
            begin = stay.since
            for since, until in [*taken, (stay.until, stay.until)]:
                if begin < min(since, stay.until):
                    spans.append((stay.unit_id, begin, min(since, stay.until)))
                begin = max(begin, until)
    return spans


def sites_of(stays, by_unit):
    """One row for each site, or for each unit."""
    groups = {}
    for stay in stays:
        key = stay.unit_id if by_unit else stay.site or stay.unit_id
        groups.setdefault(key, []).append(stay)
    rows = []
    for group in groups.values():
        unit, name, site = group[0][:3]
        spans = [(unit, 0, FOREVER)]
        if not by_unit:
            name = site or name
            spans = spans_there(group)
        rows.append(SiteRow(name, group, spans, {}))
    return rows


def with_charts(c, rows, axes):
    """The rows with a chart of each quantity that has an axis. What is read is kept, by step and quantities."""
    end = axes["co2"].window.b
    if not c.states:
        for state in importer.fleet_state(c.db, end, [stay for row in rows for stay in row.stays]):
            c.states[state.unit_id] = state
    asked = [quantity for quantity in QUANTITIES if quantity.name in axes]
    for axis, group in groupby(asked, lambda quantity: axes[quantity.name]):
        quantities = list(group)
        key = axis.step, *quantities
        if key not in c.charts:
            c.charts[key] = charts_of(c, quantities, rows, axis)
        for row, charts in zip(rows, c.charts[key]):
            row.charts.update(charts)
    charts = chain.from_iterable(row.charts.values() for row in rows)
    if not any(any(chart.buckets) for chart in charts):
        raise Nothing("No readings in this time.")
    late = {unit for unit, state in c.states.items() if state.alarms and state.data_late > 1}
    return [row._replace(late=not late.isdisjoint(row.there(end))) for row in rows]


def charts_of(c, quantities, rows, axis):
    """For each row its charts by quantity: on one scale for all, unless each has its own."""
    spans = [row.within(axis.window) for row in rows]
    found = importer.buckets(c.db, [quantity.name for quantity in quantities], spans, axis.edges)
    drawn = [{} for _ in rows]
    for quantity in quantities:
        columns = found[quantity.name]
        top = c.o.co2_max if quantity is CO2 else None
        size = quantity.narrow, top, c.fenced
        scale = make_scale(chain.from_iterable(columns), *size)
        for row, buckets, charts in zip(rows, columns, drawn):
            if c.o.own_scale:
                scale = make_scale(buckets, *size)
            charts[quantity.name] = measured(c, Chart(quantity, axis, buckets, scale), row)
    return drawn


def measured(c, chart, row):
    """The chart with its newest value, and with the number of values that are off its scale."""
    name = chart.quantity.name
    window = chart.axis.window
    spans = row.within(window)
    chart.last = importer.last_value(c.db, name, spans)
    rhythm = max([c.states[unit].ping_rhythm for unit, _, _ in spans], default=DAY)
    if chart.last:
        ts, _, passed = chart.last
        chart.stale = passed or window.b - ts > 2 * rhythm
    if {"up", "down"} & set(chart.marks):
        chart.below, chart.above = importer.count_outside(c.db, name, spans, *chart.scale)
    return chart


def co2_rows(c):
    """Rows for the sites or units with a stay in the page's window; the window; whether one is asked for by name."""
    by_unit = bool(c.o.unit and not c.o.site)
    rows = sites_of(c.stays, by_unit)
    alone = len(rows) == 1 and bool(c.o.unit or c.o.site)
    window = c.window([span for row in rows for span in row.spans], alone)
    stays = [stay for stay in c.stays if stay.since < window.b]  # others are yet to come
    rows = sites_of(stays, by_unit)
    if c.o.panels and not by_unit:
        rows = [row for stay in stays for row in sites_of([stay], False)]
    rows = [row for row in rows if row.within(window)]
    if not rows:
        raise Nothing("No readings in this time.")
    return rows, window, alone


def view_co2(c):
    """All sites; or one site or unit in detail; or, with --panels, every stay in detail."""
    rows, window, alone = co2_rows(c)
    if not c.o.panels and not alone:
        return fleet(c, rows, window)
    axes = dict.fromkeys(NAMES, make_axis(c.zone, window, c.width - 12, WITHOUT_HALF_DAYS))
    if c.o.panels:
        return panels(c, rows, axes)
    (row,) = with_charts(c, rows, axes)
    return detail(c, row, min(c.rows or c.o.height, c.o.height - 1))  # c.rows may be 200: a plot still fits one screen


def fleet(c, rows, window, range_cells=7, flag_cells=3):
    """A row per site: all on one time axis, and on one scale."""
    here = rows[: c.room(3)]
    columns = [
        name_column(c, "site", rows, lambda row: row.name),
        *fleet_columns(c, range_cells, flag_cells)
    ]
    t = Table(c, columns, window, len(here))
    drawn = with_charts(c, here, t.axes)
    reach = max(width(range_cell(t, row).text) for row in drawn)
    flags = max(width(flags_cell(t, row).text) for row in drawn)
    if reach > range_cells or flags > flag_cells:  # draw again with wider columns; what was read is kept in c.charts
        return fleet(c, rows, window, max(reach, range_cells), max(flags, flag_cells))
    t.column("late").cells = max(flags, 1)
    sites = any(row.name == row.stays[0].site for row in rows)
    axis = t.axes["co2"]
    title = [
        (0, count(len(rows), "site" if sites else "unit")),
        c.period(axis.window)
    ]
    facts = {}
    if c.o.own_scale:
        title.append((2, "own scales"))
    else:
        co2 = drawn[0].charts["co2"].scale
        temp = drawn[0].charts["temp"].scale
        facts = {"co2_scale": co2, "temp_scale": temp}
        title += (
            (2, f"CO₂ {co2.low:.0f}{c.g.to}{co2.high:.0f} ppm"),
            (3, signed(f"T %.0f{c.g.until}%.0f °C", temp))
        )
    notes = [
        f" col = {axis.step} (CO₂)",
        t.has("temp") and f" {t.axes['temp'].step} (T)",
        " blank = no data",
        "L late",
        f"{c.g.up}{c.g.down} off scale",
        f"{c.g.suspect} suspect"
    ]
    return t.page(title, drawn, len(rows), notes, **facts)


def fleet_columns(c, range_cells, flag_cells):
    """Charts and numbers of the two quantities."""
    return [
        Column("co2", "", 14, partial(chart_cell, CO2), steps=ALL_STEPS),
        Column("ppm ppm_age", "ppm", 4, partial(last_cell, CO2), 1, right=True),
        Column("min max", "range", range_cells, range_cell, 3, right=True, gap=2),
        Column("temp", "", 7, partial(chart_cell, TEMP), 4, gap=2, steps=WITHOUT_HALF_DAYS),
        Column("celsius celsius_age", c.g.degree, 5, partial(last_cell, TEMP), 2, right=True),
        Column("late above below temp_above temp_below", "!", flag_cells, flags_cell)
    ]


def chart_cell(quantity, t, row):
    """The means as bars."""
    chart = row.charts[quantity.name]
    return Cell([chart.means], bars(t.c, chart.means, chart.scale, quantity.name, chart.marks))


def last_cell(quantity, t, row):
    """The newest value of a chart, unless it is old, and its age."""
    chart = row.charts[quantity.name]
    return value_cell(quantity, chart.last, chart.stale, t.window.b)


def value_cell(quantity, last, stale, end, none=""):
    """The newest value and its age in s. A stale one is not shown."""
    if last is None:
        return cell(none, None, None)
    ts, value, _ = last
    text = compact(value) if value > 999 else quantity.form % value
    return cell(none if stale else text, value, end - ts)


def range_cell(t, row):
    """Least and greatest value of CO2."""
    low, high = row.charts["co2"].ends
    text = "" if low is None else compact(low) + "–" + compact(high)
    return cell(t.c.say(text), low, high)


def flags_cell(t, row):
    """L where data is late; where values are off the scale, how many."""
    text = "L" if row.late else ""
    values = [row.late]
    for chart in row.charts.values():
        values += chart.above, chart.below
        for mark, n, _ in chart.outside:
            text += chart.quantity.letter + getattr(t.c.g, mark)
            if n > 1:
                text += compact(n)
    return cell(text, *values, style="bad")


# -- co2: one site in detail ------------------------------------------------------------------------------------------
#
# Panels under each other on one time axis: one for each quantity, and a ribbon for each unit. In a column of a panel
# stand the range from the least to the greatest value, and the mean. In braille the means of neighbours are connected,
# but never across a blank column. The ribbon shows what the unit was doing and how much of its data is here: blank is
# nothing, thin is less than half.


def panels(c, rows, axes):
    """Every stay in detail, with one time axis, and one scale for all unless --own-scale."""
    height = 14 if c.rows is None else min(14, c.rows)
    here = rows[: c.rows and max(1, (c.rows - 1) // height)]
    hidden = len(rows) - len(here)
    lines = []
    records = []
    for row in with_charts(c, here, axes):
        page = detail(c, row, height - bool(hidden))
        lines += page.lines
        records += [[row.name, row.stays[0].nickname, *record] for record in page.records]
    if hidden:
        lines += c.wrapped([f"+{hidden} more (--all)"])
    facts = {}
    if not c.o.own_scale:
        facts = {name: page.facts[name] for name in ("co2_scale", "temp_scale")}
    return Page("co2", facts, ["site", "unit", *page.fields], records, lines)


def detail(c, row, lines):
    """A row with its charts, in so many lines."""
    axis = row.charts["co2"].axis
    row = row._replace(strands=strands_of(c, row, axis)[-3:])
    ribbons = [ribbon_text(c, strand, axis) for strand in row.strands]
    legend = detail_legend(c, row, ribbons)
    drawn = [detail_title(c, row)]
    room = max(lines - 2 - len(ribbons) - len(legend), 3)
    total = sum(quantity.height for quantity in QUANTITIES)
    # where lines are few, only CO2 has some
    heights = [room * quantity.height // total if room > 5 else 0 for quantity in QUANTITIES[1:]]
    for chart, height in zip(row.charts.values(), [room - sum(heights), *heights]):
        if height:
            drawn += panel_lines(c, row, chart, height)
    for strand, chars in zip(row.strands, ribbons):
        head = "stat"
        name = ""
        if len(ribbons) > 1:
            head = "unit"
            name = " " + cut(c.name(strand.nickname), c.width - 6 - len(chars))
        drawn.append([Span(head + c.plot.side + chars), Span(name, "dim")])
    drawn.append([Span("     " + c.say(axis.heading.replace("╷", c.plot.foot)))])
    facts = {
        "site": row.name,
        "units": [strand.nickname for strand in row.strands],
        "unit_ids": [strand.unit_id for strand in row.strands]
    }
    fields = ["from", "to"]
    records = [list(map(c.zone.iso, column)) for column in axis.columns()]
    for name, chart in row.charts.items():
        facts[name + "_scale"] = chart.scale
        fields += [f"{name}_{what}" for what in ("n", "mean", "min", "max", "suspect")]
        for record, bucket in zip(records, chart.buckets):
            record += bucket_values(bucket)
    return Page("co2", facts, fields, records, drawn + legend)


def bucket_values(bucket):
    """For programs: usable values, their mean, least and greatest, suspect values."""
    if bucket is None:
        return [0, None, None, None, 0]
    n = 0 if bucket.held else bucket.n
    return [n, bucket.mean, bucket.low, bucket.high, bucket.suspects]


def strands_of(c, row, axis):
    """The units of a row that are there in the time that is shown."""
    units = {}
    here = [stay for stay in row.stays if stay.until > axis.edges[0]]
    for stay in here or row.stays:
        units.setdefault(stay.unit_id, []).append(stay)
    strands = []
    for unit, stays in units.items():
        spans = row.spans if len(units) == 1 else spans_of(stays)
        spans = cut_spans(spans, axis.window)
        found = importer.buckets(c.db, NAMES, [spans], axis.edges)
        buckets = {name: columns for name, (columns,) in found.items()}
        missing = importer.missing(c.db, stays, spans, axis.edges, axis.window.b)
        strands.append(Strand(unit, stays[0].nickname, stays, buckets, missing))
    return strands


def ribbon_text(c, strand, axis):
    """What a unit was doing, where there are readings of it."""
    deployed, en_route, other = c.plot.status
    chars = ""
    columns = zip(strand.buckets["co2"], strand.missing, axis.columns())
    for bucket, missing, (begin, until) in columns:
        here = [
            stay.status
            for stay in strand.stays
            if stay.since < until and stay.until > begin
        ]
        if bucket is None:
            chars += " "
        elif bucket.rows < missing:
            chars += c.plot.part
        elif "deployed" in here:
            chars += deployed
        else:
            chars += en_route if "en_route" in here else other
    return chars


def detail_legend(c, row, ribbons):
    """What the characters of the page mean that are on it."""
    g = c.plot
    charts = row.charts.values()
    here = "".join(ribbons)
    for chart in charts:
        here += "".join(getattr(g, mark, "") for mark in chart.marks)
        if chart.last and not chart.stale:
            here += g.last
    notes = [
        f" col = {row.charts['co2'].axis.step}",
        f" {g.mean} mean",
        f" {g.range} min–max",
        f"{g.last} newest",
        any(chart.scale.low < 0 < chart.scale.high for chart in charts) and f" {g.zero} 0",
        f"{g.status[0]} deployed",
        f"{g.status[1]} en route",
        f"{g.status[2]} not deployed",
        f"{g.part} under half of the readings",
        f"{g.up}{g.down} off scale",
        f"{g.suspect} suspect"
    ]
    return c.legend(notes, here)


def detail_title(c, row):
    """Name, units, time, and how many of the readings that should be there are."""
    chart = row.charts["co2"]
    window = chart.axis.window
    here = sum(bucket.rows for bucket in filter(None, chart.buckets))
    spans = row.within(window)
    due = here + sum(importer.missing(c.db, row.stays, spans, chart.axis.edges, window.b))
    share = percent(here, due)
    names = [strand.nickname for strand in row.strands if strand.nickname != row.name]
    parts = [
        (0, cut(c.name(row.name), c.width // 2)),
        (2, c.name(", ".join(names))),
        (4, c.name(", ".join(strand.unit_id for strand in row.strands))),
        c.period(window),
        (3, f"{here:,}/{due:,} = {share}".replace(",", " "), share)
    ]
    return c.title(parts)


def panel_lines(c, row, chart, lines):
    """A heading with the numbers; marks, if there are any; the plot, labels left, newest value right."""
    g = c.plot
    quantity = chart.quantity
    window = chart.axis.window
    beyond = c.say(
        "  ".join(
            f"{getattr(g, mark)}{value:.0f} ×{n}"
            for mark, n, value in chart.outside
        )
    )
    aside = width(beyond) < c.width - 5 - chart.axis.cells
    heading = [(0, quantity.label), (0, "" if aside else beyond)]
    marked = any(chart.marks)
    scale, labels = make_rows(chart.scale, max(lines - 1 - marked, 1))
    tails = [""] * len(labels)
    if chart.last:
        ts, value, _ = chart.last
        newest = quantity.form_last % value
        if chart.stale:
            heading.append((1, f"last {newest}, {ago(window.b - ts)} ago"))
        else:
            tails[scale.level(value, len(labels))] = f" {g.last} {newest}"
    spans = row.within(window)
    numbers, every = importer.quantiles(c.db, quantity.name, spans, (0.05, 0.5, 0.95))
    if None not in numbers:
        p5, median, p95 = [quantity.form % number for number in numbers]
        heading += (2, "median " + median), (3, f"p5 {p5}  p95 {p95}")
        heading.append((1, every > 1 and f"of 1 day in {every}"))
    drawn = []
    for label, line, tail in zip(labels, plot(g, chart, scale, len(labels)), tails):
        side = f"{label:>4}{g.label if label else g.side}"
        drawn.insert(0, [Span(side), *line, Span(tail, quantity.name)])
    if marked:
        marks = [(getattr(g, mark, " "), "bad") for mark in chart.marks]
        after = Span(" " + beyond if aside else "", "bad")
        drawn.insert(0, [Span("    " + g.side), *styled(marks), after])
    return [c.title(heading, ""), *drawn]


# braille: dots of a cell from below, left and right
DOTS = (0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08)


class Places(NamedTuple):
    """What a column of a plot takes, counted in places from below: a cell has four in braille, else one."""

    left: set[int]  # the line of the means in the left half of the column
    right: set[int]
    reach: range  # from the least to the greatest value


def plot(g, chart, scale, rows):
    """The rows of a plot, from below."""
    high = 4 if g is BRAILLE else 1
    levels = rows * high
    means = [None if value is None else scale.level(value, levels) for value in chart.means]
    columns = []
    for bucket, left, right in zip(chart.buckets, *trace(means, g is BRAILLE)):
        reach = range(0)
        if bucket and bucket.n:
            reach = range(
                scale.level(bucket.low, levels),
                scale.level(bucket.high, levels) + 1
            )
        columns.append(Places(left, right, reach))
    zero = scale.level(0, rows) if scale.low < 0 < scale.high else -1
    lines = []
    for row in range(rows):
        at = range(row * high, row * high + high)
        blank = g.zero if row == zero else " "
        lines.append(
            styled(
                plot_char(g, column, at, chart.quantity.name, blank)
                for column in columns
            )
        )
    return lines


def trace(means, connect):
    """The places that the line of the means takes in the left and in the right half of each column. What lies between
    two neighbours belongs to the half that is nearer."""
    left = [set() if at is None else {at} for at in means]
    right = list(map(set, left))
    for j, (before, after) in enumerate(zip(means, means[1:])):
        if connect and None not in (before, after):
            for place in range(min(before, after), max(before, after) + 1):
                half = right[j] if abs(place - before) < abs(place - after) else left[j + 1]
                half.add(place)
    return left, right


def plot_char(g, column, at, style, blank):
    """The character of a column in the row of a plot that has these places, and its style."""
    on_line = (column.left | column.right).intersection(at)
    inside = set(at).intersection(column.reach)
    if not on_line:
        style = "dim"
    if not on_line and not inside:
        return blank, style
    if g is BRAILLE:
        return braille(column, at, inside), style
    return g.mean if on_line else g.range, style


def braille(column, at, inside):
    """The means, and of the range every other dot on the left."""
    left = column.left | (inside.intersection(at[1::2]) or inside)
    bits = 0
    for place, left_dot, right_dot in zip(at, *DOTS):
        if place in left:
            bits += left_dot
        if place in column.right:
            bits += right_dot
    return chr(0x2800 + bits)


# -- pings ------------------------------------------------------------------------------------------------------------


class PingRow(NamedTuple):
    """Stays of one site that do not overlap. Where they overlap, the site has several rows."""

    stays: list[Deployment]  # in order of time
    columns: Sequence = ()  # importer.Pings, or None
    late: int | None = None  # s since the last ping, when the unit that is there is late
    state: importer.UnitState = None  # of the last unit

    @property
    def stay(self):
        """The last of them."""
        return self.stays[-1]

    def within(self, window):
        """The stays, cut to a range."""
        return cut_spans(spans_of(self.stays), window)

    def sited(self):
        """Without those of units that never had a site."""
        return [stay for stay in self.stays if stay.site]


def lanes(stays):
    """The stays of each site, in as many rows as there are units at once."""
    sites = {stay.site or stay.unit_id: [] for stay in stays}
    for stay in sorted(stays, key=attrgetter("since")):
        rows = sites[stay.site or stay.unit_id]
        for row in rows:
            if row[-1].until <= stay.since:
                row.append(stay)
                break
        else:
            rows.append([stay])
    return list(chain.from_iterable(sites.values()))


def ping_rows(c, window):
    """Rows for the sites with a stay in a range; their pings are not read yet."""
    stays = [stay for stay in c.stays if stay.since < window.b]
    found = [row for row in map(PingRow, lanes(stays)) if row.within(window)]
    if not found:
        raise Nothing("No unit was there in this time.")
    return found


def view_pings(c):
    """A row per site: on how many days of each column the unit there has called; silence is not the same as absence."""
    window = c.window()
    found = ping_rows(c, window)
    name, unit, hardware = who(c, found, 2)
    unit.gap = 0
    t = Table(
        c,
        [
            name,
            Column(
                "pings", "", 14, ping_cell, gap=0, steps=FROM_DAYS, margin=1
            ),
            unit,
            hardware,
            Column("late_seconds", "late", 4, late_cell, 1, right=True)
        ],
        window,
        len(found[: c.room(3)])
    )
    axis = t.axes["pings"]
    window = axis.window
    found = ping_rows(c, window)
    units = {unit for row in found for unit, _, _ in row.within(window)}
    title = [
        (0, "pings"),
        (2, count(len(units), "unit")),
        c.period(window),
        (3, "1 col = " + axis.step),
        (4, "sort: tier, site")
    ]
    head, *levels = PING_LEVELS.get(axis.step, PING_LEVELS[""])
    notes = [
        " " + head,
        *map(" ".join, zip(c.g.days, levels)),
        f"{c.g.silent} deployed, silent",
        f"{c.g.open} deployment",
        f"{c.g.close} its end"
    ]
    return t.page(title, with_pings(c, found[: c.room(3)], axis), len(found), notes)


# column -> what is counted, which numbers the characters stand for
PING_LEVELS = {
    "1 d": ("", "", "", "", "pings"),
    "1 week": ("ping days/week:", "1-2", "3-4", "5-6", "7"),
    "": ("days with pings:", "<30 %", "<60 %", "<95 %", "95 %+")
}


def with_pings(c, rows, axis):
    """The rows with their pings by column, and with the silence of the units that are there."""
    end = axis.window.b
    states = importer.fleet_state(c.db, end, [row.stay for row in rows])
    states = {state.unit_id: state for state in states}
    spans = [row.within(axis.window) for row in rows]
    found = []
    for row, columns in zip(rows, importer.pings(c.db, spans, axis.edges)):
        state = states[row.stay.unit_id]
        late = None
        if state.alarms and state.pings_late > 1 and row.stay.until > end:
            late = end - state.last_ping
        found.append(PingRow(row.stays, columns, late, state))
    return found


def ping_cell(t, row):
    """Pings by column, silence while deployed, and in the cells outside the bounds of stays."""
    g = t.c.g
    axis = t.axes["pings"]
    end = t.window.b
    line = [(" ", "")] * (axis.cells + 2)
    for j, (begin, until) in enumerate(axis.columns()):
        pings = row.columns[j]
        column = Window(begin, min(until, end))
        if pings:
            share = pings.days / max(days_of(row.stays, column), pings.days)
            line[j + 1] = g.days[bisect_right((0.3, 0.6, 0.95), share)], ""
        elif days_of(filter(is_deployed, row.sited()), column) > 0.9:
            line[j + 1] = g.silent, "bad"
    for stay in row.sited():
        if axis.edges[0] <= stay.since < end:
            at = bisect_right(axis.edges, stay.since) - 1
            line[at if line[at][0] == " " else at + 1] = g.open, "dim"
        if axis.edges[0] < stay.until <= end:
            at = bisect_right(axis.edges, stay.until - 1) + 1
            if line[at][0] == " ":
                line[at] = g.close, "dim"
    return Cell([ping_numbers(row.columns)], styled(line))


def days_of(stays, window):
    """Days of stays in a range."""
    return sum(end - begin for _, begin, end in cut_spans(spans_of(stays), window)) / DAY


def late_cell(t, row):
    """For how many days the unit that is there has been silent, if it is late."""
    text = "" if row.late is None else f"{row.late // DAY}d"
    return cell(text, row.late, style="bad")


# -- status -----------------------------------------------------------------------------------------------------------


# verdict of the importer, how it is written in a row, its style, how it is written in the title
VERDICT_TABLE = """
late     LATE  bad   LATE
stuck    DATA  bad   call without DATA
update   UPD.  bad   UPDATE not taken
refused  LINE  bad   with refused LINES
sensor   SENS  bad   SENSOR
weak     weak  warn  weak
never    none  warn  never
ok       ok    good  ok
off      --    dim   not deployed
"""
VERDICTS = {verdict: texts for verdict, *texts in importer.rows_of(VERDICT_TABLE)}
SIGNAL = Scale(-115, -70)  # dBm, of small charts


def problem_lines(c, problem):
    """What is wrong, in as many lines as it takes."""
    style = "bad" if problem.level == importer.CRITICAL else "warn"
    return c.wrapped(c.name(problem.text).split(), " ", style)


def unit_problems(c, states):
    """What is wrong with units beside what the table says; at most three problems, unless --all."""
    units = {state.unit_id for state in states}
    found = [
        problem
        for problem in c.o.problems
        if problem.unit in units
        and problem.since <= c.now
        and not problem.key.startswith(("late:", "never:", "weak:"))
    ]
    lines = []
    for problem in found[: c.rows and 3]:
        lines += problem_lines(c, problem)
    return lines


def view_status(c):
    """How each unit does, worst first; pings and data are judged apart."""
    states = importer.fleet_state(c.db, c.now, c.stays, c.o.archive)
    below = unit_problems(c, states)
    c.rows = c.room(len(below))
    rows = [SimpleNamespace(stay=state, dbm=state.dbm) for state in states]
    window = Window(c.now - 13 * DAY, c.now + 1)
    days = make_axis(c.zone, window, 14, FROM_DAYS)
    t = Table(c, status_columns(c, rows), Window(days.edges[0], c.now))
    t.axes = {"pings": days, "rssi": make_axis(c.zone, window, 8, FROM_DAYS)}
    counts = Counter(state.verdict for state in states)
    none, one, more = c.g.pings
    notes = [
        " pings:",
        f"{one} one that day",
        f"{more} more",
        f"{none} none",
        t.has("rssi") and " rssi −115…−70 dBm"
    ]
    facts = {name: counts[name] for name in VERDICTS}
    here = rows[: c.room(3)]
    ask_pings(t, here)
    page = t.page(status_title(c, counts), here, len(rows), notes, **facts)
    return page._replace(lines=page.lines + below)


def status_columns(c, rows):
    """The columns of the page."""
    return [
        Column("state", "", 4, state_cell),
        *who(c, rows),
        Column("ping_age data_age", "last", 8, age_cell, 1, right=True),
        Column("pings", "pings 14 d", 14, days_cell, 2),
        Column("ppm ppm_age", "ppm", 4, partial(newest_cell, CO2), 4, right=True),
        Column("celsius celsius_age", c.g.degree, 5, partial(newest_cell, TEMP), 6, right=True),
        number_column("dBm", 4, 5, c.g.none),
        Column("rssi", "rssi 14d", 8, partial(signal_cell, "rssi"), 7)
    ]


def status_title(c, counts):
    """When, and how many units have which verdict; where there is no room, only what is wrong."""
    each = {
        name: f"{counts[name]} {long}"
        for name, (_, _, long) in VERDICTS.items()
        if counts[name]
    }
    said = "  ".join(each.values())
    wrong = "  ".join(text for name, text in each.items() if name not in ("ok", "off"))
    units = count(sum(counts.values()), "unit")
    return [
        (3, "fleet"),
        (0, f"{c.zone.local(c.now):%Y-%m-%d %H:%M} {c.zone.name}"),
        (1, f"{units}: {said}", said, wrong)
    ]


def ping_numbers(columns):
    """How many pings there are in each column."""
    return [pings.n if pings else 0 for pings in columns]


def state_cell(t, row):
    """The verdict."""
    verdict = row.stay.verdict
    short, style, _ = VERDICTS[verdict]
    return cell(f"{short:^4}", verdict, style=style)


def age_cell(t, row):
    """How long ago the last ping and the last reading were; shown is the one that the verdict is about."""
    state = row.stay
    ping, data = [ts and t.c.now - ts for ts in (state.last_ping, state.last_data)]
    age = data if "no data" in state.why or ping is None else ping
    return cell("never" if age is None else ago(age), ping, data)


def ask_pings(t, rows):
    """Read the pings of the rows' units for the charts of a table, at once."""
    for field, axis in t.axes.items():
        spans = [[(row.stay.unit_id, axis.edges[0], t.window.b + 1)] for row in rows]
        for row, columns in zip(rows, importer.pings(t.c.db, spans, axis.edges)):
            t.pings[field, row.stay.unit_id] = columns


def days_cell(t, row):
    """Whether it called on each day."""
    numbers = ping_numbers(t.pings["pings", row.stay.unit_id])
    return cell("".join(t.c.g.pings[min(n, 2)] for n in numbers), numbers)


def newest_cell(quantity, t, row):
    """The newest value of a unit, unless it is old, and its age."""
    c = t.c
    last = importer.last_value(c.db, quantity.name, [(row.stay.unit_id, 0, c.now + 1)])
    stale = last and (last[2] or c.now - last[0] > 2 * row.stay.ping_rhythm)
    return value_cell(quantity, last, stale, c.now, c.g.none)


def signal_cell(field, t, row):
    """The mean strength of the signal by column."""
    signal = [pings.dbm if pings else None for pings in t.pings[field, row.stay.unit_id]]
    return Cell([signal], bars(t.c, signal, SIGNAL))


# -- signal -----------------------------------------------------------------------------------------------------------


def signal_row(stay, levels):
    """A unit's strengths of signal: how many, least, quartiles and greatest, and the newest. A level is dBm, how many
    pings had it, and when the last of them was; the weakest is first."""
    values = [dbm for dbm, n, _ in levels for _ in range(n)]
    n = len(values)
    points = [values[at] for at in (0, n // 4, n // 2, n * 3 // 4, -1)]
    last, _, _ = max(levels, key=itemgetter(2))
    return SimpleNamespace(stay=stay, n=n, points=points, last=last)


def view_signal(c):
    """The distribution of each unit's signal strength on one axis of dBm, weakest first."""
    window = c.window()
    rows = []
    for unit, stay in importer.whereabouts(c.stays, c.now).items():
        levels = importer.signals(c.db, unit, window.a, window.b + 1)
        if levels:
            rows.append(signal_row(stay, levels))
    if not rows:
        raise Nothing("No pings with a signal strength in this time.")
    rows.sort(key=lambda row: row.points[2])
    t = Table(c, signal_columns(c, rows), window)
    t.axes["trend"] = make_axis(c.zone, window._replace(exact=False), 10, FROM_DAYS)
    step = lay_ruler(t, rows)
    title = [
        (0, "signal dBm"),
        c.period(window),
        (2, count(len(rows), "unit") + ", weakest first"),
        (3, f"1 col = {step} dB")
    ]
    notes = [
        f"{c.g.whisker} min–max",
        f"{c.g.box} p25–p75",
        f"{c.g.median} median",
        f"{c.g.dot} last",
        f"{c.g.limit} limits: <{importer.UNUSABLE} unusable, <{importer.WEAK} weak"
    ]
    here = rows[: c.room(3)]
    ask_pings(t, here)
    return t.page(title, here, len(rows), notes)


def signal_columns(c, rows):
    """The columns of the page; units that share a site are told apart."""
    shared = len({row.stay.site for row in rows}) < len(rows)
    return [
        *who(c, rows, 1 if shared else 4),
        Column(
            "min p25 median p75 max", "", 46 if c.width > 75 else 15, box_cell
        ),
        number_column("last", 4, 1),
        number_column("n", 4, 2),
        Column("trend", "trend", 10, partial(signal_cell, "trend"), 3)
    ]


def lay_ruler(t, rows):
    """Makes the ruler, an axis of dBm that has room for the signals of all rows; its step in dB."""
    box = t.column("median")
    low = min(-113, *(row.points[0] for row in rows))
    high = max(-68, *(row.points[-1] for row in rows))
    step = ceil((high - low + 1) / (box.cells + t.spare()))
    box.cells = (high - low) // step + 1
    t.ruler = Scale(low - 0.5, low - 0.5 + step * box.cells)
    ticks = [
        Tick((dbm - low) // step, str(dbm))
        for dbm in range(ceil(low / 10) * 10, high, 10)
    ]
    box.head = t.c.say(heading(spaced(ticks, box.cells), box.cells))
    return step


def box_cell(t, row):
    """Range, quartiles, median and newest value on the ruler, with the limits behind them."""
    g = t.c.g
    cells = t.column("median").cells
    line = [" "] * cells
    least, lower, median, upper, greatest = row.points
    for char, *ends in (
        (g.limit, importer.WEAK),
        (g.limit, importer.UNUSABLE),
        (g.whisker, least, greatest),
        (g.box, lower, upper),
        (g.median, median),
        (g.dot, row.last)
    ):
        levels = [t.ruler.level(dbm, cells) for dbm in ends]
        for at in range(levels[0], levels[-1] + 1):
            line[at] = char
    return cell("".join(line), *row.points)


# -- errors -----------------------------------------------------------------------------------------------------------


def view_errors(c):
    """Entries of the units' error logs by type, what is more than INFO by column; below, the newest."""
    stays = importer.whereabouts(c.stays, c.now)
    window = c.window()
    rows = [
        SimpleNamespace(stay=stay, columns=Counter(), serious=0, all=0) for stay in stays.values()
    ]
    columns = [
        *who(c, rows, 4),
        Column("serious", "", 14, digits_cell, steps=FROM_DAYS),
        *(number_column(kind, len(kind), 2) for kind in [*importer.ERROR_TYPES.values(), "other"]),
        number_column("all", 4, 1)
    ]
    t = Table(c, columns, window)
    axis = t.axes["serious"]
    t.window = window = axis.window
    count_errors(c, rows, window, axis)
    rows = [row for row in rows if row.all]
    if not rows:
        raise Nothing("No errors in this time.")
    rows.sort(key=attrgetter("serious", "all"), reverse=True)
    title = [
        (0, "errors"),
        c.period(window),
        (2, count(len(rows), "unit")),
        (2, f"{sum(row.all for row in rows)} entries"),
        (3, "1 col = " + axis.step)
    ]
    here = rows[: c.rows and max(1, (c.rows - 4) * 3 // 5)]
    room = 20 if c.rows is None else max(0, c.rows - len(here) - 4)
    newest = importer.newest_errors(c.db, list(stays), window.a, window.b + 1, room)
    names = "at unit level type message".split()
    facts = [dict(zip(names, (c.zone.iso(ts), *entry))) for ts, *entry in newest]
    lines = [[Span("newest, INFO last", "head")]] if newest else []
    lines += [entry_line(t, stays[entry[1]].site, entry) for entry in newest]
    notes = [" digits: WARN and EXC", "+ more than 9"]
    page = t.page(title, here, len(rows), notes, newest=facts)
    return page._replace(lines=page.lines + lines)


def count_errors(c, rows, window, axis):
    """Counts the entries of the rows' units: each type by its name, WARN and EXC also by column."""
    spans = [(row.stay.unit_id, window.a, window.b + 1) for row in rows]
    for i, j, kind, serious, n in importer.errors(c.db, spans, axis.edges):
        row = rows[i]
        vars(row)[kind] = vars(row).get(kind, 0) + n
        row.columns[j] += n * serious
        row.serious += n * serious
        row.all += n


def digits_cell(t, row):
    """Numbers of one digit; more are a +."""
    numbers = [row.columns[j] for j in range(t.axes["serious"].cells)]
    return cell("".join(str(n or " ") if n < 10 else "+" for n in numbers), numbers)


def entry_line(t, site, entry):
    """An entry of a log: when, where, how bad, what."""
    c = t.c
    ts, _, level, kind, message = entry
    cells = t.columns[0].cells
    return [
        Span(f"{c.zone.short(ts, c.now):12} "),
        *pad([Span(c.name(site or "[no site]"), "", site or "")], cells),
        Span(" "),
        *pad([Span(c.name(level), "bad" if level == "EXC" else "")], 5),
        Span(cut_middle(c.name(message or kind), c.width - 19 - cells))
    ]


# -- gaps -------------------------------------------------------------------------------------------------------------

# state, how it is written, its style
GAP_TABLE = """
waiting   not uploaded    warn
silent    calls, no data  bad
resend    being re-sent   warn
rejected  unreadable      warn
lost      lost            bad
off       not deployed    dim
"""
GAPS = {state: texts for state, *texts in importer.rows_of(GAP_TABLE)}


def view_gaps(c):
    """Stretches without readings, newest first, and what became of them."""
    window = c.window()
    rows = []
    gaps = importer.gaps(c.db, c.stays, window.a, window.b)
    gaps.sort(key=lambda gap: (gap.state != "off", gap.end or window.b, -gap.start), reverse=True)
    for gap in gaps:
        at = window.b if gap.end is None else gap.start
        stay = importer.whereabouts(c.stays, at)[gap.unit_id]
        rows.append(SimpleNamespace(stay=stay, gap=gap, missing=gap.missing))
    if not rows:
        raise Nothing("No gaps in this time.")
    columns = [
        *who(c, rows),
        Column("from", "from", 12, lambda t, row: time_cell(t, row.gap.start)),
        Column("to", "to", 12, lambda t, row: time_cell(t, row.gap.end), 1),
        number_column("missing", 7, 2),
        Column("state calls", "state", 14, gap_cell)
    ]
    t = Table(c, columns, window)
    title = [
        (0, "gaps"),
        c.period(window),
        (2, count(len(rows), "gap")),
        (3, "newest first")
    ]
    notes = [
        f" longer than {importer.HOLE} of the unit's rhythms",
        t.has("missing") and " missing: readings"
    ]
    return t.page(title, rows[: c.room(3)], len(rows), notes)


def time_cell(t, ts):
    """A time; none is now."""
    zone = t.c.zone
    if ts is None:
        return cell("now", None)
    return cell(zone.short(ts, t.window.b), zone.iso(ts))


def gap_cell(t, row):
    """What became of the readings."""
    return Cell([row.gap.state, row.gap.calls], [Span(*GAPS[row.gap.state])])


# what --help says of them is made from this table
VIEWS = {
    "co2": View(
        view_co2,
        "CO2 and temperature by site; one site in detail, a year of it",
        "co2_readings",
        14,
        365
    ),
    "pings": View(
        view_pings, "on which days each unit has called", "pings", 364
    ),
    "status": View(view_status, "how each unit does, worst first", "pings", 14),
    "signal": View(view_signal, "strength of the units' signals", "pings", 30),
    "errors": View(view_errors, "the units' error logs", "error_logs", 84),
    "gaps": View(
        view_gaps, "readings that are missing, and why", "co2_readings", 30
    )
}

# -- pictures: times, paths, panels -----------------------------------------------------------------------------------
#
# The same rows for browsers and papers, as inline SVG: strips under each other on one time axis. A strip has text on
# its left, the labels of its scales, a chart, and numbers on its right. In a browser x is a share of the width that
# there is, so that text keeps its size; curves lie in an inner <svg> that is stretched: in it x goes from 0 to
# STRETCHED, and y counts tenths of a pixel. Other heights are pixels. What things look like is said in STYLE alone.

STRETCHED = 2000
SIGNS = {"up": "▲", "down": "▼", "suspect": "?"}


class Frame(NamedTuple):
    """The time that the charts of a picture show."""

    edges: list[int]  # UTC seconds of the columns, one more than these
    ticks: list[Tick]
    groups: list  # columns with one hover text: first, end, when
    end: int  # UTC seconds; the last column may end later
    zone: Zone
    gaps: Sequence = ()  # importer.Gap, where they are shown

    @property
    def step(self):
        """Seconds of a column."""
        return self.edges[1] - self.edges[0]

    def share(self, ts):
        """Where a time lies: 0 at the left edge, 1 at the right one."""
        start = self.edges[0]
        share = (ts - start) / (self.edges[-1] - start)
        return min(max(share, 0), 1)

    def xs(self, times):
        """Where times within the chart lie, for points of curves."""
        start = self.edges[0]
        length = self.edges[-1] - start
        return [round(STRETCHED * (ts - start) / length) for ts in times]

    def runs(self, stay, values):
        """When values of columns are true while a stay lasts."""
        for first, end in stretches(values):
            start = max(self.edges[first], stay.since)
            until = min(self.edges[end], stay.until)
            if start < until:
                yield start, until

    def during(self, stay, values):
        """Values of columns while a stay lasts; None before."""
        first = max(bisect_right(self.edges, stay.since) - 1, 0)
        return [None] * first + values[first : bisect_right(self.edges, stay.until)]

    def rect(self, style, times, top, height):
        """A rectangle."""
        left, right = map(self.share, times)
        if left >= right:
            return ""
        x = f'x="{left:.2%}" width="{right - left:.2%}"'
        return f'<rect class="{style}" {x} y="{top:g}" height="{height:g}"/>'

    def word(self, style, times, y, text):
        """A word in the middle of a time, if it has room there; phones do not show long ones (class more)."""
        left, right = map(self.share, times)
        if right - left < 0.06:
            return ""
        if right - left < 0.02 * len(text):
            style += " more"
        return f'<text class="{style}" x="{(left + right) / 2:.2%}" y="{y:g}">{text}</text>'

    def hover(self, tell):
        """What each day, or longer, says under the mouse."""
        drawn = ""
        for first, end, when in self.groups:
            left = self.share(self.edges[first])
            right = self.share(self.edges[end])
            x = f'x="{left:.1%}" width="{right - left:.1%}"'
            drawn += f"<rect {x}><title>{when}: {tell(first, end)}</title></rect>"
        return f'<g class="hover">{drawn}</g>'

    def fitted(self, height, curves):
        """Lines on calendar steps, and curves, made as wide as the chart."""
        ticks = self.xs(tick.ts for tick in self.ticks)
        steps = "".join(f"M{x} 0l0 {10 * height}" for x in ticks)
        box = f'viewBox="0 0 {STRETCHED} {10 * height}" preserveAspectRatio="none"'
        return f'<svg {box} width="100%" height="{height}">{curve("grid", steps)}{curves}</svg>'


def curve(style, d):
    """A path, unless it has no points."""
    return f'<path class="{style}" d="{d}"/>' if d else ""


def path(points, end=""):
    """The shortest text of a line through points; a single one becomes a dash."""
    (x, y), *others = points
    text = f"M{x} {y}l"
    steps = []
    for next_x, next_y in others or [(x + 12, y)]:
        if next_y == y and steps and steps[-1][1] == 0:
            x -= steps.pop()[0]  # two level steps are one
        steps.append((next_x - x, next_y - y))
        x = next_x
        y = next_y
    drawn = " ".join(f"{dx} {dy}" for dx, dy in steps)
    return text + drawn.replace(" -", "-") + end


def area(xs, upper, lower):
    """What lies between two lines."""
    return path(zip(xs + xs[::-1], upper + lower[::-1]), "z")


def stretches(values):
    """Where values are true: begin and end of each run."""
    found = []
    end = 0
    for true, group in groupby(values, bool):
        start = end
        end += len(list(group))
        if true:
            found.append((start, end))
    return found


class Panel(NamedTuple):
    """One quantity in a strip."""

    frame: Frame
    chart: Chart
    top: int  # px
    height: int

    def ys(self, values):
        """The heights of values, for points of curves; what is off the scale lies on the edge."""
        low, high = self.chart.scale
        most = 10 * self.height
        bottom = 10 * self.top + most
        heights = [int((value - low) / (high - low) * most) for value in values]
        return [bottom - min(max(height, 0), most - 1) for height in heights]

    def ticks(self):
        """Round values: in little room the nearest to 0 and the farthest, else so far apart that labels are legible."""
        low, high = self.chart.scale
        few = self.height < 40
        least = 0.2 if few else max(12.5 / self.height, 0.14)
        step = int(nice(max((high - low) * least, 1)))
        values = range(ceil(low / step) * step, floor(high) + 1, step)
        if few:
            return sorted({min(values, key=abs), max(values, key=abs)})
        return values

    def labels(self):
        """The round values."""
        quantity = self.chart.quantity
        drawn = ""
        values = self.ticks()
        for value, y in zip(values, self.ys(values)):
            text = signed(quantity.form_tick, value)
            drawn += f'<text class="{quantity.name}-label" x="30" y="{y / 10 + 4:g}">{text}</text>'
        return drawn

    def rules(self, style, values):
        """A line at each of these values."""
        return curve(style, "".join(f"M0 {y}l{STRETCHED} 0" for y in self.ys(values)))

    def on_scale(self, bucket):
        """The bucket, unless its mean is off the scale: its line would be drawn at the edge, without a mark."""
        low, high = self.chart.scale
        return bucket if bucket and bucket.n and low <= bucket.mean <= high else None

    def pieces(self, buckets):
        """Pieces of a line: times and usable columns. One ends at a gap, at a column without readings, and where two
        columns have none that is usable."""
        column = self.frame.step
        gaps = {gap.start for gap in self.frame.gaps}
        found = []
        last = None  # time of the last reading before
        for begin, bucket in zip(self.frame.edges, buckets):
            if bucket is None:
                last = None
            if not bucket or not bucket.n:
                continue
            longest = column if last in gaps else 2 * column
            if last is None or bucket.first - last > longest:
                found.append([])
            last = FOREVER if bucket.held else bucket.last
            middle = max(begin, (bucket.first + bucket.last) / 2)
            found[-1].append((middle, bucket))
        return found

    def curves(self, buckets, kind):
        """One unit's range and mean, and what lies between the mean and 0."""
        name = self.chart.quantity.name
        filled = name == "temp" and kind != "second"
        ranged = kind != "second" and (name == "co2" or self.frame.step >= DAY)
        (zero,) = self.ys([0])
        band = f"{name}-band band-{kind}"
        line = f"{name} line-{kind}"
        drawn = {"above": "", "below": "", band: "", line: ""}
        for piece in self.pieces(buckets):
            middles, there = zip(*piece)
            xs = self.frame.xs(middles)
            means = self.ys(bucket.mean for bucket in there)
            drawn[line] += path(zip(xs, means))
            if ranged:
                highs = self.ys(bucket.high for bucket in there)
                lows = self.ys(bucket.low for bucket in there)
                drawn[band] += area(xs, highs, lows)
            for side, nearer in (("above", min), ("below", max)):
                edge = [nearer(y, zero) for y in means]
                if filled and set(edge) != {zero}:
                    drawn[side] += area(xs, edge, [zero] * len(xs))
        return "".join(starmap(curve, drawn.items()))

    def marks(self):
        """Signs above where values are suspect or off the scale: one for columns side by side."""
        drawn = ""
        for mark, sign in SIGNS.items():
            for first, end in stretches(each == mark for each in self.chart.marks):
                edges = self.frame.edges
                x = self.frame.share((edges[first] + edges[end]) / 2)
                drawn += f'<text class="mark" x="{x:.2%}" y="{self.top - 1}">{sign}</text>'
        return drawn


class Strip(NamedTuple):
    """A row of a picture."""

    left: list  # of (style, text)
    right: list  # likewise
    height: int  # px
    chart: str  # SVG
    labels: str = ""  # SVG: of the scales
    site: str = ""  # to its page leads a link
    late: bool = False


# -- pictures: readings -----------------------------------------------------------------------------------------------

MARK_ROOM = 9  # px over a panel, for marks


def standing(row, stay):
    """The parts of a stay in which its unit stands for the site."""
    own = row.within(Window(stay.since, stay.until))
    return [stay._replace(since=since, until=until) for unit, since, until in own if unit == stay.unit_id]


def stay_bars(frame, strand, top):
    """When a unit was there (a line), and when it measured (a bar)."""
    drawn = ""
    for stay in strand.stays:
        drawn += frame.rect("stay", (stay.since, stay.until), top + 2, 1)
        for times in frame.runs(stay, strand.buckets["co2"]):
            drawn += frame.rect(f"is-{stay.status}", times, top, 5)
    return drawn


def spread(quantity, buckets):
    """Least, greatest and mean usable value, and how many are suspect: name -> text, as far as there are any."""
    read = [bucket for bucket in buckets if bucket and not bucket.held]
    there = [bucket for bucket in read if bucket.n]
    said = {}
    if there:
        low = min(bucket.low for bucket in there)
        high = max(bucket.high for bucket in there)
        mean = sum(bucket.total for bucket in there) / sum(bucket.n for bucket in there)
        said["range"] = signed("{0}…{0}".format(quantity.form), (low, high))
        said["mean"] = "mean " + signed(quantity.form, mean)
    suspects = sum(bucket.suspects for bucket in read)
    if suspects:
        said["suspect"] = f"{suspects} suspect"
    return said


def in_words(row, first, end):
    """`spread` of each quantity; they are named if there are several."""
    said = []
    for chart in row.charts.values():
        label = chart.quantity.label
        text = ", ".join(spread(chart.quantity, chart.buckets[first:end]).values())
        if text and len(row.charts) > 1:
            text = f"{label} {text}"
        said.append(text or "no " + label)
    return "; ".join(said)


def side_lines(row, end):
    """Last values, range, how many are off the scale, lateness."""
    values = []
    lines = []
    old = ""
    for chart in row.charts.values():
        name = chart.quantity.name
        label, unit = chart.quantity.label.split()
        if chart.last and not chart.stale:
            values.append((name, f"{signed(chart.quantity.form, chart.last[1])} {unit}"))
        else:
            since = f" for {ago(end - chart.last[0])}" if chart.last else ""
            old = old or f"no {label}{since}"
        values_range = spread(chart.quantity, chart.buckets).get("range")
        if values_range and (name == "co2" or len(row.charts) == 1):
            lines.append(("more", f"{values_range} {unit}"))
        for mark, n, farthest in chart.outside:
            value = signed(chart.quantity.form, farthest)
            if abs(farthest) > 999:
                value = f"{farthest:,.0f}".replace(",", " ")
            lines += ("off", f"{SIGNS[mark]} {n}"), ("off more", f"to {value} {unit}")
    if row.late or old and row.there(end):
        lines.append(("bad" if row.late else "warn", old or "late"))
    return values + lines


def name_lines(frame, stay):
    """A site, its unit, and since when if it came in the time that is shown; or a unit that never had a site."""
    if not stay.site:
        return [("head", stay.nickname), ("", "never deployed")]
    lines = [("head", stay.site), ("", stay.nickname)]
    if stay.since > frame.edges[0]:
        lines.append(("more", f"since {frame.zone.local(stay.since):%-d %b %Y}"))
    return lines


def unit_curves(panel, row):
    """Lines of each unit, in the style of the stay's status. On a page of one unit: of all its readings."""
    drawn = {}  # once, where several stay there
    for strand in row.strands:
        own = strand.buckets[panel.chart.quantity.name]
        stays = strand.stays
        if row.spans == [(strand.unit_id, 0, FOREVER)]:
            stays = [Deployment(strand.unit_id, strand.nickname)]
        for stay in stays:
            parts = standing(row, stay)
            if parts != [stay]:
                drawn[panel.curves(map(panel.on_scale, panel.frame.during(stay, own)), "second")] = 1
            for part in parts:
                drawn[panel.curves(panel.frame.during(part, own), stay.status or "deployed")] = 1
    return "".join(drawn)


def chart_strip(frame, row, size):
    """Quantities of a site under each other, flat or tall; where readings are missing, and why."""
    top = MARK_ROOM
    back = curves = front = labels = ""
    for name, chart in row.charts.items():
        panel = Panel(frame, chart, top, getattr(chart.quantity, size))
        top += panel.height + MARK_ROOM
        labels += panel.labels()
        front += panel.marks()
        curves += panel.rules("grid", panel.ticks())
        if name == "temp" and chart.scale.low <= 0 <= chart.scale.high:
            curves += panel.rules("zero", [0])
        curves += unit_curves(panel, row)
    height = top - MARK_ROOM + 3
    for unit, since, until in row.spans:
        for gap in frame.gaps:
            times = max(gap.start, since), min(gap.end or frame.end, until)
            if gap.unit_id == unit and times[1] - times[0] > frame.step:
                back += frame.rect("gap", times, 0, height)
                front += frame.word("word", times, MARK_ROOM + panel.height / 2, GAPS[gap.state][0])
    front += frame.hover(lambda first, last: in_words(row, first, last))
    drawn = back + frame.fitted(height, curves) + front
    return Strip([], side_lines(row, frame.end), height, drawn, labels)


def fleet_strip(frame, row):
    """All quantities of a site in little room."""
    buckets = {name: chart.buckets for name, chart in row.charts.items()}
    stays = [part for stay in row.stays for part in standing(row, stay)]
    here = (stays or row.stays)[-1]
    strand = Strand(here.unit_id, "", stays, buckets)
    strip = chart_strip(frame, row._replace(strands=[strand]), "flat")
    return strip._replace(
        left=name_lines(frame, here),
        height=strip.height + 7,
        chart=strip.chart + stay_bars(frame, strand, strip.height + 1),
        site=here.site or "",
        late=row.late
    )


def site_strips(frame, row):
    """One site in detail: a strip for each quantity, and one for each unit."""
    strips = []
    for name, chart in row.charts.items():
        strip = chart_strip(frame, row._replace(charts={name: chart}), "tall")
        strips.append(strip._replace(left=[("head", chart.quantity.label)]))
    for strand in row.strands:
        drawn = stay_bars(frame, strand, 5)
        for stay in strand.stays:
            status = (stay.status or "no site").replace("_", " ")
            drawn += frame.word("status", (stay.since, stay.until), 21, status)
        right = [("more", text) for text in spread(CO2, strand.buckets["co2"]).values()]
        strips.append(Strip([("head", strand.nickname), ("", strand.unit_id)], right, 24, drawn))
    return strips


# -- pictures: pings --------------------------------------------------------------------------------------------------

SILENT_DAYS = 3  # shorter silence of a deployed unit is not coloured


def lane(frame, row, top, height):
    """Days with pings as bars, stays as lines with ends, silence where a unit is deployed."""
    back = front = ""
    for stay in row.stays:
        for times in frame.runs(stay, row.columns):
            front += frame.rect(f"ping-{stay.status}", times, top, height)
        if not stay.site:
            continue
        times = stay.since, stay.until
        back += frame.rect("stay", times, top + height / 2, 1)
        for times in frame.runs(stay, [not pings for pings in row.columns]):
            days = round((times[1] - times[0]) / DAY)
            if days >= SILENT_DAYS and is_deployed(stay):
                back += frame.rect("silence", times, top, height)
                front += frame.word("silent", times, top + height - 3, f"{days} d")
        for ts in (stay.since, stay.until):
            if frame.edges[0] <= ts < frame.edges[-1]:
                x = frame.share(ts)
                front += f'<rect class="end" x="{x:.2%}" width="2" y="{top - 2}" height="{height + 4}"/>'
    return back + front


def days_called(frame, row, days):
    """On how many whole days in the field a site's units have called, of how many."""
    edges = frame.edges
    whole = set()  # columns
    for stay in filter(is_deployed, row.sited()):
        until = min(stay.until, frame.end)
        whole.update(range(bisect_left(edges, stay.since), bisect_right(edges, until) - 1))
    called = sum(days[column] for column in whole)
    due = sum(round((edges[column + 1] - edges[column]) / DAY) for column in whole)
    return called, due


def ping_strip(frame, rows):
    """A site; units that are there at the same time have lanes of their own, less high."""
    row, *others = sorted(rows, key=lambda row: (is_deployed(row.stay), row.stay.until), reverse=True)
    drawn = lane(frame, row, 5, 14)
    height = 24
    for other in others:
        drawn += lane(frame, other, height, 5)
        height += 9
    days = [pings.days if pings else 0 for pings in row.columns]
    called, due = days_called(frame, row, days)
    state = row.state
    age = "never"
    if row.stay.until <= frame.end:
        age = f"until {frame.zone.short(row.stay.until, frame.end)}"
    elif state.last_ping is not None:
        age = ago(frame.end - state.last_ping) + " ago"
    share = "" if is_deployed(row.stay) else "not deployed"
    if due:
        share = f"{called}/{due} = {percent(called, due)}"
    right = [("bad" if row.late else "head", age)]
    if state.dbm and row.stay.until > frame.end:
        right.append(("dbm", signed("%d dBm", state.dbm)))
    right += [
        ("more", share),
        ("more", state.unit_id.removeprefix("co2unit-"))
    ]
    drawn = frame.fitted(height, "") + drawn
    drawn += frame.hover(lambda first, end: count(sum(days[first:end]), "day") + " with pings")
    return Strip(name_lines(frame, row.stay), right, height, drawn, "", row.stay.site or "", row.late)


# -- pictures: of views -----------------------------------------------------------------------------------------------

FLEET_COLUMNS = 120  # at most; 14 days make columns of 3 h
SITE_COLUMNS = 370  # a year: days
MOST_COLUMNS = 6000  # of all sites together


class Picture(NamedTuple):
    """A view as it is shown in a browser and in a file."""

    about: str  # columns, scales
    frame: Frame
    strips: list[Strip]
    numbers: list  # the same in words, of (a time or a site, text)
    window: Window


def grouped(c, axis, most):
    """Columns by day, or by a longer time, in so many groups at the most: first, end, when."""
    edges = axis.edges
    groups = []
    whole = Window(edges[0], edges[-1])
    form = "%-d %b %Y" if whole.b - whole.a > 366 * DAY else "%-d %b"
    for start, until in make_axis(c.zone, whole, most, FROM_DAYS).columns():
        first = bisect_left(edges, start)
        end = min(bisect_left(edges, until), axis.cells)
        if first == end:  # a column of the chart is longer
            continue
        begin = c.zone.local(edges[first])
        last = c.zone.local(min(edges[end] - 1, c.now))
        when = f"{last:{form}}"
        if begin.date() != last.date():
            when = f"{begin:{form}}–{when}"
        groups.append((first, end, when))
    return groups


def make_frame(c, axis):
    """An axis with labels on a chart that is at least 60 letters wide, and with hover texts."""
    edges = axis.edges
    letter = (edges[-1] - edges[0]) // 60
    letters = range(edges[0], edges[-1] + 1, letter)
    ticks = []
    for tick in make_ticks(c.zone, letters):
        local = c.zone.local(tick.ts)
        if not ticks and tick.label == str(local.day):
            tick = tick._replace(label=f"{local:%-d %b}")
        ticks.append(tick)
    return Frame(edges, ticks, grouped(c, axis, 54), axis.window.b, c.zone)


def first_of(shown, sites):
    """How many of the sites a picture shows, and how to see the others."""
    more = len(sites) - len(shown)
    return count(len(shown), "site") + (f", +{more} more (all=1, --all)" if more else "")


def picture_co2(c):
    """Sites, or one of them in detail."""
    everyone, window, alone = co2_rows(c)
    rows = everyone[: c.room(0)]
    most = max(MOST_COLUMNS // len(rows), 30)
    cells = SITE_COLUMNS if alone else min(FLEET_COLUMNS, most)
    axis = make_axis(c.zone, window, cells, WITHOUT_HALF_DAYS)
    rows = with_charts(c, rows, dict.fromkeys(NAMES, axis))
    gaps = importer.gaps(c.db, c.stays, *axis.window[:2])
    frame = make_frame(c, axis)._replace(gaps=gaps)
    about = "mean and range of " + axis.step
    if alone:
        row = rows[0]._replace(strands=strands_of(c, rows[0], axis))
        strips = site_strips(frame, row)
        numbers = [
            (when, in_words(row, first, end))
            for first, end, when in grouped(c, axis, 20)
        ]
    else:
        about = f"{first_of(rows, everyone)} · {about}"
        strips = [fleet_strip(frame, row) for row in rows]
        numbers = [(row.name, in_words(row, 0, axis.cells)) for row in rows]
    for chart in rows[0].charts.values():
        if not c.o.own_scale:
            about += f" · {chart.quantity.label}" + signed(" %g…%g", chart.scale)
    return Picture(about, frame, strips, numbers, axis.window)


def picture_pings(c):
    """A strip for each site."""
    window = c.window()
    axis = make_axis(c.zone, window, SITE_COLUMNS, FROM_DAYS)
    frame = make_frame(c, axis)
    found = ping_rows(c, axis.window)
    rows = with_pings(c, found[: c.room(0)], axis)
    sites = {row.stay.site or row.stay.unit_id for row in found}
    strips = []
    numbers = []
    for _, group in groupby(rows, lambda row: row.stay.site or row.stay.unit_id):
        strip = ping_strip(frame, list(group))
        strips.append(strip)
        numbers.append((strip.left[0][1], ", ".join(text for _, text in strip.right)))
    return Picture(f"{first_of(strips, sites)} · 1 cell = {axis.step}", frame, strips, numbers, axis.window)


PICTURES = {"co2": picture_co2, "pings": picture_pings}


# -- the same page as text, TSV, JSON, HTML ---------------------------------------------------------------------------


def to_text(lines, write=attrgetter("text")):
    """Lines of spans as text; `write` makes text of a span: plain, `painted`, or for HTML."""
    return "".join("".join(map(write, line)).rstrip() + "\n" for line in lines)


def painted(span):
    """Its text in the colour of its style."""
    if not span.style or not span.text.strip():
        return span.text
    return f"\x1b[{STYLES[span.style]}m{span.text}\x1b[0m"


def rounded(value):
    """For programs: round to one decimal, more means nothing."""
    if isinstance(value, list):
        return list(map(rounded, value))
    return round(value, 1) if isinstance(value, float) else value


def to_tsv(page, ascii=False):
    """Tab-separated values under a line with their names; a chart has one field a column, name@begin."""
    names = []
    for field in page.fields:
        begins = page.axes.get(field)
        names += [f"{field}@{begin}" for begin in begins] if begins else [field]
    lines = [names] if names else []
    for record in page.records:
        values = []
        for value in rounded(record):
            values += value if isinstance(value, list) else [value]
        lines.append([tsv_text(value, ascii) for value in values])
    return "".join("\t".join(line) + "\n" for line in lines)


def tsv_text(value, ascii):
    """A value in a field."""
    if value is None:
        return ""
    return clean(int(value) if isinstance(value, bool) else value, ascii)


def to_json(page):
    """One object: the page's facts, where the columns of its charts begin, and its rows as objects."""
    rows = [dict(zip(page.fields, rounded(record))) for record in page.records]
    said = {"view": page.view, **page.facts, "columns": page.axes, "rows": rows}
    if page.empty:
        said["message"] = page.empty
    return json.dumps(said, indent=1) + "\n"


def escaped(text):
    """Text for HTML and SVG."""
    import html

    return html.escape(text)


def html_span(span, query):
    """A span as an element, if it has a style or leads to a site."""
    text = re.sub("[^ -~]+", boxed, escaped(span.text))
    if span.link:
        text = f'<a href="{site_link(span.link, query)}">{text}</a>'
    return f'<span class="{span.style}">{text}</span>' if span.style else text


def boxed(run):
    """A match of what a browser may take from another font, boxed to the width that it has on a terminal."""
    return f'<b class="g" style="width:{width(run[0])}ch">{run[0]}</b>'


# what things look like: of pictures in a page and in a file
STYLE = """
text { font-family: Arial, "DejaVu Sans", sans-serif; font-size: 11px; fill: var(--dim) }
path { vector-effect: non-scaling-stroke; stroke-linejoin: round }
.co2, .temp, .grid, .zero { fill: none }
.co2 { stroke: var(--co2); stroke-width: 1.5 }
.temp { stroke: var(--temp); stroke-width: 1.25 }
.line-en_route { stroke-dasharray: 5 3; stroke-width: 1.2 }
.line-lab_check, .line-second, .zero { stroke-dasharray: 1.5 2.5 }
.line-second { opacity: .55 }
.co2-band { fill: var(--co2) }
.temp-band { fill: var(--temp); fill-opacity: .7 }
.band-deployed { opacity: .22 }
.band-en_route { opacity: .13 }
.band-lab_check { opacity: .08 }
.above, .below { opacity: .3 }
.above { fill: var(--above) }
.below { fill: var(--below) }
.grid { stroke: var(--grid) }
.zero { stroke: var(--dim) }
.gap { fill: var(--gap) }
.word, .status, .mark, .silent { text-anchor: middle }
.mark, .silent { fill: var(--bad) }
.co2-label, .temp-label { text-anchor: end }
.temp-label, .temp-word { fill: var(--temp) }
.stay { fill: var(--dim) }
.is-deployed { fill: var(--dim) }
.is-en_route { fill: var(--way) }
.is-lab_check, .is-None { fill: var(--idle) }
.ping-deployed { fill: var(--co2) }
.ping-en_route { fill: var(--route) }
.ping-lab_check, .ping-None { fill: var(--lab) }
.end { fill: var(--ink) }
.head-word, .co2-word, .temp-word { font-weight: bold }
.head-word { fill: var(--ink) }
.co2-word { fill: var(--co2) }
.bad-word, .off, .off-word { fill: var(--bad) }
.warn-word { fill: var(--warn) }
.silence { fill: var(--silence) }
.word, .silent { paint-order: stroke; stroke: var(--gap); stroke-width: 4px }
.silent { stroke: var(--silence) }
"""
LIGHT = """--ink: #1b1f23; --paper: #ffffff; --dim: #5c656e; --grid: #e6e9ec; --gap: #f2f3f5; --co2: #005b9a;
  --route: #6699c2; --way: #9ba1a7; --idle: #ccd0d4;
  --lab: #a9c7de; --temp: #7a3e9d; --below: #2a9db0; --above: #d9622b; --bad: #b31d28; --silence: #f7dfe1;
  --warn: #8a5a00;
  --good: #176f2c"""
DARK = """--ink: #d6dbe0; --paper: #14171a; --dim: #8b949e; --grid: #262c32; --gap: #1d2227; --co2: #6cb6ff;
  --route: #44719e; --way: #596069; --idle: #343a41;
  --lab: #2b4763; --temp: #d2a8ff; --below: #4cc3d6; --above: #ff9a5c; --bad: #ff7b72; --silence: #43242a;
  --warn: #e3b341;
  --good: #56d364"""
HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>%(title)s</title>
<style>
:root { %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
body { color: var(--ink); background: var(--paper); font: 15px/1.4 system-ui, "DejaVu Sans", sans-serif;
  max-width: 1180px;
  margin: 1rem auto; padding: 0 10px }
h1 { font-size: 20px; margin: .5rem 0 } h2 { font-size: 16px; margin: 1.2rem 0 .3rem } a { color: inherit }
nav a, .links > * { margin-right: 1em; white-space: nowrap } .links, .about, .bad { margin: .3rem 0 }
pre { font: 13px/1.25 "DejaVu Sans Mono", Menlo, Consolas, "Liberation Mono", monospace; overflow-x: auto; margin: 0 }
.g { display: inline-block; font-weight: inherit; overflow: hidden; vertical-align: bottom; height: 1.25em }
.head { font-weight: bold } .dim, .about, details { color: var(--dim); font-size: 13px }
.bad { color: var(--bad); font-weight: bold } .warn { color: var(--warn) } .good { color: var(--good) }
pre .co2 { color: var(--co2) } pre .temp { color: var(--temp) } pre a { text-decoration: none; font-weight: bold }
.narrow { display: none }
.strip { display: grid; grid-template: "n y c v" / 118px 34px 1fr 140px; border-top: 1px solid var(--grid);
  padding: 3px 0;
  font-size: 12px; line-height: 1.3; color: var(--dim) }
.strip p { margin: 0 0 2px } .strip a { text-decoration: none }
.strip .head { color: var(--ink); font-size: 14px }
.name { grid-area: n; overflow-wrap: anywhere } .scale { grid-area: y } .chart { grid-area: c }
.numbers { grid-area: v; text-align: right } .numbers p { white-space: nowrap }
.numbers p { display: inline-block; margin-left: 7px } .strip .more { display: block; white-space: normal }
.numbers .co2, .numbers .temp, .numbers .head, .numbers .bad { font-size: 13px; font-weight: bold }
.numbers .co2 { color: var(--co2) } .numbers .temp { color: var(--temp) }
.strip .off { color: var(--bad); display: inline-block } .numbers .bad { white-space: normal }
.axis { position: sticky; top: 0; background: var(--paper); z-index: 1; border: 0 }
svg { overflow: visible; vertical-align: top } .chart svg { overflow: hidden }
.hover rect { fill: transparent; height: 100%% } .hover rect:hover { fill: var(--ink); opacity: .08 }
.about span { display: inline-block; margin-right: 1em } .about svg { vertical-align: middle }
th, td { text-align: left; font-weight: normal; padding-right: 1em; vertical-align: top }
@media (max-width: 52rem) { .wide { display: none } .narrow { display: block } }
@media (max-width: 640px) { .more, .strip .more { display: none } .strip p { display: inline-block; margin-right: 4px }
  .strip { grid-template: "n n v" "y c c" / 34px minmax(30%%, 1fr) auto } }
%(style)s</style>
</head>
<body>
<nav>%(nav)s</nav>
<h1>%(title)s</h1>
%(body)s%(data)s</body>
</html>
"""
DATA_LINKS = """<p class="links">All data as CSV:
<a href=/data/co2/readings.csv>readings</a> <a href=/data/co2/pings.csv>pings</a>
<a href=/data/co2/errors.csv>errors</a> <a href=/data/co2/gaps.csv>gaps</a>
<a href=/data/co2/deployments.csv>deployments</a> <a href=/data/co2/units.csv>units</a>
<span>(.jsonl: JSON)</span></p>
"""
# a style, its height in a legend in px, what it means; a legend has what is drawn
LEGEND = f"""
co2 line-deployed   10  CO₂ mean and range
co2 line-en_route   10  en route
co2 line-lab_check  10  in the lab
co2 line-second     10  another unit
temp line-deployed  10  temperature
above               10  above 0 °C
below               10  below 0 °C
mark                10  suspect or off the scale
gap                 10  no data
is-deployed         5   deployed
is-en_route         5   en route
is-lab_check        5   in the lab
is-None             5   without a site
ping-deployed       10  with pings
ping-en_route       10  en route
ping-lab_check      10  in the lab
ping-None           10  without a site
stay                1   deployed, nothing came
end                 10  begin or end of a stay
silence             10  silent for {SILENT_DAYS} days or more
"""


class WebPage(NamedTuple):
    """A page for browsers."""

    title: str
    url: str  # of the daemon
    file: str  # in a directory of pages


WEB_TABLE = """
index  Units                        /                      index.html
alive  Pings, signal, gaps, errors  /status/alive/summary  status.html
co2    CO₂                          /data/co2/summary      co2.html
"""
WEB = {name: WebPage(*fields) for name, *fields in importer.rows_of(WEB_TABLE)}
# page, heading, view, the days that it shows
SECTIONS = """
index  How the units do  status  asked
alive  Pings             pings   asked
alive  Units             status  asked
alive  Signal            signal  asked
alive  Gaps              gaps    asked
alive  Errors            errors  asked
co2    Recent CO₂        co2     asked
co2    All CO₂           co2     all
"""
WIDTHS = {"wide": 100, "narrow": 46}  # cells; one is 8 px wide at 13 px


TIMES = {"recent-days", "xmin", "xmax"}  # options of a page that say its time


def url(path, asked):
    """A path with arguments, for HTML."""
    return escaped(f"{path}?{urlencode(asked, quote_via=quote, safe=':')}")


def site_link(name, query):
    """Where a site has its page: at the daemon, for the same time, or in a directory of pages."""
    if query is None:
        name = quote(name, "", errors="replace")
        return f"site-{name.replace('%', '=')}.html"
    kept = {key: query[key] for key in query if key in TIMES | {"tz"}}
    return url(WEB["co2"].url, {**kept, "site": name})


def draw(view, o):
    """One page. UnknownName: nothing has the name that is asked for; Unusable: the database cannot be read."""
    above = []
    try:
        with importer.open_db(o.db) as connection:
            c = Context(connection, view, o)
            for problem in o.problems:
                if not problem.unit:  # of the station
                    above += problem_lines(c, problem)
            c.rows = c.room(len(above))
            if not c.stays:
                known = importer.deployments(connection)
                raise Nothing("No unit of that name at that site, or of that tier." if known else "No units yet.")
            page = VIEWS[view].draw(c)
    except Nothing as error:
        page = nothing(view, str(error))
    except importer.NoDatabase as error:
        page = nothing(view, clean(f"No data yet: {error}", o.glyphs == "ascii"))
    return page._replace(lines=above + page.lines)


def picture_legend(strips):
    """What is drawn in the strips: what it means, how it looks."""
    keys = {}
    drawn = "".join(strip.chart for strip in strips)
    signs = "".join(sign for sign in SIGNS.values() if f">{sign}</text>" in drawn)
    for style, height, meaning in importer.rows_of(LEGEND):
        if f'class="{style}"' in drawn:
            swatch = f'<rect class="{style}" width="24" y="2" height="{height}"/>'
            if "line" in style:
                swatch = f'<path class="{style}" d="M0 5h24"/>'
            if style == "mark":
                swatch = f'<text class="mark" x="12" y="9">{signs}</text>'
            keys.setdefault(meaning, swatch)
    return keys


def dates(frame, y):
    """Labels of the time; a phone shows every third."""
    drawn = ""
    for number, tick in enumerate(frame.ticks):
        style = "more" if number % 3 else "date"
        drawn += f'<text class="{style}" x="{frame.share(tick.ts):.2%}" y="{y}">{tick.label}</text>'
    return drawn


def paragraphs(lines):
    """Lines as HTML."""
    return "".join(
        f'<p class="{style}">{escaped(clean(text))}</p>'
        for style, text in lines
    )


def picture_html(c, picture):
    """A picture for a page: links, what it is about, legend, strips; the same in words."""
    drawn = "" if c.o.query is None else picture_links(c, picture.window)
    keys = ""
    late = [strip.site for strip in picture.strips if strip.site and strip.late]
    for meaning, swatch in picture_legend(picture.strips).items():
        keys += f'<span><svg width="24" height="12">{swatch}</svg> {meaning}</span> '
    wrong = [("bad", f"{len(late)} late: " + ", ".join(late[:10]))] if late else []
    drawn += (
        f'<p class="about">{picture.about}</p>\n{paragraphs(wrong)}'
        f'<p class="about">{keys}</p>\n<div class="strip axis">'
        f'<svg class="chart" width="100%" height="16">{dates(picture.frame, 12)}</svg></div>\n'
    )
    for strip in picture.strips:
        name = paragraphs(strip.left)
        if strip.site:
            name = f'<a href="{site_link(strip.site, c.o.query)}">{name}</a>'
        drawn += (
            f'<div class="strip"><div class="name">{name}</div>'
            f'<svg class="scale" width="34" height="{strip.height}">{strip.labels}</svg>'
            f'<svg class="chart" width="100%" height="{strip.height}">{strip.chart}</svg>'
            f'<div class="numbers">{paragraphs(strip.right)}</div></div>\n'
        )
    drawn += "<details><summary>The same in numbers</summary><table>\n"
    for name, text in picture.numbers:
        drawn += f"<tr><th>{escaped(clean(name))}<td>{escaped(text)}\n"
    return drawn + "</table></details>\n"


FILE_CHART = 820  # px; width of a chart in a file


def absolute(chart):
    """A drawing in pixels, without hover texts: papers and mails have one size."""
    chart = re.sub('<g class="hover">.*?</g>|</?svg[^>]*>', "", chart)
    chart = re.sub(
        '"([0-9.]+)%"',
        lambda share: f'"{float(share[1]) * FILE_CHART / 100:g}"',
        chart
    )
    units = cycle((FILE_CHART / STRETCHED, 0.1))  # of x and y, in turn: all paths are made of pairs

    def pixels(d):
        return re.sub("-?[0-9]+", lambda number: f"{int(number[0]) * next(units):g}", d[0])

    return re.sub(' d="[^"]*"', pixels, chart)


def words(lines, x, anchor):
    """Lines as SVG."""
    drawn = ""
    for number, (style, text) in enumerate(lines):
        y = 13 + 16 * number
        drawn += f'<text class="{style}-word" x="{x}" y="{y}" text-anchor="{anchor}">{escaped(clean(text))}</text>'
    return drawn


def picture_file(c, picture):
    """A picture as a file that browsers, Inkscape and LibreOffice open."""
    width = FILE_CHART + 320
    drawn = ""
    x = 10.0
    for meaning, swatch in picture_legend(picture.strips).items():
        drawn += f'<g transform="translate({x:g} 46)">{swatch}<text x="28" y="9">{meaning}</text></g>'
        x += 38 + 5.4 * len(meaning)  # a letter is about so wide
    y = 8
    title = " · ".join(filter(None, (c.view.replace("co2", "CO₂"), c.o.site, c.o.unit)))
    head = Strip([("head", title), ("", picture.about)], [], 66, dates(picture.frame, 70))
    for strip in (head, *picture.strips):
        drawn += (
            f'<g transform="translate(10 {y})"><path class="grid" d="M0 -3l{width} 0"/>'
            f"{words(strip.left, 0, 'start')}{words(strip.right, width, 'end')}"
            f'<g transform="translate(126 0)">{strip.labels}</g>'
            f'<g transform="translate(160 0)">{absolute(strip.chart)}</g></g>\n'
        )
        y += max(strip.height, 16 * len(strip.left), 16 * len(strip.right)) + 10
    colours = dict(re.findall(r"--(\w+): (#\w+)", LIGHT))
    style = re.sub(r"var\(--(\w+)\)", lambda name: colours[name[1]], STYLE)
    size = f'width="{width + 20}" height="{y}" viewBox="0 0 {width + 20} {y}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{style}</style>\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n{drawn}</svg>\n'
    )


RANGES = {"14 days": 14, "30 days": 30, "1 year": 365, "all": 0}  # days


def link(label, asked, path=""):
    """A link of a page, to itself if no path is given."""
    return f'<a href="{url(path, asked)}">{escaped(clean(label))}</a>'


def time_links(c, window):
    """Other times of a picture."""
    query = c.o.query
    any_time = {name: query[name] for name in query if name not in TIMES}
    a, b, _ = window
    shown = query.get("recent-days")
    if not TIMES & set(query):
        shown = str(ceil((b - a) / DAY))
    links = []
    for text, days in RANGES.items():
        if str(days) == shown:
            links.append(f"<b>{text}</b>")
        else:
            links.append(link(text, {**any_time, "recent-days": days}))
    earlier, begin, end, later = map(c.zone.iso, (a + a - b, a, b, b + b - a))
    units = {stay.unit_id for stay in c.stays}
    first, _ = importer.extent(c.db, VIEWS[c.view].table, units, a - 1)
    if first is not None:
        links.append(link("‹ earlier", {**any_time, "xmin": earlier, "xmax": begin}))
    if b + DAY < c.o.now:
        links.append(link("later ›", {**any_time, "xmin": end, "xmax": later}))
    return links


def picture_links(c, window):
    """Other times of a picture, the sites before and after, its data."""
    query = c.o.query
    # links say minutes, and what came in the last one is on the page
    window = window._replace(b=window.b + -window.b % 60)
    links = time_links(c, window)
    stays = filter(c.has_tier, importer.deployments(c.db))
    sites = list(dict.fromkeys(stay.site for stay in stays if stay.site))
    for before, after in zip(sites, sites[1:]):
        if after == c.o.site:
            links.append(link("‹ " + before, {**query, "site": before}))
        if before == c.o.site:
            links.append(link(after + " ›", {**query, "site": after}))
    links.append(link("text", {**query, "text": 1}))
    who = {name: query[name] for name in ("site", "unit") if name in query}
    if c.o.own_scale:
        links.append(link("one scale", {**query, "own-scale": ""}))
    elif c.view == "co2" and not who:
        links.append(link("own scales", {**query, "own-scale": 1}))
    if {"min-tier", "max-tier"} & set(query):
        here = dict.fromkeys(stay.site for stay in c.stays if stay.site)
        who = {"site": ",".join(here)}
    begin, end = map(c.zone.iso, window[:2])
    table = VIEWS[c.view].table.replace("co2_", "")
    for text, form in (("CSV", "csv"), ("JSON", "jsonl")):
        links.append(link(text, {**who, "since": begin, "until": end}, f"/data/co2/{table}.{form}"))
    return f'<p class="links">{" ".join(links)}</p>\n'


def picture_of(view, o, write):
    """What `write` makes of a view's picture; nothing where there is none."""
    if view not in PICTURES or view == "co2" and o.panels:
        return ""
    with suppress(importer.NoDatabase), importer.open_db(o.db) as connection:
        c = Context(connection, view, o)
        c.fenced = False
        if not c.stays:
            return ""
        try:
            picture = PICTURES[view](c)
        except Nothing as why:
            if o.query is None:
                return ""
            return f"{picture_links(c, c.window())}<p>{why}</p>"
        period, *_ = c.zone.period(picture.window, "–")
        return write(c, picture._replace(about=f"{period} · {picture.about}"))
    return ""


def sections(name, o):
    """Of a page for browsers: the heading, the view and the Options of each section."""
    for page, heading, view, days in importer.rows_of(SECTIONS):
        if page == name:
            yield heading, view, o.but(recent_days=0) if days == "all" else o


def document(name, o):
    """A whole HTML document: pictures, or text drawn wide, and narrow for phones; no script, and all style inside."""
    if o.glyphs == "auto":
        o = o.but(glyphs="block")
    wrong, o = without_station(o)
    body = paragraphs(("bad", text) for text in wrong)
    parts = {}
    for heading, view, asked in sections(name, o):
        if asked is not o and o.query is not None:
            continue  # links lead to other times
        part = picture_of(view, asked, picture_html)
        if not part:
            for kind, cells in WIDTHS.items():
                lines = draw(view, asked.but(width=cells)).lines
                text = to_text(lines, lambda span: html_span(span, o.query))
                part += f'<pre class="{kind}">{text}</pre>\n'
        if part not in parts.values():  # else the same as the one before
            parts[heading] = part
    for heading, part in parts.items():
        if len(parts) > 1:
            body += f"<h2>{heading}</h2>\n"
        body += part
    title = " · ".join([WEB[name].title, *map(clean, filter(None, (o.site, o.unit)))])
    return html_page(title, body, o.query)


def html_page(title, body, query):
    """A document with links to all pages."""
    links = ""
    for page in WEB.values():
        url = page.file if query is None else page.url
        links += f'<a href="{url}">{page.title}</a> '
    return HTML % {
        "title": escaped(title),
        "nav": links,
        "body": body,
        "light": LIGHT,
        "dark": DARK,
        "style": STYLE,
        "data": "" if query is None else DATA_LINKS
    }


def without_station(o):
    """What is wrong with the station, as texts; the Options with the problems of units alone."""
    texts = [clean(problem.text) for problem in o.problems if not problem.unit]
    return texts, o.but(problems=[problem for problem in o.problems if problem.unit])


def web_page(view, db, query, html, now, **others):
    """A page for the daemon: view is index, alive or co2, query the arguments of the URL, others see Options. A whole
    HTML document, or the text page. ValueError: what is wrong with the arguments; UnknownName: nothing has the name;
    Unusable."""
    o = Options.from_query(query, query=query, db=db, now=int(now), **others)
    if html:
        return document(view, o)
    wrong, of_units = without_station(o)
    texts = [text + "\n" for text in wrong]
    for _, name, asked in sections(view, of_units):
        text = to_text(draw(name, asked).lines)
        if text not in texts:
            texts.append(text)
    return "\n".join(texts)


# -- the command ------------------------------------------------------------------------------------------------------


def put(text):
    """To stdout as UTF-8, whatever the locale is."""
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def run(a):
    """What the command line asks for; the exit status. `a` is what argparse makes of it, with a `clock`."""
    a.settings = importer.load_settings(a.config, {"db": a.db})
    a.archive = a.settings.archive()
    a.terminal = sys.stdout.isatty() and not a.output
    for warning in a.settings.warnings:
        print(f"plot_ascii: {warning}", file=sys.stderr)
    o = options(a)
    if a.check:
        return check(a, o)
    if a.db:
        with importer.open_db(a.db):
            pass  # one that is named has to be there
    if a.watch:
        watch(a)
    if a.html and a.output and (os.path.isdir(a.output) or a.output.endswith("/")):
        return write_site(a.output, o)
    paged = a.terminal and sys.stdin.isatty() and not a.no_pager
    whole = o.all or a.plain or a.json or paged and a.view != "status"
    text = page_text(a, o, None if whole else o.height - 1)
    if a.output:
        if text:
            write_file(a.output, [text])
    elif paged and text.count("\n") >= o.height:
        page_through(text)
    else:
        put(text)
    return 0


def options(a):
    """From the command line, completed by what the environment says of the screen and the locale."""
    cells, lines = get_terminal_size()
    known = {
        "width": str(max(cells, 20)),
        "height": str(max(lines, 5)),
        "glyphs": "auto" if speaks_unicode() else "ascii"
    }
    given = {
        flag: getattr(a, name) or known.get(name)
        for name, flag in zip(OPTIONS, FLAGS)
    }
    archive = None if a.db else a.archive
    return Options.from_query(given, db=a.settings.db, now=int(a.clock()), archive=archive)


def known_problems(a, now, whole):
    """What the daemon knows to be wrong; where none runs and the whole truth is asked for, what the database shows.
    Of a database that --db names only that."""
    if not a.db:
        if whole:
            return importer.known_problems(a.archive, now)
        return importer.read_health(a.archive.var_dir, now) or ()
    if not whole:
        return ()
    with importer.open_db(a.db) as db:
        return importer.problems(db, a.archive._replace(data_dirs=()), now)


def page_text(a, o, rows):
    """The page in the format that is asked for."""
    o = o.but(problems=known_problems(a, o.now, a.view == "status"))
    if a.html:
        return document({"co2": "co2", "status": "index"}.get(a.view, "alive"), o)
    is_picture = a.output and a.output.endswith(".svg")
    text = is_picture and picture_of(a.view, o, picture_file)
    if text:
        return text
    page = draw(a.view, o.but(rows=rows))
    if a.json:
        return to_json(page)
    if page.empty and (a.plain or is_picture):
        print(page.empty, file=sys.stderr)
        return ""
    if is_picture:
        raise ValueError("there is no picture of this: " + a.view)
    if a.plain:
        return to_tsv(page, o.glyphs == "ascii")
    # a flag wins, then NO_COLOR and TERM, then whether this is a terminal
    dumb = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    auto = a.color == "auto" and a.terminal and not dumb
    write = painted if auto or a.color == "always" else attrgetter("text")
    return to_text(page.lines, write)


def check(a, o):
    """For monitoring: one line, then one for each further problem; 0 is well, 1 warning, 2 critical.

    With --changes it speaks only when what is wrong has changed, and once a day while it is.
    """
    now = o.now
    try:
        page = draw("status", o.but(rows=None))
        rows = [dict(zip(page.fields, record)) for record in page.records]
        units = {"", *(row["unit_id"] for row in rows)}
        some = o.site or o.unit or {o.min_tier, o.max_tier} != {None}
        problems = [
            problem
            for problem in known_problems(a, now, True)
            if problem.unit in units or not some
        ]
        counts = [f"{name}={n}" for name, n in page.facts.items() if name in VERDICTS]
        if not rows:
            problems.append(Problem("units", importer.CRITICAL, "", page.empty, now))
    except Unusable as error:
        counts = []
        problems = [Problem("database", importer.CRITICAL, "", str(error), now)]
        if not isinstance(error, importer.UnknownName):
            problems += known_problems(a, now, False)
    levels = [importer.NOTE, importer.WARNING, importer.CRITICAL]
    worst = max([levels.index(problem.level) for problem in problems], default=0)
    said = [clean(problem.text, o.glyphs == "ascii") for problem in problems]
    if not worst:
        said.insert(0, count(len(rows), "unit"))
    word = levels[worst].upper() if worst else "OK"
    said[0] = f"CO2 {word}: {said[0].replace('|', '/')}"
    if counts:
        said[0] += f" | {' '.join(counts)}"
    if a.changes:
        return max(worst, tell_changes(a.changes, problems, now, said))
    put("\n".join(said) + "\n")
    return worst


def tell_changes(path, problems, now, said):
    """Print what is said, and what is well again, if the problems are news after those that the file has, which were
    told last; the exit status."""
    wrong = {problem.key: [problem.unit, clean(problem.text)] for problem in problems}
    try:
        with open(path, encoding="utf-8") as file:
            told, known = json.load(file)
        age = now - told
        before = {key: (str(unit), clean(text)) for key, (unit, text) in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        # there is none, or it is not ours
        age = DAY
        before = {}
    if before.keys() == wrong.keys() and not (wrong and age >= DAY):
        return 0
    units = {unit for unit, _ in wrong.values() if unit}
    for key, (unit, text) in before.items():
        if key not in wrong and unit not in units:
            said.append("well again: " + text)
    put("\n".join(said) + "\n")
    try:
        write_file(path, [json.dumps([now, wrong])])
    except OSError as error:
        return importer.fail("plot_ascii", error)
    return 0


EXAMPLES = """examples:
  %(prog)s                                    the fleet, the last two weeks
  %(prog)s co2 --site vj_re_sn_3 --tz Europe/Oslo
  %(prog)s status --check --changes told.txt  for cron, which mails what is printed"""
COMMAND_OPTIONS = """\
--plain      -     -  tab-separated values
--json       -     -  JSON
--html       -     -  an HTML document; with -o DIR all pages as files
--no-pager   -     -  never page
--check      -     -  status: one line first; exit 0 well, 1 warning, 2 critical
--config     FILE  -  where co2d.conf is
--db         FILE  -  the database (where co2d.conf says, or var/db.sqlite3)
-o --output  FILE  -  write here: FILE.svg is a picture; with --html a directory takes all pages
--changes    FILE  -  --check: print only what has changed since the last run, kept in FILE; once a day all of it
"""


def make_parser():
    """Of the command line."""
    import argparse

    parser = argparse.ArgumentParser(
        description="Pages of a fleet of CO2 units, for a terminal.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    views = []
    for name, view in VIEWS.items():
        views.append(f"{name}: {view.about} ({view.days} days)")
    about = "; ".join(views)
    add("view", nargs="?", default="co2", choices=list(VIEWS), help=about)
    add("--version", action="version", version="%(prog)s " + importer.__version__)
    for flags, takes, _, text in importer.rows_of(PAGE_OPTIONS + COMMAND_OPTIONS):
        if takes == "-":
            add(*flags.split(), action="store_true", help=text)
        else:
            add(*flags.split(), metavar=takes, help=text)
    add("--color", "--colour", choices=("auto", "always", "never"), default="auto")
    add("--watch", type=between(0.1, 1e6), metavar="SECONDS", help="redraw until Ctrl-C")
    # without effect, but accepted: old crontabs have it
    add("--repeat", help=argparse.SUPPRESS)
    return parser


def arguments(argv):
    """The command line; a wrong one ends the program with status 2."""
    parser = make_parser()
    a = parser.parse_args(argv)
    if a.changes and not a.check:
        parser.error("--changes goes with status --check")
    if a.check and (a.xmin or a.xmax):
        parser.error("--check tells how it is now: leave out --xmin and --xmax")
    if a.watch and (a.output or a.check):
        parser.error(
            "--watch draws on this terminal: leave out --check and -o, and have cron repeat those"
        )
    return a


def speaks_unicode():
    """Whether the user's own locale is UTF-8. Python's encodings do not tell: where the locale is C it turns its UTF-8
    mode on, and sets LC_CTYPE itself (PEP 538, 540)."""
    names = ["LC_ALL", "LC_CTYPE", "LANG"]
    if sys.flags.utf8_mode:
        names.remove("LC_CTYPE")
    locale = next(filter(None, map(os.environ.get, names)), "C")
    return "utf8" in locale.lower().replace("-", "")


def write_site(directory, o):
    """All pages as files for another web server, with links between them; the exit status."""
    os.makedirs(directory, exist_ok=True)
    for name, page in WEB.items():
        write_file(os.path.join(directory, page.file), [document(name, o)])
    sites = set()
    with suppress(importer.NoDatabase), importer.open_db(o.db) as connection:
        sites = {stay.site for stay in importer.deployments(connection)}
    status = 0
    for site in sites - {None}:
        path = os.path.join(directory, site_link(site, None))
        try:
            write_file(path, [document("co2", o.but(site=site))])
        except (OSError, Unusable) as error:
            status = importer.fail("plot_ascii", error)
    return status


def page_through(text):
    """Show text in the user's pager; without one that works, print it."""
    import subprocess

    pager = os.environ.get("PAGER") or "less -FIRX"
    env = {"LESS": "FIRX", **os.environ}
    process = subprocess.Popen(pager, shell=True, stdin=subprocess.PIPE, env=env)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is meant for the pager
    process.communicate(text.encode())
    if 0 < process.returncode < 128:  # it has failed, and nobody has ended it
        put(text)


def watch(a):
    """Redraw in place until Ctrl-C, and at once when the terminal changes its size."""
    resized = [signal.SIGWINCH]
    signal.pthread_sigmask(signal.SIG_BLOCK, resized)
    put("\x1b[?1049h\x1b[?25l")  # the other screen, no cursor
    try:
        while True:
            o = options(a)
            try:
                text = page_text(a, o, o.height - 1)
            except Unusable as error:
                text = clean(error, True) + "\n"
            lines = text.splitlines()[: o.height - 1]  # more would scroll
            put("\x1b[H" + "\x1b[K\n".join(lines) + "\x1b[K\n\x1b[J")
            signal.sigtimedwait(resized, a.watch)
    finally:
        put("\x1b[?25h\x1b[?1049l")


def main(argv=None, now=None):
    """The command line; the exit status."""

    def work():
        a = arguments(argv)
        a.clock = time.time if now is None else lambda: now
        try:
            return run(a)
        except importer.BadConfig as error:
            if not a.check:
                raise
            put(f"CO2 CRITICAL: {clean(error, True)}\n")
            return 2
        except ValueError as error:
            raise importer.BadArguments(str(error))

    return importer.run_script("plot_ascii", work)


if __name__ == "__main__":
    sys.exit(main())
