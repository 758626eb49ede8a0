"""Metrics of rows with a probability for each of several labels, for rows that are drawn again and again."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def label_metric(name: str, probabilities: Floats, actual: Flags, weights: Floats) -> Floats:
    """A metric of `pave_lightning.tasks.metrics.build_multi_label_metrics`, for each draw.

    Args:
        name: the metric.
        probabilities: shape ``(rows, labels)``; those above one half are predictions.
        actual: which labels hold, of the same shape.
        weights: how often each row was drawn, shape ``(rows, draws)``.

    Returns:
        Shape ``(draws,)``; NaN where nothing was drawn.

    Raises:
        ValueError: there is no such metric.

    Example:
        >>> probabilities, actual = np.array([[0.9, 0.2], [0.6, 0.7]]), np.array([[True, False], [False, True]])
        >>> label_metric("exact_match", probabilities, actual, np.array([[1.0, 2.0], [1.0, 0.0]]))
        array([0.5, 1. ])
    """
    predicted = probabilities > 0.5
    if name == "exact_match":
        same: Floats = (predicted == actual).all(axis=1) @ weights / weights.sum(axis=0)
        return same
    drawn = weights.sum(axis=0) > 0
    if name == "mean_average_precision":
        found = _mean_average_precision(probabilities, actual, weights)
    elif name in ("micro_f1", "macro_f1"):
        right, said, there = ((flags.T @ weights) for flags in (predicted & actual, predicted, actual))
        if name == "micro_f1":
            right, said, there = (counts.sum(axis=0, keepdims=True) for counts in (right, said, there))
        both = said + there
        values = np.where(both > 0, 2 * right / np.where(both > 0, both, 1), 0.0)
        found = values.sum(axis=0) / np.maximum((both > 0).sum(axis=0), 1)
    else:
        raise ValueError(f"{name} is no metric of several labels")
    return np.where(drawn, found, np.nan)


def _mean_average_precision(probabilities: Floats, actual: Flags, weights: Floats) -> Floats:
    """The mean over labels that occur; rows with one probability count together."""
    total, occurring = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    for values, holds in zip(probabilities.T, actual.T, strict=True):
        order = np.argsort(-values, kind="stable")
        ends = np.append(np.flatnonzero(np.diff(values[order])), len(order) - 1)
        drawn = weights[order]
        reached = drawn.cumsum(axis=0)[ends]
        right = (drawn * holds[order, None]).cumsum(axis=0)[ends]
        gained = np.diff(right, axis=0, prepend=0.0)
        precision = np.where(reached > 0, right / np.where(reached > 0, reached, 1), 0.0)
        there = right[-1]
        total += np.where(there > 0, (gained * precision).sum(axis=0) / np.where(there > 0, there, 1), 0.0)
        occurring += there > 0
    found: Floats = total / np.maximum(occurring, 1)
    return found
