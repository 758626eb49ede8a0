"""Purified experts as ordinary model folders that any other tool can load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pave_lightning.errors import PaveError
from pave_lightning.purification import KeptRank
from pave_lightning.weights import Checkpoint, Parameter, ShardWriter, TaskVectors, model_digest
from pave_lightning.weights.checkpoint import INDEX_FILE, StoredTensor

FACTS_FILE = "pave.json"
# Configuration and tokenizer files; what is left out describes how the folder was made, not the model.
COPIED_ENDINGS = (".json", ".jinja", ".model", ".txt")
NOT_COPIED = (INDEX_FILE, FACTS_FILE, "manifest.json", "trainer_state.json")


def write_purified_experts(
    folder: Path,
    vectors: TaskVectors,
    experts: Mapping[str, Checkpoint],
    options: Mapping[str, Any],
    ranks: Iterable[KeptRank] = (),
) -> None:
    """Write one folder a task with its purified expert, head included.

    Each holds the very tensors of the expert's own files, under the same names and in the same dtypes, in shards; only
    matrix weights that purification changed differ. Configuration and tokenizer are copied, and ``pave.json`` says how
    the expert was purified. Memory is bounded by one shard and one tensor.

    Args:
        folder: where ``TASK`` folders are made.
        vectors: purified task vectors. Read one task after the other, so give stored ones; those that are computed when
            they are asked for would be computed anew for each task.
        experts: the checkpoints of the tasks to write, as they were before purification.
        options: how they were purified, as plain values.
        ranks: the ranks that were kept.

    Raises:
        PaveError: a task's folder holds something already, or an expert does not fit the task vectors.
    """
    kept = list(ranks)
    for task, expert in experts.items():
        own = {rank.layer: {"kept": rank.rank, "of": rank.full} for rank in kept if rank.task == task}
        write_purified_expert(folder / task, task, vectors, expert, {"purify": dict(options), "ranks": own})


def write_purified_expert(
    folder: Path, task: str, vectors: TaskVectors, expert: Checkpoint, facts: Mapping[str, Any]
) -> None:
    """Write the purified expert of one task; arguments and result as in `write_purified_experts`.

    Args:
        folder: made if need be; must be empty.
        task: name of the task.
        vectors: purified task vectors.
        expert: the task's checkpoint as it was before purification.
        facts: what ``pave.json`` notes besides the task and the digest of the expert.

    Raises:
        PaveError: the folder holds something already, or the expert does not fit the task vectors.
    """
    if task not in vectors.tasks:
        raise PaveError(f"there are no task vectors of '{task}', only of {', '.join(vectors.tasks)}")
    if folder.exists() and any(folder.iterdir()):
        raise PaveError(f"{folder} is not empty: give a new folder for the purified expert of '{task}'")
    folder.mkdir(parents=True, exist_ok=True)
    matrices = {parameter.name: parameter for parameter in vectors.parameters if parameter.matrices}
    missing = sorted(set(matrices) - set(expert.backbone))
    if missing:
        raise PaveError(f"{expert.folder} has no weight {missing[0]}: it is not the expert of '{task}'")
    purified = {expert.backbone[name].name: parameter for name, parameter in matrices.items()}
    for copy, name in expert.tied.items():
        if copy in expert.copies and name in matrices:
            purified[expert.copies[copy].name] = matrices[name]
    writer = ShardWriter(folder)
    for name, stored in expert.stored():
        tensor = expert.read(stored)
        writer.add(name, _purified(tensor, stored, vectors, task, purified[name]) if name in purified else tensor)
    writer.close()
    for file in sorted(expert.folder.iterdir()):
        if file.is_file() and file.suffix in COPIED_ENDINGS and file.name not in NOT_COPIED:
            shutil.copyfile(file, folder / file.name)
    noted = {"form": "purified expert", "task": task, "expert": model_digest(expert.folder), **facts}
    (folder / FACTS_FILE).write_text(json.dumps(noted, indent=2))


def _purified(tensor: Tensor, stored: StoredTensor, vectors: TaskVectors, task: str, parameter: Parameter) -> Tensor:
    """The purified weight in the stored dtype; the stored one, bit for bit, where purification changed nothing."""
    found = vectors.expert(task, parameter)
    if found.shape != stored.shape:
        raise PaveError(
            f"{stored.file}: {stored.name} is {list(stored.shape)}, but its purified weight {list(found.shape)}"
        )
    return tensor if torch.equal(found, tensor.float()) else found.to(tensor.dtype)
