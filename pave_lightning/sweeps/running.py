"""Sweeps: a recipe run over a grid of settings and seeds, its scores in one table, with a picture and findings."""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from pave_lightning.errors import PaveError, Problems
from pave_lightning.evaluation import Candidate
from pave_lightning.evaluation.options import EXPERT_HEADS
from pave_lightning.pipeline.commands import open_folder, planning_folder, print_under, read_recipe, working
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.planning import check_recipe, merge_problems
from pave_lightning.pipeline.purifications import purifications
from pave_lightning.pipeline.results import Results, short_digest
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.pipeline.runner import Runner
from pave_lightning.pipeline.stage import Stage
from pave_lightning.pipeline.stages import CaptureStage, EvaluateStage, FitStage, MergeStage, stages_of
from pave_lightning.pipeline.stages.evaluate import ScoredMerge, ScoredPurifiedExperts, controls, untouched_models
from pave_lightning.pipeline.stages.heads import fit_heads, head_inputs
from pave_lightning.pipeline.stages.merge import chooser
from pave_lightning.recipe.finding import find_sweep
from pave_lightning.recipe.loading import load_recipe
from pave_lightning.recipe.schema import Recipe
from pave_lightning.recipe.sweep import Sweep
from pave_lightning.reporting.sweep_view import CARRIED_COLUMNS
from pave_lightning.reporting.sweeps import SweepView, write_sweep
from pave_lightning.system.files import DAMAGED
from pave_lightning.system.terminal import terminal

log = logging.getLogger("pave_lightning")

HEADS = "heads"


@dataclass(frozen=True)
class Cell:
    """One setting of a sweep with one seed.

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


def run_sweep(name: str, overrides: Sequence[str] = (), *, verify: bool = False) -> Path:
    """Run a sweep and write its table, picture and findings. Scores that are there are not computed again.

    Args:
        name: path of a recipe with a sweep section, or the name of one; see `find_sweep`.
        overrides: ``key=value`` texts for the recipe, as in `load_recipe`; they hold in every cell.
        verify: hash every input and every result that is there, whatever their sizes and times say.

    Returns:
        The run folder.

    Raises:
        PaveError: there is no such sweep, or something is wrong with its recipe in any of its settings.
    """
    recipe, cells = _grid(name, overrides)
    _check(cells, view_of(recipe), open_folder(recipe, verify=verify))
    with working(recipe, verify=verify) as runner:
        root = runner.results.folder.root
        rows: list[dict[str, Any]] = []
        told = HEADS in keys_of(cells)
        for number, cell in enumerate(cells, start=1):
            log.info("%d of %d: %s", number, len(cells), cell.label)
            rows += cell_rows(cell, runner, heads=told)
        files = write_sweep(pd.DataFrame(rows), view_of(recipe), root)
        tracker = runner.context.tracker
        if tracker is not None:
            for file in files:
                tracker.log_file(tracker.parent_run_id, file)
            tracker.complete_parent("summary", _summary_metrics(files, keys_of(cells)))
    return root


def plan_sweep(
    name: str, overrides: Sequence[str] = (), console: Console | None = None, *, verify: bool = False
) -> None:
    """Check a sweep in all of its settings, run nothing, and print which scores are there and which to do.

    Args:
        name: as in `run_sweep`.
        overrides: as in `run_sweep`.
        console: where to print.
        verify: hash every input and every result that is there, whatever their sizes and times say.

    Raises:
        PaveError: lists everything that is wrong.
    """
    recipe, cells = _grid(name, overrides)
    with planning_folder(recipe, verify=verify) as folder:
        _check(cells, view_of(recipe), folder)
        table = Table()
        for heading in ("", "setting", "experts", "scores"):
            table.add_column(heading)
        undone = 0
        for number, cell in enumerate(cells, start=1):
            results = Results(cell.recipe, folder)
            experts = [results.is_there(stage) for stage in FitStage.all(results)]
            scores = [results.is_there(stage) for stage in CellScores.all(results)]
            undone += not all(scores)
            table.add_row(str(number), cell.label, _told(experts), _told(scores))
        table.caption, table.caption_justify = f"{len(cells)} settings, {undone} to do", "left"
        print_under(f"sweep {recipe.name} in {folder.root}", table, console or terminal())


def keys_of(cells: Sequence[Cell]) -> list[str]:
    """What tells the settings of a sweep apart: the varied keys, and the heads where any are fitted."""
    fitted = any(cell.recipe.fitted_heads for cell in cells)
    return list(dict.fromkeys([*cells[0].values, *([HEADS] if fitted else [])]))


def _told(there: Sequence[bool]) -> str:
    return "there" if all(there) else f"{sum(there)} of {len(there)} there" if any(there) else f"{len(there)} to do"


def _grid(name: str, overrides: Sequence[str]) -> tuple[Recipe, list[Cell]]:
    """The recipe of a sweep, with a shared folder, and all of its cells."""
    path = find_sweep(name)
    recipe = read_recipe(path, overrides)
    sweep = recipe.sweep
    if sweep is None:
        raise PaveError(f"{path} has no section 'sweep'; run it with `pave run`, or say what is to be varied")
    _refuse_overruled(overrides, sweep)
    if recipe.shared is None:
        # Every seed and setting keeps its own experts, under names that tell them apart.
        overrides = [*overrides, f"shared={json.dumps(str(Path(recipe.output) / recipe.name))}"]
        recipe = read_recipe(path, overrides)
    return recipe, list(make_cells(path, overrides, sweep))


def make_cells(path: Path, overrides: Sequence[str], sweep: Sweep) -> Iterator[Cell]:
    """Every setting with every seed, each recipe checked."""
    cases: list[tuple[str, dict[str, Any]]] = list(sweep.cases.items()) or [("", {})]
    for seed in sweep.seeds:
        for case, changes in cases:
            for combination in itertools.product(*sweep.vary.values()):
                varied = dict(zip(sweep.vary, combination, strict=True))
                settings = {"seed": seed, **changes, **varied}
                texts = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
                values = {**({"case": case} if case else {}), **varied}
                yield Cell(values, seed, load_recipe(path, [*overrides, *texts]))


def _refuse_overruled(overrides: Sequence[str], sweep: Sweep) -> None:
    varied = {"seed", *sweep.vary, *(key for changes in sweep.cases.values() for key in changes)}
    problems = Problems("what the sweep varies cannot be set for all of its settings:")
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in varied:
            where = "sweep.seeds" if key == "seed" else "sweep.vary or sweep.cases"
            problems.add(f"--set {key}: change {where} instead")
    problems.raise_if_any()


def _check(cells: Sequence[Cell], view: SweepView, folder: RunFolder) -> None:
    """Find out before anything runs what is wrong with the view or with any setting.

    Data, models and trainer are looked at once for all settings that have them in common; seeds change nothing here.
    """
    problems = Problems(f"the sweep {cells[0].recipe.name} cannot be run:")
    problems.extend(f"sweep.{problem}" for problem in view.problems(keys_of(cells)))
    problems.extend(_idle_settings(cells))
    for cell in cells:
        if cell.recipe.evaluate.purified_experts and len(purifications(cell.recipe)) > 1:
            problems.add("evaluate.purified_experts: a sweep scores the experts of one purification, found several")
            break
    if any("joint" in cell.recipe.controls for cell in cells):
        problems.add("controls: a sweep trains no joint model; set controls: [base, probe, experts, each], or fewer")
    if any(cell.recipe.evaluate.lm_eval is not None for cell in cells):
        problems.add("evaluate.lm_eval: a sweep scores test splits alone; set evaluate.lm_eval: null")
    looked_at: set[str] = set()
    for cell in (cell for cell in cells if cell.seed == cells[0].seed):
        others = cell.recipe.model_dump_json(exclude={"purify", "vectors", "merge"})
        setting = ", ".join(f"{key}={value}" for key, value in cell.values.items())
        where = f"{setting}: " if setting else ""
        if others in looked_at:
            problems.extend(f"{where}{problem}" for problem in merge_problems(cell.recipe))
            continue
        looked_at.add(others)
        try:
            check_recipe(cell.recipe, folder)
        except PaveError as error:
            problems.add(f"{where}{error}")
    problems.raise_if_any()


def _idle_settings(cells: Sequence[Cell]) -> Iterator[str]:
    """Settings that do the same as one before: their keys are overruled, as the recipe's purify is by a step's own."""
    seen: dict[str, Cell] = {}
    for cell in (cell for cell in cells if cell.seed == cells[0].seed):
        handed_down = {"name", "sweep", "trainer", "training", "examples"}
        if cell.recipe.merge:
            handed_down.add("purify")
        done = cell.recipe.model_dump_json(exclude=handed_down)
        if done in seen:
            yield f"{cell.label} does the very same as {seen[done].label}: its keys are overruled by others"
        seen.setdefault(done, cell)


def view_of(recipe: Recipe) -> SweepView:
    """What the picture and the findings look at."""
    sweep = recipe.sweep
    if sweep is None:
        raise PaveError(f"the recipe {recipe.name} has no section 'sweep'")
    keys = [*sweep.vary, *(["case"] if sweep.cases else [])]
    return SweepView(
        question=sweep.question,
        x=sweep.x or (keys[0] if keys else "model"),
        lines=tuple(sweep.lines) or None,
        score=sweep.score,
        log_x=sweep.log_x,
    )


class TriedMerge(ScoredMerge):
    """A merged model of a cell, in memory: its folder would be that of every other cell."""

    may_fail = True

    @property
    def weights(self) -> MergeStage:
        """The merge that gives its weights, of which nothing is written."""
        (weights,) = self.merge.weights_from or [self.merge]
        return weights

    def needs(self) -> Sequence[Stage]:
        """What the merge needs."""
        return self.weights.needs()

    def depends_on(self) -> dict[str, Any]:
        """What the merged model depends on."""
        fitted = {"fitted": head_inputs(self.results, self.merge.heads)} if self.merge.weights_from else {}
        return {"merge": self.weights.inputs(), **fitted}

    def candidate(self, context: Context) -> tuple[Candidate, dict[str, Any]]:
        """The merge result, and what was chosen and what it took."""
        heads, merge = self.merge.heads, self.weights
        chosen = chooser(context).choose(merge.step, merge.vectors, merge.heads, complete=True)
        known = {**chosen.facts, **vars(chosen.cost)}
        candidate: Candidate = chosen.fitted or chosen.candidate()
        if heads.fitted and chosen.fitted is None:
            candidate = fit_heads(context, candidate, heads)
        return candidate, {key: value for key, value in known.items() if key in CARRIED_COLUMNS}


class CellScores(EvaluateStage):
    """The scores of one model of a cell: kept under a name that tells cells apart, and taken in this process."""

    @classmethod
    def all(cls, results: Results) -> Sequence[CellScores]:
        """Those of every model of a cell, in the order of work."""
        merged = (TriedMerge(results, *asked) for asked in results.recipe.merged_models())
        return [cls(results, model) for model in (*untouched_models(results), *controls(results), *merged)]

    @property
    def name(self) -> str:
        """``scores/LABEL-DIGEST``.

        Raises:
            PaveError: what it builds on is missing or stale.
        """
        return f"{super().name}-{short_digest(self.inputs())}"

    @property
    def doing(self) -> str:
        """What is done, in the log and in messages."""
        model = self.model
        about = filter(None, [model.vectors, "" if model.heads == EXPERT_HEADS.label else f"heads {model.heads}"])
        told = f"{model.model} ({', '.join(about)})".removesuffix(" ()")
        return f"{'merge' if isinstance(model, TriedMerge) else 'score'} {told}"

    @property
    def trainer(self) -> None:
        """None, so that no further process is started."""
        return


def cell_rows(cell: Cell, driver: Runner, *, heads: bool = False) -> Iterator[dict[str, Any]]:
    """Make what is not there of one cell; one row for every model, task and metric.

    Args:
        cell: the setting.
        driver: runs the sweep, whose folder and record are used.
        heads: whether the rows say under which heads a model was scored.
    """
    trained = cell.recipe.model_dump(mode="json", by_alias=True, include={"base", "trainer", "tasks"})
    results = Results(cell.recipe, driver.results.folder)
    context = Context(
        results,
        driver.context.tracker,
        label=f"seed {cell.seed} {short_digest(trained)}/",
        references=driver.context.references,
    )
    runner = Runner(context, driver.launcher)
    there = _purified_folders(results.folder)
    runner.run(stage for stage in stages_of(results) if isinstance(stage, FitStage | CaptureStage))
    scores = CellScores.all(results)
    runner.run(scores)
    # Large, and made anew from the same statistics in seconds. What a run of this recipe left before stays.
    for folder in _purified_folders(results.folder) - there:
        shutil.rmtree(folder, ignore_errors=True)
    for stage in scores:
        yield from ({**row, HEADS: stage.model.heads} if heads else row for row in _scored(cell, stage))


def _purified_folders(folder: RunFolder) -> set[Path]:
    return {found for found in folder.path("purified").glob("*") if DAMAGED not in found.name}


def _scored(cell: Cell, stage: CellScores) -> Iterator[dict[str, Any]]:
    """The rows of one model."""
    model, result = stage.model, stage.results.finished(stage.begun()).result
    for task, scores in result["scores"].items():
        primary = cell.recipe.task(task).primary_metric
        for metric, value in scores["metrics"].items():
            yield {
                **cell.values,
                "seed": cell.seed,
                "model": model.model,
                "vectors": model.vectors,
                "form": "expert" if isinstance(model, ScoredPurifiedExperts) else model.form,
                "task": task,
                "metric": metric,
                "is_headline": metric == primary,
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
