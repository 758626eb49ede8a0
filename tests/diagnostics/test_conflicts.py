import math

import numpy as np
import pytest
import torch

from pave_lightning.diagnostics import compare_pairs, conflicts, removed_energy


def only(vectors, top_share=0.2):
    (found,) = compare_pairs("layer", "plain", vectors, top_share)
    return found


def test_counted_by_hand():
    found = only({"a": torch.tensor([[1.0, -2.0, 0.0, 3.0]]), "b": torch.tensor([[-4.0, -1.0, 5.0, 0.0]])}, 0.5)
    assert (found.layer, found.task_a, found.task_b, found.treatment, found.elements) == ("layer", "a", "b", "plain", 4)
    assert found.sign_conflict == pytest.approx(1 / 2)
    assert found.sign_conflict_of_all == pytest.approx(1 / 4)
    assert found.weighted_conflict == pytest.approx(4 / 6)
    assert found.cosine == pytest.approx(-2 / math.sqrt(14 * 42))
    # The two largest: {3, 1} and {2, 0}; non-zero: {0, 1, 3} and {0, 1, 2}.
    assert found.top_overlap == 0
    assert found.support_overlap == pytest.approx(2 / 4)


@pytest.mark.parametrize("chunk", [1, 7, 100, 10**6])
def test_any_pairs_as_numpy_counts_them(chunk, monkeypatch):
    monkeypatch.setattr(conflicts, "CHUNK_ELEMENTS", chunk)
    random = np.random.default_rng(0)
    arrays = {task: random.normal(size=(6, 9)) * (random.random((6, 9)) > 0.3) for task in "abc"}
    found = list(compare_pairs("l", "dare", {task: torch.tensor(a) for task, a in arrays.items()}, 0.2))
    assert [(pair.task_a, pair.task_b) for pair in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    for pair in found:
        a, b = arrays[pair.task_a].ravel(), arrays[pair.task_b].ravel()
        both = (a != 0) & (b != 0)
        differ = both & (np.sign(a) != np.sign(b))
        assert pair.sign_conflict == pytest.approx(differ.sum() / both.sum())
        assert pair.sign_conflict_of_all == pytest.approx(differ.mean())
        assert pair.weighted_conflict == pytest.approx(np.abs(a * b)[differ].sum() / np.abs(a * b).sum())
        assert pair.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        largest = [set(np.argsort(-np.abs(v))[: round(0.2 * len(v))]) for v in (a, b)]
        assert pair.top_overlap == pytest.approx(len(largest[0] & largest[1]) / len(largest[0] | largest[1]))
        assert pair.support_overlap == pytest.approx(both.sum() / ((a != 0) | (b != 0)).sum())


def test_equal_and_opposite_vectors():
    vector = torch.tensor(np.random.default_rng(0).normal(size=50), dtype=torch.float32)
    same, opposite = only({"a": vector, "b": 2 * vector}), only({"a": vector, "b": -vector})
    assert (same.sign_conflict, opposite.sign_conflict) == (0, 1)
    assert (same.cosine, opposite.cosine) == (pytest.approx(1), pytest.approx(-1))
    assert same.top_overlap == opposite.top_overlap == 1


def test_zeros_are_in_no_support_and_have_no_conflict():
    found = only({"a": torch.zeros(10), "b": torch.ones(10)})
    values = (found.sign_conflict, found.weighted_conflict, found.cosine)
    assert all(math.isnan(value) for value in values)
    assert (found.sign_conflict_of_all, found.top_overlap, found.support_overlap) == (0, 0, 0)


def test_removed_energy_by_hand():
    weight = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    before, after = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    found = removed_energy(("layer", "t", "pave"), weight, before, after, torch.tensor([[0.0], [1.0]]).double())
    assert (found.layer, found.task, found.treatment, found.elements) == ("layer", "t", "pave", 4)
    assert found.of_vector == pytest.approx(16 / 10)
    assert found.of_weight == pytest.approx(16 / 20)
    assert found.in_removed_directions == pytest.approx(9 / 10)
    assert found.norm_ratio == pytest.approx(math.sqrt(2 / 10))
    assert found.cosine == pytest.approx(-2 / math.sqrt(20))


def test_nothing_to_remove():
    found = removed_energy(("l", "t", "dare"), torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2, 2))
    assert math.isnan(found.of_vector)
    assert math.isnan(found.cosine)
    assert math.isnan(found.in_removed_directions)
    assert found.of_weight == 0
