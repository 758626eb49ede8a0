"""What a merge method may know of a parameter: its kind and shape, never its architecture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import ClassVar

from torch import Tensor, nn

from pave_lightning.layers import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, matrix_weight


class ParameterKind(StrEnum):
    """What a parameter does in its layer."""

    LINEAR = "linear"
    CONVOLUTION = "convolution"
    EMBEDDING = "embedding"
    NORM_SCALE = "norm scale"
    NORM_SHIFT = "norm shift"
    BIAS = "bias"
    OTHER = "other"


# What is added to a layer's output.
ADDITIVE = (ParameterKind.BIAS, ParameterKind.NORM_SHIFT)


@dataclass(frozen=True)
class Parameter:
    """One floating-point tensor of the backbone.

    Attributes:
        name: its name inside the backbone, without the architecture's prefix.
        kind: what it does in its layer.
        shape: its shape.
        input_axis: the axis of a matrix weight that meets the layer's input: 1 for ``nn.Linear`` (d_out x d_in), fused
            projections and convolutions without groups, 0 for the transposed ``Conv1D`` of GPT-2; None for everything
            that multiplies with no matrix.
        module: name of the module that owns it, where checkpoints store the parameter under another name; else None.
        rows: which rows of its first axis are meant, where a block of them is merged apart from the others; None for
            all. Name, shape and number of elements are those of the whole parameter, and so are equality and hash.
    """

    name: str
    kind: ParameterKind
    shape: tuple[int, ...]
    input_axis: int | None = None
    module: str | None = None
    rows: slice | None = field(default=None, compare=False)

    # What remembers architectures takes a slice as it is; there is never one in them.
    __pydantic_config__: ClassVar[dict[str, bool]] = {"arbitrary_types_allowed": True}

    @property
    def layer(self) -> str:
        """Name of the layer (module) that owns the parameter."""
        return self.name.rpartition(".")[0] if self.module is None else self.module

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def block(self, rows: slice | None) -> Parameter:
        """These rows of the parameter; the parameter itself where None."""
        return self if rows is None else replace(self, rows=rows)

    @property
    def first_element(self) -> int:
        """Position in the flattened parameter of the first element of :attr:`rows`."""
        first = 0 if self.rows is None else self.rows.indices(self.shape[0])[0]
        return first * math.prod(self.shape[1:])

    @property
    def is_matrix(self) -> bool:
        """Whether the layer multiplies its input with this weight as one matrix (linear layers, some convolutions)."""
        return self.input_axis is not None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of a matrix weight, however it is stored.

        Raises:
            ValueError: the parameter is no matrix weight.

        Example:
            >>> Parameter("h.0.mlp.c_fc.weight", ParameterKind.LINEAR, shape=(768, 3072), input_axis=0).matrix_shape
            (3072, 768)
        """
        if self.input_axis is None:
            raise ValueError(f"{self.name} is no matrix weight but a {self.kind}")
        if self.input_axis == 0:
            return self.shape[1], self.shape[0]
        return self.shape[0], math.prod(self.shape[1:])

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """The weight, shape ``(d_out, d_in)``, a view; kernels of convolutions are one row an output channel."""
        return tensor.T if self.input_axis == 0 else tensor.reshape(self.matrix_shape)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A matrix of shape ``(d_out, d_in)`` in the shape in which the weight is stored, contiguous."""
        return (matrix.T if self.input_axis == 0 else matrix.reshape(self.shape)).contiguous()


def kind_of(module: nn.Module, attribute: str) -> tuple[ParameterKind, int | None]:
    """Kind and input axis of the parameter ``attribute`` of ``module``."""
    is_norm = "norm" in type(module).__name__.lower()
    name, axis = matrix_weight(module) or ("", None)
    found: tuple[ParameterKind, int | None] = ParameterKind.OTHER, None
    if attribute in ("bias", "in_proj_bias"):
        found = (ParameterKind.NORM_SHIFT if is_norm else ParameterKind.BIAS), None
    elif attribute == "weight" and isinstance(module, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS):
        found = ParameterKind.CONVOLUTION, axis
    elif attribute == name:
        found = ParameterKind.LINEAR, axis
    elif attribute == "weight" and isinstance(module, nn.Embedding):
        found = ParameterKind.EMBEDDING, None
    elif attribute == "weight" and is_norm:
        found = ParameterKind.NORM_SCALE, None
    return found
