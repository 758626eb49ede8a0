"""What a merge method may know of a parameter: its kind and shape, never its architecture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor, nn


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
        input_axis: the axis of a matrix weight that meets the layer's input: 1 for ``nn.Linear`` (d_out x d_in), fused
            projections and convolutions that are matrix products, 0 for the transposed ``Conv1D`` of GPT-2; None for
            everything that multiplies with no matrix.
        module: name of the module that owns it, where checkpoints store the parameter under another name; else None.
    """

    name: str
    kind: ParameterKind
    shape: tuple[int, ...]
    input_axis: int | None = None
    module: str | None = None

    @property
    def layer(self) -> str:
        """Name of the layer (module) that owns the parameter."""
        return self.name.rpartition(".")[0] if self.module is None else self.module

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether the layer multiplies its input with this weight as one matrix (linear layers, some convolutions)."""
        return self.input_axis is not None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of a matrix weight, however it is stored.

        Raises:
            ValueError: the parameter is no matrix weight.
        """
        if self.input_axis is None:
            raise ValueError(f"{self.name} is no matrix weight but a {self.kind}")
        if self.input_axis == 0:
            return self.shape[1], self.shape[0]
        return self.shape[0], math.prod(self.shape[1:])

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """The weight as ``d_out x d_in``, a view; kernels of convolutions are laid out as one row an output channel."""
        return tensor.T if self.input_axis == 0 else tensor.reshape(self.matrix_shape)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A ``d_out x d_in`` matrix in the shape in which the weight is stored, contiguous."""
        return (matrix.T if self.input_axis == 0 else matrix.reshape(self.shape)).contiguous()


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies its input with one weight matrix: ``nn.Linear``, or the ``Conv1D`` of GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_matrix_convolution(module: nn.Module) -> bool:
    """Whether a convolution is a matrix product of non-overlapping patches: patch embeddings and 1 x 1 convolutions."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or module.transposed or module.groups != 1:
        return False
    pointwise = all(size == 1 for size in module.kernel_size)
    unpadded = module.padding == "valid" or not any(size for size in module.padding if not isinstance(size, str))
    dense = all(step == 1 for step in module.dilation)
    return bool(unpadded and (pointwise or (dense and module.kernel_size == module.stride)))


def kind_of(module: nn.Module, attribute: str) -> tuple[ParameterKind, int | None]:
    """Kind and input axis of the parameter ``attribute`` of ``module``."""
    is_norm = "norm" in type(module).__name__.lower()
    found: tuple[ParameterKind, int | None] = ParameterKind.OTHER, None
    if attribute in ("bias", "in_proj_bias"):
        found = (ParameterKind.NORM_SHIFT if is_norm else ParameterKind.BIAS), None
    elif attribute == "in_proj_weight" and isinstance(module, nn.MultiheadAttention):
        found = ParameterKind.LINEAR, 1
    elif attribute != "weight":
        pass
    elif is_linear(module):
        found = ParameterKind.LINEAR, 1 if isinstance(module, nn.Linear) else 0
    elif isinstance(module, nn.Embedding):
        found = ParameterKind.EMBEDDING, None
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        found = ParameterKind.CONVOLUTION, 1 if is_matrix_convolution(module) else None
    elif is_norm:
        found = ParameterKind.NORM_SCALE, None
    return found
