#!/usr/bin/env python3
"""An archive of a whole fleet with known dirt, and the truth about it, so that an importer can be held against it.

``fleet.py DIR --units 20 --days 14 --seed 0`` writes, the same bytes for the same arguments:

    DIR/remote_data/co2unit-.../data/readings/, errors/     what units have uploaded
    DIR/remote_data/server-north/var/pings/                 the first fifth of the pings, from an older server
    DIR/remote_data/manual/deploy_durations_tiered.tsv
    DIR/var/pings/                                          the other pings
    DIR/manifest.json                                       the truth: `Manifest`

Words used here:

    line        bytes up to and with a newline
    mark        one line that is not plain: its place, its class and its kind of dirt
    class       good: to be imported; repeated: an exact repeat of a good line; rejected: not to be imported; ignored: a
                comment, blank or header line of a table; either: the documents do not say whether it can be imported.
                A good line can have a rejected part in front: a line that it is glued to, or NULs
    tail        bytes behind the last newline: the rest may come tomorrow; `FileTruth.rest` is that rest
    role        what the unit's story is: table `ROLES`

Each kind of dirt is a row of `READING_DIRT`, `PING_DIRT` or `ERROR_DIRT` and can be had alone (``--dirt cut,glued``). A
fleet has every chosen kind at least once, as long as there is a unit with enough readings; ``--share 0.02`` soils so
many lines. Lines are as real sensors write them (`sensors`): the first two of the ten CO2 values are way off, a value is
missing now and then, a quarter of the units has the newer firmware (``--newer 0.25``).
Text is handled as str with surrogateescape, so that it can hold bytes that are no UTF-8.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
from collections import Counter
from datetime import datetime, timedelta
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from fipy import ERRORS, FILE_SIZE, READINGS, SEQUENCES, error_entry, write_file
from sensors import HALF_HOUR, MISSING, reading_lines

GOOD, REPEATED, REJECTED, IGNORED, EITHER = "good", "repeated", "rejected", "ignored", "either"
CLASSES = (GOOD, REPEATED, REJECTED, IGNORED, EITHER)
END = datetime(2019, 9, 26, 12)
DAY = timedelta(days=1)
PINGS = "var/pings"
DEPLOYMENTS = "remote_data/manual/deploy_durations_tiered.tsv"
COLUMNS = ("unit_id", "nickname", "site", "tier", "status", "start_ts", "end_ts", "note")
SHARE = 1 / 3                           # of the units have a given kind of dirt

# -- the truth --------------------------------------------------------------------------------------------------------


class Mark(NamedTuple):
    """One line that is not plain."""
    line: int                           # number in its file, from 1
    offset: int                         # bytes
    length: int                         # bytes with the newline
    cls: str
    kind: str


@dataclasses.dataclass
class FileTruth:
    """What one file holds. The bytes of all classes and of the tail add up to `size`."""
    path: str                           # below the archive, with slashes
    what: str                           # readings, pings, errors, deployments
    unit_id: Optional[str]
    size: int = 0
    lines: Dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(CLASSES, 0))
    sizes: Dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(CLASSES, 0))      # bytes
    tail: int = 0                       # bytes
    rest: str = ""                      # what would complete the tail
    entries: int = 0                    # of an error log: headlines
    marks: List[Mark] = dataclasses.field(default_factory=list)

    def kinds(self, cls: str) -> Dict[str, int]:
        """Kind of dirt -> number of lines of a class."""
        return dict(Counter(mark.kind for mark in self.marks if mark.cls == cls))


@dataclasses.dataclass
class UnitTruth:
    """What is known of a unit."""
    unit_id: str
    nickname: str
    site: Optional[str]                 # None: never deployed
    role: str
    readings: int = 0                   # good lines, without repeats
    pings: int = 0
    first: Optional[str] = None         # ISO time of the first and last reading taken, dirty or not
    last: Optional[str] = None
    gaps: List[Tuple[str, str, int]] = dataclasses.field(default_factory=list)     # last before, first after, missing


@dataclasses.dataclass
class Manifest:
    """What an archive holds."""
    seed: int
    start: str
    end: str
    dirt: List[str]
    units: List[UnitTruth] = dataclasses.field(default_factory=list)
    files: List[FileTruth] = dataclasses.field(default_factory=list)

    def of(self, what: str) -> List[FileTruth]:
        """The files with readings, pings, errors or deployments."""
        return [file for file in self.files if file.what == what]

    def lines(self, what: str, cls: str) -> int:
        """Number of lines of a class in all files of a sort."""
        return sum(file.lines[cls] for file in self.of(what))

    def kinds(self, what: str, cls: str) -> Dict[str, int]:
        """Kind of dirt -> number of lines of a class in all files of a sort."""
        return dict(sum((Counter(file.kinds(cls)) for file in self.of(what)), Counter()))

    def save(self, path: str) -> None:
        """Write as JSON."""
        write_file(path, json.dumps(dataclasses.asdict(self), indent=1).encode())

    @classmethod
    def load(cls, path: str) -> Manifest:
        """Read what `save` wrote."""
        with open(path, "rb") as file:
            values = json.load(file)
        values["units"] = [UnitTruth(**dict(unit, gaps=[tuple(gap) for gap in unit["gaps"]]))
                           for unit in values["units"]]
        values["files"] = [FileTruth(**dict(truth, marks=[Mark(*mark) for mark in truth["marks"]]))
                           for truth in values["files"]]
        return cls(**values)


# -- writing with an account ------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """A piece of text as it will stand in a file; `kind` is empty for a plain good line."""
    text: str                           # one line with its newline
    cls: str = GOOD
    kind: str = ""
    bad: str = ""                       # its begin, which is rejected, while the rest is good


def encode(text: str) -> bytes:
    """Bytes of a text that may stand for invalid UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def write_items(root: str, truth: FileTruth, items: Iterable[Item], tail: str = "", rest: str = "") -> FileTruth:
    """Write one file and fill in its truth."""
    data: List[bytes] = []
    for number, (text, cls, kind, bad) in enumerate(items, 1):
        line = encode(text)
        bad_bytes = len(encode(bad))
        if bad:
            truth.marks.append(Mark(number, truth.size, bad_bytes, REJECTED, kind))
        elif kind:
            truth.marks.append(Mark(number, truth.size, len(line), cls, kind))
        truth.lines[cls] += 1
        truth.sizes[cls] += len(line) - bad_bytes
        truth.sizes[REJECTED] += bad_bytes
        truth.size += len(line)
        truth.entries += truth.what == "errors" and text.startswith("-----")
        data.append(line)
    data.append(encode(tail))
    truth.tail, truth.rest = len(data[-1]), rest
    truth.size += truth.tail
    write_file(os.path.join(root, *truth.path.split("/")), b"".join(data))
    return truth


def split_files(items: Iterable[Item]) -> Iterator[List[Item]]:
    """The lines of each file: the one that reaches FILE_SIZE is the last of its file."""
    batch: List[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item.text) if item.text.isascii() else len(encode(item.text))
        if size >= FILE_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_sequence(root: str, directory: str, names: Tuple[str, str], what: str, unit_id: Optional[str],
                   items: Iterable[Item], tail: str = "", rest: str = "") -> List[FileTruth]:
    """Write numbered files; the tail goes to the end of the last one."""
    batches = list(split_files(items))
    truths = []
    for number, batch in enumerate(batches):
        truth = FileTruth("%s/%s%04d%s" % (directory, names[0], number, names[1]), what, unit_id)
        ending = (tail, rest) if number == len(batches) - 1 else ("", "")
        truths.append(write_items(root, truth, batch, *ending))
    return truths


# -- dirt in readings -------------------------------------------------------------------------------------------------
# Each edit turns one line and the one behind it into what the field made of them.


class Spot(NamedTuple):
    """Where dirt falls: two neighbouring lines as fields, chance, and the id of another unit."""
    fields: List[str]
    following: List[str]
    chance: random.Random
    other: str


Edit = Callable[[Spot], List[Item]]


def text_of(fields: Sequence[str]) -> str:
    """A line with its newline."""
    return "\t".join(fields) + "\n"


def cut_off(spot: Spot) -> str:
    """The line cut somewhere between its date and its 16th field; may leave a number that looks whole."""
    line = "\t".join(spot.fields[:16])
    return line[:spot.chance.randrange(len("\t".join(spot.fields[:2])) + 1, len("\t".join(spot.fields[:15])) + 2)]


def change_field(cls: str, kind: str, index: int, change: Callable[[str], str]) -> Edit:
    """An edit that changes one field."""
    def edit(spot: Spot) -> List[Item]:
        fields = list(spot.fields)
        fields[index] = change(fields[index])
        return [Item(text_of(fields), cls, kind), Item(text_of(spot.following))]
    return edit


def change_line(cls: str, kind: str, make: Callable[[Spot], str]) -> Edit:
    """An edit that makes another line of one."""
    def edit(spot: Spot) -> List[Item]:
        return [Item(make(spot), cls, kind), Item(text_of(spot.following))]
    return edit


def join_lines(kind: str, make: Callable[[Spot], str]) -> Edit:
    """An edit that makes one line of two; what is made of the first is rejected."""
    def edit(spot: Spot) -> List[Item]:
        bad = make(spot)
        return [Item(bad + text_of(spot.following), GOOD, kind, bad)]
    return edit


def repeat(spot: Spot) -> List[Item]:
    """Both lines, then both again."""
    lines = [text_of(spot.fields), text_of(spot.following)]
    return [Item(text) for text in lines] + [Item(text, REPEATED, "repeat") for text in lines]


def dated(date: str) -> Callable[[Spot], str]:
    """Makes the same line on another date."""
    return lambda spot: text_of(spot.fields[:2] + [date] + spot.fields[3:])


def foreign(spot: Spot) -> str:
    """A line of another unit, at a second at which that unit has no line of its own."""
    return text_of([spot.other] + spot.fields[1:3] + [spot.fields[3][:-2] + "17"] + spot.fields[4:])


def all_ten(value: str) -> Callable[[Spot], str]:
    """Makes the same line with other CO2 values."""
    return lambda spot: text_of(spot.fields[:6] + [value] * 10 + spot.fields[16:])


def first_two(spot: Spot) -> str:
    """What the sensor sends when it has just woken: its limits."""
    return text_of(spot.fields[:6] + ["0", "200010"] + spot.fields[8:])


def more_fields(spot: Spot) -> str:
    """A line of a firmware to come."""
    return text_of((spot.fields + ["1"] * 5)[:21] + ["7", "8.5"])


READING_DIRT: Dict[str, Edit] = {
    # not to be imported
    "cut": change_line(REJECTED, "cut", lambda spot: cut_off(spot) + "\n"),
    "cut_glued": join_lines("cut_glued", cut_off),
    "glued": join_lines("glued", lambda spot: "\t".join(spot.fields[:16])),
    "nul_front": join_lines("nul_front", lambda spot: "\0" * spot.chance.randint(1, 512)),
    "nul_run": change_line(REJECTED, "nul_run", lambda spot: cut_off(spot) + "\0" * spot.chance.randint(1, 512) + "\n"),
    "nul_number": change_field(REJECTED, "nul_number", 8, lambda value: value[:1] + "\0\0" + value[1:]),
    "control": change_field(REJECTED, "control", 9, lambda value: value[:1] + "\x0b" + value[1:]),
    "escape": change_field(REJECTED, "escape", 4, lambda value: "\x1b[2J" + value),
    "separator": change_field(REJECTED, "separator", 11, lambda value: value + "\x1c"),   # int() would strip it
    "invalid_utf8": change_field(REJECTED, "invalid_utf8", 10, lambda value: value[:2] + "\udcff"),
    "other_digits": change_field(REJECTED, "other_digits", 12, lambda value: "\u0664\u0664\u0661"),     # int(): 441
    "quote_number": change_field(REJECTED, "quote_number", 6, lambda value: '"' + value),
    "quote_start": change_field(REJECTED, "quote_start", 0, lambda value: '"' + value),
    "no_id": change_line(REJECTED, "no_id", lambda spot: text_of(spot.fields[1:])),
    "clock_1980": change_line(REJECTED, "clock_1980", dated("1980-01-06")),
    "clock_1970": change_line(REJECTED, "clock_1970", dated("1970-01-01")),
    "impossible_date": change_line(REJECTED, "impossible_date", dated("2019-02-30")),
    "impossible_time": change_field(REJECTED, "impossible_time", 3, lambda value: "25" + value[2:]),
    "bad_value": change_field(REJECTED, "bad_value", 13, lambda value: "6x0"),
    # to be imported, the same line twice only once
    "repeat": repeat,
    "crlf": change_line(GOOD, "crlf", lambda spot: "\t".join(spot.fields) + "\r\n"),
    "quote_nickname": change_field(GOOD, "quote_nickname", 1, lambda value: '"' + value),
    "nickname_none": change_field(GOOD, "nickname_none", 1, lambda value: "None"),
    "nickname_nick": change_field(GOOD, "nickname_nick", 1, lambda value: "CO2UNIT_NICK"),
    "none_value": change_field(GOOD, "none_value", 14, lambda value: "None"),
    "none_temp": change_field(GOOD, "none_temp", 4, lambda value: "None"),
    "all_none": change_line(GOOD, "all_none", all_ten("None")),
    "more_fields": change_line(GOOD, "more_fields", more_fields),
    "odd_raw": change_line(GOOD, "odd_raw", lambda spot: text_of(spot.fields[:16] + ["nan", "1e-05", "None", "", "x"])),
    # to be imported and flagged
    "future": change_line(GOOD, "future", dated("2036-02-07")),
    "temp_85": change_field(GOOD, "temp_85", 4, lambda value: "85.0"),
    "co2_limits": change_line(GOOD, "co2_limits", first_two),
    "co2_zero": change_line(GOOD, "co2_zero", all_ten("0")),
    "spike": change_line(GOOD, "spike", all_ten("10000")),
    # the documents do not decide
    "cut_number": change_line(EITHER, "cut_number", lambda spot: text_of(spot.fields[:15] + [spot.fields[15][:1]])),
    "foreign_id": change_line(EITHER, "foreign_id", foreign),
    "control_nickname": change_field(EITHER, "control_nickname", 1, lambda value: value + "\x07"),
    "latin1_nickname": change_field(EITHER, "latin1_nickname", 1, lambda value: "vads\udcf8"),
}
FLAGGED = ("future", "temp_85", "co2_limits", "co2_zero", "spike", "flat", "all_none")     # good, but not to be trusted
PING_DIRT = ("ping_cut", "ping_glued", "ping_nul", "ping_nickname_none", "ping_nickname_nick", "ping_no_fraction",
             "ping_tail")
ERROR_DIRT = ("error_nul", "error_invalid_utf8", "error_1970", "error_tail")
DIRT = tuple(READING_DIRT) + ("tail", "flat") + PING_DIRT + ERROR_DIRT


def soil(lines: List[str], kinds: Sequence[str], other: str, chance: random.Random, stuck: range) -> List[Item]:
    """The lines with this dirt, never two in the same place; less when there are few lines.

    `stuck`: indexes of lines in which the sensor repeats itself; those get no more dirt.
    """
    places = [i for i in range(2, len(lines) - 2, 4) if i not in stuck and i + 1 not in stuck]
    picks = dict(zip(chance.sample(places, min(len(kinds), len(places))), chance.sample(kinds, len(kinds))))
    items: List[Item] = []
    i = 0
    while i < len(lines):
        if i in picks:
            fields, following = lines[i][:-1].split("\t"), lines[i + 1][:-1].split("\t")
            items += READING_DIRT[picks[i]](Spot(fields, following, chance, other))
            i += 2
        else:
            items.append(Item(lines[i], GOOD, "flat" if i in stuck else ""))
            i += 1
    return items


def flatten(lines: List[str], stuck: range) -> None:
    """Give all those lines the ten values of the first."""
    for i in stuck:
        fields = lines[i][:-1].split("\t")
        lines[i] = text_of(fields[:6] + lines[stuck[0]][:-1].split("\t")[6:16] + fields[16:])


# -- the fleet --------------------------------------------------------------------------------------------------------

SITES = ["vj_re_sn_1", "vj_re_sn_2", "vj_re_sn_3", "vj_re_sn_4", "vj_ko_sn_1", "vj_ko_sn_2", "vj_ko_sn_3", "vj_ko_sn_4",
         "vj_ry_sn_1", "vj_ry_sn_2", "vj_ry_sn_3", "is_ad_sn_1", "is_ad_sn_2", "is_ad_sn_3", "is_en_sn_1", "is_en_sn_2",
         "Vadsø_roof", "東京_ref", "field_spare", "lab_desk"]
TIERS = {"vj": 20, "is": 15, "Vadsø": 12, "東京": 11, "field": 8, "lab": 0}
ROLES = {                               # number of the unit -> its story; all others are plain
    2: "spikes", 3: "gap", 4: "swap", 5: "swap", 7: "never deployed", 10: "silent", 11: "returned", 12: "weak signal",
    13: "prepared", 14: "late start", 17: "late",
}
NICKNAMES = {16: "vadsø", 19: "lab desk"}


class Plan(NamedTuple):
    """One unit of the fleet and when it works."""
    number: int
    unit_id: str
    nickname: str
    site: Optional[str]
    role: str
    since: datetime
    until: datetime


def site_of(number: int) -> str:
    """VIEWS.md's twenty sites, then more of the kind."""
    region = ("vj_re", "vj_ko", "vj_ry", "is_ad", "is_en")[number % 5]
    return SITES[number] if number < len(SITES) else "%s_sn_%d" % (region, number // 5 + 1)


def nickname_of(number: int, site: str) -> str:
    """The name that the unit itself knows."""
    place = {"vj": "varanger", "is": "iskoras"}.get(site[:2], "unit")
    return NICKNAMES.get(number, "%s-%02d" % (place, number + 1))


def plan_fleet(count: int, start: datetime, end: datetime, chance: random.Random) -> List[Plan]:
    """Who is there, where, and from when to when."""
    span, plans = end - start, []
    for number, key in enumerate(chance.sample(range(1 << 24), count)):
        role, site = ROLES.get(number, "plain"), site_of(number)
        since = start + (span / 4 if role == "late start" else timedelta(0))
        until = end - {"silent": span / 3, "late": span / 10, "returned": span / 14}.get(role, timedelta(0))
        plans.append(Plan(number, "co2unit-30aea4%06x" % key, nickname_of(number, site),
                          None if role == "never deployed" else site, role, since, until))
    return plans


class Habits(NamedTuple):
    """How the units of a fleet measure."""
    period: timedelta = HALF_HOUR
    newer: float = 0.25                 # share of the units with the newer firmware: five more values
    missing: float = MISSING            # share of the lines in which one of the ten is missing
    ends: str = "\n"                    # of a line
    soiled: float = 0.0                 # share of the lines that get dirt, beside what each unit has at least


def taken(plan: Plan, habits: Habits, chance: random.Random, unit: UnitTruth) -> List[str]:
    """All lines the unit wrote, gaps left out."""
    start = plan.since + timedelta(seconds=chance.randrange(600))
    newer = int((plan.number + 1) * habits.newer) > int(plan.number * habits.newer)
    lines = reading_lines(plan.unit_id, plan.nickname, start, int((plan.until - start) / habits.period), habits.period,
                          raw=newer, missing=habits.missing)
    if habits.ends != "\n":
        lines = [line[:-1] + habits.ends for line in lines]
    if plan.role == "gap" and len(lines) > 8:
        first, after = len(lines) * 5 // 14, len(lines) * 8 // 14
        unit.gaps.append((when(lines[first - 1]), when(lines[after]), after - first))
        del lines[first:after]
    if lines:
        unit.first, unit.last = when(lines[0]), when(lines[-1])
    return lines


def when(text: str) -> str:
    """ISO time of a line of readings."""
    return "T".join(text.split("\t")[2:4])


def share_out(kinds: Sequence[str], plans: Sequence[Plan], chance: random.Random) -> Dict[int, List[str]]:
    """Number of a unit -> its kinds of dirt; each kind falls to one unit at least."""
    shares: Dict[int, List[str]] = {plan.number: [] for plan in plans}
    for kind in kinds:
        lucky = chance.choice(plans).number
        for plan in plans:
            if plan.number == lucky or chance.random() < SHARE:
                shares[plan.number].append(kind)
    return shares


def write_readings(root: str, plan: Plan, lines: List[str], kinds: Sequence[str], other: str,
                   chance: random.Random) -> List[FileTruth]:
    """The readings of one unit, soiled; a kind that is named several times is there as often."""
    tail = rest = ""
    if "tail" in kinds and lines:
        last = lines.pop()
        cut = chance.randrange(1, len(last))
        tail, rest = last[:cut], last[cut:]
    edits = [kind for kind in kinds if kind in READING_DIRT]
    half = len(lines) // 2
    stuck = range(half, min(half + 24, len(lines))) if "flat" in kinds else range(0)       # half a day
    flatten(lines, stuck)
    items = soil(lines, edits, other, chance, stuck)
    return write_sequence(root, "remote_data/%s/%s" % (plan.unit_id, READINGS), SEQUENCES[READINGS], "readings",
                          plan.unit_id, items, tail, rest)


# -- error logs -------------------------------------------------------------------------------------------------------

TRACEBACK = """Traceback (most recent call last):
  File "main.py", line 98, in <module>
  File "communication.py", line 214, in push_sequential
OSError: [Errno 113] EHOSTUNREACH
"""
MESSAGES = (("EXC", "Uncaught exception in communication", TRACEBACK), ("WARN", "Reset by watchdog", ""),
            ("WARN", "Signal quality low: rssi -111", ""), ("INFO", "backoff 3600 s", ""),
            ("EXC", "transmitting failed", "OSError: [Errno 110] ETIMEDOUT\n"))


def entry_lines(moment: datetime, style: int, chance: random.Random) -> List[Item]:
    """One entry. Style 0: date as text, 1: as a tuple, 2: the earliest, date alone and message on the next line."""
    level, message, text = chance.choice(MESSAGES)
    if style == 2:
        entry = "----- %s\n%s\n%s" % (moment.strftime("%Y-%m-%d %H:%M:%S"), message, text)
    else:
        entry = error_entry(moment, level, message, text, as_tuple=style == 1)
    return [Item(text) for text in entry.splitlines(True)]


def error_items(plan: Plan, kinds: Sequence[str], chance: random.Random) -> List[Item]:
    """The error log of one unit: an entry every three days, the older ones in the older styles."""
    items: List[Item] = []
    moment, style = plan.since + DAY * chance.random(), chance.choice((2, 1, 0))
    while moment < plan.until:
        items += entry_lines(moment, style, chance)
        moment, style = moment + DAY * (1 + 4 * chance.random()), max(0, style - 1)
    extra = {"error_nul": "before \0\0 after\n", "error_invalid_utf8": "no UTF-8: \udcff\udcfe\n",
             "error_1970": "----- (1970, 1, 1, 0, 0, 14, 3, 1) WARN Signal quality unknown\n"}
    return items + [Item(extra[kind], GOOD, kind) for kind in kinds if kind in extra and items]


def write_errors(root: str, plan: Plan, kinds: Sequence[str], chance: random.Random) -> List[FileTruth]:
    """The error log of one unit."""
    tail, rest = ("----- 2019-09-2", "6 11:00:00 INFO backoff 60 s\n") if "error_tail" in kinds else ("", "")
    return write_sequence(root, "remote_data/%s/%s" % (plan.unit_id, ERRORS), SEQUENCES[ERRORS], "errors", plan.unit_id,
                          error_items(plan, kinds, chance), tail, rest)


# -- pings ------------------------------------------------------------------------------------------------------------


def ping_times(plan: Plan, chance: random.Random) -> Iterator[datetime]:
    """Once a night between 03:02 and 03:24, sometimes not, sometimes twice."""
    day = datetime(plan.since.year, plan.since.month, plan.since.day, 3, 2)
    while day < plan.until:
        moment = day + timedelta(seconds=22 * 60 * chance.random())
        for _ in range(chance.choices((0, 1, 2), (7, 88, 5))[0]):
            if plan.since <= moment < plan.until:
                yield moment.replace(microsecond=moment.microsecond or 1)
            moment += timedelta(hours=3 * chance.random())
        day += DAY


def ping_fields(plan: Plan, moment: datetime, chance: random.Random) -> List[str]:
    """One row; the strength of the signal depends on the unit and wavers."""
    level = -109 if plan.role == "weak signal" else -101 + 4 * (plan.number % 8)
    dbm = max(-113, min(-51, level + 2 * chance.randint(-2, 2)))
    raw, text = (str((dbm + 113) // 2), str(dbm)) if chance.random() < 0.98 else ("None", "None")
    return [moment.isoformat(timespec="microseconds"), plan.unit_id, plan.nickname, raw, text]


def glue_pings(spot: Spot) -> List[Item]:
    """One line of two, of which nothing can be imported."""
    return [Item("\t".join(spot.fields) + text_of(spot.following), REJECTED, "ping_glued")]


PING_EDITS: Dict[str, Edit] = {
    "ping_cut": change_line(REJECTED, "ping_cut", lambda spot: "\t".join(spot.fields)[:40] + "\n"),
    "ping_glued": glue_pings,
    "ping_nul": change_field(REJECTED, "ping_nul", 0, lambda value: "\0\0\0\0" + value),
    "ping_nickname_none": change_field(GOOD, "ping_nickname_none", 2, lambda value: "None"),
    "ping_nickname_nick": change_field(GOOD, "ping_nickname_nick", 2, lambda value: "CO2UNIT_NICK"),
    "ping_no_fraction": change_field(GOOD, "ping_no_fraction", 0, lambda value: value[:19]),
}


def ping_items(rows: List[List[str]], kinds: Sequence[str], chance: random.Random) -> List[Item]:
    """Pings of all units in order of time, each kind of dirt once."""
    items = [Item(text_of(row)) for row in rows]
    places = range(0, len(rows) - 1, 2)
    picks = [kind for kind in kinds if kind in PING_EDITS]
    for i, kind in sorted(zip(chance.sample(places, min(len(picks), len(places))), picks), reverse=True):
        items[i:i + 2] = PING_EDITS[kind](Spot(rows[i], rows[i + 1], chance, ""))
    return items


def cut_last(rows: List[List[str]]) -> Tuple[str, str]:
    """Take the last row off; (tail, rest) of it."""
    text = text_of(rows.pop())
    return text[:-4], text[-4:]


def write_pings(root: str, plans: Sequence[Plan], kinds: Sequence[str], chance: random.Random,
                units: Dict[str, UnitTruth]) -> List[FileTruth]:
    """Pings of an older server, then of this one. Dirt is on this one, a tail on both."""
    rows = sorted(ping_fields(plan, moment, chance) for plan in plans for moment in ping_times(plan, chance))
    older, newer = rows[:len(rows) // 5], rows[len(rows) // 5:]
    tails = [cut_last(part) if "ping_tail" in kinds and part else ("", "") for part in (older, newer)]
    parts = [[Item(text_of(row)) for row in older], ping_items(newer, kinds, chance)]
    for item in parts[0] + parts[1]:
        if item.cls == GOOD:
            units[item.text.split("\t")[1]].pings += 1
    return [truth for place, items, tail in zip(("remote_data/server-north/" + PINGS, PINGS), parts, tails)
            for truth in write_sequence(root, place, ("pings-", ".tsv"), "pings", None, items, *tail)]


# -- deployments ------------------------------------------------------------------------------------------------------

Stay = Tuple[str, str, Optional[datetime], Optional[datetime], str]     # site, status, from, to, note


def stays(plan: Plan, plans: Sequence[Plan], start: datetime, end: datetime) -> List[Stay]:
    """Where one unit was, in order."""
    middle, site = start + (end - start) / 2, plan.site or ""
    if plan.role == "swap":
        partner = [other.site or "" for other in plans if other.role == "swap" and other is not plan]
        if partner:
            return [(site, "deployed", None, middle, ""), (partner[0], "deployed", middle, None, "swapped")]
    if plan.role in ("prepared", "late start"):
        ready, there = plan.since + (end - start) / 28, plan.since + (end - start) / 14
        return [(site, "lab_check", plan.since, ready, ""), (site, "en_route", ready, there, "by snowmobile"),
                (site, "deployed", there, None, "")]
    if plan.role == "returned":
        return [(site, "deployed", start, plan.until, ""), ("lab_desk", "lab_check", plan.until, None, "brought back")]
    return [(site, "deployed", None if plan.number % 2 else start, None, "")]


def tier_of(site: str) -> int:
    """0 lab desk, 8 backyard, 10 and up real."""
    return TIERS[site.split("_")[0]]


def deployment_items(plans: Sequence[Plan], start: datetime, end: datetime) -> List[Item]:
    """The table as people write it: header, comment, blank lines, empty fields. The last row never called."""
    items = [Item("# who was where, UTC\n", IGNORED, "comment"), Item("\t".join(COLUMNS) + "\n", IGNORED, "header")]
    for plan in plans:
        for site, status, since, until, note in stays(plan, plans, start, end) if plan.site else ():
            times = [moment.isoformat(timespec="seconds") if moment else "" for moment in (since, until)]
            items.append(Item(text_of([plan.unit_id, plan.nickname, site, str(tier_of(site)), status, *times, note])))
        if plan.number % 5 == 4:
            items.append(Item("\n", IGNORED, "blank"))
    ghost = ["co2unit-30aea5000000", "unit-99", "vj_ry_sn_9", "20", "deployed", str(start.date()), "", "never called"]
    return items + [Item(text_of(ghost))]


# -- all of it --------------------------------------------------------------------------------------------------------


def write_unit(root: str, plan: Plan, lines: List[str], unit: UnitTruth, kinds: Sequence[str], other: str,
               chance: random.Random) -> List[FileTruth]:
    """All files of one unit."""
    files = write_readings(root, plan, lines, kinds, other, chance)
    unit.readings = sum(file.lines[GOOD] for file in files)
    return files + write_errors(root, plan, kinds, chance)


def make_archive(directory: str, units: int = 20, days: float = 14, seed: int = 0, dirt: Iterable[str] = DIRT,
                 end: datetime = END, habits: Habits = Habits()) -> Manifest:
    """Write an archive below `directory`, which should be empty, and return what is in it.

    `dirt`: the kinds wanted, of `DIRT`; () for a clean archive.
    """
    kinds = [kind for kind in DIRT if kind in set(dirt)]
    chance, start = random.Random(seed), end - timedelta(days=days)
    manifest = Manifest(seed, start.isoformat(), end.isoformat(), kinds)
    plans = plan_fleet(units, start, end, chance)
    shares = share_out([kind for kind in kinds if kind not in PING_DIRT], plans, chance)
    for plan in plans:
        unit = UnitTruth(plan.unit_id, plan.nickname, plan.site, plan.role)
        lines = taken(plan, habits, chance, unit)
        if plan.role == "spikes" and "spike" in kinds and "spike" not in shares[plan.number]:
            shares[plan.number].append("spike")
        edits = [kind for kind in kinds if kind in READING_DIRT]
        shares[plan.number] += chance.choices(edits, k=int(habits.soiled * len(lines))) if edits else []
        other = plans[plan.number - 1].unit_id
        manifest.units.append(unit)
        manifest.files += write_unit(directory, plan, lines, unit, shares[plan.number], other, chance)
    by_id = {unit.unit_id: unit for unit in manifest.units}
    manifest.files += write_pings(directory, plans, kinds, chance, by_id)
    truth = FileTruth(DEPLOYMENTS, "deployments", None)
    manifest.files.append(write_items(directory, truth, deployment_items(plans, start, end)))
    manifest.save(os.path.join(directory, "manifest.json"))
    return manifest


def kinds_from(text: str) -> List[str]:
    """Names of dirt, separated by commas."""
    unknown = set(text.split(",")) - set(DIRT)
    if unknown:
        raise argparse.ArgumentTypeError("unknown: %s; there are: %s" % (", ".join(sorted(unknown)), ", ".join(DIRT)))
    return text.split(",")


def _options(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="write an archive with known dirt")
    parser.add_argument("directory")
    parser.add_argument("--units", type=int, default=20)
    parser.add_argument("--days", type=float, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--end", type=datetime.fromisoformat, default=END, help="last moment, UTC (2019-09-26T12:00)")
    parser.add_argument("--dirt", type=kinds_from, default=list(DIRT), metavar="KIND,...", help="only these kinds")
    parser.add_argument("--share", type=float, default=0.0, help="of the lines that get dirt, beside one of each kind")
    parser.add_argument("--newer", type=float, default=0.25, help="share of the units with the newer firmware")
    parser.add_argument("--clean", action="store_const", const=[], dest="dirt", help="no dirt at all")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Exit status: 0 written, 1 the directory is not empty, 2 usage."""
    options = _options(argv)
    if os.path.isdir(options.directory) and os.listdir(options.directory):
        print("%s is not empty" % options.directory, file=sys.stderr)
        return 1
    manifest = make_archive(options.directory, options.units, options.days, options.seed, options.dirt, options.end,
                            Habits(newer=options.newer, soiled=options.share))
    for what in ("readings", "pings", "errors", "deployments"):
        counts = ["%d %s" % (manifest.lines(what, cls), cls) for cls in CLASSES if manifest.lines(what, cls)]
        print("%-11s %4d files: %s lines" % (what, len(manifest.of(what)), ", ".join(counts) or "0"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
