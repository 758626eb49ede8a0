"""Exact order statistics of vectors that are too long to sort."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_BINS = 1 << 16
# Elements that are looked at together: 1 MB of them.
_CHUNK = 1 << 18

NamedBlocks = Callable[[], Iterable[tuple[str, Tensor]]]
Counts = dict[str, Tensor]


class RankSearch:
    """The k-th largest values of each of several float32 vectors given in blocks, for several k, exact to the element.

    The bit patterns of float32 numbers, read as sign and magnitude of an integer, are ordered as the numbers are. So
    one histogram over the upper 16 bits finds the bin that holds the k-th largest value, and a second over the lower 16
    bits of that bin finds the value. Memory is one block, some megabytes and, for every vector, 65,536 counters a rank
    and once more. Both zeros count as equal.

    Counts of different elements of the same vectors add up, so that the elements may be spread over several searches::

        search = RankSearch(["a"], blocks)
        search.choose(search.upper(), lambda elements: [1, elements])
        largest, smallest = search.values(search.lower())["a"]

    Args:
        names: of the vectors.
        blocks: each call yields the same float32 blocks, of any shape, each with the name of its vector.
        magnitudes: whether absolute values are ranked.
    """

    def __init__(self, names: Sequence[str], blocks: NamedBlocks, *, magnitudes: bool = False) -> None:
        self._names, self._blocks = list(names), blocks
        self._order = _magnitudes if magnitudes else _signed
        self._bins: dict[str, list[_Bin]] = {}

    def upper(self) -> Counts:
        """For each vector how many elements lie in each bin of the upper 16 bits: int64, ``(65536,)``. Reads all."""
        counts = {name: torch.zeros(_BINS, dtype=torch.int64) for name in self._names}
        for name, ordered in self._chunks():
            counts[name] += torch.bincount(ordered.bitwise_right_shift_(16).add_(_BINS // 2), minlength=_BINS).cpu()
        return counts

    def choose(self, upper: Counts, ranks: Callable[[int], Sequence[int]]) -> None:
        """Decide which ranks are looked for.

        Args:
            upper: what :meth:`upper` gave, added up over all searches.
            ranks: gives, for how many elements a vector has, the ranks from the top, starting at 1.

        Raises:
            ValueError: a rank is not between 1 and the number of elements of a vector.
        """
        for name, counts in upper.items():
            elements = int(counts.sum())
            wanted = ranks(elements)
            for k in wanted:
                if not 1 <= k <= elements:
                    raise ValueError(f"k must be between 1 and {elements}, the number of elements; found {k}")
            self._bins[name] = [_Bin(*_bin_of(counts, k), k) for k in wanted]

    def lower(self) -> Counts:
        """For each vector and rank the counts of the lower 16 bits in its bin: int64, ``(ranks, 65536)``. Reads all."""
        counts = {name: torch.zeros(len(bins), _BINS, dtype=torch.int64) for name, bins in self._bins.items()}
        upper_bits, inside = _memory(), _memory()
        for name, ordered in self._chunks() if any(self._bins.values()) else ():
            size = ordered.numel()
            if ordered.device != inside.device:
                upper_bits, inside = _memory(ordered.device), _memory(ordered.device)
            torch.bitwise_right_shift(ordered, 16, out=upper_bits[:size])
            for high in {found.high for found in self._bins[name]}:
                # Integers instead of booleans, which are several times as slow to make and to look through.
                torch.eq(upper_bits[:size], high - _BINS // 2, out=inside[:size])
                found = ordered[inside[:size].nonzero().squeeze(1)]
                of_bin = torch.bincount(found & (_BINS - 1), minlength=_BINS).cpu()
                counts[name][[index for index, one in enumerate(self._bins[name]) if one.high == high]] += of_bin
        return counts

    def values(self, lower: Counts) -> dict[str, list[float]]:
        """For each vector the value at each rank, in the order in which the ranks were given.

        Args:
            lower: what :meth:`lower` gave, added up over all searches.
        """
        return {
            name: [
                _value(found.high, _bin_of(counts, found.rank - found.above)[0])
                for found, counts in zip(bins, lower[name], strict=True)
            ]
            for name, bins in self._bins.items()
        }

    def _chunks(self) -> Iterator[tuple[str, Tensor]]:
        return _ordered(self._blocks(), self._order)


class _Bin(NamedTuple):
    """Where the element of a rank lies: in which bin of upper bits, how many lie above that bin, and the rank."""

    high: int
    above: int
    rank: int


def _ordered(
    blocks: Iterable[tuple[str, Tensor]], order: Callable[[Tensor, Tensor], None]
) -> Iterator[tuple[str, Tensor]]:
    """Each block as integers (int32, flat) that are ordered as its values are, or as its magnitudes.

    Chunk by chunk in the same memory, which stays in the processor's cache; a chunk is gone when the next one comes.
    """
    memory = _memory()
    for name, block in blocks:
        if block.device != memory.device:
            memory = _memory(block.device)
        pattern = block.detach().float().contiguous().view(torch.int32).flatten()
        for start in range(0, pattern.numel(), _CHUNK):
            chunk = pattern[start : start + _CHUNK]
            ordered = memory[: chunk.numel()]
            order(chunk, ordered)
            yield name, ordered


def _memory(device: torch.device | None = None) -> Tensor:
    """Room for a chunk."""
    return torch.empty(_CHUNK, dtype=torch.int32, device=device)


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
