"""What a merge method may know of a parameter: its kind and shape, never its architecture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import ClassVar

from torch import Tensor, nn

from pave_lightning.layers import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, matrix_weight, stacked_axis
from pave_lightning.weights.matrices import Matrix, Outputs, Part


class ParameterKind(StrEnum):
    """What a parameter does in its layer.

    A parameter of kind EXPERTS has three axes: one matrix weight for each expert of a mixture.
    """

    LINEAR = "linear"
    EXPERTS = "experts"
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
            projections and convolutions without groups, 0 for the transposed ``Conv1D`` of GPT-2; 2 or 1 for the
            matrices of experts, whose first axis counts them; None for everything that multiplies with no matrix.
        module: name of the layer, where checkpoints store the parameter under another name; else None.
        parts: the projections that a fused weight holds beside each other; none where there is one, or where nobody
            knows.
        of_layer: which outputs of the layer the weight gives, where checkpoints store apart what the model has fused;
            None for all of them.
        of_stack: name of the stack of which it is one expert's matrix, and its number there; None for all others.
        rows: which rows of its first axis are meant, where a block of them is merged apart from the others; None for
            all. Name, shape and number of elements are those of the whole parameter, and so are equality and hash.
    """

    name: str
    kind: ParameterKind
    shape: tuple[int, ...]
    input_axis: int | None = None
    module: str | None = None
    parts: tuple[Part, ...] = ()
    of_layer: Outputs | None = None
    of_stack: tuple[str, int] | None = None
    rows: slice | None = field(default=None, compare=False)

    # What remembers architectures takes a slice as it is; there is never one in them.
    __pydantic_config__: ClassVar[dict[str, bool]] = {"arbitrary_types_allowed": True}

    @property
    def layer(self) -> str:
        """Name of the layer (module) that owns the parameter; of experts, whose module has several, without .weight."""
        if self.module is not None:
            return self.module
        return self.name.removesuffix(".weight") if self.is_stack else self.name.rpartition(".")[0]

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
        return self.input_axis is not None and not self.is_stack

    @property
    def is_stack(self) -> bool:
        """Whether it holds one matrix weight for each expert of a mixture, along its first axis."""
        return self.kind is ParameterKind.EXPERTS

    def expert(self, number: int) -> Parameter:
        """One expert's matrix of a stack as a parameter of its own.

        Example:
            >>> Parameter("experts.down_proj", ParameterKind.EXPERTS, (4, 8, 16), input_axis=2).expert(1).matrix_shape
            (8, 16)
        """
        axis = None if self.input_axis is None else self.input_axis - 1
        layer = f"{self.layer}.{number}"
        return replace(
            self,
            name=f"{self.name}.{number}",
            kind=ParameterKind.LINEAR,
            shape=self.shape[1:],
            input_axis=axis,
            module=layer,
            of_stack=(self.name, number),
        )

    @property
    def apart(self) -> tuple[Parameter, ...]:
        """The experts' matrices of a stack, each a parameter of its own; the parameter itself where it is no stack."""
        return tuple(self.expert(number) for number in range(self.shape[0])) if self.is_stack else (self,)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The matrices that it is made of: one, one for each expert, one for each fused part; none where it is none."""
        if self.input_axis is None:
            return ()
        if self.is_stack:
            return tuple(
                replace(matrix, expert=number) for number, one in enumerate(self.apart) for matrix in one.matrices
            )
        height, width = self.matrix_shape
        whole = Matrix(self.layer, self.layer, (height, width), self.input_axis, of_layer=self.of_layer)
        return tuple(
            replace(
                whole,
                name=f"{self.layer}.{part.name}" if part.layer is None else part.layer,
                layer=self.layer if part.layer is None else part.layer,
                shape=(part.outputs.count, width),
                outputs=part.outputs,
                of_layer=part.outputs if part.layer is None else None,
            )
            for part in self.parts
        ) or (whole if self.of_layer is None else replace(whole, name=self.name.removesuffix(".weight")),)

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
    stacked = stacked_axis(module, attribute)
    if stacked is not None:
        found = ParameterKind.EXPERTS, stacked
    elif attribute in ("bias", "in_proj_bias"):
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


def parameters_of(backbone: nn.Module, parts: Mapping[str, tuple[Part, ...]]) -> dict[str, Parameter]:
    """All parameters of a module by name, in the order of its modules; shared ones once, under their first name.

    Args:
        backbone: the module.
        parts: the parts of fused weights, by the name of the weight in the module.
    """
    found = {}
    for name, tensor in backbone.named_parameters():
        owner, _, attribute = name.rpartition(".")
        kind, axis = kind_of(backbone.get_submodule(owner), attribute)
        found[name] = Parameter(name, kind, tuple(tensor.shape), axis, parts=parts.get(name, ()))
    return found
