"""The stages in order, each resumable: fit, capture, purify, merge, evaluate, report."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pave_lightning.callbacks import PaveCallback
from pave_lightning.callbacks.options import Capture
from pave_lightning.errors import PaveError, doing, listed
from pave_lightning.evaluation import (
    Candidate,
    CheckpointCandidate,
    Evaluator,
    ExpertsCandidate,
    ModulatedCandidate,
    PurifiedExpertsCandidate,
    SuiteData,
    TaskScore,
    refuse_non_finite,
)
from pave_lightning.evaluation.scale_search import ScaleSearcher
from pave_lightning.experts.adapters import load_adapter
from pave_lightning.experts.checkpoints import clear_away
from pave_lightning.experts.fitting import fit_expert, save_expert
from pave_lightning.experts.gradients import absolute_gradients, fisher_diagonal
from pave_lightning.experts.loading import load_expert
from pave_lightning.experts.task_expert import TaskExpert
from pave_lightning.experts.trainer_options import is_distributed, machine_options
from pave_lightning.experts.trainers import build_trainer, honest_interrupts, quiet_lightning
from pave_lightning.experts.vocabulary import expert_notes
from pave_lightning.merging import Evidence, MergeMethod, Modulator, Need
from pave_lightning.merging.folders import GRADIENTS_FILE, MergeContext, load_gradients, write_merged
from pave_lightning.merging.passes import ForwardPasses, load_parameters
from pave_lightning.pipeline.launching import Launcher
from pave_lightning.pipeline.run_folder import Manifest, RunFolder, StageWriter
from pave_lightning.pipeline.stages import (
    NEED_STATISTICS,
    Stage,
    Stages,
    existing_folder,
    expert_digest,
    short_digest,
)
from pave_lightning.pipeline.tuning import Chooser, MergeChoice
from pave_lightning.purification import KeptRank, PurifiedTaskVectors, StoredPurification, write_purified
from pave_lightning.purification.export import write_purified_experts
from pave_lightning.purification.options import Purify
from pave_lightning.recipe.merge_step import MergeStep, Vectors
from pave_lightning.recipe.schema import Recipe
from pave_lightning.statistics import TaskStatistics
from pave_lightning.statistics.gradients import EXPERT_DIGEST, GradientKind, TaskGradients
from pave_lightning.system.processes import is_launched, is_rank_zero
from pave_lightning.tasks.data_module import TaskDataModule
from pave_lightning.tasks.task import Task
from pave_lightning.tasks.tokenizers import load_tokenizer, padding_id
from pave_lightning.tracking import Tracker, record_stage
from pave_lightning.tracking.logger import TrackingLogger
from pave_lightning.tracking.record import Kind
from pave_lightning.weights import (
    Architecture,
    Checkpoint,
    ExpertTaskVectors,
    TaskVectors,
    locate_model,
    model_digest,
)
from pave_lightning.weights.adapters import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS
from pave_lightning.weights.architecture import backbone_of, empty_model, read_config
from pave_lightning.weights.coverage import Coverage
from pave_lightning.weights.embeddings import OwnTokens, resize_rows, share_rows, tokens_beyond
from pave_lightning.weights.locate import has_tokenizer
from pave_lightning.weights.task_vectors import own_token_rows

log = logging.getLogger("pave_lightning")

STATISTICS_FILE = "moments.safetensors"
BROKEN_OUTPUTS = "look for broken weights, lower the scale of a merged model, or use a safer evaluate.precision"


class Workflow:
    """The stages of one recipe. Each looks first whether its result is there and was made from the same inputs.

    Args:
        recipe: what is to be done.
        folder: where results are kept.
        tracker: the MLflow record; None in processes that are not rank zero.
        launcher: starts a stage in processes of its own where its trainer is distributed; None inside such a process.
        label: what the names of its runs in MLflow begin with.

    Attributes:
        references: validation scores of experts, which normalise those of merged models, by what they depend on; may be
            shared with other workflows.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        tracker: Tracker | None = None,
        launcher: Launcher | None = None,
        label: str = "",
    ) -> None:
        self.recipe, self.folder, self.tracker, self.launcher = recipe, folder, tracker, launcher
        self.label = label
        self.references: dict[str, dict[int | None, dict[str, float]]] = {}
        self._last_passes: tuple[int, ForwardPasses] | None = None
        self.stages = Stages(recipe, folder)
        self.base_folder = locate_model(recipe.base, role="base")

    def run(self) -> None:
        """Do everything the recipe asks for that is not done yet."""
        self.fit_and_capture()
        for step, vectors in self.stages.merges():
            self.merge(step, vectors)
        self.evaluate()

    def fit_and_capture(self) -> None:
        """Make every task's expert and, where anything needs it, what its layers see."""
        # What exists is read first: what is wrong with its values is told before anything is trained.
        for task in sorted(self.recipe.tasks, key=lambda task: task.expert is None):
            self.fit(task)
        for task in self.recipe.tasks if self.stages.need_statistics() else ():
            self.capture(task)

    # ---- fit -------------------------------------------------------------------------------------------------------

    def fit(self, task: Task) -> None:
        """Fine-tune a task's expert, or take in the checkpoint that the recipe names."""
        stage = self.stages.expert(task).begun()
        if self.stages.current(stage) is not None:
            self._already(stage)
        else:
            with self._sharing(stage) as needed:
                if needed and task.expert is not None:
                    self._take_in(task, stage)
                elif needed and not self._elsewhere("fit", task, stage):
                    self._fit(task, stage)
        self._record("fit", f"expert:{task.name}", stage, self._fit_params(task))

    def _fit(self, task: Task, stage: Stage) -> None:
        training = self.folder.root / "training" / task.name
        with doing(f"fit {task.name}"):
            run = self._child(f"expert:{task.name}", "fit", self._fit_params(task))
            model, metrics = fit_expert(
                task,
                self.base_folder,
                seed=self.recipe.seed,
                work_folder=training / short_digest(stage.inputs()),
                cache_folder=self._cache,
                logger=self._logger(run, stage),
            )
            if is_rank_zero():
                with self._writing(stage) as writer:
                    save_expert(model, self.base_folder, writer.path)
                    writer.result.update(metrics=metrics)
                clear_away(training)

    def _take_in(self, task: Task, stage: Stage) -> None:
        """Check a checkpoint that exists; merge an adapter into the base; otherwise only note where it is."""
        with doing(f"take in the expert of {task.name}"):
            folder = existing_folder(task)
            self._check_base()
            for note in expert_notes(task.name, folder, self._base, self._architecture):
                log.info("  %s", note)
            with self._writing(stage) as writer:
                if (folder / ADAPTER_CONFIG).is_file():
                    adapted = load_adapter(self.base_folder, folder, task)
                    save_expert(adapted, self.base_folder, writer.path, tokenizer_of=folder)
                    (writer.path / ADAPTER_FOLDER).mkdir()
                    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                        shutil.copyfile(folder / name, writer.path / ADAPTER_FOLDER / name)
                else:
                    load_expert(folder, task, self.base_folder)
                    writer.result["folder"] = str(folder.resolve())

    def _fit_params(self, task: Task) -> dict[str, Any]:
        described = task.model_dump(mode="json", by_alias=True, exclude={"name"})
        return {"task": described} if task.expert is not None else {"task": described, "seed": self.recipe.seed}

    def _logger(self, run: str, stage: Stage) -> TrackingLogger | None:
        """Takes the trainer's metrics, besides those that the run has already from a training that was broken off."""
        if self.tracker is None or not run:
            return None
        logged = self.tracker.continue_series(run, short_digest(stage.inputs()))
        return TrackingLogger(self.tracker, run, logged=logged)

    def _check_base(self) -> None:
        if self._broken_in_base:
            raise PaveError(
                f"the base {self.base_folder}: {listed(self._broken_in_base, 3)} hold NaN, infinity, or values too "
                "large for float32; fetch it again"
            )

    @cached_property
    def _broken_in_base(self) -> list[str]:
        return self._base.non_finite()

    # ---- capture ---------------------------------------------------------------------------------------------------

    def capture(self, task: Task) -> None:
        """Show the expert examples of its own training split and keep the second moments of its layers' inputs."""
        stage = self.stages.statistics(task).begun()
        if self.stages.current(stage) is not None:
            self._already(stage)
        else:
            with self._sharing(stage) as needed:
                if needed and not self._elsewhere("capture", task, stage):
                    self._capture(task, stage)
        self._record("capture", f"expert:{task.name}", stage, self._fit_params(task))

    def _capture(self, task: Task, stage: Stage) -> None:
        options = self.recipe.capture
        with doing(f"capture {task.name}"):
            module = TaskExpert(load_expert(self._expert_folder(task.name), task, self.base_folder), task)
            callback = PaveCallback(
                backbone=f"model.{module.model.base_model_prefix}",
                mask=task.mask,
                moments=options.moments,
                rows=options.rows,
                convolutions=options.convolutions,
                norms=options.norms,
                seed=self.recipe.seed,
                metadata={**self._captured_of(task), EXPERT_DIGEST: model_digest(self._expert_folder(task.name))},
            )
            with quiet_lightning(), honest_interrupts():
                trainer = build_trainer(
                    machine_options(task.trainer),
                    root=self.folder.root,
                    callbacks=[callback],
                    precision=options.precision,
                )
                shown = _CaptureData(self._data(task, options.batch_size), options, self.recipe.seed)
                trainer.validate(module, datamodule=shown, verbose=False)
            statistics = callback.statistics
            if is_rank_zero():
                with self._writing(stage) as writer:
                    statistics.save(writer.path / STATISTICS_FILE)
                    facts = {"examples": statistics.examples, "layers": len(statistics.layers())}
                    writer.result.update(facts, unreached=list(callback.unreached))

    # ---- purify ----------------------------------------------------------------------------------------------------

    def purify(self, options: Purify) -> Manifest:
        """Purify the experts' matrix weights once for every merge step that asks for the same."""
        stage = self.stages.purified(options)
        found = self.stages.current(stage)
        if found is None:
            with doing(f"purify ({options.summary})"), self._writing(stage) as writer:
                vectors = PurifiedTaskVectors(self.plain, self.statistics, options, self.recipe.compute)
                write_purified(vectors, writer.path)
                writer.result["ranks"] = [[r.task, r.layer, r.rank, r.full] for r in vectors.ranks.values()]
                writer.result["untouched"] = [[*key, reason] for key, reason in vectors.untouched.items()]
            found = self.stages.finished(stage)
        return found

    def purified(self, options: Purify) -> TaskVectors:
        """Purified task vectors; the plain ones for a ratio of 1, which leaves every expert as it is."""
        if options.rho == 1:
            return self.plain
        self.purify(options)
        folder = self.folder.path(self.stages.purified(options).name)
        prefix = self._architecture.prefix
        tasks = [name for name in self.plain.tasks if (folder / name).is_dir()]
        return StoredPurification(self.plain, {name: Checkpoint(folder / name, prefix) for name in tasks})

    def export(self, options: Purify) -> Path:
        """Write the purified experts as ordinary Hugging Face checkpoints, one folder a task, heads included."""
        stage = self.stages.exported(options)
        if self.stages.current(stage) is not None:
            self._already(stage)
        else:
            stage = stage.begun()
            found = self.purify(options) if options.rho != 1 else None
            ranks = [KeptRank(*rank) for rank in found.result["ranks"]] if found is not None else []
            with doing(f"write purified experts ({options.summary})"), self._writing(stage) as writer:
                write_purified_experts(
                    writer.path, self.purified(options), self._experts, options.model_dump(mode="json"), ranks
                )
                for task in self.recipe.tasks:
                    written = writer.path / task.name
                    if written.is_dir() and not has_tokenizer(written):
                        load_tokenizer(self.base_folder).save_pretrained(written)
        return self.folder.path(stage.name)

    # ---- merge -----------------------------------------------------------------------------------------------------

    def merge(self, step: MergeStep, vectors: Vectors) -> None:
        """Merge all experts by one method, on plain or on purified task vectors."""
        stage = self.stages.merged(step, vectors)
        run, params = f"merge:{step.name}:{vectors}", merge_params(step, vectors)
        if self.stages.current(stage) is None:
            self._child(run, "merge", params)
            self._merge(step, vectors, stage)
        else:
            self._already(stage)
        self._record("merge", run, stage, params)

    def _merge(self, step: MergeStep, vectors: Vectors, stage: Stage) -> None:
        with doing(f"merge {step.name} ({vectors})"), self._writing(stage) as writer:
            chosen = self.choose(step, vectors)
            facts = {"vectors": vectors, "options": chosen.method.options.model_dump(), **chosen.facts}
            facts |= {"anchor": step.anchor} if step.anchor else {}
            context = MergeContext(self.recipe.base, self._base, self._experts, self._architecture, facts)
            merged = None if chosen.merged is None else chosen.merged.vectors
            write_merged(
                writer.path,
                chosen.method,
                chosen.source,
                chosen.scale,
                context,
                merged=merged,
                evidence=chosen.evidence,
            )
            cost = {name: value for name, value in vars(chosen.cost).items() if math.isfinite(value)}
            writer.result.update(facts, form=chosen.method.form, cost=cost)

    def choose(self, step: MergeStep, vectors: Vectors) -> MergeChoice:
        """What a merge step comes to once everything that the recipe leaves open is chosen on validation data.

        Raises:
            PaveError: nothing that was tried gives finite scores.
        """
        return self._chooser.choose(step, vectors)

    @cached_property
    def _chooser(self) -> Chooser:
        return Chooser(self.recipe, self._source, self.evidence, lambda: self._scale_searcher, self._merged_before)

    def _merged_before(self, step: MergeStep, vectors: Vectors) -> dict[str, Any] | None:
        found = self.stages.current(self.stages.merged(step, vectors))
        return None if found is None else found.result

    def _source(self, purify: Purify | None) -> TaskVectors:
        return self.plain if purify is None else self.purified(purify)

    def evidence(self, method: MergeMethod) -> Evidence:
        """What a method needs to know of the tasks' data."""
        return Evidence(
            statistics=self.statistics if NEED_STATISTICS & method.needs else {},
            fisher=self.gradients("fisher") if Need.FISHER in method.needs else {},
            gradients=self.gradients("absolute") if Need.GRADIENTS in method.needs else {},
            passes=self._passes(method.examples) if Need.UNLABELLED_EXAMPLES in method.needs else None,
        )

    def gradients(self, kind: GradientKind) -> dict[str, TaskGradients]:
        """What the tasks' gradients say of each weight, computed once for every merge step that asks for it."""
        found = {}
        for task in self.recipe.tasks:
            stage = self.stages.gradients(kind, task).begun()
            if self.stages.current(stage) is None:
                with self._sharing(stage) as needed:
                    if needed:
                        self._take_gradients(kind, task, stage)
            found[task.name] = load_gradients(self.folder.path(stage.name))
        return found

    def _take_gradients(self, kind: GradientKind, task: Task, stage: Stage) -> None:
        with doing(f"gradients of {task.name} ({kind})"), self._writing(stage) as writer:
            model = self._classifier(task.name)
            batches = self._shown(task, self.recipe.capture.gradient_examples)
            if kind == "fisher":
                values = fisher_diagonal(model, task, batches)
            else:
                base = {parameter.name: self.plain.base(parameter) for parameter in self.plain.parameters}
                load_parameters(backbone_of(model), base)
                values = absolute_gradients(model, task, batches)
            examples = sum(len(next(iter(batch.values()))) for batch in batches)
            of = {"task": task.name, EXPERT_DIGEST: model_digest(self._expert_folder(task.name))}
            TaskGradients(kind, values, examples=examples, metadata=of).save(writer.path / GRADIENTS_FILE)
            writer.result["examples"] = examples

    def _passes(self, examples: int) -> ForwardPasses:
        """What is needed to run models on so many examples a task; the last is kept, for options that are tuned."""
        if self._last_passes is not None and self._last_passes[0] == examples:
            return self._last_passes[1]
        batches = {}
        for task in self.recipe.tasks:
            batches[task.name] = self._shown(task, examples)
        own_tokens = {task.name: self._own_tokens(task.name) for task in self.recipe.tasks}
        passes = ForwardPasses(
            self._backbone, self.plain, batches, self.recipe.compute.device, self._classifier, own_tokens
        )
        self._last_passes = (examples, passes)
        return passes

    def _shown(self, task: Task, examples: int) -> list[dict[str, Tensor]]:
        """Batches of a seeded sample of the rows that the expert was trained on."""
        size = self.recipe.capture.batch_size
        return list(self._data(task, size).capture_dataloader(examples, size, self.recipe.seed))

    def _backbone(self) -> nn.Module:
        """The base's backbone, in memory."""
        with torch.random.fork_rng():
            backbone = backbone_of(empty_model(self.base_folder, self.recipe.tasks[0].auto_model, device="cpu"))
        resize_rows(backbone, self._token_rows)
        load_parameters(backbone, {p.name: self.plain.base(p) for p in self.plain.parameters})
        kept = [name for name in self._base if self._architecture.averages(name)]
        load_parameters(backbone, {name: self._base.tensor(name) for name in kept})
        return backbone.float().eval()

    def _classifier(self, name: str) -> nn.Module:
        """A task's expert with its head, in memory; its token embedding has the base's rows, see `share_rows`."""
        model = load_expert(self._expert_folder(name), self.recipe.task(name), self.base_folder)
        share_rows(backbone_of(model), self._token_rows)
        return model

    def _own_tokens(self, name: str) -> OwnTokens | None:
        """The tokens of a task's expert that the base has no row of; None where there are none."""
        if not own_token_rows(self._base, self._experts[name], self._architecture):
            return None
        model = load_expert(self._expert_folder(name), self.recipe.task(name), self.base_folder)
        return tokens_beyond(backbone_of(model), self._token_rows)

    @property
    def _token_rows(self) -> int:
        """Rows of the base's token embedding."""
        stored = [self._base.backbone.get(name) for name in self._architecture.token_embeddings]
        return next((found.shape[0] for found in stored if found is not None), 0)

    @cached_property
    def _scale_searcher(self) -> ScaleSearcher:
        return ScaleSearcher(
            self.recipe.tasks,
            self._evaluator,
            ExpertsCandidate(self._experts),
            data=lambda task: self._data(task, self.recipe.evaluate.batch_size),
            options=self._one_process,
            precision=self.recipe.evaluate.precision,
            root=self.folder.root,
            references=self.references.setdefault(json.dumps(self.stages.score_inputs("validation")), {}),
        )

    # ---- evaluate --------------------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Score base, experts and every merged model on all test splits."""
        waiting = [stage.begun() for stage in self.stages.scores() if self.stages.current(stage) is None]
        if not is_launched():
            for options in self.stages.purified_expert_scores().values() if waiting else ():
                self.purified(options)  # here, before several processes would each do it
        if not waiting or self._elsewhere("evaluate", None, *waiting):
            return
        for stage in waiting:
            name = stage.name.partition("/")[2]
            with doing(f"evaluate {name}"):
                scores = self.score(self._candidate(name))
                refuse_non_finite(scores, _model_in_words(name), BROKEN_OUTPUTS)
                if is_rank_zero():
                    with self._writing(stage) as writer:
                        writer.result["scores"] = plain_scores(scores)

    def score(self, candidate: Candidate, *, alone: bool = False) -> dict[str, TaskScore]:
        """A candidate's scores on all test splits; ``alone`` in this process, whatever the trainer asks for."""
        data = SuiteData([self._data(t, self.recipe.evaluate.batch_size) for t in self.recipe.tasks], "test")
        with quiet_lightning():
            trainer = build_trainer(
                self._one_process if alone else machine_options(self.recipe.trainer),
                root=self.folder.root,
                precision=self.recipe.evaluate.precision,
            )
        return self._evaluator.score(candidate, data, trainer)

    def purified_experts(self, options: Purify) -> Candidate:
        """Every expert with its own purified weights, not merged."""
        return PurifiedExpertsCandidate(self._experts, self.purified(options))

    def _candidate(self, name: str) -> Candidate:
        if name == "base":
            return CheckpointCandidate(self._base)
        if name == "experts":
            return ExpertsCandidate(self._experts)
        if name in self.stages.purified_expert_scores():
            return self.purified_experts(self.stages.purified_expert_scores()[name])
        folder = self.folder.path(f"merged/{name}")
        checkpoint = Checkpoint(folder, self._architecture.prefix)
        if not (folder / "modulators").is_dir():
            return CheckpointCandidate(checkpoint)
        modulators = {t.name: Modulator(folder / "modulators" / f"{t.name}.safetensors") for t in self.recipe.tasks}
        return ModulatedCandidate(self._base, checkpoint, modulators)

    def untouched(self) -> tuple[Candidate, Candidate]:
        """The base and the experts, as they are."""
        return CheckpointCandidate(self._base), ExpertsCandidate(self._experts)

    # ---- what stages share -----------------------------------------------------------------------------------------

    @cached_property
    def _architecture(self) -> Architecture:
        return Architecture.of_folder(self.base_folder, *self.recipe.auto_models)

    @cached_property
    def _base(self) -> Checkpoint:
        return self._architecture.base_checkpoint(self.base_folder)

    @cached_property
    def _experts(self) -> dict[str, Checkpoint]:
        checkpoint = self._architecture.checkpoint
        return {task.name: checkpoint(self._expert_folder(task.name)) for task in self.recipe.tasks}

    @cached_property
    def coverage(self) -> Coverage:
        """What merging and purification leave out of the model."""
        return Coverage.of(self._base, self._architecture, convolutions=self.recipe.capture.convolutions)

    @cached_property
    def statistics(self) -> dict[str, TaskStatistics]:
        """What each task's expert saw, read lazily."""
        found = {}
        for task in self.recipe.tasks:
            file = self.folder.path(self.stages.statistics(task).name) / STATISTICS_FILE
            found[task.name] = TaskStatistics.load(file, of=self._captured_of(task))
        return found

    def _captured_of(self, task: Task) -> dict[str, str]:
        """What says in a task's statistics whose they are."""
        return {"task": task.name, "expert": expert_digest(self.stages.finished(self.stages.expert(task)))}

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
    def _one_process(self) -> dict[str, Any]:
        return {**machine_options(self.recipe.trainer), "devices": 1, "num_nodes": 1, "strategy": "auto"}

    @property
    def _cache(self) -> Path:
        return self.folder.data

    def _data(self, task: Task, batch_size: int) -> TaskDataModule:
        folder = self._expert_folder(task.name)
        processor = task.load_processor(folder, self.base_folder)
        return TaskDataModule(
            task,
            processor,
            seed=self.recipe.seed,
            cache_dir=self._cache,
            batch_size=batch_size,
            padding=padding_id(read_config(folder), processor),
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
        self.folder.note_hashes()  # which spares the processes of the stage reading all inputs again
        self.launcher.run(command, self.recipe, self.folder, task.name if task is not None else None, self.tracker)
        for stage in made:  # an exit code of 0 is no proof that the work was done
            self.stages.finished(stage)
        return True

    @contextmanager
    def _sharing(self, stage: Stage) -> Iterator[bool]:
        """Hold a stage that other recipes share; whether it is still needed then.

        A process that a driver started finds it held by the driver, for all processes of the stage.
        """
        if is_launched():
            yield True
            return
        with self.folder.claimed(stage.name):
            needed = self.stages.current(stage) is None
            if not needed:
                self._already(stage)
            yield needed

    def _writing(self, stage: Stage) -> AbstractContextManager[StageWriter]:
        return self.folder.writing(stage.name, stage.inputs())

    def _already(self, stage: Stage) -> None:
        log.info("%s is up to date", stage.name)

    def _child(self, name: str, stage: str, params: dict[str, Any]) -> str:
        if self.tracker is None:
            return ""
        return self.tracker.child(f"{self.label}{name}", stage=stage, params=params)

    def _record(self, kind: Kind, run: str, stage: Stage, params: dict[str, Any]) -> None:
        """Let MLflow have what the manifest of a finished stage says, whether it was made now or before."""
        if self.tracker is not None:
            record_stage(self.tracker, f"{self.label}{run}", kind, self.stages.finished(stage).result, params)


class _CaptureData(SuiteData):
    """The examples that are shown to an expert for capture."""

    def __init__(self, module: TaskDataModule, options: Capture, seed: int) -> None:
        super().__init__([module], "validation")
        self.options, self.seed = options, seed

    def prepare_data(self) -> None:
        """Tokenise the training split if it is not tokenised yet."""
        if self.options.source == "train":
            self.modules[0].dataset("train")

    def val_dataloader(self) -> Any:
        """A seeded sample, every example once over all processes."""
        module = self.modules[0]
        module.trainer = self.trainer
        make = module.capture_dataloader if self.options.source == "train" else module.random_dataloader
        return make(self.options.examples, self.options.batch_size, self.seed)


def _model_in_words(name: str) -> str:
    """What the scores of that name are of."""
    return {"base": "the base", "experts": "its own expert"}.get(name, f"the model {name}")


def plain_scores(scores: Mapping[str, TaskScore]) -> dict[str, Any]:
    """Scores as plain JSON values."""
    return {task: {"metrics": score.metrics, "examples": score.examples} for task, score in scores.items()}


def merge_params(step: MergeStep, vectors: Vectors) -> dict[str, Any]:
    """What MLflow notes of a merge before it begins."""
    params = {"method": step.method, "vectors": vectors, "asked_scale": step.scale, "options": step.options}
    params |= {"anchor": step.anchor} if step.anchor else {}
    params |= {"tune": step.tune} if step.tune else {}
    return {**params, "purify": step.purify.model_dump()} if vectors == "purified" else params
