"""Merged weights as one adapter: what peft loads of it, against singular value decompositions by numpy."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from pave_lightning import write_adapter
from pave_lightning.errors import PaveError
from pave_lightning.merging.folders import HEAD_FILE, load_merged, write_merged
from pave_lightning.merging.methods.emr import Emr
from pave_lightning.merging.methods.task_arithmetic import TaskArithmetic

QUERY = "encoder.layer.0.attention.self.query"
INPUTS = {"input_ids": torch.tensor([[2, 5, 40, 99, 3]]), "attention_mask": torch.ones(1, 5).long()}


@pytest.fixture
def merged(tmp_path, context_of, base_folder, expert_folders):
    def build(method=None, scale=0.4):
        source, context = context_of(base_folder, expert_folders)
        folder = tmp_path / "merged"
        folder.mkdir()
        write_merged(folder, method or TaskArithmetic(), source, scale, context)
        return folder

    return build


def loaded(base, adapter, kind=AutoModel, **changes):
    """What peft makes of an adapter, merged into the base: float32 state."""
    model = kind.from_pretrained(base, **changes)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def truncated(matrix, rank):
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank], np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())


def test_each_layer_is_cut_to_its_leading_directions(base_folder, merged, tmp_path):
    fit = write_adapter(tmp_path / "lora", merged(), rank=3)
    base, target = (load_file(folder / "model.safetensors") for folder in (base_folder, tmp_path / "merged"))
    found = loaded(base_folder, tmp_path / "lora")
    assert set(fit.layers) == {n.removesuffix(".weight") for n, v in base.items() if v.ndim == 2 and "embed" not in n}
    for layer, error in fit.layers.items():
        name = f"{layer}.weight"
        expected, missing = truncated(target[name] - base[name], 3)
        np.testing.assert_allclose((found[name] - base[name]).double().numpy(), expected, atol=2e-6)
        assert error == pytest.approx(missing, rel=1e-4)
    for name in fit.left_out:
        assert torch.equal(found[name], base[name])
        assert not torch.equal(found[name], target[name])
    assert {"embeddings.word_embeddings.weight", f"{QUERY}.bias", "embeddings.LayerNorm.weight"} <= set(fit.left_out)
    whole = sum(float((target[name] - base[name]).double().square().sum()) for name in base)
    lost = sum(float((target[name] - found[name]).double().square().sum()) for name in base)
    assert fit.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["r"], settings["lora_alpha"]) == (str(base_folder), 3, 3)


def test_all_directions_and_all_else_are_the_merged_model(base_folder, merged, tmp_path):
    fit = write_adapter(tmp_path / "lora", merged(), rank=64, keep_whole=True)
    found, target = loaded(base_folder, tmp_path / "lora"), load_file(tmp_path / "merged" / "model.safetensors")
    assert fit.error < 1e-6
    assert fit.left_out == {}
    for name, value in target.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [None, Emr()])
def test_a_task_has_its_head_in_the_adapter(base_folder, merged, tmp_path, method):
    folder = merged(method, None if method else 0.4)
    write_adapter(tmp_path / "lora", folder, rank=64, task="second", keep_whole=True)
    model = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=3)
    model = PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    with torch.no_grad():
        expected = load_merged(folder, "second")(**INPUTS).logits
        torch.testing.assert_close(model(**INPUTS).logits, expected, rtol=0, atol=1e-5)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert f'AutoModelForSequenceClassification.from_pretrained("{base_folder}", num_labels=3)' in card


def families(folder):
    torch.manual_seed(0)
    gpt = GPT2Model(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=50))
    vit = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    llama = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 12, "vocab_size": 50}
    return {
        "gpt2": gpt,
        "vit": ViTModel(ViTConfig(hidden_size=16, **vit)),
        "llama": LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, **llama)),
    }[folder]


@pytest.mark.parametrize("family", ["gpt2", "vit", "llama"])
@pytest.mark.parametrize("keep_whole", [False, True])
def test_other_families(family, keep_whole, tmp_path):
    model = families(family)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    fit = write_adapter(tmp_path / "lora", tmp_path / "tuned", str(tmp_path / "base"), rank=32, keep_whole=keep_whole)
    found, target = loaded(tmp_path / "base", tmp_path / "lora", type(model)), model.state_dict()
    no_module = ("cls_token", "position_embeddings")
    for name in target:
        if name.removesuffix(".weight") in fit.layers or (keep_whole and not any(one in name for one in no_module)):
            torch.testing.assert_close(found[name], target[name], rtol=0, atol=2e-6)
    assert ("lm_head" in fit.layers) is (family == "llama")
    assert len(fit.layers) >= 8


def test_updates_of_low_rank_are_exact_at_their_rank(base_folder, tmp_path):
    base = AutoModel.from_pretrained(base_folder).state_dict()
    merged = dict(base)
    torch.manual_seed(1)
    merged[f"{QUERY}.weight"] = base[f"{QUERY}.weight"] + torch.randn(32, 2) @ torch.randn(2, 32)
    fit = write_adapter(tmp_path / "lora", merged, str(base_folder), rank=8)
    assert fit.layers == {QUERY: pytest.approx(0, abs=1e-6)}
    assert fit.left_out == {}
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == {QUERY: 2}
    found = loaded(base_folder, tmp_path / "lora")
    torch.testing.assert_close(found[f"{QUERY}.weight"], merged[f"{QUERY}.weight"], rtol=0, atol=2e-5)
    assert torch.equal(found[f"{QUERY.replace('0', '1')}.weight"], base[f"{QUERY.replace('0', '1')}.weight"])


def test_what_cannot_be_written_is_told_and_nothing_is_left(base_folder, merged, make_base, expert_folders, tmp_path):
    folder, target = merged(), tmp_path / "lora"

    def refused(message, *arguments, **options):
        with pytest.raises(PaveError, match=message):
            write_adapter(target, *arguments, **{"rank": 2, **options})
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("lora")]

    refused("rank must be at least 1", folder, rank=0)
    refused("did you mean 'second'", folder, task="secnd")
    refused("name the base", str(expert_folders["first"]))
    refused("only folders of merged models hold heads", expert_folders["first"], str(base_folder), task="first")
    refused(r"\[32\], but \[48\] in the base", folder, str(make_base(hidden_size=48)))
    refused("nothing to write", base_folder, str(base_folder))
    refused("none of the names", {"x": torch.ones(1)}, str(base_folder))
    only_bias = {f"{QUERY}.bias": torch.ones(32)}
    refused("no layer that can have factors", only_bias, str(base_folder))
    target.mkdir()
    with pytest.raises(PaveError, match="exists already"):
        write_adapter(target, folder, rank=2)


def test_weights_of_one_task_each_need_a_task(merged, tmp_path):
    with pytest.raises(PaveError, match="name one of first, second, third"):
        write_adapter(tmp_path / "lora", merged(Emr(), None), rank=2)


def test_a_head_that_the_model_has_no_place_for(merged, tmp_path):
    folder = merged()
    file = folder / "heads" / "first" / HEAD_FILE
    from safetensors.torch import save_file

    save_file({**load_file(file), "classifier.extra": torch.ones(1)}, file)
    with pytest.raises(PaveError, match=r"classifier\.extra, for which a BertForSequenceClassification has no place"):
        write_adapter(tmp_path / "lora", folder, rank=2, task="first")


def test_what_is_lost_is_told_in_words(merged, tmp_path):
    fit = write_adapter(tmp_path / "lora", merged(), rank=2)
    lines = list(fit.lines())
    assert lines[0] == f"relative error of the whole update: {fit.error:.2%} (Frobenius norm)"
    assert "embeddings.word_embeddings.weight" in lines[2]
    card = (tmp_path / "lora" / "README.md").read_text()
    assert all(line in card for line in lines)
