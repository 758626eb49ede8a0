"""A password in the tracking URI is in no file, log, message, or argument of a process that is started."""

import socket

import pytest

from pave_lightning import Recipe
from pave_lightning.cli import main
from pave_lightning.errors import PaveError
from pave_lightning.pipeline.commands import run_recipe, run_stage
from pave_lightning.pipeline.launching import Launcher
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.recipe.loading import load_recipe, recipe_digest, recipe_to_yaml

SECRET = "Xq7-planted@Zw9-sown"


@pytest.fixture
def server():
    """A server that nobody answers for, with a password."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"http://user:{SECRET}@127.0.0.1:{port}/?token={SECRET}"


@pytest.fixture
def guarded(ready_settings, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return {**ready_settings, "tracking": {"uri": server}, "output": "runs"}


def holding(folder, text):
    """Files that hold a text, in their content or name."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert any(file.name == "mlflow.db" for file in files)
    parts = [part.encode() for part in text.split("@")]
    return [file for file in files if any(part in file.read_bytes() + file.name.encode() for part in parts)]


def test_a_stage_leaves_none_behind(guarded, tmp_path, caplog, capfd):
    run_stage(Recipe.model_validate(guarded), "fit")
    assert holding(tmp_path, SECRET) == []
    assert "user:***@127.0.0.1" in (tmp_path / "runs" / "tiny" / "recipe.yaml").read_text()
    assert "cannot be used" in caplog.text
    shown = caplog.text + "".join(capfd.readouterr())
    assert "planted" not in shown
    assert "user:***@127.0.0.1" in shown


@pytest.mark.slow
def test_a_run_leaves_none_behind(guarded, tmp_path, caplog, capfd):
    run_recipe(Recipe.model_validate({**guarded, "tracking": {**guarded["tracking"], "upload_models": True}}))
    assert (tmp_path / "runs" / "tiny" / "merged" / "emr-plain" / "README.md").is_file()
    assert holding(tmp_path, SECRET) == []
    assert "planted" not in caplog.text + "".join(capfd.readouterr())


def test_a_resolved_recipe_asks_the_environment_for_it(guarded, server, tmp_path, monkeypatch, caplog):
    recipe = Recipe.model_validate(guarded)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe))
    again = load_recipe(path)
    assert recipe_digest(again) == recipe_digest(recipe)
    with pytest.raises(PaveError, match="Set the environment variable PAVE_TRACKING_URI") as caught:
        run_stage(again, "fit")
    assert "planted" not in str(caught.value)
    assert not (tmp_path / "mlruns").exists()
    monkeypatch.setenv("PAVE_TRACKING_URI", server)
    run_stage(again, "fit")
    assert "cannot be used" in caplog.text, "the server was asked"
    assert holding(tmp_path, SECRET) == []


def test_a_stage_in_another_process_gets_it_by_the_environment(guarded, server, tmp_path, monkeypatch):
    started = []

    class Tracker:
        uri, parent_run_id = server, "0" * 32

    monkeypatch.setattr(
        "pave_lightning.pipeline.launching.run_to_its_end",
        lambda command, environment: started.append((list(command), dict(environment))) or 0,
    )
    Launcher().run("fit", Recipe.model_validate(guarded), RunFolder(tmp_path / "runs" / "tiny"), "words", Tracker())
    ((command, environment),) = started
    assert "planted" not in " ".join(command)
    assert "planted" not in (tmp_path / "runs" / "tiny" / "recipe.yaml").read_text()
    assert environment["PAVE_DRIVER_TRACKING_URI"] == server


@pytest.fixture
def recipe_file(guarded, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(Recipe.model_validate({**guarded, "tracking": {}})))
    return str(path)


def test_one_on_the_command_line_is_warned_of(recipe_file, server, capsys):
    assert main(["run", recipe_file, "--set", f"tracking.uri={server}", "--print-config"]) == 0
    shown = capsys.readouterr()
    assert "warning: the command line holds a password" in shown.err
    assert "PAVE_TRACKING_URI" in shown.err
    assert "user:***@127.0.0.1" in shown.out
    assert "planted" not in shown.out + shown.err
    masked = server.replace(SECRET, "***")
    assert main(["run", recipe_file, "--set", f"tracking.uri={masked}", "--print-config"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "override", ["tracking.uri=[{}]", "tracking.url={}", "tracking={}", "base=[{}", "tracking.uri.a={}", "seed={}"]
)
def test_refused_overrides_show_none(override, recipe_file, server, capsys):
    assert main(["plan", recipe_file, "--set", override.format(server)]) == 2
    shown = capsys.readouterr()
    assert "error:" in shown.err
    assert "planted" not in shown.out + shown.err


def test_a_recipe_that_is_not_yaml_shows_none(tmp_path, server, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: a\ntracking: {{uri: {server}: [}}\n")
    assert main(["plan", str(path)]) == 2
    shown = capsys.readouterr().err
    assert "user:***@127.0.0.1" in shown
    assert "planted" not in shown
