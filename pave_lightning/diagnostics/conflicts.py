"""How much of a task vector a treatment removes, and how far the task vectors of two tasks work against each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

# Elements that are turned into float64 at a time, for all tasks together.
CHUNK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class RemovedEnergy:
    r"""How much of a task vector :math:`\tau` a treatment takes away, :math:`\tau'` being what it leaves.

    Attributes:
        layer: name of the layer inside the backbone.
        task: name of the task.
        treatment: ``pave``; ``dare`` for drop and rescale; ``dare_dropped`` for the drop before rescaling.
        elements: number of elements of the layer's weight.
        of_vector: :math:`\|\tau - \tau'\|^2 / \|\tau\|^2`. May exceed 1 with PAVE, which projects the fine-tuned weight
            and so removes part of the base's weight as well.
        of_weight: :math:`\|\tau - \tau'\|^2 / \|W_t\|^2`.
        in_removed_directions: for PAVE the share of the task vector's own energy that lies in the removed directions
            U, :math:`\|U^T \tau\|^2 / \|\tau\|^2`; else NaN.
        norm_ratio: :math:`\|\tau'\| / \|\tau\|`.
        cosine: cosine similarity of :math:`\tau` and :math:`\tau'`.
    """

    layer: str
    task: str
    treatment: str
    elements: int
    of_vector: float
    of_weight: float
    in_removed_directions: float
    norm_ratio: float
    cosine: float


@dataclass(frozen=True)
class Conflict:
    """How the task vectors of two tasks in one layer relate, after a treatment.

    Attributes:
        layer: name of the layer inside the backbone.
        task_a: the one task.
        task_b: the other task.
        treatment: ``plain``, ``pave`` or ``dare``.
        elements: number of elements of the layer's weight.
        sign_conflict: among the elements where neither is zero (with DARE: kept by both), the share whose signs differ.
        sign_conflict_of_all: the same elements as a share of all elements of the weight.
        weighted_conflict: the first share with every element weighted by |a b|; equals (1 - sum(ab) / sum(|ab|)) / 2.
        cosine: cosine similarity of the two task vectors.
        top_overlap: Jaccard index of the two sets of largest elements by magnitude.
        support_overlap: Jaccard index of the two sets of non-zero elements (with DARE: the surviving ones).
    """

    layer: str
    task_a: str
    task_b: str
    treatment: str
    elements: int
    sign_conflict: float
    sign_conflict_of_all: float
    weighted_conflict: float
    cosine: float
    top_overlap: float
    support_overlap: float


def removed_energy(
    key: tuple[str, str, str], weight: Tensor, before: Tensor, after: Tensor, directions: Tensor | None = None
) -> RemovedEnergy:
    """What a treatment removes from one task vector.

    Args:
        key: names of the layer, the task and the treatment.
        weight: the fine-tuned weight ``W_t``, shape ``(d_out, d_in)``.
        before: the task vector before the treatment, of the same shape.
        after: the task vector after it.
        directions: orthonormal columns of the removed output directions, shape ``(d_out, k)``, where there are any.
    """
    own, left = before.double(), after.double()
    energy, rest = float(own.square().sum()), float(left.square().sum())
    gone = float((own - left).square().sum())
    inside = math.nan if directions is None else float((directions.T @ own).square().sum())
    return RemovedEnergy(
        *key,
        weight.numel(),
        _ratio(gone, energy),
        _ratio(gone, float(weight.double().square().sum())),
        _ratio(inside, energy),
        math.sqrt(_ratio(rest, energy)),
        _ratio(float((own * left).sum()), math.sqrt(energy * rest)),
    )


def compare_pairs(layer: str, treatment: str, vectors: Mapping[str, Tensor], top_share: float) -> Iterator[Conflict]:
    """Conflicts between the task vectors of every pair of tasks in one layer.

    All pairs come out of five products of tasks x elements matrices, taken chunk by chunk and added up in float64.

    Args:
        layer: name of the layer.
        treatment: name of the treatment.
        vectors: each task's task vector, all of one shape.
        top_share: share of the elements, by magnitude, that count as the largest; elements that tie with the threshold
            do too, zeros never.
    """
    flat = {task: vector.detach().flatten() for task, vector in vectors.items()}
    tasks, elements = list(flat), len(next(iter(flat.values()), ()))
    thresholds = [_threshold(vector, top_share) for vector in flat.values()]
    limits = torch.tensor(thresholds, dtype=torch.float64)[:, None]
    signs, non_zero, products, magnitudes, largest = torch.zeros(5, len(tasks), len(tasks), dtype=torch.float64)
    step = max(1, CHUNK_ELEMENTS // max(1, len(tasks)))
    for start in range(0, elements, step):
        values = torch.stack([vector[start : start + step] for vector in flat.values()]).double()
        size, sign = values.abs(), values.sign()
        products += values @ values.T
        magnitudes += size @ size.T
        signs += sign @ sign.T
        non_zero += (present := (size > 0).double()) @ present.T
        largest += (chosen := ((size >= limits) & (size > 0)).double()) @ chosen.T
    for a, b in combinations(range(len(tasks)), 2):
        both = float(non_zero[a, b])
        differing = (both - float(signs[a, b])) / 2
        weight = float(magnitudes[a, b])
        yield Conflict(
            layer,
            tasks[a],
            tasks[b],
            treatment,
            elements,
            _ratio(differing, both),
            _ratio(differing, elements),
            _ratio((weight - float(products[a, b])) / 2, weight),
            _ratio(float(products[a, b]), math.sqrt(float(products[a, a] * products[b, b]))),
            _jaccard(largest, a, b),
            _jaccard(non_zero, a, b),
        )


def _threshold(vector: Tensor, share: float) -> float:
    count = max(1, round(share * len(vector)))
    return float(vector.abs().kthvalue(len(vector) - count + 1).values)


def _jaccard(common: Tensor, a: int, b: int) -> float:
    return _ratio(float(common[a, b]), float(common[a, a] + common[b, b] - common[a, b]))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
