"""Pictures of a run: normalised scores of the merged models, and how much rank purification kept."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pave_lightning.reporting.scores import EXPERT_HEADS, OWN_HEADS, Model, ScoreTable, Section
from pave_lightning.reporting.vectors import colour_of, in_order
from pave_lightning.system.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pave_lightning.purification import KeptRank

DPI = 150

SHADE, HATCH = "#F2F2F2", "//"
EXPERT_COLOUR, BASE_COLOUR, CONTROL_COLOUR = "#009E73", "#D55E00", "#F0E442"
# How much paler a bar is for each further kind of heads, and at most.
PALER, PALEST = 0.5, 0.8
UNFITTED = (EXPERT_HEADS, OWN_HEADS)
TASK_MARKERS = "osD^vP<>X*"

BAR_WIDTH, BARS_WIDTH = 0.38, 0.8
"""Width of a bar at most, and of all bars of a model with the gaps between them."""
NARROW = 0.3
"""Width of a bar that no number fits into unless it stands upright."""
NOTE_SIZE, LETTERS_PER_INCH = 8, 15
# One value far below zero must not flatten all others
LOWEST, HIGHEST = -0.3, 1.5
WHISKER = "interval"


def normalised_scores(table: ScoreTable, path: Path | str) -> None:
    """Draw the normalised averages of controls and merged models as bars, one dot a task.

    The bars of one model stand side by side, paler ones under further heads; controls stand apart, on the left. A grey
    line over the end of a bar is the interval of the average. Values that do not exist are marked n/a; values beyond
    the axis are drawn at its edge. A line at the foot names tasks that are left out.

    Args:
        table: The scores.
        path: The PNG file; its folder is made where it does not exist.
    """
    drawn = [model for model in table.models() if model.section != "reference"]
    rows = list(dict.fromkeys((model.name, model.section) for model in drawn))
    sections = [section for _, section in rows]
    kinds = in_order(model.vectors for model in drawn if not model.is_control)
    heads = [*dict.fromkeys(model.heads for model in drawn if model.heads not in UNFITTED)]
    most = max(Counter((model.name, model.section) for model in drawn).values(), default=1)
    width = min(BAR_WIDTH, BARS_WIDTH / most - 0.02)

    figure = new_figure(max(6.4, 2.6 + 1.3 * len(rows)), 5.0)
    axes = figure.add_subplot()
    shown: list[float] = [0.0, 1.1]
    for row, name in enumerate(rows):
        own = [model for model in drawn if (model.name, model.section) == name]
        for index, model in enumerate(own):
            place = row + (index - (len(own) - 1) / 2) * (width + 0.02)
            colour = CONTROL_COLOUR if model.is_control else colour_of(model.vectors, kinds)
            shown += _draw_model(axes, table, model, (place, width), _paler(colour, _paleness(model.heads, heads)))
    axes.set_ylim(min(shown) - (0.06 if min(shown) < 0 else 0), max(shown) + 0.06)
    axes.set_xlim(-0.6, max(len(rows), 1) - 0.4)
    axes.set_xticks(
        range(len(rows)),
        [_wrapped(name) for name, _ in rows],
        rotation=30 if len(rows) > 8 else 0,
        ha="right" if len(rows) > 8 else "center",
    )
    _draw_references(axes, table)
    _mark_sections(axes, sections)
    axes.set_ylabel("score divided by the expert's")
    axes.set_title("Normalised scores: average (bar) and single tasks (dots)", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    _draw_legend(axes, kinds, heads, table.tasks(), sections)
    _draw_note(figure, table.left_out_note())
    write_figure(figure, path)


def kept_ranks(ranks: Iterable[KeptRank], path: Path | str) -> None:
    """Draw the kept share of rank as a heat map: a row a task, a column a layer.

    Args:
        ranks: One record a task and layer; pairs without a record stay grey.
        path: The PNG file; its folder is made where it does not exist.
    """
    records = list(ranks)
    tasks = list(dict.fromkeys(record.task for record in records))
    layers = list(dict.fromkeys(record.layer for record in records))
    shares = [[math.nan] * len(layers) for _ in tasks]
    for record in records:
        shares[tasks.index(record.task)][layers.index(record.layer)] = record.share
    labels = short_layer_names(layers)

    margin = 0.085 * max((len(label) for label in labels), default=0)
    figure = new_figure(max(6.4, 2.4 + 0.2 * len(layers)), 1.4 + margin + 0.36 * len(tasks))
    axes = figure.add_subplot()
    if records:
        finite = [share for row in shares for share in row if math.isfinite(share)]
        lowest = min(0.9, math.floor(20 * min(finite, default=0.0)) / 20)
        from matplotlib import colormaps

        colours = colormaps["viridis"].with_extremes(bad="#D9D9D9")
        picture = axes.imshow(shares, cmap=colours, vmin=max(0.0, lowest), vmax=1.0, aspect="auto")
        axes.set_xticks([x - 0.5 for x in range(1, len(layers))], minor=True)
        axes.set_yticks([y - 0.5 for y in range(1, len(tasks))], minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="both", length=0)
        figure.colorbar(picture, ax=axes, label="kept share of rank", pad=0.01, aspect=12)
    axes.set_xticks(range(len(layers)), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.spines[:].set_visible(False)
    axes.set_title("Rank kept by purification", loc="left", fontsize=11)
    write_figure(figure, path)


def short_layer_names(layers: Sequence[str]) -> list[str]:
    """Drop what all layers' names begin with, the path to the numbered blocks if it is one, and a final weight.

    Args:
        layers: Dotted module names.

    Returns:
        Names in the same order; the full ones where short ones would not differ.

    Example:
        >>> short_layer_names(["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense", "bert.pooler"])
        ['0.output.dense', '1.output.dense', 'pooler']
    """
    parts = [layer.split(".") for layer in layers]
    if all(len(part) > 1 and part[-1] == "weight" for part in parts):
        parts = [part[:-1] for part in parts]
    first = _shared(parts)
    trimmed = [part[first:] for part in parts]
    numbered = [next((index for index, piece in enumerate(part) if piece.isdigit()), None) for part in trimmed]
    paths = {tuple(part[:index]) for part, index in zip(trimmed, numbered, strict=True) if index is not None}
    if len(paths) == 1:
        trimmed = [part if index is None else part[index:] for part, index in zip(trimmed, numbered, strict=True)]
    short = [".".join(part) for part in trimmed]
    return short if len(set(short)) == len(set(layers)) else list(layers)


def _draw_model(axes: Axes, table: ScoreTable, model: Model, bar: tuple[float, float], colour: str) -> list[float]:
    """Draw a model's bar, with its place and width, and its dots; what heights they have."""
    tasks, (place, width) = table.tasks(), bar
    average = table.normalised_average(model)
    values = [table.normalised_value(model, task) for task in tasks]
    if math.isfinite(average):
        axes.bar(
            place,
            _clamped(average),
            width,
            color=colour,
            edgecolor="white",
            hatch=HATCH if model.form == "per-task" else None,
            zorder=2,
        )
        interval = table.normalised_average_interval(model)
        if interval.is_known:
            ends = _clamped(interval.low), _clamped(interval.high)
            axes.plot((place, place), ends, color="#666666", linewidth=3, solid_capstyle="butt", zorder=3, gid=WHISKER)
    label = f"{average:.3f}" if abs(average) < 100 else "n/a" if not math.isfinite(average) else f"{average:.0e}"
    # At the foot of the bar, where dots are rare
    axes.annotate(
        label,
        (place, 0),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        rotation=0 if width > NARROW else 90,
        fontsize=8,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.9},
        zorder=5,
    )
    step = width * 0.8 / max(len(tasks) - 1, 1)
    for index, value in enumerate(values):
        if not math.isnan(value):
            axes.plot(
                place + (index - (len(tasks) - 1) / 2) * step,
                _clamped(value),
                marker=_marker(index, tasks),
                markersize=5,
                markerfacecolor="black" if LOWEST <= value <= HIGHEST else "white",
                markeredgecolor="white" if LOWEST <= value <= HIGHEST else "black",
                markeredgewidth=0.6,
                clip_on=False,
                zorder=4,
            )
    return [_clamped(value) for value in [average, *values] if not math.isnan(value)]


def _draw_references(axes: Axes, table: ScoreTable) -> None:
    axes.axhline(1.0, color=EXPERT_COLOUR, linewidth=1.2, zorder=1, label="experts")
    axes.axhline(0.0, color="black", linewidth=0.8, zorder=3)
    for model in table.models():
        value = table.normalised_average(model)
        if model.form == "base" and not model.is_control and math.isfinite(value):
            axes.axhline(_clamped(value), color=BASE_COLOUR, linewidth=1.2, linestyle="--", zorder=3, label=model.name)


def _mark_sections(axes: Axes, sections: Sequence[Section]) -> None:
    controls = sections.count("controls")
    if 0 < controls < len(sections):
        axes.axvline(controls - 0.5, color="black", linewidth=0.8, linestyle=":", zorder=1)
    if "per-task" in sections:
        axes.axvspan(sections.index("per-task") - 0.5, len(sections) - 0.4, color=SHADE, zorder=0)


def _paleness(heads: str, fitted: Sequence[str]) -> float:
    """How much of white is in the colour of a model under these heads."""
    return 0.0 if heads in UNFITTED else min(PALEST, PALER * (fitted.index(heads) + 1))


def _paler(colour: str, share: float) -> str:
    """A colour with a share of white in it."""
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = (part + (1 - part) * share for part in to_rgb(colour))
    return to_hex((red, green, blue))


def _draw_legend(axes: Axes, kinds: list[str], heads: list[str], tasks: list[str], sections: Sequence[Section]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = []
    if "controls" in sections:
        handles.append(Patch(color=CONTROL_COLOUR, label="control: not merged"))
    handles += [
        Patch(color=colour_of(kind, kinds), label=f"{kind} task vectors" if kind else "merged") for kind in kinds
    ]
    handles += [
        Patch(color=_paler("black", _paleness(one, heads)), label=f"paler: heads fitted ({one})") for one in heads
    ]
    if "per-task" in sections:
        label = "per-task: keeps something\nextra for each task"
        handles.append(Patch(facecolor=SHADE, edgecolor="#888888", hatch=HATCH, label=label))
    if any(line.get_gid() == WHISKER for line in axes.get_lines()):
        handles.append(Line2D([], [], color="#666666", linewidth=3, label="95 % interval of the average"))
    handles += [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    if 1 < len(tasks) <= len(TASK_MARKERS):
        handles += [
            Line2D([], [], linestyle="", marker=_marker(index, tasks), color="black", markersize=5, label=task)
            for index, task in enumerate(tasks)
        ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)


def _draw_note(figure: Figure, note: str) -> None:
    if note:
        wide = int(figure.get_figwidth() * LETTERS_PER_INCH)
        figure.supxlabel(textwrap.fill(note, wide), x=0.01, horizontalalignment="left", fontsize=NOTE_SIZE)


def _clamped(value: float) -> float:
    return min(max(value, LOWEST), HIGHEST)


def _marker(index: int, tasks: list[str]) -> str:
    return TASK_MARKERS[index] if len(tasks) <= len(TASK_MARKERS) else "o"


def _wrapped(name: str) -> str:
    return name.replace("-", "-\n", 1) if len(name) > 12 else name


def _shared(parts: list[list[str]]) -> int:
    """How many leading pieces all names share, at least one piece being left of each."""
    most = min((len(part) for part in parts), default=1) - 1
    return next((index for index in range(most) if len({part[index] for part in parts}) > 1), max(most, 0))


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, so that pyplot's global state and the user's backend stay untouched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure: Figure, path: Path | str) -> None:
    """Write a figure as a PNG file; it appears whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
