"""What an answer that needs no training scores on a task."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pave_lightning.tasks.data import Split
from pave_lightning.tasks.encoded import EncodedRows
from pave_lightning.tasks.options import MetricName
from pave_lightning.tasks.task import Task


def constant_answer(rows: EncodedRows, split: Split) -> dict[str, float]:
    """What always the same answer scores on a split, by metric; see `constant_scores`.

    Args:
        rows: the rows of a task, as its model is given them: what is cut off of them is not scored.
        split: the split.

    Raises:
        PaveError: the split cannot be read.
    """
    return constant_scores(rows.task, torch.from_numpy(rows.labels(split)))


def constant_scores(task: Task, labels: Tensor) -> dict[str, float]:
    """What the best constant answer scores in each metric of a task: always the same class, or the same number.

    It follows from the counts of the classes, so a plan need not load the metrics themselves.

    Args:
        task: its ``metrics`` are used.
        labels: encoded labels of shape ``(n,)``, int64 class indices or floating-point numbers.

    Returns:
        A score for each metric; NaN where there are no labels.
    """
    if not len(labels):
        return dict.fromkeys(task.metrics, math.nan)
    return {name: _constant_score(name, labels) for name in task.metrics}


def _constant_score(name: MetricName, labels: Tensor) -> float:
    match name:
        case "accuracy":
            return int(labels.bincount().max()) / len(labels)
        case "macro_f1":
            counts = labels.bincount()
            return _f1(int(counts.max()), len(labels)) / int((counts > 0).sum())
        case "f1":
            return _f1(int((labels == 1).sum()), len(labels))
        case "matthews" | "pearson" | "spearman":
            return 0.0


def _f1(right: int, rows: int) -> float:
    """F1 of a class that is answered in every row, and right in some."""
    return 2 * right / (rows + right)
