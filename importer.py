#!/usr/bin/env python3
"""From text files to SQLite: incrementally, every byte accounted for.

The text is the truth; the database is derived and can be deleted at any time. A *source* is one text file; the *ledger*
(table `sources`) knows how many of its bytes have been dealt with, and how: every complete line is either imported or
kept in `rejects` with line number, offset, reason and text; what follows the last newline is not yet complete.

    bytes of the file = bytes of imported lines + bytes of rejected lines + bytes not yet complete

The tables depend on nothing but the text: not on the order or the pieces in which it came, nor on the locale.

    readings            only new complete lines are read. Plain lines are cut into columns, many at once (`Columns`);
                        what is left is judged line by line (`parse_reading`, the rule; both give the same rows).
    pings               only new complete lines are read, one by one.
    error logs, tables that people write        small: the whole file is read again when it changes.

`FORMATS` says which file is what. A repeat (same unit, time and values) is imported once: the one with the smallest
(source, offset) stays, whichever came first. Rules that look at neighbours (`judge`) and the rollup (`daily`) are made
anew for the days in which rows came or went. The table `changes` notes these days, for whoever copies the data.

A file whose first bytes are not those that were read (checksum), or that has become shorter, was replaced: its rows go,
it is read again, and so are the files that held repeats of them. Whatever fails in a source is noted with it
(`sources.trouble`), told, and tried again; the next source is taken.

One transaction takes the rows, the rollup and the ledger from one consistent state to the next (write-ahead log:
readers see the old or the new state and wait for nobody). One importer writes at a time; DB.lock says which. A
`rebuild` makes a new database beside the old one and renames it; who has the old one open goes on reading that. Started
as a command it lets further processes read shares of a large archive into databases of their own, then copies these.

SQL is written here and nowhere else; the section "what the views ask" has the queries of the pages.
"""

from __future__ import annotations

import seqfile                          # first: from then on Ctrl-C shows no traceback

import argparse
import errno
import fcntl
import json
import math
import operator
import os
import pwd
import re
import signal
import sqlite3
import stat
import sys
import time
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, namedtuple
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import date
from itertools import accumulate, chain, compress, count, groupby, islice, repeat
from os.path import abspath, basename, dirname, exists, isdir, join, realpath
from shutil import copymode
from typing import Callable, NamedTuple

Troubles = list[tuple[str, str]]        # path, what is wrong with it
__version__ = "1.0.0"                   # of all four files
HERE = dirname(realpath(__file__))
SCHEMA_VERSION = 4
BYTES_AT_ONCE = 1 << 18                 # that are read
LONGEST_LINE = 1 << 16                  # bytes; what is longer is rejected in pieces of this size
SHARE = 1 << 24                         # bytes that are worth a process of their own when all is read
MOST_PROCESSES = 4                      # of 45 MB each
HOUR = 3600                             # s
DAY = 86400                             # s
FOREVER = 1 << 40                       # s; later than any time
EPOCH = 719163                          # date.toordinal() of 1 January 1970
PATIENCE = 10.0                         # seconds to wait for another importer


class Unusable(Exception):
    """An archive, database or argument that cannot be used; says why."""


class BadArguments(Unusable):
    """Arguments that make no sense."""


class NoDatabase(Unusable):
    """There is no database yet."""


class BadConfig(Unusable):
    """The configuration cannot be used; says where and why."""


class Rejected(Exception):
    """A line that cannot be imported; says why."""


def place_of(error):
    """File and line where an exception was raised."""
    from traceback import extract_tb                            # no page needs it
    last = extract_tb(error.__traceback__)[-1]
    return f"{basename(last.filename)}:{last.lineno}"


def rows_of(table):
    """The rows of a table: a line each, two blanks or more between columns."""
    return [re.split("  +", line) for line in table.strip().splitlines()]


def quoted(names):
    """Names as a list in SQL."""
    return ", ".join("'" + name.replace("'", "''") + "'" for name in names)


def ask(db, query, *bound):
    """The first value of the first row of a query."""
    return db.execute(query, bound).fetchone()[0]


def ask_all(db, query, *bound):
    """The first value of each row of a query, as a list."""
    return [value for value, in db.execute(query, bound)]


def _units_in(db, table):
    """The units of a table that has an index by unit: a skip through that, not a scan."""
    return ask_all(db, f"""
        WITH RECURSIVE known(unit) AS (
            SELECT min(unit_id) FROM {table}
            UNION ALL SELECT (SELECT min(unit_id) FROM {table} WHERE unit_id > known.unit)
            FROM known WHERE known.unit IS NOT NULL)
        SELECT unit FROM known WHERE unit IS NOT NULL""")


def _printable(text):
    """Without control characters and bidirectional marks: texts from outside reach no terminal as they are."""
    unsafe = "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
    return re.sub(unsafe, "?", text.encode("utf-8", "replace").decode())


def fail(name, error):
    """Say in a line on stderr why a script fails; the exit status: 2 for arguments that make no sense, 0 where who
    reads a page or a table has seen enough, else 1."""
    if isinstance(error, OSError):      # Python must find no unwritten text when it ends: it would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError) and name != "co2d":      # whose commands do something: it may be half done
        return 0
    reason = re.sub(r"^\[Errno \d+\] ", "", str(error))
    print(f"{name}: {_printable(reason)}", file=sys.stderr)
    return 2 if isinstance(error, BadArguments) else 1


def run_script(name, work):
    """The exit status of a script that does `work`; whatever hinders it is told, see `fail`."""
    try:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError):                      # None has no encoding, and it is never the locale's
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")     # type: ignore[union-attr]
        if not sys.stdout:
            raise Unusable("stdout is closed")
        try:
            return work()
        finally:
            sys.stdout.flush()          # also of what argparse prints before it ends the script
    except KeyboardInterrupt:
        return 130
    except (OSError, sqlite3.Error, Unusable) as error:
        return fail(name, error)


# -- quality rules ----------------------------------------------------------------------------------------------------
# Values stay as they are. The bits of `qc` say which rules a row breaks. `co2_flag` and `temp_flag` sum them up, each
# for its own quantity, in the scheme of QARTOD (U.S. IOOS Manual for Real-Time Quality Control). A value that fails or
# is suspect enters no mean, scale or rollup; it is counted and shown with its extremes.

PASS = 1                                # 2, not evaluated, is never given
SUSPECT = 3
FAIL = 4
MISSING = 9

# A new rule needs a bit, a place in the sums of bits below, its text in QC_RULES, its limit in Limits, and
# SCHEMA_VERSION + 1. A rule on one row goes into co2_bits or temp_bits. A rule on neighbours goes into _JUDGE, both
# masks QC_SPIKE | QC_FLAT, and suspicious_times: a row that this does not name is never judged.

QC_SOME_CO2 = 1                         # one to nine of the ten are missing or out of range; the mean is of the others
QC_NO_CO2 = 2                           # none of the ten is usable
QC_SPIKE = 4                            # the mean stands out from both neighbours (QARTOD test 6)
QC_FLAT = 8                             # the same mean for hours (QARTOD test 8)
QC_POWER_ON = 16                        # 85.0 degC: the temperature sensor's value before its first measurement
QC_TEMP_RANGE = 32                      # beyond what the sensor can measure (QARTOD test 4)
QC_FUTURE = 64                          # dated after its import
QC_FEW_CO2 = 128                        # one to four of the ten are usable
QC_CO2_MISSING = 256                    # all ten are missing
QC_TEMP_MISSING = 512

QC_CO2_SUSPECT = QC_SPIKE | QC_FLAT | QC_FEW_CO2
QC_CO2_BAD = QC_NO_CO2 | QC_CO2_SUSPECT
QC_TEMP = QC_POWER_ON | QC_TEMP_RANGE
QC_ROW = QC_FUTURE
# Quantities of which charts and rollups are made (columns of readings) -> bits with which a value is suspect.
SUSPECT_BITS = {"co2": QC_CO2_BAD | QC_ROW, "temp": QC_TEMP | QC_ROW}
JITTER = 60                             # s; readings come by so much too early or too late
ENOUGH = 5                              # usable of the ten: the first two are taken while the sensor warms up


class Limits(NamedTuple):
    """What the quality rules compare with."""

    co2_low: int = 200                  # ppm; outdoor air has not been below 270 in 800,000 years
    co2_high: int = 40000               # ppm; the sensor reports its limits as 0 and 200010
    temp_low: float = -55.0             # degC; DS18B20 data sheet
    temp_high: float = 84.9             # degC; 85.0 is its power-on value
    spike: float = 300.0                # ppm above or below both neighbours
    spike_gap: int = 4 * 3600           # s; neighbours further away say nothing
    flat_time: int = 6 * 3600           # s; a mean that stays the same for so long is flat
    future: int = DAY                   # s; the unit's clock may be ahead by as much
    first_year: int = 2015              # a line dated before was written by a clock that was not set


LIMITS = Limits()


def co2_flag(qc):
    """QARTOD flag of the CO2 value of a row with these bits."""
    if qc & QC_CO2_MISSING:
        return MISSING
    if qc & (QC_NO_CO2 | QC_ROW):
        return FAIL
    return SUSPECT if qc & QC_CO2_SUSPECT else PASS


def temp_flag(qc):
    """QARTOD flag of the temperature of a row with these bits."""
    if qc & QC_TEMP_MISSING:
        return MISSING
    return FAIL if qc & (QC_TEMP | QC_ROW) else PASS


# -- schema -----------------------------------------------------------------------------------------------------------
# The original's columns first, in its order; then ours.

CO2 = ["co2_%02d" % n for n in range(1, 11)]
RAW = "co2_filtered led_normalised led_signal zero_point sensor_temp".split()
# The rollup: a row for each unit and day. Of each quantity: number, sum, least and greatest of the usable values;
# number, least and greatest of the suspect ones. `longest`: s between two readings.
SUMS = "n sum min max off low peak".split()
_SUMMED = [f"{what}_{name}" for what in SUSPECT_BITS for name in SUMS]
DAILY = ["unit_id", "day", "n", *_SUMMED, "first", "last", "longest"]

SCHEMA = f"""
CREATE TABLE co2_readings(unit_id TEXT, nickname TEXT, date TEXT, time TEXT, temp REAL, flash_count INTEGER,
    co2_01 INTEGER, co2_02 INTEGER, co2_03 INTEGER, co2_04 INTEGER, co2_05 INTEGER,
    co2_06 INTEGER, co2_07 INTEGER, co2_08 INTEGER, co2_09 INTEGER, co2_10 INTEGER,
    ts INTEGER, co2 REAL, co2_flag INTEGER, temp_flag INTEGER, qc INTEGER, source INTEGER, offset INTEGER,
    co2_filtered NUMERIC, led_normalised NUMERIC, led_signal NUMERIC, zero_point NUMERIC, sensor_temp NUMERIC);
CREATE TABLE daily(unit_id TEXT, day INTEGER, {", ".join(DAILY[2:])}, PRIMARY KEY(unit_id, day)) WITHOUT ROWID;
CREATE TABLE pings(ping_ts TEXT, ping_date TEXT, ping_time TEXT, unit_id TEXT, nickname TEXT, rssi_raw INTEGER,
    rssi_dbm INTEGER, ts INTEGER, source INTEGER, offset INTEGER);
CREATE TABLE error_logs(unit_id TEXT, idate TEXT, itime TEXT, etype TEXT, odate TEXT, otime TEXT, level TEXT,
    message TEXT, ts INTEGER, text TEXT, source INTEGER, offset INTEGER);
CREATE TABLE deploy_durations_tiered(unit_id TEXT, nickname TEXT, site TEXT, tier INTEGER, status TEXT, start_ts TEXT,
    end_ts TEXT, note TEXT, since INTEGER, until INTEGER, source INTEGER, offset INTEGER);
CREATE TABLE sources(id INTEGER PRIMARY KEY, path TEXT UNIQUE, kind TEXT, unit_id TEXT, size INTEGER, done INTEGER,
    lines INTEGER, imported INTEGER, repeated INTEGER, rejected INTEGER, imported_bytes INTEGER, rejected_bytes INTEGER,
    ctime REAL, checksum INTEGER, last_ts INTEGER, extra_fields INTEGER, trouble TEXT);
CREATE TABLE rejects(source INTEGER, line INTEGER, offset INTEGER, bytes INTEGER, reason TEXT, text TEXT,
    before_ts INTEGER, after_ts INTEGER);
CREATE INDEX rejects_by_source ON rejects(source, line);
CREATE TABLE changes(unit_id TEXT, day INTEGER, mark INTEGER, PRIMARY KEY(unit_id, day)) WITHOUT ROWID;
CREATE TABLE last_import(at REAL, mark INTEGER, identity TEXT);
INSERT INTO last_import VALUES (NULL, 0, lower(hex(randomblob(8))));
"""
INDEXES = f"""
CREATE INDEX readings_by_unit ON co2_readings(unit_id, ts, co2, temp, qc);
CREATE INDEX pings_by_unit ON pings(unit_id, ts, rssi_dbm);
CREATE INDEX errors_by_unit ON error_logs(unit_id, ts);
CREATE INDEX readings_of_the_future ON co2_readings(ts) WHERE qc & {QC_FUTURE};
CREATE INDEX stays_by_unit ON deploy_durations_tiered(unit_id, tier DESC, since DESC, site, until);
"""

# -- what people take elsewhere ---------------------------------------------------------------------------------------
# One declaration of what `export` gives. Files, PostgreSQL's tables, the data package and the view `readings` have the
# same columns, made from it.


class ExportColumn(NamedTuple):
    """A column of an export."""

    name: str
    kind: str                           # time, text, integer or number
    unit: str                           # of a quantity, else -
    value: str                          # SQL; of a time, UTC seconds
    about: str

    @property
    def sql(self):
        """The column of a query."""
        moment = f"strftime('%Y-%m-%dT%H:%M:%SZ', {self.value}, 'unixepoch')"
        return f"{moment if self.kind == 'time' else self.value} AS {self.name}"


class Export(NamedTuple):
    """A table as people take it. In its SQL `r` is a row, `d` the stay of the row's unit at that time."""

    about: str
    table: str                          # its columns: lines of name, kind, unit, value and what it is
    rows: str                           # SQL: what stands behind FROM
    begin: str = "r.ts"                 # SQL: the UTC seconds that a row is about, from ...
    end: str = "r.ts"                   # ... to
    filters: str = "unit site since until"      # those of FILTERS that choose from it

    @property
    def columns(self):
        """Its ExportColumns."""
        return [ExportColumn(*row) for row in rows_of(self.table)]

    def select(self, more=""):
        """The query for its columns, and for `more`."""
        columns = ", ".join(column.sql for column in self.columns)
        return f"SELECT {columns}{more} FROM {self.rows}"

    def choose(self, values, conditions):
        """The query for values (SQL) of those rows that meet all conditions."""
        rows = self.select(f", {self.begin} AS first, {self.end} AS last")
        where = " AND ".join(conditions) or "1"
        return f"SELECT {values} FROM ({rows}) WHERE {where}"


# What each bit of `qc` says. They are counted from the lowest, as the constants QC_... are.
QC_RULES = """
some of the ten are not usable
none of the ten is usable
spike of CO2
flat line of CO2
power-on value of the temperature sensor
temperature out of range
dated in the future
less than five of the ten are usable
all ten are missing
temperature is missing
""".strip().splitlines()
_QARTOD = "QARTOD: 1 pass, 2 not evaluated, 3 suspect, 4 fail, 9 missing"
_PLACED = """
time  time  -  r.ts  UTC; seconds
unit_id  text  -  r.unit_id  hardware id of the unit
nickname  text  -  coalesce(r.nickname, d.nickname)  what the unit called itself then, else its name by the deployments
site  text  -  d.site  where the unit was deployed at that time; empty: nowhere
tier  integer  -  d.tier  importance of that site: 0 lab desk, 8 backyard, 10 and up real deployments
status  text  -  d.status  deployed, en_route or lab_check
"""
_TEN = "\n".join(f"{name}  integer  ppm  r.{name}  one of ten readings, taken within 5 s" for name in CO2)
_BITS = ", ".join(f"{1 << number} {about}" for number, about in enumerate(QC_RULES))
_READINGS = _PLACED + f"""\
temp  number  degC  r.temp  temperature of the air
co2  number  ppm  r.co2  mean of those of the ten that are usable
co2_flag  integer  -  r.co2_flag  what co2 is worth, by {_QARTOD}
temp_flag  integer  -  r.temp_flag  what temp is worth, by {_QARTOD}
{_TEN}
flash_count  integer  -  r.flash_count  camera flashes since the reading before
qc  integer  -  r.qc  bits of the quality rules that the row breaks: {_BITS}
co2_filtered  number  -  r.co2_filtered  raw value of the sensor: filtered CO2 output
led_normalised  number  -  r.led_normalised  raw value of the sensor: normalised LED
led_signal  number  -  r.led_signal  raw value of the sensor: LED signal
zero_point  number  -  r.zero_point  raw value of the sensor: zero point
sensor_temp  number  -  r.sensor_temp  raw value of the sensor: its temperature
"""
_PINGS = _PLACED + """\
rssi_raw  integer  -  r.rssi_raw  strength of the signal, as the modem says it
rssi_dbm  integer  dBm  r.rssi_dbm  strength of the signal
"""
_ERRORS = _PLACED.replace("coalesce(r.nickname, d.nickname)", "d.nickname") + """\
level  text  -  r.level  INFO, WARN or EXC
etype  text  -  r.etype  uncaught, watchdog, signal, backoff or transmit, where it is one of these
message  text  -  r.message  first line of the entry
text  text  -  r.text  its further lines
written  text  -  r.odate || 'T' || r.otime  date and time as they stand in the log
"""
_DEPLOYMENTS = """
unit_id  text  -  r.unit_id  hardware id of the unit
nickname  text  -  r.nickname  its name in the table of deployments
site  text  -  r.site  where it was
tier  integer  -  r.tier  importance of that site: 0 lab desk, 8 backyard, 10 and up real deployments
status  text  -  r.status  deployed, en_route or lab_check
start_ts  time  -  r.since  UTC; from then on; empty: since ever
end_ts  time  -  r.until  UTC; until before then; empty: until now
note  text  -  r.note  what people wrote
"""
_GAPS = """
unit_id  text  -  r.unit_id  hardware id of the unit
nickname  text  -  r.nickname  its name
site  text  -  r.site  where it was deployed
last_before  time  -  r.start  UTC; last reading before the gap, or begin of the unit's first stay
first_after  time  -  r."end"  UTC; first reading after it; empty: none yet
missing  integer  -  r.missing  readings, by the unit's rhythm
state  text  -  r.state  what became of them
pings  integer  -  r.calls  in the meantime
"""
_UNITS = """
unit_id  text  -  r.unit_id  hardware id of the unit
nickname  text  -  coalesce(r.called, r.named, d.nickname)  its name
site  text  -  d.site  where it is deployed now
tier  integer  -  d.tier  importance of that site
status  text  -  d.status  deployed, en_route or lab_check
first_ping  time  -  p.first_ts  UTC
last_ping  time  -  p.last_ts  UTC
ping_days  integer  -  coalesce(p.days, 0)  days with a ping
pings  integer  -  coalesce(p.n, 0)  in all
first_reading  time  -  (SELECT min(ts) FROM co2_readings c WHERE c.unit_id = r.unit_id)  UTC
last_reading  time  -  (SELECT max(ts) FROM co2_readings c WHERE c.unit_id = r.unit_id AND ts <= r.ts)  UTC
reading_days  integer  -  coalesce(c.days, 0)  days with a reading
readings  integer  -  coalesce(c.n, 0)  in all
"""
_STAY = """
    LEFT JOIN deploy_durations_tiered d ON d.rowid = (
        SELECT s.rowid FROM deploy_durations_tiered s
        WHERE s.unit_id = r.unit_id AND (s.since IS NULL OR s.since <= r.ts) AND (s.until IS NULL OR r.ts < s.until)
        ORDER BY s.tier DESC, s.since DESC, s.site LIMIT 1)"""
_SIGNS = f"""
    (SELECT unit_id, :now AS ts,
        (SELECT nickname FROM pings n WHERE n.unit_id = u.unit_id AND nickname <> '' ORDER BY ts DESC LIMIT 1)
            AS called,
        (SELECT nickname FROM co2_readings n WHERE n.unit_id = u.unit_id AND nickname <> '' ORDER BY ts DESC LIMIT 1)
            AS named
     FROM (SELECT unit_id FROM daily UNION SELECT unit_id FROM pings UNION SELECT unit_id FROM error_logs
           UNION SELECT unit_id FROM deploy_durations_tiered) u) r {_STAY}
    LEFT JOIN (SELECT unit_id, min(ts) AS first_ts, max(ts) AS last_ts, count(DISTINCT ts / {DAY}) AS days,
                   count(*) AS n
               FROM pings GROUP BY unit_id) p ON p.unit_id = r.unit_id
    LEFT JOIN (SELECT unit_id, count(*) AS days, sum(n) AS n FROM daily GROUP BY unit_id) c ON c.unit_id = r.unit_id"""
EXPORTS = {
    "readings": Export("CO2 and temperature", _READINGS, "co2_readings r" + _STAY,
                       filters="unit site since until flag"),
    "pings": Export("calls of the units", _PINGS, "pings r" + _STAY),
    "errors": Export("error logs of the units", _ERRORS, "error_logs r" + _STAY),
    "deployments": Export("which unit was where, and when", _DEPLOYMENTS, "deploy_durations_tiered r",
                          "coalesce(r.since, 0)", f"coalesce(r.until - 1, {FOREVER})"),
    "gaps": Export("missing readings", _GAPS, "temp.gaps r", "r.start", f'coalesce(r."end", {FOREVER})'),
    "units": Export("first and last sign of each unit", _UNITS, _SIGNS, filters="unit site")}
SCHEMA += "CREATE VIEW readings AS %s;" % EXPORTS["readings"].select()

# -- configuration ----------------------------------------------------------------------------------------------------
# Each setting is declared once, as a line of the table below. The options of co2d.py, --print-config, co2d.conf.example
# and README's table are made from it, or a test compares them with it. All three scripts read co2d.conf here, so they
# refuse the same configuration with the same words.

_SEGMENT = "[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}"
SEGMENT = re.compile(_SEGMENT + r"\Z")  # of a path that units may name


class Archive(NamedTuple):
    """Data directories, server directory, database."""

    data_dirs: tuple[str, ...]
    var_dir: str
    db: str
    limits: Limits = LIMITS


class Setting(NamedTuple):
    """A line of the table of settings."""

    kind: str                           # of _KINDS
    change: str                         # what brings a change into effect: a restart, or a reload
    default: str                        # as text; a path counts from the directory of this script
    help: str


# name, kind, change, default (- is the empty text), help; two blanks or more between them
_SETTINGS = """
listen           address    restart  0.0.0.0         address to listen on; :: for IPv6 and IPv4
port             port       restart  8080            TCP port; 0 takes a free one and prints it
data_dir         directory  restart  remote_data     one directory per unit
var_dir          directory  restart  var             pings, database, files to serve
db               path       restart  -               SQLite database; empty: db.sqlite3 in var_dir
secret           secret     reload   -               path prefix that units must know: http://host:8080/SECRET/ou/...
units            patterns   reload   *             ids of units that may report: names or patterns, separated by spaces
upload_dirs      segments   reload   data errors     directories of a unit that take its uploads
ask_older        switch     restart  yes             ask units for older files that are missing or short
status_allow     networks   reload   0.0.0.0/0 ::/0  networks that may see the status pages
metrics_allow    networks   reload   127.0.0.0/8 ::1/128  networks that may see /metrics, /healthz, /readyz
tls_cert         path       restart  -               certificate chain (PEM), read again on reload; empty: no TLS
tls_key          path       restart  -               private key (PEM); empty: in the certificate's file
tls_only         switch     reload   yes             with a certificate: refuse plain HTTP on the same port
max_body         size       reload   65536           bytes of one chunk
max_file         size       reload   16777216        bytes of one uploaded file
max_unit_bytes   size       reload   1073741824      bytes of all files of one unit
max_unit_files   number     reload   10000           files of one unit
max_units        number     reload   10000           units
keep_free        percent    reload   0.1             percent of the disk that uploads leave free
head_seconds     seconds    reload   30              seconds from accept to the end of the request's head
request_seconds  seconds    reload   110             seconds from accept to the end of the reply
import_delay     seconds    reload   1               seconds from an upload to its import
import_scan      seconds    reload   300             seconds between looks for files that came in by other ways
quiet            switch     reload   no              log only what went wrong
"""
# kind, pattern that a setting of this kind has, what is said of one that has not; a kind can have two rows. `real` and
# `whole` are limits of quality rules.
_KINDS = r"""
address    \S+  %r does not appear to be an IPv4 or IPv6 address
port       [0-9]{1,5}  %r is not a whole number from 0 to 65535
port       .{1,4}|[0-5].{4}|6[0-4].{3}|65[0-4]..|655[0-2].|6553[0-5]  %r is not a whole number from 0 to 65535
number     [1-9][0-9]{0,8}  %r is not a whole number from 1 to 999999999
size       [0-9]{1,12} ?[KMG]?  %r is not a size: write bytes, or a number with K, M or G
seconds    (?=.*[1-9])[0-9]{1,6}(\.[0-9]{1,3})?  %r is not a number of seconds
percent    [0-9]{1,2}(\.[0-9]{1,3})?  %r is not a percentage from 0 to 99
switch     (?i:yes|true|on|1|no|false|off|0)  %r is neither yes nor no
path       [^\0]*  no path has a NUL in it
directory  [^\0]*  no path has a NUL in it
directory  (?s:.+)  no directory is named
secret     (SEGMENT)?  a secret has 1 to 64 letters, digits, '.', '_', '-' and does not start with a dot
patterns   .+  at least one is needed; * is all
segments   (?!(OURS)$)SEGMENT  %r cannot take uploads
whole      -?[0-9]{1,9}  %r is not a whole number
real       -?[0-9]{1,9}(\.[0-9]{1,9})?  %r is not a number
""".replace("SEGMENT", _SEGMENT).replace("OURS", f"{seqfile.UPDATES_FOLDER}|{seqfile.SET_ASIDE}")


def value_of(kind, text, base):
    """The value that a text stands for; relative paths count from the directory `base`."""
    if kind in ("path", "directory"):
        return text and join(base, text)
    if kind == "switch":
        return text.lower() in ("yes", "true", "on", "1")
    if kind == "size":
        return int(text.rstrip(" KMG")) * 1024 ** (1 + "KMG".find(text[-1]))
    if kind in ("port", "number", "whole"):
        return int(text)
    return float(text) if kind in ("percent", "seconds", "real") else text


SETTINGS = {
    name: Setting(kind, change, default.strip("-"), help) for name, kind, change, default, help in rows_of(_SETTINGS)}
_DEFAULTS = [value_of(setting.kind, setting.default, HERE) for setting in SETTINGS.values()]


class Settings(namedtuple("Settings", [*SETTINGS, "limits", "warnings"], defaults=[*_DEFAULTS, LIMITS, ()])):
    """The value of each of SETTINGS; the Limits of section [quality]; what is to be told though all can be used."""

    def archive(self):
        """Where its files lie, and by which limits they are judged."""
        return Archive((self.data_dir,), self.var_dir, self.db, self.limits)


# Settings and limits that there were once: name -> what to know. They are accepted, so an upgrade stops no station.
GONE = {
    "flat_count": "a flat line is told by its duration, flat_time",
    "threads": "a client that has to be waited for holds no thread"}
_SECTIONS = {                           # section -> name -> kind
    "co2d": {name: setting.kind for name, setting in SETTINGS.items()},
    "quality": {name: "whole" if isinstance(value, int) else "real" for name, value in LIMITS._asdict().items()}}


def read_ini(file):
    """section -> name -> (text, "file:line") of a configuration file; BadConfig names file, line and reason."""
    try:
        with open(file, encoding="utf-8-sig") as stream:        # some editors begin a file with a byte order mark
            lines = stream.read().splitlines()
    except FileNotFoundError:
        raise BadConfig(f"{file}: no such file")
    except PermissionError:
        raise BadConfig(f"{file}: only root and its group may read it, as it can hold a secret: call this with sudo")
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"{file}: {error}")
    sections = {section: {} for section in _SECTIONS}
    section = None
    for number, line in enumerate(map(str.strip, lines), 1):
        where = f"{file}:{number}"
        name, *text = re.split(r"\s*[=:]\s*", line, maxsplit=1)
        name = name.lower()
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            section = line.strip("[]")
            if section not in sections:
                raise BadConfig(f"{where}: unknown section [{section}], expected [co2d]")
        elif section is None:
            raise BadConfig(f"{where}: a [co2d] line must come first")
        elif not text:
            raise BadConfig(f"{where}: not a line like: name = value")
        elif name in sections[section]:
            raise BadConfig(f"{where}: {name!r} is there twice")
        else:
            sections[section][name] = text[0], where
    return sections


def config_file(config):
    """The path of the configuration file in force, "" for none: `config`, else CO2D_CONF in the environment, else
    co2d.conf beside this script."""
    beside = realpath(join(HERE, "co2d.conf"))  # installed, it is a link to the one in /etc
    return config or os.environ.get("CO2D_CONF") or (beside if exists(beside) else "")


def load_settings(config, given):
    """The Settings: defaults, then the configuration file, then `given`: name of a setting -> text.

    `config` is as in `config_file`; None and other names in `given` are passed over. BadConfig when something cannot be
    used.
    """
    file = config_file(config)
    sections = read_ini(file) if file else dict.fromkeys(_SECTIONS, {})
    options = {
        name: (text, "--" + name.replace("_", "-"))
        for name, text in given.items() if text is not None and (name in SETTINGS or name in GONE)}
    warnings = []
    limits = LIMITS._replace(**_read("quality", sections["quality"], "", warnings))
    values = _read("co2d", sections["co2d"], dirname(abspath(file)), warnings)
    values.update(_read("co2d", options, os.getcwd(), warnings))
    settings = Settings(**values, limits=limits, warnings=tuple(warnings))
    _check_together(settings, file or "the options")
    return settings._replace(db=settings.db or join(settings.var_dir, "db.sqlite3"))


def _read(section, said, base, warnings):
    """name -> value, of name -> (text, where it stands); relative paths count from `base`. BadConfig for unknown names,
    a warning for those that have gone."""
    values = {}
    for name, (text, where) in said.items():
        kind = _SECTIONS[section].get(name)
        if name in GONE:
            warnings.append(f"{where}: {name} has no effect: {GONE[name]}")
        elif not kind:
            raise BadConfig(f"{where}: unknown setting {name!r}")
        else:
            try:
                check_setting(kind, text)
            except ValueError as error:
                raise BadConfig(f"{where}: {name}: {error}")
            values[name] = value_of(kind, text, base)
    return values


def check_setting(kind, text):
    """ValueError for a text that is no setting of this kind."""
    words = (text.split() or [""]) if kind in ("networks", "segments") else [text]     # several in one setting
    for word in words:
        for of, pattern, refusal in rows_of(_KINDS):
            if of == kind and not re.fullmatch(pattern, word):
                raise ValueError(refusal.replace("%r", repr(word)))
        if word and kind in ("address", "networks"):
            import ipaddress                                    # only for who configures it: pages start sooner

            parse = ipaddress.ip_address if kind == "address" else ipaddress.ip_network
            parse(word)


def _check_together(settings, where):
    """BadConfig when settings contradict each other, or the disk."""
    for quantity in ("co2", "temp"):
        low, high = getattr(settings.limits, quantity + "_low"), getattr(settings.limits, quantity + "_high")
        if low >= high:
            raise BadConfig(f"{where}: {quantity}_low = {low:g} must be below {quantity}_high = {high:g}")
    for name in ("data_dir", "var_dir"):
        place = getattr(settings, name)
        if exists(place) and not isdir(place):
            raise BadConfig(f"{where}: {name}: {place} is not a directory")
    if realpath(settings.data_dir) == realpath(settings.var_dir):
        raise BadConfig(f"{where}: data_dir and var_dir are the same directory, {settings.data_dir}")
    if settings.tls_key and not settings.tls_cert:
        raise BadConfig(f"{where}: tls_key without tls_cert: there would be no TLS")


def format_config(settings):
    """The settings as a configuration file."""
    lines = [
        "# co2d.conf: settings of co2d, and where importer.py and plot_ascii.py find its files.",
        "# Precedence: default < this file < command line. Check with: co2d --check-config",
        "",
        "[co2d]"]
    for name, setting in SETTINGS.items():
        note = " (restart to change)" if setting.change == "restart" else ""
        value = getattr(settings, name)
        if setting.kind == "switch":
            value = "yes" if value else "no"
        elif isinstance(value, float):
            value = f"{value:g}"
        lines += ["", f"# {setting.help}{note}", f"{name} = {value}"]
    lines += ["", "# limits of quality rules (see importer.py); importer rebuild applies them to all", "[quality]"]
    for name, limit in settings.limits._asdict().items():
        lines.append(f"{name} = {limit:g}")
    return "\n".join(lines) + "\n"


# -- lines ------------------------------------------------------------------------------------------------------------
# How a line of each kind of file becomes the row of a table. What cannot be imported is `Rejected`, with the reason.


class Rules(NamedTuple):
    """By what lines are judged."""

    limits: Limits
    now: float                          # UTC seconds; time of the import

    @property
    def latest(self):
        """UTC seconds. What is dated later is dated in the future."""
        return self.now + self.limits.future


def number_parser(pattern, convert):
    """A function from the text of a field to its value, None for `None`; Rejected where the pattern does not match."""
    is_number = re.compile(pattern).fullmatch

    def parse(text):
        if text == "None":
            return None
        if not is_number(text):
            raise Rejected("not a number")
        return convert(text)
    return parse


parse_temp = number_parser(r"-?[0-9]{1,4}(?:\.[0-9]{1,6})?", float)
parse_flashes = number_parser("[0-9]{1,6}", int)
parse_integer = number_parser("-?[0-9]{1,7}", int)
parse_raw_value = number_parser(r"-?[0-9]{1,9}(?:\.[0-9]{1,9})?(?:e[+-]?[0-9]{1,2})?", float)
NUMBERS = [parse_temp, parse_flashes, *[parse_integer] * len(CO2)]      # of a reading: fields 5 to 16
LEADING = 4                             # fields in front of them: unit, nickname, date, time
NEEDED = LEADING + len(NUMBERS)         # fields without which there is no reading
KNOWN = NEEDED + len(RAW)               # fields of the newest firmware that is known here

_PREFIX = seqfile.UNIT_PREFIX
_ID = f"{_PREFIX}(?:(?!{_PREFIX})[0-9A-Za-z._-])+"
_UNIT_ID = re.compile(_ID + r"\Z")
_LATER_ID = re.compile(_PREFIX.encode())
# Where a hardware id does not begin another line: in its own field and in the nickname of a whole line. In a line that
# was cut in its first fields only the id itself is passed, else the first field.
_FIRST_FIELDS = re.compile(rf"(?:{_ID}\t[^\t]*\t\d{{4}}-\d\d-\d\d\t|{_PREFIX}|[^\t]*\t)".encode())
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")
_CLOCK = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9]):([0-5][0-9])\Z")
TOO_LONG = f"line longer than {LONGEST_LINE} bytes"
NO_TIME = "impossible date or time"


class Line(NamedTuple):
    """A complete line of a source, or a part of it that is judged alone."""

    number: int
    offset: int                         # byte in the file
    raw: bytes                          # with its newline
    refused: str = ""                   # why, whatever it holds
    is_glued: bool = False              # another line begins at its end

    def content(self):
        """Its bytes; Rejected where `refused`. The last field in front of another line may be cut: it becomes `?`."""
        if self.refused:
            raise Rejected(self.refused)
        return self.raw[:self.raw.rfind(b"\t") + 1] + b"?" if self.is_glued else self.raw


def parts_of(line):
    """The Lines in a line of readings: most have one.

    NULs in front, which a power cut leaves, are no part of the line behind them. A hardware id inside a later field
    begins another line (a nickname may look like an id).
    """
    raw = line.raw
    begin = len(raw) - len(raw.lstrip(b"\0"))
    if line.refused or not begin and raw.find(_PREFIX.encode(), 1) < 0:
        return [line]
    parts = []
    if begin:
        parts.append(line._replace(raw=raw[:begin], refused="NULs"))
    first = _FIRST_FIELDS.match(raw, begin)
    later = _LATER_ID.finditer(raw, first.end() if first else len(raw))
    for end in (*[found.start() for found in later], len(raw)):
        parts.append(Line(line.number, line.offset + begin, raw[begin:end], is_glued=end < len(raw)))
        begin = end
    return parts


def decode(raw):
    """A line as text, without its end; never depends on the locale."""
    text = raw.decode("utf-8", "replace").rstrip("\n")
    return text[:-1] if text.endswith("\r") else text


def check_text(text):
    """Rejected for a text with control characters, and for none."""
    if _CONTROL.search(text):
        raise Rejected("control character")
    if not text:
        raise Rejected("empty line")


def parse_day(text):
    """UTC seconds of the begin of a day, YYYY-MM-DD."""
    try:
        if _DAY.match(text):
            return (date.fromisoformat(text).toordinal() - EPOCH) * DAY
    except ValueError:                                          # no calendar has that day
        pass
    raise Rejected(NO_TIME)


def parse_clock(text):
    """Seconds since midnight, HH:MM:SS."""
    found = _CLOCK.match(text)
    if not found:
        raise Rejected(NO_TIME)
    hours, minutes, seconds = map(int, found.groups())
    return hours * HOUR + minutes * 60 + seconds


def instant(day, clock, limits):
    """UTC seconds; Rejected for a clock that was not set, too."""
    ts = parse_day(day) + parse_clock(clock)
    if int(day[:4]) < limits.first_year:
        raise Rejected("clock not set")
    return ts


def parse_raw(text):
    """A value that is behind those that are needed; None where it is no number."""
    with suppress(Rejected):
        return parse_raw_value(text)


def nickname(text):
    """None for those of misconfigured units."""
    return None if text in ("", "None") or text.endswith("NICK") else text


def co2_bits(usable, missing):
    """The bits of `qc` for ten values of which so many are usable, and so many missing."""
    if usable == len(CO2):
        return 0
    if usable:
        return QC_SOME_CO2 if usable >= ENOUGH else QC_SOME_CO2 | QC_FEW_CO2
    return QC_NO_CO2 | QC_CO2_MISSING if missing == len(CO2) else QC_NO_CO2


def temp_bits(degrees, limits):
    """The bits of `qc` for a temperature."""
    if degrees is None:
        return QC_TEMP_MISSING
    if limits.temp_low <= degrees <= limits.temp_high:
        return 0
    return QC_POWER_ON if degrees == 85 else QC_TEMP_RANGE


def is_usable(ppm, limits):
    """Whether one of the ten values enters their mean."""
    return ppm is not None and limits.co2_low <= ppm < limits.co2_high


def parse_reading(raw, rules):
    """The row of a reading: the 16 original columns, ts, co2, co2_flag, temp_flag, qc, five raw values."""
    fields = decode(raw).split("\t")
    check_text("\t".join(fields[:NEEDED]))
    if not _UNIT_ID.match(fields[0]):
        raise Rejected("no hardware id")
    if len(fields) < NEEDED:
        raise Rejected(f"{len(fields)} fields, fewer than {NEEDED}")
    unit, nick, day, clock = fields[:LEADING]
    ts = instant(day, clock, rules.limits)
    values = []
    for at, parse in enumerate(NUMBERS, LEADING):
        try:
            values.append(parse(fields[at]))
        except Rejected:
            raise Rejected(f"field {at + 1} is not a number")
    temp, flashes, *ten = values
    usable = [ppm for ppm in ten if is_usable(ppm, rules.limits)]
    co2 = sum(usable) / len(usable) if usable else None
    qc = co2_bits(len(usable), ten.count(None)) | temp_bits(temp, rules.limits)
    if ts > rules.latest:
        qc |= QC_FUTURE
    raws = list(map(parse_raw, fields[NEEDED:KNOWN]))
    raws += [None] * (len(RAW) - len(raws))
    return unit, nickname(nick), day, clock, *values, ts, co2, co2_flag(qc), temp_flag(qc), qc, *raws


_PING = re.compile(r"(([0-9]{4}-[0-9]{2}-[0-9]{2})T(([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.[0-9]{1,6})?))"
                   r"\t([0-9A-Za-z._-]+)\t([^\t]*)\t(None|-?[0-9]{1,4})\t(None|-?[0-9]{1,4})\Z")


def parse_ping(raw, rules):
    """The row of a ping without source and offset."""
    text = decode(raw)
    check_text(text)
    found = _PING.match(text)
    if not found:
        raise Rejected("not a ping: time, unit, nickname, rssi_raw, rssi_dbm")
    moment, day, exact_clock, clock, unit, nick, *strengths = found.groups()
    ts = instant(day, clock, rules.limits)
    return moment, day, exact_clock, unit, nickname(nick), *map(parse_integer, strengths), ts


_HEADLINE = re.compile(r"(?as)----- (?:([0-9]{4}-[0-9]{2}-[0-9]{2}) ([0-9]{2}:[0-9]{2}:[0-9]{2})"
                       r"|\(((?: *[0-9]{1,4} *,){5} *[0-9]{1,4})[0-9, ]*\))"
                       r"(?: +(INFO|WARN|EXC)\b)?(.*)")
# The path of a URL can be a secret: up to its last `/ou/`, or all of it where it has none.
_SECRET = re.compile(r"(?i)(https?://[^/\s'\"<>]+)(?:/[^\s'\"<>]*(?=/ou/)|/(?!ou/)[^\s'\"<>]+)")
# words of an entry -> its type; where several are there, the last of these
ERROR_TYPES = dict(rows_of("""
uncaught exception  uncaught
watchdog            watchdog
signal quality      signal
backoff             backoff
transmitting        transmit
"""))


def hide_secrets(text):
    """What can be a secret in URLs becomes `/***`."""
    return _SECRET.sub(r"\1/***", text)


def decode_log(raw):
    """A line of an error log as text; control characters do not hide it, they are escaped."""
    text = raw.decode("utf-8", "replace").rstrip("\r\n")
    return hide_secrets(_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text))


def error_type(said):
    """One of ERROR_TYPES, or None, for what an entry says. A log of a run lists what went well, too: it has no type."""
    lower = said.lower()
    types = [name for words, name in ERROR_TYPES.items() if words in lower]
    return None if lower.startswith("run log leading up to this") or not types else types[-1]


class Entry:
    """An entry of an error log: its headline, then further lines."""

    def __init__(self, offset, day, clock, level, message):
        self.offset = offset            # byte in the file
        self.day = day
        self.clock = clock
        self.level = level
        self.lines = [message] if message else []               # early logs have the message on the next line
        self.length = 0                 # characters of further lines
        self.inferred = day, clock, parse_day(day) + parse_clock(clock)

    def add(self, text):
        """A further line; Rejected when there are so many that they are no text for people."""
        self.length += len(text) + 1
        if self.length > LONGEST_LINE:
            raise Rejected(f"entry longer than {LONGEST_LINE} characters")
        self.lines.append(text)

    def row(self, unit):
        """The row without source and offset."""
        said = "\n".join(self.lines)
        message, _, text = said.partition("\n")
        day, clock, ts = self.inferred
        return unit, day, clock, error_type(said), self.day, self.clock, self.level, message, ts, text


def parse_headline(text, offset):
    """The entry that a line begins, None when it goes on with one; Rejected for a headline that makes no sense."""
    if not text.startswith("-----"):
        return None
    found = _HEADLINE.match(text)
    if not found:
        raise Rejected("malformed headline")
    day, clock, numbers, level, message = found.groups()
    if numbers:
        moment = tuple(map(int, numbers.split(",")))
        day = "%04d-%02d-%02d" % moment[:3]
        clock = "%02d:%02d:%02d" % moment[3:]
    return Entry(offset, day, clock, level, message.strip())


DEPLOYMENT_COLUMNS = "unit_id nickname site tier status start_ts end_ts note".split()
STATUSES = ("deployed", "en_route", "lab_check")
_ABSENT = {**dict.fromkeys(DEPLOYMENT_COLUMNS, ""), "tier": "10", "status": STATUSES[0]}         # for missing columns
_SIMPLE = {"deploy_date": "start_ts", "bring_back_date": "end_ts"}      # names in the older table
_INSTANT = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2})"
                      r"(?:[T ]([0-9]{1,2}:[0-9]{2})(:[0-9]{2})?(?:\.[0-9]+)?(?:Z|([+-])([0-9]{2}:[0-9]{2}))?)?\Z")


def parse_instant(text, what):
    """UTC seconds of an ISO date or date-time, as in 2026-10-01 0:00 or with ...+02:00 too; None for an empty one."""
    if not text:
        return None
    found = _INSTANT.match(text)
    if found:
        day, minutes, seconds, sign, ahead = found.groups()
        clock = (minutes or "0:00").zfill(5) + (seconds or ":00")
        with suppress(Rejected):
            east = parse_clock((ahead or "00:00") + ":00")
            return parse_day(day) + parse_clock(clock) - (-east if sign == "-" else east)
    raise Rejected(f"{what} is no ISO date: {text[:40]}")


def cells_of(raw):
    """The cells of a line of a table that people write, without the blanks around them. Cells may be quoted; a quote
    that is not closed spoils its own line only. Text that is not UTF-8 is taken for a spreadsheet's (Windows-1252)."""
    import csv                                                  # only who changes the table needs it
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", "replace")
    text = text.strip("\r\n")
    if _CONTROL.search(text):
        raise Rejected("UTF-16 text: save the table as UTF-8" if "\0" in text else "control character")
    try:
        cells = next(csv.reader([text], delimiter="\t", strict=True), [])
    except csv.Error:
        raise Rejected("a quote that is not closed, or not doubled")
    return [cell.strip() for cell in cells]


def parse_header(cells):
    """The columns of a table of deployments."""
    if len(cells) < 2:
        raise Rejected("no tabs in the header line")
    columns = [_SIMPLE.get(cell.lower(), cell.lower()) for cell in cells]
    if "unit_id" not in columns:
        raise Rejected("no column unit_id in the header line")
    return columns


def parse_deployment(cells, columns):
    """The row of a deployment without source and offset."""
    if any(cells[len(columns):]):
        raise Rejected("more fields than columns")
    fields = {**_ABSENT, **dict(zip(columns, cells))}
    if not _UNIT_ID.match(fields["unit_id"]):
        raise Rejected("no hardware id")
    if not re.fullmatch("(-?[0-9]{1,6})?", fields["tier"]):
        raise Rejected("tier is not a number")
    fields["status"] = fields["status"].lower()
    if fields["status"] not in ("", *STATUSES):
        raise Rejected("status is none of " + ", ".join(STATUSES))
    ends = []
    for name in ("start_ts", "end_ts"):
        ts = parse_instant(fields[name], name)
        ends.append(ts)
        if ts is not None:              # the same text for the same time, however people wrote it
            fields[name] = seqfile.utc(ts).removesuffix("T00:00:00")
    since, until = ends
    if None not in ends and until < since:
        raise Rejected("ends before it begins")
    return *[fields[column] or None for column in DEPLOYMENT_COLUMNS], since, until


# -- columns ----------------------------------------------------------------------------------------------------------
# Many plain lines at once: the same rows as `parse_reading` gives, five times as fast, because no step is taken for a
# single field: a text is looked up, not converted, and each step goes through a whole column inside the interpreter.
#
# Each field with a number is looked up as a *code*. Codes can be added up: the one sum of a line tells all about it.
#
#     temp    flashes   ten values
#     4.5     0         0    200010 None   400   410   400   400   410   410   400
#     0       0         ODD  ODD    MISSED 400   410   400   400   410   410   400      sum: 2 ODD + 1 MISSED + 2830
#
# So seven values are usable, their mean is 2830 / 7, one is missing, and the row's bits are QC_SOME_CO2. What any of
# the few thousand different sums means is worked out once (`meaning`). A sum of BROKEN or more holds a field that is no
# number: that line is left to `parse_reading`, as are those of another width, unit or nickname, or of a strange time.

ODD = 1 << 28                           # more than ten values of seven digits
MISSED = ODD << 4                       # there are at most ten of each
OF_TEMP = MISSED << 4                   # times the bits of `qc` for the temperature
BROKEN = OF_TEMP << 20                  # `qc` has at most 20 bits
NEVER = -FOREVER
MOST_TEXTS = 1 << 16                    # that a table remembers; no sensor has so many values


class Lookup(dict):
    """What a function makes of a text (or a sum), worked out once for each."""

    def __init__(self, function, rejected=None):
        self.function = function
        self.rejected = rejected        # the value of what the function rejects

    def __missing__(self, key):
        try:
            value = self.function(key)
        except Rejected:
            return self.rejected
        if len(self) >= MOST_TEXTS:
            self.clear()
        self[key] = value
        return value

    def column(self, keys):
        """The values of a column."""
        return list(map(self.__getitem__, keys))


PLAIN_COLUMNS = ["date", "time", "temp", "flash_count", *CO2, "ts", "co2", "co2_flag", "temp_flag", "qc"]


class Cut(NamedTuple):
    """Plain lines as columns: all of one unit and nickname."""

    unit: str
    nickname: str | None
    width: int                          # fields of each
    odd: list[int]                      # the numbers of the other lines among those that were given
    times: list[int]                    # UTC seconds
    columns: list[list]                 # in the order of PLAIN_COLUMNS, then the raw values that there are

    def column(self, name):
        """The values of a column; None for raw values that the lines do not have."""
        columns = dict(zip([*PLAIN_COLUMNS, *RAW], self.columns))
        return columns.get(name, [None] * len(self.times))


def meaning(code):
    """co2, co2_flag, temp_flag and qc of a line with this sum."""
    total = code % ODD
    odd = code // ODD % 16
    missing = code // MISSED % 16
    usable = len(CO2) - odd - missing
    qc = co2_bits(usable, missing) | code // OF_TEMP
    return total / usable if usable else None, co2_flag(qc), temp_flag(qc), qc


class Columns:
    """Cuts lines of readings into columns."""

    def __init__(self, rules):
        self.limits = rules.limits
        self.latest = rules.latest
        self.days = Lookup(lambda text: instant(text, "00:00:00", rules.limits), NEVER)
        self.clocks = Lookup(parse_clock, NEVER)
        self.temps = Lookup(parse_temp)
        self.flashes = Lookup(parse_flashes)
        self.ppm = Lookup(parse_integer)
        self.raws = Lookup(parse_raw)
        self.temp_codes = Lookup(lambda text: temp_bits(parse_temp(text), rules.limits) * OF_TEMP, BROKEN)
        self.flash_codes = Lookup(self._code_of_flashes, BROKEN)
        self.ppm_codes = Lookup(self._code_of_ppm, BROKEN)
        self.meanings = Lookup(meaning)

    def _code_of_flashes(self, text):
        parse_flashes(text)
        return 0

    def _code_of_ppm(self, text):
        ppm = parse_integer(text)
        if ppm is None:
            return MISSED
        if ppm < 0:
            return BROKEN                                       # it cannot be added up with others
        return ppm if is_usable(ppm, self.limits) else ODD

    def cut(self, lines):
        """The plain ones of these lines (bytes as Latin-1, without their ends); None: there are hardly any."""
        usual = _usual(lines)
        if not usual:
            return None
        unit, nick, _, *values = usual
        width = len(usual)
        undated = "\t".join([unit, nick, "", *values])          # stands for lines of another width
        plain = [line if line.count("\t") == width - 1 else undated for line in lines]
        fields = "\t".join(plain).split("\t")
        units, nicks, days, clocks, temps, flashes, *rest = [fields[at::width] for at in range(width)]
        ten = rest[:len(CO2)]
        codes = list(map(self.ppm_codes.column, ten))
        sums = list(map(sum, zip(self.temp_codes.column(temps), self.flash_codes.column(flashes), *codes)))
        times = list(map(operator.add, self.days.column(days), self.clocks.column(clocks)))
        values = [self.temps.column(temps), self.flashes.column(flashes)]
        for column, known in zip(ten, codes):                   # codes of usable values are the values
            values.append(known if sum(known) < ODD else self.ppm.column(column))
        raws = list(map(self.raws.column, rest[len(CO2):][:len(RAW)]))
        columns = [days, clocks, *values, times, sums, *raws]
        odd = [at for at, (code, ts) in enumerate(zip(sums, times)) if code >= BROKEN or not 0 <= ts <= self.latest]
        for column, same in ((units, unit), (nicks, nick)):
            if column.count(same) != len(lines):
                odd += [at for at, name in enumerate(column) if name != same]
        if width > NEEDED:
            odd += [at for at, line in enumerate(plain) if line.find(_PREFIX, 1) > 0]
        odd = sorted(set(odd))
        if len(odd) == len(lines):
            return None
        take_out(odd, columns)
        at = PLAIN_COLUMNS.index("co2")
        meanings = self.meanings.column(sums)
        columns[at:at + 1] = [list(map(operator.itemgetter(part), meanings)) for part in range(4)]
        name = nickname(nick.encode("latin-1").decode("utf-8", "replace"))
        return Cut(unit, name, width, odd, times, columns)


def take_out(numbers, columns):
    """Delete the items with these numbers, which are few, from each column."""
    for column in columns:
        for number in reversed(numbers):
            del column[number]


def _usual(lines):
    """The fields of the first line from the middle on that looks plain; None when none of a few does."""
    middle = len(lines) // 2
    for line in lines[middle:middle + 9]:
        fields = line.split("\t")
        if len(fields) >= NEEDED and _UNIT_ID.match(fields[0]) and not _CONTROL.search(fields[1]):
            return fields
    return None


# -- reading a source -------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A text file to be imported."""

    key: str                            # path in the ledger: below the archive, the same wherever the archive lies
    path: str
    kind: str                           # of FORMATS
    unit_id: str                        # "" where there is none
    size: int
    ctime: float                        # of its last change; unlike the mtime, a copying program cannot set it
    until: int | None = None            # byte up to which to read; None: to its end

    @property
    def id(self):
        """A number, the same for the same key in every database."""
        raw = self.key.encode()                                 # hashlib would bring 4 MB of OpenSSL for this
        return zlib.crc32(raw) << 20 | zlib.crc32(raw[::-1]) & 0xfffff


class Account:
    """The row of a source in the ledger (table `sources`). Its attributes are the columns, in their order."""

    inside = False                      # `done` is not at the begin of a line; this alone is no column

    def __init__(self, source):
        self.id = source.id
        self.path = source.key
        self.kind = source.kind
        self.unit_id = source.unit_id
        self.size = 0                   # bytes of the file when it was read last
        self.done = 0                   # bytes that were imported or rejected
        self.lines = 0                  # in these
        self.imported = 0               # rows, without repeats
        self.repeated = 0               # rows
        self.rejected = 0               # rows in `rejects`
        self.imported_bytes = 0
        self.rejected_bytes = 0
        self.ctime = 0.0                # of the file when it was read last
        self.checksum = 0               # of the bytes that are done
        self.last_ts: int | None = None         # time of the last good line
        self.extra_fields = 0           # behind those that are known
        self.trouble: str | None = None         # why the last try failed


ACCOUNT_COLUMNS = list(vars(Account(Source("", "", "", "", 0, 0.0))))


def complete_blocks(file, account, end):
    """What is new in a binary file up to byte `end`, as blocks (bytes) of complete lines. What has no newline within
    LONGEST_LINE bytes comes in pieces of that size. Whoever takes a block moves the account on."""
    file.seek(max(0, account.done - 1))
    account.inside = account.done > 0 and file.read(1) != b"\n"
    rest = b""
    for start in range(account.done, end, BYTES_AT_ONCE):
        rest += file.read(min(BYTES_AT_ONCE, end - start))
        complete = rest.rfind(b"\n") + 1
        complete += (len(rest) - complete) // LONGEST_LINE * LONGEST_LINE
        if complete:
            account.checksum = zlib.crc32(rest[:complete], account.checksum)
            yield rest[:complete]
            rest = rest[complete:]


_LINE_OR_PIECE = re.compile(rb"(?s)[^\n]{0,%d}." % (LONGEST_LINE - 1))


def lines_of(pieces, account):
    """The Lines that follow; the account moves along."""
    for raw in pieces:
        is_ended = raw.endswith(b"\n")
        line = Line(account.lines + 1, account.done, raw, TOO_LONG if account.inside or not is_ended else "")
        account.lines += 1
        account.done += len(raw)
        account.inside = not is_ended
        yield line


def insert_sql(table, columns):
    """A statement for one row."""
    places = ", ".join("?" * len(columns))
    return f"INSERT INTO {table}({', '.join(columns)}) VALUES ({places})"


FEW = 1000                              # bytes; so few lines are not worth being cut into columns
MOST_WAITING = 1000                     # rows and rejected lines that are kept in memory


class Reader:
    """Reads what is new in one source into the database. A format names one of `by_line`, `as_log` and `as_table`; each
    deals with every byte up to the end of the last complete line."""

    def __init__(self, run, source, account):
        self.run = run                  # an Import
        self.db = run.db
        self.source = source
        self.id = source.id
        self.account = account
        self.format = FORMATS[source.kind]
        self.rows: list[tuple] = []
        self.rejects: list[list] = []
        self.unfollowed: list[list] = []                        # rejected lines behind which no good one has come yet
        self.left_unfollowed = account.rejected > 0             # there may be such in the database

    def read(self, file, end):
        """Import what is new up to byte `end`."""
        try:
            self.format.read(self, file, end)
        finally:
            self.flush()

    def by_line(self, file, end):
        """Lines that are judged one by one; of readings many plain ones at once."""
        for block in complete_blocks(file, self.account, end):
            if self.source.kind != "readings" or not self._take_columns(block):
                for line in lines_of(_LINE_OR_PIECE.findall(block), self.account):
                    self._take_line(line)

    def as_log(self, file, end):
        """An error log: entries of several lines."""
        entry = None
        try:
            for block in complete_blocks(file, self.account, end):
                for line in lines_of(_LINE_OR_PIECE.findall(block), self.account):
                    try:
                        entry = self._take_log_line(line, entry)
                    except Rejected as why:
                        self._reject(line, why)
        finally:
            self._finish_entry(entry)

    def _take_log_line(self, line, entry):
        """The entry to which further lines belong; Rejected for a line that belongs to none."""
        text = decode_log(line.content())
        begun = parse_headline(text, line.offset)
        if begun:
            self._finish_entry(entry)
            if begun.day.startswith("1970"):                    # the time of the nearest earlier dated entry
                begun.inferred = entry.inferred if entry else (None, None, None)
            self.account.imported += 1
        elif entry:
            entry.add(text)
        else:
            raise Rejected("before the first headline")
        self.account.imported_bytes += len(line.raw)
        return begun or entry

    def _finish_entry(self, entry):
        if entry:
            self._insert(entry.row(self.source.unit_id), entry.offset)

    def as_table(self, file, end):
        """A table that people write: with a header line, with any ends of lines, complete without a last newline."""
        data = file.read(end)
        self.account.checksum = zlib.crc32(data)
        columns = []
        refused = ""                    # why the header line cannot be used: the same holds for all that follow
        for line in lines_of(data.splitlines(keepends=True), self.account):
            try:
                columns = self._take_table_line(line._replace(refused=refused), columns)
            except Rejected as why:
                refused = "" if columns else str(why)
                self._reject(line, why)

    def _take_table_line(self, line, columns):
        """The columns of the table, empty before its header line."""
        raw = line.content()
        if raw.strip() and not raw.lstrip(b"\xef\xbb\xbf ").startswith(b"#"):
            cells = cells_of(raw)
            if not columns:
                columns = parse_header(cells)
            elif any(cells):
                self._insert(parse_deployment(cells, columns), line.offset)
                self.account.imported += 1
        self.account.imported_bytes += len(raw)
        return columns

    def _take_line(self, line):
        """Judge a line, or its parts, each alone."""
        for part in self.format.parts(line):
            try:
                row = self.format.parse(part.content(), self.run.rules)
            except Rejected as why:
                self._reject(part, why)
            else:
                self._passed([self._insert(row, part.offset)])
                self.account.imported += 1
                self.account.imported_bytes += len(part.raw)
                fields = part.raw.count(b"\t") + 1
                self.account.extra_fields += max(0, fields - self.format.fields)

    def _take_columns(self, block):
        """Plain lines by column, between them the others one by one; whether there were plain ones."""
        account = self.account
        lines = block.decode("latin-1").split("\n")
        rest = lines.pop()                                      # behind the last newline
        if len(block) < FEW or account.inside or rest or max(map(len, lines)) >= LONGEST_LINE:
            return False
        number, begin = account.lines + 1, account.done
        ends = accumulate(map(len, lines), initial=begin)       # newlines left out
        offsets = list(map(operator.add, ends, count()))
        if b"\r" in block:
            lines = [line[:-1] if line.endswith("\r") else line for line in lines]
        cut = self.run.columns.cut(lines)
        if cut is None:
            return False
        account.lines += len(lines)
        account.done += len(block)
        account.imported += len(cut.times)
        account.imported_bytes += len(block)
        account.extra_fields += len(cut.times) * max(0, cut.width - KNOWN)
        good = 0                        # plain lines that were passed
        for before, index in enumerate(cut.odd):
            self._passed(cut.times[good:index - before])
            good = index - before
            raw = block[offsets[index] - begin:offsets[index + 1] - begin]
            account.imported_bytes -= len(raw)                  # it is judged alone
            self._take_line(Line(number + index, offsets[index], raw))
        self._passed(cut.times[good:])
        offsets.pop()
        take_out(cut.odd, [offsets])
        columns = [*PLAIN_COLUMNS, *RAW][:len(cut.columns)]
        insert = insert_sql(self.format.table, ["unit_id", "nickname", "source", *columns, "offset"])
        same = [repeat(cut.unit), repeat(cut.nickname), repeat(self.id)]
        self.db.executemany(insert, zip(*same, *cut.columns, offsets))
        if self.run.days:
            self.run.days.add(cut)
        else:
            self.run.news[self.source.kind, cut.unit].update(ts // DAY for ts in cut.times)
        return True

    def _insert(self, row, offset):
        """Keep a row; its time, None where it has none."""
        columns = self.format.columns
        ts = row[columns.index("ts")] if "ts" in columns else None
        if ts is not None:
            self.run.news[self.source.kind, row[columns.index("unit_id")]].add(ts // DAY)
        self._keep(self.rows, (*row, self.id, offset))
        return ts

    def _passed(self, times):
        """Good lines with these times came: the first is behind the rejected lines so far."""
        if not times:
            return
        for reject in self.unfollowed:
            reject[-1] = times[0]
        self.unfollowed.clear()
        if self.left_unfollowed:
            self.db.execute("UPDATE rejects SET after_ts = ? WHERE source = ? AND after_ts IS NULL",
                            (times[0], self.id))
            self.left_unfollowed = False
        self.account.last_ts = times[-1]

    def _reject(self, line, why):
        reason = "two lines glued together" if line.is_glued else str(why)
        self.account.rejected += 1
        self.account.rejected_bytes += len(line.raw)
        self.run.summary.rejected[reason] += 1
        shown = self.format.clean(line.raw[:1000].decode("latin-1"))
        text = shown.encode("unicode_escape").decode("ascii")
        reject = [self.id, line.number, line.offset, len(line.raw), reason, text, self.account.last_ts, None]
        self.unfollowed.append(reject)
        self._keep(self.rejects, reject)

    def _keep(self, waiting, row):
        waiting.append(row)
        if len(waiting) >= MOST_WAITING:
            self.flush()

    def flush(self):
        """Write what waits in memory."""
        self.db.executemany(insert_sql(self.format.table, [*self.format.columns, "source", "offset"]), self.rows)
        self.db.executemany("INSERT INTO rejects VALUES (?, ?, ?, ?, ?, ?, ?, ?)", self.rejects)
        if self.unfollowed:
            self.left_unfollowed = True
        for waiting in (self.rows, self.rejects, self.unfollowed):
            waiting.clear()


# -- sources ----------------------------------------------------------------------------------------------------------
# Which file is what: one row of FORMATS for each kind. A further kind needs its folder in seqfile.SEQUENCES if units
# upload it, a table in SCHEMA (with unit_id, source and offset; its index in INDEXES), a function that parses a line, a
# row here, and one in EXPORTS if people take it elsewhere.
#
# When a row counts twice: where `repeats` names columns, never, unless a text differs in one of these (a line that was
# cut, then sent whole with fields that were unknown). Entries of error logs have no `repeats`: what a unit has replaced
# and then sent again, or what two servers have differently, is there twice.


class Format(NamedTuple):
    """A kind of file, and how it is read."""

    table: str
    columns: list[str]                  # of the rows that are parsed; source and offset follow
    place: re.Pattern[str]              # of its key; the first group is the unit
    folder: str                         # where to look, below each directory of the data directory
    read: Callable                      # a method of Reader
    parse: Callable = parse_reading     # of a line that is judged alone: from bytes and Rules to a row
    fields: int = 0                     # that are known; what is behind them is counted
    is_whole: bool = False              # it is read again from its begin whenever it changes
    repeats: str = ""                   # rows of the same unit and time that agree in these columns count once
    parts: Callable = lambda line: [line]       # the Lines in a Line, which are judged alone
    clean: Callable = str               # of the text of rejected lines


def uploads(folder, match):
    """Where files of a sequence lie that units upload: in their folder, or set aside. `match` is a seqfile.Match."""
    name = f"{re.escape(match.prefix)}[^/]*{re.escape(match.suffix)}(?:{seqfile.ASIDE_ENDING})?"
    return re.compile(rf"data/([^/]+)/(?:{seqfile.SET_ASIDE}/)?{re.escape(folder)}/{name}\Z")


FORMATS = {
    "readings": Format(
        table="co2_readings",
        columns=["unit_id", "nickname", *PLAIN_COLUMNS, *RAW],
        place=uploads(seqfile.READINGS_FOLDER, seqfile.READINGS),
        folder=seqfile.READINGS_FOLDER,
        read=Reader.by_line,
        parts=parts_of,
        fields=KNOWN,
        repeats=", ".join(["temp", "flash_count", *CO2, *RAW])),
    "pings": Format(
        table="pings",
        columns="ping_ts ping_date ping_time unit_id nickname rssi_raw rssi_dbm ts".split(),
        place=re.compile(r"(?:data/[^/]+/)?()var/%s/%s[0-9]+%s\Z" % (
            seqfile.PINGS_FOLDER, *map(re.escape, seqfile.PINGS))),
        folder="var/" + seqfile.PINGS_FOLDER,
        read=Reader.by_line,
        parse=parse_ping,
        fields=5,
        repeats="ping_ts, nickname, rssi_raw, rssi_dbm"),
    "errors": Format(
        table="error_logs",
        columns="unit_id idate itime etype odate otime level message ts text".split(),
        place=uploads(seqfile.ERRORS_FOLDER, seqfile.ERRORS),
        folder=seqfile.ERRORS_FOLDER,
        read=Reader.as_log,
        is_whole=True,
        clean=hide_secrets),
    "deployments": Format(
        table="deploy_durations_tiered",
        columns=[*DEPLOYMENT_COLUMNS, "since", "until"],
        place=re.compile(rf"data/(){seqfile.MANUAL_FOLDER}/deploy_durations(?:_tiered)?\.tsv\Z"),
        folder="",
        read=Reader.as_table,
        is_whole=True)}
TABLES = [each.table for each in FORMATS.values()]
FOLDERS = [each.folder for each in FORMATS.values() if each.folder]
FOLDERS += [f"{seqfile.SET_ASIDE}/{folder}" for folder in FOLDERS]


_SAME_ID = "its name gives the same id as that of %s: rename one of them"


def find_sources(archive, unreadable):
    """All text files of an archive, in no order. What cannot be used is appended to `unreadable` with the reason."""
    for data_dir in archive.data_dirs:
        if len(archive.data_dirs) > 1 and not isdir(data_dir):
            unreadable.append((data_dir, "there is no such directory"))
        for entry in _scan(data_dir, unreadable):
            if entry.is_dir(follow_symlinks=False):
                for folder in FOLDERS:
                    yield from _collect(data_dir, f"{entry.name}/{folder}", unreadable)
        yield from _collect(data_dir, seqfile.MANUAL_FOLDER, unreadable)
    yield from _collect(archive.var_dir, seqfile.PINGS_FOLDER, unreadable, "var/")
    # Of data directories that are merged, HOME/var beside each has the pings of that server; their keys are those of a
    # copy in HOME's name below a data directory.
    for data_dir in archive.data_dirs if len(archive.data_dirs) > 1 else ():
        above, home = os.path.split(dirname(realpath(data_dir)))
        if join(above, home, "var") != realpath(archive.var_dir):
            yield from _collect(above, f"{home}/var/{seqfile.PINGS_FOLDER}", unreadable)


def _scan(directory, unreadable):
    try:
        with os.scandir(directory) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        unreadable.append((directory, error.strerror))


def _collect(root, folder, unreadable, prefix="data/"):
    for entry in _scan(join(root, folder), unreadable):
        source = _source(entry.path, root, prefix)
        if source:
            yield source


def _source(path, root, prefix):
    """The source at a path below a data directory or the server's; None when it is no file of ours, or a link."""
    name = prefix + path[len(root):].lstrip("/")
    key = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")       # whatever its bytes
    for kind, each in FORMATS.items():
        found = each.place.match(key)
        if found:
            break
    else:
        return None
    unit = found[1]
    source = Source(key, path, kind, unit, 0, -1.0)
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError:
        return source                                           # opening it will say why
    if not stat.S_ISREG(status.st_mode):
        return None if unit else source                         # what people put there must not be passed over silently
    return source._replace(size=status.st_size, ctime=status.st_ctime)


def _distinct(same):
    """Of the same file in several data directories the longest; others only where they are not its beginning."""
    longest, *others = sorted(same, key=lambda source: (-source.size, _checksum(source.path, source.size)))
    yield longest
    for other in others:
        checksum = _checksum(other.path, other.size)
        if checksum != _checksum(longest.path, other.size):
            yield other._replace(key=f"{other.key}#{checksum:08x}")


_LISTING = [
    "SAVEPOINT listing",
    "CREATE TEMP TABLE files(key, path, kind, unit_id, size, ctime, until, id)",
    "CREATE INDEX temp.files_by_key ON files(key)"]
_COST = "CASE kind WHEN 'readings' THEN size ELSE 4 * size END"          # the others are read line by line


class Listing:
    """The sources of an archive in order of their keys, in the temporary table `files` of a database: millions take no
    memory."""

    def __init__(self, archive, db):
        self.db = db
        self.unreadable: Troubles = []
        self.disputed: list[str] = []                           # keys of files of which two servers differ
        for statement in _LISTING:
            db.execute(statement)
        self._add(find_sources(archive, self.unreadable))
        for key in ask_all(db, "SELECT key FROM files GROUP BY key HAVING count(*) > 1"):
            versions = list(_distinct(self.between(key, key)))
            if len(versions) > 1:
                self.disputed.append(key)
            db.execute("DELETE FROM files WHERE key = ?", (key,))
            self._add(versions)
        same_ids = db.execute("""
            SELECT f.key, f.path, first.key FROM files f
            JOIN (SELECT id, min(key) AS key FROM files GROUP BY id HAVING count(*) > 1) first ON first.id = f.id
            WHERE first.key < f.key""")
        for key, path, owner in same_ids.fetchall():
            self.unreadable.append((os.fsdecode(path), _SAME_ID % owner))
            db.execute("DELETE FROM files WHERE key = ?", (key,))
        db.execute("""                                          -- the older, simpler table is read only without that
            DELETE FROM files WHERE kind = 'deployments' AND key LIKE '%/deploy_durations.tsv'
            AND EXISTS (SELECT 1 FROM files WHERE kind = 'deployments' AND key LIKE '%\\_tiered.tsv' ESCAPE '\\')""")
        db.execute("RELEASE listing")

    def _add(self, sources):
        rows = ((*source._replace(path=os.fsencode(source.path)), source.id) for source in sources)
        self.db.executemany("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def between(self, first="", last=chr(sys.maxunicode)):
        """The Sources with these keys."""
        query = "SELECT * FROM files WHERE key BETWEEN ? AND ? ORDER BY key"
        return map(source_of, self.db.execute(query, (first, last)))

    def shares(self, processes):
        """The keys cut into ranges that take about the same time: (first key, last key) of each."""
        total = ask(self.db, f"SELECT total({_COST}) FROM files")
        number = max(1, min(processes, MOST_PROCESSES, total // SHARE))
        shares = self.db.execute(f"""
            SELECT min(key), max(key) FROM
                (SELECT key, CAST((sum({_COST}) OVER (ORDER BY key) - {_COST}) * ? AS INTEGER) AS share FROM files)
            GROUP BY share ORDER BY share""", (number / (total + 1),))
        return shares.fetchall() or [("", "")]

    def limit(self, ledger):
        """Keep only what a ledger (rows of path, done) knows, as far as it was read; the keys of what is gone."""
        self.db.execute("CREATE TEMP TABLE known(path TEXT PRIMARY KEY, done INTEGER)")
        self.db.executemany("INSERT INTO known VALUES (?, ?)", ledger)
        self.db.execute("DELETE FROM files WHERE key NOT IN (SELECT path FROM known)")
        self.db.execute("UPDATE files SET until = (SELECT done FROM known WHERE path = key)")
        return ask_all(self.db, "SELECT path FROM known WHERE path NOT IN (SELECT key FROM files) ORDER BY path")


def source_of(row):
    """The Source in a row of `files`."""
    key, path, *others, _ = row
    return Source(key, os.fsdecode(path), *others)


def _checksum(path, size):
    with suppress(OSError), open(path, "rb") as file:
        return _checksum_of(file, size)
    return 0


def _checksum_of(file, size):
    checksum = 0
    for start in range(0, size, BYTES_AT_ONCE):
        checksum = zlib.crc32(file.read(min(BYTES_AT_ONCE, size - start)), checksum)
    return checksum


# -- what depends on other rows ---------------------------------------------------------------------------------------
# Rules that look at neighbours, and rollups. All are made anew where rows came or went, so tables depend on the text
# alone. A time is UTC seconds, a day the number of days since 1970.

_MEANS = f"""
    SELECT ts, co2, qc FROM co2_readings
    WHERE unit_id = ? AND co2 IS NOT NULL AND qc & {QC_ROW} = 0 AND """
# neighbours: of each mean time and value since the one before (waited, rise) and until the one behind (waits, fall:
# positive if that is lower). A spike is what ioos_qc's spike_test (method differential) flags, for neighbours that are
# near. All readings of a flat stretch are flagged, wherever a day begins; a gap inside it counts `gap` at most.
_JUDGE = f"""
    WITH neighbours AS (
        SELECT rowid AS id, ts, co2, qc, ts - lag(ts) OVER near AS waited, co2 - lag(co2) OVER near AS rise,
            lead(ts) OVER near - ts AS waits, co2 - lead(co2) OVER near AS fall
        FROM co2_readings
        WHERE unit_id = :unit AND ts BETWEEN :begin - :gap AND :end + :gap AND co2 IS NOT NULL AND qc & {QC_ROW} = 0
        WINDOW near AS (ORDER BY ts, co2, rowid)),
    stretches AS (
        SELECT *, sum(rise IS NOT 0) OVER (ORDER BY ts, co2, id ROWS UNBOUNDED PRECEDING) AS stretch FROM neighbours)
    SELECT id, judged, ts / {DAY} FROM (
        SELECT id, ts, qc, qc & ~{QC_SPIKE | QC_FLAT}
            | CASE WHEN waited <= :gap AND waits <= :gap AND rise * fall > 0 AND min(abs(rise), abs(fall)) > :spike
                THEN {QC_SPIKE} ELSE 0 END
            | CASE WHEN sum(CASE WHEN rise = 0 THEN min(waited, :gap) END) OVER (PARTITION BY stretch) >= :flat
                THEN {QC_FLAT} ELSE 0 END AS judged
        FROM stretches)
    WHERE judged <> qc AND ts BETWEEN :begin AND :end"""


def judge(db, unit, begin, end, limits):
    """Flag lone spikes and flat stretches between two times (UTC seconds). The days in which a flag changed."""
    bound = {"unit": unit, "begin": begin, "end": end, "gap": limits.spike_gap, "spike": limits.spike,
             "flat": limits.flat_time - JITTER}
    changed = db.execute(_JUDGE, bound).fetchall()
    set_qc(db, changed)
    return {day for _, _, day in changed}


def suspicious_times(times, co2, limits):
    """Times where there may be a spike, and those of what may be flat stretches: too many rather than too few."""
    if None in co2:
        there = [value is not None for value in co2]
        times = list(compress(times, there))
        co2 = list(compress(co2, there))
    found = []
    same = bytes(map(operator.eq, co2[1:], co2))                # 1: as the value before
    for run in re.finditer(rb"\x01+", same):
        if times[run.end()] - times[run.start()] >= limits.flat_time - JITTER:
            found += times[run.start():run.end() + 1]
    if co2 and max(co2) - min(co2) > limits.spike:
        steps = map(abs, map(operator.sub, co2[1:], co2))
        found += [ts for ts, step in zip(times[1:], steps) if step > limits.spike]
    return found


def judge_days(db, unit, first, last, limits):
    """Judge days in which rows came or went, and all readings whose stretch of equal means reaches up to them. The days
    in which a flag changed. So the result does not depend on where a day begins."""
    begin = _end_of_stretch(db, (unit, first * DAY), "ts < ? ORDER BY ts DESC, co2 DESC", limits)
    end = _end_of_stretch(db, (unit, last * DAY + DAY - 1), "ts > ? ORDER BY ts, co2", limits)
    around = (unit, begin - limits.spike_gap, end + limits.spike_gap)
    rows = db.execute(_MEANS + "ts BETWEEN ? AND ? ORDER BY ts, co2", around).fetchall()
    if rows:
        times, co2, bits = zip(*rows)
        is_flagged = any(qc & (QC_SPIKE | QC_FLAT) for qc in bits)
        if is_flagged or suspicious_times(times, co2, limits):
            return judge(db, unit, begin, end, limits)
    return set()


def _end_of_stretch(db, edge, beyond, limits):
    """Time of the last reading beyond an edge (unit, time) that belongs to the first stretch of equal means there; what
    is behind enough of them to be flat was judged before."""
    _, end = edge
    means = set()
    lasted = 0
    for ts, co2, _ in db.execute(_MEANS + beyond, edge):
        means.add(co2)
        if len(means) > 1 or lasted > limits.flat_time + limits.spike_gap:
            break
        lasted += min(abs(ts - end), limits.spike_gap)
        end = ts
    return end


def set_qc(db, changed):
    """New bits for readings, and the flags that follow from them. A row begins with rowid, bits."""
    rows = [(qc, co2_flag(qc), temp_flag(qc), rowid) for rowid, qc, *_ in changed]
    db.executemany("UPDATE co2_readings SET qc = ?, co2_flag = ?, temp_flag = ? WHERE rowid = ?", rows)


def sum_of(values, bits, bad):
    """The SUMS of a quantity on a day. `bad` are the bits of `qc` that make a value suspect."""
    odd = ()
    if max(bits) > QC_SOME_CO2:                                 # else that bit is the only one: all are usable
        pairs = zip(values, bits)
        there = [(value, qc) for value, qc in pairs if value is not None and not qc & QC_ROW]
        values = [value for value, qc in there if not qc & bad]
        odd = [value for value, qc in there if qc & bad]
    total = math.fsum(values) if values else None               # exact, so that the order does not matter
    return (
        len(values), total, min(values, default=None), max(values, default=None),
        len(odd), min(odd, default=None), max(odd, default=None))


_OF_READINGS = ["ts", "qc", *SUSPECT_BITS]      # of a reading: what its day is made from


def day_of(times, bits, *quantities):
    """The row of `daily` for the readings of a day, without the unit."""
    sums = []
    for values, bad in zip(quantities, SUSPECT_BITS.values()):
        sums += sum_of(values, bits, bad)
    first, last = times[0], times[-1]
    longest = max(map(operator.sub, times[1:], times), default=0)
    return first // DAY, len(times), *sums, first, last, longest


def roll_up(db, unit, first, last):
    """Make the rollup of these days from the readings."""
    rows = []
    readings = db.execute(f"""
        SELECT ts / {DAY}, {", ".join(_OF_READINGS)} FROM co2_readings INDEXED BY readings_by_unit
        WHERE unit_id = ? AND ts >= ? AND ts < ? ORDER BY ts""", (unit, first * DAY, (last + 1) * DAY))
    for _, of_day in groupby(readings, operator.itemgetter(0)):
        _, *columns = zip(*of_day)
        rows.append((unit, *day_of(*columns)))
    db.execute("DELETE FROM daily WHERE unit_id = ? AND day BETWEEN ? AND ?", (unit, first, last))
    db.executemany(insert_sql("daily", DAILY), rows)


def runs_of(days):
    """(first, last) of the days of each week in which some are."""
    for _, group in groupby(sorted(days), lambda day: day // 7):
        week = list(group)
        yield week[0], week[-1]


# In a new database all is new. To read all readings once more would take a third of the time of an import, so rollups
# are made of the columns of cuts, as they come. Days that may not be complete, or that may hold a spike or a flat
# stretch, are *open*: they have n = -1 in `daily` until they are settled from the readings.

OPEN = -1
_OR_OPEN = f" ON CONFLICT(unit_id, day) DO UPDATE SET n = {OPEN}"


class Days:
    """Makes the rollups of a new database. Open become: the first day and the last of a unit (of each run of cuts that
    follow each other), days that come twice, and suspicious ones."""

    def __init__(self, db, limits):
        self.db = db
        self.limits = limits
        # The last two days of the cut before: its unit; the columns _OF_READINGS. The last day is not in `daily` yet.
        self.kept = "", {}

    def open(self, unit, days):
        """These days of a unit are to be settled."""
        insert = insert_sql("daily", ["unit_id", "day", "n"]) + _OR_OPEN
        self.db.executemany(insert, [(unit, day, OPEN) for day in days])

    def add(self, cut):
        """Take the days of a Cut; its last one may go on in the next cut."""
        columns = {name: cut.column(name) for name in _OF_READINGS}
        unit, before = self.kept
        if unit == cut.unit and before["ts"][-1] < cut.times[0]:
            day = before["ts"][-1] // DAY
            columns = {name: before[name] + new for name, new in columns.items()}
        else:
            self.finish()
            day = cut.times[0] // DAY + 1
            self.open(cut.unit, [day - 1])
        times = columns["ts"]
        if any(map(operator.ge, times, times[1:])):             # not in order, or a time comes twice
            newest = accumulate(times, max)
            late = [at for at, (ts, before) in enumerate(zip(times[1:], newest), 1) if ts <= before]
            self.open(cut.unit, {times[at] // DAY for at in late})
            take_out(late, columns.values())
        rows = []
        begin = bisect_left(times, day * DAY)
        last_day = bisect_left(times, times[-1] // DAY * DAY)
        while begin < last_day:
            end = bisect_left(times, (times[begin] // DAY + 1) * DAY, begin)
            of_day = [column[begin:end] for column in columns.values()]
            rows.append((cut.unit, *day_of(*of_day)))
            begin = end
        self.db.executemany(insert_sql("daily", DAILY) + _OR_OPEN, rows)
        suspicious = suspicious_times(times, columns["co2"], self.limits)
        self.open(cut.unit, {ts // DAY for ts in suspicious})
        two_days = bisect_left(times, (times[-1] // DAY - 1) * DAY)
        self.kept = cut.unit, {name: column[two_days:] for name, column in columns.items()}

    def finish(self):
        """No cut follows that goes on with the last day."""
        unit, columns = self.kept
        if unit:
            self.open(unit, [columns["ts"][-1] // DAY])
        self.kept = "", {}


# -- importing --------------------------------------------------------------------------------------------------------


class Summary:
    """What an import did."""

    def __init__(self):
        self.files = 0
        self.rows = Counter()           # by kind
        self.repeated = 0
        self.rejected = Counter()       # by reason
        self.unreadable: Troubles = []
        self.hidden: Troubles = []      # of these, directories: their files are not known
        self.disputed: list[str] = []   # files of which two servers have different versions

    @classmethod
    def of_new(cls, db):
        """What is in a new database."""
        new = cls()
        for kind, imported, repeated, files in db.execute(
                "SELECT kind, sum(imported), sum(repeated), sum(trouble IS NULL) FROM sources GROUP BY kind"):
            new.rows[kind] = imported
            new.repeated += repeated
            new.files += files
        new.rejected.update(dict(db.execute("SELECT reason, count(*) FROM rejects GROUP BY reason")))
        new.unreadable += db.execute("SELECT path, trouble FROM sources WHERE trouble IS NOT NULL").fetchall()
        return new

    def __str__(self):
        rows = [f"{self.rows[kind]} {kind}" for kind in FORMATS]
        lines = [f"{self.files} files, " + ", ".join(rows)]
        if self.repeated:
            lines.append(f"{self.repeated} exact repeats")
        lines += [f"{n:6} rejected: {reason}" for reason, n in self.rejected.most_common()]
        lines += [f"two versions of {_printable(key)}: both are kept" for key in self.disputed]
        lines += [f"could not read {_printable(path)}: {why}" for path, why in self.unreadable]
        return "\n".join(lines)


_SET_ACCOUNT = f"INSERT OR REPLACE INTO sources({', '.join(ACCOUNT_COLUMNS)}) VALUES (:{', :'.join(ACCOUNT_COLUMNS)})"


class Import:
    """One run into an open database; the caller's transaction makes it atomic."""

    def __init__(self, db, rules, progress, is_new=False):
        self.db = db
        self.days = Days(db, rules.limits) if is_new else None  # the database is empty, and has no indexes yet
        self.rules = rules
        self.progress = progress        # called with numbers of bytes, or None
        self.columns = Columns(rules)
        self.news = defaultdict(set)    # (kind, unit) -> days in which rows came or went
        self.again = set()              # ids of sources to be read from the start: they may hold repeats of what went
        self.changes = db.total_changes
        self.summary = Summary()

    def take(self, sources):
        """Import what is new in these Sources."""
        for source in sources:
            self.take_one(source)
            if self.progress:
                self.progress(source.size)
            if self.days:
                for (kind, unit), days in self.news.items():
                    if kind == "readings":
                        self.days.open(unit, days)
                self.news.clear()
        if self.days:
            self.days.finish()

    def forget(self, source):
        """Take out the rows of a source, and its account: the file is gone, or is read again."""
        self._remove_rows(source)
        self.db.execute("DELETE FROM sources WHERE id = ?", (source.id,))

    def account(self, source):
        """The Account of a source; that of another source if there is one with the same id."""
        account = Account(source)
        row = self.db.execute("SELECT * FROM sources WHERE id = ?", (source.id,)).fetchone()
        if row:
            vars(account).update(zip(ACCOUNT_COLUMNS, row))
        return account

    def take_one(self, source):
        """Import what is new in a source. Whatever fails is recorded with it, and it is tried again the next time."""
        account = self.account(source)
        if account.path != source.key:
            self.summary.unreadable.append((source.key, _SAME_ID % account.path))
            return
        if (account.size, account.ctime) == (source.size, source.ctime):
            return
        imported = account.imported
        kept = self.days and self.days.kept
        trouble = ""
        self.db.execute("SAVEPOINT source")
        try:
            with open(source.path, "rb", opener=_open_no_link) as file:
                size = os.fstat(file.fileno()).st_size if source.until is None else source.until
                is_whole = FORMATS[source.kind].is_whole
                # Read from the start: what is always read whole, has become shorter, or begins differently.
                if is_whole or size < account.done or _checksum_of(file, account.done) != account.checksum:
                    if account.lines:
                        self._remove_rows(source)
                    account = Account(source)
                    imported = 0
                Reader(self, source, account).read(file, size)
            account.size, account.ctime, account.trouble = size, source.ctime, None
        except sqlite3.Error:                                   # the database's trouble, not this source's
            raise
        except OSError as error:                                # what was read before it stays
            trouble = "a link, which is not followed" if error.errno == errno.ELOOP else error.strerror
        except Exception as error:
            self.db.execute("ROLLBACK TO source")
            account = self.account(source)
            imported = account.imported
            if self.days:
                self.days.kept = kept
            trouble = f"{error!r} at {place_of(error)}"
        self.db.execute("RELEASE source")
        self.summary.rows[source.kind] += account.imported - imported
        if trouble:
            account.trouble = trouble + "; it is tried again each time"
            account.size, account.ctime = source.size, 0.0      # never the time of a file
            self.summary.unreadable.append((source.key, account.trouble))
        else:
            self.summary.files += 1
        self.db.execute(_SET_ACCOUNT, vars(account))

    def _remove_rows(self, source):
        """Take out the rows of a source, and have the files read again that may hold repeats of them."""
        gone = self._delete(source, "source = ? AND unit_id = ?", source.unit_id)
        if gone < self.account(source).imported:                # others are of other units: no index leads there
            self._delete(source, "source = ?")
        if FORMATS[source.kind].repeats:
            others = "SELECT id FROM sources WHERE repeated > 0 AND kind = ? AND id <> ?"
            self.again.update(ask_all(self.db, others, source.kind, source.id))
        self.db.execute("DELETE FROM rejects WHERE source = ?", (source.id,))

    def _delete(self, source, which, *values):
        """Take out rows of a source; how many there were."""
        rows = f"FROM {FORMATS[source.kind].table} WHERE {which}"
        bound = (source.id, *values)
        if "ts" in FORMATS[source.kind].columns:
            for unit, day in self.db.execute(f"SELECT DISTINCT unit_id, ts / {DAY} {rows} AND ts NOT NULL", bound):
                self.news[source.kind, unit].add(day)
        return self.db.execute("DELETE " + rows, bound).rowcount

    def release_future(self):
        """Readings whose time has come since are no longer dated in the future."""
        rows = self.db.execute(f"""
            SELECT rowid, qc & ~{QC_FUTURE}, unit_id, ts / {DAY} FROM co2_readings
            WHERE qc & {QC_FUTURE} AND ts <= ?""",
            (self.rules.latest,)).fetchall()
        set_qc(self.db, rows)
        for _, _, unit, day in rows:
            self.news["readings", unit].add(day)

    def settle(self):
        """After all was read: repeats, rules on neighbours, rollups, and what has changed."""
        self._settle_news()
        if self.db.total_changes > self.changes:
            self.db.execute("UPDATE last_import SET at = ?, mark = mark + 1", (self.rules.now,))
        for (_, unit), changed in self.news.items():
            days = [(unit, day) for day in changed]
            self.db.executemany("INSERT OR REPLACE INTO changes SELECT ?, ?, mark FROM last_import", days)

    def settle_all(self):
        """The same in a new database, into which other databases may have been copied."""
        for unit, day in self.db.execute(f"SELECT unit_id, day FROM daily WHERE n = {OPEN}"):
            self.news["readings", unit].add(day)
        self._settle_news()
        for kind, each in FORMATS.items():
            if kind != "readings":
                for unit in _units_in(self.db, each.table):
                    self._drop_repeats(kind, unit, -FOREVER, FOREVER)
        self.db.execute("UPDATE last_import SET at = ?, mark = 1", (self.rules.now,))

    def _settle_news(self):
        """What depends on other rows, in days in which rows came or went. Days in which flags changed are added."""
        for (kind, unit), days in sorted(self.news.items()):
            for first, last in runs_of(days):
                self._drop_repeats(kind, unit, first * DAY, last * DAY + DAY - 1)
            if kind == "readings":
                for first, last in runs_of(days):
                    days |= judge_days(self.db, unit, first, last, self.rules.limits)
                for first, last in runs_of(days):
                    roll_up(self.db, unit, first, last)

    def _drop_repeats(self, kind, unit, first, last):
        """Of exact repeats between two times leave the one with the smallest (source, offset)."""
        table, same = FORMATS[kind].table, FORMATS[kind].repeats
        if not same:
            return
        bound = {"unit": unit, "first": first, "last": last}
        repeats = self.db.execute(f"""
            SELECT id, source FROM (
                SELECT rowid AS id, source, row_number() OVER (PARTITION BY ts, {same} ORDER BY source, offset) AS n
                FROM {table} WHERE unit_id = :unit AND ts IN (
                    SELECT ts FROM {table} WHERE unit_id = :unit AND ts BETWEEN :first AND :last
                    GROUP BY ts HAVING count(*) > 1))
            WHERE n > 1""", bound).fetchall()
        self.db.executemany(f"DELETE FROM {table} WHERE rowid = ? AND source = ?", repeats)
        self.db.executemany("UPDATE sources SET imported = imported - 1, repeated = repeated + 1 WHERE id = ?",
                            [(source,) for _, source in repeats])
        self.summary.rows[kind] -= len(repeats)
        self.summary.repeated += len(repeats)


def _open_no_link(path, flags):
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


# -- the database -----------------------------------------------------------------------------------------------------


# Rows are written to a new database, or in write-ahead mode: readers see the old state or the new one, and wait for
# nobody. Who may not write there can read in that mode only while somebody who may has the database open, so that -wal
# and -shm are there: the daemon keeps it open (`KeptOpen`). Whoever closes it last leaves it in the mode DELETE, which
# needs no such files.


def _connect(path, how):
    """A connection to a database that is there; `how` is an option of SQLite's URIs."""
    name = abspath(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return sqlite3.connect(f"file:{name}?{how}", uri=True, timeout=PATIENCE)


def _connected(path):
    """A connection that may write, for a `with`; the file is made if it is missing."""
    return closing(sqlite3.connect(path, isolation_level=None, timeout=PATIENCE))


@contextmanager
def open_db(path):
    """A connection that only reads, for a `with`. Temporary tables are possible. NoDatabase when there is none yet;
    Unusable when it cannot be read, also later on."""
    try:
        is_fixed = os.statvfs(path).f_flag & os.ST_RDONLY
    except FileNotFoundError:
        raise NoDatabase(f"no database yet: {path} (importer makes it)")
    except OSError as error:
        raise Unusable(f"{path} cannot be read: {error.strerror}")
    has_log = exists(path + "-wal")
    try:
        with closing(_connect(path, "immutable=1" if is_fixed and not has_log else "mode=ro")) as db:
            if ask(db, "SELECT user_version FROM pragma_user_version") != SCHEMA_VERSION:       # reads the schema, too
                raise sqlite3.DatabaseError("made by another version")
            # Else SQLite makes an index of all readings for a page of some hundred columns.
            db.execute("PRAGMA automatic_index = OFF")
            yield db
    except sqlite3.Error as error:
        reason = "importer rebuild makes it anew"
        if re.search("locked|full", str(error)):
            reason = "try again when there is room, and no other program holds it"
        if "unable to open" in str(error):
            reason = "it is no file, or this user may not read it"
            if has_log:
                reason = "it was left open; start co2d, or let its owner run importer"
        raise Unusable(f"{path} cannot be read ({error}): {reason}")


def _leave(db):
    """The mode DELETE, unless others have the database open: then they will leave it so. Not for a file that was
    replaced: SQLite would remove the -wal of the new one."""
    with suppress(sqlite3.Error):
        db.rollback()
        db.executescript("PRAGMA busy_timeout = 0; PRAGMA journal_mode = DELETE")


class KeptOpen:
    """Keeps a database open for others to read: see above. For one thread."""

    def __init__(self, path):
        self.path = path
        self.number = 0                 # inode of the open file
        self.opened = ExitStack()

    def renew(self):
        """Open the database, also after it was replaced by another file."""
        number = os.stat(self.path).st_ino
        if number != self.number:
            self.opened.close()
            db = self.opened.enter_context(_connected(self.path))
            db.executescript("PRAGMA journal_mode = WAL; SELECT count(*) FROM sqlite_master")   # makes -wal and -shm
            self.number = number

    def close(self):
        """Leave the database in the mode DELETE if nobody else has it open."""
        self.opened.close()
        if self.number:
            self.number = 0
            with suppress(sqlite3.Error), _connected(self.path) as db:      # which may be another file by now
                _leave(db)


def _remove(path, suffixes=("", "-journal", "-wal", "-shm")):
    for suffix in suffixes:
        with suppress(FileNotFoundError):
            os.unlink(path + suffix)


def write_file(path, lines):
    """Replace a file in one step, so that nobody reads half of it. A link or a device, as /dev/stdout, stays."""
    is_replaced = not os.path.lexists(path) or os.path.isfile(path) and not os.path.islink(path)
    new = path + ".new" if is_replaced else path
    try:
        with open(new, "w", encoding="utf-8") as file:
            file.writelines(lines)
        if is_replaced:
            with suppress(FileNotFoundError):
                copymode(path, new)
            os.rename(new, path)
    finally:
        if is_replaced:
            _remove(new, [""])


def _user(number):
    """The entry of a user; who has none, as in a container, is called by the number."""
    try:
        return pwd.getpwuid(number)
    except KeyError:
        return pwd.struct_passwd((str(number), "", number, number, "", "", ""))


def ownership(path):
    """What to do about a file or directory that this process cannot write."""
    try:
        owner, user = (_user(number).pw_name for number in (os.stat(path).st_uid, os.geteuid()))
    except OSError as error:
        return str(error)
    if owner == user:
        return f"{path} may not be written by its owner: sudo chmod u+w {path}"
    return f"{path} belongs to {owner}: sudo chown {user} {path}"


def remedy(error, path):
    """What to do about an error that came while the database at `path` was written or read: to be put behind it."""
    for place in (dirname(path), path, path + ".lock", path + "-wal", path + "-shm"):
        if exists(place) and not os.access(place, os.W_OK):
            return "; " + ownership(place)
    if "full" in str(error) or getattr(error, "errno", 0) == errno.ENOSPC:
        return f"; make room on the disk of {path}"
    if type(error) is sqlite3.DatabaseError:
        return "; it is made anew from the text"
    if isinstance(error, (OSError, sqlite3.Error, Unusable)):
        return "; it is tried again"
    return f"; this is an error of the program, at {place_of(error)}"


def try_to_write(path):
    """Raise what an import would raise when the database, or its lock, cannot be written."""
    open(path + ".lock", "a").close()
    if exists(path):
        with _connected(path) as db:
            db.execute("PRAGMA busy_timeout = 0")
            try:
                db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):                  # it is, while an import runs
                    raise


def try_to_read(path):
    """Raise what hinders those who read the database. One that is not there yet hinders nobody."""
    with suppress(NoDatabase), open_db(path):
        pass


def act_as_owner(path):
    """Be the user to whom a file belongs, before it is replaced, so that it stays theirs. Root becomes that user, for
    good; Unusable for others, with the command to type."""
    owners = [os.stat(place).st_uid for place in (path, dirname(path)) if exists(place)]
    if os.geteuid() == 0:
        owner = next(filter(None, owners), 0)
        if owner:
            user = _user(owner)
            os.initgroups(user.pw_name, user.pw_gid)
            os.setgid(user.pw_gid)
            os.setuid(owner)
    elif exists(path) and owners[0] != os.geteuid():
        import shlex
        name = _user(owners[0]).pw_name
        user = f"'#{name}'" if name.isdigit() else name
        raise Unusable(f"{path} belongs to {name}: sudo -u {user} {shlex.join(sys.argv)}")


@contextmanager
def only_writer(path, patience=PATIENCE):
    """Be the one that writes; Unusable when another does for too long."""
    os.makedirs(dirname(path), exist_ok=True)
    with open(path + ".lock", "a+") as lock:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    lock.seek(0)
                    raise Unusable(f"process {lock.read().strip() or '?'} is importing into {path}")
                time.sleep(0.05)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _is_earlier_version(path):
    with suppress(sqlite3.Error), closing(_connect(path, "immutable=1")) as db:
        return ask(db, f"""
            SELECT user_version BETWEEN 1 AND {SCHEMA_VERSION - 1} AND 2 = (
                SELECT count(*) FROM sqlite_master WHERE name IN ('co2_readings', 'sources'))
            FROM pragma_user_version""")
    return False


def retired_databases(path):
    """The databases that were put out of the way of the one at `path`."""
    from glob import escape, glob
    names = glob(escape(path) + ".before-*")
    return sorted(name for name in names if not name.endswith(("-wal", "-shm")))


def _retire(path):
    """Put a database that cannot be used out of the way. Of those that we made earlier the newest is kept; what is not
    ours, or damaged, is never removed."""
    if _is_earlier_version(path):
        for other in filter(_is_earlier_version, retired_databases(path)):
            _remove(other)
    aside = f"{path}.before-{seqfile.utc(time.time(), '%Y%m%dT%H%M%SZ')}"
    while exists(aside):
        aside += "-"
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.rename(path + suffix, aside + suffix)
    print(f"importer: {path} is damaged or of another version; it is now {aside}", file=sys.stderr)


def _with_ours(path, use):
    """What `use` makes of a database of this schema. None when there is none, or somebody keeps it busy; one that is
    damaged, or has another schema, is put out of the way."""
    if not exists(path):
        return None
    try:
        with _connected(path) as db:
            if ask(db, "PRAGMA user_version") == SCHEMA_VERSION:
                return use(db)
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):      # somebody reads it all the time, and keeps the old one when it is replaced
            return None
        if type(error) is not sqlite3.DatabaseError:            # that one alone says that the file is damaged
            raise
    _retire(path)
    return None


# The data directory has a mark, and the server directory says that there is one. So an empty directory, where the disk
# with the data should be mounted, is not taken for the data, even when uploads have come into it since.
DATA_MARK = ".co2d-data"


def _mark_data(archive):
    with suppress(OSError):                                     # a copy that cannot be written to needs no mark
        for directory in (archive.data_dirs[0], archive.var_dir):
            open(join(directory, DATA_MARK), "a").close()


def _not_mounted(db, archive):
    """Data directories that are not those from which files were imported."""
    found = []
    if not ask(db, "SELECT EXISTS (SELECT 1 FROM sources WHERE path LIKE 'data/%')"):
        return found
    for directory in archive.data_dirs:
        is_marked = exists(join(directory, DATA_MARK))
        is_expected = directory == archive.data_dirs[0] and exists(join(archive.var_dir, DATA_MARK))
        is_empty = all(entry.name.startswith(".") for entry in _scan(directory, []))
        if is_expected and not is_marked or is_empty:
            found.append((directory, "empty, missing, or not the one that was here; is a disk not mounted? Uploads are "
                          "taken all the same, and sent again when it is back (importer rebuild forgets it)"))
    return found


def _fill(db, sources, rules, progress):
    """The rows of a share of the text in an empty database, without what depends on other rows."""
    db.executescript(f"""
        PRAGMA page_size = 8192; PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF; PRAGMA cache_size = -8000;
        BEGIN; {SCHEMA}""")
    run = Import(db, rules, progress, is_new=True)
    run.take(sources)
    db.execute("COMMIT")
    return run


def _start_helper(path, sources, rules):
    """The id of a process that fills a database; 0 where the system has none left. A program with threads must not ask
    for helpers: they are forked."""
    try:
        pid = os.fork()
    except OSError:
        return 0
    if not pid:
        with suppress(BaseException), _connected(path) as db:
            _fill(db, sources, rules, None)
            os._exit(0)
        os._exit(1)
    return pid


def _unite(db, part):
    """Add the rows of another database that was filled with a share."""
    db.execute("ATTACH ? AS part", (part,))
    for table in (*TABLES, "rejects", "sources"):      # SQLite copies pages
        db.execute(f"INSERT INTO main.{table} SELECT * FROM part.{table}")
    db.execute("INSERT INTO main.daily SELECT * FROM part.daily WHERE 1" + _OR_OPEN)
    db.execute("DETACH part")


def _build(path, listing, rules, progress, processes):
    """A database at `path` from nothing. Several processes read a share of the text each; one unites and settles it."""
    own, *others = listing.shares(processes)
    shares = {f"{path}-part{n}": list(listing.between(*keys)) for n, keys in enumerate(others)}
    helpers = {}
    for file in (path, *shares):
        _remove(file)
    try:
        for part, sources in shares.items():
            helpers[part] = _start_helper(part, sources, rules)
        with _connected(path) as db:
            run = _fill(db, listing.between(*own), rules, progress)
            for part, sources in shares.items():
                pid = helpers.pop(part)
                if not pid or os.waitpid(pid, 0)[1]:            # whatever it was: it is seen here if it happens again
                    _remove(part)
                    with _connected(part) as other:
                        _fill(other, sources, rules, progress)
                _unite(db, part)
            # To sort the indexes; each thread takes as much memory as the cache may.
            db.executescript(f"PRAGMA threads = {processes}; PRAGMA cache_size = -2000; BEGIN; {INDEXES}")
            run.settle_all()
            summary = Summary.of_new(db)
            db.execute("COMMIT")
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    finally:
        for pid in filter(None, helpers.values()):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for part in shares:
            _remove(part)
    return summary


def _swap_in(new, path):
    """Rename. Nothing may be left of the old one's log, which the new one would take for its own: what is in it goes
    into the old file as far as its readers allow; a crash in between would lose nothing that is not in the text."""
    with open(new, "rb") as file:
        os.fsync(file.fileno())
    if exists(path):
        with suppress(sqlite3.DatabaseError), _connected(path) as db:
            db.execute("PRAGMA wal_checkpoint")
        copymode(path, new)
        _remove(path, ("-wal", "-shm"))
    os.rename(new, path)


def _rebuild(archive, now, progress, processes):
    new = archive.db + ".new"
    with _connected("") as beside:
        listing = Listing(archive, beside)
        try:
            summary = _build(new, listing, Rules(archive.limits, now or time.time()), progress, processes)
            summary.unreadable[:0] = listing.unreadable
            summary.hidden = listing.unreadable
            summary.disputed = listing.disputed
            _swap_in(new, archive.db)
            _mark_data(archive)
        finally:
            _remove(new)
    return summary


def rebuild(archive, now=None, progress=None, processes=1):
    """Make a new database from all text beside the old one, then rename it; the Summary. Readers keep the old one."""
    with only_writer(archive.db):
        _with_ours(archive.db, bool)                            # what is not ours is set aside, not replaced
        return _rebuild(archive, now, progress, processes)


def _named(archive, paths):
    """The sources at these paths, which begin as the directories of the archive do. None when all must be looked at:
    where several data directories are merged, and for a table of deployments."""
    if paths is None or len(archive.data_dirs) > 1:
        return None
    found = []
    for root, prefix in ((archive.data_dirs[0], "data/"), (archive.var_dir, "var/")):
        root = join(root, "")
        found += filter(None, [_source(path, root, prefix) for path in paths if path.startswith(root)])
    return None if any(source.kind == "deployments" for source in found) else found


def _take_all(run, archive, listing, missing):
    """All that is new, and out with what is gone, unless that cannot be known."""
    run.summary.hidden = listing.unreadable
    run.summary.disputed = listing.disputed
    run.summary.unreadable += listing.unreadable + missing
    if missing:
        run.db.execute("DELETE FROM files WHERE key LIKE 'data/%'")
    if not run.summary.unreadable:
        _mark_data(archive)
        gone = "SELECT path, '', kind, unit_id, 0, 0.0 FROM sources WHERE path NOT IN (SELECT key FROM files)"
        for row in run.db.execute(gone).fetchall():
            run.forget(Source(*row))
    changed = run.db.execute("SELECT f.* FROM files f LEFT JOIN sources s ON s.path = f.key "
                             "WHERE s.size IS NOT f.size OR s.ctime IS NOT f.ctime ORDER BY f.key")
    run.take(map(source_of, changed))
    again = set(run.again)              # they may hold repeats of what went; run.again grows meanwhile
    for source in listing.between() if again else ():
        if source.id in again:
            run.forget(source)
            run.take_one(source)


def _import_new(db, archive, named, now, progress):
    """Import into a database of ours, in write-ahead mode, beside readers. OperationalError when somebody keeps it busy
    in the mode DELETE."""
    try:
        db.executescript("PRAGMA busy_timeout = 1000; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL")
        db.execute("BEGIN IMMEDIATE")
        listing = Listing(archive, db) if named is None else None       # before the run, which counts changes
        run = Import(db, Rules(archive.limits, now), progress)
        run.release_future()
        missing = _not_mounted(db, archive)
        run.take(source for source in named or () if not missing or source.key.startswith("var/"))
        if listing or run.again:
            _take_all(run, archive, listing or Listing(archive, db), missing)
        run.settle()
        db.execute("COMMIT")
        return run.summary
    finally:
        _leave(db)


def import_new(archive, paths=None, now=None, progress=None, processes=1):
    """Import what is new: in the files at these paths, or in all; the Summary. `progress` is told numbers of bytes.

    Unusable, OSError or sqlite3.Error when that cannot be.
    """
    with only_writer(archive.db):
        summary = _with_ours(
            archive.db, lambda db: _import_new(db, archive, _named(archive, paths), now or time.time(), progress))
        return summary or _rebuild(archive, now, progress, processes)


# -- what the views ask -----------------------------------------------------------------------------------------------
# All times are UTC seconds, all ranges half open. A *span* is a unit, from when, to when. SQLite counts, in the columns
# of a page: spans and `edges` (where the columns begin and end) meet in `parts`. Of each part the whole days come from
# the rollup `daily`, its two ends from the readings: bounds of stays and of local days are exact to the second. What
# comes out is columns x rows, however many readings went in. The tables are temporary: the database is only read.

QUANTILE_DAYS = 200                     # of readings; 10,000 at one every half hour
RECENT = 40                             # the last so many pings or readings tell how a unit does now
HOLE = 1.5                              # rhythms; where two readings are further apart, one is missing

WEAK = -100                             # dBm; below that days are lost
UNUSABLE = -110                         # dBm


class Deployment(NamedTuple):
    """A stay of a unit somewhere; for a unit that never had one, only the unit and its nickname."""

    unit_id: str
    nickname: str
    site: str | None = None
    tier: int | None = None
    status: str | None = None           # deployed, en_route, lab_check
    since: int = 0
    until: int = FOREVER


class Bucket(NamedTuple):
    """One quantity in one column of a page. Suspect values are counted apart and never enter the mean."""

    rows: int                           # readings, usable or not
    first: int                          # time of the first of them
    last: int
    n: int                              # usable values
    total: float
    low: float | None
    high: float | None
    suspects: int
    suspect_low: float | None
    suspect_high: float | None
    held: bool = False                  # nothing was due in this column: these are values of the one before it

    @property
    def mean(self):
        """Of the usable values; None without any."""
        return self.total / self.n if self.n else None


class Pings(NamedTuple):
    """Pings of one unit in one column of a page."""

    n: int
    days: int                           # on so many days
    heard: int                          # of so many the strength is known
    total: float                        # their dBm summed up

    @property
    def dbm(self):
        """The mean; None where no strength is known."""
        return self.total / self.heard if self.heard else None


# Times of the last pings and readings of a unit up to now, newest first. Readings that were dated ahead when they came,
# but are past now, do not count: asked of two indexes, so that the readings themselves are left alone.
_CALLED = f"SELECT ts FROM pings WHERE unit_id = ?1 AND ts <= ?2 ORDER BY ts DESC LIMIT {RECENT}"
_READ = f"""
    SELECT ts FROM co2_readings
    WHERE unit_id = ?1 AND ts <= ?2 AND ts NOT IN (SELECT ts FROM co2_readings WHERE qc & {QC_FUTURE} AND ts <= ?2)
    ORDER BY ts DESC LIMIT {RECENT}"""


def _rhythm(times, least=1, default=HOUR // 2, quarters=2):
    """The distance that so many quarters of the distances do not exceed; with fewer than three of them, `default`."""
    steps = sorted(a - b for a, b in zip(times, times[1:]) if a > b)
    return max(least, steps[len(steps) * quarters // 4]) if len(steps) > 2 else default


# The ten readings up to a time and the ten from another time on, newest first.
_NEAR = """
    SELECT * FROM (SELECT ts FROM co2_readings WHERE unit_id = ?1 AND ts <= ?2 ORDER BY ts DESC LIMIT 10)
    UNION
    SELECT * FROM (SELECT ts FROM co2_readings WHERE unit_id = ?1 AND ts >= ?3 ORDER BY ts LIMIT 10)
    ORDER BY ts DESC"""


def _rhythm_near(db, unit, before, after):
    """Seconds between two readings of a unit around a stretch: it may have been set to another interval since."""
    return _rhythm(ask_all(db, _NEAR, unit, before, after))


# `i` is the row of the page, `j` the column, `s` the span. Whole days of a part: from `day` until before `behind`.
_LAY_OUT = """
PRAGMA temp_store = MEMORY;
CREATE TEMP TABLE IF NOT EXISTS spans(s INTEGER PRIMARY KEY, i INTEGER, unit TEXT, a INTEGER, b INTEGER);
CREATE TEMP TABLE IF NOT EXISTS edges(j INTEGER PRIMARY KEY, a INTEGER, b INTEGER);
CREATE TEMP TABLE IF NOT EXISTS parts(i INTEGER, j INTEGER, s INTEGER, unit TEXT, a INTEGER, b INTEGER, day INTEGER,
    behind INTEGER, PRIMARY KEY(i, j, s)) WITHOUT ROWID;
CREATE TEMP TABLE IF NOT EXISTS ends(i INTEGER, j INTEGER, s INTEGER, unit TEXT, a INTEGER, b INTEGER,
    PRIMARY KEY(i, j, s, a)) WITHOUT ROWID;
DELETE FROM temp.spans; DELETE FROM temp.edges; DELETE FROM temp.parts; DELETE FROM temp.ends;
"""
_MEET = """
INSERT INTO temp.parts SELECT i, j, s, unit, a, b, (a + 86399) / 86400, b / 86400 FROM (
    SELECT s.i, c.j, s.s, s.unit, max(s.a, c.a) AS a, min(s.b, c.b) AS b
    FROM temp.spans s CROSS JOIN temp.edges c WHERE c.b > s.a AND c.a < s.b);
INSERT INTO temp.ends SELECT i, j, s, unit, a, min(b, day * 86400) FROM temp.parts WHERE a < day * 86400;
INSERT INTO temp.ends SELECT i, j, s, unit, max(day, behind) * 86400, b FROM temp.parts
    WHERE max(day, behind) * 86400 < b;
"""
# One pass over the readings serves all quantities: for each of them _OF_EACH is put in.
_BUCKETS = """
SELECT i, j, sum(readings), min(first), max(last){of_page}
FROM (
    SELECT i, j, count(*) AS readings, min(ts) AS first, max(ts) AS last{of_readings}
    FROM (SELECT p.i, p.j, r.ts{values}
          FROM temp.ends p CROSS JOIN co2_readings r WHERE r.unit_id = p.unit AND r.ts >= p.a AND r.ts < p.b)
    GROUP BY i, j
    UNION ALL
    SELECT p.i, p.j, sum(r.n), min(r.first), max(r.last){of_days}
    FROM temp.parts p CROSS JOIN daily r WHERE r.unit_id = p.unit AND r.day >= p.day AND r.day < p.behind
    GROUP BY p.i, p.j)
GROUP BY i, j"""
_OF_EACH = {
    "values": """,
              CASE WHEN r.qc & {bad} = 0 THEN r.{what} END AS {what}_good,
              CASE WHEN r.qc & {bad} AND NOT r.qc & {never} THEN r.{what} END AS {what}_suspect""",
    "of_readings": """,
        count({what}_good) AS {what}_n, total({what}_good) AS {what}_sum, min({what}_good) AS {what}_min,
        max({what}_good) AS {what}_max, count({what}_suspect) AS {what}_off, min({what}_suspect) AS {what}_low,
        max({what}_suspect) AS {what}_peak""",
    "of_days": """,
        sum(r.{what}_n), total(r.{what}_sum), min(r.{what}_min), max(r.{what}_max),
        sum(r.{what}_off), min(r.{what}_low), max(r.{what}_peak)""",
    "of_page": """,
    sum({what}_n), total({what}_sum), min({what}_min), max({what}_max), sum({what}_off), min({what}_low),
    max({what}_peak)"""
}


def _lay_out(db, rows, edges=()):
    """Put the spans of each row of a page, and its columns, where SQL can join them."""
    db.executescript(_LAY_OUT)
    for i, spans in enumerate(rows):
        db.executemany("INSERT INTO temp.spans VALUES (NULL, ?, ?, ?, ?)", [(i, *span) for span in spans])
    db.executemany("INSERT INTO temp.edges VALUES (?, ?, ?)", zip(count(), edges, edges[1:]))
    db.executescript(_MEET)


def _hold(db, cells, spans):
    """Fill the columns between two readings of a unit that are no more than HOLE rhythms apart."""
    there = [j for j, bucket in enumerate(cells) if bucket]
    for j, following in zip(there, there[1:]):
        before, after = cells[j].last, cells[following].first
        units = [unit for unit, a, b in spans if a <= before and after < b]
        if j + 1 < following and len(units) == 1:
            (unit,) = units
            if after - before <= HOLE * _rhythm_near(db, unit, before, after):
                held = cells[j]._replace(rows=0, suspects=0, held=True)
                cells[j + 1:following] = [held] * (following - j - 1)


def buckets(db, quantities, rows, edges):
    """quantity -> for each row of a page a list with a Bucket for each column, None where nothing was read.

    The quantities are co2 and temp; a row is a list of spans, which are joined (a site with several units). Columns
    between two readings of a unit without a gap are filled from the left, see `_hold`.
    """
    _lay_out(db, rows, edges)
    found = {}
    pieces = dict.fromkeys(_OF_EACH, "")
    for what in quantities:
        found[what] = [[None] * (len(edges) - 1) for _ in rows]
        for name, sql in _OF_EACH.items():
            pieces[name] += sql.format(what=what, bad=SUSPECT_BITS[what], never=QC_ROW)
    for i, j, readings, first, last, *values in db.execute(_BUCKETS.format(**pieces)):
        value = iter(values)
        for what in quantities:
            found[what][i][j] = Bucket(readings, first, last, *islice(value, 7))
    for what in quantities:
        for cells, spans in zip(found[what], rows):
            _hold(db, cells, spans)
    return found


_EVERY = f"""
    SELECT 1 + count(*) / {QUANTILE_DAYS} FROM temp.spans s CROSS JOIN daily d
    WHERE d.unit_id = s.unit AND d.day >= s.a / 86400 AND d.day < (s.b + 86399) / 86400"""


def _values(db, what, spans, bad, days):
    """The values of a quantity without those that have one of the bits `bad`; of days with a condition in SQL."""
    _lay_out(db, [spans])
    return ask_all(db, f"""
        SELECT r.{what} FROM temp.spans s CROSS JOIN daily d CROSS JOIN co2_readings r
        WHERE d.unit_id = s.unit AND d.day >= s.a / 86400 AND d.day < (s.b + 86399) / 86400 AND {days}
            AND r.unit_id = s.unit AND r.ts >= max(s.a, d.day * 86400) AND r.ts < min(s.b, d.day * 86400 + 86400)
            AND r.{what} IS NOT NULL AND r.qc & {bad} = 0""")


def count_outside(db, what, spans, low, high):
    """How many values, suspect ones included, are below and above the limits; looks only into days that have some."""
    days = f"(d.{what}_min < {low} OR d.{what}_max > {high} OR d.{what}_low < {low} OR d.{what}_peak > {high})"
    values = _values(db, what, spans, QC_ROW, days)
    return sum(value < low for value in values), sum(value > high for value in values)


def quantiles(db, what, spans, shares):
    """The values below which the shares (0 to 1) of the usable values lie, each None when there are no values; and of
    one day in how many they are: of each for up to QUANTILE_DAYS days, then of an evenly spread sample."""
    values = sorted(_values(db, what, spans, SUSPECT_BITS[what], f"d.day % ({_EVERY}) = 0")) or [None]
    return [values[min(len(values) - 1, int(share * len(values)))] for share in shares], ask(db, _EVERY)


def last_value(db, what, spans):
    """Time and value of the newest usable one, and whether more than two readings without one came since; or None."""
    query = f"""
        SELECT ts, {what}, 2 < (SELECT count(*) FROM (
            SELECT 1 FROM co2_readings WHERE unit_id = ?1 AND ts > r.ts AND ts < ?3 LIMIT 3))
        FROM co2_readings r WHERE unit_id = ?1 AND ts >= ?2 AND ts < ?3 AND {what} NOT NULL
            AND qc & {SUSPECT_BITS[what]} = 0
        ORDER BY ts DESC LIMIT 1"""
    rows = (db.execute(query, span).fetchone() for span in spans)
    return max(filter(None, rows), default=None)


def extent(db, table, units, now):
    """Times of the first and the last row of these units up to now, in co2_readings, pings or error_logs; both None
    when there is none."""
    _lay_out(db, [[(unit, 0, now) for unit in units]])
    return db.execute(f"""
        SELECT min(first), max(last) FROM (
            SELECT (SELECT min(ts) FROM {table} WHERE unit_id = unit) AS first,
                (SELECT max(ts) FROM {table} WHERE unit_id = unit AND ts <= b) AS last
            FROM temp.spans)
        WHERE last NOT NULL""").fetchone()


def pings(db, rows, edges):
    """For each row of a page, a list of spans, a list with Pings for each column, None where none came."""
    _lay_out(db, rows, edges)
    query = """
        SELECT p.i, p.j, count(*),
            min(count(DISTINCT (r.ts - e.a) / 86400), max(1, CAST(round((e.b - e.a) / 86400.0) AS INTEGER))),
            count(r.rssi_dbm), total(r.rssi_dbm)
        FROM temp.parts p CROSS JOIN temp.edges e CROSS JOIN pings r
        WHERE e.j = p.j AND r.unit_id = p.unit AND r.ts >= p.a AND r.ts < p.b
        GROUP BY p.i, p.j"""
    page = [[None] * (len(edges) - 1) for _ in rows]
    for i, j, *counted in db.execute(query):
        page[i][j] = Pings(*counted)
    return page


def signals(db, unit, a, b):
    """Of the pings of a unit: each dBm, from the weakest, how many had it, and the time of the last of these."""
    return db.execute("""
        SELECT rssi_dbm, count(*), max(ts) FROM pings WHERE unit_id = ? AND ts >= ? AND ts < ? AND rssi_dbm IS NOT NULL
        GROUP BY rssi_dbm ORDER BY rssi_dbm""", (unit, a, b)).fetchall()


def errors(db, spans, edges):
    """Entries of the error logs: number of the span, number of the column, type, 1 where they are more than INFO, how
    many; the type 'other' is none of the known."""
    _lay_out(db, [[span] for span in spans], edges)
    return db.execute("""
        SELECT p.i, p.j, coalesce(e.etype, 'other') AS kind, coalesce(e.level, '') <> 'INFO' AS serious, count(*)
        FROM temp.parts p CROSS JOIN error_logs e WHERE e.unit_id = p.unit AND e.ts >= p.a AND e.ts < p.b
        GROUP BY p.i, p.j, kind, serious""").fetchall()


def newest_errors(db, units, a, b, limit):
    """The newest entries: time, unit, level, type, message. Those of level INFO come last, if there is room."""
    return db.execute(f"""
        SELECT ts, unit_id, coalesce(level, ''), coalesce(etype, ''), coalesce(message, '') FROM error_logs
        WHERE unit_id IN ({quoted(units)}) AND ts >= ? AND ts < ?
        ORDER BY coalesce(level, '') = 'INFO', ts DESC LIMIT ?""",
        (a, b, limit)).fetchall()


def _units(db):
    """All units of which anything is known."""
    tables = "daily pings error_logs deploy_durations_tiered".split()
    return sorted(set().union(*(_units_in(db, table) for table in tables)))


def _own_name(db, unit):
    """What a unit last called itself, in its last 50 pings or readings; else None."""
    name = """
        (SELECT nickname FROM (SELECT nickname FROM %s WHERE unit_id = ?1 ORDER BY ts DESC LIMIT 50)
         WHERE nickname IS NOT NULL LIMIT 1)"""
    return ask(db, f"SELECT coalesce({name % 'pings'}, {name % 'co2_readings'})", unit)


def _nickname(db, unit):
    """What a unit last called itself, else its id without the prefix that all share."""
    return _own_name(db, unit) or unit.removeprefix(seqfile.UNIT_PREFIX)


# Of rows for the same unit, site and status that overlap, the later begins where those before it end.
_ALL_STAYS = f"""
    SELECT unit_id, nickname, site, tier, status, begin, until FROM (
        SELECT unit_id, site, tier, status, coalesce(until, {FOREVER}) AS until,
            coalesce(nickname, (SELECT nickname FROM deploy_durations_tiered o
                                WHERE o.unit_id = s.unit_id AND nickname IS NOT NULL)) AS nickname,
            max(coalesce(since, 0), coalesce(max(coalesce(until, {FOREVER})) OVER (
                PARTITION BY unit_id, site, status ORDER BY since, rowid
                ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0)) AS begin
        FROM deploy_durations_tiered s)
    WHERE begin < until ORDER BY tier IS NULL, tier DESC, site, begin, unit_id"""


def deployments(db):
    """A list of all Deployments, highest tier first, then by site and time; at the end the units that never had one."""
    stays = []
    for unit, nickname, *place in db.execute(_ALL_STAYS):
        stays.append(Deployment(unit, nickname or _nickname(db, unit), *place))
    placed = {stay.unit_id for stay in stays}
    others = [Deployment(unit, _nickname(db, unit)) for unit in _units(db) if unit not in placed]
    return stays + sorted(others, key=operator.attrgetter("nickname"))


def whereabouts(stays, at):
    """Hardware id -> the unit's stay at a time, else its latest."""
    stays = sorted(stays, key=lambda stay: (stay.since <= at < stay.until, stay.since))
    return {stay.unit_id: stay for stay in stays}


def read_rows(directory, match, fields):
    """The rows of a log of ours that have so many fields, as lists of texts, in order."""
    with suppress(FileNotFoundError):
        for name in seqfile.files_in_sequence(directory, match):
            with open(join(directory, name), encoding="utf-8", errors="replace", newline="\n") as stream:
                rows = [line.rstrip("\n").split("\t") for line in stream]
            yield from (row for row in rows if len(row) == fields)


# -- problems ---------------------------------------------------------------------------------------------------------
# One list says what is wrong, in words for people. What the database and the files show is found here; what only the
# daemon knows (imports fail, the disk is full) is reported to `co2d.Health`. The daemon writes the whole list to
# health.json every minute and at each change. /readyz, /metrics, the log, the pages and `status --check` take their
# words from it.

HEALTH_FILE = "health.json"             # in the server directory
HEALTH_LASTS = 300                      # s; a daemon that runs writes it every minute
CRITICAL = "critical"
WARNING = "warning"
NOTE = "note"                           # good to know, no reason to do something now


class Problem(NamedTuple):
    """Something that is wrong with the station, or with a unit."""

    key: str                            # the same for as long as it lasts
    level: str                          # CRITICAL, WARNING or NOTE
    unit: str                           # hardware id; "" for the station
    text: str                           # what, since when, why, what to do
    since: int                          # UTC seconds


def worst_first(found):
    """Problems in the order in which they are told: what is critical before warnings, the station before units."""
    levels = (CRITICAL, WARNING, NOTE)
    return sorted(found, key=lambda told: (levels.index(told.level), told.unit != "", told.since, told.key))


def when(ts):
    """A time in the text of a problem."""
    return seqfile.utc(ts, "%Y-%m-%d %H:%M UTC")


# -- how the fleet does ------------------------------------------------------------------------------------------------
#
# Pings and data are judged apart, each by the unit's own rhythm. A unit is late when the next ping, or the next upload,
# is overdue by more than a quarter of the usual distance and an hour. It is stuck when it has called at least twice
# since its data should have come: it talks, but what it measured does not arrive. Judged are units that are deployed
# now, those of which a row of the deployment table was refused, and those that report though they are in no row;
# where no deployments are known at all, every unit counts as deployed.


VERDICTS = {                            # worst first, with the level of the problem
    "late": WARNING,                    # no ping, or no data, though they are due
    "stuck": CRITICAL,                  # it calls, but its data do not come
    "update": WARNING,                  # it spends its nights on an update that it cannot finish
    "refused": CRITICAL,                # its newest lines cannot be read
    "sensor": WARNING,                  # readings come, but without usable CO2
    "weak": "",                         # days without a ping, and a weak signal
    "never": WARNING,                   # deployed, but never heard of
    "ok": "",
    "off": ""                          # not deployed
}
MUCH_TOO_LATE = 3                       # times the limit; then late data are critical
SENSOR_ROWS = 6                         # readings in the last day; fewer say nothing about the sensor
REFUSED_LINES = 2                       # at the end of a file; a single one is a line that was cut
NEW_UNIT = 30 * DAY                     # s; a unit in no row of the table is judged when it has reported since


class UnitState(NamedTuple):
    """How a unit does."""

    unit_id: str
    nickname: str
    site: str | None
    tier: int | None
    status: str | None
    alarms: bool                        # it is judged: silence matters
    in_table: bool                      # it has a row in the deployment table, or there is no such table
    own_name: str | None                # what it calls itself
    last_ping: int | None
    last_data: int | None               # newest reading, usable or not
    ping_rhythm: int                    # s; usual distance of the nights in which it calls
    dbm: int | None
    calls: int                          # pings since data should have come
    pings_late: float                   # how much later than usual: 1 is the limit
    data_late: float
    verdict: str = ""                   # of VERDICTS
    level: str = ""                     # of its problem
    why: str = ""                       # in words: what is wrong, since when, what to do


COMM_PATCH = "conf-patch/ou-comm-config.json"                   # in an update: what of it says where to report


def _servers(archive, unit, update="*"):
    """The URLs that the newest update of a unit, or the one named, sets for it to report to; none if no update does."""
    from glob import escape, glob
    for data_dir in archive.data_dirs:
        pattern = join(escape(data_dir), unit, seqfile.UPDATES_FOLDER, update, COMM_PATCH)
        for path in sorted(glob(pattern), reverse=True):
            with suppress(OSError, ValueError, AttributeError):
                with open(path, encoding="utf-8") as file:
                    servers = json.load(file).get("sync_dest")
                if servers:
                    return servers if isinstance(servers, list) else [servers]
    return []


def _fetched(archive):
    """Unit -> days since 1970 on which it fetched files of an update; unit -> when it took a configuration that names
    one server alone, and that server: it may not call here again."""
    nights = defaultdict(set)
    taken = {}
    for at, unit, update, path in read_rows(join(archive.var_dir, seqfile.FETCHES_FOLDER), seqfile.FETCHES, 4):
        with suppress(Rejected):
            ts = parse_instant(at or "-", "time")
            nights[unit].add(ts // DAY)
            if path == COMM_PATCH:
                taken[unit] = ts, update
    moves = {}
    for unit, (ts, update) in taken.items():
        servers = _servers(archive, unit, update)
        if len(servers) == 1:
            moves[unit] = ts, servers[0]
    return nights, moves


# Of a unit, its newest reading, and now: since when no reading has usable CO2; NULL when one of the last day has.
_WITHOUT_CO2 = f"""
    SELECT min(ts) FROM co2_readings WHERE unit_id = ?1 AND ts > (
        SELECT coalesce(max(ts), 0) FROM co2_readings
        WHERE unit_id = ?1 AND ts < ?3 AND co2 NOT NULL AND qc & {SUSPECT_BITS['co2']} = 0)
    AND (SELECT count(*) >= {SENSOR_ROWS} AND total(co2_flag = 1) = 0 FROM co2_readings
         WHERE unit_id = ?1 AND ts > ?2 - {DAY} AND ts <= ?2)"""


class _Judge:
    """Finds what is to be said of each unit at a time."""

    def __init__(self, db, now, archive):
        self.db, self.now, self.archive = db, now, archive
        self.has_table = ask(db, "SELECT EXISTS (SELECT 1 FROM deploy_durations_tiered)")
        refused = ask(db, "SELECT group_concat(text) FROM rejects r JOIN sources s ON s.id = r.source "
                          "WHERE s.kind = 'deployments'")
        self.units_of_refused_rows = re.findall(r"co2unit-[0-9A-Za-z._-]+", refused or "")
        self.nights, self.moves = _fetched(archive) if archive else ({}, {})
        # unit -> (time of the reading before, reason) of lines that no reading follows
        self.refused = defaultdict(list)
        for unit, *line in db.execute(
                "SELECT unit_id, before_ts, reason FROM sources s CROSS JOIN rejects r ON r.source = s.id "
                "WHERE s.kind = 'readings' AND s.rejected > 0 AND coalesce(r.before_ts, 0) <= ?1 "
                "AND coalesce(r.after_ts, ?1 + 1) > ?1", (now,)):
            self.refused[unit].append(line)

    def state(self, stay):
        """The state of one unit, with its verdict."""
        unit = stay.unit_id
        called = ask_all(self.db, _CALLED, unit, self.now)
        read = ask_all(self.db, _READ, unit, self.now)
        ping_rhythm = _rhythm(called, HOUR, DAY, 3)     # nights: in some it calls more than once
        data_rhythm = _rhythm(read)
        last_ping = called[0] if called else None
        last_data = read[0] if read else None
        due = (last_data or max(stay.since, called[-1] if called else 0)) + 2 * data_rhythm + HOUR
        nights = {day for day in self.nights.get(unit, ()) if day * DAY > (last_data or 0)}
        ping_limit = 1.25 * ping_rhythm + HOUR
        data_limit = ping_limit + 2 * data_rhythm
        if len(nights) == 1:            # went into an update: the data come in the next
            data_limit += ping_rhythm
        signal = ask_all(self.db, """
            SELECT rssi_dbm FROM pings WHERE unit_id = ? AND ts <= ? AND rssi_dbm NOT NULL ORDER BY ts DESC LIMIT 14""",
            unit, self.now)
        state = UnitState(
            unit, stay.nickname, stay.site, stay.tier, stay.status,
            alarms=self._is_judged(stay),
            in_table=not self.has_table or stay.status is not None,
            own_name=_own_name(self.db, unit),
            last_ping=last_ping,
            last_data=last_data,
            ping_rhythm=ping_rhythm,
            dbm=signal[0] if signal else None,
            calls=sum(1 for ts in called if ts > due and ts // DAY not in nights),
            pings_late=(self.now - last_ping) / ping_limit if last_ping else 0.0,
            data_late=(self.now - last_data) / data_limit if last_data else 0.0
        )
        verdict, why = self._verdict(state, len(nights))
        is_weak = signal and sorted(signal)[len(signal) // 2] < WEAK
        if verdict == "ok" and is_weak and self._misses_days(called):
            verdict = "weak"
        level = VERDICTS[verdict]
        if verdict == "late" and state.data_late > MUCH_TOO_LATE:
            level = CRITICAL
        if level and not state.in_table:
            level = WARNING
        return state._replace(verdict=verdict, level=level, why=why)

    def _is_judged(self, stay):
        if not self.has_table or stay.unit_id in self.units_of_refused_rows:
            return True
        if stay.status is not None:
            return stay.status == "deployed" and stay.since <= self.now < stay.until
        bound = (stay.unit_id, self.now - NEW_UNIT, self.now)
        return ask(self.db, """
            SELECT EXISTS (SELECT 1 FROM co2_readings WHERE unit_id = ? AND ts BETWEEN ? AND ?) OR 3 <=
                (SELECT count(DISTINCT ts / 86400) FROM pings WHERE unit_id = ? AND ts BETWEEN ? AND ?)""",
            *bound, *bound)

    def _misses_days(self, called):
        """Whether more than one of the last 14 days went by without a ping."""
        days = {ts // DAY for ts in called if ts > self.now - 14 * DAY}
        return len(days) < min(13, (self.now - called[-1]) // DAY if called else 0)

    def _verdict(self, state, nights):
        """Verdict, and why. `nights`: that went into updates since the last data."""
        if not state.alarms:
            return "off", ""
        if not state.last_ping and not state.last_data:
            return "never", "never heard of: is it switched on, and does its sync_dest name this server?"
        if state.last_ping and state.pings_late > 1:
            moved_at, url = self.moves.get(state.unit_id, (0, ""))
            if state.last_ping <= moved_at + HOUR:
                return "off", f"went to {url}"
            return "late", f"no ping since {when(state.last_ping)}"
        why = self._refused(state)
        if why:
            return "refused", why
        no_data = f"no data since {when(state.last_data)}" if state.last_data else "no data yet"
        is_late = state.data_late > 1
        if is_late and nights > 1:
            return "update", f"{no_data}: {nights} nights went into an update that is not complete"
        if (is_late or not state.last_data) and not self._has_other_server(state.unit_id):
            if state.calls > 1:
                return "stuck", f"{no_data}, but {state.calls} pings: its data do not come"
            if is_late:
                return "late", no_data
        why = self._sensor(state)
        return "sensor" if why else "ok", why

    def _refused(self, state):
        """Why the newest lines of a unit are rejected; "" when they are not."""
        last = state.last_data or 0
        unknown = last if state.data_late > 1 or not last else -1       # the time before a file's first lines
        reasons = [reason for before, reason in self.refused[state.unit_id]
                   if (unknown if before is None else before) >= last]
        if len(reasons) < REFUSED_LINES:
            return ""
        return f"its newest {len(reasons)} lines are refused ({max(reasons)}): see importer rejects"

    def _sensor(self, state):
        """Since when no reading has usable CO2; "" when one of the last day has."""
        since = ask(self.db, _WITHOUT_CO2, state.unit_id, state.last_data, self.now)
        return f"readings come, but no usable CO2 since {when(since)}" if since else ""

    def _has_other_server(self, unit):
        """Whether another server takes the unit's data, as far as is known here."""
        has_pings = ask(self.db, """
            SELECT EXISTS (SELECT 1 FROM pings p JOIN sources s ON s.id = p.source
                           WHERE p.unit_id = ? AND p.ts > ? AND s.path LIKE 'data/%')""", unit, self.now - 7 * DAY)
        return has_pings or self.archive and len(_servers(self.archive, unit)) > 1


def fleet_state(db, now, stays=None, archive=None):
    """The UnitState of every unit, worst first, then by tier and site. `archive`: where updates are looked up."""
    stays = deployments(db) if stays is None else stays
    order = {stay.unit_id: number for number, stay in enumerate(stays)}
    judge = _Judge(db, now, archive)
    states = [judge.state(stay) for stay in whereabouts(stays, now).values()]
    verdicts = list(VERDICTS)

    def urgency(state):
        lateness = max(state.pings_late, state.data_late) if state.verdict in ("late", "stuck") else 0
        return verdicts.index(state.verdict), -lateness, order[state.unit_id]

    return sorted(states, key=urgency)


# -- gaps --------------------------------------------------------------------------------------------------------------

# waiting: the unit has not called since; silent: it calls, but sends no readings; resend: a file of the sequence is
# missing or short here, and asked for; rejected: lines came, but could not be read; lost: later readings are here; off:
# the unit was not deployed


class Gap(NamedTuple):
    """Missing readings between two that are there."""

    unit_id: str
    start: int                          # time of the last reading before, or the begin of the first stay
    end: int | None                     # time of the first one after; None: the gap is open
    missing: int                        # by the unit's rhythm around the gap
    state: str                          # one of those above
    calls: int                          # pings in the meantime
    step: int                           # s; that rhythm


def _number_of(path):
    return seqfile.extract_sequence_number(basename(path or ""), seqfile.READINGS)


# Of a unit, until now, from a time on: stretches that may miss readings, as the times of the reading before and of the
# one after, NULL where none came since. The begin of its first stay stands for a reading. A day is looked into when a
# distance in it, or the one from the day before, is clearly longer than the mean distance of that day or of the day
# before. In such a day a stretch is clearly longer than that, or than the distance before it or after it.
_HOLES = f"""
SELECT before, ts FROM (
    SELECT before, ts FROM (
        SELECT before, ts, step,
            (SELECT max(b.ts) FROM co2_readings b WHERE b.unit_id = ?1 AND b.ts < before) AS earlier,
            (SELECT min(b.ts) FROM co2_readings b WHERE b.unit_id = ?1 AND b.ts > r.ts) AS later
        FROM (
            SELECT (SELECT max(b.ts) FROM co2_readings b WHERE b.unit_id = ?1 AND b.ts < r.ts) AS before, r.ts, step
            FROM (
                SELECT d.day, d.longest, d.first - y.last AS night,
                    1.1 * min((d.last - d.first) / d.n, 86400 / coalesce(y.n, 1)) AS step
                FROM daily d LEFT JOIN daily y ON y.unit_id = d.unit_id AND y.day = d.day - 1
                WHERE d.unit_id = ?1 AND d.day BETWEEN ?3 / 86400 AND ?2 / 86400) d
            CROSS JOIN co2_readings r
            WHERE (d.longest > step OR d.night IS NULL OR d.night > step)
                AND r.unit_id = ?1
                AND r.ts >= max(?3 + 1, d.day * 86400) AND r.ts < min(?2 + 1, (d.day + 1) * 86400)) r)
    WHERE ts - before > min(step, 1.4 * coalesce(min(before - earlier, later - ts), later - ts, before - earlier, step))
    UNION ALL
    SELECT since, nullif(first, {FOREVER}) FROM (
        SELECT min(since) AS since, coalesce((
            SELECT ts FROM co2_readings WHERE unit_id = ?1 AND ts <= ?2 ORDER BY ts LIMIT 1), {FOREVER}) AS first
        FROM deploy_durations_tiered WHERE unit_id = ?1 AND status = 'deployed')
    WHERE since < min(first, ?2) - {DAY + HOUR} AND first > ?3
    UNION ALL
    SELECT ts, NULL FROM (SELECT max(ts) AS ts FROM ({_READ}))
    WHERE ts < ?2 - {DAY + HOUR})
ORDER BY ts IS NULL, ts"""
# The file of the reading before, its size, the file of the reading after, whether lines between them were refused.
_ENDS = """
    SELECT b.path, b.size, a.path, EXISTS (
        SELECT 1 FROM rejects WHERE source IN (b.id, a.id) AND before_ts >= ?2 AND after_ts <= ?3)
    FROM (SELECT 1)
    LEFT JOIN sources b ON b.id = (SELECT source FROM co2_readings WHERE unit_id = ?1 AND ts = ?2)
    LEFT JOIN sources a ON a.id = (SELECT source FROM co2_readings WHERE unit_id = ?1 AND ts = ?3)"""


def _why(db, unit, start, end):
    """What became of readings that are missing between two that are there, by the files these two came from."""
    path, size, next_path, refused = db.execute(_ENDS, (unit, start, end)).fetchone()
    if refused:
        return "rejected"
    number, following = _number_of(path), _number_of(next_path)
    if number is None or following is None or following <= number:
        return "lost"
    return "resend" if following > number + 1 or size < seqfile.FILE_SIZE else "lost"


# Of a stretch that is open: unit, its begin, now, calls since.
_OPEN = f"""
    SELECT CASE WHEN {REFUSED_LINES} <= (
        SELECT count(*) FROM rejects CROSS JOIN sources s ON s.id = source
        WHERE s.unit_id = ?1 AND s.kind = 'readings' AND coalesce(before_ts, ?2) BETWEEN ?2 AND ?3
            AND coalesce(after_ts, ?3 + 1) > ?3)
    THEN 'rejected' WHEN ?4 THEN 'silent' ELSE 'waiting' END"""


def gaps(db, stays, a, now):
    """The Gaps between a and now, by unit and time: more than HOLE rhythms without readings."""
    found = []
    for unit in sorted({stay.unit_id for stay in stays}):
        own = [stay for stay in stays if stay.unit_id == unit and stay.status is not None]
        for start, end in db.execute(_HOLES, (unit, now, a)):
            until = end or now
            step = _rhythm_near(db, unit, start, until)
            if until - start <= HOLE * step:
                continue
            calls = ask(db, "SELECT count(*) FROM pings WHERE unit_id = ? AND ts > ? AND ts <= ?",
                        unit, start + step, until)
            missing = round((until - start) / step) - 1
            since = start + step if end else now                # an open gap: of a unit that is deployed now
            if own and not any(stay.status == "deployed" and stay.since < until and since < stay.until for stay in own):
                state = "off"
            elif end:
                state = _why(db, unit, start, end)
            else:
                state = ask(db, _OPEN, unit, start, now, calls)
            found.append(Gap(unit, start, end, missing, state, calls, step))
    return found


def missing(db, stays, spans, edges, now):
    """How many readings are missing in each column, of spans in which the unit was deployed."""
    columns = [0] * len(edges)
    for gap in gaps(db, stays, edges[0], now):
        for unit, a, b in spans:
            if unit == gap.unit_id and gap.state != "off":
                for ts in islice(count(gap.start + gap.step, gap.step), gap.missing):
                    if a <= ts < b:
                        columns[bisect_right(edges, ts) - 1] += 1
    return columns


# -- the list of problems -----------------------------------------------------------------------------------------


def missing_data(db, archive):
    """What is wrong with the data directories; "" when they are those from which files were imported."""
    return "; ".join(f"data directory {directory} is {why}" for directory, why in _not_mounted(db, archive))


def _unit_problems(state):
    """What is wrong with one unit."""
    told = [(state.verdict, state.level, state.why)]
    if state.alarms and not state.in_table:
        told.append(("no-row", WARNING, f"{state.unit_id} reports, but is in no row of the deployment table"))
    elif state.alarms and state.own_name not in (None, state.nickname):
        told.append(("nickname", WARNING, f"it calls itself {state.own_name}: correct the deployment table, "
                                          "or publish --nickname"))
    for what, level, why in told:
        if level:
            text = f"{state.site or 'no site'} ({state.nickname}): {why}"
            since = state.last_data or state.last_ping or 0
            yield Problem(f"{what}:{state.unit_id}", level, state.unit_id, text, since)


def problems(db, archive, now):
    """What the database and the directories of the archive show: Problems, worst first."""
    in_the_ledger = db.execute("""
        SELECT 'source:' || path, 'critical', '', path || ' is not imported: ' || trouble, CAST(ctime AS INTEGER)
        FROM sources WHERE trouble IS NOT NULL
        UNION ALL SELECT 'row:' || path || ':' || line, 'warning', '',
            'line ' || line || ' of ' || path || ' is refused: ' || reason ||
            '; until it is corrected, its unit counts as deployed', CAST(ctime AS INTEGER)
        FROM rejects r JOIN sources s ON s.id = r.source WHERE kind = 'deployments'""")
    found = [Problem(*row) for row in in_the_ledger]
    missing = missing_data(db, archive)
    if missing:
        found.append(Problem("data_dir", CRITICAL, "", missing, now))
    for path in retired_databases(archive.db):
        level = NOTE if _is_earlier_version(path) else WARNING
        text = f"{path} was set aside: remove it when it is of no use any more"
        found.append(Problem("before:" + path, level, "", text, int(os.stat(path).st_mtime)))
    for state in fleet_state(db, now, archive=archive):
        found += _unit_problems(state)
    return worst_first(problem._replace(text=_printable(problem.text)) for problem in found)


def write_health(var_dir, found, now):
    """Replace health.json; OSError when that cannot be."""
    text = json.dumps({"written": now, "problems": [problem._asdict() for problem in found]}, indent=1) + "\n"
    file = join(var_dir, HEALTH_FILE)
    try:
        write_file(file, [text])
    except OSError:                                             # the disk is full: then into the room that it has
        with open(file, "r+", encoding="utf-8") as stream:
            stream.write(text)
            stream.truncate()


def read_health(var_dir, now):
    """The Problems that the daemon wrote last; None when there is no such file. When it is old, this is one more."""
    file = join(var_dir, HEALTH_FILE)
    try:
        with open(file, encoding="utf-8") as stream:
            health = json.load(stream)
        found = [Problem(**problem) for problem in health["problems"]]
        written = int(health["written"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        return [Problem("health", CRITICAL, "", f"{file} cannot be read: {error}", now)]
    if now - written > HEALTH_LASTS:
        text = f"co2d does not run, or cannot write (systemctl status co2d): {file} is from {when(written)}"
        found.append(Problem("health", CRITICAL, "", text, written))
    return worst_first(found)


def known_problems(archive, now):
    """What is wrong, for pages and `status --check`: by the daemon's list, or by the database where no daemon runs."""
    told = read_health(archive.var_dir, now)
    stale = [problem for problem in told or [] if problem.key == "health"]
    if told is not None and not stale:
        return told
    with suppress(NoDatabase), open_db(archive.db) as db:
        stale += problems(db, archive, now)
    return worst_first(stale)


# -- names of units ----------------------------------------------------------------------------------------------------

LEAST_END = 4                           # letters: so much of the end of a hardware id can stand for all of it
NEAREST = 3                             # names that are offered in place of one that nothing has


class UnknownName(Unusable):
    """A name that nothing has, or that several units have; says which names there are."""


def unknown(what, name, known):
    """The exception that says that no `what` (unit, site, ...) has this name, and which names are nearest."""
    from difflib import get_close_matches as near
    written = {name.lower(): name for name in sorted(known)}
    nearest = near(name.lower(), written, NEAREST, 0.3) or near(name.lower(), written, 1, 0)
    there_are = "; the nearest names are " + ", ".join(map(written.get, nearest)) if nearest else ""
    return UnknownName(f"no {what} is called {name[:40]!r}{there_are}")


def find_names(what, called, text):
    """What is called so, by `called`: name -> all that have it. `what` they are is for the exception."""
    from fnmatch import filter as matching
    everything = set().union(*called.values())
    found = []
    for name in map(str.strip, [text] if text in called else text.split(",")):
        is_pattern = "*" in name and name not in called
        names = matching(called, name) if is_pattern else [name]
        owners = set().union(*(called.get(known, ()) for known in names))
        if not owners and len(name) >= LEAST_END:
            owners = {owner for owner in everything if owner.endswith(name.lower())}
        if not owners:
            raise unknown(what, name, called)
        if len(owners) > 1 and not is_pattern:
            raise UnknownName(f"{name!r} can be {' or '.join(sorted(owners))}: say which")
        found += sorted(owners)
    return list(dict.fromkeys(found))


def find_units(db, text):
    """Hardware ids of the units that `text` names: one name, or several with commas between, or patterns with `*`.

    A name is a hardware id, the end of one (four letters or more), or a nickname: what a unit calls itself, or what the
    table of deployments calls it. UnknownName when nothing has that name, or when several units have it.
    """
    called = defaultdict(set)
    for unit, name in db.execute("SELECT unit_id, nickname FROM deploy_durations_tiered WHERE nickname <> ''"):
        called[name].add(unit)
    for unit in _units(db):
        for name in (unit, unit.removeprefix(seqfile.UNIT_PREFIX), _nickname(db, unit)):
            called[name].add(unit)
    return find_names("unit", called, text)


def find_sites(db, text):
    """The sites that `text` names, as in `find_units`."""
    called = {site: {site} for site in ask_all(db, "SELECT site FROM deploy_durations_tiered WHERE site <> ''")}
    return find_names("site", called, text)


# -- proof ------------------------------------------------------------------------------------------------------------


_UNBALANCED = """
    SELECT path || ': ' || done || ' bytes of lines, but ' || imported_bytes || ' imported and ' || rejected_bytes ||
        ' rejected'
    FROM main.sources WHERE done <> imported_bytes + rejected_bytes"""
_ROLLUP = """
    SELECT DISTINCT 'daily: ' || unit_id || ', ' || day || ': the rollup is not that of the text' FROM (
        SELECT * FROM (SELECT * FROM main.daily EXCEPT SELECT * FROM fresh.daily)
        UNION ALL SELECT * FROM (SELECT * FROM fresh.daily EXCEPT SELECT * FROM main.daily))"""
_ACCOUNT = "path, id, done, lines, imported, repeated, rejected, imported_bytes, checksum, last_ts, extra_fields"
_ACCOUNTS = f"""
    SELECT 'sources: ' || path || ': the account is not that of the text'
    FROM (SELECT {_ACCOUNT} FROM main.sources EXCEPT SELECT {_ACCOUNT} FROM fresh.sources)"""
_OF_TABLE = """
    SELECT '{0}: ' || ours || ' rows, but ' || theirs || ' in the text'
    FROM (SELECT (SELECT count(*) FROM main.{0}) AS ours, (SELECT count(*) FROM fresh.{0}) AS theirs)
    WHERE ours <> theirs
    UNION ALL SELECT coalesce(path, '?') || ': byte ' || offset || ': row of {0} is not in the ' || other FROM (
        SELECT *, 'text' AS other FROM (SELECT * FROM main.{0} EXCEPT SELECT * FROM fresh.{0})
        UNION ALL SELECT *, 'database' FROM (SELECT * FROM fresh.{0} EXCEPT SELECT * FROM main.{0}))
    LEFT JOIN main.sources s ON s.id = source"""


def verify(archive, processes=1):
    """Read all text again and compare, row by row and byte by byte; what does not agree, as sorted lines of text.

    Whoever may read the archive may call this, also while imports go on: what they add meanwhile is left out.
    """
    from tempfile import TemporaryDirectory                     # no page needs it
    home = dirname(archive.db)
    beside = home if os.access(home, os.W_OK) else None         # there is room for a second database; in /tmp, perhaps
    with open_db(archive.db) as db, TemporaryDirectory("", "verify-", beside) as directory:
        db.execute("BEGIN")                                     # one state, from the first query to the last
        ledger = db.execute("SELECT path, done FROM sources").fetchall()
        now = ask(db, "SELECT coalesce(at, 0) FROM last_import")
        new = join(directory, "db.sqlite3")
        with _connected("") as beside:
            listing = Listing(archive, beside)
            problems = [f"{path}: the ledger knows it, but the file is gone" for path in listing.limit(ledger)]
            summary = _build(new, listing, Rules(archive.limits, now), None, processes)
            problems += [f"{path}: could not be read: {why}" for path, why in listing.unreadable + summary.unreadable]
        db.execute("ATTACH ? AS fresh", (new,))
        for query in (_UNBALANCED, _ROLLUP, _ACCOUNTS, *map(_OF_TABLE.format, (*TABLES, "rejects"))):
            problems += ask_all(db, query)
    return sorted(problems)


# -- export -----------------------------------------------------------------------------------------------------------
# SQLite itself makes each row a line of text: that takes less than half the time of Python's csv module.


class Form(NamedTuple):
    """How a row is written as a line."""

    between: str                        # two values
    null: str
    values: dict[str, str]              # kind of column -> SQL of its value as text, {0} is the value; others stay
    place: str = "%s"                   # where a value goes; {0} is its column
    line: str = "%s\n"                  # where the values go


_IF_ANY = "CASE WHEN {0} GLOB '*[' || char(%s) || ']*' THEN %s ELSE {0} END"
_QUOTED = """'"' || replace({0}, '"', '""') || '"'"""
_ESCAPED = "replace(replace(replace(replace({0}, '\\', '\\\\'), char(9), '\\t'), char(10), '\\n'), char(13), '\\r')"
FORMS = {
    "csv": Form(",", "", {"text": _IF_ANY % ("34, 44, 10, 13", _QUOTED)}),
    "tsv": Form("\t", "\\N", {"text": _IF_ANY % ("92, 9, 10, 13", _ESCAPED)}),     # the text format of PostgreSQL
    "jsonl": Form(", ", "null", {"text": "json_quote({0})", "time": "json_quote({0})"}, '"{0}": %s', "{%s}\n")}


class Filter(NamedTuple):
    """An option that chooses from an export, on the command line and in URLs."""

    metavar: str
    condition: str                      # SQL, on columns of the export, and on its times `first` and `last`
    about: str


FLAG_VALUES = "1, 2, 3, 4, 9"
FILTERS = {name: Filter(*row) for name, *row in rows_of(f"""
since  UTC   last >= %s       from this ISO date or time on
until  UTC   first < %s       before this ISO date or time
unit   NAME  unit_id IN (%s)  units by hardware id, the end of it, or nickname; several with commas, patterns with *
site   NAME  site IN (%s)     sites of deployments; several with commas, patterns with *
flag   N     co2_flag = %s    readings with this co2_flag: {FLAG_VALUES}
""")}


def read_filters(db, what, given):
    """The filters that are given, as conditions in SQL."""
    conditions = []
    known = EXPORTS[what].filters.split()
    for name, text in given.items():
        if name not in known:
            raise BadArguments(f"{what}: no option {name[:40]!r}; there are {', '.join(known)}")
        if name == "unit":
            value = quoted(find_units(db, text))
        elif name == "site":
            value = quoted(find_sites(db, text))
        elif name == "flag":
            value = text
            if text not in FLAG_VALUES.split(", "):
                raise BadArguments(f"flag: {text!r} is none of {FLAG_VALUES}")
        else:
            try:
                value = parse_instant(text or "''", name)
            except Rejected as rejected:
                raise BadArguments(str(rejected))
        conditions.append(FILTERS[name].condition % value)
    return conditions


def lines_query(what, form, conditions=()):
    """The query for lines of text; the conditions are as those of filters."""
    table, how = EXPORTS[what], FORMS[form]
    line = how.line % how.between.join(how.place.format(column.name) for column in table.columns)
    values = []
    for column in table.columns:
        text = how.values.get(column.kind, "{0}").format(column.name)
        values.append(f"ifnull({text}, '{how.null}')")
    return table.choose(f"printf('{line}', {', '.join(values)})", conditions) + " ORDER BY unit_id, first"


def _list_gaps(db, now):
    """All gaps, as rows for the export."""
    stays = deployments(db)
    here = whereabouts(stays, now)
    db.execute("DROP TABLE IF EXISTS temp.gaps")
    db.execute('CREATE TEMP TABLE gaps(unit_id, start, "end", missing, state, calls, step, nickname, site)')
    for gap in gaps(db, stays, 0, now):
        place = here[gap.unit_id]
        db.execute("INSERT INTO temp.gaps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*gap, place.nickname, place.site))


def export(db, what, form, given, now):
    """Lines of text, each with its newline: a header, except in jsonl, then the rows.

    `given`: name of a filter -> text. BadArguments when that makes no sense, UnknownName for names that nothing has.
    """
    conditions = read_filters(db, what, given)
    if what == "gaps":
        _list_gaps(db, int(now))
    lines = (line for line, in db.execute(lines_query(what, form, conditions), {"now": int(now)}))
    header = FORMS[form].between.join(column.name for column in EXPORTS[what].columns) + "\n"
    return lines if form == "jsonl" else chain([header], lines)


class ProgressLine:
    """A line on stderr, where that is a terminal, for what takes longer than a moment. Counts what is done."""

    def __init__(self, unit):
        self.unit = unit
        self.done = 0
        self.is_shown = sys.stderr.isatty()
        self.next = time.monotonic() + 0.5

    def __call__(self, number):
        self.done += number
        if self.is_shown and time.monotonic() > self.next:
            self.next = time.monotonic() + 0.1
            sys.stderr.write(f"\r{self.done:,} {self.unit} ")

    def close(self):
        """Leave the line clean."""
        if self.is_shown:
            sys.stderr.write("\r\033[K")


# -- PostgreSQL -------------------------------------------------------------------------------------------------------
# Readings and pings are replaced by whole days, those that imports have changed; errors and deployments are few and
# replaced as a whole. One psql does all of it in one transaction. In the same transaction the receiver notes what it
# holds: the identity of our database, the mark of our last import, a checksum of the stays (they give every row its
# site). So whatever is killed, and whenever, all of it is there or nothing; the next run begins at what is noted.

# kind of an ExportColumn -> type of a column there
_POSTGRES_TYPES = dict(rows_of("""
text     text
time     timestamptz
integer  integer
number   double precision
"""))
_BY_DAY = ("readings", "pings")
RECEIVED = (*_BY_DAY, "errors", "deployments")
_ASK = """
    SET client_min_messages = warning;
    CREATE TABLE IF NOT EXISTS co2_exports(
        name text PRIMARY KEY, identity text, mark bigint, stays bigint, at timestamptz);
    SELECT to_regclass('{0}') IS NOT NULL;
    SELECT identity, mark, stays FROM co2_exports WHERE name = '{0}';
    """
_BEGIN = """
    BEGIN;
    LOCK TABLE co2_exports IN EXCLUSIVE MODE;
    DO $$ BEGIN
        IF (SELECT coalesce(max(identity || '|' || mark || '|' || stays), '')
            FROM co2_exports WHERE name = '{0}') <> '{1}'
        THEN RAISE 'another export was faster: try again';
        END IF;
    END $$;
    """
_COMMIT = """
    DELETE FROM co2_exports WHERE name = '{0}';
    INSERT INTO co2_exports VALUES ('{0}', '{1}', {2}, {3}, now());
    COMMIT;
    """
_STAYS = """
    SELECT unit_id, nickname, site, tier, status, since, until FROM deploy_durations_tiered
    ORDER BY unit_id, since, until, site, tier"""


def _new_table(what):
    table = EXPORTS[what]
    columns = [f"{column.name} {_POSTGRES_TYPES[column.kind]}" for column in table.columns]
    yield f"CREATE TABLE {what}({', '.join(columns)});\n"
    yield f"COMMENT ON TABLE {what} IS {quoted([table.about])};\n"
    for column in table.columns:
        about = column.about if column.unit == "-" else f"{column.about}; {column.unit}"
        yield f"COMMENT ON COLUMN {what}.{column.name} IS {quoted([about])};\n"
    if what in _BY_DAY:
        yield f"CREATE INDEX ON {what}(unit_id, time);\n"


def run_psql(conninfo, lines):
    """What psql prints when it has read these lines. Unusable when it fails: it says why on stderr."""
    from subprocess import PIPE, Popen                          # no page needs it
    options = "--no-psqlrc --no-password --quiet --tuples-only --no-align --set=ON_ERROR_STOP=1".split()
    said = ""
    try:
        with Popen(["psql", *options, "--dbname=" + conninfo], stdin=PIPE, stdout=PIPE, encoding="utf-8",
                   env={**os.environ, "PGCLIENTENCODING": "UTF8"}) as psql:
            psql.stdin.writelines(lines)
            psql.stdin.close()
            said = psql.stdout.read()
    except FileNotFoundError:
        raise Unusable("psql is not installed; it is in the package postgresql-client")
    except BrokenPipeError:                                     # it has ended: its exit status says why
        pass
    if psql.returncode:
        raise Unusable(f"psql failed (exit status {psql.returncode}): nothing has changed there")
    return said


def _lines_of_days(db, query, days, progress):
    for day in days:
        for line, in db.execute(query, day):
            progress(1)
            yield line


def feed(db, what, conninfo):
    """Bring a table of a PostgreSQL database up to date; says what was done. The caller has begun a transaction.

    `conninfo` is what psql takes for --dbname. Passwords are read from ~/.pgpass, by psql.
    """
    identity, mark = db.execute("SELECT identity, mark FROM last_import").fetchone()
    stays = zlib.crc32(repr(db.execute(_STAYS).fetchall()).encode())
    is_there, *noted = run_psql(conninfo, [_ASK.format(what)]).splitlines()
    held = noted[0].split("|") if noted else ["", "", ""]
    if is_there == "t" and not noted:
        raise Unusable(f"a table {what} is there that we have not made: rename it, or drop it")
    if held == [identity, str(mark), str(stays)]:
        return f"{what}: nothing has changed since the last time"
    if what in _BY_DAY and held[::2] == [identity, str(stays)] and int(held[1]) <= mark:
        changed = "SELECT unit_id, day * 86400, (day + 1) * 86400 FROM changes WHERE mark > ? ORDER BY 1, 2"
        days = db.execute(changed, (held[1],)).fetchall()
        deletions = [f"DELETE FROM {what} WHERE unit_id = {quoted([unit])} "
                     f"AND time >= '{seqfile.utc(begin)}Z' AND time < '{seqfile.utc(end)}Z';\n"
                     for unit, begin, end in days]
        query = lines_query(what, "tsv", ["unit_id = ?", "first >= ?", "first < ?"])
        done = f"{len(days)} days of units replaced"
    else:
        days = [()]                                             # one, of all rows
        deletions = [f"DELETE FROM {what};\n"]
        query = lines_query(what, "tsv")
        done = "all replaced" if noted else "all sent"

    with closing(ProgressLine("rows")) as progress:
        run_psql(conninfo, chain(
            [_BEGIN.format(what, "".join(noted))],
            [] if is_there == "t" else _new_table(what),
            deletions,
            [f"COPY {what} FROM stdin;\n"], _lines_of_days(db, query, days, progress), ["\\.\n"],
            [_COMMIT.format(what, identity, mark, stays)]))
    return f"{what}: {done}, {progress.done} rows"


# -- a data package ---------------------------------------------------------------------------------------------------
# CSV files with a description of each column, as a Frictionless Data Package (specs.frictionlessdata.io, version 1).

# kind of an ExportColumn -> type of a field there
_FIELD_TYPES = dict(rows_of("""
text     string
time     datetime
integer  integer
number   number
"""))
PACKAGED = ("readings", "pings", "deployments")


def _write_resource(db, directory, what, given, now):
    """Write a table as CSV; the description of it."""
    path = what + ".csv"
    write_file(join(directory, path), export(db, what, "csv", given, now))
    fields = []
    for column in EXPORTS[what].columns:
        fields.append({"name": column.name, "type": _FIELD_TYPES[column.kind], "description": column.about})
        if column.unit != "-":
            fields[-1]["unit"] = column.unit
    return {"name": what, "path": path, "profile": "tabular-data-resource", "title": EXPORTS[what].about,
            "encoding": "utf-8", "schema": {"fields": fields}}


def write_package(db, directory, given, now):
    """Write the package into a directory. The caller has begun a transaction; `given` as in `export`.

    BadArguments for a directory that holds something else.
    """
    # What is wrong with a filter, of any table, is found before a file is opened.
    conditions = [f"first <= {int(now)}", *read_filters(db, "pings", given)]
    os.makedirs(directory, exist_ok=True)
    file = join(directory, "datapackage.json")
    if os.listdir(directory) and not exists(file):
        raise BadArguments(f"{directory} holds something else than a data package: name an empty directory")
    resources = [_write_resource(db, directory, what, given, now) for what in PACKAGED]
    start, end = db.execute(EXPORTS["readings"].choose("min(time), max(time)", conditions)).fetchone()
    package = {
        "profile": "tabular-data-package",
        "name": "co2-readings",
        "title": "CO2 and temperature measured by units in the field",
        "description": "Times are UTC, by the units' clocks. A deployment lasts from start_ts until before end_ts. "
                       f"Flags are those of {_QARTOD}. Written by co2d {__version__}.",
        "version": seqfile.utc(now, "%Y.%m.%d"),
        "temporal": {"start": start, "end": end},
        "resources": resources}
    write_file(file, [json.dumps(package, ensure_ascii=False, indent=2)])


# -- commands ---------------------------------------------------------------------------------------------------------


def _cores():
    """How many this process may use, as far as the system tells: macOS does not."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def command_import(archive, arguments, run=import_new):
    """Import what is new, and print a summary.

    examples:
      %(prog)s                              what is new
      %(prog)s --data-dir lab-a/remote_data --data-dir lab-b/remote_data --var-dir merged
    """
    act_as_owner(archive.db)
    with closing(ProgressLine("bytes")) as progress:
        summary = run(archive, progress=progress, processes=_cores())
    print(summary)
    return 1 if summary.unreadable else 0


def command_rebuild(archive, arguments):
    """All text into a new database.

    examples:
      %(prog)s                              after a change of [quality] in co2d.conf
      sudo -u co2d %(prog)s                 on a station that runs as a service
    """
    return command_import(archive, arguments, rebuild)


def print_lines(archive, query):
    """Print what a query gives; how many lines that was."""
    number = 0
    with open_db(archive.db) as db:
        for line, in db.execute(query):
            print(_printable(line))
            number += 1
    return number


def command_status(archive, arguments):
    """What became of each file: bytes, rows, repeats, refused lines, unknown further fields; what could not be read.

    examples:
      %(prog)s                              what became of each file
      %(prog)s | sort -k3,3nr | head        files with the most rejected bytes first
    """
    print_lines(archive, """
        SELECT '     bytes   imported  rejected   not yet     rows  repeats  rejects    extra  file'
        UNION ALL SELECT printf('%10d %10d %9d %9d %8d %8d %8d %8d  %s', size, imported_bytes, rejected_bytes,
            size - done, imported, repeated, rejected, extra_fields, path)
        FROM (SELECT * FROM sources ORDER BY path)
        UNION ALL SELECT printf('%10d %10d %9d %9d %8d %8d %8d %8d  total', sum(size), sum(imported_bytes),
            sum(rejected_bytes), sum(size - done), sum(imported), sum(repeated), sum(rejected), sum(extra_fields))
        FROM sources
        UNION ALL SELECT 'last import: ' || coalesce(datetime(at, 'unixepoch') || ' UTC', 'never') FROM last_import""")
    troubled = print_lines(archive, """
        SELECT 'not imported: ' || path || ': ' || trouble FROM sources WHERE trouble IS NOT NULL ORDER BY path""")
    return 1 if troubled else 0


def command_rejects(archive, arguments):
    """Lines that were refused: file, line, offset, reason, times of the neighbours, text.

    examples:
      %(prog)s                              all of them
      %(prog)s | grep 'clock not set'
    """
    # Where neither neighbour is known, NULL makes all of (between ...) NULL.
    print_lines(archive, """
        SELECT printf('%s:%d: byte %d: %s%s: %s', s.path, r.line, r.offset, r.reason,
            ' (between ' || nullif(ifnull(strftime('%Y-%m-%dT%H:%M:%S', r.before_ts, 'unixepoch'), '?') || ' and ' ||
                ifnull(strftime('%Y-%m-%dT%H:%M:%S', r.after_ts, 'unixepoch'), '?'), '? and ?') || ')',
            substr(r.text, 1, 160))
        FROM rejects r JOIN sources s ON s.id = r.source ORDER BY s.path, r.line""")
    return 0


def command_verify(archive, arguments):
    """Prove that database and text agree.

    examples:
      %(prog)s                              exit status 0: database and text agree
      %(prog)s --db copy.sqlite3            the same of a copy
    """
    problems = verify(archive, _cores())
    for line in problems:
        print(_printable(line))
    print(f"{len(problems)} differences" if problems else "database and text agree")
    return 1 if problems else 0


def check_export(arguments, given):
    """BadArguments for options that do not go together."""
    psql, package, what, output = arguments.psql, arguments.package, arguments.what, arguments.output
    for is_wrong, why in (
            (arguments.resume, "--resume has gone, as a file cannot take rows back: use --psql CONNINFO, or --since"),
            (package and (what or psql or output),
             f"--package DIR writes {', '.join(PACKAGED)}: nothing else can be named with it"),
            (not package and not what, f"say what to export: {', '.join(EXPORTS)}"),
            (psql and what not in RECEIVED,
             f"--psql takes {', '.join(RECEIVED)}; {what} are made anew for each export"),
            (psql and (given or output), "--psql takes all rows into tables: no other option makes sense with it"),
            (re.search(r"password\s*=|://[^/@]*:[^/@]*@", psql or ""),
             "a password on the command line can be seen by all users: write it to ~/.pgpass")):
        if is_wrong:
            raise BadArguments(why)


def command_export(archive, arguments):
    """Take data elsewhere: as CSV, TSV or JSON lines, into a PostgreSQL database, or as a data package.

    examples:
      %(prog)s readings --site vj_re_sn_4 --since 2026-10-01 -o site.csv
      %(prog)s units                        first and last ping, days with pings, of each unit
      %(prog)s errors --unit varanger-03 --format jsonl
      %(prog)s readings --psql 'host=db.example.org dbname=co2 user=co2'
      %(prog)s --package co2-2026 --since 2026-01-01 --until 2027-01-01
    """
    given = {name: text for name, text in vars(arguments).items() if name in FILTERS and text is not None}
    what = arguments.what
    check_export(arguments, given)
    with open_db(archive.db) as db:
        db.execute("BEGIN")                                     # one state from the first row to the last
        if arguments.psql:
            print(feed(db, what, arguments.psql))
        elif arguments.package:
            write_package(db, arguments.package, given, time.time())
        else:
            lines = export(db, what, arguments.format, given, time.time())
            if arguments.output:
                write_file(arguments.output, lines)
            else:
                sys.stdout.writelines(lines)
    return 0


COMMANDS = {"import": command_import, "status": command_status, "rejects": command_rejects, "verify": command_verify,
            "rebuild": command_rebuild, "export": command_export}


_OPTIONS = """
--config   FILE  configuration (default: CO2D_CONF, or co2d.conf beside the script)
--var-dir  DIR   server directory (pings, database)
--db       FILE  database
"""
_EXPORT_OPTIONS = f"""
-o --output  FILE      instead of stdout
--psql       CONNINFO  bring the table WHAT of this PostgreSQL database up to date; passwords: ~/.pgpass
--package    DIR       write a data package: {', '.join(PACKAGED)} as CSV, and a description
"""


def _add_options(add, table):
    for names, metavar, about in rows_of(table):
        add(*names.split(), metavar=metavar, help=about)


def make_parser():
    """The command line; the common options may stand before the command or behind it. The docstring of each of COMMANDS
    is its help."""
    from inspect import cleandoc                                # no page needs it
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    _add_options(common.add_argument, _OPTIONS)
    common.add_argument("--data-dir", action="append", metavar="DIR",
                        help="data directory; several are merged, each with the pings in DIR/../var")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description="From text files to SQLite, every byte accounted for.",
                                     epilog="""examples:
  %(prog)s                              import what is new
  %(prog)s status                       what became of each file
  %(prog)s export readings -o readings.csv""", parents=[common], formatter_class=formatter)
    parser.add_argument("--version", action="version", version="%(prog)s " + __version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, run in COMMANDS.items():
        about, examples = cleandoc(run.__doc__).split("\n\n")
        commands.add_parser(name, help=about, description=about, epilog=examples, parents=[common],
                            formatter_class=formatter)
    add = commands.choices["export"].add_argument
    add("what", nargs="?", choices=list(EXPORTS), metavar="WHAT", help=", ".join(EXPORTS))
    add("--format", choices=list(FORMS), default="csv", help="csv (default), tsv (NULL is \\N) or jsonl")
    for name, option in FILTERS.items():
        add("--" + name, metavar=option.metavar, help=option.about)
    add("--resume", action="store_true", help=argparse.SUPPRESS)        # `check_export` names the new way
    _add_options(add, _EXPORT_OPTIONS)
    return parser


def main(argv=None):
    """Run a command; the exit status."""
    parser = make_parser()
    name = parser.prog.removesuffix(".py")

    def work():
        arguments = parser.parse_args(argv)
        given = vars(arguments)
        data_dirs = given.get("data_dir", [None])
        settings = load_settings(given.get("config"), {**given, "data_dir": data_dirs[0]})
        for warning in settings.warnings:
            print(f"{name}: warning: {_printable(warning)}", file=sys.stderr)
        archive = settings.archive()
        if len(data_dirs) > 1:
            archive = archive._replace(data_dirs=tuple(data_dirs))
        return COMMANDS[arguments.command or "import"](archive, arguments)

    return run_script(name, work)


if __name__ == "__main__":
    sys.exit(main())
