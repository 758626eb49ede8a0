"""Models that can be scored: where the backbone's weights for a task come from, and what else a task puts in."""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from pave_lightning.config import WrittenDtype
from pave_lightning.errors import PaveError
from pave_lightning.merging.merged import MergedVectors
from pave_lightning.merging.modulators import Modulator
from pave_lightning.weights import Checkpoint, TaskVectors, rounded, written_dtype


class Candidate(ABC):
    """A model under evaluation.

    Attributes:
        shared: whether all tasks use the same backbone weights.
        own_configuration: whether a task's weights are used with its expert's configuration, where that computes
            something else than the base's.
    """

    shared: bool = True
    own_configuration: bool = False

    @abstractmethod
    def weights(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The backbone's tensors for a task, in their shapes, by their names inside the backbone, one at a time."""

    def adapt(self, model: nn.Module, task: str) -> nn.Module:
        """The model as the task is to run it: with modules put in, exchanged or hooked; by default as it is.

        Called once for each task, when its weights are there. Modules may be changed in place or wrapped: what is given
        is a copy that is dropped afterwards. It shares its tensors with other tasks, so values must not be changed in
        place; give a module new parameters instead. A head that was fitted anew, for example::

            def adapt(self, model, task):
                model.classifier = self.heads[task]
                return model

        Args:
            model: the task's model with its head, in eval mode, with the weights of :meth:`weights`.
            task: the task.

        Returns:
            A module that takes the same batches and gives the same form of output.
        """
        return model


def adapted(candidate: Candidate, model: nn.Module, task: str) -> nn.Module:
    """What a candidate makes of a copy of a task's model, in eval mode; the model stays as it is.

    Modules that the candidate puts in are moved to the model's device and dtype.

    Raises:
        RuntimeError: the candidate has changed the values of weights that the copy shares with the model.
    """
    shared = list(chain(model.parameters(), model.buffers()))
    versions = [_version(tensor) for tensor in shared]
    # A copy of all modules, but of no tensor, nor of blocks whose weights several processes hold in parts.
    kept = {id(one): one for one in [*shared, *_divided(model)]}
    found = candidate.adapt(copy.deepcopy(model, kept), task)
    if versions != [_version(tensor) for tensor in shared]:
        raise RuntimeError(
            f"{type(candidate).__name__}.adapt has changed weights in place for task '{task}', which other tasks use "
            "as well; put new parameters into the module instead"
        )
    return found.to(device=shared[0].device, dtype=shared[0].dtype).eval()


def _divided(model: nn.Module) -> list[nn.Module]:
    """The modules that FSDP2 has divided. Who has such a model has imported it, so this need not."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def _version(tensor: Tensor) -> int:
    """How often a tensor's values have been changed in place; 0 of tensors that do not keep count."""
    return 0 if tensor.is_inference() else tensor._version


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
    own_configuration = True

    def __init__(self, experts: Mapping[str, Checkpoint]) -> None:
        self._experts = dict(experts)

    def weights(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the task's expert."""
        expert = self._experts[task]
        for name in expert:
            yield name, expert.tensor(name)


class PurifiedExpertsCandidate(ExpertsCandidate):
    """Each task's own expert with its purified weights: what purification costs before anything is merged.

    Args:
        experts: each task's checkpoint.
        source: the purified task vectors.
    """

    def __init__(self, experts: Mapping[str, Checkpoint], source: TaskVectors) -> None:
        super().__init__(experts)
        self._source = source

    def weights(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the task's expert, the purified ones among them."""
        yield from super().weights(task)
        for parameter in self._source.parameters:
            yield parameter.name, self._source.expert(task, parameter)


class MergedCandidate(Candidate):
    """A merge result in memory; for trying scales and ratios without writing a model for each.

    Args:
        source: gives the base's tensors.
        merged: merged task vectors, and what per-task methods keep for each task.
        scale: what the merged task vector is multiplied with.
        dtype: in which type the model would be written, as `write_merged` takes it: what is scored are the rounded
            weights.
    """

    def __init__(
        self, source: TaskVectors, merged: MergedVectors, scale: float = 1.0, dtype: WrittenDtype = "base"
    ) -> None:
        self._source, self._merged, self._scale, self._dtype = source, merged, scale, dtype
        self.shared = not merged.per_task

    def weights(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors for a task: base + scale * the task's own vector, as they would be written.

        Of a per-task method the unified weights are written, and rounded; what a task makes of them is not.
        """
        for parameter in self._source.parameters:
            name, base = parameter.name, self._source.base(parameter)
            unified = self._merged.vectors[name]
            if self._merged.per_task:
                if self._written(name) != torch.float32:
                    unified = self._rounded(name, base + unified) - base
                yield name, base + self._scale * self._merged.own(task, name, unified)
            else:
                yield name, self._rounded(name, base + self._scale * unified)
        for name, value in chain(self._source.unmerged(), self._source.running_statistics()):
            yield name, self._rounded(name, value)

    def _written(self, name: str) -> torch.dtype:
        return written_dtype(self._dtype, self._source.stored_dtype(name))

    def _rounded(self, name: str, exact: Tensor) -> Tensor:
        try:
            return rounded(exact, self._written(name), name).float()
        except PaveError:  # what cannot be written has no scores
            return torch.full_like(exact, torch.nan)


class ModulatedCandidate(Candidate):
    """Shared weights that each task modulates: by a mask, by low-rank additions, by a factor.

    Args:
        base: the base's checkpoint.
        unified: checkpoint of base plus unified task vector.
        modulators: what each task keeps.
    """

    shared = False

    def __init__(self, base: Checkpoint, unified: Checkpoint, modulators: Mapping[str, Modulator]) -> None:
        self._base, self._unified, self._modulators = base, unified, dict(modulators)

    def weights(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The task's own weights: base + rescaler * (mask * unified task vector + low-rank addition)."""
        modulator = self._modulators[task]
        own = set(modulator)
        for name in self._unified:
            tensor = self._unified.tensor(name)
            if name in own:
                tensor = modulator.weight(name, self._base.tensor(name), tensor)
            yield name, tensor
