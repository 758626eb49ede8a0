"""Orders of rows that several processes share: exact for evaluation, repeatable for training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import DistributedLengthGroupedSampler

from pave_lightning.tasks.turns import Turns


class ExactSampler(Sampler[int]):
    """Every row once over all processes, longest rows first so that a batch needs little padding.

    Nothing is padded or repeated, so sums over processes equal those of one process; in exchange some processes may
    have one row, and so one batch, less than others. Strategies that gather weights in every forward pass would wait
    for the missing batch: `EvenBatches` adds one of weight 0 there.

    Args:
        lengths: length in tokens of each row.
        world: number of processes.
        rank: index of this process.

    Attributes:
        rows: the rows of this process, in order.
        most: how many rows the process has that has most.
        shortest: one of the shortest of all rows; 0 where there are none.
    """

    def __init__(self, lengths: npt.ArrayLike, *, world: int = 1, rank: int = 0) -> None:
        # Stable: rows of one length stay in their order on every platform.
        order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
        self.rows: list[int] = order[rank::world].tolist()
        self.most = len(order[::world])
        self.shortest = int(order[-1]) if len(order) else 0

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class TrainingSampler(Sampler[int]):
    """All rows in an order that depends on seed and epoch only, with rows of similar length in one batch.

    Where the rows do not divide evenly over the processes, some of the first ones are drawn twice.

    Args:
        lengths: length in tokens of each row.
        batch_size: rows a batch and process.
        seed: of the order.
        world: number of processes.
        rank: index of this process.
    """

    def __init__(self, lengths: npt.ArrayLike, *, batch_size: int, seed: int, world: int = 1, rank: int = 0) -> None:
        self.batch_size = batch_size
        self._order = DistributedLengthGroupedSampler(
            # The batches of all processes together are one slice of the order.
            batch_size * world,
            num_replicas=world,
            rank=rank,
            seed=seed,
            lengths=np.asarray(lengths, dtype=np.int64).tolist(),
        )
        self._resumed_epoch = -1
        self._batches_done = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; Lightning calls this before every epoch."""
        self._order.set_epoch(epoch)

    def resume(self, epoch: int, batches_done: int) -> None:
        """Begin in an epoch of which some batches were trained on already; later epochs are whole again."""
        self.set_epoch(epoch)
        self._resumed_epoch, self._batches_done = epoch, batches_done

    def __iter__(self) -> Iterator[int]:
        done = self._batches_done if self._order.epoch == self._resumed_epoch else 0
        return iter(list(self._order)[done * self.batch_size :])

    def __len__(self) -> int:
        return len(self._order)


class TaskRows(NamedTuple):
    """The rows of one batch: the index of their task, and which of its rows they are."""

    task: int
    rows: list[int]


class JointSampler(Sampler[TaskRows]):
    """Whole batches of several tasks, each of one task, whose batches come in the order of its own sampler.

    Args:
        samplers: the order of each task's rows in this process.
        turns: whose batch is next; no task has more turns than its sampler has batches.
    """

    def __init__(self, samplers: Sequence[TrainingSampler], turns: Turns) -> None:
        self.samplers, self.turns = list(samplers), turns
        self._epoch = 0
        self._resumed_epoch = -1
        self._batches_done = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; Lightning calls this before every epoch."""
        self._epoch = epoch
        for sampler in self.samplers:
            sampler.set_epoch(epoch)

    def resume(self, epoch: int, batches_done: int) -> None:
        """Begin in an epoch of which some batches were trained on already; later epochs are whole again."""
        self.set_epoch(epoch)
        self._resumed_epoch, self._batches_done = epoch, batches_done

    def __iter__(self) -> Iterator[TaskRows]:
        orders = [list(sampler) for sampler in self.samplers]
        left = [iter(range(0, len(order), one.batch_size)) for order, one in zip(orders, self.samplers, strict=True)]
        done = self._batches_done if self._epoch == self._resumed_epoch else 0
        for place, task in enumerate(self.turns.of_epoch(self._epoch).tolist()):
            first = next(left[task])
            if place >= done:
                yield TaskRows(task, orders[task][first : first + self.samplers[task].batch_size])

    def __len__(self) -> int:
        return len(self.turns)
