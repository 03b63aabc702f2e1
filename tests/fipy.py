#!/usr/bin/env python3
"""A simulated sensor unit: what the firmware in the field does, on a card that is a directory, in simulated time.

The units cannot be changed, so this model is the contract that a server is tested against: PROTOCOL.md, sections 1 and 4,
checked line by line against the firmware (co2_ou_device: co2unit_main2, co2unit_comm, co2unit_update, urequests). Where
the firmware raises an exception, so does this; where the firmware loops until its time is over, so does this.

Words used here:

    card        directory that stands for the SD card: ``data/readings/``, ``errors/``, ``updates/``, ``tmp/``, ``conf/``,
                ``var/``. What is not on it is the flash: `Unit.flash`
    wake        the unit is awake for some tasks: `sync` (every night), `power_on` (somebody switched it on)
    position    [file name, offset, size] for each pushed directory, one for all configured servers together. It is
                written to the card at the end of a communication, so a reset loses what was learned in it
    budget      `total_connect_secs_max`, in *simulated* seconds from before the first attach of a wake on. Looked at
                before each chunk, and nowhere else. A request costs `Unit.cost`, and its bytes at `Unit.rate`
    watchdog    the hardware timer resets the unit: after `watchdog` *real* seconds for connecting, sending and the head
                of the reply, after `body_watchdog` for its body; in simulated seconds, too, where there is a rate

The tasks of a wake, and what follows on each:

    install     installs the last ``update-*`` on the card, unless it is the one that was installed last. If it was
                installed: communicate. If it cannot be installed: nothing, and again at the next wake
    communicate for each server: ping, then each directory of `sync_dirs` by its way. An exception ends it with this
                server; the next is still called. After an update was taken it ends at once, with all servers.
                Then: install
    self-test   a ping to each server, with the signal of the session before

How it reads a reply: header lines up to an empty one, then everything until the server closes. Content-Length is
ignored, so a reply cut short in good order is taken as complete, and a connection kept open hangs it.

As a command, runs a fleet day by day against a running daemon:
``fipy.py --url http://127.0.0.1:8080 --units 20 --days 14``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import socket
import ssl
import sys
import tempfile
import threading
import time
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from sensors import HALF_HOUR, reading_lines

READINGS = "data/readings"
ERRORS = "errors"
UPDATES = "updates"
DIRECTORIES = (ERRORS, READINGS)        # in the order in which they are pushed
SEQUENCES = {READINGS: ("readings-", ".tsv"), ERRORS: ("errors-", ".txt")}
FILE_SIZE = 102400                      # bytes; a file this long or longer is followed by a new one
FIRST_DAY = datetime(2019, 9, 12)

ID = "ou-id.json"                       # the files of conf/, and what counts for a key that is not there
COMM = "ou-comm-config.json"
DEFAULTS: Dict[str, Dict[str, Any]] = {
    ID: {"site_code": None},            # and hw_id: the unit's own
    COMM: {"sync_dest": None, "sync_dirs": [[UPDATES, "pull_last_dir"], [ERRORS, "push_sequential"],
                                            [READINGS, "push_sequential"]],
           "send_chunk_size": 4096, "total_connect_secs_max": 300},
}
CHUNK = 4096                            # bytes, as in there
STATE = "var/ou-comm-state.json"        # on the card: positions, and the signal of the last session
INSTALLED = "var/updates-state.json"    # on the card: the path of the update that was installed last

Position = Tuple[str, int]              # name of a file, offset in bytes
Rssi = Union[int, str, None]            # dBm; None: never measured, not sent; "None": sent as that text


class Failed(Exception):
    """An exception that the firmware raises itself."""


class Watchdog(Exception):
    """The hardware timer reset the unit: ends the wake."""


# What ends a task, or the communication with a server, as `except Exception` in the firmware.
EXCEPTIONS = (Failed, OSError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError)


def text_of(error: BaseException) -> str:
    """An exception as one line."""
    return str(error) if isinstance(error, Failed) else "%s: %s" % (type(error).__name__, error)


class Request(NamedTuple):
    """One request and what came back."""

    method: str
    target: str
    status: Optional[int]               # None: no reply, or none that could be read
    ack: Any                            # the value of ack_file as it came, None without one
    sent: int                           # bytes of the body
    url: str                            # the server


class Session:
    """What happened from waking to sleeping."""

    def __init__(self) -> None:
        self.requests: List[Request] = []
        self.errors: List[str] = []     # one text for each server with which the communication failed, and each task
        self.elapsed = 0.0              # simulated seconds
        self.connected: Optional[float] = None          # when the first attach began; the budget counts from then on
        self.over_time = False          # the budget ended it
        self.finished = False           # everything on the card has been sent, as far as the unit knows

    @property
    def error(self) -> Optional[str]:
        """The first error, or None."""
        return self.errors[0] if self.errors else None

    @property
    def pushes(self) -> List[Request]:
        """The requests that carried a chunk."""
        return [request for request in self.requests if request.method == "PUT"]

    @property
    def sent(self) -> int:
        """Bytes of all chunks, repeated ones too."""
        return sum(request.sent for request in self.requests)

    def __repr__(self) -> str:
        return "<Session %d requests, %d bytes, error %s, %sfinished>" % (
            len(self.requests), self.sent, self.error, "" if self.finished else "not ")


# -- talking ----------------------------------------------------------------------------------------------------------
# As the firmware's HTTP client does it: few headers, many small writes, nothing encoded, no hurry to be compatible.


def segments(method: str, target: str, host: str, body: bytes = b"") -> List[bytes]:
    """The pieces in which a request is written: 4 without a body, 6 with one."""
    line = "%s %s HTTP/1.0\r\n" % (method, target)
    pieces = [line.encode("utf-8", "surrogateescape"), b"Host: ", host.encode() + b"\r\n"]
    if body:
        pieces.append(b"Content-Length: %d\r\n" % len(body))
    pieces.append(b"\r\n")
    return pieces + [body] if body else pieces


def split_head(raw: bytes) -> Optional[Tuple[List[bytes], bytes]]:
    """(lines of the head, body) of what has come so far; None: the head is not over."""
    lines = []
    while True:
        line, newline, raw = raw.partition(b"\n")
        if not newline:
            return None
        if line == b"\r":
            return lines, raw
        lines.append(line + newline)


def parse_reply(raw: bytes) -> Tuple[int, bytes]:
    """(status, body) of all bytes that a server sent before it closed; whatever is cut short counts as complete."""
    lines, body = split_head(raw) or (raw.splitlines(keepends=True), b"")
    words = lines[0].split(None, 2) if lines else []
    if len(words) < 2 or not words[1].isdigit():
        raise Failed("no status line in the reply: %r" % raw[:40])
    for line in lines[1:]:
        if line.startswith(b"Transfer-Encoding:") and b"chunked" in line:
            raise Failed("chunked reply")
        if line.startswith(b"Location:") and not 200 <= int(words[1]) <= 299:
            raise Failed("redirect")
    return int(words[1]), body


def load_json(body: bytes) -> Any:
    """The value in a reply. Names may be any bytes."""
    try:
        return json.loads(body.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise Failed("no JSON: %r" % body[:40]) from error


def peek_ack(body: bytes) -> Any:
    """The ack as it came, for the record only."""
    try:
        return load_json(body)["ack_file"]
    except (Failed, TypeError, KeyError):
        return None


@lru_cache(maxsize=1)
def unverified() -> ssl.SSLContext:
    """TLS that believes any certificate, as the units do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def until_closed(link: socket.socket, deadline: float, body_seconds: float = 120) -> Iterator[bytes]:
    """What arrives until the other side closes. socket.timeout when the head is not there by `deadline`, or the body
    not `body_seconds` after the head."""
    head: Optional[bytes] = b""
    while True:
        link.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = link.recv(65536)
        except ssl.SSLEOFError:         # closed without the farewell of TLS
            return
        if not data:
            return
        yield data
        if head is not None:
            head += data
            if split_head(head):
                head, deadline = None, time.monotonic() + body_seconds
        if time.monotonic() >= deadline:
            raise socket.timeout("not closed in time")


class Link:
    """The way to one server. Each request is a connection of its own."""

    def __init__(self, url: str, session: Session, unit: Unit) -> None:
        self.url, self._session, self._unit = url, session, unit
        self.base = "/ou/" + unit.conf(ID).get("hw_id", unit.unit_id)

    def request(self, method: str, path: str, body: bytes = b"") -> Tuple[int, bytes]:
        """(status, body) of the reply, recorded in the session. `path` is appended to the server's address as it is."""
        protocol, _, place, rest = (self.url + path).split("/", 3)
        if protocol not in ("http:", "https:"):
            raise ValueError("unsupported protocol " + protocol)
        host, colon, port = place.partition(":")
        self._host, self._secure = host, protocol == "https:"
        self._port = int(port) if colon else 443 if self._secure else 80
        target = "/" + rest
        status: Optional[int] = None
        reply = b""
        try:
            status, reply = parse_reply(self._exchange(segments(method, target, host, body)))
        except socket.timeout as error:
            raise Watchdog("watchdog: %s %s" % (method, target)) from error
        finally:
            self._session.requests.append(Request(method, target, status, peek_ack(reply), len(body), self.url))
            self._session.elapsed += self._unit.cost
        self._spend(len(body), self._unit.watchdog)
        self._spend(len(reply), self._unit.body_watchdog)
        return status, reply

    def _spend(self, length: int, watchdog: float) -> None:
        """The simulated time that so many bytes take."""
        if self._unit.rate:
            seconds = length / self._unit.rate
            self._session.elapsed += min(seconds, watchdog)
            if seconds > watchdog:
                raise Watchdog("watchdog: %d bytes at %g bytes/s" % (length, self._unit.rate))

    def _exchange(self, pieces: Sequence[bytes]) -> bytes:
        deadline = time.monotonic() + self._unit.watchdog
        with socket.create_connection((self._host, self._port), self._unit.watchdog) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)     # each piece becomes a segment
            with unverified().wrap_socket(plain, server_hostname=self._host) if self._secure else plain as link:
                for piece in pieces:
                    link.sendall(piece)
                return b"".join(until_closed(link, deadline, self._unit.body_watchdog))


# -- error logs ------------------------------------------------------------------------------------------------------


def error_entry(when: datetime, level: str, message: str, text: str = "", as_tuple: bool = False) -> str:
    """One entry of an error log; `as_tuple`: as older firmware wrote it."""
    date = str(when.timetuple()[:8]) if as_tuple else when.strftime("%Y-%m-%d %H:%M:%S")
    return "----- %s %-5s %s\n%s" % (date, level, message, text and text.rstrip("\n") + "\n")


# -- the card ---------------------------------------------------------------------------------------------------------


def list_names(directory: str) -> List[str]:
    """All names in a directory, in byte order; none when there is no directory."""
    return sorted(os.listdir(directory), key=os.fsencode) if os.path.isdir(directory) else []


def list_files(directory: str) -> List[str]:
    """Names of the files in a directory, in byte order."""
    return [name for name in list_names(directory) if os.path.isfile(os.path.join(directory, name))]


def write_file(path: str, data: bytes) -> None:
    """A whole file, its directories made as needed."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def read_json(path: str, defaults: Dict[str, Any]) -> Dict[str, Any]:
    """The object in a file, on top of defaults; the defaults when there is no file."""
    values = dict(defaults)
    try:
        with open(path, "rb") as file:
            values.update(json.loads(file.read().decode("utf-8", "surrogateescape")))
    except FileNotFoundError:
        pass
    return values


def write_json(path: str, values: Any) -> None:
    """The values, as a file."""
    write_file(path, json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogateescape"))


def append_file(directory: str, names: Tuple[str, str]) -> Optional[str]:
    """The name of the file that the next line goes to: the last that begins and ends like this, or the one after it.

    None: the last one is full, and what stands between is no number. The firmware loses the line then.
    """
    prefix, suffix = names
    mine = [name for name in list_names(directory) if name.startswith(prefix) and name.endswith(suffix)]
    if not mine:
        return "%s%04d%s" % (prefix, 0, suffix)
    if os.path.getsize(os.path.join(directory, mine[-1])) < FILE_SIZE:
        return mine[-1]
    between = mine[-1][len(prefix):-len(suffix)]
    return "%s%04d%s" % (prefix, int(between) + 1, suffix) if re.fullmatch(r"[0-9]+", between) else None


def append_lines(directory: str, names: Tuple[str, str], lines: Iterable[str]) -> None:
    """Append whole lines, as the firmware does, one by one."""
    os.makedirs(directory, exist_ok=True)
    lines = iter(lines)
    line = next(lines, None)
    while line is not None:
        name = append_file(directory, names)
        if name is None:
            return
        with open(os.path.join(directory, name), "ab") as file:
            while line is not None and file.tell() < FILE_SIZE:
                file.write(line.encode("utf-8", "surrogateescape"))
                line = next(lines, None)


class Push:
    """Where a unit is in a directory that it pushes."""

    def __init__(self, directory: str, saved: Sequence[Any]) -> None:
        """`saved`: name, offset and size as they were saved, or nothing."""
        os.makedirs(directory, exist_ok=True)
        self.directory, self.names = directory, list_names(directory)
        self.name, self.offset, self.size = [*saved, None, None, None][:3]
        self.go_to(self.name, self.offset)

    def go_to(self, name: Any, offset: Any) -> None:
        """To a position; to the first file when there is no such file. Whoever is at the first file already stays."""
        if name and name in self.names:
            self.name, self.offset = name, offset
            self.begin(self.names.index(name))
        else:
            self.begin(0)

    def begin(self, index: int) -> None:
        """To a file by its number; behind the last one all is done."""
        self.index = index
        if index < len(self.names):
            if self.names[index] != self.name:
                self.name, self.offset = self.names[index], 0
            path = os.path.join(self.directory, self.name)
            self.size = 0 if os.path.isdir(path) else os.path.getsize(path)        # as FAT has it

    @property
    def is_done(self) -> bool:
        """Whether there is no further file."""
        return self.index == len(self.names)

    @property
    def file_is_done(self) -> bool:
        """Whether all of this file was sent. A position beyond its end is an exception."""
        assert self.offset <= self.size, "position %d of %s, which has %d bytes" % (self.offset, self.name, self.size)
        return self.offset == self.size

    def read(self, length: int) -> bytes:
        """The next chunk."""
        with open(os.path.join(self.directory, self.name), "rb") as file:
            file.seek(self.offset)
            return file.read(len(bytearray(length)))            # an exception for what is no length

    def follow(self, reply: Any) -> None:
        """Go where the reply says, if it says so."""
        if "ack_file" in reply:
            name, offset, _ = reply["ack_file"]
            if (name, offset) != (self.name, self.offset):
                "%d" % offset                           # an exception for what is no number: the firmware logs it first
                self.go_to(name, offset)

    def to_save(self) -> List[Any]:
        """What is kept for the next session."""
        return [self.name, self.offset, self.size]


# -- the unit ---------------------------------------------------------------------------------------------------------


class Unit:
    """A unit with its card and configuration. Not for use by several threads at a time."""

    link = Link                                         # what it talks through; tests make rough ways

    def __init__(self, unit_id: str, card: str, urls: Sequence[str] = ("http://127.0.0.1:8080",),
                 nickname: Optional[str] = "varanger-03", rssi: Rssi = -97, now: datetime = FIRST_DAY,
                 period: timedelta = HALF_HOUR, cost: float = 0.7, rate: float = 0, attach: float = 0,
                 watchdog: float = 120.0, body_watchdog: float = 120.0, raw: bool = False, log: bool = False) -> None:
        """`card`: directory, made if need be. What is on it stays, its configuration too.

        `cost`, `attach`: simulated seconds of a request, and of the way into the network; `rate`: bytes in a simulated
        second (0: no time). `watchdog`, `body_watchdog`: real seconds (60 for the body in the oldest firmware).
        `raw`: newer firmware with five more columns. `log`: write sessions and failures to the error log.
        """
        self.unit_id, self.card, self.rssi = unit_id, str(card), rssi
        self.now, self.period, self.raw, self.log = now, period, raw, log
        self.cost, self.rate, self.attach = cost, rate, attach
        self.watchdog, self.body_watchdog = watchdog, body_watchdog
        self.flash: Dict[str, bytes] = {}               # path below flash/ -> bytes
        self.session = Session()                        # the last one, or the one that goes on
        for directory in DIRECTORIES:
            os.makedirs(self._path(directory), exist_ok=True)
        if not os.path.exists(self._path("conf", ID)):
            self.nickname = nickname
        if not os.path.exists(self._path("conf", COMM)):
            self.urls = [urls] if isinstance(urls, str) else list(urls)

    def _path(self, *names: str) -> str:
        return os.path.join(self.card, *names)

    # -- configuration

    def conf(self, file: str) -> Dict[str, Any]:
        """What counts: the file in conf/ on top of the defaults."""
        return read_json(self._path("conf", file), DEFAULTS.get(file, {}))

    def configure(self, file: str, **values: Any) -> None:
        """Set keys of a file in conf/, as whoever prepares the card does."""
        path = self._path("conf", file)
        write_json(path, {**read_json(path, {}), **values})

    @property
    def nickname(self) -> Optional[str]:
        """`site_code`."""
        return self.conf(ID)["site_code"]

    @nickname.setter
    def nickname(self, name: Optional[str]) -> None:
        self.configure(ID, site_code=name)

    @property
    def urls(self) -> List[str]:
        """`sync_dest`, as a list. Exception: there is none, so the unit never communicates."""
        servers = self.conf(COMM)["sync_dest"]
        if not servers:
            raise Failed("no sync destination")
        return [servers] if isinstance(servers, str) else list(servers)

    @urls.setter
    def urls(self, urls: Sequence[str]) -> None:
        self.configure(COMM, sync_dest=list(urls))

    @property
    def budget(self) -> float:
        """`total_connect_secs_max`, in simulated seconds."""
        return self.conf(COMM)["total_connect_secs_max"]

    @budget.setter
    def budget(self, seconds: float) -> None:
        self.configure(COMM, total_connect_secs_max=seconds)

    # -- what is on the card

    def files(self, directory: str = READINGS) -> Dict[str, bytes]:
        """Name -> content of the files of a directory, in byte order."""
        return {name: self.read(name, directory) for name in list_files(self._path(directory))}

    def read(self, name: str, directory: str = READINGS) -> bytes:
        """The content of one file."""
        with open(self._path(directory, name), "rb") as file:
            return file.read()

    def write(self, name: str, data: bytes, directory: str = READINGS) -> None:
        """Put a file on the card, or replace it."""
        write_file(self._path(directory, name), data)

    def measure(self, days: float = 1) -> int:
        """Append the readings of the next `days` and move the clock there. Returns how many."""
        count = int(timedelta(days=days) / self.period)
        lines = reading_lines(self.conf(ID).get("hw_id", self.unit_id), self.nickname, self.now, count, self.period, self.raw)
        append_lines(self._path(READINGS), SEQUENCES[READINGS], lines)
        self.now += count * self.period
        return count

    def log_error(self, message: str = "Uncaught exception", level: str = "EXC", text: str = "",
                  as_tuple: bool = False) -> None:
        """Append an entry to the error log, dated now; `text`: further lines, a traceback."""
        append_lines(self._path(ERRORS), SEQUENCES[ERRORS],
                     [error_entry(self.now, level, message, text, as_tuple)])

    def swap_card(self, readings: Optional[Dict[str, bytes]] = None,
                  errors: Optional[Dict[str, bytes]] = None) -> None:
        """A fresh card with the configuration of the old one, and these files if any: no state, no updates."""
        for name in os.listdir(self.card):
            if name != "conf":
                shutil.rmtree(self._path(name))
        for directory, files in ((READINGS, readings), (ERRORS, errors)):
            os.makedirs(self._path(directory))
            for name, data in (files or {}).items():
                self.write(name, data, directory)

    # -- position

    @property
    def position(self) -> Optional[Position]:
        """Where it is in its readings; None: it will begin with the first file."""
        return self.position_in(READINGS)

    def position_in(self, directory: str) -> Optional[Position]:
        """Where it is in a directory, as saved on the card."""
        saved = self._state()["sync_states"].get(directory, {}).get("ack_file", [None])
        return (saved[0], saved[1]) if saved[0] else None

    def set_position(self, directory: str, name: str, offset: int) -> None:
        """Save a position; nothing checks it until the next push."""
        state = self._state()
        state["sync_states"][directory] = {"ack_file": [name, offset, offset]}
        write_json(self._path(STATE), state)

    def _state(self) -> Dict[str, Any]:
        return read_json(self._path(STATE), {"sync_states": {}, "signal_quality": None})

    def lose_state(self) -> None:
        """The saved positions are gone; the data are not."""
        if os.path.exists(self._path(STATE)):
            os.remove(self._path(STATE))

    # -- a wake

    def sync(self) -> Session:
        """The wake of every night."""
        return self._wake(["install", "communicate"])

    def power_on(self) -> Session:
        """Somebody switches it on."""
        return self._wake(["self-test", "communicate", "install"])

    def _wake(self, tasks: List[str]) -> Session:
        self.session = Session()
        try:
            while tasks:
                tasks = self._run(tasks[0]) + tasks[1:]
        except Watchdog as reset:
            self.session.errors.append(str(reset))
            self._log_session("WARN", "CRASH RECOVERY. Running recovery procedure (attempt 1). Watchdog reset?")
        self.session.finished = self._all_sent()
        return self.session

    def _run(self, task: str) -> List[str]:
        """Do a task; the tasks that follow on it. An exception ends it."""
        try:
            if task == "self-test":
                self._self_test()
                return []
            if task == "communicate":
                self._communicate()
                return ["install"]
            return ["communicate"] if self._install() else []
        except EXCEPTIONS as error:
            self.session.errors.append("%s: %s" % (task, text_of(error)))
            return []

    def _log_session(self, level: str, message: str, text: str = "") -> None:
        if self.log:
            self.log_error(message, level, text)

    def _self_test(self) -> None:
        self._log_session("INFO", "Self-test. LTE attached: True. Signal quality %s" % self._signal())
        state = self._state()
        for url in self.urls:
            self._ping(self.link(url, self.session, self), state)

    def _communicate(self) -> None:
        servers, state = self.urls, self._state()
        if self.session.connected is None:
            self.session.connected = self.session.elapsed
        self.session.elapsed += self.attach
        state["signal_quality"] = self._signal()
        self._log_session("INFO", "Comm cycle. LTE attached: True. Signal quality %s" % self._signal())
        for url in servers:
            try:
                if self._transmit(self.link(url, self.session, self), state):
                    break
            except EXCEPTIONS as error:
                self.session.errors.append(text_of(error))
                self._log_session("EXC", "Error transmitting to " + url, text_of(error))
        write_json(self._path(STATE), state)            # a reset does not come here

    def _transmit(self, link: Link, state: Dict[str, Any]) -> bool:
        """All that there is to do with one server; whether an update was taken."""
        self._ping(link, state)
        for directory, way in self.conf(COMM)["sync_dirs"]:
            if way == "pull_last_dir":
                if self._pull(link, directory):
                    return True
            elif way == "push_sequential":
                self._push(link, directory, state["sync_states"].setdefault(directory, {}))
            else:
                raise Failed("NameError: unknown way %r" % (way,))
        return False

    # -- ping

    def _signal(self) -> Optional[Dict[str, Any]]:
        if self.rssi is None:
            return None
        raw = self.rssi if self.rssi == "None" else (int(self.rssi) + 113) // 2         # 3GPP TS 27.007, +CSQ
        return {"rssi_raw": raw, "rssi_dbm": self.rssi, "ber_raw": 99}

    def _ping(self, link: Link, state: Dict[str, Any]) -> None:
        path = "%s/alive?site_code=%s" % (link.base, self.nickname)
        if state["signal_quality"]:
            path += "&rssi_raw={rssi_raw}&rssi_dbm={rssi_dbm}&ber_raw={ber_raw}".format(**state["signal_quality"])
        status, _ = link.request("POST", path)
        if status != 200:
            raise Failed("alive: %d" % status)

    # -- updates

    def _pull(self, link: Link, directory: str) -> bool:
        """Take the last update that the server lists, if its name is not on the card. Returns whether it was."""
        listing = self._list(link, directory, False)
        if not listing:
            return False
        name = sorted(listing, key=lambda name: name.encode("utf-8", "surrogateescape"))[-1]
        place = "%s/%s" % (directory, name)
        if not name or os.path.isdir(self._inside(place)):
            return False
        for path in self._list(link, place, True):      # TypeError for a list that is not there
            target = self._inside("tmp", place, path)
            if os.path.isfile(target):                  # from an earlier try, of whatever length
                continue
            status, content = link.request("GET", "%s/%s/%s" % (link.base, place, path))
            if status != 200:
                raise Failed("update file: %d" % status)
            write_file(target, content)
        os.makedirs(self._path(directory), exist_ok=True)
        os.rename(self._inside("tmp", place), self._inside(place))
        return True

    def _list(self, link: Link, place: str, recursive: bool) -> Any:
        status, body = link.request("GET", "%s/%s?recursive=%s" % (link.base, place, recursive))
        if status not in (200, 404):
            raise Failed("updates: %d" % status)
        return load_json(body) if status == 200 else None

    def _inside(self, *names: str) -> str:
        """A path on the card. The firmware does not look where a name leads; this guards the tester's disk."""
        path = os.path.normpath(self._path(*names))
        if not path.startswith(os.path.normpath(self.card) + os.sep):
            raise Failed("a name that leads astray: %r" % (names,))
        return path

    def _install(self) -> bool:
        """Install the last update on the card, unless it was the last to be installed. Returns whether it was."""
        names = [name for name in list_names(self._path(UPDATES)) if name.startswith("update-")]
        if not names:
            return False
        update = "%s/%s" % (UPDATES, names[-1])
        if read_json(self._path(INSTALLED), {"installed": None})["installed"] == update:
            return False
        contents = os.listdir(self._path(update))       # an exception for a file
        if "flash" in contents:
            self._copy_to_flash(self._path(update, "flash"))
        if "conf-patch" in contents:
            for name in os.listdir(self._path(update, "conf-patch")):
                self._patch(self._path(update, "conf-patch", name), self._path("conf", name))
        write_json(self._path(INSTALLED), {"installed": update})
        return True

    def _copy_to_flash(self, source: str) -> None:
        """Nothing is deleted there."""
        os.listdir(source)                              # an exception for a file
        for parent, _, names in os.walk(source):
            for name in names:
                path = os.path.join(parent, name)
                with open(path, "rb") as file:
                    self.flash[os.path.relpath(path, source)] = file.read()

    def _patch(self, patch: str, target: str) -> None:
        """Merge key by key, at the top level only. What was merged before an exception stays."""
        values = read_json(target, {})
        with open(patch, "rb") as file:
            values.update(json.loads(file.read().decode("utf-8")))
        write_json(target, values)

    # -- data

    def _push(self, link: Link, directory: str, saved: Dict[str, Any]) -> None:
        settings = self.conf(COMM)
        push = Push(self._path(directory), saved.get("ack_file", []))
        try:
            while not push.is_done:
                while not push.file_is_done:
                    if self.session.elapsed - self.session.connected > settings["total_connect_secs_max"]:
                        self.session.over_time = True
                        return
                    chunk = push.read(settings["send_chunk_size"])
                    path = "%s/push-sequential/%s/%s?offset=%s" % (link.base, directory, push.name, push.offset)
                    status, body = link.request("PUT", path, chunk)
                    if status not in (200, 416):
                        raise Failed("push: %d" % status)
                    if status == 200:                   # before the body is looked at: an exception there counts as sent
                        push.offset += len(chunk)
                    push.follow(load_json(body))
                push.begin(push.index + 1)
        finally:
            saved["ack_file"] = push.to_save()

    def _all_sent(self) -> bool:
        state = self._state()["sync_states"]
        for directory in DIRECTORIES:
            try:
                push = Push(self._path(directory), state.get(directory, {}).get("ack_file", []))
                while not push.is_done:
                    if not push.file_is_done:
                        return False
                    push.begin(push.index + 1)
            except EXCEPTIONS:
                return False
        return True


# -- many units -------------------------------------------------------------------------------------------------------


class Night(NamedTuple):
    """What a fleet did in one night."""
    sessions: List[Session]             # in the order of the units
    seconds: float                      # real time

    @property
    def requests(self) -> int:
        """Requests of all units."""
        return sum(len(session.requests) for session in self.sessions)

    @property
    def chunks(self) -> int:
        """Chunks of all units."""
        return sum(len(session.pushes) for session in self.sessions)

    @property
    def sent(self) -> int:
        """Bytes of all chunks."""
        return sum(session.sent for session in self.sessions)

    @property
    def errors(self) -> List[str]:
        """What went wrong, for all units."""
        return [error for session in self.sessions for error in session.errors]


def one_night(units: Sequence[Unit], threads: Optional[int] = None) -> Night:
    """All units talk once, `threads` of them at the same time (default: all of them)."""
    sessions: List[Session] = [Session() for _ in units]
    waiting = iter(range(len(units)))
    turn = threading.Lock()             # guards `waiting`

    def work() -> None:
        while True:
            with turn:
                index = next(waiting, None)
            if index is None:
                return
            sessions[index] = units[index].sync()

    start = time.monotonic()
    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads or len(units), len(units)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return Night(sessions, time.monotonic() - start)


def make_units(count: int, directory: str, urls: Sequence[str], seed: int = 0, **options: Any) -> List[Unit]:
    """`count` units whose cards lie below `directory`; the first two have nicknames that are hard on servers."""
    chance = random.Random(seed)
    numbers = chance.sample(range(1 << 24), count)
    names = ["vadsø", "lab desk"] + ["varanger-%02d" % number for number in range(1, count + 1)]
    units = []
    for number, nickname in zip(numbers, names):
        unit_id = "co2unit-30aea4%06x" % number
        units.append(Unit(unit_id, os.path.join(directory, unit_id), urls, nickname,
                          rssi=chance.randrange(-113, -70, 2), **options))
    return units


def run_fleet(units: Sequence[Unit], days: int, threads: Optional[int] = None) -> Iterator[Night]:
    """Day by day: everybody measures, one in ten logs an error, everybody talks."""
    for day in range(days):
        for i, unit in enumerate(units):
            unit.measure()
            if (i + day) % 10 == 0:
                unit.log_error("Signal quality low", "WARN")
        yield one_night(units, threads)


def _options(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="run simulated units against a daemon, day by day")
    parser.add_argument("--url", action="append", help="a server; repeat for a second one (http://127.0.0.1:8080)")
    parser.add_argument("--units", type=int, default=20)
    parser.add_argument("--days", type=int, default=14)
    parser.add_argument("--threads", type=int, default=8, help="units that talk at the same time (8)")
    parser.add_argument("--seed", type=int, default=0, help="makes the unit ids")
    parser.add_argument("--start", type=datetime.fromisoformat, default=FIRST_DAY, help="first day (2019-09-12)")
    parser.add_argument("--cards", help="directory to keep the cards in (default: thrown away)")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Exit status: 0 when every unit could send everything, 1 when not, 2 usage."""
    options = _options(argv)
    with tempfile.TemporaryDirectory() as scratch:
        urls = [url.rstrip("/") for url in options.url or ["http://127.0.0.1:8080"]]
        units = make_units(options.units, options.cards or scratch, urls, options.seed, now=options.start)
        nights = list(run_fleet(units, options.days, options.threads))
    errors = [error for night in nights for error in night.errors]
    behind = sum(not session.finished for session in nights[-1].sessions) if nights else 0
    print("%d units, %d days: %d requests, %d chunks, %d bytes in %.1f s; %d errors, %d units behind" % (
        len(units), len(nights), sum(night.requests for night in nights), sum(night.chunks for night in nights),
        sum(night.sent for night in nights), sum(night.seconds for night in nights), len(errors), behind))
    for error in sorted(set(errors))[:10]:
        print("%4d x %s" % (errors.count(error), error), file=sys.stderr)
    return 1 if errors or behind else 0


if __name__ == "__main__":
    sys.exit(main())
