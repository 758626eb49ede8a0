"""Giving memory back to the system as soon as it is free."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# Arguments of glibc's mallopt, from malloc.h.
_MMAP_THRESHOLD = -3
_LARGE = 1 << 20
# What glibc's own adjustment arrives at in a process that uses large tensors.
_USUAL = 32 << 20


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Within this block, large tensors go back to the system when they are freed; elsewhere they stay for reuse.

    The C library keeps freed blocks of up to 32 MB in its heap, one for each thread, where tensors of changing sizes
    leave holes: a walk over the layers of a model then grows to half as much again as it has in use. Does nothing
    where the C library is not glibc.
    """
    mallopt = _mallopt()
    mallopt(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _USUAL)


@cache
def _mallopt() -> Callable[[int, int], Any]:
    try:
        library = ctypes.CDLL(None)
        found: Callable[[int, int], Any] = library.mallopt
        library.gnu_get_libc_version  # noqa: B018 - other libraries' mallopt numbers its options otherwise
    except (OSError, AttributeError, TypeError):
        return lambda option, value: None
    return found
