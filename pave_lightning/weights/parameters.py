"""What a merge method may know of a parameter: its kind and shape, never its architecture."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import nn


class ParameterKind(StrEnum):
    """What a parameter does in its layer."""

    LINEAR = "linear"
    CONVOLUTION = "convolution"
    EMBEDDING = "embedding"
    NORM_SCALE = "norm scale"
    NORM_SHIFT = "norm shift"
    BIAS = "bias"
    OTHER = "other"


@dataclass(frozen=True)
class Parameter:
    """One floating-point tensor of the backbone.

    Attributes:
        name: its name inside the backbone, without the architecture's prefix.
        kind: what it does in its layer.
        shape: its shape.
        input_axis: the axis of a linear weight that meets the layer's input: 1 for ``nn.Linear`` (d_out x d_in),
            0 for the transposed ``Conv1D`` of GPT-2; None for every other kind.
    """

    name: str
    kind: ParameterKind
    shape: tuple[int, ...]
    input_axis: int | None = None

    @property
    def layer(self) -> str:
        """Name of the layer (module) that owns the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def elements(self) -> int:
        """Number of values."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies its input with one weight matrix: ``nn.Linear``, or the ``Conv1D`` of GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def kind_of(module: nn.Module, attribute: str) -> tuple[ParameterKind, int | None]:
    """Kind and input axis of the parameter ``attribute`` of ``module``."""
    is_norm = "norm" in type(module).__name__.lower()
    if attribute == "bias":
        return (ParameterKind.NORM_SHIFT if is_norm else ParameterKind.BIAS), None
    if attribute == "weight":
        if is_linear(module):
            return ParameterKind.LINEAR, 1 if isinstance(module, nn.Linear) else 0
        if isinstance(module, nn.Embedding):
            return ParameterKind.EMBEDDING, None
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return ParameterKind.CONVOLUTION, None
        if is_norm:
            return ParameterKind.NORM_SCALE, None
    return ParameterKind.OTHER, None
