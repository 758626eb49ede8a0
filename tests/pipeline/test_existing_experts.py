"""Experts that exist already in a run: values that are no numbers, and configurations of their own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from pave_lightning import Recipe, load_merged
from pave_lightning.errors import PaveError
from pave_lightning.pipeline.commands import open_folder, run_stage

PLACE = "encoder.layer.1.output.dense.weight"


def spoil(folder, name, value=torch.nan):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name].double().fill_(value)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def copied(tmp_path, base_folder, expert_folders):
    def copy(kind):
        folder = tmp_path / kind
        shutil.copytree({"base": base_folder, "expert": expert_folders["first"]}[kind], folder)
        return folder

    return copy


@pytest.mark.parametrize("value", [float("nan"), 1e300])
def test_values_of_a_base_are_read_before_training(recipe_settings, copied, value):
    base = copied("base")
    spoil(base, PLACE, value)
    recipe = Recipe.model_validate({**recipe_settings, "base": str(base)})
    with pytest.raises(PaveError, match=rf"{base}: .*{PLACE}"):
        run_stage(recipe, "fit")
    assert not (open_folder(recipe).root / "training").exists()


def test_values_of_an_expert_are_read_before_another_is_trained(recipe_settings, copied):
    words, numbers = recipe_settings["tasks"]
    expert = copied("expert")
    spoil(expert, f"bert.{PLACE}")
    recipe = Recipe.model_validate({**recipe_settings, "tasks": [numbers, {**words, "expert": {"from": str(expert)}}]})
    with pytest.raises(PaveError, match=rf"take in the expert of words: {expert}: .*{PLACE}"):
        run_stage(recipe, "fit")
    assert not (open_folder(recipe).root / "experts" / "numbers").exists()


def test_values_of_a_base_are_read_before_experts_are_captured(ready_settings, copied):
    base = copied("base")
    spoil(base, PLACE)
    with pytest.raises(PaveError, match=rf"the base {base}: {PLACE}"):
        run_stage(Recipe.model_validate({**ready_settings, "base": str(base)}), "fit")


def test_an_expert_with_another_function_is_scored_with_it_and_merged_without(
    ready_settings, recipe_settings, expert_folders, tmp_path
):
    expert = tmp_path / "expert"
    shutil.copytree(expert_folders["third"], expert)
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps({**config, "hidden_act": "relu", "layer_norm_eps": 0.5}))
    numbers = recipe_settings["tasks"][1] | {
        "expert": {"from": str(expert), "accept": ["hidden_act", "layer_norm_eps"]}
    }
    tasks = [numbers, ready_settings["tasks"][1]]
    settings = {**ready_settings, "tasks": tasks, "merge": [{"method": "average", "vectors": ["plain"]}]}
    recipe = Recipe.model_validate(settings)
    for stage in ("fit", "merge", "evaluate"):
        run_stage(recipe, stage)
    root = open_folder(recipe).root
    rows = [json.loads(line) for line in Path(numbers["data"]["test"]).read_text().splitlines()]
    batch = AutoTokenizer.from_pretrained(expert)(
        [row["text"] for row in rows], padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    labels = torch.tensor([row["label"] for row in rows])

    def pearson(model):
        with torch.no_grad():
            return torch.corrcoef(torch.stack([model.eval()(**batch).logits[:, 0], labels]))[0, 1].item()

    def scored(name):
        manifest = json.loads((root / "scores" / name / "manifest.json").read_text())
        return pytest.approx(manifest["result"]["scores"]["numbers"]["metrics"]["pearson"], abs=1e-5)

    own = AutoModelForSequenceClassification.from_pretrained(expert)
    as_base = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
    plain = AutoModelForSequenceClassification.from_pretrained(expert, **as_base)
    assert abs(pearson(own) - pearson(plain)) > 1e-3
    assert pearson(own) == scored("experts")
    folder = root / "merged" / "average-plain"
    for found in (load_merged(folder, "numbers").config, AutoConfig.from_pretrained(folder)):
        assert (found.hidden_act, found.layer_norm_eps) == ("gelu", 1e-12)
    assert pearson(load_merged(folder, "numbers")) == scored("average-plain")
