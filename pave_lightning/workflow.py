"""The stages in order, each resumable: fit, capture, purify, merge, evaluate, report."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch

from pave_lightning.callbacks import PaveCallback
from pave_lightning.errors import PaveError
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
from pave_lightning.recipe import MergeStep, Purify, Recipe, ScaleSearch, Task, Vectors, slug
from pave_lightning.run_folder import Manifest, RunFolder
from pave_lightning.statistics import TaskStatistics
from pave_lightning.tasks.data import split_fingerprint
from pave_lightning.tasks.data_module import TaskDataModule
from pave_lightning.tracking import Tracker
from pave_lightning.tracking_logger import TrackingLogger
from pave_lightning.weights import (
    Architecture,
    Checkpoint,
    ExpertTaskVectors,
    TaskVectors,
    locate_model,
    model_digest,
)

log = logging.getLogger("pave_lightning")

STATISTICS_FILE = "moments.safetensors"
# Raised when a stage's results change meaning, so that older results are made anew.
FORMATS = {"fit": 1, "capture": 1, "purify": 1, "merge": 1, "evaluate": 1}


# Options of the trainer that change neither the order of examples nor the arithmetic that is asked for.
HARMLESS_OPTIONS = ("enable_progress_bar", "log_every_n_steps", "accelerator", "profiler", "detect_anomaly")


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
        self.base_folder = locate_model(recipe.base, role="base")

    def run(self) -> None:
        """Do everything the recipe asks for that is not done yet."""
        for task in self.recipe.tasks:
            self.fit(task)
        for task in self.recipe.tasks:
            self.capture(task)
        for step, vectors in self.merges():
            self.merge(step, vectors)
        self.evaluate()

    def merges(self) -> Iterator[tuple[MergeStep, Vectors]]:
        """Every merged model the recipe asks for."""
        for step in self.recipe.merge:
            for vectors in step.vectors:
                yield step, vectors

    # ---- fit -------------------------------------------------------------------------------------------------------

    def fit(self, task: Task) -> None:
        """Fine-tune a task's expert, or take in the checkpoint that the recipe names."""
        stage, inputs = expert_stage(task), self._fit_inputs(task)
        if self.folder.current(stage, inputs) is not None:
            return self._already(stage)
        if task.expert is not None:
            return self._take_in(task, stage, inputs)
        if self._elsewhere("fit", task):
            self._finished(stage, inputs, f"pave fit --task {task.name}")
            return None
        training = self.folder.root / "training" / task.name
        with self._doing(f"fit {task.name}"):
            run = self._child(f"expert:{task.name}", "fit", {"task": _described(task), "seed": self.recipe.seed})
            logger = TrackingLogger(self.tracker, run) if self.tracker is not None and run else None
            model, metrics = fit_expert(
                task,
                self.base_folder,
                seed=self.recipe.seed,
                work_folder=training / _short_digest(inputs),
                cache_folder=self._cache,
                logger=logger,
            )
            if is_rank_zero():
                with self.folder.writing(stage, inputs) as writer:
                    save_expert(model, self.base_folder, writer.path)
                    writer.result.update(metrics=metrics)
                shutil.rmtree(training, ignore_errors=True)
                self._log(run, metrics)
                self._end(run)
        return None

    def _take_in(self, task: Task, stage: str, inputs: dict[str, Any]) -> None:
        """Check a checkpoint that exists; merge an adapter into the base; otherwise only note where it is."""
        with self._doing(f"take in the expert of {task.name}"):
            folder = self._existing_folder(task)
            with self.folder.writing(stage, inputs) as writer:
                if (folder / ADAPTER_CONFIG).is_file():
                    save_expert(load_adapter(self.base_folder, folder, task), self.base_folder, writer.path)
                else:
                    load_expert(folder, task)
                    writer.result["folder"] = str(folder.resolve())
            self._end(self._child(f"expert:{task.name}", "fit", {"task": _described(task)}))

    def _existing_folder(self, task: Task) -> Path:
        reference = task.expert.from_ if task.expert is not None else ""
        return locate_model(reference, role=f"expert of task '{task.name}'")

    def _fit_inputs(self, task: Task) -> dict[str, Any]:
        inputs: dict[str, Any] = {"format": FORMATS["fit"], "base": self._base_digest}
        if task.expert is not None:
            folder = self._existing_folder(task)
            return {**inputs, "from": str(folder), "weights": model_digest(folder), "outputs": task.outputs}
        return {
            **inputs,
            "seed": self.recipe.seed,
            "data": {split: split_fingerprint(task, split) for split in ("train", "validation")},
            "examples": [task.examples.train, task.examples.validation],
            "columns": [task.text, task.label],
            "kind": [task.kind, task.classes],
            "headline": task.headline,
            "training": task.training.model_dump(),
            "trainer": {key: value for key, value in task.trainer.items() if key not in HARMLESS_OPTIONS},
        }

    # ---- capture ---------------------------------------------------------------------------------------------------

    def capture(self, task: Task) -> None:
        """Show the expert examples of its own training split and keep the second moments of its layers' inputs."""
        expert = self._finished(expert_stage(task), self._fit_inputs(task), f"pave fit --task {task.name}")
        stage, inputs = statistics_stage(task), self._capture_inputs(task, expert)
        if self.folder.current(stage, inputs) is not None:
            return self._already(stage)
        if self._elsewhere("capture", task):
            self._finished(stage, inputs, f"pave capture --task {task.name}")
            return None
        options = self.recipe.capture
        with self._doing(f"capture {task.name}"):
            module = TaskExpert(load_expert(self._expert_folder(task), task), task)
            data = self._data(task, options.batch_size)
            callback = PaveCallback(
                backbone=f"model.{module.model.base_model_prefix}",
                moments=options.moments,
                metadata={"task": task.name, "expert": _expert_digest(expert)},
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
                with self.folder.writing(stage, inputs) as writer:
                    statistics.save(writer.path / STATISTICS_FILE)
                    facts = {"examples": statistics.examples, "layers": len(statistics.layers())}
                    writer.result.update(facts, unreached=list(callback.unreached))
                run = self._child(f"expert:{task.name}", "fit", {})
                self._log(run, {f"capture/{name}": float(value) for name, value in facts.items()})
                self._end(run)
        return None

    def _capture_inputs(self, task: Task, expert: Manifest) -> dict[str, Any]:
        return {
            "format": FORMATS["capture"],
            "expert": _expert_digest(expert),
            "data": split_fingerprint(task, "train"),
            "rows": [task.examples.train, self.recipe.seed],
            "columns": task.text,
            "max_length": task.training.max_length,
            "capture": self.recipe.capture.model_dump(),
        }

    # ---- purify ----------------------------------------------------------------------------------------------------

    def purify(self, options: Purify) -> Manifest:
        """Purify the experts' linear weights once for every merge step that asks for the same."""
        stage, inputs = purified_stage(options), self._purify_inputs(options)
        found = self.folder.current(stage, inputs)
        if found is None:
            with self._doing(f"purify (rho {options.rho:g})"), self.folder.writing(stage, inputs) as writer:
                statistics = {
                    task.name: TaskStatistics.load(self.folder.path(statistics_stage(task)) / STATISTICS_FILE)
                    for task in self.recipe.tasks
                }
                vectors = PurifiedTaskVectors(self.plain, statistics, options)
                write_purified(vectors, writer.path)
                writer.result["ranks"] = [[r.task, r.layer, r.rank, r.full] for r in vectors.ranks.values()]
                writer.result["untouched"] = [[*key, reason] for key, reason in vectors.untouched.items()]
            found = self._finished(stage, inputs, "pave merge")
        return found

    def _purify_inputs(self, options: Purify) -> dict[str, Any]:
        statistics = {}
        for task in self.recipe.tasks:
            expert = self._finished(expert_stage(task), self._fit_inputs(task), f"pave fit --task {task.name}")
            captured = self._finished(
                statistics_stage(task), self._capture_inputs(task, expert), f"pave capture --task {task.name}"
            )
            statistics[task.name] = captured.digest()
        return {
            "format": FORMATS["purify"],
            "experts": self.expert_digests(),
            "statistics": statistics,
            "purify": options.model_dump(),
        }

    # ---- merge -----------------------------------------------------------------------------------------------------

    def merge(self, step: MergeStep, vectors: Vectors) -> None:
        """Merge all experts by one rule, on plain or on purified task vectors."""
        stage, inputs = merged_stage(step, vectors), self._merge_inputs(step, vectors)
        if self.folder.current(stage, inputs) is not None:
            return self._already(stage)
        source = self.plain if vectors == "plain" else self._purified(step.purify)
        method = make_method(step.method, step.options)
        run = self._child(f"merge:{step.name}:{vectors}", "merge", merge_params(step, vectors))
        with self._doing(f"merge {step.name} ({vectors})"), self.folder.writing(stage, inputs) as writer:
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
        folder = self.folder.path(purified_stage(options))
        prefix = self._architecture.prefix
        tasks = [name for name in self.plain.tasks if (folder / name).is_dir()]
        return StoredPurification(self.plain, {name: Checkpoint(folder / name, prefix) for name in tasks})

    def _merge_inputs(self, step: MergeStep, vectors: Vectors) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "format": FORMATS["merge"],
            "experts": self.expert_digests(),
            "base": self._base_digest,
            "step": step.model_dump(include={"method", "scale", "options"}),
        }
        if vectors == "purified":
            inputs["purified"] = self._purify_inputs(step.purify)
        if isinstance(step.scale, ScaleSearch):
            inputs["search"] = self._score_inputs("validation")
        return inputs

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
        waiting = [(name, inputs) for name, inputs in self._to_score() if self.folder.current(name, inputs) is None]
        if not waiting:
            return
        if self._elsewhere("evaluate", None):
            for stage, inputs in waiting:
                self._finished(stage, inputs, "pave evaluate")
            return
        data = SuiteData([self._data(t, self.recipe.evaluate.batch_size) for t in self.recipe.tasks], "test")
        for stage, inputs in waiting:
            with self._doing(f"evaluate {stage.partition('/')[2]}"):
                with quiet_lightning():
                    trainer = build_trainer(
                        machine_options(self.recipe.trainer),
                        root=self.folder.root,
                        precision=self.recipe.evaluate.precision,
                    )
                scores = self._evaluator.score(self._candidate(stage), data, trainer)
                if is_rank_zero():
                    with self.folder.writing(stage, inputs) as writer:
                        writer.result["scores"] = {
                            task: {"metrics": score.metrics, "examples": score.examples}
                            for task, score in scores.items()
                        }

    def _to_score(self) -> Iterator[tuple[str, dict[str, Any]]]:
        shared = self._score_inputs("test")
        yield "scores/base", {**shared, "model": self._base_digest}
        yield "scores/experts", {**shared, "model": self.expert_digests()}
        for step, vectors in self.merges():
            yield score_stage(step, vectors), self._merged_score_inputs(step, vectors)

    def _merged_score_inputs(self, step: MergeStep, vectors: Vectors) -> dict[str, Any]:
        return {**self._score_inputs("test"), "model": self.merged(step, vectors).digest()}

    def _score_inputs(self, split: str) -> dict[str, Any]:
        return {
            "format": FORMATS["evaluate"],
            "heads": self.expert_digests(),
            "tasks": {
                task.name: {
                    "data": split_fingerprint(task, cast(Any, split)),
                    "examples": [getattr(task.examples, split), self.recipe.seed],
                    "columns": [task.text, task.label],
                    "kind": [task.kind, task.classes],
                    "metrics": [task.metrics, task.headline],
                    "max_length": task.training.max_length,
                }
                for task in self.recipe.tasks
            },
            "precision": self.recipe.evaluate.precision,
        }

    def _candidate(self, stage: str) -> Candidate:
        name = stage.partition("/")[2]
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

    # ---- what is there ---------------------------------------------------------------------------------------------

    def scored(self) -> dict[str, Manifest]:
        """The scores of base, experts and every merged model, by stage.

        Raises:
            PaveError: some are missing or stale.
        """
        return {stage: self._finished(stage, inputs, "pave evaluate") for stage, inputs in self._to_score()}

    def merged(self, step: MergeStep, vectors: Vectors) -> Manifest:
        """A finished merged model."""
        return self._finished(merged_stage(step, vectors), self._merge_inputs(step, vectors), "pave merge")

    def purified(self, options: Purify) -> Manifest:
        """A finished purification."""
        return self._finished(purified_stage(options), self._purify_inputs(options), "pave merge")

    def states(self) -> dict[str, str]:
        """Every stage in order, and whether its result is there, stale, or to do."""
        asked: dict[str, Callable[[], dict[str, Any]]] = {}
        for task in self.recipe.tasks:
            asked[expert_stage(task)] = partial(self._fit_inputs, task)
        for task in self.recipe.tasks:
            asked[statistics_stage(task)] = lambda task=task: self._capture_inputs(  # type: ignore[misc]
                task, self._finished(expert_stage(task), self._fit_inputs(task), "pave fit")
            )
        for step, vectors in self.merges():
            if vectors == "purified":
                asked[purified_stage(step.purify)] = partial(self._purify_inputs, step.purify)
            asked[merged_stage(step, vectors)] = partial(self._merge_inputs, step, vectors)
        asked["scores/base"] = lambda: {**self._score_inputs("test"), "model": self._base_digest}
        asked["scores/experts"] = lambda: {**self._score_inputs("test"), "model": self.expert_digests()}
        for step, vectors in self.merges():
            asked[score_stage(step, vectors)] = partial(self._merged_score_inputs, step, vectors)
        return {stage: self._state(stage, inputs) for stage, inputs in asked.items()}

    def _state(self, stage: str, inputs: Callable[[], dict[str, Any]]) -> str:
        try:
            if self.folder.current(stage, inputs()) is not None:
                return "there"
        except PaveError:  # something that it builds on is not there or stale itself
            pass
        return "stale" if self.folder.manifest(stage) is not None else "to do"

    # ---- what stages share -----------------------------------------------------------------------------------------

    @cached_property
    def _architecture(self) -> Architecture:
        return Architecture.of_folder(self._expert_folder(self.recipe.tasks[0]))

    @cached_property
    def _base(self) -> Checkpoint:
        return Checkpoint(self.base_folder, self._architecture.prefix)

    @cached_property
    def _experts(self) -> dict[str, Checkpoint]:
        prefix = self._architecture.prefix
        return {task.name: Checkpoint(self._expert_folder(task), prefix) for task in self.recipe.tasks}

    @cached_property
    def plain(self) -> TaskVectors:
        """The plain task vectors of all finished experts."""
        for task in self.recipe.tasks:
            self._finished(expert_stage(task), self._fit_inputs(task), f"pave fit --task {task.name}")
        return ExpertTaskVectors(self._base, self._experts, self._architecture)

    @cached_property
    def _evaluator(self) -> Evaluator:
        with torch.random.fork_rng():
            return Evaluator(self.recipe.tasks, self._experts, self._base)

    @cached_property
    def _base_digest(self) -> str:
        return model_digest(self.base_folder)

    @property
    def _cache(self) -> Path:
        return self.folder.root / "data"

    def _data(self, task: Task, batch_size: int) -> TaskDataModule:
        return TaskDataModule(
            task,
            load_tokenizer(self._expert_folder(task)),
            seed=self.recipe.seed,
            cache_dir=self._cache,
            batch_size=batch_size,
            max_length=task.training.max_length,
        )

    def _expert_folder(self, task: Task) -> Path:
        found = self.folder.manifest(expert_stage(task))
        if found is None:
            raise PaveError(f"the expert of task '{task.name}' is not there yet; run: pave fit --task {task.name}")
        return Path(found.result["folder"]) if "folder" in found.result else self.folder.path(expert_stage(task))

    def expert_digests(self) -> dict[str, str]:
        """What identifies each expert's weights."""
        digests = {}
        for task in self.recipe.tasks:
            found = self._finished(expert_stage(task), self._fit_inputs(task), f"pave fit --task {task.name}")
            digests[task.name] = _expert_digest(found)
        return digests

    def _finished(self, stage: str, inputs: dict[str, Any], command: str) -> Manifest:
        found = self.folder.current(stage, inputs)
        if found is None:
            state = "stale: its inputs have changed" if self.folder.manifest(stage) is not None else "not there yet"
            raise PaveError(f"{self.folder.path(stage)} is {state}; run `{command}` with this recipe, or `pave run`")
        return found

    def _elsewhere(self, stage: str, task: Task | None) -> bool:
        """Run a stage in processes of its own where its trainer is distributed; whether that was so."""
        options = self.recipe.trainer if task is None else task.trainer
        if self.launcher is None or not is_distributed(options):
            return False
        self.launcher.run(stage, self.recipe, self.folder, task.name if task is not None else None, self.tracker)
        return True

    def _already(self, stage: str) -> None:
        log.info("%s is up to date", stage)

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


def expert_stage(task: Task) -> str:
    """Stage, and folder below the run folder, of a task's expert."""
    return f"experts/{task.name}"


def statistics_stage(task: Task) -> str:
    """Stage of a task's captured statistics."""
    return f"statistics/{task.name}"


def purified_stage(options: Purify) -> str:
    """Stage of the purified weights of these options."""
    label = f"rho{options.rho:g}-{options.metric}-{options.allocation}-{_short_digest(options.model_dump())}"
    return f"purified/{slug(label)}"


def merged_stage(step: MergeStep, vectors: Vectors) -> str:
    """Stage of a merged model."""
    return f"merged/{step.name}-{vectors}"


def score_stage(step: MergeStep, vectors: Vectors) -> str:
    """Stage of a merged model's scores."""
    return f"scores/{step.name}-{vectors}"


def merge_params(step: MergeStep, vectors: Vectors) -> dict[str, Any]:
    """What MLflow notes of a merge before it begins."""
    params = {"method": step.method, "vectors": vectors, "asked_scale": step.scale, "options": step.options}
    return {**params, "purify": step.purify.model_dump()} if vectors == "purified" else params


def _expert_digest(expert: Manifest) -> str:
    """What identifies an expert: its own files, or those of the folder that it was taken in from."""
    return str(expert.inputs["weights"]) if "folder" in expert.result else expert.digest()


def _described(task: Task) -> dict[str, Any]:
    return task.model_dump(mode="json", by_alias=True, exclude={"name"})


def _short_digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
