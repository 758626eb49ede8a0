"""Read the used columns of .csv and .tsv files, as texts."""

from __future__ import annotations

import csv
import re
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from pave_lightning.recipe import Data
from pave_lightning.tasks.rows import Rows, UnreadableError, find_column
from pave_lightning.tasks.text_files import check_bytes, opened, shortened

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}
PLAIN_QUOTES = "; if quotation marks are plain characters in this file, set data.quoting: none"
BATCH = 8192


def delimiter_of(data: Data, ending: str) -> str:
    """What stands between the columns: what the recipe says, or else commas (.csv) and tabs (.tsv)."""
    return data.delimiter or ("\t" if ending == ".tsv" else ",")


def read_delimited(content: bytes, data: Data, ending: str, text: Sequence[str], label: str) -> Rows:
    """The used columns of a .csv or .tsv file, as texts; empty texts and labels are missing.

    Args:
        content: the file.
        data: its ``quoting`` and ``delimiter`` are used.
        ending: ``".csv"`` or ``".tsv"``.
        text: names of the columns that hold texts.
        label: name of the column that holds the labels.

    Returns:
        The rows; no rows where the file has none.

    Raises:
        UnreadableError: the file is damaged, or its rows do not fit its header; the message names the line.
    """
    check_bytes(content)
    delimiter = delimiter_of(data, ending)
    with _long_fields():
        plain = data.quoting == "none" or (
            data.quoting == "auto" and ending == ".tsv" and not _quotes_whole_fields(content, delimiter)
        )
        return _Reader(content, delimiter, plain).read(text, label)


class _Reader:
    def __init__(self, content: bytes, delimiter: str, plain: bool) -> None:
        quoting: dict[str, Any] = {"quoting": csv.QUOTE_NONE, "quotechar": None} if plain else {}
        self.records = csv.reader(opened(content), delimiter=delimiter, strict=True, **quoting)
        self.delimiter, self.plain = delimiter, plain
        self.short: list[int] = []
        self.over_lines: list[int] = []
        self.rows = 0

    def read(self, text: Sequence[str], label: str) -> Rows:
        rows = self._rows()
        _, header = next(rows, (0, []))
        if not header:
            return Rows({}, 0, [])
        self._check_separator(header)
        places = {name: place for name in (*text, label) if (place := find_column(name, header)) is not None}
        lines: array[int] = array("q")
        parts: dict[str, list[pa.Array]] = {name: [] for name in places}
        batch: list[list[str | None]] = [[] for _ in places]

        def put_away() -> None:
            for name, values in zip(places, batch, strict=True):
                parts[name].append(pa.array(values, pa.string()))
                values.clear()

        width = len(header)
        for line, record in rows:
            if not lines and len(record) == width + 1 and record[-1] == "" and header[-1] != "":
                width += 1  # every line ends with a delimiter, but the header
            if len(record) != width or (width > len(header) and record[-1] != ""):
                self._check_width(line, record, len(header))
            lines.append(line)
            for place, values in zip(places.values(), batch, strict=True):
                values.append((record[place] or None) if place < len(record) else None)
            if len(lines) % BATCH == 0:
                put_away()
        put_away()
        columns = {name: pa.chunked_array(arrays, pa.string()) for name, arrays in parts.items()}
        numbers = np.asarray(lines, dtype=np.int64)
        known = [name.strip() for name in header]
        return Rows(columns, len(lines), known, numbers, untyped=True, remarks=self._remarks(len(lines)))

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """The line in which each row begins, and its fields; without blank lines."""
        records, line = self.records, 1
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                raise UnreadableError(self._broken_quotes(line, error)) from error
            if len(record) > 1 or (record and record[0].strip()):
                if records.line_num > line:
                    self.over_lines.append(line)
                yield line, record
            line = records.line_num + 1

    def _broken_quotes(self, line: int, error: csv.Error) -> str:
        if "unexpected end" in str(error):
            found = f"a quotation mark in the row that begins in line {line} is never closed"
        elif "expected after" in str(error):
            found = f"text follows a closing quotation mark in line {self.records.line_num}"
            found += "" if self.records.line_num == line else f", in the row that begins in line {line}"
        else:
            found = f"line {line}: {error}"
        return f"{found}; close quotation marks, and double those inside of quoted fields{PLAIN_QUOTES}"

    def _check_width(self, line: int, record: list[str], columns: int) -> None:
        if len(record) < columns:
            self.short.append(line)
        elif len(record) > columns:
            hint = "" if self.plain else ", quote fields that hold the delimiter"
            over = "" if line not in self.over_lines[-1:] else PLAIN_QUOTES
            raise UnreadableError(
                f"line {line} has {len(record)} fields, but the first line names {columns} columns; name every column "
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
                f"{shortened(header[0])!r}, with {SEPARATORS[found]} in its name; save the file with {wanted} between "
                f"the columns{instead}, or set data.delimiter: {_in_yaml(found)}"
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
