"""Arrow files that are made once and read memory-mapped; one that is damaged is noticed, set aside and made anew."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from pave_lightning.errors import PaveError
from pave_lightning.system.files import UNFINISHED, file_sha256, naming_file, set_aside

log = logging.getLogger("pave_lightning")

DIGITS = 32


def found_copy(folder: Path, stem: str) -> Path | None:
    """The undamaged Arrow file of that stem that `kept_copy` made; None where there is none. Nothing is written."""
    found = folder.glob(f"{stem}-*.arrow")
    return next((path for path in sorted(found) if path.name == f"{stem}-{_digest(path)}.arrow"), None)


def kept_copy(folder: Path, stem: str, make: Callable[[Path], None]) -> Path:
    """The Arrow file of that stem, made now if it is not there.

    Its name ends with the sha256 of its content, so no other content is ever taken for it.

    Args:
        folder: where such files are kept; made if it is not there.
        stem: names everything that the content depends on; letters, digits, '_', '.' and '-'.
        make: writes the file to the path that it is given.
    """
    for path in sorted(folder.glob(f"{stem}-*.arrow")):
        if path.name.removeprefix(f"{stem}-") == f"{_digest(path)}.arrow":
            return path
        with suppress(FileNotFoundError):  # another process may have set it aside
            log.warning("%s is damaged; it is set aside as %s and made anew", path, set_aside(path).name)
    folder.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: two processes may do this at once, and whoever is last replaces equal by equal.
    # In a folder of its own, since `datasets` writes to further names beside the one that it is given.
    place = TemporaryDirectory(prefix=f"{stem}{UNFINISHED}", dir=folder, ignore_cleanup_errors=True)
    with naming_file(folder), place:
        unfinished = Path(place.name) / "rows.arrow"
        make(unfinished)
        path = folder / f"{stem}-{_digest(unfinished)}.arrow"
        unfinished.replace(path)
    return path


def read_copy(path: Path) -> pa.Table:
    """The rows of an Arrow file, memory-mapped."""
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
        return stream.read_all()


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)[:DIGITS]
    except PaveError:
        return ""
