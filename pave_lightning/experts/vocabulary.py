"""Whether the tokens of a base and of its experts mean the same, and whether their embeddings have a row for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pave_lightning.tasks.tokenizers import load_tokenizer, padding_note
from pave_lightning.weights import Architecture, Checkpoint
from pave_lightning.weights.adapter_models import embedding_rows
from pave_lightning.weights.adapters import ADAPTER_CONFIG
from pave_lightning.weights.tokenizer_files import has_tokenizer


def token_rows(folder: Path, architecture: Architecture, base: Checkpoint | None = None) -> int | None:
    """Rows of the token embedding that a model folder holds; None where it has no such table.

    Args:
        folder: folder of a model, or of an adapter.
        architecture: its architecture; of an adapter, its base's.
        base: the base of an adapter that brings no embedding along.

    Raises:
        PaveError: the weights cannot be read.
    """
    if (folder / ADAPTER_CONFIG).is_file() and base is not None:
        return embedding_rows(folder, architecture.token_embeddings) or table_rows(base, architecture)
    return table_rows(architecture.checkpoint(folder), architecture)


def table_rows(checkpoint: Checkpoint, architecture: Architecture) -> int | None:
    """Rows of the token embedding of a checkpoint; None where it has no such table."""
    stored = checkpoint.backbone
    return next((stored[name].shape[0] for name in architecture.token_embeddings if name in stored), None)


def row_problems(what: str, rows: int | None, named: int | None, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What speaks against reading a tokenizer's tokens with an embedding.

    Args:
        what: whose they are.
        rows: rows of the embedding; None where there is none.
        named: how many rows config.json names.
        tokenizer: its tokenizer.
    """
    if rows is None:
        return
    if named is not None and named != rows:
        yield f"{what}: its token embedding has {rows} rows, but its config.json says vocab_size {named}; save it again"
    last = max(tokenizer.get_vocab().values())
    if last >= rows:
        yield (
            f"{what}: its tokenizer has {len(tokenizer)} tokens, but its embedding {rows} rows, so token {last} could "
            "not be read; is it the tokenizer of another model?"
        )


def differing_tokens(what: str, own: Mapping[str, int], vocabulary: Mapping[str, int]) -> Iterator[str]:
    """Why an expert's tokens are not the base's; tokens that only one of the two knows may be.

    Args:
        what: whose they are.
        own: the expert's tokens and their numbers.
        vocabulary: the base's.
    """
    names = {number: token for token, number in vocabulary.items()}
    moved = {token: number for token, number in own.items() if vocabulary.get(token, number) != number}
    renamed = {
        token: number for token, number in own.items() if token not in vocabulary and names.get(number, token) != token
    }
    differing = sorted((number, token) for token, number in (moved | renamed).items())
    if not differing:
        return
    number, token = differing[0]
    counted = "1 token differs" if len(differing) == 1 else f"{len(differing)} tokens differ"
    in_base = f"token {vocabulary[token]}" if token in moved else f"not known, and token {number} is {names[number]!r}"
    yield (
        f"{what}: its vocabulary is not the base's: {counted}, first {token!r}, which is token "
        f"{number} there, but {in_base} in the base; tokens in common must have the same numbers, so fine-tune it with "
        "the base's tokenizer, to which tokens may be added at the end, or set vocabulary: base_rows or union, which "
        "match rows by token"
    )


def expert_notes(
    task: str, folder: Path, base: Checkpoint, architecture: Architecture, *, aligned: bool = False
) -> Iterator[str]:
    """What to tell of the tokens of an expert that is taken as it is.

    Args:
        task: the expert's task.
        folder: its folder.
        base: the base's checkpoint.
        architecture: its architecture.
        aligned: whether its rows are matched by token, of which more is told elsewhere.

    Raises:
        PaveError: its tokenizer or its weights cannot be read.
    """
    where = f"task '{task}'"
    if not has_tokenizer(folder):
        yield f"{where}: {folder} holds no tokenizer files; the base's tokenizer is used"
    elif note := padding_note(load_tokenizer(folder, base.folder)):
        yield f"{where}: {note}"
    own, rows = token_rows(folder, architecture, base), table_rows(base, architecture)
    if aligned or own is None or rows is None or own == rows:
        return
    if own > rows:
        counted = "row beyond the base's is" if own - rows == 1 else "rows beyond the base's are"
        yield (
            f"{where}: the token embedding of {folder} has {own} rows, the base's {rows}; the {own - rows} {counted} "
            "not merged, and kept with the task as its head is"
        )
    else:
        yield (
            f"{where}: the token embedding of {folder} has {own} rows, the base's {rows}; the rows that it lacks count "
            "as unchanged"
        )
