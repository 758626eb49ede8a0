"""Which base a recipe means, and where it is."""

from __future__ import annotations

from pathlib import Path

from pave_lightning.errors import PaveError, naming
from pave_lightning.recipe.schema import Recipe
from pave_lightning.system.keeping import kept
from pave_lightning.system.references import ModelReference
from pave_lightning.tasks.task import Task
from pave_lightning.weights import locate_model
from pave_lightning.weights.inferred_base import inferred_base
from pave_lightning.weights.locate import named_adapter

INFER = "infer"


def existing_folder(task: Task) -> Path:
    """The folder of the checkpoint that a recipe names for a task instead of training.

    Raises:
        PaveError: there is none.
    """
    reference, adapter = (task.expert.from_, task.expert.adapter) if task.expert is not None else ("", None)
    role = f"expert of task '{task.name}'"
    return named_adapter(locate_model(reference, role=role), adapter, role=role)


def reference_of_base(recipe: Recipe) -> ModelReference:
    """How the base of a recipe is named: by the recipe, or with ``base: infer`` by its experts.

    Raises:
        PaveError: the experts name none, or different ones, or are not there.
    """
    if recipe.base != INFER:
        return recipe.base
    named = [task for task in recipe.tasks if task.expert is not None]
    with naming("base: infer"):
        return inferred_base({task.name: existing_folder(task) for task in named})


def folder_of_base(recipe: Recipe) -> Path:
    """The folder of a recipe's base on this machine, see `locate_model`; inside of `keeping` it is located once.

    Raises:
        PaveError: it is not there.
    """
    reference = reference_of_base(recipe)
    try:
        return kept(("base", reference), lambda: locate_model(reference, role="base"))
    except PaveError as error:
        if recipe.base != INFER:
            raise
        raise PaveError(f"{error}; base: infer takes what the experts name, so name another base instead") from error
