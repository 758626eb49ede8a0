"""What per-task merging keeps for each task: bit masks, low-rank factors and a scalar, in one safetensors file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pave_lightning.errors import PaveError, foreign, reason
from pave_lightning.system.files import check_header, read_failure, write_tensors
from pave_lightning.system.process_groups import ALONE, ProcessGroup

METADATA = "modulator"


def pack_mask(mask: Tensor) -> Tensor:
    """Eight elements of a bool tensor of any shape to a byte, highest bit first.

    Returns:
        Shape ``(ceil(elements / 8),)``, uint8.

    Example:
        >>> pack_mask(torch.tensor([[True, False, True], [False, False, False]]))
        tensor([160], dtype=torch.uint8)
    """
    return torch.from_numpy(numpy.packbits(mask.numpy(), axis=None))


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool tensor of the given shape that :func:`pack_mask` packed.

    Example:
        >>> unpack_mask(torch.tensor([160], dtype=torch.uint8), (3,))
        tensor([ True, False,  True])
    """
    count = int(numpy.prod(shape, dtype=numpy.int64))
    bits = numpy.unpackbits(packed.numpy(), count=count)
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


@dataclass(frozen=True)
class LowRank:
    """A task's own addition to a shared parameter, as the product of two factors, float32.

    Attributes:
        left: shape ``(m, k)``.
        right: shape ``(k, n)``.
    """

    left: Tensor
    right: Tensor

    def tensor(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """The product in the shape of the parameter, which has ``m * n`` elements."""
        return (self.left @ self.right).reshape(shape)


def modulated(shared: Tensor, mask: Tensor | None, factors: LowRank | None, rescaler: float) -> Tensor:
    """A task's own task vector: rescaler * (mask * shared + left @ right); no mask and no factors change nothing.

    Args:
        shared: the unified task vector, float32.
        mask: bool, of its shape.
        factors: what the task adds.
        rescaler: the task's factor.

    Returns:
        Float32, of the unified task vector's shape.

    Example:
        >>> modulated(torch.tensor([1.0, -2.0]), torch.tensor([True, False]), None, rescaler=3.0)
        tensor([3., -0.])
    """
    own = shared if mask is None else shared * mask
    if factors is not None:
        own = own + factors.tensor(own.shape)
    return own * rescaler


class ModulatorWriter:
    """What one task keeps, packed as it comes: masks take one bit an element in memory too."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._masks: dict[str, list[int]] = {}
        self._factors: list[str] = []

    def add_mask(self, name: str, mask: Tensor) -> None:
        """Take in the mask of one parameter: bool, of its shape."""
        self._tensors[name] = pack_mask(mask)
        self._masks[name] = list(mask.shape)

    def add_factors(self, name: str, factors: LowRank) -> None:
        """Take in the factors of one parameter."""
        for side, tensor in zip(_sides(name), (factors.left, factors.right), strict=True):
            self._tensors[side] = tensor.contiguous()
        self._factors.append(name)

    def save(self, path: Path, rescaler: float, group: ProcessGroup = ALONE) -> None:
        """Write everything and the task's rescaling factor as safetensors.

        Args:
            path: the file.
            rescaler: the factor.
            group: the processes of which each has taken in its own parameters; the first one writes those of all.
        """
        parts = [path.with_name(f"{path.stem}-{rank}.tmp") for rank in range(1, group.size)]
        if not group.is_first:
            write_tensors(parts[group.rank - 1], self._tensors)
        own: dict[str, Any] = {"masks": self._masks, "factors": self._factors}
        told = group.gather(own)
        if not group.is_first:
            return
        for part, others in zip(parts, told[1:], strict=True):
            self._tensors |= load_file(part)
            self._masks |= others["masks"]
            self._factors += others["factors"]
            part.unlink()
        # In one order, so that equal results are equal files, however many processes have made them.
        self._masks, self._factors = dict(sorted(self._masks.items())), sorted(self._factors)
        facts = {"shapes": self._masks, "factors": self._factors, "rescaler": rescaler}
        # One entry: safetensors writes several in random order, and equal results are to be equal files.
        write_tensors(path, self._tensors, {METADATA: json.dumps(facts, sort_keys=True)})


class Modulator:
    """What one task keeps, read lazily; iterating gives the names of the parameters that are the task's own.

    Attributes:
        rescaler: the factor of the task.

    Raises:
        PaveError: the file is missing, truncated or of another kind.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            check_header(path)
            file: Any = safe_open(path, framework="pt")
            metadata: dict[str, str] = file.metadata() or {}
            self._file = file
            facts = json.loads(metadata[METADATA])
            self._masks = {name: _shape(shape) for name, shape in facts["shapes"].items()}
            self._factors = dict.fromkeys(facts["factors"])
            self.rescaler = float(facts["rescaler"])
            lacking = {*self._masks, *(side for name in self._factors for side in _sides(name))} - set(file.keys())
            if lacking or not math.isfinite(self.rescaler):
                raise ValueError("its header does not agree with what it holds")
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            damaged = f"{path} is no readable file of what a task keeps ({reason(error)}); merge again"
            raise PaveError(read_failure(path, damaged)) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks | self._factors)

    def weight(self, name: str, base: Tensor, unified: Tensor) -> Tensor:
        """A task's own weight: the base's, and what is kept of the unified task vector; float32.

        Args:
            name: name of the parameter.
            base: its value in the base.
            unified: base plus unified task vector. Rows behind the base's, those of tokens that the base has not, are
                nobody's alone and stay as they are.
        """
        base, unified = base.float(), unified.float()
        if base.dim() == 0 or len(base) == len(unified):
            return base + self.apply(name, unified - base)
        return torch.cat([base + self.apply(name, unified[: len(base)] - base), unified[len(base) :]])

    def apply(self, name: str, unified: Tensor) -> Tensor:
        """The task's own task vector of that parameter: rescaler * (mask * unified + left @ right), of its shape."""
        with foreign(f"{self._path}: what is kept of {name} does not fit the weight", "merge again"):
            mask = unpack_mask(self._file.get_tensor(name), self._masks[name]) if name in self._masks else None
            factors = None
            if name in self._factors:
                factors = LowRank(*(self._file.get_tensor(side) for side in _sides(name)))
            return modulated(unified, mask, factors, self.rescaler)


def _shape(sizes: list[int]) -> tuple[int, ...]:
    if not all(isinstance(size, int) and 0 <= size < 2**31 for size in sizes):
        raise ValueError("a mask has no shape")
    return tuple(sizes)


def _sides(name: str) -> tuple[str, str]:
    """Under which names a parameter's two factors are stored; no parameter's name holds a colon."""
    return f"left:{name}", f"right:{name}"
