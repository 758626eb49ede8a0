"""The table of a model that has one row for each token, where experts of one base may have more rows or fewer.

Tokens in common have the same rows. Rows beyond the base's table belong to the expert that has them: they are kept with
its head and never merged. Rows that an expert has not are as in the base: it has learned nothing about them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def token_embeddings(backbone: nn.Module) -> list[str]:
    """Names of the weight that has one row a token, several where it is shared (T5, BART); none where there is none."""
    weight = _weight(backbone)
    if weight is None:
        return []
    return [name for name, found in backbone.named_parameters(remove_duplicate=False) if found is weight]


def resize_rows(backbone: nn.Module, rows: int, *, scores: bool = False) -> None:
    """Give the token embedding another number of rows; the first ones stay, new ones are zero.

    Modules that look tokens up in the weight go on sharing it, and the configuration names the new number.

    Args:
        backbone: the backbone.
        rows: how many rows.
        scores: whether the layer that scores each token gets them as well, tied to the embedding or not.
    """
    weight = _weight(backbone)
    if weight is None or len(weight) == rows:
        return
    replaced = _resized(weight, rows)
    tables = _tables(backbone)
    layer = scoring_layer(backbone) if scores else None
    if layer is not None:
        for name, own in list(layer.named_parameters(recurse=False)):
            if len(own) == len(weight):
                setattr(layer, name, replaced if own is weight else _resized(own, rows))
        for name, held in list(backbone.named_buffers(recurse=False)):  # BART adds a bias of its own
            if held.shape[-1:] == weight.shape[:1]:
                setattr(backbone, name, torch.cat([held, held.new_zeros(*held.shape[:-1], rows)], dim=-1)[..., :rows])
    config: Any = backbone.config
    config.get_text_config().vocab_size = rows
    for module in tables:
        module.weight, module.num_embeddings = replaced, rows
        if module.padding_idx is not None and module.padding_idx >= rows:
            module.padding_idx = None  # which only keeps its gradient away


def scoring_layer(model: nn.Module) -> nn.Module | None:
    """The layer of a language model that gives each token its score; None in other models."""
    reader: Any = getattr(model, "get_output_embeddings", None)
    try:
        layer = reader() if reader is not None else None
    except (NotImplementedError, AttributeError):  # models that read no tokens
        layer = None
    return layer if isinstance(layer, nn.Module) else None


def _resized(weight: nn.Parameter, rows: int) -> nn.Parameter:
    kept = weight.detach()[:rows]
    grown = torch.cat([kept, kept.new_zeros(rows - len(kept), *weight.shape[1:])])
    return nn.Parameter(grown, requires_grad=weight.requires_grad)


@dataclass(frozen=True)
class OwnTokens:
    """Tokens that an expert has beyond the base's, and what its embedding gives for them.

    Attributes:
        first: the first of them; they are the last of the expert's.
        outputs: shape ``(k, d)``, scaled where the embedding scales.
    """

    first: int
    outputs: Tensor

    def shared(self, ids: Tensor) -> Tensor:
        """Token ids of any shape, int64, with any shared one in place of its own."""
        return ids.masked_fill(ids >= self.first, 0)

    def looked_up(self, ids: Tensor, found: Tensor) -> Tensor:
        """What the embedding gives for the tokens, ``(..., d)``, from what it gives for the shared ones."""
        own = self.outputs.to(found)[(ids - self.first).clamp(min=0)]
        return torch.where((ids >= self.first).unsqueeze(-1), own, found)


@torch.no_grad()
def tokens_beyond(backbone: nn.Module, rows: int) -> OwnTokens | None:
    """The tokens of the embedding from that row on; None where there are none."""
    weight = _weight(backbone)
    if weight is None or len(weight) <= rows:
        return None
    outputs: Tensor = _tables(backbone)[0](torch.arange(rows, len(weight), device=weight.device))
    return OwnTokens(rows, outputs.clone())


@contextmanager
def reading(backbone: nn.Module, own: OwnTokens | None) -> Iterator[None]:
    """Within, a backbone whose embedding has the shared rows alone reads these tokens as well."""
    handles = [] if own is None else _serve(backbone, own)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def share_rows(backbone: nn.Module, rows: int) -> None:
    """Let an expert's token embedding have the base's rows, with which it can be compared and trained.

    Tokens beyond them are read as before, and are no parameters any more. Rows that the expert lacks are zero; none of
    its texts asks for them.
    """
    own = tokens_beyond(backbone, rows)
    resize_rows(backbone, rows)
    if own is not None:
        _serve(backbone, own)


def _serve(backbone: nn.Module, own: OwnTokens) -> list[RemovableHandle]:
    asked: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        asked[module] = args[0]
        return (own.shared(args[0]), *args[1:])

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return own.looked_up(asked.pop(module), output)

    handles = []
    for table in _tables(backbone):
        handles += [table.register_forward_pre_hook(before), table.register_forward_hook(after)]
    return handles


def _weight(backbone: nn.Module) -> nn.Parameter | None:
    reader: Any = getattr(backbone, "get_input_embeddings", None)
    try:
        found = reader() if reader is not None else None
    except NotImplementedError:  # CANINE hashes characters
        found = None
    config: Any = getattr(backbone, "config", None)
    size = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(found, nn.Embedding) or (size is not None and size != found.num_embeddings):
        return None
    weight: Any = found.weight
    return weight if isinstance(weight, nn.Parameter) else None


def _tables(backbone: nn.Module) -> list[nn.Embedding]:
    """The modules that look tokens up, each once; several may share one weight."""
    weight = _weight(backbone)
    return [module for module in backbone.modules() if isinstance(module, nn.Embedding) and module.weight is weight]
