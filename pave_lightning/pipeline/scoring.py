"""What scores depend on besides the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.data import Split, split_fingerprint

# Raised when scores change meaning, so that older ones are made anew.
FORMAT = 1


def score_inputs(recipe: Recipe, heads: Mapping[str, str], split: Split) -> dict[str, Any]:
    """What scores on a split depend on besides the backbone, as plain JSON values.

    Args:
        recipe: its tasks and the precision are used.
        heads: what identifies each task's expert, whose head is used.
        split: which rows.
    """
    return {
        "format": FORMAT,
        "heads": dict(heads),
        "tasks": {
            task.name: {
                "data": split_fingerprint(task, split),
                "examples": [getattr(task.examples, split), recipe.seed],
                "shown": task.shown_by,
                "labelled": task.labelled_by,
                "metrics": [task.metrics, task.primary_metric],
            }
            for task in recipe.tasks
        },
        "precision": recipe.evaluate.precision,
    }
