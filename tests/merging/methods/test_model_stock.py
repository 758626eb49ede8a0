import math
from itertools import combinations

import numpy as np
import pytest
import torch

from pave_lightning.merging import merge
from pave_lightning.merging.methods.model_stock import ModelStock, ModelStockOptions


def run(source, filter_wise=False):
    return merge(ModelStock(ModelStockOptions(filter_wise=filter_wise)), source).vectors


def shortened(vectors):
    """The method for one long vector a task, from pairwise angles (arXiv 2403.19522), float64."""
    units = [v / np.linalg.norm(v) if np.any(v) else v for v in vectors]
    cosine = max(np.mean([a @ b for a, b in combinations(units, 2)]), 0.0)
    count = len(vectors)
    return count * cosine / (1 + (count - 1) * cosine) * np.mean(vectors, axis=0)


def per_tensor(vectors):
    names = next(iter(vectors.values()))
    return {
        name: shortened([np.ravel(named[name]) for named in vectors.values()]).reshape(np.shape(names[name]))
        for name in names
    }


def test_by_hand_two_experts_at_sixty_degrees(make_source):
    source = make_source({"a": {"w": [2.0, 0.0]}, "b": {"w": [1.0, math.sqrt(3)]}})
    # cos = 1/2, so 2/3 of the way: the foot of the perpendicular from the mean's circle, 2/3 of [1.5, 0.866].
    assert run(source)["w"].tolist() == pytest.approx([1.0, math.sqrt(3) / 3])


def test_by_hand_three_experts(make_source):
    source = make_source({"a": {"w": [1.0, 0.0]}, "b": {"w": [3.0, 0.0]}, "c": {"w": [0.0, 5.0]}})
    # Cosines 1, 0, 0: mean 1/3, ratio 1 / (5/3) = 3/5.
    assert run(source)["w"].tolist() == pytest.approx([0.6 * 4 / 3, 0.6 * 5 / 3])


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_any_vectors_as_the_plain_reference(scale, make_source):
    random = np.random.default_rng(0)
    shared = {"p": random.normal(size=(4, 3)), "q": random.normal(size=(5,)), "r": random.normal(size=(2, 2, 3))}
    vectors = {
        task: {name: scale * (value + random.normal(size=value.shape)) for name, value in shared.items()}
        for task in "abcd"
    }
    for name, expected in per_tensor(vectors).items():
        assert run(make_source(vectors))[name].numpy() / scale == pytest.approx(expected / scale, abs=1e-5)
        assert np.any(expected)


@pytest.mark.parametrize("elements", [1, 4, None])
def test_each_output_of_a_layer_has_its_own_angle_where_asked(elements, make_source):
    random = np.random.default_rng(2)
    vectors = {task: {"w": random.normal(size=(6, 4)) + 1, "b": random.normal(size=4) + 1} for task in "abc"}
    vectors["a"]["k"], vectors["b"]["k"], vectors["c"]["k"] = random.normal(size=(3, 2, 2, 2)) + 1
    merged = run(make_source(vectors, elements=elements, matrices=["w"]), filter_wise=True)
    for row in range(6):
        expected = shortened([named["w"][row] for named in vectors.values()])
        assert merged["w"][row].numpy() == pytest.approx(expected, abs=1e-6)
    for filter_ in range(2):
        expected = shortened([named["k"][filter_].ravel() for named in vectors.values()])
        assert merged["k"][filter_].numpy().ravel() == pytest.approx(expected, abs=1e-6)
    assert merged["b"].numpy() == pytest.approx(shortened([named["b"] for named in vectors.values()]), abs=1e-6)


def test_the_outputs_of_transposed_weights_are_their_columns(make_source):
    random = np.random.default_rng(3)
    vectors = {task: {"w": random.normal(size=(6, 4)) + 1} for task in "abc"}
    plain = run(make_source(vectors, elements=4, matrices=["w"]), filter_wise=True)["w"]
    stored = {task: {"w": named["w"].T} for task, named in vectors.items()}
    turned = run(make_source(stored, elements=4, transposed=["w"]), filter_wise=True)["w"]
    assert torch.allclose(turned, plain.T, atol=1e-6)


def test_orthogonal_and_opposed_experts_give_the_base(make_source):
    assert run(make_source({"a": {"w": [1.0, 0.0]}, "b": {"w": [0.0, 1.0]}}))["w"].tolist() == [0.0, 0.0]
    assert run(make_source({"a": {"w": [1.0, 2.0]}, "b": {"w": [-1.0, -2.1]}}))["w"].tolist() == [0.0, 0.0]
    # The mean cosine of three directions at 120 degrees is -1/2, which is where the formula has its pole.
    turned = {
        name: {"w": [math.cos(angle), math.sin(angle)]} for name, angle in (("a", 0), ("b", 2.0944), ("c", -2.0944))
    }
    assert run(make_source(turned))["w"].tolist() == pytest.approx([0.0, 0.0])


def test_a_task_that_changes_nothing_has_no_direction(make_source):
    source = make_source({"a": {"w": [2.0, 0.0]}, "b": {"w": [2.0, 0.0]}, "idle": {"w": [0.0, 0.0]}})
    # Cosines 1, 0, 0 again.
    assert run(source)["w"].tolist() == pytest.approx([0.6 * 4 / 3, 0.0])


def test_it_has_no_scale():
    assert ModelStock.default_scale is None
    assert not ModelStockOptions().filter_wise
