"""Forward hooks that turn what passes through linear layers into second moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pave_lightning.callbacks.padding import PartOf, whole
from pave_lightning.callbacks.patches import multiplies_patches, patch_view, selected
from pave_lightning.callbacks.sampling import RowSampler
from pave_lightning.callbacks.sharing import Given, InputGroup, InputGroups
from pave_lightning.errors import PaveError
from pave_lightning.layers import CONVOLUTIONS, matrix_shape, matrix_weight, plain_name
from pave_lightning.statistics import NOT_REACHED, LayerMoment, Moments, SecondMoment, captured_kind
from pave_lightning.statistics.second_moment import float32_products_are_exact, full_precision
from pave_lightning.subspace import is_finite

# Values of patches that are copied at a time: 16 MB in float32.
PATCH_ELEMENTS = 4_000_000

# Why a layer that was called has no moment.
SEVERAL_INPUTS = "its query, key and value are not projections of one tensor"
NO_PRODUCT = "its outputs are not the product of its kernels with patches of its input"


def matrix_layers(backbone: nn.Module, *, convolutions: bool = False) -> dict[str, list[nn.Module]]:
    """All modules below a module that multiply their input with one weight matrix, by their dotted name relative to it.

    These are `torch.nn.Linear`, transformers' `Conv1D`, `torch.nn.MultiheadAttention` for its fused projection, and, on
    demand, convolutions without groups. A module that is registered twice is listed once, and modules that hold the
    same weight are listed together under the name of the first. Names leave out the wrappers that torch.compile, FSDP1
    and activation checkpointing put in.

    Args:
        backbone: the module to search, without itself.
        convolutions: whether to list convolutions.

    Returns:
        name -> the modules that hold its weight, in the order of `torch.nn.Module.named_modules`.
    """

    def attribute_of(module: nn.Module) -> str | None:
        attribute, _ = matrix_weight(module) or (None, None)
        return None if isinstance(module, CONVOLUTIONS) and not convolutions else attribute

    return weight_owners(backbone, attribute_of)


def weight_owners(backbone: nn.Module, attribute_of: Callable[[nn.Module], str | None]) -> dict[str, list[nn.Module]]:
    """Modules below a module that own a floating-point weight, named as in `matrix_layers`.

    Args:
        backbone: the module to search, without itself.
        attribute_of: gives the name of a module's weight; None for modules that are not looked for.
    """
    layers: dict[str, list[nn.Module]] = {}
    names: dict[int, str] = {}
    for path, module in backbone.named_modules():
        attribute = attribute_of(module) if path else None
        if attribute is None:
            continue
        if not cast(Tensor, getattr(module, attribute)).is_floating_point():
            continue
        own_name = plain_name(path)
        # A parametrised weight is made anew each time it is asked for, so it cannot be told by its identity.
        parameter = dict(module.named_parameters(recurse=False)).get(attribute)
        name = own_name if parameter is None else names.setdefault(id(parameter), own_name)
        layers.setdefault(name, []).append(module)
    return layers


class LinearObserver:
    """Accumulates one second moment for each linear layer, from forward hooks.

    Call `begin_batch` before each forward pass and `remove` when done. Nothing is kept of a batch but the sums, or the
    rows of layers that have counted fewer than they are wide.

    Args:
        layers: name -> the modules that hold its weight, from `matrix_layers`.
        moments: ``"smallest"`` takes the cross moment for layers with ``d_in > d_out``, ``"output"`` the output moment;
            ``"input"`` takes the input covariance for all.
        sampler: which rows to count; None counts all.
        part_of: gives the part of the model whose padding mask an input of a module has.
        share_inputs: whether layers that are given the same tensor object share one covariance.
        keep_rows: whether layers that have counted fewer rows than they are wide keep the rows.
    """

    def __init__(
        self,
        layers: Mapping[str, Sequence[nn.Module]],
        moments: Moments,
        *,
        sampler: RowSampler | None = None,
        part_of: PartOf = whole,
        share_inputs: bool = True,
        keep_rows: bool = True,
    ) -> None:
        self._sampler, self._part_of = sampler or RowSampler(None), part_of
        self._batch = 0
        self._passed_over: dict[str, str] = {}
        self._layers = {name: _ObservedLayer(name, group[0], moments, keep_rows) for name, group in layers.items()}
        self._groups = InputGroups(
            {name: layer.empty_moment for name, layer in self._layers.items()},
            alone=[name for name, layer in self._layers.items() if layer.kind != "input"],
            share=share_inputs,
        )
        self._handles: list[RemovableHandle] = [
            # First of all hooks: that of FSDP takes the weights away again.
            module.register_forward_hook(partial(self._observe, self._layers[name]), with_kwargs=True, prepend=True)
            for name, group in layers.items()
            for module in group
        ]

    def begin_batch(self, mask: Tensor | None, batch: int = 0, loader: int = 0, weights: Tensor | None = None) -> None:
        """Forget the last batch's inputs and take the padding mask of the next.

        Args:
            mask: shape ``(B, L)``, true or non-zero where a token is real; None when all rows count.
            batch: number of the batch in its dataloader.
            loader: number of the dataloader.
            weights: of the batch's examples, shape ``(B,)``: those of weight 0 are not counted; None counts all.
        """
        self._groups.end_batch()
        self._batch += 1
        if weights is not None and not bool(weights.any()):
            self._sampler.pass_over()
        else:
            self._sampler.begin_batch(mask, batch, loader, weights)

    def end_batch(self) -> None:
        """Let go of the batch."""
        self._groups.end_batch()  # while the sampler still knows the batch
        self._sampler.end_batch()

    def remove(self) -> None:
        """Take the hooks off again and let go of the last batch."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.end_batch()

    def reduce(self, device: torch.device) -> None:
        """Add up what all processes have seen; does nothing without torch.distributed.

        Args:
            device: where a process holds the sums of layers that only other processes have reached.
        """
        self._groups.reduce(device)

    def moments(self) -> dict[str, LayerMoment]:
        """Means of all layers that have seen a row, on the CPU, in the order of the layers; the sums are let go.

        Raises:
            PaveError: a layer has seen NaN or infinite values.
        """
        means: dict[str, LayerMoment] = {}
        for members, moment in self._groups.moments():
            mean = moment.finish()
            if not is_finite(mean.matrix):
                raise PaveError(
                    f"layer '{members[0]}' has seen NaN or infinite values in the {mean.rows} rows of its input "
                    "(tokens) that this pass counted: check the expert's weights and the precision of the Trainer"
                )
            means.update(dict.fromkeys(members, mean))
        return {name: means[name] for name in self._layers if name in means}

    def unreached(self) -> dict[str, str]:
        """Layers that have seen no row, and why."""
        return {name: self._passed_over.get(name, NOT_REACHED) for name in self._layers if not self._groups.has(name)}

    def take(self, name: str, module: nn.Module, rows: Tensor) -> None:
        """Count what the weight of a layer has multiplied, ``(..., d_in)``, although the layer was not called."""
        layer, inputs = self._layers[name], rows.detach()
        add = partial(self._add, layer, module, inputs, None)
        self._groups.take(name, Given(inputs, (_cut(module), self._part_of(module, inputs)), add))

    @torch.no_grad()
    def _observe(
        self, layer: _ObservedLayer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:  # anything else returned by a forward hook would replace the layer's output
        inputs = _input_of(module, args, kwargs)
        if inputs is None or not layer.multiplies(module, inputs, output):
            self._passed_over[layer.name] = NO_PRODUCT if inputs is not None else SEVERAL_INPUTS
        else:
            # An input cannot have changed in between: trainable linear layers forbid it, they need it for their
            # gradient.
            cut = _cut(module), self._part_of(module, inputs)
            self._groups.take(layer.name, Given(inputs, cut, partial(self._add, layer, module, inputs, output)))

    def _add(self, layer: _ObservedLayer, module: nn.Module, inputs: Tensor, output: Any, group: InputGroup) -> None:
        """Count the rows of one call."""
        moment = group.ensure_moment(inputs.device)
        call = group.calls.begin(self._batch, moment.rows)
        tensor, axes = _as_rows(module, inputs.detach())
        index, seen = self._sampler.choose(
            tuple(tensor.shape[:axes]),
            self._sampler.allowance(group.calls.counted),
            call,
            group.calls.expected,
            self._part_of(module, inputs),
        )
        for piece in _pieces(module, tensor, axes, index):
            moment.update(*layer.factors(module, tensor, axes, output, piece), seen=seen)
            seen = 0


class _ObservedLayer:
    """One weight matrix, and what is captured of it."""

    def __init__(self, name: str, module: nn.Module, moments: Moments, keep_rows: bool) -> None:
        self.name = name
        self.out_features, self.in_features = matrix_shape(module)
        self.kind = captured_kind(moments, self.out_features, self.in_features)
        self.keep_rows = keep_rows
        self._multiplies: bool | None = None

    def multiplies(self, module: nn.Module, inputs: Tensor, output: Any) -> bool:
        """Whether the module does with its input what its class says; asked of convolutions, on their first call."""
        if self._multiplies is None:
            self._multiplies = not isinstance(module, CONVOLUTIONS) or (
                isinstance(output, Tensor) and multiplies_patches(module, patch_view(module, inputs.detach()), output)
            )
        return self._multiplies

    @staticmethod
    def matrix(module: nn.Module) -> Tensor:
        """The weight as ``(d_out, d_in)``."""
        found = matrix_weight(module)
        if found is None:
            raise ValueError(f"{type(module).__name__} multiplies its input with no matrix")
        # Looked up each time: a parametrised or converted module makes its weight anew.
        weight = cast(Tensor, getattr(module, found[0]))
        return weight.T if found[1] == 0 else weight.reshape(len(weight), -1)

    def empty_moment(self, device: torch.device) -> SecondMoment:
        """Sums of what is captured of it that have seen nothing yet."""
        out_features = None if self.kind == "input" else self.out_features
        return SecondMoment(self.in_features, out_features, kind=self.kind, keep_rows=self.keep_rows, device=device)

    def factors(
        self, module: nn.Module, inputs: Tensor, axes: int, output: Any, index: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The chosen rows of an input, whose first axes count them, and of its outputs, where its kind takes them."""
        if self.kind == "input":
            return selected(inputs, axes, index), None
        if self.outputs_are_exact(module, output):
            outputs = selected(output, output.ndim - 1, index)
            bias = module.bias
            outputs = outputs - bias if isinstance(bias, Tensor) else outputs
            rows = None if self.kind == "output" else selected(inputs, axes, index)
        else:
            rows = selected(inputs, axes, index)
            with full_precision(rows.device.type):
                outputs = nn.functional.linear(rows.float(), self.matrix(module).float())
        return (rows if self.kind == "cross" else None), outputs

    @staticmethod
    def outputs_are_exact(module: nn.Module, output: Any) -> bool:
        """Whether a layer's own outputs are float32 products. Convolutions have switches of their own for TF32."""
        is_linear = not isinstance(module, CONVOLUTIONS)
        wide = isinstance(output, Tensor) and output.dtype.itemsize >= torch.float32.itemsize
        return is_linear and wide and float32_products_are_exact()


def _input_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a module's weight matrix is multiplied with; None for attention between different tensors."""
    if not isinstance(module, nn.MultiheadAttention):
        found: Tensor = args[0] if args else next(iter(kwargs.values()))
        return found
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    query: Tensor = given["query"]
    return query if query is given["key"] and query is given["value"] else None


def _cut(module: nn.Module) -> Hashable:
    """How a module cuts its input into rows: layers with the same input share a moment only if they agree in it."""
    if isinstance(module, CONVOLUTIONS):
        return module.kernel_size, module.stride, module.dilation, module.padding, module.padding_mode
    return isinstance(module, nn.MultiheadAttention) and not module.batch_first


def _as_rows(module: nn.Module, inputs: Tensor) -> tuple[Tensor, int]:
    """A view of an input whose first axes count its rows, batch first, and the number of these axes."""
    if isinstance(module, CONVOLUTIONS):
        return patch_view(module, inputs), 1 + len(module.kernel_size)
    if isinstance(module, nn.MultiheadAttention) and not module.batch_first and inputs.ndim == 3:
        inputs = inputs.transpose(0, 1)
    return inputs, inputs.ndim - 1


def _pieces(module: nn.Module, tensor: Tensor, axes: int, index: Tensor | None) -> Iterable[Tensor | None]:
    """The chosen rows in parts, so that patches, which overlap in their view, are never all copied at once."""
    if not isinstance(module, CONVOLUTIONS):
        return [index]
    count, width = math.prod(tensor.shape[:axes]), math.prod(tensor.shape[axes:])
    if index is None and count * width <= PATCH_ELEMENTS:
        return [None]
    chosen = torch.arange(count, device=tensor.device) if index is None else index
    size = max(1, PATCH_ELEMENTS // width)
    return [chosen[start : start + size] for start in range(0, max(1, len(chosen)), size)]
