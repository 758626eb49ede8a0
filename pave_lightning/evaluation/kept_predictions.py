"""Gathers what a model predicts, row by row, over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from pave_lightning.tasks.coded_texts import coded_lists, coded_texts, decoded_lists, decoded_texts
from pave_lightning.tasks.heads import Predictions
from pave_lightning.tasks.predictions import TaskPredictions, as_objects


class KeptPredictions:
    """The predictions of one model on several tasks, batch by batch.

    Args:
        tasks: how many tasks there are.
        means: for each task the metrics of which rows' scores are kept instead, see `Task.mean_metrics`.
    """

    def __init__(self, tasks: int, means: Sequence[Sequence[str]] = ()) -> None:
        self._means = [tuple(names) for names in means] or [()] * tasks
        self._rows: list[list[Tensor]] = [[] for _ in range(tasks)]
        self._values: list[list[Tensor]] = [[] for _ in range(tasks)]
        self._targets: list[list[Tensor]] = [[] for _ in range(tasks)]
        self._texts: list[list[tuple[int, str, list[str]]]] = [[] for _ in range(tasks)]
        self._unplaced = [False] * tasks

    def add(self, task: int, found: Predictions, rows: Sequence[int], scores: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            task: which of the tasks.
            found: the predictions; of several numbers for an example each is kept.
            rows: the rows of the batch's examples, counted from 0 in the split.
            scores: what each example adds to the metrics of ``means``, shape ``(n, metrics)``, where the task has any.
        """
        values, targets, owners = found.values, found.targets, found.examples
        if scores is not None:
            values, targets, owners = scores, torch.ones_like(scores), None
        elif not isinstance(values, Tensor) and isinstance(targets, Sequence) and len(values) == len(rows):
            told = zip(rows, values, targets, strict=True)
            self._texts[task] += [(row, text, list(right)) for row, text, right in told]
            return
        if (
            not isinstance(values, Tensor)
            or not isinstance(targets, Tensor)
            or (owners is None and len(values) != len(rows))
        ):
            self._unplaced[task] = True
            return
        placed = torch.tensor(rows, dtype=torch.int64)
        placed = placed if owners is None else placed[owners.cpu()]
        self._rows[task].append(placed.repeat_interleave(values[0].numel()) if len(values) else placed)
        # On their device until the end: nothing waits for it here.
        self._values[task].append(values.detach().flatten())
        self._targets[task].append(targets.detach().flatten())

    def gathered(self, trainer: L.Trainer, device: torch.device) -> list[TaskPredictions | None]:
        """The predictions of all processes in the order of rows, by task; every process has to call this.

        Args:
            trainer: says how many processes there are.
            device: on which they talk.

        Returns:
            None for a task that does not say of which example each of its predictions is.
        """
        floating = [any(values.is_floating_point() for values in found) for found in self._values]
        written = [bool(texts) for texts in self._texts]
        told = torch.tensor([floating, written, self._unplaced], dtype=torch.int64, device=device)
        floats, in_texts, unplaced = trainer.strategy.reduce(told, reduce_op="sum").tolist()
        found: list[TaskPredictions | None] = []
        for task, (numbers, texts, without) in enumerate(zip(floats, in_texts, unplaced, strict=True)):
            if texts:
                parts = _gathered(trainer, device, *_coded(self._texts[task]))
                found.append(None if without else _decoded(parts))
            else:
                (packed,) = zip(*_gathered(trainer, device, self._packed(task)), strict=True)
                unpacked = None if without else _unpacked(torch.cat(packed), self._means[task], floating=bool(numbers))
                found.append(unpacked)
        return found

    def _packed(self, task: int) -> Tensor:
        """Row, prediction and target, int64 of shape ``(n, 3)``; numbers as the bits of a float64."""
        if not self._rows[task]:
            return torch.zeros(0, 3, dtype=torch.int64)
        numbers = [_bits(torch.cat(parts)) for parts in (self._values[task], self._targets[task])]
        return torch.stack([torch.cat(self._rows[task]), *numbers], dim=1)


def _gathered(trainer: L.Trainer, device: torch.device, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors of each process, on the CPU."""
    if trainer.world_size == 1:
        return [tensors]
    each = [gather_all_tensors(tensor.to(device)) for tensor in tensors]
    return [tuple(tensor.cpu() for tensor in own) for own in zip(*each, strict=True)]


def _coded(told: Sequence[tuple[int, str, list[str]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, texts and the right ones as numbers, which every device can send."""
    rows = torch.tensor([row for row, _, _ in told], dtype=torch.int64)
    return rows, coded_texts([text for _, text, _ in told]), coded_lists([right for _, _, right in told])


def _decoded(parts: Sequence[tuple[Tensor, ...]]) -> TaskPredictions:
    rows = torch.cat([rows for rows, _, _ in parts]).numpy()
    texts = [text for _, codes, _ in parts for text in decoded_texts(codes)]
    # Those that fill up shorter lists are the first ones again.
    right = [tuple(dict.fromkeys(own)) for _, _, codes in parts for own in decoded_lists(codes)]
    return TaskPredictions.ordered(rows, as_objects(texts), as_objects(right))


def _bits(values: Tensor) -> Tensor:
    """Numbers as float64 in int64: one kind of tensor for all tasks, which every device can send."""
    return values.cpu().double().view(torch.int64)


def _unpacked(packed: Tensor, means: Sequence[str], *, floating: bool) -> TaskPredictions:
    rows = packed[:, 0].numpy().copy()
    values, targets = (packed[:, place].contiguous().view(torch.float64).numpy() for place in (1, 2))
    if floating:
        return TaskPredictions.ordered(rows, values, targets, means)
    return TaskPredictions.ordered(rows, values.astype(np.int64), targets.astype(np.int64))
