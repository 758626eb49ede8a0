"""The table of scores for the terminal."""

from __future__ import annotations

import math
import re
from enum import Enum

from rich import box
from rich.table import Table
from rich.text import Text

from pave_lightning.reporting.intervals import Interval
from pave_lightning.reporting.scores import EXPERT_HEADS, Model, ScoreTable
from pave_lightning.reporting.verdicts import half_width

SHORT_METRICS = {
    "accuracy": "acc",
    "f1": "F1",
    "macro_f1": "m-F1",
    "micro_f1": "mi-F1",
    "exact_match": "EM",
    "mean_average_precision": "mAP",
    "token_f1": "t-F1",
    "matthews": "MCC",
    "pearson": "r",
    "spearman": "rho",
}
EXTRA_MARK, CONTROL_MARK = "*", "°"
LABELS_MARK = "†"
NOT_LEARNED_MARK = "!"

# Widths in characters; longer names are broken between their words, and inside of words that are longer than the last
GAP = 2
NUMBER_WIDTH = 6
TASK_WIDTH = 12
MODEL_WIDTH = 24
VECTORS_WIDTH = 16
WORD_WIDTH = 30
HALF_WIDTH = len(" ±.000")


class Bounds(Enum):
    """Behind which numbers half their interval's width is shown; from most to least."""

    ALL = "all"
    AVERAGES = "averages"
    NONE = "none"


def render(table: ScoreTable, width: int = 100) -> Table:
    """Show the scores in the primary metric, one row a model.

    Base and experts, controls, static models, and per-task models are kept apart by lines, because a control is not
    merged, and a model that keeps something extra for each task is not comparable with one that does not. The best
    normalised average of the static models is bold. Tasks that do not fit stand in further tables below. Behind the
    averages, and behind all values where there is room, stands half the width of the interval.

    Args:
        table: The scores.
        width: Columns of the terminal.

    Returns:
        A table for a rich console; where the tasks do not fit beside each other, a grid of tables.
    """
    tasks = table.tasks()
    free = width - _model_width(table) - (GAP + _vectors_width(table)) - _heads_width(table)
    needed = {
        bounds: sum(_width(table, task, bounds) for task in tasks) + _averages_width(table, bounds) for bounds in Bounds
    }
    fitting = [bounds for bounds in _useful(table) if needed[bounds] <= free]
    if fitting:
        whole = _part(table, tasks, fitting[0], with_averages=True)
    else:
        alone = Bounds.AVERAGES if _averages_width(table, Bounds.AVERAGES) <= free else Bounds.NONE
        whole = Table.grid()
        whole.add_column()
        whole.add_row(_part(table, [], alone, with_averages=True))
        for group in _groups(tasks, [_width(table, task, Bounds.NONE) for task in tasks], free):
            whole.add_row("")
            whole.add_row(_part(table, group, Bounds.NONE, with_averages=False))
    whole.caption = Text(
        "\n" + "\n".join(filter(None, [_caption(table), table.left_out_note(), _not_learned(table)])), style="dim"
    )
    whole.caption_justify = "left"
    return whole


def _part(table: ScoreTable, tasks: list[str], bounds: Bounds, *, with_averages: bool) -> Table:
    part = Table(box=box.HORIZONTALS, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    part.add_column("model", overflow="fold", width=_model_width(table))
    part.add_column("vectors", overflow="fold", max_width=_vectors_width(table))
    if _heads_width(table):
        part.add_column("heads", no_wrap=True)
    for task in tasks:
        header = Text("\n".join([*lines_of(task, TASK_WIDTH), short_metric(table.primary_metrics[task])]))
        part.add_column(header, justify="right", overflow="fold", width=_width(table, task, bounds) - GAP)
    if with_averages:
        part.add_column("average", justify="right", no_wrap=True)
        part.add_column("normalised\naverage", justify="right", no_wrap=True)
    best = best_static(table)
    previous = None
    for model in table.models():
        if previous is not None and model.section != previous.section:
            part.add_section()
        cells = [
            Text("\n".join(lines_of(_label(model), MODEL_WIDTH))),
            Text("\n".join(lines_of(model.vectors, VECTORS_WIDTH))),
        ]
        cells += [Text(_heads(model))] if _heads_width(table) else []
        for task in tasks:
            value = number_text(table.value(model, task)) + _mark(table, model, task)
            cells.append(_with_half(value, table.interval(model, task), shown=bounds is Bounds.ALL))
        if with_averages:
            normalised = table.normalised_average(model)
            style = "bold" if model.section == "static" and normalised == best else ""
            shown = bounds is not Bounds.NONE
            cells.append(_with_half(number_text(table.average(model)), table.average_interval(model), shown=shown))
            interval = table.normalised_average_interval(model)
            cells.append(_with_half(number_text(normalised), interval, shown=shown, style=style))
        part.add_row(*cells)
        previous = model
    return part


def lines_of(name: str, width: int) -> list[str]:
    """A name in lines of at most so many characters, broken after the marks and spaces between its words.

    A word that is longer has a line of its own.
    """
    lines = [""]
    for word in re.findall(r"[^-_. ]+[-_. ]*|[-_. ]+", name):
        if lines[-1] and len((lines[-1] + word).rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return [line.rstrip() for line in lines]


def _model_width(table: ScoreTable) -> int:
    lines = [line for model in table.models() for line in lines_of(_label(model), MODEL_WIDTH)]
    return min(max([NUMBER_WIDTH, *map(len, lines)]), WORD_WIDTH)


def _heads_width(table: ScoreTable) -> int:
    """Width of the column that says under which heads models are scored; 0 where all have the experts'."""
    heads = {model.heads for model in table.models()}
    return 0 if heads <= {EXPERT_HEADS} else GAP + max(map(len, ["heads", *map(_heads, table.models())]))


def _vectors_width(table: ScoreTable) -> int:
    lines = [line for model in table.models() for line in lines_of(model.vectors, VECTORS_WIDTH)]
    return min(max([len("purified"), *map(len, lines)]), WORD_WIDTH)


def _width(table: ScoreTable, task: str, bounds: Bounds) -> int:
    lines = [*lines_of(task, TASK_WIDTH), short_metric(table.primary_metrics[task])]
    number = NUMBER_WIDTH + (HALF_WIDTH if bounds is Bounds.ALL else 0)
    return GAP + min(max([number, *map(len, lines)]), WORD_WIDTH)


def _averages_width(table: ScoreTable, bounds: Bounds) -> int:
    """Width of both columns of averages."""
    number = NUMBER_WIDTH - 1 + (HALF_WIDTH if bounds is not Bounds.NONE else 0)
    return sum(GAP + max(number, len(word)) for word in ("average", "normalised"))


def _useful(table: ScoreTable) -> list[Bounds]:
    """How much of the intervals could be shown, most first; nothing of what is not known."""
    known = any(table.average_interval(model).is_known for model in table.models())
    known = known or any(table.interval(model, task).is_known for model in table.models() for task in table.tasks())
    return list(Bounds) if known else [Bounds.NONE]


def _with_half(number: str, interval: Interval, *, shown: bool, style: str = "") -> Text:
    """A number in its style, with half its interval's width behind it where that is shown."""
    half = half_width(interval) if shown else ""
    return Text.assemble((number, style), (f" {half}" if half else "", "dim"))


def _groups(tasks: list[str], widths: list[int], free: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    left = free
    for task, width in zip(tasks, widths, strict=True):
        if width > left and groups[-1]:
            groups.append([])
            left = free
        groups[-1].append(task)
        left -= width
    return groups


def _caption(table: ScoreTable) -> str:
    text = "normalised: a score divided by that of the task's expert (1.000: as good as the expert)."
    if _useful(table) != [Bounds.NONE]:
        text += " ±: half the width of the 95 % interval over test rows."
    if any(model.form == "per-task" for model in table.models()):
        text += f" {EXTRA_MARK} per-task: keeps something extra for each task, so not one model for all tasks."
    if any(model.is_control for model in table.models()):
        text += f" {CONTROL_MARK} control: not merged, scored to compare with."
    if any(model.saw_labels for model in table.models()):
        text += f" {LABELS_MARK} heads fitted to labelled rows, which other heads do not need."
    return text


def _heads(model: Model) -> str:
    return f"{model.heads} {LABELS_MARK}" if model.saw_labels else model.heads


def _mark(table: ScoreTable, model: Model, task: str) -> str:
    """What follows an expert's score that is no higher than that of always the same answer."""
    return NOT_LEARNED_MARK if model.form == "expert" and task in table.not_learned() else ""


def _not_learned(table: ScoreTable) -> str:
    note = table.not_learned_note()
    return f"{NOT_LEARNED_MARK} {note}" if note else ""


def best_static(table: ScoreTable) -> float:
    """The highest normalised average of the static models, which is marked; NaN where there is none."""
    values = [table.normalised_average(model) for model in table.models() if model.section == "static"]
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _label(model: Model) -> str:
    marks = [EXTRA_MARK] * (model.form == "per-task") + [CONTROL_MARK] * model.is_control
    return " ".join([model.name, "".join(marks)]).rstrip()


def short_metric(metric: str) -> str:
    """A metric's name in a heading."""
    return SHORT_METRICS.get(metric, metric)


def number_text(value: float) -> str:
    """A score with three digits; a hyphen where it was not measured."""
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"
