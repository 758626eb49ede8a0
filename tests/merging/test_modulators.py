import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pave_lightning.errors import PaveError
from pave_lightning.merging.modulators import LowRank, Modulator, modulated, pack_mask, unpack_mask


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


def test_the_highest_bit_comes_first():
    assert pack_mask(torch.tensor([True] + 7 * [False] + [False, True])).tolist() == [128, 64]


def test_a_file_of_masks(tmp_path, packed):
    masks = {"a": torch.rand(3, 5) < 0.5, "b": torch.rand(9) < 0.5}
    path = tmp_path / "task.safetensors"
    packed(path, masks, 0.1 + 0.2)
    modulator = Modulator(path)
    assert sorted(modulator) == ["a", "b"]
    assert modulator.rescaler == 0.1 + 0.2
    unified = torch.randn(3, 5)
    assert torch.equal(modulator.apply("a", unified), unified * masks["a"] * (0.1 + 0.2))


def test_a_file_of_masks_and_factors(tmp_path, packed):
    mask = torch.rand(3, 5) < 0.5
    factors = {name: LowRank(torch.randn(4, 3).T, torch.randn(4, 5)) for name in ("a", "b")}
    path = tmp_path / "task.safetensors"
    packed(path, {"a": mask}, 0.5, factors)
    modulator = Modulator(path)
    assert sorted(modulator) == ["a", "b"]
    unified = torch.randn(3, 5)
    for name, masked in (("a", unified * mask), ("b", unified)):
        expected = 0.5 * (masked + factors[name].left @ factors[name].right)
        assert torch.allclose(modulator.apply(name, unified), expected)


def test_factors_are_added_in_the_shape_of_the_parameter(tmp_path, packed):
    path = tmp_path / "task.safetensors"
    kernel, column = torch.randn(4, 3, 2, 2), torch.randn(7)
    left, values, right = torch.linalg.svd(kernel.flatten(1), full_matrices=False)
    factors = {"kernel": LowRank(left * values, right), "bias": LowRank(column[:, None], torch.ones(1, 1))}
    factors["scalar"] = LowRank(torch.full((1, 1), 2.5), torch.ones(1, 1))
    packed(path, {}, 1.0, factors)
    modulator = Modulator(path)
    assert torch.allclose(modulator.apply("kernel", torch.zeros(4, 3, 2, 2)), kernel, atol=1e-5)
    assert torch.equal(modulator.apply("bias", torch.zeros(7)), column)
    assert torch.equal(modulator.apply("scalar", torch.tensor(1.0)), torch.tensor(3.5))


def test_factors_take_no_more_than_their_own_elements(tmp_path, packed):
    path = tmp_path / "task.safetensors"
    packed(path, {}, 1.0, {"a": LowRank(torch.ones(100, 200)[:, :3], torch.ones(3, 80))})
    assert path.stat().st_size < 4 * 3 * 180 + 500


def test_what_no_mask_and_no_factors_change():
    shared = torch.tensor([[1.0, 2.0]])
    mask, factors = torch.tensor([[True, False]]), LowRank(torch.tensor([[3.0]]), torch.tensor([[1.0, -1.0]]))
    assert modulated(shared, None, None, 1.0).tolist() == [[1, 2]]
    assert modulated(shared, mask, None, 2.0).tolist() == [[2, 0]]
    assert modulated(shared, None, factors, 2.0).tolist() == [[8, -2]]
    assert modulated(shared, mask, factors, 2.0).tolist() == [[8, -6]]


def test_equal_results_are_equal_files(tmp_path, packed):
    masks = {name: torch.ones(8, dtype=torch.bool) for name in "abcd"}
    contents = set()
    for number in range(8):
        packed(tmp_path / f"{number}.safetensors", masks, 1.5)
        contents.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(contents) == 1


def test_masks_take_a_bit_an_element(tmp_path, packed):
    path = tmp_path / "task.safetensors"
    packed(path, {"a": torch.ones(1000, 80, dtype=torch.bool)}, 1.0)
    assert path.stat().st_size < 10_000 + 500


def test_files_that_are_no_masks(tmp_path, packed):
    path = tmp_path / "task.safetensors"
    with pytest.raises(PaveError, match="no readable file of what a task keeps"):
        Modulator(path)
    packed(path, {"a": torch.ones(100, dtype=torch.bool)}, 1.0)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(PaveError, match="no readable file of what a task keeps"):
        Modulator(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(PaveError, match="no readable file of what a task keeps"):
        Modulator(path)
    save_file({"a": torch.ones(2)}, path, metadata={"modulator": '{"shapes": {'})
    with pytest.raises(PaveError, match="no readable file of what a task keeps"):
        Modulator(path)
