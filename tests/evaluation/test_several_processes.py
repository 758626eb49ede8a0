"""Scores of one process and of several: every row counts once, whatever the strategy and however few rows there are."""

import json

import numpy as np
import pytest

from pave_lightning.evaluation import Evaluator, ExpertsCandidate, MergedCandidate, SuiteData
from pave_lightning.experts.trainers import build_trainer
from pave_lightning.merging import merge
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic
from pave_lightning.tasks.predictions import read_predictions, write_predictions
from several_processes import run_together


def few(suite, rows):
    """The suite's tasks with so many test rows, all of them where that is None."""
    if rows is None:
        return suite.tasks
    return [
        task.model_copy(update={"examples": task.examples.model_copy(update={"test": rows})}) for task in suite.tasks
    ]


def score(rank, world, strategy, suite, rows, folder):
    """Score experts and a merged model with one evaluator, and keep what each process is told."""
    tasks = few(suite, rows)
    evaluator = Evaluator(tasks, suite.checkpoints(), suite.checkpoint())
    vectors = suite.vectors()
    candidates = {
        "experts": ExpertsCandidate(suite.checkpoints()),
        "merged": MergedCandidate(vectors, merge(TaskArithmetic(), vectors), 0.5),
    }
    for name, candidate in candidates.items():
        trainer = build_trainer(
            {"accelerator": "cpu", "devices": world, "strategy": strategy}, root=folder, enable_progress_bar=False
        )
        found = evaluator.score(candidate, SuiteData([suite.data(task) for task in tasks], "test"), trainer, keep=True)
        told = {task: {"metrics": one.metrics, "examples": one.examples} for task, one in found.items()}
        (folder / f"{name}-{world}-{rank}.json").write_text(json.dumps(told))
        write_predictions(
            folder / f"{name}-{world}-{rank}.parquet", {task: one.predictions for task, one in found.items()}, {}
        )


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_give_the_scores_of_one(suite, tmp_path, strategy, world, rows):
    for split in ("test",):
        for task in suite.tasks:
            suite.data(task).dataset(split)  # encoded once
    score(0, 1, "auto", suite, rows, tmp_path)
    run_together(score, world, world, strategy, suite, rows, tmp_path)
    for name in ("experts", "merged"):
        (alone, _), one = (
            read_predictions(tmp_path / f"{name}-1-0.parquet"),
            json.loads((tmp_path / f"{name}-1-0.json").read_text()),
        )
        for rank in range(world):
            several = json.loads((tmp_path / f"{name}-{world}-{rank}.json").read_text())
            together, _ = read_predictions(tmp_path / f"{name}-{world}-{rank}.parquet")
            for task in suite.tasks:
                expected, found = one[task.name], several[task.name]
                assert found["examples"] == expected["examples"] == (rows or len(suite.rows[task.name, "test"]))
                assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)
                assert together[task.name].same_rows(alone[task.name])
                np.testing.assert_allclose(
                    together[task.name].predictions, alone[task.name].predictions, rtol=1e-5, atol=1e-6
                )
