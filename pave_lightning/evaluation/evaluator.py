"""The evaluator: one Lightning module that scores a model on every task with the task's own head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pave_lightning.errors import PaveError
from pave_lightning.evaluation.candidates import Candidate
from pave_lightning.experts.trainers import honest_interrupts, quiet_lightning
from pave_lightning.recipe import Task
from pave_lightning.tasks.data_module import TaskDataModule
from pave_lightning.tasks.metrics import build_metrics, predictions, scores
from pave_lightning.weights import Architecture, Checkpoint
from pave_lightning.weights.architecture import backbone_of, empty_classifier
from pave_lightning.weights.configuration import differences_in_function, model_configuration
from pave_lightning.weights.task_vectors import absent_children

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class TaskScore:
    """A task's metrics on one split, and over how many examples they were computed."""

    metrics: dict[str, float]
    examples: int


class SuiteData(L.LightningDataModule):
    """One split of several tasks, one loader each, in order; every row once over all processes.

    Args:
        modules: the tasks' data.
        split: which split is scored.
    """

    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(self, modules: Sequence[TaskDataModule], split: Split) -> None:
        super().__init__()
        self.modules = list(modules)
        self.split = split

    def prepare_data(self) -> None:
        """Tokenise what is not tokenised yet."""
        for module in self.modules:
            module.dataset(self.split)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """The tasks' loaders."""
        loaders = []
        for module in self.modules:
            module.trainer = self.trainer
            loaders.append(module.test_dataloader() if self.split == "test" else module.val_dataloader())
        return loaders


class Evaluator(L.LightningModule):
    """Scores candidates on all tasks. The backbone exists once; each task brings its own head.

    Every example is counted once over all processes: metrics are reduced as sums (or, for rank correlation, gathered
    whole), and the loaders must neither pad nor repeat.

    Args:
        tasks: the tasks, in the order of the data.
        experts: each task's expert checkpoint, which holds the head.
        base: the base's checkpoint; what of the backbone it lacks altogether belongs to the heads. Its configuration
            says how the backbone computes; an expert with another one is scored with its own.
    """

    def __init__(self, tasks: Sequence[Task], experts: Mapping[str, Checkpoint], base: Checkpoint) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self._metrics = [build_metrics(task) for task in tasks]
        self.metrics = nn.ModuleList(self._metrics)
        self._counts = [0] * len(self.tasks)
        self._private: dict[str, dict[str, Tensor]] = {}
        models = [self._headed(task, experts[task.name], base) for task in tasks]
        prefix = str(models[0].base_model_prefix)
        # Built on the CPU, not on the meta device: position ids and other buffers stand in no checkpoint.
        self.backbone: nn.Module = backbone_of(empty_classifier(base.folder, device="cpu")).float()
        self._names = Architecture.of_folder(base.folder).stored_names
        self._prefix = prefix
        own = [self._with_own_configuration(experts[task.name].folder, base.folder) for task in tasks]
        self.own_backbones = nn.ModuleList(found for found in own if found is not self.backbone)
        self._own = own
        for model in models:
            setattr(model, prefix, self.backbone)
        self._models = models
        self.models = nn.ModuleList(models)
        self._candidate: Candidate | None = None
        self._loaded: str | None = None
        self._given: set[str] = set()
        self.requires_grad_(False)
        self.eval()

    def _headed(self, task: Task, expert: Checkpoint, base: Checkpoint) -> nn.Module:
        model = empty_classifier(expert.folder)
        head = expert.head_tensors()
        model.load_state_dict({name: value.float() for name, value in head.items()}, strict=False, assign=True)
        prefix = f"{model.base_model_prefix}."
        lacking = [n for n, value in model.named_parameters() if value.is_meta and not n.startswith(prefix)]
        if lacking:
            raise PaveError(f"task '{task.name}': {expert.folder} lacks weights of the head: {', '.join(lacking)}")
        private = absent_children(base, expert)
        self._private[task.name] = {
            name: expert.tensor(name).float() for name in expert if name.partition(".")[0] in private
        }
        return model

    def _with_own_configuration(self, expert: Path, base: Path) -> nn.Module:
        """The backbone as an expert's configuration builds it, with the same parameters; the base's where it agrees."""
        if not differences_in_function(model_configuration(base), model_configuration(expert)):
            return self.backbone
        own = backbone_of(empty_classifier(expert, device="cpu")).float()
        parameters = dict(self.backbone.named_parameters(remove_duplicate=False))
        for name, module in own.named_modules():
            for attribute, _ in list(module.named_parameters(recurse=False)):
                setattr(module, attribute, parameters[f"{name}.{attribute}" if name else attribute])
        return own

    def score(self, candidate: Candidate, data: SuiteData, trainer: L.Trainer) -> dict[str, TaskScore]:
        """Score one candidate on data that holds the same tasks in the same order. Returns each task's metrics."""
        self._candidate, self._loaded = candidate, None
        self._counts = [0] * len(self.tasks)
        for metrics in self._metrics:
            metrics.reset()
        with quiet_lightning(), honest_interrupts():
            trainer.test(self, datamodule=data, verbose=False)
        return dict(self._scores)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Load the weights of the task whose loader begins."""
        task = self.tasks[dataloader_idx].name
        if task == self._loaded or self._candidate is None:
            return
        backbone = self._own[dataloader_idx] if self._candidate.own_configuration else self.backbone
        setattr(self._models[dataloader_idx], self._prefix, backbone)
        if self._loaded is None or not self._candidate.shared:
            self._given = self._load(backbone, self._candidate.weights(task))
        given = self._given | self._load(backbone, self._private[task].items())
        lacking = [name for name, _ in self.backbone.named_parameters() if name not in given]
        if lacking:
            raise PaveError(
                f"task '{task}': {len(lacking)} weights of the backbone, such as {lacking[0]}, are in no checkpoint "
                "under a name that is known, so its scores would mean nothing"
            )
        self._loaded = task

    @torch.no_grad()
    def _load(self, backbone: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy weights into a backbone; the names, inside the model, of those that were there."""
        own = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
        given = set()
        for stored, tensor in weights:
            name = self._names.get(stored, stored)
            if name in own:
                own[name].copy_(tensor)
                given.add(name)
        return given

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one batch to its task's metrics."""
        task = self.tasks[dataloader_idx]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = self._models[dataloader_idx](**inputs).logits
        self._metrics[dataloader_idx].update(predictions(task, logits), batch["labels"])
        self._counts[dataloader_idx] += len(batch["labels"])

    def on_test_epoch_end(self) -> None:
        """Reduce over processes and keep the scores."""
        counts = self.trainer.strategy.reduce(torch.tensor(self._counts, device=self.device), reduce_op="sum")
        self._scores = {
            task.name: TaskScore(scores(metrics), int(count))
            for task, metrics, count in zip(self.tasks, self._metrics, counts.tolist(), strict=True)
        }
