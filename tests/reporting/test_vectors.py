"""Task vectors of other stacks than plain and purified in tables and pictures."""

import io
import itertools
import math
import warnings

import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread
from rich.console import Console

from pave_lightning.reporting import plots, sweep_plot
from pave_lightning.reporting.model_card import model_card
from pave_lightning.reporting.plots import normalised_scores
from pave_lightning.reporting.scores import Score, ScoreTable
from pave_lightning.reporting.sweep_findings import findings
from pave_lightning.reporting.sweep_ranking import ranking
from pave_lightning.reporting.sweep_table import SweepScores, summarise
from pave_lightning.reporting.sweeps import SweepView, draw
from pave_lightning.reporting.tables import render
from pave_lightning.reporting.vectors import COLOURS, OTHER_COLOURS, colour_of, in_order

VECTORS = ("halved", "plain", "a_stack_with_a_very_long_name", "purified")
ORDER = ["plain", "purified", "halved", "a_stack_with_a_very_long_name"]


@pytest.fixture
def table():
    scores = [Score("experts", "", "expert", "a", "accuracy", True, 0.8, 10)]
    scores += [Score("ties", one, "static", "a", "accuracy", True, 0.4 + 0.1 * i, 10) for i, one in enumerate(VECTORS)]
    return ScoreTable(scores)


def frame(ratios=(0.5, 0.9), models=("ties", "average")):
    """Plain scores 0.4 on every ratio; halved 0.5; the long one depends on the ratio, as purified does."""
    rows = []
    for seed in (0, 1, 2):
        for ratio in ratios:
            about = {"purify.rho": ratio, "seed": seed, "task": "a", "metric": "accuracy", "is_headline": True}
            about |= {"examples": 10, "scale": 0.5, "rho": math.nan}
            rows.append({**about, "model": "experts", "vectors": "", "form": "expert", "value": 0.8})
            for model in models:
                values = {"halved": 0.5, "plain": 0.4, ORDER[3]: 0.3 + 0.1 * ratio, "purified": 0.4 + 0.1 * ratio}
                for vectors in VECTORS:
                    value = values[vectors] + 0.01 * seed
                    rows.append({**about, "model": model, "vectors": vectors, "form": "static", "value": value})
    return pd.DataFrame(rows)


def test_plain_and_purified_come_first_and_keep_their_colours():
    assert in_order(VECTORS) == ORDER
    colours = [colour_of(one, ORDER) for one in ORDER]
    assert colours == [COLOURS["plain"], COLOURS["purified"], *OTHER_COLOURS[:2]]


def test_bars_of_four_stacks_stand_beside_each_other(table, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: figures.append(figure))
    normalised_scores(table, tmp_path / "scores.png")
    (axes,) = figures[0].axes
    bars = sorted((bar.get_x(), bar.get_x() + bar.get_width(), to_hex(bar.get_facecolor())) for bar in axes.patches[:4])
    assert all(end < start for (_, end, _), (start, _, _) in itertools.pairwise(bars))
    assert bars[0][0] > -0.5
    assert bars[-1][1] < 0.5
    colours = [colour_of(one, ORDER).lower() for one in VECTORS]
    assert [colour for *_, colour in bars] == colours
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:3] == ["plain task vectors", "purified task vectors", "halved task vectors"]


def test_long_names_are_broken_in_the_terminal_and_whole_in_files(table, tmp_path):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(table, 100))
    text = console.export_text()
    assert "halved" in text
    assert "a_stack_with_a_very_long_name" not in text
    assert "a_stack_with_a_" in text
    table.write_csv(tmp_path / "results.csv")
    assert "ties,a_stack_with_a_very_long_name,expert,static" in (tmp_path / "results.csv").read_text()


def test_a_key_of_purification_counts_for_the_stacks_whose_scores_it_changes():
    summary = summarise(frame(), SweepView(x="purify.rho"))
    found = {
        vectors: sorted(map(str, rows["purify.rho"]))
        for vectors, rows in summary[summary["model"] == "ties"].groupby("vectors", sort=False)
    }
    assert found == {
        "plain": ["None"],
        "purified": ["0.5", "0.9"],
        "halved": ["None"],
        "a_stack_with_a_very_long_name": ["0.5", "0.9"],
    }
    assert list(found) == ORDER
    one_ratio = summarise(frame(ratios=(0.5,)), SweepView())
    kept = one_ratio.set_index(["model", "vectors"])["purify.rho"].map(str)
    assert kept["ties", "plain"] == "None"
    assert kept["ties", "a_stack_with_a_very_long_name"] == "0.5"


def test_differences_are_those_of_purified_alone():
    summary = summarise(frame(), SweepView())
    assert set(summary[summary["difference"].notna()]["vectors"]) == {"purified"}
    text = findings(frame(), SweepView(x="purify.rho"))
    against = text.partition("## Purified against plain")[2].partition("##")[0]
    assert "halved" not in against
    assert "halved 0.638" in text


def test_the_ranking_has_a_column_for_each_stack():
    best = summarise(frame(ratios=(0.5,)).drop(columns="purify.rho"), SweepView())
    _, static, *_ = ranking(best[best["form"] == "static"])
    columns = [cell.strip() for cell in static.splitlines()[0].replace("\\", "").split("|")[1:-1]]
    assert columns[:6] == ["model", *ORDER, "difference"]
    cells = [cell.strip() for cell in static.splitlines()[2].split("|")[1:-1]]
    assert cells[3].startswith("0.638")
    assert len(cells) == len(columns)


@pytest.mark.parametrize("x", ["purify.rho", "model", "vectors"])
@pytest.mark.parametrize("models", [("ties",), ("ties", "average")])
def test_each_line_of_a_sweep_has_its_own_look(x, models, tmp_path):
    view = SweepView(x=x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(frame(models=models), view, tmp_path / "figure.png")
    assert imread(tmp_path / "figure.png").std() > 0.01
    scores = SweepScores(frame(models=models), view)
    lines = sweep_plot.drawn_lines(scores, scores.values_of(x))
    looks = sweep_plot._looks(lines, panelled="")
    if x == "purify.rho":
        assert len(lines) == 4 * len(models)
        assert len({(look.colour, look.style, look.filled) for look in looks.values()}) == len(lines)


def test_cards_tell_the_transforms():
    transforms = [{"name": "dare", "options": {"drop_rate": 0.2}}, {"name": "pave", "options": {"rho": 0.9}}]
    text = model_card(
        name="ties",
        base_model="b",
        method="ties",
        form="static",
        vectors="dropped_then_pave",
        tasks=["a"],
        transforms=transforms,
    )
    assert "| task vectors | dropped\\_then\\_pave |" in text
    told = text.partition("## Transforms of the task vectors")[2].partition("##")[0]
    assert told.index("name: dare") < told.index("drop_rate: 0.2") < told.index("name: pave") < told.index("rho: 0.9")
    assert "## Purification" not in text
    assert "left these layers" not in text
