"""Purifying the experts of a RoBERTa-base merge: the published steps against this package, in time and in error.

Eight experts, 72 linear layers each: 12 blocks of four 768 x 768, one 3072 x 768 and one 768 x 3072 weight. The
published steps are the equations of An, Yang, Torr, Ghanem, "Purifying Task Vectors in Knowledge-Aware Subspace for
Model Merging" (arXiv 2510.14697), in float32 as published: damp and invert C, singular values of W C for the rank
search, then damp and invert again, full SVD of W C, truncate, multiply by the inverse. Ours gets what `PaveCallback`
stores: C, or the cross moment W C where a layer narrows. Weights and covariances are synthetic (C of condition 1e6).

Run alone: ``python benchmarks/purify.py``. The last line of output is one JSON object. On a machine that is busy with
other work trust ``speedup_cpu_time``, the ratio of processor times, best with ``--threads 1``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import scipy.fft
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from pave_lightning.subspace import (
    KnowledgeSpectrum,
    MomentKind,
    allocate_ranks,
    in_parallel,
    knowledge_spectrum,
    project,
)

BLOCKS = 12
LAYERS = {(768, 768): 4 * BLOCKS, (3072, 768): BLOCKS, (768, 3072): BLOCKS}
RHO, DAMPING, STOPPING_SHARE = 0.875, 0.1, 1.5
LARGEST, SMALLEST = 1e2, 1e-4

T = TypeVar("T")
Shape = tuple[int, int]


class Seconds(NamedTuple):
    """Wall time and processor time."""

    wall: float
    processors: float


@dataclass
class Layer:
    """One layer of all experts, and the truth about it in float64."""

    weights: list[Tensor]
    covariances: list[Tensor]
    cross: list[Tensor] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    spectra: list[Tensor] = field(default_factory=list)
    truths: list[Tensor] = field(default_factory=list)


def main() -> None:
    arguments = parse_arguments()
    workers = 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        threadpool_limits(arguments.threads)
        workers = arguments.threads
    repeats, timed = (1, 1) if arguments.quick else (arguments.repeats, min(arguments.timed_tasks, arguments.tasks))
    totals = {"published": [0.0, 0.0], "ours": [0.0, 0.0], "ours, C for all": [0.0, 0.0]}
    ratios = []
    for shape, count in LAYERS.items():
        layer = make_layer(shape, arguments.tasks, timed)
        seconds = time_layer(layer, shape, repeats, timed, workers)
        errors = {
            "published": error([published_purify(*layer_of(layer, t), layer.ranks[t]) for t in range(timed)], layer),
            "ours": error([our_purified(layer, t, shape) for t in range(timed)], layer),
        }
        ratios.append(errors["published"] / errors["ours"])
        print(f"{shape[0]} x {shape[1]}, {count} layers, seconds a layer for {arguments.tasks} tasks:")
        for name, one in seconds.items():
            print(f"  {name:16s} {one.wall:8.3f} s, processors {one.processors:8.3f} s")
            for position, value in enumerate(one):
                totals[name][position] += count * value
        print(f"  speedup {seconds['published'].wall / seconds['ours'].wall:.1f}, ", end="")
        print(f"errors {errors['published']:.1e} published, {errors['ours']:.1e} ours", flush=True)
        if arguments.stages:
            print_stages(layer, shape)
    print(json.dumps(summary(totals, ratios, arguments)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="the smallest time of so many counts")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--timed-tasks", type=int, default=2, help="tasks that the published steps are timed on")
    parser.add_argument("--threads", type=int, default=0, help="for both sides; 0: as many as torch takes, 2 workers")
    parser.add_argument("--stages", action="store_true", help="print where our time goes, on one thread")
    parser.add_argument("--quick", action="store_true", help="one repeat, the published steps on one task")
    return parser.parse_args()


def summary(
    totals: dict[str, list[float]], ratios: list[float], arguments: argparse.Namespace
) -> dict[str, float | int | list[float]]:
    published, ours, plain = totals["published"], totals["ours"], totals["ours, C for all"]
    return {
        "speedup": round(published[0] / ours[0], 2),
        "error_ratio": round(math.exp(float(np.mean(np.log(ratios)))), 1),
        "speedup_cpu_time": round(published[1] / ours[1], 2),
        "speedup_covariance_for_all": round(published[0] / plain[0], 2),
        "error_ratio_smallest": round(min(ratios), 1),
        "seconds_published": round(published[0], 1),
        "seconds_ours": round(ours[0], 1),
        "tasks": arguments.tasks,
        "threads": torch.get_num_threads(),
    }


def make_layer(shape: Shape, tasks: int, known: int) -> Layer:
    """Synthetic experts; the truth is a float64 SVD, its projections only for the first ``known`` tasks."""
    random = np.random.default_rng(sum(shape))
    base = random.normal(0, 0.04, shape)
    layer = Layer([], [])
    lefts = []
    for task in range(tasks):
        weight = torch.from_numpy(base + random.normal(0, 0.002, shape)).float()
        covariance = make_covariance(shape[1], random)
        image = weight.double() @ covariance.double()
        damped = image + DAMPING * weight.double()
        layer.weights.append(weight)
        layer.covariances.append(covariance)
        layer.cross.append(image.float())
        tall = damped.T if shape[0] <= shape[1] else damped
        basis, triangle = torch.linalg.qr(tall)
        left, values, right = torch.linalg.svd(triangle)
        layer.spectra.append(values)
        if task < known:
            lefts.append(right.T if shape[0] <= shape[1] else basis @ left)
    names = [str(task) for task in range(tasks)]
    ranks = allocate_ranks(dict(zip(names, layer.spectra, strict=True)), RHO, STOPPING_SHARE)
    layer.ranks = [ranks[name] for name in names]
    for left, weight, rank in zip(lefts, layer.weights, layer.ranks, strict=False):
        kept = left[:, :rank]
        layer.truths.append(kept @ (kept.T @ weight.double()))
    return layer


def make_covariance(size: int, random: np.random.Generator) -> Tensor:
    """Eigenvalues in a geometric series, eigenvectors from two rounds of random signs and cosine transforms."""

    def turn(matrix: np.ndarray) -> np.ndarray:
        for signs in rounds:
            matrix = scipy.fft.dct(signs[:, None] * matrix, axis=0, norm="ortho")
        return matrix

    rounds = [random.choice([-1.0, 1.0], size) for _ in range(2)]
    half = turn(np.diag(random.permutation(np.geomspace(LARGEST, SMALLEST, size))))
    full = turn(half.T)
    return torch.from_numpy((full + full.T) / 2).float()


def layer_of(layer: Layer, task: int) -> tuple[Tensor, Tensor]:
    return layer.weights[task], layer.covariances[task]


def time_layer(layer: Layer, shape: Shape, repeats: int, timed: int, workers: int) -> dict[str, Seconds]:
    """All tasks of one layer: the two sides in turn, the smallest time of each."""
    tasks = len(layer.weights)
    kind: MomentKind = "cross" if shape[0] < shape[1] else "input"
    published: list[list[Seconds]] = [[] for _ in range(timed)]
    runs: dict[str, list[Seconds]] = {"ours": [], "ours, C for all": []}
    for _ in range(repeats):
        for task in range(timed):
            published[task].append(clock(lambda task=task: published_task(*layer_of(layer, task), layer.ranks[task])))
        runs["ours"].append(clock(lambda: our_layer(layer, kind, workers)))
        if kind == "cross":
            runs["ours, C for all"].append(clock(lambda: our_layer(layer, "input", workers)))
    runs["ours, C for all"] = runs["ours, C for all"] or runs["ours"]
    search = clock(lambda: published_ranks(layer.spectra))
    one_task = [smallest(times) for times in published]
    return {
        "published": Seconds(*(tasks * sum(kinds) / timed + extra for kinds, extra in zip(zip(*one_task), search))),  # noqa: B905
        **{name: smallest(times) for name, times in runs.items()},
    }


def clock(job: Callable[[], object]) -> Seconds:
    wall, processors = time.perf_counter(), time.process_time()
    job()
    return Seconds(time.perf_counter() - wall, time.process_time() - processors)


def smallest(times: list[Seconds]) -> Seconds:
    return Seconds(min(one.wall for one in times), min(one.processors for one in times))


def published_task(weight: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """One task's part of the rank search, then its purification."""
    damped, _ = published_inverse(covariance)
    torch.linalg.svdvals(weight @ damped)
    return published_purify(weight, covariance, rank)


def published_inverse(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Damped covariance and its inverse; the damping doubles until the inverse is one."""
    identity = torch.eye(len(covariance))
    damping = DAMPING
    while True:
        damped = covariance + damping * identity
        inverse = torch.linalg.inv(damped)
        if torch.linalg.norm(inverse @ damped - identity) < 0.05:
            return damped, inverse
        damping *= 2


def published_ranks(spectra: list[Tensor]) -> list[int]:
    """Remove the smallest normalised last component of all tasks, one after the other."""
    normalised = [(values / values[0]).tolist() for values in spectra]
    full = len(normalised[0])
    floor = full - round(STOPPING_SHARE * (full - round(RHO * full)))
    ranks = [full] * len(spectra)
    while sum(ranks) > round(RHO * full * len(ranks)):
        task = min((t for t in range(len(ranks)) if ranks[t] > floor), key=lambda t: normalised[t][ranks[t] - 1])
        ranks[task] -= 1
    return ranks


def published_purify(weight: Tensor, covariance: Tensor, rank: int) -> Tensor:
    damped, inverse = published_inverse(covariance)
    left, values, right = torch.linalg.svd(weight @ damped, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank] @ inverse


def our_layer(layer: Layer, kind: MomentKind, workers: int) -> list[Tensor]:
    moments = layer.covariances if kind == "input" else layer.cross

    def spectrum_of(task: int) -> Callable[[], KnowledgeSpectrum]:
        return lambda: knowledge_spectrum(layer.weights[task], moments[task], kind, damping=DAMPING)

    spectra = in_parallel([spectrum_of(task) for task in range(len(moments))], workers)
    ranks = allocate_ranks({str(t): spectrum.values for t, spectrum in enumerate(spectra)}, RHO, STOPPING_SHARE)

    def project_one(task: int) -> Callable[[], Tensor]:
        return lambda: project(layer.weights[task], spectra[task], ranks[str(task)])

    return in_parallel([project_one(task) for task in range(len(moments))], workers)


def our_purified(layer: Layer, task: int, shape: Shape) -> Tensor:
    """At the truth's rank."""
    kind: MomentKind = "cross" if shape[0] < shape[1] else "input"
    moment = layer.cross[task] if kind == "cross" else layer.covariances[task]
    weight = layer.weights[task]
    return project(weight, knowledge_spectrum(weight, moment, kind, damping=DAMPING), layer.ranks[task])


def error(purified: list[Tensor], layer: Layer) -> float:
    """Geometric mean over tasks of the relative Frobenius error."""
    logs = [
        math.log(float(torch.linalg.norm(found.double() - truth) / torch.linalg.norm(truth)))
        for found, truth in zip(purified, layer.truths, strict=True)
    ]
    return math.exp(sum(logs) / len(logs))


def print_stages(layer: Layer, shape: Shape) -> None:
    """Processor time of our stages for one task, on one thread."""
    from pave_lightning.subspace.frames import frame_of, gram_of
    from pave_lightning.subspace.solver import TridiagonalEigen

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    weight, covariance = layer_of(layer, 0)
    tail = min(shape) - layer.ranks[0]
    with threadpool_limits(1):
        frame = frame_of(weight, torch.device("cpu"))
        moment = layer.cross[0].double() if shape[0] < shape[1] else covariance.double()
        image = moment if shape[0] < shape[1] else frame.core @ moment
        gram = gram_of(image)
        stages = {
            "coordinates (Cholesky of W^T W, where d_out > d_in)": lambda: frame_of(weight, torch.device("cpu")),
            "W C~": lambda: moment.add(moment) if shape[0] < shape[1] else frame.core @ moment,
            "Gram matrix": lambda: gram_of(image),
            "tridiagonal form and all values": lambda: TridiagonalEigen(gram.clone()),
            "projection": lambda: weight.double() - columns @ (columns.T @ weight.double()),
        }
        pairs = TridiagonalEigen(gram.clone())
        solved = clock(lambda: pairs.smallest(tail))
        lifted = clock(lambda: frame.lift(pairs.smallest(tail)))
        columns = frame.lift(pairs.smallest(tail))
        seconds = {name: smallest([clock(job) for _ in range(5)]).processors for name, job in stages.items()}
        seconds[f"{tail} eigenvectors"] = solved.processors
        seconds["their lift to d_out"] = lifted.processors
    for name, value in seconds.items():
        print(f"    {name:52s} {1e3 * value:6.1f} ms")
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
