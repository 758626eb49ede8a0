"""Exact order statistics of vectors that are too long to sort."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

_BINS = 1 << 16

NamedBlocks = Callable[[], Iterable[tuple[str, Tensor]]]


def kth_largest_magnitudes(names: Sequence[str], blocks: NamedBlocks, k: int) -> dict[str, float]:
    """The k-th largest absolute value of each of several float32 vectors given in blocks, exact to the element.

    Args:
        names: of the vectors.
        blocks: called twice; each call yields the same float32 blocks, of any shape, each with the name of its vector.
        k: rank from the top, starting at 1.

    Returns:
        For each name the value itself; the threshold that at least k elements of that vector reach.

    Raises:
        ValueError: k is not between 1 and the number of elements of a vector.
    """
    found = largest_magnitudes(names, blocks, [k])
    return {name: values[k] for name, values in found.items()}


def largest_magnitudes(
    names: Sequence[str], blocks: NamedBlocks, ranks: Sequence[int]
) -> dict[str, Mapping[int, float]]:
    """Several order statistics of the absolute values; see `largest_values`."""
    return largest_values(names, lambda: ((name, block.abs()) for name, block in blocks()), ranks)


def largest_values(names: Sequence[str], blocks: NamedBlocks, ranks: Sequence[int]) -> dict[str, Mapping[int, float]]:
    """The k-th largest values of each of several float32 vectors given in blocks, for several k, exact to the element.

    The bit patterns of float32 numbers, read as sign and magnitude of an integer, are ordered as the numbers are. So
    one histogram over the upper 16 bits finds the bin that holds the k-th largest value, and a second over the lower 16
    bits of that bin finds the value. Memory is one block and, for every vector, 65,536 counters a rank and once more.

    Args:
        names: of the vectors.
        blocks: called twice; each call yields the same float32 blocks, of any shape, each with the name of its vector.
        ranks: ranks from the top, starting at 1, the same for every vector.

    Returns:
        For each name the value at each rank; both zeros count as equal.

    Raises:
        ValueError: a rank is not between 1 and the number of elements of a vector.
    """
    upper = {name: torch.zeros(_BINS, dtype=torch.int64) for name in names}
    for name, block in blocks():
        upper[name] += torch.bincount(_upper(_ordered(block)), minlength=_BINS)
    for counts in upper.values():
        for k in ranks:
            if not 1 <= k <= int(counts.sum()):
                raise ValueError(f"k must be between 1 and {int(counts.sum())}, the number of elements; found {k}")
    chosen = {name: {k: _bin_of(counts, k) for k in ranks} for name, counts in upper.items()}
    lower = {
        name: {high: torch.zeros(_BINS, dtype=torch.int64) for high, _ in bins.values()}
        for name, bins in chosen.items()
    }
    for name, block in blocks():
        ordered = _ordered(block)
        bins = _upper(ordered)
        for high in lower[name]:
            lower[name][high] += torch.bincount(ordered[bins == high] & (_BINS - 1), minlength=_BINS)
    return {
        name: {k: _value(high, _bin_of(lower[name][high], k - above)[0]) for k, (high, above) in bins.items()}
        for name, bins in chosen.items()
    }


def _ordered(block: Tensor) -> Tensor:
    """Integers (int32, flat) that are ordered as the block's values are."""
    pattern = block.detach().float().contiguous().view(torch.int32).flatten()
    return torch.where(pattern < 0, -(pattern & 0x7FFFFFFF), pattern)


def _upper(ordered: Tensor) -> Tensor:
    """The bin of the upper 16 bits, from 0 on."""
    return (ordered >> 16) + _BINS // 2


def _value(high: int, low: int) -> float:
    """The number whose ordered integer lies in that upper and that lower bin."""
    ordered = ((high - _BINS // 2) << 16) | low
    magnitude = float(torch.tensor(abs(ordered), dtype=torch.int32).view(torch.float32))
    return -magnitude if ordered < 0 else magnitude


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th element counted from the highest bin, and how many lie above that bin."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, above
