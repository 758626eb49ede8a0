"""Adapters of low rank, which the task vectors themselves hold."""

from __future__ import annotations

from collections.abc import Iterator

from pave_lightning.errors import listed
from pave_lightning.merging import Evidence, Need
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.providers.base import Asking, MergeRequest, Provider, provides
from pave_lightning.pipeline.stacks import stack_of
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.recipe.schema import Recipe


@provides(Need.LOW_RANK)
class LowRankAdapters(Provider):
    """Nothing besides the task vectors, of whose factors the transforms must have left something."""

    def problems(self, step: MergeStep, recipe: Recipe, *, needed: bool) -> Iterator[str]:
        """Transformed task vectors may have no factors of low rank; purified ones have none."""
        left = {name: stack_of(recipe, name, step).keeps_factors for name in step.vectors} if needed else {}
        without = [name for name, kept in left.items() if not kept]
        if without:
            what = "purification leaves" if without == ["purified"] else f"the transforms of {listed(without)} leave"
            fitting = [name for name in left if left[name]] or ["plain"]
            yield f"{step.method} merges adapters, which {what} none of; set vectors: [{', '.join(fitting)}]"

    def provide(self, evidence: Evidence, context: Context, asking: Asking, request: MergeRequest) -> Evidence:
        """The evidence as it is."""
        return evidence
