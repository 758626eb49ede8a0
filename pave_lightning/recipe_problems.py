"""Checks a recipe as it was read and tells everything that is wrong with it, in the words of the one who wrote it."""

from __future__ import annotations

import copy
import datetime
import difflib
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import Tag, ValidationError
from pydantic.fields import FieldInfo

from pave_lightning.errors import Problems, nearest
from pave_lightning.recipe import MergeStep, Purify, Recipe, ScaleSearch, Section, Task
from pave_lightning.recipe_overrides import SHORT_FORMS, entry_name
from pave_lightning.tasks.suites import suite_task_names

Keys = tuple[str | int, ...]
"""A path into the recipe as it was read: keys of mappings and indices of lists."""

ROUNDS = 6
HANDED_DOWN = {"tasks": ("examples", "training", "trainer"), "merge": ("purify",)}
JUDGED_TOGETHER = {"use", "kind", "classes", "value_range", "metrics", "headline"}
LIGHTNING_OPTIONS = {
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "deterministic", "benchmark"),
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "fast_dev_run", "overfit_batches"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "val_check_interval"),
    *("check_val_every_n_epoch", "num_sanity_val_steps", "accumulate_grad_batches", "gradient_clip_val"),
    *("gradient_clip_algorithm", "log_every_n_steps", "enable_progress_bar"),
}
"""The best known options of lightning.Trainer, to say where they belong; `trainer` takes every option."""

LOADED_IN_BATCHES = {"distillation"}
"""Merge methods whose option ``batch_size`` is part of a batch of ``capture.batch_size`` examples."""

NO_TASK = "the key 'use' with the name of a known task is missing, or else the keys name, data and text"

_SYNONYMS = {"lr": "learning_rate", "use": "method", "columns": "text", "labels": "classes"}
"""What other programs call a key."""

_EXPECTED: dict[tuple[type[Section] | None, str], str] = {
    (Task, "text"): "the name of a column, or a list of one or two",
    (Task, "classes"): "the number of classes, or a list of their names",
    (Task, "metrics"): "the name of a metric, or a list of names",
    (Task, "use"): "the name of a known task, such as pocket/movie",
    (MergeStep, "method"): "the name of a merge method",
    (Purify, "rho"): "a number in (0, 1], or auto",
}
_EXPECTED_SECTION: dict[type[Section], str] = {
    Task: "the name of a task such as pocket/movie, or a mapping that describes one",
    MergeStep: "the name of a merge method, or a mapping with the key 'method'",
    ScaleSearch: "{search: [lowest, highest]}",
}


@dataclass(frozen=True)
class Spot:
    """A place in the recipe and what belongs there.

    Attributes:
        keys: the path to it.
        expected: the type annotation of what belongs there.
        branch: the member of a union that is meant, where an error speaks of one.
        owner: the section that the last key belongs to; None for list entries and options.
        field: that key's field; None where the key is unknown.
    """

    keys: Keys
    expected: Any
    branch: Any
    owner: type[Section] | None = None
    field: FieldInfo | None = None


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


def check_recipe(
    raw: Any,
    problems: Problems,
    *,
    complete: bool = True,
    step_problems: Callable[[MergeStep], Iterable[str]] | None = None,
) -> Recipe | None:
    """Validate a recipe as it was read.

    A wrong value is told once, then replaced by one that is surely right, and the rest is validated again; so mistakes
    that only show when everything else is right (metrics that do not fit the kind of task, names that stand twice) are
    told with the others, and none is told that merely follows from another.

    Args:
        raw: the recipe's mapping; not changed.
        problems: is told everything that is wrong, in the order of the file.
        complete: False if something could not be written into the recipe, so that a missing key means nothing.
        step_problems: what is wrong with a merge step's method and options, which recipes know nothing of; asked only
            where something else is wrong, so that both are told.

    Returns:
        The recipe, or None if something is wrong with it.
    """
    check = _Check(raw, complete)
    recipe = check.run()
    if step_problems is not None and check.faults:
        check.look_at_steps(step_problems)
    for fault in sorted(check.faults, key=lambda fault: _order(check.raw, fault.keys)):
        problems.add(f"{place(fault.keys, check.raw)}: {fault.message}" if fault.keys else fault.message)
    return recipe


def _plain(value: Any, tell: Callable[[Keys, str], None], keys: Keys = (), above: tuple[int, ...] = ()) -> Any:
    """A copy made of mappings with text keys, lists and simple values only.

    Args:
        value: what was read.
        tell: is called with place and words for everything else that is found; the copy has a stand-in there.
        keys: where the value stands.
        above: identities of the containers around it.
    """
    if id(value) in above:
        tell(keys, "contains itself through a YAML alias")
        return None
    above = (*above, id(value))
    if isinstance(value, dict):
        copied: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                tell((*keys, str(key)), f"the key {show(key)} is not a text; put it in quotes")
            copied[str(key)] = _plain(item, tell, (*keys, str(key)), above)
        return copied
    if isinstance(value, list):
        return [_plain(item, tell, (*keys, index), above) for index, item in enumerate(value)]
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
        word = str(key)
        if depth == 1 and keys[0] in SHORT_FORMS:
            name = entry_name(_value_at(raw, keys[:2]))
            word += f" ({name})" if name else ""
        words.append(word)
    return ".".join(words)


def show(value: Any) -> str:
    """A value as the user may have written it, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list):
        text = "[" + ", ".join(map(show, value)) + "]"
    else:
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Absent:
    """Stands for a value that is not there."""


_ABSENT = _Absent()


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
                self._check_batches(recipe)
                return None if self.faults else recipe
        return None

    def _check_batches(self, recipe: Recipe) -> None:
        """Batches that are to be larger than those in which examples are loaded, which would be cut without a word."""
        most = recipe.capture.batch_size
        if any(fault.keys[:1] == ("capture",) for fault in self.faults):  # it is not what is meant
            return
        for index, step in enumerate(recipe.merge):
            given = {"options": [step.options.get("batch_size")], "tune": step.tune.get("batch_size", ())}
            for section, sizes in given.items() if step.method in LOADED_IN_BATCHES else ():
                for size in sizes:
                    if isinstance(size, int) and size > most:
                        told = f"{size} is more than the {most} examples that are loaded at a time; "
                        told += "lower it or raise capture.batch_size"
                        self._tell(("merge", index, section, "batch_size"), told)

    def look_at_steps(self, step_problems: Callable[[MergeStep], Iterable[str]]) -> None:
        """Tell what is wrong with the methods and options of the merge steps that are left after all repairs."""
        for index, step in enumerate(self.rest.merge if self.rest is not None else ()):
            entry = self.raw["merge"][index]
            if step.method == (entry.get("method") if isinstance(entry, dict) else entry):
                for line in step_problems(step):
                    self._tell(("merge", index), line)

    def _tell(self, keys: Keys, message: str, subject: str | int | None = None, unknown: bool = False) -> None:
        fault = Fault(keys, message, subject, unknown)
        if fault not in self.faults:
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
                self._tell(keys, f"unknown task '{used}'; {nearest(used, known)}")
            else:
                self._tell(keys, f"must be {_EXPECTED[Task, 'use']}, found {show(used)}")
            close = difflib.get_close_matches(str(used), known, n=1) or known[:1]
            own = entry if isinstance(entry, dict) else {}
            entries[index] = {"name": f"stand-in-{index}", **own, "use": close[0]}

    def _take(self, error: ValidationError) -> bool:
        """Note what one round of validation found, and repair it for the next."""
        found = [(details, locate(details["loc"])) for details in error.errors(include_url=False)]
        own = [(details, self._own(details, spot)) for details, spot in found]
        hinted = {
            (*spot.keys[:-1], near)
            for details, spot in own
            if details["type"] == "extra_forbidden" and (near := _near_key(spot))
        }
        told = {fault.keys for fault in self.faults if fault.subject is None}
        missing = {spot.keys for details, spot in own if details["type"] == "missing"} - hinted
        before = len(self.faults)
        for details, spot in own:
            inner = any(other.keys[: len(spot.keys)] == spot.keys != other.keys for _, other in own)
            if self._follows(details, spot, told, hinted) or (inner and spot.branch is not spot.expected):
                continue
            if details["type"] == "missing" and spot.field is not None and spot.keys[-1] not in self._keys_at(spot):
                entry, key = spot.keys[:-1], spot.keys[-1]
                if entry[:1] == ("tasks",) and {(*entry, "data"), (*entry, "text")} <= missing:
                    self._tell(entry, NO_TASK, subject="use")
                else:
                    self._tell(entry, f"the key '{key}' is missing ({_purpose(spot.field)})", subject=key)
                continue
            together = "taken together" if details["type"] == "value_error" and _is_judged_whole(spot.branch) else None
            for line in _words(details, spot, self._found(details, spot)):
                self._tell(spot.keys, line, together, details["type"] == "extra_forbidden")
        for (details, spot), (_, told_at) in zip(found, own, strict=True):
            for keys in (spot.keys, told_at.keys):
                self._repair(keys, unknown=details["type"] == "extra_forbidden")
        return len(self.faults) > before

    def _own(self, details: Mapping[str, Any], spot: Spot) -> Spot:
        """The same spot where the user wrote it: in a shared section, in a short form, under another key."""
        if details["type"] == "missing" and isinstance(spot.keys[-1], int):  # one of two numbers
            spot = locate(details["loc"][:-1])
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
            if not isinstance(_value_at(self.raw, keys[:depth]), dict | list | _Absent):
                return keys[:depth]
        return keys

    def _keys_at(self, spot: Spot) -> Any:
        parent = _value_at(self.raw, spot.keys[:-1])
        return parent if isinstance(parent, dict) else ()

    def _found(self, details: Mapping[str, Any], spot: Spot) -> Any:
        value = _value_at(self.raw, spot.keys)
        return details["input"] if value is _ABSENT else value

    def _follows(self, details: Mapping[str, Any], spot: Spot, told: set[Keys], hinted: set[Keys]) -> bool:
        """Whether an error merely follows from another one."""
        keys = spot.keys
        if details["type"] == "value_error" and _is_judged_whole(spot.branch):
            if not keys:
                return any(_changes_names(fault) for fault in self.faults)
            return any(
                fault.keys[: len(keys)] == keys and (fault.key_of(keys) in JUDGED_TOGETHER or fault.unknown)
                for fault in self.faults
            )
        if details["type"] == "missing" and (keys in hinted or not self.complete):
            return True
        if len(keys) == 3 and keys[2] == "headline" and _value_at(self.raw, keys) is _ABSENT:
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
    """Whether a fault makes it unsure what tasks and merge steps are called."""
    path = (*fault.keys, fault.subject)
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


# --- what belongs where -----------------------------------------------------------------------------------------------


def locate(loc: Sequence[str | int]) -> Spot:
    """Follow an error's location through the recipe's fields, without tags and labels of unions."""
    spot = Spot((), Recipe, Recipe)
    for part in loc:
        spot = _step(spot, part)
    return spot


def _step(spot: Spot, part: str | int) -> Spot:
    options = list(_options(spot.branch))
    if part == "[key]":
        return spot
    if len(options) > 1:
        return replace(spot, branch=next((option for option in options if _labelled(option, str(part))), Any))
    kind = _bare(options[0]) if options else Any
    keys = (*spot.keys, part)
    if _is_section(kind):
        field = _fields(kind).get(str(part))
        expected = field.annotation if field else Any
        return Spot(keys, expected, expected, kind, field)
    inner = get_args(kind)
    expected = Any if not inner else inner[1] if get_origin(kind) is dict else inner[0]
    return Spot(keys, expected, expected)


def _options(annotation: Any) -> Iterator[Any]:
    """The members of a union, without None; a type that is no union is its only member."""
    bare = _bare(annotation)
    if get_origin(bare) in (Union, types.UnionType):
        for member in get_args(bare):
            nested = _bare(member)
            if get_origin(nested) in (Union, types.UnionType):
                yield from _options(nested)
            elif nested is not types.NoneType:
                yield member
    else:
        yield annotation


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _labelled(option: Any, label: str) -> bool:
    tags = [extra.tag for extra in get_args(option)[1:] if isinstance(extra, Tag)]
    bare = _bare(option)
    origin = get_origin(bare) or bare
    return label in tags or label.startswith("literal" if origin is Literal else str(getattr(origin, "__name__", "?")))


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    bare = _bare(annotation)
    return isinstance(bare, type) and issubclass(bare, Section)


def _is_judged_whole(annotation: Any) -> bool:
    """Whether it is a section, or a section that may be left out."""
    options = list(_options(annotation))
    return len(options) == 1 and _is_section(options[0])


def _fields(section: type[Section]) -> dict[str, FieldInfo]:
    """A section's fields by the keys that a recipe uses."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _known_keys(section: type[Section]) -> list[str]:
    return [*(["use"] if section is Task else []), *_fields(section)]


def _homes(section: type[Section] = Recipe, path: str = "") -> Iterator[tuple[str, str]]:
    """Every key of the recipe, and the path of the section it belongs to."""
    for key, field in _fields(section).items():
        yield key, path
        inner = f"{path}.{key}" if path else key
        for option in _options(field.annotation):
            bare = _bare(option)
            if get_origin(bare) is list and _is_section(get_args(bare)[0]):
                yield from _homes(get_args(bare)[0], f"{inner}.N")
            elif _is_section(bare) and not (path.endswith(".N") and _fields(Recipe).get(key)):
                yield from _homes(bare, inner)


# --- words ------------------------------------------------------------------------------------------------------------


def _near_key(spot: Spot) -> str | None:
    """The key that an unknown one is probably meant to be."""
    if spot.owner is None or _belongs(spot):
        return None
    key, known = str(spot.keys[-1]), _known_keys(spot.owner)
    if _SYNONYMS.get(key) in known:
        return _SYNONYMS[key]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return close[0] if close else None


def _belongs(spot: Spot) -> str | None:
    """The one other section that has a key of that very name."""
    key = str(spot.keys[-1])
    homes = [path for known, path in _homes() if known == key]
    if len(homes) == 1 and homes[0]:
        return homes[0]
    return "trainer" if key in LIGHTNING_OPTIONS and not homes else None


def _unknown_key(spot: Spot) -> str:
    home = _belongs(spot)
    if home == "trainer":
        return "unknown key; it is an option of lightning.Trainer and belongs under 'trainer'"
    if home:
        return f"unknown key; it belongs under '{home}'"
    near = _near_key(spot)
    known = _known_keys(spot.owner) if spot.owner else []
    return f"unknown key; {nearest(near or str(spot.keys[-1]), known)}"


def _purpose(field: FieldInfo) -> str:
    sentence = (field.description or "").partition(".")[0].partition(":")[0]
    return sentence[:1].lower() + sentence[1:]


def _words(details: Mapping[str, Any], spot: Spot, found: Any) -> list[str]:
    """One error in readable words; several lines where a section tells several things at once."""
    kind, context = details["type"], details.get("ctx", {})
    shown = show(found)
    allowed = list(_options(spot.expected))
    message = f"must be {_expected(spot)}, found {shown}{_remedy(spot, found)}"
    if kind == "extra_forbidden":
        message = _unknown_key(spot)
    elif kind == "value_error":
        lines = str(context["error"]).split("\n")
        return lines if _is_judged_whole(spot.branch) else [f"{line}, found {shown}" for line in lines]
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        bounds = _bounds(spot)
        message = f"{shown} is outside {bounds}" if "," in bounds else f"must be {bounds}, found {shown}"
    elif kind in ("too_short", "too_long") and get_origin(_bare(spot.branch)) is not tuple:
        limit = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        message = f"needs {limit} {'entry' if limit.endswith(' 1') else 'entries'}, found {context['actual_length']}"
    elif kind == "string_pattern_mismatch":
        message = f"{shown} is no name: use letters, digits, '_', '.' and '-', a letter or digit first"
    elif kind == "finite_number":
        message = f"must be a finite number, found {shown}"
    elif kind == "literal_error" and len(allowed) == 1:
        message = f"{shown} is not allowed; {nearest(str(found), get_args(_bare(allowed[0])))}"
    return [message]


def _remedy(spot: Spot, found: Any) -> str:
    """What to do about a value of the wrong kind, where that is plain."""
    kinds = [_bare(option) for option in _options(spot.expected)]
    if kinds == [str] and isinstance(found, bool | int | float):
        return "; put it in quotes"
    if all(kind in (int, float) or get_origin(kind) is Literal for kind in kinds) and _is_number(found):
        return "; leave the quotes out"
    if kinds == [int] and isinstance(found, float) and found.is_integer():
        return f"; write {int(found)}"
    if found is None and spot.field is not None and not spot.field.is_required():
        return "; give it a value or leave the key out"
    if get_origin(kinds[0]) is list and not (spot.owner is Task and spot.keys[-1] != "tasks"):
        (entry,) = get_args(kinds[0])
        fits = entry is not int if isinstance(found, str) else entry in (Any, type(found))
        if fits and isinstance(found, str | int | float):
            return f"; write [{found if isinstance(found, str) else show(found)}]"
    return ""


def _is_number(text: Any) -> bool:
    """Whether it is a text that stands for a number."""
    if not isinstance(text, str):
        return False
    try:
        float(text)
    except ValueError:
        return False
    return True


def _expected(spot: Spot) -> str:
    own = _EXPECTED.get((spot.owner, str(spot.keys[-1]) if spot.keys else ""))
    if own:
        return own
    words = " or ".join(_describe(option) for option in _options(spot.expected))
    bounds = _bounds(spot)
    if not bounds:
        return words
    return f"{words} in {bounds}" if "," in bounds else f"{words}, {bounds}"


def _describe(annotation: Any) -> str:
    bare: Any = _bare(annotation)
    origin, inner = get_origin(bare), get_args(bare)
    simple = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    words = simple.get(bare, "something else")
    if _is_section(bare):
        words = _EXPECTED_SECTION.get(bare, f"a mapping with keys such as {', '.join(list(_fields(bare))[:3])}")
    elif origin is Literal:
        words = " or ".join(f"'{value}'" for value in inner)
    elif origin is tuple:
        words = "two numbers [lowest, highest]"
    elif origin is dict:
        words = "a mapping of options"
    elif origin is list:
        several = {str: "texts", int: "whole numbers", Any: "values", Task: "tasks", MergeStep: "merge steps"}.get(
            inner[0]
        )
        words = f"a list of {several or ', '.join(get_args(inner[0]))}"
    return words


def _bounds(spot: Spot) -> str:
    """The range of a number: ``(0, 1]``, ``at least 1``, ``above 0``, or nothing."""
    low = high = left = right = ""
    of_branch = [extra for extra in get_args(spot.branch)[1:] if isinstance(extra, FieldInfo)]
    fields = of_branch if get_origin(spot.branch) is Annotated and of_branch else [spot.field] if spot.field else []
    for constraint in [constraint for field in fields for constraint in field.metadata]:
        for name in ("ge", "gt", "le", "lt"):
            if (bound := getattr(constraint, name, None)) is None:
                continue
            if name in ("ge", "gt"):
                low, left = str(bound), "[" if name == "ge" else "("
            else:
                high, right = str(bound), "]" if name == "le" else ")"
    if low and high:
        return f"{left}{low}, {high}{right}"
    if low:
        return f"{'at least' if left == '[' else 'above'} {low}"
    return f"{'at most' if right == ']' else 'below'} {high}" if high else ""
