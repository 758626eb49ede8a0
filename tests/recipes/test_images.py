"""The recipe of image tasks, cut down: two tasks, few rows, few epochs."""

import csv
from pathlib import Path

import pytest

from pave_lightning import load_recipe, run_recipe
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder

RECIPE = Path(__file__).parents[2] / "recipes" / "images.yaml"


def test_a_plan_finds_nothing_wrong(tmp_path):
    check_recipe(load_recipe(RECIPE), RunFolder(tmp_path))


@pytest.mark.slow
def test_cut_down_it_runs_whole_and_experts_learn(tmp_path):
    changes = [
        "tasks=[images/flag, images/letter]",
        "trainer.max_epochs=2",
        "capture.examples=64",
        "examples={train: 1000, validation: 60, test: 100}",
        "merge=[{method: average}, {method: emr}]",
        f"output={tmp_path}",
        f"tracking.uri=sqlite:///{tmp_path / 'runs.db'}",
    ]
    folder = run_recipe(load_recipe(RECIPE, changes))
    table = list(csv.DictReader((folder / "results.csv").open()))
    found = {(row["model"], row["vectors"], row["heads"]): row for row in table}
    assert {name for name, *_ in found} >= {"base", "experts", "average", "emr"}
    assert {(vectors, heads) for name, vectors, heads in found if name == "average"} == {
        (vectors, heads) for vectors in ("plain", "purified") for heads in ("expert", "logits")
    }
    experts = found["experts", "", "expert"]
    # By chance 1/24 and 1/26.
    assert float(experts["flag/accuracy"]) > 0.4
    assert float(experts["letter/accuracy"]) > 0.25
