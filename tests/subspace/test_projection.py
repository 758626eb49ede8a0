import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pave_lightning.subspace import KnowledgeSpectrum, Metric, MomentKind, knowledge_spectrum, project, remove_tail

SHAPES = [(6, 6), (5, 9), (9, 5), (1, 4), (4, 1)]
Array = NDArray[np.float64]


def make_layer(shape: tuple[int, int], rows: int = 200, seed: int = 0) -> tuple[Array, Array]:
    """A weight, and the input covariance of rows whose features differ in scale and are correlated."""
    random = np.random.default_rng(seed)
    width = shape[1]
    mixing = random.normal(size=(width, width)) * np.geomspace(1, 0.05, width)
    inputs = random.normal(size=(rows, width)) @ mixing.T
    return random.normal(size=shape), inputs.T @ inputs / rows


def published(weight: Array, covariance: Array, rank: int, damping: float) -> tuple[Array, Array]:
    """SVD_r(W C~) C~^-1 and all singular values, as the paper writes it."""
    damped = covariance + damping * np.eye(len(covariance))
    left, values, right = np.linalg.svd(weight @ damped, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank] @ np.linalg.inv(damped), values


def published_root(weight: Array, covariance: Array, rank: int, damping: float) -> tuple[Array, Array]:
    """SVD_r(W C~^(1/2)) C~^(-1/2) and all singular values."""
    root = np.real(scipy.linalg.sqrtm(covariance + damping * np.eye(len(covariance))))
    left, values, right = np.linalg.svd(weight @ root, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank] @ np.linalg.inv(root), values


def moment_of(kind: MomentKind, weight: Array, covariance: Array) -> Tensor:
    values, vectors = np.linalg.eigh(covariance)
    moments = {
        "input": covariance,
        "cross": weight @ covariance,
        "rows": (vectors * np.sqrt(values.clip(0))).T,
        "output": weight @ covariance @ weight.T,
    }
    return torch.from_numpy(np.ascontiguousarray(moments[kind]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["input", "cross"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize(("metric", "reference"), [("covariance", published), ("root", published_root)])
def test_equals_the_published_formula(
    shape: tuple[int, int], kind: MomentKind, damping: float, metric: Metric, reference: object
) -> None:
    weight, covariance = make_layer(shape)
    spectrum = knowledge_spectrum(
        torch.from_numpy(weight), moment_of(kind, weight, covariance), kind, metric=metric, damping=damping
    )
    for rank in range(min(shape) + 1):
        expected, values = reference(weight, covariance, rank, damping)  # type: ignore[operator]
        np.testing.assert_allclose(spectrum.values.numpy(), values, rtol=1e-9, atol=1e-9 * values[0])
        projected = project(torch.from_numpy(weight), spectrum, rank).numpy()
        np.testing.assert_allclose(projected, expected, rtol=0, atol=1e-8 * np.abs(weight).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_is_the_plain_truncated_svd(shape: tuple[int, int]) -> None:
    weight, covariance = make_layer(shape)
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    for moment in (None, torch.from_numpy(covariance)):
        spectrum = knowledge_spectrum(torch.from_numpy(weight), moment, metric="identity", damping=3.0)
        np.testing.assert_allclose(spectrum.values.numpy(), values, rtol=1e-10)
        for rank in range(min(shape)):
            expected = (left[:, :rank] * values[:rank]) @ right[:rank]
            np.testing.assert_allclose(project(torch.from_numpy(weight), spectrum, rank).numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_are_orthonormal_and_describe_the_projection(shape: tuple[int, int]) -> None:
    weight, covariance = make_layer(shape)
    spectrum = knowledge_spectrum(torch.from_numpy(weight), torch.from_numpy(covariance))
    directions = spectrum.directions
    assert directions.shape == (shape[0], min(shape))
    assert directions.dtype == spectrum.values.dtype == torch.float64
    torch.testing.assert_close(directions.T @ directions, torch.eye(min(shape), dtype=torch.float64))
    kept = directions[:, :1]
    torch.testing.assert_close(
        project(torch.from_numpy(weight), spectrum, 1), kept @ (kept.T @ torch.from_numpy(weight)), atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_full_rank_gives_the_same_bits_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, covariance = make_layer(shape)
    given = torch.from_numpy(weight).to(dtype)
    given[0, 0] = -0.0
    spectrum = knowledge_spectrum(given, torch.from_numpy(covariance).float())
    same = project(given, spectrum, min(shape))
    assert same.dtype == dtype
    assert same.data_ptr() != given.data_ptr()
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(same.view(bits), given.view(bits))


def test_half_precision_weights_are_projected_in_float64() -> None:
    weight, covariance = make_layer((5, 9))
    given = torch.from_numpy(weight).bfloat16()
    spectrum = knowledge_spectrum(given, torch.from_numpy(covariance))
    expected, _ = published(given.double().numpy(), covariance, 3, 0.0)
    assert torch.equal(project(given, spectrum, 3), torch.from_numpy(expected).bfloat16())


@pytest.mark.parametrize("metric", ["covariance", "root"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_singular_covariance_needs_no_damping(shape: tuple[int, int], metric: Metric) -> None:
    random = np.random.default_rng(1)
    weight = random.normal(size=shape)
    inputs = random.normal(size=(min(2, shape[1]), shape[1]))
    covariance = inputs.T @ inputs / len(inputs)
    spectra = [
        knowledge_spectrum(torch.from_numpy(weight), moment_of(kind, weight, covariance), kind, metric=metric)
        for kind in ("input", "cross")
    ]
    for spectrum in spectra:
        rank = min(len(inputs), *shape)
        projected = project(torch.from_numpy(weight), spectrum, rank).numpy()
        assert np.isfinite(projected).all()
        # Directions that no input excites are free to go: what the layer answers to its data stays the same.
        np.testing.assert_allclose(projected @ inputs.T, weight @ inputs.T, atol=1e-8)
        assert (spectrum.values[rank:] < 1e-6 * spectrum.values[0]).all()


def test_root_minimises_the_output_error() -> None:
    weight, covariance = make_layer((8, 8), seed=4)
    given = torch.from_numpy(weight)
    errors = {}
    for metric in ("covariance", "root", "identity"):
        spectrum = knowledge_spectrum(given, torch.from_numpy(covariance), metric=metric)  # type: ignore[arg-type]
        change = (given - project(given, spectrum, 4)).numpy()
        errors[metric] = float(np.trace(change @ covariance @ change.T))
    assert errors["root"] == pytest.approx(
        float((knowledge_spectrum(given, torch.from_numpy(covariance), metric="root").values[4:] ** 2).sum())
    )
    assert errors["root"] < min(errors["covariance"], errors["identity"])


def test_a_layer_that_saw_nothing_has_a_spectrum_of_zeros() -> None:
    spectrum = knowledge_spectrum(torch.randn(3, 4), torch.zeros(4, 4))
    assert not spectrum.values.any()


def test_refuses_what_is_not_finite() -> None:
    weight, covariance = torch.randn(3, 4), torch.eye(4)
    for broken in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="moment holds NaN or infinite"):
            knowledge_spectrum(weight, covariance * broken)
        with pytest.raises(ValueError, match="weight holds NaN or infinite"):
            knowledge_spectrum(weight * broken, covariance)


def test_refuses_what_does_not_fit() -> None:
    weight, covariance = torch.randn(3, 4), torch.eye(4)
    spectrum = knowledge_spectrum(weight, covariance)
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        knowledge_spectrum(weight, covariance, "cross")
    with pytest.raises(ValueError, match=r"shape \(4, 4\)"):
        knowledge_spectrum(weight, torch.randn(3, 4), "input")
    with pytest.raises(ValueError, match="needs a moment"):
        knowledge_spectrum(weight, None)
    with pytest.raises(ValueError, match="damping"):
        knowledge_spectrum(weight, covariance, damping=-0.1)
    with pytest.raises(ValueError, match="metric"):
        knowledge_spectrum(weight, covariance, metric="rot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind must be one of input, cross, rows, output"):
        knowledge_spectrum(weight, covariance, "inputs")  # type: ignore[arg-type]
    for metric in ("covariance", "identity"):
        with pytest.raises(ValueError, match="serves the metric 'root' only"):
            knowledge_spectrum(weight, torch.eye(3), "output", metric=metric)
    with pytest.raises(ValueError, match=r"any number of rows"):
        knowledge_spectrum(weight, torch.randn(2, 3), "rows")
    with pytest.raises(ValueError, match="overflow"):
        knowledge_spectrum(weight.double() * 1e200, covariance.double() * 1e200)
    with pytest.raises(ValueError, match="between 0 and 3"):
        spectrum.tail(-1)
    with pytest.raises(ValueError, match="does not fit"):
        remove_tail(torch.randn(3, 5), spectrum, 2)
    with pytest.raises(ValueError, match="matrix"):
        knowledge_spectrum(torch.randn(3), covariance)
    with pytest.raises(ValueError, match="floating-point"):
        knowledge_spectrum(torch.ones(3, 4, dtype=torch.int64), covariance)
    with pytest.raises(ValueError, match="between 0 and 3"):
        project(weight, spectrum, 4)
    with pytest.raises(ValueError, match="does not fit"):
        project(torch.randn(4, 4), spectrum, 2)


def test_tail_is_formed_from_its_factors() -> None:
    weight, covariance = make_layer((9, 5))
    spectrum = knowledge_spectrum(torch.from_numpy(weight), torch.from_numpy(covariance))
    assert isinstance(spectrum, KnowledgeSpectrum)
    torch.testing.assert_close(spectrum.tail(3), spectrum.directions[:, 3:])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 48),
    columns=st.integers(1, 48),
    kept=st.floats(0, 1),
    kind=st.sampled_from(["input", "cross", "rows"]),
    damping=st.sampled_from([1e-3, 0.1, 2.0]),
    exact=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_projection_form_is_the_inverse_form(
    rows: int, columns: int, kept: float, kind: MomentKind, damping: float, exact: bool, seed: int
) -> None:
    weight, covariance = make_layer((rows, columns), seed=seed)
    rank = round(kept * min(rows, columns))
    expected, values = published(weight, covariance, rank, damping)
    moment = moment_of(kind, weight, covariance)
    spectrum = knowledge_spectrum(torch.from_numpy(weight), moment, kind, damping=damping, exact=exact)
    np.testing.assert_allclose(spectrum.values.numpy(), values, rtol=0, atol=1e-9 * values[0])
    # Between two values that nearly coincide either direction may go.
    if 0 < rank < len(values) and values[rank - 1] - values[rank] < 1e-4 * values[0]:
        return
    projected = project(torch.from_numpy(weight), spectrum, rank).numpy()
    np.testing.assert_allclose(projected, expected, rtol=0, atol=1e-7 * np.abs(weight).max())


LARGER = [(40, 40), (40, 70), (70, 40)]


@pytest.mark.parametrize("shape", LARGER)
@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["input", "cross", "rows", "output"])
@pytest.mark.parametrize(("metric", "reference"), [("covariance", published), ("root", published_root)])
def test_every_kind_gives_the_same(
    shape: tuple[int, int], damping: float, exact: bool, kind: MomentKind, metric: Metric, reference: object
) -> None:
    if kind == "output" and metric != "root":
        pytest.skip("serves the metric root only")
    weight, covariance = make_layer(shape)
    given_weight, moment = torch.from_numpy(weight), moment_of(kind, weight, covariance)
    before = moment.clone()
    spectrum = knowledge_spectrum(given_weight, moment, kind, metric=metric, damping=damping, exact=exact)
    for rank in (36, 20, 0):
        expected, values = reference(weight, covariance, rank, damping)  # type: ignore[operator]
        np.testing.assert_allclose(spectrum.values.numpy(), values, rtol=1e-7, atol=1e-9 * values[0])
        projected = project(given_weight, spectrum, rank).numpy()
        np.testing.assert_allclose(projected, expected, rtol=0, atol=1e-7 * np.abs(weight).max())
    assert torch.equal(moment, before)
    assert torch.equal(given_weight, torch.from_numpy(weight))


def test_fewer_rows_than_features() -> None:
    random = np.random.default_rng(2)
    weight, inputs = random.normal(size=(40, 50)), random.normal(size=(7, 50)) / np.sqrt(7)
    given_weight = torch.from_numpy(weight)
    for damping in (0.0, 0.5):
        of_rows = knowledge_spectrum(given_weight, torch.from_numpy(inputs), "rows", damping=damping)
        expected, values = published(weight, inputs.T @ inputs + 1e-300, 7, damping) if damping else (None, None)
        projected = project(given_weight, of_rows, 7).numpy()
        if expected is None:
            np.testing.assert_allclose(projected @ inputs.T, weight @ inputs.T, atol=1e-7)
        else:
            np.testing.assert_allclose(of_rows.values.numpy(), values, atol=1e-8)
            np.testing.assert_allclose(projected, expected, atol=1e-8)


@pytest.mark.parametrize("shape", [*LARGER, (9, 5)])
@pytest.mark.parametrize("exact", [False, True])
def test_the_tail_can_be_taken_out_of_another_matrix(shape: tuple[int, int], exact: bool) -> None:
    weight, covariance = make_layer(shape)
    length = min(shape)
    other = np.random.default_rng(5).normal(size=shape)
    spectrum = knowledge_spectrum(torch.from_numpy(weight), torch.from_numpy(covariance), exact=exact)
    left = np.linalg.svd(weight @ covariance, full_matrices=False)[0][:, length - 3 :]
    removed = remove_tail(torch.from_numpy(other), spectrum, length - 3)
    np.testing.assert_allclose(removed.numpy(), other - left @ (left.T @ other), atol=1e-7)
    same = remove_tail(torch.from_numpy(other), spectrum, length)
    assert torch.equal(same, torch.from_numpy(other))
    assert same.data_ptr() != torch.from_numpy(other).data_ptr()


@pytest.mark.parametrize("shape", LARGER)
@pytest.mark.parametrize("deficient", ["weight", "covariance", "both"])
@pytest.mark.parametrize("exact", [False, True])
def test_what_is_rank_deficient_stays_well_defined(shape: tuple[int, int], deficient: str, exact: bool) -> None:
    random = np.random.default_rng(3)
    weight, covariance = make_layer(shape)
    if deficient in ("weight", "both"):
        weight = random.normal(size=(shape[0], 6)) @ random.normal(size=(6, shape[1]))
    if deficient in ("covariance", "both"):
        inputs = random.normal(size=(9, shape[1]))
        covariance = inputs.T @ inputs
    spectrum = knowledge_spectrum(torch.from_numpy(weight), torch.from_numpy(covariance), exact=exact)
    for rank in (0, 10, 20, 39):
        tail = spectrum.tail(rank)
        torch.testing.assert_close(tail.T @ tail, torch.eye(40 - rank, dtype=torch.float64), atol=1e-10, rtol=0)
    projected = project(torch.from_numpy(weight), spectrum, 12).numpy()
    np.testing.assert_allclose(
        projected @ covariance, weight @ covariance, atol=1e-6 * np.abs(weight @ covariance).max()
    )


@pytest.mark.parametrize("shape", LARGER)
def test_a_damped_covariance_of_condition_a_million_keeps_its_digits(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(6)
    basis = np.linalg.qr(random.normal(size=(shape[1], shape[1])))[0]
    covariance = (basis * np.geomspace(1e2, 1e-4, shape[1])) @ basis.T
    weight = random.normal(size=shape)
    damped = covariance + 0.1 * np.eye(shape[1])
    left = np.linalg.svd(weight @ damped, full_matrices=False)[0][:, :35]
    expected = left @ (left.T @ weight)
    for kind in ("input", "cross"):
        moment = moment_of(kind, weight, covariance)
        spectrum = knowledge_spectrum(torch.from_numpy(weight), moment, kind, damping=0.1)
        error = np.linalg.norm(project(torch.from_numpy(weight), spectrum, 35).numpy() - expected)
        assert error < 1e-8 * np.linalg.norm(expected)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [*LARGER, (9, 5)])
def test_a_gpu_gives_the_same(shape: tuple[int, int]) -> None:
    weight, covariance = (torch.from_numpy(array) for array in make_layer(shape))
    near, far = (knowledge_spectrum(weight, covariance, device=device) for device in ("cpu", "cuda"))
    assert far.values.device.type == "cpu"
    torch.testing.assert_close(near.values, far.values, rtol=1e-8, atol=1e-9 * float(near.values[0]))
    torch.testing.assert_close(project(weight, near, 4), project(weight, far, 4), rtol=0, atol=1e-7)
