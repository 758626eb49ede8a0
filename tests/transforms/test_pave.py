"""Against NumPy: U_r U_r^T W of the leading left singular vectors of W C, with even ranks."""

import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.merging import Evidence
from pave_lightning.purification import PurifiedTaskVectors
from pave_lightning.purification.options import Compute, Purify
from pave_lightning.statistics import LayerMoment, TaskStatistics
from pave_lightning.transforms import make_transform, transformed

OPTIONS = {"rho": 0.5, "allocation": "even", "damping": 0.0}


@pytest.fixture
def moments(source):
    random = np.random.default_rng(8)
    found = {}
    for task in source.tasks:
        for parameter in source.parameters:
            if parameter.is_matrix:
                rows = random.normal(size=(30, parameter.matrix_shape[1]))
                found[task, parameter.name] = (rows.T @ rows / 30).astype(np.float32)
    return found


@pytest.fixture
def evidence(source, moments):

    layers = {parameter.name: parameter.layer for parameter in source.parameters}
    return Evidence(
        statistics={
            task: TaskStatistics(
                {layers[n]: LayerMoment("input", torch.tensor(m), 30) for (t, n), m in moments.items() if t == task},
                examples=30,
            )
            for task in source.tasks
        }
    )


def projected(weight, moment):
    left = np.linalg.svd(weight.astype(np.float64) @ moment)[0]
    rank = min(weight.shape) // 2
    return left[:, :rank] @ left[:, :rank].T @ weight


@pytest.mark.parametrize("halved", [False, True])
def test_it_purifies_what_comes_before_it(halved, source, moments, evidence):
    weights = [make_transform("task_weights", dict.fromkeys(source.tasks, 0.5))] if halved else []
    found = transformed(source, [*weights, make_transform("pave", OPTIONS)], evidence)
    parameter = source.parameters[1]
    for task in source.tasks:
        vector = source.arrays[task, parameter.name] * (0.5 if halved else 1)
        expected = projected(source.bases[parameter.name] + vector, moments[task, parameter.name])
        assert found.expert(task, parameter).numpy() == pytest.approx(expected, abs=1e-5)


def test_it_is_the_purification_of_the_package_bit_for_bit(source, evidence):
    options = Purify.model_validate(OPTIONS)
    expected = PurifiedTaskVectors(source, evidence.statistics, options, Compute(workers=1))
    found = transformed(source, [make_transform("pave", OPTIONS)], evidence, Compute(workers=1))
    for parameter in source.parameters:
        for task in source.tasks:
            assert found.expert(task, parameter).equal(expected.expert(task, parameter))


def test_a_ratio_of_one_changes_nothing_and_needs_nothing(source):
    assert transformed(source, [make_transform("pave", {"rho": 1.0})]) is source


def test_problems_are_those_of_names_and_ratios(source):
    wrong = make_transform("pave", {"rho": 0.1, "tasks": ["movies"]})
    first, *others = wrong.problems(source)
    assert first == "tasks: no task is named 'movies'; did you mean 'movie'?"
    assert "nearest_budget" in " ".join(others)
    tried = list(make_transform("pave", {"rho": "auto", "stopping_share": 1.01}).problems(source))
    assert tried == []


@pytest.mark.parametrize("kind", ["cross", "output"])
def test_moments_that_hold_the_expert_s_own_weight_are_refused_once_it_was_changed(kind, source):
    def moment(weight):
        matrix = weight if kind == "cross" else weight @ weight.T
        return LayerMoment(kind, torch.tensor(matrix, dtype=torch.float32), 30)

    parameter = source.parameters[1]
    statistics = {
        task: TaskStatistics({parameter.layer: moment(source.expert(task, parameter).numpy())}, examples=30)
        for task in source.tasks
    }
    pave = make_transform("pave", {**OPTIONS, "metric": "root"})
    weights = make_transform("task_weights", {"movie": 0.5})
    transformed(source, [pave, weights], Evidence(statistics=statistics))
    with pytest.raises(PaveError, match="the second moments of the inputs of 1 layers are needed"):
        transformed(source, [weights, pave], Evidence(statistics=statistics))
