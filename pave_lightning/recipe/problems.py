"""Checks a recipe as it was read and tells everything that is wrong with it, in the words of the one who wrote it."""

from __future__ import annotations

import copy
import datetime
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from pydantic import ValidationError

from pave_lightning.errors import LISTED_PROBLEMS, Problems, near, nearest, shortened
from pave_lightning.recipe.overrides import SHORT_FORMS, entry_name
from pave_lightning.recipe.schema import Recipe
from pave_lightning.recipe.wording import (
    A_TASK_NAME,
    Keys,
    Spot,
    is_of_section,
    locate,
    near_key,
    of_other_kinds,
    purpose,
    show,
    words_for,
)
from pave_lightning.tasks.suites import suite_task_names

OptionProblems: TypeAlias = Callable[[Recipe], Iterable[tuple[Keys, str]]]
"""Tells where in a recipe what is wrong with merge methods, transforms and their options."""

ROUNDS = 6
LONGEST_WORD = 100
MOST_WORDED = 100
"""Faults of one round that are told in full; no more than the first 20 in the file are shown."""
HANDED_DOWN = {"tasks": ("examples", "training", "trainer"), "merge": ("purify",)}
JUDGED_TOGETHER = {"use", "kind", "classes", "value_range", "metrics", "primary_metric"}
TOGETHER = "taken together"
"""The subject of a fault that speaks of several keys of its place."""
NO_TASK = "the key 'use' with the name of a known task is missing, or else the keys name, data and text"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        keys: where it is told.
        message: in what words.
        subject: the key that it is about, such as one that is missing there; None for the place itself.
        unknown: whether the key is unknown.
    """

    keys: Keys
    message: str
    subject: str | int | None = None
    unknown: bool = False

    def key_of(self, entry: Keys) -> str | int | None:
        """The key of an entry of ``tasks`` or ``merge`` that the fault is about; None where it is the entry as such."""
        return (*self.keys, self.subject)[len(entry)]


def validated_recipe(
    raw: Any,
    problems: Problems,
    *,
    complete: bool = True,
    option_problems: OptionProblems | None = None,
) -> Recipe | None:
    """The recipe that was read, if nothing is wrong with it.

    A wrong value is told once, then replaced by one that is surely right, and the rest is validated again; so mistakes
    that only show when everything else is right (metrics that do not fit the kind of task, names that stand twice) are
    told with the others, and none is told that merely follows from another.

    Args:
        raw: the recipe's mapping; not changed.
        problems: is told everything that is wrong, in the order of the file.
        complete: False if something could not be written into the recipe, so that a missing key means nothing.
        option_problems: what is wrong with merge methods, transforms and their options, which recipes know nothing of;
            asked only where something else is wrong, so that both are told.

    Returns:
        The recipe, or None if something is wrong with it.
    """
    check = _Check(raw, complete)
    recipe = check.run()
    # What loads methods and transforms; where there are more faults than are shown, it would tell nothing.
    if option_problems is not None and 0 < len(check.faults) < LISTED_PROBLEMS:
        check.look_at_options(option_problems)
    for fault in sorted(check.faults, key=lambda fault: _order(check.raw, fault.keys)):
        problems.add(f"{place(fault.keys, check.raw)}: {fault.message}" if fault.keys else fault.message)
    return recipe


def _plain(value: Any, tell: Callable[[Keys, str], None], keys: Keys = ()) -> Any:
    """A copy made of mappings with text keys, lists and simple values only.

    Args:
        value: what was read.
        tell: is called with place and words for everything else that is found; the copy has a stand-in there.
        keys: where the value stands.
    """
    if isinstance(value, dict):
        copied: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                tell((*keys, str(key)), f"the key {show(key)} is not a text; put it in quotes")
            copied[str(key)] = _plain(item, tell, (*keys, str(key)))
        return copied
    if isinstance(value, list):
        return [_plain(item, tell, (*keys, index)) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        tell(keys, f"must be a finite number, found {show(value)}")
    elif isinstance(value, datetime.date):
        tell(keys, f"{value} is read as a date; put it in quotes to make it a text")
        return str(value)
    elif value is not None and not isinstance(value, bool | int | float | str):
        tell(keys, "is neither a mapping, a list, a text, a number, true, false nor null")
        return None
    return value


def place(keys: Keys, raw: Any) -> str:
    """A path in the user's terms; entries of ``tasks`` and ``merge`` with their names: ``tasks.1 (movie).metrics``."""
    words: list[str] = []
    for depth, key in enumerate(keys):
        word = shortened(str(key), LONGEST_WORD)
        if depth == 1 and keys[0] in SHORT_FORMS:
            name = entry_name(_value_at(raw, keys[:2]))
            word += f" ({shortened(name, LONGEST_WORD)})" if name else ""
        words.append(word)
    return ".".join(words)


_ABSENT = object()
"""Stands for a value that is not there."""


def _value_at(raw: Any, keys: Keys) -> Any:
    for key in keys:
        there = key in raw if isinstance(raw, dict) else isinstance(raw, list) and key in range(len(raw))
        if not there:
            return _ABSENT
        raw = raw[key]
    return raw


def _order(raw: Any, keys: Keys) -> list[int]:
    """Where a place stands in the file; what is missing comes last in its mapping."""
    order: list[int] = []
    for key in keys:
        if isinstance(raw, dict):
            order.append(list(raw).index(key) if key in raw else len(raw))
            raw = raw.get(key)
        else:
            order.append(key if isinstance(key, int) else 0)
            raw = raw[key] if isinstance(raw, list) and isinstance(key, int) and key < len(raw) else None
    return order


class _Check:
    """One recipe under validation.

    Attributes:
        raw: the recipe as the user wrote it, in plain values.
        faults: what is wrong with it so far.
        rest: the recipe that is left once everything wrong is repaired or left out; None until it is known.
    """

    def __init__(self, raw: Any, complete: bool) -> None:
        self.faults: list[Fault] = []
        self._known: set[Fault] = set()
        self.complete = complete
        self.raw = _plain(raw, self._tell)
        self.repaired = copy.deepcopy(self.raw)
        self.rest: Recipe | None = None

    def run(self) -> Recipe | None:
        self._check_uses()
        for _ in range(ROUNDS):
            try:
                recipe = Recipe.model_validate(self.repaired)
            except ValidationError as error:
                if not self._take(error) and not self.faults and self.complete:
                    self._tell((), str(error.errors()[0]["msg"]))
            else:
                self.rest = recipe
                return None if self.faults else recipe
        return None

    def look_at_options(self, option_problems: OptionProblems) -> None:
        """Tell what is wrong with methods, transforms and their options, of what is left after all repairs."""
        if self.rest is None or not (self.rest.merge or self.rest.vectors):
            return
        for keys, line in option_problems(self.rest):
            # Of an entry of `merge` other keys may have been repaired, which are told.
            own = (*keys, "method") if isinstance(_value_at(self.raw, keys), dict) and keys[0] == "merge" else keys
            if _value_at(self.raw, own) == _value_at(self.repaired, own):
                self._tell(keys, line)

    def _tell(self, keys: Keys, message: str, subject: str | int | None = None, unknown: bool = False) -> None:
        fault = Fault(keys, message, subject, unknown)
        if fault not in self._known:
            self._known.add(fault)
            self.faults.append(fault)

    def _check_uses(self) -> None:
        """Names of suite tasks, which would end the validation at once; wrong ones are replaced by known ones."""
        entries = self.repaired.get("tasks")
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            keys: Keys = ("tasks", index, "use") if isinstance(entry, dict) else ("tasks", index)
            if not isinstance(entry, str) and not (isinstance(entry, dict) and "use" in entry):
                continue
            used = entry["use"] if isinstance(entry, dict) else entry
            known = suite_task_names()
            if used in known:
                continue
            if isinstance(used, str):
                self._tell(keys, f"unknown task '{shortened(used)}'; {nearest(used, known)}")
            else:
                self._tell(keys, f"must be {A_TASK_NAME}, found {show(used)}")
            close = near(str(used), known) or known[0]
            own = entry if isinstance(entry, dict) else {}
            entries[index] = {"name": f"stand-in-{index}", **own, "use": close}

    def _take(self, error: ValidationError) -> bool:
        """Note what one round of validation found, and repair it for the next."""
        found = [(details, locate(details)) for details in error.errors(include_url=False)]
        own = [(details, self._own(spot)) for details, spot in found]
        hinted = {
            (*spot.keys[:-1], near)
            for details, spot in [each for each in own if each[0]["type"] == "extra_forbidden"][:MOST_WORDED]
            if (near := near_key(spot))
        }
        told = {fault.keys for fault in self.faults if fault.subject is None}
        missing = {spot.keys for details, spot in own if details["type"] == "missing"} - hinted
        outer = {spot.keys[:depth] for _, spot in own for depth in range(len(spot.keys))}
        before = len(self.faults)
        for details, spot in own:
            other_form = spot.keys in outer and details["type"] != "missing"  # of a union, which is not what was meant
            if not other_form and not self._follows(details, spot, told, hinted):
                self._word(details, spot, missing, at_length=len(self.faults) - before < MOST_WORDED)
        for (details, spot), (_, told_at) in zip(found, own, strict=True):
            unknown = details["type"] == "extra_forbidden"
            entry = _value_at(self.repaired, spot.keys[:-1])
            if unknown and isinstance(entry, dict) and of_other_kinds(spot):
                entry[str(spot.keys[-1])] = None  # which also takes back what a known task says
                continue
            for keys in (spot.keys, told_at.keys):
                self._repair(keys, unknown)
        return len(self.faults) > before

    def _word(self, details: Mapping[str, Any], spot: Spot, missing: set[Keys], at_length: bool) -> None:
        """Tell one error; not ``at_length`` where there are very many, since to look for the nearest key takes time."""
        unknown = details["type"] == "extra_forbidden"
        value = _value_at(self.raw, spot.keys)
        entry, key = spot.keys[:-1], next(reversed(spot.keys), None)
        if details["type"] == "missing" and value is _ABSENT:
            if entry[:1] == ("tasks",) and {(*entry, "data"), (*entry, "text")} <= missing:
                self._tell(entry, NO_TASK, subject="use")
            else:
                self._tell(entry, f"the key '{key}' is missing ({purpose(spot.schema)})", subject=key)
        elif unknown and (misplaced := of_other_kinds(spot)) is not None:
            self._tell(entry, misplaced, subject=TOGETHER)
        elif not at_length:
            self._tell(spot.keys, "unknown key" if unknown else "is wrong", unknown=unknown)
        else:
            for line in words_for(details, spot, details["input"] if value is _ABSENT else value):
                self._tell(spot.keys, line, TOGETHER if is_of_section(details) else None, unknown)

    def _own(self, spot: Spot) -> Spot:
        """The same spot where the user wrote it: in a shared section, in a short form, under another key."""
        keys = spot.keys
        if len(keys) > 3 and keys[2] in HANDED_DOWN.get(str(keys[0]), ()):
            entry = self.raw[keys[0]][keys[1]]
            section = entry.get(keys[2], {}) if isinstance(entry, dict) else {}
            if keys[3] not in section:
                keys = keys[2:]
        if len(keys) == 3 and keys[0] == "merge" and keys[2] == "name" and _value_at(self.raw, keys) in (_ABSENT, ""):
            keys = (*keys[:2], "method")  # the name was taken from there
        return replace(spot, keys=self._written(keys))

    def _written(self, keys: Keys) -> Keys:
        """The path as far as the user wrote mappings and lists; the rest comes from a short form such as text: body."""
        for depth in range(len(keys)):
            value = _value_at(self.raw, keys[:depth])
            if value is not _ABSENT and not isinstance(value, dict | list):
                return keys[:depth]
        return keys

    def _follows(self, details: Mapping[str, Any], spot: Spot, told: set[Keys], hinted: set[Keys]) -> bool:
        """Whether an error merely follows from another one."""
        keys = spot.keys
        if is_of_section(details):
            if not keys:
                return any(_changes_names(fault) for fault in self.faults)
            return any(
                fault.keys[: len(keys)] == keys and (fault.key_of(keys) in JUDGED_TOGETHER or fault.unknown)
                for fault in self.faults
            )
        if details["type"] == "missing" and (keys in hinted or not self.complete):
            return True
        if len(keys) == 3 and keys[2] == "primary_metric" and _value_at(self.raw, keys) is _ABSENT:
            return True  # it was taken from the metrics, which are told
        return any(keys[:depth] in told for depth in range(1, len(keys) + 1))

    def _repair(self, keys: Keys, unknown: bool) -> None:
        """Replace what is wrong by something that is surely right, or leave it out."""
        if len(keys) >= 2 and keys[0] in SHORT_FORMS:
            entries = self.repaired.get(keys[0])
            if isinstance(entries, list) and (len(keys) == 2 or not isinstance(entries[int(keys[1])], dict)):
                index = int(keys[1])
                name = entry_name(self.raw[keys[0]][index]) or f"stand-in-{index}"
                entries[index] = _stand_in_task(name) if keys[0] == "tasks" else f"stand-in-{index}"
                return
        stack = _value_at(self.repaired, keys[:2]) if keys[:1] == ("vectors",) and len(keys) > 2 else None
        if isinstance(stack, list):
            stack[int(keys[2])] = "stand-in"
            return
        for depth in range(len(keys), 0, -1):
            parent, key = _value_at(self.repaired, keys[: depth - 1]), keys[depth - 1]
            if isinstance(parent, dict):
                stand_in = _stand_in(keys[:depth])
                if stand_in is None or (unknown and depth == len(keys)):
                    parent.pop(key, None)
                else:
                    parent[key] = stand_in
                return


def _changes_names(fault: Fault) -> bool:
    """Whether a fault makes it unsure what tasks, merge steps and stacks are called."""
    path = (*fault.keys, fault.subject)
    if path[0] == "vectors":
        return True
    if path[0] not in SHORT_FORMS:
        return False
    return len(fault.keys) < 2 or path[2] in (None, "name", "use", "method") or (fault.unknown and len(path) == 4)


def _stand_in_task(name: str) -> dict[str, Any]:
    return {"name": name, "data": {}, "text": "text", "kind": "regression"}


def _stand_in(keys: Keys) -> Any:
    """Something right for a key that cannot be left out; None for the others."""
    if len(keys) == 1:
        return {"name": "stand-in", "base": "stand-in", "tasks": [_stand_in_task("stand-in")]}.get(str(keys[0]))
    if len(keys) == 3 and keys[0] == "tasks":
        return {"name": f"stand-in-{keys[1]}", "data": {}, "text": "text"}.get(str(keys[2]))
    if len(keys) == 3 and keys[2] == "method":
        return f"stand-in-{keys[1]}"
    return {"search": [0.0, 1.0], "from": "stand-in"}.get(str(keys[-1]))
