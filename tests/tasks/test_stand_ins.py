"""Batches of weight 0."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

from pave_lightning.tasks.samplers import ExactSampler
from pave_lightning.tasks.stand_ins import EvenBatches, WeightedCollate, WeightedRows, rows_in_order, split_weight


class Rows(list):
    def __getitems__(self, places):
        return [{"value": self[place]} for place in places]


def collate(rows):
    return {"value": torch.tensor([row["value"] for row in rows])}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 24])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_all_processes_run_equally_many_batches_and_every_row_counts_once(world, rows, size):
    lengths = [(5 * row) % 7 + 1 for row in range(rows)]
    counted, batches = [], []
    for rank in range(world):
        sampler = ExactSampler(lengths, world=world, rank=rank)
        even = EvenBatches(sampler, size)
        loader = DataLoader(
            WeightedRows(Rows(range(100, 100 + rows))), batch_sampler=even, collate_fn=WeightedCollate(collate)
        )
        found = [split_weight(batch) for batch in loader]
        real = [batch["value"].tolist() for batch, counts in found if counts]
        assert all(set(batch) == {"value"} for batch, _ in found)
        assert [len(batch["value"]) for batch, counts in found if not counts] == [1] * even.stand_ins
        assert [value - 100 for batch in real for value in batch] == rows_in_order(loader)
        assert len(even) == len(found)
        counted += [value for batch in real for value in batch]
        batches.append(len(found))
    assert sorted(counted) == list(range(100, 100 + rows))
    assert batches == [math.ceil(math.ceil(rows / world) / size)] * world


def test_without_rows_there_is_nothing_to_stand_in_for():
    assert list(EvenBatches(ExactSampler([], world=2, rank=1), 4)) == []


def test_a_batch_without_weights_counts():
    batch = {"labels": torch.ones(2)}
    assert split_weight(batch) == (batch, True)


def test_only_exact_loaders_say_which_rows_they_give():
    with pytest.raises(TypeError, match="ExactSampler"):
        rows_in_order(DataLoader([1, 2]))
