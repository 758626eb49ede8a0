"""Fixtures of the task tests: no network, a tokenizer of a few words, tasks over small local files."""

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

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
