"""Forward hooks that turn what passes through norms into mean squares of what their scales multiply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pave_lightning.callbacks.observation import weight_owners
from pave_lightning.callbacks.padding import PartOf, whole
from pave_lightning.callbacks.patches import selected
from pave_lightning.callbacks.sampling import Calls, RowSampler
from pave_lightning.errors import PaveError
from pave_lightning.layers import is_norm, is_scaled, normalised
from pave_lightning.statistics import NormMoment, NormSquares

# How far a norm's output may be from scale times normalised input plus shift, relative to its largest value.
_AGREEMENT = 0.02


def norm_layers(backbone: nn.Module) -> dict[str, list[nn.Module]]:
    """All norms with one scale a channel below a module, named as by `matrix_layers`."""
    return weight_owners(backbone, lambda module: "weight" if is_norm(module) else None)


class NormObserver:
    """Accumulates mean squares of the normalised activations of norms, from forward hooks.

    The normalised activations are computed anew from a norm's input. The first output that is seen of each norm tells
    whether that is what its scale multiplies: norms of another form, such as batch norms, are left out.

    Args:
        layers: name -> the modules that hold its scale, from `norm_layers`.
        sampler: which rows to count; it is told of batches by somebody else.
        part_of: gives the part of the model whose padding mask an input of a module has.
    """

    def __init__(self, layers: Mapping[str, Sequence[nn.Module]], sampler: RowSampler, part_of: PartOf = whole) -> None:
        self._sampler, self._part_of = sampler, part_of
        self._batch = 0
        self._layers = {name: _ObservedNorm(group[0].get_parameter("weight").numel()) for name, group in layers.items()}
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(partial(self._observe, self._layers[name]), with_kwargs=True, prepend=True)
            for name, group in layers.items()
            for module in group
        ]

    def begin_batch(self) -> None:
        """Note that a new batch begins; before its forward pass."""
        self._batch += 1

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def reduce(self, device: torch.device) -> None:
        """Add up what all processes have seen; does nothing without torch.distributed.

        Args:
            device: where a process holds the sums of norms that only other processes have reached.
        """
        names = sorted(self._layers)
        if not names or not (dist.is_available() and dist.is_initialized()):
            return
        unlike = torch.tensor([int(self._layers[name].is_unlike) for name in names], device=device)
        dist.all_reduce(unlike)
        for name, count in zip(names, unlike.tolist(), strict=True):
            self._layers[name].is_unlike = count > 0
            self._layers[name].ensure_squares(device).all_reduce()

    def moments(self) -> dict[str, NormMoment]:
        """Means of all norms of a known form that have seen a row, on the CPU.

        Raises:
            PaveError: a norm has seen NaN or infinite values.
        """
        means = {
            name: layer.squares.moment()
            for name, layer in self._layers.items()
            if layer.squares is not None and layer.squares.rows and not layer.is_unlike
        }
        for name, mean in means.items():
            if not torch.isfinite(mean.squares).all():
                raise PaveError(
                    f"norm '{name}' has seen NaN or infinite values in the {mean.rows} rows of its input (tokens) that "
                    "this pass counted: check the expert's weights and the precision of the Trainer"
                )
        return means

    @torch.no_grad()
    def _observe(
        self, layer: _ObservedNorm, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:  # anything else returned by a forward hook would replace the norm's output
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        inputs = given.detach()
        if layer.is_unlike or inputs.shape[-1:] != (layer.width,) or not isinstance(output, Tensor):
            layer.is_unlike = True
            return
        squares = layer.ensure_squares(inputs.device)
        call = layer.calls.begin(self._batch, squares.rows)
        index, seen = self._sampler.choose(
            tuple(inputs.shape[:-1]),
            self._sampler.allowance(layer.calls.counted),
            call,
            layer.calls.expected,
            self._part_of(module, given),
        )
        rows = normalised(module, selected(inputs, inputs.ndim - 1, index).float())
        if not layer.is_checked and len(rows) and bool(torch.isfinite(rows).all()):
            layer.is_checked = True
            outputs = selected(output, inputs.ndim - 1, index)
            layer.is_unlike = not is_scaled(module, rows, outputs, tolerance=_AGREEMENT, or_one_plus=True)
        squares.update(rows, seen=seen)


class _ObservedNorm:
    """One scale and what it has multiplied so far."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.calls = Calls()
        self.squares: NormSquares | None = None
        self.is_checked = self.is_unlike = False

    def ensure_squares(self, device: torch.device) -> NormSquares:
        if self.squares is None:
            self.squares = NormSquares(self.width, device)
        return self.squares
