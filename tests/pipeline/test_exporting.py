"""``pave export`` as a user runs it, on the folder of a finished run."""

import shutil

import pytest
from peft import PeftModel
from transformers import AutoModel, AutoModelForSequenceClassification

from pave_lightning.cli import main


@pytest.fixture
def told(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        assert main(["export", *map(str, arguments)]) == code
        output = capsys.readouterr()
        return " ".join((output.err if code else output.out).split())

    return run


def test_models_of_a_run(told, run_once):
    assert told(run_once) == f"merged models in {run_once}: emr-plain emr-purified " + (
        "task_arithmetic-plain task_arithmetic-purified"
    )


def test_one_adapter(told, run_once, base_folder, tmp_path):
    text = told(run_once, "--model", "task_arithmetic-plain", "--lora", 4, "--output", "lora")
    assert "relative error of the whole update" in text
    assert "left out, since low-rank factors cannot hold it" in text
    assert text.endswith("results: lora")
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base_folder), tmp_path / "lora")
    assert model.peft_config["default"].r == 4
    kept = told(run_once, "--model", "emr-plain", "--lora", 4, "--output", "own", "--task", "words", "--keep-whole")
    assert "kept whole" in kept
    base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=2)
    PeftModel.from_pretrained(base, tmp_path / "own")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "emr-plain", "--output", "x"], "say in which form: --lora RANK"),
        (["--model", "emr-plain", "--lora", "4"], "say where the result goes"),
        (["--model", "emr-plain", "--lora", "4", "--output", "x"], "name one of numbers, words"),
        (["--model", "emr-plan", "--lora", "4", "--output", "x"], "did you mean 'emr-plain'?"),
        (["--model", "emr-plain", "--lora", "-1", "--output", "x"], "--lora takes a rank"),
        (["--model", "emr-plain", "--lora", "0", "--output", "x"], "rank must be at least 1"),
        (["--model", "emr-plain", "--lora", "4", "--task", "word", "--output", "x"], "did you mean 'words'?"),
        (["--model", "a", "--model", "b"], "--model takes one value"),
    ],
)
def test_what_cannot_be_done(told, run_once, tmp_path, options, message):
    assert message in told(run_once, *options, code=2)
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_runs(told, run_once, tmp_path):
    assert "there is no folder nowhere" in told("nowhere", code=2)
    shutil.copytree(run_once / "scores", tmp_path / "other" / "scores")
    assert "has no merged models" in told("other", code=2)
