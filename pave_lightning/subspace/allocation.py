"""How many components each task keeps in one layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def allocate_ranks(spectra: Mapping[str, Tensor], rho: float, stopping_share: float = 1.5) -> dict[str, int]:
    r"""Share one layer's budget of components among its tasks by their normalised singular values.

    Every task begins at full rank ``d`` and the components with the smallest ``s_i / s_1`` over all tasks are removed,
    until ``round(rho * T * d)`` of the ``T * d`` components are left. No task loses more than
    ``round(stopping_share * (d - round(rho * d)))``. Where these caps put the budget out of reach, as many components
    go as the caps allow.

    Spectra descend, so removing the smallest values one after the other always takes a task's last components first:
    the search is one selection, and it minimises the sum of any increasing function of the removed normalised values
    over all allocations with that budget and those caps. Between equal values the one further down its spectrum goes
    first, then the one whose task comes first in the alphabet, so the order of ``spectra`` never matters.

    Source: spectral rank allocation in An, Yang, Torr, Ghanem, "Purifying Task Vectors in Knowledge-Aware Subspace for
    Model Merging", arXiv 2510.14697. The published loop removes one component more than the budget asks for; here the
    budget is met exactly.

    Args:
        spectra: task -> its ``d`` singular values, shape ``(d,)``, descending, any float dtype (used as float64).
        rho: share of all components to keep, in (0, 1].
        stopping_share: the most a task may lose, as a multiple of the even share.

    Returns:
        task -> number of components to keep, in the order of ``spectra``.

    Raises:
        ValueError: ``rho`` or ``stopping_share`` is out of range; there are no spectra; a spectrum is empty, of another
            length than the others, not finite, negative, not descending or all zeros.

    Example:
        >>> strong, weak = torch.tensor([4.0, 3.0, 2.0, 2.0]), torch.tensor([4.0, 2.0, 0.1, 0.1])
        >>> allocate_ranks({"strong": strong, "weak": weak}, rho=0.75)
        {'strong': 4, 'weak': 2}
    """
    length = _common_length(spectra, rho)
    if not (math.isfinite(stopping_share) and stopping_share >= 0):
        raise ValueError(f"stopping_share must be a finite number of at least 0, found {stopping_share}")
    cap = min(length, round(stopping_share * (length - round(rho * length))))
    total = len(spectra) * length
    removals = min(total - round(rho * total), len(spectra) * cap)

    tasks = sorted(spectra)
    # Rows are positions counted from the end of the spectrum: a stable sort then settles ties by depth, then by name.
    eligible = torch.stack([_normalised(task, spectra[task]).flip(0)[:cap] for task in tasks], dim=1)
    removed = torch.sort(eligible.flatten(), stable=True).indices[:removals] % len(tasks)
    lost = torch.bincount(removed, minlength=len(tasks)).tolist()
    kept = {task: length - int(count) for task, count in zip(tasks, lost, strict=True)}
    return {task: kept[task] for task in spectra}


def even_ranks(spectra: Mapping[str, Tensor], rho: float) -> dict[str, int]:
    """Give every task of one layer the same number of components, ``round(rho * d)``.

    This is the plain share that the spectral allocation is compared with in arXiv 2510.14697 (table 4).

    Args:
        spectra: task -> its ``d`` singular values, shape ``(d,)``. Only their length is used.
        rho: share of the components to keep, in (0, 1].

    Returns:
        task -> number of components to keep, in the order of ``spectra``.

    Raises:
        ValueError: ``rho`` is out of range; there are no spectra; a spectrum is empty or of another length than the
            others.
    """
    length = _common_length(spectra, rho)
    return dict.fromkeys(spectra, round(rho * length))


def _common_length(spectra: Mapping[str, Tensor], rho: float) -> int:
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be above 0 and at most 1, found {rho}")
    if not spectra:
        raise ValueError("expected the spectrum of at least one task, found none")
    shapes = {task: tuple(values.shape) for task, values in spectra.items()}
    first = next(iter(shapes.values()))
    if len(first) != 1 or first[0] == 0 or len(set(shapes.values())) > 1:
        raise ValueError(f"expected spectra of one shape (d,) with d > 0, found {shapes}")
    return first[0]


def _normalised(task: str, spectrum: Tensor) -> Tensor:
    values = spectrum.detach().to("cpu", torch.float64)
    if not torch.isfinite(values).all():
        raise ValueError(f"the spectrum of task '{task}' holds NaN or infinite values")
    if (values < 0).any() or (values.diff() > 0).any():
        raise ValueError(f"the spectrum of task '{task}' must be non-negative and descending")
    if values[0] == 0:
        raise ValueError(f"the spectrum of task '{task}' is all zeros: this layer has no subspace to allocate")
    return values / values[0]
