"""What ``pave methods`` prints."""

from __future__ import annotations

import inspect
import os
import re
import unicodedata
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pave_lightning.merging import MergeMethod, known_methods, method_named
from pave_lightning.system.terminal import terminal

HEADINGS = ("method", "what it does", "form", "needs", "cost", "scale", "source")
# In narrower terminals seven columns are too narrow to read, or cut words in two.
WIDTH_OF_COLUMNS = 140
# Of lines in a file or for another program, unless the variable COLUMNS says otherwise.
WIDTH_OF_FILES = 100

# Signs of formulas, besides Greek letters; what is neither keeps its name, as sin does.
SIGNS = {
    **{"sum": "∑", "nabla": "∇", "sqrt": "√", "cdot": "·", "odot": "⊙", "dots": "…", "in": "∈", "sim": "~"},
    **{"le": "≤", "ge": "≥", "ne": "≠", "neq": "≠", "approx": "≈", "leftarrow": "←", "qquad": "    "},
    **{"lambda": "λ", "Lambda": "Λ"},  # which Unicode spells in another way
    **{"langle": "⟨", "rangle": "⟩", "lfloor": "⌊", "rfloor": "⌋", "left": "", "right": "", "Big": ""},
}
ACCENTS = {"hat": "\N{COMBINING CIRCUMFLEX ACCENT}", "bar": "\N{COMBINING MACRON}"}
ACCENTS |= {"tilde": "\N{COMBINING TILDE}", "dot": "\N{COMBINING DOT ABOVE}"}


def print_methods(name: str | None = None, console: Console | None = None) -> None:
    """Print every merge method, or one method with its options.

    Args:
        name: the method; all of them where none is named.
        console: where to print; standard output where none is given.

    Raises:
        PaveError: no method has that name.
    """
    if console is None:
        console = terminal(markup=True)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console = terminal(markup=True, width=WIDTH_OF_FILES)
    if name is None:
        wide = console.width >= WIDTH_OF_COLUMNS
        console.print(_in_columns() if wide else _in_paragraphs())
        return
    method = method_named(name)
    console.print(f"[bold]{name}[/bold]: {escape(method.summary)} ({escape(method.source)})")
    console.print(_readable(inspect.getdoc(method) or ""), markup=False, highlight=False)
    for key, field in method.Options.model_fields.items():
        default = field.get_default(call_default_factory=True)
        console.print(f"  options.{key} (default {default}): {_readable(field.description or '')}", markup=False)


def _in_columns() -> Table:
    """One row a method; names and the words of all else stay whole."""
    table = Table()
    known = sorted(known_methods().items())
    for heading in HEADINGS:
        whole = heading in ("method", "form", "cost", "scale")
        table.add_column(heading, no_wrap=whole, overflow="fold")
    table.columns[-1].min_width = max(len(word) for _, method in known for word in method.source.split())
    for name, method in known:
        cells = (name, method.summary, method.form, _needs(method), method.cost, _scale(method), method.source)
        table.add_row(*map(escape, cells))
    return table


def _in_paragraphs() -> Table:
    """Two columns, the second of which tells everything, for narrow terminals."""
    table = Table(show_lines=True)
    table.add_column("method", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    for name, method in sorted(known_methods().items()):
        scale = "no scale" if method.default_scale is None else f"scale {_scale(method)}"
        details = f"{method.form}; {_needs(method)}; {method.cost}; {scale}"
        table.add_row(escape(name), escape(f"{method.summary}\n{details}\n{method.source}"))
    return table


def _needs(method: type[MergeMethod]) -> str:
    return "; ".join(_needed(method))


def _needed(method: type[MergeMethod]) -> Iterator[str]:
    """What a method needs besides the weights, and what else its use depends on."""
    yield ", ".join(sorted(method.needs)) or "weights only"
    if method.whole_model_pass:
        yield "reads the weights more than once"
    if method.ordered:
        yield "the order of tasks matters"
    if method.held_models:
        yield f"holds {method.held_models} whole model{'s' if method.held_models > 1 else ''}"


def _scale(method: type[MergeMethod]) -> str:
    return "-" if method.default_scale is None else f"{method.default_scale:g}"


def _readable(text: str) -> str:
    """A docstring without its markup, formulas in signs."""
    text = re.sub(r"\.\. math:: ((?:.+\n?)+)", lambda found: f"    {_formula(found[1])}", text)
    text = re.sub(r":math:`([^`]*)`", lambda found: _formula(found[1]), text)
    return re.sub(r":[a-z]+:`([^`]*)`", r"\1", text).replace("``", "`")


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
