"""The scaled task vector of a model that another step has merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pave_lightning.merging import Evidence, Need, method_named
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.providers.base import Asking, MergeRequest, Provider, provides
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.merge import MergeStage, chooser
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.recipe.schema import Recipe


@provides(Need.ANCHOR)
class Anchor(Provider):
    """The step that the key ``anchor`` names, run on the same task vectors."""

    def problems(self, step: MergeStep, recipe: Recipe, *, needed: bool) -> Iterator[str]:
        """The key is missing, or there for nothing; the anchor is not one model for all tasks."""
        if (Need.ANCHOR in method_named(step.method).needs) != (step.anchor is not None):
            wants = "starts from a merged model; name its merge step with" if step.anchor is None else "has no use for"
            yield f"{step.method} {wants} the key 'anchor'"
        if step.anchor is not None and method_named(recipe.step(step.anchor).method).form != "static":
            yield f"its anchor '{step.anchor}' is not one model for all tasks; choose a static method"

    def stages(self, request: MergeRequest) -> Sequence[Stage]:
        """What merging the anchor takes; not its own merge, of which only what it chose is looked up."""
        return _anchor(request).needs()

    def inputs(self, request: MergeRequest) -> dict[str, Any]:
        """What the anchor depends on."""
        return {"anchor": _anchor(request).inputs()}

    def provide(self, evidence: Evidence, context: Context, asking: Asking, request: MergeRequest) -> Evidence:
        """The evidence with the anchor's task vector."""
        return replace(evidence, anchor=chooser(context).anchor(request.step, request.vectors))


def _anchor(request: MergeRequest) -> MergeStage:
    """The anchor of a merge, on the same task vectors."""
    return MergeStage(request.results, request.results.recipe.anchor_of(request.step), request.vectors)
