import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pave_lightning.merging import merge
from pave_lightning.merging.methods.wudi import Swudi, SwudiOptions, Wudi, WudiOptions

SHAPES = [(4, 6), (6, 4), (2, 30), (1, 1)]


def tasks(shape, count=3, seed=0, scale=1.0):
    random = np.random.default_rng(seed)
    return {f"task{index}": {"w": scale * (0.2 + random.standard_normal(shape))} for index in range(count)}


def slope(merged, vectors):
    """Gradient of the interference, task by task as the loss is written."""
    total = np.zeros_like(merged)
    for vector in vectors:
        if np.any(vector):
            total += 2 * (merged - vector) @ vector.T @ vector / np.sum(vector**2)
    return total


def interference(merged, vectors):
    return sum(np.sum(((merged - vector) @ vector.T) ** 2) / np.sum(vector**2) for vector in vectors)


def adam(vectors, steps, rate, epsilon):
    value, first, second = np.sum(vectors, axis=0), 0.0, 0.0
    for step in range(1, steps + 1):
        gradient = slope(value, vectors)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        value = value - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + epsilon)
    return value


def flow(vectors, time):
    """Gradient flow by fourth-order Runge-Kutta, its time in units of the largest eigenvalue's inverse."""
    normal = sum(vector.T @ vector / np.sum(vector**2) for vector in vectors)
    pieces = int(400 * max(time, 1))
    step = time / np.linalg.norm(normal, 2) / pieces
    value = np.sum(vectors, axis=0)
    for _ in range(pieces):
        one = slope(value, vectors)
        two = slope(value - step / 2 * one, vectors)
        three = slope(value - step / 2 * two, vectors)
        four = slope(value - step * three, vectors)
        value = value - step / 6 * (one + 2 * two + 2 * three + four)
    return value


def run(make_source, method, vectors):
    return merge(method, make_source(vectors, matrices=["w"])).vectors["w"].numpy()


def plain(vectors):
    return [named["w"] for named in vectors.values()]


@pytest.mark.parametrize("shape", SHAPES)
def test_wudi_as_the_plain_reference(make_source, shape):
    vectors = tasks(shape)
    rate = 0.05 * np.mean(np.abs(plain(vectors)))
    found = run(make_source, Wudi(), vectors)
    assert found == pytest.approx(adam(plain(vectors), 300, rate, 1e-3 * rate), rel=1e-3, abs=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_absolute_step_is_the_published_form(make_source, shape):
    vectors = tasks(shape, scale=3e-4)
    found = run(make_source, Wudi(WudiOptions(absolute_step=2e-5, steps=120)), vectors)
    assert found == pytest.approx(adam(plain(vectors), 120, 2e-5, 1e-8), rel=1e-3, abs=1e-6)


def test_the_default_step_is_the_published_one_at_the_magnitude_it_was_published_for(make_source):
    vectors = tasks((5, 7))
    mean = np.mean(np.abs(plain(vectors)))
    vectors = {task: {"w": named["w"] * 2e-4 / mean} for task, named in vectors.items()}
    relative = run(make_source, Wudi(), vectors)
    published = run(make_source, Wudi(WudiOptions(absolute_step=1e-5)), vectors)
    assert relative == pytest.approx(published, rel=1e-4, abs=1e-8)
    assert np.abs(relative - np.sum(plain(vectors), axis=0)).max() > 1e-5


def test_one_step_by_hand(make_source):
    # D = 4, A = 2, B = 4: the gradient is 8, so Adam's first step goes down by 0.05 of the mean magnitude 2.
    vectors = {"a": {"w": [[1.0]]}, "b": {"w": [[3.0]]}}
    assert run(make_source, Wudi(WudiOptions(steps=1)), vectors).item() == pytest.approx(3.9, abs=1e-4)


@pytest.mark.parametrize("method", [Wudi, Swudi])
def test_the_interference_falls(make_source, method):
    vectors = tasks((6, 9))
    before = interference(np.sum(plain(vectors), axis=0), plain(vectors))
    assert interference(run(make_source, method(), vectors), plain(vectors)) < 0.3 * before


@pytest.mark.parametrize("method", [Wudi, Swudi])
def test_other_parameters_stay_at_the_base_unless_asked(make_source, random_vectors, method):
    source = make_source(random_vectors, matrices=["a"])
    merged = merge(method(), source).vectors
    assert not any(merged[name].any() for name in "bcd")
    mean = merge(method(method.Options(others="mean")), source).vectors
    assert mean["b"].numpy() == pytest.approx(sum(named["b"] for named in random_vectors.values()) / 3, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("time", [0.3, 3.0])
def test_swudi_is_the_flow_stopped_in_time(make_source, shape, time):
    vectors = tasks(shape)
    found = run(make_source, Swudi(SwudiOptions(time=time)), vectors)
    assert found == pytest.approx(flow(plain(vectors), time), abs=1e-5)


def test_swudi_by_hand(make_source):
    # D0 = 4, A = 2, B = 4, so the distance 2 to the minimum 2 shrinks by exp(-2 time).
    vectors = {"a": {"w": [[1.0]]}, "b": {"w": [[3.0]]}}
    found = run(make_source, Swudi(SwudiOptions(time=0.25)), vectors)
    assert found.item() == pytest.approx(2 + 2 * np.exp(-0.5))


def test_swudi_without_time_is_the_sum_and_with_much_the_minimum(make_source):
    vectors = tasks((3, 5))
    parts = plain(vectors)
    assert run(make_source, Swudi(SwudiOptions(time=0)), vectors) == pytest.approx(np.sum(parts, axis=0), abs=1e-6)
    normal = sum(vector.T @ vector / np.sum(vector**2) for vector in parts)
    target = sum(vector @ vector.T @ vector / np.sum(vector**2) for vector in parts)
    found = run(make_source, Swudi(SwudiOptions(time=1e9)), vectors)
    assert found == pytest.approx(target @ np.linalg.pinv(normal), abs=1e-5)


def test_swudi_leaves_alone_what_no_task_vector_reads_from(make_source):
    random = np.random.default_rng(4)
    basis = np.linalg.qr(random.standard_normal((7, 7)))[0]
    vectors = {task: {"w": random.standard_normal((2, 3)) @ basis[:3]} for task in "ab"}
    for time in (0.0, 1.0, 1e12):
        found = run(make_source, Swudi(SwudiOptions(time=time)), vectors)
        assert np.isfinite(found).all()
        assert found @ basis[3:].T == pytest.approx(np.zeros((2, 4)), abs=1e-5)


@pytest.mark.parametrize("rest", ["sum", "zero"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_swudi_follows_the_largest_eigenvectors_only(make_source, rest, count):
    vectors = tasks((6, 4))
    normal = sum(vector.T @ vector / np.sum(vector**2) for vector in plain(vectors))
    order = np.linalg.eigh(normal)[1][:, ::-1]
    whole = run(make_source, Swudi(), vectors)
    found = run(make_source, Swudi(SwudiOptions(directions=count, rest=rest)), vectors)
    assert found @ order[:, :count] == pytest.approx(whole @ order[:, :count], abs=1e-5)
    left = np.sum(plain(vectors), axis=0) @ order[:, count:]
    assert found @ order[:, count:] == pytest.approx(left if rest == "sum" else 0 * left, abs=1e-5)


def test_more_directions_than_there_are_change_nothing(make_source):
    vectors = tasks((3, 4))
    found = run(make_source, Swudi(SwudiOptions(directions=99, rest="zero")), vectors)
    assert found == pytest.approx(run(make_source, Swudi(), vectors), abs=1e-6)


def test_the_published_defaults():
    options = WudiOptions()
    assert (options.steps, options.others, options.step * 2e-4) == (300, "base", pytest.approx(1e-5))
    assert (Wudi.default_scale, Swudi.default_scale) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (WudiOptions, {"steps": -1}),
        (WudiOptions, {"step": 0}),
        (WudiOptions, {"absolute_step": 0}),
        (SwudiOptions, {"time": -1}),
        (SwudiOptions, {"directions": 0}),
        (SwudiOptions, {"rest": "mean"}),
    ],
)
def test_impossible_options_are_refused(options, wrong):
    with pytest.raises(ValidationError):
        options(**wrong)


def test_the_steps_need_no_graph(make_source):
    with torch.inference_mode(False):
        merged = merge(Wudi(), make_source(tasks((3, 3)), matrices=["w"])).vectors["w"]
    assert not merged.requires_grad
