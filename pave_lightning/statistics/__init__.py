"""What the layers of one expert have seen: accumulated, reduced over processes, merged, saved and loaded."""

from pave_lightning.statistics.norm_moment import NormMoment, NormSquares
from pave_lightning.statistics.second_moment import LayerMoment, Moments, SecondMoment, captured_kind
from pave_lightning.statistics.storage import NOT_REACHED, TaskStatistics
from pave_lightning.subspace import MomentKind

__all__ = [
    "NOT_REACHED",
    "LayerMoment",
    "MomentKind",
    "Moments",
    "NormMoment",
    "NormSquares",
    "SecondMoment",
    "TaskStatistics",
    "captured_kind",
]
