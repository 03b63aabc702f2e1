"""Files of sensor units: where they lie, and how they are written so that no acknowledged byte is lost.

A unit keeps its readings in a *sequence* of files, ``readings-0000.tsv``, ``readings-0001.tsv``, ... It sends each file
in *chunks*: some bytes from an *offset* on. The server holds a *copy* of each file. At any time, the copy is the
beginning of the unit's file. This module decides what a chunk does to the copy, writes it durably, and answers with an
*ack*: the name and the position from which the unit is to go on. It knows nothing of HTTP, of SQL, or of what the bytes
mean.

What a chunk does, with SIZE the bytes that we hold (see `decide`):

    offset = SIZE                       append   the copy grows by the chunk              ack [name, offset + length]
    offset < SIZE, equal overlap        repeat   the copy grows by what is new, if any    ack [name, offset + length]
    offset < SIZE, different overlap    differ   the old bytes are set aside, then the
                                                 copy follows the unit                    ack [name, offset + length]
    offset > SIZE                       gap      nothing                                  ack [name, SIZE]

The ack never names a position beyond what the unit has just shown to have. A unit that is sent beyond the end of its
own file is silent until the file has grown beyond that position.

A file before the one just sent can be missing here, or short: a disk was restored from an old backup, or the unit
reported elsewhere. Then one such file is asked for: the ack names it, at position 0. The unit sends it again, and all
files that follow; `repeat` makes that harmless. `Memory` knows which files are worth asking for.

A unit's card can hold files with any name that FAT allows, and the unit sends all of them, in byte order. Each is kept
under its `kept_name`: ``readings-0000 - Copy.tsv`` as ``readings-0000%20-%20Copy.tsv``, ``vadsø.tsv`` as
``vads%C3%B8.tsv``. The ack has the name as it came. In ``data/readings`` all ``readings-*.tsv`` hold readings, in
``errors`` all ``errors-*.txt`` are error logs. A file with another name is *strange*: see `Inbox.receive_strange`.

Durability: when a call returns, its bytes are on disk (fdatasync), and so is a new name (fsync of the directory). When
a sync fails, the bytes that it was to cover are cut off again. The kernel reports a lost page only once, so a second
sync proves nothing: what a chunk is compared with is read from the disk, not from memory.

Threads: all methods may be called from any thread. Each sequence has one lock, held while a chunk is compared, written
and synced. Who brings a row to a `RowLog` does not wait for it: one thread at a time writes and syncs for all, and
tells them. A file stays open between chunks; before each chunk one os.stat of its path shows, by the inode, that the
path still names it. Symbolic links below the root are never followed: each step goes through an open directory.
"""

from __future__ import annotations

import sys

# All scripts import this file first: from here on, who interrupts one before it runs sees no traceback.
if not hasattr(sys, "ps1"):             # in a session of Python its own hook stays
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)

import json
import os
import re
import shutil
import stat
import threading
import time
import weakref
import zlib
from collections import OrderedDict
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from os.path import join
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

if sys.version_info < (3, 9):           # here, because all scripts import this file before they define anything
    sys.exit("co2d needs Python 3.9 or newer")

DAY = 86400                             # seconds
FILE_SIZE = 100 * 1024                  # bytes; at this size the units, and we for our own rows, start the next file
SESSION = 3600                          # seconds; nearer chunks belong to one session: a unit talks for 300 at most
STILL = 40 * 3600                       # seconds since a unit was first sent back to one position, and
MOST_BACKS = 3                          # sessions in which it was, without a new row: then it has later readings
BLOCK = 1 << 16                         # bytes that are copied at a time
OCCUPIED = 1 << 62                      # "size" of what is no regular file: no unit could send it, so none is asked for
MEMORY_FILE = ".sequence.json"          # hidden: no kept name begins with a dot
LONGEST_NAME = 120                      # characters of a kept name; set aside, it takes 40 more
MOST_STRANGE = 1 << 20                  # bytes of strange files that are kept for a unit (PROTOCOL.md, section 4)
LEAST_STRANGE = 4096                    # bytes that each strange file counts besides, so that their number is limited
MOST_SEQUENCES = 20000                  # directories that are remembered, of 1 KB each; a unit has two
MOST_OPEN = 64                          # files that are kept open between chunks
MOST_ENDS = 400                         # files whose ends are remembered for a sequence; a unit fills 15 a year
MOST_ASKED = 100                        # files that are asked for in a day

fdatasync = getattr(os, "fdatasync", os.fsync)             # macOS has only fsync

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

# -- names and times --------------------------------------------------------------------------------------------------


def make_sequence_filename(number, match):
    """The name of file `number`: 3 -> readings-0003.tsv, 10000 -> readings-10000.tsv."""
    return f"{match.prefix}{number:04d}{match.suffix}"


def extract_sequence_number(name, match):
    """The number in a file name, or None when the name is not one of the sequence."""
    found = re.fullmatch(f"{re.escape(match.prefix)}([0-9]{{1,18}}){re.escape(match.suffix)}", name)
    return int(found[1]) if found else None


def belongs(name, match):
    """Whether a name begins and ends as those of a sequence do, with whatever between."""
    return name.startswith(match.prefix) and name.endswith(match.suffix)


@lru_cache(maxsize=1024)                # each chunk asks for its own
def number_on_card(name, match):
    """The number in a file name, if the name is what a unit makes of that number; else None."""
    number = extract_sequence_number(name, match)
    if number is None or name != make_sequence_filename(number, match):
        return None
    return number


def files_in_sequence(directory, match):
    """Names in order of their numbers (9999 comes before 10000); other names and directories do not count."""
    numbered = []
    with os.scandir(directory) as entries:
        for entry in entries:
            number = extract_sequence_number(entry.name, match)
            if number is not None and entry.is_file(follow_symlinks=False):
                numbered.append((number, entry.name))
    return [name for _, name in sorted(numbered)]


def next_sequence_filename(directory, match):
    """The name that follows all names in a directory, whatever they name; the first has number 0."""
    numbers = [extract_sequence_number(name, match) for name in os.listdir(directory)]
    last = max((number for number in numbers if number is not None), default=-1)
    return make_sequence_filename(last + 1, match)


def choose_append_file(directory, match, size_limit=FILE_SIZE):
    """The path to append to: the last file, or the next one when the last has `size_limit` bytes or more."""
    names = files_in_sequence(directory, match)
    if names:
        last = join(directory, names[-1])
        if os.path.getsize(last) < size_limit:
            return last
    return join(directory, next_sequence_filename(directory, match))


def raw_name(name):
    """The bytes of a name as the unit has sent them: a name is text in which bytes that are no UTF-8 are escaped."""
    return name.encode("utf-8", "surrogateescape")


@lru_cache(maxsize=1024)
def kept_name(name):
    """The name under which a file of a unit's card is kept: safe in a path, in a log and in a terminal.

    Letters, digits, `.`, `_` and `-` stay; any other byte, and a dot at the beginning, becomes %XX. A name that is then
    longer than LONGEST_NAME is cut there; a checksum and its last four characters follow.
    """
    raw = raw_name(name)
    safe = re.sub(rb"\A\.|[^0-9A-Za-z._-]", lambda found: b"%%%02X" % ord(found[0]), raw).decode()
    if len(safe) <= LONGEST_NAME:
        return safe
    return f"{safe[:LONGEST_NAME]}%{zlib.crc32(raw):08x}{safe[-4:]}"


def card_name(kept):
    """The name on the card, as bytes, of a file that is kept under `kept`, as far as it was not cut."""
    return unquote_to_bytes(raw_name(kept))


def utc(now, form=ROW_TIME, fraction=False):
    """UTC seconds as text: 2019-10-07T03:23:39, or with six digits of microseconds."""
    whole, micros = divmod(round(now * 1e6), 10 ** 6)
    text = time.strftime(form, time.gmtime(whole))
    return f"{text}.{micros:06d}" if fraction else text


# -- deciding ---------------------------------------------------------------------------------------------------------


class Chunk:
    """Bytes of a file on a unit's card, from `offset` on, that came at UTC second `now`."""

    def __init__(self, key, name, offset, data, now):
        """`key`: parts of the path of its directory, (unit, "data", "readings"); `name`: text, as on the card."""
        self.key = key
        self.unit = key[0]
        self.match = SEQUENCES.get("/".join(key[1:]))           # the names that its directory is for
        self.name = name
        self.kept = kept_name(name)
        self.path = "/".join((*key, self.kept))                 # below the root
        self.belongs = self.match is not None and belongs(name, self.match)
        self.is_strange = self.match is not None and not self.belongs
        self.number = number_on_card(name, self.match) if self.belongs else None
        self.offset = offset
        self.end = offset + len(data)
        self.data = data
        self.now = now


class Decision(NamedTuple):
    """What a chunk does: the copy keeps its first `keep` bytes and then takes the chunk from byte `skip` on."""

    kind: str                           # append | repeat | differ | gap
    keep: int = 0
    skip: int = 0


def decide(size, offset, length, same):
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


class Sent(NamedTuple):
    """How far a file was sent, and when that was."""

    name: str = ""                      # "": nothing was sent, as far as we know
    end: int = 0
    now: float = 0.0


class Backs(NamedTuple):
    """Sessions in which a unit was sent back from a strange file to the same position `to`."""

    to: Sent | None = None
    sessions: int = 0
    since: float = 0.0                  # UTC seconds


def decide_strange(chunk, newest, backs, was_sent_back):
    """What is answered to a chunk of a strange file in the folder of the readings: a kind of `Receipt`.

    `newest` is the newest file of readings that is known; `was_sent_back`: in this session.
    """
    growing = newest.name or READINGS.prefix
    number = extract_sequence_number(growing, READINGS)
    if newest.end >= FILE_SIZE and number is not None:
        growing = make_sequence_filename(number + 1, READINGS)
    if raw_name(chunk.name) < raw_name(growing):
        return "strange"                # all readings that are to come have later names
    if not was_sent_back:
        return "back" if newest.name else "start"
    stands_still = backs.to == newest and backs.sessions >= MOST_BACKS and chunk.now - backs.since > STILL
    return "past" if stands_still and chunk.offset == 0 else "enough"


class Receipt(NamedTuple):
    """What was done with a chunk, and what to answer.

    Kinds: append, repeat, differ, gap. For a strange file:

    strange     acknowledged: all readings come later
    back        acknowledged, and the unit is sent back to its newest readings
    start       not acknowledged: nothing is known of the unit's readings, so it is sent to the first file
    enough      to be refused: it was sent back before, in the same session
    past        acknowledged: the unit was sent back for several nights and had no new row there, so there must be later
                readings
    """

    kind: str
    ack: tuple[str, int]                # name and position
    grew: int = 0                       # bytes that a quota counts: new in the copy and set aside
    created: int = 0                    # files that a quota counts
    set_aside: str = ""                 # path of the replaced bytes
    asked: bool = False                 # the ack names an older file
    kept: bool = True                   # False: acknowledged, but not stored (strange files only)


# -- what is learned about a unit -------------------------------------------------------------------------------------


# Situations: what the unit was told.
QUIET = "quiet"                         # nothing but echo acks
ASKED = "asked"                         # to go to an older file; its next chunk is the answer
ELSEWHERE = "elsewhere"                 # that, and it began another file: perhaps it has no older one

# Steps: what the unit does next, as its next chunk shows.
ARRIVES = "arrives"                     # it sends the file that it was asked for
FOLLOWS = "follows"                     # it goes on where its last chunk ended, in the same session
RESUMES = "resumes"                     # it goes on where its last chunk ended, in a later session
MOVES_ON = "moves on"                   # it begins a later file, in the same session and after a chunk in order
BEGINS = "begins"                       # it begins a later file otherwise
STEPS_BACK = "steps back"               # it begins an earlier file
JUMPS = "jumps"                         # anything else

# Conclusions: what that says about the unit's card.
NOTHING = "nothing"
PASSED = "passed"                       # it has no more of the last file than we hold, and no file between
IS_FIRST = "is first"                   # this is its first file: it does not have the one that it was asked for
WAS_FIRST = "was first"                 # the file to which it stepped back is its first: it does not have the other

# (situation, step): (conclusion, next situation). For all other pairs nothing is concluded: an old request may arrive
# late or twice, and a reply may go to nobody. So one step back counts only with a second step that follows it, and
# moving on counts only after a chunk in order.
RULES = {
    # The unit goes to a later file by itself, so it has reached the end of the one before.
    (QUIET, MOVES_ON): (PASSED, QUIET),
    # A unit without the requested file stays where it is, if that is its first file. A unit that could not read the
    # reply stays too, but its session is over.
    (ASKED, FOLLOWS): (IS_FIRST, QUIET),
    # Or it goes to its first file, and from there on, however slowly.
    (ASKED, STEPS_BACK): (NOTHING, ELSEWHERE),
    (ELSEWHERE, FOLLOWS): (WAS_FIRST, QUIET),
    (ELSEWHERE, RESUMES): (WAS_FIRST, QUIET),
    (ELSEWHERE, MOVES_ON): (WAS_FIRST, QUIET),
    (ELSEWHERE, BEGINS): (WAS_FIRST, QUIET)
}
NO_RULE = (NOTHING, QUIET)


class Memory:
    """What one sequence has learned about its unit: which older files are worth asking for.

    RULES says what is concluded from a chunk and the one before. Besides,
    - a chunk beyond the known end of its file refutes that end;
    - a unit that was back at a file, sent all of it that we hold, and then sends a later file, has no more of it.

    The first four attributes are kept beside the files; to lose them costs one superfluous re-send. The others are of
    the moment.
    """

    def __init__(self, saved):
        self.ends = {}                                          # number -> size of the unit's file; 0: it has none
        for start, stop, size in saved.get("ends", []):
            self.ends.update(dict.fromkeys(range(start, min(stop, start + MOST_ENDS)), int(size)))
        self.first = int(saved.get("first", 0))                 # the unit has no file with a lower number
        self.asked = set(map(int, saved.get("asked", [])))      # numbers asked for on one day, each once
        self.asked_on = int(saved.get("asked_on", 0))           # that day, counted from 1970
        self.is_saved = True                                    # those four have not changed
        self.situation = QUIET
        self.last = Sent()                                      # the last chunk, unless the unit was sent elsewhere
        self.in_order = False                                   # that chunk followed another, or began a file
        self.newest = Sent()                                    # the last chunk of a file that belongs here
        self.awaited = -1                                       # number of the file that was asked for last
        self.asked_at = 0.0                                     # when that was, in UTC seconds
        self.resent = -1                                        # how far the unit has sent it since
        self.elsewhere: int | None = None                       # number of the file that it stepped back to
        self.looked_for = (-1, 0)                               # file number and day of the last look for older files

    def to_save(self):
        """The lasting part, for JSON; each end as [number, number + 1, size]."""
        ends = [(number, number + 1, size) for number, size in self.ends.items()]
        return {"ends": ends, "first": self.first, "asked": sorted(self.asked), "asked_on": self.asked_on}

    def observe(self, chunk, held):
        """Learn from a chunk that was stored. Returns whether the unit went to an earlier file by itself.

        held() gives the sizes of all files of the directory, by their kept names.
        """
        step = self.step(chunk)
        went_back = chunk.offset == 0 and chunk.name < self.newest.name and abs(chunk.now - self.asked_at) > SESSION
        conclusion, self.situation = RULES.get((self.situation, step), NO_RULE)
        if conclusion is PASSED:
            self._pass(chunk, held())
        elif conclusion is IS_FIRST:
            self._begin_at(chunk.number)
        elif conclusion is WAS_FIRST:
            self._begin_at(chunk.number if self.elsewhere is None else self.elsewhere)
        elif self.situation is ELSEWHERE:
            self.elsewhere = chunk.number
        if chunk.number is not None:
            self._note_progress(chunk.number, chunk.end)
        self.in_order = chunk.offset == 0 or step in (FOLLOWS, RESUMES)
        self.last = Sent(chunk.name, chunk.end, chunk.now)
        if chunk.belongs:
            self.newest = self.last
        return went_back

    def step(self, chunk):
        """What the unit does that sends this chunk."""
        if self.situation is not QUIET and chunk.number == self.awaited:
            return ARRIVES
        last = self.last
        same_session = abs(chunk.now - last.now) < SESSION
        if (chunk.name, chunk.offset) == (last.name, last.end):
            return FOLLOWS if same_session else RESUMES
        if chunk.offset > 0 or chunk.name == last.name:
            return JUMPS
        if chunk.name < last.name:
            return STEPS_BACK
        return MOVES_ON if same_session and self.in_order else BEGINS

    def _pass(self, chunk, sizes):
        """The unit went from the end of the last file to this one."""
        if chunk.number is None:
            return
        last = number_on_card(self.last.name, chunk.match)
        size = sizes.get(self.last.name, 0)
        if last is None or self.last.end < size and last != self.awaited:
            return                                              # the other: an old chunk that arrived late
        self.first = max(self.first, chunk.number - MOST_ENDS)  # what is longer ago is not asked for
        between = set(range(max(last + 1, self.first), chunk.number))
        between.difference_update(number_on_card(name, chunk.match) for name in sizes)
        self._end({last: size, **dict.fromkeys(between, 0)})

    def _begin_at(self, number):
        """The unit does not have the file that it was asked for; its first file has this number, if any."""
        self._end({self.awaited: 0})
        self.first = max(self.first, number or 0)

    def _end(self, sizes):
        """The unit has no more of these files: number -> size. Of too many, those before are not asked for any more."""
        self.ends.update(sizes)
        self.is_saved = False
        for number in sorted(self.ends)[:-MOST_ENDS]:
            del self.ends[number]
            self.first = max(self.first, number + 1)

    def _note_progress(self, number, end):
        if end > self.ends.get(number, OCCUPIED):
            del self.ends[number]
            self.is_saved = False
        if number < self.first:
            self.first = number
            self.is_saved = False
        if number == self.awaited:
            self.resent = end

    def redirected(self):
        """The unit was sent elsewhere, so its next chunk says nothing about the end of another file."""
        self.situation = QUIET
        self.last = Sent()
        self.in_order = False

    def ask(self, chunk, held, is_cut):
        """The name of the oldest file before this chunk's that the unit may have more of than we hold; else None.

        It is named once a day. `is_cut(name)` tells whether a copy ends within a line.
        """
        number = chunk.number
        day = int(chunk.now // DAY)
        if number is None or self.situation is not QUIET or self.looked_for == (number, day):
            return None
        self.looked_for = (number, day)
        sizes = held()
        back = self.awaited
        if self.first <= back < number and self.resent == sizes.get(make_sequence_filename(back, chunk.match), 0):
            self._end({back: self.resent})
        if self.asked_on != day:
            self.asked_on = day
            self.asked.clear()
        if len(self.asked) >= MOST_ASKED:
            return None
        for older in range(self.first, number):
            name = make_sequence_filename(older, chunk.match)
            if older not in self.asked and self._is_short(older, sizes.get(name, 0), partial(is_cut, name)):
                self._note_asked(older, chunk.now)
                return name
        return None

    def _is_short(self, number, size, is_cut):
        """Whether the unit may have more of a file than these bytes."""
        if number in self.ends:
            return size < self.ends[number]
        return size < FILE_SIZE or size < OCCUPIED and is_cut()         # a full file ends with the line that filled it

    def _note_asked(self, number, now):
        self.asked.add(number)
        self.is_saved = False
        self.awaited = number
        self.asked_at = now
        self.resent = -1
        self.situation = ASKED


# -- directories and files --------------------------------------------------------------------------------------------

_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK           # a FIFO in the way must not block anyone


def _sync_directory(path):
    with open_directory(path, []) as directory:
        os.fsync(directory)


def _step_into(parent, name, create):
    """Open directory `name` in the open directory `parent`; a new one is durable before anything is put into it."""
    flags = os.O_RDONLY | os.O_DIRECTORY | _FLAGS
    try:
        return os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        if not create:
            raise
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=parent)
    os.fsync(parent)
    return os.open(name, flags, dir_fd=parent)


def make_directory(path, settle=False):
    """Make a directory and what is missing above it, each durable before the next.

    With `settle`: fsync the parent even if the directory exists, because its creator may have crashed before. Not if
    the parent is not ours to read.
    """
    parent = os.path.dirname(os.path.abspath(path))
    missing = not os.path.isdir(path)
    if missing:
        make_directory(parent)
        with suppress(FileExistsError):
            os.mkdir(path)
    if missing or settle and os.access(parent, os.R_OK):
        _sync_directory(parent)


@contextmanager
def open_directory(root, parts, create=False, settle=False):
    """An open descriptor of root/part/part/..., reached without following a link; NotADirectoryError for a link.

    `root`: a path, or an open directory. With `settle`: fsync each directory on the way, whoever has created the next.
    """
    if isinstance(root, int):
        fd = os.dup(root)
    else:
        if create:
            make_directory(root, settle)
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts:
            if settle:
                os.fsync(fd)
            parent = fd
            fd = _step_into(parent, part, create)
            os.close(parent)
        yield fd
    finally:
        os.close(fd)


def open_file(directory, name, flags):
    """A descriptor of a regular file in an open directory; IsADirectoryError where something else is in the way."""
    fd = os.open(name, flags | _FLAGS, 0o666, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise IsADirectoryError(f"{name} is not a regular file")
    return fd


def open_regular(root, parts):
    """The regular file root/part/part/..., open for reading as bytes; no link on the way is followed."""
    *folders, name = parts
    with open_directory(root, folders) as directory:
        return os.fdopen(open_file(directory, name, os.O_RDONLY), "rb")


class OpenFile:
    """A regular file that stays open between writes. Its path may come to name another file: see `is_current`."""

    def __init__(self, path, fd):
        """Takes over `fd`, and closes it when it is itself closed or forgotten."""
        self.path = path
        self.fd = fd
        self.close = os.fdopen(fd, "r+b", buffering=0).close
        self._status = os.fstat(fd)
        self.size = self._status.st_size

    def is_current(self):
        """Whether the path still names this file. `size` is up to date then.

        While a file is open, the number of its inode is not given to another.
        """
        try:
            status = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        self.size = status.st_size
        return os.path.samestat(status, self._status)


def _write_all(fd, data, offset):
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def _read_from_disk(fd, length, offset):
    """Bytes of an open file, without those pages in memory that a failed sync, perhaps of a dead process, has left."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(fd, length, offset)


def _read_blocks(fd, start, end):
    for offset in range(start, end, BLOCK):
        yield os.pread(fd, min(BLOCK, end - offset), offset)


def _write_new(directory, name, blocks, sync):
    """Create a file that appears complete under its name, or not at all; durable unless `sync` is None."""
    hidden = "." + name
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    try:
        with os.fdopen(open_file(directory, hidden, flags), "wb") as file:
            file.writelines(blocks)
            if sync:
                file.flush()
                sync(file.fileno())
        os.rename(hidden, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        with suppress(OSError):
            os.unlink(hidden, dir_fd=directory)
        raise
    if sync:
        os.fsync(directory)


def publish_tree(directory, name, files):
    """Create a directory with files (relative path -> bytes) in an open one: complete and durable, or not at all."""
    hidden = f".{name}.{os.getpid()}"
    os.mkdir(hidden, dir_fd=directory)
    try:
        for path, content in files.items():
            *folders, file = path.split("/")
            with open_directory(directory, [hidden, *folders], create=True) as below:
                _write_new(below, file, [content], fdatasync)
        os.rename(hidden, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        shutil.rmtree(f"/proc/self/fd/{directory}/{hidden}", ignore_errors=True)
        raise
    os.fsync(directory)


def usage_of(*directories):
    """Bytes and number of all files in directories and below. A file that vanishes meanwhile counts nothing."""
    total = files = 0
    for directory in directories:
        for parent, _, names in os.walk(directory):
            for name in names:
                with suppress(OSError):
                    total += os.lstat(join(parent, name)).st_size
                    files += 1
    return total, files


# -- uploads ----------------------------------------------------------------------------------------------------------


class _Sequence:
    """One directory of uploaded files.

    The lock guards its files and all attributes; only `called` sets `sent_back` without it.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.memory: Memory | None = None                       # None: names here may not be durable yet
        self.sent_back = False                                  # since the last ping, which clears it without the lock
        self.backs = Backs()
        self.let_past = set()                                   # strange files behind which there are readings

    def decide_strange_locked(self, chunk, newest):
        """What is answered to a chunk of a strange file among the readings."""
        kind = decide_strange(chunk, newest, self.backs, self.sent_back)
        if kind in ("back", "start"):
            if newest != self.backs.to:
                self.backs = Backs(newest, 0, chunk.now)
            self.backs = self.backs._replace(sessions=self.backs.sessions + 1)
            self.sent_back = True
        if kind == "past":
            self.let_past.add(chunk.name)
        return kind


class Inbox:
    """Receives chunks into the files below `root`.

    `ask_older` switches the asking for missing older files. `sync(fd)` makes the data of an open file durable; tests of
    failing disks replace it.
    """

    def __init__(self, root, ask_older=True, sync=fdatasync):
        self.root = root
        self.ask_older = ask_older
        self.sync = sync
        self._lock = threading.Lock()                           # guards the next three
        self._sequences = weakref.WeakValueDictionary()         # by key: those that a chunk is using, or in the next
        self._remembered = OrderedDict()                        # by key: holds those used lately; the last comes last
        self._open = OrderedDict()                              # OpenFile by path, while no chunk is on its way there
        # Path -> durable size, where even cutting failed. What is about one path, the lock of its sequence guards.
        self._doubtful = {}

    def receive(self, chunk):
        """Store a chunk of a file that is not strange, and say what to answer.

        Raises OSError when the disk refuses. The copy is then as before; of one that differs, only the bytes that agree
        may be left, and the others are set aside.
        """
        with self._entered(chunk.key) as sequence:
            memory = self._memory_locked(sequence, chunk.key, create=chunk.offset == 0)
            if memory is None:
                return Receipt("gap", (chunk.name, 0))
            receipt = self._store_locked(chunk)
            if receipt.kind == "gap":
                memory.redirected()
                return receipt
            held = partial(_sizes, self.root, chunk.key)
            if memory.observe(chunk, held):
                sequence.let_past.clear()                       # it may be another card
            older = self._ask_locked(memory, chunk, held, is_new=receipt.grew > 0)
        return receipt._replace(ack=(older, 0), asked=True) if older else receipt

    def receive_strange(self, chunk, keep):
        """Acknowledge a chunk of a file that no importer reads; keep it below STRANGE, if `keep` and there is room.

        When a name behind the newest readings is acknowledged, the unit stays there, and never looks back at the file
        that grows. So the unit is sent back to that file, once after each ping; the next such chunk of the session is
        to be refused. Not so in `errors`: a refusal there would keep back the readings, which the unit sends later.
        """
        with self._entered(chunk.key) as sequence:
            memory = self._memory_locked(sequence, chunk.key, create=False) or Memory({})
            newest = memory.newest
            kind = "strange"
            if chunk.match == READINGS and chunk.name not in sequence.let_past:
                newest = self._newest_readings(memory, chunk)
                kind = sequence.decide_strange_locked(chunk, newest)
            if kind == "enough":
                return Receipt(kind, (chunk.name, chunk.offset), kept=False)
            if kind == "start":
                return Receipt(kind, (make_sequence_filename(0, READINGS), 0), kept=False)
            ack = (newest.name, newest.end) if kind == "back" else (chunk.name, chunk.end)
            receipt = Receipt(kind, ack, kept=False)
            if keep:
                with suppress(OSError):                         # a strange file is no reason to stop a unit
                    receipt = self._keep_strange_locked(chunk, receipt)
            if kind == "back":
                memory.redirected()
            else:
                memory.observe(chunk, partial(_sizes, self.root, chunk.key))
        return receipt

    def called(self, unit):
        """A unit has pinged: it begins a session."""
        with self._lock:
            sequence = self._sequences.get((unit, *READINGS_FOLDER.split("/")))
        if sequence:
            sequence.sent_back = False

    def close_files(self):
        """Close the files that no chunk is on its way to. A disk with open files cannot be unmounted."""
        with self._lock:
            self._open.clear()

    @contextmanager
    def _entered(self, key):
        """The sequence of a directory, with its lock held. After an OSError, its names are made durable once more."""
        with self._lock:
            sequence = self._sequences.get(key) or _Sequence()
            self._sequences[key] = sequence
        with sequence.lock:
            try:
                yield sequence
            except OSError:
                sequence.memory = None
                raise
            finally:
                if sequence.memory or sequence.sent_back:       # else there is nothing worth remembering
                    with self._lock:
                        _put_last(self._remembered, key, sequence, MOST_SEQUENCES)

    def _memory_locked(self, sequence, key, create):
        """What was learned here. None: there is no such directory.

        At the first use, all names are made durable: a process that has died may have left some that are not.
        """
        if sequence.memory is None:
            try:
                with open_directory(self.root, key, create, settle=True) as directory:
                    os.fsync(directory)
                    sequence.memory = _load_memory(directory)
            except FileNotFoundError:
                if create:
                    raise
        return sequence.memory

    def _ask_locked(self, memory, chunk, held, is_new):
        """The name of the older file that the unit is to be asked for; saves what was learned."""
        older = None
        if self.ask_older:
            older = memory.ask(chunk, held, partial(_is_cut, self.root, chunk.key))
        if older and not is_new:
            memory.redirected()                                 # it may be an old request, and nobody reads the reply
        if not memory.is_saved:
            with suppress(OSError):                             # what is forgotten costs one superfluous re-send
                with open_directory(self.root, chunk.key) as directory:
                    _write_new(directory, MEMORY_FILE, [json.dumps(memory.to_save()).encode()], None)
                memory.is_saved = True
        return older

    def _newest_readings(self, memory, chunk):
        """The file of readings that the unit has sent last; after a restart, the last one here, from its beginning."""
        if not memory.newest.name:
            sizes = {}
            with suppress(FileNotFoundError):
                sizes = _sizes(self.root, chunk.key)
            names = [name for name in sizes if belongs(name, READINGS) and sizes[name] < OCCUPIED and "%" not in name]
            memory.newest = Sent(max(names, default=""))
        return memory.newest

    def _keep_strange_locked(self, chunk, receipt):
        """The receipt, with what was stored. Each file counts LEAST_STRANGE more, so that their number is limited."""
        folders = (STRANGE, join(SET_ASIDE, STRANGE))
        total, files = usage_of(*[join(self.root, chunk.unit, folder) for folder in folders])
        if total + (files + 1) * LEAST_STRANGE + len(chunk.data) > MOST_STRANGE:
            return receipt
        key = (chunk.unit, STRANGE, *chunk.key[1:])
        with open_directory(self.root, key, create=True, settle=True) as directory:
            os.fsync(directory)
        stored = self._store_locked(Chunk(key, chunk.name, chunk.offset, chunk.data, chunk.now))
        return stored._replace(kind=receipt.kind, ack=receipt.ack, kept=stored.kind != "gap")

    # A chunk on its way to our copy of a file: with the lock of its sequence held.

    def _store_locked(self, chunk):
        """Do what `decide` says, and answer as the table at the top of the file does."""
        file = self._open_locked(chunk)
        size = self._trusted_size_locked(file) if file else 0
        old = b""
        if chunk.offset < size:
            old = _read_from_disk(file.fd, min(len(chunk.data), size - chunk.offset), chunk.offset)
        same = len(old) if chunk.data.startswith(old) else len(os.path.commonprefix([old, chunk.data]))
        decision = decide(size, chunk.offset, len(chunk.data), same)
        if decision.kind == "gap":
            return Receipt("gap", (chunk.name, size))
        aside, rescued = "", 0
        if decision.kind == "differ":
            aside, rescued = self._set_aside(chunk, file.fd, decision.keep, size)
        self._replace_locked(file, decision.keep, chunk.data[decision.skip:])
        with self._lock:
            _put_last(self._open, file.path, file, MOST_OPEN)
        grew = max(0, chunk.end - size) + rescued
        return Receipt(decision.kind, (chunk.name, chunk.end), grew, (size == 0) + bool(aside), aside)

    def _open_locked(self, chunk):
        """Our copy. None when there is none: only the beginning of a file makes one."""
        path = join(self.root, chunk.path)
        with self._lock:
            file = self._open.pop(path, None)
        if file and file.is_current():
            return file
        create = chunk.offset == 0
        try:
            with open_directory(self.root, chunk.key, create) as directory:
                fd = open_file(directory, chunk.kept, os.O_RDWR | os.O_CREAT if create else os.O_RDWR)
                file = OpenFile(path, fd)
                if create:
                    os.fsync(directory)
        except FileNotFoundError:
            if create:
                raise
            return None
        return file

    def _trusted_size_locked(self, file):
        """Bytes of the copy that are durable; cuts off what an earlier failed sync has left."""
        if file.path in self._doubtful:
            file.size = min(file.size, self._doubtful[file.path])       # less: somebody has put another file there
            os.ftruncate(file.fd, file.size)
            del self._doubtful[file.path]
        return file.size

    def _replace_locked(self, file, keep, new):
        """Make the copy its first `keep` bytes and then `new`, durably, or leave those `keep` bytes."""
        try:
            if keep < file.size:
                os.ftruncate(file.fd, keep)
            _write_all(file.fd, new, keep)
            self.sync(file.fd)
        except OSError:
            self._doubtful[file.path] = keep
            with suppress(OSError):
                self._trusted_size_locked(file)
            file.close()
            raise

    def _set_aside(self, chunk, fd, keep, size):
        """Copy the lines that are about to be replaced to where no unit can reach them; path and bytes."""
        before = os.pread(fd, min(keep, BLOCK), max(0, keep - BLOCK))
        start = max(0, keep - BLOCK) + before.rfind(b"\n") + 1
        unit, *folders = chunk.key
        parts = [unit, SET_ASIDE, *folders]
        with open_directory(self.root, parts, create=True, settle=True) as directory:
            name = _free_name(directory, f"{chunk.kept}@{start}", chunk.now)
            _write_new(directory, name, _read_blocks(fd, start, size), self.sync)
        return join(self.root, *parts, name), size - start


def _put_last(ordered, key, value, most):
    """Put a value at the end of an OrderedDict. Of more than `most`, the first is forgotten."""
    ordered[key] = value
    ordered.move_to_end(key)
    if len(ordered) > most:
        ordered.popitem(last=False)


def _free_name(directory, prefix, now):
    """prefix@time, later by microseconds where a clock that was set back would use a name again."""
    while True:
        name = f"{prefix}@{utc(now, NAME_TIME, fraction=True)}Z"
        if name not in os.listdir(directory):
            return name
        now += 1e-6


def _sizes(root, key):
    """The sizes of all files of a directory; OCCUPIED for what is no regular file."""
    sizes = {}
    with open_directory(root, key) as directory, os.scandir(directory) as entries:
        for entry in entries:
            is_file = entry.is_file(follow_symlinks=False)
            sizes[entry.name] = entry.stat(follow_symlinks=False).st_size if is_file else OCCUPIED
    return sizes


def _is_cut(root, key, name):
    """Whether a file does not end in a newline; False where it cannot be read: asking would help nobody."""
    try:
        with open_regular(root, [*key, name]) as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"
    except OSError:
        return False


def _load_memory(directory):
    try:
        with open_regular(directory, [MEMORY_FILE]) as file:
            return Memory(json.loads(file.read()))
    except (OSError, ValueError, TypeError, AttributeError):    # none yet, or not what we wrote
        return Memory({})


# -- rows -------------------------------------------------------------------------------------------------------------


class RowLog:
    """Appends rows (bytes that end in a newline) to a sequence of files in `directory`, durably and in order.

    A row joins those that wait. Who comes while nobody writes becomes the writer: it writes and syncs all that wait, at
    once, tells each what became of its row, and goes on until none waits. So one sync serves all who came during the
    one before, and nobody else is held up. After a failed sync the file is left as it is, and the next row starts a new
    one: a page that the kernel has lost would leave a hole in the middle.
    """

    def __init__(self, directory, match, size_limit=FILE_SIZE, sync=fdatasync):
        self.directory = directory
        self.match = match
        self.size_limit = size_limit
        self._sync = sync
        self._lock = threading.Lock()                           # guards the next two
        self._waiting = []                                      # (row, told)
        self._has_writer = False
        self._file: OpenFile | None = None                      # the writer's, as the next
        self._failed = False                                    # that file may have a hole

    def append(self, row, told):
        """Have a row written.

        When it is on disk, or has failed, whoever wrote it calls told(path of the file, None) or told("", exception).
        `told` must not wait.
        """
        with self._lock:
            self._waiting.append((row, told))
            if self._has_writer:
                return
            self._has_writer = True
        for batch in iter(self._take, []):
            self._write(batch)

    def _take(self):
        """All that wait; when none does, the writer's part is over."""
        with self._lock:
            batch = self._waiting
            self._waiting = []
            self._has_writer = bool(batch)
        return batch

    def _write(self, batch):
        path, problem = "", None
        try:
            file = self._current()
            self._append(file, b"".join(row for row, _ in batch))
            path = file.path
        except Exception as error:                              # whatever it is, nobody is left waiting
            problem = error
        for _, told in batch:
            with suppress(Exception):                           # one who cannot bear the news keeps it from nobody else
                told(path, problem)

    def close(self):
        """Close the file, unless somebody writes; a later `append` opens it anew."""
        with self._lock:
            if self._file and not self._has_writer:
                self._file.close()
                self._file = None

    def _current(self):
        """The file that takes the next row."""
        file = self._file
        if file and not self._failed and file.is_current() and file.size < self.size_limit:
            return file
        make_directory(self.directory, settle=True)
        path = choose_append_file(self.directory, self.match, 0 if self._failed else self.size_limit)
        new = OpenFile(path, os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666))
        try:
            _sync_directory(self.directory)
            if new.size and os.pread(new.fd, 1, new.size - 1) != b"\n":
                _write_all(new.fd, b"\n", new.size)             # a crash left half a row: the next starts a line
                new.size += 1
        except OSError:
            new.close()
            raise
        if file:
            file.close()
        self._file = new                                        # until here, the old one stays failed
        self._failed = False
        return new

    def _append(self, file, rows):
        """Write rows and return when they are on disk."""
        self._failed = True                                     # unless all goes well
        try:
            _write_all(file.fd, rows, file.size)
        except Exception:
            os.ftruncate(file.fd, file.size)
            self._failed = False
            raise
        self._sync(file.fd)
        self._failed = False
