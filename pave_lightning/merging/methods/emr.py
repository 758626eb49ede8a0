"""EMR: elect a unified task vector, mask it per task, rescale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pave_lightning.merging.base import MethodOptions, Modulated, PerTaskMethod
from pave_lightning.merging.registry import merge_method
from pave_lightning.weights import Parameter, TaskVectors


class EmrOptions(MethodOptions):
    """Options of EMR."""

    rescaler: Literal["total", "per_tensor_mean"] = "total"
    """How magnitudes are added up for the rescaling factors: over all elements of the model (the paper), or as a sum of
    each tensor's mean (the published code, in which small tensors weigh as much as large ones)."""


@merge_method("emr")
class Emr(PerTaskMethod[EmrOptions]):
    r"""Elect one unified task vector; keep for each task a mask of one bit an element and one scalar.

    1. Elect: :math:`\gamma = +1` where :math:`\sum_t \tau_t > 0`, else :math:`-1`; the magnitude is the largest
       :math:`|\tau_t|` among the tasks whose sign is :math:`\gamma`: :math:`\tau_{uni} = \gamma \cdot \max_t`.
    2. Mask: :math:`M_t = (\tau_t \gamma > 0)`.
    3. Rescale: :math:`\lambda_t = \sum |\tau_t| / \sum |M_t \odot \tau_{uni}|`.

    Task t runs with :math:`W_0 + \lambda_t M_t \odot \tau_{uni}`, so the task of an input must be known. Cost: one
    elementwise pass; storage T bits an element. No data, no hyper-parameters.

    Source: Huang et al., *EMR-Merging*, NeurIPS 2024 (arXiv 2405.17461). Departure: none from the paper; the published
    code rescales by means of each tensor, which is ``rescaler: per_tensor_mean``.
    """

    summary = "one elected task vector, a bit mask and a scalar for each task"
    source = "Huang et al. 2024, arXiv 2405.17461"
    elementwise = True
    Options = EmrOptions

    def prepare(self, vectors: TaskVectors) -> None:
        """Start the sums of magnitudes anew."""
        self._own = self.states.add("own magnitudes", dict.fromkeys(vectors.tasks, 0.0), "sum")
        self._masked = self.states.add("masked magnitudes", dict.fromkeys(vectors.tasks, 0.0), "sum")

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Modulated:
        """The unified task vector and the tasks' masks."""
        stacked = torch.stack(list(vectors.values()))
        sign = torch.where(stacked.sum(dim=0, dtype=torch.float64) > 0, 1.0, -1.0)
        agrees = stacked * sign > 0
        magnitude = (stacked.abs() * agrees).amax(dim=0)
        share = 1.0 if self.options.rescaler == "total" else 1.0 / max(parameter.elements, 1)
        for index, task in enumerate(vectors):
            self._own.value[task] += share * float(stacked[index].abs().sum(dtype=torch.float64))
            self._masked.value[task] += share * float((magnitude * agrees[index]).sum(dtype=torch.float64))
        return Modulated(sign * magnitude, dict(zip(vectors, agrees, strict=True)))

    def rescalers(self) -> dict[str, float]:
        """The factor of each task; 1 for a task whose expert does not differ from the base."""
        masked = self._masked.value
        return {task: own / masked[task] if masked[task] > 0 else 1.0 for task, own in self._own.value.items()}
