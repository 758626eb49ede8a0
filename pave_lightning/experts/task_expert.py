"""The module that Lightning trains: one backbone, and the head of one task or the heads of several."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from pave_lightning.errors import PaveError, nearest
from pave_lightning.experts.forward_options import apply_forward_options
from pave_lightning.experts.sharding import blocks, shard_model
from pave_lightning.layers import plain_name
from pave_lightning.tasks.joint_data import TaskBatch
from pave_lightning.tasks.metrics import scores
from pave_lightning.tasks.options import Training
from pave_lightning.tasks.stand_ins import split_weight
from pave_lightning.tasks.task import Batch, Task
from pave_lightning.tasks.turns import Turns
from pave_lightning.weights.backbones import backbone_of, part_named

# The mean of the tasks' primary metrics, where there are several.
AVERAGE = "validation/primary_average"


class TaskExpert(L.LightningModule):
    """Fine-tunes a model on one task, or models that share a backbone on a task each.

    Two learning rates: the head starts at random and needs a high one; the backbone must move little, so that its task
    vector can be merged with others. AdamW with linear warm-up and linear decay over all steps.

    Of several tasks each step is of one: its loss, its head, its learning rates. Weights that no other task has are
    left alone by the others' steps.

    Args:
        model: a Hugging Face model with the task's head, or a peft model around one; for several tasks one each, in
            which what they share is the same module.
        task: what it is taught; its kind says what batches hold, and decides loss and metrics.
        seed: together with the epoch it seeds dropout, so that a resumed run equals an uninterrupted one.
        turns: of several tasks, which of them each step is of.
        processors: what the tasks' rows are encoded with, for answers that are texts. Without them validation only
            takes what is predicted in one pass, as capture does.

    Attributes:
        model: what is trained; of several tasks a `torch.nn.ModuleList`.
        models: the tasks' models.
        tasks: the tasks, in the order of the models.
        validated_at: after how many steps of the optimiser the weights were last validated while training.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        task: Task | Sequence[Task],
        seed: int = 0,
        turns: Turns | None = None,
        processors: Sequence[Any] | None = None,
    ) -> None:
        super().__init__()
        self.models = [model] if isinstance(model, nn.Module) else list(model)
        self.model: nn.Module = self.models[0] if isinstance(model, nn.Module) else nn.ModuleList(model)
        self.tasks = [task] if isinstance(task, Task) else list(task)
        self.seed, self.turns = seed, turns
        self.processors = None if processors is None else list(processors)
        self._metrics = [one.build_metrics() for one in self.tasks]
        self.validation_metrics = nn.ModuleList(self._metrics)
        self.validated_at: int | None = None
        self._configured = False
        # Told now: FSDP1 flattens the weights.
        self._vectors = {name for one in self.models for name, value in one.named_parameters() if value.ndim < 2}

    def configure_model(self) -> None:
        """Let the model compute as its training asks for, and divide its weights where the strategy asks for it."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self._configured:
            self._configured = True
            apply_forward_options(self.models, self.tasks[0].training)
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            shard_model(self.model, strategy.device_mesh["data_parallel"])
        elif isinstance(strategy, FSDPStrategy):
            chosen = set(blocks(self.model))
            strategy.kwargs["auto_wrap_policy"] = CustomPolicy(lambda module: module in chosen)

    @property
    def name(self) -> str:
        """What is trained, in the log."""
        return self.tasks[0].name if len(self.tasks) == 1 else "joint"

    @property
    def title(self) -> str:
        """What is trained, in messages."""
        return f"task '{self.name}'" if len(self.tasks) == 1 else self.name

    @property
    def monitor(self) -> str:
        """Under which name the score is logged that the best checkpoint has."""
        return f"validation/{self.tasks[0].primary_metric}" if len(self.tasks) == 1 else AVERAGE

    def forward(self, batch: Batch, task: int = 0) -> Tensor:
        """The head's outputs, shape ``(n, output_size)``, for a batch; labels in it are not looked at."""
        return self.tasks[task].outputs(self.models[task], batch)

    def on_train_epoch_start(self) -> None:
        """Seed dropout by epoch; switch to training mode, which ``from_pretrained`` leaves off and Lightning keeps."""
        torch.manual_seed(self.seed + 1_000_003 * (self.current_epoch + 1))
        self.model.train()

    def training_step(self, batch: Batch | TaskBatch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        task, rows = batch if isinstance(batch, TaskBatch) else (0, batch)
        value = self.tasks[task].loss(self.models[task], rows)
        self.log(f"train/{self._part(task)}loss", value, prog_bar=True, batch_size=len(rows["labels"]))
        return value

    def on_validation_epoch_start(self) -> None:
        """Start counting anew."""
        for metrics in self._metrics:
            metrics.reset()
        self._labelled = False
        self._broken = torch.zeros(len(self.tasks), dtype=torch.int64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one batch of a task to its metrics; one without labels only passes through, for capture."""
        task, model = self.tasks[dataloader_idx], self.models[dataloader_idx]
        batch, counts = split_weight(batch)
        if self.processors is None:
            found = task.predict(model, batch)
        else:
            found = task.respond(model, batch, self.processors[dataloader_idx])
        if not counts:  # it was run because other processes wait for this one in every forward pass
            return
        self._broken[dataloader_idx] += found.broken
        if found.targets is not None:
            self._labelled = True
            if len(found.targets):
                self._metrics[dataloader_idx].update(found.values, found.targets, **found.further)

    def on_validation_epoch_end(self) -> None:
        """Log ``validation/METRIC``, or ``validation/TASK/METRIC`` and the average of several, over all processes.

        Raises:
            PaveError: outputs were NaN or infinite, of which a class would be chosen all the same.
        """
        # A process without a row must not leave the others waiting for what it knows of the metrics.
        told = torch.cat([self._broken, self._broken.new_tensor([self._labelled])])
        *broken, labelled = self.trainer.strategy.reduce(told, reduce_op="sum").tolist()
        if any(broken):
            training = self.trainer.state.fn == TrainerFn.FITTING
            name, examples = next((one.name, count) for one, count in zip(self.tasks, broken, strict=True) if count)
            raise PaveError(
                f"task '{name}': {examples} examples get NaN or infinite outputs; "
                + (
                    f"training has diverged by step {self.trainer.global_step}: lower the learning rates or use a "
                    "safer precision"
                    if training
                    else "look for broken weights of its expert, or use a safer precision"
                )
            )
        if not labelled:
            return
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.validated_at = self.trainer.global_step
        primary = []
        for index, task in enumerate(self.tasks):
            found = scores(self._metrics[index])
            primary.append(found[task.primary_metric])
            for name, value in found.items():
                own = f"validation/{self._part(index)}{name}"
                self.log(own, value, prog_bar=own == self.monitor)
        if len(self.tasks) > 1:
            self.log(self.monitor, math.fsum(primary) / len(primary), prog_bar=True)

    def _part(self, task: int) -> str:
        """What the names of a task's metrics begin with: nothing where there is one task."""
        return f"{self.tasks[task].name}/" if len(self.tasks) > 1 else ""

    def configure_optimizers(self) -> Any:
        """AdamW over groups: backbone and each head, with and without weight decay; linear warm-up and decay."""
        groups = self._groups()
        found = self.trainer.estimated_stepping_batches
        if math.isinf(found):
            raise PaveError("trainer: training would have no end; set max_epochs or max_steps")
        steps = int(found)
        # Lightning clips no gradients that a fused step unscales itself, and asks so of every mixed precision.
        clips = bool(self.trainer.gradient_clip_val) and str(self.trainer.precision).endswith("mixed")
        fused = self.device.type in ("cpu", "cuda") and not clips
        optimizer = AdamW([group for group, _ in groups], fused=fused)
        warm_up = sum(round(task.training.warmup_share * steps * share) for task, share in self._shares())
        rates = [self._rate(shared, warm_up, steps) for _, shared in groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, rates), "interval": "step"}}

    def _groups(self) -> list[tuple[dict[str, Any], bool]]:
        """The groups of the optimiser, and whether all tasks share them; shared ones have the first task's rates."""
        having = Counter(id(parameter) for model in self.models for parameter in model.parameters())
        groups, taken = [], set[int]()
        for model, task in zip(self.models, self.tasks, strict=True):
            for group in parameter_groups(model, task, task.training, self._vectors):
                for shared in (True, False):
                    new = [one for one in group["params"] if id(one) not in taken and (having[id(one)] > 1) == shared]
                    if new:
                        groups.append(({**group, "params": new}, shared))
                        taken.update(map(id, new))
        return groups

    def _shares(self) -> list[tuple[Task, float]]:
        """The tasks, and which share of all steps is theirs."""
        if self.turns is None:
            return [(self.tasks[0], 1)]
        return [(task, own / len(self.turns)) for task, own in zip(self.tasks, self.turns.batches, strict=True)]

    def _rate(self, shared: bool, warm_up: int, steps: int) -> Callable[[int], float]:
        """What the learning rate of a group is multiplied with in each step."""
        turns, rates = self.turns, [task.training.learning_rate for task in self.tasks]

        def rate(step: int) -> float:
            found = linear_schedule(step, warm_up, steps)
            if shared and turns is not None and step < steps:
                found *= rates[turns.at(step)] / rates[0]
            return found

        return rate


def linear_schedule(step: int, warm_up: int, steps: int) -> float:
    """The factor of a learning rate that rises linearly from zero, and falls linearly to zero at the last step."""
    if step < warm_up:
        return step / max(1, warm_up)
    return max(0.0, (steps - step) / max(1, steps - warm_up))


def parameter_groups(
    model: nn.Module, task: Task, options: Training, vectors: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate (backbone or head) and weight decay (none for vectors: biases, norms).

    Args:
        model: a model with the task's head, or a peft model around one.
        task: its kind says what belongs to the head.
        options: how it is trained.
        vectors: names of the parameters that are vectors, where their shapes no longer tell it.
    """
    inner: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    private = task.private_names(inner)
    of_head = {id(parameter) for name, parameter in inner.named_parameters() if name in private}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_vector = parameter.ndim < 2 if vectors is None else plain_name(name) in vectors
            key = (id(parameter) not in of_head, not is_vector)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": options.learning_rate if in_backbone else options.head_learning_rate,
            "weight_decay": options.weight_decay if decays else 0.0,
        }
        for (in_backbone, decays), parameters in groups.items()
    ]


def freeze(model: nn.Module, names: list[str]) -> None:
    """Stop training the named submodules of the backbone.

    Raises:
        PaveError: the backbone has no submodule of that name.
    """
    backbone = backbone_of(model)
    known = [name for name, _ in (*backbone.named_modules(), *backbone.named_parameters(recurse=False)) if name]
    for name in names:
        if name not in known:
            raise PaveError(f"training.freeze: the backbone has no submodule '{name}'; {nearest(name, known)}")
        part_named(backbone, name).requires_grad_(False)
