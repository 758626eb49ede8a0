"""Which task vectors were merged, as tables and pictures show it: plain, purified, and other stacks by their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

KNOWN = ("", "plain", "purified")
# Of Okabe and Ito's palette, told apart with any colour vision; experts and base have others.
COLOURS = {"plain": "#999999", "purified": "#0072B2", "": "#999999"}
OTHER_COLOURS = ("#E69F00", "#CC79A7", "#56B4E9", "#000000", "#7F6000")


def in_order(vectors: Iterable[str]) -> list[str]:
    """Each once: none, plain and purified first, then the others as they come.

    Example:
        >>> in_order(["halved", "purified", "dropped", "plain", "halved"])
        ['plain', 'purified', 'halved', 'dropped']
    """
    found = dict.fromkeys(vectors)
    return [*(name for name in KNOWN if name in found), *others_of(found)]


def others_of(vectors: Iterable[str]) -> list[str]:
    """Those that are neither plain nor purified, each once, as they come."""
    return [name for name in dict.fromkeys(vectors) if name not in KNOWN]


def colour_of(vectors: str, all_of_them: Sequence[str]) -> str:
    """The colour of task vectors in a picture: a fixed one, or that of their place among the others in it."""
    if vectors in COLOURS:
        return COLOURS[vectors]
    return OTHER_COLOURS[others_of(all_of_them).index(vectors) % len(OTHER_COLOURS)]
