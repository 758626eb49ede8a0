"""One recipe with tasks of several kinds, on one backbone of which each has another part."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from pave_lightning import Recipe, Task, load_merged, run_recipe
from pave_lightning.experts.loading import load_with_new_head
from pave_lightning.experts.new_adapters import add_adapters
from pave_lightning.pipeline.planning import check_recipe
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.tasks.options import Lora
from pave_lightning.weights.backbones import backbone_of


def words(drawn, least, most):
    return [f"w{index}" for index in drawn.sample(range(96), drawn.randint(least, most))]


def pair(drawn):
    return {"one": " ".join(words(drawn, 1, 5)), "other": " ".join(words(drawn, 1, 5)), "label": drawn.random()}


def labelled(drawn):
    text = words(drawn, 1, 6)
    return {"text": " ".join(text), "long": int(len(text) > 3), "odd": len(text) % 2}


def choice(drawn):
    found = words(drawn, 3, 3)
    return {"text": f"{found[drawn.randrange(3)]} w1", "choices": found, "label": drawn.randrange(3)}


def question(drawn):
    found = words(drawn, 4, 8)
    context = " ".join(found)
    answers = {"text": [found[1]], "answer_start": [len(found[0]) + 1]}
    return {"question": found[0], "context": context, "answers": answers}


KINDS = {
    "alike": (pair, {"kind": "sentence_similarity", "text": ["one", "other"]}),
    "labels": (labelled, {"kind": "multi_label", "text": "text", "labels": ["long", "odd"]}),
    "choice": (choice, {"kind": "multiple_choice", "text": "text", "choices": "choices"}),
    "answer": (question, {"kind": "question_answering"}),
}


@pytest.mark.slow
def test_a_run_of_all(settings_in, tmp_path, write_rows):
    settings = json.loads(json.dumps(settings_in(tmp_path / "runs")))
    classes = next(task for task in settings["tasks"] if task["name"] == "words")
    tasks = []
    for name, (row, options) in KINDS.items():
        drawn = random.Random(name)
        counts = {"train": 32, "validation": 12, "test": 16}
        data = {
            split: write_rows(f"{name}-{split}", [row(drawn) for _ in range(count)]) for split, count in counts.items()
        }
        tasks.append({"name": name, "data": data, **options})
    recipe = Recipe.model_validate(
        {
            **settings,
            "tasks": [*tasks, classes],
            "trainer": {**settings["trainer"], "max_epochs": 1},
            "merge": [{"method": "task_arithmetic", "scale": 0.3}, {"method": "fisher"}],
            "heads": ["expert", "orthogonal", "probabilities"],
            "capture": {"examples": 32, "source": "random_tokens"},
            "controls": ["joint"],
        }
    )
    check_recipe(recipe, RunFolder(tmp_path / "plan"))
    folder = run_recipe(recipe)
    table = list(csv.DictReader((folder / "results.csv").open()))
    for task in recipe.tasks:
        found = [
            row[f"{task.name}/{task.primary_metric}"] for row in table if row[f"{task.name}/{task.primary_metric}"]
        ]
        assert len(found) == len(table)
        assert np.isfinite([float(value) for value in found]).all()
    states = [load_merged(folder / "merged" / "task_arithmetic-plain", task.name).state_dict() for task in recipe.tasks]
    shared = [{name.removeprefix("bert."): value for name, value in state.items()} for state in states]
    for other in shared[1:]:
        for name in (name for name in shared[0] if name in other and not name.startswith("pooler.")):
            assert torch.equal(shared[0][name], other[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_that_is_there(settings_in, tmp_path, write_rows, name):
    """As peft has saved it, with the head beside it where there is one."""
    settings = json.loads(json.dumps(settings_in(tmp_path / "runs")))
    row, options = KINDS[name]
    drawn = random.Random(name)
    data = {split: write_rows(split, [row(drawn) for _ in range(12)]) for split in ("train", "validation", "test")}
    tasks = []
    for which in ("first", "second"):
        task = Task.model_validate({"name": which, "data": data, **options})
        torch.manual_seed(len(tasks))
        model = load_with_new_head(Path(settings["base"]), task)
        adapted = add_adapters(model, Lora(rank=2), task.peft_type, frozen=[], private=[])
        with torch.no_grad():
            for weight, parameter in adapted.named_parameters():
                if "lora_B" in weight:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / which)
        tasks.append({**task.model_dump(exclude_unset=True), "expert": {"from": str(tmp_path / which)}})
    recipe = Recipe.model_validate({**settings, "tasks": tasks, "merge": [{"method": "average"}], "heads": ["expert"]})
    check_recipe(recipe, RunFolder(tmp_path / "plan"))
    folder = run_recipe(recipe)
    merged, base = (
        load_merged(folder / "merged" / "average-plain", "first"),
        AutoModel.from_pretrained(settings["base"]),
    )
    before, after = base.state_dict(), backbone_of(merged).state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    ends = ("query.weight", "key.weight", "value.weight", "dense.weight")
    assert len([key for key in changed if key.startswith("encoder.")]) == 12
    assert all(key.endswith(ends) for key in changed)
