"""Options of scoring models and of choosing scales."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from pave_lightning.config import FolderPath, Name, Section, Span, unless_wrong

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


CODE_OPTION = "--allow-code-execution"
"""Without it on the command line, no benchmark may run code."""


class Benchmark(Section):
    """A task of lm-eval that models are scored on."""

    expert: Name
    """The task of this recipe whose expert does it: models are scored as they do that task, and the expert's own score
    is the one that normalises."""
    metric: str | None = None
    """The metric that stands in the tables, with or without the name of lm-eval's filter: exact_match, or
    exact_match,strict-match. By default the first; all are kept."""
    few_shot: int | None = Field(default=None, ge=0)
    """Examples in the prompt; by default what the task says."""

    @model_validator(mode="before")
    @classmethod
    def _fill_short_form(cls, raw: Any) -> Any:
        return {"expert": raw} if isinstance(raw, str) else raw


class LmEval(Section):
    """Benchmarks that models are scored on with lm-eval, besides the test splits."""

    benchmarks: dict[str, Benchmark] = Field(min_length=1)
    """Names of tasks or groups of lm-eval, each with the task of this recipe whose expert does it: {gsm8k: math}, or
    {gsm8k: {expert: math, metric: ..., few_shot: ...}}."""
    folder: FolderPath | None = None
    """A folder with task files of one's own (yaml), whose names come before those of lm-eval."""
    limit: int | None = Field(default=None, ge=1)
    """Rows of each task, the first ones; all where nothing is said."""
    batch_size: int | None = Field(default=None, ge=1)
    """Rows of a forward pass; by default evaluate.batch_size."""
    chat: bool = False
    """Whether prompts are written as a chat, by the tokenizer's chat template."""


class Evaluate(Section):
    """How models are scored."""

    batch_size: int = Field(default=64, ge=1)
    """Examples a forward pass."""
    precision: str = "32-true"
    """Precision of the pass (a lightning.Trainer precision)."""
    purified_experts: bool = False
    """Also score every purified expert alone on its own task: what purification costs before anything is merged."""
    lm_eval: LmEval | None = None
    """Benchmarks of lm-eval, for tasks of the kinds causal_lm and seq2seq; takes the package lm_eval."""


HeadFit = Literal["expert", "logits", "probabilities", "orthogonal", "labels"]


def _strength_form(value: Any) -> str:
    return "auto" if isinstance(value, str) else "number"


Strength = Annotated[
    Annotated[float, Field(ge=0), Tag("number")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(_strength_form),
]


class Heads(Section):
    """Under which heads models are scored: those of the experts, or heads whose last layer is fitted to the model."""

    fit: HeadFit = "logits"
    """What the last linear layer of each head is. expert: the expert's own; logits: ridge regression from the model's
    features to what the expert says of training rows, without labels; probabilities: logistic regression to the
    probabilities that the expert gives to classes, without labels; orthogonal: the expert's, behind the turn that
    brings the model's features nearest to the expert's; labels: fitted to the labels of training rows."""
    rows: int = Field(default=512, ge=2)
    """Rows of each task's training split, a seeded sample."""
    strength: Strength = "auto"
    """The penalty of ridge and logistic regression, as a multiple of the mean square of a centred feature; auto: by
    leave-one-out error (ridge), or cross-validation (logistic)."""
    search: bool = True
    """Whether scales, tuned options and an automatic rank ratio are chosen under these heads, which are fitted to every
    model that is tried; with false those stay that were chosen under the experts' heads."""

    @property
    def fitted(self) -> bool:
        """Whether a head is fitted at all."""
        return self.fit != "expert"

    @property
    def label(self) -> str:
        """What tells it from others in tables and in the names of folders."""
        if not self.fitted:  # of which the other keys say nothing
            return self.fit
        usual = Heads.model_fields["rows"].default
        words = [self.fit, *([] if self.rows == usual else [str(self.rows)])]
        words += [] if isinstance(self.strength, str) else [f"strength-{self.strength:g}"]
        return "-".join([*words, *([] if self.search else ["after-search"])])


EXPERT_HEADS = Heads(fit="expert")


def _head_list(raw: Any) -> Any:
    entries = raw if isinstance(raw, list) else [raw]
    return [{"fit": entry} if isinstance(entry, str) else entry for entry in entries]


def _differing(heads: list[Heads]) -> list[Heads]:
    if len({one.label for one in heads}) != len(heads):
        raise ValueError("must not name the same heads twice")
    return heads


HeadList = Annotated[list[Heads], Field(min_length=1), BeforeValidator(_head_list), AfterValidator(_differing)]

Control = Literal["base", "probe", "joint", "experts", "each"]
CONTROLS: tuple[Control, ...] = ("base", "probe", "joint", "experts", "each")


def _control_list(raw: Any) -> Any:
    return list(CONTROLS) if raw is True else [] if raw is False else raw


def _differing_controls(controls: list[Control]) -> list[Control]:
    if len(set(controls)) != len(controls):
        raise ValueError("must not name the same control twice")
    return controls


ControlList = Annotated[list[Control], BeforeValidator(_control_list), AfterValidator(_differing_controls)]
