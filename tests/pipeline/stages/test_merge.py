"""Merged models whose scale is chosen under heads that are fitted to every candidate."""

import json
import logging
import math

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from pave_lightning import Recipe, load_merged, run_recipe
from pave_lightning.evaluation import MergedCandidate
from pave_lightning.evaluation.heads import FittedHeads
from pave_lightning.evaluation.options import EXPERT_HEADS, Heads
from pave_lightning.merging import MergedVectors, make_method, merge
from pave_lightning.merging.folders import write_fitted_heads
from pave_lightning.pipeline import tuning
from pave_lightning.pipeline.adding import add_expert
from pave_lightning.pipeline.commands import open_folder
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.evaluating import evaluator
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stages import MergeStage
from pave_lightning.pipeline.stages.align import plain_vectors
from pave_lightning.pipeline.stages.heads import fit_heads
from pave_lightning.pipeline.stages.merge import chooser, merged_model, searcher_under
from pave_lightning.pipeline.task_data import data_module, shown_batches
from pave_lightning.subspace.linear_fit import LinearFit
from pave_lightning.subspace.logistic_fit import fit_logistic

SEARCHED = {"method": "task_arithmetic", "scale": {"search": [0.2, 1.4], "points": 4}, "vectors": ["plain"]}
LOGITS = {"fit": "logits", "rows": 24}
KEPT = {**LOGITS, "search": False}


@pytest.fixture
def settings(ready_settings):
    return {**ready_settings, "merge": [SEARCHED], "heads": ["expert", KEPT, LOGITS], "controls": []}


def average_by_hand(context, candidate):
    """The mean of normalised validation accuracies, every head solved for anew."""
    recipe, model = context.recipe, evaluator(context)
    from pave_lightning.evaluation import ExpertsCandidate
    from pave_lightning.pipeline.stages.align import experts

    own = ExpertsCandidate(experts(context))
    total = 0.0
    for task in recipe.tasks:
        batches = {task.name: shown_batches(context, task, 24)}
        mine = model.head_rows(candidate, batches)[task.name]
        right = torch.nn.functional.one_hot(mine.targets, 2).double()
        fit = fit_logistic(mine.features, right, (1e-6,))
        data = data_module(context, task, 8)
        data.setup("validate")
        rows = {task.name: list(data.val_dataloader())}
        seen, expert = (model.head_rows(one, rows)[task.name] for one in (candidate, own))
        right = ((seen.features.double() @ fit.weight.T + fit.bias).argmax(1) == seen.targets).double().mean()
        total += float(right / (expert.outputs.argmax(1) == seen.targets).double().mean())
    return total / len(recipe.tasks)


def test_the_scale_is_the_best_one_under_fitted_heads(settings):
    heads = {"fit": "labels", "rows": 24, "strength": 1e-6}  # a strong penalty gives the same answer always
    scales = {"search": [-2.0, 6.0], "points": 5}
    recipe = Recipe.model_validate({**settings, "merge": [{**SEARCHED, "scale": scales}], "heads": ["expert", heads]})
    folder = run_recipe(recipe)
    context = Context(Results(recipe, open_folder(recipe)))
    source = plain_vectors(context)
    merged = merge(make_method("task_arithmetic", {}), source)
    facts = json.loads((folder / "merged/task_arithmetic-plain-heads-labels-24-strength-1e-06/pave.json").read_text())
    by_hand = {s: average_by_hand(context, MergedCandidate(source, merged, s)) for s, _ in facts["search"]}
    assert len(set(by_hand.values())) > 1, "the scales differ, or else nothing was chosen"
    assert [average for _, average in facts["search"]] == pytest.approx(list(by_hand.values()), abs=1e-6)
    assert facts["scale"] == max(by_hand, key=lambda scale: (round(by_hand[scale], 9), -scale))
    assert (facts["heads"]["fit"], set(facts["heads"]["strengths"])) == ("labels", {"words", "more"})
    # Its heads are those that its own features give.
    found = fit_heads(context, MergedCandidate(source, merged, facts["scale"]), Heads(**heads))
    for task, fit in found.heads.items():
        head = load_file(
            folder / f"merged/task_arithmetic-plain-heads-labels-24-strength-1e-06/heads/{task}/head.safetensors"
        )
        assert torch.equal(head["classifier.weight"], fit.weight.float())
        assert torch.equal(head["classifier.bias"], fit.bias.float())


def test_without_a_search_of_their_own_weights_are_those_under_the_experts_heads(settings):
    recipe = Recipe.model_validate({**settings, "merge": [SEARCHED, {"method": "average", "vectors": ["plain"]}]})
    folder = run_recipe(recipe) / "merged"
    for name, label in (("task_arithmetic", "logits-24-after-search"), ("average", "logits-24")):
        plain, fitted = folder / f"{name}-plain", folder / f"{name}-plain-heads-{label}"
        one, other = plain / "model.safetensors", fitted / "model.safetensors"
        assert one.read_bytes() == other.read_bytes()
        assert one.samefile(other)
        kept, own = fitted / "heads/words/expert-head.safetensors", plain / "heads/words/head.safetensors"
        assert kept.read_bytes() == own.read_bytes()
        assert not (plain / "heads/words/expert-head.safetensors").exists()
        assert "heads" not in json.loads((plain / "pave.json").read_text())
        assert "fitted" not in json.dumps(json.loads((plain / "manifest.json").read_text())["inputs"])
    chosen = {row["heads"]: row for row in pd.read_csv(folder.parent / "results.csv").to_dict("records")}
    assert set(chosen) == {"expert", "logits-24", "logits-24-after-search"}


def test_only_fitted_heads_leave_the_model_under_the_experts_heads_unscored(settings):
    recipe = Recipe.model_validate({**settings, "heads": KEPT})
    folder = run_recipe(recipe)
    assert (folder / "merged/task_arithmetic-plain/model.safetensors").is_file()
    assert sorted(one.name for one in (folder / "scores").iterdir()) == [
        *("base", "experts", "task_arithmetic-plain-heads-logits-24-after-search")
    ]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
    run_recipe(recipe)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}


def test_a_step_is_merged_once_for_all_kinds_of_heads(settings, ready_runner, monkeypatch):
    merges = []
    monkeypatch.setattr(tuning, "merge", lambda *given: merges.append(given) or merge(*given))
    runner = ready_runner(Recipe.model_validate({**settings, "heads": ["expert", LOGITS, "orthogonal"]}))
    step = runner.results.recipe.merge[0]
    kinds = [EXPERT_HEADS, *runner.results.recipe.fitted_heads]
    found = [chooser(runner.context).choose(step, "plain", heads) for heads in kinds]
    assert len(merges) == 1
    assert [choice.fitted is None for choice in found] == [True, False, False]
    assert all(choice.merged is found[0].merged for choice in found)


def test_candidates_with_broken_features_lose(settings, ready_runner):
    runner = ready_runner(Recipe.model_validate(settings))
    source = plain_vectors(runner.context)
    broken = MergedVectors({p.name: torch.full_like(source.base(p), math.nan) for p in source.parameters})
    _, average = searcher_under(runner.context, Heads(**LOGITS)).scored(MergedCandidate(source, broken, 1.0), None)
    assert math.isnan(average)


def test_a_model_of_unvarying_features_keeps_its_experts_heads(settings, ready_runner, caplog):
    runner = ready_runner(Recipe.model_validate(settings))
    source = plain_vectors(runner.context)
    # The last norm gives nothing, whatever it is given.
    vectors = {p.name: torch.zeros_like(source.base(p)) for p in source.parameters}
    for parameter in source.parameters:
        if "pooler" in parameter.name:
            vectors[parameter.name] = -source.base(parameter)
    with caplog.at_level(logging.WARNING):
        found = fit_heads(runner.context, MergedCandidate(source, MergedVectors(vectors), 1.0), Heads(**LOGITS))
    assert isinstance(found, FittedHeads)
    assert not found.heads
    assert "task 'words': the model gives all rows the same features" in caplog.text
    assert "it keeps its expert's head" in caplog.text


def test_a_head_without_intercept_gets_one(settings, tmp_path):
    """As T5's and GPT-2's: what is fitted is written, and read again."""
    recipe = Recipe.model_validate({**settings, "heads": "expert"})
    folder = run_recipe(recipe) / "merged/task_arithmetic-plain"
    context = Context(Results(recipe, open_folder(recipe)))
    head = folder / "heads/words/head.safetensors"
    from safetensors.torch import save_file

    save_file({"classifier.weight": load_file(head)["classifier.weight"]}, head)
    fit = LinearFit(torch.ones(2, 32, dtype=torch.float64), torch.arange(2, dtype=torch.float64))
    write_fitted_heads(folder, context.architecture, {"words": ("classifier", fit)}, {"fit": "logits"})
    model = load_merged(folder, "words")
    assert torch.equal(model.classifier.bias, torch.arange(2.0))
    assert torch.equal(model.classifier.weight, torch.ones(2, 32))


def test_adding_an_expert_gives_all_tasks_their_experts_heads(settings, base_folder, make_expert, tmp_path):
    steps = [{"method": "opcm", "vectors": ["plain"]}]
    recipe = Recipe.model_validate({**settings, "merge": steps, "heads": ["expert", LOGITS]})
    folder = run_recipe(recipe) / "merged"
    expert = str(make_expert(base_folder, seed=9))
    added = [
        add_expert(folder / name, "third", expert, tmp_path / name)
        for name in ("opcm-plain", "opcm-plain-heads-logits-24")
    ]
    for name in ("words", "more", "third"):
        one, other = (place / "heads" / name for place in added)
        assert (one / "head.safetensors").read_bytes() == (other / "head.safetensors").read_bytes()
        assert not (other / "expert-head.safetensors").exists()
    assert "heads" not in json.loads((added[1] / "pave.json").read_text())


def test_a_kept_merge_is_not_taken_for_another(settings, ready_runner):

    steps = [SEARCHED, {**SEARCHED, "name": "second", "method": "ties"}]
    runner = ready_runner(Recipe.model_validate({**settings, "merge": steps}))
    first, second = runner.results.recipe.merge
    found = [chooser(runner.context).choose(step, "plain", EXPERT_HEADS, complete=True) for step in (first, second)]
    assert [choice.method.name for choice in found] == ["task_arithmetic", "ties"]
    assert MergeStage(runner.results, first, "plain").weights_from == []


def test_scales_are_chosen_by_the_weights_as_they_are_written(settings):
    scale = {"search": [0.5, 60.0], "points": 3}  # large enough for float16's steps to show, and for some not to fit
    step = {**SEARCHED, "scale": scale, "write": {"dtype": "float16"}}
    recipe = Recipe.model_validate(
        {**settings, "merge": [step], "heads": "expert", "write": {"max_shard_size": "20KB"}}
    )
    assert recipe.merge[0].write.max_shard_size == "20KB"
    folder = run_recipe(recipe) / "merged/task_arithmetic-plain"
    assert {value.dtype for file in folder.glob("*.safetensors") for value in load_file(file).values()} == {
        torch.float16
    }
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    facts = json.loads((folder / "pave.json").read_text())
    context = Context(Results(recipe, open_folder(recipe)))
    written = merged_model(context, folder)
    _, average = searcher_under(context, EXPERT_HEADS).scored(written, None)
    assert max(found for _, found in facts["search"]) == average


def test_a_model_is_made_anew_where_it_is_written_otherwise(settings):
    def inputs(**changes):
        recipe = Recipe.model_validate({**settings, "heads": "expert", **changes})
        (stage,) = MergeStage.all(Results(recipe, open_folder(recipe)))
        return stage._merged_from()

    run_recipe(Recipe.model_validate({**settings, "heads": "expert"}))
    plain = inputs()
    assert "write" not in plain
    assert inputs(write={"dtype": "bfloat16"}) != plain
    assert inputs(write={"max_shard_size": 1000}) != plain
