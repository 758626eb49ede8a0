"""The stages of a recipe, one file each, in the order of work."""

from __future__ import annotations

from operator import itemgetter

from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.align import AlignStage
from pave_lightning.pipeline.stages.benchmark import BenchmarkStage
from pave_lightning.pipeline.stages.capture import CaptureStage
from pave_lightning.pipeline.stages.diagnose import DiagnoseStage
from pave_lightning.pipeline.stages.evaluate import EvaluateStage
from pave_lightning.pipeline.stages.export import ExportStage
from pave_lightning.pipeline.stages.fit import FitStage
from pave_lightning.pipeline.stages.gradients import GradientStage
from pave_lightning.pipeline.stages.heads import HeadsStage
from pave_lightning.pipeline.stages.joint import JointStage
from pave_lightning.pipeline.stages.merge import MergeStage
from pave_lightning.pipeline.stages.purify import PurifyStage

__all__ = [
    "KINDS",
    "AlignStage",
    "BenchmarkStage",
    "CaptureStage",
    "DiagnoseStage",
    "EvaluateStage",
    "ExportStage",
    "FitStage",
    "GradientStage",
    "HeadsStage",
    "JointStage",
    "MergeStage",
    "PurifyStage",
    "captures",
    "kinds_of",
    "stages_of",
]

# Every kind of stage, in the order of work.
KINDS: tuple[type[Stage], ...] = (
    FitStage,
    AlignStage,
    CaptureStage,
    GradientStage,
    PurifyStage,
    MergeStage,
    ExportStage,
    DiagnoseStage,
    JointStage,
    HeadsStage,
    EvaluateStage,
    BenchmarkStage,
)


def stages_of(results: Results) -> list[Stage]:
    """Every stage of a run in the order of work; what is made on demand stands before the first that needs it."""
    found: dict[str, tuple[int, Stage]] = {}
    for place, kind in enumerate(KINDS):
        for stage in kind.asked(results):
            for one in (*stage.needed(), stage):
                found.setdefault(one.name, (place if one.on_demand else KINDS.index(type(one)), one))
    return [stage for _, stage in sorted(found.values(), key=itemgetter(0))]


def kinds_of(command: str) -> list[type[Stage]]:
    """The kinds of stages that a command makes, in the order of work."""
    return [kind for kind in KINDS if kind.command == command and not kind.on_demand]


def captures(results: Results) -> bool:
    """Whether a run of the recipe looks at what the experts' layers see."""
    return any(isinstance(stage, CaptureStage) for stage in stages_of(results))
