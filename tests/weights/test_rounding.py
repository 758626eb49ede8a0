import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.weights import rounded, written_dtype


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_type_of_the_base_is_taken_but_never_more_than_is_computed_in(stored):
    wanted = torch.float32 if stored == torch.float64 else stored
    assert written_dtype("base", stored) == wanted
    assert [written_dtype(name, stored) for name in ("float32", "bfloat16", "float16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]


def test_values_are_rounded_to_the_nearest():
    values = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    assert np.array_equal(rounded(torch.tensor(values), torch.float16, "w").numpy(), values.astype(np.float16))
    # bfloat16 is the upper half of a float32; ties go to even.
    bits = values.view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    assert np.array_equal(rounded(torch.tensor(values), torch.bfloat16, "w").float().numpy(), nearest)


def test_a_tensor_of_the_type_stays_the_same_object():
    tensor = torch.ones(2)
    assert rounded(tensor, torch.float32, "w") is tensor


@pytest.mark.parametrize(
    ("value", "dtype", "wider"),
    [(70_000.0, torch.float16, "bfloat16 or float32"), (3.4e38, torch.bfloat16, "float32")],
)
def test_what_a_type_cannot_hold_is_refused_by_name(value, dtype, wider):
    with pytest.raises(PaveError, match=rf"layer\.3\.weight holds values up to .* write the model in {wider} "):
        rounded(torch.tensor([1.0, -value]), dtype, "layer.3.weight")
    assert torch.isfinite(rounded(torch.tensor([65504.0]), torch.float16, "w")).all()
