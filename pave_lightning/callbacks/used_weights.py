"""Layers whose weight a model multiplies with without calling the layer, as Mamba and torch's own attention do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from pave_lightning.layers import is_linear, matrix_weight

# Functions with two factors, and the place of the first one.
_PRODUCTS = {"linear": 0, "matmul": 0, "__matmul__": 0, "mm": 0, "bmm": 0, "addmm": 1}
# What only gives another view of a weight, or asks something of it.
_LOOKS = ("__get__", "t", "transpose", "detach", "view", "size", "dim", "numel", "stride", "data_ptr", "is_contiguous")
# Batches in which products are sought everywhere while layers are left that nothing has used, as CLIP's texts have.
SEARCHED = 4
_ATTENTION = inspect.signature(multi_head_attention_forward)

Count = Callable[[str, nn.Module, Tensor], None]
"""Is given a layer's name, its module, and what its weight multiplies, ``(..., d_in)``."""


class UsedWeights:
    """Finds products with the weights of linear layers that are not called, for as long as a pass lasts.

    All functions of torch are watched until each layer has been called or was found in a product, for some batches at
    most; afterwards only inside of the modules in which products were found.

    Args:
        backbone: the module below which the layers are.
        layers: name -> the modules that hold its weight; other modules than linear ones are passed over.
        count: is told of each product.

    Attributes:
        otherwise: names of layers whose weight was used by a function that is no product with all of it.
    """

    def __init__(self, backbone: nn.Module, layers: Mapping[str, Sequence[nn.Module]], count: Count) -> None:
        self.otherwise: set[str] = set()
        self._backbone, self._count = backbone, count
        self._linear = {name: group for name, group in layers.items() if is_linear(group[0])}
        self._names = {module: name for name, group in self._linear.items() for module in group}
        self._left = set(self._linear)
        self._used: dict[str, None] = {}
        self._users: dict[nn.Module, None] = {}
        self._running: list[nn.Module] = []
        self._watches: list[_Watch] = []
        self._handles: list[RemovableHandle] = []
        self._weights: dict[int, list[tuple[str, nn.Module]]] = {}
        self._batches = 0
        self._is_searching = bool(self._linear)
        if self._is_searching:
            self._handles = [
                handle
                for module in backbone.modules()
                for handle in (
                    module.register_forward_pre_hook(self._begin),
                    module.register_forward_hook(self._end, always_call=True),
                )
            ]

    def begin_batch(self) -> None:
        """Watch what comes, unless it is known where to look."""
        self._batches += 1
        if not (self._is_searching or self._users):
            return
        self._weights.clear()
        for name in self._linear if self._is_searching else self._used:
            for module in self._linear[name]:
                weight = getattr(module, "weight", None)
                if type(weight) is nn.Parameter:  # what is made anew, or divided, has no place of its own
                    self._weights.setdefault(weight.data_ptr(), []).append((name, module))
        if self._is_searching:
            self._enter()

    def end_batch(self) -> None:
        """Stop watching; once all layers were seen, look only where a product was found."""
        self._leave_all()
        if self._is_searching and (not self._left or self._batches == SEARCHED):
            self._is_searching = False
            self._take_off()
            for module in self._users:
                self._handles.append(module.register_forward_pre_hook(lambda *_: self._enter()))
                self._handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))

    def remove(self) -> None:
        """Take the hooks off again."""
        self._leave_all()
        self._take_off()

    def layer_of(self, factor: Any, summed: int) -> tuple[str, nn.Module] | None:
        """The layer whose whole weight a factor is, where the product sums over the axis that meets the input."""
        if not isinstance(factor, Tensor) or factor.ndim != 2:
            return None
        for name, module in self._weights.get(factor.data_ptr(), ()):
            weight: Any = module.weight
            _, axis = matrix_weight(module) or ("", 1)
            if weight.numel() == factor.numel() and weight.dtype == factor.dtype:
                same = factor.stride(summed) == weight.stride(axis) and factor.shape[summed] == weight.shape[axis]
                return (name, module) if same else None
        return None

    def found(self, layer: tuple[str, nn.Module], rows: Tensor) -> None:
        """Count a product, unless it is that of the layer's own forward pass."""
        name, module = layer
        if self._running and self._names.get(self._running[-1]) == name:
            return
        self._left.discard(name)
        self._used[name] = None
        if self._is_searching and self._running:
            self._users[self._running[-1]] = None
        with torch.no_grad():
            self._count(name, module, rows if rows.ndim > 1 else rows[None])

    def touched(self, *given: Any) -> None:
        """Note that a function that is no product was given weights; asked in the first batch, since it takes time."""
        for tensor in tree_leaves(given) if self._batches == 1 else ():
            if isinstance(tensor, nn.Parameter):
                for name, module in self._weights.get(tensor.data_ptr(), ()):
                    if tensor is module.weight and not any(one is module for one in self._running):
                        self.otherwise.add(name)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)
        if module in self._names:
            self._left.discard(self._names[module])

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:
            self._running.pop()

    def _enter(self) -> None:
        watch = _Watch(self)
        self._watches.append(watch)
        watch.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self) -> None:
        if self._watches:
            self._watches.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _leave_all(self) -> None:
        while self._watches:
            self._leave()
        self._running.clear()

    def _take_off(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Watch(TorchFunctionMode):
    """Within, products with the weights of layers are told."""

    def __init__(self, weights: UsedWeights) -> None:
        super().__init__()
        self._weights = weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is multi_head_attention_forward:
            return self._attend(args, kwargs)
        found = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        first = _PRODUCTS.get(name)
        if first is not None:
            self._multiply(name, *(*args, *kwargs.values())[first : first + 2])
        elif name not in _LOOKS:
            self._weights.touched(args, kwargs)
        return found

    def _multiply(self, name: str, left: Any, right: Any) -> None:
        layer = self._weights.layer_of(right, -1 if name == "linear" else -2)
        if layer is not None:
            self._weights.found(layer, left)
        elif name != "linear":
            layer = self._weights.layer_of(left, -1)
            if layer is not None and right.ndim > 1:
                self._weights.found(layer, right.transpose(-1, -2))

    def _attend(self, args: Any, kwargs: Any) -> Any:
        """Attention of torch in two steps, so that what its output projection multiplies can be seen."""
        given = _ATTENTION.bind(*args, **kwargs)
        values = given.arguments
        weight, bias = values["out_proj_weight"], values["out_proj_bias"]
        layer = self._weights.layer_of(weight, -1)
        if layer is None:
            return multi_head_attention_forward(*args, **kwargs)
        values["out_proj_weight"] = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        values["out_proj_bias"] = None
        heads, shares = multi_head_attention_forward(*given.args, **given.kwargs)
        # Sequence first, whatever the module is given; the mask is batch first.
        self._weights.found(layer, heads.transpose(0, 1) if heads.ndim == 3 else heads)
        return nn.functional.linear(heads, weight, bias), shares
