"""Mean squares of what the scale of one norm multiplies, added up batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class NormMoment:
    """What the scale of a LayerNorm or RMSNorm multiplies, channel by channel, over the data of one task.

    Attributes:
        squares: the mean of the squared normalised activations, shape ``(d,)``, float32.
        rows: how many rows of the norm's input (tokens, not sequences) the mean was taken over.
        seen: how many rows there were, of which ``rows`` were counted; None where that is not known.
    """

    squares: Tensor
    rows: int
    seen: int | None = None


class NormSquares:
    """Accumulates the squares of normalised activations; sums are float64.

    Args:
        width: number of channels ``d``.
        device: where the sums are held.

    Example:
        >>> squares = NormSquares(2)
        >>> squares.update(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        >>> squares.moment().squares
        tensor([1., 2.])
    """

    def __init__(self, width: int, device: torch.device | str | None = None) -> None:
        self.rows = 0
        self.seen = 0
        # Apple's MPS has no float64.
        where = "cpu" if device is not None and torch.device(device).type == "mps" else device
        with torch.inference_mode(False):  # what is begun in an inference pass can be added to after it
            self._total = torch.zeros(width, dtype=torch.float64, device=where)

    def update(self, rows: Tensor, *, seen: int | None = None) -> None:
        """Add rows.

        Args:
            rows: normalised activations, shape ``(n, d)``, any float dtype (used as float32); ``n`` may be 0.
            seen: how many rows these were taken from; None when they are all.

        Raises:
            ValueError: the shape does not fit.
        """
        if rows.shape != (len(rows), len(self._total)):
            raise ValueError(f"norm squares of width {len(self._total)} cannot take rows of shape {tuple(rows.shape)}")
        self.rows += len(rows)
        self.seen += len(rows) if seen is None else seen
        with torch.no_grad():
            self._total += rows.float().square().sum(dim=0).to(self._total.device)

    def all_reduce(self) -> None:
        """Add up sums and counts over all processes; does nothing when torch.distributed is not initialised.

        Every process must call it, for its norms in the same order.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        counts = torch.tensor([self.rows, self.seen], dtype=torch.int64, device=self._total.device)
        dist.all_reduce(self._total)
        dist.all_reduce(counts)
        self.rows, self.seen = counts.tolist()

    def moment(self) -> NormMoment:
        """The mean, on the CPU.

        Raises:
            ValueError: no rows have been added.
        """
        if not self.rows:
            raise ValueError("the mean of norm squares needs at least one row of its input (token), found none")
        with torch.inference_mode(False), torch.no_grad():
            return NormMoment((self._total / self.rows).float().cpu(), self.rows, self.seen)
