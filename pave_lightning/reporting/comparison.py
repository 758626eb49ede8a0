"""Two models on the same test rows: how much one has more than the other, and where they disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.table import Table
from rich.text import Text

from pave_lightning.reporting.intervals import Interval
from pave_lightning.reporting.scores import Model, ScoreTable
from pave_lightning.reporting.sweep_table import signed
from pave_lightning.reporting.tables import TASK_WIDTH, lines_of, short_metric
from pave_lightning.tasks.predictions import TaskPredictions
from pave_lightning.tasks.text_matches import plain_text


@dataclass(frozen=True)
class Disagreements:
    """Where two models disagree on a task.

    Attributes:
        first: how many predictions only the first model has right (numbers: is nearer with).
        second: the same of the second model.
        places: int64 of shape ``(n,)``: all predictions that differ, as places in the kept ones. Classes of which one
            is right come first, in the order of rows; numbers by how much nearer one of the models is.
        nearer: for each of them 1 where the first model is right or nearer, 2 where the second is, 0 where neither is.
    """

    first: int
    second: int
    places: npt.NDArray[np.int64]
    nearer: npt.NDArray[np.int64]

    def first_ones(self, most: int) -> Disagreements:
        """The same with no more than so many places."""
        return replace(self, places=self.places[:most], nearer=self.nearer[:most])


def disagreements(first: TaskPredictions, second: TaskPredictions) -> Disagreements:
    """Where two models disagree; their predictions are of the same rows.

    Example:
        >>> rows, zero = np.arange(4), np.zeros(4, dtype=np.int64)
        >>> right = np.array([0, 1, 1, 0])
        >>> one = TaskPredictions(rows, zero, np.array([0, 1, 0, 2]), right)
        >>> other = TaskPredictions(rows, zero, np.array([0, 0, 1, 1]), right)
        >>> found = disagreements(one, other)
        >>> found.first, found.second, found.places, found.nearer
        (1, 1, array([1, 2, 3]), array([1, 2, 0]))
    """
    targets = first.targets
    if first.are_texts:
        errors = [_missed(one) for one in (first, second)]
    elif first.are_classes:
        errors = [(one.predictions != targets).astype(np.float64) for one in (first, second)]
    else:
        errors = [np.abs(one.predictions - targets) for one in (first, second)]
    gain: npt.NDArray[np.float64] = errors[1] - errors[0]
    differing = np.flatnonzero(first.predictions != second.predictions)
    places = differing[np.argsort(-np.abs(gain[differing]), kind="stable")]
    nearer = np.where(gain > 0, 1, np.where(gain < 0, 2, 0))
    return Disagreements(int((gain > 0).sum()), int((gain < 0).sum()), places, nearer[places])


def _missed(predictions: TaskPredictions) -> npt.NDArray[np.float64]:
    """1 for each text that is none of the right ones, 0 for others."""
    told = zip(predictions.predictions, predictions.targets, strict=True)
    return np.asarray([plain_text(text) not in map(plain_text, right) for text, right in told], dtype=np.float64)


def comparison_table(
    table: ScoreTable, first: Model, second: Model, found: Mapping[str, Disagreements], *, averages: bool
) -> Table:
    """The scores of two models, their differences with intervals, and how often they disagree, for the terminal.

    Args:
        table: their scores, and the experts' for normalised averages, with intervals of the pair.
        first: a model, A.
        second: the other one, B.
        found: where they disagree, by task.
        averages: whether the averages over tasks are shown.
    """
    shown = Table(box=box.HORIZONTALS, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("")
    shown.add_column("")
    for heading in ("A", "B", "A - B", "95 % interval", "beyond chance", "only A\nright", "only B\nright"):
        shown.add_column(heading, justify="right")
    pair = table.intervals.pair(first, second)
    for task, metric in table.primary_metrics.items():
        values = (table.value(first, task), table.value(second, task))
        own = found.get(task)
        counts = ["-", "-"] if own is None else [str(own.first), str(own.second)]
        name = Text("\n".join(lines_of(task, TASK_WIDTH)))
        shown.add_row(name, short_metric(metric), *_compared(*values, pair.values.get((task, metric))), *counts)
    if averages:
        shown.add_section()
        cells = _compared(table.average(first), table.average(second), pair.average)
        shown.add_row("average", "", *cells, "", "")
        values = (table.normalised_average(first), table.normalised_average(second))
        if has_all_experts(table) and not any(map(math.isnan, values)):
            shown.add_row("normalised", "", *_compared(*values, pair.normalised_average), "", "")
    return shown


def has_all_experts(table: ScoreTable) -> bool:
    """Whether there is an expert's score of every task; otherwise a normalised average would be of fewer tasks."""
    return {score.task for score in table.scores if score.form == "expert"} == set(table.tasks())


def _compared(first: float, second: float, interval: Interval | None) -> list[str]:
    if interval is None or not interval.is_known:
        ends = beyond = "-"
    else:
        ends = f"{signed(interval.low)} to {signed(interval.high)}"
        beyond = "no" if not interval.excludes_zero else "A better" if interval.low > 0 else "B better"
    return [f"{first:.3f}", f"{second:.3f}", signed(first - second), ends, beyond]


def columns_of(
    task: str, first: TaskPredictions, second: TaskPredictions, found: Disagreements, classes: list[str]
) -> dict[str, Any]:
    """The disagreements of one task as columns of a table.

    Args:
        task: its name.
        first: predictions of the first model.
        second: predictions of the second model.
        found: where they disagree.
        classes: names of the classes; none for numbers.

    Returns:
        ``task``, ``row``, ``position``, ``target``, ``a``, ``b`` (class indices or numbers), ``target_class``,
        ``a_class``, ``b_class`` (empty for numbers), and ``nearer``: a, b, or neither. Texts stand in the place of
        classes, several right ones with `` | `` between them, and their numbers are NaN.
    """
    numbers = {"target": first.targets, "a": first.predictions, "b": second.predictions}
    numbers = {name: values[found.places] for name, values in numbers.items()}

    def named(values: npt.NDArray[Any]) -> list[str]:
        if first.are_texts:
            return [value if isinstance(value, str) else " | ".join(value) for value in values]
        return [classes[int(value)] if 0 <= value < len(classes) else "" for value in values]

    return {
        "task": [task] * len(found.places),
        "row": first.rows[found.places],
        "position": first.positions[found.places],
        **{
            name: np.full(len(values), np.nan) if first.are_texts else values.astype(np.float64)
            for name, values in numbers.items()
        },
        **{f"{name}_class": named(values) for name, values in numbers.items()},
        "nearer": [("neither", "a", "b")[which] for which in found.nearer],
    }
