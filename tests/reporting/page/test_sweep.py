"""The page of a sweep: spread over seeds in place of intervals over rows."""

import itertools
import math

import pandas as pd
import pytest

from pave_lightning.reporting.page.content import Figure, Table, Text
from pave_lightning.reporting.page.rendering import html_of
from pave_lightning.reporting.page.sweep import SweepFacts, sweep_page
from pave_lightning.reporting.sweep_view import SweepView

KEY = "purify.rho"
FORMS = {"base": "base", "experts": "expert", "emr": "per-task", "ties": "static"}


def frame(values=(0.5, 0.9), seeds=(0, 1), lost=()):
    """Experts at 0.8; ties has 0.4 plain and 0.4 + key / 5 + seed / 50 purified; emr has 0.6."""
    rows = []
    for value, seed, task in itertools.product(values, seeds, ("movie", "topic")):
        scores = {("base", ""): 0.2, ("experts", ""): 0.8, ("ties", "plain"): 0.4, ("emr", "plain"): 0.6}
        scores["ties", "purified"] = 0.4 + value / 5 + seed / 50
        for (model, vectors), score in scores.items():
            rows.append(
                {
                    **{KEY: value, "seed": seed, "model": model, "vectors": vectors, "form": FORMS[model]},
                    **{"task": task, "metric": "accuracy", "is_headline": True, "examples": 10},
                    "value": math.nan if (model, task) in lost else score,
                    **{"scale": math.nan, "rho": math.nan, "seconds": 2.0 if vectors else math.nan},
                    "peak_megabytes": 10.0 if vectors else math.nan,
                }
            )
    return pd.DataFrame(rows)


def page_of(data, **view):
    return sweep_page(SweepFacts("ratios", data, SweepView(question="Which ratio?", x=KEY, **view), recipe="a: 1"))


def blocks(page, name, kind):
    (section,) = [section for section in page.shown() if section.name == name]
    return [block for block in section.blocks if isinstance(block, kind)]


def test_summary_names_the_best_setting_with_its_spread():
    page = page_of(frame())
    assert page.kind == "sweep"
    # (0.58 / 0.8 + 0.6 / 0.8) / 2, and the standard deviation of 0.725 and 0.75
    assert page.summary == [
        "Which ratio?",
        "2 settings with 2 seeds each, on 2 tasks (movie, topic).",
        "The best model with one set of weights is ties (purified), purify.rho 0.9: it has a normalised average of "
        "0.738 ±.018.",
    ]
    assert [section.name for section in page.shown()] == ["results", "tasks", "costs", "findings", "recipe"]


def test_table_keeps_forms_apart_and_marks_the_best():
    (table,) = blocks(page_of(frame()), "results", Table)
    assert [group.title.partition(":")[0] for group in table.groups] == ["Not merged", "Merged", "Per-task"]
    rows = [[(cell.text, cell.note) for cell in row] for row in table.groups[1].rows]
    assert rows[0][:4] == [("ties", "plain"), ("any", ""), ("2", ""), ("0.500", "±.000")]
    assert rows[2][:5] == [("ties", "purified"), ("0.9", ""), ("2", ""), ("0.738", "±.018"), ("+0.238", "±.018")]
    best = [row[1].text for group in table.groups for row in group.rows if any(cell.is_best for cell in row)]
    assert best == ["0.9"]


def test_numbers_make_lines_and_models_make_dots():
    (figure,) = blocks(page_of(frame()), "results", Figure)
    purified = next(trace for trace in figure.traces if "purified" in trace["name"])
    assert purified["y"] == pytest.approx([0.6375, 0.7375])
    assert purified["error_y"]["array"] == pytest.approx([0.025 / math.sqrt(2)] * 2)
    data = frame(values=(0.9,)).drop(columns=KEY)
    (figure,) = [
        block
        for block in sweep_page(SweepFacts("all", data, SweepView())).sections[0].blocks
        if isinstance(block, Figure)
    ]
    assert figure.layout["yaxis"]["ticktext"] == ["ties", "emr"]
    dots = [(trace["name"], trace["x"], trace["y"], trace["showlegend"]) for trace in figure.traces]
    # Plain has its place in the row and its entry in the legend once, whatever the form.
    assert [(name, round(y[0], 1), told) for name, _, y, told in dots] == [
        ("plain", -0.1, True),
        ("purified", 0.1, True),
        ("plain", 0.9, False),
    ]
    assert dots[1][1] == pytest.approx([0.7375])


def test_findings_and_what_is_missing_are_told():
    page = page_of(frame(lost=[("emr", "topic")]))
    headings = [block.heading for block in blocks(page, "findings", Text)]
    assert "Purified against plain" in headings
    assert "`" not in "".join(line for block in blocks(page, "findings", Text) for line in block.lines)
    (missing,) = blocks(page, "left-out", Text)
    assert missing.lines == ["emr, plain: no average in seed 0", "emr, plain: no average in seed 1"]
    assert "<h1>ratios</h1>" in html_of(page)


def test_a_sweep_without_scores_says_so():
    page = page_of(frame().iloc[:0])
    assert page.summary[-1] == "There are no scores of merged models to compare."
    assert [section.name for section in page.shown()] == ["recipe"]
