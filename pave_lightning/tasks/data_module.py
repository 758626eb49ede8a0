"""The rows of one task as batches of tokens, in an order that a resumed or distributed run repeats exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from pave_lightning.recipe.schema import Task
from pave_lightning.tasks.data import SPLITS, Split, sample_rows
from pave_lightning.tasks.labels import encode_labels
from pave_lightning.tasks.padding import PaddedBatches
from pave_lightning.tasks.samplers import ExactSampler, TrainingSampler
from pave_lightning.tasks.tokenised import TokenisedRows

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
    """Tokenised rows of one task.

    Each split is tokenised once, in `prepare_data`, and kept as an Arrow file (see `TokenisedRows`); it is read
    memory-mapped, so processes share it. Give ``use_distributed_sampler=False`` to the trainer: the samplers
    here divide the rows themselves, by the world size and rank of the attached trainer (one process where there is
    none, so set ``trainer`` before making loaders by hand).

    Batches hold ``input_ids``, ``attention_mask`` and, where the tokenizer gives them, ``token_type_ids``, int64 of
    shape ``(n, longest row of the batch)``, and ``labels`` of shape ``(n,)``, int64 class indices or float32 numbers.

    Args:
        task: the task.
        tokenizer: the base model's tokenizer; it needs a padding token.
        seed: of the samples of rows and the order of training batches.
        cache_dir: folder for Arrow copies of the raw and the tokenised rows.
        batch_size: rows a batch and process.
        max_length: longest sequence in tokens; longer texts are cut, of a pair the longer text first.
        num_workers: worker processes a loader.
        padding: the token that fills up batches, where that is another than the tokenizer's.

    Raises:
        PaveError: the tokenizer has no padding token; later, when a split is read, all that is wrong with its data.
    """

    # A split with fewer rows than processes leaves some of them without a batch, which is exact and harmless.
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        cache_dir: str | Path,
        batch_size: int,
        max_length: int,
        num_workers: int = 0,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        self.tokenised = TokenisedRows(task, tokenizer, seed=seed, cache_dir=cache_dir, max_length=max_length)
        self.task = task
        self.tokenizer = tokenizer
        self.seed = seed
        self.batch_size = batch_size
        self.max_length = max_length
        self.num_workers = num_workers
        self.collate = PaddedBatches(tokenizer, padding)

    def prepare_data(self) -> None:
        """Tokenise what the trainer's stage needs (all splits without a trainer) unless the files are there already."""
        stage = self.trainer.state.fn if self.trainer is not None else None
        for split in STAGE_SPLITS.get(stage or "", SPLITS):
            self.tokenised.file(split)

    def setup(self, stage: str) -> None:
        """Open the files that a stage needs."""
        for split in STAGE_SPLITS.get(stage, SPLITS):
            self.dataset(split)

    def dataset(self, split: Split) -> datasets.Dataset:
        """The tokenised rows of a split, see `TokenisedRows.dataset`.

        Raises:
            PaveError: the split cannot be read, or a text or label of it cannot be used.
        """
        return self.tokenised.dataset(split)

    def labels(self, split: Split) -> torch.Tensor:
        """The encoded labels of a split, shape ``(n,)``: int64 class indices, or float32 numbers."""
        return torch.from_numpy(encode_labels(self.task, self.dataset(split)["labels"][:]))

    def train_dataloader(self) -> DataLoader[Any]:
        """Random batches of rows of similar length.

        They depend only on seed, epoch and world size; Lightning tells the sampler the epoch. A run that is resumed
        from a checkpoint within an epoch gets the batches that were still to come.
        """
        rows = self.dataset("train")
        world, rank = self._place()
        sampler = TrainingSampler(_lengths(rows), batch_size=self.batch_size, seed=self.seed, world=world, rank=rank)
        if self.trainer is not None:
            # Told now: worker processes draw the first batches before Lightning sets the epoch.
            sampler.resume(*_progress(self.trainer))
        return self._loader(rows, self.batch_size, sampler, ResumableLoader)

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

    def random_token_dataloader(self, examples: int, batch_size: int, seed: int) -> DataLoader[Any]:
        """Sequences of tokens drawn uniformly from the vocabulary, within the special tokens of a real one; no labels.

        Args:
            examples: how many; their lengths are drawn uniformly from one token up to the longest that fits.
            batch_size: rows a batch and process.
            seed: of the draws.
        """
        drawn = np.random.default_rng(seed)
        special = set(self.tokenizer.all_special_ids)
        words = np.asarray([index for index in range(len(self.tokenizer)) if index not in special])
        framed = self.tokenizer("a", return_special_tokens_mask=True)
        places = [place for place, is_special in enumerate(framed["special_tokens_mask"]) if not is_special]
        before, after = framed["input_ids"][: places[0]], framed["input_ids"][places[-1] + 1 :]
        longest = self.max_length - len(before) - len(after)
        rows = [
            [*before, *drawn.choice(words, size=drawn.integers(1, longest, endpoint=True)).tolist(), *after]
            for _ in range(examples)
        ]
        table = {
            "input_ids": rows,
            "attention_mask": [[1] * len(row) for row in rows],
            "length": [len(row) for row in rows],
        }
        return self._exact_loader(datasets.Dataset.from_dict(table), batch_size)

    def _exact_loader(self, rows: datasets.Dataset, batch_size: int) -> DataLoader[Any]:
        world, rank = self._place()
        return self._loader(rows, batch_size, ExactSampler(_lengths(rows), world=world, rank=rank))

    def _loader(
        self, rows: datasets.Dataset, batch_size: int, sampler: Sampler[int], kind: type[DataLoader[Any]] = DataLoader
    ) -> DataLoader[Any]:
        return kind(
            rows.remove_columns("length"),
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: a loader otherwise draws from the global one and so changes the dropout that follows.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _place(self) -> tuple[int, int]:
        if self.trainer is None:
            return 1, 0
        return self.trainer.world_size, self.trainer.global_rank


def _progress(trainer: Trainer) -> tuple[int, int]:
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
