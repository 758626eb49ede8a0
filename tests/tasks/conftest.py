"""Fixtures of the task tests: no network, a tokenizer of a few words, tasks over small local files."""

import json
import random
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pave_lightning.tasks.task import Task

WORDS = "a b c d e f g h good bad film".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The variable is read once at import, which another test may have caused earlier.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def make_tokenizer(words=WORDS, **options):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    options = {"pad_token": "[PAD]", "unk_token": "[UNK]", **options}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


@pytest.fixture
def tokenizer():
    return make_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_task(tmp_path):
    """Build a task over json lines files; rows of a split are given, or a valid default."""

    def build(
        train=None, validation=None, test=None, *, text=("text",), data=None, numbers=False, **options: Any
    ) -> Task:
        good = [
            {
                "text": " ".join(["good" if i % 2 else "bad", *["film"] * (i % 7)]),
                "label": float(i) if numbers else i % 2,
            }
            for i in range(23)
        ]
        files = {}
        for split, rows in (("train", train), ("validation", validation), ("test", test)):
            files[split] = str(write_jsonl(tmp_path / f"{split}.jsonl", good if rows is None else rows))
        kind = {"kind": "regression"} if numbers else {"classes": ["negative", "positive"]}
        return Task.model_validate(
            {"name": "toy", "data": {**files, **(data or {})}, "text": list(text), **kind, **options}
        )

    return build


CHAT = (
    "{% for message in messages %}<s> {{ message['role'] }} {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@pytest.fixture(scope="session")
def writing_tokenizer():
    """A tokenizer of the words w0 to w87, of roles, and of four special ones, which writes what it reads."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    words = [*special.values(), *(f"w{index}" for index in range(88)), "system", "user", "assistant"]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **special
    )


def _language_models():
    import transformers

    tokens = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.2}
    llama = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = {"d_model": 16, "dropout": 0.0, "decoder_start_token_id": 0, "is_encoder_decoder": True}
    bart = {f"{part}_{key}": size for part in ("encoder", "decoder") for key, size in BART.items()}
    return {
        "llama": lambda **more: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{**tokens, **llama, "max_position_embeddings": 64, **more})
        ),
        "gpt2": lambda **more: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**{**tokens, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **more})
        ),
        "bloom": lambda **more: transformers.BloomForCausalLM(
            transformers.BloomConfig(**{**tokens, "hidden_size": 16, "n_layer": 2, "n_head": 2, **more})
        ),
        "opt": lambda **more: transformers.OPTForCausalLM(
            transformers.OPTConfig(
                **{k: v for k, v in {**tokens, **llama}.items() if k not in ("initializer_range", "intermediate_size")},
                init_std=0.2,
                ffn_dim=32,
                word_embed_proj_dim=16,
                max_position_embeddings=64,
                **more,
            )
        ),
        "t5": lambda **more: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                **{**tokens, **encoder, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, **more}
            )
        ),
        "bart": lambda **more: transformers.BartForConditionalGeneration(
            transformers.BartConfig(**{**tokens, **encoder, **bart, "max_position_embeddings": 64, **more})
        ),
    }


BART = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}


@pytest.fixture
def language_model():
    """A tiny random language model of a family, in eval mode, whose large weights let it write many words."""

    def build(family, *, seed=0, **config):
        torch.manual_seed(seed)
        model = _language_models()[family](**config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
        return model.eval()

    return build


@pytest.fixture
def language_base(language_model, writing_tokenizer, tmp_path):
    """The folder of a tiny random language model with its tokenizer, and a chat template where it is asked for."""

    def build(family, *, chat=None, name="base", **config):
        folder = tmp_path / name
        language_model(family, **config).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(_saved(writing_tokenizer, tmp_path / "tokenizer"))
        tokenizer.chat_template = chat
        tokenizer.save_pretrained(folder)
        return folder

    return build


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def exchanges():
    """Prompts of some words and responses of the last and the first of them."""

    def draw(count, seed=0, first=0):
        drawn, rows = random.Random(seed), []
        for _ in range(count):
            words = [f"w{first + drawn.randrange(30)}" for _ in range(drawn.randint(1, 6))]
            rows.append({"prompt": " ".join(words), "response": f"{words[-1]} {words[0]}"})
        return rows

    return draw


@pytest.fixture
def chat_template():
    """A template that frames each message by the tokens that begin and end texts."""
    return CHAT
