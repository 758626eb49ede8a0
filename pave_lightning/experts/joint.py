"""One model fine-tuned on all tasks together: what merging would come to if all data were in one place."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import Logger
from peft import PeftModel
from torch import nn

from pave_lightning.experts.fitting import Prepared, task_data, trained, validation_constants
from pave_lightning.experts.joint_schedule import common_freeze, joint_settings
from pave_lightning.experts.loading import load_with_new_head
from pave_lightning.experts.new_adapters import add_adapters
from pave_lightning.experts.task_expert import TaskExpert, freeze
from pave_lightning.tasks.joint_data import JointDataModule
from pave_lightning.tasks.task import Task, auto_models
from pave_lightning.tasks.turns import Turns
from pave_lightning.weights import Architecture
from pave_lightning.weights.backbones import backbone_of, lies_in, unchanged_parts


def fit_joint(
    tasks: Sequence[Task],
    base: Path,
    turns: Turns,
    *,
    work_folder: Path,
    cache_folder: Path,
    logger: Logger | None = None,
) -> tuple[list[nn.Module], dict[str, float]]:
    """Fine-tune one backbone with a head for each task on all tasks together.

    Heads start as those of the tasks' experts do, and each task's batches are those of its expert, in the same order.
    The best checkpoint is that with the best mean of the primary metrics.

    Args:
        tasks: the tasks, with training and trainer options that agree, see `disagreements`.
        base: folder of the base model.
        turns: which task each step is of; its seed is that of heads, examples and dropout.
        work_folder: where checkpoints are kept while training.
        cache_folder: where tokenised data is kept.
        logger: receives the metrics while training.

    Returns:
        A model for each task, in eval mode, of which what they share is the same module, adapters merged into it; and
        the validation metrics: the mean of the primary ones, and what a constant answer scores in each task's.

    Raises:
        PaveError: as `trained` says.
        Interrupted: training was stopped from outside.
    """

    def prepare() -> Prepared:
        models = _models(tasks, base, turns.seed)
        pairs = zip(tasks, models, strict=True)
        modules = [task_data(task, base, _inner(model), turns.seed, cache_folder) for task, model in pairs]
        processors = [module.processor for module in modules]
        expert = TaskExpert(models, tasks, seed=turns.seed, turns=turns, processors=processors)
        data = JointDataModule(modules, turns)
        return Prepared(expert, data, joint_settings(tasks[0]), tasks[0].training.early_stopping)

    expert, score = trained(prepare, work_folder, logger=logger)
    metrics = {expert.monitor: score}
    for task in tasks:
        constant = validation_constants(task, base, turns.seed, cache_folder)
        metrics |= {f"validation/{task.name}/{name}/constant": value for name, value in constant.items()}
    return _without_adapters(expert.models, _Shared.of(tasks, base)), metrics


class _Shared:
    """What of a backbone the models of several tasks share.

    All that the base has, but for submodules that not every model has: those start anew, or as the base has them, for
    each task, and are kept with its head.
    """

    def __init__(self, children: Collection[str]) -> None:
        self._children = frozenset(children)

    @classmethod
    def of(cls, tasks: Sequence[Task], base: Path) -> _Shared:
        """What the models of these tasks share of a base."""
        architecture = Architecture.of_folder(base, *auto_models(tasks))
        names = architecture.stored_names
        stored = architecture.base_checkpoint(base).backbone
        return cls({names.get(name, name).partition(".")[0] for name in stored})

    def private(self, model: nn.Module) -> set[str]:
        """Direct submodules with weights of a model's backbone that are its own."""
        children = backbone_of(_inner(model)).named_children()
        return {name for name, child in children if any(True for _ in child.parameters())} - self._children

    def share(self, models: Sequence[nn.Module]) -> None:
        """Give all models what the first of them that has it has of what they share."""
        found: dict[str, Any] = {}
        for backbone in (backbone_of(_inner(model)) for model in models):
            own = [*backbone.named_children(), *backbone.named_parameters(recurse=False)]
            for name, part in (*own, *backbone.named_buffers(recurse=False)):
                if name in self._children:
                    setattr(backbone, name, found.setdefault(name, part))


def _models(tasks: Sequence[Task], base: Path, seed: int) -> list[nn.Module]:
    """The base with a new head for each task, on one backbone."""
    shared, named, lora = _Shared.of(tasks, base), common_freeze(tasks), tasks[0].training.lora
    models: list[nn.Module] = []
    for task in tasks:
        L.seed_everything(seed, workers=True, verbose=False)
        model = load_with_new_head(base, task)
        private = shared.private(model)
        frozen = [*named, *sorted(unchanged_parts(model, task.auto_model))]
        freeze(model, [name for name in task.training.freeze if lies_in(name, private)])
        if not models:
            freeze(model, [name for name in frozen if not lies_in(name, private)])
            if lora is not None:
                model = add_adapters(model, lora, task.peft_type, frozen=frozen, private=private)
        models.append(model)
        shared.share(models)
    return models


def _without_adapters(models: Sequence[nn.Module], shared: _Shared) -> list[nn.Module]:
    """The models with the adapters merged into what they share, in eval mode."""
    first, *others = models
    whole: nn.Module = first.merge_and_unload() if isinstance(first, PeftModel) else first
    found = [whole, *others]
    shared.share(found)
    return [model.eval() for model in found]


def _inner(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model
