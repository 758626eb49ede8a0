"""The matrices of a parameter: one, those of a stack, the parts of a fused projection."""

import torch

from pave_lightning.weights import Parameter, ParameterKind
from pave_lightning.weights.matrices import Outputs, Part

HALVES = (Part("gate", Outputs(0, 1, 2, 3)), Part("up", Outputs(1, 1, 2, 3)))


def test_a_layer_is_one_matrix_by_its_own_name():
    (matrix,) = Parameter("a.weight", ParameterKind.LINEAR, (3, 2), 1).matrices
    assert (matrix.name, matrix.layer, matrix.shape, matrix.is_whole) == ("a", "a", (3, 2), True)
    assert Parameter("a.bias", ParameterKind.BIAS, (3,)).matrices == ()


def test_parts_are_read_and_written_where_they_lie():
    parameter = Parameter("a.weight", ParameterKind.LINEAR, (6, 2), 1, parts=HALVES)
    tensor = torch.arange(12.0).reshape(6, 2)
    gate, up = parameter.matrices
    assert (gate.name, up.name, up.layer, up.shape) == ("a.gate", "a.up", "a", (3, 2))
    assert torch.equal(up.of(tensor), tensor[1::2])
    up.put(tensor, torch.zeros(3, 2))
    assert tensor[1::2].eq(0).all()
    assert not tensor[0::2].eq(0).all()


def test_parts_of_transposed_weights_are_columns():
    parameter = Parameter("a.weight", ParameterKind.LINEAR, (2, 6), 0, parts=HALVES)
    tensor = torch.arange(12.0).reshape(2, 6)
    gate, _ = parameter.matrices
    assert torch.equal(gate.of(tensor), tensor.T[0::2])
    gate.put(tensor, torch.full((3, 2), -1.0))
    assert tensor[:, 0::2].eq(-1).all()
    assert not tensor[:, 1::2].eq(-1).any()


def test_each_expert_of_a_stack_has_its_matrices():
    stack = Parameter("mlp.experts.w", ParameterKind.EXPERTS, (4, 2, 6), 1, parts=HALVES)
    assert not stack.is_matrix
    assert [matrix.name for matrix in stack.matrices][:3] == [
        "mlp.experts.w.0.gate",
        "mlp.experts.w.0.up",
        "mlp.experts.w.1.gate",
    ]
    matrix = stack.matrices[5]
    assert (matrix.layer, matrix.expert, matrix.rows) == ("mlp.experts.w.2", 2, slice(2, 3))
    tensor = torch.randn(4, 2, 6)
    assert torch.equal(matrix.of(tensor[matrix.rows]), tensor[2].T[1::2])


def test_stacks_that_are_the_weight_of_a_module_are_named_by_the_module():
    stack = Parameter("moe.input_linear.weight", ParameterKind.EXPERTS, (2, 3, 5), 2)
    assert [matrix.layer for matrix in stack.matrices] == ["moe.input_linear.0", "moe.input_linear.1"]
    assert [one.name for one in stack.apart] == ["moe.input_linear.weight.0", "moe.input_linear.weight.1"]
