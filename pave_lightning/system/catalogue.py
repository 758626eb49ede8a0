"""What commands print that list things and show one of them: as wide as the terminal is, with nothing cut."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pave_lightning.system.docstrings import readable
from pave_lightning.system.terminal import terminal

# In narrower terminals many columns are too narrow to read, or cut words in two.
WIDTH_OF_COLUMNS = 140
# Of lines in a file or for another program, unless the variable COLUMNS says otherwise.
WIDTH_OF_FILES = 100


def catalogue_console() -> Console:
    """Standard output, in lines of a readable width."""
    console = terminal(markup=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = terminal(markup=True, width=WIDTH_OF_FILES)
    return console


def print_catalogue(
    console: Console,
    headings: Sequence[str],
    rows: Mapping[str, tuple[Sequence[str], str]],
    whole: Sequence[str] = (),
) -> None:
    """Print one row for each thing: in columns where the terminal is wide, else with its details below each other.

    Args:
        console: where to print.
        headings: of the columns; the first one is of the names, the second one of summaries, the last one of sources.
        rows: by name the cells of the other columns, and in one text what stands between summary and source.
        whole: headings of columns that are not broken into lines.
    """
    if console.width >= WIDTH_OF_COLUMNS:
        table = Table()
        for heading in headings:
            table.add_column(heading, no_wrap=heading in (headings[0], *whole), overflow="fold")
        table.columns[-1].min_width = max(len(word) for cells, _ in rows.values() for word in cells[-1].split())
        for name, (cells, _) in rows.items():
            table.add_row(*map(escape, (name, *cells)))
    else:
        table = Table(show_lines=True)
        table.add_column(headings[0], no_wrap=True)
        table.add_column(headings[1], overflow="fold")
        for name, (cells, details) in rows.items():
            table.add_row(escape(name), escape(f"{cells[0]}\n{details}\n{cells[-1]}"))
    console.print(table)


def print_entry(console: Console, name: str, summary: str, source: str, docstring: str) -> None:
    """Print what one thing is."""
    console.print(f"[bold]{name}[/bold]: {escape(summary)} ({escape(source)})")
    console.print(readable(docstring), markup=False, highlight=False)


def print_options(console: Console, options: type[BaseModel], prefix: str = "") -> None:
    """Print options with their defaults, one a line.

    Args:
        console: where to print.
        options: their class.
        prefix: what stands before their names in recipes.
    """
    for key, field in options.model_fields.items():
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)}"
        console.print(f"  {prefix}{key} ({default}): {readable(field.description or '')}", markup=False)
