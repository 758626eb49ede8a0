"""Distillation: train a merged model to answer as every expert does, on examples without labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from pave_lightning.errors import PaveError
from pave_lightning.merging.blocks import Batch
from pave_lightning.merging.evidence import Evidence, Need
from pave_lightning.merging.passes import Examples, share_parameters
from pave_lightning.merging.registry import merge_method
from pave_lightning.merging.trained import TrainedMethod, TrainedOptions
from pave_lightning.subspace import is_finite
from pave_lightning.weights import Parameter, TaskVectors
from pave_lightning.weights.backbones import backbone_of

log = logging.getLogger(__name__)

# Share of the steps in which the rate rises; afterwards it falls to zero. Both in a straight line.
WARM_UP = 0.1
# Logits whose variance is below this share of their mean square are taken for constant.
CONSTANT = 1e-9
# Under which name a batch holds what the expert says of it.
AIM = "expert_logits"


class DistillationOptions(TrainedOptions):
    """Options of distillation."""


class Student(nn.Module):
    """One task's head on the weights that are trained.

    Args:
        model: the task's model, whose backbone has these weights.
        outputs: what it says of a batch, shape ``(n, outputs)``.
        variance: of the expert's logits over all examples, summed over classes.
        rows: mean number of examples a batch.
    """

    variance: Tensor

    def __init__(
        self, model: nn.Module, outputs: Callable[[nn.Module, Batch], Tensor], variance: Tensor, rows: float
    ) -> None:
        super().__init__()
        self.model, self.outputs, self.rows = model, outputs, rows
        self.register_buffer("variance", variance)

    def error(self, batch: Batch) -> Tensor:
        """What is unexplained in a batch, as a multiple of the variance of the expert's logits.

        Divided by the mean number of rows of all batches, so that every example counts alike in smaller ones too.
        """
        inputs = {name: tensor for name, tensor in batch.items() if name != AIM}
        return (centred(self.outputs(self.model, inputs)) - batch[AIM]).square().sum() / self.rows / self.variance


class Students(nn.Module):
    """All tasks' heads on the same weights.

    Args:
        weights: the weights by their names, of which those that are trained ask for gradients.
        students: each task's.

    Attributes:
        weights: the weights.
        of: each task's student.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], students: Mapping[str, Student]) -> None:
        super().__init__()
        self.weights, self.of = dict(weights), dict(students)
        self.students = nn.ModuleList(students.values())  # by number: names of modules may hold no dots


@merge_method("distillation")
class Distillation(TrainedMethod[DistillationOptions, Students]):
    r"""Start at a merged model, the anchor, and train it until each expert's head reads from it what the expert says.

    With :math:`z_t(x)` the logits of expert t, :math:`z(x)` those of its head on the merged backbone, both less their
    mean over the classes (which a softmax does not see), and :math:`\sigma_t^2` the variance of :math:`z_t` over the
    examples, summed over classes,

    .. math:: \min_\theta \sum_t \frac{1}{\sigma_t^2} E_x \| z(x) - z_t(x) \|^2 ,

    so that a task's part is the variance of its logits that the merged model leaves unexplained, as a multiple of all
    of it: tasks count alike whatever the scale of their logits, regressions too, and so does an expert whose logits
    hardly vary; of one whose logits are all the same the plain difference counts. Adam, ``batch_size`` examples of
    each task in every step, no dropout. Training that ends worse than it began is refused. Weights that no expert has
    changed stay, and so do the heads: the result is one backbone for all tasks. The experts are the plain ones;
    purification acts through the anchor alone.

    Needs an anchor, the experts' heads and unlabelled examples; no labels. Cost: one forward pass of each expert over
    its examples, then ``epochs`` forward and backward passes over those of all tasks, far more than what other methods
    take. Held in memory: the anchor, one model with its gradients and Adam's two moments, and what a batch leaves for
    its backward pass.

    Source: our own; the loss is that of Ba & Caruana, *Do Deep Nets Really Need to be Deep?*, NeurIPS 2014 (arXiv
    1312.6184), with one teacher a task.
    """

    summary = "train a merged model towards the experts' logits on unlabelled examples"
    source = "our own; loss of Ba & Caruana 2014, arXiv 1312.6184"
    held_models = 5  # the anchor, the weights, their gradients, Adam's two moments
    needs = frozenset({Need.ANCHOR, Need.UNLABELLED_EXAMPLES})
    Options: ClassVar[type[DistillationOptions]] = DistillationOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Besides what is generally lacking: the experts' heads."""
        yield from super().problems(vectors, evidence)
        if evidence.passes is not None and evidence.passes.classifier is None:
            yield "the experts' heads are needed; give ForwardPasses a classifier, or merge as part of a recipe"

    def build(self, vectors: TaskVectors, examples: Examples) -> Students:
        """The anchor's weights under each task's head; each batch gets what the expert says of it."""
        device = self.evidence.forward_passes.device
        weights = {}
        for parameter in vectors.parameters:
            start = vectors.base(parameter) + self.evidence.anchor_vector(parameter)
            if not is_finite(start):
                raise PaveError(f"the anchor's {parameter.name} holds NaN or infinite values; merge the anchor again")
            changed = not all(vectors.is_zero(task, parameter) for task in vectors.tasks)
            weights[parameter.name] = nn.Parameter(start.to(device), requires_grad=changed)
        return Students(weights, {task: self._student(task, weights, batches) for task, batches in examples.items()})

    def training_step(self, model: Students, batch: Batch, task: str) -> Tensor:
        """What is unexplained of the expert's logits."""
        return model.of[task].error(batch)

    def rate_factor(self, step: int, steps: int) -> float:
        """Up in a straight line, then down to zero."""
        return rate_factor(step, steps)

    def before_training(self, model: Students, examples: Examples) -> None:
        """Note how much the anchor leaves unexplained."""
        self._before = self._on_first_batches(model, examples)

    def after_epoch(self, model: Students, examples: Examples, epoch: int, loss: float) -> None:
        """Tell how much is unexplained, and refuse to go on where it has become more."""
        log.info("  epoch %d: %.4f of the logits' variance unexplained", epoch, loss)
        _refuse_divergence(self._before, self._on_first_batches(model, examples))

    def learned(self, model: Students) -> None:
        """The weights."""
        self._found = {name: weight.detach().cpu() for name, weight in model.weights.items()}

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """What training has made of the anchor."""
        return self._found[parameter.name] - base

    @torch.no_grad()
    def _student(self, task: str, weights: Mapping[str, nn.Parameter], batches: Sequence[dict[str, Tensor]]) -> Student:
        passes = self.evidence.forward_passes
        model, outputs = passes.headed(task), partial(passes.outputs, task)
        with self.autocast():
            logits = [centred(outputs(model, batch)) for batch in batches]
        every = torch.cat(logits)
        variance = (every - every.mean(dim=0)).square().sum(dim=-1).mean()
        if not torch.isfinite(variance):
            raise PaveError(f"task '{task}': the expert's outputs are not finite; look for broken weights")
        for batch, aim in zip(batches, logits, strict=True):
            batch[AIM] = aim
        share_parameters(backbone_of(model.requires_grad_(False)), weights)
        # Of an expert that always says the same, but for rounding, the plain difference counts.
        constant = variance <= CONSTANT * every.square().sum(dim=-1).mean()
        return Student(model, outputs, torch.ones_like(variance) if constant else variance, len(every) / len(batches))

    @torch.no_grad()
    def _on_first_batches(self, model: Students, examples: Examples) -> float:
        """What is unexplained on the first batch of each task, on average over the tasks."""
        with self.autocast():
            return sum(float(model.of[task].error(batches[0])) for task, batches in examples.items()) / len(examples)


def centred(outputs: Tensor) -> Tensor:
    """Logits, shape ``(n, C)``, less their mean over the classes, float32; a regression's single output as it is."""
    values = outputs.float()
    return values - values.mean(dim=-1, keepdim=True) if values.shape[-1] > 1 else values


def _refuse_divergence(before: float, after: float) -> None:
    """Raise where training has left the model worse than the anchor, and than one that knows the mean logits alone."""
    if not after <= max(before, 1.0):
        raise PaveError(
            f"distillation diverged: it went from {before:.3g} to {after:.3g} of the variance of the experts' logits "
            "unexplained; expected a smaller 'rate'"
        )


def rate_factor(step: int, steps: int) -> float:
    """What the highest rate is multiplied with in a step, counted from 0: up in a straight line, then down to zero."""
    rising = max(1.0, WARM_UP * steps)
    return min((step + 1) / rising, (steps - step) / max(1.0, steps - rising), 1.0)
