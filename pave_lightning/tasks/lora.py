"""Which modules the options of new low-rank adapters mean, by the rules of peft and without loading it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from pave_lightning.tasks.options import Lora
from pave_lightning.weights.adapters import by_pattern
from pave_lightning.weights.backbones import lies_in
from pave_lightning.weights.parameters import Parameter, ParameterKind

# What peft adapts with factors.
ADAPTABLE = (ParameterKind.LINEAR, ParameterKind.CONVOLUTION, ParameterKind.EMBEDDING)


def adapter_ranks(
    lora: Lora, parameters: Iterable[Parameter], prefix: str, frozen: Collection[str] = ()
) -> dict[str, int]:
    """The rank of each module of a backbone that gets an adapter, by the module's name.

    Args:
        lora: what is adapted, and how.
        parameters: the backbone's parameters.
        prefix: name under which the whole model holds the backbone.
        frozen: submodules of the backbone that are not trained.
    """
    without = [*frozen, *saved_modules(lora, parameters := list(parameters))]
    return {
        one.layer: by_pattern(lora.rank_pattern, f"{prefix}.{one.layer}", lora.rank)
        for one in parameters
        if _adapts(lora, one, f"{prefix}.{one.layer}") and not lies_in(one.layer, without)
    }


def saved_modules(lora: Lora, parameters: Iterable[Parameter]) -> list[str]:
    """The submodules of a backbone that ``modules_to_save`` means."""
    return [name for name in module_names(parameters) if any(is_named(name, one) for one in lora.modules_to_save)]


def trained_values(lora: Lora, parameters: Sequence[Parameter], prefix: str, frozen: Collection[str] = ()) -> int:
    """How many values of the backbone are trained: factors, biases, and modules that are trained whole.

    Arguments as in `adapter_ranks`.
    """
    ranks, saved = adapter_ranks(lora, parameters, prefix, frozen), saved_modules(lora, parameters)
    values = 0
    for one in parameters:
        if lies_in(one.layer, frozen):
            continue
        biased = lora.bias == "all" or (lora.bias == "lora_only" and one.layer in ranks)
        if lies_in(one.layer, saved) or (biased and one.name.endswith("bias")):
            values += one.elements
        elif one.layer in ranks and is_weight(one):
            values += ranks[one.layer] * (one.shape[0] + math.prod(one.shape[1:]))
    tables = [one.shape for one in parameters if one.kind is ParameterKind.EMBEDDING]
    return values + len(lora.trainable_token_indices) * max(tables, default=(0,))[-1]  # of the table with most rows


def _adapts(lora: Lora, parameter: Parameter, module: str) -> bool:
    if not is_weight(parameter) or any(is_named(module, one) for one in lora.exclude_modules):
        return False
    if lora.target_modules == "all-linear":
        if parameter.kind is not ParameterKind.LINEAR:
            return False
    elif not any(is_named(module, one) for one in lora.target_modules):
        return False
    if lora.layers_to_transform is None:
        return True
    # As in peft, the first number in the name is that of the layer.
    found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return found is not None and int(found[1]) in lora.layers_to_transform


def is_weight(parameter: Parameter) -> bool:
    """Whether a parameter is the weight of a module that peft has factors for."""
    return parameter.kind in ADAPTABLE and parameter.name.endswith(".weight")


def is_named(module: str, name: str) -> bool:
    """Whether a module has that name, or a name that ends with it."""
    return module == name or module.endswith(f".{name}")


def module_names(parameters: Iterable[Parameter]) -> list[str]:
    """Names of all modules that hold parameters, and of what holds these, sorted."""
    return sorted({module for one in parameters for module in _with_ancestors(one.layer)})


def _with_ancestors(module: str) -> Iterator[str]:
    parts = module.split(".") if module else []
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])
