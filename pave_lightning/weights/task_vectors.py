"""The one interface of the merge stage: a source of task vectors, read one parameter at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from pave_lightning.errors import PaveError, Problems
from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.checkpoint import Checkpoint, is_finite
from pave_lightning.weights.locate import locate_model
from pave_lightning.weights.parameters import Parameter

BLOCK_ELEMENTS = 1_000_000
# Values in config.json that must agree between a base and its experts for their weights to be comparable.
COMPARED_CONFIG = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act")


class TaskVectors(ABC):
    """Base and expert weights of several tasks, parameter by parameter; never two whole models in memory.

    Attributes:
        tasks: names of the tasks, in order.
        parameters: the floating-point parameters that base and experts share, in the order of the base.
    """

    tasks: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    @abstractmethod
    def base(self, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The base's tensor (float32), or the given rows of its first axis."""

    @abstractmethod
    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The fine-tuned tensor of a task (float32), or the given rows of its first axis."""

    def vector(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The task vector: fine-tuned minus base (float32)."""
        return self.expert(task, parameter, rows) - self.base(parameter, rows)

    def blocks(self, parameter: Parameter, elements: int = BLOCK_ELEMENTS) -> Iterator[slice | None]:
        """Slices of rows of at most about ``elements`` values each, so that elementwise rules need little memory."""
        if not parameter.shape or parameter.elements <= elements:
            yield None
            return
        step = max(1, elements * parameter.shape[0] // parameter.elements)
        for start in range(0, parameter.shape[0], step):
            yield slice(start, min(start + step, parameter.shape[0]))


class ExpertTaskVectors(TaskVectors):
    """Task vectors of expert checkpoints of one base.

    Args:
        base: the base's checkpoint.
        experts: each task's checkpoint.
        architecture: the experts' architecture, which says what kind each parameter is.

    Raises:
        PaveError: base and experts differ in layer names or shapes; all differences are listed, up to 20.
    """

    def __init__(self, base: Checkpoint, experts: Mapping[str, Checkpoint], architecture: Architecture) -> None:
        problems = Problems("the experts do not fit the base:")
        for task, expert in experts.items():
            problems.extend(differences(task, base, expert, architecture))
        problems.raise_if_any()
        shared = set.intersection(*(set(expert.backbone) for expert in experts.values())) if experts else set()
        self._base, self._experts = base, dict(experts)
        self.tasks = tuple(experts)
        self.parameters = tuple(
            architecture.describe(name, stored.shape)
            for name, stored in sorted(base.backbone.items())
            if name in shared and stored.is_floating and not architecture.ignores(name)
        )

    def base(self, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The base's tensor (float32)."""
        return self._finite(self._base, parameter, rows)

    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The fine-tuned tensor (float32)."""
        return self._finite(self._experts[task], parameter, rows)

    @staticmethod
    def _finite(checkpoint: Checkpoint, parameter: Parameter, rows: slice | None) -> Tensor:
        tensor = checkpoint.tensor(parameter.name, rows).float()
        if not is_finite(tensor):
            raise PaveError(f"{checkpoint.folder}: the weight {parameter.name} holds NaN or infinity")
        return tensor


def absent_children(base: Checkpoint, expert: Iterable[str]) -> set[str]:
    """Direct submodules of the backbone that the base has no tensor of at all, such as a pooler that was never trained.

    They start at random in every expert, so they belong to the head and are not merged.

    Args:
        base: the base's checkpoint.
        expert: names of the expert's backbone tensors; a checkpoint is one.
    """
    of_base = {name.partition(".")[0] for name in base.backbone}
    return {name.partition(".")[0] for name in expert} - of_base


def differences(task: str, base: Checkpoint, expert: Checkpoint, architecture: Architecture) -> list[str]:
    """What keeps an expert from being merged with others of that base: names and shapes, from the headers alone.

    Index buffers and other tensors that the architecture ignores may differ: not every release of transformers stores
    them.
    """
    found = []
    private = absent_children(base, expert)
    of_expert = {name.partition(".")[0] for name in expert.backbone}
    for name, stored in expert.backbone.items():
        if name.partition(".")[0] in private or not stored.is_floating or architecture.ignores(name):
            continue
        if name not in base.backbone:
            found.append(f"task '{task}': {name} {list(stored.shape)} is in the expert, but not in the base")
        elif stored.shape != base.backbone[name].shape:
            found.append(
                f"task '{task}': {name} is {list(stored.shape)} in the expert, "
                f"{list(base.backbone[name].shape)} in the base"
            )
    for name, stored in base.backbone.items():
        # A child that the expert lacks altogether (a pooler its architecture drops) stays as it is in the base.
        matters = stored.is_floating and not architecture.ignores(name) and name.partition(".")[0] in of_expert
        if name not in expert.backbone and matters:
            found.append(f"task '{task}': {name} {list(stored.shape)} is in the base, but not in the expert")
    return found


def config_differences(task: str, base: Architecture, expert: Architecture) -> list[str]:
    """Values of ``config.json`` in which an expert differs from the base although merging needs them equal."""
    return [
        f"task '{task}': {key} is {expert.config.get(key)!r} in the expert's config.json, "
        f"{base.config.get(key)!r} in the base's"
        for key in COMPARED_CONFIG
        if base.config.get(key) != expert.config.get(key)
    ]


def task_vectors(base: str, experts: Mapping[str, str]) -> ExpertTaskVectors:
    """Task vectors of fine-tuned checkpoints, read lazily.

    Args:
        base: folder, hub id, or ``package:NAME/FOLDER`` of the base model.
        experts: the same for each task's fine-tuned sequence-classification checkpoint.

    Raises:
        PaveError: a model is missing, or the experts do not fit the base (all differences are listed).
    """
    folders = {task: locate_model(reference, role=f"expert of '{task}'") for task, reference in experts.items()}
    if not folders:
        raise PaveError("no experts are given")
    architecture = Architecture.of_folder(next(iter(folders.values())))
    base_checkpoint = Checkpoint(locate_model(base, role="base"), architecture.prefix)
    checkpoints = {task: Checkpoint(folder, architecture.prefix) for task, folder in folders.items()}
    return ExpertTaskVectors(base_checkpoint, checkpoints, architecture)
