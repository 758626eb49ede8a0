"""KnOTS against an SVD of the concatenation and a sort over all layers, in numpy."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pave_lightning.merging import merge
from pave_lightning.merging.methods.dare import kept_elements
from pave_lightning.merging.methods.knots import Knots, KnotsOptions

SHAPES = {"v": (14, 9), "w": (8, 20)}


def run(source, **options):
    return merge(Knots(KnotsOptions(**options)), source).vectors


def dense(pairs):
    """The products alone, as task vectors of fully trained experts."""
    return {task: {name: pair[0] @ pair[1] for name, pair in named.items()} for task, named in pairs.items()}


def reference(vectors, density, how="mean", drop_rate=0.0, seed=0, cut=1e-5):
    """KnOTS as published: one SVD of [tau_1 .. tau_T], a threshold over all layers, merge, back (arXiv 2410.19735)."""
    tasks = list(vectors)
    bases, coordinates = {}, {task: {} for task in tasks}
    for name in sorted(vectors[tasks[0]]):
        left, values, right = np.linalg.svd(np.concatenate([vectors[t][name] for t in tasks], axis=1))
        kept = values > cut * values[0]
        scaled = np.diag(values[kept]) @ right[: len(values)][kept]
        bases[name] = left[:, : len(values)][:, kept]
        for task, own in zip(tasks, np.split(scaled, len(tasks), axis=1), strict=True):
            if drop_rate:
                mask = kept_elements(own.size, drop_rate, task=task, parameter=name, seed=seed).numpy()
                own = own * mask.reshape(own.shape) / (1 - drop_rate)  # noqa: PLW2901
            coordinates[task][name] = own
    for task in tasks:
        flat = np.concatenate([own.ravel() for own in coordinates[task].values()])
        threshold = np.sort(np.abs(flat))[::-1][max(1, int(flat.size * density)) - 1]
        for name, own in coordinates[task].items():
            coordinates[task][name] = np.where(np.abs(own) >= threshold * (1 - 1e-6), own, 0.0)
    merged = {}
    for name, basis in bases.items():
        stacked = np.stack([coordinates[task][name] for task in tasks])
        agreeing = (stacked != 0) & (np.sign(stacked) == np.sign(stacked.sum(axis=0)))
        total = (stacked * agreeing).sum(axis=0)
        merged[name] = basis @ (total / np.maximum(agreeing.sum(axis=0), 1) if how == "mean" else total)
    return merged


def close(found, expected):
    return all(
        np.allclose(found[name].numpy(), value, atol=1e-5 * max(np.abs(value).max(), 1e-30))
        for name, value in expected.items()
    )


@pytest.mark.parametrize("ranks", [2, (1, 2, 3), 7])
@pytest.mark.parametrize("options", [{"density": 0.2}, {"density": 0.55, "merge": "sum"}, {"density": 1.0}])
def test_adapters_as_the_plain_reference(adapted, ranks, options, draw):
    pairs = draw(SHAPES, ranks)
    pairs["one"]["v"] = (5 * pairs["one"]["v"][0], pairs["one"]["v"][1])
    expected = reference(dense(pairs), options["density"], options.get("merge", "mean"))
    assert close(run(adapted(pairs), **options), expected)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_full_task_vectors_as_the_plain_reference(make_source, density):
    random = np.random.default_rng(4)
    vectors = {task: {name: random.standard_normal(shape) for name, shape in SHAPES.items()} for task in "abc"}
    assert close(run(make_source(vectors, matrices=SHAPES), density=density), reference(vectors, density))


def test_full_task_vectors_of_low_rank_give_what_their_factors_give(make_source, adapted, draw):
    pairs = draw(SHAPES, 2)
    merged = run(make_source(dense(pairs), matrices=SHAPES), density=0.3)
    assert close(merged, {name: value.numpy() for name, value in run(adapted(pairs), density=0.3).items()})


def test_the_threshold_is_one_over_all_layers(adapted, draw):
    pairs = draw(SHAPES, 2)
    for named in pairs.values():
        named["v"] = (100 * named["v"][0], named["v"][1])
    # Of 6 x 9 and 6 x 20 coordinates a fifth are 34: all of them lie in the stronger layer.
    merged = run(adapted(pairs), density=0.2)
    assert merged["v"].any()
    assert not merged["w"].any()


def test_by_hand(adapted):
    # The first two tasks use the first output, the third the second: the basis is the first two unit vectors.
    pairs = {
        "a": {"w": (np.array([[1.0], [0], [0]]), np.array([[4.0, -1.0]]))},
        "b": {"w": (np.array([[1.0], [0], [0]]), np.array([[2.0, 3.0]]))},
        "c": {"w": (np.array([[0.0], [2], [0]]), np.array([[0.5, -1.0]]))},
    }
    merged = run(adapted(pairs), density=1.0)["w"]
    assert torch.allclose(merged, torch.tensor([[3.0, 3.0], [1.0, -2.0], [0.0, 0.0]]), atol=1e-6)
    # A share of 0.25 keeps one of the four coordinates of each task, zeros counted.
    merged = run(adapted(pairs), density=0.25)["w"]
    assert torch.allclose(merged, torch.tensor([[4.0, 3.0], [0.0, -2.0], [0.0, 0.0]]), atol=1e-6)


@pytest.mark.parametrize("drop_rate", [0.1, 0.6])
def test_dropped_coordinates(adapted, drop_rate, draw):
    pairs = draw(SHAPES, 2)
    options = {"density": 0.8, "drop_rate": drop_rate, "seed": 5}
    assert close(run(adapted(pairs), **options), reference(dense(pairs), 0.8, drop_rate=drop_rate, seed=5))
    other = run(adapted(pairs), **{**options, "seed": 6})
    assert not torch.equal(other["w"], run(adapted(pairs), **options)["w"])


def test_one_task_with_all_coordinates_summed_is_task_arithmetic(adapted, draw):
    pairs = draw(SHAPES, 2)
    pairs = {
        task: {name: (left * (task == "one"), right) for name, (left, right) in n.items()} for task, n in pairs.items()
    }
    merged = run(adapted(pairs), density=1.0, merge="sum")
    assert close(merged, {name: left @ right for name, (left, right) in pairs["one"].items()})


def test_agreeing_coordinates_sum_up_to_task_arithmetic(adapted, draw):
    pairs = draw(SHAPES, 2)
    pairs = dict.fromkeys(pairs, pairs["one"])
    expected = {name: 3 * left @ right for name, (left, right) in pairs["one"].items()}
    assert close(run(adapted(pairs), density=1.0, merge="sum"), expected)
    assert close(run(adapted(pairs), density=1.0), {name: value / 3 for name, value in expected.items()})


def test_weights_that_are_stored_transposed(adapted, make_source, draw):
    pairs = draw({"w": (8, 12)}, 2)
    plain = run(adapted(pairs), density=0.4)["w"]
    assert torch.allclose(plain, run(adapted(pairs, transposed=["w"]), density=0.4)["w"].T, atol=1e-5)
    turned = {task: {"w": named["w"].T} for task, named in dense(pairs).items()}
    assert torch.allclose(plain, run(make_source(turned, transposed=["w"]), density=0.4)["w"].T, atol=1e-4)


def test_a_layer_that_some_tasks_leave_as_it_is_and_others_train_whole(adapted, draw):
    pairs = draw(SHAPES, 2)
    vectors = dense(pairs)
    del pairs["two"]["w"], pairs["three"]["w"]
    vectors["two"]["w"] = np.zeros(SHAPES["w"])
    source = adapted(pairs, {"three": {"w": vectors["three"]["w"]}})
    assert close(run(source, density=0.4), reference(vectors, 0.4))
    vectors["three"]["w"] = np.zeros(SHAPES["w"])
    assert close(run(adapted(pairs), density=0.4), reference(vectors, 0.4))


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_vectors_of_zeros(adapted, make_source, density, draw):
    pairs = {task: {"w": (0 * named["w"][0], named["w"][1])} for task, named in draw(SHAPES, 2).items()}
    assert not run(adapted(pairs), density=density)["w"].any()
    assert not run(make_source(dense(pairs), matrices=["w"]), density=density)["w"].any()


@pytest.mark.parametrize("known", [True, False])
def test_weak_directions_are_cut(adapted, make_source, known):
    eye = np.eye(4)
    pairs = {"a": {"w": (eye[:, :1], eye[:1])}, "b": {"w": (1e-3 * eye[:, 1:2], eye[1:2])}}
    source = adapted(pairs) if known else make_source(dense(pairs), matrices=["w"])
    assert run(source, density=1.0)["w"][1, 1] == pytest.approx(1e-3)
    assert run(source, density=1.0, cut=1e-2)["w"][1, 1] == 0
    assert run(source, density=1.0, cut=1e-2)["w"][0, 0] == pytest.approx(1)


def test_all_else_is_averaged(adapted, draw):
    plain = {task: {"bias": np.full(3, value)} for task, value in (("one", 1), ("two", 2), ("three", 6))}
    assert run(adapted(draw(SHAPES, 1), plain))["bias"].tolist() == [3, 3, 3]
    assert not run(adapted(draw(SHAPES, 1), plain), others="base")["bias"].any()


def test_no_matrix_at_all(make_source):
    vectors = {"a": {"bias": np.ones(2)}, "b": {"bias": np.zeros(2)}}
    assert run(make_source(vectors))["bias"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("options", [{"density": 0}, {"density": 1.1}, {"drop_rate": 1}, {"cut": -1}, {"merge": "max"}])
def test_impossible_options(options):
    with pytest.raises(ValidationError):
        KnotsOptions(**options)


def test_defaults_are_those_of_the_source():
    assert KnotsOptions().density == 0.2
    assert KnotsOptions().drop_rate == 0
    assert Knots.default_scale == 0.6


def test_the_bases_of_full_task_vectors_are_held_all_at_once(make_source):
    # The matrices of a transformer's block, in its proportions.
    shapes = {"query": (12, 12), "key": (12, 12), "value": (12, 12), "out": (12, 12), "up": (48, 12), "down": (12, 48)}
    random = np.random.default_rng(0)
    vectors = {
        f"task{index}": {name: random.standard_normal(shape) for name, shape in shapes.items()} for index in range(8)
    }
    method, model = Knots(), sum(height * width for height, width in shapes.values())
    merge(method, make_source(vectors, matrices=list(shapes)))
    held = sum(value.numel() for value in method._bases.values())
    assert model < held <= Knots.held_models * model
