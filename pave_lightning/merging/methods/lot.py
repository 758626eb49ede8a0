"""LOT: for each layer the one task vector whose outputs differ least from every expert's on the expert's own inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.norm_moments import NormMomentMethod, NormMomentOptions
from pave_lightning.merging.registry import merge_method
from pave_lightning.subspace.ridge import TOLERANCE, AnchoredRidge
from pave_lightning.weights import Parameter, ParameterKind


class LotOptions(NormMomentOptions):
    """Options of LOT."""

    norms: Literal["moments", "mean"] = "moments"
    """Scales of norms: the mean of their task vectors, weighted in each channel with what it multiplies (the paper,
    needs capture.norms), or the plain mean."""
    ridge: float = Field(default=0.0, ge=0)
    """Pull of the linear layers towards the base, as a multiple of the mean eigenvalue of the summed second moments. It
    damps directions of the inputs that are rarely used; 0 is the paper."""
    tolerance: float = Field(default=TOLERANCE, ge=0, lt=1)
    """Directions of the inputs with an eigenvalue of at most this share of the largest count as unseen: there the
    merged weight is the base's."""


@merge_method("lot")
class Lot(NormMomentMethod[LotOptions]):
    r"""Minimise, layer by layer, how far the merged layer's output is from each expert's on that expert's features.

    With :math:`C_t` the second moment of the layer's inputs inside expert t, and :math:`m_t[d]` the mean square of what
    a norm's scale multiplies in channel d, the minimum of :math:`\sum_t E\|f(W_0 + T) - f(W_0 + \tau_t)\|^2` is

    * matrix weights (``d_out x d_in``): :math:`T = (\sum_t \tau_t C_t)(\sum_t C_t)^+`
    * scales of norms: :math:`T[d] = \sum_t m_t[d]\, \tau_t[d] / \sum_t m_t[d]`
    * biases and shifts: :math:`T = \frac{1}{K} \sum_t \tau_t` for K tasks

    and :math:`W = W_0 + \lambda T`. The pseudo-inverse leaves the base's weight where no task has any features: few
    examples make the update smaller, not wrong. A task none of whose examples reached a layer has no say in it; where
    no task has, the layer gets the mean of the task vectors. So do embeddings and all else.

    Needs the second moments of all inputs (``capture.moments: input``) and, unless ``norms: mean``, those of the norms
    (``capture.norms: true``); no labels, no gradients. Cost: a Cholesky factorisation of one ``d_in x d_in``
    matrix a layer, or all of its eigenvectors where some inputs are unseen.

    Source: Sun et al., *Towards Minimizing Feature Drift in Model Merging*, NeurIPS 2025 (arXiv 2505.23859), default
    scale 1; the paper tunes it to 1.2 and 1.5 for its two vision models. Departures: tasks weigh the same whatever
    their number of rows, which is what the paper's sums do for equal numbers; convolutions that are matrix products
    need ``capture.convolutions``; the relative tolerance of the pseudo-inverse is ours, the paper states none.
    """

    summary = "the task vector whose outputs differ least from the experts', layer by layer"
    source = "Sun et al. 2025, arXiv 2505.23859"
    without_moments = "mean"
    Options: ClassVar[type[LotOptions]] = LotOptions

    def in_blocks(self, parameter: Parameter) -> bool:
        """Neither matrix weights nor scales of norms, whose moments are those of the whole tensor."""
        return super().in_blocks(parameter) and parameter.kind is not ParameterKind.NORM_SCALE

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The closed form of the parameter's kind."""
        if parameter.kind is ParameterKind.NORM_SCALE:
            return self._merge_scale(parameter, vectors)
        return super().merge(parameter, base, vectors)

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """Least squares on the tasks' inputs; the mean where no task has any."""
        sums = AnchoredRidge(parameter.matrix_shape)
        reached = False
        for task, moment in self.evidence.input_moments(vectors, parameter):
            sums.add(vectors[task], moment)
            reached = True
        if not reached:
            return torch.stack(list(vectors.values())).mean(dim=0)
        return sums.solve(self.options.ridge * sums.mean_square, tolerance=self.options.tolerance)

    def _merge_scale(self, parameter: Parameter, vectors: Mapping[str, Tensor]) -> Tensor:
        mean = torch.stack(list(vectors.values())).mean(dim=0)
        if self.options.norms == "mean":
            return mean
        weighted, total = torch.zeros_like(mean, dtype=torch.float64), torch.zeros_like(mean, dtype=torch.float64)
        for task, vector in vectors.items():
            squares = self.evidence.norm_moment(task, parameter)
            if squares is not None:
                weighted += squares * vector
                total += squares
        return torch.where(total > 0, weighted / total.where(total > 0, 1.0), mean.double()).float()
