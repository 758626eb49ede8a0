import csv
import math

import numpy as np
import pandas as pd
import pytest

from pave_lightning.reporting.scores import Model, Score, ScoreTable, model_of


def score(model, task, value, *, form="static", vectors="", metric="accuracy", is_primary=True):
    return Score(model, vectors, form, task, metric, is_primary, value, 100)


@pytest.fixture
def table():
    return ScoreTable(
        [
            score("emr", "sst2", 0.9, form="per-task", vectors="plain"),
            score("emr", "cola", 0.3, form="per-task", vectors="plain", metric="matthews"),
            score("ties", "sst2", 0.6, vectors="purified"),
            score("ties", "sst2", 0.5, vectors="purified", metric="f1", is_primary=False),
            score("ties", "cola", 0.1, vectors="purified", metric="matthews"),
            score("experts", "sst2", 0.8, form="expert"),
            score("experts", "sst2", 0.5, form="expert", metric="f1", is_primary=False),
            score("experts", "cola", 0.4, form="expert", metric="matthews"),
            score("base", "sst2", 0.5, form="base"),
        ]
    )


BASE, EXPERTS = Model("base", "", "base"), Model("experts", "", "expert")
TIES, EMR = Model("ties", "purified", "static"), Model("emr", "plain", "per-task")


def test_models_and_tasks_in_order(table):
    assert table.models() == [BASE, EXPERTS, TIES, EMR]
    assert table.tasks() == ["sst2", "cola"]
    assert table.primary_metrics == {"sst2": "accuracy", "cola": "matthews"}


def test_normalised_values_and_averages_by_hand(table):
    f1 = next(entry for entry in table.scores if entry.metric == "f1" and entry.model == "ties")
    assert table.normalised(f1) == 1.0
    assert table.normalised_value(TIES, "sst2") == pytest.approx(0.75)
    assert table.normalised_value(TIES, "cola") == pytest.approx(0.25)
    assert table.average(TIES) == pytest.approx(0.35)
    assert table.normalised_average(TIES) == pytest.approx(0.5)
    assert table.normalised_average(EXPERTS) == 1.0
    assert table.normalised_average(EMR) == pytest.approx((0.9 / 0.8 + 0.3 / 0.4) / 2)
    # The base was not measured on cola: no average over other tasks than everyone else's
    assert math.isnan(table.value(BASE, "cola"))
    assert math.isnan(table.average(BASE))
    assert math.isnan(table.normalised_average(BASE))


@pytest.mark.parametrize("useless", [0.0, -0.2, math.nan])
def test_an_expert_without_a_positive_value_normalises_nothing(useless):
    table = ScoreTable(
        [
            score("experts", "a", useless, form="expert"),
            score("experts", "b", 0.5, form="expert"),
            score("ties", "a", 0.3),
            score("ties", "b", 0.25),
        ]
    )
    ties = table.models()[-1]
    assert math.isnan(table.normalised_value(ties, "a"))
    assert table.normalised_average(ties) == 0.5
    assert list(table.left_out()) == ["a"]
    found = "no score" if math.isnan(useless) else f"accuracy {useless:g}"
    assert table.left_out_note() == (
        "1 task left out of the normalised average, for every model alike, where the expert has no score above zero: "
        f"a ({found})."
    )


def test_nothing_is_said_where_every_task_counts(table):
    assert table.left_out() == {}
    assert table.left_out_note() == ""


def test_without_experts_nothing_is_normalised():
    table = ScoreTable([score("ties", "a", 0.3)])
    assert table.left_out_note() == ""
    assert math.isnan(table.normalised_average(table.models()[0]))
    assert ScoreTable([]).models() == []


def test_csv_by_hand(table, tmp_path):
    table.write_csv(tmp_path / "new" / "scores.csv")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["scores.csv"]
    header, *rows = csv.reader((tmp_path / "new" / "scores.csv").open(newline=""))
    assert header[:10] == [
        *("model", "vectors", "heads", "form"),
        *("sst2/accuracy", "cola/matthews", "average"),
        *("sst2/normalised", "cola/normalised", "normalised_average"),
    ]
    assert header[10:] == [
        *("sst2/accuracy/low", "sst2/accuracy/high", "cola/matthews/low", "cola/matthews/high"),
        *("average/low", "average/high", "normalised_average/low", "normalised_average/high"),
        *(
            f"normalised_average/{against}{end}"
            for against in ("minus_plain", "minus_expert_heads", "minus_fitted_base")
            for end in ("", "/low", "/high")
        ),
    ]
    assert all(cell == "" for row in rows for cell in row[10:]), "no predictions, no intervals"
    rows = [row[:10] for row in rows]
    assert rows[0] == ["base", "", "expert", "base", "0.5", "", "", "0.625", "", ""]
    assert rows[1] == ["experts", "", "expert", "expert", "0.8", "0.4", "0.6", "1.0", "1.0", "1.0"]
    assert rows[2] == [
        "ties",
        "purified",
        "expert",
        "static",
        "0.6",
        "0.1",
        "0.35",
        "0.75",
        "0.25",
        "0.5",
    ]
    assert rows[3][:6] == ["emr", "plain", "expert", "per-task", "0.9", "0.3"]


def test_a_score_in_float32_is_written_as_the_decimal_that_it_stands_for(tmp_path):
    value = float(np.float32(0.4))
    assert value != 0.4
    ScoreTable([Score("base", "", "base", "sst2", "accuracy", True, value, 10)]).write_csv(tmp_path / "scores.csv")
    assert (tmp_path / "scores.csv").read_text().splitlines()[1].startswith("base,,expert,base,0.4,0.4,,")


def test_frames(table, tmp_path):
    wide, long = table.to_wide_frame(), table.to_long_frame()
    table.write_csv(tmp_path / "scores.csv")
    again = pd.read_csv(tmp_path / "scores.csv", float_precision="round_trip", keep_default_na=False, na_values={
        name: [""] for name in wide.columns[3:]
    })  # fmt: skip
    pd.testing.assert_frame_equal(again, wide, check_dtype=False, rtol=1e-6)

    assert len(long) == len(table.scores)
    assert list(long.columns) == [
        *("model", "vectors", "heads", "form", "task", "metric", "headline", "value", "normalised", "examples"),
        *("low", "high", "normalised_low", "normalised_high"),
        *(
            f"{against}{end}"
            for against in ("minus_plain", "minus_expert_heads", "minus_fitted_base")
            for end in ("", "_low", "_high")
        ),
    ]
    row = long[(long.model == "ties") & (long.metric == "matthews")].iloc[0]
    assert (row.value, row.normalised, row.examples) == (0.1, 0.25, 100)

    table.write_parquet(tmp_path / "scores.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "scores.parquet"), long)
    assert ScoreTable([]).to_long_frame().empty
    assert ScoreTable([]).to_wide_frame().empty


def test_contradictions_are_refused():
    ties = score("ties", "a", 0.3)
    with pytest.raises(ValueError, match=r"'ties' .* has 'accuracy' of task 'a' twice"):
        ScoreTable([ties, ties])
    with pytest.raises(ValueError, match="two experts"):
        ScoreTable([score("one", "a", 0.3, form="expert"), score("two", "a", 0.3, form="expert")])
    with pytest.raises(ValueError, match="primary metric of task 'a' is 'accuracy'"):
        ScoreTable([ties, score("emr", "a", 0.3, metric="f1")])


def test_model_of():
    assert model_of(score("ties", "a", 0.1, vectors="plain")) == Model("ties", "plain", "static")


@pytest.mark.parametrize(("constant", "told"), [(0.5, False), (0.8, True), (0.9, True)])
def test_an_expert_no_better_than_always_the_same_answer_is_told(constant, told):
    entries = [score("experts", "sst2", 0.8, form="expert"), score("ties", "sst2", 0.8, vectors="plain")]
    table = ScoreTable(entries, {"sst2": {"accuracy": constant}})
    assert table.not_learned() == ({"sst2": (0.8, constant)} if told else {})
    note = table.not_learned_note()
    assert (f"sst2 (accuracy 0.800, always the same answer {constant:.3f})" in note) is told
    assert bool(note) is told
    assert not ScoreTable(entries).not_learned(), "nothing is said where no constant answer is known"


def test_controls_come_behind_the_experts_and_change_no_column():
    own = [
        Score("ties", "plain", "static", "a", "accuracy", True, 0.5, 10),
        Score("experts", "", "expert", "a", "accuracy", True, 0.8, 10),
        Score("base", "", "base", "a", "accuracy", True, 0.4, 10),
    ]
    controls = [
        Score("joint", "", "static", "a", "accuracy", True, 0.8, 10, "own", True),
        Score("base", "", "base", "a", "accuracy", True, 0.6, 10, "logits", True),
    ]
    table, without = ScoreTable([*controls, *own]), ScoreTable(own)
    assert [(model.name, model.heads) for model in table.models()] == [
        ("base", "expert"),
        ("experts", "expert"),
        ("joint", "own"),
        ("base", "logits"),
        ("ties", "expert"),
    ]
    assert list(table.to_wide_frame().columns) == list(without.to_wide_frame().columns)
    assert list(table.to_long_frame().columns) == list(without.to_long_frame().columns)
    assert table.normalised_average(table.models()[2]) == 1.0
