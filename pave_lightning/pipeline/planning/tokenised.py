"""What becomes of the rows once they are encoded, by the code that a run encodes them with."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pave_lightning.errors import PaveError
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.pipeline.stages import existing_folder
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.data import SPLITS
from pave_lightning.tasks.encoded import EncodedRows
from pave_lightning.tasks.task import Task
from pave_lightning.weights import locate_model

log = logging.getLogger("pave_lightning")


def tokenised_problems(recipe: Recipe, folder: RunFolder) -> Iterator[str]:
    """Encode all rows that are used, and tell those that leave nothing to learn from; others are warned of.

    Args:
        recipe: What is checked.
        folder: Its run folder, where the encoded rows are kept for the run.

    Raises:
        PaveError: There is no base.
    """
    base = locate_model(recipe.base, role="base")
    loaded: dict[tuple[type[Task], Path], Any] = {}  # most tasks have the base's
    for task in recipe.tasks:
        try:
            place = base if task.expert is None else existing_folder(task)
            key = (type(task), place)
            processor = loaded[key] if key in loaded else loaded.setdefault(key, task.load_processor(place, base))
        except PaveError:  # told with what is wrong with tokenizers
            continue
        rows = EncodedRows(task, processor, seed=recipe.seed, cache_dir=folder.data)
        for split in SPLITS:
            try:
                for remark in rows.remarks(split):
                    log.warning("%s", remark)
            except PaveError as error:
                yield from str(error).split("\n")
