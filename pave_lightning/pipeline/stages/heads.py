"""Heads whose last layers are fitted to the features of one model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pave_lightning.errors import doing
from pave_lightning.evaluation.options import Heads
from pave_lightning.pipeline.context import Context, shared
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.align import expert_digests, expert_stages, experts
from pave_lightning.pipeline.stages.capture import shown_examples
from pave_lightning.system.files import write_tensors

if TYPE_CHECKING:
    from pave_lightning.evaluation import Candidate
    from pave_lightning.evaluation.heads import FittedHeads, HeadRows
    from pave_lightning.subspace.linear_fit import LinearFit
    from pave_lightning.tasks.task import Batch

log = logging.getLogger("pave_lightning")

# Raised when fits change meaning, so that older ones are made anew.
FORMAT = 2
# The fitted last layers of all tasks' heads.
FITTED_HEADS_FILE = "heads.safetensors"


class Featured(Protocol):
    """A model whose features heads are fitted to."""

    @property
    def label(self) -> str:
        """What tells it from others in the names of folders."""

    def needs(self) -> Sequence[Stage]:
        """The stages that it is made of."""

    def depends_on(self) -> dict[str, Any]:
        """What identifies its weights, as plain JSON values."""

    def candidate(self, context: Context) -> tuple[Candidate, dict[str, Any]]:
        """The model, and facts about it."""


class HeadsStage(Stage):
    """The last layers of all tasks' heads, fitted to what a model gives them.

    Args:
        results: the recipe, and what is there of it.
        model: the model.
        heads: how they are fitted.
    """

    command = "evaluate"
    on_demand = True

    def __init__(self, results: Results, model: Featured, heads: Heads) -> None:
        super().__init__(results)
        self.model, self.heads = model, heads

    @classmethod
    def all(cls, results: Results) -> tuple[()]:
        """None but those that scores need."""
        return ()

    @property
    def name(self) -> str:
        """``heads/MODEL-FIT``."""
        return f"heads/{self.model.label}-{self.heads.label}"

    def about(self) -> str:
        """How they are fitted, and on how many rows."""
        return f"fitted to {self.heads.fit}, at most {self.heads.rows} training rows a task"

    def needs(self) -> list[Stage]:
        """The experts and the model."""
        return [*expert_stages(self.results), *self.model.needs()]

    def depends_on(self) -> dict[str, Any]:
        """The model, the experts, the rows, and the labels where they are used."""
        return {**self.model.depends_on(), **head_inputs(self.results, self.heads)}

    def run(self, context: Context) -> None:
        """Run the model and the experts on the rows, and solve for every task's last layer."""
        with doing(f"fit heads of {self.model.label} ({self.heads.label})"), context.writing(self) as writer:
            fits = fit_heads(context, self.model.candidate(context)[0], self.heads).heads
            tensors = {
                f"{task}.{part}": tensor
                for task, fit in fits.items()
                for part, tensor in (("weight", fit.weight), ("bias", fit.bias))
            }
            write_tensors(writer.path / FITTED_HEADS_FILE, tensors)
            writer.result.update(strengths={task: fit.strength for task, fit in fits.items()})

    def load(self) -> dict[str, LinearFit]:
        """The last layers of those tasks that have a fitted one."""
        from safetensors.torch import load_file

        from pave_lightning.subspace.linear_fit import LinearFit

        found = load_file(self.results.path(self) / FITTED_HEADS_FILE)
        tasks = self.results.finished(self).result["strengths"]
        return {task: LinearFit(found[f"{task}.weight"], found[f"{task}.bias"]) for task in tasks}


def head_inputs(results: Results, heads: Heads) -> dict[str, Any]:
    """What fitted heads depend on besides the model: options, experts, rows, and labels where they are used."""
    tasks = results.recipe.tasks
    labels = {task.name: task.labelled_by for task in tasks} if heads.fit == "labels" else {}
    return {
        "format": FORMAT,
        "experts": expert_digests(results),
        "heads": heads.model_dump(),
        "rows": {task.name: shown_examples(results, task) for task in tasks},
        **({"labelled": labels} if labels else {}),
    }


def fit_heads(context: Context, candidate: Candidate, heads: Heads) -> FittedHeads:
    """A model under heads whose last layers are fitted to it.

    A task keeps its expert's head, with a word in the log, where that does not end in a linear layer, or where the
    model gives all rows the same features.

    Args:
        context: what the stages share.
        candidate: the model.
        heads: how they are fitted.

    Raises:
        PaveError: a task has too few rows, or no labels where they are needed.
        NotFiniteError: features or outputs hold NaN or infinity.
    """
    from pave_lightning.evaluation.heads import FittedHeads, UnvaryingError, fit_head
    from pave_lightning.pipeline.evaluating import evaluator

    model, shown = evaluator(context), _shown_rows(context)
    theirs = shown.of_experts(heads.rows)
    mine = model.head_rows(candidate, shown.batches(heads.rows))
    fits = {}
    for task in context.recipe.tasks:
        _, layer = model.last_layer(task.name)
        if layer is None:  # told when the rows were read
            continue
        try:
            rows = mine[task.name], theirs[task.name]
            fits[task.name] = fit_head(task, heads, *rows, layer, seed=context.recipe.seed)
        except UnvaryingError as error:
            log.warning("  %s; it keeps its expert's head", error)
    return FittedHeads(candidate, fits, {task.name: task for task in context.recipe.tasks})


@shared
def _shown_rows(context: Context) -> ShownRows:
    return ShownRows(context)


class ShownRows:
    """The training rows that heads are fitted on, and what the experts make of them; read when first asked for.

    A scale search fits heads to many models on the same rows.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._batches: dict[int, dict[str, Sequence[Batch]]] = {}
        self._of_experts: dict[int, dict[str, HeadRows]] = {}

    def batches(self, rows: int) -> Mapping[str, Sequence[Batch]]:
        """So many rows of each task whose head ends in a linear layer."""
        from pave_lightning.pipeline.evaluating import evaluator
        from pave_lightning.pipeline.task_data import shown_batches

        if rows not in self._batches:
            found: dict[str, Sequence[Batch]] = {}
            for task in self._context.recipe.tasks:
                if evaluator(self._context).last_layer(task.name)[1] is None:
                    log.warning("  task '%s': its head does not end in a linear layer, so it is kept", task.name)
                else:
                    found[task.name] = shown_batches(self._context, task, rows)
            self._batches[rows] = found
        return self._batches[rows]

    def of_experts(self, rows: int) -> Mapping[str, HeadRows]:
        """What the experts give their own heads for the rows of each task."""
        from pave_lightning.evaluation import ExpertsCandidate
        from pave_lightning.pipeline.evaluating import evaluator

        if rows not in self._of_experts:
            candidate = ExpertsCandidate(experts(self._context))
            self._of_experts[rows] = evaluator(self._context).head_rows(candidate, self.batches(rows))
        return self._of_experts[rows]
