"""The evaluator: one Lightning module that scores a model on every task with the task's own head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pave_lightning.errors import PaveError
from pave_lightning.evaluation.candidates import Candidate, adapted
from pave_lightning.evaluation.heads import HeadRows, head_rows, last_layer
from pave_lightning.evaluation.kept_predictions import KeptPredictions
from pave_lightning.experts.sharding import WholeWeights, shard_blocks
from pave_lightning.experts.trainers import honest_interrupts, quiet_lightning
from pave_lightning.tasks.constants import constant_scores
from pave_lightning.tasks.data_module import TaskDataModule
from pave_lightning.tasks.metrics import scores
from pave_lightning.tasks.predictions import TaskPredictions
from pave_lightning.tasks.stand_ins import rows_in_order, split_weight
from pave_lightning.tasks.task import Batch, Task, auto_models
from pave_lightning.tasks.tokenizers import set_padding
from pave_lightning.weights import Architecture, Checkpoint
from pave_lightning.weights.backbones import backbone_of, name_prefix, with_backbone
from pave_lightning.weights.configuration import differences_in_function
from pave_lightning.weights.embeddings import resize_rows, scoring_layer
from pave_lightning.weights.empty_models import empty_model, read_config
from pave_lightning.weights.task_vectors import absent_children, own_token_rows

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class TaskScore:
    """A task's metrics on one split.

    Attributes:
        metrics: NaN where any output was not finite, of which a class would be chosen all the same.
        examples: over how many examples they were computed.
        broken: examples with NaN or infinite outputs.
        predictions: what was predicted for each row, where it was asked for and the kind of task tells it.
    """

    metrics: dict[str, float]
    examples: int
    broken: int = 0
    predictions: TaskPredictions | None = field(default=None, compare=False, repr=False)


class SuiteData(L.LightningDataModule):
    """One split of several tasks, one loader each, in order; every row once over all processes.

    Args:
        modules: the tasks' data.
        split: which split is scored.
    """

    def __init__(self, modules: Sequence[TaskDataModule], split: Split) -> None:
        super().__init__()
        # Behind super, which sets it to False: a split with fewer rows than processes leaves some without a batch.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.modules = list(modules)
        self.split = split
        self.orders: list[list[int]] = []
        """The rows that this process's loaders give, in their order, by task."""

    def prepare_data(self) -> None:
        """Tokenise what is not tokenised yet."""
        for module in self.modules:
            module.dataset(self.split)

    def constants(self) -> dict[str, dict[str, float]]:
        """What a constant answer scores, by task and metric; see `constant_scores`."""
        return {module.task.name: constant_scores(module.task, module.labels(self.split)) for module in self.modules}

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """The tasks' loaders."""
        loaders = []
        self.orders = []
        for module in self.modules:
            module.trainer = self.trainer
            loaders.append(module.test_dataloader() if self.split == "test" else module.val_dataloader())
            self.orders.append(rows_in_order(loaders[-1]))
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
        self._metrics = [task.build_metrics() for task in tasks]
        self.metrics = nn.ModuleList(self._metrics)
        self._counts = [0] * len(self.tasks)
        self._private: dict[str, dict[str, Tensor]] = {}
        self._own_rows: dict[str, dict[str, Tensor]] = {}
        self._token_embeddings: tuple[str, ...] = ()
        # Weights that score tokens; of how many tokens the model at hand has rows, with and without a task's own.
        self._score_tables: set[str] = set()
        self._rows = self._shared_rows = 0
        self._base = base
        models = [self._headed(task, experts[task.name], base) for task in tasks]
        self.backbone: nn.Module = _widest_backbone(tasks, base.folder)
        architecture = Architecture.of_folder(base.folder, *auto_models(tasks))
        self._names, self._places = architecture.stored_names, architecture.stored_places
        self._make_room(architecture, [base, *(experts[task.name] for task in tasks)])
        for task in tasks:
            self._own_rows[task.name] = own_token_rows(base, experts[task.name], architecture)
        own = [self._with_own_configuration(task, experts[task.name].folder, base.folder) for task in tasks]
        for backbone in {id(one): one for one in (self.backbone, *own)}.values():
            if (layer := scoring_layer(backbone)) is not None:
                self._score_tables |= {
                    name
                    for name, found in backbone.named_parameters(remove_duplicate=False)
                    if any(found is one for one in layer.parameters())
                }
                # A bound method would be copied, and this with it, when a candidate adapts a copy of the model.
                layer.register_forward_hook(lambda *given: self._hide(*given))  # noqa: PLW0108
        self.own_backbones = nn.ModuleList(found for found in own if found is not self.backbone)
        self._own = own
        self._asked = [{name for name, _ in backbone_of(model).named_parameters()} for model in models]
        self._models = [with_backbone(model, self.backbone) for model in models]
        self.models = nn.ModuleList(self._models)
        self._adapted: dict[str, nn.Module] = {}
        self._candidate: Candidate | None = None
        self._kept: KeptPredictions | None = None
        self._loaded: str | None = None
        self._given: set[str] = set()
        self.requires_grad_(False)
        self.eval()

    def _headed(self, task: Task, expert: Checkpoint, base: Checkpoint) -> nn.Module:
        model = empty_model(expert.folder, task.auto_model)
        set_padding(model, expert.folder, base.folder)  # by which heads find the last token
        head = expert.head_tensors()
        model.load_state_dict({name: value.float() for name, value in head.items()}, strict=False, assign=True)
        prefix = name_prefix(model)
        lacking = [n for n, value in model.named_parameters() if value.is_meta and not n.startswith(prefix)]
        if lacking:
            raise PaveError(f"task '{task.name}': {expert.folder} lacks weights of the head: {', '.join(lacking)}")
        private = absent_children(base, expert)
        self._private[task.name] = {
            name: expert.tensor(name).float() for name in expert if name.partition(".")[0] in private
        }
        return model

    def _make_room(self, architecture: Architecture, checkpoints: Iterable[Checkpoint]) -> None:
        """Let the backbone have a row for every token of every checkpoint."""
        self._token_embeddings = architecture.token_embeddings
        stored = [held.backbone.get(name) for held in checkpoints for name in self._token_embeddings]
        rows = [found.shape[0] for found in stored if found is not None]
        if rows:
            resize_rows(self.backbone, max(rows), scores=True)

    def _hide(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Scores of tokens, without those that the model at hand has no row for."""
        if self._rows == 0 or self._rows >= output.shape[-1]:
            return output
        hidden = torch.arange(output.shape[-1], device=output.device) >= self._rows
        return output.masked_fill(hidden, torch.finfo(output.dtype).min)

    def _with_own_configuration(self, task: Task, expert: Path, base: Path) -> nn.Module:
        """The backbone as an expert's configuration builds it, with the same parameters; the base's where it agrees."""
        if not differences_in_function(read_config(base), read_config(expert)):
            return self.backbone
        own = backbone_of(empty_model(expert, task.auto_model, device="cpu")).float()
        parameters = dict(self.backbone.named_parameters(remove_duplicate=False))
        for name, module in own.named_modules():
            for attribute, _ in list(module.named_parameters(recurse=False)):
                setattr(module, attribute, parameters[f"{name}.{attribute}" if name else attribute])
        return own

    def configure_model(self) -> None:
        """Divide the blocks of the backbone over the processes, where the strategy asks for it; all else stays whole.

        Raises:
            PaveError: an expert has a configuration of its own, whose backbone has the same weights.
        """
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        if len(self.own_backbones):
            found = [task.name for task, own in zip(self.tasks, self._own, strict=True) if own is not self.backbone]
            raise PaveError(
                f"trainer.strategy: the expert of {', '.join(found)} computes with a configuration of its own, which "
                "cannot be scored with divided weights; use strategy: ddp, or a single device"
            )
        shard_blocks(self.backbone, self.trainer.strategy.device_mesh["data_parallel"])

    def score(
        self, candidate: Candidate, data: SuiteData, trainer: L.Trainer, *, keep: bool = False
    ) -> dict[str, TaskScore]:
        """Score one candidate.

        Args:
            candidate: the model.
            data: the same tasks in the same order.
            trainer: what runs it.
            keep: whether to keep the predictions of all rows, on all processes.

        Returns:
            Each task's metrics.
        """
        self._candidate, self._loaded = candidate, None
        self._data = data
        self._kept = KeptPredictions(len(self.tasks), [task.mean_metrics for task in self.tasks]) if keep else None
        self._counts = [0] * len(self.tasks)
        self._broken: list[int | Tensor] = [0] * len(self.tasks)
        for metrics in self._metrics:
            metrics.reset()
        with quiet_lightning(), honest_interrupts():
            trainer.test(self, datamodule=data, verbose=False)
        self._adapted = {}
        return dict(self._scores)

    def head_rows(self, candidate: Candidate, batches: Mapping[str, Sequence[Batch]]) -> dict[str, HeadRows]:
        """What the heads of the tasks are given by a candidate, and say, for some rows; in this process, as it stands.

        Args:
            candidate: the model.
            batches: rows of those tasks that are asked for, by name.

        Raises:
            PaveError: a head does not end in a linear layer, a task has no rows, or values are not finite.
        """
        self._candidate, self._loaded = candidate, None
        found = {}
        for index, task in enumerate(self.tasks):
            if task.name in batches:
                self._prepare(index)
                placed = ({n: t.to(self.device) for n, t in batch.items()} for batch in batches[task.name])
                found[task.name] = head_rows(task, self._adapted[task.name], placed)
        self._adapted, self._loaded = {}, None
        return found

    @contextmanager
    def model_of(self, candidate: Candidate, task: str) -> Iterator[nn.Module]:
        """A candidate's model of a task, with its head, while the block runs; its weights must not be changed.

        Args:
            candidate: the model.
            task: name of the task.
        """
        self._candidate, self._loaded = candidate, None
        self._prepare([one.name for one in self.tasks].index(task))
        try:
            yield self._adapted[task]
        finally:
            self._adapted, self._loaded = {}, None

    def last_layer(self, task: str) -> tuple[str | None, nn.Linear | None]:
        """Name and layer of what gives the outputs of a task's head, as its expert has it; None where it has none."""
        index = [one.name for one in self.tasks].index(task)
        name = last_layer(self.tasks[index], self._models[index])
        found = None if name is None else self._models[index].get_submodule(name)
        return name, found if isinstance(found, nn.Linear) else None

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Load the weights of the task whose loader begins, and let the candidate adapt the model to the task."""
        self._prepare(dataloader_idx)

    def _prepare(self, dataloader_idx: int) -> None:
        task = self.tasks[dataloader_idx].name
        if task == self._loaded or self._candidate is None:
            return
        backbone = self._own[dataloader_idx] if self._candidate.own_configuration else self.backbone
        self._models[dataloader_idx] = with_backbone(self._models[dataloader_idx], backbone)
        if self._loaded is None or not self._candidate.shared:
            self._rows = 0
            self._given = self._load(backbone, self._candidate.weights(task))
            self._shared_rows = self._rows
        self._rows = self._shared_rows
        asked = self._asked[dataloader_idx]
        given = self._given | self._load(backbone, self._private[task].items())
        self._load(backbone, self._own_rows[task].items(), beyond=self._base)
        lacking = [name for name, _ in self.backbone.named_parameters() if name in asked and name not in given]
        if lacking:
            raise PaveError(
                f"task '{task}': {len(lacking)} weights of the backbone, such as {lacking[0]}, are in no checkpoint "
                "under a name that is known, so its scores would mean nothing"
            )
        self._adapted = {task: adapted(self._candidate, self._models[dataloader_idx], task)}
        self._loaded = task

    @torch.no_grad()
    def _load(
        self, backbone: nn.Module, weights: Iterable[tuple[str, Tensor]], beyond: Checkpoint | None = None
    ) -> set[str]:
        """Copy weights into a backbone; the names, inside the model, of those that were there.

        Args:
            backbone: the backbone.
            weights: names as they are stored, and values; of the token embedding the first rows, or all.
            beyond: a checkpoint behind whose rows these rows of the token embedding come.
        """
        own = WholeWeights(backbone.state_dict(keep_vars=True))  # without what the model makes by itself
        given = set()
        for stored, tensor in weights:
            name, place = self._names.get(stored, stored), self._places.get(stored)
            if place is not None:
                place.copy_into(own, tensor)
                given |= {piece.parameter for piece in place.pieces}
                continue
            if name not in own:
                continue
            if name in self._token_embeddings or name in self._score_tables:
                first = 0 if beyond is None else beyond.backbone[name].shape[0]
                own[name][first : first + len(tensor)].copy_(tensor)
                if name in self._token_embeddings:
                    self._rows = max(self._rows, first + len(tensor))
            else:
                own[name] = tensor
            given.add(name)
        own.close()
        return given

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one batch to its task's metrics."""
        task = self.tasks[dataloader_idx]
        batch, counts = split_weight(batch)
        found = task.respond(self._adapted[task.name], batch, self._data.modules[dataloader_idx].processor)
        if not counts:  # it was run because other processes wait for this one in every forward pass
            return
        self._broken[dataloader_idx] += found.broken
        if len(found.values):  # of some rows a tokenizer leaves nothing that is predicted
            self._metrics[dataloader_idx].update(found.values, found.targets, **found.further)
        done, examples = self._counts[dataloader_idx], len(batch["labels"])
        if self._kept is not None:
            rows = self._data.orders[dataloader_idx][done : done + examples]
            self._kept.add(dataloader_idx, found, rows, task.row_scores(found) if task.mean_metrics else None)
        self._counts[dataloader_idx] += examples

    def on_test_epoch_end(self) -> None:
        """Reduce over processes and keep the scores."""
        counted = torch.tensor([self._counts, list(map(int, self._broken))], device=self.device)
        counts, broken = self.trainer.strategy.reduce(counted, reduce_op="sum").tolist()
        kept: Sequence[TaskPredictions | None] = [None] * len(self.tasks)
        if self._kept is not None:
            kept = self._kept.gathered(self.trainer, self.device)
        self._scores = {}
        for task, metrics, examples, without, own in zip(self.tasks, self._metrics, counts, broken, kept, strict=True):
            found = {name: math.nan if without else value for name, value in scores(metrics).items()}
            self._scores[task.name] = TaskScore(found, examples, without, own)


def _widest_backbone(tasks: Sequence[Task], base: Path) -> nn.Module:
    """The backbone, float32, with all that any task's model has of it.

    Built on the CPU, not on the meta device: position ids and other buffers stand in no checkpoint.
    """
    found = [backbone_of(empty_model(base, name, device="cpu")).float() for name in auto_models(tasks)]
    return max(found, key=lambda backbone: sum(1 for _ in backbone.named_parameters()))


def refuse_non_finite(scores: Mapping[str, TaskScore], whose: str, to_do: str) -> None:
    """Make sure that scores are of finite outputs, and finite themselves.

    Args:
        scores: by task.
        whose: which model they are of, for the message.
        to_do: what to do about it.

    Raises:
        PaveError: names the tasks.
    """
    problems = []
    for task, score in scores.items():
        broken = [name for name, value in score.metrics.items() if not math.isfinite(value)]
        if score.broken:
            problems.append(f"task '{task}': {score.broken} of {score.examples} examples get NaN or infinite outputs")
        elif broken:
            problems.append(f"task '{task}': {', '.join(broken)} is not finite")
    if problems:
        raise PaveError(f"{'; '.join(problems)} from {whose}, so its scores would mean nothing; {to_do}")
