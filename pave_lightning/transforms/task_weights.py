"""Weights per task: more of one task, less of another."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ConfigDict

from pave_lightning.config import Section
from pave_lightning.errors import nearest
from pave_lightning.merging import Evidence
from pave_lightning.purification.options import Compute
from pave_lightning.transforms.base import Transform, vector_transform
from pave_lightning.transforms.scaled import ScaledTaskVectors
from pave_lightning.weights import TaskVectors


class TaskWeightsOptions(Section):
    """A factor for each task, under the task's name; 1 for tasks that are not named."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    @property
    def weights(self) -> dict[str, float]:
        """The factors by task."""
        return dict(self.__pydantic_extra__)


@vector_transform("task_weights")
class TaskWeights(Transform[TaskWeightsOptions]):
    r"""Multiply each task's vector with a factor of its own, :math:`\tau_t \leftarrow \alpha_t \tau_t`.

    Source: the coefficients of Ilharco et al., *Editing Models with Task Arithmetic*, ICLR 2023 (arXiv 2212.04089),
    one a task. A negative one takes a task away.
    """

    summary = "multiply each task's vector with a factor of its own"
    source = "Ilharco et al. 2023, arXiv 2212.04089"
    keeps_factors = True
    Options = TaskWeightsOptions

    def problems(self, vectors: TaskVectors) -> Iterator[str]:
        """Tasks that there are not, or none at all."""
        if not self.options.weights:
            yield f"it weighs no task; give tasks their factors, such as {{task_weights: {{{vectors.tasks[0]}: 0.5}}}}"
        for task in self.options.weights:
            if task not in vectors.tasks:
                yield f"no task is named '{task}'; {nearest(task, vectors.tasks)}"

    def apply(self, vectors: TaskVectors, evidence: Evidence, compute: Compute) -> ScaledTaskVectors:
        """The task vectors, each multiplied with its task's factor."""
        weights = self.options.weights
        return ScaledTaskVectors(vectors, lambda task, parameter: weights.get(task, 1.0))
