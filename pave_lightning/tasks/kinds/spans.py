"""Spans of a text as tokens: where tokens stand in it, which of them an answer begins and ends with, the best span."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def cut_texts(tokenizer: PreTrainedTokenizerBase, questions: list[str], most: int) -> list[str]:
    """Questions without what stands behind their first tokens."""
    found = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    return [
        text if len(offsets) <= most else text[: offsets[most - 1][1]]
        for text, offsets in zip(questions, found["offset_mapping"], strict=True)
    ]


def stands_for_none(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The place of the token that stands for no answer: that of classification, or of the beginning, or the first."""
    for token in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        if token is not None and token in ids:
            return ids.index(token)
    return 0


def places_in_context(
    offsets: Sequence[tuple[int, int]], parts: Sequence[int | None], none: int
) -> tuple[list[int], list[int]]:
    """Where each token of a window begins and ends in the context, in characters.

    Tokens of something else have -1 and -1, the one that stands for no answer 0 and 0.
    """
    known = [part == 1 and end > begin for (begin, end), part in zip(offsets, parts, strict=True)]
    begins = [begin if there else -1 for (begin, _), there in zip(offsets, known, strict=True)]
    ends = [end if there else -1 for (_, end), there in zip(offsets, known, strict=True)]
    begins[none] = ends[none] = 0
    return begins, ends


def tokens_of(span: tuple[int, int], begins: Sequence[int], ends: Sequence[int]) -> tuple[int, int]:
    """The first and the last token of a span of characters; the one that stands for none where it is not all there."""
    none = next(place for place, (begin, end) in enumerate(zip(begins, ends, strict=True)) if begin == end == 0)
    known = [place for place, (begin, end) in enumerate(zip(begins, ends, strict=True)) if end > begin]
    if span[0] == span[1] or not known or begins[known[0]] > span[0] or ends[known[-1]] < span[1]:
        return none, none
    first = next((place for place in known if ends[place] > span[0]), none)
    last = next((place for place in reversed(known) if begins[place] < span[1]), none)
    return (first, last) if first <= last else (none, none)


def best_spans(
    logits: Tensor, begins: Tensor, ends: Tensor, owners: Tensor, *, most: int, may_be_none: bool
) -> list[tuple[int, int]]:
    """Where the answer of each row begins and ends in its context, in characters; 0 and 0 for no answer.

    The span with the largest sum of both logits of all windows is taken. Where rows may have no answer, there is none
    if the least of the windows' sums for it is larger.

    Args:
        logits: of each token as the first and the last one, shape ``(windows, length, 2)``.
        begins: int64 of shape ``(windows, length)``, see `places_in_context`.
        ends: as ``begins``.
        owners: of which row each window is, int64 of shape ``(windows,)``.
        most: most tokens of a span.
        may_be_none: whether rows may have no answer.
    """
    import torch

    known = ends > begins
    first, last = (logits[..., which].masked_fill(~known, -torch.inf) for which in (0, 1))
    best = first.new_full((len(first),), -torch.inf)
    chosen = torch.zeros(len(first), 2, dtype=torch.int64, device=first.device)
    length = first.shape[1]
    for more in range(min(most, length)):  # tokens behind the first one
        value, place = (first[:, : length - more] + last[:, more:]).max(dim=1)
        better = value > best
        best = value.where(better, best)
        chosen[better] = torch.stack([place, place + more], dim=1)[better]
    none = (logits.sum(dim=-1)).masked_fill(known | (begins < 0), torch.inf).amin(dim=1)
    spans = torch.stack([begins.gather(1, chosen[:, :1])[:, 0], ends.gather(1, chosen[:, 1:])[:, 0]], dim=1)
    found: dict[int, tuple[float, float, tuple[int, int]]] = {}
    # A window without any token of the context has no span.
    told = zip(owners.tolist(), best.tolist(), none.tolist(), spans.tolist(), strict=True)
    for owner, value, nothing, (begin, end) in told:
        before = found.get(owner, (-torch.inf, torch.inf, (0, 0)))
        span = (value, (begin, end)) if value > before[0] else (before[0], before[2])
        found[owner] = span[0], min(nothing, before[1]), span[1]
    return [(0, 0) if may_be_none and nothing > value else span for _, (value, nothing, span) in sorted(found.items())]
