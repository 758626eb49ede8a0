"""What is costly to find out about a model, or about this machine, kept for the next process."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from pave_lightning.system.files import replacing

T = TypeVar("T")


def remembered(
    kind: type[T],
    key: Any,
    find: Callable[[], T],
    *,
    topic: str = "architectures",
    code: Sequence[Path] = (Path(__file__).parent,),
    lasts: float = math.inf,
) -> T:
    """What was found for a key before, or else what is found now; kept in the folder of Hugging Face's caches.

    The versions of transformers and torch and the code that finds it are parts of the key. Where nothing can be read or
    written, it is found anew each time.

    Args:
        kind: the dataclass that is kept.
        key: plain values that it depends on.
        find: finds it.
        topic: name of the folder that holds what is alike.
        code: the folders of the code that finds it.
        lasts: for how many seconds it is true; after that it is found anew.
    """
    adapter = TypeAdapter(kind)
    parts = json.dumps([kind.__name__, key, _versions(*code)], sort_keys=True, default=str)
    try:
        file = _folder(topic) / f"{hashlib.sha256(parts.encode()).hexdigest()}.json"
        with suppress(OSError, ValueError):
            if time.time() - file.stat().st_mtime < lasts:
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


def _folder(topic: str) -> Path:
    from huggingface_hub import cached_assets_path

    return cached_assets_path("pave-lightning", namespace="models", subfolder=topic)


@cache
def _versions(*code: Path) -> list[str]:
    from importlib.metadata import version

    own = b"".join(file.read_bytes() for folder in code for file in sorted(folder.glob("*.py")))
    return [version("transformers"), version("torch"), hashlib.sha256(own).hexdigest()]
