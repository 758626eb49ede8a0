"""Task vectors on another device, where a method computes with them."""

from __future__ import annotations

import torch
from torch import Tensor

from pave_lightning.merging.base import MergeMethod
from pave_lightning.merging.parts import PartOfVectors
from pave_lightning.weights import Parameter, TaskVectors


def placed(method: MergeMethod, source: TaskVectors) -> TaskVectors:
    """Task vectors where a method computes."""
    return source if method.device.type == "cpu" else PlacedTaskVectors(source, method.device)


class PlacedTaskVectors(PartOfVectors):
    """Task vectors whose tensors are on a device; they are read, and subtracted, on the CPU.

    Args:
        source: any task vectors, on the CPU.
        device: the device.
    """

    def __init__(self, source: TaskVectors, device: torch.device) -> None:
        super().__init__(source, source.parameters)
        self.device = device

    def base(self, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The source's, on the device."""
        return self._placed(self.source.base(parameter, rows))

    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The source's, on the device."""
        return self._placed(self.source.expert(task, parameter, rows))

    def vector(self, task: str, parameter: Parameter, rows: slice | None = None, base: Tensor | None = None) -> Tensor:
        """The source's, on the device; a base that is given is on the device, so the source reads its own."""
        return self._placed(self.source.vector(task, parameter, rows))

    def read(self, parameter: Parameter, rows: slice | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The source's, on the device."""
        base, vectors = self.source.read(parameter, rows)
        return self._placed(base), {task: self._placed(vector) for task, vector in vectors.items()}

    def factors(self, task: str, parameter: Parameter) -> tuple[Tensor, Tensor] | None:
        """The source's, on the device."""
        found = self.source.factors(task, parameter)
        return None if found is None else (self._placed(found[0]), self._placed(found[1]))

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
