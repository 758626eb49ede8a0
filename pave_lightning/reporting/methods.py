"""What ``pave methods`` prints."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.table import Table

from pave_lightning.merging import method_named, methods


def print_methods(name: str | None = None, console: Console | None = None) -> None:
    """Print every merge method, or one method with its options.

    Raises:
        PaveError: no method has that name.
    """
    console = console or Console()
    if name is None:
        table = Table()
        for heading in ("method", "what it does", "form", "needs", "cost", "scale", "source"):
            table.add_column(heading)
        for key, method in sorted(methods().items()):
            needs = ", ".join(sorted(method.needs)) or "weights only"
            if method.whole_model_pass:
                needs += "; reads them more than once"
            if method.ordered:
                needs += "; the order of tasks matters"
            if method.held_models:
                needs += f"; holds {method.held_models} whole model{'s' if method.held_models > 1 else ''}"
            scale = "-" if method.default_scale is None else f"{method.default_scale:g}"
            table.add_row(key, method.summary, method.form, needs, method.cost, scale, method.source)
        console.print(table)
        return
    method = method_named(name)
    console.print(f"[bold]{name}[/bold]: {method.summary} ({method.source})")
    console.print(inspect.getdoc(method) or "", markup=False)
    for key, field in method.Options.model_fields.items():
        console.print(f"  options.{key} (default {field.default}): {field.description}", markup=False)
