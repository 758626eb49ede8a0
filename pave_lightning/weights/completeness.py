"""Whether the files of a checkpoint hold what the model has, from the headers alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.backbones import lies_in
from pave_lightning.weights.checkpoint import Checkpoint

# What wraps a model, or layers of it, and goes into the names of its weights.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "a Lightning strategy",
    "model": "a LightningModule",
    "base_model": "peft",
    "base_layer": "peft, with adapters that are not merged",
    "original_module": "peft, with a copy of the module",
}
# Where they may stand inside of a name: those that no model uses as names of its own layers.
_INNER = frozenset(_WRAPPERS) - {"model", "base_model"}


def naming_problem(architecture: Architecture, checkpoint: Checkpoint) -> str | None:
    """Why the weights of a checkpoint have other names than the model's, where a wrapper or a prefix is the reason.

    Args:
        architecture: what the checkpoint's configuration gives.
        checkpoint: its files.
    """
    start = f"{architecture.prefix}." if architecture.prefix else ""
    expected = {name for weight in architecture.weights for name in weight.names}
    expected |= architecture.renamed.keys() | architecture.places.keys()
    expected |= {name.removeprefix(start) for name in expected}
    if not architecture.start:  # a bare model, whose checkpoint may be that of a model with a head
        expected |= {f"{start}{name}" for name in expected}
    names = [re.sub(r"LayerNorm\.(gamma|beta)$", _modern, name) for name, _ in checkpoint.stored()]
    own = sum(name in expected for name in names)
    found = Counter(filter(None, (_surplus(name, expected) for name in names if name not in expected)))
    if not found:
        return None
    surplus, count = found.most_common(1)[0]
    if count <= own and not _INNER & set(surplus.strip(".").split(".")):
        return None
    known = next((f" ({_WRAPPERS[part]})" for part in surplus.strip(".").split(".") if part in _WRAPPERS), "")
    example = next(name for name in names if name not in expected and _surplus(name, expected) == surplus)
    return (
        f"the names of {count} of its weights have '{surplus}' in them{known}, as {example}, which a "
        f"{architecture.model_class} does not have; save the inner model itself with save_pretrained"
    )


def lacking_weights(architecture: Architecture, checkpoint: Checkpoint) -> list[str]:
    """Parameters of a fine-tuned model, backbone and head, that its files lack or hold in another shape.

    Args:
        architecture: what its configuration gives.
        checkpoint: its files.

    Returns:
        One text each, which begins with the parameter's name.
    """
    return list(_lacking(architecture, _shapes(architecture, checkpoint)))


def unused_weights(architecture: Architecture, checkpoint: Checkpoint) -> list[str]:
    """Floating-point tensors outside of the backbone that the model has no place for.

    Args:
        architecture: what its configuration gives.
        checkpoint: its files.
    """
    own = {*architecture.state, *(name for weight in architecture.weights for name in weight.names)}
    own |= architecture.renamed.keys() | architecture.places.keys()
    return [
        name
        for name, stored in checkpoint.head.items()
        if stored.is_floating
        and name not in own
        and not any(re.search(pattern, name) for pattern in architecture.obsolete)
    ]


def lacking_of_base(architecture: Architecture, base: Checkpoint) -> list[str]:
    """Weights of the backbone that a base lacks and that cannot start at random.

    Whole submodules that it lacks, such as a pooler, are of each expert's own, as its head is. Submodules that hold
    embeddings or a stack of blocks never are.

    Args:
        architecture: what the base's configuration gives.
        base: the base's files.
    """
    prefix = architecture.start
    lacking = [
        found.removeprefix(prefix)
        for found in _lacking(architecture, _shapes(architecture, base))
        if found.startswith(prefix)
    ]
    absent = set(architecture.children) - {name.partition(".")[0] for name in base.backbone}
    # A model of images and texts has no head that a task could bring.
    private = set() if architecture.frozen else {name for name in absent if not architecture.children[name]}
    return [found for found in lacking if not lies_in(found.partition(" ")[0], private)]


def _shapes(architecture: Architecture, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes of all stored tensors by the names that the model has for them."""
    renamed, prefix = architecture.renamed, architecture.start
    whole = {f"{prefix}{name}": tensor for name, tensor in checkpoint.backbone.items()} | checkpoint.head
    found = {renamed.get(name, name): tensor.shape for name, tensor in whole.items()}
    shapes = {name: weight.shape for weight in architecture.weights for name in weight.names}
    pieces: dict[str, int] = {}
    for stored, place in architecture.places.items():
        there = stored in whole and whole[stored].size == sum(math.prod(piece.shape) for piece in place.pieces)
        for piece in place.pieces if there else ():
            pieces[piece.parameter] = pieces.get(piece.parameter, 0) + math.prod(piece.shape)
    # What lies in the file in parts is there where they make up the whole.
    return found | {
        name: shapes[name] for name, size in pieces.items() if name in shapes and size == math.prod(shapes[name])
    }


def _lacking(architecture: Architecture, stored: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """A tied parameter has several names, and one of them is enough."""
    for weight in architecture.weights:
        found = next((stored[name] for name in weight.names if name in stored), None)
        if found is None:
            yield f"{weight.names[0]} is not there"
        elif found != weight.shape:
            yield f"{weight.names[0]} is {list(found)} in the file, but {list(weight.shape)} by config.json"


def _surplus(name: str, expected: Collection[str]) -> str | None:
    """What a name has that an expected one has not: in front, or as the name of a wrapper inside of it."""
    parts = name.split(".")
    for start in range(1, len(parts)):
        if ".".join(parts[start:]) in expected:
            return ".".join(parts[:start]) + "."
    inner = [part for part in parts if part in _INNER]
    kept = [part for part in parts if part not in _INNER]
    if inner and any(".".join(kept[start:]) in expected for start in range(len(kept))):
        return f".{inner[0]}."
    return None


def _modern(found: re.Match[str]) -> str:
    return "LayerNorm." + {"gamma": "weight", "beta": "bias"}[found[1]]
