"""Where files are, also inside installed packages (``package:NAME/PATH``), and what identifies their content."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

from pave_lightning.errors import PaveError

SCHEME = "package:"


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
    """The sha256 of a file's content, in hexadecimal; remembered as long as size and time of change stay."""
    facts = path.stat()
    return _sha256(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
