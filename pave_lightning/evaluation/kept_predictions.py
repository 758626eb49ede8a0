"""Gathers what a model predicts, row by row, over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from pave_lightning.tasks.heads import Predictions
from pave_lightning.tasks.predictions import TaskPredictions


class KeptPredictions:
    """The predictions of one model on several tasks, batch by batch.

    Args:
        tasks: how many tasks there are.
    """

    def __init__(self, tasks: int) -> None:
        self._rows: list[list[Tensor]] = [[] for _ in range(tasks)]
        self._values: list[list[Tensor]] = [[] for _ in range(tasks)]
        self._targets: list[list[Tensor]] = [[] for _ in range(tasks)]
        self._unplaced = [False] * tasks

    def add(self, task: int, found: Predictions, rows: Sequence[int]) -> None:
        """Take in one batch.

        Args:
            task: which of the tasks.
            found: the predictions.
            rows: the rows of the batch's examples, counted from 0 in the split.
        """
        values, targets = found.values, found.targets
        if not isinstance(values, Tensor) or not isinstance(targets, Tensor) or values.ndim > 1:
            self._unplaced[task] = True
            return
        if found.examples is None and len(values) != len(rows):
            self._unplaced[task] = True
            return
        placed = torch.tensor(rows, dtype=torch.int64)
        self._rows[task].append(placed if found.examples is None else placed[found.examples.cpu()])
        # On their device until the end: nothing waits for it here.
        self._values[task].append(values.detach())
        self._targets[task].append(targets.detach())

    def gathered(self, trainer: L.Trainer, device: torch.device) -> list[TaskPredictions | None]:
        """The predictions of all processes in the order of rows, by task; every process has to call this.

        Args:
            trainer: says how many processes there are.
            device: on which they talk.

        Returns:
            None for a task that does not say of which example each of its predictions is.
        """
        floating = [any(values.is_floating_point() for values in found) for found in self._values]
        told = torch.tensor([floating, self._unplaced], dtype=torch.int64, device=device)
        floats, unplaced = trainer.strategy.reduce(told, reduce_op="sum").tolist()
        found = [self._packed(task) for task in range(len(floats))]
        if trainer.world_size > 1:
            found = [torch.cat(gather_all_tensors(packed.to(device))).cpu() for packed in found]
        return [
            None if without else _unpacked(packed, floating=bool(numbers))
            for packed, numbers, without in zip(found, floats, unplaced, strict=True)
        ]

    def _packed(self, task: int) -> Tensor:
        """Row, prediction and target, int64 of shape ``(n, 3)``; numbers as the bits of a float64."""
        if not self._rows[task]:
            return torch.zeros(0, 3, dtype=torch.int64)
        numbers = [_bits(torch.cat(parts)) for parts in (self._values[task], self._targets[task])]
        return torch.stack([torch.cat(self._rows[task]), *numbers], dim=1)


def _bits(values: Tensor) -> Tensor:
    """Numbers as float64 in int64: one kind of tensor for all tasks, which every device can send."""
    return values.cpu().double().view(torch.int64)


def _unpacked(packed: Tensor, *, floating: bool) -> TaskPredictions:
    rows = packed[:, 0].numpy().copy()
    values, targets = (packed[:, place].contiguous().view(torch.float64).numpy() for place in (1, 2))
    if floating:
        return TaskPredictions.ordered(rows, values, targets)
    return TaskPredictions.ordered(rows, values.astype(np.int64), targets.astype(np.int64))
