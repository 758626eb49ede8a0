"""What is said of a wrong value in a recipe: what was expected in its place, by the schema, and what to write."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import Tag
from pydantic.fields import FieldInfo

from pave_lightning.config import Section
from pave_lightning.credentials import without_secrets
from pave_lightning.errors import near, nearest
from pave_lightning.evaluation.options import ScaleSearch
from pave_lightning.purification.options import Purify
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.recipe.schema import Recipe
from pave_lightning.recipe.stacks import StackedTransform
from pave_lightning.tasks.task import Task, known_kinds

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

_SYNONYMS = {"lr": "learning_rate", "use": "method", "columns": "text", "labels": "classes"}
"""What other programs call a key."""

EXPECTED: dict[tuple[type[Section] | None, str], str] = {
    (Task, "text"): "the name of a column, or a list of one or two",
    (Task, "classes"): "the number of classes, or a list of their names",
    (Task, "metrics"): "the name of a metric, or a list of names",
    (Task, "use"): "the name of a known task, such as pocket/movie",
    (MergeStep, "method"): "the name of a merge method",
    (MergeStep, "vectors"): "a list of plain, purified and names of stacks",
    (Recipe, "vectors"): "a mapping of names to lists of transforms, such as {lighter: [{task_weights: {movie: 0.5}}]}",
    (Purify, "rho"): "a number in (0, 1], or auto",
    (MergeStep, "scale"): "a number, search, or {search: [lowest, highest]}",
    (ScaleSearch, "search"): "two numbers [lowest, highest], or auto",
}
_EXPECTED_SECTION: dict[type[Section], str] = {
    Task: "the name of a task such as pocket/movie, or a mapping that describes one",
    MergeStep: "the name of a merge method, or a mapping with the key 'method'",
    ScaleSearch: "search or {search: [lowest, highest]}",
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
        expected: Any = field.annotation if field else Any
        if part == "kind" and _is_task(kind):  # a kind that nobody knows is judged as one of the default kind
            kinds: Any = tuple(known_kinds())
            expected = Literal[kinds]
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


def _is_task(section: type[Section] | None) -> bool:
    """Whether a section describes a task, of whatever kind."""
    return section is not None and issubclass(section, Task)


def is_judged_whole(annotation: Any) -> bool:
    """Whether it is a section, or a section that may be left out."""
    options = list(_options(annotation))
    return len(options) == 1 and _is_section(options[0])


def _fields(section: type[Section]) -> dict[str, FieldInfo]:
    """A section's fields by the keys that a recipe uses."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _known_keys(section: type[Section]) -> list[str]:
    return [*(["use"] if _is_task(section) else []), *_fields(section)]


def _homes(section: type[Section] = Recipe, path: str = "") -> Iterator[tuple[str, str]]:
    """Every key of the recipe, and the path of the section it belongs to."""
    for key, field in _fields(section).items():
        yield key, path
        inner = f"{path}.{key}" if path else key
        for option in _options(field.annotation):
            bare = _bare(option)
            if get_origin(bare) is list:
                for entry in _options(get_args(bare)[0]):
                    if _is_section(entry):
                        yield from _homes(_bare(entry), f"{inner}.N")
            elif _is_section(bare) and not (path.endswith(".N") and _fields(Recipe).get(key)):
                yield from _homes(bare, inner)


# --- words ------------------------------------------------------------------------------------------------------------


def near_key(spot: Spot) -> str | None:
    """The key that an unknown one is probably meant to be.

    One of the same section that differs by a slip comes first; one that is merely like it counts only where no other
    section has a key of that very name.
    """
    if spot.owner is None:
        return None
    key, known = str(spot.keys[-1]), _known_keys(spot.owner)
    if _SYNONYMS.get(key) in known and not _belongs(spot):
        return _SYNONYMS[key]
    return near(key, known, A_SLIP) or (None if _belongs(spot) else near(key, known))


@lru_cache(maxsize=1)
def _all_homes() -> dict[str, list[str]]:
    """The paths of the sections that have a key of each name."""
    found: dict[str, list[str]] = {}
    for key, path in dict.fromkeys(_homes()):
        found.setdefault(key, []).append(path)
    return found


def _belongs(spot: Spot) -> str | None:
    """The one other section that has a key of that very name."""
    key = str(spot.keys[-1])
    homes = _all_homes().get(key, ())
    if len(homes) == 1 and homes[0]:
        return homes[0]
    return "trainer" if key in LIGHTNING_OPTIONS and not homes else None


def of_other_kinds(spot: Spot) -> str | None:
    """What to say of a key that tasks of this kind have not, and others have; None for all other keys."""
    key = str(spot.keys[-1])
    kinds = [name for name, kind in known_kinds().items() if _is_task(spot.owner) and key in _fields(kind)]
    return f"'{key}' belongs to {' and '.join(kinds)} tasks" if kinds else None


def _unknown_key(spot: Spot) -> str:
    key, known = str(spot.keys[-1]), _known_keys(spot.owner) if spot.owner else []
    home = None if near(key, known, A_SLIP) else _belongs(spot)
    if home == "trainer":
        return "unknown key; it is an option of lightning.Trainer and belongs under 'trainer'"
    if home:
        return f"unknown key; it belongs under '{home}'"
    return f"unknown key; {nearest(near_key(spot) or key, known)}"


def purpose(field: FieldInfo) -> str:
    """What a field is for, in the words of its description."""
    sentence = (field.description or "").partition(".")[0].partition(":")[0]
    return sentence[:1].lower() + sentence[1:]


def words_for(details: Mapping[str, Any], spot: Spot, found: Any) -> list[str]:
    """One error in readable words; several lines where a section tells several things at once."""
    kind, context = details["type"], details.get("ctx", {})
    shown = show(found)
    allowed = list(_options(spot.expected))
    message = f"must be {_expected(spot)}, found {shown}{_remedy(spot, found)}"
    if kind == "extra_forbidden":
        message = _unknown_key(spot)
    elif kind == "value_error":
        lines = str(context["error"]).split("\n")
        return lines if is_judged_whole(spot.branch) else [f"{line}, found {shown}" for line in lines]
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        bounds = _bounds(spot)
        message = f"{shown} is outside {bounds}" if "," in bounds else f"must be {bounds}, found {shown}"
    elif kind in ("too_short", "too_long") and get_origin(_bare(spot.branch)) is not tuple:
        limit = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        message = f"needs {limit} {'entry' if limit.endswith(' 1') else 'entries'}, found {context['actual_length']}"
    elif kind == "string_too_long":
        message = f"has {len(str(found)):,} characters, expected at most {context['max_length']}"
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
    if get_origin(kinds[0]) is list and not (_is_task(spot.owner) and spot.keys[-1] != "tasks"):
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
    owner = Task if _is_task(spot.owner) else spot.owner
    own = EXPECTED.get((owner, str(spot.keys[-1]) if spot.keys else ""))
    if own:
        return own
    words = " or ".join(dict.fromkeys(_describe(option) for option in _options(spot.expected)))
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
        words = _EXPECTED_SECTION.get(
            Task if _is_task(bare) else bare, f"a mapping with keys such as {', '.join(list(_fields(bare))[:3])}"
        )
    elif origin is Literal:
        words = " or ".join(f"'{value}'" for value in inner)
    elif origin is tuple:
        words = "two numbers [lowest, highest]"
    elif origin is dict:
        words = "a mapping of options"
    elif origin is list:
        known: dict[Any, str] = {str: "texts", int: "whole numbers", Any: "values", MergeStep: "merge steps"}
        known[StackedTransform] = "transforms"
        several = known.get(inner[0])
        if any(_is_section(entry) and _is_task(_bare(entry)) for entry in _options(inner[0])):
            several = "tasks"
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
