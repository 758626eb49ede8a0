"""``pave compare`` as a user runs it, on a run folder that is finished."""

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pave_lightning.cli import main
from pave_lightning.tasks.predictions import FILE, read_predictions, write_predictions


def with_manifest(folder, change):
    """Change what a manifest says, and seal it anew."""
    path = folder / "manifest.json"
    noted = json.loads(path.read_text())
    noted.pop("sha256")
    change(noted)
    seal = hashlib.sha256(json.dumps(noted, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**noted, "sha256": seal}))


@pytest.fixture(scope="module")
def finished_run(run_once, tmp_path_factory):
    """A finished run, moved away from where it was made, whose base answers some rows of words in another way."""
    run = shutil.copytree(run_once, tmp_path_factory.mktemp("moved") / "run")
    folder = run / "scores" / "base"
    predictions, classes = read_predictions(folder / FILE)
    own = predictions["words"]
    predictions["words"] = replace(own, predictions=np.where(own.rows % 3 == 0, 1 - own.predictions, own.predictions))
    write_predictions(folder / FILE, predictions, classes)

    def change(noted):
        content = (folder / FILE).read_bytes()
        noted["files"][FILE] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        accuracy = float((predictions["words"].predictions == own.targets).mean())
        noted["result"]["scores"]["words"]["metrics"]["accuracy"] = accuracy

    with_manifest(folder, change)
    return run


@pytest.fixture
def run(finished_run):
    """That run, only to be read."""
    return finished_run


@pytest.fixture
def own_run(finished_run, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture
def told(capsys, monkeypatch, tmp_path):
    """What the command prints, in another folder than the one that the run was made in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments, code=0):
        assert main(["compare", *map(str, arguments)]) == code
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return shown.err if code else shown.out

    return call


def scores_of(run, label):
    return json.loads((run / "scores" / label / "manifest.json").read_text())["result"]["scores"]


def kept(run, label):
    return read_predictions(run / "scores" / label / FILE)[0]


def test_without_names_all_models_are_listed(told, run):
    listed = told(run).splitlines()
    assert listed[0] == f"models in {run}:"
    assert [line.strip() for line in listed[1:]] == sorted(path.name for path in (run / "scores").iterdir())
    assert "  emr-purified" in listed


def test_two_models_are_compared_on_every_task_and_on_average(told, run):
    text = told(run, "experts", "base")
    lines = text.splitlines()
    assert lines[:2] == ["A: experts", "B: base"]
    assert max(map(len, lines[: lines.index("")])) <= 100
    experts, base = scores_of(run, "experts"), scores_of(run, "base")
    accuracies = [found["words"]["metrics"]["accuracy"] for found in (experts, base)]
    (row,) = [line.split() for line in lines if line.startswith("words ")]
    assert row[:4] == ["words", "acc", f"{accuracies[0]:.3f}", f"{accuracies[1]:.3f}"]
    predicted = [kept(run, label)["words"] for label in ("experts", "base")]
    right = [one.predictions == one.targets for one in predicted]
    assert row[-2:] == [str(int((right[0] & ~right[1]).sum())), str(int((right[1] & ~right[0]).sum()))]
    (average,) = [line.split() for line in lines if line.startswith("average ")]
    assert average[1] == f"{(accuracies[0] + experts['numbers']['metrics']['pearson']) / 2:.3f}"
    assert any(line.startswith("normalised ") and line.split()[1] == "1.000" for line in lines)


def test_rows_of_disagreement_come_with_their_texts(told, run, task_files):
    rows = [json.loads(line) for line in open(task_files()["test"])]  # noqa: PTH123, SIM115
    text = told(run, "experts", "base", "--task", "words", "--rows", "100")
    one, other = (kept(run, label)["words"] for label in ("experts", "base"))
    differing = np.flatnonzero(one.predictions != other.predictions)
    names = ["low", "high"]
    for place in differing:
        said = [names[values[place]] for values in (one.targets, one.predictions, other.predictions)]
        assert f"row {place}: target {said[0]}, A {said[1]}, B {said[2]}: {rows[place]['text']}" in text
        assert one.targets[place] == rows[place]["label"]
    assert text.count("  row ") == len(differing)
    assert "average" not in text
    assert "  row " not in told(run, "experts", "base", "--rows", "0")


def test_numbers_with_the_largest_differences_come_first(told, run):
    text = told(run, "experts", "base", "--task", "numbers", "--metric", "spearman", "--rows", "2")
    (row,) = [line.split() for line in text.splitlines() if line.startswith("numbers ")]
    assert row[1] == "rho"
    one, other = (kept(run, label)["numbers"] for label in ("experts", "base"))
    gain = np.abs(np.abs(one.predictions - one.targets) - np.abs(other.predictions - other.targets))
    first = [int(line.split()[1].rstrip(":")) for line in text.splitlines() if line.startswith("  row ")]
    assert first == np.argsort(-gain, kind="stable")[:2].tolist()
    nearer = (np.abs(one.predictions - one.targets) < np.abs(other.predictions - other.targets)).sum()
    assert row[-2] == str(nearer)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_disagreements_are_written_to_a_file(told, run, tmp_path, ending):
    file = tmp_path / f"found.{ending}"
    assert str(file) in told(run, "experts", "emr-plain", "--output", file, "--rows", "0")
    found = pd.read_csv(file) if ending == "csv" else pd.read_parquet(file)
    one, other = (kept(run, label) for label in ("experts", "emr-plain"))
    expected = sum(int((one[task].predictions != other[task].predictions).sum()) for task in one)
    assert len(found) == expected
    assert {"task", "row", "position", "target", "a", "b", "a_class", "nearer", "file_row", "text"} <= set(
        found.columns
    )
    words = found[found.task == "words"]
    assert set(words.a_class) <= {"low", "high"}
    for row in found[found.task == "numbers"].itertuples():
        nearer = abs(row.a - row.target) < abs(row.b - row.target)
        assert row.nearer == ("a" if nearer else "b")


def test_mistakes_are_told_at_once(told, run, tmp_path):
    text = told(run, "expert", "bse", "--rows", "-1", "--output", "x.txt", code=2)
    for hint in ("did you mean 'experts'", "did you mean 'base'", "--rows: expected 0 or more", ".csv or .parquet"):
        assert hint in text
    assert "expected two models" in told(run, "base", code=2)
    assert "two different models" in told(run, "base", "base", code=2)
    assert "there is no folder" in told(tmp_path / "nowhere", code=2)
    assert "has no scores" in told(tmp_path, "base", "experts", code=2)
    text = told(run, "base", "experts", "--task", "word", "--metric", "acuracy", code=2)
    assert "did you mean 'words'" in text
    assert "did you mean 'accuracy'" in told(run, "base", "experts", "--metric", "acuracy", code=2)
    assert "takes one value" in told(run, "base", "experts", "--task", "a", "--task", "b", code=2)


def test_models_that_were_scored_on_other_rows_are_refused(told, own_run):
    def change(noted):
        noted["inputs"]["tasks"]["words"]["data"] = "another file"

    with_manifest(own_run / "scores" / "base", change)
    assert "scored on different rows of words" in told(own_run, "base", "experts", code=2)
    assert "numbers" in told(own_run, "base", "experts", "--task", "numbers", "--rows", "0")
    # The experts are of other rows than both of these, so nothing is divided by them.
    with_manifest(own_run / "scores" / "emr-plain", change)
    shown = told(own_run, "base", "emr-plain", "--rows", "0")
    assert "normalised" not in shown
    assert "average" in shown


def test_damaged_and_older_scores_are_refused(told, own_run):
    file = own_run / "scores" / "base" / FILE
    file.write_bytes(file.read_bytes()[:-4])
    text = told(own_run, "base", "experts", code=2)
    assert "is not what was written" in text
    assert "pave evaluate" in text
    file.unlink()
    with_manifest(file.parent, lambda noted: noted["files"].pop(FILE))
    assert "made before predictions were kept" in told(own_run, "base", "experts", code=2)


def test_rows_whose_texts_are_gone_are_told_by_their_numbers(told, own_run):
    (own_run / "recipe.yaml").unlink()
    text = told(own_run, "experts", "base", "--task", "words")
    assert "  row " in text
    assert "without texts:" in text


def test_texts_of_rows_that_changed_since_are_not_shown(told, own_run):
    def change(noted):
        noted["inputs"]["tasks"]["words"]["data"] = "another file"

    for label in ("base", "experts"):
        with_manifest(own_run / "scores" / label, change)
    text = told(own_run, "experts", "base", "--task", "words")
    assert "without texts: task 'words', test split" in text
    assert "the rows have changed since" in text


def test_the_data_are_read_again_where_no_copy_is_left(told, own_run):
    shutil.rmtree(own_run / "data")
    text = told(own_run, "experts", "base", "--task", "words")
    assert "without texts" not in text
    assert ": w" in text
    assert not (own_run / "data").exists()


def test_no_torch_is_loaded(measured, run, tmp_path):
    code, torch, _, _ = measured(tmp_path, "compare", str(run), "experts", "base")
    assert (code, torch) == (0, False)
