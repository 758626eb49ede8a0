"""What purification and merging will take: memory, time and disk, from the headers of the files alone."""

from __future__ import annotations

import math
import platform
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import nlargest
from pathlib import Path

import torch
from torch import Tensor

from pave_lightning import purification, subspace
from pave_lightning.merging.base import MergeMethod, PerTaskMethod
from pave_lightning.purification.moments import random_moment, row_moment
from pave_lightning.purification.options import Purify
from pave_lightning.purification.vectors import batches, layers_at_once
from pave_lightning.statistics import Moments, captured_kind
from pave_lightning.subspace import MomentKind, in_parallel, knowledge_spectrum, project
from pave_lightning.system.processes import usable_cores
from pave_lightning.weights import Parameter, ParameterKind
from pave_lightning.weights.memory import resident_bytes
from pave_lightning.weights.remembered import remembered
from pave_lightning.weights.task_vectors import BLOCK_ELEMENTS
from pave_lightning.weights.writing import SHARD_BYTES, SMALL_SHARD_BYTES

Shape = tuple[int, int]

# Packing buffers and stack that BLAS and LAPACK keep for a thread once it has multiplied matrices.
THREAD_BYTES = 16_000_000
# Tensors of a block that a method has at a time for each task: task vector, stack, and what it makes of them.
METHOD_TENSORS = 4
# Synthetic solves take no more multiplications than this, so that all shapes of a model are timed in about a second.
# The full decompositions of ``exact`` take many more than are counted.
TIMED_WORK = 5 * 384**3
TIMED_WORK_EXACT = TIMED_WORK // 8
# Each is timed at least twice, because the first solve also loads libraries, and small ones as often as fit in here.
TIMED_SECONDS, TIMED_TIMES = 0.1, 5
ASSUMED_RHO = 0.97
# For how long times are kept for other plans on this machine, which may be busier or idler later.
KEPT_SECONDS = 60 * 60
# Ratios are timed in steps of this share, because neighbours take the same time.
RHO_STEPS = 16


@dataclass(frozen=True)
class LayerCost:
    """What purifying all matrix weights of one shape takes.

    Attributes:
        options: the purification.
        shape: ``(d_out, d_in)``.
        kind: which second moment their layers have; None where none is needed.
        layers: how many weights there are a task.
        tasks: how many tasks are purified.
        seconds: all of them together; NaN where it was not timed.
        peak_bytes: what purifying as many of them as go together, for all tasks, holds in memory at its highest,
            writers aside.
    """

    options: Purify
    shape: Shape
    kind: MomentKind | None
    layers: int
    tasks: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class PredictedCost:
    """What purification and merging take.

    Attributes:
        baseline_bytes: what this process holds now; a process that does the work begins with as much.
        peak_bytes: the highest memory of a process that purifies and merges, baseline included.
        disk_bytes: what all results take on disk.
        layers: every purification in turn, by shape, the slowest first.
    """

    baseline_bytes: int
    peak_bytes: int
    disk_bytes: int
    layers: tuple[LayerCost, ...]

    @property
    def seconds(self) -> float:
        """Time of all purifications together; NaN where it was not timed."""
        return sum(layer.seconds for layer in self.layers)


def predict_cost(
    parameters: Sequence[Parameter],
    tasks: int,
    workers: int,
    kinds: Mapping[str, MomentKind],
    *,
    options: Purify | Sequence[Purify] | None = None,
    methods: Sequence[MergeMethod] = (),
    when_read: Sequence[Purify] = (),
    new_experts: int = 0,
    merged_bytes: Sequence[int] | None = None,
    timed: bool = True,
) -> PredictedCost:
    """What purifying and merging experts will take.

    Args:
        parameters: the parameters that base and experts share.
        tasks: number of experts.
        workers: threads that work at once, each on one task of a layer.
        kinds: which second moment each matrix layer has or will have, by layer name; what reads statistics purifies no
            other layers. Empty where nothing is captured. See `expected_kinds`.
        options: the purification, or all that are made one after the other; None where nothing is purified.
        methods: the method of each merged model that is made, from whatever task vectors, with its options.
        when_read: purifications that are computed while merging reads their result, once each time, and not written.
        new_experts: checkpoints that are still to be written, as experts are that are trained; others are read where
            they are.
        merged_bytes: what the weights of each merged model take on disk, in the order of ``methods``; those of float32
            where None.
        timed: whether to time small solves of each shape, which takes about a second where no plan did within the hour.
    """
    asked = (options,) if isinstance(options, Purify) else tuple(options or ())
    baseline = resident_bytes()
    merging = peak = merging_bytes(parameters, tasks, methods) if methods else 0
    layers: list[LayerCost] = []
    known: dict[Hashable, float] = {}
    for one in asked:
        matrices = purified_matrices(parameters, kinds, one)
        purified = len(one.tasks or range(tasks))
        found = purification_costs(matrices, purified, workers, one, timed=timed, known=known)
        pending = max(waiting_bytes(matrices, SMALL_SHARD_BYTES), default=0) * purified
        together = layers_at_once(purified, workers)
        ordered = [(parameter.matrix_shape, kind) for parameter, kind in matrices.items()]
        peaks = (batch_bytes(batch, purified, workers, one) for batch in batches(ordered, purified, workers))
        highest = max(peaks, default=0)
        peak = max(peak, highest + pending + THREAD_BYTES * min(workers, purified * together))
        layers += found
    for one in when_read:
        matrices = purified_matrices(parameters, kinds, one)
        purified = len(one.tasks or range(tasks))
        found = purification_costs(matrices, purified, workers, one, timed=timed, known=known)
        # One layer at a time, beside what merging holds, and the purified weights of all tasks.
        highest = max(
            (batch_bytes([(p.matrix_shape, kind)], purified, workers, one) for p, kind in matrices.items()), default=0
        )
        peak = max(peak, merging + highest + THREAD_BYTES * min(workers, purified))
        layers += found
    return PredictedCost(
        baseline_bytes=baseline,
        peak_bytes=baseline + peak,
        disk_bytes=disk_bytes(
            parameters,
            tasks,
            kinds,
            purifications=asked,
            methods=methods,
            new_experts=new_experts,
            merged_bytes=merged_bytes,
        ),
        layers=tuple(layers),
    )


def expected_kinds(
    parameters: Iterable[Parameter], moments: Moments, *, convolutions: bool = False
) -> dict[str, MomentKind]:
    """Which second moment a capture will leave for each layer that it looks at.

    Args:
        parameters: the parameters that base and experts share.
        moments: what the recipe captures: ``smallest``, ``input`` or ``output``.
        convolutions: whether it captures convolutions that are matrix products.
    """
    return {
        parameter.layer: captured_kind(moments, *parameter.matrix_shape)
        for parameter in _apart(parameters)
        if parameter.is_matrix and (convolutions or parameter.kind is ParameterKind.LINEAR)
    }


def _apart(parameters: Iterable[Parameter]) -> Iterator[Parameter]:
    """The parameters, of a mixture each expert's."""
    return (one for parameter in parameters for one in parameter.apart)


def purified_matrices(
    parameters: Iterable[Parameter], kinds: Mapping[str, MomentKind], options: Purify
) -> dict[Parameter, MomentKind | None]:
    """The weights that will be purified, and by which second moment; None where the metric needs none.

    Without statistics all linear layers are purified, by moments of their inputs that are made on the way.
    """
    if options.reads_statistics:
        return {p: kinds[p.layer] for p in _apart(parameters) if p.is_matrix and p.layer in kinds}
    made: MomentKind | None = None if options.metric == "identity" else "input"
    return {p: made for p in _apart(parameters) if p.kind is ParameterKind.LINEAR and p.is_matrix}


def purification_costs(
    matrices: Mapping[Parameter, MomentKind | None],
    tasks: int,
    workers: int,
    options: Purify,
    *,
    timed: bool = True,
    known: dict[Hashable, float] | None = None,
) -> list[LayerCost]:
    """What one purification takes, by shape and kind of moment, the slowest first; arguments as of `predict_cost`.

    Args:
        matrices: the weights, see `purified_matrices`.
        tasks: number of tasks that are purified.
        workers: threads that work at once.
        options: the purification.
        timed: whether to time small solves.
        known: times of solves that were timed before, added to.
    """
    known = {} if known is None else known
    counted = Counter((parameter.matrix_shape, kind) for parameter, kind in matrices.items())
    # With a budget over all layers every spectrum is computed a second time.
    passes = 1 if options.scope == "layer" else 2
    together = layers_at_once(tasks, workers)
    rounds = math.ceil(tasks * together / max(1, workers)) / together
    busy = min(workers, tasks * together)
    costs = []
    for (shape, kind), layers in counted.items():
        single = math.nan
        if timed:
            same = (shape, kind, busy, *_timed_as(options))
            if same not in known:
                known[same] = _known_seconds(shape, kind, options, busy)
            single = known[same]
        seconds = single * rounds * passes * layers
        peak = batch_bytes([(shape, kind)] * min(together, layers), tasks, workers, options)
        costs.append(LayerCost(options, shape, kind, layers, tasks, seconds, peak))
    return sorted(costs, key=lambda cost: (-cost.seconds if timed else 0, -cost.peak_bytes, cost.shape))


def _timed_as(options: Purify) -> tuple[Hashable, ...]:
    """What the time of a solve depends on; purifications for which it is the same are timed once."""
    made = "" if options.reads_statistics else options.statistics
    return options.metric, made, options.damping > 0, options.exact, _timed_rho(options)


def _timed_rho(options: Purify) -> float:
    rho = options.rho if isinstance(options.rho, float) else ASSUMED_RHO
    return math.floor(rho * RHO_STEPS) / RHO_STEPS


def batch_bytes(
    batch: Sequence[tuple[Shape, MomentKind | None]], tasks: int, workers: int, options: Purify | None = None
) -> int:
    """The most that purifying some layers at a time, for all tasks, holds in memory.

    While spectra are computed, finished ones stand beside those that workers are busy with. While weights are
    projected, all spectra are there, and the purified weights gather.

    Args:
        batch: ``(d_out, d_in)`` of each layer and which second moment it has; None where none is needed.
        tasks: number of tasks.
        workers: threads that work at once.
        options: the purification; the default one where nothing is said.
    """
    jobs = [_job_bytes(shape, kind, options or Purify()) for shape, kind in batch for _ in range(tasks)]
    busy = min(workers, len(jobs))
    solving = sum(nlargest(busy, (job.solving - job.kept for job in jobs)))
    projecting = sum(nlargest(busy, (job.projecting for job in jobs))) + sum(job.purified for job in jobs)
    return sum(job.kept for job in jobs) + max(solving, projecting)


@dataclass(frozen=True)
class _JobBytes:
    """What purifying one task's weight of one layer holds in memory, in bytes.

    Attributes:
        solving: the most while its spectrum is computed.
        kept: its spectrum.
        projecting: the most while it is projected, spectrum and result aside.
        purified: the purified weight.
    """

    solving: int
    kept: int
    projecting: int
    purified: int


def _job_bytes(shape: Shape, kind: MomentKind | None, options: Purify) -> _JobBytes:
    """What one task's weight of one layer takes.

    Before a spectrum is computed, a worker checks the moment that was captured, or makes one: of rows of noise, or of
    the task vector's rows in float64. While it computes, it has the weight and the moment as they are stored and in
    float64, their product, and the Gram matrix or, with ``exact``, the product once more with its singular vectors and
    LAPACK's room to work. A finished spectrum keeps its eigenvectors or what leads to them, and what leads back to the
    weight.
    """
    height, width = shape
    weight, gram = height * width, min(shape) ** 2
    moment = {"input": width**2, "cross": weight, "rows": weight, "output": height**2}.get(kind or "", 0)
    image = 8 * min(height, width) * width
    # Kept in float64: the Gram matrix or the directions; of a tall weight also its factor, and the weight as it is
    # stored (or its basis).
    kept = 8 * gram + (8 * gram + (8 if options.exact else 4) * weight if height > width else 0)
    # The Gram matrix is made from the image, and once more with its own transpose beside it.
    decomposing = 2 * image + (8 + 32) * gram if options.exact else image + 8 * gram
    solving = 4 * weight + 8 * weight + (4 + 8) * moment + decomposing
    projecting = (4 + 8 + 8) * weight
    if options.target != "expert":
        # The base and the task vector stand beside the weight.
        projecting += 8 * weight
    return _JobBytes(max(_moment_bytes(weight, moment, kind, options), solving), kept, projecting, 4 * weight)


def _moment_bytes(weight: int, moment: int, kind: MomentKind | None, options: Purify) -> int:
    """What a worker holds while it checks a captured moment or makes one; sizes in elements."""
    if kind is None:
        return 0
    if options.reads_statistics:
        return 4 * weight + 4 * moment + (2 * 8 * moment if kind in ("input", "output") else 0)
    if options.statistics == "random":
        return 4 * weight + (2 * 4 + 4 + 4) * moment
    # The weight, the task vector and its rows in float64; the moment, scaled, and as it is kept.
    return (4 + 4 + 8) * weight + (8 + 8 + 4) * moment


@dataclass(frozen=True)
class TimedSolve:
    """What a trial took.

    Attributes:
        seconds: see `solve_seconds`.
    """

    seconds: float


def _known_seconds(shape: Shape, kind: MomentKind | None, options: Purify, workers: int) -> float:
    """As `solve_seconds`; what another plan on this machine found within the hour is taken from there."""
    found = remembered(
        TimedSolve,
        [shape, kind, *_timed_as(options), workers, *_machine()],
        lambda: TimedSolve(solve_seconds(shape, kind, options, workers)),
        topic="solves",
        code=[Path(__file__).parent, *(Path(room.__path__[0]) for room in (purification, subspace))],
        lasts=KEPT_SECONDS,
    )
    return found.seconds


def _machine() -> list[Hashable]:
    """What tells machines apart, and what of this one may be used."""
    return [platform.node(), platform.machine(), usable_cores(), torch.get_num_threads()]


def solve_seconds(shape: Shape, kind: MomentKind | None, options: Purify, workers: int) -> float:
    """Seconds in which ``workers`` tasks' weights of a shape are purified side by side, one each.

    A random weight and moment of the same proportions, so small that they take no more than `TIMED_WORK`, go through
    the real functions on this machine as it is now; the time is scaled by the third power of the size, which is how
    dense decompositions grow. Small matrices are solved less efficiently, so large layers come out rather too long than
    too short.
    """
    allowed = TIMED_WORK_EXACT if options.exact else TIMED_WORK
    scale = min(1.0, (allowed / _work(shape, kind)) ** (1 / 3))
    height, width = (max(1, round(side * scale)) for side in shape)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(height, width, generator=generator)
    moment = None if kind is None else _sample_moment(weight, kind, generator)
    rank = round(_timed_rho(options) * min(height, width))

    def solve() -> None:
        known = moment
        if kind == "input" and not options.reads_statistics:
            made = row_moment(weight) if options.statistics == "task_vector" else random_moment(width, "timed")
            known = moment if isinstance(made, str) else made.matrix
        elif moment is not None and kind in ("input", "output"):
            torch.linalg.cholesky_ex(moment.double())  # as captured moments are checked
        found = knowledge_spectrum(
            weight,
            known,
            kind or "input",
            metric=options.metric,
            damping=options.damping,
            exact=options.exact,
        )
        project(weight, found, rank)

    durations: list[float] = []
    while len(durations) < 2 or (len(durations) < TIMED_TIMES and sum(durations) < TIMED_SECONDS):
        start = time.perf_counter()
        in_parallel([partial(solve)] * max(1, workers), max(1, workers))
        durations.append(time.perf_counter() - start)
    # Rounding may have changed the proportions of very long shapes.
    return min(durations) * _work(shape, kind) / _work((height, width), kind)


def _work(shape: Shape, kind: MomentKind | None) -> int:
    """About how many multiplications a solve takes, up to a factor."""
    height, width = shape
    return height * width * min(shape) + (width**3 if kind == "input" else 0)


def _sample_moment(weight: Tensor, kind: MomentKind, generator: torch.Generator) -> Tensor:
    """A moment as a random weight's layer might have it; as little of it computed as its kind needs."""
    width = weight.shape[1]
    if kind == "rows":
        return torch.randn(len(weight), width, generator=generator)
    spread = torch.linspace(1, 0.1, width)
    if kind == "input":
        rows = torch.randn(2 * width, width, generator=generator) * spread
        return rows.T @ rows / len(rows)
    return weight * spread if kind == "cross" else (weight * spread) @ weight.T


def merging_bytes(parameters: Sequence[Parameter], tasks: int, methods: Iterable[MergeMethod]) -> int:
    """The most that merging by any of these methods holds in memory.

    A parameter stands there as merged task vector and as merged weight, beside what waits to be written of the ones
    before it; methods see blocks of rows of all tasks, or the whole parameter where they cannot work on blocks.
    Per-task methods also gather what each task keeps, masks with one byte an element of the parameter. Some methods
    hold whole models.
    """
    total = sum(parameter.elements for parameter in parameters)
    waiting = waiting_bytes(parameters, SHARD_BYTES)
    highest = 0
    for method in methods:
        held = 4 * total * method.held_models + _kept_bytes(method, parameters, tasks)
        for parameter, before in zip(parameters, [0, *waiting], strict=False):
            size = parameter.elements
            seen = min(size, BLOCK_ELEMENTS) if method.in_blocks(parameter) else size
            masks = tasks * size if method.form == "per-task" else 0
            highest = max(highest, held + before + 4 * (2 * size + seen * METHOD_TENSORS * tasks) + masks)
    return highest


def _kept_bytes(method: MergeMethod, parameters: Iterable[Parameter], tasks: int) -> int:
    """What a per-task method keeps for all tasks together."""
    if not isinstance(method, PerTaskMethod):
        return 0
    return tasks * sum(method.kept_bytes(parameter, tasks) for parameter in parameters)


def waiting_bytes(parameters: Iterable[Parameter], shard_bytes: int) -> list[int]:
    """What a writer of float32 weights holds after each: as many of them, in order, as fit into a shard, or one."""
    waiting, pending = [], 0
    for parameter in parameters:
        size = 4 * parameter.elements
        pending = size if pending + size > shard_bytes else pending + size
        waiting.append(pending)
    return waiting


def disk_bytes(
    parameters: Sequence[Parameter],
    tasks: int,
    kinds: Mapping[str, MomentKind],
    *,
    purifications: Sequence[Purify] = (),
    methods: Sequence[MergeMethod],
    new_experts: int,
    merged_bytes: Sequence[int] | None = None,
) -> int:
    """What experts that are trained, statistics, purified weights and merged models take on disk.

    All but merged models are float32, see `predict_cost`.

    Every purification leaves weights of its own; the statistics are those of all tasks, and are captured once. Layers
    that read the same input share one moment on disk, which headers do not show: each is counted.
    """
    total = 4 * sum(parameter.elements for parameter in parameters)
    statistics, weights = 0, 0
    for parameter in _apart(parameters):
        if parameter.is_matrix and parameter.layer in kinds:
            height, width = parameter.matrix_shape
            sizes = {"input": width**2, "output": height**2}
            statistics += 4 * tasks * sizes.get(kinds[parameter.layer], height * width)
    for options in purifications:
        weights += (
            4
            * len(options.tasks or range(tasks))
            * sum(p.elements for p in purified_matrices(parameters, kinds, options))
        )
    merged = sum(_kept_bytes(method, parameters, tasks) for method in methods)
    merged += total * len(methods) if merged_bytes is None else sum(merged_bytes)
    return new_experts * total + statistics + weights + merged
