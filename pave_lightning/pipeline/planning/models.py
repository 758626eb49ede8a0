"""What is wrong with the base, with the experts that exist already, and with how others are to be trained."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pave_lightning.errors import PaveError, Problems, counted, listed, naming, nearest
from pave_lightning.experts.alignment import output_tables
from pave_lightning.experts.loading import base_problem
from pave_lightning.experts.parts import is_part, part_problems
from pave_lightning.experts.strategies import shards
from pave_lightning.experts.trainer_options import machine_options
from pave_lightning.pipeline.bases import existing_folder, folder_of_base, reference_of_base
from pave_lightning.pipeline.planning.experts import adapter_facts, expert_facts, is_unreadable
from pave_lightning.pipeline.planning.lora import lora_problems
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.kinds.tokens import TOKENS
from pave_lightning.tasks.lora import module_names
from pave_lightning.tasks.task import Task
from pave_lightning.weights import Adapter, Architecture, Checkpoint
from pave_lightning.weights.adapters import ADAPTER_CONFIG, adapter_folder
from pave_lightning.weights.checkpoint import passed_over, weight_files
from pave_lightning.weights.completeness import naming_problem
from pave_lightning.weights.configuration import differences_in_function
from pave_lightning.weights.coverage import unmergeable
from pave_lightning.weights.empty_models import empty_model, read_config
from pave_lightning.weights.task_vectors import absent_children, differences
from pave_lightning.weights.ties import tie_problems

log = logging.getLogger("pave_lightning")


def adapter_of(folder: Path) -> Path | None:
    """Where the adapter of a named expert lies: the folder itself where it is an adapter, or beside its weights."""
    return folder if (folder / ADAPTER_CONFIG).is_file() else adapter_folder(folder)


def check_models(recipe: Recipe, problems: Problems) -> None:
    """Check the base, the experts that exist already, and how the others are to be trained.

    Args:
        recipe: What is checked.
        problems: Is told everything that is wrong.

    Raises:
        PaveError: The base cannot be read, so that nothing else can be asked.
    """
    base_folder = folder_of_base(recipe)
    with naming("base"):
        of_kinds = [Architecture.of_folder(base_folder, name) for name in recipe.auto_models]
    if len({one.backbone_class for one in of_kinds}) > 1:
        found = ", ".join(f"{one.model_class} on {one.backbone_class}" for one in of_kinds)
        raise PaveError(
            f"base: the tasks' models are built on different backbones ({found}), so they cannot share one; "
            "give tasks of different kinds recipes of their own"
        )
    architecture = Architecture.of_folder(base_folder, *recipe.auto_models)
    base = architecture.base_checkpoint(base_folder)
    unnamed = naming_problem(architecture, architecture.base_checkpoint(base_folder))
    if unnamed is not None:
        raise PaveError(f"base: {unnamed}")
    if architecture.main_input == TOKENS and not architecture.takes_mask:
        problems.add(
            f"base: {architecture.model_class} takes no attention mask, so it would read padding as text and its "
            "scores would depend on the batch; such architectures are not supported yet"
        )
    weights = [
        name for name, stored in base.backbone.items() if stored.is_floating and name not in architecture.buffers
    ]
    foreign = sorted(name for name in weights if not architecture.knows(name) and not architecture.ignores(name))
    unset = [name for name in architecture.parameters if architecture.stored_for(name).isdisjoint(weights)]
    unset = [name for name in unset if name not in base.backbone]
    if foreign and unset:
        problems.add(
            f"base: {architecture.config.get('model_type')} stores weights in other pieces than the model has "
            f"({foreign[0]}, for {unset[0]} and the like); such architectures are not supported yet"
        )
    else:
        incomplete = next(filter(None, (base_problem(base_folder, one) for one in of_kinds)), None)
        if incomplete is not None:
            problems.add(f"base: {incomplete}")
    problems.extend(f"base: {problem}" for problem in (*tie_problems(base), *unmergeable(base, architecture)))
    config = read_config(base_folder)
    unfit = {task.name: task.base_problem(config) for task in recipe.tasks}
    whose = f"the base's {architecture.backbone_class}"
    problems.extend(f"task '{name}': {whose} {why}" for name, why in unfit.items() if why is not None)
    trained = [task for task in recipe.tasks if task.expert is None or "joint" in recipe.controls]
    for task in recipe.tasks:
        _warn_of_length(task, architecture)
        if task.expert is not None:
            with noting(problems, task):
                problems.extend(_expert_problems(task, recipe, base, architecture))
    trainings = Problems("")
    for task in recipe.tasks:
        trainings.extend(_length_problems(task, architecture))
        if task in trained:
            with noting(trainings, task):
                trainings.extend(_training_problems(task, architecture, base_folder))
    # Tasks that share a training section have the same problems.
    problems.extend(of_several_tasks(trainings.messages))


@contextmanager
def noting(problems: Problems, task: Task) -> Iterator[None]:
    """Note what is raised as one more problem of a task."""
    try:
        yield
    except PaveError as error:
        told = str(error)
        problems.add(told if told.startswith("task ") else f"task '{task.name}': {told}")


def of_several_tasks(messages: Iterable[str]) -> list[str]:
    """Problems of single tasks, those that several tasks have told once.

    Example:
        >>> of_several_tasks(["task 'a': no layer 'q'", "task 'a': no layer 'v'", "task 'b': no layer 'q'"])
        ["tasks 'a', 'b': no layer 'q'", "task 'a': no layer 'v'"]
    """
    owners: dict[str, list[str]] = {}
    for message in messages:
        owner, _, problem = message.partition(": ")
        owners.setdefault(problem, []).append(owner.removeprefix("task "))
    return [f"task{'s' * (len(names) > 1)} {listed(names, 5)}: {problem}" for problem, names in owners.items()]


def _length_problems(task: Task, architecture: Architecture) -> Iterator[str]:
    limit = architecture.positions if task.reads_tokens else None
    if limit is not None and task.training.max_length > limit:
        yield (
            f"task '{task.name}': training.max_length is {task.training.max_length}, but the base reads at most "
            f"{limit} tokens"
        )


def _warn_of_length(task: Task, architecture: Architecture) -> None:
    meant = architecture.intended_positions if task.reads_tokens and architecture.positions is None else None
    if meant is not None and task.training.max_length > meant:
        log.warning(
            "task '%s': training.max_length is %d, but the base was made for at most %d tokens "
            "(max_position_embeddings); it may read longer texts badly",
            *(task.name, task.training.max_length, meant),
        )


def weight_notes(recipe: Recipe) -> Iterator[str]:
    """Of models that hold their weights more than once which file is read, for a recipe in which nothing is wrong."""
    folders = {folder_of_base(recipe): "base"}
    for task in recipe.tasks:
        if task.expert is not None:
            folders.setdefault(existing_folder(task), f"task '{task.name}'")
    for folder, role in folders.items():
        if (folder / ADAPTER_CONFIG).is_file():
            continue
        others = passed_over(folder)
        if others:
            first, *more = [file.name for file in weight_files(folder)]
            read = f"{first} and {counted(len(more), 'shard')} more are read" if more else f"{first} is read"
            yield f"{role}: {folder} holds weights in other files, too: {read}, {listed(others, 3)} not"


def _training_problems(task: Task, architecture: Architecture, base: Path) -> Iterator[str]:
    layers = module_names(architecture.parameters.values())
    for name in task.training.freeze:
        if name not in layers:
            yield f"task '{task.name}': training.freeze: no submodule '{name}'; {nearest(name, layers)}"
    if task.training.activation_checkpointing:
        model: Any = empty_model(base, task.auto_model)
        if not model.supports_gradient_checkpointing:
            yield (
                f"task '{task.name}': training.activation_checkpointing: transformers cannot recompute the activations "
                f"of a {type(model).__name__}; set it to false"
            )
    if task.training.lora is not None:
        yield from lora_problems(task, task.training.lora, architecture, base)


def _expert_problems(task: Task, recipe: Recipe, base: Checkpoint, architecture: Architecture) -> Iterator[str]:
    """What is wrong with a checkpoint that a recipe names instead of training.

    Raises:
        PaveError: one more problem, the last.
    """
    folder = existing_folder(task)
    where = f"task '{task.name}'"
    if (folder / ADAPTER_CONFIG).is_file():
        problems = adapter_facts(task, folder, str(reference_of_base(recipe)), base.folder)
        yield from (f"{where}: {problem}" for problem in problems)
        if not problems:
            Adapter(folder, architecture.prefix)  # tells what is wrong with its factors
        return
    if is_part(folder, base.folder, task.auto_model):
        yield from (f"{where}: {problem}" for problem in part_problems(task, folder, base.folder))
        return
    own = Architecture.of_folder(folder, task.auto_model)
    expert = own.checkpoint(folder)
    yield from expert_facts(task, folder, base.folder, aligned=recipe.vocabulary != "error")
    if is_unreadable(folder, task.auto_model):
        return
    matched = [] if recipe.vocabulary == "error" else output_tables(empty_model(folder, task.auto_model))
    yield from differences(
        *(task.name, base, expert, architecture), matched=[name.removeprefix(own.start) for name in matched]
    )
    different = differences_in_function(read_config(base.folder), read_config(folder))
    if different and shards(machine_options(recipe.trainer)):
        keys = listed([one.key for one in different], 3)
        yield (
            f"{where}: trainer.strategy: {folder} computes with a configuration of its own ({keys}), which cannot be "
            "scored with divided weights; use strategy: ddp, or a single device"
        )
    if expert.has_backbone_of(base):
        yield f"{where}: the backbone of {folder} is the base's, so there is nothing to merge; was it fine-tuned?"
    for name in expert.non_finite(absent_children(base, expert)):
        yield f"{where}: the weight {name} of {folder} holds NaN, infinity, or values too large for float32"
    beside = adapter_folder(folder)
    if beside is not None:
        Adapter(beside, architecture.prefix)  # tells what is wrong with its factors
