"""Projections that a model keeps in one weight: which outputs are whose."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pave_lightning.layers import is_linear, stacked_axis
from pave_lightning.weights.matrices import Outputs, Part

# What configurations call their numbers of heads.
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
Layout = tuple[Part, ...]
# Of deeper models than there are, a pass takes longer than all else that a plan does.
MOST_GUESSES = 400
_PLACE = re.compile(r"(?<![^.])\d+(?![^.])")


def fused_parts(model: nn.Module) -> dict[str, Layout]:
    """The parts of a model's fused weights, by name: query, key and value, or two halves (gate and up).

    The configuration tells the sizes that parts may have, and the model itself how they lie: a pass without values, on
    the meta device, shows which outputs of a layer go into one further step. A layout is taken only if no step mixes
    outputs of two of its parts, some step takes just one of them, and no other layout explains as many steps. Layers
    that such a pass does not come to (behind a mixture, whose routes depend on values) are as those of the same name
    and size; of models with more than `MOST_GUESSES` layers that may be fused all weights are taken whole. Experts of
    mixtures say how gate and up lie, and so does `torch.nn.MultiheadAttention`. Key and value are named in the usual
    order.

    Args:
        model: a Hugging Face model on the meta device; weights of others are taken whole.
    """
    found = {**dict(_of_experts(model)), **dict(_of_attention(model))}
    guesses = {name: layouts for name, layouts in _guesses(model) if layouts}
    if not 0 < len(guesses) <= MOST_GUESSES or not all(parameter.is_meta for parameter in model.parameters()):
        return found
    modules = {name: model.get_submodule(name) for name in guesses}
    used = _used_outputs(model, modules)
    known: dict[tuple[str, tuple[int, int]], Layout | None] = {}
    for name, layouts in guesses.items():
        kind = _PLACE.sub("*", name), _sizes(modules[name])
        layout = _chosen(layouts, used[name]) if used.get(name) else known.get(kind)
        known[kind] = layout if known.get(kind, layout) == layout else None
        if layout is not None:
            found[f"{name}.weight"] = layout
    return found


def _chosen(layouts: Sequence[Layout], steps: Sequence[frozenset[int]]) -> Layout | None:
    """The layout that explains most steps; None where none explains any, or several explain as many."""
    ranked = sorted(((_explained(layout, steps), index) for index, layout in enumerate(layouts)), reverse=True)
    if not ranked or not ranked[0][0] or (len(ranked) > 1 and ranked[1][0] == ranked[0][0]):
        return None
    return layouts[ranked[0][1]]


def _of_experts(model: nn.Module) -> Iterator[tuple[str, Layout]]:
    """Gate and up of mixtures whose module says that it has both in one weight, and how they lie."""
    for path, module in model.named_modules():
        concatenated, gated = (getattr(module, key, None) for key in ("is_concatenated", "has_gate"))
        if gated is not True or not isinstance(concatenated, bool):
            continue
        for name, weight in module.named_parameters(recurse=False):
            axis = stacked_axis(module, name)
            if axis is not None and "gate" in name:
                half = weight.shape[3 - axis] // 2
                halves = _blocks(("gate", half), ("up", half))
                yield f"{path}.{name}", halves if concatenated else _alternating(half, ("gate", "up"))


def _of_attention(model: nn.Module) -> Iterator[tuple[str, Layout]]:
    """Query, key and value of torch's own attention, which lie in one weight where they read inputs of one width."""
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            width = module.embed_dim
            yield f"{path}.in_proj_weight".lstrip("."), _blocks(("query", width), ("key", width), ("value", width))


def _guesses(model: nn.Module) -> Iterator[tuple[str, list[Layout]]]:
    """For each linear layer the layouts that its size allows."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    text = config.get_text_config()
    heads = _numbers(text, _HEADS)
    for path, parent in model.named_modules():
        layers = {name: child for name, child in parent.named_children() if is_linear(child)}
        widths = {name: _sizes(child)[1] for name, child in layers.items()}
        for name, child in layers.items():
            height = _sizes(child)[0]
            layouts: list[Layout] = []
            for count in heads:
                layouts += _attention(text, height, count)
            # What gate and up make together is half as wide when it goes on.
            others = [width for other, width in widths.items() if other != name]
            if height % 2 == 0 and height // 2 in others and height not in others:
                layouts += [_blocks(("first", height // 2), ("second", height // 2)), _alternating(height // 2)]
            yield f"{path}.{name}".lstrip("."), list(dict.fromkeys(layouts))


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """``(d_out, d_in)`` of a linear layer."""
    weight: Any = layer.weight
    height, width = weight.shape
    return (height, width) if isinstance(layer, nn.Linear) else (width, height)


def _attention(config: Any, height: int, heads: int) -> Iterator[Layout]:
    """Layouts of query, key and value in one weight with so many outputs."""
    known = getattr(config, "head_dim", None)
    hidden = getattr(config, "hidden_size", None)
    widths = {width for width in (known, hidden // heads if isinstance(hidden, int) else None) if width}
    for size, groups in product(sorted(widths), sorted({*_numbers(config, _KEY_HEADS), heads, 1})):
        if (heads + 2 * groups) * size != height or heads % groups:
            continue
        yield _blocks(("query", heads * size), ("key", groups * size), ("value", groups * size))
        if groups > 1:
            own = heads // groups * size
            period = own + 2 * size
            yield (
                Part("query", Outputs(0, own, period, groups)),
                Part("key", Outputs(own, size, period, groups)),
                Part("value", Outputs(own + size, size, period, groups)),
            )


def _numbers(config: Any, names: Sequence[str]) -> list[int]:
    found = (getattr(config, name, None) for name in names)
    return sorted({value for value in found if isinstance(value, int) and not isinstance(value, bool) and value > 0})


def _blocks(*sizes: tuple[str, int]) -> Layout:
    parts, start = [], 0
    for name, size in sizes:
        parts.append(Part(name, Outputs(start, size)))
        start += size
    return tuple(parts)


def _alternating(half: int, names: tuple[str, str] = ("first", "second")) -> Layout:
    return Part(names[0], Outputs(0, 1, 2, half)), Part(names[1], Outputs(1, 1, 2, half))


def _explained(layout: Layout, used: Sequence[frozenset[int]]) -> int:
    """How many parts some step takes alone and as a whole; 0 where a step mixes outputs of two parts."""
    parts = [frozenset(_indices(part.outputs)) for part in layout]
    every = frozenset[int]().union(*parts)
    steps = {step for step in used if step != every}
    mixed = any(all(not step <= part for part in parts) for step in steps)
    return 0 if mixed else sum(part in steps for part in parts)


def _indices(outputs: Outputs) -> list[int]:
    index = outputs.index
    return list(range(index.start, index.stop)) if isinstance(index, slice) else index.tolist()


def _used_outputs(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[frozenset[int]]]:
    """For each layer the sets of its outputs that go into one further step, in a pass on the meta device."""
    tracing = _Tracing()
    handles = [
        layer.register_forward_hook(lambda module, args, output, name=name: tracing.watch(name, output))
        for name, layer in layers.items()
    ]
    mode = model.training
    model.eval()
    try:
        with torch.no_grad(), tracing:
            model(**_no_values(model))
    except Exception:  # what depends on values, in any of the ways in which models have it; what was seen stays
        pass
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()
    return tracing.used


def _no_values(model: nn.Module) -> dict[str, Tensor]:
    """Inputs without values: a text of three tokens."""
    words = torch.zeros(1, 3, dtype=torch.long, device="meta")
    config: Any = model.config
    given = {str(model.main_input_name): words}  # whether a mask masks anything would be a question of values
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = words
    return given


class _Tracing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, steps that take outputs of watched layers, all or some of them, are noted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used: dict[str, list[frozenset[int]]] = {}
        self._watched: dict[int, tuple[str, Tensor]] = {}

    def watch(self, name: str, output: Any) -> None:
        if isinstance(output, Tensor) and name not in self.used:
            self.used[name] = []
            self._watched[_storage(output)] = name, output

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # what a model asks of values, such as whether there is padding, has no answer here
        found = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        views = {_storage(leaf) for leaf in tree_leaves(found) if isinstance(leaf, Tensor)}
        for tensor in given:
            key = _storage(tensor)
            if key in self._watched and key not in views:
                name, output = self._watched[key]
                self.used[name].append(_columns(tensor, output.shape[-1]))
        return found


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _columns(view: Tensor, width: int) -> frozenset[int]:
    """Which outputs a view of them shows."""
    place = torch.tensor(view.storage_offset(), device="cpu")
    for length, stride in zip(view.shape, view.stride(), strict=True):
        place = torch.unique((place[..., None] + stride * torch.arange(length, device="cpu")) % width)
    return frozenset(place.tolist())
