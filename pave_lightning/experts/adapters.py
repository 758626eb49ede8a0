"""Peft adapters of a base: what they hold, what they lack, and the model that they give with the base."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pave_lightning.errors import PaveError, foreign, listed, naming
from pave_lightning.experts.loading import load_base
from pave_lightning.tasks.heads import HeadForm
from pave_lightning.tasks.kinds.tokens import TOKENS
from pave_lightning.tasks.task import Task, kind_of_adapters
from pave_lightning.weights import Checkpoint, is_finite
from pave_lightning.weights.adapter_models import adapter_problems, merged_weights, task_type, with_its_rows
from pave_lightning.weights.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WRAPPED
from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.backbones import lies_in
from pave_lightning.weights.checkpoint import StoredTensor, stored_tensors
from pave_lightning.weights.empty_models import empty_model
from pave_lightning.weights.task_vectors import absent_modules

MERGE_FIRST = "merge it with peft first (merge_and_unload, save_pretrained) and name that folder"

log = logging.getLogger("pave_lightning")


def load_adapter(base: Path, folder: Path, task: Task) -> nn.Module:
    """A peft adapter merged into the base: the same kind of model as full fine-tuning gives.

    Raises:
        PaveError: the adapter does not fit the base, or something of the head is neither in it nor in the base.
    """
    return _merged(base, folder, task.name, lambda: task.head_form)


def load_adapter_alone(base: Path, folder: Path, task: str) -> nn.Module:
    """A peft adapter merged into the base, with a head as large as the adapter says; it does not name the outputs.

    Args:
        base: folder of the base model.
        folder: folder of the adapter.
        task: name of its task, for messages.

    Raises:
        PaveError: the adapter does not fit the base, or something of the head is neither in it nor in the base.
    """
    return _merged(base, folder, task, lambda: _form_of_adapter(base, folder))


def _merged(base: Path, folder: Path, task: str, describe: Callable[[], HeadForm]) -> nn.Module:
    from peft import PeftModel

    with naming(f"task '{task}'"):
        problems = adapter_problems(folder)
        if problems:
            raise PaveError("; ".join(problems))
        form = describe()
        if problems := fit_problems(base, folder, form):
            raise PaveError("; ".join(problems))
    with foreign(f"task '{task}': the adapter {folder} does not fit the base {base}"), warnings.catch_warnings():
        architecture = Architecture.of_folder(base, form.auto_model, **form.config)
        head = head_of_base(architecture, base, output_layer(base, form.auto_model))
        model = with_its_rows(load_base(base, form, head), folder)
        warnings.simplefilter("ignore")  # of what is missing, which was asked for
        merged = merged_weights(PeftModel.from_pretrained(model, folder))
    broken = [name for name, value in merged.named_parameters() if not is_finite(value.detach())]
    if broken:
        raise PaveError(
            f"task '{task}': with the adapter {folder} the weights {listed(broken, 3)} hold NaN or infinity; "
            "save the adapter again"
        )
    return merged.eval()


def fit_problems(base: Path, folder: Path, form: HeadForm) -> list[str]:
    """What keeps an adapter from giving a whole model with the base, by configurations and file headers alone.

    Its tensors are put by peft itself into a model without values, so every kind of adapter is asked for all that it
    needs. What is neither in the adapter nor in the base's files would be drawn at random, and is a problem.

    Args:
        base: folder of the base.
        folder: folder of the adapter, in which `adapter_problems` finds nothing.
        form: what the model with the task's head is built from.
    """
    architecture = Architecture.of_folder(base, form.auto_model, **form.config)
    output = output_layer(base, form.auto_model)
    required, from_base = required_weights(architecture, base), head_of_base(architecture, base, output)
    kind, prefix = architecture.model_class, architecture.prefix
    model = with_its_rows(empty_model(base, form.auto_model, **form.config), folder)
    try:
        with foreign(f"the adapter {folder} does not fit the base {base}"):
            given, missing, misfits = _placed(model, folder)
    except PaveError as error:
        return [str(error)]
    lacking = [name for name in required if name not in given and name not in from_base]
    lacking += [name for name in missing if name in required and name not in lacking]
    tops = sorted({_module_to_save(name, prefix) for name in required})
    if output and all(name in lacking for name in output):
        return [
            f"the adapter {folder} holds no head: {listed(output)} of a {kind} is not in it; train it with task_type "
            f"{form.peft_type} and modules_to_save: [{', '.join(tops)}]"
        ]
    if lacking:
        return [
            f"the adapter {folder} holds only a part of what was trained: {listed(lacking, 6)} of a {kind} "
            f"{'is' if len(lacking) == 1 else 'are'} neither in it nor in the base {base}, and would be drawn at "
            f"random; train it again with modules_to_save: [{', '.join(tops)}]"
        ]
    if missing:
        return [
            f"the adapter {folder} lacks {listed(missing, 3)}, which its {ADAPTER_CONFIG} asks for, so that would be "
            "drawn at random; save it again"
        ]
    return [f"the adapter {folder} does not fit the base {base}: {misfit}" for misfit in misfits]


def adds_nothing(base: Path, folder: Path, auto_model: str) -> bool:
    """Whether an adapter changes no weight of the backbone that the base has; reads no further than what does."""
    architecture = Architecture.of_folder(base, auto_model)
    start = f"{WRAPPED}{architecture.start}"
    stored = {
        name.removeprefix(start): found
        for name, found in stored_tensors(folder / ADAPTER_WEIGHTS).items()
        if name.startswith(start)
    }
    private = absent_modules(architecture.checkpoint(base), architecture, stored)
    updates = [
        found
        for name, found in stored.items()
        if not lies_in(name, private) and ".lora_A." not in name and ".lora_embedding_A" not in name
    ]
    return not any(bool(Checkpoint.read(found).any()) for found in updates)


def required_weights(architecture: Architecture, base: Path) -> list[str]:
    """Parameters that a base's backbone does not give: the head, and submodules of the backbone that the base lacks.

    Args:
        architecture: what the base's configuration gives with the head.
        base: folder of the base.
    """
    prefix, names = architecture.start, [weight.names[0] for weight in architecture.weights]
    backbone = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    private = absent_modules(architecture.checkpoint(base), architecture, backbone)
    return [name for name in names if not name.startswith(prefix) or lies_in(name.removeprefix(prefix), private)]


def head_of_base(architecture: Architecture, base: Path, last: Collection[str]) -> dict[str, StoredTensor]:
    """What an adapter's head has from the base's files: all but its last layer, which is of the adapter's own task.

    That is what transformers loads before an adapter is put on the model, and what peft leaves as it is (the ``head``
    of ModernBERT, whose base holds one).

    Args:
        architecture: what the base's configuration gives with a head of the adapter's size.
        base: folder of the base.
        last: names of the parameters of the last layer, see `output_layer`.
    """
    checkpoint, renamed = architecture.checkpoint(base), architecture.renamed
    stored = {renamed.get(name, name): found for name, found in checkpoint.head.items() if found.is_floating}
    return {
        weight.names[0]: stored[weight.names[0]]
        for weight in architecture.weights
        if weight.names[0] in stored and weight.names[0] not in last and stored[weight.names[0]].shape == weight.shape
    }


def output_layer(base: Path, auto_model: str) -> list[str]:
    """Names of the parameters whose size is the number of outputs."""
    two, three = (Architecture.of_folder(base, auto_model, num_labels=outputs).weights for outputs in (2, 3))
    return [one.names[0] for one, other in zip(two, three, strict=True) if one.shape != other.shape]


def _form_of_adapter(base: Path, folder: Path) -> HeadForm:
    """What the model is built from whose head an adapter holds."""
    kind = kind_of_adapters(task_type(folder), reads_tokens=Architecture.of_folder(base).main_input == TOKENS)
    stored = stored_tensors(folder / ADAPTER_WEIGHTS)
    if not kind.has_head:
        return HeadForm(kind.auto_model, kind.peft_type, kind.unnamed_head(0))
    output = output_layer(base, kind.auto_model)
    found = next((stored[WRAPPED + name] for name in output if WRAPPED + name in stored), None)
    if found is None:
        built = Architecture.of_folder(base, kind.auto_model).model_class
        raise PaveError(f"the adapter {folder} holds no head of a {built}; train it with task_type {kind.peft_type}")
    return HeadForm(kind.auto_model, kind.peft_type, kind.unnamed_head(found.shape[0]))


def _placed(model: nn.Module, folder: Path) -> tuple[set[str], list[str], list[str]]:
    """Which weights an adapter gives, which it lacks, and what of it has no place; all by names of the bare model."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config: Any = PeftConfig.from_pretrained(folder)
    config.inference_mode, kind = True, config.peft_type.value
    pruned = _pruned_ranks(config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # other ways to start look at the base's values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
        except NotImplementedError as error:  # of tensors without values
            raise ValueError(f"adapters of kind {kind} are shaped by the base's values; {MERGE_FIRST}") from error
        asked = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        shapes = {name: _pruned(name, value.shape, pruned) for name, value in asked.items()}
        stored = {
            name: torch.empty(found.shape, device="meta")
            for name, found in stored_tensors(folder / ADAPTER_WEIGHTS).items()
        }
        wrong = [
            f"{_bare(name)} is {list(found.shape)} in the adapter, but {list(shapes[name])} in this base"
            for name, found in stored.items()
            if name in shapes and found.shape != shapes[name]
        ]
        if wrong:
            return {_bare(name) for name in stored}, [], _few(wrong)
        placed = set_peft_model_state_dict(wrapped, {**stored, **asked})
        if kind != "LORA":
            _check_merge(wrapped, kind)
    surplus = set(placed.unexpected_keys)
    unplaced = [_bare(name) for name in stored if name not in asked and _inserted(name) & surplus]
    given = {_bare(name) for name in stored} - set(unplaced)
    return given, [_bare(name) for name in asked if name not in stored], _few([f"it has no {n}" for n in unplaced])


def _pruned_ranks(config: Any) -> dict[str, int]:
    """The ranks that AdaLoRA has left its layers, by names in the whole model; its configuration names none any more.

    What is cut off is told by values, which plans do not read.
    """
    masks = config.rank_pattern if config.peft_type.value == "ADALORA" else None
    if not masks:
        return {}
    config.rank_pattern = None
    return {name.rpartition(".")[0]: sum(bool(kept) for kept in mask) for name, mask in masks.items()}


def _pruned(name: str, shape: torch.Size, ranks: Mapping[str, int]) -> torch.Size:
    """The shape of a tensor of an adapter with the ranks that its layers were left."""
    layer, _, side = _bare(name).rpartition(".lora_")
    if layer not in ranks:
        return shape
    return torch.Size([shape[0], ranks[layer]] if side == "B" else [ranks[layer], *shape[1:]])


def _check_merge(wrapped: Any, kind: str) -> None:
    """Find out whether peft can merge adapters of a kind, by merging ones without values.

    Raises:
        ValueError: it cannot.
    """
    try:
        wrapped.merge_and_unload()
    except NotImplementedError as error:
        if "meta" not in str(error):  # or else values are missing
            raise ValueError(f"peft cannot merge adapters of kind {kind} into weights") from error
    except RuntimeError:
        log.debug("adapters of kind %s are not merged without values", kind)


def _few(problems: list[str], most: int = 3) -> list[str]:
    rest = len(problems) - most
    return problems[:most] + ([f"... and {rest} more like these"] if rest > 0 else [])


def _inserted(name: str) -> set[str]:
    """The names that a tensor of an adapter may have once peft has put the adapter's own name into it."""
    parts = name.split(".")
    return {name, *(".".join([*parts[:place], "default", *parts[place:]]) for place in range(1, len(parts) + 1))}


def _bare(name: str) -> str:
    return name.removeprefix(WRAPPED)


def _module_to_save(name: str, prefix: str) -> str:
    """The module to name for peft so that a parameter is saved: a direct child of the model or of its backbone."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == prefix else 1])
