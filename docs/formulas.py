"""Docstrings for pages: formulas in LaTeX become MathML, which browsers show without a script; roles become code."""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

from pave_lightning.system.docstrings import with_formulas


def as_markdown(text: str) -> str:
    """A docstring as Markdown."""
    text = with_formulas(text, lambda latex: f"{_formula(latex, 'block')}\n", lambda latex: _formula(latex, "inline"))
    return re.sub(r":[a-z]+:`([^`]*)`", r"`\1`", text).replace("``", "`")


def _formula(latex: str, display: str) -> str:
    return convert(" ".join(latex.split()), display=display)


class Formulas(griffe.Extension):
    """Changes the docstrings of everything that a page shows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
