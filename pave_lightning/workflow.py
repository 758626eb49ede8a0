"""The stages in order, each resumable: fit, capture, purify, merge, evaluate, report."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pave_lightning.callbacks import PaveCallback
from pave_lightning.evaluation import (
    Candidate,
    CheckpointCandidate,
    Evaluator,
    ExpertsCandidate,
    ModulatedCandidate,
    SuiteData,
)
from pave_lightning.evaluation.scale_search import ScaleSearcher
from pave_lightning.experts.fitting import fit_expert, save_expert
from pave_lightning.experts.loading import ADAPTER_CONFIG, load_adapter, load_expert, load_tokenizer
from pave_lightning.experts.task_expert import TaskExpert
from pave_lightning.experts.trainers import (
    build_trainer,
    honest_interrupts,
    is_distributed,
    machine_options,
    quiet_lightning,
)
from pave_lightning.launching import Launcher, is_rank_zero
from pave_lightning.merging import Modulator, make_method, merge
from pave_lightning.merging.folders import MergeContext, write_merged
from pave_lightning.purification import PurifiedTaskVectors, StoredPurification, write_purified
from pave_lightning.recipe import MergeStep, Purify, Recipe, ScaleSearch, Task, Vectors
from pave_lightning.run_folder import Manifest, RunFolder, StageWriter
from pave_lightning.stages import Stage, Stages, existing_folder, expert_digest, short_digest
from pave_lightning.statistics import TaskStatistics
from pave_lightning.tasks.data_module import TaskDataModule
from pave_lightning.tracking import Tracker
from pave_lightning.tracking_logger import TrackingLogger
from pave_lightning.weights import (
    Architecture,
    Checkpoint,
    ExpertTaskVectors,
    TaskVectors,
    locate_model,
)

log = logging.getLogger("pave_lightning")

STATISTICS_FILE = "moments.safetensors"


class Workflow:
    """The stages of one recipe. Each looks first whether its result is there and was made from the same inputs.

    Args:
        recipe: what is to be done.
        folder: where results are kept.
        tracker: the MLflow record; None in processes that are not rank zero.
        launcher: starts a stage in processes of its own where its trainer is distributed; None inside such a process.
    """

    def __init__(
        self, recipe: Recipe, folder: RunFolder, tracker: Tracker | None = None, launcher: Launcher | None = None
    ) -> None:
        self.recipe, self.folder, self.tracker, self.launcher = recipe, folder, tracker, launcher
        self.stages = Stages(recipe, folder)
        self.base_folder = locate_model(recipe.base, role="base")

    def run(self) -> None:
        """Do everything the recipe asks for that is not done yet."""
        for task in self.recipe.tasks:
            self.fit(task)
        for task in self.recipe.tasks:
            self.capture(task)
        for step, vectors in self.stages.merges():
            self.merge(step, vectors)
        self.evaluate()

    # ---- fit -------------------------------------------------------------------------------------------------------

    def fit(self, task: Task) -> None:
        """Fine-tune a task's expert, or take in the checkpoint that the recipe names."""
        stage = self.stages.expert(task).begun()
        if self.stages.current(stage) is not None:
            return self._already(stage)
        if task.expert is not None:
            return self._take_in(task, stage)
        if self._elsewhere("fit", task, stage):
            return None
        training = self.folder.root / "training" / task.name
        with self._doing(f"fit {task.name}"):
            run = self._child(f"expert:{task.name}", "fit", {"task": _described(task), "seed": self.recipe.seed})
            logger = TrackingLogger(self.tracker, run) if self.tracker is not None and run else None
            model, metrics = fit_expert(
                task,
                self.base_folder,
                seed=self.recipe.seed,
                work_folder=training / short_digest(stage.inputs()),
                cache_folder=self._cache,
                logger=logger,
            )
            if is_rank_zero():
                with self._writing(stage) as writer:
                    save_expert(model, self.base_folder, writer.path)
                    writer.result.update(metrics=metrics)
                shutil.rmtree(training, ignore_errors=True)
                self._log(run, metrics)
                self._end(run)
        return None

    def _take_in(self, task: Task, stage: Stage) -> None:
        """Check a checkpoint that exists; merge an adapter into the base; otherwise only note where it is."""
        with self._doing(f"take in the expert of {task.name}"):
            folder = existing_folder(task)
            with self._writing(stage) as writer:
                if (folder / ADAPTER_CONFIG).is_file():
                    save_expert(load_adapter(self.base_folder, folder, task), self.base_folder, writer.path)
                else:
                    load_expert(folder, task)
                    writer.result["folder"] = str(folder.resolve())
            self._end(self._child(f"expert:{task.name}", "fit", {"task": _described(task)}))

    # ---- capture ---------------------------------------------------------------------------------------------------

    def capture(self, task: Task) -> None:
        """Show the expert examples of its own training split and keep the second moments of its layers' inputs."""
        stage = self.stages.statistics(task).begun()
        if self.stages.current(stage) is not None:
            return self._already(stage)
        if self._elsewhere("capture", task, stage):
            return None
        options = self.recipe.capture
        with self._doing(f"capture {task.name}"):
            module = TaskExpert(load_expert(self._expert_folder(task.name), task), task)
            data = self._data(task, options.batch_size)
            callback = PaveCallback(
                backbone=f"model.{module.model.base_model_prefix}",
                moments=options.moments,
                metadata={"task": task.name, "expert": expert_digest(self.stages.finished(self.stages.expert(task)))},
            )
            with quiet_lightning(), honest_interrupts():
                trainer = build_trainer(
                    machine_options(task.trainer),
                    root=self.folder.root,
                    callbacks=[callback],
                    precision=options.precision,
                )
                shown = _CaptureData(data, options.examples, self.recipe.seed)
                trainer.validate(module, datamodule=shown, verbose=False)
            statistics = callback.statistics
            if is_rank_zero():
                with self._writing(stage) as writer:
                    statistics.save(writer.path / STATISTICS_FILE)
                    facts = {"examples": statistics.examples, "layers": len(statistics.layers())}
                    writer.result.update(facts, unreached=list(callback.unreached))
                run = self._child(f"expert:{task.name}", "fit", {})
                self._log(run, {f"capture/{name}": float(value) for name, value in facts.items()})
                self._end(run)
        return None

    # ---- purify ----------------------------------------------------------------------------------------------------

    def purify(self, options: Purify) -> Manifest:
        """Purify the experts' linear weights once for every merge step that asks for the same."""
        stage = self.stages.purified(options)
        found = self.stages.current(stage)
        if found is None:
            with self._doing(f"purify (rho {options.rho:g})"), self._writing(stage) as writer:
                statistics = {
                    task.name: TaskStatistics.load(
                        self.folder.path(self.stages.statistics(task).name) / STATISTICS_FILE
                    )
                    for task in self.recipe.tasks
                }
                vectors = PurifiedTaskVectors(self.plain, statistics, options)
                write_purified(vectors, writer.path)
                writer.result["ranks"] = [[r.task, r.layer, r.rank, r.full] for r in vectors.ranks.values()]
                writer.result["untouched"] = [[*key, reason] for key, reason in vectors.untouched.items()]
            found = self.stages.finished(stage)
        return found

    # ---- merge -----------------------------------------------------------------------------------------------------

    def merge(self, step: MergeStep, vectors: Vectors) -> None:
        """Merge all experts by one rule, on plain or on purified task vectors."""
        stage = self.stages.merged(step, vectors)
        if self.stages.current(stage) is not None:
            return self._already(stage)
        source = self.plain if vectors == "plain" else self._purified(step.purify)
        method = make_method(step.method, step.options)
        run = self._child(f"merge:{step.name}:{vectors}", "merge", merge_params(step, vectors))
        with self._doing(f"merge {step.name} ({vectors})"), self._writing(stage) as writer:
            scale, merged = step.scale if step.scale is not None else method.default_scale, None
            facts: dict[str, Any] = {"vectors": vectors, "options": method.options.model_dump()}
            if isinstance(scale, ScaleSearch):
                merged = merge(method, source).vectors
                found = self._scale_searcher.best(source, merged, scale)
                scale, facts["search"] = float(found["scale"]), found["tried"]
            facts["scale"] = scale
            context = MergeContext(self.recipe.base, self._base, self._experts, self._architecture, facts)
            write_merged(writer.path, method, source, scale, context, merged=merged)
            writer.result.update(facts, form=method.form)
        if scale is not None:
            self._log(run, {"scale": float(scale)})
        self._end(run)
        return None

    def _purified(self, options: Purify) -> TaskVectors:
        self.purify(options)
        folder = self.folder.path(self.stages.purified(options).name)
        prefix = self._architecture.prefix
        tasks = [name for name in self.plain.tasks if (folder / name).is_dir()]
        return StoredPurification(self.plain, {name: Checkpoint(folder / name, prefix) for name in tasks})

    @cached_property
    def _scale_searcher(self) -> ScaleSearcher:
        return ScaleSearcher(
            self.recipe.tasks,
            self._evaluator,
            ExpertsCandidate(self._experts),
            data=lambda task: self._data(task, self.recipe.evaluate.batch_size),
            options={**machine_options(self.recipe.trainer), "devices": 1, "num_nodes": 1, "strategy": "auto"},
            precision=self.recipe.evaluate.precision,
            root=self.folder.root,
        )

    # ---- evaluate --------------------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Score base, experts and every merged model on all test splits."""
        waiting = [stage.begun() for stage in self.stages.scores() if self.stages.current(stage) is None]
        if not waiting or self._elsewhere("evaluate", None, *waiting):
            return
        data = SuiteData([self._data(t, self.recipe.evaluate.batch_size) for t in self.recipe.tasks], "test")
        for stage in waiting:
            name = stage.name.partition("/")[2]
            with self._doing(f"evaluate {name}"):
                with quiet_lightning():
                    trainer = build_trainer(
                        machine_options(self.recipe.trainer),
                        root=self.folder.root,
                        precision=self.recipe.evaluate.precision,
                    )
                scores = self._evaluator.score(self._candidate(name), data, trainer)
                if is_rank_zero():
                    with self._writing(stage) as writer:
                        writer.result["scores"] = {
                            task: {"metrics": score.metrics, "examples": score.examples}
                            for task, score in scores.items()
                        }

    def _candidate(self, name: str) -> Candidate:
        if name == "base":
            return CheckpointCandidate(self._base)
        if name == "experts":
            return ExpertsCandidate(self._experts)
        folder = self.folder.path(f"merged/{name}")
        checkpoint = Checkpoint(folder, self._architecture.prefix)
        if not (folder / "modulators").is_dir():
            return CheckpointCandidate(checkpoint)
        modulators = {t.name: Modulator(folder / "modulators" / f"{t.name}.safetensors") for t in self.recipe.tasks}
        return ModulatedCandidate(self._base, checkpoint, modulators)

    # ---- what stages share -----------------------------------------------------------------------------------------

    @cached_property
    def _architecture(self) -> Architecture:
        return Architecture.of_folder(self._expert_folder(self.recipe.tasks[0].name))

    @cached_property
    def _base(self) -> Checkpoint:
        return Checkpoint(self.base_folder, self._architecture.prefix)

    @cached_property
    def _experts(self) -> dict[str, Checkpoint]:
        prefix = self._architecture.prefix
        return {task.name: Checkpoint(self._expert_folder(task.name), prefix) for task in self.recipe.tasks}

    @cached_property
    def plain(self) -> TaskVectors:
        """The plain task vectors of all finished experts."""
        self.stages.expert_digests()
        return ExpertTaskVectors(self._base, self._experts, self._architecture)

    @cached_property
    def _evaluator(self) -> Evaluator:
        with torch.random.fork_rng():
            return Evaluator(self.recipe.tasks, self._experts, self._base)

    @property
    def _cache(self) -> Path:
        return self.folder.root / "data"

    def _data(self, task: Task, batch_size: int) -> TaskDataModule:
        return TaskDataModule(
            task,
            load_tokenizer(self._expert_folder(task.name)),
            seed=self.recipe.seed,
            cache_dir=self._cache,
            batch_size=batch_size,
            max_length=task.training.max_length,
        )

    def _expert_folder(self, name: str) -> Path:
        # By name: a scale search reads fewer rows with a changed copy of the task, which has no expert of its own.
        stage = self.stages.expert(self.recipe.task(name))
        found = self.stages.finished(stage)
        return Path(found.result["folder"]) if "folder" in found.result else self.folder.path(stage.name)

    def _elsewhere(self, command: str, task: Task | None, *made: Stage) -> bool:
        """Run stages in processes of their own where their trainer is distributed; whether that was so."""
        options = self.recipe.trainer if task is None else task.trainer
        if self.launcher is None or not is_distributed(options):
            return False
        self.launcher.run(command, self.recipe, self.folder, task.name if task is not None else None, self.tracker)
        for stage in made:  # an exit code of 0 is no proof that the work was done
            self.stages.finished(stage)
        return True

    def _writing(self, stage: Stage) -> AbstractContextManager[StageWriter]:
        return self.folder.writing(stage.name, stage.inputs())

    def _already(self, stage: Stage) -> None:
        log.info("%s is up to date", stage.name)

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        log.info("%s ...", what)
        start = time.monotonic()
        yield
        log.info("%s done in %.1f s", what, time.monotonic() - start)

    def _child(self, name: str, stage: str, params: dict[str, Any]) -> str:
        return self.tracker.child(name, stage=stage, params=params) if self.tracker is not None else ""

    def _end(self, run: str) -> None:
        if self.tracker is not None and run:
            self.tracker.end(run, "FINISHED")

    def _log(self, run: str, metrics: dict[str, float]) -> None:
        if self.tracker is not None and run:
            self.tracker.log_metrics(run, metrics)


class _CaptureData(SuiteData):
    """The examples of the training split that are shown to an expert for capture."""

    def __init__(self, module: TaskDataModule, examples: int, seed: int) -> None:
        super().__init__([module], "validation")
        self.examples, self.seed = examples, seed

    def prepare_data(self) -> None:
        """Tokenise the training split if it is not tokenised yet."""
        self.modules[0].dataset("train")

    def val_dataloader(self) -> Any:
        """A seeded sample, every example once over all processes."""
        self.modules[0].trainer = self.trainer
        return self.modules[0].capture_dataloader(self.examples, self.modules[0].batch_size, self.seed)


def merge_params(step: MergeStep, vectors: Vectors) -> dict[str, Any]:
    """What MLflow notes of a merge before it begins."""
    params = {"method": step.method, "vectors": vectors, "asked_scale": step.scale, "options": step.options}
    return {**params, "purify": step.purify.model_dump()} if vectors == "purified" else params


def _described(task: Task) -> dict[str, Any]:
    return task.model_dump(mode="json", by_alias=True, exclude={"name"})
