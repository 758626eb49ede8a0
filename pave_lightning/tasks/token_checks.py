"""Find rows of which a tokenizer leaves nothing, or nothing that it knows."""

from __future__ import annotations

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

# A share of unknown tokens above which a tokenizer hardly fits its texts.
MOSTLY_UNKNOWN = 0.5


def token_findings(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, places: npt.NDArray[np.int64]
) -> tuple[list[str], list[str]]:
    """What is wrong with tokenised rows, and what is only worth saying.

    Args:
        rows: tokenised rows, with ``input_ids`` and their ``length``.
        tokenizer: what they were tokenised with.
        places: int64 of shape ``(n,)``: the number of each row in its file, counted from 0.

    Returns:
        Problems: rows without any token, or no text of which a token is in the vocabulary. Remarks: rows of which only
        special tokens are left, or a vocabulary that knows less than half of the texts.
    """
    table = rows.with_format("arrow")[:]
    name = str(tokenizer.name_or_path) or type(tokenizer).__name__
    empty = table.column("length").to_numpy() == 0
    if empty.any():
        found = _rows(places[empty])
        return [f"the tokenizer {name} makes no tokens of the text in {found}; correct or leave out these rows"], []
    known, unknown, words = _count(table.column("input_ids"), tokenizer)
    mark = tokenizer.unk_token
    if unknown and not known:
        return [
            f"the tokenizer {name} knows none of the {unknown} tokens of the texts (all are {mark}); "
            "is its vocabulary the base's, and made for the language of the texts?"
        ], []
    remarks = []
    if (words == 0).any():
        remarks.append(f"only special tokens are left of the text in {_rows(places[words == 0])}")
    share = unknown / max(known + unknown, 1)
    if share > MOSTLY_UNKNOWN:
        remarks.append(f"{share:.0%} of the tokens of the texts are unknown to the tokenizer {name} ({mark})")
    return [], remarks


def _count(column: pa.ChunkedArray, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, npt.NDArray[np.int64]]:
    """Known and unknown tokens of the texts, and how many tokens of text each row has (no row may be empty)."""
    # What frames even an empty text need not be declared as special.
    framing = {*tokenizer.all_special_ids, *tokenizer("")["input_ids"]} - {tokenizer.unk_token_id}
    special = np.asarray(sorted(framing), dtype=np.int64)
    known = unknown = 0
    words = [np.zeros(0, dtype=np.int64)]
    for ids in column.chunks:
        if len(ids):
            flat = np.asarray(pc.list_flatten(ids).to_numpy(zero_copy_only=False), dtype=np.int64)
            of_text = ~np.isin(flat, special)
            offsets = np.asarray(ids.offsets)[:-1]
            words.append(np.add.reduceat(of_text.astype(np.int64), offsets - offsets[0]))
            here = int((flat == tokenizer.unk_token_id).sum()) if _has_unknown(tokenizer) else 0
            unknown += here
            known += int(of_text.sum()) - here
    return known, unknown, np.concatenate(words)


def _has_unknown(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether unknown words have a token of their own, which stands for nothing else."""
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
    return tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in others


def _rows(places: npt.NDArray[np.int64]) -> str:
    first = f"row {places[0]} (counted from 0)"
    return first if len(places) == 1 else f"{len(places)} rows, first in {first}"
