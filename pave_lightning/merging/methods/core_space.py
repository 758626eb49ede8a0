"""Core Space: merge adapters in the small space that all their factors span."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.merging.base import StaticMethod
from pave_lightning.merging.evidence import Evidence
from pave_lightning.merging.low_rank import Factors, LowRankMethod, adapted_tasks, quoted
from pave_lightning.merging.matrices import MatrixOptions
from pave_lightning.merging.methods.tsv import rank_of_share
from pave_lightning.merging.registry import make_method, merge_method
from pave_lightning.subspace import leading_triplets
from pave_lightning.weights import Parameter, ParameterKind, TaskVectors


class CoreSpaceOptions(MatrixOptions):
    """Options of Core Space merging."""

    inner: Literal["tsv_m", "iso_c", "ties", "task_arithmetic"] = "tsv_m"
    """The method by which the core matrices are merged, each layer for itself."""
    inner_options: dict[str, Any] = Field(default_factory=dict)
    """Options of that method, such as density for ties (the paper begins its search at 0.3)."""


class CoreVectors(TaskVectors):
    """The core matrices of one layer, as task vectors of a base that is zero.

    Args:
        cores: each task's core matrix, all of one shape.
    """

    def __init__(self, cores: Mapping[str, Tensor]) -> None:
        self._cores = {task: core.float() for task, core in cores.items()}
        shape = tuple(next(iter(self._cores.values())).shape)
        self.tasks = tuple(cores)
        self.parameter = Parameter("core", ParameterKind.LINEAR, shape, 1)
        self.parameters = (self.parameter,)

    def base(self, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """Zeros."""
        return torch.zeros_like(self.expert(self.tasks[0], parameter, rows))

    def expert(self, task: str, parameter: Parameter, rows: slice | None = None) -> Tensor:
        """A task's core matrix."""
        return self._cores[task] if rows is None else self._cores[task][rows]


@merge_method("core_space")
class CoreSpace(LowRankMethod[CoreSpaceOptions]):
    r"""Express all adapters of a layer in bases that they share, merge the small matrices, and go back.

    For a layer with the factors :math:`B_t` (d_out x r_t) and :math:`A_t` (r_t x d_in), R the sum of all ranks:

    1. :math:`U` holds the left singular vectors of :math:`[B_1 \dots B_T]` (d_out x R), :math:`V` the right ones of
       :math:`[A_1; \dots; A_T]` (R x d_in): at most R orthonormal directions each.
    2. :math:`M_t = U^T B_t A_t V` is at most R x R and loses nothing: :math:`U M_t V^T = B_t A_t`.
    3. The method ``inner`` merges the :math:`M_t`: ``tsv_m`` or ``iso_c`` as they are, ``ties`` with a threshold for
       each layer, ``task_arithmetic`` (which gives what it gives without all this).
    4. :math:`W = W_0 + \lambda U M V^T`, where :math:`\lambda` is the scale, 1 as for the first three inner methods;
       ``task_arithmetic`` adds up and wants about 0.3.

    Ranks may differ between tasks, and a task that does not adapt a layer takes part with zeros. Where no task has
    adapters (task vectors that were low-rank but are known as full matrices only), the factors come from the singular
    triplets of each task vector; its rank must then be below half of the smaller side. Cost: two thin SVDs of R vectors
    a layer in float64, plus the inner method on R x R matrices: no decomposition of a full weight.

    Source: Panariello et al., *Accurate and Efficient Low-Rank Model Merging in Core Space*, NeurIPS 2025
    (arXiv 2509.17786); the scale is searched on validation data there, 0.1 to 10. Departures: the published code leaves
    alpha / r out, which is part of :math:`B_t` here; ``ties`` merges nothing where the trimmed values sum to zero; the
    inner methods DARE and CART, and making the result isotropic after another method, are not there.
    """

    summary = "merge adapters by another method, in the small space that their factors span"
    source = "Panariello et al. 2025, arXiv 2509.17786"
    Options = CoreSpaceOptions

    def __init__(self, options: CoreSpaceOptions | None = None) -> None:
        super().__init__(options)
        self._adapters_known = True
        if "others" in self.options.inner_options:
            raise PaveError(
                "core_space: inner_options.others would change nothing, as the inner method sees core matrices alone; "
                "set options.others"
            )
        self._inner()  # tells wrong options at once

    def _inner(self) -> StaticMethod:
        return cast(StaticMethod, make_method(self.options.inner, self.options.inner_options))

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Experts some of which are adapters and others not; layers too narrow for the inner method."""
        yield from super().problems(vectors, evidence)
        without = {task: vectors.without_factors(task) for task in vectors.tasks}
        lacking = [task for task in vectors.tasks if without[task] is not None]
        if lacking and len(lacking) < len(vectors.tasks):
            yield (
                f"{quoted(lacking)} {'has' if len(lacking) == 1 else 'have'} no low-rank adapters, but the other tasks "
                f"have ({without[lacking[0]]}); merge experts of one kind, or use the inner method itself"
            )
            return
        by_name = {parameter.name: parameter for parameter in vectors.parameters}
        for name, tasks in adapted_tasks(vectors).items():
            pairs = [vectors.factors(task, by_name[name]) for task in tasks]
            rank = sum(len(pair[1]) for pair in pairs if pair is not None)
            problem = self._too_narrow(name, min(rank, *by_name[name].matrix_shape), len(vectors.tasks))
            if problem:
                yield problem

    def prepare(self, vectors: TaskVectors) -> None:
        """Find the adapted layers, or see that there are no adapters at all."""
        self._adapters_known = any(vectors.without_factors(task) is None for task in vectors.tasks)
        super().prepare(vectors)

    def covers(self, parameter: Parameter) -> bool:
        """Whether an adapter adapts the parameter; without adapters, whether it is a matrix weight."""
        return super().covers(parameter) if self._adapters_known else parameter.is_matrix

    def merge_matrix(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """The inner method on the core matrices, in the coordinates of the weight."""
        pairs = self.factors(parameter) if self._adapters_known else _numerical_factors(parameter, vectors)
        if not any(bool(left.any()) and bool(right.any()) for left, right in pairs.values()):
            return torch.zeros_like(base)
        left, right = joint_bases(list(pairs.values()))
        problem = self._too_narrow(parameter.name, min(left.shape[1], len(right)), len(vectors))
        if problem:
            raise PaveError(f"merge method '{self.name}': {problem}")
        zeros = left.new_zeros(left.shape[1], len(right))
        cores = {
            task: (left.T @ pairs[task][0]) @ (pairs[task][1] @ right.T) if task in pairs else zeros for task in vectors
        }
        source, inner = CoreVectors(cores), self._inner()
        inner.prepare_alone(source)
        merged = inner.merge(source.parameter, *source.read(source.parameter))
        product: Tensor = left @ merged.double() @ right
        return product

    def _too_narrow(self, name: str, width: int, tasks: int) -> str | None:
        if self.options.inner != "tsv_m":
            return None
        spanned = f"{name}: the adapters span {width} directions"
        if width < tasks:
            return f"{spanned}, which tsv_m cannot split among {tasks} tasks; choose another inner method"
        kept = rank_of_share(width, self.options.inner_options.get("rank_share"), tasks)
        if kept < 1:
            return f"{spanned}, of which tsv_m would keep none; raise inner_options.rank_share"
        if kept * tasks > width:
            return (
                f"{spanned}, fewer than the {kept} that tsv_m would keep of each of {tasks} tasks; lower "
                "inner_options.rank_share"
            )
        return None


def joint_bases(pairs: list[Factors]) -> tuple[Tensor, Tensor]:
    """Orthonormal columns ``(d_out, k)`` that span all B, and orthonormal rows ``(l, d_in)`` that span all A."""
    left, _, _ = torch.linalg.svd(torch.cat([pair[0] for pair in pairs], dim=1), full_matrices=False)
    _, _, right = torch.linalg.svd(torch.cat([pair[1] for pair in pairs], dim=0), full_matrices=False)
    return left, right


def _numerical_factors(parameter: Parameter, vectors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Factors of task vectors that are known as matrices only: singular vectors with the roots of the values."""
    pairs = {}
    for task, vector in vectors.items():
        found = leading_triplets(vector)
        if 2 * len(found.values) >= min(vector.shape):
            raise PaveError(
                f"core_space merges adapters, but task '{task}' has none, and its task vector of {parameter.name} has "
                f"rank {len(found.values)} of {min(vector.shape)}, no low one (below half would do); use the inner "
                "method itself"
            )
        root = found.values.sqrt()
        pairs[task] = found.left * root, root[:, None] * found.right
    return pairs
