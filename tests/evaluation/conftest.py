"""Three tiny tasks with data on disk: two and three classes and regression, one of them with text pairs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from pave_lightning.tasks.data_module import TaskDataModule
from pave_lightning.tasks.task import Task
from pave_lightning.weights import Architecture, Checkpoint, ExpertTaskVectors

ROWS = {"train": 4, "validation": 21, "test": 26}
LABELS = {"first": 2, "second": 3, "third": 1}


def rows_of(task, split):
    """Rows of different lengths with random words and labels."""
    random = np.random.default_rng([sorted(LABELS).index(task), sorted(ROWS).index(split)])
    rows = []
    for _ in range(ROWS[split] - 5 * (task == "second")):
        text, other = (" ".join(f"w{i}" for i in random.integers(0, 96, random.integers(1, 9))) for _ in range(2))
        label = float(random.normal()) if task == "third" else int(random.integers(LABELS[task]))
        rows.append({"text": text, "other": other, "label": label})
    return rows


@dataclass
class Suite:
    """Tasks, their rows by task and split, and folders of a base and of experts that are far from it and each other."""

    tasks: list[Task]
    rows: dict[tuple[str, str], list[dict[str, Any]]]
    base: Path
    experts: dict[str, Path]
    tokenizer: PreTrainedTokenizerBase
    cache: Path

    def data(self, task, **options):
        options = {"seed": 0, "cache_dir": self.cache, "batch_size": 4} | options
        return TaskDataModule(task, self.tokenizer, **options)

    def checkpoint(self):
        return Checkpoint(self.base, "bert")

    def checkpoints(self):
        return {task: Checkpoint(folder, "bert") for task, folder in self.experts.items()}

    def vectors(self):
        return ExpertTaskVectors(self.checkpoint(), self.checkpoints(), Architecture.of_folder(self.experts["first"]))


@pytest.fixture(scope="session")
def make_suite(tmp_path_factory, tiny_tokenizer, make_base, make_expert):
    """Build a suite over a base with or without pooler."""
    folder = tmp_path_factory.mktemp("suite")
    rows = {(task, split): rows_of(task, split) for task in LABELS for split in ROWS}
    for (task, split), found in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{task}-{split}.jsonl").write_text(text)
    kinds = {
        "first": {"classes": 2, "metrics": ["accuracy", "f1"]},
        "second": {"classes": 3, "metrics": ["macro_f1", "accuracy"], "text": ["text", "other"]},
        "third": {"kind": "regression"},
    }
    tasks = [
        Task.model_validate(
            {"name": name, "data": {split: str(folder / f"{name}-{split}.jsonl") for split in ROWS}, "text": "text"}
            | kind
        )
        for name, kind in kinds.items()
    ]

    def build(**options):
        # Weights as large as these let different texts have different answers.
        base = make_base(initializer_range=0.4, **options)
        experts = {
            task.name: make_expert(base, seed=seed, num_labels=task.output_size, size=0.2)
            for seed, task in enumerate(tasks, start=5)
        }
        return Suite(tasks, rows, base, experts, tiny_tokenizer, folder / "cache")

    return build


@pytest.fixture(scope="session")
def suite(make_suite):
    return make_suite()
