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

FILE = "predictions.parquet"
# The key of the file's own facts: for each task the names of its classes and the type of its numbers.
FACTS = b"pave.tasks"


@dataclass(frozen=True)
class TaskPredictions:
    """The predictions of one model on one split of a task, in the order of rows.

    Attributes:
        rows: int64 of shape ``(n,)``, ascending: the row of each prediction, counted from 0 in the split as it is used.
            A row of which a tokenizer leaves nothing to predict is missing.
        positions: int64 of shape ``(n,)``: counts the predictions of one row from 0.
        predictions: int64 (classes) or float64 (numbers) of shape ``(n,)``, as the task's metrics take them.
        targets: what is right, the same shape and dtype.
        means: where predictions are no numbers themselves: the metrics whose means over rows are kept instead, one
            position each, of which 1 is right.
    """

    rows: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    predictions: Numbers
    targets: Numbers
    means: tuple[str, ...] = ()

    @classmethod
    def ordered(
        cls, rows: npt.NDArray[np.int64], predictions: Numbers, targets: Numbers, means: Sequence[str] = ()
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
    which holds class indices exactly). Names of classes stand once, in the file's metadata.

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
        parts = [np.asarray(getattr(found, name), dtype=dtype) for found in predictions.values()]
        return pa.array(np.concatenate(parts) if parts else np.zeros(0, dtype=dtype))

    table = pa.table(
        {
            "task": tasks,
            "row": column("rows", np.int64),
            "position": column("positions", np.int32),
            "prediction": column("predictions", np.float64),
            "target": column("targets", np.float64),
        }
    )
    facts = {
        name: {
            "classes": list(classes.get(name, ())),
            "numbers": "int64" if found.are_classes else "float64",
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
        numbers = np.dtype(fact["numbers"])
        found[name] = TaskPredictions(
            own["row"].astype(np.int64),
            own["position"].astype(np.int64),
            own["prediction"].astype(numbers),
            own["target"].astype(numbers),
            tuple(str(one) for one in fact.get("means", ())),
        )
        classes[name] = [str(one) for one in fact["classes"]]
    return found, classes
