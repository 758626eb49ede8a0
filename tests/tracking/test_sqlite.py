"""Sqlite databases: made by one of several processes, mended when half made, waited for while locked."""

import os
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import pytest

from pave_lightning.tracking import Tracker, sqlite, stores
from pave_lightning.tracking.stores import connect

STARTS = """
import sys
from pave_lightning.tracking import Tracker
uri, name = sys.argv[1:]
tracker = Tracker(uri, "experiment", name, key=name, params={"seed": 1}, tags={}).start()
assert tracker.uri == uri, tracker.uri
tracker.close("FINISHED")
"""


def names_of_runs(uri):
    client = connect(uri)
    experiment = client.get_experiment_by_name("experiment")
    return {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}


def start(uri, **changes):
    return Tracker(uri, "experiment", "demo", **{"key": "abc", "params": {}, "tags": {}} | changes).start()


@pytest.fixture
def quick_making(new_database, monkeypatch):
    """New databases are copies; says which were made."""
    made = []

    def make(path):
        made.append(path)
        time.sleep(0.1)
        new_database(path)

    monkeypatch.setattr(sqlite, "_make_database", make)
    return made


def test_one_of_several_makes_the_tables(quick_making, tmp_path):
    path = tmp_path / "mlflow.db"
    threads = [threading.Thread(target=sqlite.ready, args=(path, f"sqlite:///{path}")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert quick_making == [path]


@pytest.mark.slow
def test_several_first_runs_are_all_recorded(tmp_path):
    uri = f"sqlite:///{tmp_path}/deep/mlflow.db"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path}
    running = [subprocess.Popen([sys.executable, "-c", STARTS, uri, f"r{n}"], **options) for n in range(3)]
    told = [process.communicate(timeout=280)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], told
    assert told == ["", "", ""]
    assert names_of_runs(uri) == {"r0": "FINISHED", "r1": "FINISHED", "r2": "FINISHED"}
    assert {file.name for file in (tmp_path / "deep").iterdir()} == {"mlflow.db", ".mlflow.db.lock"}


def leave_half_made(path, statements):
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(statements)
    old = time.time() - 60
    os.utime(path, (old, old))


HALF = "UPDATE alembic_version SET version_num = '7ac759974ad8'; CREATE TABLE _alembic_tmp_tags (a TEXT);"


@pytest.mark.usefixtures("quick_making")
def test_a_database_left_half_made_without_runs_is_made_anew(new_database, tmp_path, caplog):
    path = new_database(tmp_path / "mlflow.db")
    leave_half_made(path, HALF)
    tracker = start(f"sqlite:///{path}")
    assert tracker.uri == f"sqlite:///{path}"
    assert names_of_runs(tracker.uri) == {"demo": "RUNNING"}
    (message,) = caplog.messages
    assert "left half made" in message
    with closing(sqlite3.connect(tmp_path / "mlflow.db.half-made")) as aside:
        assert aside.execute("SELECT version_num FROM alembic_version").fetchone() == ("7ac759974ad8",)


@pytest.mark.usefixtures("quick_making")
def test_a_database_without_any_version_is_one_of_them(tmp_path, caplog):
    path = tmp_path / "mlflow.db"
    leave_half_made(path, "CREATE TABLE experiments (name TEXT); CREATE TABLE runs (id TEXT);")
    assert start(f"sqlite:///{path}").uri == f"sqlite:///{path}"
    assert "left half made" in caplog.text


@pytest.mark.parametrize(
    "content", ["INSERT INTO experiments (experiment_id, name) VALUES (7, 'mine');", "CREATE TABLE x AS SELECT 1 AS a;"]
)
def test_one_that_holds_anything_is_told_and_left_alone(content, new_database, store, tmp_path, caplog):
    path = new_database(tmp_path / "own" / "mlflow.db")
    leave_half_made(path, HALF + content)
    before = path.read_bytes()
    begun = time.monotonic()
    assert start(f"sqlite:///{path}", fallback_uri=store).uri == store
    assert time.monotonic() - begun < 10
    (message,) = caplog.messages
    assert "found version 7ac759974ad8" in message
    assert f"mlflow db upgrade sqlite:///{path}" in message
    assert path.read_bytes() == before


@pytest.mark.usefixtures("quick_making")
def test_an_empty_file_is_no_database_yet(tmp_path):
    path = tmp_path / "mlflow.db"
    path.touch()
    assert start(f"sqlite:///{path}").uri == f"sqlite:///{path}"


def test_tables_that_another_program_is_making_are_waited_for(new_database, tmp_path, caplog):
    path = new_database(tmp_path / "mlflow.db")
    with closing(sqlite3.connect(path)) as connection:
        (version,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        connection.executescript("UPDATE alembic_version SET version_num = '7ac759974ad8';")

    def finish():
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(f"UPDATE alembic_version SET version_num = '{version}';")

    timer = threading.Timer(0.5, finish)
    timer.start()
    tracker = start(f"sqlite:///{path}")
    timer.join()
    assert tracker.uri == f"sqlite:///{path}"
    assert caplog.messages == []


@contextmanager
def locked(path):
    """A database that somebody else keeps locked."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


def hold(path, seconds, statement="BEGIN EXCLUSIVE"):
    """Keep the database locked from another thread for some seconds."""
    taken = threading.Event()

    def run():
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute(statement)
            taken.set()
            time.sleep(seconds)
            connection.execute("ROLLBACK")

    thread = threading.Thread(target=run)
    thread.start()
    assert taken.wait(10)
    return thread


def test_a_database_locked_at_the_start_is_waited_for(new_database, tmp_path, monkeypatch, caplog):
    path = new_database(tmp_path / "mlflow.db")
    monkeypatch.setattr(sqlite, "TELL_AFTER_SECONDS", 0.1)
    caplog.set_level("INFO")
    thread = hold(path, 0.8)
    tracker = start(f"sqlite:///{path}")
    thread.join()
    assert tracker.uri == f"sqlite:///{path}"
    assert {message.partition(",")[0] for message in caplog.messages} == {f"waiting for {path}"}


@pytest.mark.slow
def test_a_lock_of_eight_seconds_moves_no_record(new_database, tmp_path, caplog):
    path = new_database(tmp_path / "mlflow.db")
    thread = hold(path, 8)
    tracker = start(f"sqlite:///{path}")
    thread.join()
    assert tracker.uri == f"sqlite:///{path}"
    thread = hold(path, 8, "BEGIN IMMEDIATE")
    tracker.log_metrics(tracker.parent_run_id, {"a": 1.0})
    thread.join()
    assert tracker.uri == f"sqlite:///{path}"
    assert caplog.messages == []


def test_patience_has_an_end(new_database, store, tmp_path, monkeypatch, caplog):
    path = new_database(tmp_path / "own" / "mlflow.db")
    monkeypatch.setattr(sqlite, "PATIENCE_SECONDS", 0.3)
    with locked(path):
        assert start(f"sqlite:///{path}", fallback_uri=store).uri == store
    assert "database is locked" in caplog.text


def test_a_stopped_run_does_not_wait_long_for_a_lock(new_database, tmp_path, monkeypatch, caplog):
    from pave_lightning.tracking import tracker as module

    path = new_database(tmp_path / "mlflow.db")
    tracker = start(f"sqlite:///{path}")
    monkeypatch.setattr(module, "STOPPING_SECONDS", 0.2)
    with locked(path):
        begun = time.monotonic()
        tracker.close("KILLED")
        assert time.monotonic() - begun < 2
    assert "the next run of the recipe mends that" in caplog.text


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_is_read_only_is_told_at_once(what, new_database, store, tmp_path, monkeypatch, caplog):
    path = new_database(tmp_path / "own" / "mlflow.db")
    closed = path if what == "file" else path.parent
    allowed = os.access
    # The tests may run as a user who may write everything
    monkeypatch.setattr(os, "access", lambda p, mode: allowed(p, mode) and not (p == closed and mode & os.W_OK))
    begun = time.monotonic()
    assert start(f"sqlite:///{path}", fallback_uri=store).uri == store
    assert time.monotonic() - begun < 5
    assert f"{closed} is read-only" in caplog.text


def test_a_damaged_database_is_told_at_once(new_database, store, tmp_path, caplog):
    path = new_database(tmp_path / "own" / "mlflow.db")
    content = bytearray(path.read_bytes())
    content[100:4096] = b"\xff" * 3996
    path.write_bytes(content)
    begun = time.monotonic()
    assert start(f"sqlite:///{path}", fallback_uri=store).uri == store
    assert time.monotonic() - begun < 10
    assert "malformed" in caplog.text


def test_other_databases_are_tried_again_while_their_tables_change(monkeypatch):
    answers = iter([RuntimeError("relation exists"), RuntimeError("relation exists"), "client"])
    states = iter([("a",), ("a", "b"), ("a", "b", "c")])

    def client(uri):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(stores, "_probe", lambda uri: None)
    monkeypatch.setattr(stores, "_client", client)
    monkeypatch.setattr(stores, "_tables", lambda uri: next(states))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert connect("postgresql://host/db") == "client"


def test_other_databases_that_do_not_change_are_given_up(monkeypatch):
    def client(uri):
        raise RuntimeError("relation exists")

    monkeypatch.setattr(stores, "_probe", lambda uri: None)
    monkeypatch.setattr(stores, "_client", client)
    monkeypatch.setattr(stores, "_tables", lambda uri: ("a",))
    monkeypatch.setattr(stores, "SETTLED_SECONDS", 0.1)
    monkeypatch.setattr(stores, "RETRY_SECONDS", 0.2)
    with pytest.raises(RuntimeError, match="relation exists"):
        connect("postgresql://host/db")


def test_names_and_versions_of_tables_of_any_database(migrated):
    tables = stores._tables(f"sqlite:///{migrated}")
    assert {"runs", "experiments", "alembic_version", sqlite._expected_version()} <= set(tables)


def test_no_statement_on_a_locked_database_waits_for_long(quick_making, tmp_path, monkeypatch):
    """A signal is seen only between two statements."""
    path = tmp_path / "mlflow.db"
    client = connect(f"sqlite:///{path}")
    with locked(path):
        begun = time.monotonic()
        with pytest.raises(Exception, match="locked"):
            client.create_experiment("more")
        assert time.monotonic() - begun < 5
    client.create_experiment("more")
