"""How long an expert is trained, known before anything is trained; Lightning is asked about all but plain epochs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from pave_lightning.experts.trainer_options import is_plain
from pave_lightning.tasks.task import Task

DEFAULT_EPOCHS = 3

# The options that say how long to train and when to validate.
LOOP_OPTIONS = (
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "num_sanity_val_steps"),
    *("limit_train_batches", "limit_val_batches", "overfit_batches", "accumulate_grad_batches"),
    *("val_check_interval", "check_val_every_n_epoch"),
)


@dataclass(frozen=True)
class Schedule:
    """How long an expert is trained.

    Attributes:
        epochs: epochs that are begun.
        steps: steps of the optimiser.
        batch: rows of one step, over all processes.
        at_most: whether early stopping or a limit of time may end it sooner.
    """

    epochs: int
    steps: int
    batch: int
    at_most: bool


def training_settings(task: Task) -> dict[str, Any]:
    """The options of the trainer that fine-tunes a task's expert, as far as the recipe decides them."""
    return {"max_epochs": DEFAULT_EPOCHS, "log_every_n_steps": 10, **task.trainer}


def training_schedule(task: Task, rows: int, validation_rows: int, processes: int = 1) -> Schedule:
    """How long a task's expert will be trained, exactly as Lightning counts it.

    Args:
        task: the task, with its training and trainer options.
        rows: rows of the training split that are used.
        validation_rows: rows of the validation split that are used.
        processes: how many processes train together.

    Raises:
        PaveError: Lightning refuses the options for data of this size, nothing would be trained or validated, or
            training would have no end.
    """
    settings = {name: value for name, value in training_settings(task).items() if name in LOOP_OPTIONS}
    sooner = task.training.early_stopping is not None or settings.get("max_time") is not None
    size = task.training.batch_size
    if set(settings) == {"max_epochs"} and is_plain(settings) and processes == 1 and rows and validation_rows:
        epochs = settings["max_epochs"]
        steps = epochs * math.ceil(rows / size)
    else:
        from pave_lightning.experts.rehearsal import rehearsed

        epochs, steps = rehearsed(json.dumps(settings), size, rows, validation_rows, processes)
    return Schedule(epochs, steps, size * settings.get("accumulate_grad_batches", 1) * processes, at_most=sooner)
