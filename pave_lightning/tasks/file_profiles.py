"""Reads all columns of files, whatever a task will take of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pave_lightning.errors import reason
from pave_lightning.tasks.delimited import SEPARATORS, read_delimited
from pave_lightning.tasks.json_rows import json_objects
from pave_lightning.tasks.options import Data
from pave_lightning.tasks.profiles import IMAGE, Profile, profile_of
from pave_lightning.tasks.reading import DELIMITED, check_parquet, class_names_of, ending_of, plain_column
from pave_lightning.tasks.rows import ColumnForm, UnreadableError


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
        return FileColumns({"image": [IMAGE] * rows.count, "label": labels}, rows.count)
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
            name: [IMAGE] * table.num_rows if _is_image(column.type) else plain_column(column).to_pylist()
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise UnreadableError(f"the file cannot be read as parquet ({reason(error)}); save it anew") from error
    named = {name: class_names_of(table.schema.metadata, name) or () for name in columns}
    return FileColumns(columns, table.num_rows, {name: names for name, names in named.items() if names})


def _is_image(kind: pa.DataType) -> bool:
    """Whether a type of Arrow is that of images: bytes, or an object with some."""
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(place).name for place in range(kind.num_fields)}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def base_config(folder: Path) -> Mapping[str, Any]:
    """What a model's ``config.json`` says; nothing where there is none that can be read."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
