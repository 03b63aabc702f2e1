"""A guide to the tests, and what all of them share.

    make test                                       all that is quick, in two minutes or so: two halves side by side
    make test-all                                   also what runs long (`@pytest.mark.long`), in ten minutes or so
    make test TESTS=tests/test_seqfile.py           one file
    python3 -m pytest tests -k "a name of a test"   some tests by name; --long runs the long ones

Names of tests are sentences: a failure says what is not so any more. Expected texts and pages are literal. Programs that
are not installed (chromium, strace, PostgreSQL ...) skip their tests and are named; in CI all are there.

    file                    what it tests
    test_seqfile            numbered files: what a chunk does, what is learned about a unit, strange names, durability
    test_importer           lines, ledger, rules of quality, rebuild, queries, gaps; small inputs in cases/
    test_export             names of units; exports as files, by URL, into PostgreSQL, as a data package
    test_health             faults of a running station: each is told everywhere, and over when it is mended
    test_views              the numbers of all pages against a reading of the text that shares no code with ours
    test_plot_ascii         pages as text; test_pictures: pages as pictures, in Chromium; test_terminal: in a real terminal
    test_co2d               the HTTP contract without sockets, the parser, the server over loopback; test_crowds (long):
                            thousands of slow clients beside honest units
    test_publish            updates: what may reach a unit, how it takes it, what is seen of it
    test_process            the daemon as a process: signals, TLS, replies cut short, installation, backup;
                            test_systemd (long): on a Debian that is booted for it
    test_durability         what is on disk before a reply, full and broken disks, sudden death; test_power: power cuts
    test_situations         simulated units day by day, in every situation in which data were lost or units were stuck
    test_scale              two servers, copies, merged archives
    test_readme             each block of README.md, run as it stands; each table of it, compared with the code
    test_fipy, test_fleet   the two models: a unit, and an archive of a fleet
    test_design             arrows between the files, plain code

    fipy.py                 a unit: the firmware of the field, in simulated time, on a card that is a directory
    fleet.py, sensors.py    an archive with known dirt; the lines that real sensors make
    readme.py, heads.py     README.md as a program; request heads, good and bad
    bench.py, soak.py, fuzz.py, check.py, demo.py           what `make bench`, `soak`, `fuzz`, `check` and `demo` run
"""

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
