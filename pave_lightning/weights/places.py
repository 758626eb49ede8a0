"""Where the tensors of a checkpoint lie in the model, where transformers joins or divides them when it loads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Piece:
    """What a stored tensor, or some of its rows, is in the model: a view of one parameter.

    Attributes:
        parameter: the parameter's name in the model.
        shape: the view's shape.
        strides: its strides.
        offset: where it begins among the parameter's elements.
    """

    parameter: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The view of the contiguous parameter."""
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.offset)

    def fills(self, shape: tuple[int, ...]) -> bool:
        """Whether it is all of a parameter of that shape, as it is."""
        return self.shape == shape and self.offset == 0 and self.strides == torch.empty(shape, device="meta").stride()


@dataclass(frozen=True)
class Place:
    """Where a stored tensor lies in the model.

    Attributes:
        pieces: what its rows are, one after the other.
    """

    pieces: tuple[Piece, ...]

    def copy_into(self, parameters: Mapping[str, Tensor], value: Tensor) -> None:
        """Copy a stored tensor's value into the parameters that it makes up."""
        first = 0
        for piece in self.pieces:
            rows = piece.shape[0] if len(self.pieces) > 1 else len(value)
            piece.of(parameters[piece.parameter]).copy_(value[first : first + rows])
            first += rows


def stored_places(model: nn.Module) -> dict[str, Place]:
    """Name in a checkpoint -> place in the model, for tensors that transformers renames, joins or divides.

    Nothing is computed: transformers' own rules for saving are followed on tensors without values. Tensors that they
    turn into what is no view of a parameter (permuted rows) are left out.

    Args:
        model: a Hugging Face model; on any device, its values are not looked at.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tensors = [*model.named_parameters(), *model.named_buffers()]
    weights = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors}
    names = {_storage(tensor): name for name, tensor in weights.items()}
    followed = _Followed()
    try:
        with followed:
            stored = revert_weight_conversion(model, dict(weights))
    except RuntimeError:  # rows are permuted, so that the copy that was passed over is one
        stored = revert_weight_conversion(model, dict(weights))
    places = {}
    for name, tensor in stored.items():
        pieces = tuple(_pieces(tensor, names, followed.joined))
        if pieces and not (len(pieces) == 1 and pieces[0].parameter == name and pieces[0].fills(weights[name].shape)):
            places[name] = Place(pieces)
    return places


def loaded_names(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Name in a checkpoint -> name in the model, for names that transformers changes when it loads, by its own rules.

    Checkpoints of older releases have names that no model is saved with any more (``weight_g``), and part of a model
    may be loaded from the checkpoint of the whole (the vision encoder of CLIP).

    Args:
        model: a Hugging Face model; its values are not looked at.
        stored: names in a checkpoint.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    known, prefix = model.state_dict(), str(model.base_model_prefix)
    found = {name: rename_source_key(name, rules, [], prefix, known)[0] for name in stored}
    return {name: own for name, own in found.items() if own in known and own != name}


class _Followed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, copies are the views that they are made of, and what is joined is known to be.

    Attributes:
        joined: storage of a tensor -> the tensors that are its rows.
        kept: tensors that must stay, so that no storage is used twice.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.joined: dict[int, list[Tensor]] = {}
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            return torch.ops.aten.alias.default(args[0])
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default and (args[1] if len(args) > 1 else 0) == 0:
            self.joined[_storage(found)] = list(args[0])
        self.kept += [found] if isinstance(found, Tensor) else []
        return found


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _pieces(tensor: Tensor, names: Mapping[int, str], joined: Mapping[int, list[Tensor]]) -> Iterator[Piece]:
    """The pieces of a stored tensor; none where one of them is of no parameter."""
    rows = joined.get(_storage(tensor), [tensor])
    if all(_storage(row) in names for row in rows):
        for row in rows:
            yield Piece(names[_storage(row)], tuple(row.shape), row.stride(), int(row.storage_offset()))
