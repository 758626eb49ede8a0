"""The end of a run: tables, pictures, model cards, and all of it in MLflow."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from pave_lightning.pipeline.planning.merging import stored_parameters
from pave_lightning.pipeline.purifications import label
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.runner import Runner
from pave_lightning.pipeline.selections import excluded_sections
from pave_lightning.pipeline.stages import (
    CaptureStage,
    EvaluateStage,
    JointStage,
    MergeStage,
    PurifyStage,
    captures,
    stages_of,
)
from pave_lightning.pipeline.stages.benchmark import benchmark_stages, primary_metric
from pave_lightning.pipeline.stages.evaluate import ScoredJoint, ScoredModel, scored_models
from pave_lightning.pipeline.stages.fit import encoded_rows, own_digests
from pave_lightning.purification import KeptRank
from pave_lightning.purification.options import Purify
from pave_lightning.reporting.bootstrap import bootstrap_intervals
from pave_lightning.reporting.diagnostic_plots import natural
from pave_lightning.reporting.model_card import ExpertSource, model_card
from pave_lightning.reporting.plots import kept_ranks, normalised_scores
from pave_lightning.reporting.scores import EXPERT_HEADS, Model, Score, ScoreTable, model_of
from pave_lightning.reporting.tables import render
from pave_lightning.reporting.untouched import untouched_lines
from pave_lightning.reporting.verdicts import difference_lines, difference_sentences
from pave_lightning.statistics import NOT_REACHED
from pave_lightning.system.keeping import keeping
from pave_lightning.system.terminal import terminal
from pave_lightning.tasks.constants import constant_answer
from pave_lightning.tasks.predictions import FILE, read_predictions
from pave_lightning.tracking import Tracker, environment_tags

log = logging.getLogger("pave_lightning")


def write_report(runner: Runner, console: Console | None = None) -> ScoreTable:
    """Collect the scores, print the table, write ``results.csv``, ``results.parquet`` and the pictures, log everything.

    Raises:
        PaveError: scores are missing.
    """
    table = collect_scores(runner.results)
    root = runner.results.folder.root
    table.write_csv(root / "results.csv")
    table.write_parquet(root / "results.parquet")
    files = [root / "results.csv", root / "results.parquet"]
    if runner.results.recipe.merge:
        normalised_scores(table, root / "normalised_scores.png")
        files.append(root / "normalised_scores.png")
    files += _draw_ranks(runner)
    _write_cards(runner, table)
    if runner.context.tracker is not None:
        _record(runner, runner.context.tracker, table, files)
    console = console or terminal()
    console.print(render(table, console.width))
    for line in difference_lines(table):
        console.print(line, markup=False, highlight=False)
    _print_untouched(runner, console)
    console.print(f"results: {root / 'results.csv'}", soft_wrap=True)
    return table


def collect_scores(results: Results) -> ScoreTable:
    """The scores of base, experts and merged models from the run folder, with their intervals.

    Raises:
        PaveError: scores are missing or stale.
    """
    rows: list[Score] = []
    predictions = {}
    for model in scored_models(results):
        stage = EvaluateStage(results, model)
        found = results.finished(stage).result["scores"]
        what = _model(model)
        predictions[what], _ = read_predictions(results.path(stage) / FILE)
        for name, scores in found.items():
            primary = results.recipe.task(name).primary_metric
            for metric, value in scores["metrics"].items():
                measured = {"task": name, "metric": metric, "value": value, "examples": scores["examples"]}
                rows.append(Score.of(what, is_primary=metric == primary, **measured))
    for benchmark in benchmark_stages(results):
        result, what, name = results.finished(benchmark).result, _model(benchmark.model), benchmark.benchmark
        kept, _ = read_predictions(results.path(benchmark) / FILE)
        predictions[what] = {**predictions[what], **kept}
        scores = result["scores"][name]
        chosen = primary_metric(benchmark, scores, result["lower"])
        for metric, value in scores["metrics"].items():
            measured = {"task": name, "metric": metric, "value": value, "examples": scores["examples"]}
            rows.append(Score.of(what, is_primary=metric == chosen, **measured))
    table = ScoreTable(rows, _constants(results))
    intervals = bootstrap_intervals(table, predictions, seed=results.recipe.seed)
    return ScoreTable(rows, table.constants, intervals)


def _model(scored: ScoredModel) -> Model:
    """A scored model in a table."""
    return Model(scored.model, scored.vectors, scored.form, scored.heads, scored.is_control)


def _constants(results: Results) -> dict[str, dict[str, float]]:
    """What always the same answer scores on each test split, by task and metric."""
    recipe, cache = results.recipe, results.folder.data
    with keeping():  # most tasks have the base's tokenizer
        return {task.name: constant_answer(encoded_rows(recipe, task, cache), "test") for task in recipe.tasks}


def _draw_ranks(runner: Runner) -> list[Path]:
    """One heat map for each distinct purification."""
    distinct = _purifications(runner.results)
    files = []
    for name, options in distinct.items():
        ending = "" if len(distinct) == 1 else f"-{name}"
        path = runner.results.folder.root / f"kept_ranks{ending}.png"
        ranks = [KeptRank(*entry) for entry in _made(runner, options)["ranks"]]
        kept_ranks(sorted(ranks, key=lambda kept: natural(kept.layer)), path)
        files.append(path)
    return files


def _purifications(results: Results) -> dict[str, Purify]:
    """The distinct purifications that merged models were made with, by what they are called in names of folders."""
    merges = MergeStage.all(results)
    used = [merge.stack_as_chosen(results.finished(merge).result).purification for merge in merges]
    return {label(options): options for options in used if options is not None and not options.changes_nothing}


def _made(runner: Runner, options: Purify) -> dict[str, Any]:
    """What is known of a purification; made anew where it was cleared away: merged models do not need it any more."""
    return runner.made(PurifyStage(runner.results, options)).result


def _untouched(runner: Runner, options: Purify) -> list[list[str]]:
    """Task, layer and reason of each layer that a purification left as it is."""
    found: list[list[str]] = [] if options.changes_nothing else _made(runner, options).get("untouched", [])
    return found


def _unreached(results: Results) -> Iterator[tuple[str, str, str]]:
    """Task, layer and reason of each layer that was watched in vain when the statistics were captured."""
    for stage in stages_of(results):
        if not isinstance(stage, CaptureStage):
            continue
        found = results.current(stage)
        layers = found.result.get("unreached", []) if found is not None else ()
        reasons = layers if isinstance(layers, dict) else {}  # as results of older versions have them not
        for layer in layers:
            yield stage.task.name, layer, reasons.get(layer, NOT_REACHED)


def _print_untouched(runner: Runner, console: Console) -> None:
    """What is not merged or captured, what the statistics lack, and what each purification left as it is."""
    merges, captured = bool(runner.results.recipe.merge), captures(runner.results)
    sections = runner.context.coverage.sections(merges=merges, captures=captured)
    sections |= excluded_sections(runner.results.recipe.merge, _parameter_names(runner))
    sections["capture: layers without statistics"] = untouched_lines(_unreached(runner.results))
    for options in _purifications(runner.results).values():
        heading = f"purification ({options.summary}): layers left as they are"
        sections[heading] = untouched_lines(_untouched(runner, options))
    for heading, lines in sections.items():
        if lines:
            console.print("\n".join([heading, *(f"  {line}" for line in lines)]), soft_wrap=True, markup=False)


def _parameter_names(runner: Runner) -> list[str]:
    """Names of the parameters that base and experts share."""
    context = runner.context
    return [parameter.name for parameter in stored_parameters(context.base, context.architecture)]


def _write_cards(runner: Runner, table: ScoreTable) -> None:
    """A README.md in each merged folder. It stands outside the manifest, because scores come after merging."""
    recipe = runner.results.recipe
    experts = [
        ExpertSource(
            task.name, str(task.expert.from_) if task.expert else "fine-tuned in this run", digest.partition("+")[0]
        )
        for task, digest in zip(recipe.tasks, own_digests(runner.results).values(), strict=True)
    ]
    versions = {name.removeprefix("version."): text for name, text in environment_tags().items()}
    for merge in MergeStage.all(runner.results):
        step, vectors = merge.step, merge.vectors
        facts = runner.results.finished(merge).result
        found = f"best of {len(facts['search'])} on the validation splits" if "search" in facts else ""
        made = merge.stack_as_chosen(facts)
        purify = made.purification
        purification = None if purify is None or not made.is_built_in else purify.model_dump()
        if purification is not None and "rho_search" in facts:
            purification["rho_origin"] = (
                f"best of {len({entry[0] for entry in facts['rho_search']})} on the validation splits"
            )
        card = model_card(
            name=step.name,
            title=f"{recipe.name}: {merge.words}",
            base_model=runner.results.base_reference,
            method=step.method,
            form=facts["form"],
            vectors=vectors,
            heads=facts.get("heads"),
            tasks=[task.name for task in recipe.tasks],
            options=facts["options"],
            scale=facts["scale"],
            scale_origin=found,
            purification=purification,
            transforms=facts.get("transforms", ()),
            untouched=() if purify is None else _untouched(runner, purify),
            left_out={
                **runner.context.coverage.sections(captures=made.rho is not None),
                **excluded_sections([step], _parameter_names(runner)),
            },
            experts=experts,
            scores=ScoreTable(
                (
                    score
                    for score in table.scores
                    if score.form in ("base", "expert") or (score.model, score.vectors) == (step.name, vectors)
                ),
                table.constants,
                table.intervals,
            ),
            differences=[
                sentence
                for model in table.models()
                if (model.name, model.vectors) == (step.name, vectors)
                for sentence in difference_sentences(table, model)
            ],
            versions=versions,
        )
        runner.results.folder.write_text(f"{merge.name}/README.md", card)


def _record(runner: Runner, tracker: Tracker, table: ScoreTable, files: list[Path]) -> None:
    """Scores and files into the MLflow tree: averages and files in the parent, each model's scores in its child."""
    parent = tracker.parent_run_id
    averages: dict[str, float] = {}
    for model in table.models():
        heads = "" if model.heads == EXPERT_HEADS else f"heads-{model.heads}"
        label = "-".join(filter(None, [model.name, model.vectors, heads]))
        averages |= {f"{name}/{label}{end}": value for (name, end), value in _averages(table, model).items()}
    tracker.complete_parent("report", averages)
    for file in files:
        tracker.log_file(parent, file)
    lm_eval = runner.results.recipe.evaluate.lm_eval
    benchmarks = {} if lm_eval is None else lm_eval.benchmarks
    for task in runner.results.recipe.tasks:
        of_experts = [score for score in table.scores if score.form == "expert"]
        own = [score for score in of_experts if score.task == task.name]
        values = {f"test/{score.metric}": score.value for score in own}
        theirs = [one for one in of_experts if one.task in benchmarks and benchmarks[one.task].expert == task.name]
        values |= {f"test/{score.task}/{score.metric}": score.value for score in theirs}
        for score in own:
            constant = table.constants[task.name][score.metric]
            values[f"test/{score.metric}/constant"] = constant
            values[f"test/{score.metric}/above_constant"] = score.value - constant
        tracker.complete(f"expert:{task.name}", stage="fit", part="report", metrics=values)
    joint_row = (ScoredJoint.model, ScoredJoint.vectors, ScoredJoint.heads)
    for joint in JointStage.asked(runner.results):
        tracker.complete(joint.name, stage="fit", part="report", metrics=_model_metrics(table, joint_row))
    for merge in MergeStage.all(runner.results):
        name, params = merge.run_name, merge.params()
        metrics = _model_metrics(table, (merge.step.name, merge.vectors, merge.heads.label))
        tracker.complete(name, stage="merge", part="report", metrics=metrics, params=params)
        if runner.results.recipe.tracking.upload_models:
            run = tracker.child(name, stage="merge", params=params)
            tracker.log_folder(run, runner.results.path(merge), "model")
            tracker.end(run, "FINISHED")


def _model_metrics(table: ScoreTable, row: tuple[str, str, str]) -> dict[str, float]:
    """The scores of a model by its name, vectors and heads; none of one that is only there to lend its weights."""
    model = next((found for found in table.models() if (found.name, found.vectors, found.heads) == row), None)
    if model is None:
        return {}
    metrics = {f"{name}{end}": value for (name, end), value in _averages(table, model).items()}
    for score in table.scores:
        if model_of(score) == model:
            metrics[f"test/{score.task}/{score.metric}"] = score.value
            if score.is_primary:
                metrics[f"normalised/{score.task}"] = table.normalised(score)
    return metrics


def _averages(table: ScoreTable, model: Model) -> dict[tuple[str, str], float]:
    """The averages of a model and the ends of their intervals where these are known, by name and ending."""
    found = {
        "average": (table.average(model), table.average_interval(model)),
        "normalised_average": (table.normalised_average(model), table.normalised_average_interval(model)),
    }
    ends = {
        (name, f"/{end}"): value
        for name, (_, interval) in found.items()
        if interval.is_known
        for end, value in (("low", interval.low), ("high", interval.high))
    }
    return {(name, ""): value for name, (value, _) in found.items()} | ends
