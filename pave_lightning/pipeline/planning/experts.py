"""What an expert that exists says of itself, and what its files hold, beside what the recipe asks of it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

from pave_lightning.errors import listed
from pave_lightning.experts.adapters import adds_nothing, fit_problems
from pave_lightning.experts.loading import expert_problem
from pave_lightning.system.files import read_json
from pave_lightning.tasks.task import Task
from pave_lightning.weights import Checkpoint
from pave_lightning.weights.adapter_base import other_base
from pave_lightning.weights.adapter_models import adapter_problems, task_type
from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.backbones import lies_in
from pave_lightning.weights.completeness import naming_problem, unused_weights
from pave_lightning.weights.configuration import (
    architecture_problem,
    config_differences,
    differences_in_function,
)
from pave_lightning.weights.empty_models import form_of, read_config

# Keys of configurations that hold numbers of tokens and change what is computed.
NUMBERS = ("eos_token_id", "decoder_start_token_id")

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
    if kind not in (None, task.peft_type):
        found["task_type"] = (
            f"the adapter {folder} was trained with task_type {kind}, and the task needs {task.peft_type}; set "
            f"expert.accept: [task_type] if its head is that of a {form_of(task.auto_model)}"
        )
    problems = [problem for key, problem in found.items() if key not in accept]
    problems += fit_problems(base, folder, task.head_form)
    if not problems and adds_nothing(base, folder, task.auto_model):
        problems.append(f"the adapter {folder} adds nothing to the base: nothing to merge; was it fine-tuned?")
    _tell_idle(task, accept, found)
    return problems


def is_unreadable(folder: Path, auto_model: str) -> bool:
    """Whether a checkpoint's weights have other names than its model's, so that nothing else can be asked."""
    architecture = Architecture.of_folder(folder, auto_model)
    return naming_problem(architecture, architecture.checkpoint(folder)) is not None


def expert_facts(task: Task, folder: Path, base: Path, *, aligned: bool = False) -> Iterator[str]:
    """What is wrong with a whole checkpoint that a recipe names: its configuration, kind and head.

    Args:
        task: the task; ``expert.accept`` says what is meant.
        folder: folder of the checkpoint.
        base: folder of the base.
        aligned: whether its tokens get the base's numbers, so that numbers in its configuration may be others.

    Raises:
        PaveError: a configuration or a file cannot be read.
    """
    where, accept = f"task '{task.name}'", _accepted(task)
    incomplete = expert_problem(folder, task.auto_model)
    if incomplete is not None:
        yield f"{where}: {folder}: {incomplete}"
    yield from config_differences(task.name, base, folder, [*accept, *(NUMBERS if aligned else ())])
    found = {} if incomplete is not None else _unlike(task, folder, base)
    misfits = list(task.misfits(read_config(folder), read_json(folder / "config.json")))
    if incomplete is None:
        found |= {misfit.accept: misfit.message for misfit in misfits if misfit.accept is not None}
    yield from (
        f"{where}: {folder}: {problem}; set expert.accept: [{key}] if this is meant"
        for key, problem in found.items()
        if key not in accept
    )
    for misfit in misfits:
        if misfit.accept is None:
            yield f"{where}: {folder}: {misfit.message}"
    other = differences_in_function(read_config(base), read_config(folder))
    differing = {name for one in other for name in accept if one.accepted([name])}
    _tell_idle(task, accept, differing | set(found))


def _accepted(task: Task) -> Sequence[str]:
    return task.expert.accept if task.expert is not None else ()


def _tell_idle(task: Task, accept: Collection[str], differing: Collection[str]) -> None:
    idle = [name for name in accept if name not in differing]
    if idle:
        log.warning("task '%s': expert.accept names %s, of which nothing differs", task.name, listed(idle))


def _unlike(task: Task, folder: Path, base: Path) -> dict[str, str]:
    """What an expert is or says of itself that is not what the task asks, by the key that accepts it."""
    found, architecture = {}, Architecture.of_folder(folder, task.auto_model)
    other = architecture_problem(read_config(folder), architecture.model_class)
    if other is not None:
        found["architectures"] = other
    unused = unused_weights(architecture, architecture.checkpoint(folder))
    if unused:
        found["unused_weights"] = (
            f"it holds weights that a {architecture.model_class} has no place for ({listed(unused, 3)}), so it is "
            "another model, or has a head of its own"
        )
    if other is None and (changed := _changed(task, folder, base)):
        found["text_side"] = (
            f"its text side is not the base's ({listed(changed, 2)} differ), and classes are embedded by the base's"
        )
    return found


def _changed(task: Task, folder: Path, base: Path) -> list[str]:
    """Weights of an expert that the task never changes, and that differ from the base's all the same."""
    whole = Architecture.of_folder(base, task.auto_model)
    own, of_base = whole.checkpoint(folder).backbone, whole.checkpoint(base).backbone
    same = (name for name in own if name in of_base and lies_in(name, whole.frozen) and own[name].is_floating)
    pairs = ((name, Checkpoint.read(own[name]).float(), Checkpoint.read(of_base[name]).float()) for name in same)
    return [name for name, mine, its in pairs if not torch.equal(mine, its)]
