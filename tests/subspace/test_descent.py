import numpy as np
import pytest
import torch

from pave_lightning.subspace.descent import adam_descent


def reference(start, gradient, steps, rate, epsilon):
    """Adam with bias correction, in float64 (arXiv 1412.6980, algorithm 1)."""
    value, first, second = np.array(start, dtype=np.float64), 0.0, 0.0
    for step in range(1, steps + 1):
        slope = gradient(value)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        value = value - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + epsilon)
    return value


@pytest.mark.parametrize("epsilon", [1e-8, 0.5])
def test_steps_are_those_of_adam(epsilon):
    curvature = np.array([[3.0, 0.5], [0.1, 2.0]])
    target = np.array([[1.0, -2.0], [0.5, 4.0]])
    start = torch.zeros(2, 2, dtype=torch.float64)
    found = adam_descent(
        start, lambda x: torch.tensor(curvature) * (x - torch.tensor(target)), steps=40, rate=0.05, epsilon=epsilon
    )
    expected = reference(start.numpy(), lambda x: curvature * (x - target), 40, 0.05, epsilon)
    assert found.numpy() == pytest.approx(expected, rel=1e-9)


def test_a_transposed_start_is_moved_where_its_gradient_says():
    target = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
    for start in (torch.zeros(2, 3), torch.zeros(3, 2).T):
        for gradient in (lambda x: x - target, lambda x: (x.T - target.T).contiguous().T):
            moved = adam_descent(start, gradient, steps=1, rate=0.1, epsilon=1e-8)
            assert moved == pytest.approx(0.1 * target.sign())


def test_the_start_is_left_alone_and_no_step_gives_it_back():
    start = torch.ones(3)
    assert torch.equal(adam_descent(start, lambda x: x, steps=0, rate=1.0, epsilon=1e-8), start)
    moved = adam_descent(start, lambda x: x, steps=1, rate=0.25, epsilon=1e-8)
    assert torch.equal(start, torch.ones(3))
    assert moved.tolist() == pytest.approx([0.75] * 3)
    assert moved.dtype == torch.float32
    assert not moved.requires_grad
