"""One merge by several objects of a method, each with a part of the parameters, as processes do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.merging.base import MergeMethod
from pave_lightning.merging.evidence import Evidence
from pave_lightning.weights import DerivedTaskVectors, Parameter, TaskVectors
from pave_lightning.weights.task_vectors import BLOCK_ELEMENTS


class PartOfVectors(DerivedTaskVectors):
    """Task vectors of some of the parameters; all else is the source's.

    Args:
        source: any task vectors.
        parameters: which of its parameters.
    """

    def __init__(self, source: TaskVectors, parameters: Iterable[Parameter]) -> None:
        super().__init__(source)
        self.parameters = tuple(parameters)

    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """The source's."""
        return self.source.expert(task, parameter, rows)

    def vector(self, task: str, parameter: Parameter, rows: slice | None = None, base: Tensor | None = None) -> Tensor:
        """The source's."""
        return self.source.vector(task, parameter, rows, base)

    def factors(self, task: str, parameter: Parameter) -> tuple[Tensor, Tensor] | None:
        """The source's."""
        return self.source.factors(task, parameter)

    def scaling(self, task: str, parameter: Parameter) -> float:
        """The source's."""
        return self.source.scaling(task, parameter)

    def without_factors(self, task: str) -> str | None:
        """The source's, of all its parameters."""
        return self.source.without_factors(task)

    def blocks(self, parameter: Parameter, elements: int = BLOCK_ELEMENTS) -> Iterator[slice | None]:
        """The source's."""
        return self.source.blocks(parameter, elements)


def begin_parts(methods: Sequence[MergeMethod], sources: Sequence[TaskVectors], evidence: Evidence) -> None:
    """Begin a merge in several parts; afterwards each object knows what one that sees all parameters would know.

    When all parts have been merged, `reduce_states` makes ``factor``, ``rescalers`` and ``state`` of each object those
    of the whole::

        parts = [PartOfVectors(source, source.parameters[index::2]) for index in range(2)]
        methods = [Emr(), Emr()]
        begin_parts(methods, parts, Evidence())
        ...  # each object merges the parameters of its part
        reduce_states(methods)
        methods[0].rescalers()

    Args:
        methods: objects of one method, with the same options.
        sources: for each of them the task vectors of its part; a part may be empty.
        evidence: what is known of the tasks' data.

    Raises:
        PaveError: the method cannot merge parts of the parameters, or cannot merge these task vectors.
    """
    serial = [method for method in methods if not method.parallel]
    if serial and len(methods) > 1:
        raise PaveError(
            f"merge method '{serial[0].name}' cannot be divided among {len(methods)} parts of the parameters: "
            f"{serial[0].serial_because}; merge all parameters in one"
        )
    steps = [method.begin_part(source, evidence) for method, source in zip(methods, sources, strict=True)]
    for _ in zip(*steps, strict=True):
        reduce_states(methods)


def reduce_states(methods: Sequence[MergeMethod]) -> None:
    """Make the states of objects that saw disjoint parts those of all parameters, in each of the objects.

    Args:
        methods: objects of one method that are at the same point of their merge.

    Raises:
        ValueError: they are not.
    """
    parts = [method.states.gathered() for method in methods]
    for method in methods:
        method.states.reduce(parts)
