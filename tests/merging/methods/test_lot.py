import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.merging import Evidence, merge
from pave_lightning.merging.methods.lot import Lot, LotOptions
from pave_lightning.statistics import LayerMoment, NormMoment, TaskStatistics
from pave_lightning.weights import ParameterKind

TASKS = ("a", "b", "c")
KINDS = {"scale": ParameterKind.NORM_SCALE, "shift": ParameterKind.NORM_SHIFT, "bias": ParameterKind.BIAS}


def drawn(seed=0, rows=40, d_out=4, d_in=6):
    random = np.random.default_rng(seed)
    vectors = {task: {"w": random.standard_normal((d_out, d_in))} for task in TASKS}
    return vectors, {task: {"w": random.standard_normal((rows, d_in)) * [1, 2, 3, 1, 1, 0.5]} for task in TASKS}


def least_squares(vectors, inputs):
    """The update whose outputs are nearest to the experts', of least norm, from the outputs themselves."""
    left = np.concatenate([x["w"] / np.sqrt(len(x["w"])) for x in inputs.values()])
    right = np.concatenate(
        [inputs[task]["w"] @ vectors[task]["w"].T / np.sqrt(len(inputs[task]["w"])) for task in inputs]
    )
    return (np.linalg.pinv(left, rcond=1e-6) @ right).T


def run(source, evidence, **options):
    merged = merge(Lot(LotOptions(**options)), source, evidence).vectors
    return {name: vector.numpy() for name, vector in merged.items()}


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_linear_layers_as_least_squares_on_the_outputs(make_source, make_evidence, rows, seed):
    vectors, inputs = drawn(seed, rows)
    found = run(make_source(vectors, matrices=["w"]), make_evidence(inputs))["w"]
    assert np.allclose(found, least_squares(vectors, inputs), atol=2e-3 if rows == 1 else 1e-5)


def test_orthogonal_features_lose_nothing(make_source, make_evidence):
    random = np.random.default_rng(5)
    vectors, inputs = drawn()
    basis = np.linalg.qr(random.standard_normal((6, 6)))[0]
    parts = {task: basis[2 * index : 2 * index + 2] for index, task in enumerate(TASKS)}
    inputs = {task: {"w": random.standard_normal((9, 2)) @ part} for task, part in parts.items()}
    found = run(make_source(vectors, matrices=["w"]), make_evidence(inputs))["w"]
    for task in TASKS:
        assert np.allclose(found @ inputs[task]["w"].T, vectors[task]["w"] @ inputs[task]["w"].T, atol=1e-4)


def test_tasks_weigh_the_same_whatever_their_rows(make_source, make_evidence):
    vectors, inputs = drawn()
    longer = inputs | {"a": {"w": np.concatenate([inputs["a"]["w"]] * 5)}}
    source = make_source(vectors, matrices=["w"])
    assert np.allclose(run(source, make_evidence(inputs))["w"], run(source, make_evidence(longer))["w"], atol=1e-5)


def test_a_ridge_pulls_to_the_base(make_source, make_evidence):
    vectors, inputs = drawn()
    source, evidence = make_source(vectors, matrices=["w"]), make_evidence(inputs)
    moments = [x["w"].T @ x["w"] / len(x["w"]) for x in inputs.values()]
    total = sum(moments)
    images = sum(named["w"] @ moment for named, moment in zip(vectors.values(), moments, strict=True))
    expected = images @ np.linalg.inv(total + 0.5 * np.trace(total) / 6 * np.eye(6))
    assert np.allclose(run(source, evidence, ridge=0.5)["w"], expected, atol=1e-5)


def test_weak_inputs_may_be_told_to_count_as_unseen(make_source, make_evidence):
    vectors, _ = drawn()
    inputs = {task: {"w": np.diag([1, 1, 1, 1, 1, 1e-2])} for task in TASKS}
    source, evidence = make_source(vectors, matrices=["w"]), make_evidence(inputs)
    mean = sum(named["w"] for named in vectors.values()) / 3
    assert np.allclose(run(source, evidence)["w"], mean, atol=1e-5)
    cut = run(source, evidence, tolerance=1e-3)["w"]
    assert np.allclose(cut[:, :5], mean[:, :5], atol=1e-5)
    assert not cut[:, 5].any()


def test_tasks_that_did_not_reach_a_layer_have_no_say(make_source, make_evidence):
    vectors, inputs = drawn()
    source = make_source(vectors, matrices=["w"])
    two = {task: inputs[task] for task in ("a", "c")}
    found = run(source, make_evidence(two | {"b": {}}))["w"]
    assert np.allclose(found, least_squares(vectors, two), atol=1e-5)
    nobody = run(source, make_evidence({task: {} for task in TASKS}))["w"]
    assert np.allclose(nobody, sum(named["w"] for named in vectors.values()) / 3, atol=1e-6)


def test_scales_of_norms_are_weighted_channel_by_channel(make_source, make_evidence):
    vectors = {"a": {"scale": [1.0, 5.0, 2.0, 4.0]}, "b": {"scale": [3.0, 1.0, 6.0, 8.0]}}
    norms = {
        "a": {"scale": [[1.0, 2.0, 0.0, 0.0], [1.0, 4.0, 0.0, 0.0]]},
        "b": {"scale": [[3.0, 0.0, 1.0, 0.0]]},
    }
    source = make_source(vectors, kinds=KINDS)
    found = run(source, make_evidence({"a": {}, "b": {}}, norms))["scale"]
    # (1 * 1 + 9 * 3) / 10; only a; only b; nobody, so the mean.
    assert found == pytest.approx([2.8, 5.0, 6.0, 6.0])


def test_a_task_that_did_not_reach_a_norm_has_no_say(make_source, make_evidence):
    vectors = {"a": {"other": [0.0], "scale": [1.0]}, "b": {"other": [0.0], "scale": [3.0]}}
    source = make_source(vectors, kinds=KINDS | {"other": ParameterKind.NORM_SCALE})
    norms = {"a": {"scale": [[2.0]], "other": [[1.0]]}, "b": {"other": [[1.0]]}}
    assert run(source, make_evidence({"a": {}, "b": {}}, norms))["scale"] == pytest.approx([1.0])


def test_what_is_added_is_averaged(make_source, make_evidence):
    vectors = {
        "a": {"bias": [1.0, 2.0], "shift": [5.0], "table": [[2.0]]},
        "b": {"bias": [3.0, 6.0], "shift": [7.0], "table": [[6.0]]},
    }
    found = run(make_source(vectors, kinds=KINDS), make_evidence({"a": {}, "b": {}}))
    assert {name: vector.tolist() for name, vector in found.items()} == {
        "bias": [2.0, 4.0],
        "shift": [6.0],
        "table": [[4.0]],
    }


def test_norms_need_their_moments_unless_they_are_averaged(make_source, make_evidence):
    vectors = {"a": {"scale": [1.0, 5.0]}, "b": {"scale": [3.0, 1.0]}}
    source, evidence = make_source(vectors, kinds=KINDS), make_evidence({"a": {}, "b": {}})
    with pytest.raises(PaveError) as raised:
        run(source, evidence)
    told = str(raised.value)
    for task in ("a", "b"):
        assert f"task '{task}': the moments of what 1 norms scale are needed, such as scale, but none" in told
    assert "set capture.norms: true" in told
    assert told.count("not needed with the option norms: mean") == 1
    assert run(source, evidence, norms="mean")["scale"].tolist() == [2.0, 3.0]
    assert run(source, evidence, norms="mean", others="base")["scale"].tolist() == [2.0, 3.0]


def test_reduced_moments_are_refused(make_source):
    vectors, _ = drawn()
    statistics = TaskStatistics({"w": LayerMoment("cross", torch.ones(4, 6), 1)}, examples=1)
    with pytest.raises(PaveError, match=r"reduced ones were captured; set capture\.moments: input"):
        run(make_source(vectors, matrices=["w"]), Evidence(statistics=dict.fromkeys(TASKS, statistics)))


def test_norm_moments_of_another_width_are_refused(make_source):
    vectors = {"a": {"scale": [1.0, 5.0]}, "b": {"scale": [3.0, 1.0]}}
    wide = TaskStatistics({}, examples=1, norms={"scale": NormMoment(torch.ones(3), 1)})
    with pytest.raises(PaveError, match=r"task 'a': the norm moment of scale is \[3\], expected \[2\]"):
        run(make_source(vectors, kinds=KINDS), Evidence(statistics={"a": wide, "b": wide}))


def test_scales_are_never_cut_into_blocks(make_source, make_evidence):
    vectors = {"a": {"scale": np.arange(6.0)}, "b": {"scale": -np.arange(6.0)}}
    norms = {task: {"scale": np.random.default_rng(len(task)).standard_normal((5, 6))} for task in ("a", "b")}
    norms["b"] = {"scale": 2 * norms["a"]["scale"]}
    source = make_source(vectors, kinds=KINDS, elements=2)
    found = run(source, make_evidence({"a": {}, "b": {}}, norms))["scale"]
    assert found == pytest.approx(np.arange(6.0) * (1 - 4) / 5)


def test_defaults_are_those_of_the_source():
    assert Lot.default_scale == 1.0
    assert LotOptions().ridge == 0
    assert (LotOptions().norms, LotOptions().others) == ("moments", "mean")
