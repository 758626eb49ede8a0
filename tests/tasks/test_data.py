import hashlib
import re

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pave_lightning.errors import PaveError
from pave_lightning.tasks.data import SPLITS, check_task, load_split, sample_rows, split_fingerprint
from pave_lightning.tasks.task import Task

ROWS = [{"text": text, "label": label} for text, label in [("a", 0), ("NA", 1), ("c, d", 1), ("e", 0)]]


@pytest.fixture
def check(tmp_path):
    return lambda task: check_task(task, seed=0, cache_dir=tmp_path / "cache")


@pytest.fixture
def load(tmp_path):
    return lambda task, split="train", seed=0: load_split(task, split, seed=seed, cache_dir=tmp_path / "cache")


def rows_of(labels, texts=None):
    texts = texts or [f"t{i}" for i in range(len(labels))]
    return [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]


def only(messages):
    assert len(messages) == 1, messages
    return messages[0]


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet", "CSV"])
def test_every_format_gives_the_same_rows(ending, make_task, load, check, tmp_path):
    path = tmp_path / f"rows.{ending}"
    frame = pd.DataFrame(ROWS)
    match ending.lower():
        case "csv" | "tsv":
            frame.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
        case "json":
            frame.to_json(path, orient="records")
        case "jsonl":
            frame.to_json(path, orient="records", lines=True)
        case "parquet":
            frame.to_parquet(path)
    task = make_task(data=dict.fromkeys(SPLITS, str(path)))
    assert check(task) == []
    assert load(task).to_pylist() == ROWS


def test_paths_are_not_patterns(make_task, load, tmp_path):
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    pd.DataFrame(ROWS).to_json(folder / "x.jsonl", orient="records", lines=True)
    assert len(load(make_task(data={"train": str(folder / "x.jsonl")}))) == 4


def test_a_changed_file_is_read_anew(make_task, load):
    assert len(load(make_task(train=ROWS))) == 4
    assert len(load(make_task(train=ROWS * 2))) == 8


@pytest.mark.parametrize(
    ("name", "mark", "told"),
    [
        ("x.csv", ";", "separated by commas, but the first line names one column, 'text;label', with semicolons"),
        ("x.csv", "\t", "with tabs in its name; save the file with commas between the columns, or name it .tsv"),
        ("x.csv", "|", "with vertical bars in its name; save the file with commas between the columns"),
        ("x.tsv", ",", "separated by tabs, but the first line names one column, 'text,label', with commas in its name"),
    ],
)
def test_another_separator_is_told(make_task, check, tmp_path, name, mark, told):
    path = tmp_path / name
    path.write_text(f"\ufeff\ntext{mark}label\na, b; c{mark}1\n", encoding="utf-8")
    (message,) = check(make_task(data={"train": str(path)}))
    assert message.startswith(f"task 'toy', train split ({path}): expected columns ")
    assert told in message


def test_other_separators_inside_of_columns_are_text(make_task, check, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,label,a;b|c\na; b,1,0\nb | c,0,0\n")
    assert check(make_task(data={"train": str(path)})) == []


def test_csv_missing_number_is_missing_but_a_class_may_be_called_none(make_task, check, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,label\na,1.5\nb,NA\nc,2\n")
    task = make_task(data={"train": str(path)}, numbers=True)
    assert "column 'label' has no label in row 1 (counted from 0)" in only(check(task))
    path.write_text("text,label\na,None\nb,Some\n")
    assert check(make_task(data={"train": str(path)}, classes=["None", "Some"], validation=ROWS, test=ROWS)) == []


def test_a_pandas_category_is_a_class_name(make_task, check, tmp_path):
    pd.DataFrame({"text": ["a", "b"], "label": pd.Categorical(["positive", "negative"])}).to_parquet(
        tmp_path / "x.parquet"
    )
    assert check(make_task(data={"train": str(tmp_path / "x.parquet")})) == []


def test_progress_bars_are_put_back(make_task, load):
    was_disabled = datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()
    try:
        load(make_task())
        assert not datasets.are_progress_bars_disabled()
    finally:
        if was_disabled:
            datasets.disable_progress_bars()


# --- samples ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.one_of(st.none(), st.integers(1, 250)), st.integers(0, 2**31 - 1))
def test_sample_is_ascending_without_repetition_and_grows(rows, wanted, seed):
    found = sample_rows(rows, wanted, seed)
    assert found.dtype == np.int64
    assert len(found) == min(rows, rows if wanted is None else wanted)
    assert (np.diff(found) > 0).all()
    assert set(found) <= set(range(rows))
    assert set(found) <= set(sample_rows(rows, len(found) + 1, seed))


def test_samples_are_the_same_for_ever():
    assert sample_rows(10, 4, 0).tolist() == [2, 4, 8, 9]
    assert sample_rows(10, 4, 1).tolist() != sample_rows(10, 4, 0).tolist()


def test_examples_choose_rows_of_each_split(make_task, load):
    task = make_task(examples={"train": 5, "test": 4})
    assert [len(load(task, split)) for split in SPLITS] == [5, 23, 4]
    assert load(task).to_pylist() == load(task).to_pylist()
    assert load(task).to_pylist() != load(task, seed=1).to_pylist()


# --- what is wrong with a file ---------------------------------------------------------------------------------------


def test_missing_files_are_all_named(make_task, check, tmp_path):
    task = make_task(data={"train": str(tmp_path / "no.csv"), "test": str(tmp_path / "none.jsonl")})
    messages = check(task)
    assert len(messages) == 2
    assert f"task 'toy', train split: there is no file {tmp_path}/no.csv" in messages[0]
    assert "correct 'data.test'" in messages[1]


def test_a_folder_is_no_file(make_task, check, tmp_path):
    assert "is a folder" in only(check(make_task(data={"test": str(tmp_path)})))


@pytest.mark.parametrize(
    ("ending", "told"), [("xlsx", "found '.xlsx'"), ("", "found ''"), ("pkl", "pickles"), ("pt", "pickles")]
)
def test_unsupported_files(ending, told, make_task, check, tmp_path):
    path = tmp_path / f"rows.{ending}".rstrip(".")
    path.write_bytes(b"x")
    message = only(check(make_task(data={"validation": str(path)})))
    assert told in message
    assert ".csv, .tsv, .json, .jsonl, .parquet" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.csv", ""), ("x.csv", "text,label\n"), ("x.jsonl", ""), ("x.jsonl", "\n"), ("x.json", "[]")],
)
def test_empty_text_files(name, content, make_task, check, tmp_path):
    (tmp_path / name).write_text(content)
    assert "there are no rows" in only(check(make_task(data={"train": str(tmp_path / name)})))


def test_empty_parquet(make_task, check, tmp_path):
    pd.DataFrame({"text": pd.Series(dtype=str), "label": pd.Series(dtype=int)}).to_parquet(tmp_path / "x.parquet")
    assert "there are no rows" in only(check(make_task(data={"train": str(tmp_path / "x.parquet")})))


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "nyu-mll/glue"])
def test_unreachable_hub_dataset_suggests_local_files(name, make_task, check, load):
    task = make_task(data={"hub": name, "config": "sst2", "train": "train", "validation": "dev", "test": "test[:1%]"})
    messages = check(task)
    assert len(messages) == 3
    assert f"test split (test[:1%] of {name}/sst2)" in messages[2]
    for message in messages:
        assert "give local files" in message
    with pytest.raises(PaveError, match="give local files"):
        load(task)


def test_hub_arguments_are_passed_on(make_task, load, check, monkeypatch):
    asked = []

    def hub(*args, **kwargs):
        asked.append((*args, kwargs["split"], kwargs["revision"]))
        return datasets.Dataset.from_list(ROWS if "empty" not in args else [])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    hub_data = {"hub": "o/n", "config": "c", "revision": "r", "train": "train[:9%]", "validation": "v", "test": "t"}
    assert check(make_task(data=hub_data)) == []
    assert asked == [("o/n", "c", split, "r") for split in ("train[:9%]", "v", "t")]
    assert all("there are no rows" in text for text in check(make_task(data={**hub_data, "config": "empty"})))


# --- what is wrong with the rows -------------------------------------------------------------------------------------


def test_missing_columns_name_the_nearest(make_task, check):
    messages = check(make_task(text=["txt"], label="labels"))
    assert len(messages) == 6
    assert "there is no column 'txt'; did you mean 'text'?" in messages[0]
    assert "there is no column 'labels'; did you mean 'label'?" in messages[1]


@pytest.mark.parametrize("texts", [[1, 2], [True, False], [["a"], ["b"]], ["a", 2], [{"x": 1}, {"x": 2}]])
def test_texts_must_be_strings(texts, make_task, check):
    assert "column 'text' must hold texts, but holds" in only(check(make_task(train=rows_of([0, 1], texts))))


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["a", None, "c", None], "2 rows, first in row 1"),
        (["a", "b", "c", None], "row 3"),
        ([None] * 4, "4 rows, first in row 0"),
    ],
)
def test_missing_texts(texts, told, make_task, check):
    message = only(check(make_task(train=rows_of([0, 1, 0, 1], texts))))
    assert f"column 'text' has no text in {told} (counted from 0)" in message


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("labels", [[0, None, 1, None], [0.0, float("nan"), 1.0, None], [None] * 4])
def test_missing_labels(labels, numbers, make_task, check):
    message = only(check(make_task(train=rows_of(labels), numbers=numbers)))
    assert re.search(r"column 'label' has no label in \d rows, first in row [01] \(counted from 0\)", message)


def test_infinite_labels(make_task, check):
    for numbers in (False, True):
        message = only(check(make_task(train=rows_of([0.0, 1.0, float("inf")]), numbers=numbers)))
        assert "is infinite in row 2 (counted from 0)" in message


def test_classes_out_of_range(make_task, check):
    message = only(check(make_task(test=rows_of([0, 1, 2, -1, 7, 2]))))
    assert (
        "must hold class indices from 0 to 1, but holds -1, 2, 7 in 4 rows, first in row 2 (counted from 0)" in message
    )
    assert message.startswith("task 'toy', test split (")


def test_row_numbers_count_missing_rows(make_task, check):
    messages = check(make_task(train=rows_of([None, 0, 5])))
    assert "row 0" in messages[0]
    assert "holds 5 in row 2" in messages[1]


def test_class_names(make_task, check):
    good = rows_of(["negative", "positive"])
    task = make_task(train=rows_of(["negative", "positiv", "positive", "x"]), validation=good, test=good)
    message = only(check(task))
    assert "one of the classes negative, positive, but holds 'positiv', 'x' in 2 rows, first in row 1" in message
    assert "did you mean 'positive'?" in message


def test_fractional_classes(make_task, check):
    assert check(make_task(train=rows_of([0.0, 1.0]))) == []
    message = only(check(make_task(train=rows_of([0.0, 0.5, 1.0]))))
    assert "whole numbers, but holds 0.5 in row 1 (counted from 0), line 2; is it regression?" in message


@pytest.mark.parametrize("labels", [[True, False], [[0], [1]], ["a", 1], [{"x": 1}, {"x": 2}]])
def test_labels_of_unusable_types(labels, make_task, check):
    for numbers in (False, True):
        assert "column 'label' must hold" in only(check(make_task(train=rows_of(labels), numbers=numbers)))


def test_regression_labels_must_be_numbers(make_task, check):
    message = only(check(make_task(train=rows_of(["1", "two"]), numbers=True)))
    assert "must hold numbers, but 'two' is none, in row 1" in message
    assert "without quotes" in only(check(make_task(train=rows_of(["1", "2"]), numbers=True)))


def test_regression_labels_outside_the_range(make_task, check):
    assert check(make_task(numbers=True, value_range=[0, 22])) == []
    message = only(check(make_task(train=rows_of([0, 5, 5.5, -1]), numbers=True, value_range=[0, 22])))
    assert "must hold numbers from 0 to 22, but holds -1 in row 3" in message


def test_a_test_split_needs_two_labels(make_task, check):
    same = rows_of([1, 1, 1])
    assert check(make_task(train=same, validation=same)) == []
    assert "all 3 rows that are used carry the same label" in only(check(make_task(test=same)))


def test_labels_with_names_of_their_own_are_mapped(make_task, check, load, tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["Yes", "no"])})
    datasets.Dataset.from_list(ROWS, features=features).to_parquet(tmp_path / "x.parquet")
    data = dict.fromkeys(SPLITS, str(tmp_path / "x.parquet"))
    for classes, labels in [
        (["yes", "no"], [0, 1, 1, 0]),
        (["no", "yes"], ["yes", "no", "no", "yes"]),
        (["other", "no", "yes"], ["yes", "no", "no", "yes"]),
        (["good", "bad"], [0, 1, 1, 0]),
    ]:
        task = make_task(data=data, classes=classes)
        assert check(task) == []
        assert load(task)["label"].to_pylist() == labels
    messages = check(make_task(data=data, classes=["no", "perhaps"]))
    assert len(messages) == 3
    assert "in the order Yes, no, but 'classes' in the order no, perhaps" in messages[0]


def test_all_problems_come_at_once(make_task, check, tmp_path):
    task = make_task(
        train=rows_of([0, 9], ["a", None]), test=rows_of([1, 1]), data={"validation": str(tmp_path / "no.csv")}
    )
    assert len(check(task)) == 4


def test_loading_refuses_what_the_check_tells(make_task, load):
    with pytest.raises(PaveError, match="from 0 to 1, but holds 9 in row 1"):
        load(make_task(train=rows_of([0, 9])))


def test_the_same_rows_in_train_and_test_are_no_mistake(make_task, check):
    assert check(make_task(train=ROWS, test=ROWS)) == []


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprint_follows_the_content_of_files(make_task, tmp_path):
    before = {split: split_fingerprint(make_task(train=ROWS), split) for split in SPLITS}
    assert before["train"] == hashlib.sha256((tmp_path / "train.jsonl").read_bytes()).hexdigest()
    after = {split: split_fingerprint(make_task(train=ROWS[:3]), split) for split in SPLITS}
    assert before["train"] != after["train"]
    assert before["test"] == after["test"]


def test_fingerprint_of_a_hub_dataset():
    task = Task.model_validate({"name": "t", "data": {"hub": "o/n", "revision": "abc"}, "text": "x", "classes": 2})
    assert split_fingerprint(task, "test") == "o/n/@abc:test"


def test_fingerprint_of_a_missing_file(make_task):
    with pytest.raises(PaveError, match=r"there is no file .*gone\.csv"):
        split_fingerprint(make_task(data={"test": "gone.csv"}), "test")
