"""How one model is trained on several tasks together, and what of their options has to agree for that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pave_lightning.experts.schedule import training_schedule, training_settings
from pave_lightning.experts.strategies import shards
from pave_lightning.experts.trainer_options import is_distributed, process_count
from pave_lightning.tasks.task import Task
from pave_lightning.tasks.turns import Turns
from pave_lightning.weights.backbones import lies_in

# Options of the trainer by which a training of several tasks would not have the steps of all of theirs, and the values
# that change nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "max_steps": (None, -1),
    "min_steps": (None,),
    "min_epochs": (None,),
    "max_time": (None,),
    "overfit_batches": (None, 0),
    "accumulate_grad_batches": (None, 1),
}
# Sections of training that hold for the whole model.
SHARED_OPTIONS = ("weight_decay", "early_stopping", "lora", "activation_checkpointing", "compile")


@dataclass(frozen=True)
class JointSchedule:
    """How long one model is trained on several tasks.

    Attributes:
        epochs: epochs that are begun; the same for every task.
        turns: which task each step of the optimiser is of.
        at_most: whether early stopping may end it sooner.
    """

    epochs: int
    turns: Turns
    at_most: bool

    @property
    def steps(self) -> int:
        """Steps of the optimiser: those of all tasks' own trainings."""
        return self.epochs * len(self.turns)


def joint_schedule(tasks: Sequence[Task], rows: Mapping[str, tuple[int, int]], seed: int) -> JointSchedule:
    """How long one model is trained on tasks in which `disagreements` finds nothing.

    Args:
        tasks: the tasks, with their training and trainer options.
        rows: training and validation rows that are used, by task.
        seed: of the order of tasks.

    Raises:
        PaveError: as `training_schedule` says.
    """
    processes = process_count(tasks[0].trainer)
    own = [training_schedule(task, *rows[task.name], processes) for task in tasks]
    turns = Turns(tuple(one.steps // one.epochs for one in own), seed)
    return JointSchedule(own[0].epochs, turns, any(one.at_most for one in own))


def joint_settings(task: Task) -> dict[str, Any]:
    """The options of the trainer that trains on all tasks, from those of any of them."""
    # The limit holds for each task, which its turns know.
    settings = {name: value for name, value in training_settings(task).items() if name != "limit_train_batches"}
    if is_distributed(settings) and str(settings.get("strategy", "auto")) in ("auto", "ddp"):
        settings["strategy"] = "ddp_find_unused_parameters_true"  # the heads of the tasks that a step is not of
    return settings


def disagreements(tasks: Sequence[Task]) -> Iterator[str]:
    """Why one model cannot be trained on these tasks with their options."""
    keys = dict.fromkeys(key for task in tasks for key in task.trainer)
    for key in keys:
        yield from _differing(f"trainer.{key}", {task.name: task.trainer.get(key) for task in tasks})
        if any(task.trainer.get(key) not in REFUSED.get(key, (task.trainer.get(key),)) for task in tasks):
            yield (
                f"trainer.{key} cannot be shared out: a model that is trained on all tasks takes whole epochs, and one "
                "batch of one task a step; let max_epochs alone say how long"
            )
    if any(shards(task.trainer) for task in tasks):
        yield (
            "trainer.strategy divides the weights over processes, but a model that is trained on all tasks is several "
            "models that share a backbone; use strategy: ddp"
        )
    for key in SHARED_OPTIONS:
        yield from _differing(f"training.{key}", {task.name: getattr(task.training, key) for task in tasks})


def _differing(key: str, values: Mapping[str, Any]) -> Iterator[str]:
    first, *others = values
    other = next((name for name in others if values[name] != values[first]), None)
    if other is not None:
        shown = [f"{name}: {_written(values[name])}" for name in (first, other)]
        yield f"{key} must be the same for all tasks, found {' and '.join(shown)}; let them agree"


def _written(value: Any) -> str:
    return str(value.model_dump(exclude_defaults=True) if hasattr(value, "model_dump") else value)


def common_freeze(tasks: Sequence[Task]) -> list[str]:
    """Submodules of the backbone that are frozen for every task."""
    named = dict.fromkeys(name for task in tasks for name in task.training.freeze)
    return [name for name in named if all(lies_in(name, task.training.freeze) for task in tasks)]


def partly_frozen(tasks: Sequence[Task]) -> list[str]:
    """Submodules of the backbone that are frozen for some tasks only, and so trained with the others."""
    named = dict.fromkeys(name for task in tasks for name in task.training.freeze)
    return [name for name in named if not lies_in(name, common_freeze(tasks))]
