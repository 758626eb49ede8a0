import logging
import math
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pave_lightning.errors import Interrupted
from pave_lightning.tracking import FALLBACK_URI, Tracker, resolve_uri
from pave_lightning.tracking.stores import connect


def start(uri, **changes):
    given = {"key": "abc", "params": {}, "tags": {}} | changes
    return Tracker(uri, "experiment", "demo", **given).start()


def run_of(tracker, run_id, uri=None):
    return connect(uri or tracker.uri).get_run(run_id)


def break_store(monkeypatch, *uris, methods=("log_batch",)):
    """Let calls on stores fail as they do when a server goes away."""
    from mlflow import MlflowClient

    for method in methods:
        works = getattr(MlflowClient, method)

        def fails(self, *args, works=works, **kwargs):
            if self.tracking_uri in uris:
                raise ConnectionError("the server went away")
            return works(self, *args, **kwargs)

        monkeypatch.setattr(MlflowClient, method, fails)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "pave_lightning"]


def test_records_a_run_tree(store, tmp_path):
    params = {"training": {"learning_rate": 3e-5, "lora": {}}, "tasks": ["a", "b"], "long": "x" * 7000, "odd(name)": 1}
    tracker = start(store, params=params, tags={"version.torch": "2"})
    run_id = tracker.child("fit:a", stage="fit", params={"rank": 8}, tags={"task": "a"})
    tracker.log_metrics(run_id, {"loss": 0.5, "nan": math.nan, "inf": math.inf, "a@b": 1.0, "eval/a/mcc": 0.25}, 7)
    tracker.log_metrics(run_id, {"inf": -math.inf})
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "x.png").write_bytes(b"png")
    tracker.log_file(run_id, tmp_path / "table.csv", "eval")
    tracker.log_folder(run_id, tmp_path / "plots", "plots")
    tracker.log_text(run_id, "name: demo", "recipe=1/recipe.yaml")
    tracker.end(run_id, "FINISHED")
    tracker.close("FINISHED")

    parent = run_of(tracker, tracker.parent_run_id)
    assert parent.info.run_name == "demo"
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["pave.key"] == "abc"
    assert parent.data.tags["version.torch"] == "2"
    assert parent.data.params.pop("long") == "x" * 6000
    assert parent.data.params == {
        "training.learning_rate": "3e-05",
        "training.lora": "{}",
        "tasks": "['a', 'b']",
        "odd_name_": "1",
    }

    child = run_of(tracker, run_id)
    assert child.info.status == "FINISHED"
    assert child.data.params == {"rank": "8"}
    assert child.data.tags["mlflow.parentRunId"] == tracker.parent_run_id
    assert child.data.tags["pave.stage"] == "fit"
    assert child.data.tags["task"] == "a"
    assert math.isnan(child.data.metrics.pop("nan"))
    assert child.data.metrics == {"loss": 0.5, "a_b": 1.0, "eval/a/mcc": 0.25}
    (loss,) = connect(store).get_metric_history(run_id, "loss")
    assert loss.step == 7
    artifacts = tmp_path / "store" / "artifacts" / "experiment" / run_id / "artifacts"
    assert child.info.artifact_uri == artifacts.as_uri()
    assert (artifacts / "eval" / "table.csv").read_text() == "a,b\n"
    assert (artifacts / "plots" / "x.png").exists()
    assert (artifacts / "recipe_1" / "recipe.yaml").read_text() == "name: demo"


def test_many_metrics_go_in_few_calls(store, monkeypatch):
    from mlflow import MlflowClient

    tracker = start(store)
    run_id = tracker.child("fit", stage="fit")
    sizes = []
    monkeypatch.setattr(MlflowClient, "log_batch", lambda self, run_id, metrics: sizes.append(len(metrics)))
    tracker.log_metrics(run_id, {f"m{index}": 0.0 for index in range(2500)})
    tracker.log_metric_rows(run_id, [({"a": 1.0, "b": 2.0}, step) for step in range(50)])
    tracker.log_metrics(run_id, {})
    assert sizes == [1000, 1000, 500, 100]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError("x"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (Interrupted(143), "KILLED"),
        (SystemExit(1), "FAILED"),
    ],
)
def test_status_says_how_the_run_ended(store, error, status):
    tracker = start(store)

    def body():
        with tracker.recording() as same:
            assert same is tracker
            ended = tracker.child("ended", stage="fit")
            tracker.end(ended, "FINISHED")
            left_open = tracker.child("open", stage="fit")
            runs.extend([ended, left_open])
            if error is not None:
                raise error

    runs = []
    if error is None:
        body()
    else:
        with pytest.raises(type(error)):
            body()
    assert run_of(tracker, tracker.parent_run_id).info.status == status
    assert [run_of(tracker, run).info.status for run in runs] == ["FINISHED", status]


def test_resume_takes_the_same_runs_up_again_and_sweeps(store):
    first = start(store, params={"seed": 0})
    fit, merge = (first.child(name, stage="x", params={"a": 1}) for name in ("fit", "merge"))
    first.end(fit, "FINISHED")
    # Nothing closes the first one, as after SIGKILL

    second = start(store, params={"seed": 1})
    assert second.parent_run_id == first.parent_run_id
    parent = run_of(second, second.parent_run_id)
    assert parent.info.status == "RUNNING"
    assert parent.data.params == {"seed": "0"}
    assert run_of(second, fit).info.status == "FINISHED"
    assert run_of(second, merge).info.status == "KILLED"

    assert second.child("merge", stage="x", params={"a": 2}) == merge
    again = run_of(second, merge)
    assert again.info.status == "RUNNING"
    assert again.data.params == {"a": "1"}

    second.close("FINISHED")
    third = start(store)
    assert third.parent_run_id == first.parent_run_id
    assert run_of(third, third.parent_run_id).info.status == "RUNNING"
    assert start(store, key="other's").parent_run_id not in ("", first.parent_run_id)
    assert start(store, key="other's").parent_run_id == start(store, key="other's").parent_run_id


def test_a_stage_in_another_process_attaches(store):
    driver = start(store)
    stage = Tracker.attach(driver.uri, driver.parent_run_id)
    assert (stage.uri, stage.parent_run_id) == (driver.uri, driver.parent_run_id)
    run_id = stage.child("fit", stage="fit")
    assert driver.child("fit", stage="fit") == run_id
    copy = pickle.loads(pickle.dumps(stage))
    copy.log_metrics(run_id, {"loss": 1.0})
    stage.end(run_id, "FINISHED")
    run = run_of(driver, run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss": 1.0}
    assert run_of(driver, driver.parent_run_id).info.status == "RUNNING"


@pytest.mark.usefixtures("store")
def test_unreachable_server_at_the_start(tmp_path, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    tracker = start(f"http://user:secret@127.0.0.1:{port}")
    assert time.monotonic() - begin < 10
    assert tracker.uri == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    (message,) = warnings_of(caplog)
    assert f"127.0.0.1:{port}" in message
    assert tracker.uri in message
    assert "secret" not in message
    run_id = tracker.child("fit", stage="fit")
    tracker.log_metrics(run_id, {"loss": 1.0})
    tracker.close("FINISHED")
    assert run_of(tracker, run_id).data.metrics == {"loss": 1.0}
    assert len(warnings_of(caplog)) == 1


def test_database_that_cannot_be_opened(store, tmp_path, caplog):
    broken = tmp_path / "broken.db"
    broken.write_text("this is no database, but it is long enough to look like one to nobody at all " * 20)
    begin = time.monotonic()
    tracker = start(f"sqlite:///{broken}", fallback_uri=store)
    assert time.monotonic() - begin < 10
    assert tracker.uri == store
    assert run_of(tracker, tracker.parent_run_id).info.status == "RUNNING"
    assert len(warnings_of(caplog)) == 1


def test_failure_in_the_middle_goes_on_locally(store, tmp_path, monkeypatch, caplog):
    local = f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    tracker = start(store, params={"seed": 3})
    first_parent = tracker.parent_run_id
    fit = tracker.child("fit", stage="fit", params={"rank": 8})
    tracker.log_metrics(fit, {"before": 1.0})
    break_store(
        monkeypatch, store, methods=("log_batch", "set_terminated", "log_artifact", "log_artifacts", "log_text")
    )
    tracker.log_metrics(fit, {"after": 2.0})
    tracker.log_metrics(fit, {"later": 3.0})
    tracker.log_text(first_parent, "hello", "hello.txt")
    merge = tracker.child("merge", stage="merge")
    tracker.end(fit, "FINISHED")
    tracker.close("FINISHED")

    (message,) = warnings_of(caplog)
    assert store in message
    assert local in message
    assert "the server went away" in message
    assert tracker.uri == local
    parent = run_of(tracker, tracker.parent_run_id)
    assert parent.data.params == {"seed": "3"}
    assert parent.data.tags["pave.continues"] == f"{store} {first_parent}"
    assert parent.info.status == "FINISHED"
    assert (Path(parent.info.artifact_uri.removeprefix("file://")) / "hello.txt").read_text() == "hello"
    children = {run.info.run_name: run for run in tracker._children(tracker._client)}
    assert set(children) == {"fit", "merge"}
    assert children["merge"].info.run_id == merge
    assert children["fit"].info.status == "FINISHED"
    assert children["fit"].data.metrics == {"after": 2.0, "later": 3.0}
    assert children["fit"].data.params == {"rank": "8"}
    assert run_of(tracker, fit, store).data.metrics == {"before": 1.0}


def test_a_stage_whose_store_fails_closes_its_local_parent(store, monkeypatch, caplog):
    driver = start(store, params={"seed": 3}, key="the-key")
    stage = Tracker.attach(driver.uri, driver.parent_run_id)
    run_id = stage.child("fit", stage="fit")
    break_store(monkeypatch, store)
    stage.log_metrics(run_id, {"loss": 1.0})
    stage.end(run_id, "FINISHED")
    parent = run_of(stage, stage.parent_run_id)
    assert parent.data.tags["pave.key"] == "the-key"
    assert parent.data.params == {"seed": "3"}
    assert parent.info.status == "FINISHED"
    assert len(warnings_of(caplog)) == 1


def test_nothing_is_recorded_when_the_local_store_fails_too(store, monkeypatch, caplog):
    tracker = start(store)
    run_id = tracker.child("fit", stage="fit")
    break_store(monkeypatch, store, resolve_uri(FALLBACK_URI), methods=("log_batch", "search_runs"))
    tracker.log_metrics(run_id, {"loss": 1.0})
    with tracker.recording():
        assert tracker.child("merge", stage="merge") == ""
        tracker.log_text(run_id, "text", "a.txt")
        tracker.end(run_id, "FINISHED")
    assert (tracker.uri, tracker.parent_run_id) == ("", "")
    assert Tracker.attach(tracker.uri, tracker.parent_run_id).child("fit", stage="fit") == ""
    (message,) = warnings_of(caplog)
    assert "nothing more of it is recorded" in message


def test_attach_to_a_lost_store(store, tmp_path, caplog):
    stage = Tracker.attach(f"sqlite:///{tmp_path}", "0" * 32, key="abc", fallback_uri=store)
    assert stage.uri == store
    assert run_of(stage, stage.parent_run_id).data.tags["pave.key"] == "abc"
    assert len(warnings_of(caplog)) == 1


def test_a_locked_database_is_waited_for(store, monkeypatch, caplog):
    from mlflow import MlflowClient

    tracker = start(store)
    works, calls = MlflowClient.log_batch, []

    def locked_once(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("(sqlite3.OperationalError) database is locked")
        return works(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", locked_once)
    tracker.log_metrics(tracker.parent_run_id, {"loss": 1.0})
    assert tracker.uri == store
    assert not warnings_of(caplog)
    assert run_of(tracker, tracker.parent_run_id).data.metrics == {"loss": 1.0}


def test_a_missing_file_is_no_failure_of_the_store(store, caplog):
    tracker = start(store)
    tracker.log_file(tracker.parent_run_id, "nowhere.csv")
    assert tracker.uri == store
    assert "nowhere.csv" in warnings_of(caplog)[0]


def test_importing_is_cheap():
    code = "import sys, pave_lightning.tracking; sys.exit('mlflow' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_messages_of_the_store_stay_quiet(store, capfd):
    start(store)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("mlflow").level >= logging.WARNING


def test_what_a_server_answers_is_told_without_its_secrets(store, monkeypatch, caplog):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = "http://user:hunter2@tracking.example"

    def refuse(client, *given, **more):
        raise MlflowException(f"API request to {uri}/api failed. Password hunter2: Connection refused")

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", refuse)
    monkeypatch.setattr("pave_lightning.tracking.tracker.connect", lambda uri: MlflowClient(store))
    assert start(uri, fallback_uri=store).uri == ""
    (message,) = warnings_of(caplog)
    assert "MlflowException: API request to http://user:***@tracking.example/api failed" in message
    assert "hunter2" not in message
