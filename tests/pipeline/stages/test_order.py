"""Every kind of stage is walked by runs, plans and single commands, whatever it does."""

import importlib
import pkgutil

import pytest

from pave_lightning import Recipe
from pave_lightning.pipeline import stages
from pave_lightning.pipeline.commands import open_folder, run_recipe, run_stage
from pave_lightning.pipeline.planning import plan_rows
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages import FitStage, stages_of


class AlphabetStage(Stage):
    """Made on the way, for what counts."""

    command = "count"
    on_demand = True
    name = "alphabets/all"

    @classmethod
    def all(cls, results):
        return ()

    def about(self):
        return "letters"

    def depends_on(self):
        return {}

    def run(self, context):
        with context.writing(self) as writer:
            (writer.path / "letters").write_text("abc")


class CountStage(Stage):
    """Counts what stands beside it, for each task."""

    command = "count"

    def __init__(self, results, task):
        super().__init__(results)
        self.task = task

    @classmethod
    def all(cls, results):
        return [cls(results, task) for task in results.recipe.tasks]

    @property
    def name(self):
        return f"counts/{self.task.name}"

    def about(self):
        return f"counts for {self.task.name}"

    def needs(self):
        return [FitStage(self.results, self.task), AlphabetStage(self.results)]

    def depends_on(self):
        return {"expert": FitStage(self.results, self.task).digest(), "seed": self.results.recipe.seed}

    def run(self, context):
        letters = (self.results.path(AlphabetStage(self.results)) / "letters").read_text()
        with context.writing(self) as writer:
            writer.result["count"] = len(letters)


@pytest.fixture
def counted(monkeypatch, ready_settings):
    """The settings of a recipe that merges nothing, and a new kind of stage that is made after all experts."""
    kinds = list(stages.KINDS)
    behind = kinds.index(stages.CaptureStage) + 1
    kinds[behind:behind] = [CountStage, AlphabetStage]
    monkeypatch.setattr(stages, "KINDS", tuple(kinds))
    return {**ready_settings, "merge": [], "capture": {"examples": 8}}


def rows_of(settings):
    recipe = Recipe.model_validate(settings)
    return {name: (state, what) for name, state, what in plan_rows(recipe, open_folder(recipe))}


def test_a_new_stage_is_planned_made_and_commanded(counted, caplog):
    planned = rows_of(counted)
    names = [name for name in planned if not name.startswith("purified-experts/")]
    fits = ["experts/words", "experts/more", "statistics/words", "statistics/more"]
    assert names == [*fits, "alphabets/all", "counts/words", "counts/more", "scores/base", "scores/experts"]
    assert planned["counts/words"] == ("to do", "counts for words")

    recipe = Recipe.model_validate(counted)
    folder = run_recipe(recipe)
    results = Results(recipe, open_folder(recipe))
    assert results.finished(CountStage(results, recipe.task("more"))).result == {"count": 3}
    assert (folder / "counts" / "words" / "manifest.json").is_file()
    again = rows_of(counted)
    assert {again[name][0] for name in names} == {"there"}
    assert rows_of({**counted, "seed": 7})["counts/words"][0] == "stale"

    caplog.set_level("INFO", logger="pave_lightning")
    run_stage(recipe, "count", "more")
    assert "counts/more is up to date" in caplog.text
    assert "counts/words is up to date" not in caplog.text
    assert "alphabets/all is up to date" not in caplog.text, "nobody asked for it"


def test_the_stages_of_a_run_stand_after_what_they_need(recipe_settings):
    steps = [{"method": "fisher", "vectors": ["plain"]}, {"method": "average"}, {"method": "regmean"}]
    changes = {"capture": {"moments": "input"}, "evaluate": {"purified_experts": True}, "merge": steps}
    recipe = Recipe.model_validate({**recipe_settings, **changes})
    found = stages_of(Results(recipe, open_folder(recipe)))
    names = [stage.name for stage in found]
    assert len(set(names)) == len(names)
    for place, stage in enumerate(found):
        assert {needed.name for needed in stage.needs()} <= set(names[:place]), stage.name
    kinds = list(dict.fromkeys(name.partition("/")[0] for name in names))
    assert kinds == ["experts", "statistics", "gradients", "merged", "purified", "scores"]


def test_every_file_of_stages_is_in_the_order_of_work():
    files = {module.name for module in pkgutil.iter_modules(stages.__path__, f"{stages.__name__}.")}
    for file in files:
        defined = vars(importlib.import_module(file)).values()
        kinds = [one for one in defined if isinstance(one, type) and issubclass(one, Stage) and one.__module__ == file]
        assert len(kinds) == 1, file
        assert kinds[0] in stages.KINDS
    assert len(files) == len(stages.KINDS)
