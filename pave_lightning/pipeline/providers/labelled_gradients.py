"""Each task's mean absolute gradients of the labelled loss at the base's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pave_lightning.merging import Evidence, MergeMethod, Need
from pave_lightning.pipeline.providers.base import Provider, provides
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.gradients import gradient_stages

if TYPE_CHECKING:
    from pave_lightning.pipeline.context import Context
    from pave_lightning.pipeline.stages.merge import MergeStage


@provides(Need.GRADIENTS)
class LabelledGradients(Provider):
    """Absolute gradients, from the gradient stages."""

    def stages(self, merge: MergeStage) -> Sequence[Stage]:
        """Gradients of all tasks."""
        return gradient_stages(merge.results, "absolute")

    def inputs(self, merge: MergeStage) -> dict[str, Any]:
        """What the gradients depend on."""
        return {"absolute": {stage.of.name: stage.inputs() for stage in gradient_stages(merge.results, "absolute")}}

    def provide(self, evidence: Evidence, context: Context, method: MergeMethod, merge: MergeStage) -> Evidence:
        """The evidence with the gradients of all tasks."""
        found = {stage.of.name: stage.load() for stage in gradient_stages(context.results, "absolute")}
        return replace(evidence, gradients=found)
