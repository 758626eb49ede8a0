"""Running a merge rule over all parameters of a source of task vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.merging.base import MergeMethod, Modulated, PerTaskMethod, StaticMethod
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


def merge_static(method: StaticMethod, source: TaskVectors) -> Iterator[tuple[Parameter, Tensor]]:
    """Yield the merged task vector of one parameter after the other, before scaling.

    Raises:
        PaveError: there is nothing to merge.
    """
    _check(source)
    method.prepare(source)
    for parameter in source.parameters:
        parts = [method.merge(parameter, base, vectors) for base, vectors in _pieces(method, source, parameter)]
        yield parameter, torch.cat(parts) if len(parts) > 1 else parts[0]


def merge_per_task(method: PerTaskMethod, source: TaskVectors) -> Iterator[tuple[Parameter, Modulated]]:
    """Yield the unified task vector and the masks of one parameter after the other.

    Raises:
        PaveError: there is nothing to merge.
    """
    _check(source)
    method.prepare(source)
    for parameter in source.parameters:
        parts = [method.merge(parameter, base, vectors) for base, vectors in _pieces(method, source, parameter)]
        if len(parts) == 1:
            yield parameter, parts[0]
        else:
            masks = {task: torch.cat([part.masks[task] for part in parts]) for task in source.tasks}
            yield parameter, Modulated(torch.cat([part.shared for part in parts]), masks)


def merge(method: MergeMethod, source: TaskVectors) -> MergedVectors:
    """Merge all parameters in memory; for models that fit there.

    Example::

        merged = merge(TaskArithmetic(), task_vectors)
        weight = base_weight + 0.3 * merged.vectors["encoder.layer.0.output.dense.weight"]
    """
    result = MergedVectors()
    if isinstance(method, PerTaskMethod):
        result.masks = {task: {} for task in source.tasks}
        for parameter, modulated in merge_per_task(method, source):
            result.vectors[parameter.name] = modulated.shared
            for task, mask in modulated.masks.items():
                result.masks[task][parameter.name] = mask
        result.rescalers = method.rescalers()
    elif isinstance(method, StaticMethod):
        result.vectors = {parameter.name: merged for parameter, merged in merge_static(method, source)}
    return result


def _check(source: TaskVectors) -> None:
    if len(source.tasks) < 2:
        raise PaveError(f"merging needs at least two experts, found {len(source.tasks)}")
    if not source.parameters:
        raise PaveError("base and experts share no floating-point tensor, so there is nothing to merge")


def _pieces(
    method: MergeMethod, source: TaskVectors, parameter: Parameter
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Base and task vectors of one parameter, whole or in blocks of rows."""
    for rows in source.blocks(parameter) if method.elementwise else [None]:
        base = source.base(parameter, rows)
        yield base, {task: source.expert(task, parameter, rows) - base for task in source.tasks}
