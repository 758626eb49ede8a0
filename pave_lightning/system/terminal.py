"""What is printed: text of files, of their names and of libraries reaches no terminal as it is."""

from __future__ import annotations

from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from pave_lightning.errors import visible


class _Visible:
    """Something printable whose control characters are spelt out; those of rich itself, such as colours, stay."""

    def __init__(self, content: ConsoleRenderable) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self._content, options):
            yield Segment(text if control else visible(text), style, control)


class _Spelling(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Visible(renderable) for renderable in renderables]


def terminal(**options: Any) -> Console:
    """A console on which text means nothing but itself: no control characters, no markup, no names of emoji.

    Args:
        options: of `rich.console.Console`.
    """
    console = Console(**{"markup": False, "emoji": False, **options})
    console.push_render_hook(_Spelling())
    return console
