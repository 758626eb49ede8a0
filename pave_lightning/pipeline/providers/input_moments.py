"""The second moments of all inputs of the experts' layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pave_lightning.merging import Evidence, MergeMethod, Need
from pave_lightning.pipeline.providers.base import Provider, provides
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.capture import CaptureStage, statistics_digests
from pave_lightning.recipe.schema import MergeStep, Recipe

if TYPE_CHECKING:
    from pave_lightning.pipeline.context import Context
    from pave_lightning.pipeline.stages.merge import MergeStage


class CapturedStatistics(Provider):
    """What the experts' layers saw, from the capture stages."""

    def stages(self, merge: MergeStage) -> Sequence[Stage]:
        """The captures of all tasks."""
        return CaptureStage.all(merge.results)

    def inputs(self, merge: MergeStage) -> dict[str, Any]:
        """What was captured."""
        return {"statistics": statistics_digests(merge.results)}

    def provide(self, evidence: Evidence, context: Context, method: MergeMethod, merge: MergeStage) -> Evidence:
        """The evidence with the statistics of all tasks."""
        return replace(evidence, statistics=context.statistics)


@provides(Need.INPUT_MOMENTS)
class InputMoments(CapturedStatistics):
    """Statistics that hold the moments of inputs, whatever is smaller."""

    def problems(self, step: MergeStep, recipe: Recipe, *, needed: bool) -> Iterator[str]:
        """Moments of outputs are captured in their place."""
        if needed and recipe.capture.moments != "input":
            yield f"{step.method} needs the second moments of all inputs; set capture.moments: input"
