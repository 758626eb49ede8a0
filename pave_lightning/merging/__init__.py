"""Merge methods: one file each, all behind one interface."""

from pave_lightning.merging.base import (
    Cost,
    MergeMethod,
    MethodOptions,
    Modulated,
    PerTaskMethod,
    StaticMethod,
    known_methods,
    make_method,
    method_named,
    register,
)
from pave_lightning.merging.evidence import Evidence, Need
from pave_lightning.merging.matrices import MatrixMethod, MatrixOptions
from pave_lightning.merging.methods.ace import Ace
from pave_lightning.merging.methods.anchored import AnchoredRegression, DataFreeAnchoredRegression
from pave_lightning.merging.methods.average import Average
from pave_lightning.merging.methods.breadcrumbs import Breadcrumbs
from pave_lightning.merging.methods.cabs import Cabs
from pave_lightning.merging.methods.cat import Cat
from pave_lightning.merging.methods.core_space import CoreSpace
from pave_lightning.merging.methods.dare import (
    Dare,
    DareOptions,
    DareTies,
    DareTiesOptions,
    DroppedTaskVectors,
    kept_elements,
)
from pave_lightning.merging.methods.dc_merge import DcMerge
from pave_lightning.merging.methods.della import Della
from pave_lightning.merging.methods.devec import DeVec
from pave_lightning.merging.methods.disentanglement import Awd
from pave_lightning.merging.methods.distillation import Distillation
from pave_lightning.merging.methods.doge import DogeTa
from pave_lightning.merging.methods.emr import Emr
from pave_lightning.merging.methods.esm import Esm
from pave_lightning.merging.methods.feature_calibration import FeatureCalibration
from pave_lightning.merging.methods.fisher import Fisher
from pave_lightning.merging.methods.isotropic import IsoC, IsoCts
from pave_lightning.merging.methods.knots import Knots
from pave_lightning.merging.methods.lot import Lot
from pave_lightning.merging.methods.model_stock import ModelStock
from pave_lightning.merging.methods.opcm import Opcm
from pave_lightning.merging.methods.pcb import Pcb
from pave_lightning.merging.methods.peft_combinations import PeftCombination
from pave_lightning.merging.methods.perturb_and_merge import PerturbAndMerge
from pave_lightning.merging.methods.regmean import RegMean
from pave_lightning.merging.methods.regmean_blocks import RegMeanBlocks
from pave_lightning.merging.methods.robust_merge import RobustMerge
from pave_lightning.merging.methods.slerp import Slerp
from pave_lightning.merging.methods.tall_masks import Consensus, TallMasks
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.merging.methods.tatr import Tatr, TatrZeroShot
from pave_lightning.merging.methods.ties import Ties
from pave_lightning.merging.methods.tsv import TsvCompress, TsvMerge
from pave_lightning.merging.methods.weighted_average import WeightedAverage
from pave_lightning.merging.methods.wudi import Swudi, Wudi
from pave_lightning.merging.modulators import LowRank, Modulator, ModulatorWriter
from pave_lightning.merging.running import MergedVectors, merge, merge_per_task, merge_static
from pave_lightning.merging.sequential import RunningMean, RunningSum, SequentialMethod, SequentialState

__all__ = [
    "Ace",
    "AnchoredRegression",
    "Average",
    "Awd",
    "Breadcrumbs",
    "Cabs",
    "Cat",
    "Consensus",
    "CoreSpace",
    "Cost",
    "Dare",
    "DareOptions",
    "DareTies",
    "DareTiesOptions",
    "DataFreeAnchoredRegression",
    "DcMerge",
    "DeVec",
    "Della",
    "Distillation",
    "DogeTa",
    "DroppedTaskVectors",
    "Emr",
    "Esm",
    "Evidence",
    "FeatureCalibration",
    "Fisher",
    "IsoC",
    "IsoCts",
    "Knots",
    "Lot",
    "LowRank",
    "MatrixMethod",
    "MatrixOptions",
    "MergeMethod",
    "MergedVectors",
    "MethodOptions",
    "ModelStock",
    "Modulated",
    "Modulator",
    "ModulatorWriter",
    "Need",
    "Opcm",
    "Pcb",
    "PeftCombination",
    "PerTaskMethod",
    "PerturbAndMerge",
    "RegMean",
    "RegMeanBlocks",
    "RobustMerge",
    "RunningMean",
    "RunningSum",
    "SequentialMethod",
    "SequentialState",
    "Slerp",
    "StaticMethod",
    "Swudi",
    "TallMasks",
    "TaskArithmetic",
    "Tatr",
    "TatrZeroShot",
    "Ties",
    "TsvCompress",
    "TsvMerge",
    "WeightedAverage",
    "Wudi",
    "kept_elements",
    "make_method",
    "merge",
    "merge_per_task",
    "merge_static",
    "method_named",
    "known_methods",
    "register",
]
