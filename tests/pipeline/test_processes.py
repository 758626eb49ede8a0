"""Merges that several processes share: the same weights and choices as one process makes, to the bit."""

from pathlib import Path

import pytest

from pave_lightning import Recipe
from pave_lightning.system.files import read_json


def merged(settings, processes, *merge):
    """The run folder after all merges of a recipe."""
    from pave_lightning.pipeline.commands import run_stage

    compute = {"processes": processes, "threads": 1}
    settings = {**settings, "merge": list(merge), "compute": compute, "name": f"by-{processes}"}
    recipe = Recipe.model_validate(settings)
    for command in ("fit", "merge"):
        run_stage(recipe, command)
    return Path(settings["output"]) / settings["name"] / "merged"


@pytest.mark.slow
def test_two_processes_make_what_one_makes(ready_settings, assert_same_weights):
    searched = {"search": [0.2, 0.8], "points": 3, "examples": 12}
    steps = [
        {"method": "task_arithmetic", "scale": searched, "vectors": ["plain"]},
        {"method": "ties", "vectors": ["plain"]},
        {"method": "tsv_m", "vectors": ["plain"]},
        {"method": "emr", "vectors": ["plain"]},
    ]
    one, two = (merged(ready_settings, processes, *steps) for processes in (1, 2))
    names = sorted(folder.name for folder in one.iterdir())
    assert names == ["emr-plain", "task_arithmetic-plain", "ties-plain", "tsv_m-plain"]
    for name in names:
        assert_same_weights(one / name, two / name)
        assert read_json(one / name / "pave.json") == read_json(two / name / "pave.json")
        assert (two / name / "model.safetensors.index.json").is_file()
    assert not list(two.parent.glob("*unfinished*"))
