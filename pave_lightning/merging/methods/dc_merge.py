"""DC-Merge: merge the tasks entry by entry in the space that their leading singular directions cover."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.evidence import Evidence
from pave_lightning.merging.matrices import MatrixMethod, TableOptions
from pave_lightning.merging.methods.tsv import too_narrow
from pave_lightning.merging.registry import merge_method
from pave_lightning.subspace import leading_triplets, polar_factor
from pave_lightning.weights import Parameter, TaskVectors

# Numbers that agree to this share of their size differ by rounding.
_TIED = 1e-9


class DcMergeOptions(TableOptions):
    """Options of DC-Merge; the defaults are those for full fine-tuning.

    For LoRA updates the source takes ``rank`` 16 (the updates' rank) and ``smoothing`` ``mean``, or ``linear`` for its
    smallest model.
    """

    rank: int | None = Field(default=None, ge=1)
    """How many singular directions each task keeps of a matrix; an equal part of them where nothing is said, and not
    more than that."""
    keep_share: float = Field(default=0.001, gt=0, le=1)
    """Share of each task's entries in the cover space that survive the trim; at least one does."""
    smoothing: Literal["none", "mean", "linear"] = "none"
    """What becomes of a task's singular values before the merge: nothing, all become their mean, or they fall linearly
    with the same sum."""
    smoothing_ratio: float = Field(default=5.0, ge=1)
    """The most that the largest singular value may be of the smallest after linear smoothing."""


@merge_method("dc_merge")
class DcMerge(MatrixMethod[DcMergeOptions]):
    r"""Write all tasks in the space that their leading singular directions cover, and merge there entry by entry.

    For a matrix weight with :math:`r = \min(d_{out}, d_{in})` singular directions and T tasks:

    1. :math:`\hat\tau_t = U_t S_t V_t^T`: the :math:`q = \lfloor r / T \rfloor` leading singular triplets of
       :math:`\tau_t`; the singular values may be smoothed.
    2. Cover space: :math:`U = \mathrm{polar}([U_1 \dots U_T])` and :math:`V = \mathrm{polar}([V_1 \dots V_T])`.
    3. :math:`M_t = U^T \hat\tau_t V` (qT x qT), of which only the ``keep_share`` entries of largest magnitude stay.
    4. Entry by entry, elect the sign of :math:`\sum_t M_t` and average the non-zero entries that have it.
    5. :math:`\Delta = U \, (M \odot B) \, V^T`, where B keeps the T diagonal blocks of size q.

    All other parameters are averaged, and the scale multiplies them too. Needs no data. Cost: one symmetric
    eigenproblem of order r a matrix and task, two of order qT a matrix, and products of that size.

    Source: Zhang et al., *DC-Merge*, CVPR 2026 (arXiv 2603.06242), after the published code, for full fine-tuning and
    for LoRA updates; it searches the scale on validation data, 0.1 to 3.0, and has no default. Departures: where T does
    not divide r, or a task has fewer directions above float32 rounding, the cover space has as many dimensions as there
    are directions (the code fills it up with arbitrary ones, which it blocks in step 5 but counts in step 3); where
    directions of several tasks coincide, the cover space has none instead of arbitrary ones; entries that tie with the
    threshold, and sums that cancel, do so up to rounding. Embeddings are averaged unless ``embeddings`` is true (the
    code decomposes every two-dimensional tensor). Matrices with fewer than two outputs a task are refused (the code
    needs one of each side).
    """

    summary = "entries that agree in the space covered by all tasks' leading singular directions"
    source = "Zhang et al. 2026, arXiv 2603.06242"
    Options = DcMergeOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Matrices that have too few singular directions."""
        yield from super().problems(vectors, evidence)
        yield from self.refusals(vectors, self.misfit)

    def misfit(self, parameter: Parameter, tasks: int) -> str | None:
        """It has too few singular directions."""
        return too_narrow(parameter, tasks, self.options.rank)

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """Trim, elect and average in the cover space; only its diagonal blocks are needed."""
        rank = min(base.shape) // len(vectors) if self.options.rank is None else self.options.rank
        parts = [leading_triplets(vector, rank) for vector in vectors.values()]
        left = polar_factor(torch.cat([part.left for part in parts], dim=1))
        right = polar_factor(torch.cat([part.right for part in parts], dim=0))
        blocks = [slice(*ends) for ends in pairwise(accumulate((len(part.values) for part in parts), initial=0))]
        found: list[list[Tensor]] = [[] for _ in blocks]
        for part in parts:
            entries = (left.T @ (part.left * self._smoothed(part.values))) @ (part.right @ right.T)
            trimmed = largest_entries(entries, self.options.keep_share)
            for block, kept in zip(blocks, found, strict=True):
                kept.append(trimmed[block, block].clone())
        merged = torch.zeros(base.shape, dtype=torch.float64, device=base.device)
        for block, kept in zip(blocks, found, strict=True):
            merged += left[:, block] @ agreeing_mean(kept) @ right[block]
        return merged

    def _smoothed(self, values: Tensor) -> Tensor:
        if self.options.smoothing == "none" or not len(values):
            return values
        if self.options.smoothing == "mean":
            return values.mean().expand_as(values)
        ratio = min(self.options.smoothing_ratio, float(values[0] / values[-1]))
        ramp = torch.linspace(ratio, 1.0, len(values), dtype=values.dtype, device=values.device)
        return ramp * (values.sum() / ramp.sum())


def largest_entries(matrix: Tensor, share: float) -> Tensor:
    """A matrix with only the given share of its entries, those of largest magnitude, and at least one.

    Entries that tie with the smallest of them up to rounding are kept as well.

    Args:
        matrix: shape ``(m, n)``, float64.
        share: in (0, 1].
    """
    if not matrix.numel():
        return matrix
    kept = max(1, math.floor(share * matrix.numel() + _TIED))
    magnitudes = matrix.abs()
    threshold = magnitudes.flatten().kthvalue(matrix.numel() - kept + 1).values
    return matrix.where(magnitudes >= (1 - _TIED) * threshold, 0.0)


def agreeing_mean(matrices: Sequence[Tensor]) -> Tensor:
    """Entry by entry the mean of the non-zero values that have the sign of the sum; zero where the sum cancels.

    Args:
        matrices: of one shape, float64.
    """
    stacked = torch.stack(list(matrices))
    total = stacked.sum(dim=0)
    elected = total.where(total.abs() > _TIED * stacked.abs().sum(dim=0), 0.0).sign()
    agrees = (stacked.sign() == elected) & (stacked != 0)
    mean: Tensor = (stacked * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
    return mean
