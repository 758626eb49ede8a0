"""Sums of numbers that are rounded once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Self


class Total(float):
    """A sum of numbers, exact until it is read: neither the order of the numbers nor their division into parts matters.

    It is a number as any other, the sum rounded once; what is added to it gives another one.

    Example:
        >>> total = Total()
        >>> for value in (1e16, 1.0, -1e16):
        ...     total += value
        >>> total
        Total(1.0)

    Attributes:
        parts: numbers whose exact sum it is, none of which overlaps with another in its digits.
    """

    parts: tuple[float, ...]

    def __new__(cls, parts: float | Iterable[float] = 0.0) -> Self:
        """The sum of some numbers.

        Args:
            parts: the numbers, or one.
        """
        given = (parts,) if isinstance(parts, float | int) else tuple(parts)
        exact = _apart(given) if all(map(math.isfinite, given)) else given
        total = super().__new__(cls, math.fsum(exact) if exact is not given else sum(given))
        total.parts = exact
        return total

    def __add__(self, other: float) -> Total:
        """The sum of both, exact."""
        return Total((*self.parts, *parts_of(other)))

    __radd__ = __add__

    def __getnewargs__(self) -> tuple[tuple[float, ...]]:  # type: ignore[override]
        """What a copy is made of."""
        return (self.parts,)

    def __repr__(self) -> str:
        """The rounded sum."""
        return f"Total({float(self)!r})"


def parts_of(number: float) -> tuple[float, ...]:
    """Numbers whose exact sum a number is."""
    return number.parts if isinstance(number, Total) else (float(number),)


def _apart(numbers: Iterable[float]) -> tuple[float, ...]:
    """As few numbers with the same exact sum (Shewchuk 1997)."""
    found: list[float] = []
    for number in numbers:
        rests: list[float] = []
        total = number
        for other in found:
            larger, smaller = (total, other) if abs(total) >= abs(other) else (other, total)
            total = larger + smaller
            rests.append(smaller - (total - larger))
        found = [*filter(None, rests), total]
    return tuple(found)
