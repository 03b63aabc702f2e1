"""importer: units by any of their names; what is taken elsewhere (files, PostgreSQL, a data package, URLs)."""

from __future__ import annotations

import contextlib

import pytest

import importer
from test_importer import LINE, place        # noqa: F401  (a fixture)

A, B = "co2unit-30aea42a50bc", "co2unit-30aea42a60bc"
FIELDS = LINE.split("\t", 2)[2]


# -- names of units ----------------------------------------------------------------------------------------------------


@pytest.fixture
def named(place):                                               # noqa: F811
    """A calls itself north; B called itself north, then south; C is in the table only, as west."""
    place.readings("%s\tnorth\t%s" % (A, FIELDS), A)
    place.readings("%s\tnorth\t%s%s\tsouth\t%s" % (B, FIELDS, B, FIELDS.replace("08:", "09:")), B)
    place.deployments("unit_id\tnickname\tsite\nco2unit-c\twest\tsite_c\n%s\tsummit\tsite_a\n" % A)
    place.run()
    with contextlib.closing(importer.open_db(place.archive.db)) as db:
        yield db


@pytest.mark.parametrize("text, found", [
    (A, [A]), ("30aea42a50bc", [A]), ("50bc", [A]), ("50BC", [A]), ("north", [A]), ("summit", [A]), ("south", [B]),
    ("west", ["co2unit-c"]), ("co2unit-c", ["co2unit-c"]), ("south,50bc", [B, A]), ("south, south", [B]),
    ("co2unit-30*", [A, B]), ("30aea*", [A, B]), ("*th", [A, B]),
])
def test_a_unit_is_found_by_its_id_the_end_of_it_or_a_nickname(named, text, found):
    assert importer.find_units(named, text) == found


@pytest.mark.parametrize("text, reason", [
    ("a50bd", "no unit is called 'a50bd'; the nearest names are "),
    ("nroth", "no unit is called 'nroth'; the nearest names are north"),
    ("0bc", "no unit is called '0bc'"),
    ("south,x*", "no unit is called 'x*'"),
    ("", "no unit is called ''"),
])
def test_a_name_that_no_unit_has_is_answered_with_the_nearest_names(named, text, reason):
    with pytest.raises(importer.UnknownName) as refused:
        importer.find_units(named, text)
    assert str(refused.value).startswith(reason)


def test_a_name_of_several_units_is_refused_with_their_ids(place):                # noqa: F811
    place.readings("%s\tnorth\t%s" % (A, FIELDS), A)
    place.readings("%s\tnorth\t%s" % (B, FIELDS), B)
    place.run()
    with contextlib.closing(importer.open_db(place.archive.db)) as db:
        with pytest.raises(importer.UnknownName) as refused:
            importer.find_units(db, "north")
        assert str(refused.value) == "'north' can be %s or %s: say which by its hardware id" % (A, B)
        assert importer.find_units(db, A) == [A] and importer.find_units(db, "a50bc") == [A]
