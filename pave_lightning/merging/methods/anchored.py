"""Bayesian Model Merging: regression on the experts' outputs, with another method's result as the prior."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.base import Cost, MethodOptions, StaticMethod
from pave_lightning.merging.evidence import Need
from pave_lightning.merging.registry import merge_method
from pave_lightning.subspace.ridge import AnchoredRidge
from pave_lightning.weights import Parameter


class AnchoredRegressionOptions(MethodOptions):
    """Options of Bayesian Model Merging."""

    ridge: float = Field(default=1.0, gt=0)
    """How strongly the anchor pulls, as a multiple of the mean eigenvalue of the summed second moments: inputs of that
    strength end up half-way between the experts' regression and the anchor. Best tuned on validation data."""


@merge_method("bmm")
class AnchoredRegression(StaticMethod[AnchoredRegressionOptions]):
    r"""Refine a merged model, the anchor: agree with the experts' outputs where there are inputs, else stay.

    With :math:`C_t` the second moment of the layer's inputs inside expert t and :math:`A` the anchor's weight, both for
    matrix weights of shape ``d_out x d_in``,

    .. math:: W = \Big(\sum_t W_t C_t + \lambda A\Big) \Big(\sum_t C_t + \lambda I\Big)^{-1}

    which is the mean of the posterior of a linear regression with a Gaussian prior around the anchor. All other
    parameters, and layers that no example reached, are the anchor's. The scale multiplies what results less the base.

    Needs an anchor and the second moments of all inputs (``capture.moments: input``). Cost: the anchor's, and one
    Cholesky factorisation of a ``d_in x d_in`` matrix a layer.

    Source: Li et al., *Bayesian Model Merging*, 2026 (arXiv 2605.12843). Departures: the paper chooses the strength of
    the prior for each module by Bayesian optimisation on validation data; here it is one number for all layers,
    relative to each layer's own inputs, so that it can be tuned like any option. How the paper weighs the tasks is not
    known to us; here they weigh the same.
    """

    summary = "regression on the experts' outputs with another method's merged model as prior"
    source = "Li et al. 2026, arXiv 2605.12843"
    each_expert = True
    needs = frozenset({Need.ANCHOR, Need.INPUT_MOMENTS})
    cost = Cost.DECOMPOSITION
    held_models = 1  # the anchor
    default_scale = 1.0
    Options: ClassVar[type[AnchoredRegressionOptions]] = AnchoredRegressionOptions

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The anchor's task vector, refined for matrix weights."""
        return refined(self, parameter, vectors, lambda matrices: self.evidence.input_moments(matrices, parameter))


@merge_method("bmm_data_free")
class DataFreeAnchoredRegression(StaticMethod[AnchoredRegressionOptions]):
    r"""As `bmm`, with second moments of the task vectors' rows, :math:`\tau_t^T \tau_t / \|\tau_t\|^2`, for inputs'.

    Needs an anchor. Source: the data-free variant of Bayesian Model Merging (arXiv 2605.12843), as far as its
    description goes.
    """

    summary = "as bmm, with second moments of the task vectors' rows instead of inputs"
    source = AnchoredRegression.source
    needs = frozenset({Need.ANCHOR})
    cost = Cost.DECOMPOSITION
    held_models = 1  # the anchor
    default_scale = 1.0
    Options: ClassVar[type[AnchoredRegressionOptions]] = AnchoredRegressionOptions

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The anchor's task vector, refined for matrix weights."""
        return refined(self, parameter, vectors, moments_of_rows)


def refined(
    method: StaticMethod[AnchoredRegressionOptions],
    parameter: Parameter,
    vectors: Mapping[str, Tensor],
    moments: Callable[[Mapping[str, Tensor]], Iterable[tuple[str, Tensor]]],
) -> Tensor:
    """The anchor's task vector, for matrix weights with the regression on what the experts put out.

    Args:
        method: gives the anchor and the strength of its pull.
        parameter: the parameter.
        vectors: each task's task vector.
        moments: gives, for the task vectors as ``(d_out, d_in)``, tasks and second moments ``(d_in, d_in)``, float64.
    """
    anchor = method.evidence.anchor_vector(parameter)
    if not parameter.is_matrix:
        return anchor
    matrices = {task: parameter.as_matrix(vector) for task, vector in vectors.items()}
    sums = AnchoredRidge(parameter.matrix_shape)
    for task, moment in moments(matrices):
        sums.add(matrices[task], moment)
    found = sums.solve(method.options.ridge * sums.mean_square, parameter.as_matrix(anchor))
    return parameter.from_matrix(found.float())


def moments_of_rows(matrices: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tasks and the second moments of their task vectors' rows, each with the trace 1, or zero."""
    for task, matrix in matrices.items():
        square = matrix.double().T @ matrix.double()
        energy = float(square.trace())
        yield task, square / energy if energy > 0 else torch.zeros_like(square)
