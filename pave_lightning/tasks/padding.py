"""Rows of tokens put into one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase


class PaddedBatches:
    """Pads rows to the longest one, on the side that the tokenizer names, and stacks them.

    The attention mask goes by length: a token that pads elsewhere and stands in a text, such as the end-of-text token,
    is read like any other.

    Args:
        tokenizer: it has a padding token.
        padding: the token that fills up rows; the tokenizer's where none is given. Heads that look for the last token
            know padding by the model's own, which may be another one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, padding: int | None = None) -> None:
        self._tokenizer = tokenizer
        self.padding = None if padding == tokenizer.pad_token_id else padding

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor]:
        """The batch; ``input_ids`` and ``attention_mask`` of shape ``(n, longest row)``."""
        # The mask is asked for, since not every tokenizer counts it among its model's inputs.
        batch: Any = self._tokenizer.pad([dict(row) for row in rows], return_attention_mask=True, return_tensors="pt")
        if self.padding is not None:
            batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, self.padding)
        found: Mapping[str, Tensor] = batch
        return found
