"""A task's expert: fine-tuned here, or a checkpoint that the recipe names."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pave_lightning.errors import PaveError, counted, doing, listed
from pave_lightning.experts.schedule import training_schedule
from pave_lightning.experts.trainer_options import process_count
from pave_lightning.pipeline.bases import existing_folder, folder_of_base
from pave_lightning.pipeline.context import Context, shared
from pave_lightning.pipeline.results import Results, short_digest
from pave_lightning.pipeline.run_folder import Manifest
from pave_lightning.pipeline.stage import Stage
from pave_lightning.recipe.schema import Recipe
from pave_lightning.system.processes import is_rank_zero
from pave_lightning.tasks.constants import constant_answer
from pave_lightning.tasks.data import SPLITS, load_split, split_fingerprint
from pave_lightning.tasks.encoded import EncodedRows
from pave_lightning.tasks.task import Task
from pave_lightning.weights import model_digest
from pave_lightning.weights.adapters import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS
from pave_lightning.weights.tokenizer_files import has_tokenizer

if TYPE_CHECKING:
    from pave_lightning.tracking.logger import TrackingLogger

log = logging.getLogger("pave_lightning")

# Raised when the results change meaning, so that older ones are made anew.
FORMAT = 1
# Options of the trainer that change neither the order of examples nor the arithmetic that is asked for.
HARMLESS_OPTIONS = ("enable_progress_bar", "log_every_n_steps", "accelerator", "profiler", "detect_anomaly")


class FitStage(Stage):
    """A task's expert.

    Training that was broken off goes on from its last checkpoint, in ``training/TASK``, which is no part of the result.
    """

    command = "fit"
    task: Task

    def __init__(self, results: Results, task: Task) -> None:
        super().__init__(results)
        self.task = task

    @classmethod
    def all(cls, results: Results) -> list[FitStage]:
        """One a task. What exists comes first: what is wrong with its values is told before anything is trained."""
        return [cls(results, task) for task in sorted(results.recipe.tasks, key=lambda task: task.expert is None)]

    @property
    def name(self) -> str:
        """``experts/TASK``."""
        return self.results.name_for("experts/", self.task, self.depends_on)

    @property
    def made_by(self) -> str:
        """The command for this task alone."""
        return f"pave fit --task {self.task.name}"

    @property
    def trainer(self) -> Mapping[str, Any] | None:
        """The task's own options, where it is trained."""
        return self.task.trainer if self.task.expert is None else None

    def about(self) -> str:
        """How long it is trained, and what always the same answer scores on the validation split."""
        recipe, task, rows = self.results.recipe, self.task, self.results.folder.data
        constant = constant_answer(encoded_rows(recipe, task, rows), "validation")[task.primary_metric]
        told = f"; always the same answer: {task.primary_metric} {constant:.3f}"
        if task.expert is not None:
            return f"from {task.expert.from_}{told}"
        used, validation = training_rows(task, recipe.seed, rows)
        schedule = training_schedule(task, used, validation, process_count(task.trainer))
        epochs, steps = counted(schedule.epochs, "epoch"), counted(schedule.steps, "step")
        most = "at most " * schedule.at_most
        return f"{counted(used, 'row')}, {most}{epochs}, {steps} of {schedule.batch}{told}"

    def depends_on(self) -> dict[str, Any]:
        """Base, data and options of the training, or the weights that are named."""
        task, recipe = self.task, self.results.recipe
        inputs: dict[str, Any] = {"format": FORMAT, "base": self.results.base_digest}
        if task.expert is not None:
            folder = existing_folder(task)
            weights = model_digest(folder)
            # An expert without tokenizer reads with the base's, which so becomes a part of it.
            weights = weights if has_tokenizer(folder) else f"{weights}+{self.results.base_digest}"
            return {**inputs, "from": str(folder), "weights": weights, "outputs": task.output_size}
        return {**inputs, "seed": recipe.seed, **training_inputs(task)}

    def run(self, context: Context) -> None:
        """Fine-tune the expert, or take in the checkpoint."""
        if self.task.expert is None:
            self._fit(context)
        else:
            self._take_in(context)

    def record(self, context: Context, found: Manifest) -> None:
        """Its metrics, in the run of the expert."""
        context.record("fit", self.run_name, found.result, self.params())

    @property
    def run_name(self) -> str:
        """The name of the expert's run in MLflow."""
        return f"expert:{self.task.name}"

    def params(self) -> dict[str, Any]:
        """What MLflow notes of the expert."""
        described = self.task.model_dump(mode="json", by_alias=True, exclude={"name"})
        seed = {"seed": self.results.recipe.seed} if self.task.expert is None else {}
        return {"task": described, **seed}

    def origin(self) -> dict[str, Any]:
        """What names of what is made of the expert depend on."""
        return self.inputs()

    def checkpoint(self) -> Path:
        """The folder of the finished expert.

        Raises:
            PaveError: it is missing or stale.
        """
        return self.results.place(self)

    def digest(self) -> str:
        """What identifies the finished expert: its own files, or those of the folder that it was taken in from.

        Raises:
            PaveError: it is missing or stale.
        """
        found = self.results.finished(self)
        return str(found.inputs["weights"]) if "folder" in found.result else found.digest()

    def _fit(self, context: Context) -> None:
        from pave_lightning.experts.checkpoints import clear_away
        from pave_lightning.experts.fitting import fit_expert, save_expert

        training = context.folder.root / "training" / self.task.name
        work_folder = training / short_digest(self.inputs())
        with doing(f"fit {self.task.name}"):
            run = context.child(self.run_name, "fit", self.params())
            model, metrics = fit_expert(
                self.task,
                context.base_folder,
                seed=context.recipe.seed,
                work_folder=work_folder,
                cache_folder=context.folder.data,
                logger=metrics_logger(context, run, self),
            )
            if is_rank_zero():
                with context.writing(self) as writer:
                    save_expert(model, context.base_folder, writer.path, work_folder=work_folder)
                    writer.result.update(metrics=metrics)
                clear_away(training)

    def _take_in(self, context: Context) -> None:
        """Check a checkpoint that exists; merge an adapter into the base, or put a part of it into its place.

        Otherwise it is only noted where it is.
        """
        from pave_lightning.experts.adapters import load_adapter
        from pave_lightning.experts.fitting import save_expert
        from pave_lightning.experts.loading import load_expert
        from pave_lightning.experts.parts import is_part, load_part
        from pave_lightning.experts.vocabulary import expert_notes

        with doing(f"take in the expert of {self.task.name}"):
            folder = existing_folder(self.task)
            _check_base(context)
            aligned = context.recipe.vocabulary != "error"
            if self.task.reads_tokens:
                for note in expert_notes(self.task.name, folder, context.base, context.architecture, aligned=aligned):
                    log.info("  %s", note)
            with context.writing(self) as writer:
                if (folder / ADAPTER_CONFIG).is_file():
                    adapted = load_adapter(context.base_folder, folder, self.task)
                    save_expert(adapted, context.base_folder, writer.path, tokenizer_of=folder)
                    (writer.path / ADAPTER_FOLDER).mkdir()
                    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                        shutil.copyfile(folder / name, writer.path / ADAPTER_FOLDER / name)
                elif is_part(folder, context.base_folder, self.task.auto_model):
                    whole = load_part(self.task, folder, context.base_folder)
                    save_expert(whole, context.base_folder, writer.path, tokenizer_of=folder)
                else:
                    load_expert(folder, self.task, context.base_folder)
                    writer.result["folder"] = str(folder.resolve())


def metrics_logger(context: Context, run: str, stage: Stage) -> TrackingLogger | None:
    """Takes a trainer's metrics, besides those that the run has already from a training that was broken off."""
    if context.tracker is None or not run:
        return None
    from pave_lightning.tracking.logger import TrackingLogger

    logged = context.tracker.continue_series(run, short_digest(stage.inputs()))
    return TrackingLogger(context.tracker, run, logged=logged)


def training_inputs(task: Task) -> dict[str, Any]:
    """What a training on a task depends on, besides base and seed, as plain JSON values."""
    return {
        "data": [split_fingerprint(task, "train"), split_fingerprint(task, "validation")],
        "examples": [task.examples.train, task.examples.validation],
        "shown": task.shown_by,
        "labelled": task.labelled_by,
        "primary_metric": task.primary_metric,
        # How forward passes are run changes the rounding at most.
        "training": task.training.model_dump(exclude={"activation_checkpointing", "compile"}),
        "trainer": {key: value for key, value in task.trainer.items() if key not in HARMLESS_OPTIONS},
    }


def encoded_rows(recipe: Recipe, task: Task, cache: Path) -> EncodedRows:
    """The rows of a task as its expert is given them, before there is one.

    Args:
        recipe: names the base, whose tokenizer experts have that are still to be trained.
        task: the task.
        cache: where copies of the rows are.

    Raises:
        PaveError: there is no base or no such expert, or the tokenizer cannot be used.
    """
    return EncodedRows(task, processor_of(recipe, task), seed=recipe.seed, cache_dir=cache)


def processor_of(recipe: Recipe, task: Task) -> Any:
    """What the rows of a task are encoded with: the base's tokenizer, or that of the expert that is named.

    Args:
        recipe: names the base.
        task: the task.

    Raises:
        PaveError: there is no base or no such expert, or the tokenizer cannot be read.
    """
    base = folder_of_base(recipe)
    return task.load_processor(base if task.expert is None else existing_folder(task), base)


def training_rows(task: Task, seed: int, cache: Path) -> tuple[int, int]:
    """How many training and validation rows of a task are used.

    Args:
        task: the task.
        seed: chooses the rows where a part is asked for.
        cache: where copies of the rows are.
    """
    train, validation = (load_split(task, split, seed=seed, cache_dir=cache) for split in SPLITS[:2])
    return len(train), len(validation)


def own_folders(results: Results) -> dict[str, Path]:
    """The folder of each task's finished expert with its own tokens, in the order of the tasks.

    Raises:
        PaveError: an expert is missing or stale.
    """
    return {task.name: FitStage(results, task).checkpoint() for task in results.recipe.tasks}


def own_digests(results: Results) -> dict[str, str]:
    """What identifies each task's expert with its own tokens, in the order of the tasks.

    Raises:
        PaveError: an expert is missing or stale.
    """
    return {task.name: FitStage(results, task).digest() for task in results.recipe.tasks}


@shared
def _broken_in_base(context: Context) -> list[str]:
    """Tensors of the base that hold values which are not finite in float32."""
    return context.base.non_finite()


def _check_base(context: Context) -> None:
    broken = _broken_in_base(context)
    if broken:
        raise PaveError(
            f"the base {context.base_folder}: {listed(broken, 3)} hold NaN, infinity, or values too "
            "large for float32; fetch it again"
        )
