"""What an expert that exists says of itself, and what its files hold, beside what the recipe asks of it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from pave_lightning.errors import listed
from pave_lightning.experts.adapter_base import other_base
from pave_lightning.experts.adapters import adapter_problems, adds_nothing, fit_problems, task_type
from pave_lightning.experts.loading import checkpoint_of, expert_problem, label_names
from pave_lightning.recipe.schema import Task
from pave_lightning.system.files import read_json
from pave_lightning.tasks.labels import match_names
from pave_lightning.weights.architecture import empty_classifier, read_config
from pave_lightning.weights.completeness import naming_problem, unused_weights
from pave_lightning.weights.configuration import (
    architecture_problem,
    config_differences,
    differences_in_function,
)

log = logging.getLogger("pave_lightning")


def adapter_facts(task: Task, folder: Path, reference: str, base: Path) -> list[str]:
    """What is wrong with an adapter that a recipe names: its base, its kind of task, what it holds and lacks.

    Args:
        task: the task; ``expert.accept`` says what is meant.
        folder: folder of the adapter.
        reference: how the recipe names the base.
        base: folder of the base.
    """
    problems = adapter_problems(folder)
    if problems:
        return problems
    accept, found = _accepted(task), {}
    other, kind = other_base(folder, reference, base), task_type(folder)
    if other is not None:
        found["base"] = (
            f"{other}; its update belongs to other weights. Name the adapter's own base, or set "
            "expert.accept: [base] if this is meant"
        )
    if kind is not None:
        found["task_type"] = (
            f"the adapter {folder} was trained with task_type {kind}, and the task needs SEQ_CLS; set "
            "expert.accept: [task_type] if its head is that of a sequence classifier"
        )
    problems = [problem for key, problem in found.items() if key not in accept]
    problems += fit_problems(base, folder, label_names(task))
    if not problems and adds_nothing(base, folder):
        problems.append(f"the adapter {folder} adds nothing to the base: nothing to merge; was it fine-tuned?")
    _tell_idle(task, accept, found)
    return problems


def is_unreadable(folder: Path) -> bool:
    """Whether a checkpoint's weights have other names than its model's, so that nothing else can be asked."""
    model = empty_classifier(folder)
    return naming_problem(model, checkpoint_of(model, folder)) is not None


def expert_facts(task: Task, folder: Path, base: Path) -> Iterator[str]:
    """What is wrong with a whole checkpoint that a recipe names: its configuration, kind and head.

    Args:
        task: the task; ``expert.accept`` says what is meant.
        folder: folder of the checkpoint.
        base: folder of the base.

    Raises:
        PaveError: a configuration or a file cannot be read.
    """
    where, accept = f"task '{task.name}'", _accepted(task)
    incomplete = expert_problem(folder)
    if incomplete is not None:
        yield f"{where}: {folder}: {incomplete}"
    yield from config_differences(task.name, base, folder, accept)
    found = {} if incomplete is not None else _unlike(task, folder)
    yield from (
        f"{where}: {folder}: {problem}; set expert.accept: [{key}] if this is meant"
        for key, problem in found.items()
        if key not in accept
    )
    yield from (f"{where}: {problem}" for problem in _head_problems(task, folder))
    other = differences_in_function(read_config(base), read_config(folder))
    differing = {name for one in other for name in accept if one.accepted([name])}
    _tell_idle(task, accept, differing | set(found))


def _accepted(task: Task) -> Sequence[str]:
    return task.expert.accept if task.expert is not None else ()


def _tell_idle(task: Task, accept: Collection[str], differing: Collection[str]) -> None:
    idle = [name for name in accept if name not in differing]
    if idle:
        log.warning("task '%s': expert.accept names %s, of which nothing differs", task.name, listed(idle))


def _unlike(task: Task, folder: Path) -> dict[str, str]:
    """What an expert says of itself that is not what the task asks, by the key that accepts it."""
    config, found = read_config(folder), {}
    model = empty_classifier(folder)
    other = architecture_problem(config, type(model).__name__)
    if other is not None:
        found["architectures"] = f"{other}; expected a classifier of whole texts"
    asked = label_names(task)["problem_type"]
    if config.problem_type not in (None, asked):
        found["problem_type"] = f"config.json has the problem_type {config.problem_type}, and the task is {asked}"
    unused = unused_weights(model, checkpoint_of(model, folder))
    if unused:
        found["unused_weights"] = (
            f"it holds weights that a {type(model).__name__} has no place for ({listed(unused, 3)}), so it is "
            "another model, or has a head of its own"
        )
    if task.classes is not None:
        found |= _unlike_labels(folder, _labels(config), task.classes)
    return found


def _unlike_labels(folder: Path, names: list[str], classes: list[str]) -> dict[str, str]:
    found = {}
    noted = _noted_indices(folder)
    wrong = [name for name, index in noted.items() if match_names([name], names)[0] not in (None, index)]
    if wrong and _tells(names):
        found["label2id"] = (
            f"config.json contradicts itself: label2id gives {wrong[0]!r} the index {noted[wrong[0]]}, id2label "
            f"{match_names(wrong[:1], names)[0]}"
        )
    if len(names) == len(classes) and _tells(names) and _tells(classes):
        matched = match_names(names, classes)
        if sorted(index for index in matched if index is not None) != list(range(len(classes))):
            found["id2label"] = f"its head has the classes {names} (id2label), and the task {classes}"
    return found


def _head_problems(task: Task, folder: Path) -> Iterator[str]:
    names = _labels(read_config(folder))
    if len(names) != task.outputs:
        yield f"the head of {folder} has {len(names)} outputs, but the task needs {task.outputs}"
    if task.classes is None or len(names) != len(task.classes) or not _tells(names):
        return
    # Not to be accepted: to take the outputs as they are would exchange classes.
    moved = [index for index, place in enumerate(match_names(names, task.classes)) if place not in (None, index)]
    if moved:
        yield (
            f"the head of {folder} has the classes in the order {names}, the task in the order {task.classes}; "
            "write the task's classes in the head's order"
        )


def _labels(config: Any) -> list[str]:
    named = config.id2label or {}
    return [str(name) for _, name in sorted(named.items(), key=lambda item: int(item[0]))]


def _tells(names: Sequence[str]) -> bool:
    """Whether names say anything: not where they only number the classes, in order."""
    numbered = [{str(index), f"label_{index}", f"label{index}"} for index in range(len(names))]
    return not all(name.strip().casefold() in plain for name, plain in zip(names, numbered, strict=True))


def _noted_indices(folder: Path) -> dict[str, int]:
    """``label2id`` as the file has it; transformers leaves names that it makes up itself."""
    found = read_json(folder / "config.json").get("label2id")
    whole = isinstance(found, dict) and all(isinstance(index, int) for index in found.values())
    return {str(name): index for name, index in found.items()} if isinstance(found, dict) and whole else {}
