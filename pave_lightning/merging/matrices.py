"""What methods share that treat matrix weights, and for which all other parameters are beside the point."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypeVar

from pave_lightning.merging.base import Cost, MethodOptions, StaticMethod
from pave_lightning.weights import Parameter, TaskVectors


class MatrixOptions(MethodOptions):
    """Options of every method that treats matrix weights only."""

    others: Literal["mean", "sum", "base"] = Field(default="mean")
    """What becomes of parameters that are no matrix weights (embeddings, norms, biases): the mean or the sum of their
    task vectors, or the base's values."""


class TableOptions(MatrixOptions):
    """Options of methods whose published code decomposes every two-dimensional tensor."""

    embeddings: bool = False
    """Whether embeddings and other two-dimensional parameters that no layer multiplies its input with are treated as
    matrix weights too, as the published code does; otherwise, and where one has too few rows or columns for so many
    tasks, they are among the others."""


MatrixOptionsT_co = TypeVar("MatrixOptionsT_co", bound=MatrixOptions, default=MatrixOptions, covariant=True)


class MatrixMethod(StaticMethod[MatrixOptionsT_co]):
    """A method for the weights that a layer multiplies its input with; all others are averaged, summed or left.

    Matrix weights are those of linear layers (GPT-2's transposed ones included) and of convolutions that are matrix
    products; of a mixture each expert's. Embeddings are looked up, not multiplied, so they are among the others, unless
    `TableOptions` say otherwise.
    """

    cost = Cost.DECOMPOSITION
    each_expert = True
    default_scale: ClassVar[float | None] = 1.0
    Options: ClassVar[type[MatrixOptions]] = MatrixOptions

    @abstractmethod
    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """Merge one matrix weight.

        Args:
            parameter: what the weight is.
            base: the base's weight as ``(d_out, d_in)``, float32.
            vectors: each task's task vector as ``(d_out, d_in)``, float32, in the order of the tasks.

        Returns:
            The merged task vector, ``(d_out, d_in)``, any float dtype, before it is multiplied with the scale.
        """

    def covers(self, parameter: Parameter) -> bool:
        """Whether the method treats this parameter."""
        tables = isinstance(self.options, TableOptions) and self.options.embeddings
        return parameter.is_matrix or (tables and len(parameter.shape) == 2)

    def misfit(self, parameter: Parameter, tasks: int) -> str | None:
        """Why a matrix weight cannot be merged for so many tasks, see `refusals`; None where it can."""
        return None

    def in_blocks(self, parameter: Parameter) -> bool:
        """Only what the method does not treat."""
        return not self.covers(parameter)

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The method for matrix weights; mean, sum or nothing for the others."""
        small = not parameter.is_matrix and self.covers(parameter) and self.misfit(_as_weight(parameter), len(vectors))
        if small or not self.covers(parameter):
            return self.merge_other(parameter, base, vectors)
        if not parameter.elements:  # has neither norms nor directions
            return torch.zeros_like(base)
        parameter = _as_weight(parameter)
        matrices = {task: parameter.as_matrix(vector) for task, vector in vectors.items()}
        merged = self.merge_matrix(parameter, parameter.as_matrix(base), matrices)
        return parameter.from_matrix(merged.float())

    def merge_other(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """Merge a parameter that is no matrix weight, or a block of its rows."""
        return combined(self.options.others, base, vectors)

    def refusals(self, vectors: TaskVectors, why: Callable[[Parameter, int], str | None]) -> Iterator[str]:
        """What ``why`` has against matrices and the number of tasks; one line for all of a shape that it is true of.

        Args:
            vectors: the task vectors.
            why: gives what is wrong with a matrix and so many tasks, to follow its name and shape; None if nothing.
        """
        tasks = len(vectors.tasks)
        refused: dict[tuple[tuple[int, int], str], list[str]] = {}
        for parameter in filter(self.covers, vectors.parameters):
            if not parameter.is_matrix:  # a table that does not fit is among the others
                continue
            problem = why(parameter, tasks)
            if problem is not None:
                refused.setdefault((parameter.matrix_shape, problem), []).append(parameter.name)
        for ((height, width), problem), (first, *others) in refused.items():
            more = f" (and {len(others)} more, such as {', '.join(others[:2])})" if others else ""
            yield f"{first} is {height} x {width}{more}: {problem}"


def _as_weight(parameter: Parameter) -> Parameter:
    """The parameter as a matrix weight; of a table each row is one output."""
    return parameter if parameter.is_matrix else replace(parameter, input_axis=1)


def combined(how: Literal["mean", "sum", "base"], base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
    """The mean or the sum of task vectors, all of the base's shape, or zero, which leaves the base's values.

    Example:
        >>> combined("mean", torch.zeros(2), {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 0.0])})
        tensor([2., 1.])
    """
    if how == "base":
        return torch.zeros_like(base)
    total = torch.stack(list(vectors.values())).sum(dim=0)
    return total / len(vectors) if how == "mean" else total
