"""The merge of Perturb-and-Merge: take in one expert after the other, each by the best step along a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pave_lightning.merging.base import MethodOptions
from pave_lightning.merging.evidence import Need
from pave_lightning.merging.registry import merge_method
from pave_lightning.merging.running import within
from pave_lightning.merging.sequential import SequentialMethod
from pave_lightning.merging.states import total_of
from pave_lightning.weights import Parameter, TaskVectors

# How many elements of every task vector are turned into float64 at a time: few enough to stay in the processor's cache.
CHUNK = 1 << 14
# A curvature below this share of what it was added up from is rounding.
ROUNDING = 1e-12


class PerturbAndMergeOptions(MethodOptions):
    """Options of Perturb-and-Merge."""

    per: Literal["model", "tensor"] = "model"
    """What one step size is for: the whole model (the paper's default), or each tensor."""


@merge_method("perturb_and_merge")
class PerturbAndMerge(SequentialMethod[PerturbAndMergeOptions]):
    r"""Move from what is merged so far towards the next expert, as far as all tasks up to there lose least.

    From :math:`\theta_1 = \theta^*_1` on, :math:`\theta_t = \theta_{t-1} + \alpha_t \Delta_t` with
    :math:`\Delta_t = \theta^*_t - \theta_{t-1}`. The loss of task i around its expert is taken for the parabola
    :math:`\frac12 (\theta - \theta^*_i)^T F_i (\theta - \theta^*_i)` with the diagonal Fisher information
    :math:`F_i`, and the sum over :math:`i \le t` is least along the line at

    .. math:: \alpha_t = -\frac{\sum_{i \le t} (\theta_{t-1} - \theta^*_i)^T F_i \Delta_t}
                               {\sum_{i \le t} \Delta_t^T F_i \Delta_t},

    clamped to [0, 1]. The result is a mean of the experts with one weight a task that depends on their order. Where no
    parabola rises along the line, the step is 1 / t, which is that of the plain mean.

    Of all experts so far only two sums enter, elementwise ones, :math:`S_t = \sum_{i \le t} F_i` and
    :math:`v_t = \sum_{i \le t} F_i \tau_i`: with task vectors in place of weights,
    :math:`\alpha_t = \langle \Delta_t, v_t - S_t \theta_{t-1} \rangle / \langle \Delta_t, S_t \Delta_t \rangle`. They
    are kept beside the merged model, so an expert may be added later from its own Fisher information alone (see
    `SequentialMethod`).

    Every step must be known for all elements before the next one. But every :math:`\theta_t` is a mean of experts, so
    all steps follow from :math:`\langle \tau_i, S_t \tau_k \rangle` and :math:`\langle \tau_k, v_t \rangle`, which one
    pass over the task vectors collects, in float64. Needs the Fisher information. Cost: :math:`T^3 / 3`
    multiplications and additions an element, and two elementwise passes.

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
    keeps: ClassVar[tuple[str, ...]] = ("information", "pull")
    Options = PerturbAndMergeOptions

    def prepare(self, vectors: TaskVectors) -> Iterator[None]:
        """Find the weight of every task, in the model or in each tensor."""
        super().prepare(vectors)
        first = self._counted(1)
        own = {parameter.name: self._products(parameter, vectors) for parameter in vectors.parameters}
        self._weights: dict[str, list[float]] = {name: expert_weights(found, first) for name, found in own.items()}
        if self.options.per == "tensor":
            return
        curvatures = self.states.add("curvatures", {name: found.curvatures for name, found in own.items()}, "sum")
        pulls = self.states.add("pulls", {name: found.pulls for name, found in own.items()}, "sum")
        yield
        total = Products(len(vectors.tasks))
        total.curvatures, total.pulls = total_of(curvatures.value), total_of(pulls.value)
        self._weights = dict.fromkeys(self._weights, expert_weights(total, first))

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the task vectors."""
        merged = torch.zeros_like(base)
        for weight, vector in zip(self._weights[parameter.name], self.running(vectors).values(), strict=True):
            merged += weight * vector
        return merged

    def divisor(self) -> float:
        """The merged task vector is where the next step starts."""
        return 1.0

    def kept(self, parameter: Parameter, vectors: TaskVectors) -> dict[str, Tensor]:
        """The sums S and v over all experts."""
        information, pull = (torch.empty(parameter.shape) for _ in self.keeps)
        for rows in vectors.blocks(parameter):
            places = [tensor[within(rows)].view(-1) for tensor in (information, pull)]
            for chunk, _, *sums in self._chunks(parameter, vectors, rows):
                for place, running in zip(places, sums, strict=True):
                    place[chunk] = running[-1].float()
        return {"information": information, "pull": pull}

    def _products(self, parameter: Parameter, vectors: TaskVectors) -> Products:
        found = Products(len(vectors.tasks))
        for rows in vectors.blocks(parameter):
            for _, own, information, pull in self._chunks(parameter, vectors, rows):
                found.pulls += pull @ own.T
                for index, diagonal in enumerate(information):
                    seen = own[: index + 1]
                    found.curvatures[index, : index + 1, : index + 1] += (seen * diagonal) @ seen.T
        return found

    def _chunks(
        self, parameter: Parameter, vectors: TaskVectors, rows: slice | None
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Which elements of a block, and their task vectors and running sums S and v, ``(T, n)``, float64."""
        own = [vector.flatten() for vector in self.running(vectors.read(parameter, rows)[1]).values()]
        new = vectors.tasks if self._start is None else vectors.tasks[1:]
        diagonals = [self.evidence.fisher_information(task, parameter, rows).flatten() for task in new]
        before = None
        if self._start is not None:
            information, before = (self.kept_before(name, parameter, rows).flatten() for name in self.keeps)
            diagonals.insert(0, information)
        for start in range(0, len(own[0]), CHUNK):
            chunk = slice(start, start + CHUNK)
            part = torch.stack([vector[chunk] for vector in own]).double()
            diagonal = torch.stack([vector[chunk] for vector in diagonals]).double()
            pull = diagonal * part
            if before is not None:
                pull[0] = before[chunk]
            yield chunk, part, diagonal.cumsum(0), pull.cumsum(0)


class Products:
    r"""What the steps of :class:`PerturbAndMerge` follow from, float64, tasks in their order; of tasks up to t only.

    Attributes:
        curvatures: :math:`\langle \tau_i, S_t \tau_k \rangle` at ``[t, i, k]``.
        pulls: :math:`\langle v_t, \tau_k \rangle` at ``[t, k]``.
    """

    def __init__(self, tasks: int) -> None:
        self.curvatures = torch.zeros(tasks, tasks, tasks, dtype=torch.float64)
        self.pulls = torch.zeros(tasks, tasks, dtype=torch.float64)


def expert_weights(products: Products, first: int = 1) -> list[float]:
    """The weight of each expert in what :class:`PerturbAndMerge` merges; they add up to one.

    Args:
        products: what the steps follow from.
        first: how many experts the first of them stands for.
    """
    tasks = len(products.pulls)
    weights = torch.zeros(tasks, dtype=torch.float64)
    weights[0] = 1.0
    for task in range(1, tasks):
        step = -weights
        step[task] += 1.0
        curvatures = products.curvatures[task]
        rise = float(step @ (products.pulls[task] - curvatures @ weights))
        curvature = float(step @ curvatures @ step)
        size = float(step.abs() @ curvatures.abs() @ step.abs())
        best = rise / curvature if curvature > ROUNDING * size else 1 / (first + task)
        weights += min(max(best, 0.0), 1.0) * step
    return weights.tolist()
