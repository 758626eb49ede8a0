"""CAT: cut out of each update what disturbs the other tasks' features, then add up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.norm_moments import NormMomentMethod, NormMomentOptions
from pave_lightning.merging.registry import merge_method
from pave_lightning.subspace.ridge import TOLERANCE
from pave_lightning.subspace.solver import symmetric_eigen
from pave_lightning.weights import ADDITIVE, Parameter, ParameterKind


class CatOptions(NormMomentOptions):
    """Options of CAT Merging."""

    others: Literal["mean", "sum", "base"] = "sum"
    """What becomes of parameters that are no matrix weights, scales of norms, biases or shifts: the mean or the sum of
    their task vectors, or the base's values."""
    directions: int = Field(default=4, ge=0)
    """Output directions that are cut out of the others' matrix weights for the sake of each task, at most."""
    own_weight: float = Field(default=5.0, ge=0)
    """How much an update's effect on its own task's features counts against cutting a direction, relative to its effect
    on the disturbed task's."""
    norm_channels: int = Field(default=4, ge=0)
    """Channels that are cut out of the others' scales of norms for the sake of each task, at most."""
    norm_own_weight: float = Field(default=10.0, ge=0)
    """own_weight for scales of norms."""
    bias_channels: int = Field(default=4, ge=0)
    """Elements that are cut out of the others' biases and shifts for the sake of each task, at most."""
    removal: Literal["together", "one_by_one"] = "together"
    """How an update loses the directions that disturb several tasks: all that they span at once, or task after task, in
    the order of their names, each followed by restoring the update's norm."""
    norms: Literal["moments", "whole"] = "moments"
    """Scales of norms: cut by what they multiply (the paper, needs capture.norms), or left whole."""


@merge_method("cat")
class Cat(NormMomentMethod[CatOptions]):
    r"""For each task find where the other updates change its features most and their own least, and cut that out.

    Matrix weights (``d_out x d_in``): with :math:`C_t` the second moment of the layer's inputs inside expert t,

    .. math:: G_i = \sum_{j \ne i} \tau_j (C_i - \lambda C_j) \tau_j^T

    and :math:`B_i` the eigenvectors of its c largest eigenvalues, as far as they are positive; every other update loses
    them, :math:`\tau_j \leftarrow (I - B B^T) \tau_j`, and gets its norm back. Scales of norms: the channels where
    :math:`\sum_{j \ne i} \tau_j[d]^2 (m_i[d] - \lambda m_j[d])` is largest and positive are set to zero in all other
    updates, which get their norm back; :math:`m_t[d]` is the mean square of what the scale multiplies. Biases and
    shifts: the same with :math:`\sum_{j \ne i} \tau_j[d]^2`, without the norm. Then
    :math:`W = W_0 + s \sum_t \tau_t`.

    A task none of whose examples reached a layer is not disturbed there. Needs the second moments of all inputs
    (``capture.moments: input``) and, unless ``norms: whole``, those of the norms (``capture.norms: true``). Cost: for
    each layer and pair of tasks one product of an update with a moment, for each task an eigenvalue problem of order
    d_out, or of order T d_in where that is less.

    Source: Sun et al., *CAT Merging*, ICML 2025 (arXiv 2505.06977). Departures: features are those of the experts
    themselves, not of models with scaled-down task vectors; moments are means over a task's rows; directions that
    disturb several tasks are cut together, which does not depend on the order of tasks (``removal: one_by_one`` for the
    other way); channels of norms are cut only where the score is positive, as directions are; eigenvalues are taken
    from the top, as the objective asks; and biases are judged by the updates that disturb, not by the one that is
    disturbed. A port of the published code does neither of the last two; its ways to name c as a share are not there.
    """

    summary = "cut out of each update what disturbs the other tasks' features, then add up"
    source = "Sun et al. 2025, arXiv 2505.06977"
    without_moments = "whole"
    default_scale = 0.4
    Options: ClassVar[type[CatOptions]] = CatOptions

    def in_blocks(self, parameter: Parameter) -> bool:
        """Only what is added up as it is."""
        cut = (*ADDITIVE, ParameterKind.NORM_SCALE)
        return super().in_blocks(parameter) and parameter.kind not in cut

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The sum of what is left of the updates."""
        if parameter.kind is ParameterKind.NORM_SCALE:
            return self._merge_scale(parameter, vectors)
        if parameter.kind in ADDITIVE:
            return self._merge_added(vectors)
        return super().merge(parameter, base, vectors)

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The sum of the updates without the directions that disturb other tasks."""
        full = {task: vector.double() for task, vector in vectors.items()}
        if not base.numel():
            return torch.zeros_like(base)
        disturbing = self._disturbing(parameter, full)
        total = torch.zeros(parameter.matrix_shape, dtype=torch.float64)
        for task, vector in full.items():
            cuts = [disturbing[other] for other in sorted(disturbing) if other != task]
            if self.options.removal == "together" and cuts:
                cuts = [_span(torch.cat(cuts, dim=1))]
            left = vector
            for cut in cuts:
                left = _with_norm(left - cut @ (cut.T @ left), float(left.norm()))
            total += left
        return total

    def _disturbing(self, parameter: Parameter, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """For each task whose examples reached the layer, orthonormal output directions, ``(d_out, c)``."""
        basis, inside = _in_common(full)
        conflicts: dict[str, Tensor] = {}
        order = len(next(iter(inside.values())))
        own = torch.zeros(order, order, dtype=torch.float64)
        for task, moment in self.evidence.input_moments(full, parameter):
            conflicts[task] = torch.zeros_like(own)
            for other, vector in inside.items():
                changes = vector @ moment @ vector.T
                if other == task:
                    own += changes
                conflicts[task].add_(changes, alpha=self.options.own_weight if other == task else 1.0)
        # The task's own changes are in the sum of all, and were added to its conflict to take them out of it again.
        found = {task: self._leading(conflict - self.options.own_weight * own) for task, conflict in conflicts.items()}
        return found if basis is None else {task: basis @ directions for task, directions in found.items()}

    def _leading(self, conflict: Tensor) -> Tensor:
        eigen = symmetric_eigen(-(conflict + conflict.T) / 2)
        values = -eigen.values
        positive = int((values > TOLERANCE * values.abs().max()).sum())
        return eigen.smallest(min(self.options.directions, positive))

    def _merge_scale(self, parameter: Parameter, vectors: Mapping[str, Tensor]) -> Tensor:
        full = {task: vector.double() for task, vector in vectors.items()}
        squares = {task: self.evidence.norm_moment(task, parameter) for task in full} if self._reads_norms else {}
        kept = {task: torch.ones_like(vector) for task, vector in full.items()}
        nothing = torch.zeros(parameter.shape, dtype=torch.float64)
        for task, disturbed in squares.items():
            if disturbed is None:
                continue
            score = nothing.clone()
            for other, vector in full.items():
                if other != task:
                    own = squares[other]
                    score += vector.square() * (
                        disturbed - self.options.norm_own_weight * (nothing if own is None else own)
                    )
            _drop(kept, task, score, self.options.norm_channels)
        left = [_with_norm(vector * kept[task], float(vector.norm())) for task, vector in full.items()]
        return torch.stack(left).sum(dim=0).float()

    @property
    def _reads_norms(self) -> bool:
        return bool(self.options.norms == "moments")

    def _merge_added(self, vectors: Mapping[str, Tensor]) -> Tensor:
        kept = {task: torch.ones_like(vector, dtype=torch.float64) for task, vector in vectors.items()}
        squares = {task: vector.double().square() for task, vector in vectors.items()}
        everyone = torch.stack(list(squares.values())).sum(dim=0)
        for task, own in squares.items():
            _drop(kept, task, everyone - own, self.options.bias_channels)
        return torch.stack([vector * kept[task] for task, vector in vectors.items()]).sum(dim=0).float()


def _drop(kept: Mapping[str, Tensor], task: str, score: Tensor, count: int) -> None:
    """Set the channels of the largest positive scores to zero for all tasks but one; of equal ones, the first."""
    order = score.flatten().argsort(descending=True, stable=True)[:count]
    order = order[score.flatten()[order] > 0]
    for other, mask in kept.items():
        if other != task:
            mask.view(-1)[order] = 0


def _in_common(updates: Mapping[str, Tensor]) -> tuple[Tensor | None, Mapping[str, Tensor]]:
    """An orthonormal basis of what all updates' outputs span, and the updates in it; None and themselves if it is all.

    Conflicts of several tasks lie in the space of all of them, which may have as many dimensions as there are outputs.
    """
    height, width = next(iter(updates.values())).shape
    if len(updates) * width >= height:
        return None, updates
    basis, inside = torch.linalg.qr(torch.cat(list(updates.values()), dim=1))
    return basis, dict(zip(updates, inside.split(width, dim=1), strict=True))


def _span(columns: Tensor) -> Tensor:
    """An orthonormal basis of what columns of norm 1 span."""
    left, values, _ = torch.linalg.svd(columns, full_matrices=False)
    basis: Tensor = left[:, values > TOLERANCE]
    return basis


def _with_norm(vector: Tensor, norm: float) -> Tensor:
    """What is left of a vector at the norm that it had; zero where nothing but rounding is left."""
    found = float(vector.norm())
    return vector * (norm / found) if found > TOLERANCE * norm else torch.zeros_like(vector)
