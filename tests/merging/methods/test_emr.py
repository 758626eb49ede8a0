import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pave_lightning.merging import merge
from pave_lightning.merging.methods.emr import Emr, EmrOptions

VECTORS = {
    "a": {"p": [1.0, -2.0, 3.0, 0.0], "q": [8.0]},
    "b": {"p": [2.0, 1.0, -4.0, 0.0], "q": [2.0]},
}


def reference(vectors, rescaler):
    """Elect, mask, rescale, element by element in float64 (arXiv 2405.17461)."""
    tasks, names = list(vectors), list(next(iter(vectors.values())))
    unified, masks = {}, {task: {} for task in tasks}
    own, masked = dict.fromkeys(tasks, 0.0), dict.fromkeys(tasks, 0.0)
    for name in names:
        rows = {task: np.ravel(vectors[task][name]) for task in tasks}
        length = len(rows[tasks[0]])
        merged = np.zeros(length)
        for i in range(length):
            sign = 1.0 if sum(rows[task][i] for task in tasks) > 0 else -1.0
            agreeing = [abs(rows[task][i]) for task in tasks if rows[task][i] * sign > 0]
            merged[i] = sign * max(agreeing, default=0.0)
        unified[name] = merged
        share = 1.0 if rescaler == "total" else 1.0 / length
        for task in tasks:
            masks[task][name] = rows[task] * merged > 0
            own[task] += share * sum(abs(rows[task]))
            masked[task] += share * sum(abs(merged[masks[task][name]]))
    factors = {task: own[task] / masked[task] if masked[task] else 1.0 for task in tasks}
    return unified, masks, factors


def test_by_hand(make_source):
    merged = merge(Emr(), make_source(VECTORS))
    assert merged.vectors["p"].tolist() == [2.0, -2.0, -4.0, 0.0]
    assert merged.vectors["q"].tolist() == [8.0]
    assert merged.masks["a"]["p"].tolist() == [True, True, False, False]
    assert merged.masks["b"]["p"].tolist() == [True, False, True, False]
    assert merged.rescalers == pytest.approx({"a": 14 / 12, "b": 9 / 14})


def test_rescalers_of_the_published_code_weigh_small_tensors_as_much_as_large_ones(make_source):
    merged = merge(Emr(EmrOptions(rescaler="per_tensor_mean")), make_source(VECTORS))
    assert merged.rescalers == pytest.approx({"a": (6 / 4 + 8) / (4 / 4 + 8), "b": (7 / 4 + 2) / (6 / 4 + 8)})


def test_a_sum_of_zero_counts_as_minus(make_source):
    merged = merge(Emr(), make_source({"a": {"w": [3.0]}, "b": {"w": [-1.0]}, "c": {"w": [-2.0]}}))
    assert merged.vectors["w"].tolist() == [-2.0]
    assert [merged.masks[task]["w"].item() for task in "abc"] == [False, True, True]


def test_the_order_of_tasks_elects_nothing(make_source):
    # In float32 this sum is above, below or at zero, as one begins.
    values = {"a": 0.3, "b": 0.1, "c": 0.1, "d": -0.5}
    orders = [tuple(values), ("d", "a", "b", "c"), ("b", "c", "d", "a"), ("a", "d", "c", "b")]
    found = [merge(Emr(), make_source({task: {"w": [values[task]]} for task in order})) for order in orders]
    assert len({float(merged.vectors["w"]) for merged in found}) == 1
    assert len({tuple(bool(merged.masks[task]["w"]) for task in "abcd") for merged in found}) == 1


def test_a_task_that_changes_nothing_has_an_empty_mask_and_the_factor_one(make_source):
    merged = merge(Emr(), make_source({"a": {"w": [3.0, -1.0]}, "idle": {"w": [0.0, 0.0]}}))
    assert not merged.masks["idle"]["w"].any()
    assert merged.rescalers == {"a": 1.0, "idle": 1.0}


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["total", "per_tensor_mean"]), st.sampled_from([1, 3, 100]))
def test_any_vectors_as_the_plain_reference(make_source, draw_vectors, data, rescaler, elements):
    shapes = {"a": (3, 2), "b": (5,)}
    vectors = draw_vectors(data, shapes, tasks=data.draw(st.integers(2, 4)), parts=2)
    merged = merge(Emr(EmrOptions(rescaler=rescaler)), make_source(vectors, elements=elements))
    unified, masks, factors = reference(vectors, rescaler)
    for name, expected in unified.items():
        assert np.array_equal(merged.vectors[name].numpy().ravel(), expected)
        for task in vectors:
            assert np.array_equal(merged.masks[task][name].numpy().ravel(), masks[task][name])
    assert merged.rescalers == pytest.approx(factors)


def test_it_has_no_scale_and_is_per_task():
    assert Emr.default_scale is None
    assert Emr.form == "per-task"
