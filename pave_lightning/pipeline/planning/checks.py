"""Everything that can be known to be wrong before work begins, told at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from pave_lightning.errors import PaveError, Problems, counted
from pave_lightning.experts.trainer_options import machine_options, trainer_problems
from pave_lightning.pipeline.planning.benchmarks import benchmark_problems
from pave_lightning.pipeline.planning.heads import head_problems, score_folder_problems
from pave_lightning.pipeline.planning.joint import joint_problems
from pave_lightning.pipeline.planning.merging import merge_problems
from pave_lightning.pipeline.planning.models import check_models
from pave_lightning.pipeline.planning.tokenised import tokenised_problems
from pave_lightning.pipeline.planning.tokens import token_problems
from pave_lightning.pipeline.planning.training import schedule_problems
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.recipe.schema import Recipe
from pave_lightning.system.keeping import keeping
from pave_lightning.tasks.data import check_task
from pave_lightning.tracking import resolve_uri


def check_recipe(
    recipe: Recipe,
    folder: RunFolder,
    *,
    computes: bool = True,
    evaluates: bool = False,
    allow_code: bool | None = None,
) -> None:
    """Check data, base, existing experts, trainer options, merge methods and tracking; run nothing.

    Args:
        recipe: What is checked.
        folder: Its run folder.
        computes: Whether this machine is to compute; a report of what another one computed needs no devices of its own.
        evaluates: Whether models are to be scored, now or later, so that benchmarks must be there.
        allow_code: Whether benchmarks may run code; None where they are not to be scored now.

    Raises:
        PaveError: lists everything that is wrong, up to 20 problems.
    """
    with keeping():
        problems = _problems(recipe, folder, computes=computes)
        if evaluates:
            problems.extend(benchmark_problems(Results(recipe, folder), allow_code=allow_code))
        problems.raise_if_any()


def _problems(recipe: Recipe, folder: RunFolder, *, computes: bool) -> Problems:
    problems = Problems(f"recipe '{recipe.name}' cannot be run:")

    def attempt(check: Callable[[], object]) -> None:
        try:
            check()
        except PaveError as error:
            problems.add(str(error))

    for task in recipe.tasks:
        problems.extend(check_task(task, seed=recipe.seed, cache_dir=folder.data))
    if computes:
        problems.extend(_machine_problems(recipe))
        problems.extend(schedule_problems(recipe, folder.data))
        problems.extend(joint_problems(recipe, folder.data))
    problems.extend(head_problems(recipe, folder.data))
    problems.extend(score_folder_problems(Results(recipe, folder)))
    attempt(partial(check_models, recipe, problems))
    attempt(lambda: problems.extend(tokenised_problems(recipe, folder)))
    problems.extend(token_problems(recipe))
    problems.extend(merge_problems(recipe))
    if recipe.merge and len(recipe.tasks) < 2:
        problems.add("merging needs at least two tasks; the recipe has one: add a task, or remove the key merge")
    attempt(partial(resolve_uri, recipe.tracking.uri))
    return problems


def _machine_problems(recipe: Recipe) -> Iterator[str]:
    """Why this machine cannot train, capture, purify or evaluate as the recipe says."""
    distinct = {str(task.trainer): (f"tasks.{task.name}.trainer", task.trainer) for task in recipe.tasks}
    for where, options in {str(recipe.trainer): ("trainer", recipe.trainer), **distinct}.values():
        yield from trainer_problems(options, where if options != recipe.trainer else "trainer")
    machine = machine_options(recipe.trainer)
    asked = {"capture": recipe.capture.precision, "evaluate": recipe.evaluate.precision}
    for where, precision in asked.items() if not trainer_problems(machine, "trainer") else ():
        yield from trainer_problems({**machine, "precision": precision}, where)
    yield from _device_problems(recipe.compute.device)


def _device_problems(device: str) -> Iterator[str]:
    """Why there is no such device."""
    kind, _, number = device.partition(":")
    cards = torch.cuda.device_count() if kind == "cuda" else 0
    if kind == "cuda" and not cards:
        yield f"compute.device is {device}, but PyTorch finds no graphics card that it can use; set it to cpu"
    elif number and int(number) >= cards:
        yield f"compute.device is {device}, but PyTorch finds {counted(cards, 'graphics card')}, numbered from 0"
    if kind == "mps" and not torch.backends.mps.is_available():
        yield "compute.device is mps, but PyTorch finds no such device on this machine; set it to cpu"
