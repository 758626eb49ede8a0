"""What a run would do, stage by stage, and what purification and merging will take."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from rich import filesize
from rich.table import Table

from pave_lightning.errors import PaveError
from pave_lightning.merging import method_named
from pave_lightning.pipeline.costs import Cost, expected_kinds, predict_cost
from pave_lightning.pipeline.planning.memory import fit_bytes, later_bytes, search_bytes
from pave_lightning.pipeline.planning.merging import stored_parameters
from pave_lightning.pipeline.planning.training import planned_schedule
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.pipeline.stages import Stage, Stages, purifications, ratios
from pave_lightning.purification.options import Purify
from pave_lightning.purification.vectors import workers_of
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.constants import constant_answer
from pave_lightning.tasks.task import Task
from pave_lightning.weights import Architecture, locate_model


def plan_rows(recipe: Recipe, folder: RunFolder) -> list[tuple[str, str, str]]:
    """One row a stage: its name, whether its result is there, stale, damaged or to do, and what the stage does.

    Of experts it says what always the same answer scores on the validation split, which they have to surpass.
    """
    stages, about = Stages(recipe, folder), {}
    for task in recipe.tasks:
        about[stages.expert(task).name] = _fit_summary(recipe, task, folder.data)
        shown = "training example" if recipe.capture.source == "train" else "sequence"
        of = "" if recipe.capture.source == "train" else " of random tokens"
        about[stages.statistics(task).name] = f"{_counted(recipe.capture.examples, shown)}{of}"
    for options in _planned_purifications(stages):
        about[stages.purified(options).name] = options.summary
        about[stages.exported(options).name] = f"{options.summary}, with `pave purify`"
    for step, vectors in stages.merges():
        scale = "" if step.scale is None else f", scale {step.scale if isinstance(step.scale, float) else 'searched'}"
        about[stages.merged(step, vectors).name] = f"{step.method}{scale}"
    planned = _planned_stages(stages)
    return [(stage.name, stages.state(stage), about.get(stage.name, "all test splits")) for stage in planned]


def _planned_stages(stages: Stages) -> list[Stage]:
    """The stages of a run; before the scores, what `pave purify` is left to do where a run does not purify."""
    found = list(stages.all())
    if _purifies_in_a_run(stages.recipe):
        return found
    scored = next(place for place, stage in enumerate(found) if stage.name.startswith("scores/"))
    return [*found[:scored], *map(stages.exported, _planned_purifications(stages)), *found[scored:]]


def _purifies_in_a_run(recipe: Recipe) -> bool:
    """Whether a run purifies by itself; otherwise `pave purify` does, and writes whole experts."""
    return bool(recipe.merge) or recipe.evaluate.purified_experts


def _planned_purifications(stages: Stages) -> list[Purify]:
    """Every distinct purification that is to be computed; what merges nothing may be meant for `pave purify`."""
    recipe = stages.recipe
    asked = [step.purify for step, vectors in stages.merges() if vectors == "purified"]
    if recipe.evaluate.purified_experts or not recipe.merge:
        with suppress(PaveError):  # told elsewhere, where it matters
            asked += purifications(recipe)
    return list(dict.fromkeys(one for options in asked for one in ratios(options)))


def cost_table(recipe: Recipe, folder: RunFolder) -> Table:
    """What purification and merging will take: time for each shape of layer, the highest memory, disk."""
    cost = predicted_cost(recipe, folder)
    table = Table(title="purification, by shape of layer (predicted)", title_justify="left")
    for heading in ("purification", "d_out x d_in", "moment", "layers", "tasks", "time", "memory"):
        left = heading in ("purification", "d_out x d_in", "moment")
        table.add_column(heading, justify="left" if left else "right")
    for options, layers in groupby(cost.layers, key=lambda layer: layer.options):
        for place, layer in enumerate(layers):
            shape, moment = " x ".join(map(str, layer.shape)), layer.kind or "none"
            counts = (str(layer.layers), str(layer.tasks))
            sizes = (f"{layer.seconds:.1f} s", filesize.decimal(layer.peak_bytes))
            table.add_row("" if place else options.summary, shape, moment, *counts, *sizes)
        table.add_section()
    program, merging, disk = map(filesize.decimal, (cost.baseline_bytes, cost.peak_bytes, cost.disk_bytes))
    needs = [
        f"{what} {filesize.decimal(cost.baseline_bytes + size)}" for what, size in added_memory(recipe).items() if size
    ]
    memory = ", ".join([*needs[:1], f"purifying and merging {merging}", *needs[1:]])
    table.caption = (
        f"purification {cost.seconds:.1f} s; highest memory of {memory} (the program itself {program}); disk {disk}"
    )
    table.caption_justify = "left"
    return table


def added_memory(recipe: Recipe) -> dict[str, int]:
    """Bytes that training and scoring merged models take besides the program, at most; 0 for what is not done."""
    base_folder = locate_model(recipe.base, role="base")
    parameters = list(Architecture.of_folder(base_folder, *recipe.auto_models).parameters.values())
    trained = [fit_bytes(parameters, task) for task in recipe.tasks if task.expert is None]
    return {
        "training": max(trained, default=0),
        "scale search": search_bytes(parameters, recipe.merge, recipe.tasks, recipe.evaluate.batch_size),
    }


def predicted_cost(recipe: Recipe, folder: RunFolder) -> Cost:
    """Memory, time and disk that the recipe's purification and merging will take, from headers and small trials."""
    stages = Stages(recipe, folder)
    base_folder = locate_model(recipe.base, role="base")
    architecture = Architecture.of_folder(base_folder, *recipe.auto_models)
    parameters = list(stored_parameters(architecture.base_checkpoint(base_folder), architecture))
    capture, planned = recipe.capture, _planned_purifications(stages)
    kinds = expected_kinds(parameters, capture.moments, convolutions=capture.convolutions)
    exported = 0 if _purifies_in_a_run(recipe) else sum(len(one.tasks or recipe.tasks) for one in planned)
    found = predict_cost(
        parameters,
        len(recipe.tasks),
        workers_of(recipe.compute),
        kinds if stages.need_statistics() else {},
        options=planned,
        methods=[method_named(step.method) for step, _ in stages.merges()],
        new_experts=sum(task.expert is None for task in recipe.tasks) + exported,
    )
    later = later_bytes()
    return replace(found, baseline_bytes=found.baseline_bytes + later, peak_bytes=found.peak_bytes + later)


def _fit_summary(recipe: Recipe, task: Task, cache: Path) -> str:
    constant = constant_answer(task, "validation", seed=recipe.seed, cache_dir=cache)[task.primary_metric]
    told = f"; always the same answer: {task.primary_metric} {constant:.3f}"
    if task.expert is not None:
        return f"from {task.expert.from_}{told}"
    rows, schedule = planned_schedule(task, recipe.seed, cache)
    epochs, steps = _counted(schedule.epochs, "epoch"), _counted(schedule.steps, "step")
    return f"{_counted(rows, 'row')}, {'at most ' * schedule.at_most}{epochs}, {steps} of {schedule.batch}{told}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
