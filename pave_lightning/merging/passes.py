"""Running a backbone block by block on the tasks' examples, with weights that change on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pave_lightning.errors import PaveError
from pave_lightning.layers import is_linear, is_norm
from pave_lightning.subspace import is_finite
from pave_lightning.weights import Parameter, TaskVectors
from pave_lightning.weights.embeddings import OwnTokens, reading

Batch = Mapping[str, Tensor]
# What a walk through the blocks may differ from the model's own pass by, relative to the largest value.
AGREEMENT = 1e-4


@dataclass(frozen=True)
class ForwardPasses:
    """What a rule needs to run models on unlabelled examples.

    Attributes:
        backbone: makes the backbone with the base's weights, float32.
        experts: the weights of the experts as they were fine-tuned, never purified ones.
        batches: each task's examples, as the backbone takes them.
        device: where the passes are run.
        classifier: makes a task's expert with its head, float32: a Hugging Face classifier. None where there are none.
        own_tokens: for tasks whose experts have tokens that the base has no row of, these.
    """

    backbone: Callable[[], nn.Module]
    experts: TaskVectors
    batches: Mapping[str, Sequence[Batch]]
    device: str = "cpu"
    classifier: Callable[[str], nn.Module] | None = None
    own_tokens: Mapping[str, OwnTokens | None] = field(default_factory=dict)

    def stack(self) -> BlockStack:
        """The blocks of a new backbone with the base's weights.

        Raises:
            PaveError: it is no model that can be walked through block by block.
        """
        stack = BlockStack(self.backbone().to(self.device))
        stack.check(self.first())
        return stack

    def first(self) -> dict[str, Tensor]:
        """One batch, of tokens that the base has a row of."""
        task, batches = next(iter(self.batches.items()))
        batch, own = self._placed(batches[0]), self.own_tokens.get(task)
        return batch if own is None else {**batch, "input_ids": own.shared(batch["input_ids"])}

    def entries(self, stack: BlockStack, task: str) -> list[Entry]:
        """A task's examples before the first block, with the weights that the backbone has now."""
        with reading(stack.backbone, self.own_tokens.get(task)):
            return [stack.enter(batch) for batch in self.placed(task)]

    def placed(self, task: str) -> list[dict[str, Tensor]]:
        """A task's examples without their labels, on the device."""
        return [self._placed(batch) for batch in self.batches[task]]

    def headed(self, task: str) -> nn.Module:
        """A task's expert with its head, in eval mode, on the device.

        Raises:
            PaveError: none was given, or its weights are not finite.
        """
        if self.classifier is None:
            raise PaveError("this rule needs the experts with their heads, but none were given")
        model = self.classifier(task).to(self.device).eval()
        broken = [name for name, value in model.named_parameters() if not is_finite(value)]
        if broken:
            raise PaveError(
                f"the expert of task '{task}' holds NaN or infinity in {broken[0]}; train or fetch it again"
            )
        return model

    def _placed(self, batch: Batch) -> dict[str, Tensor]:
        """The batch without its labels, on the device."""
        return {name: tensor.to(self.device) for name, tensor in batch.items() if name != "labels"}


@dataclass
class Entry:
    """One batch on its way through the blocks.

    Attributes:
        hidden: hidden states before the next block, shape ``(B, L, d)``.
        arguments: what else a block is called with, by position.
        keywords: what else it is called with, by name.
        mask: shape ``(B, L)``, true where a token is real; None when all are.
    """

    hidden: Tensor
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    mask: Tensor | None

    def rows(self, tensor: Tensor) -> Tensor:
        """The real tokens of a tensor of this batch, shape ``(n, width)``."""
        if self.mask is not None and tensor.shape[:2] == self.mask.shape:
            return tensor[self.mask]
        return tensor.reshape(-1, tensor.shape[-1])

    def read_rows(self, *, last: bool) -> Tensor:
        """Which of the real tokens, in the order of `rows`, a head reads: the first or the last one of each example."""
        places = self.hidden.shape[:2]
        mask = torch.ones(places, dtype=torch.bool, device=self.hidden.device) if self.mask is None else self.mask
        read = torch.zeros_like(mask)
        read[torch.arange(len(read)), _last_places(mask, mask) if last else 0] = True
        return read[mask]


def _last_places(mask: Tensor | None, like: Tensor) -> Tensor:
    """Place of the last real token of each example, shape ``(B,)``."""
    real = torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()
    return real.shape[1] - 1 - real.flip(1).int().argmax(dim=1)


class _Reached(Exception):  # noqa: N818 - it ends a pass early, which is no error
    """The first block was reached."""


class BlockStack:
    """The stack of like blocks of a backbone, and the way into it.

    Args:
        backbone: the model, in eval mode.

    Attributes:
        blocks: the blocks, in the order in which they are run.
        path: name of the list that holds them, such as ``encoder.layer``.

    Raises:
        PaveError: there is no such stack.
    """

    def __init__(self, backbone: nn.Module) -> None:
        stacks = {
            path: module
            for path, module in backbone.named_modules()
            if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
        }
        if not stacks:
            raise PaveError(
                f"{type(backbone).__name__} has no list of like blocks, so it cannot be calibrated block by block"
            )
        self.path = max(stacks, key=lambda path: sum(p.numel() for p in stacks[path].parameters()))
        self.backbone, self.blocks = backbone, list(stacks[self.path])
        config: Any = getattr(backbone, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # a cache would be filled anew by every version of a block

    def own(self, index: int, parameters: Iterable[Parameter]) -> dict[str, Parameter]:
        """Those of the backbone's parameters that a block owns, by their names inside the block."""
        start = f"{self.path}.{index}."
        return {p.name.removeprefix(start): p for p in parameters if p.name.startswith(start)}

    def advance(self, index: int, entries: Iterable[Entry]) -> None:
        """Take batches from before a block to behind it."""
        for entry in entries:
            entry.hidden = self.run(self.blocks[index], entry)

    def enter(self, batch: Batch) -> Entry:
        """Run the backbone on a batch as far as the first block."""
        caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append((args, kwargs))
            raise _Reached

        handle = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.backbone(**batch)
        except _Reached:
            pass
        finally:
            handle.remove()
        args, kwargs = caught[0]
        keywords = dict(kwargs)
        hidden = args[0] if args else keywords.pop("hidden_states")
        mask = batch.get("attention_mask")
        return Entry(hidden, args[1:], keywords, None if mask is None else mask.bool())

    @staticmethod
    def run(block: nn.Module, entry: Entry) -> Tensor:
        """The hidden states behind a block."""
        output = block(entry.hidden, *entry.arguments, **entry.keywords)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def reads_last(self, batch: Batch) -> bool:
        """Whether heads read the last token: they do where no token sees the ones behind it, else the first one."""
        if "input_ids" not in batch:
            return False
        words = batch["input_ids"]
        last = _last_places(batch.get("attention_mask"), words)
        changed = words.clone()
        rows = torch.arange(len(words), device=words.device)
        changed[rows, last] = words[rows, 0]
        first, other = (self._behind({**batch, "input_ids": ids})[:, 0] for ids in (words, changed))
        return bool(torch.equal(first, other))

    def _behind(self, batch: Batch) -> Tensor:
        entry = self.enter(batch)
        for block in self.blocks:
            entry.hidden = self.run(block, entry)
        return entry.hidden

    def check(self, batch: Batch) -> None:
        """Make sure that walking through the blocks is what the backbone itself does.

        Raises:
            PaveError: it is not: a block is run several times, or something happens between the blocks.
        """
        outputs: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handle = self.blocks[-1].register_forward_hook(keep)
        try:
            self.backbone(**batch)
        finally:
            handle.remove()
        entry = self.enter(batch)
        own, walked = entry.rows(outputs[-1]), entry.rows(self._behind(batch))
        limit = AGREEMENT * float(own.abs().max())
        if len(outputs) != 1 or float((own - walked).abs().max()) > limit:
            raise PaveError(
                f"{type(self.backbone).__name__} does more than run the blocks of {self.path} one after the other "
                "(shared blocks, or work between them), so it cannot be calibrated block by block"
            )


@dataclass
class Watched:
    """What passes through the linear layers and norms of a block, by their names inside the block.

    Attributes:
        inputs: what each was given last.
        outputs: what each norm gave last.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def is_given(self, inputs: Tensor, hidden: Tensor) -> bool:
        """Whether an input is what the block itself is given, as it is or behind a norm."""
        behind = [self.outputs[name] for name, given in self.inputs.items() if given is hidden and name in self.outputs]
        return any(inputs is tensor for tensor in (hidden, *behind))


@contextmanager
def watched(block: nn.Module) -> Iterator[Watched]:
    """Watch the linear layers and norms of a block in the passes within."""
    seen = Watched()

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.inputs[name] = args[0]
            if is_norm(module):
                seen.outputs[name] = output

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in block.named_modules()
        if is_linear(module) or is_norm(module)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def load_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into a module's parameters and buffers of the same names; others stay.

    Raises:
        PaveError: the module has nothing of that name: checkpoints store it under another one.
    """
    own = _named(module, values)
    for name, value in values.items():
        own[name].copy_(value)


def share_parameters(module: nn.Module, shared: Mapping[str, nn.Parameter]) -> None:
    """Put parameters into a module, in place of its own of the same names; other modules may hold them as well.

    What is tied to one of them inside the module stays tied. Buffers of these names are given the values.

    Raises:
        PaveError: the module has nothing of that name: checkpoints store it under another one.
    """
    own = _named(module, shared)
    replaced = {id(own[name]): parameter for name, parameter in shared.items()}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if id(parameter) in replaced:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, replaced[id(parameter)])
    buffers = dict(module.named_buffers())
    load_parameters(module, {name: parameter for name, parameter in shared.items() if name in buffers})


def _named(module: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """A module's parameters and buffers by name, among which these must be."""
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    unknown = [name for name in names if name not in own]
    if unknown:
        raise PaveError(
            f"{type(module).__name__} knows {len(unknown)} weights by other names than checkpoints do, such as "
            f"{unknown[0]}; methods that run the model cannot work on this architecture yet"
        )
    return own
