"""The module that Lightning trains: one backbone, one head, one task."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import MetricCollection
from transformers import get_linear_schedule_with_warmup

from pave_lightning.errors import PaveError, nearest
from pave_lightning.tasks.metrics import scores
from pave_lightning.tasks.options import Training
from pave_lightning.tasks.task import Batch, Task
from pave_lightning.weights.architecture import backbone_of


class TaskExpert(L.LightningModule):
    """Fine-tunes a model on one task.

    Two learning rates: the head starts at random and needs a high one; the backbone must move little, so that its task
    vector can be merged with others. AdamW with linear warm-up and linear decay over all steps.

    Args:
        model: a Hugging Face model with the task's head, or a peft model around one.
        task: what it is taught; its kind says what batches hold, and decides loss and metrics.
        training: the optimiser's settings; those of the task where nothing is given.
        seed: together with the epoch it seeds dropout, so that a resumed run equals an uninterrupted one.

    Attributes:
        validated_at: after how many steps of the optimiser the weights were last validated while training.
    """

    def __init__(self, model: nn.Module, task: Task, training: Training | None = None, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.training_options = training if training is not None else task.training
        self.seed = seed
        self.validation_metrics: MetricCollection = task.build_metrics()
        self.validated_at: int | None = None

    def forward(self, batch: Batch) -> Tensor:
        """The head's outputs, shape ``(n, output_size)``, for a batch; labels in it are not looked at."""
        return self.task.outputs(self.model, batch)

    def on_train_epoch_start(self) -> None:
        """Seed dropout by epoch; switch to training mode, which ``from_pretrained`` leaves off and Lightning keeps."""
        torch.manual_seed(self.seed + 1_000_003 * (self.current_epoch + 1))
        self.model.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        value = self.task.loss(self.model, batch)
        self.log("train/loss", value, prog_bar=True, batch_size=len(batch["labels"]))
        return value

    def on_validation_epoch_start(self) -> None:
        """Start counting anew."""
        self.validation_metrics.reset()
        self._labelled = False
        self._broken = torch.zeros((), dtype=torch.int64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the metrics; one without labels only passes through, for capture."""
        found = self.task.predict(self.model, batch)
        self._broken += found.broken
        if found.targets is not None:
            self._labelled = True
            if len(found.targets):
                self.validation_metrics.update(found.values, found.targets)

    def on_validation_epoch_end(self) -> None:
        """Log ``validation/METRIC`` over all processes.

        Raises:
            PaveError: outputs were NaN or infinite, of which a class would be chosen all the same.
        """
        broken = int(self.trainer.strategy.reduce(self._broken, reduce_op="sum"))
        if broken:
            training = self.trainer.state.fn == TrainerFn.FITTING
            raise PaveError(
                f"task '{self.task.name}': {broken} examples get NaN or infinite outputs; "
                + (
                    f"training has diverged by step {self.trainer.global_step}: lower the learning rates or use a "
                    "safer precision"
                    if training
                    else "look for broken weights of its expert, or use a safer precision"
                )
            )
        if not self._labelled:
            return
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.validated_at = self.trainer.global_step
        for name, value in scores(self.validation_metrics).items():
            self.log(f"validation/{name}", value, prog_bar=name == self.task.primary_metric)

    def configure_optimizers(self) -> Any:
        """AdamW over four groups: backbone and head, with and without weight decay."""
        options = self.training_options
        optimizer = AdamW(parameter_groups(self.model, self.task, options), fused=self.device.type in ("cpu", "cuda"))
        found = self.trainer.estimated_stepping_batches
        if math.isinf(found):
            raise PaveError("trainer: training would have no end; set max_epochs or max_steps")
        steps = int(found)
        schedule = get_linear_schedule_with_warmup(optimizer, round(options.warmup_share * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parameter_groups(model: nn.Module, task: Task, options: Training) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate (backbone or head) and weight decay (none for vectors: biases, norms)."""
    inner: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    private = task.private_names(inner)
    of_head = {id(parameter) for name, parameter in inner.named_parameters() if name in private}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (id(parameter) not in of_head, parameter.ndim > 1)
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
    known = [name for name, _ in backbone.named_modules() if name]
    for name in names:
        if name not in known:
            raise PaveError(f"training.freeze: the backbone has no submodule '{name}'; {nearest(name, known)}")
        backbone.get_submodule(name).requires_grad_(False)
