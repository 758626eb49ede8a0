"""What a merge step comes to: tuned options, and anchors."""

import json
import math

import pytest
import torch

from pave_lightning import Recipe
from pave_lightning.evaluation.scale_search import NoFiniteScoreError
from pave_lightning.pipeline.commands import open_folder, run_stage
from pave_lightning.pipeline.planning import plan_rows
from pave_lightning.pipeline.workflow import Workflow


@pytest.fixture
def workflow_of(ready_settings):
    def build(steps, **changes):
        recipe = Recipe.model_validate({**ready_settings, **changes, "merge": steps})
        made = Workflow(recipe, open_folder(recipe))
        for task in recipe.tasks:
            made.fit(task)
            made.capture(task)
        return made

    return build


def test_tuned_options_each_have_their_best_scale(workflow_of, averages):
    scale = {"search": [0.5, 1.0], "points": 2}
    workflow = workflow_of([{"method": "ties", "scale": scale, "tune": {"density": [0.1, 0.5, 0.9]}}])
    averages(0.1, 0.2, 0.8, 0.3, 0.8, 0.1)
    chosen = workflow.choose(workflow.recipe.step("ties"), "plain")
    assert chosen.method.options.density == 0.5, "the first one wins among equals"
    assert (chosen.scale, chosen.average) == (0.5, 0.8)
    assert chosen.facts["tune_search"] == [
        [{"density": 0.1}, 1.0, 0.2],
        [{"density": 0.5}, 0.5, 0.8],
        [{"density": 0.9}, 0.5, 0.8],
    ]
    assert chosen.facts["search"] == [[0.5, 0.8], [1.0, 0.3]]


def test_what_gives_no_finite_score_is_passed_over(workflow_of, averages):
    scale = {"search": [0.5, 1.0], "points": 2}
    workflow = workflow_of([{"method": "ties", "scale": scale, "tune": {"density": [0.1, 0.5]}}])
    averages(math.nan, math.nan, math.nan, 0.4)
    chosen = workflow.choose(workflow.recipe.step("ties"), "plain")
    assert (chosen.method.options.density, chosen.scale) == (0.5, 1.0)


def test_ratios_and_options_are_tried_together(workflow_of, averages):
    workflow = workflow_of([{"method": "ties", "tune": {"density": [0.1, 0.5]}}], purify={"rho": "auto"})
    averages(0.1, 0.2, 0.3, 0.9, 0.3, 0.3, 0.3, 0.3, 0.3, 0.9, 0.3, 0.3)
    chosen = workflow.choose(workflow.recipe.step("ties"), "purified")
    assert (chosen.facts["rho"], chosen.method.options.density) == (0.992, 0.5), "the larger ratio among equals"
    assert len(chosen.facts["rho_search"]) == len(chosen.facts["tune_search"]) == 12


def test_an_anchor_is_the_other_steps_scaled_result_on_the_same_vectors(workflow_of):
    steps = [
        {"method": "task_arithmetic", "scale": 0.7, "purify": {"rho": 0.5}},
        {"method": "bmm_data_free", "anchor": "task_arithmetic", "options": {"ridge": 1e9}, "purify": {"rho": 0.8}},
    ]
    workflow = workflow_of(steps)
    anchor, calibrated = workflow.recipe.merge
    same = anchor.model_copy(update={"purify": calibrated.purify})
    for vectors in ("plain", "purified"):
        expected = workflow.choose(same, vectors).result().vectors
        found = workflow.choose(calibrated, vectors).result().vectors
        for name, vector in found.items():
            # So strong a ridge leaves the anchor as it is.
            assert torch.allclose(vector, 0.7 * expected[name], atol=1e-5), name


@pytest.fixture
def searches(monkeypatch):
    """Which scales were tried, in order; the higher one is the better."""
    from pave_lightning.evaluation.scale_search import ScaleSearcher

    tried = []

    def average(self, candidate, examples):
        tried.append(candidate._scale)
        return candidate._scale

    monkeypatch.setattr(ScaleSearcher, "average", average)
    return tried


ANCHORED = [
    {"method": "bmm_data_free", "name": "early", "anchor": "first"},
    {"method": "task_arithmetic", "name": "first", "scale": {"search": [0.1, 0.7], "points": 2}},
    {"method": "ties", "name": "second", "scale": {"search": [0.2, 0.9], "points": 2}, "tune": {"density": [0.1, 0.5]}},
    {"method": "bmm_data_free", "name": "one", "anchor": "first", "options": {"ridge": 2.0}},
    {"method": "bmm_data_free", "name": "two", "anchor": "second"},
]


def test_the_scale_of_a_step_is_searched_once_whatever_it_anchors(workflow_of, searches):
    workflow = workflow_of(ANCHORED)
    early, first, second, one, two = workflow.recipe.merge
    found = {}
    for step in (early, first, second, one, two, one):
        for vectors in ("plain", "purified"):
            found[step.name, vectors] = workflow.choose(step, vectors).result().vectors
    # Of the second step two densities are tried, each with both scales.
    assert searches == [0.1, 0.7] * 2 + [0.2, 0.9] * 4
    assert workflow.choose(first, "plain").facts == {"scale": 0.7, "search": [[0.1, 0.1], [0.7, 0.7]]}
    for step in (first, one, two):
        alone = Workflow(workflow.recipe, workflow.folder).choose(step, "plain").result().vectors
        assert all(torch.equal(vector, found[step.name, "plain"][name]) for name, vector in alone.items()), step.name


def test_the_scale_of_an_anchor_that_is_merged_already_is_read_and_not_searched(workflow_of, searches):
    workflow = workflow_of(ANCHORED)
    _, _, second, _, two = workflow.recipe.merge
    workflow.merge(second, "plain")
    expected = workflow.choose(two, "plain").result().vectors
    del searches[:]
    resumed = Workflow(workflow.recipe, workflow.folder)
    found = resumed.choose(two, "plain").result().vectors
    assert all(torch.equal(vector, found[name]) for name, vector in expected.items())
    assert not searches
    resumed.choose(two, "purified").result()
    assert searches == [0.2, 0.9] * 2, "the anchor on purified vectors is another model"


def test_a_step_that_fails_is_named_and_so_is_its_anchor(workflow_of, averages):
    scale = {"search": [0.5, 1.0], "points": 2}
    steps = [
        {"method": "task_arithmetic", "name": "sum", "scale": scale},
        {"method": "bmm_data_free", "name": "refined", "anchor": "sum", "tune": {"ridge": [1.0, 2.0]}},
        {"method": "bmm_data_free", "name": "again", "anchor": "sum"},
    ]
    workflow = workflow_of(steps)
    averages(*[math.nan] * 4)  # two scales on either kind of vectors: what has failed is not searched anew
    told = r"no scale that was tried gives finite"
    with pytest.raises(NoFiniteScoreError, match=rf"^merge sum \(purified\): {told}"):
        workflow.merge(workflow.recipe.step("sum"), "purified")
    with pytest.raises(NoFiniteScoreError, match=r"^merge refined \(plain\): nothing that was tried gives finite"):
        workflow.merge(workflow.recipe.step("refined"), "plain")
    with pytest.raises(NoFiniteScoreError, match=rf"^merge again \(plain\): merge sum \(plain\): {told}"):
        workflow.merge(workflow.recipe.step("again"), "plain")
    with pytest.raises(NoFiniteScoreError, match=rf"^merge sum \(plain\): {told}"):
        workflow.choose(workflow.recipe.step("sum"), "plain")


def test_a_merged_model_is_stale_when_its_anchor_would_be(ready_settings):
    steps = [
        {"method": "task_arithmetic", "scale": 0.7, "vectors": ["plain"]},
        {"method": "featcal", "anchor": "task_arithmetic", "vectors": ["plain"], "options": {"examples": 4}},
        {"method": "fisher", "vectors": ["plain"]},
        {"method": "average", "vectors": ["plain"]},
        {
            "method": "distillation",
            "anchor": "task_arithmetic",
            "vectors": ["plain"],
            "options": {"examples": 4, "epochs": 1},
        },
    ]

    def recipe(**changes):
        return Recipe.model_validate({**ready_settings, "merge": steps, **changes})

    def states(**changes):
        changed = recipe(**changes)
        return {stage: state for stage, state, _ in plan_rows(changed, open_folder(changed))}

    for stage in ("fit", "merge"):
        run_stage(recipe(), stage)
    assert {state for stage, state in states().items() if stage.startswith("merged/")} == {"there"}
    facts = json.loads((open_folder(recipe()).root / "merged" / "featcal-plain" / "pave.json").read_text())
    assert facts["scale"] is None

    other_anchor = states(merge=[{**steps[0], "scale": 0.6}, *steps[1:]])
    assert other_anchor["merged/featcal-plain"] == other_anchor["merged/task_arithmetic-plain"] == "stale"
    assert other_anchor["merged/fisher-plain"] == other_anchor["merged/average-plain"] == "there"
    fewer = states(capture={**ready_settings["capture"], "gradient_examples": 3})
    assert fewer["merged/fisher-plain"] == "stale"
    assert fewer["merged/featcal-plain"] == fewer["merged/average-plain"] == "there"
    # Batches are what distillation takes its steps on.
    batched = states(capture={**ready_settings["capture"], "batch_size": 2})
    assert batched["merged/distillation-plain"] == "stale"
    assert batched["merged/featcal-plain"] == "there"
    turned = {"tasks": list(reversed(ready_settings["tasks"]))}
    assert states(**turned)["merged/featcal-plain"] == states(**turned)["merged/average-plain"] == "there"
    fewer_rows = states(examples={"train": 7})
    assert fewer_rows["merged/fisher-plain"] == fewer_rows["merged/featcal-plain"] == "stale"
    assert fewer_rows["merged/average-plain"] == "there"


def test_the_order_of_tasks_counts_for_rules_in_which_it_matters(ready_settings):
    steps = [{"method": name, "vectors": ["plain"]} for name in ("opcm", "cabs", "average")]
    steps.append({"method": "bmm_data_free", "anchor": "opcm", "vectors": ["plain"]})
    recipe = Recipe.model_validate({**ready_settings, "merge": steps})
    for stage in ("fit", "merge"):
        run_stage(recipe, stage)
    tasks = list(reversed(ready_settings["tasks"]))
    turned = Recipe.model_validate({**ready_settings, "merge": steps, "tasks": tasks})
    states = {stage: state for stage, state, _ in plan_rows(turned, open_folder(turned))}
    assert states["merged/average-plain"] == "there"
    for name in ("opcm", "cabs", "bmm_data_free"):
        assert states[f"merged/{name}-plain"] == "stale", name


def test_labels_count_for_labelled_gradients_and_seeds_for_anchors(ready_settings):
    steps = [
        {"method": "dare", "vectors": ["plain"]},
        {"method": "bmm_data_free", "anchor": "dare", "vectors": ["plain"]},
        {"method": "tatr", "vectors": ["plain"]},
        {"method": "fisher", "vectors": ["plain"]},
    ]
    settings = {**ready_settings, "merge": steps, "capture": {"examples": 8, "gradient_examples": 4}}
    for stage in ("fit", "merge"):
        run_stage(Recipe.model_validate(settings), stage)

    def states(**changes):
        changed = Recipe.model_validate({**settings, **changes})
        return {stage: state for stage, state, _ in plan_rows(changed, open_folder(changed))}

    assert {state for stage, state in states().items() if stage.startswith("merged/")} == {"there"}
    first, second = ready_settings["tasks"]
    relabelled = states(tasks=[{**first, "classes": ["high", "low"]}, second])
    assert relabelled["merged/tatr-plain"] == "stale"
    assert relabelled["merged/fisher-plain"] == "there"
    reseeded = states(seed=7)
    assert reseeded["merged/dare-plain"] == reseeded["merged/bmm_data_free-plain"] == "stale"
