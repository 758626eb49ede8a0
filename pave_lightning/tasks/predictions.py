"""What a model predicted for each row of a split, kept in a file so that models can be compared later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pave_lightning.errors import PaveError, reason

Numbers = npt.NDArray[np.int64] | npt.NDArray[np.float64]
Texts = npt.NDArray[np.object_]

FILE = "predictions.parquet"
# The key of the file's own facts: for each task the names of its classes and the type of its numbers.
FACTS = b"pave.tasks"
# What the file's facts say of tasks that predict texts instead of a type of numbers.
TEXTS = "text"


@dataclass(frozen=True)
class TaskPredictions:
    """The predictions of one model on one split of a task, in the order of rows.

    Attributes:
        rows: int64 of shape ``(n,)``, ascending: the row of each prediction, counted from 0 in the split as it is used.
            A row of which a tokenizer leaves nothing to predict is missing.
        positions: int64 of shape ``(n,)``: counts the predictions of one row from 0.
        predictions: int64 (classes), float64 (numbers) or texts of shape ``(n,)``, as the task's metrics take them.
        targets: what is right, the same shape and dtype; for each text a tuple of those that are right.
        means: where predictions are no numbers themselves: the metrics whose means over rows are kept instead, one
            position each, of which 1 is right.
    """

    rows: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    predictions: Numbers | Texts
    targets: Numbers | Texts
    means: tuple[str, ...] = ()

    @classmethod
    def ordered(
        cls,
        rows: npt.NDArray[np.int64],
        predictions: Numbers | Texts,
        targets: Numbers | Texts,
        means: Sequence[str] = (),
    ) -> Self:
        """Predictions that come in any order of rows; those of one row come in their own order.

        Args:
            rows: int64 of shape ``(n,)``.
            predictions: shape ``(n,)``.
            targets: shape ``(n,)``.
            means: see the attribute.
        """
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
        positions = np.arange(len(rows)) - np.searchsorted(rows, rows, side="left")
        return cls(rows, positions, predictions[order], targets[order], tuple(means))

    @property
    def are_classes(self) -> bool:
        """Whether classes are predicted, not numbers."""
        return np.issubdtype(self.predictions.dtype, np.integer)

    @property
    def are_texts(self) -> bool:
        """Whether texts are predicted."""
        return self.predictions.dtype == np.object_

    def same_rows(self, other: TaskPredictions) -> bool:
        """Whether other predictions are of the same rows and positions, with the same targets."""
        return all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in ("rows", "positions", "targets")
        )


def write_predictions(
    path: Path, predictions: Mapping[str, TaskPredictions], classes: Mapping[str, Sequence[str]]
) -> None:
    """Write the predictions of one model on all tasks as one parquet file.

    Its columns are ``task`` (text), ``row`` (int64), ``position`` (int32), ``prediction`` and ``target`` (float64,
    which holds class indices exactly); where a task predicts texts also ``prediction_text`` and ``target_texts``, a
    list, null for all others. Names of classes stand once, in the file's metadata.

    Args:
        path: the file.
        predictions: by task.
        classes: names of the classes in index order, by task; none for tasks that predict numbers.
    """
    names = list(predictions)
    lengths = [len(found.rows) for found in predictions.values()]
    tasks = pa.DictionaryArray.from_arrays(
        pa.array(np.repeat(np.arange(len(names), dtype=np.int32), lengths)), pa.array(names, pa.string())
    )

    def column(name: str, dtype: Any) -> Any:
        parts = [_numbers(getattr(found, name), dtype) for found in predictions.values()]
        return pa.array(np.concatenate(parts) if parts else np.zeros(0, dtype=dtype))

    columns = {
        "task": tasks,
        "row": column("rows", np.int64),
        "position": column("positions", np.int32),
        "prediction": column("predictions", np.float64),
        "target": column("targets", np.float64),
    }
    if any(found.are_texts for found in predictions.values()):
        told = [(one, of) for found in predictions.values() for one, of in _texts(found)]
        columns["prediction_text"] = pa.array([one for one, _ in told], pa.large_string())
        columns["target_texts"] = pa.array([of for _, of in told], pa.list_(pa.large_string()))
    table = pa.table(columns)
    facts = {
        name: {
            "classes": list(classes.get(name, ())),
            "numbers": _form(found),
            **({"means": list(found.means)} if found.means else {}),
        }
        for name, found in predictions.items()
    }
    pq.write_table(table.replace_schema_metadata({FACTS: json.dumps(facts).encode()}), path, compression="zstd")


def read_predictions(path: Path) -> tuple[dict[str, TaskPredictions], dict[str, list[str]]]:
    """The predictions that `write_predictions` wrote, and the names of the classes, both by task.

    Raises:
        PaveError: the file is not there or cannot be read.
    """
    try:
        table = pq.read_table(path)
        facts = json.loads((table.schema.metadata or {})[FACTS])
        tasks = np.asarray(table.column("task").cast(pa.string()).to_pylist(), dtype=object)
        columns = {name: table.column(name).to_numpy() for name in ("row", "position", "prediction", "target")}
        for name in ("prediction_text", "target_texts"):
            if name in table.column_names:
                columns[name] = as_objects(table.column(name).to_pylist())
    except FileNotFoundError as error:
        raise PaveError(f"{path} is not there; run `pave evaluate` with the recipe of this run") from error
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise PaveError(
            f"{path} cannot be read ({reason(error)}); remove its folder and run `pave evaluate` with the recipe of "
            "this run"
        ) from error
    found, classes = {}, {}
    for name, fact in facts.items():
        own = {key: values[tasks == name] for key, values in columns.items()}
        places = own["row"].astype(np.int64), own["position"].astype(np.int64)
        if fact["numbers"] == TEXTS:
            targets = as_objects([tuple(right) for right in own["target_texts"]])
            found[name] = TaskPredictions(*places, own["prediction_text"], targets)
        else:
            said, right = (own[key].astype(np.dtype(fact["numbers"])) for key in ("prediction", "target"))
            found[name] = TaskPredictions(*places, said, right, tuple(str(one) for one in fact.get("means", ())))
        classes[name] = [str(one) for one in fact["classes"]]
    return found, classes


def as_objects(values: Sequence[Any]) -> Texts:
    """Values as the entries of an array with one axis, whatever they are."""
    found = np.empty(len(values), dtype=np.object_)
    for place, value in enumerate(values):  # at once, numpy would make axes of lists of one length
        found[place] = value
    return found


def _form(found: TaskPredictions) -> str:
    return TEXTS if found.are_texts else "int64" if found.are_classes else "float64"


def _numbers(values: npt.NDArray[Any], dtype: Any) -> npt.NDArray[Any]:
    """Values of a column of numbers, in which texts are none."""
    return np.full(len(values), np.nan) if values.dtype == np.object_ else np.asarray(values, dtype=dtype)


def _texts(found: TaskPredictions) -> list[tuple[str | None, list[str] | None]]:
    """The texts of each prediction; none of tasks that predict no texts."""
    if not found.are_texts:
        return [(None, None)] * len(found.rows)
    return [(str(one), list(of)) for one, of in zip(found.predictions, found.targets, strict=True)]
