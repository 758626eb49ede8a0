"""Fine-tuning with Lightning: from its last checkpoint to the weights of the best one; one expert as a folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn

from pave_lightning.errors import PaveError, reason
from pave_lightning.experts.checkpoints import (
    BEST,
    LAST,
    MovableCheckpoint,
    damage_of,
    start_anew,
    unusable_checkpoint,
)
from pave_lightning.experts.history import History
from pave_lightning.experts.loading import load_with_new_head
from pave_lightning.experts.new_adapters import add_adapters, keep_start, save_adapter
from pave_lightning.experts.schedule import training_settings
from pave_lightning.experts.sharding import local_part
from pave_lightning.experts.task_expert import TaskExpert, freeze
from pave_lightning.experts.trainers import build_trainer, honest_interrupts, quiet_lightning
from pave_lightning.system.files import let_others_read
from pave_lightning.system.processes import is_launched, is_rank_zero
from pave_lightning.tasks.constants import constant_answer
from pave_lightning.tasks.data_module import TaskDataModule
from pave_lightning.tasks.encoded import EncodedRows
from pave_lightning.tasks.image_processors import copy_image_processor
from pave_lightning.tasks.kinds.tokens import TOKENS
from pave_lightning.tasks.metrics import weak_experts
from pave_lightning.tasks.options import EarlyStopping as EarlyStoppingOptions
from pave_lightning.tasks.stand_ins import is_sharded
from pave_lightning.tasks.task import Task
from pave_lightning.tasks.tokenizers import load_tokenizer, padding_note
from pave_lightning.weights import is_finite
from pave_lightning.weights.architecture import Architecture
from pave_lightning.weights.backbones import backbone_of, unchanged_parts
from pave_lightning.weights.quiet import quiet_transformers
from pave_lightning.weights.task_vectors import absent_modules

log = logging.getLogger("pave_lightning")

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Prepared:
    """A training that may begin.

    Attributes:
        expert: what is trained.
        data: its rows.
        settings: options of the trainer.
        early_stopping: when it stops early; None where it does not.
    """

    expert: TaskExpert
    data: L.LightningDataModule
    settings: Mapping[str, Any]
    early_stopping: EarlyStoppingOptions | None


def fit_expert(
    task: Task,
    base: Path,
    *,
    seed: int,
    work_folder: Path,
    cache_folder: Path,
    logger: Logger | None = None,
    history: History | None = None,
) -> tuple[nn.Module, dict[str, float]]:
    """Fine-tune one expert and return it with the weights of its best checkpoint.

    Args:
        task: the task, with its training and trainer options.
        base: folder of the base model.
        seed: seed of the head, the order of examples and dropout.
        work_folder: where checkpoints are kept while training.
        cache_folder: where tokenised data is kept.
        logger: receives the metrics while training.
        history: notes the course of the training.

    Returns:
        The trained model, in eval mode (a peft model where adapters were trained), and its validation metrics: the
        primary one, and what a constant answer scores in it.

    Raises:
        PaveError: as `trained` says.
        Interrupted: training was stopped from outside.
    """

    def prepare() -> Prepared:
        L.seed_everything(seed, workers=True, verbose=False)
        model = load_with_new_head(base, task)
        frozen = [*task.training.freeze, *sorted(unchanged_parts(model, task.auto_model))]
        freeze(model, frozen)
        if task.training.lora is not None:
            backbone = backbone_of(model)
            architecture = Architecture.of_model(model)
            private = absent_modules(architecture.checkpoint(base), architecture, dict(backbone.named_parameters()))
            model = add_adapters(model, task.training.lora, task.peft_type, frozen=frozen, private=private)
            if is_rank_zero():
                keep_start(model, task.training.lora, work_folder)
        data = task_data(task, base, model, seed, cache_folder)
        expert = TaskExpert(model, task, seed=seed, processors=[data.processor])
        return Prepared(expert, data, training_settings(task), task.training.early_stopping)

    expert, score = trained(prepare, work_folder, logger=logger, history=history)
    constant = validation_constants(task, base, seed, cache_folder)
    weak = weak_experts({task.name: score}, {task.name: constant[task.primary_metric]})
    if weak and is_rank_zero():  # or else every process says it
        log.warning("%s; try other learning rates or more rows", weak)
    metrics = {expert.monitor: score, **{f"validation/{name}/constant": value for name, value in constant.items()}}
    return expert.model.eval(), metrics


def trained(
    prepare: Callable[[], Prepared],
    work_folder: Path,
    *,
    logger: Logger | None = None,
    history: History | None = None,
) -> tuple[TaskExpert, float]:
    """Train to the end; the weights are then those of the best checkpoint.

    Training goes on from the last checkpoint in ``work_folder`` where there is one that can be used. Where the last
    steps were not validated by the trainer's own rules (``max_steps`` within an epoch), they are in the end.

    Args:
        prepare: makes what is trained, from its seed.
        work_folder: where checkpoints are kept while training.
        logger: receives the metrics while training.
        history: notes the course of the training.

    Returns:
        What was trained, and its validation score.

    Raises:
        PaveError: training gave NaN or infinite weights or outputs, nothing was trained or validated, or Lightning
            refuses the options.
        Interrupted: training was stopped from outside.
    """
    begun = prepare()
    try:
        return _trained(begun, prepare, work_folder, logger, history)
    except _UnusableCheckpointError as error:
        name = begun.expert.name
        start_anew(name, work_folder, f"the last checkpoint cannot be restored ({reason(error)})")
        if is_launched():  # the other processes of this stage have to begin anew, too
            raise PaveError(f"{begun.expert.title}: run the same command again, which trains anew") from error
    return _trained(prepare(), prepare, work_folder, logger, history)


def _trained(
    begun: Prepared,
    prepare: Callable[[], Prepared],
    work_folder: Path,
    logger: Logger | None,
    history: History | None,
) -> tuple[TaskExpert, float]:
    expert, data = begun.expert, begun.data
    checkpoint = MovableCheckpoint(
        dirpath=work_folder, filename="best", monitor=expert.monitor, mode="max", enable_version_counter=False
    )
    # Not save_last of the other: that one writes only in epochs that are the best so far.
    each_epoch = MovableCheckpoint(dirpath=work_folder, filename="last", enable_version_counter=False)
    started = _Begun()
    callbacks: list[Callback] = [checkpoint, each_epoch, started]
    if str(begun.settings.get("strategy", "")).startswith("deepspeed"):
        callbacks.remove(each_epoch)  # from which nothing could go on
    # Later some strategies let the module see parts of its weights only.
    expected = {name: torch.empty(value.shape, device="meta") for name, value in expert.state_dict().items()}
    if begun.early_stopping is not None:
        # Not strict: an epoch without a validation pass has nothing to judge by, and training goes on.
        stopping = EarlyStopping(expert.monitor, mode="max", strict=False, **begun.early_stopping.model_dump())
        callbacks.append(stopping)
    if history is not None:
        callbacks.append(history)
    if logger is not None:
        callbacks.append(LearningRateMonitor("step"))
    problem = unusable_checkpoint(work_folder, expected)
    if problem:
        start_anew(expert.name, work_folder, problem)
    last = work_folder / LAST
    resumed = last.is_file() and not problem
    with quiet_lightning(), honest_interrupts():
        trainer = build_trainer(
            begun.settings,
            root=work_folder,
            logger=logger,
            callbacks=callbacks,
            enable_checkpointing=True,
            reload_dataloaders_every_n_epochs=0,
        )
        if resumed:
            log.info("%s: training goes on from its last checkpoint", expert.name)
        try:
            trainer.fit(expert, datamodule=data, ckpt_path=last if resumed else None)
        except Exception as error:
            if resumed and not started.training and not isinstance(error, (PaveError, OSError, *OUT_OF_MEMORY)):
                raise _UnusableCheckpointError(reason(error)) from error
            if isinstance(error, MisconfigurationException):
                raise PaveError(f"{expert.title}: trainer: {reason(error)}") from error
            raise
    if trainer.global_step == 0:
        raise PaveError(f"{expert.title}: nothing was trained; the trainer needs at least one step (max_epochs)")
    score = _take_the_best(expert, checkpoint, work_folder / BEST, trainer, data, expected=expected)
    if is_sharded(trainer):
        expert = _in_one_piece(expert, prepare, work_folder / BEST)
    broken = [name for name, value in expert.model.named_parameters() if not is_finite(local_part(value.detach()))]
    if broken:
        raise PaveError(
            f"{expert.title}: training gave NaN or infinite weights ({len(broken)} tensors, first {broken[0]}); "
            "lower the learning rates or use a safer precision"
        )
    return expert, score


def task_data(task: Task, base: Path, model: nn.Module, seed: int, cache_folder: Path) -> TaskDataModule:
    """The rows of a task as the base's processor makes them, padded with the token that the model knows."""
    processor = task.load_processor(base, base)
    if task.reads_tokens and (note := padding_note(processor)):
        log.info("%s: %s", task.name, note)
    return TaskDataModule(
        task,
        processor,
        seed=seed,
        cache_dir=cache_folder,
        batch_size=task.training.batch_size,
        padding=task.padding(model.config, processor),
    )


def validation_constants(task: Task, base: Path, seed: int, cache_folder: Path) -> dict[str, float]:
    """What always the same answer scores on the validation split of a task, as the base's tokenizer reads it."""
    rows = EncodedRows(task, task.load_processor(base, base), seed=seed, cache_dir=cache_folder)
    return constant_answer(rows, "validation")


def _take_the_best(
    expert: TaskExpert,
    checkpoint: ModelCheckpoint,
    best: Path,
    trainer: L.Trainer,
    data: L.LightningDataModule,
    *,
    expected: Mapping[str, Tensor],
) -> float:
    """Give an expert the weights with the best validation score, and return it; validates the last ones if needed."""
    score = float("-inf") if checkpoint.best_model_score is None else float(checkpoint.best_model_score)
    # What these have taken apart, Lightning cannot set up once more.
    once = isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy))
    if expert.validated_at != trainer.global_step and not once:
        with quiet_lightning(), honest_interrupts():
            found, *_ = trainer.validate(expert, datamodule=data, verbose=False) or ({},)
        last = float(found.get(expert.monitor, "nan"))
        if last > score:
            if is_sharded(trainer):
                trainer.save_checkpoint(best, weights_only=True)
            return last
    if score == float("-inf"):
        raise PaveError(
            f"{expert.title}: no validation pass ended, so there is no best checkpoint; the trainer needs at least "
            "one validation batch (limit_val_batches)"
        )
    problem = damage_of(best, expected, resumable=False)
    if problem:
        start_anew(expert.name, best.parent, f"the best checkpoint is damaged ({problem})")
        raise PaveError(f"{expert.title}: the best checkpoint was damaged; run the same command again")
    if not is_sharded(trainer):
        expert.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])
    return score


def _in_one_piece(expert: TaskExpert, prepare: Callable[[], Prepared], best: Path) -> TaskExpert:
    """What was trained with divided weights, whole, for rank zero, which saves it; the others have their parts only.

    The file is mapped, not loaded, so that rank zero holds the weights once and no other process holds them.
    """
    if not is_rank_zero():
        return expert
    whole = prepare().expert
    whole.load_state_dict(torch.load(best, map_location="cpu", mmap=True, weights_only=True)["state_dict"])
    return whole


class _UnusableCheckpointError(Exception):
    """Lightning could not restore a checkpoint that is whole, such as one of another version."""


class _Begun(Callback):
    """Notes whether training has begun, with all that was to be restored."""

    training = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.training = True


def save_expert(
    model: nn.Module, base: Path, folder: Path, tokenizer_of: Path | None = None, *, work_folder: Path | None = None
) -> None:
    """Write an expert as a Hugging Face folder; adapters stand beside the weights they merge into.

    Its tokenizer goes with it, where it reads tokens, and its image processor, where it reads images.

    Args:
        model: a model with a head, or a peft model around one.
        base: folder of the base model, whose tokenizer or image processor it is.
        folder: an existing folder.
        tokenizer_of: folder whose tokenizer or image processor it is instead, where it has one of its own.
        work_folder: that of its training, for adapters that took a part of the base's weights when they started.
    """
    if hasattr(model, "merge_and_unload"):
        save_adapter(model, folder, work_folder)
        model = model.merge_and_unload()  # type: ignore[operator]
    with quiet_transformers():
        model.save_pretrained(folder)  # type: ignore[operator]
    if model.main_input_name == TOKENS:
        load_tokenizer(tokenizer_of or base, base).save_pretrained(folder)
    copy_image_processor(tokenizer_of or base, base, folder)
    for file in folder.rglob("*.safetensors"):  # transformers and peft leave them to their owner alone
        let_others_read(file)
