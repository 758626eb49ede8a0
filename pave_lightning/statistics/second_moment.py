"""Second moments of one linear layer, added up batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.statistics.compensated import CompensatedSum
from pave_lightning.subspace import MomentKind
from pave_lightning.system.pages import zeros_on_pages

# How many rows wait for each other, since one product of many is cheaper than many products of a few: a share of the
# moment's height, so that what waits is small beside the sums, but enough of them to be worth a product.
WAITING_SHARE = 8
FEWEST_WAITING, MOST_WAITING = 64, 256
# One float32 product is over no more rows than this: longer ones lose digits, and copies of half-precision rows grow.
MOST_ROWS = 4096
# Products of fewer columns are taken in float64: libraries add up their rows one after the other, which in float32
# costs the small eigenvalues of rows that are much alike (hundreds of roundings of the largest; 3 of wider products).
THIN = 16

Moments = Literal["smallest", "input", "output"]


def captured_kind(moments: Moments, out_features: int, in_features: int) -> MomentKind:
    """Which moment a capture takes of a layer: where it narrows (``d_in > d_out``) a smaller one, if that is asked for.

    Args:
        moments: ``"smallest"`` takes the cross moment there, ``"output"`` the output moment, ``"input"`` none of them.
        out_features: ``d_out``.
        in_features: ``d_in``.

    Example:
        >>> captured_kind("smallest", 32, 64), captured_kind("smallest", 64, 32)
        ('cross', 'input')
    """
    narrow: dict[Moments, MomentKind] = {"smallest": "cross", "output": "output", "input": "input"}
    return narrow[moments] if in_features > out_features else "input"


@dataclass(frozen=True)
class LayerMoment:
    """The second moment of one layer over the data of one task.

    With ``X`` the layer's inputs, shape ``(n, d_in)``, ``W`` its weight, ``(d_out, d_in)``, and ``Y = X W^T`` its
    outputs without the bias:

    ========== =================== ==================================================================
    kind       shape               matrix
    ========== =================== ==================================================================
    ``input``  ``(d_in, d_in)``    ``C = X^T X / n``, the input covariance (uncentred)
    ``rows``   ``(n, d_in)``       ``M = X / sqrt(n)``, so that ``C = M^T M``; smaller where ``n < d_in``
    ``cross``  ``(d_out, d_in)``   ``A = Y^T X / n = W C``
    ``output`` ``(d_out, d_out)``  ``O = Y^T Y / n = W C W^T``
    ========== =================== ==================================================================

    Attributes:
        kind: which of the above.
        matrix: float32.
        rows: how many rows of the layer's input (tokens, not sequences) ``n`` the mean was taken over.
        seen: how many rows there were, of which ``rows`` were counted; None where that is not known.

    Example:
        >>> LayerMoment("rows", torch.tensor([[1.0, 2.0]]), rows=1).covariance()
        tensor([[1., 2.],
                [2., 4.]])
    """

    kind: MomentKind
    matrix: Tensor
    rows: int
    seen: int | None = None

    def covariance(self) -> Tensor:
        """The input covariance ``C``, shape ``(d_in, d_in)``, float32.

        Raises:
            PaveError: the moment is of kind ``"cross"`` or ``"output"``, which do not determine ``C``.
        """
        if self.kind == "input":
            return self.matrix
        if self.kind == "rows":
            full = self.matrix.double()
            covariance = full.T @ full
            return ((covariance + covariance.T) / 2).float()
        raise PaveError(
            f"the input covariance is needed, found a moment of kind '{self.kind}' and shape "
            f"{tuple(self.matrix.shape)}: capture again with moments='input'"
        )


class SecondMoment:
    """Accumulates the uncentred second moment of a layer's inputs, of its outputs, or of its outputs with its inputs.

    Products are taken in float32 and added up with compensation (see `CompensatedSum`), which keeps the small
    eigenvalues that float32 sums lose. Of a symmetric moment only the lower block triangle is computed. Sum and count
    are kept apart and un-normalised, so that shards and processes merge exactly. Memory does not grow with the number
    of rows: it is 6 bytes an entry, of a symmetric moment 3.4, and, where batches have few rows, an eighth as many rows
    as it is high beside them. The first ``d_in`` inputs are kept as they are, before there are any sums.

    Args:
        in_features: width ``d_in`` of the inputs.
        out_features: width ``d_out`` of the outputs for kinds ``"cross"`` and ``"output"``; else None.
        kind: ``"input"``, ``"cross"`` or ``"output"``; None is ``"input"`` without ``out_features``, else ``"cross"``.
        keep_rows: whether the moment of fewer than ``d_in`` inputs is given as the rows themselves.
        device: where the products are taken.

    Raises:
        ValueError: ``kind`` is none of these, or does not go with ``out_features``.

    Example:
        >>> moment = SecondMoment(2)
        >>> moment.update(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        >>> moment.mean()
        tensor([[1., 1.],
                [1., 2.]])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        kind: MomentKind | None = None,
        keep_rows: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        self.kind: MomentKind = kind or ("input" if out_features is None else "cross")
        if self.kind not in ("input", "cross", "output") or (self.kind == "input") != (out_features is None):
            raise ValueError(
                f"kind '{self.kind}' with out_features={out_features}: expected 'input' without out_features, "
                "'cross' or 'output' with them"
            )
        self.rows = 0
        self.seen = 0
        self.keep_rows = keep_rows and self.kind == "input"
        height = in_features if out_features is None else out_features
        self.shape: tuple[int, int] = (height, height if self.kind == "output" else in_features)
        self._device = device
        self._total: CompensatedSum | None = None
        self._waiting_limit = max(FEWEST_WAITING, min(MOST_WAITING, self.shape[0] // WAITING_SHARE))
        # Copies of rows, for the cross moment of outputs beside them, that no sum holds yet.
        self._waiting: tuple[Tensor, ...] | None = None
        self._waiting_rows = 0

    def update(self, rows: Tensor | None, outputs: Tensor | None = None, *, seen: int | None = None) -> None:
        """Add rows.

        Args:
            rows: inputs of the layer, shape ``(n, d_in)``, any float dtype (used as float32); ``n`` may be 0. None for
                kind ``"output"``.
            outputs: for kinds ``"cross"`` and ``"output"`` the layer's outputs without its bias, shape ``(n, d_out)``;
                else None.
            seen: how many rows these were taken from; None when they are all.

        Raises:
            ValueError: a shape does not fit, or an argument is missing or not wanted.
        """
        wanted = {"input": "rows only", "output": "outputs only"}.get(self.kind, "rows and outputs")
        left, right = (rows if outputs is None else outputs), (outputs if rows is None else rows)
        given = "rows only" if outputs is None else "outputs only" if rows is None else "rows and outputs"
        if left is None or right is None or given != wanted:
            raise ValueError(f"a moment of kind '{self.kind}' takes {wanted}")
        found = (*left.shape, *right.shape)
        if found != (len(right), self.shape[0], len(right), self.shape[1]):
            raise ValueError(
                f"a moment of shape {self.shape} cannot take rows of shape {tuple(right.shape)}"
                + (f" with outputs of shape {tuple(left.shape)}" if left is not right else "")
            )
        count = len(right)
        self.rows += count
        self.seen += count if seen is None else seen
        self._device = right.device
        with torch.no_grad():
            self._take((right,) if left is right else (left, right))

    def copy(self) -> SecondMoment:
        """An accumulator that has seen the same and goes on by itself."""
        other = copy(self)
        with torch.inference_mode(False):  # what is begun in an inference pass can be added to after it
            other._total = None if self._total is None else self._total.copy()
            if self._waiting is not None:
                other._waiting = tuple(factor.clone() for factor in self._waiting)
        return other

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
        if other._waiting is not None:
            self._take(tuple(factor[: other._waiting_rows].to(self._device) for factor in other._waiting))
        if other._total is not None:
            self._multiply_waiting()  # rows that were kept as they are become sums like the other's
            self._sums().add(other._total)
        self.rows += other.rows
        self.seen += other.seen

    def all_reduce(self) -> None:
        """Add up sums and counts over all processes; does nothing when torch.distributed is not initialised.

        Every process must call it, for its layers in the same order. Rows that are kept as they are become sums.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        self._multiply_waiting()
        total = self._sums()

        def reduced() -> Iterator[Tensor]:
            for _, _, part in total.parts():
                dist.all_reduce(part)
                yield part

        total.replace(reduced())
        counts = torch.tensor([self.rows, self.seen], dtype=torch.int64, device=self._device)
        dist.all_reduce(counts)
        self.rows, self.seen = counts.tolist()

    def mean(self) -> Tensor:
        """The sum divided by the number of rows, in full (kinds ``"input"`` and ``"output"`` are symmetric).

        Returns:
            The moment in the shape of its kind, see `LayerMoment`, float32.

        Raises:
            ValueError: no rows have been added.
        """
        if not self.rows:
            raise ValueError(
                "the mean of a second moment needs at least one row of the layer's input (token), found none"
            )
        with torch.inference_mode(False), torch.no_grad():
            if self._is_kept and self._waiting is not None:
                kept = self._waiting[0][: self.rows]
                kept = (kept.cpu() if kept.is_mps else kept).double()
                mean = kept.T @ kept / self.rows
                return (mean.tril() + mean.tril(-1).T).float()
            self._multiply_waiting()
            return self._sums().mean(self.rows)

    def moment(self) -> LayerMoment:
        """The moment on the CPU; of kind ``"rows"`` for fewer than ``d_in`` inputs, unless ``keep_rows`` is off.

        Raises:
            ValueError: no rows have been added.
        """
        if self._is_kept and self._waiting is not None:
            with torch.inference_mode(False), torch.no_grad():
                rows = self._waiting[0][: self.rows] / math.sqrt(self.rows)
            return LayerMoment("rows", rows.cpu(), self.rows, self.seen)
        return LayerMoment(self.kind, self.mean().cpu(), self.rows, self.seen)

    def finish(self) -> LayerMoment:
        """As `moment`, but nothing may be added or asked for after it: the sums become the moment.

        Raises:
            ValueError: no rows have been added.
        """
        if self._is_kept or not self.rows:
            return self.moment()
        with torch.inference_mode(False), torch.no_grad():
            self._multiply_waiting()
            found, self._total = self._sums().take_mean(self.rows), None
            return LayerMoment(self.kind, found.cpu(), self.rows, self.seen)

    @property
    def held_bytes(self) -> int:
        """What is held in memory: sums, and rows that no sum has yet."""
        waiting = sum(factor.nbytes for factor in self._waiting or ())
        return waiting + (0 if self._total is None else self._total.bytes)

    @property
    def _is_kept(self) -> bool:
        """Whether all rows so far are kept as they are."""
        return self.keep_rows and self._total is None

    def _take(self, factors: tuple[Tensor, ...]) -> None:
        """Add rows to the sums, or let them wait until there are enough of them.

        Args:
            factors: outputs and rows for the cross moment, else only the one tensor that is multiplied with itself.
        """
        start, count = 0, len(factors[0])
        while start < count:
            limit = self.shape[1] if self._is_kept else self._waiting_limit
            if not self._waiting_rows and count - start >= limit:
                self._multiply(tuple(factor[start:] for factor in factors))
                return
            if self._waiting is None:
                with torch.inference_mode(False):  # what is begun in an inference pass can be added to after it
                    self._waiting = tuple(
                        zeros_on_pages((limit, factor.shape[1]), torch.float32, factor.device) for factor in factors
                    )
            stop = min(count, start + limit - self._waiting_rows)
            end = self._waiting_rows + stop - start
            for waiting, factor in zip(self._waiting, factors, strict=True):
                waiting[self._waiting_rows : end].copy_(factor[start:stop])
            self._waiting_rows, start = end, stop
            if end == limit:
                self._multiply_waiting()

    def _multiply_waiting(self) -> None:
        if self._waiting is None or not self._waiting_rows:
            return
        factors = tuple(waiting[: self._waiting_rows] for waiting in self._waiting)
        if self._is_kept:
            self._waiting = None
        self._waiting_rows = 0
        self._multiply(factors)

    def _multiply(self, factors: tuple[Tensor, ...]) -> None:
        total = self._sums()
        for start in range(0, len(factors[0]), MOST_ROWS):
            now = tuple(factor[start : start + MOST_ROWS].float() for factor in factors)
            if min(self.shape) < THIN and not now[0].is_mps:
                now = tuple(factor.double() for factor in now)
            with full_precision(now[0].device.type):
                total.add_product(now[0], now[-1])

    def _sums(self) -> CompensatedSum:
        """The sums, made when they are first needed."""
        if self._total is None:
            with torch.inference_mode(False):
                self._total = CompensatedSum(self.shape, lower=self.kind != "cross", device=self._device)
        return self._total


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
