"""ESM: keep of each update the output directions that it moves most on real inputs, and make them orthogonal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.evidence import Evidence, Need
from pave_lightning.merging.matrices import MatrixMethod, MatrixOptions, combined
from pave_lightning.merging.methods.tsv import too_few_outputs
from pave_lightning.merging.registry import merge_method
from pave_lightning.subspace import polar_factor
from pave_lightning.subspace.ridge import TOLERANCE
from pave_lightning.subspace.solver import symmetric_eigen
from pave_lightning.weights import ADDITIVE, Parameter, TaskVectors


class EsmOptions(MatrixOptions):
    """Options of ESM."""

    scale_tasks: bool = True
    """Multiply each task's part with its squared norm relative to the tasks' mean."""
    scale_inputs: bool = True
    """Multiply each input's column with its squared norm relative to the columns' mean."""
    scale_layers: bool = True
    """Multiply each layer's update with its squared norm relative to the mean of all layers of its kind."""
    norm_of: Literal["kept", "whole"] = "kept"
    """Which norm of a task's update scale_tasks takes: of the directions that are kept (the paper), or of the whole
    update (the published code)."""
    eigenvalue_exponent: float = Field(default=0.0, ge=0)
    """Before they are made orthogonal, a task's directions are weighted with their share of its output changes to this
    power. 0 weighs them alike (the paper); the published code has 0.15."""
    magnitude: Literal["kept", "unit"] = "kept"
    """What becomes of sizes when directions are made orthogonal: multiplied with the mean singular value (the published
    code), or all singular values become 1 (the paper), whatever the size of the task vectors; then the scale has to be
    searched."""
    biases: Literal["mean", "base"] | None = None
    """What becomes of biases, those of norms included: the mean of their task vectors, or the base's values, as in the
    published code for RoBERTa. Where nothing is said, what ``others`` says."""


@merge_method("esm")
class Esm(MatrixMethod[EsmOptions]):
    r"""Merge in the directions that the updates move most on the tasks' own inputs.

    For each matrix weight (``d_out x d_in``), with :math:`C_t` the second moment of its inputs inside expert t:

    1. The k = d_out / T leading eigenvectors :math:`P_t` of :math:`\tau_t C_t \tau_t^T`, the second moment of the
       output changes, and coordinates :math:`A_t = P_t^T \tau_t`. Directions along which the outputs do not change are
       left out, so k may be smaller.
    2. Three scalings by squared relative norms: :math:`A_t` by :math:`(\|A_t\| / \mathrm{mean}_s \|A_s\|)^2`; then each
       column j of the stacked A by :math:`(\|A_{:j}\| / \mathrm{mean}_i \|A_{:i}\|)^2`; and, once all layers are
       merged, :math:`\Delta` by :math:`(\|\Delta\| / \mathrm{mean}\|\Delta\|)^2` over layers of one kind: those whose
       names differ in numbers only, and whose shapes are equal.
    3. :math:`\Delta = \mathrm{polar}([P_1 .. P_T])\, \mathrm{polar}([A_1; ..; A_T])`, each factor times the mean of the
       singular values that it had, and :math:`W = W_0 + \lambda \Delta`.

    A task none of whose examples reached a layer has no directions in it; where no task has, the layer gets the mean.

    Needs the second moments of all inputs (``capture.moments: input``). Cost: one eigenvalue problem of the smaller
    side a task and layer, and two polar factors a layer; merged task vectors are held until all layers are done.

    Source: *Model Merging in the Essential Subspace*, CVPR 2026 (arXiv 2602.20208). It tunes the scale on validation
    data. Departures: the mean singular values in step 3 are the published code's, the paper has the plain polar factors
    (``magnitude: unit``), whose product has the same size however little the experts moved, so that no scale fits
    without a search; the moments are those of all captured rows, not of 32 inputs; all matrix weights are treated
    alike; no part of a polar factor is made up for directions that are not there; fewer than two outputs for each task
    are refused.

    The published code for RoBERTa is ``eigenvalue_exponent: 0.15``, ``scale_tasks: false``, ``scale_inputs: false`` and
    ``biases: base``, but that it merges embeddings as `TsvMerge` does. That for ViT is ``norm_of: whole``,
    ``eigenvalue_exponent: 0.15`` and twice the scale as far as the matrices of MLPs and the inputs of attention go; it
    multiplies only those with the scale, and adds all else once, attention outputs and tables merged as `TsvMerge`
    does, which no options give here.
    """

    summary = "orthogonal directions that the updates move most on real inputs"
    source = "Model Merging in the Essential Subspace 2026, arXiv 2602.20208"
    needs = frozenset({Need.INPUT_MOMENTS})
    rescales = True
    held_models = 1
    Options: ClassVar[type[EsmOptions]] = EsmOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Matrices that have too few outputs for so many tasks."""
        yield from super().problems(vectors, evidence)
        yield from self.refusals(vectors, too_few_outputs)

    def prepare(self, vectors: TaskVectors) -> None:
        """Forget the norms of the last merge."""
        self._norms: dict[str, float] = {}
        norms: dict[str, list[float]] = {}
        self._groups = self.states.add("norms of each kind of layer", norms, "concatenate")

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The merged update before it is compared with those of other layers."""
        parts = [
            self._essential(vectors[task], moment, parameter.matrix_shape[0] // len(vectors))
            for task, moment in self.evidence.input_moments(vectors, parameter)
        ]
        if not parts:
            return torch.stack(list(vectors.values())).mean(dim=0)
        merged = self._orthogonal(parts)
        self._norms[parameter.name] = float(merged.norm())
        self._groups.value.setdefault(kind_of_layer(parameter), []).append(self._norms[parameter.name])
        return merged

    def merge_other(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """Biases as the options say, all else as for other methods."""
        own = self.options.biases if parameter.kind in ADDITIVE else None
        return combined(own or self.options.others, base, vectors)

    def factor(self, parameter: Parameter) -> float:
        """The squared norm of a layer's update, relative to the mean of its kind."""
        norm = self._norms.get(parameter.name)
        if norm is None or not self.options.scale_layers:
            return 1.0
        group = self._groups.value[kind_of_layer(parameter)]
        mean = math.fsum(group) / len(group)
        return (norm / mean) ** 2 if mean > 0 else 1.0

    def _essential(self, vector: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
        """Directions ``(d_out, k)``, coordinates ``(k, d_in)``, and the norm that the task is scaled by."""
        full = vector.double()
        directions, values = essential_directions(full, moment, rank)
        coordinates = directions.T @ full
        norm = float(full.norm() if self.options.norm_of == "whole" else coordinates.norm())
        if self.options.eigenvalue_exponent and len(values):
            shares = (values / values.mean()) ** self.options.eigenvalue_exponent
            shares = shares / shares.mean()
            return directions * shares, coordinates * shares[:, None], norm
        return directions, coordinates, norm

    def _orthogonal(self, parts: list[tuple[Tensor, Tensor, float]]) -> Tensor:
        norms = torch.tensor([norm for _, _, norm in parts], dtype=torch.float64)
        shares = _squared_relative(norms) if self.options.scale_tasks else torch.ones_like(norms)
        directions = torch.cat([left for left, _, _ in parts], dim=1)
        coordinates = torch.cat([share * right for share, (_, right, _) in zip(shares, parts, strict=True)])
        if self.options.scale_inputs:
            coordinates = coordinates * _squared_relative(coordinates.norm(dim=0))
        product: Tensor = self._polar(directions) @ self._polar(coordinates)
        return product

    def _polar(self, matrix: Tensor) -> Tensor:
        factor = polar_factor(matrix)
        if self.options.magnitude == "unit" or not matrix.numel():
            return factor
        # The inner product of a matrix with its polar factor is the sum of its singular values.
        return factor * (float((factor * matrix).sum()) / min(matrix.shape))


def essential_directions(update: Tensor, moment: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The output directions that an update moves most on its inputs, and the mean squares of these movements.

    Args:
        update: shape ``(d_out, d_in)``, float64.
        moment: second moment of the inputs, ``(d_in, d_in)``, float64.
        count: how many directions at most; those along which nothing moves are left out.

    Returns:
        Orthonormal columns, ``(d_out, k)``, and ``k`` values, largest first.
    """
    basis, inside = None, update
    if len(update) > update.shape[1]:
        # All outputs lie in the update's column space, which has no more dimensions than there are inputs.
        basis, inside = torch.linalg.qr(update)
    changes = inside @ moment @ inside.T
    eigen = symmetric_eigen(-(changes + changes.T) / 2)
    values = -eigen.values[:count]
    values = values[values > TOLERANCE * values[:1].clamp(min=0)]
    directions = eigen.smallest(len(values)) if len(values) else inside.new_empty(len(inside), 0)
    return (directions if basis is None else basis @ directions), values


def kind_of_layer(parameter: Parameter) -> str:
    """What layers of one kind have in common: their name without its numbers, and their shape."""
    words = [word for word in parameter.layer.split(".") if not word.isdigit()]
    return f"{'.'.join(words)} {parameter.matrix_shape}"


def _squared_relative(norms: Tensor) -> Tensor:
    """Squares of norms relative to their mean; ones where all are zero."""
    mean = norms.mean() if norms.numel() else norms.sum()
    return (norms / mean) ** 2 if float(mean) > 0 else torch.ones_like(norms)
