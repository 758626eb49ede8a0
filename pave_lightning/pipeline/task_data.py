"""The tasks' data as their experts read it: for scores, for capture, and without labels for merge methods."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pave_lightning.callbacks.options import Capture
from pave_lightning.evaluation import SuiteData
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.stages.align import expert_folder
from pave_lightning.pipeline.stages.fit import own_folders
from pave_lightning.tasks.data_module import TaskDataModule
from pave_lightning.tasks.task import Task
from pave_lightning.weights.empty_models import read_config


def data_module(context: Context, task: Task, batch_size: int, *, own: bool = False) -> TaskDataModule:
    """A task's data, as merged models read it.

    Args:
        context: the recipe, and what is loaded of it.
        task: the task, or a copy with other rows.
        batch_size: rows of a batch.
        own: as the task's expert reads it by itself, with its own tokens where those of merged models are others.
    """
    folder = own_folders(context.results)[task.name] if own else expert_folder(context.results, task.name)
    processor = task.load_processor(folder, context.base_folder)
    return TaskDataModule(
        task,
        processor,
        seed=context.recipe.seed,
        cache_dir=context.folder.data,
        batch_size=batch_size,
        padding=task.padding(read_config(folder), processor),
    )


def shown_batches(context: Context, task: Task, examples: int) -> list[dict[str, Tensor]]:
    """Batches of a seeded sample of the rows that a task's expert was trained on."""
    size = context.recipe.capture.batch_size
    return list(data_module(context, task, size).capture_dataloader(examples, size, context.recipe.seed))


class CaptureData(SuiteData):
    """A seeded sample of a task's training split, or of random tokens, as validation data of a trainer.

    Args:
        module: the task's data.
        options: how many examples, and of what.
        seed: which of them.
    """

    def __init__(self, module: TaskDataModule, options: Capture, seed: int) -> None:
        super().__init__([module], "validation")
        self.options, self.seed = options, seed

    def prepare_data(self) -> None:
        """Encode the training split if it is not encoded yet."""
        if self.options.source == "train":
            self.modules[0].dataset("train")

    def val_dataloader(self) -> Any:
        """A seeded sample, every example once over all processes."""
        module = self.modules[0]
        module.trainer = self.trainer
        make = module.capture_dataloader if self.options.source == "train" else module.random_dataloader
        return make(self.options.examples, self.options.batch_size, self.seed)
