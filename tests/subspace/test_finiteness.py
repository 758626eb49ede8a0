import pytest
import torch

from pave_lightning.subspace import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_which_tensors_are_finite(dtype):
    assert is_finite(torch.tensor([[-1.0, 2.0], [0.0, torch.finfo(dtype).max]], dtype=dtype))
    assert is_finite(torch.empty(0, 3, dtype=dtype))
    assert is_finite(torch.tensor(3.0, dtype=dtype))
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not is_finite(torch.tensor([[0.0, 1.0, bad]] * 50, dtype=dtype))
        assert not is_finite(torch.tensor(bad, dtype=dtype))
