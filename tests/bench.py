#!/usr/bin/env python3
"""All figures of the product in one table, each beside a yardstick measured in the same run on the same machine.

`make bench` runs everything; ``tests/bench.py http`` (or memory, import, views, pages) one section. The last output for comparison is
kept in tests/bench.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import platform
import re
import resource
import select
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

HERE = os.path.dirname(os.path.abspath(__file__))
PROJECT = os.path.dirname(HERE)
sys.path[:0] = [PROJECT, HERE]

import fleet
import importer
from sensors import reading_lines

QUICK = bool(os.environ.get("QUICK"))   # a small run, to try the benchmark itself
CLIENTS = 16                            # concurrent connections of a load
ROW = "%-46s %14s   %s"


class Figure(NamedTuple):
    """One line of the table."""

    what: str
    value: str
    beside: str = ""


def say(figure: Figure) -> None:
    print(ROW % figure, flush=True)


# -- servers ----------------------------------------------------------------------------------------------------------

DO_NOTHING = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200); self.send_header("Content-Length", "3"); self.end_headers(); self.wfile.write(b"{}\\n")
    do_PUT = do_GET = do_POST
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer.handle_error = lambda *args: None
http.server.ThreadingHTTPServer.request_queue_size = int(sys.argv[1])
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print("port", server.server_port, flush=True)
server.serve_forever()
"""


# The least that a durable threaded server can do: what comes goes to the end of a file of that name, without a look at it.
APPEND_ONLY = """
import os, re, socket, sys, threading
listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
print("port", listener.getsockname()[1], flush=True)
request_line, length = re.compile(rb"[A-Z]+ /([^ ?]+)"), re.compile(rb"content-length: *([0-9]+)", re.I)
def work():
    while True:
        sock, _ = listener.accept()
        data = sock.recv(65536)
        end = data.find(b"\\r\\n\\r\\n") + 4
        while len(data) < end + int(length.search(data)[1]):
            data += sock.recv(65536)
        name = request_line.match(data)[1].replace(b"/", b"_").decode()
        fd = os.open(os.path.join(sys.argv[1], name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, data[end:])
        os.fdatasync(fd)
        os.close(fd)
        sock.send(b"HTTP/1.0 200 OK\\r\\n\\r\\n{}\\n")
        sock.close()
for _ in range(16):
    threading.Thread(target=work).start()
"""


@contextlib.contextmanager
def python(program: str, argument: str) -> Iterator[int]:
    """A server that says its port: the port."""
    process = subprocess.Popen([sys.executable, "-c", program, argument], stdout=subprocess.PIPE, universal_newlines=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().split()[1])
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def daemon(directory: str, *options: str) -> Iterator[Tuple[int, int]]:
    """co2d on a free port: (port, pid)."""
    command = [sys.executable, os.path.join(PROJECT, "co2d.py"), "--listen", "127.0.0.1", "--port", "0", "--data-dir",
               os.path.join(directory, "data"), "--var-dir", os.path.join(directory, "var"), "--quiet", "yes", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, universal_newlines=True)
    try:
        assert process.stderr is not None
        found = re.search(r"listens on [^ ]*:([0-9]+)", process.stderr.readline())
        assert found, "co2d did not start"
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield int(found[1]), process.pid
    finally:
        process.terminate()
        process.wait()


def memory(pid: int) -> float:
    """Resident memory in MB."""
    with open("/proc/%d/status" % pid) as file:
        found = re.search(r"VmRSS:\s+([0-9]+) kB", file.read())
    return int(found[1]) / 1024 if found else float("nan")


# -- loads ------------------------------------------------------------------------------------------------------------


def exchange(port: int, request: bytes, timeout: float = 60) -> bytes:
    """One request as a unit sends it: a connection of its own, the reply read to its end."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        sock.sendall(request)
        pieces = []
        while True:
            data = sock.recv(65536)
            if not data:
                return b"".join(pieces)
            pieces.append(data)


def ping(client: int, number: int) -> bytes:
    return b"POST /ou/co2unit-%d/alive?site_code=bench&rssi_raw=8&rssi_dbm=-97 HTTP/1.0\r\nHost: x\r\n\r\n" % client


def chunk(client: int, number: int) -> bytes:
    name, offset = number // 25, number % 25 * 4096
    return (b"PUT /ou/co2unit-%d/push-sequential/data/readings/readings-%04d.tsv?offset=%d HTTP/1.0\r\nHost: x\r\n"
            b"Content-Length: 4096\r\n\r\n" % (client, name, offset)) + b"r" * 4096


def mixed(client: int, number: int) -> bytes:
    """What units ask: pings, chunks (of ten files, again and again), updates; and now and then a page."""
    if number % 4 == 1:
        return chunk(client, number // 4 % 250)
    if number % 4 == 2:
        return b"GET /ou/co2unit-%d/updates?recursive=False HTTP/1.0\r\nHost: x\r\n\r\n" % client
    return ping(client, number) if number % 500 else b"GET /status/alive/recent HTTP/1.0\r\nHost: x\r\n\r\n"


class Clients:
    """Many clients on one thread, so that the load takes as little from the server's machine as it can.

    Each connection is one request, as with the units; when it is answered its client makes the next one.
    """

    def __init__(self, port: int, make: Callable[[int, int], bytes]) -> None:
        self.port, self.make = port, make
        self.poll = select.epoll()
        self.open: Dict[int, Tuple[socket.socket, int, int, float]] = {}        # fd: socket, client, number, began
        self.numbers: Dict[int, int] = {}                       # client: its last number
        self.times: List[float] = []
        self.failed = 0

    def connect(self, client: int, number: int) -> None:
        sock = socket.socket()
        began = time.monotonic()
        sock.connect(("127.0.0.1", self.port))
        sock.send(self.make(client, number))
        self.open[sock.fileno()] = sock, client, number, began
        self.poll.register(sock.fileno(), select.EPOLLRDHUP | select.EPOLLHUP)

    def run(self, clients: int, seconds: float) -> float:
        """Requests per second."""
        began, done = time.monotonic(), len(self.times)
        for client in range(clients):
            self.connect(client, self.numbers.get(client, -1) + 1)
        while self.open:
            for fd, _ in self.poll.poll(60):
                sock, client, number, asked = self.open.pop(fd)
                self.failed += b" 200 " not in sock.recv(65536)[:15]
                sock.close()
                self.times.append(time.monotonic() - asked)
                self.numbers[client] = number
                if time.monotonic() - began < seconds:
                    self.connect(client, number + 1)
        return (len(self.times) - done) / (time.monotonic() - began)


def load(port: int, make: Callable[[int, int], bytes], seconds: float = 4.0) -> Tuple[float, float, int]:
    """Requests per second, 99th percentile in ms, failures."""
    clients = Clients(port, make)
    rate = clients.run(CLIENTS, seconds)
    return rate, sorted(clients.times)[int(len(clients.times) * 0.99)] * 1000, clients.failed


def at_once(port: int, number: int) -> Tuple[float, float, int]:
    """`number` clients connect in the same instant: seconds for all, 99th percentile in s, failures."""
    times, failures, start = [], [], threading.Event()

    def one(client: int) -> None:
        start.wait()
        began = time.monotonic()
        try:
            if b" 200 " not in exchange(port, ping(client, 0))[:15]:
                failures.append(client)
        except OSError:
            failures.append(client)
        times.append(time.monotonic() - began)

    threading.stack_size(256 * 1024)
    threads = [threading.Thread(target=one, args=(n,)) for n in range(number)]
    [thread.start() for thread in threads]
    began = time.monotonic()
    start.set()
    [thread.join() for thread in threads]
    times.sort()
    return time.monotonic() - began, times[int(len(times) * 0.99)], len(failures)


@contextlib.contextmanager
def slow_clients(port: int, number: int) -> Iterator[None]:
    """`number` clients that send a byte of their head every two seconds, and come back when they are dropped."""
    stop, socks = threading.Event(), {}

    def connect(n: int) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.connect(("127.0.0.1", port))
        socks[n] = sock

    def drip() -> None:
        while not stop.wait(0.02):
            turn = int(time.monotonic() / 0.02) % 100
            for n in range(turn, number, 100):
                try:
                    socks[n].send(b"G" if socks[n] else b"")
                except BlockingIOError:
                    pass
                except OSError:
                    socks[n].close()
                    connect(n)

    for n in range(number):
        connect(n)
    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        [sock.close() for sock in socks.values()]


def honest_among_slow(port: int, number: int, seconds: float) -> Tuple[float, int]:
    """99th percentile in s of an honest unit's requests while others drip; failures."""
    times, failures = [], 0
    with slow_clients(port, number):
        time.sleep(1)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                failures += b" 200 " not in exchange(port, ping(1, 0))[:15]
            except OSError:
                failures += 1
            times.append(time.monotonic() - began)
            time.sleep(0.02)
    return sorted(times)[int(len(times) * 0.99)], failures


def synced_appends(directory: str, threads: int, seconds: float = 2.0) -> float:
    """4 KiB appends with fdatasync per second, each thread to a file of its own: what the machine can do."""
    counts: List[int] = []
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        fd, count = os.open(os.path.join(directory, "append-%d" % number), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 0
        while time.monotonic() < end:
            os.write(fd, b"r" * 4096)
            os.fdatasync(fd)
            count += 1
        os.close(fd)
        counts.append(count)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    return sum(counts) / seconds


def bench_http(directory: str) -> None:
    """Requests per second, crowds, slow clients, memory, start."""
    with python(DO_NOTHING, "5") as port:                       # its own queue overflows, and then the kernel's retries are measured
        stock, slowest, failed = load(port, ping)
        say(Figure("do-nothing ThreadingHTTPServer, as it comes", "%.0f requests/s" % stock, "%d clients, listen queue of 5, p99 %.0f ms"
                   % (CLIENTS, slowest)))
    with python(DO_NOTHING, "1024") as port:
        base, slowest, failed = load(port, ping)
        say(Figure("do-nothing ThreadingHTTPServer, queue of 1,024", "%.0f requests/s" % base, "p99 %.0f ms, %d failed" % (slowest, failed)))
        seconds, p99, failed = at_once(port, 1000)
        say(Figure("  1,000 clients at the same instant", "p99 %.2f s" % p99, "%.1f s in all, %d failed" % (seconds, failed)))
    with python(APPEND_ONLY, directory) as port:
        rate, slowest, failed = load(port, chunk)
        say(Figure("4 KiB chunks appended and synced, nothing else", "%.0f requests/s" % rate, "%.1f x do-nothing, p99 %.0f ms, %d failed"
                   % (rate / base, slowest, failed)))
    subprocess.run([sys.executable, os.path.join(PROJECT, "co2d.py"), "--version"], stdout=subprocess.DEVNULL, check=True)
    say(Figure("4 KiB appends + fdatasync, 1 thread", "%.0f /s" % synced_appends(directory, 1)))
    say(Figure("4 KiB appends + fdatasync, %d threads" % CLIENTS, "%.0f /s" % synced_appends(directory, CLIENTS)))
    began = time.monotonic()
    with daemon(directory) as (port, pid):
        exchange(port, b"GET / HTTP/1.0\r\n\r\n")
        started = time.monotonic() - began
        time.sleep(1)
        say(Figure("co2d: start to first reply", "%.2f s" % started, "limit 0.3"))
        say(Figure("co2d: idle memory", "%.1f MB" % memory(pid), "limit 25"))
        for name, make in (("durable pings", ping), ("durable 4 KiB chunks", chunk)):
            rate, slowest, failed = load(port, make)
            say(Figure("co2d: " + name, "%.0f requests/s" % rate, "%.1f x do-nothing, p99 %.0f ms, %d failed" % (
                rate / base, slowest, failed)))
        seconds, p99, failed = at_once(port, 1000)
        say(Figure("co2d: 1,000 units at the same instant", "p99 %.2f s" % p99, "%.1f s in all, %d failed" % (seconds, failed)))
        p99, failed = honest_among_slow(port, 1000, 8)
        say(Figure("co2d: an honest unit among 1,000 slow clients", "p99 %.2f s" % p99, "%d failed" % failed))
        say(Figure("co2d: memory after all this", "%.1f MB" % memory(pid)))


def bench_memory(directory: str) -> None:
    """Resident memory over a million requests of all kinds."""
    total, seen = 20_000 if QUICK else 1_000_000, []
    with daemon(directory, "--max-unit-files", "1000000") as (port, pid):
        clients = Clients(port, mixed)
        for tenth in range(1, 11):
            while len(clients.times) < total * tenth // 10:
                clients.run(CLIENTS, 0.5)
            seen.append(memory(pid))
    say(Figure("co2d: memory over %d requests" % len(clients.times), "%.1f MB" % seen[-1], "after each tenth: "
               + " ".join("%.0f" % size for size in seen)))


# -- import -----------------------------------------------------------------------------------------------------------


# Between us and the command, because a child's peak memory counts from its parent's at the fork.
TIMED = """
import resource, subprocess, sys, time
began = time.monotonic()
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, status)
"""


def run_timed(*command: str) -> Tuple[float, float]:
    """Seconds and peak memory in MB of a command that must succeed."""
    done = subprocess.run([sys.executable, "-S", "-c", TIMED, *command], stdout=subprocess.PIPE, check=True,
                          universal_newlines=True)
    seconds, peak, status = done.stdout.split()
    assert status == "0", command
    return float(seconds), float(peak)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """What is started meanwhile gets a single core."""
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(all_cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_cores)


DATA = {                                # what the lines are like: how the fleet writes them, at most so many times .import
    "as sensors write it, 0.2 % dirt": (fleet.Habits(soiled=0.002), 2.0),
    "2 % broken lines": (fleet.Habits(soiled=0.02), 3.0),
    "CRLF": (fleet.Habits(ends="\r\n", soiled=0.002), 3.0),
    "a None in each line": (fleet.Habits(missing=1.0, soiled=0.002), 3.0),
    "raw values in each line": (fleet.Habits(newer=1.0, soiled=0.002), 3.0),
}
DIRT = [*fleet.READING_DIRT, "tail"]


def dot_import(directory: str, fields: int) -> Optional[float]:
    """Seconds of the sqlite3 command line's bare .import of the same lines. A quote would swallow those behind it."""
    if not shutil.which("sqlite3"):
        return None
    lines = os.path.join(directory, "all.tsv")
    with open(lines, "wb") as out:
        for path in sorted(glob.glob(os.path.join(directory, "remote_data", "*", "data", "readings", "*.tsv"))):
            with open(path, "rb") as file:
                for line in file:
                    out.write(b"\t".join(line.replace(b'"', b"'").rstrip(b"\r\n").split(b"\t")[:fields]) + b"\n")
    columns = ", ".join("c%d" % n for n in range(fields))
    bare = os.path.join(directory, "bare.sqlite3")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(bare)
    seconds, _ = run_timed("sqlite3", bare, "CREATE TABLE r(%s)" % columns, ".mode tabs",
                           ".import %s r" % lines)
    os.unlink(lines)
    return seconds


def bench_import(directory: str) -> None:
    """A full rebuild of each kind of data beside a bare .import of its lines, in turns; one new line in a large archive."""
    units, days = (100, 104) if not QUICK else (20, 14)
    for number, (what, (habits, limit)) in enumerate(DATA.items()):
        root = os.path.join(directory, "data-%d" % number)
        made = fleet.make_archive(root, units=units, days=days, dirt=DIRT, habits=habits)
        readings = sum(unit.readings for unit in made.units)
        archive = ["--data-dir", os.path.join(root, "remote_data"), "--var-dir", os.path.join(root, "var")]
        rebuild = [sys.executable, os.path.join(PROJECT, "importer.py"), "rebuild", *archive]
        turns = []
        for _ in range(1 if QUICK else 3):
            bare = dot_import(root, 21 if habits.newer == 1 else 16)
            ours, peak = run_timed(*rebuild)
            with one_core():
                alone, _ = run_timed(*rebuild)
            turns.append((ours, alone, bare or 0.0, peak))
        ours, alone, bare, peak = map(min, zip(*turns))
        note = "%.0f readings/s, peak %.0f MB a process, one core %.1f s" % (readings / ours, peak, alone)
        if bare:
            note += "; .import %.1f s, ours is %.1f x, limit %.1f" % (bare, ours / bare, limit)
        say(Figure("import: %d readings, %s" % (readings, what), "%.1f s" % ours, note))
        if not number:
            bench_export(root, archive)
        shutil.rmtree(root)
    bench_new_line(os.path.join(directory, "large"))


def bench_export(directory: str, archive: List[str]) -> None:
    """An export beside the sqlite3 shell with the same columns, in turns."""
    if not shutil.which("sqlite3"):
        return
    export = [sys.executable, os.path.join(PROJECT, "importer.py"), "export", "readings", *archive]
    view = ["sqlite3", "-csv", "-header", os.path.join(directory, "var", "db.sqlite3"), "SELECT * FROM readings"]
    table = view[:-1] + ["SELECT * FROM co2_readings"]
    turns = [[run_timed("sh", "-c", 'exec "$@" > /dev/null', "sh", *command)[0] for command in (export, view, table)]
             for _ in range(3)]
    ours, the_view, the_table = map(min, zip(*turns))
    say(Figure("export: all readings as CSV", "%.1f s" % ours, "the sqlite3 shell: the same view %.1f s, ours is %.1f x; "
               "the bare table %.1f s, %.1f x, limit 2.5" % (the_view, ours / the_view, the_table, ours / the_table)))


def bench_new_line(directory: str) -> None:
    """1,000 units with 10 files each: one more line, a night's chunk of each of 100 units, nothing new."""
    data = os.path.join(directory, "remote_data")
    start = datetime(2019, 9, 1)
    paths = []
    for number in range(1000):
        unit = "co2unit-%012x" % number
        folder = os.path.join(data, unit, "data", "readings")
        os.makedirs(folder)
        lines = reading_lines(unit, "n", start, 248)
        for file_number in range(10):
            with open(os.path.join(folder, "readings-%04d.tsv" % file_number), "w") as file:
                file.write("".join(lines[20 * file_number:20 * file_number + 20]))
        paths.append((os.path.join(folder, "readings-0009.tsv"), lines[200:]))
    archive = importer.Archive((data,), os.path.join(directory, "var"), os.path.join(directory, "db.sqlite3"))
    importer.import_new(archive)
    keeper = contextlib.ExitStack()
    keeper.enter_context(importer.open_db(archive.db))          # as the daemon does
    times = []
    for path, lines in paths[:20]:
        append(path, lines[:1])
        began = time.monotonic()
        importer.import_new(archive, [path])
        times.append(time.monotonic() - began)
    say(Figure("import: one new line among 10,000 files", "%.1f ms" % (sorted(times)[10] * 1000), "median of 20, limit 20"))
    for path, lines in paths[100:200]:
        append(path, lines)
    began = time.monotonic()
    importer.import_new(archive, [path for path, _ in paths[100:200]])
    say(Figure("import: a night's chunk of 48 lines", "%.2f ms" % ((time.monotonic() - began) * 10),
               "each of 100 at once, limit 0.5"))
    keeper.close()
    began = time.monotonic()
    importer.import_new(archive)
    say(Figure("import: a look at 10,000 files, nothing new", "%.2f s" % (time.monotonic() - began), "limit 1"))


def append(path: str, lines: Sequence[str]) -> None:
    """Let a file grow."""
    with open(path, "a") as file:
        file.write("".join(lines))


# -- views ------------------------------------------------------------------------------------------------------------


def fill(db: sqlite3.Connection, units: int, days: int, raw_days: int, last_day: int) -> None:
    """Rollups for all days, a ping a day, a deployment a unit; readings of the last `raw_days`, one a month ago, one at the begin."""
    per_day = 48
    value = "400 + 60 * abs((ts / 1800 + u * 7) % 96 - 48) / 48"
    db.executescript("""
        CREATE TEMP TABLE n(i INTEGER PRIMARY KEY);
        INSERT INTO n WITH RECURSIVE c(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM c WHERE i < %d) SELECT i FROM c;
        CREATE TEMP TABLE us AS SELECT i AS u, printf('co2unit-%%012x', i) AS unit FROM n WHERE i < %d;
        INSERT INTO co2_readings(unit_id, nickname, temp, flash_count, ts, co2, co2_flag, temp_flag, qc, source, offset)
            SELECT unit, 'n' || u, -5 + u %% 20, 0, ts, %s, 1, 1, 0, 0, 0 FROM (SELECT u, unit, (%d - d.i) * 86400 + h.i * 1800 AS ts
            FROM us CROSS JOIN n d CROSS JOIN n h WHERE h.i < %d AND (d.i < %d OR h.i = 0 AND d.i IN (31, %d)));
        INSERT INTO daily SELECT unit, %d - d.i, %d, %d, %d * 430.0, 400, 460, 0, NULL, NULL, %d, %d * 2.0, -9, 9, 0, NULL, NULL,
            (%d - d.i) * 86400, (%d - d.i) * 86400 + 84600, 1800
            FROM us CROSS JOIN n d WHERE d.i < %d ORDER BY 1, 2;
        INSERT INTO pings SELECT '', '', '', unit, 'n' || u, 8, -85 - u %% 20 - d.i * 7919 %% 16, (%d - d.i) * 86400 + 11000, 0, 0
            FROM us CROSS JOIN n d WHERE d.i < %d;
        INSERT INTO deploy_durations_tiered SELECT unit, 'n' || u, printf('site_%%03d', u), 10, 'deployed', NULL, NULL, NULL,
            NULL, NULL, 0, 0 FROM us;
        """ % (max(units, days), units, value, last_day, per_day, raw_days, days - 1, last_day, per_day, per_day, per_day, per_day,
               per_day, last_day, last_day, days, last_day, days))


def installed(directory: str) -> str:
    """The directory with the commands of an installation."""
    subprocess.run(["make", "-s", "-C", PROJECT, "install", "DESTDIR=" + directory, "PREFIX=/usr", "PYTHON=" + sys.executable],
                   check=True, stdout=subprocess.DEVNULL)
    return directory + "/usr/bin"


def time_views(commands: str, path: str, note: str, views: Sequence[str]) -> None:
    """Every view as the installed command, and the first one as the script of a checkout, which Python compiles each time, beside
    the interpreter's start with the same imports; in turns, so that what else the machine does hits all alike."""
    start = "import sys; sys.path[:0] = [%r]; import plot_ascii" % os.path.join(os.path.dirname(commands), "lib", "co2d")
    script = views[0] + " (as a script)"
    runs = {"": ["-c", start], script: [os.path.join(PROJECT, "plot_ascii.py"), *views[0].split(), "--db", path],
            **{view: [os.path.join(commands, "plot_ascii"), *view.split(), "--db", path] for view in views}}
    times: Dict[str, List[Tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(3 if QUICK else 9):
        for name, command in runs.items():
            times[name].append(run_timed(sys.executable, *command))
    middle = {name: sorted(found)[len(found) // 2][0] for name, found in times.items()}
    say(Figure("views on %s: start with imports" % note, "%.0f ms" % (middle[""] * 1000), "medians of %d" % len(times[""])))
    for view in list(runs)[1:]:
        say(Figure("  " + view, "%.0f ms" % (middle[view] * 1000), "%.1f x the start, peak %.0f MB" % (
            middle[view] / middle[""], max(peak for _, peak in times[view]))))


VIEWS = ["co2", "co2 --site site_001", "pings", "status", "signal", "errors", "gaps"]


def bench_views(directory: str) -> None:
    """1 million readings of 20 sites over three years; 100 million of 1,000 units over five, as rollups and a sample."""
    today, commands = int(time.time()) // 86400, installed(os.path.join(directory, "root"))
    for units, days, raw_days, note in ((20, 1095, 1095, "1 M readings"), (1000, 1826, 15, "100 M readings")):
        path = os.path.join(directory, "%d.sqlite3" % units)
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.executescript(importer.SCHEMA + importer.INDEXES + "PRAGMA user_version = %d; BEGIN;" % importer.SCHEMA_VERSION)
            fill(db, units, days, raw_days, today - 1)
            db.commit()
        everything = [view + " --all" + days for days in ("", " --recent-days 0") for view in VIEWS if "--" not in view]
        time_views(commands, path, note, VIEWS + everything * (units == 1000))


PAGES = {                               # view of the daemon, arguments of the URL
    "12 sites, 14 days": ("co2", {"recent-days": "14"}),
    "one site, a year": ("co2", {"site": fleet.site_of(1), "recent-days": "365"}),
    "pings and the rest, a year": ("alive", {}),
}


def bench_pages(directory: str) -> None:
    """Pages of the daemon as pictures beside the same pages as text, in turns, in a process that has made them before."""
    import plot_ascii
    made = fleet.make_archive(directory, units=12, days=400, habits=fleet.Habits(soiled=0.002))
    archive = importer.Archive((os.path.join(directory, "remote_data"),), os.path.join(directory, "var"), os.path.join(directory, "db"))
    importer.import_new(archive)
    now = int(datetime.fromisoformat(made.end + "+00:00").timestamp())
    for name, (view, query) in PAGES.items():
        times: Dict[bool, List[float]] = {False: [], True: []}
        size = 0
        for _ in range(3 if QUICK else 31):
            for html in times:
                begin = time.perf_counter()
                size = len(plot_ascii.web_page(view, archive.db, query, html, now).encode())
                times[html].append(time.perf_counter() - begin)
        text, picture = (sorted(found)[len(found) // 2] * 1000 for found in times.values())
        say(Figure("page of " + name, "%.0f ms" % picture, "%.2f x its text (%.0f ms); %.0f kB" % (picture / text, text, size / 1000)))


SECTIONS = {"http": bench_http, "memory": bench_memory, "import": bench_import, "views": bench_views, "pages": bench_pages}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the sections named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], help="sections to run (default: all)")
    arguments = parser.parse_args(argv)
    os.environ.update(CO2D_CONF=os.devnull, COLUMNS="80", LINES="24")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)             # as on a machine where it has run before
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print("%s, %d cores, Python %s, SQLite %s, %s" % (platform.machine(), os.cpu_count() or 0, platform.python_version(),
                                                      sqlite3.sqlite_version, time.strftime("%Y-%m-%d", time.gmtime())))
    for name in arguments.sections or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="co2d-bench-", dir=os.environ.get("BENCH_DIR")) as directory:
            SECTIONS[name](directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
