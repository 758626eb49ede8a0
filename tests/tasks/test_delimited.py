import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pave_lightning.tasks.delimited import read_delimited
from pave_lightning.tasks.options import Data
from pave_lightning.tasks.rows import ColumnForm, UnreadableError

COLUMNS = {"text": ColumnForm.TEXT, "label": ColumnForm.LABEL}


def read(content, ending=".csv", **options):
    content = content.encode() if isinstance(content, str) else content
    return read_delimited(
        content, Data(train=f"x{ending}", **options), ending, {"text": ColumnForm.TEXT, "label": ColumnForm.LABEL}
    )


def pairs(rows):
    return list(zip(rows.columns["text"].to_pylist(), rows.columns["label"].to_pylist(), strict=True))


# --- what is read -----------------------------------------------------------------------------------------------------

AB = [("a", "1"), ("b", "0")]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("text,label\na,1\nb,0\n", [2, 3]),
        ("text,label\na,1\nb,0", [2, 3]),
        ("text,label\r\na,1\r\nb,0\r\n", [2, 3]),
        ("text,label\ra,1\rb,0\r", [2, 3]),
        ("\ufefftext,label\na,1\nb,0\n", [2, 3]),
        ("\n  \ntext,label\n\na,1\n   \nb,0\n\n", [5, 7]),
        (" text ,label\t\na,1\nb,0\n", [2, 3]),
        ("label,other,text\n1,,a\n0,x,b\n", [2, 3]),
        ('"text","label"\n"a","1"\n"b",0\n', [2, 3]),
        # Every line ends with a delimiter, or only the rows do.
        ("text,label,\na,1,\nb,0,\n", [2, 3]),
        ("text,label\na,1,\nb,0,\n", [2, 3]),
        (",text,label\n0,a,1\n1,b,0\n", [2, 3]),
        # Columns that are not used may have the same name.
        ("x,text,x,label\n1,a,2,1\n1,b,2,0\n", [2, 3]),
    ],
)
def test_the_same_rows_however_they_are_written(content, lines):
    rows = read(content)
    assert pairs(rows) == AB
    assert rows.lines.tolist() == lines
    assert rows.remarks == []


def test_types_are_never_guessed():
    rows = read("text,label\n0012,01\n1.50,true\nNA,null\nnan,1e3\n")
    assert pairs(rows) == [("0012", "01"), ("1.50", "true"), ("NA", "null"), ("nan", "1e3")]


def test_empty_fields_are_missing():
    assert pairs(read('text,label\n,1\n"",\n')) == [(None, "1"), (None, None)]


def test_fields_may_be_long_and_the_limit_for_others_stays():
    before = csv.field_size_limit()
    (row,) = pairs(read(f'text,label\n"{"a b, " * 100_000}",1\n'))
    assert row == ("a b, " * 100_000, "1")
    assert csv.field_size_limit() == before


def test_more_rows_than_are_put_away_at_once():
    content = "text,label\n" + "".join(f"t{i},{i}\n" for i in range(20_000))
    assert pairs(read(content)) == [(f"t{i}", str(i)) for i in range(20_000)]


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), st.text("ab,"))),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_whatever_is_written_is_read(rows, delimiter, end):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "label"), *rows])
    found = read(file.getvalue(), delimiter=delimiter, quoting="standard")
    assert pairs(found) == [(text or None, label or None) for text, label in rows]


# --- quotation marks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        # One that never closes, as in the files of GLUE.
        (['"a b\t1', "c\t0"], [('"a b', "1"), ("c", "0")]),
        (['"a b\t1', 'c"\t0'], [('"a b', "1"), ('c"', "0")]),
        (['he said "x"\t1'], [('he said "x"', "1")]),
        (['"a" b\t1', '"c d"\t0'], [('"a" b', "1"), ('"c d"', "0")]),
        # A tab would be missing if these two belonged together.
        (['"a\tb"'], [('"a', 'b"')]),
        # All of them enclose whole fields.
        (['"a ""b"""\t1', "c\t0"], [('a "b"', "1"), ("c", "0")]),
        (['"a\tb"\t"1"'], [("a\tb", "1")]),
    ],
)
def test_quotation_marks_of_a_tsv_are_characters_unless_all_enclose_fields(lines, found):
    rows = read("\n".join(["text\tlabel", *lines]) + "\n", ".tsv")
    assert pairs(rows) == found


def test_quoting_may_be_said():
    content = 'text\tlabel\n"a"\t1\n'
    assert pairs(read(content, ".tsv")) == pairs(read(content, ".tsv", quoting="standard")) == [("a", "1")]
    assert pairs(read(content, ".tsv", quoting="none")) == [('"a"', "1")]
    assert pairs(read('text,label\n"a,1\n', quoting="none")) == [('"a', "1")]
    with pytest.raises(UnreadableError, match=r"row that begins in line 2 is never closed; .*data.quoting: none"):
        read('text\tlabel\n"a\t1\nb\t0\n', ".tsv", quoting="standard")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('text,label\na,1\n"b,0\nc,1\n', "row that begins in line 3 is never closed"),
        ('text,label\n"a"b,1\n', "text follows a closing quotation mark in line 2;"),
        ('text,label\n"a\n"b,1\n', "closing quotation mark in line 3, in the row that begins in line 2;"),
        ('text,label\n"a,1\nb,0\n"c,1\n', "data.quoting: none"),
    ],
)
def test_stray_quotation_marks_are_refused(content, told):
    with pytest.raises(UnreadableError, match=told):
        read(content)


def test_rows_over_several_lines_are_told():
    rows = read('text,label\nx,1\n"a\n\nb",1\n"c\r\nd",0\n')
    assert pairs(rows) == [("x", "1"), ("a\n\nb", "1"), ("c\r\nd", "0")]
    assert rows.lines.tolist() == [2, 3, 6]
    (remark,) = rows.remarks
    assert remark.startswith("2 of 3 rows stand on several lines")
    assert "first in line 3" in remark


# --- rows that do not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("text,label\na,1\nb,0,x\n", "line 3 has 3 fields, but the first line names 2 columns"),
        ("text,label\n0,a,1\n1,b,0\n", "line 2 has 3 fields, but the first line names 2 columns; name every column"),
        ("text,label\nyes, I do,1,\n", "line 2 has 4 fields"),
        ("text,label\na,1,\nb,0,x\n", "line 3 has 3 fields"),
        ("text,label\na,1\nb,0,\n", "line 3 has 3 fields"),
        ("text,label,text\na,1,b\n", "2 columns are named 'text'"),
        ("text, label,label \na,1,0\n", "2 columns are named 'label'"),
    ],
)
def test_fields_that_have_no_column_are_refused(content, told):
    with pytest.raises(UnreadableError, match=told):
        read(content)


def test_fields_that_are_missing_are_told():
    rows = read("text,label,note\na,1,x\nb,0\n")
    assert pairs(rows) == AB
    assert rows.remarks[0].startswith(
        "1 of 2 rows have fewer fields than the first line names columns (first in line 3)"
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("text,label\né,1\n".encode("latin1"), r"line 2 is not UTF-8 \(byte 0xe9\); save the file as UTF-8"),
        ("text,label\na,1\n".encode("utf-16"), "UTF-16"),
        ("text,label\na,1\n".encode("utf-16-le"), "line 1 holds a NUL character"),
        (b"text,label\r\na,1\r\nb\0,1\n", "line 3 holds a NUL character"),
        (b"\x1f\x8b\x08\0", "compressed with gzip; unpack it"),
        (b"PK\x03\x04....", "zip archive or a spreadsheet"),
        (b"PAR1", "name it .parquet"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "run: git lfs pull"),
    ],
)
def test_files_that_are_something_else(content, told):
    with pytest.raises(UnreadableError, match=told):
        read(content)


def test_no_rows():
    assert [read(content).count for content in ("", "\ufeff", "\n\n", "text,label", "text,label\n\n")] == [0] * 5
