"""Purified task vectors: a source of task vectors in, a source of purified ones out."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pave_lightning.errors import PaveError, Problems
from pave_lightning.recipe import Purify
from pave_lightning.statistics import LayerMoment, TaskStatistics
from pave_lightning.subspace import KnowledgeSpectrum, allocate_ranks, even_ranks, knowledge_spectrum, project
from pave_lightning.weights import Checkpoint, Parameter, ParameterKind, ShardWriter, TaskVectors

log = logging.getLogger("pave_lightning")

PURIFIED_SHARD_BYTES = 500_000_000


@dataclass(frozen=True)
class KeptRank:
    """How many of a layer's components a task keeps.

    Attributes:
        task: name of the task.
        layer: name of the layer inside the backbone.
        rank: components that are kept.
        full: components that there are, ``min(d_out, d_in)``.
    """

    task: str
    layer: str
    rank: int
    full: int

    @property
    def share(self) -> float:
        """Kept share of the rank; NaN for a layer without components."""
        return self.rank / self.full if self.full > 0 else math.nan


class PurifiedTaskVectors(TaskVectors):
    r"""Task vectors whose fine-tuned linear weights are projected onto the directions that their own task excites.

    Every linear weight :math:`W_t` becomes :math:`U_r U_r^T W_t`, where :math:`U_r` are the leading left singular
    vectors of :math:`W_t (C_t + \epsilon I)` and the ranks of a layer are shared out over its tasks; all else stays as
    it is. A weight that keeps its full rank stays the same bit for bit. Computed one layer at a time, when it is asked
    for; only the last layer is held.

    Source: An, Yang, Torr, Ghanem, *Purifying Task Vectors in Knowledge-Aware Subspace for Model Merging*
    (arXiv 2510.14697), in the equivalent projection form, which needs no inverse.

    Args:
        source: plain task vectors.
        statistics: what each task's expert saw, from `PaveCallback`; layers by their names inside the backbone. Not
            needed for the metric identity.
        options: rank ratio, metric, allocation, damping, and which tasks are purified.

    Attributes:
        ranks: the ranks kept so far, by task and layer.
        untouched: layers that were left as they are, by task and layer, with the reason.

    Raises:
        PaveError: statistics of a task are missing, or belong to another model.
    """

    def __init__(
        self, source: TaskVectors, statistics: Mapping[str, TaskStatistics], options: Purify | None = None
    ) -> None:
        self.source, self.statistics = source, statistics
        self.options = options if options is not None else Purify()
        self.tasks, self.parameters = source.tasks, source.parameters
        self.ranks: dict[tuple[str, str], KeptRank] = {}
        self.untouched: dict[tuple[str, str], str] = {}
        self.purified_tasks = tuple(task for task in source.tasks if task in (self.options.tasks or source.tasks))
        self._needs_moments = self.options.metric != "identity"
        self._layer: str | None = None
        self._weights: dict[str, Tensor] = {}
        self._check()

    def base(self, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The base's tensor, as it is."""
        return self.source.base(parameter, rows)

    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The purified fine-tuned tensor (float32)."""
        if parameter.kind is not ParameterKind.LINEAR or task not in self.purified_tasks:
            return self.source.expert(task, parameter, rows)
        if self._layer != parameter.name:
            self._weights = self._purify(parameter)
            self._layer = parameter.name
        weight = self._weights[task]
        return weight if rows is None else weight[rows]

    def _purify(self, parameter: Parameter) -> dict[str, Tensor]:
        """All tasks' weights of one linear layer, purified together because they share the layer's ranks."""
        weights = {task: self.source.expert(task, parameter) for task in self.purified_tasks}
        spectra: dict[str, KnowledgeSpectrum] = {}
        for task, weight in weights.items():
            moment = self._moment(task, parameter.layer)
            if isinstance(moment, str):
                self.untouched[task, parameter.layer] = moment
                continue
            spectrum = knowledge_spectrum(
                _upright(weight, parameter),
                None if moment is None else moment.matrix,
                "input" if moment is None else moment.kind,
                metric=self.options.metric,
                damping=self.options.damping,
            )
            if float(spectrum.values[0]) == 0:
                self.untouched[task, parameter.layer] = "its weight has no effect on the data"
                continue
            spectra[task] = spectrum
        for task, rank in self._ranks(spectra).items():
            values = spectra[task].values
            self.ranks[task, parameter.layer] = KeptRank(task, parameter.layer, rank, len(values))
            purified = project(_upright(weights[task], parameter), spectra[task], rank)
            weights[task] = _upright(purified, parameter).contiguous()
        return weights

    def _ranks(self, spectra: Mapping[str, KnowledgeSpectrum]) -> dict[str, int]:
        values = {task: spectrum.values for task, spectrum in spectra.items()}
        if not values:
            return {}
        if self.options.allocation == "even":
            return even_ranks(values, self.options.rho)
        return allocate_ranks(values, self.options.rho, self.options.stopping_share)

    def _moment(self, task: str, layer: str) -> LayerMoment | str | None:
        """The layer's moment; None where the metric needs none; a reason where the layer has no subspace."""
        if not self._needs_moments:
            return None
        statistics = self.statistics[task]
        if layer not in statistics:
            return "no example reached it"
        moment = statistics[layer]
        if not bool(moment.matrix.any()):
            return "all its inputs were zero"
        return moment

    def _check(self) -> None:
        problems = Problems("the captured statistics do not fit the experts:")
        for task in self.options.tasks or ():
            if task not in self.source.tasks:
                problems.add(f"task '{task}' is to be purified, but there are only {', '.join(self.source.tasks)}")
        linear = {p.layer: p for p in self.parameters if p.kind is ParameterKind.LINEAR}
        children = {p.name.partition(".")[0] for p in self.parameters}
        for task in self.purified_tasks if self._needs_moments else ():
            if task not in self.statistics:
                problems.add(f"task '{task}' has no captured statistics; capture them first")
                continue
            statistics = self.statistics[task]
            for layer in statistics.layers():
                if layer not in linear:
                    # A child of the backbone that the base lacks belongs to the heads; its layers are captured too.
                    if layer.partition(".")[0] in children:
                        problems.add(f"task '{task}': the statistics hold a layer {layer}, which the model has not")
                    continue
                width_out, width_in = _upright_shape(linear[layer])
                expected = (width_in if statistics.kind(layer) == "input" else width_out, width_in)
                if statistics.shape(layer) != expected:
                    problems.add(
                        f"task '{task}': the moment of {layer} is {list(statistics.shape(layer))}, expected "
                        f"{list(expected)}"
                    )
            if not any(layer in linear for layer in statistics.layers()):
                problems.add(f"task '{task}': the statistics hold none of the model's linear layers")
        problems.raise_if_any()


class StoredPurification(TaskVectors):
    """Purified task vectors that were computed before: plain ones, with the purified weights laid over them.

    Args:
        source: plain task vectors.
        purified: each purified task's linear weights, as `write_purified` left them.
    """

    def __init__(self, source: TaskVectors, purified: Mapping[str, Checkpoint]) -> None:
        self.source, self._purified = source, dict(purified)
        self.tasks, self.parameters = source.tasks, source.parameters

    def base(self, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The base's tensor, as it is."""
        return self.source.base(parameter, rows)

    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The purified fine-tuned tensor (float32)."""
        if task in self._purified and parameter.name in self._purified[task].backbone:
            return self._purified[task].tensor(parameter.name, rows)
        return self.source.expert(task, parameter, rows)


def write_purified(vectors: PurifiedTaskVectors, folder: Path) -> None:
    """Compute every purified linear weight once and write it to ``folder/TASK``, so that many rules can merge it.

    Raises:
        PaveError: no layer of any task could be purified.
    """
    writers = {}
    for task in vectors.purified_tasks:
        (folder / task).mkdir(parents=True)
        writers[task] = ShardWriter(folder / task, PURIFIED_SHARD_BYTES)
    for parameter in vectors.parameters:
        if parameter.kind is ParameterKind.LINEAR:
            for task, writer in writers.items():
                writer.add(parameter.name, vectors.expert(task, parameter))
    if not vectors.ranks:
        raise PaveError("no linear layer of any task has a captured subspace, so there is nothing to purify")
    for writer in writers.values():
        writer.close()
    for (task, layer), reason in vectors.untouched.items():
        log.warning("task '%s': %s is left as it is: %s", task, layer, reason)


def _upright(weight: Tensor, parameter: Parameter) -> Tensor:
    """The weight as d_out x d_in, whichever way it is stored; its own inverse."""
    return weight if parameter.input_axis == 1 else weight.T


def _upright_shape(parameter: Parameter) -> tuple[int, int]:
    first, second = parameter.shape
    return (first, second) if parameter.input_axis == 1 else (second, first)
