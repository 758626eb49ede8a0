import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pave_lightning.errors import PaveError
from pave_lightning.merging import make_method, merge
from pave_lightning.merging.methods.tall_masks import Consensus, ConsensusOptions, TallMasks, TallMasksOptions
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.merging.methods.ties import Ties, TiesOptions

VECTORS = {
    "a": {"w": [4.0, 1.0, -2.0, 0.0]},
    "b": {"w": [1.0, 1.0, 2.0, 0.0]},
    "c": {"w": [0.0, 1.0, 3.0, 0.0]},
}


def tall(source, **options):
    return merge(TallMasks(TallMasksOptions(**options)), source)


def consensus(source, **options):
    return merge(Consensus(ConsensusOptions(**options)), source).vectors


def test_by_hand(make_source):
    merged = tall(make_source(VECTORS), threshold=0.5)
    assert merged.vectors["w"].tolist() == [5.0, 3.0, 3.0, 0.0]
    # What the others add: a [1, 2, 5], b [4, 2, 1], c [5, 2, 0]; half of that must be less than one's own.
    assert merged.masks["a"]["w"].tolist() == [True, False, False, False]
    assert merged.masks["b"]["w"].tolist() == [False, False, True, False]
    assert merged.masks["c"]["w"].tolist() == [False, False, True, False]
    assert merged.rescalers == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_each_task_may_have_its_own_threshold(make_source):
    merged = tall(make_source(VECTORS), threshold={"c": 0.4, "a": 0.39, "b": 5.0})
    assert merged.masks["a"]["w"].tolist() == [True, True, True, False]
    assert merged.masks["b"]["w"].tolist() == [False, False, False, False]
    assert merged.masks["c"]["w"].tolist() == [False, True, True, False]


def test_consensus_by_hand(make_source):
    source = make_source(VECTORS)
    assert consensus(source, threshold=0.5)["w"].tolist() == [0.0, 0.0, 3.0, 0.0]
    assert consensus(source, threshold=0.5, k=1)["w"].tolist() == [5.0, 0.0, 3.0, 0.0]
    assert consensus(source, threshold=0.4, k=3)["w"].tolist() == [0.0, 3.0, 0.0, 0.0]


def multi_task_vector(vectors, kind, density):
    flat = np.stack([np.concatenate([np.ravel(value) for value in named.values()]) for named in vectors.values()])
    if kind == "sum":
        return flat, flat.sum(axis=0)
    kept = max(1, int(flat.shape[1] * density))
    trimmed = np.array([np.where(np.abs(row) >= np.sort(np.abs(row))[-kept], row, 0) for row in flat])
    sign = np.sign(trimmed.sum(axis=0))
    return flat, np.array([sum(v for v in column if v * s > 0) for column, s in zip(trimmed.T, sign, strict=True)])


@settings(max_examples=60, deadline=None)
@given(
    st.data(), st.sampled_from(["sum", "ties"]), st.sampled_from([0.25, 0.5, 1.0]), st.sampled_from([1, 3, 100]),
)  # fmt: skip
def test_any_vectors_as_the_plain_reference(make_source, draw_vectors, data, kind, threshold, elements):
    shapes = {"a": (3, 2), "b": (5,), "c": ()}
    vectors = draw_vectors(data, shapes, tasks=data.draw(st.integers(2, 4)), parts=2)
    flat, shared = multi_task_vector(vectors, kind, 0.4)
    # The form with weights: nearer to the task's own weight than the base is, by the threshold.
    base = np.arange(flat.shape[1])
    masks = np.abs(base - (base + flat)) > threshold * np.abs(base + shared - (base + flat))
    source = make_source(vectors, elements=elements)
    merged = tall(source, threshold=threshold, multi_task=kind, density=0.4)
    assert np.array_equal(np.concatenate([merged.vectors[name].numpy().ravel() for name in shapes]), shared)
    for task, expected in zip(vectors, masks, strict=True):
        found = np.concatenate([merged.masks[task][name].numpy().ravel() for name in shapes])
        assert np.array_equal(found, expected)
    for k in (0, 1, 2):
        found = consensus(source, threshold=threshold, multi_task=kind, density=0.4, k=k)
        found = np.concatenate([found[name].numpy().ravel() for name in shapes])
        assert np.array_equal(found, np.where(masks.sum(axis=0) >= k, shared, 0))


def test_needed_by_none_is_the_method_without_masks(make_source, random_vectors):
    source = make_source(random_vectors)
    for kind, method in (("sum", TaskArithmetic()), ("ties", Ties(TiesOptions(density=0.3, merge="sum")))):
        expected = merge(method, source).vectors
        found = consensus(source, k=0, multi_task=kind, density=0.3)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", [TallMasks, Consensus])
def test_wrong_and_missing_names_are_told_at_once(kind, make_source):
    method = kind(kind.Options(threshold={"a": 0.2, "cc": 0.3}))
    with pytest.raises(PaveError) as caught:
        merge(method, make_source(VECTORS))
    assert "options.threshold names the unknown task 'cc': did you mean 'c'?" in str(caught.value)
    assert "options.threshold must name every task; missing: b, c" in str(caught.value)


def test_more_tasks_than_there_are(make_source):
    with pytest.raises(PaveError, match=r"options.k is 4, but there are 3 tasks, so nothing would be kept"):
        consensus(make_source(VECTORS), k=4)


def test_the_order_of_tasks_changes_no_bit(make_source):
    # Ties but for rounding, which in float32 depends on what is added first.
    values = {"a": -0.4, "b": -0.9, "c": -0.8, "d": 2.1}
    found = []
    for order in ("abcd", "dcba", "badc", "cdab"):
        merged = tall(make_source({task: {"w": [values[task]]} for task in order}), threshold=1.0)
        found.append([merged.masks[task]["w"].item() for task in "abcd"])
    assert found == [found[0]] * 4


@pytest.mark.parametrize("threshold", [-0.1, {"a": -0.1}, "many", {"a": None}, float("inf"), True])
def test_impossible_thresholds_are_refused_in_one_line(threshold):
    with pytest.raises(PaveError) as caught:
        make_method("tall_masks", {"threshold": threshold})
    assert str(caught.value).splitlines()[1:] == [
        f"  - threshold: expected a number of at least 0, or one for every task by its name, found {threshold!r}"
    ]


def test_what_they_are():
    assert (TallMasks.form, TallMasks.default_scale) == ("per-task", None)
    assert (Consensus.form, Consensus.default_scale, ConsensusOptions().k) == ("static", 0.3, 2)
    assert TallMasksOptions().threshold == 0.4
