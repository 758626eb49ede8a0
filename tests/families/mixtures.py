"""Mixtures of experts, whose weights are one parameter with three axes; what reaches each expert is worked out anew."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from families.pretrained import Pretrained
from families.reference import watched, without_padding


def gated_swish(module: Any, number: int, rows: Tensor) -> Tensor:
    """What an expert of Mixtral or Qwen gives to its second projection."""
    gate, up = (rows @ module.gate_up_proj[number].double().T).chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def clamped_swish(module: Any, number: int, rows: Tensor) -> Tensor:
    """What an expert of GPT-OSS gives to its second projection: gate and up take turns, and are limited."""
    both = rows @ module.gate_up_proj[number].double() + module.gate_up_proj_bias[number].double()
    gate, up = both[:, 0::2].clamp(max=module.limit), both[:, 1::2].clamp(-module.limit, module.limit)
    return (up + 1) * gate * torch.sigmoid(module.alpha * gate)


@dataclass(frozen=True)
class Mixture(Pretrained):
    """A family of mixtures of experts.

    Attributes:
        inside: what an expert gives to its second projection: module, number and rows in, rows out.
        stored: pattern of a purified matrix of an expert, with groups for where it lies, its number and its part.
        modules: where the experts lie in the model, by these groups.
        projections: for each part the parameter that holds it, and which half of its outputs it is; None for all.
        transposed: whether the weights are stored as ``(experts, d_in, d_out)``, in which gate and up take turns.
    """

    inside: Callable[[Any, int, Tensor], Tensor] = gated_swish
    stored: str = ""
    modules: str = ""
    projections: Mapping[str, tuple[str, int | None]] = field(default_factory=dict)
    transposed: bool = False

    @contextmanager
    def _watched(self, inside: nn.Module, layers: dict[str, nn.Module], batch: Any) -> Iterator[dict[str, Any]]:
        masks = [batch["attention_mask"]]
        mixtures = {name: module for name, module in inside.named_modules() if name.endswith(".experts")}
        found: dict[str, list[Tensor]] = {}

        def watch(name: str) -> Callable[..., None]:
            def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden, chosen, *_ = (*args, *kwargs.values())
                real = without_padding(torch.arange(len(hidden))[:, None], masks).flatten()
                for number in range(len(module.down_proj)):
                    reached = [row for row in real.tolist() if number in chosen[row].tolist()]
                    if reached:
                        rows = hidden[reached].detach().double()
                        found.setdefault(f"{name}.gate_up_proj.{number}", []).append(rows)
                        inner = self.inside(module, number, rows).detach()
                        found.setdefault(f"{name}.down_proj.{number}", []).append(inner)

            return hook

        handles = [m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, m in mixtures.items()]
        with watched(layers, masks) as seen:
            yield seen
            seen.update(found)
        for handle in handles:
            handle.remove()

    def _part(self, name: str) -> tuple[str, Callable[[int], Any] | None]:
        place = re.fullmatch(self.stored, name)
        if place is None:
            return super()._part(name)
        parameter, half = self.projections[place["part"]]
        layer = f"{self.modules.format(**place.groupdict())}.{parameter}.{place['expert']}"
        if half is None:
            return layer, None
        return layer, lambda height: self._half(height, half)

    def _half(self, height: int, half: int) -> slice:
        if self.transposed:
            return slice(half, height, 2)
        return slice(half * height // 2, (half + 1) * height // 2)

    def _matrix(self, inside: nn.Module, layer: str) -> Tensor:  # type: ignore[override]
        place = re.fullmatch(r"(.*\.experts)\.(\w+)\.(\d+)", layer)
        if place is None:
            return super()._matrix(inside, layer)
        matrix: Tensor = getattr(inside.get_submodule(place[1]), place[2]).data[int(place[3])]
        return matrix.T if self.transposed else matrix

    @staticmethod
    def _further_kinds(purified: Any) -> dict[str, int]:
        layers = {matrix.layer for parameter in purified.layers for matrix in parameter.matrices}
        return {"experts' layers": sum(bool(re.search(r"\.experts\.\w+\.\d+$", layer)) for layer in layers)}
