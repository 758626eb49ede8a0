"""The model that is trained on all tasks together: made by a command, scored as a control, planned."""

import csv
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pave_lightning import Recipe, load_merged, plan_recipe, run_recipe
from pave_lightning.errors import PaveError
from pave_lightning.evaluation.own_heads import OwnHeadsCandidate
from pave_lightning.experts import joint
from pave_lightning.pipeline.commands import open_folder, run_stage
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.evaluating import evaluator
from pave_lightning.pipeline.planning.table import added_memory, predicted_cost
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stages import JointStage, stages_of
from pave_lightning.pipeline.stages.evaluate import scored_models
from pave_lightning.pipeline.task_data import data_module
from pave_lightning.weights import Checkpoint


class StoppedError(Exception):
    """In place of a kill."""


@pytest.fixture
def joint_settings(ready_settings):
    """Two tasks whose experts are there, so that joint alone is trained; one merge."""
    merge = [{"method": "task_arithmetic", "scale": 0.4, "vectors": ["plain"]}]
    return {**ready_settings, "merge": merge, "controls": ["joint"]}


def labels_of(settings):
    recipe = Recipe.model_validate(settings)
    return [(model.model, model.heads) for model in scored_models(Results(recipe, open_folder(recipe)))]


def rows_of(folder):
    return {(row["model"], row["heads"]): row for row in csv.DictReader((folder / "results.csv").open())}


def test_rows_of_the_table(joint_settings):
    own, merged = [("base", "expert"), ("experts", "expert")], ("task_arithmetic", "expert")
    each = [("expert of words", "expert"), ("expert of more", "expert")]
    assert labels_of(joint_settings) == [*own, ("joint", "own"), merged]
    assert labels_of({**joint_settings, "controls": True}) == [*own, ("joint", "own"), *each, merged]
    assert labels_of({**joint_settings, "merge": []}) == [*own, ("joint", "own")]
    assert labels_of({**joint_settings, "heads": ["logits"]}) == [
        *own,
        ("joint", "own"),
        ("joint", "logits"),
        ("task_arithmetic", "logits"),
    ]
    recipe = Recipe.model_validate({**joint_settings, "controls": True, "heads": ["expert", "logits"]})
    for model in scored_models(Results(recipe, open_folder(recipe))):
        is_reference = model.model in ("base", "experts") and model.heads == "expert"
        assert model.is_control == (model.model != "task_arithmetic" and not is_reference)


def test_a_run_of_three_kinds(recipe_settings, tag_files):
    """Scores under its own heads and under fitted ones, against models that are loaded from its folder."""
    tags = {"name": "tags", "data": tag_files, "kind": "token_classification", "classes": ["low", "high"]}
    recipe = Recipe.model_validate(
        {
            **recipe_settings,
            "tasks": [*recipe_settings["tasks"], tags],
            "merge": [{"method": "average", "vectors": ["plain"]}],
            "controls": ["joint"],
            "heads": {"fit": "logits", "rows": 20},
            "trainer": {**recipe_settings["trainer"], "max_epochs": 1},
        }
    )
    folder = run_recipe(recipe)
    rows, context = rows_of(folder), Context(Results(recipe, open_folder(recipe)))
    assert list(rows) == [
        ("base", "expert"),
        ("experts", "expert"),
        ("joint", "own"),
        ("joint", "logits-20"),
        ("average", "logits-20"),
    ]
    candidate = OwnHeadsCandidate(Checkpoint(folder / "joint", context.architecture.prefix))
    poolers = []
    for task in recipe.tasks:
        data = data_module(context, task, 7)
        data.setup("test")
        batches = list(data.test_dataloader())
        scored = evaluator(context).head_rows(candidate, {task.name: batches})[task.name]
        for heads in ("own", "logits-20"):
            model = load_merged(folder / "joint", task.name)
            if heads == "logits-20":
                fits = load_file(folder / "heads" / "joint-logits-20" / "heads.safetensors")
                fitted = {part: fits[f"{task.name}.{part}"].float() for part in ("weight", "bias")}
                model.classifier.load_state_dict(fitted)
            with torch.no_grad():
                said = torch.cat([task.outputs(model, batch) for batch in batches])
            right = torch.cat([task.targets(batch) for batch in batches])
            if heads == "own":
                torch.testing.assert_close(scored.outputs, said, rtol=0, atol=1e-5)
            if task.kind == "regression":
                found = float(torch.corrcoef(torch.stack([said[:, 0].double(), right.double()]))[0, 1])
            else:
                found = float((said.argmax(1) == right).double().mean())
            shown = float(rows["joint", heads][f"{task.name}/{task.primary_metric}"])
            assert shown == pytest.approx(found, abs=2e-3)
        if model.bert.pooler is not None:
            poolers.append(model.bert.pooler.dense.weight)
    first, second = poolers
    assert not torch.equal(first, second)

    from mlflow import MlflowClient

    client = MlflowClient(recipe.tracking.uri)
    experiment = client.get_experiment_by_name(recipe.tracking.experiment).experiment_id
    found = [run for run in client.search_runs([experiment]) if run.info.run_name == "joint"]
    metrics = found[0].data.metrics
    assert found[0].info.status == "FINISHED"
    for task in recipe.tasks:
        assert f"validation/{task.name}/{task.primary_metric}" in metrics
        assert f"test/{task.name}/{task.primary_metric}" in metrics
    assert {"validation/primary_average", "average", "average/low", "average/high"} <= set(metrics)
    assert any(name.startswith("train/") for name in metrics)

    card = (folder / "merged" / "average-plain" / "README.md").read_text()
    assert "joint" not in card
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
    run_recipe(recipe)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}


def test_it_is_made_alone_and_goes_on_where_it_was_killed(joint_settings, tmp_path, monkeypatch):
    recipe = Recipe.model_validate(joint_settings)
    run_stage(recipe, "fit")
    root = Path(recipe.output) / recipe.name
    assert not (root / "joint").exists()
    with pytest.raises(PaveError, match=r"joint is not there yet; run `pave joint`"):
        run_stage(recipe, "evaluate")

    class Stopping(joint.TaskExpert):
        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == 2:
                raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(joint, "TaskExpert", Stopping)
        with pytest.raises(StoppedError):
            run_stage(recipe, "joint")
    assert not (root / "joint").exists()
    assert len(list((root / "training-joint").rglob("last.ckpt"))) == 1
    run_stage(recipe, "joint")
    assert not (root / "training-joint").exists()

    whole = Recipe.model_validate({**joint_settings, "output": str(tmp_path / "whole")})
    run_stage(whole, "joint")
    other = Path(whole.output) / whole.name
    assert not (other / "experts").exists()
    files = sorted(path.relative_to(root) for path in (root / "joint").rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert (root / file).read_bytes() == (other / file).read_bytes()


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_batches_of_twice_the_size(recipe_settings, make_base, tmp_path):
    base = make_base(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    models = []
    for size, devices in ((16, {"devices": 1}), (8, {"devices": 2, "strategy": "ddp"})):
        recipe = Recipe.model_validate(
            {
                **recipe_settings,
                "base": str(base),
                "output": str(tmp_path / str(size)),
                "training": {**recipe_settings["training"], "batch_size": size},
                "trainer": {**recipe_settings["trainer"], **devices},
                "controls": ["joint"],
            }
        )
        run_stage(recipe, "joint")
        folder = Path(recipe.output) / recipe.name / "joint"
        models.append([load_merged(folder, task.name).state_dict() for task in recipe.tasks])
    torch.testing.assert_close(*models, rtol=0, atol=2e-4)
    start = Checkpoint(base, "bert").tensor("encoder.layer.1.output.dense.weight")
    assert float((models[0][0]["bert.encoder.layer.1.output.dense.weight"] - start).abs().max()) > 2e-3


def test_it_depends_on_what_it_is_trained_on(joint_settings):
    def inputs(**changes):
        recipe = Recipe.model_validate({**joint_settings, **changes})
        return JointStage(Results(recipe, open_folder(recipe))).inputs()

    words, more = joint_settings["tasks"]
    known = inputs()
    assert inputs(heads="logits", capture={"examples": 8}) == known
    assert inputs(tasks=[{**words, "expert": None}, more]) == known, "it is not made of experts"
    assert inputs(trainer={**joint_settings["trainer"], "enable_progress_bar": True}) == known
    for changes in (
        {"seed": 1},
        {"tasks": [more, words]},
        {"training": {**joint_settings["training"], "batch_size": 4}},
        {"trainer": {**joint_settings["trainer"], "max_epochs": 5}},
        {"examples": {"train": 20}},
    ):
        assert inputs(**changes) != known


def test_only_recipes_that_ask_for_it_have_it(joint_settings):
    recipe = Recipe.model_validate({**joint_settings, "controls": ["base"]})
    results = Results(recipe, open_folder(recipe))
    assert not any(isinstance(stage, JointStage) for stage in stages_of(results))
    with pytest.raises(PaveError, match=r"no joint training among its controls; set controls: \[base, joint"):
        run_stage(recipe, "joint")


def test_what_a_plan_tells_of_it(joint_settings, capsys):
    recipe = Recipe.model_validate(joint_settings)
    plan_recipe(recipe)
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "joint to do 96 rows of 2 tasks together, 2 epochs, 12 steps" in told
    without = Recipe.model_validate({**joint_settings, "controls": []})
    folder = open_folder(recipe)
    stored = Checkpoint(Path(recipe.base), "bert").backbone.values()
    backbone = sum(math.prod(tensor.shape) for tensor in stored)
    more = predicted_cost(recipe, folder).disk_bytes - predicted_cost(without, folder).disk_bytes
    assert more == 4 * backbone
    assert added_memory(without)["training"] == 0
    assert added_memory(recipe)["training"] > 4 * 4 * backbone


def problems_of(settings):
    with pytest.raises(PaveError) as told:
        plan_recipe(Recipe.model_validate(settings))
    return str(told.value)


def test_what_keeps_it_from_being_trained_is_told(joint_settings, tmp_path):
    words, more = joint_settings["tasks"]
    told = problems_of({**joint_settings, "tasks": [words, {**more, "trainer": {"max_epochs": 7}}]})
    assert (
        "controls: joint: trainer.max_epochs must be the same for all tasks, found words: 2 and more: 7; "
        "let them agree, or take joint out of controls"
    ) in told
    told = problems_of({**joint_settings, "tasks": [words, {**more, "training": {"lora": {"rank": 2}}}]})
    assert "controls: joint: training.lora must be the same" in told
    told = problems_of({**joint_settings, "trainer": {"accelerator": "cpu", "max_steps": 5}})
    assert "controls: joint: trainer.max_steps cannot be shared out" in told
    told = problems_of({**joint_settings, "tasks": [words], "merge": []})
    assert "controls: joint: expected at least two tasks" in told
    told = problems_of({**joint_settings, "trainer": {"accelerator": "cpu", "limit_train_batches": 0.001}})
    assert "controls: joint: task 'words': its expert is there, but it would be trained again: " in told
    told = problems_of({**joint_settings, "training": {"max_length": 16, "freeze": ["embedings"]}})
    assert "tasks 'words', 'more': training.freeze: no submodule 'embedings'" in told

    other = Path(shutil.copytree(words["expert"]["from"], tmp_path / "other"))
    file = other / "tokenizer.json"
    text = file.read_text()
    assert '"w95": 99' in text
    file.write_text(text.replace('"w95": 99', '"v95": 99'))
    told = problems_of({**joint_settings, "tasks": [{**words, "expert": {"from": str(other)}}, more]})
    assert f"controls: joint: task 'words': its expert {other} reads rows with another tokenizer" in told


def test_what_is_frozen_for_some_tasks_only_is_told(joint_settings, caplog):
    words, more = joint_settings["tasks"]
    plan_recipe(
        Recipe.model_validate({**joint_settings, "tasks": [{**words, "training": {"freeze": ["embeddings"]}}, more]})
    )
    assert (
        "controls: joint: embeddings is trained, because training.freeze does not name it for all tasks" in caplog.text
    )


def test_no_merge_step_takes_its_name(joint_settings):
    steps = [{"method": "average", "name": "joint"}]
    Recipe.model_validate({**joint_settings, "merge": steps, "controls": []})
    with pytest.raises(ValueError, match="a merge step cannot be named 'joint'"):
        Recipe.model_validate({**joint_settings, "merge": steps})
