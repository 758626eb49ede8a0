import io

import pytest
from rich.console import Console

from pave_lightning.reporting.intervals import NO_INTERVAL, Against, Interval, Intervals, PairIntervals
from pave_lightning.reporting.model_card import model_card
from pave_lightning.reporting.scores import Model, Score, ScoreTable
from pave_lightning.reporting.tables import render
from pave_lightning.reporting.verdicts import difference_lines, difference_sentences, half_width, verdict

PLAIN, PURIFIED = Model("ties", "plain", "static"), Model("ties", "purified", "static")
LIGHTER, FITTED = Model("ties", "lighter", "static"), Model("ties", "plain", "static", "logits")
EXPERTS, BASE = Model("experts", "", "expert"), Model("base", "", "base", "logits")


def table_of(values, pairs, tasks=("a", "b"), half=0.02):
    scores = [
        Score.of(model, task=task, metric="accuracy", is_primary=True, value=value, examples=100)
        for model, value in values.items()
        for task in tasks
    ]
    intervals = Intervals(
        values={(m, task, "accuracy"): Interval(v - half, v + half) for m, v in values.items() for task in tasks},
        averages={model: Interval(value - half, value + half) for model, value in values.items()},
        normalised_averages={model: Interval(value - half, value + half) for model, value in values.items()},
        pairs={pair: PairIntervals(normalised_average=interval) for pair, interval in pairs.items()},
    )
    return ScoreTable(scores, intervals=intervals)


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (Interval(0.001, 0.2), "better"),
        (Interval(-0.2, -0.001), "worse"),
        (Interval(-0.001, 0.2), "no difference beyond chance"),
        (Interval(0.0, 0.0), "no difference beyond chance"),
        (Interval(0.0, 0.2), "no difference beyond chance"),
        (Interval(1e-15, 0.2), "no difference beyond chance"),
        (NO_INTERVAL, ""),
    ],
)
def test_better_is_said_only_where_the_interval_excludes_zero(interval, words):
    assert verdict(interval) == words


def test_lines_name_what_is_better_and_what_is_not():
    values = {EXPERTS: 1.0, BASE: 0.5, PLAIN: 0.6, PURIFIED: 0.7, FITTED: 0.55}
    pairs = {
        (PURIFIED, PLAIN): Interval(0.05, 0.15),
        (FITTED, PLAIN): Interval(-0.1, 0.001),
        (PLAIN, BASE): Interval(0.02, 0.2),
        (PURIFIED, BASE): Interval(-0.3, -0.1),
        (FITTED, BASE): Interval(-0.02, 0.1),
    }
    lines = difference_lines(table_of(values, pairs))
    assert lines == [
        "Differences of normalised averages, with 95 % intervals over test rows:",
        "purified against plain: better: ties +0.100 (+0.050 to +0.150)",
        "fitted heads against the experts' heads: no difference beyond chance",
        "against the base with fitted heads: better: ties (plain) +0.100 (+0.020 to +0.200); worse: ties (purified) "
        "+0.200 (-0.300 to -0.100); no difference beyond chance: ties (plain, logits heads)",
    ]
    assert difference_sentences(table_of(values, pairs), PURIFIED) == [
        "Purified against plain: +0.100 (+0.050 to +0.150), better.",
        "Against the base with fitted heads: +0.200 (-0.300 to -0.100), worse.",
    ]


def test_other_stacks_are_named_and_nothing_is_said_without_intervals():
    values = {PLAIN: 0.6, PURIFIED: 0.7, LIGHTER: 0.7}
    both = dict.fromkeys([(PURIFIED, PLAIN), (LIGHTER, PLAIN)], Interval(-0.1, 0.1))
    assert difference_lines(table_of(values, both))[1] == (
        "other task vectors against plain: no difference beyond chance"
    )
    assert difference_lines(table_of(values, {})) == []
    assert difference_sentences(table_of(values, {}), PURIFIED) == []


def test_of_many_intervals_some_exclude_zero_by_chance():
    models = [(Model(f"m{i}", "plain", "static"), Model(f"m{i}", "purified", "static")) for i in range(20)]
    values = {model: 0.5 for pair in models for model in pair}
    lines = difference_lines(table_of(values, {(second, first): Interval(0.1, 0.2) for first, second in models}))
    assert "m0 0.000 (+0.100 to +0.200)" in lines[1]
    assert lines[1].endswith("and 16 more")
    assert "one in twenty" in lines[2]


def shown(table, width):
    file = io.StringIO()
    Console(file=file, width=width).print(render(table, width))
    return file.getvalue()


def row_of(text, start):
    (row,) = [line.split() for line in text.splitlines() if line.startswith(start)]
    return row


@pytest.mark.parametrize(
    ("tasks", "width", "halves"),
    [(2, 100, 4), (4, 100, 6), (5, 100, 2), (7, 100, 2), (8, 104, 0), (8, 107, 2)],
)
def test_halves_of_intervals_stand_where_there_is_room(tasks, width, halves):
    table = table_of({EXPERTS: 1.0, PLAIN: 0.6, PURIFIED: 0.7}, {}, [f"t{index}" for index in range(tasks)])
    text = shown(table, width)
    assert max(map(len, text.splitlines())) <= width
    row = row_of(text, "ties     plain")
    assert row.count("±.020") == halves
    if halves:
        assert row[-4:] == ["0.600", "±.020", "0.600", "±.020"]
        assert "half the width of the 95 % interval" in " ".join(text.split())


def test_nothing_is_said_of_intervals_where_none_is_known():
    scores = table_of({EXPERTS: 1.0, PLAIN: 0.6}, {}).scores
    assert "±" not in shown(ScoreTable(scores), 100)


@pytest.mark.parametrize(
    ("interval", "text"),
    [(Interval(0.5, 0.55), "±.025"), (Interval(-3, 3), "±3.000"), (Interval(-30, 30), "±30"), (NO_INTERVAL, "")],
)
def test_half_widths(interval, text):
    assert half_width(interval) == text


def test_cards_show_intervals_and_what_follows_from_them():
    table = table_of({EXPERTS: 1.0, PLAIN: 0.6, PURIFIED: 0.7}, {(PURIFIED, PLAIN): Interval(-0.1, 0.3)})
    card = model_card(
        name="ties",
        base_model="x/y",
        method="ties",
        form="static",
        vectors="purified",
        tasks=["a", "b"],
        scores=table,
        differences=difference_sentences(table, PURIFIED),
    )
    assert "| ties | 0.700 ±.020 | 0.700 ±.020 | 0.700 ±.020 | 0.700 ±.020 |" in card
    assert "Purified against plain: +0.100 (-0.100 to +0.300), no difference beyond chance." in card
    assert "better" not in card


def test_columns_of_differences_are_named_after_what_is_compared():
    assert [str(against) for against in Against] == ["minus_plain", "minus_expert_heads", "minus_fitted_base"]
