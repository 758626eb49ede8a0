"""What purification and merging will take: memory, time and disk, from the headers of the files alone."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from pave_lightning.merging.base import MergeMethod, PerTaskMethod
from pave_lightning.recipe import Purify
from pave_lightning.statistics import Moments, captured_kind
from pave_lightning.subspace import MomentKind, in_parallel, knowledge_spectrum, project
from pave_lightning.weights import Parameter
from pave_lightning.weights.memory import resident_bytes
from pave_lightning.weights.task_vectors import BLOCK_ELEMENTS
from pave_lightning.weights.writing import SHARD_BYTES, SMALL_SHARD_BYTES

Shape = tuple[int, int]

# Packing buffers and stack that BLAS and LAPACK keep for a thread once it has multiplied matrices.
THREAD_BYTES = 16_000_000
# Tensors of a block that a rule has at a time for each task: task vector, stack, and what it makes of them.
RULE_TENSORS = 4
# Synthetic solves are no larger than this, so that all shapes of a model are timed in about a second.
TIMED_SIDE = 384
ASSUMED_RHO = 0.97


@dataclass(frozen=True)
class LayerCost:
    """What purifying all matrix weights of one shape takes.

    Attributes:
        shape: ``(d_out, d_in)``.
        kind: which second moment their layers have; None where none is needed.
        layers: how many weights there are a task.
        tasks: how many tasks are purified.
        seconds: all of them together; NaN where it was not timed.
        peak_bytes: what purifying one of them for all tasks holds in memory at its highest, writers aside.
    """

    shape: Shape
    kind: MomentKind | None
    layers: int
    tasks: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Cost:
    """What purification and merging take.

    Attributes:
        baseline_bytes: what this process holds now; a process that does the work begins with as much.
        peak_bytes: the highest memory of a process that purifies and merges, baseline included.
        disk_bytes: what all results take on disk.
        layers: purification by shape, the slowest first.
    """

    baseline_bytes: int
    peak_bytes: int
    disk_bytes: int
    layers: tuple[LayerCost, ...]

    @property
    def seconds(self) -> float:
        """Time of the whole purification; NaN where it was not timed."""
        return sum(layer.seconds for layer in self.layers)


def predict_cost(
    parameters: Sequence[Parameter],
    tasks: int,
    workers: int,
    kinds: Mapping[str, MomentKind],
    *,
    options: Purify | None = None,
    methods: Sequence[type[MergeMethod]] = (),
    new_experts: int = 0,
    timed: bool = True,
) -> Cost:
    """What purifying and merging experts will take.

    Args:
        parameters: the parameters that base and experts share.
        tasks: number of experts.
        workers: threads that work at once, each on one task of a layer.
        kinds: which second moment each matrix layer has or will have, by layer name; other layers are not purified. See
            `expected_kinds`.
        options: the purification; None where nothing is purified.
        methods: the rule of each merged model that is made, from plain or purified task vectors.
        new_experts: experts that are still to be trained, which take disk; others are read where they are.
        timed: whether to time small solves of each shape, which takes about a second.
    """
    layers: tuple[LayerCost, ...] = ()
    purified = tasks if options is None or options.tasks is None else len(options.tasks)
    matrices = [parameter for parameter in parameters if parameter.is_matrix and parameter.layer in kinds]
    baseline = resident_bytes()
    peak = merging_bytes(parameters, tasks, methods) if methods else 0
    if options is not None:
        layers = purification_costs(matrices, purified, workers, kinds, options, timed=timed)
        pending = max(waiting_bytes(matrices, SMALL_SHARD_BYTES), default=0) * purified
        highest = max((layer.peak_bytes for layer in layers), default=0)
        peak = max(peak, highest + pending + THREAD_BYTES * min(workers, purified))
    return Cost(
        baseline_bytes=baseline,
        peak_bytes=baseline + peak,
        disk_bytes=disk_bytes(
            parameters, tasks, kinds, purified=purified if layers else 0, methods=methods, new_experts=new_experts
        ),
        layers=layers,
    )


def expected_kinds(parameters: Iterable[Parameter], moments: Moments) -> dict[str, MomentKind]:
    """Which second moment a capture will leave for each linear layer.

    Args:
        parameters: the parameters that base and experts share.
        moments: what the recipe captures: ``smallest``, ``input`` or ``output``.
    """
    return {
        parameter.layer: captured_kind(moments, *parameter.matrix_shape)
        for parameter in parameters
        if parameter.is_matrix and len(parameter.shape) == 2
    }


def purification_costs(
    matrices: Sequence[Parameter],
    tasks: int,
    workers: int,
    kinds: Mapping[str, MomentKind],
    options: Purify,
    *,
    timed: bool = True,
) -> tuple[LayerCost, ...]:
    """What purification takes, by shape and kind of moment, the slowest first; arguments as of `predict_cost`."""
    needs_moment = options.metric != "identity"
    counted = Counter((p.matrix_shape, kinds[p.layer] if needs_moment else None) for p in matrices)
    # With a budget over all layers every spectrum is computed a second time.
    passes = 1 if options.scope == "layer" else 2
    rounds = math.ceil(tasks / max(1, workers))
    costs = []
    for (shape, kind), layers in counted.items():
        single = solve_seconds(shape, kind, options, min(workers, tasks)) if timed else math.nan
        seconds = single * rounds * passes * layers
        costs.append(LayerCost(shape, kind, layers, tasks, seconds, layer_bytes(shape, kind, tasks, workers)))
    return tuple(sorted(costs, key=lambda cost: (-cost.seconds if timed else 0, -cost.peak_bytes, cost.shape)))


def layer_bytes(shape: Shape, kind: MomentKind | None, tasks: int, workers: int) -> int:
    """The most that purifying one weight for all tasks holds in memory.

    While spectra are computed, a worker has the weight and the moment as they are stored and in float64, their product
    and the Gram matrix; a finished spectrum keeps its Gram matrix and what leads back to the weight. While weights are
    projected, all spectra are there, and the purified weights gather. With ``exact`` a few matrices of ``d x d`` more
    stand there for each worker.

    Args:
        shape: ``(d_out, d_in)``.
        kind: which second moment there is; None where none is needed.
        tasks: number of tasks.
        workers: threads that work at once.
    """
    height, width = shape
    weight, gram = height * width, min(shape) ** 2
    moment = {"input": width**2, "cross": weight, "rows": weight, "output": height**2}.get(kind or "", 0)
    # Kept in float64: the Gram matrix; of a tall weight also its factor, and the weight as it is stored.
    kept = 8 * gram + (8 * gram + 4 * weight if height > width else 0)
    image = 8 * min(height, width) * width
    checking = 4 * weight + 4 * moment + (8 * 4 * moment if kind == "input" else 0)
    # The Gram matrix is made from the image, and once more with its own transpose beside it.
    solving = 4 * weight + 8 * weight + (4 + 8) * moment + image + 8 * gram
    projecting = (4 + 8 + 8) * weight
    busy = min(workers, tasks)
    while_solving = (tasks - busy) * kept + busy * max(checking, solving)
    return max(while_solving, tasks * (kept + 4 * weight) + busy * projecting)


def solve_seconds(shape: Shape, kind: MomentKind | None, options: Purify, workers: int) -> float:
    """Seconds in which ``workers`` tasks' weights of a shape are purified side by side, one each.

    A random weight and moment of the same proportions, no side longer than `TIMED_SIDE`, goes through the real
    functions on this machine as it is now; the time is scaled by the third power of the size, which is how dense
    decompositions grow. Small matrices are solved less efficiently, so large layers come out rather too long than too
    short.
    """
    scale = min(1.0, TIMED_SIDE / max(shape))
    height, width = (max(1, round(side * scale)) for side in shape)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(height, width, generator=generator)
    rows = torch.randn(2 * width, width, generator=generator)
    second = rows.T @ rows / len(rows)
    moments = {"input": second, "rows": rows, "cross": weight @ second, "output": weight @ second @ weight.T}
    moment = None if kind is None else moments[kind]
    rho = options.rho if isinstance(options.rho, float) else ASSUMED_RHO

    def solve() -> None:
        found = knowledge_spectrum(
            weight,
            moment,
            kind or "input",
            metric=options.metric,
            damping=options.damping,
            exact=options.exact,
        )
        project(weight, found, round(rho * min(height, width)))

    durations = []
    for _ in range(2):  # the first one also loads libraries
        start = time.perf_counter()
        in_parallel([partial(solve)] * max(1, workers), max(1, workers))
        durations.append(time.perf_counter() - start)
    return min(durations) / scale**3


def merging_bytes(parameters: Sequence[Parameter], tasks: int, methods: Iterable[type[MergeMethod]]) -> int:
    """The most that merging by any of these rules holds in memory.

    A parameter stands there as merged task vector and as merged weight, beside what waits to be written of the ones
    before it; rules see blocks of rows of all tasks, or the whole parameter where they cannot work on blocks. Per-task
    rules also gather what each task keeps, masks with one byte an element of the parameter. Some rules hold whole
    models.
    """
    total = sum(parameter.elements for parameter in parameters)
    waiting = waiting_bytes(parameters, SHARD_BYTES)
    highest = 0
    for method in methods:
        rule = method()
        held = 4 * total * method.held_models + _kept_bytes(rule, parameters, tasks)
        for parameter, before in zip(parameters, [0, *waiting], strict=False):
            size = parameter.elements
            seen = min(size, BLOCK_ELEMENTS) if rule.in_blocks(parameter) else size
            masks = tasks * size if method.form == "per-task" else 0
            highest = max(highest, held + before + 4 * (2 * size + seen * RULE_TENSORS * tasks) + masks)
    return highest


def _kept_bytes(rule: MergeMethod, parameters: Iterable[Parameter], tasks: int) -> int:
    """What a per-task rule keeps for all tasks together."""
    if not isinstance(rule, PerTaskMethod):
        return 0
    return tasks * sum(rule.kept_bytes(parameter, tasks) for parameter in parameters)


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
    purified: int,
    methods: Iterable[type[MergeMethod]],
    new_experts: int,
) -> int:
    """What experts that are trained, statistics, purified weights and merged models take on disk, all in float32.

    Layers that read the same input share one moment on disk, which headers do not show: each is counted.
    """
    total = 4 * sum(parameter.elements for parameter in parameters)
    matrices = [parameter for parameter in parameters if parameter.is_matrix and parameter.layer in kinds]
    statistics = 0
    for parameter in matrices:
        height, width = parameter.matrix_shape
        sizes = {"input": width**2, "output": height**2}
        statistics += 4 * sizes.get(kinds[parameter.layer], height * width)
    weights = 4 * sum(parameter.elements for parameter in matrices)
    merged = sum(total + _kept_bytes(method(), parameters, tasks) for method in methods)
    return new_experts * total + purified * (statistics + weights) + merged
