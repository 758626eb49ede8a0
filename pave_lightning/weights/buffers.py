"""Buffers are no weights: running statistics are averaged, all others must be what they are in the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum

import torch
from torch import Tensor, nn

from pave_lightning.errors import PaveError
from pave_lightning.weights.checkpoint import FLOATING, Checkpoint, is_finite_in_float32

# How far two roundings of one number lie apart at most, in units of the coarser format's precision.
ROUNDINGS = 2.0


class BufferKind(StrEnum):
    """What a model keeps in a buffer.

    Attributes:
        STATISTICS: running statistics of what passed through, such as the means and variances of batch norms.
        CONSTANT: anything else that checkpoints store, such as tables of positions and masks.
        DERIVED: what the model makes by itself and does not load, such as rotary frequencies.
    """

    STATISTICS = "running statistics"
    CONSTANT = "constant"
    DERIVED = "derived"


def buffer_kinds(backbone: nn.Module) -> dict[str, BufferKind]:
    """The kind of each buffer of a backbone, by its name inside it."""
    kinds = {}
    stored = set(backbone.state_dict())
    for name, _ in backbone.named_buffers(remove_duplicate=False):
        attribute = name.rpartition(".")[2]
        if name not in stored:
            kinds[name] = BufferKind.DERIVED
        elif attribute.startswith("running_") or attribute == "num_batches_tracked":
            kinds[name] = BufferKind.STATISTICS
        else:
            kinds[name] = BufferKind.CONSTANT
    return kinds


def buffer_problems(base: Checkpoint, expert: Checkpoint, kinds: Mapping[str, BufferKind]) -> Iterator[str]:
    """Floating-point buffers, other than running statistics, in which an expert differs from the base; reads them.

    Args:
        base: the base's checkpoint.
        expert: the expert's checkpoint.
        kinds: kinds of the buffers that they may store.
    """
    for name, kind in kinds.items():
        own, other = base.backbone.get(name), expert.backbone.get(name)
        if kind is BufferKind.STATISTICS or own is None or other is None:
            continue  # not every release of transformers stores buffers
        if not (own.is_floating and other.is_floating):
            continue
        if own.shape != other.shape:
            yield f"the buffer {name} is {list(other.shape)} in the expert, {list(own.shape)} in the base"
            continue
        rounding = ROUNDINGS * max(torch.finfo(FLOATING[stored.dtype]).eps for stored in (own, other))
        values, others = base.tensor(name).double(), expert.tensor(name).double()
        if not torch.allclose(values, others, rtol=rounding, atol=0, equal_nan=True):
            yield (
                f"the buffer {name} differs from the base's; buffers are not merged, so base and experts must have "
                "the same (were they made with another configuration?)"
            )


def averaged(checkpoints: Sequence[tuple[Checkpoint, int]], name: str) -> Tensor:
    """Mean of a running statistic over checkpoints, float32, of the statistic's shape.

    Args:
        checkpoints: each with the number of experts that it stands for.
        name: name of the buffer.

    Raises:
        PaveError: a checkpoint holds NaN or infinity there.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for checkpoint, experts in checkpoints:
        tensor = checkpoint.tensor(name)
        if not is_finite_in_float32(tensor):
            raise PaveError(f"{checkpoint.folder}: the buffer {name} holds NaN or infinity")
        total = total + experts * tensor.double()
        count += experts
    return (total / count).float()
