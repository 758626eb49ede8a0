"""The merge of Perturb-and-Merge: take in one expert after the other, each by the best step along a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pave_lightning.merging.base import MethodOptions, StaticMethod, register
from pave_lightning.merging.evidence import Need
from pave_lightning.weights import Parameter, TaskVectors

# How many elements of every task vector are turned into float64 at a time.
CHUNK = 1 << 17
# A curvature below this share of what it was added up from is rounding.
ROUNDING = 1e-12


class PerturbAndMergeOptions(MethodOptions):
    """Options of Perturb-and-Merge."""

    per: Literal["model", "tensor"] = "model"
    """What one step size is for: the whole model (the paper's default), or each tensor."""


@register("perturb_and_merge")
class PerturbAndMerge(StaticMethod):
    r"""Move from what is merged so far towards the next expert, as far as all tasks up to there lose least.

    From :math:`\theta_1 = \theta^*_1` on, :math:`\theta_t = \theta_{t-1} + \alpha_t \Delta_t` with
    :math:`\Delta_t = \theta^*_t - \theta_{t-1}`. The loss of task i around its expert is taken for the parabola
    :math:`\frac12 (\theta - \theta^*_i)^T F_i (\theta - \theta^*_i)` with the diagonal Fisher information
    :math:`F_i`, and the sum over :math:`i \le t` is least along the line at

    .. math:: \alpha_t = -\frac{\sum_{i \le t} (\theta_{t-1} - \theta^*_i)^T F_i \Delta_t}
                               {\sum_{i \le t} \Delta_t^T F_i \Delta_t},

    clamped to [0, 1]. The result is a mean of the experts with one weight a task that depends on their order. Where no
    parabola rises along the line, the step is 1 / t, which is that of the plain mean.

    Every :math:`\theta_t` is a mean of experts, so all steps follow from the numbers
    :math:`K_{jik} = \sum F_j \tau_i \tau_k` over the elements, which one pass over the task vectors collects, in
    float64. Needs the Fisher information. Cost: :math:`T^3` multiplications and additions an element, and one
    elementwise pass.

    Source: Qiu et al., *Train with Perturbation, Infer after Merging*, NeurIPS 2025 (arXiv 2505.22389), stage 2.
    Departures: the paper trains each task from the merge of all before, with perturbed weights; here the experts
    are given and have one base, and nothing is trained. It takes the empirical Fisher information of labelled
    examples; here the classes are weighted as the expert weighs them, which needs no labels. The paper asks for a
    convex combination but does not say how the step is kept to one; here it is clamped.
    """

    summary = "one expert after the other, each by the step that costs all tasks least"
    source = "Qiu et al. 2025, arXiv 2505.22389"
    needs = frozenset({Need.FISHER})
    elementwise = True
    ordered = True
    whole_model_pass = True
    Options = PerturbAndMergeOptions

    def prepare(self, vectors: TaskVectors) -> None:
        """Find the weight of every task, in the model or in each tensor."""
        count = len(vectors.tasks)
        total = torch.zeros(count, count, count, dtype=torch.float64)
        self._weights: dict[str, list[float]] = {}
        for parameter in vectors.parameters:
            products = self._products(parameter, vectors)
            self._weights[parameter.name] = expert_weights(products)
            total += products
        if self.options.per == "model":
            self._weights = dict.fromkeys(self._weights, expert_weights(total))

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the task vectors."""
        merged = torch.zeros_like(base)
        for weight, vector in zip(self._weights[parameter.name], vectors.values(), strict=True):
            merged += weight * vector
        return merged

    def _products(self, parameter: Parameter, vectors: TaskVectors) -> Tensor:
        """:math:`K_{jik}` of one parameter, shape ``(T, T, T)``, float64."""
        tasks = vectors.tasks
        total = torch.zeros(len(tasks), len(tasks), len(tasks), dtype=torch.float64)
        for rows in vectors.blocks(parameter):
            own = [vectors.vector(task, parameter, rows).flatten() for task in tasks]
            information = [self.evidence.fisher_information(task, parameter, rows).flatten() for task in tasks]
            for start in range(0, len(own[0]), CHUNK):
                part = torch.stack([vector[start : start + CHUNK] for vector in own]).double()
                for index, diagonal in enumerate(information):
                    total[index] += (part * diagonal[start : start + CHUNK]) @ part.T
        return total


def expert_weights(products: Tensor) -> list[float]:
    r"""The weight of each expert in what :class:`PerturbAndMerge` merges; they add up to one.

    Args:
        products: :math:`K_{jik} = \sum F_j \tau_i \tau_k`, shape ``(T, T, T)``, float64, tasks in their order.
    """
    weights = torch.zeros(len(products), dtype=torch.float64)
    weights[0] = 1.0
    for task in range(1, len(products)):
        step = -weights
        step[task] += 1.0
        seen = products[: task + 1]
        pulled = seen @ step
        rise = float(pulled.diagonal().sum() - pulled.sum(dim=0) @ weights)
        curvature = float(pulled.sum(dim=0) @ step)
        size = float(step.abs() @ seen.abs().sum(dim=0) @ step.abs())
        best = rise / curvature if curvature > ROUNDING * size else 1 / (task + 1)
        weights += min(max(best, 0.0), 1.0) * step
    return weights.tolist()
