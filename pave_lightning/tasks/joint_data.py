"""The rows of several tasks as the batches that one model is trained on, each of one task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from pave_lightning.tasks.data_module import ResumableLoader, TaskDataModule, progress
from pave_lightning.tasks.samplers import JointSampler, TaskRows
from pave_lightning.tasks.task import Batch
from pave_lightning.tasks.turns import Turns


class TaskBatch(NamedTuple):
    """A batch that says whose it is: the index of its task, and what its model is given."""

    task: int
    batch: Batch


class JointDataModule(LightningDataModule):
    """Training batches of several tasks in turns, and a validation loader for each task.

    A task's batches are those that it is trained on alone, in the same order.

    Args:
        modules: the tasks' data.
        turns: whose training batch is next.
    """

    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(self, modules: Sequence[TaskDataModule], turns: Turns) -> None:
        super().__init__()
        self.modules, self.turns = list(modules), turns

    def prepare_data(self) -> None:
        """Encode what the trainer's stage needs unless the files are there already."""
        for module in self._attached():
            module.prepare_data()

    def setup(self, stage: str) -> None:
        """Open the files that a stage needs."""
        for module in self.modules:
            module.setup(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of all tasks, each a `TaskBatch`; a resumed run gets those that were still to come."""
        modules = self._attached()
        sampler = JointSampler([module.training_sampler() for module in modules], self.turns)
        if self.trainer is not None:
            sampler.resume(*progress(self.trainer))
        return ResumableLoader(
            _JointRows(modules),
            batch_size=None,  # the sampler gives whole batches
            sampler=sampler,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.turns.seed),
        )

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The tasks' loaders, every validation row once over all processes."""
        return [module.val_dataloader() for module in self._attached()]

    def _attached(self) -> list[TaskDataModule]:
        for module in self.modules:
            module.trainer = self.trainer
        return self.modules


class _JointRows(Dataset[TaskBatch]):
    """The training rows of several tasks; what is looked up is a whole batch."""

    def __init__(self, modules: Sequence[TaskDataModule]) -> None:
        self._collates = [module.collate for module in modules]
        self._rows: list[Any] = [module.dataset("train").remove_columns("length") for module in modules]

    def __getitem__(self, wanted: TaskRows) -> TaskBatch:
        rows: list[Mapping[str, Any]] = self._rows[wanted.task].__getitems__(wanted.rows)
        return TaskBatch(wanted.task, self._collates[wanted.task](rows))
