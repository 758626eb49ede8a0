"""The model that is trained on all tasks together: made by a command, scored as a control, planned."""

import csv

import pytest
import torch

from pave_lightning import Recipe, load_merged, run_recipe
from pave_lightning.pipeline.commands import open_folder
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.task_data import data_module


@pytest.fixture
def joint_settings(recipe_settings):
    """Two tasks of different kinds, one merge, and heads that are fitted."""
    merge = [{"method": "task_arithmetic", "scale": 0.4, "vectors": ["plain"]}]
    return {**recipe_settings, "merge": merge, "controls": ["joint"]}


def rows_of(folder):
    return {(row["model"], row["heads"]): row for row in csv.DictReader((folder / "results.csv").open())}


def score_by_hand(context, task, model):
    """The primary metric of a model on the test rows, from its outputs alone."""
    data = data_module(context, task, 7)
    data.setup("test")
    with torch.no_grad():
        batches = list(data.test_dataloader())
        said = torch.cat([model(**task.inputs(batch)).logits for batch in batches])
        right = torch.cat([batch["labels"] for batch in batches])
    if task.kind == "regression":
        return float(torch.corrcoef(torch.stack([said[:, 0].double(), right.double()]))[0, 1])
    return float((said.argmax(1) == right).double().mean())


def test_a_run_with_joint(joint_settings, capsys):
    recipe = Recipe.model_validate({**joint_settings, "heads": ["expert", {"fit": "logits", "rows": 24}]})
    folder = run_recipe(recipe)
    rows = rows_of(folder)
    assert list(rows) == [
        ("base", "expert"),
        ("experts", "expert"),
        ("joint", "own"),
        ("joint", "logits-24"),
        ("task_arithmetic", "expert"),
        ("task_arithmetic", "logits-24"),
    ]
    context = Context(Results(recipe, open_folder(recipe)))
    for task in recipe.tasks:
        metric = f"{task.name}/{task.primary_metric}"
        model = load_merged(folder / "joint", task.name)
        assert float(rows["joint", "own"][metric]) == pytest.approx(score_by_hand(context, task, model), abs=1e-5)
        model = load_merged(folder / "joint", task.name, heads=folder / "heads" / "joint-logits-24")
        assert float(rows["joint", "logits-24"][metric]) == pytest.approx(score_by_hand(context, task, model), abs=1e-5)
