"""Task vectors of whatever base and experts are given as."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import overload

from torch import nn

from pave_lightning.errors import PaveError
from pave_lightning.weights.modules import ModuleTaskVectors, StateDict
from pave_lightning.weights.task_vectors import ExpertTaskVectors, checkpoint_vectors


@overload
def task_vectors(base: str, experts: Mapping[str, str]) -> ExpertTaskVectors: ...


@overload
def task_vectors(
    base: nn.Module, experts: Mapping[str, nn.Module | StateDict], *, heads: Collection[str] = ()
) -> ModuleTaskVectors: ...


def task_vectors(
    base: str | nn.Module,
    experts: Mapping[str, str] | Mapping[str, nn.Module | StateDict],
    *,
    heads: Collection[str] = (),
) -> ExpertTaskVectors | ModuleTaskVectors:
    """Task vectors of fine-tuned models, which are read parameter by parameter.

    Args:
        base: folder, hub id, or ``package:NAME/FOLDER`` of the base model; or any module in memory.
        experts: each task's fine-tuned model: folders or hub ids where the base is one; modules, or state dicts, where
            the base is a module.
        heads: of modules the submodules and parameters that each task keeps for itself, by their dotted names; models
            of transformers tell their heads themselves, and folders hold only these.

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
        return ModuleTaskVectors(base, experts, heads=heads)  # type: ignore[arg-type]
    given = [found for found in (base, *experts.values()) if not isinstance(found, str)]
    if given:
        raise PaveError(
            f"expected folders or hub ids, found {type(given[0]).__name__}; where experts are modules or state dicts, "
            "the base must be a module, which says what each weight does"
        )
    if heads:
        raise PaveError("heads are named for modules in memory alone; checkpoints say by their class what the head is")
    return checkpoint_vectors(base, experts)  # type: ignore[arg-type]
