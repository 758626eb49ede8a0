"""Which layers a method for adapters treats, and which experts it refuses."""

import re

import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.merging import merge
from pave_lightning.merging.low_rank import LowRankMethod, adapted_tasks

SHAPES = {"v": (4, 3), "w": (2, 5)}


class Ranks(LowRankMethod):
    """Fills a layer with the number of tasks that adapt it."""

    name = "ranks"
    summary = source = "a test"

    def merge_matrix(self, parameter, base, vectors):
        assert list(vectors) == list(self._source.tasks)
        return torch.full_like(base, len(self.factors(parameter)))


def test_layers_that_some_tasks_adapt(adapted, draw):
    pairs = draw(SHAPES, 1)
    del pairs["one"]["w"], pairs["three"]["w"]
    source = adapted(pairs, {task: {"bias": np.ones(2)} for task in pairs})
    assert adapted_tasks(source) == {"v": ("one", "two", "three"), "w": ("two",)}
    method = Ranks()
    merged = merge(method, source).vectors
    assert merged["v"].unique().tolist() == [3]
    assert merged["w"].unique().tolist() == [1]
    assert merged["bias"].tolist() == [1, 1]
    assert [method.in_blocks(parameter) for parameter in source.parameters] == [True, False, False]


def test_before_it_is_run_a_method_treats_nothing(adapted, draw):
    assert not any(Ranks().covers(parameter) for parameter in adapted(draw(SHAPES, 1)).parameters)


def test_layers_that_others_trained_whole_are_told_at_once(adapted, draw):
    pairs = draw(SHAPES, 1)
    del pairs["one"]["w"], pairs["three"]["w"], pairs["two"]["v"]
    plain = {"one": {"w": np.eye(2, 5)}, "two": {"v": np.eye(4, 3)}}
    with pytest.raises(PaveError) as caught:
        merge(Ranks(), adapted(pairs, plain, elements=2))
    lines = [
        "merge method 'ranks' cannot merge these experts:",
        "v has an adapter in 'one', 'three', but was trained whole in 'two'; train adapters",
        "w has an adapter in 'two', but was trained whole in 'one'; train adapters",
    ]
    assert all(re.search(re.escape(line), str(caught.value)) for line in lines)
