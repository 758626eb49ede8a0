"""Outputs that are no numbers: argmax would choose a class of them, and the score would look like any other."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pave_lightning.errors import PaveError
from pave_lightning.evaluation import CheckpointCandidate, Evaluator, ExpertsCandidate, SuiteData, refuse_non_finite
from pave_lightning.evaluation.options import ScaleSearch
from pave_lightning.evaluation.scale_search import ScaleSearcher
from pave_lightning.experts.trainers import build_trainer
from pave_lightning.merging.merged import MergedVectors
from pave_lightning.weights import Checkpoint


@pytest.fixture
def broken_head(suite, tmp_path):
    """The checkpoints of the suite's experts, the head of the second with NaN in it."""
    folder = shutil.copytree(suite.experts["second"], tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return {**suite.checkpoints(), "second": Checkpoint(folder, "bert")}


def score(suite, experts, candidate, tmp_path):
    trainer = build_trainer({"accelerator": "cpu", "devices": 1}, root=tmp_path, enable_progress_bar=False)
    evaluator = Evaluator(suite.tasks, experts, suite.checkpoint())
    return evaluator.score(candidate, SuiteData([suite.data(task) for task in suite.tasks], "test"), trainer)


def test_a_broken_head_gives_no_score_and_is_named(suite, broken_head, tmp_path):
    found = score(suite, broken_head, CheckpointCandidate(suite.checkpoint()), tmp_path)
    assert all(map(math.isnan, found["second"].metrics.values()))
    assert found["second"].broken == found["second"].examples
    assert all(map(math.isfinite, found["first"].metrics.values()))
    with pytest.raises(PaveError, match=r"^task 'second': \d+ of \d+ examples .* from the model ties.*; scale it down"):
        refuse_non_finite(found, "the model ties", "scale it down")


def test_finite_scores_pass(suite, tmp_path):
    found = score(suite, suite.checkpoints(), ExpertsCandidate(suite.checkpoints()), tmp_path)
    refuse_non_finite(found, "its expert", "")
    assert [score.broken for score in found.values()] == [0, 0, 0]


def test_a_scale_that_overflows_only_loses(suite, tmp_path):
    source = suite.vectors()
    merged = {parameter.name: torch.zeros(parameter.shape) for parameter in source.parameters}
    merged["pooler.dense.weight"] = torch.full_like(merged["pooler.dense.weight"], 3e38)
    searcher = ScaleSearcher(
        suite.tasks,
        Evaluator(suite.tasks, suite.checkpoints(), suite.checkpoint()),
        ExpertsCandidate(suite.checkpoints()),
        data=suite.data,
        options={"accelerator": "cpu", "devices": 1},
        precision="32-true",
        root=tmp_path,
    )
    tried = dict(searcher.best(source, MergedVectors(merged), ScaleSearch(search=(0.0, 4.0), points=3)).tried)
    assert math.isfinite(tried[0.0])
    assert math.isnan(tried[2.0])
    assert math.isnan(tried[4.0])
