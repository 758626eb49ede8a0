"""Distillation: train a merged model to answer as every expert does, on examples without labels."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pave_lightning.errors import PaveError
from pave_lightning.merging.base import Cost, MethodOptions, StaticMethod
from pave_lightning.merging.evidence import Evidence, Need
from pave_lightning.merging.passes import share_parameters
from pave_lightning.merging.registry import merge_method
from pave_lightning.subspace import is_finite
from pave_lightning.weights import Parameter, TaskVectors
from pave_lightning.weights.architecture import backbone_of

log = logging.getLogger(__name__)

# Share of the steps in which the rate rises; afterwards it falls to zero. Both in a straight line.
WARM_UP = 0.1
# Logits whose variance is below this share of their mean square are taken for constant.
CONSTANT = 1e-9


class DistillationOptions(MethodOptions):
    """Options of distillation."""

    examples: int = Field(default=512, ge=1)
    """Unlabelled training examples a task."""
    epochs: int = Field(default=2, ge=1)
    """How often each example is seen; those of a task that has fewer of them are seen more often."""
    batch_size: int = Field(default=8, ge=1)
    """Examples of each task in a step; at most ``capture.batch_size``, which is how they are loaded."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Of the passes through the model; weights, their gradients and Adam stay float32."""
    rate: float = Field(default=1e-4, gt=0)
    """Highest step size of Adam."""
    seed: int = 0
    """Decides the order of the batches."""


@merge_method("distillation")
class Distillation(StaticMethod[DistillationOptions]):
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
    cost = Cost.TRAINING
    held_models = 5  # the anchor, the weights, their gradients, Adam's two moments
    whole_model_pass = True
    batched = True
    parallel = False
    serial_because = "the whole model is trained"
    needs = frozenset({Need.ANCHOR, Need.UNLABELLED_EXAMPLES})
    Options: ClassVar[type[DistillationOptions]] = DistillationOptions

    def problems(self, vectors: TaskVectors, evidence: Evidence) -> Iterator[str]:
        """Besides what is generally lacking: the experts' heads."""
        yield from super().problems(vectors, evidence)
        if evidence.passes is not None and evidence.passes.classifier is None:
            yield "the experts' heads are needed; give ForwardPasses a classifier, or merge as part of a recipe"

    def prepare(self, vectors: TaskVectors) -> None:
        """Train the merged model."""
        device = self.evidence.forward_passes.device
        weights = {}
        for parameter in vectors.parameters:
            start = vectors.base(parameter) + self.evidence.anchor_vector(parameter)
            if not is_finite(start):
                raise PaveError(f"the anchor's {parameter.name} holds NaN or infinite values; merge the anchor again")
            changed = not all(vectors.is_zero(task, parameter) for task in vectors.tasks)
            weights[parameter.name] = nn.Parameter(start.to(device), requires_grad=changed)
        # In an order of their own, so that sums do not depend on how the recipe lists the tasks.
        tasks = [self._task(name, weights) for name in sorted(vectors.tasks)]
        with torch.enable_grad():
            self._train([weight for weight in weights.values() if weight.requires_grad], tasks)
        self._found = {name: weight.detach().cpu() for name, weight in weights.items()}

    def merge(self, parameter: Parameter, base: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """What training has made of the anchor."""
        return self._found[parameter.name] - base

    @torch.no_grad()
    def _task(self, name: str, weights: Mapping[str, nn.Parameter]) -> _Teaching:
        passes = self.evidence.forward_passes
        model = passes.headed(name)
        answer = partial(self._answer, model)
        batches = [part for batch in passes.placed(name) for part in _parts(batch, int(self.options.batch_size))]
        logits = [answer(batch) for batch in batches]
        every = torch.cat(logits)
        variance = (every - every.mean(dim=0)).square().sum(dim=-1).mean()
        if not torch.isfinite(variance):
            raise PaveError(f"task '{name}': the expert's outputs are not finite; look for broken weights")
        share_parameters(backbone_of(model.requires_grad_(False)), weights)
        # Of an expert that always says the same, but for rounding, the plain difference counts.
        constant = variance <= CONSTANT * every.square().sum(dim=-1).mean()
        return _Teaching(name, answer, batches, logits, torch.ones_like(variance) if constant else variance)

    def _answer(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The model's logits for a batch less their mean over the classes; a regression's single output as it is."""
        device = self.evidence.forward_passes.device
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=self.options.precision == "bf16-mixed"):
            values: Tensor = model(**batch).logits
        values = values.float()
        return values - values.mean(dim=-1, keepdim=True) if values.shape[-1] > 1 else values

    def _train(self, weights: list[nn.Parameter], tasks: list[_Teaching]) -> None:
        if not weights:
            return
        longest = max(len(task.batches) for task in tasks)
        steps = longest * int(self.options.epochs)
        optimiser = torch.optim.Adam(weights, lr=float(self.options.rate))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_factor(step, steps))
        generator = torch.Generator().manual_seed(int(self.options.seed))
        orders = {task.name: task.order(steps, generator) for task in tasks}
        before, unexplained = _on_first_batches(tasks), 0.0
        for step in range(steps):
            optimiser.zero_grad()
            for task in tasks:
                loss = task.error(orders[task.name][step]) / len(tasks)
                loss.backward()  # type: ignore[no-untyped-call]
                unexplained += float(loss.detach())
            optimiser.step()
            schedule.step()
            if (step + 1) % longest == 0:
                epoch = (step + 1) // longest
                log.info("  epoch %d: %.4f of the logits' variance unexplained", epoch, unexplained / longest)
                unexplained = 0.0
                _refuse_divergence(before, _on_first_batches(tasks))


@dataclass(frozen=True)
class _Teaching:
    """One task: its head on the weights that are trained, examples, and what the expert says of them.

    Attributes:
        name: the task.
        answer: what the merged backbone with the task's head says of a batch, centred.
        batches: examples, as many as count in one step.
        logits: the expert's logits for each batch, centred.
        variance: of these logits over all examples.
    """

    name: str
    answer: Callable[[Mapping[str, Tensor]], Tensor]
    batches: list[dict[str, Tensor]]
    logits: list[Tensor]
    variance: Tensor

    def error(self, index: int) -> Tensor:
        """What is unexplained in a batch, as a multiple of the variance of the expert's logits.

        Divided by the mean number of rows of all batches, so that every example counts alike in smaller ones too.
        """
        rows = sum(len(logits) for logits in self.logits) / len(self.logits)
        return (self.answer(self.batches[index]) - self.logits[index]).square().sum() / rows / self.variance

    def order(self, steps: int, generator: torch.Generator) -> list[int]:
        """Which batch comes in each step: all of them, shuffled, again and again."""
        order: list[int] = []
        while len(order) < steps:
            order += torch.randperm(len(self.batches), generator=generator).tolist()
        return order


@torch.no_grad()
def _on_first_batches(tasks: Sequence[_Teaching]) -> float:
    """What is unexplained on the first batch of each task, on average over the tasks."""
    return sum(float(task.error(0)) for task in tasks) / len(tasks)


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


def _parts(batch: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """The batch in as few parts of at most so many rows as there can be, as equal as they can be."""
    count = math.ceil(len(next(iter(batch.values()))) / size)
    pieces = {name: torch.tensor_split(tensor, count) for name, tensor in batch.items()}
    for piece in zip(*pieces.values(), strict=True):
        yield dict(zip(pieces, piece, strict=True))
