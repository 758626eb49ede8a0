"""Giving memory back to the system as soon as it is free, and measuring what work takes."""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Arguments of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 1 << 20
# Free memory at the heap's end that is kept: enough for the blocks in use of an elementwise method, which come and go.
_KEPT = 16 << 20
STATUS = Path("/proc/self/status")
# What glibc's own adjustment arrives at in a process that uses large tensors.
_USUAL = 32 << 20


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Within this block, large tensors go back to the system when they are freed; small ones, and elsewhere all, stay.

    The C library keeps freed blocks of up to 32 MB in its heap, one for each thread, where tensors of changing sizes
    leave holes: a walk over the layers of a model then grows to half as much again as it has in use. Does nothing
    where the C library is not glibc.
    """
    mallopt = _mallopt()
    mallopt(_MMAP_THRESHOLD, _LARGE)
    mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _USUAL)
        mallopt(_TRIM_THRESHOLD, 2 * _USUAL)


@dataclass
class MeasuredCost:
    """What a piece of work took.

    Attributes:
        seconds: wall time.
        peak_megabytes: how much the process's memory grew at the most, in millions of bytes; NaN where the system does
            not tell.
    """

    seconds: float = math.nan
    peak_megabytes: float = math.nan


@contextmanager
def measured() -> Iterator[MeasuredCost]:
    """Measure the time and the memory of what is done within; the result is filled in at the end.

    Memory is told by Linux alone, which lets a process forget its highest mark.
    """
    cost = MeasuredCost()
    _trim()  # else what was freed before would be used again, and not count
    before = _status("VmRSS")
    forgotten = _forget_highest()
    start = time.perf_counter()
    try:
        with freed_memory_returned():
            yield cost
    finally:
        cost.seconds = time.perf_counter() - start
        cost.peak_megabytes = (_status("VmHWM") - before) / 1e6 if forgotten else math.nan


def _trim() -> None:
    """Give free memory back to the system, where the C library is glibc."""
    trim = getattr(_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """What this process holds in memory now; its highest so far where the system does not tell."""
    return _status("VmRSS") or highest_resident_bytes()


def highest_resident_bytes() -> int:
    """The most that this process has held in memory so far."""
    found = _status("VmHWM")
    if found:
        return found
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(key: str) -> int:
    if not STATUS.is_file():
        return 0
    found = [line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else 0


def _forget_highest() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@cache
def _library() -> Any:
    """The C library where it is glibc, else nothing: other libraries' mallopt numbers its options otherwise."""
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "gnu_get_libc_version") else None
    except (OSError, TypeError):
        return None


def _mallopt() -> Callable[[int, int], Any]:
    found = getattr(_library(), "mallopt", None)
    return found if found is not None else lambda option, value: None
