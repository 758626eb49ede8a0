"""The kinds of moments give the same weights, and what cannot be a moment is refused by name."""

import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.purification import PurifiedTaskVectors
from pave_lightning.purification.options import Compute, Purify
from pave_lightning.statistics import LayerMoment, SecondMoment, TaskStatistics

LAYERS = ("block.wide", "block.tall", "end.square", "end.flipped")
AGAIN = "capture the statistics of this very expert again"


def purified(source, captured, **options):
    return PurifiedTaskVectors(source, captured, Purify(rho=0.7, **options))


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("target", ["expert", "delta", "delta_by_expert"])
@pytest.mark.parametrize("metric", ["covariance", "root"])
def test_rows_give_the_weights_that_their_second_moment_gives(source, capture, same_everywhere, metric, target, rows):
    kept, summed = (
        purified(source, capture(source, kind, rows=rows), metric=metric, target=target) for kind in ("rows", "input")
    )
    same_everywhere(kept, summed, abs=1e-5)
    assert kept.ranks == summed.ranks
    assert any(kept.rank < kept.full for kept in kept.ranks.values())


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize(("kind", "metric"), [("output", "root"), ("cross", "root"), ("cross", "covariance")])
def test_moments_of_the_output_give_the_weights_that_those_of_the_input_give(
    source, capture, same_everywhere, kind, metric, rows
):
    told, seen = (purified(source, capture(source, each, rows=rows), metric=metric) for each in (kind, "input"))
    same_everywhere(told, seen, abs=1e-5)
    assert told.ranks == seen.ranks
    assert any(kept.rank < kept.full for kept in told.ranks.values())


def problems(source, captured, **options):
    with pytest.raises(PaveError) as caught:
        purified(source, captured, **options)
    return str(caught.value).splitlines()[1:]


def test_moments_of_the_output_are_refused_for_the_metric_covariance(source, capture):
    assert problems(source, capture(source, "output")) == [
        f"  - task '{task}': {layer} has the second moment of its output, which serves the metric root alone; "
        "capture with moments: smallest"
        for task in "abc"
        for layer in sorted(LAYERS)
    ]


@pytest.mark.parametrize(("kind", "metric"), [("cross", "covariance"), ("output", "root")])
@pytest.mark.parametrize(
    ("options", "asked"),
    [({"statistics": "other_task"}, "statistics: other_task"), ({"target": "delta"}, "target: delta")],
)
def test_moments_that_hold_the_experts_own_weight_serve_no_other_matrix(source, capture, kind, metric, options, asked):
    assert problems(source, capture(source, kind), metric=metric, **options) == [
        f"  - task '{task}': {asked} needs the second moment of the input of {layer}, but what was captured holds the "
        "expert's own weight; capture with moments: input"
        for task in (["b", "c", "a"] if "statistics" in options else "abc")
        for layer in sorted(LAYERS)
    ]


def test_moments_that_hold_the_experts_own_weight_serve_the_target_delta_by_expert(source, capture, same_everywhere):
    crossed, seen = (purified(source, capture(source, k), target="delta_by_expert") for k in ("cross", "input"))
    same_everywhere(crossed, seen, abs=1e-5)
    assert any(kept.rank < kept.full for kept in crossed.ranks.values())


@pytest.mark.parametrize(
    ("kind", "layer", "wrong", "right"),
    [
        ("input", "block.wide", (9, 9), [10, 10]),
        ("rows", "block.wide", (4, 9), [4, 10]),
        ("cross", "block.tall", (7, 13), [13, 7]),
        ("output", "end.flipped", (8, 8), [5, 5]),
    ],
)
def test_a_moment_of_the_wrong_widths_is_refused_by_name(source, capture, kind, layer, wrong, right):
    broken = capture(source, kind, rows=4, replace={("b", layer): np.zeros(wrong)})
    found = problems(source, broken, metric="root")
    assert found == [f"  - task 'b': the moment of {layer} is {list(wrong)}, expected {right}"]


def negative(matrix):
    """The same eigenvectors, but the weakest eigenvalue below zero by a hundredth of the strongest."""
    values, columns = np.linalg.eigh(matrix)
    values[0] = -0.01 * values[-1]
    return (columns * values) @ columns.T


def lopsided(matrix):
    matrix = matrix.copy()
    matrix[0, 1] += 0.1 * np.abs(matrix).max()
    return matrix


def one_value(value):
    def spoilt(matrix):
        matrix = matrix.copy()
        matrix[2, 3] = matrix[3, 2] = value
        return matrix

    return spoilt


def spoil(source, capture, kind, layer, change):
    """Statistics of which only one moment of task b is changed."""
    whole = capture(source, kind)["b"][layer].matrix.double().numpy()
    return capture(source, kind, replace={("b", layer): change(whole)})


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("input", lopsided, "is not symmetric"),
        ("output", lopsided, "is not symmetric"),
        ("input", negative, "is not positive semi-definite"),
        ("output", negative, "is not positive semi-definite"),
        ("input", np.negative, "is not positive semi-definite"),
        ("input", one_value(np.nan), "holds NaN or infinity"),
        ("rows", one_value(np.inf), "holds NaN or infinity"),
        ("cross", one_value(np.nan), "holds NaN or infinity"),
    ],
)
def test_what_cannot_be_a_moment_is_refused_by_name(source, capture, kind, layer, change, words, workers):
    statistics = spoil(source, capture, kind, layer, change)
    vectors = PurifiedTaskVectors(source, statistics, Purify(rho=0.7, metric="root"), Compute(workers=workers))
    other = next(name for name in LAYERS if name != layer)
    assert not torch.equal(*(v.expert("b", source.named(other)) for v in (vectors, source)))
    for _ in range(2):  # the first refusal must not be taken for a result
        with pytest.raises(PaveError) as caught:
            vectors.expert("a", source.named(layer))
        assert str(caught.value) == f"task 'b': the second moment of {layer} {words}: {AGAIN}"


@pytest.mark.parametrize("scope", ["model", "global"])
def test_scopes_over_all_layers_refuse_a_broken_moment_of_any_layer(source, capture, scope):
    vectors = purified(source, spoil(source, capture, "input", "end.flipped", negative), scope=scope)
    with pytest.raises(PaveError, match=r"task 'b': the second moment of end\.flipped is not positive semi-definite"):
        vectors.expert("a", source.named("block.wide"))


def test_a_broken_moment_is_told_of_the_task_that_it_was_captured_for(source, capture):
    vectors = purified(source, spoil(source, capture, "input", "block.wide", negative), statistics="other_task")
    with pytest.raises(PaveError, match=r"task 'b': the second moment of block\.wide is not positive semi-definite"):
        vectors.expert("a", source.named("block.wide"))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_cross_moment_of_another_weight_is_refused_by_name(source, capture, layer):
    seen = capture(source)["b"][layer].matrix.double().numpy()
    foreign = np.random.default_rng(3).normal(size=source.matrices(layer)[1]["b"].shape) @ seen
    vectors = purified(source, capture(source, "cross", replace={("b", layer): foreign}))
    with pytest.raises(PaveError) as caught:
        vectors.expert("a", source.named(layer))
    words = "is not that of this expert's weight (W C W^T is not symmetric)"
    assert str(caught.value) == f"task 'b': the second moment of {layer} {words}: {AGAIN}"


def test_the_cross_moments_of_another_task_are_refused(source, capture):
    crossed = capture(source, "cross")
    vectors = purified(source, {"a": crossed["b"], "b": crossed["b"], "c": crossed["c"]})
    with pytest.raises(PaveError, match=r"task 'a': the second moment of block\.wide is not that of this expert's"):
        vectors.expert("a", source.named("block.wide"))


def test_a_cross_moment_of_a_half_precision_pass_is_taken(source, capture):
    crossed = capture(source, "cross")
    random = np.random.default_rng(0)
    blurred = {
        (task, layer): moment.matrix.double().numpy() * (1 + 0.01 * random.normal(size=moment.matrix.shape))
        for task in source.tasks
        for layer, moment in crossed[task].items()
    }
    vectors = purified(source, capture(source, "cross", replace=blurred))
    for layer in LAYERS:
        vectors.expert("a", source.named(layer))
    assert len(vectors.ranks) == 3 * 4


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_singular_moment_is_taken_although_float32_made_an_eigenvalue_negative(
    make_source, capture, seen_through, upright, scale
):
    source = make_source(("a",), layers={"x": ((12, 20), 1)})
    rows = np.random.default_rng(1).normal(size=(3, 20)) * np.sqrt(scale)
    statistics = capture(source, replace={("a", "x"): rows.T @ rows / 3})
    stored = statistics["a"]["x"].matrix.double().numpy()
    assert np.linalg.eigvalsh(stored)[0] < -1e-9 * scale
    vectors = purified(source, statistics, damping=0.1 * scale)
    weight = source.matrices("x")[1]["a"]
    directions, _ = seen_through(weight, statistics["a"], "x", 0.1 * scale)
    rank = round(0.7 * 12)
    expected = directions[:, :rank] @ directions[:, :rank].T @ weight
    assert upright(vectors, "a", source.named("x")) == pytest.approx(expected, abs=3e-6)


@pytest.mark.parametrize("width", [2, 3, 4, 8, 33])
def test_what_was_captured_over_many_rows_of_few_directions_is_taken(make_source, width):
    source = make_source(("a",), layers={"x": ((width, width), 1)})
    negative_ones = 0
    for seed in range(8):
        random = torch.Generator().manual_seed(seed)
        moment = SecondMoment(width)
        for _ in range(10):
            strength = 1 + torch.randn(1000, 1, generator=random)
            moment.update(strength * torch.linspace(-1, 1.7, width))
        captured = moment.moment()
        negative_ones += bool(torch.linalg.eigvalsh(captured.matrix.double())[0] < 0)
        vectors = purified(source, {"a": TaskStatistics({"x": captured}, examples=1)}, nearest_budget=True)
        vectors.expert("a", source.named("x"))
    assert negative_ones


@pytest.mark.parametrize(
    ("kind", "what"), [("input", "inputs"), ("rows", "inputs"), ("cross", "outputs"), ("output", "outputs")]
)
def test_a_layer_whose_moment_is_zero_is_left_as_it_is_and_listed(source, capture, kind, what):
    shape = {"input": (9, 9), "rows": (40, 9), "cross": (9, 9), "output": (9, 9)}[kind]
    statistics = capture(source, kind, replace={("b", "end.square"): np.zeros(shape)})
    vectors = purified(source, statistics, metric="root")
    square = source.named("end.square")
    assert torch.equal(vectors.expert("b", square), source.expert("b", square))
    assert vectors.untouched == {("b", "end.square"): f"all its {what} were zero"}
    assert {task for task, _ in vectors.ranks} == {"a", "c"}


def test_inputs_that_the_weight_maps_to_nothing_leave_it_as_it_is(make_source, capture):
    source = make_source(("a", "b"), layers={"x": ((4, 4), 1)})
    source.expert = lambda task, p, rows=None: (
        torch.diag(torch.tensor([3.0, 2, 1, 0]))
        if p.name == "x.weight" and task == "a"
        else type(source).expert(source, task, p, rows)
    )
    statistics = capture(source, replace={("a", "x"): np.diag([0.0, 0, 0, 1])})
    vectors = purified(source, statistics, damping=0.0)
    assert torch.equal(vectors.expert("a", source.named("x")), source.expert("a", source.named("x")))
    assert vectors.untouched == {("a", "x"): "its weight has no effect on the data"}


def test_the_moments_of_a_model_of_other_layers_are_refused(source):
    foreign = LayerMoment("input", torch.eye(6), 9)
    other = TaskStatistics({"block.deep": foreign, "head.dense": foreign}, examples=1)
    assert problems(source, dict.fromkeys("abc", other)) == [
        f"  - task '{task}': the statistics hold none of the model's linear layers: expected names such as "
        f"block.wide, found 2 layers (block.deep, head.dense): {AGAIN}"
        for task in "abc"
    ]


def test_an_infinite_diagonal_is_no_moment(source, capture):
    infinite = spoil(source, capture, "input", "block.wide", lambda matrix: matrix + np.diag([np.inf] + 9 * [0.0]))
    with pytest.raises(PaveError, match=r"the second moment of block\.wide holds NaN or infinity"):
        purified(source, infinite).expert("a", source.named("block.wide"))


def test_a_moment_that_is_symmetric_but_for_rounding_is_taken(source, capture):
    def rounded(matrix):
        return matrix * (1 + np.triu(np.full(matrix.shape, 1e-6)))

    statistics = spoil(source, capture, "input", "block.wide", rounded)
    matrix = statistics["b"]["block.wide"].matrix
    assert not torch.equal(matrix, matrix.T)
    purified(source, statistics).expert("b", source.named("block.wide"))


@pytest.fixture
def factorised(monkeypatch):
    """The sides of all matrices that were given to the Cholesky test."""
    sides = []
    real = torch.linalg.cholesky_ex

    def counted(matrix):
        sides.append(len(matrix))
        return real(matrix)

    monkeypatch.setattr("pave_lightning.purification.moments.torch.linalg.cholesky_ex", counted)
    return sides


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_moment_that_layers_share_is_tested_once(make_source, factorised, scope, tmp_path):
    shape = (6, 6), 1
    source = make_source("ab", layers={"query": shape, "key": shape, "value": shape, "other": shape})
    stored = {}
    for number, task in enumerate("ab"):
        rows = torch.tensor(np.random.default_rng(number).normal(size=(40, 6)), dtype=torch.float32)
        shared = LayerMoment("input", rows.T @ rows / 40, 40)
        moments = {**dict.fromkeys(("query", "key", "value"), shared), "other": LayerMoment("input", torch.eye(6), 40)}
        TaskStatistics(moments, examples=1).save(tmp_path / task)
        stored[task] = TaskStatistics.load(tmp_path / task)
    vectors = purified(source, stored, scope=scope)
    for parameter in vectors.layers:
        vectors.expert("a", parameter)
    assert factorised == [6] * 4


def test_a_cross_moment_is_tested_against_the_weight_of_every_layer_that_has_it(make_source):
    source = make_source("ab", layers={"query": ((6, 6), 1), "key": ((6, 6), 1)})
    moments = {}
    for task in "ab":
        weight = source.expert(task, source.named("query"))
        shared = LayerMoment("cross", weight @ torch.diag(torch.linspace(1, 2, 6)), 9)
        moments[task] = TaskStatistics({"query": shared, "key": shared}, examples=1)
    vectors = purified(source, moments)
    vectors.expert("a", source.named("query"))
    with pytest.raises(PaveError, match="the second moment of key is not that of this expert's weight"):
        vectors.expert("a", source.named("key"))


def test_the_file_of_a_broken_moment_is_to_be_deleted(source, capture, tmp_path):
    spoil(source, capture, "input", "block.wide", negative)["b"].save(tmp_path / "moments")
    vectors = purified(source, {**capture(source), "b": TaskStatistics.load(tmp_path / "moments")})
    with pytest.raises(PaveError) as caught:
        vectors.expert("a", source.named("block.wide"))
    assert str(caught.value) == (
        "task 'b': the second moment of block.wide is not positive semi-definite: "
        f"delete {tmp_path / 'moments'}, then {AGAIN} (pave capture RECIPE)"
    )
