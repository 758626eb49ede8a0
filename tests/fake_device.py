"""A device that is none: its tensors lie on the CPU, but to mix them with others fails, as on a graphics card."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "fake"
HANDFUL = 10


class FakeTensor(torch.Tensor):
    """A tensor of the device, around one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        raise RuntimeError(f"{function} on the device outside of fake_device()")


class _Dispatch(TorchDispatchMode):
    def __init__(self, without):
        super().__init__()
        self.operations, self.on_cpu, self._without = set(), set(), without

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        name = str(function)
        tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
        placed = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        others = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor) and tensor.dim()]
        copies = name in ("aten.copy_.default", "aten._to_copy.default")
        if placed and others and not copies:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if not placed and any(other.is_floating_point() and other.numel() > HANDFUL for other in others):
            self.on_cpu.add(name)
        arguments, inner = tree_map(lambda x: x.inner if isinstance(x, FakeTensor) else x, (arguments, options))
        here = bool(placed)
        if options.get("device") is not None:
            here = torch.device(options["device"]).type == NAME
            inner["device"] = torch.device("cpu")
        if name == "aten.copy_.default":
            function(*arguments, **inner)
            return tensors[0]
        result = function(*arguments, **inner)
        if not here:
            return result
        self.operations.add(name)

        def wrapped(value):
            if not isinstance(value, torch.Tensor):
                return value
            if value.dtype in self._without:
                raise TypeError(f"{name}: the device has no {value.dtype}")
            same = [tensor for tensor in placed if tensor.inner is value]
            return same[0] if same else FakeTensor(value)

        return tree_map(wrapped, result)


def _register():
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    try:
        torch.device(NAME)
    except RuntimeError:
        _setup_privateuseone_for_python_backend(NAME)


@contextmanager
def fake_device(without=()):
    """Within, ``torch.device("fake", 0)`` is there; gives an object whose ``operations`` are what was
    computed on it, and ``on_cpu`` what was computed elsewhere with more than a handful of numbers.

    Args:
        without: types that it has not, as float64 on mps.
    """
    _register()
    with _Dispatch(tuple(without)) as dispatch:
        yield dispatch
