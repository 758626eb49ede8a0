"""Purified task vectors: a source of task vectors in, a source of purified ones out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor

from pave_lightning.errors import PaveError, Problems
from pave_lightning.purification.moments import MomentSource
from pave_lightning.purification.options import Compute, Purify
from pave_lightning.statistics import TaskStatistics
from pave_lightning.subspace import (
    KnowledgeSpectrum,
    UnreachableBudgetError,
    allocate_ranks,
    averaged_ranks,
    even_ranks,
    in_parallel,
    knowledge_spectrum,
    project,
    remove_tail,
    spectral_budget,
)
from pave_lightning.system.process_groups import ALONE, ProcessGroup, dealt
from pave_lightning.system.process_groups import place as process_place
from pave_lightning.weights import DerivedTaskVectors, Parameter, ParameterKind, TaskVectors
from pave_lightning.weights.matrices import Matrix
from pave_lightning.weights.task_vectors import spectral_work

# Convolutions are captured on demand.
ALWAYS_PURIFIED = (ParameterKind.LINEAR, ParameterKind.EXPERTS)

Key = tuple[str, str]
"""A task and a layer."""
Layer = TypeVar("Layer")
AnyKey = TypeVar("AnyKey", str, tuple[str, str])
Result = TypeVar("Result")


@dataclass(frozen=True)
class KeptRank:
    """How many of a layer's components a task keeps.

    Attributes:
        task: name of the task.
        layer: name of the layer inside the backbone; with its part or its expert's number where it has several.
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


class PurifiedTaskVectors(DerivedTaskVectors):
    r"""Task vectors of which only the directions are left that their own task excites.

    Every matrix weight :math:`W_t` becomes :math:`U_r U_r^T W_t`, where :math:`U_r` are the leading left singular
    vectors of :math:`W_t (C_t + \epsilon I)` and the ranks are shared out over the tasks of a layer, or of all layers
    (``scope``). Fused projections are purified part by part where the parts are known (`Parameter.parts`), experts of
    mixtures one by one. With the target ``delta`` the task vector :math:`\tau_t` takes the place of :math:`W_t` in
    all of this; with ``delta_by_expert`` it is projected on the directions of :math:`W_t`. All else stays as it is, and
    a weight that keeps its full rank stays the same bit for bit. Computed one layer at a time, when it is asked for;
    only the last layer is held; `purified` gives all of them in turn. The scopes ``model`` and ``global`` look at all
    spectra once before that.

    Source: An, Yang, Torr, Ghanem, *Purifying Task Vectors in Knowledge-Aware Subspace for Model Merging*
    (arXiv 2510.14697), in the equivalent projection form, which needs no inverse.

    Args:
        source: plain task vectors.
        statistics: what each task's expert saw, from `PaveCallback`; layers by their names inside the backbone. Not
            needed for the metric identity and where ``options.statistics`` is random or task_vector.
        options: rank ratio, scope, metric, target, allocation, damping, and which tasks are purified.
        compute: threads and device.

    Attributes:
        layers: the matrix weights that are purified: linear layers, and convolutions that were captured.
        ranks: the ranks kept so far, by task and layer.
        untouched: layers that were left as they are, by task and layer, with the reason.

    Raises:
        PaveError: statistics of a task are missing or belong to another model, or the rank ratio is out of reach; all
            of it is told at once. Later, when a layer is read: its moment cannot be one.
    """

    def __init__(
        self,
        source: TaskVectors,
        statistics: Mapping[str, TaskStatistics],
        options: Purify | None = None,
        compute: Compute | None = None,
    ) -> None:
        super().__init__(source)
        self.options = options if options is not None else Purify()
        self.compute = compute if compute is not None else Compute()
        self.ranks: dict[Key, KeptRank] = {}
        self.untouched: dict[Key, str] = {}
        self.purified_tasks = tuple(task for task in source.tasks if task in (self.options.tasks or source.tasks))
        self._moments = MomentSource(source, statistics, self.options, self.purified_tasks)
        captured = (
            {layer for own in statistics.values() for layer in own.layers()} if self.options.reads_statistics else set()
        )
        self.layers = tuple(
            parameter
            for parameter in source.parameters
            if parameter.kind in ALWAYS_PURIFIED or (parameter.is_matrix and parameter.layer in captured)
        )
        self._purifiable = {parameter.name for parameter in self.layers}
        self._layer: str | None = None
        self._weights: dict[str, Tensor] = {}
        self._workers = workers_of(self.compute)
        place = process_place()
        self._device = solving_device(self.compute, 0 if place is None else place.rank)
        self._check()

    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The purified fine-tuned tensor (float32)."""
        if parameter.name not in self._purifiable or task not in self.purified_tasks:
            return self.source.expert(task, parameter, rows)
        if self._layer != parameter.name:
            self._layer, self._weights = None, {}
            (self._weights,) = self._purify([parameter])
            self._layer = parameter.name
        weight = self._weights[task]
        return weight if rows is None else weight[rows]

    def work(self, parameter: Parameter) -> float:
        """What reading the source takes, and the spectra of all purified tasks."""
        solves = len(self.purified_tasks) if parameter.name in self._purifiable else 0
        return self.source.work(parameter) + solves * sum(map(spectral_work, parameter.apart if solves else ()))

    def purified(self, group: ProcessGroup = ALONE) -> Iterator[tuple[str, Parameter, Tensor]]:
        """Task, parameter and purified fine-tuned tensor (float32) of every layer and purified task, layer by layer.

        Where there are fewer tasks than workers, several layers are purified at a time, see `layers_at_once`.

        Args:
            group: the processes that share the work; each is given its own layers, and in the end ``ranks`` and
                ``untouched`` of all.
        """
        if self.options.scope != "layer" and "_ranks_of_all" not in vars(self):
            self._ranks_of_all = self._ranks_over(group)
        for layers in self._own_batches(group):
            for parameter, weights in zip(layers, self._purify(layers), strict=True):
                for task in self.purified_tasks:
                    # Handed over, so that it does not stay in memory while the next layers are purified.
                    yield task, parameter, weights.pop(task)
        self._learn(group)

    def _own_batches(self, group: ProcessGroup) -> Sequence[Sequence[Parameter]]:
        """The layers that this process purifies, as many together as go at a time."""
        every = list(batches(self.layers, len(self.purified_tasks), self._workers))
        return dealt(every, group.size, lambda layers: sum(map(self.work, layers)))[group.rank]

    def _learn(self, group: ProcessGroup) -> None:
        """Take in what other processes have found of their layers; in the order of the layers, whoever had them."""
        names = [matrix.name for parameter in self.layers for matrix in parameter.matrices]
        keys = list(product(self.purified_tasks, names))
        own: dict[str, Any] = {
            "ranks": [(*key, found.rank, found.full) for key, found in self.ranks.items()],
            "untouched": [(*key, reason) for key, reason in self.untouched.items()],
        }
        told = group.gather(own)
        ranks = {(task, layer): KeptRank(task, layer, *rank) for one in told for task, layer, *rank in one["ranks"]}
        untouched = {(task, layer): reason for one in told for task, layer, reason in one["untouched"]}
        self.ranks = {key: ranks[key] for key in keys if key in ranks}
        self.untouched = {key: untouched[key] for key in keys if key in untouched}

    def _purify(self, layers: Sequence[Parameter]) -> list[dict[str, Tensor]]:
        """All tasks' weights of some layers; the tasks of a layer go together because they share its ranks."""
        if self.options.scope != "layer":
            _ = self._ranks_of_all  # before any spectrum is held
        pairs = [(parameter, matrix) for parameter in layers for matrix in parameter.matrices]
        spectra = self._spectra(pairs)
        ranks: dict[Key, int] = {}
        for (_, matrix), own in zip(pairs, spectra, strict=True):
            found = self._ranks(matrix, {task: spectrum.values for task, spectrum in own.items()})
            for task, rank in found.items():
                ranks[task, matrix.name] = rank
                full = len(own[task].values)
                self.ranks[task, matrix.name] = KeptRank(task, matrix.name, rank, full)
        jobs = [
            partial(self._project, task, parameter, matrix, own.get(task), ranks.get((task, matrix.name)))
            for ((parameter, matrix), own), task in product(zip(pairs, spectra, strict=True), self.purified_tasks)
        ]
        purified = iter(self._by_layer(in_parallel(jobs, self._workers)))
        weights = []
        for parameter in layers:
            of_matrices = [(matrix, next(purified)) for matrix in parameter.matrices]
            weights.append(
                {
                    task: self._assembled(task, parameter, [(matrix, found[task]) for matrix, found in of_matrices])
                    for task in self.purified_tasks
                }
            )
        return weights

    def _assembled(self, task: str, parameter: Parameter, matrices: Sequence[tuple[Matrix, Tensor | None]]) -> Tensor:
        """One task's weight, as it is stored, with its purified matrices; None stands for those that stay."""
        (first, purified), *more = matrices
        if not more and first.is_whole and purified is not None:
            return parameter.from_matrix(purified)
        weight = self.source.expert(task, parameter)
        if any(purified is not None for _, purified in matrices):
            weight = weight.clone()
            for matrix, purified in matrices:
                if purified is not None:
                    matrix.put(weight if matrix.rows is None else weight[matrix.rows], purified)
        return weight

    def _by_layer(self, results: Sequence[Result]) -> list[dict[str, Result]]:
        """What jobs over layers and tasks gave, by task for each layer."""
        tasks = self.purified_tasks
        return [
            dict(zip(tasks, results[start : start + len(tasks)], strict=True))
            for start in range(0, len(results), len(tasks))
        ]

    def _ranks(self, matrix: Matrix, values: Mapping[str, Tensor]) -> Mapping[str, int]:
        """The ranks of a layer's tasks."""
        if self.options.scope != "layer":
            return {task: self._ranks_of_all[task, matrix.name] for task in values}
        return self._allocate(values)

    def _project(
        self, task: str, parameter: Parameter, matrix: Matrix, spectrum: KnowledgeSpectrum | None, rank: int | None
    ) -> Tensor | None:
        """One task's purified matrix, ``(d_out, d_in)``; None where it stays as it is."""
        if spectrum is None or rank is None or rank == len(spectrum.values):
            return None
        if self.options.target == "expert":
            return project(matrix.of(self.source.expert(task, parameter, matrix.rows)), spectrum, rank)
        base = self.source.base(parameter, matrix.rows)
        vector = matrix.of(self.source.vector(task, parameter, matrix.rows, base=base))
        return matrix.of(base) + remove_tail(vector, spectrum, rank)

    def _spectra(self, pairs: Sequence[tuple[Parameter, Matrix]]) -> list[dict[str, KnowledgeSpectrum]]:
        """The spectra of the tasks that have one, for each of some matrices; the others are listed in ``untouched``."""
        jobs = [partial(self._spectrum, task, *pair) for pair, task in product(pairs, self.purified_tasks)]
        found = []
        for (_, matrix), results in zip(pairs, self._by_layer(in_parallel(jobs, self._workers)), strict=True):
            spectra = {}
            for task, result in results.items():
                if isinstance(result, str):
                    self.untouched[task, matrix.name] = result
                else:
                    spectra[task] = result
            found.append(spectra)
        return found

    def _spectrum(self, task: str, parameter: Parameter, matrix: Matrix) -> KnowledgeSpectrum | str:
        """A task's spectrum of one matrix, or the reason why there is none."""
        weight = matrix.of(self.source.expert(task, parameter, matrix.rows))
        moment = self._moments.moment(task, parameter, matrix, weight)
        if isinstance(moment, str):
            return moment
        if self.options.target == "delta":
            # The exact product, where it is that of an adapter.
            weight = matrix.of(self.source.vector(task, parameter, matrix.rows))
        spectrum = knowledge_spectrum(
            weight,
            None if moment is None else moment.matrix,
            "input" if moment is None else moment.kind,
            metric=self.options.metric,
            damping=self.options.damping,
            exact=self.options.exact,
            device=self._device,
        )
        if float(spectrum.values[0]) == 0:
            what = "task vector" if self.options.target == "delta" else "weight"
            return f"its {what} has no effect on the data"
        return spectrum

    def _allocate(self, values: Mapping[AnyKey, Tensor]) -> dict[AnyKey, int]:
        """Ranks of the spectra that share a budget: those of one layer's tasks, or of all layers and tasks."""
        if not values:
            return {}
        groups: dict[float, dict[AnyKey, Tensor]] = {}  # tasks of equal ratios share a budget
        for key, found in values.items():
            groups.setdefault(self._rho(key if isinstance(key, str) else key[0]), {})[key] = found
        ranks: dict[AnyKey, int] = {}
        for rho, own in groups.items():
            if self.options.allocation == "even":
                ranks |= {key: max(1, rank) for key, rank in even_ranks(own, rho).items()}
            else:
                # A budget out of reach was refused before; a rest of rounding, where some tasks are untouched, is none.
                ranks |= allocate_ranks(own, rho, self.options.stopping_share, nearest_budget=True)
        return ranks

    @cached_property
    def _ranks_of_all(self) -> dict[Key, int]:
        """Ranks of all tasks and layers, for the scopes that share a budget among layers."""
        return self._ranks_over(ALONE)

    def _ranks_over(self, group: ProcessGroup) -> dict[Key, int]:
        """The same, found by several processes together."""
        found_here: dict[str, dict[str, Tensor]] = {}
        for layers in self._own_batches(group):
            pairs = [(parameter, matrix) for parameter in layers for matrix in parameter.matrices]
            for (_, matrix), spectra in zip(pairs, self._spectra(pairs), strict=True):
                # Only the values are kept; the directions of all layers would not fit in memory.
                found_here[matrix.name] = {task: spectrum.values for task, spectrum in spectra.items()}
        by_layer = {name: found for one in group.gather(found_here) for name, found in one.items()}
        values: dict[Key, Tensor] = {}
        ranks: dict[Key, int] = {}
        for matrix in (matrix for parameter in self.layers for matrix in parameter.matrices):
            own = by_layer[matrix.name]
            values.update({(task, matrix.name): found for task, found in own.items()})
            if self.options.scope == "model":
                ranks.update({(task, matrix.name): rank for task, rank in self._allocate(own).items()})
        if self.options.scope == "global":
            return self._allocate(values)
        averaged = averaged_ranks(ranks, {key: len(found) for key, found in values.items()})
        return {key: max(1, rank) for key, rank in averaged.items()}

    def _rho(self, task: str) -> float:
        rho = self.options.rho_of(task)
        if isinstance(rho, str):
            raise PaveError("rho: auto is chosen by a workflow on validation data; give a number here")
        return rho

    def _check(self) -> None:
        problems = Problems("the task vectors cannot be purified like this:")
        if isinstance(self.options.rho, str):
            problems.add("rho: auto is chosen by a workflow on validation data; give a number here")
        for task in {**dict.fromkeys(self.options.tasks or ()), **self.options.task_rho}:
            if task not in self.source.tasks:
                problems.add(f"task '{task}' is to be purified, but there are only {', '.join(self.source.tasks)}")
        problems.extend(self._moments.problems(self.layers))
        problems.extend(budget_problems(self.options, self.layers, self.purified_tasks))
        problems.raise_if_any()


def workers_of(compute: Compute) -> int:
    """How many threads purify at once."""
    return 1 if solving_device(compute) != "cpu" else compute.workers or compute.threads or torch.get_num_threads()


def solving_device(compute: Compute, rank: int = 0) -> str:
    """Where one of several processes solves: the CPU in place of a device without float64."""
    found = compute.device_of(rank)
    return "cpu" if found == "mps" else found


def layers_at_once(tasks: int, workers: int) -> int:
    """How many layers are purified at a time, one task of one layer a worker: as many as there are workers for."""
    return max(1, workers // max(1, tasks))


def batches(layers: Sequence[Layer], tasks: int, workers: int) -> Iterator[Sequence[Layer]]:
    """The layers in order, as many together as are purified at a time."""
    size = layers_at_once(tasks, workers)
    return (layers[start : start + size] for start in range(0, len(layers), size))


def budget_problems(options: Purify, layers: Sequence[Parameter], tasks: Iterable[str]) -> Iterator[str]:
    """What is wrong with rank ratios for these layers, one line for each width (or whole model) that one does not fit.

    Args:
        options: the purification.
        layers: the matrix weights.
        tasks: which tasks are purified; those of equal ratios share a budget.
    """
    if options.nearest_budget or not layers:
        return
    for rho, count in Counter(map(options.rho_of, tasks)).items():
        if not isinstance(rho, str):
            yield from _budget_problems(options, layers, rho, count)


def _budget_problems(options: Purify, layers: Sequence[Parameter], rho: float, tasks: int) -> Iterator[str]:
    """Those of one ratio, which so many tasks have."""
    share = options.stopping_share if options.allocation == "spectral" else 1.0
    budgets: dict[tuple[int, ...], str] = {}
    matrices = [matrix for parameter in layers for matrix in parameter.matrices]
    if options.scope == "global" and options.allocation == "spectral":
        budgets[tuple(min(matrix.shape) for matrix in matrices)] = "all layers together"
    else:
        for matrix in matrices:
            budgets.setdefault((min(matrix.shape),), matrix.name)
    for lengths, where in budgets.items():
        try:
            spectral_budget({str(key): width for key, width in enumerate(lengths * tasks)}, rho, share)
        except UnreachableBudgetError as error:
            yield f"{where}: {error}; take that with nearest_budget: true, or change rho or stopping_share"
