"""What ``pave methods`` prints."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pave_lightning.merging import MergeMethod, method_named, methods

HEADINGS = ("method", "what it does", "form", "needs", "cost", "scale", "source")
# In narrower terminals seven columns are too narrow to read, or cut words in two.
WIDTH_OF_COLUMNS = 140
# Where no terminal says how wide lines may be, they are not broken.
WIDTH_OF_FILES = 1000


def print_methods(name: str | None = None, console: Console | None = None) -> None:
    """Print every merge method, or one method with its options.

    Args:
        name: the method; all of them where none is named.
        console: where to print; where none is given, the terminal, or unbroken lines to a file or another program.

    Raises:
        PaveError: no method has that name.
    """
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH_OF_FILES)
    if name is None:
        wide = console.width >= WIDTH_OF_COLUMNS
        console.print(_in_columns() if wide else _in_paragraphs())
        return
    method = method_named(name)
    console.print(f"[bold]{name}[/bold]: {escape(method.summary)} ({escape(method.source)})")
    console.print(inspect.getdoc(method) or "", markup=False)
    for key, field in method.Options.model_fields.items():
        default = field.get_default(call_default_factory=True)
        console.print(f"  options.{key} (default {default}): {field.description}", markup=False)


def _in_columns() -> Table:
    """One row a method; names and the words of all else stay whole."""
    table = Table()
    known = sorted(methods().items())
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
    for name, method in sorted(methods().items()):
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
