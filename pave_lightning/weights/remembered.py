"""What is costly to find out about a model, kept for the next process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from pave_lightning.system.files import replacing

T = TypeVar("T")


def remembered(kind: type[T], key: Any, find: Callable[[], T]) -> T:
    """What was found for a key before, or else what is found now; kept in the folder of Hugging Face's caches.

    The versions of transformers and torch and the code of this folder are parts of the key. Where nothing can be read
    or written, it is found anew each time.

    Args:
        kind: the dataclass that is kept.
        key: plain values that it depends on.
        find: finds it.
    """
    adapter = TypeAdapter(kind)
    parts = json.dumps([kind.__name__, key, _versions()], sort_keys=True, default=str)
    try:
        file = _folder() / f"{hashlib.sha256(parts.encode()).hexdigest()}.json"
        with suppress(OSError, ValueError):
            return adapter.validate_json(file.read_bytes(), strict=False)
    except (OSError, ValueError):  # huggingface_hub tells a file where a folder should be by a ValueError
        return find()
    found = find()
    with suppress(OSError, ValueError):
        content = adapter.dump_json(found, fallback=str)
        # What the next process will read, so that both see the same: tuples, texts for keys.
        found = adapter.validate_json(content, strict=False)
        with replacing(file) as unfinished:
            unfinished.write_bytes(content)
    return found


def _folder() -> Path:
    from huggingface_hub import cached_assets_path

    return cached_assets_path("pave-lightning", namespace="models", subfolder="architectures")


@cache
def _versions() -> list[str]:
    from importlib.metadata import version

    own = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return [version("transformers"), version("torch"), hashlib.sha256(own).hexdigest()]
