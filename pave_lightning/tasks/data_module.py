"""The rows of one task as batches, in an order that a resumed or distributed run repeats exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Sampler

from pave_lightning.tasks.data import SPLITS, Split, sample_rows
from pave_lightning.tasks.encoded import EncodedRows
from pave_lightning.tasks.samplers import ExactSampler, TrainingSampler
from pave_lightning.tasks.stand_ins import EvenBatches, WeightedCollate, WeightedRows, is_sharded
from pave_lightning.tasks.task import Batch, Task

STAGE_SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
}


class ResumableLoader(DataLoader[Any]):
    """A loader that Lightning takes for resumable: its sampler already begins where the checkpoint ended."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the trainer's own progress says all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


class TaskDataModule(LightningDataModule):
    """Encoded rows of one task.

    Each split is encoded once, in `prepare_data`, and kept as an Arrow file (see `EncodedRows`); it is read
    memory-mapped, so processes share it. Give ``use_distributed_sampler=False`` to the trainer: the samplers
    here divide the rows themselves, by the world size and rank of the attached trainer (one process where there is
    none, so set ``trainer`` before making loaders by hand). Where its strategy shards the weights, or there
    are fewer rows than processes, batches of validation and test rows hold the weight of each example besides (see
    `stand_ins`).

    What batches hold is the kind of task's own affair, besides ``labels``; see `Task`.

    Args:
        task: the task.
        processor: the base model's tokenizer, or whatever the kind of task encodes rows with.
        seed: of the samples of rows and the order of training batches.
        cache_dir: folder for Arrow copies of the raw and the encoded rows.
        batch_size: rows a batch and process.
        num_workers: worker processes a loader.
        padding: the token that fills up batches, where that is another than the processor's.

    Raises:
        PaveError: the processor cannot be used for this task; later, when a split is read, all that is wrong
            with its data.
    """

    def __init__(
        self,
        task: Task,
        processor: Any,
        *,
        seed: int,
        cache_dir: str | Path,
        batch_size: int,
        num_workers: int = 0,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        # A split with fewer rows than processes leaves some without a batch, which is exact; super sets it to False.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.encoded = EncodedRows(task, processor, seed=seed, cache_dir=cache_dir)
        self.task = task
        self.processor = processor
        self.seed = seed
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.collate = task.collate(processor, padding)
        self.collate_training = task.collate_training(processor, padding)

    def prepare_data(self) -> None:
        """Encode what the trainer's stage needs (all splits without a trainer) unless the files are there already."""
        stage = self.trainer.state.fn if self.trainer is not None else None
        for split in STAGE_SPLITS.get(stage or "", SPLITS):
            self.encoded.file(split)

    def setup(self, stage: str) -> None:
        """Open the files that a stage needs."""
        for split in STAGE_SPLITS.get(stage, SPLITS):
            self.dataset(split)

    def dataset(self, split: Split) -> datasets.Dataset:
        """The encoded rows of a split, see `EncodedRows.dataset`.

        Raises:
            PaveError: the split cannot be read, or a text or label of it cannot be used.
        """
        return self.encoded.dataset(split)

    def labels(self, split: Split) -> torch.Tensor:
        """The labels of a split that are scored, shape ``(n,)``: int64 class indices, or float32 numbers."""
        return torch.from_numpy(self.encoded.labels(split))

    def train_dataloader(self) -> DataLoader[Any]:
        """Random batches of rows of similar length.

        They depend only on seed, epoch and world size; Lightning tells the sampler the epoch. A run that is resumed
        from a checkpoint within an epoch gets the batches that were still to come.
        """
        sampler = self.training_sampler()
        if self.trainer is not None:
            # Told now: worker processes draw the first batches before Lightning sets the epoch.
            sampler.resume(*progress(self.trainer))
        return self._loader(self.dataset("train"), self.batch_size, sampler, ResumableLoader, self.collate_training)

    def training_sampler(self) -> TrainingSampler:
        """The order in which this process trains on the rows."""
        world, rank = self._place()
        lengths = _lengths(self.dataset("train"))
        return TrainingSampler(lengths, batch_size=self.batch_size, seed=self.seed, world=world, rank=rank)

    def val_dataloader(self) -> DataLoader[Any]:
        """Every validation row once over all processes."""
        return self._exact_loader(self.dataset("validation"), self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Every test row once over all processes."""
        return self._exact_loader(self.dataset("test"), self.batch_size)

    def capture_dataloader(self, examples: int, batch_size: int, seed: int) -> DataLoader[Any]:
        """A seeded sample of the rows that the expert is trained on, every one once over all processes.

        Args:
            examples: how many rows; all of them if there are not more.
            batch_size: rows a batch and process.
            seed: of the sample.
        """
        rows = self.dataset("train")
        return self._exact_loader(rows.select(sample_rows(len(rows), examples, seed)), batch_size)

    def random_dataloader(self, examples: int, batch_size: int, seed: int) -> DataLoader[Any]:
        """Examples that are drawn at random without any data, see `Task.random_examples`; no labels.

        Args:
            examples: how many.
            batch_size: rows a batch and process.
            seed: of the draws.
        """
        drawn = self.task.random_examples(self.processor, examples, seed)
        return self._exact_loader(datasets.Dataset.from_dict(drawn), batch_size)

    def _exact_loader(self, rows: datasets.Dataset, batch_size: int) -> DataLoader[Any]:
        world, rank = self._place()
        sampler = ExactSampler(_lengths(rows), world=world, rank=rank)
        # Lightning passes over the whole loop in a process without a batch, and the others would wait for its results.
        waits = self.trainer is not None and (is_sharded(self.trainer) or len(rows) < world)
        if not waits:
            return self._loader(rows, batch_size, sampler)
        return DataLoader(
            WeightedRows(rows.remove_columns("length")),
            batch_sampler=EvenBatches(sampler, batch_size),
            collate_fn=WeightedCollate(self.collate),
            **self._loading(),
        )

    def _loader(
        self,
        rows: datasets.Dataset,
        batch_size: int,
        sampler: Sampler[int],
        kind: type[DataLoader[Any]] = DataLoader,
        collate: Callable[[Sequence[Mapping[str, Any]]], Batch] | None = None,
    ) -> DataLoader[Any]:
        return kind(
            rows.remove_columns("length"),
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collate or self.collate,
            **self._loading(),
        )

    def _loading(self) -> dict[str, Any]:
        """How loaders of all kinds work."""
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # Its own generator: a loader otherwise draws from the global one and so changes the dropout that follows.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _place(self) -> tuple[int, int]:
        if self.trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank


def progress(trainer: Trainer) -> tuple[int, int]:
    """The epoch that comes next or is resumed, and how many of its batches are done."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress
    # processed, not completed: a checkpoint written at the end of a batch still counts that batch as incomplete.
    over = batch.is_last_batch and batch.current.processed == batch.current.ready
    if over or epoch.processed == epoch.started:
        return epoch.started, 0
    return epoch.processed, batch.current.processed


def _lengths(rows: datasets.Dataset) -> npt.NDArray[np.int64]:
    return np.asarray(rows.with_format("numpy")["length"][:], dtype=np.int64)
