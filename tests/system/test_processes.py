"""Which process of several one is, whatever stands in the environment, and what becomes of it without its parent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pave_lightning.errors import PaveError
from pave_lightning.system import processes
from pave_lightning.system.processes import is_rank_zero, refuse_foreign_launchers

LAUNCHERS = ("PAVE_DRIVER", *processes.RANKS, *processes.MEETING_POINT, *processes.SIZES.values(), "SLURM_NTASKS")


@pytest.fixture
def environment(monkeypatch):
    """Set variables in an environment that knows of no launcher."""

    def build(**variables):
        for name in (*LAUNCHERS, "SLURM_JOB_NAME"):
            monkeypatch.setenv(name, "")  # so that it is put back in the end
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return build


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
        {"LOCAL_RANK": "3"},
        {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "1"},
    ],
    ids=str,
)
def test_what_an_earlier_launcher_left_is_ignored_and_told(environment, caplog, variables):
    environment(**variables)
    assert is_rank_zero()
    refuse_foreign_launchers()
    assert not [name for name in variables if name in os.environ]
    assert all(name in caplog.text for name in variables)


def test_an_environment_without_launchers_is_left_alone(environment, caplog):
    environment(MASTER_PORT="29501")
    refuse_foreign_launchers()
    assert os.environ["MASTER_PORT"] == "29501"
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("torchrun", {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "4"}),
        ("srun", {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}),
        ("mpirun", {"OMPI_COMM_WORLD_SIZE": "4"}),
    ],
)
def test_a_launcher_of_several_processes_is_refused(environment, name, variables):
    environment(**variables)
    with pytest.raises(PaveError, match=f"{name} has started 4 of this process.*trainer.devices"):
        refuse_foreign_launchers()


def test_lightning_does_not_wait_for_srun_in_an_allocation_of_several_tasks(environment):
    from lightning.fabric.plugins.environments import SLURMEnvironment

    environment(SLURM_NTASKS="4", SLURM_JOB_NAME="train", SLURM_JOB_ID="7", SLURM_PROCID="0")
    assert SLURMEnvironment.detect()
    refuse_foreign_launchers()
    assert not SLURMEnvironment.detect()


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, True),
        ({"PAVE_DRIVER": "1"}, True),
        ({"PAVE_DRIVER": "1", "LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        ({"PAVE_DRIVER": "1", "LOCAL_RANK": "1"}, False),
        ({"PAVE_DRIVER": "1", "LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
    ],
    ids=str,
)
def test_only_stages_have_further_ranks(environment, variables, first):
    environment(**variables)
    refuse_foreign_launchers()
    assert is_rank_zero() is first


# Each process starts the next one, as a driver starts a stage and the stage its further ranks; the last is deaf.
CHAIN = """
import signal, subprocess, sys, time
from pave_lightning.system import processes

depth = int(sys.argv[1])
processes.POLL_SECONDS, processes.GRACE_SECONDS = 0.1, 0.5
if depth < 2:
    processes.end_with_parent()
if depth == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("all there", flush=True)
    time.sleep(60)
print(subprocess.Popen([sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2]]).pid, flush=True)
time.sleep(60)
"""


def is_running(process):
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat") as found:  # noqa: PTH123 - a dead one waits for its parent in containers
            return found.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("killed", [0, 1], ids=["driver", "first rank"])
def test_no_process_outlives_the_one_that_started_it(killed):
    command = [sys.executable, "-c", CHAIN, "2", CHAIN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        lines = [driver.stdout.readline().strip() for _ in range(3)]
        chain = [driver.pid, *(int(line) for line in lines if line.isdecimal())]
        assert len(chain) == 3
        os.kill(chain[killed], signal.SIGKILL)
        begun = time.monotonic()
        while any(map(is_running, chain[killed:])) and time.monotonic() - begun < 30:
            time.sleep(0.05)
        assert time.monotonic() - begun < 10
        driver.kill()


LATE = """
import os, subprocess, sys, time
from pave_lightning.system import processes

if len(sys.argv) > 2:
    while os.getppid() == int(sys.argv[2]):  # Python and its modules take a while to load
        time.sleep(0.01)
    processes.POLL_SECONDS = 0.1
    processes.end_with_parent()
    time.sleep(60)
own = str(os.getpid())
command = [sys.executable, "-c", *sys.argv[1:], *sys.argv[1:], own]
late = subprocess.Popen(command, env={**os.environ, "PAVE_PARENT": own})
print(late.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_parent_that_ends_while_its_child_is_starting_is_noticed():
    with subprocess.Popen([sys.executable, "-c", LATE, LATE], stdout=subprocess.PIPE, text=True) as driver:
        late = int(driver.stdout.readline())
        driver.kill()
        driver.wait()
        begun = time.monotonic()
        while is_running(late) and time.monotonic() - begun < 15:
            time.sleep(0.05)
        outlived = is_running(late)
        if outlived:
            os.kill(late, signal.SIGKILL)
        assert not outlived
