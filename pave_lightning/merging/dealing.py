"""Which of several processes merges which parameters."""

from __future__ import annotations

from collections.abc import Sequence

from pave_lightning.errors import PaveError
from pave_lightning.merging.base import Cost, MergeMethod
from pave_lightning.merging.parts import PartOfVectors
from pave_lightning.system.process_groups import ProcessGroup, dealt
from pave_lightning.weights import Parameter, TaskVectors
from pave_lightning.weights.task_vectors import spectral_work


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
