"""How many components each task keeps: in one layer, or over a whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# A task, or a pair of task and layer.
Key = TypeVar("Key", str, tuple[str, str])


class UnreachableBudgetError(ValueError):
    """A rank ratio asks for more than may be removed.

    Attributes:
        nearest: the kept share of all components that is nearest to it within reach.
    """

    def __init__(self, message: str, nearest: float) -> None:
        super().__init__(message)
        self.nearest = nearest


def allocate_ranks(
    spectra: Mapping[Key, Tensor], rho: float, stopping_share: float = 1.5, *, nearest_budget: bool = False
) -> dict[Key, int]:
    r"""Share one budget of components among spectra by their normalised singular values.

    Every spectrum begins at its full rank :math:`d_j`, and the components with the smallest :math:`s_i / s_1` over all
    spectra are removed until :math:`\mathrm{round}(\rho \sum_j d_j)` are left. None loses more than
    :math:`\mathrm{round}(c\,(d_j - \mathrm{round}(\rho d_j)))` with c the stopping share, and each keeps its strongest
    one. In the paper the spectra are those of one layer's tasks; they may as well be those of all layers and tasks.

    Spectra descend, so removing the smallest values one after the other always takes a spectrum's last components
    first: the search is one selection, and it minimises the sum of any increasing function of the removed normalised
    values over all allocations with that budget and those caps. Between equal values the one further down its spectrum
    goes first, then the one whose key is smaller, so the order of ``spectra`` never matters.

    Source: spectral rank allocation in An, Yang, Torr, Ghanem, "Purifying Task Vectors in Knowledge-Aware Subspace for
    Model Merging", arXiv 2510.14697. The published loop removes one component more than the budget asks for; here the
    budget is met exactly.

    Args:
        spectra: key (a task, or a pair of task and layer) -> its singular values, shape ``(d_j,)``, descending, any
            float dtype (used as float64).
        rho: share of all components to keep, in (0, 1].
        stopping_share: the most a spectrum may lose, as a multiple of the even share, above 0.
        nearest_budget: where the caps put the budget out of reach, remove as many components as they allow instead of
            refusing. What rounding alone puts out of reach (by less than one component a spectrum) never refuses.

    Returns:
        key -> number of components to keep, in the order of ``spectra``.

    Raises:
        UnreachableBudgetError: the caps put the budget out of reach, or it leaves less than one component a spectrum.
        ValueError: ``rho`` or ``stopping_share`` is out of range; there are no spectra; a spectrum is empty, not
            finite, negative, not descending or all zeros.

    Example:
        >>> strong, weak = torch.tensor([4.0, 3.0, 2.0, 2.0]), torch.tensor([4.0, 2.0, 0.1, 0.1])
        >>> allocate_ranks({"strong": strong, "weak": weak}, rho=0.75)
        {'strong': 4, 'weak': 2}
    """
    lengths = _lengths(spectra, rho)
    removals, caps = spectral_budget(lengths, rho, stopping_share, nearest_budget=nearest_budget)
    keys = sorted(spectra)
    eligible = [_normalised(key, spectra[key])[::-1][: caps[key]] for key in keys]
    values = np.concatenate(eligible)
    depth = np.concatenate([np.arange(len(tail)) for tail in eligible])
    owner = np.repeat(np.arange(len(keys)), [len(tail) for tail in eligible])
    removed = owner[np.lexsort((owner, depth, values))[:removals]]
    lost = dict(zip(keys, np.bincount(removed, minlength=len(keys)).tolist(), strict=True))
    return {key: length - lost[key] for key, length in lengths.items()}


def spectral_budget(
    lengths: Mapping[Key, int], rho: float, stopping_share: float, *, nearest_budget: bool = False
) -> tuple[int, dict[Key, int]]:
    """How many components `allocate_ranks` removes, and how many each spectrum may lose at most; needs no spectra.

    Args:
        lengths: key -> number of components.
        rho: as in `allocate_ranks`.
        stopping_share: as in `allocate_ranks`.
        nearest_budget: as in `allocate_ranks`.

    Returns:
        How many components are removed, and key -> the most that this spectrum loses.

    Raises:
        UnreachableBudgetError: as in `allocate_ranks`.
        ValueError: ``stopping_share`` is out of range.

    Example:
        >>> spectral_budget({"query": 4, "key": 4}, rho=0.75, stopping_share=1.5)
        (2, {'query': 2, 'key': 2})
    """
    if not (math.isfinite(stopping_share) and stopping_share > 0):
        raise ValueError(f"stopping_share must be a finite number above 0, found {stopping_share}")
    total, count = sum(lengths.values()), len(lengths)
    caps = {key: min(d - 1, round(stopping_share * (d - round(rho * d)))) for key, d in lengths.items()}
    wanted, reachable = total - round(rho * total), sum(caps.values())
    if round(rho * total) < count and not nearest_budget:
        raise UnreachableBudgetError(
            f"rho {rho:g} leaves {round(rho * total)} of {total} components to {count} spectra, but each keeps one at "
            f"least: the nearest reachable budget keeps {count / total:.4g} of them",
            count / total,
        )
    if wanted - reachable >= count and not nearest_budget:
        kept = 1 - reachable / total
        raise UnreachableBudgetError(
            f"rho {rho:g} asks to remove {wanted} of {total} components, but with stopping_share {stopping_share:g} "
            f"only {reachable} may go: the nearest reachable budget keeps {kept:.4g} of them",
            kept,
        )
    return min(wanted, reachable), caps


def even_ranks(spectra: Mapping[Key, Tensor], rho: float) -> dict[Key, int]:
    """Give every spectrum the share ``round(rho * d)`` of its components.

    This is the plain share that the spectral allocation is compared with in arXiv 2510.14697 (table 4).

    Args:
        spectra: key -> its ``d`` singular values, shape ``(d,)``. Only their length is used.
        rho: share of the components to keep, in (0, 1].

    Returns:
        key -> number of components to keep, in the order of ``spectra``.

    Raises:
        ValueError: ``rho`` is out of range; there are no spectra; a spectrum is empty.

    Example:
        >>> even_ranks({"narrow": torch.ones(4), "wide": torch.ones(8)}, rho=0.75)
        {'narrow': 3, 'wide': 6}
    """
    return {key: round(rho * length) for key, length in _lengths(spectra, rho).items()}


def averaged_ranks(
    ranks: Mapping[tuple[str, str], int], lengths: Mapping[tuple[str, str], int]
) -> dict[tuple[str, str], int]:
    """Give every layer of a task the same share of its rank: all ranks it keeps over all ranks that there are.

    The published scripts do this with the ranks that they found layer by layer (arXiv 2510.14697): the sum of the kept
    ranks over the sum of the full ranks, so that a wide layer counts for more than a narrow one.

    Args:
        ranks: (task, layer) -> components kept.
        lengths: (task, layer) -> components that there are.

    Returns:
        (task, layer) -> components to keep, in the order of ``ranks``.

    Example:
        >>> averaged_ranks({("movie", "query"): 2, ("movie", "key"): 4}, {("movie", "query"): 4, ("movie", "key"): 4})
        {('movie', 'query'): 3, ('movie', 'key'): 3}
    """
    kept: dict[str, int] = {}
    full: dict[str, int] = {}
    for (task, layer), rank in ranks.items():
        kept[task] = kept.get(task, 0) + rank
        full[task] = full.get(task, 0) + lengths[task, layer]
    return {(task, layer): round(kept[task] / full[task] * lengths[task, layer]) for task, layer in ranks}


def _lengths(spectra: Mapping[Key, Tensor], rho: float) -> dict[Key, int]:
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be above 0 and at most 1, found {rho}")
    if not spectra:
        raise ValueError("expected at least one spectrum, found none")
    for key, values in spectra.items():
        if values.ndim != 1 or not len(values):
            raise ValueError(f"expected spectra of shape (d,) with d > 0, found {tuple(values.shape)} for {key!r}")
    return {key: len(values) for key, values in spectra.items()}


def _normalised(key: object, spectrum: Tensor) -> npt.NDArray[np.float64]:
    values = spectrum.detach().to("cpu", torch.float64)
    if not torch.isfinite(values).all():
        raise ValueError(f"the spectrum of {key!r} holds NaN or infinite values")
    if (values < 0).any() or (values.diff() > 0).any():
        raise ValueError(f"the spectrum of {key!r} must be non-negative and descending")
    if values[0] == 0:
        raise ValueError(f"the spectrum of {key!r} is all zeros: it has no subspace to allocate")
    normalised: npt.NDArray[np.float64] = (values / values[0]).numpy()
    return normalised
