"""Models that can be scored: where the backbone's weights for a task come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

from torch import Tensor

from pave_lightning.merging.modulators import Modulator
from pave_lightning.weights import Checkpoint, TaskVectors


class Candidate(ABC):
    """A model under evaluation.

    Attributes:
        shared: whether all tasks use the same backbone weights.
    """

    shared: bool = True

    @abstractmethod
    def weights(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The backbone's tensors for a task, by their names inside the backbone, one at a time."""


class CheckpointCandidate(Candidate):
    """One checkpoint for all tasks: the base, or a static merged model."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def weights(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors, whatever the task."""
        for name in self._checkpoint:
            yield name, self._checkpoint.tensor(name)


class ExpertsCandidate(Candidate):
    """Each task's own expert."""

    shared = False

    def __init__(self, experts: Mapping[str, Checkpoint]) -> None:
        self._experts = dict(experts)

    def weights(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the task's expert."""
        expert = self._experts[task]
        for name in expert:
            yield name, expert.tensor(name)


class ScaledCandidate(Candidate):
    """The base plus a multiple of a merged task vector; for trying scales without writing a model for each."""

    def __init__(self, source: TaskVectors, vectors: Mapping[str, Tensor], scale: float) -> None:
        self._source, self._vectors, self._scale = source, vectors, scale

    def weights(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The scaled tensors, whatever the task."""
        for parameter in self._source.parameters:
            yield parameter.name, self._source.base(parameter) + self._scale * self._vectors[parameter.name]


class ModulatedCandidate(Candidate):
    """Shared weights that each task masks and rescales.

    Args:
        base: the base's checkpoint.
        unified: checkpoint of base plus unified task vector.
        modulators: each task's masks and factor.
    """

    shared = False

    def __init__(self, base: Checkpoint, unified: Checkpoint, modulators: Mapping[str, Modulator]) -> None:
        self._base, self._unified, self._modulators = base, unified, dict(modulators)

    def weights(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The task's own weights: base + rescaler * mask * unified task vector."""
        modulator = self._modulators[task]
        masked = set(modulator)
        for name in self._unified:
            tensor = self._unified.tensor(name)
            if name in masked:
                base = self._base.tensor(name).float()
                tensor = base + modulator.apply(name, tensor.float() - base)
            yield name, tensor
