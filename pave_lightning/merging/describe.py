"""What ``pave methods`` prints."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from rich.console import Console

from pave_lightning.merging import MergeMethod, known_methods, method_named
from pave_lightning.system.catalogue import catalogue_console, print_catalogue, print_entry, print_options

HEADINGS = ("method", "what it does", "form", "needs", "cost", "scale", "source")


def print_methods(name: str | None = None, console: Console | None = None) -> None:
    """Print every merge method, or one method with its options.

    Args:
        name: the method; all of them where none is named.
        console: where to print; standard output where none is given.

    Raises:
        PaveError: no method has that name.
    """
    console = catalogue_console() if console is None else console
    if name is None:
        rows = {known: (_cells(method), _details(method)) for known, method in sorted(known_methods().items())}
        print_catalogue(console, HEADINGS, rows, whole=("form", "cost", "scale"))
        return
    method = method_named(name)
    print_entry(console, name, method.summary, method.source, inspect.getdoc(method) or "")
    print_options(console, method.Options, "options.")


def _cells(method: type[MergeMethod]) -> tuple[str, ...]:
    return method.summary, method.form, needs_of(method), method.cost, scale_of(method), method.source


def _details(method: type[MergeMethod]) -> str:
    scale = "no scale" if method.default_scale is None else f"scale {scale_of(method)}"
    return f"{method.form}; {needs_of(method)}; {method.cost}; {scale}"


def needs_of(method: type[MergeMethod]) -> str:
    """What a method needs, in words."""
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


def scale_of(method: type[MergeMethod]) -> str:
    """A method's default scale; a dash where it has none."""
    return "-" if method.default_scale is None else f"{method.default_scale:g}"
