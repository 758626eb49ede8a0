import math
import subprocess
import sys
import warnings

import pytest
from matplotlib.image import imread

from pave_lightning.purification import KeptRank
from pave_lightning.reporting import plots
from pave_lightning.reporting.intervals import Interval, Intervals
from pave_lightning.reporting.plots import kept_ranks, normalised_scores, short_layer_names
from pave_lightning.reporting.scores import Score, ScoreTable

PARTS = (
    *("attention.self.query", "attention.self.key", "attention.self.value"),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)


def table(*extra):
    entries = [
        Score("base", "", "base", "a", "accuracy", True, 0.4, 10),
        Score("experts", "", "expert", "a", "accuracy", True, 0.8, 10),
        Score("ties", "plain", "static", "a", "accuracy", True, 0.5, 10),
        Score("ties", "purified", "static", "a", "accuracy", True, 0.6, 10),
        Score("emr", "plain", "per-task", "a", "accuracy", True, 0.7, 10),
        *extra,
    ]
    return ScoreTable(entries)


def bert_layers(blocks, prefix="bert."):
    return [f"{prefix}encoder.layer.{block}.{part}" for block in range(blocks) for part in PARTS]


def test_normalised_scores_writes_one_png(tmp_path):
    normalised_scores(table(), tmp_path / "plots" / "scores.png")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["scores.png"]
    picture = imread(tmp_path / "plots" / "scores.png")
    assert picture.shape[0] == 750
    assert picture.std() > 0.1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -3.0, 1e300])
def test_odd_values_do_not_break_the_picture(tmp_path, value):
    odd = table(Score("odd", "plain", "static", "a", "accuracy", True, value, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normalised_scores(odd, tmp_path / "scores.png")
    assert imread(tmp_path / "scores.png").shape[0] == 750


def test_tasks_that_are_left_out_stand_under_the_picture(monkeypatch, tmp_path):
    notes = []
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: notes.append(figure.get_supxlabel()))
    normalised_scores(table(), tmp_path / "whole.png")
    normalised_scores(table(Score("experts", "", "expert", "b", "r", True, -0.1, 10)), tmp_path / "part.png")
    assert notes[0] == ""
    assert "above zero: b (r -0.1)." in notes[1].replace("\n", " ")
    assert max(map(len, notes[1].splitlines())) < 100


def test_controls_stand_apart_from_merged_models(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: figures.append(figure))
    controls = [
        Score("base", "", "base", "a", "accuracy", True, 0.5, 10, "logits", True),
        Score("joint", "", "static", "a", "accuracy", True, 0.9, 10, "own", True),
        Score("joint", "", "static", "a", "accuracy", True, 0.8, 10, "logits", True),
    ]
    normalised_scores(table(), tmp_path / "without.png")
    normalised_scores(table(*controls), tmp_path / "with.png")
    without, axes = (figure.axes[0] for figure in figures)
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert [label.get_text() for label in without.get_xticklabels()] == names[2:] == ["ties", "emr"]
    assert names[:2] == ["base", "joint"]
    heights = [round(float(bar.get_height()), 3) for bar in axes.patches if bar.get_width() < 0.5]
    assert heights == [0.625, 1.125, 1.0, 0.625, 0.75, 0.875]
    colours = [bar.get_facecolor() for bar in axes.patches if bar.get_width() < 0.5]
    assert len(set(colours[:3])) == 2, "heads that were fitted are paler"
    assert not set(colours[:3]) & set(colours[3:])
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told[0] == "control: not merged"
    assert "paler: heads fitted (logits)" in told
    assert told.count("base") == 1, "the line is that of the base under the experts' heads"
    assert [text.get_text() for text in without.get_legend().get_texts()] == [
        one for one in told if "control" not in one and "heads" not in one
    ]


def test_intervals_are_drawn_over_the_ends_of_bars(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: figures.append(figure))
    bare = table()
    ties = next(model for model in bare.models() if model.vectors == "purified")
    known = Intervals(normalised_averages={ties: Interval(0.7, 0.8)})
    for intervals in (Intervals(), known):
        normalised_scores(ScoreTable(bare.scores, bare.constants, intervals), tmp_path / "scores.png")
    without, axes = (figure.axes[0] for figure in figures)
    drawn = [list(line.get_ydata()) for line in axes.get_lines() if line.get_gid() == plots.WHISKER]
    assert drawn == [[0.7, 0.8]]
    told = [[text.get_text() for text in one.get_legend().get_texts()] for one in (without, axes)]
    assert set(told[1]) - set(told[0]) == {"95 % interval of the average"}


def test_pictures_of_little(tmp_path):
    normalised_scores(ScoreTable([]), tmp_path / "none.png")
    kept_ranks([], tmp_path / "no-ranks.png")
    kept_ranks([KeptRank("a", "fc", 3, 4), KeptRank("b", "other", 0, 0)], tmp_path / "two.png")
    assert len(list(tmp_path.iterdir())) == 3


def test_kept_ranks_grows_with_the_layers(tmp_path):
    sizes = []
    for name, tasks, blocks in (("small", 4, 6), ("large", 8, 12)):
        ranks = [KeptRank(f"t{t}", layer, 300 + t, 384) for t in range(tasks) for layer in bert_layers(blocks)]
        kept_ranks(ranks, tmp_path / f"{name}.png")
        sizes.append(imread(tmp_path / f"{name}.png").shape[:2])
    assert sizes[1][0] > sizes[0][0]
    assert sizes[1][1] > sizes[0][1]
    # At 150 dpi and 8 points a label needs some 20 pixels
    assert sizes[1][1] > 20 * 72


@pytest.mark.parametrize(
    ("layers", "short"),
    [
        (bert_layers(2), [f"{block}.{part}" for block in (0, 1) for part in PARTS]),
        ([*bert_layers(1), "bert.pooler.dense"], [*(f"0.{part}" for part in PARTS), "pooler.dense"]),
        (["a.0.fc.weight", "a.1.fc.weight"], ["0.fc", "1.fc"]),
        (["encoder.0.q", "decoder.0.q"], ["encoder.0.q", "decoder.0.q"]),
        (["encoder.0.q", "0.q"], ["encoder.0.q", "0.q"]),
        (["fc"], ["fc"]),
        (["a.b.fc"], ["fc"]),
        (["weight", "a.weight"], ["weight", "a.weight"]),
        ([], []),
    ],
)
def test_short_layer_names(layers, short):
    assert short_layer_names(layers) == short


def test_no_global_state_of_pyplot(tmp_path):
    code = (
        "import sys\n"
        "from pave_lightning.reporting.plots import kept_ranks\n"
        "assert 'matplotlib' not in sys.modules\n"
        "kept_ranks([], sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "none.png"], check=True)
