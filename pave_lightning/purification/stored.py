"""Purified weights on disk, so that many merge methods can share them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.purification.vectors import PurifiedTaskVectors
from pave_lightning.weights import Checkpoint, DerivedTaskVectors, Parameter, ShardWriter, TaskVectors
from pave_lightning.weights.memory import freed_memory_returned
from pave_lightning.weights.writing import SMALL_SHARD_BYTES

log = logging.getLogger("pave_lightning")


class StoredPurification(DerivedTaskVectors):
    """Purified task vectors that were computed before: plain ones, with the purified weights laid over them.

    Args:
        source: plain task vectors.
        purified: each purified task's weights, as `write_purified` left them.
    """

    def __init__(self, source: TaskVectors, purified: Mapping[str, Checkpoint]) -> None:
        super().__init__(source)
        self._purified = dict(purified)

    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The purified fine-tuned tensor (float32)."""
        if task in self._purified and parameter.name in self._purified[task].backbone:
            return self._purified[task].tensor(parameter.name, rows)
        return self.source.expert(task, parameter, rows)


@freed_memory_returned()
def write_purified(vectors: PurifiedTaskVectors, folder: Path) -> None:
    """Compute every purified weight once and write it to ``folder/TASK``, so that many methods can merge it.

    Raises:
        PaveError: no layer of any task could be purified.
    """
    writers: dict[str, ShardWriter] = {}
    for task, parameter, weight in vectors.purified():
        if any((task, matrix.name) in vectors.ranks for matrix in parameter.matrices):
            if task not in writers:
                (folder / task).mkdir(parents=True)
                writers[task] = ShardWriter(folder / task, SMALL_SHARD_BYTES)
            writers[task].add(parameter.name, weight)
    if not writers:
        raise PaveError("no layer of any task has a captured subspace, so there is nothing to purify")
    for writer in writers.values():
        writer.close()
    for (task, layer), reason in vectors.untouched.items():
        log.warning("task '%s': %s is left as it is: %s", task, layer, reason)
