"""The patches of its input that a convolution multiplies with its kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pave_lightning.layers import ConvolutionLayer
from pave_lightning.statistics.second_moment import full_precision

# How far a convolution's outputs may be from patches times kernels plus bias, relative to the largest of them.
_AGREEMENT = 0.02
# Patches that are looked at for this.
_LOOKED_AT = 64


def patch_view(module: ConvolutionLayer, inputs: Tensor) -> Tensor:
    """A view of the (padded) input whose last axes are one patch, laid out as the kernel of one output channel.

    Args:
        module: a convolution without groups.
        inputs: shape ``(B, C, *size)``, or ``(C, *size)`` for one example.

    Returns:
        Shape ``(B, *places, C, *kernel)``. Patches that overlap share memory.
    """
    axes = len(module.kernel_size)
    view = inputs if inputs.ndim == axes + 2 else inputs.unsqueeze(0)
    margins = [_margins(module, axis) for axis in range(axes)]
    if any(any(margin) for margin in margins):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        # The last axis comes first.
        view = nn.functional.pad(view, [side for margin in reversed(margins) for side in margin], mode=mode)
    for axis, (size, step, apart) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        view = view.unfold(2 + axis, (size - 1) * apart + 1, step)[..., ::apart]
    return view.movedim(1, 1 + axes)


def _margins(module: ConvolutionLayer, axis: int) -> tuple[int, int]:
    """What is put before and behind an axis of the input."""
    padding = module.padding
    if isinstance(padding, str):
        whole = (module.kernel_size[axis] - 1) * module.dilation[axis] if padding == "same" else 0
        return whole // 2, whole - whole // 2
    return padding[axis], padding[axis]


def selected(tensor: Tensor, axes: int, index: Tensor | None) -> Tensor:
    """The chosen rows of a tensor whose first axes count its rows, shape ``(n, width)``."""
    width = math.prod(tensor.shape[axes:])
    if index is None:
        return tensor.reshape(-1, width)
    index = index.to(tensor.device)
    if tensor.is_contiguous():
        return tensor.reshape(-1, width).index_select(0, index)
    return tensor[torch.unravel_index(index, tensor.shape[:axes])].reshape(-1, width)


def multiplies_patches(module: ConvolutionLayer, patches: Tensor, outputs: Tensor) -> bool:
    """Whether a convolution's outputs are its patches times its kernels plus its bias, as far as some of them tell.

    Subclasses may pad otherwise, or standardise their kernels before they use them.

    Args:
        module: the convolution.
        patches: what `patch_view` gives of its input.
        outputs: what the module gave, shape ``(B, d_out, *places)``, or ``(d_out, *places)`` for one example.
    """
    axes = 1 + len(module.kernel_size)
    found = (outputs if outputs.ndim == axes + 1 else outputs.unsqueeze(0)).movedim(1, -1)
    if found.shape[:-1] != patches.shape[:axes]:
        return False
    count = math.prod(found.shape[:-1])
    index = torch.linspace(0, count - 1, min(count, _LOOKED_AT), device=found.device).round().long()
    rows, own = selected(patches, axes, index).float(), selected(found, axes, index).float()
    bias = None if module.bias is None else module.bias.float()
    with full_precision(rows.device.type):
        expected = nn.functional.linear(rows, module.weight.flatten(1).float(), bias)
    if not bool(torch.isfinite(expected).all() and torch.isfinite(own).all()):
        return True  # which is told where the moments are read
    allowed = _AGREEMENT * max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    return float((own - expected).abs().max()) <= allowed
