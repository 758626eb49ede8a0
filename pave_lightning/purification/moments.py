"""Which second moment ranks the directions of a task's layer, and whether it can be one."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.purification.options import Purify
from pave_lightning.purification.origin import origin_problems
from pave_lightning.statistics import LayerMoment, TaskStatistics
from pave_lightning.statistics.storage import again
from pave_lightning.subspace import is_finite, moment_shape
from pave_lightning.weights import Parameter, TaskVectors
from pave_lightning.weights.matrices import Matrix

# What float32 may cost an eigenvalue of a moment, relative to the largest diagonal entry and the width. Below the
# smallest width, adding up rows costs more than storing the sum.
ROUNDING = 2.0**-23
SMALLEST_WIDTH = 32
# A cross moment A = W C belongs to W if A W^T is symmetric; half-precision passes blur it by some percent.
ASYMMETRY = 0.1
PROBES = 8


class MomentSource:
    """Gives the second moment by which a layer of a task is purified.

    Args:
        source: plain task vectors.
        statistics: what each task's expert saw.
        options: which moments are asked for.
        tasks: the tasks that are purified.
    """

    def __init__(
        self, source: TaskVectors, statistics: Mapping[str, TaskStatistics], options: Purify, tasks: Sequence[str]
    ) -> None:
        self.source, self.statistics, self.options, self.tasks = source, statistics, options, tasks
        # Task and layer under whose name a matrix is stored, of those that were found to be moments: names alone.
        self._checked: set[tuple[str, str]] = set()

    def owner(self, task: str) -> str:
        """The task whose statistics a task is purified by: its own, or the next one in order."""
        if self.options.statistics != "other_task":
            return task
        return self.source.tasks[(self.source.tasks.index(task) + 1) % len(self.source.tasks)]

    def moment(self, task: str, parameter: Parameter, matrix: Matrix, weight: Tensor) -> LayerMoment | str | None:
        """The moment; None where the metric needs none; a reason in words where the layer has no subspace.

        Args:
            task: the task.
            parameter: a weight.
            matrix: the matrix of it that is asked for.
            weight: the task's fine-tuned weight of it, shape ``(d_out, d_in)``.

        Raises:
            PaveError: the moment cannot be one, or belongs to another weight.
        """
        if self.options.metric == "identity":
            return None
        if self.options.statistics == "random":
            part = "" if matrix.name == parameter.layer else f"/{matrix.name}"
            return random_moment(weight.shape[1], f"{task}/{parameter.name}{part}")
        if self.options.statistics == "task_vector":
            return row_moment(matrix.of(self.source.vector(task, parameter, matrix.rows)))
        owner = self.owner(task)
        statistics = self.statistics[owner]
        if matrix.layer not in statistics:
            return statistics.why_unreached(matrix.layer)
        found = _of_outputs(statistics[matrix.layer], matrix)
        if not bool(found.matrix.any()):
            return "all its outputs were zero" if found.kind in ("cross", "output") else "all its inputs were zero"
        # A cross moment belongs to one weight; any other kind may be shared by layers that read the same input.
        key = (owner, statistics.owner(matrix.layer))
        if found.kind == "cross" or key not in self._checked:
            reason = _impossible(found, weight, finite=statistics.file is not None)
            if reason:
                raise PaveError(
                    f"task '{owner}': the second moment of {matrix.layer} {reason}: "
                    f"{again(statistics.file, 'the statistics of this very expert')}"
                )
            self._checked.add(key)
        return found

    def problems(self, layers: Sequence[Parameter]) -> Iterator[str]:
        """What keeps the statistics from fitting the experts, from their headers alone."""
        if not self.options.reads_statistics:
            return
        heights: dict[str, int] = {}
        widths: dict[str, int] = {}
        for matrix in (matrix for parameter in layers for matrix in parameter.matrices):
            # Of a layer whose weight is stored in parts, the parts together are as high as it is.
            end = matrix.shape[0] if matrix.of_layer is None else _end(matrix)
            heights[matrix.layer] = max(heights.get(matrix.layer, 0), end)
            widths[matrix.layer] = matrix.shape[1]
        if self.options.statistics == "other_task" and len(self.source.tasks) < 2:
            yield f"statistics: other_task needs another task than '{self.source.tasks[0]}', but there is none"
            return
        for task in dict.fromkeys(self.owner(task) for task in self.tasks):
            if task not in self.statistics:
                yield f"task '{task}' has no captured statistics; capture them first"
                continue
            statistics = self.statistics[task]
            for problem in origin_problems(self.source, task, statistics, layers):
                yield f"task '{task}': {problem}"
            for layer in statistics.layers():
                if layer in heights:
                    yield from self._layer_problems(task, layer, (heights[layer], widths[layer]), statistics)

    def _layer_problems(
        self, task: str, layer: str, shape: tuple[int, int], statistics: TaskStatistics
    ) -> Iterator[str]:
        kind, found = statistics.kind(layer), statistics.shape(layer)
        expected = moment_shape(kind, shape, rows=found[0])
        if found != expected:
            yield f"task '{task}': the moment of {layer} is {list(found)}, expected {list(expected)}"
        if kind == "output" and self.options.metric != "root":
            yield (
                f"task '{task}': {layer} has the second moment of its output, which serves the metric root alone; "
                "capture with moments: smallest"
            )
        if self.options.needs_inputs and kind in ("cross", "output"):
            yield (
                f"task '{task}': {self.options.needs_inputs} needs the second moment of the input of {layer}, but what "
                "was captured holds the expert's own weight; capture with moments: input"
            )


def _end(matrix: Matrix) -> int:
    rows = matrix.of_layer
    return 0 if rows is None else rows.start + rows.period * (rows.repeats - 1) + rows.size


def _of_outputs(moment: LayerMoment, matrix: Matrix) -> LayerMoment:
    """The moment of a layer as that of some of its outputs."""
    if matrix.of_layer is None or moment.kind not in ("cross", "output"):
        return moment
    found = moment.matrix[matrix.of_layer.index]
    if moment.kind == "output":
        found = found[:, matrix.of_layer.index]
    return LayerMoment(moment.kind, found.contiguous(), moment.rows, moment.seen)


def random_moment(width: int, seed: str) -> LayerMoment:
    """The second moment of Gaussian noise: knowledge of nothing, for ablation.

    Args:
        width: ``d_in``.
        seed: any text; equal texts give equal noise.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    rows = torch.randn(2 * width, width, generator=generator)
    return LayerMoment("input", rows.T @ rows / len(rows), len(rows))


def row_moment(vector: Tensor) -> LayerMoment | str:
    """The second moment of a task vector's rows, scaled to a mean of 1 on its diagonal: a stand-in that needs no data.

    The rows of an update are sums of the layer's inputs during fine-tuning, weighted by gradients, so that their second
    moment resembles the one of the inputs. Source: the covariance of ACE-Merging (arXiv 2603.02945), here uncentred.

    Args:
        vector: the task vector as ``(d_out, d_in)``.
    """
    rows = vector.double()
    moment = rows.T @ rows
    scale = float(moment.diagonal().mean())
    return LayerMoment("input", (moment / scale).float(), len(rows)) if scale > 0 else "its task vector is zero"


def _impossible(moment: LayerMoment, weight: Tensor, *, finite: bool) -> str | None:
    """Why a moment cannot be what it says it is; ``finite`` where it was looked through for NaN when it was read."""
    matrix = moment.matrix
    if not finite and not is_finite(matrix):
        return "holds NaN or infinity"
    if moment.kind == "rows":
        return None
    if moment.kind == "cross":
        # A W^T is symmetric if it is symmetric on random vectors, which costs no matrix product.
        probes = torch.randn(len(weight), PROBES, generator=torch.Generator().manual_seed(0))
        one, other = matrix @ (weight.T @ probes), weight @ (matrix.T @ probes)
        differs = float((one - other).norm()) > ASYMMETRY * float(one.norm())
        return "is not that of this expert's weight (W C W^T is not symmetric)" if differs else None
    # Captured ones are symmetric bit for bit; those that were computed elsewhere may be rounded.
    if not torch.equal(matrix, matrix.T):
        wide = matrix.double()
        if not torch.allclose(wide, wide.T, rtol=1e-3, atol=float(wide.abs().max()) * 1e-5):
            return "is not symmetric"
    shifted = matrix.double()  # a copy: moments are float32
    shifted.diagonal().add_(ROUNDING * max(len(matrix), SMALLEST_WIDTH) * float(matrix.diagonal().abs().max()))
    return "is not positive semi-definite" if int(torch.linalg.cholesky_ex(shifted)[1]) else None
