import numpy as np
import pytest
from pydantic import ValidationError

from pave_lightning.merging import merge
from pave_lightning.merging.methods.opcm import Opcm, OpcmOptions

SHAPES = {"a": (7, 5), "b": (11,), "c": (4, 6), "d": ()}
MATRICES = ("a", "c")


def tasks(count=4, seed=0):
    random = np.random.default_rng(seed)
    return {
        f"task{index}": {name: (1 + index) * random.standard_normal(shape) for name, shape in SHAPES.items()}
        for index in range(count)
    }


def length(named):
    return np.sqrt(sum(np.sum(np.square(value)) for value in named.values()))


def projection(vector, merged, threshold, zero_diagonal, removed):
    left, values, right = np.linalg.svd(merged, full_matrices=True)
    shares = left.T @ vector @ right.T
    sums = [values[: index + 1].sum() / values.sum() for index in range(len(values))]
    leading = next((index for index, share in enumerate(sums) if share > threshold), len(values))
    if removed == "cross":
        shares[:leading], shares[:, :leading] = 0, 0
    shares[:leading, :leading] = 0
    if zero_diagonal:
        np.fill_diagonal(shares, 0)
    return left @ shares @ right


def literal(vectors, threshold=0.5, zero_diagonal=True, removed="block"):
    """The algorithm as it is published, merged model after merged model, each with its own lambda."""
    first, *others = vectors.values()
    merged, scale, norms = dict(first), 1.0, [length(first)]
    for vector in others:
        norms.append(length(vector))
        raw = {}
        for name, value in vector.items():
            new = value
            if name in MATRICES:
                new = projection(value, merged[name], threshold, zero_diagonal, removed)
            raw[name] = scale * merged[name] + new
        scale = length(raw) / np.mean(norms)
        merged = {name: value / scale for name, value in raw.items()}
    return merged, scale


def run(make_source, vectors, matrices=MATRICES, **options):
    merged = merge(Opcm(OpcmOptions(**options)), make_source(vectors, matrices=matrices)).vectors
    return {name: value.numpy() for name, value in merged.items()}


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zero_diagonal": False},
        {"removed": "cross"},
        {"removed": "cross", "zero_diagonal": False},
        {"threshold": 0.0},
        {"threshold": 0.8},
        {"threshold": 1.0},
    ],
)
def test_one_factor_at_the_end_is_the_published_sequence_of_models(make_source, count, options):
    vectors = tasks(count)
    expected, scale = literal(vectors, **options)
    method = Opcm(OpcmOptions(**options))
    found = merge(method, make_source(vectors, matrices=MATRICES)).vectors
    for name in SHAPES:
        assert found[name].numpy() == pytest.approx(expected[name], rel=1e-4, abs=2e-5)
    assert method.divisor() == pytest.approx(scale, rel=1e-5)


def test_by_hand(make_source):
    # Shares 0.4, 0.73, 1: with threshold 0.5 one leading direction, with 0.8 two.
    first, ones = np.diag([3.0, 2.5, 2.0]), np.ones((3, 3))
    mean = (np.linalg.norm(first) + 3) / 2

    def merged(**options):
        found = run(make_source, {"x": {"w": first}, "y": {"w": ones}}, ["w"], **options)["w"]
        assert np.linalg.norm(found) == pytest.approx(mean, rel=1e-6)
        return found / mean

    def unit(rows):
        return np.array(rows) / np.linalg.norm(rows)

    assert merged() == pytest.approx(unit([[3, 1, 1], [1, 2.5, 1], [1, 1, 2]]), abs=1e-5)
    assert merged(zero_diagonal=False) == pytest.approx(unit([[3, 1, 1], [1, 3.5, 1], [1, 1, 3]]), abs=1e-5)
    assert merged(threshold=0.8) == pytest.approx(unit([[3, 0, 1], [0, 2.5, 1], [1, 1, 2]]), abs=1e-5)
    cross = merged(removed="cross", zero_diagonal=False)
    assert cross == pytest.approx(unit([[3, 0, 0], [0, 3.5, 1], [0, 1, 3]]), abs=1e-5)
    assert merged(removed="cross", threshold=0.8) == pytest.approx(unit(first), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"removed": "cross"}, {"threshold": 0.9}])
def test_what_is_added_is_orthogonal_to_what_is_there(make_source, options):
    vectors = {task: {"a": named["a"]} for task, named in tasks(2).items()}
    first, second = (named["a"] for named in vectors.values())
    merged = run(make_source, vectors, ["a"], **options)["a"]
    raw = merged / np.linalg.norm(merged)
    # The total is the first task vector plus something orthogonal to it.
    raw = raw * np.sum(first * first) / np.sum(first * raw)
    assert abs(np.sum((raw - first) * first)) < 1e-4
    assert np.linalg.norm(raw - first) > 0.1 * np.linalg.norm(second)


def test_the_result_has_the_mean_norm_of_the_task_vectors(make_source):
    vectors = tasks(3)
    found = length(run(make_source, vectors))
    assert found == pytest.approx(np.mean([length(named) for named in vectors.values()]), rel=1e-6)


def test_rank_deficient_totals_lose_the_diagonal_of_their_own_directions_only(make_source):
    # All singular vectors but the first are arbitrary, so only the first pair may matter.
    first, second = np.zeros((4, 3)), np.arange(1.0, 13.0).reshape(4, 3)
    first[0, 0] = 2.0
    found = run(make_source, {"x": {"w": first}, "y": {"w": second}}, ["w"])["w"]
    expected = first + second
    expected[0, 0] = 2.0
    assert found / np.linalg.norm(found) == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)


def test_after_nothing_an_expert_is_added_as_it_is(make_source):
    vectors = {"still": {"w": np.zeros((3, 2))}, "x": {"w": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]}}
    found = run(make_source, vectors, ["w"])["w"]
    assert found == pytest.approx(0.5 * np.array(vectors["x"]["w"]), abs=1e-6)


@pytest.mark.parametrize("second", [0.0, -1.0])
def test_where_nothing_is_left_nothing_is_merged(make_source, second):
    first = np.array([0.0, 0.0]) if second == 0 else np.array([3.0, 4.0])
    method = Opcm()
    merged = merge(method, make_source({"x": {"b": first}, "y": {"b": second * first}})).vectors["b"]
    assert merged.tolist() == [0.0, 0.0]
    assert method.state()["divisor"] == 1.0


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"zero_diagonal": False}, {"removed": "cross"}])
def test_adding_experts_to_a_merged_model_is_merging_all_in_order(make_source, at_once, options):
    vectors = tasks(5)
    random = np.random.default_rng(8)
    base = {name: random.standard_normal(shape) for name, shape in SHAPES.items()}
    names = list(vectors)
    first, rest = names[:2], names[2:]

    def source(named):
        return make_source(named, base=base, matrices=MATRICES)

    method = Opcm(OpcmOptions(**options))
    merged = merge(method, source({task: vectors[task] for task in first})).vectors
    for start in range(0, len(rest), at_once):
        state = method.state()
        method = Opcm(OpcmOptions(**options))
        method.start_from(state)
        new = {task: vectors[task] for task in rest[start : start + at_once]}
        merged = merge(method, source({"so far": {name: v.numpy() for name, v in merged.items()}} | new)).vectors
    whole = Opcm(OpcmOptions(**options))
    expected = merge(whole, source(vectors)).vectors
    for name in SHAPES:
        assert merged[name].numpy() == pytest.approx(expected[name].numpy(), rel=1e-4, abs=1e-5)
    grown, expected_state = method.state(), whole.state()
    assert grown.pop("method") == expected_state.pop("method") == "opcm"
    assert grown == pytest.approx(expected_state, rel=1e-5)


def test_the_state_by_hand(make_source):
    vectors = {"x": {"b": [3.0, 4.0]}, "y": {"b": [0.0, 5.0]}}
    method = Opcm()
    found = merge(method, make_source(vectors)).vectors["b"]
    assert found.tolist() == pytest.approx([3 * 5 / np.hypot(3, 9), 9 * 5 / np.hypot(3, 9)])
    state = method.state()
    assert (state["method"], state["merged"], state["norms"]) == ("opcm", 2, 10.0)
    assert state["divisor"] == pytest.approx(np.hypot(3, 9) / 5)


def test_the_published_defaults():
    options = OpcmOptions()
    assert (options.threshold, options.zero_diagonal, options.removed) == (0.5, True, "block")
    assert Opcm.default_scale is None
    assert Opcm.ordered


@pytest.mark.parametrize("wrong", [{"threshold": -0.1}, {"threshold": 1.1}, {"removed": "rows"}])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        OpcmOptions(**wrong)
