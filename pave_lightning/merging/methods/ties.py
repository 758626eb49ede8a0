"""TIES: trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.base import MethodOptions, StaticMethod
from pave_lightning.merging.registry import merge_method
from pave_lightning.merging.states import States, Steps, order_statistics
from pave_lightning.weights import Parameter, TaskVectors

# Elements that are merged together: few enough for what is made of all tasks' to stay in the processor's cache.
_CHUNK = 1 << 16


class TiesOptions(MethodOptions):
    """Options of TIES."""

    density: float = Field(0.2, gt=0, le=1)
    """Share of each task vector's elements that survive the trim (k in the paper)."""
    trim: Literal["model", "tensor"] = "model"
    """Of what the share is taken: of all elements of the whole model together (the published code), or of each tensor
    for itself (mergekit)."""
    merge: Literal["mean", "sum"] = "mean"
    """What becomes of the elements that have the elected sign: their mean (the paper), or their sum, which other
    libraries use and which wants a smaller scale, about 0.3 for eight tasks."""


def trim_thresholds(states: States, vectors: TaskVectors, density: float) -> Steps[dict[str, float]]:
    """For each task the magnitude that a share of its task vector's elements over the whole model reaches.

    Args:
        states: those of the method that trims.
        vectors: the task vectors, or a part of their parameters.
        density: that share.
    """

    def blocks() -> Iterator[tuple[str, Tensor]]:
        for _, _, own in vectors.walk():
            yield from own.items()

    found = yield from order_statistics(
        states,
        "magnitudes",
        vectors.tasks,
        blocks,
        lambda elements: [max(1, int(elements * density))],
        magnitudes=True,
    )
    return {task: threshold for task, (threshold,) in found.items()}


def tensor_thresholds(vectors: TaskVectors, density: float) -> dict[str, dict[str, float]]:
    """For each parameter, by name, and each task the magnitude that a share of that tensor's elements reaches.

    Args:
        vectors: the task vectors, or a part of their parameters.
        density: that share.
    """
    found: dict[str, dict[str, float]] = {}
    for parameter in vectors.parameters:
        kept, own = max(1, int(parameter.elements * density)), found.setdefault(parameter.name, {})
        for task in vectors.tasks if parameter.elements else ():
            # Block by block, as merging reads it: sums of products may round differently in other blocks.
            blocks = [vectors.vector(task, parameter, rows).reshape(-1) for rows in vectors.blocks(parameter)]
            own[task] = float(torch.cat(blocks).abs_().kthvalue(parameter.elements - kept + 1).values)
    return found


def merge_trimmed(
    vectors: Mapping[str, Tensor], thresholds: Mapping[str, float], how: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Trim task vectors of one shape, float32, each by its own threshold, and merge them by `disjoint_merge`."""
    first = next(iter(vectors.values()))
    merged = torch.empty(first.numel(), device=first.device)
    flat = {task: vector.reshape(-1) for task, vector in vectors.items()}
    for start in range(0, first.numel(), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        trimmed = [trim(vector[chunk], thresholds[task]) for task, vector in flat.items()]
        merged[chunk] = disjoint_merge(trimmed, how)
    return merged.view(first.shape)


def trim(vector: Tensor, threshold: float) -> Tensor:
    """The elements of a tensor of any shape whose magnitude reaches a threshold, and zero for all others.

    Example:
        >>> trim(torch.tensor([3.0, -1.0, -2.0]), threshold=2.0)
        tensor([ 3., -0., -2.])
    """
    return vector.abs().ge_(threshold).mul_(vector)


def disjoint_merge(vectors: Sequence[Tensor], how: Literal["mean", "sum"] = "mean") -> Tensor:
    """Elect a sign for each element by mass, and merge the elements that have it.

    Args:
        vectors: trimmed task vectors, of one shape; zeros do not take part.
        how: ``mean`` or ``sum`` of the elements that have the elected sign.

    Returns:
        The merged vector, of their shape; zero where the elements sum to exactly zero.

    Example:
        >>> disjoint_merge([torch.tensor([6.0, 1.0]), torch.tensor([2.0, 0.0]), torch.tensor([-1.0, -3.0])])
        tensor([ 4., -3.])
    """
    # One tensor after the other: sums over a stack may round differently from one block of rows to the next.
    mass = torch.zeros_like(vectors[0])
    for vector in vectors:
        mass += vector
    elected = mass.sign()
    total, count = torch.zeros_like(mass), torch.zeros_like(mass)
    for vector in vectors:
        # Ones and zeros of the vectors' own dtype: arithmetic with booleans is several times as slow.
        agrees = vector.sign().eq_(elected)
        total.addcmul_(vector, agrees)
        count += agrees
    return total / count.clamp(min=1) if how == "mean" else total


@merge_method("ties")
class Ties(StaticMethod[TiesOptions]):
    r"""Trim each task vector to its largest elements, elect a sign per element, average what has that sign.

    1. Trim: of each task vector keep the ``density`` share of largest magnitude over the WHOLE model; elements that tie
       with the threshold are kept. With ``trim: tensor`` the share is that of every tensor for itself, as in mergekit,
       which keeps more of tensors that hardly change.
    2. Elect by mass: :math:`\gamma = \mathrm{sgn}(\sum_t \hat\tau_t)`.
    3. Disjoint mean: the mean of the non-zero :math:`\hat\tau_t` whose sign is :math:`\gamma`.

    The result is :math:`W = W_0 + \lambda` times that mean. With the sum in place of the mean the default scale is too
    large: the implementations that add up search around 0.3. Cost: two histogram passes for the thresholds, which need
    no sort and no copy of a task vector, and one elementwise pass; of each tensor for itself one selection a task.

    Source: Yadav et al., *TIES-Merging*, NeurIPS 2023 (arXiv 2306.01708), default density 0.2 and scale 1. Departure:
    where the trimmed elements sum to exactly zero the paper's sign is zero and nothing is merged; its code falls back
    to the sign of the majority of all elements.
    """

    summary = "trim small elements, elect signs by mass, average what agrees"
    source = "Yadav et al. 2023, arXiv 2306.01708"
    elementwise = True
    single_precision = True
    whole_model_pass = True
    default_scale = 1.0
    Options = TiesOptions

    def prepare(self, vectors: TaskVectors) -> Iterator[None]:
        """Find each task's trim threshold: one for the model, or one for each tensor."""
        if self.options.trim == "tensor":
            self._own = tensor_thresholds(vectors, self.options.density)
        else:
            self._thresholds = yield from trim_thresholds(self.states, vectors, self.options.density)

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The disjoint mean, or sum, of the trimmed task vectors."""
        thresholds = self._own[parameter.name] if self.options.trim == "tensor" else self._thresholds
        return merge_trimmed(vectors, thresholds, self.options.merge)
