"""Exact order statistics of vectors that are too long to sort."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_BINS = 1 << 16


def kth_largest_magnitudes(
    names: Sequence[str], blocks: Callable[[], Iterable[tuple[str, Tensor]]], k: int
) -> dict[str, float]:
    """The k-th largest absolute value of each of several float32 vectors given in blocks, exact to the element.

    The bit patterns of non-negative float32 numbers, read as integers, are ordered as the numbers are. So one histogram
    over the upper 16 bits finds the bin that holds the k-th largest value, and a second over the lower 16 bits of that
    bin finds the value. Memory is one block and 65,536 counters a vector.

    Args:
        names: of the vectors.
        blocks: called twice; each call yields the same float32 blocks, of any shape, each with the name of its vector.
        k: rank from the top, starting at 1.

    Returns:
        For each name the value itself; the threshold that at least k elements of that vector reach.

    Raises:
        ValueError: k is not between 1 and the number of elements of a vector.
    """
    upper = {name: torch.zeros(_BINS, dtype=torch.int64) for name in names}
    for name, block in blocks():
        upper[name] += torch.bincount(_pattern(block) >> 16, minlength=_BINS)
    for counts in upper.values():
        if not 1 <= k <= int(counts.sum()):
            raise ValueError(f"k must be between 1 and {int(counts.sum())}, the number of elements; found {k}")
    chosen = {name: _bin_of(counts, k) for name, counts in upper.items()}
    lower = {name: torch.zeros(_BINS, dtype=torch.int64) for name in names}
    for name, block in blocks():
        pattern = _pattern(block)
        lower[name] += torch.bincount(pattern[(pattern >> 16) == chosen[name][0]] & (_BINS - 1), minlength=_BINS)
    found = {}
    for name, (high, before) in chosen.items():
        low, _ = _bin_of(lower[name], k - before)
        found[name] = float(torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32))
    return found


def _pattern(block: Tensor) -> Tensor:
    return block.detach().float().abs().contiguous().view(torch.int32).flatten()


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th element counted from the highest bin, and how many lie above that bin."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, above
