import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pave_lightning.errors import PaveError
from pave_lightning.merging import Evidence, merge
from pave_lightning.merging.methods.fisher import Fisher, FisherOptions
from pave_lightning.statistics.gradients import TaskGradients


def evidence_of(information, kind="fisher"):
    return Evidence(
        fisher={
            task: TaskGradients(
                kind, {name: torch.tensor(value, dtype=torch.float32) for name, value in named.items()}, examples=1
            )
            for task, named in information.items()
        }
    )


def run(source, information, **options):
    return merge(Fisher(FisherOptions(**options)), source, evidence_of(information)).vectors


def reference(base, vectors, information, *, weights=None, normalise=True, floor=1e-6):
    """Mean of whole weights, one element at a time, minus the base; all in float64."""
    weights = weights or dict.fromkeys(vectors, 1.0)
    merged = {}
    for name in base:
        flat = np.ravel(base[name]).astype(float)
        found = np.empty_like(flat)
        for index, start in enumerate(flat):
            top = bottom = 0.0
            for task, vector in vectors.items():
                everything = np.concatenate([np.ravel(value) for value in information[task].values()])
                norm = np.sqrt((everything**2).sum()) if normalise else 1.0
                share = weights[task] * max(np.ravel(information[task][name])[index], floor) / norm
                top += share * (start + np.ravel(vector[name])[index])
                bottom += share
            found[index] = top / bottom - start
        merged[name] = found.reshape(np.shape(base[name]))
    return merged


@pytest.fixture
def random_information(random_vectors):
    """Values over ten orders of magnitude, in tasks of unlike sizes, some below the default floor."""
    random = np.random.default_rng(5)
    return {
        task: {name: size * 10.0 ** random.uniform(-9, 1, np.shape(value)) for name, value in named.items()}
        for (task, named), size in zip(random_vectors.items(), (1.0, 30.0, 0.01), strict=True)
    }


def test_by_hand(make_source):
    vectors = {"a": {"w": [4.0, 4.0, 4.0]}, "b": {"w": [0.0, 8.0, -4.0]}}
    information = {"a": {"w": [3.0, 1.0, 0.0]}, "b": {"w": [1.0, 3.0, 0.0]}}
    # Shares 3/4 and 1/4, then 1/4 and 3/4, then the floor on both sides: the mean.
    found = run(make_source(vectors), information, normalise=False)["w"].tolist()
    assert found == pytest.approx([3.0, 7.0, 0.0], rel=1e-6)


def test_normalisation_takes_away_the_size_of_a_task(make_source):
    vectors = {"a": {"v": [1.0], "w": [1.0]}, "b": {"v": [0.0], "w": [0.0]}}
    information = {"a": {"v": [3.0], "w": [4.0]}, "b": {"v": [400.0], "w": [300.0]}}
    found = run(make_source(vectors), information)
    # Norms 5 and 500 over both parameters: 0.6 against 0.8, and 0.8 against 0.6.
    assert (float(found["v"]), float(found["w"])) == pytest.approx((3 / 7, 4 / 7))
    assert float(run(make_source(vectors), information, normalise=False)["v"]) == pytest.approx(3 / 403)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("floor", [0.0, 1e-6, 0.1])
def test_as_the_mean_of_whole_weights(make_source, random_vectors, random_information, normalise, floor):
    random = np.random.default_rng(1)
    base = {name: random.standard_normal(np.shape(value)) for name, value in random_vectors["one"].items()}
    weights = {"one": 0.5, "two": 2.0, "three": 1.0}
    options = {"weights": weights, "normalise": normalise, "floor": floor}
    found = run(make_source(random_vectors, base=base), random_information, **options)
    for name, expected in reference(base, random_vectors, random_information, **options).items():
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_result_lies_between_the_experts(make_source, data):
    value, share = st.floats(-8, 8, width=32), st.floats(0, 1e6, width=32)
    rows = [data.draw(st.lists(value, min_size=5, max_size=5)) for _ in range(3)]
    information = {str(t): {"w": data.draw(st.lists(share, min_size=5, max_size=5))} for t in range(3)}
    vectors = {str(t): {"w": row} for t, row in enumerate(rows)}
    found = run(make_source(vectors), information, normalise=False)["w"].numpy()
    lowest, highest = np.min(rows, axis=0), np.max(rows, axis=0)
    assert (found >= lowest - 1e-5).all()
    assert (found <= highest + 1e-5).all()


def test_equal_information_gives_the_weighted_mean(make_source, random_vectors):
    equal = {
        task: {name: np.full(np.shape(v), 0.3) for name, v in named.items()} for task, named in random_vectors.items()
    }
    found = run(make_source(random_vectors), equal, weights={"one": 1, "two": 0, "three": 3})
    for name, value in found.items():
        expected = (random_vectors["one"][name] + 3 * random_vectors["three"][name]) / 4
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_without_a_floor_the_smallest_information_decides(make_source):
    vectors = {"a": {"w": [1.0, 1.0]}, "b": {"w": [3.0, 3.0]}}
    information = {"a": {"w": [1e-40, 0.0]}, "b": {"w": [0.0, 0.0]}}
    options = {"normalise": False, "weights": {"a": 1, "b": 3}}
    assert run(make_source(vectors), information, **options)["w"].tolist() == [2.5, 2.5]
    assert run(make_source(vectors), information, **options, floor=0)["w"].tolist() == [1.0, 2.5]


def test_information_that_is_zero_everywhere_cannot_be_normalised(make_source, random_vectors, random_information):
    information = {**random_information, "two": {name: 0 * v for name, v in random_information["two"].items()}}
    with pytest.raises(PaveError, match=r"task 'two': the Fisher information is zero everywhere, .*\bnormalise: false"):
        run(make_source(random_vectors), information)
    assert all(
        value.isfinite().all() for value in run(make_source(random_vectors), information, normalise=False).values()
    )


def test_what_is_missing_is_told_task_by_task(make_source, random_vectors, random_information):
    less = {name: value for name, value in random_information["two"].items() if name != "b"}
    other = {**random_information["three"], "a": np.ones((5, 7))}
    with pytest.raises(PaveError) as error:
        run(make_source(random_vectors), {"two": less, "three": other})
    assert str(error.value).splitlines()[1:] == [
        "  - task 'one' has no Fisher information; `pave merge` takes it as part of a recipe",
        "  - task 'two': the Fisher information: there are none of 1 of 4 parameters, such as b; "
        "take it anew for these experts",
        "  - task 'three': the Fisher information: those of a are [5, 7], expected [7, 5]; "
        "take it anew for these experts",
    ]


def test_gradients_of_another_kind_are_refused(make_source, random_vectors, random_information):
    given = evidence_of(random_information, kind="absolute")
    with pytest.raises(
        PaveError, match=r"task 'one': expected Fisher information .*gradients/fisher-TASK\), found labelled gradients"
    ):
        merge(Fisher(), make_source(random_vectors), given)


def test_weights_must_name_the_tasks(make_source, random_vectors, random_information):
    with pytest.raises(PaveError, match="names the unknown task 'ones': did you mean 'one'"):
        run(make_source(random_vectors), random_information, weights={"ones": 1, "two": 1, "three": 1})
    with pytest.raises(PaveError, match="must name every task; missing: two, three"):
        run(make_source(random_vectors), random_information, weights={"one": 1})


@pytest.mark.parametrize(
    "options", [{"floor": -1.0}, {"weights": {"a": -1.0}}, {"weights": {"a": 0.0, "b": 0.0}}, {"floor": float("nan")}]
)
def test_impossible_options(options):
    with pytest.raises(ValidationError):
        FisherOptions(**options)
