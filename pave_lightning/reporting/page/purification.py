"""The sections of purification: ranks kept, and what the diagnostics found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pave_lightning.reporting.diagnostic_plots import MATRICES, kinds_of_layers, natural
from pave_lightning.reporting.page import marks
from pave_lightning.reporting.page.content import Block, Cell, Column, Figure, Panels, Rows, Section, Table
from pave_lightning.reporting.plots import short_layer_names
from pave_lightning.reporting.tables import number_text

if TYPE_CHECKING:
    import pandas as pd

    from pave_lightning.purification import KeptRank

# At which shares of the directions a spectrum is told in its table, and drawn.
TOLD = (0.1, 0.25, 0.5, 0.75, 0.9)
POINTS = 60
# Matrices whose spectra are drawn: what the paper looks at, and what is merged.
DRAWN = ("covariance", "task_vector")
SMALLEST = 1e-8
BEFORE, AFTER = "plain", "pave"
# Column of the diagnostics -> its name on the page, and the range of its colours.
CONFLICTS = {
    "sign_conflict": ("sign conflict", 0.0, 0.6),
    "cosine": ("cosine", -0.5, 0.5),
}


def ranks_section(ranks: Mapping[str, Sequence[KeptRank]]) -> Section:
    """The share of rank that each purification kept, by task and layer.

    Args:
        ranks: One record a task and layer, by the words of the purification.
    """
    blocks = [block for words, records in ranks.items() for block in _ranks(words, records)]
    return Section("ranks", "Rank kept by purification", blocks)


def _ranks(words: str, records: Sequence[KeptRank]) -> Iterator[Block]:
    if not records:
        return
    tasks = list(dict.fromkeys(record.task for record in records))
    layers = sorted(dict.fromkeys(record.layer for record in records), key=natural)
    shares = {(record.task, record.layer): record for record in records}
    labels = short_layer_names(layers)
    values = [[_share(shares.get((task, layer))) for layer in layers] for task in tasks]
    finite = [value for row in values for value in row if math.isfinite(value)]
    trace = marks.heat_map(tasks, labels, values, "kept share")
    trace |= {"zmin": min([0.9, *finite]), "zmax": 1.0}
    layout = {
        "xaxis": {"type": "category", "tickangle": -90, "showgrid": False, "automargin": True},
        "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
    }
    rows = [
        [
            Cell(layer),
            *(
                Cell("" if one is None else f"{one.share:.3f}", "" if one is None else f"{one.rank}/{one.full}")
                for one in (shares.get((task, layer)) for task in tasks)
            ),
        ]
        for layer in layers
    ]
    table = Table(
        f"Kept share of rank, and ranks, {words}",
        [Column("layer"), *(Column(task, is_number=True) for task in tasks)],
        [Rows(rows)],
        folded=True,
    )
    yield Figure(
        f"Share of rank kept in each layer, {words}",
        [trace],
        layout,
        table,
        height=230 + 28 * len(tasks),
        least_width=180 + 15 * len(layers),
    )


def _share(record: KeptRank | None) -> float:
    return math.nan if record is None else record.share


def diagnostics_sections(found: Mapping[str, Mapping[str, pd.DataFrame]], tasks: Sequence[str]) -> list[Section]:
    """Spectra, and how tasks interfere, where the diagnostics were made.

    Args:
        found: The tables of `pave_lightning.diagnostics.Diagnostics`, by the words of the purification.
        tasks: All tasks, in the order of their colours.
    """
    spectra = [block for words, tables in found.items() for block in _spectra(words, tables["spectra"], tasks)]
    between = [block for words, tables in found.items() for block in _interference(words, tables, tasks)]
    return [
        Section("spectra", "Spectra", spectra),
        Section("interference", "Interference between tasks", between),
    ]


def _spectra(words: str, table: pd.DataFrame, tasks: Sequence[str]) -> Iterator[Block]:
    """A panel a kind of layer, a line a task: the geometric mean over the layers of a kind."""
    kinds = kinds_of_layers(table["layer"])
    names = list(dict.fromkeys(kinds.values()))
    for matrix in DRAWN:
        part = table[table["matrix"] == matrix]
        if part.empty:
            continue
        curves = _mean_spectra(part, kinds)
        told = "W C (weight times second moment)" if matrix == "covariance" else MATRICES[matrix]
        panels = [
            _spectrum_panel(kind, tasks, {task: curves[kind, task] for task in tasks if (kind, task) in curves})
            for kind in names
            if any((kind, task) in curves for task in tasks)
        ]
        places = [round(share * (POINTS - 1)) for share in TOLD]
        rows = [
            [Cell(kind), Cell(task), *(Cell(f"{curve[place]:.2g}") for place in places)]
            for (kind, task), curve in curves.items()
        ]
        columns = [
            Column("kind of layer"),
            Column("task"),
            *(Column(f"at {share:.0%}", is_number=True) for share in TOLD),
        ]
        numbers = Table(f"Spectra of {told}: values at shares of all directions", columns, [Rows(rows)], folded=True)
        title = f"Spectra of {told}: singular values divided by the largest, mean over layers of a kind"
        yield Panels(f"{title}, {words}", panels, numbers)


def _mean_spectra(table: pd.DataFrame, kinds: Mapping[str, str]) -> dict[tuple[str, str], list[float]]:
    """By kind of layer and task: normalised values at `POINTS` even places between the first and the last."""
    import numpy as np

    grid, logs = np.linspace(0, 1, POINTS), dict[tuple[str, str], list[Any]]()
    for (task, layer), own in table.groupby(["task", "layer"], sort=False):
        values = own["normalised"].to_numpy()
        if np.isfinite(values).all():
            places = np.arange(len(values)) / max(len(values) - 1, 1)
            logs.setdefault((kinds[layer], task), []).append(np.interp(grid, places, np.log10(values.clip(SMALLEST))))
    return {key: (10 ** np.stack(own).mean(axis=0)).tolist() for key, own in logs.items()}


def _spectrum_panel(kind: str, tasks: Sequence[str], curves: Mapping[str, Sequence[float]]) -> Figure:
    share = [place / (POINTS - 1) for place in range(POINTS)]
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": marks.shown(task),
            "x": [float(f"{value:.4g}") for value in share],
            "y": [float(f"{value:.3g}") for value in curve],
            "line": {
                "color": marks.task_colour(tasks.index(task)),
                "dash": marks.task_dash(tasks.index(task)),
                "width": 1.8,
            },
            "hovertemplate": "%{x:.0%} of the directions<br>%{y:.2g}",
        }
        for task, curve in curves.items()
    ]
    layout = {
        "xaxis": marks.axis("share of the directions", range=[0, 1], tickformat=".0%"),
        "yaxis": {"type": "log", "exponentformat": "power", "dtick": 1},
    }
    return Figure(kind, traces, layout, height=270)


def _interference(words: str, tables: Mapping[str, pd.DataFrame], known: Sequence[str]) -> Iterator[Block]:
    """Pairs of tasks before and after purification: maps of signs and cosines, and a table with all of it."""
    summary = tables["conflict_summary"]
    if summary.empty:
        return
    found = {*summary["task_a"], *summary["task_b"]}
    tasks = [task for task in known if task in found]
    panels = []
    for column, (title, low, high) in CONFLICTS.items():
        for treatment, when in ((BEFORE, "before"), (AFTER, "after")):
            values = _matrix(summary[summary["treatment"] == treatment], tasks, column)
            trace = marks.heat_map(tasks, tasks, values, title)
            trace |= {"zmin": low, "zmax": high}
            if low < 0:
                trace |= {"colorscale": "RdBu", "zmid": 0.0}
            axis = {"type": "category", "showgrid": False}
            layout = {"xaxis": axis, "yaxis": {**axis, "autorange": "reversed"}}
            panels.append(Figure(f"{title.capitalize()} {when} purification", [trace], layout, height=300))
    yield Panels(f"Task vectors of pairs of tasks, mean over all layers, {words}", panels)
    yield _pairs(words, summary, tables["subspace_overlap"])


def _matrix(rows: pd.DataFrame, tasks: Sequence[str], column: str) -> list[list[float]]:
    values = [[math.nan] * len(tasks) for _ in tasks]
    for first, second, value in rows[["task_a", "task_b", column]].itertuples(index=False, name=None):
        values[tasks.index(first)][tasks.index(second)] = values[tasks.index(second)][tasks.index(first)] = value
    return values


def _pairs(words: str, summary: pd.DataFrame, overlap: pd.DataFrame) -> Table:
    told = {
        "sign_conflict": "sign conflict",
        "weighted_conflict": "weighted by size",
        "cosine": "cosine",
        "top_overlap": "largest elements in common",
    }
    by_pair = {
        (first, second, treatment): row
        for (first, second, treatment), row in zip(
            summary[["task_a", "task_b", "treatment"]].itertuples(index=False, name=None),
            summary.to_dict("records"),
            strict=True,
        )
    }
    shared = (
        overlap[overlap["part"] != "removed"].groupby(["task_a", "task_b"])["overlap"].mean() if len(overlap) else {}
    )
    pairs = dict.fromkeys((first, second) for first, second, _ in by_pair)
    rows = [
        [
            Cell(f"{first}, {second}"),
            *(_before_and_after(by_pair, first, second, column) for column in told),
            Cell(_number(shared.get((first, second), math.nan))),
        ]
        for first, second in pairs
    ]
    columns = [
        Column("tasks"),
        *(Column(name, "before → after", is_number=True) for name in told.values()),
        Column("overlap of directions", "strongest", is_number=True),
    ]
    return Table(
        f"How the task vectors of two tasks agree, before and after purification, {words}", columns, [Rows(rows)]
    )


def _before_and_after(
    found: Mapping[tuple[str, str, str], Mapping[Any, Any]], first: str, second: str, column: str
) -> Cell:
    values = (found.get((first, second, treatment), {}).get(column, math.nan) for treatment in (BEFORE, AFTER))
    return Cell(" → ".join(map(_number, values)))


def _number(value: float) -> str:
    return number_text(float(value))
