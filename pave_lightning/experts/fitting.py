"""The fit stage: one task in, one expert folder out."""

from __future__ import annotations

import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import nn

from pave_lightning.errors import PaveError
from pave_lightning.experts.loading import add_adapters, load_with_new_head, quiet_transformers
from pave_lightning.experts.task_expert import TaskExpert, freeze
from pave_lightning.experts.tokenizers import load_tokenizer, padding_id, padding_note
from pave_lightning.experts.trainers import build_trainer, honest_interrupts, quiet_lightning
from pave_lightning.files import let_others_read
from pave_lightning.recipe import Task
from pave_lightning.tasks.data_module import TaskDataModule
from pave_lightning.tasks.metrics import weak_experts
from pave_lightning.weights import Checkpoint
from pave_lightning.weights.architecture import backbone_of
from pave_lightning.weights.task_vectors import absent_children

log = logging.getLogger("pave_lightning")

DEFAULT_EPOCHS = 3


def fit_expert(
    task: Task,
    base: Path,
    *,
    seed: int,
    work_folder: Path,
    cache_folder: Path,
    logger: Logger | None = None,
) -> tuple[nn.Module, dict[str, float]]:
    """Fine-tune one expert and return it with the weights of its best checkpoint.

    Training goes on from the last checkpoint in ``work_folder`` where there is one.

    Args:
        task: the task, with its training and trainer options.
        base: folder of the base model.
        seed: seed of the head, the order of examples and dropout.
        work_folder: where checkpoints are kept while training.
        cache_folder: where tokenised data is kept.
        logger: receives the metrics while training.

    Returns:
        The trained model, in eval mode (a peft model where adapters were trained), and its headline validation metric.

    Raises:
        PaveError: training gave NaN or infinite weights.
        Interrupted: training was stopped from outside.
    """
    L.seed_everything(seed, workers=True, verbose=False)
    options = task.training
    model = load_with_new_head(base, task)
    freeze(model, options.freeze)
    if options.lora is not None:
        private = absent_children(Checkpoint(base, str(model.base_model_prefix)), backbone_of(model).state_dict())
        model = add_adapters(model, options.lora, frozen=options.freeze, private=private)
    expert = TaskExpert(model, task, seed=seed)
    tokenizer = load_tokenizer(base)
    if note := padding_note(tokenizer):
        log.info("%s: %s", task.name, note)
    data = TaskDataModule(
        task,
        tokenizer,
        seed=seed,
        cache_dir=cache_folder,
        batch_size=options.batch_size,
        max_length=options.max_length,
        padding=padding_id(model.config, tokenizer),
    )
    monitor = f"validation/{task.headline}"
    checkpoint = ModelCheckpoint(
        dirpath=work_folder, filename="best", monitor=monitor, mode="max", enable_version_counter=False
    )
    # Not save_last of the other: that one writes only in epochs that are the best so far.
    each_epoch = ModelCheckpoint(dirpath=work_folder, filename="last", enable_version_counter=False)
    callbacks: list[Callback] = [checkpoint, each_epoch]
    if options.early_stopping is not None:
        callbacks.append(EarlyStopping(monitor, mode="max", **options.early_stopping.model_dump()))
    if logger is not None:
        callbacks.append(LearningRateMonitor("step"))
    settings: dict[str, Any] = {"max_epochs": DEFAULT_EPOCHS, "log_every_n_steps": 10, **task.trainer}
    last = work_folder / "last.ckpt"
    if last.is_file() and not zipfile.is_zipfile(last):
        log.warning("%s: the last checkpoint is damaged; training starts anew", task.name)
        shutil.rmtree(work_folder)
    with quiet_lightning(), honest_interrupts():
        trainer = build_trainer(
            settings,
            root=work_folder,
            logger=logger,
            callbacks=callbacks,
            enable_checkpointing=True,
            reload_dataloaders_every_n_epochs=0,
        )
        if last.is_file():
            log.info("%s: training goes on from its last checkpoint", task.name)
        trainer.fit(expert, datamodule=data, ckpt_path=last if last.is_file() else None)
    best = Path(checkpoint.best_model_path)
    if not best.is_file():
        raise PaveError(
            f"task '{task.name}': no validation pass ended, so there is no best checkpoint; the trainer needs at least "
            "one epoch and a validation pass in it (max_epochs, limit_val_batches, check_val_every_n_epoch)"
        )
    expert.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])
    score = checkpoint.best_model_score
    metrics = {monitor: float(score)} if score is not None else {}
    broken = [name for name, value in expert.model.named_parameters() if not bool(torch.isfinite(value).all())]
    if broken:
        raise PaveError(
            f"task '{task.name}': training gave NaN or infinite weights ({len(broken)} tensors, first {broken[0]}); "
            "lower the learning rates or use a safer precision"
        )
    if weak := weak_experts({} if score is None else {task.name: float(score)}):
        log.warning("%s; try other learning rates or more rows", weak)
    return expert.model.eval(), metrics


def save_expert(model: nn.Module, base: Path, folder: Path, tokenizer_of: Path | None = None) -> None:
    """Write an expert as a Hugging Face folder with its tokenizer; adapters stand beside the weights they merge into.

    Args:
        model: a sequence-classification model, or a peft model around one.
        base: folder of the base model, whose tokenizer it is.
        folder: an existing folder.
        tokenizer_of: folder whose tokenizer it is instead, where it has one of its own.
    """
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / "adapter")  # type: ignore[operator]
        model = model.merge_and_unload()  # type: ignore[operator]
    with quiet_transformers():
        model.save_pretrained(folder)  # type: ignore[operator]
    load_tokenizer(tokenizer_of or base, base).save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):  # transformers and peft leave them to their owner alone
        let_others_read(file)
