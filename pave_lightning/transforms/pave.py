"""PAVE: keep the output directions that each task itself excites."""

from __future__ import annotations

from collections.abc import Iterator

from pave_lightning.errors import nearest
from pave_lightning.merging import Evidence, Need
from pave_lightning.purification import PurifiedTaskVectors
from pave_lightning.purification.options import Compute, Purify, ratios
from pave_lightning.purification.vectors import budget_problems
from pave_lightning.transforms.base import Transform, vector_transform
from pave_lightning.weights import ParameterKind, TaskVectors


@vector_transform("pave")
class Pave(Transform[Purify]):
    """Purification; see `PurifiedTaskVectors`.

    Behind another transform it purifies that one's result, by the second moments of the inputs that the experts saw as
    they were fine-tuned. Moments in other forms hold the expert's own weight, which is another one by then.

    Source: An, Yang, Torr, Ghanem, *Purifying Task Vectors in Knowledge-Aware Subspace for Model Merging*
    (arXiv 2510.14697).
    """

    summary = "keep the output directions that the task itself excites"
    source = "An et al. 2025, arXiv 2510.14697"
    needs = frozenset({Need.MOMENTS, Need.INPUT_MOMENTS})
    section = "purify"
    Options = Purify

    def wanted(self, *, changed: bool) -> frozenset[Need]:
        """Moments of inputs where the experts were changed, else of any form; none where none are read."""
        if not self.options.reads_statistics or self.options.changes_nothing:
            return frozenset()
        return frozenset({Need.INPUT_MOMENTS if changed else Need.MOMENTS})

    def problems(self, vectors: TaskVectors) -> Iterator[str]:
        """Tasks that there are not, and ratios out of reach, of all ratios that are tried."""
        chosen = self.options.tasks or vectors.tasks
        for key, named in (("tasks", chosen), ("task_rho", self.options.task_rho)):
            yield from (
                f"{key}: no task is named '{task}'; {nearest(task, vectors.tasks)}"
                for task in named
                if task not in vectors.tasks
            )
        layers = [parameter for parameter in vectors.parameters if parameter.kind is ParameterKind.LINEAR]
        for options in ratios(self.options):
            yield from budget_problems(options, layers, chosen)

    def apply(self, vectors: TaskVectors, evidence: Evidence, compute: Compute) -> TaskVectors:
        """The purified task vectors, computed layer by layer; a ratio of 1 leaves them as they are."""
        if self.options.changes_nothing:
            return vectors
        return PurifiedTaskVectors(vectors, evidence.statistics, self.options, compute)
