#!/usr/bin/env python3
"""Kill the daemon without warning, again and again, while many units talk to it; after each time everything must be there.

``soak.py --rounds 200 --units 12 --seed 1``. A round: the daemon starts on what the last one left; every unit measures
and talks without pause, each in its thread; at a random moment the daemon is killed (SIGKILL). Then, on disk:

    acked       every byte and every ping that a unit has got a 200 for is there
    prefix      every file of ours is the beginning of the unit's
    counted     no ping is there that was not sent

Now and then a unit loses its position, and sends all of its past again. After the last round
the daemon stays until every unit has sent everything; then every file of ours equals the unit's, and the database that
grew while all this happened equals one that is built from the text at once.

A power cut also takes what the kernel has not written yet: see test_power.py, where it is played through, and
test_durability.py, which watches the order of system calls. Exit status: 0 when all was well, 1 when not, 2 usage.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import fipy

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LONGEST = 1.0                           # seconds until the daemon is killed, at most
KEPT_FILES = 8                          # a unit with more files than that does not send its past again: it takes too long
TABLES = {
    "co2_readings": "unit_id, nickname, date, time, temp, flash_count, " + ", ".join("co2_%02d" % n for n in range(1, 11)),
    "pings": "ping_ts, ping_date, ping_time, unit_id, nickname, rssi_raw, rssi_dbm",
    "error_logs": "unit_id, idate, itime, etype, odate, otime, level, message",
    "deploy_durations_tiered": "unit_id, nickname, site, tier, status, start_ts, end_ts, note",
}


class Daemon:
    """co2d.py as a process of its own, on directories that stay when it goes."""

    def __init__(self, path: str, **settings: Any) -> None:
        """`settings` become options: keep_free=0 is --keep-free 0."""
        self.path, self.data, self.var = path, os.path.join(path, "data"), os.path.join(path, "var")
        self.log_file, self.settings = os.path.join(path, "log"), {"import_delay": 0.1, "keep_free": 0, **settings}
        self.process: Optional[subprocess.Popen] = None
        self.url = ""

    def start(self, prefix: Sequence[str] = (), **options: Any) -> str:
        """Run it, below another command if need be; its URL once it listens. `options` are those of Popen."""
        values = {"listen": "127.0.0.1", "port": 0, "data_dir": self.data, "var_dir": self.var, **self.settings}
        arguments = [word for name, value in values.items() for word in ("--" + name.replace("_", "-"), str(value))]
        environ = {name: value for name, value in os.environ.items() if name not in ("CO2D_CONF", "NOTIFY_SOCKET", "LISTEN_PID")}
        begin = len(self.log())
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen([*prefix, sys.executable, os.path.join(HERE, "co2d.py"), *arguments],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, **options)
        self.url = self._await(lambda: re.search(r"listens on (127\.0\.0\.1:[0-9]+)", self.log()[begin:]))
        return self.url

    def _await(self, ready: Any) -> str:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self.process.poll() is None:
            found = ready()
            if found:
                return "http://" + found[1]
            time.sleep(0.01)
        raise RuntimeError("the daemon did not start: " + self.log()[-2000:])

    def log(self) -> str:
        """All that it has ever said."""
        try:
            with open(self.log_file, encoding="utf-8", errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal and wait; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        """Whatever happened, it does not stay."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


# -- the units --------------------------------------------------------------------------------------------------------


class Client:
    """A unit, and what it has been promised."""

    def __init__(self, unit: fipy.Unit, seed: str) -> None:
        self.unit, self.chance = unit, random.Random(seed)
        self.acked: Dict[Tuple[str, str], int] = {}             # directory, name -> bytes
        self.pings_acked = self.pings_sent = self.requests = 0

    def live_until(self, over: threading.Event) -> None:
        """Measure and talk."""
        while not over.is_set():
            self.unit.measure(self.chance.choice([0.1, 0.5, 1, 3]))
            if self.chance.random() < 0.3:
                self.unit.log_error(text="Traceback\n  at %s" % self.unit.now)
            if self.chance.random() < 0.05 and len(self.unit.files()) <= KEPT_FILES:
                self.unit.lose_state()
            if self.talk().error:
                over.wait(0.02)

    def talk(self) -> fipy.Session:
        """One session; notes what was acknowledged."""
        session = self.unit.sync()
        for request in session.requests:
            self.requests += 1
            if request.method == "POST":
                self.pings_sent += 1
                self.pings_acked += request.status == 200
            if request.method == "PUT" and request.status == 200:
                path, offset = re.search(r"push-sequential/(.+)\?offset=([0-9]+)$", request.target).groups()
                place = (os.path.dirname(path), os.path.basename(path))
                self.acked[place] = max(self.acked.get(place, 0), int(offset) + request.sent)
        return session

    def problems(self, data: str) -> Iterator[str]:
        """What is wrong with our copy of its files."""
        for directory in fipy.DIRECTORIES:
            for name, theirs in self.unit.files(directory).items():
                ours = read(os.path.join(data, self.unit.unit_id, *directory.split("/"), name))
                where = "%s/%s/%s: %d of %d bytes" % (self.unit.unit_id, directory, name, len(ours), len(theirs))
                if len(ours) < self.acked.get((directory, name), 0):
                    yield where + ", %d acknowledged" % self.acked[directory, name]
                if not theirs.startswith(ours):
                    yield where + ", not the beginning of the unit's"


def read(path: str) -> bytes:
    """The content of a file; nothing when there is none."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def stored_pings(var: str) -> Counter:
    """Unit id -> complete rows."""
    directory = os.path.join(var, "pings")
    lines = [line.split(b"\t") for name in sorted(os.listdir(directory) if os.path.isdir(directory) else [])
             for line in read(os.path.join(directory, name)).split(b"\n")[:-1]]
    return Counter(row[1].decode() for row in lines if len(row) == 5)


# -- rounds -----------------------------------------------------------------------------------------------------------


def check(daemon: Daemon, clients: Sequence[Client]) -> List[str]:
    """What is wrong on disk."""
    problems = [problem for client in clients for problem in client.problems(daemon.data)]
    rows = stored_pings(daemon.var)
    for client in clients:
        if not client.pings_acked <= rows[client.unit.unit_id] <= client.pings_sent:
            problems.append("%s: %d pings stored, %d acknowledged, %d sent" % (
                client.unit.unit_id, rows[client.unit.unit_id], client.pings_acked, client.pings_sent))
    return problems


def kill_one_round(daemon: Daemon, clients: Sequence[Client], seconds: float) -> None:
    """Start, let the units talk for so long, kill."""
    url, over = daemon.start(), threading.Event()
    for client in clients:
        client.unit.urls = [url]
    threads = [threading.Thread(target=client.live_until, args=(over,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    daemon.end(signal.SIGKILL)
    over.set()
    for thread in threads:
        thread.join()


def finish(daemon: Daemon, clients: Sequence[Client]) -> List[str]:
    """Let every unit send what is left; what is still wrong then."""
    url, problems = daemon.start(), []
    for client in clients:
        client.unit.urls = [url]
        if not any(client.talk().finished for _ in range(20)):
            problems.append("%s does not finish" % client.unit.unit_id)
        client.acked.update({(directory, name): len(data) for directory in fipy.DIRECTORIES
                             for name, data in client.unit.files(directory).items()})
    status = daemon.end()
    return problems + check(daemon, clients) + (["exit status %d" % status] if status else [])


def compare_databases(daemon: Daemon) -> List[str]:
    """Whether the database that grew equals one that is built at once."""
    grown, fresh = os.path.join(daemon.var, "db.sqlite3"), os.path.join(daemon.path, "fresh.sqlite3")
    for file in (grown, fresh):
        done = subprocess.run([sys.executable, os.path.join(HERE, "importer.py"), "import", "--data-dir", daemon.data,
                               "--var-dir", daemon.var, "--db", file], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            return ["import into %s failed: %s" % (file, done.stdout.decode("utf-8", "replace").strip()[-500:])]
    return ["%s: %d rows grew, %d rows built at once, and they differ" % (table, len(one), len(other))
            for table in TABLES for one, other in [(rows_of(grown, table), rows_of(fresh, table))] if one != other]


def rows_of(file: str, table: str) -> List[str]:
    """The original columns of a table, in an order of their own."""
    db = sqlite3.connect(file)
    try:
        return sorted(map(repr, db.execute("SELECT %s FROM %s" % (TABLES[table], table))))
    finally:
        db.close()


def soak(path: str, rounds: int, units: int, seed: int, say: Any = print) -> List[str]:
    """All rounds; what went wrong."""
    chance, daemon, problems = random.Random(seed), Daemon(path, quiet="yes"), []
    clients = [Client(unit, "%d %s" % (seed, unit.unit_id))
               for unit in fipy.make_units(units, os.path.join(path, "cards"), [], seed)]
    try:
        for number in range(1, rounds + 1):
            seconds = chance.uniform(0.02, LONGEST)
            kill_one_round(daemon, clients, seconds)
            found = check(daemon, clients)
            problems += ["round %d: %s" % (number, problem) for problem in found]
            say("round %3d: killed after %.2f s; %d requests, %d bytes acknowledged so far; %s" % (
                number, seconds, sum(client.requests for client in clients),
                sum(sum(client.acked.values()) for client in clients), "; ".join(found[:5]) or "all there"))
        problems += finish(daemon, clients) + compare_databases(daemon)
        say("%d rounds, %d units, %d requests, %d readings in the database: %s" % (
            rounds, units, sum(client.requests for client in clients), len(rows_of(os.path.join(daemon.var, "db.sqlite3"), "co2_readings")),
            "%d problems" % len(problems) if problems else "all well"))
    finally:
        daemon.close()
    return problems


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="kill the daemon under load, again and again, and check what is left")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--units", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="DIR", help="work here, and leave everything there (default: thrown away)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        path = options.keep or scratch
        os.makedirs(path, exist_ok=True)
        problems = soak(path, options.rounds, options.units, options.seed, lambda line: print(line, flush=True))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
