import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.merging import merge
from pave_lightning.merging.methods import esm
from pave_lightning.merging.methods.esm import Esm, EsmOptions, essential_directions, kind_of_layer
from pave_lightning.weights import Parameter, ParameterKind

TASKS = ("a", "b", "c")


def drawn(seed=0, names=("w",), d_out=9, d_in=7, rows=40):
    random = np.random.default_rng(seed)
    vectors = {
        task: {name: (1 + index) * random.standard_normal((d_out, d_in)) for name in names}
        for index, task in enumerate(TASKS)
    }
    return vectors, {task: {name: random.standard_normal((rows, d_in)) for name in names} for task in TASKS}


def polar(matrix, keep):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right * (values.mean() if keep else 1)


def reference(vectors, inputs, name="w", *, tasks=True, columns=True, whole=False, exponent=0.0, keep=True):
    """The update of one layer, from singular value decompositions of the output changes themselves."""
    parts = []
    for task in inputs:
        update, x = vectors[task][name], inputs[task][name]
        _, values, right = np.linalg.svd(x @ update.T, full_matrices=False)
        count = len(update) // len(vectors)
        directions, energy = right[:count].T, values[:count] ** 2 / (len(x) - 1)
        coordinates = directions.T @ update
        norm = np.linalg.norm(update if whole else coordinates)
        weight = (energy / energy.mean()) ** exponent
        weight = weight / weight.mean()
        parts.append((directions * weight, coordinates * weight[:, None], norm))
    mean = np.mean([norm for _, _, norm in parts])
    left = np.concatenate([directions for directions, _, _ in parts], axis=1)
    right = np.concatenate([c * (norm / mean) ** 2 if tasks else c for _, c, norm in parts])
    if columns:
        lengths = np.sqrt((right**2).sum(axis=0))
        right = right * (lengths / lengths.mean()) ** 2
    return polar(left, keep) @ polar(right, keep)


def run(source, evidence, **options):
    merged = merge(Esm(EsmOptions(**options)), source, evidence).vectors
    return {name: vector.numpy() for name, vector in merged.items()}


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({}, {}),
        ({"scale_tasks": False}, {"tasks": False}),
        ({"scale_inputs": False}, {"columns": False}),
        ({"norm_of": "whole"}, {"whole": True}),
        ({"eigenvalue_exponent": 0.15}, {"exponent": 0.15}),
        ({"magnitude": "unit"}, {"keep": False}),
    ],
)
@pytest.mark.parametrize(("d_out", "d_in"), [(9, 7), (6, 12), (10, 4)])
def test_one_layer_as_the_steps_of_the_paper(make_source, make_evidence, options, facts, d_out, d_in):
    vectors, inputs = drawn(1, d_out=d_out, d_in=d_in)
    found = run(make_source(vectors, matrices=["w"]), make_evidence(inputs), **options)["w"]
    assert np.allclose(found, reference(vectors, inputs, **facts), atol=2e-4)


def test_by_hand_with_two_tasks_that_move_one_output_each(make_source, make_evidence):
    still = [[0.0, 0.0], [0.0, 0.0]]
    vectors = {"a": {"w": [[3.0, 0.0], [0.0, 0.0], *still]}, "b": {"w": [[0.0, 0.0], [0.0, 1.0], *still]}}
    inputs = {task: {"w": np.eye(2)} for task in vectors}
    source, evidence = make_source(vectors, matrices=["w"]), make_evidence(inputs)
    # Kept norms 3 and 1, so parts times 9/4 and 1/4; columns then of norm 27/4 and 1/4, mean 7/2, so times (27/14)^2
    # and (1/14)^2. Orthogonal already: both become the mean singular value.
    size = (27 / 4 * (27 / 14) ** 2 + 1 / 4 * (1 / 14) ** 2) / 2
    assert run(source, evidence)["w"] == pytest.approx(np.eye(4, 2) * size, rel=1e-5)
    plain = run(source, evidence, scale_tasks=False, scale_inputs=False)["w"]
    assert plain == pytest.approx(np.eye(4, 2) * 2.0)
    unit = run(source, evidence, magnitude="unit")["w"]
    assert unit == pytest.approx(np.eye(4, 2))


def test_only_directions_that_inputs_excite_are_kept(make_source, make_evidence):
    update = [[9.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    vectors = {"a": {"w": update}, "b": {"w": update}}
    # Nothing ever comes in through the first input, which has the larger weights.
    inputs = {task: {"w": [[0.0, 2.0]]} for task in vectors}
    found = run(make_source(vectors, matrices=["w"]), make_evidence(inputs), scale_inputs=False)["w"]
    assert not found[0].any()
    assert found[1, 1] > 0


def test_layers_are_scaled_by_their_norm_among_those_of_their_kind(make_source, make_evidence):
    names = ("block.0.up", "block.1.up", "block.1.down")
    vectors, inputs = drawn(2, names)
    source, evidence = make_source(vectors, matrices=names), make_evidence(inputs)
    plain, scaled = run(source, evidence, scale_layers=False), run(source, evidence)
    norms = {name: np.linalg.norm(reference(vectors, inputs, name)) for name in names}
    mean = (norms["block.0.up"] + norms["block.1.up"]) / 2
    for name, factor in (
        ("block.0.up", (norms["block.0.up"] / mean) ** 2),
        ("block.1.up", (norms["block.1.up"] / mean) ** 2),
        ("block.1.down", 1.0),
    ):
        assert np.allclose(plain[name], reference(vectors, inputs, name), atol=2e-4)
        assert np.allclose(scaled[name], factor * plain[name], rtol=1e-3, atol=1e-5)
    assert abs((norms["block.0.up"] / mean) ** 2 - 1) > 1e-3


def test_kinds_of_layers():
    def kind(name, shape=(4, 4)):
        return kind_of_layer(Parameter(f"{name}.weight", ParameterKind.LINEAR, shape, 1))

    query = kind("encoder.layer.0.attention.self.query")
    assert query == kind("encoder.layer.11.attention.self.query")
    assert query != kind("encoder.layer.0.attention.self.key")
    assert query != kind("encoder.layer.0.attention.self.query", (4, 8))
    assert kind("encoder.layer.0.attention.output.dense") != kind("encoder.layer.0.output.dense")


def test_a_task_that_changes_nothing_takes_no_part(make_source, make_evidence):
    vectors, inputs = drawn(4)
    vectors["b"]["w"] = 0 * vectors["b"]["w"]
    found = run(make_source(vectors, matrices=["w"]), make_evidence(inputs), scale_tasks=False)["w"]
    two = {task: inputs[task] for task in ("a", "c")}
    assert np.allclose(found, reference(vectors, two, tasks=False), atol=2e-4)


def test_tasks_that_did_not_reach_a_layer_have_no_directions_in_it(make_source, make_evidence):
    vectors, inputs = drawn(5)
    source = make_source(vectors, matrices=["w"])
    two = {task: inputs[task] for task in ("a", "c")}
    assert np.allclose(run(source, make_evidence(two | {"b": {}}))["w"], reference(vectors, two), atol=2e-4)
    nobody = run(source, make_evidence({task: {} for task in TASKS}))["w"]
    assert np.allclose(nobody, sum(named["w"] for named in vectors.values()) / 3, atol=1e-6)


@pytest.mark.parametrize("d_out", [2, 5])
def test_fewer_than_two_outputs_for_each_task(make_source, make_evidence, d_out):
    vectors, inputs = drawn(6, d_out=d_out)
    message = f"w is {d_out} x 7: its {d_out} outputs are fewer than two for each of 3 tasks; merge fewer tasks, or use"
    with pytest.raises(PaveError, match=message):
        run(make_source(vectors, matrices=["w"]), make_evidence(inputs))


def test_fewer_inputs_than_tasks(make_source, make_evidence):
    vectors, inputs = drawn(6, d_out=6, d_in=2)
    found = run(make_source(vectors, matrices=["w"]), make_evidence(inputs))["w"]
    assert np.allclose(found, reference(vectors, inputs), atol=2e-4)


@pytest.mark.parametrize(("d_out", "d_in", "count"), [(90, 40, 11), (90, 40, 45), (12, 5, 3), (40, 40, 9), (30, 50, 7)])
def test_directions_are_those_of_the_whole_moment_of_output_changes(d_out, d_in, count):
    random = np.random.default_rng(d_out)
    update, inputs = random.standard_normal((d_out, d_in)), random.standard_normal((200, d_in))
    moment = inputs.T @ inputs / 199
    values, vectors = np.linalg.eigh(update @ moment @ update.T)
    kept = min(count, d_in)
    expected, leading = vectors[:, ::-1][:, :kept], values[::-1][:kept]
    found, sizes = essential_directions(torch.tensor(update), torch.tensor(moment), count)
    assert np.allclose(sizes.numpy(), leading, rtol=1e-10)
    assert np.abs(found.numpy() @ found.numpy().T - expected @ expected.T).max() < 1e-12
    assert np.abs(found.numpy().T @ found.numpy() - np.eye(kept)).max() < 1e-12


@pytest.mark.parametrize(("d_out", "d_in"), [(40, 7), (7, 40)])
def test_eigenvalue_problems_are_of_the_smaller_side(monkeypatch, d_out, d_in):
    orders, plain = [], esm.symmetric_eigen
    monkeypatch.setattr(esm, "symmetric_eigen", lambda matrix: orders.append(len(matrix)) or plain(matrix))
    essential_directions(torch.randn(d_out, d_in).double(), torch.eye(d_in).double(), 3)
    assert orders == [7]


def test_directions_of_an_update_of_low_rank():
    random = np.random.default_rng(3)
    update = random.standard_normal((20, 2)) @ random.standard_normal((2, 8))
    found, sizes = essential_directions(torch.tensor(update), torch.eye(8).double(), 5)
    left = np.linalg.svd(update)[0][:, :2]
    assert found.shape == (20, 2)
    assert len(sizes) == 2
    assert np.allclose(found @ found.T, left @ left.T, atol=1e-10)
    assert essential_directions(torch.zeros(20, 8).double(), torch.eye(8).double(), 5)[0].shape == (20, 0)


def test_what_is_no_matrix_is_averaged_and_not_rescaled(make_source, make_evidence):
    vectors, inputs = drawn(7, ("w.0", "w.1"))
    for index, task in enumerate(TASKS):
        vectors[task]["b"] = np.full(3, float(index))
    found = run(make_source(vectors, matrices=["w.0", "w.1"]), make_evidence(inputs))
    assert found["b"].tolist() == [1.0] * 3


def test_biases_may_stay_at_the_base_where_norms_and_tables_are_averaged(make_source, make_evidence):
    kinds = {
        "bias": ParameterKind.BIAS,
        "shift": ParameterKind.NORM_SHIFT,
        "scale": ParameterKind.NORM_SCALE,
        "table": ParameterKind.EMBEDDING,
    }
    vectors, inputs = drawn(9)
    for index, task in enumerate(TASKS):
        vectors[task] |= {name: np.full((3, 2), float(index)) for name in kinds}
    source, evidence = make_source(vectors, matrices=["w"], kinds=kinds), make_evidence(inputs)

    def values(**options):
        found = run(source, evidence, **options)
        assert np.allclose(found["w"], reference(vectors, inputs), atol=2e-4)
        return {name: float(found[name].mean()) for name in kinds if (found[name] == found[name][0, 0]).all()}

    means = dict.fromkeys(kinds, 1.0)
    still = {"bias": 0.0, "shift": 0.0}
    assert values() == values(biases="mean") == means
    assert values(biases="base") == means | still
    assert values(others="sum") == dict.fromkeys(kinds, 3.0)
    assert values(others="sum", biases="base") == dict.fromkeys(kinds, 3.0) | still
    assert values(others="base", biases="mean") == dict.fromkeys(kinds, 0.0) | {"bias": 1.0, "shift": 1.0}


def test_defaults_are_those_of_the_paper_but_for_the_magnitude():
    options = EsmOptions()
    assert (options.scale_tasks, options.scale_inputs, options.scale_layers) == (True, True, True)
    assert (options.norm_of, options.eigenvalue_exponent) == ("kept", 0.0)
    assert (options.others, options.biases) == ("mean", None)
    # The published code's; the paper has "unit".
    assert options.magnitude == "kept"
    assert Esm.rescales
