"""Choosing a scale on validation data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pave_lightning.config import WrittenDtype
from pave_lightning.errors import PaveError
from pave_lightning.evaluation.candidates import Candidate, ExpertsCandidate, MergedCandidate
from pave_lightning.evaluation.evaluator import Evaluator, SuiteData, refuse_non_finite
from pave_lightning.evaluation.heads import NotFiniteError
from pave_lightning.evaluation.options import DEFAULT_POINTS, ScaleSearch
from pave_lightning.experts.trainers import build_trainer, quiet_lightning
from pave_lightning.merging.merged import MergedVectors
from pave_lightning.system.process_groups import ALONE, ProcessGroup
from pave_lightning.tasks.data_module import TaskDataModule
from pave_lightning.tasks.metrics import weak_experts
from pave_lightning.tasks.options import Examples
from pave_lightning.tasks.task import Task
from pave_lightning.weights import TaskVectors

log = logging.getLogger("pave_lightning")

# Scales that an automatic search tries before it refines.
MOST_SCALES = 12
# Each halves, on the logarithmic axis, the distance between the best scale and its neighbours.
REFINEMENTS = 2


class NoFiniteScoreError(PaveError):
    """Nothing that was tried gives finite scores on the validation splits."""


@dataclass(frozen=True)
class FoundScale:
    """The best scale, and every scale that was tried.

    Attributes:
        scale: the best one.
        average: its average of normalised scores on the validation splits.
        tried: every scale with its score, in the order of the scales.
        candidate: the model at the best scale, with the heads that were fitted to it where that is done.
    """

    scale: float
    average: float
    tried: list[tuple[float, float]]
    candidate: Candidate


class ScaleSearcher:
    """Scores scales and takes the one with the best average of normalised scores in the primary metric.

    Only validation splits are looked at; test splits never are. Among equals the smaller scale wins.

    Args:
        tasks: the tasks.
        evaluator: scores candidates on all of them.
        experts: the experts, whose scores normalise the others.
        data: gives a task's data.
        options: options of the trainer that runs the passes (one process).
        precision: its precision.
        root: its folder.
        references: validation scores of these very experts that are known already, by the rows a task; filled here, so
            that several searchers may share them.
        of_experts: what scores the experts and gives their data, where they read with other tokens than candidates.
        group: the processes that try scales side by side; each is told the scores of all.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        evaluator: Evaluator,
        experts: ExpertsCandidate,
        *,
        data: Callable[[Task], TaskDataModule],
        options: Mapping[str, Any],
        precision: str,
        root: Path,
        references: dict[int | None, dict[str, float]] | None = None,
        of_experts: tuple[Evaluator, Callable[[Task], TaskDataModule]] | None = None,
        group: ProcessGroup = ALONE,
    ) -> None:
        self._group = group
        self._of_experts = of_experts or (evaluator, data)
        self.tasks, self.evaluator, self.experts, self.data = list(tasks), evaluator, experts, data
        self.options, self.precision, self.root = options, precision, root
        self._references = references if references is not None else {}
        self._data: dict[int | None, SuiteData] = {}
        self._fit: Callable[[Candidate], Candidate] = lambda candidate: candidate

    def under(self, fit: Callable[[Candidate], Candidate]) -> ScaleSearcher:
        """A searcher on the same data that scores what is made of each candidate, such as heads fitted to it.

        Args:
            fit: gives what is scored; of one that it refuses with `NotFiniteError` the score is NaN.
        """
        other = copy(self)
        other._fit = fit
        return other

    def best(
        self,
        source: TaskVectors,
        merged: MergedVectors,
        search: ScaleSearch,
        start: float = 1.0,
        dtype: WrittenDtype = "base",
    ) -> FoundScale:
        """The best scale for merged task vectors, and every scale that was tried with its score.

        Args:
            source: the task vectors.
            merged: what a method made of them.
            search: which scales are tried, and on how many rows.
            start: where an automatic search begins, the method's default scale; above zero.
            dtype: in which type the model would be written; the rounded weights are scored.

        Raises:
            PaveError: no expert has a positive score, so nothing can be normalised.
            NoFiniteScoreError: no scale gives finite scores.
        """
        candidates: dict[float, Candidate] = {}

        def averages_at(scales: Sequence[float]) -> list[float]:
            averages: list[float] = []
            for begin in range(0, len(scales), self._group.size):
                together = scales[begin : begin + self._group.size]
                own = math.nan
                if self._group.rank < len(together):
                    scale = together[self._group.rank]
                    plain = MergedCandidate(source, merged, scale, dtype)
                    candidates[scale], own = self.scored(plain, search.examples)
                for scale, average in zip(together, self._group.gather(own), strict=False):
                    log.info("  scale %.4g: %.4f of the experts on validation", scale, average)
                    averages.append(average)
            return averages

        if search.search == "auto":
            tried = search_from(start, averages_at)
        else:
            scales = torch.linspace(*search.search, search.points or DEFAULT_POINTS, dtype=torch.float64).tolist()
            tried = dict(zip(scales, averages_at(scales), strict=True))
        best = best_scale(tried)
        if best not in candidates:  # another process has scored it
            plain = MergedCandidate(source, merged, best, dtype)
            candidates[best] = self._fit(plain) if self._group.is_first else plain
        advice = _advice(tried, best, search)
        if advice is not None:
            log.warning("  %s", advice)
        return FoundScale(best, tried[best], sorted(tried.items()), candidates[best])

    def scored(self, candidate: Candidate, examples: int | None) -> tuple[Candidate, float]:
        """What is scored of a candidate (see `under`), and its average; NaN where anything is not finite."""
        try:
            candidate = self._fit(candidate)
        except NotFiniteError:
            return candidate, math.nan
        return candidate, self.average(candidate, examples)

    def average(self, candidate: Candidate, examples: int | None) -> float:
        """A candidate's scores on the validation splits, divided by the experts', on average over the tasks.

        Args:
            candidate: what is scored.
            examples: validation rows a task; all that the task uses where None.

        Raises:
            PaveError: no expert has a positive score, so nothing can be normalised, or an expert's outputs are not
                finite.
        """
        if examples not in self._data:  # once: finding the tokenised rows takes longer than reading them
            self._data[examples] = self._suite(self.data, examples)
        data = self._data[examples]
        if examples not in self._references:
            evaluator, own = self._of_experts
            theirs = data if own is self.data else self._suite(own, examples)
            self._references[examples] = self._primary_scores(self.experts, theirs, evaluator, whose="its own expert")
            known = data.constants()
            constants = {task.name: known[task.name][task.primary_metric] for task in self.tasks}
            if weak := weak_experts(self._references[examples], constants):
                log.warning("  %s", weak)
        reference = {task: value for task, value in self._references[examples].items() if value > 0}
        if not reference:
            raise PaveError("no expert scores above zero on its validation split, so no scale can be chosen")
        found = self._primary_scores(candidate, data, self.evaluator)
        return sum(found[task] / value for task, value in reference.items()) / len(reference)

    def _suite(self, data: Callable[[Task], TaskDataModule], examples: int | None) -> SuiteData:
        """The validation rows of all tasks, at most so many of each."""
        return SuiteData([data(self._limited(task, examples)) for task in self.tasks], "validation")

    def _primary_scores(
        self, candidate: Candidate, data: SuiteData, evaluator: Evaluator, whose: str = ""
    ) -> dict[str, float]:
        """Primary scores by task; NaN where outputs are not finite, which is refused of what ``whose`` names."""
        with quiet_lightning():
            trainer = build_trainer(self.options, root=self.root, precision=self.precision, enable_progress_bar=False)
        scores = evaluator.score(candidate, data, trainer)
        if whose:
            refuse_non_finite(scores, whose, "look for broken weights, or use a safer evaluate.precision")
        return {task.name: scores[task.name].metrics[task.primary_metric] for task in self.tasks}

    @staticmethod
    def _limited(task: Task, examples: int | None) -> Task:
        if examples is None:
            return task
        fewer = min(examples, task.examples.validation or examples)
        limited = Examples(train=task.examples.train, validation=fewer, test=task.examples.test)
        return task.model_copy(update={"examples": limited})


def search_from(start: float, averages_at: Callable[[Sequence[float]], Sequence[float]]) -> dict[float, float]:
    """Try scales around a first one until the best is enclosed, then between the best and its neighbours.

    Scales go up and down by factors of two while the best stands at that end, for at most `MOST_SCALES` scales; a
    plateau (the next scale does exactly as well) ends a side, and so does a score that is not finite. Then the
    geometric means of the best and its neighbours are tried, `REFINEMENTS` times over, each time around the best so
    far.

    Args:
        start: the first scale, above zero.
        averages_at: the scores of some scales, which may be tried side by side.

    Returns:
        Every scale that was tried -> its score, which may be NaN.
    """
    tried: dict[float, float] = {}

    def try_all(scales: Sequence[float]) -> None:
        tried.update(zip(scales, averages_at(scales), strict=True))

    try_all((start, 2 * start, start / 2))
    while len(tried) < MOST_SCALES and (further := _beyond(tried)) is not None:
        try_all([further])
    for _ in range(REFINEMENTS):
        best = _best_so_far(tried)
        different = [scale for scale in _neighbours(tried, best) if tried[scale] != tried[best]]
        if different and math.isfinite(tried[best]):
            try_all([math.sqrt(best * neighbour) for neighbour in different])
    return tried


def best_scale(tried: Mapping[float, float]) -> float:
    """The scale with the highest score, the smaller among equals.

    Raises:
        NoFiniteScoreError: no score is finite.
    """
    best = _best_so_far(tried)
    if not math.isfinite(tried[best]):
        raise NoFiniteScoreError(
            "no scale that was tried gives finite scores on the validation splits; try smaller ones"
        )
    return best


def _best_so_far(tried: Mapping[float, float]) -> float:
    """The scale with the highest score, the smaller among equals; scores that are not finite come last."""
    return max(tried, key=lambda scale: (tried[scale] if math.isfinite(tried[scale]) else -math.inf, -scale))


def _beyond(tried: Mapping[float, float]) -> float | None:
    """The next scale by a factor of two beyond the end at which the best one stands; None where there is no such end.

    On a plateau at the lower end nothing speaks for smaller scales: every one of them would win as the smaller of
    equals, down to the base.
    """
    best = _best_so_far(tried)
    if best == min(tried):
        return None if _on_plateau(tried, best) else best / 2
    return 2 * best if best == max(tried) else None


def _neighbours(tried: Mapping[float, float], best: float) -> list[float]:
    """The next smaller and the next larger scale that were tried."""
    smaller, larger = [s for s in tried if s < best], [s for s in tried if s > best]
    return [*([max(smaller)] if smaller else []), *([min(larger)] if larger else [])]


def _on_plateau(tried: Mapping[float, float], best: float) -> bool:
    """Whether the next larger scale with a finite score does as well."""
    larger = [scale for scale, average in tried.items() if scale > best and math.isfinite(average)]
    return bool(larger) and tried[min(larger)] == tried[best]


def _advice(tried: Mapping[float, float], best: float, search: ScaleSearch) -> str | None:
    """What to tell of a best scale at an end of what was tried; None where it stands inside, or is the base's."""
    end = {min(tried): "smallest", max(tried): "largest"}.get(best)
    if end is None or best == 0:
        return None
    if _on_plateau(tried, best):
        return f"the best scale is the {end} that was tried, but larger ones do as well: hardly anything depends on it"
    if search.search == "auto":
        return f"the best scale is the {end} of the {len(tried)} that were tried, so a better one may lie beyond it"
    return f"the best scale is the {end} that was tried; `scale: search` continues past the end of a range"
