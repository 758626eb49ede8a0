"""Isotropic merging: one singular value for all directions that the tasks' sum, or the tasks themselves, point in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.evidence import Evidence
from pave_lightning.merging.matrices import MatrixMethod, TableOptions
from pave_lightning.merging.registry import merge_method
from pave_lightning.subspace import leading_triplets, polar_factor
from pave_lightning.subspace.factorisation import rounding_level
from pave_lightning.weights import Parameter, TaskVectors


def _sum(vectors: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(vectors.values())).double().sum(dim=0)


@merge_method("iso_c")
class IsoC(MatrixMethod[TableOptions]):
    r"""Add up the task vectors and give all singular directions of the sum the mean singular value.

    For a matrix weight :math:`\sum_t \tau_t = U S V^T`: :math:`\Delta = \bar\sigma \, U V^T`, where
    :math:`\bar\sigma` is the mean of all :math:`\min(d_{out}, d_{in})` singular values, zeros included. All other
    parameters are averaged, and the scale multiplies them too. Needs no data. Cost: one symmetric eigenproblem of the
    smaller side a matrix, whatever the number of tasks.

    Source: Marczak et al., *No Task Left Behind*, ICML 2025 (arXiv 2502.04959). The published code searches the scale
    on validation data, 0.1 to 3.0; 1 is the default of a common library, and for eight vision tasks 1.3 to 1.5 was
    best. Departures: of a sum without full rank (such as of LoRA updates) only the directions above float32 rounding
    get the mean value, which stays the mean over all of them; a polar factor would fill up the others with arbitrary
    directions of the same strength. Embeddings are averaged unless ``embeddings``
    is true (the code decomposes every two-dimensional tensor).
    """

    summary = "the sum of the task vectors with all its singular values made equal"
    source = "Marczak et al. 2025, arXiv 2502.04959"
    Options = TableOptions

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The isometry of the sum, times its mean singular value."""
        total = leading_triplets(_sum(vectors))
        merged: Tensor = total.left @ total.right
        return merged * (total.values.sum() / max(1, min(base.shape)))


class IsoCtsOptions(TableOptions):
    """Options of Iso-CTS."""

    common_share: float = Field(default=0.8, gt=0, lt=1)
    """Share of a matrix's singular directions that belong to the tasks' sum; the rest is split among the tasks."""


@merge_method("iso_cts")
class IsoCts(MatrixMethod[IsoCtsOptions]):
    r"""One singular value for the leading directions of the tasks' sum and for directions of each task besides them.

    For a matrix weight with :math:`r = \min(d_{out}, d_{in})` singular directions, of which each task gets p and the
    sum the other :math:`k = r - pT` (p is the nearest whole number to :math:`(r - \lfloor 0.8 r \rfloor) / T`):

    1. :math:`U_c, S_c, V_c`: the k leading singular triplets of :math:`\sum_t \tau_t`.
    2. :math:`U_t, S_t, V_t`: the p leading singular triplets of :math:`\tau_t - U_c U_c^T \tau_t`.
    3. :math:`\Delta = \bar\sigma \, \mathrm{polar}([U_1 \dots U_T, U_c]) \, \mathrm{polar}([V_1 \dots V_T, V_c])^T`,
       where :math:`\bar\sigma` is the mean of all r singular values of both kinds.

    All other parameters are averaged, and the scale multiplies them too. Needs no data. Cost: one symmetric
    eigenproblem of order r a matrix and task, and three a matrix.

    Source: Marczak et al., *No Task Left Behind*, ICML 2025 (arXiv 2502.04959); on the scale see `IsoC` (1.5 to 1.9 was
    best). Departures: directions that are nothing but float32 rounding, such as the residuals of tasks that lie within
    the common directions, and directions of several tasks that coincide are not replaced by arbitrary ones (the mean
    still counts r values); a number of tasks for which p is zero is refused. Embeddings are averaged unless
    ``embeddings`` is true.
    """

    summary = "equal singular values for common directions and for each task's own"
    source = "Marczak et al. 2025, arXiv 2502.04959"
    Options = IsoCtsOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Matrices that leave no direction to the tasks or to their sum."""
        yield from super().problems(vectors, evidence)
        yield from self.refusals(vectors, self.misfit)

    def misfit(self, parameter: Parameter, tasks: int) -> str | None:
        """It leaves no direction to the tasks or to their sum."""
        directions, share = min(parameter.matrix_shape), self.options.common_share
        common, own = self._split(directions, tasks)
        if own and common > 0:
            return None
        what = "the tasks' common part" if own else f"each of {tasks} tasks"
        return (
            f"with common_share {share:g} none of its {directions} singular directions is left for {what}; "
            f"{'raise' if own else 'lower'} common_share, merge fewer tasks, or use iso_c"
        )

    def _split(self, directions: int, tasks: int) -> tuple[int, int]:
        """How many directions are common, and how many are each task's own."""
        own = round((directions - math.floor(directions * self.options.common_share + 1e-9)) / tasks)
        return directions - tasks * own, own

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The isometry of common and own directions, times their mean singular value."""
        common, own = self._split(min(base.shape), len(vectors))
        shared = leading_triplets(_sum(vectors), common)
        parts = []
        for vector in vectors.values():
            full = vector.double()
            rest = full - shared.left @ (shared.left.T @ full)
            parts.append(leading_triplets(rest, own, floor=rounding_level(full)))
        parts.append(shared)
        left = polar_factor(torch.cat([part.left for part in parts], dim=1))
        right = polar_factor(torch.cat([part.right for part in parts], dim=0))
        merged: Tensor = left @ right
        return merged * (torch.cat([part.values for part in parts]).sum() / max(1, min(base.shape)))
