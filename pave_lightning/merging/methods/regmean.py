"""RegMean: the weights that a linear regression on all experts' inputs and outputs finds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.evidence import Need
from pave_lightning.merging.matrices import MatrixMethod, MatrixOptions
from pave_lightning.merging.registry import merge_method
from pave_lightning.subspace.ridge import AnchoredRidge
from pave_lightning.weights import Parameter


class RegMeanOptions(MatrixOptions):
    """Options of RegMean."""

    nondiagonal: float = Field(default=0.9, ge=0, le=1)
    """What the entries beside the diagonal of the second moments are multiplied with. 0.9 is what the paper sets mostly
    (0.1 for T5); 1 is the plain regression, 0 a mean weighted input by input."""
    ridge: float = Field(default=0.0, ge=0)
    """Pull towards the average of the experts, as a multiple of the mean eigenvalue of the summed second moments; 0 is
    the paper."""


@merge_method("regmean")
class RegMean(MatrixMethod[RegMeanOptions]):
    r"""Fit one matrix to what the experts' layers put out for their own inputs.

    With :math:`C_t` the second moment of the layer's inputs inside expert t, ``d_in x d_in``, and shrunk moments
    :math:`G_t = a\, C_t + (1 - a)\, \mathrm{diag}(C_t)`,

    .. math:: W = \Big(\sum_t W_t G_t\Big) \Big(\sum_t G_t\Big)^{-1}

    for the full weights :math:`W_t` (``d_out x d_in``) of linear layers, and the mean for all else. A task none of
    whose examples reached a layer has no say in it; where no task has, the layer gets the mean. There is no scale.

    Needs the second moments of all inputs (``capture.moments: input``). Cost: a Cholesky factorisation of one
    ``d_in x d_in`` matrix a layer, or all of its eigenvectors where some inputs are always zero.

    Source: Jin et al., *Dataless Knowledge Fusion by Merging Weights of Language Models*, ICLR 2023 (arXiv 2212.09849).
    Departures: second moments are means over a task's rows, so that tasks weigh the same. Where the sum cannot be
    inverted, because some inputs are always zero, the published code fails or divides by rounding, and a pseudo-inverse
    would set the weights there to zero; here they are the average of the experts', the limit of a vanishing multiple of
    the identity added to every :math:`G_t`. Convolutions that are matrix products and were captured count as linear.
    """

    summary = "linear regression on what the experts' layers take in and put out"
    source = "Jin et al. 2023, arXiv 2212.09849"
    needs = frozenset({Need.INPUT_MOMENTS})
    default_scale = None
    Options: ClassVar[type[RegMeanOptions]] = RegMeanOptions

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The regression, in task vectors: with an anchor among the experts the base cancels out."""
        mean = torch.stack(list(vectors.values())).mean(dim=0)
        share = self.options.nondiagonal
        sums = AnchoredRidge(parameter.matrix_shape)
        for task, moment in self.evidence.input_moments(vectors, parameter):
            shrunk = share * moment
            shrunk.diagonal().copy_(moment.diagonal())
            sums.add(vectors[task], shrunk)
        return sums.solve(self.options.ridge * sums.mean_square, mean)
