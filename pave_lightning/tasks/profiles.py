"""What the columns of files hold, looked at before anybody has said what they mean."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pave_lightning.errors import listed, reason, shortened
from pave_lightning.tasks.delimited import SEPARATORS, read_delimited
from pave_lightning.tasks.json_rows import json_objects
from pave_lightning.tasks.labels import number_in
from pave_lightning.tasks.options import MOST_CLASSES, Data
from pave_lightning.tasks.reading import DELIMITED, check_parquet, class_names_of, ending_of, plain_column
from pave_lightning.tasks.rows import ColumnForm, UnreadableError

# Names that columns of labels, texts and row numbers usually have, in lower case.
LABELS = ("label", "labels", "class", "category", "target", "gold_label", "sentiment", "intent", "emotion", "topic")
SCORES = (
    "score",
    "scores",
    "rating",
    "ratings",
    "stars",
    "similarity",
    "similarity_score",
    "relatedness_score",
    "value",
)
TEXTS = ("text", "sentence", "content", "body", "review", "comment", "utterance", "tweet", "document", "message")
PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")),
    *(("text_a", "text_b"), ("text1", "text2"), ("sentence_a", "sentence_b"), ("query", "passage")),
)
ROW_NUMBERS = ("", "id", "idx", "index", "uid", "guid", "row", "row_id", "pairid", "unnamed: 0")
# Words that a class or a choice has at most, and rows that each class has at least, where nothing else tells labels.
LONGEST_LABEL = 4
ROWS_OF_A_CLASS = 4
# Whole numbers of more values than these are measured, not counted as classes.
MOST_NUMBERED = 20


class Holds(StrEnum):
    """What a column holds."""

    TEXTS = "texts"
    WHOLE_NUMBERS = "whole numbers"
    NUMBERS = "numbers"
    FLAGS = "true or false"
    LISTS_OF_TEXTS = "lists of texts"
    LISTS_OF_NUMBERS = "lists of whole numbers"
    LISTS_OF_OBJECTS = "lists of objects"
    OBJECTS = "objects"
    IMAGES = "images"
    NOTHING = "nothing"
    OTHER = "values of several kinds"


@dataclass(frozen=True)
class Column:
    """One column of a file, or of the same files of several splits.

    Attributes:
        name: its name.
        holds: what its values are; numbers that a csv file spells as texts are numbers.
        values: the values of all rows; None where one is missing. Images are left out.
        class_names: the names that the column itself gives to its numbers, in the order of their indices.
    """

    name: str
    holds: Holds
    values: Sequence[Any] = field(repr=False)
    class_names: tuple[str, ...] = ()

    @cached_property
    def distinct(self) -> list[Any]:
        """The distinct values, or distinct entries of lists, in ascending order; missing ones are left out."""
        if self.holds in (Holds.LISTS_OF_TEXTS, Holds.LISTS_OF_NUMBERS):
            return sorted({entry for own in self.values if own for entry in own})
        if self.holds in (Holds.TEXTS, Holds.WHOLE_NUMBERS, Holds.NUMBERS, Holds.FLAGS):
            return sorted({value for value in self.values if value is not None})
        return []

    @cached_property
    def words(self) -> float:
        """The mean number of words of its texts."""
        texts = [value for value in self.values if isinstance(value, str)]
        return sum(len(text.split()) for text in texts) / max(len(texts), 1)

    @cached_property
    def sizes(self) -> list[int | None]:
        """How many entries the list of each row has; None where there is no list."""
        return [len(value) if isinstance(value, list) else None for value in self.values]

    @cached_property
    def keys(self) -> frozenset[str]:
        """The keys that all of its objects have."""
        objects = [one for own in self.values for one in (own if isinstance(own, list) else [own]) if one is not None]
        return frozenset.intersection(*map(frozenset, objects)) if objects else frozenset()

    @property
    def is_numeric(self) -> bool:
        """Whether it holds numbers."""
        return self.holds in (Holds.WHOLE_NUMBERS, Holds.NUMBERS)

    @property
    def numbers_rows(self) -> bool:
        """Whether it does nothing but tell rows apart."""
        return self.name.strip().casefold() in ROW_NUMBERS

    @property
    def has_few(self) -> bool:
        """Whether it holds few values again and again."""
        if self.numbers_rows or self.holds not in (Holds.TEXTS, Holds.WHOLE_NUMBERS, Holds.FLAGS):
            return False
        return 2 <= len(self.distinct) <= min(MOST_CLASSES, len(self.values) / ROWS_OF_A_CLASS)

    @property
    def repeats(self) -> bool:
        """Whether it holds few, short values again and again, as a column of classes does."""
        return self.has_few and (self.holds is not Holds.TEXTS or self.words <= LONGEST_LABEL)

    @property
    def classes(self) -> int | list[Any]:
        """What a recipe says of the classes: their number where labels are indices, or else their names."""
        if self.class_names:
            return list(self.class_names)
        whole = self.holds in (Holds.WHOLE_NUMBERS, Holds.LISTS_OF_NUMBERS)
        if whole and self.distinct and self._are_indices:
            return max(int(self.distinct[-1]) + 1, 2)
        return [str(value).lower() if isinstance(value, bool) else value for value in self.distinct]

    @property
    def _are_indices(self) -> bool:
        """Whether numbers count classes from 0, of which few are missing."""
        return bool(self.distinct[0] == 0 and self.distinct[-1] < 2 * len(self.distinct))

    def __str__(self) -> str:
        """Its name and what it holds, for people."""
        about = str(self.holds)
        if self.holds in (Holds.LISTS_OF_OBJECTS, Holds.OBJECTS) and self.keys:
            about = f"{about} with {listed(sorted(self.keys), 5)}"
        elif self.holds is Holds.TEXTS and not self.repeats:
            about = f"{about} of {self.words:.0f} words" if self.words >= 2 else about
        elif self.distinct and self.is_numeric and len(self.distinct) > 5:
            about = f"{about} from {self.distinct[0]:g} to {self.distinct[-1]:g}"
        elif self.distinct and len(self.distinct) <= MOST_NUMBERED:
            about = f"{about}: {listed([shortened(str(value), 20) for value in self.distinct], 5)}"
        return f"'{self.name}' ({about})"


@dataclass(frozen=True)
class Profile:
    """The columns of a task's files.

    Attributes:
        columns: those that every file has, in the order of the first one.
        rows: how many rows there are, of all files.
        base: the base model's ``config.json``; empty where it is not known.
    """

    columns: tuple[Column, ...]
    rows: int
    base: Mapping[str, Any] = field(default_factory=dict)

    def column(self, name: str) -> Column | None:
        """The column of that name; None where there is none."""
        return next((column for column in self.columns if column.name == name), None)

    def named(self, names: Iterable[str], *holding: Holds) -> Column | None:
        """The first column with one of the usual names, in the order of the names, and one of these contents."""
        for name in names:
            for column in self.columns:
                if column.name.strip().casefold() == name and (not holding or column.holds in holding):
                    return column
        return None

    def texts(self, without: Collection[str] = ()) -> list[Column]:
        """The columns of texts that are not left out."""
        return [
            column
            for column in self.columns
            if column.holds is Holds.TEXTS and column.name not in without and not column.numbers_rows
        ]

    def label(self, without: Collection[str] = ()) -> Column | None:
        """The column that is most likely the label of a row; None where several are as likely."""
        columns = [one for one in self.columns if one.name not in without]
        for name in (*LABELS, *SCORES):
            for column in columns:
                if column.name.strip().casefold() == name and (column.has_few or column.is_numeric):
                    return column
        likely = [column for column in columns if column.repeats or (column.is_numeric and not column.numbers_rows)]
        likely = [column for column in likely if len(column.distinct) < self.rows]
        return likely[0] if len(likely) == 1 else None

    def shown(self, without: Collection[str] = ()) -> list[str] | None:
        """The column, or the two columns, of the text that is judged; None where several are as likely."""
        texts = {column.name.strip().casefold(): column.name for column in self.texts(without)}
        for one, other in PAIRS:
            if one in texts and other in texts:
                return [texts[one], texts[other]]
        if len(texts) == 1:
            return list(texts.values())
        known = [texts[name] for name in TEXTS if name in texts]
        return known[:1] if len(known) == 1 else None


@dataclass(frozen=True)
class Suggestion:
    """What the files of a task look like to one kind of task.

    Attributes:
        options: the kind's options, as a recipe spells them.
        certainty: how sure it is; the surest kind is taken. A kind that looks for more is the surer one.
        remark: what else the columns could mean, for a comment; empty where there is nothing to say.
    """

    options: Mapping[str, Any]
    certainty: int
    remark: str = ""


@dataclass(frozen=True)
class FileColumns:
    """All columns of one file.

    Attributes:
        columns: the values of all rows by column; None where one is missing. Images are left out.
        rows: how many rows there are.
        class_names: the names that columns give to their numbers.
        spelled: whether everything in the file is text, so that numbers are spelled out.
        delimiter: what stands between the columns, where that is not what the file's ending says.
    """

    columns: Mapping[str, Sequence[Any]] = field(repr=False)
    rows: int
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    spelled: bool = False
    delimiter: str | None = None


def profile_of_files(read: Sequence[FileColumns], base: Mapping[str, Any] | None = None) -> Profile:
    """The profile of files that are splits of one data set.

    Args:
        read: the files, one or more.
        base: the base model's ``config.json``.
    """
    columns = []
    for name in (name for name in read[0].columns if all(name in other.columns for other in read)):
        values = [value for one in read for value in one.columns[name]]
        class_names = next((one.class_names[name] for one in read if name in one.class_names), ())
        columns.append(profile_of(name, values, class_names, spelled=read[0].spelled))
    return Profile(tuple(columns), sum(one.rows for one in read), base or {})


def profile_of(name: str, values: Sequence[Any], class_names: Sequence[str] = (), *, spelled: bool = False) -> Column:
    """The profile of one column.

    Args:
        name: its name.
        values: its values; None where one is missing.
        class_names: the names that it gives to its numbers.
        spelled: whether all values are texts, so that numbers are spelled out.

    Example:
        >>> profile_of("stars", ["1", "5", "3"], spelled=True).holds
        <Holds.WHOLE_NUMBERS: 'whole numbers'>
    """
    found = [value for value in values if value is not None]
    if spelled and found and all(number_in(value) is not None for value in found):
        values = [None if value is None else _number(value) for value in values]
        found = [value for value in values if value is not None]
    holds = _holds(found)
    if holds is Holds.NUMBERS and all(float(value).is_integer() for value in found):
        holds, values = Holds.WHOLE_NUMBERS, [None if value is None else int(value) for value in values]
    return Column(name, holds, values, tuple(class_names))


def read_columns(file: Path) -> FileColumns:
    """All columns of a csv, tsv, json, jsonl or parquet file, or image and label of a folder with one folder a class.

    Raises:
        UnreadableError: the file cannot be read.
        OSError: the file cannot be opened.
    """
    if file.is_dir():
        from pave_lightning.tasks.images import folder_rows

        rows = folder_rows(file, "image", "label")
        labels = rows.columns["label"].to_pylist()
        return FileColumns({"image": [_IMAGE] * rows.count, "label": labels}, rows.count)
    ending = ending_of(file)
    content = file.read_bytes()
    if ending in DELIMITED:
        return _delimited(content, ending)
    if ending == ".parquet":
        return _parquet(content)
    columns: dict[str, list[Any]] = {}
    count = 0
    for line, row in json_objects(content):
        if not isinstance(row, dict):
            raise UnreadableError(f"line {line} holds no object, but every row must be one")
        for name in row:
            if name not in columns:
                columns[name] = [None] * count
        for name, values in columns.items():
            values.append(row.get(name))
        count += 1
    return FileColumns(columns, count)


def _delimited(content: bytes, ending: str) -> FileColumns:
    first = content.split(b"\n", 1)[0].decode("utf-8", "replace")
    usual = "\t" if ending == ".tsv" else ","
    mark = max(SEPARATORS, key=first.count)
    other = mark if usual not in first and mark in first else None
    data = Data(train=f"rows{ending}", delimiter=other)
    names = read_delimited(content, data, ending, {}).known
    rows = read_delimited(content, data, ending, dict.fromkeys(names, ColumnForm.TEXT))
    columns = {name: column.to_pylist() for name, column in rows.columns.items()}
    return FileColumns(columns, rows.count, spelled=True, delimiter=other)


def _parquet(content: bytes) -> FileColumns:
    check_parquet(content)
    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
        columns = {
            name: [_IMAGE] * table.num_rows if _is_image(column.type) else plain_column(column).to_pylist()
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise UnreadableError(f"the file cannot be read as parquet ({reason(error)}); save it anew") from error
    named = {name: class_names_of(table.schema.metadata, name) or () for name in columns}
    return FileColumns(columns, table.num_rows, {name: names for name, names in named.items() if names})


# Stands in place of each image.
_IMAGE = object()
_IMAGE_FILE = re.compile(r".+\.(jpe?g|png|webp|bmp|gif|tiff?)", re.IGNORECASE)


def _is_image(kind: pa.DataType) -> bool:
    """Whether a type of Arrow is that of images: bytes, or an object with some."""
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(place).name for place in range(kind.num_fields)}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _number(text: str) -> int | float:
    found = number_in(text) or 0.0
    return int(found) if found.is_integer() else found


def _holds(found: Sequence[Any]) -> Holds:
    kinds = {type(value) for value in found}
    if kinds == {str} and all(map(_IMAGE_FILE.fullmatch, found)):
        return Holds.IMAGES
    if kinds == {list}:
        inner = {type(entry) for own in found for entry in own}
        return _LISTS.get(next(iter(inner)), Holds.OTHER) if len(inner) == 1 else Holds.OTHER
    if kinds == {int, float}:
        return Holds.NUMBERS
    alike = {dict if issubclass(kind, dict) else kind for kind in kinds}  # one that names a key twice is a kind of dict
    return _SINGLE.get(alike.pop(), Holds.OTHER) if len(alike) == 1 else Holds.OTHER if alike else Holds.NOTHING


_SINGLE: dict[type, Holds] = {
    str: Holds.TEXTS,
    bool: Holds.FLAGS,
    int: Holds.WHOLE_NUMBERS,
    float: Holds.NUMBERS,
    dict: Holds.OBJECTS,
    object: Holds.IMAGES,
}
_LISTS: dict[type, Holds] = {str: Holds.LISTS_OF_TEXTS, int: Holds.LISTS_OF_NUMBERS, dict: Holds.LISTS_OF_OBJECTS}


def base_config(folder: Path) -> Mapping[str, Any]:
    """What a model's ``config.json`` says; nothing where there is none that can be read."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
