"""Running a merge rule over all parameters of a source of task vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import EllipsisType

import torch
from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.merging.base import MergeMethod, Modulated, PerTaskMethod, StaticMethod
from pave_lightning.merging.evidence import Evidence
from pave_lightning.weights import Parameter, TaskVectors


@dataclass
class MergedVectors:
    """The result of a rule: one merged task vector, and for per-task rules the masks and factors of every task.

    Attributes:
        vectors: merged (or unified) task vector of each parameter, float32.
        masks: for each task and parameter a bool tensor; empty for static rules.
        rescalers: the factor of each task; empty for static rules.
    """

    vectors: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rescalers: dict[str, float] = field(default_factory=dict)


def merge_static(
    method: StaticMethod, source: TaskVectors, evidence: Evidence | None = None
) -> Iterator[tuple[Parameter, Tensor]]:
    """Yield the merged task vector of one parameter after the other, before scaling.

    Args:
        method: the rule.
        source: plain or purified task vectors.
        evidence: what is known of the tasks' data, for rules that need it.

    Raises:
        PaveError: there is nothing to merge, or the rule cannot merge it.
    """
    _begin(method, source, evidence)
    if not method.rescales:
        yield from _merged(method, source)
        return
    for parameter, merged in list(_merged(method, source)):
        yield parameter, merged.mul_(method.factor(parameter))


def _merged(method: StaticMethod, source: TaskVectors) -> Iterator[tuple[Parameter, Tensor]]:
    for parameter in source.parameters:
        merged = torch.empty(parameter.shape)
        for rows in _blocks(method, source, parameter):
            merged[within(rows)] = method.merge(parameter, *_read(source, parameter, rows))
        yield parameter, merged


def merge_per_task(
    method: PerTaskMethod, source: TaskVectors, evidence: Evidence | None = None
) -> Iterator[tuple[Parameter, Modulated]]:
    """Yield the unified task vector and the masks of one parameter after the other; arguments as in `merge_static`.

    Raises:
        PaveError: there is nothing to merge, or the rule cannot merge it.
    """
    _begin(method, source, evidence)
    for parameter in source.parameters:
        shared = torch.empty(parameter.shape)
        masks = {task: torch.empty(parameter.shape, dtype=torch.bool) for task in source.tasks}
        for rows in _blocks(method, source, parameter):
            part = method.merge(parameter, *_read(source, parameter, rows))
            shared[within(rows)] = part.shared
            for task, mask in part.masks.items():
                masks[task][within(rows)] = mask
        yield parameter, Modulated(shared, masks)


def merge(method: MergeMethod, source: TaskVectors, evidence: Evidence | None = None) -> MergedVectors:
    """Merge all parameters in memory; for models that fit there. Arguments as in `merge_static`.

    Example::

        merged = merge(TaskArithmetic(), task_vectors)
        weight = base_weight + 0.3 * merged.vectors["encoder.layer.0.output.dense.weight"]
    """
    result = MergedVectors()
    if isinstance(method, PerTaskMethod):
        result.masks = {task: {} for task in source.tasks}
        for parameter, modulated in merge_per_task(method, source, evidence):
            result.vectors[parameter.name] = modulated.shared
            for task, mask in modulated.masks.items():
                result.masks[task][parameter.name] = mask
        result.rescalers = method.rescalers()
    elif isinstance(method, StaticMethod):
        result.vectors = {parameter.name: merged for parameter, merged in merge_static(method, source, evidence)}
    return result


def _begin(method: MergeMethod, source: TaskVectors, evidence: Evidence | None) -> None:
    if len(source.tasks) < 2:
        raise PaveError(f"merging needs at least two experts, found {len(source.tasks)}")
    if not source.parameters:
        raise PaveError("base and experts share no floating-point tensor, so there is nothing to merge")
    method.begin(source, evidence if evidence is not None else Evidence())


def within(rows: slice | None) -> slice | EllipsisType:
    """The index of a block of rows, or of everything where there are no blocks."""
    return ... if rows is None else rows


def _blocks(method: MergeMethod, source: TaskVectors, parameter: Parameter) -> Iterable[slice | None]:
    return source.blocks(parameter) if method.in_blocks(parameter) else [None]


def _read(source: TaskVectors, parameter: Parameter, rows: slice | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Base and task vectors of one parameter, whole or of one block of its rows."""
    base = source.base(parameter, rows)
    return base, {task: source.expert(task, parameter, rows) - base for task in source.tasks}
