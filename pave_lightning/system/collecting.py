"""How often Python looks for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# New objects before the youngest ones are looked at; Python's own limit is 700.
SELDOM = 50_000


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Within this block, look for garbage seldom: of what is imported hardly anything is, and looking takes time."""
    before = gc.get_threshold()
    gc.set_threshold(SELDOM, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
