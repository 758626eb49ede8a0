"""The examples that are shown to an expert while its layers are looked at."""

from __future__ import annotations

from typing import Any

from pave_lightning.evaluation import SuiteData
from pave_lightning.recipe.schema import Capture
from pave_lightning.tasks.data_module import TaskDataModule


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
        """Tokenise the training split if it is not tokenised yet."""
        if self.options.source == "train":
            self.modules[0].dataset("train")

    def val_dataloader(self) -> Any:
        """A seeded sample, every example once over all processes."""
        module = self.modules[0]
        module.trainer = self.trainer
        make = module.capture_dataloader if self.options.source == "train" else module.random_token_dataloader
        return make(self.options.examples, self.options.batch_size, self.seed)
