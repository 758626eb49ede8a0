"""What a manifest says is logged once, whatever was logged before the process was killed."""

import math

import pytest

from pave_lightning.tracking import Tracker, record_stage
from pave_lightning.tracking.stores import connect

FIT = {"metrics": {"validation/accuracy": 0.75}}
CAPTURE = {"examples": 32, "layers": 12, "unreached": []}
MERGE = {"scale": 0.5, "rho": 0.9, "options": {"k": 1}, "cost": {"seconds": 2.0, "peak": math.inf}, "form": "static"}


def start(uri):
    return Tracker(uri, "experiment", "demo", key="abc", params={"seed": 1}, tags={}).start()


def points(tracker, name):
    """Every point of every metric of a child, and its parameters and status."""
    client = connect(tracker.uri)
    experiment = client.get_experiment_by_name("experiment").experiment_id
    run = next(run for run in client.search_runs([experiment]) if run.info.run_name == name)
    history = {
        metric: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, metric)]
        for metric in run.data.metrics
    }
    return history, run.data.params, run.info.status


def record_all(tracker):
    record_stage(tracker, "expert:a", "fit", FIT, {"seed": 3})
    record_stage(tracker, "expert:a", "capture", CAPTURE, {"seed": 3})
    record_stage(tracker, "merge:ties", "merge", MERGE, {"method": "ties"})
    tracker.complete_parent("report", {"average": 0.5, "nan": math.nan})


def check_all(tracker):
    history, params, status = points(tracker, "expert:a")
    assert history == {
        "validation/accuracy": [(0, 0.75)],
        "capture/examples": [(0, 32.0)],
        "capture/layers": [(0, 12.0)],
    }
    assert (params, status) == ({"seed": "3"}, "FINISHED")
    history, params, status = points(tracker, "merge:ties")
    assert history == {"scale": [(0, 0.5)], "rho": [(0, 0.9)], "seconds": [(0, 2.0)]}
    assert (params, status) == ({"method": "ties"}, "FINISHED")
    history, params, _ = points(tracker, "demo")
    assert history["average"] == [(0, 0.5)]
    assert len(history["nan"]) == 1
    assert params == {"seed": "1"}


def test_everything_is_logged_once_over_three_runs(store):
    for _ in range(3):
        tracker = start(store)
        record_all(tracker)
        record_all(tracker)
        tracker.close("FINISHED")
    check_all(tracker)


def test_what_is_complete_costs_no_call(store, monkeypatch):
    from mlflow import MlflowClient

    tracker = start(store)
    record_all(tracker)
    again = start(store)
    calls = []
    for name in ("search_runs", "get_run", "log_batch", "set_terminated", "set_tag", "get_metric_history"):
        monkeypatch.setattr(MlflowClient, name, lambda *args, name=name, **kwargs: calls.append(name))
    record_stage(again, "expert:a", "fit", FIT, {"seed": 3})
    record_stage(again, "expert:a", "capture", CAPTURE, {"seed": 3})
    record_stage(again, "merge:ties", "merge", MERGE, {"method": "ties"})
    assert calls == []


@pytest.mark.parametrize("method", ["log_batch", "set_tag", "set_terminated", "create_run"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_kill_at_any_call_leaves_nothing_out(store, method, call, monkeypatch):
    from mlflow import MlflowClient

    class Killed(BaseException):
        """Stands for SIGKILL: nothing is tidied up."""

    works, calls = getattr(MlflowClient, method), []

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return works(self, *args, **kwargs)

    tracker = start(store)
    monkeypatch.setattr(MlflowClient, method, dies)
    try:
        record_all(tracker)
        tracker.close("FINISHED")
    except Killed:
        pass
    monkeypatch.setattr(MlflowClient, method, works)
    again = start(store)
    record_all(again)
    check_all(again)


def test_a_run_that_was_killed_before_its_parameters_gets_them(store):
    tracker = start(store)
    client = connect(store)
    experiment = client.get_experiment_by_name("experiment").experiment_id
    client.create_run(experiment, run_name="expert:a", tags={"mlflow.parentRunId": tracker.parent_run_id})
    tracker.child("expert:a", stage="fit", params={"seed": 3})
    assert points(tracker, "expert:a")[1] == {"seed": "3"}


def test_another_result_is_logged_beside_the_old_one(store):
    tracker = start(store)
    record_stage(tracker, "expert:a", "fit", FIT, {"seed": 3})
    other = {"metrics": {"validation/accuracy": 0.8}}
    for _ in range(2):
        record_stage(start(store), "expert:a", "fit", other, {"seed": 3})
    history, _, _ = points(tracker, "expert:a")
    assert history == {"validation/accuracy": [(0, 0.75), (0, 0.8)]}


def test_a_result_of_the_same_name_as_a_series_is_logged_once(store):
    tracker = start(store)
    run = tracker.child("expert:a", stage="fit")
    for step, value in ((4, 0.75), (8, 0.5)):
        tracker.log_metrics(run, {"validation/accuracy": value}, step)
    tracker.complete("expert:a", stage="fit", part="one", metrics=FIT["metrics"])
    tracker.complete("expert:a", stage="fit", part="two", metrics=FIT["metrics"])
    history, _, _ = points(tracker, "expert:a")
    assert sorted(history["validation/accuracy"]) == [(0, 0.75), (4, 0.75), (8, 0.5)]


def test_a_store_that_was_away_is_filled_by_the_next_run(store, tmp_path, caplog):
    away = start(f"sqlite:///{tmp_path}")  # a folder: cannot be opened
    record_all(away)
    assert "cannot be used" in caplog.text
    tracker = start(store)
    record_all(tracker)
    check_all(tracker)


def test_a_training_that_goes_on_repeats_no_point(store):
    tracker = start(store)
    run = tracker.child("expert:a", stage="fit")
    assert tracker.continue_series(run, "inputs") == {}
    tracker.log_metric_rows(run, [({"train/loss": 1.0}, 10), ({"train/loss": 0.5, "a@b": 1.0}, 20)])
    again = start(store)
    run = again.child("expert:a", stage="fit")
    assert again.continue_series(run, "inputs") == {"train/loss": 20, "a_b": 20}


def test_a_training_with_other_inputs_begins_a_series_of_its_own(store, monkeypatch):
    tracker = start(store)
    run = tracker.child("expert:a", stage="fit")
    tracker.continue_series(run, "inputs")
    tracker.log_metrics(run, {"train/loss": 1.0}, 100)
    import time

    time.sleep(0.01)
    assert tracker.continue_series(run, "other") == {}
    tracker.log_metrics(run, {"train/loss": 0.5}, 10)
    assert tracker.continue_series(run, "other") == {"train/loss": 10}


def test_secrets_reach_no_store(store):
    from mlflow import MlflowClient

    uri = "http://user:hunter2@host"
    params = {"base": uri, "data": {"train": [uri]}, "both": (uri,)}
    tracker = Tracker(store, "experiment", "demo", key="secret", params=params, tags={"origin": uri}).start()
    tracker.child("expert:a", stage="fit", params=params, tags={"from": uri})
    client = MlflowClient(store)
    found = client.search_runs([client.get_experiment_by_name("experiment").experiment_id])
    shown = [*found[0].data.params.values(), *found[1].data.params.values()]
    shown += [*found[0].data.tags.values(), *found[1].data.tags.values()]
    assert "hunter2" not in "".join(shown)
    assert "".join(shown).count("user:***@host") == 8
