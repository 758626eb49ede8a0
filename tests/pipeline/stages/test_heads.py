"""Heads fitted to merged models and to their controls, in whole runs."""

import csv
import json

import pandas as pd
import pytest
import torch

from pave_lightning import Recipe, load_merged, plan_recipe, run_recipe
from pave_lightning.errors import PaveError
from pave_lightning.evaluation import CheckpointCandidate
from pave_lightning.pipeline.commands import open_folder
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.evaluating import evaluator
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stages.evaluate import ScoredBase, ScoredFitted, scored_models
from pave_lightning.pipeline.task_data import shown_batches
from pave_lightning.subspace.linear_fit import fit_ridge
from pave_lightning.tasks.data import sample_rows


@pytest.fixture
def fitted_settings(ready_settings):
    merge = [{"method": "task_arithmetic", "scale": 0.4, "vectors": ["plain"]}, {"method": "emr", "vectors": ["plain"]}]
    return {**ready_settings, "merge": merge, "heads": ["expert", {"fit": "logits", "rows": 24}]}


def labels_of(settings):
    recipe = Recipe.model_validate(settings)
    return [(model.model, model.heads) for model in scored_models(Results(recipe, open_folder(recipe)))]


def test_rows_of_the_table(fitted_settings):
    merged = [("task_arithmetic", "expert"), ("task_arithmetic", "logits-24"), ("emr", "expert"), ("emr", "logits-24")]
    own = [("base", "expert"), ("experts", "expert")]
    fitted = [("base", "logits-24"), ("experts", "logits-24")]
    assert labels_of(fitted_settings) == [*own, *fitted, *merged]
    assert labels_of({**fitted_settings, "controls": []}) == [*own, *merged]
    each = [(f"expert of {task}", heads) for task in ("words", "more") for heads in ("expert", "logits-24")]
    assert labels_of({**fitted_settings, "controls": True}) == [
        *own,
        fitted[0],
        ("base", "labels-24"),
        ("joint", "own"),
        ("joint", "logits-24"),
        fitted[1],
        *each,
        *merged,
    ]
    assert labels_of({**fitted_settings, "heads": "expert", "controls": True}) == [
        *own,
        ("joint", "own"),
        *each[::2],
        merged[0],
        merged[2],
    ]
    assert labels_of({**fitted_settings, "heads": "expert"}) == [*own, merged[0], merged[2]]
    step = {**fitted_settings["merge"][0], "heads": "orthogonal"}
    assert labels_of({**fitted_settings, "heads": "expert", "merge": [step], "controls": ["experts"]}) == [
        *own,
        ("task_arithmetic", "orthogonal"),
    ]


def test_a_run_with_fitted_heads(fitted_settings, capsys):
    """Scores against heads that are fitted by hand; a second run makes nothing anew."""
    recipe = Recipe.model_validate(fitted_settings)
    folder = run_recipe(recipe)
    rows = {(row["model"], row["heads"]): row for row in csv.DictReader((folder / "results.csv").open())}
    assert set(rows) == set(labels_of(fitted_settings))
    assert rows["experts", "expert"]["normalised_average"] == "1.0"
    assert "logits-24" in capsys.readouterr().out

    context = Context(Results(recipe, open_folder(recipe)))
    task, score = recipe.tasks[0], evaluator(context)
    base = CheckpointCandidate(context.base)
    batches = {task.name: shown_batches(context, task, 24)}
    mine = score.head_rows(base, batches)[task.name]
    from pave_lightning.evaluation import ExpertsCandidate
    from pave_lightning.pipeline.stages.align import experts
    from pave_lightning.pipeline.task_data import data_module

    theirs = score.head_rows(ExpertsCandidate(experts(context)), batches)[task.name]
    fit = fit_ridge(mine.features, theirs.outputs)
    data = data_module(context, task, 8)
    data.setup("test")
    seen = score.head_rows(base, {task.name: list(data.test_dataloader())})[task.name]
    chosen = (seen.features.double() @ fit.weight.T + fit.bias).argmax(1)
    right = float((chosen == seen.targets).double().mean())
    assert float(rows["base", "logits-24"]["words/accuracy"]) == pytest.approx(right, abs=1e-6)

    for label in ("task_arithmetic-plain", "emr-plain"):
        model = load_merged(folder / "merged" / f"{label}-heads-logits-24", task.name)
        data.setup("test")
        with torch.no_grad():
            said = [task.predict(model, batch) for batch in data.test_dataloader()]
        right = torch.cat([one.values == one.targets for one in said]).double().mean()
        name = label.partition("-")[0]
        assert float(rows[name, "logits-24"]["words/accuracy"]) == pytest.approx(float(right), abs=1e-6)
        own, kept = (
            load_merged(folder / "merged" / name, task.name, expert_head=True)
            for name in (label, f"{label}-heads-logits-24")
        )
        assert all(torch.equal(tensor, kept.state_dict()[name]) for name, tensor in own.state_dict().items())
        assert not torch.equal(model.classifier.weight, own.classifier.weight)
    with pytest.raises(PaveError, match="has no head for task 'word'"):
        load_merged(folder / "merged" / "emr-plain", "word")

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
    run_recipe(recipe)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}


def test_heads_are_the_same_when_they_are_fitted_again(fitted_settings, tmp_path):
    first = run_recipe(Recipe.model_validate(fitted_settings))
    again = run_recipe(Recipe.model_validate({**fitted_settings, "output": str(tmp_path / "again")}))
    for path in first.rglob("head*.safetensors"):
        assert path.read_bytes() == (again / path.relative_to(first)).read_bytes()
    assert len(list(first.rglob("heads.safetensors"))) == 2
    assert len(list(first.rglob("expert-head.safetensors"))) == 4


def test_too_few_rows_are_told(fitted_settings):
    fitted_settings["heads"] = {"fit": "logits", "rows": 3}
    with pytest.raises(
        PaveError, match=r"at least 5 labels in training rows, but heads\.rows is 3, with 3 labels"
    ) as told:
        plan_recipe(Recipe.model_validate(fitted_settings))
    assert "task 'words'" in str(told.value)
    assert "task 'more'" in str(told.value)


def test_rows_of_many_words_are_enough_for_many_classes(fitted_settings, tmp_path, capsys):
    names = [f"class{number}" for number in range(12)]
    text = pd.read_json(fitted_settings["tasks"][0]["data"]["train"], lines=True)["text"][0]
    rows = [{"words": text.split()[:1] * 12, "labels": names}] * 6
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dict.fromkeys(("train", "validation", "test"), str(tmp_path / "rows.jsonl"))
    tags = {"kind": "token_classification", "words": "words", "data": data, "classes": names}
    tasks = [{"name": name, **tags} for name in ("first", "second")]
    plan_recipe(Recipe.model_validate({**fitted_settings, "tasks": tasks, "merge": ["average"]}))
    assert "heads/base-logits-24" in capsys.readouterr().out


def test_rows_that_are_fitted_to_and_scored_on_are_told(fitted_settings, tmp_path, caplog):
    words, more = fitted_settings["tasks"]
    rows, test = (pd.read_json(words["data"][split], lines=True) for split in ("train", "test"))
    drawn = sample_rows(len(rows), 24, 0)
    test = test[~test["text"].isin(rows["text"])]
    for also, file in ((rows[:0], "apart"), (pd.concat([rows.iloc[drawn[:3]], rows.drop(index=drawn)[:1]]), "shared")):
        pd.concat([test, also]).to_json(tmp_path / f"{file}.jsonl", orient="records", lines=True)
        data = {**words["data"], "test": str(tmp_path / f"{file}.jsonl")}
        tasks = [{**words, "data": data}, {**more, "data": data}]
        plan_recipe(Recipe.model_validate({**fitted_settings, "tasks": tasks}))
        said = "task 'words': 3 of the 24 rows that its head is fitted to (logits-24) are in the test split as well"
        assert (said in caplog.text) == (file == "shared")


@pytest.mark.parametrize(
    ("heads", "told"),
    [
        ("logit", "logit"),
        ([], "at least 1"),
        (["logits", "logits"], "must not name the same heads twice"),
        (["expert", {"fit": "expert", "rows": 24}], "must not name the same heads twice"),
        ({"fit": "logits", "strength": -1}, "greater than or equal to 0"),
    ],
)
def test_heads_that_cannot_be(fitted_settings, heads, told):
    with pytest.raises(ValueError, match=told):
        Recipe.model_validate({**fitted_settings, "heads": heads})


def test_heads_with_so_many_rows_and_heads_of_that_strength_differ(fitted_settings):
    heads = [{"fit": "logits", "rows": 24}, {"fit": "logits", "strength": 24.0}]
    recipe = Recipe.model_validate({**fitted_settings, "heads": heads})
    assert len({one.label for one in recipe.heads}) == 2


def test_controls_that_are_named_twice(fitted_settings):
    with pytest.raises(ValueError, match="must not name the same control twice"):
        Recipe.model_validate({**fitted_settings, "controls": ["base", "base"]})


@pytest.mark.parametrize(
    ("step", "stack", "folder"),
    [
        ("emr", "plain-heads-logits-24", "emr-plain-heads-logits-24"),
        ("Base-heads", "logits-24", "base-heads-logits-24"),
        ("expert-words", "heads-logits-24", "expert-words-heads-logits-24"),
    ],
)
def test_scores_that_would_lie_in_one_folder(fitted_settings, step, stack, folder):
    """A merged model whose name is that of another model's scores under fitted heads."""
    plain = [{"method": "emr", "vectors": ["plain"]}] if step != "emr" else []
    named = {"method": "emr", "name": step, "vectors": [stack] if plain else ["plain", stack]}
    settings = {**fitted_settings, "vectors": {stack: [{"task_weights": {"words": 0.5}}]}, "controls": True}
    with pytest.raises(PaveError, match=f"(?i)would be written into one folder, scores/{folder}"):
        plan_recipe(Recipe.model_validate({**settings, "merge": [*plain, named]}))


def test_an_expert_under_heads_of_its_own_is_no_measure(fitted_settings):
    recipe = Recipe.model_validate(fitted_settings)
    results = Results(recipe, open_folder(recipe))
    fitted = [model for model in scored_models(results) if isinstance(model, ScoredFitted)]
    assert [model.form for model in fitted] == ["base", "per-task"]
    assert isinstance(fitted[0].inner, ScoredBase)
