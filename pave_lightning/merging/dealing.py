"""Which of several processes merges which parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pave_lightning.errors import PaveError
from pave_lightning.merging.base import Cost, MergeMethod
from pave_lightning.merging.parts import PartOfVectors
from pave_lightning.system.process_groups import ProcessGroup
from pave_lightning.weights import Parameter, TaskVectors
from pave_lightning.weights.task_vectors import spectral_work

T = TypeVar("T")


def dealt(things: Sequence[T], shares: int, work: Callable[[T], float]) -> list[list[T]]:
    """Things divided into shares that take about the same work: the largest first, each to whoever has least to do.

    Args:
        things: what is dealt out.
        shares: how many shares there are; some are empty where there are fewer things.
        work: what each thing takes, in any unit.

    Returns:
        The shares, each in the order of the things.

    Example:
        >>> dealt([5, 1, 1, 4, 2], 2, float)
        [[5, 1], [1, 4, 2]]
    """
    totals, owner = [0.0] * shares, dict[int, int]()
    for index in sorted(range(len(things)), key=lambda index: -work(things[index])):
        least = totals.index(min(totals))
        owner[index] = least
        totals[least] += work(things[index])
    return [[thing for index, thing in enumerate(things) if owner[index] == share] for share in range(shares)]


def own_part(method: MergeMethod, source: TaskVectors, group: ProcessGroup) -> TaskVectors:
    """The task vectors of the parameters that this process merges; all of them where it is alone.

    Raises:
        PaveError: there are several processes, and the method cannot be divided.
    """
    if group.size == 1:
        return source
    if not method.parallel:
        raise PaveError(
            f"merge method '{method.name}' cannot be divided among {group.size} processes: {method.serial_because}; "
            "merge in one"
        )
    return PartOfVectors(source, own_parameters(method, source, group))


def own_parameters(method: MergeMethod, source: TaskVectors, group: ProcessGroup) -> Sequence[Parameter]:
    """The parameters that this process merges."""
    if group.size == 1:
        return source.parameters
    return dealt(source.parameters, group.size, lambda parameter: merging_work(method, source, parameter))[group.rank]


def merging_work(method: MergeMethod, source: TaskVectors, parameter: Parameter) -> float:
    """About what merging a parameter takes, in elements that are read and added."""
    spectral = method.cost in (Cost.DECOMPOSITION, Cost.ITERATIONS) and not method.in_blocks(parameter)
    return source.work(parameter) + (spectral_work(parameter) if spectral else 0.0)
