"""What lm-eval has: its tasks by name, and what each of them fetches and runs, read off their files; none is run here.

lm-eval itself parses all its files to know their names, which takes it ten seconds and more. Here they are searched for
names alone, and only those that are asked for are parsed.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pave_lightning.errors import PaveError, foreign, nearest

PACKAGE = "lm_eval"
INSTALL = "pip install 'pave-lightning[lm-eval]'"
# Folders of a package's own, which lm-eval skips as well.
SKIPPED = ("__pycache__", ".ipynb_checkpoints")
_NAMED = re.compile(rb"^[\"']?(task|group)[\"']?[ \t]*:[ \t]*[\"']?([^\s\"'#\[{]+)", re.MULTILINE)
_EXTRA = re.compile(r"lm[_-]eval\[([\w,-]+)\]")
# How many letters a name that is not known shares with those that it is compared with.
ALIKE = 3


@dataclass(frozen=True)
class Reference:
    """A function that a task file names.

    Attributes:
        file: the Python file, if it lies beside the task file; else the path that it would have.
        name: the function.
    """

    file: Path
    name: str


@dataclass(frozen=True)
class Facts:
    """What a task or group of lm-eval fetches and runs.

    Attributes:
        name: its name.
        files: the files that describe it and the tasks of a group.
        tasks: names of the tasks; of a single one its own.
        data: names of data sets, with the configuration where there is one.
        local: files of data on this machine, whether they exist or not.
        metrics: names of the metrics.
        fetched: metrics that the package `evaluate` fetches as code from the hub.
        extras: extras of lm_eval that its code names.
        lacking: Python modules that its code imports and that are not installed.
        own_code: Python files outside of lm-eval that it runs.
        runs_code: whether what models write is run as code.
        few_shot: the examples that it puts into a prompt; None where it leaves that open, or tasks differ.
        lacks_score: whether it is a group without a score of the whole.
    """

    name: str
    files: tuple[Path, ...]
    tasks: tuple[str, ...]
    data: tuple[str, ...]
    local: tuple[Path, ...]
    metrics: tuple[str, ...]
    fetched: tuple[str, ...]
    extras: tuple[str, ...]
    lacking: tuple[str, ...]
    own_code: tuple[Path, ...]
    runs_code: bool
    few_shot: int | None
    lacks_score: bool

    @property
    def folders(self) -> list[str]:
        """The folders in which lm-eval has to look for it."""
        return list(dict.fromkeys(str(file.parent) for file in self.files))


def tasks_folder() -> Path:
    """The folder of lm-eval's own task files.

    Raises:
        PaveError: it is not installed.
    """
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise PaveError(f"benchmarks of lm-eval take the package lm_eval; run: {INSTALL}")
    return Path(next(iter(found.submodule_search_locations))) / "tasks"


class Catalogue:
    """The tasks of lm-eval and those of a folder of one's own, which come first.

    Args:
        folder: that folder.

    Raises:
        PaveError: lm-eval is not installed, or there is no such folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.harness = tasks_folder()
        if folder is not None and not folder.is_dir():
            raise PaveError(f"there is no folder {folder}; it is to hold task files (.yaml)")
        self._own = {} if folder is None else _scan(folder.resolve())

    def file_of(self, name: str) -> Path | None:
        """The file that describes a task or group; None where there is none."""
        return self._own.get(name) or _scan_once(self.harness).get(name)

    def facts(self, name: str) -> Facts:
        """What a task or group fetches and runs.

        Raises:
            PaveError: there is none of that name, or its file cannot be read.
        """
        path = self.file_of(name)
        if path is None:
            names = [*self._own, *_scan_once(self.harness)]
            start = name[:ALIKE].lower()
            likely = [one for one in names if one.lower().startswith(start)] or list(self._own)
            hint = f"; {nearest(name, likely)}" if likely else ""
            raise PaveError(f"lm-eval has no task or group '{name}'{hint}")
        files, leaves = _members(self, name, path)
        return _facts(name, files, leaves, self.harness)


def _members(catalogue: Catalogue, name: str, path: Path) -> tuple[list[Path], dict[str, dict[str, Any]]]:
    """The files of a task or group, its own first, and the settings of each single task by name."""
    files: list[Path] = []
    leaves: dict[str, dict[str, Any]] = {}

    def visit(one: str, place: Path, inherited: Mapping[str, Any]) -> None:
        if place not in files:
            files.append(place)
        settings = {**_read(place), **inherited}
        if "group" not in settings:
            leaves.setdefault(one, settings)
            return
        for member in _listed(settings.get("task")):
            own = dict(member) if isinstance(member, Mapping) else {}
            called = str(own.get("group") or own.get("task") or member)
            found = catalogue.file_of(called)
            if found is not None:
                visit(called, found, {key: value for key, value in own.items() if key not in ("group", "task")})
            elif isinstance(member, Mapping) and "task" in own and not isinstance(own["task"], list):
                leaves.setdefault(called, own)
            else:
                visit_all(called, member, place)

    def visit_all(called: str, member: Any, place: Path) -> None:
        """The tasks with a tag, or of a group that stands inside of a group's file."""
        if isinstance(member, Mapping):
            for inner in _listed(member.get("task")):
                named = str(inner.get("task")) if isinstance(inner, Mapping) else str(inner)
                found = catalogue.file_of(named)
                if found is not None:
                    visit(named, found, {})
            return
        near = _tagged(place.parent)  # most groups lie beside their tasks, and to parse all files takes half a minute
        for named, found in (near if called in near else _tagged(catalogue.harness)).get(called, {}).items():
            visit(named, found, {})

    visit(name, path, {})
    return files, leaves


def _facts(name: str, files: Sequence[Path], leaves: Mapping[str, Mapping[str, Any]], harness: Path) -> Facts:
    first, configs = _read(files[0]), list(leaves.values())
    sources = list(dict.fromkeys(found.file for config in configs for found in _references(config)))
    there = [file for file in sources if file.is_file()]
    texts = {file: file.read_text(encoding="utf-8", errors="replace") for file in there}
    trees = [ast.parse(text) for text in texts.values() if _parses(text)]
    metrics = [entry for config in configs for entry in _listed(config.get("metric_list"))]
    shots = {config.get("num_fewshot") for config in configs}
    fetched = [one for tree in trees for one in _loaded_metrics(tree)]
    fetched += [str(entry["metric"]) for entry in metrics if isinstance(entry, Mapping) and entry.get("hf_evaluate")]
    extras = [one for text in texts.values() for group in _EXTRA.findall(text) for one in group.split(",")]
    lacking = [one for tree in trees for one in _needed_modules(tree) if _is_lacking(one)]
    told = [_metric_name(entry["metric"]) for entry in metrics if isinstance(entry, Mapping) and "metric" in entry]
    whole = _listed(first.get("aggregate_metric_list"))
    shown = [str(entry["metric"]) for entry in whole if isinstance(entry, Mapping) and "metric" in entry] or told
    return Facts(
        name=name,
        files=tuple(files),
        tasks=tuple(leaves),
        data=_distinct(_data_name(config) for config in configs if config.get("dataset_path")),
        local=tuple(dict.fromkeys(path for config in configs for path in _local_files(config))),
        metrics=_distinct(shown),
        fetched=_distinct(fetched),
        extras=_distinct(extras),
        lacking=_distinct(lacking),
        own_code=tuple(file for file in sources if not file.is_relative_to(harness)),
        runs_code=any(bool(config.get("unsafe_code")) for config in configs),
        few_shot=next(iter(shots)) if len(shots) == 1 else None,
        lacks_score="group" in first and not whole,
    )


# ---- files -----------------------------------------------------------------------------------------------------------


@cache
def _scan_once(folder: Path) -> dict[str, Path]:
    return _scan(folder)


def _scan(folder: Path) -> dict[str, Path]:
    """Names of tasks and groups in the files of a folder, each with its file; the first file of a name counts."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("**/*.yaml")):
        if any(part in SKIPPED for part in path.parts):
            continue
        named = dict(reversed(_NAMED.findall(path.read_bytes())))  # of a key that stands twice the first one
        name = named.get(b"group") or named.get(b"task")
        if name:
            found.setdefault(name.decode("utf-8", "replace"), path)
    return found


@cache
def _tagged(folder: Path) -> dict[str, dict[str, Path]]:
    """Tasks by tag, each with its file; tags may stand in files that others include, so all are parsed."""
    found: dict[str, dict[str, Path]] = {}
    for name, path in _scan_once(folder).items():
        try:
            settings = _read(path)
        except PaveError:
            continue
        for tag in _listed(settings.get("tag")):
            found.setdefault(str(tag), {})[name] = path
    return found


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a file and of those that it includes, with functions as references.

    Raises:
        PaveError: it cannot be read.
    """
    with foreign(f"{path} cannot be read as a task file of lm-eval"):
        settings = _parsed(path)
        if not isinstance(settings, dict):
            raise PaveError(f"{path} is not a task file of lm-eval: it holds no keys")
        included = _listed(settings.pop("include", None))
        if path in seen:
            raise PaveError(f"{path} includes itself")
        merged: dict[str, Any] = {}
        for name in included:
            merged |= _read(path.parent / str(name), (*seen, path))
        return merged | settings


def _parsed(path: Path) -> Any:
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """As lm-eval reads its files, but for functions, which are not loaded."""

    def reference(loader: Any, node: Any) -> Reference:
        module, _, name = str(loader.construct_scalar(node)).rpartition(".")
        return Reference((path.parent / f"{module.replace('.', '/')}.py").resolve(), name)

    Loader.add_constructor("!function", reference)
    return yaml.load(path.read_text(encoding="utf-8"), Loader)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _distinct(values: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(str, values)))


def _references(value: Any) -> Iterator[Reference]:
    """All functions that settings name, wherever they stand."""
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _references(one)
    elif isinstance(value, list):
        for one in value:
            yield from _references(one)


def _metric_name(value: Any) -> str:
    return value.name if isinstance(value, Reference) else str(value)


def _data_name(config: Mapping[str, Any]) -> str:
    name = config.get("dataset_name")
    return f"{config['dataset_path']}{f' ({name})' if name else ''}"


def _local_files(config: Mapping[str, Any]) -> Iterator[Path]:
    """Files of data on this machine; relative paths begin in the current folder, as they do for lm-eval."""
    kwargs = config.get("dataset_kwargs")
    files = kwargs.get("data_files") if isinstance(kwargs, Mapping) else None
    if str(config.get("dataset_path")) not in ("json", "csv", "parquet", "text", "arrow"):
        return
    for value in files.values() if isinstance(files, Mapping) else [files]:
        for one in _listed(value):
            if "://" not in str(one) and "*" not in str(one):
                yield Path(str(one)).absolute()


# ---- code ------------------------------------------------------------------------------------------------------------


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def _needed_modules(tree: ast.Module) -> Iterator[str]:
    """Modules that a file imports when it is loaded, but for those whose absence it puts up with."""
    for statement in tree.body:
        within = [statement]
        if isinstance(statement, ast.Try):
            raises = [any(isinstance(one, ast.Raise) for one in ast.walk(handler)) for handler in statement.handlers]
            within = statement.body if any(raises) else []
        for one in within:
            if isinstance(one, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in one.names)
            elif isinstance(one, ast.ImportFrom) and one.module and not one.level:
                yield one.module.partition(".")[0]


def _is_lacking(module: str) -> bool:
    return module not in sys.stdlib_module_names and find_spec(module) is None


def _loaded_metrics(tree: ast.Module) -> Iterator[str]:
    """Names that a file gives to `evaluate.load`."""
    called = {
        alias.asname or alias.name
        for statement in ast.walk(tree)
        if isinstance(statement, ast.Import)
        for alias in statement.names
        if alias.name == "evaluate"
    }
    for one in ast.walk(tree):
        is_load = isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and one.func.attr == "load"
        if is_load and isinstance(one.func.value, ast.Name) and one.func.value.id in called and one.args:  # type: ignore[attr-defined]
            first = one.args[0]  # type: ignore[attr-defined]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


__all__ = ["INSTALL", "Catalogue", "Facts", "Reference", "tasks_folder"]
