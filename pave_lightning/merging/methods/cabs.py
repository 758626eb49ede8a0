"""CABS: one sparse mask a task, balanced within groups, none over another."""

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


class CabsOptions(MethodOptions):
    """Options of CABS."""

    n: int = Field(default=3, ge=1)
    """How many elements of a group each task keeps. The source uses 3 of 32 for RoBERTa, 64 of 256 for Mistral."""
    m: int = Field(default=32, ge=2)
    """How many consecutive elements make up a group."""


@merge_method("cabs")
class Cabs(StaticMethod[CabsOptions]):
    r"""Task after task keeps the n largest of every m consecutive elements that no earlier task has taken; add up.

    The flattened tensor is cut into groups of m. In each group the first task keeps its n elements of largest
    magnitude, the second its n largest of those that are left, and so on, so that no two tasks change the same weight:
    :math:`W = W_0 + \lambda \sum_t m_t \odot \tau_t`. No rescaling; the scale makes up for what is left out. The order
    of the tasks matters: earlier ones choose first. Of elements that tie the first one is taken; zeros take places too.
    Cost: one sort of every group and task.

    Source: Yang et al., *CABS*, ICML 2025 (arXiv 2503.01874), which merges two tasks with a scale for each and searches
    it between 0.4 and 1 for 3:32; here all tasks share one scale, by default the middle, 0.7. Departures: more than two
    tasks go on in the same way; of an incomplete last group of g elements each task keeps ``floor(n g / m)``, where the
    published code drops the group; and what the published script for large models does when n is m / 2 or more, which
    lets masks overlap, is refused.
    """

    summary = "each task keeps the largest of every m elements that earlier tasks left, add up"
    source = "Yang et al. 2025, arXiv 2503.01874"
    elementwise = True
    single_precision = True
    ordered = True
    default_scale = 0.7
    Options = CabsOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Groups that are too small for all tasks."""
        yield from super().problems(vectors, evidence)
        n, m, tasks = self.options.n, self.options.m, len(vectors.tasks)
        if tasks * n > m:
            fewer = f"options.n to at most {m // tasks} or " if m >= tasks else ""
            yield (
                f"{tasks} tasks cannot each keep {n} elements of a group of {m}, as no two may keep the same; "
                f"set {fewer}options.m to at least {tasks * n}"
            )

    def in_blocks(self, parameter: Parameter) -> bool:
        """Where no group reaches from one row into the next."""
        return len(parameter.shape) > 0 and math.prod(parameter.shape[1:]) % self.options.m == 0

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The sum of the task vectors under their disjoint masks."""
        n, m = self.options.n, self.options.m
        whole = base.numel() - base.numel() % m
        flat = [vector.flatten() for vector in vectors.values()]
        groups = _merge_groups([vector[:whole].view(-1, m) for vector in flat], n)
        tail = [vector[whole:].view(1, -1) for vector in flat]
        last = _merge_groups(tail, n * tail[0].shape[1] // m)
        return torch.cat([groups.flatten(), last.flatten()]).view(base.shape)


def _merge_groups(vectors: list[Tensor], n: int) -> Tensor:
    """The sum of the n largest elements a row of each vector that no vector before has taken; shape (groups, m)."""
    merged = torch.zeros_like(vectors[0])
    taken = torch.zeros_like(merged, dtype=torch.bool)
    for vector in vectors:
        # Below every magnitude, so that an element that is taken comes after all free ones.
        magnitudes = vector.abs().masked_fill(taken, -1.0)
        largest = magnitudes.sort(dim=1, descending=True, stable=True).indices[:, :n]
        merged.scatter_add_(1, largest, vector.gather(1, largest))
        taken.scatter_(1, largest, True)
    return merged
