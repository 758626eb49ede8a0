"""Each kind runs on each family that transformers has a model of, and docs/kinds.md shows what came of it."""

import pytest

from kinds_by_family.bases import FAMILIES
from kinds_by_family.matrix import line, shown, walk
from kinds_by_family.rows import KINDS
from pave_lightning.tasks.task import known_kinds

AGAIN = "write the page anew: PYTHONPATH=.:tests python -m kinds_by_family"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_run_on_a_family(family, tmp_path):
    assert line(family, walk(family, tmp_path)) == shown().get(family, ""), AGAIN


def test_the_page_shows_all_kinds_and_families():
    ours = {name for name, kind in known_kinds().items() if kind.__module__.startswith("pave_lightning.")}
    assert set(KINDS) == ours, "give rows of every kind in tests/kinds_by_family/rows.py"
    assert list(shown()) == list(FAMILIES), AGAIN
