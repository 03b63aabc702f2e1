"""Every situation in which a server of such units has lost readings or left a unit stuck: simulated units, day by day.

A `World` is a unit, its card, and one or two servers in this process, with a clock that follows the unit's. A situation
is a function that makes a mess of it. One judge decides how it ended: `World.judge`.

Files are 12 KiB here and not 100, for unit and server alike: the same rules with fewer chunks.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import random
import shutil
import socket
import stat

import pytest

import co2d
import fipy
import importer
import seqfile
import sensors

UNIT = "co2unit-30aea42a50bc"
SMALL = 3 * fipy.CHUNK
EPOCH = datetime.datetime(1970, 1, 1)
NAMES = {fipy.READINGS: "readings-%04d.tsv", fipy.ERRORS: "errors-%04d.txt"}
QUIET = 4                               # days after the mess
NOBODY = "http://127.0.0.1:9"           # the discard service, which nobody runs


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(fipy, "FILE_SIZE", SMALL)
    monkeypatch.setattr(seqfile, "FILE_SIZE", SMALL)
    monkeypatch.setattr(os, "fsync", lambda fd: None)           # what is durable is another test's business


# -- the world --------------------------------------------------------------------------------------------------------


def whole_lines(data):
    return data.split(b"\n")[:-1]


def answer(station, pieces):
    """The bytes of a station's reply."""
    head, _, body = b"".join(pieces).partition(b"\r\n\r\n")
    request = co2d.parse_head(head + b"\r\n\r\n")._replace(body=body, now=station.clock())
    response = co2d.respond(station, request)
    if response.after:
        response.after(lambda: None)
    content = response.file.read() if response.file else response.body
    if response.sent:
        response.sent()
    return co2d.encode_head(response, len(content), request.now) + content


class RoughLink(fipy.Link):
    """A way to a station, without sockets, on which the unit's `road` decides what happens to a request."""

    def _exchange(self, pieces):
        return self._unit.road(self.reach, pieces)

    def reach(self, pieces):
        if self.url not in self._unit.stations:
            raise ConnectionRefusedError("nobody listens there")
        return answer(self._unit.stations[self.url], pieces)


class RoughUnit(fipy.Unit):
    """A unit on a `RoughLink`. `stations`: by their URLs."""

    link = RoughLink
    road = staticmethod(lambda exchange, pieces: exchange(pieces))


class World:
    """`seen`: every line that a server must still have; `sound`: the number of days before the mess."""

    def __init__(self, path, servers, directory=fipy.READINGS, period=fipy.HALF_HOUR, settings=None):
        self.path, self.directory, self.settings, self.servers = path, directory, settings or {}, servers
        self.urls = [""] * len(servers)
        self.unit = RoughUnit(UNIT, str(path / "card"), period=period)
        self.unit.stations = {}
        self.skew = 0.0                                 # seconds by which the server's clock is wrong
        self.ticks, self.entries, self.grown, self.seen, self.sessions, self.sound = 0.0, 0, 0, set(), [], 0
        self.longer, self.mixed = set(), set()          # names of ours that may be longer, or of several cards
        for index in range(len(servers)):
            self.start(index)

    def clock(self):
        self.ticks += 0.3
        return (self.unit.now - EPOCH).total_seconds() + self.ticks + self.skew

    def settings_of(self, index):
        return importer.Settings()._replace(data_dir=self.root(index), var_dir=str(self.path / ("var%d" % index)),
            db=str(self.path / ("db%d" % index)), listen="127.0.0.1", port=0, keep_free=0, quiet=True, **self.settings)

    def start(self, index=0):
        """A server with nothing but what is on its disk."""
        station = co2d.Station(self.settings_of(index), self.clock, sync=lambda fd: None)
        self.urls[index] = "http://127.0.0.1:%d" % self.servers[index].port
        self.servers[index].station = self.unit.stations[self.urls[index]] = station
        self.unit.urls = list(self.urls)

    def stop(self, index=0):
        self.unit.urls = [NOBODY if number == index else url for number, url in enumerate(self.unit.urls)]

    def restart(self, index=0):
        self.stop(index)
        self.start(index)

    # what lies where

    def root(self, index=0):
        return str(self.path / ("data%d" % index))

    def ours(self, name="", index=0):
        return os.path.join(self.root(index), UNIT, *self.directory.split("/"), *filter(None, [name]))

    def name(self, number):
        return NAMES[self.directory] % number

    def current(self):
        return max(self.unit.files(self.directory))

    def card_bytes(self):
        return sum(len(data) for files in map(self.unit.files, fipy.DIRECTORIES) for data in files.values())

    def kept_lines(self):
        """All lines that the servers hold, replaced ones too."""
        return {line for index in range(len(self.servers)) for parent, _, names in os.walk(self.root(index))
                for name in names if not name.startswith(".") and stat.S_ISREG(os.lstat(os.path.join(parent, name)).st_mode)
                for line in whole_lines(open(os.path.join(parent, name), "rb").read())}

    def card_lines(self):
        return {line for directory in fipy.DIRECTORIES for data in self.unit.files(directory).values() for line in whole_lines(data)}

    # what happens

    def measure(self, days=1):
        """Readings, and so many entries in the error log that it grows as fast."""
        before = self.card_bytes()
        for _ in range(days):
            self.unit.measure(1)
            entries = []
            for _ in range(0 if self.directory == fipy.READINGS else int(86400 / self.unit.period.total_seconds())):
                self.entries += 1
                entries.append(fipy.error_entry(self.unit.now, "WARN", "Signal quality low", "no. %d of many: %s" % (
                    self.entries, "-" * 50)))
            fipy.append_lines(os.path.join(self.unit.card, fipy.ERRORS), fipy.SEQUENCES[fipy.ERRORS], entries)
        self.grown += self.card_bytes() - before

    def talk(self):
        self.ticks = 0.0
        self.sessions.append(self.unit.sync())
        self.seen |= self.kept_lines() if self.sound else set()
        return self.sessions[-1]

    def day(self, days=1):
        for _ in range(days):
            self.measure()
            session = self.talk()
        return session

    def history(self, files):
        """Days until the current file has number `files` - 1 and is half full, all of it sent."""
        while len(self.unit.files(self.directory)) < files:
            self.day()
        assert self.day().finished

    def mess(self, happens):
        """Something happens; from here on the judge counts."""
        self.sound, self.grown, self.seen = len(self.sessions), 0, self.seen | self.kept_lines()
        happens(self)

    def lost_by_server(self):
        """A server lost files: only what it still has, or the card, can be asked of it."""
        self.seen = self.kept_lines()

    def judge(self, full=0, slack=2):
        """No reading lost, all in place, at most `full` times the whole card sent again, no loop, nobody stuck."""
        missing = (self.seen | self.card_lines()) - self.kept_lines()
        assert not missing, "lost: %d lines, e.g. %r" % (len(missing), sorted(missing)[0])
        for directory in fipy.DIRECTORIES:
            for name, data in self.unit.files(directory).items():
                ours = open(os.path.join(self.root(), UNIT, directory, name), "rb").read()
                assert ours == data or (name in self.longer and ours.startswith(data)) or name in self.mixed, name
        later = self.sessions[self.sound:]
        sent = sum(session.sent for session in later)
        assert sent <= self.grown + full * self.card_bytes() + slack * fipy.CHUNK, "sent %d of %d" % (sent, self.card_bytes())
        chunks = self.card_bytes() / fipy.CHUNK + 6
        assert max(len(session.pushes) for session in later) <= 2 * chunks + slack
        assert later[-1].finished and not later[-1].errors


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Two that serve whatever `Station` they are given."""
    both = [co2d.Server(co2d.Station(World.settings_of(World(tmp_path_factory.mktemp("empty"), []), 0))) for _ in range(2)]
    [server.start() for server in both]
    yield both
    [server.stop() for server in both]


@pytest.fixture
def world(tmp_path, servers):
    return lambda count=1, **options: World(tmp_path, servers[:count], **options)


# -- what happens to a server -----------------------------------------------------------------------------------------


def losing(happens):
    """The server loses files by this."""
    @functools.wraps(happens)
    def lose(world, *arguments):
        happens(world, *arguments)
        world.lost_by_server()
    return lose


@losing
def wipe_unit(world):
    shutil.rmtree(os.path.join(world.root(), UNIT))


@losing
def wipe_directory(world):
    shutil.rmtree(world.ours())


@losing
def wipe_all_but_the_root(world):
    for name in os.listdir(world.root()):
        shutil.rmtree(os.path.join(world.root(), name))


@losing
def wipe_root(world):
    shutil.rmtree(world.root())


@losing
def remove(world, *numbers):
    for number in numbers:
        os.unlink(world.ours(world.name(number)))


@losing
def shorten(world, number, by):
    os.truncate(world.ours(world.name(number)), max(0, os.path.getsize(world.ours(world.name(number))) - by))


@losing
def leave(world, number, size):
    os.truncate(world.ours(world.name(number)), size)


def shorten_current(world, by):
    shorten(world, int(world.current().split("-")[1][:4]), by)


@losing
def forget(world):
    """What was learned about the unit is gone, as if an older server had written the files."""
    os.unlink(world.ours(seqfile.MEMORY_FILE))
    world.restart()


def both(*happenings):
    def happen(world):
        for one in happenings:
            one(world)
    return happen


def restore_backup(world):
    """The disk of a week ago."""
    shutil.copytree(world.root(), str(world.path / "backup"))
    world.day(7)
    world.stop()
    shutil.rmtree(world.root())
    shutil.copytree(str(world.path / "backup"), world.root())
    world.start()
    world.lost_by_server()


def lengthen(world, number, data):
    name = world.name(number) if number >= 0 else world.current()
    with open(world.ours(name), "ab") as file:
        file.write(data)
    world.longer.add(name)
    world.seen |= world.kept_lines()


def stray(world):
    for name in ("zzz.txt", "readings-9998.tsv", "errors-9998.txt", "readings-.tsv", ".hidden", "core"):
        with open(world.ours(name), "wb") as file:
            file.write(b"not of a unit\n")
    for name in ("zzzz", "readings-9999.tsv", "errors-9999.txt", "~"):
        os.makedirs(world.ours(name))


def in_the_way(world, number, make):
    """What nobody can write to stands where an older file should be."""
    path = world.ours(world.name(number))
    world.longer.add(world.name(number))
    os.rename(path, str(world.path / "elsewhere"))
    make(path, str(world.path / "elsewhere"))


# -- what happens to a card -------------------------------------------------------------------------------------------


def fresh_files(world, sizes, first=0, nickname="other"):
    """Files of these sizes with lines that no other card has."""
    files = {}
    for number, size in enumerate(sizes, first):
        start = world.unit.now + datetime.timedelta(days=1000 + 10 * number)
        lines = "".join(sensors.reading_lines(UNIT, nickname, start, size // 60 + 2, world.unit.period)).encode()
        cut = lines.rfind(b"\n", 0, size) + 1
        files[world.name(number)] = lines[:cut] if size < SMALL else lines[:lines.find(b"\n", size - 1) + 1]
    return files


def fresh_card(world, *sizes, first=0):
    files = fresh_files(world, sizes, first)
    world.unit.swap_card(*([files] if world.directory == fipy.READINGS else [None, files]))


def card_with_a_gap(world, number):
    os.unlink(os.path.join(world.unit.card, world.directory, world.name(number)))


@losing
def odd_sizes(world, *sizes):
    """The card's files are of sizes that no unit of ours makes, and were sent long ago."""
    files = fresh_files(world, sizes)
    for name, data in files.items():
        world.unit.write(name, data, world.directory)
        fipy.write_file(world.ours(name), data)
    world.unit.set_position(world.directory, *max((name, len(data)) for name, data in files.items()))
    world.restart()


def half_a_line(world):
    """The power fails while a line is written; next day the rest is."""
    world.measure()
    path = os.path.join(world.unit.card, world.directory, world.current())
    with open(path, "rb") as file:
        data = file.read()
    os.truncate(path, len(data) - 20)
    world.talk()
    with open(path, "ab") as file:
        file.write(data[-20:])


def swap_back(world):
    """Three days on another card, then the first one again, with its position: it need not send its past once more."""
    shutil.copytree(world.unit.card, str(world.path / "first card"))
    fresh_card(world, 2000)
    world.day(3)
    shutil.rmtree(world.unit.card)
    shutil.copytree(str(world.path / "first card"), world.unit.card)
    world.mixed |= set(world.unit.files(fipy.READINGS)) | set(world.unit.files(fipy.ERRORS))


# -- what happens on the way ------------------------------------------------------------------------------------------


def is_push(pieces):
    return pieces[0].startswith(b"PUT ")


def on_push(world, number, happens):
    """`happens(exchange, pieces)` to the push of that number, counted from now, and a day passes."""
    count = iter(range(-number, 1000000))

    def road(exchange, pieces):
        return happens(exchange, pieces) if is_push(pieces) and next(count) == 0 else exchange(pieces)

    world.unit.road = road
    world.day()
    del world.unit.road


def lose_reply(exchange, pieces):
    exchange(pieces)
    raise socket.error("connection lost")


def lose_request(exchange, pieces):
    raise socket.error("connection lost")


def cut_request(exchange, pieces):
    link = exchange.__self__
    with socket.create_connection((link._host, link._port), timeout=20) as sock:
        sock.sendall(b"".join(pieces)[:-len(pieces[-1]) // 2])
    raise socket.error("connection lost")


def cut_reply(exchange, pieces):
    """The status arrives, the body does not: the unit counts the chunk as sent and ends its day."""
    return exchange(pieces).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def send_twice(exchange, pieces):
    exchange(pieces)
    return exchange(pieces)


def replay(world, pieces):
    """A request comes once more, long after it was made; nobody reads the reply."""
    answer(world.servers[0].station, pieces)


def replay_old(world):
    """All requests of a day, once more two days later, in another order."""
    old = []

    def road(exchange, pieces):
        old.append(pieces)
        return exchange(pieces)

    world.unit.road = road
    world.day()
    del world.unit.road
    world.day()
    random.Random(1).shuffle(old)
    for pieces in old:
        replay(world, pieces)
    world.seen |= world.kept_lines()


# -- the table --------------------------------------------------------------------------------------------------------
# What happens, how many files there were, and how often the whole card may be sent again at most: what must be sent
# anew because the server lost it or the unit does not know better, plus one.

K = 1024
SITUATIONS = [
    ("nothing happens", lambda w: None, 3, 0),
    ("the unit's directory is wiped", wipe_unit, 3, 2),
    ("the directory of the sequence is wiped", wipe_directory, 3, 2),
    ("all units are wiped", wipe_all_but_the_root, 3, 2),
    ("the data directory itself is removed", wipe_root, 3, 2),
    ("one older file is missing", lambda w: remove(w, 1), 4, 1),
    ("the oldest file is missing", lambda w: remove(w, 0), 4, 1),
    ("several older files are missing", lambda w: remove(w, 0, 2, 3), 5, 1),
    ("the current file is missing", lambda w: os.unlink(w.ours(w.current())) or w.lost_by_server(), 3, 1),
    ("the last file is shorter by 1", lambda w: shorten_current(w, 1), 3, 0),
    ("the last file is shorter by 1000", lambda w: shorten_current(w, 1000), 3, 0),
    ("the last file is empty", lambda w: shorten_current(w, 10 ** 6), 3, 1),
    ("an older file is shorter by 1", lambda w: shorten(w, 1, 1), 4, 1),
    ("an older file is shorter by 1000", lambda w: shorten(w, 1, 1000), 4, 1),
    ("an older file is empty", lambda w: shorten(w, 1, 10 ** 6), 4, 1),
    ("an older file ends where a chunk did", lambda w: leave(w, 1, SMALL), 4, 1),
    ("two older files are short", both(lambda w: shorten(w, 0, 50), lambda w: shorten(w, 2, 5000)), 4, 1),
    ("what was learned is lost", forget, 4, 1),
    ("what was learned is lost and an older file is missing", both(lambda w: remove(w, 1), forget), 4, 1),
    ("what was learned is lost and an older file is shorter by 1", both(lambda w: shorten(w, 1, 1), forget), 4, 1),
    ("what was learned is lost and an older file ends where a chunk did", both(lambda w: leave(w, 1, SMALL), forget), 4, 1),
    ("the disk of a week ago is restored", restore_backup, 3, 1),
    ("the disk of a week ago is restored without what was learned", both(restore_backup, forget), 3, 1),
    ("a fresh card with 1 file, shorter than ours", lambda w: fresh_card(w, 3 * K), 3, 1),
    ("a fresh card with 1 file, longer than ours", lambda w: fresh_card(w, 13 * K), 1, 1),
    ("a fresh card with 1 file of one line", lambda w: fresh_card(w, 200), 3, 1),
    ("an empty fresh card", fresh_card, 3, 1),
    ("a fresh card with 2 files, fewer than ours", lambda w: fresh_card(w, 12 * K, 5 * K), 3, 1),
    ("a fresh card with 2 files, more than ours", lambda w: fresh_card(w, 12 * K, 5 * K), 1, 1),
    ("a fresh card with 6 files, more than ours", lambda w: fresh_card(w, *[12 * K] * 5, 3 * K), 3, 1),
    ("a fresh card with 6 files, fewer than ours", lambda w: fresh_card(w, *[12 * K] * 5, 3 * K), 7, 1),
    ("a fresh card with 6 short files", lambda w: fresh_card(w, *[2 * K] * 6), 3, 1),
    ("a fresh card that starts at number 3", lambda w: fresh_card(w, 12 * K, 2 * K, first=3), 2, 1),
    ("a fresh card that starts at number 3 with few lines", lambda w: fresh_card(w, 300, first=3), 6, 1),
    ("the first card comes back after another", swap_back, 3, 1),
    ("our current file is longer than the unit's", lambda w: lengthen(w, -1, b"left by somebody\n" * 9), 3, 0),
    ("our older file is longer than the unit's", lambda w: lengthen(w, 1, b"left by somebody\n" * 9), 3, 0),
    ("our older file is longer and another is missing",
     both(lambda w: remove(w, 0), lambda w: lengthen(w, 1, b"left by somebody\n" * 9)), 4, 1),
    ("stray files and directories sort last", stray, 3, 0),
    ("stray files and directories sort last, and an older file is missing", both(stray, lambda w: remove(w, 1)), 4, 1),
    ("the saved position is lost", lambda w: w.unit.lose_state(), 3, 1),
    ("the saved position is lost and the server wiped", both(wipe_unit, lambda w: w.unit.lose_state()), 3, 1),
    ("the card lacks a file that we have", lambda w: card_with_a_gap(w, 1), 4, 0),
    ("the card lacks a file and the server is wiped", both(lambda w: card_with_a_gap(w, 1), wipe_unit), 5, 2),
    ("the card lacks its first file and the server is wiped", both(lambda w: card_with_a_gap(w, 0), wipe_unit), 4, 2),
    ("files of odd sizes, and nothing learned", lambda w: odd_sizes(w, 3 * K, 12 * K, 100, 5 * K), 1, 1),
    ("an ack is lost", lambda w: on_push(w, 1, lose_reply), 3, 0),
    ("an ack is lost after a wipe", both(wipe_unit, lambda w: on_push(w, 1, lose_reply)), 3, 2),
    ("the ack that asks for an older file is lost", both(lambda w: remove(w, 1), lambda w: on_push(w, 0, lose_reply)), 4, 1),
    ("the ack that asks for an older file is cut", both(lambda w: remove(w, 1), lambda w: on_push(w, 0, cut_reply)), 4, 1),
    ("the ack is cut on the way", lambda w: on_push(w, 1, cut_reply), 3, 0),
    ("an upload is cut in the middle", lambda w: on_push(w, 1, cut_request), 3, 0),
    ("an upload never arrives", lambda w: on_push(w, 0, lose_request), 3, 0),
    ("a push arrives twice", lambda w: on_push(w, 1, send_twice), 3, 0),
    ("old requests are replayed", replay_old, 3, 0),
    ("old requests are replayed after a wipe", both(replay_old, wipe_unit), 3, 2),
    ("the last line is incomplete and completed next day", half_a_line, 3, 0),
]


WHERE = [(fipy.READINGS, False), (fipy.READINGS, True), (fipy.ERRORS, False)]


@pytest.mark.parametrize("directory, restarted", WHERE, ids=["readings", "readings, and a restart", "errors"])
@pytest.mark.parametrize("happens, files, full", [row[1:] for row in SITUATIONS], ids=[row[0] for row in SITUATIONS])
def test_it_ends_well_when(world, happens, files, full, directory, restarted):
    one = world(directory=directory)
    one.history(files)
    one.mess(happens)
    if restarted:
        one.restart()
    one.day(QUIET)
    one.judge(full)


def test_files_of_the_real_size_end_well_too(world, monkeypatch):
    monkeypatch.setattr(fipy, "FILE_SIZE", 102400)
    monkeypatch.setattr(seqfile, "FILE_SIZE", 102400)
    one = world()
    one.unit.measure(50)
    one.talk()
    one.mess(both(lambda w: leave(w, 1, 102400), forget))
    one.day(QUIET)
    one.judge(full=1)
    assert [len(data) >= 102400 for data in one.unit.files().values()] == [True, True, False]


# -- what stands in the way -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda path, _: os.mkdir(path), lambda path, _: os.mkfifo(path),
                                  lambda path, elsewhere: os.symlink(elsewhere, path)], ids=["directory", "pipe", "link"])
def test_a_file_that_cannot_be_stored_is_never_asked_for(world, make):
    one = world()
    one.history(4)
    one.restart()
    in_the_way(one, 1, make)
    sessions = [one.day() for _ in range(QUIET)]
    assert all(session.finished and not session.errors for session in sessions)
    assert sum(len(session.pushes) for session in sessions) <= 3 * QUIET


def test_a_directory_where_the_current_file_should_be_costs_nothing_but_time(world):
    one = world()
    one.history(2)
    name = one.current()
    in_the_way(one, 1, lambda path, _: os.mkdir(path))
    one.mess(lambda w: None)
    assert [one.day().error for _ in range(3)] == ["push: 400"] * 3
    os.rmdir(one.ours(name))
    one.day(2)
    one.judge(full=1)


# -- a slow link ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directory, pushes", [(fipy.READINGS, 1), (fipy.READINGS, 2), (fipy.ERRORS, 3), (fipy.READINGS, 5)])
def test_a_link_so_slow_that_the_time_ends_in_the_middle_catches_up_after_a_wipe(world, pushes, directory):
    one = world(directory=directory, period=datetime.timedelta(hours=12))
    one.measure(20 * 7)
    while not one.talk().finished:
        pass
    one.mess(wipe_unit)
    one.unit.cost = one.unit.budget / (pushes + 2)
    days = 0
    while not one.day().finished:
        days += 1
        assert days < 60 * 3 / pushes
    one.unit.cost = 0.7
    one.day()
    one.judge(full=2)


@pytest.mark.parametrize("pushes", range(1, 9))
def test_no_rhythm_of_a_slow_link_makes_a_loop_of_asking(world, pushes):
    one = world(period=datetime.timedelta(hours=12))
    one.mess(lambda w: odd_sizes(w, 3 * K, 12 * K, 7 * K, 100, 4 * K, 5 * K, 2 * K))
    one.unit.cost = one.unit.budget / (pushes + 2)
    days = 0
    while not one.day().finished or days < 3:
        days += 1
        assert days < 80
    one.unit.cost = 0.7
    one.day()
    one.judge(full=3)


# -- strange names on the card ----------------------------------------------------------------------------------------
# The list of cases/README.md. Some sort before the readings, some behind; the firmware takes some for its readings, and
# appends rows to the last of those.

STRANGE = ["._readings-0000.tsv", ".~lock.readings-0000.tsv#", "readings-0000 - Copy.tsv", "readings-0000.tsv~", "vadsø.tsv",
           "readings-0001.tsv.bak", "SYSTEM~1", "readings-0000 (1).tsv", "readings-0000_old.tsv", "readings-0001_old.tsv",
           "\udcff\udcfe", "readings-0001.tsv.tsv", "zz " * 60]


def card_rows(world):
    """All lines that the unit takes for its readings."""
    files = world.unit.files(fipy.READINGS)
    return {line for name, data in files.items() if seqfile.belongs(name, seqfile.READINGS) for line in whole_lines(data)}


def imported(world):
    """Unit, date and time of all readings in a database that is made from what the server holds."""
    settings = world.settings_of(0)
    if os.path.exists(settings.db):
        os.unlink(settings.db)
    importer.import_new(settings.archive(), now=2e9)
    with importer.open_db(settings.db) as db:
        return sorted(db.execute("SELECT unit_id, date, time FROM co2_readings"))


def measured(world):
    """The same, of what lies on the card."""
    fields = [line.decode().split("\t") for line in card_rows(world)]
    return sorted((unit, date, time) for unit, _, date, time, *_ in fields)


def all_rows_come(world, nights=6):
    for _ in range(nights):
        session = world.day()
        assert card_rows(world) <= world.kept_lines()
        assert session.error in (None, "push: 503") and not session.over_time
    assert set(measured(world)) <= set(imported(world))
    again = 2 * world.card_bytes() * len(world.servers) + 2 * nights * fipy.CHUNK      # two chunks a night that are not taken
    assert sum(session.sent for session in world.sessions[-nights:]) < again


def place(world, name, directory=fipy.READINGS, content=None):
    """A file with that name, as large as two chunks and a half; what looks like readings holds the first readings."""
    if content is None:
        content = b"whatever\n" * 1000
        if seqfile.belongs(name, seqfile.READINGS):
            content = b"".join(line + b"\n" for line in whole_lines(next(iter(world.unit.files().values()), b""))[:40])
    world.unit.write(name, content, directory)


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("files", [1, 2])
def test_all_rows_come_night_after_night_whatever_else_lies_among_the_readings(world, name, files):
    one = world()
    one.history(files)
    place(one, name)
    all_rows_come(one)
    assert imported(one) == sorted(set(measured(one)))          # what a copy has repeated counts once


@pytest.mark.parametrize("name", STRANGE)
def test_all_rows_come_from_a_card_with_a_strange_file_that_was_there_first(world, name):
    one = world()
    one.unit.measure(3)
    place(one, name)
    all_rows_come(one)


@pytest.mark.parametrize("name", ["vadsø.tsv", "readings-0000.tsv~", "._readings-0000.tsv"])
@pytest.mark.parametrize("size", [10, 4096, 9000])
def test_a_unit_with_nothing_but_a_strange_file_sends_its_readings_once_it_has_some(world, name, size):
    one = world()
    one.unit.write(name, b"x" * size)
    for _ in range(3):                                          # whoever installs it switches it on and off
        one.unit.power_on()
    all_rows_come(one)


@pytest.mark.parametrize("name", ["vadsø.tsv", "readings-0001.tsv.bak"])
@pytest.mark.parametrize("happens", [lambda w: w.restart(), wipe_root, forget, lambda w: w.unit.lose_state(), lambda w: remove(w, 1),
                                     lambda w: fresh_card(w, 12 * 1024, 3000), lambda w: shorten(w, 2, 500)],
                         ids=["restart", "wiped", "forgotten", "state lost", "older missing", "fresh card", "shorter"])
def test_what_else_happens_to_a_unit_with_a_strange_file_ends_well(world, name, happens):
    one = world()
    one.history(3)
    place(one, name)
    one.day(2)
    happens(one)
    place(one, name)
    all_rows_come(one, 4)


def test_strange_files_on_two_servers(world):
    one = world(2)
    one.history(2)
    place(one, "vadsø.tsv")
    all_rows_come(one, 3)
    one.stop(0)
    one.day(3)
    one.start(0)
    for _ in range(3):
        one.day()
        assert card_rows(one) <= one.kept_lines()


@pytest.mark.parametrize("name", STRANGE + ["zzz", "errors-0000.txt~", "errors-0000 (1).txt"])
def test_strange_names_in_errors_keep_no_readings_back(world, name):
    one = world()
    one.history(1)
    one.unit.log_error("Signal quality low", "WARN")
    place(one, name, fipy.ERRORS, b"whatever\n" * 1000)
    for _ in range(3):
        one.unit.log_error("Signal quality low", "WARN")
        session = one.day()
        assert session.finished and session.error is None and card_rows(one) <= one.kept_lines()


# -- two servers ------------------------------------------------------------------------------------------------------
# One position for both: the second gets data only while the first fails. Together they have everything, and whoever is
# reached has it all from then on.


def has_all(world, index):
    return all(open(world.ours(name, index), "rb").read() == data for name, data in world.unit.files(world.directory).items())


@pytest.mark.parametrize("directory", fipy.DIRECTORIES)
def test_two_servers_take_turns_and_each_has_all_that_it_was_up_for(world, directory):
    one = world(2, directory=directory)
    one.history(3)
    assert has_all(one, 0) and not os.path.exists(one.ours(index=1))
    one.stop(0)
    one.day(6)
    assert has_all(one, 1)
    one.start(0)
    one.day(3)
    assert has_all(one, 0)
    assert not (one.card_lines() - one.kept_lines())


def test_the_second_server_comes_in_when_the_first_fails_in_the_middle(world):
    one = world(2)
    one.history(3)
    count = iter(range(10 ** 6))

    def road(exchange, pieces):
        if exchange.__self__.url == one.urls[0] and is_push(pieces) and next(count) % 3 == 2:
            raise socket.error("connection lost")
        return exchange(pieces)

    one.unit.road = road
    one.mess(wipe_unit)
    one.day(8)
    del one.unit.road
    one.day(3)
    assert has_all(one, 0)
    assert one.sessions[-1].finished and len(one.sessions[-1].pushes) <= 3


def test_a_unit_that_is_moved_to_a_new_server_brings_all_its_past(world):
    one = world(2)
    one.history(4)
    one.unit.urls = one.urls[1:]
    one.mess(lambda w: None)
    one.day(QUIET)
    assert has_all(one, 1)


# -- what else a day consists of --------------------------------------------------------------------------------------


def test_broken_ping_storage_keeps_no_data_back(world):
    one = world()
    one.history(1)
    shutil.rmtree(str(one.path / "var0" / "pings"))
    fipy.write_file(str(one.path / "var0" / "pings"), b"a file where the directory should be")
    one.mess(lambda w: None)
    one.day(2)
    one.judge()
    os.unlink(str(one.path / "var0" / "pings"))
    one.day()
    assert (one.path / "var0" / "pings" / "pings-0000.tsv").read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("nickname", ["lab desk", "vadsø", " ", "a&b=c#d?e%20", "", "None"])
def test_a_unit_with_any_nickname_delivers(world, nickname):
    one = world()
    one.unit.nickname = nickname
    one.day(2)
    one.judge()
    row = (one.path / "var0" / "pings" / "pings-0000.tsv").read_bytes().split(b"\n")[0].split(b"\t")
    assert (len(row), row[1]) == (5, UNIT.encode())


def make_update(world, name, files):
    for path, data in files.items():
        fipy.write_file(os.path.join(world.root(), UNIT, "updates", name, path), data)


UPDATES = [
    ("no updates directory", lambda w: None),
    ("an empty updates directory", lambda w: os.makedirs(os.path.join(w.root(), UNIT, "updates"))),
    ("a file where the updates directory should be", lambda w: fipy.write_file(os.path.join(w.root(), UNIT, "updates"), b"")),
    ("an empty update", lambda w: os.makedirs(os.path.join(w.root(), UNIT, "updates", "update-2020-01-14a"))),
    ("an update with an empty directory", lambda w: os.makedirs(os.path.join(w.root(), UNIT, "updates", "update-2020-01-14a", "flash"))),
    ("a stray file", lambda w: fipy.write_file(os.path.join(w.root(), UNIT, "updates", "update-9.txt"), b"x")),
    ("a hidden file", lambda w: fipy.write_file(os.path.join(w.root(), UNIT, "updates", ".DS_Store"), b"x")),
    ("a half-copied update", lambda w: make_update(w, ".update-2020-01-14a", {"flash/main.py": b"x"})),
    ("an update with a name that no unit can ask for", lambda w: make_update(w, "update-2020-01-14a", {"flash/a b.py": b"x"})),
    ("a stray directory", lambda w: make_update(w, "zzz", {"flash/main.py": b"x"})),
]


@pytest.mark.parametrize("place", [row[1] for row in UPDATES], ids=[row[0] for row in UPDATES])
def test_what_is_no_update_keeps_no_unit_from_its_data(world, place):
    one = world()
    one.mess(lambda w: place(w))
    one.day(2)
    one.judge()
    assert one.unit.flash == {}
    assert all(len(session.requests) - len(session.pushes) == 2 for session in one.sessions)


@pytest.mark.parametrize("place", [row[1] for row in UPDATES[3:]], ids=[row[0] for row in UPDATES[3:]])
def test_a_complete_update_is_taken_once_beside_what_is_none(world, place):
    one = world()
    place(one)
    make_update(one, "update-2020-01-15a", {"flash/main.py": b"new", "conf-patch/ou-id.json": b'{"site_code": "new-name"}'})
    one.mess(lambda w: None)
    one.day(2)
    one.judge()
    assert (one.unit.flash, one.unit.nickname) == ({"main.py": b"new"}, "new-name")
    assert [len(session.requests) - len(session.pushes) for session in one.sessions] == [2 + 3 + 2, 2]


def test_with_asking_switched_off_nothing_is_sent_again_and_nobody_is_stuck(world):
    one = world(settings={"ask_older": False})
    one.history(4)
    remove(one, 1)
    one.mess(lambda w: None)
    sessions = [one.day() for _ in range(QUIET)]
    assert all(session.finished and not session.errors for session in sessions)
    assert sum(len(session.pushes) for session in sessions) <= 3 * QUIET


@pytest.mark.parametrize("days", [-400, -1, -0.02, 0.02, 1, 400])
@pytest.mark.parametrize("whose", ["server", "unit"])
def test_a_clock_that_jumps_changes_nothing(world, whose, days):
    one = world()
    one.history(3)
    one.mess(lambda w: remove(w, 1))
    one.day()
    fresh = fresh_files(one, [5 * K], first=9)                  # and old bytes are set aside under names that were used
    lengthen(one, -1, fresh[one.name(9)])
    one.longer.clear()
    if whose == "server":
        one.skew = days * 86400
    else:
        one.unit.now += datetime.timedelta(days=days)
    one.day(QUIET)
    one.judge(full=1)


# -- anything at any time ---------------------------------------------------------------------------------------------


def wipe_something(world, rng):
    if os.path.isdir(world.ours()):
        rng.choice([wipe_unit, wipe_directory, wipe_all_but_the_root])(world)


def spoil_some_file(world, rng):
    """Truncate or remove one of our copies, maybe also what was learned."""
    names = [name for name in sorted(os.listdir(world.ours())) if rng.random() < 0.3] if os.path.isdir(world.ours()) else []
    for name in names[:2]:
        path = world.ours(name)
        os.unlink(path) if rng.random() < 0.3 else os.truncate(path, rng.randint(0, os.path.getsize(path)))
    world.lost_by_server()


def change_card(world, rng):
    first = rng.choice([0, 0, 0, 2])
    fresh_card(world, *[rng.choice([12 * K, 12 * K, 12 * K, 500]) for _ in range(rng.randint(0, 3))], rng.randint(200, 11 * K), first=first)


def rough_road(world, rng, old):
    """Requests and replies are lost or cut, arrive twice, or late and in another order."""
    def road(exchange, pieces):
        if is_push(pieces):
            old.append(pieces)
        chance = rng.random()
        if chance < 0.1:
            return rng.choice([lose_reply, lose_request, cut_request, cut_reply, send_twice])(exchange, pieces)
        reply = exchange(pieces)
        if chance > 0.9 and old:
            replay(world, rng.choice(old))
        return reply
    return road


def chaos(world, rng, days):
    old = []
    for _ in range(days):
        happens = rng.choice(["", "", "", "wipe", "spoil", "spoil", "card", "restart", "restart", "state", "slow"])
        if happens in ("wipe", "spoil", "card"):
            # An old request does not outlive the card it was read from. Right after a loss of what it brought, nobody
            # could tell it from the unit's own.
            old.clear()
            {"wipe": wipe_something, "spoil": spoil_some_file, "card": change_card}[happens](world, rng)
        elif happens == "restart":
            world.restart()
        elif happens == "state":
            world.unit.lose_state()
        world.unit.cost = rng.choice([0.7, 0.7, 20, 70])
        world.unit.road = rough_road(world, rng, old)
        world.day()
    world.unit.cost = 0.7
    del world.unit.road


@pytest.mark.parametrize("directory", fipy.DIRECTORIES)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_in_forty_days_ends_well(world, seed, directory):
    one = world(directory=directory)
    rng = random.Random(seed)
    one.history(2)
    one.mess(lambda w: chaos(w, rng, 40))
    one.mess(lambda w: None)
    one.day(6)
    one.judge(full=3)
    assert max(len(session.pushes) for session in one.sessions[-2:]) <= 8


@pytest.mark.parametrize("seed", [*range(4), *[pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 60)]])
def test_whatever_happens_in_forty_days_all_rows_come_in_spite_of_strange_files(world, seed):
    one, rng = world(), random.Random(seed)
    names = rng.sample(["._readings-0000.tsv", "readings-0000.tsv~", "vadsø.tsv", "readings-0001.tsv.bak", "SYSTEM~1", "\udcff\udcfe"], 3)

    def happen(world):
        for name in names:
            if rng.random() < 0.3:
                place(world, name)
        chaos(world, rng, 1)

    one.history(2)
    for _ in range(40):
        happen(one)
    for name in names:
        place(one, name)
    sessions = [one.day() for _ in range(8)]                    # three nights for each that lies before short files
    assert card_rows(one) <= one.kept_lines()
    assert not any(session.over_time for session in sessions)
    assert {session.error for session in sessions} <= {None, "push: 503"}
