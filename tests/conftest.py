"""Lets the tests import the modules beside tests/, and leaves out what runs long unless it is asked for."""

import os
import sys

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
