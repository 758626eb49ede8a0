"""One safetensors file with a header of our own: written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pave_lightning.system.files import write_tensors


def write_whole(file: Path, tensors: Mapping[str, Tensor], key: str, header: Mapping[str, Any]) -> None:
    """Write tensors and a header to one safetensors file.

    The file appears whole or not at all: it is written under a temporary name in the same folder, then renamed. Equal
    content gives equal bytes.

    Args:
        file: the file; its folder is created when it does not exist.
        tensors: contiguous, by name.
        key: name of the one metadata entry; safetensors writes several in random order.
        header: plain values.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        write_tensors(temporary, tensors, {key: json.dumps(header, sort_keys=True)})
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
