"""What transforms share that multiply each task vector of each parameter with a number."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pave_lightning.weights import DerivedTaskVectors, Parameter, TaskVectors


class ScaledTaskVectors(DerivedTaskVectors):
    """Task vectors, each multiplied with a factor; low-rank factors of adapters stay, with B multiplied.

    Args:
        source: any task vectors.
        factor: gives the factor of a task's vector of a parameter.
    """

    def __init__(self, source: TaskVectors, factor: Callable[[str, Parameter], float]) -> None:
        super().__init__(source)
        self._factor = factor

    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """Base plus the scaled task vector (float32); the expert as it is where the factor is 1."""
        if self._factor(task, parameter) == 1:
            return self.source.expert(task, parameter, rows)
        base = self.source.base(parameter, rows)
        return base + self.vector(task, parameter, rows, base)

    def vector(self, task: str, parameter: Parameter, rows: slice | None = None, base: Tensor | None = None) -> Tensor:
        """The scaled task vector (float32)."""
        return self.source.vector(task, parameter, rows, base) * self._factor(task, parameter)

    def factors(self, task: str, parameter: Parameter) -> tuple[Tensor, Tensor] | None:
        """B, multiplied with the factor, and A (float64), where the source has them."""
        pair = self.source.factors(task, parameter)
        return None if pair is None else (pair[0] * self._factor(task, parameter), pair[1])

    def scaling(self, task: str, parameter: Parameter) -> float:
        """That of the source."""
        return self.source.scaling(task, parameter)

    def without_factors(self, task: str) -> str | None:
        """Why the source has no factors."""
        return self.source.without_factors(task)
