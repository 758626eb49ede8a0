"""Task vectors of whatever base and experts are given as."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import overload

from torch import nn

from pave_lightning.errors import PaveError
from pave_lightning.weights.modules import ModuleTaskVectors, StateDict
from pave_lightning.weights.task_vectors import ExpertTaskVectors, checkpoint_vectors


@overload
def task_vectors(
    base: str | None = None, experts: Mapping[str, str] | None = None, *, accept: Collection[str] = ()
) -> ExpertTaskVectors: ...


@overload
def task_vectors(
    base: nn.Module, experts: Mapping[str, nn.Module | StateDict], *, heads: Collection[str] = ()
) -> ModuleTaskVectors: ...


def task_vectors(
    base: str | nn.Module | None = None,
    experts: Mapping[str, str] | Mapping[str, nn.Module | StateDict] | None = None,
    *,
    heads: Collection[str] = (),
    accept: Collection[str] = (),
) -> ExpertTaskVectors | ModuleTaskVectors:
    """Task vectors of fine-tuned models, which are read parameter by parameter.

    Args:
        base: folder, hub id, or ``package:NAME/FOLDER`` of the base model, by default the one that the experts'
            adapters name; or any module in memory.
        experts: each task's fine-tuned model: folders or hub ids of checkpoints and adapters where the base is no
            module; modules, or state dicts, where it is one.
        heads: of modules the submodules and parameters that each task keeps for itself, by their dotted names; models
            of transformers tell their heads themselves, and folders hold only these.
        accept: of checkpoints what may differ although it is refused otherwise: ``base``, for adapters that name
            another base.

    Raises:
        PaveError: a model is missing, or the experts do not fit the base (all differences are listed).

    Example:
        >>> from copy import deepcopy
        >>> base = nn.Linear(3, 2)
        >>> vectors = task_vectors(base, {"digits": deepcopy(base), "signs": deepcopy(base)})
        >>> vectors.tasks
        ('digits', 'signs')
    """
    if isinstance(base, nn.Module):
        if accept:
            raise PaveError("accept is for adapters, which name a base; modules in memory name none")
        return ModuleTaskVectors(base, experts or {}, heads=heads)  # type: ignore[arg-type]
    named = [base] if base is not None else []
    given = [found for found in (*named, *(experts or {}).values()) if not isinstance(found, str)]
    if given:
        raise PaveError(
            f"expected folders or hub ids, found {type(given[0]).__name__}; where experts are modules or state dicts, "
            "the base must be a module, which says what each weight does"
        )
    if heads:
        raise PaveError("heads are named for modules in memory alone; checkpoints say by their class what the head is")
    return checkpoint_vectors(base, experts, accept=accept)  # type: ignore[arg-type]
