"""Writes a starting recipe from what files look like: their columns, their classes, their splits."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ruamel.yaml import YAML

from pave_lightning.config import LONGEST_NAME, NAME_PATTERN, name_problem, options_of
from pave_lightning.errors import PaveError, Problems, counted, listed, nearest, reason, shortened
from pave_lightning.recipe.finding import SUFFIXES
from pave_lightning.recipe.loading import load_recipe
from pave_lightning.recipe.yaml_text import YAMLReadError, read_yaml
from pave_lightning.system.files import local_path
from pave_lightning.tasks.file_profiles import FileColumns, base_config, profile_of_files, read_columns
from pave_lightning.tasks.profiles import Column, Profile, Suggestion
from pave_lightning.tasks.rows import UnreadableError, column_path, no_column
from pave_lightning.tasks.split_files import SplitSlice
from pave_lightning.tasks.split_search import FoundSplits, search_splits
from pave_lightning.tasks.task import DEFAULT, Task, kind_named, known_kinds

LONGEST_LINE = 110
MAX_LENGTH = 128
# Position tables of some models begin behind the padding token.
RESERVED_POSITIONS = 2
# Names of columns have fewer words.
WORDS_OF_A_TEXT = 3


@dataclass(frozen=True)
class StartingTask:
    """A task of a starting recipe.

    Attributes:
        options: its keys, in the order in which they are written.
        remarks: what is said about keys, by key.
    """

    options: dict[str, Any]
    remarks: dict[str, str]


def start_recipe(name: str, files: Sequence[str], base: str, settings: Sequence[str] = ()) -> Path:
    """Write a starting recipe for files of rows; a file that exists is never overwritten.

    Args:
        name: name of the recipe, or path of its file, which must not exist.
        files: csv, tsv, json, jsonl or parquet files, one or more of each task, or folders with files of splits.
        base: the base model: a folder, a hub id, ``package:NAME/FOLDER`` or a GGUF file.
        settings: ``tasks.NAME.KEY=VALUE`` texts that decide what cannot be told from the files.

    Returns:
        The file.

    Raises:
        PaveError: the recipe exists, or the columns of files cannot be told; everything is told at once.
    """
    target = Path(name if name.endswith(SUFFIXES) else f"{name}.yaml")
    problems = Problems("no recipe has been written:")
    problems.extend(_target_problems(target))
    found = search_splits([Path(file).expanduser() for file in files], problems)
    given = _settings(settings, [one.name for one in found], problems)
    config: Mapping[str, Any] = {}
    with suppress(PaveError):  # of a package that is not installed, which plan tells
        config = base_config(local_path(base))
    tasks = []
    for one in found:
        try:
            tasks.append(_start_task(one, given.get(one.name, {}), config))
        except (PaveError, UnreadableError) as error:
            problems.add(f"{one.name} ({', '.join(map(str, one.files.values()))}): {error}")
        except OSError as error:
            problems.add(f"{one.name}: {reason(error)}")
    problems.raise_if_any()
    text = _text(target.stem, base, tasks, config)
    with TemporaryDirectory(prefix="pave-new-") as folder:  # what would not be a recipe is not written
        draft = Path(folder) / target.name
        draft.write_text(text, encoding="utf-8")
        load_recipe(draft)
    try:
        stream = target.open("x", encoding="utf-8")
    except OSError as error:
        raise PaveError(f"{target} cannot be written: {reason(error)}") from error
    try:
        with stream:
            stream.write(text)
    except BaseException as error:  # half a recipe is none
        target.unlink()
        if isinstance(error, OSError):
            raise PaveError(f"{target} cannot be written: {reason(error)}") from error
        raise
    return target


def _target_problems(target: Path) -> list[str]:
    wrong = []
    if not re.fullmatch(NAME_PATTERN, target.stem) or len(target.stem) > LONGEST_NAME:
        wrong.append(f"'{target.stem}' cannot be the name of a recipe; use letters, digits, '-', '_' and '.'")
    elif problem := name_problem(target.stem):
        wrong.append(problem)
    if target.exists():
        wrong.append(f"{target} exists and is not overwritten; choose another name, or remove it")
    elif not target.parent.is_dir():
        wrong.append(f"there is no folder {target.parent}")
    return wrong


def _settings(settings: Sequence[str], names: Sequence[str], problems: Problems) -> dict[str, dict[str, Any]]:
    """What is given of tasks, by task and key."""
    given: dict[str, dict[str, Any]] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        found = re.fullmatch(r"tasks\.(.+)\.([a-z_]+)", path.strip())
        if not equals or found is None:
            problems.add(f"--set {setting}: expected tasks.NAME.KEY=VALUE; other keys can be changed in the file later")
        elif found[1] not in names:
            problems.add(f"--set {setting}: there is no task '{found[1]}'; {nearest(found[1], names)}")
        else:
            try:
                given.setdefault(found[1], {})[found[2]] = read_yaml(text)
            except YAMLReadError:
                problems.add(f"--set {setting}: the value is not valid YAML; quote it if it is a text")
    return given


def _start_task(found: FoundSplits, given: Mapping[str, Any], config: Mapping[str, Any]) -> StartingTask:
    """A task from its files.

    Raises:
        PaveError: it cannot be told what the columns are, what is given does not go together, or parts lack classes.
        UnreadableError: a file cannot be read.
    """
    read = {split: read_columns(file) for split, file in found.files.items()}
    empty = [str(found.files[split]) for split, columns in read.items() if not columns.rows]
    if empty:
        raise UnreadableError(f"there are no rows in {listed(empty)}")
    profile = profile_of_files(list(read.values()), config)
    suggestion = _suggest(profile, given)
    remark = ""
    likely = None if suggestion is None else _as_task(found, suggestion)
    if "test" in read and not _is_labelled(read["test"], likely):
        remark = f"{found.files['test'].name} has no labels and is left out"
        found = replace(found, files={split: file for split, file in found.files.items() if split != "test"})
        read = {split: read[split] for split in found.files}
        profile = profile_of_files(list(read.values()), config)
        suggestion = _suggest(profile, given)
    if suggestion is None:
        raise PaveError(_question(found.name, profile, given))
    task = _as_task(found, suggestion)
    known = [column.name for column in profile.columns]
    absent = [name for name in task.columns if column_path(name, known) is None]
    if absent:
        raise PaveError("; ".join(no_column(name, known) for name in absent))
    if "label" not in given and _lacks_header(task, profile):
        row = listed([f"'{shortened(name, 40)}'" for name in known], 8)
        raise PaveError(
            f"the first line looks like a row and not like the names of columns: {row}\n"
            "write a line with their names above it, such as text,label; if these are the names, "
            f"say so with --set tasks.{found.name}.label={task.label_columns[0]}"
        )
    data: dict[str, Any] = found.data()
    delimiter = read["train"].delimiter
    if "folder" in data:
        _check_parts(found.files["train"], read["train"], data, task)
        remark = f"{remark}{'; ' if remark else ''}parts of a file"
    used = {*task.columns, *(name.partition(".")[0] for name in task.columns)}
    unused = [f"'{name}'" for name in known if name not in used]
    rows = ", ".join(f"{counted(columns.rows, 'row')} in {found.files[split].name}" for split, columns in read.items())
    remarks = {"name": rows, "kind": suggestion.remark, "data": remark}
    if unused:
        remarks[list(suggestion.options)[-1]] = f"columns not used: {listed(unused, 8)}"
    data |= {} if delimiter is None else {"delimiter": delimiter}
    return StartingTask({"name": found.name, "kind": task.kind, "data": data, **suggestion.options}, remarks)


def _lacks_header(task: Task, profile: Profile) -> bool:
    """Whether the name of the label is one of the labels and a name beside it is a text, as where names are missing."""
    labels = [column for name in task.label_columns if (column := profile.column(name)) is not None]
    named_as_value = any(column.name.strip() in {str(value).strip() for value in column.distinct} for column in labels)
    others = set(task.columns) - set(task.label_columns)
    return named_as_value and any(len(name.split()) >= WORDS_OF_A_TEXT for name in others)


def _suggest(profile: Profile, given: Mapping[str, Any]) -> Suggestion | None:
    """What the kind of task that is surest of the columns says of them; its options name it, and hold what is given."""
    kinds = known_kinds()
    if "kind" in given:
        kinds = {str(given["kind"]): kind_named(str(given["kind"]))}
    found = [(name, one) for name, kind in kinds.items() if (one := kind.suggested(profile, given)) is not None]
    if not found:
        return None
    kind, suggestion = max(found, key=lambda named: named[1].certainty)
    options = {"kind": kind, **suggestion.options, **given}
    return replace(suggestion, options={key: _short(key, value) for key, value in options.items()})


def _short(key: str, value: Any) -> Any:
    """A list of one column as the column."""
    return value[0] if key == "text" and isinstance(value, list) and len(value) == 1 else value


def _question(name: str, profile: Profile, given: Mapping[str, Any]) -> str:
    """What to ask where no kind of task is sure of the columns, with the candidates."""
    flags: list[str] = []
    asked: list[str] = []
    label = profile.column(str(given["label"])) if "label" in given else profile.label()
    if label is None:
        likely = [column for column in profile.columns if (column.repeats or column.is_numeric) and column.distinct]
        asked.append(f"which column is the label: {_told(likely or profile.columns)}")
        flags.append(f"--set tasks.{name}.label=COLUMN")
    if "text" not in given and profile.shown([] if label is None else [label.name]) is None:
        texts = profile.texts([] if label is None else [label.name])
        asked.append(f"which column is the text (or [A, B], a pair of texts): {_told(texts or profile.columns)}")
        flags.append(f"--set tasks.{name}.text=COLUMN")
    if not asked:
        asked.append(f"the columns fit no {given.get('kind', DEFAULT)} task: {_told(profile.columns)}")
    kinds = f"or name another kind of task with --set tasks.{name}.kind=KIND: {', '.join(known_kinds())}"
    answers = [f"answer with {' '.join(flags)}"] if flags else []
    lines = [*asked, *answers, *([] if "kind" in given else [kinds])]
    return "\n".join(["the columns do not tell what is to be learned", *lines])


def _told(columns: Sequence[Column]) -> str:
    return listed([str(column) for column in columns], 12) or "there are none"


def _as_task(found: FoundSplits, suggestion: Suggestion) -> Task:
    options = {"name": found.name, "data": {"train": str(found.files["train"])}, **suggestion.options}
    return options_of(kind_named(str(options["kind"])), options, f"task '{found.name}'")


def _is_labelled(columns: FileColumns, task: Task | None) -> bool:
    """Whether a file has the task's labels, and not the same class in every row."""
    names = list(columns.columns)
    paths = [] if task is None else [column_path(name, names) for name in task.label_columns]
    if not paths or None in paths:
        return False
    values = [columns.columns[names[path[0]]] for path in paths if path is not None]
    if any(value is None for one in values for value in one):
        return False
    return len(values) > 1 or not task or not task.class_names or len({repr(value) for value in values[0]}) > 1


def _check_parts(file: Path, columns: FileColumns, data: Mapping[str, str], task: Task) -> None:
    """Refuse parts of a file that is sorted by its labels.

    Raises:
        PaveError: a part that is learned from lacks a class, or a part that is scored has one alone.
    """
    name = task.label_columns[0]
    values = columns.columns.get(name, ())
    if not task.class_names or len(task.label_columns) > 1 or any(isinstance(value, list) for value in values):
        return
    labels: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        source = SplitSlice.parse(data[split])
        if (source.first, source.last) != (None, None):
            labels[split] = {repr(value) for value in values[source.rows(columns.rows)]}
    everything = set().union(*labels.values())
    if labels["train"] != everything or any(len(own) < 2 for own in labels.values()):
        raise PaveError(
            f"no parts of {file} can be the splits that have no file: its rows are sorted by '{name}', or too few of "
            "some class; shuffle the rows, or write files for train, validation and test"
        )


def _text(name: str, base: str, tasks: Sequence[StartingTask], config: Mapping[str, Any]) -> str:
    """The recipe as a text with comments."""
    positions = config.get("max_position_embeddings")
    mark = "" if len(tasks) > 1 else "# "
    longest = min(MAX_LENGTH, positions - RESERVED_POSITIONS) if isinstance(positions, int) else MAX_LENGTH
    lines = [
        f"# {counted(len(tasks), 'task')} on {base}. Written by `pave new` from what the files look like:",
        "# check each task, then run",
        f"#   pave plan {name}.yaml    # checks everything, runs nothing",
        f"#   pave run {name}.yaml",
        f"name: {name}",
        "seed: 0",
        f"base: {_flow(base)}",
        "",
        "# Options of lightning.Trainer.",
        "trainer: {max_epochs: 3}",
        "# How experts are fine-tuned; a task may have a section training of its own.",
        "training:",
        "  learning_rate: 3e-5        # of the backbone; experts trained gently merge better",
        "  head_learning_rate: 2e-3   # of the heads, which are not merged",
        "  batch_size: 32",
        *([f"  max_length: {longest}            # in tokens; longer texts are cut"] if longest >= 4 else []),
        "  # lora: {rank: 16}         # adapters instead of full fine-tuning",
        "# How many rows are used, such as {train: 2000, validation: 200, test: 400}; all by default.",
        "# examples: {}",
        "",
        "# An expert that exists needs no training: expert: {from: FOLDER_OR_HUB_ID}",
        "tasks:",
        *(line for task in tasks for line in _task_lines(task)),
        "",
        "# Rows that layers are observed on, and the share of each layer's ranks that purification keeps.",
        "capture: {examples: 256}",
        "purify: {rho: 0.97}",
        "",
        *(
            []
            if len(tasks) > 1
            else ["# Merging needs a second task; add one above, then remove the leading '# ' below."]
        ),
        "# `pave methods` lists the others. Scales are chosen on validation rows.",
        f"{mark}merge:",
        f"{mark}  - average",
        f"{mark}  - {{method: task_arithmetic, scale: {{search: auto, examples: 100}}}}",
        f"{mark}  - {{method: ties, scale: {{search: auto, examples: 100}}}}",
    ]
    return "\n".join(lines) + "\n"


def _task_lines(task: StartingTask) -> list[str]:
    lines = []
    for place, (key, value) in enumerate(task.options.items()):
        line = f"  {'-' if place == 0 else ' '} {key}: {_flow(value)}"
        remark = f"  # {task.remarks[key]}" if task.remarks.get(key) else ""
        if len(line) > LONGEST_LINE and isinstance(value, list):
            lines += [f"    {key}:{remark}", *(f"      - {_flow(entry)}" for entry in value)]
        elif len(line) > LONGEST_LINE and isinstance(value, dict):
            lines += [f"    {key}:{remark}", *(f"      {one}: {_flow(entry)}" for one, entry in value.items())]
        else:
            lines.append(line + remark)
    return lines


def _flow(value: Any) -> str:
    """A value in one line of YAML."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = True
    yaml.width = 1_000_000
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # keep the order of the keys
    text = io.StringIO()
    yaml.dump([value], text)
    return text.getvalue().strip()[1:-1]
