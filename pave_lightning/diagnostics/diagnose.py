"""All diagnostics of one purification."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pave_lightning.diagnostics.conflicts import Conflict, RemovedEnergy, compare_pairs, removed_energy
from pave_lightning.diagnostics.overlap import SubspaceOverlap, overlaps_of_layer, removed_directions
from pave_lightning.diagnostics.spectra import (
    TASK_VECTOR,
    PruningError,
    Spectrum,
    errors_of_layer,
    spectra_by_metric,
)
from pave_lightning.merging.methods.dare import DareOptions, drop_and_rescale
from pave_lightning.purification import KeptRank, PurifiedTaskVectors
from pave_lightning.statistics import LayerMoment, TaskStatistics
from pave_lightning.subspace import knowledge_spectrum, one_blas_thread
from pave_lightning.weights import Parameter, TaskVectors

if TYPE_CHECKING:
    import pandas as pd

CONFLICT_VALUES = (
    *("sign_conflict", "sign_conflict_of_all", "weighted_conflict"),
    *("cosine", "top_overlap", "support_overlap"),
)
ENERGY_VALUES = ("of_vector", "of_weight", "in_removed_directions", "norm_ratio", "cosine")


@dataclass(frozen=True)
class DiagnosticOptions:
    """What is looked at.

    Attributes:
        pruned_shares: shares of the directions to prune, at which the error of the output is told.
        top_shares: shares of the strongest directions that are compared between tasks.
        top_elements: share of a task vector's elements, by magnitude, whose positions are compared between tasks.
        dare: drop rate and seed of the DARE that purification is compared with.
    """

    pruned_shares: Sequence[float] = (0.01, 0.02, 0.03, 0.05, 0.08, 0.125, 0.2, 0.3, 0.4, 0.5)
    top_shares: Sequence[float] = (0.05, 0.1, 0.25)
    top_elements: float = 0.2
    dare: DareOptions = field(default_factory=DareOptions)


@dataclass(frozen=True)
class Diagnostics:
    """Tables of one purification; all are pandas frames.

    Attributes:
        spectra: one row a task, layer, matrix and index: ``value`` and ``normalised`` (by the largest); see `Spectrum`.
        kept_ranks: one row a task and layer: ``rank``, ``full``, ``share``.
        pruning_error: one row a task, layer, metric and rank; see `PruningError`.
        subspace_overlap: one row a layer and pair of tasks, and part; see `SubspaceOverlap`.
        removed_energy: one row a layer, task and treatment; see `RemovedEnergy`.
        conflicts: one row a layer, pair of tasks and treatment; see `Conflict`.
        removed_energy_summary: the means of ``removed_energy`` over the layers, weighted by their elements.
        conflict_summary: the means of ``conflicts`` over the layers, weighted by their elements.
    """

    spectra: pd.DataFrame
    kept_ranks: pd.DataFrame
    pruning_error: pd.DataFrame
    subspace_overlap: pd.DataFrame
    removed_energy: pd.DataFrame
    conflicts: pd.DataFrame
    removed_energy_summary: pd.DataFrame
    conflict_summary: pd.DataFrame

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables by name."""
        return dict(vars(self))


@one_blas_thread()
def diagnose(
    plain: TaskVectors,
    purified: PurifiedTaskVectors,
    statistics: Mapping[str, TaskStatistics],
    options: DiagnosticOptions | None = None,
) -> Diagnostics:
    """Look at every matrix weight of all tasks, before and after purification.

    Spectra, pruning errors and the strongest directions are those of the expert's weight and the captured statistics,
    in the metric and with the damping of the purification where one must be chosen, whatever other statistics or
    target it may have used. The errors themselves are those of the undamped moments, so that with damping the metric
    root need not have the smallest one. Where a task has no moment of a layer, only what needs none is told.

    Cost: about five eigenvalue problems of size d x d a task and layer. Memory: one
    layer's weights of all tasks, a few times.

    Args:
        plain: plain task vectors.
        purified: the same, purified.
        statistics: what each task's expert saw; may lack tasks.
        options: what is looked at.
    """
    options = options if options is not None else DiagnosticOptions()
    found = _Found()
    for parameter in plain.parameters:
        if parameter.is_matrix and parameter.elements:
            _look_at(found, parameter, (plain, purified), statistics, options)
    ranks = [{**vars(kept), "share": kept.share} for kept in purified.ranks.values()]
    errors = [{**vars(error), "pruned_share": error.pruned_share} for error in found.errors]
    energies, conflicts = _frame(RemovedEnergy, map(vars, found.energies)), _frame(Conflict, map(vars, found.conflicts))
    return Diagnostics(
        spectra=_spectra_frame(found.spectra),
        kept_ranks=_frame(KeptRank, ranks, "share"),
        pruning_error=_frame(PruningError, errors, "pruned_share"),
        subspace_overlap=_frame(SubspaceOverlap, map(vars, found.overlaps)),
        removed_energy=energies,
        conflicts=conflicts,
        removed_energy_summary=weighted_means(energies, ("task", "treatment"), ENERGY_VALUES),
        conflict_summary=weighted_means(conflicts, ("task_a", "task_b", "treatment"), CONFLICT_VALUES),
    )


@dataclass
class _Found:
    spectra: list[Spectrum] = field(default_factory=list)
    errors: list[PruningError] = field(default_factory=list)
    overlaps: list[SubspaceOverlap] = field(default_factory=list)
    energies: list[RemovedEnergy] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)

    def look_at_spectra(
        self,
        key: tuple[str, str],
        weight: Tensor,
        moment: LayerMoment | None,
        purified: PurifiedTaskVectors,
        options: DiagnosticOptions,
    ) -> Tensor | None:
        """Note spectra and pruning errors of one weight; its directions in the metric of the purification, if known."""
        spectra = spectra_by_metric(weight, moment, purified.options.damping)
        wanted = spectra.get(purified.options.metric)
        # Asked for first: the other calls then find all of them solved.
        directions = None if wanted is None else wanted.directions
        self.spectra += [Spectrum(*key, metric, spectrum.values.numpy()) for metric, spectrum in spectra.items()]
        if moment is not None:
            pruned = {round(share * min(weight.shape)) for share in options.pruned_shares}
            kept = purified.ranks.get(key)
            # The error is that of truncating the expert's weight; other targets keep a rank of something else.
            rank = None if kept is None or purified.options.target != "expert" else kept.rank
            self.errors += errors_of_layer(key, weight, moment, spectra, pruned, kept_rank=rank)
        return directions


def _look_at(
    found: _Found,
    parameter: Parameter,
    sources: tuple[TaskVectors, PurifiedTaskVectors],
    statistics: Mapping[str, TaskStatistics],
    options: DiagnosticOptions,
) -> None:
    """One layer of all tasks."""
    plain, purified = sources
    layer, full = parameter.layer, min(parameter.matrix_shape)
    base = parameter.as_matrix(plain.base(parameter))
    vectors: dict[str, dict[str, Tensor]] = {"plain": {}, "pave": {}, "dare": {}}
    top: dict[str, Tensor] = {}
    removed: dict[str, Tensor] = {}
    for task in plain.tasks:
        weight = parameter.as_matrix(plain.expert(task, parameter))
        vector = weight - base
        after = parameter.as_matrix(purified.expert(task, parameter))
        kept = purified.ranks.get((task, layer))
        if kept is not None and kept.rank < kept.full:
            removed[task] = removed_directions(weight - after, kept.full - kept.rank)
        directions = found.look_at_spectra((task, layer), weight, _moment(statistics, task, layer), purified, options)
        if directions is not None:
            top[task] = directions[:, : max(1, round(max(options.top_shares, default=0) * full))].clone()
        values = knowledge_spectrum(vector, None, metric="identity").values
        found.spectra.append(Spectrum(task, layer, TASK_VECTOR, values.numpy()))
        stored = parameter.from_matrix(vector)
        dropped = parameter.as_matrix(drop_and_rescale(stored, options.dare, task=task, parameter=parameter.name))
        left = {"pave": after - base, "dare": dropped, "dare_dropped": dropped * (1 - options.dare.drop_rate)}
        for treatment, result in left.items():
            gone = removed.get(task) if treatment == "pave" else None
            found.energies.append(removed_energy((layer, task, treatment), weight, vector, result, gone))
        for treatment, own in vectors.items():
            own[task] = vector if treatment == "plain" else left[treatment]
    found.overlaps += overlaps_of_layer(layer, top, removed, options.top_shares, full)
    for treatment, own in vectors.items():
        found.conflicts += compare_pairs(layer, treatment, own, options.top_elements)


def _moment(statistics: Mapping[str, TaskStatistics], task: str, layer: str) -> LayerMoment | None:
    if task not in statistics or layer not in statistics[task]:
        return None
    moment = statistics[task][layer]
    return moment if bool(moment.matrix.any()) else None


def _spectra_frame(spectra: Sequence[Spectrum]) -> pd.DataFrame:
    import pandas as pd

    lengths = [len(spectrum.values) for spectrum in spectra]
    values = np.concatenate([spectrum.values for spectrum in spectra] or [np.zeros(0)])
    largest = np.repeat([float(spectrum.values[0]) or np.nan for spectrum in spectra], lengths)
    return pd.DataFrame(
        {
            **{
                name: np.repeat(np.array([getattr(spectrum, name) for spectrum in spectra], dtype=object), lengths)
                for name in ("task", "layer", "matrix")
            },
            "index": np.concatenate([np.arange(length) for length in lengths] or [np.zeros(0, dtype=np.int64)]),
            "value": values,
            "normalised": values / largest,
        }
    )


def _frame(kind: type[Any], rows: Iterable[Mapping[str, Any]], *extra: str) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(list(rows), columns=[*(entry.name for entry in fields(kind)), *extra])


def weighted_means(frame: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """Means of columns over all rows of a group, weighted by the column ``elements``; what is NaN does not count.

    Args:
        frame: one row a layer.
        by: columns whose values make a group; groups keep the order in which they first come.
        values: columns to average.
    """
    import pandas as pd

    rows = []
    for key, group in frame.groupby(list(by), sort=False):
        row = dict(zip(by, key, strict=True))
        for name in values:
            known = group[group[name].notna()]
            row[name] = np.average(known[name], weights=known["elements"]) if len(known) else np.nan
        rows.append(row)
    return pd.DataFrame(rows, columns=[*by, *values])
