"""What per-task merging keeps for each task: bit masks and a scalar, packed in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pave_lightning.errors import PaveError


def pack_mask(mask: Tensor) -> Tensor:
    """Eight elements of a bool tensor to a byte (uint8, ``ceil(elements / 8)`` long), highest bit first."""
    return torch.from_numpy(numpy.packbits(mask.numpy(), axis=None))


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The bool tensor of the given shape that :func:`pack_mask` packed."""
    count = int(numpy.prod(shape, dtype=numpy.int64))
    bits = numpy.unpackbits(packed.numpy(), count=count)
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


class PackedMasks:
    """The masks of one task, packed as they come: one bit an element in memory too."""

    def __init__(self) -> None:
        self._packed: dict[str, Tensor] = {}
        self._shapes: dict[str, list[int]] = {}

    def add(self, name: str, mask: Tensor) -> None:
        """Take in the bool mask of one parameter."""
        self._packed[name] = pack_mask(mask)
        self._shapes[name] = list(mask.shape)

    def save(self, path: Path, rescaler: float) -> None:
        """Write the packed masks, their shapes and the task's rescaling factor as safetensors."""
        save_file(self._packed, path, metadata={"shapes": json.dumps(self._shapes), "rescaler": repr(rescaler)})


class Modulator:
    """A task's masks and rescaling factor, read lazily.

    Attributes:
        rescaler: the factor of the task.

    Raises:
        PaveError: the file is missing, truncated or of another kind.
    """

    def __init__(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
            metadata: dict[str, str] = file.metadata() or {}
            self._file = file
            self._shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
            self.rescaler = float(metadata["rescaler"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise PaveError(f"{path} is no readable file of task masks ({error}); merge again") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def apply(self, name: str, unified: Tensor) -> Tensor:
        """The task's own task vector of that parameter: rescaler * mask * unified."""
        mask = unpack_mask(self._file.get_tensor(name), self._shapes[name])
        return unified * mask * self.rescaler
