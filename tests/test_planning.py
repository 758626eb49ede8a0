"""What is found before anything runs."""

import json
import shutil
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, GteConfig, GteModel

from pave_lightning import Recipe, run_recipe
from pave_lightning.commands import open_folder, run_stage
from pave_lightning.errors import PaveError
from pave_lightning.planning import check_recipe, cost_table, plan_rows
from pave_lightning.run_folder import RunFolder


@pytest.fixture
def problems(recipe_settings, tmp_path):
    """All that is told about the tiny recipe with some sections changed."""

    def check(**changes):
        folder = RunFolder(tmp_path / "checked")
        try:
            check_recipe(Recipe.model_validate({**recipe_settings, **changes}), folder)
        except PaveError as error:
            return str(error)
        return ""

    return check


@pytest.fixture
def expert(recipe_settings, expert_folders, tmp_path):
    """A copy of an expert that may be spoilt, and the tasks of a recipe that uses it."""
    folder = tmp_path / "expert"
    shutil.copytree(expert_folders["first"], folder)
    words, numbers = recipe_settings["tasks"]
    return folder, [{**words, "expert": {"from": str(folder)}}, numbers]


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_tiny_recipe_is_fine(problems, expert):
    assert problems() == ""
    assert problems(tasks=expert[1]) == ""


def test_many_mistakes_are_told_at_once(problems, recipe_settings):
    words, numbers = recipe_settings["tasks"]
    text = problems(
        tasks=[{**words, "label": "lable"}, {**numbers, "text": "txt"}],
        base="package:no_such_package/model",
        trainer={"max_epoch": 1},
        merge=["tiess", {"method": "average", "scale": 0.5}],
        tracking={"uri": "file:./mlruns"},
    )
    for part in ("'label'", "'text'", "no_such_package", "max_epochs", "'ties'", "no scale", "sqlite:///"):
        assert part in text


def test_experts_of_another_kind(problems, expert, make_base, make_expert, recipe_settings):
    _, tasks = expert
    words, numbers = recipe_settings["tasks"]
    other = make_expert(make_base(num_hidden_layers=3, intermediate_size=48))
    text = problems(tasks=[{**words, "expert": {"from": str(other)}}, numbers])
    assert "num_hidden_layers is 3" in text
    assert "[48, 32] in the expert, [64, 32] in the base" in text
    assert text.count("\n") == 21
    assert "more" in text.splitlines()[-1]

    wrong = [{**tasks[0], "classes": 3, "data": tasks[0]["data"]}, tasks[1]]
    assert "2 outputs, but the task needs 3" in problems(tasks=wrong)


def test_classes_in_another_order(problems, expert):
    folder, tasks = expert
    edit(folder / "config.json", id2label={"0": "high", "1": "low"}, label2id={"high": 0, "low": 1})
    assert "['high', 'low'], the task in the order ['low', 'high']" in problems(tasks=tasks)


def test_another_vocabulary_of_the_same_size(problems, expert):
    folder, tasks = expert
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = problems(tasks=tasks)
    assert "vocabulary" in text
    assert "2 tokens differ" in text


def test_weights_that_cannot_be_used(problems, expert):
    folder, tasks = expert
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["bert.encoder.layer.0.output.dense.weight"][3, 4] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    assert "encoder.layer.0.output.dense.weight" in problems(tasks=tasks)

    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in problems(tasks=tasks)

    path.rename(folder / "pytorch_model.bin")
    assert "pickled" in problems(tasks=tasks)


def test_a_checkpoint_without_a_classification_head(problems, expert, tmp_path):
    folder, tasks = expert
    config = BertConfig.from_pretrained(folder)
    BertForMaskedLM(config).save_pretrained(folder)
    assert "no classification head" in problems(tasks=tasks)


def test_adapters_are_looked_at(problems, expert, tmp_path):
    folder, tasks = expert
    (folder / "adapter_config.json").write_text(json.dumps({"modules_to_save": ["classifier"]}))
    assert "adapter_model.safetensors" in problems(tasks=tasks)
    (folder / "adapter_model.safetensors").write_bytes(b"no")
    assert "truncated" in problems(tasks=tasks)
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    assert problems(tasks=tasks) == ""
    (folder / "adapter_config.json").write_text(json.dumps({"modules_to_save": None}))
    assert "holds no head" in problems(tasks=tasks)


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"max_length": 33}, "reads at most 32 tokens"),
        ({"max_length": 16, "freeze": ["embedding"]}, "did you mean 'embeddings'"),
        ({"max_length": 16, "lora": {"target_modules": ["queri"]}}, "did you mean 'query'"),
    ],
)
def test_training_that_does_not_fit_the_base(problems, training, told):
    assert told in problems(training=training)


@pytest.mark.parametrize(
    ("trainer", "told"),
    [
        ({"max_epochs": 1, "logger": True}, "cannot be set"),
        ({"max_epochs": 1, "barebones": True}, "cannot be set"),
        ({"max_epochs": 1, "accelerator": "tpuu"}, "refuses these options"),
        ({"max_epochs": 1, "precision": "7-bit"}, "refuses these options"),
    ],
)
def test_trainer_options(problems, trainer, told):
    assert told in problems(trainer=trainer)


def test_purifications_that_cannot_be_run_are_told_at_once(problems):
    purify = {"rho": 0.9, "target": "delta", "stopping_share": 0.5}
    text = problems(
        purify=purify,
        capture={"examples": 32, "moments": "output"},
        merge=[
            "average",
            {"method": "emr", "vectors": ["purified"], "purify": {"target": "expert", "statistics": "other_task"}},
        ],
    )
    assert "purify: target: delta needs the second moments of all inputs; set capture.moments: input" in text
    assert "purify: capture.moments: output serves the metric root alone, found covariance" in text
    assert "nearest_budget: true" in text
    assert "merge.emr.purify: statistics: other_task needs the second moments of all inputs" in text

    assert problems(purify={**purify, "nearest_budget": True}, capture={"moments": "input"}) == ""
    assert problems(purify={"metric": "root"}, capture={"moments": "output"}) == ""
    # What only merges on plain task vectors would use is no problem.
    assert problems(purify=purify, merge=[{"method": "average", "vectors": ["plain"]}]) == ""


def test_ratios_that_auto_tries_are_looked_at_too(problems):
    assert problems(purify={"rho": "auto"}) == ""
    assert "nearest_budget: true" in problems(purify={"rho": "auto", "stopping_share": 0.5})


def test_purified_experts_need_a_ratio(problems):
    text = problems(purify={"rho": "auto"}, evaluate={"purified_experts": True})
    assert "evaluate.purified_experts: the ratios of all purifications are 'auto'" in text
    steps = ["average", {"method": "emr", "purify": {"rho": 0.9}}]
    assert problems(purify={"rho": "auto"}, evaluate={"purified_experts": True}, merge=steps) == ""


def test_what_rules_need_is_asked_for_before_anything_runs(problems):
    steps = [
        "task_arithmetic",
        "lot",
        {"method": "featcal"},
        {"method": "ties", "anchor": "task_arithmetic"},
        {"method": "featcal", "name": "on_masks", "anchor": "emr"},
        "emr",
        {"method": "ties", "name": "tuned", "tune": {"density": [0.2, 7]}},
        {"method": "ties", "name": "mistuned", "tune": {"densitty": [0.2]}},
    ]
    text = problems(merge=steps)
    for told in (
        "merge step 'lot': lot needs the second moments of all inputs; set capture.moments: input",
        "merge step 'lot': lot needs what the scales of norms multiply; set capture.norms: true",
        "merge step 'featcal': featcal calibrates a merged model; name its merge step with the key 'anchor'",
        "merge step 'ties': ties has no use for the key 'anchor'",
        "merge step 'on_masks': its anchor 'emr' is not one model for all tasks; choose a static method",
        "density: should be less than or equal to 1, found 7",
        "densitty: unknown option; did you mean 'density'?",
    ):
        assert told in text
    assert "merge step 'peft': peft merges adapters" in problems(merge=["peft"])
    without = [{"method": "lot", "options": {"norms": "mean"}}, {"method": "cat", "options": {"norms": "whole"}}]
    assert problems(merge=without, capture={"moments": "input"}) == ""
    fine = ["lot", {"method": "featcal", "anchor": "lot"}]
    assert problems(merge=fine, capture={"moments": "input", "norms": True}) == ""


def test_an_architecture_whose_checkpoints_hold_fused_weights_is_refused(problems, tiny_tokenizer, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    GteModel(GteConfig(**sizes, vocab_size=100, pad_token_id=0)).save_pretrained(tmp_path / "gte")
    tiny_tokenizer.save_pretrained(tmp_path / "gte")
    assert "base: gte stores weights in other pieces than the model has" in problems(base=str(tmp_path / "gte"))


def test_an_expert_that_is_the_base_is_refused(problems, expert, base_folder):
    folder, tasks = expert
    base = load_file(base_folder / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        weights[name] = base.get(name.removeprefix("bert."), weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"the backbone of {folder} is the base's, so there is nothing to merge" in problems(tasks=tasks)


def test_a_rule_that_draws_depends_on_the_seed(ready_settings):
    steps = ["average", "dare", {"method": "dare", "name": "fixed", "options": {"seed": 3}}]
    steps = [{**({"method": step} if isinstance(step, str) else step), "vectors": ["plain"]} for step in steps]
    recipe = Recipe.model_validate({**ready_settings, "merge": steps})
    folder = open_folder(recipe)
    for stage in ("fit", "merge"):
        run_stage(recipe, stage)
    states = {stage: state for stage, state, _ in plan_rows(recipe.model_copy(update={"seed": 5}), folder)}
    assert states["merged/dare-plain"] == "stale"
    assert states["merged/average-plain"] == states["merged/fixed-plain"] == "there"


def test_costs_are_predicted_for_what_the_recipe_asks(ready_settings):
    def shown(**changes):
        recipe = Recipe.model_validate({**ready_settings, **changes})
        console = Console(width=120, record=True, file=StringIO())
        console.print(cost_table(recipe, open_folder(recipe)))
        return console.export_text()

    text = shown()
    for part in ("32 x 32", "64 x 32", "32 x 64", "highest memory", "disk"):
        assert part in text
    assert "32 x 64" in shown(purify={"rho": "auto"})
    assert "32 x 64" not in shown(merge=[{"method": "average", "vectors": ["plain"]}])


def test_states_of_stages(recipe_settings):
    recipe = Recipe.model_validate(recipe_settings)
    folder = RunFolder(run_recipe(recipe))
    assert {state for _, state, _ in plan_rows(recipe, folder)} == {"there"}

    changed = Recipe.model_validate({**recipe_settings, "purify": {"rho": 0.8}})
    states = {stage: state for stage, state, _ in plan_rows(changed, folder)}
    assert states["experts/words"] == states["merged/emr-plain"] == states["scores/emr-plain"] == "there"
    assert states["merged/emr-purified"] == states["scores/emr-purified"] == "stale"
    assert [state for stage, state in states.items() if stage.startswith("purified/")] == ["to do"]

    shown = {stage: state for stage, state, _ in plan_rows(recipe.model_copy(update={"seed": 5}), folder)}
    assert set(shown.values()) == {"stale"}


def test_steps_are_not_told_where_they_are_not_known(recipe_settings):
    settings = {**recipe_settings, "trainer": {"max_epochs": None, "max_steps": 5}}
    rows = plan_rows(Recipe.model_validate(settings), RunFolder(settings["output"]))
    assert rows[0] == ("experts/words", "to do", "48 rows")
