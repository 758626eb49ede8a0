"""What the layers of one expert have seen: accumulated, reduced over processes, merged, saved and loaded."""

from pave_lightning.statistics.second_moment import LayerMoment, MomentKind, SecondMoment
from pave_lightning.statistics.storage import TaskStatistics

__all__ = ["LayerMoment", "MomentKind", "SecondMoment", "TaskStatistics"]
