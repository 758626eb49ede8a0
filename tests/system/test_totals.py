"""Sums that are rounded once."""

import copy
import math
import pickle
import random
from fractions import Fraction

import pytest

from pave_lightning.system.totals import Total, parts_of


def exact(numbers):
    return float(sum(map(Fraction, numbers)))


@pytest.mark.parametrize("seed", range(20))
def test_neither_order_nor_division_matters(seed):
    draw = random.Random(seed)
    numbers = [draw.uniform(-1, 1) * 10.0 ** draw.randint(-200, 200) for _ in range(60)]
    numbers += [-number for number in numbers[:20]]
    expected = exact(numbers)
    for _ in range(3):
        draw.shuffle(numbers)
        halves = [Total(), Total()]
        for number in numbers:
            halves[draw.randint(0, 1)] += number
        assert halves[0] + halves[1] == expected
        assert Total(numbers) == expected


def test_it_is_a_number():
    total = Total([0.1, 0.2, -0.3])
    assert total == exact([0.1, 0.2, -0.3]) != 0.1 + 0.2 - 0.3
    assert total * 2 == 2 * float(total)
    assert math.sqrt(Total(4.0)) == 2.0
    assert 1 + Total(2.0) == 3.0
    assert isinstance(1 + Total(2.0), Total)


def test_copies_keep_all_of_it():
    total = Total([1e16, 1.0])
    for other in (copy.copy(total), copy.deepcopy(total), pickle.loads(pickle.dumps(total))):
        assert other.parts == total.parts
        assert other + -1e16 == 1.0


def test_few_numbers_stand_for_many():
    total = Total()
    for number in range(1000):
        total += number / 7
    assert len(total.parts) < 4
    assert parts_of(0.5) == (0.5,)


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_what_is_not_finite_stays_so(number):
    found = Total([1.0]) + number + 2.0
    assert found == number or math.isnan(found)
