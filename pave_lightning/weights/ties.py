"""Tensors that an architecture ties to each other are one tensor, whether a file stores it once or several times."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from pave_lightning.weights.checkpoint import Checkpoint


def tied_names(backbone: nn.Module) -> dict[str, str]:
    """Other names of a backbone's parameters -> the name under which `torch.nn.Module.named_parameters` lists each.

    The configuration has its say: a model whose embeddings are not tied has a parameter for each name.
    """
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        own = first.setdefault(id(parameter), name)
        if own != name:
            tied[name] = own
    return tied


def tie_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Tied tensors that a checkpoint stores several times with different values; reads them."""
    for name in differing_copies(checkpoint):
        yield (
            f"{checkpoint.folder}: {checkpoint.tied[name]} and {name} are one tensor in this architecture, but the "
            "file stores different values under the two names; store the right one alone, or both alike"
        )


def differing_copies(checkpoint: Checkpoint) -> Iterator[str]:
    """Names of tied tensors that a checkpoint also stores under another name with other values; reads them."""
    for name, copy in checkpoint.copies.items():
        first, other = checkpoint.tensor(checkpoint.tied[name]), checkpoint.read(copy)
        if first.shape != other.shape or not torch.equal(first.double(), other.double()):
            yield name
