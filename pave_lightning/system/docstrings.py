"""Docstrings as a terminal shows them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

# Signs of formulas, besides Greek letters; what is neither keeps its name, as sin does.
SIGNS = {
    **{"sum": "∑", "nabla": "∇", "sqrt": "√", "cdot": "·", "odot": "⊙", "dots": "…", "in": "∈", "sim": "~"},
    **{"le": "≤", "ge": "≥", "ne": "≠", "neq": "≠", "approx": "≈", "leftarrow": "←", "qquad": "    "},
    **{"lambda": "λ", "Lambda": "Λ"},  # which Unicode spells in another way
    **{"langle": "⟨", "rangle": "⟩", "lfloor": "⌊", "rfloor": "⌋", "left": "", "right": "", "Big": ""},
}
ACCENTS = {"hat": "\N{COMBINING CIRCUMFLEX ACCENT}", "bar": "\N{COMBINING MACRON}"}
ACCENTS |= {"tilde": "\N{COMBINING TILDE}", "dot": "\N{COMBINING DOT ABOVE}"}


def readable(text: str) -> str:
    """A docstring without its markup, formulas in signs."""
    text = with_formulas(text, lambda latex: f"    {_formula(latex)}", _formula)
    return re.sub(r":[a-z]+:`([^`]*)`", r"\1", text).replace("``", "`")


def with_formulas(text: str, alone: Callable[[str], str], in_line: Callable[[str], str]) -> str:
    """A docstring with something else in the place of its formulas.

    Args:
        text: the docstring.
        alone: gives what stands for a formula on lines of its own, from its LaTeX.
        in_line: the same for one inside of a line.
    """
    text = re.sub(r"\.\. math:: ((?:.+\n?)+)", lambda found: alone(found[1]), text)
    return re.sub(r":math:`([^`]*)`", lambda found: in_line(found[1]), text)


def _formula(latex: str) -> str:
    """A formula in LaTeX as one line of text has it: fractions with a slash, indices after _ and powers after ^."""
    text, before = re.sub(r"\\[,;!]", "", latex).replace(r"\|", "‖"), ""
    while text != before:  # from the innermost braces outwards
        before = text
        text = re.sub(r"\\math[a-z]+\{([^{}]*)\}", r"\1", text)
        text = re.sub(r"([_^])\{([^{}]*)\}", lambda found: found[1] + _grouped(found[2]), text)
        text = re.sub(r"\\sqrt\{([^{}]*)\}", lambda found: rf"\sqrt{_grouped(found[1])}", text)
        text = re.sub(
            r"\\frac(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\d)(\d))",
            lambda found: f"{_grouped(found[1] or found[3])} / {_grouped(found[2] or found[4])}",
            text,
        )
    accented = r"\\(hat|bar|tilde|dot)(?![a-z])\s*(\\[A-Za-z]+|\w)"
    text = re.sub(accented, lambda found: _sign(found[2]) + ACCENTS[found[1]], text)
    return re.sub(r"\\[A-Za-z]+", lambda found: _sign(found[0]), text)


def _grouped(text: str) -> str:
    """In parentheses, unless it is one thing."""
    return text if re.fullmatch(r"[-:]?\\?[\w^]+", text) else f"({text})"


def _sign(command: str) -> str:
    """What a LaTeX command stands for: a sign, a Greek letter, or else its own name; a letter is what it is."""
    name = command.removeprefix("\\")
    if len(name) == 1 or name in SIGNS:
        return SIGNS.get(name, name)
    try:
        return unicodedata.lookup(f"GREEK {'SMALL' if name.islower() else 'CAPITAL'} LETTER {name.upper()}")
    except KeyError:
        return name
