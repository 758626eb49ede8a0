import numpy as np
import pytest
from pydantic import ValidationError

from pave_lightning.errors import PaveError
from pave_lightning.merging import merge
from pave_lightning.merging.methods.pcb import Pcb, PcbOptions

SHAPES = {"a": (6, 7), "b": (9,), "c": (3, 2, 4), "d": ()}


def run(source, **options):
    merged = merge(Pcb(PcbOptions(**options)), source).vectors
    return np.concatenate([merged[name].numpy().ravel() for name in sorted(merged)])


def clamped(rows, low_share, high_share):
    """Each row between two of its own values, found in the sorted row by position."""
    d = rows.shape[1]
    ordered = np.sort(rows, axis=1)
    low = ordered[:, int(d * low_share)]
    high = ordered[:, max(int(d * (1 - high_share) - 1), int(d * low_share))]
    return np.clip(rows, low[:, None], high[:, None])


def normalised(rows):
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    return (rows - low) / np.where(high > low, high - low, np.inf)


def reference(vectors, ratio, tails, accord):
    """The flat vectors of all tasks at once, with sorts, in float64 (arXiv 2410.02396)."""
    flat = np.stack(
        [np.concatenate([np.ravel(named[name]) for name in sorted(named)]) for named in vectors.values()]
    ).astype(np.float32)
    flat = flat.astype(np.float64)
    magnitudes = clamped(np.abs(flat), tails, tails)
    share = normalised(magnitudes)
    intra = np.exp(len(flat) * share**2)
    signed = np.sign(flat) * share
    if accord == "product":
        inter = np.tanh(flat * flat.sum(axis=0))
    elif accord == "normalised_sum":
        inter = np.tanh(flat * signed.sum(axis=0))
    else:
        inter = np.stack([np.tanh(one * signed).sum(axis=0) for one in signed])
    coefficients = normalised(clamped(intra * inter, 1 - ratio, 0))
    merged = (np.sign(flat) * magnitudes * coefficients).sum(axis=0)
    return merged / np.maximum(coefficients.sum(axis=0), 1e-12), coefficients


def normal_vectors(seed, scale=1.0, tasks=3):
    random = np.random.default_rng(seed)
    return {
        f"task{index}": {name: scale * random.normal(size=shape) for name, shape in SHAPES.items()}
        for index in range(tasks)
    }


@pytest.mark.parametrize("accord", ["product", "normalised_sum", "normalised_pairs"])
@pytest.mark.parametrize(("ratio", "tails"), [(0.1, 1e-4), (0.5, 0.05), (1.0, 0.0)])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_any_vectors_as_the_plain_reference(accord, ratio, tails, scale, make_source):
    for seed in range(3):
        vectors = normal_vectors(seed, scale)
        expected, coefficients = reference(vectors, ratio, tails, accord)
        found = run(make_source(vectors), ratio=ratio, tails=tails, accord=accord)
        # The reference does not round scores, so next to the threshold the two may differ in what is dropped.
        sure = (coefficients == 0).all(axis=0) | (coefficients.max(axis=0) > 1e-4)
        assert sure.mean() > 0.9
        assert found[sure] / scale == pytest.approx(expected[sure] / scale, rel=1e-3, abs=1e-6)
        assert np.any(expected)


def test_by_hand(make_source):
    vectors = {"a": {"w": [3.0, 1.0, 0.0, -2.0]}, "b": {"w": [1.0, -1.0, 0.0, -2.0]}}
    # Without clamping, a's magnitudes become 1, 1/3, 0, 2/3 and b's 1/2, 1/2, 0, 1. The sums are 4, 0, 0, -4.
    scores = {
        "a": [np.e**2 * np.tanh(12), 0.0, 0.0, np.exp(2 * 4 / 9) * np.tanh(8)],
        "b": [np.exp(0.5) * np.tanh(4), 0.0, 0.0, np.e**2 * np.tanh(8)],
    }
    a, b = (np.array(score) / max(score) for score in scores.values())
    found = run(make_source(vectors), ratio=1.0, tails=0.0)
    assert found == pytest.approx([(3 * a[0] + b[0]) / (a[0] + b[0]), 0.0, 0.0, -2.0], rel=1e-6)
    # The best two of a are its first and last element, and the last one's coefficient is then zero; so with b's first.
    assert run(make_source(vectors), ratio=0.5, tails=0.0) == pytest.approx([3.0, 0.0, 0.0, -2.0])


def test_tails_are_brought_to_the_magnitudes_next_to_them(make_source):
    vectors = {"a": {"w": [100.0, 4.0, -3.0, 0.1, -0.01]}, "b": {"w": [50.0, 4.0, -3.0, 0.1, -0.01]}}
    found = run(make_source(vectors), ratio=1.0, tails=0.2)
    # Ascending by magnitude, the second is the lowest and the fourth the highest that is left as it is.
    assert found[[0, 1]] == pytest.approx([4.0, 4.0])


def test_small_magnitudes_are_raised_where_another_task_gives_them_a_score(make_source):
    vectors = {"a": {"w": [0.01, 1.0, -2.0, 3.0, 4.0]}, "b": {"w": [50.0, 1.0, -2.0, -9.0, 4.0]}}
    expected, coefficients = reference(vectors, 1.0, 0.2, "product")
    assert coefficients[0, 0] > 0.1
    assert run(make_source(vectors), ratio=1.0, tails=0.2) == pytest.approx(expected, rel=1e-5)


def test_of_two_elements_that_disagree_the_weaker_is_dropped(make_source):
    vectors = {"a": {"w": [5.0, 4.0, 0.0]}, "b": {"w": [-5.1, 1.0, 0.0]}}
    # The best two of three count, of which the lower one gets the coefficient zero: a's second and b's first are left.
    assert run(make_source(vectors), ratio=0.6, tails=0.0) == pytest.approx([-5.1, 4.0, 0.0])


def test_tasks_without_a_range_have_no_part(make_source):
    still = {"w": [0.0, 0.0, 0.0]}
    own = {"w": [3.0, -1.0, 0.0]}
    assert run(make_source({"a": own, "b": still}), ratio=1.0, tails=0.0) == pytest.approx([3.0, -1.0, 0.0])
    even = {task: {"w": [0.5, 0.5]} for task in "ab"}
    assert run(make_source(even)).tolist() == [0.0, 0.0]
    assert run(make_source({task: {"w": [2.0]} for task in "ab"})).tolist() == [0.0]


@pytest.mark.parametrize("accord", ["product", "normalised_sum", "normalised_pairs"])
def test_as_many_tasks_as_scores_can_tell_apart_as_the_plain_reference(accord, make_source):
    random = np.random.default_rng(2)
    vectors = {f"task{index:03}": {"w": random.standard_normal(8)} for index in range(161)}
    with pytest.raises(PaveError, match="161 tasks, but scores of more than 160 do not fit into float32; merge fewer"):
        run(make_source(vectors), accord=accord)
    del vectors["task160"]
    expected, _ = reference(vectors, 0.5, 0.0, accord)
    assert run(make_source(vectors), ratio=0.5, tails=0.0, accord=accord) == pytest.approx(expected, abs=1e-4)


def test_many_tasks_do_not_overflow(make_source):
    vectors = {f"task{index}": {"w": [1.0, 0.5, 0.25, 0.0]} for index in range(100)}
    found = run(make_source(vectors), ratio=1.0, tails=0.0)
    assert np.isfinite(found).all()
    assert found[0] == pytest.approx(1.0)


def test_four_walks_over_the_parameters(watched_source):
    source = watched_source({task: {"one": np.arange(4.0), "two": np.arange(4.0)} for task in "abc"})
    Pcb().prepare_alone(source)
    assert source.asked == 4 * (["one"] * 3 + ["two"] * 3)


@pytest.mark.parametrize("options", [{"ratio": 0}, {"ratio": 1.1}, {"tails": 0.5}, {"tails": -0.1}])
def test_impossible_shares_are_refused(options):
    with pytest.raises(ValidationError):
        PcbOptions(**options)


def test_defaults():
    assert (PcbOptions().ratio, PcbOptions().tails, Pcb.default_scale) == (0.1, 1e-4, 1.2)
