import numpy as np
import pytest

from pave_lightning.errors import PaveError
from pave_lightning.merging import merge
from pave_lightning.merging.methods import cat
from pave_lightning.merging.methods.cat import Cat, CatOptions
from pave_lightning.weights import ParameterKind

TASKS = ("a", "b", "c")
KINDS = {"scale": ParameterKind.NORM_SCALE, "shift": ParameterKind.NORM_SHIFT, "bias": ParameterKind.BIAS}


def drawn(seed=0, d_out=8, d_in=5):
    random = np.random.default_rng(seed)
    vectors = {task: {"w": random.standard_normal((d_out, d_in))} for task in TASKS}
    # Each task looks mostly at inputs of its own, so that the others disturb it more than they use these inputs.
    sizes = {task: 10.0 ** -np.roll(np.arange(d_in), 2 * index) for index, task in enumerate(TASKS)}
    return vectors, {task: {"w": random.standard_normal((30, d_in)) * sizes[task]} for task in TASKS}


def disturbing(vectors, inputs, victim, count, own_weight):
    """Directions of the outputs in which the others change the victim's features and hardly their own."""
    x, score = inputs[victim]["w"], 0
    for task in vectors:
        if task != victim:
            other = x @ vectors[task]["w"].T / np.sqrt(len(x))
            own = inputs[task]["w"] @ vectors[task]["w"].T / np.sqrt(len(inputs[task]["w"]))
            score = score + other.T @ other - own_weight * own.T @ own
    values, directions = np.linalg.eigh(score)
    order = np.argsort(values)[::-1][:count]
    return directions[:, [index for index in order if values[index] > 0]]


def reference(vectors, inputs, count=1, own_weight=5.0, *, together=True):
    found = 0
    for task in vectors:
        update = vectors[task]["w"]
        bases = [disturbing(vectors, inputs, victim, count, own_weight) for victim in sorted(vectors) if victim != task]
        for basis in [np.concatenate(bases, axis=1)] if together else bases:
            left = update - basis @ np.linalg.pinv(basis) @ update
            update = left * np.linalg.norm(update) / np.linalg.norm(left)
        found = found + update
    return found


def run(source, evidence, **options):
    merged = merge(Cat(CatOptions(**options)), source, evidence).vectors
    return {name: vector.numpy() for name, vector in merged.items()}


@pytest.mark.parametrize("removal", ["together", "one_by_one"])
@pytest.mark.parametrize(("count", "own_weight"), [(1, 5.0), (3, 0.5), (2, 0.0)])
@pytest.mark.parametrize(("d_out", "d_in"), [(8, 5), (20, 5), (8, 12)])
def test_matrices_as_from_the_features_themselves(make_source, make_evidence, removal, count, own_weight, d_out, d_in):
    vectors, inputs = drawn(1, d_out, d_in)
    source = make_source(vectors, matrices=["w"])
    found = run(source, make_evidence(inputs), directions=count, own_weight=own_weight, removal=removal)["w"]
    expected = reference(vectors, inputs, count, own_weight, together=removal == "together")
    assert np.allclose(found, expected, atol=1e-4)
    assert not np.allclose(found, sum(named["w"] for named in vectors.values()), atol=0.1)


@pytest.mark.parametrize(("d_out", "order"), [(40, 15), (15, 15), (12, 12)])
def test_eigenvalue_problems_are_no_larger_than_what_all_tasks_span(
    make_source, make_evidence, monkeypatch, d_out, order
):
    orders, plain = [], cat.symmetric_eigen
    monkeypatch.setattr(cat, "symmetric_eigen", lambda matrix: orders.append(len(matrix)) or plain(matrix))
    vectors, inputs = drawn(1, d_out)
    run(make_source(vectors, matrices=["w"]), make_evidence(inputs))
    assert orders == [order] * 3


def test_the_two_ways_of_removal_differ(make_source, make_evidence):
    vectors, inputs = drawn(1)
    source, evidence = make_source(vectors, matrices=["w"]), make_evidence(inputs)
    ways = [run(source, evidence, directions=2, own_weight=0, removal=way)["w"] for way in ("together", "one_by_one")]
    assert not np.allclose(*ways, atol=0.01)


def test_by_hand(make_source, make_evidence):
    # Only a's first input is ever used. b moves output 2 strongly and output 1 a little there, on its own inputs never.
    vectors = {"a": {"w": [[1.0, 0.0], [0.0, 0.0]]}, "b": {"w": [[0.3, 0.0], [0.4, 0.0]]}}
    inputs = {"a": {"w": [[1.0, 0.0]]}, "b": {"w": [[0.0, 1.0]]}}
    source, evidence = make_source(vectors, matrices=["w"]), make_evidence(inputs)
    # Its direction (0.6, 0.8) is all that b has in that place: nothing is left of b, and a is left alone.
    assert run(source, evidence)["w"] == pytest.approx(np.array([[1.0, 0.0], [0.0, 0.0]]))
    # Where b uses that input more than a does, b's own features protect it, and a, which disturbs them, is cut instead.
    shared = make_evidence({"a": {"w": [[1.0, 0.0]]}, "b": {"w": [[2.0, 1.0]]}})
    assert run(source, shared, own_weight=0.3)["w"] == pytest.approx(np.array([[0.3, 0.0], [0.4, 0.0]]))


def test_norms_are_restored(make_source, make_evidence):
    vectors, inputs = drawn(2)
    only = {task: {"w": named["w"] if task == "b" else 0 * named["w"]} for task, named in vectors.items()}
    found = run(make_source(only, matrices=["w"]), make_evidence(inputs), directions=1, own_weight=0.1)["w"]
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(vectors["b"]["w"]), rel=1e-5)
    assert not np.allclose(found, vectors["b"]["w"], atol=0.1)


def test_without_directions_updates_are_added_up(make_source, make_evidence):
    vectors, inputs = drawn(4)
    source, total = make_source(vectors, matrices=["w"]), sum(named["w"] for named in vectors.values())
    assert np.allclose(run(source, make_evidence(inputs), directions=0)["w"], total, atol=1e-5)
    # Nobody's features are known; or every change counts for more on the task's own features.
    assert np.allclose(run(source, make_evidence({task: {} for task in TASKS}))["w"], total, atol=1e-5)
    assert np.allclose(run(source, make_evidence(inputs), own_weight=1e9)["w"], total, atol=1e-5)


def test_a_task_that_did_not_reach_a_layer_is_not_disturbed_there(make_source, make_evidence):
    vectors, inputs = drawn(5)
    two = {task: inputs[task] for task in ("a", "c")}
    found = run(make_source(vectors, matrices=["w"]), make_evidence(two | {"b": {}}), directions=1, own_weight=0.0)["w"]
    cut = {task: disturbing(vectors, inputs, task, 1, 0.0) for task in ("a", "c")}
    expected = 0
    for task, victims in (("a", ["c"]), ("b", ["a", "c"]), ("c", ["a"])):
        basis = np.concatenate([cut[victim] for victim in victims], axis=1)
        left = vectors[task]["w"] - basis @ np.linalg.pinv(basis) @ vectors[task]["w"]
        expected = expected + left * np.linalg.norm(vectors[task]["w"]) / np.linalg.norm(left)
    assert np.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("removal", ["together", "one_by_one"])
def test_where_everything_disturbs_nothing_is_left(make_source, make_evidence, removal):
    random = np.random.default_rng(0)
    vectors = {task: {"w": random.standard_normal((3, 5))} for task in TASKS}
    inputs = {task: {"w": random.standard_normal((20, 5))} for task in TASKS}
    found = run(
        make_source(vectors, matrices=["w"]), make_evidence(inputs), directions=3, own_weight=0, removal=removal
    )["w"]
    assert not found.any()


def test_scales_of_norms(make_source, make_evidence):
    vectors = {"a": {"scale": [1.0, 0.5, 2.0]}, "b": {"scale": [2.0, 1.0, 2.0]}}
    norms = {"a": {"scale": [[1.0, 3.0, 1.0]]}, "b": {"scale": [[0.1, 1.0, 1.0]]}}
    source, evidence = make_source(vectors, kinds=KINDS), make_evidence({"a": {}, "b": {}}, norms)
    # b disturbs a by tau_b^2 (m_a - 2 m_b) = 4 * 0.98, 1 * 7, 4 * -1; a disturbs b by 1 * -1.99, -, -.
    left = np.array([2.0, 0.0, 2.0]) * 3 / np.sqrt(8)
    found = run(source, evidence, norm_channels=1, norm_own_weight=2.0)["scale"]
    assert found == pytest.approx(np.array([1.0, 0.5, 2.0]) + left)
    # The third channel is never cut, because it disturbs less than it helps.
    found = run(source, evidence, norm_channels=3, norm_own_weight=2.0)["scale"]
    assert found == pytest.approx([1.0, 0.5, 5.0])
    assert run(source, evidence, norms="whole")["scale"] == pytest.approx([3.0, 1.5, 4.0])


def test_norms_that_were_not_reached_are_left_whole(make_source, make_evidence):
    vectors = {task: {"other": [1.0], "scale": [float(index)]} for index, task in enumerate(TASKS)}
    source = make_source(vectors, kinds=KINDS | {"other": ParameterKind.NORM_SCALE})
    norms = {task: {"other": [[1.0]]} for task in TASKS}
    assert run(source, make_evidence({task: {} for task in TASKS}, norms))["scale"].tolist() == [3.0]


def test_biases_and_shifts_are_judged_by_the_updates_that_disturb(make_source, make_evidence):
    vectors = {
        "a": {"bias": [9.0, 0.0, 1.0], "shift": [0.0, 0.0, 0.0]},
        "b": {"bias": [1.0, 2.0, 0.0], "shift": [1.0, 1.0, 1.0]},
        "c": {"bias": [0.0, 3.0, 1.0], "shift": [0.0, 0.0, 0.0]},
    }
    source = make_source(vectors, kinds=KINDS, elements=2)
    found = run(source, make_evidence({task: {} for task in TASKS}), bias_channels=1)
    # For a the second is cut from b and c; for b the first from a and c; for c the first from a and b.
    assert found["bias"].tolist() == [0.0, 0.0, 2.0]
    # Among equals the first goes first, and where nothing disturbs nothing is cut.
    assert found["shift"].tolist() == [0.0, 1.0, 1.0]


def test_all_else_is_added_up(make_source, make_evidence):
    vectors = {task: {"table": [[1.0, 2.0]]} for task in TASKS}
    source, evidence = make_source(vectors), make_evidence({task: {} for task in TASKS})
    assert run(source, evidence)["table"].tolist() == [[3.0, 6.0]]
    assert run(source, evidence, others="mean")["table"].tolist() == [[1.0, 2.0]]


def test_norms_need_their_moments_unless_they_are_left_whole(make_source, make_evidence):
    vectors = {"a": {"scale": [1.0, 5.0]}, "b": {"scale": [3.0, 1.0]}}
    source, evidence = make_source(vectors, kinds=KINDS), make_evidence({"a": {}, "b": {}})
    with pytest.raises(PaveError) as raised:
        run(source, evidence)
    assert "task 'a': the moments of what 1 norms scale are needed, such as scale" in str(raised.value)
    assert "the moments of norms are not needed with the option norms: whole" in str(raised.value)
    assert run(source, evidence, norms="whole")["scale"].tolist() == [4.0, 6.0]


def test_defaults_are_those_of_the_source():
    options = CatOptions()
    assert (options.directions, options.own_weight) == (4, 5.0)
    assert (options.norm_channels, options.norm_own_weight, options.bias_channels) == (4, 10.0, 4)
    assert (Cat.default_scale, options.others) == (0.4, "sum")
