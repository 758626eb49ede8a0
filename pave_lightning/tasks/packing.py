"""Several rows in one sequence, none of which sees another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Of which row each token of a sequence is, counted from 1; 0 where there is padding.
SEGMENTS = "segments"


def bins(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which rows share a sequence: the longest first, each into the first sequence that has room.

    Args:
        lengths: of the rows, none above ``most``.
        most: the most tokens of a sequence.

    Example:
        >>> bins([3, 6, 2, 4], 8)
        [[1, 2], [3, 0]]
    """
    found: list[tuple[int, list[int]]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = next((i for i, (used, _) in enumerate(found) if used + lengths[row] <= most), None)
        if place is None:
            found.append((lengths[row], [row]))
        else:
            used, rows = found[place]
            found[place] = used + lengths[row], [*rows, row]
    return [rows for _, rows in found]


def packed(
    rows: Sequence[Mapping[str, Any]], most: int, filling: Mapping[str, int], length_of: str
) -> dict[str, Tensor]:
    """Rows as fewer sequences, one behind the other.

    Args:
        rows: for each key one entry a token.
        most: the most tokens of a sequence.
        filling: the keys, and what fills up shorter sequences.
        length_of: the key that tells a row's length.

    Returns:
        Each key, and ``segments``: int64 of shape ``(sequences, longest)``.
    """
    shared = bins([len(row[length_of]) for row in rows], most)
    longest = max(sum(len(rows[row][length_of]) for row in one) for one in shared)

    def column(of_row: Any, fill: int) -> Tensor:
        lines = [[value for place, row in enumerate(one) for value in of_row(place, row)] for one in shared]
        return torch.tensor([[*line, *[fill] * (longest - len(line))] for line in lines])

    found = {name: column(lambda _, row, name=name: rows[row][name], fill) for name, fill in filling.items()}
    return {**found, SEGMENTS: column(lambda place, row: [place + 1] * len(rows[row][length_of]), 0)}


def positions_within(segments: Tensor) -> Tensor:
    """The place of each token within its own row, int64 of the segments' shape.

    Example:
        >>> positions_within(torch.tensor([[1, 1, 2, 2, 2, 0]]))
        tensor([[0, 1, 0, 1, 2, 0]])
    """
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values


def attention_within(segments: Tensor) -> Tensor:
    """Which tokens each token sees: those of its own row up to itself; bool of shape ``(n, 1, L, L)``."""
    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    before = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return (same & before)[:, None]
