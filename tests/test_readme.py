"""README.md says what is: each setting, metric, route, command and target has its line, and each block runs as it stands."""

from __future__ import annotations

import functools
import os
import re
import shutil
import socket
import subprocess
import sys
from datetime import datetime, timedelta, timezone

import pytest

import co2d
import fipy
import importer
import plot_ascii
import readme
import seqfile

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(PROJECT, "README.md"), encoding="utf-8") as file:
    README = file.read()
with open(os.path.join(PROJECT, "Makefile"), encoding="utf-8") as file:
    MAKEFILE = file.read()


@pytest.mark.parametrize("name", list(importer.SETTINGS))
def test_every_setting_has_its_line_with_its_default(name):
    setting = importer.SETTINGS[name]
    default = "`%s`" % setting.default if setting.default else ""
    note = " *(restart)*" if setting.change == "restart" else ""
    assert "| `%s` | %s | %s%s |" % (name, default, setting.help, note) in README


@pytest.mark.parametrize("name", list(co2d.METRICS))
def test_every_metric_has_its_line(name):
    kind = "counter" if name.endswith("_total") else "gauge"
    assert "| `%s` | %s | %s |" % (name, kind, co2d.METRICS[name]) in README


@pytest.mark.parametrize("pattern", [route.pattern for route in co2d.ROUTES])
def test_every_route_is_in_the_contract(pattern):
    start = re.sub("<unit>", "ID", pattern).split("/<path>")[0]
    table = re.fullmatch(r"/data/co2/(\w+)(\.\w+)", start)      # one row says it for all tables
    if table:
        assert "/data/co2/readings" + table[2] in README and "`%s`" % table[1] in README.replace("readings.csv", "`readings`")
    else:
        assert start in README


@pytest.mark.parametrize("target", re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.M))
def test_every_make_target_is_named(target):
    assert re.search(r"make \[[a-z|-]*\b%s\b" % target, README)


@pytest.mark.parametrize("command", list(importer.COMMANDS))
def test_every_importer_command_is_named(command):
    assert re.search(r"^importer [^\n]*\b%s\b" % command, README, re.M)


@pytest.mark.parametrize("option", ["--all", "--site", "--nickname", "--sync-dest", "--withdraw", "--list", "--dry-run", "--name"])
def test_every_option_of_publish_is_named(option):
    assert option in README


@pytest.mark.parametrize("status", ["0 well", "1 failed", "2 usage", "78 configuration", "130 interrupted"])
def test_every_exit_status_is_named(status):
    assert status in README


def test_nothing_is_left_to_be_filled_in():
    assert not re.search(r"^@[A-Z]+@$", README, re.M)


@pytest.mark.parametrize("limit", importer.Limits._fields)
def test_every_limit_is_named(limit):
    section = README[README.index("Section `[quality]`"):]
    assert "`%s`" % limit in section[:section.index("</details>")]


@pytest.mark.parametrize("anchor", sorted(set(re.findall(r"\(#([\w-]+)\)", README))))
def test_every_link_within_leads_to_a_heading(anchor):
    headings = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)", README, re.M)]
    assert anchor in headings


@pytest.mark.parametrize("option", ["site", "recent-days", "tz"])
def test_options_in_the_url_that_is_shown_are_options_of_the_pages(option):
    assert "%s=" % option in README and option.replace("-", "_") in plot_ascii.OPTIONS


def options_of(help_text):
    """Option strings in the help of a command; -h, --help and settings of co2d.conf have no line of their own."""
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", help_text)) - {"--help"}
    return found - {"--" + name.replace("_", "-") for name in importer.SETTINGS}


@pytest.mark.parametrize("command", ["co2d.py", "co2d.py publish", "importer.py", "importer.py export", "plot_ascii.py"])
def test_every_option_is_named(command):
    done = subprocess.run([sys.executable, *command.split(), "--help"], cwd=PROJECT, stdout=subprocess.PIPE, check=True,
                          universal_newlines=True)
    assert sorted(option for option in options_of(done.stdout) if not re.search(r"(?<![\w-])%s\b(?!-)" % option, README)) == []


# -- "Carrying on the code" ----------------------------------------------------------------------------------------------

RECIPES = README[README.index("## Carrying on the code"):]
MODULES = {"seqfile": seqfile, "importer": importer, "plot_ascii": plot_ascii, "co2d": co2d}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:%s)\.(?!py`|conf\b)[\w.]+)`" % "|".join(MODULES), RECIPES))))
def test_every_name_in_a_recipe_is_there(name):
    module, *attributes = name.split(".")
    functools.reduce(getattr, attributes, MODULES[module])


class Follower:
    """Somebody who follows recipes in a copy of the code."""

    def __init__(self, directory):
        self.directory = directory
        for module in MODULES:
            shutil.copy(os.path.join(PROJECT, module + ".py"), directory)

    def edit(self, module, before, more):
        """Write more behind a text that is there once."""
        path = os.path.join(self.directory, module + ".py")
        with open(path, encoding="utf-8") as file:
            text = file.read()
        assert text.count(before) == 1, (module, before)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text.replace(before, before + more))

    def upload(self, name, text):
        path = os.path.join(self.directory, "remote_data", "co2unit-30aea42a50bc", *name.split("/"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    def run(self, *command):
        done = subprocess.run([sys.executable, *command], cwd=self.directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True)
        assert done.returncode == 0, done.stdout
        return done.stdout


def test_a_kind_of_uploaded_file_takes_three_places(tmp_path):
    follower = Follower(tmp_path)
    follower.edit("seqfile", "SEQUENCES = {", '"data/weather": Match("weather-", ".csv"), ')
    follower.edit("importer", 'SCHEMA = f"""\n',
                  "CREATE TABLE weather(unit_id TEXT, ts INTEGER, wind REAL, source INTEGER, offset INTEGER);\n")
    follower.edit("importer", 'INDEXES = f"""\n', "CREATE INDEX weather_by_unit ON weather(unit_id, ts);\n")
    follower.edit("importer", 'NO_TIME = "impossible date or time"\n', """

def parse_weather(raw, rules):
    unit, day, clock, wind = decode(raw).split(",")
    return unit, instant(day, clock, rules.limits), float(wind)


""")
    follower.edit("importer", "FORMATS = {\n", """\
    "weather": Format("weather", ["unit_id", "ts", "wind"], uploads("data/weather", seqfile.SEQUENCES["data/weather"]),
                      "data/weather", Reader.by_line, parse_weather, fields=4, repeats="wind"),
""")
    line = "co2unit-30aea42a50bc,2026-10-01,0%d:00:00,3.5\n"
    follower.upload("data/weather/weather-0000.csv", line % 1 + line % 2)
    assert "2 weather" in follower.run("importer.py")
    follower.upload("data/weather/weather-0000.csv", line % 1 + line % 2 + line % 3)
    follower.upload("set-aside/data/weather/weather-0000.csv@0@20261001T000000.000000Z", line % 2)
    assert "1 weather" in follower.run("importer.py")
    assert follower.run("importer.py", "verify") == "database and text agree\n"


def test_a_column_of_readings_takes_four_places_and_a_panel_four_more(tmp_path):
    follower = Follower(tmp_path)
    follower.edit("importer", "zero_point NUMERIC, sensor_temp NUMERIC", ", humidity NUMERIC")
    follower.edit("importer", 'zero_point sensor_temp', ' humidity')
    follower.edit("importer", "raw value of the sensor: its temperature\n", "humidity  number  %  r.humidity  of the air\n")
    follower.edit("importer", "SCHEMA_VERSION = ", "1")         # 5 -> 15
    follower.edit("importer", 'SUSPECT_BITS = {"co2": QC_CO2_BAD | QC_ROW', ', "humidity": QC_ROW')
    follower.edit("plot_ascii", "QUANTITIES = [CO2, TEMP", ', Quantity("humidity", "humidity %", "%.0f", "%.0f", "%d", " H", 5, 9, 26, 130)')
    follower.edit("plot_ascii", 'STYLES = {\n', '    "humidity": "34",\n')
    follower.edit("plot_ascii", 'STYLE = """\n', ".humidity { fill: none; stroke: var(--humidity) }\n")
    for scheme in ("LIGHT", "DARK"):
        follower.edit("plot_ascii", '\n%s = """' % scheme, "--humidity: #008080; ")
    line = "co2unit-30aea42a50bc\tvaranger-03\t2026-10-01\t%02d:00:00\t4.5\t0" + "\t400" * 10 + "\t1" * 5 + "\t%d\n"
    follower.upload("data/readings/readings-0000.tsv", "".join(line % (hour, 50 + hour) for hour in range(24)))
    follower.run("importer.py")
    assert follower.run("importer.py", "verify") == "database and text agree\n"
    assert ",54\n" in follower.run("importer.py", "export", "readings")
    assert "humidity_mean" in follower.run("plot_ascii.py", "co2", "--unit", "varanger-03", "--plain")
    assert "humidity %" in follower.run("plot_ascii.py", "co2", "--unit", "varanger-03", "--html")
    assert "varanger-03" in follower.run("plot_ascii.py", "co2", "--html")
    assert "humidity %" in follower.run("plot_ascii.py", "co2", "--unit", "varanger-03")
    assert "varanger-03" in follower.run("plot_ascii.py", "co2")


# -- every block, as it stands, in order ---------------------------------------------------------------------------------


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def needs(command):
    """Programs that a command calls and that are not installed here."""
    programs = ("psql", "createdb", "sqlite3", "rsync", "curl")
    return [name for name in programs if re.search(r"\b%s\b" % name, command) and not shutil.which(name)]


class Reader:
    """Somebody who does what README says, block by block, and compares what is printed."""

    def __init__(self, root):
        self.box = readme.Sandbox(root, free_port())
        self.box.write(os.path.join(self.box.source, "main.py"), "print('new')\n")     # the reader's own firmware
        self.skipped = []

    def play(self, block):
        play = getattr(self, "play_" + block.kind, None)
        if block.path:
            self.box.write(self.box.replaced(os.path.join(self.box.source, block.path)), self.box.replaced(block.text))
        elif play:
            play(block)

    def play_console(self, block):
        for step in readme.steps(block):
            missing = needs(step.command)
            if missing:
                assert "CI" not in os.environ, "%s is not installed" % ", ".join(missing)
                self.skipped.append(step.command)
                continue
            done = self.box.run(step.command)
            printed = self.box.shown(done.stdout)
            assert done.returncode == 0, "README.md:%d: %s\n%s" % (block.line, step.command, printed)
            assert not step.expected or readme.agrees(printed, step.expected), printed

    def play_cron(self, block):
        for line in block.text.splitlines():
            if "=" not in line.split(" ")[0]:
                done = self.box.run(line.split(None, 5)[5])
                assert done.returncode in (0, 1, 2) and "Traceback" not in done.stdout, done.stdout
                assert done.returncode != 2 or "CRITICAL" in done.stdout, done.stdout

    def play_test(self, block):
        getattr(self, block.text.split(":")[0].replace(" ", "_"))()

    def the_unit_is_switched_on(self):
        """It has measured for two days, and calls; `json` blocks are its card."""
        unit = self.unit = fipy.Unit("co2unit-30aea42a50bc", os.path.join(self.box.source, "card"), now=the_day_before_yesterday())
        unit.measure(days=2)
        self.the_unit_calls()

    def the_unit_calls(self):
        session = self.unit.sync()
        assert session.error is None and session.finished
        assert self.box.run("importer --config /etc/co2d.conf").returncode in (0, 1)


def the_day_before_yesterday():
    return (datetime.now(timezone.utc) - timedelta(days=2)).replace(tzinfo=None, microsecond=0)


def test_every_block_runs_as_it_stands(tmp_path, monkeypatch, request):
    if not needs("psql"):
        monkeypatch.setenv("PGHOST", request.getfixturevalue("postgresql"))
        monkeypatch.setenv("PGUSER", "postgres")
    reader = Reader(str(tmp_path / "root"))
    try:
        for block in readme.blocks(README):
            reader.play(block)
    finally:
        reader.box.close()
