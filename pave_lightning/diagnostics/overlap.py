"""How far the directions that two tasks use in a layer are the same ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

Part = Literal["top", "removed"]

# Columns of a random sketch beyond the rank that it must span.
OVERSAMPLING = 16


@dataclass(frozen=True)
class SubspaceOverlap:
    """Overlap of two tasks' output directions in one layer.

    Attributes:
        layer: name of the layer inside the backbone.
        task_a: the one task.
        task_b: the other task.
        part: ``top`` for the strongest directions, ``removed`` for those that purification takes away.
        share: share of the layer's d directions that were compared; NaN for ``removed``, whose numbers differ by task.
        directions_a: how many directions of task a.
        directions_b: how many directions of task b.
        overlap: mean squared cosine of the principal angles, from 0 (orthogonal) to 1 (the smaller lies in the larger).
        expected: what random subspaces of these sizes have on average in d_out dimensions, max(k_a, k_b) / d_out.
    """

    layer: str
    task_a: str
    task_b: str
    part: Part
    share: float
    directions_a: int
    directions_b: int
    overlap: float
    expected: float


def mean_squared_cosine(first: Tensor, second: Tensor) -> float:
    r"""Mean squared cosine of the principal angles between two subspaces, :math:`\|U^T V\|_F^2 / \min(k_u, k_v)`.

    Args:
        first: orthonormal columns, shape ``(d_out, k_u)``.
        second: orthonormal columns, shape ``(d_out, k_v)``.

    Returns:
        A number in [0, 1]; NaN when one has no column.
    """
    fewer = min(first.shape[1], second.shape[1])
    return float((first.T @ second).square().sum()) / fewer if fewer else math.nan


def removed_directions(removed: Tensor, count: int) -> Tensor:
    """The output directions that purification took away: the column space of what is gone.

    A random sketch with more columns than the rank spans it up to rounding, at the cost of a thin product instead of a
    decomposition of the whole matrix (Halko, Martinsson, Tropp 2011, arXiv 0909.4061).

    Args:
        removed: weight before minus weight after, shape ``(d_out, d_in)``, of rank ``count`` up to rounding.
        count: how many directions were removed.

    Returns:
        Orthonormal columns, shape ``(d_out, count)``, float64.
    """
    full = removed.double()
    width = min(count + OVERSAMPLING, *full.shape)
    sketch = torch.randn(full.shape[1], width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(full @ sketch).Q
    leading: Tensor = torch.linalg.svd(basis.T @ full, full_matrices=False).U[:, :count]
    directions: Tensor = basis @ leading
    return directions


def overlaps_of_layer(
    layer: str, top: Mapping[str, Tensor], removed: Mapping[str, Tensor], shares: Sequence[float], full: int
) -> Iterator[SubspaceOverlap]:
    """Overlaps of every pair of tasks.

    Args:
        layer: name of the layer.
        top: each task's strongest directions as columns, shape ``(d_out, k)``, at least ``max(shares) * full`` of them.
        removed: each purified task's removed directions as columns, shape ``(d_out, d - rank)``.
        shares: shares of the directions to compare.
        full: how many directions the layer has, d.
    """
    parts: dict[Part, Mapping[str, Tensor]] = {"top": top, "removed": removed}
    for part, directions in parts.items():
        for a, b in combinations(directions, 2):
            for share in shares if part == "top" else [math.nan]:
                count = None if math.isnan(share) else max(1, round(share * full))
                first, second = directions[a][:, :count], directions[b][:, :count]
                sizes = first.shape[1], second.shape[1]
                found, expected = mean_squared_cosine(first, second), max(sizes) / first.shape[0]
                yield SubspaceOverlap(layer, a, b, part, share, *sizes, found, expected)
