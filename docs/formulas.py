"""Docstrings for pages: formulas in LaTeX become MathML, which browsers show without a script; roles become code."""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert


def as_markdown(text: str) -> str:
    """A docstring as Markdown."""
    text = re.sub(r"\.\. math:: ((?:.+\n?)+)", lambda found: f"{_formula(found[1], 'block')}\n", text)
    text = re.sub(r":math:`([^`]*)`", lambda found: _formula(found[1], "inline"), text)
    return re.sub(r":[a-z]+:`([^`]*)`", r"`\1`", text).replace("``", "`")


def _formula(latex: str, display: str) -> str:
    return convert(" ".join(latex.split()), display=display)


class Formulas(griffe.Extension):
    """Changes the docstrings of everything that a page shows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
