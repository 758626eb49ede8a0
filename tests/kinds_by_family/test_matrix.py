"""Each kind runs on each family that transformers has a model of, and docs/kinds.md shows what came of it."""

import pytest

from kinds_by_family.bases import FAMILIES
from kinds_by_family.matrix import line, shown, walk
from kinds_by_family.rows import KINDS
from pave_lightning.tasks.task import known_kinds

AGAIN = "write the page anew: PYTHONPATH=.:tests python -m kinds_by_family"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", shown())
def test_kinds_run_on_a_family(family, tmp_path):
    assert line(family, walk(family, tmp_path)) == shown()[family], AGAIN


def test_the_page_shows_known_kinds_and_families():
    assert known_kinds().keys() >= KINDS.keys()
    assert list(shown()) == [family for family in FAMILIES if family in shown()], AGAIN
    assert all(text.count("|") == len(KINDS) + 2 for text in shown().values()), AGAIN
