"""Lets the tests import the modules beside tests/, and leaves out what runs long unless it is asked for."""

import glob
import os
import shutil
import subprocess
import sys
import tempfile

import pytest

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(__file__))]


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run also what takes long: soak, fuzz, scale, power cuts, systemd")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes more than a few seconds; `make test-all` runs it")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        skip = pytest.mark.skip(reason="runs long: make test-all")
        for item in items:
            if "long" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def postgresql():
    """A PostgreSQL server of its own: the directory of its socket."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
    if not found or not shutil.which("psql"):
        pytest.skip("PostgreSQL is not installed")
    binaries, home = os.path.dirname(found[-1]), tempfile.mkdtemp(prefix="co2d-pg-")
    become = []
    if os.getuid() == 0:
        become = ["runuser", "-u", "postgres", "--"]
        shutil.chown(home, "postgres")

    def run(program, *arguments):
        command = [*become, os.path.join(binaries, program), "-D", home + "/data", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/")

    try:
        run("initdb", "-A", "trust", "-N", "-U", "postgres", "-E", "UTF8")
        run("pg_ctl", "-w", "-o", "-c listen_addresses='' -c fsync=off -k " + home, "-l", home + "/log", "start")
        yield home
        run("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)
