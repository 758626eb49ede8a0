"""What a run would do, stage by stage, and what purification and merging will take."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby

from rich import filesize
from rich.table import Table

from pave_lightning.config import WrittenDtype
from pave_lightning.errors import PaveError
from pave_lightning.experts.joint_schedule import common_freeze
from pave_lightning.merging import MergeMethod, make_method
from pave_lightning.pipeline.bases import folder_of_base
from pave_lightning.pipeline.costs import PredictedCost, expected_kinds, merging_bytes, predict_cost
from pave_lightning.pipeline.planning.memory import fit_bytes, later_bytes, search_bytes
from pave_lightning.pipeline.planning.merging import stored_parameters
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.pipeline.stacks import stacks_of
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages import EvaluateStage, ExportStage, MergeStage, PurifyStage, captures, stages_of
from pave_lightning.purification.vectors import workers_of
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.recipe.schema import Recipe
from pave_lightning.tasks.task import Task
from pave_lightning.weights import Architecture, Checkpoint, Parameter, written_dtype
from pave_lightning.weights.checkpoint import FLOATING


def plan_rows(recipe: Recipe, folder: RunFolder) -> list[tuple[str, str, str]]:
    """One row a stage: its name, whether its result is there, stale, damaged or to do, and what the stage does."""
    results = Results(recipe, folder)
    return [(stage.name, results.state(stage), stage.about()) for stage in _planned(results)]


def _planned(results: Results) -> list[Stage]:
    """The stages of a run; before the scores, what `pave purify` is left to do where a run does not purify."""
    found = stages_of(results)
    if _purifies_in_a_run(results.recipe):
        return found
    exported: list[ExportStage] = []
    with suppress(PaveError):  # told elsewhere, where it matters
        exported = [stage for stage in ExportStage.all(results) if not stage.options.changes_nothing]
    scored = next(place for place, stage in enumerate(found) if isinstance(stage, EvaluateStage))
    return [*found[:scored], *exported, *found[scored:]]


def _purifies_in_a_run(recipe: Recipe) -> bool:
    """Whether a run purifies by itself; otherwise `pave purify` does, and writes whole experts."""
    return bool(recipe.merge) or recipe.evaluate.purified_experts


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
    each = f" in each of {recipe.compute.processes} processes" if recipe.compute.processes > 1 else ""
    memory = ", ".join([*needs[:1], f"purifying and merging {merging}{each}", *needs[1:]])
    table.caption = (
        f"purification {cost.seconds:.1f} s; highest memory of {memory} (the program itself {program}); disk {disk}"
    )
    table.caption_justify = "left"
    return table


def added_memory(recipe: Recipe) -> dict[str, int]:
    """Bytes that training and scoring merged models take besides the program, at most; 0 for what is not done."""
    base_folder = folder_of_base(recipe)
    parameters = list(Architecture.of_folder(base_folder, *recipe.auto_models).parameters.values())
    trained = [fit_bytes(parameters, task) for task in recipe.tasks if task.expert is None]
    trained += [fit_bytes(parameters, task) for task in jointly_trained(recipe)]
    return {
        "training": max(trained, default=0),
        "scale search": search_bytes(parameters, stacks_of(recipe), recipe.tasks, recipe.evaluate.batch_size),
    }


def jointly_trained(recipe: Recipe) -> list[Task]:
    """The tasks that one model is trained on together, with what it leaves frozen; none where none is asked for."""
    if "joint" not in recipe.controls:
        return []
    frozen = {"freeze": common_freeze(recipe.tasks)}
    return [task.model_copy(update={"training": task.training.model_copy(update=frozen)}) for task in recipe.tasks]


def _written_bytes(base: Checkpoint, dtype: WrittenDtype) -> int:
    """What the backbone of a merged model takes on disk, of whose weights only the types differ from the base's."""
    stored = [tensor for tensor in base.backbone.values() if tensor.is_floating]
    return sum(tensor.size * written_dtype(dtype, FLOATING[tensor.dtype]).itemsize for tensor in stored)


def largest_method(step: MergeStep, parameters: Sequence[Parameter], tasks: int) -> MergeMethod:
    """A step's method with its options; of those that are still to be chosen the ones that need most memory."""
    methods = [make_method(step.method, options) for options in step.tuned_options]
    return max(methods, key=lambda method: merging_bytes(parameters, tasks, [method]))


def predicted_cost(recipe: Recipe, folder: RunFolder) -> PredictedCost:
    """Memory, time and disk that the recipe's purification and merging will take, from headers and small trials."""
    results = Results(recipe, folder)
    stages = _planned(results)
    base_folder = folder_of_base(recipe)
    architecture = Architecture.of_folder(base_folder, *recipe.auto_models)
    base = architecture.base_checkpoint(base_folder)
    parameters = list(stored_parameters(base, architecture))
    capture = recipe.capture
    merges = [stage for stage in stages if isinstance(stage, MergeStage) and not stage.weights_from]
    planned = [stage.options for stage in stages if isinstance(stage, PurifyStage | ExportStage)]
    kinds = expected_kinds(parameters, capture.moments, convolutions=capture.convolutions)
    exported = 0 if _purifies_in_a_run(recipe) else sum(len(one.tasks or recipe.tasks) for one in planned)
    found = predict_cost(
        parameters,
        len(recipe.tasks),
        workers_of(recipe.compute),
        kinds if captures(results) else {},
        options=planned,
        methods=[largest_method(merge.step, parameters, len(recipe.tasks)) for merge in merges],
        merged_bytes=[_written_bytes(base, merge.step.write.dtype) for merge in merges],
        when_read=[options for merge in merges for options in merge.stack.purified_when_read],
        new_experts=sum(task.expert is None for task in recipe.tasks) + exported + ("joint" in recipe.controls),
    )
    later = later_bytes()
    return replace(found, baseline_bytes=found.baseline_bytes + later, peak_bytes=found.peak_bytes + later)
