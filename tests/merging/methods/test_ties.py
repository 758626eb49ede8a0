import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pave_lightning.merging import merge
from pave_lightning.merging.methods.ties import Ties, TiesOptions

# Values of few distinct magnitudes: many ties with the threshold, many sums of exactly zero.
VALUE = st.integers(-4, 4).map(lambda value: value / 4)


def reference(vectors, density, how="mean"):
    """Trim, elect, disjoint mean on one long vector a task, in float64 with a sort (arXiv 2306.01708)."""
    flat = np.stack([np.concatenate([np.ravel(value) for value in named.values()]) for named in vectors.values()])
    kept = max(1, int(flat.shape[1] * density))
    trimmed = []
    for row in flat:
        threshold = np.sort(np.abs(row))[::-1][kept - 1]
        trimmed.append([value if abs(value) >= threshold else 0.0 for value in row])
    merged = []
    for column in np.array(trimmed).T:
        elected = np.sign(column.sum())
        agreeing = [value for value in column if value != 0 and np.sign(value) == elected]
        merged.append(getattr(np, how)(agreeing) if agreeing else 0.0)
    return np.array(merged)


def run(make_source, vectors, density, how="mean", **options):
    merged = merge(Ties(TiesOptions(density=density, merge=how)), make_source(vectors, **options)).vectors
    return np.concatenate([merged[name].numpy().ravel() for name in sorted(merged)])


def test_by_hand_with_one_threshold_over_all_parameters(make_source):
    vectors = {
        "a": {"p": [4.0, -1.0, 2.0], "q": [[0.5, -3.0]]},
        "b": {"p": [-2.0, 5.0, 1.0], "q": [[1.5, -2.5]]},
    }
    # Three of five survive in each: 4, 2, -3 and -2, 5, -2.5. Trimmed for each parameter, 2 or -2 would be gone.
    assert run(make_source, vectors, 0.6).tolist() == [4.0, 5.0, 2.0, 0.0, -2.75]


def test_the_sign_is_elected_by_mass_not_by_count(make_source):
    vectors = {"a": {"w": [5.0]}, "b": {"w": [-1.0]}, "c": {"w": [-2.0]}}
    assert run(make_source, vectors, 1.0).tolist() == [5.0]


def test_a_sum_of_exactly_zero_merges_nothing(make_source):
    vectors = {"a": {"w": [3.0, 1.0]}, "b": {"w": [-3.0, 1.0]}}
    assert run(make_source, vectors, 1.0).tolist() == [0.0, 1.0]


def test_elements_that_tie_with_the_threshold_are_kept(make_source):
    vectors = {"a": {"w": [2.0, -2.0, 2.0, 1.0]}, "b": {"w": [0.0, 0.0, 0.0, 8.0]}}
    assert run(make_source, vectors, 0.25).tolist() == [2.0, -2.0, 2.0, 8.0]


def test_trimmed_elements_do_not_count_in_the_mean(make_source):
    vectors = {"a": {"w": [6.0, 1.0]}, "b": {"w": [1.0, 6.0]}, "c": {"w": [2.0, 8.0]}}
    assert run(make_source, vectors, 0.5).tolist() == [6.0, 7.0]


def test_at_least_one_element_survives(make_source):
    vectors = {"a": {"w": [1.0, 3.0, 2.0]}, "b": {"w": [0.0, 0.0, -4.0]}}
    assert run(make_source, vectors, 0.01).tolist() == [0.0, 3.0, -4.0]


@settings(max_examples=80, deadline=None)
@given(
    st.data(),
    st.sampled_from([0.1, 0.2, 0.5, 0.75, 1.0]),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from([1, 2, 100]),
)
def test_any_vectors_as_the_plain_reference(make_source, data, density, how, elements):
    tasks = data.draw(st.integers(2, 4))
    shapes = {"a": (3, 2), "b": (4,), "c": (1, 1)}
    vectors = {
        f"task{index}": {
            name: np.array(data.draw(st.lists(VALUE, min_size=size, max_size=size))).reshape(shape)
            for name, shape in shapes.items()
            for size in [int(np.prod(shape))]
        }
        for index in range(tasks)
    }
    found = run(make_source, vectors, density, how, elements=elements)
    assert found == pytest.approx(reference(vectors, density, how), abs=1e-6)


def test_what_agrees_may_be_added_up(make_source):
    vectors = {"a": {"w": [6.0, 4.0]}, "b": {"w": [-1.0, 6.0]}, "c": {"w": [2.0, 8.0]}}
    assert run(make_source, vectors, 1.0).tolist() == [4.0, 6.0]
    assert run(make_source, vectors, 1.0, "sum").tolist() == [8.0, 18.0]


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan")])
def test_impossible_densities_are_refused(density):
    with pytest.raises(ValidationError):
        TiesOptions(density=density)


def test_defaults_are_those_of_the_source():
    assert TiesOptions().density == 0.2
    assert TiesOptions().merge == "mean"
    assert Ties.default_scale == 1.0


def test_the_thresholds_of_all_tasks_are_found_in_two_walks_over_the_parameters(watched_source):
    source = watched_source({task: {"one": np.arange(4.0), "two": np.arange(4.0)} for task in "abc"})
    Ties().prepare_alone(source)
    assert source.asked == 2 * (["one"] * 3 + ["two"] * 3)


def test_each_tensor_may_be_trimmed_for_itself(make_source):
    vectors = {
        "a": {"p": [4.0, -1.0, 2.0], "q": [[0.5, -3.0]]},
        "b": {"p": [-2.0, 5.0, 1.0], "q": [[1.5, -2.5]]},
    }
    merged = merge(Ties(TiesOptions(density=0.5, trim="tensor")), make_source(vectors)).vectors
    assert merged["p"].tolist() == [4.0, 5.0, 0.0]  # of three elements one survives, of two one
    assert merged["q"].tolist() == [[0.0, -2.75]]


@pytest.mark.parametrize("how", ["mean", "sum"])
@pytest.mark.parametrize("density", [0.1, 0.34, 0.8, 1.0])
def test_trimming_each_tensor_is_ties_of_each_tensor_alone(make_source, density, how):
    rng = np.random.default_rng(4)
    shapes = {"a": (6, 5), "b": (7,), "c": ()}
    sizes = {"a": 1.0, "b": 0.01, "c": 5.0}
    vectors = {t: {n: sizes[n] * rng.standard_normal(s) for n, s in shapes.items()} for t in ("one", "two", "three")}
    method = Ties(TiesOptions(density=density, trim="tensor", merge=how))
    for elements in (None, 1, 8):
        found = merge(method, make_source(vectors, elements=elements)).vectors
        for name in shapes:
            alone = {task: {name: own[name]} for task, own in vectors.items()}
            assert found[name].numpy().ravel() == pytest.approx(reference(alone, density, how), abs=1e-6)
