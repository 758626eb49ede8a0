"""Running a backbone block by block on the tasks' examples, with weights that change on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pave_lightning.errors import PaveError
from pave_lightning.merging.blocks import Batch, BlockStack, Entry
from pave_lightning.subspace import is_finite
from pave_lightning.tasks.kinds.tokens import TOKENS
from pave_lightning.tasks.task import Task
from pave_lightning.weights import TaskVectors
from pave_lightning.weights.embeddings import OwnTokens, reading

# Each task's batches, as many examples as count in one step of a training; more tensors may be put into them.
Examples = Mapping[str, list[dict[str, Tensor]]]


@dataclass(frozen=True)
class ForwardPasses:
    """What a method needs to run models on unlabelled examples.

    Attributes:
        backbone: makes the backbone with the base's weights, float32.
        experts: the weights of the experts as they were fine-tuned, never purified ones.
        batches: each task's examples, as the backbone takes them.
        device: where the passes are run.
        classifier: makes a task's expert with its head, float32: a Hugging Face classifier. None where there are none.
        own_tokens: for tasks whose experts have tokens that the base has no row of, these.
        tasks: the tasks by name, whose kinds say what of a batch a model is given, and what its head says of it. Of a
            task that is not there all but the labels is given, and the head says ``logits``.
    """

    backbone: Callable[[], nn.Module]
    experts: TaskVectors
    batches: Mapping[str, Sequence[Batch]]
    device: str = "cpu"
    classifier: Callable[[str], nn.Module] | None = None
    own_tokens: Mapping[str, OwnTokens | None] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)

    def stack(self) -> BlockStack:
        """The blocks of a new backbone with the base's weights.

        Raises:
            PaveError: it is no model that can be walked through block by block.
        """
        stack = BlockStack(self.backbone().to(self.device))
        stack.check(self.first())
        return stack

    def first(self) -> dict[str, Tensor]:
        """One batch, such as ``input_ids`` of shape ``(B, L)``, of tokens that the base has a row of."""
        task, batches = next(iter(self.batches.items()))
        batch, own = self._inputs(task, self._placed(batches[0])), self.own_tokens.get(task)
        return batch if own is None else {**batch, TOKENS: own.shared(batch[TOKENS])}

    def entries(self, stack: BlockStack, task: str) -> list[Entry]:
        """A task's examples before the first block, with the weights that the backbone has now."""
        with reading(stack.backbone, self.own_tokens.get(task)):
            return [self._entry(stack, task, batch) for batch in self.placed(task)]

    def outputs(self, task: str, model: nn.Module, batch: Batch) -> Tensor:
        """What a model with a task's head says of a batch, shape ``(n, outputs)``: one row for each prediction."""
        if task in self.tasks:
            return self.tasks[task].outputs(model, batch)
        logits: Tensor = model(**self._inputs(task, batch)).logits
        return logits

    def placed(self, task: str) -> list[dict[str, Tensor]]:
        """A task's batches without their labels, such as ``input_ids`` of shape ``(B, L)``, on the device."""
        return [self._placed(batch) for batch in self.batches[task]]

    def headed(self, task: str) -> nn.Module:
        """A task's expert with its head, in eval mode, on the device.

        Raises:
            PaveError: none was given, or its weights are not finite.
        """
        if self.classifier is None:
            raise PaveError("this method needs the experts with their heads, but none were given")
        model = self.classifier(task).to(self.device).eval()
        broken = [name for name, value in model.named_parameters() if not is_finite(value)]
        if broken:
            raise PaveError(
                f"the expert of task '{task}' holds NaN or infinity in {broken[0]}; train or fetch it again"
            )
        return model

    def _entry(self, stack: BlockStack, task: str, batch: Batch) -> Entry:
        entry = stack.enter(self._inputs(task, batch))
        if task in self.tasks:
            entry.read = self.tasks[task].read_positions(batch)
        return entry

    def _inputs(self, task: str, batch: Batch) -> dict[str, Tensor]:
        """The part of a batch that a model is given."""
        if task in self.tasks:
            return self.tasks[task].inputs(batch)
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def _placed(self, batch: Batch) -> dict[str, Tensor]:
        """The batch without its labels, on the device."""
        return {name: tensor.to(self.device) for name, tensor in batch.items() if name != "labels"}


@torch.no_grad()
def load_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into a module's parameters and buffers of the same names and shapes; others stay.

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
    refusal = misnamed(module, names)
    if refusal is not None:
        raise PaveError(refusal)
    return _own(module)


def misnamed(module: nn.Module, names: Collection[str]) -> str | None:
    """Why values of these names cannot be put into a module; None where they can."""
    own = _own(module)
    unknown = [name for name in names if name not in own]
    if not unknown:
        return None
    return (
        f"{type(module).__name__} knows {len(unknown)} weights by other names than checkpoints do, such as "
        f"{unknown[0]}; methods that run the model cannot work on this architecture yet"
    )


def _own(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers; one that is tied is there under each of its names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
