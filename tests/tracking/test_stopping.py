"""SIGTERM at any moment: the record is closed as KILLED within seconds, and the program says that it was stopped."""

import json
import random
import subprocess
import sys

import pytest

from pave_lightning.tracking.stores import connect

# Imports once, then forks a process for each signal; all of them write to one database as a run does.
PROGRAM = """
import json, os, signal, sys, time
from pave_lightning.errors import Interrupted
from pave_lightning.system.interrupts import stoppable
from pave_lightning.tracking import Tracker, record_stage

uri, delays, other = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
# Loads all that is loaded late, with a database of its own: connections must not be handed to forked processes
warm = Tracker(other, "experiment", "warm", key="warm", params={"a": 1}, tags={}).start()
warm.log_text(warm.child("warm", stage="fit"), "text", "a.txt")
warm.close("FINISHED")

def work(name, ready):
    with stoppable():
        os.write(ready, b"x")
        with Tracker(uri, "experiment", name, key=name, params={"a": 1}, tags={}).recorded() as tracker, stoppable():
            number, driver = 0, os.getppid()
            while os.getppid() == driver:  # never for ever, should the tests be killed
                number += 1
                run = tracker.child(f"{name}:{number}", stage="fit", params={"b": 2})
                tracker.log_metric_rows(run, [({f"m{i}": 1.0 for i in range(20)}, step) for step in range(20)])
                tracker.log_text(run, "text", "a.txt")
                record_stage(tracker, f"{name}:{number}", "fit", {"metrics": {"validation/a": 0.5}}, {})

for number, delay in enumerate(delays):
    begun, ready = os.pipe()
    process = os.fork()
    if not process:
        try:
            work(f"r{number}", ready)
        except Interrupted as stop:
            os._exit(stop.exit_code)
        except BaseException as error:
            sys.stderr.write(repr(error))
        os._exit(1)
    os.read(begun, 1)
    time.sleep(delay)
    os.kill(process, signal.SIGTERM)
    sent = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(json.dumps([code, time.monotonic() - sent]), flush=True)
"""


def stop_at(delays, uri, other):
    command = [sys.executable, "-c", PROGRAM, uri, json.dumps(delays), other]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    assert [code for code, _ in ended] == [143] * len(delays), done.stderr
    assert max(seconds for _, seconds in ended) < 8, ended
    assert done.stderr == ""

    client = connect(uri)
    experiment = client.get_experiment_by_name("experiment")
    runs = [] if experiment is None else client.search_runs([experiment.experiment_id], max_results=5000)
    parents = {run.info.run_id: run for run in runs if "mlflow.parentRunId" not in run.data.tags}
    assert {run.info.status for run in parents.values()} <= {"KILLED"}
    children = [run for run in runs if run.info.run_id not in parents]
    assert {run.info.status for run in children} <= {"KILLED", "FINISHED"}
    for run in children:
        if run.info.status == "FINISHED":
            assert run.data.metrics["validation/a"] == 0.5
    return parents, children


def test_a_few_moments(store, tmp_path):
    parents, _ = stop_at([0.0, 0.05, 0.5], store, f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    assert parents


@pytest.mark.slow
def test_many_moments(store, tmp_path):
    draw = random.Random(0)
    parents, children = stop_at(
        [draw.uniform(0, 1.5) for _ in range(40)], store, f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    )
    assert len(parents) > 10
    assert any(run.info.status == "KILLED" for run in children)
