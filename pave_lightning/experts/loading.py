"""From folders to models: base models that get a new head, experts that have one, peft adapters of a base."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from pave_lightning.errors import PaveError, foreign, reason
from pave_lightning.experts.tokenizers import set_padding
from pave_lightning.files import read_json
from pave_lightning.layers import is_linear
from pave_lightning.recipe import Lora, Task
from pave_lightning.weights.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pave_lightning.weights.architecture import backbone_of, empty_classifier, lies_in, read_config
from pave_lightning.weights.checkpoint import stored_tensors, weight_files
from pave_lightning.weights.embeddings import resize_rows, token_embeddings


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
    """The base model in float32 with a head of the task's size, drawn from torch's current seed.

    A head that the base may have already is not kept.

    Raises:
        PaveError: the base cannot be loaded, or weights of its backbone have other shapes than its configuration says.
    """
    return _with_new_head(base, label_names(task))


def _with_new_head(base: Path, labels: dict[str, Any]) -> nn.Module:
    weight_files(base)
    loaded, info = _load(base, ignore_mismatched_sizes=True, **labels)
    prefix = f"{loaded.base_model_prefix}."
    wrong = sorted(str(entry[0]) for entry in info["mismatched_keys"] if str(entry[0]).startswith(prefix))
    if wrong:
        raise PaveError(f"{base}: {len(wrong)} weights have other shapes than config.json says, first {wrong[0]}")
    set_padding(loaded, base)
    config: Any = loaded.config
    model: nn.Module = AutoModelForSequenceClassification.from_config(config).float()
    setattr(model, str(model.base_model_prefix), backbone_of(loaded))
    return model


def load_expert(folder: Path, task: Task, base: Path | None = None) -> nn.Module:
    """A fine-tuned model in float32, with its own head, in eval mode; its configuration names the padding token.

    Args:
        folder: folder of the expert.
        task: its task.
        base: folder of the base model, whose tokenizer an expert without tokenizer files has.

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
    set_padding(model, folder, base)
    return model.eval()


def load_adapter(base: Path, folder: Path, task: Task) -> nn.Module:
    """A peft adapter merged into the base: the same kind of model as full fine-tuning gives.

    Raises:
        PaveError: the adapter does not fit the base, or has no head.
    """
    return _merged_adapter(base, folder, task.name, lambda: label_names(task))


def load_adapter_alone(base: Path, folder: Path, task: str) -> nn.Module:
    """A peft adapter merged into the base, with a head as large as the adapter says; it does not name the outputs.

    Args:
        base: folder of the base model.
        folder: folder of the adapter.
        task: name of its task, for messages.

    Raises:
        PaveError: the adapter does not fit the base, or has no head.
    """
    return _merged_adapter(base, folder, task, lambda: _labels_of_adapter(base, folder))


def _merged_adapter(base: Path, folder: Path, task: str, labels: Callable[[], dict[str, Any]]) -> nn.Module:
    from peft import PeftModel

    problems = adapter_problems(folder)
    if problems:
        raise PaveError(f"task '{task}': {problems[0]}")
    with foreign(f"task '{task}': the adapter {folder} does not fit the base {base}"):
        model = _with_new_head(base, labels())
        rows = embedding_rows(folder, token_embeddings(backbone_of(model)))
        if rows is not None:
            resize_rows(backbone_of(model), rows)
        adapted = PeftModel.from_pretrained(model, folder)
        merged: nn.Module = adapted.merge_and_unload()
    return merged.eval()


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


def _labels_of_adapter(base: Path, folder: Path) -> dict[str, Any]:
    """The part of a configuration that describes the head which an adapter holds."""
    model, config = empty_classifier(base), read_config(base)
    stored, backbone = stored_tensors(folder / ADAPTER_WEIGHTS), [str(model.base_model_prefix)]
    # The last layer is the one that has as many outputs as the base's configuration says.
    for name, parameter in reversed(list(model.named_parameters())):
        found = stored.get(f"base_model.model.{name}")
        if found is not None and not lies_in(name, backbone) and parameter.shape[0] == config.num_labels:
            outputs = found.shape[0]
            kind = "regression" if outputs == 1 else "single_label_classification"
            return {"num_labels": outputs, "problem_type": kind}
    raise ValueError(f"it has no head of a {type(model).__name__}")


def adapter_problems(folder: Path) -> list[str]:
    """What is wrong with a peft adapter as far as its configuration and file header tell."""
    try:
        settings = read_json(folder / ADAPTER_CONFIG, "save the adapter again")
    except PaveError as error:
        return [str(error)]
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        return [f"{folder} has no adapter_model.safetensors; pickled adapters are refused"]
    try:
        stored_tensors(weights, "save the adapter again")
    except PaveError as error:
        return [str(error)]
    if not settings.get("modules_to_save"):
        return [f"the adapter {folder} holds no head (modules_to_save is empty); train it with task_type SEQ_CLS"]
    return []


def add_adapters(model: nn.Module, lora: Lora, *, frozen: Sequence[str], private: Collection[str]) -> nn.Module:
    """Wrap a model so that only low-rank adapters and the head are trained (peft).

    Args:
        model: a sequence-classification model.
        lora: rank, scaling and which layers.
        frozen: submodules of the backbone that get no adapters.
        private: direct submodules of the backbone that the base has no weights for, such as a pooler; they start at
            random, so they are trained whole and kept with the head.

    Raises:
        PaveError: no layer of the backbone is meant by ``target_modules``.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    prefix = str(model.base_model_prefix)
    whole = [name for name, child in model.named_children() if name != prefix and list(child.parameters())]
    whole += [f"{prefix}.{name}" for name in private]
    without = [*whole, *(f"{prefix}.{name}" for name in frozen)]
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=whole,
        exclude_modules=[
            name for name, module in model.named_modules() if is_linear(module) and lies_in(name, without)
        ],
    )
    try:
        wrapped: nn.Module = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise PaveError(f"training.lora: {reason(error)}") from error
    return wrapped


def _load(folder: Path, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    read_config(folder)  # which refuses what could not even be built
    with foreign(f"{folder} could not be loaded as a sequence-classification model"), quiet_transformers():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **changes,
        )
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
