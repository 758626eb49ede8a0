"""The heads of one model, their last layers fitted to its features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from pave_lightning.errors import PaveError, doing
from pave_lightning.evaluation.options import Heads
from pave_lightning.merging.folders import FITTED_HEADS_FILE
from pave_lightning.pipeline.context import Context, shared
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.capture import shown_examples
from pave_lightning.pipeline.stages.fit import FitStage, expert_digests, experts
from pave_lightning.system.files import write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from pave_lightning.evaluation import Candidate
    from pave_lightning.evaluation.heads import HeadRows
    from pave_lightning.subspace.linear_fit import LinearFit

FORMAT = 1


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
        return [*FitStage.all(self.results), *self.model.needs()]

    def depends_on(self) -> dict[str, Any]:
        """The model, the experts, the rows, and the labels where they are used."""
        tasks = self.results.recipe.tasks
        labels = {task.name: task.labelled_by for task in tasks} if self.heads.fit == "labels" else {}
        return {
            "format": FORMAT,
            **self.model.depends_on(),
            "experts": expert_digests(self.results),
            "heads": self.heads.model_dump(),
            "rows": {task.name: shown_examples(self.results, task) for task in tasks},
            **({"labelled": labels} if labels else {}),
        }

    def run(self, context: Context) -> None:
        """Run the model and the experts on the rows, and solve for every task's last layer."""
        from pave_lightning.evaluation.heads import fit_head
        from pave_lightning.pipeline.evaluating import evaluator

        with doing(f"fit heads of {self.model.label} ({self.heads.label})"), context.writing(self) as writer:
            started = perf_counter()
            mine = rows_of(context, self.model, self.heads.rows)
            theirs = expert_rows(context)(self.heads.rows)
            passed = perf_counter()
            tensors: dict[str, Tensor] = {}
            names: dict[str, str] = {}
            for task in context.recipe.tasks:
                name, layer = evaluator(context).last_layer(task.name)
                if name is None or layer is None:
                    raise PaveError(
                        f"task '{task.name}': its head does not end in a linear layer; fit none of its heads"
                    )
                rows = mine[task.name], theirs[task.name]
                fit = fit_head(task, self.heads, *rows, layer, seed=context.recipe.seed)
                tensors |= {f"{task.name}.weight": fit.weight, f"{task.name}.bias": fit.bias}
                names[task.name] = name
                writer.result.setdefault("strengths", {})[task.name] = fit.strength
            write_tensors(writer.path / FITTED_HEADS_FILE, tensors, {"layers": json.dumps(names)})
            writer.result["seconds"] = {"passes": passed - started, "fits": perf_counter() - passed}

    def load(self) -> dict[str, LinearFit]:
        """The last layers by task."""
        from safetensors.torch import load_file

        from pave_lightning.subspace.linear_fit import LinearFit

        found = load_file(self.results.path(self) / FITTED_HEADS_FILE)
        tasks = self.results.recipe.tasks
        return {task.name: LinearFit(found[f"{task.name}.weight"], found[f"{task.name}.bias"]) for task in tasks}


def rows_of(context: Context, model: Featured, rows: int) -> dict[str, HeadRows]:
    """What the tasks' heads are given by a model for a sample of training rows, and say of them."""
    from pave_lightning.pipeline.evaluating import evaluator
    from pave_lightning.pipeline.task_data import shown_batches

    batches = {task.name: shown_batches(context, task, rows) for task in context.recipe.tasks}
    return evaluator(context).head_rows(model.candidate(context)[0], batches)


@shared
def expert_rows(context: Context) -> RowsOfExperts:
    """What the experts give their own heads, made once for each number of rows."""
    return RowsOfExperts(context)


class RowsOfExperts:
    """What the experts give their own heads for so many training rows a task; made when it is first asked for."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._known: dict[int, dict[str, HeadRows]] = {}

    def __call__(self, rows: int) -> dict[str, HeadRows]:
        """The rows by task."""
        from pave_lightning.evaluation import ExpertsCandidate
        from pave_lightning.pipeline.evaluating import evaluator
        from pave_lightning.pipeline.task_data import shown_batches

        if rows not in self._known:
            batches = {task.name: shown_batches(self._context, task, rows) for task in self._context.recipe.tasks}
            candidate = ExpertsCandidate(experts(self._context))
            self._known[rows] = evaluator(self._context).head_rows(candidate, batches)
        return self._known[rows]
