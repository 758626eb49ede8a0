"""From folders to models: base models that get a new head, experts that have one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pave_lightning.errors import PaveError, counted, foreign, listed
from pave_lightning.tasks.heads import HeadForm
from pave_lightning.tasks.task import Task
from pave_lightning.tasks.tokenizers import set_padding
from pave_lightning.weights import Checkpoint, is_finite
from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.backbones import backbone_of, name_prefix, with_backbone
from pave_lightning.weights.checkpoint import StoredTensor, weight_files
from pave_lightning.weights.completeness import lacking_of_base, lacking_weights, naming_problem
from pave_lightning.weights.empty_models import auto_class, form_of, read_config
from pave_lightning.weights.quiet import quiet_transformers


def load_with_new_head(base: Path, task: Task) -> nn.Module:
    """The base model in float32 with a head of the task's size, drawn from torch's current seed.

    A head that the base may have already is not kept.

    Raises:
        PaveError: the base cannot be loaded, lacks weights of its backbone or has them in other shapes than its
            configuration says, or holds NaN or infinity.
    """
    return load_base(base, task.head_form)


def load_base(base: Path, form: HeadForm, head: Mapping[str, StoredTensor] | None = None) -> nn.Module:
    """The base model in float32 with a new head.

    Args:
        base: folder of the base.
        form: what the model is built from.
        head: what of the head is not drawn, but read; by the names of the parameters.

    Raises:
        PaveError: as `load_with_new_head` says.
    """
    weight_files(base)
    loaded, info = _load(base, form.auto_model, ignore_mismatched_sizes=True, **form.config)
    prefix = name_prefix(loaded)
    wrong = sorted(str(entry[0]) for entry in info["mismatched_keys"] if str(entry[0]).startswith(prefix))
    if wrong:
        raise PaveError(f"{base}: {len(wrong)} weights have other shapes than config.json says, first {wrong[0]}")
    problem = base_problem(base, Architecture.of_model(loaded))
    if problem is not None:
        raise PaveError(f"{base}: {problem}")
    missing = set(info["missing_keys"])
    read = ((name, value) for name, value in backbone_of(loaded).named_parameters() if f"{prefix}{name}" not in missing)
    _check_finite(read, base)
    set_padding(loaded, base)
    backbone, model = backbone_of(loaded), loaded
    if backbone is not loaded:
        config: Any = loaded.config
        model = with_backbone(auto_class(form.auto_model).from_config(config).float(), backbone)
    for name, stored in (head or {}).items():
        model.get_parameter(name).data = Checkpoint.read(stored).float()
    return model


def base_problem(base: Path, architecture: Architecture) -> str | None:
    """What a base's files lack of its backbone, or hold under names of their own; None where it is whole.

    Args:
        base: folder of the base.
        architecture: what its configuration gives.
    """
    checkpoint = architecture.checkpoint(base)
    problem = naming_problem(architecture, checkpoint)
    lacking = lacking_of_base(architecture, checkpoint)
    if problem is None and lacking:
        problem = (
            f"{counted(len(lacking), 'weight')} of the model cannot be filled from its files ({listed(lacking, 3)}); "
            "fetch it again"
        )
    return problem


def _check_finite(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    broken = [name for name, value in weights if value.is_floating_point() and not is_finite(value.detach())]
    if broken:
        raise PaveError(
            f"{folder}: {len(broken)} weights hold NaN, infinity, or values too large for float32 "
            f"({listed(broken, 3)}); fetch or save the checkpoint again"
        )


def load_expert(folder: Path, task: Task, base: Path | None = None) -> nn.Module:
    """A fine-tuned model in float32, with its own head, in eval mode; its configuration names the padding token.

    Args:
        folder: folder of the expert.
        task: its task.
        base: folder of the base model, whose tokenizer an expert without tokenizer files has.

    Raises:
        PaveError: the checkpoint lacks weights of the head or the backbone, its head is of another size, or a weight
            holds NaN or infinity.
    """
    weight_files(folder)
    problem = expert_problem(folder, task.auto_model)
    if problem is not None:
        raise PaveError(f"task '{task.name}': {folder}: {problem}")
    model, info = _load(folder, task.auto_model)
    missing = sorted(info["missing_keys"])
    if missing:
        raise PaveError(
            f"task '{task.name}': the checkpoint {folder} lacks {counted(len(missing), 'weight')}, among them "
            f"{', '.join(missing[:3])}; expected a fine-tuned {form_of(task.auto_model)} with its head"
        )
    outputs, asked = int(model.config.num_labels), task.head_config.get("num_labels")  # type: ignore[union-attr, arg-type]
    if asked not in (None, outputs):
        raise PaveError(
            f"task '{task.name}': the head of {folder} has {outputs} outputs, but the task needs {asked}; "
            "check the task's classes"
        )
    _check_finite(model.state_dict().items(), folder)
    set_padding(model, folder, base)
    return model.eval()


def expert_problem(folder: Path, auto_model: str | None = None) -> str | None:
    """What the files of a fine-tuned model lack, or hold under names of their own; None where they are whole.

    Args:
        folder: folder of the model.
        auto_model: as `empty_model` takes it.
    """
    architecture = Architecture.of_folder(folder, *([auto_model] if auto_model else []))
    if auto_model is None and not architecture.head:
        return f"is a {architecture.model_class}, which has no head; expected a fine-tuned model"
    checkpoint = architecture.checkpoint(folder)
    problem = naming_problem(architecture, checkpoint)
    if problem is not None:
        return problem
    lacking = lacking_weights(architecture, checkpoint)
    if not lacking:
        return None
    prefix = f"{architecture.prefix}."
    head = [found for found in lacking if not found.startswith(prefix)]
    every = len(architecture.head)
    if head and len(head) == every and all(found.endswith("is not there") for found in head):
        first = head[0].partition(" ")[0]
        return f"has no head of a {form_of(auto_model)} (no {first}); expected a fine-tuned one"
    return (
        f"lacks {counted(len(lacking), 'weight')} of a {architecture.model_class}, or has them in another shape: "
        f"{listed(lacking, 3)}; they would be drawn at random; expected a whole fine-tuned model"
    )


def _load(folder: Path, auto_model: str, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    read_config(folder)  # which refuses what could not even be built
    with foreign(f"{folder} could not be loaded as a {form_of(auto_model)}"), quiet_transformers():
        model, info = auto_class(auto_model).from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **changes,
        )
    return model, dict(info)
