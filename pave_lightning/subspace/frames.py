"""Coordinates in which a weight's column space has as few dimensions as the smaller of its sides."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pave_lightning.subspace.solver import has_lapack, lapack

MAX_CHOLESKY_CONDITION = 1e4


class Frame(Protocol):
    """Orthonormal coordinates ``Q`` of the column space of ``W``, so that ``W = Q core``.

    Attributes:
        core: ``Q^T W``, shape ``(d, d_in)``, float64.
    """

    core: Tensor

    def enter(self, matrix: Tensor) -> Tensor:
        """``Q^T M``, shape ``(d, m)``, for a matrix of shape ``(d_out, m)``, float64."""
        ...

    def lift(self, columns: Tensor) -> Tensor:
        """``Q Z``, shape ``(d_out, k)``, for columns of shape ``(d, k)``, float64."""
        ...


class PlainFrame:
    """``Q = I``, for ``d_out <= d_in``."""

    def __init__(self, weight: Tensor) -> None:
        self.core = weight

    def enter(self, matrix: Tensor) -> Tensor:
        """The matrix itself."""
        return matrix

    @staticmethod
    def lift(columns: Tensor) -> Tensor:
        """The columns themselves."""
        return columns


class BasisFrame:
    """``Q`` from a Householder QR of the weight, held as it is."""

    def __init__(self, weight: Tensor) -> None:
        self._basis, self.core = torch.linalg.qr(weight)

    def enter(self, matrix: Tensor) -> Tensor:
        """``Q^T M``, shape ``(d, m)``."""
        product: Tensor = self._basis.T @ matrix
        return product

    def lift(self, columns: Tensor) -> Tensor:
        """``Q Z``, shape ``(d_out, k)``."""
        product: Tensor = self._basis @ columns
        return product


class CholeskyFrame:
    """``Q = W R^-1`` with ``W^T W = R^T R``, never formed.

    Args:
        weight: ``W`` in any float dtype; converted again when a product with ``Q`` is asked for.
        factor: ``R``, upper triangular, float64.
    """

    def __init__(self, weight: Tensor, factor: Tensor) -> None:
        self._weight, self.core = weight, factor

    def enter(self, matrix: Tensor) -> Tensor:
        """``R^-T (W^T M)``, shape ``(d, m)``."""
        entered: Tensor = torch.linalg.solve_triangular(self.core.T, self._weight.double().T @ matrix, upper=False)
        return entered

    def lift(self, columns: Tensor) -> Tensor:
        """``W (R^-1 Z)``, shape ``(d_out, k)``."""
        coefficients: Tensor = torch.linalg.solve_triangular(self.core, columns, upper=True)
        return self._weight.double() @ coefficients


def frame_of(weight: Tensor, device: torch.device, *, stable: bool = False) -> Frame:
    """The cheapest frame that is accurate.

    A Cholesky factor of ``W^T W`` costs a fraction of a QR of the whole weight but loses digits with the square of its
    condition, so it serves only below `MAX_CHOLESKY_CONDITION`.

    Args:
        weight: ``W``, shape ``(d_out, d_in)``, any float dtype.
        device: where to compute.
        stable: never take the Cholesky factor.

    Returns:
        The frame, in float64 on that device.
    """
    full = weight.to(device, torch.float64)
    if full.shape[0] <= full.shape[1]:
        return PlainFrame(full)
    if device.type == "cpu" and not stable and has_lapack():
        factor = _cholesky(gram_of(full.T))
        if factor is not None:
            return CholeskyFrame(weight.to(device), factor)
    return BasisFrame(full)


def gram_of(matrix: Tensor) -> Tensor:
    """``M M^T``, shape ``(m, m)``, of a matrix of shape ``(m, n)``, both float64.

    On the CPU through NumPy, which computes one half of it only.
    """
    if matrix.device.type != "cpu":
        return matrix @ matrix.T
    array = matrix.numpy()
    # What overflows is refused by the solver, with an error.
    with np.errstate(over="ignore", invalid="ignore"):
        return torch.from_numpy(array @ array.T)


def _cholesky(gram: Tensor) -> Tensor | None:
    """``R`` of ``R^T R = gram``, or None where it is not accurate enough. Overwrites ``gram``."""
    size, array = len(gram), gram.contiguous().numpy()
    # Column by column, as LAPACK reads it, the lower triangle is the upper one of the rows.
    if lapack("dpotrf")(b"L", size, array, size):
        return None
    inverse_condition, work, integers = np.empty(1), np.empty(3 * size), np.empty(size, np.intc)
    lapack("dtrcon")(b"1", b"L", b"N", size, array, size, inverse_condition, work, integers)
    if not inverse_condition[0] * MAX_CHOLESKY_CONDITION >= 1:
        return None
    return torch.from_numpy(np.triu(array))
