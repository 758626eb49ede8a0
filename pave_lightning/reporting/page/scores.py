"""The sections of scores: averages of every model, and every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from pave_lightning.reporting.intervals import Interval
from pave_lightning.reporting.page import marks
from pave_lightning.reporting.page.content import Block, Cell, Column, Figure, Rows, Section, Table, Text
from pave_lightning.reporting.scores import EXPERT_HEADS, Model, ScoreTable
from pave_lightning.reporting.scores import Section as Part
from pave_lightning.reporting.tables import best_static, number_text
from pave_lightning.reporting.vectors import in_order
from pave_lightning.reporting.verdicts import difference_lines, half_width

TITLES: dict[Part, str] = {
    "reference": "References",
    "controls": "Controls: not merged, scored to compare with",
    "static": "Merged: one set of weights for all tasks",
    "per-task": "Per-task: something extra is kept for each task, so not one model for all",
}
ROW_HEIGHT = 36
# Beyond these, dots are drawn at the edge: one value far below zero must not flatten all others.
LOWEST, HIGHEST = -0.3, 1.5


def results_section(table: ScoreTable) -> Section:
    """Averages of every model with intervals, best first to be seen; how models differ; a figure of it."""
    return Section("results", "Results", list(_results(table)))


def _results(table: ScoreTable) -> Iterator[Block]:
    best = best_static(table)

    def cells(model: Model) -> list[Cell]:
        normalised = table.normalised_average(model)
        task, lowest = _weakest(table, model)
        return [
            name_cell(model),
            _number(table.average(model), table.average_interval(model)),
            _number(
                normalised,
                table.normalised_average_interval(model),
                is_best=model.section == "static" and normalised == best,
            ),
            Cell(task, number_text(lowest) if task else ""),
        ]

    columns = [
        NAME,
        Column("average", is_number=True),
        Column("normalised", "average", is_number=True),
        Column("weakest task", "normalised"),
    ]
    caption = "Averages over all tasks. Normalised: a score divided by that of the task's expert (1.000: as good)."
    yield Table(caption, columns, grouped(table, cells))
    yield Text(list(_notes(table)))
    heading, *lines = difference_lines(table) or [""]
    if lines:
        yield Text(lines, is_list=True, heading=heading.removesuffix(":"))
    if any(model.section != "reference" for model in table.models()):
        yield normalised_figure(table)


def tasks_section(table: ScoreTable) -> Section:
    """Every task's score in its primary metric; normalised; and in all other metrics."""
    return Section("tasks", "Scores by task", list(_tasks(table)))


def _tasks(table: ScoreTable) -> Iterator[Block]:
    tasks = table.tasks()
    best = {task: _best_on(table, task) for task in tasks}

    def cells(model: Model) -> list[Cell]:
        found = [
            _number(
                table.value(model, task),
                table.interval(model, task),
                is_best=model.section == "static" and table.value(model, task) == best[task],
            )
            for task in tasks
        ]
        return [name_cell(model), *found]

    columns = [Column(task, table.primary_metrics[task], is_number=True) for task in tasks]
    yield Table(
        "Scores on the test split of each task; the best merged model with one set of weights is marked.",
        [NAME, *columns],
        grouped(table, cells),
    )
    yield _task_figure(table)
    further = _further_metrics(table)
    if further is not None:
        yield further


def _best_on(table: ScoreTable, task: str) -> float:
    """The highest score of the static models on a task; NaN where several have the same and none has less."""
    static = [table.value(model, task) for model in table.models() if model.section == "static"]
    values = [value for value in static if not math.isnan(value)]
    return math.nan if len(values) > 1 and len(set(values)) == 1 else max(values, default=math.nan)


def _further_metrics(table: ScoreTable) -> Table | None:
    """All metrics besides the primary ones, a row a model and task."""
    found = [score for score in table.scores if not score.is_primary]
    if not found:
        return None
    metrics = list(dict.fromkeys(score.metric for score in found))
    values = {(score.task, _key(score), score.metric): score for score in found}
    rows = []
    for model in table.models():
        for task in table.tasks():
            own = [values.get((task, model, metric)) for metric in metrics]
            if any(own):
                numbers = [Cell("" if one is None else number_text(one.value)) for one in own]
                rows.append([Cell(marks.name_of(model)), Cell(task), *numbers])
    columns = [Column("model"), Column("task"), *(Column(metric, is_number=True) for metric in metrics)]
    return Table("All other metrics", columns, [Rows(rows)], folded=True)


def _key(score: Any) -> Model:
    return Model(score.model, score.vectors, score.form, score.heads, score.is_control)


NAME = Column("model", "task vectors, heads")


def name_cell(model: Model) -> Cell:
    """The cell that says which model a row is about; heads are told where they are not the experts'."""
    heads = f"{model.heads} heads" if model.heads != EXPERT_HEADS else ""
    told = ", ".join(filter(None, [model.vectors, f"{heads} †" if model.saw_labels else heads]))
    return Cell(model.name, told)


def grouped(table: ScoreTable, cells: Callable[[Model], Sequence[Cell]]) -> list[Rows]:
    """A row a model, those of one section together."""
    sections = groupby(table.models(), key=lambda model: model.section)
    return [Rows([cells(model) for model in models], TITLES[section]) for section, models in sections]


def _number(value: float, interval: Interval, *, is_best: bool = False) -> Cell:
    return Cell(number_text(value), half_width(interval), is_best)


def _weakest(table: ScoreTable, model: Model) -> tuple[str, float]:
    """The task that a model does worst, in normalised scores."""
    values = {task: table.normalised_value(model, task) for task in table.tasks()}
    known = {task: value for task, value in values.items() if not math.isnan(value)}
    task = min(known, key=lambda name: known[name], default="")
    return task, known.get(task, math.nan)


def _notes(table: ScoreTable) -> Iterator[str]:
    if any(table.average_interval(model).is_known for model in table.models()):
        yield (
            "± is half the width of the 95 % interval over test rows: what other test rows would have given for the "
            "same weights. It does not cover other seeds."
        )
    if any(model.saw_labels for model in table.models()):
        yield "† These heads were fitted to labelled rows, which other heads do not need."
    yield from filter(None, (table.left_out_note(), table.not_learned_note()))


def normalised_figure(table: ScoreTable) -> Figure:
    """Normalised scores of controls and merged models: a row a model, a symbol a task, a bar with the interval."""
    models = [model for model in table.models() if model.section != "reference"]
    kinds = in_order(model.vectors for model in models if not model.is_control)
    labels = [_row_label(model) for model in models]
    places = list(range(len(models)))
    traces: list[dict[str, Any]] = []
    for vectors in [None, *kinds]:
        own = [place for place in places if _series(models[place]) == vectors]
        if own:
            traces.append(_averages(table, models, own, "control" if vectors is None else vectors or "merged", kinds))
    tasks = table.tasks()
    for index, task in enumerate(tasks):
        values = [table.normalised_value(model, task) for model in models]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": marks.shown(task),
                "x": marks.finite(_clamped(value) for value in values),
                # Side by side, for tasks often score alike.
                "y": [place + 0.5 * ((index + 1) / (len(tasks) + 1) - 0.5) for place in places],
                "customdata": [
                    [marks.shown(marks.name_of(model)), number_text(value)]
                    for model, value in zip(models, values, strict=True)
                ],
                "hovertemplate": "%{customdata[0]}<br>%{customdata[1]}",
                "marker": {
                    "color": marks.task_colour(index),
                    "symbol": marks.task_symbol(index),
                    "size": 8,
                    "line": {"color": "--page", "width": 0.8},
                },
            }
        )
    shapes = [_line(1.0, "--expert", "solid")]
    shapes += [
        _line(_clamped(table.normalised_average(model)), "--base", "dash")
        for model in table.models()
        if model.form == "base" and not model.is_control and math.isfinite(table.normalised_average(model))
    ]
    borders = [place for place in places[1:] if models[place].section != models[place - 1].section]
    shapes += [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": place - 0.5,
            "y1": place - 0.5,
            "line": {"color": marks.MUTED, "width": 1},
        }
        for place in borders
    ]
    return Figure(
        "Normalised scores: average with its 95 % interval (bar), single tasks (symbols); solid line: the experts, "
        "dashed line: the base",
        traces,
        {
            "barmode": "overlay",
            "shapes": shapes,
            "xaxis": marks.axis("score divided by the expert's", zeroline=True),
            "yaxis": {
                "tickvals": places,
                "ticktext": labels,
                "tickfont": {"size": 11},
                "range": [len(models) - 0.5, -0.5],
                "showgrid": False,
                "zeroline": False,
            },
        },
        height=170 + ROW_HEIGHT * len(models),
    )


def _row_label(model: Model) -> str:
    told = ", ".join(filter(None, [model.vectors, f"{model.heads} heads" if model.heads != EXPERT_HEADS else ""]))
    lines = [marks.label(model.name), marks.shown(told)] if told else [marks.label(model.name)]
    # Vectors stand behind a short name, and below a longer one.
    return ", ".join(lines) if len("".join(lines)) <= marks.LABEL_WIDTH else "<br>".join(lines)


def _series(model: Model) -> str | None:
    """The vectors whose colour a model has; None for controls."""
    return None if model.is_control else model.vectors


def _averages(
    table: ScoreTable, models: Sequence[Model], places: Sequence[int], name: str, kinds: Sequence[str]
) -> dict[str, Any]:
    own = [models[place] for place in places]
    values = [_clamped(table.normalised_average(model)) for model in own]
    intervals = [table.normalised_average_interval(model) for model in own]
    colour = "--control" if own[0].is_control else marks.vectors_colour(own[0].vectors, kinds)
    trace: dict[str, Any] = {
        "type": "bar",
        "orientation": "h",
        "name": marks.shown(name),
        "x": marks.finite(values),
        "y": list(places),
        "width": 0.62,
        "marker": {"color": colour, "opacity": 0.55},
        "customdata": [
            [
                marks.shown(marks.name_of(model)),
                f"{number_text(table.normalised_average(model))} {half_width(interval)}",
            ]
            for model, interval in zip(own, intervals, strict=True)
        ],
        "hovertemplate": "%{customdata[0]}<br>average %{customdata[1]}<extra></extra>",
    }
    if any(interval.is_known for interval in intervals):
        above = [_clamped(interval.high) - value for interval, value in zip(intervals, values, strict=True)]
        below = [value - _clamped(interval.low) for interval, value in zip(intervals, values, strict=True)]
        trace["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": marks.finite(above),
            "arrayminus": marks.finite(below),
            "color": marks.STRONG,
            "thickness": 1.2,
            "width": 4,
        }
    return trace


def _line(value: float, colour: str, dash: str) -> dict[str, Any]:
    line = {"color": colour, "width": 1.6, "dash": dash}
    return {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": value, "x1": value, "line": line}


def _clamped(value: float) -> float:
    return value if math.isnan(value) else min(max(value, LOWEST), HIGHEST)


def _task_figure(table: ScoreTable) -> Figure:
    """Normalised scores as a heat map, a row a model and a column a task, with the numbers in it."""
    models = [model for model in table.models() if model.form != "expert"]
    tasks = table.tasks()
    values = [[table.normalised_value(model, task) for task in tasks] for model in models]
    merged = [row for model, row in zip(models, values, strict=True) if model.form != "base"]
    lowest = [max(value, 0.0) for row in merged for value in row if not math.isnan(value)]
    trace = marks.heat_map([str(place) for place in range(len(models))], tasks, values, "normalised score")
    trace |= {
        "y": list(range(len(models))),
        "zmin": min([0.9, *lowest]),
        "zmax": 1.0,
        "text": [[number_text(value) for value in row] for row in values],
        "texttemplate": "%{text}",
        "customdata": [[marks.shown(marks.name_of(model))] * len(tasks) for model in models],
        "hovertemplate": "%{customdata}<br>%{x}<br>normalised score %{z:.3f}<extra></extra>",
        "showscale": False,
    }
    layout = {
        "yaxis": {
            "tickvals": list(range(len(models))),
            "ticktext": [_row_label(model) for model in models],
            "tickfont": {"size": 11},
            "autorange": "reversed",
            "showgrid": False,
            "zeroline": False,
        },
        "xaxis": {"side": "top", "showgrid": False, "tickangle": 0 if len(tasks) <= 4 else -60, "type": "category"},
    }
    numbers = Table(
        "Normalised scores by task",
        [NAME, *(Column(task, is_number=True) for task in tasks)],
        [
            Rows(
                [
                    [name_cell(model), *(Cell(number_text(value)) for value in row)]
                    for model, row in zip(models, values, strict=True)
                ]
            )
        ],
        folded=True,
    )
    return Figure(
        "Normalised scores by task: what each model keeps of the task's expert",
        [trace],
        layout,
        numbers,
        height=110 + ROW_HEIGHT * len(models),
        least_width=170 + 52 * len(tasks),
    )
