"""Where files are, also inside installed packages (``package:NAME/PATH``), who may read them, what identifies them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pave_lightning.errors import PaveError

if TYPE_CHECKING:
    from torch import Tensor

SCHEME = "package:"
UMASK = threading.Lock()


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
    """The sha256 of a file's content, in hexadecimal; remembered as long as size and time of change stay.

    Raises:
        PaveError: the file is missing, or this user may not read it.
    """
    try:
        facts = path.stat()
        return _sha256(path, facts.st_size, facts.st_mtime_ns)
    except OSError as error:
        raise PaveError(_unopened(path, error)) from error


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
