"""What was read of one split: the columns that a task uses, and where they stand in their file."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pave_lightning.errors import nearest


class ColumnForm(StrEnum):
    """What a column holds."""

    TEXT = "a text"
    LABEL = "a label"
    IMAGE = "an image"
    TEXTS = "a list of texts"
    LABELS = "a list of labels"
    ANY_TEXTS = "a text, a list of texts, or nothing"
    ANY_LABELS = "a label, a list of labels, or nothing"

    @property
    def example(self) -> str:
        """How an entry is written in JSON."""
        plain = {"a text": '"..."', "a label": "...", "an image": '"path"', "a list of texts": '["...", ...]'}
        return plain.get(self, "[...]")


class UnreadableError(ValueError):
    """A file that cannot be read as it should; the words are for the user and do not name the file."""


@dataclass(frozen=True)
class Rows:
    """The used columns of one split.

    Attributes:
        columns: the used columns that are there, all of one length; missing values are null.
        count: how many rows there are.
        known: names of all columns of the source.
        lines: for text files the line, counted from 1, in which each row begins; None elsewhere.
        untyped: whether everything in the file is text (.csv and .tsv), so that the task alone says what is a number.
        own_names: for labels that are numbers with names of their own (a ``ClassLabel``), these names in index order.
        faults: what is wrong with single values, in words that begin with the column; such columns are not in
            ``columns``.
        remarks: what is worth saying about a file that can be used.
    """

    columns: dict[str, pa.ChunkedArray]
    count: int
    known: list[str]
    lines: npt.NDArray[np.int64] | None = None
    untyped: bool = False
    own_names: list[str] | None = None
    faults: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def place(self, row: int) -> str:
        """Where a row stands, for messages."""
        line = "" if self.lines is None else f", line {self.lines[row]}"
        return f"row {row} (counted from 0){line}"

    def places(self, bad: npt.NDArray[np.bool_], index: npt.NDArray[np.int64] | None = None) -> str:
        """Where marked rows stand, for messages.

        Args:
            bad: marks some rows, at least one.
            index: the rows that ``bad`` speaks of; all rows where nothing is given.
        """
        first = int(bad.argmax()) if index is None else int(index[bad.argmax()])
        count = int(bad.sum())
        return self.place(first) if count == 1 else f"{count} rows, first in {self.place(first)}"


def find_column(name: str, header: Sequence[str]) -> int | None:
    """The place of a column in a header.

    Whitespace around names and their form of Unicode are ignored where no name is exactly the same.

    Returns:
        Its index, or None where no column has that name.

    Raises:
        UnreadableError: several columns have it.
    """
    plain = unicodedata.normalize("NFC", name)
    alike = [unicodedata.normalize("NFC", known).strip() for known in header]
    for names, wanted in ((list(header), name), (alike, plain)):
        if names.count(wanted) > 1:
            raise UnreadableError(f"{names.count(wanted)} columns are named '{name}'; rename or remove all but one")
        if wanted in names:
            return names.index(wanted)
    return None


def column_path(name: str, header: Sequence[str]) -> tuple[int, tuple[str, ...]] | None:
    """Where a name leads: to a column of a header, and from there into objects, as ``answers.text`` does.

    A column that has the whole name comes first.

    Returns:
        The column's index, and the keys that are followed inside of it; None where there is no such column.

    Raises:
        UnreadableError: several columns have its name.
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = find_column(".".join(parts[:end]), header)
        if place is not None:
            return place, tuple(parts[end:])
    return None


def no_column(name: str, known: Sequence[str]) -> str:
    """What to say of a column that is not there."""
    return f"there is no column '{name}'; {nearest(name, known)}"
