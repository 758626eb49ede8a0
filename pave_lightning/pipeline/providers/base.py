"""What every provider looks like, and the registry that knows them by their need."""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from pave_lightning.merging import Evidence, MergeMethod, Need, method_named
from pave_lightning.pipeline.stage import Stage
from pave_lightning.recipe.schema import MergeStep, Recipe

if TYPE_CHECKING:
    from pave_lightning.pipeline.context import Context
    from pave_lightning.pipeline.stages.merge import MergeStage

# Where the providers of this package lie, which import this module.
PROVIDERS = "pave_lightning.pipeline.providers"

_registry: dict[Need, type[Provider]] = {}


class Provider(ABC):
    """Where merge methods get one thing from that they need besides the weights.

    One is made for all merge steps of a run, so that it may keep what it gave the last time. Plans ask one as well, but
    for `provide`; what only that takes is imported there.
    """

    def problems(self, step: MergeStep, recipe: Recipe, *, needed: bool) -> Iterator[str]:
        """What of a recipe is at odds with what a merge step needs, or does not need, before anything is there.

        Args:
            step: a merge step of any method.
            recipe: the recipe.
            needed: whether the step's method needs this, with any of the options that are tried.
        """
        return iter(())

    def stages(self, merge: MergeStage) -> Sequence[Stage]:
        """The stages that a merge needs for it."""
        return ()

    def inputs(self, merge: MergeStage) -> dict[str, Any]:
        """What the merged model depends on because of it, as plain JSON values under keys of its own.

        Raises:
            PaveError: something that it is made of is missing or stale.
        """
        return {}

    @abstractmethod
    def provide(self, evidence: Evidence, context: Context, method: MergeMethod, merge: MergeStage) -> Evidence:
        """The evidence with what is needed.

        Args:
            evidence: what other providers gave.
            context: what the stages of the recipe share.
            method: the method, with the options that are tried.
            merge: the merge, with the ratio of its purification that is tried; what it says of `stages` is there.
        """


ProviderT = TypeVar("ProviderT", bound=type[Provider])


def provides(need: Need) -> Callable[[ProviderT], ProviderT]:
    """Decorator that makes a provider known as the one of a need.

    Raises:
        ValueError: the need has another provider already.
    """

    def add(kind: ProviderT) -> ProviderT:
        if need in _registry:
            raise ValueError(f"two providers of {need}: {_registry[need].__name__} and {kind.__name__}")
        _registry[need] = kind
        return kind

    return add


def known_providers() -> dict[Need, type[Provider]]:
    """Every provider by its need."""
    _load_own()
    return dict(_registry)


def providers_of(method: str) -> list[Provider]:
    """The providers of what a merge method needs, by the method's name.

    Raises:
        PaveError: no method has the name.
    """
    known = known_providers()
    return [known[need]() for need in sorted(method_named(method).needs)]


@cache
def _load_own() -> None:
    """Load every file of providers of this package, once."""
    for module in pkgutil.iter_modules(import_module(PROVIDERS).__path__, f"{PROVIDERS}."):
        import_module(module.name)
