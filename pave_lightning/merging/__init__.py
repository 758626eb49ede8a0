"""Merge rules: one file each, all behind one interface."""

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
from pave_lightning.merging.evidence import Evidence, Need
from pave_lightning.merging.matrices import MatrixMethod, MatrixOptions
from pave_lightning.merging.modulators import LowRank, Modulator, ModulatorWriter
from pave_lightning.merging.rules.ace import Ace
from pave_lightning.merging.rules.anchored import AnchoredRegression, DataFreeAnchoredRegression
from pave_lightning.merging.rules.average import Average
from pave_lightning.merging.rules.breadcrumbs import Breadcrumbs
from pave_lightning.merging.rules.cabs import Cabs
from pave_lightning.merging.rules.cat import Cat
from pave_lightning.merging.rules.core_space import CoreSpace
from pave_lightning.merging.rules.dare import (
    Dare,
    DareOptions,
    DareTies,
    DareTiesOptions,
    DroppedTaskVectors,
    kept_elements,
)
from pave_lightning.merging.rules.dc_merge import DcMerge
from pave_lightning.merging.rules.della import Della
from pave_lightning.merging.rules.devec import DeVec
from pave_lightning.merging.rules.disentanglement import Awd
from pave_lightning.merging.rules.distillation import Distillation
from pave_lightning.merging.rules.doge import DogeTa
from pave_lightning.merging.rules.emr import Emr
from pave_lightning.merging.rules.esm import Esm
from pave_lightning.merging.rules.feature_calibration import FeatureCalibration
from pave_lightning.merging.rules.fisher import Fisher
from pave_lightning.merging.rules.isotropic import IsoC, IsoCts
from pave_lightning.merging.rules.knots import Knots
from pave_lightning.merging.rules.lot import Lot
from pave_lightning.merging.rules.model_stock import ModelStock
from pave_lightning.merging.rules.opcm import Opcm
from pave_lightning.merging.rules.pcb import Pcb
from pave_lightning.merging.rules.peft_combinations import PeftCombination
from pave_lightning.merging.rules.perturb_and_merge import PerturbAndMerge
from pave_lightning.merging.rules.regmean import RegMean
from pave_lightning.merging.rules.regmean_blocks import RegMeanBlocks
from pave_lightning.merging.rules.robust_merge import RobustMerge
from pave_lightning.merging.rules.slerp import Slerp
from pave_lightning.merging.rules.tall_masks import Consensus, TallMasks
from pave_lightning.merging.rules.task_arithmetic import TaskArithmetic
from pave_lightning.merging.rules.tatr import Tatr, TatrZeroShot
from pave_lightning.merging.rules.ties import Ties
from pave_lightning.merging.rules.tsv import TsvCompress, TsvMerge
from pave_lightning.merging.rules.weighted_average import WeightedAverage
from pave_lightning.merging.rules.wudi import Swudi, Wudi
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
    "methods",
    "register",
]
