"""Running a merge method over all parameters of a source of task vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import EllipsisType

import torch
from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.merging.base import MergeMethod, Modulated, PerTaskMethod, StaticMethod
from pave_lightning.merging.dealing import own_part
from pave_lightning.merging.evidence import Evidence
from pave_lightning.merging.merged import MergedVectors
from pave_lightning.merging.modulators import LowRank
from pave_lightning.merging.placing import placed
from pave_lightning.merging.registry import make_method
from pave_lightning.merging.sharing import gathered
from pave_lightning.merging.stacks import EachExpert, as_method_sees
from pave_lightning.system.process_groups import ALONE, ProcessGroup
from pave_lightning.weights import Parameter, TaskVectors


def merge_static(
    method: StaticMethod, source: TaskVectors, evidence: Evidence | None = None, group: ProcessGroup = ALONE
) -> Iterator[tuple[Parameter, Tensor]]:
    """Yield the merged task vector of one parameter after the other, before scaling.

    Args:
        method: the method.
        source: plain or purified task vectors.
        evidence: what is known of the tasks' data, for methods that need it.
        group: the processes that share the merge; each is given its own parameters, in the end the states of all.

    Yields:
        A parameter, and its merged task vector: float32, of the parameter's shape.

    Raises:
        PaveError: there is nothing to merge, or the method cannot merge it.
    """
    given = as_method_sees(method, placed(method, own_part(method, source, group)))
    _begin(method, given, as_method_sees(method, source), evidence, group)
    found: Iterable[tuple[Parameter, Tensor]] = _merged(method, given)
    if method.rescales:
        held = list(found)
        _reduce(method, group)
        found = ((parameter, merged.mul_(method.factor(parameter))) for parameter, merged in held)
    yield from given.together(found) if isinstance(given, EachExpert) else found
    if not method.rescales:
        _reduce(method, group)


def _merged(method: StaticMethod, source: TaskVectors) -> Iterator[tuple[Parameter, Tensor]]:
    for parameter in source.parameters:
        merged = torch.empty(parameter.shape)
        for rows in _blocks(method, source, parameter):
            merged[within(rows)] = method.merge(parameter.block(rows), *source.read(parameter, rows))
        yield parameter, merged


def merge_per_task(
    method: PerTaskMethod, source: TaskVectors, evidence: Evidence | None = None, group: ProcessGroup = ALONE
) -> Iterator[tuple[Parameter, Modulated]]:
    """Yield what is shared and what each task keeps of one parameter after the other; arguments as in `merge_static`.

    Raises:
        PaveError: there is nothing to merge, or the method cannot merge it.
    """
    own = placed(method, own_part(method, source, group))
    _begin(method, own, source, evidence, group)
    for parameter in own.parameters:
        shared = torch.empty(parameter.shape)
        masks: dict[str, Tensor] = {}
        factors: dict[str, LowRank] = {}
        for rows in _blocks(method, own, parameter):
            part = method.merge(parameter.block(rows), *own.read(parameter, rows))
            shared[within(rows)] = part.shared
            for task, mask in part.masks.items():
                masks.setdefault(task, torch.empty(parameter.shape, dtype=torch.bool))[within(rows)] = mask
            factors |= {task: LowRank(kept.left.cpu(), kept.right.cpu()) for task, kept in part.factors.items()}
        yield parameter, Modulated(shared, masks, factors)
    _reduce(method, group)


def merge(
    method: MergeMethod | str, source: TaskVectors, evidence: Evidence | None = None, group: ProcessGroup = ALONE
) -> MergedVectors:
    """Merge all parameters in memory; for models that fit there.

    Args:
        method: the method, or its name for the method with its default options.
        source: plain or purified task vectors.
        evidence: what is known of the tasks' data, for methods that need it.
        group: the processes that share the merge; each is given all of the result.

    Raises:
        PaveError: no method has that name; there is nothing to merge, or the method cannot merge it.
        TypeError: ``method`` is neither a method nor a name.

    Example:
        >>> from pave_lightning.weights import ParameterKind
        >>> class InMemory(TaskVectors):
        ...     tasks, parameters = ("movie", "news"), (Parameter("w", ParameterKind.OTHER, (2,)),)
        ...     def base(self, parameter, rows=None):
        ...         return torch.tensor([1.0, 1.0])
        ...     def expert(self, task, parameter, rows=None):
        ...         return torch.tensor([2.0, 1.0] if task == "movie" else [1.0, 0.0])
        >>> merged = merge("task_arithmetic", InMemory())
        >>> InMemory().base(None) + 0.5 * merged.vectors["w"]
        tensor([1.5000, 0.5000])
    """
    if isinstance(method, str):
        method = make_method(method, {})
    result = MergedVectors(source=source, default_scale=1.0 if method.default_scale is None else method.default_scale)
    if isinstance(method, PerTaskMethod):
        result.masks, result.factors = {task: {} for task in source.tasks}, {task: {} for task in source.tasks}
        for parameter, part in merge_per_task(method, source, evidence, group):
            result.vectors[parameter.name] = part.shared
            for task, mask in part.masks.items():
                result.masks[task][parameter.name] = mask
            for task, factors in part.factors.items():
                result.factors[task][parameter.name] = factors
        result.rescalers = method.rescalers()
    elif isinstance(method, StaticMethod):
        result.vectors = {parameter.name: made for parameter, made in merge_static(method, source, evidence, group)}
    else:
        raise TypeError(f"expected a merge method such as Ties(), or the name of one, found {method!r}")
    gathered(result, group)
    return result


def _begin(
    method: MergeMethod, own: TaskVectors, source: TaskVectors, evidence: Evidence | None, group: ProcessGroup
) -> None:
    """Begin the merge of a part of the task vectors, of which other processes have the rest."""
    if len(source.tasks) < 2:
        raise PaveError(f"merging needs at least two experts, found {len(source.tasks)}")
    if not source.parameters:
        raise PaveError("base and experts share no floating-point tensor, so there is nothing to merge")
    for _ in method.begin_part(own, evidence if evidence is not None else Evidence(), source):
        _reduce(method, group)


def _reduce(method: MergeMethod, group: ProcessGroup) -> None:
    """Make what a method has gathered that of the parameters of all processes."""
    method.states.reduce(group.gather(method.states.gathered()))


def within(rows: slice | None) -> slice | EllipsisType:
    """The index of a block of rows, or of everything where there are no blocks."""
    return ... if rows is None else rows


def _blocks(method: MergeMethod, source: TaskVectors, parameter: Parameter) -> Iterable[slice | None]:
    return source.blocks(parameter) if method.in_blocks(parameter) else [None]
