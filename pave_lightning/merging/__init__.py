"""Merge rules: one file each, all behind one interface."""

from pave_lightning.merging.average import Average
from pave_lightning.merging.base import (
    MergeMethod,
    MethodOptions,
    Modulated,
    Need,
    PerTaskMethod,
    StaticMethod,
    make_method,
    method_named,
    methods,
    register,
)
from pave_lightning.merging.dare import Dare, DareOptions, DareTies, DareTiesOptions, DroppedTaskVectors, kept_elements
from pave_lightning.merging.emr import Emr
from pave_lightning.merging.modulators import Modulator, PackedMasks
from pave_lightning.merging.running import MergedVectors, merge, merge_per_task, merge_static
from pave_lightning.merging.task_arithmetic import TaskArithmetic
from pave_lightning.merging.ties import Ties

__all__ = [
    "Average",
    "Dare",
    "DareOptions",
    "DareTies",
    "DareTiesOptions",
    "DroppedTaskVectors",
    "Emr",
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
