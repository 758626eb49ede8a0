"""Metrics of several models on one task, for test rows that are drawn again and again.

The definitions are those of `pave_lightning.tasks.metrics`, in float64 and for all draws at once: a draw is how often
each row was drawn, so counts and moments are matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from pave_lightning.reporting.resampled_labels import label_metric
from pave_lightning.tasks.predictions import TaskPredictions
from pave_lightning.tasks.text_matches import TESTS, plain_text

Floats = npt.NDArray[np.float64]

CLASS_METRICS = ("accuracy", "f1", "macro_f1", "matthews")
NUMBER_METRICS = ("pearson", "spearman")
TEXT_METRICS = tuple(TESTS)
# Of rows with a probability for each of several labels.
LABEL_METRICS = ("micro_f1", "macro_f1", "exact_match", "mean_average_precision")
# A variance of values that reach to 1 below which they all are the same number: what rounding leaves.
NO_VARIANCE = 1e-14


class ResampledTask:
    """The predictions of several models on the same rows of one task.

    A row stands for all of its predictions: the words of a text are drawn together.

    Args:
        predictions: of one or more models, of the same rows and positions and with the same targets.
        rows: how many rows the split has, those without any prediction among them.
        metrics: names of metrics; a model has NaN for those that do not fit what it predicts.
    """

    def __init__(self, predictions: Sequence[TaskPredictions], rows: int, metrics: Sequence[str]) -> None:
        self._predictions = list(predictions)
        self._metrics = list(metrics)
        self._row_of = predictions[0].rows
        self._row_count = rows
        self._whole = len(self._row_of) == rows and bool((self._row_of == np.arange(rows)).all())

    def values(self, indices: npt.NDArray[np.int64]) -> Floats:
        """All metrics of all models, for each draw.

        Args:
            indices: int64 of shape ``(draws, rows)``: the rows of each draw.

        Returns:
            float64 of shape ``(models, metrics, draws)``.
        """
        counts = row_counts(indices, self._row_count)
        by_model: dict[str, Floats] = {}
        first = self._predictions[0]
        if first.means:
            fitting = first.means
        elif first.are_classes:
            fitting = CLASS_METRICS
        else:
            fitting = TEXT_METRICS if first.are_texts else (*NUMBER_METRICS, *LABEL_METRICS)
        asked = [name for name in self._metrics if name in fitting]
        of_labels = [name for name in asked if name in LABEL_METRICS]
        with np.errstate(divide="ignore", invalid="ignore"):
            if first.means:
                by_model = self._of_means(asked, counts)
            elif first.are_texts:
                by_model = {name: (self._passing(name) @ counts) / (self._answers @ counts) for name in asked}
            elif first.are_classes:
                by_model = self._of_classes(asked, counts)
            elif of_labels:
                by_model = self._of_labels(of_labels, counts)
            elif asked:
                weights = counts if self._whole else counts[self._row_of]
                by_model = self._of_numbers(asked, weights)
        nothing = np.full((len(self._predictions), indices.shape[0]), np.nan)
        return np.stack([by_model.get(name, nothing) for name in self._metrics], axis=1)

    def _of_classes(self, asked: Sequence[str], counts: Floats) -> dict[str, Floats]:
        found: dict[str, Floats] = {}
        if "accuracy" in asked:
            found["accuracy"] = (self._right @ counts) / (self._answers @ counts)
        if any(name != "accuracy" for name in asked):
            actual = self._actual @ counts
            by_class = [(right @ counts, predicted @ counts, actual) for right, predicted in self._by_class]
            for name in (name for name in asked if name != "accuracy"):
                found[name] = np.stack([_OF_COUNTS[name](*counted) for counted in by_class])
        return found

    def _of_means(self, asked: Sequence[str], counts: Floats) -> dict[str, Floats]:
        rows, names = self._several
        weights = counts[rows]
        answers = weights.sum(axis=0)
        scores = {name: np.stack([one[:, place] for one in self._tables]) for place, name in enumerate(names)}
        return {name: scores[name] @ weights / answers for name in asked}

    def _of_labels(self, asked: Sequence[str], counts: Floats) -> dict[str, Floats]:
        rows, _ = self._several
        weights, actual = counts[rows], self._predictions[0].targets.reshape(len(rows), -1) > 0
        found = {name: [label_metric(name, one, actual, weights) for one in self._tables] for name in asked}
        return {name: np.stack(values) for name, values in found.items()}

    def _of_numbers(self, asked: Sequence[str], weights: Floats) -> dict[str, Floats]:
        found: dict[str, Floats] = {}
        finite = np.asarray([np.isfinite(one.predictions).all() for one in self._predictions])
        if "pearson" in asked:
            found["pearson"] = _pearson(self._scaled, self._scaled_targets, weights)
        if "spearman" in asked:
            target_ranks = self._target_order.ranks(weights)
            found["spearman"] = np.stack([order.correlation(target_ranks, weights) for order in self._orders])
        for values in found.values():
            values[~finite] = np.nan
        return found

    def _passing(self, name: str) -> Floats:
        """How many texts of each row pass a test, shape ``(models, rows)``."""
        right = [[plain_text(one) for one in own] for own in self._predictions[0].targets]
        return np.stack(
            [
                self._per_row(
                    np.asarray(
                        [TESTS[name](plain_text(text), own) for text, own in zip(one.predictions, right, strict=True)],
                        dtype=np.bool_,
                    )
                )
                for one in self._predictions
            ]
        )

    @cached_property
    def _several(self) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
        """The rows that have predictions, which are as many for each, and the metrics that are kept for them."""
        return np.unique(self._row_of), self._predictions[0].means

    @cached_property
    def _tables(self) -> list[Floats]:
        """Each model's predictions, shape ``(rows, predictions of a row)``."""
        rows, _ = self._several
        return [one.predictions.astype(np.float64).reshape(len(rows), -1) for one in self._predictions]

    # ---- what stays the same in all draws ----------------------------------------------------------------------------

    @cached_property
    def _right(self) -> Floats:
        """How many predictions of each row are right, shape ``(models, rows)``."""
        right = [self._per_row(one.predictions == one.targets) for one in self._predictions]
        return np.stack(right)

    @cached_property
    def _answers(self) -> Floats:
        """How many predictions each row has, shape ``(rows,)``."""
        return self._per_row(np.ones(len(self._row_of)))

    @cached_property
    def _classes(self) -> int:
        return 1 + int(
            max(max(one.predictions.max(initial=0), one.targets.max(initial=1)) for one in self._predictions)
        )

    @cached_property
    def _actual(self) -> Any:
        return self._class_counts(np.asarray(self._predictions[0].targets), np.ones(len(self._row_of), dtype=bool))

    @cached_property
    def _by_class(self) -> list[tuple[Any, Any]]:
        """For each model how many predictions of each row are right, and how many there are, by class."""
        everywhere = np.ones(len(self._row_of), dtype=bool)
        return [
            (
                self._class_counts(one.predictions, one.predictions == one.targets),
                self._class_counts(one.predictions, everywhere),
            )
            for one in self._predictions
        ]

    @cached_property
    def _scaled(self) -> Floats:
        return np.stack([_scaled(one.predictions) for one in self._predictions])

    @cached_property
    def _scaled_targets(self) -> Floats:
        return _scaled(self._predictions[0].targets)

    @cached_property
    def _orders(self) -> list[_Order]:
        return [_Order(one.predictions) for one in self._predictions]

    @cached_property
    def _target_order(self) -> _Order:
        return _Order(self._predictions[0].targets)

    def _per_row(self, values: npt.NDArray[Any]) -> Floats:
        found: Floats = np.bincount(self._row_of, values.astype(np.float64), self._row_count).astype(np.float64)
        return found

    def _class_counts(self, classes: npt.NDArray[Any], counted: npt.NDArray[np.bool_]) -> Any:
        """A sparse matrix of shape ``(classes, rows)``."""
        places = (classes[counted], self._row_of[counted])
        ones = np.ones(len(places[0]))
        return sparse.csr_array((ones, places), shape=(self._classes, self._row_count))


def row_counts(indices: npt.NDArray[np.int64], rows: int) -> Floats:
    """How often each row was drawn.

    Args:
        indices: int64 of shape ``(draws, n)``.
        rows: how many rows there are.

    Returns:
        float64 of shape ``(rows, draws)``.

    Example:
        >>> row_counts(np.array([[0, 0, 2], [1, 2, 0]]), 3).T
        array([[2., 0., 1.],
               [1., 1., 1.]])
    """
    draws = len(indices)
    places = indices * draws + np.arange(draws)[:, None]
    found: Floats = np.bincount(places.ravel(), minlength=rows * draws).reshape(rows, draws).astype(np.float64)
    return found


def _f1(right: Floats, predicted: Floats, actual: Floats) -> Floats:
    """That of class 1; all arguments have the shape ``(classes, draws)``."""
    both = predicted[1] + actual[1]
    return np.where(both > 0, 2 * right[1] / both, 0.0)


def _macro_f1(right: Floats, predicted: Floats, actual: Floats) -> Floats:
    """Mean over the classes that occur in the draw."""
    both = predicted + actual
    occurring = both > 0
    found: Floats = np.where(occurring, 2 * right / both, 0.0).sum(axis=0) / occurring.sum(axis=0)
    return found


def _matthews(right: Floats, predicted: Floats, actual: Floats) -> Floats:
    """0 where only one class is predicted, or only one occurs."""
    answers = actual.sum(axis=0)
    together = right.sum(axis=0) * answers - (predicted * actual).sum(axis=0)
    spread = (answers**2 - (predicted**2).sum(axis=0)) * (answers**2 - (actual**2).sum(axis=0))
    found = np.where(spread > 0, together / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0)
    return np.where(answers > 0, found, np.nan)


_OF_COUNTS = {"f1": _f1, "macro_f1": _macro_f1, "matthews": _matthews}


def _scaled(values: npt.NDArray[Any]) -> Floats:
    """Values without their mean, the farthest at 1: moments of them lose nothing to rounding."""
    centred: Floats = values.astype(np.float64)
    if not len(centred) or centred.max() == centred.min():
        return np.zeros_like(centred)
    centred -= centred.mean()
    found: Floats = centred / np.abs(centred).max()
    return found


def _pearson(predictions: Floats, targets: Floats, weights: Floats) -> Floats:
    """Of scaled predictions, shape ``(models, n)``, and targets ``(n,)``, with weights ``(n, draws)``."""
    answers = weights.sum(axis=0)
    means, mean = predictions @ weights / answers, targets @ weights / answers
    variances = predictions**2 @ weights / answers - means**2
    variance = targets**2 @ weights / answers - mean**2
    together = (predictions * targets) @ weights / answers - means * mean
    defined = (variances > NO_VARIANCE) & (variance > NO_VARIANCE)
    found = np.where(defined, together / np.sqrt(np.where(defined, variances * variance, 1.0)), 0.0)
    return np.where(answers > 0, found, np.nan)


class _Order:
    """The order of some values, which tells their ranks in every draw of them.

    Args:
        values: shape ``(n,)``, at least one.
    """

    def __init__(self, values: npt.NDArray[Any]) -> None:
        distinct, self._place = np.unique(values, return_inverse=True)
        self._order = np.argsort(self._place, kind="stable")
        self._starts = np.searchsorted(self._place[self._order], np.arange(len(distinct)))

    def ranks(self, weights: Floats) -> Floats:
        """The rank of each value less the mean rank, ties sharing theirs: shape ``(n, draws)`` as the weights."""
        ranks: Floats = self._centred_ranks(self._by_value(weights), weights)[self._place]
        return ranks

    def correlation(self, others: Floats, weights: Floats) -> Floats:
        """The correlation of the ranks with other ones.

        Args:
            others: shape ``(n, draws)``, see `ranks`.
            weights: shape ``(n, draws)``.

        Returns:
            Shape ``(draws,)``.
        """
        drawn, weighted = self._by_value(weights), weights * others
        own = self._centred_ranks(drawn, weights)
        together = np.einsum("nd,nd->d", own, self._by_value(weighted))
        square = np.einsum("nd,nd,nd->d", drawn, own, own)
        other = np.einsum("nd,nd->d", weighted, others)
        defined = (square > 0) & (other > 0)
        found = np.where(defined, together / np.sqrt(np.where(defined, square * other, 1.0)), 0.0)
        return np.where(weights.sum(axis=0) > 0, found, np.nan)

    def _by_value(self, numbers: Floats) -> Floats:
        """Sums of what belongs to one value, in the order of values: shape ``(distinct values, draws)``."""
        ordered = numbers[self._order]
        if len(self._starts) == len(self._order):
            return ordered
        summed: Floats = np.add.reduceat(ordered, self._starts, axis=0)
        return summed

    def _centred_ranks(self, drawn: Floats, weights: Floats) -> Floats:
        ranks: Floats = np.cumsum(drawn, axis=0)
        ranks -= (drawn - 1) / 2
        ranks -= (weights.sum(axis=0) + 1) / 2
        return ranks
