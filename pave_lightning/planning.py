"""Everything that can be known to be wrong before work begins, told at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from rich import filesize
from rich.table import Table

from pave_lightning.costs import Cost, expected_kinds, predict_cost
from pave_lightning.errors import PaveError, Problems, nearest
from pave_lightning.experts.fitting import DEFAULT_EPOCHS
from pave_lightning.experts.loading import adapter_problems, load_tokenizer
from pave_lightning.experts.trainers import machine_options, trainer_problems
from pave_lightning.merging import MergeMethod, Need, make_method, method_named
from pave_lightning.merging.evidence import PlannedEvidence
from pave_lightning.merging.low_rank import LowRankMethod, quoted
from pave_lightning.purification.vectors import budget_problems, workers_of
from pave_lightning.recipe import Lora, MergeStep, Purify, Recipe, Task
from pave_lightning.run_folder import RunFolder
from pave_lightning.stages import Stage, Stages, existing_folder, purifications, ratios
from pave_lightning.tasks.data import check_task, load_split
from pave_lightning.tracking import resolve_uri
from pave_lightning.weights import Adapter, Architecture, Checkpoint, Parameter, ParameterKind, locate_model
from pave_lightning.weights.adapters import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS, adapter_folder
from pave_lightning.weights.architecture import lies_in
from pave_lightning.weights.checkpoint import stored_tensors
from pave_lightning.weights.task_vectors import (
    PlannedTaskVectors,
    absent_children,
    config_differences,
    differences,
)

# Of what a rule says of every matrix of a model, a few lines show as much as all of them.
SHOWN_OF_A_RULE = 4
TRAINED_WHOLE = "they are trained whole; set training.lora"


def check_recipe(recipe: Recipe, folder: RunFolder, *, computes: bool = True) -> None:
    """Check data, base, existing experts, trainer options, merge methods and tracking; run nothing.

    Args:
        recipe: What is checked.
        folder: Its run folder.
        computes: Whether this machine is to compute; a report of what another one computed needs no devices of its own.

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
        problems.extend(check_task(task, seed=recipe.seed, cache_dir=folder.data))
    if computes:
        problems.extend(_machine_problems(recipe))
    attempt(partial(_check_models, recipe, problems))
    problems.extend(merge_problems(recipe))
    if recipe.merge and len(recipe.tasks) < 2:
        problems.add("merging needs at least two tasks; the recipe has one")
    attempt(partial(resolve_uri, recipe.tracking.uri))
    problems.raise_if_any()


def _machine_problems(recipe: Recipe) -> Iterator[str]:
    """Why this machine cannot train, capture, purify or evaluate as the recipe says."""
    distinct = {str(task.trainer): (f"tasks.{task.name}.trainer", task.trainer) for task in recipe.tasks}
    for where, options in {str(recipe.trainer): ("trainer", recipe.trainer), **distinct}.values():
        yield from trainer_problems(options, where if options != recipe.trainer else "trainer")
    machine = machine_options(recipe.trainer)
    asked = {"capture": recipe.capture.precision, "evaluate": recipe.evaluate.precision}
    for where, precision in asked.items() if not trainer_problems(machine, "trainer") else ():
        yield from trainer_problems({**machine, "precision": precision}, where)
    if recipe.compute.device == "cuda" and not torch.cuda.is_available():
        yield "compute.device is cuda, but PyTorch finds no graphics card that it can use; set it to cpu"


def merge_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the merge steps and purifications of a recipe, whatever its experts will be."""
    architecture: Architecture | None = None
    parameters: list[Parameter] = []
    try:
        folder = locate_model(recipe.base, role="base")
        architecture = Architecture.of_folder(folder)
        parameters = list(_stored_parameters(Checkpoint(folder, architecture.prefix), architecture))
    except PaveError:  # told elsewhere; what can be said without is said
        pass
    vectors = _planned_vectors(recipe, parameters, architecture)
    for step in recipe.merge:
        try:
            yield from _step_problems(step, recipe, vectors)
        except PaveError as error:
            yield str(error)
    layers = None if architecture is None else list(architecture.parameters.values())
    yield from _purification_problems(recipe, layers)


def _stored_parameters(base: Checkpoint, architecture: Architecture) -> Iterator[Parameter]:
    """The parameters that experts of a base will share with it."""
    for name, stored in sorted(base.backbone.items()):
        known = name in architecture.parameters or name in architecture.stored_names
        if known and stored.is_floating:
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
        adapted = [p for p in parameters if _is_wrapped(p, lora) and not lies_in(p.layer, task.training.freeze)]
        return {parameter.layer: lora.rank for parameter in adapted}
    folder = existing_folder(task)
    where = _adapter_of(folder)
    if where is None:
        return f"{folder} holds no adapter (looked for {ADAPTER_FOLDER}/{ADAPTER_CONFIG})"
    adapter = Adapter(where, prefix)
    return adapter.refusal or {layer: found.rank for layer, found in adapter.layers.items()}


def _adapter_of(folder: Path) -> Path | None:
    """Where the adapter of a named expert lies: the folder itself where it is an adapter, or beside its weights."""
    return folder if (folder / ADAPTER_CONFIG).is_file() else adapter_folder(folder)


def _is_wrapped(parameter: Parameter, lora: Lora) -> bool:
    """Whether LoRA with these options adapts the layer that owns a parameter, with that parameter as its weight."""
    if parameter.kind is not ParameterKind.LINEAR or not parameter.name.endswith(".weight"):
        return False
    return lora.target_modules == "all-linear" or any(_is_named(parameter.layer, n) for n in lora.target_modules)


def _is_named(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _step_problems(step: MergeStep, recipe: Recipe, vectors: PlannedTaskVectors) -> Iterator[str]:
    where = f"merge step '{step.name}'"
    kind = method_named(step.method)
    methods, refusals = _made(step)
    yield from refusals
    wanted = {need for method in methods for need in method.wanted}
    if step.scale is not None and kind.default_scale is None:
        yield f"{where}: {step.method} has no scale; leave the key 'scale' out"
    if (Need.ANCHOR in kind.needs) != (step.anchor is not None):
        wants = "starts from a merged model; name its merge step with" if step.anchor is None else "has no use for"
        yield f"{where}: {step.method} {wants} the key 'anchor'"
    if Need.INPUT_MOMENTS in wanted and recipe.capture.moments != "input":
        yield f"{where}: {step.method} needs the second moments of all inputs; set capture.moments: input"
    if Need.LOW_RANK in wanted and "purified" in step.vectors:
        yield f"{where}: {step.method} merges adapters, which purification leaves none of; set vectors: [plain]"
    if Need.NORM_MOMENTS in wanted and not recipe.capture.norms:
        yield f"{where}: {step.method} needs what the scales of norms multiply; set capture.norms: true"
    if methods and len(recipe.tasks) > 1:
        yield from (f"{where}: {problem}" for problem in _request_problems(methods, wanted, vectors))
    sizes = {method.options.batch_size for method in methods} if kind.batched else ()
    for size in sorted(found for found in sizes if found > recipe.capture.batch_size):
        yield (
            f"{where}: batch_size {size} is more than the {recipe.capture.batch_size} examples that are loaded at a "
            "time; lower it or raise capture.batch_size"
        )
    if step.anchor is not None and method_named(recipe.step(step.anchor).method).form != "static":
        yield f"{where}: its anchor '{step.anchor}' is not one model for all tasks; choose a static method"


def option_problems(step: MergeStep) -> list[str]:
    """What is wrong with a merge step's method and options, whatever else the recipe says."""
    return _made(step)[1]


def _made(step: MergeStep) -> tuple[list[MergeMethod], list[str]]:
    """A step's rule with each of the options that are tried, and what is wrong with the others."""
    methods: list[MergeMethod] = []
    refusals: dict[str, None] = {}
    for options in step.tuned_options:
        try:
            methods.append(make_method(step.method, options))
        except PaveError as error:
            refusals[str(error)] = None
    return methods, list(refusals)


def _request_problems(
    methods: Sequence[MergeMethod], wanted: Collection[Need], vectors: PlannedTaskVectors
) -> Iterator[str]:
    """What one rule, with each of the options that are tried, has against these tasks, layers and adapters."""
    lacking = list(_missing_adapters(methods[0], wanted, vectors))
    yield from lacking
    if lacking:  # or else it would be told again for each layer
        vectors = PlannedTaskVectors(vectors.parameters, dict.fromkeys(vectors.tasks, "told already"))
    told: dict[str, None] = {}
    for method in methods:
        try:
            told.update(dict.fromkeys(method.problems(vectors, PlannedEvidence())))
        except RuntimeError:  # it looks at values, as a rule of another package may do: it tells when it is run
            continue
    yield from list(told)[:SHOWN_OF_A_RULE]
    if len(told) > SHOWN_OF_A_RULE:
        yield f"... and {len(told) - SHOWN_OF_A_RULE} more like these"


def _missing_adapters(method: MergeMethod, wanted: Collection[Need], vectors: PlannedTaskVectors) -> Iterator[str]:
    """Tasks whose experts have no adapters although the rule merges adapters, one line a reason."""
    lacking: dict[str, list[str]] = {}
    for task in vectors.tasks:
        reason = vectors.without_factors(task)
        if reason is not None:
            lacking.setdefault(reason, []).append(task)
    if Need.LOW_RANK not in wanted:
        # Others find factors of their own in checkpoints of low rank; training whole weights leaves no low rank. Where
        # only some tasks have adapters, the rule itself tells it.
        without = sum(map(len, lacking.values())) == len(vectors.tasks)
        known = isinstance(method, LowRankMethod) and without
        lacking = {reason: tasks for reason, tasks in lacking.items() if known and reason == TRAINED_WHOLE}
    for reason, tasks in lacking.items():
        yield f"{method.name} merges low-rank adapters, but the experts of {quoted(tasks)} have none: {reason}"


def _purification_problems(recipe: Recipe, parameters: Sequence[Parameter] | None) -> Iterator[str]:
    if recipe.evaluate.purified_experts:
        try:
            purifications(recipe)
        except PaveError as error:
            yield f"evaluate.purified_experts: {error}"
    if parameters is None:
        return
    layers = [parameter for parameter in parameters if parameter.kind is ParameterKind.LINEAR]
    asked = {step.name: step.purify for step in recipe.merge if "purified" in step.vectors}
    if recipe.evaluate.purified_experts and not asked:
        asked = {"": recipe.purify}
    for options in dict.fromkeys(asked.values()):
        where = (
            "purify" if options == recipe.purify else next(f"merge.{n}.purify" for n in asked if asked[n] == options)
        )
        moments = recipe.capture.moments
        if options.reads_statistics:
            if options.needs_inputs and moments != "input":
                what = options.needs_inputs
                yield f"{where}: {what} needs the second moments of all inputs; set capture.moments: input"
            if moments == "output" and options.metric != "root":
                yield f"{where}: capture.moments: output serves the metric root alone, found {options.metric}"
        tasks = len(options.tasks or recipe.tasks)
        for ratio in ratios(options):
            yield from (f"{where}: {problem}" for problem in budget_problems(ratio, layers, tasks))


def _check_models(recipe: Recipe, problems: Problems) -> None:
    base_folder = locate_model(recipe.base, role="base")
    architecture = Architecture.of_folder(base_folder)
    base = Checkpoint(base_folder, architecture.prefix)
    tokenizer = load_tokenizer(base_folder)
    stored = {architecture.stored_names.get(name, name) for name, weight in base.backbone.items() if weight.is_floating}
    foreign = sorted(name for name in stored if name not in architecture.parameters and not architecture.ignores(name))
    unset = [name for name in architecture.parameters if name not in stored]
    if foreign and unset:
        problems.add(
            f"base: {architecture.config.get('model_type')} stores weights in other pieces than the model has "
            f"({foreign[0]}, for {unset[0]} and the like); such architectures are not supported yet"
        )
    for name in base.non_finite():
        problems.add(f"base: the weight {name} holds NaN or infinity")
    if architecture.vocabulary is not None and len(tokenizer) > architecture.vocabulary:
        problems.add(
            f"base: its tokenizer has {len(tokenizer)} tokens, but its embedding {architecture.vocabulary} rows"
        )
    for task in recipe.tasks:
        limit = architecture.positions
        if limit is not None and task.training.max_length > limit:
            problems.add(
                f"task '{task.name}': training.max_length is {task.training.max_length}, "
                f"but the base reads at most {limit} tokens"
            )
        try:
            if task.expert is not None:
                problems.extend(_expert_problems(task, base, architecture, tokenizer.get_vocab()))
            else:
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
    adapted = [parameter for parameter in architecture.parameters.values() if _is_wrapped(parameter, lora)]
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
            if not any(_is_named(layer, name) for layer in linear):
                hint = nearest(name, endings)
                yield f"task '{task.name}': training.lora.target_modules: no linear layer '{name}'; {hint}"


def _ancestors(name: str) -> Iterator[str]:
    parts = name.split(".")[:-1]
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _expert_problems(
    task: Task, base: Checkpoint, architecture: Architecture, vocabulary: Mapping[str, int]
) -> Iterator[str]:
    """What is wrong with a checkpoint that a recipe names instead of training.

    Raises:
        PaveError: one more problem, the last.
    """
    folder = existing_folder(task)
    where = f"task '{task.name}'"
    if (folder / ADAPTER_CONFIG).is_file():
        problems = adapter_problems(folder)
        yield from (f"{where}: {problem}" for problem in problems)
        if not problems and _adds_nothing(folder, base, architecture.prefix):
            yield f"{where}: the adapter {folder} adds nothing to the base: nothing to merge; was it fine-tuned?"
        if not problems:
            Adapter(folder, architecture.prefix)  # tells what is wrong with its factors
        return
    own = Architecture.of_folder(folder)
    expert = Checkpoint(folder, own.prefix)
    yield from config_differences(task.name, architecture, own)
    yield from differences(task.name, base, expert, architecture)
    if expert.has_backbone_of(base):
        yield f"{where}: the backbone of {folder} is the base's, so there is nothing to merge; was it fine-tuned?"
    yield from own.head_problems(f"{where}: {folder}", expert.head)
    yield from (f"{where}: {problem}" for problem in _head_problems(task, folder, own))
    for name in expert.non_finite():
        yield f"{where}: the weight {name} of {folder} holds NaN or infinity"
    others = load_tokenizer(folder).get_vocab()
    differing = [token for token, index in others.items() if vocabulary.get(token) != index]
    if differing or len(others) != len(vocabulary):
        yield (
            f"{where}: the vocabulary of {folder} is not the base's ({len(differing)} tokens differ, "
            f"such as {differing[:1]}); experts of one base must share its tokenizer"
        )
    beside = adapter_folder(folder)
    if beside is not None:
        Adapter(beside, architecture.prefix)  # tells what is wrong with its factors


def _adds_nothing(folder: Path, base: Checkpoint, prefix: str) -> bool:
    """Whether all that an adapter holds for the base's weights is zero, A aside; reads no further than what is not."""
    stored = stored_tensors(folder / ADAPTER_WEIGHTS)
    own = {name.partition(f".{prefix}.")[2]: tensor for name, tensor in stored.items() if f".{prefix}." in name}
    private = absent_children(base, own)
    factors = {name: t for name, t in own.items() if not lies_in(name, private)}
    updates = [tensor for name, tensor in factors.items() if ".lora_A." not in name and ".lora_embedding_A" not in name]
    return bool(updates) and not any(bool(Checkpoint.read(tensor).any()) for tensor in updates)


def _head_problems(task: Task, folder: Path, own: Architecture) -> Iterator[str]:
    if own.outputs != task.outputs:
        yield f"the head of {folder} has {own.outputs} outputs, but the task needs {task.outputs}"
    names = list(own.labels.values())
    if task.classes is not None and sorted(names) == sorted(task.classes) and names != task.classes:
        yield f"the head of {folder} has the classes in the order {names}, the task in the order {task.classes}"
    if own.padding is None:
        yield f"{folder}: config.json has no pad_token_id, so batches cannot be padded; set it"


def plan_rows(recipe: Recipe, folder: RunFolder) -> list[tuple[str, str, str]]:
    """One row a stage: its name, whether its result is there, stale or to do, and what the stage does."""
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
    program, peak, disk = map(filesize.decimal, (cost.baseline_bytes, cost.peak_bytes, cost.disk_bytes))
    table.caption = (
        f"purification {cost.seconds:.1f} s; highest memory of purifying and merging {peak} "
        f"(the program itself {program}); disk {disk}"
    )
    table.caption_justify = "left"
    return table


def predicted_cost(recipe: Recipe, folder: RunFolder) -> Cost:
    """Memory, time and disk that the recipe's purification and merging will take, from headers and small trials."""
    stages = Stages(recipe, folder)
    base_folder = locate_model(recipe.base, role="base")
    architecture = Architecture.of_folder(base_folder)
    parameters = list(_stored_parameters(Checkpoint(base_folder, architecture.prefix), architecture))
    capture, planned = recipe.capture, _planned_purifications(stages)
    kinds = expected_kinds(parameters, capture.moments, convolutions=capture.convolutions)
    exported = 0 if _purifies_in_a_run(recipe) else sum(len(one.tasks or recipe.tasks) for one in planned)
    return predict_cost(
        parameters,
        len(recipe.tasks),
        workers_of(recipe.compute),
        kinds if stages.need_statistics() else {},
        options=planned,
        methods=[method_named(step.method) for step, _ in stages.merges()],
        new_experts=sum(task.expert is None for task in recipe.tasks) + exported,
    )


def _fit_summary(recipe: Recipe, task: Task, cache: Path) -> str:
    if task.expert is not None:
        return f"from {task.expert.from_}"
    rows = len(load_split(task, "train", seed=recipe.seed, cache_dir=cache))
    epochs = task.trainer.get("max_epochs", DEFAULT_EPOCHS)
    if not isinstance(epochs, int) or epochs < 0:
        return _counted(rows, "row")
    steps = math.ceil(rows / task.training.batch_size) * epochs
    return (
        f"{_counted(rows, 'row')}, {_counted(epochs, 'epoch')}, {_counted(steps, 'step')} of {task.training.batch_size}"
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
