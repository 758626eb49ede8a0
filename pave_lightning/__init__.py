"""Turn separately fine-tuned models into one model that does all their tasks.

Names are loaded when they are first used, so that importing the package is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "PaveCallback": "callbacks",
    "TaskExpert": "experts.task_expert",
    "TaskStatistics": "statistics",
    "TaskDataModule": "tasks.data_module",
    "Evaluator": "evaluation",
    "Checkpoint": "weights",
    "Architecture": "weights",
    "TaskVectors": "weights",
    "ExpertTaskVectors": "weights",
    "PurifiedTaskVectors": "purification",
    "Average": "merging",
    "TaskArithmetic": "merging",
    "Ties": "merging",
    "Emr": "merging",
    "StaticMethod": "merging",
    "PerTaskMethod": "merging",
    "MethodOptions": "merging",
    "register": "merging",
    "merge": "merging",
    "load_merged": "merging.folders",
    "Purify": "recipe",
    "Recipe": "recipe",
    "Task": "recipe",
    "load_recipe": "recipe_loading",
    "run_recipe": "commands",
    "plan_recipe": "commands",
    "PaveError": "errors",
    "task_vectors": "weights",
}

__all__ = [
    "Architecture",
    "Average",
    "Checkpoint",
    "Emr",
    "Evaluator",
    "ExpertTaskVectors",
    "MethodOptions",
    "PaveCallback",
    "PaveError",
    "PerTaskMethod",
    "PurifiedTaskVectors",
    "Purify",
    "Recipe",
    "StaticMethod",
    "Task",
    "TaskArithmetic",
    "TaskDataModule",
    "TaskExpert",
    "TaskStatistics",
    "TaskVectors",
    "Ties",
    "load_merged",
    "load_recipe",
    "merge",
    "plan_recipe",
    "register",
    "run_recipe",
    "task_vectors",
]

if TYPE_CHECKING:
    from pave_lightning.callbacks import PaveCallback as PaveCallback
    from pave_lightning.commands import plan_recipe as plan_recipe
    from pave_lightning.commands import run_recipe as run_recipe
    from pave_lightning.errors import PaveError as PaveError
    from pave_lightning.evaluation import Evaluator as Evaluator
    from pave_lightning.experts.task_expert import TaskExpert as TaskExpert
    from pave_lightning.merging import Average as Average
    from pave_lightning.merging import Emr as Emr
    from pave_lightning.merging import MethodOptions as MethodOptions
    from pave_lightning.merging import PerTaskMethod as PerTaskMethod
    from pave_lightning.merging import StaticMethod as StaticMethod
    from pave_lightning.merging import TaskArithmetic as TaskArithmetic
    from pave_lightning.merging import Ties as Ties
    from pave_lightning.merging import merge as merge
    from pave_lightning.merging import register as register
    from pave_lightning.merging.folders import load_merged as load_merged
    from pave_lightning.purification import PurifiedTaskVectors as PurifiedTaskVectors
    from pave_lightning.recipe import Purify as Purify
    from pave_lightning.recipe import Recipe as Recipe
    from pave_lightning.recipe import Task as Task
    from pave_lightning.recipe_loading import load_recipe as load_recipe
    from pave_lightning.statistics import TaskStatistics as TaskStatistics
    from pave_lightning.tasks.data_module import TaskDataModule as TaskDataModule
    from pave_lightning.weights import Architecture as Architecture
    from pave_lightning.weights import Checkpoint as Checkpoint
    from pave_lightning.weights import ExpertTaskVectors as ExpertTaskVectors
    from pave_lightning.weights import TaskVectors as TaskVectors
    from pave_lightning.weights import task_vectors as task_vectors


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pave_lightning' has no attribute '{name}'")
    return getattr(import_module(f"pave_lightning.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
