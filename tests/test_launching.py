"""Stages in processes of their own: their exit code, and what becomes of them when the driver is stopped."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pave_lightning.launching import run_to_its_end

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
from pave_lightning.interrupts import stoppable
from pave_lightning.launching import run_to_its_end

with stoppable():
    run_to_its_end([sys.executable, "-c", sys.argv[1], sys.argv[2]], os.environ)
"""


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
