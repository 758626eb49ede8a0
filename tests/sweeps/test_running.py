"""Sweeps: the grid, the scores that are kept, and what is left in the end."""

import csv
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from pave_lightning import Recipe, run_recipe
from pave_lightning.errors import PaveError
from pave_lightning.evaluation import ExpertsCandidate
from pave_lightning.evaluation.scale_search import ScaleSearcher
from pave_lightning.pipeline import evaluating
from pave_lightning.pipeline.stages import CaptureStage, FitStage, PurifyStage
from pave_lightning.pipeline.tuning import Chooser
from pave_lightning.recipe.loading import load_recipe, recipe_to_yaml
from pave_lightning.reporting.sweep_table import SweepScores
from pave_lightning.sweeps import running
from pave_lightning.sweeps.running import make_cells, plan_sweep, run_sweep, view_of

SHIPPED = sorted((Path(__file__).parents[2] / "recipes" / "sweeps").glob("*.yaml"))
RATIOS, SEEDS = (0.9, 0.75), (0, 3)


def written(folder, settings, **section):
    """A recipe file with a sweep section."""
    section = {"question": "Which ratio is best?", "seeds": list(SEEDS), **section}
    path = folder / f"{settings['name']}.yaml"
    path.write_text(json.dumps({**settings, "sweep": section}))  # which is YAML too
    return str(path)


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fail where work begins."""

    def begun(*arguments, **options):
        pytest.fail("work began")

    monkeypatch.setattr(running, "working", begun)


@pytest.fixture
def calls(monkeypatch):
    """How often each part of the work is done."""
    parts = {
        "score": (evaluating, "score_on_test"),
        "purify": (PurifyStage, "run"),
        "choose": (Chooser, "choose"),
        "capture": (CaptureStage, "run"),
        "fit": (FitStage, "run"),
    }
    counts = dict.fromkeys(parts, 0)

    def counted(name):
        kind, attribute = parts[name]
        method = getattr(kind, attribute)

        def count(*arguments, **options):
            counts[name] += 1
            return method(*arguments, **options)

        monkeypatch.setattr(kind, attribute, count)

    for name in counts:
        counted(name)
    return counts


@pytest.mark.slow
def test_a_grid_over_ratios_and_seeds(ready_settings, tracking_uri, tmp_path, calls, monkeypatch):
    from mlflow import MlflowClient

    primary_scores, normalisers = ScaleSearcher._primary_scores, []

    def watched(self, candidate, *given, **whose):
        normalisers.extend([candidate] if isinstance(candidate, ExpertsCandidate) else [])
        return primary_scores(self, candidate, *given, **whose)

    monkeypatch.setattr(ScaleSearcher, "_primary_scores", watched)
    path = written(tmp_path, ready_settings, vary={"purify.rho": list(RATIOS)})
    folder = run_sweep(path)
    # The experts are scored on validation rows once a seed, however many settings search their scales there.
    assert len(normalisers) == len(SEEDS)
    # For each seed the base, the experts, and two methods, each once on plain task vectors and once for each ratio.
    assert calls["score"] == len(SEEDS) * (2 + 2 * (1 + len(RATIOS)))
    assert calls["capture"] == len(SEEDS) * 2
    frame = pd.read_parquet(folder / "scores.parquet")
    models = [("base", ""), ("experts", ""), *itertools.product(("task_arithmetic", "emr"), ("plain", "purified"))]
    expected = set(itertools.product(RATIOS, SEEDS, models, ("words", "more")))
    columns = frame[["purify.rho", "seed", "model", "vectors", "task"]]
    assert {(rho, seed, (model, vectors), task) for rho, seed, model, vectors, task in columns.values} == expected
    assert len(frame) == len(expected)
    assert set(frame["examples"]) == {30}
    purified = frame[frame["vectors"] == "purified"]
    assert (purified["rho"] == purified["purify.rho"]).all()
    assert set(frame["scale"][frame["model"] == "task_arithmetic"]) <= {0.2, 0.6}
    forms = dict(zip(frame["model"], frame["form"], strict=True))
    assert forms == {"base": "base", "experts": "expert", "task_arithmetic": "static", "emr": "per-task"}

    summary = pd.read_csv(folder / "summary.csv")
    assert len(summary) == 2 + 2 + 2 * len(RATIOS)
    assert pd.read_parquet(folder / "summary.parquet")["mean"].to_numpy() == pytest.approx(summary["mean"].to_numpy())
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "Which ratio is best?" in (folder / "findings.md").read_text()
    assert "purify.rho" in (folder / "recipe.yaml").read_text()
    assert not list((folder / "purified").glob("*"))

    client = MlflowClient(tracking_uri)
    home = client.get_experiment_by_name("pave-lightning").experiment_id
    parent = next(
        run
        for run in client.search_runs([home])
        if run.data.tags.get("pave.key", "").startswith(f"{folder.resolve()}:")
    )
    assert parent.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {
        *("recipe.yaml", "scores.parquet", "summary.csv", "summary.parquet", "figure.png", "findings.md"),
    }
    metrics = parent.data.metrics
    assert len(metrics) == len(summary)
    line = summary[(summary["model"] == "emr") & (summary["purify.rho"] == 0.75)].iloc[0]
    assert metrics["emr/purified/purify.rho_0.75"] == pytest.approx(line["mean"])
    assert "task_arithmetic/plain" in metrics

    # Again: every score is there already.
    found = (folder / "scores.parquet").read_bytes()
    calls.update(dict.fromkeys(calls, 0))
    (folder / "scores.parquet").unlink()
    assert run_sweep(path) == folder
    assert not any(calls.values()), calls
    assert (folder / "scores.parquet").read_bytes() == found

    # Each cell has the scores of an ordinary run with its settings.
    alone = Recipe.model_validate(
        {**ready_settings, "name": "alone", "seed": 3, "purify": {"rho": 0.75}, "shared": str(folder)}
    )
    table = list(csv.DictReader((run_recipe(alone) / "results.csv").open()))
    cell = frame[(frame["seed"] == 3) & (frame["purify.rho"] == 0.75)].set_index(["model", "vectors", "task"])["value"]
    for row in table:
        for task in ("words", "more"):
            value = cell[row["model"], row["vectors"], task]
            assert float(row[f"{task}/accuracy"]) == pytest.approx(value, rel=1e-6)  # which has seven digits there


def planned(path, *overrides):
    """What `pave plan` prints of a sweep, its columns apart by bars."""
    console = Console(width=200, file=StringIO())
    plan_sweep(path, overrides, console)
    return re.sub(r" *│ *", " | ", console.file.getvalue())


def test_every_seed_trains_its_experts_once_and_purified_experts_have_scores(
    recipe_settings, tmp_path, calls, caplog, monkeypatch
):
    settings = {
        **recipe_settings,
        "trainer": {**recipe_settings["trainer"], "max_epochs": 1},
        "merge": ["average"],
        "evaluate": {"purified_experts": True},
    }
    path = written(tmp_path, settings, cases={"own data": {}, "plain SVD": {"purify.metric": "identity"}})
    assert planned(path).count("2 to do | 5 to do") == 4
    assert "4 settings, 4 to do" in planned(path)
    assert not Path(settings["output"]).exists()
    monkeypatch.setattr(logging.getLogger("pave_lightning"), "propagate", True)
    caplog.set_level(logging.INFO, "pave_lightning")
    folder = run_sweep(path)
    told = [record.message for record in caplog.records]
    assert "merge average (purified) ..." in told
    assert "score base ..." in told
    assert planned(path).count("there | there") == 4
    assert "4 settings, 0 to do" in planned(path)
    another = planned(path, "purify.damping=0.3")  # base, experts and plain average stay
    assert another.count("there | 3 of 5 there") == 4
    assert calls["fit"] == calls["capture"] == len(SEEDS) * 2
    # For each seed the base, the experts and plain averages once, purified experts and their averages for each case.
    assert calls["score"] == len(SEEDS) * (3 + 2 * 2)
    frame = pd.read_parquet(folder / "scores.parquet")
    purified = frame[frame["vectors"] == "purified"]
    forms = {"experts": "expert", "average": "static"}
    assert set(zip(purified["case"], purified["seed"], purified["model"], purified["form"], strict=True)) == {
        (case, seed, model, forms[model])
        for case, seed, model in itertools.product(("own data", "plain SVD"), SEEDS, forms)
    }
    merged = SweepScores(frame, view_of(load_recipe(path))).merged()
    assert (merged["model"] == "experts").sum() == 2 * len(SEEDS)

    calls.update(dict.fromkeys(calls, 0))
    run_sweep(path)
    assert not any(calls.values()), calls


def test_cells_are_all_combinations_and_overrides_hold_in_each(ready_settings, tmp_path):
    path = Path(
        written(
            tmp_path,
            ready_settings,
            vary={"purify.rho": [0.9, "auto"], "merge.emr.vectors": [["plain"], ["purified"]]},
            cases={"a": {"capture.examples": 4}, "b": {"capture.examples": 8}},
        )
    )
    recipe = load_recipe(path)
    cells = list(make_cells(path, ["purify.damping=0.3", "seed=9"], recipe.sweep))
    assert len(cells) == 2 * 2 * 2 * len(SEEDS)
    assert len({cell.label for cell in cells}) == len(cells)
    for cell in cells:
        assert list(cell.values) == ["case", "purify.rho", "merge.emr.vectors"]
        assert cell.recipe.seed == cell.seed
        assert cell.recipe.purify.damping == 0.3
        assert cell.recipe.capture.examples == {"a": 4, "b": 8}[cell.values["case"]]
        assert cell.recipe.purify.rho == cell.recipe.merge[0].purify.rho == cell.values["purify.rho"]
        assert cell.recipe.merge[1].vectors == cell.values["merge.emr.vectors"]


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"vary": {"purify.rhoo": [0.9]}}, ["purify.rhoo: unknown key; did you mean 'rho'"]),
        ({"vary": {"merge.tiess.scale": [0.9]}}, ["no entry 'tiess'"]),
        ({"cases": {"a": {"purify.metric": "rooot"}}}, ["rooot"]),
        ({"vary": {"purify.stopping_share": [1.5, 0.5]}}, ["purify.stopping_share=0.5: ", "nearest_budget"]),
        ({"vary": {"base": ["package:no_such_package/model"]}}, ["no_such_package"]),
        ({"cases": {"a": {}, "b": {"tasks.words.label": "lable"}}}, ["case=b: ", "did you mean 'label'"]),
        (
            {"vary": {"purify.rho": [0.9]}, "x": "purify.rho", "lines": ["purify.rho"]},
            ["sweep.lines: 'purify.rho' stands on the horizontal axis already"],
        ),
    ],
    ids=["key", "entry", "value", "budget", "base", "data", "view"],
)
def test_mistakes_in_any_setting_are_told_before_anything_runs(section, told, ready_settings, tmp_path, nothing_runs):
    path = written(tmp_path, ready_settings, **section)
    with pytest.raises(PaveError) as caught:
        run_sweep(path)
    for part in told:
        assert part in str(caught.value)


def test_a_recipe_without_a_sweep_is_refused(ready_settings, tmp_path, nothing_runs):
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe_to_yaml(Recipe.model_validate(ready_settings)))
    with pytest.raises(PaveError, match="no section 'sweep'; run it with `pave run`"):
        run_sweep(str(path))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.shared is not None
    cells = list(make_cells(path, ["seed=1"], recipe.sweep))
    assert len(cells) % len(recipe.sweep.seeds) == 0
    assert len({cell.recipe.model_dump_json() for cell in cells}) == len(cells)
    assert not view_of(recipe).problems(list(cells[0].values))


class WorkBeginsError(Exception):
    """Raised in place of work."""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_can_begin(path, base_folder, tmp_path, monkeypatch):
    def begun(recipe, **options):
        raise WorkBeginsError

    monkeypatch.setattr(running, "working", begun)
    # The tiny base knows no word of these texts.
    monkeypatch.setattr("pave_lightning.pipeline.planning.checks.tokenised_problems", lambda recipe, folder: ())
    small = ["training.max_length=16", f"output={tmp_path}", f"shared={tmp_path / 'shared'}"]
    with pytest.raises(WorkBeginsError):
        run_sweep(str(path), [f"base={base_folder}", *small])


@pytest.mark.slow
def test_a_stopped_sweep_goes_on(recipe_settings, tmp_path):
    path = written(tmp_path, {**recipe_settings, "merge": ["average"]}, vary={"purify.rho": list(RATIOS)})
    command = [sys.executable, "-m", "pave_lightning", "sweep", path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = Path(recipe_settings["output"]) / "tiny"

    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    # A shell that starts the tests in the background lets all that they start ignore Ctrl-C.
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **options) as run:
        deadline = time.monotonic() + 120
        while not list(folder.glob("scores/average-purified-*")):
            assert run.poll() is None, run.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        output, _ = run.communicate(timeout=60)
    assert run.returncode == 130, output
    assert "run the same command again to go on from here" in output
    assert not (folder / "scores.parquet").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
    assert before

    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "Which ratio is best?" in done.stdout
    kept = {path: stamp for path, stamp in before.items() if "purified/" not in str(path.relative_to(folder))}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (folder / "scores.parquet").is_file()


def test_settings_that_change_nothing_are_refused(ready_settings, tmp_path, nothing_runs):
    own = {"method": "average", "vectors": ["purified"], "purify": {"rho": 0.9}}
    path = written(tmp_path, {**ready_settings, "merge": [own]}, vary={"purify.rho": list(RATIOS)})
    with pytest.raises(PaveError, match=r"0.75 does the very same as .*0.9: its keys are overruled"):
        run_sweep(path)


def test_a_sweep_over_an_option_of_a_transform(ready_settings, tmp_path):
    """A weight of 1 is plain; what is plain does not depend on the weight."""
    settings = {
        **ready_settings,
        "name": "weights",
        "vectors": {"weighed": [{"task_weights": {"words": 0.5}}]},
        "merge": [{"method": "task_arithmetic", "scale": 0.5, "vectors": ["plain", "weighed"]}],
    }
    key = "vectors.weighed.0.task_weights.words"
    root = run_sweep(written(tmp_path, settings, seeds=[0], vary={key: [1.0, -30.0]}))
    summary = pd.read_csv(root / "summary.csv", keep_default_na=False)
    merged = summary[summary["model"] == "task_arithmetic"].set_index(["vectors", key])["mean"]
    assert sorted(merged.index) == [("plain", ""), ("weighed", "-30.0"), ("weighed", "1.0")]
    assert merged["weighed", "1.0"] == merged["plain", ""]
    assert "weighed" in (root / "findings.md").read_text()
    assert (root / "figure.png").is_file()


def test_a_sweep_trains_no_joint_model(ready_settings, tmp_path, nothing_runs):
    with pytest.raises(PaveError, match=r"controls: a sweep trains no joint model; set controls: \[base, probe,"):
        run_sweep(written(tmp_path, {**ready_settings, "controls": True}, seeds=[0]))


def test_a_sweep_with_fitted_heads_has_a_row_for_each_kind(ready_settings, tmp_path, calls):
    """The base and the experts under fitted heads are there, and the averages are those of a run."""
    scale = {"search": [-1.0, 4.0], "points": 2, "examples": 12}
    labels = {"fit": "labels", "rows": 24, "strength": 1e-6}
    heads = ["expert", {**labels, "search": False}, labels]
    step = {"method": "task_arithmetic", "scale": scale, "vectors": ["plain"]}
    settings = {**ready_settings, "merge": [step], "heads": heads}
    path = written(tmp_path, {**settings, "name": "heads"}, seeds=[0], x="heads", lines=["model"])
    root = run_sweep(path)
    summary = pd.read_csv(root / "summary.csv", keep_default_na=False).set_index(["model", "heads"])["mean"]
    run = pd.read_csv(run_recipe(Recipe.model_validate(settings)) / "results.csv", keep_default_na=False)
    run = run.set_index(["model", "heads"])["normalised_average"]
    kinds = ("expert", "labels-24-strength-1e-06-after-search", "labels-24-strength-1e-06")
    assert [summary["task_arithmetic", kind] for kind in kinds] == pytest.approx(
        [run["task_arithmetic", kind] for kind in kinds]
    )
    assert summary["base", kinds[2]] == pytest.approx(run["base", kinds[2]])
    assert "| task\\_arithmetic | plain |" in (root / "findings.md").read_text()
    assert (root / "figure.png").is_file()
    done = calls["score"]
    run_sweep(path)
    assert calls["score"] == done
