"""What no recipe may ask for: told from the file alone, before anything is made of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from pave_lightning.errors import shortened, visible
from pave_lightning.evaluation.options import MOST_POINTS
from pave_lightning.recipe.yaml_text import MOST_VALUES
from pave_lightning.tasks.options import MOST_CLASSES

MOST_KEYS = 1000
"""Most keys of one mapping."""
MOST_ENTRIES = 500
"""Most tasks, and most merge steps."""
MOST_COMBINATIONS = 1000
"""Most combinations that ``tune``, or a sweep with all of its seeds, may ask for."""
LONGEST_TEXT = 5000
"""Longest key or value, in characters."""

# What no file, no path and no other program takes.
_UNUSABLE = re.compile(r"[\x00\ud800-\udfff]")


def count_values(raw: Any) -> int:
    """How many keys and values something holds, mappings and lists counted too."""
    if isinstance(raw, dict):
        return 1 + len(raw) + sum(map(count_values, raw.values()))
    if isinstance(raw, list | tuple):
        return 1 + sum(map(count_values, raw))
    return 1


def repeats(values: list[Any]) -> bool:
    """Whether a value stands twice in a list."""
    first = values[:MOST_COMBINATIONS]  # more are refused
    return any(value in first[:index] for index, value in enumerate(first))


def limit_problems(raw: dict[str, Any]) -> Iterator[str]:
    """What a recipe, as it was read, has too much of, and texts that can stand for nothing.

    Args:
        raw: the recipe's mapping; of any content.
    """
    values = count_values(raw) + sum(_counted_classes(raw))
    if values > MOST_VALUES:
        yield f"it has {values:,} keys, values and classes, at most {MOST_VALUES:,} are read"
    yield from _text_problems(raw, "")
    for key in ("tasks", "merge"):
        if isinstance(entries := raw.get(key), list) and len(entries) > MOST_ENTRIES:
            yield f"{key}: has {len(entries):,} entries, expected at most {MOST_ENTRIES}"
    for index, task in enumerate(_mappings(raw.get("tasks"))):
        classes = task.get("classes")
        count = len(classes) if isinstance(classes, list) else classes if isinstance(classes, int) else 0
        if count > MOST_CLASSES:
            yield f"tasks.{index}.classes: there are {count:,}, expected at most {MOST_CLASSES:,}"
    for index, step in enumerate(_mappings(raw.get("merge"))):
        yield from _product_problem(f"merge.{index}.tune", _lengths(step.get("tune")), "")
        scale = step.get("scale")
        points = scale.get("points") if isinstance(scale, dict) else None
        if isinstance(points, int) and points > MOST_POINTS:
            yield f"merge.{index}.scale.points: there are {points:,}, expected at most {MOST_POINTS}"
    sweep = raw.get("sweep")
    if isinstance(sweep, dict):
        several = [len(part) for key in ("seeds", "cases") if isinstance(part := sweep.get(key), list | dict)]
        lengths = [*several, *_lengths(sweep.get("vary"))]
        yield from _product_problem("sweep", lengths, " of seeds, cases and varied values")


def _mappings(entries: Any) -> Iterator[dict[Any, Any]]:
    """The entries of a list, those that are no mappings as empty ones."""
    for entry in entries if isinstance(entries, list) else ():
        yield entry if isinstance(entry, dict) else {}


def _counted_classes(raw: dict[str, Any]) -> Iterator[int]:
    for task in _mappings(raw.get("tasks")):
        classes = task.get("classes")
        if isinstance(classes, int) and 0 < classes <= MOST_CLASSES:
            yield classes


def _lengths(choices: Any) -> list[int]:
    lists = choices.values() if isinstance(choices, dict) else ()
    return [len(values) for values in lists if isinstance(values, list)]


def _product_problem(where: str, lengths: list[int], of: str) -> Iterator[str]:
    combinations = math.prod(max(length, 1) for length in lengths)
    if combinations > MOST_COMBINATIONS:
        shown = f"{combinations:,}" if combinations < 10**15 else f"more than {10**15:,}"
        yield f"{where}: asks for {shown} combinations{of}, expected at most {MOST_COMBINATIONS:,}"


def _text_problems(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, dict):
        if len(value) > MOST_KEYS:
            yield f"{where or 'the recipe'}: has {len(value):,} keys, expected at most {MOST_KEYS:,}"
            return
        for key, item in value.items():
            below = f"{where}.{shortened(str(key), 60)}".removeprefix(".")
            yield from _text_problems(key, below)
            yield from _text_problems(item, below)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _text_problems(item, f"{where}.{index}")
    elif isinstance(value, str):
        if len(value) > LONGEST_TEXT:
            yield f"{where}: is a text of {len(value):,} characters, expected at most {LONGEST_TEXT:,}"
        if _UNUSABLE.search(value):
            yield f"{where}: holds a zero byte or half a character: {visible(shortened(value, 60))}"
