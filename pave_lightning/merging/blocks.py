"""The stack of blocks of a backbone: how the model itself calls each of them, and walking through them one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pave_lightning.errors import PaveError
from pave_lightning.layers import is_linear, is_norm
from pave_lightning.tasks.kinds.tokens import MASK, TOKENS
from pave_lightning.weights import Parameter

Batch = Mapping[str, Tensor]
# What a walk through the blocks may differ from the model's own pass by, relative to the largest value.
AGREEMENT = 1e-5
# What a model's own code raises when it cannot be run as it is asked to.
MODEL_FAILURES = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, AssertionError)


@dataclass(frozen=True)
class Call:
    """How a model calls one of its blocks.

    Attributes:
        arguments: what the block is given by position; the hidden states are replaced by None.
        keywords: what it is given by name, likewise.
        place: where the hidden states go: an index of ``arguments`` or a name of ``keywords``.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    place: int | str

    @classmethod
    def split(cls, arguments: tuple[Any, ...], keywords: Mapping[str, Any], place: int | str) -> Call:
        """A call without the hidden states, which stand at that place."""
        others = tuple(None if index == place else given for index, given in enumerate(arguments))
        return cls(others, {name: None if name == place else given for name, given in keywords.items()}, place)

    def on(self, block: nn.Module, hidden: Tensor) -> Any:
        """What a block returns for hidden states, shape ``(B, L, d)``, with all else as it was."""
        if isinstance(self.place, int):
            before, after = self.arguments[: self.place], self.arguments[self.place + 1 :]
            return block(*before, hidden, *after, **self.keywords)
        return block(*self.arguments, **{**self.keywords, self.place: hidden})


@dataclass
class Entry:
    """One batch on its way through the blocks.

    Attributes:
        hidden: hidden states before the next block, shape ``(B, L, d)``.
        calls: how the model calls each of its blocks on this batch.
        mask: shape ``(B, L)``, true where a token is real; None when all are.
        position: index of the next block.
        read: shape ``(B, L)``, true for tokens that the head reads; None where it reads the first or the last one.
    """

    hidden: Tensor
    calls: list[Call]
    mask: Tensor | None
    position: int = 0
    read: Tensor | None = None

    def move(self, hidden: Tensor) -> None:
        """Step behind the next block, which gave these hidden states, shape ``(B, L, d)``."""
        self.hidden, self.position = hidden, self.position + 1

    def rows(self, tensor: Tensor) -> Tensor:
        """The real tokens of a tensor of this batch, shape ``(n, width)``; each head of a token is a row of its own."""
        if self.mask is not None and tensor.shape[:2] == self.mask.shape:
            tensor = tensor[self.mask]
        elif self.mask is not None and tensor.ndim == 2 and len(tensor) == self.mask.numel():
            tensor = tensor[self.mask.flatten()]  # OPT and mixtures of experts flatten a batch into its tokens
        return tensor.reshape(-1, tensor.shape[-1])

    def read_rows(self, *, last: bool) -> Tensor:
        """Which of the real tokens, in the order of `rows`, a head reads; the first or last of each example by default.

        Returns:
            Shape ``(n,)``, bool.
        """
        places = self.hidden.shape[:2]
        mask = torch.ones(places, dtype=torch.bool, device=self.hidden.device) if self.mask is None else self.mask
        if self.read is not None:
            return self.read[mask]
        read = torch.zeros_like(mask)
        read[torch.arange(len(read)), _last_places(mask) if last else _first_places(mask)] = True
        return read[mask]


def _first_places(mask: Tensor) -> Tensor:
    """Place of the first real token of each example, shape ``(B,)``."""
    return mask.int().argmax(dim=1)


def _last_places(mask: Tensor) -> Tensor:
    """Place of the last real token of each example, shape ``(B,)``."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)


class BlockStack:
    """The stack of identical blocks of a backbone, and the way into it.

    The stack is found by structure: the largest ``nn.ModuleList`` whose modules are of one class. How a block is called
    is taken from the model's own forward, for each block and each batch, so that masks, rotary embeddings and whatever
    else a family hands to its blocks come as the model makes them.

    Args:
        backbone: the model, in eval mode.

    Attributes:
        blocks: the blocks, in the order in which they are run.
        path: name of the list that holds them, such as ``encoder.layer``.

    Raises:
        PaveError: there is no such stack, or an encoder stands beside a decoder.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        config: Any = getattr(backbone, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise self.refusal("it has an encoder beside a decoder, which is more than one stack of blocks")
        self._stacks = {
            path: module
            for path, module in backbone.named_modules()
            if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
        }
        if not self._stacks:
            raise self.refusal("it has no stack of identical blocks")
        self.path = max(self._stacks, key=lambda path: sum(p.numel() for p in self._stacks[path].parameters()))
        self.blocks = list(self._stacks[self.path])
        for module in backbone.modules():
            inner: Any = getattr(module, "config", None)
            if hasattr(inner, "use_cache"):
                inner.use_cache = False  # a cache would be filled anew by every version of a block

    def own(self, index: int, parameters: Iterable[Parameter]) -> dict[str, Parameter]:
        """Those of the backbone's parameters that a block owns, by their names inside the block."""
        start = f"{self.path}.{index}."
        return {p.name.removeprefix(start): p for p in parameters if p.name.startswith(start)}

    def advance(self, index: int, entries: Iterable[Entry]) -> None:
        """Take batches from before a block to behind it."""
        for entry in entries:
            entry.move(self.run(self.blocks[index], entry))

    def enter(self, batch: Batch) -> Entry:
        """Run the backbone on a batch as far as the first block, and keep how it calls each of them.

        Blocks after the first one are not computed: they hand on its output, of which nothing depends that the model
        gives them besides (`check` makes sure of it).
        """
        first: list[Any] = []

        def hand_on(index: int, block: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not first:
                first.append(block(*args, **kwargs))
            return first[0]

        caught = self._pass(batch, hand_on)
        place = self._first_place(*caught[0][1:])
        hidden: Tensor = caught[0][1][place] if isinstance(place, int) else caught[0][2][place]
        calls = [Call.split(*caught[0][1:], place)]
        given = _hidden_of(first[0])
        calls += [
            Call.split(args, kwargs, self._place(index, args, kwargs, given)) for index, args, kwargs in caught[1:]
        ]
        return Entry(hidden, calls, _fitting_mask(batch.get(MASK), hidden))

    @staticmethod
    def run(block: nn.Module, entry: Entry) -> Tensor:
        """The hidden states behind a block, ``(B, L, d)``; it may be a copy of the next one with other weights."""
        return _hidden_of(entry.calls[entry.position].on(block, entry.hidden))

    @torch.no_grad()
    def reads_last(self, batch: Batch) -> bool:
        """Whether heads read the last token: they do where no token sees the ones behind it, else the first one."""
        if TOKENS not in batch:
            return False
        plain, changed = self.enter(batch), self.enter(batch)
        mask = torch.ones(plain.hidden.shape[:2], dtype=torch.bool) if plain.mask is None else plain.mask.cpu()
        rows, first, last = torch.arange(len(mask)), _first_places(mask), _last_places(mask)
        # The next token is seen from the first one even where each token sees its neighbours alone.
        second = torch.minimum(first + 1, last)
        hidden = changed.hidden.clone()
        moved = rows[second > first]
        hidden[moved, second[moved]] = hidden[moved, second[moved]].flip(-1) + 1
        changed.hidden = hidden
        before, after = self._behind(plain)[rows, first], self._behind(changed)[rows, first]
        return float((before - after).abs().max()) <= AGREEMENT * float(before.abs().max())

    def _behind(self, entry: Entry) -> Tensor:
        for block in self.blocks:
            entry.move(self.run(block, entry))
        return entry.hidden

    # ---- is a walk what the model does? ----------------------------------------------------------------------------

    @torch.no_grad()
    def check(self, batch: Batch) -> None:
        """Make sure that walking through the blocks is what the backbone itself does.

        The model runs each block once, in order, and no other stack; a block is given what the one before returned, as
        it is; what it is given besides does not depend on the blocks before; and the walk ends where the model's own
        pass does, within 1e-5 of the largest value.

        Args:
            batch: an example or more, as the backbone takes them.

        Raises:
            PaveError: it is not, and why.
        """
        try:
            self._verify(batch)
        except torch.OutOfMemoryError:
            raise
        except MODEL_FAILURES as error:
            reason = " ".join(str(error).split())
            raise self.refusal(f"it cannot be run so on a task's examples ({reason})") from error

    def _verify(self, batch: Batch) -> None:
        outputs: list[Any] = []

        def really(index: int, block: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            outputs.append(block(*args, **kwargs))
            return outputs[-1]

        generator = torch.Generator().manual_seed(0)

        def disturbed(index: int, block: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return _noise(outputs[index], generator)

        others: list[str] = []
        with self._watching_others(others):
            caught = self._pass(batch, really)
        if others:
            raise self.refusal(f"it runs the blocks of {others[0]} beside those of {self.path}")
        if [index for index, _, _ in caught] != list(range(len(self.blocks))):
            raise self.refusal(
                f"it does not run each block of {self.path} once and in order (it has {len(self.blocks)} of them and "
                f"makes {len(caught)} calls)"
            )
        for index, args, kwargs in caught[1:]:
            self._place(index, args, kwargs, _hidden_of(outputs[index - 1]))
        entry = self.enter(batch)
        if entry.mask is not None and entry.hidden.shape[:2] != entry.mask.shape:
            raise self.refusal("its blocks work on other token positions than the batch has")
        shaken = self._pass(batch, disturbed)
        for call, (index, args, kwargs) in zip(entry.calls, shaken, strict=True):
            other = Call.split(args, kwargs, call.place)
            if not _equal((call.arguments, call.keywords), (other.arguments, other.keywords)):
                raise self.refusal(f"what it gives to {self.path}.{index} depends on more than the hidden states")
        own, walked = entry.rows(_hidden_of(outputs[-1])), entry.rows(self._behind(entry))
        if own.shape != walked.shape or not float((own - walked).abs().max()) <= AGREEMENT * float(own.abs().max()):
            raise self.refusal(
                f"running the blocks of {self.path} one after the other gives other outputs than it does"
            )

    def _pass(
        self, batch: Batch, run: Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
    ) -> list[tuple[int, tuple[Any, ...], dict[str, Any]]]:
        """The model's own pass with each block's forward replaced; the calls of blocks, in order."""
        caught: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []

        def replacement(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def recorded(*args: Any, **kwargs: Any) -> Any:
                caught.append((index, args, dict(kwargs)))
                return run(index, forward, args, kwargs)

            return recorded

        with ExitStack() as undo:
            for index, block in enumerate(self.blocks):
                if "forward" in vars(block):
                    undo.callback(vars(block).__setitem__, "forward", vars(block)["forward"])
                else:
                    undo.callback(vars(block).__delitem__, "forward")
                vars(block)["forward"] = replacement(index, block.forward)
            self.backbone(**batch)
        return caught

    @contextmanager
    def _watching_others(self, called: list[str]) -> Iterator[None]:
        """Within, names of lists of blocks outside of the stack are noted when the model runs one of their blocks."""
        inside = {id(module) for block in self.blocks for module in block.modules()}

        def noted(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda module, args: called.append(path)

        handles = [
            block.register_forward_pre_hook(noted(path))
            for path, blocks in self._stacks.items()
            for block in blocks
            if not any(id(module) in inside for module in block.modules())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _first_place(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str:
        """Where the first block is given the hidden states: as its first parameter, by position or by name."""
        if args:
            return 0
        named = [name for name in inspect.signature(type(self.blocks[0]).forward).parameters if name in kwargs]
        if not named:
            raise self.refusal(f"{self.path}.0 is called without hidden states")
        return named[0]

    def _place(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor) -> int | str:
        """Where a later block is given the hidden states that the one before returned."""
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        places = [place for place, value in given if value is hidden]
        if len(places) != 1:
            raise self.refusal(f"the input of {self.path}.{index} is not just the output of the block before")
        return places[0]

    def refusal(self, reason: str) -> PaveError:
        """The one message with which a backbone is refused."""
        return PaveError(
            f"{type(self.backbone).__name__} cannot be calibrated block by block: {reason}; choose a method that does "
            "not work block by block"
        )


@dataclass
class Watched:
    """What passes through the linear layers and norms of a block, by their names inside the block, call by call.

    Most are called once in a pass; DeBERTa's projections are called for the relative positions as well.

    Attributes:
        inputs: what each was given.
        outputs: what each norm gave.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def is_given(self, inputs: Tensor, hidden: Tensor) -> bool:
        """Whether an input is what the block itself is given, as it is or behind a norm."""
        behind = [
            output
            for name, outputs in self.outputs.items()
            for given, output in zip(self.inputs[name], outputs, strict=True)
            if given is hidden
        ]
        return any(inputs is tensor for tensor in (hidden, *behind))


@contextmanager
def watched(block: nn.Module) -> Iterator[Watched]:
    """Watch the linear layers and norms of a block in the passes within."""
    seen = Watched()

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.inputs.setdefault(name, []).append(args[0] if args else next(iter(kwargs.values())))
            if is_norm(module):
                seen.outputs.setdefault(name, []).append(output)

        return hook

    handles = [
        module.register_forward_hook(keep(name), with_kwargs=True)
        for name, module in block.named_modules()
        if is_linear(module) or is_norm(module)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: the first of several things."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _fitting_mask(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """The batch's mask as long as the hidden states: some models pad to a multiple of their window, on the right."""
    if mask is None:
        return None
    longer = hidden.shape[1] - mask.shape[1]
    return nn.functional.pad(mask.bool(), (0, longer)) if longer > 0 else mask.bool()


def _noise(value: Any, generator: torch.Generator) -> Any:
    """The same nest of tuples and tensors with noise for all floating-point values."""
    if isinstance(value, tuple):
        return tuple(_noise(part, generator) for part in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.randn(value.shape, generator=generator).to(value)
    return value


def _equal(one: Any, other: Any) -> bool:
    """Whether two nests hold equal values; of things that are neither tensors nor plain values the type counts."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, (tuple, list)):
        return (
            isinstance(other, (tuple, list))
            and len(one) == len(other)
            and all(_equal(*both) for both in zip(one, other, strict=True))
        )
    if isinstance(one, (bool, int, float, str)):
        return bool(one == other)
    return type(one) is type(other)
