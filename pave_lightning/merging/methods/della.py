"""DELLA: drop elements at random, small ones more often than large ones, then elect and merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from pave_lightning.merging.base import MethodOptions, StaticMethod
from pave_lightning.merging.methods.dare import uniform_draws
from pave_lightning.merging.methods.ties import disjoint_merge
from pave_lightning.merging.registry import merge_method
from pave_lightning.weights import Parameter


class DellaOptions(MethodOptions):
    """Options of DELLA."""

    drop_rate: float = Field(default=0.3, ge=0, lt=1)
    """Mean probability with which an element of a task vector is dropped."""
    window: float = Field(default=0.14, ge=0, lt=1, validate_default=True)
    """Difference between the drop probabilities of a row's smallest and largest element (twice the paper's epsilon)."""
    merge: Literal["mean", "sum"] = "mean"
    """What becomes of the elements that have the elected sign: their mean (the paper), or their sum."""
    seed: int | None = None
    """Seed of the random masks; 0 where nothing is said."""

    @field_validator("window")
    @classmethod
    def _fits(cls, window: float, info: ValidationInfo) -> float:
        rate = info.data.get("drop_rate")
        if rate is not None and not (rate - window / 2 >= 0 and rate + window / 2 < 1):
            raise ValueError(
                f"drop probabilities must lie in [0, 1), but run from {rate - window / 2:g} to {rate + window / 2:g}; "
                "narrow the window or change drop_rate"
            )
        return window


@merge_method("della")
class Della(StaticMethod[DellaOptions]):
    r"""Drop elements with a probability that falls with their rank, rescale each survivor by its own, then elect.

    1. MagPrune: the i-th smallest magnitude (from 0) of a row of n elements is kept with probability
       :math:`q_i = 1 - p - \epsilon + 2 \epsilon \frac{i}{n - 1}` and then divided by :math:`q_i`, so that the
       expectation is the task vector itself.
    2. Elect and merge as in TIES: the sign of the sum, then the mean of the survivors that have it.

    The result is :math:`W = W_0 + \lambda` times that mean. A row is what belongs to one index of the first axis; a
    tensor with one axis or none is one row, and a row of one element has q = 1 - p. Equal magnitudes rank in their
    order. Random: report the seed. Cost: one sort of every row and one draw for every element, for each task.

    Source: Deep et al., *DELLA-Merging*, 2024 (arXiv 2406.11617), with drop rate, window and scale of the published
    example. Departures: masks come from a counter-based generator (see `uniform_draws`); survivors that sum to exactly
    zero merge to zero, where the published code takes the positive ones.
    """

    summary = "drop small elements more often than large ones, then elect signs and average"
    source = "Deep et al. 2024, arXiv 2406.11617"
    elementwise = True
    default_scale = 1.1
    Options = DellaOptions

    def in_blocks(self, parameter: Parameter) -> bool:
        """Where a block holds whole rows."""
        return len(parameter.shape) > 1

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """Drop, rescale, elect and merge."""
        start = parameter.first_element
        # In the order of the names, so that the order of the tasks does not decide how sums round.
        survivors = [self._survivors(vectors[task], task, parameter.name, start) for task in sorted(vectors)]
        return disjoint_merge(survivors, self.options.merge)

    def _survivors(self, vector: Tensor, task: str, parameter: str, start: int) -> Tensor:
        """The kept elements, each divided by the probability that it was kept."""
        if not vector.numel():
            return vector
        rows = vector.reshape(vector.shape[0] if vector.dim() > 1 else 1, -1)
        keep = keep_probabilities(rows, 1 - self.options.drop_rate, self.options.window / 2)
        draws = uniform_draws(rows.numel(), task=task, parameter=parameter, seed=self.options.seed, start=start)
        kept = draws.view(rows.shape).to(rows.device) >= 1 - keep
        return torch.where(kept, rows / keep, 0.0).float().view(vector.shape)


def keep_probabilities(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """The probability of each element to be kept, which rises with the rank of its magnitude in its row.

    Args:
        rows: shape (rows, n).
        density: the mean probability.
        epsilon: how far the smallest element's lies below and the largest one's above it.

    Returns:
        float64, of the same shape.
    """
    length = rows.shape[1]
    smallest_first = rows.abs().sort(dim=1, stable=True).indices
    steps = torch.linspace(-epsilon, epsilon, length, dtype=torch.float64) if length > 1 else torch.zeros(1).double()
    steps = steps.to(rows.device)
    return torch.empty_like(rows, dtype=torch.float64).scatter_(1, smallest_first, (density + steps).expand(rows.shape))
