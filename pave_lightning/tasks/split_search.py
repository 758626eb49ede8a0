"""Which files belong together: the splits of a data set, found by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pave_lightning.config import slug
from pave_lightning.errors import Problems
from pave_lightning.tasks.options import Data
from pave_lightning.tasks.rows import UnreadableError
from pave_lightning.tasks.split_files import ENDINGS, OTHER_WORDS, split_file

SPLITS: tuple[str, ...] = ("train", "validation", "test")
_WORDS = {word: split for split, others in OTHER_WORDS.items() for word in (split, *others)}
_WORD = "|".join(_WORDS)
_PART = re.compile(r"-\d+-of-\d+$")
_SEVERAL = re.compile(r"-\d+-of-0*([2-9]|1\d+)$")
_BEHIND = re.compile(rf"(?:(?P<rest>.+?)[-_. ])?(?P<word>{_WORD})", re.IGNORECASE)
_IN_FRONT = re.compile(rf"(?P<word>{_WORD})[-_. ](?P<rest>.+)", re.IGNORECASE)


@dataclass(frozen=True)
class FoundSplits:
    """The files of one data set.

    Attributes:
        name: what the task may be called.
        files: the files by split, train first; a single file that no split is named after is ``train``.
    """

    name: str
    files: dict[str, Path]

    def data(self) -> dict[str, str]:
        """The section ``data`` of a recipe: the files, or parts of them where there is no file for a split.

        Raises:
            UnreadableError: parts of a file cannot be named, since another one has the same name.
        """
        if len(self.files) == len(SPLITS):
            return {split: str(file) for split, file in self.files.items()}
        train = self.files["train"]
        if train.is_dir():
            absent = [split for split in SPLITS if split not in self.files]
            raise UnreadableError(f"there is no folder {' and no folder '.join(absent)} beside {train.name}")
        source = {split: _PART.sub("", file.stem) for split, file in self.files.items()}
        for split, file in self.files.items():
            found = split_file(Data(folder=str(train.parent)), source[split])
            if found != file:
                raise UnreadableError(f"{found.name} and {file.name} have the same name; move one of them elsewhere")
        rows, further = source["train"], source.get("test", source.get("validation"))
        parts = {"train": f"{rows}[:90%]", "validation": f"{rows}[90%:]", "test": further or ""}
        if further is None:
            parts = {"train": f"{rows}[:80%]", "validation": f"{rows}[80%:90%]", "test": f"{rows}[90%:]"}
        return {"folder": str(train.parent), **parts}


def split_of(file: Path) -> tuple[str | None, str | None]:
    """The split that a file is named after, and the rest of its name; None for what it has not.

    Example:
        >>> split_of(Path("reviews-dev.csv")), split_of(Path("train-00000-of-00001.parquet")), split_of(Path("a.csv"))
        (('validation', 'reviews'), ('train', None), (None, 'a'))
    """
    stem = _PART.sub("", file.stem)
    found = _BEHIND.fullmatch(stem) or _IN_FRONT.fullmatch(stem)
    if found is None:
        return None, stem
    return _WORDS[found["word"].casefold()], found["rest"]


def search_splits(paths: Sequence[Path], problems: Problems) -> list[FoundSplits]:
    """The data sets that files and folders belong to, with the files of other splits that lie beside them.

    Args:
        paths: files of any split, or folders of files, or of folders of images, that are named after splits.
        problems: is told of paths that hold no rows.

    Returns:
        One entry a data set, in the order of the paths; their names differ.
    """
    found: dict[tuple[Path, str | None], FoundSplits] = {}
    for path in paths:
        if not path.exists():
            problems.add(f"there is no file {path}")
            continue
        folder, rest = (path, None) if path.is_dir() else (path.parent, split_of(path)[1])
        if (folder, rest) in found:
            continue
        files = dict(_of(folder, rest, path.suffix.lower()))
        parts = [file for file in files.values() if _SEVERAL.search(file.stem)]
        if parts:
            problems.add(f"{parts[0]} is one of several parts of a file; join them")
        elif not files:
            told = "holds no file that is named after a split, such as train.csv" if path.is_dir() else "cannot be read"
            known = ", ".join(ENDINGS)
            problems.add(f"{path} {told}; expected {known}" + ("; name the files themselves" if path.is_dir() else ""))
        elif "train" not in files:
            problems.add(
                f"{', '.join(map(str, files.values()))}: there are no rows to train on; expected a file such as "
                f"{folder / '-'.join(filter(None, (rest, 'train')))}{next(iter(files.values())).suffix}"
            )
        else:
            ordered = {split: files[split] for split in SPLITS if split in files}
            name = _free(
                slug(rest or folder.absolute().name).strip("-_.") or "task", [one.name for one in found.values()]
            )
            found[folder, rest] = FoundSplits(name, ordered)
    return list(found.values())


def _of(folder: Path, rest: str | None, suffix: str) -> Iterator[tuple[str, Path]]:
    """The files of a folder that have the same rest of a name, by split; a file without a split is that of training."""
    known = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in ENDINGS and file.is_file()]
    if rest is None and not known:  # folders of images, with one folder for each class
        known = [place for place in sorted(folder.iterdir()) if place.is_dir() and split_of(place)[1] is None]
        suffix = ""
    alike = [(*split_of(file), file) for file in known if suffix in ("", file.suffix.lower())]
    yield from (("train", file) for split, own, file in alike if own == rest and split is None)
    yield from ((split, file) for split, own, file in alike if own == rest and split is not None)


def _free(name: str, taken: Iterable[str]) -> str:
    """The name, with a number behind it where it is taken."""
    count, wanted = 1, name
    while wanted in set(taken):
        count += 1
        wanted = f"{name}-{count}"
    return wanted
