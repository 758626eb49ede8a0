"""Language models of transformers: classifiers, and models that score each token, which are merged whole."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from families.mixtures import Mixture, clamped_swish, gated_swish
from families.pretrained import Pretrained

WORDS, WIDTH, LAYERS, HEADS, INSIDE, PLACES = 60, 16, 2, 4, 32, 40
VOCABULARY = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STANDARD = {
    **VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INSIDE,
    "max_position_embeddings": PLACES,
}
GROUPED = {**STANDARD, "num_key_value_heads": 2}
OLD = {**VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": PLACES}
SPAN = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": WIDTH, "type_vocab_size": 0}
WHOLE: dict[str, Any] = {"heads": (), "sizes": ({}, {})}


def words(seed: int, *, left: bool = False) -> dict[str, Tensor]:
    """Token ids, three texts of them padded on the right, or the left."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.arange(9) < torch.tensor([[9], [5], [7]])
    mask = mask.flip(1) if left else mask
    return {"input_ids": torch.randint(3, WORDS, mask.shape, generator=random) * mask, "attention_mask": mask.long()}


def left_padded(seed: int) -> dict[str, Tensor]:
    """Token ids of three texts, padded on the left."""
    return words(seed, left=True)


def ended(seed: int) -> dict[str, Tensor]:
    """Texts of one length that end with the token by which T5 and BART tell what to classify."""
    ids = torch.randint(3, WORDS, (4, 8), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids.roll(1, 1)}


def paired(seed: int) -> dict[str, Tensor]:
    """Texts for an encoder and for a decoder, of other lengths, both padded."""
    encoder, random = words(seed), torch.Generator().manual_seed(seed + 100)
    mask = torch.arange(6) < torch.tensor([[3], [6], [4]])
    ids = torch.randint(3, WORDS, mask.shape, generator=random) * mask
    return {**encoder, "decoder_input_ids": ids, "decoder_attention_mask": mask.long()}


def thirds(height: int) -> dict[str, range]:
    third = height // 3
    return {"query": range(third), "key": range(third, 2 * third), "value": range(2 * third, height)}


def by_head(height: int) -> dict[str, list[int]]:
    """Query, key and value of one head after the other."""
    size = height // (3 * HEADS)
    return {
        name: [head * 3 * size + place * size + row for head in range(HEADS) for row in range(size)]
        for place, name in enumerate(("query", "key", "value"))
    }


def grouped(groups: int) -> Callable[[int], dict[str, range]]:
    """All queries, then as many keys and values as there are groups."""

    def rows(height: int) -> dict[str, range]:
        size = height // (HEADS + 2 * groups)
        first, second = HEADS * size, (HEADS + groups) * size
        return {"query": range(first), "key": range(first, second), "value": range(second, height)}

    return rows


def halves(height: int) -> dict[str, range]:
    return {"first": range(height // 2), "second": range(height // 2, height)}


def fused(**layouts: Callable[[int], Any]) -> dict[str, dict[str, Callable[[int], Any]]]:
    """For each fused layer which rows its parts are."""
    return {
        layer: {
            part: lambda height, layout=layout, part=part: torch.tensor(list(layout(height)[part]))
            for part in ("query", "key", "value", "first", "second")
            if part in layout(3 * HEADS * 2)
        }
        for layer, layout in layouts.items()
    }


def classifier(name: str, stem: str, config: Callable[[], Any], backbone: str, **more: Any) -> Pretrained:
    """A family of text classifiers."""
    given = more.pop("inputs", words)
    return Pretrained(name, config, f"{stem}Model", f"{stem}ForSequenceClassification", given, backbone, **more)


def causal(name: str, model: str, config: Callable[[], Any], kind: type[Pretrained] = Pretrained, **more: Any) -> Any:
    """A family of models that continue texts."""
    given = more.pop("inputs", left_padded)
    return kind(f"{name}, causal", config, model, model, given, **{**WHOLE, **more})


QKV_BY_HEAD = fused(query_key_value=by_head)
PHI = fused(qkv_proj=grouped(2), gate_up_proj=halves)
DISTIL = {**VOCABULARY, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INSIDE}
OPT = {**VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "ffn_dim": INSIDE, "num_attention_heads": HEADS}
BLOOM = {**VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
T5 = {**VOCABULARY, "d_model": WIDTH, "d_kv": 4, "d_ff": INSIDE, "num_layers": LAYERS, "num_heads": HEADS}
T5 = {**T5, "decoder_start_token_id": 0}
BART_SIDES = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in (
    ("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", INSIDE))}  # fmt: skip
BART = {**VOCABULARY, **BART_SIDES, "d_model": WIDTH, "max_position_embeddings": PLACES, "decoder_start_token_id": 2}
GEMMA = {**GROUPED, "head_dim": 4, "sliding_window": 4}

CLASSIFIERS = [
    classifier("BERT", "Bert", lambda: hf.BertConfig(**STANDARD), "bert"),
    classifier("RoBERTa", "Roberta", lambda: hf.RobertaConfig(**STANDARD), "roberta"),
    classifier("DistilBERT", "DistilBert", lambda: hf.DistilBertConfig(**DISTIL), "distilbert"),
    classifier("ALBERT", "Albert", lambda: hf.AlbertConfig(**STANDARD, embedding_size=8), "albert"),
    classifier("ELECTRA", "Electra", lambda: hf.ElectraConfig(**STANDARD, embedding_size=8), "electra"),
    classifier("MPNet", "MPNet", lambda: hf.MPNetConfig(**STANDARD), "mpnet"),
    classifier("XLM-R", "XLMRoberta", lambda: hf.XLMRobertaConfig(**STANDARD), "roberta"),
    classifier(
        "DeBERTa", "Deberta", lambda: hf.DebertaConfig(**STANDARD, **SPAN), "deberta", parts=fused(in_proj=by_head)
    ),
    classifier(
        "DeBERTa-v3",
        "DebertaV2",
        lambda: hf.DebertaV2Config(
            **STANDARD,
            **SPAN,
            share_att_key=True,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
        ),
        "deberta",
    ),
    classifier(
        "ModernBERT",
        "ModernBert",
        lambda: hf.ModernBertConfig(**STANDARD, global_attn_every_n_layers=2, local_attention=6),
        "model",
        parts=fused(Wqkv=thirds, Wi=halves),
    ),
    classifier("GTE", "Gte", lambda: hf.GteConfig(**STANDARD), "gte", heads=("classifier", "gte.pooler")),
    classifier("GPT-2", "GPT2", lambda: hf.GPT2Config(**OLD), "transformer", parts=fused(c_attn=thirds)),
    classifier("OPT", "OPT", lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=8), "model"),
    classifier("GPT-NeoX", "GPTNeoX", lambda: hf.GPTNeoXConfig(**STANDARD), "gpt_neox", parts=QKV_BY_HEAD),
    classifier("GPT-J", "GPTJ", lambda: hf.GPTJConfig(**OLD, rotary_dim=2), "transformer"),
    classifier("BLOOM", "Bloom", lambda: hf.BloomConfig(**BLOOM), "transformer", parts=QKV_BY_HEAD),
    classifier("Llama", "Llama", lambda: hf.LlamaConfig(**GROUPED), "model", inputs=left_padded),
    classifier("Mistral", "Mistral", lambda: hf.MistralConfig(**GROUPED), "model"),
    classifier("Qwen2", "Qwen2", lambda: hf.Qwen2Config(**GROUPED), "model"),
    classifier("Qwen3", "Qwen3", lambda: hf.Qwen3Config(**GROUPED, head_dim=4), "model"),
    classifier("Gemma 2", "Gemma2", lambda: hf.Gemma2Config(**GEMMA), "model"),
    classifier("Gemma 3", "Gemma3Text", lambda: hf.Gemma3TextConfig(**GEMMA), "model"),
    classifier("Phi-3", "Phi3", lambda: hf.Phi3Config(**GROUPED), "model", parts=PHI),
    classifier("T5", "T5", lambda: hf.T5Config(**T5), "transformer", inputs=ended, heads=()),
    classifier("BART", "Bart", lambda: hf.BartConfig(**BART), "model", inputs=ended, heads=(), sizes=({}, {})),
]

GENERATORS = [
    causal("GPT-2", "GPT2LMHeadModel", lambda: hf.GPT2Config(**OLD), parts=fused(c_attn=thirds)),
    causal("OPT", "OPTForCausalLM", lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=8)),
    causal("GPT-NeoX", "GPTNeoXForCausalLM", lambda: hf.GPTNeoXConfig(**STANDARD), parts=QKV_BY_HEAD),
    causal("BLOOM", "BloomForCausalLM", lambda: hf.BloomConfig(**BLOOM), parts=QKV_BY_HEAD),
    causal(
        "Falcon",
        "FalconForCausalLM",
        lambda: hf.FalconConfig(
            **VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, multi_query=True
        ),
        parts=fused(query_key_value=grouped(1)),
    ),
    causal("Llama", "LlamaForCausalLM", lambda: hf.LlamaConfig(**GROUPED)),
    causal("Llama (tied)", "LlamaForCausalLM", lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    causal("Qwen3", "Qwen3ForCausalLM", lambda: hf.Qwen3Config(**GROUPED, head_dim=4)),
    causal("Gemma 3", "Gemma3ForCausalLM", lambda: hf.Gemma3TextConfig(**GEMMA)),
    causal("Phi-3", "Phi3ForCausalLM", lambda: hf.Phi3Config(**GROUPED), parts=PHI),
    causal("Mamba", "MambaForCausalLM", lambda: hf.MambaConfig(
        **VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=4, intermediate_size=INSIDE,
    ), inputs=words, parts=fused(in_proj=halves)),
    causal(
        "Mixtral",
        "MixtralForCausalLM",
        lambda: hf.MixtralConfig(**GROUPED, num_local_experts=3),
        Mixture,
        inside=gated_swish,
        stored=r"(?P<mixture>.*)\.block_sparse_moe\.experts\.(?P<expert>\d+)\.(?P<part>\w+)",
        modules="{mixture}.mlp.experts",
        projections={"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", None)},
    ),
    causal(
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        lambda: hf.Qwen3MoeConfig(
            **GROUPED, head_dim=4, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8
        ),
        Mixture,
        inside=gated_swish,
        stored=r"(?P<mixture>.*)\.mlp\.experts\.(?P<expert>\d+)\.(?P<part>\w+)",
        modules="{mixture}.mlp.experts",
        projections={
            "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", None),
        },
    ),
    causal(
        "GPT-OSS",
        "GptOssForCausalLM",
        lambda: hf.GptOssConfig(**GROUPED, head_dim=4, num_local_experts=3, num_experts_per_tok=2),
        Mixture,
        inside=clamped_swish,
        stored=r"(?P<mixture>.*)\.mlp\.experts\.(?P<weight>\w+)\.(?P<expert>\d+)\.?(?P<part>\w*)",
        modules="{mixture}.mlp.experts",
        projections={"gate": ("gate_up_proj", 0), "up": ("gate_up_proj", 1), "": ("down_proj", None)},
        transposed=True,
    ),
]  # fmt: skip

PAIRED = [
    Pretrained(
        "T5, sequence to sequence", lambda: hf.T5Config(**T5), "T5ForConditionalGeneration",
        "T5ForConditionalGeneration", paired, **WHOLE,
    ),
    Pretrained(
        "BART, sequence to sequence", lambda: hf.BartConfig(**BART), "BartForConditionalGeneration",
        "BartForConditionalGeneration", paired, **WHOLE,
    ),
]  # fmt: skip

# One of each kind of structure; the others are slow only because they are many.
QUICK = (
    *(
        "BERT",
        "ALBERT",
        "DeBERTa",
        "DeBERTa-v3",
        "ModernBERT",
        "GTE",
        "GPT-2",
        "GPT-NeoX",
        "Llama",
        "Phi-3",
        "T5",
        "BART",
    ),
    *("Falcon, causal", "Llama, causal", "Llama (tied), causal", "Mamba, causal", "Mixtral, causal", "GPT-OSS, causal"),
    "T5, sequence to sequence",
)
FAMILIES = [replace(one, slow=one.name not in QUICK) for one in (*CLASSIFIERS, *GENERATORS, *PAIRED)]
