"""Read the rows of a task and find everything that is wrong with them before anything is trained."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pave_lightning.errors import PaveError
from pave_lightning.files import file_sha256, local_path
from pave_lightning.hub import hub_or_cache, unreached
from pave_lightning.recipe import Task
from pave_lightning.tasks.checks import arrow_column, row_problems

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib")
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars", ",": "commas"}
SHOWN_OF_A_HEADER = 60
MISSING_LABELS = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None")


def load_split(task: Task, split: Split, *, seed: int, cache_dir: str | Path) -> datasets.Dataset:
    """The raw rows of one split that a task uses, in their original order.

    Args:
        task: says where the rows come from and, in ``examples``, how many of them are used.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        seed: of the sample of rows; the same seed draws the same rows.
        cache_dir: folder in which Arrow copies of local files are kept; hub datasets stay in the hub's own cache.

    Returns:
        A dataset with all columns of the source.

    Raises:
        PaveError: the split cannot be read, or a text or label of it cannot be used.
    """
    rows = _read(task, split, Path(cache_dir))
    problems = row_problems(task, rows, _where(task, split))
    if problems:
        raise PaveError("\n".join(problems))
    return _sampled(task, split, rows, seed)


def check_task(task: Task, *, seed: int, cache_dir: str | Path) -> list[str]:
    """Everything that is wrong with a task's data; mistakes in the data are told, not raised.

    All rows of a split are looked at, also those that the sample leaves out: another seed must not find other mistakes.

    Args:
        task: the task to check.
        seed: of the sample of rows.
        cache_dir: folder in which Arrow copies of local files are kept; hub datasets stay in the hub's own cache.

    Returns:
        One message a problem: what was expected, what was found, where, and what to do. Empty if all is well.
    """
    problems: list[str] = []
    for split in SPLITS:
        try:
            rows = _read(task, split, Path(cache_dir))
        except PaveError as error:
            problems.append(str(error))
            continue
        found = row_problems(task, rows, _where(task, split))
        problems += found
        if split == "test" and not found:
            used = _sampled(task, split, rows, seed)
            if len(pc.unique(arrow_column(used, task.label))) < 2:
                problems.append(
                    f"{_where(task, split)}: all {len(used)} rows that are used carry the same label in column "
                    f"'{task.label}', so no metric can tell a good model from a bad one; "
                    "expected two distinct labels or more: use more rows or another split"
                )
    return problems


def split_fingerprint(task: Task, split: Split) -> str:
    """What identifies the content of one split: SHA-256 of its file, or where it stands on the hub.

    Raises:
        PaveError: a local file is missing.
    """
    data = task.data
    if data.hub is not None:
        return f"{data.hub}/{data.config or ''}@{data.revision or ''}:{getattr(data, split)}"
    return file_sha256(_local_file(task, split))


def sample_rows(rows: int, wanted: int | None, seed: int) -> npt.NDArray[np.int64]:
    """Indices of a seeded sample without repetition, in ascending order.

    Args:
        rows: how many rows there are.
        wanted: how many are drawn; all of them for ``None`` or when there are not more.
        seed: of the permutation whose first ``wanted`` entries are the sample: smaller samples are part of larger ones.

    Returns:
        int64 array of shape ``(min(rows, wanted),)``.
    """
    if wanted is None or wanted >= rows:
        return np.arange(rows, dtype=np.int64)
    # RandomState, unlike default_rng, promises the same numbers in every version of NumPy.
    return np.sort(np.random.RandomState(seed).permutation(rows)[:wanted]).astype(np.int64)


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets`: a task has many small splits, and each would draw several."""
    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _sampled(task: Task, split: Split, rows: datasets.Dataset, seed: int) -> datasets.Dataset:
    wanted: int | None = getattr(task.examples, split)
    if wanted is None or wanted >= len(rows):
        return rows
    return rows.select(sample_rows(len(rows), wanted, seed))


def _where(task: Task, split: Split) -> str:
    source = getattr(task.data, split)
    if task.data.hub is not None:
        source = f"{source} of {'/'.join(filter(None, (task.data.hub, task.data.config)))}"
    return f"task '{task.name}', {split} split ({source})"


def _local_file(task: Task, split: Split) -> Path:
    where = f"task '{task.name}', {split} split"
    path = local_path(getattr(task.data, split))
    if path.is_dir():
        raise PaveError(f"{where}: expected a file, but {path} is a folder; name the csv, jsonl or parquet file in it")
    if not path.is_file():
        raise PaveError(
            f"{where}: there is no file {path}; correct 'data.{split}', "
            "or give 'data.hub' if this is a split of a dataset on the hub"
        )
    return path


def _file_kind(task: Task, split: Split, path: Path) -> str:
    ending = path.suffix.lower()
    if ending in FORMATS:
        return FORMATS[ending]
    known = ", ".join(FORMATS)
    if ending in PICKLES:
        raise PaveError(
            f"{_where(task, split)}: files ending in {ending} are pickles, which can run any code when opened, "
            f"and are refused; save the rows as one of {known}"
        )
    raise PaveError(f"{_where(task, split)}: expected a file ending in one of {known}, found '{ending}'; convert it")


def _read(task: Task, split: Split, cache_dir: Path) -> datasets.Dataset:
    with quiet_datasets():
        return _read_local(task, split, cache_dir) if task.data.hub is None else _read_hub(task, split)


def _read_local(task: Task, split: Split, cache_dir: Path) -> datasets.Dataset:
    path = _local_file(task, split)
    kind = _file_kind(task, split, path)
    try:
        if _holds_no_rows(path, kind):
            raise _empty(task, split)
        if kind == "csv":
            _check_separator(task, split, path)
        return datasets.load_dataset(
            kind,
            # The path is taken for a glob pattern otherwise, and folders may be named run[1].
            data_files=glob.escape(str(path.absolute())),
            split="train",
            cache_dir=str(cache_dir / "raw"),
            **(_csv_options(task, path) if kind == "csv" else {}),
        )
    # StopIteration: what datasets 5 lets escape for a JSON file that holds nothing.
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, StopIteration) as error:
        raise PaveError(
            f"{_where(task, split)}: expected {path.suffix.lower()[1:]} rows, but the file cannot be read "
            f"({_reason(error)}); repair it or save it in another format"
        ) from error


def _csv_options(task: Task, path: Path) -> dict[str, Any]:
    # pandas reads words such as NA and null as missing, but in a text they are words.
    labels = [word for word in MISSING_LABELS if word not in (task.classes or ())]
    return {
        "sep": _separator(path),
        "keep_default_na": False,
        "na_values": {**{column: [""] for column in task.text}, task.label: labels},
    }


def _separator(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _check_separator(task: Task, split: Split, path: Path) -> None:
    """Refuse a file of one column whose name holds another separator: a task needs two columns at least."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = next((line.strip() for line in file if line.strip()), "")
    wanted = _separator(path)
    found = next((mark for mark in SEPARATORS if mark in header), None) if wanted not in header else None
    if found is not None:
        instead = {"\t": ", or name it .tsv", ",": ", or name it .csv"}.get(found, "")
        raise PaveError(
            f"{_where(task, split)}: expected columns separated by {SEPARATORS[wanted]}, but the first line names one "
            f"column, {_shortened(header)!r}, with {SEPARATORS[found]} in its name; "
            f"save the file with {SEPARATORS[wanted]} between the columns{instead}"
        )


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_OF_A_HEADER else f"{text[:SHOWN_OF_A_HEADER]}..."


def _holds_no_rows(path: Path, kind: str) -> bool:
    # datasets ends with an unrelated error on such files, a different one for each format.
    if kind == "parquet":
        return bool(pq.read_metadata(path).num_rows == 0)
    with path.open("rb") as file:
        if kind == "json":
            return b"".join(file.read(64).split()) in (b"", b"[]")
        return len(list(islice((line for line in file if line.strip()), 2))) < 2


def _read_hub(task: Task, split: Split) -> datasets.Dataset:
    data = task.data
    try:
        with hub_or_cache():
            rows = datasets.load_dataset(data.hub, data.config, split=getattr(data, split), revision=data.revision)
    # Scripts end in a RuntimeError; unknown configurations and splits in a ValueError; no network in an OSError.
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        why = unreached() or _reason(error)
        raise PaveError(
            f"{_where(task, split)}: the hub dataset cannot be loaded ({why}); check its name, 'config', "
            "'revision' and split and the network, or give local files: leave 'data.hub' out and let data.train, "
            "data.validation and data.test be paths of csv, jsonl or parquet files"
        ) from error
    if len(rows) == 0:
        raise _empty(task, split)
    return rows


def _empty(task: Task, split: Split) -> PaveError:
    return PaveError(f"{_where(task, split)}: there are no rows; put some in or name another file or split")


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
