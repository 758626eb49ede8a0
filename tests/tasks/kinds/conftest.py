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
