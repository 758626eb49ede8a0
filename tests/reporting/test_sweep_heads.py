"""The table of all models of a sweep by kind of heads."""

import math

import pandas as pd

from pave_lightning.reporting.sweep_findings import findings
from pave_lightning.reporting.sweep_heads import ranking_by_heads
from pave_lightning.reporting.sweep_view import SweepView


def row(model, vectors, heads, mean, form="static", sd=0.0123):
    return {"model": model, "vectors": vectors, "form": form, "heads": heads, "mean": mean, "sd": sd}


def test_controls_come_first_and_the_best_model_leads_its_form():
    summary = pd.DataFrame(
        [
            row("base", "", "expert", 0.4, "base"),
            row("base", "", "logits", 0.7, "base"),
            row("experts", "", None, 1.0, "expert", 0.0),
            row("experts", "", "logits", 0.99, "per-task"),
            row("ties", "plain", "expert", 0.8),
            row("ties", "plain", "logits", 0.85),
            row("iso_c", "plain", "expert", 0.7),
            row("iso_c", "plain", "logits", 0.9, sd=math.nan),
            row("iso_c", "purified", "logits", math.nan),
            row("emr", "plain", "expert", 0.95, "per-task"),
            row("tall_masks", "plain", None, 0.9, "per-task"),
        ]
    )
    controls, first, static, second, per_task, third = ranking_by_heads(summary, ["expert", "logits"])
    assert (controls, static, per_task) == (
        *("### Controls", "### One set of weights for all tasks", "### Something extra for each task"),
    )
    assert first.splitlines() == [
        "| model | vectors | expert | logits |",
        "| --- | --- | --- | --- |",
        "| experts |  | 1.000 ± 0.000 | 0.990 ± 0.012 |",
        "| base |  | 0.400 ± 0.012 | 0.700 ± 0.012 |",
    ]
    assert second.splitlines()[2:] == [
        "| iso\\_c | plain | 0.700 ± 0.012 | 0.900 |",
        "| ties | plain | 0.800 ± 0.012 | 0.850 ± 0.012 |",
    ]
    assert third.splitlines()[2:] == [
        "| emr | plain | 0.950 ± 0.012 |  |",
        "| tall\\_masks | plain | 0.900 ± 0.012 | 0.900 ± 0.012 |",
    ]


def test_findings_of_a_sweep_with_several_kinds_of_heads():
    rows = [
        {
            **{"seed": seed, "model": model, "vectors": vectors, "form": form, "task": "sst2", "metric": "accuracy"},
            **{"is_headline": True, "value": value + seed / 100, "examples": 10, "scale": 1.0, "rho": 1.0},
            "heads": heads,
        }
        for seed in (0, 1, 2)
        for model, vectors, form, heads, value in (
            *[("base", "", "base", "expert", 0.4), ("base", "", "base", "logits", 0.6)],
            *[("experts", "", "expert", "expert", 0.8), ("experts", "", "per-task", "logits", 0.79)],
            ("expert of sst2", "", "static", "logits", 0.78),
            *[("ties", "plain", "static", "expert", 0.5), ("ties", "plain", "static", "logits", 0.7)],
        )
    ]
    told = findings(pd.DataFrame(rows), SweepView())
    assert "| base |  | 0.506 ± 0.006 | 0.753 ± 0.003 |" in told
    assert "| ties | plain | 0.630 ± 0.005 | 0.877 ± 0.002 |" in told
    assert "logits against expert, ties, plain: mean difference" in told
    # Controls are compared with, and never the best of what was merged.
    _, _, settings = told.partition("## Best settings")
    assert "- ties: plain" in settings
    assert "experts (per-task)" not in settings
    assert "expert of sst2" not in settings
    assert "Highest" not in settings
