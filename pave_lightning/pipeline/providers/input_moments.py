"""The second moments of all inputs of the experts' layers."""

from __future__ import annotations

from collections.abc import Iterator

from pave_lightning.merging import Need
from pave_lightning.pipeline.providers.base import provides
from pave_lightning.pipeline.providers.moments import CapturedStatistics
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.recipe.schema import Recipe


@provides(Need.INPUT_MOMENTS)
class InputMoments(CapturedStatistics):
    """Statistics that hold the moments of inputs, whatever is smaller."""

    def problems(self, step: MergeStep, recipe: Recipe, *, needed: bool) -> Iterator[str]:
        """Moments of outputs are captured in their place."""
        if needed and recipe.capture.moments != "input":
            yield f"{step.method} needs the second moments of all inputs; set capture.moments: input"
