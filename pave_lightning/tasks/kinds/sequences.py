"""What kinds of task share of which an example is several sequences of tokens: two texts, choices, windows.

A row is encoded as lists of sequences. A batch holds all sequences of its examples one after the other, as a backbone
takes them, and says in ``example_of`` which example each is of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pave_lightning.tasks.kinds.texts import SingleLabelTask
from pave_lightning.tasks.kinds.tokens import MASK, TOKENS, PaddedBatches, random_tokens, token_findings, token_types
from pave_lightning.tasks.task import Batch

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# Of which example of the batch each sequence is, int64 of shape ``(sequences,)``.
EXAMPLE_OF = "example_of"


class SequencesTask(SingleLabelTask):
    """A task with one label a row, of which a model reads several sequences."""

    @property
    def stored_types(self) -> dict[str, pa.DataType]:
        """Small numbers, of tokens."""
        return nested_types()

    def findings(
        self, encoded: pa.Table, processor: PreTrainedTokenizerBase, places: npt.NDArray[np.int64]
    ) -> tuple[list[str], list[str]]:
        """Sequences of which the tokenizer leaves nothing, or nothing that it knows."""
        return sequence_findings(encoded, processor, places)

    def collate(
        self, processor: PreTrainedTokenizerBase, padding: int | None = None
    ) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        """Pads sequences to the longest one."""
        return SequenceBatches(processor, padding)

    def singles(self, batch: Batch) -> Iterator[Batch]:
        """The examples one by one, with all their sequences."""
        return single_examples(batch, ("labels",))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """All sequences, without what belongs to examples."""
        return {name: value for name, value in batch.items() if name not in ("labels", EXAMPLE_OF)}


class SequenceBatches:
    """Pads the sequences of several rows to the longest one, and stacks what belongs to rows.

    Args:
        tokenizer: it has a padding token.
        padding: see `PaddedBatches`.
        others: for further lists of one entry a token, by key, what fills them up.
        of_rows: what belongs to rows, by key, and what puts their entries into one tensor; labels are stacked.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        padding: int | None = None,
        others: Mapping[str, int] | None = None,
        of_rows: Mapping[str, Callable[[Sequence[Any]], Tensor]] | None = None,
    ) -> None:
        self._padded = PaddedBatches(tokenizer, padding, others)
        self._of_rows = {"labels": _stacked, **(of_rows or {})}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """The batch: tokens and the like of shape ``(sequences, longest)``, ``example_of``, what belongs to rows."""
        import torch

        names = [name for name in rows[0] if name not in self._of_rows]
        sequences = [{name: row[name][place] for name in names} for row in rows for place in range(len(row[TOKENS]))]
        owners = [index for index, row in enumerate(rows) for _ in row[TOKENS]]
        told = {name: stack([row[name] for row in rows]) for name, stack in self._of_rows.items() if name in rows[0]}
        return {**self._padded(sequences), EXAMPLE_OF: torch.tensor(owners), **told}


def _stacked(entries: Sequence[Any]) -> Tensor:
    import torch

    return torch.tensor(entries)


def nested(tokens: Mapping[str, list[Any]], sizes: Sequence[int]) -> dict[str, list[list[Any]]]:
    """Sequences that stand one after the other as lists of them, one list a row.

    Args:
        tokens: for each name one entry a sequence.
        sizes: how many sequences each row has.
    """
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return {
        name: [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        for name, values in tokens.items()
    }


def longest(tokens: Mapping[str, list[list[Any]]]) -> list[int]:
    """The length in tokens of the longest sequence of each row, by the attention masks that `nested` gives."""
    return [max(map(len, masks), default=0) for masks in tokens[MASK]]


def nested_types() -> dict[str, pa.DataType]:
    """What holds the sequences of a row in a file."""
    import pyarrow as pa

    return {name: pa.list_(kind) for name, kind in token_types().items()}


def sequence_findings(
    encoded: pa.Table, tokenizer: PreTrainedTokenizerBase, places: npt.NDArray[np.int64]
) -> tuple[list[str], list[str]]:
    """As `token_findings`, of rows of several sequences.

    Args:
        encoded: the rows.
        tokenizer: what they were tokenised with.
        places: int64 of shape ``(n,)``: the number of each row in its file, counted from 0.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    column = encoded.column(TOKENS)
    flat = pc.list_flatten(column)
    table = pa.table({TOKENS: flat, "length": pc.list_value_length(flat)})
    return token_findings(table, tokenizer, np.repeat(places, np.asarray(pc.list_value_length(column))))


def single_examples(batch: Batch, of_rows: Collection[str], *, apart: bool = False) -> Iterator[Batch]:
    """The examples of a batch one by one, with all their sequences and no more padding than these need.

    Args:
        batch: a batch as `SequenceBatches` makes it.
        of_rows: the keys of what belongs to rows.
        apart: whether each sequence is an example of its own.
    """
    owners, mask = batch[EXAMPLE_OF], batch[MASK]
    for index in range(len(owners) if apart else int(owners.max()) + 1):
        mine = [index] if apart else (owners == index).nonzero()[:, 0]
        row = int(owners[mine][0])
        used = mask[mine].bool().any(dim=0)
        yield {
            name: tensor[row : row + 1]
            if name in of_rows
            else tensor[mine][:, used]
            if tensor.shape == mask.shape
            else tensor[mine]
            for name, tensor in {**batch, EXAMPLE_OF: owners - row}.items()
        }


def random_sequences(
    tokenizer: PreTrainedTokenizerBase, count: int, sequences: int, max_length: int, seed: int
) -> tuple[dict[str, list[Any]], list[list[slice]]]:
    """Rows of sequences that are drawn at random, see `random_tokens`, and where the drawn tokens of each stand.

    Args:
        tokenizer: the tokenizer.
        count: how many rows.
        sequences: how many sequences a row has.
        max_length: longest sequence in tokens.
        seed: of the draws.
    """
    drawn, places = random_tokens(tokenizer, count * sequences, max_length, seed)
    del drawn["length"]
    rows = nested({**drawn, "places": places}, [sequences] * count)
    found = rows.pop("places")
    return {**rows, "length": longest(rows)}, found


def places_within(owners: Tensor) -> Tensor:
    """Which sequence of its example each sequence is, counted from 0; int64 of the owners' shape ``(sequences,)``."""
    import torch

    counts = owners.bincount()
    starts = counts.cumsum(0) - counts
    return torch.arange(len(owners), device=owners.device) - starts[owners]


def by_example(values: Tensor, owners: Tensor) -> Tensor:
    """Values of sequences, one row an example, and minus infinity where an example has fewer than others.

    Args:
        values: shape ``(sequences,)``, floating-point.
        owners: of which example each sequence is, int64 of shape ``(sequences,)``, in ascending order.

    Returns:
        Shape ``(examples, most)``.
    """
    import torch

    counts = owners.bincount()
    found = values.new_full((len(counts), int(counts.max())), -torch.inf)
    found[owners, places_within(owners)] = values
    return found
