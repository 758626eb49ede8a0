"""Experts and statistics that recipes share."""

import json
import shutil
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from pave_lightning import Recipe
from pave_lightning.experts import fitting
from pave_lightning.pipeline.commands import run_stage
from pave_lightning.pipeline.run_folder import RunFolder


@pytest.fixture
def settings(recipe_settings, tmp_path):
    trainer = {**recipe_settings["trainer"], "max_epochs": 1}
    return {**recipe_settings, "trainer": trainer, "shared": str(tmp_path / "shared"), "merge": ["average", "emr"]}


@pytest.fixture
def trained(monkeypatch):
    """Names of the tasks whose experts are trained, in order."""
    names, fit = [], fitting.fit_expert

    def watched(task, *arguments, **options):
        names.append(task.name)
        return fit(task, *arguments, **options)

    monkeypatch.setattr(fitting, "fit_expert", watched)
    return names


def stages_of(settings, kind):
    return {path.parent.name for path in Path(settings["shared"], kind).glob("*/manifest.json")}


def test_recipes_take_each_others_experts_and_make_others_beside_them(settings, trained, caplog):
    first = Recipe.model_validate(settings)
    for stage in ("fit", "capture", "merge"):
        run_stage(first, stage)
    assert trained == ["words", "numbers"]
    experts, statistics = stages_of(settings, "experts"), stages_of(settings, "statistics")
    assert sorted(name.partition("-")[0] for name in experts) == ["numbers", "words"]
    assert len(statistics) == 2
    own = Path(settings["output"]) / "tiny"
    assert not (own / "experts").exists()
    assert not (own / "statistics").exists()
    assert not (own / "data").exists()
    assert (Path(settings["shared"]) / "data").is_dir()

    caplog.set_level("INFO", logger="pave_lightning")
    second = Recipe.model_validate({**settings, "name": "other", "merge": ["average"]})
    for stage in ("fit", "capture", "merge"):
        run_stage(second, stage)
    assert trained == ["words", "numbers"]
    assert "is up to date" in caplog.text
    assert (stages_of(settings, "experts"), stages_of(settings, "statistics")) == (experts, statistics)
    inputs = [
        json.loads((own.parent / name / "merged" / "average-purified" / "manifest.json").read_text())["inputs"]
        for name in ("tiny", "other")
    ]
    assert inputs[0] == inputs[1]

    words, numbers = settings["tasks"]
    words = {**words, "training": {"learning_rate": 2e-3}}
    run_stage(Recipe.model_validate({**settings, "name": "faster", "tasks": [words, numbers]}), "fit")
    assert trained == ["words", "numbers", "words"]
    run_stage(Recipe.model_validate({**settings, "name": "seed", "seed": 4}), "fit", "numbers")
    assert trained == ["words", "numbers", "words", "numbers"]
    assert stages_of(settings, "experts") > experts
    assert len(stages_of(settings, "experts")) == 4


def test_an_expert_that_another_process_makes_is_waited_for(ready_settings, tmp_path, caplog):
    caplog.set_level("INFO", logger="pave_lightning")
    recipe = Recipe.model_validate({**ready_settings, "shared": str(tmp_path / "shared")})
    other = Recipe.model_validate({**ready_settings, "shared": str(tmp_path / "elsewhere")})
    run_stage(other, "fit", "words")
    (made,) = Path(other.shared).glob("experts/words-*")

    final = Path(recipe.shared) / "experts" / made.name
    final.parent.mkdir(parents=True)
    theirs = FileLock(final.with_name(f".{made.name}.lock"), thread_local=False)
    theirs.acquire()
    waiting = threading.Thread(target=run_stage, args=(recipe, "fit", "words"))
    waiting.start()
    while "waiting for it" not in caplog.text:
        assert waiting.is_alive()
        waiting.join(0.01)
    assert not final.exists()
    shutil.copytree(made, final)
    before = (final / "manifest.json").stat().st_mtime_ns
    caplog.clear()
    theirs.release()
    waiting.join(60)
    assert not waiting.is_alive()
    assert f"experts/{made.name} is up to date" in caplog.text
    assert (final / "manifest.json").stat().st_mtime_ns == before


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run", tmp_path / "shared")


def test_only_experts_statistics_and_data_lie_in_the_shared_folder(folder, tmp_path):
    for stage in ("experts/a", "statistics/a"):
        assert folder.path(stage) == tmp_path / "shared" / stage
    for stage in ("purified/a", "merged/a", "scores/experts", "diagnostics/a"):
        assert folder.path(stage) == tmp_path / "run" / stage
    assert folder.data == tmp_path / "shared" / "data"
    assert RunFolder(tmp_path / "run").data == tmp_path / "run" / "data"


def test_what_killed_processes_left_of_a_stage_is_swept_when_it_is_claimed(folder):
    with folder.writing("experts/a", {}) as writer:
        (writer.path / "weights").write_text("12345")
    experts = folder.shared / "experts"
    (experts / "a").rename(experts / "a.replaced-4711")
    for name in ("a.unfinished-4711", "b.unfinished-4712"):
        (experts / name).mkdir()
        (experts / name / "weights").write_text("half")
    with folder.claimed("experts/a"):
        assert folder.current("experts/a", {}) is not None
        # Of another stage, which another process may be making just now.
        assert {path.name for path in experts.iterdir()} == {".a.lock", "a", "b.unfinished-4712"}


def test_a_sweep_of_the_run_folder_leaves_the_shared_one_alone(folder):
    (folder.shared / "experts" / "b.unfinished-4712").mkdir(parents=True)
    with folder.locked():
        assert (folder.shared / "experts" / "b.unfinished-4712").is_dir()


def test_stages_of_its_own_are_not_claimed_apart(folder):
    with folder.claimed("merged/a"), folder.claimed("merged/a"):
        assert not list(folder.root.rglob("*.lock"))
