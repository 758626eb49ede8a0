"""The end of a run: tables, pictures, model cards, and all of it in MLflow."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from pave_lightning.diagnostics import DiagnosticOptions, diagnose
from pave_lightning.merging.methods.dare import DareOptions
from pave_lightning.pipeline.workflow import Workflow, merge_params
from pave_lightning.purification import KeptRank, PurifiedTaskVectors
from pave_lightning.purification.options import Purify
from pave_lightning.recipe.merge_step import MergeStep
from pave_lightning.reporting.diagnostic_plots import natural, write_diagnostics
from pave_lightning.reporting.model_card import ExpertSource, model_card
from pave_lightning.reporting.plots import kept_ranks, normalised_scores
from pave_lightning.reporting.scores import Model, Score, ScoreTable
from pave_lightning.reporting.tables import render
from pave_lightning.reporting.untouched import untouched_lines
from pave_lightning.system.terminal import terminal
from pave_lightning.tasks.constants import constant_answer
from pave_lightning.tracking import Tracker, environment_tags

log = logging.getLogger("pave_lightning")


def write_report(workflow: Workflow, console: Console | None = None) -> ScoreTable:
    """Collect the scores, print the table, write ``results.csv``, ``results.parquet`` and the pictures, log everything.

    Raises:
        PaveError: scores are missing.
    """
    table = collect_scores(workflow)
    root = workflow.folder.root
    table.write_csv(root / "results.csv")
    table.write_parquet(root / "results.parquet")
    files = [root / "results.csv", root / "results.parquet"]
    if workflow.recipe.merge:
        normalised_scores(table, root / "normalised_scores.png")
        files.append(root / "normalised_scores.png")
    files += _draw_ranks(workflow)
    _write_cards(workflow, table)
    if workflow.tracker is not None:
        _record(workflow, workflow.tracker, table, files)
    console = console or terminal()
    console.print(render(table, console.width))
    _print_untouched(workflow, console)
    console.print(f"results: {root / 'results.csv'}", soft_wrap=True)
    return table


def report_diagnostics(workflow: Workflow) -> list[Path]:
    """Look at what each purification of the recipe does; write tables and pictures, and log them.

    Returns:
        The folders, one for each distinct purification.

    Raises:
        PaveError: experts or statistics are missing or stale.
    """
    folders = []
    for options in workflow.stages.purifications():
        stage = workflow.stages.diagnostics(options).begun()
        folder = workflow.folder.path(stage.name)
        folders.append(folder)
        if workflow.stages.current(stage) is not None:
            log.info("%s is up to date", stage.name)
            continue
        log.info("diagnose (%s) ...", options.summary)
        purified = PurifiedTaskVectors(workflow.plain, workflow.statistics, options, workflow.recipe.compute)
        looked_at = DiagnosticOptions(dare=DareOptions(seed=workflow.recipe.seed))
        found = diagnose(workflow.plain, purified, workflow.statistics, looked_at)
        with workflow.folder.writing(stage.name, stage.inputs()) as writer:
            write_diagnostics(found, writer.path)
        if workflow.tracker is not None:
            workflow.tracker.log_folder(workflow.tracker.parent_run_id, folder, stage.name)
    return folders


def collect_scores(workflow: Workflow) -> ScoreTable:
    """The scores of base, experts and merged models from the run folder."""
    rows: list[Score] = []

    stages = workflow.stages
    scored = {stage.name: stages.finished(stage) for stage in stages.scores()}

    def add(stage: str, model: str, vectors: Any, form: Any) -> None:
        for name, found in scored[stage].result["scores"].items():
            primary = workflow.recipe.task(name).primary_metric
            for metric, value in found["metrics"].items():
                rows.append(Score(model, vectors, form, name, metric, metric == primary, value, found["examples"]))

    add("scores/base", "base", "", "base")
    add("scores/experts", "experts", "", "expert")
    alone = stages.purified_expert_scores()
    for name in alone:
        # One model for each task; the form expert is kept for those whose scores normalise all others.
        add(f"scores/{name}", "experts" if len(alone) == 1 else name, "purified", "per-task")
    for step, vectors in stages.merges():
        form = stages.finished(stages.merged(step, vectors)).result["form"]
        add(stages.scores_of(step, vectors).name, step.name, vectors, form)
    return ScoreTable(rows, _constants(workflow))


def _constants(workflow: Workflow) -> dict[str, dict[str, float]]:
    """What always the same answer scores on each test split, by task and metric."""
    recipe, cache = workflow.recipe, workflow.folder.data
    return {task.name: constant_answer(task, "test", seed=recipe.seed, cache_dir=cache) for task in recipe.tasks}


def _draw_ranks(workflow: Workflow) -> list[Path]:
    """One heat map for each distinct purification."""
    distinct = _purifications(workflow)
    files = []
    for name, options in distinct.items():
        ending = "" if len(distinct) == 1 else "-" + name.partition("/")[2]
        path = workflow.folder.root / f"kept_ranks{ending}.png"
        # Made anew where it was cleared away: merged models do not need it any more.
        ranks = [KeptRank(*entry) for entry in workflow.purify(options).result["ranks"]]
        kept_ranks(sorted(ranks, key=lambda kept: natural(kept.layer)), path)
        files.append(path)
    return files


def _purifications(workflow: Workflow) -> dict[str, Purify]:
    """The distinct purifications that merged models were made with, by the names of their stages."""
    stages = workflow.stages
    used = [_purification(workflow, step) for step, kind in stages.merges() if kind == "purified"]
    return {stages.purified(options).name: options for options in used if options.rho != 1}


def _purification(workflow: Workflow, step: MergeStep) -> Purify:
    """The purification that a merged model was made with: the chosen ratio where the recipe says auto."""
    facts = workflow.stages.finished(workflow.stages.merged(step, "purified")).result
    return step.purify.model_copy(update={"rho": facts["rho"]})


def _untouched(workflow: Workflow, options: Purify) -> list[list[str]]:
    """Task, layer and reason of each layer that a purification left as it is."""
    found: list[list[str]] = workflow.purify(options).result.get("untouched", []) if options.rho != 1 else []
    return found


def _unreached(workflow: Workflow) -> Iterator[tuple[str, str, str]]:
    """Task, layer and reason of each layer that was watched in vain when the statistics were captured."""
    stages = workflow.stages
    for task in workflow.recipe.tasks if stages.need_statistics() else ():
        found = stages.current(stages.statistics(task))
        for layer in found.result.get("unreached", []) if found is not None else ():
            yield task.name, layer, "no example reached it"


def _print_untouched(workflow: Workflow, console: Console) -> None:
    """What is not merged or captured, what the statistics lack, and what each purification left as it is."""
    merges, captures = bool(workflow.recipe.merge), workflow.stages.need_statistics()
    sections = workflow.coverage.sections(merges=merges, captures=captures)
    sections["capture: layers without statistics"] = untouched_lines(_unreached(workflow))
    for options in _purifications(workflow).values():
        heading = f"purification ({options.summary}): layers left as they are"
        sections[heading] = untouched_lines(_untouched(workflow, options))
    for heading, lines in sections.items():
        if lines:
            console.print("\n".join([heading, *(f"  {line}" for line in lines)]), soft_wrap=True, markup=False)


def _write_cards(workflow: Workflow, table: ScoreTable) -> None:
    """A README.md in each merged folder. It stands outside the manifest, because scores come after merging."""
    recipe = workflow.recipe
    experts = [
        ExpertSource(
            task.name, task.expert.from_ if task.expert else "fine-tuned in this run", digest.partition("+")[0]
        )
        for task, digest in zip(recipe.tasks, workflow.stages.expert_digests().values(), strict=True)
    ]
    versions = {name.removeprefix("version."): text for name, text in environment_tags().items()}
    for step, vectors in workflow.stages.merges():
        stage = workflow.stages.merged(step, vectors)
        facts = workflow.stages.finished(stage).result
        found = f"best of {len(facts['search'])} on the validation splits" if "search" in facts else ""
        purify = _purification(workflow, step) if vectors == "purified" else None
        purification = None if purify is None else purify.model_dump()
        if purification is not None and "rho_search" in facts:
            purification["rho_origin"] = (
                f"best of {len({entry[0] for entry in facts['rho_search']})} on the validation splits"
            )
        card = model_card(
            name=step.name,
            title=f"{recipe.name}: {step.name} ({vectors})",
            base_model=recipe.base,
            method=step.method,
            form=facts["form"],
            vectors=vectors,
            tasks=[task.name for task in recipe.tasks],
            options=facts["options"],
            scale=facts["scale"],
            scale_origin=found,
            purification=purification,
            untouched=() if purify is None else _untouched(workflow, purify),
            left_out=workflow.coverage.sections(captures=purify is not None),
            experts=experts,
            scores=ScoreTable(
                (
                    score
                    for score in table.scores
                    if score.form in ("base", "expert") or (score.model, score.vectors) == (step.name, vectors)
                ),
                table.constants,
            ),
            versions=versions,
        )
        workflow.folder.write_text(f"{stage.name}/README.md", card)


def _record(workflow: Workflow, tracker: Tracker, table: ScoreTable, files: list[Path]) -> None:
    """Scores and files into the MLflow tree: averages and files in the parent, each model's scores in its child."""
    parent = tracker.parent_run_id
    averages: dict[str, float] = {}
    for model in table.models():
        label = model.name if not model.vectors else f"{model.name}-{model.vectors}"
        averages[f"average/{label}"] = table.average(model)
        averages[f"normalised_average/{label}"] = table.normalised_average(model)
    tracker.complete_parent("report", averages)
    for file in files:
        tracker.log_file(parent, file)
    for task in workflow.recipe.tasks:
        own = [score for score in table.scores if score.form == "expert" and score.task == task.name]
        values = {f"test/{score.metric}": score.value for score in own}
        for score in own:
            constant = table.constants[task.name][score.metric]
            values[f"test/{score.metric}/constant"] = constant
            values[f"test/{score.metric}/above_constant"] = score.value - constant
        tracker.complete(f"expert:{task.name}", stage="fit", part="report", metrics=values)
    for step, vectors in workflow.stages.merges():
        name, params = f"merge:{step.name}:{vectors}", merge_params(step, vectors)
        metrics = _model_metrics(table, step.name, vectors)
        tracker.complete(name, stage="merge", part="report", metrics=metrics, params=params)
        if workflow.recipe.tracking.upload_models:
            run = tracker.child(name, stage="merge", params=params)
            tracker.log_folder(run, workflow.folder.path(workflow.stages.merged(step, vectors).name), "model")
            tracker.end(run, "FINISHED")


def _model_metrics(table: ScoreTable, name: str, vectors: str) -> dict[str, float]:
    model = next(m for m in table.models() if (m.name, m.vectors) == (name, vectors))
    metrics = {"average": table.average(model), "normalised_average": table.normalised_average(model)}
    for score in table.scores:
        if Model(score.model, score.vectors, score.form) == model:
            metrics[f"test/{score.task}/{score.metric}"] = score.value
            if score.is_primary:
                metrics[f"normalised/{score.task}"] = table.normalised(score)
    return metrics
