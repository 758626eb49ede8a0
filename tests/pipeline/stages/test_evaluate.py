"""What the stage of scores leaves in the run folder."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pave_lightning import Recipe
from pave_lightning.pipeline.commands import run_stage
from pave_lightning.recipe.loading import recipe_to_yaml
from pave_lightning.tasks.predictions import FILE, read_predictions


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_predictions_are_the_same_for_one_process_and_for_two(ready_settings, settings_in, expert_folders, tmp_path):
    words, _ = ready_settings["tasks"]
    numbers = {**settings_in(tmp_path)["tasks"][1], "expert": {"from": str(expert_folders["third"])}}
    settings = {**ready_settings, "tasks": [words, numbers], "merge": []}
    recipe = Recipe.model_validate(settings)
    for command in ("fit", "evaluate"):
        run_stage(recipe, command)
    scores = tmp_path / "runs" / "tiny" / "scores"
    one = shutil.move(scores, tmp_path / "one")

    trainer = {**ready_settings["trainer"], "devices": 2, "strategy": "ddp"}
    path = tmp_path / "two.yaml"
    path.write_text(recipe_to_yaml(Recipe.model_validate({**settings, "trainer": trainer})))
    command = [sys.executable, "-m", "pave_lightning", "evaluate", str(path)]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, env=threads)
    assert done.returncode == 0, done.stdout + done.stderr

    for label in ("base", "experts"):
        (first, classes), (second, _) = (read_predictions(place / label / FILE) for place in (one, scores))
        assert classes == {"words": ["low", "high"], "numbers": []}
        metrics = json.loads((scores / label / "manifest.json").read_text())["result"]["scores"]["words"]["metrics"]
        for task in ("words", "numbers"):
            assert first[task].rows.tolist() == list(range(30))
            assert first[task].same_rows(second[task])
            np.testing.assert_allclose(first[task].predictions, second[task].predictions, atol=1e-5)
        right = second["words"].predictions == second["words"].targets
        assert metrics["accuracy"] == pytest.approx(right.mean(), abs=1e-6)
