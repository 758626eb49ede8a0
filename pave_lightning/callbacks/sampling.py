"""Which rows of a layer's input (tokens) are counted of each batch."""

from __future__ import annotations

import hashlib
import math
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

# How many batches are taken to be still ahead when nobody knows: each batch then takes 1/32 of what is left to count.
ASSUMED_BATCHES = 32


class RowSampler:
    """Draws which rows of layers' inputs (tokens) to count: a uniform sample of each batch's real ones.

    It depends on nothing but seed and place.

    All inputs of a batch with the same leading shape are sampled from one random order of their rows, so that layers
    that look at the same tokens count the same ones.

    Args:
        rows: how many rows of a layer's input (tokens) are counted at most, over all processes; None for all.
        batches: how many batches this process will see; infinity when unknown.
        seed: what the sample depends on, beside the batch's number and the process.
        rank: which of the processes this is.
        processes: how many processes share ``rows``.

    Attributes:
        unmasked: leading shape of an input of several places an example that fitted no mask although there were masks.
        has_masked: whether an input fitted one.
    """

    def __init__(
        self, rows: int | None, batches: float = math.inf, *, seed: int = 0, rank: int = 0, processes: int = 1
    ) -> None:
        # Shares of the processes differ by one at most and add up to rows.
        self._budget = None if rows is None else rows * (rank + 1) // processes - rows * rank // processes
        self._batches = batches
        self._origin = (seed, rank)
        self.unmasked: tuple[int, ...] | None = None
        self.has_masked = False
        self._begun = 0
        self._counts = True
        self._real: Tensor | None = None
        self._place: tuple[int, ...] = ()
        self._masks: dict[str, _Mask | None] = {}
        self._chosen: dict[tuple[object, ...], tuple[Tensor | None, int]] = {}

    @property
    def has_padding(self) -> bool:
        """Whether any mask of this batch marks padding."""
        return any(mask is not None and mask.real is not None for mask in self._masks.values())

    def begin_batch(self, mask: Tensor | None, batch: int = 0, loader: int = 0, weights: Tensor | None = None) -> None:
        """Take the padding mask and the place of the next batch.

        Args:
            mask: shape ``(B, L)``, true or non-zero where a token is real; None when all rows count.
            batch: number of the batch in its dataloader.
            loader: number of the dataloader.
            weights: of the batch's examples, shape ``(B,)``: those of weight 0 are taken for padding in every mask.
        """
        self.end_batch()
        self._begun += 1
        self._place = (*self._origin, loader, batch)
        if weights is not None:
            self._real = weights != 0
        if mask is not None:
            self._masks[""] = self._mask(mask)

    def pass_over(self) -> None:
        """Count no row of the next batch, which is none of those that ``batches`` counts."""
        self.end_batch()
        self._counts = False

    def add_mask(self, part: str, mask: Tensor | None) -> None:
        """Take the padding mask of a part of the model that sees other tokens than the rest, for this batch.

        Args:
            part: name of the part.
            mask: shape ``(B, L)``, true or non-zero where a token is real; None when all rows count.
        """
        self._masks[part] = None if mask is None else self._mask(mask)
        self._chosen.clear()

    def end_batch(self) -> None:
        """Forget the batch."""
        self._masks.clear()
        self._chosen.clear()
        self._real, self._counts = None, True

    def allowance(self, counted: int) -> int | None:
        """How many rows a layer may count in this batch, having counted so many before it; None for all.

        What is left to count is spread evenly over the batches ahead, so that short batches are made up for later.
        """
        if self._budget is None:
            return None
        ahead = ASSUMED_BATCHES if math.isinf(self._batches) else max(1, int(self._batches) - self._begun + 1)
        return math.ceil(max(0, self._budget - counted) / ahead)

    def choose(
        self, leading: tuple[int, ...], allowance: int | None = None, call: int = 0, calls: int = 1, part: str = ""
    ) -> tuple[Tensor | None, int]:
        """Which rows of an input to count.

        Args:
            leading: the input's shape without its width.
            allowance: how many rows the layer may count in this batch; None for all.
            call: how many calls the layer has had before in this batch.
            calls: how many calls to expect in this batch; each gets its part of the allowance.
            part: the part of the model that it belongs to; an input whose shape is not that of the part's mask is
                taken to be of the batch's own tokens, or else of another part whose mask it fits.

        Returns:
            Indices into the flattened rows, or None for all rows; and how many real rows there are.
        """
        if not self._counts:
            return torch.empty(0, dtype=torch.int64), 0
        counts_all = part in self._masks and self._masks[part] is None
        known = (self._masks.get(name) for name in (part, "", *self._masks) if not counts_all)
        mask = next((mask for mask in known if mask is not None and leading in mask.leading), None)
        if mask is not None:
            self.has_masked = True
        elif not counts_all and len(leading) > 1 and any(self._masks.values()):
            self.unmasked = leading
        key = (leading, allowance, call, calls, id(mask))
        if key not in self._chosen:
            self._chosen[key] = self._choose(leading, allowance, call, calls, mask)
        return self._chosen[key]

    def _mask(self, mask: Tensor) -> _Mask:
        """A padding mask, shape ``(B, L)``, in which examples of weight 0 are padding."""
        if self._real is not None and len(self._real) == len(mask):
            mask = mask.bool() & self._real[:, None]
        return _Mask.of(mask)

    def _choose(
        self, leading: tuple[int, ...], allowance: int | None, call: int, calls: int, mask: _Mask | None
    ) -> tuple[Tensor | None, int]:
        real = None if mask is None else mask.real
        if mask is not None and real is not None and mask.leading[leading]:
            size = math.prod(leading) // mask.length
            real = real % mask.length * size + real // mask.length
        count = math.prod(leading) if real is None else len(real)
        if allowance is None or (calls == 1 and allowance >= count):
            return real, count
        start = allowance * call // calls
        share = min(count, allowance * (call + 1) // calls - start)
        order = torch.randperm(count, generator=_generator(*self._place, count))
        sample = order[(start + torch.arange(share)) % max(1, count)].sort().values
        return (sample if real is None else real[sample.to(real.device)]), count


@dataclass(frozen=True)
class _Mask:
    """A padding mask.

    Attributes:
        real: indices of the real tokens among all of them; None where all are real.
        length: number of places of an example.
        leading: each leading shape of an input that has the mask, and whether it has it transposed.
    """

    real: Tensor | None
    length: int
    leading: dict[tuple[int, ...], bool]

    @classmethod
    def of(cls, mask: Tensor) -> _Mask:
        """A mask of shape ``(B, L)``."""
        size, length = mask.shape
        real = mask.reshape(-1).nonzero().squeeze(1)
        shapes = {(length, size): True, (size, length): False, (size * length,): False}
        return cls(real if len(real) < mask.numel() else None, length, shapes)


class Calls:
    """How often a layer is called in a batch, which tells what part of the batch's allowance each call gets.

    Attributes:
        counted: how many rows the layer had counted when the batch began.
        expected: how many calls to expect in this batch: as many as in the last one that reached the layer.
    """

    def __init__(self) -> None:
        self.counted = 0
        self.expected = 1
        self._batch = self._calls = 0

    def begin(self, batch: int, rows: int) -> int:
        """Note a call.

        Args:
            batch: number of the batch, from 1.
            rows: how many rows the layer has counted so far.

        Returns:
            How many calls there were before in the batch.
        """
        if batch != self._batch:
            self.expected = max(1, self._calls)
            self.counted = rows
            self._batch, self._calls = batch, 0
        self._calls += 1
        return self._calls - 1

    def copy(self) -> Calls:
        """The same count, going on by itself."""
        return copy(self)


def _generator(*key: int) -> torch.Generator:
    """A generator of its own for each place, so that no sample depends on what else was drawn."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
