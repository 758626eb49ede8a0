"""Task singular vectors: merge the tasks' leading singular directions, or keep them for each task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.merging.base import Cost, MethodOptions, Modulated, PerTaskMethod
from pave_lightning.merging.evidence import Evidence
from pave_lightning.merging.matrices import MatrixMethod, TableOptions
from pave_lightning.merging.modulators import LowRank
from pave_lightning.merging.registry import merge_method
from pave_lightning.subspace import leading_triplets, polar_factor
from pave_lightning.weights import Parameter, TaskVectors

SPLIT_LESS = "merge fewer tasks, or use a method that splits no ranks"


def rank_of_share(directions: int, share: float | None, tasks: int) -> int:
    """How many of a matrix's singular directions each task keeps.

    Args:
        directions: how many there are, the smaller side of the matrix.
        share: the share that a task keeps; an equal part of them where None.
        tasks: number of tasks.
    """
    # Shares such as 0.29 are no binary fractions: 0.29 of 100 must be 29.
    return directions // tasks if share is None else math.floor(directions * share + 1e-9)


def too_few_outputs(parameter: Parameter, tasks: int) -> str | None:
    """Why the output directions of a matrix weight cannot be split among so many tasks; None if they can.

    What is said follows the name and the shape of the matrix, as in `MatrixMethod.refusals`.
    """
    height, _ = parameter.matrix_shape
    if height < 2 * tasks:
        return f"its {height} outputs are fewer than two for each of {tasks} tasks; {SPLIT_LESS}"
    return None


def too_narrow(parameter: Parameter, tasks: int, rank: int | None = None) -> str | None:
    """Why the singular directions of a matrix weight cannot be split among so many tasks; as `too_few_outputs`.

    Args:
        parameter: the matrix weight.
        tasks: number of tasks.
        rank: how many directions each task keeps; an equal part of them where None.
    """
    height, width = parameter.matrix_shape
    directions = min(height, width)
    if directions < tasks:
        return f"its {directions} singular directions cannot be split among {tasks} tasks; {SPLIT_LESS}"
    if rank is not None and rank * tasks > directions and height >= 2 * tasks:
        return (
            f"{rank} singular directions for each of {tasks} tasks are more than its {directions}; keep at most "
            f"{directions // tasks} for each, or merge fewer tasks"
        )
    return too_few_outputs(parameter, tasks)


class TsvMergeOptions(TableOptions):
    """Options of TSV-Merge."""

    rank_share: float | None = Field(default=None, gt=0, le=1)
    """Share of its singular directions that each task keeps of a matrix; one divided by the number of tasks where
    nothing is said, and not more than that: directions of several tasks could not be made orthogonal."""


@merge_method("tsv_m")
class TsvMerge(MatrixMethod[TsvMergeOptions]):
    r"""Keep each task's leading singular directions, make them orthogonal across tasks, and add up.

    For a matrix weight with :math:`r = \min(d_{out}, d_{in})` singular directions and T tasks:

    1. :math:`\tau_t \approx U_t S_t V_t^T`, cut to the :math:`q = \lfloor r / T \rfloor` leading singular triplets.
    2. :math:`\bar U = \mathrm{polar}([U_1 \dots U_T])` and :math:`\bar V = \mathrm{polar}([V_1 \dots V_T])`: the
       nearest matrices with orthonormal columns, where :math:`\mathrm{polar}(A) = P Q^T` of
       :math:`A = P \Sigma Q^T`.
    3. :math:`\Delta = \bar U \, \mathrm{diag}(S_1 \dots S_T) \, \bar V^T`.

    All other parameters are averaged, and the scale multiplies them too: :math:`W = W_0 + \alpha \Delta`. Needs no
    data. Cost: one symmetric eigenproblem of order r a matrix and task, and two of order qT a matrix.

    Source: Gargiulo et al., *Task Singular Vectors*, CVPR 2025 (arXiv 2412.00081). The published code searches the
    scale on validation data, 0.1 to 3.0; 1 is what a common library takes. Departures: embeddings are averaged unless
    ``embeddings`` is true (the code decomposes every two-dimensional tensor); where directions of several tasks
    coincide, the polar factor is a partial isometry instead of being filled up with arbitrary directions, which would
    carry the tasks' singular values; singular directions that are nothing but float32 rounding are left out; q is exact
    where the code's floating-point 1/T may lose one; matrices with fewer than two outputs a task are refused, where the
    code needs one of each side.
    """

    summary = "leading singular directions of all tasks, made orthogonal, added up"
    source = "Gargiulo et al. 2025, arXiv 2412.00081"
    Options = TsvMergeOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Matrices that have too few singular directions."""
        yield from super().problems(vectors, evidence)
        yield from self.refusals(vectors, self.misfit)

    def misfit(self, parameter: Parameter, tasks: int) -> str | None:
        """It has too few singular directions."""
        directions, share = min(parameter.matrix_shape), self.options.rank_share
        rank = rank_of_share(directions, share, tasks)
        problem = too_narrow(parameter, tasks, rank)
        if problem is None and not rank:
            return f"of its {directions} singular directions the share {share:g} leaves none; raise rank_share"
        return problem

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """Orthogonalised singular directions of all tasks with their own singular values."""
        rank = rank_of_share(min(base.shape), self.options.rank_share, len(vectors))
        parts = [leading_triplets(vector, rank) for vector in vectors.values()]
        left = polar_factor(torch.cat([part.left for part in parts], dim=1))
        right = polar_factor(torch.cat([part.right for part in parts], dim=0))
        merged: Tensor = (left * torch.cat([part.values for part in parts])) @ right
        return merged


class TsvCompressOptions(MethodOptions):
    """Options of TSV-Compress."""

    rank_share: float | None = Field(default=None, gt=0, le=1)
    """Share of its singular directions that each task keeps of a matrix, at least one; one divided by the number of
    tasks where nothing is said."""


@merge_method("tsv_c")
class TsvCompress(PerTaskMethod[TsvCompressOptions]):
    r"""Keep each task's own task vector, every matrix of it cut to its leading singular triplets.

    Task t runs with :math:`W_0 + U_t S_t V_t^T`, the :math:`q = \lfloor r / T \rfloor` leading singular triplets of
    :math:`\tau_t`, where r is the smaller side; so the task of an input must be known. Nothing is shared between tasks
    but the base, so any number of tasks and any share will do. What is neither a matrix nor a table (norms, biases) is
    kept as it is.

    Needs no data. Cost: one symmetric eigenproblem of order r a matrix and task. Storage for each task: q times the
    sum of both sides a matrix, which for square ones is 2/T of the task vector.

    Source: Gargiulo et al., *Task Singular Vectors*, CVPR 2025 (arXiv 2412.00081). Departures: singular values are
    multiplied into the left factor, which changes nothing; a matrix with fewer directions than there are tasks keeps
    one direction, of which the published code keeps none; kernels of convolutions that are matrix products count as
    matrices; singular directions that are nothing but float32 rounding are left out.
    """

    summary = "each task's own vector, its matrices cut to their leading singular directions"
    source = "Gargiulo et al. 2025, arXiv 2412.00081"
    cost = Cost.DECOMPOSITION
    Options = TsvCompressOptions

    def prepare(self, vectors: TaskVectors) -> None:
        """Note the tasks."""
        self._tasks = vectors.tasks

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Modulated:
        """Nothing shared, and each task's factors."""
        whole = not parameter.is_matrix and base.dim() != 2
        factors = {
            task: _whole(vector) if whole else self._compressed(vector, len(vectors))
            for task, vector in vectors.items()
        }
        return Modulated(torch.zeros_like(base), factors=factors)

    def kept_bytes(self, parameter: Parameter, tasks: int) -> int:
        """The factors of a parameter, float32; the parameter itself where it is kept exactly."""
        if len(parameter.shape) != 2 and not parameter.is_matrix:
            return 4 * parameter.elements
        height, width = parameter.matrix_shape if parameter.is_matrix else parameter.shape
        return 4 * max(1, rank_of_share(min(height, width), self.options.rank_share, tasks)) * (height + width)

    def _compressed(self, vector: Tensor, tasks: int) -> LowRank:
        # The leading triplets of a matrix and of its transpose are the same, so it stays as it is stored.
        matrix = vector.flatten(1)
        kept = leading_triplets(matrix, max(1, rank_of_share(min(matrix.shape), self.options.rank_share, tasks)))
        return LowRank((kept.left * kept.values).float(), kept.right.float())

    def rescalers(self) -> dict[str, float]:
        """One for each task."""
        return dict.fromkeys(self._tasks, 1.0)


def _whole(vector: Tensor) -> LowRank:
    """A tensor of any shape as the product of one column and the number one."""
    return LowRank(vector.reshape(-1, 1), torch.ones(1, 1))
