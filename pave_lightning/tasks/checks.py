"""Find in the rows of one split everything that a task cannot use: columns, texts and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pave_lightning.errors import PaveError, nearest
from pave_lightning.tasks.labels import (
    LabelValues,
    Reading,
    as_labels,
    label_reading,
    match_names,
    number_in,
    own_reading,
)
from pave_lightning.tasks.reading import is_text
from pave_lightning.tasks.rows import Rows, no_column
from pave_lightning.tasks.task import Task

MISSING_LABELS = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None")


def row_problems(task: Task, rows: Rows, where: str, reading: Reading | None = None) -> list[str]:
    """Everything that is wrong with the columns that a task uses.

    Args:
        task: its columns are looked at.
        rows: all rows of a split; row numbers in messages count from 0 within them, lines of their file from 1.
        where: begins every message, such as ``"task 'movie', test split (test.csv)"``.
        reading: how class labels are read, where other splits decide it too; otherwise these rows alone do.

    Returns:
        One message a problem; empty if all is well.
    """
    problems = []
    for name in task.columns:
        if name in rows.faults:
            problems.append(rows.faults[name])
        elif name not in rows.columns:
            problems.append(no_column(name, rows.known))
    return [f"{where}: {problem}" for problem in (*problems, *task.problems(rows, reading))]


@dataclass(frozen=True)
class LabelColumn:
    """The labels of one split, one a row: class names or indices, or numbers.

    Attributes:
        rows: all rows of the split.
        name: the column.
        given: how class labels are read, where other splits decide it too; otherwise these rows alone do.
        classes: names of the classes in index order; None where labels are numbers.
        value_range: lowest and highest number.
    """

    rows: Rows
    name: str
    given: Reading | None
    classes: Sequence[str] | None = None
    value_range: tuple[float, float] | None = None

    @cached_property
    def column(self) -> pa.ChunkedArray:
        """The labels, null where they are missing."""
        column = self.rows.columns[self.name]
        if not self.rows.untyped:
            return column
        words = [word for word in MISSING_LABELS if match_names([word], self.classes or ()) == [None]]
        return pc.if_else(pc.is_in(column, value_set=pa.array(words, pa.string())), None, column)

    @cached_property
    def missing(self) -> npt.NDArray[np.bool_]:
        """Which rows have no label."""
        return _flags(pc.is_null(self.column, nan_is_null=True))

    @cached_property
    def present(self) -> pa.ChunkedArray:
        """The labels that are not missing."""
        return self.column.filter(pa.array(~self.missing))

    @cached_property
    def index(self) -> npt.NDArray[np.int64]:
        """The rows of ``present``."""
        return np.flatnonzero(~self.missing)

    @property
    def is_plain(self) -> bool:
        """Whether the column is of a type that labels may have."""
        kind = self.column.type
        return is_text(kind) or _is_number(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)

    @cached_property
    def values(self) -> LabelValues:
        """The distinct labels."""
        kind = self.present.type
        if is_text(kind):
            return LabelValues("texts", tuple(self.present.unique().to_pylist()))
        if pa.types.is_boolean(kind):
            return LabelValues("booleans", tuple(self.present.unique().to_pylist()))
        numbers = self.present if pa.types.is_integer(kind) else self.present.cast(pa.float64(), safe=False)
        return LabelValues("numbers", tuple(numbers.unique().to_pylist()), tuple(self.rows.own_names or ()))

    @property
    def floats(self) -> npt.NDArray[np.float64]:
        """The present labels as numbers; NaN where a text spells none."""
        if is_text(self.present.type):
            spelt = {text: number_in(text) for text in self.values.values}
            numbers = [spelt[text] for text in self.present.to_pylist()]
            return np.asarray([np.nan if number is None else number for number in numbers], dtype=np.float64)
        return np.asarray(self.present.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)

    def reading(self) -> Reading | None:
        """How class labels are read; None where some of them are neither names nor indices.

        Raises:
            PaveError: they could be read in two ways.
        """
        classes = self.classes or ()
        if self.values.names:
            return own_reading(self.values.names, classes)
        return self.given or label_reading([self.values], classes)

    def problems(self) -> list[str]:
        """What is wrong with them, in words that go on after the name of the column."""
        booleans = pa.types.is_boolean(self.column.type) and self.classes is None
        if not self.is_plain or booleans:
            wanted = "numbers" if self.classes is None else "class indices or class names"
            return [f"must hold {wanted}, but holds {self.column.type}; convert it or name another column"]
        problems = []
        if self.missing.any():
            places = self.rows.places(self.missing)
            problems.append(f"has no label in {places}; fill them in or leave these rows out")
        if self.classes is None:
            return problems + self._regression_problems()
        try:
            reading = self.reading()
        except PaveError as error:
            return [*problems, str(error)]
        return problems + self._class_problems(reading, self.classes)

    def usable(self) -> pa.Array | pa.ChunkedArray:
        """The labels, of which none is wrong, as the task takes them."""
        if self.classes is None:
            return pa.array(self.floats) if self.rows.untyped else self.column
        reading = self.reading() or "indices"
        return as_labels(self.present, self.values, reading, self.classes)

    def _regression_problems(self) -> list[str]:
        low, high = self.value_range or (-np.inf, np.inf)
        wanted, advice = f"numbers from {low:g} to {high:g}", "correct these rows or 'value_range'"
        if is_text(self.present.type):
            bad = np.isnan(self.floats)
            if bad.any():
                example = self.present[int(bad.argmax())].as_py()
                places = self.rows.places(bad, self.index)
                return [f"must hold numbers, but {example!r} is none, in {places}; correct or remove these rows"]
            if not self.rows.untyped:
                return ["must hold numbers, but holds them as texts; write them without quotes"]
        return self._number_problems(low, high, wanted, advice)

    def _class_problems(self, reading: Reading | None, classes: Sequence[str]) -> list[str]:
        values = self.values
        if reading is None:
            # Told in the terms of whoever wrote them: as indices where they are numbers and the names are not.
            numbers = values.form != "booleans" and not any(
                values.form == "texts" and number_in(value) is None for value in values.values
            )
            reading = "indices" if numbers and all(number_in(name) is None for name in classes) else "names"
        if reading == "indices" and values.form == "booleans":
            return ["must hold class indices or class names, but holds true or false; convert it"]
        if reading == "indices" or values.names:
            high = len(values.names or classes) - 1
            advice = "correct 'classes', or leave out rows without a known label"
            return self._number_problems(0, high, f"class indices from 0 to {high}", advice, whole=True)
        unknown = {value for value, index in zip(values.values, values.by_name(classes), strict=True) if index is None}
        if not unknown:
            return []
        found = [value for value in values.values if value in unknown][:3]
        shown = [repr(value) if isinstance(value, str) else f"{value:g}" for value in found]
        if values.form == "booleans":
            shown = ["true" if value else "false" for value in found]
        column = self.present if pa.types.is_integer(self.present.type) or values.form != "numbers" else self.floats
        listed = column.tolist() if isinstance(column, np.ndarray) else column.to_pylist()
        bad = np.asarray([value in unknown for value in listed], dtype=np.bool_)
        return [
            f"must hold one of the classes {', '.join(classes)}, but holds {', '.join(shown)} in "
            f"{self.rows.places(bad, self.index)}; {nearest(str(found[0]), classes)}"
        ]

    def _number_problems(self, low: float, high: float, wanted: str, advice: str, whole: bool = False) -> list[str]:
        values, problems = self.floats, []
        broken = np.isnan(values)
        infinite = np.abs(values) > np.finfo(np.float32).max  # models compute in float32
        if broken.any():
            example = self.present[int(broken.argmax())].as_py()
            places = self.rows.places(broken, self.index)
            problems.append(f"must hold {wanted}, but holds {example!r} in {places}; {advice}")
        if infinite.any():
            places = self.rows.places(infinite, self.index)
            problems.append(f"must hold finite numbers of float32, but is infinite in {places}; correct these rows")
        finite = np.isfinite(values)
        fractions = finite & (values != np.floor(values)) & whole
        if fractions.any():
            found, places = _examples(values[fractions]), self.rows.places(fractions, self.index)
            problems.append(f"must hold whole numbers, but holds {found} in {places}; is it regression?")
        outside = finite & ((values < low) | (values > high))
        if outside.any():
            found, places = _examples(values[outside]), self.rows.places(outside, self.index)
            problems.append(f"must hold {wanted}, but holds {found} in {places}; {advice}")
        return problems


def text_problems(rows: Rows, name: str) -> list[str]:
    """What is wrong with a column of texts, in words that begin with the column."""
    column = rows.columns[name]
    # null: a column without a single value, which the count of missing texts tells better.
    if not is_text(column.type) and not pa.types.is_null(column.type):
        return [f"column '{name}' must hold texts, but holds {column.type}; quote the values or name another column"]
    missing = _flags(pc.is_null(column))
    if missing.any():
        return [f"column '{name}' has no text in {rows.places(missing)}; fill them in or leave these rows out"]
    return []


def blank_problems(rows: Rows, name: str) -> list[str]:
    """Texts of a column, of which none is missing, that hold nothing but blanks."""
    texts = rows.columns[name].to_pylist()
    blank = np.asarray([not text.strip() for text in texts], dtype=np.bool_)
    if not blank.any():
        return []
    return [f"column '{name}' holds an empty text in {rows.places(blank)}; fill them in or leave these rows out"]


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _flags(values: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    return np.asarray(values.to_numpy(), dtype=np.bool_)


def _examples(values: npt.NDArray[np.float64]) -> str:
    return ", ".join(f"{value:g}" for value in np.unique(values)[:3])
