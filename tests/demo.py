#!/usr/bin/env python3
"""`make demo`: a fleet of simulated units, two weeks, end to end, in a temporary directory.

The daemon's own server answers on a free port of 127.0.0.1; its clock follows the simulation, so that the nights of two
weeks pass in seconds. Everything else is as in the field: units push their cards in chunks over HTTP; one takes another
nickname, one is sent to another server, one breaks its files, one falls silent; the import thread follows; the pages
are printed by plot_ascii.py.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timedelta

HERE = os.path.dirname(os.path.abspath(__file__))
PROJECT = os.path.dirname(HERE)
sys.path[:0] = [PROJECT, HERE]

import co2d
import fipy
import importer
import seqfile

DAYS = 14
SITES = ["vj_re_sn_1", "vj_re_sn_2", "vj_re_sn_3", "vj_re_sn_4", "vj_ko_sn_1", "vj_ko_sn_2", "is_ad_sn_1", "is_ad_sn_2",
         "is_en_sn_1", "Vadsø_roof", "lab_desk"]
DIRT = (b'co2unit-30aea4000005\tdemo-05\t1970-01-01\t00:00:41\t85.0\t0' + b"\t400" * 10 + b"\n"   # clock not set
        b"co2unit-30aea4000005\tdemo-05\t2019-1\x00\x00\x00\n"                                     # cut, NULs
        b'"co2unit-30aea4000005\n')                                                                # a stray quote


def say(text: str) -> None:
    print("\033[1m%s\033[0m" % text if sys.stdout.isatty() else text, flush=True)


class Clock:
    """The simulation's UTC seconds."""

    def __init__(self, start: datetime) -> None:
        self.now = start

    def __call__(self) -> float:
        return (self.now - datetime(1970, 1, 1)).total_seconds()


def write_deployments(data_dir: str, units, start: datetime) -> None:
    """remote_data/manual/deploy_durations_tiered.tsv, as people write it."""
    os.makedirs(os.path.join(data_dir, "manual"))
    rows = ["unit_id\tnickname\tsite\ttier\tstatus\tstart_ts\tend_ts\tnote"]
    rows += ["%s\t%s\t%s\t%d\tdeployed\t%s\t\t" % (unit.unit_id, unit.nickname, site, 0 if site == "lab_desk" else 10,
                                                 start.date()) for unit, site in zip(units, SITES)]
    with open(os.path.join(data_dir, "manual", "deploy_durations_tiered.tsv"), "w", encoding="utf-8") as file:
        file.write("\n".join(rows) + "\n")


def make_units(directory: str, url: str, start: datetime):
    """One unit more than there are sites: the last was never deployed."""
    return [fipy.Unit("co2unit-30aea40000%02d" % n, os.path.join(directory, "card-%02d" % n), [url], "demo-%02d" % n,
                      rssi=-75 - 3 * n, now=start) for n in range(1, len(SITES) + 2)]


def live_a_day(units, day: int) -> None:
    """What happens in the field before the nightly call."""
    for number, unit in enumerate(units, 1):
        if number == 3 and 4 <= day < 7:                        # its battery was empty
            unit.now += timedelta(days=1)
        else:
            unit.measure(days=1)
        if number == 5 and day == 6:
            fipy.append_lines(os.path.join(unit.card, fipy.READINGS), fipy.SEQUENCES[fipy.READINGS],
                              [DIRT.decode("latin-1")])
        if number == 6 and day == 8:
            unit.log_error("Uncaught exception", text='Traceback (most recent call last):\n  File "main.py"\nOSError: 28')


def run_nights(clock: Clock, units, station, other_url: str) -> None:
    requests = sent = 0
    for day in range(DAYS):
        live_a_day(units, day)
        clock.now += timedelta(days=1)
        if day == 9:
            publish(station, units[1], "--nickname", "renamed-02")
            publish(station, units[6], "--sync-dest", other_url)
        calling = [u for n, u in enumerate(units, 1) if not (n == 4 and day > 9)]      # one falls silent
        night = fipy.one_night(calling, threads=8)
        requests, sent = requests + night.requests, sent + night.sent
    print("%d requests, %d bytes pushed" % (requests, sent))


def publish(station, unit, *change: str) -> None:
    """A change of the configuration, published as an update; dated by the simulation."""
    name = "update-" + seqfile.utc(station.clock(), "%Y-%m-%dz%H%M%S")
    with contextlib.redirect_stdout(io.StringIO()):
        assert co2d.main(["publish", unit.unit_id, *change, "--name", name, "--data-dir", station.settings.data_dir,
                          "--var-dir", station.settings.var_dir]) == 0
    os.utime(station.data(unit.unit_id, "updates", name), (station.clock(), station.clock()))


def make_server(settings, clock):
    """A server that answers, what imports for it, and the thread of that."""
    station = co2d.Station(settings, clock)
    server, importing = co2d.Server(station), co2d.Importing(station)
    server.start()
    thread = threading.Thread(target=importing.run)
    thread.start()
    return server, importing, thread


def run_command(*command: str) -> None:
    say("\n$ ./" + " ".join(command))
    environ = {**os.environ, "CO2D_CONF": os.path.join(os.getcwd(), "co2d.conf")}
    subprocess.run([sys.executable, os.path.join(PROJECT, command[0]), *command[1:]], env=environ, check=True)


def main() -> int:
    """The whole show; the exit status."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="co2d-demo-") as directory:
        os.chdir(directory)
        with open("co2d.conf", "w") as file:
            file.write("[co2d]\nlisten = 127.0.0.1\nport = 0\ndata_dir = remote_data\nvar_dir = var\nquiet = yes\n")
        settings = co2d.settings_of(co2d.make_parser().parse_args(["--config", "co2d.conf"]))
        midnight = datetime(*time.gmtime()[:3], 3, 15)
        clock = Clock(midnight - timedelta(days=DAYS))
        settings = settings._replace(import_delay=0.1)
        first = make_server(settings, clock)
        second = make_server(settings._replace(data_dir="other/remote_data", var_dir="other/var", db="other/db.sqlite3"), clock)
        url, other_url = ("http://127.0.0.1:%d" % server.port for server, *_ in (first, second))
        units = make_units(directory, url, clock.now)
        write_deployments(settings.data_dir, units, clock.now)
        say("%d simulated units report to %s for %d nights ..." % (len(units), url, DAYS))
        run_nights(clock, units, first[0].station, other_url)
        for server, importing, thread in (first, second):
            server.stop()
            importing.stop()
            thread.join()
        say("unit 2 got another nickname, unit 7 was sent to another server, %s; what is seen of it here:" % other_url)
        run_command("co2d.py", "publish", "--list")
        say("\nand when the other server's var/ is copied here, as remote_data/server-b/var:")
        shutil.copytree("other/var/pings", "remote_data/server-b/var/pings")
        run_command("co2d.py", "publish", units[6].unit_id, "--list")
        run_command("importer.py", "rebuild", "--data-dir", "remote_data", "--data-dir", "other/remote_data")
        run_command("importer.py", "rejects")
        for view in ("co2", "pings", "status"):
            run_command("plot_ascii.py", view)
        os.chdir(PROJECT)
    say("\nAll of this took %.1f s and is gone again. For real: ./co2d.py" % (time.monotonic() - began))
    return 0


if __name__ == "__main__":
    sys.exit(main())
