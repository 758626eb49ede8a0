"""Reading and writing model weights: lazily, one tensor at a time, safetensors only."""

from pave_lightning.subspace import is_finite
from pave_lightning.weights.adapters import Adapter
from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.checkpoint import Checkpoint, model_digest
from pave_lightning.weights.locate import locate_model
from pave_lightning.weights.modules import ModuleTaskVectors
from pave_lightning.weights.parameters import ADDITIVE, Parameter, ParameterKind
from pave_lightning.weights.rounding import rounded, written_dtype
from pave_lightning.weights.sources import task_vectors
from pave_lightning.weights.task_vectors import DerivedTaskVectors, ExpertTaskVectors, TaskVectors
from pave_lightning.weights.writing import ShardWriter

__all__ = [
    "ADDITIVE",
    "Adapter",
    "Architecture",
    "Checkpoint",
    "DerivedTaskVectors",
    "ExpertTaskVectors",
    "ModuleTaskVectors",
    "Parameter",
    "ParameterKind",
    "ShardWriter",
    "TaskVectors",
    "is_finite",
    "locate_model",
    "model_digest",
    "rounded",
    "task_vectors",
    "written_dtype",
]
