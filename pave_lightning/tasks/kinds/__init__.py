"""Kinds of task: one file each, found without a list.

A kind is a subclass of `Task` under the decorator `task_kind`; third parties register theirs by the entry point
``pave_lightning.tasks``, which names a module that holds one.
"""

from __future__ import annotations

import logging
import pkgutil
from functools import cache, reduce
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Discriminator, Tag, TypeAdapter

from pave_lightning.errors import PaveError, nearest, reason, visible
from pave_lightning.tasks.task import Task

log = logging.getLogger("pave_lightning")

GROUP = "pave_lightning.tasks"
# The kind of a task that names none.
DEFAULT = "text_classification"

KindT = TypeVar("KindT", bound=Task)

_kinds: dict[str, type[Task]] = {}


def task_kind(kind: type[KindT]) -> type[KindT]:
    """Register a kind of task under the name that its field ``kind`` has by default.

    Raises:
        ValueError: another kind has that name.
    """
    name = kind.model_fields["kind"].default
    if not isinstance(name, str):
        raise ValueError(f'{kind.__name__}: expected a field kind: Literal["name"] = "name"')
    other = _kinds.setdefault(name, kind)
    if other is not kind:
        raise ValueError(f"the kind of task '{name}' is registered twice: {other.__module__} and {kind.__module__}")
    return kind


@cache
def known_kinds() -> dict[str, type[Task]]:
    """All kinds of task by name, sorted; a third party's that cannot be loaded is told and left out."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group=GROUP):
        _load(entry)
    return dict(sorted(_kinds.items()))


def _load(entry: EntryPoint) -> None:
    try:
        entry.load()
    except Exception as error:  # whatever the code of others raises
        log.warning("the kind of task %s cannot be loaded and is left out: %s", visible(entry.name), reason(error))


def kind_named(name: str) -> type[Task]:
    """The kind of task of that name.

    Raises:
        PaveError: there is none.
    """
    kinds = known_kinds()
    if name not in kinds:
        raise PaveError(f"there is no kind of task '{name}'; {nearest(name, list(kinds))}")
    return kinds[name]


def kind_of(raw: Any) -> str:
    """The kind of a task or of what describes one; the default where it names none, or one that nobody knows."""
    named = raw.get("kind", DEFAULT) if isinstance(raw, dict) else getattr(raw, "kind", DEFAULT)
    return named if isinstance(named, str) and named in known_kinds() else DEFAULT


def kind_of_adapters(peft_type: str | None) -> type[Task]:
    """A kind of task for adapters with a ``task_type`` of peft; the default where none fits."""
    fitting = [kind for kind in known_kinds().values() if kind.peft_type == peft_type]
    return kind_named(DEFAULT) if kind_named(DEFAULT) in fitting or not fitting else fitting[0]


if TYPE_CHECKING:
    AnyTask = Task
else:
    _TAGGED = [Annotated[kind, Tag(name)] for name, kind in known_kinds().items()]
    AnyTask = Annotated[reduce(or_, _TAGGED), Discriminator(kind_of)]


@cache
def any_task() -> TypeAdapter[Task]:
    """What makes a task of its kind from plain values."""
    return TypeAdapter(AnyTask)
