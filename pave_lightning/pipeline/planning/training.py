"""How long each expert will be trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from pave_lightning.errors import PaveError
from pave_lightning.experts.schedule import training_schedule
from pave_lightning.experts.trainer_options import process_count, trainer_problems
from pave_lightning.pipeline.stages.fit import training_rows
from pave_lightning.recipe.schema import Recipe

log = logging.getLogger("pave_lightning")


def schedule_problems(recipe: Recipe, cache: Path) -> Iterator[str]:
    """Why experts cannot be trained for as long as the recipe says, on data of this size.

    Args:
        recipe: the recipe; tasks whose data or trainer options are wrong in themselves are told elsewhere.
        cache: where copies of the rows are.
    """
    for task in recipe.tasks:
        if task.expert is not None or trainer_problems(task.trainer, "trainer"):
            continue
        if str(task.trainer.get("strategy", "")).startswith("deepspeed"):
            log.warning(
                "task '%s': trainer.strategy: a training with %s that is stopped begins anew, because DeepSpeed's "
                "checkpoints are pickles, which are not written; fsdp2 goes on from its last checkpoint",
                *(task.name, task.trainer["strategy"]),
            )
        where = "trainer" if task.trainer == recipe.trainer else f"tasks.{task.name}.trainer"
        try:
            rows, validation = training_rows(task, recipe.seed, cache)
        except PaveError:
            continue
        try:
            training_schedule(task, rows, validation, process_count(task.trainer))
        except PaveError as error:
            yield f"task '{task.name}': {where}: {error}"
