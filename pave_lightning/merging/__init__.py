"""Merge rules: one file each, all behind one interface."""

from pave_lightning.merging.ace import Ace
from pave_lightning.merging.anchored import AnchoredRegression, DataFreeAnchoredRegression
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
from pave_lightning.merging.breadcrumbs import Breadcrumbs
from pave_lightning.merging.cabs import Cabs
from pave_lightning.merging.cat import Cat
from pave_lightning.merging.core_space import CoreSpace
from pave_lightning.merging.dare import Dare, DareOptions, DareTies, DareTiesOptions, DroppedTaskVectors, kept_elements
from pave_lightning.merging.dc_merge import DcMerge
from pave_lightning.merging.della import Della
from pave_lightning.merging.devec import DeVec
from pave_lightning.merging.disentanglement import Awd
from pave_lightning.merging.distillation import Distillation
from pave_lightning.merging.doge import DogeTa
from pave_lightning.merging.emr import Emr
from pave_lightning.merging.esm import Esm
from pave_lightning.merging.evidence import Evidence, Need
from pave_lightning.merging.feature_calibration import FeatureCalibration
from pave_lightning.merging.fisher import Fisher
from pave_lightning.merging.isotropic import IsoC, IsoCts
from pave_lightning.merging.knots import Knots
from pave_lightning.merging.lot import Lot
from pave_lightning.merging.matrices import MatrixMethod, MatrixOptions
from pave_lightning.merging.model_stock import ModelStock
from pave_lightning.merging.modulators import LowRank, Modulator, ModulatorWriter
from pave_lightning.merging.opcm import Opcm
from pave_lightning.merging.pcb import Pcb
from pave_lightning.merging.peft_combinations import PeftCombination
from pave_lightning.merging.perturb_and_merge import PerturbAndMerge
from pave_lightning.merging.regmean import RegMean
from pave_lightning.merging.regmean_blocks import RegMeanBlocks
from pave_lightning.merging.robust_merge import RobustMerge
from pave_lightning.merging.running import MergedVectors, merge, merge_per_task, merge_static
from pave_lightning.merging.sequential import RunningMean, RunningSum, SequentialMethod, SequentialState
from pave_lightning.merging.slerp import Slerp
from pave_lightning.merging.tall_masks import Consensus, TallMasks
from pave_lightning.merging.task_arithmetic import TaskArithmetic
from pave_lightning.merging.tatr import Tatr, TatrZeroShot
from pave_lightning.merging.ties import Ties
from pave_lightning.merging.tsv import TsvCompress, TsvMerge
from pave_lightning.merging.weighted_average import WeightedAverage
from pave_lightning.merging.wudi import Swudi, Wudi

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
