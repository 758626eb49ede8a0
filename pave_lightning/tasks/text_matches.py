"""Whether a text that was written is a right one; without torch, for reports too."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Collection, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain_text(words: str, ignore: Collection[str] = ()) -> str:
    r"""A text as it is compared: no blanks at its ends, one where there are several.

    Args:
        words: the text.
        ignore: what makes no difference besides: ``case``, ``punctuation``.

    Example:
        >>> plain_text("  The  answer.\n", ["case", "punctuation"])
        'the answer'
    """
    if "case" in ignore:
        words = words.casefold()
    if "punctuation" in ignore:
        words = words.translate(_PUNCTUATION)
    return " ".join(words.split())


def is_match(written: str, right: Sequence[str]) -> bool:
    """Whether a text is one of the right ones; all as `plain_text` gives them."""
    return written in right


def is_contained(written: str, right: Sequence[str]) -> bool:
    """Whether one of the right texts stands in a text, and no word goes on beyond its ends.

    Example:
        >>> is_contained("it is 12", ["2"]), is_contained("it is 12.", ["12"])
        (False, True)
    """
    return any(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", written) for one in right)


TESTS: dict[str, Callable[[str, Sequence[str]], bool]] = {"exact_match": is_match, "contains": is_contained}
