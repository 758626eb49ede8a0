"""Texts that are written by models whose weights several processes hold in parts."""

import json
import math

import pytest

from pave_lightning import TaskDataModule
from pave_lightning.evaluation import Evaluator, ExpertsCandidate, SuiteData
from pave_lightning.experts.trainers import build_trainer
from pave_lightning.weights.architecture import Architecture
from several_processes import run_together


def score(rank, world, strategy, task, folder, tokenizer, place):
    checkpoint = Architecture.of_folder(folder, task.auto_model).checkpoint(folder)
    module = TaskDataModule(task, tokenizer, seed=0, cache_dir=place / "cache", batch_size=2)
    options = {"accelerator": "cpu", "devices": world, "strategy": strategy}
    trainer = build_trainer(options, root=place, enable_progress_bar=False)
    evaluator = Evaluator([task], {"mine": checkpoint}, checkpoint)
    candidate = ExpertsCandidate({"mine": checkpoint})
    found = evaluator.score(candidate, SuiteData([module], "test"), trainer, keep=True)["mine"]
    told = [found.metrics, found.examples, list(map(int, found.predictions.rows)), list(found.predictions.predictions)]
    (place / f"{world}-{rank}.json").write_text(json.dumps(told))


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_several_processes_write_what_one_writes(
    task_of, exchanges, language_base, writing_tokenizer, tmp_path, strategy
):
    # Seven rows in batches of two: one process runs a batch fewer than the other, and ends its texts at other places.
    task = task_of(
        exchanges(7),
        kind="causal_lm",
        training={"max_length": 16, "batch_size": 5},
        max_new_tokens=6,
        metrics=["chrf", "exact_match", "perplexity"],
    )
    folder = language_base("llama")
    score(0, 1, "auto", task, folder, writing_tokenizer, tmp_path)
    run_together(score, 2, 2, strategy, task, folder, writing_tokenizer, tmp_path)
    metrics, *rest = json.loads((tmp_path / "1-0.json").read_text())
    assert math.isfinite(metrics["perplexity"])
    for rank in range(2):
        found, *others = json.loads((tmp_path / f"2-{rank}.json").read_text())
        assert others == rest
        assert found == pytest.approx(metrics, rel=1e-6)
