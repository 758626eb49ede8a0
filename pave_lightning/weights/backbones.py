"""Where a model's backbone ends and its head begins, and what of it tasks leave as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pave_lightning.errors import PaveError, foreign
from pave_lightning.weights.empty_models import auto_class

# Classes of transformers that build a model of images and of texts, of which tasks change what reads the images.
ONE_SIDED = ("AutoModelForZeroShotImageClassification",)


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of a Hugging Face model below its head; the model itself where it is a bare one or a language model.

    Raises:
        PaveError: it has a head, and no backbone where transformers says.
    """
    backbone = getattr(model, str(model.base_model_prefix), None)
    if has_language_head(model) or (backbone is None and is_bare(model)):
        return model
    if not isinstance(backbone, nn.Module):
        raise PaveError(f"{type(model).__name__} has no backbone named '{model.base_model_prefix}'")
    return backbone


def name_prefix(model: nn.Module) -> str:
    """What names of the backbone's parameters begin with in a model: ``bert.``; nothing in a bare one."""
    return "" if backbone_of(model) is model else f"{model.base_model_prefix}."


def with_backbone(model: nn.Module, backbone: nn.Module) -> nn.Module:
    """A model on another backbone: itself, changed in place; the backbone itself where it is a bare one."""
    if backbone_of(model) is model:
        return backbone
    setattr(model, str(model.base_model_prefix), backbone)
    return model


def has_language_head(model: nn.Module) -> bool:
    """Whether a model's head gives a score for each token, and so is as much the model's own as its embeddings are."""
    reader: Any = getattr(model, "get_output_embeddings", None)
    try:
        return reader is not None and isinstance(reader(), nn.Module)
    except (NotImplementedError, AttributeError):  # models that read no tokens
        return False


def heads_beside(model: nn.Module) -> frozenset[str]:
    """Direct submodules and parameters of a model that are its head, where its backbone is not one of its submodules.

    The backbone is then all that the bare model of the same configuration has too. Empty for all other models.
    """
    if isinstance(getattr(model, str(model.base_model_prefix), None), nn.Module) or has_language_head(model):
        return frozenset()
    bare = bare_class(getattr(model, "config", None))
    if not bare or type(model).__name__ in _bare_classes(getattr(model, "config", None)):
        return frozenset()
    with torch.device("meta"):
        known = _own_names(auto_class(bare)._from_config(copy.deepcopy(model.config)))
    own = _own_names(model)
    return frozenset(own - known) if own & known else frozenset()


def _own_names(model: nn.Module) -> set[str]:
    """The direct submodules that have parameters, and the parameters beside them."""
    return {name.partition(".")[0] for name, _ in model.named_parameters()}


def is_bare(model: nn.Module) -> bool:
    """Whether a model of transformers is a backbone without a head."""
    return type(model).__name__ in _bare_classes(getattr(model, "config", None))


def _bare_classes(config: Any) -> tuple[str, ...]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    known = MODEL_MAPPING_NAMES.get(getattr(config, "model_type", ""), ())
    return (known,) if isinstance(known, str) else tuple(known)


def bare_class(config: Any) -> str:
    """Name of the class of models without head; empty where there is none."""
    return next(iter(_bare_classes(config)), "")


def unchanged_parts(model: nn.Module, auto_model: str | None) -> frozenset[str]:
    """Direct submodules and parameters of a model that no task changes: all that does not read images, of `ONE_SIDED`.

    Args:
        model: what the class builds; none of its values are looked at.
        auto_model: name of the class of transformers.

    Raises:
        PaveError: the model cannot be given images alone.
    """
    if auto_model not in ONE_SIDED:
        return frozenset()
    reached: set[str] = set()
    children = dict(model.named_children())

    def note(name: str) -> Any:
        return lambda *given: reached.add(name)

    config: Any = model.config
    what = f"{type(model).__name__} cannot be given images alone, of one size and without texts"
    hooks = [child.register_forward_pre_hook(note(name)) for name, child in children.items()]
    device = next(model.parameters()).device
    try:
        with foreign(what), torch.no_grad():
            seen = config.vision_config
            size = seen.image_size if isinstance(seen.image_size, int) else max(seen.image_size)
            pixels = torch.empty(1, getattr(seen, "num_channels", 3), size, size, device=device)
            model.get_image_features(pixel_values=pixels)  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    direct = {name for name, _ in model.named_parameters(recurse=False)}
    return frozenset((children.keys() | direct) - reached)


def part_named(module: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """A submodule, or one of a module's own parameters; both can be told not to be trained (``requires_grad_``)."""
    own = dict(module.named_parameters(recurse=False))
    return own[name] if name in own else module.get_submodule(name)


def lies_in(name: str, modules: Iterable[str]) -> bool:
    """Whether a module, by its dotted name, is one of these modules or lies inside of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
