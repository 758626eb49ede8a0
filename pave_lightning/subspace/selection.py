"""Exact order statistics of vectors that are too long to sort."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

_BINS = 1 << 16
# Elements that are looked at together: 1 MB of them.
_CHUNK = 1 << 18

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
    return _largest(names, lambda: _ordered(blocks(), _magnitudes), ranks)


def largest_values(names: Sequence[str], blocks: NamedBlocks, ranks: Sequence[int]) -> dict[str, Mapping[int, float]]:
    """The k-th largest values of each of several float32 vectors given in blocks, for several k, exact to the element.

    The bit patterns of float32 numbers, read as sign and magnitude of an integer, are ordered as the numbers are. So
    one histogram over the upper 16 bits finds the bin that holds the k-th largest value, and a second over the lower 16
    bits of that bin finds the value. Memory is one block, some megabytes and, for every vector, 65,536 counters a rank
    and once more.

    Args:
        names: of the vectors.
        blocks: called twice; each call yields the same float32 blocks, of any shape, each with the name of its vector.
        ranks: ranks from the top, starting at 1, the same for every vector.

    Returns:
        For each name the value at each rank; both zeros count as equal.

    Raises:
        ValueError: a rank is not between 1 and the number of elements of a vector.
    """
    return _largest(names, lambda: _ordered(blocks(), _signed), ranks)


def _largest(names: Sequence[str], chunks: NamedBlocks, ranks: Sequence[int]) -> dict[str, Mapping[int, float]]:
    """As `largest_values`, from chunks of ordered integers, which may be overwritten."""
    upper = {name: torch.zeros(_BINS, dtype=torch.int64) for name in names}
    for name, ordered in chunks():
        upper[name] += torch.bincount(ordered.bitwise_right_shift_(16).add_(_BINS // 2), minlength=_BINS)
    for counts in upper.values():
        for k in ranks:
            if not 1 <= k <= int(counts.sum()):
                raise ValueError(f"k must be between 1 and {int(counts.sum())}, the number of elements; found {k}")
    chosen = {name: {k: _bin_of(counts, k) for k in ranks} for name, counts in upper.items()}
    lower = {
        name: {high: torch.zeros(_BINS, dtype=torch.int64) for high, _ in bins.values()}
        for name, bins in chosen.items()
    }
    upper_bits, inside = (torch.empty(_CHUNK, dtype=torch.int32) for _ in range(2))
    for name, ordered in chunks():
        size = ordered.numel()
        torch.bitwise_right_shift(ordered, 16, out=upper_bits[:size])
        for high in lower[name]:
            # Integers instead of booleans, which are several times as slow to make and to look through.
            torch.eq(upper_bits[:size], high - _BINS // 2, out=inside[:size])
            found = ordered[inside[:size].nonzero().squeeze(1)]
            lower[name][high] += torch.bincount(found & (_BINS - 1), minlength=_BINS)
    return {
        name: {k: _value(high, _bin_of(lower[name][high], k - above)[0]) for k, (high, above) in bins.items()}
        for name, bins in chosen.items()
    }


def _ordered(
    blocks: Iterable[tuple[str, Tensor]], order: Callable[[Tensor, Tensor], None]
) -> Iterator[tuple[str, Tensor]]:
    """Each block as integers (int32, flat) that are ordered as its values are, or as its magnitudes.

    Chunk by chunk in the same memory, which stays in the processor's cache; a chunk is gone when the next one comes.
    """
    memory = torch.empty(_CHUNK, dtype=torch.int32)
    for name, block in blocks:
        pattern = block.detach().float().contiguous().view(torch.int32).flatten()
        for start in range(0, pattern.numel(), _CHUNK):
            chunk = pattern[start : start + _CHUNK]
            ordered = memory[: chunk.numel()]
            order(chunk, ordered)
            yield name, ordered


def _magnitudes(pattern: Tensor, ordered: Tensor) -> None:
    torch.bitwise_and(pattern, 0x7FFFFFFF, out=ordered)


def _signed(pattern: Tensor, ordered: Tensor) -> None:
    _magnitudes(pattern, ordered)
    # All bits of a negative number's sign are set, those of others' are not: x ^ -1 + 1 is -x, x ^ 0 + 0 is x.
    sign = pattern >> 31
    ordered.bitwise_xor_(sign).sub_(sign)


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
