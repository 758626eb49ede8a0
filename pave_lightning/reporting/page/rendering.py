"""The page as one HTML file that needs no network.

Plotly draws the figures. Its code stands in the page, compressed, because it is most of the page's size; the browser
unpacks it. Where it cannot, or runs no scripts, the tables stay.
"""

from __future__ import annotations

import base64
import gzip
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pave_lightning.reporting.page.content import Block, Code, Figure, Page, Panels, Table, Text
from pave_lightning.system.files import replacing

PACKAGE = "pave_lightning.reporting.page"
TEMPLATE, STYLE, SCRIPT = "page.html", "page.css", "page.js"


def write_page(page: Page, path: Path | str) -> Path:
    """Write a page; it appears whole or not at all.

    Args:
        page: What stands on it.
        path: The HTML file; its folder is made where it does not exist.

    Returns:
        The file.
    """
    with replacing(path) as temporary:
        temporary.write_text(html_of(page), encoding="utf-8")
    return Path(path)


def html_of(page: Page) -> str:
    """A page as HTML. All texts of it are escaped."""
    from jinja2 import Environment, StrictUndefined

    def kind(block: Block) -> str:
        return type(block).__name__.lower()

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":"), "ensure_ascii": False}
    environment.filters |= {"kind": kind, "breakable": _breakable}
    figures = [figure for section in page.shown() for block in section.blocks for figure in _figures(block)]
    numbers = count(1)  # the template asks for one a figure, in the same order
    return environment.from_string(_shipped(TEMPLATE)).render(
        page=page,
        style=_shipped(STYLE),
        script=_shipped(SCRIPT),
        plotly=_compressed_plotly() if figures else "",
        figures=[_described(figure) for figure in figures],
        next_number=lambda: next(numbers),
    )


def _breakable(text: str) -> Markup:
    """A name, escaped, that a narrow column may break behind its marks."""
    return Markup("<wbr>").join(re.findall(r"[^_./]+[_./]*|[_./]+", text))


def _figures(block: Block) -> Iterator[Figure]:
    match block:
        case Figure():
            yield block
        case Panels():
            yield from block.figures
        case Table() | Text() | Code():
            return


def _described(figure: Figure) -> dict[str, Any]:
    """What the script is given of a figure."""
    return {"data": list(figure.traces), "layout": {**figure.layout, "height": figure.height}}


def _shipped(name: str) -> str:
    return (files(PACKAGE) / name).read_text(encoding="utf-8")


@cache
def _compressed_plotly() -> str:
    """Plotly's code for browsers, gzip in base64."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
