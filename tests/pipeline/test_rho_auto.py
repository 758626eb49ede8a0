"""A ratio that is chosen on validation data."""

import json
import math
from pathlib import Path

import pytest

from pave_lightning import Recipe, run_recipe
from pave_lightning.errors import PaveError
from pave_lightning.pipeline.commands import open_folder, run_stage
from pave_lightning.pipeline.planning import plan_rows
from pave_lightning.pipeline.stages.align import plain_vectors
from pave_lightning.purification.options import AUTO_RATIOS
from pave_lightning.tasks.data_module import TaskDataModule


@pytest.fixture
def auto_settings(ready_settings):
    return {**ready_settings, "purify": {"rho": "auto"}, "capture": {"examples": 8}}


@pytest.fixture
def recipe(auto_settings):
    return Recipe.model_validate(auto_settings)


@pytest.fixture
def runner(recipe, ready_runner):
    return ready_runner(recipe)


def test_the_ratio_with_the_best_average_is_taken(recipe, runner, choose, averages):
    task_arithmetic, emr = recipe.merge
    averages(0.1, 0.2, 0.3, math.nan, 0.25, 0.2)
    chosen = choose(runner, emr, "purified")
    assert chosen.facts["rho"] == 0.97
    assert [entry[:2] for entry in chosen.facts["rho_search"]] == [[rho, None] for rho in AUTO_RATIOS]
    assert [entry[2] for entry in chosen.facts["rho_search"]] == pytest.approx(
        [0.1, 0.2, 0.3, math.nan, 0.25, 0.2], nan_ok=True
    )
    fixed = emr.model_copy(update={"purify": emr.purify.model_copy(update={"rho": 0.97})})
    expected = dict(choose(runner, fixed, "purified").candidate().weights("words"))
    assert all(tensor.equal(expected[name]) for name, tensor in chosen.candidate().weights("words"))

    # Two scales for each ratio; the best of all is the higher scale of the second ratio.
    averages(0.2, 0.1, 0.1, 0.9, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.8, 0.8)
    chosen = choose(runner, task_arithmetic, "purified")
    assert (chosen.facts["rho"], chosen.scale, chosen.average) == (0.9375, 0.6, 0.9)
    assert [entry[1] for entry in chosen.facts["rho_search"]] == [0.2, 0.6, 0.2, 0.2, 0.2, 0.2]
    assert chosen.facts["search"] == [[0.2, 0.1], [0.6, 0.9]]


def test_the_larger_ratio_wins_among_equals_and_one_means_plain(recipe, runner, ready_runner, choose, averages):
    _, emr = recipe.merge
    averages(0.5, 0.6, 0.6, 0.4, 0.6, 0.1)
    assert choose(runner, emr, "purified").facts["rho"] == 0.992
    runner = ready_runner(recipe)  # the first one remembers what it chose
    averages(0.6, 0.6, 0.6, 0.6, 0.6, 0.6)
    chosen = choose(runner, emr, "purified")
    assert chosen.facts["rho"] == 1
    assert chosen.source is plain_vectors(runner.context)
    runner = ready_runner(recipe)
    averages(*[math.nan] * 6)
    with pytest.raises(PaveError, match="no ratio gives finite scores"):
        choose(runner, emr, "purified")


def test_one_merge_result_is_held_besides_the_one_that_is_made(recipe, runner, choose, averages, monkeypatch):
    import gc
    import weakref

    from pave_lightning.pipeline import tuning as module

    merge, alive, most = module.merge, weakref.WeakSet(), []

    class Watched:
        def __init__(self, found):
            self.found = found

        def __getattr__(self, name):
            return getattr(self.found, name)

    def watched(*arguments):
        gc.collect()
        most.append(len(alive))
        found = Watched(merge(*arguments))
        alive.add(found)
        return found

    monkeypatch.setattr(module, "merge", watched)
    averages(0.5, 0.6, 0.6, 0.4, 0.6, 0.7)
    choose(runner, recipe.merge[1], "purified")
    assert len(most) == 6
    assert max(most) <= 2


def test_a_whole_run_notes_what_was_tried_and_never_looks_at_test_rows_in_choosing(auto_settings, monkeypatch):
    steps = [{**step, "vectors": ["purified"]} for step in auto_settings["merge"]]
    recipe = Recipe.model_validate({**auto_settings, "merge": steps})
    for stage in ("fit", "capture"):
        run_stage(recipe, stage)
    read, dataset = [], TaskDataModule.dataset

    def watched(self, split):
        read.append(split)
        return dataset(self, split)

    with monkeypatch.context() as only_choosing:
        only_choosing.setattr("pave_lightning.pipeline.planning.checks.tokenised_problems", lambda recipe, folder: ())
        only_choosing.setattr(TaskDataModule, "dataset", watched)
        run_stage(recipe, "merge")
    assert set(read) == {"validation"}

    folder = run_recipe(recipe)
    for name in ("emr-purified", "task_arithmetic-purified"):
        result = json.loads((folder / "merged" / name / "manifest.json").read_text())["result"]
        assert [entry[0] for entry in result["rho_search"]] == list(AUTO_RATIOS)
        best = max(result["rho_search"], key=lambda entry: (entry[2], entry[0]))
        assert result["rho"] == best[0]
        assert result["scale"] == best[1]
        card = (folder / "merged" / name / "README.md").read_text()
        assert f"rho: {result['rho']}" in card
        assert "rho_origin: best of 6 on the validation splits" in card
    assert {state for _, state, _ in plan_rows(recipe, open_folder(recipe))} == {"there"}


def test_a_report_of_a_ratio_of_one_draws_no_ranks(auto_settings, averages):
    averages(*[0.5] * 6)
    step = {"method": "emr", "vectors": ["purified"]}
    folder = run_recipe(Recipe.model_validate({**auto_settings, "merge": [step]}))
    assert "emr,purified" in (folder / "results.csv").read_text()
    assert not list(Path(folder).glob("kept_ranks*"))
