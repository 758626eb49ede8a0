"""Several processes that share a program: all of them end when one is lost, and the message names it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pave_lightning.errors import Interrupted, PaveError
from pave_lightning.pipeline.group_launching import run_group
from pave_lightning.pipeline.run_folder import RunFolder
from pave_lightning.system.files import UNFINISHED
from pave_lightning.system.process_groups import ALONE, Place, place, process_group

# What each process does, by its number.
PROGRAM = """
import os, pathlib, signal, sys, time
rank, size, folder = os.environ["PAVE_GROUP"].split("/", 2)
pathlib.Path(sys.argv[1], rank).write_text(str(os.getpid()))
while len(os.listdir(sys.argv[1])) < int(size):
    time.sleep(0.01)
if rank == "1":
    {second}
{all}
"""
FOREVER = "time.sleep(120)"
DRIVER = """
import os, sys, pathlib
from pave_lightning.system.interrupts import stoppable
from pave_lightning.pipeline.group_launching import run_group

with stoppable():
    run_group("the work", [sys.executable, "-c", *sys.argv[1:3]], os.environ, 2, pathlib.Path(sys.argv[3]))
"""


@pytest.fixture
def folders(tmp_path):
    for name in ("there", "run"):
        (tmp_path / name).mkdir()
    return tmp_path / "there", tmp_path / "run"


def start(folders, second="pass", all_do=FOREVER):
    program = PROGRAM.format(second=second, all=all_do)
    run_group("the work", [sys.executable, "-c", program, str(folders[0])], os.environ, 2, folders[1])


def is_alive(folders):
    """The processes that still run."""
    return [number for file in folders[0].iterdir() if Path(f"/proc/{(number := file.read_text())}").exists()]


def test_all_come_to_their_end(folders):
    start(folders, all_do="sys.exit(0)")
    assert sorted(file.name for file in folders[0].iterdir()) == ["0", "1"]
    assert not list(folders[1].iterdir())


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"process 2 of 2 of the work was killed from outside \(SIGKILL\)"),
        ("os.kill(os.getpid(), signal.SIGABRT)", r"process 2 of 2 of the work crashed \(SIGABRT\)"),
        (
            "print('no room', file=sys.stderr); sys.exit(1)",
            r"process 2 of 2 .* failed \(exit code 1\): no room",
        ),
        ("print('error: no room', file=sys.stderr); sys.exit(2)", r"failed \(exit code 2\): no room"),
    ],
)
def test_one_that_is_lost_ends_the_others_and_is_named(second, message, folders):
    begun = time.monotonic()
    with pytest.raises(PaveError, match=message):
        start(folders, second)
    assert time.monotonic() - begun < 30
    assert not is_alive(folders)
    assert not list(folders[1].iterdir())


def test_a_mistake_that_all_find_is_told_by_the_first(folders):
    with pytest.raises(PaveError, match=r"process 1 of 2 of the work failed \(exit code 2\); see above"):
        start(folders, "sys.exit(2)", "time.sleep(0.3); sys.exit(2)")


def test_one_that_is_stopped_stops_all(folders):
    with pytest.raises(Interrupted) as stop:
        start(folders, "os.kill(os.getpid(), signal.SIGTERM)")
    assert stop.value.exit_code == 128 + signal.SIGTERM
    assert not is_alive(folders)


@pytest.mark.usefixtures("as_in_a_terminal")
def test_they_end_when_the_driver_is_stopped(folders):
    program = PROGRAM.format(second="pass", all=FOREVER)
    command = [sys.executable, "-c", DRIVER, program, *map(str, folders)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as driver:
        deadline = time.monotonic() + 200
        while len(list(folders[0].iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        driver.terminate()
        assert driver.wait(60) != 0
    assert not is_alive(folders)
    assert not list(folders[1].iterdir())


def test_what_killed_processes_leave_is_cleared_away(tmp_path):
    left = tmp_path / f"processes{UNFINISHED}abc"
    left.mkdir()
    (left / "meeting").touch()
    RunFolder(tmp_path).clear()
    assert not left.exists()


def test_a_process_knows_its_place(tmp_path, monkeypatch):
    assert place() is None
    assert process_group() is ALONE
    own = Place(1, 4, tmp_path / "a/b")
    monkeypatch.setenv(*next(iter(own.environment().items())))
    assert place() == own
