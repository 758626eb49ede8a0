"""Columns of lists, one entry a word: what is wrong with them, and their labels read as those of single values are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pave_lightning.tasks.reading import is_text
from pave_lightning.tasks.rows import Rows


@dataclass(frozen=True)
class Entries(Rows):
    """The entries of a column of lists, as rows of their own that know where they stand.

    Attributes:
        outer: the rows that hold the lists.
        row_of: int64 of shape ``(n,)``: the row of each entry.
        first_of: int64 of shape ``(n,)``: the first entry of the same list.
    """

    outer: Rows = field(default_factory=lambda: Rows({}, 0, []))
    row_of: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    first_of: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def place(self, row: int) -> str:
        """Where an entry stands, for messages."""
        return f"entry {row - self.first_of[row]} (counted from 0) of {self.outer.place(int(self.row_of[row]))}"


def entries(rows: Rows, name: str) -> Entries:
    """The entries of a column of lists, of which `list_problems` tells nothing."""
    lists = rows.columns[name].combine_chunks()
    sizes = list_sizes(rows, name)
    starts = np.cumsum(sizes) - sizes
    flat = pa.chunked_array([pc.list_flatten(lists)])
    return Entries(
        {name: flat},
        len(flat),
        rows.known,
        own_names=rows.own_names,
        outer=rows,
        row_of=np.repeat(np.arange(len(sizes)), sizes),
        first_of=np.repeat(starts, sizes),
    )


def list_sizes(rows: Rows, name: str) -> npt.NDArray[np.int64]:
    """How many entries each list of a column has, int64 of shape ``(n,)``."""
    found = pc.fill_null(pc.list_value_length(rows.columns[name]), 0)
    return np.asarray(found.to_numpy(), dtype=np.int64)


def with_sizes(flat: pa.Array | pa.ChunkedArray, sizes: npt.NDArray[np.int64]) -> pa.Array:
    """Entries put into lists of these sizes."""
    whole = flat.combine_chunks() if isinstance(flat, pa.ChunkedArray) else flat
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), whole)


def list_problems(rows: Rows, name: str, *, texts: bool, empty: bool = False) -> Iterator[str]:
    """What is wrong with a column of lists whatever its entries mean, in words that begin with the column.

    Args:
        rows: all rows of a split.
        name: the column.
        texts: whether entries must be texts, of which none may be empty.
        empty: whether lists may be empty.
    """
    column = rows.columns[name]
    kind, what = column.type, "texts" if texts else "labels"
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        yield f"column '{name}' must hold lists of {what}, but holds {kind}; name another column"
        return
    missing = _flags(pc.is_null(column))
    if missing.any():
        yield f"column '{name}' has no list in {rows.places(missing)}; fill them in or leave these rows out"
        return
    without = list_sizes(rows, name) == 0
    if without.any() and not empty:
        yield f"column '{name}' has an empty list in {rows.places(without)}; leave these rows out"
    if pa.types.is_null(kind.value_type) or without.all():
        return
    if texts and not is_text(kind.value_type):
        yield f"column '{name}' must hold lists of texts, but holds lists of {kind.value_type}; name another column"
        return
    found = entries(rows, name)
    blank = pc.is_null(found.columns[name])
    if texts:
        blank = pc.or_kleene(blank, pc.equal(pc.utf8_trim_whitespace(found.columns[name]), ""))
    marked = _flags(pc.fill_null(blank, True))
    if marked.any():
        yield f"column '{name}' holds nothing in {found.places(marked)}; fill it in or leave it out"


def repeated(rows: Rows, name: str, indices: npt.NDArray[np.int64]) -> Iterator[str]:
    """Rows whose lists hold the same label twice, as lists of 0 and 1 for each class do.

    Args:
        rows: all rows of a split.
        name: the column, of which `list_problems` tells nothing.
        indices: int64 of shape ``(n,)``: the class of each entry.
    """
    row_of = entries(rows, name).row_of
    _, counts = np.unique(np.stack([row_of, indices], axis=1), axis=0, return_counts=True)
    twice = np.zeros(rows.count, dtype=np.bool_)
    twice[np.unique(np.stack([row_of, indices], axis=1), axis=0)[counts > 1, 0]] = True
    if twice.any():
        yield (
            f"column '{name}' holds the same label twice in {rows.places(twice)}; expected the indices or names of the "
            "classes that hold (not 0 or 1 for each class, which columns of their own may hold)"
        )


def unequal(rows: Rows, first: str, second: str) -> Iterator[str]:
    """Rows whose lists in two columns are not of one length."""
    sizes, others = list_sizes(rows, first), list_sizes(rows, second)
    differ = sizes != others
    if differ.any():
        row = int(differ.argmax())
        yield (
            f"columns '{first}' and '{second}' must have lists of one length, but have {sizes[row]} and {others[row]} "
            f"entries in {rows.places(differ)}; correct or leave out these rows"
        )


def _flags(values: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    return np.asarray(values.to_numpy(), dtype=np.bool_)
