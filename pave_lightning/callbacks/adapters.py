"""Adapters of peft during a pass: merged into the weights for as long as it lasts, and out of sight in names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

BASE_LAYER = "base_layer"


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """Within, the active adapters are parts of the weights, so that each layer's own output is the expert's.

    Afterwards every weight is what it was, bit for bit. Meanwhile the weights of adapted layers are held twice.
    """
    kept: list[tuple[Any, dict[str, torch.Tensor]]] = []
    try:
        with torch.no_grad():
            for _, layer in _adapted(model):
                if not layer.merged and not layer.disable_adapters:
                    weights = layer.get_base_layer().named_parameters()
                    kept.append((layer, {name: weight.detach().clone() for name, weight in weights}))
                    layer.merge()
        yield
    finally:
        with torch.no_grad():
            for layer, weights in kept:
                layer.unmerge()
                for name, weight in layer.get_base_layer().named_parameters():
                    weight.copy_(weights[name])


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer has adapters that are in use and not merged."""
    return any(not layer.merged and not layer.disable_adapters for _, layer in _adapted(model))


def without_wrappers(layers: Mapping[str, Sequence[nn.Module]], model: nn.Module) -> dict[str, list[nn.Module]]:
    """Layers by the names that they have without adapters; the factors of adapters, and unused copies, are left out.

    Args:
        layers: name -> modules, by their names in the model.
        model: the model, with peft's wrappers or without.
    """
    hidden: list[str] = []
    renamed: dict[str, str] = {}
    for path, _ in _adapted(model):
        hidden.append(path)
        renamed[f"{path}.{BASE_LAYER}"] = path
    for path, wrapper in _saved_whole(model):
        hidden.append(path)
        renamed[f"{path}.modules_to_save.{wrapper.active_adapters[0]}"] = path
    found: dict[str, list[nn.Module]] = {}
    for name, modules in layers.items():
        plain = name
        for inner in sorted(renamed, key=len, reverse=True):
            if plain == inner or plain.startswith(f"{inner}."):
                plain = renamed[inner] + plain.removeprefix(inner)
        if plain != name or not any(name.startswith(f"{path}.") for path in hidden):
            found.setdefault(plain, []).extend(modules)
    return found


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with adapters. Who has such a model has imported peft, so this need not."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is not None:
        yield from ((name, one) for name, one in model.named_modules() if isinstance(one, tuners.BaseTunerLayer))


def _saved_whole(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that are trained whole beside adapters, in the wrappers that hold them and what they were."""
    other = sys.modules.get("peft.utils.other")
    if other is not None:
        yield from ((name, one) for name, one in model.named_modules() if isinstance(one, other.ModulesToSaveWrapper))
