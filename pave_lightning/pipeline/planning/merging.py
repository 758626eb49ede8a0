"""What is wrong with the merge steps and transforms of a recipe, whatever its experts will be."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache, partial

from pave_lightning.errors import PaveError
from pave_lightning.merging import MergeMethod, Need, is_selected, make_method, method_named
from pave_lightning.merging.evidence import PlannedEvidence
from pave_lightning.merging.low_rank import LowRankMethod, quoted
from pave_lightning.merging.selection import selection_problems
from pave_lightning.merging.stacks import as_method_sees
from pave_lightning.pipeline.bases import existing_folder, folder_of_base
from pave_lightning.pipeline.planning.blocks import block_problem, naming_problems
from pave_lightning.pipeline.planning.models import adapter_of
from pave_lightning.pipeline.providers import known_providers
from pave_lightning.pipeline.purifications import purifications
from pave_lightning.pipeline.stacks import stack_of, transform_problem
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.recipe.schema import Recipe
from pave_lightning.statistics import Moments
from pave_lightning.tasks.lora import adapter_ranks
from pave_lightning.tasks.task import Task
from pave_lightning.transforms import Transform
from pave_lightning.transforms.pave import Pave
from pave_lightning.weights import Adapter, Architecture, Checkpoint, Parameter
from pave_lightning.weights.adapters import ADAPTER_CONFIG, ADAPTER_FOLDER
from pave_lightning.weights.backbones import lies_in
from pave_lightning.weights.task_vectors import (
    PlannedTaskVectors,
)

# Of what a method says of every matrix of a model, a few lines show as much as all of them.
SHOWN_OF_A_METHOD = 4
TRAINED_WHOLE = "they are trained whole; set training.lora"


def merge_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the merge steps and transforms of a recipe, whatever its experts will be."""
    architecture: Architecture | None = None
    parameters: list[Parameter] = []
    try:
        folder = folder_of_base(recipe)
        architecture = Architecture.of_folder(folder, *recipe.auto_models)
        parameters = list(stored_parameters(architecture.base_checkpoint(folder), architecture))
    except PaveError:  # told elsewhere; what can be said without is said
        pass
    vectors = _planned_vectors(recipe, parameters, architecture)
    evidence = PlannedEvidence()
    if parameters:
        first = recipe.tasks[0]
        problem = partial(block_problem, folder, first.auto_model, first.model_inputs)
        evidence = PlannedEvidence(block_problem=cache(problem))
        names = [parameter.name for parameter in parameters]
        yield from naming_problems(recipe, folder, names)
    for step in recipe.merge:
        try:
            yield from _step_problems(step, recipe, vectors, evidence)
        except PaveError as error:
            yield str(error)
    yield from _transform_problems(recipe, vectors)


def stored_parameters(base: Checkpoint, architecture: Architecture) -> Iterator[Parameter]:
    """The parameters that experts of a base will share with it."""
    for name, stored in sorted(base.backbone.items()):
        if architecture.knows(name) and stored.is_floating and not lies_in(name, architecture.frozen):
            yield architecture.describe(name, stored.shape)


def _planned_vectors(
    recipe: Recipe, parameters: Sequence[Parameter], architecture: Architecture | None
) -> PlannedTaskVectors:
    """What is known of the task vectors before there are experts."""
    ranks: dict[str, Mapping[str, int] | str] = {}
    unknown = not parameters
    for task in recipe.tasks:
        try:
            ranks[task.name] = _ranks(task, parameters, "" if architecture is None else architecture.prefix)
        except PaveError:  # told elsewhere
            ranks[task.name], unknown = {}, True
    if unknown:  # ranks of some adapters must not be compared with nothing
        ranks = {task: found if isinstance(found, str) else {} for task, found in ranks.items()}
    return PlannedTaskVectors(parameters, ranks)


def _ranks(task: Task, parameters: Sequence[Parameter], prefix: str) -> Mapping[str, int] | str:
    """The rank of each layer that a task's expert will have an adapter of, or why it will have none."""
    if task.expert is None:
        lora = task.training.lora
        if lora is None:
            return TRAINED_WHOLE
        if lora.use_dora:
            return "they are trained with use_dora, which rescales the updated weights"
        factor = 2 if lora.changes_the_base else 1  # the difference from the start is written
        ranks = adapter_ranks(lora, parameters, prefix, task.training.freeze)
        return {layer: factor * rank for layer, rank in ranks.items()}
    folder = existing_folder(task)
    where = adapter_of(folder)
    if where is None:
        return f"{folder} holds no adapter (looked for {ADAPTER_FOLDER}/{ADAPTER_CONFIG})"
    adapter = Adapter(where, prefix)
    return adapter.refusal or {layer: found.rank for layer, found in adapter.layers.items()}


def _step_problems(
    step: MergeStep, recipe: Recipe, vectors: PlannedTaskVectors, evidence: PlannedEvidence
) -> Iterator[str]:
    where = f"merge step '{step.name}'"
    kind = method_named(step.method)
    methods, refusals = _made(step)
    yield from refusals
    wanted = {need for method in methods for need in method.wanted}
    if step.scale is not None and kind.default_scale is None:
        yield f"{where}: {step.method} has no scale; leave the key 'scale' out"
    for need, provider in known_providers().items():
        yield from (f"{where}: {problem}" for problem in provider().problems(step, recipe, needed=need in wanted))
    yield from (
        f"{where}: parameters.{problem}"
        for problem in selection_problems(vectors.parameters, step.parameters.include, step.parameters.exclude)
    )
    vectors = vectors.of(
        p for p in vectors.parameters if is_selected(p.name, step.parameters.include, step.parameters.exclude)
    )
    if methods and len(recipe.tasks) > 1:
        yield from (f"{where}: {problem}" for problem in _request_problems(methods, wanted, vectors, evidence))
    sizes = {method.batch_size for method in methods} if kind.batched else ()
    for size in sorted(found for found in sizes if found > recipe.capture.batch_size):
        yield (
            f"{where}: batch_size {size} is more than the {recipe.capture.batch_size} examples that are loaded at a "
            "time; lower it or raise capture.batch_size"
        )


def option_problems(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What is wrong with merge methods, transforms and their options, whatever else the recipe says.

    Args:
        recipe: what is left of a recipe, in which other things are wrong.

    Yields:
        The keys that lead to a merge step, or to an entry of a stack, and what is wrong with it.
    """
    for index, step in enumerate(recipe.merge):
        yield from ((("merge", index), problem) for problem in _made(step)[1])
    for name in recipe.vectors:
        steps: list[MergeStep | None] = [step for step in recipe.merge if name in step.vectors]
        for place in range(len(recipe.vectors[name])):
            told = dict.fromkeys(transform_problem(recipe, name, place, step) for step in steps or [None])
            yield from ((("vectors", name, place), problem) for problem in told if problem is not None)


def _made(step: MergeStep) -> tuple[list[MergeMethod], list[str]]:
    """A step's method with each of the options that are tried, and what is wrong with the others."""
    methods: list[MergeMethod] = []
    refusals: dict[str, None] = {}
    for options in step.tuned_options:
        try:
            methods.append(make_method(step.method, options))
        except PaveError as error:
            refusals[str(error)] = None
    return methods, list(refusals)


def _request_problems(
    methods: Sequence[MergeMethod], wanted: Collection[Need], vectors: PlannedTaskVectors, evidence: PlannedEvidence
) -> Iterator[str]:
    """What one method, with each of the options that are tried, has against these tasks, layers and adapters."""
    lacking = list(_missing_adapters(methods[0], wanted, vectors))
    yield from lacking
    if lacking:  # or else it would be told again for each layer
        vectors = PlannedTaskVectors(vectors.parameters, dict.fromkeys(vectors.tasks, "told already"))
    told: dict[str, None] = {}
    for method in methods:
        try:
            told.update(dict.fromkeys(method.problems(as_method_sees(method, vectors), evidence)))
        except RuntimeError:  # it looks at values, as a method of another package may do: it tells when it is run
            continue
    yield from list(told)[:SHOWN_OF_A_METHOD]
    if len(told) > SHOWN_OF_A_METHOD:
        yield f"... and {len(told) - SHOWN_OF_A_METHOD} more like these"


def _missing_adapters(method: MergeMethod, wanted: Collection[Need], vectors: PlannedTaskVectors) -> Iterator[str]:
    """Tasks whose experts have no adapters although the method merges adapters, one line a reason."""
    lacking: dict[str, list[str]] = {}
    for task in vectors.tasks:
        reason = vectors.without_factors(task)
        if reason is not None:
            lacking.setdefault(reason, []).append(task)
    if Need.LOW_RANK not in wanted:
        # Others find factors of their own in checkpoints of low rank; training whole weights leaves no low rank. Where
        # only some tasks have adapters, the method itself tells it.
        without = sum(map(len, lacking.values())) == len(vectors.tasks)
        known = isinstance(method, LowRankMethod) and without
        lacking = {reason: tasks for reason, tasks in lacking.items() if known and reason == TRAINED_WHOLE}
    for reason, tasks in lacking.items():
        yield f"{method.name} merges low-rank adapters, but the experts of {quoted(tasks)} have none: {reason}"


def _transform_problems(recipe: Recipe, vectors: PlannedTaskVectors) -> Iterator[str]:
    """What is wrong with the transforms of task vectors, of stacks that no merge step uses as well."""
    purified = recipe.evaluate.purified_experts
    if purified:
        try:
            purifications(recipe)
        except PaveError as error:
            yield f"evaluate.purified_experts: {error}"
    used = [(name, step) for step in recipe.merge for name in step.vectors]
    known = {name for name, _ in used}
    others = [*recipe.vectors, *(["purified"] if purified else [])]
    told: set[tuple[str, str, bool]] = set()
    for name, step in [*used, *((name, None) for name in others if name not in known)]:
        try:
            stack = stack_of(recipe, name, step)
        except PaveError as error:
            yield str(error)
            continue
        placed = zip(stack.transforms, stack.places, stack.inherited, strict=True)
        for index, (transform, place, section) in enumerate(placed):
            what = (transform.name, transform.options.model_dump_json(), index > 0)
            if what not in told:
                told.add(what)
                own = step is not None and transform.options != getattr(recipe, section, None)
                where = f"merge.{step.name}.{section}" if step and own else section
                found = [*_capture_problems(transform, index > 0, recipe.capture.moments), *transform.problems(vectors)]
                where = where if section and not index else place
                yield from (f"{where}: {problem}" for problem in found)


def _capture_problems(transform: Transform, changed: bool, moments: Moments) -> Iterator[str]:
    """What a purification, behind another transform or not, needs of what is captured."""
    if not isinstance(transform, Pave) or not transform.options.reads_statistics:
        return
    what, metric = transform.options.needs_inputs, transform.options.metric
    if not what and Need.INPUT_MOMENTS in transform.wanted(changed=changed):
        what = "pave behind another transform"
    if what and moments != "input":
        yield f"{what} needs the second moments of all inputs; set capture.moments: input"
    if moments == "output" and metric != "root":
        yield f"capture.moments: output serves the metric root alone, found {metric}"
