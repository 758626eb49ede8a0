"""The mean squares of what the scales of norms multiply."""

from __future__ import annotations

from collections.abc import Iterator

from pave_lightning.merging import Need
from pave_lightning.pipeline.providers.base import provides
from pave_lightning.pipeline.providers.moments import CapturedStatistics
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.recipe.schema import Recipe


@provides(Need.NORM_MOMENTS)
class NormMoments(CapturedStatistics):
    """Statistics that hold those of norms."""

    def problems(self, step: MergeStep, recipe: Recipe, *, needed: bool) -> Iterator[str]:
        """Norms are not captured."""
        if needed and not recipe.capture.norms:
            yield f"{step.method} needs what the scales of norms multiply; set capture.norms: true"
