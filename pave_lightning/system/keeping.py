"""What is costly to make and asked for several times, made once while something larger is done."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_kept: ContextVar[dict[Hashable, Any] | None] = ContextVar("kept", default=None)


@contextmanager
def keeping() -> Iterator[None]:
    """Keep what is made by `kept`, until the outermost of these blocks ends.

    The same object is given to all who ask, so nobody may change it.
    """
    if _kept.get() is not None:
        yield
        return
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def kept(key: Hashable, make: Callable[[], T]) -> T:
    """What was made for a key before, inside of `keeping`; made each time outside of it.

    Args:
        key: everything that it depends on; begins with a name that tells it from what others keep.
        make: makes it. What it raises is raised each time.

    Example:
        >>> with keeping():
        ...     one, other = (kept(("a list", 1), list) for _ in range(2))
        >>> one is other
        True
    """
    there = _kept.get()
    if there is None:
        return make()
    if key not in there:
        there[key] = make()
    found: T = there[key]
    return found
