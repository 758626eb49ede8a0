"""What stands on the page, as plain data."""

import math

import pytest

from pave_lightning.reporting.intervals import Interval, Intervals
from pave_lightning.reporting.page.content import Cell, Column, Figure, Page, Panels, Rows, Section, Table, Text
from pave_lightning.reporting.page.costs import MergedCost, costs_section
from pave_lightning.reporting.page.run import RunFacts, best_model, run_page
from pave_lightning.reporting.page.scores import normalised_figure, results_section, tasks_section
from pave_lightning.reporting.page.training import Expert, training_section
from pave_lightning.reporting.page.use import BestModel, use_section
from pave_lightning.reporting.scores import Model, Score, ScoreTable

BASE, EXPERTS = Model("base", "", "base"), Model("experts", "", "expert")
FITTED = Model("base", "", "base", "labels-64", True)
PLAIN, PURIFIED = Model("ties", "plain", "static"), Model("ties", "purified", "static")
EMR = Model("emr", "plain", "per-task")
VALUES = {
    BASE: (0.2, 0.3),
    EXPERTS: (0.8, 0.5),
    FITTED: (0.4, 0.4),
    PLAIN: (0.4, 0.5),
    PURIFIED: (0.6, 0.45),
    EMR: (0.8, 0.5),
}


@pytest.fixture
def table():
    scores = [
        Score.of(model, task=task, metric=metric, is_primary=metric == "accuracy", value=value + more, examples=50)
        for model, values in VALUES.items()
        for task, value in zip(("movie", "topic"), values, strict=True)
        for metric, more in (("accuracy", 0.0), ("macro_f1", 0.01))
    ]
    intervals = Intervals(
        values={(PLAIN, "movie", "accuracy"): Interval(0.3, 0.5)}, normalised_averages={PLAIN: Interval(0.7, 0.8)}
    )
    return ScoreTable(scores, {}, intervals)


def blocks(section, kind):
    return [block for block in section.blocks if isinstance(block, kind)]


def rows(table, title):
    (group,) = [group for group in table.groups if group.title.startswith(title)]
    return [[cell.text for cell in row] for row in group.rows]


def test_results_keep_sections_apart_and_mark_the_best_static_model(table):
    (shown,) = blocks(results_section(table), Table)
    assert [group.title.partition(":")[0] for group in shown.groups] == ["References", "Controls", "Merged", "Per-task"]
    assert rows(shown, "Per-task") == [["emr", "0.650", "1.000", "movie"]]
    # ties, plain: (0.4 / 0.8 + 0.5 / 0.5) / 2; purified: (0.6 / 0.8 + 0.45 / 0.5) / 2
    assert rows(shown, "Merged") == [["ties", "0.450", "0.750", "movie"], ["ties", "0.525", "0.825", "movie"]]
    best = [(row[0].note, cell.text) for group in shown.groups for row in group.rows for cell in row if cell.is_best]
    assert best == [("purified", "0.825")]
    plain = next(group for group in shown.groups if group.title.startswith("Merged")).rows[0]
    assert [cell.note for cell in plain] == ["plain", "", "±.050", "0.500"]
    control = next(group for group in shown.groups if group.title.startswith("Controls")).rows[0]
    assert control[0] == Cell("base", "labels-64 heads †")


def test_notes_explain_what_the_tables_show(table):
    told = " ".join(line for block in blocks(results_section(table), Text) for line in block.lines)
    assert "labelled rows" in told
    assert "test rows" not in told  # no average has an interval


def test_every_task_has_its_scores_and_its_best_model(table):
    section = tasks_section(table)
    first, further = blocks(section, Table)
    assert [(column.heading, column.below) for column in first.columns[1:]] == [
        ("movie", "accuracy"),
        ("topic", "accuracy"),
    ]
    best = {(row[0].note, cell.text) for group in first.groups for row in group.rows for cell in row if cell.is_best}
    assert best == {("purified", "0.600"), ("plain", "0.500")}
    assert further.folded
    assert [cell.text for cell in further.groups[0].rows[0]] == ["base", "movie", "0.210"]
    (figure,) = blocks(section, Figure)
    assert [row[0].text for row in figure.table.groups[0].rows] == ["base", "base", "ties", "ties", "emr"]
    assert figure.traces[0]["z"][2] == pytest.approx([0.5, 1.0])


def test_nothing_is_the_best_where_all_are_equal(table):
    topic = {("ties", "plain"): 0.45}
    same = [
        Score(**{**vars(score), "value": topic.get((score.model, score.vectors), score.value)})
        if (score.task, score.metric) == ("topic", "accuracy")
        else score
        for score in table.scores
    ]
    first, _ = blocks(tasks_section(ScoreTable(same)), Table)
    assert {cell.text for group in first.groups for row in group.rows for cell in row if cell.is_best} == {"0.600"}


def test_figure_has_a_row_for_each_model_and_says_nothing_of_what_is_not_known(table):
    figure = normalised_figure(table)
    bars = {trace["name"]: trace for trace in figure.traces if trace["type"] == "bar"}
    assert bars["control"]["y"] == [0]
    assert bars["plain"]["y"] == [1, 3]
    assert bars["plain"]["x"] == pytest.approx([0.75, 1.0])
    assert bars["plain"]["error_x"]["array"] == [pytest.approx(0.05), None]
    assert "error_x" not in bars["purified"]
    dots = {trace["name"]: trace["x"] for trace in figure.traces if trace["type"] == "scatter"}
    assert dots["movie"] == pytest.approx([0.5, 0.5, 0.75, 1.0])
    missing = ScoreTable([score for score in table.scores if (score.model, score.task) != ("emr", "topic")])
    dots = {trace["name"]: trace["x"] for trace in normalised_figure(missing).traces if trace["type"] == "scatter"}
    assert dots["topic"][-1] is None


def test_costs_tell_what_is_kept_for_a_task(table):
    costs = {
        PLAIN: MergedCost(2.0, 100.0, 90_000_000),
        PURIFIED: MergedCost(4.0, math.nan, 90_000_000),
        EMR: MergedCost(8.0, 300.0, 90_000_000, {"movie": 2_000_000, "topic": 4_000_000}),
    }
    section = costs_section(table, costs)
    (shown,) = blocks(section, Table)
    assert rows(shown, "Merged")[1] == ["ties", "0.825", "4", "", "90", "0"]
    assert rows(shown, "Per-task") == [["emr", "1.000", "8", "300", "90", "3"]]
    (panels,) = blocks(section, Panels)
    assert len(panels.figures) == 3
    assert costs_section(table, {}).blocks == []
    same = {model: MergedCost(2.0) for model in costs}
    assert blocks(costs_section(table, same), Panels) == []


def test_training_curves_are_those_of_experts_that_were_trained(table):
    curves = {"train/loss": [[2, 1.5], [4, 0.5]], "validation/accuracy": [[4, 0.7]]}
    metrics = {"validation/accuracy": 0.7, "validation/accuracy/constant": 0.5}
    experts = [
        Expert("movie", "", "a" * 64, "accuracy", metrics, curves),
        Expert("topic", "hub/id", "b" * 64, "accuracy"),
    ]
    section = training_section(experts)
    (panels,) = blocks(section, Panels)
    assert [figure.traces[0]["x"] for figure in panels.figures] == [[2, 4], [4]]
    assert [cell.text for cell in panels.table.groups[0].rows[0]] == ["movie", "4", "0.700"]
    (shown,) = blocks(section, Table)
    assert [[cell.text for cell in row] for row in shown.groups[0].rows] == [
        ["movie", "accuracy", "0.700", "0.500", "fine-tuned in this run", "a" * 16],
        ["topic", "accuracy", "", "", "hub/id", "b" * 16],
    ]


@pytest.mark.parametrize("texts", [0, 1, 2])
def test_code_to_use_the_best_model_is_code(texts):
    best = BestModel(PURIFIED, "runs/a b", "runs/a b/merged/ties-purified", 'mo"vie', texts, others=["ties-plain"])
    told = {block.caption: block.text for block in use_section(best).blocks if hasattr(block, "language")}
    compile(told["One task, with its head"], "page", "exec")
    assert r'"mo\"vie"' in told["One task, with its head"]
    assert told["One task, with its head"].count("The text that goes with it") == (texts == 2)
    assert "pave compare 'runs/a b' ties-purified ties-plain" in told["On the command line"]
    assert use_section(None).blocks == []


def test_page_tells_in_two_sentences_what_was_done_and_what_came_of_it(table):
    page = run_page(RunFacts("quickstart", "some/base", table))
    assert page.summary == [
        "2 experts of some/base (movie, topic) were merged into 3 models by 2 methods.",
        "The best model with one set of weights is ties (purified): on average it has 0.825 of its experts' scores, an "
        "average score of 0.525 (base 0.250, experts 0.650).",
    ]
    assert best_model(table) == PURIFIED
    assert [section.name for section in page.shown()] == ["results", "tasks"]
    alone = ScoreTable([score for score in table.scores if score.form in ("base", "expert")])
    assert best_model(alone) is None
    assert "nothing was merged" in run_page(RunFacts("quickstart", "some/base", alone)).summary[0]


def test_what_failed_or_was_left_out_is_named(table):
    broken = [
        Score(**{**vars(score), "value": math.nan}) if (score.model, score.vectors) == ("ties", "plain") else score
        for score in table.scores
    ]
    page = run_page(RunFacts("run", "base", ScoreTable(broken), left_out={"weights that are not merged": ["a: b"]}))
    (section,) = [section for section in page.sections if section.name == "left-out"]
    told = {block.heading: list(block.lines) for block in section.blocks}
    assert told["Models without a score"] == ["ties (plain): no score on movie, topic"]
    assert told["Weights that are not merged"] == ["a: b"]


def test_rows_have_as_many_cells_as_a_table_has_columns():
    with pytest.raises(ValueError, match="2 cells in a table of 1 columns"):
        Table("", [Column("a")], [Rows([[Cell("a"), Cell("b")]])])
    assert Page("", [], [Section("a", "A", [])]).shown() == []
