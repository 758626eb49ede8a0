import json

import pyarrow as pa
import pytest

from pave_lightning.tasks.json_rows import read_json
from pave_lightning.tasks.rows import ColumnForm, UnreadableError

A = '{"text": "a", "label": 1}'
B = '{"label": 0, "x": {"y": [1]}, "text": "b"}'

COLUMNS = {"text": ColumnForm.TEXT, "label": ColumnForm.LABEL}


def read(content):
    return read_json(
        content.encode() if isinstance(content, str) else content, {"text": ColumnForm.TEXT, "label": ColumnForm.LABEL}
    )


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (f"{A}\n{B}\n", [1, 2]),
        (f"{A}\r\n{B}", [1, 2]),
        (f"{A}\r{B}\r", [1, 2]),
        (f"\ufeff{A}\n\n  \n{B}\n", [1, 4]),
        (f"[{A}, {B}]", [1, 1]),
        (f"\ufeff [\n{A}\n,\r\n{B}\n]\n", [2, 4]),
        (json.dumps([json.loads(A), json.loads(B)], indent=2), [2, 6]),
    ],
)
def test_the_same_rows_however_they_are_written(content, lines):
    rows = read(content)
    assert rows.columns["text"].to_pylist() == ["a", "b"]
    assert rows.columns["label"].to_pylist() == [1, 0]
    assert rows.lines.tolist() == lines
    assert rows.faults == {}


def test_keys_that_are_not_used_may_hold_anything():
    rows = read('{"x": 1, "x": "twice", "text": "a", "label": 0}\n{"text": "b", "x": [NaN, 1e999], "label": 1}\n')
    assert rows.columns["label"].to_pylist() == [0, 1]
    assert rows.known == ["x", "text", "label"]


def test_missing_keys_are_missing_values():
    rows = read('{"text": "a"}\n{"label": "x"}\n{"text": null, "label": null}\n')
    assert rows.columns["text"].to_pylist() == ["a", None, None]
    assert rows.columns["label"].to_pylist() == [None, "x", None]


@pytest.mark.parametrize(
    ("values", "kind", "found"),
    [
        ("1 2", pa.int64(), [1, 2]),
        ("1 2.5", pa.float64(), [1, 2.5]),
        ("1 99999999999999999999", pa.float64(), [1, 1e20]),
        (f"1 1{'0' * 400}", pa.float64(), [1, float("inf")]),
        ("true null", pa.bool_(), [True, None]),
        ('"1" "x"', pa.string(), ["1", "x"]),
        ("null null", pa.null(), [None, None]),
    ],
)
def test_labels_keep_their_type(values, kind, found):
    rows = read("".join(f'{{"text": "a", "label": {value}}}\n' for value in values.split()))
    assert rows.columns["label"].type == kind
    assert rows.columns["label"].to_pylist() == found


@pytest.mark.parametrize(
    ("line", "column", "told"),
    [
        (
            '{"text": 12, "label": 1}',
            "text",
            "must hold texts, but holds the number 12 in row 1 (counted from 0), line 2",
        ),
        ('{"text": ["b"], "label": 1}', "text", "must hold texts, but holds a list in row 1"),
        (
            '{"text": "b", "label": "1"}',
            "label",
            "holds the number 1 and, in row 1 (counted from 0), line 2, the text '1'",
        ),
        ('{"text": "b", "label": true}', "label", "holds the number 1 and, in row 1 (counted from 0), line 2, true"),
        ('{"text": "b", "label": {}}', "label", "must hold texts or numbers, but holds an object in row 1"),
    ],
)
def test_values_of_another_kind(line, column, told):
    assert told in read(f"{A}\n{line}\n{A}\n").faults[column]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f"null\n{A}\n", r"line 1 holds nothing \(null\), but every row must be an object such as"),
        (f"{A}\n[1]\n", "line 2 holds a list"),
        (f"[{A}, 1]", "line 1 holds the number 1"),
        ('{"text": "é", "label": 1}\n'.encode("latin1"), "line 1 is not UTF-8"),
        (f"{A}\n{A}\n".encode("utf-16"), "UTF-16"),
        (f'{A}\n{{"text": "a\n', r"line 2 cannot be read as JSON \(.* at character 12"),
        (f"{A}{B}\n", "line 1 cannot be read as JSON"),
        (f"[{A}\n", r"is not closed \(line 2\); is the file cut off"),
        (f"[{A}\n{B}]", r"line 2: expected ',' or '\]' after an entry of the list, found '\{'"),
        (f"[{A}]\n{B}\n", "line 2: expected the end of the file after the list"),
        ('{"text": "a", "text": "b", "label": 1}', "line 1 holds the key 'text' twice"),
        ('{"text": "\\ud83d", "label": 1}', "half of a character .* in row 0"),
        (f'{{"data": [{A}]}}', "one object whose key 'data' holds the rows"),
        (f'{{\n "rows": [{A}]\n}}\n', "one object whose key 'rows' holds the rows"),
        ('{"a": {"0": "a"}, "b": {"0": 1}}', "holds whole columns"),
        ('{\n"text": "a",\n"label": 1}\n', "stands on several lines; write one object a line"),
        ('{"text": ' + "[" * 100_000, "nested too deeply"),
        ('{"text": "a", "label": ' + "9" * 5000 + "}", "too many digits"),
        (b'{"text": "a\0", "label": 1}', "line 1 holds a NUL character"),
        (b"\x1f\x8b\x08", "gzip"),
    ],
)
def test_what_is_refused(content, told):
    with pytest.raises(UnreadableError, match=told):
        read(content)


def test_no_rows():
    assert [read(content).count for content in ("", "\ufeff\n", "[]", " [\n] ", "\n \n")] == [0] * 5
