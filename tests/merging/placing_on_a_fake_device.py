"""Methods on a device: nothing is computed on the wrong one, and the results are those of the CPU."""

import pytest
import torch

from fake_device import NAME, fake_device
from pave_lightning.merging import known_methods, merge

OURS = {name: kind for name, kind in sorted(known_methods().items()) if kind.__module__.startswith("pave_lightning.")}
PLACED = [name for name, kind in OURS.items() if not kind.cpu_because("cuda")]


def merged(name, source, device=None):
    method = OURS[name]()
    if device is not None:
        method.device = device
    return merge(method, source)


@pytest.mark.parametrize("name", PLACED)
def test_a_device_gives_what_the_cpu_gives(name, random_source):
    for low_rank in (True, False):
        source = random_source(2 if name == "slerp" else 3, low_rank=low_rank)
        expected = merged(name, source)
        with fake_device() as device:
            found = merged(name, source, torch.device(NAME, 0))
        assert device.operations
        assert not [operation for operation in sorted(device.on_cpu) if "linalg" in operation or "mm" in operation]
        for parameter, vector in expected.vectors.items():
            assert found.vectors[parameter].device.type == "cpu"
            assert torch.equal(found.vectors[parameter], vector)
        assert found.rescalers == expected.rescalers
        for task, masks in expected.masks.items():
            assert all(torch.equal(found.masks[task][key], mask) for key, mask in masks.items())
            for key, factors in expected.factors[task].items():
                assert torch.equal(found.factors[task][key].left, factors.left)


@pytest.mark.parametrize("name", [name for name in PLACED if OURS[name].single_precision])
def test_methods_of_single_precision_need_no_float64(name, random_source):
    with fake_device(without=[torch.float64]):
        merged(name, random_source(3), torch.device(NAME, 0))


def test_others_say_why_they_stay_on_the_cpu():
    assert OURS["tsv_m"].cpu_because("mps") == "mps has no float64"
    assert OURS["ties"].cpu_because("mps") == ""
    assert OURS["fisher"].cpu_because("cuda") == "what it needs besides the weights is there"
    assert {name for name, kind in OURS.items() if kind.cpu_because("cpu")} == set()


def test_the_fake_device_finds_what_is_mixed():
    with fake_device():
        placed = torch.ones(3).to(torch.device(NAME, 0))
        with pytest.raises(RuntimeError, match="on the same device"):
            placed + torch.ones(3)
        assert float((placed + 1).sum()) == 6


@pytest.mark.cuda
@pytest.mark.parametrize("name", PLACED)
def test_a_graphics_card_gives_what_the_cpu_gives(name, random_source):
    source = random_source(2 if name == "slerp" else 3)
    expected, found = merged(name, source), merged(name, source, torch.device("cuda"))
    for parameter, vector in expected.vectors.items():
        torch.testing.assert_close(found.vectors[parameter], vector, rtol=1e-4, atol=1e-5)
