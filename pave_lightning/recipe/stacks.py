"""Stacks of transforms in a recipe: what is done to task vectors before they are merged, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pave_lightning.config import LONGEST_NAME, MOST_TOLD, NAME_PATTERN, name_problem
from pave_lightning.errors import shortened

# Transforms are applied one inside the other when a parameter is read.
MOST_TRANSFORMS = 20
BUILT_IN: dict[str, list[str]] = {"plain": [], "purified": ["pave"]}
"""The stacks that need no name in a recipe."""


def _entry(value: Any) -> Any:
    named = isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), dict)
    if not isinstance(value, str) and not named:
        raise ValueError("must be the name of a transform, or {NAME: {...}} with its options")
    return value


Named = Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=1)]
StackedTransform = Annotated[str | Named, BeforeValidator(_entry), Field(title="Transform")]
Stack = Annotated[list[StackedTransform], Field(min_length=1, max_length=MOST_TRANSFORMS)]


def named_transform(entry: str | Mapping[str, Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]]:
    """Name and options of one transform of a stack."""
    return (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))


def stack_name_problems(names: Iterable[str]) -> Iterator[str]:
    """What is wrong with the names of stacks, which are parts of the names of folders."""
    for name in list(names)[:MOST_TOLD]:
        shown = shortened(name, LONGEST_NAME)
        if name in BUILT_IN:
            yield f"vectors: every recipe has '{name}' already; choose another name"
        elif name in ("base", "experts"):
            yield f"vectors: a stack cannot be named '{name}': the tables use that name"
        elif not re.fullmatch(NAME_PATTERN.rstrip("$"), name):
            yield (f"vectors: '{shown}' is no name: use letters, digits, '_', '.' and '-', a letter or digit first")
        elif len(name) > LONGEST_NAME:
            yield f"vectors: the name '{shown}' has {len(name):,} characters, expected at most {LONGEST_NAME}"
        elif problem := name_problem(name):
            yield f"vectors: {problem}"


def folder_problems(merged: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Merged models that would be written into one folder.

    Args:
        merged: the name of the merge step and of the stack of each merged model.
    """
    first: dict[str, tuple[str, str]] = {}
    for step, stack in merged:
        other = first.setdefault(f"{step}-{stack}".lower(), (step, stack))
        # Of steps whose names differ by case alone, that alone is told.
        if other != (step, stack) and (other[1] != stack or other[0].lower() != step.lower()):
            yield (
                f"merge step '{other[0]}' on '{other[1]}' and '{step}' on '{stack}' would be written into one folder, "
                f"merged/{step}-{stack}, at least on some file systems; give a step or a stack another name"
            )
