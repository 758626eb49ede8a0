"""In which type merged weights are written, and rounding them to it: once, after all arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from pave_lightning.config import WrittenDtype
from pave_lightning.errors import PaveError
from pave_lightning.subspace import is_finite

HALVES = (torch.bfloat16, torch.float16)


def written_dtype(asked: WrittenDtype, stored: torch.dtype) -> torch.dtype:
    """The type in which a merged weight is written.

    Args:
        asked: ``base`` for that of the base, but at most float32, in which merging computes; or one type for all.
        stored: in which the base stores the weight.

    Example:
        >>> written_dtype("base", torch.bfloat16), written_dtype("base", torch.float64)
        (torch.bfloat16, torch.float32)
    """
    if asked == "base":
        return stored if stored in HALVES else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[asked]


def rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Finite values in another floating-point type; the same tensor where they have it already.

    Args:
        tensor: any shape and floating-point type.
        dtype: the type.
        name: what the tensor is called, for the message.

    Raises:
        PaveError: a value is larger than the type can hold, which would make it infinite.

    Example:
        >>> rounded(torch.tensor([1.001, -3.0]), torch.bfloat16, "w")
        tensor([ 1., -3.], dtype=torch.bfloat16)
    """
    found = tensor.to(dtype)
    if found is tensor or is_finite(found) or not is_finite(tensor):
        return found
    largest, short = float(tensor.abs().max()), str(dtype).removeprefix("torch.")
    wider = "float32" if dtype == torch.bfloat16 else "bfloat16 or float32"
    raise PaveError(
        f"{name} holds values up to {largest:.4g}, but the largest that {short} can hold is "
        f"{torch.finfo(dtype).max:.4g}; write the model in {wider} (write.dtype), or with a smaller scale"
    )
