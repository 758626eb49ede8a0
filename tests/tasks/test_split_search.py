"""Files of one data set, found by their names."""

from pathlib import Path

import pytest

from pave_lightning.errors import Problems
from pave_lightning.tasks.rows import UnreadableError
from pave_lightning.tasks.split_search import search_splits, split_of


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Writes empty files and searches: names and files of data sets, and what is told."""
    monkeypatch.chdir(tmp_path)

    def search(files, *paths):
        for file in files:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text("")
        problems = Problems("wrong:")
        sets = search_splits([Path(path) for path in paths], problems)
        return sets, problems.messages

    return search


@pytest.mark.parametrize(
    ("file", "split", "rest"),
    [
        ("train.csv", "train", None),
        ("val.jsonl", "validation", None),
        ("Test.tsv", "test", None),
        ("a_dev.csv", "validation", "a"),
        ("train-a.csv", "train", "a"),
        ("test-00000-of-00001.parquet", "test", None),
        ("my.set.train.csv", "train", "my.set"),
        ("restrain.csv", None, "restrain"),
        ("training_notes_final.csv", "train", "notes_final"),
        ("a.csv", None, "a"),
    ],
)
def test_the_split_in_a_name(file, split, rest):
    assert split_of(Path(file)) == (split, rest)


def test_splits_are_found_beside_any_of_them(found):
    files = ["r/train.csv", "r/dev.csv", "r/test.csv", "intents.jsonl", "intents-dev.jsonl", "intents-test.jsonl"]
    sets, told = found(files, "r/dev.csv", "r/train.csv", "intents.jsonl", "intents-test.jsonl")
    assert told == []
    assert [one.name for one in sets] == ["r", "intents"]
    assert sets[0].data() == {"train": "r/train.csv", "validation": "r/dev.csv", "test": "r/test.csv"}
    assert sets[1].data() == {
        "train": "intents.jsonl",
        "validation": "intents-dev.jsonl",
        "test": "intents-test.jsonl",
    }


def test_folders_and_equal_names(found):
    sets, _ = found(["a/x/train.csv", "b/x/train.csv", "b/x/test.csv"], "a/x", "b/x")
    assert [one.name for one in sets] == ["x", "x-2"]
    assert list(sets[1].files) == ["train", "test"]


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (["d/all.csv"], ("all[:80%]", "all[80%:90%]", "all[90%:]")),
        (["d/train.csv"], ("train[:80%]", "train[80%:90%]", "train[90%:]")),
        (["d/train.csv", "d/test.csv"], ("train[:90%]", "train[90%:]", "test")),
        (["d/train.csv", "d/dev.csv"], ("train[:90%]", "train[90%:]", "dev")),
        (["d/train-00000-of-00001.parquet"], ("train[:80%]", "train[80%:90%]", "train[90%:]")),
    ],
)
def test_splits_without_a_file_are_parts_of_another(found, files, parts):
    (one,), _ = found(files, files[0])
    assert one.data() == {"folder": "d", **dict(zip(("train", "validation", "test"), parts, strict=True))}


def test_what_is_no_data_set_is_told(found):
    files = ["few/test.csv", "few/dev.csv", "notes/a.txt", "many/train-00000-of-00002.parquet", "notes.txt"]
    sets, told = found(files, "few", "notes", "many", "absent.csv", "notes.txt")
    assert sets == []
    assert told == [
        "few/dev.csv, few/test.csv: there are no rows to train on; expected a file such as few/train.csv",
        "notes holds no file that is named after a split, such as train.csv; expected .parquet, .csv, .tsv, .jsonl, "
        ".ndjson, .json; name the files themselves",
        "many/train-00000-of-00002.parquet is one of several parts of a file; join them",
        "there is no file absent.csv",
        "notes.txt cannot be read; expected .parquet, .csv, .tsv, .jsonl, .ndjson, .json",
    ]


def test_parts_of_a_file_that_shares_its_name_are_refused(found):
    (one,), _ = found(["d/a.csv", "d/a.jsonl"], "d/a.csv")
    with pytest.raises(UnreadableError, match=r"expected one file for the split 'a'"):
        one.data()
