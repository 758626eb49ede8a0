"""What each stage's result depends on, and whether it is there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pave_lightning.config import slug
from pave_lightning.errors import PaveError
from pave_lightning.evaluation.options import ScaleSearch
from pave_lightning.merging import Need, method_named
from pave_lightning.pipeline.run_folder import Manifest, RunFolder
from pave_lightning.purification.options import AUTO_RATIOS, Purify
from pave_lightning.recipe.merge_step import MergeStep, Vectors
from pave_lightning.recipe.schema import Recipe
from pave_lightning.statistics.gradients import GradientKind
from pave_lightning.tasks.data import Split, split_fingerprint
from pave_lightning.tasks.task import Task
from pave_lightning.weights import locate_model, model_digest
from pave_lightning.weights.locate import has_tokenizer

# Raised when a stage's results change meaning, so that older results are made anew.
FORMATS = {"fit": 1, "capture": 3, "purify": 3, "merge": 2, "evaluate": 1, "diagnose": 1, "gradients": 1}

# What a capture pass gives merge methods.
NEED_STATISTICS = frozenset({Need.INPUT_MOMENTS, Need.NORM_MOMENTS})

GRADIENT_KINDS: dict[Need, GradientKind] = {Need.FISHER: "fisher", Need.GRADIENTS: "absolute"}

# Options of the trainer that change neither the order of examples nor the arithmetic that is asked for.
HARMLESS_OPTIONS = ("enable_progress_bar", "log_every_n_steps", "accelerator", "profiler", "detect_anomaly")


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: its name, and its folder below the run folder.
        command: the command that makes it.
        inputs: gives everything that its result depends on, as plain JSON values; raises `PaveError` where something
            that it builds on is missing or stale itself.
    """

    name: str
    command: str
    inputs: Callable[[], dict[str, Any]] = field(repr=False, compare=False)

    def begun(self) -> Stage:
        """The stage with its inputs as they are now: a file that changes while it works must not count as its input."""
        inputs = self.inputs()
        return replace(self, inputs=lambda: inputs)


class Stages:
    """The stages of a recipe in a run folder.

    Args:
        recipe: what is to be done.
        folder: where results are kept.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.recipe, self.folder = recipe, folder

    def all(self) -> Iterator[Stage]:
        """Every stage in the order of work."""
        for task in self.recipe.tasks:
            yield self.expert(task)
        for task in self.recipe.tasks if self.need_statistics() else ():
            yield self.statistics(task)
        purified: set[str] = set()
        for step, vectors in self.merges():
            for options in ratios(step.purify) if vectors == "purified" else ():
                stage = self.purified(options)
                if stage.name not in purified:
                    purified.add(stage.name)
                    yield stage
            yield self.merged(step, vectors)
        scored = (one for options in self.purified_expert_scores().values() for one in ratios(options))
        yield from (stage for stage in map(self.purified, scored) if stage.name not in purified)
        yield from self.scores()

    def merges(self) -> Iterator[tuple[MergeStep, Vectors]]:
        """Every merged model that the recipe asks for."""
        for step in self.recipe.merge:
            for vectors in step.vectors:
                yield step, vectors

    def need_statistics(self) -> bool:
        """Whether anything in the recipe looks at what the experts' layers see.

        One that merges nothing may be meant to: purifying and diagnosing are commands of their own.
        """
        asked = any(
            vectors == "purified" or NEED_STATISTICS & method_named(step.method).needs
            for step, vectors in self.merges()
        )
        return asked or not self.recipe.merge or self.recipe.evaluate.purified_experts

    # ---- the stages ------------------------------------------------------------------------------------------------

    def expert(self, task: Task) -> Stage:
        """A task's expert."""
        name = self._shared_name(task, self._fit_inputs)
        return Stage(f"experts/{name}", f"pave fit --task {task.name}", lambda: self._fit_inputs(task))

    def statistics(self, task: Task) -> Stage:
        """What a task's expert sees."""
        name = self._shared_name(
            task, lambda task: {"fit": self._fit_inputs(task), "capture": self._capture_options(task)}
        )
        return Stage(f"statistics/{name}", f"pave capture --task {task.name}", lambda: self._capture_inputs(task))

    def gradients(self, kind: GradientKind, task: Task) -> Stage:
        """What a task's gradients say of each weight."""

        def options(task: Task) -> dict[str, Any]:
            capture = self.recipe.capture
            labels = {"labels": task.labelled_by} if kind == "absolute" else {}
            examples = {"examples": capture.gradient_examples}
            return {"format": FORMATS["gradients"], **self._shown(task), **labels, **examples}

        def inputs() -> dict[str, Any]:
            base = {"base": self._base_digest} if kind == "absolute" else {}
            return {"expert": expert_digest(self.finished(self.expert(task))), "kind": kind, **base, **options(task)}

        name = self._shared_name(task, lambda task: {"fit": self._fit_inputs(task), **options(task)})
        return Stage(f"gradients/{kind}-{name}", "pave merge", inputs)

    def _shared_name(self, task: Task, inputs: Callable[[Task], dict[str, Any]]) -> str:
        """The task's name; in a shared folder with a mark that tells apart what was made from different inputs."""
        return task.name if self.folder.shared is None else f"{task.name}-{short_digest(inputs(task))}"

    def purified(self, options: Purify) -> Stage:
        """The experts' linear weights, purified with these options."""
        ratio = options.rho if isinstance(options.rho, str) else f"{options.rho:g}"
        label = f"rho{ratio}-{options.metric}-{options.allocation}-{short_digest(options.model_dump())}"
        return Stage(f"purified/{slug(label)}", "pave merge", lambda: self._purify_inputs(options))

    def exported(self, options: Purify) -> Stage:
        """The purified experts as ordinary checkpoints."""
        name = self.purified(options).name.replace("purified/", "purified-experts/")
        return Stage(name, "pave purify", lambda: self._purify_inputs(options))

    def diagnostics(self, options: Purify) -> Stage:
        """What this purification does to the task vectors, as tables and pictures."""
        name = self.purified(options).name.replace("purified/", "diagnostics/")
        return Stage(
            name, "pave diagnose", lambda: {"diagnostics": FORMATS["diagnose"], **self._purify_inputs(options)}
        )

    def purifications(self) -> list[Purify]:
        """Every distinct purification of the recipe; see `purifications`."""
        return purifications(self.recipe)

    def merged(self, step: MergeStep, vectors: Vectors) -> Stage:
        """A merged model."""
        return Stage(f"merged/{step.name}-{vectors}", "pave merge", lambda: self.merge_inputs(step, vectors))

    def scores_of(self, step: MergeStep, vectors: Vectors) -> Stage:
        """The scores of a merged model."""

        def inputs() -> dict[str, Any]:
            return {**self.score_inputs("test"), "model": self.finished(self.merged(step, vectors)).digest()}

        return Stage(f"scores/{step.name}-{vectors}", "pave evaluate", inputs)

    def scores(self) -> Iterator[Stage]:
        """The scores of the base, of the experts, and of every merged model."""
        shared = self.score_inputs
        yield Stage("scores/base", "pave evaluate", lambda: {**shared("test"), "model": self._base_digest})
        yield Stage("scores/experts", "pave evaluate", lambda: {**shared("test"), "model": self.expert_digests()})
        for name, options in self.purified_expert_scores().items():
            yield Stage(f"scores/{name}", "pave evaluate", partial(self.purified_score_inputs, options))
        for step, vectors in self.merges():
            yield self.scores_of(step, vectors)

    def purified_expert_scores(self) -> dict[str, Purify]:
        """Names of the scores of purified experts, where the recipe asks for them, and how they are purified."""
        if not self.recipe.evaluate.purified_experts:
            return {}
        return {f"experts-{self.purified(o).name.partition('/')[2]}": o for o in self.purifications()}

    def purified_score_inputs(self, options: Purify) -> dict[str, Any]:
        """What the test scores of purified experts depend on."""
        return {**self.score_inputs("test"), "purified": self._purify_inputs(options)}

    # ---- their state -----------------------------------------------------------------------------------------------

    def current(self, stage: Stage) -> Manifest | None:
        """The stage's manifest, if it is finished and was made from these very inputs."""
        return self.folder.current(stage.name, stage.inputs())

    def finished(self, stage: Stage) -> Manifest:
        """The stage's manifest.

        Raises:
            PaveError: it is missing or stale; the message names the command that makes it.
        """
        found = self.current(stage)
        if found is None:
            damage = self.folder.damage(stage.name)
            known = self.folder.manifest(stage.name) is not None
            state = "stale: its inputs have changed" if known else f"damaged: {damage}" if damage else "not there yet"
            raise PaveError(
                f"{self.folder.path(stage.name)} is {state}; run `{stage.command}` with this recipe, or `pave run`"
            )
        return found

    def state(self, stage: Stage) -> str:
        """Whether the stage's result is there, stale, damaged, or to do."""
        try:
            if self.current(stage) is not None:
                return "there"
        except PaveError:  # something that it builds on is not there or stale itself
            pass
        if self.folder.damage(stage.name):
            return "damaged"
        return "stale" if self.folder.manifest(stage.name) is not None else "to do"

    # ---- their inputs ----------------------------------------------------------------------------------------------

    def _fit_inputs(self, task: Task) -> dict[str, Any]:
        inputs: dict[str, Any] = {"format": FORMATS["fit"], "base": self._base_digest}
        if task.expert is not None:
            folder = existing_folder(task)
            weights = model_digest(folder)
            # An expert without tokenizer reads with the base's, which so becomes a part of it.
            weights = weights if has_tokenizer(folder) else f"{weights}+{self._base_digest}"
            return {**inputs, "from": str(folder), "weights": weights, "outputs": task.output_size}
        return {
            **inputs,
            "seed": self.recipe.seed,
            "data": [split_fingerprint(task, "train"), split_fingerprint(task, "validation")],
            "examples": [task.examples.train, task.examples.validation],
            "shown": task.shown_by,
            "labelled": task.labelled_by,
            "primary_metric": task.primary_metric,
            "training": task.training.model_dump(),
            "trainer": {key: value for key, value in task.trainer.items() if key not in HARMLESS_OPTIONS},
        }

    def _capture_inputs(self, task: Task) -> dict[str, Any]:
        return {"expert": expert_digest(self.finished(self.expert(task))), **self._capture_options(task)}

    def _capture_options(self, task: Task) -> dict[str, Any]:
        from_data = self.recipe.capture.source == "train"
        return {
            "format": FORMATS["capture"],
            "data": split_fingerprint(task, "train") if from_data else None,
            "rows": [task.examples.train if from_data else None, self.recipe.seed],
            "shown": task.shown_by,
            # Without norms it is what was captured before that key was there.
            "capture": self.recipe.capture.model_dump(
                exclude={"gradient_examples", *([] if self.recipe.capture.norms else ["norms"])}
            ),
        }

    def _purify_inputs(self, options: Purify) -> dict[str, Any]:
        # Inputs are compared without their order, which says whose statistics the other task's are.
        order = [task.name for task in self.recipe.tasks] if options.statistics == "other_task" else None
        return {
            **({"order": order} if order else {}),
            "format": FORMATS["purify"],
            "experts": self.expert_digests(),
            "statistics": self._statistics_digests(),
            "purify": options.model_dump(),
        }

    def _shown(self, task: Task) -> dict[str, Any]:
        """What the unlabelled examples of a task depend on."""
        return {
            "data": split_fingerprint(task, "train"),
            "rows": [task.examples.train, self.recipe.seed],
            "shown": task.shown_by,
        }

    def _statistics_digests(self) -> dict[str, str]:
        return {task.name: self.finished(self.statistics(task)).digest() for task in self.recipe.tasks}

    def merge_inputs(self, step: MergeStep, vectors: Vectors) -> dict[str, Any]:
        """What a merged model depends on."""
        inputs: dict[str, Any] = {
            "format": FORMATS["merge"],
            "experts": self.expert_digests(),
            "base": self._base_digest,
            "step": step.model_dump(include={"method", "scale", "options"}),
        }
        if vectors == "purified":
            inputs["purified"] = self._purify_inputs(step.purify)
        if with_seed(step.method, step.options, self.recipe.seed) != step.options:
            inputs["seed"] = self.recipe.seed
        if method_named(step.method).ordered:
            # Inputs are compared without their order.
            inputs["order"] = [task.name for task in self.recipe.tasks]
        if NEED_STATISTICS & method_named(step.method).needs:
            inputs["statistics"] = self._statistics_digests()
        for need, kind in GRADIENT_KINDS.items():
            if need in method_named(step.method).needs:
                inputs[kind] = {task.name: self.gradients(kind, task).inputs() for task in self.recipe.tasks}
        if Need.UNLABELLED_EXAMPLES in method_named(step.method).needs:
            inputs["examples"] = {task.name: self._shown(task) for task in self.recipe.tasks}
        if method_named(step.method).batched:
            inputs["batch_size"] = self.recipe.capture.batch_size
        if step.anchor is not None:
            anchor = self.recipe.step(step.anchor).model_copy(update={"purify": step.purify})
            inputs["anchor"] = self.merge_inputs(anchor, vectors)
        if step.tune:
            inputs["tune"] = step.tune
        if isinstance(step.scale, ScaleSearch) or step.tune or (vectors == "purified" and step.purify.rho == "auto"):
            inputs["search"] = self.score_inputs("validation")
        return inputs

    def score_inputs(self, split: Split) -> dict[str, Any]:
        """What scores on a split depend on besides the model."""
        return {
            "format": FORMATS["evaluate"],
            "heads": self.expert_digests(),
            "tasks": {
                task.name: {
                    "data": split_fingerprint(task, split),
                    "examples": [getattr(task.examples, split), self.recipe.seed],
                    "shown": task.shown_by,
                    "labelled": task.labelled_by,
                    "metrics": [task.metrics, task.primary_metric],
                    "max_length": task.training.max_length,
                }
                for task in self.recipe.tasks
            },
            "precision": self.recipe.evaluate.precision,
        }

    def expert_digests(self) -> dict[str, str]:
        """What identifies each task's expert.

        Raises:
            PaveError: an expert is missing or stale.
        """
        return {task.name: expert_digest(self.finished(self.expert(task))) for task in self.recipe.tasks}

    @cached_property
    def _base_digest(self) -> str:
        return model_digest(locate_model(self.recipe.base, role="base"))


def purifications(recipe: Recipe) -> list[Purify]:
    """Every distinct purification with a ratio of its own: those of the merge steps, or else the recipe's.

    Raises:
        PaveError: there is none, because every ratio is to be chosen on validation data.
    """
    steps = [step for step in recipe.merge if "purified" in step.vectors]
    asked = [step.purify for step in steps] or [recipe.purify]
    found = [options for options in dict.fromkeys(asked) if options.rho != "auto"]
    if not found:
        own = [f"merge.{step.name}.purify.rho" for step in steps] if recipe.purify.rho != "auto" else ["purify.rho"]
        raise PaveError(
            "the ratios of all purifications are 'auto', which only merging chooses; "
            f"give a number at {' or '.join(own)}"
        )
    return found


def with_seed(method: str, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """The options of a merge method, with the recipe's seed where the method draws at random and no seed is given."""
    draws = "seed" in method_named(method).Options.model_fields
    return {**options, "seed": seed} if draws and options.get("seed") is None else options


def ratios(options: Purify) -> list[Purify]:
    """The purifications that a merge step needs: several where its ratio is chosen on validation data."""
    tried = AUTO_RATIOS if options.rho == "auto" else (options.rho,)
    return [options.model_copy(update={"rho": rho}) for rho in tried if rho != 1]


def existing_folder(task: Task) -> Path:
    """The folder of the checkpoint that a recipe names for a task instead of training."""
    reference = task.expert.from_ if task.expert is not None else ""
    return locate_model(reference, role=f"expert of task '{task.name}'")


def expert_digest(expert: Manifest) -> str:
    """What identifies an expert: its own files, or those of the folder that it was taken in from."""
    return str(expert.inputs["weights"]) if "folder" in expert.result else expert.digest()


def short_digest(values: dict[str, Any]) -> str:
    """Eight characters that tell values apart in folder names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
