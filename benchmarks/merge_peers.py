"""Merging eight RoBERTa-base-sized experts by Task Arithmetic and by TIES: mergekit's command against this package.

Both sides read the same base and experts (safetensors, float32, about 0.5 GB each, real shapes, random values) and
write a merged model to disk, each in a process of its own, in turn, on the CPU, with the same number of threads and the
same lambda: 0.3 for Task Arithmetic, 1 for TIES with density 0.2. mergekit runs as its command ``mergekit-yaml`` with
weight 1 for each expert and ``normalize: true`` in TIES (the mean of what agrees). Where the two differ in what they
compute:

* TIES in mergekit trims each tensor by itself and keeps exactly the given share of it; this package follows the paper,
  where one threshold counts for the whole model, which takes a reading of all task vectors before the merge. On these
  experts, whose task vectors are spread alike in every tensor, the results are nearly the same.
* mergekit merges the classification heads as well; this package leaves them out, and copies each expert's next to the
  merged backbone.

Each time is that of the whole process, start and imports included; ``..._after_imports`` leaves them out. Peak memory
is ``ru_maxrss`` of the process, which counts pages of the mapped checkpoints too; ``memory_ratio_without_files`` does
not: it compares the highest ``RssAnon`` that was seen. The script checks that the merged weights agree.

Run alone: ``python benchmarks/merge_peers.py`` (5 GB of temporary files, kept for the next run unless it is told
``--remove``; some minutes). mergekit is installed into a virtual environment in a cache folder (1.6 GB). The last line
of output is one JSON object. On a busy machine look at ``..._cpu_time``, and run ``--threads 1``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from synthetic import roberta, write_tokenizer

# Nothing heavy is imported here: Linux counts the memory of the parent as its child's until the child has started.

TORCH = "2.13.0"
MERGEKIT = "0.1.5"
# Method -> lambda.
RULES = {"task_arithmetic": 0.3, "ties": 1.0}
DENSITY = 0.2
SIDES = ("mergekit", "ours")
# Standard deviations of the base's weights and of the task vectors.
BASE_SPREAD, TASK_SPREAD = 0.02, 0.002
# mergekit's command, which tells besides how long it worked once its modules were there.
MERGEKIT_COMMAND = """
import sys, time
from mergekit.scripts.run_yaml import main
start = time.perf_counter()
main(sys.argv[1:], standalone_mode=False)
print(f"worked {time.perf_counter() - start}")
"""


class Run(NamedTuple):
    """What one process took; memory in bytes."""

    wall: float
    worked: float
    processors: float
    peak: float
    peak_without_files: float


def main() -> None:
    arguments = parse_arguments()
    folder = Path(arguments.folder)
    if arguments.stage == "make":
        make(folder, arguments.tasks, arguments.blocks, arguments.vocabulary)
    elif arguments.stage == "merge":
        merge(folder, arguments.tasks, arguments.rule, arguments.threads)
    elif arguments.stage == "compare":
        compare(folder, arguments.rule)
    else:
        run_all(folder, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="each side and method once a round; medians count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="for both sides")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES), help="(default: all)")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=12, help="transformer blocks; RoBERTa-base has 12")
    parser.add_argument("--vocabulary", type=int, default=50265, help="tokens; RoBERTa-base has 50265")
    parser.add_argument(
        "--folder",
        default=str(Path(tempfile.gettempdir()) / "pave-merge-peers"),
        help="where checkpoints are made, or used where they are already (default: %(default)s)",
    )
    parser.add_argument(
        "--environment",
        default=str(Path(tempfile.gettempdir()) / "pave-mergekit"),
        help="virtual environment of mergekit, made where there is none (default: %(default)s)",
    )
    parser.add_argument("--shard-size", default="5B", help="of mergekit's output, which it collects in memory; its own")
    parser.add_argument("--remove", action="store_true", help="remove the checkpoints afterwards")
    parser.add_argument("--stage", choices=["make", "merge", "compare"], help=argparse.SUPPRESS)
    parser.add_argument("--rule", choices=list(RULES), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_all(folder: Path, arguments: argparse.Namespace) -> None:
    python = mergekit_python(Path(arguments.environment))
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, arguments)
    print(f"{os.getloadavg()[0]:.1f} processes were at work in the last minute, this script's included", flush=True)
    runs: dict[tuple[str, str], list[Run]] = {(rule, side): [] for rule in arguments.rules for side in SIDES}
    for number in range(arguments.rounds):
        for rule in arguments.rules:
            for side in SIDES:
                shutil.rmtree(folder / side, ignore_errors=True)
                # What the last run wrote is on its way to the disk: not at the cost of this one.
                os.sync()
                command = stage("merge", arguments, rule)
                if side == "mergekit":
                    options = [
                        "--quiet",
                        f"--num-threads={arguments.threads}",
                        f"--out-shard-size={arguments.shard_size}",
                    ]
                    config = write_mergekit_config(folder, rule, arguments.tasks)
                    command = [str(python), "-c", MERGEKIT_COMMAND, str(config), str(folder / side), *options]
                run = measured(command, arguments.threads)
                runs[rule, side].append(run)
                print(
                    f"round {number + 1}  {rule:15s}  {side:8s}  {run.wall:6.2f} s, after imports {run.worked:6.2f} s, "
                    f"processor {run.processors:6.2f} s, peak {run.peak / 1e6:5.0f} MB, "
                    f"without files {run.peak_without_files / 1e6:5.0f} MB",
                    flush=True,
                )
            if number == 0:
                subprocess.run(stage("compare", arguments, rule), check=True, env=environment(arguments.threads))
    for side in SIDES:
        shutil.rmtree(folder / side, ignore_errors=True)
    if arguments.remove:
        shutil.rmtree(folder)
    print(json.dumps(summary(runs, arguments)))


def summary(runs: dict[tuple[str, str], list[Run]], arguments: argparse.Namespace) -> dict[str, float | int | str]:
    def middle(rule: str, side: str, what: str) -> float:
        return statistics.median(getattr(run, what) for run in runs[rule, side])

    def speedup(rule: str, what: str) -> float:
        return round(middle(rule, "mergekit", what) / middle(rule, "ours", what), 2)

    def memory(what: str) -> float:
        """Ours over mergekit's, the worse of both methods."""
        highest = {key: max(getattr(run, what) for run in found) for key, found in runs.items()}
        return round(max(highest[rule, "ours"] / highest[rule, "mergekit"] for rule in arguments.rules), 2)

    result: dict[str, float | int | str] = {f"{rule}_speedup": speedup(rule, "wall") for rule in arguments.rules}
    result["memory_ratio"] = memory("peak")
    result["memory_ratio_without_files"] = memory("peak_without_files")
    for rule in arguments.rules:
        result[f"{rule}_speedup_after_imports"] = speedup(rule, "worked")
        result[f"{rule}_speedup_cpu_time"] = speedup(rule, "processors")
        for side in SIDES:
            result[f"{rule}_seconds_{side}"] = round(middle(rule, side, "wall"), 2)
            result[f"{rule}_peak_mb_{side}"] = round(max(run.peak for run in runs[rule, side]) / 1e6)
    return {**result, "rounds": arguments.rounds, "threads": arguments.threads, "mergekit": MERGEKIT, "torch": TORCH}


def stage(name: str, arguments: argparse.Namespace, rule: str | None = None) -> list[str]:
    sizes = [f"--tasks={arguments.tasks}", f"--blocks={arguments.blocks}", f"--vocabulary={arguments.vocabulary}"]
    command = [sys.executable, __file__, f"--stage={name}", f"--folder={arguments.folder}", *sizes]
    return [*command, f"--threads={arguments.threads}", *([] if rule is None else [f"--rule={rule}"])]


def environment(threads: int) -> dict[str, str]:
    counts = dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"], str(threads))
    return {**os.environ, **counts, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def measured(command: list[str], threads: int) -> Run:
    """Run a command to its end; the system tells time and memory of that process alone."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment(threads), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    highest = [0.0]
    watcher = threading.Thread(target=watch, args=(process.pid, highest))
    watcher.start()
    output = process.stdout.read().decode() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    if process.returncode:
        sys.exit(f"{output}\nfailed with code {process.returncode}: {' '.join(command)}")
    worked = float(output.rpartition("worked ")[2].split()[0])
    return Run(wall, worked, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, highest[0])


def watch(process: int, highest: list[float]) -> None:
    """Keep the highest memory that holds no file's pages, seen every few milliseconds, until the process has ended."""
    while True:
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            return
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")]
        if not found:
            return
        highest[0] = max(highest[0], found[0])
        time.sleep(0.005)


def mergekit_python(environment: Path) -> Path:
    """The interpreter of a virtual environment that has mergekit; installs it where it is not there yet."""
    python = environment / "bin" / "python"
    # Only once both are there: an installation that broke off is done again.
    done = environment / f"mergekit-{MERGEKIT}-torch-{TORCH}"
    if done.is_file():
        return python
    print(f"installing mergekit {MERGEKIT} with torch {TORCH} into {environment}", flush=True)
    shutil.rmtree(environment, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", f"torch=={TORCH}"]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        # torch by itself first: a machine without it is told so before everything else is fetched.
        subprocess.run(pip, check=True)
        subprocess.run([*pip, f"mergekit=={MERGEKIT}"], check=True)
        subprocess.run([str(python), "-c", "import mergekit.scripts.run_yaml"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(
            f"mergekit {MERGEKIT} could not be installed with torch {TORCH} into {environment}, so there is nothing to "
            f"compare with ({error}); look at what pip says above, or name an environment that can be made with "
            "--environment"
        )
    done.touch()
    return python


def write_mergekit_config(folder: Path, rule: str, tasks: int) -> Path:
    """What ``mergekit-yaml`` reads; every JSON file is a YAML file."""
    own = {"weight": 1.0, **({"density": DENSITY} if rule == "ties" else {})}
    models = [{"model": str(folder / f"expert-{number}"), "parameters": own} for number in range(tasks)]
    parameters = {"lambda": RULES[rule], "normalize": rule == "ties"}
    config = {"merge_method": rule, "base_model": str(folder / "base"), "models": models, "dtype": "float32"}
    path = folder / f"mergekit-{rule}.yml"
    path.write_text(json.dumps({**config, "parameters": parameters}, indent=2))
    return path


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """Make the checkpoints, unless those of these sizes are there."""
    sizes = json.dumps([arguments.tasks, arguments.blocks, arguments.vocabulary])
    marker = folder / "made.json"
    if marker.is_file() and marker.read_text() == sizes:
        return
    start = time.perf_counter()
    for old in [folder / "base", *folder.glob("expert-*")]:
        shutil.rmtree(old, ignore_errors=True)
    subprocess.run(stage("make", arguments), check=True, env=environment(arguments.threads))
    marker.write_text(sizes)
    print(f"made base and experts in {time.perf_counter() - start:.0f} s", flush=True)


def make(folder: Path, tasks: int, blocks: int, vocabulary: int) -> None:
    """Base and experts (the base plus small noise) of RoBERTa's shapes, heads included."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config, shapes = roberta(blocks, vocabulary)
    base = {name: torch.empty(shape).normal_(std=BASE_SPREAD) for name, shape in shapes.items()}
    for name in ["base", *(f"expert-{number}" for number in range(tasks))]:
        target = folder / name
        target.mkdir()
        config.save_pretrained(target)
        write_tokenizer(target)
        weights = {
            key: tensor if name == "base" else tensor + torch.empty_like(tensor).normal_(std=TASK_SPREAD)
            for key, tensor in base.items()
        }
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def merge(folder: Path, tasks: int, rule: str, threads: int) -> None:
    """Merge with this package, as a library user would; prints how long it took once the modules were there."""
    import torch

    from pave_lightning.merging import make_method
    from pave_lightning.merging.folders import MergeContext, write_merged
    from pave_lightning.weights import Architecture, Checkpoint, ExpertTaskVectors

    start = time.perf_counter()
    torch.set_num_threads(threads)
    names = [f"expert-{number}" for number in range(tasks)]
    architecture = Architecture.of_folder(folder / names[0])
    base = Checkpoint(folder / "base", architecture.prefix)
    experts = {name: Checkpoint(folder / name, architecture.prefix) for name in names}
    method = make_method(rule, {"density": DENSITY} if rule == "ties" else {})
    (folder / "ours").mkdir()
    context = MergeContext(str(folder / "base"), base, experts, architecture, {})
    write_merged(folder / "ours", method, ExpertTaskVectors(base, experts, architecture), RULES[rule], context)
    print(f"worked {time.perf_counter() - start}")


def compare(folder: Path, rule: str) -> None:
    """Stop where the two merged backbones are not the same merge."""
    from pave_lightning.weights import Checkpoint

    base, theirs, ours = (Checkpoint(folder / name, "roberta") for name in ("base", "mergekit", "ours"))
    difference = change = 0.0
    for name in base:
        start, one, other = (checkpoint.tensor(name).double() for checkpoint in (base, theirs, ours))
        difference += float((one - other).square().sum())
        change += float((one - start).square().sum())
    relative = (difference / change) ** 0.5
    print(f"         {rule}: our merged vector differs from mergekit's by {relative:.1e} of its norm", flush=True)
    # Task Arithmetic differs in rounding alone; TIES in the elements that lie between the two thresholds.
    allowed = 1e-3 if rule == "task_arithmetic" else 0.1
    if not relative <= allowed:
        sys.exit(f"{rule}: the merged weights differ by {relative:.1e}, expected at most {allowed}")


if __name__ == "__main__":
    main()
