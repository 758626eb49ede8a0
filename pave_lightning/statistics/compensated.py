"""Sums of many float32 matrix products that keep what float32 rounds away, in six bytes an entry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_BLOCK = 64
# Into how many panels a matrix is cut: of a symmetric one (n + 1) / 2n is computed, in n times as many steps.
CPU_BLOCKS = 8
OTHER_BLOCKS = 2
# Products of a panel stand beside the sum for a moment.
PANEL_ELEMENTS = 2_000_000


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

    def add(self, product: Tensor) -> None:
        """Add a float32 tensor, which is used up."""
        product += self.low
        total = self.high + product
        # What rounding the sum took away: exact where the sum is larger than what is added, else nearly so.
        self.high -= total
        self.high += product
        self.low.copy_(self.high)
        self.high.copy_(total)

    def double(self) -> Tensor:
        """The sum, float64, on the CPU where the device has no such numbers."""
        high, low = (self.high.cpu(), self.low.cpu()) if self.high.is_mps else (self.high, self.low)
        return high.double().add_(low)

    def set(self, total: Tensor) -> None:
        """Take a float64 tensor as the sum."""
        self.high.copy_(total)
        self.low.copy_(total - self.high)


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
        self._panels = []
        for start in range(0, width, block):
            rows, columns = slice(start if lower else 0, height), slice(start, min(width, start + block))
            size = (rows.stop - rows.start, columns.stop - columns.start)
            high = torch.zeros(size, dtype=torch.float32, device=device)
            self._panels.append(_Panel(rows, columns, high, torch.zeros_like(high, dtype=torch.bfloat16)))

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add ``left.T @ right``, ``(k, m)`` and ``(k, n)``; the two are one where it is symmetric.

        Products are of the factors' type, float32 or float64, and rounded to float32 when they are added.
        """
        for panel in self._panels:
            panel.add((left[:, panel.rows].T @ right[:, panel.columns]).float())

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
        other = CompensatedSum.__new__(CompensatedSum)
        other.shape, other.lower = self.shape, self.lower
        other._panels = [_Panel(p.rows, p.columns, p.high.clone(), p.low.clone()) for p in self._panels]
        return other

    def mean(self, count: int) -> Tensor:
        """The whole matrix divided by a number: float32, shape ``(m, n)``."""
        found: Tensor | None = None
        for rows, columns, total in self.parts():
            if found is None:
                found = torch.empty(self.shape, dtype=torch.float32, device=total.device)
            part = total.div_(count).float()
            found[rows, columns] = part
            if self.lower:  # what lies above the diagonal block is the transpose of what lies below it
                square = columns.stop - columns.start
                block = part[:square].tril()
                found[columns, columns] = block + block.tril(-1).T
                found[columns, columns.stop :] = part[square:].T
        return torch.empty(self.shape, dtype=torch.float32) if found is None else found

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(panel.high.nbytes + panel.low.nbytes for panel in self._panels)
