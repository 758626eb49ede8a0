import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from pave_lightning.reporting import sweep_plot
from pave_lightning.reporting.sweep_plot import axis_for
from pave_lightning.reporting.sweeps import SweepView, draw, write_sweep

FORM_OF = {"base": "base", "experts": "expert", "emr": "per-task"}
RHO = "purify.rho"


def grid(keys, models=("ties", "emr"), seeds=(0, 1, 2), wanted=("plain", "purified")):
    random = np.random.default_rng(0)
    rows = []
    for seed, cell in itertools.product(seeds, itertools.product(*keys.values())):
        about = {**dict(zip(keys, cell, strict=True)), "seed": seed, "is_headline": True, "metric": "accuracy"}
        about |= {"examples": 100, "scale": 0.5, "rho": math.nan}
        for task in "ab":
            for model in ("base", "experts"):
                value = 0.4 if model == "base" else 0.8
                rows.append(
                    {**about, "model": model, "vectors": "", "form": FORM_OF[model], "task": task, "value": value}
                )
            for model, vectors in itertools.product(models, wanted):
                value = 0.7 + (0.05 * random.random() if vectors == "purified" else 0.01 * seed)
                form = FORM_OF.get(model, "static")
                rows.append({**about, "model": model, "vectors": vectors, "form": form, "task": task, "value": value})
    return pd.DataFrame(rows)


RATIOS = [0.5, 0.875, 0.97, 1.0]
METRICS = ["covariance", "root", "identity"]


@pytest.mark.parametrize(
    ("keys", "view"),
    [
        ({}, SweepView("Models")),
        ({RHO: RATIOS}, SweepView("Ratios", "Which?", x=RHO)),
        ({RHO: [*RATIOS, "auto"]}, SweepView(x=RHO, lines=("vectors",))),
        ({RHO: RATIOS, "purify.metric": METRICS}, SweepView(x="purify.metric")),
        ({RHO: RATIOS, "purify.metric": METRICS}, SweepView(x=RHO)),
        ({RHO: RATIOS}, SweepView(x="model", lines=())),
        ({RHO: RATIOS}, SweepView(x="vectors")),
        ({"capture.examples": [0, 4, 64]}, SweepView(x="capture.examples", log_x=True, score="raw")),
    ],
)
def test_pictures_of_every_shape(keys, view, tmp_path):
    for name, frame in (
        ("full", grid(keys)),
        ("little", grid(keys, models=("ties",), seeds=(0,), wanted=("purified",))),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(frame, view, tmp_path / f"{name}.png")
        picture = imread(tmp_path / f"{name}.png")
        assert 400 < picture.shape[0] < 2600
        assert 800 < picture.shape[1] < 3600
        assert picture[..., :3].std() > 0.05


@pytest.mark.parametrize("value", [math.nan, -50.0, 1e9])
def test_odd_values_do_not_break_the_picture(tmp_path, value):
    frame = grid({RHO: RATIOS})
    frame.loc[(frame["vectors"] == "purified") & (frame[RHO] == 0.97), "value"] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(frame, SweepView(x=RHO), tmp_path / "line.png")
        draw(frame[frame["form"] != "expert"], SweepView(x="model"), tmp_path / "nothing.png")
    assert imread(tmp_path / "line.png").shape[1] < 3600


def test_ratios_near_one_are_spread():
    places = axis_for([0.9, 0.99, 0.999, 1.0], SweepView(x=RHO)).places
    assert [places[value] for value in (0.9, 0.99, 0.999, 1.0)] == pytest.approx([1, 2, 3, 4])
    even = axis_for([0.1, 0.2, 0.3], SweepView(x=RHO)).places
    assert list(even.values()) == [0.1, 0.2, 0.3]


def test_logarithmic_axis_and_words():
    axis = axis_for([0, 10, 100, "all"], SweepView(x="n", log_x=True))
    assert [axis.places[value] for value in (0, 10, 100)] == pytest.approx([0, 1, 2])
    assert axis.places["all"] > 2
    assert axis.numbers == [0, 10, 100]


def test_files(tmp_path):
    frame = grid({RHO: [*RATIOS, "auto"], "purify.metric": METRICS[:2]})
    names = ["scores.parquet", "summary.csv", "summary.parquet", "figure.png", "findings.md"]
    files = write_sweep(frame, SweepView("Ratios", x=RHO), tmp_path / "new")
    assert files == [tmp_path / "new" / name for name in names]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(names)
    results = pd.read_parquet(files[0])
    assert len(results) == len(frame)
    assert set(results[RHO]) == {"0.5", "0.875", "0.97", "1", "auto"}
    assert results["value"].tolist() == frame["value"].tolist()
    summary = pd.read_csv(files[1])
    assert list(summary.columns) == list(pd.read_parquet(files[2]).columns)
    assert (summary["vectors"] == "purified").sum() == 2 * 5 * 2
    assert files[4].read_text().startswith("# Ratios\n")


def test_files_of_nothing(tmp_path):
    assert len(write_sweep(grid({}).iloc[:0], SweepView(), tmp_path)) == 5


def test_lines_of_purified_experts_alone_differ_in_colour():
    cases = [{"case": "own data"}, {"case": "random matrix"}]
    lines = [sweep_plot.Line(case, "", "expert", "purified", {}, level=False) for case in cases]
    assert len({look.colour for look in sweep_plot._looks(lines, "").values()}) == 2
