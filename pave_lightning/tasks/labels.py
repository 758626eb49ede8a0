"""Names of classes, as two sources write them."""

from __future__ import annotations

from collections.abc import Sequence


def match_names(names: Sequence[str], classes: Sequence[str]) -> list[int | None]:
    """For each name the index of the class that it means, None where it is no class.

    Names are compared without regard to case and to space around them, unless two classes differ by that alone.

    Args:
        names: names as a file writes them.
        classes: names of the classes, in the order of their indices.
    """
    plain = [_plain(name) for name in classes]
    if len(set(plain)) < len(plain):
        exact = {name: index for index, name in enumerate(classes)}
        return [exact.get(name) for name in names]
    known = {name: index for index, name in enumerate(plain)}
    return [known.get(_plain(name)) for name in names]


def _plain(name: str) -> str:
    return name.strip().casefold()
