"""Purified weights on disk, so that many merge methods can share them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.purification.vectors import PurifiedTaskVectors
from pave_lightning.system.process_groups import ALONE, ProcessGroup
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
def write_purified(vectors: PurifiedTaskVectors, folder: Path, group: ProcessGroup = ALONE) -> None:
    """Compute every purified weight once and write it to ``folder/TASK``, so that many methods can merge it.

    Args:
        vectors: the purified task vectors.
        folder: an existing folder.
        group: the processes that share the work, each with its own layers and files.

    Raises:
        PaveError: no layer of any task could be purified.
    """
    writers: dict[str, ShardWriter] = {}
    for task, parameter, weight in vectors.purified(group):
        if any((task, matrix.name) in vectors.ranks for matrix in parameter.matrices):
            if task not in writers:
                writers[task] = _writer(folder / task, group)
            writers[task].add(parameter.name, weight)
    purified = dict.fromkeys(task for task, _ in vectors.ranks)
    if not purified:
        raise PaveError("no layer of any task has a captured subspace, so there is nothing to purify")
    for task in purified:
        (writers[task] if task in writers else _writer(folder / task, group)).close()
    for (task, layer), reason in vectors.untouched.items():
        log.warning("task '%s': %s is left as it is: %s", task, layer, reason)


def _writer(folder: Path, group: ProcessGroup) -> ShardWriter:
    folder.mkdir(parents=True, exist_ok=group.size > 1)
    return ShardWriter(folder, SMALL_SHARD_BYTES, group=group)
