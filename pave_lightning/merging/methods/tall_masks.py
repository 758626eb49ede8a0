"""TALL masks and Consensus merging: which weights of the multi-task model each task needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from pave_lightning.merging.base import MethodOptions, Modulated, PerTaskMethod, StaticMethod
from pave_lightning.merging.evidence import Evidence
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.merging.methods.ties import merge_trimmed, trim_thresholds
from pave_lightning.merging.methods.weighted_average import misnamed_tasks
from pave_lightning.merging.registry import merge_method
from pave_lightning.merging.states import States, Steps
from pave_lightning.weights import Parameter, TaskVectors


class TallMasksOptions(MethodOptions):
    """Options of TALL masks."""

    threshold: float | dict[str, float] = 0.4
    """How much nearer to the task's own weight than the base's an element of the multi-task model must be (lambda):
    the higher, the emptier the masks. One number, or one for every task by its name. The source picks each task's among
    0.2, 0.3, 0.4, 0.5 and 0.6 by validation scores; the default is the middle one."""
    multi_task: Literal["sum", "ties"] = "sum"
    """The multi-task vector: the sum of the task vectors, or TIES with the sum of what agrees, which reads all task
    vectors twice more."""
    density: float = Field(default=0.2, gt=0, le=1)
    """Share of each task vector's elements that survives the trim of TIES, where that makes the multi-task vector."""

    @field_validator("threshold", mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        numbers = list(value.values()) if isinstance(value, Mapping) else [value]
        known = [float(n) for n in numbers if isinstance(n, int | float) and not isinstance(n, bool)]
        if len(known) < len(numbers) or not all(0 <= number < math.inf for number in known):
            raise ValueError("expected a number of at least 0, or one for every task by its name")
        return value


class ConsensusOptions(TallMasksOptions):
    """Options of Consensus merging."""

    k: int = Field(default=2, ge=0)
    """How many tasks must need a weight for it to be kept: 2 leaves out what one task alone needs, 1 only what none
    needs, 0 nothing."""


def threshold_problems(options: TallMasksOptions, tasks: Sequence[str]) -> Iterator[str]:
    """Thresholds of unknown tasks, and tasks without a threshold."""
    if isinstance(options.threshold, dict):
        yield from misnamed_tasks("threshold", options.threshold, tasks)


def trimmed_by(states: States, vectors: TaskVectors, options: TallMasksOptions) -> Steps[dict[str, float] | None]:
    """Each task's trim threshold where TIES makes the multi-task vector; else None."""
    if options.multi_task == "sum":
        return None
    return (yield from trim_thresholds(states, vectors, options.density))


def masked(
    vectors: Mapping[str, Tensor], options: TallMasksOptions, thresholds: Mapping[str, float] | None
) -> Modulated:
    """The multi-task vector, and where each task's own change outweighs what the other tasks add to it.

    Args:
        vectors: task vectors of one shape.
        options: which multi-task vector, and how far the change must outweigh the others.
        thresholds: what `trimmed_by` gave.
    """
    if thresholds is None:
        # So exact that masks do not depend on the order of the tasks.
        shared = torch.stack(list(vectors.values())).sum(dim=0, dtype=torch.float64)
    else:
        shared = merge_trimmed(vectors, thresholds, "sum").double()
    chosen = options.threshold
    own_threshold = chosen if isinstance(chosen, dict) else dict.fromkeys(vectors, chosen)
    masks = {task: own.abs() > own_threshold[task] * (shared - own).abs() for task, own in vectors.items()}
    return Modulated(shared.float(), masks)


@merge_method("tall_masks")
class TallMasks(PerTaskMethod[TallMasksOptions]):
    r"""Share the multi-task vector; keep for each task a mask of the elements that serve it.

    With the multi-task vector :math:`\tau = \sum_t \tau_t`, task t keeps the elements where its own change is large
    beside what the others add: :math:`M_t = [\,|\tau_t| > \lambda_t |\tau - \tau_t|\,]`, and runs with
    :math:`W_0 + M_t \odot \tau`. So the task of an input must be known. Cost: one elementwise pass; storage one bit an
    element and task.

    Source: Wang et al., *Localizing task information for improved model merging and compression*, ICML 2024 (arXiv
    2405.07813). Departure: the thresholds are options; the source picks each by labelled validation data.
    """

    summary = "the sum of the task vectors, and for each task a bit mask of what serves it"
    source = "Wang et al. 2024, arXiv 2405.07813"
    elementwise = True
    Options = TallMasksOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Thresholds of unknown tasks, and tasks without a threshold."""
        yield from super().problems(vectors, evidence)
        yield from threshold_problems(self.options, vectors.tasks)

    def prepare(self, vectors: TaskVectors) -> Iterator[None]:
        """Note the tasks; where TIES makes the multi-task vector, find its thresholds."""
        self._tasks = vectors.tasks
        self._thresholds = yield from trimmed_by(self.states, vectors, self.options)

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Modulated:
        """The multi-task vector and the tasks' masks."""
        return masked(vectors, self.options, self._thresholds)

    def rescalers(self) -> dict[str, float]:
        """One for every task."""
        return dict.fromkeys(self._tasks, 1.0)


@merge_method("consensus")
class Consensus(StaticMethod[ConsensusOptions]):
    r"""Keep the elements of the multi-task vector that several tasks need.

    With the masks :math:`M_t` of TALL masks, :math:`W = W_0 + \lambda [\sum_t M_t \ge k] \odot \tau`. Cost: one
    elementwise pass.

    Source: Wang et al., *Localizing task information for improved model merging and compression*, ICML 2024 (arXiv
    2405.07813), which searches the scale between 0.1 and 1 by validation scores; the default is Task Arithmetic's, of
    which the method is a masked form.
    """

    summary = "the sum of the task vectors where at least k tasks need it"
    source = "Wang et al. 2024, arXiv 2405.07813"
    elementwise = True
    default_scale = TaskArithmetic.default_scale
    Options = ConsensusOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Thresholds that do not fit the tasks, and more tasks asked for than there are."""
        yield from super().problems(vectors, evidence)
        yield from threshold_problems(self.options, vectors.tasks)
        if self.options.k > len(vectors.tasks):
            yield f"options.k is {self.options.k}, but there are {len(vectors.tasks)} tasks, so nothing would be kept"

    def prepare(self, vectors: TaskVectors) -> Iterator[None]:
        """Where TIES makes the multi-task vector, find its thresholds."""
        self._thresholds = yield from trimmed_by(self.states, vectors, self.options)

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The multi-task vector where enough tasks need it."""
        found = masked(vectors, self.options, self._thresholds)
        needed = torch.stack(list(found.masks.values())).sum(dim=0)
        return torch.where(needed >= self.options.k, found.shared, 0.0)
