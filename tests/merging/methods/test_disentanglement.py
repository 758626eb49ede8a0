import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pave_lightning.merging import merge
from pave_lightning.merging.methods.disentanglement import Awd, AwdOptions
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic

SHAPES = {"a": (4, 3), "b": (5,), "c": (2, 2, 2), "d": ()}


def tasks(count=3, seed=0, scale=0.4, shared=0.5):
    """Task vectors of norms about 2.5 that have something in common."""
    random = np.random.default_rng(seed)
    common = {name: random.standard_normal(shape) for name, shape in SHAPES.items()}
    return {
        f"task{index}": {
            name: scale * (shared * common[name] + random.standard_normal(shape)) for name, shape in SHAPES.items()
        }
        for index in range(count)
    }


def flattened(vectors):
    return np.stack([np.concatenate([np.ravel(named[name]) for name in sorted(named)]) for named in vectors.values()])


def cosines(rows):
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return (unit @ unit.T)[~np.eye(len(rows), dtype=bool)]


def redundant(rows, *, iterations=300, step=0.01, penalty=0.1, start=0.0):
    """Gradient descent over the whole vector, gradients from autograd."""
    vectors = torch.tensor(rows)
    delta = (start * vectors.mean(dim=0)).requires_grad_()
    for _ in range(iterations):
        rest = vectors - delta
        inner = rest @ rest.T / (rest.norm(dim=1)[:, None] * rest.norm(dim=1))
        loss = (inner.abs().sum() - inner.diagonal().abs().sum()) / (len(rows) * (len(rows) - 1))
        if bool(delta.detach().any()):
            loss = loss + penalty * delta.norm()
        (gradient,) = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            delta -= step * gradient
    return delta.detach().numpy()


def run(make_source, vectors, source_options=None, **options):
    merged = merge(Awd(AwdOptions(**options)), make_source(vectors, **(source_options or {}))).vectors
    return np.concatenate([merged[name].numpy().ravel() for name in sorted(merged)])


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("shared", [0.0, 0.5, 2.0])
def test_as_descent_over_the_whole_vector(make_source, count, shared):
    # Where the cosines have reached zero their signs alternate, and with them what rounding decides.
    vectors = tasks(count, shared=shared)
    rows = flattened(vectors)
    iterations = 60
    delta = redundant(rows, iterations=iterations)
    assert np.linalg.norm(delta) > 0.02
    found = run(make_source, vectors, reference_norm=None, iterations=iterations)
    assert found == pytest.approx(rows.sum(axis=0) - count * delta, abs=1e-5)


def test_other_steps_penalties_and_starts(make_source):
    vectors = tasks(seed=4)
    rows = flattened(vectors)
    for options in ({"step": 0.03}, {"penalty": 0.0}, {"penalty": 0.25}, {"start": 0.4}, {"start": -0.2}):
        delta = redundant(rows, iterations=40, **options)
        found = run(make_source, vectors, reference_norm=None, iterations=40, **options)
        assert found == pytest.approx(rows.sum(axis=0) - 3 * delta, abs=1e-5)


def test_the_reference_norm_is_the_mean_norm_for_the_search(make_source):
    vectors = tasks(seed=2, scale=0.01)
    rows = flattened(vectors)
    factor = 2.5 / np.linalg.norm(rows, axis=1).mean()
    delta = redundant(factor * rows, iterations=50) / factor
    assert run(make_source, vectors, iterations=50) == pytest.approx(rows.sum(axis=0) - 3 * delta, abs=1e-6)


def test_what_is_left_is_more_orthogonal(make_source):
    vectors = tasks(4, shared=1.5)
    rows = flattened(vectors)
    # One task's weight in the merged vector is 1 - T c: so c, and from it what is left of every task vector.
    method = Awd()
    merge(method, make_source(vectors))
    shares = np.array([(1 - method.weights[task]) / 4 for task in vectors])
    left = rows - shares @ rows
    assert np.abs(cosines(left)).mean() < 0.5 * np.abs(cosines(rows)).mean()


def test_orthogonal_task_vectors_are_added_up(make_source):
    vectors = {"x": {"w": [2.0, 0.0, 0.0]}, "y": {"w": [0.0, 3.0, 0.0]}, "z": {"w": [0.0, 0.0, 1.0]}}
    assert run(make_source, vectors).tolist() == [2.0, 3.0, 1.0]


def test_one_step_by_hand(make_source):
    # The cosine of (1, 0) and (1, 1) is r = 1 / sqrt 2. Its gradient by delta is -(v1 + v2) r + r v1 + r v2 / 2, which
    # is -r v2 / 2, so a step of 0.1 gives delta = 0.05 r v2.
    vectors = {"x": {"w": [1.0, 0.0]}, "y": {"w": [1.0, 1.0]}}
    found = run(make_source, vectors, reference_norm=None, iterations=1, step=0.1)
    part = 2 * 0.05 / np.sqrt(2)
    assert found.tolist() == pytest.approx([2 - part, 1 - part])


def test_a_start_without_iterations(make_source):
    vectors = tasks()
    found = run(make_source, vectors, iterations=0, start=0.3)
    assert found == pytest.approx(0.7 * flattened(vectors).sum(axis=0), abs=1e-6)


def test_a_strong_penalty_keeps_the_redundant_vector_short(make_source):
    vectors = tasks(shared=2.0)
    total = flattened(vectors).sum(axis=0)
    # Each step undoes the one before, so one step away from zero is all there ever is.
    once = run(make_source, vectors, iterations=1, penalty=1e6)
    long = run(make_source, vectors, iterations=300, penalty=1e6)
    assert np.linalg.norm(long - total) < 1.5 * np.linalg.norm(once - total)


def test_what_is_zero_but_for_rounding_has_no_angle(make_source):
    # The redundant vector begins as all there is. The penalty takes 0.001 of a length of 2.5 back in each of 300 steps.
    one = tasks()["task0"]
    found = run(make_source, {"x": one, "y": one, "z": one}, start=1.0)
    assert found == pytest.approx(3 * 300 * 0.001 / 2.5 * flattened({"x": one})[0], abs=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-3])
@pytest.mark.parametrize("options", [{}, {"iterations": 1000}, {"reference_norm": None}])
def test_a_task_vector_of_hardly_any_length_leaves_the_others_alone(make_source, size, options):
    vectors = tasks(2, seed=3)
    short = {name: size * value for name, value in tasks(1, seed=8)["task0"].items()}
    expected = run(make_source, vectors, **options) + flattened({"short": short})[0]
    assert run(make_source, vectors | {"short": short}, **options) == pytest.approx(expected, abs=1e-6)
    assert run(make_source, {"one": vectors["task0"], "short": short}) == pytest.approx(
        flattened(vectors)[0] + flattened({"short": short})[0], abs=1e-6
    )


def test_a_zero_task_vector_has_no_angle(make_source):
    # A search in which it took part found weights of 1e45 here.
    vectors = {"a": {"w": np.zeros(4)}, "b": {"w": [-2.0, -3.0, 3.0, 0.0]}, "c": {"w": [0.0, 3.0, -2.0, 3.0]}}
    assert np.isfinite(run(make_source, vectors)).all()
    vectors = tasks(2) | {"still": {name: np.zeros(shape) for name, shape in SHAPES.items()}}
    still = dict.fromkeys(vectors, vectors["still"])
    assert not run(make_source, still).any()
    assert not run(make_source, still, start=0.5).any()


def test_the_published_defaults():
    options = AwdOptions()
    assert (options.iterations, options.step, options.penalty, options.start) == (300, 0.01, 0.1, 0.0)
    assert Awd.default_scale == TaskArithmetic.default_scale


@pytest.mark.parametrize("wrong", [{"iterations": -1}, {"step": 0}, {"penalty": -0.1}, {"reference_norm": 0}])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        AwdOptions(**wrong)
