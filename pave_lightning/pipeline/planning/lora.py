"""What is wrong with adapters that are to be trained, for the base that they are trained on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from pave_lightning.errors import listed, nearest
from pave_lightning.experts.new_adapters import refusal
from pave_lightning.system.patterns import fits_pattern
from pave_lightning.tasks.lora import adapter_ranks, is_named, is_weight, module_names, saved_modules
from pave_lightning.tasks.options import Lora
from pave_lightning.tasks.task import Task
from pave_lightning.weights import Architecture, Parameter, ParameterKind
from pave_lightning.weights.backbones import lies_in


def lora_problems(task: Task, lora: Lora, architecture: Architecture, base: Path) -> Iterator[str]:
    """What cannot work of a task's ``training.lora``, by names and shapes alone; values are not read.

    Args:
        task: the task.
        lora: its section.
        architecture: the base's, with the heads of the tasks.
        base: folder of the base.
    """
    frozen, found = [*task.training.freeze, *sorted(architecture.frozen)], False
    parameters = list(architecture.parameters.values())
    ranks = adapter_ranks(lora, parameters, architecture.prefix, frozen)
    for told in (
        *_target_problems(lora, parameters, ranks, frozen),
        *_rank_problems(lora, parameters, ranks, architecture.prefix),
        *_saved_problems(lora, architecture, parameters, frozen),
        *_token_problems(lora, architecture, parameters, ranks, frozen),
    ):
        found = True
        yield f"task '{task.name}': training.lora.{told}"
    if not found and (refused := refusal(base, task.auto_model, task.peft_type, lora, frozen)):
        yield f"task '{task.name}': {refused}"


def _target_problems(
    lora: Lora, parameters: Collection[Parameter], ranks: Collection[str], frozen: Collection[str]
) -> Iterator[str]:
    """Names that mean no module, or none that can be adapted."""
    modules, adaptable = module_names(parameters), [one.layer for one in parameters if is_weight(one)]
    endings = sorted({name.rpartition(".")[2] for name in adaptable})
    wrong = False
    for name in () if isinstance(lora.target_modules, str) else lora.target_modules:
        if any(is_named(module, name) for module in adaptable):
            continue
        wrong = True
        if any(is_named(module, name) for module in modules):
            yield (
                f"target_modules: '{name}' is neither a linear layer, a convolution nor an embedding, so it has no "
                "factors; name the layers in it, or train it whole with modules_to_save"
            )
        else:
            yield f"target_modules: no layer '{name}'; {nearest(name, endings)}"
    for name in lora.exclude_modules:
        if not any(is_named(module, name) for module in modules):
            yield f"exclude_modules: no module '{name}'; {nearest(name, endings)}"
    for name in lora.target_parameters:
        if not any(is_named(one.name, name) for one in parameters):
            known = sorted({".".join(one.name.split(".")[-2:]) for one in parameters if len(one.shape) > 1})
            yield f"target_parameters: no parameter '{name}'; {nearest(name, known)}"
    if not ranks and not lora.target_parameters and not wrong:
        without = "frozen, excluded, trained whole, or outside of layers_to_transform"
        yield f"target_modules: no module is left to adapt; all that are meant are {without}"
    if lora.changes_the_base:
        kinds = {one.layer: one.kind for one in parameters if is_weight(one)}
        other = [name for name in ranks if kinds[name] is not ParameterKind.LINEAR]
        if other:
            yield (
                f"init_lora_weights: {lora.init_lora_weights} starts linear layers only, and target_modules names "
                f"{listed(other, 3)}; leave these out, or start with true"
            )
    layers = lora.layers_to_transform or ()
    numbers = {int(part) for name in adaptable for part in name.split(".") if part.isdigit()}
    beyond = [str(number) for number in layers if number not in numbers]
    if beyond:
        yield f"layers_to_transform: no layer {listed(beyond)}; the base has {_counted(numbers)}"


def _counted(numbers: Collection[int]) -> str:
    return f"layers 0 to {max(numbers)}" if numbers else "no numbered layers"


def _rank_problems(lora: Lora, parameters: Iterable[Parameter], ranks: dict[str, int], prefix: str) -> Iterator[str]:
    """Patterns that fit no adapted module, and ranks that no module has."""
    for key, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns if ranks else ():
            if not any(fits_pattern(pattern, f"{prefix}.{name}") for name in ranks):
                known = sorted({name.rpartition(".")[2] for name in ranks})
                yield f"{key}: '{pattern}' fits no adapted module; {nearest(pattern, known)}"
    sizes = {one.layer: min(one.shape[0], _width(one)) for one in parameters if is_weight(one)}
    widest: dict[int, int] = {}
    for name, rank in ranks.items():
        widest[rank] = max(widest.get(rank, 0), sizes[name])
    for rank, size in sorted(widest.items()):
        if rank > size:
            key = "rank" if rank == lora.rank else "rank_pattern"
            yield f"{key} is {rank}, but no layer that it adapts has more than {size} directions; lower it"


def _width(parameter: Parameter) -> int:
    return parameter.elements // parameter.shape[0]


def _saved_problems(
    lora: Lora, architecture: Architecture, parameters: Collection[Parameter], frozen: Collection[str]
) -> Iterator[str]:
    """Modules that are to be trained whole and are not there, frozen, or trained whole in any case."""
    modules = module_names(parameters)
    endings = sorted({module.rpartition(".")[2] for module in modules})
    head = {name.rpartition(".")[0] for name in architecture.head}
    for name in lora.modules_to_save:
        meant = [module for module in modules if is_named(module, name)]
        if not meant and any(is_named(module, name) or lies_in(module, [name]) for module in head):
            yield f"modules_to_save: '{name}' is of the head, which is trained whole in any case; leave it out"
        elif not meant:
            yield f"modules_to_save: no module '{name}'; {nearest(name, endings)}"
        elif all(lies_in(module, frozen) for module in meant):
            yield f"modules_to_save: '{name}' is frozen by training.freeze; leave it out of one of the two"


def _token_problems(
    lora: Lora,
    architecture: Architecture,
    parameters: Collection[Parameter],
    ranks: Collection[str],
    frozen: Collection[str],
) -> Iterator[str]:
    """Rows of the token embedding that are not there, or that are trained with the whole of it."""
    tokens = lora.trainable_token_indices
    if not tokens:
        return
    tables = [one for one in parameters if one.name in architecture.token_embeddings]
    rows = tables[0].shape[0] if tables else 0
    if max(tokens) >= rows:
        yield f"trainable_token_indices: {max(tokens)} is beyond the base's {rows} tokens (0 to {rows - 1})"
    whole = [*saved_modules(lora, parameters), *ranks, *frozen]
    if tables and lies_in(tables[0].layer, whole):
        yield (
            "trainable_token_indices: the token embedding is frozen, adapted, or trained whole already; leave it out "
            "of all but one"
        )
