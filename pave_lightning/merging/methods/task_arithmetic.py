"""Task Arithmetic: add up the task vectors."""

from __future__ import annotations

from pave_lightning.merging.registry import merge_method
from pave_lightning.merging.sequential import RunningSum


@merge_method("task_arithmetic")
class TaskArithmetic(RunningSum):
    r"""The scaled sum of the task vectors, :math:`W = W_0 + \lambda \sum_t \tau_t`.

    Cost: one addition a weight and task. Source: Ilharco et al., *Editing models with task arithmetic*, ICLR 2023
    (arXiv 2212.04089). The default scale 0.3 is the one commonly used for eight tasks.
    """

    summary = "scaled sum of the task vectors"
    source = "Ilharco et al. 2023, arXiv 2212.04089"
    elementwise = True
    single_precision = True
    default_scale = 0.3
