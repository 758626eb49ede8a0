"""Find in the rows of one split everything that a task cannot use: columns, texts and labels."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pave_lightning.errors import nearest
from pave_lightning.recipe import Task


def row_problems(task: Task, rows: datasets.Dataset, where: str) -> list[str]:
    """Everything that is wrong with the columns that a task uses.

    Args:
        task: its ``text``, ``label``, ``kind``, ``classes`` and ``value_range`` are used.
        rows: all rows of a split; row numbers in messages count from 0 within them.
        where: begins every message, such as ``"task 'movie', test split (test.csv)"``.

    Returns:
        One message a problem; empty if all is well.
    """
    problems = []
    for name in dict.fromkeys([*task.text, task.label]):
        if name not in rows.features:
            problems.append(f"there is no column '{name}'; {nearest(name, rows.column_names)}")
        elif name in task.text:
            problems += _text_problems(rows, name)
    if task.label in rows.features:
        problems += _label_problems(task, rows)
    return [f"{where}: {problem}" for problem in problems]


def arrow_column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """One column as Arrow data, with a selection of rows applied."""
    return rows.select_columns([name]).with_format("arrow")[:].column(name)


def _text_problems(rows: datasets.Dataset, name: str) -> list[str]:
    kind = _kind(rows.features[name])
    # null: a column without a single value, which the count of missing texts tells better.
    if kind not in ("string", "large_string", "string_view", "null"):
        return [f"column '{name}' must hold texts, but holds {kind}; quote the values or name another column"]
    missing = _flags(pc.is_null(arrow_column(rows, name)))
    if missing.any():
        return [f"column '{name}' has no text in {_rows(missing)}; fill them in or leave these rows out"]
    return []


def _label_problems(task: Task, rows: datasets.Dataset) -> list[str]:
    feature, column = rows.features[task.label], arrow_column(rows, task.label)
    words = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    numbers = pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type)
    name = f"column '{task.label}'"
    plain = isinstance(feature, (datasets.Value, datasets.ClassLabel))
    if not plain or not (words or numbers or pa.types.is_null(column.type)):
        wanted = "numbers" if task.classes is None else "class indices or class names"
        return [f"{name} must hold {wanted}, but holds {_kind(feature)}; convert it or name another column"]
    problems = []
    names = getattr(feature, "names", None)
    if names and task.classes and sorted(names) == sorted(task.classes) and names != task.classes:
        problems.append(
            f"{name} counts its classes in the order {', '.join(names)}, but 'classes' in the order "
            f"{', '.join(task.classes)}; give 'classes' in the order of the data"
        )
    missing = _flags(pc.is_null(column, nan_is_null=True))
    if missing.any():
        problems.append(f"{name} has no label in {_rows(missing)}; fill them in or leave these rows out")
    present, index = column.filter(pa.array(~missing)), np.flatnonzero(~missing)
    if words:
        return problems + [f"{name} {text}" for text in _word_problems(task, present, index)]
    return problems + [f"{name} {text}" for text in _number_problems(task, present, index)]


def _word_problems(task: Task, labels: pa.ChunkedArray, index: npt.NDArray[np.int64]) -> list[str]:
    if task.classes is None:
        bad = pd.to_numeric(labels.to_pandas(), errors="coerce").isna().to_numpy()
        if bad.any():
            example = labels[int(bad.argmax())].as_py()
            return [f"must hold numbers, but '{example}' is none, in {_rows(bad, index)}; correct or remove these rows"]
        return ["must hold numbers, but holds them as texts; write them without quotes"]
    known = pc.is_in(labels, value_set=pa.array(task.classes, labels.type))
    bad = ~_flags(known)
    if not bad.any():
        return []
    found: list[str] = pc.unique(labels.filter(pa.array(bad)))[:3].to_pylist()
    return [
        f"must hold one of the classes {', '.join(task.classes)}, but holds {', '.join(map(repr, found))} in "
        f"{_rows(bad, index)}; {nearest(found[0], task.classes)}"
    ]


def _number_problems(task: Task, labels: pa.ChunkedArray, index: npt.NDArray[np.int64]) -> list[str]:
    values = np.asarray(labels.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)
    finite = np.isfinite(values)
    problems = []
    if not finite.all():
        problems.append(f"must hold finite numbers, but is infinite in {_rows(~finite, index)}; correct these rows")
    low, high = task.value_range or (-np.inf, np.inf)
    wanted, advice = f"numbers from {low:g} to {high:g}", "correct these rows or 'value_range'"
    if task.classes is not None:
        low, high = 0, len(task.classes) - 1
        wanted, advice = f"class indices from 0 to {high}", "correct 'classes', or leave out rows without a known label"
        broken = finite & (values != np.floor(values))
        if broken.any():
            found = _examples(values[broken])
            problems.append(f"must hold whole numbers, but holds {found} in {_rows(broken, index)}; is it regression?")
    outside = finite & ((values < low) | (values > high))
    if outside.any():
        found = _examples(values[outside])
        problems.append(f"must hold {wanted}, but holds {found} in {_rows(outside, index)}; {advice}")
    return problems


def _kind(feature: Any) -> str:
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__


def _flags(values: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    return np.asarray(values.to_numpy(), dtype=np.bool_)


def _rows(bad: npt.NDArray[np.bool_], index: npt.NDArray[np.int64] | None = None) -> str:
    first = int(bad.argmax()) if index is None else int(index[bad.argmax()])
    count = int(bad.sum())
    return f"row {first} (counted from 0)" if count == 1 else f"{count} rows, first in row {first} (counted from 0)"


def _examples(values: npt.NDArray[np.float64]) -> str:
    return ", ".join(f"{value:g}" for value in np.unique(values)[:3])
