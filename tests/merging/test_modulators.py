import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pave_lightning.errors import PaveError
from pave_lightning.merging import Modulator, PackedMasks
from pave_lightning.merging.modulators import pack_mask, unpack_mask


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=3), st.integers(0, 2**32 - 1))
def test_packed_masks_of_any_size_come_back(shape, seed):
    mask = torch.tensor(np.random.default_rng(seed).random(shape) < 0.5)
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-mask.numel() // 8)
    back = unpack_mask(packed, tuple(shape))
    assert back.dtype == torch.bool
    assert torch.equal(back, mask)


def packed(path, masks, rescaler):
    kept = PackedMasks()
    for name, mask in masks.items():
        kept.add(name, mask)
    kept.save(path, rescaler)


def test_the_highest_bit_comes_first():
    assert pack_mask(torch.tensor([True] + 7 * [False] + [False, True])).tolist() == [128, 64]


def test_a_file_of_masks(tmp_path):
    masks = {"a": torch.rand(3, 5) < 0.5, "b": torch.rand(9) < 0.5}
    path = tmp_path / "task.safetensors"
    packed(path, masks, 0.1 + 0.2)
    modulator = Modulator(path)
    assert sorted(modulator) == ["a", "b"]
    assert modulator.rescaler == 0.1 + 0.2
    unified = torch.randn(3, 5)
    assert torch.equal(modulator.apply("a", unified), unified * masks["a"] * (0.1 + 0.2))


def test_masks_take_a_bit_an_element(tmp_path):
    path = tmp_path / "task.safetensors"
    packed(path, {"a": torch.ones(1000, 80, dtype=torch.bool)}, 1.0)
    assert path.stat().st_size < 10_000 + 500


def test_files_that_are_no_masks(tmp_path):
    path = tmp_path / "task.safetensors"
    with pytest.raises(PaveError, match="no readable file of task masks"):
        Modulator(path)
    packed(path, {"a": torch.ones(100, dtype=torch.bool)}, 1.0)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(PaveError, match="no readable file of task masks"):
        Modulator(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(PaveError, match="no readable file of task masks"):
        Modulator(path)
    save_file({"a": torch.ones(2)}, path, metadata={"shapes": "{", "rescaler": "1.0"})
    with pytest.raises(PaveError, match="no readable file of task masks"):
        Modulator(path)
