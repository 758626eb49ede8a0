import numpy as np
import pytest

from pave_lightning.errors import PaveError
from pave_lightning.merging import Evidence, MatrixMethod, Need, StaticMethod, TaskArithmetic, make_method, merge
from pave_lightning.merging.anchored import AnchoredRegression, AnchoredRegressionOptions
from pave_lightning.merging.base import _registry, register

TASKS = ("a", "b", "c")


def drawn(seed=0, rows=40):
    random = np.random.default_rng(seed)
    vectors = {
        task: {"w": random.standard_normal((4, 6)), "v": random.standard_normal(5), "u": random.standard_normal((2, 3))}
        for task in TASKS
    }
    return vectors, {task: {"w": random.standard_normal((rows, 6)) * [1, 2, 3, 1, 1, 0.2]} for task in TASKS}


def posterior(vectors, moments, anchor, strength):
    """The mean of the posterior: W_t C_t summed, plus the anchor, over C_t summed plus the identity."""
    total = sum(moments.values())
    ridge = strength * np.trace(total) / len(total)
    images = sum(vectors[task]["w"] @ moments[task] for task in moments)
    return (images + ridge * anchor) @ np.linalg.inv(total + ridge * np.eye(len(total)))


def run(source, evidence=None, **options):
    merged = merge(AnchoredRegression(AnchoredRegressionOptions(**options)), source, evidence).vectors
    return {name: vector.numpy() for name, vector in merged.items()}


@pytest.fixture
def registered():
    """Register rules for one test."""
    before = dict(_registry)
    yield
    _registry.clear()
    _registry.update(before)


@pytest.mark.parametrize("ridge", [0.01, 1.0, 30.0])
def test_as_the_mean_of_the_posterior(make_source, make_evidence, ridge):
    vectors, inputs = drawn()
    source = make_source(vectors, base={"w": np.ones((4, 6)), "v": np.ones(5), "u": np.ones((2, 3))}, matrices=["w"])
    moments = {task: named["w"].T @ named["w"] / 40 for task, named in inputs.items()}
    anchor = 0.3 * sum(named["w"] for named in vectors.values())
    found = run(source, make_evidence(inputs), ridge=ridge)
    assert np.allclose(found["w"], posterior(vectors, moments, anchor, ridge), atol=1e-5)


def test_ends_of_the_scale(make_source, make_evidence):
    vectors, inputs = drawn()
    source, evidence = make_source(vectors, matrices=["w"]), make_evidence(inputs)
    anchor = 0.3 * sum(named["w"] for named in vectors.values())
    assert np.allclose(run(source, evidence, ridge=1e6)["w"], anchor, atol=1e-4)
    moments = {task: named["w"].T @ named["w"] / 40 for task, named in inputs.items()}
    assert np.allclose(run(source, evidence, ridge=1e-9)["w"], posterior(vectors, moments, anchor, 0.0), atol=1e-4)


def test_all_else_is_the_anchor(make_source, make_evidence):
    vectors, inputs = drawn()
    source = make_source(vectors, matrices=["u", "w"], elements=2)
    found = run(source, make_evidence(inputs), anchor="ties", anchor_options={"density": 0.5}, anchor_scale=0.7)
    anchor = merge(make_method("ties", {"density": 0.5}), source).vectors
    # u is a matrix that no example reached.
    for name in ("u", "v"):
        assert np.allclose(found[name], 0.7 * anchor[name].numpy(), atol=1e-6)
    assert not np.allclose(found["w"], 0.7 * anchor["w"].numpy(), atol=0.1)


def test_the_anchor_has_its_own_scale_unless_one_is_given(make_source, make_evidence):
    vectors, inputs = drawn()
    source, evidence = make_source(vectors, matrices=["w"]), make_evidence(inputs)
    total = sum(named["v"] for named in vectors.values())
    assert np.allclose(run(source, evidence)["v"], TaskArithmetic.default_scale * total, atol=1e-6)
    assert np.allclose(run(source, evidence, anchor_scale=0.5)["v"], 0.5 * total, atol=1e-6)
    assert np.allclose(run(source, evidence, anchor="average")["v"], total / 3, atol=1e-6)


def test_moments_from_the_task_vectors_need_no_statistics(make_source):
    vectors, _ = drawn()
    vectors["b"] = {name: 0 * value for name, value in vectors["b"].items()}
    moments = {
        task: vectors[task]["w"].T @ vectors[task]["w"] / np.linalg.norm(vectors[task]["w"]) ** 2 for task in ("a", "c")
    }
    anchor = 0.3 * (vectors["a"]["w"] + vectors["c"]["w"])
    found = run(make_source(vectors, matrices=["w"]), Evidence(), moments="task_vectors", ridge=0.2)
    assert np.allclose(found["w"], posterior(vectors, moments, anchor, 0.2), atol=1e-5)


def test_statistics_are_needed_for_moments_of_inputs(make_source):
    with pytest.raises(PaveError, match=r"merge method 'bmm' .*\n.*task 'a' has no captured statistics"):
        run(make_source(drawn()[0], matrices=["w"]), Evidence())


@pytest.mark.usefixtures("registered")
def test_anchors_that_will_not_do(make_source, make_evidence):
    @register("wants_moments")
    class WantsMoments(MatrixMethod):
        summary = source = "a test"
        needs = frozenset({Need.INPUT_MOMENTS})

        def merge_matrix(self, parameter, base, vectors):
            return base

    @register("rescaling")
    class Rescaling(WantsMoments):
        needs = frozenset()
        rescales = True

    @register("choosy")
    class Choosy(StaticMethod):
        summary = source = "a test"

        def problems(self, vectors, evidence):
            yield "three tasks are too many"

        def merge(self, parameter, base, vectors):
            return base

    for options, message in (
        ({"anchor": "emr"}, "bmm: its anchor 'emr' keeps something for each task; choose a static rule"),
        ({"anchor": "wants_moments"}, "bmm: its anchor 'wants_moments' needs input moments; choose a static rule"),
        ({"anchor": "rescaling"}, "bmm: its anchor 'rescaling' knows its magnitudes only when everything is merged"),
        ({"anchor": "tise"}, "unknown merge method 'tise': did you mean 'ties'"),
        ({"anchor": "ties", "anchor_options": {"density": 7}}, "the options of merge method 'ties'"),
        ({"anchor": "average", "anchor_scale": 0.5}, "bmm: its anchor 'average' has no scale; leave anchor_scale out"),
    ):
        with pytest.raises(PaveError, match=message):
            make_method("bmm", options)
    vectors, inputs = drawn()
    with pytest.raises(PaveError, match="its anchor, choosy: three tasks are too many"):
        run(make_source(vectors, matrices=["w"]), make_evidence(inputs), anchor="choosy")


def test_defaults():
    options = AnchoredRegressionOptions()
    assert (options.anchor, options.ridge, options.moments) == ("task_arithmetic", 1.0, "inputs")
    assert AnchoredRegression.default_scale == 1.0
