"""The shape of the project: arrows, plain code, docstrings, top level."""

from __future__ import annotations

import os

import pytest

import check


@pytest.mark.parametrize("examine", [check.check_arrows, check.check_plainness, check.check_docstrings, check.check_unused])
def test_the_design_is_kept(examine):
    assert list(examine()) == []


def test_the_top_level_is_what_it_is_to_be():
    if not os.path.isdir(os.path.join(check.PROJECT, ".git")):
        pytest.skip("not a git checkout")
    assert list(check.check_top_level()) == []
