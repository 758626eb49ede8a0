"""Intervals against plain loops over the same draws, and against what is known of a binomial."""

import math

import numpy as np
import pytest

from pave_lightning.reporting.bootstrap import RESAMPLES, bootstrap_intervals
from pave_lightning.reporting.intervals import Against, Interval
from pave_lightning.reporting.scores import Model, Score, ScoreTable
from pave_lightning.tasks.predictions import TaskPredictions

BASE, EXPERTS = Model("base", "", "base"), Model("experts", "", "expert")
PLAIN, PURIFIED = Model("ties", "plain", "static"), Model("ties", "purified", "static")
ROWS = {"a": 60, "b": 40}


def correct(rates, seed=0):
    """Whether each row is right, by model and task."""
    random = np.random.default_rng(seed)
    return {model: {task: random.random(rows) < rate for task, rows in ROWS.items()} for model, rate in rates.items()}


def predictions_of(right):
    def kept(found):
        rows = np.arange(len(found))
        return TaskPredictions(rows, np.zeros_like(rows), found.astype(np.int64), np.ones(len(found), dtype=np.int64))

    return {model: {task: kept(found) for task, found in tasks.items()} for model, tasks in right.items()}


def table_of(right, intervals=None):
    scores = [
        Score.of(model, task=task, metric="accuracy", is_primary=True, value=float(found.mean()), examples=len(found))
        for model, tasks in right.items()
        for task, found in tasks.items()
    ]
    return ScoreTable(scores, intervals=intervals)


def draws(seed):
    """The rows of every draw, drawn as scipy draws: all rows of one task, then those of the next."""
    random = np.random.default_rng(seed)
    return [random.integers(0, rows, (RESAMPLES, rows)) for rows in ROWS.values()]


def ends(values):
    return pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-12)


def bounds(interval):
    return interval.low, interval.high


@pytest.fixture(scope="module")
def right():
    return correct({BASE: 0.3, EXPERTS: 0.9, PLAIN: 0.6, PURIFIED: 0.7})


@pytest.fixture(scope="module")
def found(right):
    return bootstrap_intervals(table_of(right), predictions_of(right), seed=3)


def test_scores_averages_and_differences_are_those_of_a_plain_loop(right, found):
    again = draws(3)

    def accuracies(model, task):
        rows = again[list(ROWS).index(task)]
        return np.array([np.mean([right[model][task][row] for row in draw]) for draw in rows])

    values = {model: {task: accuracies(model, task) for task in ROWS} for model in right}
    experts = values[EXPERTS]
    normalised = {model: {t: own[t] / experts[t] for t in ROWS} for model, own in values.items()}
    for model, own in values.items():
        for task in ROWS:
            assert bounds(found.values[model, task, "accuracy"]) == ends(own[task])
            assert bounds(found.normalised[model, task, "accuracy"]) == ends(normalised[model][task])
        assert bounds(found.averages[model]) == ends((own["a"] + own["b"]) / 2)
        average = (normalised[model]["a"] + normalised[model]["b"]) / 2
        assert bounds(found.normalised_averages[model]) == ends(average)
    pair = found.pair(PURIFIED, PLAIN)
    assert bounds(pair.values["a", "accuracy"]) == ends(values[PURIFIED]["a"] - values[PLAIN]["a"])
    first, second = ((normalised[m]["a"] + normalised[m]["b"]) / 2 for m in (PURIFIED, PLAIN))
    assert bounds(pair.normalised_average) == ends(first - second)
    assert found.normalised_averages[EXPERTS] == Interval(1.0, 1.0)


def test_draws_depend_on_seed_and_rows_alone(right, found):
    fewer = {model: tasks for model, tasks in right.items() if model != PURIFIED}
    again = bootstrap_intervals(table_of(fewer), predictions_of(fewer), seed=3)
    assert again.averages[PLAIN] == found.averages[PLAIN]
    other = bootstrap_intervals(table_of(fewer), predictions_of(fewer), seed=4)
    assert other.averages[PLAIN] != found.averages[PLAIN]
    assert other.averages[PLAIN].low == pytest.approx(found.averages[PLAIN].low, abs=0.02)


def test_intervals_cover_a_known_rate_about_as_often_as_they_say():
    random, rate, rows, covered = np.random.default_rng(11), 0.8, 200, 0
    models = [Model(f"m{index}", "plain", "static") for index in range(400)]
    right = {model: {"a": random.random(rows) < rate} for model in models}
    # Each model has rows of its own, so these are 400 experiments, and the draws may be the same for all.
    found = bootstrap_intervals(table_of(right), predictions_of(right), seed=0, pairs=[])
    for model in models:
        interval = found.values[model, "a", "accuracy"]
        covered += interval.low <= rate <= interval.high
    # 0.95 of 400 is 380, with a standard deviation of 4.4
    assert 362 <= covered <= 396


def test_paired_differences_are_narrower_than_those_of_independent_rows():
    right = correct({PLAIN: 0.7})
    almost = {task: found.copy() for task, found in right[PLAIN].items()}
    almost["a"][:6] = True
    right[PURIFIED] = almost
    found = bootstrap_intervals(table_of(right), predictions_of(right), seed=0)
    pair, alone = found.pair(PURIFIED, PLAIN).average, found.averages[PLAIN]
    assert pair.half_width < 0.5 * alone.half_width


def test_what_has_no_interval_is_left_empty(right):
    predictions = predictions_of(right)
    del predictions[BASE]["a"]  # not kept
    shifted = predictions[PLAIN]["a"]
    predictions[PLAIN]["a"] = TaskPredictions(
        shifted.rows, shifted.positions, 1 - shifted.predictions, shifted.targets
    )  # not what the score was measured on, as with a metric of one's own
    one = next(iter(predictions[PURIFIED].values()))
    other = np.zeros_like(one.targets)
    predictions[PURIFIED]["b"] = TaskPredictions(one.rows[:40], one.positions[:40], other[:40], other[:40])
    found = bootstrap_intervals(table_of(right), predictions, seed=0)
    assert not found.values[BASE, "a", "accuracy"].is_known
    assert not found.values[PLAIN, "a", "accuracy"].is_known
    assert not found.values[PURIFIED, "b", "accuracy"].is_known, "of other targets than the other models"
    assert not found.averages[PLAIN].is_known
    assert not found.pair(PURIFIED, PLAIN).average.is_known
    assert found.values[BASE, "b", "accuracy"].is_known
    assert found.normalised_averages[EXPERTS].is_known

    nothing = bootstrap_intervals(table_of(right), {}, seed=0)
    assert nothing.averages == {}
    broken = ScoreTable([Score("ties", "plain", "static", "a", "accuracy", True, math.nan, 60)])
    assert not bootstrap_intervals(broken, predictions_of(right), seed=0).averages[PLAIN].is_known
    unknown = ScoreTable([Score("ties", "plain", "static", "a", "mine", True, 0.5, 60)])
    assert bootstrap_intervals(unknown, predictions_of(right), seed=0).values == {}


def test_an_expert_that_may_be_at_zero_normalises_nothing():
    right = correct({EXPERTS: 0.05, PLAIN: 0.5})
    found = bootstrap_intervals(table_of(right), predictions_of(right), seed=0)
    assert found.values[EXPERTS, "a", "accuracy"].is_known
    assert not found.normalised_averages[PLAIN].is_known


def test_one_row_has_no_interval():
    rows = np.zeros(1, dtype=np.int64)
    one = TaskPredictions(rows, rows, rows, rows)
    table = ScoreTable([Score("ties", "plain", "static", "a", "accuracy", True, 1.0, 1)])
    assert bootstrap_intervals(table, {PLAIN: {"a": one}}, seed=0).averages == {}


def test_a_table_knows_its_intervals_and_writes_them(right, found, tmp_path):
    table = table_of(right, found)
    assert table.interval(PLAIN, "a") == found.values[PLAIN, "a", "accuracy"]
    difference = table.difference(PURIFIED, Against.PLAIN)
    assert difference.other == PLAIN
    assert difference.value == pytest.approx(table.normalised_average(PURIFIED) - table.normalised_average(PLAIN))
    assert difference.interval == found.pair(PURIFIED, PLAIN).normalised_average
    row = table.to_wide_frame().set_index(["model", "vectors"]).loc[("ties", "purified")]
    assert row["a/accuracy/low"] < row["a/accuracy"] < row["a/accuracy/high"]
    assert row["normalised_average/minus_plain/low"] == difference.interval.low
    long = table.to_long_frame()
    row = long[(long.vectors == "purified") & (long.task == "b")].iloc[0]
    assert row.low < row.value < row.high
    assert row.minus_plain == pytest.approx(table.value(PURIFIED, "b") - table.value(PLAIN, "b"))
    assert row.minus_plain_low <= row.minus_plain <= row.minus_plain_high


HEADED = [
    Model("base", "", "base"),
    Model("base", "", "base", "labels"),
    Model("base", "", "base", "logits"),
    Model("experts", "", "expert"),
    Model("experts", "", "per-task", "logits"),
    Model("experts", "purified", "per-task"),
    Model("ties", "plain", "static"),
    Model("ties", "lighter", "static"),
    Model("ties", "lighter", "static", "logits"),
    Model("ties", "plain", "static", "logits"),
]


def test_what_is_compared_with_what():
    table = ScoreTable(
        [Score.of(m, task="a", metric="accuracy", is_primary=True, value=0.5, examples=9) for m in HEADED]
    )
    base, labels, logits, experts, fitted, purified, plain, lighter, light_fitted, plain_fitted = HEADED
    partners = {model: [table.partner(model, against) for against in Against] for model in HEADED}
    assert partners == {
        base: [None, None, labels],
        labels: [None, base, None],
        logits: [None, base, None],
        experts: [None, None, labels],
        fitted: [None, experts, logits],
        purified: [experts, None, labels],
        plain: [None, None, labels],
        lighter: [plain, None, labels],
        light_fitted: [plain_fitted, lighter, logits],
        plain_fitted: [None, plain, logits],
    }
