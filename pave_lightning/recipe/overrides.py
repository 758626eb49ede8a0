"""Overrides of single recipe keys, as given on the command line: ``tasks.movie.examples.train=100``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ruamel.yaml.error import MarkedYAMLError

from pave_lightning.errors import Problems, nearest, shortened
from pave_lightning.recipe.yaml_text import DEEPEST, YAMLReadError, read_yaml

SHORT_FORMS = {"tasks": "use", "merge": "method"}
"""Lists whose entries have names and may be a single word, and the key that the word stands for."""

MOST_OVERRIDES = 1000


class _OverrideError(ValueError):
    """Why one override cannot be applied."""


def entry_name(entry: Any) -> str | None:
    """The name by which a user knows an entry of ``tasks`` or ``merge``, if it has one."""
    if isinstance(entry, dict):
        named = (entry.get(key) for key in ("name", "use", "method"))
        entry = next((value for value in named if isinstance(value, str) and value), None)
    return entry.rpartition("/")[2] if isinstance(entry, str) else None


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str], problems: Problems) -> bool:
    """Write overrides into a recipe as it was read, in the order given.

    Args:
        raw: the recipe's mapping; changed in place.
        overrides: texts of the form ``path.to.key=value``, the value in YAML. List entries are addressed by number, one
            past the last appends; entries of ``tasks`` and ``merge`` also by name.
        problems: is told of every override that cannot be applied.

    Returns:
        Whether all of them could be applied.
    """
    if len(overrides) > MOST_OVERRIDES:
        problems.add(
            f"there are {len(overrides)} overrides, expected at most {MOST_OVERRIDES}; change the file instead"
        )
        return False
    applied = True
    for override in overrides:
        try:
            _apply(raw, override)
        except _OverrideError as error:
            problems.add(f"override '{shortened(override)}': {error}")
            applied = False
    return applied


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise _OverrideError("has no '='; write key=value, such as seed=1 or tasks.0.examples.train=100")
    parts = path.strip().split(".")
    if not all(parts):
        raise _OverrideError("has an empty part before the '='; write key=value or key.key=value")
    if len(parts) > DEEPEST:
        raise _OverrideError(f"has {len(parts)} parts before the '='; no key of a recipe is nested as deeply")
    _assign(raw, parts, _value(text))


def _value(text: str) -> Any:
    try:
        return read_yaml(text)
    except YAMLReadError as error:
        shown = repr(shortened(text))
        if error.__cause__ is None:
            raise _OverrideError(f"the value {shown} cannot be used: {error}") from None
        why = f" ({error.__cause__.problem})" if isinstance(error.__cause__, MarkedYAMLError) else ""
        raise _OverrideError(f"the value {shown} is not valid YAML{why}; quote it if it is a text") from None


def _assign(raw: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    node: Any = raw
    done: list[str] = []
    while True:
        key, used = _step(node, parts[len(done) :], done)
        done += parts[len(done) : len(done) + used]
        if len(done) == len(parts):
            _put(node, key, value)
            return
        child = node.get(key) if isinstance(node, dict) else node[key] if key < len(node) else None
        if child is None:
            child = [] if parts[len(done)] == "0" else {}
        elif isinstance(child, str) and node is raw.get(done[0]) and done[0] in SHORT_FORMS:
            child = {SHORT_FORMS[done[0]]: child}
        elif not isinstance(child, dict | list):
            raise _OverrideError(f"{'.'.join(done)} is {shortened(repr(child))}, which has no keys of its own")
        _put(node, key, child)
        node = child


def _step(node: Any, parts: Sequence[str], done: Sequence[str]) -> tuple[Any, int]:
    """The key or index that the next part means in a mapping or list, and how many parts that took."""
    if isinstance(node, dict):
        return parts[0], 1
    where, size = ".".join(done), len(node)
    if parts[0].isdecimal():
        index = int(parts[0]) if len(parts[0]) < 10 else size + 1
        if index > size:
            there = f"0 to {size - 1}" if size else "none"
            raise _OverrideError(
                f"{where} has no entry {shortened(parts[0])}; there are {there}, and {size} appends one"
            )
        return index, 1
    if len(done) > 1 or done[0] not in SHORT_FORMS:
        raise _OverrideError(f"{where} is a list, so '{parts[0]}' must be the number of an entry, counted from 0")
    names = [entry_name(entry) for entry in node]
    for used in range(len(parts), 0, -1):  # names may have dots
        name = ".".join(parts[:used])
        if names.count(name) > 1:
            raise _OverrideError(
                f"{where} has several entries named '{name}'; address one by its number, counted from 0"
            )
        if name in names:
            return names.index(name), used
    hint = nearest(parts[0], [name for name in names if name])
    raise _OverrideError(f"{where} has no entry '{parts[0]}'; {hint}")


def _put(node: Any, key: Any, value: Any) -> None:
    if isinstance(node, list) and key == len(node):
        node.append(value)
    else:
        node[key] = value
