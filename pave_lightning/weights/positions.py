"""How long a sequence a model can read, by what it is built of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_POSITIONS = re.compile(r"(^|[._])(pos(ition)?s?([._]|$)|wpe([._]|$)|embed_positions|position_ids|pos_encoding)")


def longest_sequence(backbone: nn.Module, config: Mapping[str, Any]) -> int | None:
    """The longest sequence in tokens that a backbone can read; None where no table of positions limits it.

    Tables are weights of embeddings, buffers with one row a position, and the positions counted in ``position_ids``.
    RoBERTa and its kin count from behind the padding index of the table, OPT and BART from behind an offset. Rotary
    and relative positions have no table, and so no end.

    Args:
        backbone: the backbone, which may be on the meta device.
        config: the model's configuration; of it only ``max_seq_len`` counts, which linear biases are built from.
    """
    limits = list(_tables(backbone))
    if limits:  # where there is no table, position_ids count up to a number that nothing uses
        limits += [
            buffer.shape[-1] for name, buffer in backbone.named_buffers() if name.rpartition(".")[2] == "position_ids"
        ]
    built = config.get("max_seq_len")
    return min(limits, default=built if isinstance(built, int) else None)


def _tables(backbone: nn.Module) -> Iterator[int]:
    for name, module in backbone.named_modules():
        if not _POSITIONS.search(name):
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 2 and not isinstance(module, nn.Linear):
            padding, offset = getattr(module, "padding_idx", None), getattr(module, "offset", None)
            before = 0 if padding is None else int(padding) + 1
            yield weight.shape[0] - before - (offset if isinstance(offset, int) else 0)
    for name, buffer in backbone.named_buffers():
        if _POSITIONS.search(name) and buffer.dim() == 2 and buffer.is_floating_point() and buffer.shape[0] > 1:
            yield buffer.shape[0]
