"""RobustMerge: prune the factors of adapters and make up for what was pruned, direction by direction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.base import Cost
from pave_lightning.merging.evidence import Evidence, Need
from pave_lightning.merging.low_rank import LowRankMethod, adapted_tasks, quoted
from pave_lightning.merging.matrices import MatrixOptions
from pave_lightning.merging.registry import merge_method
from pave_lightning.weights import Parameter, TaskVectors


class RobustMergeOptions(MatrixOptions):
    """Options of RobustMerge."""

    density: float = Field(default=0.2, gt=0, le=1)
    """Share of each factor's elements that survives the pruning, those of largest magnitude."""
    own_scales: float = Field(default=0.2, gt=0, le=1)
    """Share of a task's rank directions, those whose row of A lost most, that keep the scale that makes up for their
    pruning; all others are raised to the smallest of these scales."""
    factor_weight: float = Field(default=2.0, gt=0)
    """What both merged factors are multiplied with, so that the product is multiplied with its square."""


@merge_method("robust_merge")
class RobustMerge(LowRankMethod[RobustMergeOptions]):
    r"""Prune the adapters' factors, rescale each rank direction by what was pruned, and merge the factors.

    For a layer with the factors :math:`B_t` (d_out x r) and :math:`A_t` (r x d_in) of T tasks:

    1. :math:`\hat A_t, \hat B_t`: the ``density`` share of largest magnitude of each factor, the rest zero.
    2. :math:`s_{t,i} = \sum_j |A_{t,ij}| / \sum_j |\hat A_{t,ij}|` for each rank direction i, raised to at least the
       :math:`1 - q` quantile of the task's scales, where q is ``own_scales``.
    3. :math:`A = c \sum_t \hat A_t` and
       :math:`B = c \sum_t \hat B_t \, \mathrm{diag}(s_t) \; \mathrm{diag}(\sum_t s_t)^{-1}`.

    :math:`W = W_0 + \lambda B A`. Note that the product holds terms :math:`B_t A_u` of different tasks, and that it
    depends on the factors, not on their products alone: direction i of one task is merged with direction i of another.
    All adapters must have the same rank in a layer. Cost: two selections an adapter. Needs no data.

    Source: Zeng et al., *RobustMerge*, NeurIPS 2025 (arXiv 2502.17159). The weight c = 2 stands in the published code,
    in both factors, and so multiplies the product by 4, while A is a sum over the tasks and B a weighted mean; the
    paper's coefficient is not told apart from it. Here c is the option ``factor_weight`` and :math:`\lambda` is the
    scale, 1 by default, which multiplies all other parameters too. Departures: the code's threshold keeps one element
    more; where a row of A is pruned as a whole its scale would be infinite, and is the task's largest finite one (1 if
    it has none); alpha / r is part of B, which the code adds when the merged adapter is used.
    """

    summary = "prune the adapters' factors, rescale their directions, merge the factors"
    source = "Zeng et al. 2025, arXiv 2502.17159"
    needs = frozenset({Need.LOW_RANK})
    cost = Cost.ELEMENTWISE
    Options = RobustMergeOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Layers in which the adapters' ranks differ, or that some tasks do not adapt."""
        yield from super().problems(vectors, evidence)
        yield from unequal_ranks(vectors, every_task=True)

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The product of the merged factors."""
        pairs = self.factors(parameter).values()
        left = torch.stack([pruned(pair[0], self.options.density) for pair in pairs])
        right = torch.stack([pruned(pair[1], self.options.density) for pair in pairs])
        scales = torch.stack(
            [self._scales(whole, kept) for (_, whole), kept in zip(pairs, right, strict=True)]
        )  # (tasks, r)
        merged_left = (left * scales[:, None, :]).sum(dim=0) / scales.sum(dim=0)
        weight: float = self.options.factor_weight
        return (weight * merged_left) @ (weight * right.sum(dim=0))

    def _scales(self, whole: Tensor, kept: Tensor) -> Tensor:
        """What makes up for the pruning of each row of A, ``(r,)``."""
        before, after = whole.abs().sum(dim=1), kept.abs().sum(dim=1)
        found = after > 0
        largest = float((before[found] / after[found]).max()) if bool(found.any()) else 1.0
        scales = torch.where(found, before / after.where(found, 1.0), largest)
        index = min(int(len(scales) * (1 - self.options.own_scales) + 1e-9), len(scales) - 1)
        return scales.clamp(min=float(scales.sort().values[index]))


def pruned(factor: Tensor, density: float) -> Tensor:
    """The share of a factor's elements of largest magnitude, at least one, zero elsewhere; those that tie stay too.

    Example:
        >>> pruned(torch.tensor([[3.0, -1.0], [0.5, -2.0]]), density=0.5)
        tensor([[ 3.,  0.],
                [ 0., -2.]])
    """
    count = max(1, int(factor.numel() * density + 1e-9))
    threshold = factor.abs().flatten().kthvalue(factor.numel() - count + 1).values
    return factor.where(factor.abs() >= threshold, 0.0)


def unequal_ranks(vectors: TaskVectors, *, every_task: bool) -> Iterator[str]:
    """Layers whose factors cannot be merged with each other, one line each.

    Args:
        vectors: the task vectors.
        every_task: whether each task must adapt each layer that some task adapts.
    """
    by_name = {parameter.name: parameter for parameter in vectors.parameters}
    for name, tasks in adapted_tasks(vectors).items():
        pairs = {task: vectors.factors(task, by_name[name]) for task in tasks}
        ranks = {task: len(pair[1]) for task, pair in pairs.items() if pair is not None}
        if len(set(ranks.values())) > 1:
            told = ", ".join(f"{rank} in '{task}'" for task, rank in ranks.items())
            yield f"{name}: adapters of one rank are needed, found rank {told}; core_space and knots take any ranks"
        missing = [task for task in vectors.tasks if task not in tasks]
        if missing and every_task:
            yield f"{name} has an adapter in {quoted(tasks)}, but none in {quoted(missing)}"
