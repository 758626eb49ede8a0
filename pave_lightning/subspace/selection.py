"""Exact order statistics of vectors that are too long to sort."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_BINS = 1 << 16


def kth_largest_magnitude(blocks: Callable[[], Iterable[Tensor]], k: int) -> float:
    """The k-th largest absolute value of a float32 vector given in blocks, exact to the element.

    The bit patterns of non-negative float32 numbers, read as integers, are ordered as the numbers are. So one histogram
    over the upper 16 bits finds the bin that holds the k-th largest value, and a second over the lower 16 bits of that
    bin finds the value. Memory is one block and 65,536 counters.

    Args:
        blocks: called twice; each call yields the same float32 blocks, of any shape.
        k: rank from the top, starting at 1.

    Returns:
        The value itself; the threshold that at least k elements reach.

    Raises:
        ValueError: k is not between 1 and the number of elements.
    """
    upper = torch.zeros(_BINS, dtype=torch.int64)
    for block in blocks():
        upper += torch.bincount(_pattern(block) >> 16, minlength=_BINS)
    if not 1 <= k <= int(upper.sum()):
        raise ValueError(f"k must be between 1 and {int(upper.sum())}, the number of elements; found {k}")
    chosen, before = _bin_of(upper, k)
    lower = torch.zeros(_BINS, dtype=torch.int64)
    for block in blocks():
        pattern = _pattern(block)
        lower += torch.bincount(pattern[(pattern >> 16) == chosen] & (_BINS - 1), minlength=_BINS)
    rest, _ = _bin_of(lower, k - before)
    return float(torch.tensor((chosen << 16) | rest, dtype=torch.int32).view(torch.float32))


def _pattern(block: Tensor) -> Tensor:
    return block.detach().float().abs().contiguous().view(torch.int32).flatten()


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th element counted from the highest bin, and how many lie above that bin."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, above
