"""What a merge step comes to once everything that the recipe leaves open is chosen on validation data.

Chosen is what does best under the heads that the model is to have: the experts' own, or heads that are fitted anew to
every model that is tried.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pave_lightning.config import WrittenDtype
from pave_lightning.errors import naming
from pave_lightning.evaluation import Candidate, MergedCandidate
from pave_lightning.evaluation.heads import FittedHeads
from pave_lightning.evaluation.options import EXPERT_HEADS, Heads, ScaleSearch
from pave_lightning.evaluation.scale_search import NoFiniteScoreError, ScaleSearcher
from pave_lightning.merging import Evidence, MergedVectors, MergeMethod, make_method, merge, method_named
from pave_lightning.pipeline.seeds import with_seed
from pave_lightning.pipeline.stacks import stack_of
from pave_lightning.purification.options import AUTO_RATIOS
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.recipe.schema import Recipe
from pave_lightning.system.process_groups import ALONE, ProcessGroup
from pave_lightning.weights import TaskVectors
from pave_lightning.weights.memory import MeasuredCost, measured

log = logging.getLogger("pave_lightning")


@dataclass(frozen=True)
class MergeChoice:
    """A merge step with everything chosen.

    Attributes:
        method: the method.
        source: the task vectors it is run on.
        evidence: what the method knows besides the weights.
        scale: what the merged task vector is multiplied with; None for methods without a scale.
        merged: the merge result, where it was computed in choosing.
        average: its normalised average on validation data; NaN where it was not scored.
        facts: what was chosen and what was tried, as plain JSON values.
        cost: what merging took, where the result is known.
        fitted: the model with the heads that were fitted to it in choosing; None where none were.
        dtype: in which type its weights are written.
        group: the processes that share the merge.
    """

    method: MergeMethod
    source: TaskVectors
    evidence: Evidence
    scale: float | None
    merged: MergedVectors | None
    average: float
    facts: dict[str, Any]
    cost: MeasuredCost = field(default_factory=MeasuredCost)
    fitted: FittedHeads | None = None
    dtype: WrittenDtype = "base"
    group: ProcessGroup = ALONE

    def candidate(self) -> Candidate:
        """The merged model, in memory."""
        return MergedCandidate(self.source, self.result(), 1.0 if self.scale is None else self.scale, self.dtype)

    def result(self) -> MergedVectors:
        """The merge result, computed now unless it is known."""
        return self.merged if self.merged is not None else merge(self.method, self.source, self.evidence, self.group)


@dataclass(frozen=True)
class _Chosen:
    """What was chosen for a step: enough to merge it again without a search, and small."""

    rho: float | None
    options: dict[str, Any]
    scale: float | None
    average: float
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Merge:
    """A method run on task vectors, before any scale."""

    method: MergeMethod
    source: TaskVectors
    evidence: Evidence
    merged: MergedVectors
    cost: MeasuredCost


class Chooser:
    """Chooses ratio, options and scale of merge steps, once for each step, stack of transforms and kind of heads.

    What was chosen is remembered for all steps, merged models are not. At most two are kept: the last anchor, and where
    a step is asked for under several kinds of heads its last merge result, of which each kind chooses a scale.

    Args:
        recipe: the recipe.
        source: gives the task vectors of a step whose ratio is fixed, by the name of their stack.
        evidence: gives what a method needs besides the weights, for a step whose ratio is fixed and its task vectors.
        searcher: gives what scores candidates on the validation splits under such heads.
        merged_before: gives the facts of a step's finished merge, where there is one of the same inputs.
        group: the processes that share the merges; all of them choose, and so come to the same.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Callable[[MergeStep, str], TaskVectors],
        evidence: Callable[[MergeMethod, MergeStep, str], Evidence],
        searcher: Callable[[Heads], ScaleSearcher],
        merged_before: Callable[[MergeStep, str], Mapping[str, Any] | None] = lambda step, vectors: None,
        *,
        group: ProcessGroup = ALONE,
    ) -> None:
        self._group = group
        self._recipe, self._source, self._evidence, self._searcher = recipe, source, evidence, searcher
        self._merged_before = merged_before
        self._chosen: dict[str, _Chosen] = {}
        self._without_scores: dict[str, str] = {}  # what was told of steps for which nothing gives finite scores
        self._last_anchor: tuple[str, dict[str, Tensor]] = ("", {})
        self._last_merge: tuple[str, _Merge] | None = None

    def choose(
        self, step: MergeStep, vectors: str, heads: Heads = EXPERT_HEADS, *, complete: bool = False
    ) -> MergeChoice:
        """What a merge step comes to once ratio, options and scale are chosen, where the recipe leaves them.

        Args:
            step: the step.
            vectors: name of the stack that makes its task vectors.
            heads: under which heads the models that are tried are scored.
            complete: whether the merge result is wanted, and what merging took, also where nothing is searched.

        Raises:
            NoFiniteScoreError: nothing that was tried gives finite scores.
        """
        key = self._what_counts(step, vectors, heads)
        under = f", heads {heads.label}" if heads.fitted else ""
        with naming(f"merge {step.name} ({vectors}{under})"):
            if key in self._chosen:
                known = self._chosen[key]
                fixed = step.model_copy(update={"scale": known.scale})
                choice = self._chosen_scale(fixed, vectors, heads, known.rho, known.options, complete=complete)
                return replace(choice, average=known.average, facts=known.facts)
            if key in self._without_scores:
                raise NoFiniteScoreError(self._without_scores[key])
            try:
                choice = self._choose(step, vectors, heads, complete=complete)
            except NoFiniteScoreError as error:
                self._without_scores[key] = str(error)
                raise
        options = choice.method.options.model_dump(exclude_unset=True)
        self._chosen[key] = _Chosen(choice.facts.get("rho"), options, choice.scale, choice.average, choice.facts)
        return choice

    def _choose(self, step: MergeStep, vectors: str, heads: Heads, *, complete: bool) -> MergeChoice:
        stack = stack_of(self._recipe, vectors, step)
        ratios: tuple[Any, ...] = AUTO_RATIOS if stack.is_chosen else (stack.rho,)
        settings = [(rho, options) for rho in ratios for options in step.tuned_options]
        if len(settings) == 1:
            return self._chosen_scale(step, vectors, heads, *settings[0], complete=complete)
        best: MergeChoice | None = None  # one merge result is held at a time, besides the one that is made
        best_key = (-math.inf, 0.0)
        tried: list[tuple[Any, dict[str, Any], float | None, float]] = []
        for rho, options in settings:
            try:
                choice = self._chosen_scale(step, vectors, heads, rho, options, scored=True)
            except NoFiniteScoreError:
                tried.append((rho, options, None, math.nan))
                continue
            label = [f"rho {rho:.4g}"] if rho else []
            label += [f"{key} {options[key]}" for key in step.tune]
            log.info("  %s: %.4f of the experts on validation", ", ".join(label), choice.average)
            tried.append((rho, options, choice.scale, choice.average))
            # Among equals the largest ratio wins, which changes the experts least, and then the first options.
            key = (choice.average, rho or 0.0)
            if math.isfinite(choice.average) and key > best_key:
                best, best_key = choice, key
        if best is None:
            what = "no ratio gives" if not step.tune else "nothing that was tried gives"
            raise NoFiniteScoreError(f"{what} finite scores on the validation splits")
        facts = dict(best.facts)
        if len(ratios) > 1:
            facts["rho_search"] = [[rho, scale, average] for rho, _, scale, average in tried]
        if step.tune:
            facts["tune_search"] = [
                [{key: options[key] for key in step.tune}, scale, average] for _, options, scale, average in tried
            ]
        return replace(best, facts=facts)

    def _chosen_scale(
        self,
        step: MergeStep,
        vectors: str,
        heads: Heads,
        rho: float | None,
        options: dict[str, Any],
        *,
        scored: bool = False,
        complete: bool = False,
    ) -> MergeChoice:
        """The merge with its scale; with its validation score where the scale is searched or ``scored`` asks for it.

        Args:
            step: the merge step.
            vectors: name of the stack that makes its task vectors.
            heads: under which heads scores are taken.
            rho: rank ratio of the purification in it; None where nothing is purified.
            options: the method's options.
            scored: whether the validation score is wanted in any case.
            complete: whether the merge result is wanted in any case.
        """
        ratio: dict[str, Any] = {} if rho is None else {"rho": rho}
        if step.purify.rho == "auto":
            step = step.model_copy(update={"purify": step.purify.model_copy(update=ratio)})
        options = with_seed(method_named(step.method).Options, options, self._recipe.seed)
        default = method_named(step.method).default_scale
        scale = step.scale if step.scale is not None else default
        known = self._known_merge(step, vectors, options)
        if known is None and not (scored or complete or isinstance(scale, ScaleSearch)):
            given = self._given(step, vectors, options)
            facts = {"scale": scale, **ratio}
            return MergeChoice(*given, scale, None, math.nan, facts, dtype=step.write.dtype, group=self._group)
        made = known or self._merge(step, vectors, options)
        average, facts, candidate = math.nan, {"scale": scale, **ratio}, None
        if isinstance(scale, ScaleSearch):
            found = self._searcher(heads).best(made.source, made.merged, scale, default or 1.0, step.write.dtype)
            scale, average, candidate = found.scale, found.average, found.candidate
            facts = {"scale": scale, "search": [list(tried) for tried in found.tried], **ratio}
        elif scored:
            tried = MergedCandidate(made.source, made.merged, 1.0 if scale is None else scale, step.write.dtype)
            candidate, average = self._searcher(heads).scored(tried, None)
        fitted = candidate if isinstance(candidate, FittedHeads) else None
        return MergeChoice(
            made.method,
            made.source,
            made.evidence,
            scale,
            made.merged,
            average,
            facts,
            made.cost,
            fitted,
            step.write.dtype,
            self._group,
        )

    def _merge(self, step: MergeStep, vectors: str, options: dict[str, Any]) -> _Merge:
        """Run the method; the result is kept where the step is asked for under several kinds of heads."""
        self._last_merge = None
        given = self._given(step, vectors, options)
        with measured() as cost:
            merged = merge(*given, self._group)
        made = _Merge(*given, merged, cost)
        if len(self._recipe.heads_of(step)) > 1:
            self._last_merge = self._unscaled(step, vectors, options), made
        return made

    def _given(
        self, step: MergeStep, vectors: str, options: dict[str, Any]
    ) -> tuple[MergeMethod, TaskVectors, Evidence]:
        """The method, the task vectors that it is run on, and what else it knows."""
        method = make_method(step.method, options)
        device = torch.device(self._recipe.compute.device_of(self._group.rank))
        if not method.cpu_because(device.type):
            method.device = device
        source = self._source(step, vectors)
        return method, source, self._evidence(method, step, vectors)

    def _known_merge(self, step: MergeStep, vectors: str, options: dict[str, Any]) -> _Merge | None:
        """The merge result that is kept, if it is this one."""
        if self._last_merge is None or self._last_merge[0] != self._unscaled(step, vectors, options):
            return None
        return self._last_merge[1]

    def _unscaled(self, step: MergeStep, vectors: str, options: dict[str, Any]) -> str:
        """What a merge result depends on before it is scaled."""
        stack = stack_of(self._recipe, vectors, step)
        return (
            f"{stack.described()} {step.method} {json.dumps(options, sort_keys=True)} {step.anchor} {step.parameters}"
        )

    def anchor(self, step: MergeStep, vectors: str) -> dict[str, Tensor]:
        """The scaled task vector of a step's anchor, run on the same task vectors; the last one is kept.

        Args:
            step: the step, with a fixed ratio.
            vectors: name of the stack that makes its task vectors.
        """
        anchor = self._recipe.anchor_of(step)
        key = self._what_counts(anchor, vectors, EXPERT_HEADS)
        if self._last_anchor[0] != key:
            self._last_anchor = ("", {})
            log.info("  anchor: %s ...", anchor.name)
            found = None if key in self._chosen else self._merged_before(anchor, vectors)
            choice = self.choose(anchor if found is None else _as_merged(anchor, found), vectors)
            scale = 1.0 if choice.scale is None else choice.scale
            self._last_anchor = (key, {name: scale * vector for name, vector in choice.result().vectors.items()})
        return self._last_anchor[1]

    def _what_counts(self, step: MergeStep, vectors: str, heads: Heads) -> str:
        """What is chosen for a step depends on this, of all that the recipe says about it."""
        stack = stack_of(self._recipe, vectors, step)
        said = step.model_dump_json(include={"method", "scale", "options", "anchor", "tune", "parameters"})
        return f"{stack.described()} {said} {step.write.dtype} {heads.label}"


def _as_merged(step: MergeStep, facts: Mapping[str, Any]) -> MergeStep:
    """A step of a fixed ratio with its scale and its tuned options as they were chosen when it was merged."""
    options = {**step.options, **{key: facts["options"][key] for key in step.tune}}
    return step.model_copy(update={"scale": facts["scale"], "options": options, "tune": {}})
