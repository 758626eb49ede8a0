"""Reading and writing model weights: lazily, one tensor at a time, safetensors only."""

from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.checkpoint import Checkpoint, weights_digest
from pave_lightning.weights.locate import locate_model
from pave_lightning.weights.parameters import Parameter, ParameterKind
from pave_lightning.weights.task_vectors import ExpertTaskVectors, TaskVectors, task_vectors
from pave_lightning.weights.writing import ShardWriter, file_sha256

__all__ = [
    "Architecture",
    "Checkpoint",
    "ExpertTaskVectors",
    "Parameter",
    "ParameterKind",
    "ShardWriter",
    "TaskVectors",
    "file_sha256",
    "locate_model",
    "task_vectors",
    "weights_digest",
]
