"""What the layers of a task's expert see: second moments of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pave_lightning.errors import counted, doing
from pave_lightning.pipeline.context import Context, shared
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.run_folder import Manifest
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.align import AlignStage, expert_stage
from pave_lightning.pipeline.stages.fit import FitStage
from pave_lightning.statistics import TaskStatistics
from pave_lightning.statistics.gradients import EXPERT_DIGEST
from pave_lightning.system.processes import is_rank_zero
from pave_lightning.tasks.data import split_fingerprint
from pave_lightning.tasks.task import Task
from pave_lightning.weights import model_digest

FORMAT = 3
STATISTICS_FILE = "moments.safetensors"


class CaptureStage(Stage):
    """What a task's expert sees of its own training split, or of random tokens."""

    command = "capture"
    task: Task

    def __init__(self, results: Results, task: Task) -> None:
        super().__init__(results)
        self.task = task

    @classmethod
    def all(cls, results: Results) -> list[CaptureStage]:
        """One a task."""
        return [cls(results, task) for task in results.recipe.tasks]

    @classmethod
    def asked(cls, results: Results) -> list[CaptureStage]:
        """None that nothing needs, but all of a recipe that merges nothing.

        Such a recipe may be meant for purifying and diagnosing, which are commands of their own.
        """
        return [] if results.recipe.merge else cls.all(results)

    @property
    def name(self) -> str:
        """``statistics/TASK``."""
        return self.results.name_for(
            "statistics/", self.task, lambda: {"fit": self.expert.origin(), "capture": self._options()}
        )

    @property
    def expert(self) -> FitStage | AlignStage:
        """The expert that is looked at."""
        return expert_stage(self.results, self.task)

    @property
    def made_by(self) -> str:
        """The command for this task alone."""
        return f"pave capture --task {self.task.name}"

    @property
    def trainer(self) -> Mapping[str, Any]:
        """The task's own options."""
        return self.task.trainer

    def about(self) -> str:
        """How many examples, and of what."""
        capture = self.results.recipe.capture
        shown, of = ("training example", "") if capture.source == "train" else ("sequence", " of random tokens")
        return f"{counted(capture.examples, shown)}{of}"

    def needs(self) -> list[Stage]:
        """The task's expert."""
        return [self.expert]

    def depends_on(self) -> dict[str, Any]:
        """The expert, what it is shown, and what is kept."""
        return {"expert": self.expert.digest(), **self._options()}

    def run(self, context: Context) -> None:
        """Show the expert its examples and keep the second moments of its layers' inputs."""
        from pave_lightning.callbacks import PaveCallback
        from pave_lightning.experts.loading import load_expert
        from pave_lightning.experts.task_expert import TaskExpert
        from pave_lightning.experts.trainer_options import machine_options
        from pave_lightning.experts.trainers import build_trainer, honest_interrupts, quiet_lightning
        from pave_lightning.pipeline.task_data import CaptureData, data_module
        from pave_lightning.tasks.stand_ins import WEIGHT
        from pave_lightning.weights.backbones import lies_in, name_prefix

        options, expert = context.recipe.capture, self.expert.checkpoint()
        with doing(f"capture {self.task.name}"):
            module = TaskExpert(load_expert(expert, self.task, context.base_folder), self.task)
            callback = PaveCallback(
                backbone=f"model.{name_prefix(module.model)}".rstrip("."),
                mask=self.task.mask,
                moments=options.moments,
                rows=options.rows,
                convolutions=options.convolutions,
                norms=options.norms,
                seed=context.recipe.seed,
                weight_key=WEIGHT,
                metadata={**self._origin(), EXPERT_DIGEST: model_digest(expert)},
            )
            with quiet_lightning(), honest_interrupts():
                trainer = build_trainer(
                    machine_options(self.task.trainer),
                    root=context.folder.root,
                    callbacks=[callback],
                    precision=options.precision,
                )
                shown = CaptureData(data_module(context, self.task, options.batch_size), options, context.recipe.seed)
                trainer.validate(module, datamodule=shown, verbose=False)
            found = callback.statistics
            if is_rank_zero():
                with context.writing(self) as writer:
                    found.save(writer.path / STATISTICS_FILE)
                    facts = {"examples": found.examples, "layers": len(found.layers())}
                    frozen = context.architecture.frozen  # whose layers no task changes
                    left = [name for name in callback.unreached if not lies_in(name, frozen)]
                    writer.result.update(facts, unreached={name: found.why_unreached(name) for name in left})

    def record(self, context: Context, found: Manifest) -> None:
        """How much was captured, in the run of the expert."""
        context.record("capture", self.expert.run_name, found.result, self.expert.params())

    def load(self) -> TaskStatistics:
        """What was captured, read lazily.

        Raises:
            PaveError: it is not that of this very expert.
        """
        return TaskStatistics.load(self.results.path(self) / STATISTICS_FILE, of=self._origin())

    def _origin(self) -> dict[str, str]:
        """What says in a task's statistics whose they are."""
        return {"task": self.task.name, "expert": self.expert.digest()}

    def _options(self) -> dict[str, Any]:
        task, recipe = self.task, self.results.recipe
        from_data = recipe.capture.source == "train"
        return {
            "format": FORMAT,
            "data": split_fingerprint(task, "train") if from_data else None,
            "rows": [task.examples.train if from_data else None, recipe.seed],
            "shown": task.shown_by,
            # Without norms it is what was captured before that key was there.
            "capture": recipe.capture.model_dump(
                exclude={"gradient_examples", *([] if recipe.capture.norms else ["norms"])}
            ),
        }


@shared
def statistics(context: Context) -> dict[str, TaskStatistics]:
    """What each task's expert saw, read lazily."""
    return {stage.task.name: stage.load() for stage in CaptureStage.all(context.results)}


def statistics_digests(results: Results) -> dict[str, str]:
    """What identifies what was captured of each task.

    Raises:
        PaveError: what was captured of a task is missing or stale.
    """
    return {stage.task.name: results.finished(stage).digest() for stage in CaptureStage.all(results)}


def shown_examples(results: Results, task: Task) -> dict[str, Any]:
    """What the unlabelled examples of a task depend on."""
    return {
        "data": split_fingerprint(task, "train"),
        "rows": [task.examples.train, results.recipe.seed],
        "shown": task.shown_by,
    }
