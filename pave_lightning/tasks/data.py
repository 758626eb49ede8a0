"""Read the rows of a task and find everything that is wrong with them before anything is trained."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pave_lightning.errors import PaveError, counted, listed, reason
from pave_lightning.system.files import file_sha256, is_file, local_path
from pave_lightning.system.hub import hub_or_cache, unreached
from pave_lightning.system.keeping import kept
from pave_lightning.tasks.checks import row_problems
from pave_lightning.tasks.copies import found_copy, kept_copy, read_copy
from pave_lightning.tasks.labels import LabelValues, Reading, label_reading, readings_conflict
from pave_lightning.tasks.reading import inner_column, is_text, plain_column, read_rows, reading_options
from pave_lightning.tasks.rows import Rows, UnreadableError, column_path
from pave_lightning.tasks.split_files import sliced, split_file, split_folder
from pave_lightning.tasks.task import Task

if TYPE_CHECKING:  # it loads pandas and more; plans read rows from copies of their own without it
    import datasets

log = logging.getLogger("pave_lightning")

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# Raise it when the copies of rows change their form, so that older ones are not read.
COPY_FORMAT = 1
REMARKS = b"pave.remarks"
# The folder of copies of rows as they were read.
RAW = "raw"


def load_split(task: Task, split: Split, *, seed: int, cache_dir: str | Path) -> pa.Table:
    """The rows of one split that a task uses, in their original order.

    Args:
        task: says where the rows come from and, in ``examples``, how many of them are used.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        seed: of the sample of rows; the same seed draws the same rows.
        cache_dir: folder in which Arrow copies of local files are kept; hub datasets stay in the hub's own cache.

    Returns:
        A table with the columns that the task uses, memory-mapped where all rows of a file are used. Labels are numbers
        (regression), class indices, or class names as ``classes`` spells them.

    Raises:
        PaveError: the split cannot be read, or a text or label of it cannot be used.
    """
    return load_rows(task, split, seed=seed, cache_dir=cache_dir).table


@dataclass(frozen=True)
class LoadedRows:
    """The rows of a split that are used.

    Attributes:
        table: see `load_split`.
        places: int64 of shape ``(n,)``: the number of each row among all rows of the split, counted from 0.
        fingerprint: the `split_fingerprint` of the content that they were read from.
    """

    table: pa.Table
    places: npt.NDArray[np.int64]
    fingerprint: str


def load_rows(task: Task, split: Split, *, seed: int, cache_dir: str | Path) -> LoadedRows:
    """As `load_split`, with where the rows come from."""
    fingerprint = split_fingerprint(task, split)
    rows, _ = _checked(task, split, fingerprint, Path(cache_dir))
    places = sample_rows(len(rows), getattr(task.examples, split), seed)
    return LoadedRows(rows if len(places) == len(rows) else rows.take(places), places, fingerprint)


def earlier_rows(
    task: Task, split: Split, fingerprint: str, *, seed: int, cache_dir: str | Path
) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    """The rows of a split that were used when its content had a fingerprint; nothing is written.

    Args:
        task: as `load_rows`.
        split: as `load_rows`.
        fingerprint: the `split_fingerprint` of that time.
        seed: as `load_rows`.
        cache_dir: folder in which copies of local files were kept; without a copy the source itself is read.

    Returns:
        The used columns of the used rows, and the number of each row among all rows of the split.

    Raises:
        PaveError: the source is another one now, or cannot be read.
    """
    copy = found_copy(Path(cache_dir) / RAW, _stem(task, fingerprint))
    if copy is not None:
        table = read_copy(copy)
        places = sample_rows(len(table), getattr(task.examples, split), seed)
        return table.take(pa.array(places)), places
    if split_fingerprint(task, split) != fingerprint:
        raise PaveError(f"{split_title(task, split)}: the rows have changed since")
    with TemporaryDirectory(prefix="pave-rows-") as copies:
        found = load_rows(task, split, seed=seed, cache_dir=copies)
        return found.table, found.places


def check_task(task: Task, *, seed: int, cache_dir: str | Path) -> list[str]:
    """Everything that is wrong with a task's data; mistakes in the data are told, not raised.

    All rows of a split are looked at, also those that the sample leaves out: another seed must not find other mistakes.
    What is worth knowing but no mistake is logged as a warning.

    Args:
        task: the task to check.
        seed: of the sample of rows.
        cache_dir: folder in which Arrow copies of local files are kept; hub datasets stay in the hub's own cache.

    Returns:
        One message a problem: what was expected, what was found, where, and what to do. Empty if all is well.
    """
    problems: list[str] = []
    fingerprints: dict[Split, str] = {}
    for split in SPLITS:
        try:
            fingerprints[split] = _source_fingerprint(task, split)
            rows, remarks = _checked(task, split, split_fingerprint(task, split), Path(cache_dir))
        except PaveError as error:
            # What concerns all splits is told by each.
            problems += [message for message in str(error).split("\n") if message not in problems]
            continue
        for remark in remarks:
            log.warning("%s: %s", split_title(task, split), remark)
        used = rows.take(sample_rows(len(rows), getattr(task.examples, split), seed))
        answers = task.answers(used)
        if split != "validation" and (unseen := task.unseen_classes(answers)):
            log.warning(
                "%s: none of the %s that are used has the class %s, so %s",
                *(split_title(task, split), counted(len(used), "row"), listed(unseen)),
                "nothing is learned of it" if split == "train" else "no score says anything of it",
            )
        if split == "test" and len(np.unique(answers, axis=0)) < 2:
            problems.append(
                f"{split_title(task, split)}: all {len(used)} rows that are used carry the same label in "
                f"{label_title(task)}, so no metric can tell a good model from a bad one; "
                "expected two distinct labels or more: use more rows or another split"
            )
    for one, other in combinations(fingerprints, 2):
        if fingerprints[one] == fingerprints[other]:
            log.warning("%s", _told_twice(task, one, other))
    return problems


def split_fingerprint(task: Task, split: Split) -> str:
    """What identifies the rows of one split: SHA-256 of its file and how it is read, or where it stands on the hub.

    Raises:
        PaveError: a local file is missing, or labels that must be read like those of the other splits cannot be.
    """
    reading = _reading(task)
    return _source_fingerprint(task, split) + ("" if reading is None else f" labels: {reading}")


def class_names_in_data(task: Task) -> tuple[str, ...]:
    """The classes of a task by the names that its training split gives them, in the order of their indices.

    Inside of `keeping` they are looked for once.

    These are the names that a data set has for its numbers (``ClassLabel``), or else the labels that are texts (the
    names of the sub-folders of a folder of images), sorted.

    Raises:
        PaveError: the split cannot be read, or its labels have no names.
    """
    written = task.model_dump_json()
    # Asked for with every batch of rows, and the fingerprint of a folder is that of all its files.
    return kept(("classes", written), lambda: _class_names_in_data(written, _source_fingerprint(task, "train")))


@lru_cache(maxsize=64)
def _class_names_in_data(task: str, fingerprint: str) -> tuple[str, ...]:
    parsed: Task = Task.model_validate_json(task)
    if parsed.data.hub is not None:
        rows = _hub_rows(parsed, _read_hub(parsed, "train"))
    else:
        rows, digest = _read_local(parsed, "train", _local_source(parsed, "train"))
        if not fingerprint.startswith(digest):
            raise changing(parsed, "train")
    if rows.own_names is not None:
        return tuple(rows.own_names)
    column = rows.columns.get(parsed.label_columns[0])
    names = sorted(set(column.to_pylist()) - {None}) if column is not None and is_text(column.type) else []
    if len(names) < 2:
        raise PaveError(
            f"{split_title(parsed, 'train')}: {label_title(parsed)} gives {'only one class' if names else 'no names'}, "
            "so it is not known what the classes are called; name them in the order of their indices in 'classes'"
        )
    return tuple(names)


def changing(task: Task, split: Split) -> PaveError:
    """What to raise where a file is not the one any more that it was when it was hashed."""
    return PaveError(
        f"{split_title(task, split)}: the file changes while it is read; run again when nothing writes to it any more"
    )


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
    import datasets

    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def split_title(task: Task, split: Split) -> str:
    """A split in messages: task, split, and where its rows come from."""
    source = getattr(task.data, split)
    dataset = task.data.hub or task.data.folder
    if dataset is not None:
        source = f"{source} of {'/'.join(filter(None, (dataset, task.data.config)))}"
    return f"task '{task.name}', {split} split ({source})"


def label_title(task: Task) -> str:
    """The columns of the labels in messages."""
    names = [f"'{name}'" for name in task.label_columns]
    return f"column {names[0]}" if len(names) == 1 else f"columns {', '.join(names)}"


def _told_twice(task: Task, one: Split, other: Split) -> str:
    if getattr(task.data, one) == getattr(task.data, other):
        found = f"the {one} split and the {other} split are the same ({getattr(task.data, one)})"
    else:
        found = f"the {one} split ({getattr(task.data, one)}) and the {other} split ({getattr(task.data, other)}) are "
        found += "the same, byte for byte"
    meaning = {
        ("train", "test"): "scores say how well the training rows are remembered",
        ("train", "validation"): "the best checkpoint and the scales are chosen on the rows that are trained on",
        ("validation", "test"): "scores are reported on the rows that checkpoint and scales were chosen on",
    }[one, other]
    return f"task '{task.name}': {found}, so {meaning}; give them different rows"


def _local_source(task: Task, split: Split) -> Path:
    """The file of a split, or its folder of files, for kinds of task that read one."""
    if task.data.folder is not None:
        try:
            return _in_dataset(task, getattr(task.data, split))
        except (UnreadableError, OSError) as error:
            raise PaveError(f"{split_title(task, split)}: {error}") from error
    where = f"task '{task.name}', {split} split"
    path = local_path(getattr(task.data, split))
    if path.is_dir() and task.names_files:
        return path
    if path.is_dir():
        raise PaveError(f"{where}: expected a file, but {path} is a folder; name the csv, jsonl or parquet file in it")
    if "://" in getattr(task.data, split):
        raise PaveError(
            f"{where}: expected the path of a local file, found {getattr(task.data, split)}; fetch it and give its path"
        )
    if not path.is_file():
        raise PaveError(
            f"{where}: there is no file {path}; correct 'data.{split}', "
            "or give 'data.hub' if this is a split of a dataset on the hub"
        )
    return path


def _in_dataset(task: Task, source: str) -> Path:
    """The file of a split in ``data.folder``; else, for kinds of task that read one, its folder of files."""
    try:
        return split_file(task.data, source)
    except UnreadableError:
        # A table comes first: the folder beside it may hold the files that it names.
        folder = split_folder(task.data, source) if task.names_files else None
        if folder is None:
            raise
        return folder


def _source_fingerprint(task: Task, split: Split) -> str:
    """As `split_fingerprint`, without how labels are read."""
    data = task.data
    if data.hub is not None:
        return f"{data.hub}/{data.config or ''}@{data.revision or ''}:{getattr(data, split)}"
    path = _local_source(task, split)
    if path.is_dir():
        return _digest_of(task.named_files(_read_folder(task, split, path)))
    digest, options = file_sha256(path), reading_options(data, path)
    files = _named_files(task.model_dump_json(), split, path, digest) if task.names_files else ()
    found = [digest, *([json.dumps(options)] if options else []), *([_digest_of(files)] if files else [])]
    return " ".join([*found, *([] if data.folder is None else [f"part: {getattr(data, split)}"])])


def _checked(task: Task, split: Split, fingerprint: str, cache_dir: Path) -> tuple[pa.Table, list[str]]:
    """The rows of a split that has a fingerprint, as the task takes them, and what is worth saying of their file.

    Raises:
        PaveError: the split cannot be read, or something is wrong with its rows: one line a problem.
    """
    if task.data.hub is not None:
        return _usable(task, split, _hub_rows(task, _read_hub(task, split))), []
    path = _local_source(task, split)

    def make(copy: Path) -> None:
        rows, digest = _read_local(task, split, path)
        if not fingerprint.startswith(digest):
            raise changing(task, split)
        table = _usable(task, split, rows)
        table = table.replace_schema_metadata({REMARKS: json.dumps(rows.remarks).encode()})
        with pa.ipc.new_stream(copy, table.schema) as stream:
            stream.write_table(table, max_chunksize=10_000)

    rows = read_copy(kept_copy(cache_dir / RAW, _stem(task, fingerprint), make))
    return rows.replace_schema_metadata(None), json.loads(rows.schema.metadata[REMARKS])


def _stem(task: Task, fingerprint: str) -> str:
    """What the copy of rows with this fingerprint is named after."""
    content = [COPY_FORMAT, fingerprint, task.own_options]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _usable(task: Task, split: Split, rows: Rows) -> pa.Table:
    if rows.count == 0:
        raise PaveError(f"{split_title(task, split)}: there are no rows; put some in or name another file or split")
    reading = _reading(task)
    problems = row_problems(task, rows, split_title(task, split), reading)
    if problems:
        raise PaveError("\n".join(" ".join(problem.splitlines()) for problem in problems))
    return task.usable(rows, reading)


def _read_local(task: Task, split: Split, path: Path) -> tuple[Rows, str]:
    if path.is_dir():
        rows = _read_folder(task, split, path)
        return rows, _digest_of(task.named_files(rows))
    try:
        rows, digest = read_rows(path, task)
        used = rows if task.data.folder is None else sliced(rows, getattr(task.data, split))
        return task.in_folder(used, path.absolute().parent), digest
    except UnreadableError as error:
        raise PaveError(f"{split_title(task, split)}: {error}") from error
    except OSError as error:
        raise PaveError(f"{split_title(task, split)}: {path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise PaveError(
            f"{split_title(task, split)}: the file does not fit into memory; leave out columns that are not used, "
            "or save the rows as .parquet"
        ) from error


def _read_folder(task: Task, split: Split, folder: Path) -> Rows:
    try:
        return task.folder_rows(folder.absolute())
    except UnreadableError as error:
        raise PaveError(f"{split_title(task, split)}: {error}") from error


@lru_cache(maxsize=64)
def _named_files(task: str, split: Split, path: Path, digest: str) -> tuple[Path, ...]:
    """The files that a local table of that content names; none where it cannot be read, which is told elsewhere."""
    parsed: Task = Task.model_validate_json(task)
    try:
        return tuple(parsed.named_files(_read_local(parsed, split, path)[0]))
    except PaveError:
        return ()


def _digest_of(files: Sequence[Path]) -> str:
    """SHA-256 of names and contents of files; those that do not exist count by their names."""
    noted = [[str(file), _content_sha256(file)] for file in files]
    return hashlib.sha256(json.dumps(noted).encode()).hexdigest()


def _content_sha256(file: Path) -> str | None:
    """SHA-256 of a file that rows name; None where it cannot be read, which is told with the rows."""
    try:
        return file_sha256(file) if is_file(file) else None
    except OSError:
        return None


def _read_hub(task: Task, split: Split) -> datasets.Dataset:
    import datasets

    data = task.data
    try:
        with hub_or_cache(), quiet_datasets():
            return datasets.load_dataset(data.hub, data.config, split=getattr(data, split), revision=data.revision)
    # Scripts end in a RuntimeError; unknown configurations and splits in a ValueError; no network in an OSError.
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        why = unreached() or reason(error.__cause__ or error)
        raise PaveError(
            f"{split_title(task, split)}: the hub dataset cannot be loaded ({why}); check its name, "
            "'config', 'revision' and split and the network, or give local files: name the folder that holds them in "
            "'data.folder' in place of 'data.hub', or leave both out and let data.train, data.validation and data.test "
            "be paths of csv, jsonl or parquet files"
        ) from error


def _hub_rows(task: Task, dataset: datasets.Dataset) -> Rows:
    known = dataset.column_names
    paths = {name: path for name in task.columns if (path := column_path(name, known)) is not None}
    reached = {name: inner_column(_arrow_column(dataset, known[place]), keys) for name, (place, keys) in paths.items()}
    columns = {name: plain_column(column) for name, column in reached.items() if column is not None}
    feature = dataset.features.get(task.label_columns[0])
    names = getattr(getattr(feature, "feature", feature), "names", None)  # of the entries of a list
    return Rows(columns, len(dataset), dataset.column_names, own_names=names)


def _arrow_column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """One column as Arrow data, with a selection of rows applied."""
    return rows.select_columns([name]).with_format("arrow")[:].column(name)


def _reading(task: Task) -> Reading | None:
    """How class labels are read where one label could mean two classes: the labels of all splits decide it together.

    Returns:
        None where that cannot be, so that each split speaks for itself.

    Raises:
        PaveError: they could be read in two ways, or a split cannot be read.
    """
    if not task.class_names or not readings_conflict(task.class_names):
        return None
    found = [_label_values(task.model_dump_json(), split, _source_fingerprint(task, split)) for split in SPLITS]
    try:
        # None: some are neither, and told where they stand.
        return label_reading([values for values in found if values is not None], task.class_names) or "names"
    except PaveError as error:
        raise PaveError(f"task '{task.name}': {label_title(task)}: {error}") from error


@lru_cache(maxsize=64)
def _label_values(task: str, split: Split, fingerprint: str) -> LabelValues | None:
    """The distinct labels of a split; remembered for a task, as JSON, and the content of the split."""
    parsed: Task = Task.model_validate_json(task)
    if parsed.data.hub is not None:
        return parsed.label_values(_hub_rows(parsed, _read_hub(parsed, split)))
    rows, digest = _read_local(parsed, split, _local_source(parsed, split))
    if not fingerprint.startswith(digest):
        raise changing(parsed, split)
    return parsed.label_values(rows)
