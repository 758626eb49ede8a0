"""TIES: trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.base import MethodOptions, StaticMethod, register
from pave_lightning.subspace.selection import kth_largest_magnitudes
from pave_lightning.weights import Parameter, TaskVectors


class TiesOptions(MethodOptions):
    """Options of TIES."""

    density: float = Field(0.2, gt=0, le=1)
    """Share of each task vector's elements that survive the trim (k in the paper)."""


@register("ties")
class Ties(StaticMethod):
    r"""Trim each task vector to its largest elements, elect a sign per element, average what has that sign.

    1. Trim: of each task vector keep the ``density`` share of largest magnitude over the WHOLE model; elements that tie
       with the threshold are kept.
    2. Elect by mass: :math:`\gamma = \mathrm{sgn}(\sum_t \hat\tau_t)`.
    3. Disjoint mean: the mean of the non-zero :math:`\hat\tau_t` whose sign is :math:`\gamma`.

    The result is :math:`W = W_0 + \lambda` times that mean. Cost: two histogram passes for the thresholds, which need
    no sort and no copy of a task vector, and one elementwise pass.

    Source: Yadav et al., *TIES-Merging*, NeurIPS 2023 (arXiv 2306.01708), default density 0.2 and scale 1. Departure:
    where the trimmed elements sum to exactly zero the paper's sign is zero and nothing is merged; its code falls back
    to the sign of the majority of all elements.
    """

    summary = "trim small elements, elect signs by mass, average what agrees"
    source = "Yadav et al. 2023, arXiv 2306.01708"
    elementwise = True
    whole_model_pass = True
    default_scale = 1.0
    Options = TiesOptions

    def prepare(self, vectors: TaskVectors) -> None:
        """Find each task's global trim threshold."""
        total = sum(parameter.elements for parameter in vectors.parameters)
        kept = max(1, int(total * self.options.density))

        def blocks() -> Iterator[tuple[str, Tensor]]:
            # Parameter by parameter: a source may compute all tasks' weights of a layer together.
            for parameter in vectors.parameters:
                for rows in vectors.blocks(parameter):
                    for task in vectors.tasks:
                        yield task, vectors.vector(task, parameter, rows)

        self.thresholds = kth_largest_magnitudes(vectors.tasks, blocks, kept)

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The disjoint mean of the trimmed task vectors."""
        trimmed = torch.stack(
            [vector.where(vector.abs() >= self.thresholds[task], 0.0) for task, vector in vectors.items()]
        )
        elected = trimmed.sum(dim=0).sign()
        agrees = (trimmed.sign() == elected) & (trimmed != 0)
        return (trimmed * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
