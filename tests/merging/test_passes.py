"""Putting weights into modules."""

import pytest
import torch
from torch import nn

from pave_lightning.errors import PaveError
from pave_lightning.merging.passes import load_parameters, misnamed, share_parameters


def test_parameters_are_copied_in():
    layer = nn.Linear(2, 2)
    load_parameters(layer, {"weight": torch.ones(2, 2)})
    assert (layer.weight == 1).all()
    with pytest.raises(PaveError, match="Linear knows 1 weights by other names than checkpoints do, such as nothing"):
        load_parameters(layer, {"nothing": torch.ones(2), "weight": torch.zeros(2, 2)})
    assert (layer.weight == 1).all(), "nothing is half loaded"


def test_shared_parameters_stay_tied_and_are_one_for_all_modules():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.out.weight = self.words.weight
            self.other = nn.Linear(3, 3)
            self.register_buffer("mean", torch.zeros(3))

    shared = {"words.weight": nn.Parameter(torch.randn(4, 3)), "mean": nn.Parameter(torch.ones(3))}
    modules = [Tied(), Tied()]
    own = modules[0].other.weight
    for module in modules:
        share_parameters(module, shared)
        assert module.words.weight is module.out.weight is shared["words.weight"]
        assert torch.equal(module.mean, torch.ones(3))
        assert not module.mean.requires_grad
    assert modules[0].other.weight is own
    with pytest.raises(PaveError, match="knows 1 weights by other names than checkpoints do, such as absent"):
        share_parameters(modules[0], {"absent": nn.Parameter(torch.zeros(1))})


def test_a_tied_weight_is_known_by_both_names():
    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    tied[1].weight = tied[0].weight
    load_parameters(tied, {"1.weight": torch.full((2, 2), 3.0)})
    assert (tied[0].weight == 3).all()
    assert misnamed(tied, ["0.weight", "1.weight"]) is None
    assert "knows 1 weights by other names" in misnamed(tied, ["1.weight", "2.weight"])
