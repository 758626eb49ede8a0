"""What a head is built from, what it says of a batch, and whether a given one fits its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a recipe is read with loads no torch
    from torch import Tensor


class Likelihood(StrEnum):
    """How what is right is thought to be drawn from the outputs of a head."""

    CATEGORICAL = "one of the outputs, by their softmax"
    BERNOULLI = "each output by itself, by its sigmoid"
    GAUSSIAN = "numbers around the outputs"
    JOINT = "one of several rows of outputs, by their softmax"


@dataclass(frozen=True)
class Predictions:
    """What a model says of one batch, as the metrics of its task take it.

    Attributes:
        values: what is predicted, shape ``(n, ...)``, or n texts.
        targets: what is right, shape ``(n, ...)``, or for each text those that are right; None where the batch has no
            labels.
        broken: examples of which some output is NaN or infinite, int64 scalar on the outputs' device.
        examples: of which example of the batch each value is, int64 of shape ``(n,)``, those of one example in their
            order; None where each example has one value.
        further: what some metrics are given besides, by the name under which they take it.
    """

    values: Tensor | Sequence[str]
    targets: Tensor | Sequence[Sequence[str]] | None
    broken: Tensor
    examples: Tensor | None = None
    further: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Misfit:
    """What a given expert says of its head that is not what its task asks.

    Attributes:
        message: in words that go on after the folder's name.
        accept: the word in ``expert.accept`` that lets it pass; None where it cannot be accepted.
    """

    message: str
    accept: str | None = None


@dataclass(frozen=True)
class HeadForm:
    """What a model with a task's head is built from.

    Attributes:
        auto_model: name of the class of transformers that builds it.
        peft_type: the ``task_type`` of adapters for it, by peft's name; None where peft has none for it.
        config: the part of a model's configuration that describes the head.
    """

    auto_model: str
    peft_type: str | None
    config: dict[str, Any]
