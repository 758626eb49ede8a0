"""Heads that fit the features of another backbone than the one they were trained on: their last layer, solved anew.

A merged backbone no longer makes the features that the experts' heads were trained on. A head's last linear layer can
be fitted to what it does make, in closed form and without labels: the target is what the expert says of the same rows.

Source of the misfit, which is mostly an orthogonal turn: arXiv 2412.13526.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pave_lightning.errors import PaveError
from pave_lightning.evaluation.candidates import Candidate
from pave_lightning.evaluation.options import Heads
from pave_lightning.subspace.linear_fit import STRENGTHS, LinearFit, fit_ridge, fit_turn
from pave_lightning.subspace.logistic_fit import FOLDS, fit_logistic
from pave_lightning.tasks.heads import Likelihood
from pave_lightning.tasks.task import Batch, Task


class NotFiniteError(PaveError):
    """The features or outputs of a model hold NaN or infinity."""


class UnvaryingError(PaveError):
    """A model gives all rows the same features, so no head can be fitted to them."""


@dataclass(frozen=True)
class HeadRows:
    """What the last layer of a head is given for some rows, and what the head says of them.

    Attributes:
        features: shape ``(n, d)``, float32, on the CPU.
        outputs: shape ``(n, output_size)``, float32, on the CPU.
        targets: what is right, shape ``(n, ...)``; None where the rows have no labels.
    """

    features: Tensor
    outputs: Tensor
    targets: Tensor | None = None


def last_layer(task: Task, model: nn.Module) -> str | None:
    """Name of the linear layer that gives a head's outputs; None where the head does not end in one.

    Args:
        task: its kind says which part of the model is its head.
        model: a model with the task's head.
    """
    private = task.private_names(model)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in private and module.out_features == task.output_size
    ]
    return found[-1] if found else None


@torch.no_grad()
def head_rows(task: Task, model: nn.Module, batches: Iterable[Batch]) -> HeadRows:
    """Run a model and note what its head's last layer is given for each prediction.

    A head that reads every token and lets one of them speak (that of a decoder) is given the features of that one.

    Args:
        task: its kind says what a model is given and what its head says.
        model: a model with the task's head, in eval mode.
        batches: the rows, on the model's device.

    Raises:
        PaveError: the head does not end in a linear layer, or there are no rows.
        NotFiniteError: values are not finite.
    """
    name = last_layer(task, model)
    if name is None:
        raise PaveError(f"task '{task.name}': its head does not end in a linear layer, so it is kept as it is")
    features, outputs, targets = [], [], []
    with _watched(model.get_submodule(name)) as seen:
        for batch in batches:
            said = task.outputs(model, batch)
            features.append(_of_predictions(*seen.pop(), said, task.read_positions(batch)))
            outputs.append(said.float().cpu())
            if "labels" in batch:
                targets.append(task.targets(batch).cpu())
    if not features:
        raise PaveError(f"task '{task.name}': there are no rows to fit its head on")
    found = HeadRows(torch.cat(features), torch.cat(outputs), torch.cat(targets) if targets else None)
    if not (torch.isfinite(found.features).all() and torch.isfinite(found.outputs).all()):
        raise NotFiniteError(f"task '{task.name}': the features or outputs of its model hold NaN or infinity")
    return found


def fit_head(
    task: Task, heads: Heads, mine: HeadRows, expert: HeadRows, layer: nn.Linear, *, seed: int = 0
) -> LinearFit:
    """The last layer of a head for the features of another backbone.

    Classes are fitted by their softmax, labels that hold by themselves by their sigmoids. Numbers, and outputs of which
    one among several rows is right (choices, tokens), are fitted by least squares: to what the expert says, or labels.

    Args:
        task: its kind says what the outputs are.
        heads: how it is fitted; not ``expert``.
        mine: the rows as the other backbone gives them.
        expert: the same rows, in the same order, as the expert gives them.
        layer: the expert's last layer.
        seed: of the folds of logistic fits.

    Raises:
        PaveError: there are too few rows, or labels are needed and not there.
        UnvaryingError: the features do not vary.
    """
    fit, strength = heads.fit, heads.strength
    where = f"task '{task.name}'"
    least = least_rows(task)
    if len(mine.features) < least:
        raise PaveError(f"{where}: fitting its head takes at least {least} rows, found {len(mine.features)}")
    if float(mine.features.double().var(dim=0).max()) == 0:
        raise UnvaryingError(f"{where}: the model gives all rows the same features, so no head can be fitted to them")
    if fit == "orthogonal":
        turn = fit_turn(mine.features, expert.features)
        weight, bias = layer.weight.detach().double().cpu(), _bias(layer)
        return LinearFit(weight @ turn.weight, weight @ turn.bias + bias)
    said = aims = expert.outputs.double()
    if fit == "labels":
        if mine.targets is None:
            raise PaveError(f"{where}: labels are needed to fit its head to them, but the rows have none")
        aims = task.aims(mine.targets)
    if fit != "logits" and task.likelihood is Likelihood.CATEGORICAL:
        return _logistic(mine.features, said.softmax(dim=1) if fit == "probabilities" else aims, heads, seed)
    if fit != "logits" and task.likelihood is Likelihood.BERNOULLI:
        return _each_by_itself(mine.features, said.sigmoid() if fit == "probabilities" else aims, heads, seed)
    return fit_ridge(mine.features, aims, STRENGTHS if isinstance(strength, str) else (strength,))


def _each_by_itself(features: Tensor, aims: Tensor, heads: Heads, seed: int) -> LinearFit:
    """Outputs whose sigmoids are to be these probabilities, shape ``(n, C)``: a regression to two classes for each."""
    fits = [_logistic(features, torch.stack([1 - one, one], dim=1), heads, seed) for one in aims.unbind(dim=1)]
    weight = torch.stack([fit.weight[1] - fit.weight[0] for fit in fits])
    bias = torch.stack([fit.bias[1] - fit.bias[0] for fit in fits])
    strengths = sorted(fit.strength for fit in fits)
    return LinearFit(weight, bias, strengths[len(strengths) // 2], sum(fit.left_out for fit in fits))


def _logistic(features: Tensor, targets: Tensor, heads: Heads, seed: int) -> LinearFit:
    if isinstance(heads.strength, str):
        return fit_logistic(features, targets, seed=seed)
    return fit_logistic(features, targets, (heads.strength,))


def least_rows(task: Task) -> int:
    """The least rows that a task's head can be fitted on."""
    return max(task.output_size + 1, FOLDS)


class FittedHeads(Candidate):
    """A candidate under heads whose last layers were fitted anew.

    Args:
        candidate: gives the backbone's weights, and may adapt the model itself.
        heads: for each task its last layer; a task that is not there keeps its head.
        tasks: the tasks by name.
    """

    def __init__(self, candidate: Candidate, heads: Mapping[str, LinearFit], tasks: Mapping[str, Task]) -> None:
        self.candidate, self.heads, self.tasks = candidate, heads, tasks
        self.shared, self.own_configuration = candidate.shared, candidate.own_configuration

    def weights(self, task: str) -> Iterator[tuple[str, Tensor]]:
        """The candidate's own."""
        return self.candidate.weights(task)

    def adapt(self, model: nn.Module, task: str) -> nn.Module:
        """The candidate's model with the task's head exchanged."""
        model = self.candidate.adapt(model, task)
        name = None if task not in self.heads else last_layer(self.tasks[task], model)
        if name is not None:
            model.set_submodule(name, as_layer(self.heads[task], model.get_submodule(name)))
        return model


def as_layer(fit: LinearFit, like: nn.Module) -> nn.Linear:
    """A fit as a linear layer with intercept, float32; on the device of another one."""
    device = next(like.parameters()).device
    layer = nn.Linear(fit.weight.shape[1], fit.weight.shape[0], device=device)
    with torch.no_grad():
        layer.weight.copy_(fit.weight)
        layer.bias.copy_(fit.bias)
    return layer


def _bias(layer: nn.Linear) -> Tensor:
    return (
        torch.zeros(layer.out_features, dtype=torch.float64)
        if layer.bias is None
        else layer.bias.detach().double().cpu()
    )


@contextmanager
def _watched(layer: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within, what a layer is given and what it gives is noted, call by call."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.append((args[0].detach(), output.detach()))

    handle = layer.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _of_predictions(given: Tensor, gave: Tensor, said: Tensor, read: Tensor | None) -> Tensor:
    """The features of each prediction, shape ``(n, d)``, float32, on the CPU.

    Args:
        given: what the last layer was given, shape ``(n, d)`` or ``(B, L, d)``.
        gave: what it gave.
        said: the head's outputs, shape ``(n, output_size)``.
        read: the positions that predictions are made for, shape ``(B, L)``; None for one prediction an example.
    """
    if given.ndim == 3 and read is not None:
        given = given[read]
    elif given.ndim == 3:
        # The head lets one position speak: the one that gave what it says.
        distance = (gave - said[:, None]).abs().sum(dim=-1)
        given = given[torch.arange(len(given)), distance.argmin(dim=1)]
    return given.float().cpu()
