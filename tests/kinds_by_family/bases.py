"""Tiny random models of several families, with what makes their inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from kinds_by_family.rows import WORDS

SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
STANDARD = {**TOKENS, **SIZES, "max_position_embeddings": 48}
SPANS = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 16, "type_vocab_size": 0}
T5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    f"{part}_{key}": size
    for part in ("encoder", "decoder")
    for key, size in {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items()
}
IMAGES = {**SIZES, "image_size": 16, "patch_size": 4}
LEVELS = {"hidden_sizes": [8, 16], "depths": [1, 1]}
CLIP_TEXT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 16}

# Class of the base, and what makes its configuration. Heads come from the kinds.
FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "BERT": ("BertModel", lambda: hf.BertConfig(**STANDARD)),
    "RoBERTa": ("RobertaModel", lambda: hf.RobertaConfig(**STANDARD)),
    "ModernBERT": (
        "ModernBertModel",
        lambda: hf.ModernBertConfig(**STANDARD, cls_token_id=2, sep_token_id=3, global_attn_every_n_layers=2),
    ),
    "DeBERTa-v3": ("DebertaV2Model", lambda: hf.DebertaV2Config(**{**STANDARD, **SPANS})),
    "GPT-2": (
        "GPT2LMHeadModel",
        lambda: hf.GPT2Config(**TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=48),
    ),
    "Llama": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**STANDARD)),
    "Qwen3": (
        "Qwen3ForCausalLM",
        lambda: hf.Qwen3Config(**STANDARD, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    ),
    "T5": ("T5ForConditionalGeneration", lambda: hf.T5Config(**TOKENS, **T5)),
    "BART": (
        "BartForConditionalGeneration",
        lambda: hf.BartConfig(**TOKENS, **BART, d_model=16, max_position_embeddings=48, decoder_start_token_id=3),
    ),
    "ViT": ("ViTModel", lambda: hf.ViTConfig(**IMAGES)),
    "Swin": (
        "SwinModel",
        lambda: hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2),
    ),
    "DINOv2": ("Dinov2Model", lambda: hf.Dinov2Config(**IMAGES)),
    "ConvNeXt": ("ConvNextModel", lambda: hf.ConvNextConfig(num_stages=2, patch_size=2, **LEVELS)),
    "ResNet": ("ResNetModel", lambda: hf.ResNetConfig(embedding_size=8, layer_type="basic", **LEVELS)),
    "CLIP": ("CLIPModel", lambda: hf.CLIPConfig(text_config=CLIP_TEXT, vision_config=IMAGES, projection_dim=8)),
}


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """One for all families, which frames texts as BERT and BART do and ends them as T5 does."""
    names = [*SPECIAL.values(), *WORDS]
    backend = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    inputs = ["input_ids", "attention_mask"]
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=inputs, cls_token="<s>", sep_token="</s>", **SPECIAL
    )


def write_base(family: str, folder: Path) -> Any:
    """Write the folder of a base; its configuration."""
    name, configuration = FAMILIES[family]
    config = configuration()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(hf, name)(config)
    model.save_pretrained(folder)
    if hasattr(config, "vocab_size"):
        tokenizer().save_pretrained(folder)
    else:
        hf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return config
