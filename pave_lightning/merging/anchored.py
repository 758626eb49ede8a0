"""Bayesian Model Merging: regression on the experts' outputs, with another rule's result as the prior."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.merging.base import Cost, MethodOptions, StaticMethod, make_method, register
from pave_lightning.merging.evidence import Evidence, Need
from pave_lightning.subspace.ridge import AnchoredRidge
from pave_lightning.weights import Parameter, TaskVectors


class AnchoredRegressionOptions(MethodOptions):
    """Options of Bayesian Model Merging."""

    anchor: str = "task_arithmetic"
    """The rule whose merged model is the prior's mean: any static rule that needs nothing but weights."""
    anchor_scale: float | None = Field(default=None, ge=0)
    """The anchor's scale; its own default where nothing is said."""
    anchor_options: dict[str, Any] = Field(default={})
    """The anchor's own options."""
    ridge: float = Field(default=1.0, gt=0)
    """How strongly the anchor pulls, as a multiple of the mean eigenvalue of the summed second moments: inputs of that
    strength end up half-way between the experts' regression and the anchor. Best tuned on validation data."""
    moments: Literal["inputs", "task_vectors"] = "inputs"
    """Where second moments come from: the captured inputs, or the task vectors themselves, as tau^T tau / ||tau||^2,
    for which the statistics are not looked at."""


@register("bmm")
class AnchoredRegression(StaticMethod):
    r"""Refine a merged model, the anchor: agree with the experts' outputs where there are inputs, else stay.

    With :math:`C_t` the second moment of the layer's inputs inside expert t and :math:`A` the anchor's weight, both for
    matrix weights of shape ``d_out x d_in``,

    .. math:: W = \Big(\sum_t W_t C_t + \lambda A\Big) \Big(\sum_t C_t + \lambda I\Big)^{-1}

    which is the mean of the posterior of a linear regression with a Gaussian prior around the anchor. All other
    parameters, and layers that no example reached, are the anchor's. The scale multiplies what results less the base.

    Needs the second moments of all inputs (``capture.moments: input``). Cost: the anchor's, and one Cholesky
    factorisation of a ``d_in x d_in`` matrix a layer.

    Source: Li et al., *Bayesian Model Merging*, 2026 (arXiv 2605.12843). Departures: the paper chooses the strength of
    the prior for each module by Bayesian optimisation on validation data; here it is one number for all layers,
    relative to each layer's own inputs, so that it can be tuned like any option. How the paper weighs the tasks is not
    known to us; here they weigh the same.
    """

    summary = "regression on the experts' outputs with another rule's merged model as prior"
    source = "Li et al. 2026, arXiv 2605.12843"
    needs = frozenset({Need.INPUT_MOMENTS})
    cost = Cost.DECOMPOSITION
    default_scale = 1.0
    Options: ClassVar[type[AnchoredRegressionOptions]] = AnchoredRegressionOptions

    def __init__(self, options: AnchoredRegressionOptions | None = None) -> None:
        super().__init__(options)
        self._anchor = _weights_only(self.options.anchor, self.options.anchor_options)
        if self._anchor.default_scale is None and self.options.anchor_scale is not None:
            raise PaveError(f"bmm: its anchor '{self._anchor.name}' has no scale; leave anchor_scale out")

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """What the anchor's rule finds wrong, and missing moments where they are used."""
        if self.options.moments == "inputs":
            yield from evidence.lacking(self.needs, vectors)
        for problem in self._anchor.problems(vectors, Evidence()):
            yield f"its anchor, {self._anchor.name}: {problem}"

    def prepare(self, vectors: TaskVectors) -> None:
        """Let the anchor's rule look at the task vectors."""
        self._anchor.prepare(vectors)

    def in_blocks(self, parameter: Parameter) -> bool:
        """Where the anchor's rule allows it, but for matrix weights."""
        return not parameter.is_matrix and self._anchor.in_blocks(parameter)

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The anchor's task vector, refined for matrix weights."""
        anchor = self._anchor_vector(parameter, base, vectors)
        if not parameter.is_matrix:
            return anchor
        matrices = {task: parameter.as_matrix(vector) for task, vector in vectors.items()}
        sums = AnchoredRidge(parameter.matrix_shape)
        for task, moment in self._moments(parameter, matrices):
            sums.add(matrices[task], moment)
        refined = sums.solve(self.options.ridge * sums.mean_square, parameter.as_matrix(anchor))
        return parameter.from_matrix(refined.float())

    def _anchor_vector(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        scales = (self.options.anchor_scale, self._anchor.default_scale, 1.0)
        scale = next(float(scale) for scale in scales if scale is not None)
        return scale * self._anchor.merge(parameter, base, vectors)

    def _moments(self, parameter: Parameter, matrices: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        if self.options.moments == "inputs":
            yield from self.evidence.input_moments(matrices, parameter)
            return
        for task, matrix in matrices.items():
            square = matrix.double().T @ matrix.double()
            energy = float(square.trace())
            yield task, square / energy if energy > 0 else torch.zeros_like(square)


def _weights_only(name: str, options: Mapping[str, Any]) -> StaticMethod:
    """The anchor's rule, which must be one that gives one model from weights alone, parameter by parameter.

    Raises:
        PaveError: there is no such rule, an option of it is wrong, or it is of another kind.
    """
    method = make_method(name, options)
    wanted = "choose a static rule that needs weights only"
    if not isinstance(method, StaticMethod):
        raise PaveError(f"bmm: its anchor '{name}' keeps something for each task; {wanted}")
    if method.needs:
        raise PaveError(f"bmm: its anchor '{name}' needs {', '.join(sorted(method.needs))}; {wanted}")
    if method.rescales:
        raise PaveError(f"bmm: its anchor '{name}' knows its magnitudes only when everything is merged; {wanted}")
    return method
