"""The second moments of all inputs of the experts' layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pave_lightning.merging import Evidence, MergeMethod, Need
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.providers.base import MergeRequest, Provider, provides
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.capture import CaptureStage, statistics, statistics_digests
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.recipe.schema import Recipe


class CapturedStatistics(Provider):
    """What the experts' layers saw, from the capture stages."""

    def stages(self, request: MergeRequest) -> Sequence[Stage]:
        """The captures of all tasks."""
        return CaptureStage.all(request.results)

    def inputs(self, request: MergeRequest) -> dict[str, Any]:
        """What was captured."""
        return {"statistics": statistics_digests(request.results)}

    def provide(self, evidence: Evidence, context: Context, method: MergeMethod, request: MergeRequest) -> Evidence:
        """The evidence with the statistics of all tasks."""
        return replace(evidence, statistics=statistics(context))


@provides(Need.INPUT_MOMENTS)
class InputMoments(CapturedStatistics):
    """Statistics that hold the moments of inputs, whatever is smaller."""

    def problems(self, step: MergeStep, recipe: Recipe, *, needed: bool) -> Iterator[str]:
        """Moments of outputs are captured in their place."""
        if needed and recipe.capture.moments != "input":
            yield f"{step.method} needs the second moments of all inputs; set capture.moments: input"
