"""Rows of every kind of task, in words that the tokenizer of all families knows, and what a recipe says of it."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

WORDS = tuple(f"w{index}" for index in range(60))
COUNTS = {"train": 8, "validation": 6, "test": 6}


def words(draw: random.Random, least: int = 2, most: int = 6) -> list[str]:
    """Different words."""
    return draw.sample(WORDS, draw.randint(least, most))


def text(draw: random.Random, place: int) -> dict[str, Any]:
    """A text of one of two classes."""
    return {"text": " ".join(words(draw)), "label": place % 2}


def number(draw: random.Random, place: int) -> dict[str, Any]:
    """A text with a number."""
    return {"text": " ".join(words(draw)), "label": place / 8}


def labels(draw: random.Random, place: int) -> dict[str, Any]:
    """A text of which two things hold or do not."""
    return {"text": " ".join(words(draw)), "one": place % 2, "two": place // 2 % 2}


def pair(draw: random.Random, place: int) -> dict[str, Any]:
    """Two texts that are more or less alike."""
    return {"one": " ".join(words(draw)), "other": " ".join(words(draw)), "label": place / 8}


def tags(draw: random.Random, place: int) -> dict[str, Any]:
    """Words, each with a class."""
    found = words(draw)
    return {"words": found, "labels": [(place + index) % 2 for index in range(len(found))]}


def choice(draw: random.Random, place: int) -> dict[str, Any]:
    """A text, and which of three words goes with it."""
    return {"text": " ".join(words(draw)), "choices": words(draw, 3, 3), "label": place % 3}


def question(draw: random.Random, place: int) -> dict[str, Any]:
    """A question, and the part of a text that answers it."""
    found = words(draw, 4, 6)
    answers = {"text": [found[1]], "answer_start": [len(found[0]) + 1]}
    return {"question": found[0], "context": " ".join(found), "answers": answers}


def exchange(draw: random.Random, place: int) -> dict[str, Any]:
    """A prompt and a response."""
    found = words(draw)
    return {"prompt": " ".join(found), "response": found[0]}


def image(draw: random.Random, place: int) -> dict[str, Any]:
    """A noisy image, bright or dark."""
    noise = np.random.default_rng(draw.randrange(1000)).integers(0, 120, (12, 12, 3)) + 120 * (place % 2)
    stream = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(stream, "PNG")
    return {"image": {"bytes": stream.getvalue(), "path": None}, "label": ["dark", "bright"][place % 2]}


WRITING = {"max_new_tokens": 4, "metrics": ["chrf", "exact_match", "perplexity"], "training": {"max_length": 16}}
# Each kind: a row by a draw and its number, and what a recipe says.
KINDS: dict[str, tuple[Callable[[random.Random, int], dict[str, Any]], dict[str, Any]]] = {
    "text_classification": (text, {"text": "text", "classes": 2}),
    "multi_label": (labels, {"text": "text", "labels": ["one", "two"]}),
    "regression": (number, {"text": "text"}),
    "sentence_similarity": (pair, {"text": ["one", "other"]}),
    "token_classification": (tags, {"words": "words", "label": "labels", "classes": 2}),
    "multiple_choice": (choice, {"text": "text", "choices": "choices"}),
    "question_answering": (question, {}),
    "causal_lm": (exchange, WRITING),
    "seq2seq": (exchange, WRITING),
    "image_classification": (image, {"classes": ["dark", "bright"]}),
}


def task(kind: str, name: str, folder: Path) -> dict[str, Any]:
    """A task of a kind as a recipe has it, with its rows in a folder."""
    row, options = KINDS[kind]
    draw = random.Random(f"{kind} {name}")
    data = {}
    for split, count in COUNTS.items():
        rows = [row(draw, place) for place in range(count)]
        if kind == "image_classification":
            path = folder / f"{name}-{split}.parquet"
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path = folder / f"{name}-{split}.jsonl"
            path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        data[split] = str(path)
    return {"name": name, "kind": kind, "data": data, **options}
