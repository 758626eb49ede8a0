"""Batches of weight 0: with them all processes run equally many forward passes, and still no row is counted twice.

Strategies that divide the weights gather them in every forward pass, so a process that has run out of rows must go on
for as long as the others do. Nor may a process have no batch at all: Lightning would leave its results out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader, Dataset, Sampler

from pave_lightning.tasks.samplers import ExactSampler
from pave_lightning.tasks.task import Batch

# The key of batches under which the weight of each example stands, float32 of shape (n,): 0 for stand-ins.
WEIGHT = "example_weight"

Collate = Callable[[Sequence[Mapping[str, Any]]], Batch]


def is_sharded(trainer: L.Trainer) -> bool:
    """Whether a trainer's processes hold parts of the weights each, and so wait for each other in forward passes."""
    return isinstance(getattr(trainer, "strategy", None), (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy))


def split_weight(batch: Batch) -> tuple[Batch, bool]:
    """A batch without the weights of its examples, and whether it counts.

    Example:
        >>> split_weight({"labels": torch.ones(1), "example_weight": torch.zeros(1)})
        ({'labels': tensor([1.])}, False)
    """
    if WEIGHT not in batch:
        return batch, True
    rest = {name: value for name, value in batch.items() if name != WEIGHT}
    return rest, bool(batch[WEIGHT].any())


def rows_in_order(loader: DataLoader[Any]) -> list[int]:
    """The rows that a process's exact loader gives, in their order, without stand-ins."""
    batches = loader.batch_sampler
    sampler = batches.sampler if isinstance(batches, EvenBatches) else loader.sampler
    if not isinstance(sampler, ExactSampler):
        raise TypeError(f"expected a loader with an ExactSampler, found {type(sampler).__name__}")
    return sampler.rows


class EvenBatches(Sampler[list[int]]):
    """The batches of a process, and behind them as many stand-ins as it has fewer batches than others.

    A stand-in is a batch of one row, the shortest of all, which is given as ``-1 - row``.

    Args:
        sampler: the process's rows.
        batch_size: rows a batch.

    Attributes:
        stand_ins: how many batches stand in.

    Example:
        >>> list(EvenBatches(ExactSampler([5, 4, 3], world=2, rank=1), batch_size=1))
        [[1], [-3]]
    """

    def __init__(self, sampler: ExactSampler, batch_size: int) -> None:
        self.sampler, self.batch_size = sampler, batch_size
        self.stand_ins = math.ceil(sampler.most / batch_size) - math.ceil(len(sampler) / batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.sampler.rows
        yield from (rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size))
        for _ in range(self.stand_ins):
            yield [-1 - self.sampler.shortest]

    def __len__(self) -> int:
        return math.ceil(self.sampler.most / self.batch_size)


class WeightedRows(Dataset[Any]):
    """Rows with the weight of each; a stand-in is asked for as ``-1 - row``.

    Args:
        rows: a dataset whose rows are mappings.
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        found = self._rows.__getitems__([-1 - place if place < 0 else place for place in places])
        return [{**row, WEIGHT: float(place >= 0)} for row, place in zip(found, places, strict=True)]

    def __getitem__(self, place: int) -> dict[str, Any]:
        (row,) = self.__getitems__([place])
        return row

    def __len__(self) -> int:
        return len(self._rows)


class WeightedCollate:
    """Makes batches of `WeightedRows`.

    Args:
        collate: makes them of the rows alone.
    """

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch of the rows, with their weights."""
        plain = [{name: value for name, value in row.items() if name != WEIGHT} for row in rows]
        return {**self._collate(plain), WEIGHT: torch.tensor([row[WEIGHT] for row in rows])}
