import math

import numpy as np
import pytest
import torch

from pave_lightning.diagnostics import mean_squared_cosine
from pave_lightning.diagnostics.overlap import overlaps_of_layer, removed_directions


def orthonormal(rows, columns, seed=0):
    return torch.tensor(np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0])


def test_identical_and_orthogonal_subspaces():
    basis = orthonormal(8, 6)
    turned = basis[:, :3] @ orthonormal(3, 3, seed=1)
    assert mean_squared_cosine(basis[:, :3], turned) == pytest.approx(1)
    assert mean_squared_cosine(basis[:, :3], basis[:, 3:]) == pytest.approx(0, abs=1e-20)
    assert mean_squared_cosine(basis[:, :2], basis) == pytest.approx(1)
    assert math.isnan(mean_squared_cosine(basis[:, :0], basis))


def test_a_known_angle():
    first = torch.eye(3, dtype=torch.float64)[:, :1]
    second = torch.tensor([[math.cos(0.4)], [math.sin(0.4)], [0.0]], dtype=torch.float64)
    assert mean_squared_cosine(first, second) == pytest.approx(math.cos(0.4) ** 2)


def test_random_subspaces_have_the_expected_overlap():
    pairs = [(orthonormal(40, 10, seed), orthonormal(40, 4, seed + 1000)) for seed in range(200)]
    found = np.mean([mean_squared_cosine(first, second) for first, second in pairs])
    expected = next(iter(overlaps_of_layer("l", {}, {"a": pairs[0][0], "b": pairs[0][1]}, [], 40))).expected
    assert expected == 10 / 40
    assert found == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)])
@pytest.mark.parametrize("count", [1, 3, 11])
def test_removed_directions_span_what_is_gone(shape, count):
    random = np.random.default_rng(count)
    directions = orthonormal(shape[0], count, seed=5).numpy()
    weight = random.normal(size=shape).astype(np.float32)
    purified = (weight - directions @ (directions.T @ weight)).astype(np.float32)
    found = removed_directions(torch.tensor(weight - purified), count).numpy()
    assert found.T @ found == pytest.approx(np.eye(count), abs=1e-12)
    assert found @ found.T == pytest.approx(directions @ directions.T, abs=1e-5)


def test_every_pair_and_part():
    full = orthonormal(10, 10)
    top = {"a": full[:, :5], "b": full[:, [0, 1, 2, 5, 6]], "c": full[:, 5:]}
    removed = {"a": full[:, 8:], "c": full[:, 7:]}
    found = list(overlaps_of_layer("layer", top, removed, [0.1, 0.5], 10))
    values = {(o.task_a, o.task_b, o.part, o.directions_a): o.overlap for o in found}
    assert values == pytest.approx(
        {
            ("a", "b", "top", 1): 1.0,
            ("a", "b", "top", 5): 0.6,
            ("a", "c", "top", 1): 0.0,
            ("a", "c", "top", 5): 0.0,
            ("b", "c", "top", 1): 0.0,
            ("b", "c", "top", 5): 0.4,
            ("a", "c", "removed", 2): 1.0,
        }
    )
    assert [o.expected for o in found] == [0.1, 0.5] * 3 + [0.3]
    assert math.isnan(found[-1].share)
