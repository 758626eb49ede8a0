"""Which rows share a sequence, where each begins again, and what each token sees."""

import random

import torch

from pave_lightning.tasks.packing import attention_within, bins, packed, positions_within


def test_every_row_stands_once_and_no_sequence_is_too_long():
    drawn = random.Random(0)
    for most in (8, 16, 40):
        lengths = [drawn.randint(1, most) for _ in range(60)]
        found = bins(lengths, most)
        assert sorted(row for one in found for row in one) == list(range(60))
        assert max(sum(lengths[row] for row in one) for one in found) <= most
        # First fit is never worse than twice what any packing needs.
        assert len(found) <= 2 * -(-sum(lengths) // most)


def test_rows_lie_behind_each_other_and_see_only_themselves():
    rows = [{"ids": [5, 6], "mark": [0, 1]}, {"ids": [7, 8, 9], "mark": [0, 0, 1]}, {"ids": [4] * 4, "mark": [1] * 4}]
    found = packed(rows, 5, {"ids": 0, "mark": 0}, "ids")
    assert found["ids"].tolist() == [[4, 4, 4, 4, 0], [7, 8, 9, 5, 6]]
    assert found["mark"].tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 0, 1]]
    assert found["segments"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 2, 2]]
    assert positions_within(found["segments"]).tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    seen = attention_within(found["segments"])[1, 0]
    expected = torch.zeros(5, 5, dtype=torch.bool)
    for start, end in ((0, 3), (3, 5)):
        for place in range(start, end):
            expected[place, start : place + 1] = True
    assert torch.equal(seen, expected)
