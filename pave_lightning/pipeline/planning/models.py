"""What is wrong with the base, with the experts that exist already, and with how others are to be trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from pave_lightning.errors import PaveError, Problems, nearest
from pave_lightning.experts.loading import base_problem
from pave_lightning.pipeline.planning.experts import adapter_facts, expert_facts, is_unreadable
from pave_lightning.pipeline.stages import existing_folder
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.kinds.tokens import TOKENS
from pave_lightning.tasks.options import Lora
from pave_lightning.tasks.task import Task
from pave_lightning.weights import Adapter, Architecture, Checkpoint, Parameter, ParameterKind, locate_model
from pave_lightning.weights.adapters import ADAPTER_CONFIG, adapter_folder
from pave_lightning.weights.completeness import naming_problem
from pave_lightning.weights.coverage import unmergeable
from pave_lightning.weights.task_vectors import absent_children, differences
from pave_lightning.weights.ties import tie_problems

log = logging.getLogger("pave_lightning")


def adapter_of(folder: Path) -> Path | None:
    """Where the adapter of a named expert lies: the folder itself where it is an adapter, or beside its weights."""
    return folder if (folder / ADAPTER_CONFIG).is_file() else adapter_folder(folder)


def is_wrapped(parameter: Parameter, lora: Lora) -> bool:
    """Whether LoRA with these options adapts the layer that owns a parameter, with that parameter as its weight."""
    if parameter.kind is not ParameterKind.LINEAR or not parameter.name.endswith(".weight"):
        return False
    return lora.target_modules == "all-linear" or any(is_named(parameter.layer, n) for n in lora.target_modules)


def is_named(layer: str, name: str) -> bool:
    """Whether a layer has that name, or a name that ends with it."""
    return layer == name or layer.endswith(f".{name}")


def check_models(recipe: Recipe, problems: Problems) -> None:
    """Check the base, the experts that exist already, and how the others are to be trained.

    Args:
        recipe: What is checked.
        problems: Is told everything that is wrong.

    Raises:
        PaveError: The base cannot be read, so that nothing else can be asked.
    """
    base_folder = locate_model(recipe.base, role="base")
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
    stored = {architecture.stored_names.get(name, name) for name in weights}
    foreign = sorted(name for name in stored if name not in architecture.parameters and not architecture.ignores(name))
    unset = [name for name in architecture.parameters if name not in stored]
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
    for task in recipe.tasks:
        limit = architecture.positions if task.reads_tokens else None
        if limit is not None and task.training.max_length > limit:
            problems.add(
                f"task '{task.name}': training.max_length is {task.training.max_length}, "
                f"but the base reads at most {limit} tokens"
            )
        meant = architecture.intended_positions if task.reads_tokens else None
        if limit is None and meant is not None and task.training.max_length > meant:
            log.warning(
                "task '%s': training.max_length is %d, but the base was made for at most %d tokens "
                "(max_position_embeddings); it may read longer texts badly",
                *(task.name, task.training.max_length, meant),
            )
        try:
            if task.expert is not None:
                problems.extend(_expert_problems(task, recipe.base, base, architecture))
            if task.expert is None or "joint" in recipe.controls:
                problems.extend(_training_problems(task, architecture))
        except PaveError as error:
            problems.add(str(error))


def _training_problems(task: Task, architecture: Architecture) -> Iterator[str]:
    layers = sorted({module for name in architecture.parameters for module in _ancestors(name)})
    for name in task.training.freeze:
        if name not in layers:
            yield f"task '{task.name}': training.freeze: no submodule '{name}'; {nearest(name, layers)}"
    lora = task.training.lora
    if lora is None:
        return
    adapted = [parameter for parameter in architecture.parameters.values() if is_wrapped(parameter, lora)]
    widest = max((min(parameter.matrix_shape) for parameter in adapted), default=lora.rank)
    if lora.rank > widest:
        yield (
            f"task '{task.name}': training.lora.rank is {lora.rank}, but no layer that it adapts has more than "
            f"{widest} directions; lower it"
        )
    if not isinstance(lora.target_modules, str):
        linear = [p.layer for p in architecture.parameters.values() if p.kind is ParameterKind.LINEAR]
        endings = sorted({layer.rpartition(".")[2] for layer in linear})
        for name in lora.target_modules:
            if not any(is_named(layer, name) for layer in linear):
                hint = nearest(name, endings)
                yield f"task '{task.name}': training.lora.target_modules: no linear layer '{name}'; {hint}"


def _ancestors(name: str) -> Iterator[str]:
    parts = name.split(".")[:-1]
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _expert_problems(task: Task, reference: str, base: Checkpoint, architecture: Architecture) -> Iterator[str]:
    """What is wrong with a checkpoint that a recipe names instead of training.

    Raises:
        PaveError: one more problem, the last.
    """
    folder = existing_folder(task)
    where = f"task '{task.name}'"
    if (folder / ADAPTER_CONFIG).is_file():
        problems = adapter_facts(task, folder, reference, base.folder)
        yield from (f"{where}: {problem}" for problem in problems)
        if not problems:
            Adapter(folder, architecture.prefix)  # tells what is wrong with its factors
        return
    own = Architecture.of_folder(folder, task.auto_model)
    expert = own.checkpoint(folder)
    yield from expert_facts(task, folder, base.folder)
    if is_unreadable(folder, task.auto_model):
        return
    yield from differences(task.name, base, expert, architecture)
    if expert.has_backbone_of(base):
        yield f"{where}: the backbone of {folder} is the base's, so there is nothing to merge; was it fine-tuned?"
    for name in expert.non_finite(absent_children(base, expert)):
        yield f"{where}: the weight {name} of {folder} holds NaN, infinity, or values too large for float32"
    beside = adapter_folder(folder)
    if beside is not None:
        Adapter(beside, architecture.prefix)  # tells what is wrong with its factors
