"""Merge steps of a recipe."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from pave_lightning.config import LONGEST_NAME, NAME_PATTERN, Section, unless_wrong, usable_name
from pave_lightning.evaluation.options import HeadList, Scale
from pave_lightning.purification.options import Purify
from pave_lightning.recipe.limits import MOST_COMBINATIONS, repeats
from pave_lightning.recipe.parameters import Parameters
from pave_lightning.recipe.write import Write


class MergeStep(Section):
    """One merge method, run on plain task vectors, on purified ones, or on what other transforms make of them."""

    method: str
    """The merge method; `pave methods` lists them."""
    name: Annotated[str, Field(pattern=rf"^$|{NAME_PATTERN}", max_length=LONGEST_NAME), AfterValidator(usable_name)] = (
        ""
    )
    """Name of the result in tables and folders; the method's name where nothing is said."""
    scale: Scale | None = None
    """What the merged task vector is multiplied with: a number, search (chosen on the validation split, starting at the
    method's default), or {search: [lowest, highest]}. The method's default where nothing is said; only for methods that
    have a scale."""
    vectors: list[str] = Field(default=["plain", "purified"], min_length=1)
    """Which task vectors the method is run on: plain, purified, and names of stacks of the recipe's section vectors."""
    purify: Purify = Purify()
    """Purification for this step; keys that are not given come from the recipe's purify section."""
    weights: dict[str, float] = {}
    """Factor of each task's vector, by the task's name, before the method: {movie: 0.7, tweet: 0.3}; 1 for tasks that
    are not named. Applied behind all transforms of the stack."""
    parameters: Parameters = Parameters()
    """Which parameters are merged; keys that are not given come from the recipe's parameters section."""
    write: Write = Write()
    """How the result is written; keys that are not given come from the recipe's write section."""
    heads: HeadList | None = None
    """Heads under which this step's models are scored; the recipe's where nothing is said."""
    options: dict[str, Any] = {}
    """The method's own options; `pave methods NAME` lists them."""
    anchor: str | None = None
    """Name of the merge step whose result this one starts from, run on the same task vectors; only for methods that
    calibrate a merged model."""
    tune: dict[str, list[Any]] = {}
    """Options that are chosen on the validation split, each with the values that it may take. Every combination is
    tried, with its own best scale where the scale is searched; among equals the first one wins."""

    @model_validator(mode="before")
    @classmethod
    def _name_after_method(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            raw = {"method": raw}
        if isinstance(raw, dict) and raw.get("name") in (None, "") and isinstance(raw.get("method"), str):
            raw = {**raw, "name": raw["method"]}
        return raw

    @model_validator(mode="after")
    def _tune_agrees(self) -> MergeStep:
        wrong = [f"tune.{key}: takes no value" for key, values in self.tune.items() if not values]
        wrong += [f"tune.{key}: takes the same value twice" for key, values in self.tune.items() if repeats(values)]
        wrong += [f"tune.{key}: has a value in options as well" for key in self.tune if key in self.options]
        combinations = math.prod(map(len, self.tune.values()))
        if combinations > MOST_COMBINATIONS:
            wrong.append(f"tune: asks for {combinations:,} combinations, expected at most {MOST_COMBINATIONS:,}")
        return unless_wrong(self, wrong)

    @property
    def tuned_options(self) -> list[dict[str, Any]]:
        """The options of every combination that ``tune`` asks for; the step's own where it asks for none."""
        combinations = itertools.product(*self.tune.values())
        return [{**self.options, **dict(zip(self.tune, values, strict=True))} for values in combinations]

    @field_validator("vectors")
    @classmethod
    def _differ(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("must not name the same vectors twice")
        return value
