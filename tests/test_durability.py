"""The daemon as a process: what it tells the kernel before it tells a unit, full and broken disks, sudden death."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import threading
import time

import pytest

import fipy
import soak

PUSH = "/ou/%s/push-sequential/data/readings/%s?offset=%d"


@pytest.fixture
def daemon(tmp_path):
    made = []

    def make(**settings):
        made.append(soak.Daemon(str(tmp_path), **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(daemon, method, target, body=b""):
    """Status and body of the answer to one request."""
    host, port = daemon.url[7:].split(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(b"".join(fipy.segments(method, target, host, body)))
        return fipy.parse_reply(b"".join(fipy.until_closed(sock, time.monotonic() + 30)))


def put(daemon, name, offset, chunk, unit="co2unit-1"):
    return ask(daemon, "PUT", PUSH % (unit, name, offset), chunk)


def says(daemon, text, times=1):
    """The log has a text so many times, sooner or later."""
    for _ in range(500):
        if daemon.log().count(text) >= times:
            break
        threading.Event().wait(0.02)
    assert daemon.log().count(text) == times, daemon.log()


def held(daemon, name, unit="co2unit-1"):
    return soak.read(os.path.join(daemon.data, unit, "data", "readings", name))


# -- the order of system calls ----------------------------------------------------------------------------------------
# strace writes a line when a call returns, or two when others came in between: "<unfinished ...>", "<... resumed>".
# A `Call` knows the numbers of the lines where it began and ended: one call came before another when its end is before
# the other's begin. What matters is the disk at the moment a 200 goes out.

CALLS = "openat,mkdir,mkdirat,rename,renameat,renameat2,write,pwrite64,ftruncate,fdatasync,fsync,accept,accept4,recvfrom,sendto"


class Call:
    """One system call: thread, name, arguments, result, and the lines where it began and ended."""

    def __init__(self, thread, text, begin, end):
        found = re.match(r"(\w+)\((.*)\)\s+= (-?[0-9]+)", text, re.S)
        self.thread, self.name, self.arguments, self.result = thread, found[1], found[2], int(found[3])
        self.begin, self.end = begin, end
        self.file = (re.match(r"[0-9]+<([^>]*)>", self.arguments) or [None, ""])[1]    # what its first descriptor is open on

    def path(self):
        """What openat, mkdirat, mkdir name."""
        base, name = re.match(r'(?:(?:AT_FDCWD|[0-9]+)<([^>]*)>, )?"([^"]*)"', self.arguments).groups()
        return os.path.normpath(os.path.join(base or "", name))


def parse_trace(text):
    """All calls that have returned, in the order of their ends."""
    begun, calls = {}, []
    for number, line in enumerate(text.splitlines()):
        thread, line = line.split(None, 1)
        if line.endswith("<unfinished ...>"):
            begun[thread] = (line[:-len("<unfinished ...>")], number)
        elif line.startswith("<... "):
            first, begin = begun.pop(thread)
            calls.append(Call(thread, first + re.sub(r"^<\.\.\. \w+ resumed>", "", line).lstrip(), begin, number))
        elif re.match(r"\w+\(.*= -?[0-9]+", line):
            calls.append(Call(thread, line, number, number))
    return calls


def replies(calls):
    """(request, what the thread that replies did since the request was read, the sendto of the reply) for each reply."""
    threads, receipts = {}, {}
    for call in calls:
        mine = threads.setdefault(call.thread, [])
        if call.name == "recvfrom":
            receipts.setdefault(call.file, []).append(call)     # by several threads: the connection may have been parked
        elif call.name == "sendto" and "HTTP/1.1" in call.arguments:
            received = receipts.pop(call.file)
            request = "".join(re.findall(r', *"((?:[^"\\]|\\.)*)"', "\n".join(receipt.arguments for receipt in received)))
            yield request, [before for before in mine if before.begin > received[-1].begin], call
        mine.append(call)


def synced(calls, name, file, after, before):
    """Whether `file` was synced, well, between these two calls."""
    return any(call.name in name and call.file == file and call.result == 0 and call.begin > after.end and call.end < before.begin
               for call in calls)


def check_reply(calls, request, mine, reply):
    """A 200 to a push or ping: all that was written for it is synced; another thread may have written the row of a ping."""
    if request.startswith("POST"):
        unit = re.match(r"POST /ou/([^/]+)/alive", request)[1]
        since = min(call.begin for call in mine)
        writes = [call for call in calls if call.name == "pwrite64" and unit in call.arguments and since <= call.begin < reply.begin]
        assert writes, "a ping without a write"
    else:
        writes = [call for call in mine if call.name == "pwrite64" and "/." not in call.file]
    for call in writes:
        assert synced(calls, ("fdatasync",), call.file, call, reply), "%s not synced before the reply to %s" % (call.file, request[:80])
    if request.startswith("PUT"):
        assert any(call.name == "fdatasync" and call.result == 0 and call.end < reply.begin for call in mine), request[:80]


def check_names(calls, root):
    """Every new name was durable in its directory before any 200 that came after it."""
    answers = [reply for _, _, reply in replies(calls) if '"HTTP/1.1 200' in reply.arguments]
    made = [call for call in calls if call.name.startswith("mkdir") and call.result == 0]
    known = set()
    for call in calls:
        if call.name == "openat" and "O_CREAT" in call.arguments and call.result >= 0 and call.path() not in known:
            known.add(call.path())
            made.append(call)
    made = [call for call in made if call.path().startswith(root) and not os.path.basename(call.path()).startswith(".")
            and not re.search(r"sqlite|\.lock|/log$", call.path())]
    for call in made:
        # The first reply for which this name counts is that of the same thread; of the main thread, any.
        reply = next((r for r in answers if r.begin > call.end and (r.thread == call.thread or call.name == "mkdir")), None)
        assert reply is None or synced(calls, ("fsync",), os.path.dirname(call.path()), call, reply), call.path() + " may be lost"
    return [os.path.relpath(call.path(), root) for call in made]


def can_trace(tmp_path):
    if not shutil.which("strace"):
        return "strace is not installed"
    done = subprocess.run(["strace", "-f", "-y", "-D", "-o", str(tmp_path / "try"), "true"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return "" if done.returncode == 0 else "strace is not permitted here: %s" % done.stdout.decode().strip()


@pytest.fixture
def trace(tmp_path, daemon):
    """Starts a daemon whose calls are written down; then gives them."""
    reason = can_trace(tmp_path)
    if reason:
        pytest.skip(reason)
    file, one = str(tmp_path / "trace"), daemon(import_delay=600)

    def calls():
        assert one.end() == 0
        deadline = time.monotonic() + 20
        while not re.search(r"^%d +\+\+\+ exited" % one.process.pid, soak.read(file).decode("latin-1"), re.M) and time.monotonic() < deadline:
            threading.Event().wait(0.02)                        # strace is a process of its own
        return parse_trace(soak.read(file).decode("latin-1"))

    one.start(["strace", "-f", "-y", "-D", "-s", "300", "-e", "trace=" + CALLS, "-o", file])
    return one, calls


def test_everything_is_synced_before_the_reply_that_promises_it(trace, tmp_path):
    one, calls = trace
    units = fipy.make_units(4, str(tmp_path / "cards"), [one.url])
    for _ in range(3):
        for unit in units:
            unit.measure()
            unit.log_error()
        assert fipy.one_night(units).errors == []
    units[0].lose_state()                                       # repeats
    units[1].swap_card()                                        # replaced bytes are set aside
    units[1].measure()
    assert fipy.one_night(units).errors == []
    put(one, "readings-0007.tsv", 5, b"a gap")
    recorded = calls()
    answered = list(replies(recorded))
    good = [reply for reply in answered if '"HTTP/1.1 200' in reply[2].arguments and reply[0].startswith(("PUT", "POST"))]
    assert sum(request.startswith("POST") for request, _, _ in good) == 16
    assert sum(request.startswith("PUT") for request, _, _ in good) >= 40
    for request, mine, reply in good:
        check_reply(recorded, request, mine, reply)
    names = check_names(recorded, str(tmp_path))
    unit = units[1].unit_id
    assert {"data", "var/pings", "var/pings/pings-0000.tsv", "data/" + unit, "data/%s/data" % unit, "data/%s/errors" % unit,
            "data/%s/data/readings/readings-0000.tsv" % unit, "data/%s/set-aside/data/readings" % unit} <= set(names)
    renames = [call for call in recorded if call.name.startswith("rename") and "set-aside" in call.arguments]
    assert renames
    for call in renames:
        reply = next(r for _, _, r in answered if r.begin > call.end and r.thread == call.thread)
        assert synced(recorded, ("fsync",), re.match(r"[0-9]+<([^>]*)>", call.arguments)[1], call, reply)


def test_replaced_bytes_are_safe_before_they_are_cut_off(trace, tmp_path):
    one, calls = trace
    put(one, "readings-0000.tsv", 0, b"old line\n" * 100)
    assert put(one, "readings-0000.tsv", 0, b"new line\n" * 100)[0] == 200
    recorded = calls()
    cut = next(call for call in recorded if call.name == "ftruncate" and call.file.endswith("readings-0000.tsv"))
    rename = next(call for call in recorded if call.name.startswith("rename") and "set-aside" in call.arguments)
    written = next(call for call in recorded if call.name in ("write", "pwrite64") and "set-aside" in call.file)
    assert written.end < rename.begin and rename.end < cut.begin
    assert synced(recorded, ("fdatasync",), written.file, written, rename)
    assert synced(recorded, ("fsync",), os.path.dirname(written.file), rename, cut)


# -- full and broken disks --------------------------------------------------------------------------------------------


def send_until_refused(one, most):
    """Chunks of one file until one is not taken: (bytes acknowledged, status)."""
    for at in range(0, most, 4096):
        status, _ = put(one, "readings-0000.tsv", at, b"%04d" % (at // 4096) * 1024)
        if status != 200:
            return at, status
    raise AssertionError("all was taken")


def whole(size):
    return b"".join(b"%04d" % n * 1024 for n in range(size // 4096))


def test_a_file_size_limit_is_answered_with_507_and_hurts_nothing(daemon):
    one, limit = daemon(max_file="1M"), 20000
    one.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)))
    acked, status = send_until_refused(one, 10 * 4096)
    assert (acked, status) == (16384, 507)
    assert held(one, "readings-0000.tsv") == whole(acked)       # the 3,616 bytes that did fit are cut off again
    says(one, "WARNING uploads of co2unit-1 are refused: cannot store: [Errno 27] File too large")
    assert ask(one, "POST", "/ou/co2unit-1/alive?site_code=x")[0] == 200
    resource.prlimit(one.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert put(one, "readings-0000.tsv", acked, b"more")[0] == 200
    assert held(one, "readings-0000.tsv") == whole(acked) + b"more"


@pytest.fixture
def mount(tmp_path):
    """Mounts something, and takes it away again; skips where that is not permitted."""
    places = []

    def do(place, *arguments):
        os.makedirs(place, exist_ok=True)
        done = subprocess.run(["mount", *arguments, place], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) \
            if shutil.which("mount") else None
        if done is None or done.returncode:
            pytest.skip("mounting is not permitted here")
        places.append(place)

    yield do
    for place in reversed(places):
        subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_answered_with_507_and_recovers_without_a_restart(daemon, mount):
    one = daemon()
    mount(one.data, "-t", "tmpfs", "-o", "size=256k", "tmpfs")
    one.start()
    filler = os.path.join(one.data, "filler")
    with open(filler, "wb") as file:
        file.write(b"x" * 150000)
    acked, status = send_until_refused(one, 256 * 1024)
    assert status == 507 and held(one, "readings-0000.tsv") == whole(acked)
    says(one, "WARNING uploads of co2unit-1 are refused: cannot store: [Errno 28] No space left on device")
    assert put(one, "readings-0000.tsv", 0, b"another card\n" * 300)[0] == 507      # no room to set the old bytes aside
    assert held(one, "readings-0000.tsv") == whole(acked)
    assert ask(one, "POST", "/ou/co2unit-1/alive?site_code=x")[0] == 200
    os.unlink(filler)
    assert put(one, "readings-0000.tsv", acked, b"more")[0] == 200
    assert held(one, "readings-0000.tsv") == whole(acked) + b"more"


def test_a_disk_below_its_reserve_is_answered_with_507(daemon, mount):
    one = daemon(keep_free=50)
    mount(one.data, "-t", "tmpfs", "-o", "size=256k", "tmpfs")
    one.start()
    acked, status = send_until_refused(one, 256 * 1024)
    assert status == 507 and 100000 < acked < 140000
    assert held(one, "readings-0000.tsv") == whole(acked)


def test_full_ping_storage_keeps_no_unit_from_its_data_and_recovers(daemon, mount, tmp_path):
    one = daemon(db=str(tmp_path / "db"))
    mount(one.var, "-t", "tmpfs", "-o", "size=64k", "tmpfs")
    one.start()
    with open(os.path.join(one.var, "filler"), "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 4096)
    unit = fipy.Unit("co2unit-1", str(tmp_path / "card"), [one.url])
    unit.measure()
    session = unit.sync()
    assert session.finished and session.error is None
    says(one, "ERROR ping of co2unit-1 NOT STORED: [Errno 28] No space left on device")
    os.unlink(os.path.join(one.var, "filler"))
    unit.sync()
    assert soak.stored_pings(one.var) == {"co2unit-1": 1}


def test_a_read_only_disk_is_answered_with_503_and_recovers_without_a_restart(daemon, mount):
    one = daemon()
    mount(one.data, "-t", "tmpfs", "tmpfs")
    one.start()
    assert put(one, "readings-0000.tsv", 0, b"one\n")[0] == 200
    assert ask(one, "GET", "/readyz")[0] == 200                 # closes what is open, as once a minute
    subprocess.run(["mount", "-o", "remount,ro", one.data], check=True)
    assert [put(one, "readings-0000.tsv", 4, b"two\n")[0], put(one, "readings-0001.tsv", 0, b"one\n")[0],
            put(one, "readings-0000.tsv", 0, b"one\n", unit="co2unit-2")[0]] == [503] * 3
    says(one, "cannot store: [Errno 30] Read-only file system", times=4)        # each request, and the health of co2unit-1
    subprocess.run(["mount", "-o", "remount,rw", one.data], check=True)
    assert put(one, "readings-0000.tsv", 4, b"two\n")[0] == 200
    assert held(one, "readings-0000.tsv") == b"one\ntwo\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_directory_without_write_permission_is_answered_with_503_and_recovers(daemon):
    one = daemon()
    one.start()
    put(one, "readings-0000.tsv", 0, b"one\n")
    folder = os.path.join(one.data, "co2unit-1", "data", "readings")
    os.chmod(folder, 0o500)
    assert put(one, "readings-0001.tsv", 0, b"one\n")[0] == 503
    os.chmod(folder, 0o700)
    assert put(one, "readings-0001.tsv", 0, b"one\n")[0] == 200


@pytest.mark.parametrize("in_the_way, make, status, reason", [
    ("co2unit-1/data/readings/readings-0000.tsv", os.makedirs, 400, "[Errno 21] Is a directory: 'readings-0000.tsv'"),
    ("co2unit-1/data/readings", lambda path: fipy.write_file(path, b"a file"), 503, "[Errno 20] Not a directory: 'readings'"),
    ("co2unit-1/data", lambda path: fipy.write_file(path, b"a file"), 503, "[Errno 20] Not a directory: 'data'"),
    ("co2unit-1", lambda path: fipy.write_file(path, b"a file"), 503, "[Errno 20] Not a directory: 'co2unit-1'"),
], ids=["directory for a file", "file for readings", "file for data", "file for the unit"])
def test_what_is_in_the_way_is_named_in_the_log_and_once_it_is_gone_all_goes_on(daemon, in_the_way, make, status, reason):
    one, path = daemon(), ""
    one.start()
    path = os.path.join(one.data, in_the_way)
    make(path)
    assert put(one, "readings-0000.tsv", 0, b"one\n")[0] == status
    assert put(one, "readings-0000.tsv", 0, b"one\n", unit="co2unit-2")[0] == 200
    says(one, "WARNING uploads of co2unit-1 are refused: cannot store: " + reason)
    os.rename(path, path + ".away")
    assert put(one, "readings-0000.tsv", 0, b"one\n")[0] == 200


def test_a_data_directory_that_is_removed_is_made_again(daemon):
    one = daemon()
    one.start()
    put(one, "readings-0000.tsv", 0, b"one\n")
    shutil.rmtree(one.data)
    assert [put(one, "readings-0000.tsv", 4, b"two\n")[0], put(one, "readings-0000.tsv", 0, b"one\ntwo\n")[0]] == [416, 200]
    assert held(one, "readings-0000.tsv") == b"one\ntwo\n"


# -- the same unit twice at once, and sudden death --------------------------------------------------------------------


def test_a_retry_that_overtakes_its_predecessor_changes_nothing(daemon):
    one = daemon()
    one.start()
    content = whole(32 * 4096)
    for at in range(0, len(content), 4096):
        threads = [threading.Thread(target=put, args=(one, "readings-0000.tsv", at, content[at:at + 4096])) for _ in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert held(one, "readings-0000.tsv") == content
    assert not os.path.exists(os.path.join(one.data, "co2unit-1", "set-aside"))


@pytest.mark.parametrize("rounds", [2, pytest.param(12, marks=pytest.mark.long)])
def test_what_was_acknowledged_survives_sudden_death(tmp_path, rounds):
    lines = []
    assert soak.soak(str(tmp_path), rounds=rounds, units=6, seed=20191007, say=lines.append) == []
    assert lines[-1].startswith("%d rounds, 6 units, " % rounds) and lines[-1].endswith("all well")
