"""All models of a sweep under each kind of heads, beside each other."""

from __future__ import annotations

import math

import pandas as pd

from pave_lightning.reporting.markdown import escaped, table
from pave_lightning.reporting.sweep_ranking import TITLES
from pave_lightning.reporting.sweep_table import IDENTITY, controls_among

CONTROLS = "Controls"
"""Heading of what no method has merged."""


def ranking_by_heads(summary: pd.DataFrame, heads: list[str]) -> list[str]:
    """Tables in markdown with a column for each kind of heads: controls, then merged models by form, the best first.

    Args:
        summary: rows of `summarise` of a sweep with the key ``heads``.
        heads: the kinds of heads, in the order of the columns.
    """
    measured = summary[summary["mean"].notna()]
    control = controls_among(measured) | measured["form"].eq("expert")
    parts = {CONTROLS: measured[control]}
    merged = measured[~control]
    parts |= {title: merged[merged["form"] == form] for form, title in TITLES.items()}
    found: list[str] = []
    for title, rows in parts.items():
        if not rows.empty:
            lines = [_line(name, own, heads) for name, own in _best_first(rows)]
            found += [f"### {title}", table(["model", "vectors", *map(escaped, heads)], lines)]
    return found


def _best_first(rows: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """The rows of each model, whatever its heads, by the highest of their means."""
    groups = [((str(name[0]), str(name[1])), own) for name, own in rows.groupby(list(IDENTITY[:2]), sort=False)]
    return sorted(groups, key=lambda group: -float(group[1]["mean"].max()))


def _line(name: tuple[str, str], rows: pd.DataFrame, heads: list[str]) -> list[str]:
    by_heads = {"" if pd.isna(row["heads"]) else str(row["heads"]): row for _, row in rows.iterrows()}
    # A model that scores the same under all heads stands there once; experts under their own heads do so, too.
    same = by_heads.get("")
    everywhere = same is not None and same["form"] != "expert"
    cells = [by_heads.get(one, same if everywhere or not place else None) for place, one in enumerate(heads)]
    return [escaped(name[0]), escaped(name[1]), *(_cell(row) for row in cells)]


def _cell(row: pd.Series | None) -> str:
    if row is None:
        return ""
    return f"{row['mean']:.3f}" if math.isnan(row["sd"]) else f"{row['mean']:.3f} ± {row['sd']:.3f}"
