"""Merged weights written back as one LoRA adapter of their base, by truncated singular value decompositions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pave_lightning.errors import PaveError, listed, nearest
from pave_lightning.merging.base import PerTaskMethod
from pave_lightning.merging.folders import FACTS_FILE, HEAD_FILE, TOKENS_FILE, load_merged, merged_facts
from pave_lightning.system.files import making_folder
from pave_lightning.tasks.lora import module_names
from pave_lightning.tasks.task import known_kinds
from pave_lightning.weights import Architecture, Checkpoint, Parameter, ParameterKind, locate_model
from pave_lightning.weights.adapter_writing import AdapterFit, AdapterWriter
from pave_lightning.weights.checkpoint import stored_tensors
from pave_lightning.weights.empty_models import read_config


class _Weights:
    """Merged weights of a backbone, read one parameter at a time, by the names under which the base stores them.

    Args:
        merged: folder of a merged model or of another one of that base, or the weights themselves.
        architecture: that of the base.
        task: whose weights they are, of a merged model that keeps something for each task.
        base: how the base is named.
    """

    def __init__(
        self, merged: Path | Mapping[str, Tensor], architecture: Architecture, task: str | None, base: str
    ) -> None:
        self._tensors: Mapping[str, Tensor] | None = None
        if not isinstance(merged, Path):
            self._tensors = merged
        elif (merged / FACTS_FILE).is_file() and merged_facts(merged)["form"] == PerTaskMethod.form:
            if task is None:
                tasks = sorted(head.name for head in (merged / "heads").iterdir())
                raise PaveError(
                    f"{merged} has other weights for each task, so an adapter is one of a task: name one of "
                    f"{listed(tasks)}"
                )
            prefix, names = f"{architecture.prefix}.", {own: name for name, own in architecture.stored_names.items()}
            state = load_merged(merged, task, base).state_dict()
            inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            self._tensors = {names.get(name, name): value for name, value in inner.items()}
        else:
            self._checkpoint = architecture.checkpoint(merged)
        self.names = set(self._checkpoint if self._tensors is None else self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        found = self._checkpoint.backbone[name] if self._tensors is None else self._tensors[name]
        return tuple(found.shape)

    def tensor(self, name: str) -> Tensor:
        return (self._checkpoint.tensor(name) if self._tensors is None else self._tensors[name]).detach()

    def of_head(self, base: Checkpoint) -> Iterator[tuple[Parameter, Tensor, Tensor]]:
        """What both models hold outside of the backbone, such as the untied output layer of a language model."""
        for name, stored in sorted(self._checkpoint.head.items() if self._tensors is None else ()):
            other = base.head.get(name)
            if other is not None and stored.is_floating and stored.shape == other.shape:
                is_linear = len(stored.shape) == 2 and name.endswith(".weight")
                kind = ParameterKind.LINEAR if is_linear else ParameterKind.OTHER
                parameter = Parameter(name, kind, stored.shape, 1 if is_linear else None)
                yield parameter, Checkpoint.read(stored), Checkpoint.read(other)


def write_adapter(
    folder: str | Path,
    merged: str | Path | Mapping[str, Tensor],
    base: str | None = None,
    *,
    rank: int,
    task: str | None = None,
    keep_whole: bool = False,
) -> AdapterFit:
    r"""Write merged weights as one LoRA adapter of their base, an ordinary folder that peft loads.

    Of each layer's update :math:`W - W_0` the :math:`r` leading singular triplets are kept, which is the nearest matrix
    of that rank (Eckart and Young, 1936): :math:`B = U_r S_r^{1/2}`, :math:`A = S_r^{1/2} V_r^T`, float32, with scaling
    1. Layers whose update has a lower rank get that rank. Linear layers and convolutions that are matrix products have
    factors; the updates of norms, biases and embeddings have none and are left out unless ``keep_whole`` is set.

    Example::

        fit = write_adapter("merged-lora", "checkpoints/quickstart/merged/ties-plain", rank=16)
        fit.error  # such as 0.31: the norm of what is missing, divided by that of the whole update

    Without a task the adapter is that of the model that the merged folder's (or else the base's) ``config.json``
    names, which for our merged models is the bare backbone (`transformers.AutoModel`). With a task it is that of the
    model with the task's head, which it holds whole (``modules_to_save``).

    Args:
        folder: where it is written; it must not exist.
        merged: folder of a merged model, or of any other one of that base; or weights of the base's backbone by their
            names there (any float dtype).
        base: folder, hub id or ``package:NAME/FOLDER`` of the base; by default the one that the merged folder names.
        rank: the largest rank of a layer's update.
        task: a task of a merged folder, whose head is to be in the adapter. Where tasks have weights of their own, one
            must be named.
        keep_whole: whether what has no low-rank factors is kept as it is: norms and embeddings as ``modules_to_save``,
            biases with ``bias: all``.

    Returns:
        How near the adapter comes to the merged weights; README.md in the folder says it too.

    Raises:
        PaveError: ``folder`` exists, the rank is below 1, there is no such model, task or base, the weights do not
            fit the base, or they are the base's.
    """
    folder, source = Path(folder), merged if isinstance(merged, Mapping) else locate_model(str(merged), role="merged")
    reference = _request(folder, source, base, rank, task)
    base_folder = locate_model(reference, role="base")
    own = source / "heads" / task if isinstance(source, Path) and task is not None else None
    named = own or (source if isinstance(source, Path) else base_folder)
    architecture = Architecture.of_folder(named)
    checkpoint = architecture.checkpoint(base_folder)
    weights = _Weights(source, architecture, task, reference)
    _check_fit(weights, checkpoint, base_folder)
    # Whole models hold the backbone under its prefix, bare ones are it.
    prefix = f"{architecture.prefix}." if architecture.weights[0].names[0] not in architecture.parameters else ""
    writer = AdapterWriter(rank, keep_whole=keep_whole)
    for name, stored in sorted(checkpoint.backbone.items()):
        if name in weights.names and stored.is_floating and architecture.merges(name):
            found = architecture.describe(name, stored.shape)
            parameter = replace(found, name=f"{prefix}{name}", module=f"{prefix}{found.layer}")
            writer.add(parameter, weights.tensor(name), checkpoint.tensor(name))
    for parameter, merged_head, base_head in weights.of_head(checkpoint):
        writer.add(parameter, merged_head, base_head)
    if not writer.has_update:
        raise PaveError(f"these weights are those of the base {base_folder}, so there is nothing to write")
    if not writer.has_factors:
        raise PaveError("no layer that can have factors differs from the base, so there is no adapter to write")
    auto_model, peft_type, outputs = architecture.model_class if prefix else "AutoModel", None, None
    if own is not None:
        auto_model, peft_type = _kind(own, architecture)
        outputs = _add_head(writer, own, architecture)
    fit = writer.fit()
    with making_folder(folder) as place:
        modules = module_names(architecture.parameters.values())
        writer.write(place, reference, peft_type, [f"{prefix}{name}" for name in modules])
        (place / "README.md").write_text(_card(reference, auto_model, fit, task, outputs), encoding="utf-8")
    return fit


def _request(folder: Path, source: Path | Mapping[str, Tensor], base: str | None, rank: int, task: str | None) -> str:
    """How the base is named.

    Raises:
        PaveError: what was asked for cannot be.
    """
    if folder.exists():
        raise PaveError(f"{folder} exists already; name another folder")
    if rank < 1:
        raise PaveError(f"rank must be at least 1, found {rank}")
    heads = source / "heads" if isinstance(source, Path) and (source / FACTS_FILE).is_file() else None
    tasks = sorted(head.name for head in heads.iterdir()) if heads is not None and heads.is_dir() else []
    if task is not None and task not in tasks:
        known = nearest(task, tasks) if tasks else "only folders of merged models hold heads"
        raise PaveError(f"there is no head for task '{task}'; {known}")
    if heads is not None and task is not None and (heads / task / TOKENS_FILE).is_file():
        raise PaveError(
            f"task '{task}' has tokens that the base lacks, and an adapter has no place for their rows; write one "
            "without a task"
        )
    if base is not None:
        return base
    if not (isinstance(source, Path) and tasks):
        raise PaveError("name the base: only folders of merged models say which it is")
    return str(merged_facts(source)["base"])


def _check_fit(weights: _Weights, base: Checkpoint, folder: Path) -> None:
    shared = [name for name in base if name in weights.names]
    if not shared:
        raise PaveError(f"these weights have none of the names of the base {folder}, such as {next(iter(base), '')}")
    for name in shared:
        if weights.shape(name) != base.backbone[name].shape:
            raise PaveError(
                f"these weights are not of the base {folder}: {name} is {list(weights.shape(name))}, but "
                f"{list(base.backbone[name].shape)} in the base"
            )


def _kind(head: Path, architecture: Architecture) -> tuple[str, str | None]:
    """The class of transformers that builds a model with a head, and the ``task_type`` of its adapters."""
    for kind in known_kinds().values():
        try:
            found = Architecture.of_folder(head, kind.auto_model)
        except PaveError:  # no kind of task that such a model can be of
            continue
        if found.model_class == architecture.model_class:
            return kind.auto_model, kind.peft_type
    return architecture.model_class, None


def _add_head(writer: AdapterWriter, head: Path, architecture: Architecture) -> int:
    """Add a task's head whole; gives the number of its outputs."""
    stored = {architecture.renamed.get(name, name): found for name, found in stored_tensors(head / HEAD_FILE).items()}
    unknown = [name for name in stored if name not in architecture.state]
    if unknown:
        raise PaveError(
            f"the head in {head} holds {listed(unknown, 3)}, for which a {architecture.model_class} has no place; it "
            "was fitted to the merged model with an intercept. Write an adapter without a task"
        )
    for module in sorted({name.rpartition(".")[0] for name in stored}):
        own = {name: Checkpoint.read(found) for name, found in stored.items() if name.rpartition(".")[0] == module}
        writer.add_module(module, own)
    return int(read_config(head).num_labels)


CARD = """\
---
base_model: {base}
library_name: peft
tags: [lora, merged, pave-lightning]
---

# A merged model as one LoRA adapter

```python
from peft import PeftModel
from transformers import {auto_model}

base = {auto_model}.from_pretrained({loading})
model = PeftModel.from_pretrained(base, "FOLDER")
```

{about}

{lines}
"""


def _card(reference: str, auto_model: str, fit: AdapterFit, task: str | None, outputs: int | None) -> str:
    loading = json.dumps(reference) + (f", num_labels={outputs}" if outputs is not None else "")
    about = "It changes the backbone alone." if task is None else f"It holds the head of the task `{task}` as well."
    lines = "\n".join(f"* {line}" for line in fit.lines())
    return CARD.format(base=json.dumps(reference), auto_model=auto_model, loading=loading, about=about, lines=lines)
