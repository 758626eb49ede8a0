"""What is said of a wrong value in a recipe: what was expected in its place, by the schema, and what to write."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

from pave_lightning.credentials import without_secrets
from pave_lightning.errors import near, nearest
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.task import known_kinds

Schema = Mapping[str, Any]
"""JSON schema of a value."""

A_SLIP = 0.85
"""How like two keys are where one is the other with a letter too many, too few or wrong (`metric` for `metrics`)."""

Keys = tuple[str | int, ...]
"""A path into the recipe as it was read: keys of mappings and indices of lists."""

LIGHTNING_OPTIONS = {
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "deterministic", "benchmark"),
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "fast_dev_run", "overfit_batches"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "val_check_interval"),
    *("check_val_every_n_epoch", "num_sanity_val_steps", "accumulate_grad_batches", "gradient_clip_val"),
    *("gradient_clip_algorithm", "log_every_n_steps", "enable_progress_bar"),
}
"""The best known options of lightning.Trainer, to say where they belong; `trainer` takes every option."""

_SYNONYMS = {
    **{"lr": "learning_rate", "use": "method", "columns": "text", "labels": "classes"},
    **{"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"},
}
"""What other programs call a key."""

A_TASK_NAME = "the name of a known task, such as pocket/movie"
A_MODEL = "a folder, a hub id, or a mapping such as {hub: OWNER/NAME, folder: last}"
HEADS = "the name of a fit such as logits, a mapping such as {fit: labels, rows: 256}, or a list of these"
TASK, TRAINER = "Task", "trainer"
_EXPECTED: dict[tuple[Any, str | int], str] = {
    (TASK, "text"): "the name of a column, or a list of one or two",
    (TASK, "classes"): "the number of classes, or a list of their names",
    (TASK, "metrics"): "the name of a metric, or a list of names",
    ("MergeStep", "method"): "the name of a merge method",
    ("MergeStep", "vectors"): "a list of plain, purified and names of stacks",
    ("MergeStep", "heads"): HEADS,
    ("Recipe", "heads"): HEADS,
    ("Recipe", "base"): A_MODEL,
    ("Expert", "from"): A_MODEL,
    (
        "Recipe",
        "vectors",
    ): "a mapping of names to lists of transforms, such as {lighter: [{task_weights: {movie: 0.5}}]}",
    ("MergeStep", "scale"): "a number, search, or {search: [lowest, highest]}",
    ("Purify", "rho"): "a number in (0, 1], or auto",
    ("ScaleSearch", "search"): "two numbers [lowest, highest], or auto",
}
"""What belongs at a key of a section, where its schema does not say it well."""
_EXPECTED_SECTION: dict[Any, str] = {
    TASK: "the name of a task such as pocket/movie, or a mapping that describes one",
    "MergeStep": "the name of a merge method, or a mapping with the key 'method'",
    "ScaleSearch": "search or {search: [lowest, highest]}",
}
_SIMPLE = {
    **{"number": "a number", "integer": "a whole number", "boolean": "true or false", "string": "a text"},
    "object": "a mapping of options",
}
_ENTRIES: dict[Any, str] = {
    **{TASK: "tasks", "MergeStep": "merge steps", "Transform": "transforms"},
    **{"string": "texts", "integer": "whole numbers", "number": "numbers"},
}
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


@dataclass(frozen=True)
class Spot:
    """A place in the recipe and what belongs there.

    Attributes:
        keys: the path to it.
        schema: what belongs there, with description and default; empty where the key is unknown.
        forms: the forms that it may have there.
        owner: the section that the last key belongs to; empty for list entries and options.
    """

    keys: Keys
    schema: Schema
    forms: tuple[Schema, ...]
    owner: Schema


def show(value: Any) -> str:
    """A value as the user may have written it, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {show(item)}" for key, item in islice(value.items(), 60)) + "}"
    elif isinstance(value, list):
        text = "[" + ", ".join(map(show, value[:60])) + "]"
    else:
        text = without_secrets(repr(value))  # before it is cut, which hides where a password ends
    return text if len(text) <= 60 else text[:57] + "..."


# --- the schema -------------------------------------------------------------------------------------------------------


@cache
def _recipe_schema() -> Schema:
    """The schema of what a recipe says when short forms are written out; what names a kind of task may name any."""
    schema = Recipe.model_json_schema(by_alias=True)
    for form in schema["$defs"].values():
        kind = form.get("properties", {}).get("kind", {}).get("const")
        if kind in known_kinds():
            form |= {"title": TASK, "kind": kind}
            form["properties"]["kind"] = {"enum": list(known_kinds())}
    return schema


def _forms(schema: Schema) -> tuple[Schema, ...]:
    """The forms that a value may have: a section, a list, a number, ...; null is none."""
    if "$ref" in schema:
        return _forms(_recipe_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    if members := schema.get("anyOf") or schema.get("oneOf"):
        return tuple(form for member in members for form in _forms(member))
    return () if schema.get("type") == "null" else (schema,)


def _inner(form: Schema, part: str | int) -> Schema | None:
    """What belongs under a key or index of one form; None if that has no such thing."""
    if isinstance(part, int):
        return form["prefixItems"][part] if "prefixItems" in form else form.get("items")
    others = form.get("additionalProperties")
    found: Schema | None = form.get("properties", {}).get(part, {} if others is True else others or None)
    return found


def locate(details: Mapping[str, Any]) -> Spot:
    """Follow an error's location through the schema, without the labels that pydantic gives to members of unions."""
    spot = Spot((), {}, (_recipe_schema(),), {})
    loc = details["loc"]
    if details["type"] == "missing" and isinstance(loc[-1], int):  # one of two numbers
        loc = loc[:-1]
    for depth, part in enumerate(loc, 1):
        owner, inner = next(
            ((form, inner) for form in spot.forms if (inner := _inner(form, part)) is not None), ({}, None)
        )
        if details["type"] == "extra_forbidden" and depth == len(loc):
            owner, inner = next(form for form in spot.forms if "properties" in form), {}
        if inner is None:  # a label, which may be that of one kind of task
            spot = replace(spot, forms=tuple(form for form in spot.forms if form.get("kind") == part) or spot.forms)
        else:
            spot = Spot((*spot.keys, part), inner, _forms(inner), owner if "properties" in owner else {})
    return spot


def _is_task(section: Schema) -> bool:
    return section.get("title") == TASK


def _known_keys(section: Schema) -> list[str]:
    return [*(["use"] if _is_task(section) else []), *section.get("properties", ())]


def _homes(section: Schema, path: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a section and of those in it, and the path of the section it belongs to."""
    for key, schema in section["properties"].items():
        yield key, path
        inner = f"{path}.{key}" if path else key
        for form in _forms(schema):
            for entry in _forms(form.get("items", {})):
                if "properties" in entry:
                    yield from _homes(entry, f"{inner}.N")
            if "properties" in form and not (path.endswith(".N") and key in _recipe_schema()["properties"]):
                yield from _homes(form, inner)


# --- words ------------------------------------------------------------------------------------------------------------


def near_key(spot: Spot) -> str | None:
    """The key that an unknown one is probably meant to be.

    One of the same section that differs by a slip comes first; one that is merely like it counts only where no other
    section has a key of that very name.
    """
    key, known, elsewhere = str(spot.keys[-1]), _known_keys(spot.owner), _home(spot)
    if not elsewhere and _SYNONYMS.get(key) in known:
        return _SYNONYMS[key]
    return near(key, known, A_SLIP) or (None if elsewhere else near(key, known))


@cache
def _all_homes() -> dict[str, list[str]]:
    """The paths of the sections that have a key of each name."""
    found: dict[str, list[str]] = {}
    for key, path in dict.fromkeys(_homes(_recipe_schema())):
        found.setdefault(key, []).append(path)
    return found


def _home(spot: Spot) -> str | None:
    """The one other section that has a key of that very name."""
    key = str(spot.keys[-1])
    homes = _all_homes().get(key, [TRAINER] if key in LIGHTNING_OPTIONS else [])
    return homes[0] if len(homes) == 1 and homes[0] else None


def of_other_kinds(spot: Spot) -> str | None:
    """What to say of a key that tasks of this kind have not, and others have; None for all other keys."""
    key = str(spot.keys[-1])
    tasks = _forms(_recipe_schema()["properties"]["tasks"]["items"]) if _is_task(spot.owner) else ()
    kinds = [task["kind"] for task in tasks if key in task["properties"]]
    named = " and ".join(filter(None, (", ".join(kinds[:-1]), *kinds[-1:])))
    return f"'{key}' belongs to {named} tasks" if kinds else None


def _unknown_key(spot: Spot) -> str:
    meant, home = near_key(spot), _home(spot)
    if meant or not home:
        return f"unknown key; {nearest(meant or str(spot.keys[-1]), _known_keys(spot.owner))}"
    if home == TRAINER:
        return "unknown key; it is an option of lightning.Trainer and belongs under 'trainer'"
    return f"unknown key; it belongs under '{home}'"


def purpose(schema: Schema) -> str:
    """What a key is for, in the words of its description."""
    sentence = str(schema.get("description", "")).replace("\n", " ").partition(".")[0].partition(":")[0]
    return sentence[:1].lower() + sentence[1:]


def words_for(details: Mapping[str, Any], spot: Spot, found: Any) -> list[str]:
    """One error in readable words; several lines where a section tells several things at once."""
    kind, context, shown, form = details["type"], details.get("ctx", {}), show(found), spot.forms[0]
    message = f"must be {_expected(spot)}, found {shown}{_remedy(spot, found)}"
    if kind == "extra_forbidden":
        message = _unknown_key(spot)
    elif kind == "value_error":
        lines = str(context["error"]).split("\n")
        return lines if is_of_section(details) else [f"{line}, found {shown}" for line in lines]
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        bounds = _bounds(spot)
        message = f"{shown} is outside {bounds}" if "," in bounds else f"must be {bounds}, found {shown}"
    elif kind in ("too_short", "too_long") and not any("prefixItems" in form for form in spot.forms):
        limit = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        message = f"needs {limit} {'entry' if limit.endswith(' 1') else 'entries'}, found {context['actual_length']}"
    elif kind == "string_too_long":
        message = f"has {len(str(found)):,} characters, expected at most {context['max_length']}"
    elif kind == "string_pattern_mismatch":
        message = f"{shown} is no name: use letters, digits, '_', '.' and '-', a letter or digit first"
    elif kind == "finite_number":
        message = f"must be a finite number, found {shown}"
    elif kind == "literal_error" and len(spot.forms) == 1:
        message = f"{shown} is not allowed; {nearest(str(found), _words(form))}"
    return [message]


def is_of_section(details: Mapping[str, Any]) -> bool:
    """Whether an error speaks of keys of a section that do not go together."""
    return details["type"] == "value_error" and isinstance(details["input"], dict)


def _words(form: Schema) -> list[str]:
    """The words out of which one is to be chosen; none where it is no such choice."""
    return list(form.get("enum") or ([form["const"]] if "const" in form else []))


def _remedy(spot: Spot, found: Any) -> str:
    """What to do about a value of the wrong kind, where that is plain."""
    kinds = ["word" if _words(form) else form.get("type") for form in spot.forms]
    remedy = ""
    if kinds == ["string"] and isinstance(found, bool | int | float):
        remedy = "; put it in quotes"
    elif set(kinds) <= {"integer", "number", "word"} and _is_number(found):
        remedy = "; leave the quotes out"
    elif kinds == ["integer"] and isinstance(found, float) and found.is_integer():
        remedy = f"; write {int(found)}"
    elif found is None and "default" in spot.schema:
        remedy = "; give it a value or leave the key out"
    elif "items" in spot.forms[0] and not _is_task(spot.owner):
        entry = _forms(spot.forms[0]["items"])[0].get("type")
        if isinstance(found, str) and entry != "integer":
            remedy = f"; write [{found}]"
        elif isinstance(found, int | float) and (entry is None or (entry == "integer" and type(found) is int)):
            remedy = f"; write [{show(found)}]"
    return remedy


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
    words = " or ".join(dict.fromkeys(_describe(form) for form in spot.forms))
    bounds = _bounds(spot)
    if bounds:
        words += f" in {bounds}" if "," in bounds else f", {bounds}"
    return _EXPECTED.get((spot.owner.get("title"), spot.keys[-1]), words) if spot.keys else words


def _describe(form: Schema) -> str:
    if keys := list(form.get("properties", ())):
        return _EXPECTED_SECTION.get(form.get("title"), f"a mapping with keys such as {', '.join(keys[:3])}")
    if words := _words(form):
        return " or ".join(f"'{word}'" for word in words)
    if "prefixItems" in form:
        return "two numbers [lowest, highest]"
    if "items" in form:
        entry = _forms(form["items"])[0]
        kind = form["items"].get("title") or entry.get("title" if "properties" in entry else "type")
        return f"a list of {', '.join(_words(entry)) or _ENTRIES.get(kind, 'values')}"
    return _SIMPLE.get(form.get("type", ""), "something else")


def _bounds(spot: Spot) -> str:
    """The range of a number: ``(0, 1]``, ``at least 1``, ``above 0``, or nothing."""
    found = {name: form[name] for name in _LIMITS for form in spot.forms if name in form}
    if len(found) == 2:  # a lower one and an upper one
        low, high = found
        left, right = "[" if low == "minimum" else "(", "]" if high == "maximum" else ")"
        return f"{left}{found[low]}, {found[high]}{right}"
    return "".join(f"{_LIMITS[name]} {limit}" for name, limit in found.items())
