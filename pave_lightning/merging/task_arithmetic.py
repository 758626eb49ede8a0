"""Task Arithmetic: add up the task vectors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pave_lightning.merging.base import StaticMethod, register
from pave_lightning.weights import Parameter


@register("task_arithmetic")
class TaskArithmetic(StaticMethod):
    r"""The scaled sum of the task vectors, :math:`W = W_0 + \lambda \sum_t \tau_t`.

    Cost: one addition a weight and task. Source: Ilharco et al., *Editing models with task arithmetic*, ICLR 2023
    (arXiv 2212.04089). The default scale 0.3 is the one commonly used for eight tasks.
    """

    summary = "scaled sum of the task vectors"
    source = "Ilharco et al. 2023, arXiv 2212.04089"
    elementwise = True
    default_scale = 0.3

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The sum of the task vectors."""
        return torch.stack(list(vectors.values())).sum(dim=0)
