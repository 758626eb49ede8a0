"""What ``pave transforms`` prints."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from rich.console import Console

from pave_lightning.system.catalogue import catalogue_console, print_catalogue, print_entry, print_options
from pave_lightning.transforms.base import Transform, known_transforms, transform_named

HEADINGS = ("transform", "what it does", "needs", "adapters", "source")


def print_transforms(name: str | None = None, console: Console | None = None) -> None:
    """Print every transform of task vectors, or one transform with its options.

    Args:
        name: the transform; all of them where none is named.
        console: where to print; standard output where none is given.

    Raises:
        PaveError: no transform has that name.
    """
    console = catalogue_console() if console is None else console
    if name is None:
        rows = {known: (_cells(kind), _details(kind)) for known, kind in sorted(known_transforms().items())}
        print_catalogue(console, HEADINGS, rows)
        return
    kind = transform_named(name)
    print_entry(console, name, kind.summary, kind.source, inspect.getdoc(kind) or "")
    console.print(_place(name, kind), markup=False, highlight=False)
    print_options(console, kind.Options)
    if kind.Options.model_config.get("extra") == "allow":
        console.print(f"  {inspect.getdoc(kind.Options)}", markup=False, highlight=False)


def _cells(kind: type[Transform]) -> tuple[str, ...]:
    return kind.summary, _needs(kind), _adapters(kind), kind.source


def _details(kind: type[Transform]) -> str:
    return f"{_needs(kind)}; adapters: {_adapters(kind)}"


def _needs(kind: type[Transform]) -> str:
    return "; ".join(_needed(kind))


def _needed(kind: type[Transform]) -> Iterator[str]:
    """What a transform may need besides the task vectors, by its options, and what else its use depends on."""
    yield " or ".join(sorted(kind.needs)) or "weights only"
    if kind.ordered:
        yield "the order of tasks matters"


def _adapters(kind: type[Transform]) -> str:
    """What becomes of the low-rank factors of adapters."""
    return "low rank is kept" if kind.keeps_factors else "low rank is lost"


def _place(name: str, kind: type[Transform]) -> str:
    """Where recipes say its options."""
    own = f"in a stack of the section vectors, such as {{mine: [{{{name}: {{...}}}}]}}"
    return f"Options: in the section {kind.section}, or {own}" if kind.section else f"Options: {own}"
