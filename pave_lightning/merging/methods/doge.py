"""DOGE TA: one shared correction for all task vectors, found by projected gradient descent without data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.base import Cost
from pave_lightning.merging.evidence import Evidence
from pave_lightning.merging.matrices import MatrixMethod, MatrixOptions
from pave_lightning.merging.methods.tsv import too_narrow
from pave_lightning.merging.registry import merge_method
from pave_lightning.merging.states import order_statistics
from pave_lightning.subspace.descent import adam_descent
from pave_lightning.subspace.factorisation import leading_triplets
from pave_lightning.weights import Parameter, TaskVectors

# Adam's epsilon in the published code, 1e-8, over the gradient it begins with there, about 1.4e-7.
_EPSILON_SHARE = 0.07
_PUBLISHED_EPSILON = 1e-8


class DogeOptions(MatrixOptions):
    """Options of DOGE TA."""

    others: Literal["mean", "sum", "base"] = Field(default="base")
    """What becomes of parameters that are no matrix weights (embeddings, norms, biases): the mean or the sum of their
    task vectors, or, as in the published code, the base's values."""
    eta: float = Field(default=0.07, gt=0)
    """Norm to which each task vector of a layer is brought (eta in the paper), in units of the weights."""
    relative_eta: float | None = Field(default=None, gt=0)
    """The same as a share of the mean norm of all layers' task vectors, in place of ``eta``. About 0.25 is the
    published 0.07 for the experts that it was chosen for."""
    density: float = Field(default=0.3, gt=0, le=1)
    """Share of each task vector's elements, over all matrix weights, that are merged: those of largest magnitude."""
    subspace: int = Field(default=6, ge=1)
    """What the rank of a layer is divided by to give the dimension of the tasks' shared subspace, which the correction
    stays out of."""
    steps: int = Field(default=400, ge=0)
    """Steps of Adam a layer."""
    step: float = Field(default=0.5, gt=0)
    """Step size of Adam as a multiple of the mean absolute element of the layer's task vectors. The default is the
    published 1e-4 where that mean is 2e-4."""
    absolute_step: float | None = Field(default=None, gt=0)
    """Step size of Adam in units of the weights, in place of ``step``. Published: 1e-4."""
    inner_product: Literal["row", "matrix"] = "row"
    """Whether gap and task vector are multiplied row by row, each row with a loss of its own, or as whole matrices."""


@dataclass(frozen=True)
class _Gap:
    """The loss of one layer as a function of the correction, and its gradient.

    Attributes:
        rows: task vectors as one ``T x d_in`` matrix an output channel, ``(d_out, T, d_in)``.
        offset: inner products of the task vectors with the gaps before correction, ``(d_out, T)``.
        weight: sum of the tasks' coefficients.
        whole: whether inner products run over whole matrices.
    """

    rows: Tensor
    offset: Tensor
    weight: float
    whole: bool

    def gradient(self, correction: Tensor) -> Tensor:
        """Gradient of the sum over tasks (and rows) of the squared inner products, ``(d_out, d_in)``."""
        products = self.offset - self.weight * torch.linalg.vecdot(self.rows, correction[:, None, :])
        if self.whole:
            products = products.sum(dim=0, keepdim=True).expand_as(products)
        return -2 * self.weight * torch.bmm(products[:, None, :], self.rows)[:, 0, :]


@merge_method("doge_ta")
class DogeTa(MatrixMethod[DogeOptions]):
    r"""Bring the task vectors to one norm, and add a correction that brings their sum nearer to each of them.

    For each layer, with :math:`\tau_t` of shape ``d_out x d_in`` and :math:`r = \min(d_{out}, d_{in})`:

    1. Coefficients :math:`\lambda_t = \eta / \|\tau_t\|_F`.
    2. Shared subspace: of each :math:`\tau_t` the leading ``r // T`` left singular vectors; of these side by side again
       the leading ``r // subspace`` ones, :math:`U`.
    3. Correction: from :math:`\delta = 0` on, 400 steps of Adam down :math:`\sum_t \sum_{rows} \langle \tau_t,\;
       \tau_t - \sum_i \lambda_i (\tau_i + \delta) \rangle_{row}^2`, whose gradient is multiplied with
       :math:`I - U U^T` before each step.
    4. Mask :math:`m_t`: the 30 % of the elements of :math:`\tau_t` that are largest over all matrix weights.

    The result is :math:`\sum_t \lambda_t (\tau_t + \delta) \odot m_t`: its coefficients are its own, so the scale is 1.
    The gradient is written out and costs two passes over the layer's task vectors, in float32, where the steps are far
    coarser than its rounding; the decompositions are float64. Besides, two passes over all task vectors find the masks.
    No data.

    The published step size 1e-4 is absolute; see `Wudi` for the experts it belongs to, whose elements are about 2e-4.
    There Adam's epsilon is about 0.07 of the first gradients: with task vectors of 768 columns and eight tasks at
    coefficients of 0.3, :math:`2 \cdot 2.4 \cdot \sqrt 8 \cdot (768 \cdot 0.7 \cdot (2.7 \cdot 10^{-4})^2) \cdot 2.7
    \cdot 10^{-4} \approx 1.4 \cdot 10^{-7}`. That keeps rounding, all that is left of a gradient inside the shared
    subspace, from being taken for a direction. So both are relative here. The same experts have norms of
    :math:`2.7 \cdot 10^{-4} \sqrt{d_{out} d_{in}} \approx 0.28` on average over the layers of a ViT-B/32.

    Source: Wei et al., *Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent*, ICML 2025 (arXiv
    2501.01230). Departures: step size and epsilon are relative (``absolute_step`` gives the published form); the shared
    subspace has one dimension at least; every matrix weight is merged, not only those of the encoder's layers; matrices
    with fewer than two outputs a task are refused.
    """

    summary = "task vectors of equal norm, and one correction outside of their shared subspace"
    source = "Wei et al. 2025, arXiv 2501.01230"
    cost = Cost.ITERATIONS
    whole_model_pass = True
    Options = DogeOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Matrices that have too few singular directions for so many tasks."""
        yield from super().problems(vectors, evidence)
        yield from self.refusals(vectors, too_narrow)

    def prepare(self, vectors: TaskVectors) -> Iterator[None]:
        """Find each task's threshold over all matrix weights, and the mean norm of their task vectors."""
        matrices = [parameter for parameter in vectors.parameters if self.covers(parameter)]
        norms: dict[str, dict[str, float]] = {}
        every = self.states.add("norms", norms, "sum")

        def blocks() -> Iterator[tuple[str, Tensor]]:
            for parameter in matrices:
                squares = dict.fromkeys(vectors.tasks, 0.0)
                for _, _, own in vectors.walk([parameter]):
                    for task, block in own.items():
                        squares[task] += float(block.double().square().sum())
                        yield task, block
                # In both walks the same.
                norms[parameter.name] = {task: math.sqrt(square) for task, square in squares.items()}

        def kept(elements: int) -> list[int]:
            return [max(1, int(elements * self.options.density))] if elements else []

        found = yield from order_statistics(self.states, "magnitudes", vectors.tasks, blocks, kept, magnitudes=True)
        self.thresholds = {task: next(iter(values), 0.0) for task, values in found.items()}
        lengths = [norm for of_layer in every.value.values() for norm in of_layer.values() if norm > 0]
        self.mean_norm = math.fsum(lengths) / max(1, len(lengths))

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The masked sum of the corrected task vectors, each with its coefficient."""
        options = self.options
        eta = options.eta if options.relative_eta is None else options.relative_eta * self.mean_norm
        norms = {task: float(vector.double().norm()) for task, vector in vectors.items()}
        coefficients = {task: eta / norm if norm > 0 else 0.0 for task, norm in norms.items()}
        correction = self._correction(list(vectors.values()), list(coefficients.values()))
        parts = [
            (coefficients[task] * (vector + correction).double()).where(vector.abs() >= self.thresholds[task], 0.0)
            for task, vector in vectors.items()
        ]
        return torch.stack(parts).sum(dim=0)

    def _correction(self, vectors: list[Tensor], coefficients: list[float]) -> Tensor:
        """The correction that all task vectors of a layer share, float32."""
        options = self.options
        stacked = torch.stack(vectors).double()
        weights = torch.tensor(coefficients, dtype=stacked.dtype).to(stacked.device)
        gaps = stacked - (weights[:, None, None] * stacked).sum(dim=0)
        loss = _Gap(
            rows=stacked.float().transpose(0, 1).contiguous(),
            offset=(stacked * gaps).sum(dim=2).T.float(),
            weight=math.fsum(coefficients),
            whole=options.inner_product == "matrix",
        )
        start = torch.zeros_like(vectors[0])
        first = loss.gradient(start)
        if not bool(first.any()):
            return start
        if options.absolute_step is not None:
            rate, epsilon = options.absolute_step, _PUBLISHED_EPSILON
        else:
            rate = options.step * float(stacked.abs().mean())
            epsilon = _EPSILON_SHARE * float(first.double().square().mean().sqrt())
        gradient = _outside(shared_subspace(vectors, options.subspace).float(), loss.gradient)
        return adam_descent(start, gradient, steps=options.steps, rate=rate, epsilon=epsilon)


def shared_subspace(vectors: list[Tensor], divisor: int) -> Tensor:
    """An orthonormal basis of the output directions that tasks share.

    Args:
        vectors: T task vectors of one layer, ``d_out x d_in``; T is at most the smaller side.
        divisor: what the smaller side is divided by to give the dimension, which is 1 at least.

    Returns:
        Shape ``(d_out, k)``, float64, with k at most that dimension.
    """
    rank = min(vectors[0].shape)
    bases = [leading_triplets(vector, rank // len(vectors)).left for vector in vectors]
    return leading_triplets(torch.cat(bases, dim=1), max(1, rank // divisor)).left


def _outside(basis: Tensor, gradient: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The gradient without its part inside of a subspace of the output."""

    def projected(correction: Tensor) -> Tensor:
        found = gradient(correction)
        return found - basis @ (basis.T @ found)

    return projected
