"""How the time of a purification grows with the width of a layer and with the number of tasks.

Square weights, input covariances of condition 1e6, an eighth of the rank removed: spectrum, allocation of ranks and
projection, two tasks side by side on two cores. A power law is fitted to the time of one layer and task over the
widths, a straight line to the time of one layer over the number of tasks.

Run alone: ``python benchmarks/growth.py``. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from pave_lightning.subspace import KnowledgeSpectrum, allocate_ranks, in_parallel, knowledge_spectrum, project

WIDTHS = (384, 512, 768, 1024, 1536, 2048, 3072, 4096)
TASKS = (1, 2, 4, 8, 16)
RHO, DAMPING, WORKERS = 0.875, 0.1, 2


def main() -> None:
    arguments = parse_arguments()
    widths = [width for width in WIDTHS if width <= arguments.largest]
    seconds = {}
    for width in widths:
        layers = [make_layer(width, seed) for seed in range(WORKERS)]
        repeats = arguments.repeats if width <= 1024 else max(1, arguments.repeats // 3)
        seconds[width] = min(timed(layers) for _ in range(repeats)) / WORKERS
        print(f"d = {width:5d}: {seconds[width]:8.3f} s a layer and task", flush=True)
    exponent = float(np.polyfit(np.log(widths), np.log([seconds[width] for width in widths]), 1)[0])
    by_tasks = time_tasks(arguments.tasks_width, arguments.repeats)
    slope, r2 = straight_line(list(by_tasks), list(by_tasks.values()))
    print(
        json.dumps(
            {
                "exponent": round(exponent, 3),
                "seconds_768": round(seconds.get(768, float("nan")), 4),
                f"seconds_{widths[-1]}": round(seconds[widths[-1]], 3),
                "tasks_r2": round(r2, 5),
                "seconds_per_task": round(slope, 4),
                "tasks_width": arguments.tasks_width,
            }
        )
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="the smallest time counts; a third of it above 1024")
    parser.add_argument("--largest", type=int, default=WIDTHS[-1], choices=WIDTHS, help="widest layer")
    parser.add_argument("--tasks-width", type=int, default=768, help="width at which the number of tasks varies")
    return parser.parse_args()


def time_tasks(width: int, repeats: int) -> dict[int, float]:
    layers = [make_layer(width, seed) for seed in range(max(TASKS))]
    best = dict.fromkeys(TASKS, float("inf"))
    for _ in range(repeats):
        for tasks in TASKS:
            best[tasks] = min(best[tasks], timed(layers[:tasks]))
    for tasks, value in best.items():
        print(f"{tasks:3d} tasks, d = {width}: {value:8.3f} s a layer", flush=True)
    return best


def straight_line(x: list[int], y: list[float]) -> tuple[float, float]:
    """Slope and R^2 of the least-squares line."""
    slope, start = np.polyfit(x, y, 1)
    left = np.asarray(y) - (slope * np.asarray(x) + start)
    return float(slope), float(1 - left.var() / np.var(y))


def make_layer(width: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random weight and a covariance whose eigenvalues are a geometric series, both float32."""
    random = np.random.default_rng(seed)
    rounds = [random.choice([-1.0, 1.0], width) for _ in range(2)]

    def turn(matrix: np.ndarray) -> np.ndarray:
        for signs in rounds:
            matrix = scipy.fft.dct(signs[:, None] * matrix, axis=0, norm="ortho")
        return matrix

    covariance = turn(turn(np.diag(random.permutation(np.geomspace(1e2, 1e-4, width)))).T)
    return torch.from_numpy(random.normal(0, 0.04, (width, width))).float(), torch.from_numpy(covariance).float()


def timed(layers: list[tuple[Tensor, Tensor]]) -> float:
    """Seconds to purify one layer of so many tasks."""
    start = time.perf_counter()
    spectra = in_parallel([spectrum_of(*layer) for layer in layers], WORKERS)
    ranks = allocate_ranks({str(task): spectrum.values for task, spectrum in enumerate(spectra)}, RHO)
    in_parallel([projection_of(layers[t][0], spectra[t], ranks[str(t)]) for t in range(len(layers))], WORKERS)
    return time.perf_counter() - start


def spectrum_of(weight: Tensor, covariance: Tensor) -> Callable[[], KnowledgeSpectrum]:
    return lambda: knowledge_spectrum(weight, covariance, damping=DAMPING)


def projection_of(weight: Tensor, spectrum: KnowledgeSpectrum, rank: int) -> Callable[[], Tensor]:
    return lambda: project(weight, spectrum, rank)


if __name__ == "__main__":
    main()
