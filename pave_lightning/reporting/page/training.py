"""The section of training: losses and validation scores of the experts by step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pave_lightning.reporting.page import marks
from pave_lightning.reporting.page.content import Block, Cell, Column, Figure, Panels, Rows, Section, Table, Text
from pave_lightning.reporting.tables import number_text

Points = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Expert:
    """Where an expert came from and how it was trained.

    Args:
        task: Name of its task.
        source: Folder or hub id; empty where it was fine-tuned in this run.
        digest: Hash of its weights.
        metric: The primary metric of its task.
        metrics: What training told in the end, by name.
        curves: Pairs of step and value, by name of what was logged; empty where nothing was kept.
    """

    task: str
    source: str = ""
    digest: str = ""
    metric: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Points] = field(default_factory=dict)

    @property
    def loss(self) -> Points:
        """Training loss by step."""
        return next((points for name, points in self.curves.items() if name.endswith("loss") and "train" in name), [])

    @property
    def validation(self) -> Points:
        """Primary metric on the validation split, by step."""
        return next((points for name, points in self.curves.items() if self._is_primary(name)), [])

    @property
    def best(self) -> float:
        """The validation score of the weights that were kept; NaN where it is not known."""
        return next((value for name, value in self.metrics.items() if self._is_primary(name)), math.nan)

    @property
    def constant(self) -> float:
        """What always the same answer scores on the validation split; NaN where it is not known."""
        return self.metrics.get(f"validation/{self.metric}/constant", math.nan)

    def _is_primary(self, name: str) -> bool:
        return name.startswith("validation/") and name.endswith(self.metric)


def training_section(experts: Sequence[Expert]) -> Section:
    """Where the experts came from, and the curves of those that were trained."""
    return Section("experts", "Experts", list(_training(experts)))


def _training(experts: Sequence[Expert]) -> Iterator[Block]:
    if not experts:
        return
    losses = [expert for expert in experts if expert.loss]
    scores = [expert for expert in experts if expert.validation]
    panels = []
    if losses:
        panels.append(_curves("Training loss", experts, {expert.task: expert.loss for expert in losses}, "loss"))
    if scores:
        points = {expert.task: expert.validation for expert in scores}
        panels.append(_curves("Score on the validation split", experts, points, "primary metric"))
    if panels:
        yield Panels("Training curves of the experts", panels, _course(scores))
    columns = [
        Column("task"),
        Column("metric"),
        Column("validation", "score", is_number=True),
        Column("always the same answer", "score", is_number=True),
        Column("from"),
        Column("digest of the weights"),
    ]
    rows = [
        [
            Cell(expert.task),
            Cell(expert.metric),
            Cell(_known(expert.best)),
            Cell(_known(expert.constant)),
            Cell(expert.source or "fine-tuned in this run"),
            Cell(expert.digest[:16]),
        ]
        for expert in experts
    ]
    yield Table("The experts. A validation score is that of the weights that were kept.", columns, [Rows(rows)])
    trained = [expert for expert in experts if not expert.source]
    if trained and not panels:
        yield Text(["The course of the training was not kept: the experts come from an earlier version."])


def _known(value: float) -> str:
    return "" if math.isnan(value) else number_text(value)


def _curves(title: str, experts: Sequence[Expert], points: Mapping[str, Points], what: str) -> Figure:
    names = [expert.task for expert in experts]
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(own) <= 20 else "lines",
            "name": marks.shown(task),
            "x": [point[0] for point in own],
            "y": marks.finite(point[1] for point in own),
            "line": {
                "color": marks.task_colour(names.index(task)),
                "dash": marks.task_dash(names.index(task)),
                "width": 2,
            },
            "marker": {"symbol": marks.task_symbol(names.index(task)), "size": 7},
            "hovertemplate": "step %{x}<br>%{y:.3f}",
        }
        for task, own in points.items()
    ]
    layout = {"xaxis": marks.axis("step", rangemode="tozero"), "yaxis": marks.axis(what)}
    return Figure(title, traces, layout, height=320)


def _course(experts: Sequence[Expert]) -> Table | None:
    """Validation scores by step, for readers who do not see the curves."""
    rows = [
        [Cell(expert.task), Cell(f"{point[0]:.0f}"), Cell(number_text(point[1]))]
        for expert in experts
        for point in expert.validation
    ]
    columns = [Column("task"), Column("step", is_number=True), Column("validation score", is_number=True)]
    return Table("Validation scores by step", columns, [Rows(rows)], folded=True) if rows else None
