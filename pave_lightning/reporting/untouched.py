"""Layers of which nothing was captured or that purification left as they are, in a few lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pave_lightning.errors import listed

SHOWN_LAYERS = 3


def untouched_lines(entries: Iterable[Sequence[str]]) -> list[str]:
    """One line for each reason and set of layers: how many layers, of which tasks, and the first of their names.

    Args:
        entries: Task, layer and reason of each; tasks of which the same layers are left stand in one line.
    """
    layers: dict[tuple[str, str], list[str]] = {}
    for task, layer, reason in entries:
        layers.setdefault((reason, task), []).append(layer)
    tasks: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (reason, task), names in layers.items():
        tasks.setdefault((reason, tuple(names)), []).append(task)
    lines = []
    for (reason, same), found in tasks.items():
        count = f"{len(same)} layer{'s' if len(same) != 1 else ''}"
        lines.append(f"{reason}: {count} of {', '.join(found)} ({listed(same, SHOWN_LAYERS)})")
    return lines
