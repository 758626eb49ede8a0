"""What the columns of files hold, looked at before anybody has said what they mean."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from pave_lightning.errors import listed, shortened
from pave_lightning.tasks.labels import number_in
from pave_lightning.tasks.options import MOST_CLASSES

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


# Stands in columns in place of each image.
IMAGE = object()
_IMAGE_FILE = re.compile(r".+\.(jpe?g|png|webp|bmp|gif|tiff?)", re.IGNORECASE)


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
