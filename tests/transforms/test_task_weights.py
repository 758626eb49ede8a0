import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pave_lightning.transforms import make_transform, transformed
from pave_lightning.transforms.task_weights import TaskWeights, TaskWeightsOptions

WEIGHTS = {"movie": 0.5, "topic": -1}


def test_each_task_is_multiplied_with_its_weight(source, arrays):
    found = arrays(transformed(source, [make_transform("task_weights", WEIGHTS)]))
    for (task, name), vector in source.arrays.items():
        assert np.array_equal(found[task, name], np.float32(WEIGHTS.get(task, 1)) * vector)


def test_tasks_without_a_weight_stay_bit_for_bit(source):
    weighed = transformed(source, [make_transform("task_weights", WEIGHTS)])
    for parameter in source.parameters:
        assert weighed.expert("news", parameter).equal(source.expert("news", parameter))


def test_factors_of_adapters_stay_exact(adapted):
    weighed = transformed(adapted, [make_transform("task_weights", WEIGHTS)])
    assert weighed.without_factors("movie") is None
    for parameter in adapted.parameters:
        pair = weighed.factors("movie", parameter)
        if not parameter.is_matrix:
            assert pair is None
            continue
        left, right = adapted.pairs["movie", parameter.name]
        assert torch.equal(pair[0] @ pair[1], torch.tensor(0.5 * left) @ torch.tensor(right))
        assert weighed.scaling("movie", parameter) == 2.0


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "half", True])
def test_weights_are_finite_numbers(weight):
    with pytest.raises(ValidationError):
        TaskWeightsOptions(movie=weight)


def test_weighing_nothing_is_told(source):
    assert "it weighs no task" in next(TaskWeights().problems(source))
    assert list(TaskWeights(TaskWeightsOptions(movie=0)).problems(source)) == []
