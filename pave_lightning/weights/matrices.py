"""The matrices that a parameter is made of: one, a stack of them, or the parts of a fused projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """Some outputs of a matrix: blocks of its rows at equal distances.

    Attributes:
        start: the first row of the first block.
        size: rows of a block.
        period: rows from one block to the next; 0 where there is only one.
        repeats: number of blocks.

    Example:
        >>> Outputs(2, 1, period=3, repeats=2).index
        tensor([2, 5])
        >>> Outputs(4, 2).index
        slice(4, 6, None)
    """

    start: int
    size: int
    period: int = 0
    repeats: int = 1

    @property
    def index(self) -> Tensor | slice:
        """What picks these rows: a slice of one block, an int64 tensor of several."""
        if self.repeats == 1:
            return slice(self.start, self.start + self.size)
        places = (self.start + self.period * block + row for block in range(self.repeats) for row in range(self.size))
        return torch.tensor(list(places), device="cpu")

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.size * self.repeats


@dataclass(frozen=True)
class Part:
    """One of the projections that a weight holds beside each other, each with outputs of its own.

    Attributes:
        name: what it gives: ``query``, ``gate``.
        outputs: its rows of the weight as ``(d_out, d_in)``.
        layer: the layer whose input it multiplies, where the checkpoint has fused what the model has apart; None for
            that of the whole weight.
    """

    name: str
    outputs: Outputs
    layer: str | None = None


@dataclass(frozen=True)
class Matrix:
    """One matrix of a parameter, as purification and methods for matrices treat it.

    Attributes:
        name: name of the layer, with the part or the number in the stack where there are several.
        layer: the layer, by the name that statistics have for it, whose input it multiplies.
        shape: ``(d_out, d_in)``.
        axis: the axis of the stored matrix that meets the input: 1, or 0 for transposed ones.
        expert: its number along the first axis of a stack; None where the parameter is no stack.
        outputs: its rows of the stored matrix; None for all.
        of_layer: which outputs of the layer its rows give; None for all of them.
    """

    name: str
    layer: str
    shape: tuple[int, int]
    axis: int = 1
    expert: int | None = None
    outputs: Outputs | None = None
    of_layer: Outputs | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the parameter."""
        return self.expert is None and self.outputs is None

    @property
    def rows(self) -> slice | None:
        """The rows of the parameter's first axis that hold it; None for all."""
        return None if self.expert is None else slice(self.expert, self.expert + 1)

    def of(self, tensor: Tensor) -> Tensor:
        """The matrix, ``(d_out, d_in)``, from :attr:`rows` of the parameter; a view where the rows are one block."""
        whole = self._whole(tensor)
        return whole if self.outputs is None else whole[self.outputs.index]

    def put(self, tensor: Tensor, matrix: Tensor) -> None:
        """Copy the matrix, ``(d_out, d_in)``, into :attr:`rows` of the parameter, in place."""
        self._whole(tensor)[slice(None) if self.outputs is None else self.outputs.index] = matrix.to(tensor)

    def _whole(self, tensor: Tensor) -> Tensor:
        stored = tensor if self.expert is None else tensor[0]
        return stored.T if self.axis == 0 else stored.flatten(1)
