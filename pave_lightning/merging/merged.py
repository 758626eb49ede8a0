"""The result of a merge method in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from pave_lightning.errors import PaveError, nearest
from pave_lightning.merging.modulators import LowRank, modulated
from pave_lightning.weights import TaskVectors


@dataclass
class MergedVectors:
    """The result of a method: one merged task vector, and for per-task methods what every task keeps.

    Attributes:
        vectors: merged (or unified) task vector of each parameter, float32.
        masks: for each task a bool tensor of each parameter that it masks; empty for static methods.
        factors: for each task its low-rank addition to each parameter that has one; empty for static methods.
        rescalers: the factor of each task; empty for static methods.
        source: what was merged; None where nobody says.
        default_scale: what the method's merged task vector is multiplied with unless somebody says otherwise.
    """

    vectors: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    factors: dict[str, dict[str, LowRank]] = field(default_factory=dict)
    rescalers: dict[str, float] = field(default_factory=dict)
    source: TaskVectors | None = field(default=None, repr=False, compare=False)
    default_scale: float = 1.0

    @property
    def per_task(self) -> bool:
        """Whether tasks have weights of their own."""
        return bool(self.masks or self.factors)

    def own(self, task: str, name: str, unified: Tensor | None = None) -> Tensor:
        """A parameter's task vector as the task uses it, before scaling: float32, of the parameter's shape.

        Args:
            task: the task.
            name: name of the parameter.
            unified: what takes the place of the parameter's merged task vector, such as a rounded one.
        """
        mask, factors = self.masks.get(task, {}).get(name), self.factors.get(task, {}).get(name)
        shared = self.vectors[name] if unified is None else unified
        return modulated(shared, mask, factors, self.rescalers.get(task, 1.0))

    def model(self, task: str | None = None, *, scale: float | None = None) -> nn.Module:
        """The merged model of modules in memory: base plus scaled merged task vectors, running statistics averaged.

        Args:
            task: whose head it has, and for methods that keep something for each task whose weights; the base's head
                where None.
            scale: what the merged task vector is multiplied with; the method's default where None.

        Returns:
            A copy of the base, or with a task of its expert, with the merged weights, in eval mode.

        Raises:
            PaveError: the task vectors are not of modules (`task_vectors` with a module as base), the method keeps
                something for each task and no task is named, or there is no such task.
        """
        source = self.source
        if source is None:
            raise PaveError("these merged task vectors do not say what was merged; use what merge() gives")
        if self.per_task and task is None:
            raise PaveError(f"this method keeps weights for each task; name one of {', '.join(source.tasks)}")
        if task is not None and task not in source.tasks:
            raise PaveError(f"there is no task '{task}': {nearest(task, source.tasks)}")
        factor = self.default_scale if scale is None else scale
        weights = dict(source.running_statistics())
        for parameter in source.parameters:
            own = self.vectors[parameter.name] if task is None else self.own(task, parameter.name)
            weights[parameter.name] = source.base(parameter).add_(own, alpha=factor)
        return source.model(weights, task)
