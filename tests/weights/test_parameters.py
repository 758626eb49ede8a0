import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pave_lightning.weights import Parameter, ParameterKind
from pave_lightning.weights.parameters import kind_of


def parameter(kind, shape, axis=None):
    return Parameter("block.layer.weight", kind, shape, axis)


def test_a_linear_weight_is_its_own_matrix():
    found, weight = parameter(ParameterKind.LINEAR, (3, 5), 1), torch.randn(3, 5)
    assert (found.is_matrix, found.matrix_shape) == (True, (3, 5))
    assert torch.equal(found.as_matrix(weight), weight)
    assert found.as_matrix(weight).data_ptr() == weight.data_ptr()
    assert torch.equal(found.from_matrix(weight), weight)


def test_a_block_of_rows_is_the_same_parameter_that_knows_where_it_begins():
    whole = parameter(ParameterKind.OTHER, (6, 2, 5))
    block = whole.block(slice(2, 4))
    assert (block.rows, block.shape, block.elements, block.first_element) == (slice(2, 4), (6, 2, 5), 60, 20)
    assert {whole: "found"}[block] == "found"
    assert whole.block(None) is whole
    assert (whole.rows, whole.first_element, parameter(ParameterKind.OTHER, ()).first_element) == (None, 0, 0)


def test_a_transposed_weight():
    layer, rows = Conv1D(3, 5), torch.randn(4, 5)
    layer.bias.data.zero_()
    found = parameter(ParameterKind.LINEAR, (5, 3), 0)
    matrix = found.as_matrix(layer.weight)
    assert found.matrix_shape == tuple(matrix.shape) == (3, 5)
    torch.testing.assert_close(rows @ matrix.T, layer(rows))
    back = found.from_matrix(matrix)
    assert back.is_contiguous()
    assert torch.equal(back, layer.weight)


def test_a_convolution_of_patches():
    layer, patch = nn.Conv2d(3, 6, (2, 4), stride=(2, 4), bias=False), torch.randn(1, 3, 2, 4)
    found = parameter(ParameterKind.CONVOLUTION, (6, 3, 2, 4), 1)
    matrix = found.as_matrix(layer.weight)
    assert found.matrix_shape == tuple(matrix.shape) == (6, 24)
    torch.testing.assert_close(matrix @ patch.flatten(), layer(patch).flatten())
    back = found.from_matrix(matrix)
    assert back.is_contiguous()
    assert torch.equal(back, layer.weight)


def test_the_layer_is_the_module_where_files_name_it_otherwise():
    found = Parameter("encoder.layer.0.dense.weight", ParameterKind.LINEAR, (3, 5), 1, module="layers.0.fc1")
    assert (found.name, found.layer) == ("encoder.layer.0.dense.weight", "layers.0.fc1")


def test_other_parameters_are_no_matrices():
    for kind, shape in ((ParameterKind.EMBEDDING, (9, 4)), (ParameterKind.CONVOLUTION, (4, 4, 3)), ("bias", (4,))):
        found = parameter(kind, shape)
        assert not found.is_matrix
        with pytest.raises(ValueError, match=r"block\.layer\.weight is no matrix weight but a"):
            _ = found.matrix_shape


def test_kinds_of_weights():
    attention = nn.MultiheadAttention(4, 2)
    assert kind_of(attention, "in_proj_weight") == (ParameterKind.LINEAR, 1)
    assert kind_of(attention, "in_proj_bias") == (ParameterKind.BIAS, None)
    assert kind_of(attention.out_proj, "weight") == (ParameterKind.LINEAR, 1)
    assert kind_of(Conv1D(3, 5), "weight") == (ParameterKind.LINEAR, 0)
    assert kind_of(nn.Conv2d(3, 8, 4, stride=4), "weight") == (ParameterKind.CONVOLUTION, 1)
    assert kind_of(nn.Conv2d(3, 8, 3, padding=1), "weight") == (ParameterKind.CONVOLUTION, 1)
    for module in (nn.Conv2d(4, 8, 3, groups=2), nn.Conv1d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 8, 3)):
        assert kind_of(module, "weight") == (ParameterKind.CONVOLUTION, None)
    assert kind_of(nn.LayerNorm(3), "weight") == (ParameterKind.NORM_SCALE, None)
    assert kind_of(nn.LayerNorm(3), "bias") == (ParameterKind.NORM_SHIFT, None)
    assert kind_of(nn.Embedding(3, 4), "weight") == (ParameterKind.EMBEDDING, None)
    assert kind_of(nn.Bilinear(2, 2, 2), "weight") == (ParameterKind.OTHER, None)
    assert kind_of(nn.GRU(2, 2), "weight_ih_l0") == (ParameterKind.OTHER, None)
