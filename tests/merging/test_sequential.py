import json

import numpy as np
import pytest

from pave_lightning.errors import PaveError
from pave_lightning.merging import merge
from pave_lightning.merging.sequential import RunningMean, RunningSum, SequentialState

GOOD = {"method": "running sum", "merged": 2, "divisor": 1.0, "norms": 0.0}


class Sum(RunningSum):
    name = "running sum"
    summary = source = "a test"
    elementwise = True


class Mean(RunningMean):
    name = "running mean"
    summary = source = "a test"
    elementwise = True


def tasks(count=5):
    random = np.random.default_rng(0)
    return {
        f"task{index}": {"w": random.standard_normal((4, 3)), "b": random.standard_normal(3)} for index in range(count)
    }


@pytest.mark.parametrize(("kind", "of"), [(Sum, np.sum), (Mean, np.mean)])
def test_the_running_methods_are_sum_and_mean(make_source, kind, of):
    vectors = tasks()
    for elements in (None, 2):
        merged = merge(kind(), make_source(vectors, elements=elements)).vectors
        for name in "wb":
            expected = of([named[name] for named in vectors.values()], axis=0)
            assert merged[name].numpy() == pytest.approx(expected, abs=1e-5)


def test_large_parameters_are_summed_to_their_end(make_source):
    random = np.random.default_rng(0)
    # Not a multiple of the elements that are summed at a time, in a shape of its own.
    vectors = {task: {"w": random.standard_normal((7, 5001))} for task in ("one", "two", "three")}
    merged = merge(Sum(), make_source(vectors)).vectors["w"].numpy()
    assert merged == pytest.approx(sum(named["w"] for named in vectors.values()), abs=1e-5)


@pytest.mark.parametrize("kind", [Sum, Mean])
@pytest.mark.parametrize("scale", [None, 0.3, 1.7])
@pytest.mark.parametrize("at_once", [1, 2])
def test_adding_experts_to_a_merged_model_is_merging_all(make_source, kind, scale, at_once):
    vectors = tasks()
    random = np.random.default_rng(1)
    base = {"w": random.standard_normal((4, 3)), "b": random.standard_normal(3)}
    factor = 1.0 if scale is None else scale
    method = kind()
    names = list(vectors)
    result = merge(method, make_source({task: vectors[task] for task in names[:3]}, base=base)).vectors
    for start in range(3, 5, at_once):
        # What is kept beside a merged model goes through a file.
        state = json.loads(json.dumps(method.state(scale)))
        method = kind()
        method.start_from(state)
        so_far = {"so far": {name: factor * value.numpy() for name, value in result.items()}}
        new = {task: vectors[task] for task in names[start : start + at_once]}
        result = merge(method, make_source(so_far | new, base=base)).vectors
    expected = merge(kind(), make_source(vectors, base=base)).vectors
    for name in "wb":
        assert result[name].numpy() == pytest.approx(expected[name].numpy(), abs=1e-5)
    assert method.merged() == 5


def test_the_states_by_hand(make_source):
    source = make_source(tasks(4))
    total, mean = Sum(), Mean()
    merge(total, source)
    merge(mean, source)
    assert total.state(0.5) == {"method": "running sum", "merged": 4, "divisor": 2.0, "norms": 0.0}
    assert mean.state() == {"method": "running mean", "merged": 4, "divisor": 4.0, "norms": 0.0}
    assert SequentialState(**mean.state()).merged == 4


def test_an_expert_is_added_to_a_mean_of_two_by_hand(make_source):
    method = Mean()
    method.start_from({"method": "running mean", "merged": 2, "divisor": 2.0})
    merged = merge(method, make_source({"so far": {"w": [3.0]}, "new": {"w": [9.0]}})).vectors["w"]
    assert merged.tolist() == [5.0]


def test_nothing_is_left_of_the_experts_with_scale_zero(make_source):
    method = Sum()
    merge(method, make_source(tasks(2)))
    with pytest.raises(PaveError, match="'running sum' with scale 0 leaves nothing of the experts in the merged model"):
        method.state(0.0)


def test_there_is_no_state_before_a_merge():
    with pytest.raises(RuntimeError, match="known only after it has merged"):
        Sum().state()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "running mean"}, "it was merged by 'running mean', expected 'running sum'; use that method"),
        ({"merged": 0}, "not readable: merged: Input should be greater than or equal to 1"),
        ({"divisor": 0.0}, "holds the divisor 0, expected another; merge all experts again"),
        ({"divisor": float("inf")}, "not readable: divisor: Input should be a finite number"),
        ({"norms": -1.0}, "not readable: norms: Input should be greater than or equal to 0"),
        ({"other": 1}, "not readable: other: Extra inputs are not permitted"),
    ],
)
def test_what_is_no_state_is_refused(change, message):
    with pytest.raises(PaveError, match=r"no expert can be added to this merged model:\n  - .*" + message):
        Sum().start_from(GOOD | change)


def test_everything_that_is_wrong_is_told_at_once():
    with pytest.raises(PaveError, match=r"(?s)merged: .*divisor: "):
        Sum().start_from({"method": "running sum", "merged": "many"})
