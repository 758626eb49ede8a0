"""Which purifications a recipe asks for, what they are called, and what the stages that look at one have in common."""

from __future__ import annotations

from typing import ClassVar, Self

from pave_lightning.config import slug
from pave_lightning.errors import PaveError
from pave_lightning.pipeline.results import Results, short_digest
from pave_lightning.pipeline.stacks import stacks_of
from pave_lightning.pipeline.stage import Stage
from pave_lightning.purification.options import Purify
from pave_lightning.recipe.schema import Recipe


def label(options: Purify) -> str:
    """What tells a purification from others in the names of folders and pictures."""
    ratio = options.rho if isinstance(options.rho, str) else f"{options.rho:g}"
    return slug(f"rho{ratio}-{options.metric}-{options.allocation}-{short_digest(options.model_dump())}")


def fixed_purifications(recipe: Recipe) -> list[Purify]:
    """Every distinct purification of plain task vectors whose ratio is a number.

    Those with which the stacks of the merge steps begin, or else the recipe's. None where every ratio is to be chosen
    on validation data.

    Raises:
        PaveError: a transform is wrong.
    """
    asked = [options for _, stack in stacks_of(recipe) if (options := stack.purification) is not None]
    return [options for options in dict.fromkeys(asked or [recipe.purify]) if options.rho != "auto"]


def purifications(recipe: Recipe) -> list[Purify]:
    """Every distinct purification of plain task vectors, as `fixed_purifications` has them.

    Raises:
        PaveError: there is none, because every ratio is to be chosen on validation data; or a transform is wrong.
    """
    found = fixed_purifications(recipe)
    if not found:
        asked = [step.name for step, stack in stacks_of(recipe) if stack.purification is not None]
        own = [f"merge.{name}.purify.rho" for name in asked] if recipe.purify.rho != "auto" else ["purify.rho"]
        raise PaveError(
            "the ratios of all purifications are 'auto', which only merging chooses; "
            f"give a number at {' or '.join(own)}"
        )
    return found


class PurificationStage(Stage):
    """What a command of its own leaves of one purification: one stage for each that a recipe asks for.

    Attributes:
        place: the folder below the run folder that holds all of them.

    Args:
        results: the recipe, and what is there of it.
        options: the purification.
    """

    place: ClassVar[str]

    def __init__(self, results: Results, options: Purify) -> None:
        super().__init__(results)
        self.options = options

    @classmethod
    def all(cls, results: Results) -> list[Self]:
        """One for each distinct purification of the recipe; see `purifications`."""
        return [cls(results, options) for options in purifications(results.recipe)]

    @classmethod
    def asked(cls, results: Results) -> tuple[()]:
        """None: this is a command of its own."""
        return ()

    @property
    def name(self) -> str:
        """``PLACE/LABEL``."""
        return f"{self.place}/{label(self.options)}"

    def about(self) -> str:
        """The purification, and the command."""
        return f"{self.options.summary}, with `{self.made_by}`"
