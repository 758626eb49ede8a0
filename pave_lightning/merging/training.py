"""Training a module on the examples of all tasks, by Lightning's Trainer; loaded only when something is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from typing_extensions import TypeVar

from pave_lightning.experts.trainers import build_trainer, honest_interrupts, quiet_lightning
from pave_lightning.merging.blocks import Batch
from pave_lightning.merging.passes import Examples

ModelT_contra = TypeVar("ModelT_contra", bound=nn.Module, contravariant=True)


class Learner(Protocol[ModelT_contra]):
    """What a training asks of a method that learns; see `TrainedMethod`."""

    def training_step(self, model: ModelT_contra, batch: Batch, task: str) -> Tensor:
        """The loss of one task on one of its batches."""

    def optimiser(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of the parameters that are trained."""

    def rate_factor(self, step: int, steps: int) -> float:
        """What the optimiser's rates are multiplied with in a step, counted from 0."""

    def trainer_options(self) -> dict[str, object]:
        """More options for Lightning's Trainer."""

    def before_training(self, model: ModelT_contra, examples: Examples) -> None:
        """Look at the module before its first step."""

    def after_epoch(self, model: ModelT_contra, examples: Examples, epoch: int, loss: float) -> None:
        """Look at the module after an epoch."""


def train(
    learner: Learner[ModelT_contra],
    model: ModelT_contra,
    examples: Examples,
    *,
    device: str,
    precision: str,
    epochs: int,
    seed: int,
) -> None:
    """Train the parameters of a module that ask for gradients.

    Args:
        learner: says loss, optimiser and schedule.
        model: the module, on the device; afterwards it is on the CPU.
        examples: each task's batches, on the device.
        device: the device, named as torch names it.
        precision: of the training steps, named as Lightning names it.
        epochs: how often the examples of the task that has most of them are seen.
        seed: decides the order of the batches.

    Raises:
        PaveError: Lightning refuses the trainer options, or the learner refuses what has come of the training.
    """
    options = {
        **_machine(device),
        "precision": precision,
        "max_epochs": epochs,
        # One batch of each task makes a step, with one graph at a time in memory.
        "accumulate_grad_batches": len(examples),
        "reload_dataloaders_every_n_epochs": 1,
        **learner.trainer_options(),
    }
    with quiet_lightning(), honest_interrupts():
        build_trainer(options, root=Path()).fit(_Training(learner, model, examples, epochs, seed))


def _machine(device: str) -> dict[str, Any]:
    """The Trainer's options for one device, named as torch names it."""
    found = torch.device(device)
    return {"accelerator": found.type, "devices": 1 if found.type == "cpu" else [found.index or 0]}


class _Training(L.LightningModule):
    """A learner and what it trains, as Lightning wants them."""

    def __init__(self, learner: Learner[Any], model: nn.Module, examples: Examples, epochs: int, seed: int) -> None:
        super().__init__()
        self.learner, self.model, self.examples = learner, model, examples
        self._steps = max(len(batches) for batches in examples.values())
        self._all_steps = self._steps * epochs
        generator = torch.Generator().manual_seed(seed)
        self._orders = {task: _order(len(examples[task]), self._all_steps, generator) for task in examples}
        self._loss = 0.0

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The learner's optimiser and schedule, step by step."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimiser = self.learner.optimiser(trained)
        # It also asks for the step behind the last one, which is not taken.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: self.learner.rate_factor(min(step, self._all_steps - 1), self._all_steps)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> _Rounds:
        """The batches of the epoch that begins."""
        first = self.current_epoch * self._steps
        chosen = {task: order[first : first + self._steps] for task, order in self._orders.items()}
        return _Rounds(self.examples, chosen)

    def on_train_start(self) -> None:
        """Let the learner look at the module."""
        self.learner.before_training(self.model, self.examples)

    def training_step(self, batch: tuple[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """The loss of one task; Lightning divides it by the number of tasks."""
        task, inputs = batch
        loss: Tensor = self.learner.training_step(self.model, inputs, task)
        self._loss += float(loss.detach()) / len(self.examples)
        return loss

    def on_train_epoch_end(self) -> None:
        """Tell the learner how the epoch went."""
        loss, self._loss = self._loss / self._steps, 0.0
        self.learner.after_epoch(self.model, self.examples, self.current_epoch + 1, loss)


class _Rounds:
    """The batches of one epoch: in each step one of every task."""

    def __init__(self, examples: Examples, orders: Mapping[str, Sequence[int]]) -> None:
        self._examples, self._orders = examples, orders

    def __len__(self) -> int:
        return sum(len(order) for order in self._orders.values())

    def __iter__(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for chosen in zip(*self._orders.values(), strict=True):
            for task, index in zip(self._orders, chosen, strict=True):
                yield task, self._examples[task][index]


def _order(batches: int, steps: int, generator: torch.Generator) -> list[int]:
    """Which batch of a task comes in each step: all of them, shuffled, again and again."""
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(batches, generator=generator).tolist()
    return order
