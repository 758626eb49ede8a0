import time

import pytest
import torch

from pave_lightning.weights.memory import freed_memory_returned, measured

MILLION_FLOATS = 4.0  # megabytes


def highest(millions):
    with measured() as cost:
        torch.ones(millions * 1_000_000).sum()
    return cost.peak_megabytes


def test_time_and_memory_of_what_is_done_within():
    with measured() as cost:
        time.sleep(0.05)
    assert 0.05 <= cost.seconds < 5
    assert highest(100) == pytest.approx(100 * MILLION_FLOATS, rel=0.15)


def test_memory_that_was_freed_before_counts_again():
    for _ in range(3):
        torch.ones(30_000_000).sum()
    assert highest(20) == pytest.approx(20 * MILLION_FLOATS, rel=0.2)
    assert highest(50) == pytest.approx(50 * MILLION_FLOATS, rel=0.2)
    assert highest(20) == pytest.approx(20 * MILLION_FLOATS, rel=0.2), "the highest mark is forgotten"


def test_costs_are_known_even_when_the_work_fails():
    with pytest.raises(ValueError, match="broken"), measured() as cost:
        raise ValueError("broken")
    assert cost.seconds >= 0


def test_blocks_within_each_other():
    with measured() as outer, freed_memory_returned(), measured() as inner:
        torch.ones(20_000_000).sum()
    assert outer.seconds >= inner.seconds
