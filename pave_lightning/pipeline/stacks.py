"""Stacks of transforms as a recipe's merge steps use them, with all of their options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from pave_lightning.config import options_of
from pave_lightning.errors import PaveError, Problems
from pave_lightning.merging import Need
from pave_lightning.pipeline.seeds import with_seed
from pave_lightning.purification.options import Purify
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.recipe.schema import Recipe
from pave_lightning.recipe.stacks import BUILT_IN
from pave_lightning.transforms import Transform, transform_named
from pave_lightning.transforms.pave import Pave
from pave_lightning.transforms.task_weights import TaskWeights, TaskWeightsOptions


@dataclass(frozen=True)
class TransformStack:
    """What is done to task vectors before a merge step.

    Attributes:
        name: how recipes, tables and folders call it.
        transforms: the transforms in order; none for plain task vectors.
        places: where the options of each are said, in messages.
        inherited: for each, the section of the merge step that holds all of its options; empty where it has own ones.
    """

    name: str
    transforms: tuple[Transform, ...]
    places: tuple[str, ...]
    inherited: tuple[str, ...]

    @property
    def needs(self) -> frozenset[Need]:
        """What its transforms need besides the task vectors."""
        return frozenset(need for transform in self.transforms for need in transform.needs)

    @property
    def keeps_factors(self) -> bool:
        """Whether low-rank factors of adapters survive it."""
        return all(transform.keeps_factors for transform in self.transforms)

    @property
    def purification(self) -> Purify | None:
        """The purification that it begins with, of plain task vectors, which is stored; None where there is none."""
        first = self.transforms[0] if self.transforms else None
        return first.options if isinstance(first, Pave) else None

    @property
    def purified_when_read(self) -> list[Purify]:
        """The purifications behind other transforms, which are computed whenever they are read."""
        return [transform.options for transform in self.transforms[1:] if isinstance(transform, Pave)]

    @property
    def is_built_in(self) -> bool:
        """Whether its name says what it is in every recipe."""
        return self.name in BUILT_IN and len(self.transforms) == len(BUILT_IN[self.name])

    @property
    def rho(self) -> float | str | None:
        """The ratio of its first purification; None where nothing is purified."""
        found = (transform.options.rho for transform in self.transforms if isinstance(transform, Pave))
        return next(found, None)

    @property
    def is_chosen(self) -> bool:
        """Whether a ratio in it is chosen on validation data."""
        return any(transform.options.rho == "auto" for transform in self.transforms if isinstance(transform, Pave))

    def described(self) -> list[dict[str, Any]]:
        """Names and options of its transforms, as plain JSON values."""
        return [
            {"name": transform.name, "options": transform.options.model_dump(mode="json")}
            for transform in self.transforms
        ]


def stack_of(recipe: Recipe, name: str, step: MergeStep | None = None) -> TransformStack:
    """The stack of a name.

    Args:
        recipe: the recipe, which names it unless it is built in.
        name: its name.
        step: the merge step before which it is used, whose sections hold what the stack does not say; the recipe's own
            sections where None.

    Raises:
        PaveError: a transform or an option is unknown, or an option's value is not possible; all is told at once.
    """
    problems = Problems(f"the task vectors '{name}' cannot be made:")
    transforms: list[Transform] = []
    places: list[str] = []
    inherited: list[str] = []
    for index, (kind_name, given) in enumerate(recipe.stack(name)):
        place = f"vectors.{name}.{index} ({kind_name})"
        try:
            transforms.append(_transform(kind_name, given, recipe, step))
        except PaveError as error:
            problems.add(f"{place}: {error}")
            continue
        places.append(place)
        inherited.append("" if given else transforms[-1].section)
    if step is not None and step.weights:
        transforms.append(TaskWeights(TaskWeightsOptions.model_validate(step.weights)))
        places.append(f"merge.{step.name}.weights")
        inherited.append("")
    problems.raise_if_any()
    return TransformStack(name, tuple(transforms), tuple(places), tuple(inherited))


def transform_problem(recipe: Recipe, name: str, place: int, step: MergeStep | None = None) -> str | None:
    """What is wrong with a transform of a stack, or with its options; None where nothing is.

    Args:
        recipe: the recipe.
        name: name of the stack.
        place: which transform of the stack.
        step: as `stack_of` takes it.
    """
    try:
        _transform(*recipe.stack(name)[place], recipe, step)
    except PaveError as error:
        return str(error)
    return None


def _transform(name: str, given: Mapping[str, Any], recipe: Recipe, step: MergeStep | None) -> Transform:
    kind = transform_named(name)
    return kind(_options(kind, given, recipe, step))


def _options(kind: type[Transform], given: Mapping[str, Any], recipe: Recipe, step: MergeStep | None) -> BaseModel:
    """The options of a transform in a stack: its own ones over those of its section, with a seed."""
    if given.get("rho") == "auto" and kind is Pave:
        raise PaveError("rho: auto is said in the section purify, of the recipe or of a merge step")
    section = getattr(step or recipe, kind.section) if kind.section else None
    if section is not None and not given:
        found: BaseModel = section
        return found
    own = {**({} if section is None else section.model_dump()), **given}
    return options_of(kind.Options, with_seed(kind.Options, own, recipe.seed), f"transform '{kind.name}'")


def stacks_of(recipe: Recipe) -> Iterator[tuple[MergeStep, TransformStack]]:
    """Each merge step with each of its stacks.

    Raises:
        PaveError: a transform or its options are wrong.
    """
    return ((step, stack_of(recipe, name, step)) for step in recipe.merge for name in step.vectors)
