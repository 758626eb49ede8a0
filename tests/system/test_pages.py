import gc
import re
from pathlib import Path

import pytest
import torch

from pave_lightning.system.pages import WORTH_PAGES, zeros_on_pages

STATUS = Path("/proc/self/status")


def resident():
    return int(re.search(r"VmRSS:\s+(\d+)", STATUS.read_text())[1]) * 1024


@pytest.mark.parametrize("shape", [(), (3, 4), (0, 5), (WORTH_PAGES, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_that_can_be_written_to(shape, dtype):
    found = zeros_on_pages(shape, dtype)
    assert (tuple(found.shape), found.dtype, found.device.type) == (shape, dtype, "cpu")
    assert not found.any()
    found += 1
    assert bool((found == 1).all())


@pytest.mark.skipif(not STATUS.exists(), reason="memory is told by Linux alone")
def test_pages_go_back_when_they_are_let_go():
    size = 40_000_000
    before = resident()
    held = zeros_on_pages((size // 4,), torch.float32)
    assert resident() - before < size // 4, "pages take no memory before they are written to"
    part = held[: size // 8].add_(1)
    held += 1
    assert resident() - before > size * 3 // 4
    del held
    gc.collect()
    assert resident() - before > size * 3 // 4, "a view keeps them"
    del part
    gc.collect()
    assert resident() - before < size // 4
