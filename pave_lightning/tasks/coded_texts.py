"""Texts as tensors of code points: what batches hold of texts, so that they are moved and shared as all else is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What fills up shorter texts.
END = -1


def coded_texts(texts: Sequence[str]) -> Tensor:
    """Texts as code points, int32 of shape ``(n, longest)``; behind its end a text is filled up with -1.

    Example:
        >>> coded_texts(["ab", ""])
        tensor([[97, 98],
                [-1, -1]], dtype=torch.int32)
    """
    longest = max(map(len, texts), default=0)
    return torch.tensor(
        [[*map(ord, text), *[END] * (longest - len(text))] for text in texts], dtype=torch.int32
    ).reshape(len(texts), longest)


def coded_lists(lists: Sequence[Sequence[str]]) -> Tensor:
    """Lists of texts, none of them empty, as code points, int32 of shape ``(n, most, longest)``.

    Shorter lists are filled up with their first text.
    """
    most = max(map(len, lists), default=0)
    flat = [text for texts in lists for text in (*texts, *[texts[0]] * (most - len(texts)))]
    return coded_texts(flat).reshape(len(lists), most, -1) if flat else torch.zeros(len(lists), 0, 0, dtype=torch.int32)


def decoded_texts(codes: Tensor) -> list[str]:
    """The texts that `coded_texts` was given, from shape ``(n, longest)``."""
    return ["".join(chr(code) for code in row if code != END) for row in codes.tolist()]


def decoded_lists(codes: Tensor) -> list[list[str]]:
    """The lists that `coded_lists` was given, filled up, from shape ``(n, most, longest)``."""
    return [decoded_texts(row) for row in codes]
