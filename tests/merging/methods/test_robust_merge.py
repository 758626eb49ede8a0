"""RobustMerge against loops over rank directions in numpy."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pave_lightning.errors import PaveError
from pave_lightning.merging import merge
from pave_lightning.merging.methods.robust_merge import RobustMerge, RobustMergeOptions, pruned

SHAPES = {"v": (14, 9), "w": (8, 20)}


def run(source, **options):
    return merge(RobustMerge(RobustMergeOptions(**options)), source).vectors


def prune(factor, density):
    kept = np.zeros_like(factor)
    for index in np.argsort(-np.abs(factor), axis=None)[: max(1, int(factor.size * density + 1e-9))]:
        kept.flat[index] = factor.flat[index]
    return kept


def reference(factors, density=0.2, own=0.2, weight=2.0):
    """Prune, scale every rank direction, normalise across tasks (arXiv 2502.17159), one direction at a time."""
    rank, width = factors[0][1].shape
    scales = []
    for _, right in factors:
        kept = prune(right, density)
        row = [np.abs(right[i]).sum() / np.abs(kept[i]).sum() if kept[i].any() else None for i in range(rank)]
        largest = max((value for value in row if value is not None), default=1.0)
        row = [largest if value is None else value for value in row]
        least = sorted(row)[min(int(rank * (1 - own) + 1e-9), rank - 1)]
        scales.append([max(value, least) for value in row])
    left, right = np.zeros((len(factors[0][0]), rank)), np.zeros((rank, width))
    for i in range(rank):
        total = sum(row[i] for row in scales)
        for (first, second), row in zip(factors, scales, strict=True):
            left[:, i] += weight * prune(first, density)[:, i] * row[i] / total
            right[i] += weight * prune(second, density)[i]
    return left @ right


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("options", [{}, {"density": 0.5, "own_scales": 0.6}, {"density": 0.04, "factor_weight": 1.0}])
def test_as_the_plain_reference(adapted, rank, options, draw):
    pairs = draw(SHAPES, rank)
    merged = run(adapted(pairs), **options)
    names = {"density": "density", "own_scales": "own", "factor_weight": "weight"}
    for name in SHAPES:
        expected = reference([named[name] for named in pairs.values()], **{names[k]: v for k, v in options.items()})
        assert expected.any()
        assert np.allclose(merged[name].numpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_by_hand(adapted):
    # Half of each factor stays: 4 and 3 of the first A, whose rows keep 4 of 5 and 3 of 5; the larger scale is 5/3.
    one = (np.array([[1.0, 0.5], [0.2, 2.0]]), np.array([[4.0, 1.0], [2.0, 3.0]]))
    two = (np.array([[3.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 1.0]]))
    merged = run(adapted({"a": {"w": one}, "b": {"w": two}}), density=0.5, own_scales=0.5, factor_weight=1.0)["w"]
    # Scales: 5/3, 5/3 (raised from 5/4) and 1, 1. B = [(1 5/3 + 3) / (8/3), ..], A = [[4 + 1, 0], [0, 3 + 1]].
    expected = torch.tensor([[7 / 4 * 5, 0.0], [0.0, (2 * 5 / 3 + 1) / (8 / 3) * 4]])
    assert torch.allclose(merged, expected)


def test_the_weight_stands_in_both_factors(adapted, draw):
    source = adapted(draw(SHAPES, 2))
    plain, weighted = run(source, factor_weight=1.0)["w"], run(source, factor_weight=3.0)["w"]
    assert torch.allclose(weighted, 9 * plain)
    assert torch.allclose(run(source)["w"], 4 * plain)


def test_rows_that_are_pruned_as_a_whole_are_finite(adapted, draw):
    pairs = draw({"w": (6, 8)}, 3)
    for named in pairs.values():
        named["w"][1][0] *= 1e-6
    merged = run(adapted(pairs), own_scales=1.0)["w"]
    expected = reference([named["w"] for named in pairs.values()], own=1.0)
    assert np.allclose(merged.numpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_untrained_adapters(adapted, draw):
    pairs = {task: {"w": (0 * named["w"][0], named["w"][1])} for task, named in draw(SHAPES, 2).items()}
    assert not run(adapted(pairs))["w"].any()
    pairs = {task: {"w": (named["w"][0], 0 * named["w"][1])} for task, named in draw(SHAPES, 2).items()}
    assert not run(adapted(pairs))["w"].any()


def test_elements_that_tie_with_the_smallest_survivor_stay():
    factor = torch.tensor([[2.0, -2.0, 1.0], [2.0, 0.5, 0.0]])
    assert pruned(factor, 1 / 6).tolist() == [[2, -2, 0], [2, 0, 0]]
    assert pruned(factor, 0.7).tolist() == [[2, -2, 1], [2, 0, 0]]
    assert pruned(factor, 1e-3).tolist() == [[2, -2, 0], [2, 0, 0]]
    assert torch.equal(pruned(factor, 1.0), factor)


def test_all_else_is_averaged(adapted, draw):
    plain = {task: {"bias": np.full(3, value)} for task, value in (("one", 1), ("two", 2), ("three", 6))}
    assert run(adapted(draw(SHAPES, 2), plain))["bias"].tolist() == [3, 3, 3]


def test_unequal_ranks_and_missing_adapters_are_told_at_once(adapted, draw):
    pairs = draw(SHAPES, (2, 2, 3))
    del pairs["one"]["v"]
    with pytest.raises(PaveError, match="'robust_merge' cannot merge") as caught:
        run(adapted(pairs))
    text = str(caught.value)
    assert "w: adapters of one rank are needed, found rank 2 in 'one', 2 in 'two', 3 in 'three'" in text
    assert "v: adapters of one rank are needed, found rank 2 in 'two', 3 in 'three'" in text
    assert "v has an adapter in 'two', 'three', but none in 'one'" in text


@pytest.mark.parametrize("options", [{"density": 0}, {"own_scales": 0}, {"own_scales": 1.1}, {"factor_weight": 0}])
def test_impossible_options(options):
    with pytest.raises(ValidationError):
        RobustMergeOptions(**options)


def test_defaults_are_those_of_the_source():
    options = RobustMergeOptions()
    assert (options.density, options.own_scales, options.factor_weight) == (0.2, 0.2, 2.0)
    assert RobustMerge.default_scale == 1.0
