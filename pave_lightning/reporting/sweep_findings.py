"""The findings of a sweep, written from its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from pave_lightning.reporting.scores import left_out_sentence
from pave_lightning.reporting.sweep_heads import ranking_by_heads
from pave_lightning.reporting.sweep_ranking import TITLES, ranking
from pave_lightning.reporting.sweep_table import (
    IDENTITY,
    TINY,
    Paired,
    SweepScores,
    controls_among,
    is_number,
    paired,
    plainly,
    same,
    signed,
    summary_of,
)
from pave_lightning.reporting.sweep_view import SweepView

KNEE_TOLERANCE = 0.01
# With fewer seeds a spread says nothing
ENOUGH_SEEDS = 3


def findings(frame: pd.DataFrame, view: SweepView) -> str:
    """Say in markdown what the numbers show and what they do not.

    Args:
        frame: One row a score, as `SweepScores` takes it.
        view: Which score is used and what stands on the axis.
    """
    return findings_of(SweepScores(frame, view), summary_of(SweepScores(frame, view)))


def findings_of(scores: SweepScores, summary: pd.DataFrame) -> str:
    """`findings` for scores and a summary that are prepared already."""
    view = scores.view
    parts = [f"# {view.title or 'Findings'}", view.question, _setting(scores)]
    if summary.empty or summary["mean"].isna().all():
        parts.append("There are no scores to compare.")
        return "\n\n".join(part for part in parts if part) + "\n"
    best = _best_rows(scores, summary)
    sections = [
        ("Best settings", _best(scores, summary, best)),
        ("Purified against plain", _purified_against_plain(scores, best)),
        (f"Along `{view.x}`", _knees(scores) if view.x in scores.keys else []),
        *((f"Values of `{key}`", _values(scores, key)) for key in scores.keys if _is_compared(scores, key)),
        ("Tasks, at each model's best purified setting", _tasks(scores, best)),
        ("How to read this", _notes(scores)),
    ]
    merged = best[best["form"] != "expert"]
    if not scores.keys and merged["model"].nunique() > 1:
        parts += ["## All models", *ranking(merged)]
    if scores.keys == ["heads"]:
        parts += ["## All models", *ranking_by_heads(summary, list(map(str, scores.values["heads"])))]
    for heading, lines in sections:
        if lines:
            parts += [f"## {heading}", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(found: Paired) -> str:
    """A paired difference in words: mean, spread, seeds, interval, and what can be concluded."""
    if not found.seeds:
        return "no seed has both"
    if found.seeds == 1:
        return f"{signed(found.mean)} in one seed; one seed settles nothing"
    told = f"mean difference {signed(found.mean)}, sd {found.sd:.3f}"
    told += f", above zero in {found.better} of {found.seeds} seeds"
    if found.seeds < ENOUGH_SEEDS:
        return f"{told}; two seeds settle nothing"
    told += f", 95 % interval {signed(found.low)} to {signed(found.high)}"
    return f"{told}: {_judged(found)}"


def _judged(found: Paired) -> str:
    """What the interval of a difference over enough seeds lets one conclude."""
    if abs(found.mean) <= TINY and found.sd <= TINY:
        return "the same in every seed"
    if found.contains_zero:
        return "no difference beyond the spread"
    return "better" if found.mean > 0 else "worse"


def knee(points: Sequence[tuple[float, float]], tolerance: float) -> float:
    """Where a curve has all but reached its best value.

    Args:
        points: Pairs of x and mean score, by x.
        tolerance: How far below the best value still counts as reaching it.

    Returns:
        The smallest x from which on, up to the x of the best value, every value lies within the tolerance of the best
        (of equal best values, the first).

    Example:
        >>> knee([(1, 0.2), (2, 0.79), (4, 0.795), (8, 0.8), (16, 0.7)], 0.01)
        2
    """
    best = max(range(len(points)), key=lambda place: points[place][1])
    place = best
    while place and points[place - 1][1] >= points[best][1] - tolerance - TINY:
        place -= 1
    return points[place][0]


def _setting(scores: SweepScores) -> str:
    seeds = list(dict.fromkeys(scores.by_seed["seed"]))
    told = [f"{len(seeds)} seed{'s' if len(seeds) != 1 else ''}, {len(scores.tasks)} tasks ({', '.join(scores.tasks)})"]
    told += [f"`{key}`: {', '.join(map(plainly, scores.values[key]))}" for key in scores.keys]
    if scores.view.score == "raw":
        score = "Scores are averages of the tasks' values of the primary metric."
    else:
        score = (
            "Scores are values of the primary metric divided by the same seed's expert's and averaged over the tasks."
        )
    return f"{'; '.join(told)}. {score} The spread (±, sd) is the standard deviation over seeds."


def _best_rows(scores: SweepScores, summary: pd.DataFrame) -> pd.DataFrame:
    """The best row of every model and vectors, among the settings that have the most seeds."""
    rows = summary[~controls_among(summary)]
    rows = rows[rows["mean"].notna()]
    most = rows.groupby(list(IDENTITY))["seeds"].transform("max")
    rows = rows[rows["seeds"] == most]
    return rows.loc[rows.groupby(list(IDENTITY), sort=False)["mean"].idxmax()]


def _best(scores: SweepScores, summary: pd.DataFrame, best: pd.DataFrame) -> list[str]:
    lines = []
    for (model, form), rows in best.groupby(["model", "form"], sort=False):
        shown = rows.sort_values("mean", ascending=False, kind="stable")
        told = [f"{row['vectors']} {_spread(row)}{_at(scores.keys, row)}" for _, row in shown.iterrows()]
        lines.append(f"{_model_name(model, form)}: {'; '.join(told)}")
    for form, title in TITLES.items():
        rows = best[best["form"] == form]
        if rows["model"].nunique() > 1:
            row = rows.loc[rows["mean"].idxmax()]
            name = f"{row['model']}, {row['vectors']}{_at(scores.keys, row)}"
            lines.append(f"Highest of the models with {title.lower()}: {name}, {_spread(row)}.")
    references = [
        f"{form if form == 'base' else 'experts'} {_spread(row)}{_at(scores.keys, row)}"
        for form in ("base", "expert")
        for _, row in summary[(summary["form"] == form) & (summary["vectors"] == "")].iterrows()
    ]
    if references:
        lines.append(f"For reference: {'; '.join(references)}.")
    return lines


def _purified_against_plain(scores: SweepScores, best: pd.DataFrame) -> list[str]:
    rows = scores.merged()
    rows = rows[rows["vectors"] == "purified"]
    lines = []
    for (model, form), own in rows.groupby(["model", "form"], sort=False):
        name = _model_name(model, form)
        against = "the experts as they are" if form == "expert" else "plain"
        if own["difference"].notna().sum() == 0:
            lines.append(f"{name}: {against} was not measured in the same seeds; nothing to compare")
            continue
        cells = len(own[scores.keys].drop_duplicates()) if scores.keys else 1
        if cells > 1:
            overall = paired(scores.over_seeds(own, ["model"], "difference")["difference"])
            lines.append(f"{name}, average over {cells} settings: {verdict(overall)}")
        top = best[(best["model"] == model) & (best["form"] == form) & (best["vectors"] == "purified")]
        for _, row in top.iterrows():
            there = own[_where(own, scores.keys, row)]
            at = f", at its best setting{_at(scores.keys, row)}" if cells > 1 else ""
            lines.append(f"{name}{at}: {verdict(paired(there['difference']))}")
        if cells > 1:
            lines += _chosen_on_other_seeds(scores, own, name)
    return lines


def _chosen_on_other_seeds(scores: SweepScores, own: pd.DataFrame, name: str) -> list[str]:
    """Choose the setting on all seeds but one, judge it on that one: free of the luck of having been chosen."""
    cells = own.groupby(scores.keys, dropna=False).ngroup()
    table = own.assign(cell=cells).pivot_table(index="cell", columns="seed", values=["score", "difference"], sort=False)
    if "difference" not in table:
        return []
    score, difference = table["score"].dropna(), table["difference"]
    seeds = list(score.columns)
    if len(seeds) < ENOUGH_SEEDS or len(score) < 2:
        return []
    judged = [
        float(difference.loc[score.drop(columns=seed).mean(axis=1).idxmax()].get(seed, math.nan)) for seed in seeds
    ]
    found = paired(judged)
    if not found.seeds:
        return []
    told = f"{signed(found.mean)}, above zero in {found.better} of {found.seeds} seeds"
    return [f"{name}, each seed at the setting that is best in the other seeds: mean difference {told}"]


def _knees(scores: SweepScores) -> list[str]:
    x = scores.view.x
    numbers = [value for value in scores.values[x] if is_number(value)]
    if len(numbers) < 3:
        return []
    unit = "`" + x + "`"
    lines = []
    fields = [*scores.view.lines_among(scores.keys), "model", "vectors"]
    rows = scores.merged()
    rows = rows[[is_number(value) for value in rows[x]]]
    for curve, name in _curves(scores, rows, fields):
        points = scores.over_seeds(curve, [x]).groupby(x)["score"].agg(["mean", "std"]).dropna(subset=["mean"])
        points = points.sort_index()
        if len(points) < 3:
            continue
        place = points["mean"].idxmax()
        best, sd = points.loc[place, "mean"], points.loc[place, "std"]
        tolerance = max(KNEE_TOLERANCE, 0.0 if math.isnan(sd) else sd)
        found = knee(list(zip(points.index, points["mean"], strict=True)), tolerance)
        told = f"{name}: best {best:.3f} at {plainly(place)}, knee at {plainly(found)} (tolerance {tolerance:.3f})"
        edge = {points.index[0]: "smallest", points.index[-1]: "largest"}.get(place)
        lines.append(told + (f"; the best is the {edge} value tried" if edge else ""))
        lines += _words_against_numbers(scores, curve.index, fields, name, place)
    if lines:
        definition = (
            f"Knee: the smallest {unit} from which on, up to the best one, the mean score stays within the tolerance of"
            f" the best: the larger of {KNEE_TOLERANCE} and the standard deviation over seeds at the best."
        )
        lines.insert(0, definition)
    return lines


def _words_against_numbers(
    scores: SweepScores, index: pd.Index, fields: list[str], name: str, place: float
) -> list[str]:
    """How values of x that are words, such as auto, compare with the best number, which was chosen with hindsight."""
    x = scores.view.x
    rows = scores.merged()
    first = rows.loc[index[0]]
    own = rows[_where(rows, [field for field in dict.fromkeys(fields) if field != x], first)]
    lines = []
    for word in (value for value in scores.values[x] if not is_number(value)):
        differences = _paired_by_value(scores, own, x, word, place)
        if differences is not None:
            lines.append(f"{name}: {plainly(word)} against {plainly(place)}: {verdict(differences)}")
    return lines


def _is_compared(scores: SweepScores, key: str) -> bool:
    values = scores.values[key]
    along_axis = key == scores.view.x and sum(map(is_number, values)) >= 3
    return len(values) > 1 and not along_axis


def _values(scores: SweepScores, key: str) -> list[str]:
    """Paired differences between each value of a key and the first, over seeds."""
    first, *others = dict.fromkeys(scores.values[key])
    rows = scores.merged()
    rows = rows[rows[key].notna()]
    lines = []
    for value in others:
        against = f"{plainly(value)} against {plainly(first)}"
        merged = rows[rows["form"] != "expert"]
        groups = list(_curves(scores, rows, list(IDENTITY)))
        if merged[["model", "vectors"]].drop_duplicates().shape[0] > 1:
            found = _paired_by_value(scores, merged, key, value, first)
            if found is not None:
                lines.append(f"{against}, all merged models: {verdict(found)}")
        for own, name in groups:
            found = _paired_by_value(scores, own, key, value, first)
            if found is not None:
                lines.append(f"{against}, {name}: {verdict(found)}")
    return lines


def _paired_by_value(scores: SweepScores, rows: pd.DataFrame, key: str, value: Any, first: Any) -> Paired | None:
    """Differences in score between two values of a key, all else being the same; None where no cell has both."""
    others = [*(name for name in scores.keys if name != key), *IDENTITY, "seed"]
    sides = [rows[same(rows[key], wanted)].set_index(others)["score"] for wanted in (value, first)]
    joined = pd.concat(sides, axis=1, keys=["value", "first"], join="inner").reset_index()
    if joined.empty:
        return None
    joined["difference"] = joined["value"] - joined["first"]
    return paired(scores.over_seeds(joined, [], "difference")["difference"])


def _tasks(scores: SweepScores, best: pd.DataFrame) -> list[str]:
    lines = []
    rows = scores.by_task
    for _, row in best[best["vectors"] == "purified"].iterrows():
        own = rows[_where(rows, [*scores.keys, *IDENTITY], row)]
        by_task = {task: paired(part["difference"]) for task, part in own.groupby("task", sort=False)}
        ranked = sorted((task for task in by_task if by_task[task].seeds), key=lambda task: -by_task[task].mean)
        if not ranked:
            continue
        name = _model_name(row["model"], row["form"])

        def told(task: str, by_task: dict[Any, Paired] = by_task) -> str:
            found = by_task[task]
            judged = f", {_judged(found)}" if found.seeds >= ENOUGH_SEEDS else ""
            return f"{task} {signed(found.mean)} (above zero in {found.better} of {found.seeds}{judged})"

        if len(ranked) == 1:
            lines.append(f"{name}: {told(ranked[0])}")
            continue
        lines.append(f"{name}: largest difference {told(ranked[0])}; smallest {told(ranked[-1])}")
    return lines


def _notes(scores: SweepScores) -> list[str]:
    lines = [
        "Differences are paired: purified minus plain of the same model, seed and experts. The interval is Student's,"
        " over seeds; it does not cover what other test rows would give.",
    ]
    settings = len(scores.merged()[[*scores.keys, *IDENTITY]].drop_duplicates())
    if settings > 2:
        lines.append(
            "A best setting is chosen by the scores that are reported for it, which flatters it. Of many intervals,"
            " one in twenty misses zero by chance."
        )
    if scores.left_out:
        tasks = len(dict.fromkeys(task for task, _ in scores.left_out))
        lines.append(left_out_sentence(tasks, [f"{task} (seed {seed})" for task, seed in scores.left_out]))
    lost = int(scores.merged()["score"].isna().sum())
    if lost:
        lines.append(f"{lost} of {len(scores.merged())} averages (one a setting, model and seed) are missing.")
    return lines


def _curves(scores: SweepScores, rows: pd.DataFrame, fields: Sequence[str]) -> list[tuple[pd.DataFrame, str]]:
    """Rows that share these fields, with a name; fields that never differ are not in the name."""
    fields = list(dict.fromkeys(fields))
    found = []
    for name, part in rows.groupby(fields, sort=False, dropna=False):
        cell = dict(zip(fields, name, strict=True))
        form = part["form"].iloc[0]
        words = [_model_name(cell["model"], form), cell["vectors"]] if "model" in cell else []
        words += [
            f"{key} {plainly(cell[key])}"
            for key in fields
            if key not in IDENTITY and not pd.isna(cell[key]) and len(scores.values[key]) > 1
        ]
        found.append((part, ", ".join(words)))
    return found


def _where(rows: pd.DataFrame, columns: Sequence[str], row: pd.Series) -> pd.Series:
    found = pd.Series(data=True, index=rows.index)
    for column in columns:
        found &= same(rows[column], None if pd.isna(row[column]) else row[column])
    return found


def _at(keys: Sequence[str], row: pd.Series) -> str:
    told = [f"`{key}` {plainly(row[key])}" for key in keys if not pd.isna(row[key])]
    return f" (at {', '.join(told)})" if told else ""


def _spread(row: pd.Series) -> str:
    if math.isnan(row["mean"]):
        return "no score"
    spread = "one seed" if row["seeds"] == 1 else f"± {row['sd']:.3f}, {row['seeds']} seeds"
    return f"{row['mean']:.3f} ({spread})" if row["seeds"] == 1 else f"{row['mean']:.3f} {spread}"


def _model_name(model: Any, form: Any) -> str:
    if form == "expert":
        return f"{model} (not merged)"
    return f"{model} (per-task)" if form == "per-task" else str(model)
