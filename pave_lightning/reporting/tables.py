"""The table of scores for the terminal."""

from __future__ import annotations

import math
import re

from rich import box
from rich.table import Table
from rich.text import Text

from pave_lightning.reporting.scores import EXPERT_HEADS, Model, ScoreTable

SHORT_METRICS = {
    "accuracy": "acc",
    "f1": "F1",
    "macro_f1": "m-F1",
    "matthews": "MCC",
    "pearson": "r",
    "spearman": "rho",
}
EXTRA_MARK, CONTROL_MARK = "*", "°"
NOT_LEARNED_MARK = "!"

# Widths in characters; longer names are broken between their words, and inside of words that are longer than the last
GAP = 2
NUMBER_WIDTH = 6
TASK_WIDTH = 12
MODEL_WIDTH = 24
VECTORS_WIDTH = 16
WORD_WIDTH = 30


def render(table: ScoreTable, width: int = 100) -> Table:
    """Show the scores in the primary metric, one row a model.

    Base and experts, controls, static models, and per-task models are kept apart by lines, because a control is not
    merged, and a model that keeps something extra for each task is not comparable with one that does not. The best
    normalised average of the static models is bold. Tasks that do not fit stand in further tables below.

    Args:
        table: The scores.
        width: Columns of the terminal.

    Returns:
        A table for a rich console; where the tasks do not fit beside each other, a grid of tables.
    """
    tasks = table.tasks()
    free = width - _model_width(table) - (GAP + _vectors_width(table)) - _heads_width(table)
    averages = GAP + len("average") + GAP + len("normalised")
    if sum(_width(table, task) for task in tasks) + averages <= free:
        whole = _part(table, tasks, with_averages=True)
    else:
        whole = Table.grid()
        whole.add_column()
        whole.add_row(_part(table, [], with_averages=True))
        for group in _groups(tasks, [_width(table, task) for task in tasks], free):
            whole.add_row("")
            whole.add_row(_part(table, group, with_averages=False))
    whole.caption = Text(
        "\n" + "\n".join(filter(None, [_caption(table), table.left_out_note(), _not_learned(table)])), style="dim"
    )
    whole.caption_justify = "left"
    return whole


def _part(table: ScoreTable, tasks: list[str], *, with_averages: bool) -> Table:
    part = Table(box=box.HORIZONTALS, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    part.add_column("model", overflow="fold", width=_model_width(table))
    part.add_column("vectors", overflow="fold", max_width=_vectors_width(table))
    if _heads_width(table):
        part.add_column("heads", no_wrap=True)
    for task in tasks:
        header = Text("\n".join([*lines_of(task, TASK_WIDTH), _short(table.primary_metrics[task])]))
        part.add_column(header, justify="right", overflow="fold", width=_width(table, task) - GAP)
    if with_averages:
        part.add_column("average", justify="right", no_wrap=True)
        part.add_column("normalised\naverage", justify="right", no_wrap=True)
    best = _best_static(table)
    previous = None
    for model in table.models():
        if previous is not None and model.section != previous.section:
            part.add_section()
        cells = [
            Text("\n".join(lines_of(_label(model), MODEL_WIDTH))),
            Text("\n".join(lines_of(model.vectors, VECTORS_WIDTH))),
        ]
        cells += [Text(model.heads)] if _heads_width(table) else []
        cells += [Text(_number(table.value(model, task)) + _mark(table, model, task)) for task in tasks]
        if with_averages:
            normalised = table.normalised_average(model)
            style = "bold" if model.section == "static" and normalised == best else ""
            cells += [Text(_number(table.average(model))), Text(_number(normalised), style=style)]
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
    return 0 if heads <= {EXPERT_HEADS} else GAP + max(map(len, {"heads", *heads}))


def _vectors_width(table: ScoreTable) -> int:
    lines = [line for model in table.models() for line in lines_of(model.vectors, VECTORS_WIDTH)]
    return min(max([len("purified"), *map(len, lines)]), WORD_WIDTH)


def _width(table: ScoreTable, task: str) -> int:
    lines = [*lines_of(task, TASK_WIDTH), _short(table.primary_metrics[task])]
    return GAP + min(max([NUMBER_WIDTH, *map(len, lines)]), WORD_WIDTH)


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
    if any(model.form == "per-task" for model in table.models()):
        text += f" {EXTRA_MARK} per-task: keeps something extra for each task, so not one model for all tasks."
    if any(model.is_control for model in table.models()):
        text += f" {CONTROL_MARK} control: not merged, scored to compare with."
    return text


def _mark(table: ScoreTable, model: Model, task: str) -> str:
    """What follows an expert's score that is no better than always the same answer."""
    return NOT_LEARNED_MARK if model.form == "expert" and task in table.not_learned() else ""


def _not_learned(table: ScoreTable) -> str:
    note = table.not_learned_note()
    return f"{NOT_LEARNED_MARK} {note}" if note else ""


def _best_static(table: ScoreTable) -> float:
    values = [table.normalised_average(model) for model in table.models() if model.section == "static"]
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _label(model: Model) -> str:
    marks = [EXTRA_MARK] * (model.form == "per-task") + [CONTROL_MARK] * model.is_control
    return " ".join([model.name, "".join(marks)]).rstrip()


def _short(metric: str) -> str:
    return SHORT_METRICS.get(metric, metric)


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"
