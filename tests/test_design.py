"""The shape of the project: arrows, plain code, docstrings, top level, the oldest Python."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import check


@pytest.mark.parametrize("examine", [check.check_arrows, check.check_plainness, check.check_docstrings, check.check_unused])
def test_the_design_is_kept(examine):
    assert list(examine()) == []


def test_the_top_level_is_what_it_is_to_be():
    if not os.path.isdir(os.path.join(check.PROJECT, ".git")):
        pytest.skip("not a git checkout")
    assert list(check.check_top_level()) == []


def test_complaints_of_a_program_are_shown_but_for_those_that_are_known():
    assert list(check.check_with("printf", "a.py:1: bad\\nb.py:2: worse\\n")) == ["a.py:1: bad", "b.py:2: worse"]
    assert list(check.check_with("printf", "a.py:1: bad\\nb.py:2: worse\\n", known="bad")) == ["b.py:2: worse"]


@pytest.mark.parametrize("script", ["co2d", "importer", "plot_ascii"])
def test_an_older_python_is_told_in_one_line(script):
    program = "import sys; sys.version_info = (3, 8, 18); import " + script
    done = subprocess.run([sys.executable, "-c", program], cwd=check.PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True)
    assert (done.returncode, done.stdout) == (1, "co2d needs Python 3.9 or newer\n")
