"""What an answer that needs no training scores on a task."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pave_lightning.tasks.data import Split
from pave_lightning.tasks.encoded import EncodedRows
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
    """What the best constant answer scores in each metric of a task, see `Task.constant_score`.

    It follows from the labels, so a plan need not load the metrics themselves.

    Args:
        task: its ``metrics`` are used.
        labels: those that scores count, see `Task.scored_labels`.

    Returns:
        A score for each metric; NaN where there are no labels.
    """
    if not len(labels):
        return dict.fromkeys(task.metrics, math.nan)
    return {name: task.constant_score(name, labels) for name in task.metrics}
