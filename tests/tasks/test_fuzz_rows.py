"""Whatever stands in a file of rows: it is read, or refused in words; nothing else happens."""

import io
import json
import random

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pave_lightning.tasks.checks import row_problems
from pave_lightning.tasks.reading import read_rows
from pave_lightning.tasks.rows import UnreadableError
from pave_lightning.tasks.task import Task

TEXTS = ["good film", "naïve “words”", 'she said "no", twice', "two\nlines", "", "😀nicode", "tab\there", "NA"]
ROWS = [{"id": i, "text": TEXTS[i % 8], "label": ["neg", "pos"][i % 2], "x": None if i % 3 else 1.5} for i in range(40)]
PLAIN = [{**row, "text": row["text"].replace("\n", " ").replace("\t", " ")} for row in ROWS]


def parquet():
    file = io.BytesIO()
    frame = pd.DataFrame(ROWS)
    frame["label"] = frame["label"].astype("category")
    frame.to_parquet(file)
    return file.getvalue()


FILES = {
    "csv": pd.DataFrame(ROWS).to_csv(index=False).encode(),
    "tsv": pd.DataFrame(PLAIN).to_csv(index=False, sep="\t").encode(),
    "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "json": json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "parquet": parquet(),
}
# What readers take for a sign.
SIGNS = [b'"', b"\n", b"\r", b"\0", b",", b"\t", b"[", b"]", b"{", b"}", b":", b"\\ud83d", b"NaN", b"1e999", b"null"]
SIGNS += [b"\xff", b"\xe9", b"\xef\xbb\xbf", b"\xff\xfe", b"9" * 30, b"9" * 5000, b"[" * 5000, b"PAR1", b"\x7f\xff"]


def mutated(content: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        # The end of a parquet file says what all the rest means.
        at = max(len(content) - draw.randrange(1, 400), 0) if draw.random() < 0.5 else at
        match draw.randrange(6):
            case 0:
                content = content[:at]
            case 1:
                content = content[:at] + content[at + draw.randint(1, 40) :]
            case 2:
                content = content[:at] + draw.choice(SIGNS) + content[at:]
            case 3:
                content = content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
            case 4:
                content = content[:at] + content[at // 2 : at // 2 + draw.randint(1, 200)] + content[at:]
            case 5:
                content = content[:at] + draw.randbytes(draw.randint(1, 8)) + content[at:]
    return content


def read(content: bytes, ending: str, folder, **options) -> None:
    path = folder / f"rows.{ending}"
    path.write_bytes(content)
    task = Task.model_validate({"name": "t", "data": {"train": str(path)}, "text": "text", **options})
    try:
        rows, _ = read_rows(path, task)
    except UnreadableError as error:
        assert str(error)  # noqa: PT017
        return
    assert {len(column) for column in rows.columns.values()} <= {rows.count}
    if rows.count and not row_problems(task, rows, "here"):
        assert len(task.usable(rows, None)) == rows.count


OPTIONS = [{"classes": ["neg", "pos"]}, {"kind": "regression", "label": "x"}, {"classes": 2, "label": "id"}]


def fuzz(ending, folder, examples):
    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=True), st.sampled_from(OPTIONS))
    def run(draw, options):
        read(mutated(FILES[ending], draw), ending, folder, **options)

    run()


@pytest.mark.parametrize("ending", FILES)
def test_the_files_are_good_before_they_are_changed(ending, tmp_path):
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(FILES[ending])
    task = Task.model_validate({"name": "t", "data": {"train": str(path)}, "text": "text", "classes": ["neg", "pos"]})
    rows, _ = read_rows(path, task)
    expected = PLAIN if ending == "tsv" else ROWS
    # An empty field of a csv file is no text.
    empty = None if ending in ("csv", "tsv") else ""
    assert rows.columns["text"].to_pylist() == [row["text"] or empty for row in expected]
    assert rows.columns["label"].to_pylist() == [row["label"] for row in expected]


@pytest.mark.parametrize("ending", FILES)
def test_changed_files_are_read_or_refused(ending, tmp_path):
    fuzz(ending, tmp_path, 60)


@pytest.mark.slow
@pytest.mark.parametrize("ending", FILES)
def test_many_changed_files_are_read_or_refused(ending, tmp_path):
    fuzz(ending, tmp_path, 2000)


@settings(max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(str.encode), ending=st.sampled_from(list(FILES)))
def test_anything_at_all_is_read_or_refused(content, ending, tmp_path):
    read(content, ending, tmp_path, classes=["neg", "pos"])
