"""Pieces of markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pave_lightning.errors import visible


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: str) -> str:
    """Text that markdown shows as it stands, in one line and in one table cell."""
    return re.sub(r"([\\`*_\[\]<>|#&~$])", r"\\\1", visible(" ".join(text.split())))
