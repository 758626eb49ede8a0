"""The stages of a recipe, one file each, in the order of work."""

from __future__ import annotations

from pave_lightning.pipeline.stage import Results, Stage
from pave_lightning.pipeline.stages.capture import CaptureStage
from pave_lightning.pipeline.stages.diagnose import DiagnoseStage
from pave_lightning.pipeline.stages.evaluate import EvaluateStage
from pave_lightning.pipeline.stages.export import ExportStage
from pave_lightning.pipeline.stages.fit import FitStage, existing_folder
from pave_lightning.pipeline.stages.gradients import GradientStage
from pave_lightning.pipeline.stages.merge import MergeStage
from pave_lightning.pipeline.stages.purify import PurifyStage, purifications, ratios

__all__ = [
    "KINDS",
    "CaptureStage",
    "DiagnoseStage",
    "EvaluateStage",
    "ExportStage",
    "FitStage",
    "GradientStage",
    "MergeStage",
    "PurifyStage",
    "captures",
    "existing_folder",
    "kind_of",
    "purifications",
    "ratios",
    "stages_of",
]

# Every kind of stage, in the order of work.
KINDS: list[type[Stage]] = [
    FitStage,
    CaptureStage,
    GradientStage,
    PurifyStage,
    MergeStage,
    ExportStage,
    DiagnoseStage,
    EvaluateStage,
]


def stages_of(results: Results) -> list[Stage]:
    """Every stage of a run in the order of work, what others need before them."""
    found: dict[str, Stage] = {}
    for kind in KINDS:
        for stage in kind.asked(results):
            for one in (*stage.needed(), stage):
                found.setdefault(one.name, one)
    return list(found.values())


def kind_of(command: str) -> type[Stage]:
    """The kind of stage that a command makes."""
    return next(kind for kind in KINDS if kind.command == command and not kind.on_demand)


def captures(results: Results) -> bool:
    """Whether anything in the recipe looks at what the experts' layers see.

    One that merges nothing may be meant to: purifying and diagnosing are commands of their own.
    """
    others = (stage for kind in KINDS if kind is not CaptureStage for stage in kind.asked(results))
    return not results.recipe.merge or any(isinstance(one, CaptureStage) for stage in others for one in stage.needed())
