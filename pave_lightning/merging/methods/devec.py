"""DeVec: split task vectors into what they share and what is unique, and count what they share once more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.matrices import MatrixMethod, MatrixOptions
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.merging.registry import merge_method
from pave_lightning.subspace import leading_triplets
from pave_lightning.weights import Parameter


class DeVecOptions(MatrixOptions):
    """Options of DeVec."""

    others: Literal["mean", "sum", "base"] = Field(default="sum")
    """What becomes of parameters that are no matrix weights (embeddings, norms, biases): the mean or the sum of their
    task vectors, or the base's values."""
    energy: float = Field(default=0.9, gt=0, le=1)
    """Share of a task vector's squared singular values that its effective rank holds: with all of them, any two task
    vectors of full fine-tuning share every direction. LoRA updates have a low rank anyway."""
    overlap: float = Field(default=0.85, gt=0, lt=1)
    """How much of a direction must lie in each task's output space, at least, for it to be shared: the squared norm of
    its projection."""
    shared_weight: float = Field(default=1.0, ge=-1)
    """How often the shared parts count beside the task vectors: 1 is the source's rule for merging, 0 is Task
    Arithmetic, and -1 leaves only what is unique to the tasks."""


@merge_method("devec")
class DeVec(MatrixMethod[DeVecOptions]):
    r"""Task Arithmetic in which the parts of the task vectors that lie in directions common to all count once more.

    For a matrix weight, with :math:`U_t` the left singular vectors of :math:`\tau_t` up to its effective rank:

    1. :math:`Z`: eigenvectors of :math:`\frac{1}{T} \sum_t U_t U_t^T` with an eigenvalue above
       :math:`1 - (1 - o) / T`, where o is ``overlap``. All tasks together then lack less than 1 - o of such a
       direction, so each has more than o of it.
    2. Shared and unique part of a task vector: :math:`Z Z^T \tau_t` and :math:`\tau_t - Z Z^T \tau_t`.
    3. :math:`\Delta = \sum_t \tau_t + \sum_t Z Z^T \tau_t`: the shared parts are added as further task vectors.

    :math:`W = W_0 + \lambda \Delta`; all other parameters are added up. Needs no data. Cost: one symmetric eigenproblem
    of the smaller side a matrix and task, and one of order :math:`d_{out}` a matrix.

    Source: Damirchi et al., *Decomposing Task Vectors for Refined Model Editing*, 2025 (arXiv 2512.22511); no code is
    published. Departures: the source multiplies the projectors, and the product is not symmetric and depends on the
    order of the tasks, so their mean stands in for it, with a threshold that a direction which one task lacks cannot
    pass, as it cannot pass the source's 0.85 for the product. A direction has eigenvalue 1 of either if and only if it
    lies in all spaces. For two spaces at an angle a the product's eigenvalue is cos(a)^2, and the threshold here asks
    for cos(a) above 0.85, which is milder. How the source finds the effective rank, and which coefficients it merges
    with, is not known: the share of energy and Task Arithmetic's scale stand in.
    """

    summary = "sum of the task vectors in which directions common to all tasks count twice"
    source = "Damirchi et al. 2025, arXiv 2512.22511"
    default_scale = TaskArithmetic.default_scale
    Options = DeVecOptions

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The sum, with its shared part added as often as the options say."""
        total = torch.stack(list(vectors.values())).double().sum(dim=0)
        if not self.options.shared_weight:
            return total
        shared = shared_directions(list(vectors.values()), energy=self.options.energy, overlap=self.options.overlap)
        merged: Tensor = total + self.options.shared_weight * (shared @ (shared.T @ total))
        return merged


def shared_directions(matrices: Sequence[Tensor], *, energy: float, overlap: float) -> Tensor:
    r"""Output directions that lie in the column spaces of all matrices, or nearly so.

    The shared part of a matrix is its projection :math:`Z Z^T M`, the unique part is the rest.

    Args:
        matrices: of shape ``(m, n)`` each, any float dtype.
        energy: share of a matrix's squared singular values that its effective rank holds, in (0, 1].
        overlap: how much of a direction must lie in each of the column spaces, in (0, 1).

    Returns:
        Orthonormal columns, shape ``(m, k)``, float64; the most common ones first.
    """
    spaces = torch.cat([_column_space(matrix, energy) for matrix in matrices], dim=1)
    # The squared singular values of the bases side by side are the eigenvalues of the projectors' mean.
    common = leading_triplets(spaces / math.sqrt(len(matrices)))
    # What the spaces lack of a direction, summed over them, must be less than any one of them may lack.
    return common.left[:, common.values.square() > 1 - (1 - overlap) / len(matrices)]


def _column_space(matrix: Tensor, energy: float) -> Tensor:
    found = leading_triplets(matrix)
    held = found.values.square().cumsum(dim=0)
    # As many as are needed to reach the share; the tolerance is for rounding where that is all of them.
    rank = int((held < (energy - 1e-12) * held[-1:]).sum()) + 1
    return found.left[:, :rank]
