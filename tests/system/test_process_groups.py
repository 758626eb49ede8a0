"""What processes of a group tell each other."""

import math

import pytest
import torch

from pave_lightning.system.process_groups import ALONE, _packed, _unpacked
from pave_lightning.system.totals import Total


@pytest.mark.parametrize(
    "value",
    [None, 3, 0.1, "name", math.inf, [1.0, "a", None], {"a": {"b": [0.1, {"c": 2}]}, "d": []}, {}],
)
def test_plain_values_are_told_as_they_are(value):
    assert _unpacked(_packed(value)) == value


def test_numbers_that_are_none_and_tuples():
    assert math.isnan(_unpacked(_packed(math.nan)))
    assert _unpacked(_packed((1, "a"))) == [1, "a"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3),
        torch.randn(3, 4).T,
        torch.tensor(True),
        torch.zeros(0, 2, dtype=torch.float64),
        torch.tensor([0.1], dtype=torch.bfloat16),
    ],
)
def test_tensors_are_told_to_the_bit(tensor):
    found = _unpacked(_packed({"a": [tensor, {"b": tensor}]}))
    for one in (found["a"][0], found["a"][1]["b"]):
        assert one.dtype == tensor.dtype
        assert torch.equal(one, tensor)


def test_totals_stay_exact():
    found = _unpacked(_packed({"x": Total([1e16, 1.0])}))["x"]
    assert found + -1e16 == 1.0


def test_a_process_alone_is_told_what_it_has():
    own = {"a": torch.ones(2)}
    assert ALONE.gather(own)[0] is own
    assert ALONE.from_first(own) is own
    assert ALONE.is_first
    ALONE.wait()


def test_the_first_one_decides(in_processes):
    assert in_processes(3, lambda group: group.from_first(group.rank + 7)) == [7, 7, 7]
    assert in_processes(2, lambda group: group.gather(group.rank)) == [[0, 1], [0, 1]]
