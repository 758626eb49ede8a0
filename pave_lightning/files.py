"""Where files are, also inside installed packages (``package:NAME/PATH``), who may read them, what identifies them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pave_lightning.errors import PaveError

if TYPE_CHECKING:
    from torch import Tensor

SCHEME = "package:"
UMASK = threading.Lock()
# What follows the name of what was found damaged and set aside.
DAMAGED = ".damaged-"

# Size, time of the last change of the content, inode, time of the last change of anything about the file.
Facts = tuple[int, int, int, int]
SECOND_NS = 1_000_000_000
# The clock of most file systems moves every 10 ms at the latest; times in whole seconds come from coarser ones.
TICK_NS, COARSE_TICK_NS = 50_000_000, 2 * SECOND_NS
_hashes: dict[Facts, str] = {}
_noted: dict[str, tuple[Facts, str]] = {}


def local_path(reference: str) -> Path:
    """The path that a reference means: a path of the file system, or a file or folder inside an installed package.

    The package is found, not imported.

    Args:
        reference: a path, or ``package:NAME/PATH``.

    Raises:
        PaveError: the package is not installed. Whether the path exists is not looked at.
    """
    if not reference.startswith(SCHEME):
        return Path(reference).expanduser()
    name, _, inside = reference.removeprefix(SCHEME).partition("/")
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        distribution = name.replace("_", "-")
        raise PaveError(f"{reference}: the package '{name}' is not installed; run: pip install {distribution}")
    return Path(found.submodule_search_locations[0]) / inside


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal.

    It is remembered for as long as size, time of change (of content and of the entry itself, to the nanosecond) and
    inode stay; also across processes, see `load_hashes`. What was written a moment ago is hashed anew each time: within
    one tick of the file system's clock a second change leaves the same times.

    Raises:
        PaveError: the file is missing, or this user may not read it.
    """
    try:
        facts = _facts(path)
        place = str(path.absolute())
        known = _hashes.get(facts) or (_noted[place][1] if _noted.get(place, (None, ""))[0] == facts else None)
        if known is None:
            with path.open("rb") as stream:
                known = hashlib.file_digest(stream, "sha256").hexdigest()
            if _is_young(facts) or _facts(path) != facts:
                return known
    except OSError as error:
        raise PaveError(_unopened(path, error)) from error
    _hashes[facts] = known
    _noted[place] = (facts, known)
    return known


def _facts(path: Path) -> Facts:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns


def _is_young(facts: Facts) -> bool:
    """Whether a file was changed so recently that a further change may leave the same times."""
    times = (facts[1], facts[3])
    coarse = all(moment % SECOND_NS == 0 for moment in times)
    return time.time_ns() - max(times) < (COARSE_TICK_NS if coarse else TICK_NS)


def load_hashes(note: Path) -> None:
    """Take in the hashes that an earlier process noted; each counts only while its file's size, times and inode stay.

    Args:
        note: a file that `save_hashes` wrote; one that is missing or damaged says nothing.
    """
    try:
        entries = json.loads(note.read_text())
        found = {str(place): (_as_facts(facts), str(sha256)) for place, (facts, sha256) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return
    for place, entry in found.items():
        _noted.setdefault(place, entry)


def save_hashes(note: Path, wanted: Callable[[Path], bool]) -> None:
    """Note the hashes of files that are as they were when they were hashed, for later processes.

    Args:
        note: the file, replaced at once; nothing happens where it cannot be written.
        wanted: which files it is to name, by their absolute paths.
    """
    entries = {}
    for place, (facts, sha256) in sorted(_noted.items()):
        with suppress(OSError):
            if wanted(Path(place)) and _facts(Path(place)) == facts:
                entries[place] = [facts, sha256]
    temporary = note.with_name(f"{note.name}.{os.getpid()}.tmp")
    with suppress(OSError):  # it only saves time
        temporary.write_text(json.dumps(entries))
        temporary.replace(note)


def forget_hashes() -> None:
    """Forget every hash, so that all files are read again."""
    _hashes.clear()
    _noted.clear()


def _as_facts(values: Sequence[int]) -> Facts:
    size, modified, inode, changed = map(int, values)
    return size, modified, inode, changed


def set_aside(path: Path) -> Path:
    """Give a damaged file or folder another name, which says so; returns it.

    The name is the old one and ``.damaged-N``, with the first N that is free.
    """
    number = 1
    while (kept := path.with_name(f"{path.name}{DAMAGED}{number}")).exists():
        number += 1
    path.rename(kept)
    return kept


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file that others may read as they may read any new file of this user.

    Args:
        path: the file; its folder must exist.
        tensors: contiguous, by name.
        metadata: entries of the header, where there are any; safetensors writes several in random order.
    """
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    let_others_read(path)


def let_others_read(path: Path) -> None:
    """Give a file the permissions of any new file (the umask): what safetensors writes only its owner may read."""
    # The umask can only be read by setting it; a strict one, in case another thread makes a file in between.
    with UMASK:
        umask = os.umask(0o077)
        os.umask(umask)
    with suppress(PermissionError):  # some file systems have no modes
        path.chmod(0o666 & ~umask)


def read_failure(path: Path, damaged: str) -> str:
    """What to say of a file that safetensors could not read: that it is kept from this user, or else ``damaged``.

    Args:
        path: the file; safetensors calls it missing whatever keeps it from being opened.
        damaged: the message for a file that can be opened, or is really missing.
    """
    try:
        path.open("rb").close()
    except FileNotFoundError:
        return damaged
    except OSError as error:
        return _unopened(path, error)
    return damaged


def _unopened(path: Path, error: OSError) -> str:
    hint = "; ask its owner for the permission to read it" if isinstance(error, PermissionError) else ""
    return f"{path} cannot be read: {error.strerror or error}{hint}"
