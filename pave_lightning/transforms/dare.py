"""DARE: drop elements of the task vectors at random and rescale the rest."""

from __future__ import annotations

from pave_lightning.merging import Evidence
from pave_lightning.merging.methods.dare import DareOptions, DroppedTaskVectors
from pave_lightning.purification.options import Compute
from pave_lightning.transforms.base import Transform, vector_transform
from pave_lightning.weights import TaskVectors


@vector_transform("dare")
class DareDropping(Transform[DareOptions]):
    """What the merge method `dare` does before it adds up, for any method; the same elements go, by the same seed.

    Source: Yu et al., *Language Models are Super Mario*, ICML 2024 (arXiv 2311.03099).
    """

    summary = "drop elements at random, rescale the rest"
    source = "Yu et al. 2024, arXiv 2311.03099"
    Options = DareOptions

    def apply(self, vectors: TaskVectors, evidence: Evidence, compute: Compute) -> DroppedTaskVectors:
        """The task vectors after drop and rescale."""
        return DroppedTaskVectors(vectors, self.options)
