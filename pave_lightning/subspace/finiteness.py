"""Whether all values are numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor of any shape holds neither NaN nor infinity; needs no memory of its size.

    Example:
        >>> is_finite(torch.tensor([1.0, -2.0])), is_finite(torch.tensor([1.0, float("nan")]))
        (True, False)
    """
    if not tensor.numel():
        return True
    # Both ends are NaN where any element is.
    return all(math.isfinite(end) for end in torch.aminmax(tensor.detach()))
