"""Datasets in folders, as copies of hub datasets lie on machines without the hub."""

import json
import re

import datasets
import pandas as pd
import pytest

from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.data import check_task, load_split, split_fingerprint
from pave_lightning.tasks.rows import UnreadableError
from pave_lightning.tasks.split_files import SplitSlice
from pave_lightning.tasks.task import Task

ROWS = [{"sentence": f"w{number}", "label": number % 2, "idx": number} for number in range(23)]
MATCHED = [{"premise": f"p{n}", "hypothesis": f"h{n}", "label": n % 3, "idx": n} for n in range(20)]


def glue(folder, **changes):
    """A task of GLUE by name, as recipes resolve it."""
    settings = {"name": "r", "base": "b", "tasks": [{"use": "glue/sst2", "data": {"folder": str(folder)}, **changes}]}
    return Recipe.model_validate(settings).tasks[0]


@pytest.fixture
def write(tmp_path):
    """Write rows to a file below the folder of a dataset, by the file's ending."""

    def write(name, rows):
        path = tmp_path / "glue" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        frame = pd.DataFrame(rows)
        match path.suffix:
            case ".parquet":
                frame.to_parquet(path)
            case ".jsonl":
                frame.to_json(path, orient="records", lines=True)
            case ending:
                frame.to_csv(path, index=False, sep="\t" if ending == ".tsv" else ",")
        return tmp_path / "glue"

    return write


@pytest.fixture
def load(tmp_path):
    return lambda task, split: load_split(task, split, seed=0, cache_dir=tmp_path / "cache").to_pylist()


@pytest.fixture
def check(tmp_path):
    return lambda task: check_task(task, seed=0, cache_dir=tmp_path / "cache")


def sentences(rows):
    return [row["sentence"] for row in rows]


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("sst2/train-00000-of-00001.parquet", "sst2/validation-00000-of-00001.parquet"),  # a copy of the hub's files
        ("sst2/train.csv", "sst2/validation.csv"),
        ("SST-2/train.tsv", "SST-2/dev.tsv"),  # GLUE's own download
        ("sst2/data/train.jsonl", "sst2/data/val.jsonl"),
    ],
)
def test_glue_is_found_in_a_folder(write, load, check, train, validation):
    write(train, ROWS)
    task = glue(write(validation, ROWS[:7]))
    assert check(task) == []
    held_out = len(ROWS) - round(0.9 * len(ROWS))
    assert sentences(load(task, "train")) == [row["sentence"] for row in ROWS[:-held_out]]
    assert sentences(load(task, "validation")) == [row["sentence"] for row in ROWS[-held_out:]]
    assert sentences(load(task, "test")) == [row["sentence"] for row in ROWS[:7]]
    assert load(task, "test")[1]["label"] == 1


def test_mnli_is_tested_on_its_matched_rows(write, load):
    write("MNLI/train.tsv", MATCHED)
    write("MNLI/dev_mismatched.tsv", MATCHED[:9])
    task = glue(write("MNLI/dev_matched.tsv", MATCHED[:6]), use="glue/mnli")
    assert [row["premise"] for row in load(task, "test")] == [f"p{n}" for n in range(6)]


OWN_LAYOUT = {
    "cola": ("CoLA", {}, "source\tlabel\tmark\tsentence", 'gj04\t{label}\t*\tA "thing {n}.'),
    "mrpc": (
        "MRPC",
        {"text": ["#1 String", "#2 String"], "label": "Quality"},
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '{label}\t{n}\t{n}\tHe said "a {n}\tb {n}',
    ),
    "stsb": ("STS-B", {"label": "score"}, "index\tsentence1\tsentence2\tscore", '{n}\ta {n}\tb" {n}\t{label}.5'),
    "qqp": (
        "QQP",
        {"label": "is_duplicate"},
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "{n}\t1\t2\ta {n}\tb {n}\t{label}",
    ),
    "rte": ("RTE", {}, "index\tsentence1\tsentence2\tlabel", "{n}\ta {n}\tb {n}\t{name}"),
}


@pytest.mark.parametrize("name", OWN_LAYOUT)
def test_the_columns_of_glues_own_download_can_be_named(name, tmp_path, load, check):
    below, named, header, line = OWN_LAYOUT[name]
    folder = tmp_path / "glue_data" / below
    folder.mkdir(parents=True)
    names = ("entailment", "not_entailment")
    lines = [line.format(n=n, label=n % 2, name=names[n % 2]) for n in range(30)]
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("\n".join([header, *lines]) + "\n")
    task = glue(tmp_path / "glue_data", use=f"glue/{name}", **named)
    assert check(task) == []
    assert len(load(task, "train")) == 27
    assert len(load(task, "test")) == 30


@pytest.mark.parametrize("count", [1, 9, 10, 23, 105])
@pytest.mark.parametrize(
    "text", ["x", "x[:90%]", "x[90%:]", "x[10%:35%]", "x[-20%:]", "x[:-3]", "x[2:7]", "x[5:]", "x[:]", "x[-2:-1]"]
)
def test_slices_are_those_of_datasets(text, count):
    wanted = datasets.ReadInstruction.from_spec(text)
    try:
        (absolute,) = wanted.to_absolute({"x": count})
    except (AssertionError, ValueError):  # it refuses places outside of the rows
        return
    part = SplitSlice.parse(text).rows(count)
    assert list(range(count))[part] == list(range(count))[absolute.from_ : absolute.to]


@pytest.mark.parametrize("text", ["x[", "x[1]", "x[a:]", "x[:5%%]", "", "x[:3] y"])
def test_what_is_no_slice_is_told(text):
    with pytest.raises(UnreadableError, match=re.escape("such as train[:90%]")):
        SplitSlice.parse(text)


def test_another_part_of_a_file_is_another_split(write):
    write("sst2/train.csv", ROWS)
    task = glue(write("sst2/validation.csv", ROWS))
    found = {split_fingerprint(task, split) for split in ("train", "validation", "test")}
    assert len(found) == 3


def test_what_is_wrong_with_a_folder_is_told(write, check, tmp_path):
    def only(task):
        return check(task)[0]

    assert "there is no folder nowhere; correct 'data.folder'" in only(glue("nowhere"))
    folder = write("cola/train.csv", ROWS)
    assert "has no folder 'sst2'; known are: cola" in only(glue(folder))
    folder = write("sst2/trian.csv", ROWS)
    told = only(glue(folder))
    assert "task 'sst2', train split (train[:90%] of " in told
    assert "there is no file of the split 'train'" in told
    assert "did you mean 'trian'" in told
    write("sst2/train.csv", ROWS)
    write("sst2/train.parquet", ROWS)
    assert "expected one file for the split 'train'" in only(glue(folder))
    (tmp_path / "glue" / "mrpc").mkdir()
    assert "there are no csv, tsv, jsonl or parquet files in it" in only(glue(folder, use="glue/mrpc"))


def test_hub_and_folder_exclude_each_other():
    data = {"hub": "o/n", "folder": "f"}
    with pytest.raises(ValueError, match="'hub' and 'folder' exclude each other"):
        Task.model_validate({"name": "t", "data": data, "text": "x", "classes": 2})


def test_rows_that_cannot_be_used_are_told_with_their_place(write, check):
    write("sst2/train.jsonl", [*ROWS[:-1], {"sentence": None, "label": 1}])
    task = glue(write("sst2/validation.jsonl", ROWS))
    (told,) = check(task)
    assert "validation split (train[90%:] of " in told
    assert "line 23" in told


def test_a_recipe_with_a_folder_means_the_same_when_it_is_read_again(write):
    task = glue(write("sst2/train.csv", ROWS))
    again = Task.model_validate(json.loads(task.model_dump_json(by_alias=True)))
    assert again == task
    assert (task.data.hub, task.data.config, task.data.train) == (None, "sst2", "train[:90%]")
