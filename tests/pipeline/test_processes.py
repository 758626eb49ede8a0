"""Merges that several processes share: the same weights and choices as one process makes, to the bit."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pave_lightning import Recipe
from pave_lightning.merging import method_named
from pave_lightning.pipeline.commands import open_folder
from pave_lightning.pipeline.planning import checks
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stages import MergeStage
from pave_lightning.purification.options import Compute
from pave_lightning.purification.vectors import solving_device
from pave_lightning.system.files import read_json


def merged(settings, processes, *merge, before=("fit",)):
    """The folder of merged models after all merges of a recipe."""
    from pave_lightning.pipeline.commands import run_stage

    compute = {"processes": processes, "threads": 1}
    settings = {**settings, "merge": list(merge), "compute": compute, "name": f"by-{processes}"}
    recipe = Recipe.model_validate(settings)
    for command in (*before, "merge"):
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


@pytest.mark.slow
def test_two_processes_purify_and_fit_heads_as_one(ready_settings, assert_same_weights):
    settings = {**ready_settings, "purify": {"rho": 0.8, "scope": "model"}, "heads": ["labels"]}
    step = {"method": "ties", "vectors": ["purified"], "scale": {"search": [0.5, 1.0], "points": 2, "examples": 12}}
    one, two = (merged(settings, processes, step, before=("fit", "capture")) for processes in (1, 2))
    names = sorted(folder.name for folder in two.parent.iterdir())
    assert "purified" in names
    for kind in ("purified", "merged"):
        assert_same_weights(one.parent / kind, two.parent / kind)
    found = [next((folder.parent / "purified").rglob("manifest.json")) for folder in (one, two)]
    assert read_json(found[0])["result"] == read_json(found[1])["result"]


def rank_one(output):
    """The number of the second process of a merge below a folder, once it is there."""
    for place in Path("/proc").iterdir():
        with suppress(OSError):
            told = (place / "environ").read_bytes() if place.name.isdecimal() else b""
            if b"PAVE_GROUP=1/2/" in told and str(output).encode() in told:
                return int(place.name)
    return None


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_merge_and_is_named(ready_settings, write_recipe):
    from pave_lightning.pipeline.commands import run_stage
    from pave_lightning.recipe.loading import recipe_to_yaml

    merge = [{"method": "tsv_m", "vectors": ["plain"]}]
    recipe = Recipe.model_validate({**ready_settings, "merge": merge, "compute": {"processes": 2}})
    run_stage(recipe, "fit")
    command = [sys.executable, "-m", "pave_lightning", "merge", str(write_recipe(recipe_to_yaml(recipe)))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as driver:
        deadline = time.monotonic() + 600
        while (number := rank_one(recipe.output)) is None and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(number, signal.SIGKILL)
        killed = time.monotonic()
        told = driver.communicate(timeout=200)[1]
    assert time.monotonic() - killed < 30
    assert driver.returncode == 2
    assert "process 2 of 2 of the stage 'merge' was killed from outside (SIGKILL)" in told
    assert "Traceback" not in told
    root = Path(recipe.output) / recipe.name
    assert not list(root.rglob("*unfinished*"))
    assert not (root / "merged").exists() or not list((root / "merged").iterdir())


def stages(settings, *merge, **compute):
    recipe = Recipe.model_validate({**settings, "merge": list(merge), "compute": compute})
    return {stage.step.name: stage for stage in MergeStage.all(Results(recipe, open_folder(recipe)))}


def test_plans_say_what_runs_in_one_process_and_where(ready_settings, monkeypatch):
    plain = {"vectors": ["plain"]}
    anchored = {"method": "distillation", "anchor": "task_arithmetic", **plain}
    found = stages(ready_settings, {"method": "task_arithmetic", **plain}, anchored, processes=3, threads=2)
    assert found["task_arithmetic"].about() == "task_arithmetic, in 3 processes"
    assert found["task_arithmetic"].processes == 3
    told = found["distillation"].about()
    assert told.startswith("distillation, in one process (distillation: ")
    assert found["distillation"].processes == 1
    assert stages(ready_settings, {"method": "ties", **plain})["ties"].about() == "ties"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    found = stages(ready_settings, {"method": "ties", **plain}, {"method": "fisher", **plain}, device="cuda")
    assert found["ties"].about() == "ties, on cuda"
    assert found["fisher"].about() == "fisher, on the CPU (what it needs besides the weights is there)"


def test_one_that_cannot_be_divided_keeps_what_builds_on_it_together(ready_settings, monkeypatch):
    monkeypatch.setattr(method_named("task_arithmetic"), "parallel", False)
    monkeypatch.setattr(method_named("task_arithmetic"), "serial_because", "it is for the test")
    merge = [{"method": "task_arithmetic"}, {"method": "ties", "anchor": "task_arithmetic"}]
    assert stages(ready_settings, *merge, processes=2)["ties"].processes == 1


@pytest.mark.parametrize(
    ("device", "cards", "rank", "expected"),
    [
        ("cpu", 2, 1, "cpu"),
        ("auto", 0, 1, "cpu"),
        ("auto", 2, 1, "cuda:1"),
        ("cuda", 2, 2, "cuda:0"),
        ("cuda:1", 2, 0, "cuda:1"),
        ("mps", 0, 1, "mps"),
    ],
)
def test_each_process_has_its_device(device, cards, rank, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: cards)
    assert Compute(device=device).device_of(rank) == expected
    assert solving_device(Compute(device=device), rank) == expected.replace("mps", "cpu")


@pytest.mark.parametrize(
    ("device", "cards", "told"),
    [
        ("cuda", 0, "compute.device is cuda, but PyTorch finds no graphics card"),
        ("cuda:3", 2, "compute.device is cuda:3, but PyTorch finds 2 graphics cards, numbered from 0"),
        ("cuda:1", 2, None),
        ("auto", 0, None),
    ],
)
def test_a_device_that_is_not_there_is_told(device, cards, told, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: cards)
    problems = list(checks._device_problems(device))
    assert problems == [] if told is None else problems[0].startswith(told)


def test_names_of_devices(recipe_problems):
    text = "name: a\nbase: b\ntasks: [pocket/movie]\ncompute: {device: tpu}\n"
    assert "compute.device: expected auto, cpu, mps, cuda, or one card such as cuda:0; found 'tpu'" in str(
        recipe_problems(text)
    )


def test_processes_share_the_threads(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    assert Compute(processes=2).threads_of_each(2) == 3
    assert Compute(processes=9).threads_of_each(9) == 1
    assert Compute(processes=2, threads=5).threads_of_each(2) == 5
    assert Compute().threads_of_each(1) is None


def test_threads_count_as_an_input_where_they_are_set(ready_runner, ready_settings):
    merge = [{"method": "ties", "vectors": ["plain"]}]
    inputs = []
    for compute in ({}, {"processes": 2}, {"threads": 1}):
        recipe = Recipe.model_validate({**ready_settings, "merge": merge, "compute": compute})
        (stage,) = MergeStage.all(ready_runner(recipe).results)
        inputs.append(stage.inputs())
    assert inputs[0] == inputs[1]
    assert inputs[2] == {**inputs[0], "threads": 1}
