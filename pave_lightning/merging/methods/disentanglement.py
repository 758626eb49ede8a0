"""AWD: take one redundant vector out of all task vectors, so that what is left is as orthogonal as possible."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.base import Cost, MethodOptions, StaticMethod
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.merging.registry import merge_method
from pave_lightning.merging.states import total_of
from pave_lightning.weights import Parameter, TaskVectors

# Two vectors count as zero below this share of the mean norm; their angle means nothing.
_ZERO = 1e-12
# Shorter than this share of the longest, a task vector turns around within a step, and the search runs away.
_SHORT = 0.01


class AwdOptions(MethodOptions):
    """Options of AWD."""

    iterations: int = Field(default=300, ge=0)
    """Steps of gradient descent."""
    step: float = Field(default=0.01, gt=0)
    """Step size (beta in the paper)."""
    penalty: float = Field(default=0.1, ge=0)
    """Weight of the redundant vector's norm in the loss (alpha in the paper)."""
    start: float = 0.0
    """Where the redundant vector begins, as a multiple of the mean task vector."""
    reference_norm: float | None = Field(default=2.5, gt=0)
    """Mean norm of the task vectors that step and penalty are meant for: the search is done as if theirs were that.
    None takes the norms as they are, as the published algorithm does."""


@merge_method("awd")
class Awd(StaticMethod[AwdOptions]):
    r"""Subtract one redundant vector from all task vectors, chosen so that the rest is nearly orthogonal; add up.

    Over whole models as long vectors, T of them, gradient descent from :math:`\delta = 0` minimises

    .. math:: \frac{1}{T (T - 1)} \sum_{i \ne j} |\cos(\tau_i - \delta, \tau_j - \delta)| + \alpha \|\delta\|

    and the result is :math:`W = W_0 + \lambda \sum_t (\tau_t - \delta)`.

    The gradient of every cosine is a combination of :math:`\tau_i - \delta` and :math:`\tau_j - \delta`, that of the
    norm a multiple of :math:`\delta`. So what begins in the span of the task vectors stays there:
    :math:`\delta = \sum_t c_t \tau_t` throughout, and inner products of task vectors are all that the descent needs.
    One pass over the model finds their T x T matrix (float64), the iterations move T numbers, exactly as they would
    move the whole vector, and what is merged is :math:`\sum_t (1 - T c_t) \tau_t`: Task Arithmetic with weights that
    sum to T times one minus the sum of c. No data.

    Step and penalty are published as absolute numbers, and what they do depends on how long the task vectors are. They
    are taken to belong to norms of about 2.5, which experts of CLIP ViT-B/32 have: 87 million weights times the
    2.7e-4 derived for `Wudi`. The option ``reference_norm`` brings the mean norm to that for the search, so that
    scaling all task vectors scales the result.

    Source: Xiong et al., *Multi-Task Model Merging via Adaptive Weight Disentanglement*, 2024 (arXiv 2411.18729), with
    Task Arithmetic's default scale. How the redundant vector begins and whether cosines are taken over the whole model
    are not known to us; both are chosen here. Departures: ``reference_norm``; a step never shortens the redundant
    vector by more than its length on account of the penalty, whose gradient has no limit at zero; task vectors shorter
    than 1 % of the longest, whose angle to the others a single step may turn around, take no part and are added as they
    are.
    """

    summary = "one redundant vector is taken out of all task vectors, which makes them more orthogonal"
    source = "Xiong et al. 2024, arXiv 2411.18729"
    cost = Cost.ELEMENTWISE
    elementwise = True
    whole_model_pass = True
    default_scale = TaskArithmetic.default_scale
    Options = AwdOptions

    def prepare(self, vectors: TaskVectors) -> Iterator[None]:
        """Find each task's weight in the sum."""
        # Sorted, so that not even rounding depends on the order of the tasks.
        tasks = sorted(vectors.tasks)
        options = self.options
        grams = {parameter.name: gram_matrix(vectors, tasks, parameter) for parameter in vectors.parameters}
        every = self.states.add("gram matrices", grams, "sum")
        yield
        gram = total_of(every.value)
        norms = gram.diagonal().clamp(min=0).sqrt()
        long = [index for index, norm in enumerate(norms) if norm > _SHORT * norms.max()]
        self.weights = dict.fromkeys(tasks, 1.0)
        if len(long) > 1:
            shares = redundant_shares(gram[long][:, long], options)
            self.weights |= {tasks[i]: float(1 - len(long) * share) for i, share in zip(long, shares, strict=True)}

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The sum of the task vectors without their redundant part."""
        total = torch.zeros_like(base)
        for task, weight in self.weights.items():
            total += weight * vectors[task]
        return total


def gram_matrix(vectors: TaskVectors, tasks: list[str], parameter: Parameter) -> Tensor:
    """Inner products of the task vectors of a parameter, ``T x T``, float64; one pass, a block at a time."""
    gram = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for _, _, own in vectors.walk([parameter]):
        block = torch.stack([own[task].flatten() for task in tasks]).double()
        gram += (block @ block.T).cpu()
    return gram


def redundant_shares(gram: Tensor, options: AwdOptions) -> Tensor:
    """How much of each task vector the redundant vector is made of.

    Args:
        gram: inner products of the task vectors, of which none is zero, ``T x T``, float64.
        options: of the descent.

    Returns:
        The T coefficients c of the redundant vector, float64.
    """
    tasks = len(gram)
    shares = torch.full((tasks,), options.start / tasks, dtype=torch.float64)
    mean = float(gram.diagonal().clamp(min=0).sqrt().mean())
    target = mean if options.reference_norm is None else options.reference_norm
    scaled = gram * (target / mean) ** 2
    for _ in range(options.iterations):
        pull = _pull_of_cosines(scaled, shares, _ZERO * target)
        length = math.sqrt(max(0.0, float(shares @ scaled @ shares)))
        shrinking = min(options.step * options.penalty, length) / length if length > 0 else 0.0
        shares = shares - options.step * pull - shrinking * shares
    return shares


def _pull_of_cosines(gram: Tensor, shares: Tensor, zero: float) -> Tensor:
    """Gradient of the mean absolute cosine, as coefficients of the task vectors."""
    tasks = len(gram)
    remainder = torch.eye(tasks, dtype=gram.dtype) - shares
    inner = remainder @ gram @ remainder.T
    norms = inner.diagonal().clamp(min=0).sqrt()
    safe = norms.clamp(min=zero)
    lengths = safe[:, None] * safe
    cosines = inner / lengths
    signs = cosines.sign() * (norms > zero)[:, None] * (norms > zero)
    signs.fill_diagonal_(0.0)
    # The gradient of cos(v_i, v_j) by delta is -(v_i + v_j) / (|v_i| |v_j|) + cos v_i / |v_i|^2 + cos v_j / |v_j|^2.
    weights = -2 / (tasks * (tasks - 1)) * (signs * (1 / lengths - cosines / safe[:, None].square())).sum(dim=1)
    return weights @ remainder
