"""Leading singular triplets and polar factors, through the Gram matrix of the smaller side."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pave_lightning.subspace.solver import symmetric_eigen


def noise_share(rows: int, columns: int) -> float:
    """The share of its largest singular value below which a float32 matrix of that shape holds nothing but rounding."""
    return max(rows, columns) * torch.finfo(torch.float32).eps


def rounding_level(matrix: Tensor) -> float:
    """What the roundings of a float32 matrix amount to: below this, singular values of what is left of it are noise.

    The yardstick is the largest norm of a row or column, which is at most the largest singular value and costs no
    decomposition.

    Args:
        matrix: shape ``(m, n)``, any float dtype.
    """
    if not matrix.numel():
        return 0.0
    squares = matrix.double().square()
    largest = max(float(squares.sum(dim=axis).max()) for axis in (0, 1))
    return noise_share(*matrix.shape) * math.sqrt(largest)


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


def leading_triplets(matrix: Tensor, rank: int | None = None, *, floor: float = 0.0) -> Triplets:
    """The leading singular triplets of a matrix, of which there are at most as many as its numerical rank.

    What a float32 matrix holds below ``max(m, n)`` float32 roundings of its largest singular value is noise, whose
    directions mean nothing; such triplets are left out. Cost: one symmetric eigenvalue problem of the smaller side.

    Args:
        matrix: shape ``(m, n)``, any float dtype.
        rank: how many triplets at most; all of them where nothing is said.
        floor: singular values up to this one are noise in any case. A matrix that is what is left of a larger one after
            a projection may be nothing but rounding: then this is the larger one's `rounding_level`.

    Returns:
        ``k`` triplets, ``k <= min(rank, m, n)``; none for a zero matrix.

    Raises:
        ValueError: the matrix holds NaN or infinite values.

    Example:
        >>> leading_triplets(torch.diag(torch.tensor([3.0, 2.0, 0.0]))).values
        tensor([3., 2.], dtype=torch.float64)
    """
    full = matrix.double()
    if full.shape[0] > full.shape[1]:
        turned = leading_triplets(full.T, rank, floor=floor)
        return Triplets(turned.right.T, turned.values, turned.left.T)
    limit = full.shape[0] if rank is None else min(rank, full.shape[0])
    eigen = symmetric_eigen(-(full @ full.T))
    squares = -eigen.values[:limit]
    noise = (squares[:1].clamp(min=0) * noise_share(*full.shape) ** 2).clamp(min=floor**2)
    found = int((squares > noise).sum()) if limit else 0
    left = eigen.smallest(found) if found else full.new_empty(full.shape[0], 0)
    image = left.T @ full
    values = image.norm(dim=1)
    return Triplets(left.contiguous(), values, image / values[:, None])


def polar_factor(matrix: Tensor) -> Tensor:
    r"""The partial isometry nearest to a matrix: :math:`U V^T` of its thin SVD :math:`U S V^T`.

    Of a matrix that lacks full rank only the directions whose singular value is above noise take part (see
    `noise_share`): there is no arbitrary completion of the others.

    Args:
        matrix: shape ``(m, n)``, any float dtype.

    Returns:
        Shape ``(m, n)``, float64; zero for a zero matrix.

    Raises:
        ValueError: the matrix holds NaN or infinite values.

    Example:
        >>> polar_factor(torch.tensor([[3.0, 0.0], [0.0, -0.5]]))
        tensor([[ 1.,  0.],
                [ 0., -1.]], dtype=torch.float64)
    """
    full = matrix.double()
    if full.shape[0] < full.shape[1]:
        return polar_factor(full.T).T
    if not full.numel():
        return full
    if not bool(torch.isfinite(full).all()):
        raise ValueError("the polar factor of a matrix with NaN or infinite values is undefined")
    squares, vectors = torch.linalg.eigh(full.T @ full)
    kept = squares > squares[-1].clamp(min=0) * noise_share(*full.shape) ** 2
    vectors = vectors[:, kept]
    factor: Tensor = full @ (vectors / squares[kept].sqrt()) @ vectors.T
    return factor
