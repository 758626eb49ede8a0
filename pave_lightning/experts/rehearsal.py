"""How long Lightning trains with given options, found out with a model of one weight."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sized
from functools import lru_cache
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pave_lightning.errors import PaveError, reason
from pave_lightning.experts.trainers import honest_interrupts, quiet_lightning
from pave_lightning.tasks.samplers import ExactSampler, TrainingSampler

TRAINING_LIMITS = ("max_epochs", "max_steps", "limit_train_batches")
VALIDATION_LIMITS = ("limit_val_batches", "overfit_batches")


@lru_cache(maxsize=256)
def rehearsed(options: str, size: int, rows: int, validation_rows: int, processes: int) -> tuple[int, int]:
    """How many epochs Lightning begins with loop options, and how many steps it takes.

    The answer is remembered, as tasks of a recipe are mostly alike.

    Args:
        options: the options as JSON.
        size: rows a batch and process.
        rows: rows of the training split.
        validation_rows: rows of the validation split.
        processes: how many processes train together.

    Raises:
        PaveError: Lightning refuses the options, or nothing would be trained or validated, or training has no end.
    """
    settings = json.loads(options)
    train = _loader(TrainingSampler(np.ones(rows), batch_size=size, seed=0, world=processes), size)
    validation = _loader(ExactSampler(np.ones(validation_rows), world=processes), size)
    rehearsal = _Rehearsal()
    for what in ("fit", "validate"):
        with quiet_lightning(), honest_interrupts():
            try:
                trainer = L.Trainer(
                    **settings,
                    accelerator="cpu",
                    devices=1,
                    strategy="auto",
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    use_distributed_sampler=False,
                    callbacks=[rehearsal],
                )
                if what == "fit":
                    trainer.fit(_OneWeight(), train, validation)
                else:
                    trainer.validate(_OneWeight(), validation, verbose=False)
            except _EnoughError:
                pass
            except Exception as error:
                given = _found(settings, tuple(settings))
                raise PaveError(f"lightning.Trainer refuses {given}: {reason(error)}") from error
    if rehearsal.steps is None or not rehearsal.steps:
        raise PaveError(
            f"nothing would be trained: expected at least one step, found {_found(settings, TRAINING_LIMITS)}"
        )
    if math.isinf(rehearsal.steps):
        raise PaveError(
            "training would have no end, and the learning rate, which falls to zero at the last step, no schedule; "
            "set max_epochs or max_steps"
        )
    if not rehearsal.validates:
        raise PaveError(
            "nothing would be validated, but the best checkpoint is chosen on validation rows: expected at least one "
            f"batch, found {_found(settings, VALIDATION_LIMITS)}"
        )
    steps = int(rehearsal.steps)
    accumulated = settings.get("accumulate_grad_batches", 1)
    epochs = math.ceil(steps / max(1, math.ceil(rehearsal.batches / accumulated)))
    return epochs, steps


def _found(settings: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}: {settings[name]}" for name in names if name in settings) or "no rows"


def _loader(sampler: Sized, size: int) -> DataLoader[Any]:
    """As many batches as the sampler's process gets; with a generator of its own, so that no other draws change."""
    rows: Any = torch.zeros(len(sampler), 1)
    return DataLoader(rows, batch_size=size, generator=torch.Generator())


class _EnoughError(Exception):
    """All is known."""


class _Rehearsal(Callback):
    """Notes what Lightning makes of the options, and ends training in its first steps.

    Attributes:
        steps: steps of the optimiser in all; infinity where nothing ends training, None where it never begins.
        batches: batches an epoch.
        validates: whether there is a validation batch.
    """

    def __init__(self) -> None:
        self.steps: float | None = None
        self.batches: float = 0
        self.validates = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps = trainer.estimated_stepping_batches
        self.batches = trainer.num_training_batches

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx > 0:
            raise _EnoughError

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise _EnoughError

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self.validates = True
            raise _EnoughError


class _OneWeight(L.LightningModule):
    """The smallest model that can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight * batch.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)
