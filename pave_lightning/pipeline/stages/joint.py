"""One model that is fine-tuned on all tasks together: a control that merged models are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from pave_lightning.errors import PaveError, counted, doing
from pave_lightning.experts.joint_schedule import JointSchedule, joint_schedule
from pave_lightning.merging.folders import MergeContext, write_facts, write_surroundings
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.results import Results, short_digest
from pave_lightning.pipeline.run_folder import Manifest
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.fit import metrics_logger, training_inputs, training_rows
from pave_lightning.recipe.schema import Recipe
from pave_lightning.system.processes import is_rank_zero
from pave_lightning.weights import Checkpoint, ShardWriter
from pave_lightning.weights.memory import freed_memory_returned

# Raised when the results change meaning, so that older ones are made anew.
FORMAT = 1


class JointStage(Stage):
    """One backbone with a head for each task, fine-tuned on all tasks in turns, with the steps of all experts.

    It leaves a folder as merged models are: ``load_merged(RUN/joint, task)``. Training that was broken off goes on from
    its last checkpoint, in ``training-joint``, which is no part of the result.
    """

    command = "joint"
    name = "joint"

    @classmethod
    def all(cls, results: Results) -> list[JointStage]:
        """The one of a recipe.

        Raises:
            PaveError: the recipe does not ask for it.
        """
        found = cls.asked(results)
        if not found:
            raise PaveError("the recipe has no joint training among its controls; set controls: [base, joint, experts]")
        return found

    @classmethod
    def asked(cls, results: Results) -> list[JointStage]:
        """The one of a recipe that has it among its controls."""
        return [cls(results)] if "joint" in results.recipe.controls else []

    @property
    def trainer(self) -> Mapping[str, Any]:
        """The tasks' options, which agree."""
        return self.results.recipe.tasks[0].trainer

    def schedule(self) -> JointSchedule:
        """How long it is trained."""
        return schedule_of(self.results.recipe, self.results.folder.data)

    def about(self) -> str:
        """How long it is trained, and on how many rows."""
        recipe, schedule = self.results.recipe, self.schedule()
        rows = sum(training_rows(task, recipe.seed, self.results.folder.data)[0] for task in recipe.tasks)
        told = f"{counted(rows, 'row')} of {counted(len(recipe.tasks), 'task')} together"
        most = "at most " * schedule.at_most
        return f"{told}, {most}{counted(schedule.epochs, 'epoch')}, {counted(schedule.steps, 'step')}"

    def depends_on(self) -> dict[str, Any]:
        """Base, data and options of all tasks' trainings, in their order."""
        recipe = self.results.recipe
        tasks = [{"task": task.name, **training_inputs(task)} for task in recipe.tasks]
        return {"format": FORMAT, "base": self.results.base_digest, "seed": recipe.seed, "tasks": tasks}

    def run(self, context: Context) -> None:
        """Fine-tune, and write the backbone with all heads."""
        from pave_lightning.experts.checkpoints import clear_away
        from pave_lightning.experts.joint import fit_joint

        training = context.folder.root / "training-joint"
        with doing("fine-tune one model on all tasks"):
            run = context.child(self.name, "fit", self._params())
            models, metrics = fit_joint(
                context.recipe.tasks,
                context.base_folder,
                self.schedule().turns,
                work_folder=training / short_digest(self.inputs()),
                cache_folder=context.folder.data,
                logger=metrics_logger(context, run, self),
            )
            if is_rank_zero():
                with context.writing(self) as writer:
                    tasks = [task.name for task in context.recipe.tasks]
                    write_joint(writer.path, dict(zip(tasks, models, strict=True)), context)
                    writer.result.update(metrics=metrics)
                clear_away(training)

    def record(self, context: Context, found: Manifest) -> None:
        """Its metrics, in a run of its own."""
        context.record("fit", self.name, found.result, self._params())

    def _params(self) -> dict[str, Any]:
        recipe = self.results.recipe
        return {"tasks": ", ".join(task.name for task in recipe.tasks), "seed": recipe.seed}


def schedule_of(recipe: Recipe, cache: Path) -> JointSchedule:
    """How long a recipe's model of all tasks is trained.

    Args:
        recipe: the recipe.
        cache: where copies of the rows are.

    Raises:
        PaveError: the rows cannot be read, or Lightning refuses the options for data of this size.
    """
    rows = {task.name: training_rows(task, recipe.seed, cache) for task in recipe.tasks}
    return joint_schedule(recipe.tasks, rows, recipe.seed)


@freed_memory_returned()
def write_joint(folder: Path, models: Mapping[str, nn.Module], context: Context) -> None:
    """Write a backbone with a head for each task as merged models are written.

    Args:
        folder: an existing, empty folder.
        models: by task, models of which what they share is the same module.
        context: the base, and what it is called.
    """
    from pave_lightning.experts.fitting import save_expert

    for task, model in models.items():
        with TemporaryDirectory(dir=folder) as alone:
            save_expert(model, context.base_folder, Path(alone))
            whole = context.architecture.checkpoint(Path(alone))
            if not (folder / "config.json").exists():
                _write_backbone(folder, context.base, whole)
            of_task = MergeContext(
                context.results.base_reference, context.base, {task: whole}, context.architecture, {}
            )
            write_surroundings(folder, of_task)
    write_facts(
        folder,
        {"method": "joint", "form": "static", "base": context.results.base_reference, "tasks": list(models)},
    )


def _write_backbone(folder: Path, base: Checkpoint, trained: Checkpoint) -> None:
    """Write what the base has of the backbone, as it was trained."""
    writer = ShardWriter(folder)
    for name in base:
        writer.add(name, (trained if name in trained.backbone else base).tensor(name))
    writer.close()
