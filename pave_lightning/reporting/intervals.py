"""Intervals of scores, of their averages, and of differences between models."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

# What is asked of an interval's end before it counts as apart from zero: what rounding leaves.
TINY = 1e-9


@dataclass(frozen=True)
class Interval:
    """A 95 % interval.

    Args:
        low: Lower end; NaN where there is no interval.
        high: Upper end; NaN where there is no interval.
    """

    low: float = math.nan
    high: float = math.nan

    @property
    def half_width(self) -> float:
        """Half of the distance between the ends; NaN where there is no interval."""
        return (self.high - self.low) / 2

    @property
    def is_known(self) -> bool:
        """Whether there is an interval."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def excludes_zero(self) -> bool:
        """Whether all of it is above zero, or all below; not where there is no interval."""
        return self.low > TINY or self.high < -TINY


NO_INTERVAL = Interval()


class Against(StrEnum):
    """What a model is compared with, by the name of its columns."""

    PLAIN = "minus_plain"
    EXPERT_HEADS = "minus_expert_heads"
    FITTED_BASE = "minus_fitted_base"


@dataclass(frozen=True)
class PairIntervals:
    """Intervals of the paired differences between two models: what the first has more than the second.

    Args:
        values: By task and metric.
        average: Of the average over tasks.
        normalised_average: Of the normalised average.
    """

    values: Mapping[tuple[str, str], Interval] = field(default_factory=dict)
    average: Interval = NO_INTERVAL
    normalised_average: Interval = NO_INTERVAL


@dataclass(frozen=True)
class Intervals:
    """The intervals of a table of scores. What has none is missing or NaN.

    Args:
        values: By model, task and metric.
        normalised: Of normalised values, by model, task and metric.
        averages: By model.
        normalised_averages: By model.
        pairs: By the two models.
    """

    values: Mapping[tuple[Hashable, str, str], Interval] = field(default_factory=dict)
    normalised: Mapping[tuple[Hashable, str, str], Interval] = field(default_factory=dict)
    averages: Mapping[Hashable, Interval] = field(default_factory=dict)
    normalised_averages: Mapping[Hashable, Interval] = field(default_factory=dict)
    pairs: Mapping[tuple[Hashable, Hashable], PairIntervals] = field(default_factory=dict)

    def pair(self, model: Hashable, other: Hashable) -> PairIntervals:
        """Those of the differences between two models; empty where they were not compared."""
        return self.pairs.get((model, other), PairIntervals())


@dataclass(frozen=True)
class Difference:
    """How much more one model has than another.

    Args:
        value: The difference; NaN where one of them has no score.
        interval: Its interval.
        other: What the other model is called.
    """

    value: float
    interval: Interval
    other: Hashable
