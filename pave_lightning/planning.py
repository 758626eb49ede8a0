"""Everything that can be known to be wrong before work begins, told at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pave_lightning.errors import PaveError, Problems, nearest
from pave_lightning.experts.loading import ADAPTER_CONFIG, load_tokenizer
from pave_lightning.experts.trainers import machine_options, trainer_problems
from pave_lightning.merging import make_method
from pave_lightning.recipe import MergeStep, Recipe, Task
from pave_lightning.run_folder import RunFolder
from pave_lightning.tasks.data import check_task, load_split
from pave_lightning.tracking import resolve_uri
from pave_lightning.weights import Architecture, Checkpoint, locate_model
from pave_lightning.weights.task_vectors import config_differences, differences
from pave_lightning.workflow import expert_stage, merged_stage, purified_stage, score_stage, statistics_stage


def check_recipe(recipe: Recipe, folder: RunFolder) -> None:
    """Check data, base, existing experts, trainer options, merge methods and tracking; run nothing.

    Raises:
        PaveError: lists everything that is wrong, up to 20 problems.
    """
    problems = Problems(f"recipe '{recipe.name}' cannot be run:")

    def attempt(check: Callable[[], object]) -> None:
        try:
            check()
        except PaveError as error:
            problems.add(str(error))

    for task in recipe.tasks:
        problems.extend(check_task(task, seed=recipe.seed, cache_dir=folder.root / "data"))
    distinct = {str(task.trainer): (f"tasks.{task.name}.trainer", task.trainer) for task in recipe.tasks}
    for where, options in {str(recipe.trainer): ("trainer", recipe.trainer), **distinct}.values():
        problems.extend(trainer_problems(options, where if options != recipe.trainer else "trainer"))
    for where, precision in (("capture", recipe.capture.precision), ("evaluate", recipe.evaluate.precision)):
        problems.extend(trainer_problems({**machine_options(recipe.trainer), "precision": precision}, where))
    attempt(partial(_check_models, recipe, problems))
    for step in recipe.merge:
        attempt(partial(_check_step, step))
    if recipe.merge and len(recipe.tasks) < 2:
        problems.add("merging needs at least two tasks; the recipe has one")
    attempt(partial(resolve_uri, recipe.tracking.uri))
    problems.raise_if_any()


def _check_step(step: MergeStep) -> None:
    method = make_method(step.method, step.options)
    if step.scale is not None and method.default_scale is None:
        raise PaveError(f"merge step '{step.name}': {step.method} has no scale; leave the key 'scale' out")


def _check_models(recipe: Recipe, problems: Problems) -> None:
    base_folder = locate_model(recipe.base, role="base")
    architecture = Architecture.of_folder(base_folder)
    base = Checkpoint(base_folder, architecture.prefix)
    load_tokenizer(base_folder)
    for name in base.non_finite():
        problems.add(f"base: the weight {name} holds NaN or infinity")
    layers = sorted({module for name in architecture.parameters for module in _ancestors(name)})
    for task in recipe.tasks:
        if task.expert is not None:
            try:
                problems.extend(_expert_problems(task, base, architecture))
            except PaveError as error:
                problems.add(str(error))
            continue
        for name in task.training.freeze:
            if name not in layers:
                problems.add(f"task '{task.name}': training.freeze: no submodule '{name}'; {nearest(name, layers)}")


def _ancestors(name: str) -> Iterator[str]:
    parts = name.split(".")[:-1]
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _expert_problems(task: Task, base: Checkpoint, architecture: Architecture) -> Iterator[str]:
    """What is wrong with a checkpoint that a recipe names instead of training."""
    reference = task.expert.from_ if task.expert is not None else ""
    folder = locate_model(reference, role=f"task '{task.name}'")
    if (folder / ADAPTER_CONFIG).is_file():
        return
    own = Architecture.of_folder(folder)
    expert = Checkpoint(folder, own.prefix)
    yield from config_differences(task.name, architecture, own)
    yield from differences(task.name, base, expert, own)
    outputs = len(own.config.get("id2label", {0: 0, 1: 1}))
    if outputs != task.outputs:
        yield f"task '{task.name}': the head of {folder} has {outputs} outputs, but the task needs {task.outputs}"
    if not expert.head:
        yield f"task '{task.name}': {folder} has no head; expected a fine-tuned sequence-classification model"
    for name in expert.non_finite():
        yield f"task '{task.name}': the weight {name} of {folder} holds NaN or infinity"
    load_tokenizer(folder)


def plan_rows(recipe: Recipe, folder: RunFolder) -> list[tuple[str, str, str]]:
    """One row a stage: its name, whether its result is there, and what it will do."""
    rows = []

    def add(stage: str, what: str) -> None:
        rows.append((stage, "there" if folder.manifest(stage) is not None else "to do", what))

    for task in recipe.tasks:
        add(expert_stage(task), _fit_summary(recipe, task, folder.root / "data"))
    for task in recipe.tasks:
        add(statistics_stage(task), f"{recipe.capture.examples} training examples")
    purified = {purified_stage(step.purify): step.purify for step in recipe.merge if "purified" in step.vectors}
    for stage, options in purified.items():
        add(stage, f"rho {options.rho:g}, {options.metric}, {options.allocation} allocation")
    for step in recipe.merge:
        for vectors in step.vectors:
            scale = (
                "" if step.scale is None else f", scale {step.scale if isinstance(step.scale, float) else 'searched'}"
            )
            add(merged_stage(step, vectors), f"{step.method}{scale}")
    scored = [score_stage(step, vectors) for step in recipe.merge for vectors in step.vectors]
    for stage in ["scores/base", "scores/experts", *scored]:
        add(stage, "all test splits")
    return rows


def _fit_summary(recipe: Recipe, task: Task, cache: Path) -> str:
    if task.expert is not None:
        return f"from {task.expert.from_}"
    rows = len(load_split(task, "train", seed=recipe.seed, cache_dir=cache))
    epochs = task.trainer.get("max_epochs", 3)
    steps = math.ceil(rows / task.training.batch_size) * epochs
    return f"{rows} rows, {epochs} epochs, {steps} steps of {task.training.batch_size}"
