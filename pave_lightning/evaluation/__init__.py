"""One evaluator for every model: base, experts, merged models of every form."""

from pave_lightning.evaluation.candidates import (
    Candidate,
    CheckpointCandidate,
    ExpertsCandidate,
    ModulatedCandidate,
    ScaledCandidate,
)
from pave_lightning.evaluation.evaluator import Evaluator, Split, SuiteData, TaskScore

__all__ = [
    "Candidate",
    "CheckpointCandidate",
    "Evaluator",
    "ExpertsCandidate",
    "ModulatedCandidate",
    "ScaledCandidate",
    "Split",
    "SuiteData",
    "TaskScore",
]
