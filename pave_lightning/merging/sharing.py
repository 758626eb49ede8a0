"""Merge results of which each process has made a part, put together for all of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor

from pave_lightning.merging.merged import MergedVectors
from pave_lightning.merging.modulators import LowRank
from pave_lightning.system.files import write_tensors
from pave_lightning.system.process_groups import ProcessGroup

# What stands before the name of a parameter; the last three with the number of the task.
_VECTOR, _MASK, _LEFT, _RIGHT = "vector", "mask", "left", "right"


def gathered(own: MergedVectors, group: ProcessGroup) -> None:
    """Complete a merge result with what the other processes have made.

    The tensors go through files, which all processes map, so that they stand in memory once, whatever the number of
    processes. Rescalers are known to each already.

    Args:
        own: the result of this process's part.
        group: the processes; where this one is alone, nothing happens.
    """
    if group.size == 1:
        return
    tasks = list(own.masks)
    made = {f"{_VECTOR}/{name}": vector for name, vector in own.vectors.items()}
    for number, task in enumerate(tasks):
        made |= {f"{_MASK}{number}/{name}": mask for name, mask in own.masks[task].items()}
        for name, factors in own.factors[task].items():
            made[f"{_LEFT}{number}/{name}"], made[f"{_RIGHT}{number}/{name}"] = factors.left, factors.right
    files = [group.folder / f"merged-{rank}.safetensors" for rank in range(group.size)]
    write_tensors(files[group.rank], _apart(made))
    group.wait()
    found: dict[str, Tensor] = {}
    for file in files:
        found |= load_file(file)
    group.wait()  # until all have them
    files[group.rank].unlink()
    group.wait()  # or else the next result might be removed in place of this one

    def under(kind: str) -> dict[str, Tensor]:
        return {key.partition("/")[2]: tensor for key, tensor in found.items() if key.startswith(f"{kind}/")}

    own.vectors = under(_VECTOR)
    for number, task in enumerate(tasks):
        own.masks[task] = under(f"{_MASK}{number}")
        left, right = under(f"{_LEFT}{number}"), under(f"{_RIGHT}{number}")
        own.factors[task] = {name: LowRank(left[name], right[name]) for name in left}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous; copies of those that share memory with another one, which safetensors refuses."""
    found, known = {}, set[int]()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone(memory_format=torch.contiguous_format) if place in known else tensor.contiguous()
        known.add(place)
    return found
