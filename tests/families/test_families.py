"""Each family goes from capture to reload, and docs/families.md shows what came of it."""

import pytest

from families.matrix import line, shown
from families.registry import FAMILIES

AGAIN = "write the page anew: PYTHONPATH=.:tests python -m families"


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, id=family.name, marks=pytest.mark.slow if family.slow else ()) for family in FAMILIES],
)
def test_a_family_goes_all_the_way(family, tmp_path):
    found, told = line(family.name, family.walk(tmp_path)), shown().get(family.name, "")
    assert found == told, AGAIN


def test_the_page_shows_all_families_and_no_others():
    assert list(shown()) == [family.name for family in FAMILIES], AGAIN
