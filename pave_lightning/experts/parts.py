"""Experts that are a part of their base: the vision encoder alone of a model that reads images and texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pave_lightning.errors import PaveError, counted, listed
from pave_lightning.experts.loading import load_with_new_head
from pave_lightning.tasks.task import Task
from pave_lightning.weights import Checkpoint
from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.backbones import lies_in
from pave_lightning.weights.checkpoint import StoredTensor, is_finite_in_float32, stored_tensors, weight_files
from pave_lightning.weights.configuration import differences_in_function
from pave_lightning.weights.empty_models import read_config


def is_part(folder: Path, base: Path, auto_model: str) -> bool:
    """Whether an expert is of the kind of a part of its base, as the vision encoder of CLIP is.

    Only bases are asked of which tasks change a part (`Architecture.frozen`).

    Args:
        folder: folder of the expert.
        base: folder of the base.
        auto_model: name of the class of transformers that builds the whole model.
    """
    if not Architecture.of_folder(base, auto_model).frozen:
        return False
    own, whole = read_config(folder), read_config(base)
    return own.model_type != whole.model_type and _own_section(own, whole) is not None


def part_problems(task: Task, folder: Path, base: Path) -> Iterator[str]:
    """What keeps a part from taking its place in the base, in words that begin with the folder.

    Args:
        task: the task.
        folder: folder of the expert, for which `is_part` holds.
        base: folder of the base.
    """
    own = read_config(folder)
    for one in differences_in_function(_own_section(own, read_config(base)), own):
        yield (
            f"{folder}: {one.key} is {one.expert!r} in its config.json, {one.base!r} in that part of the base's; "
            "name an expert of this base"
        )
    try:
        found = part_weights(task, folder, base)
    except PaveError as error:
        yield str(error)
        return
    broken = [name for name, tensor in found.items() if not is_finite_in_float32(Checkpoint.read(tensor))]
    for name in broken:
        yield f"{folder}: the weight {name} holds NaN, infinity, or values too large for float32"
    of_base = Architecture.of_folder(base, task.auto_model).checkpoint(base)
    pairs = ((Checkpoint.read(tensor).float(), of_base.tensor(name).float()) for name, tensor in found.items())
    if not broken and all(torch.equal(own, its) for own, its in pairs):
        yield f"{folder} is the base's own, so there is nothing to merge; was it fine-tuned?"


def part_weights(task: Task, folder: Path, base: Path) -> dict[str, StoredTensor]:
    """The weights of a part by the names that the base has for them.

    Args:
        task: the task.
        folder: folder of the expert, for which `is_part` holds.
        base: folder of the base.

    Raises:
        PaveError: no part of the base has weights of these names and shapes.
    """
    whole = Architecture.of_folder(base, task.auto_model)
    read = [stored_tensors(file) for file in weight_files(folder)]
    stored = {name: tensor for found in read for name, tensor in found.items() if tensor.is_floating}
    shapes = {name: one.shape for name, one in whole.parameters.items() if not lies_in(name, whole.frozen)}
    children = [child for child in whole.children if child not in whole.frozen]
    # Releases of transformers differ in whether the name of the part stands in front.
    starts = ("", *(f"{child}." for child in children))
    strays = {
        start: [name for name, one in stored.items() if shapes.get(start + name) != one.shape] for start in starts
    }
    start = min(starts, key=lambda one: len(strays[one]))
    if strays[start] or not stored:
        told = [f"{name} {list(stored[name].shape)}" for name in strays[start]]
        raise PaveError(
            f"{folder}: {len(told)} of its {counted(len(stored), 'weight')} have no place in the base's "
            f"{whole.model_class} ({listed(told, 3)}); name an expert of this base"
        )
    named = {start + name: tensor for name, tensor in stored.items()}
    touched = {name.partition(".")[0] for name in named}
    lacking = [name for name in shapes if name.partition(".")[0] in touched and name not in named]
    if lacking:
        raise PaveError(
            f"{folder}: it lacks {counted(len(lacking), 'weight')} of the base's part ({listed(lacking, 3)}); fetch or "
            "save it again"
        )
    return named


def load_part(task: Task, folder: Path, base: Path) -> nn.Module:
    """The base in float32 with an expert in the place of the part that it is, in eval mode.

    Args:
        task: the task.
        folder: folder of the expert, for which `is_part` holds.
        base: folder of the base.

    Raises:
        PaveError: one of the two cannot be used.
    """
    problem = next(part_problems(task, folder, base), None)
    if problem is not None:
        raise PaveError(f"task '{task.name}': {problem}")
    model = load_with_new_head(base, task)
    with torch.no_grad():
        for name, tensor in part_weights(task, folder, base).items():
            model.get_parameter(name).copy_(Checkpoint.read(tensor))
    return model.eval()


def _own_section(own: Any, whole: Any) -> Any:
    """The configuration of that part of a whole model that is of a model's own kind; None where there is none."""
    sections = (getattr(whole, name, None) for name in getattr(whole, "sub_configs", {}))
    return next((one for one in sections if getattr(one, "model_type", None) == own.model_type), None)
