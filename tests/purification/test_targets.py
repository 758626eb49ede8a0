"""What is projected and by whose statistics, against singular value decompositions by NumPy."""

import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.purification import PurifiedTaskVectors
from pave_lightning.purification.moments import random_moment, row_moment
from pave_lightning.purification.options import Purify
from pave_lightning.statistics import LayerMoment, TaskStatistics
from pave_lightning.weights import ParameterKind

DAMPING = 0.1
LAYERS = ("block.wide", "block.tall", "end.square", "end.flipped")


def projected(directions, rank, matrix):
    return directions[:, :rank] @ (directions[:, :rank].T @ matrix)


def check(source, vectors, expected, upright):
    """Every layer and task against ``expected(layer, task, base, weight, rank)``; something must have been removed."""
    for layer in LAYERS:
        base, weights = source.matrices(layer)
        for task, weight in weights.items():
            found = upright(vectors, task, source.named(layer))
            kept = vectors.ranks[task, layer]
            assert found == pytest.approx(expected(layer, task, base, weight, kept.rank), abs=3e-6)
            assert kept.rank == kept.full or np.abs(found - weight).max() > 1e-3
        assert any(vectors.ranks[task, layer].rank < vectors.ranks[task, layer].full for task in weights)


def test_target_delta_keeps_the_directions_that_the_task_vector_excites(source, statistics, seen_through, upright):
    vectors = PurifiedTaskVectors(source, statistics, Purify(rho=0.7, damping=DAMPING, target="delta"))

    def expected(layer, task, base, weight, rank):
        directions, _ = seen_through(weight - base, statistics[task], layer)
        return base + projected(directions, rank, weight - base)

    check(source, vectors, expected, upright)


def test_target_delta_shares_ranks_by_the_spectra_of_the_task_vectors(make_source, capture, seen_through):
    source = make_source(layers={"x": ((12, 12), 1)})
    statistics = capture(source)
    found = {}
    for target in ("expert", "delta", "delta_by_expert"):
        vectors = PurifiedTaskVectors(source, statistics, Purify(rho=0.7, damping=DAMPING, target=target))
        vectors.expert("a", source.named("x"))
        found[target] = {task: kept.rank for (task, _), kept in vectors.ranks.items()}
    base, weights = source.matrices("x")
    spectra = {task: seen_through(weight - base, statistics[task], "x")[1] for task, weight in weights.items()}
    last = sorted((values[rank] / values[0], task, rank) for task, values in spectra.items() for rank in range(12))
    removed = [task for _, task, rank in last if rank >= 12 - 6][: 36 - 25]
    assert found["delta"] == {task: 12 - removed.count(task) for task in "abc"}
    assert found["delta"] != found["expert"]
    assert found["delta_by_expert"] == found["expert"]


def test_target_delta_by_expert_keeps_of_the_task_vector_what_the_expert_excites(
    source, statistics, seen_through, upright
):
    vectors = PurifiedTaskVectors(source, statistics, Purify(rho=0.7, damping=DAMPING, target="delta_by_expert"))

    def expected(layer, task, base, weight, rank):
        directions, _ = seen_through(weight, statistics[task], layer)
        # What lies outside of the column space of a tall weight is no direction of the expert; it stays.
        tail = directions[:, rank:]
        return weight - tail @ (tail.T @ (weight - base))

    check(source, vectors, expected, upright)


@pytest.mark.parametrize("target", ["expert", "delta", "delta_by_expert"])
def test_what_is_no_matrix_weight_is_left_alone(source, statistics, target):
    vectors = PurifiedTaskVectors(source, statistics, Purify(rho=0.7, target=target))
    others = [parameter for parameter in source.parameters if parameter.kind is not ParameterKind.LINEAR]
    assert {p.kind for p in others} == {ParameterKind.EMBEDDING, ParameterKind.BIAS, ParameterKind.NORM_SCALE}
    for task in source.tasks:
        assert all(torch.equal(vectors.expert(task, p), source.expert(task, p)) for p in others)
        assert not any(torch.equal(vectors.vector(task, p), source.vector(task, p)) for p in vectors.layers)
    assert all(torch.equal(vectors.base(p), source.base(p)) for p in source.parameters)


@pytest.mark.parametrize("scope", ["layer", "model", "global"])
def test_layers_that_a_task_did_not_change_are_untouched_by_the_target_delta(make_source, capture, upright, scope):
    unchanged = {("a", "block.wide"), ("a", "block.tall"), ("b", "end.flipped")}
    source = make_source(unchanged=unchanged)
    vectors = PurifiedTaskVectors(source, capture(source), Purify(rho=0.7, target="delta", scope=scope))
    for layer in LAYERS:
        for task in source.tasks:
            found = vectors.expert(task, source.named(layer))
            if (task, layer) in unchanged:
                assert torch.equal(found, source.base(source.named(layer)))
    assert vectors.untouched == dict.fromkeys(unchanged, "its task vector has no effect on the data")
    assert vectors.ranks.keys() == {(task, layer) for task in "abc" for layer in LAYERS} - unchanged
    assert any(kept.rank < kept.full for kept in vectors.ranks.values())


def test_other_task_takes_the_statistics_of_the_next_task(source, statistics, seen_through, upright):
    vectors = PurifiedTaskVectors(source, statistics, Purify(rho=0.7, damping=DAMPING, statistics="other_task"))
    follows = {"a": "b", "b": "c", "c": "a"}

    def expected(layer, task, base, weight, rank):
        directions, _ = seen_through(weight, statistics[follows[task]], layer)
        return projected(directions, rank, weight)

    check(source, vectors, expected, upright)


def test_other_task_goes_round_all_tasks_even_if_few_are_purified(source, capture, seen_through, upright):
    only = capture(source, tasks=["a"])
    options = Purify(rho=0.7, damping=DAMPING, statistics="other_task", tasks=["c"])
    vectors = PurifiedTaskVectors(source, only, options)
    for layer in LAYERS:
        weight = source.matrices(layer)[1]["c"]
        found = upright(vectors, "c", source.named(layer))
        rank = vectors.ranks["c", layer].rank
        assert rank < min(weight.shape)
        directions, _ = seen_through(weight, only["a"], layer)
        assert found == pytest.approx(projected(directions, rank, weight), abs=3e-6)
    with pytest.raises(PaveError, match="task 'c' has no captured statistics; capture them first"):
        PurifiedTaskVectors(source, only, options.model_copy(update={"tasks": ["b"]}))


def test_other_task_needs_another_task(make_source, capture):
    source = make_source(("a",))
    with pytest.raises(PaveError, match="statistics: other_task needs another task than 'a', but there is none"):
        PurifiedTaskVectors(source, capture(source), Purify(statistics="other_task"))


@pytest.mark.parametrize(("options", "count"), [({"metric": "identity"}, 12), ({"statistics": "random"}, 12),
                                                ({"statistics": "task_vector"}, 12),
                                                ({"metric": "identity", "statistics": "other_task"}, 12)])  # fmt: skip
@pytest.mark.parametrize("target", ["expert", "delta"])
def test_what_needs_no_captured_statistics_works_without_and_ignores_them(
    source, same_everywhere, options, count, target
):
    asked = Purify(rho=0.7, target=target, **options)
    vectors = PurifiedTaskVectors(source, {}, asked)
    broken = TaskStatistics({"nowhere": LayerMoment("input", torch.full((2, 2), torch.nan), 1)}, examples=1)
    same_everywhere(vectors, PurifiedTaskVectors(source, dict.fromkeys("abc", broken), asked))
    assert len(vectors.ranks) == count
    assert any(kept.rank < kept.full for kept in vectors.ranks.values())


def test_random_moments_are_the_same_every_time_and_differ_between_tasks_and_layers(make_source):
    source = make_source(("b", "c"), layers={"x": ((8, 8), 1), "y": ((8, 8), 1)})
    weight = source.expert("b", source.named("x"))
    source.expert = lambda task, parameter, rows=None: weight
    # All weights are equal and lose as much: what differs is the noise.
    options = Purify(rho=0.7, statistics="random", allocation="even")
    found = []
    for _ in range(2):
        vectors = PurifiedTaskVectors(source, {}, options)
        found.append({(task, p.layer): vectors.expert(task, p) for p in vectors.layers for task in source.tasks})
        torch.rand(3)
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    purified = list(found[0].values())
    assert len(purified) == 4
    assert all((one - other).abs().max() > 1e-3 for n, one in enumerate(purified) for other in purified[:n])


def test_a_random_moment_is_that_of_noise_and_leaves_the_common_generator_alone():
    state = torch.random.get_rng_state()
    moment = random_moment(200, "any words")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (moment.kind, moment.rows) == ("input", 400)
    matrix = moment.matrix.double().numpy()
    assert np.diagonal(matrix).mean() == pytest.approx(1, abs=0.02)
    assert np.abs(matrix - np.diag(np.diagonal(matrix))).mean() == pytest.approx(np.sqrt(2 / np.pi / 400), rel=0.05)
    # Marchenko and Pastur: the eigenvalues of noise with twice as many rows as columns.
    values = np.linalg.eigvalsh(matrix)
    assert values[0] == pytest.approx((1 - np.sqrt(0.5)) ** 2, abs=0.03)
    assert values[-1] == pytest.approx((1 + np.sqrt(0.5)) ** 2, abs=0.15)


def test_a_row_moment_is_the_gram_matrix_of_the_task_vector_scaled_to_a_mean_of_one():
    vector = np.random.default_rng(0).normal(size=(5, 7)) * 1e-4
    moment = row_moment(torch.tensor(vector))
    gram = vector.T @ vector
    assert moment.kind == "input"
    assert moment.matrix.dtype == torch.float32
    assert moment.matrix.numpy() == pytest.approx(gram / np.trace(gram) * 7, abs=1e-6)
    assert row_moment(torch.zeros(5, 7)) == "its task vector is zero"


def test_statistics_task_vector_rank_directions_by_the_rows_of_the_task_vector(make_source, upright):
    source = make_source(unchanged={("b", "block.tall")})
    vectors = PurifiedTaskVectors(source, {}, Purify(rho=0.7, damping=DAMPING, statistics="task_vector"))
    for layer in LAYERS:
        base, weights = source.matrices(layer)
        for task, weight in weights.items():
            found = upright(vectors, task, source.named(layer))
            if (task, layer) == ("b", "block.tall"):
                assert np.array_equal(found, weight)
                continue
            gram = (weight - base).T @ (weight - base)
            damped = gram / np.trace(gram) * len(gram) + DAMPING * np.eye(len(gram))
            directions, _, _ = np.linalg.svd(weight @ damped)
            rank = vectors.ranks[task, layer].rank
            assert found == pytest.approx(projected(directions, rank, weight), abs=3e-6)
    assert vectors.untouched == {("b", "block.tall"): "its task vector is zero"}
    assert any(kept.rank < kept.full for kept in vectors.ranks.values())


@pytest.fixture(scope="module")
def picture_source(make_source):
    return make_source(convolutions=True)


def test_a_convolution_with_captured_moments_is_purified_as_a_matrix(picture_source, capture, seen_through, upright):
    statistics = capture(picture_source, convolutions=True)
    assert statistics["a"].shape("patches") == (12, 12)
    vectors = PurifiedTaskVectors(picture_source, statistics, Purify(rho=0.7, damping=DAMPING))
    assert [parameter.layer for parameter in vectors.layers] == [*LAYERS, "patches"]
    patches = picture_source.named("patches")
    for task, weight in picture_source.matrices("patches")[1].items():
        found = upright(vectors, task, patches)
        kept = vectors.ranks[task, "patches"]
        assert kept.full == 6
        directions, _ = seen_through(weight, statistics[task], "patches")
        assert found == pytest.approx(projected(directions, kept.rank, weight), abs=3e-6)
    assert sum(vectors.ranks[task, "patches"].rank for task in "abc") == round(0.7 * 18)
    mixing = picture_source.named("mixing")
    assert torch.equal(vectors.expert("a", mixing), picture_source.expert("a", mixing))


@pytest.mark.parametrize("options", [{}, {"metric": "identity"}, {"statistics": "random"}])
def test_a_convolution_without_captured_moments_is_left_as_it_is_and_not_listed(picture_source, capture, options):
    vectors = PurifiedTaskVectors(picture_source, capture(picture_source), Purify(rho=0.7, **options))
    assert [parameter.layer for parameter in vectors.layers] == list(LAYERS)
    for layer in ("patches", "mixing"):
        parameter = picture_source.named(layer)
        for task in picture_source.tasks:
            assert torch.equal(vectors.expert(task, parameter), picture_source.expert(task, parameter))
    assert vectors.untouched == {}


def test_a_convolution_that_one_task_has_no_moment_of_is_listed_for_that_task(picture_source, capture):
    statistics = capture(picture_source, convolutions=True, replace={("b", "patches"): None})
    vectors = PurifiedTaskVectors(picture_source, statistics, Purify(rho=0.7))
    patches = picture_source.named("patches")
    assert torch.equal(vectors.expert("b", patches), picture_source.expert("b", patches))
    assert vectors.untouched == {("b", "patches"): "no example reached it"}
    assert {task for task, layer in vectors.ranks if layer == "patches"} == {"a", "c"}
