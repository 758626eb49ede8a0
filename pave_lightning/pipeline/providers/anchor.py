"""The scaled task vector of a model that another step has merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pave_lightning.merging import Evidence, MergeMethod, Need, method_named
from pave_lightning.pipeline.providers.base import Provider, provides
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.merge import MergeStage
from pave_lightning.recipe.schema import MergeStep, Recipe

if TYPE_CHECKING:
    from pave_lightning.pipeline.context import Context


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

    def stages(self, merge: MergeStage) -> Sequence[Stage]:
        """What merging the anchor takes; not its own merge, of which only what it chose is looked up."""
        return _anchor(merge).needs()

    def inputs(self, merge: MergeStage) -> dict[str, Any]:
        """What the anchor depends on."""
        return {"anchor": _anchor(merge).inputs()}

    def provide(self, evidence: Evidence, context: Context, method: MergeMethod, merge: MergeStage) -> Evidence:
        """The evidence with the anchor's task vector."""
        return replace(evidence, anchor=context.chooser.anchor(merge.step, merge.vectors))


def _anchor(merge: MergeStage) -> MergeStage:
    """The anchor of a merge, on the same task vectors."""
    step = merge.results.recipe.step(str(merge.step.anchor))
    return MergeStage(merge.results, step.model_copy(update={"purify": merge.step.purify}), merge.vectors)
