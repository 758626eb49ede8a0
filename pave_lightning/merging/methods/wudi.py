"""WUDI: let each task vector stand for its task's inputs, and keep the merged one from interfering with any."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.base import Cost
from pave_lightning.merging.matrices import MatrixMethod, MatrixOptions
from pave_lightning.merging.registry import merge_method
from pave_lightning.subspace.descent import adam_descent
from pave_lightning.weights import Parameter

# Adam's epsilon over its step size in the published code: 1e-8 over 1e-5.
_EPSILON_SHARE = 1e-3
_PUBLISHED_EPSILON = 1e-8


class WudiOptions(MatrixOptions):
    """Options of WUDI."""

    others: Literal["mean", "sum", "base"] = Field(default="base")
    """What becomes of parameters that are no matrix weights (embeddings, norms, biases): the mean or the sum of their
    task vectors, or, as in the published code, the base's values."""
    steps: int = Field(default=300, ge=0)
    """Steps of Adam a layer. Few steps are part of the method: the exact minimum does worse."""
    step: float = Field(default=0.05, gt=0)
    """Step size of Adam as a multiple of the mean absolute element of the layer's task vectors. The default is the
    published 1e-5 where that mean is 2e-4."""
    absolute_step: float | None = Field(default=None, gt=0)
    """Step size of Adam in units of the weights, in place of ``step``. Published: 1e-5 for CLIP, 2e-5 for RoBERTa."""


class SwudiOptions(MatrixOptions):
    """Options of SWUDI."""

    others: Literal["mean", "sum", "base"] = Field(default="base")
    """What becomes of parameters that are no matrix weights (embeddings, norms, biases): the mean or the sum of their
    task vectors, or, as with WUDI, the base's values."""
    time: float = Field(default=64.0, ge=0)
    """How long the loss is followed downhill, times the largest eigenvalue of the layer's normal matrix: 0 leaves the
    sum of the task vectors as it is, very long times give the exact minimum."""
    directions: int | None = Field(default=None, ge=1)
    """How many eigenvectors of the normal matrix are followed at most, those of the largest eigenvalues; all of them
    where nothing is said."""
    rest: Literal["sum", "zero"] = "sum"
    """What the merged task vector is along the eigenvectors that are not followed: the sum of the task vectors, or
    nothing."""


@merge_method("wudi")
class Wudi(MatrixMethod[WudiOptions]):
    r"""Minimise the interference with every task, for which its own task vector stands; stop after a few steps.

    A layer is trained by gradients that are sums of outer products with its inputs, so the rows of
    :math:`\tau_t` (``d_out x d_in``) span about the space of task t's inputs. From :math:`D = \sum_t \tau_t` on, Adam
    takes 300 steps down

    .. math:: L(D) = \sum_t \|(D - \tau_t) \tau_t^T\|_F^2 / \|\tau_t\|_F^2 , \qquad \nabla L = 2 (D A - B),

    with :math:`A = \sum_t \tau_t^T \tau_t / \|\tau_t\|^2` and :math:`B = \sum_t \tau_t \tau_t^T \tau_t / \|\tau_t\|^2`,
    which are computed once (float64). So a step is one product of ``d_out x d_in`` with ``d_in x d_in``, or two with
    the stacked task vectors where they are fewer rows than half of ``d_in``. The steps run in float32: they are a few
    per cent of an element each and end far from the minimum, so rounding is beside the point. No data.

    The published step size is absolute, 1e-5. It belongs to experts whose task vectors have elements of about 2e-4:
    2,000 steps of Adam at a rate of 1e-5 that falls along a cosine make a random walk of
    :math:`10^{-5} \sqrt{2000 \cdot 3 / 8} \approx 2.7 \cdot 10^{-4}` (root mean square), 2.2e-4 on average. Hence the
    default ``step`` of 0.05. Adam's epsilon keeps its published share of the step size, so that scaling all task
    vectors scales the result.

    Source: Cheng et al., *Whoever Started the Interference Should End It*, ICML 2025 (arXiv 2503.08099). Departures:
    step size and epsilon are relative (``absolute_step`` gives the published form); every matrix weight is merged, not
    only those of attention and feed-forward layers; a task whose task vector of a layer is zero has no say in it.
    """

    summary = "a few steps of Adam against the interference with each task vector's row space"
    source = "Cheng et al. 2025, arXiv 2503.08099"
    cost = Cost.ITERATIONS
    Options = WudiOptions

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The sum of the task vectors after some steps down the interference."""
        options = self.options
        changed = [vector for vector in vectors.values() if bool(vector.any())]
        if not changed:
            return torch.zeros_like(base)
        start, normalised = _sum_and_normalised(changed)
        target = _target(normalised, changed).float()
        rate, epsilon = _rate(options, changed)

        rows = torch.cat(list(normalised)).float()
        if 2 * len(rows) < rows.shape[1]:

            def gradient(merged: Tensor) -> Tensor:
                return 2 * ((merged @ rows.T) @ rows - target)
        else:
            normal = _normal_matrix(normalised).float()

            def gradient(merged: Tensor) -> Tensor:
                return 2 * (merged @ normal - target)

        return adam_descent(start.float(), gradient, steps=options.steps, rate=rate, epsilon=epsilon)


@merge_method("swudi")
class Swudi(MatrixMethod[SwudiOptions]):
    r"""WUDI's descent in closed form: gradient flow down the same loss, stopped in time.

    From :math:`D_0 = \sum_t \tau_t` on, the flow :math:`\dot D = -\nabla L(D)` down the loss of `Wudi` is at time s at

    .. math:: D = D_0 + (B - D_0 A)\, Q\, \mathrm{diag}\!\left(\frac{1 - e^{-2 s l_k}}{l_k}\right) Q^T ,
        \qquad A = Q\, \mathrm{diag}(l)\, Q^T ,

    so strong directions of the task vectors' common input space are solved and weak ones hardly touched. The option
    ``time`` is :math:`s\, l_{max}`, a number without unit. Directions that no task vector reads from stay as they are.
    Cost: one symmetric eigenvalue problem of order ``d_in`` a layer (float64). No data.

    Source: *SWUDI*, arXiv 2606.07289: the idea, a soft exponential filter with a hard truncation, is that paper's; the
    formula is derived here from the loss. The paper's time, its number of directions and what becomes of the others
    are not known to us. So by default nothing is truncated, and the default time is the one that comes nearest to
    `Wudi`: over twelve weights of four fine-tuned MiniLM encoders the nearest time was 32, 64 or 128 for each. The loss
    is then the same within a third; the results still differ by 0.3 to 0.6 of what `Wudi` moves.
    """

    summary = "WUDI's descent as one spectral filter, without iterations"
    source = "SWUDI 2026, arXiv 2606.07289"
    Options = SwudiOptions

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The sum of the task vectors after the flow down the interference."""
        options = self.options
        changed = [vector for vector in vectors.values() if bool(vector.any())]
        if not changed:
            return torch.zeros_like(base)
        start, normalised = _sum_and_normalised(changed)
        normal = _normal_matrix(normalised)
        values, directions = torch.linalg.eigh(normal)
        if options.directions is not None:
            values, directions = values[-options.directions :], directions[:, -options.directions :]
        share = values / values[-1]
        # What float32 task vectors hold along the other eigenvectors is rounding, which long times would blow up.
        known = share > (max(base.shape) * torch.finfo(torch.float32).eps) ** 2
        filtered = torch.where(known, -torch.expm1(-2 * options.time * share) / share, 0.0)
        force = _target(normalised, changed) - start @ normal
        moved = (force @ directions) * (filtered / values[-1]) @ directions.T
        if options.rest == "zero":
            start = start @ directions @ directions.T
        merged: Tensor = start + moved
        return merged


def _sum_and_normalised(vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of the task vectors, none of them zero, and all stacked and divided by their norms; float64."""
    stacked = torch.stack(vectors).double()
    return stacked.sum(dim=0), stacked / stacked.flatten(1).norm(dim=1)[:, None, None]


def _normal_matrix(normalised: Tensor) -> Tensor:
    """A of the loss, ``d_in x d_in``."""
    rows = normalised.flatten(0, 1)
    return rows.T @ rows


def _target(normalised: Tensor, vectors: list[Tensor]) -> Tensor:
    """B of the loss, ``d_out x d_in``."""
    parts = [(vector.double() @ unit.T) @ unit for vector, unit in zip(vectors, normalised, strict=True)]
    return torch.stack(parts).sum(dim=0)


def _rate(options: WudiOptions, vectors: list[Tensor]) -> tuple[float, float]:
    """Step size and epsilon of Adam."""
    if options.absolute_step is not None:
        return options.absolute_step, _PUBLISHED_EPSILON
    total = math.fsum(float(vector.abs().sum(dtype=torch.float64)) for vector in vectors)
    rate = options.step * total / sum(vector.numel() for vector in vectors)
    return rate, rate * _EPSILON_SHARE
