"""What a written label means: a class name or a class index, decided by the task and never by a guess over a file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pave_lightning.errors import PaveError, listed

Reading = Literal["names", "indices"]
Form = Literal["texts", "numbers", "booleans"]

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
INFINITE = re.compile(r"[+-]?inf(inity)?", re.IGNORECASE)


def match_names(names: Iterable[str], classes: Sequence[str]) -> list[int | None]:
    """The index of the class that each name means.

    A name that is written exactly like a class means that class. Otherwise case, surrounding whitespace and the form of
    Unicode (one character or several for an accented letter) are ignored, unless two classes differ by these alone.

    Args:
        names: names as somebody wrote them, such as the labels of a file or the ``id2label`` of a head.
        classes: names of the classes in index order.

    Returns:
        One entry for each name: an index into ``classes``, or None where no class has that name.
    """
    exact = {name: index for index, name in enumerate(classes)}
    folded = {_folded(name): index for index, name in enumerate(classes)}
    if len(folded) < len(classes):
        folded = {}
    return [exact.get(name, folded.get(_folded(name))) for name in names]


def number_in(text: str) -> float | None:
    """The number that a text spells, infinity included; None where it spells none."""
    text = text.strip()
    if NUMBER.fullmatch(text) or INFINITE.fullmatch(text):
        return float(text)
    return None


@dataclass(frozen=True)
class LabelValues:
    """The distinct labels of one column.

    Attributes:
        form: whether they are written as texts, numbers or booleans.
        values: the labels without missing ones: str, int or float, or bool.
        names: the names that the column itself gives to its numbers (a ``ClassLabel``), in the order of its indices.
    """

    form: Form
    values: tuple[Any, ...]
    names: tuple[str, ...] = field(default=())

    def by_name(self, classes: Sequence[str]) -> list[int | None]:
        """The class index of each value read as a class name; None where no class has that name."""
        if self.names:
            own = match_names(self.names, classes)
            return [own[int(value)] if value in range(len(own)) else None for value in self.values]
        if self.form == "texts":
            found = match_names(self.values, classes)
            return [
                _spelled(text, classes) if index is None else index
                for text, index in zip(self.values, found, strict=True)
            ]
        if self.form == "booleans":
            return match_names(["true" if value else "false" for value in self.values], classes)
        return [_of_value(value, classes) for value in self.values]

    def by_index(self, classes: Sequence[str]) -> list[int | None]:
        """The class index of each value read as an index; None where it is none."""
        if self.form == "booleans":
            return [None] * len(self.values)
        numbers = [number_in(value) if self.form == "texts" else value for value in self.values]
        return [int(number) if number is not None and number in range(len(classes)) else None for number in numbers]


def readings_conflict(classes: Sequence[str]) -> bool:
    """Whether some label could be the name of one class and the index of another, such as 1 for ``["1", "2"]``."""
    numbers = [number_in(name) for name in classes]
    return any(number in range(len(classes)) and number != index for index, number in enumerate(numbers))


def label_reading(columns: Sequence[LabelValues], classes: Sequence[str]) -> Reading | None:
    """How the labels of one column are to be read; all values of all given parts of it are read in one way.

    Texts are names where every value is the name of a class, or else indices where every value is an index. Numbers
    are indices, unless the names of the classes look like numbers: then names, where every value is one. Numbers that
    could be either, and mean different classes, are refused.

    Args:
        columns: what the column holds in each split that is to be read in the same way; columns that name their own
            numbers are no question, see `own_reading`.
        classes: names of the classes in index order.

    Returns:
        The reading; None where some labels are neither.

    Raises:
        PaveError: numbers could be names as well as indices, and mean different classes.
    """
    names = [index for column in columns for index in column.by_name(classes)]
    indices = [index for column in columns for index in column.by_index(classes)]
    if None in names:
        return None if None in indices else "indices"
    if None in indices:
        return "names"
    if names == indices:
        return "indices"
    typed = [value for column in columns if column.form == "numbers" for value in column.values]
    if typed:
        raise PaveError(
            f"the labels are the numbers {listed([f'{value:g}' for value in sorted(set(typed))], 5)}, which are names "
            f"of classes ({', '.join(classes)}) as well as indices of other classes (counted from 0); write them as "
            "texts, which are taken for names, or give the classes names that do not look like numbers"
        )
    return "names"


def own_reading(names: Sequence[str], classes: Sequence[str]) -> Reading:
    """How a column is to be read whose numbers have names of their own (a ``ClassLabel`` of `datasets`).

    Args:
        names: the column's own names in the order of its indices.
        classes: names of the task's classes in index order.

    Returns:
        ``"indices"`` where both have the same order, or where the task gives other names to the classes; ``"names"``
        where the same names come in another order.

    Raises:
        PaveError: some names are those of classes at another place, and others are unknown.
    """
    found = match_names(names, classes)
    if all(index in (None, place) for place, index in enumerate(found)):
        return "indices"
    if None in found:
        raise PaveError(
            f"counts its classes in the order {', '.join(names)}, but 'classes' in the order {', '.join(classes)}; "
            "give 'classes' in the order of the data, or with the same names"
        )
    return "names"


def as_labels(column: pa.ChunkedArray, values: LabelValues, reading: Reading, classes: Sequence[str]) -> Any:
    """The column as the task's own labels, where that differs from what stands there.

    Args:
        column: the labels, none of them missing.
        values: its distinct values, all of them valid under ``reading``.
        reading: how they are read.
        classes: names of the classes in index order.

    Returns:
        An Arrow array or chunked array of class names in the spelling of ``classes``, or of whole class indices.
    """
    if reading == "indices" and values.form == "numbers":
        return column
    found = values.by_name(classes) if reading == "names" else values.by_index(classes)
    own = [classes[index or 0] for index in found] if reading == "names" else found
    coded = column.combine_chunks().dictionary_encode()
    if isinstance(coded, pa.ChunkedArray):
        coded = coded.unify_dictionaries().combine_chunks()
    meaning = dict(zip(values.values, own, strict=True))
    mapped = pa.array([meaning[value] for value in coded.dictionary.to_pylist()])
    return mapped.take(coded.indices)


def class_indices(labels: list[Any], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """Checked labels, class names or class indices, as indices: int64 of shape ``(n,)``.

    Args:
        labels: the labels.
        classes: names of the classes in index order.
    """
    indices = {name: index for index, name in enumerate(classes)}
    return np.asarray([indices[label] if isinstance(label, str) else label for label in labels], dtype=np.int64)


def _spelled(text: str, classes: Sequence[str]) -> int | None:
    """The class whose name spells the same number as a text does, such as 1 for 1.0 or 01."""
    number = number_in(text)
    return None if number is None else _of_value(number, classes)


def _of_value(value: float, classes: Sequence[str]) -> int | None:
    """The one class whose name spells a number; None where none does, or several do."""
    numbers = [number_in(name) for name in classes]
    return numbers.index(value) if numbers.count(value) == 1 else None


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().casefold()
