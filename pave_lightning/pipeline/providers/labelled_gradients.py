"""Each task's mean absolute gradients of the labelled loss at the base's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pave_lightning.merging import Evidence, Need
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.providers.base import Asking, MergeRequest, Provider, provides
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.gradients import gradient_stages


@provides(Need.GRADIENTS)
class LabelledGradients(Provider):
    """Absolute gradients, from the gradient stages."""

    loads_weights = True

    def stages(self, request: MergeRequest) -> Sequence[Stage]:
        """Gradients of all tasks."""
        return gradient_stages(request.results, "absolute")

    def inputs(self, request: MergeRequest) -> dict[str, Any]:
        """What the gradients depend on."""
        return {"absolute": {stage.of.name: stage.inputs() for stage in gradient_stages(request.results, "absolute")}}

    def provide(self, evidence: Evidence, context: Context, asking: Asking, request: MergeRequest) -> Evidence:
        """The evidence with the gradients of all tasks."""
        found = {stage.of.name: stage.load() for stage in gradient_stages(context.results, "absolute")}
        return replace(evidence, gradients=found)
