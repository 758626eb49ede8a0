"""The rows of one task as its model is given them, kept in files named after everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pave_lightning.errors import PaveError, naming
from pave_lightning.tasks.copies import kept_copy, read_copy
from pave_lightning.tasks.data import Split, changing, load_rows, split_fingerprint, split_title
from pave_lightning.tasks.task import Task

if TYPE_CHECKING:
    import datasets

# Raise it when the files change their form, so that older ones are not read.
CACHE_FORMAT = 2


class EncodedRows:
    """Encoded rows of one task, made when they are first asked for and read memory-mapped from then on.

    Args:
        task: the task.
        processor: the base model's tokenizer, or whatever the kind of task encodes rows with.
        seed: of the samples of rows.
        cache_dir: folder for Arrow copies of the raw and the encoded rows.

    Raises:
        PaveError: the processor cannot be used for this task; later, when a split is read, all that is wrong
            with its data.
    """

    def __init__(self, task: Task, processor: Any, *, seed: int, cache_dir: str | Path) -> None:
        if problem := task.processor_problem(processor):
            raise PaveError(f"task '{task.name}': {problem}")
        self.task = task
        self.processor = processor
        self.seed = seed
        self.cache_dir = Path(cache_dir)
        self._datasets: dict[Split, datasets.Dataset] = {}

    def dataset(self, split: Split) -> datasets.Dataset:
        """The encoded rows of a split with their labels and ``length``; made now if they are not there.

        Raises:
            PaveError: the split cannot be read, or a text or label of it cannot be used.
        """
        import datasets

        if split not in self._datasets:
            self._datasets[split] = datasets.Dataset.from_file(str(self.file(split)))
        return self._datasets[split]

    def table(self, split: Split) -> pa.Table:
        """As `dataset`, as an Arrow table, for which `datasets` is not loaded."""
        return read_copy(self.file(split))

    def labels(self, split: Split) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]:
        """The labels that scores count, see `Task.scored_labels`.

        Raises:
            PaveError: as `dataset`.
        """
        return self.task.scored_labels(self.table(split))

    def remarks(self, split: Split) -> list[str]:
        """What is worth saying of a split's encoded rows although it is no mistake: a vocabulary that hardly fits.

        Raises:
            PaveError: as `dataset`.
        """
        places = load_rows(self.task, split, seed=self.seed, cache_dir=self.cache_dir).places
        _, remarks = self.task.findings(self.table(split), self.processor, places)
        return [f"{split_title(self.task, split)}: {remark}" for remark in remarks]

    def file(self, split: Split) -> Path:
        """The Arrow file of a split; made now if it is not there."""
        fingerprint = split_fingerprint(self.task, split)
        stem = f"{self.task.name}-{split}-{self._digest(split, fingerprint)[:32]}"
        return kept_copy(self.cache_dir / "encoded", stem, lambda path: self._make(split, path, fingerprint))

    def _make(self, split: Split, path: Path, fingerprint: str) -> None:
        loaded = load_rows(self.task, split, seed=self.seed, cache_dir=self.cache_dir)
        if loaded.fingerprint != fingerprint:
            raise changing(self.task, split)
        batches = self._encoded(loaded.table.select(list(self.task.columns)))
        first = next(batches)
        with pa.ipc.new_stream(path, first.schema) as stream:
            for batch in chain([first], batches):
                stream.write_table(batch.cast(first.schema))
        # Files that rows name are read again here.
        if self.task.names_files and split_fingerprint(self.task, split) != fingerprint:
            raise changing(self.task, split)
        problems, _ = self.task.findings(read_copy(path), self.processor, loaded.places)
        if problems:
            raise PaveError("\n".join(f"{split_title(self.task, split)}: {problem}" for problem in problems))

    def _encoded(self, rows: pa.Table) -> Iterator[pa.Table]:
        types = self.task.stored_types
        size = self.task.encoded_at_once
        for start in range(0, len(rows), size):
            columns = self._encode(rows.slice(start, size).to_pydict())
            yield pa.table({name: _column(values, types.get(name)) for name, values in columns.items()})

    def _encode(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        with naming(f"task '{self.task.name}'"):
            return self.task.encode(batch, self.processor)

    @cached_property
    def _processor_fingerprint(self) -> str:
        return self.task.processor_fingerprint(self.processor)

    def _digest(self, split: Split, fingerprint: str) -> str:
        parts = {
            "format": CACHE_FORMAT,
            "data": fingerprint,
            "shown": self.task.shown_by,
            "labelled": self.task.labelled_by,
            "examples": getattr(self.task.examples, split),
            "seed": self.seed,
            "processor": self._processor_fingerprint,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _column(values: Any, kind: pa.DataType | None) -> pa.Array:
    """Entries of rows, which may be the rows of an array with more axes."""
    return pa.array(list(values) if isinstance(values, np.ndarray) and values.ndim > 1 else values, kind)
