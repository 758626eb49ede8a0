"""New low-rank adapters around a model that is to be trained, and how they are written."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pave_lightning.errors import PaveError, reason
from pave_lightning.system.files import write_tensors
from pave_lightning.tasks.lora import adapter_ranks, saved_modules
from pave_lightning.tasks.options import Lora
from pave_lightning.weights import Checkpoint
from pave_lightning.weights.adapters import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS, adapter_settings
from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.backbones import backbone_of, has_language_head, lies_in, name_prefix, part_named
from pave_lightning.weights.checkpoint import stored_tensors
from pave_lightning.weights.empty_models import empty_model
from pave_lightning.weights.remembered import remembered

if TYPE_CHECKING:  # to load peft takes seconds
    from peft import LoraConfig

# Beside the work folder of a training: the adapter as it started, where that took a part of the base's weights.
START_ENDING = "-start"


def add_adapters(
    model: nn.Module,
    lora: Lora,
    peft_type: str | None,
    *,
    frozen: Sequence[str],
    private: Collection[str],
    empty: bool = False,
) -> nn.Module:
    """Wrap a model so that only low-rank adapters, the head and what else is asked for are trained (peft).

    Args:
        model: a model with a head; changed in place.
        lora: what is adapted, and how.
        peft_type: the ``task_type``, by peft's name; None where peft has none.
        frozen: submodules of the backbone that get no adapters and stay as they are.
        private: direct submodules of the backbone that the base has no weights for, such as a pooler; they start at
            random, so they are trained whole and kept with the head.
        empty: whether the model, and so the adapters, have no values (the meta device).

    Raises:
        PaveError: peft refuses it.
    """
    from peft import get_peft_model

    try:
        config = _config(model, lora, peft_type, frozen, private)
        wrapped: nn.Module = get_peft_model(model, config, low_cpu_mem_usage=empty)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise PaveError(f"training.lora: {reason(error)}") from error
    for name in frozen:  # of which peft has made the biases trainable
        part_named(backbone_of(model), name).requires_grad_(False)
    return wrapped


def _config(
    model: nn.Module, lora: Lora, peft_type: str | None, frozen: Sequence[str], private: Collection[str]
) -> LoraConfig:
    from peft import LoraConfig, TaskType

    backbone, start = backbone_of(model), name_prefix(model)
    parameters = list(Architecture.of_model(model).parameters.values())
    scores = [] if lora.target_modules != "all-linear" else _output_layers(model)
    ranks = adapter_ranks(lora, parameters, start.rstrip("."), [*frozen, *private, *scores])
    beside = () if backbone is model else model.named_children()
    head = [name for name, child in beside if child is not backbone and list(child.parameters())]
    saved = list(dict.fromkeys([*private, *saved_modules(lora, parameters)]))
    outermost = [name for name in saved if not lies_in(name, [other for other in saved if other != name])]
    # All that says which modules are meant, which is settled by now.
    settled = {"rank", "alpha", "dropout", "target_modules", "exclude_modules", "layers_to_transform"}
    options = lora.model_dump(exclude={*settled, "modules_to_save"})
    given: dict[str, Any] = {name: value for name, value in options.items() if value not in ([], {}, None)}
    return LoraConfig(
        **given,
        task_type=None if peft_type is None else TaskType(peft_type),
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=[f"{start}{name}" for name in ranks] or None,
        modules_to_save=[*head, *(f"{start}{name}" for name in outermost)],
    )


def _output_layers(model: nn.Module) -> list[str]:
    """Names of what scores the tokens of a language model, which peft does not count among all linear layers."""
    if not has_language_head(model):
        return []
    layer = model.get_output_embeddings()  # type: ignore[operator]
    return [name for name, module in model.named_modules() if module is layer]


@dataclass(frozen=True)
class _Refusal:
    reason: str | None


def refusal(base: Path, auto_model: str, peft_type: str | None, lora: Lora, frozen: Sequence[str]) -> str | None:
    """Why peft makes no such adapters for a base; None where it does. Asks peft itself, once for every base and lora.

    Args:
        base: folder of the base.
        auto_model: name of the class of transformers that builds the model with a head.
        peft_type: the ``task_type``, by peft's name; None where peft has none.
        lora: what is adapted, and how; values of the base are not looked at.
        frozen: submodules of the backbone that get no adapters.
    """
    from importlib.metadata import version

    start = {"init_lora_weights": True} if lora.changes_the_base else {}

    def find() -> _Refusal:
        model = empty_model(base, auto_model)
        try:
            add_adapters(model, lora.model_copy(update=start), peft_type, frozen=frozen, private=(), empty=True)
        except PaveError as error:
            return _Refusal(str(error))
        return _Refusal(None)

    config = Architecture.of_folder(base, auto_model).config
    key = [auto_model, peft_type, lora.model_dump(), list(frozen), config, version("peft")]
    return remembered(_Refusal, key, find, code=(Path(__file__).parent,)).reason


def keep_start(model: nn.Module, lora: Lora, work_folder: Path) -> None:
    """Keep an adapter as it starts, where that took a part of the base's weights; one that is kept already stays.

    Args:
        model: a peft model before training.
        lora: how the adapter starts.
        work_folder: where checkpoints are kept while training.
    """
    folder = _start_folder(work_folder)
    if not lora.changes_the_base or (folder / ADAPTER_CONFIG).is_file():
        return
    config: Any = model.peft_config["default"]  # type: ignore[index]
    start, config.init_lora_weights = config.init_lora_weights, True  # or else peft takes it out of the base again
    model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]
    config.init_lora_weights = start


def save_adapter(model: nn.Module, folder: Path, work_folder: Path | None = None) -> None:
    """Write the adapter of a peft model in a folder ``adapter``, as a change of the base that it was trained on.

    Args:
        model: a peft model.
        folder: an existing folder.
        work_folder: where `keep_start` has kept what it started from, if anything.
    """
    target = folder / ADAPTER_FOLDER
    # The embeddings of the base are its own; what is trained of them is saved in any case.
    model.save_pretrained(target, save_embedding_layers=False)  # type: ignore[operator]
    start = None if work_folder is None else _start_folder(work_folder)
    if start is not None and start.is_dir():
        _subtract(target, start)


def _subtract(folder: Path, start: Path) -> None:
    """Turn an adapter whose start was taken out of the base into one of the base itself: B A - B0 A0, of rank 2 r.

    peft's own conversion keeps the factors only, not the modules that were trained whole, and refuses patterns.
    """
    first, second = (stored_tensors(place / ADAPTER_WEIGHTS) for place in (folder, start))
    tensors = {}
    for name, stored in first.items():
        tensor = Checkpoint.read(stored)
        if ".lora_A." in name:
            tensor = torch.cat([tensor, Checkpoint.read(second[name])], dim=0)
        elif ".lora_B." in name:
            tensor = torch.cat([tensor, -Checkpoint.read(second[name])], dim=1)
        tensors[name] = tensor.contiguous()
    file = folder / ADAPTER_CONFIG
    settings = adapter_settings(folder)
    # At twice the rank, with which the scaling is to be what it was.
    factor = math.sqrt(2) if settings.get("use_rslora") else 2
    settings |= {
        "r": 2 * settings["r"],
        "lora_alpha": factor * settings["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in (settings.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in (settings.get("alpha_pattern") or {}).items()},
        "init_lora_weights": True,
    }
    write_tensors(folder / ADAPTER_WEIGHTS, tensors, {"format": "pt"})
    file.write_text(json.dumps(settings, indent=2, sort_keys=True))


def _start_folder(work_folder: Path) -> Path:
    """Not inside of the work folder, which is set aside whole when a checkpoint in it is damaged."""
    return work_folder.with_name(f"{work_folder.name}{START_ENDING}")
