"""What a task's gradients say of each weight."""

from __future__ import annotations

from typing import Any

from pave_lightning.errors import counted, doing
from pave_lightning.merging.evidence import KINDS
from pave_lightning.merging.folders import GRADIENTS_FILE, load_gradients
from pave_lightning.merging.passes import load_parameters
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.align import AlignStage, classifier, expert_stage, plain_vectors
from pave_lightning.pipeline.stages.capture import shown_examples
from pave_lightning.pipeline.stages.fit import FitStage
from pave_lightning.statistics.gradients import EXPERT_DIGEST, GradientKind, TaskGradients
from pave_lightning.tasks.task import Task
from pave_lightning.weights import model_digest
from pave_lightning.weights.backbones import backbone_of

FORMAT = 1


class GradientStage(Stage):
    """One kind of gradients of one task, taken once for every merge step that asks for it.

    Args:
        results: the recipe, and what is there of it.
        kind: ``fisher``, at the expert's weights, or ``absolute``, of the labelled loss at the base's.
        of: the task.
    """

    command = "merge"
    on_demand = True

    def __init__(self, results: Results, kind: GradientKind, of: Task) -> None:
        super().__init__(results)
        self.kind, self.of = kind, of

    @classmethod
    def all(cls, results: Results) -> tuple[()]:
        """None but those that a merge step needs."""
        return ()

    @property
    def name(self) -> str:
        """``gradients/KIND-TASK``."""
        return self.results.name_for(
            f"gradients/{self.kind}-", self.of, lambda: {"fit": self.expert.origin(), **self._options()}
        )

    @property
    def expert(self) -> FitStage | AlignStage:
        """The task's expert."""
        return expert_stage(self.results, self.of)

    def about(self) -> str:
        """What is taken, and of how many examples."""
        examples = self.results.recipe.capture.gradient_examples
        return f"{KINDS[self.kind]}, {counted(examples, 'training example')}"

    def needs(self) -> list[Stage]:
        """The task's expert."""
        return [self.expert]

    def depends_on(self) -> dict[str, Any]:
        """The expert and the examples; for labelled gradients also the base and the labels."""
        base = {"base": self.results.base_digest} if self.kind == "absolute" else {}
        return {"expert": self.expert.digest(), "kind": self.kind, **base, **self._options()}

    def run(self, context: Context) -> None:
        """Show the task's model its examples and keep what their gradients say."""
        from pave_lightning.experts.gradients import absolute_gradients, fisher_diagonal
        from pave_lightning.pipeline.task_data import shown_batches

        task, plain = self.of, plain_vectors(context)
        with doing(f"gradients of {task.name} ({self.kind})"), context.writing(self) as writer:
            model = classifier(context, task.name)
            batches = shown_batches(context, task, context.recipe.capture.gradient_examples)
            if self.kind == "fisher":
                values = fisher_diagonal(model, task, batches)
            else:
                base = {parameter.name: plain.base(parameter) for parameter in plain.parameters}
                load_parameters(backbone_of(model), base)
                values = absolute_gradients(model, task, batches)
            examples = sum(len(next(iter(batch.values()))) for batch in batches)
            of = {"task": task.name, EXPERT_DIGEST: model_digest(self.expert.checkpoint())}
            TaskGradients(self.kind, values, examples=examples, metadata=of).save(writer.path / GRADIENTS_FILE)
            writer.result["examples"] = examples

    def load(self) -> TaskGradients:
        """What was taken, read lazily."""
        return load_gradients(self.results.path(self))

    def _options(self) -> dict[str, Any]:
        capture = self.results.recipe.capture
        labels = {"labels": self.of.labelled_by} if self.kind == "absolute" else {}
        examples = {"examples": capture.gradient_examples}
        return {"format": FORMAT, **shown_examples(self.results, self.of), **labels, **examples}


def gradient_stages(results: Results, kind: GradientKind) -> list[GradientStage]:
    """One kind of gradients of every task."""
    return [GradientStage(results, kind, task) for task in results.recipe.tasks]
