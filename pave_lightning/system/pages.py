"""Memory that goes back to the system as soon as it is let go, whatever else the C library's heap holds."""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Smaller tensors stay in the heap.
WORTH_PAGES = 1 << 18


def zeros_on_pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """Zeros that lie on pages of their own where they are large, on a CPU, and the system has such pages.

    What is held for long between tensors that come and go leaves holes in the heap when it is freed, and keeps others
    from being filled. Pages take memory only once they are written to.

    Args:
        shape: the shape.
        dtype: the type.
        device: where they lie; the CPU where None.
    """
    import torch

    size = math.prod(shape) * dtype.itemsize
    on_cpu = device is None or torch.device(device).type == "cpu"
    if not on_cpu or size < WORTH_PAGES or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
