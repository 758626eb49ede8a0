"""Merge rules: one file each, all behind one interface."""

from pave_lightning.merging.average import Average
from pave_lightning.merging.base import (
    Cost,
    MergeMethod,
    MethodOptions,
    Modulated,
    PerTaskMethod,
    StaticMethod,
    make_method,
    method_named,
    methods,
    register,
)
from pave_lightning.merging.dare import Dare, DareOptions, DareTies, DareTiesOptions, DroppedTaskVectors, kept_elements
from pave_lightning.merging.emr import Emr
from pave_lightning.merging.evidence import Evidence, Need
from pave_lightning.merging.matrices import MatrixMethod, MatrixOptions
from pave_lightning.merging.modulators import Modulator, PackedMasks
from pave_lightning.merging.running import MergedVectors, merge, merge_per_task, merge_static
from pave_lightning.merging.task_arithmetic import TaskArithmetic
from pave_lightning.merging.ties import Ties

__all__ = [
    "Average",
    "Cost",
    "Dare",
    "DareOptions",
    "DareTies",
    "DareTiesOptions",
    "DroppedTaskVectors",
    "Emr",
    "Evidence",
    "MatrixMethod",
    "MatrixOptions",
    "MergeMethod",
    "MergedVectors",
    "MethodOptions",
    "Modulated",
    "Modulator",
    "Need",
    "PackedMasks",
    "PerTaskMethod",
    "StaticMethod",
    "TaskArithmetic",
    "Ties",
    "kept_elements",
    "make_method",
    "merge",
    "merge_per_task",
    "merge_static",
    "method_named",
    "methods",
    "register",
]
