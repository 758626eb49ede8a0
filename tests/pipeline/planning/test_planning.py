"""What is found before anything runs."""

import json
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    FNetConfig,
    FNetForSequenceClassification,
    GteConfig,
    GteModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    SqueezeBertConfig,
    SqueezeBertModel,
    T5Config,
    T5Model,
)

from pave_lightning import Recipe
from pave_lightning.errors import PaveError
from pave_lightning.merging import known_methods, make_method, merge_method, registry
from pave_lightning.merging.evidence import PlannedEvidence
from pave_lightning.pipeline import costs
from pave_lightning.pipeline.commands import open_folder, plan_recipe, run_stage
from pave_lightning.pipeline.planning import check_recipe, cost_table, plan_rows, predicted_cost
from pave_lightning.pipeline.planning.table import largest_method
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.tasks import tokenizers
from pave_lightning.tasks.kinds import tokens
from pave_lightning.weights import Parameter, ParameterKind
from pave_lightning.weights.task_vectors import PlannedTaskVectors


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


def test_a_length_that_a_base_without_table_was_not_made_for_is_told(problems, recipe_settings, caplog, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(**sizes, vocab_size=100, max_position_embeddings=12, pad_token_id=0)
    base = tmp_path / "base"
    shutil.copytree(recipe_settings["base"], base)
    LlamaForSequenceClassification(config).save_pretrained(base)
    assert problems(base=str(base), merge=["average"]) == ""
    assert "training.max_length is 16, but the base was made for at most 12 tokens" in caplog.text


def test_of_weights_that_lie_there_twice_the_plan_says_which_are_read(recipe_settings, expert, tmp_path):
    folder, tasks = expert
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.fp16.safetensors"):
        (folder / name).write_bytes(b"not read")
    recipe = Recipe.model_validate({**recipe_settings, "tasks": tasks})
    console = Console(width=1000, record=True, file=StringIO())
    plan_recipe(recipe, console)
    notes = [line for line in console.export_text().splitlines() if "pytorch_model.bin" in line]
    assert notes == [
        f"note: task 'words': {folder} holds weights in other files, too: model.safetensors is read, "
        "model.fp16.safetensors, pytorch_model.bin not"
    ]


def test_a_base_that_takes_no_attention_mask_is_refused(problems, recipe_settings, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(recipe_settings["base"], base)
    config = FNetConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=24, vocab_size=100)
    FNetForSequenceClassification(config).save_pretrained(base)
    assert "takes no attention mask, so it would read padding as text" in problems(base=str(base))


def test_kinds_of_task_whose_models_have_different_backbones_are_refused(problems, recipe_settings, tmp_path):
    """T5 classifies words with its encoder alone."""
    base = tmp_path / "base"
    shutil.copytree(recipe_settings["base"], base)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 100}
    T5Model(T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0)).save_pretrained(base)
    rows = [{"words": ["w1", "w2"], "labels": ["low", "high"]}, {"words": ["w3"], "labels": ["high"]}]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tags = {
        "name": "tags",
        "kind": "token_classification",
        "classes": ["low", "high"],
        "data": {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")},
    }
    words = recipe_settings["tasks"][0]
    told = problems(base=str(base), tasks=[words, tags], merge=["average"])
    assert "T5ForSequenceClassification on T5Model, T5ForTokenClassification on T5EncoderModel" in told
    assert problems(base=str(base), tasks=[{**tags, "name": "more"}, tags], merge=["average"]) == ""


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
    assert text.count("\n") == 9
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
    # Of backbones plan reads the headers only; tests/test_existing_experts.py has what a run does.
    assert problems(tasks=tasks) == ""
    tensors["classifier.bias"][1] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    assert "classifier.bias" in problems(tasks=tasks)

    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in problems(tasks=tasks)

    path.rename(folder / "pytorch_model.bin")
    assert "pickled" in problems(tasks=tasks)


def test_a_checkpoint_without_a_classification_head(problems, expert, tmp_path):
    folder, tasks = expert
    config = BertConfig.from_pretrained(folder)
    BertForMaskedLM(config).save_pretrained(folder)
    assert "has no head of a sequence-classification model" in problems(tasks=tasks)


def test_adapters_are_looked_at(problems, expert, tmp_path):
    folder, tasks = expert
    (folder / "adapter_config.json").write_text(json.dumps({"modules_to_save": ["classifier"]}))
    assert "adapter_model.safetensors" in problems(tasks=tasks)
    (folder / "adapter_model.safetensors").write_bytes(b"no")
    assert "truncated" in problems(tasks=tasks)
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    assert "peft_type" in problems(tasks=tasks)
    lora = {"peft_type": "LORA", "target_modules": ["query"], "task_type": "SEQ_CLS"}
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    assert "holds no head" in problems(tasks=tasks)


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"max_length": 33}, "reads at most 32 tokens"),
        ({"max_length": 16, "freeze": ["embedding"]}, "did you mean 'embeddings'"),
        ({"max_length": 16, "lora": {"target_modules": ["queri"]}}, "did you mean 'query'"),
        (
            {"max_length": 16, "lora": {"rank": 33, "target_modules": ["query"]}},
            "training.lora.rank is 33, but no layer that it adapts has more than 32 directions",
        ),
    ],
)
def test_training_that_does_not_fit_the_base(problems, training, told):
    text = problems(training=training)
    assert text.count(told) == 1
    assert "tasks 'words', 'numbers': training." in text


def test_what_is_wrong_with_one_of_two_trainings_is_told_of_it_alone(problems, recipe_settings):
    words, numbers = recipe_settings["tasks"]
    own = {"max_length": 40, "lora": {"target_modules": ["queri"]}}
    text = problems(tasks=[{**words, "training": own}, numbers], training={"max_length": 40})
    assert "tasks 'words', 'numbers': training.max_length is 40, but the base reads at most 32 tokens" in text
    assert f"task '{words['name']}': training.lora.target_modules: no layer 'queri'" in text


@pytest.mark.parametrize(
    ("trainer", "told"),
    [
        ({"max_epochs": 1, "accelerator": "tpu"}, "refuses these options: Requirement 'torch_xla"),
        ({"max_epochs": 1, "logger": True}, "cannot be set"),
        ({"max_epochs": 1, "barebones": True}, "cannot be set"),
        ({"max_epochs": 1, "accelerator": "tpuu"}, "refuses these options"),
        ({"max_epochs": 1, "precision": "7-bit"}, "trainer.precision: expected 64, 32, 16 or"),
    ],
)
def test_trainer_options(problems, trainer, told):
    assert told in problems(trainer=trainer)


def test_a_graphics_card_that_is_not_there_is_told_with_all_else(problems, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = problems(compute={"device": "cuda"}, trainer={"accelerator": "cuda"}, merge=["tiess"])
    assert "compute.device is cuda, but PyTorch finds no graphics card" in text
    assert text.count("lightning.Trainer refuses these options: `CUDAAccelerator`") == 1
    assert "'ties'" in text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert problems(compute={"device": "cuda"}) == ""


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


def test_tasks_to_purify_are_looked_at(problems):
    one, other = {"tasks": ["words"]}, {"tasks": ["numbers"]}
    emr = {"method": "emr", "purify": other}
    assert problems(purify=one, merge=["average", emr]) == ""
    text = problems(purify={**one, "stopping_share": 0.5}, merge=["average", emr])
    assert "nearest_budget: true" in text


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
        "merge step 'featcal': featcal starts from a merged model; name its merge step with the key 'anchor'",
        "merge step 'ties': ties has no use for the key 'anchor'",
        "merge step 'on_masks': its anchor 'emr' is not one model for all tasks; choose a static method",
        "density: should be less than or equal to 1, found 7",
        "densitty: unknown option; did you mean 'density'?",
    ):
        assert told in text
    assert "merge step 'peft': peft merges adapters" in problems(merge=["peft"])
    without = [{"method": "lot", "options": {"norms": "mean"}}, {"method": "cat", "options": {"norms": "whole"}}]
    assert problems(merge=without, capture={"moments": "input"}) == ""
    trained = {"method": "distillation", "anchor": "ties", "tune": {"batch_size": [4, 8]}}
    assert "merge step 'distillation': batch_size 8 is more than the 4 examples that are loaded at a time" in problems(
        merge=["ties", trained], capture={"batch_size": 4}
    )
    assert problems(merge=["ties", trained], capture={"batch_size": 8}) == ""
    fine = ["lot", {"method": "featcal", "anchor": "lot"}]
    assert problems(merge=fine, capture={"moments": "input", "norms": True}) == ""


@pytest.fixture
def gte(tiny_tokenizer, tmp_path):
    """A base whose files fuse what the model has apart."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    GteModel(GteConfig(**sizes, vocab_size=100, pad_token_id=0)).save_pretrained(tmp_path / "gte")
    tiny_tokenizer.save_pretrained(tmp_path / "gte")
    return str(tmp_path / "gte")


def test_checkpoints_may_fuse_what_the_model_has_apart(problems, gte):
    assert problems(base=gte) == ""


def test_checkpoints_whose_weights_have_no_place_in_the_model_are_refused(problems, gte, monkeypatch):
    monkeypatch.setattr("pave_lightning.weights.architecture.stored_places", lambda model: {})
    monkeypatch.setattr("pave_lightning.weights.architecture.remembered", lambda kind, key, find: find())
    assert "base: gte stores weights in other pieces than the model has" in problems(base=gte)


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


def test_one_is_no_plural(recipe_settings):
    settings = {**recipe_settings, "trainer": {"max_epochs": 1}, "capture": {"examples": 1}}
    settings["training"] = {"batch_size": 48, "max_length": 16}
    recipe = Recipe.model_validate(settings)
    about = {stage: what for stage, _, what in plan_rows(recipe, open_folder(recipe))}
    assert about["experts/words"].partition(";")[0] == "48 rows, 1 epoch, 1 step of 48"
    assert about["statistics/words"] == "1 training example"


def test_states_of_stages(recipe_settings, finished):
    recipe, folder = Recipe.model_validate(recipe_settings), RunFolder(finished)
    assert {state for _, state, _ in plan_rows(recipe, folder)} == {"there"}

    changed = Recipe.model_validate({**recipe_settings, "purify": {"rho": 0.8}})
    states = {stage: state for stage, state, _ in plan_rows(changed, folder)}
    assert states["experts/words"] == states["merged/emr-plain"] == states["scores/emr-plain"] == "there"
    assert states["merged/emr-purified"] == states["scores/emr-purified"] == "stale"
    assert [state for stage, state in states.items() if stage.startswith("purified/")] == ["to do"]

    shown = {stage: state for stage, state, _ in plan_rows(recipe.model_copy(update={"seed": 5}), folder)}
    assert set(shown.values()) == {"stale"}


def test_a_limit_of_steps_is_told(recipe_settings):
    settings = {**recipe_settings, "trainer": {"max_epochs": None, "max_steps": 5}}
    (name, state, what), *_ = plan_rows(Recipe.model_validate(settings), RunFolder(settings["output"]))
    assert (name, state, what.partition(";")[0]) == ("experts/words", "to do", "48 rows, 2 epochs, 5 steps of 16")


def test_what_always_the_same_answer_scores_is_told(recipe_settings):
    recipe = Recipe.model_validate(recipe_settings)
    about = {stage: what for stage, _, what in plan_rows(recipe, open_folder(recipe))}
    lines = Path(recipe_settings["tasks"][0]["data"]["validation"]).read_text().splitlines()
    ones = sum(json.loads(line)["label"] for line in lines)
    share = max(ones, len(lines) - ones) / len(lines)
    assert about["experts/words"].endswith(f"; always the same answer: accuracy {share:.3f}")
    assert about["experts/numbers"].endswith(" 0.000")


@pytest.mark.parametrize(
    ("trainer", "told"),
    [
        ({"limit_val_batches": 0.01}, "task 'words': trainer: lightning.Trainer refuses"),
        ({"max_epochs": 0}, "task 'words': trainer: nothing would be trained"),
        ({"max_epochs": -1}, "task 'words': trainer: training would have no end"),
        ({"strategy": "ddp_spawn", "devices": 2}, "trainer.strategy: ddp_spawn trains in processes that keep"),
        ({"num_nodes": 2}, "trainer.num_nodes"),
        ({"fast_dev_run": True}, "trainer.fast_dev_run"),
        ({"strategy": "fsdp", "devices": 2}, "trainer.strategy: fsdp needs GPUs; use fsdp2"),
    ],
    ids=str,
)
def test_training_that_lightning_would_refuse_or_lose(problems, trainer, told):
    assert told in problems(trainer={"accelerator": "cpu", **trainer})


def test_divided_weights_are_no_problem_but_where_they_must_be_whole(problems, expert, monkeypatch):
    folder, tasks = expert
    divided = {"accelerator": "cpu", "strategy": "fsdp2", "devices": 2}
    assert problems(trainer=divided) == ""
    told = problems(trainer=divided, controls=["joint"])
    assert "controls: joint: trainer.strategy divides the weights over processes" in told
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-5}))
    tasks[0]["expert"]["accept"] = ["layer_norm_eps"]
    told = problems(trainer=divided, tasks=tasks)
    assert "computes with a configuration of its own (layer_norm_eps), which cannot be scored with divided" in told
    assert problems(trainer={**divided, "strategy": "ddp"}, tasks=tasks) == ""


def test_models_that_cannot_recompute_activations_are_told(problems, monkeypatch):
    training = {"activation_checkpointing": True, "max_length": 16}
    assert problems(training=training) == ""
    monkeypatch.setattr("transformers.BertForSequenceClassification.supports_gradient_checkpointing", False)
    told = problems(training=training)
    assert "training.activation_checkpointing: transformers cannot recompute the activations of a Bert" in told
    assert told.count("activation_checkpointing") == 1


def test_trainer_sections_of_tasks_are_asked_too(recipe_settings, problems):
    first, second = recipe_settings["tasks"]
    text = problems(tasks=[first, {**second, "trainer": {"limit_train_batches": 0}}])
    assert "task 'numbers': tasks.numbers.trainer: nothing would be trained" in text


def in_step(step, problem):
    """A line of the list of problems; a step named by its method."""
    return f"  - merge step '{step['method']}': {problem}"


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ({"method": "cabs", "options": {"n": 16, "m": 16}}, "2 tasks cannot each keep 16 elements of a group of 16"),
        ({"method": "weighted_average", "options": {"weights": {"words": 1.0, "nmbers": 1.0}}}, "'nmbers'"),
        ({"method": "fisher", "options": {"weights": {"words": 1.0}}}, "numbers"),
        ({"method": "tall_masks", "options": {"threshold": {"words": 0.4}}}, "numbers"),
        ({"method": "consensus", "options": {"k": 50}}, "options.k is 50, but there are 2 tasks"),
        ({"method": "tsv_m", "options": {"rank_share": 0.01}}, "raise rank_share"),
    ],
)
def test_what_rules_have_against_the_request_is_told_before_anything_runs(problems, step, told):
    lines = [line for line in problems(merge=[step]).splitlines()[1:] if told in line]
    assert lines
    assert all(line.startswith(in_step(step, "")) for line in lines)


def test_a_rule_for_two_experts(problems, recipe_settings):
    words, numbers = recipe_settings["tasks"]
    assert problems(merge=["slerp"]) == ""
    text = problems(merge=["slerp"], tasks=[words, numbers, {**words, "name": "third"}])
    assert (
        in_step({"method": "slerp"}, "slerp goes between exactly two experts, found 3: words, numbers, third") in text
    )


def test_what_is_wrong_with_every_matrix_does_not_hide_all_else(problems, monkeypatch):
    monkeypatch.setattr(registry, "_registry", registry._registry.copy())

    class Fussy(registry.method_named("average")):
        def problems(self, vectors, evidence):
            yield from (f"{parameter.name} is too small" for parameter in vectors.parameters)

    merge_method("fussy")(Fussy)
    step = {"method": "fussy"}
    consensus = {"method": "consensus", "options": {"k": 3}}
    lines = problems(merge=[step, consensus]).splitlines()[1:]
    assert len(lines) == 4 + 1 + 1
    assert all(line.startswith(in_step(step, "")) for line in lines[:5])
    assert lines[4].endswith("more like these")
    assert "options.k is 3" in lines[5]


def test_each_value_that_is_tuned_is_looked_at(problems):
    step = {"method": "consensus", "tune": {"k": [2, 3, 3.5, 4]}, "anchor": "average", "scale": 0.3}
    text = problems(merge=[step, "average"])
    for told in ("found 3.5", "has no use for the key 'anchor'", "options.k is 3,", "options.k is 4,"):
        assert text.count(told) == 1, told
    assert "options.k is 2," not in text


def test_rules_are_asked_even_where_the_base_is_missing(problems):
    text = problems(merge=[{"method": "consensus", "options": {"k": 3}}, "robust_merge"], base="package:no_such/model")
    assert "options.k is 3" in text
    assert "trained whole" in text
    assert "set vectors: [plain]" in text
    assert text.count("\n") == 4


def test_rules_for_adapters_need_adapters(problems, recipe_settings):
    plain = [{"method": name, "vectors": ["plain"]} for name in ("robust_merge", "peft", "core_space")]
    lines = problems(merge=plain).splitlines()[1:]
    told = "merges low-rank adapters, but the experts of 'words', 'numbers' have none: they are trained whole"
    assert lines == [in_step(step, f"{step['method']} {told}; set training.lora") for step in plain]

    training = {**recipe_settings["training"], "lora": {"rank": 4}}
    assert problems(merge=plain, training=training) == ""
    words, numbers = recipe_settings["tasks"]
    tasks = [words, {**numbers, "training": {"lora": None}}]
    lines = problems(merge=plain, training=training, tasks=tasks).splitlines()[1:]
    for step, line in zip(plain[:2], lines, strict=False):
        assert line.startswith(
            in_step(step, f"{step['method']} merges low-rank adapters, but the experts of 'numbers' h")
        )
    assert len(lines) == 3
    assert "'numbers' has no low-rank adapters, but the other tasks have (they are trained whole" in lines[2]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"rank": 4}, []),
        ({"rank": 4, "target_modules": ["query"]}, ["has an adapter in 'words', but none in 'numbers'"]),
        (
            {"rank": 2, "target_modules": ["query"]},
            ["found rank 4 in 'words', 2 in 'numbers'", "but none in 'numbers'"],
        ),
    ],
)
def test_adapters_that_will_not_fit_each_other(problems, recipe_settings, other, told):
    words, numbers = recipe_settings["tasks"]
    training = {**recipe_settings["training"], "lora": {"rank": 4}}
    tasks = [words, {**numbers, "training": {"lora": other}}]
    text = problems(merge=[{"method": "robust_merge", "vectors": ["plain"]}], training=training, tasks=tasks)
    assert bool(text) == bool(told)
    assert all(part in text for part in told)


@pytest.fixture
def adapter_of(base_folder, tmp_path):
    """Save a peft adapter of the tiny base, untrained unless told otherwise; give its folder and peft's model."""

    def build(name, trained=True, **options):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=2)
        settings = {"r": 4, "target_modules": "all-linear", "modules_to_save": ["classifier"], **options}
        wrapped = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **settings))
        if trained:
            with torch.no_grad():
                wrapped.get_parameter(
                    "base_model.model.bert.encoder.layer.1.attention.self.query.lora_B.default.weight"
                )[0, 0] = 0.1
        wrapped.save_pretrained(tmp_path / name)
        return tmp_path / name, wrapped

    return build


@pytest.mark.parametrize("training", [{}, {"freeze": ["encoder.layer.0", "embeddings"]}])
@pytest.mark.parametrize("target", ["all-linear", ["query", "output.dense"]])
def test_a_plan_knows_which_layers_peft_will_adapt(problems, recipe_settings, adapter_of, target, training):
    """An adapter that peft made of the same options fits what the plan expects of one that is to be trained."""
    excluded = [rf".*{name}\..*" for name in training.get("freeze", [])]
    folder, _ = adapter_of("same", target_modules=target, exclude_modules="|".join(excluded) or None)
    words, numbers = recipe_settings["tasks"]
    lora = {"rank": 4, "target_modules": target}
    tasks = [{**words, "expert": {"from": str(folder)}}, {**numbers, "training": {"lora": lora, **training}}]
    step = {"method": "robust_merge", "vectors": ["plain"]}
    assert problems(merge=[step], tasks=tasks) == ""
    wider = [tasks[0], {**numbers, "training": {"lora": {**lora, "target_modules": ["dense", "query"]}}}]
    assert bool(problems(merge=[step], tasks=wider))


def test_named_experts_with_adapters_and_without(problems, expert, adapter_of, recipe_settings):
    step = [{"method": "robust_merge", "vectors": ["plain"]}]
    folder, tasks = expert
    text = problems(merge=step, tasks=tasks)
    assert (
        f"the experts of 'words' have none: {folder} holds no adapter (looked for adapter/adapter_config.json)" in text
    )
    assert "the experts of 'numbers' have none: they are trained whole" in text
    assert text.count("\n") == 2
    # Task vectors of checkpoints may be of low rank, which core_space finds out by itself.
    assert "'numbers'" in problems(merge=[{**step[0], "method": "core_space"}], tasks=tasks)
    both = [tasks[0], {**tasks[0], "name": "more"}]
    assert problems(merge=[{**step[0], "method": "core_space"}], tasks=both) == ""

    dora, _ = adapter_of("dora", use_dora=True)
    words, _ = recipe_settings["tasks"]
    text = problems(merge=step, tasks=[tasks[1], {**words, "expert": {"from": str(dora)}}], training={"max_length": 16})
    assert "the experts of 'words' have none: its adapter has the setting use_dora" in text


def test_an_adapter_whose_factors_are_broken(problems, expert, adapter_of):
    folder, tasks = expert
    adapter, _ = adapter_of("broken")
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors[next(name for name in tensors if "lora_A" in name)]
    save_file(tensors, adapter / "adapter_model.safetensors")
    words, numbers = tasks
    text = problems(tasks=[{**words, "expert": {"from": str(adapter)}}, numbers])
    assert "lora_A.weight" in text
    assert "which its adapter_config.json asks for" in text
    shutil.copytree(adapter, folder / "adapter")
    text = problems(tasks=tasks)
    assert text.count("has only one of its two factors") == 1


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "lora_only", "lora_bias": True}])
def test_an_adapter_that_adds_nothing_is_refused(problems, recipe_settings, adapter_of, options):
    words, numbers = recipe_settings["tasks"]

    def told(folder):
        return "adds nothing to the base" in problems(tasks=[{**words, "expert": {"from": str(folder)}}, numbers])

    assert not told(adapter_of("trained", **options)[0])
    # DoRA's magnitudes are no zeros, whatever they amount to.
    assert told(adapter_of("untrained", trained=False, **options)[0]) == ("use_dora" not in options)


def test_a_head_and_a_pooler_that_the_base_lacks_are_nothing_to_merge(problems, recipe_settings, adapter_of, make_base):
    words, numbers = recipe_settings["tasks"]
    options = {"modules_to_save": ["classifier", "pooler"], "target_modules": ["query"]}
    folder, _ = adapter_of("untrained", trained=False, **options)
    tasks = [{**words, "expert": {"from": str(folder), "accept": ["base"]}}, numbers]
    assert "adds nothing" in problems(tasks=tasks, base=str(make_base(pooler=False)))
    assert "adds nothing" not in problems(tasks=tasks)


def test_no_rule_looks_at_values_while_planning():
    """Plans pass over methods that do, so that this must be seen here."""
    parameters = [Parameter(name, ParameterKind.LINEAR, (24, 24), 1) for name in ("a.weight", "b.weight")]
    parameters.append(Parameter("b.bias", ParameterKind.BIAS, (24,)))
    for ranks in ({"a": 2, "b": 3}, "they have none"):
        vectors = PlannedTaskVectors(parameters, {"one": ranks, "two": ranks})
        for name in known_methods():
            assert list(make_method(name, {}).problems(vectors, PlannedEvidence())) == [], name
    with pytest.raises(NotImplementedError, match=r"a\.weight: only names and shapes are known"):
        vectors.vector("one", parameters[0])


def test_a_rule_of_another_package_that_looks_at_values_is_passed_over(problems, monkeypatch):
    monkeypatch.setattr(registry, "_registry", registry._registry.copy())

    class Curious(registry.method_named("average")):
        def problems(self, vectors, evidence):
            vectors.base(vectors.parameters[0])
            yield "not reached"

    merge_method("curious")(Curious)
    assert problems(merge=["curious"]) == ""


@pytest.fixture
def planned(recipe_settings):
    """Predicted cost and names of the stages of the tiny recipe with some sections changed."""

    def predict(**changes):
        recipe = Recipe.model_validate({**recipe_settings, **changes})
        folder = open_folder(recipe)
        return predicted_cost(recipe, folder), [name for name, _, _ in plan_rows(recipe, folder)]

    return predict


def test_every_purification_has_its_cost(planned):
    def step(name, **purify):
        return {"method": "task_arithmetic", "name": name, "vectors": ["purified"], "purify": {"rho": 0.9, **purify}}

    plain, exact = step("a", metric="identity"), step("b", exact=True, scope="global")
    cost, _ = planned(merge=[plain, exact, {**exact, "name": "c"}])
    layers = {options: [one for one in cost.layers if one.options == options] for options in cost_options(cost)}
    assert [(options.metric, options.exact) for options in layers] == [("identity", False), ("covariance", True)]
    counts = [sum(layer.layers for layer in own) for own in layers.values()]
    assert counts[0] == counts[1] > 0
    swapped, _ = planned(merge=[exact, plain, {**exact, "name": "c"}])
    assert swapped.disk_bytes == cost.disk_bytes
    assert sum(layer.layers for layer in swapped.layers) == sum(counts)


def cost_options(cost):
    return list(dict.fromkeys(layer.options for layer in cost.layers))


def test_all_ratios_that_auto_tries_are_counted(planned):
    step = {"method": "average", "vectors": ["purified"]}
    one, _ = planned(merge=[step], purify={"rho": 0.9})
    five, names = planned(merge=[step], purify={"rho": "auto"})
    assert [options.rho for options in cost_options(five)] == [0.875, 0.9375, 0.97, 0.984, 0.992]
    assert len(five.layers) == 5 * len(one.layers)
    assert five.disk_bytes > one.disk_bytes
    assert sum(name.startswith("purified/") for name in names) == 5
    # A ratio of 1 leaves every expert as it is.
    assert planned(merge=[step], purify={"rho": 1.0})[0].layers == ()


def test_memory_is_that_of_a_step_with_its_options(planned, monkeypatch):
    asked = []
    monkeypatch.setattr(costs, "merging_bytes", lambda parameters, tasks, methods: asked.extend(methods) or 0)
    table = Parameter("words.weight", ParameterKind.EMBEDDING, (50_000, 20))
    step = {"method": "iso_c", "vectors": ["plain"]}
    planned(merge=[step, {**step, "name": "whole", "options": {"embeddings": True}}])
    assert [method.options.embeddings for method in asked] == [False, True]
    # Of options that are still to be chosen those count that need most.
    chosen = MergeStep.model_validate({**step, "tune": {"embeddings": [False, True]}})
    assert largest_method(chosen, [table], 3).options.embeddings
    chosen = MergeStep.model_validate({**step, "tune": {"embeddings": [True, False]}})
    assert largest_method(chosen, [table], 3).options.embeddings


def test_purification_without_merging_is_planned(planned, recipe_settings):
    scored, names = planned(merge=[], evaluate={"purified_experts": True}, purify={"rho": 0.9})
    assert scored.layers
    assert scored.peak_bytes > scored.baseline_bytes
    place = next(index for index, name in enumerate(names) if name.startswith("purified/"))
    assert names[place - 1].startswith("statistics/")
    assert names[place + 1] == "scores/base"
    # What only `pave purify` does is told as its own, and writes whole experts.
    exported, names = planned(merge=[], purify={"rho": 0.9})
    assert [name.partition("/")[0] for name in names].count("purified-experts") == 1
    assert not any(name.startswith("purified/") for name in names)
    assert exported.disk_bytes > scored.disk_bytes
    plain, names = planned(merge=[{"method": "average", "vectors": ["plain"]}], purify={"rho": 0.9})
    assert plain.layers == ()
    assert not any(name.startswith("purified") for name in names)
    both, names = planned(merge=["average"], evaluate={"purified_experts": True}, purify={"rho": 0.9})
    assert sum(name.startswith("purified/") for name in names) == len(cost_options(both)) == 1


def test_captured_convolutions_are_counted(planned, tiny_tokenizer, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    groups = {f"{name}_groups": 1 for name in ("q", "k", "v", "post_attention", "intermediate", "output")}
    config = SqueezeBertConfig(**sizes, **groups, embedding_size=32, vocab_size=200, max_position_embeddings=32)
    SqueezeBertModel(config).save_pretrained(tmp_path / "squeeze")
    tiny_tokenizer.save_pretrained(tmp_path / "squeeze")

    def count(**capture):
        cost, _ = planned(base=str(tmp_path / "squeeze"), merge=["average"], capture={"examples": 8, **capture})
        return sum(layer.layers for layer in cost.layers)

    assert count() == 1  # the pooler
    assert count(convolutions=True) == 7


def test_tokenizers_are_read_and_fingerprinted_once(recipe_settings, monkeypatch):
    read, taken = [], []
    reading, taking = tokenizers._usable, tokens._fingerprint
    monkeypatch.setattr(tokenizers, "_usable", lambda *given, **how: read.append(given) or reading(*given, **how))
    monkeypatch.setattr(tokens, "_fingerprint", lambda given: taken.append(given) or taking(given))
    plan_recipe(Recipe.model_validate(recipe_settings), Console(file=StringIO()))
    assert len(recipe_settings["tasks"]) > 1
    assert (len(read), len(taken)) == (1, 1)


@pytest.mark.slow
def test_the_plan_of_a_plain_recipe_loads_nothing_that_only_work_needs(recipe_settings, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({**recipe_settings, "trainer": {"max_epochs": 2, "precision": "bf16-mixed"}}))
    code = (
        "import sys; from pathlib import Path; import pave_lightning as p; "
        f"p.plan_recipe(p.load_recipe(Path({str(recipe)!r}))); "
        "heavy = {'lightning', 'torchmetrics', 'peft', 'mlflow', 'matplotlib', 'datasets'} & set(sys.modules); "
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 epochs" not in done.stdout
    assert "2 epochs" in done.stdout
