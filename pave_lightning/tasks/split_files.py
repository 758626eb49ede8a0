"""Datasets kept in a folder the way the hub keeps them: one file a split, named after it, and slices of splits."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from pave_lightning.errors import listed, nearest
from pave_lightning.system.files import local_path
from pave_lightning.tasks.options import Data
from pave_lightning.tasks.rows import Rows, UnreadableError

ENDINGS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
# What `datasets` takes for the name of a split in names of files, by the name that a recipe uses.
OTHER_WORDS = {"validation": ("dev", "valid", "val"), "train": ("training",), "test": ("testing", "eval")}

_SLICE = re.compile(r"(?P<name>[^\[\]]+?)\s*(?:\[(?P<first>-?\d+%?)?:(?P<last>-?\d+%?)?\])?")


@dataclass(frozen=True)
class SplitSlice:
    """A split, or a part of its rows, as hub datasets name it: ``train``, ``train[:90%]``, ``train[-500:]``.

    Attributes:
        name: the split.
        first: where the part begins, a row or a share such as ``90%``; negative numbers count from the end.
        last: where it ends, without that row.
    """

    name: str
    first: str | None = None
    last: str | None = None

    @classmethod
    def parse(cls, text: str) -> SplitSlice:
        """Read a split's name with its slice.

        Raises:
            UnreadableError: it is none.
        """
        found = _SLICE.fullmatch(text.strip())
        if found is None:
            raise UnreadableError(
                f"expected the name of a split, such as train, or a part of it, such as train[:90%], found '{text}'"
            )
        return cls(found["name"], found["first"], found["last"])

    def rows(self, count: int) -> slice:
        """The rows that are meant, of so many; shares are rounded to the nearest row, as `datasets` does."""
        return slice(_place(self.first, 0, count), _place(self.last, count, count))


def _place(text: str | None, default: int, count: int) -> int:
    if text is None:
        return default
    place = round(int(text[:-1]) / 100 * count) if text.endswith("%") else int(text)
    return min(max(place + count if place < 0 else place, 0), count)


def split_file(data: Data, source: str) -> Path:
    """The file of a split in ``data.folder``.

    Args:
        data: its ``folder`` and ``config`` are used: where there is a configuration, its files lie in a folder of that
            name below the first (case and punctuation are ignored where no folder has exactly that name, so that
            ``sst2`` finds ``SST-2``).
        source: the split, with or without a slice.

    Raises:
        UnreadableError: there is no such folder or file, or there are several.
    """
    name = SplitSlice.parse(source).name
    folder = _configuration(data)
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    files = [file for place in places for file in sorted(place.iterdir()) if file.suffix.lower() in ENDINGS]
    for wanted in (name, *_other_names(name)):
        found = [file for file in files if re.fullmatch(rf"{re.escape(wanted)}(-\d+-of-\d+)?", file.stem)]
        if len(found) > 1:
            raise UnreadableError(
                f"expected one file for the split '{name}' in {folder}, found {listed([file.name for file in found])}; "
                "join them or leave one"
            )
        if found:
            return found[0]
    known = [re.sub(r"-\d+-of-\d+$", "", file.stem) for file in files]
    hint = nearest(name, sorted(set(known))) if known else "there are no csv, tsv, jsonl or parquet files in it"
    raise UnreadableError(f"there is no file of the split '{name}' in {folder}, such as {name}.parquet; {hint}")


def split_folder(data: Data, source: str) -> Path | None:
    """The folder of a split in ``data.folder``, as images are kept (``train/cat/1.png``); None where there is none.

    Args:
        data: as `split_file`.
        source: as `split_file`.

    Raises:
        UnreadableError: it is a part of such a split that is asked for.
    """
    part = SplitSlice.parse(source)
    folder = _configuration(data)
    found = [place for name in (part.name, *_other_names(part.name)) if (place := folder / name).is_dir()]
    if found and (part.first is not None or part.last is not None):
        raise UnreadableError(
            f"{found[0]} is a folder with one sub-folder a class, and '{source}' would leave whole classes out; "
            f"name '{part.name}', and limit its rows with 'examples'"
        )
    return found[0] if found else None


def sliced(rows: Rows, source: str) -> Rows:
    """The part of a split's rows that is asked for."""
    part = SplitSlice.parse(source).rows(rows.count)
    count = max(part.stop - part.start, 0)
    return replace(
        rows,
        columns={name: column.slice(part.start, count) for name, column in rows.columns.items()},
        count=count,
        lines=None if rows.lines is None else rows.lines[part.start : part.start + count],
    )


def _configuration(data: Data) -> Path:
    """The folder of a dataset's files."""
    folder = local_path(data.folder or "")
    if not folder.is_dir():
        raise UnreadableError(f"there is no folder {folder}; correct 'data.folder'")
    if data.config is None or (folder / data.config).is_dir():
        return folder / (data.config or "")
    below = [place for place in sorted(folder.iterdir()) if place.is_dir()]
    alike = [place for place in below if _letters(place.name) == _letters(data.config)]
    if len(alike) == 1:
        return alike[0]
    names = [place.name for place in below]
    hint = nearest(data.config, names) if names else "there are no folders in it"
    raise UnreadableError(f"the folder {folder} has no folder '{data.config}'; {hint}")


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _other_names(name: str) -> list[str]:
    """Other names of a split: ``dev_matched`` for ``validation_matched``."""
    word, *rest = name.split("_", 1)
    return ["_".join([other, *rest]) for other in OTHER_WORDS.get(word, ())]
