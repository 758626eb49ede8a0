"""All merged models of a sweep in a table, the best first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from pave_lightning.reporting.markdown import escaped, table
from pave_lightning.reporting.sweep_table import SCORE, signed
from pave_lightning.reporting.vectors import others_of

# Form of a merged model -> what such models have.
TITLES = {"static": "One set of weights for all tasks", "per-task": "Something extra for each task"}
NOTE = (
    "Seconds and memory are those of merging alone, on average over all task vectors. Capturing statistics,"
    " gradients, the merge of an anchor and the search for a scale come on top."
)

FIRST, LAST = ("model", "plain", "purified"), ("difference", "lowest task", "seconds", "peak MB")
"""Headings before and behind those of other task vectors."""


def ranking(best: pd.DataFrame) -> list[str]:
    """Tables in markdown, one a form: models that keep something for each task do not compete with those that do not.

    Args:
        best: rows of `summarise`, at most one for each model, form and vectors.

    Returns:
        A heading and a table for each form of merged models that is there. Models stand in the order of their higher
        mean of plain, purified and other vectors, which have a column each where there are any. ``difference`` is
        purified minus plain, with its standard deviation over seeds; ``lowest task`` is the task that the best of them
        does worst, with its mean; ``seconds`` and ``peak MB`` are what merging took, on average over all of them. A
        line behind the tables says what is not in them.
    """
    parts = []
    for form, title in TITLES.items():
        rows = best[best["form"] == form]
        if rows.empty:
            continue
        order = rows.groupby("model")["mean"].max().sort_values(ascending=False, kind="stable").index
        others = others_of(rows["vectors"])
        lines = [_line(str(model), rows[rows["model"] == model], others) for model in order]
        parts += [f"### {title}", table([*FIRST, *map(escaped, others), *LAST], lines)]
    if parts and best["seconds"].notna().any():
        parts.append(NOTE)
    return parts


def _line(model: str, rows: pd.DataFrame, others: Sequence[str]) -> tuple[str, ...]:
    by_vectors: dict[Any, Mapping[Any, Any]] = {row["vectors"]: dict(row) for _, row in rows.iterrows()}
    means = [_mean(by_vectors.get(vectors)) for vectors in ("plain", "purified", *others)]
    difference = _with_spread(*(by_vectors.get("purified", {}).get(key) for key in ("difference", "difference_sd")))
    better = rows.loc[rows["mean"].idxmax()] if rows["mean"].notna().any() else rows.iloc[0]
    seconds, peak = _number(rows["seconds"].mean(), ".1f"), _number(rows["peak_megabytes"].mean(), ".0f")
    return escaped(model), *means, difference, _lowest(better), seconds, peak


def _mean(row: Mapping[Any, Any] | None) -> str:
    return "" if row is None else _with_spread(row["mean"], row["sd"], difference=False)


def _lowest(row: pd.Series) -> str:
    tasks = {str(name).removesuffix(SCORE): row[name] for name in row.index if str(name).endswith(SCORE)}
    tasks = {name: value for name, value in tasks.items() if not math.isnan(value)}
    lowest = min(tasks, key=lambda name: tasks[name], default=None)
    return "" if lowest is None else f"{escaped(lowest)} {tasks[lowest]:.3f}"


def _with_spread(value: Any, spread: Any, *, difference: bool = True) -> str:
    if value is None or math.isnan(value):
        return ""
    around = _number(spread, ".3f")
    told = signed(value) if difference else f"{value:.3f}"
    return f"{told} ± {around}" if around else told


def _number(value: Any, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)
