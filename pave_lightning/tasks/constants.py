"""What an answer that needs no training scores on a task."""

from __future__ import annotations

from pathlib import Path

import torch

from pave_lightning.recipe import Task
from pave_lightning.tasks.data import Split, load_split
from pave_lightning.tasks.data_module import encode_labels
from pave_lightning.tasks.metrics import constant_scores


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
    return constant_scores(task, torch.from_numpy(encode_labels(task, rows[task.label][:])))
