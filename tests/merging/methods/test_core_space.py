"""Merging in Core Space: losslessness, and inner methods against formulas in the full space."""

import re

import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.merging import MatrixOptions, merge
from pave_lightning.merging.methods.core_space import CoreSpace, CoreSpaceOptions, joint_bases
from pave_lightning.merging.methods.isotropic import IsoC
from pave_lightning.merging.methods.tsv import TsvMerge

INNER = ("task_arithmetic", "ties", "tsv_m", "iso_c")
SHAPES = {"v": (14, 9), "w": (8, 20)}


def run(source, inner, inner_options=None, **options):
    return merge(CoreSpace(CoreSpaceOptions(inner=inner, inner_options=inner_options or {}, **options)), source).vectors


def products(pairs, name):
    return [named[name][0] @ named[name][1] for named in pairs.values() if name in named]


def polar(matrix):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    kept = values > 1e-9 * values[0]
    return left[:, kept] @ right[kept]


def task_singular_vectors(matrices, rank):
    """The leading triplets of all matrices, made orthogonal across tasks, in the full space."""
    parts = [np.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    left = polar(np.concatenate([part[0][:, :rank] for part in parts], axis=1))
    right = polar(np.concatenate([part[2][:rank] for part in parts], axis=0))
    return left @ np.diag(np.concatenate([part[1][:rank] for part in parts])) @ right


def span(stacked):
    """The leading eigenvectors of ``M M^T``."""
    vectors = np.linalg.eigh(stacked @ stacked.T)[1]
    return vectors[:, ::-1][:, : min(stacked.shape)]


def ties_in_core(pairs, name, density):
    """Trim, elect and average on matrices in bases from eigenproblems; signs of their columns do not matter."""
    left = span(np.concatenate([named[name][0] for named in pairs.values()], axis=1))
    right = span(np.concatenate([named[name][1] for named in pairs.values()], axis=0).T)
    merged = np.zeros((left.shape[1], right.shape[1]))
    cores = []
    for matrix in products(pairs, name):
        core = left.T @ matrix @ right
        threshold = np.sort(np.abs(core).ravel())[::-1][int(core.size * density) - 1]
        cores.append(np.where(np.abs(core) >= threshold, core, 0.0))
    for index in np.ndindex(merged.shape):
        values = np.array([core[index] for core in cores])
        agreeing = values[(values != 0) & (np.sign(values) == np.sign(values.sum()))]
        merged[index] = agreeing.mean() if len(agreeing) else 0.0
    return left @ merged @ right.T


@pytest.mark.parametrize("ranks", [2, (1, 2, 3), (4, 4, 4)])
def test_bases_lose_nothing(ranks, draw):
    pairs = [named["w"] for named in draw(SHAPES, ranks).values()]
    left, right = joint_bases([tuple(torch.tensor(part) for part in pair) for pair in pairs])
    left, right = left.numpy(), right.numpy()
    assert left.shape == (8, min(8, sum(len(pair[1]) for pair in pairs)))
    for first, second in pairs:
        exact = first @ second
        assert np.allclose(left @ (left.T @ exact @ right.T) @ right, exact, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, (1, 2, 3)])
def test_a_linear_inner_method_gives_the_exact_sum(adapted, ranks, draw):
    pairs = draw(SHAPES, ranks)
    merged = run(adapted(pairs), "task_arithmetic")
    for name in SHAPES:
        assert np.allclose(merged[name].numpy(), sum(products(pairs, name)), atol=2e-5)


def test_task_singular_vectors_as_in_the_full_space(adapted, draw):
    pairs = draw(SHAPES, 2)
    merged = run(adapted(pairs), "tsv_m")
    for name in SHAPES:
        assert np.allclose(merged[name].numpy(), task_singular_vectors(products(pairs, name), 2), atol=1e-4)


def test_isotropic_with_the_mean_over_the_directions_of_the_core(adapted, draw):
    pairs = draw(SHAPES, 2)
    merged = run(adapted(pairs), "iso_c")
    for name in SHAPES:
        total = sum(products(pairs, name))
        values = np.linalg.svd(total, compute_uv=False)
        assert np.allclose(merged[name].numpy(), values.sum() / 6 * polar(total), atol=1e-4)


def test_it_is_another_result_than_that_of_the_inner_method_alone(adapted, draw):
    pairs = draw(SHAPES, 2)
    alone = merge(IsoC(MatrixOptions()), adapted(pairs)).vectors["w"]
    assert not torch.allclose(alone, run(adapted(pairs), "iso_c")["w"], rtol=0.1)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_has_a_threshold_for_each_layer(adapted, density, draw):
    pairs = draw(SHAPES, 2)
    pairs["one"]["w"] = (1000 * pairs["one"]["w"][0], pairs["one"]["w"][1])
    merged = run(adapted(pairs), "ties", {"density": density})
    for name in SHAPES:
        expected = ties_in_core(pairs, name, density)
        assert np.allclose(merged[name].numpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_by_hand_with_orthogonal_adapters(adapted):
    eye = np.eye(4)
    pairs = {"one": {"w": (3 * eye[:, :1], eye[:1])}, "two": {"w": (eye[:, 1:2], eye[1:2])}}
    expected = np.zeros((4, 4))
    expected[0, 0], expected[1, 1] = 3, 1
    assert np.allclose(run(adapted(pairs), "tsv_m")["w"].numpy(), expected, atol=1e-6)
    # The sum has the singular values 3 and 1 in a core of two directions.
    expected[0, 0], expected[1, 1] = 2, 2
    assert np.allclose(run(adapted(pairs), "iso_c")["w"].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("inner", ["task_arithmetic", "ties"])
def test_a_task_that_leaves_a_layer_as_it_is_takes_part_with_zeros(adapted, inner, draw):
    pairs = draw(SHAPES, 2)
    zeros = {task: dict(named) for task, named in pairs.items()}
    zeros["two"]["w"] = (np.zeros((8, 1)), np.zeros((1, 20)))
    del pairs["two"]["w"]
    options = {"density": 1.0} if inner == "ties" else {}
    first, second = run(adapted(pairs), inner, options), run(adapted(zeros), inner, options)
    assert torch.allclose(first["w"], second["w"], atol=1e-4)
    assert first["w"].any()


def test_directions_are_split_among_all_tasks_also_where_one_has_none(adapted, draw):
    pairs = draw(SHAPES, 2)
    del pairs["two"]["w"]
    # Two adapters of rank 2 span four directions, of which each of three tasks gets one.
    expected = task_singular_vectors(products(pairs, "w"), 1)
    assert np.allclose(run(adapted(pairs), "tsv_m")["w"].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("others", ["mean", "sum", "base"])
def test_what_has_no_adapter_is_averaged_summed_or_left(adapted, others, draw):
    pairs = draw(SHAPES, 1)
    values = dict(zip(pairs, (1, 2, 6), strict=True))
    plain = {task: {"bias": np.full(3, value), "full": np.full((2, 2), value)} for task, value in values.items()}
    source = adapted(pairs, plain, matrices=["v", "w", "full"])
    merged = run(source, "tsv_m", others=others)
    for name in ("bias", "full"):
        assert merged[name].unique().tolist() == [{"mean": 3, "sum": 9, "base": 0}[others]]


@pytest.mark.parametrize("inner", INNER)
def test_without_adapters_the_factors_are_found_in_task_vectors_of_low_rank(make_source, adapted, inner, draw):
    pairs = draw({"w": (9, 12)}, 2)
    found = make_source({task: {"w": named["w"][0] @ named["w"][1]} for task, named in pairs.items()}, matrices=["w"])
    if inner == "ties":  # depends on how the product is split into factors, so they are split alike
        for named in pairs.values():
            left, values, right = np.linalg.svd(named["w"][0] @ named["w"][1], full_matrices=False)
            named["w"] = left[:, :2] * np.sqrt(values[:2]), np.sqrt(values[:2])[:, None] * right[:2]
    expected, merged = run(adapted(pairs), inner)["w"], run(found, inner)["w"]
    assert torch.allclose(merged, expected, rtol=1e-3, atol=2e-4)


def test_without_adapters_task_vectors_that_do_not_differ_from_the_base(make_source):
    vectors = {task: {"w": np.zeros((6, 6)), "b": np.zeros(2)} for task in ("a", "b")}
    assert not run(make_source(vectors, matrices=["w"]), "tsv_m")["w"].any()


def test_task_vectors_of_high_rank_are_refused(make_source):
    random = np.random.default_rng(0)
    low, high = random.standard_normal((8, 3)) @ random.standard_normal((3, 8)), random.standard_normal((8, 4))
    vectors = {"low": {"w": low}, "high": {"w": high @ random.standard_normal((4, 8))}}
    with pytest.raises(PaveError, match="task 'high' has none, and its task vector of w has rank 4 of 8, no low one"):
        run(make_source(vectors, matrices=["w"]), "ties")


def test_adapters_and_full_experts_are_refused_by_name(adapted, draw):
    pairs = draw(SHAPES, 2)
    pairs["two"] = {}
    plain = {"two": {name: np.ones(shape) for name, shape in SHAPES.items()}}
    message = "'two' has no low-rank adapters, but the other tasks have (none were given)"
    with pytest.raises(PaveError, match=re.escape(message)):
        run(adapted(pairs, plain), "ties")
    pairs["three"] = {}
    plain["three"] = plain["two"]
    with pytest.raises(PaveError, match="'two', 'three' have no low-rank adapters"):
        run(adapted(pairs, plain), "ties")


def test_too_few_directions_for_all_tasks_are_told_at_once(adapted, draw):
    pairs = draw(SHAPES, 1)
    del pairs["two"]["v"], pairs["two"]["w"], pairs["three"]["w"]
    pairs["two"]["u"] = (np.ones((2, 1)), np.ones((1, 9)))
    with pytest.raises(PaveError, match="core_space") as caught:
        run(adapted(pairs), "tsv_m")
    assert "v: the adapters span 2 directions, which tsv_m cannot split among 3 tasks" in str(caught.value)
    assert "w: the adapters span 1 directions" in str(caught.value)
    assert "u: the adapters span 1 directions" in str(caught.value)
    assert run(adapted(pairs), "iso_c")["w"].any()


def test_too_few_directions_of_task_vectors_are_told(make_source):
    vectors = {"a": {"w": np.eye(5)[:, :1] @ np.eye(5)[:1]}, "b": {"w": np.zeros((5, 5))}}
    with pytest.raises(PaveError, match="w: the adapters span 1 directions, which tsv_m cannot split among 2 tasks"):
        run(make_source(vectors, matrices=["w"]), "tsv_m")


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.05, "w: the adapters span 6 directions, of which tsv_m would keep none; raise inner_options.rank_share"),
        (0.5, "w: the adapters span 6 directions, fewer than the 3 that tsv_m would keep of each of 3 tasks; lower"),
    ],
)
def test_shares_that_cannot_be_kept_are_told(adapted, share, message, draw):
    with pytest.raises(PaveError, match=message):
        run(adapted(draw(SHAPES, 2)), "tsv_m", {"rank_share": share})


def test_an_inner_option_without_effect_is_refused():
    with pytest.raises(PaveError, match=r"inner_options.others would change nothing(.|\n)*set options.others"):
        CoreSpace(CoreSpaceOptions(inner="iso_c", inner_options={"others": "sum"}))


def test_wrong_inner_options_are_told_when_the_method_is_made():
    with pytest.raises(PaveError, match=r"merge method 'ties':\n  - densitty: unknown option; did you mean 'density'"):
        CoreSpace(CoreSpaceOptions(inner="ties", inner_options={"densitty": 0.3}))


def test_inner_options_reach_the_inner_method(adapted, draw):
    pairs = draw(SHAPES, 2)
    whole, part = run(adapted(pairs), "tsv_m"), run(adapted(pairs), "tsv_m", {"rank_share": 1 / 6})
    assert np.linalg.matrix_rank(whole["w"].numpy(), tol=1e-4) == 6
    assert np.linalg.matrix_rank(part["w"].numpy(), tol=1e-4) == 3


def test_defaults():
    assert CoreSpaceOptions().inner == TsvMerge.name
    assert CoreSpace.default_scale == 1.0
