"""Singular values of a layer's weight as its own data see it, and what pruning its directions costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pave_lightning.statistics import LayerMoment
from pave_lightning.subspace import KnowledgeSpectrum, Metric, knowledge_spectrum

TASK_VECTOR = "task_vector"


@dataclass(frozen=True)
class Spectrum:
    """All singular values of one matrix.

    Attributes:
        task: name of the task.
        layer: name of the layer inside the backbone.
        matrix: which matrix: ``covariance`` for W C~, ``root`` for W C~^(1/2), ``identity`` for W, ``task_vector`` for
            W - W_0.
        values: shape ``(d,)``, float64, descending.
    """

    task: str
    layer: str
    matrix: str
    values: npt.NDArray[np.float64]


@dataclass(frozen=True)
class PruningError:
    r"""Relative error of a layer's output when only the first directions of a metric are kept.

    Attributes:
        task: name of the task.
        layer: name of the layer inside the backbone.
        metric: what ranks the directions: ``covariance``, ``root`` or ``identity``.
        rank: directions that are kept, r.
        full: directions that there are, d.
        kept: whether r is the rank that purification keeps.
        error: :math:`\|(W - W_r) X^T\|_F / \|W X^T\|_F`; NaN where the output is zero.
    """

    task: str
    layer: str
    metric: str
    rank: int
    full: int
    kept: bool
    error: float

    @property
    def pruned_share(self) -> float:
        """Share of the directions that are not kept."""
        return 1 - self.rank / self.full


def spectra_by_metric(weight: Tensor, moment: LayerMoment | None, damping: float) -> dict[Metric, KnowledgeSpectrum]:
    """The spectra of a weight in every metric that its moment allows.

    Args:
        weight: ``W``, shape ``(d_out, d_in)``.
        moment: what the layer's data say; None where nothing was captured, which leaves the metric identity.
        damping: added to the diagonal of the second moment.
    """
    found: dict[Metric, KnowledgeSpectrum] = {}
    if moment is not None:
        # The second moment of the outputs, W C W^T, says nothing about W C.
        metrics: tuple[Metric, ...] = ("root",) if moment.kind == "output" else ("covariance", "root")
        for metric in metrics:
            found[metric] = knowledge_spectrum(weight, moment.matrix, moment.kind, metric=metric, damping=damping)
    return found | {"identity": knowledge_spectrum(weight, None, metric="identity")}


def direction_energies(weight: Tensor, directions: Tensor, moment: LayerMoment) -> Tensor:
    r"""Mean squared output of a layer in each of some directions, :math:`u_i^T W C W^T u_i`, with the undamped C.

    Args:
        weight: ``W``, shape ``(d_out, d_in)``.
        directions: orthonormal columns :math:`u_i`, shape ``(d_out, k)``.
        moment: the layer's moment, of any kind.

    Returns:
        Shape ``(k,)``, float64, not negative.
    """
    known, columns = moment.matrix.double(), directions.double()
    if moment.kind == "output":
        return ((known @ columns) * columns).sum(dim=0).clamp_min(0)
    seen = columns.T @ weight.double()
    if moment.kind == "rows":
        return (known @ seen.T).square().sum(dim=0)
    image = seen @ known if moment.kind == "input" else columns.T @ known
    return (image * seen).sum(dim=1).clamp_min(0)


def output_energy(weight: Tensor, moment: LayerMoment) -> float:
    """Mean squared norm of a layer's output without its bias, tr(W C W^T), of a weight of shape ``(d_out, d_in)``."""
    known, full = moment.matrix.double(), weight.double()
    if moment.kind == "output":
        return float(known.trace())
    if moment.kind == "rows":
        return float((known @ full.T).square().sum())
    return float(((full @ known if moment.kind == "input" else known) * full).sum())


def pruning_errors(energies: Tensor, total: float) -> Tensor:
    r"""Relative output error of pruning the last m of some directions, for every m at once.

    Pruning is an orthogonal projection, so the squared error is the energy of the pruned directions:
    :math:`\|(W - W_r) X^T\|_F^2 / \|W X^T\|_F^2 = \sum_{i > r} e_i / \mathrm{tr}(W C W^T)`.

    Args:
        energies: energies of the last k directions of a spectrum, strongest direction first, shape ``(k,)``.
        total: the energy of the whole output.

    Returns:
        Errors at m = 0, 1, ..., k, shape ``(k + 1,)``, float64; NaN throughout when the output is zero.
    """
    pruned = torch.cat([energies.new_zeros(1), energies.flip(0).cumsum(0)])
    return (pruned / total).sqrt() if total > 0 else torch.full_like(pruned, math.nan)


def errors_of_layer(
    key: tuple[str, str],
    weight: Tensor,
    moment: LayerMoment,
    spectra: Mapping[Metric, KnowledgeSpectrum],
    pruned: Iterable[int],
    *,
    kept_rank: int | None = None,
) -> Iterator[PruningError]:
    """Pruning errors of one task's layer in every metric.

    Args:
        key: names of the task and the layer.
        weight: the fine-tuned weight, shape ``(d_out, d_in)``.
        moment: the layer's moment.
        spectra: what `spectra_by_metric` gives.
        pruned: numbers of directions to prune.
        kept_rank: the rank that purification keeps, at which the error is told as well.
    """
    total = output_energy(weight, moment)
    for metric, spectrum in spectra.items():
        full = len(spectrum.values)
        ranks = {full - count for count in pruned}
        if kept_rank is not None:
            ranks.add(kept_rank)
        tail = spectrum.tail(min(ranks, default=full))
        errors = pruning_errors(direction_energies(weight, tail, moment), total)
        for rank in sorted(ranks, reverse=True):
            yield PruningError(*key, metric, rank, full, rank == kept_rank, float(errors[full - rank]))
