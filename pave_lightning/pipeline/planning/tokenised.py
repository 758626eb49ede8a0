"""What becomes of the rows once they are encoded, by the code that a run encodes them with."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from pave_lightning.errors import PaveError
from pave_lightning.pipeline.bases import folder_of_base
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.pipeline.stages.fit import processor_of
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.data import SPLITS, load_split, split_title
from pave_lightning.tasks.encoded import EncodedRows

log = logging.getLogger("pave_lightning")


def tokenised_problems(recipe: Recipe, folder: RunFolder) -> Iterator[str]:
    """Encode all rows that are used, and tell those that leave nothing to learn from; others are warned of.

    Args:
        recipe: What is checked.
        folder: Its run folder, where the encoded rows are kept for the run.

    Raises:
        PaveError: There is no base.
    """
    folder_of_base(recipe)
    for task in recipe.tasks:
        try:
            processor = processor_of(recipe, task)
        except PaveError as error:
            if not task.reads_tokens:  # what is wrong with tokenizers is told beside them
                yield f"task '{task.name}': {error}"
            continue
        try:
            rows = EncodedRows(task, processor, seed=recipe.seed, cache_dir=folder.data)
        except PaveError as error:
            yield str(error)
            continue
        for split in SPLITS:
            try:
                for remark in rows.remarks(split):
                    log.warning("%s", remark)
                if split == "test":
                    yield from _alike(rows)
            except PaveError as error:
                yield from str(error).split("\n")


def _alike(rows: EncodedRows) -> Iterator[str]:
    """Why no score can be made of test rows, where that comes of what is cut off; else it is told with the data."""
    task, labels = rows.task, rows.labels("test")
    given = task.answers(load_split(task, "test", seed=rows.seed, cache_dir=rows.cache_dir))
    if len(np.unique(labels, axis=0)) < 2 <= len(np.unique(given, axis=0)):
        yield (
            f"{split_title(task, 'test')}: of {len(given):,} labels {len(labels):,} are left once texts are cut "
            f"(training.max_length is {task.training.max_length}), all the same, so no metric can tell a good model "
            "from a bad one; raise it, or use more rows or another split"
        )
