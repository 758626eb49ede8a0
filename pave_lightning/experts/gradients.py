"""How much each weight of the backbone matters to a task, from gradients of one example at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pave_lightning.errors import PaveError
from pave_lightning.tasks.task import Batch, Task
from pave_lightning.weights import is_finite
from pave_lightning.weights.backbones import backbone_of

# An example's outputs, shape (n, output_size), and the example -> rows, shape (k, n, output_size), of k gradients.
Directions = Callable[[Tensor, Batch], Tensor]
# Adds what is wanted of a gradient (flat, float64) to a running total (flat, float64).
Adding = Callable[[Tensor, Tensor], object]

# How many values are turned into float64 at a time: they stay in the processor's cache.
CHUNK = 1 << 18


def fisher_diagonal(model: nn.Module, task: Task, batches: Iterable[Batch]) -> dict[str, Tensor]:
    r"""The diagonal of the Fisher information at the model's own weights; labels are not looked at.

    For each weight :math:`F = \frac{1}{n} \sum_x \sum_y p(y|x) (\partial \log p(y|x) / \partial \theta)^2`, over all
    classes y as the model weighs them, exactly: no gradient of two examples or two classes is ever added up before it
    is squared. A regression head counts as the mean of a Gaussian of variance one, so that
    :math:`F = \frac{1}{n} \sum_x (\partial f(x) / \partial \theta)^2`.

    With the logits' Jacobian J of one example, its part of F is the diagonal of
    :math:`J^T (\mathrm{diag}(p) - p p^T) J`. The matrix in the middle has rank C - 1 and is the sum of as many outer
    products :math:`v_k v_k^T`, so C - 1 gradients do, of :math:`v_k \cdot` logits, all through one graph; a task of two
    classes takes one. Squares are added up in float64.

    Args:
        model: a model with the task's head and the expert's weights, float32.
        task: its kind says how predictions are drawn from outputs.
        batches: examples as `TaskDataModule` gives them.

    Returns:
        Name of a parameter inside the backbone -> F, of its shape, float32, on the CPU; zero where no output depends on
        the weight.

    Raises:
        PaveError: there are no examples, an output is not finite, or a square is too large for float32.
    """

    def directions(outputs: Tensor, example: Batch) -> Tensor:
        return task.likelihood_directions(outputs)

    return _mean(model, task, batches, directions, lambda total, gradient: total.addcmul_(gradient, gradient))


def absolute_gradients(model: nn.Module, task: Task, batches: Iterable[Batch]) -> dict[str, Tensor]:
    r"""The mean magnitude of the gradient of the loss.

    It is :math:`\frac{1}{n} \sum_{(x, y)} |\partial l(x, y) / \partial\theta|`. The magnitude is taken of each
    example's own gradient, so that examples that pull a weight in opposite directions do not cancel. Magnitudes are
    added up in float64.

    Args:
        model: a model with the task's head, float32. For merging it is the base's backbone below the expert's own head.
        task: its kind says what the loss is.
        batches: labelled examples as `TaskDataModule` gives them.

    Returns:
        Name of a parameter inside the backbone -> the mean, of its shape, float32, on the CPU; zero where the loss does
        not depend on the weight.

    Raises:
        PaveError: there are no examples, they have no labels, or an output or a gradient is not finite.
    """

    def directions(outputs: Tensor, example: Batch) -> Tensor:
        leaf = outputs.requires_grad_()
        return torch.autograd.grad(task.output_loss(leaf, task.targets(example)), leaf)[0][None]

    return _mean(model, task, batches, directions, lambda total, gradient: total.add_(gradient.abs_()))


def _mean(
    model: nn.Module, task: Task, batches: Iterable[Batch], directions: Directions, add: Adding
) -> dict[str, Tensor]:
    """The mean over examples of what `add` makes of the gradients along the directions of each."""
    totals = {
        name: torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
        for name, parameter in backbone_of(model).named_parameters()
        if parameter.is_floating_point()
    }
    count = 0
    with _collecting(model, totals, add):
        for example in _examples(task, batches, next(model.parameters()).device):
            count += 1
            outputs = task.outputs(model, example)
            if not torch.isfinite(outputs).all():
                raise PaveError(f"task '{task.name}': the outputs are not finite; look for broken weights")
            rows = directions(outputs.detach(), example)
            for index, row in enumerate(rows):
                torch.autograd.backward(outputs, row, retain_graph=index + 1 < len(rows))
    if not count:
        raise PaveError(f"task '{task.name}': there are no examples to take gradients of")
    means = {}
    for name in list(totals):
        # The sums go one by one, so that there are never two copies of all of them.
        means[name] = totals.pop(name).div_(count).float().cpu()
        if not is_finite(means[name]):
            raise PaveError(f"task '{task.name}': the gradients of {name} are too large for float32")
    return means


@contextmanager
def _collecting(model: nn.Module, totals: Mapping[str, Tensor], add: Adding) -> Iterator[None]:
    """Within, every backward pass adds what `add` makes of each parameter's gradient to its total, and keeps nothing.

    The model is in eval mode. Only the parameters with totals take gradients; those of embeddings come as the rows that
    the example uses, as all others are zero. Everything is as it was afterwards.
    """
    parameters = dict(backbone_of(model).named_parameters())
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
            if isinstance(module, nn.Embedding):
                undo.callback(setattr, module, "sparse", module.sparse)
                module.sparse = True
        for parameter in model.parameters():
            undo.callback(setattr, parameter, "grad", parameter.grad)
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.grad = None
            parameter.requires_grad_(False)
        model.eval()
        for name, total in totals.items():
            parameters[name].requires_grad_(True)
            watched: Any = parameters[name]
            handle = watched.register_post_accumulate_grad_hook(_taking(total, add))
            undo.callback(handle.remove)
        undo.enter_context(torch.enable_grad())
        yield


def _taking(total: Tensor, add: Adding) -> Callable[[Tensor], None]:
    """A hook that moves a parameter's gradient into a total as soon as it is there."""

    def take(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            rows = gradient.indices()[0]
            part = total[rows]
            add(part, gradient.values().double())
            total[rows] = part
            return
        sums, values = total.view(-1), gradient.reshape(-1)
        for start in range(0, len(sums), CHUNK):
            add(sums[start : start + CHUNK], values[start : start + CHUNK].double())

    return take


def _examples(task: Task, batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """One example after the other, as a batch without padding."""
    for batch in batches:
        yield from task.singles({name: tensor.to(device) for name, tensor in batch.items()})
