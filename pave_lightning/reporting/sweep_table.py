"""The scores of a sweep, a grid of runs over keys and seeds: normalised, paired and averaged.

Purified and plain results are compared within a seed: same experts, same model, same task. What varies between seeds is
then in both, and the spread of the differences tells how far a difference can be trusted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pave_lightning.errors import PaveError
from pave_lightning.reporting.scores import FORMS
from pave_lightning.reporting.sweep_view import CARRIED_COLUMNS, COST_COLUMNS, FIXED_COLUMNS, SweepView
from pave_lightning.reporting.vectors import in_order

PURIFICATION_SECTIONS = {"purify", "capture"}
IDENTITY = ("model", "vectors", "form")
# Differences below this are rounding
TINY = 1e-12
CONFIDENCE = 0.95
# What a task's name is followed by in the column of its mean score.
SCORE = "/score"


def controls_among(rows: pd.DataFrame) -> pd.Series:
    """Which rows are of models that nothing has merged: the base, experts as they are or under other heads.

    Purified experts are none of them. No merge step can have these names.

    Args:
        rows: with the columns of `IDENTITY`.
    """
    experts = rows["model"].eq("experts") | rows["model"].str.startswith("expert of ")
    of_experts = rows["form"].eq("expert") & rows["vectors"].eq("")
    return rows["form"].eq("base") | of_experts | (experts & rows["form"].ne("expert"))


@dataclass(frozen=True)
class Paired:
    """Paired differences over seeds: their mean, spread and Student's 95 % interval.

    Args:
        mean: Mean difference; NaN without any.
        sd: Standard deviation over seeds; NaN with fewer than two.
        error: Standard error of the mean.
        low: Lower end of the interval; NaN with fewer than two seeds.
        high: Upper end of the interval.
        seeds: How many seeds have a pair.
        better: In how many of them the difference is above zero.
    """

    mean: float
    sd: float
    error: float
    low: float
    high: float
    seeds: int
    better: int

    @property
    def contains_zero(self) -> bool:
        """Whether zero lies in the interval."""
        return not (self.low > TINY or self.high < -TINY)


def paired(differences: Iterable[float]) -> Paired:
    """Sum up one difference a seed; NaN ones are left out.

    Args:
        differences: One value a seed.

    Example:
        >>> found = paired([0.01, 0.02, 0.03])
        >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3), found.better
        (0.02, -0.005, 0.045, 3)
    """
    from scipy.special import stdtrit

    values = np.asarray([value for value in differences if not math.isnan(value)], dtype=float)
    mean, sd = _mean(values), _sd(values)
    error = sd / math.sqrt(len(values)) if len(values) else math.nan
    reach = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * error if len(values) > 1 else math.nan
    return Paired(mean, sd, error, mean - reach, mean + reach, len(values), int((values > TINY).sum()))


class SweepScores:
    """The frame of a sweep, checked, with scores that can be averaged and compared.

    A model whose scores do not depend on a varied key, as plain merging does not depend on purification, stands here
    once, with None for that key.

    Args:
        frame: One row a score; the columns are those in `FIXED_COLUMNS` and one a varied key.
        view: Which score is used.

    Raises:
        PaveError: columns are missing, the view names columns that are not there, or one score has two values.
    """

    def __init__(self, frame: pd.DataFrame, view: SweepView) -> None:
        missing = [name for name in FIXED_COLUMNS if name not in frame.columns]
        if missing:
            raise PaveError(f"the scores of the sweep have no column {', '.join(missing)}")
        self.view = view
        self.keys: list[str] = [str(name) for name in frame.columns if name not in (*FIXED_COLUMNS, *COST_COLUMNS)]
        problems = view.problems(self.keys)
        if problems:
            raise PaveError("the view does not fit the sweep\n  - " + "\n  - ".join(problems))
        rows = _primary_rows(frame, self.keys)
        self.tasks: list[str] = list(dict.fromkeys(rows["task"]))
        self.values: dict[str, list[Any]] = {key: _ordered(rows[key]) for key in self.keys}
        self.left_out: list[tuple[str, int]] = []
        """Tasks and seeds without a positive expert, which have no normalised score."""
        self._cells: dict[tuple[tuple[Any, ...], int], set[str]] = {}
        for name, group in _groups(rows, [*self.keys, "seed"]):
            self._cells[name[:-1], name[-1]] = set(group["task"])
        rows = self._with_score(_collapsed(rows, self.keys))
        reference = rows[(rows["vectors"] == "plain") | ((rows["form"] == "expert") & (rows["vectors"] == ""))]
        rows["plain"] = np.where(
            rows["vectors"] == "purified",
            _partners(rows, reference, self.keys, ["model", "seed", "task"]),
            math.nan,
        )
        rows["difference"] = rows["score"] - rows["plain"]
        self.by_task: pd.DataFrame = rows.reset_index(drop=True)
        """One row a cell, model, seed and task: score, and for purified ones plain and difference."""
        self.by_seed: pd.DataFrame = self._averaged_over_tasks()
        """The same averaged over tasks; NaN where a task that others have was not measured."""

    def merged(self) -> pd.DataFrame:
        """The rows of `by_seed` that are drawn and compared: all but controls."""
        return self.by_seed[~controls_among(self.by_seed)]

    def reference(self, form: str) -> pd.DataFrame:
        """The rows of `by_seed` of the base, or of the experts as they are."""
        return self.by_seed[(self.by_seed["form"] == form) & (self.by_seed["vectors"] == "")]

    def values_of(self, column: str) -> list[Any]:
        """The values of a varied key, or the models (static ones first) or vectors, in the order to show them."""
        if column in self.keys:
            return self.values[column]
        rows = self.merged()
        if column == "vectors":
            return in_order(rows["vectors"])
        forms = rows.drop_duplicates("model").set_index("model")["form"]
        return sorted(forms.index, key=lambda name: _rank(FORMS, forms[name]))

    def over_seeds(self, rows: pd.DataFrame, by: Sequence[str], column: str = "score") -> pd.DataFrame:
        """Average a column within each seed over whatever `by` does not name.

        A seed that lacks some of the cells that other seeds have gets NaN, so that no two seeds average other cells.

        Args:
            rows: Rows of `by_seed`.
            by: Columns to keep apart.
            column: The column that is averaged.

        Returns:
            One row a combination of `by` and seed.
        """
        by = list(dict.fromkeys(by))
        found = [
            {**dict(zip([*by, "seed"], name, strict=True)), column: _mean(group[column]), "cells": len(group)}
            for name, group in _groups(rows, [*by, "seed"])
        ]
        averaged = _table(found, [*by, "seed", column, "cells"], self.keys)
        if averaged.empty:
            return averaged.drop(columns="cells")
        most = averaged.groupby(by, dropna=False)["cells"].transform("max") if by else averaged["cells"].max()
        averaged.loc[averaged["cells"] < most, column] = math.nan
        return averaged.drop(columns="cells")

    def _with_score(self, rows: pd.DataFrame) -> pd.DataFrame:
        rows = rows.copy()
        if self.view.score == "raw":
            rows["score"], rows["counts"] = rows["value"], True
            return rows
        experts = rows[(rows["form"] == "expert") & (rows["vectors"] == "")].assign(score=lambda found: found["value"])
        expert = _partners(rows, experts, self.keys, ["seed", "task"])
        useless = ~(expert > 0)
        self.left_out = list(dict.fromkeys(zip(rows["task"][useless], rows["seed"][useless], strict=True)))
        rows["score"] = rows["value"] / np.where(useless, math.nan, expert)
        rows["counts"] = ~useless
        return rows

    def _expected(self, cell: list[Any], seed: int) -> set[str]:
        """The tasks that this seed has in the cells that fit, without those that have no normalised score."""
        fitting = (
            tasks
            for (name, other), tasks in self._cells.items()
            if other == seed and all(a is None or a == b for a, b in zip(cell, name, strict=True))
        )
        return set().union(*fitting) - {task for task, without in self.left_out if without == seed}

    def _averaged_over_tasks(self) -> pd.DataFrame:
        found = []
        for name, group in _groups(self.by_task, [*self.keys, *IDENTITY, "seed"]):
            identity = dict(zip([*self.keys, *IDENTITY, "seed"], name, strict=True))
            complete = self._expected([identity[key] for key in self.keys], identity["seed"]) <= set(group["task"])
            counted = group[group["counts"]]
            averages = {
                column: _mean(counted[column]) if complete else math.nan for column in ("score", "plain", "difference")
            }
            carried = {column: group[column].iloc[0] for column in CARRIED_COLUMNS}
            found.append({**identity, **averages, **carried})
        columns = [*self.keys, *IDENTITY, "seed", "score", "plain", "difference", *CARRIED_COLUMNS]
        return _table(found, columns, self.keys)


def summarise(frame: pd.DataFrame, view: SweepView) -> pd.DataFrame:
    """One row a cell and model, over seeds: mean and spread, and for purified ones the paired difference to plain.

    Args:
        frame: One row a score, as `SweepScores` takes it.
        view: Which score is used.

    Returns:
        The varied keys (empty where the model does not depend on the key), model, vectors, form; seeds, mean, sd;
        plain_mean, difference, difference_sd, difference_se, difference_low, difference_high (95 % t-interval),
        seeds_paired, seeds_better; mean scale, rho, seconds, peak_megabytes; TASK/score and TASK/difference of every
        task.
    """
    return summary_of(SweepScores(frame, view))


def summary_of(scores: SweepScores) -> pd.DataFrame:
    """`summarise` for scores that are prepared already."""
    by = [*scores.keys, *IDENTITY]
    tasks = {_hashable(name): group for name, group in _groups(scores.by_task, by)}
    found = []
    for name, group in _groups(scores.by_seed, by):
        values = group["score"].dropna()
        difference = paired(group["difference"])
        row: dict[str, Any] = dict(zip(by, name, strict=True))
        row |= {"seeds": len(values), "mean": _mean(values), "sd": _sd(values)}
        row |= {"plain_mean": _mean(group["plain"].dropna()), "difference": difference.mean}
        row |= {"difference_sd": difference.sd, "difference_se": difference.error}
        row |= {"difference_low": difference.low, "difference_high": difference.high}
        row |= {"seeds_paired": difference.seeds, "seeds_better": difference.better}
        row |= {column: _mean(group[column].dropna()) for column in CARRIED_COLUMNS}
        own = tasks[_hashable(name)]
        for task in scores.tasks:
            here = own[own["task"] == task]
            row[f"{task}{SCORE}"] = _mean(here["score"].dropna())
            row[f"{task}/difference"] = _mean(here["difference"].dropna())
        found.append(row)
    summary = _table(found, list(found[0]) if found else by, scores.keys)
    models, vectors = list(dict.fromkeys(summary["model"])), in_order(summary["vectors"])

    def place(row: Any) -> tuple[int, ...]:
        cell = (_rank(scores.values[key], row[key]) for key in scores.keys)
        return _rank(FORMS, row["form"]), models.index(row["model"]), _rank(vectors, row["vectors"]), *cell

    order = sorted(summary.index, key=lambda index: place(summary.loc[index]))
    return summary.loc[order].reset_index(drop=True)


def plainly(value: Any) -> str:
    """A value of a varied key as people write it."""
    if isinstance(value, bool | np.bool_):
        return str(value).lower()
    return f"{value:.6g}" if is_number(value) else str(value)


def signed(value: float) -> str:
    """A difference to three digits, with its sign unless it rounds to zero."""
    return f"{value + 0.0:+.3f}" if abs(value) >= 0.0005 else "0.000"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    return (
        isinstance(value, int | float | np.integer | np.floating)
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def same(values: pd.Series, value: Any) -> pd.Series:
    """Where a column holds this value; None is found too."""
    return values.isna() if value is None else values.eq(value) & values.notna()


def _primary_rows(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    rows = frame[frame["is_headline"].astype(bool)].reset_index(drop=True)
    for key in keys:
        rows[key] = pd.Series([_cell(value) for value in rows[key]], index=rows.index, dtype=object)
    rows["vectors"] = rows["vectors"].fillna("")
    rows = rows.assign(**{column: math.nan for column in COST_COLUMNS if column not in rows.columns})
    for column in ("value", *CARRIED_COLUMNS):
        rows[column] = pd.to_numeric(rows[column], errors="coerce").astype(float)
    identity = [*keys, *IDENTITY, "seed", "task"]
    rows = rows.drop_duplicates([*identity, "metric", "value"])
    twice = rows[rows.duplicated(identity)]
    if not twice.empty:
        row = twice.iloc[0]
        cell = ", ".join(f"{key} {plainly(row[key])}" for key in [*keys, "seed"])
        raise PaveError(
            f"model '{row['model']}' ({row['vectors'] or row['form']}) has two scores in the primary metric of task "
            f"'{row['task']}' in one cell ({cell})"
        )
    return rows


def _cell(value: Any) -> Any:
    """A key's value that can be compared and written; None marks "does not depend on it", so null is a word here."""
    if isinstance(value, list | tuple | dict | np.ndarray):
        return str(list(value) if isinstance(value, np.ndarray) else value)
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "null"
    return value.item() if isinstance(value, np.generic) else value


def _ordered(values: pd.Series) -> list[Any]:
    """Numbers by size, then everything else as it came."""
    found = list(dict.fromkeys(values))
    return [*sorted(value for value in found if is_number(value)), *(value for value in found if not is_number(value))]


def _collapsed(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Put None for the keys that a model's scores do not depend on, and drop the repetitions.

    A key is one that does not matter when scores that differ in it alone are equal. Where there is nothing to compare,
    the keys of purification do not matter to what is not purified, and no key matters to the base and the experts.
    What is purified keeps all keys, and everything keeps those that the experts depend on.
    """
    parts = []
    of_experts: set[str] = set()
    for (_, vectors, form), group in sorted(_groups(rows, IDENTITY), key=lambda found: found[0][2] != "expert"):
        part, left = group, list(keys)
        for key in keys:
            of_purification = not PURIFICATION_SECTIONS.isdisjoint(key.split("."))
            if vectors == "purified" or key in of_experts:
                continue
            others = [name for name in left if name != key]
            spread = part.groupby([*others, "seed", "task"], dropna=False)["value"].agg(["min", "max", "count"])
            equal = not ((spread["max"] - spread["min"]) > TINY).any()
            # Of other stacks of transforms it is not known here whether they purify.
            needless = (of_purification and vectors in ("", "plain")) or form in ("base", "expert")
            if equal and (needless or ((spread["count"] > 1).any() and part[key].nunique() > 1)):
                left = others
                part = part.assign(**{key: pd.Series([None] * len(part), index=part.index, dtype=object)})
                # A value that was measured comes before one that was not
                part = part.sort_values("value", kind="stable", na_position="last")
                part = part.drop_duplicates([*keys, "seed", "task"]).sort_index()
        if form == "expert" and vectors == "":
            of_experts |= set(left)
        parts.append(part)
    return pd.concat(parts).sort_index() if parts else rows


def _partners(rows: pd.DataFrame, reference: pd.DataFrame, keys: list[str], on: list[str]) -> np.ndarray[Any, Any]:
    """For each row the reference score of the same cell, as far as the reference depends on it; NaN without one."""
    found = np.full(len(rows), math.nan)
    depends = [
        tuple(key for key, value in zip(keys, cell, strict=True) if value is not None)
        for cell in reference[keys].itertuples(index=False, name=None)
    ]
    for pattern in sorted(set(depends), key=len, reverse=True):
        shared = [*pattern, *on]
        fitting = reference[[kept == pattern for kept in depends]]
        table = dict(zip(fitting[shared].itertuples(index=False, name=None), fitting["score"], strict=True))
        looked_up = [table.get(entry, math.nan) for entry in rows[shared].itertuples(index=False, name=None)]
        found = np.where(np.isnan(found), looked_up, found)
    return found


def _groups(rows: pd.DataFrame, by: Sequence[str]) -> Iterable[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Groups in the order in which they first come; None stays None."""
    names = list(rows[list(by)].astype(object).itertuples(index=False, name=None))
    places: dict[tuple[Any, ...], list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(_hashable(name), []).append(place)
    for name, found in places.items():
        yield name, rows.iloc[found]


def _table(rows: list[dict[str, Any]], columns: list[str], keys: list[str]) -> pd.DataFrame:
    """A frame whose columns of keys stay objects, so that None does not become NaN, nor 1 become 1.0."""
    table = pd.DataFrame(rows, columns=columns)
    for key in (name for name in columns if name in keys):
        table[key] = pd.Series([row[key] for row in rows], index=table.index, dtype=object)
    return table


def _hashable(name: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(None if isinstance(value, float) and math.isnan(value) else value for value in name)


def _rank(known: Sequence[Any], value: Any) -> int:
    return list(known).index(value) if value in known else -1


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _sd(values: Iterable[float]) -> float:
    numbers = np.asarray(list(values), dtype=float)
    return float(numbers.std(ddof=1)) if len(numbers) > 1 else math.nan
