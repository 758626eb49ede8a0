"""Spherical interpolation between two experts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.base import MethodOptions, StaticMethod
from pave_lightning.merging.evidence import Evidence
from pave_lightning.merging.registry import merge_method
from pave_lightning.weights import Parameter, TaskVectors

# Beyond this cosine two weights count as parallel (or opposed) and are interpolated linearly.
PARALLEL = 0.9995


class SlerpOptions(MethodOptions):
    """Options of spherical interpolation."""

    t: float = Field(default=0.5, ge=0, le=1)
    """How far to go from the first task's expert (0) to the second one's (1)."""


@merge_method("slerp")
class Slerp(StaticMethod[SlerpOptions]):
    r"""Go from one expert's weight to the other's along the arc between them; exactly two experts.

    Each tensor is one long vector. With :math:`\cos\theta` of the two WEIGHTS (not task vectors),
    :math:`W = \frac{\sin((1-t)\theta)}{\sin\theta} W_1 + \frac{\sin(t\theta)}{\sin\theta} W_2`; linear where
    :math:`|\cos\theta| > 0.9995`. Experts of one base are nearly parallel, so most of their large tensors are
    interpolated linearly, and with t = 0.5 averaged. Cost: two passes over each tensor.

    Source: Shoemake, *Animating rotation with quaternion curves*, SIGGRAPH 1985, in the form in which merging tools use
    it: the coefficients multiply the weights as they are, not their directions. Departure: where one of the weights is
    zero there is no angle, and interpolation is linear.
    """

    summary = "spherical interpolation between the weights of two experts"
    source = "Shoemake 1985, SIGGRAPH"
    ordered = True
    Options = SlerpOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """More than two experts."""
        yield from super().problems(vectors, evidence)
        if len(vectors.tasks) != 2:
            yield f"slerp goes between exactly two experts, found {len(vectors.tasks)}: {', '.join(vectors.tasks)}"

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The interpolated weight minus the base."""
        first, second = vectors.values()
        one, two, excess = _coefficients(base + first, base + second, self.options.t)
        return one * first + two * second + excess * base


def _coefficients(first: Tensor, second: Tensor, t: float) -> tuple[float, float, float]:
    """What the two weights are multiplied with, and by how much that exceeds one."""
    squared = [float((a * b).sum(dtype=torch.float64)) for a, b in ((first, first), (second, second), (first, second))]
    lengths = math.sqrt(squared[0]) * math.sqrt(squared[1])
    cosine = squared[2] / lengths if lengths > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return 1 - t, t, 0.0
    angle = math.acos(cosine)
    one, two = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return one, two, one + two - 1
