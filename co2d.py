#!/usr/bin/env python3
"""co2d: the daemon that CO2 sensor units in the field report to.

A *unit* wakes once a day, says that it is alive (a *ping*), looks for *updates*, pushes its files in *chunks*, and
sleeps. What it can bear is narrow: one request per connection, the reply ends when we close, any surprising status ends
its day. So every reply has Content-Length and ``Connection: close``; the routes are the table `ROUTES`.

How a request flows: bytes -> `parse_head` -> `Request` -> `respond(station, request)` -> `Response` -> bytes. Nothing
in the middle touches a socket. Text files are the truth: a request only appends to them, durably (`seqfile`); one
thread alone imports what is new into the database, moments later (`importer`); the status pages are drawn from the
database (`plot_ascii`). Without a database uploads and pings go on as ever.

Threads, and where they meet:

    main            signals, configuration, systemd
    workers         each accepts a connection, serves it, closes it; idle ones wait in accept. What a reply waits for
                    (`Response.after`) does not hold up its worker: the one that writes, for many at once, sends it
    tend            starts workers, and thins out slow clients when there may be no more
    import          takes `Station.changed`, the files that requests have written to, and imports them
    health          looks for problems every minute, and when one is reported; writes health.json

    Server._lock    guards the numbers of threads and the table of open connections
    Station._lock   guards counters, `changed`, the known units and their usage
    Health._lock    guards the list of problems
    Station.drawing is held by the one that draws a status page: together they would take all memory there is, and
                    `viewers` counts who waits for it: all of them would take all threads
    (seqfile)       one lock per upload directory, one per row log
    Station.settings is replaced as a whole on reload

Exit status: 0 stopped well, 1 failed, 2 usage, 78 configuration, 130 interrupted twice.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import fnmatch
import functools
import ipaddress
import json
import logging
import mimetypes
import os
import queue
import re
import resource
import select
import signal
import socket
import socketserver
import sqlite3
import stat
import struct
import sys
import threading
import time
from collections import Counter
from http import HTTPStatus
from typing import (TYPE_CHECKING, Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set,
                    Tuple)
from urllib.parse import unquote_to_bytes

import importer
import seqfile
from importer import SEGMENT, SETTINGS, BadConfig, Settings

if TYPE_CHECKING:
    import ssl

HERE = os.path.dirname(os.path.realpath(__file__))
EX_CONFIG = 78                          # sysexits.h; systemd is told not to restart on it

MAX_HEAD = 8 * 1024                     # bytes of request line and header fields
MAX_FIELDS = 64
MAX_DEPTH = 8                           # path segments of an upload; units use three
RECENT_PINGS = 20
CLOCK_SLACK = 10                        # seconds; less is how clocks are set right
LOOK = 60.0                             # seconds between two looks for problems
DATABASE_PATIENCE = 60                  # seconds between imports, at most, when one fails or takes long
REST = 4                                # times as long as an import took, nothing is imported: units come first

log = logging.getLogger("co2d")

# -- messages ---------------------------------------------------------------------------------------------------------


Headers = Tuple[Tuple[str, str], ...]
Labels = Tuple[Tuple[str, Any], ...]
_compact = json.JSONEncoder(separators=(",", ":")).encode


class Request(NamedTuple):
    """A well-formed request."""

    method: str
    target: str                         # as sent, for the log
    path: Tuple[str, ...]               # decoded segments; "/" is ("",)
    query: List[Tuple[str, str]]        # decoded, in order
    headers: Dict[str, str]             # names in lower case
    body: bytes = b""
    peer: str = "127.0.0.1"
    now: float = 0.0                    # UTC seconds

    def argument(self, name: str) -> str:
        """The first value of a query argument, "" without one."""
        return next((value for key, value in self.query if key == name), "")


class Response(NamedTuple):
    """What goes back; `note` is for the log."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: Headers = ()
    note: str = ""
    after: Optional[Callable[[Callable[[], None]], None]] = None    # stores what belongs to it, and calls what sends it
    sent: Optional[Callable[[], None]] = None                   # called when its last byte was handed to the kernel


class Refused(Exception):
    """Raised anywhere, answered in one place."""

    def __init__(self, status: int, reason: str, headers: Headers = ()) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers

    def response(self) -> Response:
        """The JSON that says why."""
        return json_response({"error": self.reason}, self.status, self.reason, self.headers)


def json_response(value: Any, status: int = 200, note: str = "", headers: Headers = ()) -> Response:
    """Compact JSON on one line."""
    return Response(status, _compact(value).encode() + b"\n", "application/json", tuple(headers), note)


def text_response(text: str, kind: str = "text/plain", headers: Headers = ()) -> Response:
    """Text in UTF-8."""
    return Response(200, text.encode("utf-8", "replace"), kind + "; charset=utf-8", tuple(headers))


# -- parsing ----------------------------------------------------------------------------------------------------------
# Stricter than RFC 9112 asks: what no honest client sends is refused before anything else sees it. Looser in one place:
# the target may hold raw spaces and UTF-8, because the units send nicknames as they are.

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ((?:https?://[^/?#\x00-\x20\x7f]+)?/[^\x00-\x1f\x7f]*)"
                           rb" HTTP/([0-9])\.([0-9])\Z")
_FIELD = re.compile(rb"(" + _TOKEN + rb"):[ \t]*((?:[^\x00-\x08\x0a-\x1f\x7f]*[^\x00-\x20\x7f])?)[ \t]*\Z")
_FORBIDDEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r[^\n]|(?:^|[^\r])\n")
_HOST = re.compile(rb"(?:[A-Za-z0-9._~%!$&'()*+,;=-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?\Z")
METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"}


def head_length(buffer: bytes) -> int:
    """Bytes of the request's head, its empty line included; 0: not complete. Refused: can never become a request."""
    end = buffer.find(b"\r\n\r\n")
    head = buffer if end < 0 else buffer[:end + 4]
    if end < 0 and _FORBIDDEN.search(head):                     # in a complete one parse_head finds it
        raise Refused(400, "control character, or a line that does not end in CRLF")
    line, complete, _ = head.partition(b"\r\n")
    if len(head) > MAX_HEAD:
        raise Refused(431 if complete else 414, "head longer than %d bytes" % MAX_HEAD)
    if complete and end < 0:                                    # what is complete is left to parse_head
        _parse_request_line(line)
    return end + 4 if end >= 0 else 0


def parse_head(head: bytes) -> Request:
    """The request of a complete head; Refused when it is malformed."""
    line, *lines = head[:-4].split(b"\r\n")
    method, target, version = _parse_request_line(line)
    headers = _parse_fields(lines)
    _check_headers(headers, version)
    place, _, query = _origin_form(target).partition(b"?")
    return Request(method, target.decode("utf-8", "replace"), tuple(map(_decode, place[1:].split(b"/"))),
                   _parse_query(query), headers)


def _parse_request_line(line: bytes) -> Tuple[str, bytes, str]:
    found = _REQUEST_LINE.match(line)
    if not found:
        raise Refused(400, "malformed request line")
    if found[3] + found[4] not in (b"10", b"11"):
        raise Refused(505, "HTTP/1.0 or HTTP/1.1 only")
    if found[1].decode() not in METHODS:
        raise Refused(501, "unknown method")
    return found[1].decode(), found[2], "1.%c" % found[4][0]


def _origin_form(target: bytes) -> bytes:
    """/path?query of a target that may be an absolute URI."""
    return target if target.startswith(b"/") else b"/" + target.split(b"/", 3)[3]


def _parse_fields(lines: Sequence[bytes]) -> Dict[str, str]:
    if len(lines) > MAX_FIELDS:
        raise Refused(431, "more than %d header fields" % MAX_FIELDS)
    headers: Dict[str, str] = {}
    for line in lines:
        found = _FIELD.match(line)
        if not found:
            raise Refused(400, "malformed header field")
        name = found[1].decode().lower()
        if name in headers and name in ("host", "content-length", "transfer-encoding"):
            raise Refused(400, "repeated header field " + name)
        headers[name] = found[2].decode("latin-1")
    return headers


def _check_headers(headers: Dict[str, str], version: str) -> None:
    if "transfer-encoding" in headers:
        doubtful = "content-length" in headers or version == "1.0"
        raise Refused(400 if doubtful else 501, "Transfer-Encoding is not accepted")
    if not re.match(r"[0-9]{1,10}\Z", headers.get("content-length", "0")):
        raise Refused(400, "malformed Content-Length")
    if version == "1.1" and "host" not in headers:
        raise Refused(400, "no Host")
    if headers.get("host") and not _HOST.match(headers["host"].encode("latin-1")):
        raise Refused(400, "malformed Host")
    if version == "1.0":
        headers.pop("expect", None)                             # RFC 9110, 10.1.1: such a client cannot read a 100
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise Refused(417, "unknown expectation")


def _decode(raw: bytes) -> str:
    return (unquote_to_bytes(raw) if b"%" in raw else raw).decode("utf-8", "replace")


def _parse_query(query: bytes) -> List[Tuple[str, str]]:
    """Arguments in order. A plus stays a plus: the units do not encode anything, and nicknames may hold one."""
    pairs = (part.partition(b"=") for part in query.split(b"&") if part)
    return [(_decode(name), _decode(value)) for name, _, value in pairs]


# -- health -----------------------------------------------------------------------------------------------------------


class Health:
    """What is wrong, told by whoever notices it, and found in the database. Words for people: see importer.Problem.

    `_lock` guards `_reported` and `_found`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.changed = threading.Event()
        self._lock = threading.Lock()
        self._reported: Dict[str, importer.Problem] = {}
        self._found: List[importer.Problem] = []

    def report(self, key: str, level: str, text: str, unit: str = "") -> None:
        """Something is wrong, or still is: `key` is the same for as long as it lasts, the text may change."""
        with self._lock:
            before = self._reported.get(key)
            since = before.since if before else int(self.clock())
            self._reported[key] = importer.Problem(key, level, unit, text, since)
        if not before:
            self.changed.set()

    def clear(self, key: str) -> None:
        """It is over, if it was there at all."""
        if key in self._reported:
            with self._lock:
                self._reported.pop(key, None)
            self.changed.set()

    def find(self, found: List[importer.Problem]) -> None:
        """What the database shows, in place of what it showed before."""
        with self._lock:
            self._found = found

    def problems(self) -> List[importer.Problem]:
        """All that is wrong, worst first."""
        with self._lock:
            return importer.worst_first([*self._reported.values(), *self._found])


# -- what units take of their updates ---------------------------------------------------------------------------------


class Fetches:
    """The log of what units take of their updates, and what of it decides whether an update is still listed."""

    def __init__(self, directory: str, sync: seqfile.Sync) -> None:
        self.log = seqfile.RowLog(directory, seqfile.FETCHES, sync=sync)
        self._lock = threading.Lock()                           # guards _courses and what is in it
        self._courses = importer.read_courses(directory)        # by unit and update

    def _course_locked(self, unit: str, name: str) -> importer.Course:
        return self._courses.setdefault((unit, name), importer.Course())

    def started(self, unit: str, name: str, now: float) -> None:
        """The unit asks for the list of the files of update `name`. To be called before the reply: rows keep order."""
        self._note(unit, name, importer.STARTED, now)

    def handed_over(self, unit: str, name: str, path: str, files: Sequence[str], now: float) -> None:
        """The last byte of a file was handed over; `files` are all files of the update."""
        self._note(unit, name, path, now)
        with self._lock:
            course = self._course_locked(unit, name)
            is_news = not course.is_over and (course.was_complete or course.taken.issuperset(files))
            course.is_over |= is_news
        if is_news:
            self._note(unit, name, importer.COMPLETE, now)

    def is_given_up(self, unit: str, name: str, now: float) -> bool:
        """Whether the unit has spent so many nights on an update that it is to send its data first."""
        with self._lock:
            course = self._course_locked(unit, name)
            nights = course.nights_in_vain(seqfile.utc(now, "%Y-%m-%d"))
        if nights < importer.MOST_NIGHTS:
            return False
        if not course.given_up:
            log.warning("updates/%s of %s is not listed any more: it took %d nights in vain", name, unit, nights)
            self._note(unit, name, importer.GIVEN_UP, now)
        return True

    def _note(self, unit: str, name: str, what: str, now: float) -> None:
        when = seqfile.utc(now, fraction=True)
        with self._lock:
            self._course_locked(unit, name).learn(when[:10], what)
        row = "\t".join([when, unit, name, what]) + "\n"
        self.log.append(row.encode(), _told_of_fetch)


def _told_of_fetch(file: str, problem: Optional[Exception]) -> None:
    if problem:
        log.error("what a unit took of an update is NOT NOTED: %s", problem)


# -- the station ------------------------------------------------------------------------------------------------------


class Usage:
    """Bytes and files that one unit takes on disk."""

    def __init__(self, directory: str) -> None:
        self.bytes = self.files = 0
        for parent, _, names in os.walk(directory):
            for name in names:
                self.files += 1
                self.bytes += _size_of(os.path.join(parent, name))


def _size_of(file: str) -> int:
    try:
        return os.lstat(file).st_size
    except OSError:
        return 0


class Station:
    """All state of the daemon that outlives a request. `clock` gives UTC seconds."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time,
                 sync: seqfile.Sync = seqfile.fdatasync) -> None:
        self.settings, self.clock, self._sync = settings, clock, sync
        for directory in (settings.data_dir, settings.var_dir, *map(self.var, ("pings", "fetches", "pub"))):
            seqfile.make_directory(directory, settle=True)
        self.archive = settings.archive()
        self.health = Health(clock)
        self.inbox = seqfile.Inbox(settings.data_dir, settings.ask_older, self.sync)
        self.pings = seqfile.RowLog(self.var("pings"), seqfile.PINGS, sync=self.sync)
        self.fetches = Fetches(self.var(seqfile.FETCHES_FOLDER), self.sync)
        self.started = self._latest = clock()
        self._lock, self.drawing = threading.Lock(), threading.Lock()
        self.viewers = threading.BoundedSemaphore(max(1, settings.threads // 8))
        self.counters: Dict[Tuple[str, Labels], float] = Counter()    # type: ignore[assignment]
        self.changed: Set[str] = set()
        self._changed_since = self.started
        self.connections: Callable[[], int] = lambda: 0         # the server's, once there is one
        self.something_changed = threading.Event()
        self._known: Set[str] = set(os.listdir(settings.data_dir))
        self._usage: Dict[str, Usage] = {}

    def var(self, *names: str) -> str:
        """A path below the server's own directory."""
        return os.path.join(self.settings.var_dir, *names)

    def data(self, *names: str) -> str:
        """A path below the units' directories."""
        return os.path.join(self.settings.data_dir, *names)

    def sync(self, fd: int) -> None:
        """Make the data of an open file durable, and count how long that took."""
        began = time.monotonic()
        self._sync(fd)
        with self._lock:
            self.counters["co2d_syncs_total", ()] += 1
            self.counters["co2d_sync_seconds_total", ()] += time.monotonic() - began

    def now(self) -> float:
        """UTC seconds. A clock that went back is logged: it dates pings and replaced bytes."""
        now = self.clock()
        with self._lock:
            back, self._latest = self._latest - now, now
        if back > CLOCK_SLACK:
            log.warning("the clock went back by %.0f s", back)
        return now

    def count(self, name: str, amount: float = 1, **labels: Any) -> None:
        """Add to a counter of /metrics."""
        with self._lock:
            self.counters[name, tuple(labels.items())] += amount

    def samples(self) -> Dict[Tuple[str, Labels], float]:
        """The counters, and the gauges of what goes on at this moment."""
        with self._lock:
            samples = dict(self.counters)
            samples["co2d_open_connections", ()] = self.connections()
            samples["co2d_import_lag_seconds", ()] = self.clock() - self._changed_since if self.changed else 0
        return samples

    def touch(self, file: str) -> None:
        """Tell the import thread that a file has changed."""
        with self._lock:
            if not self.changed:
                self._changed_since = self.clock()
                self.something_changed.set()
            self.changed.add(file)

    def take_changed(self) -> Set[str]:
        """The files that have changed since the last call."""
        with self._lock:
            taken, self.changed = self.changed, set()
            self.something_changed.clear()
        return taken

    def admit(self, unit: str, reports: bool = True) -> None:
        """Refuse units that may not report. Those that only look for updates leave no trace."""
        if not any(fnmatch.fnmatchcase(unit, pattern) for pattern in self.settings.units.split()):
            raise Refused(403, "unit is not in the list of units")
        if not reports:
            return
        with self._lock:
            if unit not in self._known:
                if len(self._known) >= self.settings.max_units:
                    raise Refused(403, "more than %d units" % self.settings.max_units)
                self._known.add(unit)

    def reserve(self, unit: str, path: Sequence[str], end: int, length: int) -> None:
        """Refuse a chunk that would exceed a quota or fill the disk."""
        settings = self.settings
        if not self.has_room():
            raise Refused(507, "less than %g %% of the disk is free" % settings.keep_free)
        if end > settings.max_file:
            raise Refused(507, "file would exceed %d bytes" % settings.max_file)
        if self._is_over_quota(unit, path, length) and self._is_over_quota(unit, path, length, recount=True):
            raise Refused(507, "unit would exceed %d bytes or %d files"
                          % (settings.max_unit_bytes, settings.max_unit_files))

    def _is_over_quota(self, unit: str, path: Sequence[str], length: int, recount: bool = False) -> bool:
        """`recount`: files may have been removed since we counted."""
        if recount:
            with self._lock:
                self._usage.pop(unit, None)
        usage = self._usage_of(unit)
        full = usage.files >= self.settings.max_unit_files and not os.path.lexists(self.data(unit, *path))
        return full or usage.bytes + length > self.settings.max_unit_bytes

    def has_room(self) -> bool:
        """Whether the disk has more free than is kept back. A data directory that was removed is made again."""
        try:
            disk = os.statvfs(self.settings.data_dir)
        except FileNotFoundError:
            seqfile.make_directory(self.settings.data_dir)
            disk = os.statvfs(self.settings.data_dir)
        return disk.f_bavail >= disk.f_blocks * self.settings.keep_free / 100

    def _usage_of(self, unit: str) -> Usage:
        with self._lock:
            usage = self._usage.get(unit)
        if usage is None:
            usage = Usage(self.data(unit))
            with self._lock:
                usage = self._usage.setdefault(unit, usage)
        return usage

    def charge(self, unit: str, receipt: seqfile.Receipt) -> None:
        """Add what a chunk took to the unit's usage."""
        usage = self._usage_of(unit)
        with self._lock:
            usage.bytes += receipt.grew
            usage.files += receipt.created


# -- endpoints: units -------------------------------------------------------------------------------------------------


def hello(station: Station, request: Request) -> Response:
    """Units get their hello, browsers an index."""
    if "text/html" in request.headers.get("accept", ""):
        return page(station, request, "index", 0)
    return json_response("Hello world!")


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def ping_row(now: float, unit: str, request: Request) -> bytes:
    """A line of pings-NNNN.tsv; control characters in values would forge lines."""
    said = dict(reversed(request.query))
    values = [_UNPRINTABLE.sub("?", said.get(name, "None"))[:128] for name in ("site_code", "rssi_raw", "rssi_dbm")]
    return "\t".join([seqfile.utc(now, fraction=True), unit, *values]).encode("utf-8", "replace") + b"\n"


def alive(station: Station, request: Request, unit: str) -> Response:
    """A ping. The answer is 200 whatever happens to the row: any other status would end the unit's day."""
    station.admit(unit)
    row = ping_row(request.now, unit, request)
    return Response(200, b"{}\n", after=functools.partial(_store_ping, station, unit, row))


def _store_ping(station: Station, unit: str, row: bytes, send: Callable[[], None]) -> None:
    def told(file: str, problem: Optional[Exception]) -> None:
        station.count("co2d_pings_lost_total" if problem else "co2d_pings_total")
        if problem:
            log.error("ping of %s NOT STORED: %s", unit, problem)
        else:
            station.touch(file)
        send()

    station.pings.append(row, told)


def push(station: Station, request: Request, unit: str, path: Tuple[str, ...]) -> Response:
    """A chunk of a file; see seqfile for what becomes of it."""
    station.admit(unit)
    if path[0] not in station.settings.upload_dirs.split() or not 2 <= len(path) <= MAX_DEPTH:
        raise Refused(403, "uploads go below %s" % " or ".join(station.settings.upload_dirs.split()))
    offsets = [value for name, value in request.query if name == "offset"]
    if len(offsets) != 1 or not re.match(r"[0-9]{1,15}\Z", offsets[0]):
        raise Refused(400, "exactly one offset is needed, a whole number")
    if not request.body:
        raise Refused(400, "empty body")
    return _store(station, request, unit, list(path), int(offsets[0]))


def _store(station: Station, request: Request, unit: str, path: List[str], offset: int) -> Response:
    try:
        station.reserve(unit, path, offset + len(request.body), len(request.body))
        receipt = station.inbox.receive(unit, path, offset, request.body, request.now)
    except OSError as error:
        raise _storage_refusal(station, error)
    station.charge(unit, receipt)
    station.count("co2d_chunks_total", kind=receipt.kind)
    station.count("co2d_stored_bytes_total", receipt.grew)
    name, position = receipt.ack
    if receipt.kind == "gap":
        return json_response({"error": "SKIPPED_PART_OF_FILE", "ack_file": [name, position, position]}, 416, "gap")
    if receipt.set_aside:
        log.warning("%s sent other bytes for %s: the old ones are in %s", unit, "/".join(path), receipt.set_aside)
        station.touch(receipt.set_aside)
    if receipt.asked:
        log.info("%s is asked for %s again", unit, name)
    station.touch(station.data(unit, *path))
    return json_response({"ack_file": [name, position, position]}, note=receipt.kind)


def _storage_refusal(station: Station, error: OSError) -> Refused:
    """How an upload ends that the disk refused: the unit comes back next day."""
    station.count("co2d_storage_errors_total")
    log.error("upload not stored: %s", error)
    if isinstance(error, IsADirectoryError) or error.errno == errno.ELOOP:
        return Refused(400, "not a regular file")
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return Refused(507 if full else 503, "cannot store: %s" % (error.strerror or error))


# -- endpoints: updates -----------------------------------------------------------------------------------------------


class NotServable(Exception):
    """An update that no unit could fetch completely; says why."""


def update_files(directory: int, prefix: str = "") -> Iterator[str]:
    """Relative paths of all files below an open directory; NotServable where a unit could not fetch one."""
    names = sorted(os.listdir(directory))
    if not names:
        raise NotServable("%s is empty" % (prefix or "it"))
    for name in names:
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        if not SEGMENT.match(name) or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise NotServable("units cannot ask for %r" % (prefix + name))
        if stat.S_ISDIR(mode):
            with seqfile.open_beneath(directory, name) as below:
                yield from update_files(below, prefix + name + "/")
        elif os.access(name, os.R_OK, dir_fd=directory, effective_ids=True):
            yield prefix + name
        else:
            raise NotServable("this process may not read %r" % (prefix + name))


def files_of_update(data_dir: str, unit: str, name: str) -> list[str]:
    """Relative paths of the files of an update; NotServable when a unit could not fetch it completely."""
    if not (name.startswith(seqfile.UPDATE_PREFIX) and SEGMENT.match(name)):
        raise NotServable("its name does not start with %s, or has characters that units cannot ask for"
                          % seqfile.UPDATE_PREFIX)
    try:
        with seqfile.open_directory(data_dir, [unit, seqfile.UPDATES_FOLDER, name]) as directory:
            return list(update_files(directory))
    except OSError as error:
        raise NotServable(str(error))


def visible_updates(data_dir: str, unit: str) -> list[str]:
    """Names of what lies in a unit's directory of updates, servable or not, in the order in which units sort them."""
    try:
        with seqfile.open_directory(data_dir, [unit, seqfile.UPDATES_FOLDER]) as directory:
            return sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except FileNotFoundError:
        return []


def servable_updates(data_dir: str, unit: str) -> list[str]:
    """Names of the updates that a unit can fetch: complete, not empty, nothing strange in them."""
    names = []
    for name in visible_updates(data_dir, unit):
        try:
            files_of_update(data_dir, unit, name)
            names.append(name)
        except NotServable as why:
            log.warning("updates/%s of %s is not listed: %s", name, unit, why)
    return names


def list_updates(station: Station, request: Request, unit: str) -> Response:
    """The updates there are for a unit, or 404. A unit takes the last one; if it cannot, its data go first."""
    station.admit(unit, reports=False)
    try:
        names = servable_updates(station.settings.data_dir, unit)
    except OSError as error:
        log.warning("updates of %s: %s", unit, error)
        names = []
    if not names or station.fetches.is_given_up(unit, names[-1], request.now):
        raise Refused(404, "no updates")
    return json_response(names)


def update(station: Station, request: Request, unit: str, path: tuple[str, ...]) -> Response:
    """A file of an update, or the list of what is in a directory of it."""
    station.admit(unit, reports=False)
    name = path[0]
    parts = [unit, seqfile.UPDATES_FOLDER, *path]
    try:
        files = files_of_update(station.settings.data_dir, unit, name)
        body = _read_file(station.settings.data_dir, parts)[0]
    except IsADirectoryError:
        return _list_files(station, request, parts)
    except (NotServable, OSError):
        raise Refused(404, "no such update, or no such file in it")
    if request.method == "HEAD":
        return Response(200, body, "application/octet-stream")
    taken = functools.partial(station.fetches.handed_over, unit, name, "/".join(path[1:]), files, request.now)
    return Response(200, body, "application/octet-stream", sent=taken)


def _list_files(station: Station, request: Request, parts: list[str]) -> Response:
    """The answer for a directory of an update. Asking for all that is below one is how a unit begins to take it."""
    unit, _, name, *below = parts
    with seqfile.open_directory(station.settings.data_dir, parts) as directory:
        if request.argument("recursive") not in ("True", "1"):
            return json_response(sorted(os.listdir(directory)))
        reply = json_response(list(update_files(directory)))
    if not below and request.method != "HEAD":
        station.fetches.started(unit, name, request.now)
    return reply


def _read_file(root: str, parts: Sequence[str]) -> Tuple[bytes, float]:
    """Bytes and time of change of a regular file, reached without following links."""
    with seqfile.open_directory(root, list(parts[:-1])) as directory:
        with os.fdopen(seqfile.open_file(directory, parts[-1], os.O_RDONLY), "rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime


# -- endpoints: people ------------------------------------------------------------------------------------------------


def recent(station: Station, request: Request) -> Response:
    """The newest pings as text."""
    allow(request, station.settings.status_allow)
    rows = [_short_ping(line) for line in newest_pings(station.var("pings"), RECENT_PINGS)] or ["No recent pings"]
    lines = [seqfile.utc(request.now) + "\t(now)", *rows]
    if request.argument("asc") in ("1", "true", "True"):
        lines.reverse()
    refresh = request.argument("refresh")
    headers = (("Refresh", refresh),) if re.match(r"[0-9]{1,6}\Z", refresh) else ()
    return text_response("\n".join(lines) + "\n", headers=headers)


def newest_pings(directory: str, number: int) -> List[str]:
    """The last lines over all ping files, newest first."""
    lines: List[str] = []
    for name in reversed(seqfile.files_in_sequence(directory, seqfile.PINGS)):
        lines += reversed(_lines_of(os.path.join(directory, name)))
        if len(lines) >= number:
            break
    return lines[:number]


def _lines_of(file: str) -> List[str]:
    try:
        with open(file, encoding="utf-8", errors="replace", newline="\n") as stream:
            return [line for line in stream.read().split("\n") if line]
    except OSError:
        return []


def _short_ping(line: str) -> str:
    when, _, rest = line.partition("\t")
    rest = rest[len(seqfile.UNIT_PREFIX):] if rest.startswith(seqfile.UNIT_PREFIX) else rest
    return "\t".join(_UNPRINTABLE.sub("?", field) for field in (when.split(".")[0], *rest.split("\t")))


_CSP = ("Content-Security-Policy",
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def page(station: Station, request: Request, view: str, refresh: int) -> Response:
    """A status page drawn from the database: HTML, or plain text for curl and whoever asks for it."""
    allow(request, station.settings.status_allow)
    accept, agent = request.headers.get("accept", ""), request.headers.get("user-agent", "")
    import plot_ascii                                           # a daemon that nobody looks at stays small
    html = not accept.startswith("text/plain") and not agent.startswith("curl/")
    if not station.viewers.acquire(blocking=False):
        raise Refused(503, "too many status pages at once", (("Retry-After", "60"),))
    try:
        with station.drawing:
            text = plot_ascii.web_page(view, station.settings.db, dict(reversed(request.query)), html, request.now)
    except ValueError as error:
        raise Refused(400, str(error))
    finally:
        station.viewers.release()
    headers = [("Vary", "Accept, User-Agent"), ("X-Content-Type-Options", "nosniff"), _CSP]
    if refresh:
        headers.append(("Refresh", str(refresh)))
    return text_response(text, "text/html" if html else "text/plain", tuple(headers))


def alive_summary(station: Station, request: Request) -> Response:
    """The chart of pings and the table of units."""
    return page(station, request, "alive", 600)


def co2_summary(station: Station, request: Request) -> Response:
    """Recent CO2 and all CO2."""
    return page(station, request, "co2", 3600)


def published(max_age: int) -> Callable[..., Response]:
    """An endpoint for the files below var/pub."""
    def serve(station: Station, request: Request, path: Tuple[str, ...]) -> Response:
        allow(request, station.settings.status_allow)
        try:
            body, changed = _read_file(station.var("pub"), path)
        except OSError:
            raise Refused(404, "no such file")
        headers = (("Cache-Control", "max-age=%d" % max_age), ("Last-Modified", http_date(changed)))
        if not _changed_since(request.headers.get("if-modified-since", ""), changed):
            return Response(304, headers=headers)
        return Response(200, body, mimetypes.guess_type(path[-1])[0] or "application/octet-stream", headers)
    return serve


def http_date(now: float) -> str:
    """UTC seconds as RFC 9110 wants them: Mon, 07 Oct 2019 03:23:39 GMT."""
    return seqfile.utc(now, "%a, %d %b %Y %H:%M:%S GMT")         # in English: we leave LC_TIME alone


def _changed_since(date: str, changed: float) -> bool:
    from email.utils import parsedate_to_datetime               # 1 MB that the units never ask for
    try:
        return int(changed) > parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return True


def allow(request: Request, allowed: str) -> None:
    """Refuse peers that are in none of the networks."""
    peer = ipaddress.ip_address(request.peer.split("%")[0])
    peer = getattr(peer, "ipv4_mapped", None) or peer
    if not any(peer in ipaddress.ip_network(network) for network in allowed.split()):
        raise Refused(403, "not for this network")


# -- endpoints: monitoring --------------------------------------------------------------------------------------------


def healthz(station: Station, request: Request) -> Response:
    """The process answers."""
    allow(request, station.settings.metrics_allow)
    return text_response("ok\n")


def readyz(station: Station, request: Request) -> Response:
    """All that is wrong, a line each. Disk and database are tried for real; what is wrong with units leaves it ready."""
    allow(request, station.settings.metrics_allow)
    check_disk(station)
    check_database(station)
    problems = station.health.problems()
    lines = ["%s: %s\n" % (problem.level, problem.text) for problem in problems]
    is_ready = not any(problem.level == importer.CRITICAL and not problem.unit for problem in problems)
    return text_response("".join(lines) or "ok\n")._replace(status=200 if is_ready else 503)


def check_disk(station: Station) -> bool:
    """Write, sync and remove a file where uploads go, and report what is wrong; whether all is well."""
    probe = os.path.join(station.settings.data_dir, ".probe-%d" % threading.get_ident())
    text = ""
    try:
        if not station.has_room():
            text = "less than %g %% of the disk of %s is free" % (station.settings.keep_free, station.settings.data_dir)
        with open(probe, "wb", buffering=0) as file:
            file.write(b"probe")
            station.sync(file.fileno())
    except OSError as error:
        text = "uploads cannot be stored: %s" % error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(probe)
    return _report_or_clear(station, "disk", text)


def check_database(station: Station) -> bool:
    """Report what is wrong with the database; none yet is well."""
    text = ""
    try:
        if os.path.exists(station.settings.db):
            importer.open_db(station.settings.db).close()
    except Exception as error:                                  # whatever it is, it is not ready
        text = "the database cannot be read: %s" % error
    return _report_or_clear(station, "database", text)


def _report_or_clear(station: Station, key: str, text: str) -> bool:
    if text:
        station.health.report(key, importer.CRITICAL, text)
    else:
        station.health.clear(key)
    return not text


class Watching(threading.Thread):
    """Looks for problems every minute, and when one is reported. The log hears what is new or over, health.json all."""

    def __init__(self, station: Station) -> None:
        super().__init__(name="health", daemon=True)
        self.station, self.stopping = station, False
        self._told: Dict[str, importer.Problem] = {}

    def run(self) -> None:
        """Until `stop`."""
        while not self.stopping:
            self.look()
            self.station.health.changed.wait(LOOK)

    def look(self) -> None:
        """Look once."""
        station, health = self.station, self.station.health
        health.changed.clear()
        check_disk(station)
        if check_database(station) and os.path.exists(station.settings.db):
            with contextlib.suppress(sqlite3.Error, importer.Unusable):         # told by the next look
                with contextlib.closing(importer.open_db(station.settings.db)) as db:
                    health.find(importer.problems(db, station.archive, int(station.clock())))
        problems = health.problems()
        self._tell(problems)
        try:
            importer.write_health(station.settings.var_dir, problems, int(station.clock()))
        except OSError as error:
            log.error("%s cannot be written: %s", importer.HEALTH_FILE, error)

    def _tell(self, problems: Sequence[importer.Problem]) -> None:
        told, self._told = self._told, {problem.key: problem for problem in problems}
        for problem in problems:
            if problem.key not in told:
                log.log(logging.ERROR if problem.level == importer.CRITICAL else logging.WARNING, "%s", problem.text)
        for key, problem in told.items():
            if key not in self._told:
                log.info("over: %s", problem.text)

    def stop(self) -> None:
        """Look no more."""
        self.stopping = True
        self.station.health.changed.set()
        self.join(10)


def metrics(station: Station, request: Request) -> Response:
    """Counters and gauges in Prometheus' text format."""
    allow(request, station.settings.metrics_allow)
    return Response(200, format_metrics(station, request.now).encode(), "text/plain; version=0.0.4; charset=utf-8")


METRICS = {                             # family: type and help
    "co2d_requests_total": ("counter", "Requests by route and status."),
    "co2d_received_bytes_total": ("counter", "Bytes of request bodies."),
    "co2d_stored_bytes_total": ("counter", "Bytes added to unit files."),
    "co2d_chunks_total": ("counter", "Chunks by what became of them."),
    "co2d_pings_total": ("counter", "Pings stored."),
    "co2d_pings_lost_total": ("counter", "Pings answered but not stored."),
    "co2d_storage_errors_total": ("counter", "Uploads that the disk refused."),
    "co2d_import_errors_total": ("counter", "Imports that failed."),
    "co2d_dropped_connections_total": ("counter", "Slow clients dropped to serve others, by phase."),
    "co2d_syncs_total": ("counter", "Syncs of data to disk."),
    "co2d_sync_seconds_total": ("counter", "Seconds spent in them."),
    "co2d_uptime_seconds": ("gauge", "Seconds since the start."),
    "co2d_open_connections": ("gauge", "Connections being served."),
    "co2d_import_lag_seconds": ("gauge", "Seconds that the oldest change has waited for its import."),
    "co2d_problem": ("gauge", "1 for each problem that there is, by key, level, unit and text (see /readyz)."),
    "co2d_free_bytes": ("gauge", "Free bytes where uploads go."),
    "co2d_units": ("gauge", "Units by verdict (late, stuck, weak, never, ok, off) of plot_ascii.py status."),
}


def format_metrics(station: Station, now: float) -> str:
    """All metrics that have samples."""
    samples = station.samples()
    samples["co2d_uptime_seconds", ()] = now - station.started
    for problem in station.health.problems():
        labels = (("key", problem.key), ("level", problem.level), ("unit", problem.unit), ("text", problem.text))
        samples["co2d_problem", labels] = 1
    with contextlib.suppress(OSError):                          # no data directory, or a broken disk: readyz tells
        disk = os.statvfs(station.settings.data_dir)
        samples["co2d_free_bytes", ()] = disk.f_bavail * disk.f_frsize
    samples.update((("co2d_units", (("state", state),)), number) for state, number in unit_states(station, now).items())
    lines: List[str] = []
    for name, (kind, help) in METRICS.items():
        rows = sorted((labels, value) for (family, labels), value in samples.items() if family == name)
        lines += ["# HELP %s %s" % (name, help), "# TYPE %s %s" % (name, kind)] if rows else []
        lines += ["%s%s %.10g" % (name, _labels(labels), value) for labels, value in rows]
    return "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    escape = str.maketrans({"\\": r"\\", '"': r'\"', "\n": r"\n"})
    pairs = ['%s="%s"' % (name, str(value).translate(escape)) for name, value in labels]
    return "{%s}" % ",".join(pairs) if pairs else ""


def unit_states(station: Station, now: float) -> Dict[str, int]:
    """How many units are in which state; empty without a database."""
    try:
        with contextlib.closing(importer.open_db(station.settings.db)) as db:
            return dict(Counter(unit.verdict for unit in importer.fleet_state(db, int(now))))
    except Exception:                                           # no database, or a broken one: readyz tells
        return {}


# -- routes -----------------------------------------------------------------------------------------------------------

ROUTES: List[Tuple[str, str, Callable[..., Response]]] = [
    ("GET", "/", hello),
    ("POST", "/ou/<unit>/alive", alive),
    ("PUT", "/ou/<unit>/push-sequential/<path>", push),
    ("GET", "/ou/<unit>/updates", list_updates),
    ("GET", "/ou/<unit>/updates/<path>", update),
    ("GET", "/status/alive/recent", recent),
    ("GET", "/status/alive/summary", alive_summary),
    ("GET", "/data/co2/summary", co2_summary),
    ("GET", "/status/alive/<path>", published(590)),
    ("GET", "/data/co2/<path>", published(3590)),
    ("GET", "/var/pub/<path>", published(590)),
    ("GET", "/healthz", healthz),
    ("GET", "/readyz", readyz),
    ("GET", "/metrics", metrics),
]
_PATTERNS = [(method, tuple(pattern[1:].split("/")), pattern, endpoint) for method, pattern, endpoint in ROUTES]


def match_route(pattern: Tuple[str, ...], path: Tuple[str, ...]) -> Optional[Dict[str, Any]]:
    """What a path fills into a pattern, or None; <path> takes all the rest, and every segment must be a plain name."""
    parts: List[Any] = list(path)
    if pattern[-1] == "<path>" and len(path) >= len(pattern):
        parts[len(pattern) - 1:] = [path[len(pattern) - 1:]]
    if len(parts) != len(pattern):
        return None
    filled = {}
    for expected, segment in zip(pattern, parts):
        if expected.startswith("<"):
            filled[expected[1:-1]] = segment
            if not all(map(SEGMENT.match, segment if isinstance(segment, tuple) else (segment,))):
                return None
        elif expected != segment:
            return None
    return filled


def route(request: Request) -> Tuple[str, Callable[..., Response], Dict[str, Any]]:
    """The first route that fits; 405 when only the method does not."""
    allowed: List[str] = []
    for method, pattern, name, endpoint in _PATTERNS:
        filled = match_route(pattern, request.path)
        if filled is not None:
            if request.method in (method, "HEAD" if method == "GET" else method):
                return name, endpoint, filled
            allowed += [method, "HEAD"] if method == "GET" else [method]
    if allowed:
        raise Refused(405, "method not allowed", (("Allow", ", ".join(dict.fromkeys(allowed))),))
    raise Refused(404, "not found")


def strip_secret(secret: str, request: Request) -> Request:
    """The request without its secret; units' routes need the right one."""
    if not secret:
        return request
    import hmac                                                 # brings 4 MB of OpenSSL
    given = request.path[0].encode()
    if hmac.compare_digest(given, secret.encode()) and len(request.path) > 1:
        return request._replace(path=request.path[1:])
    if request.path[0] == "ou":
        raise Refused(404, "not found")
    return request


def respond(station: Station, request: Request) -> Response:
    """The answer to a well-formed request, whatever happens."""
    name = "none"
    try:
        known = strip_secret(station.settings.secret, request)
        name, endpoint, filled = route(known)
        response = endpoint(station, known, **filled)
    except Refused as refused:
        response = refused.response()
    except Exception as error:                                  # one line, not a traceback: the log is read by grep
        log.error("%s %s failed: %r at %s", request.method, masked_target(station.settings.secret, request), error,
                  importer.place_of(error))
        response = json_response({"error": "internal error"}, 500, repr(error))
    station.count("co2d_requests_total", route=name, status=response.status)
    return response


# -- the command line: what all commands share ------------------------------------------------------------------------


def command_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser with the options that every command has; `examples` end its help."""
    program = os.path.basename(sys.argv[0]) or "co2d"           # the name that it was called by
    examples = examples.replace("co2d ", program.replace("%", "%%") + " ")
    parser = argparse.ArgumentParser(prog=(program + " " + command).strip(), description=description,
                                     epilog="examples:\n" + examples,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", metavar="FILE", help="configuration (default: CO2D_CONF, or co2d.conf beside the script)")
    add("--version", action="version", version="co2d " + importer.__version__)
    if command:                                                 # run has them among the settings
        add("--data-dir", metavar="DIR", help="data directory, instead of the configuration's")
        add("--var-dir", metavar="DIR", help="server directory, instead of the configuration's")
    return parser


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings in force; what is to be told about them is told."""
    settings = importer.load_settings(arguments.config, vars(arguments))
    for line in settings.warnings:
        log.warning("%s", line)
    return settings


# -- publishing: what a unit can take ---------------------------------------------------------------------------------
# An update is a directory DATA/UNIT/updates/update-... with flash/ (files that replace those on the unit) and
# conf-patch/ (JSON objects, merged key by key into the files of conf/ on the card). A unit takes the last name by byte
# order, once.

MAX_UPDATE_BYTES = 1 << 20              # the file system of a FiPy has 4 MiB, half of it in use
MAX_UPDATE_FILE = 300_000               # bytes; a bigger one is not through before the watchdog resets the unit
MAX_UPDATE_FILES = 150                  # one request each; a unit talks for 300 s
PATCHES = "conf-patch/"
ID_FILE, COMM_FILE, SCHEDULE_FILE = "ou-id.json", "ou-comm-config.json", "schedule.json"


class Unpublishable(Exception):
    """What must not reach a unit, or a command that cannot be carried out; says why, and what to do."""


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise ValueError(reason)


_NICKNAME = re.compile(r"[^\x00-\x1f\x7f&%\ud800-\udfff]{1,64}\Z")
_URL = re.compile(r"(https?)://([A-Za-z0-9.-]+)(?::([0-9]{1,5}))?((?:/[A-Za-z0-9._-]+)*)\Z")
_HOST_NAME = re.compile(r"[A-Za-z0-9.-]{1,253}\Z")


def check_nickname(value: Any, settings: Settings) -> None:
    """ValueError unless it arrives in a ping as it is: units do not encode anything."""
    fits = isinstance(value, str) and _NICKNAME.match(value) and value.strip() == value != "None"
    _require(bool(fits), "units send their nickname as it is, so it is a text of 1 to 64 characters "
             "without &, %, control characters, or a space at an end")


def check_hardware_id(value: Any, settings: Settings) -> None:
    """Always ValueError."""
    raise ValueError("this replaces the id of the hardware: the readings of two units would be mixed for good")


def check_sync_dest(value: Any, settings: Settings) -> None:
    """ValueError unless it is a URL, or a list of URLs, to which a unit can append /ou/..."""
    urls = value if isinstance(value, list) else [value]
    _require(value not in (None, "", []), "with no server at all, a unit would never report again")
    for url in urls:
        found = _URL.match(str(url))
        _require(found is not None and 0 < int(found[3] or 80) < 65536, "%r is not a URL that a unit could reach: "
                 "http(s)://name-or-IPv4[:port][/secret], without a slash at the end" % (url,))


def check_sync_dirs(value: Any, settings: Settings) -> None:
    """ValueError unless it is a list of [directory, way] that this server answers: a refusal ends a unit's night."""
    _require(isinstance(value, list), 'a list is needed: [["updates", "pull_last_dir"], ...]')
    for entry in value:
        _require(isinstance(entry, list) and len(entry) == 2, "%r is not a pair: [directory, way]" % (entry,))
        folder, way = entry
        expected = "pull_last_dir" if folder == seqfile.UPDATES_FOLDER else "push_sequential"
        _require(way == expected, "%r: the way of %s is %s" % (entry, folder, expected))
        segments = str(folder).split("/")
        taken = [seqfile.UPDATES_FOLDER, *settings.upload_dirs.split()]
        _require(segments[0] in taken and all(map(SEGMENT.match, segments)),
                 "%r: this server takes uploads below %s only" % (entry, " and ".join(taken[1:])))
    folders = [folder for folder, _ in value]
    for needed in (seqfile.UPDATES_FOLDER, seqfile.READINGS_FOLDER):
        _require(needed in folders, "without %r no %s would come through, and no update could mend it"
                 % (needed, needed.split("/")[-1]))


def check_ntp_host(value: Any, settings: Settings) -> None:
    """ValueError unless it is null (pool.ntp.org), a host name or an address."""
    _require(value is None or isinstance(value, str) and bool(_HOST_NAME.match(value)),
             "a host name is needed, or null for pool.ntp.org")


def check_chunk_size(value: Any, settings: Settings) -> None:
    """ValueError unless chunks of so many bytes carry a night's data, and are not refused here."""
    _require(type(value) is int and 256 <= value <= settings.max_body,
             "a whole number from 256 (less is too slow for a night) to %d (max_body) is needed" % settings.max_body)


def check_budget(value: Any, settings: Settings) -> None:
    """ValueError unless it is a time in which a unit can attach to the network and send something."""
    _require(type(value) in (int, float) and 60 <= value <= 3600,
             "seconds from 60 (it takes as long to connect) to 3600 (its battery) are needed")


def check_backoff(value: Any, settings: Settings) -> None:
    """ValueError unless it is a whole number: anything else would be an exception after a failed connection."""
    _require(type(value) is int and 1 <= value <= 30, "a whole number from 1 to 30 is needed")


MEASURE, COMMUNICATE = 6, 7             # numbers of the firmware's tasks
SCHEDULES = {                           # kind -> limits of each of its numbers
    "minutes": ((1, 60), (0, 59)),      # every so many minutes, so many after the full ones
    "daily": ((0, 23), (0, 59)),        # hour, minute
    "minutes_random": ((1, 60), (0, 59), (1, 60)),      # the last two: from, to
    "daily_random": ((0, 23), (0, 59), (1, 60)),
}


def check_tasks(value: Any, settings: Settings) -> None:
    """ValueError where old firmware would raise an exception, or do nothing any more, at each wake."""
    _require(isinstance(value, list), 'a list is needed: [[6, "minutes", 30, 0], [7, "daily", 3, 15]]')
    for entry in value:
        _require(isinstance(entry, list) and len(entry) > 1 and isinstance(entry[1], str),
                 "%r is not a task: [number, kind, ...]" % (entry,))
        number, kind, *numbers = entry
        _require(number in (MEASURE, COMMUNICATE), "%r: a task is 6 (measure) or 7 (communicate)" % (entry,))
        limits = SCHEDULES.get(kind)
        _require(limits is not None, "%r: old firmware knows only %s" % (entry, ", ".join(SCHEDULES)))
        fits = [type(given) is int and low <= given <= high for given, (low, high) in zip(numbers, limits or ())]
        _require(len(numbers) == len(limits or ()) and all(fits),
                 "%r: %s takes numbers within %s" % (entry, kind, limits))
        _require(len(numbers) < 3 or numbers[1] < numbers[2], "%r: from must be less than to" % (entry,))
    tasks = {entry[0] for entry in value}
    _require(tasks == {MEASURE, COMMUNICATE}, "old firmware falls silent without task 6 (measure) and task 7 "
             "(communicate), until somebody switches it off and on")


class Key(NamedTuple):
    """A key that the firmware reads from a file in conf/ on its card."""

    file: str
    name: str
    check: Callable[[Any, Settings], None]                      # ValueError says what the value must be, and why
    help: str


CONFIGURATION = [
    Key(ID_FILE, "site_code", check_nickname, "the nickname"),
    Key(ID_FILE, "hw_id", check_hardware_id, "the id of the hardware; never published"),
    Key(COMM_FILE, "sync_dest", check_sync_dest, "URL of the server, or list of URLs, tried in order every night"),
    Key(COMM_FILE, "sync_dirs", check_sync_dirs, "what is synced in which order: list of [directory, way]"),
    Key(COMM_FILE, "ntp_host", check_ntp_host, "time server; null: pool.ntp.org"),
    Key(COMM_FILE, "send_chunk_size", check_chunk_size, "bytes of a chunk; else 4096"),
    Key(COMM_FILE, "total_connect_secs_max", check_budget, "seconds for one night; else 300"),
    Key(COMM_FILE, "connect_backoff_max", check_backoff, "read, but no night is skipped any more; else 7"),
    Key(SCHEDULE_FILE, "tasks", check_tasks, "when to measure and to communicate; old firmware only"),
]


def _refuse_constant(word: str) -> Any:
    raise ValueError("%s is no number that a unit could read" % word)


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError for what is none, NaN and Infinity included."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("too deep")


def check_patch(name: str, content: bytes, settings: Settings) -> list[str]:
    """Unpublishable when a file below conf-patch/ would harm a unit; else what in it no firmware reads."""
    file = name[len(PATCHES):]
    if "/" in file:
        raise Unpublishable("%s: with a directory in conf-patch/ a unit cannot install the update, nor go on: "
                            "put the file directly into conf-patch/" % name)
    try:
        patch = parse_json(content.decode())
    except ValueError as error:
        raise Unpublishable("%s: no JSON: %s" % (name, error))
    if not name.endswith(".json") or not isinstance(patch, dict):
        raise Unpublishable("%s: a patch is a .json file with one object" % name)
    keys = {key.name: key for key in CONFIGURATION if key.file == file.lower()}
    if not keys:
        return ["%s: no firmware reads this file" % name]
    for word in patch.keys() & keys.keys():
        try:
            keys[word].check(patch[word], settings)
        except ValueError as why:
            raise Unpublishable("%s: %s: %s" % (name, word, why))
    return ["%s: no firmware uses the key %s, only %s" % (name, word, ", ".join(keys))
            for word in sorted(patch.keys() - keys.keys())]


def check_update(files: dict[str, bytes], settings: Settings, force: bool = False) -> None:
    """Unpublishable unless a unit can take these files. `force`: with keys and files that no firmware reads."""
    _check_sizes({name: len(content) for name, content in files.items()})
    unread = []
    for name, content in files.items():
        if not name.startswith(("flash/", PATCHES)):
            raise Unpublishable("%s: only flash/ and conf-patch/ go to units" % name)
        if name.startswith(PATCHES):
            unread += check_patch(name, content, settings)
        elif name.endswith(".mpy") and name[:-len("mpy")] + "py" in files:
            _warn("%s: a unit would go on using the .py beside it" % name)
    for what in unread:
        if not force:
            raise Unpublishable(what + "; --force publishes it all the same")
        _warn(what)


def _check_sizes(sizes: dict[str, int]) -> None:
    """Unpublishable when these files (path -> bytes) are too many or too big, or fall into one on a unit's card."""
    total = sum(sizes.values())
    if total > MAX_UPDATE_BYTES or len(sizes) > MAX_UPDATE_FILES:
        raise Unpublishable("%d bytes in %d files: a unit can take %d bytes in %d files"
                            % (total, len(sizes), MAX_UPDATE_BYTES, MAX_UPDATE_FILES))
    seen: dict[str, str] = {}
    for name, length in sizes.items():
        if length > MAX_UPDATE_FILE:
            raise Unpublishable("%s has %d bytes: a file of more than %d is not through before the unit's watchdog "
                                "resets it, every night, before any data" % (name, length, MAX_UPDATE_FILE))
        on_card = "/".join(part.rstrip(".") for part in name.lower().split("/"))
        if on_card in seen:
            raise Unpublishable("%s and %s are the same file on a card (FAT)" % (seen[on_card], name))
        seen[on_card] = name


def read_update(directory: str) -> dict[str, bytes]:
    """The files of an update by relative path; Unpublishable when they cannot all be read and fetched."""
    try:
        with seqfile.open_directory(directory, []) as opened:
            names = list(update_files(opened))
        _check_sizes({name: os.path.getsize(os.path.join(directory, name)) for name in names})
        return {name: _read_file(directory, name.split("/"))[0] for name in names}
    except (NotServable, OSError) as error:
        raise Unpublishable("%s: %s" % (directory, error))


def _warn(text: str) -> None:
    print("co2d: warning: " + text, file=sys.stderr)


# -- publishing: what units have taken --------------------------------------------------------------------------------


class Event(NamedTuple):
    """A row of var/fetches, without unit and update."""

    when: str
    what: str


class Call(NamedTuple):
    """A ping: UTC time, nickname, and the name of the server that it reached, "" for this one."""

    when: str
    nickname: str
    server: str


History = dict[tuple[str, str], list[Event]]                    # of (unit, update), in order of time


def _logs(settings: Settings, folder: str) -> Iterator[tuple[str, str]]:
    """Where the rows of this server lie, and of each whose var/ was copied here: its name ("": this one), directory."""
    yield "", os.path.join(settings.var_dir, folder)
    for name in sorted(os.listdir(settings.data_dir)):
        if name.startswith(seqfile.SERVER_PREFIX):
            yield name, os.path.join(settings.data_dir, name, "var", folder)


def read_history(settings: Settings) -> History:
    """What units have taken of their updates, as far as it is known here."""
    history: History = {}
    for _, directory in _logs(settings, seqfile.FETCHES_FOLDER):
        for when, unit, name, what in importer.read_rows(directory, seqfile.FETCHES, 4):
            history.setdefault((unit, name), []).append(Event(when, what))
    return history


def read_calls(settings: Settings, since: float) -> dict[str, list[Call]]:
    """Pings by unit, in order of time; those before `since` may be left out."""
    calls: dict[str, list[Call]] = {}
    for server, directory in _logs(settings, seqfile.PINGS_FOLDER):
        for when, unit, nickname, _, _ in importer.read_rows(directory, seqfile.PINGS, 5, since):
            calls.setdefault(unit, []).append(Call(when, nickname, server))
    for of_unit in calls.values():
        of_unit.sort()
    return calls


def _progress(files: Sequence[str], events: Sequence[Event]) -> tuple[str, str]:
    """How far a unit is with an update, and the time at which it had all of it, "" when it has not."""
    taken = {event.what: event.when for event in events}
    held = [taken[file] for file in files if file in taken]
    if not events:
        return "not fetched", ""
    if len(held) == len(files) and taken.get(importer.STARTED, "") <= max(held):
        return "complete " + max(held)[:19], max(held)
    nights = {event.when[:10] for event in events if event.what == importer.STARTED}
    given_up = ", given up: publish it in smaller parts" if importer.GIVEN_UP in taken else ""
    return "%d of %d files in %d nights%s" % (len(held), len(files), len(nights), given_up), ""


def _effect(patch: dict[str, Any], calls: Sequence[Call]) -> str:
    """What is seen of an update, from the configuration that it sets and the unit's calls since it had all of it.

    Calls alone prove little: a unit that is switched on calls twice.
    """
    here = [call for call in calls if not call.server]
    seen = []
    if calls and "site_code" in patch:
        seen.append(_name_effect(patch["site_code"], calls))
    if "sync_dest" in patch:
        if here:
            seen.append("calls here again since " + here[0].when[:19])
        elif calls:
            seen.append("calls at %s since %s" % (calls[0].server, calls[0].when[:19]))
        else:
            seen.append("went to %s" % " or ".join(_as_list(patch["sync_dest"])))
    if not seen:
        seen.append("called again " + calls[0].when[:19] if calls else "has not called since")
    return ", ".join(seen)


def _name_effect(nickname: str, calls: Sequence[Call]) -> str:
    if calls[-1].nickname != nickname:
        return "still calls itself " + calls[-1].nickname
    others = [call.when for call in calls if call.nickname != nickname]
    first = next(call.when for call in calls if call.when > max(others, default=""))
    return "calls itself %s since %s" % (nickname, first[:19])


def _as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _patch_of(data_dir: str, unit: str, name: str, files: Sequence[str]) -> dict[str, Any]:
    """The keys that an update sets, of all its files."""
    patch: dict[str, Any] = {}
    for file in files:
        if file.startswith(PATCHES):
            parts = [unit, seqfile.UPDATES_FOLDER, name, *file.split("/")]
            with contextlib.suppress(ValueError):               # not published by us
                patch.update(parse_json(_read_file(data_dir, parts)[0].decode()))
    return patch


def update_report(settings: Settings, units: Sequence[str]) -> Iterator[str]:
    """Per unit and update: when it was published, how much of it was fetched, and what is seen of it since."""
    history = read_history(settings)
    calls = read_calls(settings, 0)
    for unit in units:
        for name in visible_updates(settings.data_dir, unit):
            try:
                files = files_of_update(settings.data_dir, unit, name)
                patch = _patch_of(settings.data_dir, unit, name, files)
            except (NotServable, OSError) as why:
                yield "%s\t%s\tnot listed for the unit: %s" % (unit, name, why)
                continue
            published = os.stat(os.path.join(settings.data_dir, unit, seqfile.UPDATES_FOLDER, name)).st_mtime
            state, had = _progress(files, history.get((unit, name), []))
            after = [call for call in calls.get(unit, []) if call.when > had]
            line = [unit, name, "published " + seqfile.utc(published), state]
            yield "\t".join(line + [_effect(patch, after)] if had else line)


# -- publishing: names and units --------------------------------------------------------------------------------------

WITHDRAWN = re.compile(r"\.withdrawn-(.+)-[0-9]+\Z")


def used_names(settings: Settings, history: History, unit: str) -> set[str]:
    """Names of updates that the unit has been offered, here or at a server that is known here.

    What it has on its card under one of them, it will never fetch again.
    """
    names = {name for taker, name in history if taker == unit}
    with contextlib.suppress(FileNotFoundError):
        with seqfile.open_directory(settings.data_dir, [unit, seqfile.UPDATES_FOLDER]) as directory:
            for name in os.listdir(directory):
                withdrawn = WITHDRAWN.match(name)
                names.add(withdrawn[1] if withdrawn else name)
    return {name for name in names if not name.startswith(".")}


def default_name(used: set[str], now: float) -> str:
    """update-2026-11-25z130405: with the second (UTC), so that two servers do not give the same name; behind `used`.

    The z sorts behind update-2026-11-25a and the like.
    """
    latest = max(used, default="")
    for second in range(60):
        name = seqfile.utc(now + second, seqfile.UPDATE_PREFIX + "%Y-%m-%dz%H%M%S")
        if name > latest:
            return name
    raise Unpublishable("the name of today does not sort after %s: give one that does with --name" % latest)


def check_name(name: str, unit: str, used: set[str]) -> None:
    """Unpublishable unless a unit would take an update of this name after those that it has been offered."""
    latest = max(used, default="")
    if not SEGMENT.match(name) or not name.startswith(seqfile.UPDATE_PREFIX) or name <= latest:
        raise Unpublishable("%s: the name %s must start with %s and sort after %s"
                            % (unit, name, seqfile.UPDATE_PREFIX, latest or seqfile.UPDATE_PREFIX))


def known_units(settings: Settings) -> dict[str, set[str]]:
    """Hardware id -> nicknames, of all units that have sent anything; a ping is enough."""
    units: dict[str, set[str]] = {}
    with os.scandir(settings.data_dir) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                units[entry.name] = set()
    for unit, calls in read_calls(settings, 0).items():
        units.setdefault(unit, set()).add(calls[-1].nickname)
    return {unit: names for unit, names in sorted(units.items())
            if unit.startswith(seqfile.UNIT_PREFIX) and SEGMENT.match(unit)}


def units_meant(settings: Settings, arguments: argparse.Namespace, now: float) -> list[str]:
    """The units that the command line names: by id, the end of an id, nickname, site, or all."""
    known = known_units(settings)
    units = list(known) if arguments.all else []
    if arguments.site:
        units += _units_at(settings, arguments.site, now)
    for name in arguments.names:
        units += importer.find_names("unit", known, name)
    if not units:
        raise Unpublishable("for which units? Name them, or --all, or --site SITE")
    return list(dict.fromkeys(units))


def _units_at(settings: Settings, site: str, now: float) -> list[str]:
    with contextlib.closing(importer.open_db(settings.db)) as db:
        stays = importer.deployments(db)
    if site not in {stay.site for stay in stays}:
        raise importer.unknown("site", site, {stay.site for stay in stays if stay.site})
    units = [stay.unit_id for stay in stays if stay.site == site and stay.since <= now < stay.until]
    if not units:
        raise Unpublishable("no unit stands at %s today" % site)
    return units


# -- publishing: the command ------------------------------------------------------------------------------------------


def files_to_publish(arguments: argparse.Namespace, settings: Settings) -> dict[str, bytes]:
    """The files of the update that the command line asks for, checked."""
    patches: dict[str, dict[str, Any]] = {}
    for assignment in arguments.set or []:
        file, key, value = parse_assignment(assignment)
        patches.setdefault(file, {})[key] = value
    if arguments.nickname is not None:
        patches.setdefault(ID_FILE, {})["site_code"] = arguments.nickname
    if arguments.sync_dest:
        patches.setdefault(COMM_FILE, {})["sync_dest"] = arguments.sync_dest
    if patches:
        files = {PATCHES + file: json.dumps(patch, ensure_ascii=False).encode("utf-8", "replace")
                 for file, patch in patches.items()}
    elif arguments.names:
        files = read_update(arguments.names.pop())
    else:
        raise Unpublishable("which directory? co2d publish UNIT... DIR")
    check_update(files, settings, arguments.force)
    return files


def parse_assignment(text: str) -> tuple[str, str, Any]:
    """FILE.KEY=VALUE -> file, key, value. The value is JSON, or a text that is no JSON."""
    place, equals, written = text.partition("=")
    file, _, key = place.rpartition(".")
    if not file or not equals:
        raise Unpublishable("--set %s: write FILE.KEY=VALUE, as in ou-comm-config.send_chunk_size=2048" % text)
    try:
        value = parse_json(written)
    except json.JSONDecodeError:
        value = written
    except ValueError as error:
        raise Unpublishable("--set %s: %s" % (text, error))
    return file if file.endswith(".json") else file + ".json", key, value


def _warn_of_silence(files: dict[str, bytes]) -> None:
    """Tell where nobody answers at a URL that units are sent to."""
    patch = parse_json(files.get(PATCHES + COMM_FILE, b"{}").decode())
    for url in _as_list(patch.get("sync_dest", [])):
        found = _URL.match(url)
        if found:
            try:
                port = int(found[3] or {"http": 80, "https": 443}[found[1]])
                socket.create_connection((found[2], port), timeout=5).close()
            except OSError as error:
                _warn("nobody answers at %s: %s" % (url, error))


def daemon_user(settings: Settings) -> os.stat_result:
    """What belongs to the user who runs the daemon: the directory of pings, which the daemon makes itself."""
    pings = os.path.join(settings.var_dir, seqfile.PINGS_FOLDER)
    return os.stat(pings if os.path.isdir(pings) else settings.data_dir)


def _name_and_groups(uid: int) -> tuple[str, list[int]]:
    """Name and groups of a user; its number and none where it has no name."""
    import pwd                                                  # the daemon does not need it
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return "#%d" % uid, []
    return user.pw_name, os.getgrouplist(user.pw_name, user.pw_gid)


def explain_refusal(error: OSError, uid: int) -> str:
    """What the system refused; where another user is needed, which."""
    remedy = "; call it as the user of the daemon: sudo -u %s %s" % (_name_and_groups(uid)[0], " ".join(sys.argv))
    return str(error) + (remedy if isinstance(error, PermissionError) else "")


def become_owner(settings: Settings) -> int:
    """Go on as the daemon's user, if root calls; what is written has the mode of the data directory. That user's id.

    So the daemon can read what is published, whoever publishes and whatever the umask.
    """
    daemon = daemon_user(settings)
    os.umask(0o777 & ~(os.stat(settings.data_dir).st_mode | 0o700))
    if os.geteuid() == 0 and daemon.st_uid != 0:
        os.setgroups(_name_and_groups(daemon.st_uid)[1] or [daemon.st_gid])
        os.setegid(daemon.st_gid)
        os.seteuid(daemon.st_uid)
    return daemon.st_uid


def _check_readable(uid: int, directory: int) -> None:
    """PermissionError when a user may not read everything below an open directory."""
    user, groups = _name_and_groups(uid)
    for _, _, files, below in os.fwalk(dir_fd=directory):
        for name in [".", *files]:
            there = os.stat(name, dir_fd=below)
            who = 6 if there.st_uid == uid else 3 if there.st_gid in groups else 0      # bits to the left of "others"
            needed = 5 if name == "." else 4                    # r-x, r--
            if (there.st_mode >> who) & needed != needed:
                raise PermissionError(errno.EACCES, "%s, who runs the daemon, could not read it" % user)


def install_update(settings: Settings, unit: str, name: str, files: dict[str, bytes], daemon: int) -> None:
    """Stage under a hidden name, sync, publish with one rename; nothing stays behind when that fails."""
    def check(staged: int) -> None:
        _check_readable(daemon, staged)

    folder = os.path.join(settings.data_dir, unit, seqfile.UPDATES_FOLDER)
    made = [path for path in (folder, os.path.dirname(folder)) if not os.path.isdir(path)]
    try:
        with seqfile.open_directory(settings.data_dir, [unit, seqfile.UPDATES_FOLDER], True, settle=True) as updates:
            seqfile.publish_tree(updates, name, files, check)
    except OSError as error:
        for path in made:
            with contextlib.suppress(OSError):
                os.rmdir(path)
        raise Unpublishable("%s: %s" % (unit, explain_refusal(error, daemon)))


def publish_parser() -> argparse.ArgumentParser:
    """Options of `co2d publish`."""
    keys = "\n".join("  %-35s %s" % ("%s.%s" % (key.file[:-len(".json")], key.name), key.help) for key in CONFIGURATION)
    parser = command_parser("publish", "Publish an update for units to take.", """\
  co2d publish co2unit-30aea42a50bc new-firmware/       flash/ and conf-patch/ in it; checked, then offered
  co2d publish --all new-firmware/ --dry-run            check only
  co2d publish 50bc --nickname varanger-04
  co2d publish --all --sync-dest http://new-host:8080
  co2d publish --site vj_re_sn_1 --set ou-comm-config.send_chunk_size=2048
  co2d publish --list

what the firmware reads (--set):
""" + keys)
    add = parser.add_argument
    add("names", nargs="*", metavar="UNIT... DIR", help="hardware ids, ends of them (4 letters or more) or nicknames; "
        "then the directory with flash/ and conf-patch/")
    add("--all", action="store_true", help="for every unit there is")
    add("--site", help="for the unit that is deployed at this site")
    add("--name", help="name of the update (default: update-DATEzTIME)")
    add("--nickname", help="no DIR: give the unit this nickname")
    add("--sync-dest", action="append", metavar="URL", help="no DIR: let the units report to this server (repeatable)")
    add("--set", action="append", metavar="FILE.KEY=VALUE", help="no DIR: set a key of the configuration (repeatable)")
    add("--force", action="store_true", help="publish keys and files, too, that no firmware reads")
    add("--withdraw", metavar="NAME", help="no DIR: take an update back from units that have not fetched it")
    add("--list", action="store_true", help="show what is published, what was fetched, and what is seen of it")
    add("--dry-run", action="store_true", help="check only")
    return parser


def publish(argv: Sequence[str]) -> int:
    """`co2d publish`; the exit status."""
    arguments = publish_parser().parse_args(argv)
    settings = settings_of(arguments)
    now = time.time()
    try:
        if not os.path.isdir(settings.data_dir):
            raise Unpublishable("there is no data directory %s" % settings.data_dir)
        if arguments.list:
            arguments.all |= not (arguments.names or arguments.site)
            for line in update_report(settings, units_meant(settings, arguments, now)):
                print(line)
        elif arguments.withdraw:
            become_owner(settings)
            _withdraw(settings, units_meant(settings, arguments, now), arguments, now)
        else:
            _publish(settings, arguments, now)
    except OSError as error:
        print("co2d: not published: %s" % explain_refusal(error, daemon_user(settings).st_uid), file=sys.stderr)
        return 1
    except (Unpublishable, importer.Unusable) as error:
        print("co2d: not published: %s" % error, file=sys.stderr)
        return 1
    return 0


def _publish(settings: Settings, arguments: argparse.Namespace, now: float) -> None:
    files = files_to_publish(arguments, settings)               # as who calls: DIR may be closed to others
    units = units_meant(settings, arguments, now)
    patch = parse_json(files.get(PATCHES + ID_FILE, b"{}").decode())
    if "site_code" in patch and len(units) > 1:
        raise Unpublishable("a nickname is for one unit, not for %d" % len(units))
    _warn_of_silence(files)
    history = read_history(settings)
    used = {unit: used_names(settings, history, unit) for unit in units}
    name = arguments.name or default_name(set().union(*used.values()), now)
    for unit in units:                                          # all or nothing, as far as that can be known
        check_name(name, unit, used[unit])
    daemon = become_owner(settings)
    for unit in units:
        waiting = max(visible_updates(settings.data_dir, unit), default="")
        if not arguments.dry_run:
            install_update(settings, unit, name, files, daemon)
        done = "would be published" if arguments.dry_run else "published"
        print("%s: %s %s, %d files" % (unit, name, done, len(files)))
        if waiting and (unit, waiting) not in history:
            _warn("%s has not fetched %s yet, and now will not: a unit takes the last update only" % (unit, waiting))


def _withdraw(settings: Settings, units: Sequence[str], arguments: argparse.Namespace, now: float) -> None:
    name = arguments.withdraw
    having = [unit for unit in units if name in visible_updates(settings.data_dir, unit)]
    if not having:
        raise Unpublishable("there is no update %s to withdraw from %s" % (name, ", ".join(units)))
    history = read_history(settings)
    for unit in having:
        if not arguments.dry_run:
            with seqfile.open_directory(settings.data_dir, [unit, seqfile.UPDATES_FOLDER]) as updates:
                os.rename(name, ".withdrawn-%s-%d" % (name, now), src_dir_fd=updates, dst_dir_fd=updates)
                os.fsync(updates)
        print("%s: %s %s" % (unit, name, "would be withdrawn" if arguments.dry_run else "withdrawn"))
        if (unit, name) in history:
            _warn("%s has fetched %s before" % (unit, name))
        others = [other for other in visible_updates(settings.data_dir, unit) if other != name]
        if others and (unit, others[-1]) not in history:
            _warn("%s has not fetched %s, and will take that now: withdraw it too if it is not wanted"
                  % (unit, others[-1]))


# -- connections ------------------------------------------------------------------------------------------------------


class Gone(Exception):
    """The client went away, was too slow, or was dropped."""


TICK = 0.5                              # seconds after which a thread that waits looks at the clock
_TICK = struct.pack("@ll", 0, int(TICK * 1e6))                   # as a struct timeval
_ORDERLY, _RESET = struct.pack("@ii", 0, 0), struct.pack("@ii", 1, 0)       # as a struct linger
# When all workers are taken, who has been in a phase for longer than this may be dropped, the first of these first.
PATIENCE = {"head": 0.5, "linger": 0.5, "body": 10.0, "reply": 10.0, "answer": float("inf")}   # the answer is up to us
LAST_WORDS = 2.0                        # seconds for a reply after the deadline, and for what comes after a refusal
STOP_PATIENCE = 5.0                     # seconds that a stop leaves to those who have not sent their head


class Connection:
    """One client, from accept to close. Other threads read `phase` and `since`, and may call `drop`."""

    def __init__(self, sock: socket.socket, peer: str, settings: Settings) -> None:
        self.sock, self.peer, self.settings = sock, peer, settings
        self.accepted = self.since = time.monotonic()
        self.phase = "head"
        self.buffer = b""
        self.request: Optional[Request] = None
        self.is_complete = True         # False: bytes of a reply are missing, so the end must not look like its end
        self.dropped = False            # by another thread, to serve others

    def enter(self, phase: str) -> None:
        """From here on the time counts for another phase."""
        self.phase, self.since = phase, time.monotonic()

    def _remaining(self, allowed: float) -> float:
        left = self.accepted + allowed - time.monotonic()
        if left <= 0:
            raise Refused(408, "%s took longer than %g s" % (self.phase, allowed))
        return left

    def _receive(self, allowed: float, flags: int = 0) -> bytes:
        """What comes next, within `allowed` seconds from accept."""
        while self._remaining(allowed):
            try:
                data = self.sock.recv(65536, flags)
                break
            except (BlockingIOError, socket.timeout):           # nothing within TICK
                pass
        if not data:
            raise Gone("closed by the client" if self.buffer or self.request else "")
        return data

    def start_tls(self, context: ssl.SSLContext) -> None:
        """Shake hands if the client begins to; plain HTTP goes on if it may."""
        if self._receive(self.settings.head_seconds, socket.MSG_PEEK)[:1] == b"\x16":
            self.sock.settimeout(self._remaining(self.settings.head_seconds))       # for the whole handshake
            self.sock = context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
            self.sock.do_handshake()
            self.sock.settimeout(TICK)
        elif self.settings.tls_only:
            raise Refused(400, "this port speaks TLS")

    def read_request(self) -> Request:
        """The head; Refused when malformed, too big or too slow."""
        length = 0
        while not length:
            self.buffer += self._receive(self.settings.head_seconds)
            length = head_length(self.buffer)
        request, self.buffer = parse_head(self.buffer[:length]), self.buffer[length:]
        return request

    def read_body(self, request: Request) -> bytes:
        """What follows the head; Refused when too big or too slow."""
        self.enter("body")
        length = int(request.headers.get("content-length", "0"))
        if length > self.settings.max_body:
            raise Refused(413, "body longer than %d bytes" % self.settings.max_body)
        if length > len(self.buffer) and "expect" in request.headers:
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        while len(self.buffer) < length:
            self.buffer += self._receive(self.settings.request_seconds)
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return body

    def send(self, data: bytes) -> None:
        """Send all of a reply within the deadline; one that says the deadline is over has a moment of its own.

        A unit ignores Content-Length: an orderly close in the middle would be the end of the file for it, and half an
        update would reach its flash. So until the last byte is handed over, whatever closes the socket (this method,
        `drop`, or the kernel after a SIGKILL) resets the connection.
        """
        self.enter("reply")
        end = max(self.accepted + self.settings.request_seconds, self.since + LAST_WORDS)
        self._reset_on_close(True)
        while data:
            if time.monotonic() > end:
                raise Gone("it took too long")
            if self.dropped:
                raise Gone("dropped to serve others")
            with contextlib.suppress(BlockingIOError, socket.timeout):      # it takes nothing for a TICK
                data = data[self.sock.send(data):]
        self._reset_on_close(False)

    def _reset_on_close(self, reset: bool) -> None:
        """Whether closing the socket sends a reset, or what is left and an orderly end (SO_LINGER in socket(7))."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET if reset else _ORDERLY)
        self.is_complete = not reset

    def linger(self) -> None:
        """Read away what is still coming: closing before would take the reply back from the client."""
        self.enter("linger")
        self._farewell()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            self.sock.settimeout(LAST_WORDS / 2)
            while time.monotonic() < self.since + LAST_WORDS:
                if not self.sock.recv(65536):
                    break

    def close(self) -> None:
        """End the connection."""
        self._farewell()
        self.sock.close()

    def _farewell(self) -> None:
        """Over TLS, say that nothing follows: else the client could take the reply for cut off."""
        if self.is_complete and hasattr(self.sock, "unwrap"):
            with contextlib.suppress(OSError, ValueError):      # said before, or nobody there to hear it
                self.sock.setblocking(False)
                self.sock.unwrap()

    def drop(self) -> None:
        """End the connection from another thread; its own notices and closes.

        Only the reading side is shut down, which the client does not hear: the other would look like a reply's end.
        """
        self.dropped = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RD)


def encode(response: Response, now: float, with_body: bool = True) -> bytes:
    """A reply as it goes over the wire."""
    head = ["HTTP/1.1 %d %s" % (response.status, HTTPStatus(response.status).phrase), "Date: " + http_date(now),
            "Server: co2d", "Connection: close"]
    if response.status != 304:
        head += ["Content-Type: " + response.content_type, "Content-Length: %d" % len(response.body)]
    head += ["%s: %s" % header for header in response.headers]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + (response.body if with_body else b"")


def serve(station: Station, connection: Connection, tls: Optional[ssl.SSLContext]) -> Response:
    """Read a request and find its answer. Raises what the network raises."""
    try:
        if tls:
            connection.start_tls(tls)
        request = connection.request = connection.read_request()
        body = connection.read_body(request)
        connection.enter("answer")
        connection.request = request._replace(body=body, peer=connection.peer, now=station.now())
        return respond(station, connection.request)
    except Refused as refused:
        station.count("co2d_requests_total", route="malformed", status=refused.status)
        return refused.response()


def reply(station: Station, connection: Connection, response: Response) -> None:
    """Send the answer and log it. Raises what the network raises."""
    request, received = connection.request, len(connection.request.body) if connection.request else 0
    connection.send(encode(response, station.clock(), request is None or request.method != "HEAD"))
    level = logging.INFO if response.status < 500 else logging.ERROR
    if level > logging.INFO or not station.settings.quiet:
        line = "%s %s" % (request.method, masked_target(station.settings.secret, request)) if request else "-"
        took = (time.monotonic() - connection.accepted) * 1000
        log.log(level, '%s "%s" %d %d %.1fms %s', connection.peer, line, response.status, received, took, response.note)
    station.count("co2d_received_bytes_total", received)
    if response.status >= 400:
        connection.linger()


def masked_target(secret: str, request: Request) -> str:
    """The target for the log; where a secret is expected, what stands in its place is not shown."""
    if not secret:
        return request.target
    first, rest = request.path[0], request.path[1:]
    known = {pattern[0] for _, pattern, _, _ in _PATTERNS}
    query = request.target.partition("?")[1:]
    return "".join(["/", "/".join([first if first in known else "*", *rest]), *query]).replace(secret, "*")


class Server(socketserver.TCPServer):
    """A pool of threads that each accept, serve, close.

    Idle threads wait in accept; the rest of a crowd waits in the kernel's queue. Two threads serve fast clients best,
    one that syncs and one that reads: more would only pass Python's lock around. So another is started only for those
    that a slow client or disk holds up (`_tend`), up to `threads`; when all are at work and clients wait, the slowest
    are dropped (`PATIENCE`). `_lock` guards `_threads`, `_idle` and `_open`.
    """

    request_queue_size = 1024
    allow_reuse_address = True
    ready = 2                           # threads that no client holds up; as many stay when there is nothing to do
    held_up = 0.002, 0.02               # seconds in one phase from which a thread counts as held up, by a slow disk
                                        # too; the second while we are busy: then it may only wait for Python's lock
    idle_rounds = 60                    # of TICK; then threads beyond `ready` go

    def __init__(self, station: Station, listener: Optional[socket.socket] = None) -> None:
        settings = station.settings
        self.address_family = socket.AF_INET6 if ":" in settings.listen else socket.AF_INET
        super().__init__((settings.listen, settings.port), socketserver.BaseRequestHandler, bind_and_activate=False)
        self.station, self.inherited = station, listener is not None
        self.tls = _tls_context(settings)
        if listener:
            self.socket.close()
            self.socket = listener
        else:
            self._bind(settings)
        self.socket.setblocking(True)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TICK)
        self.port = self.socket.getsockname()[1]
        self._lock, self._stopping, self._all_busy = threading.Lock(), threading.Event(), threading.Event()
        self._threads = self._idle = 0
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)   # each needs some; one that waits in accept holds one
        self._most = settings.threads if files < 0 else min(settings.threads, max(self.ready, files // 8))
        self._open: Dict[Connection, None] = {}
        station.connections = self._open.__len__

    def _bind(self, settings: Settings) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            self.server_bind()
            self.server_activate()
        except OSError as error:
            self.server_close()
            raise OSError(error.errno, "%s port %d: %s" % (settings.listen, settings.port, error.strerror))

    def start(self) -> None:
        """Begin to serve."""
        threading.stack_size(512 * 1024)
        with self._lock:
            for _ in range(self.ready):
                self._spawn_locked()
        threading.Thread(target=self._tend, name="tend", daemon=True).start()

    def _tend(self) -> None:
        """Keep threads ready that no client holds up; when there are as many as may be, drop the slowest clients."""
        while not self._stopping.is_set():
            self._all_busy.wait(1)
            self._all_busy.clear()
            before, used_before = time.monotonic(), time.process_time()
            while not self._idle and not self._stopping.wait(0.01):
                now, used = time.monotonic(), time.process_time()
                busy = used - used_before > 0.7 * (now - before)
                before, used_before = now, used
                if self._grow(now - self.held_up[busy]) and self._is_waited_for():
                    self.drop_slowest(1 + self._threads // 16)

    def _is_waited_for(self) -> bool:
        return self.socket.fileno() >= 0 and bool(select.select([self.socket], [], [], 0)[0])

    def _grow(self, since: float) -> bool:
        """Start threads, two for each that has been held up since before then; whether there are as many as may be."""
        with self._lock:
            held_up = sum(connection.since < since for connection in self._open)
            try:
                for _ in range(min(2 * held_up + self.ready, self._most) - self._threads):
                    self._spawn_locked()
            except RuntimeError:                                # the system gives us no more
                return True
            return self._threads >= self._most

    def _spawn_locked(self) -> None:
        threading.Thread(target=self._work, name="worker", daemon=True).start()
        self._threads += 1

    def _work(self) -> None:
        try:
            for connection in iter(self._next_connection, None):
                self._attend(connection)
        finally:
            with self._lock:
                self._threads -= 1

    def _next_connection(self) -> Optional[Connection]:
        """Wait for a connection; None when this thread is not needed any more.

        When we stop, those in the queue of our own socket are still served; an inherited one is left to our successor.
        """
        with self._lock:
            self._idle += 1
        connection, waited = None, 0
        while not (connection or self._stopping.is_set() or (waited > self.idle_rounds and self._idle > self.ready)):
            connection, waited = self._accept(), waited + 1
        if not connection and self._stopping.is_set() and not self.inherited:
            connection = self._accept()
        with self._lock:
            self._idle -= 1
            if connection:
                self._open[connection] = None
                if not self._idle:
                    self._all_busy.set()
        return connection

    def _accept(self) -> Optional[Connection]:
        try:
            sock, address = self.socket.accept()                # the kernel wakes one thread for one connection
        except BlockingIOError:                                 # nobody came within TICK
            return None
        except OSError as error:                                # gone again, or out of descriptors
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.drop_slowest(8)
                time.sleep(0.05)
            return None
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):     # the kernel's: Python's take two more system calls
            sock.setsockopt(socket.SOL_SOCKET, option, _TICK)
        return Connection(sock, address[0], self.station.settings)

    def _attend(self, connection: Connection, stored: Optional[Response] = None) -> None:
        """Serve a connection to its end, or until its response must wait: who stores what it waits for goes on here.

        No client can hold that one up: a response that others send is so short that the socket's buffer takes it.
        """
        wait = sent = None
        try:
            response = stored or serve(self.station, connection, self.tls)
            wait = None if stored else response.after
            if not wait:
                reply(self.station, connection, response)
                sent = response.sent
        except (OSError, Gone) as error:
            if str(error) and not self.station.settings.quiet:
                log.info("%s went away in its %s: %s", connection.peer, connection.phase, error)
        except Exception as error:
            log.error("%s: %r at %s", connection.peer, error, importer.place_of(error))
        if wait:
            connection.since = float("inf")                     # it holds up no thread, and is not to be dropped
            wait(functools.partial(self._attend, connection, response))
        else:
            with self._lock:
                self._open.pop(connection, None)
            connection.close()
            if sent:
                sent()

    def drop_slowest(self, most: int) -> None:
        """End the connections that have been in their phase the longest beyond our patience."""
        now = time.monotonic()
        with self._lock:
            slow = [c for c in self._open if now - c.since > PATIENCE[c.phase]]
        order = list(PATIENCE)
        for connection in sorted(slow, key=lambda c: (order.index(c.phase), c.since))[:most]:
            connection.drop()
            self.station.count("co2d_dropped_connections_total", phase=connection.phase)

    def stop(self) -> None:
        """Finish running requests and those that wait in the kernel's queue, then close."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if not self.inherited:
            self.socket.setblocking(False)                      # workers take what waits, and nobody waits for more
        began = time.monotonic()
        while time.monotonic() < began + self.station.settings.request_seconds:
            if not self.inherited and self._is_waited_for():
                self._grow(time.monotonic() - min(self.held_up))
            elif not self._threads:
                break
            with self._lock:
                late = [c for c in self._open if c.phase == "head" and time.monotonic() - c.since > STOP_PATIENCE]
            for connection in late:
                connection.drop()
            if time.monotonic() > began + STOP_PATIENCE:
                self.socket.close()                             # whoever keeps coming is to come to our successor
            time.sleep(0.02)
        self.server_close()


def _tls_context(settings: Settings) -> Optional[ssl.SSLContext]:
    if not settings.tls_cert:
        return None
    import ssl                                                  # brings 4 MB of OpenSSL
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        for file in filter(None, (settings.tls_cert, settings.tls_key)):
            open(file, "rb").close()                            # ssl would not say which of them it cannot read
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None)
    except OSError as error:
        key = settings.tls_key or "in the same file"
        raise BadConfig("tls_cert %s, tls_key %s: %s" % (settings.tls_cert, key, error))
    return context


# -- the import thread ------------------------------------------------------------------------------------------------


class Importing(threading.Thread):
    """Imports what requests have written, moments later, and now and then looks for what came in by other ways."""

    def __init__(self, station: Station) -> None:
        super().__init__(name="import", daemon=True)
        self.station, self.stopping = station, threading.Event()

    def run(self) -> None:
        patience, scanned, paths = 1.0, float("-inf"), None
        while not self.stopping.is_set():
            paths, began = paths or self.station.take_changed(), time.monotonic()
            full = began - scanned > self.station.settings.import_scan
            if (full or paths) and not self._import(None if full else paths):
                self.stopping.wait(patience)
                patience = min(2 * patience, DATABASE_PATIENCE)
                continue
            ended = time.monotonic()
            scanned, patience, paths = ended if full else scanned, 1.0, None
            if self.stopping.wait(min(REST * (ended - began), DATABASE_PATIENCE)):
                break
            self.station.something_changed.wait(self.station.settings.import_scan)
            self.stopping.wait(self.station.settings.import_delay)

    def _import(self, paths: Optional[Set[str]]) -> bool:
        try:
            importer.import_new(self.station.archive, paths)
            self.station.health.clear("import")
            return True
        except Exception as error:                              # locked, broken, gone: uploads go on, we try again
            self.station.count("co2d_import_errors_total")
            self.station.health.report("import", importer.CRITICAL, "imports fail: %s at %s" % (
                error, importer.place_of(error)))
            return False

    def stop(self) -> None:
        """Let a running import finish."""
        self.stopping.set()
        self.station.something_changed.set()
        self.join(30)


# -- the process ------------------------------------------------------------------------------------------------------


class LogFormatter(logging.Formatter):
    """One line: a priority for journald when it reads us, else a UTC time; control characters escaped."""

    def __init__(self, journald: bool) -> None:
        super().__init__("%(message)s" if journald else "%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        self.converter, self.journald = time.gmtime, journald

    def format(self, record: logging.LogRecord) -> str:
        line = _UNPRINTABLE.sub(lambda found: "\\x%02x" % ord(found[0]), super().format(record)).rstrip()
        return "<%d>%s" % ({"ERROR": 3, "WARNING": 4}.get(record.levelname, 6), line) if self.journald else line


def under_journald() -> bool:
    """Whether stderr goes to the journal (see JOURNAL_STREAM in systemd.exec(5))."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == "%d:%d" % (status.st_dev, status.st_ino)


def notify(state: str) -> None:
    """Tell systemd, if it listens (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.sendall(state.encode())


def inherited_listener() -> Optional[socket.socket]:
    """The listening socket that systemd hands over, if any (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS", "0") == "0":
        return None
    return socket.socket(fileno=3)


SYSTEMD = {
    "socket": """\
[Unit]
Description=Socket of co2d: clients wait here while the daemon restarts

[Socket]
ListenStream=%(listen)s
Backlog=4096
NoDelay=true

[Install]
WantedBy=sockets.target
""",
    "service": """\
[Unit]
Description=co2d: receives the readings of CO2 sensor units
After=network.target

[Service]
Type=notify
ExecStart=%(command)s
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
RestartSec=5
RestartPreventExitStatus=2 78
WatchdogSec=120
TimeoutStopSec=120
User=co2d
Group=co2d
UMask=0027
LimitNOFILE=65536
Environment=MALLOC_ARENA_MAX=2
ReadWritePaths=%(written)s
# What follows takes away all that the daemon does not need.
AmbientCapabilities=
CapabilityBoundingSet=%(capability)s
DevicePolicy=closed
KeyringMode=private
LockPersonality=true
MemoryDenyWriteExecute=true
NoNewPrivileges=true
PrivateDevices=true
PrivateTmp=true
PrivateUsers=%(private_users)s
ProcSubset=pid
ProtectClock=true
ProtectControlGroups=true
ProtectHome=%(home)s
ProtectHostname=true
ProtectKernelLogs=true
ProtectKernelModules=true
ProtectKernelTunables=true
ProtectProc=invisible
ProtectSystem=strict
RemoveIPC=true
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=true
RestrictRealtime=true
RestrictSUIDSGID=true
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources

[Install]
WantedBy=multi-user.target
""",
}


def _word(path: str) -> str:
    """A path as systemd reads it (systemd.syntax(7))."""
    escaped = re.sub(r'(["\\])', r"\\\1", path).replace("%", "%%")
    return '"%s"' % escaped if re.search(r"""[\s"'\\;]""", path) else escaped


def _host_port(address: str, port: int) -> str:
    return ("[%s]:%d" if ":" in address else "%s:%d") % (address, port)


def systemd_unit(kind: str, settings: Settings, arguments: argparse.Namespace) -> str:
    """A complete systemd unit for this installation."""
    needed = (HERE, sys.executable, settings.data_dir, settings.var_dir)
    written = dict.fromkeys([settings.data_dir, settings.var_dir, os.path.dirname(settings.db)])
    config = ["--config", os.path.abspath(arguments.config)] if arguments.config else []
    low_port = 0 < settings.port < 1024
    return SYSTEMD[kind] % {
        "command": " ".join(map(_word, [sys.executable, os.path.join(HERE, "co2d.py"), *config])).replace("$", "$$"),
        "written": " ".join(map(_word, written)),
        "listen": _host_port(settings.listen, settings.port),
        "capability": "CAP_NET_BIND_SERVICE" if low_port else "", "private_users": "no" if low_port else "true",
        "home": "read-only" if any(path.startswith(("/home/", "/root/")) for path in needed) else "true"}


def claim(directory: str) -> int:
    """A lock on a data directory, held as long as the descriptor is open; OSError when another daemon holds it.

    Two daemons would write the same files, each trusting what it remembers of them.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "another co2d uses it", directory)
    except OSError as error:                                    # NFS locks no directories
        log.warning("%s cannot be locked (%s): see that no other co2d uses it", directory, error)
    return fd


class Daemon:
    """The running process: what the signals set, what the main thread does in between."""

    def __init__(self, settings: Settings, arguments: argparse.Namespace) -> None:
        self.arguments, self.station = arguments, Station(settings)
        self.claim = claim(settings.data_dir)
        self.server = Server(self.station, inherited_listener())
        self.importing = Importing(self.station)
        self.watching = Watching(self.station)
        self.signals: queue.SimpleQueue[int] = queue.SimpleQueue()  # nothing else that waits bears signal handlers
        self.interrupted = False
        self.watchdog = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
        self.fed = 0.0

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self.server.start()
        self.importing.start()
        self.watching.start()
        settings = self.station.settings
        log.info("co2d %s listens on %s, data in %s", importer.__version__, _host_port(settings.listen, self.server.port),
                 settings.data_dir)
        notify("READY=1\nSTATUS=listens on port %d" % self.server.port)
        while self._tick():
            pass
        return self._stop()

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.interrupted:
            os._exit(130)
        self.interrupted |= number == signal.SIGINT
        self.signals.put(number)

    def _feed_watchdog(self) -> None:
        """Tell systemd that we live, but only after a real accept, write and sync."""
        if self.watchdog and time.monotonic() - self.fed > self.watchdog:
            self.fed = time.monotonic()
            try:
                threading.Thread(target=self._probe, name="probe", daemon=True).start()
            except RuntimeError as error:
                log.error("watchdog: %s", error)

    def _probe(self) -> None:
        problems: List[str] = []
        check_disk(self.station)                                # a full disk is told, and no reason to be killed
        try:
            with socket.create_connection((self._own_address(), self.server.port), timeout=self.watchdog) as sock:
                if self.server.tls:
                    import ssl                                  # it is there already
                    sock = ssl._create_unverified_context().wrap_socket(sock)
                sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                if not sock.recv(100).startswith(b"HTTP/1.1 "):
                    problems.append("no answer from ourselves")
        except OSError as error:
            problems.append("cannot reach ourselves: %s" % error)
        for line in problems:
            log.error("watchdog: %s", line)
        if not problems:
            notify("WATCHDOG=1")

    def _own_address(self) -> str:
        listen = str(self.server.socket.getsockname()[0])
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen, listen)

    def _tick(self) -> bool:
        """Wait for a signal, but not for long; whether to go on."""
        self._feed_watchdog()
        with contextlib.suppress(queue.Empty):
            if self.signals.get(timeout=TICK) != signal.SIGHUP:
                return False
            self.reload()
        return True

    def reload(self) -> None:
        """Read the configuration again; a bad one changes nothing."""
        notify("RELOADING=1\nMONOTONIC_USEC=%d" % (time.monotonic_ns() // 1000))
        old = self.station.settings
        try:
            new = settings_of(self.arguments)
            tls = _tls_context(old)
        except (BadConfig, OSError) as error:                   # OSError: the current directory is gone
            log.error("reload refused, the old settings stay: %s", error)
        else:
            fixed = {name: getattr(old, name) for name, setting in SETTINGS.items() if setting.restart}
            later = [name for name in fixed if getattr(new, name) != fixed[name]]
            self.station.settings = new._replace(**fixed)
            self.station.archive = self.station.settings.archive()
            self.server.tls = tls                               # the same files, perhaps with a renewed certificate
            log.info("reloaded%s", "; only a restart changes " + ", ".join(later) if later else "")
        notify("READY=1")

    def _stop(self) -> int:
        log.info("stopping")
        notify("STOPPING=1")
        self.server.stop()
        self.importing.stop()
        self.watching.stop()
        self.station.pings.close()
        self.station.fetches.log.close()
        log.info("stopped")
        return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line; one option for every setting."""
    parser = argparse.ArgumentParser(prog="co2d.py", description="The daemon that CO2 sensor units report to.")
    parser.add_argument("--config", metavar="FILE",
                        help="configuration (default: CO2D_CONF, or co2d.conf beside the script)")
    parser.add_argument("--check-config", action="store_true", help="check the configuration and exit")
    parser.add_argument("--print-config", action="store_true", help="print the settings in force and exit")
    parser.add_argument("--print-unit", nargs="?", const="service", choices=sorted(SYSTEMD),
                        help="print a systemd unit for this installation and exit (default: service)")
    parser.add_argument("--version", action="version", version="co2d " + importer.__version__)
    for name, setting in SETTINGS.items():
        default = importer.format_value(getattr(Settings(), name), example=True).replace("%", "%%")
        parser.add_argument("--" + name.replace("_", "-"), metavar=setting.parse.__name__[len("parse_"):].upper(),
                            help="%s (default: %s)" % (setting.help.replace("%", "%%"), default or "none"))
    for name in importer.GONE:
        parser.add_argument("--" + name.replace("_", "-"), help=argparse.SUPPRESS)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the daemon, or one of its commands; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["publish"]:
            return publish(argv[1:])
        arguments = make_parser().parse_args(argv)
        settings = settings_of(arguments)
        if arguments.print_config:
            print(importer.format_config(settings), end="")
        elif arguments.print_unit:
            print(systemd_unit(arguments.print_unit, settings, arguments), end="")
        elif arguments.check_config:
            _tls_context(settings)
            print("configuration is well")
        else:
            return run(settings, arguments)
    except BadConfig as error:
        print("co2d: %s" % error, file=sys.stderr)
        return EX_CONFIG
    return 0


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Set up logging and run until stopped."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(under_journald()))
    log.addHandler(handler)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(most, 65536) if most > 0 else 65536             # a few per connection
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    log.setLevel(logging.INFO)
    try:
        daemon = Daemon(settings, arguments)
    except OSError as error:
        print("co2d: cannot start: %s" % error, file=sys.stderr)
        return 1
    return daemon.run()


if __name__ == "__main__":
    sys.exit(main())
