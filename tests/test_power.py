"""Any system call that stores may fail, and the power may go at any moment: nothing acknowledged is lost.

`Disk` stands in for `os` in seqfile. It writes real files and knows besides what of them a power cut would leave: bytes
that were written but not synced may come back as anything that was there before, bytes of a failed sync are lost though
they can still be read until their pages are dropped (the kernel reports them only once), and names may vanish whose
directory was not synced.
"""

import errno
import os
import random
import shutil
import stat

import pytest

import seqfile

NOW = 1600000000.0
def seeds(number, at_once):
    """So many, of which the first are run always."""
    return [*range(at_once), *[pytest.param(seed, marks=pytest.mark.long) for seed in range(at_once, number)]]


FAULTS = [0, 0, 0.02, 0.2]              # how often a call fails, a while each


class Killed(BaseException):
    """The process ends in the middle of a call; no `except` of its own sees it."""


class Inode:
    """What the disk itself holds of a file, and which of the bytes that can be read it does not hold."""

    def __init__(self):
        self.durable, self.dirty, self.lost = b"", set(), set()

    def after_a_power_cut(self, now, rng):
        """`now`, as it can be read, with any of the bytes that were not synced as they were; or all of them."""
        if rng.random() < 0.5:
            return self.durable
        now = bytearray(now)
        for place in self.lost | {place for place in self.dirty if rng.random() < 0.5}:
            now[place:place + 1] = self.durable[place:place + 1] or b"\0"
        return bytes(now)


class Disk:
    """`os`, but for the calls that store."""

    def __init__(self, root, rng):
        self.root, self.rng, self.rate, self.deadly = root, rng, 0.0, 0.0
        self.inodes = {}
        self.names = {os.stat(str(root)).st_ino: set()}         # directory: the names in it that are durable

    def __getattr__(self, name):
        return getattr(os, name)

    def _may_fail(self):
        if self.rng.random() < self.rate * self.deadly:
            raise Killed
        if self.rng.random() < self.rate:
            raise OSError(self.rng.choice([errno.EIO, errno.ENOSPC, errno.EMFILE]), "the disk fails")

    def _inode(self, fd):
        return self.inodes.setdefault(os.fstat(fd).st_ino, Inode())

    def open(self, *args, **kwargs):
        self._may_fail()
        fd = os.open(*args, **kwargs)
        if os.fstat(fd).st_size == 0:                           # perhaps new, with the number of one that was removed
            self.inodes.pop(os.fstat(fd).st_ino, None)
        return fd

    def mkdir(self, *args, **kwargs):
        self._may_fail()
        os.mkdir(*args, **kwargs)

    def rename(self, *args, **kwargs):
        self._may_fail()
        os.rename(*args, **kwargs)

    def pread(self, *args):
        self._may_fail()
        return os.pread(*args)

    def pwrite(self, fd, data, offset):
        self._may_fail()
        written = os.pwrite(fd, data[:self.rng.choice([len(data), self.rng.randint(1, len(data))])], offset)
        inode, places = self._inode(fd), set(range(offset, offset + written))
        inode.dirty, inode.lost = inode.dirty | places, inode.lost - places
        self._may_fail()
        return written

    def ftruncate(self, fd, size):
        self._may_fail()
        os.ftruncate(fd, size)
        inode = self._inode(fd)
        inode.dirty, inode.lost = ({place for place in places if place < size} for places in (inode.dirty, inode.lost))

    def fdatasync(self, fd):
        inode = self._inode(fd)
        try:
            self._may_fail()
        except OSError:
            inode.lost, inode.dirty = inode.lost | inode.dirty, set()
            raise
        now = bytearray(os.pread(fd, os.fstat(fd).st_size, 0))
        for place in inode.lost:
            now[place:place + 1] = inode.durable[place:place + 1] or b"\0"
        inode.durable, inode.dirty = bytes(now), set()

    def fsync(self, fd):
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            return self.fdatasync(fd)
        self._may_fail()
        self.names[os.fstat(fd).st_ino] = set(os.listdir(fd))

    def posix_fadvise(self, fd, *_):
        """The pages are dropped: what is read from now on is what the disk holds."""
        inode = self._inode(fd)
        for place in inode.lost:
            os.pwrite(fd, inode.durable[place:place + 1] or b"\0", place)
        inode.lost = set()

    def cut_power(self):
        """What is not durable is gone, or half of it."""
        for parent, directories, files in os.walk(str(self.root)):
            durable = self.names.get(os.stat(parent).st_ino, set())
            for name in sorted({*directories, *files} - durable):
                if self.rng.random() < 0.5 and name in files:
                    os.unlink(os.path.join(parent, name))
                    files.remove(name)
                elif self.rng.random() < 0.5 and name in directories:
                    shutil.rmtree(os.path.join(parent, name))
                    directories.remove(name)
            for name in files:
                self._lose_bytes(os.path.join(parent, name))

    def _lose_bytes(self, path):
        with open(path, "rb+") as file:
            inode, now = self._inode(file.fileno()), file.read()
            inode.durable, inode.dirty, inode.lost = inode.after_a_power_cut(now, self.rng), set(), set()
            file.seek(0)
            file.truncate()
            file.write(inode.durable)


class Unit:
    """Sends its files from beginning to end, over and over, and goes where the acks say."""

    def __init__(self, rng, root):
        self.rng, self.directory = rng, root / "u" / "data" / "readings"
        self.files = {"readings-%04d.tsv" % n: b"".join(b"%d line %d\n" % (n, k) for k in range(rng.randint(3, 40)))
                      for n in range(rng.randint(1, 4))}
        self.acked = dict.fromkeys(self.files, 0)
        self.at = min(self.files), 0

    def send(self, inbox, now, most=60):
        """A chunk; what becomes of it. None at the end of a file, the unit is at the next then."""
        name, offset = self.at
        chunk = self.files[name][offset:offset + self.rng.randint(1, most)]
        if not chunk:
            names = sorted(self.files)
            self.at = names[(names.index(name) + 1) % len(names)], 0
            return None
        receipt = inbox.receive(seqfile.Chunk(("u", "data", "readings"), name, offset, chunk, now))
        if receipt.kind != "gap":
            self.acked[name] = max(self.acked[name], offset + len(chunk))
        self.at = receipt.ack
        return receipt

    def begin_anew(self):
        """One of its files has other lines from somewhere on: its storage was lost."""
        name = self.rng.choice(sorted(self.files))
        kept = self.rng.randint(0, len(self.files[name]))
        self.files[name] = self.files[name][:kept] + b"other\n" * self.rng.randint(1, 20)
        self.acked[name], self.at = min(self.acked[name], kept), (name, 0)

    def lost(self):
        """Files of which not all is there that was acknowledged."""
        held = {name: (self.directory / name).read_bytes() if (self.directory / name).exists() else b""
                for name in self.files}
        return {name: held[name] for name, end in self.acked.items() if held[name][:end] != self.files[name][:end]}


@pytest.mark.parametrize("seed", seeds(60, 12))
def test_no_acknowledged_byte_is_lost_whatever_fails_and_whenever_the_power_goes(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    disk, unit = Disk(tmp_path, rng), Unit(rng, tmp_path)
    monkeypatch.setattr(seqfile, "os", disk)
    monkeypatch.setattr(seqfile, "FILE_SIZE", 150)
    inbox, now = seqfile.Inbox(str(tmp_path), sync=disk.fdatasync), NOW
    for _ in range(300):
        disk.rate, disk.deadly, now = rng.choice(FAULTS), rng.choice([0, 0, 0.3]), now + rng.choice([1, 1, 5, 90000])
        try:
            unit.send(inbox, now)
        except OSError:
            pass
        except Killed:
            inbox = seqfile.Inbox(str(tmp_path), sync=disk.fdatasync)
        disk.rate = 0
        if rng.random() < 0.05:
            disk.cut_power()
            inbox = seqfile.Inbox(str(tmp_path), sync=disk.fdatasync)
        assert unit.lost() == {}
        if rng.random() < 0.02:
            unit.begin_anew()
    while unit.acked != {name: len(content) for name, content in unit.files.items()}:
        now += 60
        unit.send(inbox, now)
    disk.cut_power()
    assert unit.lost() == {}


@pytest.mark.parametrize("seed", seeds(30, 6))
def test_no_row_is_lost_that_was_said_to_be_stored(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    disk, stored = Disk(tmp_path, rng), []
    monkeypatch.setattr(seqfile, "os", disk)
    match = seqfile.PINGS
    rows = seqfile.RowLog(str(tmp_path / "pings"), match, 100, disk.fdatasync)
    for number in range(300):
        disk.rate, row = rng.choice(FAULTS), b"row %04d\n" % number
        rows.append(row, lambda file, problem: stored.append(row) if problem is None else None)
        disk.rate = 0
        if rng.random() < 0.05:
            disk.cut_power()
            rows = seqfile.RowLog(str(tmp_path / "pings"), match, 100, disk.fdatasync)
        held = [line for file in sorted(tmp_path.rglob("*.tsv"))
                for line in file.read_bytes().splitlines(keepends=True)]
        assert [row for row in held if row in stored] == stored
