"""README.md says what is: every setting, metric, route, command, target and file has its line."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

import co2d
import fleet
import importer
import plot_ascii

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(PROJECT, "README.md"), encoding="utf-8") as file:
    README = file.read()
with open(os.path.join(PROJECT, "Makefile"), encoding="utf-8") as file:
    MAKEFILE = file.read()


@pytest.mark.parametrize("name", list(importer.SETTINGS))
def test_every_setting_has_its_line_with_its_default(name):
    setting = importer.SETTINGS[name]
    default = importer.format_value(getattr(importer.Settings(), name), example=True)
    note = " *(restart)*" if setting.restart else ""
    assert "| `%s` | %s | %s%s |" % (name, "`%s`" % default if default else "", setting.help, note) in README


@pytest.mark.parametrize("name", list(co2d.METRICS))
def test_every_metric_has_its_line(name):
    assert "| `%s` | %s | %s |" % (name, *co2d.METRICS[name]) in README


@pytest.mark.parametrize("method, pattern", [(method, pattern) for method, pattern, *_ in co2d.ROUTES])
def test_every_route_is_in_the_contract(method, pattern):
    known = {"<unit>": "ID"}
    start = re.sub("<unit>", "ID", pattern).split("/<path>")[0]
    assert start in README, known


@pytest.mark.parametrize("target", re.findall(r"^([a-z]+):.*## ", MAKEFILE, re.M))
def test_every_make_target_is_named(target):
    assert re.search(r"make \[[a-z|]*\b%s\b" % target, README)


@pytest.mark.parametrize("command", list(importer.COMMANDS))
def test_every_importer_command_is_named(command):
    assert re.search(r"\./importer\.py[^\n]*\b%s\b" % command, README)


@pytest.mark.parametrize("option", ["--all", "--site", "--nickname", "--sync-dest", "--withdraw", "--list", "--dry-run", "--name"])
def test_every_option_of_publish_is_named(option):
    assert option in README


@pytest.mark.parametrize("status", ["0 well", "1 failed", "2 usage", "78 configuration", "130 interrupted"])
def test_every_exit_status_is_named(status):
    assert status in README


def test_nothing_is_left_to_be_filled_in():
    assert not re.search(r"^@[A-Z]+@$", README, re.M)


def test_the_deployment_that_is_shown_is_one():
    titles, row = re.search(r"```\n(unit_id\t.*)\n(.*)\n```", README).groups()
    assert titles.split("\t") == importer.DEPLOYMENT_COLUMNS
    assert importer.parse_deployment(row, titles.split("\t"))[2:5] == ("vj_re_sn_1", "30", "deployed")


@pytest.mark.parametrize("option", ["site", "recent-days", "tz"])
def test_options_in_the_url_that_is_shown_are_options_of_the_pages(option):
    assert "%s=" % option in README and option.replace("-", "_") in plot_ascii.OPTIONS


TROUBLE = README[README.index("## When something is wrong"):].split("\n## ")[0]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A small archive with everything in it, and a configuration that names it."""
    directory = tmp_path_factory.mktemp("archive")
    fleet.make_archive(str(directory), units=5, days=3)
    config = directory / "co2d.conf"
    config.write_text("[co2d]\ndata_dir = remote_data\nvar_dir = var\n")
    return str(config)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`(\./(?:importer|plot_ascii|co2d)\.py [^`]*|\./importer\.py)`", TROUBLE))))
def test_commands_for_trouble_run(archive, command):
    if any(word in command for word in ("ID", "--all")):
        pytest.skip("changes what units do; tests/test_publish.py runs it")
    done = subprocess.run([sys.executable, *command.split()], cwd=PROJECT, env={**os.environ, "CO2D_CONF": archive},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def options_of(help_text):
    """Option strings in the help of a command; -h, --help and settings of co2d.conf have no line of their own."""
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", help_text)) - {"--help"}
    return found - {"--" + name.replace("_", "-") for name in importer.SETTINGS}


@pytest.mark.parametrize("command", ["co2d.py", "co2d.py publish", "importer.py", "importer.py export", "plot_ascii.py"])
def test_every_option_is_named(command):
    done = subprocess.run([sys.executable, *command.split(), "--help"], cwd=PROJECT, stdout=subprocess.PIPE, check=True,
                          universal_newlines=True)
    assert sorted(option for option in options_of(done.stdout) if not re.search(r"(?<![\w-])%s\b(?!-)" % option, README)) == []
