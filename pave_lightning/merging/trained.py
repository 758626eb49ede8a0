"""Methods that learn: a module is built of the task vectors, trained on the tasks' examples, and merged from."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, Generic, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import TypeVar

from pave_lightning.merging.base import Cost, MethodOptions, StaticMethod
from pave_lightning.merging.blocks import Batch
from pave_lightning.merging.passes import Examples
from pave_lightning.weights import TaskVectors


class TrainedOptions(MethodOptions):
    """Options of every method that learns."""

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


TrainedOptionsT_co = TypeVar("TrainedOptionsT_co", bound=TrainedOptions, default=TrainedOptions, covariant=True)
ModelT = TypeVar("ModelT", bound=nn.Module, default=nn.Module)


class TrainedMethod(StaticMethod[TrainedOptionsT_co], Generic[TrainedOptionsT_co, ModelT]):
    """A method that learns something before it merges: coefficients, weights, modules of the tasks.

    It says what is learned (:meth:`build`), by which loss (:meth:`training_step`), and what is kept of it
    (:meth:`learned`); ``merge`` then makes a task vector of that. Lightning's Trainer runs the training, on the device
    of the forward passes. Every step takes one batch of each task, in the order of their names; the loss is the mean of
    the tasks', and the graph of one task is gone before the next task's is built. Modules stay in the mode (train or
    eval) in which :meth:`build` leaves them. The same seed gives the same result, whatever was drawn before::

        class Coefficients(TrainedMethod):
            needs = frozenset({Need.UNLABELLED_EXAMPLES})

            def build(self, vectors, examples):
                return Interpolated(vectors, self.evidence.forward_passes)  # a module with one parameter

            def training_step(self, model, batch, task):
                return entropy(model(batch, task))

            def learned(self, model):
                self.coefficients = model.coefficients.detach()

            def merge(self, parameter, base, vectors):
                return sum(c * vector for c, vector in zip(self.coefficients, vectors.values()))
    """

    cost = Cost.TRAINING
    whole_model_pass = True
    batched = True
    parallel = False
    serial_because = "what it learns is trained on the whole model"
    Options: ClassVar[type[TrainedOptions]] = TrainedOptions

    @abstractmethod
    def build(self, vectors: TaskVectors, examples: Examples) -> ModelT:
        """What is trained: the parameters of this module that ask for gradients.

        Args:
            vectors: the task vectors.
            examples: each task's batches, on the device. More tensors may be put into them, such as what an expert
                answers; :meth:`training_step` finds them there.

        Returns:
            The module, on the device of ``self.evidence.forward_passes``.
        """

    @abstractmethod
    def training_step(self, model: ModelT, batch: Batch, task: str) -> Tensor:
        """The loss of one task on one of its batches, a scalar with a graph.

        Args:
            model: what :meth:`build` gave.
            batch: the task's examples, without labels, and what :meth:`build` put beside them.
            task: the task.
        """

    @abstractmethod
    def learned(self, model: ModelT) -> None:
        """Keep on the CPU what ``merge`` needs of the trained module, which is gone afterwards."""

    def optimiser(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of the parameters that are trained."""
        return torch.optim.Adam(parameters, lr=self.options.rate)

    def rate_factor(self, step: int, steps: int) -> float:
        """What the optimiser's rates are multiplied with in a step, counted from 0."""
        return 1.0

    def trainer_options(self) -> dict[str, object]:
        """More options for Lightning's Trainer, such as ``gradient_clip_val``."""
        return {}

    def before_training(self, model: ModelT, examples: Examples) -> None:
        """Look at the module before its first step."""
        return

    def after_epoch(self, model: ModelT, examples: Examples, epoch: int, loss: float) -> None:
        """Look at the module when the longest task's examples have been seen once more.

        Args:
            model: the module.
            examples: each task's batches.
            epoch: how many times they have been seen.
            loss: mean over the steps of this epoch.
        """
        return

    def autocast(self) -> AbstractContextManager[None]:
        """Within, passes have the precision of the options; training steps have it anyway."""
        device = torch.device(self.evidence.forward_passes.device).type
        context: AbstractContextManager[None] = torch.autocast(
            device, torch.bfloat16, enabled=self.options.precision == "bf16-mixed"
        )
        return context

    def prepare(self, vectors: TaskVectors) -> None:
        """Build, train and keep what was learned."""
        # Here, so that who merges by other methods need not load Lightning.
        from pave_lightning.merging.training import train

        passes = self.evidence.forward_passes
        examples = {
            task: [part for batch in passes.placed(task) for part in parts(batch, self.options.batch_size)]
            for task in sorted(vectors.tasks)
        }
        with _seeded(self.options.seed, passes.device), torch.enable_grad():
            model = self.build(vectors, examples)
            if any(parameter.requires_grad for parameter in model.parameters()):
                train(
                    self,
                    model,
                    examples,
                    device=passes.device,
                    precision=self.options.precision,
                    epochs=self.options.epochs,
                    seed=self.options.seed,
                )
        self.learned(model)


def parts(batch: Batch, size: int) -> Iterator[dict[str, Tensor]]:
    """The batch in as few parts of at most so many rows as there can be, as equal as they can be."""
    count = math.ceil(len(next(iter(batch.values()))) / size)
    pieces = {name: torch.tensor_split(tensor, count) for name, tensor in batch.items()}
    for piece in zip(*pieces.values(), strict=True):
        yield dict(zip(pieces, piece, strict=True))


@contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """Within, random numbers depend on the seed alone; afterwards they go on as if nothing had been drawn."""
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
