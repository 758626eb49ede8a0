"""Purified weights of whole tiny models against the published formula, with inverses, in float64."""

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Model

from pave_lightning.errors import PaveError
from pave_lightning.merging import merge
from pave_lightning.merging.methods.average import Average
from pave_lightning.merging.methods.emr import Emr
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.merging.methods.ties import Ties
from pave_lightning.purification import PurifiedTaskVectors, StoredPurification, write_purified
from pave_lightning.purification.options import Purify
from pave_lightning.statistics import LayerMoment, TaskStatistics
from pave_lightning.weights import Checkpoint, ParameterKind, task_vectors

DAMPING = 0.1
LAYER = "encoder.layer.1.output.dense"


def second_moment(width, seed):
    """C of random rows whose directions differ in strength; the seed decides by how much."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(width, width)) * np.exp(-np.arange(width) * (seed % 3 + 1) / width)
    rows = random.normal(size=(150, width)) @ mixing.T
    return rows.T @ rows / len(rows)


def upright(weight, parameter):
    return weight if parameter.input_axis == 1 else weight.T


def linear(source):
    return [parameter for parameter in source.parameters if parameter.kind is ParameterKind.LINEAR]


def statistics_of(source, *, leave_out=(), replace=None):
    """Each task's covariances, float32 as they are captured; the task's layers in ``leave_out`` saw nothing."""
    result = {}
    for number, task in enumerate(source.tasks):
        moments = {}
        for index, parameter in enumerate(linear(source)):
            if (task, parameter.layer) in leave_out:
                continue
            width = parameter.shape[parameter.input_axis]
            matrix = torch.tensor(second_moment(width, 10 * index + number), dtype=torch.float32)
            moments[parameter.layer] = LayerMoment("input", matrix, 150)
        for (owner, layer), moment in (replace or {}).items():
            if owner == task:
                moments[layer] = moment
        result[task] = TaskStatistics(moments, examples=5)
    return result


def covariance(statistics, task, layer):
    return statistics[task][layer].matrix.double().numpy()


def stopping_ranks(spectra, rho):
    """The greedy search of the paper as a loop: always remove the weakest last component, none past its floor."""
    full = len(next(iter(spectra.values())))
    floor = full - round(1.5 * (full - round(rho * full)))
    ranks = dict.fromkeys(spectra, full)
    while sum(ranks.values()) > round(rho * full * len(spectra)):
        open_tasks = [task for task in spectra if ranks[task] > floor]
        weakest = min(open_tasks, key=lambda task: spectra[task][ranks[task] - 1] / spectra[task][0])
        ranks[weakest] -= 1
    return ranks


def published(weights, damped, rho, ranks_of=stopping_ranks):
    """``SVD_r(W C~) C~^-1`` of one layer for every task, and the ranks."""
    parts = {task: np.linalg.svd(weights[task] @ damped[task], full_matrices=False) for task in weights}
    ranks = ranks_of({task: values for task, (_, values, _) in parts.items()}, rho)
    purified = {
        task: (u[:, : ranks[task]] * s[: ranks[task]]) @ v[: ranks[task]] @ np.linalg.inv(damped[task])
        for task, (u, s, v) in parts.items()
    }
    return purified, ranks


def check_layers(source, statistics, vectors, rho, ranks_of=stopping_ranks, fused=()):
    """Every linear weight of every task against the formula; returns how many ranks differ from the even share.

    Layers named in ``fused`` hold query, key and value one after the other, each of which is purified by itself.
    """
    uneven = 0
    for parameter in linear(source):
        height = max(parameter.shape) if parameter.layer in fused else 0
        thirds = {
            name: slice(i * height // 3, (i + 1) * height // 3) for i, name in enumerate(("query", "key", "value"))
        }
        parts = {f".{name}": rows for name, rows in thirds.items()} if height else {"": slice(None)}
        whole = {t: upright(source.expert(t, parameter).double().numpy(), parameter) for t in source.tasks}
        for part, rows in parts.items():
            weights = {task: weight[rows] for task, weight in whole.items()}
            damped = {
                t: covariance(statistics, t, parameter.layer) + DAMPING * np.eye(w.shape[1]) for t, w in weights.items()
            }
            expected, ranks = published(weights, damped, rho, ranks_of)
            for task in source.tasks:
                found = upright(vectors.expert(task, parameter).double().numpy(), parameter)[rows]
                assert found == pytest.approx(expected[task], abs=2e-6)
                assert np.abs(found - weights[task]).max() > 1e-3
                kept = vectors.ranks[task, parameter.layer + part]
                assert (kept.rank, kept.full) == (ranks[task], min(weights[task].shape))
                uneven += kept.rank != round(rho * kept.full)
    return uneven


@pytest.fixture(scope="module")
def source(base_folder, expert_folders):
    return task_vectors(str(base_folder), {task: str(folder) for task, folder in expert_folders.items()})


@pytest.fixture(scope="module")
def statistics(source):
    return statistics_of(source)


@pytest.fixture(scope="module")
def purified(source, statistics):
    return PurifiedTaskVectors(source, statistics, Purify(rho=0.8, damping=DAMPING))


def test_a_whole_model_against_the_published_formula(source, statistics, purified):
    assert check_layers(source, statistics, purified, 0.8) > 10
    assert len(purified.ranks) == 3 * 13
    assert purified.untouched == {}


def test_even_allocation(source, statistics):
    def even(spectra, rho):
        return {task: round(rho * len(values)) for task, values in spectra.items()}

    vectors = PurifiedTaskVectors(source, statistics, Purify(rho=0.8, damping=DAMPING, allocation="even"))
    assert check_layers(source, statistics, vectors, 0.8, even) == 0


@pytest.mark.parametrize("metric", ["root", "identity"])
def test_other_metrics(source, statistics, metric):
    vectors = PurifiedTaskVectors(
        source, {} if metric == "identity" else statistics, Purify(rho=0.8, damping=DAMPING, metric=metric)
    )
    for parameter in linear(source):
        weights = {task: source.expert(task, parameter).double().numpy() for task in source.tasks}
        seen_through = {}
        for task, weight in weights.items():
            values, columns = np.linalg.eigh(covariance(statistics, task, parameter.layer))
            root = (columns * np.sqrt(values.clip(0) + DAMPING)) @ columns.T
            seen_through[task] = root if metric == "root" else np.eye(weight.shape[1])
        expected, _ = published(weights, seen_through, 0.8)
        for task in source.tasks:
            assert vectors.expert(task, parameter).numpy() == pytest.approx(expected[task], abs=2e-6)


def test_cross_moments_give_the_same(source, statistics, purified):
    narrowing = [parameter for parameter in linear(source) if parameter.shape[1] > parameter.shape[0]]
    assert len(narrowing) == 2
    replace = {
        (task, p.layer): LayerMoment("cross", (source.expert(task, p).double() @ m.double()).float(), 150)
        for p in narrowing
        for task in source.tasks
        for m in [statistics[task][p.layer].matrix]
    }
    crossed = PurifiedTaskVectors(source, statistics_of(source, replace=replace), purified.options)
    for parameter in narrowing:
        for task in source.tasks:
            assert torch.allclose(crossed.expert(task, parameter), purified.expert(task, parameter), atol=1e-6)


def test_what_is_no_linear_weight_is_left_alone(source, purified):
    others = [parameter for parameter in source.parameters if parameter.kind is not ParameterKind.LINEAR]
    kinds = {parameter.kind for parameter in others}
    assert {ParameterKind.BIAS, ParameterKind.EMBEDDING, ParameterKind.NORM_SCALE} <= kinds
    for parameter in others:
        for task in source.tasks:
            assert torch.equal(purified.expert(task, parameter), source.expert(task, parameter))
    for parameter in source.parameters:
        assert torch.equal(purified.base(parameter), source.base(parameter))
        assert torch.equal(purified.base(parameter, slice(1, 3)), source.base(parameter)[1:3])


@pytest.mark.parametrize("allocation", ["spectral", "even"])
def test_keeping_everything_gives_the_expert_bit_for_bit(source, statistics, allocation):
    vectors = PurifiedTaskVectors(source, statistics, Purify(rho=1.0, allocation=allocation))
    for parameter in source.parameters:
        for task in source.tasks:
            assert torch.equal(vectors.expert(task, parameter), source.expert(task, parameter))
    assert all(kept.rank == kept.full for kept in vectors.ranks.values())


def test_only_the_tasks_asked_for_are_purified_and_share_the_ranks(source, statistics):
    chosen = {task: statistics[task] for task in ("first", "third")}
    vectors = PurifiedTaskVectors(source, chosen, Purify(rho=0.8, damping=DAMPING, tasks=["third", "first"]))
    assert vectors.tasks == source.tasks
    assert vectors.purified_tasks == ("first", "third")
    parameter = next(p for p in source.parameters if p.layer == LAYER and p.kind is ParameterKind.LINEAR)
    assert torch.equal(vectors.expert("second", parameter), source.expert("second", parameter))
    weights = {task: source.expert(task, parameter).double().numpy() for task in chosen}
    damped = {task: covariance(chosen, task, LAYER) + DAMPING * np.eye(64) for task in chosen}
    expected, ranks = published(weights, damped, 0.8)
    for task in chosen:
        assert vectors.expert(task, parameter).numpy() == pytest.approx(expected[task], abs=2e-6)
    assert {task: kept.rank for (task, _), kept in vectors.ranks.items()} == ranks


def test_rows_and_vectors_are_those_of_the_purified_weight(source, purified):
    parameter = next(p for p in linear(source) if p.layer == LAYER)
    whole = purified.expert("second", parameter)
    assert torch.equal(purified.expert("second", parameter, slice(3, 9)), whole[3:9])
    assert torch.equal(purified.vector("second", parameter), whole - source.base(parameter))
    assert torch.equal(purified.vector("second", parameter, slice(3, 9)), (whole - source.base(parameter))[3:9])


def test_layers_may_be_asked_for_in_any_order(source, statistics, purified):
    other = PurifiedTaskVectors(source, statistics, purified.options)
    for task in reversed(source.tasks):
        for parameter in reversed(linear(source)[:3]):
            assert torch.equal(other.expert(task, parameter), purified.expert(task, parameter))


def test_layers_without_a_subspace_are_left_as_they_are_and_listed(source, tmp_path, caplog):
    zero = LayerMoment("input", torch.zeros(64, 64), 150)
    query = "encoder.layer.0.attention.self.query"
    partial = statistics_of(source, leave_out={("first", query)}, replace={("second", LAYER): zero})
    vectors = PurifiedTaskVectors(source, partial, Purify(rho=0.8, damping=DAMPING))
    with caplog.at_level(logging.WARNING, logger="pave_lightning"):
        logging.getLogger("pave_lightning").addHandler(caplog.handler)
        write_purified(vectors, tmp_path)
        logging.getLogger("pave_lightning").removeHandler(caplog.handler)
    assert vectors.untouched == {
        ("first", query): "no example reached it",
        ("second", LAYER): "all its inputs were zero",
    }
    assert f"task 'second': {LAYER} is left as it is: all its inputs were zero" in caplog.text
    for task, layer in vectors.untouched:
        parameter = next(p for p in linear(source) if p.layer == layer)
        assert torch.equal(vectors.expert(task, parameter), source.expert(task, parameter))
        assert (task, layer) not in vectors.ranks
        # The other two tasks share the layer's ranks among themselves.
        rest = [other for other in source.tasks if other != task]
        weights = {other: source.expert(other, parameter).double().numpy() for other in rest}
        damped = {o: covariance(partial, o, layer) + DAMPING * np.eye(parameter.shape[1]) for o in rest}
        expected, _ = published(weights, damped, 0.8)
        for other in rest:
            assert vectors.expert(other, parameter).numpy() == pytest.approx(expected[other], abs=2e-6)


def test_an_expert_weight_of_zeros_is_left_as_it_is(base_folder, expert_folders, tmp_path):
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(expert_folders["first"], tmp_path / "zeros")
    tensors = load_file(tmp_path / "zeros" / "model.safetensors")
    tensors[f"bert.{LAYER}.weight"].zero_()
    save_file(tensors, tmp_path / "zeros" / "model.safetensors")
    source = task_vectors(str(base_folder), {"a": str(tmp_path / "zeros"), "b": str(expert_folders["second"])})
    vectors = PurifiedTaskVectors(source, statistics_of(source), Purify(rho=0.8))
    parameter = next(p for p in linear(source) if p.layer == LAYER)
    assert not vectors.expert("a", parameter).any()
    assert vectors.expert("b", parameter).any()
    assert list(vectors.untouched) == [("a", LAYER)]
    assert ("b", LAYER) in vectors.ranks


def test_everything_that_does_not_fit_is_told_at_once(source, statistics):
    narrow = LayerMoment("input", torch.eye(16), 9)
    crossed = LayerMoment("cross", torch.ones(64, 32), 9)
    foreign = LayerMoment("input", torch.eye(32), 9)
    moments = {**statistics["second"], LAYER: narrow, "pooler.dense": crossed, "encoder.layer.7.output.dense": foreign}
    broken = {"second": TaskStatistics(moments, examples=1), "third": TaskStatistics({"x": foreign}, examples=1)}
    with pytest.raises(PaveError) as caught:
        PurifiedTaskVectors(source, broken, Purify(tasks=["first", "second", "third", "fourth"]))
    assert str(caught.value).splitlines() == [
        "the task vectors cannot be purified like this:",
        "  - task 'fourth' is to be purified, but there are only first, second, third",
        "  - task 'first' has no captured statistics; capture them first",
        "  - task 'second': the statistics hold 1 layer (encoder.layer.7.output.dense), which the model has not: "
        "capture the statistics of this very expert again",
        f"  - task 'second': the moment of {LAYER} is [16, 16], expected [64, 64]",
        "  - task 'second': the moment of pooler.dense is [64, 32], expected [32, 32]",
        "  - task 'third': the statistics hold none of the model's linear layers: expected names such as "
        f"{linear(source)[0].layer}, found 1 layer (x): capture the statistics of this very expert again",
    ]


def test_a_layer_that_belongs_to_the_heads_may_have_been_captured(make_base, make_expert):
    base = make_base(pooler=False)
    source = task_vectors(str(base), {t: str(make_expert(base, seed=seed)) for seed, t in enumerate("ab")})
    pooler = LayerMoment("input", torch.eye(32), 9)
    partial = statistics_of(source, replace={(task, "pooler.dense"): pooler for task in "ab"})
    vectors = PurifiedTaskVectors(source, partial, Purify(rho=0.8))
    merge(Average(), vectors)
    assert len(vectors.ranks) == 2 * 12


def test_transposed_weights(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8, eos_token_id=0, bos_token_id=0)
    GPT2Model(config).save_pretrained(tmp_path / "base")
    for task in "ab":
        GPT2ForSequenceClassification(config).save_pretrained(tmp_path / task)
    source = task_vectors(str(tmp_path / "base"), {task: str(tmp_path / task) for task in "ab"})
    statistics = statistics_of(source)
    assert {p.layer: statistics["a"].shape(p.layer) for p in linear(source)} == {
        "h.0.attn.c_attn": (16, 16),
        "h.0.attn.c_proj": (16, 16),
        "h.0.mlp.c_fc": (16, 16),
        "h.0.mlp.c_proj": (64, 64),
    }
    vectors = PurifiedTaskVectors(source, statistics, Purify(rho=0.75, damping=DAMPING))
    check_layers(source, statistics, vectors, 0.75, fused=["h.0.attn.c_attn"])
    write_purified(vectors, tmp_path / "purified")
    stored = Checkpoint(tmp_path / "purified" / "a", "transformer")
    for parameter in linear(source):
        assert tuple(vectors.expert("a", parameter).shape) == parameter.shape
        assert torch.equal(stored.tensor(parameter.name), vectors.expert("a", parameter))


@pytest.fixture(scope="module")
def stored(source, purified, tmp_path_factory):
    folder = tmp_path_factory.mktemp("purified")
    write_purified(purified, folder)
    return StoredPurification(source, {task: Checkpoint(folder / task, "bert") for task in source.tasks})


def test_stored_weights_are_the_purified_ones(source, purified, stored):
    assert stored.tasks == purified.tasks
    assert stored.parameters == purified.parameters
    for parameter in source.parameters:
        assert torch.equal(stored.base(parameter), source.base(parameter))
        for task in source.tasks:
            assert torch.equal(stored.expert(task, parameter), purified.expert(task, parameter))
            assert torch.equal(stored.vector(task, parameter, slice(0, 2)), purified.vector(task, parameter)[:2])


@pytest.mark.parametrize("method", [Average, TaskArithmetic, Ties, Emr])
def test_methods_run_unchanged_on_purified_vectors(source, purified, stored, method):
    found, again = merge(method(), purified), merge(method(), stored)
    plain = merge(method(), source)
    name = f"{LAYER}.weight"
    assert found.vectors.keys() == plain.vectors.keys()
    assert all(torch.equal(value, again.vectors[key]) for key, value in found.vectors.items())
    assert not torch.equal(found.vectors[name], plain.vectors[name])


def test_the_purified_sum_is_the_sum_of_purified_vectors(source, purified):
    merged = merge(TaskArithmetic(), purified).vectors
    for parameter in source.parameters:
        total = sum(purified.expert(t, parameter).double() - source.base(parameter).double() for t in source.tasks)
        assert torch.allclose(merged[parameter.name].double(), total, atol=1e-6)
