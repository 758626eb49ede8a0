"""What answers that are always the same score, by the counts of labels."""

from __future__ import annotations

import torch
from torch import Tensor

from pave_lightning.tasks.options import MetricName


def constant_class(name: MetricName, labels: Tensor) -> float:
    """What the best of all constant classes, or numbers, scores.

    Args:
        name: a metric of classes or of numbers.
        labels: shape ``(n,)``, int64 class indices or floating-point numbers; n is at least 1.

    Raises:
        ValueError: it is a metric of something else.
    """
    match name:
        case "accuracy":
            return int(labels.bincount().max()) / len(labels)
        case "macro_f1":
            counts = labels.bincount()
            return constant_f1(int(counts.max()), len(labels)) / int((counts > 0).sum())
        case "f1":
            return constant_f1(int((labels == 1).sum()), len(labels))
        case "matthews" | "pearson" | "spearman":
            return 0.0
    raise ValueError(f"{name} is no metric of single classes or numbers")


def constant_f1(right: int, rows: int) -> float:
    """F1 of a class that is answered in every row, and right in some."""
    return 2 * right / (rows + right)


def constant_labels(name: MetricName, labels: Tensor) -> float:
    """What the best set of classes scores that is predicted for every row.

    Args:
        name: a metric of several labels.
        labels: whether each class holds, 0 or 1, shape ``(n, classes)``; n is at least 1.

    Raises:
        ValueError: it is a metric of something else.
    """
    rows, counts = len(labels), labels.sum(dim=0).sort(descending=True).values.double()
    occurring = counts[counts > 0]
    match name:
        case "micro_f1":
            # For each number of classes, the most frequent ones.
            sizes = torch.arange(1, len(counts) + 1)
            return float((2 * counts.cumsum(0) / (rows * sizes + counts.sum())).max())
        case "macro_f1":
            return float((2 * occurring / (rows + occurring)).mean()) if len(occurring) else 0.0
        case "exact_match":
            return int(torch.unique(labels, dim=0, return_counts=True)[1].max()) / rows
        case "mean_average_precision":
            return float((occurring / rows).mean()) if len(occurring) else 0.0
    raise ValueError(f"{name} is no metric of several labels")
