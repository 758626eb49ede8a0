"""What methods share that merge the factors of low-rank adapters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pave_lightning.errors import Problems
from pave_lightning.merging.matrices import MatrixMethod, MatrixOptionsT_co
from pave_lightning.merging.states import Preparation
from pave_lightning.weights import Parameter, TaskVectors

Factors = tuple[Tensor, Tensor]
"""B, ``(d_out, r)``, and A, ``(r, d_in)``, both float64."""


def adapted_tasks(vectors: TaskVectors) -> dict[str, tuple[str, ...]]:
    """For each matrix weight that some task has low-rank factors of: those tasks, in the order of all."""
    found = {}
    for parameter in vectors.parameters:
        tasks = tuple(task for task in vectors.tasks if parameter.is_matrix and vectors.factors(task, parameter))
        if tasks:
            found[parameter.name] = tasks
    return found


class LowRankMethod(MatrixMethod[MatrixOptionsT_co]):
    """A method for the layers that adapters adapt; all other parameters are averaged, summed or left.

    A layer may be adapted by some of the tasks only, if the others leave it as it is.
    """

    def __init__(self, options: MatrixOptionsT_co | None = None) -> None:
        super().__init__(options)
        self._source: TaskVectors | None = None
        self._adapted: Mapping[str, tuple[str, ...]] = {}

    def prepare(self, vectors: TaskVectors) -> Preparation:
        """Find the adapted layers.

        Raises:
            PaveError: a layer is adapted by some tasks and trained whole by others; all of these are told at once.
        """
        self._source, self._adapted = vectors, adapted_tasks(vectors)
        problems = Problems(f"merge method '{self.name}' cannot merge these experts:")
        for parameter in vectors.parameters:
            adapted = self._adapted.get(parameter.name, vectors.tasks)
            whole = [task for task in vectors.tasks if task not in adapted and not vectors.is_zero(task, parameter)]
            if whole:
                problems.add(
                    f"{parameter.name} has an adapter in {quoted(adapted)}, but was trained whole in {quoted(whole)}; "
                    "train adapters of the same layers, or choose a method that needs none"
                )
        problems.raise_if_any()
        return None

    @property
    def source_vectors(self) -> TaskVectors:
        """The task vectors that are merged.

        Raises:
            RuntimeError: the merge has not begun.
        """
        if self._source is None:
            raise RuntimeError(f"merge method '{self.name}' is asked before it was given the task vectors")
        return self._source

    def covers(self, parameter: Parameter) -> bool:
        """Whether an adapter of some task adapts the parameter."""
        return parameter.name in self._adapted

    def factors(self, parameter: Parameter) -> dict[str, Factors]:
        """The factors of the tasks that adapt a parameter, in the order of the tasks."""
        source = self._source
        pairs = {} if source is None else {t: source.factors(t, parameter) for t in self._adapted[parameter.name]}
        return {task: pair for task, pair in pairs.items() if pair is not None}


def quoted(tasks: tuple[str, ...] | list[str]) -> str:
    """Names of tasks as they stand in messages."""
    return ", ".join(f"'{task}'" for task in tasks)
