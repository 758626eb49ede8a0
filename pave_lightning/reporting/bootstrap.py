r"""Bootstrap intervals of scores over test rows.

The rows of every task are drawn again, with replacement, and all metrics of all models are computed on the same draw.
So differences between models are paired, and averages are over tasks whose rows are drawn each for itself. One call of
`scipy.stats.bootstrap` (Efron, https://doi.org/10.1214/aos/1176344552) does it, with a statistic of many values.

Ends are percentiles of the draws. BCa, scipy's default, computes the metrics once more for each row that is left out,
which grows with the square of the number of rows. With some hundred rows both agree closely, and percentiles stay
within the range of a metric.

A normalised value is a ratio of two scores that are measured on the same rows, so the expert's is drawn along. With the
expert as a constant the interval would leave out that the expert's own score is uncertain, and would be too wide where
model and expert fail on the same rows. Where the expert is not above zero in some draw, the ratio has no bounds and
there is no interval.

An interval tells what other test rows would have given for these weights. It does not cover other seeds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pave_lightning.reporting.intervals import Against, Interval, Intervals, PairIntervals
from pave_lightning.reporting.resampled_metrics import (
    CLASS_METRICS,
    LABEL_METRICS,
    NUMBER_METRICS,
    Floats,
    ResampledTask,
)
from pave_lightning.reporting.scores import Model, ScoreTable, model_of
from pave_lightning.tasks.predictions import TaskPredictions

RESAMPLES = 2000
CONFIDENCE = 0.95
# Rows times draws that are held at once, in a few arrays.
MOST_DRAWN = 2_000_000
# How far a score may be from what its predictions give: it was added up in float32.
SAME_SCORE = 1e-5

Predictions = Mapping[Model, Mapping[str, TaskPredictions]]
Pair = tuple[Model, Model]


def bootstrap_intervals(
    table: ScoreTable, predictions: Predictions, *, seed: int, pairs: Iterable[Pair] | None = None
) -> Intervals:
    """The intervals of a table's scores, averages and differences.

    Scores whose predictions are not there, or do not give the score (a metric of one's own), have no interval.

    Args:
        table: The scores.
        predictions: By model and task.
        seed: Of the draws; they depend on it and on the numbers of rows alone, not on the models.
        pairs: Models whose differences are asked for; all that the table compares where nothing is given.
    """
    asked = list(_pairs_of(table) if pairs is None else pairs)
    statistic = _Statistic(table, predictions, list(dict.fromkeys(asked)))
    if not statistic.rows:
        return Intervals()
    from scipy.stats import bootstrap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of values that have no interval
        found = bootstrap(
            tuple(np.arange(rows) for rows in statistic.rows),
            statistic,
            n_resamples=RESAMPLES,
            batch=max(1, min(RESAMPLES, MOST_DRAWN // sum(statistic.rows))),
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    return statistic.intervals(found.low, found.high)


def _pairs_of(table: ScoreTable) -> Iterable[Pair]:
    for model in table.models():
        for against in Against:
            partner = table.partner(model, against)
            if partner is not None:
                yield model, partner


class _Statistic:
    """All that is measured, as one array, for rows that are drawn.

    Args:
        table: The scores.
        predictions: By model and task.
        pairs: Models whose differences are asked for.

    Attributes:
        rows: How many rows each task has of which predictions are known.
    """

    def __init__(self, table: ScoreTable, predictions: Predictions, pairs: Sequence[Pair]) -> None:
        self._models = table.models()
        self._place = {model: place for place, model in enumerate(self._models)}
        self._pairs = pairs
        self._tasks: list[tuple[ResampledTask, list[int], int]] = []
        self._slots: list[tuple[str, str]] = []
        self.rows: list[int] = []
        for task in table.tasks():
            self._add(table, predictions, task)
        self._expert = self._experts_of(table)
        self._unknown = np.zeros((len(self._models), len(self._slots)), dtype=bool)
        self._unknown = self._disagreeing(table) if self.rows else self._unknown
        slots = {slot: place for place, slot in enumerate(self._slots)}
        primary = [slots.get((task, metric)) for task, metric in table.primary_metrics.items()]
        left_out = table.left_out()
        counted = [place for task, place in zip(table.primary_metrics, primary, strict=True) if task not in left_out]
        self._averaged, self._normalised = _all_of(primary), _all_of(counted)

    def _add(self, table: ScoreTable, predictions: Predictions, task: str) -> None:
        own = [score for score in table.scores if score.task == task]
        known = (*CLASS_METRICS, *NUMBER_METRICS, *LABEL_METRICS, *_means(predictions, task))
        metrics = [name for name in dict.fromkeys(score.metric for score in own) if name in known]
        rows = max((score.examples for score in own), default=0)
        found = {model: predictions[model][task] for model in self._models if task in predictions.get(model, {})}
        found = {model: one for model, one in found.items() if len(one.rows) and one.rows[-1] < rows}
        if rows < 2 or not found or not metrics:
            return
        first = next(iter(found.values()))
        alike = {model: one for model, one in found.items() if one.same_rows(first)}
        models = [self._place[model] for model in alike]
        self._tasks.append((ResampledTask(list(alike.values()), rows, metrics), models, len(metrics)))
        self._slots += [(task, metric) for metric in metrics]
        self.rows.append(rows)

    def _experts_of(self, table: ScoreTable) -> list[int | None]:
        """For each task and metric which model is the expert."""
        experts = {(s.task, s.metric): self._place[model_of(s)] for s in table.scores if s.form == "expert"}
        return [experts.get(slot) for slot in self._slots]

    def _disagreeing(self, table: ScoreTable) -> npt.NDArray[np.bool_]:
        """Which scores are not what the predictions give, shape ``(models, tasks and metrics)``."""
        scores = np.full((len(self._models), len(self._slots)), np.nan)
        slots = {slot: place for place, slot in enumerate(self._slots)}
        for score in table.scores:
            if (score.task, score.metric) in slots:
                scores[self._place[model_of(score)], slots[score.task, score.metric]] = score.value
        again = self._values([np.arange(rows)[None] for rows in self.rows])[..., 0]
        return ~(np.abs(scores - again) <= SAME_SCORE)

    def _values(self, indices: Sequence[npt.NDArray[np.int64]]) -> Floats:
        """Every metric of every model on every task, shape ``(models, tasks and metrics, draws)``."""
        found = np.full((len(self._models), len(self._slots), len(indices[0])), np.nan)
        first = 0
        for (task, models, metrics), drawn in zip(self._tasks, indices, strict=True):
            found[models, first : first + metrics] = task.values(drawn)
            first += metrics
        found[self._unknown] = np.nan
        return found

    def __call__(self, *indices: npt.NDArray[np.int64], axis: int = -1) -> Floats:
        """All values, shape ``(values, draws)``; ``indices`` hold the rows of each task, ``(draws, rows)``."""
        values = self._values(indices)
        experts = np.full_like(values[0], np.nan)
        for slot, expert in enumerate(self._expert):
            if expert is not None:
                experts[slot] = values[expert, slot]
        normalised = values / np.where(experts > 0, experts, np.nan)
        averages = _mean(values, self._averaged)
        normalised_averages = _mean(normalised, self._normalised)
        first = [self._place[model] for model, _ in self._pairs]
        second = [self._place[model] for _, model in self._pairs]
        blocks = [values, normalised, averages, normalised_averages]
        blocks += [block[first] - block[second] for block in (values, averages, normalised_averages)]
        return np.concatenate([block.reshape(-1, values.shape[-1]) for block in blocks])

    def intervals(self, low: Floats, high: Floats) -> Intervals:
        """What the ends of all values are ends of."""
        ends = iter(map(Interval, low.tolist(), high.tolist()))

        def by_slot(models: Sequence[Any]) -> dict[tuple[Any, str, str], Interval]:
            return {(model, *slot): next(ends) for model in models for slot in self._slots}

        values, normalised = by_slot(self._models), by_slot(self._models)
        averages: dict[Hashable, Interval] = {model: next(ends) for model in self._models}
        normalised_averages: dict[Hashable, Interval] = {model: next(ends) for model in self._models}
        differences = by_slot(self._pairs)
        of_averages, of_normalised = ([next(ends) for _ in self._pairs] for _ in range(2))
        pairs: dict[tuple[Hashable, Hashable], PairIntervals] = {
            pair: PairIntervals({slot: differences[pair, *slot] for slot in self._slots}, average, of_one)
            for pair, average, of_one in zip(self._pairs, of_averages, of_normalised, strict=True)
        }
        return Intervals(values, normalised, averages, normalised_averages, pairs)


def _all_of(places: Sequence[int | None]) -> list[int]:
    """All places, or none where one is not known: an average of the others would be another average."""
    known = [place for place in places if place is not None]
    return known if len(known) == len(places) else []


def _mean(values: Floats, slots: Sequence[int]) -> Floats:
    if not slots:
        return np.full((values.shape[0], values.shape[2]), math.nan)
    mean: Floats = values[:, slots].mean(axis=1)
    return mean


def _means(predictions: Predictions, task: str) -> set[str]:
    """The metrics of which scores of rows are kept."""
    return {name for found in predictions.values() if task in found for name in found[task].means}
