"""One safetensors file with a header of our own: written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pave_lightning.system.files import replacing, write_tensors


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
    with replacing(file, durable=True) as unfinished:
        write_tensors(unfinished, tensors, {key: json.dumps(header, sort_keys=True)})
