"""Sequences of numbered files: their names, and writing to them so that nothing acknowledged is lost.

A sensor unit keeps its readings in a *sequence* of files, ``readings-0000.tsv``, ``readings-0001.tsv``, ... and sends
each in *chunks*: so many bytes from an *offset* on. A server holds a copy that is at any time the beginning of the
unit's file. This module decides what a chunk does to the copy, does it durably, and answers with an *ack*: the name and
the position from which the unit is to go on. It knows nothing of HTTP, of SQL, or of what the bytes mean.

What a chunk does, with SIZE the bytes we hold (see `decide`):

    offset = SIZE                           append   the copy grows by the chunk            ack [name, offset + length]
    offset < SIZE, the overlap is equal     repeat   the copy grows by what is new, if any  ack [name, offset + length]
    offset < SIZE, the overlap differs      differ   the old bytes are set aside, then the
                                                     copy follows the unit                  ack [name, offset + length]
    offset > SIZE                           gap      nothing                                ack [name, SIZE]

The ack never names a position beyond what the unit just proved to have: a unit that is sent beyond the end of its own
file falls silent until the file outgrows that position.

Files that come before the one just sent may be *missing* here, or *short* (a disk restored from an old backup, a unit
that used to report elsewhere). One of them at a time is asked for by acking it at 0; the unit then sends it and all
that follow, and `repeat` makes that harmless. `Memory` knows which files are worth asking for, and says why.

A unit's card can hold files with any name that FAT allows, and the unit sends all of them, in byte order. Each is kept
under its `kept_name`: ``readings-0000 - Copy.tsv`` as ``readings-0000%20-%20Copy.tsv``, ``vadsø.tsv`` as
``vads%C3%B8.tsv``. The ack has the name as it came. In ``data/readings`` all ``readings-*.tsv`` hold readings, in
``errors`` all ``errors-*.txt`` are error logs; what has another name is kept below ``strange``.

Durability: a chunk or row is on disk (fdatasync; fsync of the directory when a name is new) before the call returns.
When a sync fails, the bytes it was to cover are cut off again. The kernel reports a lost page only once, so a second
sync proves nothing: what a chunk is compared with is read from the disk, not from memory.

Concurrency: all methods may be called from any thread. Each sequence directory has one lock, held while a chunk is
compared, written and synced. Who brings a row to a `RowLog` does not wait for it: one thread at a time writes and syncs
for all, and tells them. Symbolic links below the root are never followed: every step goes through an open directory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import stat
import threading
import time
import zlib
from collections import OrderedDict
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

Sync = Callable[[int], None]            # makes the data of an open file durable, or raises OSError
Told = Callable[[str, Optional[Exception]], None]               # of a row: the path of its file, or why it is in none
Sizes = Callable[[], Dict[str, int]]    # name -> bytes of all files of a directory

LONGEST_NAME = 120                      # characters of a kept name; set aside, it takes 40 more
FILE_SIZE = 100 * 1024                  # bytes; at this size the units, and we for our own rows, start the next file
SESSION = 3600                          # seconds; a unit talks for 300 at most, and its clock is not ours
MEMORY_FILE = ".sequence.json"          # hidden, so no unit can name it
BLOCK = 1 << 16
OCCUPIED = 1 << 62                      # "size" of what is no regular file: no unit could send it, so none is asked for
MOST_SEQUENCES = 20000                  # directories that are remembered, of 1 KB each; a unit has two
MAX_ABSENT = 1000                       # files between two that a unit can skip and be remembered not to have

fdatasync: Sync = getattr(os, "fdatasync", os.fsync)            # macOS has only fsync

# -- layout -----------------------------------------------------------------------------------------------------------
# Names and places of all files. Other files take them from here.


class Match(NamedTuple):
    """The names of one sequence of files: what comes before the number, and what comes behind it."""

    prefix: str
    suffix: str


READINGS = Match("readings-", ".tsv")
ERRORS = Match("errors-", ".txt")
PINGS = Match("pings-", ".tsv")         # UTC time, unit, nickname, rssi_raw, rssi_dbm
FETCHES = Match("fetches-", ".tsv")     # UTC time, unit, update, path: what units have taken

# In the data directory, each unit has a directory of its own, named by its id.
UNIT_PREFIX = "co2unit-"
READINGS_FOLDER = "data/readings"       # uploaded; every readings-*.tsv in it holds readings
ERRORS_FOLDER = "errors"                # uploaded; every errors-*.txt in it is an error log
SEQUENCES = {READINGS_FOLDER: READINGS, ERRORS_FOLDER: ERRORS}
UPDATES_FOLDER = "updates"              # placed by the operator
SET_ASIDE = "set-aside"                 # what a unit has replaced: set-aside/data/readings/NAME@OFFSET@TIME
STRANGE = "strange"                     # uploads that no importer reads: strange/data/readings/NAME
UPDATE_PREFIX = "update-"
SERVER_PREFIX = "server-"               # beside the units: server-NAME/var/pings is a copy from another server
MANUAL_FOLDER = "manual"                # beside the units: tables that people write

# In the server's own directory.
PINGS_FOLDER = "pings"
FETCHES_FOLDER = "fetches"
PUB_FOLDER = "pub"

ROW_TIME = "%Y-%m-%dT%H:%M:%S"          # UTC, in rows
NAME_TIME = "%Y%m%dT%H%M%S"             # UTC, in names, followed by six digits of microseconds and Z
ASIDE_ENDING = r"@[0-9]+@[0-9TZ.]+"     # regular expression: @OFFSET@TIME behind the name of a file set aside

# -- names ------------------------------------------------------------------------------------------------------------


def make_sequence_filename(number: int, match: Match, width: int = 4) -> str:
    """The name of file `number`: 3 -> readings-0003.tsv, 10000 -> readings-10000.tsv."""
    return "%s%0*d%s" % (match[0], width, number, match[1])


def extract_sequence_number(name: str, match: Match) -> Optional[int]:
    """The number in a file name, or None when the name is not one of the sequence."""
    prefix, suffix = match
    digits = name[len(prefix):len(name) - len(suffix)]
    belongs = name.startswith(prefix) and name.endswith(suffix) and digits.isdigit() and digits.isascii()
    return int(digits) if belongs else None


def files_in_sequence(directory: str, match: Match) -> List[str]:
    """Names in order of their numbers (9999 comes before 10000); other names and directories do not count."""
    with os.scandir(directory) as entries:
        numbered = [(extract_sequence_number(entry.name, match), entry.name)
                    for entry in entries if entry.is_file(follow_symlinks=False)]
    return [name for _, name in sorted((number, name) for number, name in numbered if number is not None)]


def last_file_in_sequence(directory: str, match: Match) -> Optional[str]:
    """The name with the highest number, or None."""
    names = files_in_sequence(directory, match)
    return names[-1] if names else None


def next_sequence_filename(directory: str, match: Match) -> str:
    """The name that follows all that are taken in a directory, by whatever is in the way; the first is number 0."""
    numbers = [extract_sequence_number(name, match) for name in os.listdir(directory)]
    return make_sequence_filename(max((number + 1 for number in numbers if number is not None), default=0), match)


def choose_append_file(directory: str, match: Match, size_limit: int = FILE_SIZE) -> str:
    """The path to append to: the last file, or the next one when the last has `size_limit` bytes or more."""
    last = last_file_in_sequence(directory, match)
    if last is None or os.path.getsize(os.path.join(directory, last)) >= size_limit:
        last = next_sequence_filename(directory, match)
    return os.path.join(directory, last)


def split_sequence_filename(name: str) -> Optional[Tuple[Match, int, int]]:
    """readings-0003.tsv -> (("readings-", ".tsv"), 3, 4): match, number, width; None for a name without a number."""
    found = re.match(r"(.*?)([0-9]{1,6})(\.[^0-9]*)?$", name)
    return found and (Match(found[1], found[3] or ""), int(found[2]), len(found[2]))


def kept_name(name: bytes) -> str:
    """The name under which a file of a unit's card is kept: safe in a path, in a log and in a terminal.

    Letters, digits, `.`, `_` and `-` stay; any other byte, and a dot at the beginning, becomes %XX. A longer name than
    LONGEST_NAME keeps its beginning and the last four characters, with a checksum between. Different names stay different.
    """
    safe = re.sub(rb"\A\.|[^0-9A-Za-z._-]", lambda found: b"%%%02X" % ord(found[0]), name).decode()
    if len(safe) <= LONGEST_NAME:
        return safe
    return "%s%%%08x%s" % (safe[:LONGEST_NAME], zlib.crc32(name), safe[-4:])


# -- deciding ---------------------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """What a chunk does: the copy keeps its first `keep` bytes and then takes the chunk from byte `skip` on."""

    kind: str                           # append | repeat | differ | gap
    keep: int = 0
    skip: int = 0


def decide(size: int, offset: int, length: int, same: int) -> Decision:
    """What a chunk of `length` bytes at `offset` does to a copy of `size` bytes.

    `same` counts the leading bytes of the chunk that equal what the copy holds at their place.
    """
    overlap = min(length, size - offset)
    if overlap < 0:
        return Decision("gap")
    if overlap == 0:
        return Decision("append", size)
    if same >= overlap:
        return Decision("repeat", size, overlap)
    return Decision("differ", offset + same, same)


class Receipt(NamedTuple):
    """What was done with a chunk, and what to answer: `ack` is a name and a position."""

    kind: str
    ack: Tuple[str, int]
    grew: int = 0                       # bytes that a quota counts: new in the copy and set aside
    created: int = 0                    # files that a quota counts
    set_aside: str = ""                 # path of the replaced bytes
    asked: bool = False                 # the ack names an older file


class Memory:
    """What one sequence directory has learned about its unit: which older files are worth asking for.

    ended     name -> the size at which the unit had no more of it. Learned when the unit moves on by itself from the
              end of one file to the start of a later one; files in between do not exist on the unit, so they ended
              at 0. A chunk beyond that size refutes it.
    first     the unit has no file with a lower number. Learned when it was told to go back to a file, and went to (or
              stayed at) another: that is what a unit does that does not have the file, and that other is its first.
              Only what it does in the same session counts as staying: one that could not read the reply stays too.
    asked     name -> the day it was last asked for, so that it happens at most once a day.

    These three are kept beside the files: losing them costs one superfluous re-send. The rest is of the moment.

    A request can also be an old one that arrives late or twice, and its reply may go to nobody. So nothing is concluded
    from the answer to a chunk that brought nothing new (`is_new`), from a chunk out of line (`steady`), or from a first
    step back without a second that follows it (`elsewhere`).
    """

    def __init__(self, saved: Dict[str, Any]) -> None:
        self.ended: Dict[str, int] = {name: int(size) for name, size in saved.get("ended", {}).items()}
        self.asked: Dict[str, str] = dict(saved.get("asked", {}))
        self.first = int(saved.get("first", 0))
        self.last: Tuple[str, int, float] = ("", 0, 0.0)        # name, position, time of the last chunk
        self.steady = False                                     # that chunk followed another, or began a file
        self.unsaved = False                                    # the lasting part has changed
        self.is_new = False                                     # that chunk brought bytes that we did not have
        self.awaited = ""                                       # the file we have just asked for
        self.elsewhere = ""                                     # the file the unit went to instead
        self.resent = ("", 0)                                   # the file that was sent since we asked, and how far
        self.checked = ("", "")                                 # name and day of the last look for missing files

    def saved(self) -> Dict[str, Any]:
        """The lasting part, for JSON; taken as saved from here on."""
        self.unsaved = False
        return {"ended": self.ended, "asked": self.asked, "first": self.first}

    def observe(self, name: str, offset: int, end: int, is_new: bool, now: float, sizes: Sizes) -> None:
        """Learn from a stored chunk of file `name`, bytes `offset` to `end`, of which some were new if `is_new`."""
        before, position, at = self.last
        follows, onward = (name, offset) == (before, position), before < name and offset == 0
        same_session = abs(now - at) < SESSION
        if self.awaited and name != self.awaited:
            stayed = follows and (same_session or self.elsewhere != "")
            self._answered(name, stayed, onward, offset == 0 and name < before)
        else:
            if before and onward and same_session and self.steady and not self.awaited:
                self._passed(before, position, name, sizes())
            self.awaited = ""
        if end > self.ended.get(name, end):
            del self.ended[name]
            self.unsaved = True
        self.first = min(self.first, _number(name))
        self.resent = (name, end) if name == self.resent[0] else self.resent
        self.last, self.steady, self.is_new = (name, end, now), follows or offset == 0, is_new

    def _answered(self, name: str, stayed: bool, onward: bool, back: bool) -> None:
        """The unit was told to go to `awaited`, and sends `name`: it stayed, or went elsewhere and goes on there."""
        if stayed or (onward and self.elsewhere):
            self.first, self.unsaved = max(self.first, _number(self.elsewhere or name)), True
            self.ended[self.awaited] = 0
        if back and not self.elsewhere:
            self.elsewhere = name
        else:
            self.awaited = ""

    def _passed(self, before: str, position: int, name: str, sizes: Dict[str, int]) -> None:
        """The unit went on to `name` from the end of what we hold of the file before."""
        held = sizes.get(before, 0)
        if position >= held or before == self.resent[0]:
            self.ended[before], self.unsaved = held, True
            for between in itertools.islice(_names_before(name, _number(before) + 1), MAX_ABSENT):
                if between not in sizes:
                    self.ended[between] = 0

    def redirected(self) -> None:
        """The unit was told to go elsewhere, so its next chunk says nothing about the end of another file."""
        self.last, self.awaited, self.steady = ("", 0, 0.0), "", False

    def ask(self, name: str, day: str, sizes: Sizes, is_cut: Callable[[str], bool]) -> Optional[str]:
        """The oldest file before `name` that the unit may have more of than we hold, not yet asked for today.

        `is_cut` tells whether a copy ends within a line.
        """
        if self.awaited or self.checked == (name, day):
            return None
        self.checked, held = (name, day), sizes()
        for older in _names_before(name, self.first):
            size = held.get(older, 0)
            if self.resent == (older, size) and older not in self.ended:
                self.ended[older], self.unsaved = size, True    # the unit has been back there, and had no more
            if older < name and self.asked.get(older) != day and self._is_short(older, size, is_cut):
                self.asked = {file: date for file, date in self.asked.items() if date == day}
                self.asked[older], self.unsaved = day, True
                self.resent, self.elsewhere = (older, -1), ""
                self.awaited = older if self.is_new else ""
                return older
        return None

    def _is_short(self, name: str, size: int, is_cut: Callable[[str], bool]) -> bool:
        """A file that has reached FILE_SIZE ends with the line that took it there."""
        if name in self.ended:
            return size < self.ended[name]
        return size < FILE_SIZE or (size < OCCUPIED and is_cut(name))


def _number(name: str) -> int:
    found = split_sequence_filename(name)
    return found[1] if found else 0


def _names_before(name: str, start: int) -> Iterator[str]:
    found = split_sequence_filename(name)
    if found:
        match, number, width = found
        width = width if name[len(match[0])] == "0" else min(width, 4)      # readings-10000 follows readings-9999
        yield from (make_sequence_filename(n, match, width) for n in range(start, number))


def utc(now: float, form: str = ROW_TIME, fraction: bool = False) -> str:
    """UTC seconds as text: 2019-10-07T03:23:39, or with six digits of microseconds."""
    whole, micros = divmod(round(now * 1e6), 10 ** 6)
    return _written(whole, form) + (".%06d" % micros if fraction else "")


@functools.lru_cache(maxsize=16)        # the same second again and again
def _written(whole: int, form: str) -> str:
    return time.strftime(form, time.gmtime(whole))


# -- directories and files --------------------------------------------------------------------------------------------


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK           # a FIFO in the way must not block anyone


def _step_into(parent: int, name: str, create: bool) -> int:
    """Open directory `name` in the open directory `parent`; a new one is durable before anything is put into it."""
    flags = os.O_RDONLY | os.O_DIRECTORY | _FLAGS
    try:
        return os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        if not create:
            raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o777, dir_fd=parent)
    os.fsync(parent)
    return os.open(name, flags, dir_fd=parent)


def make_directory(path: str, settle: bool = False) -> None:
    """Make a directory and what is missing above it, each durable before the next. With `settle` its name is made
    durable whoever created it, who may have failed at that; unless its parent is not ours to read."""
    parent = os.path.dirname(os.path.abspath(path))
    missing = not os.path.isdir(path)
    if missing:
        make_directory(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
    if missing or settle and os.access(parent, os.R_OK):
        _sync_directory(parent)


@contextlib.contextmanager
def open_directory(root: str, parts: List[str], create: bool = False, settle: bool = False) -> Iterator[int]:
    """An open descriptor of root/part/part/..., reached without following a link; NotADirectoryError for a link.

    With `settle`, every name on the way is made durable, whoever created it.
    """
    if create:
        make_directory(root, settle)
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            if settle:
                os.fsync(fd)
            fd, parent = _step_into(fd, part, create), fd
            os.close(parent)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def open_beneath(directory: int, name: str, create: bool = False) -> Iterator[int]:
    """An open descriptor of a directory in an open directory, not through a link."""
    fd = _step_into(directory, name, create)
    try:
        yield fd
    finally:
        os.close(fd)


def open_file(directory: int, name: str, flags: int = os.O_RDWR) -> int:
    """A descriptor of a regular file in an open directory; IsADirectoryError where something else is in the way."""
    fd = os.open(name, flags | _FLAGS, 0o666, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise IsADirectoryError("%s is not a regular file" % name)
    return fd


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _read_from_disk(fd: int, length: int, offset: int) -> bytes:
    """Bytes of an open file, without those pages in memory that a failed sync, perhaps of a dead process, has left."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(fd, length, offset)


# -- uploads ----------------------------------------------------------------------------------------------------------


class _Sequence:
    """One directory of uploaded files. The lock guards its files and every attribute but `users`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0                                          # chunks on their way here; Inbox._lock guards it
        self.memory: Optional[Memory] = None                    # None: this process has not been here yet
        self.doubtful: Dict[str, int] = {}                      # name -> durable size, where even cutting failed


class Inbox:
    """Receives chunks into the files below `root`.

    `ask_older` switches the asking for missing older files; `sync` is replaced by tests of failing disks.
    """

    def __init__(self, root: str, ask_older: bool = True, sync: Sync = fdatasync) -> None:
        self.root, self.ask_older, self.sync = root, ask_older, sync
        self._sequences: OrderedDict[Tuple[str, ...], _Sequence] = OrderedDict()       # the last used comes last
        self._lock = threading.Lock()                           # guards _sequences

    def receive(self, owner: str, path: List[str], offset: int, chunk: bytes, now: float) -> Receipt:
        """Store a chunk for owner/path[0]/path[1]/.../name and say what to answer.

        `now` is in UTC seconds. Raises OSError when the disk refuses; what was there is then as before.
        """
        *parents, name = path
        key = (owner, *parents)
        with self._lock:
            sequence = self._sequences.get(key)
            if sequence is None:
                if offset > 0 and not os.path.isdir(os.path.join(self.root, *key)):
                    return Receipt("gap", (name, 0))            # nothing is there, and nothing worth remembering
                sequence = self._sequences[key] = _Sequence()
            sequence.users += 1
            self._used_locked(key)
        try:
            with sequence.lock:
                return _Delivery(self, sequence, key, name, now).store_locked(offset, chunk)
        finally:
            with self._lock:
                sequence.users -= 1

    def _used_locked(self, key: Tuple[str, ...]) -> None:
        """Anyone may name any number of directories: what was used the longest ago is forgotten, as after a restart."""
        self._sequences.move_to_end(key)
        for _ in range(min(2, len(self._sequences) - MOST_SEQUENCES)):      # two: the first may have to stay
            longest_ago, sequence = self._sequences.popitem(last=False)
            if sequence.users or sequence.doubtful:
                self._sequences[longest_ago] = sequence


class _Delivery:
    """One chunk on its way into one file; made and used with the lock of its sequence held."""

    def __init__(self, inbox: Inbox, sequence: _Sequence, key: Tuple[str, ...], name: str, now: float) -> None:
        self.inbox, self.sequence, self.key, self.name, self.now = inbox, sequence, key, name, now

    def store_locked(self, offset: int, chunk: bytes) -> Receipt:
        first_time = self.sequence.memory is None
        try:
            with open_directory(self.inbox.root, list(self.key), create=offset == 0, settle=first_time) as directory:
                if first_time:
                    os.fsync(directory)
                    self.sequence.memory = _load_memory(directory)
                return self._into(directory, offset, chunk)
        except FileNotFoundError:
            if offset == 0:
                raise
            return self._gap(0)
        except OSError:
            self.sequence.memory = None                         # the next chunk makes every name durable once more
            raise

    def _into(self, directory: int, offset: int, chunk: bytes) -> Receipt:
        try:
            fd, created = open_file(directory, self.name), False
        except FileNotFoundError:
            if offset > 0:
                return self._gap(0)
            fd, created = open_file(directory, self.name, os.O_RDWR | os.O_CREAT), True
        try:
            return self._write(directory, fd, offset, chunk, created)
        finally:
            os.close(fd)

    def _write(self, directory: int, fd: int, offset: int, chunk: bytes, created: bool) -> Receipt:
        size = self._trusted_size(fd)
        held = _read_from_disk(fd, min(len(chunk), size - offset), offset) if offset < size else b""
        same = len(held) if chunk.startswith(held) else len(os.path.commonprefix([held, chunk]))
        decision = decide(size, offset, len(chunk), same)
        if decision.kind == "gap":
            return self._gap(size)
        aside, rescued = self._set_aside(fd, decision.keep, size) if decision.kind == "differ" else ("", 0)
        self._replace(fd, decision.keep, size, chunk[decision.skip:])
        if created:
            os.fsync(directory)
        end = offset + len(chunk)
        ack = self._ack(directory, offset, end, is_new=decision.skip < len(chunk))
        grew = max(0, end - size) + rescued
        return Receipt(decision.kind, ack, grew, created + bool(aside), aside, asked=ack[0] != self.name)

    @property
    def _memory(self) -> Memory:
        memory = self.sequence.memory
        assert memory is not None
        return memory

    def _trusted_size(self, fd: int) -> int:
        """Bytes of the copy that are durable; cuts off what an earlier failed sync has left."""
        durable = self.sequence.doubtful.get(self.name)
        if durable is not None:                                 # not if shorter: somebody put another file there
            os.ftruncate(fd, min(durable, os.fstat(fd).st_size))
            del self.sequence.doubtful[self.name]
        return os.fstat(fd).st_size

    def _replace(self, fd: int, keep: int, size: int, new: bytes) -> None:
        """Make the copy its first `keep` bytes and then `new`, durably, or leave those `keep` bytes."""
        try:
            if keep < size:
                os.ftruncate(fd, keep)
            _write_all(fd, new, keep)
            self.inbox.sync(fd)
        except OSError:
            self.sequence.doubtful[self.name] = keep
            with contextlib.suppress(OSError):
                self._trusted_size(fd)
            raise

    def _set_aside(self, fd: int, keep: int, size: int) -> Tuple[str, int]:
        """Copy the lines that are about to be replaced to where no unit can reach them; path and bytes."""
        before = os.pread(fd, min(keep, BLOCK), max(0, keep - BLOCK))
        start = max(0, keep - BLOCK) + before.rfind(b"\n") + 1
        owner, *parents = self.key
        parts = [owner, SET_ASIDE, *parents]
        with open_directory(self.inbox.root, parts, create=True, settle=True) as directory:
            name = _free_name(directory, "%s@%d" % (self.name, start), self.now)
            _write_new(directory, name, _read_blocks(fd, start, size), self.inbox.sync)
        return os.path.join(self.inbox.root, *parts, name), size - start

    def _gap(self, size: int) -> Receipt:
        if self.sequence.memory is not None:
            self.sequence.memory.redirected()
        return Receipt("gap", (self.name, size))

    def _ack(self, directory: int, offset: int, end: int, is_new: bool) -> Tuple[str, int]:
        memory, older, sizes = self._memory, None, functools.partial(_sizes, directory)
        memory.observe(self.name, offset, end, is_new, self.now, sizes)
        if self.inbox.ask_older:
            older = memory.ask(self.name, utc(self.now, "%Y-%m-%d"), sizes, functools.partial(_is_cut, directory))
        if memory.unsaved:
            with contextlib.suppress(OSError):                  # what is forgotten costs one superfluous re-send
                _save_memory(directory, memory)
        return (older, 0) if older else (self.name, end)


def _sizes(directory: int) -> Dict[str, int]:
    def size(entry: os.DirEntry[str]) -> int:
        return entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else OCCUPIED

    with os.scandir(directory) as entries:
        return {entry.name: size(entry) for entry in entries}


def _is_cut(directory: int, name: str) -> bool:
    """Whether a file does not end in a newline; False where it cannot be read: asking would help nobody."""
    try:
        with os.fdopen(open_file(directory, name, os.O_RDONLY), "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"
    except OSError:
        return False


def _free_name(directory: int, prefix: str, now: float) -> str:
    """prefix@time, later by microseconds where a clock that was set back would use a name again."""
    times = (utc(now + n / 1e6, NAME_TIME, fraction=True) for n in itertools.count())
    taken = set(os.listdir(directory))
    return next(name for name in ("%s@%sZ" % (prefix, time) for time in times) if name not in taken)


def _read_blocks(fd: int, start: int, end: int) -> Iterator[bytes]:
    for offset in range(start, end, BLOCK):
        yield os.pread(fd, min(BLOCK, end - offset), offset)


def _write_new(directory: int, name: str, blocks: Iterator[bytes], sync: Sync) -> None:
    """Create a file that appears complete and durable under its name, or not at all."""
    hidden = "." + name
    try:
        with os.fdopen(open_file(directory, hidden, os.O_RDWR | os.O_CREAT | os.O_TRUNC), "wb", buffering=0) as file:
            position = 0
            for block in blocks:
                _write_all(file.fileno(), block, position)
                position += len(block)
            sync(file.fileno())
        os.rename(hidden, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(hidden, dir_fd=directory)
        raise
    os.fsync(directory)


def publish_tree(directory: int, name: str, files: Dict[str, bytes], check: Callable[[int], None]) -> None:
    """Create a directory with files (relative path -> bytes) that appears complete and durable, or not at all.

    `check` gets it as an open directory before it appears, and may raise OSError.
    """
    hidden = ".%s.%d" % (name, os.getpid())
    os.mkdir(hidden, dir_fd=directory)
    try:
        for path, content in files.items():
            _write_below(directory, [hidden, *path.split("/")], content)
        with open_beneath(directory, hidden) as staged:
            check(staged)
        os.rename(hidden, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        with contextlib.suppress(OSError):
            remove_tree(directory, hidden)
        raise
    os.fsync(directory)


def _write_below(directory: int, path: List[str], content: bytes) -> None:
    """Create a file below an open directory, and the directories on the way to it."""
    first, *rest = path
    if rest:
        with open_beneath(directory, first, create=True) as below:
            _write_below(below, rest, content)
    else:
        _write_new(directory, first, iter([content]), fdatasync)


def remove_tree(directory: int, name: str) -> None:
    """Remove a directory in an open directory, with all that is in it."""
    with open_beneath(directory, name) as below:
        for entry in os.listdir(below):
            if stat.S_ISDIR(os.stat(entry, dir_fd=below, follow_symlinks=False).st_mode):
                remove_tree(below, entry)
            else:
                os.unlink(entry, dir_fd=below)
    os.rmdir(name, dir_fd=directory)


def _load_memory(directory: int) -> Memory:
    try:
        with os.fdopen(open_file(directory, MEMORY_FILE, os.O_RDONLY), "rb") as file:
            return Memory(json.loads(file.read()))
    except (OSError, ValueError, TypeError, AttributeError):    # none yet, or not what we wrote
        return Memory({})


def _save_memory(directory: int, memory: Memory) -> None:
    _write_new(directory, MEMORY_FILE, iter([json.dumps(memory.saved(), sort_keys=True).encode()]), lambda fd: None)


# -- rows -------------------------------------------------------------------------------------------------------------


class _RowFile:
    """The file of a `RowLog` that takes rows at present; used by the one thread that writes."""

    def __init__(self, path: str, sync: Sync) -> None:
        self.path, self._sync = path, sync
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
        self.failed = False
        self.size = os.fstat(self.fd).st_size
        try:
            _sync_directory(os.path.dirname(path))
            if self.size and os.pread(self.fd, 1, self.size - 1) != b"\n":
                self._write(b"\n")                              # a crash left half a row: the next starts a line
        except OSError:
            os.close(self.fd)
            raise

    def append(self, rows: bytes) -> None:
        """Write rows and return when they are on disk."""
        self._write(rows)
        try:
            self._sync(self.fd)
        except OSError:
            self.failed = True
            raise

    def _write(self, rows: bytes) -> None:
        try:
            _write_all(self.fd, rows, self.size)
        except OSError:
            os.ftruncate(self.fd, self.size)
            raise
        self.size += len(rows)

    def is_current(self, size_limit: int) -> bool:
        """Whether more rows may go here: not full, not failed, and still the file of that name."""
        if self.failed or self.size >= size_limit:
            return False
        try:
            return os.stat(self.path).st_ino == os.fstat(self.fd).st_ino
        except FileNotFoundError:
            return False


class RowLog:
    """Appends rows (bytes that end in a newline) to a sequence of files in `directory`, durably and in order.

    A row joins those that wait. Who comes while nobody writes becomes the writer: writes and syncs all that wait, at
    once, tells each what became of its row, and goes on until none waits. So one sync serves all who came during the
    one before, and nobody else is held up. After a failed sync the file is left as it is and the next row starts a new
    one: a page that the kernel has lost would leave a hole in the middle.
    """

    def __init__(self, directory: str, match: Match, size_limit: int = FILE_SIZE, sync: Sync = fdatasync) -> None:
        self.directory, self.match, self.size_limit, self._sync = directory, match, size_limit, sync
        self._lock = threading.Lock()                           # guards the next two
        self._waiting: List[Tuple[bytes, Told]] = []
        self._has_writer = False
        self._file: Optional[_RowFile] = None                   # the writer's

    def append(self, row: bytes, told: Told) -> None:
        """Have a row written. `told` is called when it is on disk or has failed, by whoever wrote: it must not wait."""
        with self._lock:
            self._waiting.append((row, told))
            if self._has_writer:
                return
            self._has_writer = True
        for batch in iter(self._take, []):
            self._write(batch)

    def _take(self) -> List[Tuple[bytes, Told]]:
        """All that wait; when none does, the writer's part is over."""
        with self._lock:
            batch, self._waiting = self._waiting, []
            self._has_writer = bool(batch)
        return batch

    def _write(self, batch: List[Tuple[bytes, Told]]) -> None:
        path, problem = "", None
        try:
            file = self._current()
            file.append(b"".join(row for row, _ in batch))
            path = file.path
        except Exception as error:                              # whatever it is, nobody is left waiting
            problem = error
        for _, told in batch:
            with contextlib.suppress(Exception):                # one who cannot bear the news keeps it from nobody else
                told(path, problem)

    def close(self) -> None:
        """Close the file, unless somebody writes; a later `append` opens it anew."""
        with self._lock:
            if self._file and not self._has_writer:
                os.close(self._file.fd)
                self._file = None

    def _current(self) -> _RowFile:
        old = self._file
        if old and old.is_current(self.size_limit):
            return old
        make_directory(self.directory, settle=True)
        path = choose_append_file(self.directory, self.match, self.size_limit)
        if old and old.failed and os.path.exists(path) and os.path.getsize(path):
            path = os.path.join(self.directory, next_sequence_filename(self.directory, self.match))
        self._file = _RowFile(path, self._sync)                 # until there is a new one, the old one stays failed
        if old:
            os.close(old.fd)
        return self._file
