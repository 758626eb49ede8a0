"""Heads of language models that are tied to the embedding in some checkpoints and not in others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pave_lightning.errors import PaveError
from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.ties import differing_copies


def with_heads_apart(architecture: Architecture, folders: Sequence[Path]) -> Architecture:
    """The architecture in which base and experts can be compared: tied only what all of them tie.

    A configuration may tie what a file stores twice with different values (T5 v1.1 and Flan-T5); transformers then
    goes by the file, and so does this. What one checkpoint ties and another does not is a parameter of its own, of
    which the former has the values that it is tied to. Other models than language models are returned as they are.

    Args:
        architecture: that of an expert.
        folders: the base and the experts; reads the tied tensors that they store twice.
    """
    if architecture.prefix:
        return architecture
    copied: dict[str, str] = {}
    for folder in folders:
        checkpoint = architecture.checkpoint(folder)
        copied |= {name: checkpoint.tied[name] for name in differing_copies(checkpoint)}
        try:
            own = Architecture.of_folder(folder)
        except PaveError:  # a base without a class of its own; what it stores is looked at all the same
            continue
        if own.model_class == architecture.model_class:
            copied |= {name: source for name, source in own.tied.items() if name in architecture.parameters}
    return architecture.untied(copied) if copied else architecture
