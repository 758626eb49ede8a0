"""The image suite: rows that any model can be given, no row twice, and a base that starts from other rows."""

from itertools import combinations

import pyarrow.parquet as pq
import pytest

from pave_lightning.system.files import local_path
from pave_lightning.tasks.data import SPLITS, check_task
from pave_lightning.tasks.suites import IMAGES_FOLDER, suite_task, suite_task_names
from pave_lightning.tasks.task import Task

NAMES = [name for name in suite_task_names() if name.startswith("images/")]


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_without_fault_and_no_row_stands_twice(name, tmp_path):
    task = Task.model_validate(suite_task(name))
    assert check_task(task, seed=0, cache_dir=tmp_path) == []
    tables = [pq.read_table(local_path(getattr(task.data, split))) for split in SPLITS]
    for table in tables:
        assert set(table["label"].to_pylist()) == set(task.class_names)
    contents = [[row["bytes"] for row in table["image"].to_pylist()] for table in tables]
    assert all(len(set(found)) == len(found) for found in contents)
    assert not any(set(one) & set(other) for one, other in combinations(contents, 2))


def test_it_is_small_and_its_licences_travel_with_it():
    sizes = {file: file.stat().st_size for file in IMAGES_FOLDER.rglob("*") if file.is_file()}
    assert sum(size for file, size in sizes.items() if file.suffix == ".parquet") < 10e6
    assert sum(size for file, size in sizes.items() if file.parent.name == "base") < 10e6
    notices, page = ((IMAGES_FOLDER / name).read_text() for name in ("LICENSE-images", "README.md"))
    assert "Twitter, Inc" in notices
    assert "Apache License" in notices
    assert all(f"`{name.split('/')[1]}`" in page for name in NAMES)


def test_the_base_loads_with_its_image_processor():
    task = Task.model_validate(suite_task("images/digit"))
    processor = task.load_processor(IMAGES_FOLDER / "base")
    assert processor.form.shape == (3, 32, 32)
