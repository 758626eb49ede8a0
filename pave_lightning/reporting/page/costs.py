"""The section of costs: scores against what merging takes and what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pave_lightning.reporting.page import marks
from pave_lightning.reporting.page.content import Block, Cell, Column, Figure, Panels, Rows, Section, Table, Text
from pave_lightning.reporting.page.scores import NAME, grouped, name_cell
from pave_lightning.reporting.scores import Model, ScoreTable
from pave_lightning.reporting.tables import number_text
from pave_lightning.reporting.vectors import in_order

NOTE = (
    "Seconds and memory are those of the merge alone: capturing statistics, purification, gradients and the search "
    "for a scale come on top. Memory is how much the process grew at the most. Kept for a task is what is stored for "
    "it alone besides the shared weights and its head, the mean over the tasks."
)
MEGA = 1e6


@dataclass(frozen=True)
class MergedCost:
    """What a merged model took to make, and what it keeps.

    Args:
        seconds: Wall time of the merge; NaN where it is not known.
        peak_megabytes: How much memory grew at the most, in millions of bytes; NaN where it is not known.
        shared_bytes: Size of the weights that all tasks share.
        kept_bytes: Size of what is kept for each task besides its head, by task.
    """

    seconds: float = math.nan
    peak_megabytes: float = math.nan
    shared_bytes: int = 0
    kept_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def kept_megabytes(self) -> float:
        """Mean over the tasks, in millions of bytes."""
        return sum(self.kept_bytes.values()) / len(self.kept_bytes) / MEGA if self.kept_bytes else 0.0


MEASURES: dict[str, tuple[str, Callable[[MergedCost], float]]] = {
    "seconds": ("seconds", lambda cost: cost.seconds),
    "memory": ("peak MB", lambda cost: cost.peak_megabytes),
    "kept": ("kept for a task, MB", lambda cost: cost.kept_megabytes),
}


def costs_section(table: ScoreTable, costs: Mapping[Model, MergedCost]) -> Section:
    """Scores against seconds, memory and bytes kept for a task; empty where nothing was merged."""
    return Section("costs", "Scores and costs", list(_costs(table, costs)))


def _costs(table: ScoreTable, costs: Mapping[Model, MergedCost]) -> Iterator[Block]:
    models = [model for model in table.models() if model in costs]
    if not models:
        return

    def cells(model: Model) -> list[Cell]:
        cost = costs[model]
        return [
            name_cell(model),
            Cell(number_text(table.normalised_average(model))),
            Cell(_amount(cost.seconds)),
            Cell(_amount(cost.peak_megabytes)),
            Cell(_amount(cost.shared_bytes / MEGA)),
            Cell(_amount(cost.kept_megabytes)),
        ]

    panels = [panel for panel in (_panel(table, models, costs, name) for name in MEASURES) if panel is not None]
    if panels:
        yield Panels("Normalised average against costs", panels)
    columns = [
        NAME,
        Column("normalised", "average", is_number=True),
        Column("merge", "seconds", is_number=True),
        Column("memory", "peak MB", is_number=True),
        Column("shared weights", "MB", is_number=True),
        Column("kept for a task", "MB", is_number=True),
    ]
    groups = [
        Rows(group.rows, group.title) for group in grouped(table, lambda model: cells(model) if model in costs else [])
    ]
    groups = [Rows([row for row in group.rows if row], group.title) for group in groups]
    yield Table("What each merged model took and keeps.", columns, [group for group in groups if group.rows])
    yield Text([NOTE])


def _panel(
    table: ScoreTable, models: Sequence[Model], costs: Mapping[Model, MergedCost], measure: str
) -> Figure | None:
    """One scatter; None where all models cost the same."""
    title, of = MEASURES[measure]
    values = {model: of(costs[model]) for model in models}
    known = [value for value in values.values() if math.isfinite(value)]
    if len(set(known)) < 2:
        return None
    kinds = in_order(model.vectors for model in models)
    traces = []
    for form, symbol in (("static", "circle"), ("per-task", "diamond-open")):
        for vectors in kinds:
            own = [model for model in models if (model.form, model.vectors) == (form, vectors)]
            if not own:
                continue
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": marks.shown(f"{vectors or 'merged'}, {form}"),
                    "x": marks.finite(values[model] for model in own),
                    "y": marks.finite(table.normalised_average(model) for model in own),
                    "customdata": [[marks.shown(marks.name_of(model)), _amount(values[model])] for model in own],
                    "hovertemplate": f"%{{customdata[0]}}<br>%{{y:.3f}}<br>{title}: %{{customdata[1]}}<extra></extra>",
                    "marker": {"color": marks.vectors_colour(vectors, kinds), "symbol": symbol, "size": 10},
                }
            )
    scale = {"type": "log"} if min(known) > 0 and max(known) > 20 * min(known) else {"rangemode": "tozero"}
    layout = {"xaxis": marks.axis(title, **scale), "yaxis": marks.axis("normalised average")}
    return Figure(f"Normalised average against {title}", traces, layout, height=300)


def _amount(value: float) -> str:
    """A cost with three digits."""
    if math.isnan(value):
        return ""
    if value == 0:
        return "0"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else "< 0.01"
