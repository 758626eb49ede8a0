"""What is better than what, in words, where the intervals of the differences say so."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pave_lightning.errors import listed
from pave_lightning.reporting.intervals import Against, Difference, Interval
from pave_lightning.reporting.scores import EXPERT_HEADS, Model, ScoreTable
from pave_lightning.reporting.sweep_table import signed

HEADING = "Differences of normalised averages, with 95 % intervals over test rows:"
NO_DIFFERENCE = "no difference beyond chance"
# Said where there are many intervals: from this number on one is expected to miss zero by chance.
MANY = 20
BY_CHANCE = "Of many such intervals one in twenty excludes zero by chance."
# How many models a line names of each verdict.
NAMED = 4

TITLES = {
    Against.PLAIN: "other task vectors against plain",
    Against.EXPERT_HEADS: "fitted heads against the experts' heads",
    Against.FITTED_BASE: "against the base with fitted heads",
}


def verdict(interval: Interval) -> str:
    """Better, worse, or no difference beyond chance; empty where there is no interval.

    Example:
        >>> verdict(Interval(0.01, 0.03)), verdict(Interval(-0.01, 0.03))
        ('better', 'no difference beyond chance')
    """
    if not interval.is_known:
        return ""
    if not interval.excludes_zero:
        return NO_DIFFERENCE
    return "better" if interval.low > 0 else "worse"


def difference_lines(table: ScoreTable) -> list[str]:
    """One line for each kind of comparison that a table has intervals of, below a heading; empty where it has none."""
    lines, intervals = [], 0
    for against in Against:
        found = [(model, table.difference(model, against)) for model in table.models()]
        known = [(model, one) for model, one in found if one is not None and one.interval.is_known]
        if known:
            title = _title(against, [model for model, _ in known])
            lines.append(f"{title}: {_by_verdict(known, named=title == TITLES[against])}")
            intervals += len(known)
    if not lines:
        return []
    return [HEADING, *lines, *([BY_CHANCE] if intervals >= MANY else [])]


def difference_sentences(table: ScoreTable, model: Model) -> list[str]:
    """The comparisons of one model, one sentence each, in the order of `Against`."""
    sentences = []
    for against in Against:
        found = table.difference(model, against)
        if found is not None and found.interval.is_known:
            title = _title(against, [model])
            sentences.append(f"{title[0].upper()}{title[1:]}: {_told(found)}, {verdict(found.interval)}.")
    return sentences


def half_width(interval: Interval) -> str:
    """Half an interval's width, as it stands behind a number; empty where there is no interval.

    Example:
        >>> half_width(Interval(0.60, 0.64)), half_width(Interval(1.0, 1.0))
        ('±.020', '±.000')
    """
    half = interval.half_width
    if math.isnan(half):
        return ""
    return f"±{half:.3f}".replace("±0.", "±.") if half < 10 else f"±{half:.3g}"


def _by_verdict(found: Iterable[tuple[Model, Difference]], *, named: bool) -> str:
    """Models by verdict; with the names of their vectors unless a title has them."""
    names: dict[str, list[str]] = {}
    for model, difference in found:
        judged = verdict(difference.interval)
        name = _name(model, named=named)
        names.setdefault(judged, []).append(name if judged == NO_DIFFERENCE else f"{name} {_told(difference)}")
    if set(names) == {NO_DIFFERENCE}:
        return NO_DIFFERENCE
    return "; ".join(
        f"{judged}: {listed(names[judged], NAMED)}" for judged in ("better", "worse", NO_DIFFERENCE) if judged in names
    )


def _title(against: Against, models: Iterable[Model]) -> str:
    vectors = {model.vectors for model in models}
    return f"{vectors.pop()} against plain" if against is Against.PLAIN and len(vectors) == 1 else TITLES[against]


def _told(difference: Difference) -> str:
    ends = f"{signed(difference.interval.low)} to {signed(difference.interval.high)}"
    return f"{signed(difference.value)} ({ends})"


def _name(model: Model, *, named: bool) -> str:
    """A model's name, with what tells it from others of that name."""
    told = [model.vectors] if named and model.vectors else []
    told += [f"{model.heads} heads"] if model.heads != EXPERT_HEADS else []
    return f"{model.name} ({', '.join(told)})" if told else model.name
