"""The training of a method that learns, by Lightning's Trainer; loaded only when one is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from pave_lightning.experts.trainers import build_trainer, honest_interrupts, quiet_lightning
from pave_lightning.merging.trained import Examples, ModelT, TrainedMethod, TrainedOptionsT_co


def train(method: TrainedMethod[TrainedOptionsT_co, ModelT], model: ModelT, examples: Examples) -> None:
    """Train the parameters of a module that ask for gradients.

    Args:
        method: says loss, optimiser and schedule.
        model: the module, on the device; afterwards it is on the CPU.
        examples: each task's batches, on the device.

    Raises:
        PaveError: Lightning refuses the method's trainer options, or the method refuses what has come of the training.
    """
    options = {
        **_machine(method.evidence.forward_passes.device),
        "precision": method.options.precision,
        "max_epochs": method.options.epochs,
        # One batch of each task makes a step, with one graph at a time in memory.
        "accumulate_grad_batches": len(examples),
        "reload_dataloaders_every_n_epochs": 1,
        **method.trainer_options(),
    }
    with quiet_lightning(), honest_interrupts():
        build_trainer(options, root=Path()).fit(_Training(method, model, examples))


def _machine(device: str) -> dict[str, Any]:
    """The Trainer's options for one device, named as torch names it."""
    found = torch.device(device)
    return {"accelerator": found.type, "devices": 1 if found.type == "cpu" else [found.index or 0]}


class _Training(L.LightningModule):
    """A method and what it trains, as Lightning wants them."""

    def __init__(self, method: TrainedMethod[Any, Any], model: nn.Module, examples: Examples) -> None:
        super().__init__()
        self.method, self.model, self.examples = method, model, examples
        self._steps = max(len(batches) for batches in examples.values())
        self._all_steps = self._steps * method.options.epochs
        generator = torch.Generator().manual_seed(method.options.seed)
        self._orders = {task: _order(len(examples[task]), self._all_steps, generator) for task in examples}
        self._loss = 0.0

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The method's optimiser and schedule, step by step."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimiser = self.method.optimiser(trained)
        # It also asks for the step behind the last one, which is not taken.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: self.method.rate_factor(min(step, self._all_steps - 1), self._all_steps)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> _Rounds:
        """The batches of the epoch that begins."""
        first = self.current_epoch * self._steps
        chosen = {task: order[first : first + self._steps] for task, order in self._orders.items()}
        return _Rounds(self.examples, chosen)

    def on_train_start(self) -> None:
        """Let the method look at its module."""
        self.method.before_training(self.model, self.examples)

    def training_step(self, batch: tuple[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """The loss of one task; Lightning divides it by the number of tasks."""
        task, inputs = batch
        loss: Tensor = self.method.training_step(self.model, inputs, task)
        self._loss += float(loss.detach()) / len(self.examples)
        return loss

    def on_train_epoch_end(self) -> None:
        """Tell the method how the epoch went."""
        loss, self._loss = self._loss / self._steps, 0.0
        self.method.after_epoch(self.model, self.examples, self.current_epoch + 1, loss)


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
