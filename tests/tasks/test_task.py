"""Kinds of task: how one is chosen, found and registered, and that nothing else knows what a kind knows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pave_lightning import Task
from pave_lightning.tasks.kinds.regression import Regression
from pave_lightning.tasks.kinds.text_classification import TextClassification
from pave_lightning.tasks.task import known_kinds, task_kind

PACKAGE = Path(__file__).parents[2] / "pave_lightning"
OWN = {"name": "own", "data": {}, "text": "body"}


def test_the_kind_decides_the_class():
    assert type(Task(**OWN, classes=2)) is TextClassification
    assert type(Task(**OWN, kind="regression")) is Regression
    assert type(Task.model_validate({**OWN, "kind": "regression"})) is Regression
    assert type(Task.model_validate_json(json.dumps({**OWN, "classes": ["a", "b"]}))) is TextClassification
    task = Task(**OWN, classes=2)
    assert Task.model_validate(task) is task
    assert Task.model_validate_json(task.model_dump_json(by_alias=True)) == task
    with pytest.raises(ValidationError, match="text_classification"):
        Task(**OWN, kind="regresion", classes=2)


def test_keys_of_other_kinds_may_be_left_empty_and_nothing_else():
    assert Task(**OWN, kind="regression", classes=None).output_size == 1
    with pytest.raises(ValidationError, match="classes"):
        Task(**OWN, kind="regression", classes=2)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="two kinds of task are named 'regression'"):

        @task_kind
        class Other(Regression):
            """Another kind of that name."""

    with pytest.raises(ValueError, match="expected a field kind"):

        @task_kind
        class Nameless(Task):
            """A kind without a name."""

    assert known_kinds()["regression"] is Regression


@pytest.mark.parametrize("kind", known_kinds().values(), ids=known_kinds())
def test_every_kind_says_all_that_others_ask(kind):
    assert not kind.__abstractmethods__
    assert kind.__doc__
    assert set(kind.default_metrics) <= set(kind.fitting_metrics)
    for name, field in kind.model_fields.items():
        assert field.description, name


# What a batch holds, and which model reads it, is the kinds' own affair. The callback works without a recipe as well.
KNOWN_BY_KINDS = (
    r"AutoModelFor(Sequence|Token)Classification|AutoModelFor(MultipleChoice|QuestionAnswering)|input_ids|"
    r"SEQ_CLS|TOKEN_CLS|QUESTION_ANS|FEATURE_EXTRACTION"
)
# What serves users without a recipe, and what looks into models of any kind.
ELSEWHERE = {"callbacks/pave_callback.py", "callbacks/padding.py", "weights/fused.py"}


def test_nothing_outside_the_folder_knows_what_a_kind_knows():
    """Comments and docstrings may give examples; code may not."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        place = str(path.relative_to(PACKAGE))
        if place.startswith("tasks/kinds/") or place in ELSEWHERE:
            continue
        code = re.sub(r'"""(.|\n)*?"""', "", path.read_text())
        code = "\n".join(line.partition("  # ")[0] for line in code.splitlines() if not line.strip().startswith("#"))
        if names := re.findall(KNOWN_BY_KINDS, code):
            found[place] = names
    assert found == {}


def test_reading_a_recipe_loads_nothing_heavy():
    code = """
import sys
from pave_lightning.recipe.loading import load_recipe, recipe_schema, recipe_to_yaml
recipe = load_recipe(sys.argv[1])
recipe_to_yaml(recipe)
recipe_schema()
heavy = ["torch", "transformers", "lightning", "datasets", "mlflow", "torchmetrics", "peft"]
print([name for name in heavy if name in sys.modules])
"""
    recipe = PACKAGE.parent / "recipes" / "quickstart.yaml"
    done = subprocess.run([sys.executable, "-c", code, recipe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PLUGIN = '''
from typing import ClassVar, Literal

from pave_lightning.tasks.kinds.regression import Regression
from pave_lightning.tasks.task import task_kind


@task_kind
class Doubled(Regression):
    """A number that counts twice."""

    kind: Literal["doubled"] = "doubled"
    """What is predicted."""
    factor: float = 2.0
    """How often it counts."""

    def output_loss(self, outputs, targets):
        return self.factor * super().output_loss(outputs, targets)
'''


def test_a_kind_from_another_package_is_found_and_a_broken_one_left_out(tmp_path):
    """As installed packages say it, by entry points."""
    (tmp_path / "doubled.py").write_text(PLUGIN)
    (tmp_path / "broken.py").write_text("raise RuntimeError('not today')\n")
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pave_lightning.tasks]\nbroken = broken\ndoubled = doubled\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: demo\nbase: folder\ntasks:\n- {name: own, kind: doubled, data: {train: a.csv}, text: body, factor: 3}\n"
    )
    code = """
import sys
from pave_lightning.recipe.loading import load_recipe, recipe_schema
task = load_recipe(sys.argv[1]).tasks[0]
import torch
print(type(task).__name__, task.factor, float(task.output_loss(torch.zeros(2, 1), torch.ones(2))))
print("Doubled" in recipe_schema()["$defs"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, recipe],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}"},
    )
    assert done.stdout.splitlines() == ["Doubled 3.0 3.0", "True"]
    assert "the kind of task 'broken' of the package other is left out" in done.stderr
    assert "not today" in done.stderr
