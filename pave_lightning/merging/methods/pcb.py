"""PCB-Merging: weigh every element by its importance to its task and its accord with the other tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.base import MethodOptions, StaticMethod
from pave_lightning.merging.evidence import Evidence
from pave_lightning.merging.registry import merge_method
from pave_lightning.merging.states import order_statistics
from pave_lightning.weights import Parameter, TaskVectors

# Scores of so many tasks reach from exp(-80) to exp(80) times their accord, which float32 holds.
MOST_TASKS = 160


class PcbOptions(MethodOptions):
    """Options of PCB-Merging."""

    ratio: float = Field(default=0.1, gt=0, le=1)
    """Share of each task vector's elements, those of highest score, that takes part in the merge. The published code
    uses 0.05 for vision models and 0.05 to 0.2 for language models."""
    tails: float = Field(default=1e-4, ge=0, lt=0.5)
    """Share of each task vector's magnitudes, at either end, that is brought to the nearest magnitude in between. The
    published code uses 0.0001 in its general script and 0.01 for vision models."""
    accord: Literal["product", "normalised_sum", "normalised_pairs"] = "product"
    """How the accord between tasks is measured, one for each version of the published code: tanh of the element times
    the sum over all tasks (the general script), tanh of the element times the sum of normalised elements (vision), or
    the sum of tanh of products of normalised elements (vision with a search for coefficients)."""


@dataclass(frozen=True)
class _Range:
    """Two values between which something is clamped."""

    low: float
    high: float

    def share(self, values: Tensor) -> Tensor:
        """Where the clamped values lie between the two, from 0 to 1; 0 where the two are equal."""
        if self.high <= self.low:
            return torch.zeros_like(values)
        return (values.clamp(self.low, self.high) - self.low) / (self.high - self.low)


@merge_method("pcb")
class Pcb(StaticMethod[PcbOptions]):
    r"""Weigh each element by its share in its own task and by its accord with the other tasks; drop low scores.

    Over the WHOLE model, for each task t of T:

    1. Magnitudes beyond the lowest and highest ``tails`` share are clamped: :math:`\hat\tau_t`; :math:`x_t \in [0, 1]`
       are the clamped magnitudes, min-max normalised.
    2. Balance: :math:`s_t = \exp(T x_t^2) \cdot \tanh(\tau_t \odot \sum_u \tau_u)`.
    3. Drop and rescale: scores below the top ``ratio`` share are raised to that threshold; min-max normalised, they are
       the coefficients :math:`\beta_t \in [0, 1]`, zero for all that was raised.
    4. Merge: :math:`\sum_t \beta_t \odot \hat\tau_t / \sum_t \beta_t`, zero where all coefficients are.

    The result is :math:`W = W_0 + \lambda` times that. Cost: four histogram passes for the thresholds, exact to the
    element without a sort or a copy of a task vector, and one elementwise pass.

    Source: Du et al., *Parameter Competition Balancing for Model Merging*, NeurIPS 2024 (arXiv 2410.02396). The three
    versions of the published code differ in step 2; the general script is the default. Departures: one scale for all
    tasks, by default the 1.2 of the published vision runs, in place of a search for one a task; scores and coefficients
    are computed in float64 (scores are then rounded to float32); a task whose magnitudes or scores are all equal has no
    part in the merge, where the published code divides by zero.
    """

    summary = "weigh elements by magnitude and accord with other tasks, drop low scores, average"
    source = "Du et al. 2024, arXiv 2410.02396"
    elementwise = True
    whole_model_pass = True
    default_scale = 1.2
    Options = PcbOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """More tasks than scores can tell apart."""
        yield from super().problems(vectors, evidence)
        if len(vectors.tasks) > MOST_TASKS:
            yield (
                f"there are {len(vectors.tasks)} tasks, but scores of more than {MOST_TASKS} do not fit into float32; "
                "merge fewer of them at a time"
            )

    def prepare(self, vectors: TaskVectors) -> Iterator[None]:
        """Find each task's range of magnitudes, then its range of scores."""

        # Positions in ascending order, as the published code counts them; ranks count from the top.
        def tails(total: int) -> list[int]:
            low = int(total * self.options.tails)
            high = max(low, int(total * (1 - self.options.tails) - 1))
            return [total - low, total - high]

        def top(total: int) -> list[int]:
            return [total - min(int(total * (1 - self.options.ratio)), total - 1), 1]

        def magnitudes() -> Iterator[tuple[str, Tensor]]:
            return (pair for _, _, own in vectors.walk() for pair in own.items())

        def scores() -> Iterator[tuple[str, Tensor]]:
            return (pair for _, _, own in vectors.walk() for pair in self._scores(own))

        tasks = vectors.tasks
        found = yield from order_statistics(self.states, "magnitudes", tasks, magnitudes, tails, magnitudes=True)
        self._magnitudes = {task: _Range(*ends) for task, ends in found.items()}
        found = yield from order_statistics(self.states, "scores", tasks, scores, top)
        self._ranges = {task: _Range(*ends) for task, ends in found.items()}

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The mean of the clamped task vectors, weighted by their coefficients."""
        merged = torch.zeros_like(base, dtype=torch.float64)
        total = torch.zeros_like(merged)
        for task, score in self._scores(vectors):
            coefficient = self._ranges[task].share(score.double())
            own = self._magnitudes[task]
            merged += vectors[task].sign() * vectors[task].abs().clamp(own.low, own.high) * coefficient
            total += coefficient
        return (merged / total.clamp(min=1e-12)).float()

    def _scores(self, vectors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The score of every element, float32, up to one factor; one task after the other, in the order of names."""
        names = sorted(vectors)
        pairs = self.options.accord == "normalised_pairs"
        total = None if pairs else self._total(vectors, names)
        for task in names:
            own = vectors[task].double()
            share = self._magnitudes[task].share(own.abs())
            if total is None:
                signed = own.sign() * share
                accord = _sum(torch.tanh(signed * self._signed(vectors, other)) for other in names)
            else:
                accord = torch.tanh(own * total)
            # A common factor does not outlast normalisation; this one keeps scores of MOST_TASKS within float32.
            yield task, (torch.exp(len(names) * (share.square() - 0.5)) * accord).float()

    def _total(self, vectors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
        """The sum over all tasks that an element is multiplied with."""
        plain = self.options.accord == "product"
        return _sum(vectors[task].double() if plain else self._signed(vectors, task) for task in names)

    def _signed(self, vectors: Mapping[str, Tensor], task: str) -> Tensor:
        """The normalised magnitudes of a task, with the elements' signs."""
        own = vectors[task].double()
        return own.sign() * self._magnitudes[task].share(own.abs())


def _sum(tensors: Iterator[Tensor]) -> Tensor:
    """The sum of tensors of one shape, one after the other."""
    total = next(tensors)
    for tensor in tensors:
        total = total + tensor
    return total
