"""Experts of a mixture, a stack of matrices in one parameter: methods for matrices merge them one by one."""

import numpy as np
import pytest
import torch

from pave_lightning.merging import make_method, merge
from pave_lightning.merging.stacks import EachExpert
from pave_lightning.weights import Parameter, ParameterKind, TaskVectors

EXPERTS, OUT, IN = 3, 8, 6


class Mixture(TaskVectors):
    """Two tasks of a layer with three experts, stored (experts, d_out, d_in) or transposed."""

    tasks = ("one", "two")

    def __init__(self, transposed: bool) -> None:
        shape = (EXPERTS, IN, OUT) if transposed else (EXPERTS, OUT, IN)
        stack = Parameter("mlp.experts.down", ParameterKind.EXPERTS, shape, 1 if transposed else 2)
        self.parameters = (stack, Parameter("norm.weight", ParameterKind.NORM_SCALE, (IN,)))
        random = torch.Generator().manual_seed(0)
        self.values = {
            (task, p.name): torch.randn(p.shape, generator=random)
            for p in self.parameters
            for task in ("base", *self.tasks)
        }

    def base(self, parameter, rows=None):
        return self.expert("base", parameter, rows)

    def expert(self, task, parameter, rows=None):
        found = self.values[task, parameter.name]
        return found.clone() if rows is None else found[rows].clone()


class Matrices(TaskVectors):
    """The same experts, each a linear layer of its own."""

    tasks = ("one", "two")

    def __init__(self, mixture: Mixture, transposed: bool) -> None:
        self.parameters = tuple(
            Parameter(f"down.{number}.weight", ParameterKind.LINEAR, (OUT, IN), 1) for number in range(EXPERTS)
        )
        self.values = {
            (task, f"down.{number}.weight"): (matrix.T if transposed else matrix).contiguous()
            for task in ("base", *self.tasks)
            for number, matrix in enumerate(mixture.values[task, "mlp.experts.down"])
        }

    base, expert = Mixture.base, Mixture.expert


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "method", ["tsv_m", "iso_c", "wudi", "dc_merge", "knots", "opcm", "doge_ta", "model_stock", "ace"]
)
def test_each_expert_is_merged_as_a_layer_of_its_own(method, transposed):
    mixture = Mixture(transposed)
    found = merge(make_method(method, {}), mixture).vectors["mlp.experts.down"]
    alone = merge(make_method(method, {}), Matrices(mixture, transposed)).vectors
    expected = [alone[f"down.{number}.weight"].numpy() for number in range(EXPERTS)]
    own = found.transpose(1, 2) if transposed else found
    if method in ("opcm", "knots", "doge_ta"):  # what they gather over the whole model has the norm in it
        ratio = np.linalg.norm(own) / np.linalg.norm(np.stack(expected))
        assert 0.5 < ratio < 2
        if method == "opcm":
            np.testing.assert_allclose(own / ratio, np.stack(expected), atol=1e-5)
    else:
        np.testing.assert_allclose(own, np.stack(expected), atol=1e-5)


def test_elementwise_methods_see_the_stack_as_it_is():
    mixture = Mixture(transposed=False)
    found = merge("task_arithmetic", mixture).vectors["mlp.experts.down"]
    stack = mixture.parameters[0]
    torch.testing.assert_close(found, mixture.vector("one", stack) + mixture.vector("two", stack))


def test_rows_of_an_expert_are_those_of_its_matrix():
    mixture = Mixture(transposed=False)
    apart = EachExpert(mixture)
    second = apart.parameters[1]
    assert second.name == "mlp.experts.down.1"
    assert second.layer == "mlp.experts.down.1"
    assert torch.equal(apart.base(second, slice(2, 4)), mixture.values["base", "mlp.experts.down"][1, 2:4])
