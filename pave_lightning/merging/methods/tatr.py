"""TATR: leave out the weights at which the tasks pull against each other most, add up the rest."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.base import MethodOptions, StaticMethod
from pave_lightning.merging.evidence import Need
from pave_lightning.merging.registry import merge_method
from pave_lightning.merging.states import order_statistics
from pave_lightning.weights import Parameter, TaskVectors


class TatrOptions(MethodOptions):
    """Options of TATR."""

    quantile: float = Field(default=0.99, ge=0, le=1)
    """Share of all weights that is kept: those with the least conflict; 1 keeps all."""


class _TrustRegion(StaticMethod[TatrOptions]):
    """The sum of the task vectors over the weights with little conflict, however gradients are known."""

    elementwise = True
    whole_model_pass = True
    default_scale = 0.3
    Options = TatrOptions

    @abstractmethod
    def gradient(self, task: str, parameter: Parameter, vector: Tensor) -> Tensor:
        """How strongly the task's loss depends on each weight near the base, float32, not negative.

        Args:
            task: the task.
            parameter: the parameter, or a block of its rows.
            vector: the task's task vector of these rows.
        """

    def prepare(self, vectors: TaskVectors) -> Iterator[None]:
        """Find the conflict from which weights are left out."""
        self._limit = math.inf
        if self.options.quantile == 1:
            return

        def blocks() -> Iterator[tuple[str, Tensor]]:
            for parameter, rows, own in vectors.walk():
                yield "conflict", self._conflict(parameter.block(rows), own)

        def dropped(elements: int) -> list[int]:
            count = elements - int(elements * self.options.quantile)
            return [count] if count else []

        found = yield from order_statistics(self.states, "conflict", ["conflict"], blocks, dropped)
        self._limit = next(iter(found["conflict"]), math.inf)

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The sum of the task vectors, zero where the conflict is too large."""
        conflict = self._conflict(parameter, vectors)
        merged = torch.zeros_like(base)
        for task in sorted(vectors):
            merged += vectors[task]
        # Where nothing is at odds nothing is left out, not even when that holds for most weights of the model.
        return torch.where((conflict < self._limit) | (conflict == 0), merged, 0.0)

    def _conflict(self, parameter: Parameter, vectors: Mapping[str, Tensor]) -> Tensor:
        """The sum over pairs of different tasks of one's gradient times the other's magnitude, element by element."""
        # In the order of the names, so that the order of the tasks does not decide how sums round.
        tasks = sorted(vectors)
        nothing = torch.zeros_like(vectors[tasks[0]])
        later = {tasks[-1]: nothing}
        for task, following in zip(tasks[-2::-1], tasks[:0:-1], strict=True):
            later[task] = later[following] + vectors[following].abs()
        conflict, earlier = nothing.clone(), nothing.clone()
        for task in tasks:
            others = later.pop(task) + earlier
            conflict += others.mul_(self.gradient(task, parameter, vectors[task]))
            earlier += vectors[task].abs()
        return conflict


@merge_method("tatr")
class Tatr(_TrustRegion):
    r"""Task Arithmetic without the weights at which one task's step would change another task's loss most.

    With :math:`g_t` the mean over a task's labelled examples of the magnitude of the loss's gradient at the base,
    example by example, the conflict at a weight is :math:`\Omega = \sum_{i \neq j} g_i \odot |\tau_j|`, a bound to
    first order on what the tasks do to each other. The weights with the largest conflict over the whole model, by
    default one of a hundred, stay the base's for all tasks: :math:`W = W_0 + \lambda m \odot \sum_t \tau_t`.

    Needs one gradient for each of about 128 labelled examples a task. Cost of the merge: three reads of all task
    vectors and gradients, two of them for the exact threshold, which need neither a sort nor a copy.

    Source: Sun et al., *Task Arithmetic in Trust Region*, 2025 (arXiv 2501.15065). Departures: a weight without any
    conflict is always kept, also where that is more than the wanted share; the code in FusionBench keeps what lies
    strictly below the threshold and so would drop all of these. That code also files gradients under the wrong name,
    finds no pair of tasks, and returns the base; here they are what the paper says.
    """

    summary = "leave out the weights where one task's step changes another's loss most, add up"
    source = "Sun et al. 2025, arXiv 2501.15065"
    needs = frozenset({Need.GRADIENTS})

    def gradient(self, task: str, parameter: Parameter, vector: Tensor) -> Tensor:
        """The mean magnitude of the gradient of the task's loss at the base."""
        return self.evidence.absolute_gradient(task, parameter, parameter.rows)


@merge_method("tatr_zero_shot")
class TatrZeroShot(_TrustRegion):
    r"""TATR without data: the magnitude of a task vector stands in for the gradient, :math:`g_t = |\tau_t|`.

    Fine-tuning moves a weight about as far as its gradient points, so the conflict at a weight is
    :math:`\Omega = \sum_{i \neq j} |\tau_i| \odot |\tau_j|`. All else is as in `tatr`; no data.

    Source: Sun et al., *Task Arithmetic in Trust Region*, 2025 (arXiv 2501.15065). Departure: as in `tatr`, a weight
    without conflict is always kept.
    """

    summary = "leave out the weights that several tasks move most, add up"
    source = "Sun et al. 2025, arXiv 2501.15065"
    single_precision = True

    def gradient(self, task: str, parameter: Parameter, vector: Tensor) -> Tensor:
        """The magnitude of the task vector."""
        return vector.abs()
