"""Makes the pages of the reference from the code, and takes the pages about recipes from beside the recipes."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

from formulas import as_markdown  # noqa: E402


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere."""
    for file in beside(config):
        files.append(file)
    return files


# ---- recipes ---------------------------------------------------------------------------------------------------------


def recipe_keys() -> str:
    """Every key of a recipe: type, default and what it does."""
    from pave_lightning.recipe.loading import recipe_schema

    schema = recipe_schema()
    parts = list(_keys(schema))
    known = {name: section for name, section in schema["$defs"].items() if not name.startswith("Known")}
    for name in sorted(known):
        section = known[name]
        if "properties" in section:
            parts += [f"## {name}", as_markdown(section.get("description", "")), *_keys(section)]
    return "\n\n".join(parts)


def _keys(section: Mapping[str, Any]) -> Iterator[str]:
    required = set(section.get("required", ()))
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for key, value in section["properties"].items():
        default = "required" if key in required else f"`{json.dumps(value['default'])}`" if "default" in value else ""
        told = as_markdown(value.get("description", "")).replace("\n", " ").replace("|", r"\|")
        rows.append(f"| `{key}` | {_type(value)} | {default.replace('|', chr(92) + '|')} | {told} |")
    yield "\n".join(rows)


WORDS = {
    "object": "mapping",
    "integer": "whole number",
    "string": "text",
    "boolean": "true or false",
    "null": "nothing",
}


def _type(value: Mapping[str, Any]) -> str:
    """What belongs at a key, with links to sections."""
    kind = value.get("type", "")
    told = WORDS.get(kind, kind) if isinstance(kind, str) else " or ".join(WORDS.get(one, one) for one in kind)
    if "$ref" in value:
        name = str(value["$ref"]).rpartition("/")[2]
        told = name.removeprefix("Known") if name.startswith("Known") else f"[{name}](#{name.lower()})"
    elif members := value.get("anyOf") or value.get("oneOf"):
        told = " or ".join(dict.fromkeys(filter(None, map(_type, members))))
    elif words := value.get("enum") or ([value["const"]] if "const" in value else []):
        told = ", ".join(f"`{word}`" for word in words)
    elif kind == "array":
        told = f"list of {_type(value['items'])}" if "items" in value else "list"
    elif kind == "object" and isinstance(value.get("additionalProperties"), Mapping):
        told = f"mapping to {_type(value['additionalProperties'])}"
    return told


# ---- commands --------------------------------------------------------------------------------------------------------


def commands() -> str:
    """The help of every command."""
    from pave_lightning.cli import build_parser

    parser = build_parser()
    (named,) = (action for action in parser._actions if hasattr(action, "choices") and action.dest == "command")
    parts = []
    for name, command in named.choices.items():
        parts += [f"## pave {name}", command.description or "", f"```text\n{_usage(command)}\n```"]
        rows = ["| | |", "|---|---|"]
        for action in command._actions:
            if action.help and action.help != "==SUPPRESS==" and action.dest not in ("help", "config"):
                called = ", ".join(action.option_strings) or action.dest
                rows.append(f"| `{called}` | {re.sub(r' ?[(]type:.*[)]$', '', action.help)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _usage(parser: Any) -> str:
    return str(parser.format_usage()).removeprefix("usage: ").strip()


# ---- merge methods and transforms ------------------------------------------------------------------------------------


def methods() -> str:
    """Every merge method with formula, options and source."""
    from pave_lightning.merging import known_methods
    from pave_lightning.merging.describe import needs_of, scale_of

    known = dict(sorted(known_methods().items()))
    rows = ["| method | what it does | form | needs |", "|---|---|---|---|"]
    rows += [
        f"| [`{name}`](#{name}) | {kind.summary} | {kind.form} | {needs_of(kind)} |" for name, kind in known.items()
    ]
    parts = ["\n".join(rows)]
    for name, kind in known.items():
        facts = f"*{kind.form}; {needs_of(kind)}; cost: {kind.cost}; scale: {scale_of(kind)}*"
        parts += [f"## {name}", facts, as_markdown(inspect.getdoc(kind) or ""), *_options(kind.Options, "options.")]
    return "\n\n".join(parts)


def transforms() -> str:
    """Every transform of task vectors."""
    from pave_lightning.transforms import known_transforms

    parts = []
    for name, kind in sorted(known_transforms().items()):
        parts += [f"## {name}", as_markdown(inspect.getdoc(kind) or ""), *_options(kind.Options, "")]
    return "\n\n".join(parts)


def _options(options: Any, prefix: str) -> Iterator[str]:
    rows = ["| option | default | |", "|---|---|---|"]
    for key, field in options.model_fields.items():
        default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)}`"
        rows.append(f"| `{prefix}{key}` | {default} | {as_markdown(field.description or '')} |".replace("\n", " "))
    if len(rows) > 2:
        yield "\n".join(rows)


# ---- pages that lie beside what they are about ----------------------------------------------------------------------

BESIDE = (
    "recipes",
    "benchmarks/README.md",
    "checkpoints/README.md",
    "CONTRIBUTING.md",
    "pave_lightning/tasks/*/README.md",
)
"""Pages outside of the folder of pages, and what they link to; they keep their places in the site."""


def beside(config: Any) -> Iterator[File]:
    """The files of `BESIDE`."""
    for pattern in BESIDE:
        for found in ROOT.glob(pattern):
            for path in sorted(found.rglob("*")) if found.is_dir() else [found]:
                if path.is_file() and path.suffix in (".md", ".yaml", ".json", ".png", ".csv", ".py"):
                    yield File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))


GENERATED = {"recipe": recipe_keys, "commands": commands, "methods": methods, "transforms": transforms}
"""What takes the place of a comment such as ``<!-- generated: recipe -->``."""


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """What is generated, formulas, and links, which are right in the repository.

    There the pages lie one folder deeper than in the site.
    """
    parts = re.split(r"(```.*?```|`[^`\n]*`)", markdown, flags=re.DOTALL)
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"\$([^$\n]+)\$", lambda found: as_markdown(f":math:`{found[1]}`"), parts[index])
    text = re.sub(r"<!-- generated: (\w+) -->", lambda found: GENERATED[found[1]](), "".join(parts))
    if page.file.abs_src_path and Path(page.file.abs_src_path).is_relative_to(ROOT / "docs"):
        depth = page.file.src_uri.count("/")
        return re.sub(rf"\]\({'../' * (depth + 1)}(?!\.)", f"]({'../' * depth}", text)
    # Pages from elsewhere name pages of the folder `docs`.
    return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", text)
