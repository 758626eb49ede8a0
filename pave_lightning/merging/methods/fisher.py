"""Fisher merging: a mean of the experts in which each weight counts as much as its task depends on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.merging.base import MethodOptions, StaticMethod
from pave_lightning.merging.evidence import Evidence, Need
from pave_lightning.merging.methods.weighted_average import misnamed_tasks
from pave_lightning.merging.registry import merge_method
from pave_lightning.system.totals import Total
from pave_lightning.weights import Parameter, TaskVectors

# Stands in for a floor of zero: far below every float32 number, so it counts only where no task knows anything.
NEXT_TO_NOTHING = 1e-200


class FisherOptions(MethodOptions):
    """Options of Fisher merging."""

    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """The weight of every task, by its name; all tasks weigh the same where nothing is said."""
    normalise: bool = True
    """Whether each task's Fisher information is divided by its norm over the whole model. Otherwise tasks of which the
    expert is unsure have larger values everywhere, and so a larger say."""
    floor: float = Field(default=1e-6, ge=0)
    """What the Fisher information of a weight counts as at least, before it is normalised. Where all tasks are at the
    floor the result is their mean, weighted as whole tasks are."""

    @field_validator("weights")
    @classmethod
    def _have_a_sum(cls, weights: dict[str, float] | None) -> dict[str, float] | None:
        if weights and not sum(weights.values()) > 0:
            raise ValueError("at least one weight must be above zero")
        return weights


@merge_method("fisher")
class Fisher(StaticMethod[FisherOptions]):
    r"""The mean of the experts, element by element, weighted with each task's Fisher information.

    :math:`W = \sum_t c_t F_t W_t / \sum_t c_t F_t` with :math:`F_t` the diagonal of the Fisher information of expert t
    on its own task's examples, without labels. The weights of an element add up to one, so this is
    :math:`W_0 + \sum_t c_t F_t \tau_t / \sum_t c_t F_t`. It is the maximum of the product of Gaussians around the
    experts with precisions :math:`c_t F_t`. With normalisation :math:`c_t` is divided by the norm of :math:`F_t`.

    Needs the Fisher information: for every example as many gradients as the task has classes, less one. Cost of the
    merge: one read of it a task, two with normalisation, and one elementwise pass. Mind the floor where experts are
    sure of their examples: most of :math:`F_t` can lie below it, and then an unsure expert and a sure one differ in
    little but their norms.

    Source: Matena and Raffel, *Merging models with Fisher-weighted averaging*, NeurIPS 2022 (arXiv 2111.09832), with
    the floor and the normalisation of the published code. Departure: there the floor is by default that of the first
    model alone, the one that is to be improved; here no task stands out, so it is that of all.
    """

    summary = "mean of the experts, each weight by how much its task depends on it"
    source = "Matena and Raffel 2022, arXiv 2111.09832"
    needs = frozenset({Need.FISHER})
    elementwise = True
    Options = FisherOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Weights of unknown tasks, and tasks without a weight."""
        yield from super().problems(vectors, evidence)
        if self.options.weights is not None:
            yield from misnamed_tasks("weights", self.options.weights, vectors.tasks)

    def prepare(self, vectors: TaskVectors) -> Iterator[None]:
        """Find what each task's Fisher information is multiplied with."""
        self._factors = dict(self.options.weights or dict.fromkeys(vectors.tasks, 1.0))
        if not self.options.normalise:
            return
        squares = {task: self._square(task, vectors) for task in vectors.tasks}
        total = self.states.add("squares", squares, "sum")
        yield
        for task, square in total.value.items():
            if not square:
                raise PaveError(
                    f"task '{task}': the Fisher information is zero everywhere, so it cannot be normalised; take it "
                    "from other examples, or set options.normalise: false"
                )
            self._factors[task] /= math.sqrt(square)

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The weighted mean of the task vectors."""
        floor = max(self.options.floor, NEXT_TO_NOTHING)
        total = torch.zeros(base.shape, dtype=torch.float64)
        weights = torch.zeros_like(total)
        # In the order of the names, so that the order of the tasks does not decide how sums round.
        for task in sorted(vectors):
            information = self.evidence.fisher_information(task, parameter, parameter.rows).double()
            weight = information.clamp_(min=floor).mul_(self._factors[task])
            weights += weight
            total += weight.mul_(vectors[task])
        return (total / weights).float()

    def _square(self, task: str, vectors: TaskVectors) -> Total:
        """The sum of the squares of a task's Fisher information."""
        squares = Total()
        for parameter in vectors.parameters:
            for rows in vectors.blocks(parameter):
                squares += float(self.evidence.fisher_information(task, parameter, rows).double().square_().sum())
        return squares
