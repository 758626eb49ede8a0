from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pave_lightning.system.files import local_path
from pave_lightning.tasks.data import SPLITS, check_task, load_split
from pave_lightning.tasks.suites import POCKET_FOLDER, suite_task, suite_task_names
from pave_lightning.tasks.task import Task

NAMES = [name for name in suite_task_names() if name.startswith("pocket/")]


def tables(task: Task) -> dict[str, pa.Table]:
    return {split: pq.read_table(local_path(getattr(task.data, split))) for split in SPLITS}


@pytest.mark.parametrize("name", NAMES)
def test_the_data_of_a_task_is_without_fault(name, tmp_path):
    assert check_task(Task.model_validate(suite_task(name)), seed=0, cache_dir=tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_types(name):
    task = Task.model_validate(suite_task(name))
    sizes = [2388, 400, 800] if task.name == "tweet" else [3000, 500, 1000]
    label = pa.float64() if task.kind == "regression" else pa.int64()
    for (split, table), size in zip(tables(task).items(), sizes, strict=True):
        assert table.num_rows == size, split
        assert dict(zip(table.column_names, table.schema.types, strict=True)) == {
            **dict.fromkeys(task.text, pa.string()),
            task.label: label,
        }


@pytest.mark.parametrize("name", NAMES)
def test_every_class_occurs_in_every_split(name):
    task = Task.model_validate(suite_task(name))
    if not task.class_names:
        pytest.skip("regression")
    for table in tables(task).values():
        assert set(table["label"].to_pylist()) == set(range(len(task.class_names)))


@pytest.mark.parametrize("name", NAMES)
def test_no_row_stands_in_two_splits(name):
    task = Task.model_validate(suite_task(name))
    seen = [
        {tuple(row[column] for column in task.text) for row in table.to_pylist()} for table in tables(task).values()
    ]
    for i, rows in enumerate(seen):
        for other in seen[i + 1 :]:
            assert not rows & other


def test_licences_travel_with_the_data():
    assert "Copyright (c) 2014 C.J. Hutto" in (POCKET_FOLDER / "LICENSE-vader").read_text()
    assert "Copyright 2006 by Princeton University" in (POCKET_FOLDER / "LICENSE-wordnet").read_text()
    readme = (POCKET_FOLDER / "README.md").read_text()
    for name in NAMES:
        assert f"`{name.removeprefix('pocket/')}`" in readme


def test_only_listed_tasks_have_a_folder():
    folders = {path.name for path in POCKET_FOLDER.iterdir() if path.is_dir()}
    assert folders == {name.removeprefix("pocket/") for name in NAMES}


def test_a_sample_of_a_pocket_task_keeps_the_order(tmp_path):
    task = Task.model_validate({**suite_task("pocket/isa"), "examples": {"train": 40}})
    whole = tables(task)["train"].to_pylist()
    rows = load_split(task, "train", seed=5, cache_dir=tmp_path).to_pylist()
    places = [whole.index(row) for row in rows]
    assert len(rows) == 40
    assert all(a < b for a, b in pairwise(places))
