"""Adam on one tensor whose gradient is known in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def adam_descent(
    start: Tensor, gradient: Callable[[Tensor], Tensor], *, steps: int, rate: float, epsilon: float
) -> Tensor:
    """What Adam makes of a tensor in a number of steps; its moments decay with 0.9 and 0.999, nothing else decays.

    No graph is recorded: the gradient is what the function says it is, so that a projected one may be handed over too.

    Args:
        start: where to begin, any shape, floating.
        gradient: the gradient at a tensor of that shape, in the same dtype.
        steps: number of steps, 0 or more.
        rate: step size; an element moves by about that much in a step.
        epsilon: what is added to the root of the second moment, in units of the gradient.

    Returns:
        A new tensor of the same shape and dtype.

    Example:
        >>> start = torch.tensor([1.0])
        >>> adam_descent(start, lambda x: 2 * x, steps=1, rate=0.25, epsilon=0.0)
        tensor([0.7500])
    """
    # Fused Adam walks memory as it lies, so a transposed view and its gradient would not meet.
    parameter = nn.Parameter(start.detach().clone(memory_format=torch.contiguous_format))
    optimiser = torch.optim.Adam([parameter], lr=rate, eps=epsilon, fused=True)
    with torch.no_grad():
        for _ in range(steps):
            parameter.grad = gradient(parameter.data).contiguous()
            optimiser.step()
    return parameter.data
