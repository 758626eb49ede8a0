"""A merged model: all experts merged by one method, on task vectors that one stack of transforms makes.

It has the heads of its experts, or heads that were fitted to it.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pave_lightning.errors import doing
from pave_lightning.evaluation.options import EXPERT_HEADS, Heads, ScaleSearch
from pave_lightning.merging import Evidence, MergeMethod, method_named, selected
from pave_lightning.merging.folders import MergeContext, load_fitted_heads, write_fitted_heads, write_merged
from pave_lightning.pipeline.context import Context, shared
from pave_lightning.pipeline.providers import MergeRequest, Provider, evidence, providers_of
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.run_folder import Manifest, StageWriter
from pave_lightning.pipeline.scoring import score_inputs
from pave_lightning.pipeline.seeds import with_seed
from pave_lightning.pipeline.stacks import TransformStack, stack_of
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages.align import expert_digests, expert_stages, experts
from pave_lightning.pipeline.stages.heads import fit_heads, head_inputs
from pave_lightning.pipeline.stages.purify import purification_inputs, purify_stages, task_vectors
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.recipe.parameters import Parameters
from pave_lightning.recipe.write import Write
from pave_lightning.subspace.parallel import limited_threads
from pave_lightning.system.process_groups import ALONE
from pave_lightning.transforms import transformed
from pave_lightning.transforms.pave import Pave
from pave_lightning.weights import Checkpoint, TaskVectors

if TYPE_CHECKING:
    from pave_lightning.evaluation import Candidate
    from pave_lightning.evaluation.heads import FittedHeads
    from pave_lightning.evaluation.scale_search import ScaleSearcher
    from pave_lightning.pipeline.tuning import Chooser, MergeChoice

FORMAT = 3


class MergeStage(Stage):
    """A merge step on the task vectors of one stack of transforms, with one kind of heads.

    Where anything is chosen on validation data, it is chosen under these heads, so that models with other heads may
    have other weights. Where nothing is, or the heads say so (``search: false``), the weights are those of the model
    with its experts' heads.

    Args:
        results: the recipe, and what is there of it.
        step: the merge step.
        vectors: name of the stack.
        heads: the heads that it has.
    """

    command = "merge"

    def __init__(self, results: Results, step: MergeStep, vectors: str, heads: Heads = EXPERT_HEADS) -> None:
        super().__init__(results)
        self.step, self.vectors, self.heads = step, vectors, heads

    @classmethod
    def all(cls, results: Results) -> list[MergeStage]:
        """Every merged model that the recipe asks for, each after the one whose weights it has."""
        found: dict[tuple[str, str, str], MergeStage] = {}
        for step, vectors, heads in results.recipe.merged_models():
            stage = cls(results, step, vectors, heads)
            for one in (*stage.weights_from, stage):
                found.setdefault((step.name, vectors, one.heads.label), one)
        return list(found.values())

    @property
    def name(self) -> str:
        """``merged/NAME-VECTORS``, and ``-heads-FIT`` for heads that are fitted."""
        return f"merged/{self.label}"

    @property
    def label(self) -> str:
        """What tells the model from others in the names of folders."""
        fitted = f"-heads-{self.heads.label}" if self.heads.fitted else ""
        return f"{self.step.name}-{self.vectors}{fitted}"

    @property
    def weights_from(self) -> list[MergeStage]:
        """The model whose weights it has; none where it is merged itself."""
        searched = isinstance(self.step.scale, ScaleSearch) or self.step.tune or self.stack.is_chosen
        if not self.heads.fitted or (searched and self.heads.search):
            return []
        return [MergeStage(self.results, self.step, self.vectors)]

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

    @property
    def processes(self) -> int:
        """As many as the recipe says, unless the method or its anchor's cannot be divided."""
        if self.weights_from or self.serial_because:
            return 1
        return self.results.recipe.compute.processes

    @property
    def serial_because(self) -> str:
        """Why one process merges whatever the recipe says; empty where several may."""
        recipe, step = self.results.recipe, self.step
        while True:
            method = method_named(step.method)
            if not method.parallel:
                return f"{method.name}: {method.serial_because}"
            if step.anchor is None:
                return ""
            step = recipe.anchor_of(step)

    def about(self) -> str:
        """Method and scale; the transforms where their stack's name alone does not say it."""
        scale, stack = self.step.scale, self.stack
        told = "" if scale is None else f", scale {scale if isinstance(scale, float) else 'searched'}"
        before = "" if stack.is_built_in else f", after {', '.join(transform.name for transform in stack.transforms)}"
        heads = f", heads fitted to {self.heads.fit}" if self.heads.fitted else ""
        return f"{self.step.method}{told}{before}{heads}{self._division}"

    @property
    def _division(self) -> str:
        """In how many processes and where, if a recipe asks for several, or for another device than the CPU."""
        compute, told = self.results.recipe.compute, ""
        if self.weights_from:
            return told
        if compute.processes > 1:
            serial = self.serial_because
            told += f", in one process ({serial})" if serial else f", in {self.processes} processes"
        device = compute.device_of()
        if device != "cpu":
            cpu = method_named(self.step.method).cpu_because(device.partition(":")[0])
            told += f", on the CPU ({cpu})" if cpu else f", on {compute.device}"
        return told

    def needs(self) -> list[Stage]:
        """Experts, what the evidence for method and transforms is made of, and purified weights; or a merged model."""
        if self.weights_from:
            return [*expert_stages(self.results), *self.weights_from]
        given = [stage for provider in self.providers for stage in provider.stages(self.request)]
        purification = self.stack.purification
        purified = [] if purification is None else purify_stages(self.results, purification)
        return [*expert_stages(self.results), *given, *purified]

    def depends_on(self) -> dict[str, Any]:
        """Experts, base, options, task vectors and evidence; what anything is chosen on, what heads are fitted to."""
        fitted = head_inputs(self.results, self.heads) if self.heads.fitted else {}
        inputs = [self.results.finished(stage).digest() for stage in self.weights_from]
        made: dict[str, Any] = {"weights": inputs} if inputs else self._merged_from()
        return {**made, "fitted": fitted} if fitted else made

    def _merged_from(self) -> dict[str, Any]:
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
        if step.parameters != Parameters():
            inputs["parameters"] = step.parameters.model_dump()
        if step.write != Write() or self.results.base_in_halves:
            inputs["write"] = step.write.model_dump()
        if step.tune:
            inputs["tune"] = step.tune
        if isinstance(step.scale, ScaleSearch) or step.tune or stack.is_chosen:
            inputs["search"] = score_inputs(recipe, experts, "validation")
        if recipe.compute.threads is not None:
            inputs["threads"] = recipe.compute.threads
        return inputs

    def run(self, context: Context) -> None:
        """Choose what the recipe leaves open, merge, and write the model with its heads."""
        context.child(self.run_name, "merge", self.params())
        threads = context.recipe.compute.threads_of_each(context.group.size)
        with doing(f"merge {self.words}"), limited_threads(threads), self._writing(context) as writer:
            for stage in self.weights_from:
                writer.result.update(_taken(self.results.finished(stage), self.results.path(stage), writer.path))
            chosen = None if self.weights_from else self._merge(context, writer)
            if self.heads.fitted and context.group.is_first:
                fitted = None if chosen is None else chosen.fitted
                self._fit(context, writer, fitted or fit_heads(context, merged_model(context, writer.path), self.heads))

    def _writing(self, context: Context) -> AbstractContextManager[StageWriter]:
        return context.writing_together(self) if self.processes > 1 else context.writing(self)

    def _merge(self, context: Context, writer: StageWriter) -> MergeChoice:
        step = self.step
        chosen = chooser(context).choose(step, self.vectors, self.heads)
        facts = {"vectors": self.vectors, "options": chosen.method.options.model_dump(), **chosen.facts}
        facts |= {"anchor": step.anchor} if step.anchor else {}
        facts |= {"parameters": step.parameters.model_dump()} if step.parameters != Parameters() else {}
        stack = self.stack_as_chosen(facts)
        facts |= {} if stack.is_built_in else {"transforms": stack.described()}
        differ = context.recipe.vocabulary != "error"
        facts |= {"vocabulary": context.recipe.vocabulary} if differ else {}
        written = MergeContext(
            context.results.base_reference,
            context.base,
            experts(context),
            context.architecture,
            facts,
            one_vocabulary=differ,
        )
        merged = None if chosen.merged is None else chosen.merged.vectors
        write_merged(
            writer.path,
            chosen.method,
            chosen.source,
            chosen.scale,
            written,
            merged=merged,
            evidence=chosen.evidence,
            dtype=step.write.dtype,
            max_shard_size=step.write.max_shard_size,
            group=context.group if self.processes > 1 else ALONE,
        )
        cost = {name: value for name, value in vars(chosen.cost).items() if math.isfinite(value)}
        writer.result.update(facts, form=chosen.method.form, cost=cost)
        return chosen

    def _fit(self, context: Context, writer: StageWriter, fitted: FittedHeads) -> None:
        """Write fitted heads into the folder, and how they were fitted."""
        from pave_lightning.pipeline.evaluating import evaluator

        named = {task: (str(evaluator(context).last_layer(task)[0]), fit) for task, fit in fitted.heads.items()}
        facts = {**self.heads.model_dump(), "strengths": {task: fit.strength for task, fit in fitted.heads.items()}}
        write_fitted_heads(writer.path, context.architecture, named, facts)
        writer.result["heads"] = facts

    def record(self, context: Context, found: Manifest) -> None:
        """What was chosen and what it took, in a run of its own."""
        context.record("merge", self.run_name, found.result, self.params())

    @property
    def words(self) -> str:
        """The model in words, in the log and in messages."""
        heads = f", heads {self.heads.label}" if self.heads.fitted else ""
        return f"{self.step.name} ({self.vectors}{heads})"

    @property
    def run_name(self) -> str:
        """The name of the model's run in MLflow."""
        heads = f":heads-{self.heads.label}" if self.heads.fitted else ""
        return f"merge:{self.step.name}:{self.vectors}{heads}"

    def params(self) -> dict[str, Any]:
        """What MLflow notes of the merge."""
        step, stack = self.step, self.stack
        params = {"method": step.method, "vectors": self.vectors, "asked_scale": step.scale, "options": step.options}
        params |= {"anchor": step.anchor} if step.anchor else {}
        params |= {"tune": step.tune} if step.tune else {}
        params |= {"parameters": step.parameters.model_dump()} if step.parameters != Parameters() else {}
        params |= {"write": step.write.model_dump()} if step.write != Write() else {}
        params |= {"heads": self.heads.model_dump()} if self.heads.fitted else {}
        params |= {"purify": step.purify.model_dump()} if "purify" in stack.inherited else {}
        return params if stack.is_built_in else {**params, "transforms": stack.described()}


@shared
def chooser(context: Context) -> Chooser:
    """Chooses what merge steps leave open, and remembers it."""
    from pave_lightning.pipeline.tuning import Chooser

    results = context.results

    def vectors_of(step: MergeStep, vectors: str) -> TaskVectors:
        return stacked_vectors(context, MergeRequest(results, step, vectors))

    def evidence_for(method: MergeMethod, step: MergeStep, vectors: str) -> Evidence:
        return evidence(context, method, MergeRequest(results, step, vectors))

    def merged_before(step: MergeStep, vectors: str) -> Mapping[str, Any] | None:
        found = results.current(MergeStage(results, step, vectors))
        return None if found is None else found.result

    return Chooser(
        context.recipe,
        vectors_of,
        evidence_for,
        lambda heads: searcher_under(context, heads),
        merged_before,
        group=context.group,
    )


def searcher_under(context: Context, heads: Heads) -> ScaleSearcher:
    """What scores candidates on the validation splits, under the experts' heads or under heads fitted to each."""
    from pave_lightning.pipeline.evaluating import searcher

    found = searcher(context)
    return found.under(lambda candidate: fit_heads(context, candidate, heads)) if heads.fitted else found


def merged_model(context: Context, folder: Path) -> Candidate:
    """The model in a merged folder, with what is kept for each task and the heads that were fitted to it, if any."""
    from pave_lightning.evaluation import CheckpointCandidate, ModulatedCandidate
    from pave_lightning.evaluation.heads import FittedHeads
    from pave_lightning.merging import Modulator

    tasks = {task.name: task for task in context.recipe.tasks}
    checkpoint, kept = Checkpoint(folder, context.architecture.prefix), folder / "modulators"
    found: Candidate = CheckpointCandidate(checkpoint)
    if kept.is_dir():
        modulators = {name: Modulator(kept / f"{name}.safetensors") for name in tasks}
        found = ModulatedCandidate(context.base, checkpoint, modulators)
    heads = load_fitted_heads(folder, context.architecture)
    return FittedHeads(found, heads, tasks) if heads else found


def _taken(manifest: Manifest, source: Path, target: Path) -> dict[str, Any]:
    """Put the files of a merged model into another folder, and return its facts.

    Weights, which nobody writes to, become a second name of the same file where the file system has such names.
    """
    for name in manifest.files:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix == ".safetensors":
            with suppress(OSError):
                os.link(source / name, place)
        if not place.exists():
            shutil.copyfile(source / name, place)
    return manifest.result


def stacked_vectors(context: Context, request: MergeRequest) -> TaskVectors:
    """The task vectors of a merge step whose ratio is fixed, once all that they need is there.

    A purification at the beginning of the stack was stored; what comes behind it is computed as it is read. Parameters
    that the step leaves out are not among them.
    """
    stack = request.stack
    vectors, computed = task_vectors(context, stack.purification), stack.transforms
    for transform in computed if stack.purification is None else computed[1:]:
        given = evidence(context, transform, request)
        vectors = transformed(vectors, [transform], given, context.recipe.compute)
    chosen = request.step.parameters
    return selected(vectors, chosen.include, chosen.exclude)
