"""Capture of a model that peft has wrapped: the statistics of the merged one, and nothing changed afterwards."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertModel

from pave_lightning.callbacks import PaveCallback

CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["query", "dense"], lora_dropout=0.5),
    "dora": LoraConfig(r=2, target_modules=["query", "value"], use_dora=True),
    "whole": LoraConfig(r=2, target_modules=["query"], modules_to_save=["intermediate.dense", "LayerNorm"], bias="all"),
    "outer": LoraConfig(r=2, target_modules=["query"], modules_to_save=["layer.1.output"]),
    "embeddings": LoraConfig(r=2, target_modules=["query", "word_embeddings"]),
    "tokens": LoraConfig(r=2, target_modules=["key"], trainable_token_indices={"word_embeddings": [5, 7]}),
    "pissa": LoraConfig(r=2, target_modules=["query", "key", "value"], init_lora_weights="pissa"),
    "ia3": IA3Config(target_modules=["value", "output.dense"], feedforward_modules=["output.dense"]),
    "parameters": LoraConfig(r=2, target_modules=["query"], target_parameters=["intermediate.dense.weight"]),
    "norms": LNTuningConfig(target_modules=["LayerNorm"]),
}


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50)
    )


def read(net: Any, batch: dict[str, Tensor]) -> object:
    return net(**batch)


@pytest.mark.parametrize("moments", ["smallest", "input"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_statistics_are_those_of_the_merged_model(
    kind: str, moments: Any, running: Any, validate: Callable[..., None]
) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [
        {
            "input_ids": torch.randint(50, (4, 6), generator=generator),
            "attention_mask": torch.ones(4, 6, dtype=torch.int64).index_fill(1, torch.tensor([5]), batch % 2),
        }
        for batch in range(3)
    ]
    wrapped = get_peft_model(bert(), CONFIGS[kind])
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    before = copy.deepcopy(wrapped.state_dict())
    merged = copy.deepcopy(wrapped).merge_and_unload()
    options = {"moments": moments, "norms": True}
    found = PaveCallback(backbone="net.base_model.model", **options)
    validate(found, running(wrapped, read), batches)
    expected = PaveCallback(backbone="net", **options)
    validate(expected, running(merged, read), batches)
    plain = PaveCallback(backbone="net", **options)
    validate(plain, running(bert(), read), batches)

    assert list(found.statistics) == list(plain.statistics) == list(expected.statistics)
    assert found.unreached == plain.unreached
    assert list(found.statistics.norms) == list(plain.statistics.norms)
    for name in plain.statistics:
        own, other = found.statistics[name], expected.statistics[name]
        assert (own.rows, own.seen) == (other.rows, other.seen)
        torch.testing.assert_close(own.matrix, other.matrix, rtol=1e-4, atol=1e-5)
    for name, norm in expected.statistics.norms.items():
        torch.testing.assert_close(found.statistics.norms[name].squares, norm.squares, rtol=1e-4, atol=1e-6)
    after = wrapped.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(getattr(module, "merged", False) is True for module in wrapped.modules())


def test_adapters_are_taken_out_again_when_a_pass_fails(running: Any, validate: Callable[..., None]) -> None:
    wrapped = get_peft_model(bert(), CONFIGS["lora"])
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    before = copy.deepcopy(wrapped.state_dict())

    def broken(net: Any, batch: Any) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        validate(PaveCallback(backbone="net"), running(wrapped, broken), [{"input_ids": torch.zeros(1, 2).long()}])
    assert all(torch.equal(wrapped.state_dict()[name], value) for name, value in before.items())
