"""Read the used columns of .csv and .tsv files, as texts."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pave_lightning.errors import shortened
from pave_lightning.tasks.options import Data
from pave_lightning.tasks.rows import ColumnForm, Rows, UnreadableError, find_column
from pave_lightning.tasks.text_files import SHOWN_CHARACTERS, check_bytes, opened

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}
PLAIN_QUOTES = "; if quotation marks are plain characters in this file, set data.quoting: none"
# Few enough lists at a time that Python's collector of garbage does not look through all memory for them.
BATCH = 256
CHUNK = 16384


def delimiter_of(data: Data, ending: str) -> str:
    """What stands between the columns: what the recipe says, or else commas (.csv) and tabs (.tsv)."""
    return data.delimiter or ("\t" if ending == ".tsv" else ",")


def read_delimited(content: bytes, data: Data, ending: str, columns: Mapping[str, ColumnForm]) -> Rows:
    """The used columns of a .csv or .tsv file, as texts; empty texts and labels are missing.

    Args:
        content: the file.
        data: its ``quoting`` and ``delimiter`` are used.
        ending: ``".csv"`` or ``".tsv"``.
        columns: names of the columns that are read, and what they hold.

    Returns:
        The rows; no rows where the file has none.

    Raises:
        UnreadableError: the file is damaged, or its rows do not fit its header; the message names the line.
    """
    lists = [name for name, form in columns.items() if form in (ColumnForm.TEXTS, ColumnForm.LABELS)]
    if lists:
        raise UnreadableError(
            f"the column '{lists[0]}' must hold lists, which {ending} files cannot; save the rows as .jsonl or .parquet"
        )
    check_bytes(content)
    delimiter = delimiter_of(data, ending)
    with _long_fields():
        plain = data.quoting == "none" or (
            data.quoting == "auto" and ending == ".tsv" and not _quotes_whole_fields(content, delimiter)
        )
        return _Reader(content, delimiter, plain).read(list(columns))


class _Reader:
    def __init__(self, content: bytes, delimiter: str, plain: bool) -> None:
        self.content, self.delimiter, self.plain = content, delimiter, plain
        self.short: list[int] = []
        self.over_lines: list[int] = []

    def read(self, used: Sequence[str]) -> Rows:
        batches = self._batches()
        first, records = next(batches, (np.zeros(0, np.int64), []))
        if not records:
            return Rows({}, 0, [])
        header = records[0]
        self._check_separator(header)
        places = {name: place for name in used if (place := find_column(name, header)) is not None}
        lines: list[npt.NDArray[np.int64]] = []
        parts: dict[str, list[pa.Array]] = {name: [] for name in places}
        waiting: dict[str, list[str | None]] = {name: [] for name in places}

        def put_away(least: int) -> None:
            for name, values in waiting.items():
                if len(values) >= least:
                    parts[name].append(pa.array(values, pa.string()))
                    values.clear()

        width = 0
        for begins, rows in chain([(first[1:], records[1:])], batches):
            if rows and not width:
                width = len(header)
                # Every line may end with a delimiter, but the header.
                width += len(rows[0]) == width + 1 and rows[0][-1] == "" and header[-1] != ""
            if set(map(len, rows)) - {width} or width > len(header):
                self._check_widths(begins, rows, width, len(header))
            lines.append(begins)
            for name, place in places.items():
                waiting[name] += [row[place] or None if place < len(row) else None for row in rows]
            put_away(CHUNK)
        put_away(0)
        columns = {name: pa.chunked_array(arrays, pa.string()) for name, arrays in parts.items()}
        numbers = np.concatenate(lines)
        known = [name.strip() for name in header]
        remarks = self._remarks(len(numbers))
        return Rows(columns, len(numbers), known, numbers, untyped=True, remarks=remarks)

    def _records(self) -> Any:
        quoting: dict[str, Any] = {"quoting": csv.QUOTE_NONE, "quotechar": None} if self.plain else {}
        return csv.reader(opened(self.content), delimiter=self.delimiter, strict=True, **quoting)

    def _batches(self) -> Iterator[tuple[npt.NDArray[np.int64], list[list[str]]]]:
        """The lines in which rows begin, and their fields; without blank lines."""
        records, line = self._records(), 0
        while True:
            try:
                batch = [(records.line_num, record) for record in islice(records, BATCH)]
            except csv.Error as error:
                raise self._broken_quotes(error) from error
            if not batch:
                return
            ends = np.fromiter((end for end, _ in batch), np.int64, len(batch))
            begins = np.concatenate([[line], ends[:-1]]) + 1
            line = int(ends[-1])
            rows = [record for _, record in batch]
            if min(map(len, rows)) < 2:
                filled = np.asarray([len(row) > 1 or bool(row and row[0].strip()) for row in rows])
                rows = [row for row, is_one in zip(rows, filled, strict=True) if is_one]
                begins, ends = begins[filled], ends[filled]
            self.over_lines += begins[begins < ends].tolist()
            if rows:
                yield begins, rows

    def _broken_quotes(self, error: csv.Error) -> UnreadableError:
        """What to say where the quotation marks of a row do not fit; it is sought anew, row by row."""
        records, line = self._records(), 1
        with suppress(csv.Error):
            for _ in records:
                line = records.line_num + 1
        if "unexpected end" in str(error):
            found = f"a quotation mark in the row that begins in line {line} is never closed"
        elif "expected after" in str(error):
            found = f"text follows a closing quotation mark in line {records.line_num}"
            found += "" if records.line_num == line else f", in the row that begins in line {line}"
        else:
            found = f"line {line}: {error}"
        return UnreadableError(
            f"{found}; close quotation marks, and double those inside of quoted fields{PLAIN_QUOTES}"
        )

    def _check_widths(self, begins: npt.NDArray[np.int64], rows: list[list[str]], width: int, columns: int) -> None:
        for line, row in zip(begins.tolist(), rows, strict=True):
            if len(row) < columns:
                self.short.append(line)
            elif len(row) > width or (len(row) > columns and row[-1] != ""):
                hint = "" if self.plain else ", quote fields that hold the delimiter"
                over = PLAIN_QUOTES if line in self.over_lines else ""
                raise UnreadableError(
                    f"line {line} has {len(row)} fields, but the first line names {columns} columns; name every column "
                    f"in the first line (also one that numbers the rows){hint}, or set data.delimiter{over}"
                )

    def _check_separator(self, header: list[str]) -> None:
        """Refuse a file of one column whose name holds another separator: a task needs two columns at least."""
        found = next((mark for mark in SEPARATORS if mark in header[0]), None) if len(header) == 1 else None
        if found is not None:
            wanted = SEPARATORS.get(self.delimiter, repr(self.delimiter))
            instead = {"\t": ", or name it .tsv", ",": ", or name it .csv"}.get(found, "")
            raise UnreadableError(
                f"expected columns separated by {wanted}, but the first line names one column, "
                f"{shortened(header[0], SHOWN_CHARACTERS)!r}, with {SEPARATORS[found]} in its name; save the file with "
                f"{wanted} between the columns{instead}, or set data.delimiter: {_in_yaml(found)}"
            )

    def _remarks(self, rows: int) -> list[str]:
        remarks = []
        if self.over_lines:
            remarks.append(
                f"{len(self.over_lines)} of {rows} rows stand on several lines, because their quoted fields hold line "
                f"breaks (first in line {self.over_lines[0]}){PLAIN_QUOTES}"
            )
        if self.short:
            remarks.append(
                f"{len(self.short)} of {rows} rows have fewer fields than the first line names columns (first in line "
                f"{self.short[0]}); the missing ones count as empty"
            )
        return remarks


def _in_yaml(mark: str) -> str:
    return '"\\t"' if mark == "\t" else f'"{mark}"'


def _quotes_whole_fields(content: bytes, delimiter: str) -> bool:
    """Whether every quotation mark opens or closes a whole field on one line, or stands doubled in such a field."""
    if b'"' not in content:
        return True
    mark = re.escape(delimiter)
    field = rf'(?:"(?:[^"]|"")*"|[^"{mark}]*)'
    columns = None
    for line in opened(content):
        row = line.rstrip("\r\n")
        if columns is None and row:
            columns = len(next(csv.reader([row], delimiter=delimiter)))
            whole = re.compile(rf"{field}(?:{mark}{field}){{{columns - 1}}}{mark}?")
        if '"' in row and not whole.fullmatch(row):
            return False
    return True


@contextmanager
def _long_fields() -> Iterator[None]:
    """No limit to the length of a field, which `csv` sets for all its readers at once."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
