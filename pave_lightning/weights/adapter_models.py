"""Peft adapters put on their base: what is wrong with them by themselves, and the dense weights that they give."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pave_lightning.errors import PaveError, foreign, listed, nearest
from pave_lightning.weights.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    WRAPPED,
    absent_adapter,
    adapter_settings,
)
from pave_lightning.weights.backbones import backbone_of, is_bare
from pave_lightning.weights.checkpoint import Checkpoint, is_finite_in_float32, stored_tensors, weight_files
from pave_lightning.weights.embeddings import resize_rows, token_embeddings
from pave_lightning.weights.empty_models import empty_model

# Settings of adapters that weights of the base's shape cannot hold.
NOT_IN_WEIGHTS = {
    "layer_replication": "layers of the base are repeated",
    "alora_invocation_tokens": "it works on some tokens only",
    "arrow_config": "it chooses among adapters for each token",
}


# What peft calls adapters of models whose heads score tokens.
LANGUAGE_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
# Starts that take a part out of the base by chance, or by data, and so another part when the adapter is loaded.
UNREPEATABLE = ("pissa_niter", "corda", "lora_ga", "loftq")


def adapter_problems(folder: Path) -> list[str]:
    """What is wrong with a peft adapter by itself; its tensors are read whole.

    Raises:
        PaveError: its file changed while it was read.
    """
    try:
        settings = adapter_settings(folder)
    except PaveError as error:
        return [str(error)]
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        return [absent_adapter(folder)]
    try:
        stored = stored_tensors(weights, "save the adapter again")
    except PaveError as error:
        return [str(error)]
    problem = _kind_problem(settings)
    if problem is None:
        unmerged = [f"{key}: {why}" for key, why in NOT_IN_WEIGHTS.items() if settings.get(key)]
        problem = f"is no change of the base's weights ({'; '.join(unmerged)}), so it cannot be merged" * bool(unmerged)
    if problem:
        return [f"the adapter {folder} {problem}"]
    broken = [
        name for name, found in stored.items() if found.is_floating and not is_finite_in_float32(Checkpoint.read(found))
    ]
    if broken:
        return [
            f"the adapter {folder} holds NaN, infinity, or values too large for float32 in {listed(broken, 3)}; "
            "save the adapter again"
        ]
    return []


def _kind_problem(settings: Mapping[str, Any]) -> str | None:
    """Why adapters of a kind, or with such a start, give no dense weights; None where they do."""
    kind, start = settings.get("peft_type"), str(settings.get("init_lora_weights", True)).lower()
    if kind == "LORA":
        if start.startswith(UNREPEATABLE):
            return (
                f"was initialised with {start}, which took a part of the base's weights that cannot be told any more; "
                "save it once more with path_initial_model_for_weight_conversion"
            )
        return None
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    configs: Mapping[str, Any] = {str(name.value): found for name, found in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    tuners: Mapping[str, Any] = {str(name.value): found for name, found in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    if not isinstance(kind, str) or kind not in configs:
        known = nearest(str(kind), sorted(configs)) if isinstance(kind, str) else "its peft_type says none"
        return f"is of a kind that the installed peft does not know ({kind}; {known}); update peft or save it again"
    if issubclass(configs[kind], PromptLearningConfig) or not hasattr(tuners.get(kind), "merge_and_unload"):
        return (
            f"is of kind {kind}, which adds to a model's inputs or states and changes no weights, so there is nothing "
            "to merge; train an adapter of the weights instead, such as LoRA"
        )
    return None


def task_type(folder: Path) -> str | None:
    """What peft was told that the adapter is for; None where that is nothing."""
    kind = adapter_settings(folder).get("task_type")
    return None if kind in (None, "") else str(kind)


def embedding_rows(adapter: Path, names: Collection[str]) -> int | None:
    """How many tokens the embedding has that an adapter brings along whole; None where it brings none.

    Args:
        adapter: folder of the adapter.
        names: names of the weight that has one row a token, inside the backbone.
    """
    for stored, tensor in stored_tensors(adapter / ADAPTER_WEIGHTS).items():
        plain = stored.replace(".base_layer.", ".").replace(".modules_to_save.", ".").replace(".default.", ".")
        if any(plain.endswith(f".{name}") for name in names):
            return tensor.shape[0]
    return None


def with_its_rows(model: nn.Module, folder: Path) -> nn.Module:
    """The model with as many rows of its token embedding as an adapter brings along, where it brings any."""
    rows = embedding_rows(folder, token_embeddings(backbone_of(model)))
    if rows is not None:
        resize_rows(backbone_of(model), rows)
    return model


def merged_weights(adapted: Any) -> nn.Module:
    """The model inside of a peft model, with the adapter merged into its weights; changed in place."""
    from peft.utils import ModulesToSaveWrapper

    merged: nn.Module = adapted.merge_and_unload()
    # Some kinds leave modules that are trained whole in their wrappers.
    for name, module in list(merged.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, attribute = name.rpartition(".")
            own: Any = module.modules_to_save
            setattr(merged.get_submodule(parent), attribute, own[module.active_adapters[0]])
    return merged


def write_with_adapter(base: Path, adapter: Path, folder: Path) -> None:
    """Write the model that an adapter gives with its base, by peft's own merge; the head of a task is left out.

    The adapter is copied into the folder ``adapter`` beside the weights (float32), so that its factors are known. One
    model is held in memory.

    Args:
        base: folder of the base.
        adapter: folder of the adapter.
        folder: an existing, empty folder.

    Raises:
        PaveError: the adapter changes no weights, cannot be read, or does not fit the base.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    problems = adapter_problems(adapter)
    if problems:
        raise PaveError("; ".join(problems))
    weight_files(base)
    stored = stored_tensors(adapter / ADAPTER_WEIGHTS)
    with foreign(f"the adapter {adapter} does not fit the base {base}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind: Any = type(empty_model(base))
        whole: Any = kind.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
        with_its_rows(whole, adapter)
        prefix = f"{whole.base_model_prefix}."
        inside = any(name.startswith(WRAPPED + prefix) for name in stored)
        config: Any = PeftConfig.from_pretrained(str(adapter))
        # An adapter of a language model is of all of it; one of another task is of what is below the head.
        of_whole = inside and str(config.task_type or "CAUSAL_LM") in LANGUAGE_TASKS
        # With a task, peft looks for the task's head.
        config.task_type, config.inference_mode = None, True
        model = _trained_as(whole, inside=inside)
        plain = {WRAPPED + name for name, _ in model.named_parameters()}
        adapted = PeftModel.from_pretrained(model, str(adapter), config=config)
        own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        start = WRAPPED + prefix if inside else WRAPPED
        lost = [name for name in stored if name.startswith(start) and name not in own]
        # Biases of modules that the model with the head has not stay as they are in the base.
        lacking = [name for name in own if name not in stored and name.replace(".base_layer.", ".") not in plain]
        if lost and inside:
            raise ValueError(f"it has no {listed([name.removeprefix(WRAPPED) for name in lost], 3)}")
        if lacking:
            raise ValueError(f"the adapter lacks {listed([name.removeprefix(WRAPPED) for name in lacking], 3)}")
        merged_weights(adapted)
        saved: Any = whole if of_whole else _below_head(whole)
        saved.save_pretrained(folder)
    (folder / ADAPTER_FOLDER).mkdir()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copyfile(adapter / name, folder / ADAPTER_FOLDER / name)


def _trained_as(model: nn.Module, *, inside: bool) -> nn.Module:
    """A model in which an adapter finds its modules: with the backbone under its prefix, or the backbone itself."""
    if not inside:
        return _below_head(model)
    if not is_bare(model):
        return model
    return _Holder(model)


def _below_head(model: nn.Module) -> nn.Module:
    """What is below the head of a model, a language model's too; the model itself where nothing is."""
    found = getattr(model, str(model.base_model_prefix), None)
    return found if isinstance(found, nn.Module) else model


class _Holder(nn.Module):
    """Holds a backbone as the models with heads do."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.add_module(str(backbone.base_model_prefix), backbone)
        self._held = [backbone]

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's, by which peft finds the rows of tokens that are trained."""
        found: nn.Module = self._held[0].get_input_embeddings()
        return found
