"""Adapters trained with peft's options: what is written is what was trained, as peft itself reads it."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForSequenceClassification,
    BartConfig,
    BartModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
)

from pave_lightning import write_adapter
from pave_lightning.errors import PaveError
from pave_lightning.experts.adapters import fit_problems, load_adapter
from pave_lightning.experts.fitting import fit_expert, save_expert
from pave_lightning.experts.loading import load_with_new_head
from pave_lightning.experts.new_adapters import add_adapters, refusal
from pave_lightning.tasks.options import Lora
from pave_lightning.tasks.task import Task
from pave_lightning.weights import task_vectors
from pave_lightning.weights.adapter_models import adapter_problems

QUERY = "encoder.layer.0.attention.self.query.weight"
WORDS = "embeddings.word_embeddings.weight"


@pytest.fixture
def make_task(task_files):
    def build(lora, **training):
        return Task.model_validate(
            {
                "name": "words",
                "data": task_files(),
                "text": "text",
                "classes": ["low", "high"],
                "training": {"learning_rate": 1e-2, "batch_size": 16, "max_length": 16, "lora": lora, **training},
                "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
            }
        )

    return build


@pytest.fixture
def fit(tmp_path):
    """Train an expert on a base and write it; gives its folder."""

    def run(task, base):
        work, target = tmp_path / "work", tmp_path / "expert"
        target.mkdir()
        model, _ = fit_expert(task, base, seed=0, work_folder=work, cache_folder=tmp_path / "data")
        save_expert(model, base, target, work_folder=work)
        return target

    return run


def backbone(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).bert.state_dict()


ALL_LINEAR = QUERY, "encoder.layer.1.output.dense.weight"
OPTIONS = [
    ({"use_rslora": True}, ALL_LINEAR, True),
    ({"use_dora": True}, ALL_LINEAR, False),
    ({"rank_pattern": {"query": 3}, "alpha_pattern": {"layer.1.*": 3.0}}, ALL_LINEAR, True),
    ({"layers_to_transform": [0], "target_modules": ["query"]}, (QUERY,), True),
    ({"modules_to_save": ["LayerNorm", "word_embeddings"]}, (QUERY, WORDS, "embeddings.LayerNorm.bias"), True),
    ({"target_modules": ["query", "word_embeddings"]}, (QUERY, WORDS), True),
    ({"target_modules": ["query"], "bias": "all"}, (QUERY, "encoder.layer.1.output.LayerNorm.bias"), True),
    ({"target_modules": ["query"], "bias": "lora_only"}, (QUERY, QUERY.replace("weight", "bias")), True),
    ({"target_modules": ["query"], "lora_bias": True}, (QUERY, QUERY.replace("weight", "bias")), True),
    ({"target_modules": ["query"], "trainable_token_indices": [2, 3, 60]}, (QUERY, WORDS), True),
    ({"init_lora_weights": "gaussian"}, ALL_LINEAR, True),
    ({"init_lora_weights": "orthogonal", "rank": 4}, ALL_LINEAR, True),
    ({"init_lora_weights": "mica"}, ALL_LINEAR, True),
    ({"init_lora_weights": "pissa"}, ALL_LINEAR, True),
    ({"init_lora_weights": "pissa_niter_3"}, ALL_LINEAR, True),
    ({"init_lora_weights": "olora"}, ALL_LINEAR, True),
    ({"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"query": 3}}, ALL_LINEAR, True),
    ({"init_lora_weights": "olora", "alpha_pattern": {"query": 9.0}, "bias": "all"}, ALL_LINEAR, True),
    ({"init_lora_weights": "pissa", "use_dora": True}, ALL_LINEAR, False),
    (
        {"target_modules": [], "target_parameters": ["intermediate.dense.weight"]},
        ("encoder.layer.1.intermediate.dense.weight",),
        False,
    ),
    ({"dropout": 0.3, "exclude_modules": ["pooler.dense"]}, ALL_LINEAR, True),
]


@pytest.mark.parametrize(("options", "moved", "factors"), OPTIONS, ids=[str(sorted(one[0])) for one in OPTIONS])
def test_an_expert_is_its_base_with_the_adapter_that_stands_beside_it(
    base_folder, make_task, fit, options, moved, factors
):
    task = make_task({"rank": 2, "alpha": 4.0, **options})
    folder = fit(task, base_folder)
    start, dense = backbone(base_folder), backbone(folder)
    assert all(not torch.equal(dense[name], start[name]) for name in moved)
    adapter = folder / "adapter"
    assert adapter_problems(adapter) == []
    assert fit_problems(base_folder, adapter, task.head_form) == []
    taken = load_adapter(base_folder, adapter, task).state_dict()
    expert = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    torch.testing.assert_close(taken, expert, rtol=0, atol=1e-6)
    source = task_vectors(str(base_folder), {"a": str(folder)})
    assert (source.without_factors("a") is None) is factors
    for parameter in source.parameters:
        difference = dense[parameter.name] - start[parameter.name]
        torch.testing.assert_close(source.vector("a", parameter), difference, rtol=0, atol=1e-6)


def test_only_what_is_asked_for_moves(base_folder, make_task, fit):
    folder = fit(make_task({"rank": 2, "bias": "all"}, freeze=["embeddings", "encoder.layer.0"]), base_folder)
    start, dense = backbone(base_folder), backbone(folder)
    moved = {name for name in start if not torch.equal(start[name], dense[name])}
    assert not [name for name in moved if name.startswith(("embeddings", "encoder.layer.0"))]
    assert "encoder.layer.1.output.LayerNorm.bias" in moved
    assert "encoder.layer.1.output.LayerNorm.weight" not in moved


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_a_start_out_of_the_base_is_written_as_the_difference_from_it(base_folder, make_task, fit, start):
    task = make_task({"rank": 2, "init_lora_weights": start, "target_modules": ["query"]})
    folder = fit(task, base_folder)
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["init_lora_weights"]) == (4, True)
    model = AutoModelForSequenceClassification.from_pretrained(base_folder)
    merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().state_dict()
    expert = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    torch.testing.assert_close(merged, expert, rtol=0, atol=1e-6)


def test_training_goes_on_with_what_it_started_from(base_folder, make_task, tmp_path):
    """Interrupted after its first epoch, and then from the start again: both give the same adapter."""

    def trained(name, *epochs):
        task = make_task({"rank": 2, "init_lora_weights": "pissa_niter_2", "target_modules": ["query"]})
        work, target = tmp_path / f"{name}-work", tmp_path / name
        for most in epochs:
            longer = task.model_copy(update={"trainer": {**task.trainer, "max_epochs": most}})
            model, _ = fit_expert(longer, base_folder, seed=0, work_folder=work, cache_folder=tmp_path / "data")
        target.mkdir()
        save_expert(model, base_folder, target, work_folder=work)
        return backbone(target), load_file(target / "adapter" / "adapter_model.safetensors")

    dense, adapter = trained("resumed", 1, 2)
    start = backbone(base_folder)[QUERY]
    name = f"base_model.model.bert.{QUERY.removesuffix('.weight')}"
    product = adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"] * (16 / 2)
    torch.testing.assert_close(dense[QUERY] - start, product, rtol=0, atol=1e-6)


def families():
    small = {"vocab_size": 100, "pad_token_id": 0, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    yield "roberta", RobertaModel(RobertaConfig(**small, intermediate_size=48, max_position_embeddings=40))
    yield "albert", AlbertModel(AlbertConfig(**small, intermediate_size=48, embedding_size=16))
    yield "gpt2", GPT2Model(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=40))
    yield (
        "bart",
        BartModel(
            BartConfig(
                vocab_size=100,
                d_model=32,
                encoder_layers=1,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_position_embeddings=40,
                pad_token_id=0,
                eos_token_id=3,
            )
        ),
    )


@pytest.mark.parametrize("options", [{"use_dora": True, "bias": "all"}, {"init_lora_weights": "pissa"}], ids=["a", "b"])
@pytest.mark.parametrize("family", ["roberta", "albert", "gpt2", "bart"])
def test_other_families(family, options, tiny_tokenizer, make_task, fit, tmp_path):
    base, alone = tmp_path / "base", tmp_path / "alone"
    dict(families())[family].save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    task = make_task({"rank": 2, **options})
    folder = fit(task, base)
    shutil.copytree(folder / "adapter", alone)
    taken = load_adapter(base, alone, task).state_dict()
    expert = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    torch.testing.assert_close(taken, expert, rtol=0, atol=1e-6)
    beside, by_itself = (task_vectors(str(base), {"a": str(place)}) for place in (folder, alone))
    others = {parameter.name: parameter for parameter in by_itself.parameters}
    for parameter in beside.parameters:
        found = by_itself.vector("a", others[parameter.name])
        torch.testing.assert_close(found, beside.vector("a", parameter), rtol=0, atol=1e-6)
    fit_of_it = write_adapter(tmp_path / "lora", folder, str(base), rank=32, keep_whole=True)
    assert fit_of_it.error < 1e-6
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    again = PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload()
    for name, value in getattr(again, again.base_model_prefix).state_dict().items():
        torch.testing.assert_close(value, expert[f"{again.base_model_prefix}.{name}"], rtol=0, atol=1e-6)


def test_embeddings_of_a_decoder_are_not_written_whole(tiny_tokenizer, make_task, fit, tmp_path):
    base = tmp_path / "base"
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    LlamaModel(config).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    folder = fit(make_task({"rank": 2, "target_modules": ["q_proj", "embed_tokens"]}), base)
    names = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in names
    assert not [name for name in names if name.endswith("embed_tokens.weight")]
    task = make_task(None)
    taken = load_adapter(base, folder / "adapter", task).state_dict()
    expert = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    torch.testing.assert_close(taken, expert, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"init_lora_weights": "orthogonal", "rank": 3}, "even"),
        ({"target_modules": [], "target_parameters": ["query.weight"], "use_dora": True}, "training.lora: "),
    ],
)
def test_what_peft_refuses_is_told_before_training(base_folder, make_task, options, told):
    task, lora = make_task(None), Lora.model_validate(options)
    asked = base_folder, task.auto_model, "SEQ_CLS", lora, []
    assert told in refusal(*asked)
    with pytest.raises(PaveError, match=r"training\.lora"):
        add_adapters(load_with_new_head(base_folder, task), lora, "SEQ_CLS", frozen=[], private=())


def test_what_peft_takes_is_not_refused(base_folder):
    for options in ({}, {"init_lora_weights": "pissa"}, {"target_modules": ["word_embeddings", "query"]}):
        lora = Lora.model_validate(options)
        assert refusal(base_folder, "AutoModelForSequenceClassification", "SEQ_CLS", lora, []) is None
