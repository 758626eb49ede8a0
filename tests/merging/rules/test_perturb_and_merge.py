import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pave_lightning.errors import PaveError
from pave_lightning.merging import Evidence, merge
from pave_lightning.merging.rules import perturb_and_merge as module
from pave_lightning.merging.rules.perturb_and_merge import PerturbAndMerge, PerturbAndMergeOptions, expert_weights
from pave_lightning.statistics.gradients import TaskGradients


def evidence_of(information):
    return Evidence(
        fisher={
            task: TaskGradients(
                "fisher", {name: torch.tensor(value, dtype=torch.float32) for name, value in named.items()}, examples=1
            )
            for task, named in information.items()
        }
    )


def run(source, information, per="model"):
    return merge(PerturbAndMerge(PerturbAndMergeOptions(per=per)), source, evidence_of(information)).vectors


def long(named):
    return np.concatenate([np.ravel(value) for _, value in sorted(named.items())]).astype(float)


def streamed(base, vectors, information):
    """One expert after the other on whole weights: sums of F and of F theta* are all that is kept of earlier ones."""
    merged, stiffness, pull = base.copy(), np.zeros_like(base), np.zeros_like(base)
    for number, (task, vector) in enumerate(vectors.items(), start=1):
        expert, fisher = base + vector, information[task]
        step = expert - merged
        stiffness, pull = stiffness + fisher, pull + fisher * expert
        curvature = step @ (stiffness * step)
        alpha = step @ (pull - stiffness * merged) / curvature if curvature > 1e-13 else 1 / number
        merged = merged + np.clip(alpha, 0, 1) * step
    return merged - base


@pytest.fixture
def random_information(random_vectors):
    random = np.random.default_rng(5)
    return {
        task: {name: 10.0 ** random.uniform(-9, 1, np.shape(value)) for name, value in named.items()}
        for task, named in random_vectors.items()
    }


def test_by_hand(make_source):
    vectors = {"a": {"v": [4.0], "w": [0.0]}, "b": {"v": [0.0], "w": [8.0]}}
    information = {"a": {"v": [1.0], "w": [1.0]}, "b": {"v": [3.0], "w": [0.0]}}
    # From (4, 0) by (-4, 8): what pulls is 3*4*4 = 48, what resists is 4*16 + 1*64 = 128, so the step is 3/8.
    found = run(make_source(vectors), information)
    assert (found["v"].tolist(), found["w"].tolist()) == ([2.5], [3.0])
    # For each tensor of its own: 3 * 16 of 4 * 16, and 0 of 64.
    found = run(make_source(vectors), information, per="tensor")
    assert (found["v"].tolist(), found["w"].tolist()) == ([1.0], [0.0])


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10_000), st.sampled_from([1, 4, 100]))
def test_as_streaming_through_the_experts(make_source, tasks, seed, elements):
    random = np.random.default_rng(seed)
    shapes = {"a": (5, 3), "b": (4,), "c": ()}
    base = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    # Alike in part, so that steps of all sizes occur, clamped ones too.
    common = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    vectors, information = {}, {}
    for index in range(tasks):
        kinship = random.normal(0, 2)
        vectors[str(index)] = {n: kinship * common[n] + random.standard_normal(shape) for n, shape in shapes.items()}
        information[str(index)] = {n: 10.0 ** random.uniform(-6, 0, shape) for n, shape in shapes.items()}
    found = run(make_source(vectors, base=base, elements=elements), information)
    expected = streamed(
        long(base), {t: long(v) for t, v in vectors.items()}, {t: long(v) for t, v in information.items()}
    )
    np.testing.assert_allclose(long(found), expected, atol=2e-5)
    found = run(make_source(vectors, base=base, elements=elements), information, per="tensor")
    for name in shapes:
        expected = streamed(
            np.ravel(base[name]),
            {t: np.ravel(v[name]) for t, v in vectors.items()},
            {t: np.ravel(v[name]) for t, v in information.items()},
        )
        np.testing.assert_allclose(found[name].numpy().ravel(), expected, atol=2e-5)


def test_every_step_is_the_best_of_its_line(make_source, random_vectors, random_information):
    order = list(random_vectors)
    vectors = {task: long(named) for task, named in random_vectors.items()}
    information = {task: long(named) for task, named in random_information.items()}
    before = vectors[order[0]]
    for count in (2, 3):
        seen = {task: random_vectors[task] for task in order[:count]}
        after = long(run(make_source(seen), random_information))
        line = [before + alpha * (vectors[order[count - 1]] - before) for alpha in np.linspace(0, 1, 2001)]
        cost = [sum(((point - vectors[task]) ** 2) @ information[task] for task in seen) for point in line]
        np.testing.assert_allclose(after, line[int(np.argmin(cost))], atol=2e-3)
        before = after


@pytest.mark.parametrize(
    ("third", "expected"), [([0.0, 2.0], [1.0, 1.0]), ([1.1, 0.9], [1.1, 0.9]), ([3.0, -1.0], [1.5, 0.5])]
)
def test_steps_neither_go_back_nor_beyond_the_next_expert(make_source, third, expected):
    # Between the first two, (1, 1) costs them least. There they gain by (1, -1), four for each unit, and lose by twice
    # the square of it: best is half a unit. The third does not care.
    vectors = {"a": {"v": [0.0, 0.0]}, "b": {"v": [2.0, 2.0]}, "c": {"v": third}}
    information = {"a": {"v": [1.0, 3.0]}, "b": {"v": [3.0, 1.0]}, "c": {"v": [0.0, 0.0]}}
    assert run(make_source(vectors), information)["v"].tolist() == pytest.approx(expected)


def test_the_weights_of_the_experts_add_up_to_one():
    # One element, task vectors 1 and 3, information 1 and 3: the second step goes three quarters of the way.
    outer = torch.tensor([[1.0, 3.0], [3.0, 9.0]], dtype=torch.float64)
    assert expert_weights(torch.stack([outer, 3 * outer])) == pytest.approx([0.25, 0.75])
    assert expert_weights(torch.zeros(4, 4, 4, dtype=torch.float64)) == pytest.approx([0.25] * 4)


def test_where_no_task_cares_it_is_the_mean(make_source, random_vectors):
    nothing = {task: {name: 0 * value for name, value in named.items()} for task, named in random_vectors.items()}
    for per in ("model", "tensor"):
        found = run(make_source(random_vectors), nothing, per)
        expected = np.mean([long(named) for named in random_vectors.values()], axis=0)
        np.testing.assert_allclose(long(found), expected, atol=1e-6)


def test_equal_information_gives_the_mean(make_source, random_vectors):
    equal = {task: {name: 0 * v + 0.7 for name, v in named.items()} for task, named in random_vectors.items()}
    expected = np.mean([long(named) for named in random_vectors.values()], axis=0)
    np.testing.assert_allclose(long(run(make_source(random_vectors), equal)), expected, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6])
def test_the_unit_of_the_information_does_not_matter(make_source, random_vectors, random_information, scale):
    scaled = {task: {n: scale * v for n, v in named.items()} for task, named in random_information.items()}
    first, second = (run(make_source(random_vectors), given) for given in (random_information, scaled))
    assert all(torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-6) for name in first)


def test_identical_experts_are_kept(make_source, random_vectors, random_information):
    source = make_source(dict.fromkeys(random_vectors, random_vectors["one"]))
    for per in ("model", "tensor"):
        for name, value in run(source, random_information, per).items():
            np.testing.assert_allclose(value.numpy(), random_vectors["one"][name], rtol=1e-6)


def test_the_order_of_the_tasks_matters(make_source, random_vectors, random_information):
    first = run(make_source(random_vectors), random_information)
    second = run(make_source(dict(reversed(random_vectors.items()))), random_information)
    assert PerturbAndMerge.ordered
    assert np.abs(long(first) - long(second)).max() > 1e-3


def test_chunks_do_not_matter(make_source, random_vectors, random_information, monkeypatch):
    whole = run(make_source(random_vectors), random_information)
    monkeypatch.setattr(module, "CHUNK", 4)
    parts = run(make_source(random_vectors), random_information)
    assert all(torch.allclose(whole[name], parts[name], rtol=1e-6) for name in whole)


def test_missing_information_is_told(make_source, random_vectors, random_information):
    del random_information["two"]
    with pytest.raises(PaveError, match="task 'two' has no Fisher information"):
        run(make_source(random_vectors), random_information)


def test_impossible_options():
    with pytest.raises(ValidationError):
        PerturbAndMergeOptions(per="layer")
