"""The page of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pave_lightning.errors import counted, listed
from pave_lightning.reporting.page.content import Cell, Code, Column, Page, Rows, Section, Table, Text
from pave_lightning.reporting.page.costs import MergedCost, costs_section
from pave_lightning.reporting.page.marks import name_of
from pave_lightning.reporting.page.purification import diagnostics_sections, ranks_section
from pave_lightning.reporting.page.scores import results_section, tasks_section
from pave_lightning.reporting.page.training import Expert, training_section
from pave_lightning.reporting.page.use import BestModel, use_section
from pave_lightning.reporting.scores import Model, ScoreTable
from pave_lightning.reporting.tables import best_static, number_text
from pave_lightning.reporting.verdicts import half_width

if TYPE_CHECKING:
    import pandas as pd

    from pave_lightning.purification import KeptRank

NAMED_TASKS = 8


@dataclass(frozen=True)
class RunFacts:
    """What a run left, of which its page is made.

    Args:
        name: Name of the recipe.
        base: The base, as the recipe names it.
        table: The scores.
        experts: Where experts came from and how they were trained.
        costs: What the merged models took.
        ranks: Ranks that each purification kept, by its words.
        diagnostics: Tables of each purification's diagnostics, by its words; empty where none were made.
        best: The merged model whose use is shown.
        left_out: Lines on what was not merged, captured or purified, by heading.
        recipe: The recipe as YAML.
        versions: Versions of the software by name.
        files: Files beside the page, with what is in them.
    """

    name: str
    base: str
    table: ScoreTable
    experts: Sequence[Expert] = ()
    costs: Mapping[Model, MergedCost] = field(default_factory=dict)
    ranks: Mapping[str, Sequence[KeptRank]] = field(default_factory=dict)
    diagnostics: Mapping[str, Mapping[str, pd.DataFrame]] = field(default_factory=dict)
    best: BestModel | None = None
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    recipe: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def run_page(facts: RunFacts) -> Page:
    """The page of a run; what is not there has no section."""
    table = facts.table
    # One order of tasks, so that a task has one colour on the whole page.
    experts = sorted(facts.experts, key=lambda expert: table.tasks().index(expert.task))
    return Page(
        title=facts.name,
        summary=summary(facts),
        sections=[
            results_section(table),
            tasks_section(table),
            costs_section(table, facts.costs),
            use_section(facts.best),
            training_section(experts),
            ranks_section(facts.ranks),
            *diagnostics_sections(facts.diagnostics, table.tasks()),
            Section("left-out", "Left out or failed", list(_left_out(facts))),
            recipe_section(facts.recipe),
            versions_section(facts.versions),
        ],
        files=facts.files,
    )


def best_model(table: ScoreTable) -> Model | None:
    """The static model with the highest normalised average; None where there is none."""
    best = best_static(table)
    static = (model for model in table.models() if model.section == "static")
    return next((model for model in static if table.normalised_average(model) == best), None)


def summary(facts: RunFacts) -> list[str]:
    """What was done and what came of it, in two sentences."""
    table = facts.table
    merged = [model for model in table.models() if model.section in ("static", "per-task") and model.vectors]
    tasks = listed(table.tasks(), NAMED_TASKS)
    names = dict.fromkeys(model.name for model in merged)
    experts = counted(len(table.tasks()), "expert")
    if not merged:
        done = f"{experts} of {facts.base} ({tasks}) were scored; nothing was merged."
        return [done, *_reference(table)]
    done = (
        f"{experts} of {facts.base} ({tasks}) were merged into {counted(len(merged), 'model')} by "
        f"{counted(len(names), 'method')}."
    )
    best = best_model(table)
    if best is None:
        return [done, "No model with one set of weights for all tasks has a score to compare with its experts'."]
    interval = table.normalised_average_interval(best)
    half = f" ({half_width(interval)})" if interval.is_known else ""
    told = (
        f"The best model with one set of weights is {name_of(best)}: on average it has "
        f"{number_text(table.normalised_average(best))}{half} of its experts' scores, an average score of "
        f"{number_text(table.average(best))}"
    )
    if others := _others(table):
        told += f" ({', '.join(others)})"
    if table.not_learned():
        tasks = listed(list(table.not_learned()), NAMED_TASKS)
        told += f"; that says little, because the expert of {tasks} scores no higher than always the same answer"
    return [done, f"{told}."]


def _reference(table: ScoreTable) -> Iterator[str]:
    found = _others(table)
    if found:
        yield f"Average scores: {', '.join(found)}."


def _others(table: ScoreTable) -> list[str]:
    """The averages of base and experts."""
    models = [model for model in table.models() if model.section == "reference" and not model.vectors]
    averages = {model.name: table.average(model) for model in models}
    return [f"{name} {number_text(value)}" for name, value in averages.items() if math.isfinite(value)]


def _left_out(facts: RunFacts) -> Iterator[Text]:
    table = facts.table
    unscored = [
        f"{name_of(model)}: no score on {listed(missing)}"
        for model in table.models()
        if (missing := [task for task in table.tasks() if math.isnan(table.value(model, task))])
    ]
    if unscored:
        yield Text(unscored, is_list=True, heading="Models without a score")
    notes = list(filter(None, (table.left_out_note(), table.not_learned_note())))
    if notes:
        yield Text(notes, is_list=True, heading="Tasks")
    for heading, lines in facts.left_out.items():
        if lines:
            yield Text(lines, is_list=True, heading=f"{heading[0].upper()}{heading[1:]}")


def recipe_section(recipe: str) -> Section:
    """The recipe with every default."""
    blocks = [Code(recipe, "The recipe with every default filled in", "yaml", folded=True)] if recipe else []
    return Section("recipe", "Recipe", blocks)


def versions_section(versions: Mapping[str, str]) -> Section:
    """The versions of the software."""
    rows = [[Cell(name), Cell(version)] for name, version in versions.items()]
    blocks = [Table("The software that wrote this page.", [Column("software"), Column("version")], [Rows(rows)])]
    return Section("versions", "Versions", blocks if rows else [])
