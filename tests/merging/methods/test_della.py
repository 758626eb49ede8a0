import hashlib
import json

import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.merging import make_method, merge
from pave_lightning.merging.methods.della import Della, DellaOptions, keep_probabilities
from pave_lightning.merging.methods.ties import Ties, TiesOptions


def run(source, **options):
    return merge(Della(DellaOptions(**options)), source).vectors


def uniform(size, seed, task, name):
    """The draws of a whole tensor, from the first counter on."""
    key = hashlib.sha256(json.dumps([seed, task, name]).encode()).digest()[:16]
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(size // 2 + 1)
    return np.stack([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)], axis=1).ravel()[:size] / 2**32


def survivors(value, drop_rate, window, seed, task, name):
    """MagPrune of one tensor, row by row (arXiv 2406.11617)."""
    rows = value.reshape(len(value), -1) if value.ndim > 1 else value.reshape(1, -1)
    draws = uniform(rows.size, seed, task, name).reshape(rows.shape)
    out = np.zeros(rows.shape)
    for r, row in enumerate(rows):
        n = len(row)
        for i in range(n):
            rank = sum(abs(row[j]) < abs(row[i]) or (abs(row[j]) == abs(row[i]) and j < i) for j in range(n))
            drop = drop_rate + window / 2 - window * (rank / (n - 1) if n > 1 else 0.5)
            if draws[r, i] >= drop:
                out[r, i] = row[i] / (1 - drop)
    return out.reshape(value.shape)


def elected(stack, how):
    out = np.zeros(stack[0].shape)
    for index in np.ndindex(out.shape):
        column = [part[index] for part in stack]
        agreeing = [value for value in column if value * sum(column) > 0]
        out[index] = (np.mean(agreeing) if how == "mean" else np.sum(agreeing)) if agreeing else 0.0
    return out


@pytest.mark.parametrize("how", ["mean", "sum"])
@pytest.mark.parametrize("elements", [1, 5, None])
@pytest.mark.parametrize(("drop_rate", "window"), [(0.5, 0.8), (0.3, 0.14), (0.6, 0.0)])
def test_against_numpy(how, elements, drop_rate, window, make_source):
    random = np.random.default_rng(0)
    shapes = {"a": (7, 5), "b": (11,), "c": (3, 2, 2), "d": (), "e": (4, 1)}
    vectors = {task: {name: random.normal(size=shape) for name, shape in shapes.items()} for task in ("x", "y", "z")}
    source = make_source(vectors, elements=elements)
    found = run(source, drop_rate=drop_rate, window=window, seed=3, merge=how)
    for name in shapes:
        parts = [
            survivors(np.asarray(named[name], dtype=np.float32).astype(float), drop_rate, window, 3, task, name)
            for task, named in vectors.items()
        ]
        assert found[name].numpy() == pytest.approx(elected(parts, how), rel=1e-5, abs=1e-6)
    assert all(vector.any() for name, vector in found.items() if name != "d")


def test_probabilities_by_hand():
    rows = torch.tensor([[0.5, -4.0, 1.0], [2.0, 2.0, -2.0]])
    found = keep_probabilities(rows, 0.7, 0.1)
    assert found[0].tolist() == pytest.approx([0.6, 0.8, 0.7])
    assert found[1].tolist() == pytest.approx([0.6, 0.7, 0.8])
    assert keep_probabilities(torch.tensor([[3.0], [0.0]]), 0.7, 0.1).tolist() == [[0.7], [0.7]]


def test_of_many_elements_that_tie_the_first_ones_are_smaller():
    found = keep_probabilities(torch.tensor([[2.0, -2.0] * 200]), 0.5, 0.25)
    assert found[0].tolist() == pytest.approx(np.linspace(0.25, 0.75, 400).tolist())


def test_the_mean_over_many_seeds_is_the_task_vector(make_source):
    vector = np.array([[0.5, -3.0, 1.0, 0.0], [2.0, -0.1, 0.7, -4.0]])
    source = make_source({"a": {"w": vector}, "still": {"w": 0 * vector}})
    draws = np.stack([run(source, drop_rate=0.5, window=0.6, seed=seed)["w"].numpy() for seed in range(1000)])
    error = draws.std(axis=0) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(axis=0) - vector) <= 4.5 * error + 1e-6)
    kept = (draws != 0).mean(axis=0)
    assert kept[0].tolist() == pytest.approx([0.4, 0.8, 0.6, 0.0], abs=0.07)
    assert kept[1].tolist() == pytest.approx([0.6, 0.2, 0.4, 0.8], abs=0.07)


def test_without_dropping_it_is_ties_without_a_trim(make_source, random_vectors):
    source = make_source(random_vectors)
    for how in ("mean", "sum"):
        expected = merge(Ties(TiesOptions(density=1.0, merge=how)), source).vectors
        found = run(source, drop_rate=0.0, window=0.0, merge=how)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_seed_decides(make_source, random_vectors):
    source = make_source(random_vectors)
    unnamed, named, other = run(source), run(source, seed=0), run(source, seed=1)
    assert all(torch.equal(unnamed[name], named[name]) for name in named)
    assert any(not torch.equal(other[name], named[name]) for name in named)


@pytest.mark.parametrize("options", [{"drop_rate": 0.05}, {"drop_rate": 0.95}, {"drop_rate": 0.3, "window": 0.7}])
def test_probabilities_outside_of_the_possible_are_refused(options):
    with pytest.raises(PaveError, match=r"window: .*drop probabilities must lie in \[0, 1\), but run from"):
        make_method("della", options)


def test_defaults_are_those_of_the_published_example():
    assert (DellaOptions().drop_rate, DellaOptions().window, Della.default_scale) == (0.3, 0.14, 1.1)
