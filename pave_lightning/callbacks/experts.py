"""What reaches each expert of a mixture, from the products that its weights, one stack of matrices, are used in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from pave_lightning.callbacks.observation import weight_owners
from pave_lightning.callbacks.padding import PartOf, whole
from pave_lightning.callbacks.sampling import Calls, RowSampler
from pave_lightning.errors import PaveError
from pave_lightning.layers import stacked_axis
from pave_lightning.statistics import LayerMoment, Moments, SecondMoment, captured_kind
from pave_lightning.statistics.second_moment import full_precision

# Functions whose second factor is a weight, and which of its last two axes they sum over.
_PRODUCTS = {"linear": -1, "matmul": -2, "__matmul__": -2, "mm": -2, "bmm": -2}
_INDEXED = ("__getitem__", "index_select")
_JOINED = ("cat", "concat", "concatenate")
_LAID_OUT = ("reshape", "view", "flatten")
_DIVIDED = ("split", "chunk", "tensor_split", "unbind")
# Rows of an expert are chosen among those that reached it: the padding is out already.
_PART = "experts"
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass
class _Stack:
    """The matrices of one parameter, and what has reached each of them."""

    name: str
    module: nn.Module
    attribute: str
    axis: int
    moments: Moments
    keep_rows: bool
    sums: dict[int, SecondMoment] = field(default_factory=dict)
    calls: dict[int, Calls] = field(default_factory=dict)

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, getattr(self.module, self.attribute))

    @property
    def layers(self) -> list[str]:
        """Names of the experts' layers."""
        return [f"{self.name}.{number}" for number in range(len(self.weight))]

    def matrix(self, number: int) -> Tensor:
        """One expert's matrix, ``(d_out, d_in)``."""
        stored = self.weight.detach()[number]
        return stored.T if self.axis == 1 else stored

    def ensure(self, number: int, device: torch.device) -> SecondMoment:
        if number not in self.sums:
            # Not of the matrix itself: outside of forward passes processes may hold parts of it.
            height, width = self.weight.shape[:0:-1] if self.axis == 1 else self.weight.shape[1:]
            kind = captured_kind(self.moments, height, width)
            out_features = None if kind == "input" else height
            self.sums[number] = SecondMoment(width, out_features, kind=kind, keep_rows=self.keep_rows, device=device)
            self.calls[number] = Calls()
        return self.sums[number]

    def number_of(self, factor: Tensor) -> int | None:
        """Which expert's whole matrix a factor is; -1 for all of them; None where it is none of them."""
        weight = self.weight
        offset = factor.data_ptr() - weight.data_ptr()
        if not 0 <= offset < weight.nbytes or factor.dtype != weight.dtype:
            return None
        if factor.ndim == 3:
            return -1 if factor.numel() == weight.numel() else None
        number, rest = divmod(offset, weight.stride(0) * weight.itemsize)
        return number if factor.ndim == 2 and factor.numel() == weight[0].numel() and not rest else None


def expert_stacks(backbone: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The experts' weights below a module: name of their layer -> the module that owns them and their attribute."""
    found: dict[str, tuple[nn.Module, str]] = {}
    attributes = {name for module in backbone.modules() for name in dict(module.named_parameters(recurse=False))}
    for attribute in sorted(attributes):

        def owned(module: nn.Module, attribute: str = attribute) -> str | None:
            own = dict(module.named_parameters(recurse=False))
            return attribute if attribute in own and stacked_axis(module, attribute) is not None else None

        for owner, modules in weight_owners(backbone, owned).items():
            found[owner if attribute == "weight" else f"{owner}.{attribute}"] = modules[0], attribute
    return found


class ExpertObserver:
    """Accumulates one second moment for each expert of a mixture and each of its projections.

    transformers keeps the experts' weights as one parameter with three axes, which no module multiplies with. So the
    products are watched in which one expert's matrix is used, inside of the module that holds the mixture; that module
    is made to treat its experts one by one for as long as it is watched. Rows of padded positions are followed from
    what that module is given to the experts, by the ways in which rows are picked and divided; where they are lost on
    the way, all rows count and `has_lost_padding` says so.

    Args:
        backbone: the module in which mixtures are sought.
        moments: as of `LinearObserver`.
        sampler: which rows to count; it is told of batches by somebody else.
        part_of: gives the part of the model whose padding mask an input of a module has.
        keep_rows: whether experts that have counted fewer rows than they are wide keep the rows.

    Attributes:
        has_lost_padding: whether rows have reached an expert of which nobody knows whether they are padding.
    """

    def __init__(
        self,
        backbone: nn.Module,
        moments: Moments,
        sampler: RowSampler,
        part_of: PartOf = whole,
        *,
        keep_rows: bool = True,
    ) -> None:
        self._sampler, self._part_of = sampler, part_of
        self._batch = 0
        self.has_lost_padding = False
        self._stacks = [
            _Stack(name, module, attribute, stacked_axis(module, attribute) or 2, moments, keep_rows)
            for name, (module, attribute) in expert_stacks(backbone).items()
        ]
        self._handles: list[RemovableHandle] = []
        self._switches = ExitStack()
        self._watches: list[_Products | None] = []
        parents = {module: parent for parent in backbone.modules() for module in parent.children()}
        mixtures: dict[nn.Module, list[_Stack]] = {}
        for stack in self._stacks:
            mixtures.setdefault(parents.get(stack.module, stack.module), []).append(stack)
        for mixture, stacks in mixtures.items():
            # The module around the experts may have other methods called than its forward.
            # In the one around that, whose rows still lie as the mask does, following begins.
            around = [parents[mixture]] if mixture in parents and not isinstance(parents[mixture], _LISTS) else []
            for module in dict.fromkeys([*around, mixture, *(stack.module for stack in stacks)]):
                self._handles.append(module.register_forward_pre_hook(partial(self._enter, stacks), with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        for config in {id(c): c for s in self._stacks for c in [getattr(s.module, "config", None)] if c}.values():
            implementation = getattr(config, "_experts_implementation", None)
            if implementation is not None:
                self._switches.callback(setattr, config, "_experts_implementation", implementation)
                config._experts_implementation = "eager"

    @property
    def layers(self) -> list[str]:
        """Names of the layers of all experts: name of the stack and number."""
        return [layer for stack in self._stacks for layer in stack.layers]

    def begin_batch(self) -> None:
        """Note that a new batch begins, after the sampler has been told."""
        self._batch += 1
        if self._stacks:
            self._sampler.add_mask(_PART, None)

    def remove(self) -> None:
        """Take the hooks off again and let the mixtures work as before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self._watches:
            self._leave()
        self._switches.close()

    def reduce(self, device: torch.device) -> None:
        """Add up what all processes have seen; does nothing without torch.distributed.

        Args:
            device: where a process holds the sums of experts that only other processes have reached.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        for stack in self._stacks:
            for number in range(len(stack.weight)):
                stack.ensure(number, device).all_reduce()

    def moments(self) -> Iterator[tuple[str, LayerMoment]]:
        """Means of all experts that a row has reached, on the CPU.

        Raises:
            PaveError: an expert has seen NaN or infinite values.
        """
        for stack in self._stacks:
            for number, sums in sorted(stack.sums.items()):
                if not sums.rows:
                    continue
                found = sums.moment()
                if not torch.isfinite(found.matrix).all():
                    raise PaveError(
                        f"expert {number} of '{stack.name}' has seen NaN or infinite values in the {found.rows} rows "
                        "of its input (tokens) that this pass counted: check the expert's weights and the precision of "
                        "the Trainer"
                    )
                yield f"{stack.name}.{number}", found

    def _enter(
        self, stacks: Sequence[_Stack], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = next(
            (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1), None
        )
        real = None
        if given is not None and self._sampler.has_padding:
            leading = tuple(given.shape[:-1])
            index, _ = self._sampler.choose(leading, part=self._part_of(module, given))
            if index is not None:
                real = torch.zeros(math.prod(leading), dtype=torch.bool, device=given.device)
                real[index.to(real.device)] = True
        known = next((watch for watch in self._watches if watch is not None and watch.stacks is stacks), None)
        if known is not None:
            known.begin(given, real)
            self._watches.append(None)  # for what leaves this module
            return
        watch = _Products(stacks, self._count, given, real, pads=self._sampler.has_padding)
        self._watches.append(watch)
        watch.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, *_: Any) -> None:
        watch = self._watches.pop() if self._watches else None
        if watch is not None:
            watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _count(self, stack: _Stack, number: int, rows: Tensor, is_padding_known: bool) -> None:
        """Count rows, ``(n, d_in)``, that have reached an expert."""
        self.has_lost_padding |= not is_padding_known
        moment = stack.ensure(number, rows.device)
        call = stack.calls[number].begin(self._batch, moment.rows)
        allowance = self._sampler.allowance(stack.calls[number].counted)
        index, seen = self._sampler.choose((len(rows),), allowance, call, stack.calls[number].expected, _PART)
        chosen = rows.detach() if index is None else rows.detach()[index.to(rows.device)]
        if moment.kind == "input":
            moment.update(chosen, seen=seen)
            return
        with full_precision(chosen.device.type):
            outputs = nn.functional.linear(chosen.float(), stack.matrix(number).float())
        moment.update(chosen if moment.kind == "cross" else None, outputs, seen=seen)


class _Products(TorchFunctionMode):
    """Within, the products with experts' matrices are counted, and rows that are padding are followed.

    Args:
        stacks: whose products.
        count: is given a stack, an expert's number, the rows that it multiplies, and whether padding was told apart.
        given: what the mixture is given, ``(..., d)``.
        real: which rows of it are no padding; None where nobody knows, or all are.
        pads: whether there is padding in the batch.
    """

    def __init__(
        self,
        stacks: Sequence[_Stack],
        count: Callable[[_Stack, int, Tensor, bool], None],
        given: Tensor | None,
        real: Tensor | None,
        *,
        pads: bool,
    ) -> None:
        super().__init__()
        self.stacks, self._count = stacks, count
        self._pads = pads
        self._real: Any = WeakIdKeyDictionary()  # tensors are told apart by identity
        self._places: dict[tuple[int, ...], Tensor] = {}
        self.begin(given, real)

    def begin(self, given: Tensor | None, real: Tensor | None) -> None:
        """Follow the rows of a further tensor; arguments as of the class."""
        if given is not None and real is not None:
            self._real[given] = real
            if given.ndim == 3:
                self._places[tuple(given.shape[:2])] = real

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS and len(args) > 1:
            self._watch(args[0], args[1], _PRODUCTS[name])
        if self._pads:
            self._follow(name, args, found)
        return found

    def _watch(self, rows: Tensor, factor: Tensor, summed: int) -> None:
        for stack in self.stacks:
            number = stack.number_of(factor)
            # A product along the other axis is not that of the layer.
            if number is None or factor.stride(summed) != stack.weight.stride(stack.axis):
                continue
            real = self._real.get(rows)
            known = real is not None or not self._pads
            if number >= 0:
                flat = rows.reshape(-1, rows.shape[-1])
                self._count(stack, number, flat if real is None else flat[real], known)
                continue
            # All experts at once: what is not meant for one of them is zero.
            for one, own in enumerate(rows):
                reached = own.any(dim=-1)
                reached &= True if real is None else real.reshape(len(rows), -1)[one]
                if bool(reached.any()):
                    self._count(stack, one, own[reached], known)

    def _follow(self, name: str, args: Sequence[Any], found: Any) -> None:
        if name in _JOINED and args and isinstance(args[0], tuple | list):
            pieces = [self._real.get(one) for one in args[0]]
            if all(real is not None for real in pieces) and sum(map(len, pieces)) == len(found):
                self._real[found] = torch.cat(pieces)
            return
        source = next((value for value in args if isinstance(value, Tensor) and value in self._real), None)
        if source is None:
            self._flatten(name, args, found)
            return
        real = self._real[source]
        if name in _INDEXED and args[0] is source:
            index = args[-1]
            if isinstance(index, Tensor) and index.ndim == 1 and len(real) == len(source) and isinstance(found, Tensor):
                self._real[found] = real[index]
                return
        if name in _DIVIDED and isinstance(found, tuple | list) and sum(len(one) for one in found) == len(real):
            for one, own in zip(found, real.split([len(one) for one in found]), strict=True):
                self._real[one] = own
            return
        if name == "repeat" and isinstance(found, Tensor) and found.shape[-1] == source.shape[-1]:
            self._real[found] = real.repeat(math.prod(found.shape[:-1]) // len(real))
            return
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, Tensor) and one.ndim > 1 and math.prod(one.shape[:-1]) == len(real):
                self._real[one] = real

    def _flatten(self, name: str, args: Sequence[Any], found: Any) -> None:
        """Rows that a model lays out anew, ``(B, L, ..., d)`` to ``(n, d)``, are as their places in the mask are."""
        source = args[0] if args else None
        if name not in _LAID_OUT or not isinstance(source, Tensor) or not isinstance(found, Tensor) or found.ndim != 2:
            return
        real = self._places.get(tuple(source.shape[:2])) if source.ndim > 2 else None
        if real is not None and found.shape[-1] == source.shape[-1] and len(found) % len(real) == 0:
            self._real[found] = real.repeat_interleave(len(found) // len(real))
