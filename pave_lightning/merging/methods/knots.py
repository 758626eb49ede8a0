"""KnOTS: align the task vectors of a layer in one basis that they share, then TIES."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.low_rank import Factors
from pave_lightning.merging.matrices import MatrixMethod, MatrixOptions
from pave_lightning.merging.methods.dare import DareOptions, drop_and_rescale
from pave_lightning.merging.methods.ties import disjoint_merge
from pave_lightning.merging.registry import merge_method
from pave_lightning.merging.states import order_statistics
from pave_lightning.subspace.solver import symmetric_eigen
from pave_lightning.weights import Parameter, TaskVectors


class KnotsOptions(MatrixOptions):
    """Options of KnOTS."""

    density: float = Field(default=0.2, gt=0, le=1)
    """Share of each task's coordinates, over all layers together, that survive the trim."""
    merge: Literal["mean", "sum"] = "mean"
    """What becomes of the coordinates that have the elected sign: their mean, or their sum, which wants a smaller
    scale."""
    drop_rate: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which a coordinate is dropped, and the others rescaled, before the trim (DARE); none by default.
    The published KnOTS-DARE-TIES takes 0.1 with density 1."""
    cut: float = Field(default=1e-5, ge=0, lt=1)
    """Shared directions whose singular value is at most this share of the layer's largest are left out."""
    seed: int | None = None
    """Seed of the random masks; 0 where nothing is said."""


@merge_method("knots")
class Knots(MatrixMethod[KnotsOptions]):
    r"""Write all task vectors of a layer in one shared basis of its outputs, and merge the coordinates by TIES.

    1. :math:`[\tau_1 \dots \tau_T] = U \Sigma [V_1 \dots V_T]`: one SVD of the task vectors of a layer, side by side
       (d_out x T d_in).
    2. :math:`C_t = \Sigma V_t = U^T \tau_t` are the task's coordinates (k x d_in). Optionally each is dropped with
       probability p, and the others divided by 1 - p (DARE).
    3. TIES on the coordinates: keep the ``density`` share of largest magnitude of each task over ALL layers, elect
       signs by mass, average what agrees (see `Ties`).
    4. :math:`W = W_0 + \lambda U C`.

    Works on full task vectors as well as on adapters; from adapters, or where tasks leave a layer as it is, U comes
    from a QR of each :math:`A_t^T` and an SVD as thin as the ranks' sum, without forming a product. Without TIES the
    change of basis has no effect: with the sum of all coordinates it is Task Arithmetic. Cost: that one SVD a layer in
    float64 (of full task vectors: an eigenproblem of order d_out), and three passes for the thresholds, during which
    the bases of all layers are held in memory: for adapters little beside the model, for full task vectors about as
    much as a model or two.

    Source: Stoica et al., *Model merging with SVD to tie the KnOTS*, ICLR 2025 (arXiv 2410.19735); density 0.2 and
    scale 0.6 are its settings for ViT-B/32. Departures: singular values are cut relative to the largest of the layer
    (1e-5 there, whatever the layer); alpha / r is part of the task vectors; where the trimmed coordinates sum to zero
    nothing is merged (the code takes the overall majority's sign); all other parameters are averaged (the code leaves
    them as they are, which is the option ``others: base``).
    """

    summary = "TIES on the coordinates of the task vectors in a basis that the tasks share"
    source = "Stoica et al. 2025, arXiv 2410.19735"
    whole_model_pass = True
    held_models = 2  # the bases of all layers, where task vectors are full
    default_scale = 0.6
    Options = KnotsOptions

    def __init__(self, options: KnotsOptions | None = None) -> None:
        super().__init__(options)
        self._source: TaskVectors | None = None
        self._bases: dict[str, Tensor] = {}
        self._thresholds: dict[str, float] = {}

    def prepare(self, vectors: TaskVectors) -> Iterator[None]:
        """Find each task's trim threshold over the coordinates of all layers."""
        self._source, self._bases = vectors, {}
        self._thresholds = dict.fromkeys(vectors.tasks, 0.0)
        matrices = [parameter for parameter in vectors.parameters if parameter.is_matrix]
        if self.options.density == 1:
            return
        self._bases = {parameter.name: self._basis(parameter) for parameter in matrices}

        def blocks() -> Iterator[tuple[str, Tensor]]:
            for parameter in matrices:
                for task in vectors.tasks:
                    vector = parameter.as_matrix(vectors.vector(task, parameter))
                    yield task, self._coordinates(task, parameter, self._bases[parameter.name], vector)

        def kept(coordinates: int) -> list[int]:
            return [max(1, int(coordinates * self.options.density))] if coordinates else []

        found = yield from order_statistics(self.states, "coordinates", vectors.tasks, blocks, kept, magnitudes=True)
        self._thresholds = {task: next(iter(values), 0.0) for task, values in found.items()}

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """TIES on the coordinates, in the coordinates of the weight."""
        basis = self._bases.get(parameter.name)
        if basis is None:
            basis = self._basis(parameter)
        trimmed = []
        for task, vector in vectors.items():
            own = self._coordinates(task, parameter, basis, vector)
            trimmed.append(own.where(own.abs() >= self._thresholds[task], 0.0))
        merged: Tensor = basis @ disjoint_merge(trimmed, self.options.merge).to(basis)
        return merged

    def _coordinates(self, task: str, parameter: Parameter, basis: Tensor, vector: Tensor) -> Tensor:
        """A task's coordinates, after dropping, ``(k, d_in)``, float32."""
        pair = None if self._source is None else self._source.factors(task, parameter)
        if pair is None:
            own = (basis.T @ vector.to(basis.dtype)).float()
        else:
            own = (basis.T.double() @ pair[0] @ pair[1]).float()
        if not self.options.drop_rate:
            return own
        options = DareOptions(drop_rate=self.options.drop_rate, seed=self.options.seed)
        return drop_and_rescale(own, options, task=task, parameter=parameter.name)

    def _basis(self, parameter: Parameter) -> Tensor:
        """The shared directions of a layer's outputs, ``(d_out, k)``; float64 from adapters, else kept as float32."""
        source = self._source
        if source is None:
            raise RuntimeError("merge method 'knots' is asked before it was given the task vectors")
        pairs = {task: source.factors(task, parameter) for task in source.tasks}
        known = [pair for pair in pairs.values() if pair is not None]
        if known and all(pair is not None or source.is_zero(task, parameter) for task, pair in pairs.items()):
            return basis_of_factors(known, self.options.cut)
        height = parameter.matrix_shape[0]
        gram = torch.zeros(height, height, dtype=torch.float64)
        for task in source.tasks:
            vector = parameter.as_matrix(source.vector(task, parameter)).double()
            gram = gram.to(vector.device).addmm_(vector, vector.T)
        return basis_of_gram(gram, self.options.cut).float()


def basis_of_factors(pairs: list[Factors], cut: float) -> Tensor:
    """Left singular vectors of ``[B_1 A_1 ... B_T A_T]``, shape ``(d_out, k)``, float64.

    With ``A_t^T = Q_t R_t`` they are those of ``[B_1 R_1^T ... B_T R_T^T]``, because the ``Q_t`` are orthonormal.
    """
    thin = torch.cat([left @ torch.linalg.qr(right.T)[1].T for left, right in pairs], dim=1)
    vectors, values, _ = torch.linalg.svd(thin, full_matrices=False)
    shared: Tensor = vectors[:, values > values[:1] * cut].contiguous()
    return shared


def basis_of_gram(gram: Tensor, cut: float) -> Tensor:
    """Eigenvectors of ``sum_t tau_t tau_t^T``, which are the left singular vectors of the task vectors side by side.

    Args:
        gram: that sum, shape ``(d_out, d_out)``, float64.
        cut: as in `KnotsOptions`.

    Returns:
        Shape ``(d_out, k)``, float64.
    """
    eigen = symmetric_eigen(-gram)
    squares = -eigen.values
    # Squares below float64 rounding of the largest are nothing, however small the cut.
    floor = max(cut**2, len(squares) * torch.finfo(torch.float64).eps)
    count = int((squares > squares[:1].clamp(min=0) * floor).sum())
    return eigen.smallest(count) if count else gram.new_zeros(len(gram), 0)
