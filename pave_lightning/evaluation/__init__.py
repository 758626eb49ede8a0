"""One evaluator for every model: base, experts, merged models of every form."""

from pave_lightning.evaluation.candidates import (
    Candidate,
    CheckpointCandidate,
    ExpertsCandidate,
    MergedCandidate,
    ModulatedCandidate,
    PurifiedExpertsCandidate,
)
from pave_lightning.evaluation.evaluator import Evaluator, Split, SuiteData, TaskScore, refuse_non_finite

__all__ = [
    "Candidate",
    "CheckpointCandidate",
    "Evaluator",
    "ExpertsCandidate",
    "MergedCandidate",
    "ModulatedCandidate",
    "PurifiedExpertsCandidate",
    "Split",
    "SuiteData",
    "TaskScore",
    "refuse_non_finite",
]
