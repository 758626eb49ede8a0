"""The memory that training and searching take, beside that of purifying and merging (see `pipeline.costs`)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from pave_lightning.evaluation.options import ScaleSearch
from pave_lightning.pipeline.stacks import TransformStack
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.tasks.lora import trained_values
from pave_lightning.tasks.task import Task
from pave_lightning.weights import Parameter
from pave_lightning.weights.backbones import lies_in

# What a run loads besides a plan, and how much memory that takes (measured on Linux, Python 3.11, torch 2.13).
LOADED_LATER = {
    "transformers.modeling_utils": 107_000_000,
    "lightning": 81_000_000,
    "mlflow": 85_000_000,
    "datasets": 17_000_000,
    "scipy.linalg": 16_000_000,
}
# AdamW keeps two values a weight, in float32.
OPTIMIZER_VALUES = 2
# Lightning puts a checkpoint together in a buffer, and copies that once more before it is written.
CHECKPOINT_COPIES = 2
HALF_PRECISIONS = ("16-mixed", "bf16-mixed", "16-true", "bf16-true")
# Tensors of the widest layer that stand at once in a pass without gradients: its input, its output, what comes next.
PASS_TENSORS = 3


def later_bytes() -> int:
    """What a run loads besides what this process has loaded by now."""
    return sum(size for module, size in LOADED_LATER.items() if module not in sys.modules)


def fit_bytes(parameters: Sequence[Parameter], task: Task) -> int:
    """The most that fine-tuning a task's expert holds in memory, the program itself aside.

    Weights, gradients and AdamW's moments in float32; the checkpoint of an epoch, which is put together in memory; and
    what a step of the longest sequences keeps for its gradients: input and output of every matrix layer. The last two
    do not meet in time, but memory that one of them frees is seldom in the shape that the other needs.

    Args:
        parameters: the parameters of the backbone.
        task: its ``training`` and ``trainer`` sections are used.
    """
    options = task.training
    weights = sum(parameter.elements for parameter in parameters)
    matrices = [parameter for parameter in parameters if parameter.is_matrix]
    trained = [parameter for parameter in parameters if not lies_in(parameter.layer, options.freeze)]
    values = sum(parameter.elements for parameter in trained)
    if options.lora is not None:
        values = trained_values(options.lora, parameters, "", options.freeze)
        weights += values
    state = 4 * (weights + OPTIMIZER_VALUES * values)
    half = str(task.trainer.get("precision", "32-true")) in HALF_PRECISIONS
    tokens = options.batch_size * options.max_length
    kept = tokens * sum(sum(parameter.matrix_shape) for parameter in matrices) * (2 if half else 4)
    return round(state + 4 * values + kept + CHECKPOINT_COPIES * state)


def search_bytes(
    parameters: Sequence[Parameter],
    merges: Iterable[tuple[MergeStep, TransformStack]],
    tasks: Sequence[Task],
    batch_size: int,
) -> int:
    """The most that scoring merged models in memory holds, the program itself aside; 0 where nothing is searched.

    The model that is scored, the merge result and, where options or ratios are chosen, the best result so far.

    Args:
        parameters: the parameters of the backbone.
        merges: the merge steps that are made, each with what is done to its task vectors before.
        tasks: their ``max_length`` bounds a batch.
        batch_size: examples a forward pass.
    """
    weights = 4 * sum(parameter.elements for parameter in parameters)
    widest = max((sum(parameter.matrix_shape) for parameter in parameters if parameter.is_matrix), default=0)
    longest = max((task.training.max_length for task in tasks), default=0)
    passing = 4 * PASS_TENSORS * batch_size * longest * widest
    # Where options or ratios are chosen, the best merge result so far is kept beside the next one.
    chosen = [(step.scale, bool(step.tune) or stack.is_chosen) for step, stack in merges]
    models = [2 + chooses for scale, chooses in chosen if isinstance(scale, ScaleSearch) or chooses]
    return max(models) * weights + passing if models else 0
