"""What is predicted of the memory that training and searching take, against what is counted by hand and measured."""

import subprocess
import sys

import pytest

from pave_lightning.pipeline.planning.memory import fit_bytes, search_bytes
from pave_lightning.pipeline.stacks import stacks_of
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.task import Task
from pave_lightning.weights import Parameter, ParameterKind, memory

LINUX = pytest.mark.skipif(not memory.STATUS.is_file(), reason="measures by /proc")
PARAMETERS = [
    Parameter("embeddings.weight", ParameterKind.EMBEDDING, (1000, 20)),
    Parameter("query.weight", ParameterKind.LINEAR, (20, 20), 1),
    Parameter("wide.weight", ParameterKind.LINEAR, (60, 20), 1),
]
TOTAL, TABLE = 20_000 + 400 + 1_200, 20_000


def task(training=None, trainer=None):
    data = dict.fromkeys(("train", "validation", "test"), "rows.csv")
    given = {"batch_size": 4, "max_length": 8, **(training or {})}
    return Task.model_validate(
        {"name": "t", "text": "text", "classes": 2, "data": data, "training": given, "trainer": trainer or {}}
    )


def counted(weights, trained, bytes_kept):
    """Weights and moments, three times over (in use, and twice while a checkpoint is written); gradients; inputs."""
    return 3 * 4 * (weights + 2 * trained) + 4 * trained + 4 * 8 * (20 + 20 + 60 + 20) * bytes_kept


def test_training_by_hand():
    assert fit_bytes(PARAMETERS, task()) == counted(TOTAL, TOTAL, 4)
    assert fit_bytes(PARAMETERS, task(trainer={"precision": "bf16-mixed"})) == counted(TOTAL, TOTAL, 2)
    assert fit_bytes(PARAMETERS, task({"freeze": ["embeddings"]})) == counted(TOTAL, TOTAL - TABLE, 4)


def test_adapters_train_their_factors_alone():
    factors = 3 * ((20 + 20) + (60 + 20))
    assert fit_bytes(PARAMETERS, task({"lora": {"rank": 3}})) == counted(TOTAL + factors, factors, 4)


@pytest.mark.parametrize(
    ("steps", "models"),
    [
        ([{"method": "ties", "scale": 0.3}], 0),
        ([{"method": "ties", "scale": "search"}], 2),
        ([{"method": "ties", "scale": {"search": [0.1, 1]}}, {"method": "average"}], 2),
        ([{"method": "ties", "tune": {"density": [0.1, 0.2]}}], 3),
        ([{"method": "ties", "purify": {"rho": "auto"}}], 3),
        ([{"method": "ties", "purify": {"rho": "auto"}, "vectors": ["plain"]}], 0),
    ],
)
def test_searching_by_hand(steps, models):
    passing = 4 * 3 * 16 * 8 * (60 + 20)
    expected = models * 4 * TOTAL + passing if models else 0
    recipe = Recipe.model_validate({"name": "r", "base": "b", "tasks": [task().model_dump()], "merge": steps})
    assert search_bytes(PARAMETERS, stacks_of(recipe), [task()], 16) == expected


MEASURED = """
import sys, tempfile
from pathlib import Path
from pave_lightning.experts.fitting import fit_expert
from pave_lightning.pipeline.planning.memory import fit_bytes
from pave_lightning.tasks.task import Task
from pave_lightning.weights import Architecture, memory
base, task = Path(sys.argv[1]), Task.model_validate_json(sys.argv[2])
parameters = list(Architecture.of_folder(base).parameters.values())
before = memory.resident_bytes()
with tempfile.TemporaryDirectory() as folder:
    fit_expert(task, base, seed=0, work_folder=Path(folder) / "work", cache_folder=Path(folder) / "cache")
print(memory.highest_resident_bytes() - before, fit_bytes(parameters, task))
"""


@LINUX
@pytest.mark.slow
def test_training_takes_about_what_is_predicted(make_base, task_files):
    base = make_base(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536)
    settings = {"name": "t", "text": "text", "classes": ["low", "high"], "data": task_files()}
    settings |= {"training": {"max_length": 16}, "trainer": {"max_epochs": 1, "accelerator": "cpu"}}
    given = Task.model_validate(settings).model_dump_json()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(base), given], capture_output=True, text=True, check=True, timeout=280
    )
    measured, predicted = map(int, done.stdout.split()[-2:])
    assert 0.6 < measured / predicted < 1.25


LOADED = """
import pave_lightning.pipeline.commands, pave_lightning.pipeline.planning
from transformers import BertForSequenceClassification
from pave_lightning.pipeline.planning.memory import later_bytes
from pave_lightning.weights.memory import resident_bytes
before, predicted = resident_bytes(), later_bytes()
import pave_lightning.pipeline.evaluating, pave_lightning.experts.fitting, peft
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
assert later_bytes() == 0
print(resident_bytes() - before, predicted)
"""


@LINUX
@pytest.mark.slow
def test_what_a_run_loads_besides_a_plan_takes_about_what_is_said():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    measured, predicted = map(int, done.stdout.split()[-2:])
    assert 0.6 < measured / predicted < 1.6
