"""What every provider looks like, and the registry that knows them by their need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

from pave_lightning.errors import PaveError, listed
from pave_lightning.merging import Evidence, MergeMethod, Need
from pave_lightning.pipeline.context import Context, shared
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stacks import TransformStack, stack_of
from pave_lightning.pipeline.stage import Stage
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.recipe.schema import Recipe
from pave_lightning.system.plug_ins import Registry
from pave_lightning.transforms import Transform

# Where the providers of this package lie, which import this module.
PROVIDERS = "pave_lightning.pipeline.providers"

# What asks for evidence: by what it needs, and for how many examples.
Asking: TypeAlias = MergeMethod | Transform


@dataclass(frozen=True)
class MergeRequest:
    """What providers are asked for: evidence for one merge step on one stack of transforms.

    Attributes:
        results: the recipe, and what is there of it.
        step: the merge step; while it is merged, with the ratio of its purification that is tried.
        vectors: name of the stack that makes its task vectors.
    """

    results: Results
    step: MergeStep
    vectors: str

    @property
    def stack(self) -> TransformStack:
        """The stack that makes its task vectors."""
        return stack_of(self.results.recipe, self.vectors, self.step)


class Provider(ABC):
    """Where merge methods and transforms get one thing from that they need besides the weights.

    One is made for all merge steps of a run, so that it may keep what it gave the last time. Plans ask one as well, but
    for `provide`; what only that takes is imported there.

    Attributes:
        loads_weights: whether models are given the weights of checkpoints for it, so that the names have to fit.
    """

    loads_weights: ClassVar[bool] = False

    def problems(self, step: MergeStep, recipe: Recipe, *, needed: bool) -> Iterator[str]:
        """What of a recipe is at odds with what a merge step needs, or does not need, before anything is there.

        Args:
            step: a merge step of any method.
            recipe: the recipe.
            needed: whether the step's method needs this, with any of the options that are tried.
        """
        return iter(())

    def stages(self, request: MergeRequest) -> Sequence[Stage]:
        """The stages that a merge needs for it."""
        return ()

    def inputs(self, request: MergeRequest) -> dict[str, Any]:
        """What the merged model depends on because of it, as plain JSON values under keys of its own.

        Raises:
            PaveError: something that it is made of is missing or stale.
        """
        return {}

    @abstractmethod
    def provide(self, evidence: Evidence, context: Context, asking: Asking, request: MergeRequest) -> Evidence:
        """The evidence with what is needed.

        Args:
            evidence: what other providers gave.
            context: what the stages of the recipe share.
            asking: the method, with the options that are tried, or a transform of its task vectors.
            request: the step; what it says of `stages` is there.
        """


_registry = Registry[Provider]("provider", PROVIDERS)

ProviderT = TypeVar("ProviderT", bound=type[Provider])


def provides(need: Need) -> Callable[[ProviderT], ProviderT]:
    """Decorator that makes a provider known as the one of a need.

    Raises:
        ValueError: the need has another provider already.
    """

    def add(kind: ProviderT) -> ProviderT:
        _registry.add(need, kind)
        return kind

    return add


def known_providers() -> dict[str, type[Provider]]:
    """Every provider by its need."""
    return _registry.known()


def providers_of(needs: Collection[Need]) -> list[Provider]:
    """The providers of what is needed.

    Raises:
        PaveError: nothing provides some of it.
    """
    known = known_providers()
    if without := [need for need in sorted(needs) if need not in known]:
        raise PaveError(f"nothing provides {listed(without, 3)}, which a merge needs")
    return [known[need]() for need in sorted(needs)]


@shared
def _providers(context: Context) -> dict[str, Provider]:
    return {need: kind() for need, kind in known_providers().items()}


def evidence(context: Context, asking: Asking, request: MergeRequest) -> Evidence:
    """What a method or transform needs besides the weights, once all stages that it needs are there."""
    found = Evidence()
    for need in sorted(asking.needs):
        found = _providers(context)[need].provide(found, context, asking, request)
    return found
