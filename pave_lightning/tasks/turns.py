"""Which of several tasks each batch is of, where one model is trained on all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Turns:
    """Which of several tasks each batch is of, where one model is trained on all of them.

    In every epoch each task has as many turns as it has batches, in an order that depends on seed and epoch only, so
    all processes, and a run that is resumed, find the same one.

    Attributes:
        batches: batches of each task in an epoch.
        seed: of the order.
    """

    batches: tuple[int, ...]
    seed: int

    def __len__(self) -> int:
        """Batches of all tasks in an epoch."""
        return sum(self.batches)

    def of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """The index of each batch's task, int64 of shape ``(len(self),)``."""
        return _turns(self.batches, self.seed, epoch)

    def at(self, batch: int) -> int:
        """The index of the task of a batch, counted over all epochs."""
        epoch, place = divmod(batch, len(self))
        return int(self.of_epoch(epoch)[place])


@lru_cache(maxsize=8)
def _turns(batches: tuple[int, ...], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    tasks = np.repeat(np.arange(len(batches), dtype=np.int64), batches)
    return np.random.default_rng([seed, epoch]).permutation(tasks)
