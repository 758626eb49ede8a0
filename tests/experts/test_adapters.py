"""Adapters of a base: what they must hold, and the model that they give."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    ShiraConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
)

from pave_lightning.errors import PaveError
from pave_lightning.experts.adapters import (
    adds_nothing,
    fit_problems,
    load_adapter,
    load_adapter_alone,
)
from pave_lightning.experts.fitting import save_expert
from pave_lightning.experts.loading import load_expert
from pave_lightning.tasks.task import Task
from pave_lightning.weights.adapter_base import other_base
from pave_lightning.weights.adapter_models import adapter_problems

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
MODERN = {**SMALL, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
INPUTS = {"input_ids": torch.tensor([[2, 7, 9, 3], [2, 50, 60, 3]]), "attention_mask": torch.ones(2, 4).long()}


@pytest.fixture
def task(task_files):
    return Task.model_validate({"name": "words", "data": task_files(), "text": "text", "classes": ["low", "high"]})


@pytest.fixture
def save_base(tiny_tokenizer, tmp_path):
    def save(model, name="base"):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def train(tmp_path):
    """As a user of peft would: noise on all that is trained, saved; gives the folder and the trained model's logits."""

    def run(base, config, name="adapter", edit=None, **labels):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = AutoModelForSequenceClassification.from_pretrained(base, **(labels or {"num_labels": 2}))
            adapted = get_peft_model(model, config).eval()
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.05 * torch.randn_like(parameter))
                logits = adapted(**INPUTS).logits
        if edit is not None:
            edit(adapted)
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name, logits

    return run


def lora(**options):
    return LoraConfig(task_type=TaskType.SEQ_CLS, r=2, **options)


def change(folder, edit):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def note(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


HALF = [
    (ModernBertModel, ModernBertConfig(**MODERN), "Wqkv", ["head.dense.weight", "head.norm.weight"]),
    (
        DebertaV2Model,
        DebertaV2Config(**SMALL, pooler_hidden_size=32),
        "query_proj",
        ["pooler.dense.weight", "pooler.dense.bias"],
    ),
]


@pytest.mark.parametrize(("kind", "config", "target", "lacking"), HALF, ids=["modernbert", "deberta"])
def test_what_would_be_drawn_at_random_is_told(save_base, train, task, kind, config, target, lacking):
    base = save_base(kind(config))
    folder, _ = train(base, lora(target_modules=[target]))
    (problem,) = fit_problems(base, folder, task.head_form)
    assert "drawn at random" in problem
    assert all(name in problem for name in lacking)
    assert "classifier.weight" not in problem
    with pytest.raises(PaveError, match="drawn at random"):
        load_adapter(base, folder, task)
    module = lacking[0].partition(".")[0]
    whole, logits = train(base, lora(target_modules=[target], modules_to_save=[module, "classifier"]), "whole")
    assert fit_problems(base, whole, task.head_form) == []
    with torch.no_grad():
        torch.testing.assert_close(load_adapter(base, whole, task)(**INPUTS).logits, logits, atol=1e-5, rtol=0)


def test_a_part_of_the_head_that_the_base_has_is_read_from_there(save_base, train, task):
    base = save_base(ModernBertForMaskedLM(ModernBertConfig(**MODERN)))
    folder, logits = train(base, lora(target_modules=["Wqkv"]))
    assert fit_problems(base, folder, task.head_form) == []
    with torch.no_grad():
        torch.testing.assert_close(load_adapter(base, folder, task)(**INPUTS).logits, logits, atol=1e-5, rtol=0)


def test_the_last_layer_of_the_base_is_not_that_of_the_adapter(expert_folders, train, task):
    base = expert_folders["first"]
    folder, _ = train(base, LoraConfig(r=2, target_modules=["query"]))
    (problem,) = fit_problems(base, folder, task.head_form)
    assert "holds no head: classifier.weight, classifier.bias" in problem
    with pytest.raises(PaveError, match="holds no head of a BertForSequenceClassification"):
        load_adapter_alone(base, folder, "words")


def test_a_pooler_without_the_head_and_a_head_without_the_pooler(make_base, train, task):
    base = make_base(pooler=False)
    alone, _ = train(base, LoraConfig(r=2, target_modules=["query"], modules_to_save=["pooler"]), "pooler")
    assert "holds no head" in fit_problems(base, alone, task.head_form)[0]
    without, _ = train(base, lora(target_modules=["query"]), "head")
    (problem,) = fit_problems(base, without, task.head_form)
    assert "bert.pooler.dense.weight, bert.pooler.dense.bias" in problem
    assert "modules_to_save: [bert.pooler, classifier]" in problem


OTHERS = [
    lora(target_modules=["query"], use_dora=True),
    lora(target_modules=["query", "word_embeddings"]),
    lora(target_modules=["query"], modules_to_save=["classifier", "word_embeddings"]),
    lora(target_modules=["query"], trainable_token_indices=[5, 7]),
    lora(target_modules=["query"], bias="all"),
    lora(target_modules=["query"], init_lora_weights="pissa"),
    lora(target_modules="all-linear"),
    lora(target_modules=["query"], rank_pattern={"layer.0.*query": 4}, use_rslora=True),
    IA3Config(task_type=TaskType.SEQ_CLS, target_modules=["value"], feedforward_modules=[]),
]


@pytest.mark.parametrize("config", OTHERS, ids=range(len(OTHERS)))
def test_other_adapters_are_what_was_trained(base_folder, train, task, config):
    folder, logits = train(base_folder, config)
    assert adapter_problems(folder) == []
    assert fit_problems(base_folder, folder, task.head_form) == []
    with torch.no_grad():
        torch.testing.assert_close(load_adapter(base_folder, folder, task)(**INPUTS).logits, logits, atol=1e-4, rtol=0)


def test_adapters_that_change_no_weights(base_folder, train, task):
    folder, _ = train(base_folder, PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=4))
    (problem,) = adapter_problems(folder)
    assert "is of kind PROMPT_TUNING" in problem
    with pytest.raises(PaveError, match="nothing to merge"):
        load_adapter(base_folder, folder, task)


def pruned(adapted):
    """Let AdaLoRA have pruned two of four directions of one layer and one of the others."""
    names = [name for name, _ in adapted.base_model.model.named_parameters() if "lora_E" in name]
    masks = {name: [True, False, True, place > 0] for place, name in enumerate(names)}
    adapted.peft_config["default"].rank_pattern = masks


@pytest.mark.parametrize(
    ("config", "edit"),
    [
        (AdaLoraConfig(init_r=4, target_r=2, total_step=9, tinit=1, tfinal=1), pruned),
        (VeraConfig(r=4, save_projection=False), None),
        (VeraConfig(r=4), None),
        (LoHaConfig(), None),
        (OFTConfig(r=0, oft_block_size=4), None),
    ],
    ids=["adalora", "vera without projections", "vera", "loha", "oft"],
)
def test_recipes_take_other_kinds_in(base_folder, train, task, config, edit):
    config.task_type, config.target_modules = TaskType.SEQ_CLS, {"query", "value"}
    folder, logits = train(base_folder, config, edit=edit)
    assert adapter_problems(folder) == []
    assert fit_problems(base_folder, folder, task.head_form) == []
    assert not adds_nothing(base_folder, folder, task.auto_model)
    with torch.no_grad():
        found = load_adapter(base_folder, folder, task)(**INPUTS).logits
    assert edit is not None or torch.allclose(found, logits, atol=1e-5, rtol=0)


def test_kinds_that_peft_cannot_merge(base_folder, train, task):
    folder, _ = train(base_folder, LilyConfig(task_type=TaskType.SEQ_CLS, target_modules=["query"]))
    (problem,) = fit_problems(base_folder, folder, task.head_form)
    assert "peft cannot merge adapters of kind LILY into weights" in problem


def test_kinds_that_need_the_values_of_the_base(base_folder, train, task):
    folder, _ = train(base_folder, ShiraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query"]))
    (problem,) = fit_problems(base_folder, folder, task.head_form)
    assert "adapters of kind SHIRA are shaped by the base's values; merge it with peft first" in problem


def test_a_head_that_peft_leaves_in_its_wrapper_is_taken_out_of_it(base_folder, train, task, tmp_path):
    folder, logits = train(base_folder, LNTuningConfig(task_type=TaskType.SEQ_CLS, target_modules=["LayerNorm"]))
    save_expert(load_adapter(base_folder, folder, task), base_folder, tmp_path)
    with torch.no_grad():
        found = load_expert(tmp_path, task, base_folder)(**INPUTS).logits
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"layer_replication": [[0, 1], [0, 2]]}, "layers of the base are repeated"),
        ({"alora_invocation_tokens": [5]}, "it works on some tokens only"),
    ],
)
def test_adapters_that_weights_cannot_hold(settings, told, base_folder, train, task):
    folder, _ = train(base_folder, lora(target_modules=["query"]))
    note(folder, **settings)
    (problem,) = adapter_problems(folder)
    assert told in problem
    with pytest.raises(PaveError, match="so it cannot be merged"):
        load_adapter(base_folder, folder, task)


def test_shapes_and_names_are_asked_before_anything_is_read(base_folder, make_base, train, task):
    folder, _ = train(make_base(hidden_size=48), lora(target_modules=["query"]))
    (*told, more) = fit_problems(base_folder, folder, task.head_form)
    assert any("is [2, 48] in the adapter, but [2, 32] in this base" in problem for problem in told)
    assert "more like these" in more

    other, _ = train(base_folder, lora(target_modules=["query"]), "other")
    assert fit_problems(base_folder, other, replace(task.head_form, config={"num_labels": 3})) != []
    note(other, target_modules=["queri"])
    assert "does not fit the base" in fit_problems(base_folder, other, task.head_form)[0]
    note(other, target_modules=["query"])
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight"
    change(other, lambda tensors: tensors.update({name.replace("layer.0", "layer.7"): tensors[name].clone()}))
    assert "layer.7" in fit_problems(base_folder, other, task.head_form)[0]
    change(other, lambda tensors: [tensors.pop(name), tensors.pop(name.replace("layer.0", "layer.7"))])
    (problem,) = fit_problems(base_folder, other, task.head_form)
    assert "bert.encoder.layer.0.attention.self.query.lora_B.weight" in problem
    with pytest.raises(PaveError, match=r"query\.lora_B\.weight"):
        load_adapter(base_folder, other, task)


def test_adapters_of_the_head_alone_add_nothing(base_folder, train, task):
    folder, _ = train(base_folder, LoraConfig(r=2, target_modules=["classifier"]))
    assert adds_nothing(base_folder, folder, task.auto_model)
    other, _ = train(base_folder, lora(target_modules=["query"]), "other")
    assert not adds_nothing(base_folder, other, task.auto_model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_values_that_are_no_float32_numbers(base_folder, train, task, value):
    folder, _ = train(base_folder, lora(target_modules=["query"]))
    name = "base_model.model.classifier.weight"
    change(folder, lambda tensors: tensors.update({name: torch.full((2, 32), value, dtype=torch.float64)}))
    (problem,) = adapter_problems(folder)
    assert name in problem
    with pytest.raises(PaveError, match="NaN, infinity, or values too large"):
        load_adapter(base_folder, folder, task)


def test_the_base_that_was_trained_on(base_folder, make_base, train, tmp_path, monkeypatch):
    folder, _ = train(base_folder, lora(target_modules=["query"]))
    reference = str(base_folder)
    assert other_base(folder, reference, base_folder) is None
    copy = tmp_path / "copy"
    shutil.copytree(base_folder, copy)
    assert other_base(folder, str(copy), copy) is None
    foreign = make_base(seed=9)
    assert "weights are not those" in other_base(folder, str(foreign), foreign)

    note(folder, base_model_name_or_path=None)
    assert other_base(folder, reference, base_folder) is None
    for noted, known in (
        (f"/elsewhere/{base_folder.name}", True),
        ("/elsewhere/another", False),
        ("someone/else", False),
        (f"someone/{base_folder.name}", True),
    ):
        note(folder, base_model_name_or_path=noted)
        assert (other_base(folder, reference, base_folder) is None) is known, noted


@pytest.mark.parametrize(
    ("noted", "revision", "reference", "known"),
    [
        ("FacebookAI/roberta-base", None, "FacebookAI/roberta-base", True),
        ("roberta-base", "main", "FacebookAI/roberta-base", True),
        ("someone/roberta-base", None, "FacebookAI/roberta-base", False),
        ("/home/a/models--FacebookAI--roberta-base/snapshots/abc1", None, "FacebookAI/roberta-base", False),
        ("/home/a/models--FacebookAI--roberta-base/snapshots/abc1/", None, "hub", True),
        ("FacebookAI/roberta-base", "v2", "FacebookAI/roberta-base", False),
        ("FacebookAI/roberta-base", "abc1", "hub", True),
    ],
)
def test_bases_of_the_hub_by_name(base_folder, tmp_path, noted, revision, reference, known):
    base = tmp_path / "base"
    if reference == "hub":
        base = tmp_path / "models--FacebookAI--roberta-base" / "snapshots" / "abc123"
        noted = noted.replace("abc1/", "abc123/")
    shutil.copytree(base_folder, base)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    note(adapter, base_model_name_or_path=noted, revision=revision)
    name = "FacebookAI/roberta-base" if reference == "hub" else reference
    assert (other_base(adapter, name, base) is None) is known
