"""Peak memory of purifying experts of RoBERTa-base's size and merging them by Task Arithmetic, beside the prediction.

Run alone: ``python benchmarks/memory.py`` (8 experts: about 9 GB of temporary files and some minutes; small with
``--blocks 2 --tasks 3``). Base, experts and statistics are random and made in one process; another one purifies and
merges them, and its peak is the VmHWM of Linux: everything that it held, imports included. The last line of output is
one JSON object. What is in memory does not depend on how busy the machine is; the seconds do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from synthetic import roberta, write_tokenizer

RHO = 0.97
# What Task Arithmetic multiplies the sum of eight task vectors with.
SCALE = 0.3
DIRECTIONS = 64


def main() -> None:
    arguments = parse_arguments()
    if arguments.stage == "make":
        make(Path(arguments.folder), arguments.tasks, arguments.blocks, arguments.vocabulary)
    elif arguments.stage == "measure":
        measure(Path(arguments.folder), arguments.tasks)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="pave-memory-") as folder:
            start = time.perf_counter()
            run("make", arguments, folder)
            print(f"made base, experts and statistics in {time.perf_counter() - start:.0f} s", flush=True)
            run("measure", arguments, folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=12, help="transformer blocks; RoBERTa-base has 12")
    parser.add_argument("--vocabulary", type=int, default=50265, help="tokens; RoBERTa-base has 50265")
    parser.add_argument("--folder", help="where temporary files are put; the system's place unless given")
    parser.add_argument("--stage", choices=["make", "measure"], help=argparse.SUPPRESS)
    return parser.parse_args()


def run(stage: str, arguments: argparse.Namespace, folder: str) -> None:
    sizes = [f"--tasks={arguments.tasks}", f"--blocks={arguments.blocks}", f"--vocabulary={arguments.vocabulary}"]
    command = [sys.executable, __file__, "--stage", stage, "--folder", folder, *sizes]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def make(folder: Path, tasks: int, blocks: int, vocabulary: int) -> None:
    """Base, experts (the base plus small noise) and statistics of RoBERTa's shapes."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config, shapes = roberta(blocks, vocabulary)
    base = {name: torch.empty(shape).normal_(std=0.02) for name, shape in shapes.items()}
    noise = torch.empty(max(tensor.numel() for tensor in base.values()) + 1_000_003 * tasks).normal_(std=0.002)
    for number in range(-1, tasks):
        target = folder / ("base" if number < 0 else f"expert-{number}")
        target.mkdir()
        config.save_pretrained(target)
        write_tokenizer(target)
        expert = {}
        for name, tensor in base.items():
            if number >= 0:
                start = 1_000_003 * number
                expert[name] = tensor + noise[start : start + tensor.numel()].view(tensor.shape)
            elif name.startswith("roberta."):
                expert[name.removeprefix("roberta.")] = tensor
        save_file(expert, target / "model.safetensors", metadata={"format": "pt"})
        if number >= 0:
            weights = {name.removeprefix("roberta."): tensor for name, tensor in expert.items() if tensor.ndim == 2}
            save_statistics(weights, folder / f"statistics-{number}.safetensors")


def save_statistics(weights: dict, path: Path) -> None:
    """What a capture leaves: C of the input, one for query, key and value; W C where a layer narrows."""
    import torch

    from pave_lightning.statistics import LayerMoment, TaskStatistics

    moments, shared = {}, {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if ".layer." not in layer:
            continue
        if layer.endswith(("self.query", "self.key", "self.value")) and layer.rpartition(".")[0] in shared:
            moments[layer] = shared[layer.rpartition(".")[0]]
            continue
        width_out, width_in = weight.shape
        strong = torch.randn(width_in, DIRECTIONS) * torch.linspace(2, 0.1, DIRECTIONS)
        weak = torch.linspace(0.5, 0.01, width_in)
        if width_in > width_out:
            moments[layer] = LayerMoment("cross", weight * weak + (weight @ strong) @ strong.T, 4096)
        else:
            moments[layer] = LayerMoment("input", torch.diag(weak) + strong @ strong.T, 4096)
            shared[layer.rpartition(".")[0]] = moments[layer]
    TaskStatistics(moments, examples=512).save(path)


def measure(folder: Path, tasks: int) -> None:
    """Purify and merge, as a library user would, and print what it took."""
    from pave_lightning.merging.folders import MergeContext, write_merged
    from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
    from pave_lightning.pipeline import costs
    from pave_lightning.purification import PurifiedTaskVectors, StoredPurification, write_purified
    from pave_lightning.purification.options import Purify
    from pave_lightning.statistics import TaskStatistics
    from pave_lightning.weights import Architecture, Checkpoint, ExpertTaskVectors, memory

    names = [f"expert-{number}" for number in range(tasks)]
    architecture = Architecture.of_folder(folder / names[0])
    base = Checkpoint(folder / "base", architecture.prefix)
    experts = {name: Checkpoint(folder / name, architecture.prefix) for name in names}
    plain = ExpertTaskVectors(base, experts, architecture)
    statistics = {
        name: TaskStatistics.load(folder / f"statistics-{number}.safetensors") for number, name in enumerate(names)
    }
    cost = costs.predict_cost(
        plain.parameters,
        tasks,
        workers_of_this_machine(),
        {layer: own.kind(layer) for own in statistics.values() for layer in own.layers()},
        options=Purify(rho=RHO),
        methods=[TaskArithmetic],
    )
    print(f"{megabytes(cost.baseline_bytes)} MB resident before work", flush=True)
    print(f"predicted: peak {megabytes(cost.peak_bytes)} MB, purification {cost.seconds:.0f} s", flush=True)

    start = time.perf_counter()
    write_purified(PurifiedTaskVectors(plain, statistics, Purify(rho=RHO)), folder / "purified")
    purified = time.perf_counter() - start
    after_purification = memory.highest_resident_bytes()
    print(f"purified in {purified:.0f} s, peak so far {megabytes(after_purification)} MB", flush=True)
    stored = {name: Checkpoint(folder / "purified" / name, architecture.prefix) for name in names}
    (folder / "merged").mkdir()
    context = MergeContext(str(folder / "base"), base, experts, architecture, {})
    write_merged(folder / "merged", TaskArithmetic(), StoredPurification(plain, stored), SCALE, context)
    seconds = time.perf_counter() - start
    peak = memory.highest_resident_bytes()
    print(f"merged in {seconds - purified:.0f} s", flush=True)
    sizes = {"peak_mb": megabytes(peak), "predicted_mb": megabytes(cost.peak_bytes)}
    print(json.dumps({**sizes, "seconds": round(seconds, 1)}))


def workers_of_this_machine() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def megabytes(count: int) -> int:
    return round(count / 1e6)


if __name__ == "__main__":
    main()
