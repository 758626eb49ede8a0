"""How long each expert will be trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pave_lightning.errors import PaveError, counted
from pave_lightning.experts.schedule import Schedule, training_schedule
from pave_lightning.experts.trainer_options import process_count, trainer_problems
from pave_lightning.recipe.schema import Recipe, Task
from pave_lightning.tasks.data import SPLITS, load_split


def schedule_problems(recipe: Recipe, cache: Path) -> Iterator[str]:
    """Why experts cannot be trained for as long as the recipe says, on data of this size.

    Args:
        recipe: the recipe; tasks whose data or trainer options are wrong in themselves are told elsewhere.
        cache: where copies of the rows are.
    """
    for task in recipe.tasks:
        if task.expert is not None or trainer_problems(task.trainer, "trainer"):
            continue
        where = "trainer" if task.trainer == recipe.trainer else f"tasks.{task.name}.trainer"
        try:
            rows, validation = _sizes(task, recipe.seed, cache)
        except PaveError:
            continue
        try:
            training_schedule(task, rows, validation, process_count(task.trainer))
        except PaveError as error:
            yield f"task '{task.name}': {where}: {error}"


def planned_schedule(task: Task, seed: int, cache: Path) -> tuple[int, Schedule]:
    """The training rows of a task, and how long its expert will be trained.

    Raises:
        PaveError: the data cannot be read, or it cannot be trained like this.
    """
    rows, validation = _sizes(task, seed, cache)
    return rows, training_schedule(task, rows, validation, process_count(task.trainer))


def schedule_summary(task: Task, seed: int, cache: Path) -> str:
    """How long a task's expert will be trained, in words; arguments and errors as of `planned_schedule`."""
    rows, schedule = planned_schedule(task, seed, cache)
    epochs, steps = counted(schedule.epochs, "epoch"), counted(schedule.steps, "step")
    return f"{counted(rows, 'row')}, {'at most ' * schedule.at_most}{epochs}, {steps} of {schedule.batch}"


def _sizes(task: Task, seed: int, cache: Path) -> tuple[int, int]:
    """How many training and validation rows are used."""
    train, validation = (load_split(task, split, seed=seed, cache_dir=cache) for split in SPLITS[:2])
    return len(train), len(validation)
