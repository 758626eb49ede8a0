"""Read local files: only the columns that a task uses, typed by the task, from the very bytes that are hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pave_lightning.errors import reason
from pave_lightning.tasks.delimited import delimiter_of, read_delimited
from pave_lightning.tasks.json_rows import read_json
from pave_lightning.tasks.options import Data
from pave_lightning.tasks.rows import Rows, UnreadableError, column_path
from pave_lightning.tasks.task import Task
from pave_lightning.tasks.text_files import GIT_POINTER, STARTS

DELIMITED = (".csv", ".tsv")
FORMATS = (*DELIMITED, ".json", ".jsonl", ".parquet")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib")
TEXT_TYPES: tuple[Callable[[pa.DataType], bool], ...] = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
)


def ending_of(path: Path) -> str:
    """The ending of a file that can be read, in lower case.

    Raises:
        UnreadableError: files of that kind cannot be read.
    """
    ending = path.suffix.lower()
    if ending == ".ndjson":
        return ".jsonl"
    if ending in FORMATS:
        return ending
    if ending in PACKED:
        raise UnreadableError(f"files ending in {ending} are packed; unpack it first")
    known = ", ".join(FORMATS)
    if ending in PICKLES:
        raise UnreadableError(
            f"files ending in {ending} are pickles, which can run any code when opened, and are refused; "
            f"save the rows as one of {known}"
        )
    raise UnreadableError(f"expected a file ending in one of {known}, found '{ending}'; convert it")


def reading_options(data: Data, path: Path) -> list[str]:
    """What decides, besides a file's content, which fields its rows have; empty for formats that say it themselves."""
    ending = path.suffix.lower()
    return [ending, delimiter_of(data, ending), data.quoting] if ending in DELIMITED else []


def read_rows(path: Path, task: Task) -> tuple[Rows, str]:
    """The used columns of a local file, and the sha256 of the bytes that they were read from.

    The file is read into memory once and both are made from there, so they belong together whatever happens to it.

    Args:
        path: the file.
        task: its ``data`` and ``columns`` are used.

    Raises:
        UnreadableError: the file is of no known kind, damaged, or holds something else.
        OSError: the file cannot be opened.
        MemoryError: it does not fit into memory.
    """
    ending = ending_of(path)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if ending in DELIMITED:
        rows = read_delimited(content, task.data, ending, task.columns)
    elif ending == ".parquet":
        rows = _read_parquet(content, list(task.columns), task.label_columns[0])
    else:
        rows = read_json(content, task.columns)
    return rows, digest


def plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column whose values, or entries of lists, are no categories, in forms that `datasets` knows."""
    column = _without_list_views(column)
    plain = _plain_type(column.type)
    return column if plain == column.type else column.cast(plain)


def _without_list_views(column: pa.ChunkedArray) -> pa.ChunkedArray:
    # Arrow's own cast of them gives wrong lists where a row has none (seen with pyarrow 25).
    if not (pa.types.is_list_view(column.type) or pa.types.is_large_list_view(column.type)):
        return column
    plain = [_lists_of(chunk, pc.list_flatten(chunk)) for chunk in column.chunks]
    return pa.chunked_array(plain, pa.large_list(column.type.value_type))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    if pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.large_list(_plain_type(kind.value_type))
    return kind


def inner_column(column: pa.ChunkedArray, keys: Sequence[str]) -> pa.ChunkedArray | None:
    """What keys lead to inside of a column of objects, or of lists of objects; None where they lead nowhere."""
    for key in keys:
        column = _without_list_views(column)
        kind = column.type
        in_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        fields = kind.value_type if in_list else kind
        if not pa.types.is_struct(fields) or fields.get_field_index(key) < 0:
            return None
        if in_list:
            found = [_lists_of(chunk, pc.struct_field(pc.list_flatten(chunk), key)) for chunk in column.chunks]
            column = pa.chunked_array(found or [[]])
        else:
            column = pc.struct_field(column, key)
    return column


def _lists_of(lists: pa.Array, entries: pa.Array) -> pa.Array:
    """Entries in lists of the sizes of other lists; where there is none of those, there is none."""
    sizes = np.asarray(pc.fill_null(pc.list_value_length(lists), 0), dtype=np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int64())
    return pa.LargeListArray.from_arrays(offsets, entries, mask=lists.is_null())


def is_text(kind: pa.DataType) -> bool:
    """Whether a type of Arrow holds texts."""
    return any(is_one(kind) for is_one in TEXT_TYPES)


def _read_parquet(content: bytes, names: Sequence[str], labels: str) -> Rows:
    check_parquet(content)
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        schema = file.schema_arrow
        known, count = list(schema.names), file.metadata.num_rows
        paths = {name: path for name in names if (path := column_path(name, known)) is not None}
        table = file.read(columns=list(dict.fromkeys(known[place] for place, _ in paths.values())), use_threads=False)
        table.validate(full=True)
        reached = {name: inner_column(table.column(known[place]), keys) for name, (place, keys) in paths.items()}
        columns = {name: plain_column(column) for name, column in reached.items() if column is not None}
    except UnreadableError:
        raise
    # Whatever the reader says of content that no writer wrote; it has no kind of error of its own.
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise UnreadableError(
            f"the file cannot be read as parquet ({reason(error)}); repair it or save it anew"
        ) from error
    if any(len(column) != count for column in columns.values()):
        raise UnreadableError(
            f"the file is damaged: its columns do not have the {count} rows that it speaks of; save it anew"
        )
    return Rows(columns, count, known, own_names=class_names_of(schema.metadata, labels))


def check_parquet(content: bytes) -> None:
    """Refuse content that is no parquet file.

    Raises:
        UnreadableError: it is something else, or a part of one.
    """
    if content.startswith(b"PARE") or content[-4:] == b"PARE":
        raise UnreadableError("the file is an encrypted parquet file; save it without encryption")
    if content.startswith(GIT_POINTER):
        raise UnreadableError(f"the file {STARTS[GIT_POINTER]}")
    if not content:
        raise UnreadableError("the file is empty; save it anew")
    if not content.startswith(b"PAR1"):
        raise UnreadableError("the file is no parquet file; name it after what it is, or save it anew")
    if len(content) < 12 or content[-4:] != b"PAR1":
        raise UnreadableError("the parquet file is cut off; copy or save it anew")


def class_names_of(metadata: dict[bytes, bytes] | None, column: str) -> list[str] | None:
    """The names of a column's classes where `datasets` wrote the file; nothing where that cannot be understood."""
    try:
        written: Any = json.loads((metadata or {})[b"huggingface"])
        feature = written["info"]["features"][column]
        feature = feature.get("feature", feature)  # of the entries of a list
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
