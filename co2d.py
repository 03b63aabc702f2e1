#!/usr/bin/env python3
"""co2d: the daemon that CO2 sensor units in the field report to.

A *unit* wakes once a day, says that it is alive (a *ping*), looks for *updates*, pushes its files in *chunks*, and
sleeps. Its firmware is fragile: one request per connection; a reply ends when the server closes; an unexpected status
ends its day. So every reply has Content-Length and ``Connection: close``. All routes are in the table `ROUTES`.

How a request flows: bytes -> `RequestReader` -> `Request` -> `respond(station, request)` -> `Response` -> bytes.
Nothing in the middle touches a socket. Text files are the truth: a request only appends to them, durably (`seqfile`).
One thread alone imports what is new into the database, moments later (`importer`). The status pages are drawn from the
database (`plot_ascii`). Uploads and pings do not need the database.

Threads, by name, and the function that each of them runs:

    main            `Daemon.run`            starts and stops the others, and does what the signals say
    accept          `Server._accept_new`    workers that accept connections, and serve them as far as their clients
                                            let them
    resume          `Server._resume_ready`  workers that go on with connections that were parked
    parked          `Server._watch_parked`  waits for the clients that have to do something first, and keeps all
                                            deadlines
    people, exports `Server._answer_lane`   answer what can take long (status pages, metrics; data by URL), one request
                                            after the other
    import          `Importing.run`         takes `Station.changed`, the files that requests have written to, and
                                            imports them
    health          `Watching.run`          looks for problems every minute, and when one is reported; writes
                                            health.json
    log             `LogWriter._write_all`  writes the lines of the log, so that nobody else waits for its reader
    watchdog        `Daemon._feed_watchdog` asks ourselves for /healthz now and then, if systemd expects a sign of life

A connection belongs to one thread at a time.

Where they meet:

    Server._lock    guards the table of parked connections and the selector that belongs to it
    Server._ready, Server._lanes            queues of connections that go on
    Station._lock   guards counters and `changed`
    Health._lock    guards the problems that are reported; Station.probing: one try of the disk at a time
    Fetches._lock   guards what is known of the updates that units take
    LogWriter       (the lock of logging.Handler) guards the count of dropped lines
    (seqfile)       one lock per upload directory, one per row log
    SIGNALS         wait until main takes them: they are blocked in all threads
    Health.changed, Station.something_changed, Importing.stopping       events: wake health, wake import, end import
    Station.settings, Station.archive, Server.tls, LogWriter.secret     each is replaced as a whole on reload
    Health.found    is replaced as a whole at each look for problems
    Quota, Station._rooms and Server._open have no lock: a count may be off by a chunk, a set takes single operations

A ping is answered by the thread that writes its row, which may be that of another ping (`Response.after`).

There is one import thread, because a database has one writer (`importer.only_writer`), and because repeats and rollups
depend on rows of other files.

What kill -9 loses: nothing that was acknowledged. Clients whose reply was not complete see a reset, and come back. The
counters, lines of the log that wait, the last rows of fetches (an update is listed once more) and what was learned of a
unit in this session (one superfluous re-send) are gone. `changed` is, too, so each start looks at all files.

Exit status: 0 stopped well, 1 failed, 2 usage, 78 configuration, 130 interrupted twice.

To add a route: its endpoint, and a row of ROUTES. A setting: a row of importer._SETTINGS. A metric: a row of METRICS,
and Station.count; what is measured when it is asked for: Station.samples. A problem: Health.report; one that the
database shows: importer.problems; one of a unit's directory: directory_problems. A key of the firmware's
configuration: a row of CONFIGURATION.
"""

from __future__ import annotations

import seqfile                          # first: from then on Ctrl-C shows no traceback

import argparse
import errno
import fcntl
import filecmp
import fnmatch
import ipaddress
import itertools
import json
import logging
import mimetypes
import os
import queue
import re
import resource
import select
import selectors
import shlex
import shutil
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from os.path import exists, isdir, join, realpath
from typing import BinaryIO, Callable, NamedTuple
from urllib.parse import parse_qsl, unquote_to_bytes

import importer
from importer import CRITICAL, NOTE, SEGMENT, SETTINGS, WARNING, BadConfig
from seqfile import ERRORS_FOLDER, FETCHES_FOLDER, PINGS_FOLDER, PUB_FOLDER, UNIT_PREFIX, UPDATE_PREFIX, UPDATES_FOLDER

MAX_HEAD = 8 * 1024                     # bytes of request line and header fields
MAX_FIELDS = 64
SMALL_FILE = 64 << 10                   # bytes of a file that is sent at once
MAX_DEPTH = 8                           # path segments of an upload; units use three
RECENT_PINGS = 20
LONGEST_NAME = 3 * 255                  # bytes of a name on a card: FAT allows 255 characters, of 3 bytes in UTF-8
RECOUNT = 60                            # seconds; before that, what a unit takes on the disk is not counted anew
LOOK = 60.0                             # seconds between two looks for problems
RETRY = 1.0                             # seconds after an import that failed
LONGEST_PAUSE = 60                      # seconds after an import that took long
PAUSE = 4                               # times as long as an import took: uploads have priority

FOLDERS = (PINGS_FOLDER, FETCHES_FOLDER, PUB_FOLDER)        # in the server's own directory

log = logging.getLogger("co2d")

# -- messages ---------------------------------------------------------------------------------------------------------

_to_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


class Request(NamedTuple):
    """A well-formed request."""

    method: str
    target: str                         # as sent, for the log
    path: tuple                         # decoded segments; "/" is ("",)
    last_segment: bytes                 # of the path, not decoded
    query: list                         # of (name, value), decoded, in order
    headers: dict                       # names in lower case
    body: bytes = b""
    peer: str = "127.0.0.1"
    now: float = 0.0                    # UTC seconds
    is_gone: Callable = bool            # is_gone(): whether nobody waits for the answer any more

    @property
    def arguments(self):
        """Query arguments by name, as browsers and programs send them: a plus is a space. Refused: one is repeated."""
        found = {}
        for name, value in parse_qsl(self.target.partition("?")[2], keep_blank_values=True):
            if name in found:
                raise Refused(400, f"{name[:40]} is there twice")
            found[name] = value
        return found


class Response(NamedTuple):
    """What the daemon answers."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: tuple = ()                 # of (name, value)
    note: str = ""                      # for the log
    file: BinaryIO | None = None        # sent in place of `body`, piece by piece, up to the size that it has now
    extra_seconds: float = 0.0          # a long file may take so many more than `request_seconds`
    sent: Callable | None = None        # sent() is called when the kernel has taken the last byte, before we close
    after: Callable | None = None       # after(send) stores the row, then calls send(), perhaps in another thread


class Refused(Exception):
    """A request that gets an error status. Raised anywhere, answered in one place."""

    def __init__(self, status, reason, headers=()):
        self.status = status
        self.reason = reason
        self.headers = headers

    def response(self):
        """The status, with JSON that says why."""
        return json_response({"error": self.reason}, self.status, self.reason, self.headers)


def json_response(value, status=200, note="", headers=()):
    """Compact JSON on one line."""
    body = _to_json(value).encode("utf-8", "surrogateescape") + b"\n"
    return Response(status, body, headers=headers, note=note)


def text_response(text, kind="text/plain", headers=()):
    """Text in UTF-8."""
    return Response(200, text.encode("utf-8", "replace"), f"{kind}; charset=utf-8", headers)


def read_regular(root, path):
    """The bytes of a regular file at a path below root; no link on the way is followed."""
    with seqfile.open_regular(root, path.split("/")) as file:
        return file.read()


def file_response(file, kind=None, headers=()):
    """The content of an open file. A small one is read here; a bigger one is read piece by piece while it is sent."""
    response = Response(200, b"", kind or "application/octet-stream", headers, file=file)
    if os.fstat(file.fileno()).st_size > SMALL_FILE:
        return response
    with file:
        return response._replace(body=file.read(), file=None)


def http_date(now):
    """UTC seconds as RFC 9110 wants them: Mon, 07 Oct 2019 03:23:39 GMT."""
    return seqfile.utc(now, "%a, %d %b %Y %H:%M:%S GMT")         # in English: nothing here sets LC_TIME


def encode_head(response, length, now):
    """Status line and header fields of a response whose body has `length` bytes."""
    head = f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}\r\n"
    head += f"Date: {http_date(now)}\r\nServer: co2d\r\nConnection: close\r\n"
    if response.status != HTTPStatus.NOT_MODIFIED:
        head += f"Content-Type: {response.content_type}\r\nContent-Length: {length}\r\n"
    for name, value in response.headers:
        head += f"{name}: {value}\r\n"
    return head.encode("latin-1") + b"\r\n"


# -- parsing ----------------------------------------------------------------------------------------------------------
# Stricter than RFC 9112 asks: what no honest client sends is refused before anything else sees it. Looser in one place:
# the target may hold raw spaces and UTF-8, because the units send nicknames as they are.

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ((?:https?://[^/?#\x00-\x20\x7f]+)?(/[^\x00-\x1f\x7f]*))"
                           rb" HTTP/([0-9]\.[0-9])\Z")
_FIELD = re.compile(rb"(" + _TOKEN + rb"):[ \t]*((?:[^\x00-\x08\x0a-\x1f\x7f]*[^\x00-\x20\x7f])?)[ \t]*\Z")
_FORBIDDEN = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r[^\n]|(?:^|[^\r])\n")
_HOST = re.compile(r"(?:(?:[A-Za-z0-9._~%!$&'()*+,;=-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?)?\Z")
_LENGTH = re.compile(r"[0-9]{1,10}\Z")
_END_OF_HEAD = b"\r\n\r\n"
METHODS = b"GET HEAD POST PUT DELETE OPTIONS PATCH TRACE CONNECT".split()


class RequestReader:
    """Makes a request out of the bytes of a connection, which come in pieces of any size. It knows no sockets.

    `request` is set, without its body, as soon as the head is complete; `is_complete` says that all has come.
    """

    def __init__(self, max_body):
        self.request = None             # a Request; None: the head is not complete
        self.is_complete = False
        self._max_body = max_body
        self._buffer = b""
        self._body_length = 0

    def feed(self, data):
        """Take what has come. Refused: this can never become a request."""
        searched = max(0, len(self._buffer) - len(_END_OF_HEAD) + 1)
        self._buffer += data
        if self.request is None:
            self._take_head(searched)
        self.is_complete = self.request is not None and len(self._buffer) >= self._body_length

    def complete_request(self, peer, now):
        """The request with its body, from the address `peer`, at UTC seconds `now`; not before `is_complete`."""
        return self.request._replace(body=self._buffer[:self._body_length], peer=peer, now=now)

    def _take_head(self, start):
        """Look at what is new, from `start` on: a head can come byte by byte."""
        end = self._buffer.find(_END_OF_HEAD, start)
        if end < 0:
            self._check_beginning(start)
            return
        end += len(_END_OF_HEAD)
        if end > MAX_HEAD:
            raise Refused(431, f"head longer than {MAX_HEAD} bytes")
        self.request = parse_head(self._buffer[:end])
        self._buffer = self._buffer[end:]
        self._body_length = int(self.request.headers.get("content-length", "0"))
        if self._body_length > self._max_body:
            raise Refused(413, f"body longer than {self._max_body} bytes")

    def _check_beginning(self, start):
        """Refuse a head as early as possible. Its bytes before `start` have been checked."""
        if _FORBIDDEN.search(self._buffer, start):
            raise Refused(400, "control character, or a line that does not end in CRLF")
        if len(self._buffer) > MAX_HEAD:
            raise Refused(431 if b"\r\n" in self._buffer else 414, f"head longer than {MAX_HEAD} bytes")
        end_of_line = self._buffer.find(b"\r\n", start)
        if end_of_line >= 0 and b"\r\n" not in self._buffer[:start]:
            _parse_request_line(self._buffer[:end_of_line])


def parse_head(head):
    """The request of a complete head; Refused when it is malformed."""
    request_line, *field_lines = head[:-len(_END_OF_HEAD)].split(b"\r\n")
    method, target, origin, version = _parse_request_line(request_line)
    headers = _parse_fields(field_lines)
    _check_headers(headers, version)
    place, _, query = origin.partition(b"?")
    segments = place[1:].split(b"/")
    path = tuple(map(_decode, segments))
    return Request(method.decode(), target.decode("utf-8", "replace"), path, segments[-1], _parse_query(query), headers)


def _parse_request_line(line):
    """Method, target, the target without scheme and host, version."""
    found = _REQUEST_LINE.match(line)
    if not found:
        raise Refused(400, "malformed request line")
    if found[4] not in (b"1.0", b"1.1"):
        raise Refused(505, "HTTP/1.0 or HTTP/1.1 only")
    if found[1] not in METHODS:
        raise Refused(501, "unknown method")
    return found.groups()


def _parse_fields(lines):
    if len(lines) > MAX_FIELDS:
        raise Refused(431, f"more than {MAX_FIELDS} header fields")
    headers = {}
    for line in lines:
        found = _FIELD.match(line)
        if not found:
            raise Refused(400, "malformed header field")
        name = found[1].decode().lower()
        if name in headers and name in ("host", "content-length", "transfer-encoding"):
            raise Refused(400, f"repeated header field {name}")
        headers[name] = found[2].decode("latin-1")
    return headers


def _check_headers(headers, version):
    """Refuse fields that leave length or host in doubt.

    A client that expects a 100 Continue gets none: it sends its body all the same, after a second.
    """
    if "transfer-encoding" in headers:
        is_smuggling = "content-length" in headers or version == b"1.0"
        raise Refused(400 if is_smuggling else 501, "Transfer-Encoding is not accepted")
    if not _LENGTH.match(headers.get("content-length", "0")):
        raise Refused(400, "malformed Content-Length")
    if version == b"1.1" and "host" not in headers:
        raise Refused(400, "no Host")
    if not _HOST.match(headers.get("host", "")):
        raise Refused(400, "malformed Host")


def _decode(raw):
    return (unquote_to_bytes(raw) if b"%" in raw else raw).decode("utf-8", "replace")


def _parse_query(query):
    """Arguments in order. A plus stays a plus: the units do not encode anything, and nicknames may hold one."""
    pairs = [part.partition(b"=") for part in query.split(b"&") if part]
    return [(_decode(name), _decode(value)) for name, _, value in pairs]


# -- the log ----------------------------------------------------------------------------------------------------------
# What clients send stands in the log, and people and programs read it line by line. So nothing that is sent can end a
# line, end a quoted field, or turn the direction of the text; and neither the secret nor half of it is written.

MOST_LINES = 10000                      # lines that wait to be written; a line has some 100 bytes
_WORD = re.compile(r"""[^\s/?&="'\\]+""")


def escape_unprintable(text):
    """Control characters, line separators, marks of direction and the like as \\x1b or \\u202e."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def mask_secret(secret, text):
    """Each word that holds the secret, or half of it (somebody has mistyped it), becomes `*`."""
    if not secret:
        return text
    half = min(len(secret), max(3, len(secret) // 2))
    pieces = [secret[at:at + half].lower() for at in range(len(secret) - half + 1)]

    def masked(word):
        folded = word[0].lower()
        return "*" if any(piece in folded for piece in pieces) else word[0]

    return _WORD.sub(masked, text)


class LogWriter(logging.Handler):
    """Hands lines to a thread that writes them to stderr, so that nobody else ever waits for a reader.

    When MOST_LINES wait, because nobody reads, further lines are dropped and counted. `Watching` tells of them.
    """

    def __init__(self, fd, is_journald=False):
        super().__init__()
        self.secret = ""                                        # is not written
        self.dropped = 0                                        # lines; the handler's own lock guards this
        self._is_journald = is_journald
        self._lines = queue.SimpleQueue()
        self._thread = _started(partial(self._write_all, fd), "log")

    def emit(self, record):
        """Called with the handler's lock held."""
        if self._lines.qsize() >= MOST_LINES:
            self.dropped += 1
        else:
            self._lines.put(self.line(record))

    def line(self, record):
        """One line: a priority for journald when it reads the log (sd-daemon(3)), else a UTC time."""
        if self._is_journald:
            priority = {"ERROR": 3, "WARNING": 4}.get(record.levelname, 6)
            start = f"<{priority}>"
        else:
            start = f"{seqfile.utc(record.created)}Z {record.levelname} "
        return start + mask_secret(self.secret, escape_unprintable(record.getMessage().rstrip()))

    def _write_all(self, fd):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)       # they are for the main thread
        for line in iter(self._lines.get, ""):
            data = line.encode("utf-8", "backslashreplace") + b"\n"
            with suppress(OSError):                             # whoever reads the log has gone
                while data:
                    data = data[os.write(fd, data):]

    def finish(self, seconds):
        """Wait until all is written, but not longer than so many seconds."""
        self._lines.put("")
        self._thread.join(seconds)


def _started(work, name):
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


# -- health -----------------------------------------------------------------------------------------------------------


class Health:
    """All that is wrong: problems that somebody reports, and those that database and directories show.

    Each is an importer.Problem.
    """

    def __init__(self, clock):
        self.clock = clock
        self.changed = threading.Event()
        self._lock = threading.Lock()                           # guards `reported`
        self.reported = {}                                      # by key: what is not over
        self.found = []                                         # what database and directories show

    def report(self, key, level, text, unit=""):
        """Say that something is wrong, or still is. `key` is the same for as long as it lasts. No text: it is over."""
        with self._lock:
            before = self.reported.pop(key, None)
            if text:
                since = before.since if before else int(self.clock())
                text = f"{text} (since {importer.when(since)})"
                self.reported[key] = importer.Problem(key, level, unit, text, since)
        if bool(before) != bool(text):
            self.changed.set()

    def clear(self, key):
        """Say that a problem is over, if it was there at all."""
        self.report(key, "", "")

    def problems(self):
        """All that is wrong, worst first."""
        with self._lock:
            return importer.worst_first([*self.reported.values(), *self.found])


# -- what units take of their updates ---------------------------------------------------------------------------------
# A row of var/fetches has UTC time, unit, update, and what happened: the path of a file whose last byte was handed
# over, or one of the words below. (No path has parentheses.) A unit that has an update never asks for its files again.
# So the days with STARTED, less the last one if COMPLETE follows it, are the nights that were spent in vain.

STARTED = "(started)"                   # the unit asked which files there are
COMPLETE = "(complete)"                 # all files have been handed over, in this night or in earlier ones
MOST_NIGHTS = 3                         # to spend on one update; an update goes before the data of its night


class Course:
    """How far one unit is with one update, from the rows about both."""

    def __init__(self):
        self.days = []                  # with STARTED, as 2019-10-07, in order
        self.taken = set()              # paths, until all were handed over
        self.complete_at = ""           # UTC, the last time; "": never
        self.is_over = True             # complete since it last started

    def learn(self, when, what):
        """Take in what a row says."""
        if what == STARTED:
            self.is_over = False
            if when[:10] not in self.days:
                self.days.append(when[:10])
        elif what == COMPLETE:
            self.is_over = True
            self.complete_at = when
            self.taken.clear()
        elif not self.complete_at:
            self.taken.add(what)

    @property
    def had_at(self):
        """UTC time at which the unit had all, "" when it does not have it."""
        return self.complete_at if self.is_over else ""

    def nights_in_vain(self, now):
        """Days on which the unit began, and could not finish; today does not count: it may still."""
        today = seqfile.utc(now, "%Y-%m-%d")
        begun = self.days[:-1] if self.is_over else self.days
        return sum(day != today for day in begun)


def read_courses(*directories):
    """How far units are with their updates, from all rows of such directories as var/fetches.

    Gives (unit, update) -> Course; an empty one for what is in no row.
    """
    courses = defaultdict(Course)
    for directory in directories:
        for when, unit, name, what in importer.read_rows(directory, seqfile.FETCHES, 4):
            courses[unit, name].learn(when, what)
    return courses


class Fetches:
    """The log of what units take of their updates, and what of it decides whether an update is still listed."""

    def __init__(self, directory, sync, health):
        self.log = seqfile.RowLog(directory, seqfile.FETCHES, sync=sync)
        self._health = health
        self._lock = threading.Lock()                           # guards _courses and what is in it
        self._courses = read_courses(directory)

    def note(self, unit, name, what, now):
        """Add a row. What the unit asks for is noted before the reply, so that rows keep its order."""
        when = seqfile.utc(now, fraction=True)
        with self._lock:
            self._courses[unit, name].learn(when, what)
        self.log.append(f"{when}\t{unit}\t{name}\t{what}\n".encode(), self._told)

    def _told(self, file, problem):
        text = f"what units take of updates is not noted: {problem}" if problem else ""
        self._health.report("fetches", WARNING, text)

    def handed_over(self, unit, name, path, files, now):
        """The last byte of a file was handed over; `files` are all files of the update."""
        self.note(unit, name, path, now)
        with self._lock:
            course = self._courses[unit, name]
            has_all = course.complete_at or course.taken.issuperset(files)
            is_news = has_all and not course.is_over
        if is_news:
            self.note(unit, name, COMPLETE, now)

    def is_given_up(self, unit, name, now):
        """Whether the unit has spent so many nights on an update that it is to send its data first."""
        with self._lock:
            nights = self._courses[unit, name].nights_in_vain(now)
        if nights < MOST_NIGHTS:
            return False
        log.warning(f"updates/{name} of {unit} is not listed any more: it took {nights} nights in vain")
        return True


# -- the station ------------------------------------------------------------------------------------------------------


class Count(NamedTuple):
    """What a unit took on the disk when it was counted at UTC second `at`, and what has been added since."""

    bytes: int
    files: int
    at: float


class Quota:
    """How much of the disk each unit may take. A unit that sends nothing that is stored leaves no trace.

    No lock: of two chunks of a unit at once, one may not be charged. Before a refusal all is counted anew, once in
    RECOUNT seconds at most.
    """

    def __init__(self):
        self._counts = {}                                       # by unit

    def has_place(self, unit, settings):
        """Whether a unit has a directory, or may have one. The data directory is made again if it was removed."""
        if isdir(join(settings.data_dir, unit)):
            return True
        seqfile.make_directory(settings.data_dir)
        return len(os.listdir(settings.data_dir)) < settings.max_units

    def check(self, chunk, settings):
        """Refuse a chunk that would exceed a limit."""
        if chunk.end > settings.max_file:
            raise Refused(507, f"file would exceed {settings.max_file} bytes")
        count = self._counts.get(chunk.unit)
        if not count and not self.has_place(chunk.unit, settings):
            raise Refused(403, f"more than {settings.max_units} units")
        if not count or self._exceeds(count, chunk, settings) and abs(chunk.now - count.at) >= RECOUNT:
            count = self._count(chunk, settings)
        if self._exceeds(count, chunk, settings):
            raise Refused(507, f"unit would exceed {settings.max_unit_bytes} bytes or {settings.max_unit_files} files")

    def _exceeds(self, count, chunk, settings):
        if count.bytes + len(chunk.data) > settings.max_unit_bytes:
            return True
        path = join(settings.data_dir, chunk.path)
        return count.files >= settings.max_unit_files and not os.path.lexists(path)

    def _count(self, chunk, settings):
        """Count anew: work where there are many files, so for a unit that exceeds its quota only once a minute."""
        total, files = seqfile.usage_of(join(settings.data_dir, chunk.unit))
        count = Count(total, files, chunk.now)
        if files:
            self._counts[chunk.unit] = count
        return count

    def charge(self, chunk, receipt):
        """Add what a chunk took. A unit that is not counted yet is counted at its next chunk."""
        count = self._counts.get(chunk.unit)
        if count:
            self._counts[chunk.unit] = Count(count.bytes + receipt.grew, count.files + receipt.created, count.at)


class Station:
    """All state of the daemon that outlives a request. `clock` gives UTC seconds."""

    def __init__(self, settings, clock=time.time, sync=seqfile.fdatasync):
        self.settings = settings
        self.clock = clock
        self._sync = sync
        for directory in (settings.data_dir, settings.var_dir, *map(self.var, FOLDERS)):
            seqfile.make_directory(directory, settle=True)
        self.archive = settings.archive()
        self.health = Health(clock)
        self.probing = threading.Lock()         # held from a try of the disk to its report: the newest stands
        self.inbox = seqfile.Inbox(settings.data_dir, settings.ask_older, self.sync)
        self.pings = seqfile.RowLog(self.var(PINGS_FOLDER), seqfile.PINGS, sync=self.sync)
        self.fetches = Fetches(self.var(FETCHES_FOLDER), self.sync, self.health)
        self.started = clock()
        self._lock = threading.Lock()           # guards the next three
        self.counters = Counter()       # by (name, ((label, value), ...))
        self.changed = set()            # paths
        self._changed_since = self.started
        self._rooms = {}                # directory -> when its disk was asked for room; bytes left since
        self.connections = lambda: 0            # how many are open; the server's own, once there is one
        self.log_writer = None                  # a LogWriter, once there is one
        self.something_changed = threading.Event()
        self.quota = Quota()

    def var(self, *names):
        """A path below the server's own directory."""
        return join(self.settings.var_dir, *names)

    def data(self, *names):
        """A path below the units' directories."""
        return join(self.settings.data_dir, *names)

    def has_room(self, directory, length):
        """Whether the disk of a directory has more free than is to be kept free; so many bytes count as written then.

        The disk is asked once a second, or when what was free is used up: a system call costs a busy thread its turn.
        """
        now = self.clock()
        asked, left = self._rooms.get(directory, (0, 0))
        if left <= 0 or abs(now - asked) >= 1:
            asked, left = now, self._ask_for_room(directory)
        self._rooms[directory] = asked, left - length
        return left >= 0

    def _ask_for_room(self, directory):
        """Bytes that are free beyond the reserve on the disk of a directory, which is made if need be."""
        try:
            seqfile.make_directory(directory)
            disk = shutil.disk_usage(directory)
        except OSError:                                         # who writes there tells why it fails
            return 0
        return disk.free - disk.total * self.settings.keep_free / 100

    def sync(self, fd):
        """Make the data of an open file durable, and count how long that took."""
        began = time.monotonic()
        self._sync(fd)
        self.count("co2d_syncs_total")
        self.count("co2d_sync_seconds_total", time.monotonic() - began)

    def count(self, name, amount=1, **labels):
        """Add to a counter of /metrics."""
        with self._lock:
            self.counters[name, tuple(labels.items())] += amount

    def samples(self):
        """The counters, and the gauges of what goes on at this moment."""
        with self._lock:
            samples = dict(self.counters)
            samples["co2d_open_connections", ()] = self.connections()
            samples["co2d_log_lines_dropped_total", ()] = self.log_writer.dropped if self.log_writer else 0
            samples["co2d_import_lag_seconds", ()] = self.clock() - self._changed_since if self.changed else 0
        return samples

    def touch(self, file):
        """Tell the import thread that a file has changed."""
        with self._lock:
            if not self.changed:
                self._changed_since = self.clock()
                self.something_changed.set()
            self.changed.add(file)

    def take_changed(self):
        """The files that have changed since the last call."""
        with self._lock:
            taken, self.changed = self.changed, set()
            self.something_changed.clear()
        return taken

    def admit(self, unit):
        """Refuse units that may not report."""
        if not any(fnmatch.fnmatchcase(unit, pattern) for pattern in self.settings.units.split()):
            raise Refused(403, "unit is not in the list of units")


# -- endpoints: units -------------------------------------------------------------------------------------------------


def hello(station, request):
    """Units get their hello, browsers an index."""
    if "text/html" in request.headers.get("accept", ""):
        allow(request, station.settings.status_allow)
        return page(station, request, "index")
    return json_response("Hello world!")


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def ping_row(unit, request):
    """A line of pings-NNNN.tsv; control characters in values would forge lines."""
    said = dict(reversed(request.query))                        # of what is repeated, the first
    values = [_UNPRINTABLE.sub("?", said.get(name, "None"))[:128] for name in ("site_code", "rssi_raw", "rssi_dbm")]
    return "\t".join([seqfile.utc(request.now, fraction=True), unit, *values]).encode("utf-8", "replace") + b"\n"


def alive(station, request, unit):
    """A ping. The answer is 200 whatever happens to the row: any other status would end the unit's day."""
    station.inbox.called(unit)
    row = ping_row(unit, request)
    return Response(200, b"{}\n", after=partial(_store_ping, station, unit, row))


def _store_ping(station, unit, row, send):
    def told(file, problem):
        text = f"pings are answered, but not stored: {problem}" if problem else ""
        station.health.report("pings", CRITICAL, text)
        if problem:
            station.count("co2d_pings_lost_total")
            log.error(f"ping of {unit} NOT STORED: {problem}")
        else:
            station.count("co2d_pings_total")
            station.touch(file)
        send()

    if station.has_room(station.settings.var_dir, len(row)):
        station.pings.append(row, told)
    else:
        told("", OSError(f"less than {station.settings.keep_free:g} % of the disk is free"))


def push(station, request, unit, path):
    """A chunk of a file, which may have any name that a card can hold; see seqfile for what becomes of it."""
    file = request.last_segment
    folders = station.settings.upload_dirs.split()
    if path[0] not in folders or len(path) >= MAX_DEPTH:
        raise Refused(403, f"uploads go below {' or '.join(folders)}")
    if file in (b"", b".", b"..") or len(file) > LONGEST_NAME:
        raise Refused(404, "no name of a file")
    offset = " ".join(value for name, value in request.query if name == "offset")
    if not re.match(r"[0-9]{1,15}\Z", offset):
        raise Refused(400, "exactly one offset is needed, a whole number")
    if not request.body:
        raise Refused(400, "empty body")
    name = file.decode("utf-8", "surrogateescape")
    chunk = seqfile.Chunk((unit, *path), name, int(offset), request.body, request.now)
    try:
        receipt = _store(station, chunk)
    except (Refused, OSError) as error:
        raise _storage_refusal(station, unit, error)
    station.health.clear(f"storage:{unit}")
    _note_receipt(station, chunk, receipt)
    return _acknowledge(receipt)


def _store(station, chunk):
    has_room = station.has_room(station.settings.data_dir, len(chunk.data))
    if chunk.is_strange:
        has_place = station.quota.has_place(chunk.unit, station.settings)
        return station.inbox.receive_strange(chunk, keep=has_room and has_place)
    if not has_room:
        raise Refused(507, f"less than {station.settings.keep_free:g} % of the disk is free")
    station.quota.check(chunk, station.settings)
    return station.inbox.receive(chunk)


def _note_receipt(station, chunk, receipt):
    """Count what was done, and tell the log and the import thread."""
    station.quota.charge(chunk, receipt)
    station.count("co2d_chunks_total", kind=receipt.kind)
    station.count("co2d_stored_bytes_total", receipt.grew)
    if receipt.set_aside:
        log.warning(f"{chunk.unit} sent other bytes for {chunk.kept}: the old ones are in {receipt.set_aside}")
        station.touch(receipt.set_aside)
    if receipt.asked:
        older, _ = receipt.ack
        log.info(f"{chunk.unit} is asked for {older} again")
    if chunk.is_strange:
        if not receipt.kept:
            station.count("co2d_strange_bytes_dropped_total", len(chunk.data))
    elif receipt.kind != "gap":
        station.touch(station.data(chunk.path))


def _acknowledge(receipt):
    """What seqfile has decided, in the words of PROTOCOL.md, section 3."""
    name, position = receipt.ack
    answer = {"ack_file": [name, position, position]}
    if receipt.kind == "enough":
        raise Refused(503, "no more of this file before the next ping")
    error = {"gap": "SKIPPED_PART_OF_FILE", "start": "READINGS_FIRST"}.get(receipt.kind)
    if error:
        return json_response({"error": error, **answer}, 416, receipt.kind)
    return json_response(answer, note=receipt.kind)


def _storage_refusal(station, unit, error):
    """The Refused for an upload that a quota or the disk has refused; the unit comes back next day."""
    refused = error
    if isinstance(error, OSError):
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        is_in_the_way = isinstance(error, IsADirectoryError) or error.errno == errno.ELOOP
        refused = Refused(507 if is_full else 400 if is_in_the_way else 503, f"cannot store: {error}")
    station.count("co2d_storage_errors_total")
    if os.path.lexists(station.data(unit)):                     # invented ids are not remembered
        text = f"uploads of {unit} are refused: {refused.reason}"
        station.health.report(f"storage:{unit}", WARNING, text, unit)
    return refused


# -- endpoints: updates -----------------------------------------------------------------------------------------------


class NotServable(OSError):
    """An update that no unit could fetch completely; says why."""


def walk_update(directory, prefix=""):
    """Relative paths of all files below an open directory; NotServable where a unit could not fetch one."""
    names = sorted(os.listdir(directory))
    if not names:
        raise NotServable(f"{prefix or 'it'} is empty")
    for name in names:
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        path = prefix + name
        if stat.S_ISDIR(mode) and SEGMENT.match(name):
            with seqfile.open_directory(directory, [name]) as below:
                yield from walk_update(below, f"{path}/")
        elif not stat.S_ISREG(mode) or not SEGMENT.match(name):
            raise NotServable(f"units cannot ask for {path!r}")
        elif not os.access(name, os.R_OK, dir_fd=directory, effective_ids=True):
            raise NotServable(f"this process may not read {path!r}")
        else:
            yield path


def files_of_update(data_dir, unit, name):
    """Relative paths of the files of an update; NotServable (or another OSError) when a unit could not fetch it all."""
    if not (name.startswith(UPDATE_PREFIX) and SEGMENT.match(name)):
        raise NotServable(f"its name does not start with {UPDATE_PREFIX}, or has characters that units cannot "
                          "ask for")
    with seqfile.open_directory(data_dir, [unit, UPDATES_FOLDER, name]) as directory:
        return list(walk_update(directory))


def visible_updates(data_dir, unit):
    """Names of what lies in a unit's directory of updates, servable or not, in the order in which units sort them."""
    try:
        with seqfile.open_directory(data_dir, [unit, UPDATES_FOLDER]) as directory:
            return sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except FileNotFoundError:
        return []


def servable_updates(data_dir, unit):
    """Names of the updates that a unit can fetch: complete, not empty, nothing strange in them."""
    names = []
    for name in visible_updates(data_dir, unit):
        try:
            files_of_update(data_dir, unit, name)
            names.append(name)
        except OSError as why:
            log.warning(f"updates/{name} of {unit} is not listed: {why}")
    return names


def list_updates(station, request, unit):
    """The updates there are for a unit, or 404. A unit takes the last one; if it cannot, its data go first."""
    try:
        names = servable_updates(station.settings.data_dir, unit)
    except OSError as error:
        log.warning(f"updates of {unit}: {error}")
        names = []
    if not names:
        raise Refused(404, "no updates")
    if station.fetches.is_given_up(unit, names[-1], request.now):
        raise Refused(404, "no updates that the unit could take")
    return json_response(names)


def update(station, request, unit, path):
    """A file of an update, or the list of what is in a directory of it."""
    name = path[0]
    parts = [unit, UPDATES_FOLDER, *path]
    try:
        files = files_of_update(station.settings.data_dir, unit, name)
        file = seqfile.open_regular(station.settings.data_dir, parts)
    except IsADirectoryError:
        return _list_files(station, request, parts)
    except OSError:
        raise Refused(404, "no such update, or no such file in it")
    if request.method == "HEAD":
        return file_response(file)
    relative = "/".join(path[1:])
    taken = partial(station.fetches.handed_over, unit, name, relative, files, request.now)
    return file_response(file)._replace(sent=taken)


def _list_files(station, request, parts):
    """The answer for a directory of an update. Asking for all that is below one is how a unit begins to take it."""
    unit, _, name, *below = parts
    with seqfile.open_directory(station.settings.data_dir, parts) as directory:
        if not {("recursive", "True"), ("recursive", "1")}.intersection(request.query):
            return json_response(sorted(os.listdir(directory)))
        reply = json_response(list(walk_update(directory)))
    if not below and request.method != "HEAD":
        station.fetches.note(unit, name, STARTED, request.now)
    return reply


# -- endpoints: people ------------------------------------------------------------------------------------------------


def recent(station, request):
    """The newest pings as text."""
    newest = itertools.islice(_newest_pings(station.var(PINGS_FOLDER)), RECENT_PINGS)
    rows = list(map(_short_ping, newest)) or ["No recent pings"]
    lines = [seqfile.utc(request.now) + "\t(now)", *rows]
    if request.arguments.get("asc") in ("1", "true", "True"):
        lines.reverse()
    refresh = request.arguments.get("refresh", "")
    headers = (("Refresh", refresh),) if re.match(r"[0-9]{1,6}\Z", refresh) else ()
    return text_response("\n".join(lines) + "\n", headers=headers)


def _newest_pings(directory):
    """All rows of pings, the newest first."""
    for name in reversed(seqfile.files_in_sequence(directory, seqfile.PINGS)):
        path = join(directory, name)
        with suppress(OSError), open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            yield from filter(None, reversed(file.read().split("\n")))


def _short_ping(line):
    when, _, rest = line.partition("\t")
    fields = [when.split(".")[0], *rest.removeprefix(UNIT_PREFIX).split("\t")]
    return "\t".join(map(escape_unprintable, fields))


_CSP = ("Content-Security-Policy",
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


@contextmanager
def refusals():
    """Raise Refused for what hinders a page or an export: it is no mistake of the program."""
    try:
        yield
    except importer.UnknownName as error:
        raise Refused(404, str(error))
    except (importer.BadArguments, ValueError) as error:
        raise Refused(400, str(error))
    except importer.Unusable as error:
        raise Refused(503, str(error))


def page(station, request, view, refresh=""):
    """A status page drawn from the database: HTML, or plain text for curl and whoever asks for it.

    `view`: a key of plot_ascii.WEB; `refresh`: seconds after which a browser is to ask again.
    """
    accept = request.headers.get("accept", "")
    agent = request.headers.get("user-agent", "")
    import plot_ascii                                           # a daemon that nobody looks at stays small
    query = request.arguments
    html = not query.pop("text", "") and not accept.startswith("text/plain") and not agent.startswith("curl/")
    status = 200
    try:
        with refusals():
            text = plot_ascii.web_page(view, station.settings.db, query, html, request.now,
                                       problems=station.health.problems(), archive=station.archive)
    except Refused as refused:
        if not html or "text/html" not in accept:               # a program
            raise
        status = refused.status
        text = plot_ascii.html_page("Sorry", plot_ascii.paragraphs([("bad", refused.reason)]), query)
    headers = [("Vary", "Accept, User-Agent"), ("X-Content-Type-Options", "nosniff"), _CSP]
    if refresh:
        headers.append(("Refresh", refresh))
    return text_response(text, "text/html" if html else "text/plain", headers)._replace(status=status)


DATA_TYPES = {"csv": "text/csv; charset=utf-8", "jsonl": "application/x-ndjson"}
LINES_AT_ONCE = 500                     # of an export, of 64 KiB at most
LEAST_FREE = 1 << 30                    # bytes of the disk that exports leave free; of a small disk, a tenth
SLOWEST_READER = 32 << 10               # bytes/s; whoever takes an export faster gets it whole


def data(station, request, what, form):
    """A table as `importer.py export` writes it; the arguments of the URL are its options."""
    with refusals():
        file = write_export(station, request, what, form)
    size = os.fstat(file.fileno()).st_size
    response = file_response(file, DATA_TYPES[form], (("X-Content-Type-Options", "nosniff"),))
    return response._replace(extra_seconds=size / SLOWEST_READER)


def write_export(station, request, what, form):
    """An export as a temporary file, so that it takes no memory and is complete before its first byte is sent."""
    import tempfile
    try:
        file = tempfile.TemporaryFile(dir=station.settings.var_dir)
        with importer.open_db(station.settings.db) as db:
            lines = importer.export(db, what, form, request.arguments, request.now)
            while part := "".join(itertools.islice(lines, LINES_AT_ONCE)):
                file.write(part.encode())
                if request.is_gone():
                    raise Refused(408, "the client has gone")
                disk = shutil.disk_usage(station.settings.var_dir)
                if disk.free < min(LEAST_FREE, disk.total // 10):
                    raise Refused(507, "the disk is nearly full: ask for less")
        file.seek(0)
    except OSError as error:
        raise Refused(507, f"cannot write the export: {error.strerror}")
    return file


def published(station, request, path, max_age=590):
    """A file below var/pub; `max_age`: seconds for which it may be taken from a cache."""
    try:
        file = seqfile.open_regular(station.var(PUB_FOLDER), path)
    except OSError:
        raise Refused(404, "no such file")
    changed = http_date(os.fstat(file.fileno()).st_mtime)
    headers = (("Cache-Control", f"max-age={max_age}"), ("Last-Modified", changed))
    if request.headers.get("if-modified-since") == changed:         # browsers send back the date that they were given
        file.close()
        return Response(304, headers=headers)
    return file_response(file, mimetypes.guess_type(path[-1])[0], headers)


def allow(request, allowed):
    """Refuse peers that are in none of the networks."""
    peer = ipaddress.ip_address(request.peer.split("%")[0])
    peer = getattr(peer, "ipv4_mapped", None) or peer
    if not any(peer in ipaddress.ip_network(network) for network in allowed.split()):
        raise Refused(403, "not for this network")


# -- endpoints: monitoring --------------------------------------------------------------------------------------------


def healthz(station, request):
    """Say that the process answers. The reply waits as that of a ping does, behind all rows, stored or not."""
    return text_response("ok\n")._replace(after=lambda send: station.pings.append(b"", lambda *_: send()))


def readyz(station, request):
    """All that is wrong, a line each. Disk and database are tried for real. With problems of units, it is ready."""
    check_disk(station)
    check_database(station)
    problems = station.health.problems()
    lines = [f"{problem.level}: {problem.text}\n" for problem in problems]
    is_ready = all(problem.unit or problem.level != CRITICAL for problem in problems)
    return text_response("".join(lines) or "ok\n")._replace(status=200 if is_ready else 503)


def check_disk(station):
    """Write, sync and remove a file where uploads go, and report what is wrong."""
    data_dir = station.settings.data_dir
    probe = join(data_dir, ".probe")
    text = ""
    with station.probing:
        station.inbox.close_files()
        if not station.has_room(data_dir, 0):
            text = f"less than {station.settings.keep_free:g} % of the disk of {data_dir} is free"
        try:
            with open(probe, "wb", buffering=0) as file:
                file.write(b"probe")
                station.sync(file.fileno())
        except OSError as error:
            text = f"uploads cannot be stored: {error}"
        with suppress(OSError):
            os.unlink(probe)
        station.health.report("disk", CRITICAL, text)


def check_database(station):
    """Report what is wrong with the database. True: it can be read, or does not exist yet."""
    path = station.settings.db
    _try_database(station, "writing", lambda: importer.try_to_write(path))
    return _try_database(station, "database", lambda: importer.try_to_read(path))


def _try_database(station, key, attempt):
    """Try something with the database, and report what it raises. True: it worked."""
    text = ""
    try:
        attempt()
    except Exception as error:                                  # whatever it is, it is not ready
        done = "written" if key == "writing" else "read"
        remedy = importer.remedy(error, station.settings.db)
        text = f"the database cannot be {done}: {error}{remedy}"
        station.something_changed.set()                         # the import thread makes it anew if it is damaged
    station.health.report(key, CRITICAL, text)
    return not text


def directory_problems(data_dir):
    """Problems of units whose directory takes no uploads, and of those with strange files."""
    with suppress(OSError), os.scandir(data_dir) as entries:
        for entry in entries:
            name, path = entry.name, entry.path
            if not name.startswith(UNIT_PREFIX):
                continue
            text = ""
            if entry.is_symlink():
                text = "it is a link, and links are not followed: put the directory itself there"
            elif not os.access(path, os.W_OK | os.X_OK):
                text = importer.ownership(path)
            since = int(entry.stat(follow_symlinks=False).st_ctime)
            if text:
                text = f"uploads to {path} are refused: {text}"
                yield importer.Problem(f"directory:{name}", CRITICAL, name, text, since)
            strange = join(path, seqfile.STRANGE)
            if isdir(strange):
                text = f"{name} sends files with names that are not its own; they are kept in {strange}"
                if _stays_behind(path):
                    text += "; its error log stays behind until they are taken off its card"
                yield importer.Problem(f"strange:{name}", NOTE, name, text, since)


def _stays_behind(directory):
    """Whether we acknowledged strange files that sort behind a unit's newest error log: it never looks back at that."""
    try:
        logs = seqfile.files_in_sequence(join(directory, ERRORS_FOLDER), seqfile.ERRORS)
        strange = os.listdir(join(directory, seqfile.STRANGE, ERRORS_FOLDER))
    except OSError:
        return False
    newest = max(logs, default="").encode()
    return any(seqfile.card_name(name) > newest for name in strange)


class Watching:
    """Looks for problems every minute, and when one is reported. The log gets what is new or over, health.json all."""

    def __init__(self, station):
        self.station = station
        self.stopping = False
        self._told = {}                                         # problems by key
        self._lines_dropped = 0                                 # of the log, at the last look

    def run(self):
        """Until `stop`."""
        while not self.stopping:
            self.station.health.changed.clear()
            try:
                self.look()
            except Exception as error:                          # a mistake in the program: `look` says when it is over
                text = f"problems are not looked for: {error!r} at {importer.place_of(error)}"
                log.error(text)
                self.station.health.report("health", CRITICAL, text)
            self.station.health.changed.wait(LOOK)

    def look(self):
        """Look once."""
        station, health = self.station, self.station.health
        dropped = station.log_writer.dropped if station.log_writer else 0
        text = f"{dropped} lines of the log are lost: nobody reads it (a full pipe, a stopped journald)"
        health.report("log", WARNING, text if dropped > self._lines_dropped else "")
        self._lines_dropped = dropped
        check_disk(station)
        found = list(directory_problems(station.settings.data_dir))
        if check_database(station) and exists(station.settings.db):
            _try_database(station, "database", lambda: found.extend(self._ask_database()))
        health.found = found
        problems = health.problems()
        self._tell(problems)
        text = ""
        try:
            importer.write_health(station.settings.var_dir, problems, int(station.clock()))
        except OSError as error:
            text = f"{importer.HEALTH_FILE} cannot be written: {error}"
        health.report("health", CRITICAL, text)

    def _ask_database(self):
        """What the database shows. While imports fail, units are judged as of their last success."""
        station, health = self.station, self.station.health
        with importer.open_db(station.settings.db) as db:
            health.report("data_dir", CRITICAL, importer.missing_data(db, station.archive))
            causes = ("import", "writing", "data_dir")
            begun = [problem.since for problem in health.problems() if problem.key in causes]
            found = importer.problems(db, station.archive, min([int(station.clock()), *begun]))
        return [problem for problem in found if problem.key not in health.reported]

    def _tell(self, problems):
        """Tell the log what is new and what is over."""
        levels = {CRITICAL: logging.ERROR, WARNING: logging.WARNING, NOTE: logging.INFO}
        told = self._told
        self._told = {problem.key: problem for problem in problems}
        for key in self._told.keys() - told.keys():
            log.log(levels[self._told[key].level], self._told[key].text)
        for key in told.keys() - self._told.keys():
            log.info(f"over: {told[key].text}")

    def stop(self):
        """Look no more."""
        self.stopping = True
        self.station.health.changed.set()


METRICS = dict(importer.rows_of(f"""
co2d_requests_total                 Requests by route and status.
co2d_received_bytes_total           Bytes of request bodies.
co2d_stored_bytes_total             Bytes added to unit files.
co2d_chunks_total                   Chunks by what became of them.
co2d_pings_total                    Pings stored.
co2d_pings_lost_total               Pings answered but not stored.
co2d_storage_errors_total           Uploads that the disk or a quota refused.
co2d_strange_bytes_dropped_total    Bytes of files with strange names, acknowledged but not kept.
co2d_import_errors_total            Imports that failed.
co2d_dropped_connections_total      Slow clients dropped to serve others, by phase.
co2d_log_lines_dropped_total        Lines of the log that nobody read in time.
co2d_syncs_total                    Syncs of data to disk.
co2d_sync_seconds_total             Seconds spent in them.
co2d_uptime_seconds                 Seconds since the start.
co2d_open_connections               Connections being served.
co2d_import_lag_seconds             Seconds that the oldest change has waited for its import.
co2d_problem                        1 for each problem that there is, by key, level, unit and text (see /readyz).
co2d_free_bytes                     Free bytes where uploads go.
co2d_units                          Units by verdict ({", ".join(importer.VERDICTS)}) of plot_ascii.py status.
"""))


def metrics(station, request):
    """Counters and gauges in Prometheus' text format: all of METRICS that have samples."""
    samples = station.samples()
    samples["co2d_uptime_seconds", ()] = request.now - station.started
    for problem in station.health.problems():
        labels = tuple((name, getattr(problem, name)) for name in ("key", "level", "unit", "text"))
        samples["co2d_problem", labels] = 1
    with suppress(OSError):                                     # no data directory, or a broken disk: readyz tells
        samples["co2d_free_bytes", ()] = shutil.disk_usage(station.settings.data_dir).free
    # No database, or a broken one: readyz tells.
    with suppress(Exception), importer.open_db(station.settings.db) as db:
        units = importer.fleet_state(db, int(request.now), archive=station.archive)
        for verdict, number in Counter(unit.verdict for unit in units).items():
            samples["co2d_units", (("state", verdict),)] = number
    lines = []
    for name, help in METRICS.items():
        rows = sorted((labels, value) for (family, labels), value in samples.items() if family == name)
        if rows:
            kind = "counter" if name.endswith("_total") else "gauge"        # only a counter has such a name
            lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{_labels(labels)} {value:.10g}" for labels, value in rows]
    return text_response("\n".join(lines) + "\n", "text/plain; version=0.0.4")


def _labels(labels):
    """Labels of a sample. A value is quoted as in JSON: of what is printable, only quotes and backslashes change."""
    pairs = [f"{name}={_to_json(escape_unprintable(str(value)))}" for name, value in labels]
    return "{%s}" % ",".join(pairs) if pairs else ""


# -- routes -----------------------------------------------------------------------------------------------------------


class Route(NamedTuple):
    """An endpoint and when it answers.

    In the pattern, <unit> and <path> (one segment or more) are handed to the endpoint. <file>: Request.last_segment.
    """

    method: str
    pattern: str
    endpoint: Callable                  # endpoint(station, request, and what is filled in) gives a Response
    allow: str = ""                     # the setting that says which networks may ask; units may if `units` lists them
    lane: str = ""                      # it can take long: the thread of this lane answers; its Response has no `after`


ROUTES = [
    Route("GET", "/", hello, lane="people"),
    Route("POST", "/ou/<unit>/alive", alive),
    Route("PUT", "/ou/<unit>/push-sequential/<path>/<file>", push),
    Route("GET", "/ou/<unit>/updates", list_updates),
    Route("GET", "/ou/<unit>/updates/<path>", update),
    Route("GET", "/status/alive/recent", recent, "status_allow"),
    Route("GET", "/status/alive/summary", partial(page, view="alive", refresh=600), "status_allow", "people"),
    Route("GET", "/data/co2/summary", partial(page, view="co2", refresh=3600), "status_allow", "people"),
    *(Route("GET", f"/data/co2/{what}.{form}", partial(data, what=what, form=form), "status_allow", "exports")
      for what in importer.EXPORTS for form in DATA_TYPES),
    Route("GET", "/status/alive/<path>", published, "status_allow"),
    Route("GET", "/data/co2/<path>", partial(published, max_age=3590), "status_allow"),
    Route("GET", "/var/pub/<path>", published, "status_allow"),
    Route("GET", "/healthz", healthz, "metrics_allow"),
    Route("GET", "/readyz", readyz, "metrics_allow", "people"),
    Route("GET", "/metrics", metrics, "metrics_allow", "people")
]

SEGMENT_FORM = SEGMENT.pattern.replace(r"\Z", "")
_PLACEHOLDERS = {
    "<unit>": f"(?P<unit>{SEGMENT_FORM})",
    "<path>": f"(?P<path>{SEGMENT_FORM}(?:/{SEGMENT_FORM})*)",
    "<file>": "[^/]*"
}


def _compile(pattern):
    """The regular expression for the paths of a pattern. <unit> and <path> are plain names, <file> can be any name."""
    form = re.escape(pattern)
    for name, segments in _PLACEHOLDERS.items():
        form = form.replace(name, segments)
    return re.compile(form)


_COMPILED = [(route, _compile(route.pattern)) for route in ROUTES]


def find_route(request):
    """The first route that fits, and what the request fills in; 405 when only the method does not fit."""
    place = "/" + "/".join(segment.replace("/", "\0") for segment in request.path)
    allowed = []
    for route, form in _COMPILED:
        found = form.fullmatch(place)
        if found:
            methods = [route.method, "HEAD"] if route.method == "GET" else [route.method]
            if request.method in methods:
                filled = found.groupdict()
                if "path" in filled:
                    filled["path"] = filled["path"].split("/")
                return route, filled
            allowed += methods
    if allowed:
        raise Refused(405, "method not allowed", (("Allow", ", ".join(dict.fromkeys(allowed))),))
    raise Refused(404, "not found")


def strip_secret(secret, request):
    """The request without its secret; units' routes need the right one."""
    if not secret:
        return request
    import hmac                                                 # brings 4 MB of OpenSSL
    first, *rest = request.path
    if rest and hmac.compare_digest(first.encode(), secret.encode()):
        return request._replace(path=tuple(rest))
    if first == "ou":
        raise Refused(404, "not found")
    return request


def unit_of(secret, request):
    """The id of the unit that a request comes from, as it says; "" where it is no unit's request."""
    with suppress(Refused):
        path = strip_secret(secret, request).path
        if path[0] == "ou" and len(path) > 2 and SEGMENT.match(path[1]):
            return path[1]
    return ""


def request_for_log(secret, request):
    """Method and target, to stand between quotes. Where a secret is expected, nothing in its place is shown."""
    target = request.target
    if secret:
        first, *rest = request.path
        known = {route.pattern.split("/")[1] for route in ROUTES}
        place = "/".join(["", first if first in known else "*", *rest])
        query = "&".join("=".join(filter(None, pair)) for pair in request.query)
        target = mask_secret(secret, f"{place}?{query}".rstrip("?"))
    return request.method + " " + target.replace("\\", r"\x5c").replace('"', r"\x22")


def respond(station, request, lane=None):
    """The Response to a well-formed request, whatever happens.

    `lane`: the one of this thread. If the route belongs to another, its name is returned, and nothing is done. With
    None, any route is answered.
    """
    name = "none"
    try:
        known = strip_secret(station.settings.secret, request)
        route, filled = find_route(known)
        if lane is not None and route.lane != lane:
            return route.lane
        name = route.pattern
        if route.allow:
            allow(known, getattr(station.settings, route.allow))
        if "unit" in filled:
            station.admit(filled["unit"])
        response = route.endpoint(station, known, **filled)
    except Refused as refused:
        response = refused.response()
    except Exception as error:                                  # one line, not a traceback: the log is read by grep
        line = request_for_log(station.settings.secret, request)
        log.error(f'"{line}" failed: {error!r} at {importer.place_of(error)}')
        response = json_response({"error": "internal error"}, 500, repr(error))
    station.count("co2d_requests_total", route=name, status=response.status)
    return response


# -- the command line: what all commands share ------------------------------------------------------------------------


class Failed(importer.Unusable):
    """A command that cannot be carried out; says why, and what to do."""


def command_parser(command, description, examples, directory=""):
    """A parser with the options that every command has; `examples`, with co2d for the program's name, end its help.

    `directory`: help on the argument DIR; "" where there is none.
    """
    program = os.path.basename(sys.argv[0])                     # as it was called
    parser = argparse.ArgumentParser(
        prog=f"{program} {command}".strip(),
        description=description,
        epilog="examples:\n" + examples.replace("co2d ", program + " "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    add_options(parser, "--config  FILE  configuration (default: CO2D_CONF, or co2d.conf beside the script)")
    parser.add_argument("--version", action="version", version=f"co2d {importer.__version__}")
    if command:                                                 # run has them among the settings
        add_options(parser, """
--data-dir  DIR  data directory, instead of the configuration's
--var-dir   DIR  server directory, instead of the configuration's
""")
    if directory:
        parser.add_argument("directory", metavar="DIR", help=directory)
    return parser


def add_options(parser, table):
    """Add options to a parser. A row of the table has name, value and help.

    The value is the word that stands for it in the help, with "..." if the option may be repeated, or "-" for none.
    """
    for name, word, help in importer.rows_of(table):
        if word == "-":
            parser.add_argument(name, help=help, action="store_true")
        elif word.endswith("..."):
            parser.add_argument(name, help=help, metavar=word[:-3], action="append", default=[])
        else:
            parser.add_argument(name, help=help, metavar=word)


def settings_of(arguments):
    """The settings in force. Warnings about them go to the log."""
    settings = importer.load_settings(arguments.config, vars(arguments))
    for line in settings.warnings:
        log.warning(line)
    return settings


def warn(text):
    """Print a warning for the person who called a command."""
    print("co2d: warning: " + text, file=sys.stderr)


def become_daemon_user(settings):
    """Go on as the user of the daemon: the owner of the directory of pings, which the daemon makes itself.

    Files and directories are made with the mode of the data directory, so that the daemon can read them. Unusable for
    others than root and that user.
    """
    mode = os.stat(settings.data_dir).st_mode | 0o700
    os.umask(0o777 & ~mode)
    importer.act_as_owner(join(settings.var_dir, PINGS_FOLDER))


# -- publishing: what a unit can take ---------------------------------------------------------------------------------
# An update is a directory DATA/UNIT/updates/update-... with flash/ (files that replace those on the unit) and
# conf-patch/ (JSON objects, merged key by key into the files of conf/ on the card). A unit takes the last name by byte
# order, once.

MAX_UPDATE_BYTES = 1 << 20              # the file system of a FiPy has 4 MiB, half of it in use
MAX_UPDATE_FILE = 300_000               # bytes; a bigger one is not through before the watchdog resets the unit
MAX_UPDATE_FILES = 150                  # one request each; a unit talks for 300 s
PATCHES = "conf-patch/"
ID_FILE = "ou-id.json"
COMM_FILE = "ou-comm-config.json"
SCHEDULE_FILE = "schedule.json"

# Regular expressions for values as compact JSON. A unit appends /ou/... to a URL, and must be able to parse it.
_NICKNAME = r'"(?! |None")([^&%"\\\x00-\x1f\x7f\ud800-\udfff]|\\["\\]){1,64}(?<! )"'
_PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_LABEL = "[A-Za-z0-9-]{1,63}"           # of a host name
_URL = rf'"https?://({_LABEL}\.)*{_LABEL}(:{_PORT})?(/[A-Za-z0-9._-]+)*"'
_URLS = rf"{_URL}|\[{_URL}(,{_URL})*\]"
_EVERY = "([1-9]|[1-5][0-9]|60)"
_HOUR = "(1?[0-9]|2[0-3])"
_MINUTE = "[1-5]?[0-9]"
_TASK = (rf'\[[67],("minutes",{_EVERY}|"daily",{_HOUR}),{_MINUTE}\]'
         rf'|\[[67],("minutes_random",{_EVERY}|"daily_random",{_HOUR}),{_MINUTE},{_MINUTE}\]')
_TASKS = rf"\[(?=.*\[6,)(?=.*\[7,)({_TASK})(,({_TASK}))*\]"     # 6 is to measure, 7 to communicate
_PULL = r'\["updates","pull_last_dir"\]'


def as_json(pattern):
    """A test for `Key.fits`: the value, as compact JSON, has this form (a regular expression)."""
    return lambda value, settings: re.fullmatch(pattern, _to_json(value))


def are_directories(value, settings):
    """Whether a list of [directory, way] has only what this server answers, and all that a unit needs."""
    uploads = "|".join(settings.upload_dirs.split())
    push = rf'\["({uploads})(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*","push_sequential"\]'
    entry = f"({_PULL}|{push})"
    needed = rf'(?=.*{_PULL})(?=.*\["data/readings","push_sequential"\])'
    return re.fullmatch(rf"\[{needed}{entry}(,{entry})*\]", _to_json(value))


def are_tasks(value, settings):
    """Whether old firmware works with this schedule. Where it raises an exception, it does so at each wake."""
    written = _to_json(value)
    spans = re.findall('random",[0-9]+,([0-9]+),([0-9]+)', written)     # in each of them a minute is chosen
    return re.fullmatch(_TASKS, written) and all(int(start) < int(end) for start, end in spans)


class Key(NamedTuple):
    """A key that the firmware reads from a file in conf/ on its card."""

    file: str
    name: str
    fits: Callable                      # fits(value, settings): true where a unit can work with the value
    reason: str                         # why any other value is refused, and what is needed
    help: str


CONFIGURATION = [
    Key(ID_FILE, "site_code",
        as_json(_NICKNAME),
        "cannot be sent: units send their nickname as it is, so it is a text of 1 to 64 characters without &, %, "
        "control characters, or a space at an end",
        "the nickname"),
    Key(ID_FILE, "hw_id",
        lambda *_: False,
        "must not be published: this replaces the id of the hardware: the readings of two units would be mixed",
        "the id of the hardware; never published"),
    Key(COMM_FILE, "sync_dest",
        as_json(_URLS),
        "is not a URL that a unit could reach: http(s)://name-or-IPv4[:port][/secret], without a slash at the end; "
        "with no server at all it would never report again",
        "URL of the server, or list of URLs, tried in order every night"),
    Key(COMM_FILE, "sync_dirs",
        are_directories,
        'will not do: needed is a list with ["updates", "pull_last_dir"] and ["data/readings", "push_sequential"]; '
        'others are [directory, "push_sequential"] below upload_dirs: a refusal ends the night of a unit',
        "what is synced in which order: list of [directory, way]"),
    Key(COMM_FILE, "ntp_host",
        as_json('null|"[A-Za-z0-9.-]{1,253}"'),
        "will not do: a host name is needed, or null for pool.ntp.org",
        "time server; null: pool.ntp.org"),
    Key(COMM_FILE, "send_chunk_size",
        lambda value, settings: type(value) is int and 256 <= value <= settings.max_body,
        "will not do: a whole number is needed, from 256 (less is too slow for a night) to max_body",
        "bytes of a chunk; else 4096"),
    Key(COMM_FILE, "total_connect_secs_max",
        lambda value, _: type(value) in (int, float) and 60 <= value <= 3600,
        "will not do: seconds from 60 (it takes as long to connect) to 3600 (its battery) are needed",
        "seconds for one night; else 300"),
    Key(COMM_FILE, "connect_backoff_max",
        as_json("[1-9]|[12][0-9]|30"),
        "will not do: a whole number from 1 to 30 is needed",
        "read, but no night is skipped any more; else 7"),
    Key(SCHEDULE_FILE, "tasks",
        are_tasks,
        'will not do: needed are tasks 6 (measure) and 7 (communicate), as [6, "minutes", EVERY, OFFSET], '
        '[7, "daily", HOUR, MINUTE], or "minutes_random" or "daily_random" with two minutes, from and to: '
        "with anything else old firmware falls silent until somebody switches it off and on",
        "when to measure and to communicate; old firmware only")
]


def _refuse_constant(word):
    raise ValueError(f"{word} is no number that a unit could read")


def check_patch(name, content, settings):
    """Failed when a file (bytes) below conf-patch/ would harm a unit; yields what in it no firmware reads."""
    file = name[len(PATCHES):]
    if "/" in file:
        raise Failed(f"{name}: with a directory in conf-patch/ a unit cannot install the update, nor go on: "
                     "put the file directly into conf-patch/")
    try:
        patch = json.loads(content.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Failed(f"{name}: no JSON: {error}")
    if not name.endswith(".json") or not isinstance(patch, dict):
        raise Failed(f"{name}: a patch is a .json file with one object")
    keys = {key.name: key for key in CONFIGURATION if key.file == file.lower()}
    if not keys:
        yield f"{name}: no firmware reads this file"
        return
    for word, value in patch.items():
        if word not in keys:
            yield f"{name}: no firmware uses the key {word}, only {', '.join(keys)}"
        elif not keys[word].fits(value, settings):
            raise Failed(f"{name}: {word}: {_to_json(value)} {keys[word].reason}")


def check_update(files, settings, force):
    """Failed when these files (path -> bytes) would harm a unit.

    `force`: what no firmware reads is warned about, not refused.
    """
    _check_names_and_sizes(files)
    for name, content in files.items():
        if name.startswith(PATCHES):
            for unread in check_patch(name, content, settings):
                if not force:
                    raise Failed(unread + "; --force publishes it all the same")
                warn(unread)
        elif not name.startswith("flash/"):
            raise Failed(f"{name}: only flash/ and conf-patch/ go to units")
        elif name.endswith(".mpy") and name.replace(".mpy", ".py") in files:
            warn(f"{name}: a unit would go on using the .py beside it")


def _check_names_and_sizes(files):
    """Failed when one of these files (path -> bytes) is too big, or two of them are one file on a unit's card."""
    seen = {}
    for name, content in files.items():
        length = len(content)
        if length > MAX_UPDATE_FILE:
            raise Failed(f"{name} has {length} bytes: a file of more than {MAX_UPDATE_FILE} is not through before the "
                         "unit's watchdog resets it, every night, before any data")
        for path in itertools.accumulate(name.split("/"), join):        # directories, too
            on_card = re.sub(r"\.+(?=/|$)", "", path.lower())
            other = seen.setdefault(on_card, path)
            if other != path:
                raise Failed(f"{other} and {path} are the same file on a card (FAT)")


def read_update(directory):
    """The files of an update: path -> bytes; Failed when a unit could not ask for them, or not take so many."""
    total, count = seqfile.usage_of(directory)
    if total > MAX_UPDATE_BYTES or count > MAX_UPDATE_FILES:
        raise Failed(f"{total} bytes in {count} files: a unit can take {MAX_UPDATE_BYTES} bytes in "
                     f"{MAX_UPDATE_FILES} files")
    try:
        with seqfile.open_directory(directory, []) as opened:
            return {name: read_regular(directory, name) for name in walk_update(opened)}
    except OSError as error:
        raise Failed(f"{directory}: {error}")


def patch_of(names, read):
    """The keys that an update of these files sets in the unit's configuration, and their values.

    read(name) gives the bytes of a file.
    """
    patch = {}
    for name in names:
        if name.startswith(PATCHES):
            with suppress(ValueError, TypeError):               # not published by us
                patch.update(json.loads(read(name)))
    return patch


# -- publishing: what units have taken --------------------------------------------------------------------------------


class Run(NamedTuple):
    """Pings in a row of one unit, with one nickname, that reached one server ("" for this one)."""

    nickname: str
    server: str
    first: str                          # UTC time
    last: str


def _logs(settings, folder):
    """Where the rows of this server lie, and of each whose var/ was copied here: its name ("": this one), directory."""
    yield "", join(settings.var_dir, folder)
    for name in sorted(os.listdir(settings.data_dir)):
        if name.startswith(seqfile.SERVER_PREFIX):
            yield name, join(settings.data_dir, name, "var", folder)


def read_runs(settings):
    """All pings that are known here: unit -> list of `Run`; of each server in order of time."""
    known = {}
    for server, directory in _logs(settings, PINGS_FOLDER):
        for when, unit, nickname, _, _ in importer.read_rows(directory, seqfile.PINGS, 5):
            runs = known.setdefault(unit, [])
            first = when
            if runs and (runs[-1].nickname, runs[-1].server) == (nickname, server):
                first = runs.pop().first
            runs.append(Run(nickname, server, first, when))
    return known


def _progress(course, files, now):
    """How far a unit is with an update of these files."""
    if not course.days and not course.taken:
        return "not fetched"
    held = len(files if course.complete_at else course.taken)
    state = f"{held} of {len(files)} files in {len(course.days)} nights"
    if course.had_at:
        state = "complete " + course.had_at[:19]
    if course.nights_in_vain(now) >= MOST_NIGHTS:
        state += ", not listed any more: publish it in smaller parts"
    return state


def as_list(value):
    """A list as it is; else the value alone."""
    return value if isinstance(value, list) else [value]


def _effect(patch, runs):
    """What is seen of an update, from the configuration that it sets and the pings since the unit had all of it.

    Pings alone prove little: a unit that is switched on sends two. Silence here is what is expected of a unit that was
    sent to another server.
    """
    if not runs and "sync_dest" in patch:
        return "went to " + " or ".join(as_list(patch["sync_dest"]))
    if not runs:
        return "has not called since"
    latest = max(runs, key=lambda run: run.last)
    seen = []
    if "site_code" in patch:
        if latest.nickname == patch["site_code"]:
            seen.append(f"calls itself {latest.nickname} since {latest.first[:19]}")
        else:
            seen.append("still calls itself " + latest.nickname)
    if "sync_dest" in patch:
        nearest = min(runs, key=lambda run: run.server)         # at this server, if there is one
        if nearest.server:
            seen.append(f"calls at {nearest.server} since {nearest.first[:19]}")
        else:
            seen.append(f"calls here, last {nearest.last[:19]}")
    return ", ".join(seen) or f"called again, last {latest.last[:19]}"


# -- publishing: the command ------------------------------------------------------------------------------------------


def default_name(latest, now):
    """update-2026-11-25z130405: with the second (UTC), so that two servers do not give the same name.

    It sorts behind the name `latest` if any second of this minute does; the z sorts behind update-2026-11-25a.
    """
    for second in range(60):
        name = seqfile.utc(now + second, UPDATE_PREFIX + "%Y-%m-%dz%H%M%S")
        if name > latest:
            break
    return name


def files_to_publish(arguments, settings):
    """The files of the update that the command line asks for (path -> bytes), checked."""
    changes = [parse_assignment(text) for text in arguments.set]
    if arguments.nickname is not None:
        changes.append((ID_FILE, "site_code", arguments.nickname))
    if arguments.sync_dest:
        changes.append((COMM_FILE, "sync_dest", arguments.sync_dest))
    patches = {}
    for file, key, value in changes:
        patches.setdefault(PATCHES + file, {})[key] = value
    if patches:
        files = {name: _to_json(patch).encode("utf-8", "surrogatepass") for name, patch in patches.items()}
    else:
        directory = arguments.names.pop() if arguments.names else ""
        if not isdir(directory):
            raise Failed(f"which update? There is no directory {directory!r}: co2d publish UNIT... DIR, or in place of "
                         "DIR an option: --nickname, --sync-dest, --set")
        files = read_update(directory)
    check_update(files, settings, arguments.force)
    return files


def parse_assignment(text):
    """FILE.KEY=VALUE -> file, key, value. The value is JSON, or a text that is no JSON."""
    place, equals, value = text.partition("=")
    file, _, key = place.rpartition(".")
    if not file or not equals:
        raise Failed(f"--set {text}: write FILE.KEY=VALUE, as in ou-comm-config.send_chunk_size=2048")
    with suppress(ValueError):
        value = json.loads(value)
    return file.lower().removesuffix(".json") + ".json", key, value


def _warn_of_silence(urls):
    """Tell where no station answers at a URL that units are sent to: a refusal there would cut them off."""
    import ssl
    from urllib import request
    anyone = ssl._create_unverified_context()                   # units verify no certificate
    for url in urls:
        try:
            request.urlopen(url + "/", timeout=5, context=anyone).close()
        except Exception as error:                              # whatever is there, it is no station
            warn(f"no station answers at {url}: {error}")


class Publishing:
    """One call of `co2d publish`, with the options `arguments` (of `publish_parser`)."""

    def __init__(self, settings, arguments):
        self.settings = settings
        self.data_dir = settings.data_dir
        self.arguments = arguments
        self.now = time.time()
        directories = [directory for _, directory in _logs(settings, FETCHES_FOLDER)]
        self.courses = read_courses(*directories)               # how far units are with their updates
        self.runs = read_runs(settings)

    def units(self):
        """The units that the command line names: by id, the end of an id, nickname, site, or all."""
        called = self._known_units()
        units = []
        if self.arguments.all:
            units += sorted(set().union(*called.values()))
        if self.arguments.site:
            units += self._units_at(self.arguments.site)
        for name in self.arguments.names:
            units += importer.find_names("unit", called, name)
        if not units:
            raise Failed("for which units? Name them, or --all, or --site SITE")
        return list(dict.fromkeys(units))

    def _known_units(self):
        """Hardware id, with and without its prefix, or nickname -> the units called so. A ping is enough."""
        _, folders, _ = next(os.walk(self.data_dir))
        called = {}
        for unit in {*folders, *self.runs}:
            is_link = os.path.islink(join(self.data_dir, unit))         # it takes nothing
            if unit.startswith(UNIT_PREFIX) and SEGMENT.match(unit) and not is_link:
                called[unit] = called[unit.removeprefix(UNIT_PREFIX)] = {unit}
        for unit, runs in self.runs.items():
            if unit in called:
                called.setdefault(runs[-1].nickname, set()).add(unit)
        return called

    def _units_at(self, site):
        with importer.open_db(self.settings.db) as db:
            stays = importer.deployments(db)
        there = [stay for stay in stays if stay.site == site]
        if not there:
            raise importer.unknown("site", site, filter(None, [stay.site for stay in stays]))
        units = [stay.unit_id for stay in there if stay.since <= self.now < stay.until]
        if not units:
            raise Failed(f"no unit stands at {site} today")
        return units

    def _latest_name(self, unit):
        """The last name, in byte order, of the updates that the unit was offered, here or at a server known here.

        What it has on its card under one of them, it will never fetch again.
        """
        names = [name for taker, name in self.courses if taker == unit]
        folder = join(self.data_dir, unit, UPDATES_FOLDER)
        if isdir(folder):
            names += [re.sub(r"\A\.withdrawn-(.+)-[0-9]+\Z", r"\1", name) for name in os.listdir(folder)]
        return max(names, default=UPDATE_PREFIX)

    def publish(self):
        """Check everything, then offer the update to one unit after the other."""
        files = files_to_publish(self.arguments, self.settings)     # as who calls: DIR may be closed to others
        patch = patch_of(files, files.get)
        units = self.units()
        if "site_code" in patch and len(units) > 1:
            raise Failed(f"a nickname is for one unit, not for {len(units)}")
        _warn_of_silence(as_list(patch.get("sync_dest", [])))
        latest = {unit: self._latest_name(unit) for unit in units}
        name = self.arguments.name or default_name(max(latest.values()), self.now)
        for unit in units:
            is_well = SEGMENT.match(name) and name.startswith(UPDATE_PREFIX)
            if not is_well or name <= latest[unit]:
                raise Failed(f"{unit}: the name {name} must start with {UPDATE_PREFIX} and sort after "
                             f"{latest[unit]}: give one with --name")
        become_daemon_user(self.settings)
        for unit in units:
            before = visible_updates(self.data_dir, unit)
            if self.arguments.dry_run:
                print(f"{unit}: {name} would be published, {len(files)} files")
            else:
                self._install(unit, name, files)
                print(f"{unit}: {name} published, {len(files)} files")
            self._warn_of_unfetched(unit, before, " yet, and now will not: a unit takes the last update only")

    def _install(self, unit, name, files):
        """Stage under a hidden name, sync, publish with one rename; no update stays behind when that fails."""
        place = [unit, UPDATES_FOLDER]
        try:
            with seqfile.open_directory(self.data_dir, place, create=True, settle=True) as updates:
                seqfile.publish_tree(updates, name, files)
        except OSError as error:
            raise Failed(f"{unit}: {error}")

    def _warn_of_unfetched(self, unit, updates, what):
        """Warn when a unit has not fetched the last of some updates, and say what that means."""
        for name in updates[-1:]:
            if (unit, name) not in self.courses:
                warn(f"{unit} has not fetched {name}{what}")

    def withdraw(self, name):
        """Hide an update from the units that it is offered to."""
        units = self.units()
        having = [unit for unit in units if name in visible_updates(self.data_dir, unit)]
        if not having:
            raise Failed(f"there is no update {name} to withdraw from " + ", ".join(units))
        become_daemon_user(self.settings)
        for unit in having:
            others = visible_updates(self.data_dir, unit)
            others.remove(name)
            if self.arguments.dry_run:
                print(f"{unit}: {name} would be withdrawn")
            else:
                self._hide(unit, name)
                print(f"{unit}: {name} withdrawn")
            if (unit, name) in self.courses:
                warn(f"{unit} has fetched {name} before")
            self._warn_of_unfetched(unit, others, ", and will take that now: withdraw it too if it is not wanted")

    def _hide(self, unit, name):
        hidden = f".withdrawn-{name}-{self.now:.0f}"
        with seqfile.open_directory(self.data_dir, [unit, UPDATES_FOLDER]) as updates:
            os.rename(name, hidden, src_dir_fd=updates, dst_dir_fd=updates)
            os.fsync(updates)

    def report(self, unit):
        """A line for each update, with tabs: when it was published, how much was fetched, what is seen of it since."""
        lines = []
        until = "9"                     # behind every UTC time; then: when the unit had the next one, which undoes it
        for name in reversed(visible_updates(self.data_dir, unit)):
            course = self.courses[unit, name]
            try:
                columns = self._columns(unit, name, course, until)
            except OSError as why:
                columns = [f"not listed for the unit: {why}"]
            lines.append("\t".join([unit, name, *columns]))
            until = course.had_at or until
        return lines[::-1]

    def _columns(self, unit, name, course, until):
        paths = files_of_update(self.data_dir, unit, name)
        place = join(self.data_dir, unit, UPDATES_FOLDER, name)
        published = seqfile.utc(os.stat(place).st_mtime)
        columns = ["published " + published, _progress(course, paths, self.now)]
        if course.had_at:
            runs = self.runs.get(unit, [])
            since = [run for run in runs if course.had_at < run.last and run.first < until]
            patch = patch_of(paths, partial(read_regular, place))
            columns.append(_effect(patch, since))
        return columns


def publish_parser():
    """Options of `co2d publish`."""
    keys = ""
    for key in CONFIGURATION:
        place = key.file.replace("json", key.name)
        keys += f"  {place:38} {key.help}\n"
    parser = command_parser("publish", "Publish an update for units to take.", """\
  co2d publish co2unit-30aea42a50bc new-firmware/       flash/ and conf-patch/ in it; checked, then offered
  co2d publish --all new-firmware/ --dry-run            check only
  co2d publish 50bc --nickname varanger-04
  co2d publish --all --sync-dest http://new-host:8080
  co2d publish --site vj_re_sn_1 --set ou-comm-config.send_chunk_size=2048
  co2d publish --list

what the firmware reads (--set):
""" + keys)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="UNIT... DIR",
        help="hardware ids, ends of them (4 letters or more) or nicknames; then the directory with flash/ and "
             "conf-patch/")
    add_options(parser, """
--all        -      for every unit there is
--site       SITE  for the unit that is deployed at this site
--name       NAME   name of the update (default: update-DATEzTIME)
--nickname   NAME   no DIR: give the unit this nickname
--sync-dest  URL...  no DIR: let the units report to this server (repeatable)
--set        FILE.KEY=VALUE...  no DIR: set a key of the configuration (repeatable)
--force      -      publish keys and files, too, that no firmware reads
--withdraw   NAME   no DIR: take an update back from units that have not fetched it
--list       -      show what is published, what was fetched, and what is seen of it
--dry-run    -      check only
""")
    return parser


def publish(settings, arguments):
    """`co2d publish`."""
    if not isdir(settings.data_dir):
        raise Failed(f"there is no data directory {settings.data_dir}")
    publishing = Publishing(settings, arguments)
    if arguments.list:
        arguments.all |= not (arguments.names or arguments.site)
        for unit in publishing.units():
            for line in publishing.report(unit):
                print(line)
    elif arguments.withdraw:
        publishing.withdraw(arguments.withdraw)
    else:
        publishing.publish()


# -- backup -----------------------------------------------------------------------------------------------------------
# The text is the truth and only grows, so a copy of a running station is consistent: each file is the beginning of
# itself. Bytes that a unit replaces are set aside first, so the second pass finds what the first one missed.

def _places(settings, backup_dir):
    """Pairs: a directory of the station, and the same in the backup."""
    yield settings.data_dir, join(backup_dir, "remote_data")
    for folder in FOLDERS:
        own = join(settings.var_dir, folder)
        yield own, join(backup_dir, "var", folder)


def copy_trees(pairs):
    """Copy what differs from a directory to another, if the first exists. What only the second has stays there.

    Gives the files that could not be copied, which keep no other back: [(file, copy, why)].
    """
    failed = []
    for source, target in pairs:
        if isdir(source):
            try:
                shutil.copytree(source, target, copy_function=_copy_changed, ignore=_passed_over, dirs_exist_ok=True)
            except shutil.Error as error:
                failed += error.args[0]
    return failed


def _copy_changed(file, copy):
    """Copy a file as a whole, if it differs. The copy gets the time of the file before: it may grow at any moment."""
    with suppress(FileNotFoundError):                           # it was there for a moment only
        status = os.stat(file)
        if not exists(copy) or not filecmp.cmp(file, copy):
            part = copy + ".part"
            shutil.copy2(file, part)
            os.utime(part, ns=(status.st_atime_ns, status.st_mtime_ns))
            os.replace(part, copy)


def _passed_over(folder, names):
    """Names that are not copied: links, which nothing of ours follows, and updates that are being published."""
    links = [name for name in names if os.path.islink(join(folder, name))]
    return links + fnmatch.filter(names, f".{UPDATE_PREFIX}*")


def _all_below(directories):
    """Paths of these directories and of all that is below them."""
    for directory in directories:
        for where, _, names in os.walk(directory):
            yield where
            for name in names:
                yield join(where, name)


def _tell_copied(done, directories, target, failed):
    files = [path for path in _all_below(directories) if os.path.isfile(path)]
    line = f"{done}: {len(files)} files in {target}"
    if files:
        newest = max(map(os.path.getmtime, files))
        line += f", the newest of {seqfile.utc(newest)} UTC"
    print(line)
    if failed:
        _, _, why = failed[0]
        raise Failed(f"{len(failed)} files could not be copied: {why}")


def backup_parser():
    """Options of `co2d backup`."""
    return command_parser(
        "backup", "Copy text, updates and configuration to a directory, also while the daemon "
        "runs. The next time only what has changed is copied.", """\
  co2d backup /mnt/backup
  co2d backup /mnt/backup && rsync -a /mnt/backup/ elsewhere:co2d/
""", "where to; it is made if need be")


def backup(settings, arguments):
    """`co2d backup`."""
    target = realpath(arguments.directory)
    for needed in (settings.data_dir, join(settings.var_dir, PINGS_FOLDER)):
        if not isdir(needed):
            raise Failed(f"there is no directory {needed}: is this the configuration of the station?")
        if (target + "/").startswith(realpath(needed) + "/"):
            raise Failed(f"{target} lies within {needed}")
    copy_trees(_places(settings, target))
    failed = copy_trees(_places(settings, target))
    config = importer.config_file(arguments.config)
    if config:
        shutil.copy2(config, join(target, "co2d.conf"))
    os.sync()
    _tell_copied("backup", [target], target, failed)


def restore_parser():
    """Options of `co2d restore`."""
    return command_parser(
        "restore", "Bring a backup back into the directories of the configuration, which are to be "
        "empty. The database is made anew from the text.", """\
  sudo systemctl stop co2d.socket co2d.service && sudo co2d restore /mnt/backup
  co2d restore /mnt/backup --data-dir /srv/co2d/remote_data --var-dir /srv/co2d/var
""", "a directory that co2d backup has written")


def restore(settings, arguments):
    """`co2d restore`."""
    if not isdir(join(arguments.directory, "remote_data")):
        raise Failed(f"{arguments.directory} is no backup: there is no remote_data in it")
    places = [place for place, _ in _places(settings, "")]
    for path in _all_below(places):
        is_mark = os.path.basename(path).startswith(".")        # that the daemon has left
        if os.path.isfile(path) and not is_mark:
            raise Failed(f"there are data already, as {path}: a backup is only brought back into an empty station")
    seqfile.make_directory(settings.data_dir)
    claim(settings.data_dir)                                    # until this process ends
    owner = os.stat(settings.data_dir)
    failed = copy_trees((copy, place) for place, copy in _places(settings, arguments.directory))
    if os.geteuid() == 0:
        for path in _all_below(places):
            os.chown(path, owner.st_uid, owner.st_gid)
    os.sync()
    _tell_copied("restored", places, settings.data_dir, failed)


# -- connections ------------------------------------------------------------------------------------------------------
# A connection is an automaton: what it does in a state and where it goes from there is a row of STATES. No step waits.
# A client that has to do something first is *parked*: it holds a descriptor, and no thread.

LAST_WORDS = 2.0                        # seconds for a reply after the deadline, and for what comes after a refusal
PIECE = 32 << 10                        # bytes that are read at once, from a client or from a file that is sent
CLIENT_FAULTS = (501, 505)              # what a client asked for, not what went wrong here
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
TLS_WANTS = {2: READ, 3: WRITE}         # errno of ssl.SSLWantReadError and ssl.SSLWantWriteError
_RESET = struct.pack("@ii", 1, 0)       # struct linger (SO_LINGER in socket(7))
_IN_ORDER = struct.pack("@ii", 0, 0)


class Gone(Exception):
    """The client went away, was too slow, or was dropped."""


class Connection:
    """One client, from accept to close. One thread at a time has it: a worker, a lane's, or the one where it is parked.

    The listener is set to reset connections that are closed, and the kernel hands this on to each of them (`Server`). A
    unit ignores Content-Length: an orderly close in the middle of a reply would be the end of the file for it, and half
    an update would reach its flash. So whoever closes the socket resets the connection, the kernel after a SIGKILL
    included, until the whole reply is handed over.
    """

    def __init__(self, sock, peer, station, tls):
        """`sock`: as it was accepted; `peer`: the address; `tls`: an ssl.SSLContext, or None."""
        self.sock = sock                # from the handshake on, an ssl.SSLSocket
        self.peer = peer
        self.station = station
        self.tls = tls
        self.flags = socket.MSG_DONTWAIT        # saves a system call; not with TLS
        self.is_encrypted = False
        self.event = READ               # what the client has to make possible
        self.accepted = self.heard = time.monotonic()           # heard: when the client last sent or took a byte
        self.reader = RequestReader(station.settings.max_body)
        self.request = None             # a Request; None: not yet complete
        self.response = None            # a Response; None: not yet found
        self.is_slow = False            # the answer takes long, and not for the disk
        self.is_complete = False        # the kernel has taken the whole reply
        self._unsent = memoryview(b"")
        self._left = 0                  # bytes of the file that is sent, without those in `_unsent`
        self.enter("tls" if tls else "head")

    def enter(self, state):
        """Go to a state. Its time begins now."""
        self.state = state
        self.since = time.monotonic()

    def deadline(self):
        """When the state is to be over, as time.monotonic()."""
        row = STATES[self.state]
        allowed = getattr(self.station.settings, row.limit, 0.0)
        if self.response:
            allowed += self.response.extra_seconds
        return max(self.accepted + allowed, self.since + row.at_least)

    def advance(self):
        """Go on until the client has to do something, or the answer is to be found, or all is over."""
        while self.state not in (ANSWER, CLOSED):
            row = STATES[self.state]
            try:
                if not row.step(self):
                    return
                self.enter(row.then)
            except Refused as refused:
                self.refuse(refused)

    def refuse(self, refused):
        """Answer a request that is not complete."""
        state = STATES[self.state].refused
        if state == CLOSED:
            raise Gone(refused.reason)
        self.station.count("co2d_requests_total", route="malformed", status=refused.status)
        self.request = self.reader.request
        self.reply(refused.response(), state)

    def reply(self, response, state="reply"):
        """Begin to send a response, in the state that is given."""
        self.response = response
        size = os.fstat(response.file.fileno()).st_size if response.file else len(response.body)
        data = encode_head(response, size, self.station.clock())
        if not self.request or self.request.method != "HEAD":
            data += response.body
            self._left = size if response.file else 0
        self._unsent = memoryview(data)
        self.enter(state)

    def _attempt(self, event, call, *arguments):
        """The result of a call on the socket; None if it would have to wait, for `self.event`."""
        try:
            result = call(*arguments)
        except OSError as error:
            self.event = {errno.EAGAIN: event, **TLS_WANTS}.get(error.errno or 0)
            if not self.event:
                raise
            return None
        self.heard = time.monotonic()
        return result

    # The steps: each returns whether the state has all that it needs.

    def shake_hands(self):
        """Begin TLS if the client does; plain HTTP goes on if it may."""
        if not self.is_encrypted:
            first = self._attempt(READ, self.sock.recv, 1, socket.MSG_PEEK | self.flags)
            if first and first != b"\x16" and self.station.settings.tls_only:
                raise Refused(400, "this port speaks TLS")
            if first != b"\x16":
                return first is not None
            self.sock.setblocking(False)
            self.flags = 0
            self.sock = self.tls.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
            self.is_encrypted = True
        return self._attempt(READ, lambda: [self.sock.do_handshake()])

    def read_head(self):
        """Read the head of the request."""
        while not self.reader.request:
            if not self._read():
                return False
        return True

    def read_body(self):
        """Read what follows the head."""
        while not self.reader.is_complete:
            if not self._read():
                return False
        return True

    def _read(self):
        """The bytes that have come, which the reader has taken in; None when the client is to send more."""
        data = self._attempt(READ, self.sock.recv, PIECE, self.flags)
        if data == b"":
            raise Gone("closed by the client")
        if data:
            self.reader.feed(data)
        return data

    def write(self):
        """Hand over what is left of the reply; of a file one piece, then others have their turn."""
        if self._left and not self._unsent:
            piece = self.response.file.read(min(self._left, PIECE))     # all slow readers must not take its memory
            if not piece:
                raise Gone("the file has become shorter")
            self._unsent = memoryview(piece)
            self._left -= len(piece)
        while self._unsent:
            count = self._attempt(WRITE, self.sock.send, self._unsent, self.flags)
            if count is None:
                return False
            self._unsent = self._unsent[count:]
        if self._left:
            self.event = WRITE
            return False
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _IN_ORDER)
        self.is_complete = True
        return True

    def write_refusal(self):
        """Hand over the refusal, and say that nothing follows."""
        if not self.write():
            return False
        self._say_goodbye()
        with suppress(OSError):                                 # the client may have gone
            self.sock.shutdown(socket.SHUT_WR)
        return True

    def drain(self):
        """Read away what still comes: closing before would take the refusal back from the client."""
        return self._attempt(READ, self.sock.recv, PIECE, self.flags) == b""

    def is_gone(self):
        """Whether the client has closed its end while it waits: who has sent a request has no more to say."""
        poll = select.poll()                                    # select() takes no descriptors above 1023
        poll.register(self.sock, select.POLLIN)
        return poll.poll(0)

    def _say_goodbye(self):
        """Over TLS, say that nothing follows: else the client could take the reply for cut off."""
        if self.is_encrypted:
            with suppress(OSError, ValueError):                 # said before, or nobody there to hear it
                self.sock.unwrap()

    def close(self):
        """End the connection."""
        if self.is_complete:
            self._say_goodbye()
        self.sock.close()
        if self.response and self.response.file:
            self.response.file.close()

    def log(self):
        """One line about a reply that is complete, and the bytes for /metrics."""
        settings = self.station.settings
        received = len(self.request.body) if self.request else 0
        self.station.count("co2d_received_bytes_total", received)
        status = self.response.status
        level = logging.ERROR if status >= 500 and status not in CLIENT_FAULTS else logging.INFO
        if level > logging.INFO or not settings.quiet:
            line = request_for_log(settings.secret, self.request) if self.request else "-"
            took = (self.since - self.accepted) * 1000
            log.log(level, f'{self.peer} "{line}" {status} {received} {took:.1f}ms {self.response.note}')


class State(NamedTuple):
    """A row of STATES. `step` is called until it has all; the next state is `then`, or `refused` if the request is
    refused or late.
    """

    step: Callable                      # step(connection): true when it has all
    then: str
    refused: str
    limit: str = ""                     # setting: seconds from accept
    at_least: float = 0.0               # seconds from the beginning of the state
    needs_worker: bool = False          # it can take the disk, or much computing


ANSWER = "answer"                       # the request is complete, and what comes next is up to us
CLOSED = "closed"
STATES = {
    "tls": State(Connection.shake_hands, "head", "refusal", "head_seconds", needs_worker=True),
    "head": State(Connection.read_head, "body", "refusal", "head_seconds"),
    "body": State(Connection.read_body, ANSWER, "refusal", "request_seconds"),
    # ANSWER and CLOSED have no row: `Connection.advance` stops there, and `Server._serve` goes on.
    "reply": State(Connection.write, CLOSED, CLOSED, "request_seconds", LAST_WORDS, needs_worker=True),
    "refusal": State(Connection.write_refusal, "linger", CLOSED, "request_seconds", LAST_WORDS),
    "linger": State(Connection.drain, CLOSED, CLOSED, at_least=LAST_WORDS)
}


# -- the server -------------------------------------------------------------------------------------------------------

WORKERS = 8                             # threads that serve; one that waits for the disk can do nothing else
LANES = ("people", "exports")           # each has a thread that answers what can take long
MOST_WAITING = 16                       # requests in a lane
LISTEN_QUEUE = 1024                     # clients that wait in the kernel until a worker has time
SEND_BUFFER = 64 << 10                  # bytes in the kernel for each slow reader: all must not take its memory
MOST_DESCRIPTORS = 65536                # half of them for connections, half for files, directories and the database
TICK = 0.5                              # seconds after which a thread that waits looks at the clock
CROWDED_TICK = 0.02                     # the same while descriptors are lacking
DISK_PATIENCE = 10.0                    # seconds that the answer to a unit can take before it is a problem
STOP_PATIENCE = 5.0                     # seconds that a stop leaves to clients that are to do something
# When descriptors run out and clients wait, connections are dropped in this order: whose, and after how many seconds
# without a byte. A unit that is refused loses a day, so those that are known here come last.
DROP_ORDER = {"no head": 2.0, "page": 0.0, "unknown unit": 5.0, "unit": 30.0}


class Server:
    """Workers that serve, a thread where connections are parked, and one for each of LANES.

    Half of the workers wait in accept, and each takes a connection as far as it goes: that of a unit that sends its
    request at once, to the end. The others take those that were parked, as soon as there is something to do. The rest
    of a crowd waits in the kernel's queue. A status page takes long, so a thread of its own draws them, one after the
    other: all together would take all memory and all workers. An export takes longer, so it has another one.

    `_open` holds all connections, `_parked` those of which the client has to do something first. What is written to
    `_open` are single operations on a set, which Python makes whole.
    """

    def __init__(self, station, listener=None):
        """`listener`: a socket that systemd has made, or None."""
        self.station = station
        self.tls = _tls_context(station.settings)
        self.is_inherited = listener is not None
        self.socket = listener or _listen(station.settings)
        self.port = self.socket.getsockname()[1]
        # Accepted sockets inherit the options of the listener, which saves system calls for each.
        tick = struct.pack("@ll", 0, int(TICK * 1e6))           # struct timeval
        self.socket.setblocking(True)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = descriptors // 2                           # connections
        self._stopped_at = float("inf")                         # as time.monotonic()
        self._is_accepting = True
        self._is_over = False
        self._open = set()                                      # of Connection
        self._lock = threading.Lock()                           # guards the next two together
        self._parked = set()                                    # of Connection
        self._selector = selectors.DefaultSelector()
        self._ready = queue.SimpleQueue()                       # of Connection; None ends a worker
        self._lanes = {lane: queue.SimpleQueue() for lane in LANES}     # the same
        self._acceptors = []                                    # threads
        station.connections = self._open.__len__

    def start(self):
        """Begin to serve."""
        threading.stack_size(512 * 1024)
        _started(self._watch_parked, "parked")
        for lane in LANES:
            _started(partial(self._answer_lane, lane), lane)
        for _ in range(WORKERS // 2):
            self._acceptors.append(_started(self._accept_new, "accept"))
            _started(self._resume_ready, "resume")

    # The workers

    def _accept_new(self):
        """Take new connections."""
        while self._is_accepting:
            if self._is_full():
                time.sleep(CROWDED_TICK)
                continue
            try:
                sock, address = self.socket.accept()            # the kernel wakes one thread for one connection
            except OSError:                                     # nobody came within TICK, or no descriptor is left
                time.sleep(CROWDED_TICK)
                continue
            connection = Connection(sock, address[0], self.station, self.tls)
            self._open.add(connection)
            self._serve(connection)

    def _resume_ready(self):
        """Go on with those that were parked."""
        for connection in iter(self._ready.get, None):
            self._serve(connection)

    def _serve(self, connection):
        """Go on until the client has to do something, or another thread goes on, or all is over."""
        while self._advance(connection):
            if connection.state == CLOSED:
                self._end(connection)
                return
            if not self._answer(connection):
                return
        self._park(connection)

    def _advance(self, connection):
        """Go on as far as the client lets us: to the answer or the end; False when it has to do something before."""
        try:
            connection.advance()
        except (OSError, Gone) as error:
            if not self.station.settings.quiet:
                log.info(f"{connection.peer} went away in its {connection.state}: {error}")
            connection.enter(CLOSED)
        except Exception as error:
            self._fail(connection, error)
        return connection.state in (ANSWER, CLOSED)

    def _fail(self, connection, error):
        """End a connection after a mistake in the program, and go on with the thread."""
        log.error(f"{connection.peer}: {error!r} at {importer.place_of(error)}")
        connection.enter(CLOSED)

    def _answer(self, connection, lane=""):
        """Find the answer; False when another thread goes on with the connection."""
        try:
            connection.request = connection.reader.complete_request(connection.peer, self.station.clock())
            request = connection.request._replace(is_gone=connection.is_gone)
            response = respond(self.station, request, lane)
            if isinstance(response, str):
                queued = self._lanes[response]
                if queued.qsize() < MOST_WAITING:
                    connection.is_slow = True
                    queued.put(connection)
                    return False
                response = Refused(503, "too many requests of this kind at once").response()
            if response.after:
                response.after(partial(self._reply, connection, response))
                return False
            connection.reply(response)
        except Exception as error:
            self._fail(connection, error)
        return True

    def _reply(self, connection, response):
        """Send what had to wait for the disk."""
        connection.reply(response)
        self._serve(connection)

    def _answer_lane(self, lane):
        """Answer what can take long, one after the other."""
        for connection in iter(self._lanes[lane].get, None):
            self._answer(connection, lane)
            self._serve(connection)

    def _end(self, connection):
        """Close a connection; note before that the reply was sent, and log it after that."""
        if connection.is_complete and connection.response.sent:
            connection.response.sent()
        self._open.remove(connection)
        connection.close()
        if connection.is_complete:
            connection.log()

    # Where connections are parked

    def _park(self, connection):
        """Leave a connection until its client has done something."""
        with self._lock:
            self._parked.add(connection)
            self._selector.register(connection.sock, connection.event, connection)

    def _unpark(self, connection):
        """Go on with a connection, or end it."""
        with self._lock:
            self._parked.remove(connection)
            self._selector.unregister(connection.sock)
        if connection.state == CLOSED:
            self._end(connection)
        else:
            self._ready.put(connection)

    def _watch_parked(self):
        """Read what parked clients send, keep their deadlines, and hand over to the workers what they have to do."""
        looked_at = 0.0
        while not self._is_over:
            tick = CROWDED_TICK if self._is_full() else TICK / 2
            for key, _ in self._selector.select(tick):
                connection, event = key.data, key.data.event
                needs_worker = STATES[connection.state].needs_worker
                if needs_worker or self._advance(connection) or connection.event != event:
                    self._unpark(connection)
            now = time.monotonic()
            if now - looked_at >= tick:
                looked_at = now
                self._look_after(now)

    def _look_after(self, now):
        """Keep the deadlines, make room when there is none, and tell of a disk that hangs."""
        is_stopped = now > self._stopped_at + STOP_PATIENCE
        for connection in list(self._parked):
            if now > connection.deadline():
                try:
                    connection.refuse(Refused(408, f"{connection.state} took too long"))
                    self._unpark(connection)
                except Gone as gone:
                    self._drop(connection, str(gone))
            elif is_stopped and (connection.state != "reply" or self._kind_of(connection) != "unit"):
                self._drop(connection, "the daemon stops")
        if self._is_full() and self._is_waited_for():
            self._make_room(now)
        self._tell_of_hanging(now)

    def _tell_of_hanging(self, now):
        """Workers that wait for the disk can serve nobody else. All that looks at the disk may hang, so log it here."""
        health = self.station.health
        late = now - DISK_PATIENCE
        hanging = sum(c.state == ANSWER and c.since < late and not c.is_slow for c in list(self._open))
        text = ""
        if hanging:
            text = (f"{hanging} requests have waited for the disk for more than {DISK_PATIENCE:g} s, and others wait "
                    f"for them: see with dmesg whether the disk of {self.station.settings.data_dir} fails")
            if "hanging" not in health.reported:
                log.error(text)
        health.report("hanging", CRITICAL, text)

    def _drop(self, connection, reason):
        """End a parked connection."""
        if not self.station.settings.quiet:
            log.info(f"{connection.peer} dropped in its {connection.state}: {reason}")
        connection.enter(CLOSED)
        self._unpark(connection)

    def _make_room(self, now):
        """Drop some of those that are the first in DROP_ORDER, the ones that have been silent the longest."""
        parked = sorted(self._parked, key=lambda connection: connection.heard)
        for kind, patience in DROP_ORDER.items():
            silent = [c for c in parked if now - c.heard >= patience and self._kind_of(c) == kind]
            for connection in silent[:1 + self._most // 16]:
                self.station.count("co2d_dropped_connections_total", phase=connection.state)
                self._drop(connection, "others need the descriptor")
            if silent:
                return

    def _kind_of(self, connection):
        """A key of DROP_ORDER."""
        request = connection.reader.request
        if request is None or connection.state in ("refusal", "linger"):
            return "no head"
        unit = unit_of(self.station.settings.secret, request)
        if not unit:
            return "page"
        return "unit" if isdir(self.station.data(unit)) else "unknown unit"

    def _is_full(self):
        return len(self._open) >= self._most

    def _is_waited_for(self):
        """Whether clients wait in the kernel's queue."""
        with suppress(ValueError, OSError):                     # the socket is closed
            waiting, _, _ = select.select([self.socket], [], [], 0)
            return bool(waiting)
        return False

    def stop(self):
        """Finish running requests and those that wait in the kernel's queue, then close.

        The queue of an inherited socket is left to the next daemon.
        """
        self._stopped_at = time.monotonic()
        while not self.is_inherited and self._is_waited_for() and time.monotonic() < self._stopped_at + STOP_PATIENCE:
            time.sleep(CROWDED_TICK)
        self._is_accepting = False
        allowed = self.station.settings.request_seconds
        for thread in self._acceptors:
            thread.join(allowed)
        self.socket.close()
        while self._open and time.monotonic() < self._stopped_at + allowed:
            time.sleep(CROWDED_TICK)
        self._is_over = True
        for waiting in [*self._lanes.values(), *[self._ready] * WORKERS]:
            waiting.put(None)


def _listen(settings):
    family = socket.AF_INET6 if ":" in settings.listen else socket.AF_INET
    return socket.create_server((settings.listen, settings.port), family=family, backlog=LISTEN_QUEUE,
                                dualstack_ipv6=settings.listen == "::")


def _tls_context(settings):
    if not settings.tls_cert:
        return None
    import ssl                                                  # brings 4 MB of OpenSSL
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2            # whatever the system allows
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None)
    except OSError as error:
        key = settings.tls_key or "in the same file"
        raise BadConfig(f"tls_cert {settings.tls_cert}, tls_key {key}: {error}")
    return context


# -- the import thread ------------------------------------------------------------------------------------------------


class Importing:
    """Imports what requests have written, moments later, and now and then looks for what came in by other ways."""

    def __init__(self, station):
        self.station = station
        self.stopping = threading.Event()
        self._paths = set()                                     # of files that are to be imported
        self._kept = importer.KeptOpen(station.settings.db)
        self._scanned = float("-inf")                           # time.monotonic() when all files were last looked at

    def run(self):
        """Import until `stop`. After an import of t seconds, pause 4 t: uploads have priority."""
        while not self.stopping.is_set():
            began = time.monotonic()
            is_done = self._import_what_is_due(began)
            pause = PAUSE * (time.monotonic() - began)
            if not is_done:
                pause = max(pause, RETRY)
            if self.stopping.wait(min(pause, LONGEST_PAUSE)):
                break                                           # `take_changed` may have cleared what `stop` has set
            if is_done:
                self.station.something_changed.wait(self.station.settings.import_scan)
                self.stopping.wait(self.station.settings.import_delay)
        self._kept.close()

    def _import_what_is_due(self, now):
        """Import what has changed, now and then all; False when that failed, and is to be tried again."""
        self._paths |= self.station.take_changed()
        has_expired = now - self._scanned > self.station.settings.import_scan
        if has_expired or "database" in self.station.health.reported:
            if not self._import(None):
                return False
            self._scanned = time.monotonic()
        elif self._paths and not self._import(self._paths):
            return False
        self._paths.clear()
        return True

    def _import(self, paths):
        station = self.station
        try:
            if "database" in station.health.reported and exists(station.settings.db):
                summary = importer.rebuild(station.archive)     # it is damaged, or cannot be read
            else:
                summary = importer.import_new(station.archive, paths)
            if paths is None:
                known = station.archive.data_dirs               # `missing_data` tells of these
                hidden = [f"{path} cannot be read: {why}" for path, why in summary.hidden if path not in known]
                station.health.report("folders", CRITICAL, "; ".join(hidden))
                station.health.changed.set()                    # the first import makes the database
            self._kept.renew()
            station.health.clear("import")
            return check_database(station)
        except Exception as error:                              # locked, broken, gone: uploads go on, we try again
            station.count("co2d_import_errors_total")
            remedy = importer.remedy(error, station.settings.db)
            text = f"imports fail, pages and alarms are old: {error}{remedy}"
            station.health.report("import", CRITICAL, text)
            return False

    def stop(self):
        """Import no more; a running import goes on to its end."""
        self.stopping.set()
        self.station.something_changed.set()


# -- the process ------------------------------------------------------------------------------------------------------


def under_journald():
    """Whether stderr goes to the journal (see JOURNAL_STREAM in systemd.exec(5))."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def notify(state):
    """Tell systemd, if it listens: lines of NAME=VALUE (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(re.sub("^@", "\0", address))
            sock.sendall(state.encode())


def inherited_listener():
    """The listening socket that systemd hands over, or None (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        return socket.socket(fileno=3)
    return None


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
After=network.target co2d.socket
# Without its socket, which a fault can have stopped, the daemon would leave clients waiting while it restarts.
Requires=co2d.socket
RequiresMountsFor=%(directories)s

[Service]
Type=notify
SyslogIdentifier=co2d
ExecStart=%(command)s
ExecReload=%(python)s -c "import os, signal; os.kill(${MAINPID}, signal.SIGHUP)"
Restart=on-failure
RestartSec=5
RestartPreventExitStatus=2 78
WatchdogSec=120
TimeoutStopSec=120
User=co2d
Group=co2d
UMask=0027
LimitNOFILE=65536
TasksMax=80
MemoryMax=512M
Environment=MALLOC_ARENA_MAX=2
# A directory that is missing is passed over here: the daemon itself says more about it than 226/NAMESPACE.
ReadWritePaths=%(written)s
# What follows takes away all that the daemon does not need.
AmbientCapabilities=%(capability)s
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
"""
}


def _word(path):
    """A path as systemd reads it (systemd.syntax(7)). One with a quote or a backslash in it cannot be written."""
    return shlex.quote(path).replace("%", "%%")


def _host_port(address, port):
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def systemd_unit(kind, settings, arguments):
    """The text of a systemd unit for this installation; `kind`: a key of SYSTEMD; `arguments`: of the command line."""
    directories = list(dict.fromkeys([settings.data_dir, settings.var_dir, os.path.dirname(settings.db)]))
    command = [sys.executable, realpath(__file__)]
    if arguments.config:
        command += ["--config", os.path.abspath(arguments.config)]
    has_low_port = 0 < settings.port < 1024
    is_in_home = any(path.startswith(("/home/", "/root/")) for path in [*command[:2], *directories])
    return SYSTEMD[kind] % {
        "command": " ".join(map(_word, command)).replace("$", "$$"),
        "python": _word(sys.executable),
        "directories": " ".join(map(_word, directories)),
        "written": " ".join(_word("-" + path) for path in directories),
        "listen": _host_port(settings.listen, settings.port),
        "capability": "CAP_NET_BIND_SERVICE" if has_low_port else "",
        "private_users": "no" if has_low_port else "true",
        "home": "read-only" if is_in_home else "true"
    }


def claim(directory):
    """A descriptor of a directory, which is locked as long as it is open; OSError when another daemon has the lock.

    Two daemons would write the same files, each trusting what it remembers of them.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "another co2d uses it", directory)
    except OSError as error:                                    # NFS locks no directories
        log.warning(f"{directory} cannot be locked ({error}): see that no other co2d uses it")
    return fd


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)        # they end the daemon, or have it read its settings


class Daemon:
    """The running process. The main thread does what the signals say, one after the other."""

    def __init__(self, settings, arguments):
        self.arguments = arguments
        self.station = Station(settings)
        self.claims = [claim(directory) for directory in (settings.data_dir, settings.var_dir)]
        self.server = Server(self.station, inherited_listener())
        self.importing = Importing(self.station)
        self.watching = Watching(self.station)
        self.pulse = int(os.environ.get("WATCHDOG_USEC", "0")) / 4e6    # seconds between signs of life; 0: none

    def run(self):
        """Serve until a signal ends it."""
        self.server.start()
        importing = _started(self.importing.run, "import")
        watching = _started(self.watching.run, "health")
        settings = self.station.settings
        place = _host_port(settings.listen, self.server.port)
        log.info(f"co2d {importer.__version__} listens on {place}, data in {settings.data_dir}")
        if settings.port not in (0, self.server.port):
            log.warning(f"the configuration says port {settings.port}: make install again, the socket unit names it")
        notify(f"READY=1\nSTATUS=listens on port {self.server.port}")
        if self.pulse:
            _started(self._feed_watchdog, "watchdog")
        while signal.sigwait(SIGNALS) == signal.SIGHUP:
            self.reload()
        signal.signal(signal.SIGINT, signal.SIG_DFL)            # the second Ctrl-C ends it at once
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        log.info("stopping")
        notify("STOPPING=1")
        self.server.stop()
        self.importing.stop()
        importing.join(30)
        self.watching.stop()
        watching.join(10)
        self.station.pings.close()
        self.station.fetches.log.close()
        log.info("stopped")

    def _feed_watchdog(self):
        """Tell systemd that we live, if we answer a request. No restart mends a disk that is full or fails."""
        while self.server.socket.fileno() >= 0:                 # until it is closed
            try:
                self._ask_ourselves()
                notify("WATCHDOG=1")
            except OSError as error:
                log.error(f"watchdog: no answer from ourselves: {error}")
            time.sleep(self.pulse)

    def _ask_ourselves(self):
        host, port, *_ = self.server.socket.getsockname()       # 0.0.0.0 and :: are this machine, too
        with socket.create_connection((host, port), timeout=self.pulse) as sock:
            if self.server.tls:
                import ssl                                      # it is there already
                sock = ssl._create_unverified_context().wrap_socket(sock)
            sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            sock.recv(100)

    def reload(self):
        """Read the configuration again; a bad one changes nothing."""
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        old = self.station.settings
        try:
            new = settings_of(self.arguments)
            tls = _tls_context(old)
        except (BadConfig, OSError) as error:                   # OSError: the current directory is gone
            log.error(f"reload refused, the old settings stay: {error}")
        else:
            fixed = {name: getattr(old, name) for name, setting in SETTINGS.items() if setting.change == "restart"}
            later = [name for name in fixed if getattr(new, name) != fixed[name]]
            self.station.settings = new._replace(**fixed)
            self.station.archive = self.station.settings.archive()
            if self.station.log_writer:
                self.station.log_writer.secret = new.secret
            self.server.tls = tls                               # the same files, perhaps with a renewed certificate
            told = "; only a restart changes " + ", ".join(later) if later else ""
            log.info("reloaded" + told)
        notify("READY=1")


def make_parser():
    """Options of `co2d run`; one for every setting."""
    parser = command_parser("", """\
The daemon that CO2 sensor units report to.

commands (COMMAND --help tells more):
  run       take what units send; what is done without a command
  publish   offer an update to units, or see how far they are with it
  backup    copy all that cannot be made again, also while the daemon runs
  restore   bring a backup back into an empty station
""", """\
  co2d                                  run on port 8080, with the data beside the script
  co2d --config /etc/co2d.conf --check-config
  co2d publish --all new-firmware/ --dry-run
""")
    parser.usage = "%(prog)s [COMMAND] [options]"
    add_options(parser, """
--check-config  -  check the configuration and exit
--print-config  -  print the settings in force and exit
""")
    add = parser.add_argument
    add("--print-unit", nargs="?", const="service", choices=SYSTEMD,
        help="print a systemd unit for this installation and exit (default: service)")
    for name, setting in SETTINGS.items():
        text = f"{setting.help} (default: {setting.default or 'none'})"
        add("--" + name.replace("_", "-"), metavar=setting.kind.upper(), help=text.replace("%", "%%"))
    for name in importer.GONE:
        add("--" + name.replace("_", "-"), help=argparse.SUPPRESS)
    return parser


def run(settings, arguments):
    """`co2d run`: take what units send until a signal ends it; or tell about the configuration."""
    if arguments.print_config:
        print(importer.format_config(settings), end="")
    elif arguments.print_unit:
        print(systemd_unit(arguments.print_unit, settings, arguments), end="")
    elif arguments.check_config:
        _tls_context(settings)
        print("configuration is well")
    else:
        serve_until_stopped(settings, arguments)


def serve_until_stopped(settings, arguments):
    """Set up logging, then be the daemon."""
    writer = LogWriter(sys.stderr.fileno(), under_journald())
    writer.secret = settings.secret
    log.addHandler(writer)
    log.setLevel(logging.INFO)
    logging.raiseExceptions = False                             # logging would write to stderr, and wait for a reader
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, MOST_DESCRIPTORS), most))
    try:
        daemon = Daemon(settings, arguments)
    except OSError as error:
        remedy = ""
        if error.errno in (errno.EROFS, errno.EACCES):
            remedy = "; make the directories of the configuration, give them to the service's user, and restart"
        raise Failed(f"cannot start: {error}{remedy}")
    daemon.station.log_writer = writer
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)           # in all threads to come: only `Daemon.run` takes them
    daemon.run()
    writer.finish(LAST_WORDS)


# The name of each command, what makes its parser, and what carries it out: call(settings, arguments). An exception says
# that it failed. `make_parser` has their help.
COMMANDS = {
    "run": (make_parser, run),
    "publish": (publish_parser, publish),
    "backup": (backup_parser, backup),
    "restore": (restore_parser, restore)
}


def main(argv=None):
    """Run the daemon, or one of the other commands; returns the exit status."""
    return importer.run_script("co2d", partial(run_command, sys.argv[1:] if argv is None else list(argv)))


def run_command(words):
    """Do what the words of a command line say; the exit status."""
    name = words.pop(0) if words and not words[0].startswith("-") else "run"
    if name not in COMMANDS:
        make_parser().error(f"no command is called {name!r}; there are {', '.join(COMMANDS)}")
    parser_of, call = COMMANDS[name]
    arguments = parser_of().parse_args(words)
    try:
        call(settings_of(arguments), arguments)
        return 0
    except BadConfig as error:
        importer.fail("co2d", error)
        return os.EX_CONFIG                                     # 78: systemd is told not to restart on it
    except PermissionError as error:
        raise Failed(f"{error}; call this with sudo")


if __name__ == "__main__":
    sys.exit(main())
