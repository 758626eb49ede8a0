"""What stands on the page of a report, as plain data that knows no HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        text: What stands in it; empty where nothing was measured.
        note: What stands behind it in smaller type, such as half the width of an interval.
        is_best: Whether it is the best of those that it competes with.
    """

    text: str
    note: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        heading: Its heading.
        below: A second line of the heading, such as a metric or a unit.
        is_number: Whether its cells are numbers, which are aligned on the right.
    """

    heading: str
    below: str = ""
    is_number: bool = False


@dataclass(frozen=True)
class Rows:
    """Rows of a table that belong together.

    Args:
        rows: Cells by row; the first cell of each names the row.
        title: What they have in common; empty where the table has only these.
    """

    rows: Sequence[Sequence[Cell]]
    title: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        caption: What it shows, in one sentence.
        columns: Its columns, the first of which names the rows.
        groups: Its rows.
        folded: Whether it is shown only when it is opened.

    Raises:
        ValueError: If a row has not as many cells as there are columns.
    """

    caption: str
    columns: Sequence[Column]
    groups: Sequence[Rows]
    folded: bool = False

    def __post_init__(self) -> None:
        for group in self.groups:
            for row in group.rows:
                if len(row) != len(self.columns):
                    raise ValueError(f"a row of {len(row)} cells in a table of {len(self.columns)} columns: {row}")


@dataclass(frozen=True)
class Figure:
    """A figure, drawn by plotly in the reader's browser.

    Args:
        title: What it shows, in a few words.
        traces: Plotly's ``data``. A colour is one of the page's own, such as ``--task-1``, so that it suits light and
            dark.
        layout: Plotly's ``layout``, without fonts and colours of background and grid, which the page gives.
        table: The numbers behind it, for readers who do not see it; a table beside it where None.
        height: In pixels.
        least_width: In pixels; on narrower screens the figure is scrolled.
    """

    title: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)
    table: Table | None = None
    height: int = 360
    least_width: int = 0


@dataclass(frozen=True)
class Panels:
    """Small figures beside each other, below each other where the page is narrow.

    Args:
        title: What they show.
        figures: The figures.
        table: The numbers behind all of them; a table beside them where None.
    """

    title: str
    figures: Sequence[Figure]
    table: Table | None = None


@dataclass(frozen=True)
class Text:
    """Paragraphs, or the points of a list.

    Args:
        lines: One text each.
        is_list: Whether they are points of a list.
        heading: What stands above them; empty where nothing does.
    """

    lines: Sequence[str]
    is_list: bool = False
    heading: str = ""


@dataclass(frozen=True)
class Code:
    """Text to be copied.

    Args:
        text: The code.
        caption: What it does.
        language: python, shell or yaml.
        folded: Whether it is shown only when it is opened.
    """

    text: str
    caption: str = ""
    language: str = "python"
    folded: bool = False


Block = Table | Figure | Panels | Text | Code


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Args:
        name: What links to it are called: lower-case letters and hyphens.
        title: Its heading.
        blocks: What stands in it, in order.
    """

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report.

    Args:
        title: Its heading.
        summary: Sentences that stand first.
        sections: Its sections; those without blocks are not shown.
        files: Names of files beside the page, with what is in them.
        kind: What the page is a report of, such as run or sweep.
    """

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]
    files: Mapping[str, str] = field(default_factory=dict)
    kind: str = "run"

    def shown(self) -> list[Section]:
        """The sections that have something in them."""
        return [section for section in self.sections if section.blocks]
