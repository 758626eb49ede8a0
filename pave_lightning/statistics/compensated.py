"""Sums of many float32 matrix products that keep what float32 rounds away, in six bytes an entry."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pave_lightning.system.pages import zeros_on_pages

SMALLEST_BLOCK = 64
# Into how many panels a matrix is cut: of a symmetric one (n + 1) / 2n is computed, in n times as many steps.
CPU_BLOCKS = 8
OTHER_BLOCKS = 2
# Two products of a panel stand beside the sums of all layers.
PANEL_ELEMENTS = 1_000_000
# What is converted at a time when a mean is taken.
PIECE_ELEMENTS = 1 << 18


@dataclass
class _Panel:
    """Some columns of a matrix, from a first row on.

    Attributes:
        rows: which rows.
        columns: which columns.
        high: the sum, float32.
        low: what ``high`` was rounded by so far, bfloat16: the sum is that of both.
    """

    rows: slice
    columns: slice
    high: Tensor
    low: Tensor

    def add(self, product: Tensor, total: Tensor) -> None:
        """Add a float32 tensor, which is used up, as another one of its shape is."""
        product += self.low
        torch.add(self.high, product, out=total)
        # What rounding the sum took away: exact where the sum is larger than what is added, else nearly so.
        self.high -= total
        self.high += product
        self.low.copy_(self.high)
        self.high.copy_(total)

    def double(self, rows: slice = slice(None)) -> Tensor:
        """The sum of some of its rows, float64, on the CPU where the device has no such numbers."""
        high, low = self.high[rows], self.low[rows]
        return (high.cpu().double() if high.is_mps else high.double()).add_(low.cpu() if low.is_mps else low)

    def pieces(self) -> Iterator[slice]:
        """Its rows, a few at a time, for what is done in float64."""
        height, width = self.high.shape
        step = max(1, PIECE_ELEMENTS // max(1, width))
        return (slice(start, start + step) for start in range(0, height, step))

    def set(self, total: Tensor) -> None:
        """Take a float64 tensor as the sum."""
        self.high.copy_(total)
        self.low.copy_(total - self.high)


_SCRATCH = threading.local()


def _scratch(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Two float32 tensors of a shape that hold anything, until they are asked for again in the same thread.

    Tensors that come and go between those of a forward pass would leave holes in memory.
    """
    rooms: dict[torch.device, Tensor] = vars(_SCRATCH).setdefault("rooms", {})
    size = shape[0] * shape[1]
    room = rooms.get(device)
    if room is None or room.shape[1] < size:
        with torch.inference_mode(False):
            room = rooms[device] = zeros_on_pages((2, size), torch.float32, device)
    return room[0, :size].view(shape), room[1, :size].view(shape)


def _size(place: tuple[slice, slice]) -> tuple[int, int]:
    rows, columns = place
    return rows.stop - rows.start, columns.stop - columns.start


class CompensatedSum:
    """A matrix that products are added to: a float32 sum, and in bfloat16 what was rounded away from it.

    Together they hold some 32 binary digits, so that sums of any length are as good as the products, in half the
    memory of a float32 part with a float64 total. Of a symmetric matrix only the lower block triangle is held.

    Source: compensated summation, Kahan, *Pracniques: Further Remarks on Reducing Truncation Errors*, CACM 8 (1965),
    with the correction rounded.

    Args:
        shape: ``(m, n)``.
        lower: whether the matrix is symmetric, so that its lower triangle is enough.
        device: where it lies.
    """

    def __init__(self, shape: tuple[int, int], *, lower: bool, device: torch.device | str | None = None) -> None:
        self.shape, self.lower = shape, lower
        height, width = shape
        blocks = CPU_BLOCKS if device is None or torch.device(device).type == "cpu" else OTHER_BLOCKS
        block = max(SMALLEST_BLOCK, min(width // blocks, PANEL_ELEMENTS // max(1, height)))
        self._places = [
            (slice(start if lower else 0, height), slice(start, min(width, start + block)))
            for start in range(0, width, block)
        ]
        self._device = device
        # What is held in full becomes the mean where it lies; of a triangle only the panels are held.
        self._whole = None if lower else zeros_on_pages(shape, torch.float32, device)
        lows = self._laid_out(torch.bfloat16)
        highs = (
            self._laid_out(torch.float32)
            if self._whole is None
            else [self._whole[rows, columns] for rows, columns in self._places]
        )
        self._panels = [_Panel(*place, high, low) for place, high, low in zip(self._places, highs, lows, strict=True)]

    def _laid_out(self, dtype: torch.dtype) -> list[Tensor]:
        """Room for the panels, one after the other."""
        sizes = list(map(_size, self._places))
        room = zeros_on_pages((sum(map(math.prod, sizes)),), dtype, self._device)
        return [
            part.view(size) for part, size in zip(torch.split(room, list(map(math.prod, sizes))), sizes, strict=True)
        ]

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add ``left.T @ right``, ``(k, m)`` and ``(k, n)``; the two are one where it is symmetric.

        Products are of the factors' type, float32 or float64, and rounded to float32 when they are added.
        """
        for panel in self._panels:
            height, width = panel.high.shape
            product, total = _scratch((height, width), panel.high.device)
            one, other = left[:, panel.rows].T, right[:, panel.columns]
            if one.dtype == product.dtype:
                torch.mm(one, other, out=product)
            else:
                product.copy_(one @ other)
            panel.add(product, total)

    def add(self, other: CompensatedSum) -> None:
        """Add another sum of the same shape."""
        for panel, also in zip(self._panels, other._panels, strict=True):
            panel.set(panel.double() + also.double().to(panel.high.device))

    def parts(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and values (float64) of each part that is held."""
        for panel in self._panels:
            yield panel.rows, panel.columns, panel.double()

    def replace(self, parts: Iterator[Tensor]) -> None:
        """Take float64 values as the parts, in the order of `parts`."""
        for panel, total in zip(self._panels, parts, strict=True):
            panel.set(total)

    def copy(self) -> CompensatedSum:
        """Another sum that has had the same added."""
        other = CompensatedSum(self.shape, lower=self.lower, device=self._device)
        for panel, own in zip(self._panels, other._panels, strict=True):
            own.high.copy_(panel.high)
            own.low.copy_(panel.low)
        return other

    def mean(self, count: int) -> Tensor:
        """The whole matrix divided by a number: float32, shape ``(m, n)``."""
        device = self._panels[0].high.device if self._panels else torch.device("cpu")
        found = zeros_on_pages(self.shape, torch.float32, torch.device("cpu") if device.type == "mps" else device)
        for panel in self._panels:
            columns = panel.columns
            for rows in panel.pieces():
                part = panel.double(rows).div_(count).float()
                first = panel.rows.start + rows.start
                found[first : first + len(part), columns] = part
            if self.lower:  # what lies above the diagonal block is the transpose of what lies below it
                block = found[columns, columns].tril()
                found[columns, columns] = block + block.tril(-1).T
                found[columns, columns.stop :] = found[columns.stop :, columns].T
        return found

    def take_mean(self, count: int) -> Tensor:
        """As `mean`, but the sum is used up, and where it is held in full it needs no memory beside it."""
        if self._whole is None or self._whole.is_mps:
            return self.mean(count)
        for panel in self._panels:
            for rows in panel.pieces():
                panel.high[rows] = panel.double(rows).div_(count).float()
        found, self._whole, self._panels = self._whole, None, []
        return found

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(panel.high.nbytes + panel.low.nbytes for panel in self._panels)
