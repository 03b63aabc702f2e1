"""seqfile: names, the decision table, durability, and what a directory learns about its unit."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
import threading
from unittest import mock

import pytest

import seqfile

MATCH = seqfile.Match("readings-", ".tsv")
NOW = 1_570_418_619.980794                                      # 2019-10-07T03:23:39.980794Z
DAY = 86400.0
READINGS = ("data", "readings")


class FailingDisk:
    """A sync that fails while `broken`, and remembers what it was asked for."""

    def __init__(self):
        self.broken, self.calls = False, 0

    def __call__(self, fd):
        self.calls += 1
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        os.fsync(fd)


@pytest.fixture
def inbox(tmp_path):
    return seqfile.Inbox(str(tmp_path))


def receive(inbox, name, offset, chunk, now=NOW, unit="u"):
    return inbox.receive(seqfile.Chunk((unit, *READINGS), name, offset, chunk, now))


def put(inbox, name, content, now=NOW):
    """Send a whole file in chunks, as a unit does; the acks."""
    return [receive(inbox, name, at, content[at:at + 4096], now).ack for at in range(0, len(content), 4096)]


def content(root, name, unit="u"):
    return (root / unit / "data" / "readings" / name).read_bytes()


def write(root, name, content, unit="u"):
    """A file that was there before."""
    (root / unit / "data" / "readings").mkdir(parents=True, exist_ok=True)
    (root / unit / "data" / "readings" / name).write_bytes(content)


def put_aside(root, unit="u"):
    folder = root / unit / "set-aside" / "data" / "readings"
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, name", [(0, "readings-0000.tsv"), (42, "readings-0042.tsv"), (10000, "readings-10000.tsv")])
def test_a_number_makes_a_name_and_comes_back_from_it(number, name):
    assert seqfile.make_sequence_filename(number, MATCH) == name
    assert seqfile.extract_sequence_number(name, MATCH) == number


@pytest.mark.parametrize("name", ["readings-.tsv", "readings-12.txt", "reading-0001.tsv", "readings-0x01.tsv", "readings-٣.tsv",
                                  ".readings-0001.tsv", "readings-0001.tsv~", "", "readings-%s.tsv" % ("9" * 5000)])
def test_names_outside_the_sequence_have_no_number(name):
    assert seqfile.extract_sequence_number(name, MATCH) is None


def test_ten_thousand_follows_9999_and_is_found_again(tmp_path):
    (tmp_path / "readings-9999.tsv").write_bytes(b"x")
    assert seqfile.next_sequence_filename(str(tmp_path), MATCH) == "readings-10000.tsv"
    (tmp_path / "readings-10000.tsv").write_bytes(b"x")
    assert seqfile.choose_append_file(str(tmp_path), MATCH) == str(tmp_path / "readings-10000.tsv")


def test_stray_files_and_directories_are_not_the_last_file(tmp_path):
    for name in ("readings-0001.tsv", "zzz.tsv", "readings-9.tsv.swp"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "readings-0007.tsv").mkdir()
    assert seqfile.files_in_sequence(str(tmp_path), MATCH) == ["readings-0001.tsv"]


def test_an_empty_directory_has_no_last_file_and_begins_with_number_0(tmp_path):
    assert seqfile.files_in_sequence(str(tmp_path), MATCH) == []
    assert seqfile.next_sequence_filename(str(tmp_path), MATCH) == "readings-0000.tsv"
    assert seqfile.choose_append_file(str(tmp_path), MATCH) == str(tmp_path / "readings-0000.tsv")


def test_a_name_that_something_else_has_taken_is_not_the_next_one(tmp_path):
    (tmp_path / "readings-0001.tsv").write_bytes(b"full")
    (tmp_path / "readings-0002.tsv").mkdir()
    os.symlink("nowhere", str(tmp_path / "readings-0003.tsv"))
    assert append(seqfile.RowLog(str(tmp_path), MATCH, size_limit=4), b"row\n") == str(tmp_path / "readings-0004.tsv")


@pytest.mark.parametrize("size, chosen", [(0, "readings-0003.tsv"), (99, "readings-0003.tsv"), (100, "readings-0004.tsv"),
                                          (101, "readings-0004.tsv")])
def test_a_full_file_is_followed_by_the_next(tmp_path, size, chosen):
    (tmp_path / "readings-0003.tsv").write_bytes(b"x" * size)
    assert seqfile.choose_append_file(str(tmp_path), MATCH, 100) == str(tmp_path / chosen)


@pytest.mark.parametrize("name, kept", [
    ("readings-0000.tsv", "readings-0000.tsv"), ("readings-0000_old.tsv", "readings-0000_old.tsv"),
    ("readings-0000 - Copy.tsv", "readings-0000%20-%20Copy.tsv"), ("readings-0000 (1).tsv", "readings-0000%20%281%29.tsv"),
    ("._readings-0000.tsv", "%2E_readings-0000.tsv"), (".~lock.readings-0000.tsv#", "%2E%7Elock.readings-0000.tsv%23"),
    ("vadsø.tsv", "vads%C3%B8.tsv"), ("SYSTEM~1", "SYSTEM%7E1"), ("%41", "%2541"), ("a@0@20200101T000000Z", "a%400%4020200101T000000Z"),
    pytest.param("readings-" + "ø" * 100 + ".tsv", "readings-" + "%C3%B8" * 18 + "%C3" + "%f4cf775f.tsv", id="many bytes")])
def test_a_file_of_a_card_is_kept_under_a_safe_name(name, kept):
    assert seqfile.kept_name(name) == kept
    assert seqfile.card_name(kept)[:20] == name.encode()[:20]


def test_long_names_that_differ_anywhere_are_kept_apart():
    names = ["readings-%s.tsv" % "".join("x" if i == n else "\udcff" for i in range(246)) for n in range(246)]
    assert len({seqfile.kept_name(name) for name in names}) == 246
    assert max(len(seqfile.kept_name(name)) for name in names) == 133


# -- deciding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, offset, length, same, expected", [
    (0, 0, 10, 0, ("append", 0, 0)),                            # first chunk of a new file
    (100, 100, 10, 0, ("append", 100, 0)),                      # the next chunk
    (100, 90, 10, 10, ("repeat", 100, 10)),                     # the same chunk again
    (100, 90, 30, 10, ("repeat", 100, 10)),                     # a longer one, overlapping: 20 new bytes
    (100, 0, 10, 10, ("repeat", 100, 10)),                      # an old chunk again: the copy stays longer
    (100, 90, 10, 4, ("differ", 94, 4)),                        # differs in its fifth byte
    (100, 0, 10, 0, ("differ", 0, 0)),                          # another card
    (100, 90, 30, 9, ("differ", 99, 9)),                        # differs in the last byte we hold
    (100, 101, 10, 0, ("gap", 0, 0)),                           # one byte too far
    (0, 1_000_000, 10, 0, ("gap", 0, 0)),                       # a file we never saw
])
def test_what_a_chunk_does(size, offset, length, same, expected):
    assert tuple(seqfile.decide(size, offset, length, same)) == expected


# -- receiving --------------------------------------------------------------------------------------------------------


def test_chunks_in_order_make_the_file_and_are_acked_at_their_end(inbox, tmp_path):
    assert receive(inbox, "readings-0000.tsv", 0, b"one\n").ack == ("readings-0000.tsv", 4)
    assert receive(inbox, "readings-0000.tsv", 4, b"two\n").ack == ("readings-0000.tsv", 8)
    assert content(tmp_path, "readings-0000.tsv") == b"one\ntwo\n"


def test_a_repeated_chunk_is_acked_and_written_once(inbox, tmp_path):
    for _ in range(3):
        assert receive(inbox, "readings-0000.tsv", 0, b"one\n").ack == ("readings-0000.tsv", 4)
    assert content(tmp_path, "readings-0000.tsv") == b"one\n"


def test_an_old_chunk_is_acked_at_its_own_end_not_at_ours(inbox):
    put(inbox, "readings-0000.tsv", b"x" * 9000)
    assert receive(inbox, "readings-0000.tsv", 0, b"x" * 100).ack == ("readings-0000.tsv", 100)


@pytest.mark.parametrize("offset", [5, 1_000_000])
def test_a_chunk_past_the_end_is_refused_with_our_size(inbox, tmp_path, offset):
    receive(inbox, "readings-0000.tsv", 0, b"one\n")
    assert receive(inbox, "readings-0000.tsv", offset, b"x") == seqfile.Receipt("gap", ("readings-0000.tsv", 4))
    assert content(tmp_path, "readings-0000.tsv") == b"one\n"


def test_a_chunk_past_the_end_of_nothing_creates_nothing(inbox, tmp_path):
    assert receive(inbox, "readings-0000.tsv", 7, b"x").ack == ("readings-0000.tsv", 0)
    assert list(tmp_path.iterdir()) == []


def test_replaced_bytes_are_set_aside_as_whole_lines_and_the_file_follows_the_unit(inbox, tmp_path):
    put(inbox, "readings-0000.tsv", b"a 1\nb 2\nc 3\nd 4\n")
    receipt = receive(inbox, "readings-0000.tsv", 0, b"a 1\nb 7\nc")
    assert (receipt.kind, receipt.ack) == ("differ", ("readings-0000.tsv", 9))
    assert content(tmp_path, "readings-0000.tsv") == b"a 1\nb 7\nc"
    assert put_aside(tmp_path) == {"readings-0000.tsv@4@20191007T032339.980794Z": b"b 2\nc 3\nd 4\n"}
    assert open(receipt.set_aside, "rb").read() == b"b 2\nc 3\nd 4\n"


def test_a_long_replaced_file_is_set_aside_whole(inbox, tmp_path):
    old = b"".join(b"line %d of the old card\n" % n for n in range(9000))
    put(inbox, "readings-0000.tsv", old)
    receive(inbox, "readings-0000.tsv", 0, b"another card\n")
    assert list(put_aside(tmp_path).values()) == [old]


def test_several_replacements_are_all_kept(inbox, tmp_path):
    for number, line in enumerate([b"one\n", b"two\n", b"six\n"]):
        receive(inbox, "readings-0000.tsv", 0, line, NOW + number)
    assert sorted(put_aside(tmp_path).values()) == [b"one\n", b"two\n"]


def test_replacements_at_the_same_instant_are_all_kept(inbox, tmp_path):
    for line in [b"one\n", b"two\n", b"six\n", b"ten\n"]:
        receive(inbox, "readings-0000.tsv", 0, line)
    assert sorted(put_aside(tmp_path).values()) == [b"one\n", b"six\n", b"two\n"]


def test_a_root_that_was_removed_is_made_again(tmp_path):
    inbox = seqfile.Inbox(str(tmp_path / "a" / "b"))
    for _ in range(2):
        assert receive(inbox, "readings-0000.tsv", 9, b"x").ack == ("readings-0000.tsv", 0)
        assert receive(inbox, "readings-0000.tsv", 0, b"one\n").ack == ("readings-0000.tsv", 4)
        shutil.rmtree(str(tmp_path / "a"))


def test_chunks_past_the_end_of_nothing_are_not_remembered(inbox):
    for number in range(100):
        receive(inbox, "readings-0000.tsv", 9, b"x", unit="u%d" % number)
    assert inbox._sequences == {}


@pytest.mark.parametrize("obstacle", ["directory", "link", "fifo"])
def test_what_is_not_a_regular_file_is_refused_and_left_alone(inbox, tmp_path, obstacle):
    folder = tmp_path / "u" / "data" / "readings"
    folder.mkdir(parents=True)
    target = folder / "readings-0000.tsv"
    {"directory": target.mkdir, "link": lambda: target.symlink_to(tmp_path / "elsewhere"),
     "fifo": lambda: os.mkfifo(str(target))}[obstacle]()
    with pytest.raises(OSError):
        receive(inbox, "readings-0000.tsv", 0, b"x")
    assert not (tmp_path / "elsewhere").exists()


def test_a_linked_directory_is_not_followed(inbox, tmp_path):
    (tmp_path / "u" / "data").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "u" / "data" / "readings").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        receive(inbox, "readings-0000.tsv", 0, b"x")
    assert list((tmp_path / "elsewhere").iterdir()) == []


# -- files that stay open ---------------------------------------------------------------------------------------------


def open_files(path):
    links = [os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
    return sorted(os.readlink(link) for link in links if os.path.islink(link) and os.readlink(link).startswith(str(path)))


def folder_of(root, unit="u"):
    return root / unit / "data" / "readings"


@pytest.fixture
def begun(inbox, tmp_path):
    """A folder with a file that stays open after its first chunk."""
    receive(inbox, "readings-0000.tsv", 0, b"one\n")
    assert open_files(tmp_path) == [str(folder_of(tmp_path) / "readings-0000.tsv")]
    return folder_of(tmp_path)


def test_a_file_that_was_removed_is_not_written_to(inbox, begun):
    os.unlink(begun / "readings-0000.tsv")
    assert receive(inbox, "readings-0000.tsv", 4, b"two\n").ack == ("readings-0000.tsv", 0)
    assert list(begun.glob("*.tsv")) == []


def test_a_file_that_was_replaced_is_the_one_that_is_written_to(inbox, begun):
    (begun / "new").write_bytes(b"one\ntwo\n")
    os.rename(begun / "new", begun / "readings-0000.tsv")
    assert receive(inbox, "readings-0000.tsv", 8, b"six\n").kind == "append"
    assert (begun / "readings-0000.tsv").read_bytes() == b"one\ntwo\nsix\n"


def test_a_file_that_was_cut_by_hand_is_as_long_as_it_is(inbox, begun):
    os.truncate(begun / "readings-0000.tsv", 2)
    assert receive(inbox, "readings-0000.tsv", 4, b"two\n").ack == ("readings-0000.tsv", 2)


@pytest.mark.parametrize("above", [0, 1, 2, 3])
def test_a_directory_that_was_wiped_is_made_again(inbox, begun, above, tmp_path):
    shutil.rmtree(str([begun, *begun.parents][above]))
    assert receive(inbox, "readings-0000.tsv", 4, b"two\n").ack == ("readings-0000.tsv", 0)
    assert receive(inbox, "readings-0000.tsv", 0, b"two\n").ack == ("readings-0000.tsv", 4)
    assert content(tmp_path, "readings-0000.tsv") == b"two\n"


@pytest.mark.parametrize("above", [0, 1, 2])
def test_a_directory_that_was_moved_away_gets_nothing_more(inbox, begun, above, tmp_path):
    directory = [begun, *begun.parents][above]
    os.rename(directory, tmp_path / "moved")
    assert receive(inbox, "readings-0000.tsv", 4, b"two\n").ack == ("readings-0000.tsv", 0)
    assert receive(inbox, "readings-0000.tsv", 0, b"two\n").ack == ("readings-0000.tsv", 4)
    assert [path.read_bytes() for path in (tmp_path / "moved").rglob("*.tsv")] == [b"one\n"]


@pytest.mark.parametrize("above", [0, 1, 2])
def test_a_directory_in_whose_place_there_is_a_link_to_another_is_refused(inbox, begun, above, tmp_path):
    directory = [begun, *begun.parents][above]
    shutil.copytree(str(directory), str(tmp_path / "copy"))
    shutil.rmtree(str(directory))
    directory.symlink_to(tmp_path / "copy")
    for _ in range(2):
        with pytest.raises(OSError):
            receive(inbox, "readings-0000.tsv", 4, b"two\n")
    assert [path.read_bytes() for path in (tmp_path / "copy").rglob("*.tsv")] == [b"one\n"]


def test_a_link_in_the_place_of_the_file_is_refused_even_to_the_same_file(inbox, begun, tmp_path):
    os.rename(begun / "readings-0000.tsv", tmp_path / "elsewhere")
    (begun / "readings-0000.tsv").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        receive(inbox, "readings-0000.tsv", 4, b"two\n")


def test_only_so_many_files_stay_open(inbox, tmp_path, monkeypatch):
    monkeypatch.setattr(seqfile, "MOST_OPEN", 3)
    for offset in (0, 4):
        for number in range(9):
            assert receive(inbox, "readings-0000.tsv", offset, b"one\n", unit="u%d" % number).kind == "append"
    assert open_files(tmp_path) == [str(folder_of(tmp_path, "u%d" % number) / "readings-0000.tsv") for number in (6, 7, 8)]
    inbox.close_files()
    assert open_files(tmp_path) == []
    assert receive(inbox, "readings-0000.tsv", 8, b"one\n", unit="u8").kind == "append"


@pytest.mark.parametrize("seed", range(5))
def test_chunks_in_any_order_with_repeats_end_as_in_order(tmp_path, seed):
    rng, whole = random.Random(seed), os.urandom(32 * 512)
    inbox, chunks = seqfile.Inbox(str(tmp_path)), [at for at in range(0, 32 * 512, 512)] * 3

    def send(mine):
        for at in mine:
            position = at
            while position >= 0:                                # as a unit would: go on where the server says
                receipt = receive(inbox, "readings-0000.tsv", position, whole[position:at + 512])
                position = receipt.ack[1] if receipt.kind == "gap" else -1

    rng.shuffle(chunks)
    threads = [threading.Thread(target=send, args=(chunks[n::8],)) for n in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert content(tmp_path, "readings-0000.tsv") == whole
    assert put_aside(tmp_path) == {}


def test_directories_used_long_ago_are_forgotten_and_go_on_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(seqfile, "MOST_SEQUENCES", 3)
    disk = FailingDisk()
    inbox = seqfile.Inbox(str(tmp_path), sync=disk)
    receive(inbox, "readings-0000.tsv", 0, b"one\n", unit="doubtful")
    with mock.patch("seqfile.os.ftruncate", side_effect=OSError(errno.EIO, "Input/output error")), pytest.raises(OSError):
        disk.broken = True
        receive(inbox, "readings-0000.tsv", 4, b"lost\n", unit="doubtful")
    disk.broken = False
    for offset in (0, 4):
        for number in range(10):
            assert receive(inbox, "readings-0000.tsv", offset, b"two\n", unit="u%d" % number).kind == "append"
            assert len(inbox._sequences) <= 4
    assert receive(inbox, "readings-0000.tsv", 4, b"two\n", unit="doubtful").kind == "append"
    assert {content(tmp_path, "readings-0000.tsv", "u%d" % number) for number in range(10)} == {b"two\ntwo\n"}


def until(condition):
    """Wait for what another thread does."""
    for _ in range(20000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it did not happen")


def test_a_directory_in_use_is_not_forgotten(tmp_path, monkeypatch):
    """Else two chunks for it would not know of each other."""
    monkeypatch.setattr(seqfile, "MOST_SEQUENCES", 1)
    begun, go_on, syncing = threading.Event(), threading.Event(), []

    def slow_sync(fd):
        syncing.append(os.fstat(fd).st_ino)
        begun.set()
        go_on.wait(20)

    inbox, receipts = seqfile.Inbox(str(tmp_path), sync=slow_sync), []
    first = threading.Thread(target=lambda: receipts.append(receive(inbox, "readings-0000.tsv", 0, b"one\n")))
    first.start()
    assert begun.wait(20)
    others = [threading.Thread(target=lambda n=n: receive(inbox, "x-%d.tsv" % n, 0, b"x", unit="u%d" % n)) for n in range(3)]
    again = threading.Thread(target=lambda: receipts.append(receive(inbox, "readings-0000.tsv", 0, b"one\n")))
    [thread.start() for thread in others]
    until(lambda: len(syncing) == 4)
    again.start()
    until(lambda: sys._current_frames()[again.ident].f_code.co_name == "_entered")
    assert len(set(syncing)) == len(syncing) == 4               # the second chunk for the first file waits its turn
    go_on.set()
    [thread.join() for thread in [first, again, *others]]
    assert sorted(receipt.kind for receipt in receipts) == ["append", "repeat"]


# -- failing disks ----------------------------------------------------------------------------------------------------


def test_every_acknowledged_chunk_is_synced_even_a_repeated_one(tmp_path):
    disk = FailingDisk()
    inbox = seqfile.Inbox(str(tmp_path), sync=disk)
    for _ in range(3):
        before = disk.calls
        receive(inbox, "readings-0000.tsv", 0, b"one\n")
        assert disk.calls == before + 1


def test_a_chunk_whose_sync_failed_is_taken_back_and_can_be_sent_again(tmp_path):
    disk = FailingDisk()
    inbox = seqfile.Inbox(str(tmp_path), sync=disk)
    receive(inbox, "readings-0000.tsv", 0, b"one\n")
    disk.broken = True
    with pytest.raises(OSError):
        receive(inbox, "readings-0000.tsv", 4, b"two\n")
    assert content(tmp_path, "readings-0000.tsv") == b"one\n"
    disk.broken = False
    assert receive(inbox, "readings-0000.tsv", 4, b"two\n").ack == ("readings-0000.tsv", 8)
    assert content(tmp_path, "readings-0000.tsv") == b"one\ntwo\n"


def inbox_of_a_disk_that_could_not_even_cut(tmp_path, held):
    """It holds `held` and, read from memory, four bytes more that no sync has covered."""
    disk = FailingDisk()
    inbox = seqfile.Inbox(str(tmp_path), sync=disk)
    receive(inbox, "readings-0000.tsv", 0, held)
    disk.broken = True
    with mock.patch("seqfile.os.ftruncate", side_effect=OSError(errno.EIO, "no")), pytest.raises(OSError):
        receive(inbox, "readings-0000.tsv", len(held), b"bad\n")
    disk.broken = False
    return inbox


def test_bytes_that_cannot_even_be_taken_back_do_not_count(tmp_path):
    inbox = inbox_of_a_disk_that_could_not_even_cut(tmp_path, b"one\n")
    assert receive(inbox, "readings-0000.tsv", 8, b"six\n").ack == ("readings-0000.tsv", 4)
    assert content(tmp_path, "readings-0000.tsv") == b"one\n"


def test_a_shorter_file_put_in_the_place_of_one_that_could_not_be_cut_is_not_filled_up_with_zeros(tmp_path):
    inbox = inbox_of_a_disk_that_could_not_even_cut(tmp_path, b"one\ntwo\n")
    os.truncate(str(next(tmp_path.rglob("readings-0000.tsv"))), 4)                   # somebody restores an older copy
    assert receive(inbox, "readings-0000.tsv", 8, b"six\n").ack == ("readings-0000.tsv", 4)
    assert content(tmp_path, "readings-0000.tsv") == b"one\n"


def test_when_setting_aside_fails_the_old_bytes_stay_where_they_are(tmp_path):
    disk = FailingDisk()
    inbox = seqfile.Inbox(str(tmp_path), sync=disk)
    receive(inbox, "readings-0000.tsv", 0, b"old bytes\n")
    disk.broken = True
    with pytest.raises(OSError):
        receive(inbox, "readings-0000.tsv", 0, b"new bytes\n")
    assert content(tmp_path, "readings-0000.tsv") == b"old bytes\n"
    assert put_aside(tmp_path) == {}


HOUR = 3600.0


@pytest.mark.parametrize("name, newest, sessions, hours, was_sent_back, expected", [
    ("._readings-0000.tsv", None, 0, 0, False, "strange"),      # all names of readings come later
    ("._readings-0000.tsv", ("readings-0003.tsv", 50), 0, 0, True, "strange"),
    ("readings-0002.tsv~", ("readings-0003.tsv", 50), 0, 0, False, "strange"),
    ("readings-0003.tsv~", ("readings-0003.tsv", 50), 0, 0, False, "back"),
    ("readings-0003.tsv~", ("readings-0003.tsv", 50), 1, 0, True, "enough"),
    ("readings-0003.tsv~", ("readings-0003.tsv", 102400), 0, 0, False, "strange"),          # rows go to readings-0004.tsv
    ("vadsø", ("readings-0003.tsv", 102400), 0, 0, False, "back"),
    ("vadsø", ("readings-0003_old.tsv", 102400), 0, 0, False, "back"),
    ("vadsø", None, 0, 0, False, "start"),
    ("vadsø", None, 1, 0, True, "enough"),
    ("vadsø", ("readings-0003.tsv", 50), 3, 39, True, "enough"),
    ("vadsø", ("readings-0003.tsv", 50), 2, 99, True, "enough"),
    ("vadsø", ("readings-0003.tsv", 50), 3, 41, True, "past"),
    ("vadsø", ("readings-0003.tsv", 50), 3, 41, False, "back"),
    ("vadsø", None, 3, 41, True, "past"),
])
def test_what_is_answered_to_a_strange_name_among_the_readings(name, newest, sessions, hours, was_sent_back, expected):
    newest = seqfile.Sent(*newest, NOW) if newest else seqfile.Sent()
    backs = seqfile.Backs(newest, sessions, NOW)
    chunk = seqfile.Chunk(("u", *READINGS), name, 0, b"x", NOW + hours * HOUR)
    assert seqfile.decide_strange(chunk, newest, backs, was_sent_back) == expected


def test_a_file_of_readings_that_has_grown_since_is_not_passed_over():
    backs = seqfile.Backs(seqfile.Sent("readings-0003.tsv", 50, NOW), 3, NOW)
    chunk = seqfile.Chunk(("u", *READINGS), "vadsø", 0, b"x", NOW + 99 * HOUR)
    grown = seqfile.Sent("readings-0003.tsv", 99, NOW + 98 * HOUR)
    assert seqfile.decide_strange(chunk, grown, backs, True) == "enough"


# -- rules of memory --------------------------------------------------------------------------------------------------
# A unit that was asked for readings-0001.tsv, or not, in each situation, and what is concluded from its next step.

QUIET, ASKED, ELSEWHERE = seqfile.QUIET, seqfile.ASKED, seqfile.ELSEWHERE
STEPS = {                               # name, offset, seconds later: after bytes 0 to 50 of readings-0003.tsv
    "ARRIVES": ("readings-0001.tsv", 0, 1), "FOLLOWS": ("readings-0003.tsv", 50, 1), "RESUMES": ("readings-0003.tsv", 50, DAY),
    "MOVES_ON": ("readings-0006.tsv", 0, 1), "BEGINS": ("readings-0006.tsv", 0, DAY), "STEPS_BACK": ("readings-0002.tsv", 0, 1),
    "JUMPS": ("readings-0006.tsv", 9, 1)}


def memory_in(situation):
    """A memory whose unit has sent 50 bytes of readings-0003.tsv, and is in a situation."""
    memory = seqfile.Memory({})
    chunk = seqfile.Chunk(("u", *READINGS), "readings-0003.tsv", 0, b"r" * 50, NOW)
    memory.observe(chunk, lambda: {"readings-0003.tsv": 50})
    if situation is not QUIET:
        memory.situation, memory.awaited, memory.elsewhere = situation, 1, 3
    return memory


def take(memory, name, offset, later):
    memory.observe(seqfile.Chunk(("u", *READINGS), name, offset, b"r" * 50, NOW + later),
                   lambda: {"readings-0003.tsv": 50, "readings-0005.tsv": 9})
    return memory.situation, memory.first, memory.ends


@pytest.mark.parametrize("situation, step, expected", [
    (QUIET, "FOLLOWS", (QUIET, 0, {})),
    (QUIET, "RESUMES", (QUIET, 0, {})),
    (QUIET, "MOVES_ON", (QUIET, 0, {3: 50, 4: 0})),   # 5 is here, so it is not concluded that the unit lacks it
    (QUIET, "BEGINS", (QUIET, 0, {})),
    (QUIET, "STEPS_BACK", (QUIET, 0, {})),
    (QUIET, "JUMPS", (QUIET, 0, {})),
    (ASKED, "ARRIVES", (QUIET, 0, {})),
    (ASKED, "FOLLOWS", (QUIET, 3, {1: 0})),
    (ASKED, "RESUMES", (QUIET, 0, {})),
    (ASKED, "MOVES_ON", (QUIET, 0, {})),
    (ASKED, "BEGINS", (QUIET, 0, {})),
    (ASKED, "STEPS_BACK", (ELSEWHERE, 0, {})),
    (ASKED, "JUMPS", (QUIET, 0, {})),
    (ELSEWHERE, "ARRIVES", (QUIET, 0, {})),
    (ELSEWHERE, "FOLLOWS", (QUIET, 3, {1: 0})),
    (ELSEWHERE, "RESUMES", (QUIET, 3, {1: 0})),
    (ELSEWHERE, "MOVES_ON", (QUIET, 3, {1: 0})),
    (ELSEWHERE, "BEGINS", (QUIET, 3, {1: 0})),
    (ELSEWHERE, "STEPS_BACK", (QUIET, 0, {})),
    (ELSEWHERE, "JUMPS", (QUIET, 0, {})),
])
def test_what_is_concluded_from_a_step(situation, step, expected):
    memory = memory_in(situation)
    chunk = seqfile.Chunk(("u", *READINGS), *STEPS[step][:2], b"r" * 50, NOW + STEPS[step][2])
    assert memory.step(chunk) == step.lower().replace("_", " ")
    assert take(memory, *STEPS[step]) == expected


def test_moving_on_after_a_chunk_out_of_order_says_nothing():
    memory = memory_in(QUIET)
    take(memory, "readings-0003.tsv", 20, 1)
    assert take(memory, "readings-0006.tsv", 0, 2) == (QUIET, 0, {})


def test_a_first_file_without_a_number_is_followed_by_the_first_with_one():
    memory = memory_in(ELSEWHERE)
    memory.elsewhere = None                                     # readings-0000 - Copy.tsv
    assert take(memory, "readings-0006.tsv", 0, 1) == (QUIET, 6, {1: 0})


@pytest.mark.parametrize("name, number", [("readings-0012.tsv", 12), ("readings-10000.tsv", 10000), ("readings-12.tsv", None),
                                          ("readings-00012.tsv", None), ("readings-0012_old.tsv", None)])
def test_only_the_names_that_units_make_have_a_place_in_the_order(name, number):
    assert seqfile.number_on_card(name, seqfile.READINGS) == number


def test_what_is_kept_beside_the_files_is_read_again_also_ranges_of_numbers():
    memory = seqfile.Memory({"ends": [[3, 5, 0], [7, 8, 50], [2000, 1000000, 9]], "first": 1, "asked": [2], "asked_on": 9})
    assert len(memory.ends) == 3 + seqfile.MOST_ENDS
    again = seqfile.Memory(memory.to_save())
    assert (again.ends, again.first, again.asked, again.asked_on) == (memory.ends, 1, {2}, 9)
    assert (again.ends[3], again.ends[4], again.ends[7], again.ends[2000]) == (0, 0, 50, 9)


# -- older files ------------------------------------------------------------------------------------------------------

FULL = b"r" * seqfile.FILE_SIZE


def names(acks):
    return [ack for ack in acks if ack[1] == 0]


def test_a_missing_older_file_is_asked_for_at_0_in_the_ack_of_a_later_one(inbox, tmp_path):
    for name in ("readings-0000.tsv", "readings-0001.tsv", "readings-0002.tsv"):
        put(inbox, name, FULL)
    os.unlink(tmp_path / "u" / "data" / "readings" / "readings-0001.tsv")
    assert receive(inbox, "readings-0002.tsv", 102400, b"r" * 50, NOW + DAY).ack == ("readings-0001.tsv", 0)
    assert receive(inbox, "readings-0001.tsv", 0, b"r" * 4096, NOW + DAY).ack == ("readings-0001.tsv", 4096)


def test_a_short_older_file_is_asked_for(inbox, tmp_path):
    put(inbox, "readings-0000.tsv", FULL)
    put(inbox, "readings-0001.tsv", FULL)
    os.truncate(tmp_path / "u" / "data" / "readings" / "readings-0000.tsv", 50000)
    assert receive(inbox, "readings-0001.tsv", seqfile.FILE_SIZE, b"more").ack == ("readings-0001.tsv", seqfile.FILE_SIZE + 4)
    assert receive(inbox, "readings-0001.tsv", seqfile.FILE_SIZE, b"more", NOW + DAY).ack == ("readings-0000.tsv", 0)


def test_a_file_is_asked_for_once_a_day(inbox):
    asked = [receive(inbox, "readings-0001.tsv", 0, b"x" * n, NOW + day * DAY / 2).ack[1] == 0
             for n, day in enumerate([0, 0.1, 0.2, 2, 2.1, 4], 1)]
    assert asked == [True, False, False, True, False, True]


def test_a_unit_that_moves_on_from_a_short_file_has_no_more_of_it(inbox):
    put(inbox, "readings-0000.tsv", b"r" * 5000)
    assert names(put(inbox, "readings-0001.tsv", b"r" * 5000)) == []
    assert names(put(inbox, "readings-0001.tsv", b"r" * 6000, NOW + DAY)) == []


def test_a_unit_that_passes_over_a_number_does_not_have_that_file(inbox):
    put(inbox, "readings-0000.tsv", FULL)
    assert names(put(inbox, "readings-0003.tsv", b"r" * 5000)) == []


def test_a_unit_that_starts_over_at_its_first_file_is_not_asked_again(inbox):
    put(inbox, "readings-0005.tsv", b"r" * 5000)                # asked for 0000
    put(inbox, "readings-0003.tsv", FULL, NOW + 1)              # starts at 0003: there is nothing before
    put(inbox, "readings-0004.tsv", FULL, NOW + 2)
    assert names(put(inbox, "readings-0005.tsv", b"r" * 6000, NOW + 3)) == []
    assert names(put(inbox, "readings-0005.tsv", b"r" * 7000, NOW + DAY)) == []


def test_a_unit_that_stays_where_it_is_is_at_its_first_file(inbox):
    assert put(inbox, "readings-0003.tsv", b"r" * 9000)[0] == ("readings-0000.tsv", 0)
    assert names(put(inbox, "readings-0003.tsv", b"r" * 9999, NOW + DAY)) == []


def test_an_ask_that_did_not_arrive_is_repeated_next_day(inbox):
    assert receive(inbox, "readings-0003.tsv", 0, b"r" * 4096).ack[1] == 0
    assert receive(inbox, "readings-0003.tsv", 0, b"r" * 4096, NOW + 100).ack[1] == 4096
    assert receive(inbox, "readings-0003.tsv", 4096, b"r" * 50, NOW + DAY).ack[1] == 0


def test_being_sent_back_by_a_gap_says_nothing_about_the_end_of_another_file(inbox):
    put(inbox, "readings-0000.tsv", b"r" * 5000)                # then another server took the rest, and now:
    receive(inbox, "readings-0001.tsv", 7000, b"r" * 100, NOW + 5)
    assert put(inbox, "readings-0001.tsv", b"r" * 7100, NOW + 9)[0] == ("readings-0000.tsv", 0)


def test_what_was_learned_survives_a_restart(inbox, tmp_path):
    put(inbox, "readings-0000.tsv", b"r" * 5000)
    put(inbox, "readings-0001.tsv", b"r" * 5000)
    later = seqfile.Inbox(str(tmp_path))
    assert names(put(later, "readings-0001.tsv", b"r" * 6000, NOW + DAY)) == []


def test_a_file_that_shrank_below_what_the_unit_had_is_asked_for(inbox, tmp_path):
    put(inbox, "readings-0000.tsv", b"r" * 5000)
    put(inbox, "readings-0001.tsv", b"r" * 5000)
    os.truncate(tmp_path / "u" / "data" / "readings" / "readings-0000.tsv", 4999)
    assert put(inbox, "readings-0001.tsv", b"r" * 6000, NOW + DAY)[0] == ("readings-0000.tsv", 0)


@pytest.mark.parametrize("cut", [b"r" * (seqfile.FILE_SIZE - 2) + b"\nr", b"r" * seqfile.FILE_SIZE])
def test_a_file_of_full_size_that_ends_within_a_line_is_asked_for(tmp_path, cut):
    write(tmp_path, "readings-0000.tsv", cut)                   # uploaded 25 chunks of 4096; the unit had 26
    assert names(put(seqfile.Inbox(str(tmp_path)), "readings-0001.tsv", b"r" * 9000)) == [("readings-0000.tsv", 0)]


def test_a_file_of_full_size_that_ends_with_a_line_is_not_asked_for(tmp_path):
    write(tmp_path, "readings-0000.tsv", FULL[:-1] + b"\n")
    assert names(put(seqfile.Inbox(str(tmp_path)), "readings-0001.tsv", b"r" * 9000)) == []


@pytest.mark.parametrize("obstacle", ["mkdir", "mkfifo", "symlink"])
def test_a_file_that_could_not_be_stored_is_not_asked_for(tmp_path, obstacle):
    write(tmp_path, "readings-0001.tsv", b"r" * 9000)
    path = str(tmp_path / "u" / "data" / "readings" / "readings-0000.tsv")
    {"mkdir": os.mkdir, "mkfifo": os.mkfifo, "symlink": lambda path: os.symlink("/nowhere", path)}[obstacle](path)
    assert names(put(seqfile.Inbox(str(tmp_path)), "readings-0001.tsv", b"r" * 9999)) == []


def test_a_unit_that_was_back_at_a_file_and_had_no_more_is_not_sent_there_again(tmp_path):
    write(tmp_path, "readings-0000.tsv", b"r" * 3000)
    inbox = seqfile.Inbox(str(tmp_path))
    assert receive(inbox, "readings-0001.tsv", 0, b"r" * 4096).ack == ("readings-0000.tsv", 0)
    assert receive(inbox, "readings-0000.tsv", 0, b"r" * 3000).ack == ("readings-0000.tsv", 3000)      # its time is over
    assert receive(inbox, "readings-0001.tsv", 0, b"r" * 4096, NOW + DAY).ack == ("readings-0001.tsv", 4096)


def test_a_unit_that_could_not_read_the_reply_is_asked_again(inbox):
    assert receive(inbox, "readings-0003.tsv", 0, b"r" * 4096).ack == ("readings-0000.tsv", 0)
    assert receive(inbox, "readings-0003.tsv", 4096, b"r" * 4096, NOW + DAY).ack == ("readings-0000.tsv", 0)


def test_the_ack_to_a_request_that_came_twice_teaches_nothing(inbox, tmp_path):
    put(inbox, "readings-0000.tsv", FULL)
    put(inbox, "readings-0001.tsv", b"r" * 4096)
    os.unlink(tmp_path / "u" / "data" / "readings" / "readings-0000.tsv")
    assert receive(inbox, "readings-0001.tsv", 0, b"r" * 4096, NOW + DAY).ack == ("readings-0000.tsv", 0)
    assert receive(inbox, "readings-0001.tsv", 4096, b"r" * 50, NOW + DAY).ack == ("readings-0001.tsv", 4146)
    assert receive(inbox, "readings-0001.tsv", 4146, b"r" * 50, NOW + 2 * DAY).ack == ("readings-0000.tsv", 0)


def test_an_old_request_that_arrives_late_says_nothing_about_the_files_after_it(inbox, tmp_path):
    for number in range(4):
        put(inbox, "readings-%04d.tsv" % number, FULL)
    receive(inbox, "readings-0000.tsv", 4096, b"r" * 4096, NOW + 60)
    put(inbox, "readings-0004.tsv", b"r" * 50, NOW + 61)
    os.unlink(tmp_path / "u" / "data" / "readings" / "readings-0002.tsv")
    assert receive(inbox, "readings-0004.tsv", 50, b"r" * 50, NOW + DAY).ack == ("readings-0002.tsv", 0)


def test_the_last_request_of_an_old_file_arriving_late_does_not_pass_over_the_files_after_it(inbox, tmp_path):
    for number in range(4):
        put(inbox, "readings-%04d.tsv" % number, FULL)
    os.unlink(tmp_path / "u" / "data" / "readings" / "readings-0002.tsv")
    receive(inbox, "readings-0000.tsv", 98304, b"r" * 4096, NOW + 60)
    assert receive(inbox, "readings-0004.tsv", 0, b"r" * 50, NOW + 61).ack == ("readings-0002.tsv", 0)


def test_files_that_we_hold_are_not_passed_over(inbox, tmp_path):
    for number, whole in enumerate([b"r" * 3000, FULL, FULL, FULL]):
        put(inbox, "readings-%04d.tsv" % number, whole)
    receive(inbox, "readings-0000.tsv", 0, b"r" * 3000, NOW + 60)
    receive(inbox, "readings-0004.tsv", 0, b"r" * 50, NOW + 61)
    os.unlink(tmp_path / "u" / "data" / "readings" / "readings-0002.tsv")
    assert receive(inbox, "readings-0004.tsv", 50, b"r" * 50, NOW + DAY).ack == ("readings-0002.tsv", 0)


def test_a_unit_that_started_over_instead_is_not_asked_again_however_slow_it_is(tmp_path):
    write(tmp_path, "readings-0000.tsv", FULL[:-1] + b"\n")
    inbox = seqfile.Inbox(str(tmp_path))
    assert receive(inbox, "readings-0002.tsv", 0, b"r" * 50).ack == ("readings-0001.tsv", 0)
    put(inbox, "readings-0000.tsv", FULL[:-1] + b"\n", NOW + 1)
    assert names(put(inbox, "readings-0002.tsv", b"r" * 100, NOW + DAY)) == []


def test_a_file_that_grew_beyond_its_known_end_has_no_known_end(inbox, tmp_path):
    put(inbox, "readings-0000.tsv", b"r" * 5000)
    put(inbox, "readings-0001.tsv", b"r" * 50)
    put(inbox, "readings-0000.tsv", b"r" * 9000, NOW + DAY)     # another card, whose day ended here
    os.truncate(tmp_path / "u" / "data" / "readings" / "readings-0000.tsv", 6000)
    assert receive(inbox, "readings-0001.tsv", 50, b"r" * 50, NOW + 2 * DAY).ack == ("readings-0000.tsv", 0)


def test_an_old_request_does_not_pass_for_the_end_of_its_file(inbox, tmp_path):
    for number in range(3):
        put(inbox, "readings-%04d.tsv" % number, FULL)
    os.truncate(tmp_path / "u" / "data" / "readings" / "readings-0000.tsv", 9000)
    receive(inbox, "readings-0000.tsv", 0, b"r" * 4096, NOW + DAY)
    assert receive(inbox, "readings-0003.tsv", 0, b"r" * 50, NOW + DAY + 1).ack == ("readings-0000.tsv", 0)


def test_a_unit_that_moved_on_between_two_days_may_have_sent_the_rest_elsewhere(inbox):
    put(inbox, "readings-0000.tsv", b"r" * 5000)
    assert put(inbox, "readings-0001.tsv", b"r" * 50, NOW + DAY) == [("readings-0000.tsv", 0)]


def memory_of(inbox):
    return inbox._sequences["u", "data", "readings"].memory


def test_names_that_jump_cost_neither_memory_nor_time(inbox, tmp_path):
    looks, look = [], seqfile.Memory._is_short
    with mock.patch.object(seqfile.Memory, "_is_short", lambda *arguments: looks.append(1) or look(*arguments)):
        for number in range(200):
            put(inbox, "readings-%04d.tsv" % (number * 7919 % 1000000), b"r" * 50, NOW + number)
    assert len(memory_of(inbox).ends) <= seqfile.MOST_ENDS and len(memory_of(inbox).asked) <= seqfile.MOST_ASKED
    assert (tmp_path / "u" / "data" / "readings" / ".sequence.json").stat().st_size < 10000
    assert len(looks) < 200 * 1000                              # it was 200 times a million numbers


def test_what_there_is_no_room_to_remember_is_not_asked_for(inbox, monkeypatch):
    monkeypatch.setattr(seqfile, "MOST_ENDS", 10)
    for number in range(0, 60, 3):                              # the unit has every third file only
        put(inbox, "readings-%04d.tsv" % number, b"r" * 50, NOW + number)
    assert len(memory_of(inbox).ends) == 10 and memory_of(inbox).first == 47
    assert names(put(inbox, "readings-0057.tsv", b"r" * 99, NOW + DAY)) == []


def test_no_more_than_so_many_files_are_asked_for_in_a_day(inbox, monkeypatch):
    monkeypatch.setattr(seqfile, "MOST_ASKED", 3)
    acks = [put(inbox, "readings-%04d.tsv" % number, b"r" * 50)[0] for number in (90, 80, 70, 60, 50)]
    assert names(acks) == [("readings-%04d.tsv" % number, 0) for number in (0, 1, 2)]


def test_numbers_beyond_9999_do_not_lengthen_the_names_before(inbox):
    assert put(inbox, "readings-10000.tsv", b"r" * 50) == [("readings-0000.tsv", 0)]


def test_asking_can_be_switched_off(tmp_path):
    inbox = seqfile.Inbox(str(tmp_path), ask_older=False)
    assert names(put(inbox, "readings-0002.tsv", b"r" * 5000)) == []


@pytest.mark.parametrize("damage", [b'["\x00', b"", b"[]", b"5", b'{"first": "x"}', b'{"ended": 5}', b'{"ended": {"a": []}}'])
def test_a_damaged_memory_is_taken_as_none(inbox, tmp_path, damage):
    put(inbox, "readings-0000.tsv", b"r" * 5000)
    (tmp_path / "u" / "data" / "readings" / ".sequence.json").write_bytes(damage)
    assert names(put(seqfile.Inbox(str(tmp_path)), "readings-0000.tsv", b"r" * 6000)) == []


# -- rows -------------------------------------------------------------------------------------------------------------


def append(rows, row):
    """The path of the file where a row was stored; OSError when it was not."""
    told = []
    rows.append(row, lambda *outcome: told.append(outcome))
    [(path, problem)] = told                                    # nobody else writes, so it was us
    if problem:
        raise problem
    return path


def test_rows_go_to_the_last_file_and_roll_over(tmp_path):
    rows = seqfile.RowLog(str(tmp_path), MATCH, size_limit=8)
    assert [os.path.basename(append(rows, b"row\n")) for _ in range(5)] == [
        "readings-0000.tsv", "readings-0000.tsv", "readings-0001.tsv", "readings-0001.tsv", "readings-0002.tsv"]


def test_a_row_after_half_a_row_begins_a_line(tmp_path):
    (tmp_path / "readings-0000.tsv").write_bytes(b"one\nhal")
    append(seqfile.RowLog(str(tmp_path), MATCH), b"two\n")
    assert (tmp_path / "readings-0000.tsv").read_bytes() == b"one\nhal\ntwo\n"


def held_up_log(tmp_path, error=None):
    """A log whose first sync takes until all of 20 rows have come, and what became of them."""
    calls, outcomes = [], []

    def sync(fd):
        calls.append(fd)
        if len(calls) == 1:
            for n in range(1, 20):
                rows.append(b"%02d\n" % n, told)                # by another thread, in life: here it is all the same
        elif error:
            raise error

    def told(path, problem):
        outcomes.append(problem.errno if problem else os.path.basename(path))

    rows = seqfile.RowLog(str(tmp_path), MATCH, sync=sync)
    rows.append(b"00\n", told)
    return calls, outcomes


def test_one_sync_serves_all_who_came_during_the_one_before(tmp_path):
    calls, outcomes = held_up_log(tmp_path)
    assert len(calls) == 2 and outcomes == ["readings-0000.tsv"] * 20
    assert (tmp_path / "readings-0000.tsv").read_bytes().split() == [b"%02d" % n for n in range(20)]


def test_a_failed_sync_is_the_failure_of_all_whom_it_was_to_serve(tmp_path):
    calls, outcomes = held_up_log(tmp_path, error=OSError(errno.EIO, "lost"))
    assert len(calls) == 2 and outcomes == ["readings-0000.tsv"] + [errno.EIO] * 19


def test_after_a_failed_sync_the_next_row_starts_a_new_file(tmp_path):
    disk = FailingDisk()
    rows = seqfile.RowLog(str(tmp_path), MATCH, sync=disk)
    append(rows, b"one\n")
    disk.broken = True
    with pytest.raises(OSError):
        append(rows, b"two\n")
    disk.broken = False
    assert os.path.basename(append(rows, b"six\n")) == "readings-0001.tsv"


def test_a_file_whose_sync_failed_is_not_gone_back_to_when_the_next_cannot_be_made_at_once(tmp_path):
    disk = FailingDisk()
    rows = seqfile.RowLog(str(tmp_path), MATCH, sync=disk)
    append(rows, b"one\n")
    disk.broken = True
    with pytest.raises(OSError):
        append(rows, b"two\n")
    disk.broken = False
    with mock.patch.object(seqfile.os, "open", side_effect=OSError(errno.EMFILE, "too many")), pytest.raises(OSError):
        append(rows, b"six\n")
    assert os.path.basename(append(rows, b"ten\n")) == "readings-0001.tsv"


def test_whatever_goes_wrong_with_a_row_the_others_hear_of_theirs_and_the_log_goes_on(tmp_path):
    def told(path, problem):
        outcomes.append(problem or path)
        raise ValueError("this one cannot bear it")

    rows, outcomes = seqfile.RowLog(str(tmp_path), MATCH), []
    with mock.patch.object(seqfile.os, "pwrite", side_effect=MemoryError):
        rows.append(b"one\n", told)
    assert isinstance(outcomes.pop(), MemoryError)
    rows.append(b"two\n", told)
    append(rows, b"six\n")
    assert outcomes == [str(tmp_path / "readings-0000.tsv")]
    assert (tmp_path / "readings-0000.tsv").read_bytes() == b"two\nsix\n"


def test_rows_of_many_threads_are_all_stored_and_told_once(tmp_path):
    def work(number):
        for n in range(200):
            rows.append(b"%d-%d\n" % (number, n), lambda path, problem: outcomes.append((path, problem)))

    rows, outcomes = seqfile.RowLog(str(tmp_path), MATCH, sync=lambda fd: os.sched_yield()), []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    lines = (tmp_path / "readings-0000.tsv").read_bytes().split()
    assert len(outcomes) == len(lines) == len(set(lines)) == 1600
    for number in range(8):                                     # in the order in which each thread has brought them
        assert [line for line in lines if line.startswith(b"%d-" % number)] == [b"%d-%d" % (number, n) for n in range(200)]


def test_a_removed_file_is_made_again(tmp_path):
    rows = seqfile.RowLog(str(tmp_path), MATCH)
    os.unlink(append(rows, b"one\n"))
    append(rows, b"two\n")
    assert (tmp_path / "readings-0000.tsv").read_bytes() == b"two\n"


def test_a_removed_directory_is_made_again(tmp_path):
    rows = seqfile.RowLog(str(tmp_path / "pings"), MATCH)
    for _ in range(2):
        append(rows, b"one\n")
        shutil.rmtree(str(tmp_path / "pings"))


def test_a_file_that_cannot_be_opened_properly_is_closed_again(tmp_path):
    (tmp_path / "readings-0000.tsv").write_bytes(b"half a ro")
    rows = seqfile.RowLog(str(tmp_path), MATCH)
    for _ in range(5):
        with mock.patch.object(seqfile.os, "pwrite", side_effect=OSError(errno.ENOSPC, "full")), pytest.raises(OSError):
            append(rows, b"one\n")
    opened = [os.path.realpath("/proc/self/fd/" + fd) for fd in os.listdir("/proc/self/fd")]
    assert os.path.realpath(str(tmp_path / "readings-0000.tsv")) not in opened
    append(rows, b"one\n")
    assert (tmp_path / "readings-0000.tsv").read_bytes() == b"half a ro\none\n"
