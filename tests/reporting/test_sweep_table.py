import math

import pandas as pd
import pytest

from pave_lightning.errors import PaveError
from pave_lightning.reporting.scores import Model, Score, ScoreTable
from pave_lightning.reporting.sweep_table import SweepScores, paired, summarise
from pave_lightning.reporting.sweep_view import SweepView

FORM_OF = {"base": "base", "experts": "expert", "emr": "per-task"}
RHO = "purify.rho"


def row(model, vectors, task, value, *, seed=0, is_primary=True, metric="accuracy", **cell):
    return {
        **{key.replace("__", "."): found for key, found in cell.items()},
        "seed": seed,
        "model": model,
        "vectors": vectors,
        "form": FORM_OF.get(model, "static"),
        "task": task,
        "metric": metric,
        "is_headline": is_primary,
        "value": value,
        "examples": 100,
        "scale": 0.5 if vectors else math.nan,
        "rho": 0.9 if vectors == "purified" else math.nan,
    }


def seed_rows(seed, purified, *, plain=(0.4, 0.2), **cell):
    """Experts at 0.8 and 0.4, so plain is normalised to 0.5 and 0.5."""
    rows = [row("experts", "", task, value, seed=seed, **cell) for task, value in (("a", 0.8), ("b", 0.4))]
    rows += [row("base", "", task, 0.2, seed=seed, **cell) for task in "ab"]
    for vectors, values in (("plain", plain), ("purified", purified)):
        rows += [
            row("ties", vectors, task, value, seed=seed, **cell) for task, value in zip("ab", values, strict=False)
        ]
    return rows


def one(summary, model, vectors, **cell):
    found = summary[(summary["model"] == model) & (summary["vectors"] == vectors)]
    for key, value in cell.items():
        found = found[found[key.replace("__", ".")] == value]
    assert len(found) == 1
    return found.iloc[0]


def test_summary_by_hand():
    rows = [*seed_rows(0, (0.48, 0.24)), *seed_rows(1, (0.56, 0.24)), *seed_rows(2, (0.40, 0.28))]
    rows.append(row("ties", "purified", "a", 0.1, is_primary=False, metric="f1"))
    summary = summarise(pd.DataFrame(rows), SweepView())
    # Normalised: 0.6 and 0.6, 0.7 and 0.6, 0.5 and 0.7
    purified = one(summary, "ties", "purified")
    assert purified["mean"] == pytest.approx((0.6 + 0.65 + 0.6) / 3)
    assert purified["sd"] == pytest.approx(0.05 / math.sqrt(3))
    assert purified["plain_mean"] == pytest.approx(0.5)
    assert purified["difference"] == pytest.approx(0.35 / 3)
    assert purified["difference_se"] == pytest.approx(0.05 / 3)
    # Student's t, two degrees of freedom: 4.302653
    assert purified["difference_low"] == pytest.approx(0.35 / 3 - 4.302653 * 0.05 / 3, abs=1e-6)
    assert purified["difference_high"] == pytest.approx(0.35 / 3 + 4.302653 * 0.05 / 3, abs=1e-6)
    assert (purified["seeds"], purified["seeds_paired"], purified["seeds_better"]) == (3, 3, 3)
    assert purified["a/score"] == pytest.approx(0.6)
    assert purified["b/difference"] == pytest.approx((0.1 + 0.1 + 0.2) / 3)
    assert (purified["scale"], purified["rho"]) == (0.5, 0.9)
    plain = one(summary, "ties", "plain")
    assert math.isnan(plain["difference"])
    assert plain["seeds_paired"] == 0
    assert one(summary, "base", "")["mean"] == pytest.approx((0.25 + 0.5) / 2)
    assert list(summary["model"]) == ["base", "experts", "ties", "ties"]


def test_raw_scores():
    summary = summarise(pd.DataFrame(seed_rows(0, (0.48, 0.24))), SweepView(score="raw"))
    assert one(summary, "ties", "purified")["mean"] == pytest.approx(0.36)
    assert one(summary, "experts", "")["mean"] == pytest.approx(0.6)


@pytest.mark.parametrize("everywhere", [True, False])
def test_plain_stands_once_however_often_it_is_given(everywhere):
    rows = [*seed_rows(0, (0.48, 0.24), purify__rho=0.9), *seed_rows(0, (0.56, 0.28), purify__rho=1.0)]
    if not everywhere:
        rows = rows[:6] + [found for found in rows[6:] if found["vectors"] == "purified"] + rows[6:8]
    frame = pd.DataFrame([*rows, rows[0]])
    summary = summarise(frame, SweepView(x=RHO))
    assert one(summary, "ties", "plain")[RHO] is None
    assert one(summary, "experts", "")[RHO] is None
    assert one(summary, "ties", "purified", purify__rho=1.0)["difference"] == pytest.approx(0.2)
    assert one(summary, "ties", "purified", purify__rho=0.9)["difference"] == pytest.approx(0.1)


def test_plain_that_depends_on_a_key_is_paired_within_it():
    rows = [*seed_rows(0, (0.48, 0.24), density=0.2), *seed_rows(0, (0.48, 0.24), plain=(0.56, 0.28), density=0.5)]
    summary = summarise(pd.DataFrame(rows), SweepView(x="density"))
    assert one(summary, "ties", "plain", density=0.5)["mean"] == pytest.approx(0.7)
    found = summary[summary["vectors"] == "purified"]
    assert sorted(found["density"]) == [0.2, 0.5]
    assert sorted(found["difference"].round(9)) == [-0.1, 0.1]


def test_plain_keeps_the_keys_that_the_experts_depend_on():
    rows = seed_rows(0, (0.48, 0.24), training__epochs=1)
    rows += [
        {**found, "value": found["value"] * (2 if found["model"] == "experts" else 1)}
        for found in seed_rows(0, (0.48, 0.24), training__epochs=2)
    ]
    summary = summarise(pd.DataFrame(rows), SweepView(x="training.epochs"))
    assert one(summary, "ties", "plain", training__epochs=2)["mean"] == pytest.approx(0.25)
    assert one(summary, "ties", "purified", training__epochs=2)["difference"] == pytest.approx(0.05)


def test_purified_experts_are_compared_with_the_experts():
    rows = seed_rows(0, (0.48, 0.24)) + [row("experts", "purified", task, 0.4) for task in "ab"]
    found = one(summarise(pd.DataFrame(rows), SweepView()), "experts", "purified")
    assert found["mean"] == pytest.approx(0.75)
    assert found["difference"] == pytest.approx(-0.25)


def test_experts_of_the_same_seed_normalise():
    rows = seed_rows(0, (0.48, 0.24)) + [{**found, "value": found["value"] / 2} for found in seed_rows(1, (0.48, 0.24))]
    summary = summarise(pd.DataFrame(rows), SweepView())
    assert one(summary, "ties", "purified")["sd"] == pytest.approx(0)
    assert one(summary, "ties", "purified")["mean"] == pytest.approx(0.6)


@pytest.mark.parametrize("useless", [0.0, -0.3, math.nan])
def test_a_task_without_a_positive_expert_is_left_out(useless):
    rows = seed_rows(0, (0.48, 0.24))
    rows[1]["value"] = useless
    scores = SweepScores(pd.DataFrame(rows), SweepView())
    assert scores.left_out == [("b", 0)]
    found = one(summarise(pd.DataFrame(rows), SweepView()), "ties", "purified")
    assert found["mean"] == pytest.approx(0.6)
    assert found["difference"] == pytest.approx(0.1)
    assert math.isnan(found["b/score"])
    # The same as the table of a single run says
    fields = ("model", "vectors", "form", "task", "metric", "is_headline", "value", "examples")
    table = ScoreTable(Score(*(entry[field] for field in fields)) for entry in rows)
    assert table.normalised_average(Model("ties", "purified", "static")) == pytest.approx(found["mean"])


@pytest.mark.parametrize("how", ["absent", "nan"])
def test_a_missing_score_gives_no_average(how):
    rows = seed_rows(0, (0.48,) if how == "absent" else (0.48, math.nan)) + seed_rows(1, (0.48, 0.24))
    found = one(summarise(pd.DataFrame(rows), SweepView()), "ties", "purified")
    assert found["seeds"] == found["seeds_paired"] == 1
    assert found["mean"] == pytest.approx(0.6)
    assert math.isnan(found["sd"])


def test_without_experts_or_plain_nothing_is_invented():
    rows = [found for found in seed_rows(0, (0.48, 0.24)) if found["form"] != "expert"]
    assert math.isnan(one(summarise(pd.DataFrame(rows), SweepView()), "ties", "purified")["mean"])
    rows = [found for found in seed_rows(0, (0.48, 0.24)) if found["vectors"] != "plain"]
    found = one(summarise(pd.DataFrame(rows), SweepView()), "ties", "purified")
    assert found["mean"] == pytest.approx(0.6)
    assert math.isnan(found["difference"])
    assert summarise(pd.DataFrame(rows).iloc[:0], SweepView()).empty


def test_values_of_keys_keep_their_types():
    cells = [0.9, "auto", None, [1, 2], True]
    rows = [found for value in cells for found in seed_rows(0, (0.48, 0.24), purify__rho=value)]
    summary = summarise(pd.DataFrame(rows), SweepView(x=RHO))
    assert list(summary[summary["vectors"] == "purified"][RHO]) == [0.9, "auto", "null", "[1, 2]", True]


def test_seeds_average_the_same_cells():
    rows = [*seed_rows(0, (0.48, 0.24), purify__rho=0.9), *seed_rows(0, (0.56, 0.28), purify__rho=0.95)]
    rows += seed_rows(1, (0.48, 0.24), purify__rho=0.9)
    scores = SweepScores(pd.DataFrame(rows), SweepView(x="model", lines=("vectors",)))
    averaged = scores.over_seeds(scores.merged()[scores.merged()["vectors"] == "purified"], ["model"])
    assert averaged["score"].iloc[0] == pytest.approx(0.65)
    assert math.isnan(averaged["score"].iloc[1])


def test_paired_leaves_out_nan():
    found = paired([0.1, math.nan])
    assert (found.mean, found.seeds, found.better) == (0.1, 1, 1)
    assert math.isnan(found.low)
    assert paired([]).seeds == 0
    assert paired([1e-17, -1e-17, 0.0]).contains_zero
    assert not paired([0.1, 0.1, 0.1]).contains_zero


def test_mistakes_are_told():
    frame = pd.DataFrame(seed_rows(0, (0.48, 0.24), purify__rho=0.9))
    with pytest.raises(PaveError, match=r"did you mean 'purify\.rho'"):
        summarise(frame, SweepView(x="purify.rh"))
    with pytest.raises(PaveError, match="no column value"):
        summarise(frame.drop(columns="value"), SweepView())
    twice = pd.concat([frame, frame.assign(value=0.1)])
    with pytest.raises(PaveError, match="two scores in the primary metric of task 'a' in one cell"):
        summarise(twice, SweepView())
    assert SweepView(x="model", lines=("model",)).problems([]) == [
        "lines: 'model' stands on the horizontal axis already"
    ]
