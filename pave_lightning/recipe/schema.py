"""The typed recipe: everything a run does, in one YAML file whose every key is documented here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from pave_lightning.callbacks.options import Capture
from pave_lightning.config import MOST_TOLD, FolderPath, Name, Section, slug, unless_wrong
from pave_lightning.errors import listed, nearest, shortened
from pave_lightning.evaluation.options import EXPERT_HEADS, ControlList, Evaluate, HeadList, Heads
from pave_lightning.experts.vocabularies import Vocabulary
from pave_lightning.purification.options import Compute, Purify
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.recipe.parameters import Parameters
from pave_lightning.recipe.stacks import BUILT_IN, Stack, folder_problems, named_transform, stack_name_problems
from pave_lightning.recipe.sweep import Sweep
from pave_lightning.recipe.write import Write
from pave_lightning.system.references import HubModel
from pave_lightning.tasks.options import Examples, Training
from pave_lightning.tasks.suites import known_data, suite_task
from pave_lightning.tasks.task import Task, any_kind, auto_models
from pave_lightning.tracking.options import Tracking

# Classes of transformers that build what lm-eval can score.
LANGUAGE_MODELS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")

if TYPE_CHECKING:
    AnyTask = Task
else:
    AnyTask = any_kind()


class Recipe(Section):
    """One run: fine-tune experts, capture their statistics, purify, merge, evaluate, report."""

    name: Name
    """Name of the run; its folder is output/name."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Seed of everything drawn at random: heads, order of examples, dropout, samples of rows."""
    base: str | HubModel
    """The common base model: a folder, a GGUF file, package:NAME/PATH for one of the two inside an installed package, a
    hub id, or {hub: OWNER/NAME, folder: ..., revision: ...} for a part of a repository; infer for the base that the
    experts themselves name, adapters in adapter_config.json and models in their card (base_model)."""
    vocabulary: Vocabulary = "error"
    """What is done where the tokens of experts have other numbers than the base's. error: it is refused; tokens that
    one of them has besides may stand at the end. base_rows: merged models have the base's tokenizer; rows of an expert
    are matched by token, and those of other tokens dropped and counted. union: new tokens of experts are appended in
    the order of the tasks, each with the mean of its rows over the experts that have it. Each expert is scored with its
    own tokenizer."""
    output: FolderPath = "checkpoints"
    """Folder in which the run folder is made."""
    shared: FolderPath | None = None
    """Folder of experts and statistics that recipes share: what one of them made from the same inputs, the others take
    from there. Without it they lie in the run folder."""
    trainer: dict[str, Any] = {}
    """Options of lightning.Trainer (accelerator, devices, strategy, precision, max_epochs, ...), passed straight on."""
    training: Training = Training()
    """How experts are fine-tuned, unless a task says otherwise."""
    examples: Examples = Examples()
    """How many rows of each split are used, unless a task says otherwise."""
    tasks: list[AnyTask] = Field(min_length=1)
    """The tasks: names such as pocket/movie, {use: pocket/movie, ...} to change some keys, or whole tasks."""
    capture: Capture = Capture()
    """The capture pass."""
    purify: Purify = Purify()
    """Purification, unless a merge step says otherwise."""
    compute: Compute = Compute()
    """How purification uses the machine."""
    vectors: dict[str, Stack] = {}
    """Stacks of transforms of task vectors, by names that the key vectors of merge steps may use: lists of transforms
    in their order, with options where needed, such as {lighter: [{task_weights: {movie: 0.5}}, pave]}. Built in are
    plain, the empty stack, and purified, [pave]; pave without options has those of the section purify."""
    merge: list[MergeStep] = []
    """The merge methods to run."""
    parameters: Parameters = Parameters()
    """Which parameters are merged, unless a merge step says otherwise."""
    write: Write = Write()
    """How merged models are written, unless a merge step says otherwise."""
    heads: HeadList = [EXPERT_HEADS]
    """Heads under which merged models are scored: expert, logits, probabilities, orthogonal or labels, {fit: ...,
    rows: ...} to change some keys, or a list of these; each is a row of the tables."""
    controls: ControlList = ["base", "experts"]
    """What is scored beside merged models. Where heads are fitted, base: the base under heads fitted in the same way,
    which merging must beat; probe: the base under heads fitted to labels; experts: each expert under its own head
    fitted in the same way. In any case, joint: one model that is fine-tuned on all tasks together, with as many steps
    as all experts, under its own heads and fitted ones, which is the ceiling in practice; each: every expert alone on
    all tasks. true stands for all of them; only joint trains anything."""
    evaluate: Evaluate = Evaluate()
    """How models are scored."""
    tracking: Tracking = Tracking()
    """Where MLflow keeps the record."""
    sweep: Sweep | None = None
    """What `pave sweep` varies; other commands run the recipe as it stands."""

    @model_validator(mode="before")
    @classmethod
    def _hand_down(cls, raw: Any) -> Any:
        """Fill tasks and merge steps from the recipe's own sections and from the named suites."""
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        for key, shared in (
            ("tasks", ("examples", "training", "trainer")),
            ("merge", ("purify", "parameters", "write")),
        ):
            if not isinstance(raw.get(key), list):
                continue
            defaults = {name: raw[name] for name in shared if isinstance(raw.get(name), dict)}
            raw[key] = [_filled(entry, defaults, key) for entry in raw[key]]
        return raw

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        wrong: list[str] = []
        for what, names in (
            ("task", [task.name for task in self.tasks]),
            ("merge step", [step.name for step in self.merge]),
        ):
            repeated = sorted({name for name, times in Counter(names).items() if times > 1})
            if repeated:
                wrong.append(
                    f"each {what} needs a name of its own, but {listed(repeated)} stands twice; give one a 'name'"
                )
            alike: dict[str, str] = {}
            for name in dict.fromkeys(names):
                first = alike.setdefault(name.lower(), name)
                if first != name:
                    wrong.append(
                        f"the {what}s '{first}' and '{name}' differ by case alone, and some file systems would write "
                        "both into one folder; give one another name"
                    )
        known = [task.name for task in self.tasks]
        lists: list[tuple[str, Iterable[str] | None]] = []
        for key in ("tasks", "task_rho"):
            lists.append((f"purify.{key}", getattr(self.purify, key)))
            for step in self.merge:
                if getattr(step.purify, key) != getattr(self.purify, key):  # what is handed down is told once
                    lists.append((f"purify.{key} of merge step '{step.name}'", getattr(step.purify, key)))
        for where, chosen in lists:
            wrong += [
                f"{where}: no task is named '{name}'; {nearest(name, known)}"
                for name in [name for name in chosen or [] if name not in known][:MOST_TOLD]
            ]
        wrong += self._anchor_problems()
        wrong += self._benchmark_problems()
        wrong += stack_name_problems(self.vectors)
        wrong += folder_problems((step.name, stack) for step in self.merge for stack in step.vectors)
        stacks = [*BUILT_IN, *self.vectors]
        wrong += [
            f"merge step '{step.name}': vectors: no stack is named '{shortened(name)}'; {nearest(name, stacks)}"
            for step in self.merge[:MOST_TOLD]
            for name in [name for name in step.vectors if name not in stacks][:MOST_TOLD]
        ]
        for reserved in ("base", "experts", *(["joint"] if "joint" in self.controls else [])):
            if reserved in [step.name for step in self.merge]:
                wrong.append(f"a merge step cannot be named '{reserved}': the tables use that name")
        return unless_wrong(self, wrong)

    def _benchmark_problems(self) -> list[str]:
        if self.evaluate.lm_eval is None:
            return []
        where = "evaluate.lm_eval.benchmarks"
        tasks = {task.name: task for task in self.tasks}
        folders: dict[str, str] = {name.lower(): f"the task '{name}'" for name in tasks}
        wrong = []
        for name, chosen in self.evaluate.lm_eval.benchmarks.items():
            task, key = tasks.get(chosen.expert), f"{where}.{shortened(name)}"
            if task is None:
                wrong.append(f"{key}: no task is named '{chosen.expert}'; {nearest(chosen.expert, list(tasks))}")
            elif task.auto_model not in LANGUAGE_MODELS:
                wrong.append(f"{key}: lm-eval scores language models, but '{task.name}' is a {task.kind} task")
            other = folders.setdefault(slug(name).lower(), f"the benchmark '{name}'")
            if other != f"the benchmark '{name}'":
                wrong.append(
                    f"{key}: {other} has the same name in tables or folders; give the task another name, or leave the "
                    "benchmark out"
                )
        return wrong

    def _anchor_problems(self) -> list[str]:
        names = [step.name for step in self.merge]
        anchors = {step.name: step.anchor for step in self.merge if step.anchor is not None}
        wrong = [
            f"merge step '{name}': anchor: no merge step is named '{anchor}'; {nearest(anchor, names)}"
            for name, anchor in [pair for pair in anchors.items() if pair[1] not in names][:MOST_TOLD]
        ]
        for name in anchors:
            path, passed = [name], set[str]()
            while path[-1] in anchors and path[-1] not in passed:
                passed.add(path[-1])
                path.append(anchors[path[-1]])
            if path[-1] == name and len(path) > 1:
                wrong.append(f"merge step '{name}': its anchors lead back to itself ({' -> '.join(path)})")
        return wrong

    @property
    def auto_models(self) -> tuple[str, ...]:
        """Names of the classes of transformers that build the tasks' models, each once, in their order."""
        return auto_models(self.tasks)

    def stack(self, name: str) -> list[tuple[str, Mapping[str, Any]]]:
        """Names and options of the transforms of a stack, in order."""
        return [named_transform(entry) for entry in (BUILT_IN[name] if name in BUILT_IN else self.vectors[name])]

    def step(self, name: str) -> MergeStep:
        """The merge step of that name."""
        return next(step for step in self.merge if step.name == name)

    def anchor_of(self, step: MergeStep) -> MergeStep:
        """The step that a step names as its anchor, on the task vectors and parameters of that step."""
        same = {key: getattr(step, key) for key in ("purify", "weights", "parameters")}
        return self.step(str(step.anchor)).model_copy(update=same)

    def heads_of(self, step: MergeStep) -> list[Heads]:
        """The heads under which a merge step's models are scored."""
        return self.heads if step.heads is None else step.heads

    def merged_models(self) -> Iterator[tuple[MergeStep, str, Heads]]:
        """Every merged model that is asked for: its step, the name of its stack, and its heads."""
        for step in self.merge:
            for vectors in step.vectors:
                for heads in self.heads_of(step):
                    yield step, vectors, heads

    @property
    def kinds_of_heads(self) -> list[Heads]:
        """The heads that any merge step asks for, each kind once, however scales are chosen."""
        asked = [heads.model_copy(update={"search": True}) for step in self.merge for heads in self.heads_of(step)]
        return list({heads.label: heads for heads in asked}.values())

    @property
    def fitted_heads(self) -> list[Heads]:
        """Those of them that are fitted."""
        return [heads for heads in self.kinds_of_heads if heads.fitted]

    def task(self, name: str) -> Task:
        """The task of that name."""
        return next(task for task in self.tasks if task.name == name)


def _filled(entry: Any, defaults: Mapping[str, Any], key: str) -> Any:
    if key == "tasks":
        if isinstance(entry, str):
            entry = {"use": entry}
        if isinstance(entry, dict) and isinstance(entry.get("use"), str):
            own = {name: value for name, value in entry.items() if name != "use"}
            known = suite_task(entry["use"])
            if isinstance(own.get("data"), dict):
                own["data"] = known_data(known["data"], own["data"])
            entry = {**known, **own}
    elif isinstance(entry, str):
        entry = {"method": entry}
    if not isinstance(entry, dict):
        return entry
    filled = dict(entry)
    for name, shared in defaults.items():
        own = filled.get(name, {})
        if isinstance(own, dict):
            filled[name] = {**shared, **own}
    return filled
