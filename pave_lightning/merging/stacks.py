"""Experts of mixtures one by one: for methods that look at matrices, a stack of them is as many parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pave_lightning.merging.base import MergeMethod
from pave_lightning.merging.parts import PartOfVectors
from pave_lightning.weights import Parameter, TaskVectors


class EachExpert(PartOfVectors):
    """Task vectors in which every expert's matrix of a stack is a parameter of its own.

    Args:
        source: any task vectors.
    """

    def __init__(self, source: TaskVectors) -> None:
        self._stacks = {parameter.name: parameter for parameter in source.parameters if parameter.is_stack}
        super().__init__(source, (one for parameter in source.parameters for one in parameter.apart))

    def base(self, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The source's, of one expert."""
        if parameter.of_stack is None:
            return self.source.base(parameter, rows)
        return _rows(self.source.base(*self._where(parameter)), rows)

    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The source's, of one expert."""
        if parameter.of_stack is None:
            return self.source.expert(task, parameter, rows)
        return _rows(self.source.expert(task, *self._where(parameter)), rows)

    def vector(self, task: str, parameter: Parameter, rows: slice | None = None, base: Tensor | None = None) -> Tensor:
        """The source's, of one expert."""
        if parameter.of_stack is None:
            return self.source.vector(task, parameter, rows, base)
        return _rows(self.source.vector(task, *self._where(parameter)), rows)

    def _where(self, parameter: Parameter) -> tuple[Parameter, slice]:
        name, number = parameter.of_stack or ("", 0)
        return self._stacks[name], slice(number, number + 1)

    def together(self, merged: Iterable[tuple[Parameter, Tensor]]) -> Iterator[tuple[Parameter, Tensor]]:
        """Parameters of the source with their tensors, from those of the experts, each stack's one after the other."""
        for parameter, tensor in merged:
            if parameter.of_stack is None:
                yield parameter, tensor
                continue
            name, number = parameter.of_stack
            stack = self._stacks[name]
            if number == 0:
                whole = torch.empty(stack.shape)
            whole[number] = tensor
            if number == stack.shape[0] - 1:
                yield stack, whole


def as_method_sees(method: MergeMethod, source: TaskVectors) -> TaskVectors:
    """Task vectors as a method is to be given them: with stacks of matrices apart where it treats matrices."""
    apart = method.each_expert and any(parameter.is_stack for parameter in source.parameters)
    return EachExpert(source) if apart else source


def _rows(stacked: Tensor, rows: slice | None) -> Tensor:
    return stacked[0] if rows is None else stacked[0][rows]
