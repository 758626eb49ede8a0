"""OPCM: merge one expert after the other, each without what would disturb those merged before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.base import Cost, MethodOptions
from pave_lightning.merging.registry import merge_method
from pave_lightning.merging.sequential import SequentialMethod
from pave_lightning.subspace.factorisation import leading_triplets
from pave_lightning.weights import Parameter, TaskVectors


class OpcmOptions(MethodOptions):
    """Options of OPCM."""

    threshold: float = Field(default=0.5, ge=0, le=1)
    """Share of the singular values' sum, of what has been merged so far, whose directions new experts keep out of
    (alpha in the paper)."""
    zero_diagonal: bool = True
    """Whether a new expert also loses its share in each singular pair of what has been merged so far, so that the two
    are orthogonal."""
    removed: Literal["block", "cross"] = "block"
    """What is removed in the coordinates of the leading directions: what maps leading inputs to leading outputs (the
    published code), or all that reads from leading inputs or writes to leading outputs."""


@merge_method("opcm")
class Opcm(SequentialMethod[OpcmOptions]):
    r"""Add the task vectors in order, each projected away from what is there already; give the sum their mean norm.

    With the running total :math:`D` of a weight (``d_out x d_in``) and its SVD :math:`U S V^T`, a new task vector is
    written as :math:`C = U^T \tau_t V`, and r is the first index (from 0) at which the cumulative share of the singular
    values exceeds the threshold. The block :math:`C_{:r,:r}` is removed, and the diagonal, which makes what is left
    orthogonal to D; the rest is added: :math:`D \leftarrow D + \tilde\tau_t`. All other parameters are added up. In
    the end the whole model's D is brought to the mean norm of the task vectors, so there is no scale to choose.

    The published algorithm divides by :math:`\lambda_t = \|\mathrm{raw}_t\| / \mathrm{mean}_{i \le t} \|\tau_i\|` after
    each task and multiplies with it again before the next. The projection does not depend on the length of D, so the
    factors in between cancel: each weight can be merged by itself, and one factor for the whole model is applied at
    the end. Hence the order of the tasks matters, and an expert may be added later (see `SequentialMethod`). Cost:
    T - 1 thin SVDs a weight, through the Gram matrix of its smaller side (float64). No data.

    Source: Tang et al., *Merging Models on the Fly Without Retraining*, NeurIPS 2025 (arXiv 2501.09522). Departures:
    the published code means to zero the diagonal but zeroes a copy (FusionBench's later version does zero it);
    ``zero_diagonal=False`` does as it did. Only the diagonal of singular values that are not zero is removed, because
    the other singular vectors are arbitrary. Tasks come in the order of the recipe, where the code shuffles them; every
    matrix weight is projected, not only those of linear modules; norms are those of parameters alone. As quoted
    elsewhere, the paper's formula keeps only indices that are both r or more: ``removed="cross"``.
    """

    summary = "one expert after the other, each orthogonal to what has been merged before it"
    source = "Tang et al. 2025, arXiv 2501.09522"
    each_expert = True
    cost = Cost.DECOMPOSITION
    ordered = True
    rescales = True
    held_models = 1
    Options = OpcmOptions

    def in_blocks(self, parameter: Parameter) -> bool:
        """Only what is added up."""
        return not parameter.is_matrix

    def prepare(self, vectors: TaskVectors) -> None:
        """Start the norms anew."""
        super().prepare(vectors)
        new = vectors.tasks if self._start is None else vectors.tasks[1:]
        self._squares = self.states.add("squares", dict.fromkeys(new, 0.0), "sum")
        self._total = self.states.add("total", 0.0, "sum")

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The running total after the last task."""
        for task in self._squares.value:
            self._squares.value[task] += _square(vectors[task])
        running = list(self.running(vectors).values())
        total = self._fold(parameter, running) if parameter.is_matrix else torch.stack(running).sum(dim=0)
        self._total.value += _square(total)
        return total

    def _fold(self, parameter: Parameter, vectors: list[Tensor]) -> Tensor:
        options = self.options
        total, *others = (parameter.as_matrix(vector).double() for vector in vectors)
        for vector in others:
            total = total + projected(vector, total, options)
        return parameter.from_matrix(total.float())

    def norms(self) -> float:
        """Sum of the norms of all task vectors merged so far."""
        before = 0.0 if self._start is None else self._start.norms
        return before + math.fsum(math.sqrt(square) for square in self._squares.value.values())

    def divisor(self) -> float:
        """The total's norm over the mean norm of the task vectors; 1 where there is nothing to bring to a norm."""
        total, mean = math.sqrt(self._total.value), self.norms() / self.merged()
        return total / mean if total > 0 and mean > 0 else 1.0

    def factor(self, parameter: Parameter) -> float:
        """What brings the total to the mean norm of the task vectors."""
        return 1 / self.divisor()


def projected(vector: Tensor, total: Tensor, options: OpcmOptions) -> Tensor:
    """A task vector without what would disturb what has been merged so far.

    Args:
        vector: the task vector, ``d_out x d_in``, float64.
        total: what has been merged so far, of any length, same shape, float64.
        options: what is removed.

    Returns:
        Same shape, float64; the vector itself where nothing has been merged.
    """
    triplets = leading_triplets(total)
    left, values, right = triplets.left, triplets.values, triplets.right
    if not len(values):
        return vector
    cumulative = values.cumsum(0)
    leading = int((cumulative / cumulative[-1] <= options.threshold).sum())
    if options.removed == "cross":
        vector = vector - left[:, :leading] @ (left[:, :leading].T @ vector)
        vector = vector - (vector @ right[:leading].T) @ right[:leading]
    shares = left.T @ vector @ right.T
    removed = torch.diag(shares.diagonal()) if options.zero_diagonal else torch.zeros_like(shares)
    removed[:leading, :leading] = shares[:leading, :leading]
    return vector - left @ removed @ right


def _square(vector: Tensor) -> float:
    return float(vector.double().square().sum())
