"""Forward hooks that turn what passes through linear layers into second moments."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pave_lightning.errors import PaveError
from pave_lightning.statistics import LayerMoment, SecondMoment
from pave_lightning.statistics.second_moment import float32_products_are_exact, full_precision

Moments = Literal["smallest", "input"]


def linear_layers(backbone: nn.Module) -> dict[str, nn.Module]:
    """All `torch.nn.Linear` and transformers `Conv1D` modules below a module, by their dotted name relative to it.

    A module that is registered twice is listed once. Names leave out the wrapper that torch.compile puts in.

    Args:
        backbone: the module to search, without itself.

    Returns:
        name -> module, in the order of `torch.nn.Module.named_modules`.
    """
    kinds = _linear_types()
    return {
        ".".join(part for part in name.split(".") if part != "_orig_mod"): module
        for name, module in backbone.named_modules()
        if name and isinstance(module, kinds) and cast(Tensor, module.weight).is_floating_point()
    }


class LinearObserver:
    """Accumulates one second moment for each linear layer, from forward hooks.

    Call `begin_batch` before each forward pass and `remove` when done. Nothing is kept of a batch but the sums.

    Args:
        layers: name -> linear module.
        moments: ``"smallest"`` takes the cross moment for layers with ``d_in > d_out``; ``"input"`` takes the input
            covariance for all.
        share_inputs: whether layers that are given the same tensor object share one covariance.
    """

    def __init__(self, layers: Mapping[str, nn.Module], moments: Moments, *, share_inputs: bool = True) -> None:
        self._share_inputs = share_inputs
        self._layers = {name: _ObservedLayer(name, module, moments) for name, module in layers.items()}
        # id of an input -> the input, and who has already added it on which of its calls
        self._added: dict[int, tuple[weakref.ref[Tensor], list[tuple[_ObservedLayer, int]]]] = {}
        self._mask_shapes: tuple[tuple[int, ...], ...] = ()
        self._kept: Tensor | None = None
        self._handles: list[RemovableHandle] = [
            layer.module.register_forward_hook(partial(self._observe, layer), with_kwargs=True)
            for layer in self._layers.values()
        ]

    def begin_batch(self, mask: Tensor | None) -> None:
        """Forget the last batch's inputs and take the padding mask of the next.

        Args:
            mask: shape ``(B, L)``, true or non-zero where a token is real; None when all rows count.
        """
        self._added.clear()
        self._kept, self._mask_shapes = None, ()
        if mask is not None:
            kept = mask.reshape(-1).nonzero().squeeze(1)
            if len(kept) < mask.numel():
                self._kept, self._mask_shapes = kept, (tuple(mask.shape), (mask.numel(),))

    def remove(self) -> None:
        """Take the hooks off again and let go of the last batch."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._added.clear()
        self._kept = None

    def reduce(self, device: torch.device) -> None:
        """Add up what all processes have seen; does nothing without torch.distributed.

        Args:
            device: where a process holds the sums of layers that only other processes have reached.

        Raises:
            PaveError: layers that shared an input do so no longer, on this process or compared with another.
        """
        owners = {name: layer.owner.name for name, layer in self._layers.items() if layer.owner is not None}
        problem = next((text for layer in self._layers.values() if (text := layer.out_of_step())), None)
        for others, trouble in _gather((owners, problem)):
            problem = problem or trouble
            for name, owner in others.items():
                if owners.setdefault(name, owner) != owner:
                    problem = problem or _unequal_inputs(name, owner)
        if problem:
            raise PaveError(problem)
        for name in sorted(owners):
            layer = self._layers[name]
            layer.owner = self._layers[owners[name]]
            if layer.owner is layer:
                layer.ensure_moment(device).all_reduce()

    def moments(self) -> dict[str, LayerMoment]:
        """Means of all layers that have seen a row, on the CPU, in the order of the layers.

        Raises:
            PaveError: a layer has seen NaN or infinite values.
        """
        means = {
            name: layer.moment.moment()
            for name, layer in self._layers.items()
            if layer.moment is not None and layer.moment.rows
        }
        for name, mean in means.items():
            if not torch.isfinite(mean.matrix).all():
                raise PaveError(
                    f"layer '{name}' has seen NaN or infinite values in the {mean.rows} rows of this pass: "
                    "check the expert's weights and the precision of the Trainer"
                )
        return {
            name: means[layer.owner.name]
            for name, layer in self._layers.items()
            if layer.owner is not None and layer.owner.name in means
        }

    @torch.no_grad()
    def _observe(
        self, layer: _ObservedLayer, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:  # anything else returned by a forward hook would replace the layer's output
        inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
        call, layer.calls = layer.calls, layer.calls + 1
        if layer.is_cross:
            rows, outputs = self._rows(inputs), self._rows(output)
            layer.ensure_moment(rows.device).update(rows, layer.without_bias(rows, outputs))
            return
        # An input cannot have changed in between: trainable linear layers forbid it, they need it for their gradient.
        reference, added = self._added.get(id(inputs), (None, []))
        if reference is None or reference() is not inputs:
            added = []
            self._added[id(inputs)] = (weakref.ref(inputs), added)
        if layer.owner is None and self._share_inputs:
            layer.owner = next((owner for owner, number in added if number == call == 0), None)
        if layer.owner is None or layer.owner is layer:
            rows = self._rows(inputs)
            layer.ensure_moment(rows.device).update(rows)
            added.append((layer, call))
        elif (layer.owner, call) not in added:
            raise PaveError(_unequal_inputs(layer.name, layer.owner.name))

    def _rows(self, tensor: Tensor) -> Tensor:
        """Rows of real tokens, shape ``(n, width)``, float32."""
        rows = tensor.detach().reshape(-1, tensor.shape[-1])
        if self._kept is not None and tensor.shape[:-1] in self._mask_shapes:
            rows = rows.index_select(0, self._kept.to(rows.device))
        return rows


class _ObservedLayer:
    """One linear layer, what it has seen, and whose input it shares."""

    def __init__(self, name: str, module: nn.Module, moments: Moments) -> None:
        self.name = name
        self.module = module
        self.is_transposed = not isinstance(module, nn.Linear)
        height, width = self.weight.shape
        self.in_features, self.out_features = (height, width) if self.is_transposed else (width, height)
        self.is_cross = moments == "smallest" and self.in_features > self.out_features
        self.calls = 0
        self.owner: _ObservedLayer | None = None
        self.moment: SecondMoment | None = None

    @property
    def weight(self) -> Tensor:
        # Looked up each time: a parametrised or converted module makes its weight anew.
        return cast(Tensor, self.module.weight)

    def ensure_moment(self, device: torch.device) -> SecondMoment:
        if self.moment is None:
            out_features = self.out_features if self.is_cross else None
            self.moment = SecondMoment(self.in_features, out_features, device=device)
            self.owner = self
        return self.moment

    def without_bias(self, rows: Tensor, outputs: Tensor) -> Tensor:
        """``W x`` for each row in float32, from the layer's own outputs where they are exact enough."""
        bias = self.module.bias
        if outputs.dtype.itemsize >= torch.float32.itemsize and float32_products_are_exact():
            return outputs - bias if isinstance(bias, Tensor) else outputs
        weight = self.weight.float()
        with full_precision(rows.device.type):
            return nn.functional.linear(rows.float(), weight.T if self.is_transposed else weight)

    def out_of_step(self) -> str | None:
        """What is wrong when this layer has not been called as often as the one whose input it shares."""
        if self.owner is None or self.owner.calls == self.calls:
            return None
        return _unequal_inputs(self.name, self.owner.name)


def _unequal_inputs(name: str, owner: str) -> str:
    return (
        f"layers '{name}' and '{owner}' were given the same input at first, but not all through the pass or not in "
        "every process, so that they cannot share one covariance: use PaveCallback(share_inputs=False)"
    )


def _linear_types() -> tuple[type[nn.Module], ...]:
    """The classes to hook into. A model that holds a Conv1D has imported transformers, so this need not."""
    module = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear,) if module is None else (nn.Linear, module.Conv1D)


def _gather(value: tuple[dict[str, str], str | None]) -> list[tuple[dict[str, str], str | None]]:
    """The value of every process, in order of rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
