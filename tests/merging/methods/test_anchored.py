from dataclasses import replace

import numpy as np
import pytest

from pave_lightning.merging import Evidence, merge
from pave_lightning.merging.methods.anchored import (
    AnchoredRegression,
    AnchoredRegressionOptions,
    DataFreeAnchoredRegression,
)

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


def run(source, evidence=None, kind=AnchoredRegression, **options):
    """With 0.3 times the sum of the task vectors as anchor."""
    vectors = {p.name: 0.3 * sum(source.vector(task, p) for task in source.tasks) for p in source.parameters}
    given = replace(evidence if evidence is not None else Evidence(), anchor=vectors)
    merged = merge(kind(AnchoredRegressionOptions(**options)), source, given).vectors
    return {name: vector.numpy() for name, vector in merged.items()}


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
    found = run(make_source(vectors, matrices=["u", "w"], elements=2), make_evidence(inputs))
    # u is a matrix that no example reached.
    for name in ("u", "v"):
        assert np.allclose(found[name], 0.3 * sum(named[name] for named in vectors.values()), atol=1e-6)
    assert not np.allclose(found["w"], 0.3 * sum(named["w"] for named in vectors.values()), atol=0.1)


def test_moments_from_the_task_vectors_need_no_statistics(make_source):
    vectors, _ = drawn()
    vectors["b"] = {name: 0 * value for name, value in vectors["b"].items()}
    moments = {
        task: vectors[task]["w"].T @ vectors[task]["w"] / np.linalg.norm(vectors[task]["w"]) ** 2 for task in ("a", "c")
    }
    anchor = 0.3 * (vectors["a"]["w"] + vectors["c"]["w"])
    found = run(make_source(vectors, matrices=["w"]), kind=DataFreeAnchoredRegression, ridge=0.2)
    assert np.allclose(found["w"], posterior(vectors, moments, anchor, 0.2), atol=1e-5)


def test_defaults():
    assert AnchoredRegressionOptions().ridge == 1.0
    assert AnchoredRegression.default_scale == 1.0
