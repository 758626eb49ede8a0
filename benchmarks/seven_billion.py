"""One block of Llama-2-7B's shapes, captured and purified: what a layer of that size takes.

Four projections of 4096 x 4096, two of 11008 x 4096 and one of 4096 x 11008, random weights in float32, random tokens.
Three processes one after the other: one makes base and expert, one passes rows through the expert, without
`PaveCallback` first and then with it, and one purifies a layer of each shape, which counts for all of that shape.

Run alone: ``python benchmarks/seven_billion.py``, some minutes, 4 GB of memory and of disk. The last line of output is
one JSON object: "seconds_per_layer" (capture beyond the plain pass, and purification, by the seven layers), "peak_mb"
(the highest memory of capture and purification), "predicted_over_measured" (`pave plan`'s prediction for the peak of
purification); and "capture_peak_over_model_and_statistics", whose bar is 1.15.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WIDTH, INNER, HEADS = 4096, 11008, 32
# A layer of each shape, and how many there are.
LAYERS = {"o_proj": 4, "gate_proj": 2, "down_proj": 1}
RHO = 0.97


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=17)
    parser.add_argument("--length", type=int, default=256, help="tokens of a batch, which is one example")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=["make", "capture", "purify"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        stages = {"make": make, "capture": capture, "purify": purify}
        print(json.dumps(stages[arguments.stage](arguments)))
        return
    with tempfile.TemporaryDirectory(prefix="pave-seven-billion-") as name:
        found: dict[str, Any] = {}
        for stage in ("make", "capture", "purify"):
            command = [sys.executable, __file__, "--stage", stage, "--folder", name]
            command += ["--batches", str(arguments.batches), "--length", str(arguments.length)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found |= json.loads(done.stdout.splitlines()[-1])
            print(stage, done.stdout.splitlines()[-1], flush=True)
    seconds = found["capture_seconds"] + found["purify_seconds"]
    summary = {
        "seconds_per_layer": round(seconds / sum(LAYERS.values()), 1),
        "peak_mb": max(found["capture_peak_mb"], found["purify_peak_mb"]),
        "predicted_over_measured": round(found["predicted_mb"] / found["purify_peak_mb"], 3),
    }
    print(json.dumps({**summary, **found}))


def make(arguments: argparse.Namespace) -> dict[str, Any]:
    """Base and expert as folders, and a tokenizer that nobody asks."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, vocab_size=1000, num_labels=2, pad_token_id=0)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    model.model.save_pretrained(arguments.folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.002)
    model.save_pretrained(arguments.folder / "expert")
    return {}


def capture(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of the pass with the callback, and time of one without it."""
    import gc
    import logging
    import warnings

    import lightning.pytorch as L
    import torch
    from torch.utils.data import DataLoader
    from transformers import AutoModel

    from pave_lightning.callbacks import PaveCallback
    from pave_lightning.weights.memory import highest_resident_bytes, resident_bytes

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Expert(L.LightningModule):
        def __init__(self, encoder: torch.nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

        def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
            self.encoder(**batch)

    def seconds(*callbacks: L.Callback) -> float:
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(accelerator="cpu", enable_checkpointing=False, callbacks=list(callbacks), **options)
        start = time.perf_counter()
        trainer.validate(expert, DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
        return time.perf_counter() - start

    torch.manual_seed(1)
    batches = [{"input_ids": torch.randint(1, 1000, (1, arguments.length))} for _ in range(arguments.batches)]
    before = resident_bytes()
    expert = Expert(AutoModel.from_pretrained(arguments.folder / "expert", use_cache=False).float())
    model = sum(parameter.nbytes for parameter in expert.parameters())
    plain = seconds()
    plain_peak = highest_resident_bytes()
    gc.collect()
    callback = PaveCallback(arguments.folder / "statistics.safetensors", backbone="encoder", rows=None)
    captured = seconds(callback)
    moments = {
        id(moment.matrix): moment.matrix.nbytes for moment in map(callback.statistics.__getitem__, callback.statistics)
    }
    peak = highest_resident_bytes()
    return {
        "capture_seconds": round(captured - plain, 1),
        "plain_seconds": round(plain, 1),
        "rows": max(callback.statistics.rows(layer) for layer in callback.statistics),
        "model_mb": megabytes(model),
        "statistics_mb": megabytes(sum(moments.values())),
        "plain_peak_mb": megabytes(plain_peak),
        "capture_peak_mb": megabytes(peak),
        "before_mb": megabytes(before),
        "capture_peak_over_model_and_statistics": round((peak - before) / (model + sum(moments.values())), 3),
    }


def purify(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of purifying the expert, and what a plan predicts of it."""
    from pave_lightning.pipeline import costs
    from pave_lightning.purification import PurifiedTaskVectors
    from pave_lightning.purification.options import Compute, Purify
    from pave_lightning.statistics import TaskStatistics
    from pave_lightning.weights import Architecture, ExpertTaskVectors, memory

    expert = arguments.folder / "expert"
    architecture = Architecture.of_folder(expert)
    plain = ExpertTaskVectors(
        architecture.checkpoint(arguments.folder / "base"), {"expert": architecture.checkpoint(expert)}, architecture
    )
    statistics = TaskStatistics.load(arguments.folder / "statistics.safetensors")
    kinds = {layer: statistics.kind(layer) for layer in statistics.layers()}
    cost = costs.predict_cost(plain.parameters, 1, 1, kinds, options=Purify(rho=RHO))
    vectors = PurifiedTaskVectors(plain, {"expert": statistics}, Purify(rho=RHO), Compute(workers=1))
    seconds = 0.0
    for parameter in vectors.layers:  # one of each shape, which counts for all of them
        like = LAYERS.get(parameter.layer.rpartition(".")[2], 0)
        if like:
            start = time.perf_counter()
            vectors.expert("expert", parameter)
            seconds += like * (time.perf_counter() - start)
    return {
        "purify_seconds": round(seconds, 1),
        "predicted_purify_seconds": round(cost.seconds, 1),
        "purify_peak_mb": megabytes(memory.highest_resident_bytes()),
        "predicted_mb": megabytes(cost.peak_bytes),
    }


def megabytes(count: int) -> int:
    return round(count / 1e6)


if __name__ == "__main__":
    main()
