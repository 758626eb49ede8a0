"""Experiments: a recipe run over a grid of settings and seeds, its scores in one table, with a picture and findings."""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pave_lightning.commands import open_folder, working
from pave_lightning.errors import PaveError, Problems, nearest
from pave_lightning.evaluation import Candidate
from pave_lightning.planning import check_recipe, merge_problems
from pave_lightning.recipe import Experiment, MergeStep, Recipe, Vectors
from pave_lightning.recipe_loading import load_recipe
from pave_lightning.reporting.experiment_view import CARRIED_COLUMNS
from pave_lightning.reporting.experiments import ExperimentView, write_experiment
from pave_lightning.stages import purifications, short_digest
from pave_lightning.workflow import Workflow, plain_scores

log = logging.getLogger("pave_lightning")

EXPERIMENTS_FOLDER = Path("recipes/experiments")


@dataclass(frozen=True)
class Cell:
    """One setting of an experiment with one seed.

    Attributes:
        values: the varied keys (and the case) with their values.
        seed: the recipe's seed.
        recipe: the recipe with all of that in it.
    """

    values: dict[str, Any]
    seed: int
    recipe: Recipe

    @property
    def label(self) -> str:
        """The setting in words."""
        return ", ".join([f"seed={self.seed}", *(f"{key}={value}" for key, value in self.values.items())])


def run_experiment(name: str, overrides: Sequence[str] = ()) -> Path:
    """Run an experiment and write its table, picture and findings. Scores that are there are not computed again.

    Args:
        name: path of a recipe with an experiment section, or the name of one in ``recipes/experiments``.
        overrides: ``key=value`` texts for the recipe, as in `load_recipe`; they hold in every cell.

    Returns:
        The run folder.

    Raises:
        PaveError: there is no such experiment, or something is wrong with its recipe in any of its settings.
    """
    path = find_experiment(name)
    recipe = load_recipe(path, overrides)
    experiment = recipe.experiment
    if experiment is None:
        raise PaveError(f"{path} has no section 'experiment'; run it with `pave run`, or say what is to be varied")
    _refuse_overruled(overrides, experiment)
    if recipe.shared is None:
        # Every seed and setting keeps its own experts, under names that tell them apart.
        overrides = [*overrides, f"shared={json.dumps(str(Path(recipe.output) / recipe.name))}"]
        recipe = load_recipe(path, overrides)
    cells = list(make_cells(path, overrides, experiment))
    _check(cells, view_of(recipe))
    with working(recipe) as workflow:
        rows: list[dict[str, Any]] = []
        for number, cell in enumerate(cells, start=1):
            log.info("%d of %d: %s", number, len(cells), cell.label)
            rows += CellRun(cell, workflow).rows()
        files = write_experiment(pd.DataFrame(rows), view_of(recipe), workflow.folder.root)
        tracker = workflow.tracker
        if tracker is not None:
            for file in files:
                tracker.log_file(tracker.parent_run_id, file)
            tracker.log_metrics(tracker.parent_run_id, _summary_metrics(files, list(cells[0].values)))
        root: Path = workflow.folder.root
    return root


def find_experiment(name: str) -> Path:
    """The recipe of an experiment: a path, or a name in ``recipes/experiments``.

    Raises:
        PaveError: there is none; the names that there are, are told.
    """
    for path in (Path(name), EXPERIMENTS_FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in EXPERIMENTS_FOLDER.glob("*.yaml"))
    hint = f"{nearest(name, known)}" if known else f"there is no folder {EXPERIMENTS_FOLDER} here"
    raise PaveError(f"there is no experiment '{name}': {hint}")


def make_cells(path: Path, overrides: Sequence[str], experiment: Experiment) -> Iterator[Cell]:
    """Every setting with every seed, each recipe checked."""
    cases: list[tuple[str, dict[str, Any]]] = list(experiment.cases.items()) or [("", {})]
    for seed in experiment.seeds:
        for case, changes in cases:
            for combination in itertools.product(*experiment.vary.values()):
                varied = dict(zip(experiment.vary, combination, strict=True))
                settings = {"seed": seed, **changes, **varied}
                texts = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
                values = {**({"case": case} if case else {}), **varied}
                yield Cell(values, seed, load_recipe(path, [*overrides, *texts]))


def _refuse_overruled(overrides: Sequence[str], experiment: Experiment) -> None:
    varied = {"seed", *experiment.vary, *(key for changes in experiment.cases.values() for key in changes)}
    problems = Problems("what the experiment varies cannot be set for all of its settings:")
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in varied:
            where = "experiment.seeds" if key == "seed" else "experiment.vary or experiment.cases"
            problems.add(f"--set {key}: change {where} instead")
    problems.raise_if_any()


def _check(cells: Sequence[Cell], view: ExperimentView) -> None:
    """Find out before anything runs what is wrong with the view or with any setting.

    Data, models and trainer are looked at once for all settings that have them in common; seeds change nothing here.
    """
    problems = Problems(f"the experiment {cells[0].recipe.name} cannot be run:")
    problems.extend(f"experiment.{problem}" for problem in view.problems(list(cells[0].values)))
    problems.extend(_idle_settings(cells))
    for cell in cells:
        if cell.recipe.evaluate.purified_experts and len(purifications(cell.recipe)) > 1:
            problems.add(
                "evaluate.purified_experts: an experiment scores the experts of one purification, found several"
            )
            break
    looked_at: set[str] = set()
    for cell in (cell for cell in cells if cell.seed == cells[0].seed):
        others = cell.recipe.model_dump_json(exclude={"purify", "merge"})
        setting = ", ".join(f"{key}={value}" for key, value in cell.values.items())
        where = f"{setting}: " if setting else ""
        if others in looked_at:
            problems.extend(f"{where}{problem}" for problem in merge_problems(cell.recipe))
            continue
        looked_at.add(others)
        try:
            check_recipe(cell.recipe, open_folder(cell.recipe))
        except PaveError as error:
            problems.add(f"{where}{error}")
    problems.raise_if_any()


def _idle_settings(cells: Sequence[Cell]) -> Iterator[str]:
    """Settings that do the same as one before: their keys are overruled, as the recipe's purify is by a step's own."""
    seen: dict[str, Cell] = {}
    for cell in (cell for cell in cells if cell.seed == cells[0].seed):
        handed_down = {"name", "experiment", "trainer", "training", "examples"}
        if cell.recipe.merge:
            handed_down.add("purify")
        done = cell.recipe.model_dump_json(exclude=handed_down)
        if done in seen:
            yield f"{cell.label} does the very same as {seen[done].label}: its keys are overruled by others"
        seen.setdefault(done, cell)


def view_of(recipe: Recipe) -> ExperimentView:
    """What the picture and the findings look at."""
    experiment = recipe.experiment
    if experiment is None:
        raise PaveError(f"the recipe {recipe.name} has no section 'experiment'")
    keys = [*experiment.vary, *(["case"] if experiment.cases else [])]
    return ExperimentView(
        question=experiment.question,
        x=experiment.x or (keys[0] if keys else "model"),
        lines=tuple(experiment.lines) or None,
        score=experiment.score,
        log_x=experiment.log_x,
    )


class CellRun:
    """The scores of one cell.

    Args:
        cell: the setting.
        driver: the experiment's own workflow, whose folder and record are used.
    """

    def __init__(self, cell: Cell, driver: Workflow) -> None:
        self.cell, self.folder = cell, driver.folder
        trained = cell.recipe.model_dump(mode="json", by_alias=True, include={"base", "trainer", "tasks"})
        label = f"seed {cell.seed} {short_digest(trained)}/"
        self.workflow = Workflow(cell.recipe, driver.folder, driver.tracker, driver.launcher, label=label)
        self.workflow.references = driver.references
        self.stages = self.workflow.stages

    def rows(self) -> list[dict[str, Any]]:
        """One row for every model, task and metric."""
        there = self._purified_folders()
        self.workflow.fit_and_capture()
        rows = [*self._reference_rows(), *self._purified_expert_rows()]
        for step, vectors in self.stages.merges():
            rows += self._merge_rows(step, vectors)
        # Large, and made anew from the same statistics in seconds. What a run of this recipe left before stays.
        for name in self._purified_folders() - there:
            shutil.rmtree(self.folder.path(name), ignore_errors=True)
        return rows

    def _purified_folders(self) -> set[str]:
        return {f"purified/{folder.name}" for folder in self.folder.path("purified").glob("*")}

    def _reference_rows(self) -> Iterator[dict[str, Any]]:
        inputs = {**self.stages.score_inputs("test"), "models": self.stages.expert_digests()}
        base, experts = self.workflow.untouched()
        yield from self._scored("base", "", "base", {**inputs, "of": "base"}, lambda: (base, {}))
        yield from self._scored("experts", "", "expert", {**inputs, "of": "experts"}, lambda: (experts, {}))

    def _purified_expert_rows(self) -> Iterator[dict[str, Any]]:
        for options in self.stages.purified_expert_scores().values():
            inputs = self.stages.purified_score_inputs(options)

            def make(options: Any = options) -> tuple[Candidate, dict[str, Any]]:
                return self.workflow.purified_experts(options), {"rho": options.rho}

            yield from self._scored("experts", "purified", "expert", inputs, make)

    def _merge_rows(self, step: MergeStep, vectors: Vectors) -> Iterator[dict[str, Any]]:
        inputs = {**self.stages.score_inputs("test"), "merge": self.stages.merge_inputs(step, vectors)}

        def make() -> tuple[Candidate, dict[str, Any]]:
            chosen = self.workflow.choose(step, vectors).completed()
            known = {**chosen.facts, **vars(chosen.cost)}
            facts = {key: value for key, value in known.items() if key in CARRIED_COLUMNS}
            return chosen.candidate(), {**facts, "form": chosen.method.form}

        yield from self._scored(step.name, vectors, "", inputs, make)

    def _scored(
        self,
        model: str,
        vectors: str,
        form: str,
        inputs: dict[str, Any],
        make: Callable[[], tuple[Candidate, dict[str, Any]]],
    ) -> Iterator[dict[str, Any]]:
        """The rows of one model; scored now, unless equal inputs were scored before."""
        name = "-".join(filter(None, [model, vectors, short_digest(inputs)]))
        found = self.folder.current(f"scores/{name}", inputs)
        if found is None:
            candidate, facts = make()
            with self.folder.writing(f"scores/{name}", inputs) as writer:
                writer.result.update(facts, scores=plain_scores(self.workflow.score(candidate, alone=True)))
            # Read back, so that rows come in the same order whether they were scored now or before.
            found = self.folder.current(f"scores/{name}", inputs)
        result = found.result if found is not None else {}
        for task, scores in result["scores"].items():
            headline = self.cell.recipe.task(task).headline
            for metric, value in scores["metrics"].items():
                yield {
                    **self.cell.values,
                    "seed": self.cell.seed,
                    "model": model,
                    "vectors": vectors,
                    "form": form or result["form"],
                    "task": task,
                    "metric": metric,
                    "is_headline": metric == headline,
                    "value": value,
                    "examples": scores["examples"],
                    **{column: _number(result.get(column)) for column in CARRIED_COLUMNS},
                }


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _summary_metrics(files: Sequence[Path], keys: Sequence[str]) -> dict[str, float]:
    """The mean of every line of the summary, for the record; named after model, vectors and varied keys."""
    summary = pd.read_csv(next(file for file in files if file.name == "summary.csv"), dtype=str, keep_default_na=False)
    metrics = {}
    for _, row in summary.iterrows():
        label = [row["model"], row["vectors"], *(f"{key}={row[key]}" for key in keys if row[key])]
        metrics["/".join(filter(None, label))] = float(row["mean"] or "nan")
    return metrics
