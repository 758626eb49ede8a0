"""What ``pave recipes`` prints: the shipped recipes, what they do and what they need."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from pave_lightning.errors import listed
from pave_lightning.recipe.finding import shipped_recipes
from pave_lightning.recipe.yaml_text import read_yaml
from pave_lightning.system.catalogue import catalogue_console, print_catalogue
from pave_lightning.system.files import SCHEME
from pave_lightning.system.references import GGUF_ENDING, HUB_SCHEME, hub_model
from pave_lightning.tasks.suites import known_data, suite_task

# Of repositories of the hub; the recipe itself has the others.
MOST_NAMED = 4
HEADINGS = ("recipe", "what it does", "command", "needs")


def print_recipes(console: Console | None = None) -> None:
    """Print every shipped recipe with the first sentence of its comment and what it needs.

    Args:
        console: where to print; standard output where none is given.
    """
    console = catalogue_console() if console is None else console
    rows: dict[str, tuple[tuple[str, str, str], str]] = {}
    for name, file in shipped_recipes().items():
        text = file.read_text(encoding="utf-8")
        document = read_yaml(text)
        command = f"pave {'sweep' if 'sweep' in document else 'run'} {name.removeprefix('sweeps/')}"
        rows[name] = (summary(text), command, "; ".join(needs(document))), command
    print_catalogue(console, HEADINGS, rows, whole=("command",))


def summary(text: str) -> str:
    r"""The first sentence of the comment at the head of a recipe, without its full stop.

    Example:
        >>> summary("# yaml-language-server: x\n# Four tasks,\n# offline. Hours.\nname: x\n")
        'Four tasks, offline'
    """
    head: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# yaml-language-server:"):
            head.append(line.removeprefix("#").strip())
    return re.split(r"\.(?:\s|$)", " ".join(head), maxsplit=1)[0]


def needs(document: Any) -> list[str]:
    """What a recipe needs besides the package: installed packages, the hub, local folders.

    Args:
        document: the mapping in a recipe file.
    """
    found: dict[str, list[str]] = {"package": [], "hub": [], "folder": []}
    for kind, name in _sources(document):
        if name not in found[kind]:
            found[kind].append(name)
    packages = [name if is_installed(name) else f"{name} (not installed)" for name in found["package"]]
    told = [f"package {name}" for name in packages]
    if found["hub"]:
        told.append(f"hub: {listed(found['hub'], MOST_NAMED)}")
    return [*told, *(f"folder {name}" for name in found["folder"])] or ["nothing else"]


def _sources(document: Any) -> Iterator[tuple[str, str]]:
    """Where models and rows come from: kind of place, and name."""
    tasks = document.get("tasks") or []
    models = [document.get("base"), *(task.get("expert", {}).get("from") for task in tasks if isinstance(task, dict))]
    for model in models:
        name = model.get("hub") if isinstance(model, dict) else model
        if isinstance(name, str) and name.startswith(SCHEME):
            yield "package", name.removeprefix(SCHEME).partition("/")[0]
            if name.endswith(GGUF_ENDING):
                yield "package", "gguf"
        elif name:
            yield "hub", hub_model(name).hub if name.startswith(HUB_SCHEME) else name
    for task in tasks:
        own: dict[str, Any] = {"use": task} if isinstance(task, str) else task
        known = suite_task(own["use"])["data"] if "use" in own else {}
        data = known_data(known, own.get("data") or {})
        if data.get("folder"):
            yield "folder", data["folder"]
        elif data.get("hub"):
            yield "hub", data["hub"]


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    return importlib.util.find_spec(package) is not None
