"""Recipes with adapters, the whole way: trained with peft's options or taken in by name, captured, merged, scored."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from pave_lightning import Recipe, plan_recipe, run_recipe, task_vectors
from pave_lightning.errors import PaveError


@pytest.fixture
def several(base_folder, tmp_path):
    """Two adapters of one model in folders of their own, as peft saves them."""
    torch.manual_seed(0)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query"])
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base_folder), config, "first")
    model.add_adapter("second", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "several")
    return tmp_path / "several"


def with_experts(settings, *experts):
    tasks = [
        {key: value for key, value in task.items() if key != "expert"} | {"expert": expert}
        for task, expert in zip(settings["tasks"], experts, strict=True)
    ]
    return Recipe.model_validate({**settings, "tasks": tasks})


def test_named_adapters(ready_settings, several, base_folder):
    settings = {**ready_settings, "merge": [{"method": "task_arithmetic", "scale": 0.5}]}
    experts = [{"from": str(several), "adapter": name} for name in ("first", "second")]
    run = run_recipe(with_experts(settings, *experts))
    for task, name in (("words", "first"), ("more", "second")):
        own = load_file(several / name / "adapter_model.safetensors")
        kept = load_file(run / "experts" / task / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(kept[key], value) for key, value in own.items())
    source = task_vectors(str(base_folder), {n: str(several / n) for n in ("first", "second")})
    merged = load_file(run / "merged" / "task_arithmetic-plain" / "model.safetensors")
    for parameter in source.parameters:
        expected = source.base(parameter) + 0.5 * sum(source.vector(task, parameter) for task in source.tasks)
        torch.testing.assert_close(merged[parameter.name], expected, rtol=0, atol=1e-6)


def test_adapters_that_are_not_named_or_not_there_are_told_by_a_plan(ready_settings, several):
    experts = [{"from": str(several)}, {"from": str(several), "adapter": "secnd"}]
    with pytest.raises(PaveError) as told:
        plan_recipe(with_experts(ready_settings, *experts))
    assert f"expert of task 'words': {several} holds several adapters; name one of first, second" in str(told.value)
    assert f"expert of task 'more': {several} has no adapter 'secnd'; did you mean 'second'?" in str(told.value)


def test_prompts_are_told_by_a_plan(ready_settings, several):
    file = several / "first" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "PREFIX_TUNING"}))
    experts = [{"from": str(several), "adapter": name} for name in ("first", "second")]
    with pytest.raises(PaveError, match="is of kind PREFIX_TUNING, which adds to a model's inputs or states"):
        plan_recipe(with_experts(ready_settings, *experts))


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True, "modules_to_save": ["LayerNorm"]},
        {"init_lora_weights": "pissa", "target_modules": ["query", "value"], "bias": "all"},
        {"target_modules": ["query", "word_embeddings"], "rank_pattern": {"query": 4}, "use_rslora": True},
    ],
    ids=["dora", "pissa", "embeddings"],
)
def test_training_with_options_of_peft_is_merged_like_any_other(recipe_settings, base_folder, tmp_path, options):
    settings = {
        **recipe_settings,
        "training": {**recipe_settings["training"], "lora": {"rank": 2, **options}},
        "merge": [{"method": "task_arithmetic", "scale": 0.5}],
    }
    run = run_recipe(Recipe.model_validate(settings))
    # The public task vectors of the adapters alone, which peft merges into the base once more.
    alone = {}
    for task in ("words", "numbers"):
        alone[task] = str(shutil.copytree(run / "experts" / task / "adapter", tmp_path / task))
    source = task_vectors(str(base_folder), alone)
    merged = load_file(run / "merged" / "task_arithmetic-plain" / "model.safetensors")
    for parameter in source.parameters:
        expected = source.base(parameter) + 0.5 * sum(source.vector(task, parameter) for task in source.tasks)
        torch.testing.assert_close(merged[parameter.name], expected, rtol=0, atol=1e-6)
    assert (run / "merged" / "task_arithmetic-purified").is_dir()


def test_methods_of_low_rank_know_the_ranks_that_training_will_give(recipe_settings):
    def problems(lora):
        training = {**recipe_settings["training"], "lora": lora}
        step = {"method": "robust_merge", "vectors": ["plain"]}
        try:
            plan_recipe(Recipe.model_validate({**recipe_settings, "training": training, "merge": [step]}))
        except PaveError as error:
            return str(error)
        return ""

    assert problems({"rank": 2, "init_lora_weights": "pissa"}) == ""
    assert "they are trained with use_dora, which rescales the updated weights" in problems({"use_dora": True})
