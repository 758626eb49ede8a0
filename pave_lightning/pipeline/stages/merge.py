"""A merged model: all experts merged by one method, on task vectors that one stack of transforms makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pave_lightning.errors import doing
from pave_lightning.evaluation.options import ScaleSearch
from pave_lightning.merging import Evidence, MergeMethod, method_named
from pave_lightning.merging.folders import MergeContext, write_merged
from pave_lightning.pipeline.context import Context, shared
from pave_lightning.pipeline.providers import MergeRequest, Provider, evidence, providers_of
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.run_folder import Manifest
from pave_lightning.pipeline.scoring import score_inputs
from pave_lightning.pipeline.seeds import with_seed
from pave_lightning.pipeline.stacks import TransformStack, stack_of
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.fit import FitStage, expert_digests, experts
from pave_lightning.pipeline.stages.purify import purification_inputs, purify_stages, task_vectors
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.transforms import transformed
from pave_lightning.transforms.pave import Pave
from pave_lightning.weights import TaskVectors

if TYPE_CHECKING:
    from pave_lightning.pipeline.tuning import Chooser

FORMAT = 3


class MergeStage(Stage):
    """A merge step on the task vectors of one stack of transforms.

    Args:
        results: the recipe, and what is there of it.
        step: the merge step.
        vectors: name of the stack.
    """

    command = "merge"

    def __init__(self, results: Results, step: MergeStep, vectors: str) -> None:
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

    @property
    def stack(self) -> TransformStack:
        """What is done to the task vectors before they are merged."""
        return self.request.stack

    def stack_as_chosen(self, facts: Mapping[str, Any]) -> TransformStack:
        """The stack with the ratio that was chosen, as the facts of the finished merge say."""
        if not self.stack.is_chosen:
            return self.stack
        purify = self.step.purify.model_copy(update={"rho": facts["rho"]})
        return stack_of(self.results.recipe, self.vectors, self.step.model_copy(update={"purify": purify}))

    @property
    def providers(self) -> list[Provider]:
        """The providers of what the method and the transforms need."""
        return providers_of(method_named(self.step.method).needs | self.stack.needs)

    def about(self) -> str:
        """Method and scale; the transforms where their stack's name alone does not say it."""
        scale, stack = self.step.scale, self.stack
        told = "" if scale is None else f", scale {scale if isinstance(scale, float) else 'searched'}"
        before = "" if stack.is_built_in else f", after {', '.join(transform.name for transform in stack.transforms)}"
        return f"{self.step.method}{told}{before}"

    def needs(self) -> list[Stage]:
        """Experts, what the evidence for method and transforms is made of, and purified weights."""
        given = [stage for provider in self.providers for stage in provider.stages(self.request)]
        purification = self.stack.purification
        purified = [] if purification is None else purify_stages(self.results, purification)
        return [*FitStage.all(self.results), *given, *purified]

    def depends_on(self) -> dict[str, Any]:
        """Experts, base, options, task vectors and evidence; what anything is chosen on."""
        recipe, step, method, stack = self.results.recipe, self.step, method_named(self.step.method), self.stack
        experts = expert_digests(self.results)
        inputs: dict[str, Any] = {
            "format": FORMAT,
            "experts": experts,
            "base": self.results.base_digest,
            "step": step.model_dump(include={"method", "scale", "options"}),
        }
        if stack.transforms:
            inputs["transforms"] = stack.described()
            inputs["purified"] = [
                purification_inputs(self.results, one.options) for one in stack.transforms if isinstance(one, Pave)
            ]
        if with_seed(method.Options, step.options, recipe.seed) != step.options:
            inputs["seed"] = recipe.seed
        if method.ordered or any(transform.ordered for transform in stack.transforms):
            # Inputs are compared without their order.
            inputs["order"] = [task.name for task in recipe.tasks]
        if method.batched:
            inputs["batch_size"] = recipe.capture.batch_size
        for provider in self.providers:
            inputs |= provider.inputs(self.request)
        if step.tune:
            inputs["tune"] = step.tune
        if isinstance(step.scale, ScaleSearch) or step.tune or stack.is_chosen:
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
            stack = self.stack_as_chosen(facts)
            facts |= {} if stack.is_built_in else {"transforms": stack.described()}
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
        step, stack = self.step, self.stack
        params = {"method": step.method, "vectors": self.vectors, "asked_scale": step.scale, "options": step.options}
        params |= {"anchor": step.anchor} if step.anchor else {}
        params |= {"tune": step.tune} if step.tune else {}
        params |= {"purify": step.purify.model_dump()} if "purify" in stack.inherited else {}
        return params if stack.is_built_in else {**params, "transforms": stack.described()}


@shared
def chooser(context: Context) -> Chooser:
    """Chooses what merge steps leave open, and remembers it."""
    from pave_lightning.pipeline.evaluating import searcher
    from pave_lightning.pipeline.tuning import Chooser

    results = context.results

    def vectors_of(step: MergeStep, vectors: str) -> TaskVectors:
        return stacked_vectors(context, MergeRequest(results, step, vectors))

    def evidence_for(method: MergeMethod, step: MergeStep, vectors: str) -> Evidence:
        return evidence(context, method, MergeRequest(results, step, vectors))

    def merged_before(step: MergeStep, vectors: str) -> Mapping[str, Any] | None:
        found = results.current(MergeStage(results, step, vectors))
        return None if found is None else found.result

    return Chooser(context.recipe, vectors_of, evidence_for, lambda: searcher(context), merged_before)


def stacked_vectors(context: Context, request: MergeRequest) -> TaskVectors:
    """The task vectors of a merge step whose ratio is fixed, once all that they need is there.

    A purification at the beginning of the stack was stored; what comes behind it is computed as it is read.
    """
    stack = request.stack
    vectors, computed = task_vectors(context, stack.purification), stack.transforms
    for transform in computed if stack.purification is None else computed[1:]:
        given = evidence(context, transform, request)
        vectors = transformed(vectors, [transform], given, context.recipe.compute)
    return vectors
