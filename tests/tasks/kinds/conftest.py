"""Rows of a kind of task, and a whole run of it beside text classification, on tiny models."""

import json
import random

import pytest
import torch
from transformers import AutoTokenizer

from pave_lightning import Task
from pave_lightning.tasks.data import check_task


@pytest.fixture
def write_rows(tmp_path):
    """Write rows as a .jsonl file; its path."""

    def write(name, rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def task_of(write_rows):
    """A task over rows that are given, the same for all splits."""

    def build(rows, **options):
        data = dict.fromkeys(("train", "validation", "test"), write_rows("rows", rows))
        return Task.model_validate({"name": "mine", "data": data, **options})

    return build


@pytest.fixture
def problems_of(tmp_path):
    """What is told of a task's rows, as one text."""
    return lambda task: "\n".join(check_task(task, seed=0, cache_dir=tmp_path / "cache"))


@pytest.fixture
def recipe_beside_words(settings_in, tmp_path, write_rows):
    """The recipe of a task of some kind beside text classification, with what few methods and controls tell it by."""

    def build(rows, counts=(64, 16, 24), **task):
        settings = json.loads(json.dumps(settings_in(tmp_path / "runs")))
        words = next(one for one in settings["tasks"] if one["name"] == "words")
        drawn = rows(random.Random(0), sum(counts))
        ends = [sum(counts[: place + 1]) for place in range(3)]
        splits = ("train", "validation", "test")
        parts = {
            split: write_rows(split, drawn[end - count : end])
            for split, end, count in zip(splits, ends, counts, strict=True)
        }
        settings["trainer"]["max_epochs"] = 1
        return {
            **settings,
            "tasks": [words, {"name": "mine", "data": parts, **task}],
            "merge": [{"method": "task_arithmetic", "scale": 0.5}],
            "heads": ["expert", "labels"],
        }

    return build


@pytest.fixture
def recipe_of_experts(recipe_beside_words, tmp_path):
    """The recipe of a task of some kind with an expert that is there, beside one of adapters that are to be trained.

    The models are run while they are merged: block by block, and by training towards what the heads say.
    """

    def build(rows, auto_class, **task):
        settings = recipe_beside_words(rows, **task)
        base, given = settings["base"], tmp_path / "given"
        torch.manual_seed(0)
        model = auto_class.from_pretrained(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(given)
        AutoTokenizer.from_pretrained(base).save_pretrained(given)
        mine = settings["tasks"][1]
        adapted = {**mine, "name": "adapted", "training": {"lora": {"rank": 2}}}
        running = [
            {"method": "featcal", "anchor": "task_arithmetic", "options": {"examples": 16}},
            {"method": "distillation", "anchor": "task_arithmetic", "options": {"examples": 16, "epochs": 1}},
        ]
        return {
            **settings,
            "tasks": [adapted, {**mine, "expert": {"from": str(given)}}],
            "merge": [*settings["merge"], *running],
            "heads": ["expert"],
        }

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
