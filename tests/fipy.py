#!/usr/bin/env python3
"""A simulated sensor unit: what the firmware in the field does, on a card that is a directory, in simulated time.

The units cannot be changed, so this model is the contract that a server is tested against. It is strict on purpose:
where the firmware raises an exception, so does this; where the firmware loops until its time is over, so does this.

Words used here:

    card        directory that stands for the SD card: ``data/readings/``, ``errors/``, ``updates/``, ``conf/``, and
                ``state.json``, which goes wherever the card goes
    position    [file name, offset] for each pushed directory, one for all configured servers together
    session     one communication: all servers in turn, `Unit.budget` seconds of *simulated* time, of which each
                request costs `Unit.cost`; the default of 0.7 s makes room for 428 requests
    watchdog    the hardware timer: *real* seconds that one request may take, then the unit is reset
    round       ping, look for updates, take one; whoever took one starts a new round before it pushes

How it reads a reply: header lines up to an empty one, then everything until the server closes. Content-Length is
ignored, so a reply cut short is taken as complete, and a connection kept open hangs it.

What a reply to a push does to the position (`Unit._push`, `Unit._follow`):

    200             the bytes sent are added first, so that an exception from the body counts them as sent
    200 or 416 ack  if it differs from the own position: the named file, if the unit has it, at the acked position;
                    otherwise the first file at 0, unless the unit is at its first file already: then nothing changes
    ack past the    saved; then and every day after an assertion, until the file has outgrown it
    end of a file
    others          exception, nothing changes

Where the protocol is silent the model decides for the harsher side: any exception ends the communication with that
server, the next server is still called; the watchdog ends it with all of them. An ack that is no list of three, or
whose position is no number, is an exception. An update that lists nothing, or cannot be installed as a whole, is an
exception, and the unit does not have it. A new sync_dest counts from the next session on, a new nickname at once.

As a command, runs a fleet day by day against a running daemon:
``fipy.py --url http://127.0.0.1:8080 --units 20 --days 14``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
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
from urllib.parse import urlsplit

from sensors import HALF_HOUR, reading_lines

READINGS = "data/readings"
ERRORS = "errors"
DIRECTORIES = (ERRORS, READINGS)        # in the order in which they are pushed
SEQUENCES = {READINGS: ("readings-", ".tsv"), ERRORS: ("errors-", ".txt")}
CHUNK = 4096                            # bytes
FILE_SIZE = 102400                      # bytes; a file this long or longer is followed by a new one
STATE = "state.json"
FIRST_DAY = datetime(2019, 9, 12)

Position = Tuple[str, int]              # name of a file, offset in bytes
Rssi = Union[int, str, None]            # dBm; None: unknown, not sent; "None": sent as that text


class Failed(Exception):
    """An exception in the firmware: ends the communication with this server."""


class Watchdog(Exception):
    """The hardware timer reset the unit: ends the session."""


class TimeIsUp(Exception):
    """The budget of the session is spent."""


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
        self.errors: List[str] = []     # one text for each server with which the communication failed
        self.elapsed = 0.0              # simulated seconds
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


def parse_reply(raw: bytes) -> Tuple[int, bytes]:
    """(status, body) of all bytes a server sent before it closed; whatever is cut short counts as complete."""
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    words = lines[0].split(None, 2)
    if len(words) < 2 or not words[1].isdigit():
        raise Failed("no status line in the reply: %r" % raw[:40])
    for line in lines[1:]:
        name, _, value = line.lower().partition(b":")
        if name == b"transfer-encoding" and b"chunked" in value:
            raise Failed("chunked reply")
        if name == b"location" and not words[1].startswith(b"2"):
            raise Failed("redirect")
    return int(words[1]), body


class Link:
    """The way to one server. Each request is a connection of its own."""

    def __init__(self, url: str, session: Session, unit: Unit) -> None:
        self.url, self._session, self._unit = url, session, unit
        parts = urlsplit(url)
        self._host, self._secure = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if self._secure else 80)
        self._prefix = url.split("/", 3)[3] if url.count("/") > 2 else ""

    def request(self, method: str, path: str, body: bytes = b"") -> Tuple[int, bytes]:
        """(status, body) of the reply, recorded in the session."""
        if self._session.elapsed + self._unit.cost > self._unit.budget:
            raise TimeIsUp
        self._session.elapsed += self._unit.cost
        target = ("/" + self._prefix if self._prefix else "") + path
        status: Optional[int] = None
        reply = b""
        try:
            status, reply = parse_reply(self._exchange(segments(method, target, self._host, body)))
        except socket.timeout as error:
            raise Watchdog("watchdog: %s %s" % (method, target)) from error
        except OSError as error:
            raise Failed("%s: %s" % (type(error).__name__, error)) from error
        finally:
            self._session.requests.append(Request(method, target, status, peek_ack(reply), len(body), self.url))
        return status, reply

    def _exchange(self, pieces: Sequence[bytes]) -> bytes:
        deadline = time.monotonic() + self._unit.watchdog
        with socket.create_connection((self._host, self._port), self._unit.watchdog) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)     # each piece becomes a segment
            with unverified().wrap_socket(plain, server_hostname=self._host) if self._secure else plain as link:
                for piece in pieces:
                    link.sendall(piece)
                return b"".join(until_closed(link, deadline))


@lru_cache(maxsize=1)
def unverified() -> ssl.SSLContext:
    """TLS that believes any certificate, as the units do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def until_closed(link: socket.socket, deadline: float) -> Iterator[bytes]:
    """What arrives until the other side closes; socket.timeout when that takes longer than `deadline`."""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("not closed in time")
        link.settimeout(left)
        try:
            data = link.recv(65536)
        except ssl.SSLEOFError:         # closed without the farewell of TLS
            return
        if not data:
            return
        yield data


def load_json(body: bytes) -> Any:
    """The value in a reply."""
    try:
        return json.loads(body.decode("utf-8"))
    except ValueError as error:         # of which both kinds of decode errors are
        raise Failed("no JSON: %r" % body[:40]) from error


def parse_ack(body: bytes) -> Optional[Position]:
    """The ack in a reply to a push, or None when the reply has none."""
    reply = load_json(body)
    if not isinstance(reply, dict):
        raise Failed("the reply to a push is no JSON object: %r" % body[:40])
    if "ack_file" not in reply:
        return None
    ack = reply["ack_file"]
    if not isinstance(ack, list) or len(ack) != 3:
        raise Failed("not three elements: %r" % (ack,))
    if isinstance(ack[1], bool) or not isinstance(ack[1], (int, float)):
        raise Failed("no position: %r" % (ack,))
    return ack[0], int(ack[1])


def peek_ack(body: bytes) -> Any:
    """The ack as it came, for the record only."""
    try:
        return json.loads(body.decode("utf-8"))["ack_file"]
    except (ValueError, TypeError, KeyError):
        return None


# -- error logs ------------------------------------------------------------------------------------------------------


def error_entry(when: datetime, level: str, message: str, text: str = "", as_tuple: bool = False) -> str:
    """One entry of an error log; `as_tuple`: the date as older firmware wrote it."""
    date = str(when.timetuple()[:8]) if as_tuple else when.strftime("%Y-%m-%d %H:%M:%S")
    return "----- %s %s %s\n%s" % (date, level, message, text and text.rstrip("\n") + "\n")


# -- the card ---------------------------------------------------------------------------------------------------------


def list_files(directory: str) -> List[str]:
    """Names of the files in a directory, in byte order; none when there is no directory."""
    if not os.path.isdir(directory):
        return []
    with os.scandir(directory) as entries:
        return sorted((entry.name for entry in entries if entry.is_file()), key=os.fsencode)


def write_file(path: str, data: bytes) -> None:
    """A whole file, its directories made as needed."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def append_lines(directory: str, names: Tuple[str, str], lines: Iterable[str]) -> None:
    """Append whole lines to the last file of a sequence; once that has FILE_SIZE bytes, to a new one."""
    os.makedirs(directory, exist_ok=True)
    prefix, suffix = names
    mine = [name for name in list_files(directory) if name.startswith(prefix) and name.endswith(suffix)]
    number = int(mine[-1][len(prefix):-len(suffix)]) if mine else 0
    lines = iter(lines)
    line = next(lines, None)
    while line is not None:
        with open(os.path.join(directory, "%s%04d%s" % (prefix, number, suffix)), "ab") as file:
            while line is not None and file.tell() < FILE_SIZE:
                file.write(line.encode("utf-8", "surrogateescape"))
                line = next(lines, None)
        number += 1


# -- the unit ---------------------------------------------------------------------------------------------------------


class Unit:
    """A unit with its card and configuration. Not for use by several threads at a time."""

    def __init__(self, unit_id: str, card: str, urls: Sequence[str] = ("http://127.0.0.1:8080",),
                 nickname: str = "varanger-03", rssi: Rssi = -97, now: datetime = FIRST_DAY,
                 period: timedelta = HALF_HOUR, cost: float = 0.7, budget: float = 300.0, watchdog: float = 120.0,
                 raw: bool = False, log_failures: bool = False) -> None:
        """`card`: directory, made if need be; what is on it stays.

        `cost`, `budget`: simulated seconds of a request and of a session; `watchdog`: real seconds.
        `raw`: newer firmware with five more columns. `log_failures`: write failed sessions to the error log.
        """
        self.unit_id, self.card, self.nickname, self.rssi = unit_id, str(card), nickname, rssi
        self.urls = [urls] if isinstance(urls, str) else list(urls)
        self.now, self.period, self.raw, self.log_failures = now, period, raw, log_failures
        self.cost, self.budget, self.watchdog = cost, budget, watchdog
        self.flash: Dict[str, bytes] = {}               # installed firmware: path below flash/ -> bytes
        self.conf: Dict[str, Dict[str, Any]] = {}       # what conf-patch files have set: file name -> values
        for directory in DIRECTORIES:
            os.makedirs(self._path(directory), exist_ok=True)

    def _path(self, *names: str) -> str:
        return os.path.join(self.card, *names)

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
        lines = reading_lines(self.unit_id, self.nickname, self.now, count, self.period, self.raw)
        append_lines(self._path(READINGS), SEQUENCES[READINGS], lines)
        self.now += count * self.period
        return count

    def log_error(self, message: str = "Uncaught exception", level: str = "EXC", text: str = "",
                  as_tuple: bool = False) -> None:
        """Append an entry to the error log, dated now; `text`: further lines, a traceback."""
        append_lines(self._path(ERRORS), SEQUENCES[ERRORS],
                     [error_entry(self.now, level, message, text, as_tuple)])

    # -- position

    @property
    def position(self) -> Optional[Position]:
        """Where it is in its readings; None: it will begin with the first file."""
        return self.position_in(READINGS)

    def position_in(self, directory: str) -> Optional[Position]:
        """Where it is in a directory, as saved on the card."""
        saved = self._state().get(directory)
        return (saved[0], saved[1]) if saved else None

    def set_position(self, directory: str, name: str, offset: int) -> None:
        """Save a position; nothing checks it until the next push."""
        state = self._state()
        if state.get(directory) != [name, offset]:
            state[directory] = [name, offset]
            write_file(self._path(STATE), json.dumps(state).encode())

    def _state(self) -> Dict[str, List[Any]]:
        try:
            with open(self._path(STATE), "rb") as file:
                return json.loads(file.read().decode("utf-8"))
        except FileNotFoundError:
            return {}

    def lose_state(self) -> None:
        """The saved positions are gone; the data are not."""
        if os.path.exists(self._path(STATE)):
            os.remove(self._path(STATE))

    def swap_card(self, readings: Optional[Dict[str, bytes]] = None,
                  errors: Optional[Dict[str, bytes]] = None) -> None:
        """A fresh card, with these files on it if any: no state, no updates."""
        shutil.rmtree(self.card)
        for directory, files in ((READINGS, readings), (ERRORS, errors)):
            os.makedirs(self._path(directory))
            for name, data in (files or {}).items():
                self.write(name, data, directory)

    # -- a session

    def sync(self) -> Session:
        """Wake, talk to each configured server, sleep."""
        session = Session()
        try:
            for url in list(self.urls):
                self._talk(Link(url, session, self), session)
        except TimeIsUp:
            session.over_time = True
        except Watchdog as reset:
            session.errors.append(str(reset))
        session.finished = self._all_sent()
        if self.log_failures and session.error:
            self.log_error("Uncaught exception in transmitting", text=session.error)
        return session

    def _talk(self, link: Link, session: Session) -> None:
        try:
            self._ping(link)
            while self._update(link):
                self._ping(link)
            for directory in DIRECTORIES:
                self._push(link, directory)
        except Failed as error:
            session.errors.append(str(error))

    def _ping(self, link: Link) -> None:
        path = "/ou/%s/alive?site_code=%s" % (self.unit_id, self.nickname)
        if self.rssi is not None:
            raw = self.rssi if self.rssi == "None" else (int(self.rssi) + 113) // 2     # 3GPP TS 27.007, +CSQ
            path += "&rssi_raw=%s&rssi_dbm=%s&ber_raw=99" % (raw, self.rssi)
        status, _ = link.request("POST", path)
        if status != 200:
            raise Failed("alive: %d" % status)

    def _update(self, link: Link) -> bool:
        """Take the newest update if it is new. Returns whether it was."""
        path = "/ou/%s/updates" % self.unit_id
        status, body = link.request("GET", path + "?recursive=False")
        if status not in (200, 404):
            raise Failed("updates: %d" % status)
        names = names_in(body) if status == 200 else []
        if not names or os.path.isdir(self._path("updates", names[-1])):
            return False
        self._install(names[-1], self._fetch(link, "%s/%s" % (path, names[-1])))
        return True

    def _fetch(self, link: Link, path: str) -> Dict[str, bytes]:
        """All files of an update: path -> content."""
        status, body = link.request("GET", path + "?recursive=True")
        if status != 200:
            raise Failed("update: %d" % status)
        files = {}
        for name in names_in(body):
            status, files[name] = link.request("GET", "%s/%s" % (path, name))
            if status != 200:
                raise Failed("update file: %d" % status)
        if not files:
            raise Failed("update: nothing in it")
        return files

    def _install(self, update: str, files: Dict[str, bytes]) -> None:
        patches = [(name[11:], load_json(data)) for name, data in files.items() if name.startswith("conf-patch/")]
        if not all(isinstance(patch, dict) for _, patch in patches):
            raise Failed("conf-patch: no JSON object")
        for name, data in files.items():
            write_file(self._path("updates", update, *name.split("/")), data)
            if name.startswith("flash/"):
                self.flash[name[6:]] = data
        for name, patch in patches:
            self._configure(name, patch)

    def _configure(self, name: str, patch: Dict[str, Any]) -> None:
        """Merge the values of a conf-patch file; the firmware looks for a key in one file only."""
        self.conf.setdefault(name, {}).update(patch)
        write_file(self._path("conf", name), json.dumps(self.conf[name]).encode())
        if name == "ou-id.json":
            self.nickname = patch.get("site_code", self.nickname)
        elif name == "ou-comm-config.json":
            urls = patch.get("sync_dest", self.urls)
            self.urls = [urls] if isinstance(urls, str) else list(urls)

    def _push(self, link: Link, directory: str) -> None:
        step = self._next_chunk(directory)
        while step:
            name, offset, chunk = step
            self.set_position(directory, name, offset)
            path = "/ou/%s/push-sequential/%s/%s?offset=%d" % (self.unit_id, directory, name, offset)
            status, body = link.request("PUT", path, chunk)
            if status not in (200, 416):
                raise Failed("push: %d" % status)
            if status == 200:           # before the body is looked at: an exception there counts the chunk as sent
                self.set_position(directory, name, offset + len(chunk))
            self._follow(directory, parse_ack(body))
            step = self._next_chunk(directory)

    def _next_chunk(self, directory: str) -> Optional[Tuple[str, int, bytes]]:
        """(name, offset, bytes) of what is to be sent next, None when all is sent."""
        names = list_files(self._path(directory))
        name, offset = self.position_in(directory) or ("", 0)
        if name not in names:
            name, offset = "", 0
        for later in names[names.index(name) if name else 0:]:
            offset = offset if later == name else 0
            size = os.path.getsize(self._path(directory, later))
            if not 0 <= offset <= size:
                raise Failed("AssertionError: position %d of %s, which has %d bytes" % (offset, later, size))
            if offset < size:
                with open(self._path(directory, later), "rb") as file:
                    file.seek(offset)
                    return later, offset, file.read(CHUNK)
        return None

    def _follow(self, directory: str, ack: Optional[Position]) -> None:
        """Go where the server wants it."""
        own = self.position_in(directory)
        if ack is None or own is None or ack == own:
            return
        names = list_files(self._path(directory))
        if ack[0] in names:
            self.set_position(directory, *ack)
        elif own[0] != names[0]:
            self.set_position(directory, names[0], 0)

    def _all_sent(self) -> bool:
        try:
            return all(self._next_chunk(directory) is None for directory in DIRECTORIES)
        except Failed:
            return False


def names_in(body: bytes) -> List[str]:
    """A JSON list of names, in byte order."""
    names = load_json(body)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Failed("no list of names: %r" % body[:40])
    if any(part in ("", "..") for name in names for part in name.split("/")):
        raise Failed("a name that leads astray: %r" % body[:40])       # not the firmware's: guards the tester's disk
    return sorted(names, key=lambda name: name.encode("utf-8", "surrogatepass"))


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
