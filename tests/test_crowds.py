"""Clients that are slow on purpose, hundreds to thousands, beside units that are honest. Against the real daemon; takes minutes."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time

import pytest

import bench
from test_co2d import read_all
from test_process import Daemon

pytestmark = pytest.mark.long
CHUNK = b"PUT /ou/co2unit-%d/push-sequential/data/readings/readings-%04d.tsv?offset=0 HTTP/1.0\r\nContent-Length: 4096\r\n\r\n"


@pytest.fixture
def start(tmp_path):
    """Starts a daemon; this process may have as many sockets as the system allows."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    started = []

    def make(**more):
        started.append(Daemon(tmp_path, "--quiet", "yes", **more))
        return started[-1]

    yield make
    for one in started:
        one.process.kill()
        one.process.wait()
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def connect(one, beginning, receive_buffer=None):
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect(("127.0.0.1", one.port))
    sock.sendall(beginning)
    return sock


@contextlib.contextmanager
def idle_bodies(one):
    """600 clients that announce a chunk and send nothing of it."""
    socks = [connect(one, CHUNK % (n, 0)) for n in range(600)]
    yield
    [sock.close() for sock in socks]


@contextlib.contextmanager
def slow_heads(one):
    """10,000 clients, or as many as may be, that send a byte of their head every five seconds, and come back when dropped."""
    number = min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1000)
    socks, stop = [], threading.Event()

    def drip():
        while not stop.is_set():
            for n, sock in enumerate(socks):
                try:
                    sock.send(b"G")
                except OSError:
                    sock.close()
                    with contextlib.suppress(OSError):
                        socks[n] = connect(one, b"G")
                if n % 100 == 0 and stop.wait(0.05):
                    return

    socks += [connect(one, b"G") for _ in range(number)]
    thread = threading.Thread(target=drip)
    thread.start()
    yield
    stop.set()
    thread.join()
    [sock.close() for sock in socks]


@contextlib.contextmanager
def slow_readers(one):
    """600 clients that ask for a big file and read nothing of it."""
    os.makedirs(os.path.join(one.var, "pub"), exist_ok=True)
    with open(os.path.join(one.var, "pub", "big"), "wb") as file:
        file.truncate(50_000_000)
    socks = [connect(one, b"GET /var/pub/big HTTP/1.0\r\n\r\n", 4096) for _ in range(600)]
    yield
    [sock.close() for sock in socks]


def honest_units(one, seconds):
    """16 units that call again and again: 99th percentile in seconds, replies other than 200."""
    times, others, end = [], [], time.monotonic() + seconds

    def call(client):
        number = 0
        while time.monotonic() < end:
            request = bench.ping(client, 0) if number % 2 else CHUNK % (10_000 + client, number) + b"r" * 4096
            began = time.monotonic()
            with connect(one, request) as sock:
                reply = read_all(sock)
            times.append(time.monotonic() - began)
            if not reply.startswith(b"HTTP/1.1 200 "):
                others.append(reply)
            number += 1

    threads = [threading.Thread(target=call, args=(n,)) for n in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return sorted(times)[len(times) * 99 // 100], others


def cpu_seconds(pid):
    with open("/proc/%d/stat" % pid) as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("attack", [idle_bodies, slow_heads, slow_readers])
def test_honest_units_are_served_beside_slow_clients_that_take_little(start, attack):
    one = start()
    with attack(one):
        p99, others = honest_units(one, 5)
        before = cpu_seconds(one.process.pid)
        time.sleep(4)
        cpu = (cpu_seconds(one.process.pid) - before) / 4
        megabytes = bench.memory(one.process.pid)
    assert others == []
    assert p99 < 2 and cpu < 0.2 and megabytes < 100, (p99, cpu, megabytes)


def test_heads_by_single_bytes_take_little_cpu(start):
    one = start()
    socks = [connect(one, b"GET /") for _ in range(200)]
    before, end = cpu_seconds(one.process.pid), time.monotonic() + 5
    while time.monotonic() < end:
        for sock in socks:                                      # 1,000 bytes a second together
            sock.send(b"x")
            time.sleep(0.001)
    assert (cpu_seconds(one.process.pid) - before) / 5 < 0.2
    [sock.close() for sock in socks]


@pytest.mark.parametrize("attack", [idle_bodies, slow_readers])
def test_a_known_unit_on_a_bad_link_gets_its_200_beside_slow_clients(start, attack):
    one = start()
    os.makedirs(os.path.join(one.data, "co2unit-9", "updates", "update-1", "flash"))
    with open(os.path.join(one.data, "co2unit-9", "updates", "update-1", "flash", "main.py"), "wb") as file:
        file.write(b"u" * 150_000)
    with attack(one), connect(one, CHUNK % (9, 0)) as chunk:
        with connect(one, b"GET /ou/co2unit-9/updates/update-1/flash/main.py HTTP/1.0\r\n\r\n", 4096) as update:
            received = 0
            for second in range(60):
                if not 20 <= second < 40:
                    chunk.sendall(b"r" * (4096 // 40 + 1) if second < 59 else b"r" * (4096 - 39 * 103))
                received += len(update.recv(3000))
                time.sleep(1)
            received += len(read_all(update))
        assert read_all(chunk).startswith(b"HTTP/1.1 200 ")
    assert received > 150_000


def test_with_few_descriptors_honest_units_are_served_beside_2000_connections(start):
    one = start(command=["prlimit", "--nofile=256:256"])
    for n in range(16):
        os.makedirs(os.path.join(one.data, "co2unit-%d" % n), exist_ok=True)
    socks = []

    def crowd():
        for _ in range(2000):
            with contextlib.suppress(OSError):
                socks.append(connect(one, b"GET"))

    thread = threading.Thread(target=crowd)
    thread.start()
    p99, others = honest_units(one, 40)
    thread.join()
    assert others == []
    [sock.close() for sock in socks]
