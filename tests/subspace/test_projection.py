import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from pave_lightning.subspace import KnowledgeSpectrum, Metric, MomentKind, knowledge_spectrum, project

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
    return torch.from_numpy(covariance if kind == "input" else weight @ covariance)


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
    with pytest.raises(ValueError, match="kind"):
        knowledge_spectrum(weight, covariance, "output")  # type: ignore[arg-type]
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
