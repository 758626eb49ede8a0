"""The table of all merged models."""

import math

import pandas as pd

from pave_lightning.reporting.sweep_ranking import ranking


def row(model, vectors, mean, form="static", **others):
    found = {"model": model, "vectors": vectors, "form": form, "mean": mean, "sd": 0.0123, "difference": math.nan}
    return found | {"difference_sd": math.nan, "seconds": 2.0, "peak_megabytes": 150.4} | others


def test_models_stand_by_their_better_form_and_kinds_apart():
    tasks = {"good/score": 0.9, "bad_one/score": 0.7, "unknown/score": math.nan, "worse/difference": -1.0}
    best = pd.DataFrame(
        [
            row("ties", "plain", 0.7),
            row("ties", "purified", 0.68, difference=-0.02, difference_sd=0.004, seconds=3.0),
            row("emr", "plain", 0.95, form="per-task"),
            row("iso_c", "plain", 0.6),
            row(
                "iso_c", "purified", 0.8, **tasks, difference=0.2, difference_sd=math.nan, sd=math.nan, seconds=math.nan
            ),
        ]
    )
    heading, static, other_heading, per_task, note = ranking(best)
    assert heading == "### One set of weights for all tasks"
    assert static.splitlines() == [
        "| model | plain | purified | difference | lowest task | seconds | peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| iso\\_c | 0.600 ± 0.012 | 0.800 | +0.200 | bad\\_one 0.700 | 2.0 | 150 |",
        "| ties | 0.700 ± 0.012 | 0.680 ± 0.012 | -0.020 ± 0.004 |  | 2.5 | 150 |",
    ]
    assert other_heading == "### Something extra for each task"
    assert "come on top" in note
    assert per_task.splitlines()[2:] == ["| emr | 0.950 ± 0.012 |  |  |  | 2.0 | 150 |"]


def test_costs_that_nobody_measured_are_left_empty():
    best = pd.DataFrame([row("ties", "plain", 0.7, seconds=math.nan, peak_megabytes=math.nan)])
    _, static = ranking(best)
    assert static.endswith("| ties | 0.700 ± 0.012 |  |  |  |  |  |")
    assert ranking(best.iloc[:0]) == []
