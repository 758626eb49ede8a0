"""URIs of tracking stores: what is refused, and that every path is read from its URI as it was meant."""

from pathlib import Path

import pytest

from pave_lightning.credentials import masked
from pave_lightning.errors import PaveError
from pave_lightning.tracking import Tracker
from pave_lightning.tracking.stores import connect
from pave_lightning.tracking.uris import resolve_uri, sqlite_path, sqlite_uri, with_secrets

ODD_FOLDERS = [
    "job%2Fmain",
    "100%",
    "a%20b %25",
    "what?",
    "no#1",
    "with space",
    "größe-数据",
    'it\'s "quoted"',
    "back\\slash",
    "a+b&c=d;e:f@g",
    "[*]",
]


@pytest.mark.parametrize("uri", ["mlruns", "./mlruns", "file:./mlruns", "file:///data/mlruns", "/data/mlruns"])
def test_folders_are_refused(uri):
    with pytest.raises(PaveError, match=r"no longer opens folders(.|\n)*sqlite:///.*mlruns/mlflow\.db"):
        resolve_uri(uri)


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite://mlflow.db"])
def test_sqlite_without_a_file_is_refused(uri):
    with pytest.raises(PaveError, match="names no database file"):
        resolve_uri(uri)


def test_sqlites_own_uris_are_refused():
    with pytest.raises(PaveError, match="Write the path"):
        resolve_uri("sqlite:///file:/data/mlflow.db?uri=true")


def test_resolve_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///a/b.db?timeout=9") == f"sqlite:///{tmp_path}/a/b.db?timeout=9"
    assert resolve_uri("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert resolve_uri("https://host/path") == "https://host/path"
    assert resolve_uri("postgresql+psycopg2://host/db") == "postgresql+psycopg2://host/db"


@pytest.mark.parametrize("name", ODD_FOLDERS)
def test_a_path_is_read_as_it_was_written(name):
    from sqlalchemy.engine import make_url

    path = Path("/data") / name / f"{name}.db"
    uri = sqlite_uri(path)
    assert make_url(uri).database == str(path)
    assert sqlite_path(uri) == path
    assert resolve_uri(uri) == uri
    assert masked(uri) == uri


@pytest.mark.parametrize("name", ODD_FOLDERS)
def test_records_and_artifacts_land_in_the_folder(name, new_database, tmp_path, monkeypatch, caplog):
    folder = tmp_path / name
    new_database(folder / "mlruns" / "mlflow.db")
    monkeypatch.chdir(folder)
    tracker = Tracker("sqlite:///mlruns/mlflow.db", "experiment", "demo", key="abc", params={}, tags={}).start()
    assert caplog.messages == []
    tracker.log_text(tracker.parent_run_id, "hello", "notes/hello.txt")
    run_folder = folder / "mlruns" / "artifacts" / "experiment" / tracker.parent_run_id / "artifacts"
    assert (run_folder / "notes" / "hello.txt").read_text() == "hello"
    # As the pages of `mlflow ui` ask for them
    client = connect(tracker.uri)
    assert [file.path for file in client.list_artifacts(tracker.parent_run_id, "notes")] == ["notes/hello.txt"]
    assert [file.name for file in tmp_path.iterdir()] == [name], "MLflow makes folders of its own"
    assert [file.name for file in folder.iterdir()] == ["mlruns"]


def test_a_percent_sign_in_a_uri_that_was_meant_as_it_stands_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job%2Fmain").mkdir()
    with pytest.raises(PaveError, match=r"job%2Fmain/a\.db write sqlite\+pysqlite:///job%252Fmain/a\.db"):
        resolve_uri("sqlite:///job%2Fmain/a.db")
    assert sqlite_path(resolve_uri("sqlite:///job%252Fmain/a.db")) == tmp_path / "job%2Fmain" / "a.db"


def test_a_way_back_out_of_a_link_is_the_systems(tmp_path, monkeypatch):
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far" / "inner")
    monkeypatch.chdir(tmp_path / "near")
    assert resolve_uri("sqlite:///link/../a.db") == f"sqlite:///{tmp_path}/far/a.db"
    assert resolve_uri("sqlite:///link/a.db") == f"sqlite:///{tmp_path}/near/link/a.db"


WITH_SECRETS = [
    "http://user:hunter2@host:5000/api",
    "postgresql://user:hunt@er2@host/db",
    "https://hunter2@host/repository",
    "https://host/mlflow?token=hunter2",
]


@pytest.mark.parametrize("variable", ["PAVE_TRACKING_URI", "MLFLOW_TRACKING_URI"])
@pytest.mark.parametrize("uri", WITH_SECRETS)
def test_the_environment_gives_secrets_back(uri, variable, monkeypatch):
    monkeypatch.setenv(variable, uri)
    assert resolve_uri(masked(uri)) == uri
    assert with_secrets("http://other") == "http://other"


def test_the_password_alone_will_do_for_a_server(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunt@er2")
    assert resolve_uri("https://user:***@host/a") == "https://user:hunt%40er2@host/a"
    with pytest.raises(PaveError, match="PAVE_TRACKING_URI"):
        resolve_uri("https://host/a?token=***")


def test_another_uri_in_the_environment_is_not_taken(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@elsewhere")
    with pytest.raises(PaveError) as caught:
        resolve_uri("http://user:***@host")
    assert "PAVE_TRACKING_URI" in str(caught.value)
    assert "http://user:***@elsewhere, which is another URI" in str(caught.value)
    assert "hunter2" not in str(caught.value)
