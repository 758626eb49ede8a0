import hashlib

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pave_lightning.tasks.reading import inner_column, plain_column, read_rows
from pave_lightning.tasks.rows import UnreadableError
from pave_lightning.tasks.task import Task


@pytest.fixture
def read(tmp_path):
    def build(content, name="x.parquet"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            pq.write_table(content, path)
        task = Task.model_validate({"name": "t", "data": {"train": str(path)}, "text": "text", "classes": ["n", "p"]})
        return read_rows(path, task)[0]

    return build


def table(text, label, **more):
    return pa.table({"text": text, "label": label, **more})


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_every_form_of_text(kind, read):
    rows = read(table(pa.array(["a", None, "é"]).cast(kind), pa.array(["n", "p", "n"]).cast(kind)))
    assert rows.columns["text"].to_pylist() == ["a", None, "é"]
    assert rows.columns["label"].to_pylist() == ["n", "p", "n"]
    assert rows.lines is None


def test_other_columns_may_be_nested_repeated_or_dotted(read):
    rows = read(table(["a"], [1], **{"text.en": ["x"], "deep": [{"text": "y", "label": [1]}]}))
    assert rows.columns["text"].to_pylist() == ["a"]
    assert rows.columns["label"].to_pylist() == [1]
    twice = pa.table([pa.array(["a"]), pa.array([1]), pa.array([2]), pa.array([3])], ["text", "label", "x", "x"])
    assert read(twice).columns["label"].to_pylist() == [1]
    twice = pa.table([pa.array(["a"]), pa.array([1]), pa.array([2])], ["text", "label", "label"])
    with pytest.raises(UnreadableError, match="2 columns are named 'label'"):
        read(twice)


def test_names_of_classes_come_along(read, tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])})
    datasets.Dataset.from_list([{"text": "a", "label": 1}], features=features).to_parquet(tmp_path / "y.parquet")
    assert read((tmp_path / "y.parquet").read_bytes()).own_names == ["x", "y"]
    broken = table(["a"], [1]).replace_schema_metadata({"huggingface": '{"info": {"features": []}}'})
    assert read(broken).own_names is None


def encrypted():
    return b"PARE" + b"\0" * 40 + b"PARE"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "empty"),
        (b"PAR", "no parquet file"),
        (b"PAR1PAR1", "cut off"),
        (b"PAR1" + b"\1" * 50, "cut off"),
        (b"PAR1" + b"\xff" * 50 + b"PAR1", "cannot be read as parquet"),
        (encrypted(), "encrypted"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"text,label\na,1\n", "name it after what it is"),
    ],
)
def test_damaged_parquet(content, told, read):
    with pytest.raises(UnreadableError, match=told):
        read(content)


def test_texts_that_are_not_utf8_are_refused(read):
    wrong = pa.StringArray.from_buffers(1, *pa.array([b"\xff\xfe"]).buffers()[1:])
    with pytest.raises(UnreadableError, match="cannot be read as parquet"):
        read(table(wrong, [1]))


@pytest.mark.parametrize("name", ["x.csv", "X.CSV", "x.jsonl"])
def test_the_digest_is_that_of_the_bytes_that_were_read(name, tmp_path):
    path = tmp_path / name
    pd.DataFrame({"text": ["a"], "label": [1]}).to_csv(path, index=False)
    if name.endswith("jsonl"):
        path.write_text('{"text": "a", "label": 1}')
    task = Task.model_validate({"name": "t", "data": {"train": str(path)}, "text": "text", "classes": 2})
    assert read_rows(path, task)[1] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_of_other_names_for_the_same_form_and_packed_ones(tmp_path):
    task = Task.model_validate({"name": "t", "data": {}, "text": "text", "label": "label", "classes": 2})
    path = tmp_path / "rows.ndjson"
    path.write_text('{"text": "a", "label": 1}\n')
    assert read_rows(path, task)[0].count == 1
    with pytest.raises(UnreadableError, match=r"files ending in .gz are packed; unpack it first"):
        read_rows(tmp_path / "rows.csv.gz", task)


@pytest.mark.parametrize("kind", [pa.list_view, pa.large_list_view, pa.large_list])
def test_lists_by_sizes_keep_every_row(kind):
    """Also where a row has no list, which a cast by Arrow itself gets wrong; and inside of objects."""
    rows = [["a", "b"], None, [], ["c"]]
    column = pa.chunked_array([pa.array(rows, kind(pa.string())), pa.array([["d"]], kind(pa.string()))])
    assert plain_column(column).to_pylist() == [*rows, ["d"]]
    objects = [[{"text": text} for text in row] if row is not None else None for row in rows]
    nested = pa.chunked_array([pa.array(objects, kind(pa.struct([("text", pa.string())])))])
    found = inner_column(nested, ["text"])
    assert found is not None
    assert found.to_pylist() == rows
