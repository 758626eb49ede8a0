"""Rows, digests and copies belong together; what splits say of each other."""

import json
import os

import datasets
import pytest

from pave_lightning.errors import PaveError
from pave_lightning.tasks import data
from pave_lightning.tasks.data import SPLITS, check_task, load_split, split_fingerprint
from pave_lightning.tasks.data_module import TaskDataModule


@pytest.fixture
def check(tmp_path):
    return lambda task: check_task(task, seed=0, cache_dir=tmp_path / "cache")


@pytest.fixture
def load(tmp_path):
    return lambda task, split="train": load_split(task, split, seed=0, cache_dir=tmp_path / "cache")


@pytest.fixture
def labelled(make_task, tmp_path):
    """A task whose splits hold these labels, in one format each."""

    def build(classes, **splits):
        files = {}
        for split in SPLITS:
            ending, labels = splits.get(split, splits["train"])
            path = tmp_path / f"{split}-labels.{ending}"
            if ending == "csv":
                path.write_text("text,label\n" + "".join(f"{split} t{i},{label}\n" for i, label in enumerate(labels)))
            else:
                rows = [{"text": f"{split} t{i}", "label": label} for i, label in enumerate(labels)]
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files[split] = str(path)
        return make_task(data=files, classes=classes)

    return build


# --- files that change ------------------------------------------------------------------------------------------------


def replace(path, content, times):
    """Another file in its place, with the same time of change to the nanosecond."""
    new = path.with_name("new")
    new.write_text(content)
    os.utime(new, ns=times)
    new.replace(path)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_file_replaced_with_the_same_time_is_read_anew(ending, make_task, load, tmp_path):
    path = tmp_path / f"x.{ending}"
    before = {"csv": "text,label\nold,1\n", "jsonl": '{"text": "old", "label": 1}\n'}[ending]
    path.write_text(before)
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    task = make_task(data={"train": str(path)})
    fingerprint = split_fingerprint(task, "train")
    assert load(task)["text"].to_pylist() == ["old"]
    replace(path, before.replace("old", "newer"), times)
    assert split_fingerprint(task, "train") != fingerprint
    assert load(task)["text"].to_pylist() == ["newer"]
    replace(path, before, times)
    assert split_fingerprint(task, "train") == fingerprint
    assert load(task)["text"].to_pylist() == ["old"]


def test_rows_never_get_the_digest_of_other_bytes(make_task, load, tmp_path, tokenizer, monkeypatch):
    task = make_task()
    # The file changes after it was hashed and before it is read.
    monkeypatch.setattr(data, "file_sha256", lambda path: "0" * 64)
    with pytest.raises(PaveError, match=r"task 'toy', train split \(.*\): the file changes while it is read"):
        load(task)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_how_a_file_is_read_is_part_of_its_fingerprint(make_task, load, tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text('text\tlabel\n"a"\t1\n"b"\t0\n')
    texts, fingerprints = [], set()
    for options in ({}, {"quoting": "none"}, {"quoting": "standard"}):
        task = make_task(data={"train": str(path), **options})
        fingerprints.add(split_fingerprint(task, "train"))
        texts.append(load(task)["text"].to_pylist())
    assert texts == [["a", "b"], ['"a"', '"b"'], ["a", "b"]]
    assert len(fingerprints) == 3
    path.write_text("text;label\na;1\n")
    assert load(make_task(data={"train": str(path), "delimiter": ";"}))["text"].to_pylist() == ["a"]


@pytest.mark.parametrize("folder", ["raw", "encoded"])
def test_damaged_copies_heal(folder, make_task, tmp_path, tokenizer, caplog):
    task = make_task()

    def rows():
        options = {"seed": 0, "cache_dir": tmp_path / "cache", "batch_size": 4}
        return TaskDataModule(task, tokenizer, **options).dataset("train").to_list()

    whole = rows()
    (path,) = (tmp_path / "cache" / folder).glob("*.arrow")
    content = path.read_bytes()
    if folder == "raw":
        next((tmp_path / "cache" / "encoded").iterdir()).unlink()
    other = tmp_path / "other.arrow"
    datasets.Dataset.from_dict({"text": ["x"], "label": [1], "input_ids": [[1]], "length": [1]}).map(
        lambda row: row, cache_file_name=str(other)
    )
    for damage in (content[: len(content) // 2], b"garbage", other.read_bytes(), b""):
        path.unlink()
        path.write_bytes(damage)
        if folder == "raw":
            for made in (tmp_path / "cache" / "encoded").iterdir():
                made.unlink()
        caplog.clear()
        assert rows() == whole
        assert "is damaged; it is set aside as" in caplog.text
        assert path.read_bytes() == content


# --- splits beside each other -----------------------------------------------------------------------------------------


def test_the_same_file_for_two_splits_is_told(make_task, check, tmp_path, caplog):
    task = make_task()
    for split in ("train", "validation"):
        lines = [f'{{"text": "{split} {label}", "label": {label}}}\n' for label in (0, 1)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    assert check(task) == []
    assert caplog.text == ""
    both = [{"text": "a", "label": 0}, {"text": "c", "label": 1}]
    assert check(make_task(train=both, data={"validation": task.data.test})) == []
    assert f"the validation split and the test split are the same ({task.data.test}), so scores are" in caplog.text
    caplog.clear()
    test = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    assert check(make_task(train=test, test=test)) == []
    (record,) = caplog.records
    assert "the train split (" in record.getMessage()
    assert "and the test split (" in record.getMessage()
    assert "are the same, byte for byte, so scores say how well the training rows are remembered" in caplog.text


def test_what_is_odd_about_a_file_is_told_each_time(make_task, check, tmp_path, caplog):
    path = tmp_path / "x.csv"
    path.write_text('text,label\n"a\nb",1\nc,0\n')
    task = make_task(data={"train": str(path)})
    for _ in range(2):
        caplog.clear()
        assert check(task) == []
        assert f"task 'toy', train split ({path}): 1 of 2 rows stand on several lines" in caplog.text


# --- labels -----------------------------------------------------------------------------------------------------------


def encoded(task, load, split="train"):
    return task.answers(load(task, split)).tolist()


@pytest.mark.parametrize(
    ("classes", "ending", "labels", "indices"),
    [
        (["1", "0"], "csv", ["0", "1"], [1, 0]),
        (["1", "0"], "jsonl", ["0", "1"], [1, 0]),
        (["1", "2"], "csv", ["1", "2"], [0, 1]),
        (["1", "2"], "jsonl", [2, 1], [1, 0]),
        (["false", "true"], "csv", ["True", "FALSE"], [1, 0]),
        (["false", "true"], "jsonl", [True, False], [1, 0]),
        (["true", "false"], "jsonl", [True, False], [0, 1]),
        (["neg", "pos"], "csv", ["POS", " neg"], [1, 0]),
        (["neg", "pos"], "csv", ["1", "0.0"], [1, 0]),
        (["neg", "pos"], "jsonl", ["1", "0"], [1, 0]),
        (["no", "None"], "csv", ["none", "No"], [1, 0]),
    ],
)
def test_labels_mean_the_same_in_every_format(classes, ending, labels, indices, labelled, load, check):
    task = labelled(classes, train=(ending, labels))
    assert check(task) == []
    assert encoded(task, load) == indices


def test_a_split_is_read_as_the_others_are(labelled, load, check):
    stars = ["1", "2", "3"]
    task = labelled(stars, train=("jsonl", [1, 2, 3]), test=("jsonl", [1, 2]))
    assert check(task) == []
    assert encoded(task, load, "test") == [0, 1]
    names = split_fingerprint(task, "test")
    task = labelled(stars, train=("jsonl", [0, 1, 2]), test=("jsonl", [1, 2]))
    assert check(task) == []
    assert encoded(task, load, "test") == [1, 2]
    assert split_fingerprint(task, "test") != names
    task = labelled(["1", "2"], train=("csv", ["0", "1"]), test=("csv", ["1", "1", "0"]))
    assert encoded(task, load, "test") == [1, 1, 0]


def test_splits_that_cannot_be_read_in_one_way_are_refused(labelled, check):
    (message,) = check(labelled(["1", "2", "3"], train=("jsonl", [1, 2])))
    assert "column 'label': the labels are the numbers 1, 2, which are names of classes (1, 2, 3) as well as" in message
    messages = check(labelled(["1", "2"], train=("csv", ["1", "2"]), test=("csv", ["0", "1"])))
    assert len(messages) == 1
    assert "test split" in messages[0]
    assert "must hold one of the classes 1, 2, but holds '0' in row 0 (counted from 0), line 2" in messages[0]


@pytest.mark.parametrize(
    ("classes", "ending", "labels", "told"),
    [
        (["neg", "pos"], "csv", ["neg", "1"], "must hold one of the classes neg, pos, but holds '1' in row 1"),
        (["neg", "pos"], "csv", ["0", "2"], "must hold class indices from 0 to 1, but holds 2 in row 1"),
        (["neg", "pos"], "jsonl", [True, False], "one of the classes neg, pos, but holds true, false in 2 rows"),
        (["1", "2"], "jsonl", [1, 2, 7], "must hold one of the classes 1, 2, but holds 7 in row 2"),
        (["may", "May"], "csv", ["may", "MAY"], "one of the classes may, May, but holds 'MAY' in row 1"),
        (["neg", "pos"], "csv", ["neg", "NA"], "has no label in row 1 (counted from 0), line 3"),
    ],
)
def test_labels_that_are_refused(classes, ending, labels, told, labelled, check):
    messages = check(labelled(classes, train=(ending, labels)))
    assert len(messages) == 3
    assert all(told in message for message in messages)


@pytest.mark.parametrize(
    ("feature", "labels", "classes", "indices"),
    [
        (datasets.Value("string"), ["POS", "neg"], ["neg", "pos"], [1, 0]),
        (datasets.ClassLabel(names=["pos", "neg"]), [0, 1], ["neg", "pos"], [1, 0]),
        (datasets.ClassLabel(names=["Neg", "Pos"]), [0, 1], ["neg", "pos"], [0, 1]),
        (datasets.Value("bool"), [True, False], ["false", "true"], [1, 0]),
    ],
)
def test_labels_of_hub_datasets_mean_what_they_are_called(
    feature, labels, classes, indices, make_task, load, check, monkeypatch
):
    features = datasets.Features({"text": datasets.Value("string"), "label": feature})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": labels}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, split, **options: rows)
    data = {"hub": "o/n", "train": "train", "validation": "validation", "test": "test"}
    task = make_task(data=data, classes=classes)
    assert check(task) == []
    assert encoded(task, load) == indices


def test_an_unused_column_may_hold_anything(make_task, load, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(
        "votes,text,label\n" + "".join(f"{i},t{i},{i % 2}\n" for i in range(12_000)) + ",last,1\nmany,x,0\n"
    )
    rows = load(make_task(data={"train": str(path)}))
    assert len(rows) == 12_002
    assert rows.column_names == ["text", "label"]
    assert rows.slice(12_000, 1).to_pylist() == [{"text": "last", "label": 1}]


def test_numbers_of_a_csv_are_exact(make_task, load, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,label\na,0.1\nb, 1e-3\nc,+2\nd,3.0000000000000004\n")
    task = make_task(data={"train": str(path)}, numbers=True)
    assert load(task)["label"].to_pylist() == [0.1, 0.001, 2.0, 3.0000000000000004]
