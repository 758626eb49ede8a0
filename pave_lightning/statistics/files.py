"""One safetensors file with a header of our own: written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.system.files import check_header, read_failure, replacing, write_tensors


@dataclass(frozen=True)
class Described:
    """What a file says of itself before any tensor is read.

    Attributes:
        text: the header, not yet understood.
        shapes: the shape of each tensor, by name in alphabetical order.
        all_float32: whether all tensors are.
    """

    text: str
    shapes: dict[str, tuple[int, ...]]
    all_float32: bool


def read_described(file: Path, key: str, what: str, first: str, again: str) -> Described:
    """Read what `write_whole` wrote, but for the tensors.

    Args:
        file: the file.
        key: name of the metadata entry that holds the header.
        what: what the file holds of a task, in messages: ``statistics``.
        first: what to do where there is no such file.
        again: what to do where it is damaged.

    Raises:
        PaveError: there is no such file, it is no safetensors file, or it has no such header.
    """
    if not file.is_file():
        raise PaveError(f"no {what} at {file}: {first}")
    try:
        check_header(file)
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(key)
            views = {name: opened.get_slice(name) for name in sorted(opened.keys())}
            shapes = {name: tuple(view.get_shape()) for name, view in views.items()}
            all_float32 = {str(view.get_dtype()) for view in views.values()} <= {"F32"}
    except (SafetensorError, OSError) as error:
        damaged = f"{file} is truncated or no safetensors file ({error}): {again}"
        raise PaveError(read_failure(file, damaged)) from error
    if text is None:
        raise PaveError(f"{file} is a safetensors file, but holds no {what} of a task: give one written by a capture")
    return Described(text, shapes, all_float32)


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
