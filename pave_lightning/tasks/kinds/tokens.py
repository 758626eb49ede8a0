"""What kinds of task that read text share: rows as tokens, batches of them, what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pave_lightning.errors import PaveError
from pave_lightning.system.keeping import kept

if TYPE_CHECKING:  # what a recipe is read with loads none of these
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TOKENS = "input_ids"
MASK = "attention_mask"
# A share of unknown tokens above which a tokenizer hardly fits its texts.
MOSTLY_UNKNOWN = 0.5


def padding_problem(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why rows of one batch could not be padded to one length; None where they can."""
    if tokenizer.special_tokens_map.get("pad_token") is not None:
        return None
    return (
        f"the tokenizer {tokenizer_name(tokenizer)} has no padding token, but rows of one batch must be padded to one "
        "length; set 'pad_token' in its tokenizer_config.json, for instance to its end-of-text token"
    )


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """How messages call a tokenizer."""
    return str(tokenizer.name_or_path) or type(tokenizer).__name__


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides how a tokenizer encodes; the same in every process and before and after use.

    Inside of `keeping` it is computed once.
    """
    return kept(("fingerprint", tokenizer), lambda: _fingerprint(tokenizer))


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # State that each call leaves behind, no property of the tokenizer.
        content.update(truncation=None, padding=None)
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            content = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    sides = [tokenizer.truncation_side, tokenizer.model_input_names]
    return hashlib.sha256(json.dumps([content, sides], sort_keys=True).encode()).hexdigest()


def tokenise(
    tokenizer: PreTrainedTokenizerBase, *texts: Any, max_length: int, truncation: bool | str = True, **how: Any
) -> Any:
    """Texts as tokens, cut to a length, with their attention mask.

    Args:
        tokenizer: the tokenizer.
        texts: one list of texts, or two lists of the first and the second texts of pairs.
        max_length: longest sequence in tokens; longer texts are cut, of a pair the longer text first.
        truncation: which texts are cut, where not both.
        how: further options of the tokenizer.

    Raises:
        PaveError: the tokenizer cannot encode some of them.
    """
    try:
        return tokenizer(*texts, truncation=truncation, max_length=max_length, return_attention_mask=True, **how)
    except Exception as error:
        # A class of its own the tokenizers library does not have.
        if type(error) is not Exception:
            raise
        raise PaveError(
            f"the tokenizer {tokenizer_name(tokenizer)} cannot encode some of the texts ({error}); its tokenizer.json "
            "is damaged or incomplete"
        ) from error


class PaddedBatches:
    """Pads rows to the longest one, on the side that the tokenizer names, and stacks them.

    The attention mask goes by length: a token that pads elsewhere and stands in a text, such as the end-of-text token,
    is read like any other.

    Args:
        tokenizer: it has a padding token.
        padding: the token that fills up rows; the tokenizer's where none is given. Heads that look for the last token
            know padding by the model's own, which may be another one.
        others: for further lists of one entry a token, by key, what fills them up.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        padding: int | None = None,
        others: Mapping[str, int] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.padding = None if padding == tokenizer.pad_token_id else padding
        self.others = dict(others or {})

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor]:
        """The batch: ``input_ids``, ``attention_mask`` and what each token has, of shape ``(n, longest row)``."""
        import torch

        tokens = [{name: value for name, value in row.items() if name not in self.others} for row in rows]
        # The mask is asked for, since not every tokenizer counts it among its model's inputs.
        batch: Any = self._tokenizer.pad(tokens, return_attention_mask=True, return_tensors="pt")
        if self.padding is not None:
            batch[TOKENS] = batch[TOKENS].masked_fill(batch[MASK] == 0, self.padding)
        for name, filling in self.others.items():
            if name in rows[0]:
                given = torch.full_like(batch[TOKENS], filling)
                given[batch[MASK].bool()] = torch.tensor([value for row in rows for value in row[name]])
                batch[name] = given
        found: Mapping[str, Tensor] = batch
        return found


def random_tokens(
    tokenizer: PreTrainedTokenizerBase, count: int, max_length: int, seed: int
) -> tuple[dict[str, list[Any]], list[slice]]:
    """Sequences of tokens drawn uniformly from the vocabulary, within the special tokens of a real one.

    Args:
        tokenizer: the tokenizer.
        count: how many; their lengths are drawn uniformly from one token up to the longest that fits.
        max_length: longest sequence in tokens.
        seed: of the draws.

    Returns:
        The rows, and for each where its drawn tokens stand.
    """
    import numpy as np

    drawn = np.random.default_rng(seed)
    special = set(tokenizer.all_special_ids)
    words = np.asarray([index for index in range(len(tokenizer)) if index not in special])
    framed = tokenizer("a", return_special_tokens_mask=True)
    places = [place for place, is_special in enumerate(framed["special_tokens_mask"]) if not is_special]
    before, after = framed[TOKENS][: places[0]], framed[TOKENS][places[-1] + 1 :]
    longest = max_length - len(before) - len(after)
    rows = [
        [*before, *drawn.choice(words, size=drawn.integers(1, longest, endpoint=True)).tolist(), *after]
        for _ in range(count)
    ]
    table: dict[str, list[Any]] = {
        TOKENS: rows,
        MASK: [[1] * len(row) for row in rows],
        "length": [len(row) for row in rows],
    }
    return table, [slice(len(before), len(row) - len(after)) for row in rows]


def token_types() -> dict[str, pa.DataType]:
    """What holds lists of tokens and of marks of tokens in a file, by the names that tokenizers give them."""
    import pyarrow as pa

    marks = pa.list_(pa.int8())
    return {TOKENS: pa.list_(pa.int32()), MASK: marks, "token_type_ids": marks}


def token_findings(
    rows: pa.Table, tokenizer: PreTrainedTokenizerBase, places: npt.NDArray[np.int64]
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
    name = tokenizer_name(tokenizer)
    empty = rows.column("length").to_numpy() == 0
    if empty.any():
        found = _rows(places[empty])
        return [f"the tokenizer {name} makes no tokens of the text in {found}; correct or leave out these rows"], []
    known, unknown, words = _count(rows.column(TOKENS), tokenizer)
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
    import numpy as np
    import pyarrow.compute as pc

    # What frames even an empty text need not be declared as special.
    framing = {*tokenizer.all_special_ids, *tokenizer("")[TOKENS]} - {tokenizer.unk_token_id}
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
