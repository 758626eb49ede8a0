import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from pave_lightning.layers import is_linear, is_matrix_convolution, matrix_weight


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(3, 8, 4, stride=4), True),
        (nn.Conv1d(3, 8, 4, stride=4), True),
        (nn.Conv3d(3, 8, (1, 2, 2), stride=(1, 2, 2)), True),
        (nn.Conv2d(3, 8, 1), True),
        (nn.Conv2d(3, 8, 1, stride=3), True),
        (nn.Conv2d(3, 8, 1, dilation=2), True),
        (nn.Conv2d(3, 8, 1, padding="same"), True),
        (nn.Conv2d(3, 8, 4, stride=4, padding="valid"), True),
        (nn.Conv2d(3, 8, 3, padding="same"), True),
        (nn.Conv2d(3, 8, 4, stride=2), True),
        (nn.Conv2d(3, 8, 2, stride=4), True),
        (nn.Conv2d(3, 8, 4, stride=4, dilation=2), True),
        (nn.Conv2d(4, 8, 4, stride=4, groups=2), False),
        (nn.Conv2d(4, 4, 3, groups=4), False),
        (nn.Conv2d(4, 8, 1, groups=2), False),
        (nn.ConvTranspose2d(3, 8, 4, stride=4), False),
        (nn.Linear(3, 8), False),
    ],
    ids=str,
)
def test_which_convolutions_are_matrix_products(module, expected):
    assert is_matrix_convolution(module) is expected


def test_which_modules_are_linear():
    assert is_linear(nn.Linear(2, 2))
    assert is_linear(Conv1D(3, 5))
    assert not is_linear(nn.Conv1d(3, 5, 1))


def test_a_subclass_has_the_matrix_of_its_parent():
    class Named(Conv1D):
        pass

    assert matrix_weight(Named(3, 5)) == ("weight", 0)
    assert matrix_weight(nn.Bilinear(2, 2, 2)) is None
