"""Why one model cannot be trained on all tasks together, before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from pave_lightning.errors import PaveError, listed
from pave_lightning.experts.joint_schedule import disagreements, partly_frozen
from pave_lightning.experts.schedule import training_schedule
from pave_lightning.experts.trainer_options import process_count, trainer_problems
from pave_lightning.pipeline.bases import existing_folder, folder_of_base
from pave_lightning.pipeline.stages.fit import training_rows
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.task import Task

log = logging.getLogger("pave_lightning")

OTHERWISE = "or take joint out of controls"


def joint_problems(recipe: Recipe, cache: Path) -> Iterator[str]:
    """What keeps the model of all tasks from being trained, where the recipe asks for it.

    Args:
        recipe: the recipe; what is wrong with its data, base, experts or trainer in themselves is told elsewhere.
        cache: where copies of the rows are.
    """
    if "joint" not in recipe.controls:
        return
    if len(recipe.tasks) < 2:
        yield f"controls: joint: expected at least two tasks to train on together, found one; add one, {OTHERWISE}"
        return
    found = list(disagreements(recipe.tasks))
    yield from (f"controls: joint: {problem}, {OTHERWISE}" for problem in found)
    for task in recipe.tasks:
        if task.expert is not None:
            # Trained tasks are asked the same with their experts.
            schedule = () if found else _schedule_problems(task, recipe.seed, cache)
            for problem in (*schedule, *_reading_problems(task, recipe)):
                yield f"controls: joint: task '{task.name}': {problem}, {OTHERWISE}"
    partly = partly_frozen(recipe.tasks)
    if partly:
        log.warning(
            "controls: joint: %s is trained, because training.freeze does not name it for all tasks", listed(partly)
        )


def _schedule_problems(task: Task, seed: int, cache: Path) -> Iterator[str]:
    if trainer_problems(task.trainer, "trainer"):
        return
    try:
        rows = training_rows(task, seed, cache)
    except PaveError:
        return
    try:
        training_schedule(task, *rows, process_count(task.trainer))
    except PaveError as error:
        yield f"its expert is there, but it would be trained again: {error}"


def _reading_problems(task: Task, recipe: Recipe) -> Iterator[str]:
    """Why what is trained on a task's rows could not be scored on them: an expert's tokenizer reads them otherwise."""
    try:
        base = folder_of_base(recipe)
        own, of_base = (task.load_processor(folder, base) for folder in (existing_folder(task), base))
        differ = task.processor_fingerprint(own) != task.processor_fingerprint(of_base)
    except PaveError:
        return
    if differ:
        yield (
            f"its expert {existing_folder(task)} reads rows with another tokenizer than the base, whose tokens the "
            "model of all tasks is trained on; save the expert with the base's tokenizer"
        )
