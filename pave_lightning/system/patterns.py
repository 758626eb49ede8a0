"""Regular expressions that recipes and other people's files bring: which are tried, and what they mean."""

from __future__ import annotations

import re

from pave_lightning.errors import shortened

LONGEST_PATTERN = 500


def pattern_problem(pattern: str) -> str | None:
    """Why a pattern of layers is not tried, as the end of a sentence; None if it can be."""
    if len(pattern) > LONGEST_PATTERN or re.search(r"[+*}]\)+[+*{]", pattern):  # which may take for ever
        return f"is not tried: {shortened(pattern)}"
    try:
        re.compile(pattern)
    except re.error as error:
        return f"is none ({error})"
    return None


def fits_pattern(pattern: str, layer: str) -> bool:
    """Whether a pattern in which `pattern_problem` finds nothing means a layer, as peft reads it: it fits its end.

    Args:
        pattern: a regular expression.
        layer: name of the layer in the whole model.
    """
    return re.match(rf"(.*\.)?({pattern})$", layer) is not None
