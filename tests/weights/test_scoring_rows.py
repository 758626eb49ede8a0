"""Language models whose table of tokens gets more rows: the layer that scores tokens gets them too."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from pave_lightning.weights.embeddings import resize_rows, scoring_layer

LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False)),
    "tied llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(**BART, vocab_size=20, encoder_attention_heads=2, decoder_attention_heads=2)
    ),
}


def logits(model):
    tokens = torch.tensor([[4, 9, 12, 5]])
    with torch.no_grad():
        further = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        return model.eval()(input_ids=tokens, **further).logits


@pytest.mark.parametrize("name", MODELS)
def test_old_rows_score_as_before_and_ties_stay(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    if name == "bart":
        model.final_logits_bias = torch.randn(1, 20)
    before, layer = logits(model), scoring_layer(model)
    was_tied = layer.weight is model.get_input_embeddings().weight
    grown = copy.deepcopy(model)
    resize_rows(grown, 23, scores=True)
    after = logits(grown)
    assert after.shape[-1] == 23
    assert torch.allclose(after[..., :20], before, atol=1e-6)
    assert torch.equal(after[..., 20:], torch.zeros_like(after[..., 20:]))
    assert (scoring_layer(grown).weight is grown.get_input_embeddings().weight) == was_tied
    resize_rows(grown, 20, scores=True)
    assert torch.allclose(logits(grown), before, atol=1e-6)


def test_models_without_a_language_head_have_none():
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    assert scoring_layer(BertModel(config)) is None
    assert scoring_layer(nn.Linear(2, 2)) is None
