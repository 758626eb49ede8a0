"""The page of a run: what is in the run folder, as the page takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pave_lightning.merging import method_named
from pave_lightning.pipeline.purifications import fixed_purifications
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.run_folder import Manifest
from pave_lightning.pipeline.stages import DiagnoseStage, FitStage, MergeStage
from pave_lightning.pipeline.stages.evaluate import scored_models
from pave_lightning.pipeline.stages.fit import own_digests
from pave_lightning.purification import KeptRank
from pave_lightning.recipe.loading import recipe_to_yaml
from pave_lightning.reporting.page import write_page
from pave_lightning.reporting.page.costs import MergedCost
from pave_lightning.reporting.page.run import RunFacts, best_model, run_page
from pave_lightning.reporting.page.training import Expert
from pave_lightning.reporting.page.use import BestModel
from pave_lightning.reporting.scores import Model, ScoreTable
from pave_lightning.tasks.kinds.text_classification import TextClassification
from pave_lightning.tracking import environment_tags

REPORT = "report.html"
# Files of a run that the page names, with what is in them.
FILES = {
    "results.csv": "scores, a row a model",
    "results.parquet": "scores, a row a metric, with intervals",
    "normalised_scores.png": "picture",
    "recipe.yaml": "the recipe",
    "merged": "merged models, each with a model card",
    "experts": "experts",
}
# Tables of the diagnostics that the page shows.
DIAGNOSED = ("spectra", "conflict_summary", "subspace_overlap")


def write_run_page(
    results: Results,
    table: ScoreTable,
    ranks: Mapping[str, Sequence[KeptRank]],
    left_out: Mapping[str, Sequence[str]],
) -> Path:
    """Write ``report.html`` into the run folder.

    Args:
        results: the recipe, and what is there of it.
        table: its scores.
        ranks: what each purification kept, by its words.
        left_out: lines on what was not merged, captured or purified, by heading.

    Raises:
        PaveError: an expert or a merged model is missing or stale.
    """
    root, recipe = results.folder.root, results.recipe
    merged = {_model(merge): (merge, results.finished(merge)) for merge in MergeStage.all(results)}
    facts = RunFacts(
        recipe.name,
        results.base_reference,
        table,
        experts=_experts(results),
        costs={model: merged_cost(found) for model, (_, found) in merged.items()},
        ranks=ranks,
        diagnostics=_diagnostics(results),
        best=_best(results, table, {model: merge for model, (merge, _) in merged.items()}),
        left_out=left_out,
        recipe=recipe_to_yaml(recipe),
        versions={name.removeprefix("version."): text for name, text in environment_tags().items()},
        files={name: what for name, what in FILES.items() if (root / name).exists()},
    )
    return write_page(run_page(facts), root / REPORT)


def _model(merge: MergeStage) -> Model:
    return Model(merge.step.name, merge.vectors, method_named(merge.step.method).form, merge.heads.label)


def merged_cost(found: Manifest) -> MergedCost:
    """What a merged model took and keeps, as its manifest says."""
    sizes = {Path(name): int(file["size"]) for name, file in found.files.items() if name.endswith(".safetensors")}
    return MergedCost(
        **found.result.get("cost", {}),
        shared_bytes=sum(size for name, size in sizes.items() if len(name.parts) == 1),
        kept_bytes={name.stem: size for name, size in sizes.items() if name.parts[0] == "modulators"},
    )


def _experts(results: Results) -> list[Expert]:
    stages = {stage.task.name: stage for stage in FitStage.all(results)}
    digests = own_digests(results)
    experts = []
    for task in results.recipe.tasks:
        found = results.finished(stages[task.name]).result
        experts.append(
            Expert(
                task.name,
                "" if task.expert is None else str(task.expert.from_),
                digests[task.name].partition("+")[0],
                task.primary_metric,
                found.get("metrics", {}),
                found.get("curves", {}),
            )
        )
    return experts


def _diagnostics(results: Results) -> dict[str, dict[str, object]]:
    """The tables of all diagnostics that are there and up to date, by the words of the purification."""
    import pandas as pd

    found = {}
    for stage in (DiagnoseStage(results, options) for options in fixed_purifications(results.recipe)):
        if results.is_there(stage):
            folder = results.path(stage)
            found[stage.options.summary] = {name: pd.read_parquet(folder / f"{name}.parquet") for name in DIAGNOSED}
    return found


def _best(results: Results, table: ScoreTable, merged: Mapping[Model, MergeStage]) -> BestModel | None:
    model = best_model(table)
    if model is None or model not in merged:
        return None
    merge = merged[model]
    task = results.recipe.tasks[0]
    return BestModel(
        model,
        run=str(results.folder.root),
        folder=str(results.path(merge)),
        task=task.name,
        texts=len(task.text) if isinstance(task, TextClassification) else 0,
        fitted=merge.heads.fitted,
        others=_others(results, merge.label),
    )


def _others(results: Results, label: str) -> list[str]:
    """What a merged model may be compared with, the other merged models first."""
    found: Iterable[str] = (one.label for one in scored_models(results))
    others = [one for one in found if one != label]
    return [*(one for one in others if one not in ("base", "experts")), *others]
