"""A task's expert as merged models read: with the vocabulary that all have in common."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pave_lightning.errors import PaveError, doing
from pave_lightning.pipeline.context import Context, shared
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stage import Stage
from pave_lightning.tasks.task import Task
from pave_lightning.weights import Checkpoint, ExpertTaskVectors, TaskVectors
from pave_lightning.weights.backbones import backbone_of
from pave_lightning.weights.embeddings import share_rows

if TYPE_CHECKING:
    pass

from pave_lightning.pipeline.stages.fit import FitStage, own_folders

log = logging.getLogger("pave_lightning")


class AlignStage(Stage):
    """A task's expert with the vocabulary that all have in common, where a recipe lets vocabularies differ.

    It stands for the expert in everything but its own scores, which are taken with its own tokenizer. Where its tokens
    are the common ones, it is the expert itself.
    """

    command = "align"

    def __init__(self, results: Results, task: Task) -> None:
        super().__init__(results)
        self.of = task
        self.own = FitStage(results, task)

    @classmethod
    def all(cls, results: Results) -> list[AlignStage]:
        """One a task, where the recipe lets vocabularies differ."""
        recipe = results.recipe
        return [] if recipe.vocabulary == "error" else [cls(results, task) for task in recipe.tasks]

    @property
    def name(self) -> str:
        """``aligned/TASK``."""
        return self.results.name_for("aligned/", self.of, self.origin)

    def about(self) -> str:
        """Which tokens it is given."""
        return {
            "base_rows": "the expert with the base's tokens",
            "union": "the expert with the tokens of all experts",
        }[self.results.recipe.vocabulary]

    def needs(self) -> list[Stage]:
        """The expert; for a union all experts."""
        return list(FitStage.all(self.results)) if self._is_union else [self.own]

    def origin(self) -> dict[str, Any]:
        """What its name depends on: what the expert is made of."""
        return {**self.own.inputs(), "vocabulary": self.results.recipe.vocabulary}

    def depends_on(self) -> dict[str, Any]:
        """The experts whose tokens and rows go into it, the base, and what is kept of them."""
        recipe = self.results.recipe
        names = [task.name for task in recipe.tasks] if self._is_union else [self.of.name]
        digests = {name: FitStage(self.results, recipe.task(name)).digest() for name in names}
        # Inputs are compared without their order.
        order = {"order": names} if self._is_union else {}
        return {"experts": digests, **order, "base": self.results.base_digest, "vocabulary": recipe.vocabulary}

    def run(self, context: Context) -> None:
        """Write the expert with the common vocabulary, or note where it is."""
        from pave_lightning.experts.alignment import Alignment, alignment_notes

        vocabulary = context.recipe.vocabulary
        if vocabulary == "error":
            raise PaveError("experts are aligned only where vocabulary is base_rows or union")
        experts = own_folders(context.results)
        taken = experts if self._is_union else {self.of.name: experts[self.of.name]}
        alignment = Alignment(vocabulary, context.base, context.architecture, taken)
        with doing(f"align the tokens of {self.of.name}"), context.writing(self) as writer:
            if alignment.differs(self.of.name):
                own = {self.of.name: alignment.own_tokens(self.of.name)}
                for note in alignment_notes(alignment.tokens, own):
                    log.info("  %s", note)
                alignment.write(self.of.name, writer.path)
            else:
                writer.result["folder"] = str(self.own.checkpoint())

    @property
    def _is_union(self) -> bool:
        return self.results.recipe.vocabulary == "union"

    # What others ask of an expert.

    @property
    def run_name(self) -> str:
        """The name of the expert's run in MLflow."""
        return self.own.run_name

    def params(self) -> dict[str, Any]:
        """What MLflow notes of the expert."""
        return self.own.params()

    def checkpoint(self) -> Path:
        """The folder of the aligned expert.

        Raises:
            PaveError: it is missing or stale.
        """
        return self.results.place(self)

    def digest(self) -> str:
        """What identifies it: its own files, or the expert where it is the expert itself.

        Raises:
            PaveError: it is missing or stale.
        """
        found = self.results.finished(self)
        return self.own.digest() if "folder" in found.result else found.digest()


def expert_stage(results: Results, task: Task) -> FitStage | AlignStage:
    """The stage that gives a task's expert as merged models read: with the tokens that all have in common."""
    return (FitStage if results.recipe.vocabulary == "error" else AlignStage)(results, task)


def expert_stages(results: Results) -> list[FitStage | AlignStage]:
    """Those of all tasks; see `FitStage.all` for their order."""
    return [expert_stage(results, stage.task) for stage in FitStage.all(results)]


def expert_folder(results: Results, name: str) -> Path:
    """The folder of a task's finished expert.

    By name: a scale search reads fewer rows with a changed copy of the task, which has no expert of its own.

    Raises:
        PaveError: it is missing or stale.
    """
    return expert_stage(results, results.recipe.task(name)).checkpoint()


@shared
def experts(context: Context) -> dict[str, Checkpoint]:
    """Each task's finished expert."""
    folders = {task.name: expert_folder(context.results, task.name) for task in context.recipe.tasks}
    return {name: context.architecture.checkpoint(folder) for name, folder in folders.items()}


@shared
def own_experts(context: Context) -> dict[str, Checkpoint]:
    """Each task's finished expert with its own tokens, as it is scored itself."""
    return {name: context.architecture.checkpoint(place) for name, place in own_folders(context.results).items()}


@shared
def plain_vectors(context: Context) -> TaskVectors:
    """The plain task vectors of all finished experts."""
    expert_digests(context.results)
    return ExpertTaskVectors(context.base, experts(context), context.architecture)


def classifier(context: Context, name: str) -> nn.Module:
    """A task's expert with its head, in memory; its token embedding has the base's rows, see `share_rows`."""
    from pave_lightning.experts.loading import load_expert

    folder = expert_folder(context.results, name)
    model = load_expert(folder, context.recipe.task(name), context.base_folder)
    share_rows(backbone_of(model), context.token_rows)
    return model


def expert_digests(results: Results) -> dict[str, str]:
    """What identifies each task's expert, in the order of the tasks.

    Raises:
        PaveError: an expert is missing or stale.
    """
    return {task.name: expert_stage(results, task).digest() for task in results.recipe.tasks}
