"""Options of scoring models and of choosing scales."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pave_lightning.config import Section, Span, unless_wrong

# Most scales of one search.
MOST_POINTS = 1000


def _search_form(value: Any) -> str:
    return "auto" if isinstance(value, str) else "range"


SearchRange = Annotated[
    Annotated[Span, Tag("range")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(_search_form),
]
# Scales of a range where a recipe does not say how many.
DEFAULT_POINTS = 7


class ScaleSearch(Section):
    """Choose the scale on the validation split: the one with the best average of normalised scores."""

    search: SearchRange
    """Lowest and highest scale that is tried; or auto: start at the method's default scale, go up and down by factors
    of two until the score has fallen on both sides, and refine around the best."""
    points: int | None = Field(default=None, ge=2, le=MOST_POINTS)
    """Evenly spaced scales of a range, both ends included; 7 where nothing is said. Not for auto."""
    examples: int | None = Field(default=None, ge=2)
    """Validation rows a task that the search looks at; all that the task uses where nothing is said."""

    @model_validator(mode="before")
    @classmethod
    def _fill_short_form(cls, raw: Any) -> Any:
        if raw == "search":
            return {"search": "auto"}
        if isinstance(raw, dict) and raw.get("points") is None and isinstance(raw.get("search"), (list, tuple)):
            return {**raw, "points": DEFAULT_POINTS}
        return raw

    @field_validator("search")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | Literal["auto"]) -> tuple[float, float] | Literal["auto"]:
        if value != "auto" and value[0] >= value[1]:
            raise ValueError("must be [lowest, highest]")
        return value

    @model_validator(mode="after")
    def _points_of_a_range(self) -> ScaleSearch:
        of_auto = self.search == "auto" and self.points is not None
        return unless_wrong(self, ["'points' belongs to a range [lowest, highest], not to auto"] if of_auto else [])


def _scale_form(value: Any) -> str:
    return "a search" if isinstance(value, (dict, ScaleSearch)) or value == "search" else "a number"


Scale = Annotated[
    Annotated[float, Tag("a number")] | Annotated[ScaleSearch, Tag("a search")],
    Discriminator(_scale_form),
]


class Evaluate(Section):
    """How models are scored."""

    batch_size: int = Field(default=64, ge=1)
    """Examples a forward pass."""
    precision: str = "32-true"
    """Precision of the pass (a lightning.Trainer precision)."""
    purified_experts: bool = False
    """Also score every purified expert alone on its own task: what purification costs before anything is merged."""
