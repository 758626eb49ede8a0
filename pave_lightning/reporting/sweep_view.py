"""What the figure and the findings of a sweep look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pave_lightning.errors import nearest

FIXED_COLUMNS = (
    *("seed", "model", "vectors", "form", "task", "metric", "is_headline", "value", "examples", "scale", "rho"),
)
"""Columns of a sweep's frame that are no varied keys."""
COST_COLUMNS = ("seconds", "peak_megabytes")
"""Further ones that a frame may have: what merging took."""
CARRIED_COLUMNS = ("scale", "rho", *COST_COLUMNS)
"""What is the same for all tasks of a model."""


@dataclass(frozen=True)
class SweepView:
    """How the scores of a sweep are summed up and drawn.

    Args:
        title: Heading of the figure and of the findings.
        question: What the sweep asks, in one sentence.
        x: What stands on the horizontal axis: a varied key, model or vectors.
        lines: Columns (varied keys, model, vectors) whose combinations make the lines or bars. Scores are averaged over
            varied keys that are neither here nor on the axis. None: model, vectors and every other varied key.
        score: normalised: a value of the primary metric divided by the value of the same seed's expert, averaged over
            the tasks, as `ScoreTable.normalised_average` does; raw: the average of the values of the primary metric.
        log_x: A logarithmic axis, where the values are numbers. Ratios near 1 are spread out on their own.
    """

    title: str = ""
    question: str = ""
    x: str = "model"
    lines: tuple[str, ...] | None = None
    score: Literal["normalised", "raw"] = "normalised"
    log_x: bool = False

    def problems(self, keys: Sequence[str]) -> list[str]:
        """What is wrong with this view for a sweep that varies these keys; empty when nothing is.

        Args:
            keys: The varied keys.
        """
        known = [*keys, "model", "vectors"]
        found = [
            f"{where}: '{name}' is not varied; {nearest(name, known)}"
            for where, names in (("x", [self.x]), ("lines", self.lines or ()))
            for name in names
            if name not in known
        ]
        if self.x in (self.lines or ()):
            found.append(f"lines: '{self.x}' stands on the horizontal axis already")
        return found

    def lines_among(self, keys: Sequence[str]) -> list[str]:
        """The columns that make the lines, in a sweep that varies these keys."""
        if self.lines is not None:
            return list(dict.fromkeys(self.lines))
        return [name for name in ("model", "vectors", *keys) if name != self.x]
