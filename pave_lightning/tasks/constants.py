"""What an answer that needs no training scores on a task."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pave_lightning.tasks.data import Split, load_split
from pave_lightning.tasks.options import MetricName
from pave_lightning.tasks.task import Task


def constant_answer(task: Task, split: Split, *, seed: int, cache_dir: Path) -> dict[str, float]:
    """What always the same answer scores on a split, by metric; see `constant_scores`.

    Args:
        task: the task.
        split: the split.
        seed: of the sample of rows.
        cache_dir: folder in which Arrow copies of local files are kept.

    Raises:
        PaveError: the split cannot be read.
    """
    rows = load_split(task, split, seed=seed, cache_dir=cache_dir)
    return constant_scores(task, torch.from_numpy(task.answers(rows)))


def constant_scores(task: Task, labels: Tensor) -> dict[str, float]:
    """What the best constant answer scores in each metric of a task: always the same class, or the same number.

    It follows from the counts of the classes, so a plan need not load the metrics themselves.

    Args:
        task: its ``metrics`` are used.
        labels: encoded labels of shape ``(n,)``, int64 class indices or floating-point numbers; at least one.
    """
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
