import numpy as np
import pytest
from pydantic import ValidationError

from pave_lightning.merging import merge
from pave_lightning.merging.methods.regmean import RegMean, RegMeanOptions

TASKS = ("a", "b", "c")


def drawn(seed=0, rows=40):
    random = np.random.default_rng(seed)
    vectors = {task: {"w": random.standard_normal((4, 6))} for task in TASKS}
    inputs = {task: {"w": random.standard_normal((rows, 6)) @ random.standard_normal((6, 6))} for task in TASKS}
    return random.standard_normal((4, 6)), vectors, inputs


def of_full_weights(base, vectors, inputs, share):
    """The published formula: full weights, inverse of the summed shrunk moments (arXiv 2212.09849)."""
    left, right = np.zeros((6, 6)), np.zeros((6, 4))
    for task, named in vectors.items():
        x = inputs[task]["w"]
        gram = x.T @ x / len(x)
        shrunk = np.where(np.eye(6) > 0, gram, share * gram)
        left += shrunk
        right += shrunk @ (base + named["w"]).T
    return (np.linalg.inv(left) @ right).T - base


def run(source, evidence, **options):
    return merge(RegMean(RegMeanOptions(**options)), source, evidence).vectors["w"].numpy()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_as_the_formula_for_full_weights(make_source, make_evidence, share, seed):
    base, vectors, inputs = drawn(seed)
    source = make_source(vectors, base={"w": base}, matrices=["w"])
    found = run(source, make_evidence(inputs), nondiagonal=share)
    assert np.allclose(found, of_full_weights(base, vectors, inputs, share), atol=1e-4)


def test_without_the_rest_of_the_moments_each_input_is_a_weighted_mean(make_source, make_evidence):
    vectors = {"a": {"w": [[2.0, 4.0]]}, "b": {"w": [[6.0, 8.0]]}}
    inputs = {"a": {"w": [[1.0, 1.0]]}, "b": {"w": [[1.0, 3.0]]}}
    found = run(make_source(vectors, matrices=["w"]), make_evidence(inputs), nondiagonal=0)
    assert found == pytest.approx(np.array([[4.0, (4 + 9 * 8) / 10]]))


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_inputs_that_nobody_uses_get_the_mean_and_not_zero(make_source, make_evidence, ridge):
    base, vectors, inputs = drawn(rows=30)
    for named in inputs.values():
        named["w"][:, 2] = 0
    source = make_source(vectors, base={"w": base}, matrices=["w"])
    found = run(source, make_evidence(inputs), ridge=ridge)
    mean = sum(named["w"] for named in vectors.values()) / 3
    assert np.allclose(found[:, 2], mean[:, 2], atol=1e-5)
    used = [0, 1, 3, 4, 5]
    assert not np.allclose(found[:, used], mean[:, used], atol=0.1)


def test_a_ridge_is_the_same_multiple_of_the_identity_on_every_moment(make_source, make_evidence):
    base, vectors, inputs = drawn(2)
    source = make_source(vectors, base={"w": base}, matrices=["w"])
    grams = {task: named["w"].T @ named["w"] / 40 for task, named in inputs.items()}
    step = 0.3 * np.trace(sum(grams.values())) / 6
    added = {task: gram + step / 3 * np.eye(6) for task, gram in grams.items()}
    right = sum(added[task] @ (base + vectors[task]["w"]).T for task in TASKS)
    expected = (np.linalg.inv(sum(added.values())) @ right).T - base
    found = run(source, make_evidence(inputs), nondiagonal=1, ridge=0.3)
    assert np.allclose(found, expected, atol=1e-5)


def test_equal_experts_are_kept_whole_however_few_their_inputs(make_source, make_evidence):
    base, vectors, inputs = drawn(rows=1)
    same = dict.fromkeys(TASKS, vectors["a"])
    found = run(make_source(same, base={"w": base}, matrices=["w"]), make_evidence(inputs), nondiagonal=1)
    assert np.allclose(found, vectors["a"]["w"], atol=1e-6)


def test_tasks_that_did_not_reach_a_layer_have_no_say(make_source, make_evidence):
    base, vectors, inputs = drawn()
    source = make_source(vectors, base={"w": base}, matrices=["w"])
    two = {task: vectors[task] for task in ("a", "c")}
    found = run(source, make_evidence(inputs | {"b": {}}))
    assert np.allclose(found, of_full_weights(base, two, inputs, 0.9), atol=1e-4)
    nobody = run(source, make_evidence({task: {} for task in TASKS}))
    assert np.allclose(nobody, sum(named["w"] for named in vectors.values()) / 3, atol=1e-6)


def test_defaults_are_those_of_the_source():
    assert RegMeanOptions().nondiagonal == 0.9
    assert RegMeanOptions().ridge == 0
    assert RegMean.default_scale is None
    with pytest.raises(ValidationError):
        RegMeanOptions(nondiagonal=1.1)
