import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pave_lightning.errors import PaveError
from pave_lightning.merging import Evidence, merge
from pave_lightning.merging.methods.tatr import Tatr, TatrOptions, TatrZeroShot
from pave_lightning.statistics.gradients import TaskGradients

# Few distinct magnitudes: sums and products are exact, and many conflicts tie.
VALUE = st.integers(-4, 4).map(lambda value: value / 4)


def evidence_of(gradients, kind="absolute"):
    return Evidence(
        gradients={
            task: TaskGradients(
                kind, {name: torch.tensor(value, dtype=torch.float32) for name, value in named.items()}, examples=1
            )
            for task, named in gradients.items()
        }
    )


def run(source, gradients=None, quantile=0.99):
    options = TatrOptions(quantile=quantile)
    if gradients is None:
        return merge(TatrZeroShot(options), source).vectors
    return merge(Tatr(options), source, evidence_of(gradients)).vectors


def long(named):
    return np.concatenate([np.ravel(value) for _, value in sorted(named.items())]).astype(float)


def reference(vectors, gradients, quantile):
    """Every pair of tasks on one long vector each, the threshold by a sort."""
    flat = {task: long(named) for task, named in vectors.items()}
    slopes = {task: abs(long(named)) for task, named in (gradients or vectors).items()}
    conflict = sum(slopes[i] * abs(flat[j]) for i in flat for j in flat if i != j)
    kept = int(len(conflict) * quantile)
    limit = np.sort(conflict)[kept] if kept < len(conflict) else np.inf
    return np.where((conflict < limit) | (conflict == 0), sum(flat.values()), 0.0)


@pytest.fixture
def random_gradients(random_vectors):
    random = np.random.default_rng(5)
    return {
        task: {name: random.integers(0, 41, np.shape(value)) / 64 for name, value in named.items()}
        for task, named in random_vectors.items()
    }


def test_by_hand_with_one_threshold_over_all_parameters(make_source):
    vectors = {"a": {"p": [1.0, 2.0, 0.0], "q": [[3.0, 1.0]]}, "b": {"p": [-4.0, 1.0, 5.0], "q": [[1.0, 0.5]]}}
    gradients = {"a": {"p": [1.0, 1.0, 9.0], "q": [[0.0, 2.0]]}, "b": {"p": [2.0, 0.0, 1.0], "q": [[4.0, 0.0]]}}
    # Conflicts: 1*4 + 2*1 = 6, 1*1 + 0 = 1, 9*5 + 0 = 45, 0 + 4*3 = 12, 2*0.5 + 0 = 1. The two largest go.
    found = run(make_source(vectors), gradients, quantile=0.6)
    assert found["p"].tolist() == [-3.0, 3.0, 0.0]
    assert found["q"].tolist() == [[0.0, 1.5]]


def test_a_task_is_not_at_odds_with_itself(make_source):
    vectors = {"a": {"w": [8.0, 1.0]}, "b": {"w": [0.0, 1.0]}}
    gradients = {"a": {"w": [9.0, 1.0]}, "b": {"w": [0.0, 1.0]}}
    assert run(make_source(vectors), gradients, quantile=0.5)["w"].tolist() == [8.0, 0.0]


def test_without_data_task_vectors_stand_in_for_gradients(make_source):
    vectors = {"a": {"w": [3.0, 1.0, -2.0]}, "b": {"w": [0.5, -4.0, -2.0]}}
    # Twice 1.5, 4 and 4: the last two tie with the threshold and go.
    assert run(make_source(vectors), quantile=0.67)["w"].tolist() == [3.5, 0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), st.booleans(), st.sampled_from([1, 2, 100]))
def test_any_vectors_as_the_plain_reference(make_source, data, quantile, measured, elements):
    tasks = [f"task{index}" for index in range(data.draw(st.integers(2, 5)))]
    shapes = {"a": (3, 2), "b": (4,), "c": (1, 1), "d": ()}

    def drawn():
        return {
            task: {
                name: np.array(data.draw(st.lists(VALUE, min_size=size, max_size=size))).reshape(shape)
                for name, shape in shapes.items()
                for size in [int(np.prod(shape))]
            }
            for task in tasks
        }

    vectors = drawn()
    gradients = None
    if measured:
        gradients = {task: {name: abs(value) for name, value in named.items()} for task, named in drawn().items()}
    found = run(make_source(vectors, elements=elements), gradients, quantile)
    assert long(found).tolist() == reference(vectors, gradients, quantile).tolist()


def test_by_default_one_of_a_hundred_goes(make_source):
    random = np.random.default_rng(0)
    vectors = {task: {"w": random.standard_normal((20, 30))} for task in "abc"}
    gradients = {task: {"w": abs(random.standard_normal((20, 30)))} for task in "abc"}
    for known in (gradients, None):
        found = run(make_source(vectors), known)["w"].numpy()
        assert (found == 0).sum() == 6
        conflict = sum(abs((known or vectors)[i]["w"]) * abs(vectors[j]["w"]) for i in "abc" for j in "abc" if i != j)
        assert set(np.argsort(conflict.ravel())[-6:]) == set(np.flatnonzero(found == 0))


def test_weights_without_conflict_stay_also_where_they_are_most(make_source):
    vectors = {"a": {"w": [1.0, 2.0, 3.0, 4.0]}, "b": {"w": [0.0, 0.0, 0.0, 4.0]}}
    assert run(make_source(vectors), quantile=0.5)["w"].tolist() == [1.0, 2.0, 3.0, 0.0]


def test_a_quantile_of_one_keeps_everything(make_source, random_vectors, random_gradients):
    for known in (random_gradients, None):
        found = run(make_source(random_vectors), known, quantile=1.0)
        expected = sum(long(named) for named in random_vectors.values())
        assert long(found).tolist() == expected.tolist()


def test_what_is_missing_is_told(make_source, random_vectors, random_gradients):
    del random_gradients["two"]
    with pytest.raises(
        PaveError, match="task 'two' has no labelled gradients; `pave merge` takes it as part of a recipe"
    ):
        run(make_source(random_vectors), random_gradients)
    given = evidence_of(random_gradients, kind="fisher")
    with pytest.raises(
        PaveError,
        match=r"task 'one': expected labelled gradients .*gradients/absolute-TASK\), found Fisher information",
    ):
        merge(Tatr(), make_source(random_vectors), given)


def test_defaults_are_those_of_the_source():
    assert TatrOptions().quantile == 0.99
    assert Tatr.default_scale == TatrZeroShot.default_scale == 0.3
    assert not TatrZeroShot.needs


@pytest.mark.parametrize("quantile", [-0.1, 1.1, float("nan")])
def test_impossible_quantiles(quantile):
    with pytest.raises(ValidationError):
        TatrOptions(quantile=quantile)
