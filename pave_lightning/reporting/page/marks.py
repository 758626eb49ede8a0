"""Colours, symbols and texts of the figures, in the form that plotly takes."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from pave_lightning.errors import shortened, visible
from pave_lightning.reporting.scores import EXPERT_HEADS, Model
from pave_lightning.reporting.vectors import KNOWN, others_of

# Properties of the page's style sheet, which gives them other values in the dark.
TASK_COLOURS = 8
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "star", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "5px 2px 1px 2px", "8px 3px")
LABEL_WIDTH = 24
SCALE = "Viridis"
MUTED, STRONG, REFERENCE = "--muted", "--text", "--reference"


def shown(text: str) -> str:
    """Text that plotly shows as it stands: it takes some tags and entities of HTML as such."""
    return html.escape(visible(" ".join(text.split())), quote=False)


def label(text: str) -> str:
    """A name that fits beside a figure; the whole name stands in the table."""
    return shown(shortened(text, LABEL_WIDTH))


def name_of(model: Model) -> str:
    """A model's name with its vectors, and its heads where they are not the experts'."""
    told = [model.vectors] if model.vectors else []
    told += [f"{model.heads} heads"] if model.heads != EXPERT_HEADS else []
    return f"{model.name} ({', '.join(told)})" if told else model.name


def task_colour(place: int) -> str:
    """The colour of a task by its place."""
    return f"--task-{place % TASK_COLOURS + 1}"


def task_symbol(place: int) -> str:
    """The symbol of a task by its place; with its colour, sixty-four are told apart."""
    return SYMBOLS[(place + place // TASK_COLOURS) % len(SYMBOLS)]


def task_dash(place: int) -> str:
    """The dashes of a task's line by its place."""
    return DASHES[(place + place // TASK_COLOURS) % len(DASHES)]


def vectors_colour(vectors: str, all_of_them: Sequence[str]) -> str:
    """The colour of task vectors: a fixed one for plain and purified ones, one by place for others."""
    if vectors in KNOWN:
        return "--purified" if vectors == "purified" else "--plain"
    return f"--task-{(others_of(all_of_them).index(vectors) + 3) % TASK_COLOURS + 1}"


def finite(values: Iterable[float]) -> list[float | None]:
    """Numbers as JSON has them: None for what is not finite."""
    return [float(value) if math.isfinite(value) else None for value in values]


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": shown(title)}, **more} if title else dict(more)


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], what: str
) -> dict[str, Any]:
    """The trace of a heat map; what is not finite stays empty."""
    return {
        "type": "heatmap",
        "x": [shown(name) for name in columns],
        "y": [shown(name) for name in rows],
        "z": [finite(row) for row in values],
        "colorscale": SCALE,
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
        "hovertemplate": f"%{{y}}<br>%{{x}}<br>{shown(what)} %{{z:.3f}}<extra></extra>",
        "colorbar": {"thickness": 12, "outlinewidth": 0},
    }
