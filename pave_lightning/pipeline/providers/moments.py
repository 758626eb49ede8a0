"""The second moments of what the experts' layers see, in whatever form they were captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pave_lightning.merging import Evidence, Need
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.providers.base import Asking, MergeRequest, Provider, provides
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.capture import CaptureStage, statistics, statistics_digests


@provides(Need.MOMENTS)
class CapturedStatistics(Provider):
    """What the experts' layers saw, from the capture stages."""

    def stages(self, request: MergeRequest) -> Sequence[Stage]:
        """The captures of all tasks."""
        return CaptureStage.all(request.results)

    def inputs(self, request: MergeRequest) -> dict[str, Any]:
        """What was captured."""
        return {"statistics": statistics_digests(request.results)}

    def provide(self, evidence: Evidence, context: Context, asking: Asking, request: MergeRequest) -> Evidence:
        """The evidence with the statistics of all tasks."""
        return replace(evidence, statistics=statistics(context))
