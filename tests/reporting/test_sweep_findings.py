import math

import pandas as pd
import pytest

from pave_lightning.reporting.sweep_findings import findings, knee, verdict
from pave_lightning.reporting.sweep_table import paired
from pave_lightning.reporting.sweep_view import SweepView

RHO = "purify.rho"
FORM_OF = {"base": "base", "experts": "expert", "emr": "per-task"}


def rows_of(scores, *, seed, models=("ties",), plain=0.5, tasks=("a", "b"), **cell):
    """Experts at 1, plain and purified at the same value for all models; `scores` are those of purified, by task."""

    def row(model, vectors, task, value):
        found = {key.replace("__", "."): value for key, value in cell.items()}
        found |= {"seed": seed, "model": model, "vectors": vectors, "form": FORM_OF.get(model, "static"), "task": task}
        return found | {
            "metric": "accuracy",
            "is_headline": True,
            "value": value,
            "examples": 9,
            "scale": 1.0,
            "rho": 1.0,
        }

    found = [row("experts", "", task, 1.0) for task in tasks]
    for model in models:
        found += [row(model, "plain", task, plain) for task in tasks]
        found += [row(model, "purified", task, score) for task, score in zip(tasks, scores, strict=True)]
    return found


def told(rows, **view):
    return findings(pd.DataFrame(rows), SweepView(title="Title", question="Which?", **view))


def test_a_clear_gain():
    text = told(
        [row for seed, gain in enumerate((0.1, 0.11, 0.12)) for row in rows_of((0.5, 0.5 + 2 * gain), seed=seed)]
    )
    assert text.startswith("# Title\n\nWhich?\n\n3 seeds, 2 tasks (a, b).")
    assert "- ties: purified 0.610 ± 0.010, 3 seeds; plain 0.500 ± 0.000, 3 seeds" in text
    # 4.302653 * 0.01 / sqrt(3) = 0.0248
    assert (
        "- ties: mean difference +0.110, sd 0.010, above zero in 3 of 3 seeds, 95 % interval +0.085 to +0.135: better\n"
    ) in text
    assert "largest difference b +0.220 (above zero in 3 of 3, better);" in text
    assert "smallest a 0.000 (above zero in 0 of 3, the same in every seed)" in text
    assert "left out" not in text


def test_no_difference_beyond_the_spread():
    text = told([row for seed, gain in enumerate((-0.1, 0.0, 0.13)) for row in rows_of((0.5, 0.5 + gain), seed=seed)])
    assert "mean difference +0.005, sd 0.058, above zero in 1 of 3 seeds" in text
    assert "no difference beyond the spread" in text
    assert "better" not in text


@pytest.mark.parametrize(("seeds", "words"), [(1, "one seed settles nothing"), (2, "two seeds settle nothing")])
def test_few_seeds_settle_nothing(seeds, words):
    text = told([row for seed in range(seeds) for row in rows_of((0.8, 0.8), seed=seed)])
    assert words in text
    assert "better" not in text


def test_verdicts():
    assert verdict(paired([])) == "no seed has both"
    assert verdict(paired([-0.2, -0.2, -0.21])).endswith(": worse")
    assert verdict(paired([0.0, 0.0, 0.0])).endswith(": the same in every seed")


def test_missing_plain_and_no_scores():
    rows = [row for row in rows_of((0.8, 0.8), seed=0) if row["vectors"] != "plain"]
    assert "ties: plain was not measured in the same seeds; nothing to compare" in told(rows)
    assert "There are no scores to compare." in told([row for row in rows if row["model"] != "experts"])
    assert "There are no scores to compare." in findings(pd.DataFrame(rows).iloc[:0], SweepView())


def test_left_out_and_missing_are_said():
    rows = [row for seed in range(3) for row in rows_of((0.6, 0.6), seed=seed)]
    rows[1]["value"] = 0.0
    rows[-1]["value"] = math.nan
    text = told(rows)
    assert "1 task left out of the normalised average" in text
    assert "no score above zero: b (seed 0)." in text
    assert "1 of 6 averages (one a setting, model and seed) are missing." in text


CURVE = {0.8: 0.5, 0.9: 0.695, 0.95: 0.7, 1.0: 0.55}


def test_best_setting_and_knee():
    rows = [
        row
        for seed in range(3)
        for rho, value in CURVE.items()
        for row in rows_of((value, value), seed=seed, purify__rho=rho)
    ]
    text = told(rows, x=RHO)
    assert "purified 0.700 ± 0.000, 3 seeds (at `purify.rho` 0.95)" in text
    assert "ties, purified: best 0.700 at 0.95, knee at 0.9 (tolerance 0.010)" in text
    assert "average over 4 settings: mean difference +0.111" in text
    assert "each seed at the setting that is best in the other seeds: mean difference +0.200" in text
    assert "Values of" not in text


def test_a_best_value_at_the_edge_is_said():
    rows = [
        row
        for rho, value in ((0.8, 0.5), (0.9, 0.6), (1.0, 0.7))
        for row in rows_of((value,) * 2, seed=0, purify__rho=rho)
    ]
    assert "knee at 1 (tolerance 0.010); the best is the largest value tried" in told(rows, x=RHO)


def test_words_are_compared_with_the_best_number():
    values = {**CURVE, "auto": 0.6}
    rows = [
        row
        for seed in range(3)
        for rho, value in values.items()
        for row in rows_of((value, value), seed=seed, purify__rho=rho)
    ]
    assert "ties, purified: auto against 0.95: mean difference -0.100" in told(rows, x=RHO)


@pytest.mark.parametrize(
    ("points", "tolerance", "found"),
    [
        ([(1, 0.2), (2, 0.79), (4, 0.795), (8, 0.8)], 0.01, 2),
        # A value that falls out of reach in between breaks the run
        ([(1, 0.799), (2, 0.5), (4, 0.795), (8, 0.8)], 0.01, 4),
        ([(1, 0.8), (2, 0.9), (4, 0.1)], 0.01, 2),
        ([(1, 0.5), (2, 0.5)], 0.0, 1),
    ],
)
def test_knee(points, tolerance, found):
    assert knee(points, tolerance) == found


def test_values_of_a_key_are_compared_within_seed_and_cell():
    gains = {"spectral": 0.2, "even": 0.15}
    rows = [
        row
        for seed in range(3)
        for allocation, gain in gains.items()
        for metric, more in (("root", 0.0), ("covariance", 0.05))
        for row in rows_of(
            (0.5 + gain + more + 0.1 * seed,) * 2,
            seed=seed,
            models=("ties", "emr"),
            purify__allocation=allocation,
            purify__metric=metric,
        )
    ]
    text = told(rows, x="purify.allocation")
    # Seeds differ by 0.1, the differences within a seed not at all
    interval = "above zero in 0 of 3 seeds, 95 % interval -0.050 to -0.050: worse"
    assert f"even against spectral, all merged models: mean difference -0.050, sd 0.000, {interval}" in text
    assert f"even against spectral, emr (per-task), purified: mean difference -0.050, sd 0.000, {interval}" in text
    assert "covariance against root, ties, purified: mean difference +0.050" in text
    assert "Highest of the models" not in text


def test_all_models_stand_in_a_table_where_nothing_else_is_varied():
    rows = [row for seed in range(3) for row in rows_of((0.6, 0.8), seed=seed, models=("ties", "emr"))]
    assert "## All models\n\n### One set of weights for all tasks\n\n| model | plain |" in told(rows)
    assert "| ties | 0.500 ± 0.000 | 0.700 ± 0.000 | +0.200 ± 0.000 | a 0.600 |  |  |" in told(rows)
    assert "## All models" not in told([row for row in rows if row["model"] != "emr"])
    varied = [row for rho in (0.9, 1.0) for row in rows_of((0.6, 0.8), seed=0, models=("ties", "emr"), purify__rho=rho)]
    assert "## All models" not in told(varied, x=RHO)
