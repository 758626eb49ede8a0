"""What the stages of a recipe share while they work: checkpoints, task vectors, data, the evaluator, the record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pave_lightning.evaluation import Candidate, Evaluator, ExpertsCandidate, SuiteData, TaskScore
from pave_lightning.evaluation.scale_search import ScaleSearcher
from pave_lightning.experts.loading import load_expert
from pave_lightning.experts.tokenizers import load_tokenizer, padding_id
from pave_lightning.experts.trainer_options import machine_options
from pave_lightning.experts.trainers import build_trainer, quiet_lightning
from pave_lightning.merging import Evidence, MergeMethod, Need
from pave_lightning.pipeline.providers import Provider, known_providers
from pave_lightning.pipeline.run_folder import RunFolder, StageWriter
from pave_lightning.pipeline.scoring import score_inputs
from pave_lightning.pipeline.stage import Results, Stage
from pave_lightning.pipeline.stages.capture import CaptureStage
from pave_lightning.pipeline.stages.fit import FitStage, expert_digests
from pave_lightning.pipeline.stages.merge import MergeStage
from pave_lightning.pipeline.stages.purify import PurifyStage
from pave_lightning.pipeline.tuning import Chooser
from pave_lightning.purification import StoredPurification
from pave_lightning.recipe.schema import MergeStep, Purify, Recipe, Task, Vectors
from pave_lightning.statistics import TaskStatistics
from pave_lightning.tasks.data_module import TaskDataModule
from pave_lightning.tracking import Tracker, record_stage
from pave_lightning.tracking.record import Kind
from pave_lightning.weights import Architecture, Checkpoint, ExpertTaskVectors, TaskVectors
from pave_lightning.weights.architecture import backbone_of, read_config
from pave_lightning.weights.coverage import Coverage
from pave_lightning.weights.embeddings import share_rows


class Context:
    """What the stages of one recipe share; each thing is made when it is first asked for.

    Args:
        results: the recipe, and what is there of it.
        tracker: the MLflow record; None in processes that are not rank zero.
        label: what the names of its runs in MLflow begin with.
        references: validation scores of experts, which normalise those of merged models, by what they depend on;
            filled here, so that several recipes may share them.
    """

    def __init__(
        self,
        results: Results,
        tracker: Tracker | None = None,
        *,
        label: str = "",
        references: dict[str, dict[int | None, dict[str, float]]] | None = None,
    ) -> None:
        self.results, self.tracker, self.label = results, tracker, label
        self.references = {} if references is None else references

    @property
    def recipe(self) -> Recipe:
        """What is to be done."""
        return self.results.recipe

    @property
    def folder(self) -> RunFolder:
        """Where results are kept."""
        return self.results.folder

    # ---- base and experts ------------------------------------------------------------------------------------------

    @property
    def base_folder(self) -> Path:
        """Where the base is."""
        return self.results.base_folder

    @cached_property
    def architecture(self) -> Architecture:
        """What the base's parameters are."""
        return Architecture.of_folder(self.base_folder)

    @cached_property
    def base(self) -> Checkpoint:
        """The base's checkpoint."""
        return self.architecture.checkpoint(self.base_folder)

    @cached_property
    def broken_in_base(self) -> list[str]:
        """Tensors of the base that hold values which are not finite in float32."""
        return self.base.non_finite()

    @cached_property
    def experts(self) -> dict[str, Checkpoint]:
        """Each task's finished expert."""
        return {task.name: self.architecture.checkpoint(self.expert_folder(task.name)) for task in self.recipe.tasks}

    @cached_property
    def coverage(self) -> Coverage:
        """What merging and purification leave out of the model."""
        return Coverage.of(self.base, self.architecture, convolutions=self.recipe.capture.convolutions)

    @property
    def token_rows(self) -> int:
        """Rows of the base's token embedding."""
        stored = [self.base.backbone.get(name) for name in self.architecture.token_embeddings]
        return next((found.shape[0] for found in stored if found is not None), 0)

    def expert_folder(self, name: str) -> Path:
        """The folder of a task's finished expert.

        By name: a scale search reads fewer rows with a changed copy of the task, which has no expert of its own.
        """
        return FitStage(self.results, self.recipe.task(name)).checkpoint()

    def classifier(self, name: str) -> nn.Module:
        """A task's expert with its head, in memory; its token embedding has the base's rows, see `share_rows`."""
        model = load_expert(self.expert_folder(name), self.recipe.task(name), self.base_folder)
        share_rows(backbone_of(model), self.token_rows)
        return model

    # ---- task vectors and evidence ---------------------------------------------------------------------------------

    @cached_property
    def plain(self) -> TaskVectors:
        """The plain task vectors of all finished experts."""
        expert_digests(self.results)
        return ExpertTaskVectors(self.base, self.experts, self.architecture)

    @cached_property
    def statistics(self) -> dict[str, TaskStatistics]:
        """What each task's expert saw, read lazily."""
        return {stage.task.name: stage.load() for stage in CaptureStage.all(self.results)}

    def vectors(self, purify: Purify | None) -> TaskVectors:
        """Task vectors with a finished purification; the plain ones without, and for a ratio of 1, which is none.

        Raises:
            PaveError: the purified weights are missing or stale.
        """
        if purify is None or purify.rho == 1:
            return self.plain
        stage = PurifyStage(self.results, purify)
        self.results.finished(stage)
        folder, prefix = self.results.path(stage), self.architecture.prefix
        tasks = [name for name in self.plain.tasks if (folder / name).is_dir()]
        return StoredPurification(self.plain, {name: Checkpoint(folder / name, prefix) for name in tasks})

    @cached_property
    def chooser(self) -> Chooser:
        """Chooses what merge steps leave open, and remembers it."""
        return Chooser(self.recipe, self.vectors, self.evidence, lambda: self._searcher, self._merged_before)

    def evidence(self, method: MergeMethod, step: MergeStep, vectors: Vectors) -> Evidence:
        """What a method needs besides the weights for a step whose ratio is fixed."""
        found, merge = Evidence(), MergeStage(self.results, step, vectors)
        for need in sorted(method.needs):
            found = self._providers[need].provide(found, self, method, merge)
        return found

    @cached_property
    def _providers(self) -> dict[Need, Provider]:
        return {need: kind() for need, kind in known_providers().items()}

    def _merged_before(self, step: MergeStep, vectors: Vectors) -> Mapping[str, Any] | None:
        found = self.results.current(MergeStage(self.results, step, vectors))
        return None if found is None else found.result

    # ---- data and scores -------------------------------------------------------------------------------------------

    def data(self, task: Task, batch_size: int) -> TaskDataModule:
        """A task's data, as its expert reads it."""
        folder = self.expert_folder(task.name)
        tokenizer = load_tokenizer(folder, self.base_folder)
        return TaskDataModule(
            task,
            tokenizer,
            seed=self.recipe.seed,
            cache_dir=self.folder.data,
            batch_size=batch_size,
            max_length=task.training.max_length,
            padding=padding_id(read_config(folder), tokenizer),
        )

    def shown(self, task: Task, examples: int) -> list[dict[str, Tensor]]:
        """Batches of a seeded sample of the rows that a task's expert was trained on."""
        size = self.recipe.capture.batch_size
        return list(self.data(task, size).capture_dataloader(examples, size, self.recipe.seed))

    def score(self, candidate: Candidate, *, alone: bool = False) -> dict[str, TaskScore]:
        """A candidate's scores on all test splits; ``alone`` in this process, whatever the trainer asks for."""
        data = SuiteData([self.data(task, self.recipe.evaluate.batch_size) for task in self.recipe.tasks], "test")
        with quiet_lightning():
            trainer = build_trainer(
                self._one_process if alone else machine_options(self.recipe.trainer),
                root=self.folder.root,
                precision=self.recipe.evaluate.precision,
            )
        return self._evaluator.score(candidate, data, trainer)

    @cached_property
    def _evaluator(self) -> Evaluator:
        with torch.random.fork_rng():
            return Evaluator(self.recipe.tasks, self.experts, self.base)

    @cached_property
    def _searcher(self) -> ScaleSearcher:
        depends_on = score_inputs(self.recipe, expert_digests(self.results), "validation")
        return ScaleSearcher(
            self.recipe.tasks,
            self._evaluator,
            ExpertsCandidate(self.experts),
            data=lambda task: self.data(task, self.recipe.evaluate.batch_size),
            options=self._one_process,
            precision=self.recipe.evaluate.precision,
            root=self.folder.root,
            references=self.references.setdefault(json.dumps(depends_on), {}),
        )

    @property
    def _one_process(self) -> dict[str, Any]:
        return {**machine_options(self.recipe.trainer), "devices": 1, "num_nodes": 1, "strategy": "auto"}

    # ---- what is written and recorded ------------------------------------------------------------------------------

    def writing(self, stage: Stage) -> AbstractContextManager[StageWriter]:
        """Write a stage: all of it appears under its final name at once, or nothing does."""
        return self.folder.writing(stage.name, stage.inputs())

    def child(self, run: str, stage: str, params: Mapping[str, Any]) -> str:
        """Begin a run of MLflow; its id, or nothing where nothing is recorded."""
        return "" if self.tracker is None else self.tracker.child(f"{self.label}{run}", stage=stage, params=params)

    def record(self, kind: Kind, run: str, result: Mapping[str, Any], params: Mapping[str, Any]) -> None:
        """Let MLflow have what a manifest says, whether the stage was made now or before."""
        if self.tracker is not None:
            record_stage(self.tracker, f"{self.label}{run}", kind, result, params)
