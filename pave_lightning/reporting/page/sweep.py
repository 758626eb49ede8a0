"""The page of a sweep: the same sections as those of a run, with the spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pave_lightning.errors import counted, listed
from pave_lightning.reporting.page import marks
from pave_lightning.reporting.page.content import Block, Cell, Column, Figure, Page, Rows, Section, Table, Text
from pave_lightning.reporting.page.run import NAMED_TASKS, recipe_section, versions_section
from pave_lightning.reporting.page.scores import ROW_HEIGHT, TITLES
from pave_lightning.reporting.sweep_findings import best_rows, finding_sections, setting_of
from pave_lightning.reporting.sweep_plot import Line, axis_for, drawn_lines, is_numeric
from pave_lightning.reporting.sweep_ranking import NOTE
from pave_lightning.reporting.sweep_table import SCORE, SweepScores, controls_among, plainly, signed, summary_of
from pave_lightning.reporting.sweep_view import SweepView
from pave_lightning.reporting.tables import number_text

SPREAD = "± is the standard deviation over seeds."
REFERENCES = "Not merged: references and controls"


@dataclass(frozen=True)
class SweepFacts:
    """What a sweep left, of which its page is made.

    Args:
        name: Name of the recipe.
        frame: One row a score, as `SweepScores` takes it.
        view: Which score is used and what stands on the axis.
        recipe: The recipe as YAML.
        versions: Versions of the software by name.
        files: Files beside the page, with what is in them.
    """

    name: str
    frame: pd.DataFrame
    view: SweepView
    recipe: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def sweep_page(facts: SweepFacts) -> Page:
    """The page of a sweep; what is not there has no section.

    Raises:
        PaveError: columns are missing, the view names columns that are not there, or one score has two values.
    """
    scores = SweepScores(facts.frame, facts.view)
    summary = summary_of(scores)
    sections: list[Section] = []
    if not summary.empty and summary["mean"].notna().any():
        sections = [
            Section("results", "Results", list(_results(scores, summary))),
            Section("tasks", "Scores by task", [_tasks(scores, summary)]),
            Section("costs", "Scores and costs", list(_costs(scores, summary))),
            Section("findings", "Findings", list(_findings(scores, summary))),
        ]
    failed = _missing(scores)
    return Page(
        facts.name,
        _summary(scores, summary),
        [
            *sections,
            Section("left-out", "Left out or failed", [Text(failed, is_list=True)] if failed else []),
            recipe_section(facts.recipe),
            versions_section(facts.versions),
        ],
        facts.files,
        kind="sweep",
    )


def _summary(scores: SweepScores, summary: pd.DataFrame) -> list[str]:
    """What was run and what came of it, in two sentences behind the question."""
    seeds = scores.by_seed["seed"].nunique()
    settings = math.prod(len(values) for values in scores.values.values())
    what = f"{counted(len(scores.tasks), 'task')} ({listed(scores.tasks, NAMED_TASKS)})"
    done = f"{counted(settings, 'setting')} with {counted(seeds, 'seed')} each, on {what}."
    told = [scores.view.question] if scores.view.question else []
    best = None if summary.empty else _best(scores, summary)
    if best is None:
        return [*told, done, "There are no scores of merged models to compare."]
    score = "a normalised average" if scores.view.score == "normalised" else "an average score"
    where = _setting(scores, best)
    name = f"{best['model']} ({best['vectors']})" if best["vectors"] else best["model"]
    found = (
        f"The best model with one set of weights is {name}{f', {where}' if where else ''}: it has {score} of "
        f"{number_text(best['mean'])}{_spread(best['sd'], ' ±')}."
    )
    return [*told, done, found]


def _best(scores: SweepScores, summary: pd.DataFrame) -> pd.Series | None:
    """The static model and setting with the highest mean; None where there is none."""
    rows = best_rows(scores, summary) if summary["mean"].notna().any() else summary.iloc[:0]
    rows = rows[~_not_merged(rows) & rows["form"].eq("static")]
    return None if rows.empty else rows.loc[rows["mean"].idxmax()]


def _not_merged(rows: pd.DataFrame) -> pd.Series:
    """Which rows are of models that no method has merged, purified experts among them."""
    return controls_among(rows) | rows["form"].eq("expert")


def _setting(scores: SweepScores, row: Any) -> str:
    return ", ".join(f"{key} {plainly(row[key])}" for key in scores.keys if _is_told(row[key]))


def _is_told(value: Any) -> bool:
    return value is not None and value is not pd.NA and not (isinstance(value, float) and math.isnan(value))


def _results(scores: SweepScores, summary: pd.DataFrame) -> Iterator[Block]:
    best = _best(scores, summary)
    purified = bool(summary["difference"].notna().any())

    def cells(index: Any, row: Mapping[str, Any]) -> list[Cell]:
        found = [*_names(scores, row), Cell(str(row["seeds"]))]
        is_best = best is not None and index == best.name
        found.append(Cell(number_text(row["mean"]), _spread(row["sd"]), is_best))
        if purified:
            difference = row["difference"]
            found.append(Cell("" if math.isnan(difference) else signed(difference), _spread(row["difference_sd"])))
        task, value = _weakest(row)
        return [*found, Cell(task, number_text(value) if task else "")]

    score = "normalised" if scores.view.score == "normalised" else "average"
    columns = [
        *_name_columns(scores),
        Column("seeds", is_number=True),
        Column(score, "mean", is_number=True),
        *([Column("difference", "purified minus plain", is_number=True)] if purified else []),
        Column("weakest task", "mean"),
    ]
    yield Table(f"Averages over all tasks, means over seeds. {SPREAD}", columns, _grouped(summary, cells))
    yield Text([_unmarked(setting_of(scores))])
    figure = _figure(scores)
    if figure is not None:
        yield figure


def _name_columns(scores: SweepScores) -> list[Column]:
    return [Column("model", "task vectors"), *(Column(key) for key in scores.keys)]


def _names(scores: SweepScores, row: Mapping[str, Any]) -> list[Cell]:
    keys = [Cell(plainly(row[key]) if _is_told(row[key]) else "any") for key in scores.keys]
    return [Cell(str(row["model"]), str(row["vectors"])), *keys]


def _grouped(summary: pd.DataFrame, cells: Any) -> list[Rows]:
    """Rows of the summary: what is not merged, static models, per-task ones."""
    groups: dict[str, list[list[Cell]]] = {REFERENCES: [], TITLES["static"]: [], TITLES["per-task"]: []}
    not_merged = _not_merged(summary)
    for index, row in summary.iterrows():
        title = REFERENCES if not_merged[index] else TITLES[row["form"]]
        groups[title].append(cells(index, row))
    return [Rows(rows, title) for title, rows in groups.items() if rows]


def _weakest(row: Mapping[str, Any]) -> tuple[str, float]:
    tasks = {str(name).removesuffix(SCORE): value for name, value in row.items() if str(name).endswith(SCORE)}
    known = {task: value for task, value in tasks.items() if not math.isnan(value)}
    task = min(known, key=lambda name: known[name], default="")
    return task, known.get(task, math.nan)


def _spread(value: float, before: str = "±") -> str:
    return "" if math.isnan(value) else f"{before}{value:.3f}".replace("±0.", "±.")


def _tasks(scores: SweepScores, summary: pd.DataFrame) -> Table:
    columns = [*_name_columns(scores), *(Column(task, is_number=True) for task in scores.tasks)]

    def cells(index: Any, row: Mapping[str, Any]) -> list[Cell]:
        return [*_names(scores, row), *(Cell(number_text(row[f"{task}{SCORE}"])) for task in scores.tasks)]

    told = "Normalised scores" if scores.view.score == "normalised" else "Scores"
    return Table(f"{told} in the primary metric of each task, means over seeds.", columns, _grouped(summary, cells))


def _figure(scores: SweepScores) -> Figure | None:
    """Means along what stands on the axis, with one standard deviation over seeds."""
    values = scores.values_of(scores.view.x)
    lines = drawn_lines(scores, values)
    if not lines:
        return None
    told = "score divided by the expert's" if scores.view.score == "normalised" else "average score"
    title = f"Mean over seeds and one standard deviation, along {scores.view.x}"
    if is_numeric(scores):
        axis = axis_for(values, scores.view)
        ends = [*axis.places.values()]
        traces = [_line(line, place, axis.places, (min(ends), max(ends))) for place, line in enumerate(lines)]
        ticks = {"tickvals": ends, "ticktext": [marks.shown(plainly(value)) for value in axis.places]}
        layout = {"xaxis": marks.axis(scores.view.x, **ticks), "yaxis": marks.axis(told)}
        return Figure(title, traces, layout, height=420 + 12 * len(lines))
    places = {value: float(place) for place, value in enumerate(values)}
    names = list(dict.fromkeys(line.label for line in lines))  # models of several forms may have one
    traces = [_dots(line, names, places) for line in lines]
    for index, trace in enumerate(traces):
        trace["showlegend"] = trace["name"] not in [other["name"] for other in traces[:index]]
    labels = [marks.label(plainly(value)) for value in values]
    layout = {
        "xaxis": marks.axis(told),
        "yaxis": {
            "tickvals": list(places.values()),
            "ticktext": labels,
            "range": [len(values) - 0.5, -0.5],
            "zeroline": False,
        },
    }
    return Figure(title, traces, layout, height=150 + ROW_HEIGHT * len(values))


def _look(place: int) -> dict[str, Any]:
    return {
        "line": {"color": marks.task_colour(place), "dash": marks.task_dash(place), "width": 2},
        "marker": {"color": marks.task_colour(place), "symbol": marks.task_symbol(place), "size": 8},
    }


def _line(line: Line, place: int, places: Mapping[Any, float], ends: tuple[float, float]) -> dict[str, Any]:
    """One line; one that does not depend on the axis goes from end to end."""
    points = [(where, line.points[None]) for where in ends] if line.level else []
    points = points or [(places[value], point) for value, point in line.points.items()]
    points.sort(key=lambda point: point[0])
    return {
        "type": "scatter",
        "mode": "lines" if line.level else "lines+markers",
        "name": marks.shown(line.label),
        "x": [where for where, _ in points],
        "y": marks.finite(point[0] for _, point in points),
        "error_y": {"type": "data", "array": marks.finite(point[1] for _, point in points), "thickness": 1, "width": 3},
        "customdata": [_told(point) for _, point in points],
        "hovertemplate": "%{customdata}",
        **_look(place),
    }


def _dots(line: Line, names: Sequence[str], places: Mapping[Any, float]) -> dict[str, Any]:
    """One series of dots with their spread, beside those of other names in the same row."""
    place = names.index(line.label)
    aside = 0.6 * ((place + 1) / (len(names) + 1) - 0.5)
    points = [
        (where, point)
        for value, point in line.points.items()
        for where in ([places[value]] if value is not None else places.values())
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": marks.shown(line.label),
        "legendgroup": marks.shown(line.label),
        "x": marks.finite(point[0] for _, point in points),
        "y": [where + aside for where, _ in points],
        "error_x": {"type": "data", "array": marks.finite(point[1] for _, point in points), "thickness": 1, "width": 3},
        "customdata": [_told(point) for _, point in points],
        "hovertemplate": "%{customdata}",
        "marker": _look(place)["marker"],
    }


def _told(point: tuple[float, float, Sequence[float]]) -> str:
    mean, spread, seeds = point
    return f"{number_text(mean)}{_spread(spread, ' ±')}, {counted(len(seeds), 'seed')}"


def _costs(scores: SweepScores, summary: pd.DataFrame) -> Iterator[Block]:
    """Seconds and memory of merging, where they are known."""
    known = summary[summary["seconds"].notna()]
    if known.empty:
        return

    def cells(index: Any, row: Mapping[str, Any]) -> list[Cell]:
        costs = [Cell("" if math.isnan(row[name]) else f"{row[name]:.3g}") for name in ("seconds", "peak_megabytes")]
        return [*_names(scores, row), Cell(number_text(row["mean"]), _spread(row["sd"])), *costs]

    forms = list(dict.fromkeys(known["form"]))
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": marks.shown(str(form)),
            "x": marks.finite(own["seconds"]),
            "y": marks.finite(own["mean"]),
            "customdata": [marks.shown(_row_name(scores, row)) for _, row in own.iterrows()],
            "hovertemplate": "%{customdata}<br>%{y:.3f}<br>%{x:.3g} seconds<extra></extra>",
            "marker": _look(place)["marker"],
        }
        for place, form in enumerate(forms)
        for own in [known[known["form"] == form]]
    ]
    seconds = known["seconds"]
    scale = {"type": "log"} if seconds.min() > 0 and seconds.max() > 20 * seconds.min() else {"rangemode": "tozero"}
    layout = {"xaxis": marks.axis("seconds", **scale), "yaxis": marks.axis("mean score")}
    yield Figure("Mean scores against the seconds of merging", traces, layout)
    columns = [
        *_name_columns(scores),
        Column("score", "mean", is_number=True),
        Column("merge", "seconds", is_number=True),
        Column("memory", "peak MB", is_number=True),
    ]
    yield Table("What merging took, means over seeds.", columns, _grouped(known, cells))
    yield Text([NOTE])


def _row_name(scores: SweepScores, row: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, [str(row["model"]), str(row["vectors"]), _setting(scores, row)]))


def _findings(scores: SweepScores, summary: pd.DataFrame) -> Iterator[Block]:
    for heading, lines in finding_sections(scores, summary).items():
        yield Text([_unmarked(line) for line in lines], is_list=True, heading=_unmarked(heading))


def _unmarked(text: str) -> str:
    """Text without the marks of markdown."""
    return text.replace("`", "")


def _missing(scores: SweepScores) -> list[str]:
    """Averages that are missing, by model and seed."""
    rows = scores.by_seed[scores.by_seed["score"].isna()]
    return [f"{_row_name(scores, row)}: no average in seed {row['seed']}" for _, row in rows.iterrows()]
