"""Read the used columns of .jsonl and .json files: one object a line, or one list of objects."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pave_lightning.errors import shortened
from pave_lightning.tasks.rows import ColumnForm, Rows, UnreadableError
from pave_lightning.tasks.text_files import SHOWN_CHARACTERS, check_bytes, opened

BATCH = 8192
KNOWN_COLUMNS = 1000
LIMITS = (-(2**63), 2**63 - 1)
WORDS = {str: "texts", bool: "true or false", int: "numbers", float: "numbers", list: "lists", dict: "objects"}


def read_json(content: bytes, columns: Mapping[str, ColumnForm]) -> Rows:
    """The used columns of a file of JSON objects: one a line, or all in one list.

    Args:
        content: the file.
        columns: names of the columns that are read, and what they hold.

    Returns:
        The rows; keys that an object lacks are missing values. Labels keep their type: texts, numbers (int64 where
        all are whole and fit, else float64) or booleans. Lists of texts or labels become Arrow lists.

    Raises:
        UnreadableError: the file is damaged, or holds anything but objects; the message names the line.
    """
    check_bytes(content)
    lines: array[int] = array("q")
    under_way = {name: _MAKERS[form](name, lines) for name, form in columns.items()}
    first, *_, last = columns
    known: dict[str, None] = {}
    for line, row in json_objects(content):
        if not isinstance(row, dict):
            raise UnreadableError(
                f"line {line} holds {_shown(row)}, but every row must be an object such as "
                f'{{"{first}": {columns[first].example}, "{last}": ...}}'
            )
        if isinstance(row, _Repeated):
            for name in row.keys_twice:
                if name in columns:
                    raise UnreadableError(f"line {line} holds the key '{name}' twice; remove one of them")
        if len(known) < KNOWN_COLUMNS:
            known.update(dict.fromkeys(row))
        lines.append(line)
        for name, column in under_way.items():
            value = _found(row, name)
            column.add(None if value is _NOTHING else value)
            if value is not _NOTHING:
                known.setdefault(name)  # which a dotted one is not by itself
    if len(lines) == 1 and not columns.keys() & known.keys():
        _refuse_wrapped(row, lines[0])
    found: dict[str, pa.ChunkedArray] = {}
    faults: dict[str, str] = {}
    for name, values in under_way.items():
        if values.fault:
            faults[name] = values.fault
        elif name in known or len(known) >= KNOWN_COLUMNS:
            found[name] = values.finished()
    return Rows(found, len(lines), list(known), np.asarray(lines, dtype=np.int64), faults=faults)


# What stands where an object has no such key.
_NOTHING = object()


def _found(row: dict[str, Any], name: str) -> Any:
    """What a row has under a name, or where a dotted one leads to; else nothing."""
    return row[name] if name in row else _inside(row, name) if "." in name else _NOTHING


def _inside(value: Any, name: str) -> Any:
    """What a dotted name leads to inside of an object, in each object of a list of them; else nothing."""
    if isinstance(value, list):
        found = [_inside(entry, name) for entry in value]
        return _NOTHING if any(entry is _NOTHING for entry in found) else found
    if not isinstance(value, dict):
        return _NOTHING
    if name in value:
        return value[name]
    first, _, rest = name.partition(".")
    return _inside(value[first], rest) if rest and first in value else _NOTHING


class _Texts:
    """A column of texts under way."""

    def __init__(self, name: str, lines: Sequence[int]) -> None:
        self.name, self.lines = name, lines
        self.values: list[str | None] = []
        self.parts: list[pa.Array] = []
        self.fault = ""

    def add(self, value: Any) -> None:
        if value is not None and not isinstance(value, str):
            if not self.fault:
                self.fault = (
                    f"column '{self.name}' must hold texts, but holds {_shown(value)} in {_place(self.lines)}; "
                    "quote the values or name another column"
                )
            value = None
        elif value is not None and not value.isascii():
            _check_characters(self.name, value, self.lines)
        self.values.append(value)
        if len(self.values) == BATCH:
            self._put_away()

    def _put_away(self) -> None:
        self.parts.append(pa.array(self.values, pa.string()))
        self.values.clear()

    def finished(self) -> pa.ChunkedArray:
        self._put_away()
        return pa.chunked_array(self.parts, pa.string())


class _Paths(_Texts):
    """A column of paths under way, as texts or as `datasets` keeps images: objects with a ``path``."""

    def add(self, value: Any) -> None:
        if isinstance(value, dict) and isinstance(value.get("path"), str) and value.get("bytes") is None:
            value = value["path"]
        if value is not None and not isinstance(value, str) and not self.fault:
            self.fault = (
                f"column '{self.name}' must hold paths of images, but holds {_shown(value)} in {_place(self.lines)}; "
                "write the paths as texts, save contents in a .parquet file, or name another column"
            )
        super().add(value)


class _Labels:
    """A column of labels under way."""

    def __init__(self, name: str, lines: Sequence[int]) -> None:
        self.name, self.lines = name, lines
        self.values: list[Any] = []
        self.first: Any = None
        self.fault = ""

    def add(self, value: Any) -> None:
        if value is not None and not self.fault:
            if isinstance(value, str) and not value.isascii():
                _check_characters(self.name, value, self.lines)
            if self.first is None:
                self.first = value
            if isinstance(value, list | dict):
                self.fault = (
                    f"column '{self.name}' must hold texts or numbers, but holds {_shown(value)} in "
                    f"{_place(self.lines)}; convert it or name another column"
                )
            elif WORDS[type(value)] != WORDS[type(self.first)]:
                self.fault = (
                    f"column '{self.name}' must hold labels of one kind, but holds {_shown(self.first)} and, in "
                    f"{_place(self.lines)}, {_shown(value)}; write all of them as texts or all as numbers"
                )
        self.values.append(value)

    def finished(self) -> pa.ChunkedArray:
        kind = type(self.first)
        if kind in (int, float):
            low, high = LIMITS
            if all(value is None or (type(value) is int and low <= value <= high) for value in self.values):
                return pa.chunked_array([pa.array(self.values, pa.int64())])
            numbers = [None if value is None else _float(value) for value in self.values]
            return pa.chunked_array([pa.array(numbers, pa.float64())])
        types = {str: pa.string(), bool: pa.bool_()}
        return pa.chunked_array([pa.array(self.values, types.get(kind, pa.null()))])


class _Lists:
    """A column of lists under way, whose entries are a column of their own."""

    def __init__(self, name: str, lines: Sequence[int], entries: _Texts | _Labels, *, single: bool = False) -> None:
        self.name, self.lines, self.entries, self.single = name, lines, entries, single
        self.starts: list[int | None] = []
        self.count = 0
        self.wrong = ""

    @property
    def fault(self) -> str:
        """What is wrong; empty where nothing is."""
        return self.wrong or self.entries.fault

    def add(self, value: Any) -> None:
        if self.single and not isinstance(value, list | dict):
            value = [] if value is None else [value]
        if value is not None and not isinstance(value, list) and not self.wrong:
            self.wrong = (
                f"column '{self.name}' must hold lists, but holds {_shown(value)} in {_place(self.lines)}; "
                "write each row's entries as a list, or name another column"
            )
        self.starts.append(self.count if isinstance(value, list) else None)
        for entry in value if isinstance(value, list) else ():
            if entry is None and not self.wrong:
                self.wrong = (
                    f"column '{self.name}' holds nothing (null) in the list of {_place(self.lines)}; fill it in"
                )
            self.entries.add(entry)
            self.count += 1

    def finished(self) -> pa.ChunkedArray:
        entries = self.entries.finished().combine_chunks()
        entries = entries.combine_chunks() if isinstance(entries, pa.ChunkedArray) else entries
        return pa.chunked_array([pa.ListArray.from_arrays(pa.array([*self.starts, self.count], pa.int32()), entries)])


def _text_lists(name: str, lines: Sequence[int]) -> _Lists:
    return _Lists(name, lines, _Texts(name, lines))


def _label_lists(name: str, lines: Sequence[int]) -> _Lists:
    return _Lists(name, lines, _Labels(name, lines))


def _any_texts(name: str, lines: Sequence[int]) -> _Lists:
    return _Lists(name, lines, _Texts(name, lines), single=True)


def _any_labels(name: str, lines: Sequence[int]) -> _Lists:
    return _Lists(name, lines, _Labels(name, lines), single=True)


_MAKERS: dict[ColumnForm, Callable[[str, Sequence[int]], _Texts | _Labels | _Lists]] = {
    ColumnForm.TEXT: _Texts,
    ColumnForm.LABEL: _Labels,
    ColumnForm.IMAGE: _Paths,
    ColumnForm.TEXTS: _text_lists,
    ColumnForm.LABELS: _label_lists,
    ColumnForm.ANY_TEXTS: _any_texts,
    ColumnForm.ANY_LABELS: _any_labels,
}


class _Repeated(dict[str, Any]):
    """An object that names keys twice."""

    keys_twice: frozenset[str] = frozenset()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    repeated = _Repeated(found)
    repeated.keys_twice = frozenset(name for name in found if names.count(name) > 1)
    return repeated


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def json_objects(content: bytes) -> Iterator[tuple[int, Any]]:
    """What stands in a file of JSON, one thing after the other, and the line where it begins.

    Raises:
        UnreadableError: the file is damaged; the message names the line.
    """
    start = content[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        yield from _of_list("".join(opened(content)))
        return
    for line, words in enumerate(opened(content), start=1):
        if words.strip():
            try:
                yield line, _DECODER.decode(words)
            except (ValueError, RecursionError) as error:
                raise UnreadableError(_broken(content, line, words, error)) from error


def _of_list(words: str) -> Iterator[tuple[int, Any]]:
    """The entries of one list, read one after the other so that they need not stand in memory together."""
    line, counted = 1, 0
    place = _skip(words, words.index("[") + 1)
    closed = words[place : place + 1] == "]"
    if closed:
        place = _skip(words, place + 1)
    while not closed:
        line += _line_ends(words, counted, place)
        counted = place
        try:
            entry, place = _DECODER.raw_decode(words, place)
        except (ValueError, RecursionError) as error:
            at = line + _line_ends(words, counted, error.pos) if isinstance(error, json.JSONDecodeError) else line
            raise UnreadableError(f"line {at} cannot be read as JSON ({_reason(error)}); repair it") from error
        yield line, entry
        place = _skip(words, place)
        closed = words[place : place + 1] == "]"
        if not closed and words[place : place + 1] != ",":
            at = line + _line_ends(words, counted, place)
            if place == len(words):
                raise UnreadableError(
                    f"the list that the file begins with is not closed (line {at}); is the file cut off?"
                )
            raise UnreadableError(
                f"line {at}: expected ',' or ']' after an entry of the list, found {words[place]!r}; repair it"
            )
        place = _skip(words, place + 1)
    if place < len(words):
        at = line + _line_ends(words, counted, place)
        raise UnreadableError(
            f"line {at}: expected the end of the file after the list, found more; write one list, or one object a line"
        )


def _skip(words: str, place: int) -> int:
    while place < len(words) and words[place] in " \t\r\n":
        place += 1
    return place


def _line_ends(words: str, start: int, end: int) -> int:
    part = words[start:end]
    return part.count("\n") + part.count("\r") - part.count("\r\n")


def _broken(content: bytes, line: int, words: str, error: Exception) -> str:
    if words.lstrip().startswith("{") and isinstance(error, json.JSONDecodeError) and line <= _FIRST_LINES:
        try:
            whole = _DECODER.decode("".join(opened(content)))
        except (ValueError, RecursionError):
            whole = None
        if isinstance(whole, dict):
            _refuse_wrapped(whole, line)
            return f"the object in line {line} stands on several lines; write one object a line, or one list of objects"
    shown = shortened(words.strip(), SHOWN_CHARACTERS)
    return f"line {line} cannot be read as JSON ({_reason(error)}: {shown!r}); repair it"


_FIRST_LINES = 3


def _refuse_wrapped(row: dict[str, Any], line: int) -> None:
    """Refuse one object that holds all rows under a key, or whole columns."""
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            raise UnreadableError(
                f"the file is one object whose key '{name}' holds the rows; save that list alone, or one object a line"
            )
    if row and all(isinstance(value, list | dict) for value in row.values()):
        raise UnreadableError(
            f"the file is one object (line {line}) that holds whole columns; write one object a row and line (with "
            'pandas: to_json(PATH, orient="records", lines=True))'
        )


def _check_characters(name: str, value: str, lines: Sequence[int]) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnreadableError(
            f"column '{name}' holds half of a character (a lone surrogate, such as \\ud83d) in {_place(lines)}; "
            "repair or remove this row"
        ) from error


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _shown(value: Any) -> str:
    kind = {str: "the text ", bool: "", int: "the number ", float: "the number "}.get(type(value))
    if kind is None:
        return "nothing (null)" if value is None else "a list" if isinstance(value, list) else "an object"
    return kind + shortened(json.dumps(value) if not isinstance(value, str) else repr(value), SHOWN_CHARACTERS)


def _place(lines: Sequence[int]) -> str:
    return f"row {len(lines) - 1} (counted from 0), line {lines[-1]}"


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')}, at character {error.colno}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
