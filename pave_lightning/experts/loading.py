"""From folders to models: base models that get a new head, experts that have one, peft adapters of a base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pave_lightning.errors import PaveError
from pave_lightning.recipe import Lora, Task
from pave_lightning.weights.checkpoint import weight_files

ADAPTER_CONFIG = "adapter_config.json"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        PaveError: the folder has none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PaveError(
            f"{folder}: no tokenizer could be loaded ({reason}); put tokenizer.json beside the model"
        ) from error
    return tokenizer


def label_names(task: Task) -> dict[str, Any]:
    """The part of a model's configuration that describes the head."""
    if task.classes is None:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": task.outputs,
        "problem_type": "single_label_classification",
        "id2label": dict(enumerate(task.classes)),
        "label2id": {name: index for index, name in enumerate(task.classes)},
    }


def load_with_new_head(base: Path, task: Task) -> nn.Module:
    """The base model in float32 with a head of the task's size, drawn from torch's current seed."""
    weight_files(base)
    model, _ = _load(base, **label_names(task))
    return model


def load_expert(folder: Path, task: Task) -> nn.Module:
    """A fine-tuned model in float32, with its own head, in eval mode.

    Raises:
        PaveError: the checkpoint lacks weights of the head or the backbone, or its head is of another size.
    """
    weight_files(folder)
    model, info = _load(folder)
    missing = sorted(info["missing_keys"])
    if missing:
        raise PaveError(
            f"task '{task.name}': the checkpoint {folder} lacks {len(missing)} weights, among them "
            f"{', '.join(missing[:3])}; expected a fine-tuned sequence-classification model with its head"
        )
    outputs = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    if outputs != task.outputs:
        raise PaveError(
            f"task '{task.name}': the head of {folder} has {outputs} outputs, but the task needs {task.outputs}; "
            "check the task's classes"
        )
    return model.eval()


def load_adapter(base: Path, folder: Path, task: Task) -> nn.Module:
    """A peft adapter merged into the base: the same kind of model as full fine-tuning gives.

    Raises:
        PaveError: the adapter does not fit the base, or has no head.
    """
    from peft import PeftModel

    settings = json.loads((folder / ADAPTER_CONFIG).read_text())
    if not settings.get("modules_to_save"):
        raise PaveError(
            f"task '{task.name}': the adapter {folder} holds no head (modules_to_save is empty); "
            "train it with task_type SEQ_CLS"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise PaveError(f"task '{task.name}': {folder} has no adapter_model.safetensors; pickled adapters are refused")
    try:
        adapted = PeftModel.from_pretrained(load_with_new_head(base, task), folder)
        merged: nn.Module = adapted.merge_and_unload()
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PaveError(f"task '{task.name}': the adapter {folder} does not fit the base {base}: {reason}") from error
    return merged.eval()


def add_adapters(model: nn.Module, lora: Lora) -> nn.Module:
    """Wrap a model so that only low-rank adapters and the head are trained (peft)."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    try:
        wrapped: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise PaveError(f"training.lora: {error}") from error
    return wrapped


def _load(folder: Path, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    try:
        with quiet_transformers():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True, **changes
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PaveError(f"{folder} could not be loaded as a sequence-classification model: {reason}") from error
    return model, dict(info)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' load reports and progress bars away; what matters of them is checked and told by us."""
    verbosity = transformers_logging.get_verbosity()
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
