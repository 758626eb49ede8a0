import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pave_lightning.subspace import solver
from pave_lightning.subspace.solver import DenseEigen, SymmetricEigen, TridiagonalEigen, symmetric_eigen

SIZE = 60


def matrix_with(values: NDArray[np.float64], seed: int = 0) -> torch.Tensor:
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return torch.from_numpy((basis * values) @ basis.T)


SPECTRA = {
    "spread": np.geomspace(1e-6, 1, SIZE),
    "all zero": np.zeros(SIZE),
    "all equal": np.ones(SIZE),
    "clusters": np.repeat([1e-6, 1e-3, 1.0], SIZE // 3),
    "near-clusters": np.repeat([1e-6, 1e-3, 1.0], SIZE // 3) * (1 + 1e-13 * np.arange(SIZE)),
    "mostly zero": np.r_[np.zeros(SIZE - 5), 1, 2, 3, 4, 5.0],
    "tiny": np.geomspace(1e-160, 1e-150, SIZE),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("count", [0, 1, 9, 17, 45, SIZE])
def test_eigenpairs_of_any_spectrum(name: str, count: int) -> None:
    matrix = matrix_with(SPECTRA[name])
    pairs = TridiagonalEigen(matrix.clone())
    check(matrix, pairs, count)


@pytest.mark.parametrize("matrix", [torch.diag(torch.arange(40.0).double()), torch.eye(40).double()])
def test_a_matrix_that_splits(matrix: torch.Tensor) -> None:
    for count in (3, 40):
        check(matrix, TridiagonalEigen(matrix.clone()), count)


@pytest.mark.parametrize("size", [1, 2, 3, solver.DENSE_SIZE, solver.DENSE_SIZE + 1])
def test_every_size(size: int) -> None:
    matrix = matrix_with(np.geomspace(1e-3, 1, size))
    for count in range(size + 1):
        check(matrix, symmetric_eigen(matrix.clone()), count)


def test_without_lapack_of_plain_integers_all_vectors_are_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "has_lapack", lambda: False)
    pairs = symmetric_eigen(matrix_with(SPECTRA["spread"]))
    assert isinstance(pairs, DenseEigen)
    check(matrix_with(SPECTRA["spread"]), pairs, 7)


def test_what_was_solved_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = TridiagonalEigen(matrix_with(SPECTRA["spread"]))
    twelve = pairs.smallest(12).clone()
    monkeypatch.setattr(pairs, "_rotated", None)
    assert torch.equal(pairs.smallest(12), twelve)
    assert torch.equal(pairs.smallest(5), twelve[:, :5])


def test_a_small_tail_takes_inverse_iteration_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = TridiagonalEigen(matrix_with(SPECTRA["spread"]))
    assert spread._by_inverse_iteration(9) is not None
    zero = TridiagonalEigen(torch.zeros(SIZE, SIZE, dtype=torch.float64))
    assert zero._by_inverse_iteration(9) is None
    monkeypatch.setattr(spread, "_by_inverse_iteration", lambda count: None)
    check(matrix_with(SPECTRA["spread"]), spread, 9)


def test_refuses_what_overflowed() -> None:
    for size in (3, SIZE):
        with pytest.raises(ValueError, match="overflow"):
            symmetric_eigen(torch.full((size, size), float("inf"), dtype=torch.float64))


def check(matrix: torch.Tensor, pairs: SymmetricEigen, count: int) -> None:
    """Values match, and the vectors are orthonormal and solve the eigenproblem as a whole."""
    scale = float(matrix.abs().max()) or 1.0
    expected = np.linalg.eigvalsh(matrix.numpy())
    np.testing.assert_allclose(pairs.values.numpy(), expected, rtol=0, atol=1e-13 * len(matrix) * scale)
    vectors = pairs.smallest(count)
    assert vectors.shape == (len(matrix), count)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-12)
    residual = matrix @ vectors - vectors @ (vectors.T @ matrix @ vectors)
    assert float(residual.abs().max() if count else 0) < 1e-12 * scale
    ritz = np.linalg.eigvalsh((vectors.T @ matrix @ vectors).numpy())
    np.testing.assert_allclose(ritz, expected[:count], rtol=0, atol=1e-12 * scale)
