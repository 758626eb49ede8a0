"""Which base a recipe means: named by its parts on the hub, or by the experts."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pave_lightning import Recipe, run_recipe
from pave_lightning.errors import PaveError
from pave_lightning.merging.folders import load_merged
from pave_lightning.pipeline.bases import folder_of_base
from pave_lightning.pipeline.commands import plan_recipe


@pytest.fixture
def settings(ready_settings):
    return {**ready_settings, "merge": ["average", "emr"], "capture": {"examples": 8}}


def test_base_and_experts_of_the_hub(settings, hub_cache, base_folder):
    hub_cache("owner/bases", base_folder.iterdir(), folder="small/last", revision="v1")
    for task in settings["tasks"]:
        hub_cache("owner/experts", Path(task["expert"]["from"]).iterdir(), folder=task["name"])
    named = {
        **settings,
        "name": "hub",
        "base": {"hub": "owner/bases", "folder": "small/last", "revision": "v1"},
        "tasks": [
            {**task, "expert": {"from": {"hub": "owner/experts", "folder": task["name"]}}} for task in settings["tasks"]
        ],
    }
    found, plain = (run_recipe(Recipe.model_validate(one)) for one in (named, settings))
    weights = [load_file(folder / "merged" / "average-plain" / "model.safetensors") for folder in (found, plain)]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[1])
    # A per-task model looks for the base again, by the name that is noted.
    noted = json.loads((found / "merged" / "emr-plain" / "pave.json").read_text())
    assert noted["base"] == "hf://owner/bases@v1/small/last"
    assert load_merged(found / "merged" / "emr-plain", "words") is not None
    assert "hf://owner/bases@v1/small/last" in (found / "merged" / "average-plain" / "README.md").read_text()


def test_a_base_that_the_experts_name(settings, hub_cache, tmp_path, base_folder):
    hub_cache("owner/base", base_folder.iterdir())
    tasks = []
    for task in settings["tasks"]:
        folder = shutil.copytree(task["expert"]["from"], tmp_path / task["name"])
        (folder / "README.md").write_text("---\nbase_model: owner/base\nbase_model_relation: finetune\n---\n")
        tasks.append({**task, "expert": {"from": str(folder)}})
    folder = run_recipe(Recipe.model_validate({**settings, "base": "infer", "tasks": tasks}))
    assert json.loads((folder / "merged" / "average-plain" / "pave.json").read_text())["base"] == "owner/base"
    card = (folder / "merged" / "average-plain" / "README.md").read_text()
    assert "base_model: owner/base" in card


def test_experts_that_name_none(settings):
    with pytest.raises(PaveError, match=r"base: infer: no expert says what its base is .*; name the base instead"):
        plan_recipe(Recipe.model_validate({**settings, "base": "infer"}))


def test_a_base_that_is_not_here(settings, tmp_path):
    folder = shutil.copytree(settings["tasks"][0]["expert"]["from"], tmp_path / "one")
    (folder / "README.md").write_text("---\nbase_model: /home/someone/base\n---\n")
    tasks = [{**settings["tasks"][0], "expert": {"from": str(folder)}}, settings["tasks"][1]]
    with pytest.raises(PaveError, match=r"no folder /home/someone/base.*; base: infer takes what the experts name"):
        folder_of_base(Recipe.model_validate({**settings, "base": "infer", "tasks": tasks}))
