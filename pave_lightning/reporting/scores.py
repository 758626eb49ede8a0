"""Scores of models on tasks, and the table that compares them with the experts.

A score is *normalised* by dividing it by the expert's score of the same task and metric: 1.0 means that the model does
this task as well as the expert that was fine-tuned for it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pave_lightning.reporting.intervals import NO_INTERVAL, Against, Difference, Interval, Intervals
from pave_lightning.system.files import replacing

if TYPE_CHECKING:
    import pandas as pd

Form = Literal["base", "expert", "static", "per-task"]
Section = Literal["reference", "controls", "static", "per-task"]

# What the heads that experts come with are called, and those that a control is trained with.
EXPERT_HEADS, OWN_HEADS = "expert", "own"
# Vectors of what was not changed before it was merged, or is not merged.
UNCHANGED = ("", "plain")
FORMS: tuple[Form, ...] = ("base", "expert", "static", "per-task")
SECTIONS: tuple[Section, ...] = ("reference", "controls", "static", "per-task")
# Decimal digits that survive a round trip through float32, in which metrics are computed, rounded up.
FLOAT32_DIGITS = 7


@dataclass(frozen=True)
class Score:
    """One metric of one model on one task.

    Args:
        model: Name of the model; base and experts are models too. The experts together are one model.
        vectors: Which task vectors were merged (plain, purified, or the name of another stack of transforms); empty for
            base and experts.
        form: base, expert, static (one set of weights for all tasks), or per-task (keeps something extra for a task).
        task: Name of the task.
        metric: Name of the metric.
        is_primary: Whether this metric stands for the task in tables and averages.
        value: The value, higher is better.
        examples: How many examples it was measured on.
        heads: Under which heads.
        is_control: Whether it is not a merged model, but scored beside them to compare with.
    """

    model: str
    vectors: str
    form: Form
    task: str
    metric: str
    is_primary: bool
    value: float
    examples: int
    heads: str = EXPERT_HEADS
    is_control: bool = False

    @classmethod
    def of(cls, model: Model, **measured: Any) -> Score:
        """One metric of a model; ``measured`` are the other fields."""
        return cls(
            model=model.name,
            vectors=model.vectors,
            form=model.form,
            heads=model.heads,
            is_control=model.is_control,
            **measured,
        )


@dataclass(frozen=True)
class Model:
    """What a row of a table is about: a model's name, which vectors were merged, its form, and its heads.

    A control is not a merged model, whatever its form.
    """

    name: str
    vectors: str
    form: Form
    heads: str = EXPERT_HEADS
    is_control: bool = False

    @property
    def saw_labels(self) -> bool:
        """Whether its heads were fitted to labelled rows."""
        return self.heads.partition("-")[0] == "labels"

    @property
    def section(self) -> Section:
        """The part of tables in which it stands."""
        if self.is_control:
            return "controls"
        match self.form:
            case "base" | "expert":
                return "reference"
        return self.form


class ScoreTable:
    """Scores of several models on the same tasks.

    Args:
        scores: In any order. The order in which tasks first come is kept; models are grouped (base, experts, controls,
            static, per-task) and keep their order within.
        constants: What always the same answer scores, by task and metric, where it is known.
        intervals: Of the scores, their averages and differences, where they are known.

    Raises:
        ValueError: If a score is given twice, if two experts have a score of the same task and metric, or if a task's
            primary metric is not the same one for all models.

    Example:
        >>> table = ScoreTable([
        ...     Score("experts", "", "expert", "sst2", "accuracy", True, 0.8, 100),
        ...     Score("ties", "plain", "static", "sst2", "accuracy", True, 0.6, 100),
        ... ])
        >>> round(table.normalised_average(table.models()[-1]), 3)
        0.75
    """

    def __init__(
        self,
        scores: Iterable[Score],
        constants: Mapping[str, Mapping[str, float]] | None = None,
        intervals: Intervals | None = None,
    ) -> None:
        self.constants = dict(constants or {})
        self.intervals = intervals or Intervals()
        self.scores: tuple[Score, ...] = tuple(scores)
        self.primary_metrics: dict[str, str] = {}
        self._values: dict[tuple[Model, str, str], Score] = {}
        self._experts: dict[tuple[str, str], float] = {}
        for score in self.scores:
            self._add(score)

    def _add(self, score: Score) -> None:
        where = f"'{score.metric}' of task '{score.task}'"
        key = (model_of(score), score.task, score.metric)
        if key in self._values:
            raise ValueError(f"model '{score.model}' ({score.vectors or score.form}) has {where} twice")
        self._values[key] = score
        if score.is_primary and self.primary_metrics.setdefault(score.task, score.metric) != score.metric:
            raise ValueError(
                f"the primary metric of task '{score.task}' is '{self.primary_metrics[score.task]}', not {where}"
            )
        if score.form == "expert":
            if (score.task, score.metric) in self._experts:
                raise ValueError(f"two experts have {where}; normalised values need one expert a task")
            self._experts[score.task, score.metric] = score.value

    def models(self) -> list[Model]:
        """The models in order: base, experts, controls, static, per-task."""

        def place(model: Model) -> tuple[int, int]:
            return SECTIONS.index(model.section), 0 if model.is_control else FORMS.index(model.form)

        return sorted(dict.fromkeys(model for model, _, _ in self._values), key=place)

    def tasks(self) -> list[str]:
        """The tasks that have a score in the primary metric, in order."""
        return list(self.primary_metrics)

    def value(self, model: Model, task: str) -> float:
        """The value of the primary metric of a model on a task; NaN where it was not measured."""
        score = self._primary(model, task)
        return math.nan if score is None else score.value

    def normalised(self, score: Score) -> float:
        """A score divided by the expert's of the same task and metric; NaN when that is missing or not positive."""
        expert = self._experts.get((score.task, score.metric), math.nan)
        return score.value / expert if expert > 0 else math.nan

    def normalised_value(self, model: Model, task: str) -> float:
        """The normalised value of the primary metric of a model on a task; NaN where there is none."""
        score = self._primary(model, task)
        return math.nan if score is None else self.normalised(score)

    def average(self, model: Model) -> float:
        """Mean of a model's values of the primary metric over all tasks; NaN when one is missing."""
        return _mean([self.value(model, task) for task in self.tasks()])

    def normalised_average(self, model: Model) -> float:
        """Mean of a model's normalised values of the primary metric.

        Tasks whose expert has no positive value are left out, for every model alike; NaN when another value is missing.
        """
        left_out = self.left_out()
        return _mean([self.normalised_value(model, task) for task in self.tasks() if task not in left_out])

    def interval(self, model: Model, task: str) -> Interval:
        """The interval of `value`."""
        return self.intervals.values.get((model, task, self.primary_metrics.get(task, "")), NO_INTERVAL)

    def average_interval(self, model: Model) -> Interval:
        """The interval of `average`."""
        return self.intervals.averages.get(model, NO_INTERVAL)

    def normalised_average_interval(self, model: Model) -> Interval:
        """The interval of `normalised_average`."""
        return self.intervals.normalised_averages.get(model, NO_INTERVAL)

    def partner(self, model: Model, against: Against) -> Model | None:
        """The model that another one is compared with; None where there is none.

        What was made from other than plain vectors is compared with plain ones (purified experts with the experts as
        they are), what has fitted heads with the same under the experts' heads, and every model with the base under
        heads that are fitted in the same way, or else under those that come first.
        """
        others = [other for other in self.models() if other != model]
        match against:
            case Against.PLAIN:
                if model.vectors in UNCHANGED:
                    return None
                fitting = [o for o in others if (o.name, o.heads) == (model.name, model.heads)]
                fitting = [other for other in fitting if other.vectors in UNCHANGED]
            case Against.EXPERT_HEADS:
                if model.heads == EXPERT_HEADS:
                    return None
                fitting = [o for o in others if (o.name, o.vectors) == (model.name, model.vectors)]
                fitting = [other for other in fitting if other.heads == EXPERT_HEADS]
            case Against.FITTED_BASE:
                if model.form == "base" and model.heads != EXPERT_HEADS:
                    return None
                fitting = [other for other in others if other.form == "base" and other.heads != EXPERT_HEADS]
                fitting.sort(key=lambda other: other.heads != model.heads)
        return next(iter(fitting), None)

    def difference(self, model: Model, against: Against) -> Difference | None:
        """How much more a model's normalised average is than its partner's; None where it has none."""
        other = self.partner(model, against)
        if other is None:
            return None
        value = self.normalised_average(model) - self.normalised_average(other)
        return Difference(value, self.intervals.pair(model, other).normalised_average, other)

    def left_out(self) -> dict[str, float]:
        """Tasks that no normalised average counts, with their expert's score: not positive, or NaN."""
        experts = {task: self._experts.get((task, metric), math.nan) for task, metric in self.primary_metrics.items()}
        return {task: value for task, value in experts.items() if not value > 0}

    def left_out_note(self) -> str:
        """Which tasks no normalised average counts, and why, in one sentence; empty where all count."""
        if not self._experts:
            return ""
        places = [
            f"{task} ({'no score' if math.isnan(value) else f'{self.primary_metrics[task]} {value:.3g}'})"
            for task, value in self.left_out().items()
        ]
        return left_out_sentence(len(places), places)

    def not_learned(self) -> dict[str, tuple[float, float]]:
        """Tasks whose expert scores no higher than always the same answer: its score, and that answer's."""
        found = {}
        for task, metric in self.primary_metrics.items():
            expert = self._experts.get((task, metric), math.nan)
            constant = self.constants.get(task, {}).get(metric, math.nan)
            if expert <= constant:
                found[task] = (expert, constant)
        return found

    def not_learned_note(self) -> str:
        """Which experts score no higher than always the same answer, in one sentence; empty where none does."""
        places = [
            f"{task} ({self.primary_metrics[task]} {expert:.3f}, always the same answer {constant:.3f})"
            for task, (expert, constant) in self.not_learned().items()
        ]
        if not places:
            return ""
        return (
            f"Not learned: the expert of {', '.join(places)} scores no higher than always the same answer, so "
            "normalised scores of this task and their averages say little."
        )

    def to_long_frame(self) -> pd.DataFrame:
        """One row a score: the fields of `Score` and `normalised`; their intervals; differences between values."""
        import pandas as pd

        columns = ["model", "vectors", "heads", "form", "task", "metric", "headline", "value", "examples"]
        frame = pd.DataFrame([{**vars(score), "headline": score.is_primary} for score in self.scores], columns=columns)
        frame.insert(columns.index("value") + 1, "normalised", [self.normalised(score) for score in self.scores])
        keys = [(model_of(score), score.task, score.metric) for score in self.scores]
        for prefix, known in (("", self.intervals.values), ("normalised_", self.intervals.normalised)):
            found = [known.get(key, NO_INTERVAL) for key in keys]
            frame[f"{prefix}low"] = [interval.low for interval in found]
            frame[f"{prefix}high"] = [interval.high for interval in found]
        partners = {(model, against): self.partner(model, against) for model in self.models() for against in Against}
        for against in Against:
            rows = [self._value_difference(key, partners[key[0], against]) for key in keys]
            for place, end in enumerate(("", "_low", "_high")):
                frame[f"{against}{end}"] = [row[place] for row in rows]
        return frame

    def _value_difference(self, key: tuple[Model, str, str], other: Model | None) -> tuple[float, float, float]:
        """How much more a model has than another one in one task and metric, with the interval's ends."""
        model, task, metric = key
        theirs = None if other is None else self._values.get((other, task, metric))
        if theirs is None:
            return math.nan, math.nan, math.nan
        interval = self.intervals.pair(model, other).values.get((task, metric), NO_INTERVAL)
        return self._values[key].value - theirs.value, interval.low, interval.high

    def to_wide_frame(self) -> pd.DataFrame:
        """One row a model: values of the primary metric, their average, normalised values, their average.

        Behind them the ends of the intervals of values and averages, and the differences between normalised averages
        (see `partner`) with theirs.
        """
        import pandas as pd

        return pd.DataFrame(self._rows(), columns=self._columns())

    def write_csv(self, path: Path | str) -> None:
        """Write the wide table with the seven digits that scores in float32 have; what was not measured stays empty.

        Args:
            path: The file; its folder is made where it does not exist.
        """
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self._columns())
            for row in self._rows():
                writer.writerow([_written(cell) for cell in row])

    def write_parquet(self, path: Path | str) -> None:
        """Write the long table.

        Args:
            path: The file; its folder is made where it does not exist.
        """
        with replacing(path) as temporary:
            self.to_long_frame().to_parquet(temporary, index=False)

    def _primary(self, model: Model, task: str) -> Score | None:
        return self._values.get((model, task, self.primary_metrics.get(task, "")))

    def _columns(self) -> list[str]:
        values = [f"{task}/{metric}" for task, metric in self.primary_metrics.items()]
        normalised = [f"{task}/normalised" for task in self.primary_metrics]
        measured = [*values, "average", *normalised, "normalised_average"]
        differences = [f"normalised_average/{against}" for against in Against]
        bounded = [*values, "average", "normalised_average"]
        ends = [column for name in bounded for column in _ends(name)]
        ends += [column for name in differences for column in (name, *_ends(name))]
        return ["model", "vectors", "heads", "form", *measured, *ends]

    def _rows(self) -> list[list[str | float]]:
        return [
            [
                model.name,
                model.vectors,
                model.heads,
                model.form,
                *(self.value(model, task) for task in self.tasks()),
                self.average(model),
                *(self.normalised_value(model, task) for task in self.tasks()),
                self.normalised_average(model),
                *self._bounds(model),
            ]
            for model in self.models()
        ]

    def _bounds(self, model: Model) -> list[float]:
        """The ends of all intervals of a row, and the differences with theirs."""
        intervals = [self.interval(model, task) for task in self.tasks()]
        intervals += [self.average_interval(model), self.normalised_average_interval(model)]
        found = [end for interval in intervals for end in (interval.low, interval.high)]
        for against in Against:
            difference = self.difference(model, against)
            if difference is None:
                found += [math.nan] * 3
            else:
                found += [difference.value, difference.interval.low, difference.interval.high]
        return found


def left_out_sentence(tasks: int, places: Sequence[str]) -> str:
    """What is said of tasks that no normalised average counts; empty where there is none.

    Args:
        tasks: How many there are.
        places: Each task, with what tells more in brackets.
    """
    if not tasks:
        return ""
    return (
        f"{tasks} task{'s' if tasks != 1 else ''} left out of the normalised average, for every model alike, where the"
        f" expert has no score above zero: {', '.join(places)}."
    )


def model_of(score: Score) -> Model:
    """The model that a score belongs to."""
    return Model(score.model, score.vectors, score.form, score.heads, score.is_control)


def _ends(name: str) -> tuple[str, str]:
    return f"{name}/low", f"{name}/high"


def _written(cell: str | float) -> str | float:
    if not isinstance(cell, float):
        return cell
    return "" if math.isnan(cell) else float(f"{cell:.{FLOAT32_DIGITS}g}")


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
