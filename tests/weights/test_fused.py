"""Which outputs of a fused projection are whose, against layouts written by hand and what attention is given."""

import pytest
import torch
import transformers as hf
from torch import nn

from pave_lightning.weights.fused import fused_parts
from pave_lightning.weights.matrices import Outputs

TINY = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
OLD = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 12}
BLOCKS = {"query": Outputs(0, 16), "key": Outputs(16, 16), "value": Outputs(32, 16)}
BY_HEAD = {name: Outputs(4 * place, 4, 12, 4) for place, name in enumerate(("query", "key", "value"))}
MULTI_QUERY = {"query": Outputs(0, 16), "key": Outputs(16, 4), "value": Outputs(20, 4)}
GROUPED = {"query": Outputs(0, 16), "key": Outputs(16, 8), "value": Outputs(24, 8)}
BY_GROUP = {"query": Outputs(0, 8, 16, 2), "key": Outputs(8, 4, 16, 2), "value": Outputs(12, 4, 16, 2)}
HALVES = {"first": Outputs(0, 24), "second": Outputs(24, 24)}
FALCON = {key: TINY[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}

CASES = {
    "gpt2": (hf.GPT2Config(**OLD), "transformer.h.1.attn.c_attn", BLOCKS),
    "gpt2 with a padding token": (hf.GPT2Config(**OLD, pad_token_id=0), "transformer.h.0.attn.c_attn", BLOCKS),
    "gpt_neox": (hf.GPTNeoXConfig(**TINY), "gpt_neox.layers.0.attention.query_key_value", BY_HEAD),
    "bloom": (
        hf.BloomConfig(vocab_size=20, hidden_size=16, n_layer=2, n_head=4),
        "transformer.h.0.self_attention.query_key_value",
        BY_HEAD,
    ),
    "phi3": (
        hf.Phi3Config(**TINY, num_key_value_heads=2, pad_token_id=0), "model.layers.0.self_attn.qkv_proj", GROUPED,
    ),
    "phi3, gate and up": (
        hf.Phi3Config(**TINY, num_key_value_heads=2, pad_token_id=0), "model.layers.1.mlp.gate_up_proj", HALVES,
    ),
    "falcon": (hf.FalconConfig(**FALCON), "transformer.h.0.self_attention.query_key_value", MULTI_QUERY),
    "falcon, all heads": (
        hf.FalconConfig(**FALCON, multi_query=False), "transformer.h.0.self_attention.query_key_value", BY_HEAD,
    ),
    "falcon, grouped": (
        hf.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True),
        "transformer.h.0.self_attention.query_key_value",
        BY_GROUP,
    ),
    "bigcode": (hf.GPTBigCodeConfig(**OLD), "transformer.h.0.attn.c_attn", MULTI_QUERY),
    "mpt": (
        hf.MptConfig(vocab_size=20, d_model=16, n_layers=2, n_heads=4), "transformer.blocks.0.attn.Wqkv", BLOCKS,
    ),
}  # fmt: skip


def on_meta(config):
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", CASES)
def test_the_layout_is_that_of_the_model(name):
    config, layer, expected = CASES[name]
    parts = fused_parts(on_meta(config))[f"{layer}.weight"]
    assert {part.name: part.outputs for part in parts} == expected


def test_parts_reach_attention_as_query_key_and_value(monkeypatch):
    """What the parts of the layer's output give is what the model hands to attention, apart from rotations."""
    config, layer, _ = CASES["falcon, grouped"]
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    parts = {part.name: part.outputs.index for part in fused_parts(on_meta(config))[f"{layer}.weight"]}
    given, outputs = [], []
    original = nn.functional.scaled_dot_product_attention

    def noted(query, key, value, **others):
        given.append(value)
        return original(query, key, value, **others)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    model.get_submodule(layer).register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    value = outputs[0][0][:, parts["value"]].reshape(3, 2, 4)  # tokens, groups, width
    torch.testing.assert_close(given[0][0].transpose(0, 1)[:, ::2], value)


@pytest.mark.parametrize(
    "config",
    [hf.LlamaConfig(**TINY), hf.OPTConfig(**FALCON, word_embed_proj_dim=16, ffn_dim=24), hf.GPTJConfig(**OLD)],
    ids=["llama", "opt", "gptj"],
)
def test_layers_of_one_projection_have_no_parts(config):
    assert fused_parts(on_meta(config)) == {}


def test_a_model_that_mixes_the_parts_is_left_whole():
    class Mixing(nn.Module):
        main_input_name, config = "input_ids", hf.GPT2Config(**OLD)

        def __init__(self):
            super().__init__()
            self.words, self.c_attn, self.c_proj = nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, input_ids):
            outputs = self.c_attn(self.words(input_ids))
            return self.c_proj(outputs[..., 8:24] * outputs[..., :16])

    with torch.device("meta"):
        assert fused_parts(Mixing()) == {}


def test_mixtures_say_how_gate_and_up_lie():
    grouped = {**TINY, "num_key_value_heads": 2}
    oss = fused_parts(on_meta(hf.GptOssConfig(**grouped, head_dim=4, num_local_experts=4, num_experts_per_tok=2)))
    gate, up = oss["model.layers.0.mlp.experts.gate_up_proj"]
    assert (gate.outputs, up.outputs) == (Outputs(0, 1, 2, 24), Outputs(1, 1, 2, 24))
    mixtral = fused_parts(on_meta(hf.MixtralConfig(**grouped, num_local_experts=4)))
    gate, up = mixtral["model.layers.0.mlp.experts.gate_up_proj"]
    assert (gate.outputs, up.outputs) == (Outputs(0, 24), Outputs(24, 24))
