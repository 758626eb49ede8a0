"""A merged model: all experts merged by one method, on plain or on purified task vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pave_lightning.errors import doing
from pave_lightning.evaluation.options import ScaleSearch
from pave_lightning.merging import Evidence, MergeMethod, method_named
from pave_lightning.merging.folders import MergeContext, write_merged
from pave_lightning.pipeline.context import Context, shared
from pave_lightning.pipeline.method_seed import with_seed
from pave_lightning.pipeline.providers import MergeRequest, evidence, providers_of
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.run_folder import Manifest
from pave_lightning.pipeline.scoring import score_inputs
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.fit import FitStage, expert_digests, experts
from pave_lightning.pipeline.stages.purify import needed_for, purification_inputs, task_vectors
from pave_lightning.recipe.merge_step import MergeStep, Vectors

if TYPE_CHECKING:
    from pave_lightning.pipeline.tuning import Chooser

FORMAT = 2


class MergeStage(Stage):
    """A merge step on one kind of task vectors.

    Args:
        results: the recipe, and what is there of it.
        step: the merge step.
        vectors: what its task vectors are; all that follows from it is in `needs`, `depends_on` and `params`.
    """

    command = "merge"

    def __init__(self, results: Results, step: MergeStep, vectors: Vectors) -> None:
        super().__init__(results)
        self.step, self.vectors = step, vectors

    @classmethod
    def all(cls, results: Results) -> list[MergeStage]:
        """Every merged model that the recipe asks for."""
        return [cls(results, step, vectors) for step in results.recipe.merge for vectors in step.vectors]

    @property
    def name(self) -> str:
        """``merged/NAME-VECTORS``."""
        return f"merged/{self.label}"

    @property
    def label(self) -> str:
        """What tells the model from others in the names of folders."""
        return f"{self.step.name}-{self.vectors}"

    @property
    def request(self) -> MergeRequest:
        """What providers are asked for."""
        return MergeRequest(self.results, self.step, self.vectors)

    def about(self) -> str:
        """Method and scale."""
        scale = self.step.scale
        told = "" if scale is None else f", scale {scale if isinstance(scale, float) else 'searched'}"
        return f"{self.step.method}{told}"

    def needs(self) -> list[Stage]:
        """Experts, statistics and purified weights, and what the method's evidence is made of."""
        purified = needed_for(self.results, self.step.purify) if self.vectors == "purified" else []
        given: Iterable[Stage] = (
            stage for provider in providers_of(self.step.method) for stage in provider.stages(self.request)
        )
        return [*FitStage.all(self.results), *purified, *given]

    def depends_on(self) -> dict[str, Any]:
        """Experts, base, options, task vectors and evidence; what anything is chosen on."""
        recipe, step, method = self.results.recipe, self.step, method_named(self.step.method)
        experts = expert_digests(self.results)
        inputs: dict[str, Any] = {
            "format": FORMAT,
            "experts": experts,
            "base": self.results.base_digest,
            "step": step.model_dump(include={"method", "scale", "options"}),
        }
        if self.vectors == "purified":
            inputs["purified"] = purification_inputs(self.results, step.purify)
        if with_seed(step.method, step.options, recipe.seed) != step.options:
            inputs["seed"] = recipe.seed
        if method.ordered:
            # Inputs are compared without their order.
            inputs["order"] = [task.name for task in recipe.tasks]
        if method.batched:
            inputs["batch_size"] = recipe.capture.batch_size
        for provider in providers_of(step.method):
            inputs |= provider.inputs(self.request)
        if step.tune:
            inputs["tune"] = step.tune
        chosen = step.tune or (self.vectors == "purified" and step.purify.rho == "auto")
        if isinstance(step.scale, ScaleSearch) or chosen:
            inputs["search"] = score_inputs(recipe, experts, "validation")
        return inputs

    def run(self, context: Context) -> None:
        """Choose what the recipe leaves open, merge, and write the model."""
        step = self.step
        context.child(self.run_name, "merge", self.params())
        with doing(f"merge {step.name} ({self.vectors})"), context.writing(self) as writer:
            chosen = chooser(context).choose(step, self.vectors)
            facts = {"vectors": self.vectors, "options": chosen.method.options.model_dump(), **chosen.facts}
            facts |= {"anchor": step.anchor} if step.anchor else {}
            written = MergeContext(context.recipe.base, context.base, experts(context), context.architecture, facts)
            merged = None if chosen.merged is None else chosen.merged.vectors
            write_merged(
                writer.path,
                chosen.method,
                chosen.source,
                chosen.scale,
                written,
                merged=merged,
                evidence=chosen.evidence,
            )
            cost = {name: value for name, value in vars(chosen.cost).items() if math.isfinite(value)}
            writer.result.update(facts, form=chosen.method.form, cost=cost)

    def record(self, context: Context, found: Manifest) -> None:
        """What was chosen and what it took, in a run of its own."""
        context.record("merge", self.run_name, found.result, self.params())

    @property
    def run_name(self) -> str:
        """The name of the model's run in MLflow."""
        return f"merge:{self.step.name}:{self.vectors}"

    def params(self) -> dict[str, Any]:
        """What MLflow notes of the merge."""
        step = self.step
        params = {"method": step.method, "vectors": self.vectors, "asked_scale": step.scale, "options": step.options}
        params |= {"anchor": step.anchor} if step.anchor else {}
        params |= {"tune": step.tune} if step.tune else {}
        return {**params, "purify": step.purify.model_dump()} if self.vectors == "purified" else params


@shared
def chooser(context: Context) -> Chooser:
    """Chooses what merge steps leave open, and remembers it."""
    from pave_lightning.pipeline.evaluating import searcher
    from pave_lightning.pipeline.tuning import Chooser

    results = context.results

    def evidence_for(method: MergeMethod, step: MergeStep, vectors: Vectors) -> Evidence:
        return evidence(context, method, MergeRequest(results, step, vectors))

    def merged_before(step: MergeStep, vectors: Vectors) -> Mapping[str, Any] | None:
        found = results.current(MergeStage(results, step, vectors))
        return None if found is None else found.result

    vectors_of = partial(task_vectors, context)
    return Chooser(context.recipe, vectors_of, evidence_for, lambda: searcher(context), merged_before)
