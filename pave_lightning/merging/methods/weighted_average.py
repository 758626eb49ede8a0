"""Weighted average of the experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from pydantic import ValidationInfo, field_validator
from torch import Tensor

from pave_lightning.errors import nearest
from pave_lightning.merging.base import MethodOptions, StaticMethod
from pave_lightning.merging.evidence import Evidence
from pave_lightning.merging.registry import merge_method
from pave_lightning.weights import Parameter, TaskVectors

# Weights that cancel to within this share of their magnitudes cannot be brought to a sum of one.
CANCELLED = 1e-6


class WeightedAverageOptions(MethodOptions):
    """Options of the weighted average."""

    normalise: bool = True
    """Whether the weights are divided by their sum; otherwise the task vectors are added up with the weights as they
    are."""
    weights: dict[str, float] | None = None
    """The weight of every task, by its name; all tasks weigh the same (1 each) where nothing is said."""

    @field_validator("weights")
    @classmethod
    def _have_a_sum(cls, weights: dict[str, float] | None, info: ValidationInfo) -> dict[str, float] | None:
        values = list((weights or {}).values())
        cancelled = abs(sum(values)) <= CANCELLED * sum(abs(value) for value in values)
        if values and cancelled and info.data.get("normalise", True):
            raise ValueError("the weights add up to zero, so they cannot be normalised; set normalise: false")
        return weights


def misnamed_tasks(option: str, given: Mapping[str, float], tasks: Sequence[str]) -> Iterator[str]:
    """What is wrong with an option that holds one number for each task: tasks it should not name, tasks it leaves out.

    Args:
        option: name of the option.
        given: the option's value.
        tasks: the tasks that are merged.
    """
    for name in given:
        if name not in tasks:
            yield f"options.{option} names the unknown task '{name}': {nearest(name, list(tasks))}"
    missing = [task for task in tasks if task not in given]
    if missing:
        yield f"options.{option} must name every task; missing: {', '.join(missing)}"


@merge_method("weighted_average")
class WeightedAverage(StaticMethod[WeightedAverageOptions]):
    r"""The weighted mean of the experts' weights, :math:`W = W_0 + \sum_t w_t \tau_t / \sum_t w_t`.

    With ``normalise: false`` it is :math:`W_0 + \sum_t w_t \tau_t`: Task Arithmetic with a scale for each task, of
    which a negative one takes a task away. Cost: one multiplication and addition a weight and task.

    Source: Wortsman et al., *Model soups*, ICML 2022 (arXiv 2203.05482), with weights of one's own choice; without
    normalisation Ilharco et al., *Editing models with task arithmetic*, ICLR 2023 (arXiv 2212.04089).
    """

    summary = "mean of the experts' weights with a weight for each task"
    source = "Wortsman et al. 2022, arXiv 2203.05482"
    elementwise = True
    single_precision = True
    Options = WeightedAverageOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Weights of unknown tasks, and tasks without a weight."""
        yield from super().problems(vectors, evidence)
        if self.options.weights is not None:
            yield from misnamed_tasks("weights", self.options.weights, vectors.tasks)

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the task vectors, divided by the sum of the weights if they are normalised."""
        weights = self.options.weights or dict.fromkeys(vectors, 1.0)
        merged = torch.zeros_like(base)
        # In the order of the names, so that the order of the tasks does not decide how sums round.
        for task in sorted(vectors):
            merged += weights[task] * vectors[task]
        return merged / sum(weights[task] for task in sorted(vectors)) if self.options.normalise else merged
