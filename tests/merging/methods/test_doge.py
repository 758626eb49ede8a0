import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pave_lightning.errors import PaveError
from pave_lightning.merging import merge
from pave_lightning.merging.methods.doge import DogeOptions, DogeTa, shared_subspace

SHAPES = [(8, 6), (6, 8), (6, 3)]


def tasks(shapes, count=3, seed=0, scale=1.0):
    random = np.random.default_rng(seed)
    return {
        f"task{index}": {name: scale * (0.3 + random.standard_normal(shape)) for name, shape in shapes.items()}
        for index in range(count)
    }


def basis_of(vectors, divisor):
    rank = min(vectors[0].shape)
    each = max(1, rank // len(vectors))
    lefts = [np.linalg.svd(vector)[0][:, :each] for vector in vectors]
    return np.linalg.svd(np.concatenate(lefts, axis=1))[0][:, : max(1, rank // divisor)]


def correction(vectors, weights, *, steps, rate, epsilon, divisor, whole):
    """Adam on the loss as it is written, with gradients from autograd, in float64."""
    tensors = [torch.tensor(vector) for vector in vectors]
    basis = torch.tensor(basis_of(vectors, divisor))
    delta = torch.zeros_like(tensors[0], requires_grad=True)
    first = second = torch.zeros_like(tensors[0])
    for step in range(1, steps + 1):
        merged = sum(weight * (tensor + delta) for weight, tensor in zip(weights, tensors, strict=True))
        products = [tensor * (tensor - merged) for tensor in tensors]
        loss = sum((product.sum() if whole else product.sum(dim=1)).square().sum() for product in products)
        (gradient,) = torch.autograd.grad(loss, delta)
        if step == 1 and epsilon is None:
            epsilon = 0.07 * float(gradient.square().mean().sqrt())
        gradient = gradient - basis @ basis.T @ gradient
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        with torch.no_grad():
            delta -= rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + epsilon)
    return delta.detach().numpy()


def reference(named, matrices, *, eta=0.07, density=0.3, divisor=6, steps=400, rate=None, epsilon=None, whole=False):
    thresholds = []
    for vectors in named.values():
        flat = np.sort(np.concatenate([np.abs(vectors[name]).ravel() for name in matrices]))[::-1]
        thresholds.append(flat[max(1, int(len(flat) * density)) - 1])
    merged = {}
    for name in matrices:
        vectors = [vectors[name] for vectors in named.values()]
        weights = [eta / np.linalg.norm(vector) for vector in vectors]
        step = 0.5 * np.mean(np.abs(vectors)) if rate is None else rate
        delta = correction(vectors, weights, steps=steps, rate=step, epsilon=epsilon, divisor=divisor, whole=whole)
        merged[name] = sum(
            weight * (vector + delta) * (np.abs(vector) >= threshold)
            for weight, vector, threshold in zip(weights, vectors, thresholds, strict=True)
        )
    return merged


def run(make_source, vectors, matrices="w", **options):
    found = merge(DogeTa(DogeOptions(**options)), make_source(vectors, matrices=list(matrices))).vectors
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inner_product", ["row", "matrix"])
def test_as_the_plain_reference(make_source, shape, inner_product):
    vectors = tasks({"w": shape})
    expected = reference(vectors, "w", eta=0.8, steps=60, whole=inner_product == "matrix")["w"]
    found = run(make_source, vectors, eta=0.8, steps=60, inner_product=inner_product)["w"]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_the_defaults_as_the_plain_reference(make_source):
    vectors = tasks({"w": (13, 12)})
    assert run(make_source, vectors)["w"] == pytest.approx(reference(vectors, "w")["w"], rel=1e-2, abs=1e-3)


def test_an_absolute_step_is_the_published_form(make_source):
    vectors = tasks({"w": (8, 6)}, scale=3e-3)
    expected = reference(vectors, "w", steps=60, rate=1e-4, epsilon=1e-8)["w"]
    found = run(make_source, vectors, steps=60, absolute_step=1e-4)["w"]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    relative = run(make_source, vectors, steps=60)["w"]
    assert np.abs(relative - found).max() > 1e-4


def test_one_threshold_a_task_over_all_matrix_weights_and_no_others(make_source):
    vectors = tasks({"v": (7, 4), "w": (6, 4), "x": (50,)}, seed=3)
    for named in vectors.values():
        named["v"], named["x"] = 0.2 * named["v"], 100 * named["x"]
    expected = reference(vectors, ["v", "w"], steps=20)
    for elements in (None, 4):
        source = make_source(vectors, matrices=["v", "w"], elements=elements)
        found = merge(DogeTa(DogeOptions(steps=20)), source).vectors
        for name in "vw":
            assert found[name].numpy() == pytest.approx(expected[name], rel=1e-3, abs=1e-4)
        assert not found["x"].any()


def test_by_hand_without_steps(make_source):
    # Norms 5 and 10, so eta / norm is 1 and 0.5; two of the eight elements of each survive.
    still = [[0.0, 0.0], [0.0, 0.0]]
    vectors = {"a": {"w": [[3.0, 4.0], [0.0, 0.0], *still]}, "b": {"w": [[0.0, 6.0], [8.0, 0.0], *still]}}
    found = run(make_source, vectors, steps=0, eta=5.0, density=0.25)["w"]
    assert found.tolist() == [[3.0, 7.0], [4.0, 0.0], *still]


def test_the_correction_brings_the_sum_nearer_to_the_tasks(make_source):
    vectors = tasks({"w": (12, 9)})
    parts = [named["w"] for named in vectors.values()]

    def gap(merged):
        return sum(np.square(np.sum(part * (part - merged), axis=1)).sum() for part in parts)

    # Everything is kept, so the merged task vector is the corrected sum itself.
    before, after = (run(make_source, vectors, steps=steps, density=1.0)["w"] for steps in (0, 400))
    assert gap(after) < 0.5 * gap(before)


def test_nothing_is_corrected_where_the_shared_subspace_is_everything(make_source):
    # All that is left of the gradient is rounding, which must not be taken for a direction.
    vectors = tasks({"w": (6, 9)})
    found = run(make_source, vectors, subspace=1)["w"]
    assert found == pytest.approx(run(make_source, vectors, steps=0)["w"], abs=1e-5)


def test_the_shared_subspace_is_that_of_two_rounds_of_decompositions():
    vectors = [named["w"] for named in tasks({"w": (14, 20)}, count=2).values()]
    found = shared_subspace([torch.tensor(vector, dtype=torch.float32) for vector in vectors], 6).numpy()
    expected = basis_of(vectors, 6)
    assert found.shape == (14, 2)
    assert found @ found.T == pytest.approx(expected @ expected.T, abs=1e-4)


def test_the_shared_subspace_has_one_dimension_at_least():
    vectors = [torch.eye(3), torch.eye(3) * 2, torch.eye(3)]
    assert shared_subspace(vectors, 6).shape == (3, 1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (5, 9),
            "w is 5 x 9: its 5 outputs are fewer than two for each of 3 tasks; merge fewer tasks, or use a method",
        ),
        ((9, 2), "w is 9 x 2: its 2 singular directions cannot be split among 3 tasks; merge fewer tasks, or use"),
    ],
)
def test_too_many_tasks_for_a_matrix(make_source, shape, message):
    vectors = tasks({"w": shape, "x": (2, 2)})
    with pytest.raises(PaveError, match=message):
        run(make_source, vectors)
    # A table of that size is in nobody's way.
    assert not run(make_source, tasks({"w": (6, 3), "x": (2, 2)}), steps=0)["x"].any()


def test_a_relative_eta_is_a_share_of_the_mean_norm_of_all_layers(make_source):
    vectors = tasks({"v": (7, 4), "w": (6, 4), "x": (50,)})
    lengths = [np.linalg.norm(named[name]) for named in vectors.values() for name in "vw"]
    relative = run(make_source, vectors, "vw", relative_eta=0.25, steps=10)
    absolute = run(make_source, vectors, "vw", eta=0.25 * float(np.mean(lengths)), steps=10)
    for name in "vw":
        assert relative[name] == pytest.approx(absolute[name], rel=1e-4, abs=1e-6)


def test_a_zero_task_vector_adds_nothing(make_source):
    vectors = tasks({"w": (8, 6)}, count=2)
    found = run(make_source, vectors | {"still": {"w": np.zeros((8, 6))}}, steps=0)["w"]
    assert found == pytest.approx(run(make_source, vectors, steps=0)["w"], abs=1e-7)
    assert np.isfinite(run(make_source, vectors | {"still": {"w": np.zeros((8, 6))}})["w"]).all()


def test_models_without_matrix_weights_stay_at_the_base_or_are_averaged(make_source):
    vectors = tasks({"x": (4,)})
    assert not run(make_source, vectors, "")["x"].any()
    mean = np.mean([named["x"] for named in vectors.values()], axis=0)
    assert run(make_source, vectors, "", others="mean")["x"] == pytest.approx(mean, abs=1e-6)


def test_the_masks_take_two_walks_over_the_matrix_weights(watched_source):
    shapes = {"one": (2, 2), "two": (4,), "three": (2, 2)}
    vectors = {task: {name: np.ones(shape) for name, shape in shapes.items()} for task in "ab"}
    source, method = watched_source(vectors, matrices=["one", "three"]), DogeTa()
    method.prepare_alone(source)
    assert source.asked == 2 * (["one"] * 2 + ["three"] * 2)
    assert method.mean_norm == 2.0


def test_the_published_defaults():
    options = DogeOptions()
    assert (options.eta, options.density, options.subspace, options.steps) == (0.07, 0.3, 6, 400)
    assert (options.others, options.inner_product, options.step * 2e-4) == ("base", "row", pytest.approx(1e-4))
    assert DogeTa.default_scale == 1.0


@pytest.mark.parametrize(
    "wrong",
    [{"eta": 0}, {"relative_eta": 0}, {"density": 0}, {"density": 1.1}, {"subspace": 0}, {"steps": -1}, {"step": 0}],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        DogeOptions(**wrong)
