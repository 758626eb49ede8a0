"""Second moments of one linear layer, added up batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pave_lightning.subspace import MomentKind

# Rows that may be summed in float32 before they are added to the float64 total.
PARTIAL_ROWS = 4096
SMALLEST_BLOCK = 64
BLOCKS = 8


@dataclass(frozen=True)
class LayerMoment:
    """The second moment of one layer over the data of one task.

    Attributes:
        kind: ``"input"`` for the input covariance ``C = X^T X / n``, ``"cross"`` for ``A = Y^T X / n = W C`` with
            ``Y = X W^T``, the layer's outputs without its bias.
        matrix: float32, shape ``(d_in, d_in)`` or ``(d_out, d_in)``.
        rows: how many rows (tokens, not sequences) ``n`` the mean was taken over.
    """

    kind: MomentKind
    matrix: Tensor
    rows: int


class SecondMoment:
    """Accumulates the uncentred second moment of a layer's inputs, or of its outputs with its inputs.

    Products are taken in float32 and added up in float64, which keeps the small eigenvalues that float32 sums lose.
    Of the symmetric input moment only the lower block triangle is computed. Sum and count are kept apart and
    un-normalised, so that shards and processes merge exactly. Memory is 12 bytes an entry whatever the number of rows.

    Args:
        in_features: width ``d_in`` of the rows.
        out_features: width ``d_out`` of the outputs for the cross moment; None for the input covariance.
        device: where the products are taken.

    Example:
        >>> moment = SecondMoment(2)
        >>> moment.update(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        >>> moment.mean()
        tensor([[1., 1.],
                [1., 2.]])
    """

    def __init__(
        self, in_features: int, out_features: int | None = None, *, device: torch.device | str | None = None
    ) -> None:
        self.kind: MomentKind = "input" if out_features is None else "cross"
        self.rows = 0
        shape = (in_features if out_features is None else out_features, in_features)
        with torch.inference_mode(False):  # so that sums begun in an inference pass can be added to after it
            self._partial = torch.zeros(shape, dtype=torch.float32, device=device)
            # Apple's MPS has no float64.
            self._total = torch.zeros(shape, dtype=torch.float64, device="cpu" if self._partial.is_mps else device)
        self._partial_rows = 0

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_in, d_in)``, or ``(d_out, d_in)`` for the cross moment."""
        height, width = self._total.shape
        return height, width

    def update(self, rows: Tensor, outputs: Tensor | None = None) -> None:
        """Add rows.

        Args:
            rows: inputs of the layer, shape ``(n, d_in)``, any float dtype (used as float32); ``n`` may be 0.
            outputs: for the cross moment the layer's outputs without its bias, shape ``(n, d_out)``; else None.

        Raises:
            ValueError: a shape does not fit, or ``outputs`` is missing or not wanted.
        """
        left = rows if outputs is None else outputs
        if (outputs is None) != (self.kind == "input"):
            wanted = "rows only" if self.kind == "input" else "rows and outputs"
            raise ValueError(f"a moment of kind '{self.kind}' takes {wanted}")
        found = (*left.shape, *rows.shape)
        if found != (len(rows), self.shape[0], len(rows), self.shape[1]):
            raise ValueError(
                f"a moment of shape {self.shape} cannot take rows of shape {tuple(rows.shape)}"
                + (f" with outputs of shape {tuple(outputs.shape)}" if outputs is not None else "")
            )
        with torch.no_grad(), full_precision(rows.device.type):
            rows = rows.float()
            if outputs is None:
                self._add_lower_blocks(rows)
            else:
                self._partial.addmm_(outputs.float().T, rows)
        self.rows += len(rows)
        self._partial_rows += len(rows)
        if self._partial_rows >= PARTIAL_ROWS:
            self._flush()

    def merge(self, other: SecondMoment) -> None:
        """Add what another accumulator of the same layer has seen.

        Raises:
            ValueError: the other one is of another kind or shape.
        """
        if (self.kind, self.shape) != (other.kind, other.shape):
            raise ValueError(
                f"cannot merge a moment of kind '{other.kind}' and shape {other.shape} "
                f"into one of kind '{self.kind}' and shape {self.shape}"
            )
        self._flush()
        other._flush()
        self._total += other._total.to(self._total.device)
        self.rows += other.rows

    def all_reduce(self) -> None:
        """Add up sums and counts over all processes; does nothing when torch.distributed is not initialised.

        Every process must call it, for its layers in the same order.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        self._flush()
        rows = torch.tensor(self.rows, dtype=torch.int64, device=self._total.device)
        dist.all_reduce(self._total)
        dist.all_reduce(rows)
        self.rows = int(rows)

    def mean(self) -> Tensor:
        """The sum divided by the number of rows, float32, in full (symmetric for kind ``"input"``).

        Raises:
            ValueError: no rows have been added.
        """
        if not self.rows:
            raise ValueError("the mean of a second moment needs at least one row, found none")
        self._flush()
        with torch.inference_mode(False):
            mean = self._total / self.rows
            if self.kind == "input":
                mean = mean.tril() + mean.tril(-1).T
            return mean.float()

    def moment(self) -> LayerMoment:
        """The mean on the CPU, with its kind and number of rows.

        Raises:
            ValueError: no rows have been added.
        """
        return LayerMoment(self.kind, self.mean().cpu(), self.rows)

    def _add_lower_blocks(self, rows: Tensor) -> None:
        width = rows.shape[1]
        block = max(SMALLEST_BLOCK, width // BLOCKS)
        for start in range(0, width, block):
            stop = start + block
            self._partial[start:, start:stop].addmm_(rows[:, start:].T, rows[:, start:stop])

    def _flush(self) -> None:
        if self._partial_rows:
            self._total += self._partial.to(self._total.device)
            self._partial.zero_()
            self._partial_rows = 0


def float32_products_are_exact() -> bool:
    """Whether float32 matrix products are taken in float32 at present, as far as the common switch can tell."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # a backend's own switch is in use, which torch refuses to mix with the common one
        return False


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Take float32 products as float32, whatever autocast or the matmul precision of the caller say.

    Half-precision and TF32 products ruin the small eigenvalues that purification decides by.

    Args:
        device_type: ``"cpu"``, ``"cuda"`` and so on.
    """
    with ExitStack() as restore:
        if torch.is_autocast_enabled(device_type):
            restore.enter_context(torch.autocast(device_type, enabled=False))
        try:
            chosen = torch.get_float32_matmul_precision()
        except RuntimeError:  # as above
            for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
                restore.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
        else:
            if chosen != "highest":
                restore.callback(torch.set_float32_matmul_precision, chosen)
                torch.set_float32_matmul_precision("highest")
        yield
