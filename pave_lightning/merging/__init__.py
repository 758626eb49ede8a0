"""Merge methods: one file each in `methods`, all behind one interface."""

from pave_lightning.merging.base import Cost, MergeMethod, MethodOptions, Modulated, PerTaskMethod, StaticMethod
from pave_lightning.merging.evidence import Evidence, Need
from pave_lightning.merging.matrices import MatrixMethod, MatrixOptions
from pave_lightning.merging.merged import MergedVectors
from pave_lightning.merging.modulators import LowRank, Modulator, ModulatorWriter
from pave_lightning.merging.parts import PartOfVectors, begin_parts, reduce_states
from pave_lightning.merging.registry import known_methods, make_method, merge_method, method_named
from pave_lightning.merging.running import merge, merge_per_task, merge_static
from pave_lightning.merging.selection import SelectedTaskVectors, is_selected, selected
from pave_lightning.merging.sequential import RunningMean, RunningSum, SequentialMethod, SequentialState
from pave_lightning.merging.states import State, States, order_statistics
from pave_lightning.merging.trained import TrainedMethod, TrainedOptions

__all__ = [
    "Cost",
    "Evidence",
    "LowRank",
    "MatrixMethod",
    "MatrixOptions",
    "MergeMethod",
    "MergedVectors",
    "MethodOptions",
    "Modulated",
    "Modulator",
    "ModulatorWriter",
    "Need",
    "PartOfVectors",
    "PerTaskMethod",
    "RunningMean",
    "RunningSum",
    "SelectedTaskVectors",
    "SequentialMethod",
    "SequentialState",
    "State",
    "States",
    "StaticMethod",
    "TrainedMethod",
    "TrainedOptions",
    "begin_parts",
    "is_selected",
    "known_methods",
    "make_method",
    "merge",
    "merge_method",
    "merge_per_task",
    "merge_static",
    "method_named",
    "order_statistics",
    "reduce_states",
    "selected",
]
