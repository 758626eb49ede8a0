"""The scores of one model on all test splits, and which models a recipe has scored."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pave_lightning.errors import PaveError, doing
from pave_lightning.evaluation.options import EXPERT_HEADS, Heads
from pave_lightning.merging import method_named
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.purifications import label, purifications
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.scoring import score_inputs
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.align import expert_digests, expert_stages, experts, own_experts
from pave_lightning.pipeline.stages.fit import own_digests
from pave_lightning.pipeline.stages.heads import HeadsStage
from pave_lightning.pipeline.stages.joint import JointStage
from pave_lightning.pipeline.stages.merge import MergeStage, merged_model
from pave_lightning.pipeline.stages.purify import needed_for, purification_inputs, task_vectors
from pave_lightning.purification.options import Purify
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.reporting.scores import OWN_HEADS
from pave_lightning.system.processes import is_rank_zero
from pave_lightning.tasks.task import Task

if TYPE_CHECKING:
    from pave_lightning.evaluation import Candidate
    from pave_lightning.reporting.scores import Form

log = logging.getLogger("pave_lightning")

# Raised when what a stage leaves beside the scores changes, so that older ones are made anew.
FORMAT = 1
BROKEN_OUTPUTS = "look for broken weights, lower the scale of a merged model, or use a safer evaluate.precision"


class ScoredModel(ABC):
    """A model whose scores are taken.

    Attributes:
        label: what tells it from others in the names of folders.
        model: its name in tables.
        vectors: name of the stack that made its task vectors; empty where that is no question.
        heads: under which heads it is scored, in tables.
        words: it in words, in messages.
        is_control: whether it is not a merged model, but scored beside them to compare with.
        may_fail: whether outputs that are not finite only cost it its scores, instead of stopping the work.
        own_tokens: whether it reads each task with the expert's own tokens, where those of merged models are others.
    """

    label: str
    model: str
    words: str
    vectors: str = ""
    heads: str = EXPERT_HEADS.label
    is_control: bool = False
    may_fail: ClassVar[bool] = False
    own_tokens: ClassVar[bool] = False

    def __init__(self, results: Results) -> None:
        self.results = results

    @property
    @abstractmethod
    def form(self) -> Form:
        """What it is, in tables."""

    def needs(self) -> Sequence[Stage]:
        """The stages that it is made of, besides the experts whose heads are used."""
        return ()

    @abstractmethod
    def depends_on(self) -> dict[str, Any]:
        """What identifies its weights, as plain JSON values."""

    @abstractmethod
    def candidate(self, context: Context) -> tuple[Candidate, dict[str, Any]]:
        """The model as merged models are read, and facts that stand beside the scores."""

    def by_itself(self, context: Context) -> tuple[Candidate, dict[str, Any]]:
        """What is scored, and the same facts; with tokens of its own where it has them (`own_tokens`)."""
        return self.candidate(context)


class ScoredBase(ScoredModel):
    """The base."""

    label = model = form = "base"
    words = "the base"

    def depends_on(self) -> dict[str, Any]:
        """The base's digest."""
        return {"model": self.results.base_digest}

    def candidate(self, context: Context) -> tuple[Candidate, dict[str, Any]]:
        """The base's checkpoint."""
        from pave_lightning.evaluation import CheckpointCandidate

        return CheckpointCandidate(context.base), {}


class ScoredExperts(ScoredModel):
    """Each task's own expert."""

    label = model = "experts"
    form = "expert"
    words = "its own expert"
    own_tokens = True

    def depends_on(self) -> dict[str, Any]:
        """The experts' digests."""
        return {"model": own_digests(self.results)}

    def candidate(self, context: Context) -> tuple[Candidate, dict[str, Any]]:
        """The experts' checkpoints."""
        from pave_lightning.evaluation import ExpertsCandidate

        return ExpertsCandidate(experts(context)), {}

    def by_itself(self, context: Context) -> tuple[Candidate, dict[str, Any]]:
        """The experts' checkpoints with their own tokens."""
        from pave_lightning.evaluation import ExpertsCandidate

        return ExpertsCandidate(own_experts(context)), {}


class ScoredPurifiedExperts(ScoredModel):
    """Each task's own expert with its own purified weights, not merged.

    Args:
        results: the recipe, and what is there of it.
        options: the purification.
        alone: whether the recipe has only this one, which then needs no longer name.
    """

    vectors = "purified"
    # One model for each task; the form expert is kept for those whose scores normalise all others.
    form = "per-task"

    def __init__(self, results: Results, options: Purify, *, alone: bool) -> None:
        super().__init__(results)
        self.options = options
        self.label = f"experts-{label(options)}"
        self.model = "experts" if alone else self.label
        self.words = f"the model {self.label}"

    def needs(self) -> Sequence[Stage]:
        """Statistics and purified weights."""
        return needed_for(self.results, self.options)

    def depends_on(self) -> dict[str, Any]:
        """What the purified weights depend on."""
        return {"purified": purification_inputs(self.results, self.options)}

    def candidate(self, context: Context) -> tuple[Candidate, dict[str, Any]]:
        """The experts' checkpoints with purified weights in them."""
        from pave_lightning.evaluation import PurifiedExpertsCandidate

        candidate = PurifiedExpertsCandidate(experts(context), task_vectors(context, self.options))
        return candidate, {"rho": self.options.rho}


class ScoredMerge(ScoredModel):
    """A merged model as it lies in the run folder, with the heads in it."""

    def __init__(self, results: Results, step: MergeStep, vectors: str, heads: Heads = EXPERT_HEADS) -> None:
        super().__init__(results)
        self.merge = MergeStage(results, step, vectors, heads)
        self.label, self.model, self.vectors, self.heads = self.merge.label, step.name, vectors, heads.label
        self.words = f"the model {self.merge.words}"

    @property
    def form(self) -> Form:
        """That of the method."""
        return method_named(self.merge.step.method).form

    def needs(self) -> Sequence[Stage]:
        """The merge."""
        return [self.merge]

    def depends_on(self) -> dict[str, Any]:
        """The digest of its folder."""
        return {"model": self.results.finished(self.merge).digest()}

    def candidate(self, context: Context) -> tuple[Candidate, dict[str, Any]]:
        """The checkpoint in the folder, with what is kept for each task where there is something."""
        return merged_model(context, self.results.path(self.merge)), {}


class ScoredJoint(ScoredModel):
    """The model that is trained on all tasks together, under its own heads."""

    label = model = "joint"
    form = "static"
    heads = OWN_HEADS
    words = "the model that is trained on all tasks together"
    is_control = True

    def needs(self) -> Sequence[Stage]:
        """The training."""
        return [JointStage(self.results)]

    def depends_on(self) -> dict[str, Any]:
        """The digest of its folder."""
        return {"model": self.results.finished(JointStage(self.results)).digest()}

    def candidate(self, context: Context) -> tuple[Candidate, dict[str, Any]]:
        """The checkpoint in the folder, with the heads in it."""
        from pave_lightning.evaluation.own_heads import OwnHeadsCandidate
        from pave_lightning.weights import Checkpoint

        folder = self.results.path(JointStage(self.results))
        return OwnHeadsCandidate(Checkpoint(folder, context.architecture.prefix)), {}


class ScoredExpert(ScoredModel):
    """One expert alone on all tasks, under the heads of all experts."""

    form = "static"
    is_control = True

    def __init__(self, results: Results, task: Task) -> None:
        super().__init__(results)
        self.task = task
        self.label = f"expert-{task.name}"
        self.model, self.words = f"expert of {task.name}", f"the expert of {task.name}"

    def depends_on(self) -> dict[str, Any]:
        """The expert's digest."""
        return {"model": expert_digests(self.results)[self.task.name]}

    def candidate(self, context: Context) -> tuple[Candidate, dict[str, Any]]:
        """The expert's checkpoint for every task."""
        from pave_lightning.evaluation import CheckpointCandidate

        return CheckpointCandidate(experts(context)[self.task.name]), {}


class ScoredFitted(ScoredModel):
    """A model that is not merged, under heads whose last layers are fitted to it.

    Args:
        results: the recipe, and what is there of it.
        model: the model.
        heads: how they are fitted.
    """

    is_control = True

    def __init__(self, results: Results, model: ScoredModel, heads: Heads) -> None:
        super().__init__(results)
        self.inner, self.stage = model, HeadsStage(results, model, heads)
        self.label = f"{model.label}-heads-{heads.label}"
        self.model, self.vectors, self.heads = model.model, model.vectors, heads.label
        self.words = f"{model.words} with heads fitted to {heads.fit}"

    @property
    def form(self) -> Form:
        """That of the model; experts under other heads than their own are no measure for others."""
        return "per-task" if self.inner.form == "expert" else self.inner.form

    def needs(self) -> Sequence[Stage]:
        """The heads, and what the model is made of."""
        return [*self.inner.needs(), self.stage]

    def depends_on(self) -> dict[str, Any]:
        """What the heads depend on, the model's weights among it."""
        return {"fitted": self.stage.inputs()}

    def candidate(self, context: Context) -> tuple[Candidate, dict[str, Any]]:
        """The model's own, with the heads exchanged."""
        from pave_lightning.evaluation.heads import FittedHeads

        candidate, facts = self.inner.candidate(context)
        tasks = {task.name: task for task in context.recipe.tasks}
        return FittedHeads(candidate, self.stage.load(), tasks), facts


class EvaluateStage(Stage):
    """The scores of one model on all test splits, and what it predicted there (``predictions.parquet``)."""

    command = "evaluate"
    announced = False

    def __init__(self, results: Results, model: ScoredModel) -> None:
        super().__init__(results)
        self.model = model

    @classmethod
    def all(cls, results: Results) -> Sequence[Stage]:
        """Those of base, experts, purified experts and merged models; before them the weights that only they need."""
        found = [cls(results, model) for model in scored_models(results)]
        needed = (stage for one in found for stage in one.model.needs() if stage.on_demand)
        return [*needed, *found]

    @property
    def name(self) -> str:
        """``scores/LABEL``."""
        return f"scores/{self.model.label}"

    @property
    def doing(self) -> str:
        """What is done, in the log and in messages."""
        return f"evaluate {self.model.label}"

    @property
    def trainer(self) -> Mapping[str, Any] | None:
        """The recipe's options."""
        return self.results.recipe.trainer

    def about(self) -> str:
        """What is scored on."""
        return "all test splits"

    def needs(self) -> list[Stage]:
        """The experts, whose heads are used, and what the model is made of."""
        return [*expert_stages(self.results), *self.model.needs()]

    def depends_on(self) -> dict[str, Any]:
        """Heads, rows and metrics; the model's weights; the form of what is kept."""
        heads = expert_digests(self.results)
        scored = score_inputs(self.results.recipe, heads, "test")
        return {**scored, "predictions": FORMAT, **self.model.depends_on()}

    def run(self, context: Context) -> None:
        """Score the model."""
        from pave_lightning.evaluation import refuse_non_finite
        from pave_lightning.pipeline.evaluating import score_on_test
        from pave_lightning.tasks.predictions import FILE, write_predictions

        with doing(self.doing):
            candidate, facts = self.model.by_itself(context)
            scores = score_on_test(context, candidate, alone=self.trainer is None, own=self.model.own_tokens)
            try:
                refuse_non_finite(scores, self.model.words, BROKEN_OUTPUTS)
            except PaveError as error:
                if not self.model.may_fail:
                    raise
                log.warning("%s", error)
            if is_rank_zero():
                with context.writing(self) as writer:
                    plain = {task: {"metrics": one.metrics, "examples": one.examples} for task, one in scores.items()}
                    writer.result.update(facts, scores=plain)
                    kept = {task: one.predictions for task, one in scores.items() if one.predictions is not None}
                    classes = {task.name: task.class_names for task in context.recipe.tasks}
                    write_predictions(writer.path / FILE, kept, classes)


def scored_models(results: Results) -> Iterator[ScoredModel]:
    """Every model that a run scores, in the order of its tables."""
    yield from untouched_models(results)
    yield from controls(results)
    yield from (ScoredMerge(results, *asked) for asked in results.recipe.merged_models())


def controls(results: Results) -> Iterator[ScoredModel]:
    """What merged models are to be compared with, under the heads that these are scored under.

    Base and experts are always scored under the experts' heads, so they are controls under fitted heads only.
    """
    recipe = results.recipe
    fits = recipe.fitted_heads
    if "base" in recipe.controls:
        yield from (ScoredFitted(results, ScoredBase(results), heads) for heads in fits)
    if fits and "probe" in recipe.controls:
        there = "base" in recipe.controls and any(heads.fit == "labels" for heads in fits)
        if not there:
            yield ScoredFitted(results, ScoredBase(results), fits[0].model_copy(update={"fit": "labels"}))
    if "joint" in recipe.controls:
        yield ScoredJoint(results)
        yield from (ScoredFitted(results, ScoredJoint(results), heads) for heads in fits)
    if "experts" in recipe.controls:
        # Turned onto itself an expert stays as it is.
        own = (heads for heads in fits if heads.fit != "orthogonal")
        yield from (ScoredFitted(results, ScoredExperts(results), heads) for heads in own)
    if "each" in recipe.controls:
        for task in recipe.tasks:
            alone = ScoredExpert(results, task)
            yield from (
                ScoredFitted(results, alone, heads) if heads.fitted else alone for heads in recipe.kinds_of_heads
            )


def untouched_models(results: Results) -> Iterator[ScoredModel]:
    """Base and experts, and the purified experts where the recipe asks for them."""
    yield ScoredBase(results)
    yield ScoredExperts(results)
    if results.recipe.evaluate.purified_experts:
        found = purifications(results.recipe)
        yield from (ScoredPurifiedExperts(results, options, alone=len(found) == 1) for options in found)
