"""Model Stock: average the experts, and go back towards the base as far as their angles say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from pave_lightning.merging.base import MethodOptions, StaticMethod
from pave_lightning.merging.registry import merge_method
from pave_lightning.weights import Parameter


class ModelStockOptions(MethodOptions):
    """Options of Model Stock."""

    filter_wise: bool = False
    """Whether each output of a layer (a row of a matrix weight, a filter of a convolution) has its own angle, rather
    than each tensor."""


@merge_method("model_stock")
class ModelStock(StaticMethod[ModelStockOptions]):
    r"""Between the base and the experts' mean, at the point that is nearest to the centre of all possible experts.

    For each tensor, :math:`c` is the mean of the cosines between all pairs of task vectors,
    :math:`r = \frac{T c}{1 + (T - 1) c}` and :math:`W = W_0 + r \cdot \frac{1}{T} \sum_t \tau_t`. The derivation
    supposes experts of ONE task that differ in their seeds: experts of different tasks are nearly orthogonal, so c and
    r are small and the result stays near the base. Cost: one product a pair of tasks and a weight.

    Source: Jang et al., *Model Stock*, ECCV 2024 (arXiv 2403.19522), which has one angle a layer; no code was
    published. Departures and choices: with more than two experts the cosines are averaged, as other implementations do;
    a cosine with a zero task vector is zero; a negative mean cosine, for which the formula leads away from the experts
    and has a pole, counts as zero, so that r stays within [0, 1] and opposed experts give the base.
    """

    summary = "mean of the experts, pulled to the base as far as their angles say"
    source = "Jang et al. 2024, arXiv 2403.19522"
    each_expert = True
    Options = ModelStockOptions

    def in_blocks(self, parameter: Parameter) -> bool:
        """Where each output has its own angle and is stored as one row."""
        return bool(self.options.filter_wise) and len(parameter.shape) > 1 and parameter.input_axis != 0

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The mean task vector, shortened."""
        mean = torch.stack(list(vectors.values())).mean(dim=0)
        rows = [self._rows(parameter, vector) for vector in vectors.values()]
        ratio = _ratio(rows).float()
        if parameter.input_axis != 0:
            ratio = ratio.view(-1, *[1] * (base.dim() - 1))
        return (ratio * mean).view(base.shape)

    def _rows(self, parameter: Parameter, vector: Tensor) -> Tensor:
        """What has one angle each, as the rows of a matrix."""
        if not self.options.filter_wise or vector.dim() < 2:
            return vector.reshape(1, vector.numel())
        return vector.T if parameter.input_axis == 0 else vector.flatten(start_dim=1)


def _ratio(vectors: Sequence[Tensor]) -> Tensor:
    """The interpolation ratio of each row, float64 in [0, 1]."""
    lengths = [(vector * vector).sum(dim=1, dtype=torch.float64).sqrt() for vector in vectors]
    cosines = []
    for one, two in combinations(range(len(vectors)), 2):
        product = (vectors[one] * vectors[two]).sum(dim=1, dtype=torch.float64)
        length = lengths[one] * lengths[two]
        cosines.append(torch.where(length > 0, product / length, 0.0).clamp(-1, 1))
    cosine = torch.stack(cosines).mean(dim=0).clamp(min=0)
    count = len(vectors)
    return count * cosine / (1 + (count - 1) * cosine)
