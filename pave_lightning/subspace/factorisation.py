"""Leading singular triplets and polar factors, through the Gram matrix of the smaller side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pave_lightning.subspace.solver import symmetric_eigen

# Singular values of a Gram matrix below this share of the largest one are rounding.
_LOST = 1e-6


@dataclass(frozen=True)
class Triplets:
    """Leading singular triplets of a matrix of shape ``(m, n)``, largest first, all float64.

    Attributes:
        left: orthonormal columns, shape ``(m, k)``.
        values: singular values, shape ``(k,)``.
        right: orthonormal rows, shape ``(k, n)``.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def product(self) -> Tensor:
        """The matrix that the triplets make up, shape ``(m, n)``."""
        product: Tensor = (self.left * self.values) @ self.right
        return product


def leading_triplets(matrix: Tensor, rank: int | None = None) -> Triplets:
    """The leading singular triplets of a matrix, of which there are at most as many as its numerical rank.

    What a float32 matrix holds below ``max(m, n)`` float32 roundings of its largest singular value is noise, whose
    directions mean nothing; such triplets are left out. Cost: one symmetric eigenvalue problem of the smaller side.

    Args:
        matrix: shape ``(m, n)``, any float dtype.
        rank: how many triplets at most; all of them where nothing is said.

    Returns:
        ``k`` triplets, ``k <= min(rank, m, n)``; none for a zero matrix.

    Raises:
        ValueError: the matrix holds NaN or infinite values.
    """
    full = matrix.double()
    if full.shape[0] > full.shape[1]:
        turned = leading_triplets(full.T, rank)
        return Triplets(turned.right.T, turned.values, turned.left.T)
    limit = full.shape[0] if rank is None else min(rank, full.shape[0])
    eigen = symmetric_eigen(-(full @ full.T))
    squares = -eigen.values[:limit]
    noise = max(full.shape) * torch.finfo(torch.float32).eps
    found = int((squares > squares[:1].clamp(min=0) * noise**2).sum()) if limit else 0
    left = eigen.smallest(found) if found else full.new_empty(full.shape[0], 0)
    image = left.T @ full
    values = image.norm(dim=1)
    return Triplets(left.contiguous(), values, image / values[:, None])


def polar_factor(matrix: Tensor) -> Tensor:
    r"""The partial isometry nearest to a matrix: :math:`U V^T` of its thin SVD :math:`U S V^T`.

    Of a matrix that lacks full rank only the directions with a singular value above 1e-6 of the largest one take part:
    there is no arbitrary completion of the others.

    Args:
        matrix: shape ``(m, n)``, any float dtype.

    Returns:
        Shape ``(m, n)``, float64; zero for a zero matrix.

    Raises:
        ValueError: the matrix holds NaN or infinite values.
    """
    full = matrix.double()
    if full.shape[0] < full.shape[1]:
        return polar_factor(full.T).T
    if not full.numel():
        return full
    if not bool(torch.isfinite(full).all()):
        raise ValueError("the polar factor of a matrix with NaN or infinite values is undefined")
    squares, vectors = torch.linalg.eigh(full.T @ full)
    kept = squares > squares[-1].clamp(min=0) * _LOST**2
    vectors = vectors[:, kept]
    factor: Tensor = full @ (vectors / squares[kept].sqrt()) @ vectors.T
    return factor
