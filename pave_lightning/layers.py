"""Which modules multiply their input with one weight matrix; light, so that the callback stays light."""

from __future__ import annotations

import math
import re
import sys
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ConvolutionLayer: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
# What modules call the number of their experts.
_EXPERTS = re.compile(r"(^|_)experts$")
# Names under which the wrappers of FSDP1, activation checkpointing and torch.compile hold what they wrap.
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def plain_name(name: str) -> str:
    """The dotted name of a module or weight without the wrappers around it.

    Example:
        >>> plain_name("encoder.layer.0._fsdp_wrapped_module.output.weight")
        'encoder.layer.0.output.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies its input with one weight matrix: ``nn.Linear``, or the ``Conv1D`` of GPT-2."""
    return isinstance(module, nn.Linear) or _is_transposed(module)


def is_matrix_convolution(module: nn.Module) -> bool:
    """Whether a convolution multiplies each patch of its input with one matrix: all but grouped and transposed ones.

    The matrix has one row an output channel. In a grouped convolution the rows of each group multiply channels of
    their own; in a depthwise one a row is all there is of a group, so that there are no directions to choose from.
    """
    return isinstance(module, CONVOLUTIONS) and module.groups == 1


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalises its input and then multiplies it with one scale a channel (LayerNorm, RMSNorm)."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1


def normalised(module: nn.Module, inputs: Tensor) -> Tensor:
    """What a norm multiplies with its scale: its input, normalised over the last axis.

    Args:
        module: a module for which `is_norm` holds; one of another type than ``nn.LayerNorm`` counts as RMSNorm.
        inputs: shape ``(..., d)``.
    """
    if isinstance(module, nn.LayerNorm):
        return nn.functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None) or torch.finfo(inputs.dtype).eps
    return inputs * (inputs.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


def is_scaled(
    module: nn.Module, normalised_rows: Tensor, outputs: Tensor, *, tolerance: float, or_one_plus: bool = False
) -> bool:
    """Whether a norm's outputs are its normalised input times its scale, plus its shift where it has one.

    Args:
        module: a module for which `is_norm` holds.
        normalised_rows: what `normalised` gives, shape ``(n, d)``.
        outputs: what the module gave, shape ``(n, d)``.
        tolerance: largest difference, relative to the largest output.
        or_one_plus: whether one plus the scale will do as well, as some RMSNorms have it.
    """
    scale, shift = module.get_parameter("weight").float(), getattr(module, "bias", None)
    plain = outputs.float() if shift is None else outputs.float() - shift.float()
    allowed = tolerance * max(float(outputs.abs().max()), torch.finfo(torch.float32).tiny)
    gains = (scale, 1 + scale) if or_one_plus else (scale,)
    return any(float((normalised_rows * gain - plain).abs().max()) <= allowed for gain in gains)


def matrix_weight(module: nn.Module) -> tuple[str, int] | None:
    """Name of the weight by which a module multiplies its input as one matrix, and its axis that meets the input.

    Linear layers, the fused projection of ``nn.MultiheadAttention``, and convolutions without groups, whose kernels are
    one row an output channel; None for all other modules.
    """
    if is_linear(module) or is_matrix_convolution(module):
        return "weight", 0 if _is_transposed(module) else 1
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return "in_proj_weight", 1
    return None


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """``(d_out, d_in)`` of the matrix by which a module multiplies its input.

    Outside of forward passes FSDP1 and DeepSpeed leave a flat piece of a weight, or nothing, in its place; the module
    still knows its sizes.

    Args:
        module: a module for which `matrix_weight` gives a weight.

    Raises:
        ValueError: the module multiplies its input with no matrix.
    """
    found = matrix_weight(module)
    if found is None:
        raise ValueError(f"{type(module).__name__} multiplies its input with no matrix")
    shape = getattr(module, found[0]).shape
    if len(shape) > 1:
        height, width = shape[0], math.prod(shape[1:])
        return (width, height) if found[1] == 0 else (height, width)
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, CONVOLUTIONS):
        return module.out_channels, module.in_channels * math.prod(module.kernel_size)
    if isinstance(module, nn.MultiheadAttention):
        return 3 * module.embed_dim, module.embed_dim
    transposed: Any = module
    return transposed.nf, transposed.nx


def stacked_axis(module: nn.Module, attribute: str) -> int | None:
    """The axis of a mixture's experts, three-dimensional weights, that meets the input; None for other parameters.

    The first axis counts the experts, as the module itself does. Which of the others meets the input says the module
    (``is_transposed``, of transformers), or else the shapes: what the first of two such weights gives, or half of it
    where it is gated, the second takes.
    """
    own = dict(module.named_parameters(recurse=False))
    counts = {value for name, value in vars(module).items() if _EXPERTS.search(name) and isinstance(value, int)}
    stacks = {name: tuple(tensor.shape) for name, tensor in own.items() if tensor.ndim == 3 and len(tensor) in counts}
    if attribute not in stacks:
        return None
    transposed = getattr(module, "is_transposed", None)
    if not isinstance(transposed, bool):
        first, last = stacks[next(iter(stacks))], stacks[list(stacks)[-1]]
        plain = first[2] == last[1] and first[1] in (last[2], 2 * last[2])
        swapped = first[1] == last[2] and first[2] in (last[1], 2 * last[1])
        transposed = len(stacks) > 1 and swapped and not plain
    return 1 if transposed else 2


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is a Conv1D of transformers. A model that holds one has imported transformers, so this need not."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and isinstance(module, transformers.Conv1D)
