"""Adapters of low rank, which the task vectors themselves hold."""

from __future__ import annotations

from collections.abc import Iterator

from pave_lightning.merging import Evidence, MergeMethod, Need
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.providers.base import MergeRequest, Provider, provides
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.recipe.schema import Recipe


@provides(Need.LOW_RANK)
class LowRankAdapters(Provider):
    """Nothing besides the task vectors, which purification must have left alone."""

    def problems(self, step: MergeStep, recipe: Recipe, *, needed: bool) -> Iterator[str]:
        """Purified task vectors have no factors of low rank."""
        if needed and "purified" in step.vectors:
            yield f"{step.method} merges adapters, which purification leaves none of; set vectors: [plain]"

    def provide(self, evidence: Evidence, context: Context, method: MergeMethod, request: MergeRequest) -> Evidence:
        """The evidence as it is."""
        return evidence
