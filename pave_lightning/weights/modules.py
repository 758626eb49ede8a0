"""Task vectors of models in memory: any `torch.nn.Module`, with no files and no configuration."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pave_lightning.errors import PaveError, Problems, listed, nearest
from pave_lightning.subspace import is_finite
from pave_lightning.weights.backbones import backbone_of, heads_beside, lies_in
from pave_lightning.weights.buffers import BufferKind, buffer_kinds
from pave_lightning.weights.fused import fused_parts
from pave_lightning.weights.parameters import Parameter, parameters_of
from pave_lightning.weights.task_vectors import TaskVectors
from pave_lightning.weights.ties import tied_names

StateDict: TypeAlias = Mapping[str, Tensor]
"""Names of a module's parameters and buffers -> their values."""


class ModuleTaskVectors(TaskVectors):
    """Task vectors of fine-tuned modules, read from the modules whenever they are asked for.

    What a parameter does is read off the module that owns it, as `PaveCallback` does, so that a layer has one name
    here and in the statistics. Models of transformers are split into backbone and head as their class says; of other
    modules all is merged but ``heads``. The modules must not be trained further while the task vectors are in use.

    Args:
        base: the module before fine-tuning, not one of the experts.
        experts: each task's fine-tuned module, or its state dict.
        heads: dotted names of submodules and parameters that each task keeps for itself, such as a classifier. They may
            be absent in the base, or of another shape there.

    Raises:
        PaveError: the experts do not fit the base, or a name of ``heads`` is nowhere; all problems are listed. Later,
            when a weight is read: it holds NaN or infinity.

    Example:
        >>> base = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> experts = {task: deepcopy(base) for task in ("digits", "signs")}
        >>> vectors = ModuleTaskVectors(base, experts, heads=["2"])
        >>> [(parameter.name, str(parameter.kind)) for parameter in vectors.parameters]
        [('0.weight', 'linear'), ('0.bias', 'bias')]
    """

    def __init__(
        self, base: nn.Module, experts: Mapping[str, nn.Module | StateDict], *, heads: Collection[str] = ()
    ) -> None:
        if not experts:
            raise PaveError("no experts are given")
        self._base = _Model.of(base, "base")
        self._experts = {task: _Model.of(found, f"expert of '{task}'") for task, found in experts.items()}
        self._heads = frozenset(heads) | self._base.beside
        self.tasks = tuple(experts)
        backbone = _backbone(self._base.module)
        self.parameters = tuple(
            parameter
            for name, parameter in parameters_of(backbone, fused_parts(backbone)).items()
            if not lies_in(name, self._heads) and self._base.state[name].is_floating_point()
        )
        self._buffers = {name: kind for name, kind in buffer_kinds(backbone).items() if not lies_in(name, self._heads)}
        problems = Problems("the experts do not fit the base:")
        problems.extend(self._unknown_heads(heads))
        for task, expert in self._experts.items():
            problems.extend(f"task '{task}': {problem}" for problem in self._differences(expert))
        problems.raise_if_any()

    def base(self, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The base's tensor (float32, on the CPU)."""
        return self._base.read(parameter, rows)

    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The fine-tuned tensor (float32, on the CPU)."""
        return self._experts[task].read(parameter, rows)

    def running_statistics(self) -> Iterator[tuple[str, Tensor]]:
        """The average over the experts of each running statistic (float32)."""
        for name, kind in self._buffers.items():
            found = [expert.state[name].detach() for expert in self._experts.values() if name in expert.state]
            if kind is BufferKind.STATISTICS and found and all(tensor.is_floating_point() for tensor in found):
                yield name, torch.stack([tensor.cpu().double() for tensor in found]).mean(dim=0).float()

    def without_factors(self, task: str) -> str | None:
        """Why no layer has low-rank factors."""
        return "task vectors of modules in memory are differences of weights, no products of adapters"

    def model(self, weights: StateDict, task: str | None = None) -> nn.Module:
        """A copy of the base with these weights; with a task, with that task's head.

        Args:
            weights: values of parameters and running statistics, by name; all others are the base's.
            task: whose head it has.

        Returns:
            A module of the class of the base, or of the task's expert, in its dtypes, on its devices, in eval mode.

        Raises:
            PaveError: there is no such task, or its expert was given as a state dict whose head does not fit the base.
        """
        if task is not None and task not in self._experts:
            raise PaveError(f"there is no task '{task}': {nearest(task, self.tasks)}")
        origin = self._base if task is None else self._experts[task]
        model = deepcopy((self._base if origin.whole is None else origin).module)
        target = _backbone(model)
        if origin.whole is None:
            self._put_head(target, origin)
        with torch.no_grad():
            for name, tensor in target.state_dict(keep_vars=True).items():
                if not lies_in(name, self._heads):
                    tensor.copy_(weights.get(name, self._base.state.get(name, tensor)))
        return model.eval()

    def _put_head(self, target: nn.Module, expert: _Model) -> None:
        """Give a copy of the base the head in an expert's state dict."""
        own = target.state_dict(keep_vars=True)
        head = {name: value for name, value in expert.state.items() if lies_in(name, self._heads)}
        wrong = [name for name, value in head.items() if name not in own or own[name].shape != value.shape]
        if wrong:
            raise PaveError(
                f"{expert.role} is a state dict, and the base has no place for its {listed(wrong, 3)}; give the "
                "expert's module, which has one"
            )
        with torch.no_grad():
            for name, value in head.items():
                own[name].copy_(value)

    def _unknown_heads(self, heads: Collection[str]) -> Iterator[str]:
        known = {
            part for model in (self._base, *self._experts.values()) for name in model.state for part in _above(name)
        }
        for head in heads:
            if head not in known:
                yield f"heads: no submodule or parameter is named '{head}'; {nearest(head, sorted(known))}"

    def _differences(self, expert: _Model) -> Iterator[str]:
        """What keeps an expert from being merged with others of the base."""
        if expert.whole is self._base.whole:
            yield "the expert is the base itself; copy the base before it is trained (copy.deepcopy)"
            return
        names = {p.name: p.shape for p in self.parameters}
        names |= {n: tuple(self._base.state[n].shape) for n, kind in self._buffers.items() if n in self._base.state}
        private = set()
        for name, shape in names.items():
            found = expert.state.get(name)
            if found is None and name not in self._buffers:
                yield f"{name} {list(shape)} is in the base, but not in the expert"
            elif found is not None and tuple(found.shape) != shape:
                private.add(name)
                yield f"{name} is {list(found.shape)} in the expert, {list(shape)} in the base"
        for name, tensor in expert.state.items():
            if not (name in self._base.state or lies_in(name, self._heads)) and tensor.is_floating_point():
                private.add(name)
                yield f"{name} {list(tensor.shape)} is in the expert, but not in the base"
        if private:
            owners = sorted({name.rpartition(".")[0] or name for name in private})
            yield f"where that is what the task keeps for itself, name it: heads={owners}"
        yield from self._unlike_ties(expert)
        yield from self._unlike_buffers(expert)

    def _unlike_ties(self, expert: _Model) -> Iterator[str]:
        for name, own in self._base.tied.items():
            if name in expert.state and own in expert.state and not torch.equal(expert.state[name], expert.state[own]):
                yield f"{own} and {name} are one tensor in the base, and two in the expert"
        for name, own in expert.tied.items():
            if self._base.tied.get(name) != own and name in self._base.state and own in self._base.state:
                yield f"{own} and {name} are one tensor in the expert, and two in the base"

    def _unlike_buffers(self, expert: _Model) -> Iterator[str]:
        for name, kind in self._buffers.items():
            own, other = self._base.state.get(name), expert.state.get(name)
            if kind is BufferKind.STATISTICS or own is None or other is None or own.shape != other.shape:
                continue
            if not torch.equal(own.detach().cpu(), other.detach().cpu().to(own.dtype)):
                yield (
                    f"the buffer {name} differs from the base's; buffers are not merged, so base and experts must have "
                    "the same"
                )


@dataclass(frozen=True)
class _Model:
    """One of the models.

    Attributes:
        role: what it is, for messages.
        whole: the module; None where it was given as a state dict.
        state: tensors of its backbone by name.
        beside: direct submodules of the backbone that are its head.
        tied: other names of parameters -> the first name of each.
    """

    role: str
    whole: nn.Module | None
    state: StateDict
    beside: frozenset[str]
    tied: Mapping[str, str]

    @classmethod
    def of(cls, given: nn.Module | StateDict, role: str) -> _Model:
        if isinstance(given, Mapping) and all(isinstance(tensor, Tensor) for tensor in given.values()):
            return cls(role, None, given, frozenset(), {})
        if not isinstance(given, nn.Module):
            raise PaveError(
                f"{role}: expected a module, found {type(given).__name__}; base and experts are modules (experts also "
                "state dicts), or else all of them folders or hub ids"
            )
        whole = getattr(given, "_orig_mod", given)  # the wrapper that torch.compile puts around it
        if callable(getattr(whole, "merge_and_unload", None)):
            raise PaveError(f"{role}: its adapters are not merged into its weights; give model.merge_and_unload()")
        backbone = _backbone(whole)
        state = backbone.state_dict(keep_vars=True)
        lacking = [name for name, tensor in state.items() if tensor.is_meta]
        if lacking:
            raise PaveError(f"{role}: {len(lacking)} weights have no values (meta device), first {lacking[0]}")
        return cls(role, whole, state, heads_beside(whole) if _has_config(whole) else frozenset(), tied_names(backbone))

    @property
    def module(self) -> nn.Module:
        """The module as it was given."""
        if self.whole is None:
            raise PaveError(f"{self.role}: a state dict does not say what its tensors do; give the module")
        return self.whole

    def read(self, parameter: Parameter, rows: slice | None) -> Tensor:
        """A parameter's values, or some rows of them, in memory of their own (float32, on the CPU)."""
        found = self.state[parameter.name].detach()
        tensor = (found if rows is None else found[rows]).to("cpu", torch.float32, copy=True)
        if not is_finite(tensor):
            raise PaveError(f"{self.role}: the weight {parameter.name} holds NaN or infinity")
        return tensor.contiguous()


def _has_config(module: nn.Module) -> bool:
    """Whether it is a model of transformers."""
    return hasattr(module, "config") and isinstance(getattr(module, "base_model_prefix", None), str)


def _backbone(module: nn.Module) -> nn.Module:
    """The part of a model of transformers below its head; any other module itself."""
    return module if not _has_config(module) or heads_beside(module) else backbone_of(module)


def _above(name: str) -> Iterator[str]:
    """A name, and the names of all modules that it lies in."""
    while name:
        yield name
        name = name.rpartition(".")[0]
