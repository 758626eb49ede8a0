"""What a method needs and is not given is told, whatever the need."""

from enum import StrEnum

import pytest

from pave_lightning.errors import PaveError
from pave_lightning.merging import Evidence, MethodOptions, Need, StaticMethod, merge
from pave_lightning.merging.evidence import LACKING, PlannedEvidence


class Further(StrEnum):
    """A need that only another package knows."""

    ROUTES = "routes of tokens"


@pytest.fixture
def source(make_source):
    return make_source({"first": {"w": [1.0, 2.0]}, "second": {"w": [3.0, 4.0]}})


def test_every_need_says_what_is_lacking(source):
    assert set(LACKING) == set(Need)
    told = {need: list(Evidence().lacking({need}, source)) for need in Need}
    silent = {need for need, lines in told.items() if not lines}
    assert silent == {Need.MOMENTS, Need.NORM_MOMENTS}  # told where they are read; nothing here has norms
    assert len(told[Need.ANCHOR]) == 1
    for need in set(Need) - silent - {Need.ANCHOR}:
        assert ["task 'first'" in told[need][0], "task 'second'" in told[need][1]] == [True, True], need
    assert "has no Fisher information" in told[Need.FISHER][0]
    assert "has no labelled gradients" in told[Need.GRADIENTS][0]


def test_all_that_is_lacking_is_told_at_once(source):
    needs = {Need.ANCHOR, Need.FISHER, Further.ROUTES}
    assert len(list(Evidence().lacking(needs, source))) == 1 + 2 + 1
    assert list(PlannedEvidence().lacking(needs, source)) == []


def test_a_need_of_another_package_is_found_among_the_further_ones(source):
    class Routed(StaticMethod[MethodOptions]):
        summary, source, elementwise = "the first task where routes say so", "a test", True
        needs = frozenset({Further.ROUTES})

        def merge(self, parameter, base, vectors):
            return vectors[self.evidence.further[Further.ROUTES]]

    with pytest.raises(PaveError, match="routes of tokens are needed, but none were given"):
        merge(Routed(), source)
    merged = merge(Routed(), source, evidence=Evidence(further={Further.ROUTES: "second"}))
    assert merged.vectors["w"].tolist() == [3, 4]
