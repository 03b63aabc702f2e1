"""More than one machine, on existing programs, each run for real; skipped where the program is missing."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import time

import pytest

import co2d
import fipy
import importer


def station_at(directory):
    settings = co2d.Settings()._replace(data_dir=str(directory / "remote_data"), var_dir=str(directory / "var"), port=0,
                                   db=str(directory / "var" / "db.sqlite3"), listen="127.0.0.1", quiet=True)
    return co2d.Station(settings)


@pytest.fixture
def serve():
    """Start a server on a directory: (station, server)."""
    servers = []

    def start(directory):
        station = station_at(directory)
        servers.append(co2d.Server(station))
        servers[-1].start()
        return station, servers[-1]

    yield start
    for server in servers:
        if server.socket.fileno() >= 0:
            server.stop()


def units_for(directory, count, *servers, names=None):
    urls = ["http://127.0.0.1:%d" % server.port for server in servers]
    return [fipy.Unit("co2unit-%012x" % n, str(directory / ("card-%d" % n)), urls, (names or {}).get(n, "unit-%02d" % n))
            for n in range(count)]


def night(units, days=1):
    for unit in units:
        unit.measure(days=days)
    return fipy.one_night(units, threads=8)


def readings(archive):
    importer.import_new(archive)
    with contextlib.closing(sqlite3.connect(archive.db)) as db:
        return sorted(db.execute("SELECT unit_id, nickname, date, time, temp, co2_01, co2_10, co2 FROM co2_readings"))


def on_cards(units):
    return sum(content.count(b"\n") for unit in units for content in unit.files().values())


def copy_text(source, target):
    """What README says: the text by rsync, hidden files left behind."""
    if not shutil.which("rsync"):
        pytest.skip("rsync is not installed")
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["rsync", "-a", "--exclude", ".*", str(source / "remote_data") + "/", str(target) + "/"], check=True)
    (target / "server-a" / "var").mkdir(parents=True, exist_ok=True)
    subprocess.run(["rsync", "-a", str(source / "var" / "pings"), str(target / "server-a" / "var") + "/"], check=True)


def test_a_copy_by_rsync_takes_over_and_what_both_hold_is_merged(serve, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    _, first = serve(a)
    units = units_for(tmp_path, 6, first)
    assert night(units, days=3).errors == []
    copy_text(a, b / "remote_data")
    assert night(units).errors == []                            # acknowledged by the first alone, then it dies
    first.stop()
    _, second = serve(b)
    for unit in units:
        unit.urls = ["http://127.0.0.1:%d" % second.port]
    for _ in range(2):
        assert night(units).errors == []
    held = importer.Archive((str(b / "remote_data"),), str(b / "var"), str(tmp_path / "b.db"))
    assert len(readings(held)) == on_cards(units)
    both = [str(a / "remote_data"), str(b / "remote_data")]
    merged = [importer.Archive(tuple(dirs), str(b / "var"), str(tmp_path / ("%d.db" % n))) for n, dirs in
              enumerate((both, both[::-1]))]
    assert readings(merged[0]) == readings(merged[1]) == readings(merged[0]) == readings(held)


def haproxy_configuration():
    """The one that README shows."""
    with open(os.path.join(os.path.dirname(co2d.__file__), "README.md"), encoding="utf-8") as file:
        return re.search(r"```haproxy\n(.*?)```", file.read(), re.S)[1]


def test_behind_haproxy_one_of_three_daemons_dies_and_nothing_is_lost(serve, tmp_path):
    if not shutil.which("haproxy"):
        pytest.skip("haproxy is not installed")
    started = [serve(tmp_path / name) for name in "abc"]
    port = free_port()
    config = tmp_path / "haproxy.cfg"
    text = haproxy_configuration().replace(":8080\n", "127.0.0.1:%d\n" % port)
    for name, (_, server) in zip("abc", started):
        text = text.replace("lab-%s:8080" % name, "127.0.0.1:%d" % server.port)
    config.write_text(text.replace("inter 10s", "inter 200ms"))
    proxy = subprocess.Popen(["haproxy", "-db", "-f", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(1)
        units = units_for(tmp_path, 12, names={1: "lab desk", 2: "vadsø"})
        for unit in units:
            unit.urls = ["http://127.0.0.1:%d" % port]
        assert night(units, days=2).errors == []
        taken = [[name for name in os.listdir(station.settings.data_dir)] for station, _ in started]
        assert sum(map(len, taken)) == 12 and sum(1 for one in taken if one) >= 2
        started[0][1].stop()
        time.sleep(1)
        for _ in range(3):
            night(units)
        assert all(session.error is None and session.finished for session in night(units).sessions)
    finally:
        proxy.terminate()
        proxy.wait(10)
    dirs = tuple(station.settings.data_dir for station, _ in started)
    assert len(readings(importer.Archive(dirs, str(tmp_path / "var"), str(tmp_path / "merged.db")))) == on_cards(units)


def free_port():

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
