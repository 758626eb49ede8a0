"""A need is met by the provider that is registered for it, and by nothing else."""

from dataclasses import replace
from enum import StrEnum

import pytest
import torch

from pave_lightning import Recipe
from pave_lightning.errors import PaveError
from pave_lightning.merging import MethodOptions, Need, StaticMethod, merge_method, registry
from pave_lightning.pipeline import stages
from pave_lightning.pipeline.commands import open_folder, run_stage
from pave_lightning.pipeline.planning import check_recipe, plan_rows
from pave_lightning.pipeline.providers import Provider, base, known_providers, providers_of, provides
from pave_lightning.pipeline.stage import Stage
from pave_lightning.system.plug_ins import Registry
from pave_lightning.weights import Checkpoint


def test_every_need_has_its_provider():
    assert set(known_providers()) == set(Need)


def test_a_need_has_one_provider():
    with pytest.raises(ValueError, match="two providers are named 'an anchor': Anchor and Second"):

        @provides(Need.ANCHOR)
        class Second(Provider):
            def provide(self, evidence, context, method, request):
                return evidence

    assert known_providers()[Need.ANCHOR].__name__ == "Anchor"


def test_a_need_without_provider_is_told(monkeypatch):
    monkeypatch.setattr(base, "_registry", Registry("provider", "pave_lightning.pipeline.providers"))
    monkeypatch.setattr(base._registry, "known", dict)
    with pytest.raises(PaveError, match="nothing provides Fisher information, which a merge needs"):
        providers_of({Need.FISHER})
    assert providers_of(frozenset()) == []


class Extra(StrEnum):
    """A need that merging does not know."""

    FACTORS = "factors of tasks"


class FactorStage(Stage):
    """One factor a task."""

    command = "merge"
    on_demand = True
    name = "factors/all"

    @classmethod
    def all(cls, results):
        return ()

    def about(self):
        return "one factor a task"

    def depends_on(self):
        return {"seed": self.results.recipe.seed}

    def run(self, context):
        with context.writing(self) as writer:
            tasks = context.recipe.tasks
            writer.result["factors"] = {task.name: place + 1.0 for place, task in enumerate(tasks)}


@pytest.fixture
def weighted(monkeypatch, ready_settings):
    """The settings of a recipe whose method needs what only a new provider gives."""
    monkeypatch.setattr(base, "_registry", base._registry.copy())
    monkeypatch.setattr(registry, "_registry", registry._registry.copy())
    monkeypatch.setattr(stages, "KINDS", (*stages.KINDS, FactorStage))
    asked = []

    @provides(Extra.FACTORS)
    class Factors(Provider):
        def problems(self, step, recipe, *, needed):
            if needed and recipe.capture.examples < 4:
                yield f"{step.method} needs 4 examples; raise capture.examples"

        def stages(self, request):
            return [FactorStage(request.results)]

        def inputs(self, request):
            return {"factors": FactorStage(request.results).inputs()}

        def provide(self, evidence, context, method, request):
            asked.append((request.step.name, request.vectors))
            factors = context.results.finished(FactorStage(context.results)).result["factors"]
            return replace(evidence, further={**evidence.further, Extra.FACTORS: factors})

    @merge_method("factored")
    class Factored(StaticMethod[MethodOptions]):
        summary = "task vectors times what a provider says"
        source = "this test"
        needs = frozenset({Extra.FACTORS})
        elementwise = True

        def merge(self, parameter, base, vectors):
            factors = self.evidence.further[Extra.FACTORS]
            return sum(factors[task] * vector for task, vector in vectors.items())

    settings = {**ready_settings, "merge": [{"method": "factored", "vectors": ["plain"]}]}
    return settings, asked


def test_a_new_need_is_met_by_its_provider_alone(weighted, expert_folders, base_folder):
    settings, asked = weighted
    recipe = Recipe.model_validate(settings)
    for command in ("fit", "merge"):
        run_stage(recipe, command)
    assert asked == [("factored", "plain")]

    merged = Checkpoint(open_folder(recipe).path("merged/factored-plain"), "bert")
    start = Checkpoint(base_folder, "bert")
    folders = [task["expert"]["from"] for task in settings["tasks"]]
    first, second = (Checkpoint(folder, "bert") for folder in folders)
    name = "encoder.layer.0.output.dense.weight"
    expected = 1 * (first.tensor(name) - start.tensor(name)) + 2 * (second.tensor(name) - start.tensor(name))
    torch.testing.assert_close(merged.tensor(name) - start.tensor(name), expected)

    def states(**changes):
        changed = Recipe.model_validate({**settings, **changes})
        return {name: state for name, state, _ in plan_rows(changed, open_folder(changed))}

    assert states()["factors/all"] == states()["merged/factored-plain"] == "there"
    other = states(seed=5)
    assert other["factors/all"] == other["merged/factored-plain"] == "stale"


def test_what_a_new_provider_has_against_a_recipe_is_told_by_plans(weighted):
    settings, _ = weighted
    recipe = Recipe.model_validate({**settings, "capture": {"examples": 3}})
    with pytest.raises(PaveError, match=r"merge step 'factored': factored needs 4 examples; raise capture\.examples"):
        check_recipe(recipe, open_folder(recipe))
    # Whether it is needed is what the provider is told.
    other = recipe.model_copy(update={"merge": Recipe.model_validate({**settings, "merge": ["average"]}).merge})
    check_recipe(other, open_folder(other))
