import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pave_lightning.merging import merge
from pave_lightning.merging.methods.breadcrumbs import Breadcrumbs, BreadcrumbsOptions
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic


def run(source, **options):
    return merge(Breadcrumbs(BreadcrumbsOptions(**options)), source).vectors


def left_of(row, density, outliers):
    """What is left of one row: whoever has few enough larger ones, but not too few; earlier ones win ties."""
    n = len(row)
    removed, kept = int(n * outliers), max(1, int(n * density))
    out = np.zeros(n)
    for i in range(n):
        ahead = sum(abs(row[j]) > abs(row[i]) or (abs(row[j]) == abs(row[i]) and j < i) for j in range(n))
        if removed <= ahead < removed + kept:
            out[i] = row[i]
    return out


def reference(vectors, density, outliers, per):
    merged = {}
    for name in next(iter(vectors.values())):
        total = 0.0
        for named in vectors.values():
            value = np.asarray(named[name], dtype=float)
            rows = value.reshape(-1, value.shape[-1]) if per == "row" and value.ndim else value.reshape(1, -1)
            total = total + np.array([left_of(row, density, outliers) for row in rows]).reshape(value.shape)
        merged[name] = total
    return merged


def test_by_hand_per_row_and_per_tensor(make_source):
    first = [[9.0, -1.0, 4.0, 2.0, 0.5], [0.1, 0.3, -0.2, 0.4, 0.6]]
    source = make_source({"a": {"w": first}, "b": {"w": [[0.0] * 5] * 2}})
    by_row = run(source, density=0.4, outliers=0.2)["w"]
    assert by_row.numpy() == pytest.approx(np.array([[0, 0, 4, 2, 0], [0, 0.3, 0, 0.4, 0]]))
    by_tensor = run(source, density=0.4, outliers=0.2, per="tensor")["w"]
    assert by_tensor.numpy() == pytest.approx(np.array([[0, -1, 0, 2, 0.5], [0, 0, 0, 0, 0.6]]))


@settings(max_examples=50, deadline=None)
@given(
    st.data(),
    st.sampled_from([0.05, 0.2, 0.5, 1.0]),
    st.sampled_from([0.0, 0.1, 0.34, 0.9]),
    st.sampled_from(["row", "tensor"]),
    st.sampled_from([1, 4, 100]),
)
def test_any_vectors_as_the_plain_reference(make_source, draw_vectors, data, density, outliers, per, elements):
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 2, 3), "d": (), "e": (4, 1)}
    vectors = draw_vectors(data, shapes, tasks=2, parts=4)
    found = run(make_source(vectors, elements=elements), density=density, outliers=outliers, per=per)
    for name, expected in reference(vectors, density, outliers, per).items():
        assert np.array_equal(found[name].numpy(), expected)


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_of_many_elements_that_tie_the_first_ones_are_larger(per, make_source):
    vectors = {"a": {"w": np.tile([1.0, -1.0], 200)}, "b": {"w": np.zeros(400)}}
    found = run(make_source(vectors), density=0.25, outliers=0.5, per=per)["w"]
    assert found.nonzero().flatten().tolist() == list(range(200, 300))


def test_short_rows_keep_one_element_and_lose_none_as_outliers(make_source):
    vectors = {"a": {"w": [[3.0, 1.0], [1.0, -2.0]], "s": 5.0}, "b": {"w": [[0.0, 0.0], [0.0, 0.0]], "s": 0.0}}
    merged = run(make_source(vectors))
    assert merged["w"].tolist() == [[3.0, 0.0], [0.0, -2.0]]
    assert merged["s"].item() == 5.0


def test_leaving_nothing_out_is_task_arithmetic(make_source, random_vectors):
    source = make_source(random_vectors)
    expected = merge(TaskArithmetic(), source).vectors
    for per in ("row", "tensor"):
        found = run(source, density=1.0, outliers=0.0, per=per)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("options", [{"density": 0}, {"density": 1.1}, {"outliers": -0.1}, {"outliers": 1}])
def test_impossible_shares_are_refused(options):
    with pytest.raises(ValidationError):
        BreadcrumbsOptions(**options)


def test_defaults_are_those_of_the_source():
    assert (BreadcrumbsOptions().density, BreadcrumbsOptions().outliers, Breadcrumbs.default_scale) == (
        0.15,
        0.006,
        0.2,
    )
