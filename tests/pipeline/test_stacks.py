"""Stacks of transforms through a recipe: from names to merged models, in plans and in whole runs."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pave_lightning import Recipe, run_recipe
from pave_lightning.config import Section
from pave_lightning.errors import PaveError
from pave_lightning.merging.methods.dare import DareOptions, DroppedTaskVectors
from pave_lightning.pipeline.commands import open_folder
from pave_lightning.pipeline.planning import check_recipe, plan_rows, predicted_cost
from pave_lightning.pipeline.purifications import purifications
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stacks import stack_of
from pave_lightning.pipeline.stages import CaptureStage, MergeStage, PurifyStage
from pave_lightning.pipeline.stages.align import plain_vectors
from pave_lightning.pipeline.stages.merge import stacked_vectors
from pave_lightning.pipeline.stages.purify import task_vectors
from pave_lightning.purification import PurifiedTaskVectors
from pave_lightning.purification.options import AUTO_RATIOS
from pave_lightning.transforms import Transform, base, vector_transform
from pave_lightning.weights import DerivedTaskVectors

STACKS = {
    "halved": [{"task_weights": {"words": 0.5}}],
    "dropped": ["dare"],
    "dropped_then_pave": ["dare", "pave"],
    "pave_then_dropped": ["pave", {"dare": {"drop_rate": 0.2}}],
    "strong": [{"pave": {"rho": 0.6}}],
}


@pytest.fixture
def settings(ready_settings):
    step = {"method": "task_arithmetic", "scale": 0.5, "vectors": ["plain", "purified", *STACKS]}
    capture = {"examples": 16, "moments": "input"}
    return {**ready_settings, "capture": capture, "vectors": STACKS, "merge": [step], "seed": 7}


@pytest.fixture
def recipe(settings):
    return Recipe.model_validate(settings)


@pytest.fixture
def problems(settings):
    """What a plan tells of the recipe with these keys changed."""

    def told(**changes):
        recipe = Recipe.model_validate({**settings, **changes})
        with pytest.raises(PaveError) as caught:
            check_recipe(recipe, open_folder(recipe))
        return str(caught.value)

    return told


def test_options_come_from_the_stack_then_the_step_then_the_recipe(settings):
    own = {"method": "ties", "purify": {"rho": 0.8}, "vectors": ["purified", "strong", "dropped_then_pave"]}
    recipe = Recipe.model_validate({**settings, "purify": {"rho": 0.9, "damping": 0.3}, "merge": [own]})
    (step,) = recipe.merge
    assert stack_of(recipe, "purified", step).purification == step.purify
    assert stack_of(recipe, "purified").purification == recipe.purify
    assert stack_of(recipe, "strong", step).purification == step.purify.model_copy(update={"rho": 0.6})
    dropped, pave = stack_of(recipe, "dropped_then_pave", step).transforms
    assert dropped.options == DareOptions(seed=7)
    assert pave.options == step.purify
    assert stack_of(recipe, "plain", step).transforms == ()


def test_a_ratio_is_chosen_wherever_pave_stands_without_a_ratio_of_its_own(settings):
    recipe = Recipe.model_validate({**settings, "purify": {"rho": "auto"}})
    (step,) = recipe.merge
    chosen = {name: stack_of(recipe, name, step).is_chosen for name in step.vectors}
    assert [name for name, found in chosen.items() if found] == ["purified", "dropped_then_pave", "pave_then_dropped"]


def test_what_each_stack_needs_and_depends_on(recipe):
    results = Results(recipe, open_folder(recipe))
    needs = {merge.vectors: [type(stage) for stage in merge.needs()] for merge in MergeStage.all(results)}
    assert [name for name, kinds in needs.items() if CaptureStage in kinds] == [
        *("purified", "dropped_then_pave", "pave_then_dropped", "strong")
    ]
    assert [name for name, kinds in needs.items() if PurifyStage in kinds] == [
        "purified",
        "pave_then_dropped",
        "strong",
    ]
    assert [options.rho for options in purifications(recipe)] == [0.9, 0.6]


def test_task_vectors_of_stacks_are_those_of_their_parts(recipe, ready_runner):
    runner = ready_runner(recipe)
    context, found = runner.context, {}
    for merge in MergeStage.all(runner.results):
        for stage in merge.needs():
            runner.make(stage)
        found[merge.vectors] = stacked_vectors(context, merge.request)
    plain, purified = plain_vectors(context), task_vectors(context, recipe.purify)
    from pave_lightning.pipeline.stages.capture import statistics

    dropped = DroppedTaskVectors(plain, DareOptions(seed=7))
    expected = {
        "plain": plain,
        "purified": purified,
        "dropped": dropped,
        "dropped_then_pave": PurifiedTaskVectors(dropped, statistics(context), recipe.purify, recipe.compute),
        "pave_then_dropped": DroppedTaskVectors(purified, DareOptions(drop_rate=0.2, seed=7)),
        "strong": PurifiedTaskVectors(plain, statistics(context), recipe.purify.model_copy(update={"rho": 0.6})),
    }
    changed = dict.fromkeys(expected, 0)
    for parameter in plain.parameters:
        for task in plain.tasks:
            for name, source in expected.items():
                own = found[name].expert(task, parameter)
                assert own.equal(source.expert(task, parameter)), (name, parameter.name)
                changed[name] += not own.equal(plain.expert(task, parameter))
            halved = 0.5 if task == "words" else 1
            vector = found["halved"].vector(task, parameter)
            assert vector.equal(halved * plain.vector(task, parameter))
    assert [name for name, count in changed.items() if not count] == ["plain"]


def test_a_whole_run_shows_stacks_by_their_names(recipe, capsys, tracking_uri):
    folder = run_recipe(recipe)
    rows = {(row["model"], row["vectors"]): row for row in csv.DictReader((folder / "results.csv").open())}
    assert [vectors for model, vectors in rows if model == "task_arithmetic"] == ["plain", "purified", *STACKS]
    assert all(float(row["normalised_average"]) >= 0 for row in rows.values())
    table = capsys.readouterr().out
    assert all(name in table for name in ("halved", "dropped_then_"))

    merged = {
        name: load_file(folder / f"merged/task_arithmetic-{name}/model.safetensors") for name in recipe.merge[0].vectors
    }
    name = next(name for name in merged["plain"] if name.endswith("layer.1.output.dense.weight"))
    assert len({weights[name].tobytes() for weights in merged.values()}) == len(merged)
    card = (folder / "merged/task_arithmetic-pave_then_dropped/README.md").read_text()
    assert "| task vectors | pave\\_then\\_dropped |" in card
    assert "name: dare" in card
    assert "rho: 0.9" in card
    assert "## Purification" not in card
    assert "## Purification" in (folder / "merged/task_arithmetic-purified/README.md").read_text()
    facts = json.loads((folder / "merged/task_arithmetic-halved/pave.json").read_text())
    assert facts["vectors"] == "halved"
    assert facts["transforms"] == [{"name": "task_weights", "options": {"words": 0.5}}]

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name("pave-lightning").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert runs["merge:task_arithmetic:halved"].data.params["vectors"] == "halved"


def test_a_change_of_a_stack_makes_only_its_models_again(settings):
    settings["merge"][0]["vectors"] = ["plain", "purified", "halved", "dropped_then_pave"]
    recipe = Recipe.model_validate(settings)
    run_recipe(recipe)
    less = {**STACKS, "halved": [{"task_weights": {"words": 0.25}}]}
    for changes, stale in (
        ({}, set()),
        ({"vectors": less}, {"merged/task_arithmetic-halved"}),
        ({"seed": 8}, None),
        ({"purify": {"rho": 0.8}}, {"merged/task_arithmetic-purified", "merged/task_arithmetic-dropped_then_pave"}),
    ):
        changed = Recipe.model_validate({**settings, **changes})
        rows = plan_rows(changed, open_folder(changed))
        found = {name for name, state, _ in rows if name.startswith("merged/") and state == "stale"}
        assert stale is None or found == stale, changes
        if stale is None:
            assert "merged/task_arithmetic-dropped_then_pave" in found


class Doubled(Transform[Section]):
    """Source: a test."""

    summary, source = "every task vector twice", "a test"

    def apply(self, vectors, evidence, compute):
        class Twice(DerivedTaskVectors):
            def expert(self, task, parameter, rows=None):
                return vectors.base(parameter, rows) + 2 * vectors.vector(task, parameter, rows)

        return Twice(vectors)


def test_a_transform_of_ones_own_goes_through_a_whole_recipe(settings, monkeypatch):
    monkeypatch.setattr(base, "_registry", base._registry.copy())
    vector_transform("doubled")(Doubled)
    steps = [
        {"method": "task_arithmetic", "name": "half", "scale": 0.25, "vectors": ["twice"]},
        {"method": "task_arithmetic", "name": "whole", "scale": 0.5, "vectors": ["plain"]},
    ]
    folder = run_recipe(Recipe.model_validate({**settings, "vectors": {"twice": ["doubled"]}, "merge": steps}))
    half, whole = (load_file(folder / f"merged/{name}/model.safetensors") for name in ("half-twice", "whole-plain"))
    for name, weight in whole.items():
        assert np.allclose(half[name], weight, atol=1e-6), name


def test_a_ratio_in_the_middle_of_a_stack_is_tried_out(settings, ready_runner, choose, averages):
    step = {"method": "average", "vectors": ["dropped_then_pave", "plain"]}
    recipe = Recipe.model_validate({**settings, "purify": {"rho": "auto"}, "merge": [step]})
    runner = ready_runner(recipe)
    averages(0.1, 0.2, 0.6, 0.3, 0.2, 0.1)
    chosen = choose(runner, recipe.merge[0], "dropped_then_pave")
    assert chosen.facts["rho"] == AUTO_RATIOS[2]
    assert [tried[0] for tried in chosen.facts["rho_search"]] == list(AUTO_RATIOS)
    (stage,) = [merge for merge in MergeStage.all(runner.results) if merge.vectors != "plain"]
    assert stage.stack_as_chosen(chosen.facts).described()[1]["options"]["rho"] == AUTO_RATIOS[2]
    assert stage.about() == "average, after dare, pave"
    assert chosen.source.options == recipe.purify.model_copy(update={"rho": AUTO_RATIOS[2]})
    assert "rho" not in choose(runner, recipe.merge[0], "plain").facts


@pytest.mark.parametrize(
    ("stack", "told"),
    [
        (["dar"], "vectors.wrong.0 (dar): unknown transform 'dar'; did you mean 'dare'?"),
        (["dare", {"dare": {"rate": 0.5}}], "vectors.wrong.1 (dare): the options of transform 'dare':"),
        ([{"dare": {"drop_rate": 1}}], "drop_rate: should be less than 1, found 1"),
        (
            [{"task_weights": {"word": 0.5}}],
            "vectors.wrong.0 (task_weights): no task is named 'word'; did you mean 'words'?",
        ),
        (["task_weights"], "vectors.wrong.0 (task_weights): it weighs no task"),
        ([{"pave": {"rho": "auto"}}], "vectors.wrong.0 (pave): rho: auto is said in the section purify"),
        (["dare", {"pave": {"rho": 0.5, "stopping_share": 0.5}}], "the nearest reachable budget keeps 0.75"),
        ([{"pave": {"target": "delta"}}], "vectors.wrong.0 (pave): target: delta needs the second moments of all"),
        (["dare", "pave"], "vectors.wrong.1 (pave): pave behind another transform needs the second moments of all inp"),
    ],
)
@pytest.mark.parametrize("used", [True, False])
def test_plans_tell_what_is_wrong_with_transforms(stack, told, used, settings, problems):
    step = {"method": "average", "vectors": ["wrong"] if used else ["plain"]}
    text = problems(vectors={"wrong": stack}, merge=[step], capture={"moments": "smallest"})
    assert text.count(told) == 1
    assert len(text.splitlines()) <= 4


def test_methods_for_adapters_want_stacks_that_leave_the_factors(problems):
    step = {"method": "robust_merge", "vectors": ["plain", "halved", "dropped", "purified"]}
    told = "robust_merge merges adapters, which the transforms of dropped, purified leave none of; "
    assert f"{told}set vectors: [plain, halved]" in problems(merge=[step])


def test_purification_that_is_read_costs_time_and_memory_but_no_disk(settings):
    def cost(stack):
        step = {"method": "task_arithmetic", "vectors": ["one"]}
        recipe = Recipe.model_validate({**settings, "vectors": {"one": stack}, "merge": [step]})
        return predicted_cost(recipe, open_folder(recipe))

    weights = {"task_weights": {"words": 0.5}}
    plain, stored, read = cost([weights]), cost(["pave", weights]), cost([weights, "pave"])
    assert not plain.layers
    assert {(found.shape, found.layers) for found in read.layers} == {(f.shape, f.layers) for f in stored.layers}
    assert read.peak_bytes - read.baseline_bytes > plain.peak_bytes - plain.baseline_bytes
    assert plain.disk_bytes < read.disk_bytes < stored.disk_bytes


def test_weights_of_a_step_are_those_of_the_transform(settings, ready_runner):
    step = {"method": "ties", "vectors": ["plain", "halved"], "weights": {"words": 0.25}}
    recipe = Recipe.model_validate({**settings, "merge": [step]})
    runner = ready_runner(recipe)
    plain = plain_vectors(runner.context)
    for merge, halved in zip(MergeStage.all(runner.results), (1, 0.5), strict=True):
        assert merge.depends_on()["transforms"][-1] == {"name": "task_weights", "options": {"words": 0.25}}
        assert not merge.stack.is_built_in
        found = stacked_vectors(runner.context, merge.request)
        for parameter in plain.parameters:
            assert found.vector("words", parameter).equal(0.25 * halved * plain.vector("words", parameter))
            assert found.vector("more", parameter).equal(plain.vector("more", parameter))


def test_weights_of_tasks_that_there_are_not_are_told(problems):
    told = problems(merge=[{"method": "ties", "vectors": ["plain"], "weights": {"wrods": 0.25}}])
    assert "merge.ties.weights: no task is named 'wrods'; did you mean 'words'?" in told


def test_parameters_of_a_step_are_merged_and_no_others(settings, ready_runner):
    step = {"method": "ties", "vectors": ["purified", "plain"], "parameters": {"exclude": ["embeddings.*"]}}
    recipe = Recipe.model_validate({**settings, "merge": [step]})
    runner = ready_runner(recipe)
    folder = run_recipe(recipe) / "merged/ties-plain"
    (_, plain) = MergeStage.all(runner.results)
    assert plain.depends_on()["parameters"] == {"include": [], "exclude": ["embeddings.*"]}
    base = load_file(Path(recipe.base) / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    assert {name for name in base if np.array_equal(found[name], base[name])} == {
        name for name in base if name.startswith("embeddings.")
    }
    card = (folder / "README.md").read_text()
    assert "left out by the key parameters" in card
