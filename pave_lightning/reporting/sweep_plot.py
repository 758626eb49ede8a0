"""The figure of a sweep: scores along a varied key, or bars, with their spread over seeds."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from pave_lightning.reporting.plots import (
    BASE_COLOUR,
    EXPERT_COLOUR,
    HATCH,
    HIGHEST,
    LOWEST,
    new_figure,
    write_figure,
)
from pave_lightning.reporting.sweep_table import SweepScores, is_number, plainly
from pave_lightning.reporting.sweep_view import SweepView
from pave_lightning.reporting.vectors import COLOURS, colour_of, in_order, others_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Stroke = Literal["-", "--", "-.", ":"]

# Okabe and Ito's colours that the references do not use; yellow is too faint for lines
LINE_COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#7F6000")
MARKERS = "osD^vP"
ONE_PANEL = 6
"""Most lines (or bars a group) in one panel; more are spread over panels."""
PANELS_A_ROW = 3
NEAR_ONE = 0.9
SPREAD_RATIO = 4
# The part of the height that the data keep, however far away a reference lies
DATA_SHARE = 0.45


@dataclass(frozen=True)
class Axis:
    """Where the values on the horizontal axis stand.

    Args:
        places: Place of every value.
        numbers: The values that are numbers, in order; the others stand apart to their right.
    """

    places: dict[Any, float]
    numbers: list[Any]

    @property
    def reach(self) -> tuple[float, float]:
        """The ends of the axis, with a margin."""
        places = list(self.places.values()) or [0.0]
        margin = 0.04 * (max(places) - min(places)) or 0.5
        return min(places) - margin, max(places) + margin


@dataclass(frozen=True)
class Line:
    """One line or one bar of every group.

    Args:
        cell: Its values of the view's lines.
        label: What the legend calls it.
        form: static, per-task or expert.
        vectors: plain, purified, or the name of another stack; empty where several are averaged.
        points: By x: mean, sd and the single seeds' scores.
        level: Whether it does not depend on x and is drawn across.
    """

    cell: dict[str, Any]
    label: str
    form: str
    vectors: str
    points: dict[Any, tuple[float, float, list[float]]]
    level: bool


@dataclass(frozen=True)
class Look:
    """How a line is drawn."""

    colour: str
    marker: str
    style: Stroke
    filled: bool


def draw(frame: pd.DataFrame, view: SweepView, path: Path | str) -> None:
    """Draw lines with a band of one standard deviation over seeds (x is numbers) or grouped bars, and a dot a seed.

    What does not depend on x is drawn across. More than six lines are spread over panels.

    Args:
        frame: One row a score, as `SweepScores` takes it.
        view: What stands where.
        path: The PNG file; its folder is made where it does not exist.
    """
    draw_scores(SweepScores(frame, view), path)


def draw_scores(scores: SweepScores, path: Path | str) -> None:
    """`draw` for scores that are prepared already."""
    view = scores.view
    values = scores.values_of(view.x)
    as_lines = is_numeric(scores)
    axis = axis_for(values, view) if as_lines else Axis({value: float(i) for i, value in enumerate(values)}, [])
    lines = drawn_lines(scores, values)
    panels = _panels(lines)
    looks = _looks(lines, panelled="" if len(panels) < 2 else _panel_field(lines))

    columns = 2 if len(panels) == 4 else min(len(panels), PANELS_A_ROW)
    rows = math.ceil(len(panels) / columns)
    widest = max((sum(not line.level for line in panel) for panel in panels.values()), default=1)
    width = max(3.6 if columns > 1 else 6.2, 0 if as_lines else 1.2 + len(values) * (0.5 + 0.3 * widest))
    figure = new_figure(min(3.2 + columns * width, 22.0), 1.4 + rows * (3.4 if rows > 1 else 4.2))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for empty in grid[len(panels) :]:
        empty.set_axis_off()
    heights = _heights(scores, lines)
    for place, (axes, (name, panel)) in enumerate(zip(grid, panels.items(), strict=False)):
        if as_lines:
            _draw_lines(axes, panel, axis, looks, view)
        else:
            _draw_bars(axes, panel, axis, looks, view)
        _draw_references(axes, scores, heights, axis)
        axes.set_ylim(*heights)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(name, loc="left", fontsize=10)
        if place % columns == 0:
            axes.set_ylabel("score divided by the expert's" if view.score == "normalised" else "average score")
        if place + columns >= len(panels):
            axes.set_xlabel(view.x)
    _head(figure, view)
    _legend(grid[columns - 1], scores, lines, looks)
    figure.supxlabel(_note(scores), fontsize=8, color="#555555", x=0.01, ha="left")
    write_figure(figure, path)


def axis_for(values: Sequence[Any], view: SweepView) -> Axis:
    """Places for the values of a numeric key: even, logarithmic, or spread out towards 1 for ratios near 1.

    Ratios are spread by -log10(1 - ratio) and 1 stands one step further, as does 0 on a logarithmic axis. Values that
    are words stand behind the numbers.

    Args:
        values: Numbers and words.
        view: Whether the axis is logarithmic.
    """
    numbers = sorted(value for value in values if is_number(value))
    inner = [value for value in numbers if value < 1]
    if _is_near_one(numbers):
        places = {value: -math.log10(1 - value) for value in inner}
        if len(inner) < len(numbers):
            places[numbers[-1]] = places[inner[-1]] + _step(places)
    elif view.log_x and numbers[0] >= 0 and numbers[-1] > 0:
        places = {value: math.log10(value) for value in numbers if value > 0}
        if numbers[0] == 0:
            places = {numbers[0]: min(places.values()) - _step(places), **places}
    else:
        places = {value: float(value) for value in numbers}
    end = max(places.values())
    apart = 0.12 * (end - min(places.values())) or 1.0
    words = [value for value in values if not is_number(value)]
    return Axis({**places, **{word: end + (i + 1) * apart for i, word in enumerate(words)}}, numbers)


def _is_near_one(numbers: Sequence[float]) -> bool:
    gaps = [1 - value for value in numbers if value < 1]
    inside = numbers[0] > 0 and numbers[-1] <= 1 and numbers[-1] >= NEAR_ONE
    return inside and len(gaps) > 1 and max(gaps) >= SPREAD_RATIO * min(gaps)


def _step(places: dict[Any, float]) -> float:
    found = sorted(places.values())
    gaps = sorted(after - before for before, after in itertools.pairwise(found))
    return gaps[len(gaps) // 2] if gaps else 1.0


def drawn_lines(scores: SweepScores, values: Sequence[Any]) -> list[Line]:
    """The lines, or bars of every group, of a figure: static models first, then per-task ones, then experts.

    Args:
        scores: The scores, with the view of what makes a line.
        values: The values on the horizontal axis.
    """
    x = scores.view.x
    fields = scores.view.lines_among(scores.keys)
    rows = scores.merged()
    # Forms are never averaged, nor are experts with merged models
    fields_and_form = [*fields, "form"]
    found: list[Line] = []
    varying = [field for field in fields if rows[field].dropna().nunique() > 1]
    for name, part in rows.groupby(fields_and_form, sort=False, dropna=False):
        *own, form = name
        cell = {field: None if pd.isna(value) else value for field, value in zip(fields, own, strict=True)}
        kinds = set(part["vectors"])
        level = bool(part[x].isna().all()) if x in scores.keys else False
        averaged = scores.over_seeds(part if level else part[part[x].notna()], [x])
        points = {
            None if level else value: _point(averaged[averaged[x].isna() if level else averaged[x].eq(value)]["score"])
            for value in ([None] if level else values)
        }
        points = {value: point for value, point in points.items() if point[2]}
        if points:
            vectors = kinds.pop() if len(kinds) == 1 else ""
            found.append(Line(cell, _label(cell, varying, form, x), form, vectors, points, level))
    order = ["static", "per-task", "expert"]
    places = {field: scores.values_of(field) for field in fields}

    def place(line: Line) -> tuple[int, ...]:
        cell = [-1 if value is None else places[field].index(value) for field, value in line.cell.items()]
        return order.index(line.form), *cell

    return sorted(found, key=place)


def _point(values: pd.Series) -> tuple[float, float, list[float]]:
    values = values.dropna().astype(float)
    return float(values.mean()), float(values.std(ddof=1)), list(values)


def _label(cell: dict[str, Any], varying: Sequence[str], form: str, x: str) -> str:
    words = []
    for field in varying:
        value = cell[field]
        if value in (None, ""):
            continue
        if field in ("model", "vectors"):
            words.append(str(value))
        else:
            words.append(f"{field.rpartition('.')[2]} {plainly(value)}")
    if form == "expert":
        words = [word for word in words if word not in ("experts", "purified")]
        words = ["experts, purified, not merged", *words]
    elif form == "per-task" and x != "model":
        words.append("(per-task)")
    return ", ".join(words).replace(", (", " (") or "merged"


def _panel_field(lines: Sequence[Line]) -> str:
    drawn = [line for line in lines if not line.level]
    for field in (name for name in (drawn[0].cell if drawn else ()) if name != "vectors"):
        if len({line.cell[field] for line in drawn}) > 1:
            return field
    return ""


def _panels(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """One panel, or one for each value of the first field that differs where there are too many lines for one."""
    field = _panel_field(lines)
    if not field or sum(not line.level for line in lines) <= ONE_PANEL:
        return {"": list(lines)}
    panels: dict[str, list[Line]] = {}
    for value in dict.fromkeys(line.cell[field] for line in lines if line.cell[field] is not None):
        own = [line for line in lines if line.cell[field] in (value, None)]
        form = own[0].form if field == "model" else ""
        ending = {"per-task": " (per-task)", "expert": ", purified, not merged"}.get(form, "")
        panels[f"{plainly(value)}{ending}" if field == "model" else f"{field} {plainly(value)}"] = own
    return panels


def _looks(lines: Sequence[Line], panelled: str) -> dict[str, Look]:
    """Colours by the first field that differs within a panel, markers by the others; plain is dotted and hollow.

    Plain and purified share a colour; other stacks of transforms have colours of their own.
    """
    fields = [field for field in (lines[0].cell if lines else ()) if field not in ("vectors", panelled)]
    values = {
        field: list(dict.fromkeys(line.cell[field] for line in lines if line.cell[field] is not None))
        for field in fields
    }
    merged = [line for line in lines if line.form != "expert"]
    beside_merged = bool(merged)
    merged = merged or list(lines)
    varying = [field for field in fields if len({line.cell[field] for line in merged} - {None}) > 1]
    others = [tuple(line.cell[field] for field in varying[1:]) for line in lines]
    known = list(dict.fromkeys(other for other in others if None not in other))
    vectors = in_order(line.vectors for line in lines)
    looks = {}
    for line, other in zip(lines, others, strict=True):
        colour = colour_of(line.vectors, vectors)
        if line.form == "expert" and panelled != "model" and beside_merged:
            colour = EXPERT_COLOUR
        elif varying and line.cell[varying[0]] is not None:
            own = values[varying[0]]
            stack = 0 if line.vectors not in others_of(vectors) else 1 + others_of(vectors).index(line.vectors)
            colour = LINE_COLOURS[(own.index(line.cell[varying[0]]) + stack * len(own)) % len(LINE_COLOURS)]
        elif not varying and line.vectors == "":
            colour = COLOURS["purified"]
        marker = MARKERS[known.index(other) % len(MARKERS)] if other in known else "o"
        plain = line.vectors == "plain"
        style: Stroke = ("-." if plain else "--") if line.form == "per-task" else (":" if plain else "-")
        looks[_key(line)] = Look(colour, marker, style, not plain)
    return looks


def _key(line: Line) -> str:
    return f"{line.form} {line.cell}"


def _draw_lines(axes: Axes, lines: Sequence[Line], axis: Axis, looks: dict[str, Look], view: SweepView) -> None:
    low, high = axis.reach
    drawn = [line for line in lines if not line.level]
    shift = 0.006 * (high - low)
    for index, line in enumerate(drawn):
        look = looks[_key(line)]
        aside = (index - (len(drawn) - 1) / 2) * shift
        numbers = [value for value in axis.numbers if value in line.points]
        places = [axis.places[value] for value in numbers]
        means = [_held(line.points[value][0], view) for value in numbers]
        spreads = [0.0 if math.isnan(line.points[value][1]) else line.points[value][1] for value in numbers]
        face = look.colour if look.filled else "white"
        axes.plot(
            places,
            means,
            color=look.colour,
            linestyle=look.style,
            marker=look.marker,
            markersize=5,
            markerfacecolor=face,
            linewidth=1.6,
            zorder=4,
        )
        lower = [_held(mean - sd, view) for mean, sd in zip(means, spreads, strict=True)]
        upper = [_held(mean + sd, view) for mean, sd in zip(means, spreads, strict=True)]
        axes.fill_between(places, lower, upper, color=look.colour, alpha=0.13, linewidth=0, zorder=2)
        for value, (mean, sd, seeds) in line.points.items():
            place = axis.places[value]
            if value not in axis.numbers:
                error = None if math.isnan(sd) else sd
                axes.errorbar(
                    place + 2 * aside, _held(mean, view), yerr=error, color=look.colour, marker=look.marker, zorder=4
                )
                place += aside
            if len(seeds) > 1:
                heights = [_held(seed, view) for seed in seeds]
                axes.plot(
                    [place + aside] * len(seeds), heights, ".", color=look.colour, alpha=0.45, markersize=4, zorder=3
                )
    _draw_levels(axes, lines, looks, view)
    axes.set_xlim(low, high)
    slanted = len(axes.figure.axes) > 1 and len(axis.places) > 5
    labelled = _labelled(axis, 0.055 if slanted else 0.07)
    axes.set_xticks(
        [axis.places[value] for value in labelled],
        [plainly(value) for value in labelled],
        rotation=40 if slanted else 0,
    )
    axes.set_xticks(list(axis.places.values()), minor=True)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="y", color="#EEEEEE", linewidth=0.8, zorder=0)
    if axis.numbers and len(axis.numbers) < len(axis.places):
        ends = axis.places[axis.numbers[-1]], min(axis.places[v] for v in axis.places if v not in axis.numbers)
        axes.axvline(sum(ends) / 2, color="#CCCCCC", linewidth=0.8, zorder=1)


def _labelled(axis: Axis, share: float) -> list[Any]:
    """The values whose labels have room; the last of the numbers always has."""
    low, high = axis.reach
    kept: list[Any] = []
    for value in reversed(list(axis.places)):
        if not kept or abs(axis.places[value] - axis.places[kept[-1]]) >= share * (high - low):
            kept.append(value)
    return kept[::-1]


def _draw_levels(axes: Axes, lines: Sequence[Line], looks: dict[str, Look], view: SweepView) -> None:
    for line in lines:
        if line.level:
            look = looks[_key(line)]
            mean, sd, _ = line.points[None]
            axes.axhline(_held(mean, view), color=look.colour, linestyle=look.style, linewidth=1.5, zorder=2.5)
            if sd > 0:
                axes.axhspan(mean - sd, mean + sd, color=look.colour, alpha=0.07, linewidth=0, zorder=1)


def _draw_bars(axes: Axes, lines: Sequence[Line], axis: Axis, looks: dict[str, Look], view: SweepView) -> None:
    drawn = [line for line in lines if not line.level]
    crowded = 0
    for value, place in axis.places.items():
        # Bars that this group lacks leave no hole
        own = [line for line in drawn if value in line.points]
        width = 0.82 / max(len(own), 2)
        crowded = max(crowded, len(own))
        for index, line in enumerate(own):
            look = looks[_key(line)]
            mean, sd, seeds = line.points[value]
            centre = place + (index - (len(own) - 1) / 2) * width
            axes.bar(
                centre,
                _held(mean, view),
                width * 0.94,
                color=look.colour if look.filled else _lighter(look.colour),
                edgecolor="white" if look.filled else look.colour,
                linewidth=0.8,
                hatch=HATCH if line.form == "per-task" else None,
                zorder=2,
            )
            if not math.isnan(sd):
                axes.errorbar(centre, _held(mean, view), yerr=sd, color="black", linewidth=1, capsize=2.5, zorder=4)
            step = width * 0.5 / max(len(seeds) - 1, 1)
            places = [centre + (i - (len(seeds) - 1) / 2) * step for i in range(len(seeds))]
            heights = [_held(seed, view) for seed in seeds]
            axes.plot(
                places,
                heights,
                "o",
                color="black",
                markersize=3,
                markeredgecolor="white",
                markeredgewidth=0.5,
                zorder=5,
            )
            axes.annotate(
                f"{mean:.3f}",
                (centre, 0),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7.5,
                rotation=90 if len(own) > 2 or len(axis.places) > 6 else 0,
                bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.9},
                zorder=6,
            )
    _draw_levels(axes, lines, looks, view)
    names = [textwrap.fill(plainly(value).replace("_", "_\u200b"), 14, break_long_words=False) for value in axis.places]
    slanted = len(names) > 8 or max(map(len, names), default=0) * len(names) > 90
    axes.set_xticks(
        list(axis.places.values()),
        names,
        rotation=30 if slanted else 0,
        ha="right" if slanted else "center",
        fontsize=9,
    )
    axes.set_xlim(-0.6, max(len(axis.places), 1) - 0.4)
    axes.axhline(0, color="black", linewidth=0.8, zorder=3)


def _lighter(colour: str) -> str:
    parts = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(part + 0.6 * (255 - part)):02X}" for part in parts)


def _references(scores: SweepScores) -> list[tuple[str, str, Stroke, dict[Any, float]]]:
    """Name, colour, style and heights by x (None: the same everywhere) of the experts and the base."""
    found = []
    x = scores.view.x
    kinds: list[tuple[str, str, str, Stroke]] = [
        ("expert", "experts", EXPERT_COLOUR, "-"),
        ("base", "base", BASE_COLOUR, "--"),
    ]
    for form, name, colour, style in kinds:
        rows = scores.reference(form)
        rows = rows[rows["score"].notna()]
        if rows.empty:
            continue
        by = [x] if x in scores.keys and rows[x].notna().all() else []
        means = scores.over_seeds(rows, by)
        heights = means.groupby(x)["score"].mean().to_dict() if by else {None: float(means["score"].mean())}
        found.append((name, colour, style, heights))
    return found


def _draw_references(axes: Axes, scores: SweepScores, heights: tuple[float, float], axis: Axis) -> None:
    for _, colour, style, values in _references(scores):
        if None in values:
            if heights[0] <= values[None] <= heights[1]:
                axes.axhline(values[None], color=colour, linestyle=style, linewidth=1.2, zorder=2.2)
        else:
            known = [value for value in axis.places if value in values]
            axes.plot(
                [axis.places[value] for value in known],
                [values[value] for value in known],
                color=colour,
                linestyle=style,
                linewidth=1.2,
                zorder=2.2,
            )


def _heights(scores: SweepScores, lines: Sequence[Line]) -> tuple[float, float]:
    """The ends of the vertical axis: all that is drawn, and the references where they do not flatten it."""
    as_lines = is_numeric(scores)
    shown = [] if as_lines else [0.0]
    for line in lines:
        for mean, sd, seeds in line.points.values():
            spread = 0.0 if math.isnan(sd) else sd
            shown += [
                _held(value, scores.view) for value in (mean - spread, mean + spread, *seeds) if math.isfinite(value)
            ]
    references = [value for *_, heights in _references(scores) for value in heights.values() if math.isfinite(value)]
    shown = shown or references or [0.0, 1.0]
    low, high = min(shown), max(shown)
    for value in sorted(references, key=lambda reference: abs(reference - (low + high) / 2)):
        wider = max(high, value) - min(low, value)
        if not as_lines or (high - low) >= DATA_SHARE * wider or wider <= 0.05:
            low, high = min(low, value), max(high, value)
    margin = 0.05 * (high - low) or 0.05
    return (low if low == 0 and not as_lines else low - margin), high + margin


def _held(value: float, view: SweepView) -> float:
    """A normalised value within the picture: one near-zero expert must not flatten all others."""
    return min(max(value, LOWEST), HIGHEST) if view.score == "normalised" else value


def _head(figure: Figure, view: SweepView) -> None:
    question = textwrap.fill(view.question, 110)
    text = "\n".join(part for part in (view.title, question) if part)
    if text:
        figure.suptitle(text, x=0.01, ha="left", fontsize=11)


def _note(scores: SweepScores) -> str:
    seeds = scores.by_seed["seed"].nunique()
    if seeds > 1:
        shape = "band" if is_numeric(scores) else "whisker"
        told = f"{shape}: one standard deviation over {seeds} seeds on either side; small dots: single seeds"
    else:
        told = "one seed: no spread is known"
    view = scores.view
    over = [key for key in scores.keys if key != view.x and key not in view.lines_among(scores.keys)]
    over += [name for name in ("model", "vectors") if name not in (view.x, *view.lines_among(scores.keys))]
    return told + (f"; averaged over {', '.join(over)}" if over else "")


def _legend(axes: Axes, scores: SweepScores, lines: Sequence[Line], looks: dict[str, Look]) -> None:
    """Say what colours, markers and strokes mean, once, beside the panel on the right."""
    from matplotlib.patches import Patch

    as_lines = is_numeric(scores)
    heights = _heights(scores, lines)
    # What the panel's heading or the axis says need not be said again
    said = _panel_field(lines) if len(_panels(lines)) > 1 else "model" if scores.view.x == "model" else ""
    handles: list[Line2D | Patch] = []
    told: set[str] = set()
    for line in lines:
        look = looks[_key(line)]
        name = _legend_name(line, lines, said, scores.view.x)
        shown = name if said or not line.level else f"{name} ({line.points[None][0]:.3f})"
        if shown in told:
            continue
        told.add(shown)
        text = textwrap.fill(shown, 34)
        face = look.colour if look.filled else "white"
        if as_lines or line.level:
            marker = "" if line.level else look.marker
            handles.append(_stroke(look.colour, look.style, text, marker=marker, markersize=5, markerfacecolor=face))
        else:
            face = look.colour if look.filled else _lighter(look.colour)
            hatch = HATCH if line.form == "per-task" and not said else None
            edge = "white" if look.filled else look.colour
            handles.append(Patch(facecolor=face, edgecolor=edge, hatch=hatch, label=text))
    for name, colour, style, values in _references(scores):
        label = name
        if None in values:
            beyond = "" if heights[0] <= values[None] <= heights[1] else ", not in the picture"
            label = f"{name} ({values[None]:.3f}{beyond})"
        handles.append(_stroke(colour, style, label))
    if any(line.form == "per-task" for line in lines):
        label = f"{'dashed' if as_lines else 'hatched'}: per-task,\nkeeps something extra for each task"
        patch = Patch(facecolor="white", edgecolor="#888888", hatch=HATCH, label=label)
        handles.append(_stroke("#888888", "--", label) if as_lines else patch)
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8.5)


def _legend_name(line: Line, lines: Sequence[Line], said: str, x: str) -> str:
    if said in ("", x) or line.cell[said] is None:
        return line.label
    cell = {field: value for field, value in line.cell.items() if field != said}
    varying = [field for field in cell if len({other.cell[field] for other in lines} - {None}) > 1]
    return _label(cell, varying, "static" if said == "model" else line.form, x)


def _stroke(colour: str, style: Stroke, label: str, **options: Any) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=style, label=label, **options)


def is_numeric(scores: SweepScores) -> bool:
    """Whether numbers stand on the horizontal axis, so that lines are drawn and no bars."""
    x = scores.view.x
    return x in scores.keys and sum(map(is_number, scores.values[x])) > 1
