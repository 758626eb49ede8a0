"""One least-squares problem that many methods share: agree with every task on its own inputs, or stay at an anchor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Directions of the inputs whose second moment is below this share of the largest one count as unseen: moments that were
# summed from float32 products hold about 1e-7 of their largest eigenvalue in rounding.
TOLERANCE = 1e-6
# Beyond this condition float64 solutions have too few digits left, whatever the tolerance.
_MAX_CONDITION = 1e12


class AnchoredRidge:
    r"""The matrix that agrees best with several tasks' matrices on their own inputs, pulled towards an anchor.

    .. math:: \min_W \sum_t s_t \, \mathrm{tr}[(W - W_t) G_t (W - W_t)^T] + \lambda \|W - A\|_F^2

    With inputs :math:`x` of task t and :math:`G_t = E[x x^T]` the first term is the mean squared difference between the
    outputs :math:`W x` and :math:`W_t x`. Where W is to look at other inputs than the :math:`W_t` do, W at :math:`x`
    and :math:`W_t` at :math:`z`, the cross moment :math:`C_t = E[x z^T]` enters beside :math:`G_t = E[x x^T]`, and the
    term is :math:`E \|W x - W_t z\|^2`. The solution is

    .. math:: W \Big(\sum_t s_t G_t + \lambda I\Big) = \sum_t s_t W_t C_t^T + \lambda A

    Only the sums are held, in float64: add the tasks one after the other, then solve as often as you like.

    Args:
        shape: ``(d_out, d_in)`` of the matrices.

    Example:
        >>> ridge = AnchoredRidge((1, 2))
        >>> ridge.add(torch.tensor([[2.0, 5.0]]), torch.diag(torch.tensor([3.0, 0.0])))
        >>> ridge.add(torch.tensor([[6.0, 7.0]]), torch.diag(torch.tensor([1.0, 0.0])))
        >>> ridge.solve()
        tensor([[3., 0.]], dtype=torch.float64)
        >>> ridge.solve(anchor=torch.tensor([[1.0, 1.0]]))
        tensor([[3., 1.]], dtype=torch.float64)
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._left = torch.zeros(shape[1], shape[1], dtype=torch.float64)
        self._right = torch.zeros(shape, dtype=torch.float64)

    @property
    def mean_square(self) -> float:
        """The mean of the diagonal of the summed moments, which is the mean of their eigenvalues."""
        return float(self._left.diagonal().mean()) if self.shape[1] else 0.0

    def add(self, weight: Tensor, moment: Tensor, *, cross: Tensor | None = None, share: float = 1.0) -> None:
        """Add one task.

        Args:
            weight: ``W_t``, shape ``(d_out, d_in)``, any float dtype.
            moment: ``G_t``, shape ``(d_in, d_in)``, symmetric, any float dtype.
            cross: ``C_t``, shape ``(d_in, d_in)``: the inputs of the sought matrix by those of ``W_t``. None where they
                are the same, so that it equals ``G_t``.
            share: ``s_t``, a finite number of at least 0.

        Raises:
            ValueError: a shape or the share is not as described.
        """
        square = (self.shape[1], self.shape[1])
        for name, tensor, expected in (("weight", weight, self.shape), ("moment", moment, square)):
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name} must have shape {expected}, found {tuple(tensor.shape)}")
        if cross is not None and tuple(cross.shape) != square:
            raise ValueError(f"cross must have shape {square}, found {tuple(cross.shape)}")
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"share must be a finite number of at least 0, found {share}")
        full = moment.double()
        self._left.add_(full, alpha=share)
        self._right.addmm_(weight.double(), full if cross is None else cross.double().T, alpha=share)

    def solve(self, ridge: float = 0.0, anchor: Tensor | None = None, *, tolerance: float = TOLERANCE) -> Tensor:
        """The solution.

        Directions of the inputs that no task has seen keep the anchor's values whatever the ridge, and with no anchor
        they are zero: the solution of minimum norm. Unseen are eigenvectors of the summed moments whose eigenvalue is
        at most ``tolerance`` times the largest. Cost: one Cholesky factorisation and inverse where they show that there
        are none of these, ridge included; else all eigenvectors of the summed moments.

        Args:
            ridge: ``lambda``, a finite number of at least 0.
            anchor: ``A``, shape ``(d_out, d_in)``, any float dtype; None for zeros.
            tolerance: see above, at least 0 and below 1.

        Returns:
            ``W``, shape ``(d_out, d_in)``, float64.

        Raises:
            ValueError: an argument is not as described, or the moments hold NaN or infinite values.
        """
        if not (math.isfinite(ridge) and ridge >= 0):
            raise ValueError(f"ridge must be a finite number of at least 0, found {ridge}")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must be at least 0 and below 1, found {tolerance}")
        if anchor is not None and tuple(anchor.shape) != self.shape:
            raise ValueError(f"anchor must have shape {self.shape}, found {tuple(anchor.shape)}")
        if anchor is None:
            return divided(self._right, self._left, ridge, tolerance=tolerance)
        start = anchor.double()
        return start + divided(self._right - start @ self._left, self._left, ridge, tolerance=tolerance)


def divided(rows: Tensor, matrix: Tensor, ridge: float = 0.0, *, tolerance: float = TOLERANCE) -> Tensor:
    """Rows times the inverse of a positive semi-definite matrix plus a multiple of the identity.

    Args:
        rows: shape ``(m, d)``, float64.
        matrix: symmetric, shape ``(d, d)``, float64; eigenvalues below zero count as rounding.
        ridge: the multiple of the identity, at least 0.
        tolerance: eigenvectors whose eigenvalue, with the ridge, is at most this share of the largest take no part.

    Returns:
        Shape ``(m, d)``, float64.

    Raises:
        ValueError: the matrix holds NaN or infinite values.

    Example:
        >>> rows = torch.tensor([[6.0, 0.0]], dtype=torch.float64)
        >>> divided(rows, torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64)))
        tensor([[3., 0.]], dtype=torch.float64)
    """
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("the summed moments hold NaN or infinite values")
    if not matrix.numel():
        return rows.clone()
    lifted = matrix + ridge * torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(lifted)
    if not failed:
        # The product of these norms is at least the condition.
        condition = float(lifted.norm() * torch.cholesky_inverse(factor).norm())
        if condition * tolerance < 1 and condition < _MAX_CONDITION:
            solution: Tensor = torch.cholesky_solve(rows.T, factor).T
            return solution
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    seen = values + ridge > tolerance * values[-1].clamp(min=0)
    vectors = vectors[:, seen]
    product: Tensor = (rows @ vectors / (values[seen] + ridge)) @ vectors.T
    return product
