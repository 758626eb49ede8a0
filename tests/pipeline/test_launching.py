"""Stages in processes of their own: their exit code, and what becomes of them when the driver is stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pave_lightning
from pave_lightning.errors import Interrupted, PaveError
from pave_lightning.pipeline.launching import Launcher, python_environment, run_to_its_end
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.recipe.schema import Recipe

pytestmark = pytest.mark.usefixtures("as_in_a_terminal")

# Says that it is there; asked to end, it tidies up for a moment.
STAGE = """
import pathlib, signal, sys, time

def tidy(number, frame):
    time.sleep(0.5)
    pathlib.Path(sys.argv[1]).write_text(signal.Signals(number).name)
    sys.exit(1)

signal.signal(signal.SIGTERM, tidy)
signal.signal(signal.SIGINT, tidy)
print("begun", flush=True)
time.sleep(60)
"""
DRIVER = """
import os, sys
from pave_lightning.system.interrupts import stoppable
from pave_lightning.pipeline.launching import run_to_its_end

with stoppable():
    run_to_its_end([sys.executable, "-c", sys.argv[1], sys.argv[2]], os.environ)
"""


@pytest.fixture
def small_recipe(recipe_settings):
    return Recipe.model_validate(recipe_settings)


def test_the_exit_code_is_that_of_the_stage():
    assert run_to_its_end([sys.executable, "-c", "import sys; sys.exit(7)"], os.environ) == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_is_given_time_to_end_when_the_driver_is_stopped(number, tmp_path):
    note = tmp_path / "note"
    command = [sys.executable, "-c", DRIVER, STAGE, str(note)]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, start_new_session=True, **quiet) as driver:
        assert driver.stdout.readline() == "begun\n"
        begun = time.monotonic()
        # As a scheduler does, to the driver alone, and as a terminal does, to all.
        os.kill(driver.pid, number) if number == signal.SIGTERM else os.killpg(driver.pid, number)
        assert driver.wait(timeout=30) != 0
    assert note.read_text() == number.name
    assert time.monotonic() - begun < 9


HOSTILE = "import pathlib; pathlib.Path('ran').touch(); raise SystemExit(9)"


@pytest.fixture
def hostile_folder(tmp_path, monkeypatch):
    """A current folder that holds modules by the names of those that are imported."""
    monkeypatch.chdir(tmp_path)
    for name in ("jsonargparse", "rich", "ruamel", "torch", "lightning", "pave_lightning_trap"):
        (tmp_path / f"{name}.py").write_text(HOSTILE)
    return tmp_path


def installed(monkeypatch):
    """As where the package is installed: found, but not by an entry that leads to the current folder."""
    monkeypatch.setenv("PYTHONPATH", str(Path(pave_lightning.__file__).parents[1]))


def test_the_command_as_a_module_imports_nothing_from_the_current_folder(hostile_folder, monkeypatch):
    installed(monkeypatch)
    done = subprocess.run(
        [sys.executable, "-m", "pave_lightning", "schema"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (hostile_folder / "ran").exists()


def test_what_lightning_starts_imports_nothing_from_the_current_folder(hostile_folder, monkeypatch):
    installed(monkeypatch)
    # Lightning starts further processes with -m, but without the options of Python itself
    command = [sys.executable, "-m", "pave_lightning", "schema"]
    assert run_to_its_end(command, {**os.environ, **python_environment()}) == 0
    trap = [sys.executable, "-c", "import pave_lightning_trap"]
    guarded = {**os.environ, **python_environment()}
    assert subprocess.run(trap, env=guarded, stderr=subprocess.DEVNULL, check=False).returncode == 1
    assert not (hostile_folder / "ran").exists()
    assert subprocess.run(trap, check=False).returncode == 9, "it is run without"


def test_the_users_own_path_stays_without_empty_entries(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "/own", "", "./other"]))
    # As where the package is installed and not run from its checkout.
    checkout = Path(pave_lightning.__file__).parents[1]
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != checkout])
    assert python_environment() == {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(["/own", "./other"])}


@pytest.mark.parametrize(
    ("code", "stopped"), [(129, 129), (-1, 129), (130, 130), (-2, 130), (143, 143), (-15, 143)], ids=str
)
def test_a_stage_that_was_stopped_stops_the_driver(code, stopped, monkeypatch, small_recipe, tmp_path):
    monkeypatch.setattr("pave_lightning.pipeline.launching.run_to_its_end", lambda *given: code)
    with pytest.raises(Interrupted) as caught:
        Launcher().run("fit", small_recipe, RunFolder(tmp_path / "run"), None, None)
    assert caught.value.exit_code == stopped


@pytest.mark.parametrize(
    ("code", "told"), [(1, "failed .exit code 1.; see above"), (-9, "was killed from outside .SIGKILL., which is how")]
)
def test_a_stage_that_failed_says_how(code, told, monkeypatch, small_recipe, tmp_path):
    monkeypatch.setattr("pave_lightning.pipeline.launching.run_to_its_end", lambda *given: code)
    with pytest.raises(PaveError, match=f"the stage 'fit' {told}"):
        Launcher().run("fit", small_recipe, RunFolder(tmp_path / "run"), None, None)
