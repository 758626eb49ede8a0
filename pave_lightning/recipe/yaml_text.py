"""Reads YAML that somebody else may have written: limits on size, depth and what aliases stand for."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import CollectionNode, Node

MOST_BYTES = 1_000_000
"""Longest recipe file, in bytes."""
MOST_VALUES = 25_000
"""Most keys, values, lists and mappings, each alias counted with all that it stands for."""
MOST_LINES = 50_000
"""Most lines of a text; long texts of many lines are slow to read."""
LONGEST_NUMBER = 1000
"""Most bits of a whole number; Python does not even show one of some thousand digits."""
DEEPEST = 40
"""Most lists and mappings inside of each other."""


class YAMLReadError(ValueError):
    """Why a text is not read as YAML, in words for the user; where the reader names a place, it is the cause."""


class _Composer(Composer):
    """Stops as soon as there is too much, before anything is made of it."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self.values = 0
        self.warn_double_anchors = False  # an anchor may be given anew

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.values += 1
        if self.values > MOST_VALUES:
            raise YAMLReadError(_TOO_MANY)
        if self.depth >= DEEPEST:
            raise YAMLReadError(_TOO_DEEP)
        return super().compose_node(parent, index)


_TOO_MANY = f"it holds more than {MOST_VALUES} keys and values"
_TOO_DEEP = f"it is nested too deeply: more than {DEEPEST} lists and mappings inside of each other"


def read_yaml(text: str) -> Any:
    """The one document of a YAML 1.2 text, in which no two places share a mapping or list.

    Raises:
        YAMLReadError: it is no YAML, holds too much, or an alias contains itself.
    """
    if len(text.splitlines()) > MOST_LINES:
        raise YAMLReadError(f"it has more than {MOST_LINES} lines")
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Composer
    try:
        constructor, _ = yaml.get_constructor_parser(text)
        node = constructor.composer.get_single_node()
        if node is None:
            return None
        if _expanded(node, {})[0] > MOST_VALUES:
            raise YAMLReadError(f"{_TOO_MANY}, with all that its aliases stand for")
        return _unshared(constructor.construct_document(node))
    except YAMLReadError:
        raise
    except MarkedYAMLError as error:
        raise YAMLReadError(" ".join(part for part in (error.context, error.problem) if part)) from error
    except YAMLError as error:
        raise YAMLReadError(str(error)) from error
    except RecursionError as error:
        raise YAMLReadError(_TOO_DEEP) from error
    except Exception as error:  # what the reader makes of a tag that does not fit its value is of any kind
        raise YAMLReadError(str(error) if isinstance(error, ValueError) else f"{error!r}") from error


def _expanded(node: Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many nodes a node stands for when every alias is written out, counted no further than the most; and how deep.

    Args:
        node: where to begin.
        known: both for the nodes that were counted, by identity; None for those around this one.
    """
    if not isinstance(node, CollectionNode):
        return 1, 0
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise YAMLReadError("a YAML alias contains itself")
        return found
    known[id(node)] = None
    size, depth = 1, 0
    for part in (part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))):
        inner, below = _expanded(part, known)
        size, depth = min(size + inner, MOST_VALUES + 1), max(depth, below)
    if depth >= DEEPEST:
        raise YAMLReadError(_TOO_DEEP)
    known[id(node)] = size, depth + 1
    return size, depth + 1


def _unshared(value: Any) -> Any:
    """A copy in which no two places share a mapping or list, as they do after a YAML alias."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
        raise YAMLReadError(f"it holds a whole number of more than {LONGEST_NUMBER} bits")
    return [_unshared(item) for item in value] if isinstance(value, list) else value
