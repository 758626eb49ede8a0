"""Merge methods through a recipe, on tiny models: from experts to a merged folder that loads and answers.

All of them are slow; one of each kind, by form and by what it needs, is not.
"""

import json

import pytest
import torch

from pave_lightning import Recipe, load_merged
from pave_lightning.merging import Need, known_methods
from pave_lightning.pipeline.commands import open_folder, run_stage

OURS = {name: kind for name, kind in sorted(known_methods().items()) if kind.__module__.startswith("pave_lightning.")}
ADAPTED = [name for name, kind in OURS.items() if Need.LOW_RANK in kind.needs or name in ("knots", "core_space")]
WEIGHTS = [name for name in OURS if name not in ADAPTED]
KINDS = list({(OURS[name].form, OURS[name].needs): name for name in WEIGHTS}.values())
EXAMPLES = {"examples": 8}


def step(name, vectors):
    needs = OURS[name].needs
    found = {"method": name, "vectors": vectors}
    if Need.ANCHOR in needs:
        found["anchor"] = "task_arithmetic"
    if Need.UNLABELLED_EXAMPLES in needs:
        found["options"] = EXAMPLES
    return found


def merged_folders(recipe):
    for stage in ("fit", "capture", "merge"):
        run_stage(recipe, stage)
    root = open_folder(recipe).root / "merged"
    return {folder.name: folder for folder in sorted(root.iterdir())}


def check(folder, recipe):
    """The folder loads for each task, differs from the base, and answers with finite numbers."""
    words = {"input_ids": torch.tensor([[2, 10, 20, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    for task in recipe.tasks:
        model = load_merged(folder, task.name)
        with torch.no_grad():
            logits = model(**words).logits
        assert logits.shape == (1, task.output_size)
        assert torch.isfinite(logits).all()
    facts = json.loads((folder / "pave.json").read_text())
    assert facts["method"] in OURS
    return facts


@pytest.mark.parametrize(
    ("names", "vectors"),
    [
        pytest.param(KINDS, "plain", id="one of each kind"),
        pytest.param(WEIGHTS, "plain", id="all, plain", marks=pytest.mark.slow),
        pytest.param(WEIGHTS, "purified", id="all, purified", marks=pytest.mark.slow),
    ],
)
def test_fully_fine_tuned_experts_are_merged(names, vectors, ready_settings):
    settings = {
        **ready_settings,
        "capture": {"examples": 16, "moments": "input", "norms": True, "gradient_examples": 6},
        "merge": [step(name, [vectors]) for name in dict.fromkeys(["task_arithmetic", *names])],
    }
    recipe = Recipe.model_validate(settings)
    folders = merged_folders(recipe)
    assert set(folders) == {f"{name}-{vectors}" for name in ["task_arithmetic", *names]}
    for name, folder in folders.items():
        facts = check(folder, recipe)
        assert ("sequential" in facts) == hasattr(OURS[facts["method"]], "start_from"), name


def test_every_method_for_adapters_merges_them(recipe_settings):
    lora = {"rank": 2, "alpha": 4, "target_modules": ["query", "value"]}
    settings = {
        **recipe_settings,
        "training": {**recipe_settings["training"], "lora": lora},
        "merge": [step(name, ["plain"]) for name in [*ADAPTED, "task_arithmetic"]],
    }
    recipe = Recipe.model_validate(settings)
    folders = merged_folders(recipe)
    assert set(folders) == {f"{name}-plain" for name in [*ADAPTED, "task_arithmetic"]}
    for folder in folders.values():
        check(folder, recipe)


@pytest.mark.parametrize("name", OURS)
def test_every_method_is_told_on_the_command_line(name):
    kind = OURS[name]
    assert kind.__doc__
    assert "Source" in kind.__doc__
    assert all(field.description for field in kind.Options.model_fields.values())
