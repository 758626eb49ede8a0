import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pave_lightning.errors import PaveError
from pave_lightning.merging import Evidence, merge
from pave_lightning.merging.methods import perturb_and_merge as module
from pave_lightning.merging.methods.perturb_and_merge import (
    PerturbAndMerge,
    PerturbAndMergeOptions,
    Products,
    expert_weights,
)
from pave_lightning.statistics.gradients import TaskGradients
from pave_lightning.weights import Checkpoint, ShardWriter


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
    products = Products(2)
    products.curvatures[1] = 4 * torch.tensor([[1.0, 3.0], [3.0, 9.0]])
    products.pulls[1] = (1 * 1 + 3 * 3) * torch.tensor([1.0, 3.0])
    assert expert_weights(products) == pytest.approx([0.25, 0.75])
    assert expert_weights(Products(4)) == pytest.approx([0.25] * 4)
    assert expert_weights(Products(3), first=8) == pytest.approx([0.8, 0.1, 0.1])


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


def store(method, source, folder):
    """What the method keeps of all parameters, through files."""
    writers = {}
    for name in method.keeps:
        (folder / name).mkdir(parents=True)
        writers[name] = ShardWriter(folder / name, 40)
    for parameter in source.parameters:
        for name, tensor in method.kept(parameter, source).items():
            writers[name].add(parameter.name, tensor)
    for writer in writers.values():
        writer.close()
    return {name: Checkpoint(folder / name, "backbone") for name in method.keeps}


@pytest.fixture
def many():
    """Five experts, alike in part, so that steps of many sizes occur, a base, and the Fisher information."""
    random = np.random.default_rng(11)
    shapes = {"a": (5, 3), "b": (4,), "c": ()}
    base = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    common = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    vectors = {
        str(index): {n: kin * common[n] + random.standard_normal(shape) for n, shape in shapes.items()}
        for index, kin in enumerate((0.5, -1.0, 2.0, 0.1, -0.7))
    }
    information = {task: {n: 10.0 ** random.uniform(-4, 0, shape) for n, shape in shapes.items()} for task in vectors}
    return base, vectors, information


@pytest.mark.parametrize("per", ["model", "tensor"])
@pytest.mark.parametrize("scale", [None, 0.4])
@pytest.mark.parametrize(("held", "at_once"), [(2, 1), (3, 2), (2, 3)])
def test_adding_experts_is_merging_all(make_source, many, tmp_path, per, scale, held, at_once):
    base, vectors, information = many
    names, factor = list(vectors), 1.0 if scale is None else scale
    method = PerturbAndMerge(PerturbAndMergeOptions(per=per))
    source = make_source({task: vectors[task] for task in names[:held]}, base=base)
    result = merge(method, source, evidence_of(information)).vectors
    for start in range(held, 5, at_once):
        state, kept = json.loads(json.dumps(method.state(scale))), store(method, source, tmp_path / str(start))
        new = names[start : start + at_once]
        method = PerturbAndMerge(PerturbAndMergeOptions(per=per))
        method.start_from(state, kept)
        so_far = {"so far": {name: factor * value.numpy() for name, value in result.items()}}
        source = make_source(so_far | {task: vectors[task] for task in new}, base=base, elements=4)
        # Nothing is known any more of the data of earlier experts.
        result = merge(method, source, evidence_of({task: information[task] for task in new})).vectors
    assert method.merged() == 5
    groups = [[name] for name in base] if per == "tensor" else [sorted(base)]
    for group in groups:
        expected = streamed(
            long({n: base[n] for n in group}),
            {task: long({n: v[n] for n in group}) for task, v in vectors.items()},
            {task: long({n: f[n] for n in group}) for task, f in information.items()},
        )
        np.testing.assert_allclose(long({n: result[n].numpy() for n in group}), expected, atol=1e-5)


def test_what_is_kept_are_the_sums_over_all_experts(make_source, many, tmp_path, monkeypatch):
    base, vectors, information = many
    monkeypatch.setattr(module, "CHUNK", 2)
    method = PerturbAndMerge()
    source = make_source(vectors, base=base, elements=5)
    merge(method, source, evidence_of(information))
    kept = store(method, source, tmp_path)
    for name in base:
        stiffness = sum(information[task][name] for task in vectors)
        pull = sum(information[task][name] * vectors[task][name] for task in vectors)
        np.testing.assert_allclose(kept["information"].tensor(name).numpy(), stiffness, rtol=1e-6)
        np.testing.assert_allclose(kept["pull"].tensor(name).numpy(), pull, rtol=1e-5, atol=1e-7)


def test_an_expert_is_added_by_hand(make_source, tmp_path):
    # Two experts at 0 and 4 with information 1 and 1 were merged at 2; one with 2 at 8 draws to (4 + 16) / 4.
    for name, value in (("information", 2.0), ("pull", 4.0)):
        (tmp_path / name).mkdir()
        writer = ShardWriter(tmp_path / name)
        writer.add("v", torch.tensor([value]))
        writer.close()
    kept = {name: Checkpoint(tmp_path / name, "backbone") for name in ("information", "pull")}
    method = PerturbAndMerge()
    method.start_from({"method": "perturb_and_merge", "merged": 2, "divisor": 1.0}, kept)
    source = make_source({"so far": {"v": [2.0]}, "new": {"v": [8.0]}})
    assert merge(method, source, evidence_of({"new": {"v": [2.0]}})).vectors["v"].tolist() == pytest.approx([5.0])


def test_an_expert_is_added_to_a_mean_where_no_task_cares(make_source, many, tmp_path):
    base, vectors, information = many
    nothing = {task: {name: 0 * value for name, value in named.items()} for task, named in information.items()}
    method, later = PerturbAndMerge(), PerturbAndMerge()
    source = make_source({task: vectors[task] for task in "0123"}, base=base)
    so_far = {name: value.numpy() for name, value in merge(method, source, evidence_of(nothing)).vectors.items()}
    later.start_from(method.state(), store(method, source, tmp_path))
    found = merge(later, make_source({"so far": so_far, "4": vectors["4"]}, base=base), evidence_of(nothing)).vectors
    for name in base:
        expected = np.mean([named[name] for named in vectors.values()], axis=0)
        np.testing.assert_allclose(found[name].numpy(), expected, atol=1e-6)


def test_mistakes_in_adding_are_told(make_source, many, tmp_path):
    base, vectors, information = many
    method = PerturbAndMerge()
    source = make_source({task: vectors[task] for task in "01"}, base=base)
    merge(method, source, evidence_of(information))
    state, kept = method.state(), store(method, source, tmp_path / "good")
    with pytest.raises(PaveError, match="but this was not given: information, pull; merge all experts again"):
        PerturbAndMerge().start_from(state)
    with pytest.raises(PaveError, match="but this was not given: pull; merge all"):
        PerturbAndMerge().start_from(state, {"information": kept["information"]})

    def add(given, known="2"):
        later = PerturbAndMerge()
        later.start_from(state, given)
        merge(later, make_source({"so far": vectors["0"], "2": vectors["2"]}), evidence_of({known: information["2"]}))

    add(kept)
    with pytest.raises(PaveError, match=r"experts:\n  - task '2' has no Fisher information; [^\n]*$"):
        add(kept, known="so far")
    for name, values in (("short", {"a": torch.zeros(5, 2)}), ("broken", {"a": torch.full((5, 3), np.nan)})):
        (tmp_path / name).mkdir()
        writer = ShardWriter(tmp_path / name)
        for key in base:
            writer.add(key, values.get(key, torch.zeros(base[key].shape)))
        writer.close()
    with pytest.raises(PaveError, match="short: the 'pull' of 1 parameters, such as a, is missing or of another shape"):
        add({**kept, "pull": Checkpoint(tmp_path / "short", "backbone")})
    with pytest.raises(PaveError, match="broken: what was kept of a holds NaN or infinity; merge all again"):
        add({**kept, "pull": Checkpoint(tmp_path / "broken", "backbone")})
