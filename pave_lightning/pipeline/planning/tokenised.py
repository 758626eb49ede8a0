"""What becomes of the rows once they are tokenised, by the code that a run tokenises them with."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache

from pave_lightning.errors import PaveError
from pave_lightning.experts.tokenizers import load_tokenizer
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.pipeline.stages import existing_folder
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.data import SPLITS
from pave_lightning.tasks.tokenised import TokenisedRows
from pave_lightning.weights import locate_model

log = logging.getLogger("pave_lightning")


def tokenised_problems(recipe: Recipe, folder: RunFolder) -> Iterator[str]:
    """Tokenise all rows that are used, and tell those that leave nothing to learn from; others are warned of.

    Args:
        recipe: What is checked.
        folder: Its run folder, where the tokens are kept for the run.

    Raises:
        PaveError: There is no base.
    """
    base = locate_model(recipe.base, role="base")
    load = lru_cache(maxsize=1)(load_tokenizer)  # most tasks have the base's
    for task in recipe.tasks:
        try:
            tokenizer = load(base if task.expert is None else existing_folder(task), base)
        except PaveError:  # told with what is wrong with tokenizers
            continue
        rows = TokenisedRows(
            task, tokenizer, seed=recipe.seed, cache_dir=folder.data, max_length=task.training.max_length
        )
        for split in SPLITS:
            try:
                for remark in rows.remarks(split):
                    log.warning("%s", remark)
            except PaveError as error:
                yield from str(error).split("\n")
