"""Models of timm, where it can be imported; `plain` has stand-ins for where it cannot."""

from functools import partial

import pytest
import torch

from families.plain import Plain

NAMES = ("vit_tiny_patch16_224", "convnext_atto", "resnet10t")


@pytest.fixture(scope="module")
def timm():
    try:
        import timm as found
    except Exception as error:  # not only where it is missing: a torchvision of another torch breaks it too
        pytest.skip(f"timm cannot be imported: {error}")
    return found


@pytest.mark.timm
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_timm_goes_all_the_way(name, timm, tmp_path):
    def build(classes):
        return timm.create_model(name, pretrained=False, num_classes=classes)

    head = build(2).default_cfg["classifier"]
    pictures = partial(torch.randn, 2, 3, 224, 224)
    family = Plain(name, build, lambda seed: pictures(generator=torch.Generator().manual_seed(seed)), head)
    row = family.walk(tmp_path)
    assert row.purified == row.layers
