"""Reads a recipe file, with overrides, into a checked `Recipe`; and tells a recipe as YAML, JSON schema and digest."""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from pave_lightning.config import NAME_PATTERN
from pave_lightning.credentials import mask_values
from pave_lightning.errors import PaveError, Problems, reason, shortened
from pave_lightning.recipe.finding import nearby, recipe_files
from pave_lightning.recipe.limits import count_values, limit_problems
from pave_lightning.recipe.overrides import apply_overrides
from pave_lightning.recipe.problems import OptionProblems, validated_recipe
from pave_lightning.recipe.schema import Recipe
from pave_lightning.recipe.stacks import BUILT_IN
from pave_lightning.recipe.wording import show
from pave_lightning.recipe.yaml_text import MOST_BYTES, MOST_VALUES, YAMLReadError, read_yaml
from pave_lightning.tasks.suites import suite_task_names
from pave_lightning.tasks.task import known_kinds

__all__ = ["load_recipe", "recipe_digest", "recipe_schema", "recipe_to_yaml"]

LONGEST_QUOTED_LINE = 200


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    option_problems: OptionProblems | None = None,
) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML 1.2 file.
        overrides: ``key.key=value`` texts that are written over the file's keys before anything is checked, values in
            YAML. List entries are addressed by number (one past the last appends), entries of ``tasks`` and ``merge``
            also by name: ``tasks.movie.examples.train=100``, ``merge.ties.scale={search: [0.1, 1]}``.
        option_problems: what is wrong with merge methods, transforms and their options, told together with what is
            wrong with the recipe itself; a recipe that is right in itself is not asked about.

    Raises:
        PaveError: the file cannot be read, or something is wrong with the recipe; the message tells everything that is.
    """
    path = Path(path)
    raw = _read(path)
    problems = Problems(f"the recipe {path} cannot be used:")
    applied = apply_overrides(raw, overrides, problems)
    excess = Problems(f"the recipe {path} asks for too much:")
    excess.extend(limit_problems(raw))
    excess.raise_if_any()
    recipe = validated_recipe(raw, problems, complete=applied, option_problems=option_problems)
    problems.raise_if_any()
    if recipe is None:  # cannot be: a recipe is refused with words
        raise PaveError(problems.headline)
    if count_values(recipe.model_dump(by_alias=True)) > MOST_VALUES:  # or else its resolved form could not be read
        raise PaveError(
            f"the recipe {path} asks for too much: with every default filled in it has more than {MOST_VALUES} keys "
            "and values; split it into several recipes"
        )
    return recipe


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe with everything filled in, as a YAML text that loads to an equal recipe.

    Passwords and tokens in URIs are left out: ``***`` stands for them, see `pave_lightning.credentials`.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # keep the order of the fields
    yaml.allow_unicode = True
    yaml.width = 120
    text = io.StringIO()
    yaml.dump(_lines(mask_values(recipe.model_dump(mode="json", by_alias=True))), text)
    return text.getvalue()


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of what the recipe does, in hexadecimal: everything but where results and records are kept."""
    content = recipe.model_dump(mode="json", by_alias=True, exclude={"tracking", "output"})
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of recipe files, for editors: described keys, short forms included."""
    schema = Recipe.model_json_schema(by_alias=True)
    parts = schema["$defs"]
    step = parts["MergeStep"]
    names = [kind.__name__ for kind in known_kinds().values()]
    for section, handed_down in (
        *((parts[name], ("examples", "training", "trainer")) for name in names),
        (step, ("purify",)),
    ):
        for key in handed_down:
            del section["properties"][key]["default"]  # it is the recipe's own section
    names_of_stacks: dict[str, Any] = {"anyOf": [{"enum": list(BUILT_IN)}, {"type": "string", "pattern": NAME_PATTERN}]}
    step["properties"]["vectors"]["items"] = names_of_stacks
    step["properties"]["name"] = _or(step["properties"]["name"], {"type": "null"})
    for keys in (schema["properties"], step["properties"]):
        keys["heads"] = _or(keys["heads"], _one_of_heads(keys["heads"], parts["Heads"]))
    schema["properties"]["controls"] = _or(schema["properties"]["controls"], {"type": "boolean"})
    step["properties"]["scale"] = _or(step["properties"]["scale"], {"const": "search"})
    use = {"enum": suite_task_names(), "description": "Name of a known task; the other keys change it."}
    forms: list[dict[str, Any]] = [{"enum": suite_task_names(), "description": "Name of a known task."}]
    for name in names:
        _allow_short_forms(parts[name])
        used = copy.deepcopy(parts[name])
        used.update(title=f"Known{name}", description="A known task with some keys changed.", required=["use"])
        parts[f"Known{name}"] = {**used, "properties": {"use": use, **used["properties"]}}
        forms += [{"$ref": f"#/$defs/Known{name}"}, {"$ref": f"#/$defs/{name}"}]
    schema["properties"]["tasks"]["items"] = {"anyOf": forms}
    method = {"type": "string", "description": step["properties"]["method"]["description"]}
    schema["properties"]["merge"]["items"] = {"anyOf": [method, {"$ref": "#/$defs/MergeStep"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _one_of_heads(key: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
    """The forms of one kind of heads, a word or a section, which the schema now takes in the lists of a key too."""
    one: dict[str, Any] = {"anyOf": [{"enum": section["properties"]["fit"]["enum"]}, {"$ref": "#/$defs/Heads"}]}
    for form in (key, *key.get("anyOf", ())):
        if "items" in form:
            form["items"] = one
    return one


def _allow_short_forms(task: dict[str, Any]) -> None:
    """Let the schema of a kind of task take what stands for a list of one, or for classes by number."""
    keys = task["properties"]
    if "text" in keys:
        keys["text"] = _or(keys["text"], {"type": "string"})
    if "classes" in keys:
        keys["classes"]["items"] = {"type": ["string", "boolean", "number"]}
        keys["classes"] = _or(keys["classes"], {"type": "integer", "minimum": 2})
    keys["metrics"] = _or(keys["metrics"], keys["metrics"]["items"], {"type": "null"})
    keys["primary_metric"] = _or(keys["primary_metric"], {"type": "null"})
    task["required"] = [key for key in task["required"] if key not in ("metrics", "primary_metric")]


def _or(key: dict[str, Any], *short_forms: dict[str, Any]) -> dict[str, Any]:
    """The schema of a key that may also be written in other forms."""
    about: dict[str, Any] = {name: key[name] for name in ("title", "description", "default") if name in key}
    form = {name: value for name, value in key.items() if name not in about}
    return {**about, "anyOf": [*(form["anyOf"] if set(form) == {"anyOf"} else [form]), *short_forms]}


class _Line(list[Any]):
    """A list of simple values, which is written in one line."""


class _Representer(SafeRepresenter):
    """Writes lists of simple values in one line, and everything in full each time it occurs."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_line(self, data: _Line) -> SequenceNode:
        node: SequenceNode = self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
        return node


_Representer.add_representer(_Line, _Representer.represent_line)


def _lines(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lines(item) for key, item in value.items()}
    if isinstance(value, list):
        simple = not any(isinstance(item, dict | list) for item in value)
        return _Line(value) if simple else [_lines(item) for item in value]
    return value


def _read(path: Path) -> Any:
    """The mapping in a recipe file."""
    if path.is_dir():
        raise PaveError(
            f"{path} is a folder, not a recipe file; recipes are: {', '.join(recipe_files(path)) or 'none'}"
        )
    try:
        text = _text(path)
    except FileNotFoundError:
        raise PaveError(f"there is no recipe {path}; {nearby(path)}") from None
    except UnicodeDecodeError as error:
        raise PaveError(f"the recipe {path} is not UTF-8 text: byte {error.start} cannot be read") from None
    except (OSError, ValueError) as error:  # a path with a zero byte is a ValueError
        raise PaveError(f"the recipe {path} cannot be read: {reason(error)}") from None
    document = _parse(text, path)
    if document is None:
        raise PaveError(f"the recipe {path} is empty; it needs at least the keys name, base and tasks")
    if not isinstance(document, dict):
        raise PaveError(
            f"the recipe {path} must be a mapping of keys such as name, base and tasks, found {show(document)}"
        )
    return document


def _text(path: Path) -> str:
    """What stands in a file; no more of it is read than a recipe may have."""
    with path.open("rb") as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise PaveError(f"the recipe {path} is too large: expected at most {MOST_BYTES:,} bytes; is it a recipe?")
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()


def _parse(text: str, path: Path) -> Any:
    try:
        return read_yaml(text)
    except YAMLReadError as error:
        cause, what = error.__cause__, str(error)
    mark = (cause.problem_mark or cause.context_mark) if isinstance(cause, MarkedYAMLError) else None
    if mark is None:
        raise PaveError(f"{path} is not valid YAML: {what}" if cause else f"the recipe {path} cannot be used: {what}")
    if "'\\t'" in what:
        what += "; indent with spaces, not with tabs"
    lines = text.split("\n")
    line = lines[mark.line].rstrip() if mark.line < len(lines) else ""
    quoted = f"\n    {line}\n    {' ' * mark.column}^" if line and len(line) <= LONGEST_QUOTED_LINE else ""
    raise PaveError(f"{path}, line {mark.line + 1}, column {mark.column + 1}: {shortened(what)}{quoted}")
