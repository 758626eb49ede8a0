"""Model Breadcrumbs: leave out the largest and the smallest elements of each task vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.base import MethodOptions, StaticMethod
from pave_lightning.merging.registry import merge_method
from pave_lightning.weights import Parameter


class BreadcrumbsOptions(MethodOptions):
    """Options of Model Breadcrumbs."""

    density: float = Field(default=0.15, gt=0, le=1)
    """Share of the elements that is kept once the largest are gone (beta). The published code starts its search here
    and stays within 0.05 and 0.2."""
    outliers: float = Field(default=0.006, ge=0, lt=1)
    """Share of the elements, those of largest magnitude, that is left out first (gamma). The published code starts its
    search here and stays within 0.001 and 0.01."""
    per: Literal["row", "tensor"] = "row"
    """What the shares are of: each row along a tensor's last axis (the published code), or each tensor (mergekit)."""


@merge_method("breadcrumbs")
class Breadcrumbs(StaticMethod[BreadcrumbsOptions]):
    r"""Leave out outliers and small elements of each task vector, add up the rest.

    Of a row of n elements the ``int(n * outliers)`` of largest magnitude are left out, the next ``int(n * density)``
    are kept, at least one, and all smaller ones are left out: :math:`W = W_0 + \lambda \sum_t m_t \odot \tau_t`. A
    tensor without rows, a bias for example, is one row. Of elements that tie the first ones count as larger. Cost: one
    sort of every row and task.

    Source: Davari and Belilovsky, *Model Breadcrumbs*, ECCV 2024 (arXiv 2312.06795); scale and shares are the starting
    points of the published search. Departure: rows that are too short for the density keep one element; the published
    code keeps none.
    """

    summary = "leave out the largest and the smallest elements, add up the rest"
    source = "Davari and Belilovsky 2024, arXiv 2312.06795"
    elementwise = True
    single_precision = True
    default_scale = 0.2
    Options = BreadcrumbsOptions

    def in_blocks(self, parameter: Parameter) -> bool:
        """Where blocks of rows hold whole rows of the last axis."""
        return bool(self.options.per == "row") and len(parameter.shape) > 1

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The sum of what is left of the task vectors."""
        merged = torch.zeros_like(base)
        for task in sorted(vectors):
            merged += self._left(vectors[task])
        return merged

    def _left(self, vector: Tensor) -> Tensor:
        """The task vector without its largest and smallest elements."""
        if not vector.numel():
            return vector
        length = vector.shape[-1] if self.options.per == "row" and vector.dim() else vector.numel()
        rows = vector.reshape(-1, length)
        first = int(length * self.options.outliers)
        last = first + max(1, int(length * self.options.density))
        largest_first = rows.abs().sort(dim=1, descending=True, stable=True).indices
        kept = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, largest_first[:, first:last], True)
        return torch.where(kept, rows, 0.0).view(vector.shape)
